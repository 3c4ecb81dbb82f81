%%% erlmcp_shard_registry through its API alone.
%%%
%%% The contract: a registered id is found until its process exits or it is unregistered; a shard is
%%% erlang:phash2(Id, Shards); wrong arguments raise badarg and change nothing.
%%%
%%% The grouped cases run on the default registry and on registries from new/1: see registry_variants.
-module(shard_registry_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([register_lookup_unregister/1,
         first_registration_wins/1,
         only_the_holder_is_released/1,
         the_first_is_found_by_the_others/1,
         one_of_many_registers/1,
         a_connection_is_replaced/1,
         two_replacers/1,
         capabilities_are_updated/1,
         update_against_exit/1,
         updates_keep_tokens_and_limits/1,
         ids_of_a_process/1,
         ids_of_a_process_while_they_change/1,
         late_release_against_the_next_registration/1,
         process_under_several_ids/1,
         ended_process_is_accepted_and_not_found/1,
         ends_with_its_process/1,
         wrong_arguments_change_nothing/1,
         shard_is_phash2/1,
         shards_are_listed_and_counted/1,
         no_such_shard/1,
         list_of_thousands/1,
         fold_visits_everything_once/1,
         select_by_capabilities/1,
         fold_while_connections_come_and_go/1,
         process_of_a_former_node/1,
         exports_are_known/1]).

-import(registry_variants, [api/3, nif_registry/1, registry/1]).
-import(test_support, [process/0, stop/1]).
-import(test_terms, [all_ids/0, external_pid/2]).

-define(M, erlmcp_shard_registry).


all() ->
    [exports_are_known,
     updates_keep_tokens_and_limits,
     {group, default},
     {group, named},
     {group, own}].


groups() ->
    registry_variants:groups([register_lookup_unregister,
                              first_registration_wins,
                              only_the_holder_is_released,
                              the_first_is_found_by_the_others,
                              one_of_many_registers,
                              a_connection_is_replaced,
                              two_replacers,
                              capabilities_are_updated,
                              update_against_exit,
                              ids_of_a_process,
                              ids_of_a_process_while_they_change,
                              late_release_against_the_next_registration,
                              process_under_several_ids,
                              ended_process_is_accepted_and_not_found,
                              ends_with_its_process,
                              wrong_arguments_change_nothing,
                              shard_is_phash2,
                              shards_are_listed_and_counted,
                              no_such_shard,
                              list_of_thousands,
                              fold_visits_everything_once,
                              select_by_capabilities,
                              fold_while_connections_come_and_go,
                              process_of_a_former_node]).


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


%%% On any registry


register_lookup_unregister(Config) ->
    R = registry(Config),
    Id = <<"connection">>,
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual(undefined, api(R, whereis_connection, [Id])),
    ?assertEqual(ok, api(R, unregister_connection, [Id])),
    Count = api(R, count, []),
    ?assertEqual(ok, api(R, register_connection, [Id, self(), #{version => 1}])),
    ?assertEqual({ok, {self(), #{version => 1}}}, api(R, lookup_connection, [Id])),
    ?assertEqual(self(), api(R, whereis_connection, [Id])),
    ?assertEqual(Count + 1, api(R, count, [])),
    ?assertEqual(ok, api(R, unregister_connection, [Id])),
    ?assertEqual(ok, api(R, unregister_connection, [Id])),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual(undefined, api(R, whereis_connection, [Id])),
    ?assertEqual(Count, api(R, count, [])),
    %% A connection is neither a server nor a transport.
    ?assertEqual(ok, api(R, register_connection, [Id, self(), none])),
    ?assertEqual(undefined, erlmcp_nif:whereis(nif_registry(R), server, Id)),
    ?assertEqual(undefined, erlmcp_nif:whereis(nif_registry(R), transport, Id)),
    ?assertEqual(ok, api(R, unregister_connection, [Id])).


first_registration_wins(Config) ->
    R = registry(Config),
    Id = <<"taken">>,
    Other = process(),
    ok = api(R, register_connection, [Id, self(), first]),
    ?assertEqual({error, already_registered}, api(R, register_connection, [Id, Other, second])),
    ?assertEqual({error, already_registered}, api(R, register_connection, [Id, self(), third])),
    ?assertEqual({ok, {self(), first}}, api(R, lookup_connection, [Id])),
    %% The exit of the process that was refused changes nothing.
    stop(Other),
    ?assertEqual({ok, {self(), first}}, api(R, lookup_connection, [Id])),
    ok = api(R, unregister_connection, [Id]),
    ?assertEqual(ok, api(R, register_connection, [Id, self(), fourth])),
    ?assertEqual({ok, {self(), fourth}}, api(R, lookup_connection, [Id])),
    ok = api(R, unregister_connection, [Id]).


only_the_holder_is_released(Config) ->
    R = registry(Config),
    Id = <<"held">>,
    Other = process(),
    Count = api(R, count, []),
    ?assertEqual({error, not_held}, api(R, release_connection, [Id, self()])),
    ok = api(R, register_connection, [Id, self(), first]),
    ?assertEqual({error, not_held}, api(R, release_connection, [Id, Other])),
    ?assertEqual({error, not_held}, api(R, release_connection, [<<"another">>, self()])),
    ?assertEqual({ok, {self(), first}}, api(R, lookup_connection, [Id])),
    ?assertEqual(ok, api(R, release_connection, [Id, self()])),
    ?assertEqual({error, not_held}, api(R, release_connection, [Id, self()])),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual(Count, api(R, count, [])),
    %% The process may be released from one id and keep another.
    [ ok = api(R, register_connection, [N, Other, none]) || N <- [1, 2] ],
    ?assertEqual(ok, api(R, release_connection, [1, Other])),
    ?assertEqual({undefined, Other}, {api(R, whereis_connection, [1]), api(R, whereis_connection, [2])}),
    stop(Other),
    ?assertError(badarg, api(R, release_connection, [Id, not_a_pid])),
    ?assertError(badarg, api(R, release_connection, [binary:copy(<<"x">>, 70_000), self()])).


the_first_is_found_by_the_others(Config) ->
    R = registry(Config),
    Id = <<"one of them">>,
    Count = api(R, count, []),
    ?assertEqual({registered, {self(), first}}, api(R, register_or_find_connection, [Id, self(), first])),
    Other = process(),
    ?assertEqual({found, {self(), first}}, api(R, register_or_find_connection, [Id, Other, second])),
    ?assertEqual({found, {self(), first}}, api(R, register_or_find_connection, [Id, self(), third])),
    ?assertEqual(Count + 1, api(R, count, [])),
    ok = api(R, unregister_connection, [Id]),
    ?assertEqual({registered, {Other, second}}, api(R, register_or_find_connection, [Id, Other, second])),
    stop(Other),
    %% A process that has exited is not found.
    Large = lists:seq(1, 20_000),
    ?assertEqual({registered, {self(), Large}}, api(R, register_or_find_connection, [Id, self(), Large])),
    ?assertEqual({found, {self(), Large}}, api(R, register_or_find_connection, [Id, self(), none])),
    ok = api(R, unregister_connection, [Id]),
    ?assertEqual({registered, {Other, none}}, api(R, register_or_find_connection, [Id, Other, none])),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual(Count, api(R, count, [])).


%% Concurrent callers agree on one of them.
one_of_many_registers(Config) ->
    R = registry(Config),
    [ begin
          Id = {<<"agreed">>, Round},
          Parent = self(),
          Pids = [ spawn_link(fun() ->
                                      receive go -> ok end,
                                      Parent ! {self(), api(R, register_or_find_connection, [Id, self(), self()])},
                                      receive stop -> ok end
                              end) || _ <- lists:seq(1, 8) ],
          [ Pid ! go || Pid <- Pids ],
          Results = [ {Pid, receive {Pid, Result} -> Result end} || Pid <- Pids ],
          [{Winner, _}] = [ Result || {_, {registered, _}} = Result <- Results ],
          ?assertEqual([{Winner, Winner}], lists:usort([ Entry || {_, {_, Entry}} <- Results ])),
          [ Pid ! stop || Pid <- Pids ],
          lists:foreach(fun test_support:await_end/1, Pids)
      end || Round <- lists:seq(1, 100) ],
    ok.


a_connection_is_replaced(Config) ->
    R = registry(Config),
    Id = <<"replaced">>,
    Count = api(R, count, []),
    [Former, Next] = [process(), process()],
    ?assertEqual({ok, undefined}, api(R, replace_connection, [Id, Former, first])),
    ?assertEqual({ok, {Former, first}}, api(R, lookup_connection, [Id])),
    ?assertEqual({ok, Former}, api(R, replace_connection, [Id, Next, second])),
    ?assertEqual({ok, {Next, second}}, api(R, lookup_connection, [Id])),
    ?assertEqual(Next, api(R, whereis_connection, [Id])),
    ?assertEqual(Count + 1, api(R, count, [])),
    ?assertEqual([{Id, {Next, second}}],
                 [ Entry || {I, _} = Entry <- api(R, list_connections, [api(R, get_shard_id, [Id])]), I =:= Id ]),
    %% Neither the late clean-up nor the exit of the former process touches it.
    ?assertEqual({error, not_held}, api(R, release_connection, [Id, Former])),
    stop(Former),
    ?assertEqual({ok, {Next, second}}, api(R, lookup_connection, [Id])),
    %% A process changes its own capabilities.
    ?assertEqual({ok, Next}, api(R, replace_connection, [Id, Next, third])),
    ?assertEqual({ok, {Next, third}}, api(R, lookup_connection, [Id])),
    stop(Next),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual({ok, undefined}, api(R, replace_connection, [Id, self(), none])),
    %% A process that has exited takes the place, and is not found there.
    ?assertEqual({ok, self()}, api(R, replace_connection, [Id, Next, none])),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    test_support:await(fun() -> api(R, count, []) =:= Count end).


%% Each process but the last one is replaced exactly once, and the exit of one that was replaced removes nothing.
two_replacers(Config) ->
    R = registry(Config),
    Id = <<"contended">>,
    Parent = self(),
    Count = api(R, count, []),
    Replacers = [ spawn_link(fun() ->
                                     Parent ! {self(), [ replaced_by_new(R, Id) || _ <- lists:seq(1, 2000) ]},
                                     %% The processes exit with this one.
                                     receive stop -> ok end
                             end) || _ <- [1, 2] ],
    {Made, Replaced} = lists:unzip(lists:append([ receive {Pid, Pairs} -> Pairs end || Pid <- Replacers ])),
    {ok, {Last, _}} = api(R, lookup_connection, [Id]),
    ?assertEqual(lists:sort(Made), lists:sort([Last | lists:delete(undefined, Replaced)])),
    ?assertEqual(Count + 1, api(R, count, [])),
    [ stop(Pid) || Pid <- Made, Pid =/= Last ],
    ?assertEqual(Last, api(R, whereis_connection, [Id])),
    stop(Last),
    lists:foreach(fun test_support:stop/1, Replacers),
    test_support:await(fun() -> api(R, count, []) =:= Count end).


replaced_by_new(R, Id) ->
    Pid = process(),
    {ok, Former} = api(R, replace_connection, [Id, Pid, none]),
    {Pid, Former}.


capabilities_are_updated(Config) ->
    R = registry(Config),
    Pid = process(),
    Id = {connection, 1},
    ?assertEqual({error, not_found}, api(R, update_connection, [Id, new])),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ok = api(R, register_connection, [Id, Pid, #{version => 0}]),
    Count = api(R, count, []),
    [ begin
          ok = api(R, update_connection, [Id, Capabilities]),
          ?assertEqual({ok, {Pid, Capabilities}}, api(R, lookup_connection, [Id])),
          ?assertEqual([Id], api(R, connections_of, [Pid])),
          ?assertEqual(Count, api(R, count, []))
      end || Capabilities <- [none, #{version => 1}, [make_ref()], lists:seq(1, 100), fun() -> Pid end, #{version => 0}] ],
    ?assertError(badarg, api(R, update_connection, [fun() -> Pid end, none])),
    ok = api(R, release_connection, [Id, Pid]),
    ?assertEqual({error, not_found}, api(R, update_connection, [Id, none])),
    stop(Pid).


update_against_exit(Config) ->
    R = registry(Config),
    Count = api(R, count, []),
    [ begin
          Pid = process(),
          ok = api(R, register_connection, [id, Pid, 0]),
          ok = api(R, update_connection, [id, 1]),
          exit(Pid, kill),
          ?assert(lists:member(api(R, update_connection, [id, 2]), [ok, {error, not_found}])),
          test_support:await_end(Pid),
          ?assertEqual({error, not_found}, api(R, update_connection, [id, 3])),
          ?assertEqual({error, not_found}, api(R, lookup_connection, [id]))
      end || _ <- lists:seq(1, 300) ],
    test_support:await(fun() -> api(R, count, []) =:= Count end).


%% Also while other processes take tokens, until the bucket is empty.
updates_keep_tokens_and_limits(_Config) ->
    Pid = process(),
    State = fun() -> erlmcp_token_bucket:get_state(connection, id) end,
    ok = ?M:register_connection(id, Pid, 0),
    Shared = maps:remove(tokens, State()),
    ok = ?M:update_connection(id, 1),
    ?assertEqual(Shared, maps:remove(tokens, State())),
    ok = erlmcp_token_bucket:set_limits(id, #{capacity => 50_000, rate_per_second => 1.0e9}),
    test_support:await(fun() -> maps:get(tokens, State()) =:= 50_000 end),
    %% A token in a hundred seconds.
    ok = erlmcp_token_bucket:set_limits(id, #{rate_per_second => 0.01}),
    {ok, Left} = erlmcp_token_bucket:consume(id, 100),
    ok = ?M:update_connection(id, 2),
    ?assertMatch(#{tokens := Left, capacity := 50_000}, State()),
    Parent = self(),
    Takers = [ spawn_link(fun() -> Parent ! {self(), taken(0)} end) || _ <- [1, 2] ],
    Updates = updated_until_empty(0),
    Taken = lists:sum([ receive {Taker, N} -> N end || Taker <- Takers ]),
    ?assert(Taken >= Left andalso Taken =< Left + 3, {Taken, Left}),
    ?assert(Updates > 0),
    ?assertMatch(#{capacity := 50_000}, State()),
    ok = erlmcp_token_bucket:set_limits(id, default),
    ?assertEqual(Shared, maps:remove(tokens, State())),
    ok = ?M:unregister_connection(id),
    stop(Pid).


taken(Taken) ->
    case erlmcp_token_bucket:consume(id, 1) of
        {ok, _} -> taken(Taken + 1);
        {error, rate_limited} -> Taken
    end.


updated_until_empty(Updates) ->
    ok = ?M:update_connection(id, Updates),
    case erlmcp_token_bucket:get_state(connection, id) of
        #{tokens := 0} -> Updates;
        _ -> updated_until_empty(Updates + 1)
    end.


ids_of_a_process(Config) ->
    R = registry(Config),
    [Pid, Other] = [process(), process()],
    ?assertEqual([], api(R, connections_of, [Pid])),
    Ids = [ {id, N} || N <- lists:seq(1, 2000) ] ++ [a, <<"b">>, [], 1.0, lists:seq(1, 500)],
    [ ok = api(R, register_connection, [Id, Pid, none]) || Id <- Ids ],
    ok = api(R, register_connection, [other, Other, none]),
    %% Neither entries of other kinds nor those of other registries are connections of this one. A registry process of an
    %% earlier suite may have closed it when it was stopped.
    ok = erlmcp_nif:open(nif_registry(R)),
    ok = erlmcp_nif:register(nif_registry(R), server, server, Pid, Pid, none),
    Another = ?M:new(),
    ok = ?M:register_connection(Another, another, Pid, none),
    ?assertEqual(lists:sort(Ids), lists:sort(api(R, connections_of, [Pid]))),
    ?assertEqual([other], api(R, connections_of, [Other])),
    ?assertEqual([another], ?M:connections_of(Another, Pid)),
    {Gone, Kept} = lists:split(1000, Ids),
    [ ok = api(R, unregister_connection, [Id]) || Id <- Gone ],
    {ok, Pid} = api(R, replace_connection, [a, Other, none]),
    ?assertEqual(lists:sort(Kept -- [a]), lists:sort(api(R, connections_of, [Pid]))),
    ?assertEqual([a, other], lists:sort(api(R, connections_of, [Other]))),
    %% Its own connections, by the process itself.
    ok = api(R, register_connection, [mine, self(), none]),
    ?assertEqual([mine], api(R, connections_of, [self()])),
    ok = api(R, unregister_connection, [mine]),
    [ stop(P) || P <- [Pid, Other] ],
    ?assertEqual([], api(R, connections_of, [Pid])),
    [ ?assertError(badarg, api(R, connections_of, [NoPid]))
      || NoPid <- [undefined, make_ref(), external_pid(<<"other@host">>, 1)] ],
    [ ?assertError(badarg, ?M:connections_of(make_ref(), P)) || P <- [self(), process()] ],
    ok.


%% Ids that a process has throughout are listed once while others come and go, in this registry and in another one.
ids_of_a_process_while_they_change(Config) ->
    R = registry(Config),
    Pid = process(),
    Fixed = [ {fixed, N} || N <- lists:seq(1, 20) ],
    [ ok = api(R, register_connection, [Id, Pid, none]) || Id <- Fixed ],
    Another = ?M:new(),
    Changer = spawn_link(fun() -> come_and_go(R, Another, Pid, 1) end),
    Seen = ets:new(seen, [set]),
    test_support:await(fun() ->
                               [ begin
                                     Ids = api(R, connections_of, [Pid]),
                                     ?assertEqual([], Fixed -- Ids),
                                     ?assertEqual(length(Ids), length(lists:usort(Ids))),
                                     ?assertEqual([], [ Id || {another, _} = Id <- Ids ]),
                                     ets:insert(Seen, {length(Ids)})
                                 end || _ <- lists:seq(1, 1000) ],
                               ets:info(Seen, size) > 1
                       end),
    unlink(Changer),
    test_support:kill(Changer),
    stop(Pid).


come_and_go(R, Another, Pid, N) ->
    ok = api(R, register_connection, [{fickle, N}, Pid, none]),
    ok = ?M:register_connection(Another, {another, N}, Pid, none),
    ok = api(R, unregister_connection, [{fickle, N}]),
    ok = ?M:unregister_connection(Another, {another, N}),
    come_and_go(R, Another, Pid, N + 1).


%% A late clean-up for the former holder runs beside the registration of the next one, and never removes that. Goes on
%% until the clean-up has come first and last.
late_release_against_the_next_registration(Config) ->
    R = registry(Config),
    Id = <<"raced">>,
    [Former, Next] = [process(), process()],
    Race = fun() ->
                   ok = api(R, register_connection, [Id, Former, former]),
                   {Cleaner, Monitor} = spawn_monitor(fun() -> exit({released, api(R, release_connection, [Id, Former])}) end),
                   _ = [ erlang:yield() || _ <- lists:seq(1, rand:uniform(4)) ],
                   ok = api(R, unregister_connection, [Id]),
                   ok = api(R, register_connection, [Id, Next, next]),
                   Released = receive {'DOWN', Monitor, process, Cleaner, {released, Result}} -> Result end,
                   ?assertEqual({ok, {Next, next}}, api(R, lookup_connection, [Id])),
                   ?assertEqual(ok, api(R, release_connection, [Id, Next])),
                   Released
           end,
    Seen = ets:new(seen, [set, public]),
    ok = test_support:await(fun() ->
                                    [ ets:insert(Seen, {Race()}) || _ <- lists:seq(1, 200) ],
                                    ets:info(Seen, size) =:= 2
                            end),
    lists:foreach(fun test_support:stop/1, [Former, Next]).


process_under_several_ids(Config) ->
    R = registry(Config),
    Count = api(R, count, []),
    Pid = process(),
    Ids = [ <<"several", N>> || N <- lists:seq(1, 50) ],
    [ ok = api(R, register_connection, [Id, Pid, Id]) || Id <- Ids ],
    ?assertEqual(Count + 50, api(R, count, [])),
    {Early, Late} = lists:split(10, Ids),
    [ ok = api(R, unregister_connection, [Id]) || Id <- Early ],
    [ ?assertEqual({ok, {Pid, Id}}, api(R, lookup_connection, [Id])) || Id <- Late ],
    stop(Pid),
    [ ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])) || Id <- Ids ],
    test_support:await(fun() -> api(R, count, []) =:= Count end).


ended_process_is_accepted_and_not_found(Config) ->
    R = registry(Config),
    Id = <<"ended">>,
    Count = api(R, count, []),
    Pid = process(),
    stop(Pid),
    ?assertEqual(ok, api(R, register_connection, [Id, Pid, none])),
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual(undefined, api(R, whereis_connection, [Id])),
    ?assertEqual(Count, api(R, count, [])),
    ?assertEqual(ok, api(R, register_connection, [Id, self(), none])),
    ?assertEqual(ok, api(R, unregister_connection, [Id])).


ends_with_its_process(Config) ->
    R = registry(Config),
    Count = api(R, count, []),
    Ends = [fun(Pid) -> exit(Pid, kill) end,
            fun(Pid) -> exit(Pid, shutdown) end,
            fun(Pid) -> exit(Pid, {some, reason}) end,
            fun(Pid) -> Pid ! stop end,
            fun(Pid) -> Pid ! crash end],
    [ begin
          Id = <<"ends">>,
          Pid = process(),
          ok = api(R, register_connection, [Id, Pid, none]),
          Monitor = monitor(process, Pid),
          End(Pid),
          receive {'DOWN', Monitor, process, Pid, _} -> ok end,
          %% A process that has observed the exit does not find the entry, and can register its id.
          ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
          ?assertEqual(ok, api(R, register_connection, [Id, self(), none])),
          ?assertEqual({ok, {self(), none}}, api(R, lookup_connection, [Id])),
          ok = api(R, unregister_connection, [Id])
      end || _ <- lists:seq(1, 20), End <- Ends ],
    test_support:await(fun() -> api(R, count, []) =:= Count end).


wrong_arguments_change_nothing(Config) ->
    R = registry(Config),
    Count = api(R, count, []),
    Id = <<"wrong">>,
    [ begin
          Shown = test_support:shown_error(fun() -> api(R, register_connection, [Id, NoPid, none]) end),
          ?assertNotEqual({nomatch, Shown}, {string:find(Shown, "argument 3: not a pid"), Shown}),
          ?assertError(badarg, api(R, register_connection, [Id, NoPid, none])),
          ?assertError(badarg, api(R, register_name, [Id, NoPid]))
      end || NoPid <- [undefined, 1, "pid", [], {}, make_ref(), <<"<0.1.0>">>, #{}] ],
    ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
    ?assertEqual(Count, api(R, count, [])).


shard_is_phash2(Config) ->
    R = registry(Config),
    #{shards := Shards} = api(R, limits, []),
    [ ?assertEqual({Id, erlang:phash2(Id, Shards)}, {Id, api(R, get_shard_id, [Id])})
      || Id <- all_ids() ++ [ {shard, N} || N <- lists:seq(1, 1000) ] ],
    %% For every possible number of shards.
    [ begin
          Own = ?M:new(#{shards => 1 bsl Bits}),
          [ ?assertEqual(erlang:phash2(Id, 1 bsl Bits), ?M:get_shard_id(Own, Id))
            || Id <- [ <<N:32>> || N <- lists:seq(1, 200) ] ]
      end || Bits <- lists:seq(0, 10) ].


shards_are_listed_and_counted(Config) ->
    R = registry(Config),
    #{shards := Shards} = api(R, limits, []),
    Pid = process(),
    Before = [ api(R, count, [Shard]) || Shard <- lists:seq(0, Shards - 1) ],
    Entries = [ {<<"listed", N:32>>, {Pid, {config, N rem 7}}} || N <- lists:seq(1, 2000) ],
    [ ok = api(R, register_connection, [Id, Of, Caps]) || {Id, {Of, Caps}} <- Entries ],
    Listed =
        lists:append([ begin
                           List = api(R, list_connections, [Shard]),
                           Mine = [ Entry || {_, {Of, _}} = Entry <- List, Of =:= Pid ],
                           Expected = [ Entry || {Id, _} = Entry <- Entries,
                                                 erlang:phash2(Id, Shards) =:= Shard ],
                           ?assertEqual(lists:sort(Expected), lists:sort(Mine)),
                           ?assertEqual(length(List), api(R, count, [Shard])),
                           ?assertEqual(length(Expected) + Found, api(R, count, [Shard])),
                           ?assertMatch(#{shard_id := Shard, connections := C}
                                          when C =:= length(List),
                                        api(R, stats, [Shard])),
                           Mine
                       end || {Shard, Found} <- lists:zip(lists:seq(0, Shards - 1), Before) ]),
    ?assertEqual(lists:sort(Entries), lists:sort(Listed)),
    Stats = api(R, stats, []),
    ?assertEqual(2000 + lists:sum(Before), api(R, count, [])),
    ?assertEqual(api(R, count, []), maps:get(connections, Stats)),
    ByShard = [ {S + T + C, Shard}
                || Shard <- lists:seq(0, Shards - 1),
                   #{servers := S, transports := T, connections := C} <- [api(R, stats, [Shard])] ],
    {FullestShard, Most} = maps:get(fullest_shard, Stats),
    {EmptiestShard, Least} = maps:get(emptiest_shard, Stats),
    ?assert(lists:member({Most, FullestShard}, ByShard)),
    ?assert(lists:member({Least, EmptiestShard}, ByShard)),
    ?assertEqual({Least, Most}, {element(1, lists:min(ByShard)), element(1, lists:max(ByShard))}),
    ?assertMatch(#{
                   shards := Shards,
                   max_entries := _,
                   max_id_bytes := _,
                   servers := _,
                   transports := _
                  },
                 Stats),
    stop(Pid),
    test_support:await_value(Before, fun() -> [ api(R, count, [S]) || S <- lists:seq(0, Shards - 1) ] end).


no_such_shard(Config) ->
    R = registry(Config),
    #{shards := Shards} = api(R, limits, []),
    [ ?assertError(badarg, api(R, F, [NoShard]), {F, NoShard})
      || F <- [count, stats, list_connections],
         NoShard <- [-1,
                     Shards,
                     Shards + 1,
                     65535,
                     65536,
                     65536 + Shards - 1,
                     1 bsl 31,
                     1 bsl 32,
                     1 bsl 48,
                     1 bsl 64,
                     -(1 bsl 64),
                     0.0,
                     1.0,
                     a,
                     [],
                     {},
                     {0},
                     "0",
                     <<"0">>,
                     self(),
                     #{}] ].


list_of_thousands(Config) ->
    R = registry(Config),
    #{shards := Shards} = api(R, limits, []),
    Pid = process(),
    Caps = [lists:seq(1, 100), <<0:8000>>, #{a => b}],
    %% All ids are in one shard.
    Ids = same_shard(Shards, 3000),
    [ ok = api(R, register_connection, [Id, Pid, Caps]) || Id <- Ids ],
    Listed = [ Id || {Id, {Of, C}} <- api(R, list_connections, [0]), Of =:= Pid, C =:= Caps ],
    ?assertEqual(lists:sort(Ids), lists:sort(Listed)),
    %% Free slots are not listed.
    {Half, Rest} = lists:split(1500, Ids),
    [ ok = api(R, unregister_connection, [Id]) || Id <- Half ],
    Left = [ Id || {Id, {Of, _}} <- api(R, list_connections, [0]), Of =:= Pid ],
    ?assertEqual(lists:sort(Rest), lists:sort(Left)),
    stop(Pid),
    ?assertEqual([], [ Id || {Id, {Of, _}} <- api(R, list_connections, [0]), Of =:= Pid ]).


same_shard(Shards, N) ->
    lists:sublist([ <<"same", I:32>>
                    || I <- lists:seq(1, 2 * N * Shards),
                       erlang:phash2(<<"same", I:32>>, Shards) =:= 0 ],
                  N).


fold_visits_everything_once(Config) ->
    R = registry(Config),
    Visit = fun(Id, Entry, Visited) -> [{Id, Entry} | Visited] end,
    Before = api(R, fold_connections, [Visit, []]),
    ?assertEqual(api(R, count, []), length(Before)),
    %% Several pages of a shard.
    New = [ {{folded, N}, {self(), #{n => N}}} || N <- lists:seq(1, 40_000) ],
    [ ok = api(R, register_connection, [Id, Pid, Caps]) || {Id, {Pid, Caps}} <- New ],
    ?assertEqual(lists:sort(Before ++ New), lists:sort(api(R, fold_connections, [Visit, []]))),
    ?assertError(badarg, api(R, fold_connections, [not_a_fun, []])),
    ?assertError(badarg, api(R, fold_connections, [fun(X) -> X end, []])),
    ?assertThrow(found, api(R, fold_connections, [fun(_, _, _) -> throw(found) end, []])),
    %% The function may change the registry.
    Remove = fun({folded, _} = Id, _, N) -> ok = api(R, unregister_connection, [Id]), N + 1;
                (_, _, N) -> N
             end,
    ?assertEqual(40_000, api(R, fold_connections, [Remove, 0])),
    ?assertEqual(lists:sort(Before), lists:sort(api(R, fold_connections, [Visit, []]))).


select_by_capabilities(Config) ->
    R = registry(Config),
    Pid = process(),
    Tools = [ {id, N} || N <- lists:seq(1, 700) ],
    [ ok = api(R, register_connection, [Id, Pid, #{tools => true, version => N}]) || {id, N} = Id <- Tools ],
    [ ok = api(R, register_connection, [{other, N}, Pid, #{tools => false}]) || N <- lists:seq(1, 700) ],
    ok = api(R, register_connection, [atom, Pid, none]),
    Select = fun(MatchSpec) -> lists:sort(api(R, select_connections, [MatchSpec])) end,
    ?assertEqual(lists:sort(Tools), Select([{{'$1', '_', #{tools => true}}, [], ['$1']}])),
    ?assertEqual([{{id, 7}, Pid}], Select([{{'$1', '$2', #{version => 7}}, [], [{{'$1', '$2'}}]}])),
    ?assertEqual([700], Select([{{'_', '_', #{version => '$1'}}, [{'>=', '$1', 700}], ['$1']}])),
    ?assertEqual([{atom, Pid, none}], Select([{{'_', Pid, none}, [], ['$_']}])),
    ?assertEqual([], Select([{{'$1', '_', #{version => 701}}, [], ['$1']}])),
    ?assertEqual(1401, length(Select([{'$1', [], ['$1']}]))),
    [ ?assertError(badarg, api(R, select_connections, [NoMatchSpec])) || NoMatchSpec <- [a, [a], {}, [], [{'$1', [unknown], a}]] ],
    ?assertError(badarg, ?M:select_connections(make_ref(), [{'$1', [], ['$1']}])),
    ?assertMatch([_ | _],
                 string:find(lists:flatten(test_support:shown_error(fun() -> api(R, select_connections, [a]) end)),
                             "not a match specification")),
    stop(Pid).


%% Whatever other processes change meanwhile, connections that stay are visited exactly once.
fold_while_connections_come_and_go(Config) ->
    R = registry(Config),
    Staying = [ {staying, N} || N <- lists:seq(1, 2_000) ],
    [ ok = api(R, register_connection, [Id, self(), none]) || Id <- Staying ],
    Changes = spawn_link(fun() -> come_and_go(R, 1) end),
    Visit = fun({staying, _} = Id, _, Visited) -> [Id | Visited];
               (_, _, Visited) -> Visited
            end,
    [ ?assertEqual(lists:sort(Staying), lists:sort(api(R, fold_connections, [Visit, []]))) || _ <- lists:seq(1, 20) ],
    stop(Changes),
    [ ok = api(R, unregister_connection, [Id]) || Id <- Staying ].


come_and_go(R, N) ->
    ok = api(R, register_connection, [{coming, N rem 3_000}, self(), none]),
    ok = api(R, unregister_connection, [{coming, (N * 7 + 1) rem 3_000}]),
    _ = api(R, unregister_connection, [{coming, (N + 1) rem 3_000}]),
    receive
        stop -> ok
    after
        0 ->
            come_and_go(R, N + 1)
    end.


%%% Processes


%% A process of an earlier incarnation of this node counts as exited.
process_of_a_former_node(Config) ->
    R = registry(Config),
    Former = external_pid(atom_to_binary(node()), 123),
    ?assertEqual(node(), node(Former)),
    ?assertNot(is_process_alive(Former)),
    Count = api(R, count, []),
    ?assertEqual(ok, api(R, register_connection, [<<"former">>, Former, none])),
    test_support:await(fun() -> api(R, lookup_connection, [<<"former">>]) =:= {error, not_found} end),
    test_support:await(fun() -> api(R, count, []) =:= Count end).


%%% Registries


%% Every new function needs a test.
exports_are_known(_Config) ->
    Expected = [{new, 0},
                {new, 1},
                {limits, 0},
                {limits, 1},
                {register_connection, 3},
                {register_connection, 4},
                {unregister_connection, 1},
                {unregister_connection, 2},
                {register_or_find_connection, 3},
                {register_or_find_connection, 4},
                {replace_connection, 3},
                {replace_connection, 4},
                {release_connection, 2},
                {release_connection, 3},
                {lookup_connection, 1},
                {lookup_connection, 2},
                {whereis_connection, 1},
                {whereis_connection, 2},
                {connections_of, 1},
                {connections_of, 2},
                {get_shard_id, 1},
                {get_shard_id, 2},
                {list_connections, 1},
                {list_connections, 2},
                {fold_connections, 2},
                {fold_connections, 3},
                {select_connections, 1},
                {select_connections, 2},
                {update_connection, 2},
                {update_connection, 3},
                {count, 0},
                {count, 1},
                {count, 2},
                {stats, 0},
                {stats, 1},
                {stats, 2},
                {register_name, 2},
                {register_name, 3},
                {unregister_name, 1},
                {unregister_name, 2},
                {whereis_name, 1},
                {whereis_name, 2},
                {send, 2},
                {send, 3},
                {format_error, 2}],
    Exports = ?M:module_info(exports) -- [{module_info, 0}, {module_info, 1}],
    ?assertEqual([], Expected -- Exports),
    ?assertEqual([], Exports -- Expected).
