%%% The cost of the three layers of backpressure: of the guarded look-up alone, and of a refusal by each layer.
%%%
%%% The configuration is the default one, and the shard managers are running. A connection gets some twenty
%%% messages a round, less than its bucket holds. None is sent, so that no mailbox fills. For the refusals a
%%% layer is made to refuse everything before the clock is started: buckets of one token an hour; a threshold of
%%% one message a shard, with a message in every mailbox; the circuit forced open.
%%%
%%% Loops, tables and the time that is subtracted are those of {@link lookup_bench}.
-module(backpressure_bench).

-export([run/1]).
-export([time/2]).

-export_type([work/0]).

-type work() :: nothing | route | route_server | route_batch | lookup_element | lookup_element_of_pair.
-type layers() :: on | off | no_tokens | no_room | circuit_open.

%% Messages of a batch.
-define(BATCH, 500).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, lookups := Lookups, progress := Progress}) ->
    {_, Connections} = Population =
        bench_population:start(Count, fun receiver/0),
    Config = bench_population:small_config(),
    ok = bench_population:register_all(Population),
    Rows = bench_population:ets_table([ {Id, Pid, Config} || {Id, Pid} <- Connections ]),
    Pairs = bench_population:ets_table(Connections),
    Visited = bench_population:visited(Connections),
    Ids = [ Id || {Id, _Pid, _Transport} <- Visited ],
    Bound = [ {Id, Transport} || {Id, _Pid, Transport} <- Visited ],
    Passes = max(1, Lookups div Count),
    Measure = fun(Work, Layers) ->
                      Table = case Work of
                                  lookup_element_of_pair -> Pairs;
                                  _ -> Rows
                              end,
                      List = case Work of
                                 route_server -> Bound;
                                 _ -> Ids
                             end,
                      {{Work, Layers}, fun() -> measure(Work, Layers, Connections, List, Table, Passes) end}
              end,
    Figures = bench_rounds:interleave(
                Rounds,
                [ Measure(Work, Layers)
                  || {Work, Layers} <- [{lookup_element, on},
                                        {lookup_element_of_pair, on},
                                        {route, on},
                                        {route, off},
                                        {route_server, on},
                                        {route_batch, on},
                                        {route, no_tokens},
                                        {route, no_room},
                                        {route, circuit_open}] ],
                Progress),
    true = ets:delete(Rows),
    true = ets:delete(Pairs),
    ok = bench_population:stop(Population),
    rows(Figures).


-spec rows(#{{work(), layers()} => bench_rounds:figures()}) -> [bench_report:row()].
rows(Figures) ->
    Guarded = map_get({route, on}, Figures),
    Against = fun(Name, Case, OtherName, Other) ->
                      bench_report:time_row("guarded", Name, map_get(Case, Figures), OtherName, map_get(Other, Figures))
              end,
    Refused = fun(By, Layers) ->
                      bench_report:floor(ratio,
                                         1.0,
                                         bench_report:time_row("guarded",
                                                               "refused by the " ++ By,
                                                               map_get({route, Layers}, Figures),
                                                               "admitted",
                                                               Guarded))
              end,
    [bench_report:floor(ratio,
                        0.5,
                        Against("route, all three layers", {route, on}, "ets:lookup_element/3", {lookup_element, on})),
     Against("route, all three layers",
             {route, on},
             "the same, rows without a config",
             {lookup_element_of_pair, on}),
     Against("route, all layers off", {route, off}, "ets:lookup_element/3", {lookup_element, on}),
     Against("route to a server, all three layers", {route_server, on}, "ets:lookup_element/3", {lookup_element, on}),
     Against("route in batches of 500, a message", {route_batch, on}, "one by one", {route, on}),
     Refused("token bucket", no_tokens),
     Refused("shard", no_room),
     Refused("circuit", circuit_open)].


-spec measure(work(), layers(), [{binary(), pid()}], list(), ets:table(), pos_integer()) -> float().
measure(Work, Layers, Connections, Ids, Table, Passes) ->
    ok = set(Layers, Connections),
    ok = expect(Work, Layers, hd(Ids)),
    Context = context(Work, Ids, Table),
    %% This pass is not measured: the first consume from a bucket after a change of limits converts the bucket.
    ok = passes(Work, Ids, Context, 1),
    Loop = elapsed(nothing, Ids, Context, Passes),
    Whole = elapsed(Work, Ids, Context, Passes),
    ok = expect(Work, Layers, hd(Ids)),
    ok = reset(Layers, Connections),
    max(0.1, (Whole - Loop) / (length(Ids) * Passes)).


%% Nanoseconds of `route' or `route_batch' for an id in the default registry with its current settings. This is
%% the median of parts of 2,000 ids, so that samplers and other processes scheduled meanwhile do not count.
-spec time(route | route_batch, [binary()]) -> float().
time(Work, Ids) ->
    bench_rounds:median([ begin
                              Context = context(Work, Part, none),
                              Loop = elapsed(nothing, Part, Context, 1),
                              max(0.1, (elapsed(Work, Part, Context, 1) - Loop) / length(Part))
                          end
                          || Part <- parts(4 * ?BATCH, Ids) ]).


%% Keeps messages in the mailbox until it is told to receive them.
-spec receiver() -> ok.
receiver() ->
    receive
        stop -> ok;
        take -> take()
    end.


-spec take() -> ok.
take() ->
    receive
        waiting -> take()
    after
        0 ->
            receiver()
    end.


%% Checks that the layers behave as the case requires.
-spec expect(work(), layers(), binary() | {binary(), binary()}) -> ok.
expect(lookup_element, _Layers, _Id) -> ok;
expect(lookup_element_of_pair, _Layers, _Id) -> ok;
expect(route_server, on, {Server, Transport}) ->
    true = is_pid(route_of(erlmcp_nif:route_server(Server, Transport))),
    ok;
expect(_Work, no_tokens, Id) -> rate_limited = route_once(Id), ok;
expect(_Work, no_room, Id) -> shard_overloaded = route_once(Id), ok;
expect(_Work, circuit_open, Id) -> circuit_open = route_once(Id), ok;
expect(_Work, Layers, Id) ->
    case route_once(Id) of
        Pid when is_pid(Pid) -> ok;
        Refused -> error({refused, Layers, Refused})
    end.


-spec route_once(binary()) -> erlmcp_nif:route().
route_once(Id) ->
    route_of(erlmcp_nif:route_connection(Id)).


-spec route_of(erlmcp_nif:routed() | diverted) -> erlmcp_nif:route() | diverted.
route_of({Route, _Events}) -> Route;
route_of(Route) -> Route.


-spec set(layers(), [{binary(), pid()}]) -> ok.
set(on, _Connections) ->
    ok;
set(off, _Connections) ->
    ok = erlmcp_native:set(backpressure, off);
set(no_tokens, Connections) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 1, rate_per_second => 1 / 3600}),
    spend(Connections);
set(no_room, Connections) ->
    %% That many overloaded shards would open the circuit.
    ok = erlmcp_native:set(circuit_breaker, off),
    lists:foreach(fun({_Id, Pid}) -> Pid ! waiting end, Connections),
    ok = erlmcp_admission_control:set_threshold(1),
    await_overload(Connections);
set(circuit_open, _Connections) ->
    ok = erlmcp_circuit_breaker:force_open().


-spec reset(layers(), [{binary(), pid()}]) -> ok.
reset(on, _Connections) ->
    ok;
reset(off, _Connections) ->
    ok = erlmcp_native:set(backpressure, on);
reset(no_tokens, _Connections) ->
    ok = erlmcp_native:set(token_bucket, erlmcp_native_config:default(token_bucket)),
    %% Waits until the buckets are full again.
    timer:sleep(150);
reset(no_room, Connections) ->
    #{threshold := Threshold} = erlmcp_native_config:default(admission),
    lists:foreach(fun({_Id, Pid}) -> Pid ! take end, Connections),
    ok = erlmcp_admission_control:set_threshold(Threshold),
    ok = erlmcp_native:set(circuit_breaker, erlmcp_native_config:default(circuit_breaker));
reset(circuit_open, _Connections) ->
    ok = erlmcp_circuit_breaker:reset().


-spec spend([{binary(), pid()}]) -> ok.
spend(Connections) ->
    lists:foreach(fun({Id, _Pid}) -> _ = erlmcp_token_bucket:consume(Id, 1) end, Connections).


%% A sample is taken with the first message. After it the shard refuses.
-spec await_overload([{binary(), pid()}]) -> ok.
await_overload(Connections) ->
    lists:foreach(fun({Id, _Pid}) -> await_refusal(Id) end, Connections).


-spec await_refusal(binary()) -> ok.
await_refusal(Id) ->
    case erlmcp_shard_manager:route_message(Id, waiting) of
        {error, shard_overloaded} ->
            ok;
        ok ->
            receive
            after
                1 ->
                    await_refusal(Id)
            end
    end.


-spec context(work(), list(), ets:table() | none) -> term().
context(route_batch, Ids, _Table) -> parts(?BATCH, [ {Id, message} || Id <- Ids ]);
context(_Work, _Ids, Table) -> Table.


-spec parts(pos_integer(), [Element]) -> [[Element]].
parts(_Length, []) ->
    [];
parts(Length, List) ->
    Part = lists:sublist(List, Length),
    [Part | parts(Length, lists:nthtail(length(Part), List))].


-spec elapsed(work(), list(), term(), pos_integer()) -> integer().
elapsed(Work, Ids, Context, Passes) ->
    Start = erlang:monotonic_time(),
    ok = passes(Work, Ids, Context, Passes),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond).


-spec passes(work(), list(), term(), non_neg_integer()) -> ok.
passes(_Work, _Ids, _Context, 0) ->
    ok;
passes(Work, Ids, Context, Left) ->
    ok = case Work of
             nothing -> nothing(Ids);
             route -> route(Ids);
             route_server -> route_servers(Ids);
             route_batch -> route_batches(Context);
             lookup_element -> lookup_element(Ids, Context);
             lookup_element_of_pair -> lookup_element(Ids, Context)
         end,
    passes(Work, Ids, Context, Left - 1).


-spec nothing(list()) -> ok.
nothing([_Id | Ids]) -> nothing(Ids);
nothing([]) -> ok.


-spec route([binary()]) -> ok.
route([Id | Ids]) ->
    case erlmcp_nif:route_connection(Id) of
        {_Route, Events} -> erlmcp_delivery:notify(Events);
        _Route -> ok
    end,
    route(Ids);
route([]) ->
    ok.


%% The bucket of the registered transport is charged.
-spec route_servers([{binary(), binary()}]) -> ok.
route_servers([{Server, Transport} | Others]) ->
    case erlmcp_nif:route_server(Server, Transport) of
        {_Route, Events} -> erlmcp_delivery:notify(Events);
        _Route -> ok
    end,
    route_servers(Others);
route_servers([]) ->
    ok.


-spec route_batches([[{binary(), term()}]]) -> ok.
route_batches([Batch | Batches]) ->
    ok = route_batch(Batch),
    route_batches(Batches);
route_batches([]) ->
    ok.


-spec route_batch([{binary(), term()}]) -> ok.
route_batch([]) ->
    ok;
route_batch(Messages) ->
    {Routed, Rest, []} = erlmcp_nif:route_batch(Messages),
    _ = [ erlmcp_delivery:notify(Events) || {_Route, Events} <- Routed ],
    route_batch(Rest).


-spec lookup_element([binary()], ets:table()) -> ok.
lookup_element([Id | Ids], Table) ->
    _ = ets:lookup_element(Table, Id, 2),
    lookup_element(Ids, Table);
lookup_element([], _Table) ->
    ok.
