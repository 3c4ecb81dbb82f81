%%% Groups of processes through erlmcp_group.
%%%
%%% The contract: a process is a member from its join until it leaves or exits, once in a group at most. A member that has
%%% exited is never returned. A message to a group arrives once at each member that is admitted; a message to one member
%%% arrives at one. Groups, connections and registries know nothing of each other. Wrong arguments raise badarg and
%%% change nothing.
%%%
%%% The grouped cases run on the default registry and on registries from new/1: see registry_variants.
-module(group_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([join_and_leave/1,
         joining_twice_is_joining_once/1,
         members_leave_when_they_exit/1,
         exited_members_are_never_returned/1,
         any_term_is_a_group/1,
         groups_and_connections_are_apart/1,
         groups_of_a_process/1,
         each_in_turn/1,
         any_member/1,
         a_key_keeps_its_member/1,
         wrong_arguments_change_nothing/1,
         process_of_a_former_node/1,
         leave_against_exit/1,
         join_against_exit/1,
         last_leave_against_join/1,
         join_against_join/1,
         join_against_list/1]).
-export([members_are_entries/1,
         a_registry_is_freed_with_its_groups/1,
         route_to_all/1,
         route_to_thousands/1,
         route_to_one/1,
         each_member_is_admitted_by_itself/1,
         an_open_circuit_refuses_groups/1,
         groups_are_native_in_every_mode/1,
         members_of_another_node/1]).

%% Called in a peer node
-export([in_other_node/0, echo/0]).

-import(registry_variants, [nif_registry/1, registry/1]).
-import(test_support, [await/1, await_end/1, await_value/2, kill/1, process/0, stop/1]).
-import(test_terms, [all_ids/0, external_pid/2]).

-define(M, erlmcp_group).
-define(S, erlmcp_shard_registry).
-define(G, {group, <<"of this case">>}).


suite() ->
    [{timetrap, {minutes, 5}}].


all() ->
    [{group, default},
     {group, named},
     {group, own},
     members_are_entries,
     a_registry_is_freed_with_its_groups,
     route_to_all,
     route_to_thousands,
     route_to_one,
     each_member_is_admitted_by_itself,
     an_open_circuit_refuses_groups,
     groups_are_native_in_every_mode,
     members_of_another_node].


groups() ->
    registry_variants:groups([join_and_leave,
                              joining_twice_is_joining_once,
                              members_leave_when_they_exit,
                              exited_members_are_never_returned,
                              any_term_is_a_group,
                              groups_and_connections_are_apart,
                              groups_of_a_process,
                              each_in_turn,
                              any_member,
                              a_key_keeps_its_member,
                              wrong_arguments_change_nothing,
                              process_of_a_former_node,
                              leave_against_exit,
                              join_against_exit,
                              last_leave_against_join,
                              join_against_join,
                              join_against_list]).


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_group(Group, Config) ->
    registry_variants:init_per_group(Group, Config).


end_per_group(_Group, _Config) ->
    ok.


init_per_testcase(Case, Config) ->
    registry_variants:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_variants:end_per_testcase(Case, Config).


%% Calls a function with or without a registry as its first argument.
api(default, Function, Arguments) -> apply(?M, Function, Arguments);
api({explicit, Registry}, Function, Arguments) -> apply(?M, Function, [Registry | Arguments]).


processes(Count) -> [ process() || _ <- lists:seq(1, Count) ].


joined(R, Group, Count) ->
    Pids = processes(Count),
    [ ok = api(R, join, [Group, Pid]) || Pid <- Pids ],
    Pids.


%%% Membership


join_and_leave(Config) ->
    R = registry(Config),
    [A, B] = processes(2),
    ?assertEqual([], api(R, members, [?G])),
    ?assertEqual(0, api(R, count, [?G])),
    ?assertEqual({error, not_joined}, api(R, leave, [?G, A])),
    ok = api(R, join, [?G, A]),
    ok = api(R, join, [?G, B]),
    ok = api(R, join, [other, A]),
    ?assertEqual(lists:sort([A, B]), lists:sort(api(R, members, [?G]))),
    ?assertEqual(2, api(R, count, [?G])),
    ok = api(R, leave, [?G, A]),
    ?assertEqual({error, not_joined}, api(R, leave, [?G, A])),
    ?assertEqual([B], api(R, members, [?G])),
    ?assertEqual([A], api(R, members, [other])),
    ok = api(R, leave, [?G, B]),
    ?assertEqual([], api(R, members, [?G])),
    ok = api(R, join, [?G, A]),
    ?assertEqual([A], api(R, members, [?G])),
    lists:foreach(fun test_support:stop/1, [A, B]).


joining_twice_is_joining_once(Config) ->
    R = registry(Config),
    [A] = joined(R, ?G, 1),
    ok = api(R, join, [?G, A]),
    ?assertEqual([A], api(R, members, [?G])),
    ?assertEqual(1, api(R, count, [?G])),
    ok = api(R, leave, [?G, A]),
    ?assertEqual([], api(R, members, [?G])),
    stop(A).


members_leave_when_they_exit(Config) ->
    R = registry(Config),
    Pids = joined(R, ?G, 100),
    [ ok = api(R, join, [{N, ?G}, Pid]) || Pid <- Pids, N <- lists:seq(1, 20) ],
    {Killed, Left} = lists:split(50, Pids),
    lists:foreach(fun test_support:kill/1, Killed),
    [ begin
          ?assertEqual(lists:sort(Left), lists:sort(api(R, members, [Group]))),
          await_value(50, fun() -> api(R, count, [Group]) end)
      end || Group <- [?G | [ {N, ?G} || N <- lists:seq(1, 20) ]] ],
    lists:foreach(fun test_support:stop/1, Left).


%% A process with many monitors takes long to exit, and its memberships are removed one by one after others see it exit.
exited_members_are_never_returned(Config) ->
    R = registry(Config),
    [Stays] = joined(R, ?G, 1),
    [ begin
          [Pid] = joined(R, ?G, 1),
          [ ok = api(R, join, [{N, ?G}, Pid]) || N <- lists:seq(1, 200) ],
          exit(Pid, kill),
          await_end(Pid),
          ?assertEqual([Stays], api(R, members, [?G])),
          [ ?assertEqual(Stays, api(R, pick, [?G, Selection])) || Selection <- [round_robin, random, {key, Pid}] ],
          ?assertEqual(undefined, api(R, pick, [{200, ?G}, random])),
          ?assertEqual([], api(R, members, [{100, ?G}]))
      end || _ <- lists:seq(1, 100) ],
    stop(Stays).


any_term_is_a_group(Config) ->
    R = registry(Config),
    Groups = all_ids(),
    Pid = process(),
    [ ok = api(R, join, [Group, Pid]) || Group <- Groups ],
    [ ?assertEqual([Pid], api(R, members, [Group])) || Group <- Groups ],
    ?assertEqual(lists:sort(Groups), lists:sort(api(R, groups_of, [Pid]))),
    [ ok = api(R, leave, [Group, Pid]) || Group <- Groups ],
    ?assertEqual([], api(R, groups_of, [Pid])),
    stop(Pid).


groups_and_connections_are_apart(Config) ->
    R = registry(Config),
    Registry = nif_registry(R),
    [A, B] = processes(2),
    ok = ?S:register_connection(Registry, ?G, A, none),
    ok = api(R, join, [?G, B]),
    ?assertEqual(A, ?S:whereis_name(Registry, ?G)),
    ?assertEqual([B], api(R, members, [?G])),
    ?assertEqual([?G], ?S:connections_of(Registry, A)),
    ?assertEqual([], api(R, groups_of, [A])),
    ok = ?S:unregister_connection(Registry, ?G),
    ?assertEqual([B], api(R, members, [?G])),
    Other = ?S:new(),
    ?assertEqual([], ?M:members(Other, ?G)),
    lists:foreach(fun test_support:stop/1, [A, B]).


groups_of_a_process(Config) ->
    R = registry(Config),
    Groups = [ {N, ?G} || N <- lists:seq(1, 2000) ],
    Pid = process(),
    [ ok = api(R, join, [Group, P]) || Group <- Groups, P <- [Pid, self()] ],
    [ ?assertEqual(lists:sort(Groups), lists:sort(api(R, groups_of, [P]))) || P <- [Pid, self()] ],
    [ ok = api(R, leave, [Group, self()]) || Group <- Groups ],
    ?assertEqual([], api(R, groups_of, [self()])),
    stop(Pid),
    ?assertEqual([], api(R, groups_of, [Pid])).


%%% One member


each_in_turn(Config) ->
    R = registry(Config),
    ?assertEqual(undefined, api(R, pick, [?G, round_robin])),
    Pids = joined(R, ?G, 7),
    Turns = [ api(R, pick, [?G, round_robin]) || _ <- lists:seq(1, 21) ],
    ?assertEqual(lists:sort(Pids ++ Pids ++ Pids), lists:sort(Turns)),
    %% No member comes again before all others have had their turn.
    {First, Rest} = lists:split(7, Turns),
    ?assertEqual(First ++ First, Rest),
    lists:foreach(fun test_support:stop/1, Pids).


any_member(Config) ->
    R = registry(Config),
    ?assertEqual(undefined, api(R, pick, [?G, random])),
    Pids = joined(R, ?G, 5),
    Picked = [ api(R, pick, [?G, random]) || _ <- lists:seq(1, 2000) ],
    %% The probability of a member that is never picked is below 10^-193.
    ?assertEqual(lists:sort(Pids), lists:usort(Picked)),
    lists:foreach(fun test_support:stop/1, Pids).


a_key_keeps_its_member(Config) ->
    R = registry(Config),
    ?assertEqual(undefined, api(R, pick, [?G, {key, 1}])),
    Pids = joined(R, ?G, 8),
    Keys = [ {client, N} || N <- lists:seq(1, 500) ],
    Choice = fun() -> [ {Key, api(R, pick, [?G, {key, Key}])} || Key <- Keys ] end,
    Chosen = Choice(),
    ?assertEqual(Chosen, Choice()),
    ?assertEqual(lists:sort(Pids), lists:usort([ Pid || {_, Pid} <- Chosen ])),
    Leaver = hd(Pids),
    ok = api(R, leave, [?G, Leaver]),
    Left = Choice(),
    ?assertEqual([], [ Key || {{Key, Was}, {Key, Is}} <- lists:zip(Chosen, Left), Was =/= Is, Was =/= Leaver ]),
    Joiner = process(),
    ok = api(R, join, [?G, Joiner]),
    ?assertEqual([], [ Key || {{Key, Was}, {Key, Is}} <- lists:zip(Left, Choice()), Was =/= Is, Is =/= Joiner ]),
    lists:foreach(fun test_support:stop/1, [Joiner | Pids]).


%%% Wrong arguments


wrong_arguments_change_nothing(Config) ->
    R = registry(Config),
    [Pid] = joined(R, ?G, 1),
    Captured = Pid,
    NoIds = [fun() -> Captured end, {a, [fun() -> Captured end]}, binary:copy(<<"x">>, 65_536)],
    [ ?assertError(badarg, api(R, Function, [NoId | Arguments]))
      || NoId <- NoIds,
         {Function, Arguments} <- [{join, [Pid]}, {leave, [Pid]}, {members, []}, {count, []}, {pick, [random]}] ],
    [ ?assertError(badarg, api(R, Function, [?G, NoPid])) || Function <- [join, leave], NoPid <- [a, <<"p">>, 1, [Pid]] ],
    [ ?assertError(badarg, api(R, groups_of, [NoPid])) || NoPid <- [a, external_pid(<<"other@host">>, 1)] ],
    [ ?assertError(badarg, api(R, pick, [?G, Selection])) || Selection <- [first, {key}, [k], {key, 1, 2}, {key, hd(NoIds)}] ],
    [ ?assertError(badarg, ?M:route_member(?G, Selection, hello)) || Selection <- [first, [k], {key, hd(NoIds)}] ],
    [ ?assertError(badarg, apply(?M, Function, [make_ref() | Arguments]))
      || {Function, Arguments} <- [{join, [?G, Pid]},
                                   {leave, [?G, Pid]},
                                   {members, [?G]},
                                   {count, [?G]},
                                   {pick, [?G, random]},
                                   {groups_of, [Pid]},
                                   {groups_of, [self()]}] ],
    ?assertEqual([Pid], api(R, members, [?G])),
    ?assertEqual([?G], api(R, groups_of, [Pid])),
    Shown = fun(Call) -> lists:flatten(test_support:shown_error(Call)) end,
    ?assertMatch([_ | _], string:find(Shown(fun() -> api(R, join, [?G, a]) end), "not a pid")),
    ?assertMatch([_ | _], string:find(Shown(fun() -> api(R, pick, [?G, first]) end), "not round_robin, random or {key, Key}")),
    ?assertMatch([_ | _], string:find(Shown(fun() -> ?M:route_member(?G, first, hello) end), "not round_robin")),
    stop(Pid).


process_of_a_former_node(Config) ->
    R = registry(Config),
    ok = api(R, join, [?G, external_pid(atom_to_binary(node()), 100)]),
    ?assertEqual([], api(R, members, [?G])),
    ?assertEqual(0, api(R, count, [?G])).


%%% Races


leave_against_exit(Config) ->
    R = registry(Config),
    Results = [ begin
                    [Pid] = joined(R, ?G, 1),
                    exit(Pid, kill),
                    Result = api(R, leave, [?G, Pid]),
                    await_end(Pid),
                    ?assertEqual([], api(R, members, [?G])),
                    await_value(0, fun() -> api(R, count, [?G]) end),
                    Result
                end || _ <- lists:seq(1, 1000) ],
    ?assertEqual([], lists:usort(Results) -- [ok, {error, not_joined}]).


join_against_exit(Config) ->
    R = registry(Config),
    [ begin
          Pid = process(),
          exit(Pid, kill),
          ok = api(R, join, [?G, Pid]),
          await_end(Pid),
          ?assertEqual([], api(R, members, [?G])),
          await_value(0, fun() -> api(R, count, [?G]) end)
      end || _ <- lists:seq(1, 1000) ].


%% The group ends with its last member, while others join it: none of them joins the group that has ended.
last_leave_against_join(Config) ->
    R = registry(Config),
    Parent = self(),
    Workers = [ spawn_link(fun() ->
                                   [ begin
                                         ok = api(R, join, [?G, self()]),
                                         true = lists:member(self(), api(R, members, [?G])),
                                         true = is_pid(api(R, pick, [?G, round_robin])),
                                         ok = api(R, leave, [?G, self()]),
                                         false = lists:member(self(), api(R, members, [?G]))
                                     end || _ <- lists:seq(1, 20_000) ],
                                   Parent ! {self(), done}
                           end) || _ <- [1, 2, 3] ],
    [ receive {Pid, done} -> ok end || Pid <- Workers ],
    ?assertEqual({0, []}, {api(R, count, [?G]), api(R, members, [?G])}).


%% One process joined and left by two others: it is a member or not, and counted as such.
join_against_join(Config) ->
    R = registry(Config),
    Member = process(),
    Parent = self(),
    Workers = [ spawn_link(fun() ->
                                   Left = [ begin
                                                ok = api(R, join, [?G, Member]),
                                                api(R, leave, [?G, Member])
                                            end || _ <- lists:seq(1, 10_000) ],
                                   Parent ! {self(), length([ ok || ok <- Left ])}
                           end) || _ <- [1, 2] ],
    Left = lists:sum([ receive {Pid, Count} -> Count end || Pid <- Workers ]),
    %% Each membership has ended once.
    ?assert(Left > 0 andalso Left =< 20_000, Left),
    ?assertEqual({0, []}, {api(R, count, [?G]), api(R, members, [?G])}),
    stop(Member).


%% Members that stay are listed once, whoever comes and goes.
join_against_list(Config) ->
    R = registry(Config),
    Stay = joined(R, ?G, 2000),
    Parent = self(),
    Comers = [ spawn_link(fun() ->
                                  Parent ! {self(), here},
                                  come_and_go(R)
                          end) || _ <- [1, 2] ],
    [ receive {Pid, here} -> ok end || Pid <- Comers ],
    [ ?assertEqual(lists:sort(Stay), lists:sort(api(R, members, [?G]) -- Comers)) || _ <- lists:seq(1, 200) ],
    [ begin Monitor = monitor(process, Pid), Pid ! stop, receive {'DOWN', Monitor, process, Pid, normal} -> ok end end || Pid <- Comers ],
    lists:foreach(fun test_support:stop/1, Stay).


come_and_go(R) ->
    ok = api(R, join, [?G, self()]),
    ok = api(R, leave, [?G, self()]),
    receive
        stop -> ok
    after
        0 ->
            come_and_go(R)
    end.


%%% Bounds and freeing


members_are_entries(_Config) ->
    R = ?S:new(#{max_entries => 3}),
    [A, B] = processes(2),
    ok = ?S:register_connection(R, id, A, none),
    ok = ?M:join(R, ?G, A),
    ok = ?M:join(R, ?G, B),
    ?assertEqual({error, registry_full}, ?M:join(R, other, A)),
    %% Already a member.
    ?assertEqual(ok, ?M:join(R, ?G, A)),
    ?assertEqual({error, registry_full}, ?S:register_connection(R, other, B, none)),
    ?assertMatch(#{connections := 1, memberships := 2}, ?S:stats(R)),
    kill(B),
    ?assertEqual(ok, ?M:join(R, other, A)),
    stop(A).


a_registry_is_freed_with_its_groups(_Config) ->
    Pids = processes(100),
    Before = test_support:resident_bytes(),
    [ test_support:in_process(fun() ->
                                      R = ?S:new(#{shards => 1}),
                                      [ ok = ?M:join(R, {?G, N}, Pid) || Pid <- Pids, N <- lists:seq(1, 10) ]
                              end) || _ <- lists:seq(1, 300) ],
    %% Three hundred thousand memberships take some hundred megabytes.
    Grown = test_support:resident_bytes() - Before,
    ?assert(Grown < 40_000_000, Grown),
    [ ?assertEqual([], ?M:groups_of(Pid)) || Pid <- Pids ],
    lists:foreach(fun test_support:stop/1, Pids).


%%% Routing, in the default registry


%% A process that collects what it is sent.
collector() ->
    spawn_link(fun() -> collect([]) end).


collect(Messages) ->
    receive
        {From, collected} ->
            From ! {self(), lists:reverse(Messages)},
            collect(Messages);
        stop ->
            ok;
        Message ->
            collect([Message | Messages])
    end.


collected(Pid) ->
    Pid ! {self(), collected},
    receive {Pid, Messages} -> Messages end.


collectors(Group, Count) ->
    Pids = [ collector() || _ <- lists:seq(1, Count) ],
    [ ok = ?M:join(Group, Pid) || Pid <- Pids ],
    Pids.


ended_collectors(Pids) ->
    [ begin unlink(Pid), stop(Pid) end || Pid <- Pids ].


route_to_all(_Config) ->
    ?assertEqual({error, not_found}, ?M:route_group(?G, hello)),
    [Gone | Pids] = collectors(?G, 20),
    ok = ?M:leave(?G, Gone),
    [ ?assertEqual(ok, ?M:route_group(?G, {n, N})) || N <- lists:seq(1, 100) ],
    [ ?assertEqual([ {n, N} || N <- lists:seq(1, 100) ], collected(Pid)) || Pid <- Pids ],
    ?assertEqual([], collected(Gone)),
    ended_collectors([Gone | Pids]),
    await_value({error, not_found}, fun() -> ?M:route_group(?G, hello) end).


%% On a dirty scheduler.
route_to_thousands(_Config) ->
    Pids = collectors(?G, 5000),
    ok = ?M:route_group(?G, hello),
    ok = ?M:route_group(?G, again),
    ?assertEqual([[hello, again]], lists:usort([ collected(Pid) || Pid <- Pids ])),
    ended_collectors(Pids).


route_to_one(_Config) ->
    Pids = collectors(?G, 4),
    [ ?assertEqual({error, not_found}, ?M:route_member(nobody, Selection, hello))
      || Selection <- [round_robin, random, {key, k}] ],
    [ ok = ?M:route_member(?G, round_robin, {turn, N}) || N <- lists:seq(1, 40) ],
    Turns = [ [ N || {turn, N} <- collected(Pid) ] || Pid <- Pids ],
    ?assertEqual([10, 10, 10, 10], [ length(Turn) || Turn <- Turns ]),
    ?assertEqual(lists:seq(1, 40), lists:sort(lists:append(Turns))),
    [ ok = ?M:route_member(?G, {key, <<"client">>}, {keyed, N}) || N <- lists:seq(1, 10) ],
    Keyed = [ [ N || {keyed, N} <- collected(Pid) ] || Pid <- Pids ],
    ?assertEqual([[], [], [], lists:seq(1, 10)], lists:sort(Keyed)),
    ok = ?M:route_member(?G, random, last),
    ?assertEqual([last], [ last || Pid <- Pids, last <- collected(Pid) ]),
    ended_collectors(Pids).


with_application(Environment, Run) ->
    _ = application:load(erlmcp_native),
    Keys = [admission, token_bucket, circuit_breaker],
    Settings = maps:merge(#{admission => infinity, token_bucket => infinity, circuit_breaker => off}, Environment),
    [ ok = application:set_env(erlmcp_native, Key, maps:get(Key, Settings)) || Key <- Keys ],
    ok = application:start(erlmcp_native),
    try
        Run()
    after
        [ application:unset_env(erlmcp_native, Key) || Key <- Keys ],
        ok = erlmcp_native_config:configure(),
        ok = application:stop(erlmcp_native)
    end.


%% One member does not read. Its shard refuses it, and the others get every message.
each_member_is_admitted_by_itself(_Config) ->
    %% So that samples that are suspended are not missed.
    with_application(#{admission => #{threshold => 1_000_000, sample_interval_ms => 60_000}},
                     fun() ->
                             ok = test_support:await_samplers(),
                             Stalled = spawn_link(fun() -> receive resume -> collect([]) end end),
                             Shard = erlang:phash2(Stalled, 64),
                             %% A message that is sent while its receiver is sampled would count twice.
                             Manager = erlmcp_shard_sampler:name(Shard),
                             ok = sys:suspend(Manager),
                             ok = erlmcp_admission_control:set_threshold(Shard, 50),
                             ok = ?M:join(?G, Stalled),
                             Others = [ Pid || Pid <- [ collector() || _ <- lists:seq(1, 40) ], erlang:phash2(Pid, 64) =/= Shard ],
                             [ ok = ?M:join(?G, Pid) || Pid <- Others ],
                             Results = [ begin
                                             Result = ?M:route_group(?G, {n, N}),
                                             %% They keep up.
                                             [ collected(Pid) || Pid <- Others ],
                                             Result
                                         end || N <- lists:seq(1, 200) ],
                             ?assertEqual(50, length([ ok || ok <- Results ])),
                             ?assertEqual(150, length([ refused || {error, shard_overloaded} <- Results ])),
                             [ ?assertEqual(200, length(collected(Pid))) || Pid <- Others ],
                             %% One of all members is refused, and it is not asked a second time in a round.
                             Turns = [ ?M:route_member(?G, round_robin, hello) || _ <- [Stalled | Others] ],
                             ?assertEqual([{error, shard_overloaded}], [ Turn || Turn <- Turns, Turn =/= ok ]),
                             Stalled ! resume,
                             ok = sys:resume(Manager),
                             ok = erlmcp_native:set(admission, #{sample_interval_ms => 10}),
                             await(fun() -> ?M:route_group(?G, last) =:= ok end),
                             ended_collectors([Stalled | Others])
                     end).


an_open_circuit_refuses_groups(_Config) ->
    with_application(#{circuit_breaker => #{failure_threshold => 50}},
                     fun() ->
                             Pids = collectors(?G, 3),
                             ok = erlmcp_circuit_breaker:force_open(),
                             ?assertEqual({error, circuit_open}, ?M:route_group(?G, hello)),
                             ?assertEqual({error, circuit_open}, ?M:route_member(?G, random, hello)),
                             ok = erlmcp_circuit_breaker:force_close(),
                             ?assertEqual(ok, ?M:route_group(?G, hello)),
                             [ ?assertEqual([hello], collected(Pid)) || Pid <- Pids ],
                             ended_collectors(Pids)
                     end).


groups_are_native_in_every_mode(_Config) ->
    with_application(#{},
                     fun() ->
                             {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
                             Pids = [ collector() || _ <- [1, 2, 3] ],
                             [ begin
                                   ok = erlmcp_rollout:set(Mode),
                                   [ ok = ?M:join(?G, Pid) || Pid <- Pids ],
                                   ok = ?M:route_group(?G, Mode),
                                   ok = ?M:route_member(?G, round_robin, one),
                                   ?assertEqual(3, length(?M:members(?G))),
                                   ?assertEqual([?G], ?M:groups_of(hd(Pids))),
                                   [ ok = ?M:leave(?G, Pid) || Pid <- Pids ]
                               end || Mode <- [current, {percent, 50}, '100x'] ],
                             [ ?assertEqual([current, {percent, 50}, '100x'], [ Mode || Mode <- collected(Pid), Mode =/= one ])
                               || Pid <- Pids ],
                             ended_collectors(Pids),
                             ok = gen_server:stop(Registry)
                     end).


%%% Other nodes


members_of_another_node(_Config) ->
    ok = test_support:in_peer(?MODULE, in_other_node).


in_other_node() ->
    test_support:become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    pong = net_adm:ping(Node),
    [Here, There, Gone] = [spawn(?MODULE, echo, []), spawn(Node, ?MODULE, echo, []), spawn(Node, ?MODULE, echo, [])],
    [ ok = ?M:join(?G, Pid) || Pid <- [Here, There, There, Gone] ],
    ?assertEqual(lists:sort([Here, There, Gone]), lists:sort(?M:members(?G))),
    ok = ?M:leave(?G, Gone),
    ?assertEqual({error, not_joined}, ?M:leave(?G, Gone)),
    ok = ?M:route_group(?G, {self(), 1}),
    [ receive {Pid, 1} -> ok end || Pid <- [Here, There] ],
    Answers = [ begin
                    ok = ?M:route_member(?G, round_robin, {self(), N}),
                    receive {Pid, N} -> Pid end
                end || N <- lists:seq(1, 4) ],
    ?assertEqual(lists:sort([Here, Here, There, There]), lists:sort(Answers)),
    peer:stop(Peer),
    await_value([Here], fun() -> ?M:members(?G) end),
    await_value(1, fun() -> ?M:count(?G) end),
    ok.


echo() ->
    receive
        {From, N} ->
            From ! {self(), N},
            echo()
    end.
