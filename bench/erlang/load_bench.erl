%%% The load of a host: each connection is sent 33 messages a second, whether or not earlier ones have arrived.
%%%
%%% It runs only by its name (`--load'). At each level, a number of connections, messages go by three ways: *native*,
%%% `erlmcp_registry:route_to_server/3' with a registered and bound transport, so that all three layers of backpressure
%%% are charged in their default configuration; *current*, the registry as one gen_server; and *bare*, `Pid ! Msg' with
%%% the pids in hand. The load is that of {@link bench_open_loop}. Senders have normal priority, as the processes of a host's
%%% transports have: at a high one they would starve the receivers of a busy machine.
%%%
%%% Each way has a VM of its own at each level, and the VMs take turns of some seconds: other work on the machine affects
%%% all of them alike, and neither memory nor a backlog of one way is charged to another one. A turn begins when the one
%%% before has drained.
%%%
%%% Levels have the stage `sustain'. The largest one has four stages:
%%%
%%% <ul>
%%% <li>`ramp': from no connection to all; each is registered by its sender and is sent to from then on.</li>
%%% <li>`sustain': 33 messages a second to each.</li>
%%% <li>`rate': `--rate' messages a second in all.</li>
%%% <li>`burst': 330 messages a second to each.</li>
%%% </ul>
%%%
%%% A stage begins with a closed circuit. A way *collapses* when more than a second's messages wait to be received, or as
%%% many as would take too much memory: its load stops, and it takes no further turn in that stage. Senders that
%%% need more than twice the planned time of a turn are stopped, too; that says nothing about delivery.
%%%
%%% *Memory of a connection* is the growth of resident memory from before there is any process of a connection until the
%%% greatest that was seen in a stage, with messages, senders and their lists of connections. It is left out for less than
%%% 1,000 connections, since it would be what the VM reserves.
-module(load_bench).

-export([run/1, name/1]).
%% In the peers
-export([prepare/3, turn/2]).

-export_type([way/0, stage/0, summary/0, report/0]).

-type way() :: native | classic | bare.
-type stage() :: ramp | sustain | rate | burst.
-type plan() :: #{
                  connections := pos_integer(),
                  stage := stage(),
                  rate := pos_integer(),
                  % Of one turn.
                  seconds := float(),
                  turns := pos_integer()
                 }.
-type samples() :: #{resident | run_queue_max | run_queue_sum | samples | long_gcs | longest_gc_ms := non_neg_integer()}.
-type summary() :: #{
                     connections := pos_integer(),
                     stage := stage(),
                     way := way(),
                     turns := pos_integer(),
                     % Messages per second.
                     asked := float(),
                     offered := float(),
                     delivered := float(),
                     % Messages.
                     sent := non_neg_integer(),
                     received := non_neg_integer(),
                     lost := non_neg_integer(),
                     refused := #{atom() | string() => pos_integer()},
                     backlog := non_neg_integer(),
                     collapsed := boolean(),
                     % The senders were too slow for what was asked for.
                     not_offered := boolean(),
                     % Milliseconds; missing where nothing was received.
                     latency => #{p50 | p95 | p99 | p999 | max := float()},
                     % Missing with few connections.
                     memory_kb => float(),
                     long_gcs := non_neg_integer(),
                     longest_gc_ms := non_neg_integer(),
                     run_queue := float(),
                     run_queue_max := non_neg_integer()
                    }.
-type report() :: #{interrupted := boolean(), results := [summary()]}.
%% What the turns of a stage have measured by one way so far.
-type measured() :: #{{pos_integer(), stage(), way()} => {[bench_open_loop:result()], [samples()], Base :: non_neg_integer()}}.

-define(SIZES, [150, 1_000, 5_000, 10_000, 15_000]).
%% Messages per second to each connection, and how many times as many in the burst.
-define(EACH,  33).
-define(BURST, 10).
%% Seconds of a stage at `--seconds 1', and of a turn, about.
-define(STAGE_SECONDS, 6).
-define(BURST_SECONDS, 2).
-define(TURN_SECONDS,  3).
-define(MAX_OVERRUN,   2).
-define(GIVE_UP_MS,    120_000).
%% A backlog is a collapse when it is a second's messages. Fewer may be due to the machine.
-define(LEAST_BACKLOG, 20_000).
%% Native code admits some 640,000 messages by default, or 43 for each connection if that is more.
-define(MOST_BACKLOG,          2_000_000).
-define(BACKLOG_A_CONNECTION,  64).
-define(BACKLOG_OF_ANY_MEMORY, 10_000_000).
-define(LOOK_MS,               20).
-define(LONG_GC_MS,            1).
-define(PROGRESS_MS,           10_000).
-define(FEWEST_FOR_MEMORY,     1_000).
%% The warm-up of a VM.
-define(WARM_UP_SIZE,    100).
-define(WARM_UP_SECONDS, 0.3).
-define(SETTLE_MS,       300).
%% The requirements: of 15,000 connections, messages a second, milliseconds, kilobytes.
-define(GOAL_CONNECTIONS, 15_000).
-define(GOAL_RATE,        500_000).
-define(GOAL_MS,          50.0).
-define(GOAL_KB,          200.0).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(Options) ->
    Plans = plans(Options),
    ok = bench_interrupt:start(self()),
    Self = self(),
    {Worker, Monitor} = spawn_monitor(fun() ->
                                              lists:foreach(fun(Level) -> measure(Level, Self) end, Plans),
                                              exit(measured)
                                      end),
    {Interrupted, Measured} = collect(Worker, Monitor, #{}, progress(Plans)),
    ok = bench_interrupt:stop(),
    Results = [ summary(Plan, Way, map_get(key(Plan, Way), Measured))
                || Level <- Plans, Plan <- Level, Way <- bench_senders:ways(), is_map_key(key(Plan, Way), Measured) ],
    rows(#{interrupted => Interrupted, results => Results}, Options).


%% The name of a way in tables.
-spec name(way()) -> string().
name(classic) -> "current";
name(Way) -> atom_to_list(Way).


%%% Levels and their stages


-spec plans(registry_bench:options()) -> [[plan(), ...]].
plans(#{sizes := Given, rate := Rate, seconds := Scale}) ->
    Sizes = case Given of
                default -> ?SIZES;
                _ -> lists:usort(Given)
            end,
    Largest = lists:last(Sizes),
    Stage = fun(Size, Stage, PerSecond, Seconds) ->
                    Turns = max(1, round(Seconds / ?TURN_SECONDS)),
                    #{connections => Size, stage => Stage, rate => PerSecond, seconds => Seconds / Turns, turns => Turns}
            end,
    Seconds = ?STAGE_SECONDS * Scale,
    [ [Stage(Size, sustain, ?EACH * Size, Seconds)] || Size <- lists:droplast(Sizes) ] ++
    [[Stage(Largest, ramp, ?EACH * Largest, Seconds),
      Stage(Largest, sustain, ?EACH * Largest, Seconds),
      Stage(Largest, rate, Rate, Seconds),
      Stage(Largest, burst, ?BURST * ?EACH * Largest, ?BURST_SECONDS * Scale)]].


-spec key(plan(), way()) -> {pos_integer(), stage(), way()}.
key(#{connections := Size, stage := Stage}, Way) ->
    {Size, Stage, Way}.


%% Measures the stages of one level in turns, and sends the result of each turn.
-spec measure([plan(), ...], pid()) -> ok.
measure([#{connections := Size, stage := First} | _] = Level, Collector) ->
    Peers = [ begin
                  Peer = bench_peer:start(),
                  {Way, Peer, bench_peer:call(Peer, ?MODULE, prepare, [Way, Size, First =:= ramp])}
              end
              || Way <- bench_senders:ways() ],
    lists:foreach(fun(Plan) -> turns(1, Plan, Peers, Collector) end, Level),
    lists:foreach(fun({_Way, Peer, _Base}) -> ok = bench_peer:stop(Peer) end, Peers).


%% Each round of turns begins with another way.
-spec turns(pos_integer(), plan(), [{way(), bench_peer:peer(), non_neg_integer()}], pid()) -> ok.
turns(Turn, #{turns := Turns}, _Peers, _Collector) when Turn > Turns ->
    ok;
turns(Turn, Plan, Peers, Collector) ->
    Left = lists:filter(fun({Way, Peer, Base}) ->
                                {Result, Samples} = bench_peer:call(Peer, ?MODULE, turn, [Plan, Turn]),
                                Collector ! {turn, Plan, Way, Result, Samples, Base},
                                map_get(stopped, Result) =/= backlog
                        end,
                        Peers),
    turns(Turn + 1, Plan, rotated(Left), Collector).


-spec rotated([Element]) -> [Element].
rotated([First | Others]) -> Others ++ [First];
rotated([]) -> [].


%%% Results of turns


-spec collect(pid(), reference(), measured(), map()) -> {Interrupted :: boolean(), measured()}.
collect(Worker, Monitor, Measured, Progress) ->
    receive
        {turn, Plan, Way, Result, Samples, Base} ->
            Key = key(Plan, Way),
            {Results, Sampled, Base} = maps:get(Key, Measured, {[], [], Base}),
            collect(Worker,
                    Monitor,
                    Measured#{Key => {[Result | Results], [Samples | Sampled], Base}},
                    progressed(Plan, Way, Result, Progress));
        {'DOWN', Monitor, process, Worker, measured} ->
            {false, Measured};
        {'DOWN', Monitor, process, Worker, Reason} ->
            error(Reason);
        interrupted ->
            io:format(standard_error, "~n  interrupted; what was measured so far:~n", []),
            %% Its VMs stop with it.
            true = exit(Worker, shutdown),
            receive {'DOWN', Monitor, process, Worker, _} -> {true, Measured} end
    end.


-spec progress([[plan(), ...]]) -> map().
progress(Plans) ->
    Begin = erlang:monotonic_time(millisecond),
    Left = lists:sum([ Seconds * Turns || Level <- Plans, #{seconds := Seconds, turns := Turns} <- Level ]),
    io:format(standard_error, "~n", []),
    #{begin_ms => Begin, printed_ms => Begin, left => Left * length(bench_senders:ways()), done => 0.0, shown => none}.


%% Prints a line for each new stage, and one every ten seconds. What is left takes as long for each planned second as what
%% was done.
-spec progressed(plan(), way(), bench_open_loop:result(), map()) -> map().
progressed(#{connections := Size, stage := Stage, seconds := Seconds, turns := Turns} = Plan,
           Way,
           #{stopped := Stopped},
           #{begin_ms := Begin, printed_ms := Printed, left := Left, done := Done, shown := Shown} = Progress) ->
    Now = erlang:monotonic_time(millisecond),
    %% A way that was stopped takes no further turns.
    Turn = maps:get({turn, Way}, Progress, 0) rem Turns + 1,
    {Took, Last} = case Stopped of
                       backlog -> {Seconds * (Turns - Turn + 1), 0};
                       _ -> {Seconds, Turn}
                   end,
    Advanced = Progress#{left => Left - Took, done => Done + Took, {turn, Way} => Last},
    case {Size, Stage} of
        Shown when Now - Printed < ?PROGRESS_MS ->
            Advanced;
        Current ->
            Remaining = round((Now - Begin) / (Done + Took) * max(0.0, Left - Took) / 1000),
            io:format(standard_error,
                      "  ~ts connections, ~ts: some ~b:~2..0b min left~n",
                      [bench_report:thousands(Size), stage_name(Plan), Remaining div 60, Remaining rem 60]),
            Advanced#{printed_ms => Now, shown => Current}
    end.


-spec stage_name(plan()) -> string().
stage_name(#{stage := Stage, rate := Rate}) ->
    atom_to_list(Stage) ++ ", " ++ bench_report:thousands(Rate) ++ " msg/s".


-spec summary(plan(), way(), {[bench_open_loop:result()], [samples()], non_neg_integer()}) -> summary().
summary(#{connections := Size, stage := Stage}, Way, {Results, Samples, Base}) ->
    #{
      seconds := Seconds,
      asked := Asked,
      sent := Sent,
      offered := Offered,
      delivered := Delivered,
      window_seconds := Window,
      latencies := Latencies,
      refused := Refused,
      stopped := Stopped
     } = Result = bench_open_loop:merged(Results),
    Sum = fun(Key) -> lists:sum([ map_get(Key, One) || One <- Samples ]) end,
    Max = fun(Key) -> lists:max([ map_get(Key, One) || One <- Samples ]) end,
    Summary = #{
                connections => Size,
                stage => Stage,
                way => Way,
                turns => length(Results),
                asked => Asked / Seconds,
                offered => Offered / Window,
                delivered => Delivered / Window,
                sent => Sent,
                received => map_get(received, Result),
                lost => map_get(lost, Result),
                refused => maps:from_list([ {printable(Reason), Number} || {Reason, Number} <- maps:to_list(Refused) ]),
                backlog => map_get(backlog, Result),
                collapsed => Stopped =:= backlog,
                not_offered => not bench_open_loop:is_offered(Result),
                long_gcs => Sum(long_gcs),
                longest_gc_ms => Max(longest_gc_ms),
                run_queue => Sum(run_queue_sum) / Sum(samples),
                run_queue_max => Max(run_queue_max)
               },
    maps:merge(maps:from_list([ {memory_kb, (Max(resident) - Base) / Size / 1000} || Size >= ?FEWEST_FOR_MEMORY ] ++
                              [ {latency, percentiles(Latencies)} || map_size(Latencies) > 0 ]),
               Summary).


-spec percentiles(bench_histogram:counts()) -> #{p50 | p95 | p99 | p999 | max := float()}.
percentiles(Latencies) ->
    [P50, P95, P99, P999, Greatest] = bench_histogram:percentiles([0.50, 0.95, 0.99, 0.999, 1.0], Latencies),
    #{p50 => P50, p95 => P95, p99 => P99, p999 => P999, max => Greatest}.


-spec printable(term()) -> atom() | string().
printable(Reason) when is_atom(Reason) -> Reason;
printable(Reason) -> lists:flatten(io_lib:format("~0p", [Reason])).


%%% Rows


%% The rows of the requirements. One of them carries all results.
-spec rows(report(), registry_bench:options()) -> [bench_report:row()].
rows(#{results := Results} = Report, #{rate := Rate}) ->
    Native = [ Result || #{way := native} = Result <- Results ],
    Lost = float(lists:sum([ Lost || #{lost := Lost} <- Native ])),
    AtRate = maps:from_list([ {Way, Result} || #{stage := rate, way := Way} = Result <- Results ]),
    Sustained = lists:last([none | [ Result || #{stage := sustain} = Result <- Native ]]),
    [ bench_report:load(Report,
                        bench_report:floor(figure, 0.0, bench_report:size_row("load", "lost, at all levels", Lost, "msgs", none, none)))
      || Native =/= [] ] ++
    [ Row || #{connections := Size, memory_kb := Kb} <- [Sustained],
             Row <- [judged(Size >= ?GOAL_CONNECTIONS,
                            figure,
                            ?GOAL_KB,
                            bench_report:size_row("load",
                                                  bench_report:thousands(Size) ++ " connections, memory of each",
                                                  Kb,
                                                  "KB",
                                                  none,
                                                  none))] ] ++
    [ Row || is_map_key(native, AtRate), Row <- rate_rows(Rate, AtRate) ].


%% Latencies are compared only where both ways were offered what was asked for.
-spec rate_rows(pos_integer(), #{way() => summary()}) -> [bench_report:row()].
rate_rows(Rate, #{native := #{connections := Size, delivered := Delivered} = Native} = Ways) ->
    Judge = Size >= ?GOAL_CONNECTIONS andalso Rate >= ?GOAL_RATE,
    At = bench_report:thousands(Rate) ++ "/s to " ++ bench_report:thousands(Size),
    Others = [ {Way, map_get(Way, Ways)} || Way <- [classic, bare], is_map_key(Way, Ways) ],
    Figure = fun(Row, Floor) -> judged(Judge, figure, Floor, Row) end,
    [ Figure(bench_report:rate_row("load", "delivered of " ++ At, [Delivered], bench_senders:name(Way), [Other]), float(?GOAL_RATE))
      || {Way, #{delivered := Other}} <- Others, Other > 0 ] ++
    [ Figure(bench_report:size_row("load", "p95 at " ++ At, P95, "ms", none, none), ?GOAL_MS)
      || #{latency := #{p95 := P95}} <- [Native] ] ++
    [ judged(Judge,
             ratio,
             Floor,
             bench_report:size_row("load",
                                   atom_to_list(Percentile) ++ " at " ++ At ++ ", ratio",
                                   map_get(Percentile, Latency),
                                   "ms",
                                   bench_senders:name(bare),
                                   map_get(Percentile, Other)))
      || #{latency := Latency, collapsed := false, not_offered := false} <- [Native],
         {bare, #{latency := Other, collapsed := false, not_offered := false}} <- Others,
         {Percentile, Floor} <- [{p95, 1.5}, {p99, 2.0}] ].


%% The requirements are those of a load, and no other one tells whether they are met.
-spec judged(boolean(), figure | ratio, float(), bench_report:row()) -> bench_report:row().
judged(true, Of, Floor, Row) -> bench_report:floor(Of, Floor, Row);
judged(false, _Of, _Floor, Row) -> Row.


%%% In the peers


%% Warms up, starts the processes of the connections, and registers them unless a ramp is to do that. Returns the resident
%% memory before.
-spec prepare(way(), pos_integer(), Ramp :: boolean()) -> non_neg_integer().
prepare(Way, Size, Ramp) ->
    Histogram = bench_histogram:new(),
    Few = start(Way, ?WARM_UP_SIZE, false, Histogram),
    #{lost := 0} = bench_open_loop:run((load())#{schedule => {steady, ?EACH * ?WARM_UP_SIZE}, seconds => ?WARM_UP_SECONDS}),
    ok = bench_population:stop(Few),
    %% What the warm-up has left is returned to the operating system a little later.
    ok = timer:sleep(?SETTLE_MS),
    Base = bench_peer:resident(),
    _ = start(Way, Size, Ramp, Histogram),
    Base.


%% The load without its schedule is kept where senders read it without a copy.
-spec start(way(), pos_integer(), boolean(), bench_histogram:histogram()) -> bench_population:population().
start(Way, Size, Ramp, Histogram) ->
    {_, Processes} = Population = bench_population:start(Size, fun() -> bench_open_loop:receiver(Histogram) end),
    Connections = bench_population:visited(Processes),
    ok = persistent_term:put(?MODULE,
                             #{
                               stripes => bench_open_loop:stripes(Connections),
                               histogram => Histogram,
                               send => fun(Batch, Due) -> bench_senders:offer(Way, Batch, Due) end,
                               connect => fun(Connection) -> connect(Way, Connection) end,
                               through => [ whereis(bench_baseline) || Way =:= classic ]
                              }),
    Ramp orelse connect_all(),
    Population.


-spec load() -> map().
load() ->
    persistent_term:get(?MODULE).


%% A route to a server that is not registered is accepted and leads nowhere, as in erlmcp itself. So those that a ramp has
%% not come to must be registered before the next stage.
-spec connect_all() -> ok.
connect_all() ->
    #{stripes := Stripes, connect := Connect} = load(),
    lists:foreach(fun(Stripe) -> lists:foreach(Connect, tuple_to_list(Stripe)) end, Stripes).


%% A connection is a server and its own transport. It may have been registered before.
-spec connect(way(), bench_senders:connection()) -> ok.
connect(native, Connection) -> connect_in(erlmcp_registry, Connection);
connect(classic, Connection) -> connect_in(bench_baseline, Connection);
connect(bare, _Connection) -> ok.


-spec connect_in(erlmcp_registry | bench_baseline, bench_senders:connection()) -> ok.
connect_in(Registry, {Id, Pid, Transport}) ->
    Config = bench_population:small_config(),
    case Registry:register_server(Id, Pid, Config) of
        ok -> ok = Registry:register_transport(Transport, Pid, Config#{server_id => Id});
        {error, already_registered} -> ok
    end.


-spec turn(plan(), pos_integer()) -> {bench_open_loop:result(), samples()}.
turn(#{connections := Size, stage := Stage, rate := Rate, seconds := Seconds, turns := Turns}, Turn) ->
    Stage =:= ramp orelse connect_all(),
    Turn =:= 1 andalso erlmcp_circuit_breaker:reset(),
    Schedule = case Stage of
                   ramp -> {ramp, Rate, Seconds * Turns};
                   _ -> {steady, Rate}
               end,
    Sampler = start_sampler(),
    Result = bench_open_loop:run((load())#{
                                   schedule => Schedule,
                                   from => Seconds * (Turn - 1),
                                   seconds => Seconds,
                                   priority => normal,
                                   max_backlog => max_backlog(Size, Rate),
                                   max_seconds => ?MAX_OVERRUN * Seconds,
                                   give_up_ms => ?GIVE_UP_MS
                                  }),
    Samples = stop_sampler(Sampler),
    %% Samplers of mailboxes would run in the turn of another way.
    ok = bench_samplers:await_idle(),
    {Result, Samples}.


-spec max_backlog(pos_integer(), pos_integer()) -> pos_integer().
max_backlog(Size, Rate) ->
    lists:min([?BACKLOG_OF_ANY_MEMORY, max(?MOST_BACKLOG, ?BACKLOG_A_CONNECTION * Size), max(?LEAST_BACKLOG, Rate)]).


%%% Samples during a turn


-spec start_sampler() -> pid().
start_sampler() ->
    Asking = self(),
    Sampler = spawn_opt(fun() ->
                                _ = erlang:system_monitor(self(), [{long_gc, ?LONG_GC_MS}]),
                                Asking ! {self(), started},
                                sampler(#{
                                          resident => bench_peer:resident_now(),
                                          run_queue_max => 0,
                                          run_queue_sum => 0,
                                          samples => 0,
                                          long_gcs => 0,
                                          longest_gc_ms => 0
                                         })
                        end,
                        [link, {priority, high}]),
    receive {Sampler, started} -> Sampler end.


-spec sampler(samples()) -> {pid(), samples()}.
sampler(#{long_gcs := Gcs, longest_gc_ms := Longest} = Samples) ->
    receive
        {monitor, _Pid, long_gc, Info} ->
            {timeout, Ms} = lists:keyfind(timeout, 1, Info),
            sampler(Samples#{long_gcs => Gcs + 1, longest_gc_ms => max(Ms, Longest)});
        {stop, Asking} ->
            _ = erlang:system_monitor(undefined),
            Asking ! {self(), sampled(Samples)}
    after
        ?LOOK_MS ->
            sampler(sampled(Samples))
    end.


-spec sampled(samples()) -> samples().
sampled(#{resident := Resident, run_queue_max := Max, run_queue_sum := Sum, samples := Number} = Samples) ->
    Waiting = erlang:statistics(total_run_queue_lengths),
    Samples#{
      resident => max(bench_peer:resident_now(), Resident),
      run_queue_max => max(Waiting, Max),
      run_queue_sum => Sum + Waiting,
      samples => Number + 1
     }.


-spec stop_sampler(pid()) -> samples().
stop_sampler(Sampler) ->
    Sampler ! {stop, self()},
    receive {Sampler, Samples} -> Samples end.
