%%% Every function of the native library, with arguments that no caller should pass.
%%%
%%% The contract: whatever the arguments, a function returns what its -spec in erlmcp_nif says, or raises badarg and
%%% nothing else. The node survives. When everything is unregistered nothing is left: no entry, no config, no memory.
%%%
%%% The suite takes the functions from the loaded library and the kinds of their arguments from their specs (nif_specs),
%%% so a new function is tested without a change here. All runs in peer nodes: the exit of such a node fails a case and
%%% does not stop the run.
%%%
%%% FUZZ_CALLS: calls of each function (100,000). FUZZ_SEED: repeats a run, up to the interleaving of its two processes.
-module(nif_fuzz_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([every_function_survives_any_arguments/1]).

%% Called in peer nodes
-export([in_fuzz/3]).

-import(nif_calls, [nudge/3, pick/1, sleeper/0, timed_seconds/1]).
-import(nif_specs, [functions/0, is_of/2, specs/0]).
-import(test_support, [on_every_scheduler/1]).
-import(test_terms, [external_pid/2, external_port/1, external_reference/1]).

-define(NIF,        erlmcp_nif).
-define(NAMESPACES, [server, transport, connection]).


suite() ->
    [{timetrap, {minutes, most_minutes(calls()) + 1}}].


all() ->
    [every_function_survives_any_arguments].


%% Calls of each function.
calls() ->
    test_support:positive_integer("FUZZ_CALLS", 100_000).


%% A hundred thousand calls of each function take five minutes, on a busy machine four times as long.
most_minutes(Calls) ->
    10 + Calls div 4_000.


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% Any arguments


every_function_survives_any_arguments(Config) ->
    Seed = test_support:seed("FUZZ_SEED"),
    Calls = calls(),
    ct:pal("FUZZ_CALLS=~b", [Calls]),
    Options = #{timeout_ms => most_minutes(Calls) * 60_000},
    Trim = malloc_trim:build(proplists:get_value(priv_dir, Config)),
    {Seconds, Report} = timed_seconds(fun() -> test_support:in_peer(?MODULE, in_fuzz, [Seed, Calls, Trim], Options) end),
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
    %% Each function was called as often as required, and neither always raised nor always returned.
    ?assertEqual(functions(), lists:sort(maps:keys(Results))),
    ?assertEqual([],
                 [ Of || {_, {Returned, Badarg}} = Of <- maps:to_list(Results),
                         Returned + Badarg < Calls ]),
    ?assertEqual([],
                 [ Of || {{Name, Arity}, {Returned, Badarg}} = Of <- maps:to_list(Results),
                         Returned =:= 0 orelse (takes_not_all(Name, Arity) andalso Badarg =:= 0) ]),
    %% Everything works with the original settings.
    ?assertEqual(Settings, Restored),
    ?assertEqual(ok, Routed),
    %% The last element is the number of configs, which may include a few of the last removals. Some hundreds were made
    %% in all.
    {Entries, Bindings, Configs} = Left,
    ?assertEqual([], Entries),
    ?assertEqual([], Bindings),
    ?assert(Configs =< 200, Configs),
    #{resident := Resident, total := Total} = Grown,
    ?assert(Resident < 100_000_000, Resident),
    ?assert(Total < 50_000_000, Total).


%% Predicates accept any term, and any term may be the name of a breaker.
takes_not_all(Name, Arity) ->
    Arity > 0 andalso
    not lists:member(Name,
                     [is_bucket,
                      are_limits,
                      named_breaker_state,
                      named_breaker_stats,
                      named_breaker_remove,
                      named_breaker_owner]).


in_fuzz(Seed, Calls, Trim) ->
    ok = malloc_trim:load(Trim),
    created = ?NIF:make_default(64, 2_000_000, 65_535),
    Settings = settings(),
    Own = [?NIF:new(16, 100_000, 65_535), ?NIF:new(1, 20, 100), ?NIF:new(1024, 1 bsl 28, 1 bsl 24)],
    Closing = ?NIF:new(4, 1000, 1000),
    Plan = #{seed => Seed, own => Own, closing => Closing, specs => specs(), heavy => heavy()},
    %% One-time allocations happen before memory is measured.
    {_, []} = fuzz_in_two(Plan, max(1, Calls div 20)),
    ok = clear([default, Closing | Own]),
    Before = memory(),
    {Results, Unexpected} = fuzz_in_two(Plan#{seed := Seed + 1}, Calls),
    _ = [ ok = ?NIF:named_breaker_remove(Name) || Name <- ?NIF:named_breakers() ],
    _ = [ true = ?NIF:target_breaker_remove(NS, Id) || {NS, Id, _State} <- ?NIF:target_breakers() ],
    ok = clear([default, Closing | Own]),
    ok = restore(Settings),
    Restored = settings(),
    Routed = route_a_few(),
    Entries = [ {Registry, NS, Count}
                || Registry <- [default, Closing | Own],
                   NS <- ?NAMESPACES,
                   Count <- [?NIF:count(Registry, NS),
                             length(?NIF:list(Registry, NS)),
                             counted_by_shard(Registry, NS)],
                   Count =/= 0 ],
    Memberships = [ {Registry, member, Count}
                    || Registry <- [default, Closing | Own],
                       Count <- [?NIF:count(Registry, member)],
                       Count =/= 0 ],
    Bindings = [ Binding || Registry <- [default, Closing | Own],
                            Binding <- ?NIF:bindings(Registry) ],
    Configs = ?NIF:distinct_configs(),
    After = memory(),
    Grown = maps:map(fun(Key, Bytes) -> Bytes - maps:get(Key, Before) end, After),
    #{
      results => Results,
      unexpected => lists:sublist(Unexpected, 5),
      left => {Entries ++ Memberships, Bindings, Configs},
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
      thresholds => [ ?NIF:admission_threshold(Shard) || Shard <- lists:seq(0, 63) ],
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


%% A full bucket lets a thousand messages through, and some more.
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


%% Unregisters everything, and then enough more for the removed memory to be freed: this happens some removals later, on
%% the same thread.
clear(Registries) ->
    ok = ?NIF:divert([]),
    [ begin
          ok = ?NIF:open(Registry),
          _ = ?NIF:announcements_attach(Registry),
          ok = ?NIF:announcements_detach(Registry),
          [ ?NIF:unregister(Registry, NS, Id)
            || NS <- ?NAMESPACES, {Id, _} <- ?NIF:list(Registry, NS) ],
          on_every_scheduler(fun(Scheduler) ->
                                     [ nudge(Registry, NS, <<Scheduler, N:16>>)
                                       || _ <- [1, 2], NS <- ?NAMESPACES, N <- lists:seq(1, 300) ],
                                     [ nudge_dirty(Registry, Scheduler) || _ <- [1, 2, 3, 4] ]
                             end)
      end || Registry <- Registries ],
    [ garbage_collect(Pid) || Pid <- processes() ],
    ok.


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


%% Each round has its own terms, which are the same for both workers.
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
         {Id, _} <- ?NIF:list(Registry, NS) ],
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


%% The killed process may be registered anywhere, and its registration may be in progress.
replace_one(Pids) ->
    N = rand:uniform(tuple_size(Pids)),
    exit(element(N, Pids), kill),
    setelement(N, Pids, sleeper()).


%%% Arguments


%% Mostly what the spec requires, else something near it or something else.
argument(Function, Kind, Pools, Pids) ->
    case rand:uniform(16) of
        N when N =< 11 -> right(Function, Kind, Pools, Pids);
        N when N =< 13 -> right(Function, pick(maps:get(all_kinds, Pools)), Pools, Pids);
        14 -> junk(Pools);
        15 -> junk(Pools);
        16 -> mutated(right(Function, Kind, Pools, Pids), Pools)
    end.


%% Closing the other registries would leave too little to do for the rest.
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
right(_, named_breaker_config, _Pools, _Pids) ->
    pick({{1, 1, 1, 1, 0.0, 1}, {5, 2, 60_000, 10, 0.5, 2}, {1 bsl 31, 3, 10, 1_000_000, 1.0, 1000}});
%% The specs of these functions say too little.
right({Name, _}, term, #{id := Ids}, _Pids) when Name =:= named_breaker_register;
                                                 Name =:= named_breaker_remove;
                                                 Name =:= named_breaker_owner;
                                                 Name =:= named_breaker_enter;
                                                 Name =:= named_breaker_leave;
                                                 Name =:= named_breaker_state;
                                                 Name =:= named_breaker_stats;
                                                 Name =:= named_breaker_force ->
    case rand:uniform(20) of
        1 -> pick(Ids);
        _ -> pick({open, closed, half_open, reset, success, failure, infinity, 5000, <<"b">>, {c, 1}})
    end;
right(_, breaker_change, _Pools, _Pids) ->
    pick({success, failure, open, closed});
right({breaker_set, _}, term, _Pools, _Pids) ->
    pick({open, closed});
right({sample_begin, _}, term, _Pools, _Pids) ->
    pick({asked, all});
right({admission_set_threshold, _}, term, _Pools, _Pids) ->
    pick({auto, infinity, 1, 10_000, 1 bsl 40});
right(_, breaker_config, _Pools, _Pids) ->
    pick({off, {50, 10_000, 10, 30_000, 10}, {1, 1, 1, 0, 1}, {65_536, 1 bsl 40, 1023, 0, 1023}});
right({announcements_read, _}, term, _Pools, _Pids) ->
    pick({infinity, 0, 10, 1 bsl 40});
right(_, interest, #{id := Ids, number := Numbers}, _Pids) ->
    case rand:uniform(3) of
        1 -> all;
        2 -> {shard, pick(Numbers)};
        3 -> {id, pick(Ids)}
    end;
right({take_together, _}, term, #{id := Ids, limiter := Limiters, bucket := Buckets}, _Pids) ->
    [ case rand:uniform(2) of
          1 -> {pick(Limiters), pick(Ids), rand:uniform(5) - 1};
          2 -> {pick(Buckets), rand:uniform(5) - 1}
      end || _ <- lists:seq(1, rand:uniform(17) - 1) ];
right({Name, _}, term, _Pools, Pids) when Name =:= watched_connections; Name =:= watched_groups ->
    case process_info(pick(Pids), monitored_by) of
        {monitored_by, Watches} -> [ Watch || Watch <- Watches, is_reference(Watch) ];
        undefined -> []
    end;
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


%% The right arguments of each kind, and a few hundred terms that are right for no kind.
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
              pick => {round_robin, random, [hd(Ids)], [lists:last(Ids)]},
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
              limiter => {?NIF:limiter_new({1000, 1.0e4}, 100), ?NIF:limiter_new({1, 1.0e9}, 3), ?NIF:limiter_new(infinity, 1)},
              message_store => {?NIF:message_store_new(10, 10_000), ?NIF:message_store_new(100, 1 bsl 24), ?NIF:message_store_new(1, 16)},
              delivery => {mailbox, {batch, 2}, {batch, 256}, {store, 3, 1000}, {store, 100, 1 bsl 24}},
              stored_message => {stored_message(lists:seq(1, 20_000)), stored_message([ make_ref() || _ <- lists:seq(1, 20_000) ])},
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


%% A message that a drain leaves undecoded.
stored_message(Message) ->
    Store = ?NIF:message_store_new(1, 1 bsl 30),
    ok = ?NIF:message_store_push(Store, Message),
    {Stored, []} = ?NIF:message_store_drain(Store, 1),
    Stored.


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


%% The reference of a collected registry: an ordinary reference with the same number.
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


%%% Memory


memory() ->
    [ garbage_collect(Pid) || Pid <- processes() ],
    ok = malloc_trim:trim(),
    #{resident => test_support:resident_bytes(), total => erlang:memory(total)}.
