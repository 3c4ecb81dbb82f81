%%% @private
%%% The state machine of a named circuit breaker, without process, clock or timer.
%%%
%%% Closed, it lets every call through and opens at `failure_threshold' failures in a row, or at a
%%% failure that brings the rate of failures over a full window of the last `window_size' calls to
%%% `failure_rate_threshold'. Open, it refuses. When the time is up it is half open: at most
%%% `probe_limit' probes run at a time, `success_threshold' successes close it, one failure opens it.
%%%
%%% A <em>period</em> is the time from one transition or reset to the next. A call belongs to the
%%% period that granted it, and its outcome is worth something in that period alone: an outcome that
%%% comes later counts in the totals and decides nothing.
%%%
%%% A probe keeps its slot until it ends, also beyond its period. Otherwise a breaker that opens and
%%% is half open again soon would let more probes run than the limit says.
-module(erlmcp_circuit_breaker_fsm).

-export([new/2, permit/1, conclude/4, expire/2, reset/2, force_open/2, force_close/2]).
-export([state/1, period/1, timeout/1, stats/2]).

-export_type([breaker/0, state/0, ticket/0, outcome/0, time/0]).

-type state() :: closed | open | half_open.
-type outcome() :: success | failure | withdrawn.
%% Milliseconds of any clock that never goes back.
-type time() :: integer().
%% What a call was granted: in which period, and whether it holds a slot of the half-open state.
-type ticket() :: {period(), call | probe}.
-type period() :: non_neg_integer().

-record(breaker, {
          config :: erlmcp_circuit_breaker_config:config(),
          state = closed :: state(),
          period = 0 :: period(),
          consecutive_failures = 0 :: non_neg_integer(),
          consecutive_successes = 0 :: non_neg_integer(),
          % The outcomes of the last calls, the oldest first; how many, and how many are failures.
          window = queue:new() :: queue:queue(success | failure),
          window_length = 0 :: non_neg_integer(),
          window_failures = 0 :: non_neg_integer(),
          % Slots of the half-open state that are taken.
          probes = 0 :: non_neg_integer(),
          total_successes = 0 :: non_neg_integer(),
          total_failures = 0 :: non_neg_integer(),
          total_rejected = 0 :: non_neg_integer(),
          last_failure_time = undefined :: time() | undefined,
          last_state_change :: time()
         }).

-opaque breaker() :: #breaker{}.


%% @doc A closed breaker.
-spec new(erlmcp_circuit_breaker_config:config(), time()) -> breaker().
new(Config, Now) ->
    #breaker{config = Config, last_state_change = Now}.


%% @doc Asks to let a call through. Each ticket must be brought back to {@link conclude/4} once.
-spec permit(breaker()) -> {granted, ticket(), breaker()} | {refused, breaker()}.
permit(#breaker{state = closed, period = Period} = Breaker) ->
    {granted, {Period, call}, Breaker};
permit(#breaker{state = half_open, period = Period, probes = Probes, config = #{probe_limit := Limit}} = Breaker)
  when Probes < Limit ->
    {granted, {Period, probe}, Breaker#breaker{probes = Probes + 1}};
permit(#breaker{total_rejected = Rejected} = Breaker) ->
    {refused, Breaker#breaker{total_rejected = Rejected + 1}}.


%% @doc Brings back a ticket. `withdrawn' is for a call that was not made.
-spec conclude(outcome(), ticket(), time(), breaker()) -> breaker().
conclude(Outcome, {Period, Kind}, Now, Breaker0) ->
    Breaker = count(Outcome, release(Kind, Breaker0)),
    case Breaker of
        #breaker{period = Period} when Outcome =/= withdrawn -> decide(Outcome, Now, Breaker);
        _ -> Breaker
    end.


%% @doc The time of the open state is up.
-spec expire(time(), breaker()) -> breaker().
expire(Now, #breaker{state = open} = Breaker) ->
    enter(half_open, Now, Breaker);
expire(_Now, Breaker) ->
    Breaker.


%% @doc Closes the breaker and forgets all but the totals, also if it is closed.
-spec reset(time(), breaker()) -> breaker().
reset(Now, Breaker) ->
    (enter(closed, Now, Breaker))#breaker{consecutive_successes = 0, last_failure_time = undefined}.


%% @doc Opens the breaker. An open one stays as it is, and so does the end of its time.
-spec force_open(time(), breaker()) -> breaker().
force_open(_Now, #breaker{state = open} = Breaker) -> Breaker;
force_open(Now, Breaker) -> enter(open, Now, Breaker).


%% @doc Closes the breaker. A closed one stays as it is.
-spec force_close(time(), breaker()) -> breaker().
force_close(_Now, #breaker{state = closed} = Breaker) -> Breaker;
force_close(Now, Breaker) -> enter(closed, Now, Breaker).


%% @doc The state.
-spec state(breaker()) -> state().
state(#breaker{state = State}) -> State.


%% @doc The number of the present period.
-spec period(breaker()) -> period().
period(#breaker{period = Period}) -> Period.


%% @doc How long it stays open, in milliseconds.
-spec timeout(breaker()) -> pos_integer().
timeout(#breaker{config = #{timeout := Timeout}}) -> Timeout.


%% @doc The statistics, with calls that were refused elsewhere.
-spec stats(Rejected :: non_neg_integer(), breaker()) -> map().
stats(Rejected, #breaker{config = Config, total_successes = Successes, total_failures = Failures} = Breaker) ->
    TotalRejected = Breaker#breaker.total_rejected + Rejected,
    Calls = Successes + Failures + TotalRejected,
    Config#{
      config => Config,
      state => Breaker#breaker.state,
      consecutive_failures => Breaker#breaker.consecutive_failures,
      consecutive_successes => Breaker#breaker.consecutive_successes,
      total_calls => Calls,
      total_successes => Successes,
      total_failures => Failures,
      total_rejected => TotalRejected,
      last_failure_time => Breaker#breaker.last_failure_time,
      last_state_change => Breaker#breaker.last_state_change,
      failure_rate => rate(Breaker#breaker.window_failures, Breaker#breaker.window_length),
      success_rate => rate(Successes, Calls)
     }.


-spec release(call | probe, breaker()) -> breaker().
release(call, Breaker) -> Breaker;
release(probe, #breaker{probes = Probes} = Breaker) -> Breaker#breaker{probes = Probes - 1}.


-spec count(outcome(), breaker()) -> breaker().
count(success, #breaker{total_successes = N} = Breaker) -> Breaker#breaker{total_successes = N + 1};
count(failure, #breaker{total_failures = N} = Breaker) -> Breaker#breaker{total_failures = N + 1};
count(withdrawn, Breaker) -> Breaker.


%% No ticket is granted in the open state, so an outcome of the present period finds the breaker
%% closed or half open.
-spec decide(success | failure, time(), breaker()) -> breaker().
decide(success, Now, #breaker{consecutive_successes = N} = Breaker0) ->
    Breaker = slide(success, Breaker0#breaker{consecutive_successes = N + 1, consecutive_failures = 0}),
    case Breaker of
        #breaker{state = half_open, config = #{success_threshold := Threshold}} when N + 1 >= Threshold ->
            enter(closed, Now, Breaker);
        _ ->
            Breaker
    end;
decide(failure, Now, #breaker{consecutive_failures = N} = Breaker0) ->
    Breaker = slide(failure,
                    Breaker0#breaker{
                      consecutive_failures = N + 1,
                      consecutive_successes = 0,
                      last_failure_time = Now
                     }),
    case Breaker#breaker.state =:= half_open orelse has_tripped(Breaker) of
        true -> enter(open, Now, Breaker);
        false -> Breaker
    end.


%% Asked after failures only: a success that fills the window never opens the breaker.
-spec has_tripped(breaker()) -> boolean().
has_tripped(#breaker{consecutive_failures = N, config = #{failure_threshold := Threshold}}) when N >= Threshold ->
    true;
has_tripped(#breaker{window_length = Length, window_failures = Failures, config = Config}) ->
    #{window_size := Size, failure_rate_threshold := Threshold} = Config,
    Length >= Size andalso rate(Failures, Length) >= Threshold.


-spec slide(success | failure, breaker()) -> breaker().
slide(Outcome, #breaker{window = Window0, config = #{window_size := Size}} = Breaker) ->
    Window = queue:in(Outcome, Window0),
    Failures = Breaker#breaker.window_failures + failures(Outcome),
    case Breaker#breaker.window_length of
        Size ->
            {{value, Oldest}, Rest} = queue:out(Window),
            Breaker#breaker{window = Rest, window_failures = Failures - failures(Oldest)};
        Length ->
            Breaker#breaker{window = Window, window_length = Length + 1, window_failures = Failures}
    end.


-spec failures(success | failure) -> 0 | 1.
failures(success) -> 0;
failures(failure) -> 1.


-spec rate(non_neg_integer(), non_neg_integer()) -> float().
rate(_Part, 0) -> 0.0;
rate(Part, Whole) -> Part / Whole.


%% Begins a period. Closed starts with an empty window: the failures that opened the breaker must
%% not open it again at the first one that follows.
-spec enter(state(), time(), breaker()) -> breaker().
enter(State, Now, #breaker{period = Period} = Breaker0) ->
    Breaker = Breaker0#breaker{state = State, period = Period + 1, last_state_change = Now},
    case State of
        closed ->
            Breaker#breaker{
              consecutive_failures = 0,
              window = queue:new(),
              window_length = 0,
              window_failures = 0
             };
        open ->
            Breaker#breaker{consecutive_successes = 0};
        half_open ->
            Breaker#breaker{consecutive_failures = 0, consecutive_successes = 0}
    end.
