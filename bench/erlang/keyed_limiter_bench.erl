%%% The cost of a token from a keyed limiter, against a counter for each key in an ETS table: the usual way of limiting
%%% by key in Erlang, which counts in windows of fixed length and needs a sweep of its own.
%%%
%%% The keys are the ids of as many clients as there are connections, visited in shuffled order. The time of the same
%%% loop without the call is subtracted. New keys go to an empty limiter and to an empty table; making these is not
%%% measured, dropping them neither.
-module(keyed_limiter_bench).

-export([run/1]).

-type work() :: nothing | known | counted | new | counted_new | refused | full.

%% More tokens than any run takes, and no bucket that is full again meanwhile: it would be forgotten.
-define(PLENTY,  #{capacity => 1_000_000, rate_per_second => 0.12}).
-define(NOTHING, #{capacity => 1, rate_per_second => 1 / 3600}).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{rounds := Rounds, connections := Count, lookups := Lookups, progress := Progress}) ->
    Ids = bench_population:ids(Count),
    Passes = max(1, Lookups div Count),
    Known = erlmcp_keyed_limiter:new(?PLENTY),
    Empty = erlmcp_keyed_limiter:new(?NOTHING),
    Full = erlmcp_keyed_limiter:new(maps:put(max_keys, Count, ?NOTHING)),
    ok = consume(Ids, Known),
    ok = consume(Ids, Empty),
    lists:foreach(fun(N) -> {ok, 0} = erlmcp_keyed_limiter:consume(Full, {other, N}) end, lists:seq(1, Count)),
    Table = table(),
    ok = count(Ids, Table),
    Measure = fun(Work, Context) -> {Work, fun() -> measure(Work, Ids, Context, Passes) end} end,
    Figures = bench_rounds:interleave(Rounds,
                                      [Measure(known, Known),
                                       Measure(counted, Table),
                                       Measure(new, none),
                                       Measure(counted_new, none),
                                       Measure(refused, Empty),
                                       Measure(full, Full)],
                                      Progress),
    true = ets:delete(Table),
    %% All known keys have had their buckets throughout.
    #{keys := Count} = erlmcp_keyed_limiter:info(Known),
    Row = fun(Name, Work, OtherName, Other) ->
                  bench_report:time_row("limits", Name, map_get(Work, Figures), OtherName, map_get(Other, Figures))
          end,
    [Row("keyed limiter, a token of a known key", known, "ets:update_counter/4", counted),
     Row("keyed limiter, the first of a new key", new, "ets:update_counter/4 of a new key", counted_new),
     Row("keyed limiter, a key without tokens", refused, "a token of a known key", known),
     Row("keyed limiter, no room for a new key", full, "a token of a known key", known)].


-spec table() -> ets:table().
table() ->
    ets:new(counters, [public, {write_concurrency, true}, {read_concurrency, true}]).


-spec measure(work(), [binary()], term(), pos_integer()) -> float().
measure(Work, Ids, Context, Passes) ->
    _ = elapsed(Work, Ids, Context),
    Loop = lists:sum([ elapsed(nothing, Ids, none) || _ <- lists:seq(1, Passes) ]),
    Whole = lists:sum([ elapsed(Work, Ids, Context) || _ <- lists:seq(1, Passes) ]),
    max(0.1, (Whole - Loop) / (length(Ids) * Passes)).


-spec elapsed(work(), [binary()], term()) -> integer().
elapsed(new, Ids, none) ->
    elapsed(known, Ids, erlmcp_keyed_limiter:new(?PLENTY));
elapsed(counted_new, Ids, none) ->
    Table = table(),
    Elapsed = elapsed(counted, Ids, Table),
    true = ets:delete(Table),
    Elapsed;
elapsed(Work, Ids, Context) ->
    timed(fun() ->
                  case Work of
                      nothing -> nothing(Ids);
                      known -> consume(Ids, Context);
                      counted -> count(Ids, Context);
                      _ -> refuse(Ids, Context)
                  end
          end).


-spec timed(fun(() -> ok)) -> integer().
timed(Fun) ->
    Start = erlang:monotonic_time(),
    ok = Fun(),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond).


-spec nothing([binary()]) -> ok.
nothing([_Id | Ids]) -> nothing(Ids);
nothing([]) -> ok.


-spec consume([binary()], erlmcp_keyed_limiter:limiter()) -> ok.
consume([Id | Ids], Limiter) ->
    {ok, _} = erlmcp_keyed_limiter:consume(Limiter, Id),
    consume(Ids, Limiter);
consume([], _Limiter) ->
    ok.


-spec refuse([binary()], erlmcp_keyed_limiter:limiter()) -> ok.
refuse([Id | Ids], Limiter) ->
    {error, _} = erlmcp_keyed_limiter:consume(Limiter, Id),
    refuse(Ids, Limiter);
refuse([], _Limiter) ->
    ok.


-spec count([binary()], ets:table()) -> ok.
count([Id | Ids], Table) ->
    _ = ets:update_counter(Table, Id, 1, {Id, 0}),
    count(Ids, Table);
count([], _Table) ->
    ok.
