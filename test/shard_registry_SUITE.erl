%%% The public registry of connections, erlmcp_shard_registry, through its API alone.
%%%
%%% The contract stated here: ids are any term and are the same exactly if they are `=:='; what is
%%% registered is found with its capabilities verbatim until its process ends or it is
%%% unregistered; a shard is erlang:phash2(Id, Shards); wrong arguments raise badarg and change
%%% nothing; a registry of its own goes with the last reference to it, the default one stays.
%%%
%%% The cases of the three groups `default', `named' and `own' are the same, run on the default
%%% registry without naming it, on the atom `default', and on registries from new/1. What can be
%%% tried only once in the life of a node (the start of the application, the node's becoming
%%% distributed) runs in a peer node.
-module(shard_registry_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).

%% On any registry
-export([register_lookup_unregister/1,
         first_registration_wins/1,
         process_under_several_ids/1,
         ended_process_is_accepted_and_not_found/1,
         ends_with_its_process/1,
         wrong_arguments_change_nothing/1,
         shard_is_phash2/1,
         shards_are_listed_and_counted/1,
         no_such_shard/1,
         list_of_thousands/1,
         names/1,
         every_kind_of_id_is_returned_exactly/1,
         different_ids_are_apart/1,
         integers_are_apart/1,
         equal_ids_made_apart_are_the_same/1,
         equal_funs_of_different_processes_are_the_same/1,
         random_ids_are_a_map/1,
         no_atom_is_made/1,
         configs_are_returned_verbatim/1,
         large_configs_are_returned_verbatim/1,
         configs_stay_usable/1,
         equal_configs_are_kept_once/1,
         process_of_a_former_node/1]).

%% On the default registry
-export([via_gen_server/1, via_supervisor/1, send_through_via/1]).

%% On registries of their own
-export([exports_are_known/1,
         options_and_defaults/1,
         wrong_options/1,
         registries_are_independent/1,
         no_registry/1,
         max_entries/1,
         max_entries_counts_all_namespaces/1,
         max_id_bytes/1,
         long_ids_change_nothing/1,
         reference_in_a_message_keeps_it/1,
         literal_as_config/1]).

%% The node
-export([i_prints_it/1,
         config_errors_name_key_value_expectation/1,
         application_starts_with_defaults/1,
         application_bounds_the_default_registry/1,
         application_refuses_a_wrong_environment/1,
         default_registry_outlives_the_application/1,
         default_registry_made_before_the_application/1,
         ids_with_pids_and_references_after_net_kernel_start/1,
         configs_after_net_kernel_start/1,
         process_of_another_node/1,
         other_node_goes_down/1]).

%% Called in peer nodes
-export([in_app_defaults/0,
         in_app_bounds/0,
         in_app_refuses/0,
         in_outlives/0,
         in_made_before/0,
         in_ids_after_distribution/0,
         in_configs_after_distribution/0,
         in_other_node/0,
         in_other_node_down/0,
         idle/0]).
%% A gen_server to be named
-export([init/1, handle_call/3, handle_cast/2]).
-export([start_named/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [exports_are_known,
     {group, default},
     {group, named},
     {group, own},
     {group, via},
     {group, registries},
     {group, node}].


groups() ->
    Common =
        [register_lookup_unregister,
         first_registration_wins,
         process_under_several_ids,
         ended_process_is_accepted_and_not_found,
         ends_with_its_process,
         wrong_arguments_change_nothing,
         shard_is_phash2,
         shards_are_listed_and_counted,
         no_such_shard,
         list_of_thousands,
         names,
         every_kind_of_id_is_returned_exactly,
         different_ids_are_apart,
         integers_are_apart,
         equal_ids_made_apart_are_the_same,
         equal_funs_of_different_processes_are_the_same,
         random_ids_are_a_map,
         no_atom_is_made,
         configs_are_returned_verbatim,
         large_configs_are_returned_verbatim,
         configs_stay_usable,
         equal_configs_are_kept_once,
         process_of_a_former_node],
    [{default, [], Common},
     {named, [], Common},
     {own, [], Common},
     {via, [], [via_gen_server, via_supervisor, send_through_via]},
     {registries, [],
                  [options_and_defaults,
                   wrong_options,
                   registries_are_independent,
                   no_registry,
                   max_entries,
                   max_entries_counts_all_namespaces,
                   max_id_bytes,
                   long_ids_change_nothing,
                   reference_in_a_message_keeps_it,
                   literal_as_config]},
     {node, [],
            [i_prints_it,
             config_errors_name_key_value_expectation,
             application_starts_with_defaults,
             application_bounds_the_default_registry,
             application_refuses_a_wrong_environment,
             default_registry_outlives_the_application,
             default_registry_made_before_the_application,
             ids_with_pids_and_references_after_net_kernel_start,
             configs_after_net_kernel_start,
             process_of_another_node,
             other_node_goes_down]}].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_group(Group, Config) when Group =:= default; Group =:= named; Group =:= own ->
    [{on, Group} | Config];
init_per_group(_Group, Config) ->
    Config.


end_per_group(_Group, _Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    Found = default_counts(),
    Registry =
        case proplists:get_value(on, Config) of
            undefined -> none;
            default -> default;
            named -> {explicit, default};
            own -> {explicit, ?M:new(#{shards => 16})}
        end,
    [{found, Found}, {registry, Registry} | Config].


%% The processes of a case end with it, and with them what they registered.
end_per_testcase(_Case, Config) ->
    Found = proplists:get_value(found, Config),
    try
        test_support:await(fun() -> default_counts() =:= Found end)
    catch
        error:{deadline_passed, _} -> {fail, {default_registry, {found, Found}, {left, default_counts()}}}
    end.


default_counts() ->
    [ erlmcp_nif:count(default, NS) || NS <- [server, transport, connection] ].


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
    %% The loser's end changes nothing.
    stop(Other),
    ?assertEqual({ok, {self(), first}}, api(R, lookup_connection, [Id])),
    ok = api(R, unregister_connection, [Id]),
    ?assertEqual(ok, api(R, register_connection, [Id, self(), fourth])),
    ?assertEqual({ok, {self(), fourth}}, api(R, lookup_connection, [Id])),
    ok = api(R, unregister_connection, [Id]).


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
          %% Whoever has seen it end does not find it, and can take its id.
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
    %% Of every number of shards there can be.
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
    %% All in one shard.
    Ids = same_shard(Shards, 3000),
    [ ok = api(R, register_connection, [Id, Pid, Caps]) || Id <- Ids ],
    Listed = [ Id || {Id, {Of, C}} <- api(R, list_connections, [0]), Of =:= Pid, C =:= Caps ],
    ?assertEqual(lists:sort(Ids), lists:sort(Listed)),
    %% Holes are not listed.
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


names(Config) ->
    R = registry(Config),
    Name = {a, "name"},
    Pid = process(),
    ?assertEqual(undefined, api(R, whereis_name, [Name])),
    ?assertEqual(yes, api(R, register_name, [Name, Pid])),
    ?assertEqual(no, api(R, register_name, [Name, self()])),
    ?assertEqual(no, api(R, register_name, [Name, Pid])),
    ?assertEqual(Pid, api(R, whereis_name, [Name])),
    %% Names are connections whose capabilities are `undefined'.
    ?assertEqual({ok, {Pid, undefined}}, api(R, lookup_connection, [Name])),
    ?assertEqual(Pid, api(R, send, [Name, {self(), ping}])),
    ?assertEqual(pong, receive {Pid, Reply} -> Reply after 5000 -> none end),
    ?assertEqual(ok, api(R, unregister_name, [Name])),
    ?assertEqual(ok, api(R, unregister_name, [Name])),
    ?assertEqual(undefined, api(R, whereis_name, [Name])),
    ?assertExit({badarg, {Name, message}}, api(R, send, [Name, message])),
    ?assertEqual(yes, api(R, register_name, [Name, Pid])),
    stop(Pid),
    ?assertEqual(yes, api(R, register_name, [Name, self()])),
    ?assertEqual(self(), api(R, send, [Name, to_myself])),
    ?assertEqual(to_myself, receive Message -> Message after 0 -> none end),
    ?assertEqual(ok, api(R, unregister_name, [Name])).


%%% Ids


every_kind_of_id_is_returned_exactly(Config) ->
    R = registry(Config),
    Shard = fun(Id) -> api(R, get_shard_id, [Id]) end,
    Wrong =
        [ {Id, Got}
          || Id <- all_ids(),
             Got <- [begin
                         ok = api(R, register_connection, [Id, self(), {of_id, Id}]),
                         Found = api(R, lookup_connection, [Id]),
                         Where = api(R, whereis_connection, [Id]),
                         Listed = [ L || {L, {Of, _}} <- api(R, list_connections, [Shard(Id)]),
                                         Of =:= self() ],
                         ok = api(R, unregister_connection, [Id]),
                         {Found, Where, Listed, api(R, lookup_connection, [Id])}
                     end],
             Got =/= {{ok, {self(), {of_id, Id}}}, self(), [Id], {error, not_found}} ],
    ?assertEqual([], Wrong).


%% Every one beside every other one. Integers above a byte have a case of their own.
different_ids_are_apart(Config) ->
    R = registry(Config),
    Ids = unique(look_alikes() ++ [ Id || Id <- all_ids(), not has_integer_above_byte(Id) ]),
    check_apart(R, Ids).


integers_are_apart(Config) ->
    R = registry(Config),
    Near = fun(N) -> [N - 1, N, N + 1, -N - 1, -N, -N + 1] end,
    Powers = [ 1 bsl Bits || Bits <- lists:seq(1, 70) ++ [127, 128, 129, 255, 256, 2048, 8000] ],
    Integers = unique(lists:seq(-300, 1100) ++ lists:append([ Near(P) || P <- Powers ])),
    check_apart(R, Integers),
    check_apart(R, [ {tuple, [N | N], #{N => N}} || N <- Integers ]).


check_apart(R, Ids) ->
    Pid = process(),
    Results = [ {Id, api(R, register_connection, [Id, Pid, {nth, Nth}])}
                || {Nth, Id} <- lists:enumerate(Ids) ],
    ?assertEqual([], [ Refused || {_, Result} = Refused <- Results, Result =/= ok ]),
    Wrong = [ {Id, Nth, Found}
              || {Nth, Id} <- lists:enumerate(Ids),
                 Found <- [api(R, lookup_connection, [Id])],
                 Found =/= {ok, {Pid, {nth, Nth}}} ],
    ?assertEqual([], Wrong),
    %% Each one goes by itself.
    lists:foldl(fun(Id, Left) ->
                        ok = api(R, unregister_connection, [Id]),
                        ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
                        case Left of
                            [] -> [];
                            [Next | Rest] ->
                                ?assertMatch({ok, _}, api(R, lookup_connection, [Next])),
                                Rest
                        end
                end,
                tl(Ids),
                Ids),
    stop(Pid).


equal_ids_made_apart_are_the_same(Config) ->
    R = registry(Config),
    Big = some_binary(100),
    First = binary:part(Big, 0, 5),
    <<_:3, Unaligned:100/binary, _/bitstring>> = <<0:3, Big/binary, 0:5>>,
    <<_:24, Sub:100/binary, _/binary>> = <<1, 2, 3, Big/binary, 4, 5>>,
    <<_:7, UnalignedBits:43/bitstring, _/bitstring>> = <<0:7, First/binary, 5:9>>,
    <<Bits:43/bitstring, _/bitstring>> = <<First/binary, 5:9>>,
    Pairs =
        [ {map_of(N, up), map_of(N, Order)} || N <- [1, 2, 31, 32, 33, 64, 100, 1000],
                                               Order <- [down, shuffled, regrown] ] ++
        [{Big, Unaligned},
         {Big, Sub},
         {{Big}, {Unaligned}},
         {Bits, UnalignedBits},
         {[Bits], [UnalignedBits]},
         {0.0, zero(-0.0)},
         {#{0.0 => {0.0}}, #{zero(-0.0) => {zero(-0.0)}}},
         {"string", [$s, $t, $r, $i, $n, $g]},
         {fun lists:map/2, fun lists:map/2},
         {1 bsl 200, (1 bsl 100) * (1 bsl 100)},
         {self(), list_to_pid(pid_to_list(self()))}],
    %% 0.0 and -0.0 are what this VM says they are.
    Wrong = [ {Made, MadeApart, Got}
              || {Made, MadeApart} <- Pairs,
                 Got <- [begin
                             ok = api(R, register_connection, [Made, self(), none]),
                             Where = api(R, whereis_connection, [MadeApart]),
                             _ = api(R, unregister_connection, [Made]),
                             Where
                         end],
                 (Got =:= self()) =/= (Made =:= MadeApart) ],
    ?assertEqual([], Wrong).


%% Funs are equal if code and environment are, whichever process made them.
equal_funs_of_different_processes_are_the_same(Config) ->
    R = registry(Config),
    Mine = fun_with(environment),
    Other = in_process(fun() -> fun_with(environment) end),
    ?assert(Mine =:= Other),
    ok = api(R, register_connection, [Mine, self(), none]),
    ok = api(R, register_connection, [{id, Mine}, self(), none]),
    Found = {api(R, whereis_connection, [Other]), api(R, whereis_connection, [{id, Other}])},
    ok = api(R, unregister_connection, [Mine]),
    ok = api(R, unregister_connection, [{id, Mine}]),
    ?assertEqual({self(), self()}, Found).


fun_with(Environment) ->
    fun(X) -> {Environment, X} end.


%% Against a map of this VM, which compares keys as the registry must. The seed is printed, and
%% TEST_SEED repeats it.
random_ids_are_a_map(Config) ->
    R = registry(Config),
    Seed = test_support:seed("TEST_SEED"),
    _ = rand:seed(exsss, Seed),
    Pid = process(),
    Before = api(R, count, []),
    Ids = lists:append([ [Id, changed(Id)] || _ <- lists:seq(1, 3000),
                                              Id <- [random_term(4)],
                                              erlang:external_size(Id) < 4000 ]),
    Model =
        lists:foldl(fun(Id, Model) ->
                            Expected =
                                case Model of
                                    #{Id := _} -> {error, already_registered};
                                    #{} -> ok
                                end,
                            Caps = {caps, map_size(Model)},
                            ?assertEqual({Id, Expected},
                                         {Id, api(R, register_connection, [Id, Pid, Caps])}),
                            maps:merge(#{Id => Caps}, Model)
                    end,
                    #{},
                    Ids),
    ?assertEqual(Before + map_size(Model), api(R, count, [])),
    maps:foreach(fun(Id, Caps) ->
                         ?assertEqual({Id, {ok, {Pid, Caps}}},
                                      {Id, api(R, lookup_connection, [Id])})
                 end,
                 Model),
    #{shards := Shards} = api(R, limits, []),
    Listed = maps:from_list([ {Id, Caps} || Shard <- lists:seq(0, Shards - 1),
                                            {Id, {Of, Caps}} <- api(R, list_connections, [Shard]),
                                            Of =:= Pid ]),
    ?assert(Listed =:= Model),
    stop(Pid).


no_atom_is_made(Config) ->
    R = registry(Config),
    Names = [ <<"never an atom ", N:64>> || N <- lists:seq(1, 1000) ],
    Count = erlang:system_info(atom_count),
    [ begin
          ok = api(R, register_connection, [Name, self(), Name]),
          {ok, _} = api(R, lookup_connection, [Name]),
          undefined = api(R, whereis_connection, [binary_to_list(Name)]),
          ok = api(R, unregister_connection, [Name])
      end || Name <- Names ],
    ?assertEqual(Count, erlang:system_info(atom_count)).


%% One or more of every kind of term there is.
all_ids() ->
    Ref = make_ref(),
    [Port | _] = erlang:ports(),
    [a,
     '',
     undefined,
     true,
     'an atom of many letters',
     '\x{3b1}\x{1f600}',
     <<>>,
     <<0>>,
     <<"id">>,
     some_binary(30),
     some_binary(31),
     some_binary(64),
     some_binary(65),
     some_binary(60_000),
     <<1:1>>,
     <<0:7>>,
     <<5:67>>,
     0,
     1,
     -1,
     127,
     128,
     255,
     1 bsl 27,
     1 bsl 59,
     -(1 bsl 59),
     1 bsl 63,
     (1 bsl 63) - 1,
     -(1 bsl 63),
     1 bsl 64,
     -(1 bsl 64),
     1 bsl 1000,
     0.0,
     1.0,
     -1.5,
     1.0e300,
     5.0e-324,
     [],
     [a],
     "string",
     [1, 2.0, <<3>>],
     [a | b],
     [[a | b], [c | [d | e]] | {f}],
     [[] | []],
     {},
     {a},
     {{}},
     {a, {b, [c]}},
     list_to_tuple(lists:seq(1, 255)),
     #{},
     #{a => 1},
     #{1 => a, 1.0 => b},
     map_of(31, up),
     map_of(32, up),
     map_of(33, up),
     map_of(100, up),
     #{#{a => []} => #{{} => <<1:3>>}},
     self(),
     process(),
     Ref,
     {Ref, self()},
     #{Ref => [self() | Ref]},
     Port,
     {Port},
     fun lists:map/2,
     fun_with(1),
     {fun_with([self(), Ref])},
     atomics:new(1, []),
     erlang:alias(),
     external_pid(<<"other@host">>, 1),
     external_reference(<<"other@host">>),
     external_port(<<"other@host">>),
     {external_pid(<<"other@host">>, 2)},
     external_pid(atom_to_binary(node()), 77),
     nested(20, fun(T) -> [T] end),
     nested(500, fun(T) -> {T} end),
     nested(500, fun(T) -> [a | T] end),
     nested(500, fun(T) -> [T | a] end),
     nested(200, fun(T) -> #{T => b} end, fun(_) -> a end),
     nested(100, fun(T) -> #{k => T} end),
     nested(4000, fun(T) -> [T] end)].


%% Terms that are easily taken for one another.
look_alikes() ->
    [1,
     1.0,
     <<1>>,
     <<1:8/little>>,
     [1],
     {1},
     "1",
     <<"1">>,
     '1',
     #{1 => 1},
     #{1 => 1.0},
     #{1.0 => 1},
     [1 | 1],
     [1, 1],
     {1, 1},
     {[1]},
     [{1}],
     [[1]],
     {{1}},
     <<1:1>>,
     <<1:2>>,
     <<1:7>>,
     <<2:8>>,
     <<0:1>>,
     <<0:2>>,
     <<>>,
     [],
     {},
     #{},
     '',
     [[]],
     [[], []],
     [[] | []],
     {[]},
     {[], []},
     [{}],
     a,
     "a",
     <<"a">>,
     [a],
     {a},
     {a, a},
     [a, a],
     [a | a],
     [a, [a]],
     [[a], a],
     [[a | a]],
     {a, {a}},
     {{a}, a},
     #{a => a},
     #{a => #{a => a}},
     #{a => b, b => a},
     #{a => a, b => b},
     [a, b, c],
     [a, [b, c]],
     [a, [b | c]],
     [a, b | c],
     {a, b, c},
     {a, {b, c}},
     {{a, b}, c},
     true,
     <<"true">>,
     "true",
     undefined,
     0,
     0.0,
     -1,
     -1.0,
     <<"ab">>,
     [<<"a">>, <<"b">>],
     {<<"a">>, <<"b">>},
     [<<"ab">>],
     [<<"a">>, <<"b">> | <<"c">>],
     <<97, 0>>,
     <<0, 97>>,
     <<97>>,
     fun lists:map/2,
     fun lists:filter/2,
     fun lists:map/3,
     fun maps:map/2,
     fun_with(1),
     fun_with(1.0),
     fun_with(<<1>>),
     fun_with([1]),
     external_pid(<<"a@b">>, 1),
     external_pid(<<"a@c">>, 1),
     external_pid(<<"a@b">>, 2),
     term_to_binary(1),
     term_to_binary({1}),
     term_to_binary(self())].


has_integer_above_byte(N) when is_integer(N) -> N < 0 orelse N > 255;
has_integer_above_byte([H | T]) -> has_integer_above_byte(H) orelse has_integer_above_byte(T);
has_integer_above_byte(T) when is_tuple(T) -> has_integer_above_byte(tuple_to_list(T));
has_integer_above_byte(M) when is_map(M) -> has_integer_above_byte(maps:to_list(M));
has_integer_above_byte(_) -> false.


unique(Terms) ->
    maps:keys(maps:from_list([ {Term, x} || Term <- Terms ])).


map_of(N, up) -> maps:from_list([ {key(I), I rem 3} || I <- lists:seq(1, N) ]);
map_of(N, down) -> lists:foldl(fun(I, M) -> M#{key(I) => I rem 3} end, #{}, lists:seq(N, 1, -1));
map_of(N, shuffled) ->
    Sorted = lists:sort([ {erlang:phash2({I, salt}), I} || I <- lists:seq(1, N) ]),
    lists:foldl(fun({_, I}, M) -> M#{key(I) => I rem 3} end, #{}, Sorted);
map_of(N, regrown) ->
    More = lists:foldl(fun(I, M) -> M#{key(I) => I rem 3} end, #{}, lists:seq(1, N + 50)),
    lists:foldl(fun(I, M) -> maps:remove(key(I), M) end, More, lists:seq(N + 50, N + 1, -1)).


%% Keys of several kinds, whose order differs between comparison, hash and insertion. No integer
%% above a byte.
key(I) when I rem 4 =:= 0 -> <<"key", I:16>>;
key(I) when I rem 4 =:= 1 -> float(I);
key(I) when I rem 4 =:= 2 -> {I div 256, [I rem 256]};
key(I) -> [<<I:16>> | tail].


zero(Zero) ->
    Zero.


some_binary(Bytes) ->
    << <<(erlang:phash2({binary, Bytes, N}, 256))>> || N <- lists:seq(1, Bytes) >>.


nested(Depth, Wrap) ->
    nested(Depth, Wrap, fun(T) -> T end).


nested(Depth, Wrap, Inner) ->
    lists:foldl(fun(_, T) -> Wrap(T) end, Inner(x), lists:seq(1, Depth)).


external_pid(Node, N) ->
    binary_to_term(<<131, 88, 119, (byte_size(Node)), Node/binary, N:32, 0:32, 99:32>>).


external_reference(Node) ->
    binary_to_term(<<131, 90, 3:16, 119, (byte_size(Node)), Node/binary, 99:32, 1:32, 2:32, 3:32>>).


external_port(Node) ->
    binary_to_term(<<131, 89, 119, (byte_size(Node)), Node/binary, 5:32, 99:32>>).


random_term(Depth) ->
    case rand:uniform(if Depth > 0 -> 12; true -> 8 end) of
        1 -> lists:nth(rand:uniform(5), [a, b, true, undefined, '']);
        2 -> rand:uniform(1200) - 600;
        3 -> (rand:uniform(3) - 2) * (1 bsl rand:uniform(70)) + rand:uniform(3) - 2;
        4 -> lists:nth(rand:uniform(6), [0.0, 1.0, -1.0, 0.5, 256.0, 1.0e10]);
        5 -> rand:bytes(rand:uniform(3) - 1);
        6 -> <<(rand:uniform(8)):(rand:uniform(12))>>;
        7 -> [];
        8 -> lists:nth(rand:uniform(4), [self(), fun lists:map/2, fun_with(1), fun_with({})]);
        9 -> [ random_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(4)) ];
        10 -> [random_term(Depth - 1) | random_term(Depth - 1)];
        11 -> list_to_tuple([ random_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(4)) ]);
        12 ->
            maps:from_list([ {random_term(Depth - 1), random_term(Depth - 1)}
                             || _ <- lists:seq(1, rand:uniform(40)) ])
    end.


%% A little different somewhere.
changed(N) when is_integer(N) -> lists:nth(rand:uniform(3), [N + 256, N + 65536, -N]);
changed([H | T]) -> case rand:uniform(2) of 1 -> [changed(H) | T]; 2 -> [H | changed(T)] end;
changed({}) -> {{}};
changed(T) when is_tuple(T) ->
    N = rand:uniform(tuple_size(T)),
    setelement(N, T, changed(element(N, T)));
changed(M) when map_size(M) > 0 ->
    [{K, V} | _] = maps:to_list(M),
    M#{K => changed(V)};
changed(B) when is_binary(B) -> <<B/binary, 0>>;
changed(T) -> {T}.


%%% Configs


configs_are_returned_verbatim(Config) ->
    R = registry(Config),
    Configs = all_ids() ++ look_alikes() ++ [ [I] || I <- all_ids() ],
    Pid = process(),
    Named = [ {<<"config", Nth:32>>, Caps} || {Nth, Caps} <- lists:enumerate(Configs) ],
    [ ok = api(R, register_connection, [Id, Pid, Caps]) || {Id, Caps} <- Named ],
    Wrong = [ {Caps, Found} || {Id, Caps} <- Named,
                               Found <- [api(R, lookup_connection, [Id])],
                               Found =/= {ok, {Pid, Caps}} ],
    ?assertEqual([], Wrong),
    #{shards := Shards} = api(R, limits, []),
    Listed = [ {Id, Caps} || Shard <- lists:seq(0, Shards - 1),
                             {Id, {Of, Caps}} <- api(R, list_connections, [Shard]),
                             Of =:= Pid ],
    ?assert(lists:sort(Named) =:= lists:sort(Listed)),
    stop(Pid).


%% From one word to 5 MB, of every shape, through look-up and listing.
large_configs_are_returned_verbatim(Config) ->
    R = registry(Config),
    Tool = fun(N) -> #{name => <<"tool", N:32>>, schema => #{type => <<"object">>, n => N}} end,
    Configs =
        [ lists:seq(1, N) || N <- [10, 60, 70, 1000, 19_990, 20_010, 300_000] ] ++
        [ some_binary(N) || N <- [63, 64, 65, 1023, 1024, 1025, 50_000] ] ++
        [ binary:copy(<<"x">>, N) || N <- [320_000, 330_000, 5_000_000] ] ++
        [ list_to_tuple(lists:seq(1, N)) || N <- [100, 30_000, 200_000] ] ++
        [ #{tools => [ Tool(N) || N <- lists:seq(1, Tools) ]} || Tools <- [5, 500, 50_000] ] ++
        [map_of(10_000, up),
         nested(100_000, fun(T) -> [T] end),
         fun_with(lists:seq(1, 50_000)),
         1 bsl 1_000_000,
         <<1:800_001>>],
    ?assert(lists:any(fun(C) -> erts_debug:flat_size(C) * 8 > 5_000_000 end, Configs)),
    Pid = process(),
    [ begin
          Id = <<"large">>,
          ok = api(R, register_connection, [Id, Pid, Caps]),
          Shard = api(R, get_shard_id, [Id]),
          ?assert({ok, {Pid, Caps}} =:= api(R, lookup_connection, [Id])),
          ?assertEqual(Pid, api(R, whereis_connection, [Id])),
          ?assert([{Id, {Pid, Caps}}] =:=
                  [ E || {_, {Of, _}} = E <- api(R, list_connections, [Shard]), Of =:= Pid ]),
          ok = api(R, unregister_connection, [Id])
      end || Caps <- Configs ],
    stop(Pid).


%% The registry alone holds what refers to something that is collected when nobody does.
configs_stay_usable(Config) ->
    R = registry(Config),
    Pid = process(),
    in_process(fun() ->
                       Atomics = atomics:new(1, []),
                       ok = atomics:put(Atomics, 1, 42),
                       Counters = counters:new(1, [write_concurrency]),
                       ok = counters:put(Counters, 1, 43),
                       Own = ?M:new(),
                       ok = ?M:register_connection(Own, here, Pid, inner),
                       Binary = some_binary(100_000),
                       <<_:100/binary, Sub:200/binary, _/binary>> = Binary,
                       Fun = fun() -> {atomics:get(Atomics, 1), Sub} end,
                       Caps = {Atomics, #{counters => Counters}, [Own], Binary, Sub, Fun},
                       ok = api(R, register_connection, [<<"usable">>, Pid, Caps]),
                       ok = api(R, register_connection, [<<"atomics">>, Pid, Atomics])
               end),
    Tid = ets:new(table, [public]),
    true = ets:insert(Tid, {key, value}),
    ok = api(R, register_connection, [<<"tid">>, Pid, #{table => Tid}]),
    [ garbage_collect(P) || P <- processes() ],
    {ok, {Pid, {Atomics, #{counters := Counters}, [Own], Binary, Sub, Fun} = Caps}} =
        api(R, lookup_connection, [<<"usable">>]),
    ?assertEqual(42, atomics:get(Atomics, 1)),
    ?assertEqual(43, counters:get(Counters, 1)),
    ?assertEqual({ok, {Pid, inner}}, ?M:lookup_connection(Own, here)),
    ?assert(Binary =:= some_binary(100_000)),
    ?assert(Sub =:= binary:part(Binary, 100, 200)),
    ?assert(Fun() =:= {42, Sub}),
    ?assert({ok, {Pid, Caps}} =:= api(R, lookup_connection, [<<"usable">>])),
    {ok, {Pid, Again}} = api(R, lookup_connection, [<<"atomics">>]),
    ?assertEqual(42, atomics:get(Again, 1)),
    {ok, {Pid, #{table := Table}}} = api(R, lookup_connection, [<<"tid">>]),
    ?assertEqual([{key, value}], ets:lookup(Table, key)),
    stop(Pid).


equal_configs_are_kept_once(Config) ->
    R = registry(Config),
    Holder = process(),
    %% Now and then one of those who nudge is the last to be freed, and then their config is not counted.
    ok = api(R, register_connection, [<<"holds it">>, Holder, nudge]),
    [ begin
          Before = lists:min([ settled_configs(R) || _ <- lists:seq(1, 5) ]),
          Pid = process(),
          %% Each one is made anew, so that it is equal and not the same.
          [ ok = api(R, register_connection, [<<"once", N:32>>, Pid, Make()])
            || N <- lists:seq(1, 1000) ],
          %% What a case before has left may be freed meanwhile, so there may be fewer.
          ?assert(erlmcp_nif:distinct_configs() =< Before + 1, {Name, Before}),
          ok = api(R, register_connection, [<<"another">>, Pid, {another, Make()}]),
          ?assert(erlmcp_nif:distinct_configs() =< Before + 2, {Name, Before}),
          stop(Pid),
          test_support:await_value({Name, Before}, fun() -> {Name, max(Before, settled_configs(R))} end)
      end || {Name, Make} <- [{word, fun() -> make_anew(only_here) end},
                              {small, fun() -> make_anew(#{small => [1, 2.0, <<"3">>]}) end},
                              {large, fun() -> make_anew(lists:seq(1, 7000)) end},
                              {map, fun() ->
                                            map_of(100,
                                                   lists:nth(rand:uniform(3),
                                                             [up, down, shuffled]))
                                    end},
                              {binary, fun() -> some_binary(2000) end},
                              {huge, fun() -> make_anew(list_to_tuple(lists:seq(1, 30_000))) end}],
             %% 1,000 times the huge one takes its time.
             Name =/= huge orelse R =:= default ],
    stop(Holder).


make_anew(Term) ->
    binary_to_term(term_to_binary(Term)).


%% What was removed is freed some operations later, of the thread that removed it.
settled_configs(R) ->
    Registry = nif_registry(R),
    %% Registries of former cases, which may be garbage yet.
    [ garbage_collect(Pid) || Pid <- processes() ],
    Nudge = fun(Scheduler) ->
                    [ begin
                          Id = <<"nudge", Scheduler:16, N:32>>,
                          ok = erlmcp_nif:register(Registry, connection, Id, self(), self(), nudge),
                          ok = erlmcp_nif:unregister(Registry, connection, Id)
                      end || N <- lists:seq(1, 300) ]
            end,
    on_every_scheduler(Nudge),
    on_every_scheduler(Nudge),
    erlmcp_nif:distinct_configs().


on_every_scheduler(Fun) ->
    Monitors = [ monitor
                 || N <- lists:seq(1, erlang:system_info(schedulers_online)),
                    {_, _} <- [spawn_opt(fun() -> Fun(N) end, [monitor, {scheduler, N}])] ],
    [ receive {'DOWN', _, process, _, normal} -> ok end || _ <- Monitors ].


%% A process of this node's name, but of an earlier life of it, is one that has ended.
process_of_a_former_node(Config) ->
    R = registry(Config),
    Former = external_pid(atom_to_binary(node()), 123),
    ?assertEqual(node(), node(Former)),
    ?assertNot(is_process_alive(Former)),
    Count = api(R, count, []),
    ?assertEqual(ok, api(R, register_connection, [<<"former">>, Former, none])),
    test_support:await(fun() -> api(R, lookup_connection, [<<"former">>]) =:= {error, not_found} end),
    test_support:await(fun() -> api(R, count, []) =:= Count end).


%%% OTP `via' names


via_gen_server(_Config) ->
    Name = {via_server, [1, 2]},
    Via = {via, ?M, Name},
    {ok, Pid} = gen_server:start(Via, ?MODULE, first, []),
    ?assertEqual({error, {already_started, Pid}}, gen_server:start(Via, ?MODULE, second, [])),
    ?assertEqual(Pid, ?M:whereis_name(Name)),
    ?assertEqual({first, hello}, gen_server:call(Via, hello)),
    ok = gen_server:cast(Via, {tell, self()}),
    ?assertEqual(told, receive {Pid, told} -> told after 5000 -> none end),
    ok = gen_server:stop(Via),
    ?assertEqual(undefined, ?M:whereis_name(Name)),
    ?assertExit({noproc, _}, gen_server:call(Via, hello)),
    ?assertEqual(ok, gen_server:cast(Via, nobody)),
    {ok, Next} = gen_server:start(Via, ?MODULE, next, []),
    ?assertEqual({next, hello}, gen_server:call(Via, hello)),
    exit(Next, kill),
    test_support:await(fun() -> not is_process_alive(Next) end),
    {ok, Last} = gen_server:start(Via, ?MODULE, last, []),
    ?assertEqual({last, hello}, gen_server:call(Via, hello)),
    ok = gen_server:stop(Last),
    %% One whose init fails leaves no name.
    ?assertEqual({error, refused}, gen_server:start(Via, ?MODULE, refuse, [])),
    ?assertEqual(undefined, ?M:whereis_name(Name)).


via_supervisor(_Config) ->
    Name = <<"supervised">>,
    Via = {via, ?M, Name},
    {ok, Sup} = supervisor:start_link(?MODULE, supervise),
    Child = #{id => child, start => {?MODULE, start_named, [Via]}},
    {ok, First} = supervisor:start_child(Sup, Child),
    %% Restarted under the same name as often as it dies.
    lists:foldl(fun(_, Pid) ->
                        exit(Pid, kill),
                        IsAnother = fun() ->
                                            Now = ?M:whereis_name(Name),
                                            is_pid(Now) andalso Now =/= Pid
                                    end,
                        test_support:await(IsAnother),
                        ?M:whereis_name(Name)
                end,
                First,
                lists:seq(1, 50)),
    ?assertEqual({named, hello}, gen_server:call(Via, hello)),
    unlink(Sup),
    ok = gen_server:stop(Sup),
    ?assertEqual(undefined, ?M:whereis_name(Name)).


send_through_via(_Config) ->
    ?assertEqual(yes, ?M:register_name({mine}, self())),
    ?assertEqual(self(), ?M:send({mine}, one)),
    ok = gen_server:cast({via, ?M, {mine}}, two),
    ?assertEqual([one, {'$gen_cast', two}], [receive A -> A end, receive B -> B end]),
    ok = ?M:unregister_name({mine}),
    ?assertExit({badarg, {{mine}, three}}, ?M:send({mine}, three)).


start_named(Via) ->
    gen_server:start_link(Via, ?MODULE, named, []).


init(refuse) -> {stop, refused};
init(supervise) -> {ok, {#{intensity => 1000, period => 1}, []}};
init(Name) -> {ok, Name}.


handle_call(Request, _From, Name) -> {reply, {Name, Request}, Name}.


handle_cast({tell, Pid}, Name) ->
    Pid ! {self(), told},
    {noreply, Name};
handle_cast(_, Name) ->
    {noreply, Name}.


%%% Registries


%% A new function needs a test.
exports_are_known(_Config) ->
    Expected = [{new, 0},
                {new, 1},
                {limits, 0},
                {limits, 1},
                {register_connection, 3},
                {register_connection, 4},
                {unregister_connection, 1},
                {unregister_connection, 2},
                {lookup_connection, 1},
                {lookup_connection, 2},
                {whereis_connection, 1},
                {whereis_connection, 2},
                {get_shard_id, 1},
                {get_shard_id, 2},
                {list_connections, 1},
                {list_connections, 2},
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
                {send, 3}],
    Exports = ?M:module_info(exports) -- [{module_info, 0}, {module_info, 1}],
    ?assertEqual([], Expected -- Exports),
    ?assertEqual([], Exports -- Expected).


options_and_defaults(_Config) ->
    Defaults = #{shards => 64, max_entries => 2_000_000, max_id_bytes => 65_535},
    ?assertEqual(Defaults, ?M:limits(?M:new())),
    ?assertEqual(Defaults, ?M:limits(?M:new(#{}))),
    [ ?assertEqual(maps:merge(Defaults, Options), ?M:limits(?M:new(Options)))
      || Options <- [ #{shards => 1 bsl N} || N <- lists:seq(0, 10) ] ++
                    [ #{max_entries => N} || N <- [1, 2, 1000, 1 bsl 28] ] ++
                    [ #{max_id_bytes => N} || N <- [1, 100, 1 bsl 24] ] ++
                    [#{shards => 2, max_entries => 3, max_id_bytes => 4}] ],
    ?assertEqual(?M:limits(), ?M:limits(default)).


wrong_options(_Config) ->
    [ ?assertError({bad_option, Key, Value, [_ | _]}, ?M:new(#{Key => Value}))
      || {Key, Values} <- [{shards, [0, -1, 3, 63, 1025, 2048, 1 bsl 64, 64.0, a, <<"64">>, []]},
                           {max_entries, [0, -1, (1 bsl 28) + 1, 1 bsl 70, 1.0, infinity]},
                           {max_id_bytes, [0, -1, (1 bsl 24) + 1, 1.0, infinity, #{}]},
                           {same_pid, [ok]},
                           {unknown, [1]},
                           {<<"shards">>, [64]},
                           {"shards", [64]},
                           {{shards}, [64]}],
         Value <- Values ],
    [ ?assertError(badarg, ?M:new(Options))
      || Options <- [[], [{shards, 64}], undefined, 64, default, make_ref()] ].


registries_are_independent(_Config) ->
    Registries = [default | [ ?M:new(#{shards => 8}) || _ <- lists:seq(1, 20) ]],
    Pid = process(),
    Before = ?M:count(),
    [ ok = ?M:register_connection(R, <<"the same">>, Pid, {nth, Nth})
      || {Nth, R} <- lists:enumerate(Registries) ],
    [ ?assertEqual({ok, {Pid, {nth, Nth}}}, ?M:lookup_connection(R, <<"the same">>))
      || {Nth, R} <- lists:enumerate(Registries) ],
    [ ?assertEqual(1, ?M:count(R)) || R <- tl(Registries) ],
    ?assertEqual(Before + 1, ?M:count()),
    ok = ?M:unregister_connection(lists:nth(3, Registries), <<"the same">>),
    ?assertEqual([1, 0 | lists:duplicate(18, 1)], [ ?M:count(R) || R <- tl(Registries) ]),
    %% The end of the process is noticed by all of them.
    stop(Pid),
    test_support:await(fun() -> lists:all(fun(R) -> ?M:count(R) =:= 0 end, tl(Registries)) end),
    test_support:await(fun() -> ?M:count() =:= Before end).


no_registry(_Config) ->
    NoRegistries = [make_ref(),
                    atomics:new(1, []),
                    ets:new(t, []),
                    undefined,
                    'Default',
                    1,
                    [],
                    {},
                    <<>>,
                    self(),
                    "default",
                    <<"default">>,
                    external_reference(<<"other@host">>)],
    [ ?assertError(badarg, apply(?M, F, [NoRegistry | Arguments]), {F, NoRegistry})
      || NoRegistry <- NoRegistries,
         {F, Arguments} <- [{limits, []},
                            {register_connection, [id, self(), caps]},
                            {unregister_connection, [id]},
                            {lookup_connection, [id]},
                            {whereis_connection, [id]},
                            {get_shard_id, [id]},
                            {list_connections, [0]},
                            {count, [0]},
                            {stats, [0]},
                            {register_name, [id, self()]},
                            {unregister_name, [id]},
                            {whereis_name, [id]},
                            {send, [id, message]}] ],
    [ ?assertError(badarg, apply(?M, F, [NoRegistry]), {F, NoRegistry})
      || NoRegistry <- NoRegistries, F <- [count, stats], not is_integer(NoRegistry) ].


max_entries(_Config) ->
    R = ?M:new(#{max_entries => 10}),
    Pid = process(),
    Ids = [ <<"bound", N>> || N <- lists:seq(1, 10) ],
    [ ?assertEqual(ok, ?M:register_connection(R, Id, Pid, none)) || Id <- Ids ],
    ?assertEqual({error, registry_full}, ?M:register_connection(R, <<"more">>, Pid, none)),
    ?assertEqual(no, ?M:register_name(R, <<"more">>, Pid)),
    ?assertEqual({error, not_found}, ?M:lookup_connection(R, <<"more">>)),
    ?assertEqual(10, ?M:count(R)),
    %% The first reason is that it is taken.
    ?assertEqual({error, already_registered}, ?M:register_connection(R, hd(Ids), Pid, none)),
    %% One out, one in, any number of times.
    [ begin
          ok = ?M:unregister_connection(R, hd(Ids)),
          ?assertEqual(ok, ?M:register_connection(R, hd(Ids), Pid, none)),
          ?assertEqual({error, registry_full}, ?M:register_connection(R, <<"more">>, Pid, none))
      end || _ <- lists:seq(1, 1000) ],
    %% One that has ended takes no room.
    ok = ?M:unregister_connection(R, hd(Ids)),
    Ended = process(),
    stop(Ended),
    [ ?assertEqual(ok, ?M:register_connection(R, <<"ended", N>>, Ended, none))
      || N <- lists:seq(1, 20) ],
    ?assertEqual(ok, ?M:register_connection(R, hd(Ids), self(), none)),
    stop(Pid),
    test_support:await(fun() -> ?M:count(R) =:= 1 end),
    [ ?assertEqual(ok, ?M:register_connection(R, Id, self(), none)) || Id <- tl(Ids) ],
    ?assertEqual({error, registry_full}, ?M:register_connection(R, <<"more">>, self(), none)),
    One = ?M:new(#{max_entries => 1}),
    ?assertEqual(ok, ?M:register_connection(One, a, self(), none)),
    ?assertEqual({error, registry_full}, ?M:register_connection(One, b, self(), none)).


max_entries_counts_all_namespaces(_Config) ->
    R = ?M:new(#{max_entries => 3}),
    ok = erlmcp_nif:register(R, server, a, self(), self(), none),
    ok = erlmcp_nif:register(R, transport, a, self(), self(), #{server_id => not_there}),
    ?assertEqual(ok, ?M:register_connection(R, a, self(), none)),
    ?assertEqual({error, registry_full}, ?M:register_connection(R, b, self(), none)),
    ?assertMatch(#{servers := 1, transports := 1, connections := 1}, ?M:stats(R)),
    ok = erlmcp_nif:unregister(R, transport, a),
    ?assertEqual(ok, ?M:register_connection(R, b, self(), none)).


%% A binary takes its bytes. What another term takes is not promised, but that it is refused beyond
%% the bound, found below it, and that there is no bound between.
max_id_bytes(_Config) ->
    [ begin
          R = ?M:new(#{max_id_bytes => Max}),
          Longest = binary:copy(<<"x">>, Max),
          ?assertEqual(ok, ?M:register_connection(R, Longest, self(), none)),
          ?assertEqual({ok, {self(), none}}, ?M:lookup_connection(R, Longest)),
          check_too_long(R, <<Longest/binary, "x">>),
          check_too_long(R, [Longest]),
          check_too_long(R, lists:duplicate(Max + 1, [])),
          check_too_long(R, list_to_tuple(lists:duplicate(Max + 1, []))),
          check_too_long(R, maps:from_list([ {<<N:32>>, []} || N <- lists:seq(1, Max + 1) ])),
          check_too_long(R, 1 bsl (8 * Max)),
          check_too_long(R, <<0:(8 * Max + 1)>>),
          check_too_long(R, fun_with(Longest)),
          check_too_long(R, nested(Max + 1, fun(T) -> [T] end)),
          ?assertEqual(1, ?M:count(R))
      end || Max <- [1, 10, 30, 31, 1000, 65_535] ],
    %% The default bound.
    R = ?M:new(),
    ?assertEqual(ok, ?M:register_connection(R, binary:copy(<<"x">>, 65_535), self(), none)),
    check_too_long(R, binary:copy(<<"x">>, 65_536)),
    Large = ?M:new(#{max_id_bytes => 1 bsl 24}),
    ?assertEqual(ok, ?M:register_connection(Large, binary:copy(<<"x">>, 1 bsl 24), self(), none)),
    check_too_long(Large, binary:copy(<<"x">>, (1 bsl 24) + 1)).


check_too_long(R, Id) ->
    %% Not by an assertion, which would print the id.
    [ {F, badarg} = {F, result(fun() -> apply(?M, F, [R, Id | Rest]) end)}
      || {F, Rest} <- [{register_connection, [self(), none]},
                       {unregister_connection, []},
                       {lookup_connection, []},
                       {whereis_connection, []},
                       {get_shard_id, []},
                       {register_name, [self()]},
                       {unregister_name, []},
                       {whereis_name, []},
                       {send, [message]}] ].


result(Fun) ->
    try
        Fun()
    catch
        error:Reason -> Reason
    end.


%% Terms that nobody could take a copy of: refused at once, before anything in their size is done.
long_ids_change_nothing(_Config) ->
    R = ?M:new(),
    Memory = resident(),
    Long = binary:copy(<<0>>, 200_000_000),
    [ ?assertEqual(badarg, result(fun() -> ?M:register_connection(R, Id, self(), none) end))
      || Id <- [Long, [Long], {a, Long}, #{Long => Long}, [ Long || _ <- lists:seq(1, 1000) ]] ],
    ?assertEqual(0, ?M:count(R)),
    ?assert(resident() - Memory < 300_000_000).


reference_in_a_message_keeps_it(_Config) ->
    Holder = spawn_link(fun() -> receive stop -> ok end end),
    Pid = process(),
    in_process(fun() ->
                       R = ?M:new(),
                       ok = ?M:register_connection(R, <<"kept">>, Pid, none),
                       Holder ! {a, [registry, R]}
               end),
    [ garbage_collect(P) || P <- processes() ],
    ?assertEqual(1, monitors_of(Pid)),
    {messages, [{a, [registry, R]}]} = process_info(Holder, messages),
    ?assertEqual({ok, {Pid, none}}, ?M:lookup_connection(R, <<"kept">>)),
    %% As a term in the external format it is the same registry.
    ?assertEqual({ok, {Pid, none}}, ?M:lookup_connection(make_anew(R), <<"kept">>)),
    Holder ! stop,
    stop(Pid).


%% A term of the constant pool is copied: what it was read from may go.
literal_as_config(_Config) ->
    Key = {?MODULE, literal},
    Term = #{list => lists:seq(1, 500), binary => some_binary(100), fn => fun_with(1)},
    R = ?M:new(),
    ok = persistent_term:put(Key, Term),
    Id = {literal, <<"id">>},
    ok = ?M:register_connection(R, Id, self(), persistent_term:get(Key)),
    ok = ?M:register_connection(R, persistent_term:get(Key), self(), none),
    true = persistent_term:erase(Key),
    [ begin
          [ garbage_collect(P) || P <- processes() ],
          ok = persistent_term:put(Key, [ make_anew(Term) || _ <- lists:seq(1, 20) ]),
          true = persistent_term:erase(Key)
      end || _ <- lists:seq(1, 5) ],
    ?assert({ok, {self(), Term}} =:= ?M:lookup_connection(R, Id)),
    ?assertEqual(self(), ?M:whereis_connection(R, Term)),
    ?assert(lists:sort([Id, Term]) =:=
            lists:sort([ L || Shard <- lists:seq(0, 63),
                              {L, _} <- ?M:list_connections(R, Shard) ])).


monitors_of(Pid) ->
    {monitored_by, By} = process_info(Pid, monitored_by),
    length(By).


%%% The node


i_prints_it(_Config) ->
    ok = ?M:register_connection(<<"i">>, self(), none),
    ct:capture_start(),
    Result = erlmcp_native:i(),
    ct:capture_stop(),
    Text = lists:flatten(ct:capture_get()),
    ok = ?M:unregister_connection(<<"i">>),
    ?assertEqual(ok, Result),
    Info = erlmcp_native:info(),
    [ ?assertNotEqual({nomatch, Word}, {string:find(Text, Word), Word})
      || Word <- [maps:get(version, Info),
                  "OTP",
                  "loaded",
                  "servers",
                  "transports",
                  "connections",
                  "bindings",
                  "shards",
                  "2000000"] ].


config_errors_name_key_value_expectation(_Config) ->
    Wrong = [{shards, 63, "power of two"},
             {shards, 0, "1024"},
             {shards, -64, "1024"},
             {shards, 2048, "1024"},
             {shards, "64", "1024"},
             {max_entries, 0, "268435456"},
             {max_entries, infinity, "integer"},
             {max_entries, (1 bsl 28) + 1, "268435456"},
             {max_id_bytes, 0, "16777216"},
             {max_id_bytes, (1 bsl 24) + 1, "16777216"},
             {shard, 64, "shards"}],
    [ begin
          {error, {bad_option, K, V, Expected}} =
              erlmcp_native_config:registry_limits(#{Key => Value}),
          ?assertEqual({Key, Value}, {K, V}),
          ?assertNotEqual({nomatch, Key}, {string:find(Expected, Part), Key}),
          ?assert(io_lib:printable_unicode_list(Expected))
      end || {Key, Value, Part} <- Wrong ],
    ?assertEqual({ok, {64, 2_000_000, 65_535}}, erlmcp_native_config:registry_limits(#{})),
    ?assertEqual({ok, {2, 3, 4}},
                 erlmcp_native_config:registry_limits(#{
                                                        shards => 2,
                                                        max_entries => 3,
                                                        max_id_bytes => 4
                                                       })).


application_starts_with_defaults(_Config) -> in_peer(in_app_defaults).


in_app_defaults() ->
    ok = application:start(erlmcp_native),
    true = is_pid(whereis(erlmcp_native_sup)),
    %% The host starts these.
    undefined = whereis(erlmcp_registry),
    undefined = whereis(erlmcp_circuit_breaker),
    #{shards := 64, max_entries := 2_000_000, max_id_bytes := 65_535} = ?M:limits(),
    #{application := running} = erlmcp_native:info(),
    ok = application:stop(erlmcp_native),
    #{application := stopped} = erlmcp_native:info(),
    ok.


application_bounds_the_default_registry(_Config) -> in_peer(in_app_bounds).


in_app_bounds() ->
    ok = application:load(erlmcp_native),
    [ ok = application:set_env(erlmcp_native, Key, Value)
      || {Key, Value} <- [{shards, 4}, {max_entries, 5}, {max_id_bytes, 6}, {same_pid, ok}] ],
    ok = application:start(erlmcp_native),
    #{shards := 4, max_entries := 5, max_id_bytes := 6} = ?M:limits(),
    3 = lists:max([ ?M:get_shard_id(<<N>>) || N <- lists:seq(0, 255) ]),
    badarg = result(fun() ->
                            ?M:register_connection(<<"longer">>, self(), none),
                            ?M:register_connection(<<"longer.">>, self(), none)
                    end),
    [ ok = ?M:register_connection(<<N>>, self(), none) || N <- lists:seq(1, 4) ],
    {error, registry_full} = ?M:register_connection(<<5>>, self(), none),
    {ok, _} = erlmcp_registry:start_link(),
    {error, registry_full} = erlmcp_registry:register_server(<<1>>, self(), none),
    ok.


application_refuses_a_wrong_environment(_Config) -> in_peer(in_app_refuses).


in_app_refuses() ->
    ok = application:load(erlmcp_native),
    [ begin
          ok = application:set_env(erlmcp_native, Key, Value),
          {Key, {error, {{bad_option, Key, Value, [_ | _]}, {erlmcp_native_app, start, _}}}} =
              {Key, application:start(erlmcp_native)},
          undefined = whereis(erlmcp_native_sup),
          ok = application:unset_env(erlmcp_native, Key)
      end || {Key, Value} <- [{shards, 3},
                              {shards, undefined},
                              {max_entries, -1},
                              {max_entries, "2"},
                              {max_id_bytes, 0},
                              {same_pid, sometimes},
                              {same_pid, already_registred},
                              {shard, 64},
                              {'Shards', 64}] ],
    ok = application:start(erlmcp_native),
    #{shards := 64} = ?M:limits(),
    ok.


default_registry_outlives_the_application(_Config) -> in_peer(in_outlives).


in_outlives() ->
    ok = application:start(erlmcp_native),
    Pid = process(),
    ok = ?M:register_connection(<<"outlives">>, Pid, #{caps => [1]}),
    {ok, _} = erlmcp_registry:start_link(),
    ok = erlmcp_registry:register_server(<<"server">>, Pid, none),
    [ begin
          ok = application:stop(erlmcp_native),
          {ok, {Pid, #{caps := [1]}}} = ?M:lookup_connection(<<"outlives">>),
          {ok, {Pid, none}} = erlmcp_registry:find_server(<<"server">>),
          ok = erlmcp_registry:route_to_server(<<"server">>, <<"t">>, {self(), ping}),
          receive {Pid, pong} -> ok end,
          ok = application:start(erlmcp_native),
          {ok, {Pid, #{caps := [1]}}} = ?M:lookup_connection(<<"outlives">>)
      end || _ <- lists:seq(1, 3) ],
    ok = application:stop(erlmcp_native),
    ok = application:unload(erlmcp_native),
    stop(Pid),
    {error, not_found} = ?M:lookup_connection(<<"outlives">>),
    ok.


%% It keeps its bounds and its entries, and the application starts.
default_registry_made_before_the_application(_Config) -> in_peer(in_made_before).


in_made_before() ->
    ok = ?M:register_connection(<<"before">>, self(), none),
    ok = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, shards, 2),
    ok = application:start(erlmcp_native),
    #{shards := 64} = ?M:limits(),
    {ok, {_, none}} = ?M:lookup_connection(<<"before">>),
    ok.


%% The terms that a process holds stay the same (`=:=') when its node gets a name.
ids_with_pids_and_references_after_net_kernel_start(_Config) ->
    in_peer(in_ids_after_distribution).


in_ids_after_distribution() ->
    Alias = erlang:alias(),
    after_distribution([self(),
                        make_ref(),
                        Alias,
                        {self(), make_ref()},
                        [self() | make_ref()],
                        #{self() => make_ref()},
                        atomics:new(1, []),
                        ets:new(t, []),
                        external_pid(<<"other@host">>, 1),
                        external_reference(<<"other@host">>),
                        {external_pid(<<"other@host">>, 1)},
                        <<"plain">>,
                        {plain, [1.0]}]).


after_distribution(Ids) ->
    R = ?M:new(#{shards => 1}),
    Registered = [ {Id, {self(), {nth, Nth}}} || {Nth, Id} <- lists:enumerate(Ids) ],
    [ ok = ?M:register_connection(R, Id, Pid, Caps) || {Id, {Pid, Caps}} <- Registered ],
    become_distributed(),
    NotFound = [ {Id, Found} || {Id, Entry} <- Registered,
                                Found <- [?M:lookup_connection(R, Id)],
                                Found =/= {ok, Entry} ],
    Listed = ?M:list_connections(R, 0),
    Shards = [ Id || Id <- Ids, ?M:get_shard_id(default, Id) =/= erlang:phash2(Id, 64) ],
    Again = [ Id || Id <- Ids,
                    ?M:register_connection(R, Id, self(), again) =/= {error, already_registered} ],
    {[], [], [], [], []} =
        {NotFound, Registered -- Listed, Listed -- Registered, Shards, Again},
    ok.


configs_after_net_kernel_start(_Config) -> in_peer(in_configs_after_distribution).


in_configs_after_distribution() ->
    [Port | _] = erlang:ports(),
    R = ?M:new(),
    Configs = [self(),
               {self()},
               #{owner => self()},
               make_ref(),
               {make_ref()},
               Port,
               [Port],
               fun_with(self()),
               [fun_with(1)],
               lists:duplicate(200, self()),
               external_pid(<<"other@host">>, 1),
               #{pid => external_pid(<<"other@host">>, 1)}],
    Named = [ {<<Nth>>, Caps} || {Nth, Caps} <- lists:enumerate(Configs) ],
    [ ok = ?M:register_connection(R, Id, self(), Caps) || {Id, Caps} <- Named ],
    become_distributed(),
    [] = [ {Caps, Found} || {Id, Caps} <- Named,
                            Found <- [?M:lookup_connection(R, Id)],
                            Found =/= {ok, {self(), Caps}} ],
    ok.


become_distributed() ->
    nonode@nohost = node(),
    %% A node that is started with a name starts epmd.
    {ok, Starter, _} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    {ok, _} = net_kernel:start([list_to_atom(peer:random_name()), shortnames]),
    true = is_alive(),
    peer:stop(Starter).


process_of_another_node(_Config) -> in_peer(in_other_node).


in_other_node() ->
    become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    Pid = spawn(Node, ?MODULE, idle, []),
    pong = net_adm:ping(Node),
    Processes = erlang:system_info(process_count),
    Configs = erlmcp_nif:distinct_configs(),
    Caps = #{remote => Pid, list => lists:seq(1, 100)},
    [ begin
          ok = apply(?M, register_connection, Arguments ++ [<<"remote">>, Pid, Caps]),
          {error, already_registered} =
              apply(?M, register_connection, Arguments ++ [<<"remote">>, self(), other]),
          {ok, {Pid, Caps}} = apply(?M, lookup_connection, Arguments ++ [<<"remote">>]),
          Pid = apply(?M, whereis_connection, Arguments ++ [<<"remote">>]),
          [{<<"remote">>, {Pid, Caps}}] =
              lists:append([ apply(?M, list_connections, Arguments ++ [Shard])
                             || Shard <- lists:seq(0, 63) ]),
          Pid = apply(?M, send, Arguments ++ [<<"remote">>, {self(), ping}]),
          receive {Pid, pong} -> ok end,
          ok = apply(?M, unregister_connection, Arguments ++ [<<"remote">>]),
          {error, not_found} = apply(?M, lookup_connection, Arguments ++ [<<"remote">>])
      end || R <- [?M:new()], Arguments <- [[], [default], [R]], _ <- lists:seq(1, 3) ],
    %% What watched it is gone.
    test_support:await(fun() -> erlang:system_info(process_count) =< Processes + 1 end),
    %% It ends, or has ended before.
    ok = ?M:register_connection(<<"ends">>, Pid, none),
    Other = spawn(Node, ?MODULE, idle, []),
    ok = ?M:register_connection(<<"stays">>, Other, none),
    Pid ! stop,
    test_support:await(fun() -> ?M:lookup_connection(<<"ends">>) =:= {error, not_found} end),
    ok = ?M:register_connection(<<"ended">>, Pid, none),
    test_support:await(fun() -> ?M:lookup_connection(<<"ended">>) =:= {error, not_found} end),
    Other = ?M:whereis_connection(<<"stays">>),
    ok = ?M:register_connection(<<"ends">>, self(), none),
    1 = length([ x || _ <- [?M:whereis_connection(<<"ends">>)] ]),
    ok = ?M:unregister_connection(<<"ends">>),
    %% New code of what watches them purges the old one, and no entry with it.
    [ begin
          {module, erlmcp_native_registry} = code:load_file(erlmcp_native_registry),
          true = code:soft_purge(erlmcp_native_registry)
      end || _ <- [1, 2, 3] ],
    {ok, {Other, none}} = ?M:lookup_connection(<<"stays">>),
    Other ! stop,
    test_support:await(fun() -> ?M:count() =:= 0 end),
    test_support:await(fun() -> settled_configs(default) =< Configs + 1 end),
    peer:stop(Peer).


other_node_goes_down(_Config) -> in_peer(in_other_node_down).


in_other_node_down() ->
    become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    pong = net_adm:ping(Node),
    R = ?M:new(),
    {ok, _} = erlmcp_registry:start_link(),
    Processes = erlang:system_info(process_count),
    Pids = [ spawn(Node, ?MODULE, idle, []) || _ <- lists:seq(1, 500) ],
    [ begin
          ok = ?M:register_connection(<<N:32>>, Pid, {caps, N}),
          ok = ?M:register_connection(R, <<N:32>>, Pid, {caps, N}),
          ok = erlmcp_registry:register_server(<<N:32>>, Pid, {caps, N}),
          ok = erlmcp_registry:register_transport(<<N:32>>, Pid, #{server_id => <<N:32>>})
      end || {N, Pid} <- lists:enumerate(Pids) ],
    {500, 500} = {?M:count(), ?M:count(R)},
    {ok, {P1, {caps, 1}}} = erlmcp_registry:find_server(<<1:32>>),
    Node = node(P1),
    peer:stop(Peer),
    test_support:await(fun() -> {?M:count(), ?M:count(R)} =:= {0, 0} end),
    test_support:await(fun() -> default_counts() =:= [0, 0, 0] end),
    [] = erlmcp_nif:bindings(default),
    {error, not_found} = erlmcp_registry:find_server(<<1:32>>),
    [ ok = ?M:register_connection(<<N:32>>, self(), anew) || N <- lists:seq(1, 500) ],
    test_support:await(fun() -> erlang:system_info(process_count) =< Processes + 1 end),
    500 = ?M:count(),
    %% A process of a node that cannot be reached is one that has ended.
    ok = ?M:register_connection(R, <<"gone">>, hd(Pids), none),
    test_support:await(fun() -> ?M:lookup_connection(R, <<"gone">>) =:= {error, not_found} end),
    ok.


%% Lives until it is told to stop.
idle() ->
    receive
        {From, ping} -> From ! {self(), pong}, idle();
        {mcp_message, _, {From, ping}} -> From ! {self(), pong}, idle();
        crash -> exit(crashed);
        stop -> ok
    end.


%%% Peer nodes


in_peer(Function) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, Function, [], #{timeout_ms => 120_000})).


%%% Registries under test


registry(Config) ->
    proplists:get_value(registry, Config).


%% With and without a registry for the first argument.
api(default, Function, Arguments) -> apply(?M, Function, Arguments);
api({explicit, Registry}, Function, Arguments) -> apply(?M, Function, [Registry | Arguments]).


nif_registry(default) -> default;
nif_registry({explicit, Registry}) -> Registry.


%%% Processes and time


%% A process that ends with the case, at the latest.
process() ->
    Parent = self(),
    Pid = spawn(fun() ->
                        _ = monitor(process, Parent),
                        Parent ! {self(), ready},
                        served()
                end),
    receive {Pid, ready} -> Pid end.


served() ->
    receive
        {From, ping} -> From ! {self(), pong}, served();
        {mcp_message, _, {From, ping}} -> From ! {self(), pong}, served();
        crash -> exit(crashed);
        stop -> ok;
        {'DOWN', _, process, _, _} -> ok
    end.


stop(Pid) ->
    Monitor = monitor(process, Pid),
    Pid ! stop,
    receive {'DOWN', Monitor, process, Pid, _} -> ok end.


%% The fun's result, from a process that is gone, and with it what it referred to.
in_process(Fun) ->
    Parent = self(),
    {Pid, Monitor} = spawn_monitor(fun() -> Parent ! {self(), Fun()} end),
    receive
        {Pid, Result} ->
            receive {'DOWN', Monitor, process, Pid, normal} -> Result end;
        {'DOWN', Monitor, process, Pid, Reason} ->
            error(Reason)
    end.


%% Bytes of memory that this node's operating system process has.
resident() ->
    [ garbage_collect(P) || P <- processes() ],
    case file:read_file("/proc/self/statm") of
        {ok, Statm} ->
            [_, Pages | _] = binary:split(Statm, <<" ">>, [global]),
            binary_to_integer(Pages) * 4096;
        {error, _} ->
            erlang:memory(total)
    end.
