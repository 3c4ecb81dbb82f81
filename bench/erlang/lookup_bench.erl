%%% Look-ups from one process: native, ETS, and the registry as one gen_server.
%%%
%%% Every case is a separate loop over the same list of ids with the call spelled out in it, so that no case
%%% pays for calling a fun. The time of an empty loop is subtracted. Each connection has its own process. The
%%% list is in an order other than that of the registrations, its ids are copies, and it is repeated until a
%%% round has `lookups' look-ups.
%%%
%%% ETS is one table `[set, public, {read_concurrency, true}]' of `{Id, Pid, Config}', as a registry in ETS
%%% would have; beside it a table of `{Id, Pid}', whose rows lie closer together.
-module(lookup_bench).

-export([run/1]).
-export([time/4]).

-export_type([lookup/0]).

-type lookup() :: nothing |
                  whereis_connection |
                  whereis_own |
                  lookup_connection |
                  find_server |
                  classic_find_server |
                  lookup_element |
                  lookup_element_of_pair |
                  ets_lookup |
                  erlang_whereis |
                  map_get.

%% A look-up through the gen_server takes some microseconds, so a round has fewer of them.
-define(SLOWER, 10).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, lookups := Lookups, progress := Progress}) ->
    {_, Connections} = Population =
        bench_population:start(Count, fun() -> receive stop -> ok end end),
    Config = bench_population:small_config(),
    Own = erlmcp_shard_registry:new(),
    %% One structure after the other, so that each lies together in memory as if it were the only one.
    Fill = fun(Register) -> lists:foreach(fun({Id, Pid}) -> ok = Register(Id, Pid, Config) end, Connections) end,
    ok = Fill(fun erlmcp_shard_registry:register_connection/3),
    ok = Fill(fun(Id, Pid, _) -> erlmcp_shard_registry:register_connection(Own, Id, Pid, Config) end),
    ok = Fill(fun erlmcp_registry:register_server/3),
    ok = Fill(fun bench_baseline:register_server/3),
    Rows = bench_population:ets_table([ {Id, Pid, Config} || {Id, Pid} <- Connections ]),
    Pairs = bench_population:ets_table(Connections),
    ok = lists:foreach(fun({Id, Pid}) -> true = register(name(Id), Pid) end, Connections),
    Ids = [ Id || {Id, Pid, _} <- bench_population:visited(Connections),
                  %% Each is found.
                  Pid =:= erlmcp_shard_registry:whereis_connection(Id) ],
    Count = length(Ids),
    Names = [ name(Id) || Id <- Ids ],
    Map = maps:from_list(Connections),
    Passes = max(1, Lookups div Count),
    Few = lists:sublist(Ids, max(1, Passes * Count div ?SLOWER)),
    Cases = [{whereis_connection, none, Ids},
             {whereis_own, Own, Ids},
             {lookup_connection, none, Ids},
             {find_server, none, Ids},
             {lookup_element, Rows, Ids},
             {lookup_element_of_pair, Pairs, Ids},
             {ets_lookup, Rows, Ids},
             {erlang_whereis, none, Names},
             {map_get, Map, Ids}],
    Figures = bench_rounds:interleave(
                Rounds,
                [ {Lookup, fun() -> time(Lookup, Context, List, Passes) end}
                  || {Lookup, Context, List} <- Cases ] ++
                [{classic_find_server, fun() -> time(classic_find_server, none, Few, 1) end}],
                Progress),
    true = ets:delete(Rows),
    true = ets:delete(Pairs),
    ok = bench_population:stop(Population),
    rows(Figures).


-spec name(binary()) -> atom().
name(Id) ->
    binary_to_atom(binary:encode_hex(Id)).


-spec rows(#{lookup() => bench_rounds:figures()}) -> [bench_report:row()].
rows(Figures) ->
    Compare =
        fun(Lookup, Name, Other, OtherName) ->
                bench_report:time_row("lookup",
                                      Name,
                                      map_get(Lookup, Figures),
                                      OtherName,
                                      map_get(Other, Figures))
        end,
    [bench_report:floor(ratio,
                        0.4,
                        Compare(whereis_connection,
                                "whereis_connection/1",
                                lookup_element,
                                "ets:lookup_element/3")),
     Compare(whereis_connection,
             "whereis_connection/1",
             lookup_element_of_pair,
             "the same, rows without a config"),
     Compare(whereis_own,
             "whereis_connection/2, another registry",
             lookup_element,
             "ets:lookup_element/3"),
     Compare(lookup_connection,
             "lookup_connection/1, small config",
             ets_lookup,
             "ets:lookup/2, the same config"),
     Compare(whereis_connection,
             "whereis_connection/1",
             erlang_whereis,
             "whereis/1, atoms for ids"),
     Compare(whereis_connection,
             "whereis_connection/1",
             map_get,
             "a map in hand, never changed"),
     Compare(find_server,
             "find_server/1",
             classic_find_server,
             "classic find_server/1")].


%% Nanoseconds per look-up, without the time of the loop.
-spec time(lookup(), Context :: term(), [term()], pos_integer()) -> float().
time(Lookup, Context, Ids, Passes) ->
    Lookups = length(Ids) * Passes,
    Loop = elapsed(nothing, Context, Ids, Passes),
    Whole = elapsed(Lookup, Context, Ids, Passes),
    max(0.1, (Whole - Loop) / Lookups).


-spec elapsed(lookup(), term(), [term()], pos_integer()) -> integer().
elapsed(Lookup, Context, Ids, Passes) ->
    Start = erlang:monotonic_time(),
    ok = passes(Lookup, Context, Ids, Passes),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond).


-spec passes(lookup(), term(), [term()], non_neg_integer()) -> ok.
passes(_Lookup, _Context, _Ids, 0) ->
    ok;
passes(Lookup, Context, Ids, Left) ->
    ok = case Lookup of
             nothing -> nothing(Ids, Context);
             whereis_connection -> whereis_connection(Ids, Context);
             whereis_own -> whereis_own(Ids, Context);
             lookup_connection -> lookup_connection(Ids, Context);
             find_server -> find_server(Ids, Context);
             classic_find_server -> classic_find_server(Ids, Context);
             lookup_element -> lookup_element(Ids, Context);
             lookup_element_of_pair -> lookup_element(Ids, Context);
             ets_lookup -> ets_lookup(Ids, Context);
             erlang_whereis -> erlang_whereis(Ids, Context);
             map_get -> map_get_loop(Ids, Context)
         end,
    passes(Lookup, Context, Ids, Left - 1).


%%% One loop per case


-spec nothing([term()], term()) -> ok.
nothing([_Id | Ids], Context) -> nothing(Ids, Context);
nothing([], _Context) -> ok.


-spec whereis_connection([term()], term()) -> ok.
whereis_connection([Id | Ids], Context) ->
    _ = erlmcp_shard_registry:whereis_connection(Id),
    whereis_connection(Ids, Context);
whereis_connection([], _Context) ->
    ok.


-spec whereis_own([term()], erlmcp_shard_registry:registry()) -> ok.
whereis_own([Id | Ids], Registry) ->
    _ = erlmcp_shard_registry:whereis_connection(Registry, Id),
    whereis_own(Ids, Registry);
whereis_own([], _Registry) ->
    ok.


-spec lookup_connection([term()], term()) -> ok.
lookup_connection([Id | Ids], Context) ->
    _ = erlmcp_shard_registry:lookup_connection(Id),
    lookup_connection(Ids, Context);
lookup_connection([], _Context) ->
    ok.


-spec find_server([term()], term()) -> ok.
find_server([Id | Ids], Context) ->
    _ = erlmcp_registry:find_server(Id),
    find_server(Ids, Context);
find_server([], _Context) ->
    ok.


-spec classic_find_server([term()], term()) -> ok.
classic_find_server([Id | Ids], Context) ->
    _ = bench_baseline:find_server(Id),
    classic_find_server(Ids, Context);
classic_find_server([], _Context) ->
    ok.


-spec lookup_element([term()], ets:table()) -> ok.
lookup_element([Id | Ids], Table) ->
    _ = ets:lookup_element(Table, Id, 2),
    lookup_element(Ids, Table);
lookup_element([], _Table) ->
    ok.


-spec ets_lookup([term()], ets:table()) -> ok.
ets_lookup([Id | Ids], Table) ->
    _ = ets:lookup(Table, Id),
    ets_lookup(Ids, Table);
ets_lookup([], _Table) ->
    ok.


-spec erlang_whereis([atom()], term()) -> ok.
erlang_whereis([Name | Names], Context) ->
    _ = whereis(Name),
    erlang_whereis(Names, Context);
erlang_whereis([], _Context) ->
    ok.


-spec map_get_loop([term()], map()) -> ok.
map_get_loop([Id | Ids], Map) ->
    #{Id := _} = Map,
    map_get_loop(Ids, Map);
map_get_loop([], _Map) ->
    ok.
