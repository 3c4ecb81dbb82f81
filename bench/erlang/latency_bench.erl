%%% Latency of a message under open-loop load: the time from when it was due until it was received.
%%%
%%% The load is that of {@link bench_open_loop}. The row of `Pid ! Msg' shows the part of the latency that is due to the
%%% method.
%%%
%%% A rate is *saturated* if the last message came more than a tenth of the time after it was due, if p95 is above 50 ms, or if
%%% messages were refused: these have no latency, and are not delivered. Rate and time bound the number of messages, and so every mailbox. Each rate is offered three
%%% times in turn; the figures are the medians. One of the rates is 80 % of what the registry delivers when far
%%% more is offered at once.
-module(latency_bench).

-export([run/1]).

-type result() :: #{
                    way := bench_senders:way(),
                    offered := pos_integer(),
                    delivered := float(),
                    saturated := boolean(),
                    p50 := float(),
                    p95 := float(),
                    p99 := float(),
                    p999 := float(),
                    max := float()
                   }.

%% The rates, as parts of the greatest.
-define(STEPS,   [0.2, 0.5, 1.0]).
-define(REPEATS, 3).
-define(GOAL_MS, 50.0).
-define(WARM_UP, 0.1).
%% Messages per connection that are offered at once to measure what is delivered. A shard admits far more.
-define(BURST,    16).
-define(TICK_S,   0.001).
-define(OF_BURST, 0.8).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rate := Rate, progress := Progress} = Options) ->
    Seconds = seconds(Options),
    Histogram = bench_histogram:new(),
    {_, Registered} = Population =
        bench_population:start(Count, fun() -> bench_open_loop:receiver(Histogram) end),
    ok = bench_population:register_all(Population),
    lists:foreach(fun({Id, Pid}) -> ok = bench_baseline:register_server(Id, Pid, #{}) end, Registered),
    Stripes = bench_open_loop:stripes(bench_population:visited(Registered)),
    Ways = bench_senders:ways(),
    _ = [ measure(Way, Rate div 5, ?WARM_UP, Stripes, Histogram) || Way <- Ways ],
    Burst = bench_rounds:median([ burst(native, Count, Stripes, Histogram) || _ <- lists:seq(1, ?REPEATS) ]),
    Rates = [ round(Step * Rate) || Step <- ?STEPS ],
    %% Rounded to 100,000, so that the next run on the same machine offers the same rate.
    Most = round(?OF_BURST * Burst / 100_000) * 100_000,
    Offered = Rates ++ [ Most || Most > 0, not lists:member(Most, Rates) ],
    Results = [ begin
                    Result = measure(Way, Each, Seconds, Stripes, Histogram),
                    _ = Progress(),
                    Result
                end
                || Each <- Offered, _ <- lists:seq(1, ?REPEATS), Way <- Ways ],
    ok = bench_population:stop(Population),
    lists:append([ rows(Each, Each =:= Rate, Results) || Each <- Offered ]).


%% Ten times as long if this is the only part.
-spec seconds(registry_bench:options()) -> float().
seconds(#{sections := [latency], seconds := Seconds}) -> 10 * Seconds;
seconds(#{seconds := Seconds}) -> Seconds.


%% Messages delivered per second when as many as possible are offered.
-spec burst(bench_senders:way(), pos_integer(), [tuple(), ...], bench_histogram:histogram()) -> float().
burst(Way, Count, Stripes, Histogram) ->
    %% All are offered within one tick, because nothing is delivered in less.
    #{delivered := Delivered} = measure(Way, round(?BURST * Count / ?TICK_S), ?TICK_S, Stripes, Histogram),
    Delivered.


%% A row against the gen_server, and rows against the method's own latency. The floors apply at the greatest
%% rate.
-spec rows(pos_integer(), boolean(), [result()]) -> [bench_report:row()].
rows(Offered, IsGreatest, Results) ->
    [Native, Classic, Bare] =
        [ [ Result
            || #{way := One, offered := Rate} = Result <- Results,
               One =:= Way,
               Rate =:= Offered ]
          || Way <- [native, classic, bare] ],
    Compare = fun(Percentile, Name, Others) ->
                      bench_report:latency_row("latency",
                                               Percentile,
                                               bench_report:thousands(Offered) ++ "/s",
                                               Native,
                                               bench_senders:name(Name),
                                               Others)
              end,
    Classics = Compare(p95, classic, Classic),
    Bares = [ {Floor, Compare(Percentile, bare, Bare)} || {Percentile, Floor} <- [{p95, 1.5}, {p99, 2.0}] ],
    case IsGreatest of
        true ->
            [bench_report:floor(figure, ?GOAL_MS, Classics) | [ bench_report:floor(ratio, Floor, Row) || {Floor, Row} <- Bares ]];
        false ->
            [Classics | [ Row || {_, Row} <- Bares ]]
    end.


-spec measure(bench_senders:way(), pos_integer(), float(), [tuple(), ...], bench_histogram:histogram()) -> result().
measure(Way, Rate, Seconds, Stripes, Histogram) ->
    ok = bench_senders:prepare(Way),
    %% Opened by a former round, if that was too much.
    ok = erlmcp_circuit_breaker:reset(),
    #{sent := Sent, received := Received, lost := Lost, refused := Refused, drain_seconds := Took, latencies := Latencies} =
        bench_open_loop:run(#{
                              stripes => Stripes,
                              histogram => Histogram,
                              schedule => {steady, Rate},
                              seconds => Seconds,
                              send => fun(Batch, Due) -> bench_senders:offer(Way, Batch, Due) end
                             }),
    Lost =:= 0 orelse error({lost_or_late, Lost, Sent}),
    [P50, P95, P99, P999, Max] = bench_histogram:percentiles([0.50, 0.95, 0.99, 0.999, 1.0], Latencies),
    #{
      way => Way,
      offered => Rate,
      delivered => Received / max(Took, Seconds),
      saturated => Took > Seconds * 1.1 orelse P95 > ?GOAL_MS orelse map_size(Refused) > 0,
      p50 => P50,
      p95 => P95,
      p99 => P99,
      p999 => P999,
      max => Max
     }.
