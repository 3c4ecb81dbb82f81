%%% The memory of an entry, and the cost of a look-up among many entries: 1,000,000 by default.
%%%
%%% *Memory* is the growth of the resident memory of a separate VM, divided by the number of entries, less the
%%% 24 bytes of an id. It includes the map, the entry, its lease, the monitor, and what the allocators waste.
%%% Ids are made at their registration and not kept. The thousand processes that they are registered for, and
%%% the one config that they share, exist before. ETS has `{Id, Pid, Config}', without monitors.
%%%
%%% *Shared configs*: 15,000 entries with equal configs of 50 KB, each decoded separately from the external
%%% format, against as many with an atom.
%%%
%%% *Look-ups among many*: two VMs, one with 1,000 entries and one with all of them, both in the default
%%% registry, with interleaved rounds. All ids are looked up in shuffled order, so that each entry is as cold as
%%% the caches leave it. In the same order messages are routed to all of them, one by one and in batches, in the
%%% default configuration and without the sending.
-module(capacity_bench).

-export([run/1]).
%% In the peer
-export([fill/1, fill_ets/1, share_configs/1, host/1, measure/3]).

-type work() :: lookup_bench:lookup() | route | route_batch.

-define(FEW,      1000).
-define(ID_BYTES, 24).
-define(OWNERS,   1000).
-define(HOST,     capacity_bench_host).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{
      entries := Entries,
      connections := Connections,
      rounds := Rounds,
      lookups := Lookups,
      progress := Progress
     }) ->
    Large = bench_peer:start(),
    Native = bench_peer:call(Large, ?MODULE, fill, [Entries]),
    _ = Progress(),
    Ets = bench_peer:call(Large, ?MODULE, fill_ets, [Entries]),
    _ = Progress(),
    ok = bench_peer:call(Large, ?MODULE, host, [Entries]),
    Small = bench_peer:start(),
    _ = bench_peer:call(Small, ?MODULE, fill, [?FEW]),
    _ = bench_peer:call(Small, ?MODULE, fill_ets, [?FEW]),
    ok = bench_peer:call(Small, ?MODULE, host, [?FEW]),
    Cases = [ {{Lookup, Size},
               fun() ->
                       bench_peer:call(Peer, ?MODULE, measure, [Lookup, Number, Lookups])
               end}
              || {Lookup, Sizes} <- [{whereis_connection, [few, many]},
                                     {lookup_element, [few, many]},
                                     {route, [many]},
                                     {route_batch, [many]}],
                 {Size, Peer, Number} <- [{few, Small, ?FEW}, {many, Large, Entries}],
                 lists:member(Size, Sizes) ],
    Figures = bench_rounds:interleave(max(3, Rounds div 2), Cases, Progress),
    ok = bench_peer:stop(Small),
    ok = bench_peer:stop(Large),
    Sharing = bench_peer:start(),
    {Shared, Distinct, ConfigBytes} =
        bench_peer:call(Sharing, ?MODULE, share_configs, [Connections]),
    _ = Progress(),
    ok = bench_peer:stop(Sharing),
    Memory = memory_rows(Entries, Native, Ets),
    Sharings = sharing_rows(Connections, Shared, Distinct, ConfigBytes),
    Memory ++ Sharings ++ lookup_rows(Entries, Figures).


-spec memory_rows(pos_integer(), integer(), integer()) -> [bench_report:row()].
memory_rows(Entries, Native, Ets) ->
    Beside = fun(Bytes) -> Bytes / Entries - ?ID_BYTES end,
    [bench_report:floor(figure,
                        400.0,
                        bench_report:size_row("entries",
                                              "an entry of " ++ bench_report:thousands(Entries) ++
                                              " beside the id",
                                              Beside(Native),
                                              "B",
                                              "ets {Id, Pid, Config}, no monitor",
                                              Beside(Ets)))].


-spec sharing_rows(pos_integer(), integer(), integer(), integer()) -> [bench_report:row()].
sharing_rows(Connections, Shared, Distinct, ConfigBytes) ->
    Number = bench_report:thousands(Connections),
    [bench_report:size_row("entries",
                           Number ++ " equal configs of " ++
                           integer_to_list(ConfigBytes div 1000) ++ " KB",
                           Shared / 1.0e6,
                           "MB",
                           "a copy each (computed)",
                           Connections * ConfigBytes / 1.0e6),
     bench_report:floor(figure,
                        1.0,
                        bench_report:size_row("entries",
                                              "distinct terms kept for them",
                                              float(Distinct),
                                              "term",
                                              none,
                                              none))].


-spec lookup_rows(pos_integer(),
                  #{{work(), few | many} => bench_rounds:figures()}) ->
          [bench_report:row()].
lookup_rows(Entries, Figures) ->
    Name = fun(Lookup, Number) -> Lookup ++ " of " ++ bench_report:thousands(Number) end,
    Row = fun(Lookup, Label) ->
                  bench_report:time_row("size",
                                        Name(Label, Entries),
                                        map_get({Lookup, many}, Figures),
                                        Name("the same", ?FEW),
                                        map_get({Lookup, few}, Figures))
          end,
    Against = bench_report:time_row("size",
                                    Name("whereis_connection/1", Entries),
                                    map_get({whereis_connection, many}, Figures),
                                    Name("ets:lookup_element/3", Entries),
                                    map_get({lookup_element, many}, Figures)),
    [bench_report:growth(Row(whereis_connection, "whereis_connection/1")),
     bench_report:growth(Row(lookup_element, "ets:lookup_element/3")),
     bench_report:floor(ratio, 0.45, Against),
     bench_report:floor(ratio,
                        0.5,
                        bench_report:time_row("size",
                                              Name("route in batches, cold ids", Entries),
                                              map_get({route_batch, many}, Figures),
                                              "one by one",
                                              map_get({route, many}, Figures)))].


%%% In the peer


%% Registers `Entries' connections. Returns the growth of the resident memory.
-spec fill(pos_integer()) -> integer().
fill(Entries) ->
    Owners = owners(),
    Config = bench_population:small_config(),
    ok = erlmcp_shard_registry:register_connection(warm, hd(tuple_to_list(Owners)), Config),
    Before = bench_peer:resident(),
    ok = register_all(Entries, Owners, fun() -> Config end),
    bench_peer:resident() - Before.


%% The same for an ETS table, named after this module.
-spec fill_ets(pos_integer()) -> integer().
fill_ets(Entries) ->
    Self = self(),
    Holder = spawn(fun() ->
                           Table = ets:new(?MODULE,
                                           [set, public, named_table, {read_concurrency, true}]),
                           Self ! {self(), Table},
                           receive stop -> ok end
                   end),
    Table = receive {Holder, Made} -> Made end,
    Owners = owners(),
    Config = bench_population:small_config(),
    Before = bench_peer:resident(),
    ok = in_ranges(Entries,
                   fun(N) ->
                           Owner = element(N rem ?OWNERS + 1, Owners),
                           true = ets:insert(Table, {bench_population:id(N), Owner, Config})
                   end),
    bench_peer:resident() - Before.


%% The growth of memory with equal large configs, the number of terms stored for them, and the size of one
%% config on a heap.
-spec share_configs(pos_integer()) -> {integer(), integer(), integer()}.
share_configs(Connections) ->
    Owners = owners(),
    Encoded = term_to_binary(bench_population:large_config()),
    Bytes = erts_debug:flat_size(binary_to_term(Encoded)) * erlang:system_info(wordsize),
    Empty = bench_peer:resident(),
    ok = register_all(Connections, Owners, fun() -> none end),
    WithAtoms = bench_peer:resident() - Empty,
    ok = unregister_all(Connections),
    Again = bench_peer:resident(),
    Terms = erlmcp_nif:distinct_configs(),
    ok = register_all(Connections, Owners, fun() -> binary_to_term(Encoded) end),
    Distinct = erlmcp_nif:distinct_configs() - Terms,
    {max(0, bench_peer:resident() - max(Again, Empty + WithAtoms)), Distinct, Bytes}.


-spec register_all(pos_integer(), tuple(), fun(() -> term())) -> ok.
register_all(Connections, Owners, Config) ->
    in_ranges(Connections,
              fun(N) ->
                      Owner = element(N rem ?OWNERS + 1, Owners),
                      Id = bench_population:id(N),
                      ok = erlmcp_shard_registry:register_connection(Id, Owner, Config())
              end).


-spec unregister_all(pos_integer()) -> ok.
unregister_all(Connections) ->
    in_ranges(Connections,
              fun(N) ->
                      ok = erlmcp_shard_registry:unregister_connection(bench_population:id(N))
              end).


-spec owners() -> tuple().
owners() ->
    list_to_tuple([ spawn(fun() -> receive stop -> ok end end) || _ <- lists:seq(1, ?OWNERS) ]).


-spec in_ranges(pos_integer(), fun((pos_integer()) -> term())) -> ok.
in_ranges(Total, Do) ->
    Ranges = bench_population:ranges(Total, erlang:system_info(schedulers_online)),
    bench_population:in_parallel([ fun() -> each(First, Last, Do) end || {First, Last} <- Ranges ]).


-spec each(pos_integer(), non_neg_integer(), fun((pos_integer()) -> term())) -> ok.
each(N, Last, _Do) when N > Last ->
    ok;
each(N, Last, Do) ->
    _ = Do(N),
    each(N + 1, Last, Do).


%% Starts the process that does the look-ups, with its list of ids.
-spec host(pos_integer()) -> ok.
host(Entries) ->
    Asking = self(),
    Host = spawn(fun() ->
                         Ids = bench_population:ids(Entries),
                         true = register(?HOST, self()),
                         true = erlang:garbage_collect(),
                         Asking ! {self(), ready},
                         serve(Ids)
                 end),
    receive {Host, ready} -> ok end.


-spec serve([binary()]) -> no_return().
serve(Ids) ->
    receive
        {measure, From, Lookup, Passes} ->
            From ! {measured, time(Lookup, Ids, Passes)},
            serve(Ids)
    end.


-spec time(work(), [binary()], pos_integer()) -> float().
time(Work, Ids, _Passes) when Work =:= route; Work =:= route_batch -> backpressure_bench:time(Work, Ids);
time(Lookup, Ids, Passes) -> lookup_bench:time(Lookup, ?MODULE, Ids, Passes).


%% Nanoseconds per look-up or message.
-spec measure(work(), pos_integer(), pos_integer()) -> float().
measure(Lookup, Entries, Lookups) ->
    ?HOST ! {measure, self(), Lookup, max(1, Lookups div Entries)},
    receive {measured, Figure} -> Figure end.
