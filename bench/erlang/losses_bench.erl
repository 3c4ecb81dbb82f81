%%% Work at which the native registry loses or may lose, chosen on purpose.
%%%
%%% All cases run in one process. The time of the same loop without a call, including the choice of the case, is
%%% subtracted. The README explains each loss.
%%%
%%% Lists of 3 servers come from registries that never had more, by raw calls, and from the named one after it
%%% had as many servers as there are connections.
-module(losses_bench).

-export([run/1]).

-type work() :: nothing |
                native_large |
                ets_large |
                term_large |
                native_tuple |
                ets_tuple |
                native_list |
                classic_list |
                fresh_list |
                ets_list |
                native_atom |
                erlang_atom |
                native_insert |
                ets_insert.

-define(TERM, {?MODULE, large}).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Connections, rounds := Rounds, progress := Progress}) ->
    Holder = spawn(fun() -> receive stop -> ok end end),
    Large = bench_population:large_config(),
    Table = ets:new(?MODULE, [set, public, {read_concurrency, true}]),
    Few = ets:new(?MODULE, [set, public, {read_concurrency, true}]),
    Tuples = [ {mcp, bench_population:id(N), N} || N <- lists:seq(1, 1000) ],
    ok = erlmcp_shard_registry:register_connection(large, Holder, Large),
    true = ets:insert(Table, {large, Holder, Large}),
    ok = persistent_term:put(?TERM, {Holder, Large}),
    ok = erlmcp_shard_registry:register_connection(?MODULE, Holder, none),
    true = register(?MODULE, Holder),
    lists:foreach(fun(Id) ->
                          ok = erlmcp_shard_registry:register_connection(Id, Holder, none),
                          true = ets:insert(Table, {Id, Holder})
                  end,
                  Tuples),
    ok = fill_and_empty(Connections, Holder),
    {ok, Native} = gen_server:start_link(erlmcp_registry, [], []),
    lists:foreach(fun(Id) ->
                          Config = bench_population:small_config(),
                          ok = erlmcp_registry:register_server(Id, Holder, Config),
                          ok = bench_baseline:register_server(Id, Holder, Config),
                          ok = gen_server:call(Native, {register_server, Id, Holder, Config}),
                          true = ets:insert(Few, {Id, Holder, Config})
                  end,
                  [weather, calendar, files]),
    3 = length(erlmcp_registry:list_servers()),
    3 = length(bench_baseline:list_servers()),
    Context = {Table, Few, Holder, Native},
    Figures = bench_rounds:interleave(
                Rounds,
                [ {Case, fun() -> time(Case, calls(Case), Tuples, Context) end}
                  || Case <- cases() ],
                Progress),
    ok = gen_server:stop(Native),
    Holder ! stop,
    ok = await_end(Holder),
    _ = persistent_term:erase(?TERM),
    true = ets:delete(Few),
    true = ets:delete(Table),
    rows(Figures).


-spec cases() -> [work()].
cases() ->
    lists:usort(lists:append([ [Case, Other] || {Case, _, Other, _} <- comparisons() ])).


-spec rows(#{work() => bench_rounds:figures()}) -> [bench_report:row()].
rows(Figures) ->
    [ bench_report:time_row("losses",
                            Name,
                            map_get(Case, Figures),
                            OtherName,
                            map_get(Other, Figures))
      || {Case, Name, Other, OtherName} <- comparisons() ].


-spec comparisons() -> [{work(), string(), work(), string()}].
comparisons() ->
    [{native_large, "lookup_connection/1, 50 KB config", ets_large, "ets:lookup/2, the same"},
     {native_large, "lookup_connection/1, 50 KB config", term_large, "persistent_term:get/1"},
     {native_tuple, "whereis_connection/1, tuple id", ets_tuple, "ets:lookup_element/3, tuple id"},
     {native_list, "list_servers/0 of 3 after many", classic_list, "classic, the same"},
     {fresh_list, "list_servers of 3, fresh, raw call", classic_list, "classic, the same"},
     {fresh_list, "list_servers of 3, fresh, raw call", ets_list, "ets:tab2list/1 of 3"},
     {native_atom, "whereis_connection/1, one atom", erlang_atom, "whereis/1, one atom"},
     {native_insert, "register + unregister a connection", ets_insert, "ets insert + delete"}].


%% The table of servers does not shrink.
-spec fill_and_empty(pos_integer(), pid()) -> ok.
fill_and_empty(Connections, Holder) ->
    Ids = bench_population:ids(Connections),
    lists:foreach(fun(Id) -> ok = erlmcp_registry:register_server(Id, Holder, none) end, Ids),
    lists:foreach(fun(Id) -> ok = erlmcp_registry:unregister_server(Id) end, Ids).


-spec await_end(pid()) -> ok.
await_end(Pid) ->
    Monitor = monitor(process, Pid),
    receive {'DOWN', Monitor, process, Pid, _} -> ok end.


%% Calls per round, so that a case takes a few milliseconds.
-spec calls(work()) -> pos_integer().
calls(Case) when Case =:= native_large; Case =:= ets_large -> 300;
calls(native_list) -> 300;
calls(Case) when Case =:= classic_list;
                 Case =:= fresh_list;
                 Case =:= ets_list -> 3000;
calls(Case) when Case =:= native_insert; Case =:= ets_insert -> 5000;
calls(_) -> 100_000.


%% Nanoseconds per call, without the time of the loop.
-spec time(work(), pos_integer(), [term()], term()) -> float().
time(Case, Calls, Ids, Context) ->
    max(0.1, (elapsed(Case, Calls, Ids, Context) - elapsed(nothing, Calls, Ids, Context)) / Calls).


-spec elapsed(work(), pos_integer(), [term()], term()) -> integer().
elapsed(Case, Calls, Ids, Context) ->
    Start = erlang:monotonic_time(),
    ok = loop(Case, Calls, Ids, Ids, Context),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond).


-spec loop(work(), non_neg_integer(), [term()], [term()], term()) -> ok.
loop(_Case, 0, _Ids, _All, _Context) ->
    ok;
loop(Case, Left, [], All, Context) ->
    loop(Case, Left, All, All, Context);
loop(Case, Left, [Id | Ids], All, {Table, Few, Holder, Native} = Context) ->
    _ = case Case of
            nothing -> Id;
            native_large -> erlmcp_shard_registry:lookup_connection(large);
            ets_large -> ets:lookup(Table, large);
            term_large -> persistent_term:get(?TERM);
            native_tuple -> erlmcp_shard_registry:whereis_connection(Id);
            ets_tuple -> ets:lookup_element(Table, Id, 2);
            native_list -> erlmcp_registry:list_servers();
            classic_list -> bench_baseline:list_servers();
            fresh_list -> gen_server:call(Native, list_servers);
            ets_list -> ets:tab2list(Few);
            native_atom -> erlmcp_shard_registry:whereis_connection(?MODULE);
            erlang_atom -> whereis(?MODULE);
            native_insert ->
                ok = erlmcp_shard_registry:register_connection(bench, Holder, none),
                erlmcp_shard_registry:unregister_connection(bench);
            ets_insert ->
                true = ets:insert(Table, {bench, Holder}),
                ets:delete(Table, bench)
        end,
    loop(Case, Left - 1, Ids, All, Context).
