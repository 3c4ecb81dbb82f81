%%% Every function of the native library with arguments that nobody should give it.
%%%
%%% The contract: whatever the arguments, a function returns what its -spec in erlmcp_nif says, or
%%% raises badarg and nothing else; the node lives; when everything is unregistered, nothing is
%%% left: no entry, no config, no memory. No call on a normal scheduler takes longer than a
%%% millisecond, whatever the arguments and however large the registry.
%%%
%%% The functions are those that the loaded library has, and the kinds of their arguments those of
%%% their specs, so a new function is tested without a change here. All runs in peer nodes: the end
%%% of such a node is a failed case and not the end of the run.
%%%
%%% The length of a call is the shortest of several: a busy machine makes many a call long, but not
%%% the same one each time. What cannot be repeated is done anew as a whole, or judged by the
%%% processor's time.
%%%
%%% FUZZ_CALLS: calls of each function (100,000). FUZZ_SEED: repeats a run, up to the interleaving
%%% of its two processes.
-module(nif_fuzz_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).

-export([every_function_survives_any_arguments/1,
         calls_are_short_among_a_million_entries/1,
         growth_to_a_million_entries_is_gradual/1,
         calls_with_the_longest_ids_are_short/1,
         calls_with_large_configs_are_short/1,
         small_configs_are_found_on_any_scheduler/1,
         calls_after_large_configs_are_short/1,
         calls_after_many_configs_are_short/1,
         freeing_starts_one_thread/1,
         freeing_goes_on_without_the_module/1,
         ids_beyond_the_bound_are_refused_at_once/1,
         ids_beyond_the_bound_take_no_memory/1,
         listing_entries_with_long_ids_is_short/1,
         listing_where_many_entries_were_is_short/1,
         listing_servers_among_dangling_names_is_short/1,
         freeing_a_registry_that_was_large_is_short/1,
         freeing_a_large_registry_is_short/1]).

%% Called in peer nodes
-export([in_fuzz/2, in_measured/1, in_growth/0, in_found/0, in_freeing/0, in_purged/0, in_memory/0]).

-define(NIF,        erlmcp_nif).
-define(NAMESPACES, [server, transport, connection]).
-define(LIMIT_US,   1000).
%% Times that a long call is repeated.
-define(REPEATS, 20).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [every_function_survives_any_arguments,
     calls_are_short_among_a_million_entries,
     growth_to_a_million_entries_is_gradual,
     calls_with_the_longest_ids_are_short,
     calls_with_large_configs_are_short,
     small_configs_are_found_on_any_scheduler,
     calls_after_large_configs_are_short,
     calls_after_many_configs_are_short,
     freeing_starts_one_thread,
     freeing_goes_on_without_the_module,
     ids_beyond_the_bound_are_refused_at_once,
     ids_beyond_the_bound_take_no_memory,
     listing_entries_with_long_ids_is_short,
     listing_where_many_entries_were_is_short,
     listing_servers_among_dangling_names_is_short,
     freeing_a_registry_that_was_large_is_short,
     freeing_a_large_registry_is_short].


init_per_suite(Config) ->
    none = ?NIF:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% Any arguments


every_function_survives_any_arguments(_Config) ->
    Seed = test_support:seed("FUZZ_SEED"),
    Calls = test_support:positive_integer("FUZZ_CALLS", 100_000),
    ct:pal("FUZZ_CALLS=~b", [Calls]),
    {Seconds, Report} = timed_seconds(fun() -> in_peer(in_fuzz, [Seed, Calls], []) end),
    #{results := Results, unexpected := Unexpected, left := Left, grown := Grown} = Report,
    #{settings := Settings, restored := Restored, routed := Routed} = Report,
    ct:pal("~b functions in ~.1f s, ~p~n~ts",
           [map_size(Results),
            Seconds,
            Grown,
            [ io_lib:format("  ~-28w ~8b returned, ~8b badarg~n",
                            [Function, Returned, Badarg])
              || {Function, {Returned, Badarg}} <- lists:sort(maps:to_list(Results)) ]]),
    ?assertEqual([], Unexpected),
    %% Each as often as asked for, neither always refused nor always accepted.
    ?assertEqual(functions(), lists:sort(maps:keys(Results))),
    ?assertEqual([],
                 [ Of || {_, {Returned, Badarg}} = Of <- maps:to_list(Results),
                         Returned + Badarg < Calls ]),
    ?assertEqual([],
                 [ Of || {{Name, Arity}, {Returned, Badarg}} = Of <- maps:to_list(Results),
                         Returned =:= 0 orelse (takes_not_all(Name, Arity) andalso Badarg =:= 0) ]),
    %% Everything works when the settings are what they were.
    ?assertEqual(Settings, Restored),
    ?assertEqual(ok, Routed),
    %% The last one is the number of configs, of which a few of the last removals may be there.
    %% All that were made are some hundreds.
    {Entries, Bindings, Configs} = Left,
    ?assertEqual([], Entries),
    ?assertEqual([], Bindings),
    ?assert(Configs =< 200, Configs),
    #{resident := Resident, total := Total} = Grown,
    ?assert(Resident < 100_000_000, Resident),
    ?assert(Total < 50_000_000, Total).


%% What asks whether a term is something takes any term.
takes_not_all(Name, Arity) ->
    Arity > 0 andalso not lists:member(Name, [is_bucket, are_limits]).


functions() ->
    lists:sort(?NIF:module_info(nifs)).


in_fuzz(Seed, Calls) ->
    created = ?NIF:make_default(64, 2_000_000, 65_535),
    Settings = settings(),
    Own = [?NIF:new(16, 100_000, 65_535), ?NIF:new(1, 20, 100), ?NIF:new(1024, 1 bsl 28, 1 bsl 24)],
    Closing = ?NIF:new(4, 1000, 1000),
    Plan = #{seed => Seed, own => Own, closing => Closing, specs => specs(), heavy => heavy()},
    %% What is allocated once is allocated now.
    {_, []} = fuzz_in_two(Plan, max(1, Calls div 20)),
    ok = clear([default, Closing | Own]),
    Before = memory(),
    {Results, Unexpected} = fuzz_in_two(Plan#{seed := Seed + 1}, Calls),
    ok = clear([default, Closing | Own]),
    ok = restore(Settings),
    Restored = settings(),
    Routed = route_a_few(),
    Entries = [ {Registry, NS, Count}
                || Registry <- [default, Closing | Own],
                   NS <- ?NAMESPACES,
                   Count <- [?NIF:count(Registry, NS),
                             length(?NIF:list_dirty(Registry, NS)),
                             counted_by_shard(Registry, NS)],
                   Count =/= 0 ],
    Bindings = [ Binding || Registry <- [default, Closing | Own],
                            Binding <- ?NIF:bindings(Registry) ],
    Configs = ?NIF:distinct_configs(),
    After = memory(),
    Grown = maps:map(fun(Key, Bytes) -> Bytes - maps:get(Key, Before) end, After),
    #{
      results => Results,
      unexpected => lists:sublist(Unexpected, 5),
      left => {Entries, Bindings, Configs},
      grown => Grown,
      settings => Settings,
      restored => Restored,
      routed => Routed
     }.


%% The settings of backpressure.
settings() ->
    #{config := Circuit, state := State} = ?NIF:breaker_stats(),
    #{
      limits => ?NIF:shared_limits(),
      thresholds => [ element(2, ?NIF:admission_stats(Shard)) || Shard <- lists:seq(0, 63) ],
      circuit => Circuit,
      state => State
     }.


restore(#{limits := Limits, thresholds := Thresholds, circuit := Circuit, state := closed}) ->
    ok = ?NIF:enforce_limits(true),
    ok = ?NIF:set_shared_limits(Limits),
    ok = ?NIF:set_sample_interval(100),
    _ = [ ok = ?NIF:admission_set_threshold(Shard, Threshold)
          || {Shard, Threshold} <- lists:zip(lists:seq(0, 63), Thresholds) ],
    ok = ?NIF:breaker_configure(Circuit),
    _ = ?NIF:breaker_set(closed),
    ok.


%% The thousand that a full bucket lets through, and some more.
route_a_few() ->
    Pid = sleeper(),
    ok = ?NIF:register(default, connection, few, Pid, Pid, none),
    Routed = [ ?NIF:route_connection(few) || _ <- lists:seq(1, 20_000) ],
    _ = ?NIF:unregister(default, connection, few),
    exit(Pid, kill),
    {Let, Others} = lists:splitwith(fun(Of) -> Of =:= Pid end, Routed),
    case lists:usort(Others) -- [Pid, rate_limited] of
        [] when length(Let) >= 1000, length(Let) < 20_000 -> ok;
        Unexpected -> {length(Let), Unexpected}
    end.


counted_by_shard(Registry, NS) ->
    {Shards, _, _} = ?NIF:limits(Registry),
    Position = maps:get(NS, #{server => 1, transport => 2, connection => 3}),
    lists:sum([ element(Position, ?NIF:count_shard(Registry, Shard))
                || Shard <- lists:seq(0, Shards - 1) ]).


%% Unregisters everything, and then enough more for what was removed to be freed: that happens some
%% removals later, of the same thread.
clear(Registries) ->
    ok = ?NIF:undivert(),
    [ begin
          ok = ?NIF:open(Registry),
          [ ?NIF:unregister(Registry, NS, Id)
            || NS <- ?NAMESPACES, {Id, _} <- ?NIF:list_dirty(Registry, NS) ],
          on_every_scheduler(fun(Scheduler) ->
                                     [ nudge(Registry, NS, <<Scheduler, N:16>>)
                                       || _ <- [1, 2], NS <- ?NAMESPACES, N <- lists:seq(1, 300) ],
                                     [ nudge_dirty(Registry, Scheduler) || _ <- [1, 2, 3, 4] ]
                             end)
      end || Registry <- Registries ],
    [ garbage_collect(Pid) || Pid <- processes() ],
    ok.


nudge(Registry, NS, Id) ->
    _ = ?NIF:register(Registry, NS, Id, self(), self(), nudge),
    _ = ?NIF:unregister(Registry, NS, Id).


nudge_dirty(Registry, Scheduler) ->
    [ ?NIF:register(Registry, NS, <<Scheduler, N:16>>, self(), self(), nudge)
      || NS <- [server, transport], N <- lists:seq(1, 150) ],
    [] = ?NIF:close(Registry),
    ok = ?NIF:open(Registry).


fuzz_in_two(Plan, Calls) ->
    Parent = self(),
    Half = (Calls + 1) div 2,
    Workers = [ spawn_monitor(fun() -> Parent ! {self(), fuzz(Plan, Worker, Half)} end)
                || Worker <- [1, 2] ],
    Outcomes = [ receive
                     {Pid, Outcome} -> Outcome;
                     {'DOWN', Monitor, process, Pid, Reason} when Reason =/= normal ->
                         {#{}, [{worker_ended, Reason}]}
                 end || {Pid, Monitor} <- Workers ],
    {Results, Unexpected} = lists:unzip(Outcomes),
    {lists:foldl(fun(Map, All) ->
                         maps:fold(fun(Function, {R, B}, Sum) ->
                                           {R0, B0} = maps:get(Function, Sum, {0, 0}),
                                           Sum#{Function => {R0 + R, B0 + B}}
                                   end,
                                   All,
                                   Map)
                 end,
                 #{},
                 Results),
     lists:append(Unexpected)}.


%% Rounds, each with terms of its own, which are the same for both workers.
fuzz(#{seed := Seed} = Plan, Worker, Calls) ->
    Rounds = max(1, min(10, Calls div 1000)),
    Pids = list_to_tuple([ sleeper() || _ <- lists:seq(1, 8) ]),
    _ = rand:seed(exsss, {Seed, Worker, 0}),
    fuzz_rounds(Plan, Worker, Rounds, (Calls + Rounds - 1) div Rounds, Pids, #{}, []).


fuzz_rounds(_Plan, _Worker, 0, _Calls, Pids, Results, Unexpected) ->
    [ exit(Pid, kill) || Pid <- tuple_to_list(Pids) ],
    {Results, Unexpected};
fuzz_rounds(Plan, Worker, Round, Calls, Pids, Results, Unexpected) ->
    #{seed := Seed, specs := Specs} = Plan,
    Own = rand:export_seed(),
    _ = rand:seed(exsss, {Seed, 0, Round}),
    Pools = pools(Plan),
    _ = rand:seed(Own),
    {Left, Counted, Unexpected1} =
        fuzz_calls(Calls, Specs, Pools, Pids, Results, Unexpected),
    Worker =:= 1 andalso
    [ ?NIF:unregister(Registry, NS, Id)
      || Registry <- tuple_to_list(maps:get(registry, Pools)),
         NS <- ?NAMESPACES,
         {Id, _} <- ?NIF:list_dirty(Registry, NS) ],
    fuzz_rounds(Plan, Worker, Round - 1, Calls, Left, Counted, Unexpected1).


fuzz_calls(0, _Specs, _Pools, Pids, Results, Unexpected) ->
    {Pids, Results, Unexpected};
fuzz_calls(N, Specs, Pools, Pids, Results, Unexpected) ->
    {Results1, Unexpected1} =
        lists:foldl(fun({Function, Types}, {Counts, Wrong}) ->
                            Arguments = [ argument(Function, Kind, Pools, Pids)
                                          || Kind <- maps:get(kinds, Types) ],
                            {R, B} = maps:get(Function, Counts, {0, 0}),
                            case call(Function, Arguments, maps:get(result, Types)) of
                                returned -> {Counts#{Function => {R + 1, B}}, Wrong};
                                badarg -> {Counts#{Function => {R, B + 1}}, Wrong};
                                Other -> {Counts#{Function => {R + 1, B}}, [Other | Wrong]}
                            end
                    end,
                    {Results, Unexpected},
                    Specs),
    N rem 500 =:= 0 andalso garbage_collect(),
    Pids1 =
        case N rem 100 of
            0 -> replace_one(Pids);
            _ -> Pids
        end,
    fuzz_calls(N - 1, Specs, Pools, Pids1, Results1, Unexpected1).


call({Name, _} = Function, Arguments, Result) ->
    try apply(?NIF, Name, Arguments) of
        Returned ->
            case is_of(Returned, Result) of
                true -> returned;
                false -> {not_as_documented, Function, shown(Arguments), shown(Returned)}
            end
    catch
        error:badarg -> badarg;
        Class:Reason -> {Class, Function, shown(Arguments), shown(Reason)}
    end.


shown(Term) ->
    lists:flatten(io_lib:format("~0tP", [Term, 60])).


sleeper() ->
    Parent = self(),
    spawn(fun() -> _ = monitor(process, Parent), receive {'DOWN', _, _, _, _} -> ok end end).


%% The one that ends may be registered anywhere, and being registered just now.
replace_one(Pids) ->
    N = rand:uniform(tuple_size(Pids)),
    exit(element(N, Pids), kill),
    setelement(N, Pids, sleeper()).


%%% Arguments


%% What the spec asks for most of the time, else something near it or something else.
argument(Function, Kind, Pools, Pids) ->
    case rand:uniform(16) of
        N when N =< 11 -> right(Function, Kind, Pools, Pids);
        N when N =< 13 -> right(Function, pick(maps:get(all_kinds, Pools)), Pools, Pids);
        14 -> junk(Pools);
        15 -> junk(Pools);
        16 -> mutated(right(Function, Kind, Pools, Pids), Pools)
    end.


%% Closing the others would leave too little to do for the rest.
right({close, _}, registry, #{closing := Closing}, _Pids) ->
    case rand:uniform(50) of
        1 -> default;
        _ -> Closing
    end;
right(_, pid, Pools, Pids) ->
    case rand:uniform(4) of
        1 -> pick(maps:get(pid, Pools));
        _ -> pick(Pids)
    end;
%% What their specs tell of is too little for these.
right({breaker_set, _}, term, _Pools, _Pids) ->
    pick({open, closed});
right({breaker_configure, _}, term, _Pools, _Pids) ->
    pick({off, {50, 10_000, 10, 30_000, 10}, {1, 1, 1, 0, 1}, {65_536, 1 bsl 40, 1023, 0, 1023}});
right({route_batch, _}, term, #{id := Ids}, _Pids) ->
    [ {pick(Ids), N} || N <- lists:seq(1, rand:uniform(5) * rand:uniform(5) * rand:uniform(30)) ];
right(_, Kind, Pools, _Pids) ->
    pick(maps:get(Kind, Pools)).


junk(#{junk := Junk, heavy := Heavy}) ->
    case rand:uniform(2000) of
        1 -> pick(Heavy);
        _ -> pick(Junk)
    end.


mutated(Term, Pools) ->
    case rand:uniform(8) of
        1 -> {Term};
        2 -> [Term | Term];
        3 -> [Term];
        4 -> {Term, junk(Pools)};
        5 -> #{Term => junk(Pools)};
        6 when is_integer(Term) -> Term + pick({1, -1, 256, 65536, 1 bsl 32, 1 bsl 64});
        6 when is_binary(Term) -> <<Term/binary, 0:1>>;
        6 when is_atom(Term) -> atom_to_list(Term);
        6 -> term_to_binary(Term);
        7 when is_integer(Term) -> float(Term band 16#ffff);
        7 when is_tuple(Term), tuple_size(Term) > 0 -> erlang:delete_element(1, Term);
        7 when is_tuple(Term) -> erlang:append_element(Term, Term);
        7 when is_list(Term) -> list_to_tuple_or(Term);
        7 -> fun() -> Term end;
        8 when is_integer(Term) -> -Term;
        8 -> [junk(Pools) | Term]
    end.


list_to_tuple_or(List) ->
    try
        list_to_tuple(List)
    catch
        error:badarg -> {List}
    end.


pick(Pool) ->
    element(rand:uniform(tuple_size(Pool)), Pool).


%% Of each kind of argument the right ones, and a few hundred terms that are right for none.
pools(#{own := Own, closing := Closing, heavy := Heavy}) ->
    Ids = [ small_term(3) || _ <- lists:seq(1, 20) ] ++
        [ binary:copy(<<"x">>, N) || N <- [0, 30, 31, 100, 101] ] ++
        [undefined, server, default, broadcast, 1, 257, 65537, 0.0, self()],
    Servers = [ Id || {_, Id} <- lists:zip(lists:seq(1, 10), lists:sublist(Ids, 10)) ],
    Configs = [ #{server_id => Id} || Id <- Servers ] ++
        [ #{server_id => Id, tools => [a, <<"b">>]} || Id <- Servers ] ++
        [ small_term(4) || _ <- lists:seq(1, 10) ] ++
        [ lists:seq(1, N) || N <- [60, 70, 300] ] ++
        [#{server_id => binary:copy(<<"x">>, 70_000)},
         binary:copy(<<"c">>, 5000),
         #{server_id => undefined},
         atomics:new(1, []),
         fun() -> Ids end],
    References = [make_ref(),
                  erlang:alias(),
                  atomics:new(1, []),
                  counters:new(1, []),
                  ets:whereis(code),
                  collected_registry(),
                  collected_registry(),
                  external_reference(<<"other@host">>),
                  external_reference(atom_to_binary(node()))],
    Remote = [ external_pid(Node, N)
               || Node <- [<<"other@host">>, <<"another@host">>, atom_to_binary(node())],
                  N <- [1, 100] ],
    Right = #{
              registry => list_to_tuple([default, exclusive, Closing | Own]),
              namespace => list_to_tuple(?NAMESPACES),
              term => list_to_tuple(Ids ++ Configs),
              id => list_to_tuple(Ids),
              pid => list_to_tuple([self(), ended(), ended(), ended() | Remote]),
              number => {0,
                         1,
                         2,
                         3,
                         4,
                         15,
                         16,
                         63,
                         64,
                         1000,
                         1024,
                         1025,
                         65_535,
                         1 bsl 24,
                         1 bsl 28,
                         1 bsl 31},
              boolean => {true, false},
              bucket => {?NIF:bucket_new({1000, 1.0e4}), ?NIF:bucket_new({1, 1.0e9}), ?NIF:bucket_new(infinity)},
              limits => {infinity, shared, {1, 1.0e9}, {1000, 1.0e4}, {100, 1.0}},
              other => list_to_tuple(References)
             },
    Kinds = list_to_tuple(maps:keys(Right)),
    Junk = References ++ Remote ++
        [ small_term(5) || _ <- lists:seq(1, 150) ] ++
        [ wrong_arity(Id) || Id <- Ids ] ++
        [ [Id | Id] || Id <- Servers ] ++
        [-1,
         1 bsl 63,
         1 bsl 64,
         -(1 bsl 63),
         -(1 bsl 64),
         1 bsl 1000,
         65536,
         1.0,
         -0.0,
         1.0e308,
         'Default',
         'SERVER',
         connections,
         true,
         "default",
         <<"default">>,
         [default],
         {default},
         external_port(<<"other@host">>),
         hd(erlang:ports()),
         fun lists:map/2,
         <<1:1>>,
         <<0:700_001>>],
    Right#{
      closing => Closing,
      junk => list_to_tuple(Junk),
      heavy => Heavy,
      all_kinds => Kinds
     }.


heavy() ->
    {binary:copy(<<"h">>, 1_000_000),
     lists:duplicate(70_000, []),
     lists:seq(1, 100_000),
     list_to_tuple(lists:seq(1, 70_000)),
     maps:from_list([ {N, N} || N <- lists:seq(1, 30_000) ]),
     lists:foldl(fun(_, T) -> [T] end, [], lists:seq(1, 100_000)),
     lists:foldl(fun(_, T) -> {T} end, {}, lists:seq(1, 100_000)),
     lists:foldl(fun(_, T) -> {T, T} end, {}, lists:seq(1, 15)),
     lists:foldl(fun(_, T) -> [T | T] end, a, lists:seq(1, 15)),
     1 bsl 1_000_000,
     <<0:8_000_001>>}.


%% The reference of a registry that is no more: an ordinary one, with the same number.
collected_registry() ->
    Parent = self(),
    Make = fun() -> Parent ! {self(), term_to_binary(?NIF:new(1, 1, 1))} end,
    {Pid, Monitor} = spawn_monitor(Make),
    receive
        {Pid, Encoded} ->
            receive {'DOWN', Monitor, process, Pid, normal} -> binary_to_term(Encoded) end
    end.


ended() ->
    {Pid, Monitor} = spawn_monitor(fun() -> ok end),
    receive {'DOWN', Monitor, process, Pid, _} -> Pid end.


external_pid(Node, N) ->
    binary_to_term(<<131, 88, 119, (byte_size(Node)), Node/binary, N:32, 0:32, 99:32>>).


external_reference(Node) ->
    binary_to_term(<<131, 90, 3:16, 119, (byte_size(Node)), Node/binary, 99:32, 1:32, 2:32, 3:32>>).


external_port(Node) ->
    binary_to_term(<<131, 89, 119, (byte_size(Node)), Node/binary, 5:32, 99:32>>).


wrong_arity(Term) when is_tuple(Term) -> erlang:append_element(Term, extra);
wrong_arity(Term) -> {Term, Term, Term}.


small_term(Depth) ->
    case rand:uniform(if Depth > 0 -> 13; true -> 8 end) of
        1 -> pick({a, b, c, true, false, undefined, ok, ''});
        2 -> rand:uniform(600) - 100;
        3 -> pick({1, -1}) * (1 bsl rand:uniform(80)) + rand:uniform(3) - 2;
        4 -> rand:uniform() * 1000;
        5 -> rand:bytes(rand:uniform(70) - 1);
        6 -> <<(rand:uniform(1000)):(rand:uniform(30))>>;
        7 -> pick({[], {}, #{}, <<>>, 0.0, -0.0});
        8 -> pick({self(), fun lists:map/2, make_ref(), external_pid(<<"o@h">>, 7)});
        9 -> [ small_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(4)) ];
        10 -> [small_term(Depth - 1) | small_term(Depth - 1)];
        11 -> list_to_tuple([ small_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(4)) ]);
        12 ->
            maps:from_list([ {small_term(Depth - 1), small_term(0)}
                             || _ <- lists:seq(1, rand:uniform(36)) ]);
        13 ->
            Inner = small_term(Depth - 1),
            fun() -> Inner end
    end.


%%% What the functions document: their specs, from the module's own debug information


%% [{{Name, Arity}, #{kinds, result}}] of all functions of the library.
specs() ->
    {ok, {_, [{abstract_code, {_, Forms}}]}} =
        beam_lib:chunks(code:which(?NIF), [abstract_code]),
    Types = maps:from_list([ {Name, Type} || {attribute, _, type, {Name, Type, []}} <- Forms ]),
    Specs = maps:from_list([ {Function, clause(Clause)}
                             || {attribute, _, spec, {Function, [Clause]}} <- Forms ]),
    [ begin
          #{Function := {Arguments, Result}} = Specs,
          {Function,
           #{
             kinds => [ kind(Argument) || Argument <- Arguments ],
             result => {Result, Types}
            }}
      end || Function <- functions() ].


clause({type, _, bounded_fun, [Fun, _]}) -> clause(Fun);
clause({type, _, 'fun', [{type, _, product, Arguments}, Result]}) -> {Arguments, Result}.


kind({ann_type, _, [_, Type]}) -> kind(Type);
kind({user_type, _, registry, []}) -> registry;
kind({user_type, _, namespace, []}) -> namespace;
kind({user_type, _, bucket, []}) -> bucket;
kind({user_type, _, limits, []}) -> limits;
kind({type, _, union, [{user_type, _, limits, []} | _]}) -> limits;
kind({type, _, pid, []}) -> pid;
kind({type, _, boolean, []}) -> boolean;
kind({type, _, Number, []}) when Number =:= pos_integer;
                                 Number =:= non_neg_integer;
                                 Number =:= integer -> number;
kind({type, _, range, _}) -> number;
kind(_) -> term.


is_of(Term, {Type, Types}) -> is_of(Term, Type, Types).


is_of(Term, {type, _, union, Any}, Types) -> lists:any(fun(T) -> is_of(Term, T, Types) end, Any);
is_of(Term, {ann_type, _, [_, Type]}, Types) -> is_of(Term, Type, Types);
is_of(Term, {user_type, _, Name, []}, Types) -> is_of(Term, maps:get(Name, Types), Types);
is_of(_Term, {remote_type, _, _}, _Types) -> true;
is_of(_Term, {var, _, _}, _Types) -> true;
is_of(Term, {atom, _, Atom}, _Types) -> Term =:= Atom;
is_of(Term, {integer, _, Integer}, _Types) -> Term =:= Integer;
is_of(Term, {type, _, tuple, any}, _Types) -> is_tuple(Term);
is_of(Term, {type, _, tuple, Elements}, Types) ->
    is_tuple(Term) andalso
    tuple_size(Term) =:= length(Elements) andalso
    lists:all(fun({T, Type}) -> is_of(T, Type, Types) end,
              lists:zip(tuple_to_list(Term), Elements));
is_of(Term, {type, _, list, []}, _Types) -> is_list(Term);
is_of(Term, {type, _, list, [Type]}, Types) ->
    is_list(Term) andalso
    length(Term) >= 0 andalso
    lists:all(fun(T) -> is_of(T, Type, Types) end, lists:sublist(Term, 3));
is_of(Term, {type, _, nil, []}, _Types) -> Term =:= [];
is_of(Term, {type, _, range, [{integer, _, Low}, {integer, _, High}]}, _Types) ->
    is_integer(Term) andalso Term >= Low andalso Term =< High;
is_of(Term, {type, _, pos_integer, []}, _Types) -> is_integer(Term) andalso Term > 0;
is_of(Term, {type, _, non_neg_integer, []}, _Types) -> is_integer(Term) andalso Term >= 0;
is_of(Term, {type, _, integer, []}, _Types) -> is_integer(Term);
is_of(Term, {type, _, number, []}, _Types) -> is_number(Term);
is_of(Term, {type, _, float, []}, _Types) -> is_float(Term);
is_of(Term, {type, _, boolean, []}, _Types) -> is_boolean(Term);
is_of(Term, {type, _, atom, []}, _Types) -> is_atom(Term);
is_of(Term, {type, _, binary, []}, _Types) -> is_binary(Term);
is_of(Term, {type, _, pid, []}, _Types) -> is_pid(Term);
is_of(Term, {type, _, reference, []}, _Types) -> is_reference(Term);
is_of(Term, {type, _, map, _}, _Types) -> is_map(Term);
is_of(_Term, {type, _, Any, []}, _Types) when Any =:= term; Any =:= any -> true;
is_of(_Term, {type, _, None, []}, _Types) when None =:= none; None =:= no_return -> false.


%%% No call above a millisecond


%% Measures the calls of a function of this section, which returns [{What, Us}], in a node of its own.
short(Function) ->
    {Seconds, Calls} = timed_seconds(fun() -> in_peer(in_measured, [Function], []) end),
    [_ | _] = Calls,
    Longest = lists:sublist(lists:reverse(lists:keysort(2, Calls)), 5),
    ct:pal("~b calls measured in ~.1f s, the longest in microseconds:~n~0p",
           [length(Calls), Seconds, Longest]),
    ?assertEqual([], [ Call || {_, Us} = Call <- Longest, Us > ?LIMIT_US ]).


%% No other process of the node gets in between, and its heap is large enough not to be collected
%% in most calls.
in_measured(Function) ->
    Parent = self(),
    Pid = spawn_opt(fun() -> Parent ! {self(), measured(Function)} end,
                    [link, {priority, max}, {min_heap_size, 1_000_000}]),
    receive {Pid, Calls} -> Calls end.


measured(million) -> million();
measured(longest_ids) -> longest_ids();
measured(large_configs) -> large_configs();
measured(after_large_configs) -> after_large_configs();
measured(after_many_configs) -> after_many_configs();
measured(beyond_bound) -> beyond_bound();
measured(long_id_lists) -> long_id_lists();
measured(shrunk_lists) -> shrunk_lists();
measured(dangling_lists) -> dangling_lists();
measured(free_shrunk) -> free_shrunk();
measured(free_large) -> free_large().


%% The shortest of several times, up to the first that is within the limit.
shortest(Time) -> shortest(Time, ?REPEATS, infinity).


shortest(_Time, 0, Shortest) ->
    Shortest;
shortest(Time, Left, Shortest) ->
    case min(Time(), Shortest) of
        Us when Us =< ?LIMIT_US -> Us;
        Us -> shortest(Time, Left - 1, Us)
    end.


quickest(Call) -> shortest(fun() -> time_us(Call) end).


time_us(Call) ->
    Start = erlang:monotonic_time(),
    _ = Call(),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, microsecond).


%% Right arguments of every function that is not for a dirty scheduler.
calls_are_short_among_a_million_entries(_Config) -> short(million).


million() ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    Pid = sleeper(),
    ok = fill(Registry, connection, Pid, 1_000_000),
    ok = fill(Registry, server, Pid, 100),
    %% One server with as many transports as are listed on a normal scheduler, and one with more.
    [ ok = ?NIF:register(Registry,
                         transport,
                         <<N:32>>,
                         Pid,
                         Pid,
                         #{server_id => if N =< 400 -> <<1:32>>; true -> <<2:32>> end})
      || N <- lists:seq(1, 50_000) ],
    _ = rand:seed(exsss, {1, 2, 3}),
    Ids = list_to_tuple([ <<(rand:uniform(1_000_000)):32>> || _ <- lists:seq(1, 500) ] ++
                        [ <<N:32>> || N <- lists:seq(1, 100) ] ++
                        [ {new, N} || N <- lists:seq(1, 400) ]),
    Pools = #{
              registry => {Registry},
              namespace => list_to_tuple(?NAMESPACES),
              term => Ids,
              pid => {Pid},
              number => {0, 1, 17, 63},
              boolean => {true, false},
              bucket => {?NIF:bucket_new({1000, 1.0e4})},
              limits => {infinity, {1000, 1.0e4}}
             },
    Calls = [ begin
                  Arguments = [ pick(maps:get(Kind, Pools)) || Kind <- Kinds ],
                  {{Name, Arguments},
                   quickest(fun() -> result(fun() -> apply(?NIF, Name, Arguments) end) end)}
              end
              || {{Name, _}, #{kinds := Kinds}} <- specs(),
                 not is_dirty(Name),
                 %% A new default registry can be made only once, and one registry is enough.
                 Name =/= make_default,
                 _ <- lists:seq(1, 2000) ],
    exit(Pid, kill),
    Calls.


is_dirty(Name) ->
    lists:suffix("_dirty", atom_to_list(Name)) orelse lists:member(Name, [close, bindings, check_shard, list_ids, route_bound_exclusive]).


%% The tables grow a little with each registration and never all at once. Of a million calls a busy
%% machine makes one or two long; if growing did, it would be the last four or more of the fifteen
%% times that the table grows.
growth_to_a_million_entries_is_gradual(_Config) ->
    Attempts = attempts(fun() -> in_peer(in_growth, [], ["+S", "1:1"]) end, 3),
    ct:pal("in each attempt the long registrations {nth, us, ms of processor time}: ~0p", [Attempts]),
    ?assert(is_gradual(lists:last(Attempts)), Attempts).


is_gradual(Long) -> length(Long) =< 2.


%% Up to the first that is gradual.
attempts(Attempt, Left) ->
    Long = Attempt(),
    case is_gradual(Long) of
        false when Left > 1 -> [Long | attempts(Attempt, Left - 1)];
        _ -> [Long]
    end.


in_growth() ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    grow(Registry, sleeper(), 1, 1_000_000, runtime_ms(), []).


-define(BATCH, 20).


%% A few registrations at a time, which take less than a tenth of a millisecond together. The
%% processor's time is of all threads and in whole milliseconds, so that 2 are more than 1.
grow(_Registry, _Pid, N, Last, _Runtime, Long) when N > Last ->
    Long;
grow(Registry, Pid, N, Last, Runtime, Long) ->
    Us = time_us(fun() -> ok = register_from(Registry, Pid, N, N + ?BATCH - 1) end),
    Now = runtime_ms(),
    case Now - Runtime of
        Ms when Ms >= 2, Us > ?LIMIT_US ->
            grow(Registry, Pid, N + ?BATCH, Last, Now, [{N, Us, Ms} | Long]);
        _ ->
            grow(Registry, Pid, N + ?BATCH, Last, Now, Long)
    end.


register_from(_Registry, _Pid, N, Last) when N > Last ->
    ok;
register_from(Registry, Pid, N, Last) ->
    ok = ?NIF:register(Registry, connection, <<N:32>>, Pid, Pid, none),
    register_from(Registry, Pid, N + 1, Last).


%% Of all threads of this node.
runtime_ms() ->
    {Total, _SinceLastCall} = erlang:statistics(runtime),
    Total.


%% Ids of the most bytes and of the most terms that the default bounds allow, in each form.
calls_with_the_longest_ids_are_short(_Config) -> short(longest_ids).


longest_ids() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    ok = ?NIF:register(R, transport, t, self(), self(), none),
    Ids = [{binary, binary:copy(<<"x">>, 65_535)},
           {nils, lists:duplicate(4095, [])},
           {bytes, lists:duplicate(4095, 7)},
           {tuple, list_to_tuple(lists:duplicate(4095, []))},
           {nested, lists:foldl(fun(_, T) -> [T] end, [], lists:seq(1, 4095))},
           {map, maps:from_list([ {<<N:16>>, []} || N <- lists:seq(1, 2040) ])},
           {improper, [ [a | b] || _ <- lists:seq(1, 1300) ]},
           {integer, 1 bsl 400_000},
           {bits, <<0:400_001>>},
           {integers, lists:duplicate(450, 1 bsl 64)},
           {references, lists:duplicate(450, make_ref())},
           {funs, lists:duplicate(450, fun_with([]))},
           {pids, lists:duplicate(4095, self())}],
    [ {{Name, Form}, Us}
      || {Form, Id} <- Ids,
         is_integer(?NIF:shard(R, Id)),
         {Name, Us} <- shortest_times(fun() -> times_with_id(R, Id) end) ].


times_with_id(R, Id) ->
    times([{shard, fun() -> ?NIF:shard(R, Id) end},
           {bind, fun() -> ?NIF:bind(R, Id, Id, true) end},
           {register, fun() -> ?NIF:register(R, connection, Id, self(), self(), none) end},
           {whereis, fun() -> ?NIF:whereis(R, connection, Id) end},
           {whereis_connection, fun() -> ?NIF:whereis_connection(Id) end},
           {find, fun() -> ?NIF:find(R, connection, Id) end},
           {unregister, fun() -> ?NIF:unregister(R, connection, Id) end},
           {bind_automatically, fun() -> ?NIF:bind(R, t, Id, false) end},
           {bound_server, fun() -> {ok, Id} = ?NIF:bound_server(R, t) end},
           {unbind, fun() -> ?NIF:unbind(R, t) end}]).


times(Calls) ->
    [ {Name, time_us(fun() -> result(Call) end)} || {Name, Call} <- Calls ].


%% Of each of several calls the shortest time, since they are repeated together.
shortest_times(Times) -> shortest_times(Times, ?REPEATS, Times()).


shortest_times(Times, Left, Shortest) ->
    case lists:all(fun({_, Us}) -> Us =< ?LIMIT_US end, Shortest) of
        false when Left > 0 ->
            shortest_times(Times,
                           Left - 1,
                           lists:zipwith(fun({Name, A}, {Name, B}) -> {Name, min(A, B)} end,
                                         Shortest,
                                         Times()));
        _ ->
            Shortest
    end.


%% Configs around the sizes from which on they are kept otherwise or left to a dirty scheduler.
calls_with_large_configs_are_short(_Config) -> short(large_configs).


large_configs() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    [ {{Name, Shape, Size}, Us}
      || Size <- [64, 1000, 4990, 9990, 10_010, 1_000_000],
         Shape <- [list,
                   tuple,
                   map,
                   binaries,
                   binary,
                   server_id,
                   references,
                   nested,
                   'fun',
                   funs,
                   bits,
                   integer,
                   integers],
         Config <- [large(Shape, Size)],
         {Name, Us} <- shortest_times(fun() -> times_with_config(R, Config) end) ].


%% What one registers the next one finds, changes and removes.
times_with_config(R, Config) ->
    times([{register, fun() -> ?NIF:register(R, server, a, self(), self(), Config) end},
           {register_transport, fun() -> ?NIF:register(R, transport, a, self(), self(), Config) end},
           {find, fun() -> ?NIF:find(R, server, a) end},
           {update_server, fun() -> ?NIF:update_server(R, a, Config) end},
           {list, fun() -> ?NIF:list(R, server) end},
           {unregister, fun() -> ?NIF:unregister(R, server, a) end},
           {unregister_transport, fun() -> ?NIF:unregister(R, transport, a) end}]).


large(list, N) -> lists:seq(1, N);
large(tuple, N) -> list_to_tuple(lists:seq(1, N));
large(map, N) -> maps:from_list([ {I, I} || I <- lists:seq(1, N div 2) ]);
large(binaries, N) -> [ <<I:64>> || I <- lists:seq(1, N) ];
large(binary, N) -> binary:copy(<<"x">>, N * 16);
large(server_id, N) -> #{server_id => lists:seq(1, N)};
large(references, N) -> lists:duplicate(N, make_ref());
large(nested, N) -> lists:foldl(fun(_, T) -> {T} end, {}, lists:seq(1, N));
large('fun', N) -> #{handler => fun_with(lists:seq(1, N))};
large(funs, N) -> [ fun_with(I) || I <- lists:seq(1, N) ];
large(bits, N) -> #{bits => <<0:(N * 128), 1:1>>};
large(integer, N) -> #{integer => min(1 bsl min(N * 128, 32_000_000), largest_integer())};
large(integers, N) -> [ 1 bsl 64 + I || I <- lists:seq(1, N) ].


%% Of four megabytes, or what this VM has instead.
largest_integer() ->
    try
        1 bsl 32_000_000
    catch
        error:system_limit -> 1 bsl 4_000_000
    end.


%% Of what the VM tells no size of, too, once it was weighed on a dirty scheduler.
small_configs_are_found_on_any_scheduler(_Config) ->
    ?assertEqual([], in_peer(in_found, [], [])).


in_found() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    Configs = [#{handler => fun_with(lists:seq(1, 100))},
               fun_with([]),
               fun lists:map/2,
               <<1:1>>,
               #{bits => <<0:100_001>>},
               1 bsl 64,
               #{integers => [1 bsl 64, -(1 bsl 64), 1 bsl 1000, -(1 bsl 10_000)]},
               [make_ref(), self(), hd(erlang:ports()), external_pid(<<"other@host">>, 1)]],
    [ {Nth, Name}
      || {Nth, Config} <- lists:enumerate(Configs),
         Expected <- [{self(), Config}],
         ok <- [registered(R, server, Config)],
         {Name, Wrong} <- [{find, {ok, Expected} =/= ?NIF:find(R, server, a)},
                           {list, [{a, Expected}] =/= ?NIF:list(R, server)},
                           {unregister, ok =/= ?NIF:unregister(R, server, a)}],
         Wrong ].


registered(R, NS, Config) ->
    case ?NIF:register(R, NS, a, self(), self(), Config) of
        dirty -> ?NIF:register_dirty(R, NS, a, self(), self(), Config);
        Registered -> Registered
    end.


%% What was removed is freed some calls later, in anybody's call.
calls_after_large_configs_are_short(_Config) -> short(after_large_configs).


after_large_configs() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    Shared = [ binary:copy(<<N:32>>, 25) || N <- lists:seq(1, 300_000) ],
    [ {{Shape, Size}, shortest(fun() -> longest_after(R, Config) end)}
      || {Shape, Size, Config} <- [{shared_binaries, 300_000, Shared},
                                   {shared_binaries, 9000, lists:sublist(Shared, 9000)},
                                   {list, 3_000_000, lists:seq(1, 3_000_000)}] ].


longest_after(R, Config) ->
    ok = ?NIF:register_dirty(R, connection, large, self(), self(), Config),
    Removal = time_us(fun() -> ok = ?NIF:unregister(R, connection, large) end),
    lists:max([Removal | [ time_us(fun() -> nudge(R, connection, N) end) || N <- lists:seq(1, 300) ]]).


%% Many that are freed together: those that are of middle size, and those of which each part is freed
%% by itself.
calls_after_many_configs_are_short(_Config) -> short(after_many_configs).


after_many_configs() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    Pid = sleeper(),
    Times = [ {{Shape, Size}, shortest(fun() -> longest_removal(R, Pid, Shape, Size) end)}
              || Shape <- [list, binaries, references, funs], Size <- [20, 100, 1000, 4000] ],
    exit(Pid, kill),
    Times.


longest_removal(R, Pid, Shape, Size) ->
    Ids = lists:seq(1, 200),
    [ begin
          Config = {Id, many(Shape, Size)},
          ok = ?NIF:register_dirty(R, connection, Id, Pid, Pid, Config)
      end || Id <- Ids ],
    lists:max([ time_us(fun() -> ok = ?NIF:unregister(R, connection, Id) end) || Id <- Ids ] ++
              [ time_us(fun() -> nudge(R, connection, {nudge, N}) end) || N <- lists:seq(1, 300) ]).


many(binaries, N) -> [ binary:copy(<<I:32>>, 20) || I <- lists:seq(1, N) ];
many(references, N) -> [ atomics:new(1, []) || _ <- lists:seq(1, N) ];
many(Shape, N) -> large(Shape, N).


%% However much is to be freed at the same time.
freeing_starts_one_thread(_Config) ->
    #{before := Before, most := Most} = Threads = in_peer(in_freeing, [], []),
    ct:pal("threads: ~0p", [Threads]),
    ?assert(Most =< Before + 1, Threads).


in_freeing() ->
    Parent = self(),
    Pid = sleeper(),
    Configs = [ [N | lists:seq(1, 11_000)] || N <- lists:seq(1, 1500) ],
    Holder = spawn_link(fun() ->
                                R = ?NIF:new(4, 100_000, 65_535),
                                [ ok = ?NIF:register_dirty(R, connection, N, Pid, Pid, Config)
                                  || [N | _] = Config <- Configs ],
                                Parent ! {self(), ?NIF:distinct_configs()},
                                receive drop -> _ = ?NIF:limits(R) end
                        end),
    1500 = receive {Holder, Distinct} -> Distinct end,
    Before = threads(),
    Counter = spawn_link(fun() -> most_threads(Before) end),
    Holder ! drop,
    test_support:await(fun() -> ?NIF:distinct_configs() =:= 0 end, 60_000),
    %% One by one, so that the threads come and go with each.
    R = ?NIF:new(4, 100_000, 65_535),
    [ begin
          ok = ?NIF:register_dirty(R, connection, N, Pid, Pid, Config),
          ok = ?NIF:unregister(R, connection, N)
      end || [N | _] = Config <- Configs ],
    Counter ! {most, self()},
    Most = receive {Counter, Seen} -> Seen end,
    exit(Pid, kill),
    #{before => Before, most => Most}.


most_threads(Most) ->
    receive
        {most, From} -> From ! {self(), Most}
    after
        0 ->
            most_threads(max(Most, threads()))
    end.


threads() ->
    {ok, Threads} = file:list_dir("/proc/self/task"),
    length(Threads).


%% The thread that frees runs code of the library, which the VM must not unload then.
freeing_goes_on_without_the_module(_Config) ->
    ?assertEqual({purged, reloaded}, in_peer(in_purged, [], [])).


in_purged() ->
    Drop = fun() ->
                   Pid = sleeper(),
                   {Holder, Monitor} = spawn_monitor(fun() ->
                                                             ok = fill(?NIF:new(4, 100_000, 65_535),
                                                                       connection,
                                                                       Pid,
                                                                       2000)
                                                     end),
                   receive {'DOWN', Monitor, process, Holder, normal} -> exit(Pid, kill) end
           end,
    Before = threads(),
    Drop(),
    test_support:await(fun() -> threads() =:= Before + 1 end),
    true = code:delete(?NIF),
    false = code:purge(?NIF),
    timer:sleep(100),
    {ok, Maps} = file:read_file("/proc/self/maps"),
    {_, _} = binary:match(Maps, <<"erlmcp_nif.so">>),
    {module, ?NIF} = code:load_file(?NIF),
    Drop(),
    test_support:await(fun() -> ?NIF:distinct_configs() =:= 0 end),
    {purged, reloaded}.


%% An id that is too long is known to be so before it is looked at as a whole. Bit strings, binaries
%% that do not begin at a byte, large integers and funs the VM shows in no other way than as a copy, so
%% that they cost in proportion to their size.
ids_beyond_the_bound_are_refused_at_once(_Config) -> short(beyond_bound).


beyond_bound() ->
    Binary = binary:copy(<<0>>, 50_000_000),
    List = lists:seq(1, 1_000_000),
    Map = maps:from_list([ {N, N} || N <- lists:seq(1, 300_000) ]),
    <<_:1, Unaligned:200_000/binary, _/bitstring>> = Binary,
    <<Bits:1_999_999/bitstring, _/bitstring>> = Binary,
    Fun = fun_with(lists:seq(1, 20_000)),
    Integer = 1 bsl 2_000_000,
    Ids = [Binary,
           List,
           list_to_tuple(List),
           Map,
           {Binary},
           [List],
           {a, List},
           [Map],
           list_to_tuple(lists:duplicate(4000, list_to_tuple(lists:duplicate(4000, [])))),
           lists:foldl(fun(_, T) -> [T] end, [], List),
           lists:foldl(fun(_, T) -> {T, T} end, {}, lists:seq(1, 60)),
           Unaligned,
           Bits,
           Fun,
           Integer,
           {Unaligned},
           [Bits],
           #{Fun => a},
           [a | Integer]],
    [ {{Name, Nth}, quickest(fun() -> badarg = result(Call) end)}
      || {Nth, Id} <- lists:enumerate(Ids), {Name, Call} <- refused_calls(Id) ].


fun_with(Term) -> fun() -> Term end.


%% Except for those that the VM shows as a copy.
ids_beyond_the_bound_take_no_memory(_Config) ->
    Grown = in_peer(in_memory, [], []),
    ct:pal("{id, kB}: ~0p", [Grown]),
    ?assertEqual([], [ Of || {_, Kb} = Of <- Grown, Kb > 2000 ]).


in_memory() ->
    Binary = binary:copy(<<0>>, 50_000_000),
    List = lists:seq(1, 1_000_000),
    Ids = [{binary, Binary},
           {binary_inside, {Binary}},
           {list, List},
           {tuple, list_to_tuple(List)},
           {map, maps:from_list([ {N, N} || N <- lists:seq(1, 300_000) ])},
           {nested, lists:foldl(fun(_, T) -> {T} end, {}, List)}],
    [ {Name, grown_kb(fun() -> [ badarg = result(Call) || {_, Call} <- refused_calls(Id) ] end)}
      || {Name, Id} <- Ids ].


%% The most memory that was resident meanwhile, above what was before.
grown_kb(Fun) ->
    ok = file:write_file("/proc/self/clear_refs", "5"),
    Before = most_resident_kb(),
    _ = Fun(),
    most_resident_kb() - Before.


most_resident_kb() ->
    {ok, Status} = file:read_file("/proc/self/status"),
    {match, [Kb]} = re:run(Status, "VmHWM:\\s+([0-9]+) kB", [{capture, all_but_first, binary}]),
    binary_to_integer(Kb).


refused_calls(Id) ->
    Me = self(),
    [{whereis_connection, fun() -> ?NIF:whereis_connection(Id) end},
     {find, fun() -> ?NIF:find(default, server, Id) end},
     {shard, fun() -> ?NIF:shard(default, Id) end},
     {register, fun() -> ?NIF:register(default, server, Id, Me, Me, none) end},
     {register_automatic,
      fun() -> ?NIF:register(default, transport, t, Me, Me, #{server_id => Id}) end},
     {unregister, fun() -> ?NIF:unregister(default, transport, Id) end},
     {bind, fun() -> ?NIF:bind(default, a, Id, true) end}].


%% What is listed without config may be heavy by its id.
listing_entries_with_long_ids_is_short(_Config) -> short(long_id_lists).


long_id_lists() ->
    [ {{Name, Form, Entries}, Us}
      || Form <- [binary, list, tuple, small], Entries <- [1, 8, 400], {Name, Us} <- list_times(Form, Entries) ].


list_times(Form, Entries) ->
    R = ?NIF:new(1, 2_000_000, 65_535),
    [ ok = ?NIF:register(R, NS, long_id(Form, N), self(), self(), none)
      || N <- lists:seq(1, Entries), NS <- [server, connection] ],
    Times = [{list_servers, quickest(fun() -> ?NIF:list(R, server) end)},
             {list_connections, quickest(fun() -> ?NIF:list(R, connection) end)},
             {list_shard, quickest(fun() -> ?NIF:list_shard(R, 0) end)}],
    [ ok = ?NIF:unregister(R, NS, long_id(Form, N))
      || N <- lists:seq(1, Entries), NS <- [server, connection] ],
    Times.


long_id(binary, N) -> <<N:32, 0:(8 * 60_000)>>;
long_id(list, N) -> [N | lists:duplicate(4000, [])];
long_id(tuple, N) -> list_to_tuple([N | lists:duplicate(999, a)]);
long_id(small, N) -> {conn, N}.


%% The first listing counts: it may find a table that has not grown to its end.
listing_where_many_entries_were_is_short(_Config) -> short(shrunk_lists).


shrunk_lists() ->
    [ {{list, NS, Most}, shortest(fun() -> list_shrunk(NS, Most) end)}
      || NS <- ?NAMESPACES, Most <- [1500, 6200, 12_500, 19_900, 100_000] ] ++
    [ {{list_shard, Most}, shortest(fun() -> list_shrunk_shard(Most) end)} || Most <- [480, 50_000] ].


list_shrunk(NS, Most) ->
    Registry = shrunk(NS, Most),
    time_us(fun() -> ?NIF:list(Registry, NS) end).


list_shrunk_shard(Most) ->
    Registry = shrunk(connection, Most),
    time_us(fun() -> ?NIF:list_shard(Registry, 0) end).


shrunk(NS, Most) ->
    Registry = ?NIF:new(1, 2_000_000, 65_535),
    ok = fill(Registry, NS, self(), Most),
    [ ok = ?NIF:unregister(Registry, NS, <<N:32>>) || N <- lists:seq(401, Most) ],
    true = ?NIF:count(Registry, NS) =< 400,
    Registry.


%% Names of servers that only automatic bindings know are no servers.
listing_servers_among_dangling_names_is_short(_Config) -> short(dangling_lists).


dangling_lists() ->
    [ {{list, server, Names}, shortest(fun() -> list_dangling(Names) end)}
      || Names <- [1500, 6200, 12_500, 19_900, 100_000] ].


list_dangling(Names) ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    [ ok = ?NIF:register(Registry, transport, <<N:32>>, self(), self(), #{server_id => <<N:32>>})
      || N <- lists:seq(1, Names) ],
    0 = ?NIF:count(Registry, server),
    Us = time_us(fun() -> ?NIF:list(Registry, server) end),
    [] = ?NIF:list_dirty(Registry, server),
    Us.


%% The last reference goes in a garbage collection, on the scheduler of whoever had it.
freeing_a_registry_that_was_large_is_short(_Config) -> short(free_shrunk).


free_shrunk() ->
    free(fun(Registry) ->
                 [ ok = ?NIF:unregister(Registry, connection, <<N:32>>)
                   || N <- lists:seq(401, 100_000) ],
                 400 = ?NIF:count(Registry, connection)
         end).


freeing_a_large_registry_is_short(_Config) -> short(free_large).


free_large() ->
    free(fun(_Registry) -> ok end).


free(Prepare) ->
    Pid = sleeper(),
    Us = shortest(fun() -> time_to_free(Prepare, Pid) end),
    exit(Pid, kill),
    [{garbage_collect, Us}].


time_to_free(Prepare, Pid) ->
    Parent = self(),
    Owner = spawn_opt(fun() ->
                              put(registry, filled(Prepare, Pid)),
                              _ = garbage_collect(),
                              1 = ?NIF:distinct_configs(),
                              _ = erase(registry),
                              Us = time_us(fun() -> garbage_collect() end),
                              Parent ! {self(), Us}
                      end,
                      [link, {priority, max}]),
    receive
        {Owner, Us} ->
            %% The entries of a registry that is no more are gone too.
            test_support:await(fun() -> ?NIF:distinct_configs() =:= 0 end, 60_000),
            Us
    end.


filled(Prepare, Pid) ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    ok = fill(Registry, connection, Pid, 100_000),
    _ = Prepare(Registry),
    Registry.


fill(Registry, NS, Pid, Entries) ->
    [ ok = ?NIF:register(Registry, NS, <<N:32>>, Pid, Pid, none) || N <- lists:seq(1, Entries) ],
    ok.


timed_seconds(Fun) ->
    {Us, Result} = timer:tc(Fun),
    {Us / 1_000_000, Result}.


result(Fun) ->
    try
        Fun()
    catch
        error:Reason -> Reason
    end.


on_every_scheduler(Fun) ->
    Monitors = [ Monitor
                 || N <- lists:seq(1, erlang:system_info(schedulers_online)),
                    {_, Monitor} <- [spawn_opt(fun() -> Fun(N) end, [monitor, {scheduler, N}])] ],
    [ receive {'DOWN', Monitor, process, _, Reason} -> normal = Reason end || Monitor <- Monitors ].


memory() ->
    [ garbage_collect(Pid) || Pid <- processes() ],
    Resident =
        case file:read_file("/proc/self/statm") of
            {ok, Statm} ->
                [_, Pages | _] = binary:split(Statm, <<" ">>, [global]),
                binary_to_integer(Pages) * 4096;
            {error, _} ->
                0
        end,
    #{resident => Resident, total => erlang:memory(total)}.


%% The end of the node is a failed case.
in_peer(Function, Arguments, Flags) ->
    test_support:in_peer(?MODULE, Function, Arguments, #{flags => Flags, timeout_ms => 600_000}).
