%%% An open loop: messages are due at times that do not depend on earlier messages.
%%%
%%% One generator per scheduler has messages due every millisecond, for its share of the connections in turn, whether
%%% or not earlier ones have arrived. Each message carries the time at which it was *due*, and its latency counts from
%%% then. A generator that is late sends all due messages at once: nothing is skipped or put off because the system was
%%% too busy (no coordinated omission).
%%%
%%% Generators run at high priority by default, as load from outside would.
%%%
%%% The VM's timers wake a process up to about a millisecond late, which affects all figures alike.
%%%
%%% <ul>
%%% <li>*Offered* is what was sent until 50 ms after the end of the schedule. Where the machine is too slow for the schedule
%%% that is less than what was *asked* for.</li>
%%% <li>*Delivered* is what was received until then: a message of the last tick is under way at the end, and in time.</li>
%%% <li>*Lost* is a message that was sent and not refused, and is not received although all mailboxes on its way
%%% are empty, or within `give_up_ms' after the last message was sent.</li>
%%% </ul>
%%%
%%% Generators stop early when more than `max_backlog' messages wait to be received, so that no mailbox grows without
%%% bound, and after `max_seconds'.
-module(bench_open_loop).

-export([run/1, merged/1, is_offered/1]).
-export([stripes/1, receiver/1, sleep_until/1]).

-export_type([load/0, result/0, schedule/0]).

-type load() :: #{
                  % The connections of each generator.
                  stripes := [tuple(), ...],
                  histogram := bench_histogram:histogram(),
                  schedule := schedule(),
                  % The part of the schedule that is run, in seconds.
                  from => float(),
                  seconds := float(),
                  % Sends messages that are due at this time, and returns the reason for each that was refused.
                  send := fun(([bench_senders:connection()], Due :: integer()) -> [Reason :: term()]),
                  % Called for each connection of a ramp before it is sent anything.
                  connect => fun((bench_senders:connection()) -> term()),
                  % Processes that messages pass on their way to the receivers.
                  through => [pid()],
                  % Of the generators.
                  priority => normal | high,
                  max_backlog => pos_integer() | infinity,
                  max_seconds => float() | infinity,
                  give_up_ms => pos_integer()
                 }.
%% Messages per second to all connections. A ramp begins without connections and has all of them after `Seconds'.
-type schedule() :: {steady, Rate :: number()} | {ramp, Rate :: number(), Seconds :: float()}.
-type result() :: #{
                    % As planned, until the look at what was offered and delivered, and until the last message was received.
                    seconds := float(),
                    window_seconds := float(),
                    drain_seconds := float(),
                    asked := non_neg_integer(),
                    offered := non_neg_integer(),
                    delivered := non_neg_integer(),
                    % Refused messages included.
                    sent := non_neg_integer(),
                    refused := #{Reason :: term() => pos_integer()},
                    received := non_neg_integer(),
                    lost := non_neg_integer(),
                    % The most messages that were seen to wait.
                    backlog := non_neg_integer(),
                    % Why the generators stopped early.
                    stopped := no | backlog | late,
                    latencies := bench_histogram:counts()
                   }.

-record(generator, {
          %% Of all generators.
          number :: pos_integer(),
          stripe :: tuple(),
          schedule :: schedule(),
          from_us :: non_neg_integer(),
          start :: integer(),
          tick :: pos_integer(),
          send :: fun(([bench_senders:connection()], integer()) -> [term()]),
          connect :: fun((bench_senders:connection()) -> term()),
          control :: atomics:atomics_ref(),
          %% Since the begin of the schedule.
          sent :: non_neg_integer(),
          connected :: non_neg_integer(),
          next = 1 :: pos_integer(),
          refused = #{} :: #{term() => pos_integer()}
         }).
-record(watch, {
          histogram :: bench_histogram:histogram(),
          control :: atomics:atomics_ref(),
          start :: integer(),
          %% The end of the time in which messages count as delivered.
          in_time :: integer(),
          max_backlog :: pos_integer() | infinity,
          %% In native units, after the start.
          max_time :: integer() | infinity,
          backlog = 0 :: non_neg_integer(),
          stopped = no :: no | backlog | late,
          %% What was sent and received at which time.
          window :: {non_neg_integer(), non_neg_integer(), integer()} | undefined,
          refused = #{} :: #{term() => pos_integer()}
         }).

-define(TICK_US, 1000).
%% Messages that a generator sends between two looks at whether to stop.
-define(CHUNK,         500).
-define(TOLERANCE,     0.95).
-define(RUN_UP_MS,     100).
-define(LOOK_MS,       20).
-define(DRAIN_LOOK_MS, 2).
-define(IN_TIME_MS,    50).
-define(GIVE_UP_MS,    30_000).
%% How long nothing must have been received before all mailboxes are looked at.
-define(STILL_MS, 500).

%% In the control.
-define(STOP,    1).
-define(SENT,    2).
-define(REFUSED, 3).


%% Returns when every message has been received, refused or lost. The caller has high priority meanwhile.
-spec run(load()) -> result().
run(#{stripes := Stripes, histogram := Histogram, seconds := Seconds} = Load) ->
    ok = bench_histogram:clear(Histogram),
    Control = atomics:new(3, []),
    %% The generators are running, and have their connections, before the first message is due.
    Start = erlang:monotonic_time() + native_ms(?RUN_UP_MS),
    Priority = process_flag(priority, high),
    Generators = maps:from_list([ start_generator(Stripe, Start, Control, Load) || Stripe <- Stripes ]),
    Watch = watch(Generators,
                  #watch{
                    histogram = Histogram,
                    control = Control,
                    start = Start,
                    in_time = Start + native_ms(Seconds * 1000 + ?IN_TIME_MS),
                    max_backlog = maps:get(max_backlog, Load, infinity),
                    max_time = case Load of
                                   #{max_seconds := Max} when Max =/= infinity -> native_ms(Max * 1000);
                                   _ -> infinity
                               end
                   }),
    Pids = maps:get(through, Load, []) ++ [ Pid || Stripe <- Stripes, {_, Pid, _} <- tuple_to_list(Stripe) ],
    GiveUp = erlang:monotonic_time() + native_ms(maps:get(give_up_ms, Load, ?GIVE_UP_MS)),
    Drained = await(accepted(Control), Pids, GiveUp, {0, erlang:monotonic_time()}, Watch),
    high = process_flag(priority, Priority),
    result(Load, erlang:monotonic_time(), Drained).


-spec result(load(), integer(), #watch{}) -> result().
result(#{stripes := Stripes, seconds := Seconds, schedule := Schedule} = Load,
       Drained,
       #watch{histogram = Histogram, control = Control, start = Start, in_time = InTime, stopped = Stopped, window = {Offered, Delivered, At}} =
           Watch) ->
    Number = length(Stripes),
    From = from_us(Load),
    Received = bench_histogram:total(Histogram),
    Accepted = accepted(Control),
    #{
      seconds => Seconds,
      window_seconds => if
                            At >= InTime, Delivered < Accepted -> max(Seconds, bench_report:seconds(At - native_ms(?IN_TIME_MS) - Start));
                            Stopped =:= no -> Seconds;
                            true -> bench_report:seconds(At - Start)
                        end,
      drain_seconds => bench_report:seconds(Drained - Start),
      asked => Number * (owed(From + round(Seconds * 1_000_000), Schedule, Number) - owed(From, Schedule, Number)),
      sent => atomics:get(Control, ?SENT),
      refused => Watch#watch.refused,
      offered => Offered,
      delivered => Delivered,
      received => Received,
      lost => max(0, Accepted - Received),
      backlog => Watch#watch.backlog,
      stopped => Stopped,
      latencies => bench_histogram:counts(Histogram)
     }.


%% One result of several parts of a schedule, or of several runs.
-spec merged([result(), ...]) -> result().
merged([Result]) ->
    Result;
merged([First, Second | Others]) ->
    merged([maps:merge_with(fun(refused, One, Other) -> added(One, Other);
                               (latencies, One, Other) -> bench_histogram:merged([One, Other]);
                               (stopped, no, Other) -> Other;
                               (stopped, One, _Other) -> One;
                               (backlog, One, Other) -> max(One, Other);
                               (_Sum, One, Other) -> One + Other
                            end,
                            First,
                            Second) | Others]).


-spec added(Refused, Refused) -> Refused when Refused :: #{term() => pos_integer()}.
added(Some, Others) ->
    maps:merge_with(fun(_Reason, One, Other) -> One + Other end, Some, Others).


%% Whether what was asked for was offered, but for a twentieth. The generators were too slow otherwise, and the result says
%% little about what receives the messages.
-spec is_offered(result()) -> boolean().
is_offered(#{asked := Asked, seconds := Seconds, offered := Offered, window_seconds := Window}) ->
    Offered / Window >= ?TOLERANCE * Asked / Seconds.


%% The messages that were sent and not refused.
-spec accepted(atomics:atomics_ref()) -> integer().
accepted(Control) ->
    atomics:get(Control, ?SENT) - atomics:get(Control, ?REFUSED).


%%% The watch over the generators


%% Returns when all generators have stopped.
-spec watch(#{reference() => pid()}, #watch{}) -> #watch{}.
watch(Generators, Watch) when map_size(Generators) =:= 0 ->
    Watch;
watch(Generators, #watch{refused = Refused} = Watch) ->
    receive
        {'DOWN', Monitor, process, _, {offered, Reasons}} when is_map_key(Monitor, Generators) ->
            watch(maps:remove(Monitor, Generators), looked(Watch#watch{refused = added(Reasons, Refused)}));
        {'DOWN', Monitor, process, _, Reason} when is_map_key(Monitor, Generators) ->
            error(Reason)
    after
        ?LOOK_MS ->
            watch(Generators, looked(Watch))
    end.


-spec looked(#watch{}) -> #watch{}.
looked(#watch{histogram = Histogram, control = Control, start = Start, stopped = Stopped} = Watch) ->
    Received = bench_histogram:total(Histogram),
    Now = erlang:monotonic_time(),
    Backlog = max(0, accepted(Control) - Received),
    Seen = Watch#watch{backlog = max(Backlog, Watch#watch.backlog)},
    %% Any atom is greater than a number.
    if
        Stopped =:= no, Backlog > Watch#watch.max_backlog -> stop(backlog, Received, Now, Seen);
        Stopped =:= no, Now - Start > Watch#watch.max_time -> stop(late, Received, Now, Seen);
        Now >= Watch#watch.in_time -> delivered(Received, Now, Seen);
        true -> Seen
    end.


-spec stop(backlog | late, non_neg_integer(), integer(), #watch{}) -> #watch{}.
stop(Why, Received, Now, #watch{control = Control} = Watch) ->
    ok = atomics:put(Control, ?STOP, 1),
    delivered(Received, Now, Watch#watch{stopped = Why}).


%% The first look counts: a stop, or the end.
-spec delivered(non_neg_integer(), integer(), #watch{}) -> #watch{}.
delivered(Received, Now, #watch{window = undefined, control = Control} = Watch) ->
    Watch#watch{window = {atomics:get(Control, ?SENT), Received, Now}};
delivered(_Received, _Now, Watch) ->
    Watch.


%% Returns when all have been received or the others are lost. A receiver handles its last message after it has taken
%% it out of its mailbox, so all mailboxes must have been empty for some time.
-spec await(non_neg_integer(), [pid()], integer(), {non_neg_integer(), Since :: integer()}, #watch{}) -> #watch{}.
await(Accepted, Pids, GiveUp, {Former, Since}, #watch{histogram = Histogram} = Watch) ->
    Received = bench_histogram:total(Histogram),
    Now = erlang:monotonic_time(),
    Seen = case Now >= Watch#watch.in_time of
               true -> delivered(Received, Now, Watch);
               false -> Watch
           end,
    case Received of
        Enough when Enough >= Accepted ->
            delivered(Received, Now, Seen);
        _ when Now > GiveUp ->
            delivered(Received, Now, Seen);
        Former ->
            ok = timer:sleep(?DRAIN_LOOK_MS),
            case Now - Since > native_ms(?STILL_MS) andalso lists:all(fun is_idle/1, Pids) of
                true -> delivered(Received, Now, Seen);
                false -> await(Accepted, Pids, GiveUp, {Former, Since}, Seen)
            end;
        More ->
            ok = timer:sleep(?DRAIN_LOOK_MS),
            await(Accepted, Pids, GiveUp, {More, Now}, Seen)
    end.


%% With an empty mailbox, and waiting for a message.
-spec is_idle(pid()) -> boolean().
is_idle(Pid) ->
    case process_info(Pid, [message_queue_len, status]) of
        [{message_queue_len, 0}, {status, waiting}] -> true;
        undefined -> true;
        _ -> false
    end.


%%% Generators


%% The connections of the generators: every N-th of the list, which must not be empty.
-spec stripes([bench_senders:connection()]) -> [tuple(), ...].
stripes(Connections) ->
    Number = min(erlang:system_info(schedulers_online), length(Connections)),
    Numbered = lists:enumerate(Connections),
    [ list_to_tuple([ Connection || {N, Connection} <- Numbered, N rem Number =:= Rest ])
      || Rest <- lists:seq(0, Number - 1) ].


-spec start_generator(tuple(), integer(), atomics:atomics_ref(), load()) -> {reference(), pid()}.
start_generator(Stripe, Start, Control, #{stripes := Stripes, schedule := Schedule, seconds := Seconds, send := Send} = Load) ->
    Number = length(Stripes),
    From = from_us(Load),
    Generator = #generator{
                  number = Number,
                  stripe = Stripe,
                  schedule = Schedule,
                  from_us = From,
                  start = Start,
                  tick = erlang:convert_time_unit(?TICK_US, microsecond, native),
                  send = Send,
                  connect = maps:get(connect, Load, fun(_Connection) -> ok end),
                  control = Control,
                  sent = owed(From, Schedule, Number),
                  connected = connected(From, Schedule, tuple_size(Stripe))
                 },
    Ticks = round(Seconds * 1_000_000 / ?TICK_US),
    {Pid, Monitor} = spawn_opt(fun() -> generate(1, Ticks, Generator) end, [monitor, {priority, maps:get(priority, Load, high)}]),
    {Monitor, Pid}.


-spec from_us(load()) -> non_neg_integer().
from_us(Load) ->
    round(maps:get(from, Load, 0.0) * 1_000_000).


-spec generate(pos_integer(), pos_integer(), #generator{}) -> no_return().
generate(Tick, Ticks, #generator{refused = Refused}) when Tick > Ticks ->
    exit({offered, Refused});
generate(Tick, Ticks, #generator{start = Start, tick = Length, from_us = From, schedule = Schedule} = Generator) ->
    Due = Start + Tick * Length,
    ok = sleep_until(Due),
    At = From + Tick * ?TICK_US,
    Connected = connect(connected(At, Schedule, tuple_size(Generator#generator.stripe)), Generator),
    Owed = owed(At, Schedule, Generator#generator.number),
    generate(Tick + 1, Ticks, offer(Owed - Connected#generator.sent, Due, Connected)).


%% Messages of one generator that are due up to a time of the schedule.
-spec owed(AtUs :: non_neg_integer(), schedule(), Generators :: pos_integer()) -> non_neg_integer().
owed(At, {steady, Rate}, Number) ->
    trunc(Rate * At / 1_000_000 / Number);
%% The integral of a rate that rises from zero.
owed(At, {ramp, Rate, Seconds}, Number) ->
    trunc(Rate * At / 1_000_000 * At / (2_000_000 * Seconds) / Number).


%% Connections of a stripe of this size that are there at a time of the schedule.
-spec connected(AtUs :: non_neg_integer(), schedule(), pos_integer()) -> non_neg_integer().
connected(_At, {steady, _Rate}, Size) -> Size;
connected(At, {ramp, _Rate, Seconds}, Size) -> min(Size, ceil(Size * At / (1_000_000 * Seconds))).


-spec connect(non_neg_integer(), #generator{}) -> #generator{}.
connect(To, #generator{connected = To} = Generator) ->
    Generator;
connect(To, #generator{connected = Connected, stripe = Stripe, connect = Connect} = Generator) ->
    _ = Connect(element(Connected + 1, Stripe)),
    connect(To, Generator#generator{connected = Connected + 1}).


-spec offer(non_neg_integer(), integer(), #generator{}) -> #generator{} | no_return().
offer(0, _Due, Generator) ->
    Generator;
offer(Left, Due, #generator{stripe = Stripe, connected = Connected, next = Next, control = Control, send = Send} = Generator) ->
    atomics:get(Control, ?STOP) =:= 0 orelse exit({offered, Generator#generator.refused}),
    Number = min(Left, ?CHUNK),
    {Batch, After} = take(Number, Next, Connected, Stripe, []),
    Refused = Send(Batch, Due),
    Refused =:= [] orelse atomics:add(Control, ?REFUSED, length(Refused)),
    ok = atomics:add(Control, ?SENT, Number),
    offer(Left - Number,
          Due,
          Generator#generator{
            sent = Generator#generator.sent + Number,
            next = After,
            refused = lists:foldl(fun counted/2, Generator#generator.refused, Refused)
           }).


-spec counted(term(), Refused) -> Refused when Refused :: #{term() => pos_integer()}.
counted(Reason, Refused) ->
    maps:update_with(Reason, fun(Number) -> Number + 1 end, 1, Refused).


%% The next connections in turn, among the first `Connected'.
-spec take(non_neg_integer(), pos_integer(), pos_integer(), tuple(), [bench_senders:connection()]) ->
          {[bench_senders:connection()], pos_integer()}.
take(0, Next, _Connected, _Stripe, Batch) -> {Batch, Next};
take(Number, Next, Connected, Stripe, Batch) when Next > Connected -> take(Number, 1, Connected, Stripe, Batch);
take(Number, Next, Connected, Stripe, Batch) -> take(Number - 1, Next + 1, Connected, Stripe, [element(Next, Stripe) | Batch]).


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


-spec native_ms(number()) -> integer().
native_ms(Ms) ->
    erlang:convert_time_unit(round(Ms * 1000), microsecond, native).


%%% Receivers


%% Receives messages that carry the time at which they were due.
-spec receiver(bench_histogram:histogram()) -> no_return().
receiver(Histogram) ->
    receiver(Histogram, erlang:convert_time_unit(1, microsecond, native)).


-spec receiver(bench_histogram:histogram(), pos_integer()) -> no_return().
receiver(Histogram, Microsecond) ->
    receive
        {mcp_message, _Transport, Due} ->
            ok = bench_histogram:add(Histogram, (erlang:monotonic_time() - Due) div Microsecond),
            receiver(Histogram, Microsecond)
    end.
