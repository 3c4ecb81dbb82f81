%%% Latency of a message under open-loop load: the time from when it was due until it was received.
%%%
%%% One generator per scheduler has messages due every millisecond, for all connections in turn, whether or not
%%% earlier ones have arrived. Each message carries the time at which it was *due*. A generator that is late
%%% sends all due messages at once, and its delay counts as latency: nothing is left out because the system was
%%% too busy (no coordinated omission). Generators run at high priority, as load from outside would.
%%%
%%% The VM's timers wake a process up to about a millisecond late. This affects all figures alike. The row of
%%% `Pid ! Msg' shows the part of the latency that is due to the method.
%%%
%%% A rate is *saturated* if the last message came more than a tenth of the time after it was due, or if p95 is
%%% above 50 ms. Rate and time bound the number of messages, and so every mailbox. Each rate is offered three
%%% times in turn; the figures are the medians. One of the rates is 80 % of what the registry delivers when far
%%% more is offered at once.
%%%
%%% Percentiles and the maximum are those of a log-linear histogram, as in HDR histograms: one bucket per
%%% microsecond up to 128, and 64 buckets for each doubling from there, so that a figure is at most 1.6 % above
%%% the latency that it stands for.
-module(latency_bench).

-export([run/1, sleep_until/1]).

-type histogram() :: counters:counters_ref().
%% The way, the start, the length of a tick, messages a tick, all connections.
-type load() :: {bench_senders:way(), integer(), pos_integer(), float(), [bench_senders:connection()]}.
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
-define(STEPS,      [0.2, 0.5, 1.0]).
-define(REPEATS,    3).
-define(TICK_US,    1000).
-define(GOAL_MS,    50.0).
-define(GIVE_UP_MS, 30000).
-define(WARM_UP,    0.1).
%% Buckets per doubling. There are 20 doublings from 128 us on, up to 134 s.
-define(LINEAR,  64).
-define(BUCKETS, (2 * ?LINEAR + 20 * ?LINEAR)).
%% Messages per connection that are offered at once to measure what is delivered. A shard admits far more.
-define(BURST,    16).
-define(OF_BURST, 0.8).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rate := Rate, progress := Progress} = Options) ->
    Seconds = seconds(Options),
    Histogram = counters:new(?BUCKETS, [write_concurrency]),
    Microsecond = erlang:convert_time_unit(1, microsecond, native),
    {_, Registered} = Population =
        bench_population:start(Count, fun() -> receiver(Histogram, Microsecond) end),
    ok = bench_population:register_all(Population),
    lists:foreach(fun({Id, Pid}) -> ok = bench_baseline:register_server(Id, Pid, #{}) end, Registered),
    Connections = bench_population:visited(Registered),
    Ways = bench_senders:ways(),
    _ = [ measure(Way, Rate div 5, ?WARM_UP, Connections, Histogram) || Way <- Ways ],
    Burst = bench_rounds:median([ burst(native, Connections, Histogram) || _ <- lists:seq(1, ?REPEATS) ]),
    Rates = [ round(Step * Rate) || Step <- ?STEPS ],
    %% Rounded to 100,000, so that the next run on the same machine offers the same rate.
    Most = round(?OF_BURST * Burst / 100_000) * 100_000,
    Offered = Rates ++ [ Most || Most > 0, not lists:member(Most, Rates) ],
    Results = [ begin
                    Result = measure(Way, Each, Seconds, Connections, Histogram),
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
-spec burst(bench_senders:way(), [bench_senders:connection()], histogram()) -> float().
burst(Way, Connections, Histogram) ->
    %% All are offered within one tick, because nothing is delivered in less.
    #{delivered := Delivered} =
        measure(Way, ?BURST * length(Connections) * (1_000_000 div ?TICK_US), ?TICK_US / 1_000_000, Connections, Histogram),
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


-spec measure(bench_senders:way(), pos_integer(), float(), [bench_senders:connection()], histogram()) ->
          result().
measure(Way, Rate, Seconds, Connections, Histogram) ->
    ok = bench_senders:prepare(Way),
    ok = lists:foreach(fun(Bucket) -> counters:put(Histogram, Bucket, 0) end,
                       lists:seq(1, ?BUCKETS)),
    Number = erlang:system_info(schedulers_online),
    Ticks = round(Seconds * 1_000_000 / ?TICK_US),
    PerTick = Rate * ?TICK_US / 1_000_000 / Number,
    Total = Number * trunc(Ticks * PerTick),
    % The generators are running, and have their lists, before the first message is due.
    Start = erlang:monotonic_time() + erlang:convert_time_unit(100, millisecond, native),
    Generators = [ spawn_generator(Way, Sender, Number, Start, Ticks, PerTick, Connections)
                   || Sender <- lists:seq(0, Number - 1) ],
    ok = bench_population:await(Generators),
    ok = await(Total, Histogram, erlang:monotonic_time(millisecond) + ?GIVE_UP_MS),
    Took = bench_report:seconds(erlang:monotonic_time() - Start),
    [P50, P95, P99, P999, Max] = percentiles([0.50, 0.95, 0.99, 0.999, 1.0], Histogram),
    #{
      way => Way,
      offered => Rate,
      delivered => Total / max(Took, Seconds),
      saturated => Took > Seconds * 1.1 orelse P95 > ?GOAL_MS,
      p50 => P50,
      p95 => P95,
      p99 => P99,
      p999 => P999,
      max => Max
     }.


-spec await(non_neg_integer(), histogram(), integer()) -> ok.
await(Total, Histogram, Deadline) ->
    case received(Histogram) of
        Total ->
            ok;
        Fewer ->
            erlang:monotonic_time(millisecond) < Deadline orelse
            error({lost_or_late, Total - Fewer, Total}),
            receive
            after
                5 ->
                    await(Total, Histogram, Deadline)
            end
    end.


%%% Generators


-spec spawn_generator(bench_senders:way(),
                      non_neg_integer(),
                      pos_integer(),
                      integer(),
                      pos_integer(),
                      float(),
                      [bench_senders:connection()]) -> {pid(), reference()}.
spawn_generator(Way, Sender, Number, Start, Ticks, PerTick, Connections) ->
    {Last, First} = lists:split(Sender * length(Connections) div Number, Connections),
    All = First ++ Last,
    Tick = erlang:convert_time_unit(?TICK_US, microsecond, native),
    spawn_opt(fun() -> generate(1, Ticks, 0, All, {Way, Start, Tick, PerTick, All}) end,
              [monitor, {priority, high}]).


-spec generate(pos_integer(),
               pos_integer(),
               non_neg_integer(),
               [bench_senders:connection()],
               load()) -> ok.
generate(Tick, Ticks, _Sent, _Next, _Load) when Tick > Ticks ->
    ok;
generate(Tick, Ticks, Sent, Next, {Way, Start, Length, PerTick, All} = Load) ->
    Due = Start + Tick * Length,
    ok = sleep_until(Due),
    Owed = trunc(Tick * PerTick),
    {Batch, Rest} = take(Owed - Sent, Next, All, []),
    ok = bench_senders:send(Way, Batch, Due),
    generate(Tick + 1, Ticks, Owed, Rest, Load).


%% Sleeps until a time of the monotonic clock, in native units. Rounded up to milliseconds, so that it never returns before.
-spec sleep_until(integer()) -> ok.
sleep_until(Due) ->
    case erlang:convert_time_unit(Due - erlang:monotonic_time(), native, microsecond) of
        Left when Left > 0 ->
            receive
            after
                (Left + 999) div 1000 ->
                    ok
            end;
        _ ->
            ok
    end.


%% The next elements of an endless repetition of `All'.
-spec take(non_neg_integer(), [Element], [Element], [Element]) -> {[Element], [Element]}.
take(0, Next, _All, Batch) -> {Batch, Next};
take(Number, [], All, Batch) -> take(Number, All, All, Batch);
take(Number, [One | Next], All, Batch) -> take(Number - 1, Next, All, [One | Batch]).


%%% Receivers and their histogram


-spec receiver(histogram(), pos_integer()) -> no_return().
receiver(Histogram, Microsecond) ->
    receive
        {mcp_message, _Transport, Due} ->
            Late = (erlang:monotonic_time() - Due) div Microsecond,
            ok = counters:add(Histogram, bucket(Late), 1),
            receiver(Histogram, Microsecond)
    end.


-spec bucket(integer()) -> 1..?BUCKETS.
bucket(Us) when Us < 2 * ?LINEAR -> max(0, Us) + 1;
bucket(Us) -> bucket(Us bsr 1, 1).


%% `Us' was halved `Halved' times.
-spec bucket(pos_integer(), pos_integer()) -> 1..?BUCKETS.
bucket(Us, Halved) when Us < 2 * ?LINEAR -> min(?BUCKETS, Halved * ?LINEAR + Us + 1);
bucket(Us, Halved) -> bucket(Us bsr 1, Halved + 1).


%% The upper end of a bucket, in milliseconds.
-spec upper_end(1..?BUCKETS) -> float().
upper_end(Bucket) when Bucket =< 2 * ?LINEAR ->
    Bucket / 1000;
upper_end(Bucket) ->
    Halved = (Bucket - 1) div ?LINEAR - 1,
    ((Bucket - Halved * ?LINEAR) bsl Halved) / 1000.


-spec received(histogram()) -> non_neg_integer().
received(Histogram) ->
    lists:sum([ counters:get(Histogram, Bucket) || Bucket <- lists:seq(1, ?BUCKETS) ]).


-spec percentiles([float()], histogram()) -> [float()].
percentiles(Quantiles, Histogram) ->
    Total = received(Histogram),
    [ percentile(Quantile * Total, 1, 0, Histogram) || Quantile <- Quantiles ].


-spec percentile(float(), pos_integer(), non_neg_integer(), histogram()) -> float().
percentile(Rank, Bucket, Below, Histogram) ->
    case Below + counters:get(Histogram, Bucket) of
        Enough when Enough >= Rank; Bucket =:= ?BUCKETS -> upper_end(Bucket);
        Fewer -> percentile(Rank, Bucket + 1, Fewer, Histogram)
    end.
