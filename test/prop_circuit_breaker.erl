%%% The named circuit breaker against a model. Histories are random: calls, some of which overlap others,
%%% resets, forced states, killed callers, and the expiry of the open state.
%%%
%%% Time. The breaker's own timeout is an hour; a history ends the open state by a command.
%%%
%%% Model. The state, the outcomes since each counter was last reset, and the calls in progress. Every figure is
%%% computed from the lists of outcomes on request.
-module(prop_circuit_breaker).

-include_lib("proper/include/proper.hrl").

-export([prop_named/1, labels/0]).

-define(WORKERS,     [1, 2, 3, 4, 5, 6]).
-define(DEADLINE_MS, 2000).

-record(model, {
          config :: map(),
          state = closed :: closed | open | half_open,
          % The current period. Outcomes of calls from other periods are stale.
          period = 0 :: non_neg_integer(),
          % Worker => the period of its call, and whether the call holds a slot.
          running = #{} :: #{1..6 => {non_neg_integer(), slot | no_slot}},
          % Outcomes since the counter was last reset, newest first.
          window = [] :: [boolean()],
          row_of_failures = [] :: [boolean()],
          row_of_successes = [] :: [boolean()],
          successes = 0 :: non_neg_integer(),
          failures = 0 :: non_neg_integer(),
          rejected = 0 :: non_neg_integer(),
          has_failed = false :: boolean()
         }).


%% A run must have seen all of these for its success to be meaningful.
labels() ->
    [opened_by_row,
     opened_by_rate,
     opened_by_probe,
     opened_by_force,
     half_opened,
     closed_by_probes,
     closed_by_force,
     closed_by_reset,
     refused_open,
     refused_at_the_limit,
     stale_success,
     stale_failure,
     stale_probe_in_half_open,
     killed_in_closed,
     killed_in_half_open,
     reset_in_closed].


%% `Seen' is a public table that collects the labels of what happened.
prop_named(Seen) ->
    ?FORALL({Config, History},
            {config(), list(command())},
            begin
                {ok, Breaker} = erlmcp_circuit_breaker:start_link({prop, make_ref()}, Config),
                Workers = maps:from_list([ {W, spawn_link(fun() -> worker(Breaker) end)} || W <- ?WORKERS ]),
                {ok, #{config := Full}} = erlmcp_circuit_breaker:get_stats(Breaker),
                Result = run(History, Breaker, Workers, #model{config = Full}, Seen, 1),
                unlink(Breaker),
                ok = erlmcp_circuit_breaker:stop(Breaker),
                ?WHENFAIL(io:format(user, "~p~n~p~n~p~n", [Config, History, Result]), Result =:= ok)
            end).


config() ->
    ?LET({F, S, W, R, L},
         {range(1, 6), range(1, 3), range(1, 6), oneof([0.3, 0.5, 1, 1.0]), oneof([default, range(1, 3)])},
         begin
             Config = #{
                        failure_threshold => F,
                        success_threshold => S,
                        window_size => W,
                        failure_rate_threshold => R,
                        timeout => 3600000
                       },
             case L of
                 default -> Config;
                 _ -> Config#{probe_limit => L}
             end
         end).


command() ->
    frequency([{10, {call, outcome()}},
               {10, {start, worker()}},
               {8, {finish, worker(), outcome()}},
               {2, {kill, worker()}},
               {6, elapse},
               {1, reset},
               {1, force_open},
               {1, force_close}]).


worker() -> oneof(?WORKERS).


outcome() -> oneof([ok, other, error, throw, exit]).


%%% Run


run([], _Breaker, Workers, _Model, _Seen, _Step) ->
    _ = [ begin
              unlink(W),
              exit(W, kill)
          end || W <- maps:values(Workers) ],
    ok;
run([Command | Rest], Breaker, Workers0, Model0, Seen, Step) ->
    {Expected, Model, Labels} = model(Command, Model0),
    _ = [ ets:insert(Seen, {L}) || L <- Labels ],
    {Actual, Workers} = perform(Command, Breaker, Workers0, Model0),
    Deadline = erlang:monotonic_time(millisecond) + ?DEADLINE_MS,
    case Expected =:= Actual andalso compare(Command, Breaker, figures(Model), Deadline) of
        true -> run(Rest, Breaker, Workers, Model, Seen, Step + 1);
        false -> {step, Step, Command, {result, Expected, Actual}, {figures, figures(Model)}, {differs, Breaker}};
        Differs -> {step, Step, Command, Differs}
    end.


%% The breaker notices a caller's exit asynchronously.
compare({kill, _} = Command, Breaker, Expected, Deadline) ->
    case compare(other, Breaker, Expected, Deadline) of
        true ->
            true;
        Differs ->
            case erlang:monotonic_time(millisecond) < Deadline of
                true ->
                    timer:sleep(1),
                    compare(Command, Breaker, Expected, Deadline);
                false ->
                    Differs
            end
    end;
compare(_Command, Breaker, Expected, _Deadline) ->
    {ok, Stats} = erlmcp_circuit_breaker:get_stats(Breaker),
    Actual = (maps:with(maps:keys(Expected), Stats))#{
               has_failed => maps:get(last_failure_time, Stats) =/= undefined
              },
    Actual =:= Expected orelse {expected, Expected, actual, Actual}.


perform({call, Outcome}, Breaker, Workers, _Model) ->
    {erlmcp_circuit_breaker:call(Breaker, fun() -> act(Outcome) end), Workers};
perform({start, W}, _Breaker, Workers, #model{running = Running}) when is_map_key(W, Running) ->
    {none, Workers};
perform({start, W}, _Breaker, Workers, _Model) ->
    #{W := Pid} = Workers,
    Pid ! {start, self()},
    receive {Pid, Started} -> {Started, Workers} end;
perform({finish, W, Outcome}, _Breaker, Workers, #model{running = Running}) when is_map_key(W, Running) ->
    #{W := Pid} = Workers,
    Pid ! {finish, Outcome},
    receive {Pid, Result} -> {Result, Workers} end;
perform({kill, W}, Breaker, Workers, #model{running = Running}) when is_map_key(W, Running) ->
    #{W := Pid} = Workers,
    unlink(Pid),
    exit(Pid, kill),
    {none, Workers#{W := spawn_link(fun() -> worker(Breaker) end)}};
perform(elapse, Breaker, Workers, #model{state = open}) ->
    ok = erlmcp_circuit_breaker:force_half_open(Breaker),
    {none, Workers};
perform(Force, Breaker, Workers, _Model) when Force =:= reset; Force =:= force_open; Force =:= force_close ->
    {erlmcp_circuit_breaker:Force(Breaker), Workers};
perform(_Impossible, _Breaker, Workers, _Model) ->
    {none, Workers}.


worker(Breaker) ->
    receive
        {start, Parent} ->
            Self = self(),
            Result = erlmcp_circuit_breaker:call(
                       Breaker,
                       fun() ->
                               Parent ! {Self, started},
                               receive {finish, Outcome} -> act(Outcome) end
                       end,
                       infinity),
            Parent ! {Self, Result},
            worker(Breaker)
    end.


act(ok) -> {ok, 1};
act(other) -> {error, two, words};
act(error) -> {error, reason};
act(throw) -> throw(ball);
act(exit) -> exit(door).


%%% Model


result(ok) -> {ok, 1};
result(other) -> {error, two, words};
result(error) -> {error, reason};
result(throw) -> {error, {exception, throw, ball}};
result(exit) -> {error, {exception, exit, door}}.


is_success(Outcome) -> Outcome =:= ok orelse Outcome =:= other.


figures(#model{config = #{window_size := Size}} = M) ->
    Window = lists:sublist(M#model.window, Size),
    #{
      state => M#model.state,
      consecutive_failures => row(false, M#model.row_of_failures),
      consecutive_successes => row(true, M#model.row_of_successes),
      total_calls => M#model.successes + M#model.failures + M#model.rejected,
      total_successes => M#model.successes,
      total_failures => M#model.failures,
      total_rejected => M#model.rejected,
      failure_rate => failure_rate(Window),
      has_failed => M#model.has_failed
     }.


row(Wanted, Outcomes) -> length(lists:takewhile(fun(O) -> O =:= Wanted end, Outcomes)).


failure_rate([]) -> 0.0;
failure_rate(Window) -> length([ x || false <- Window ]) / length(Window).


%% The result, the next model, and the labels of what happened.
model({call, Outcome}, Model) ->
    case permit(Model) of
        {granted, Slot} ->
            {Concluded, Labels} = conclude(is_success(Outcome), Slot, Model),
            {result(Outcome), Concluded, Labels};
        {refused, Label} ->
            {{error, circuit_breaker_open}, refuse(Model), [Label]}
    end;
model({start, W}, #model{running = Running} = Model) when is_map_key(W, Running) ->
    {none, Model, []};
model({start, W}, #model{running = Running} = Model) ->
    case permit(Model) of
        {granted, Slot} -> {started, Model#model{running = Running#{W => Slot}}, []};
        {refused, Label} -> {{error, circuit_breaker_open}, refuse(Model), [Label]}
    end;
model({finish, W, Outcome}, #model{running = Running} = Model) when is_map_key(W, Running) ->
    {Slot, Others} = maps:take(W, Running),
    {Concluded, Labels} = conclude(is_success(Outcome), Slot, Model#model{running = Others}),
    {result(Outcome), Concluded, Labels};
model({kill, W}, #model{running = Running, state = State} = Model) when is_map_key(W, Running) ->
    {Slot, Others} = maps:take(W, Running),
    {Concluded, Labels} = conclude(false, Slot, Model#model{running = Others}),
    Killed = [ L || {S, L} <- [{closed, killed_in_closed}, {half_open, killed_in_half_open}],
                    S =:= State,
                    element(1, Slot) =:= Model#model.period ],
    {none, Concluded, Killed ++ Labels};
model(elapse, #model{state = open} = Model) ->
    {none,
     (begin_period(half_open, Model))#model{row_of_failures = [], row_of_successes = []},
     [half_opened]};
model(reset, #model{state = State} = Model) ->
    Label = case State of
                closed -> reset_in_closed;
                _ -> closed_by_reset
            end,
    {ok, (close(Model))#model{row_of_successes = [], has_failed = false}, [Label]};
model(force_open, #model{state = open} = Model) ->
    {ok, Model, []};
model(force_open, Model) ->
    {ok, open(Model), [opened_by_force]};
model(force_close, #model{state = closed} = Model) ->
    {ok, Model, []};
model(force_close, Model) ->
    {ok, close(Model), [closed_by_force]};
model(_Impossible, Model) ->
    {none, Model, []}.


permit(#model{state = closed, period = Period}) ->
    {granted, {Period, no_slot}};
permit(#model{state = open}) ->
    {refused, refused_open};
permit(#model{state = half_open, period = Period, running = Running, config = #{probe_limit := Limit}}) ->
    case length([ x || {_, slot} <- maps:values(Running) ]) < Limit of
        true -> {granted, {Period, slot}};
        false -> {refused, refused_at_the_limit}
    end.


refuse(#model{rejected = N} = Model) -> Model#model{rejected = N + 1}.


conclude(Success, {Period, Slot}, Model0) ->
    Model = case Success of
                true -> Model0#model{successes = Model0#model.successes + 1};
                false -> Model0#model{failures = Model0#model.failures + 1}
            end,
    case Model of
        #model{period = Period} ->
            count(Success, Model);
        #model{state = State} ->
            Label = case Success of
                        true -> stale_success;
                        false -> stale_failure
                    end,
            {Model, [Label | [ stale_probe_in_half_open || State =:= half_open, Slot =:= slot ]]}
    end.


count(Success, #model{config = Config} = Model0) ->
    Model = Model0#model{
              window = [Success | Model0#model.window],
              row_of_failures = [Success | Model0#model.row_of_failures],
              row_of_successes = [Success | Model0#model.row_of_successes],
              has_failed = Model0#model.has_failed orelse not Success
             },
    #{
      failure_threshold := Failures,
      success_threshold := Successes,
      window_size := Size,
      failure_rate_threshold := Rate
     } = Config,
    Window = lists:sublist(Model#model.window, Size),
    case Model#model.state of
        half_open when not Success ->
            {open(Model), [opened_by_probe]};
        half_open ->
            case row(true, Model#model.row_of_successes) >= Successes of
                true -> {close(Model), [closed_by_probes]};
                false -> {Model, []}
            end;
        closed when Success ->
            {Model, []};
        closed ->
            case {row(false, Model#model.row_of_failures) >= Failures,
                  length(Window) =:= Size andalso failure_rate(Window) >= Rate} of
                {true, _} -> {open(Model), [opened_by_row]};
                {false, true} -> {open(Model), [opened_by_rate]};
                {false, false} -> {Model, []}
            end
    end.


open(Model) -> (begin_period(open, Model))#model{row_of_successes = []}.


close(Model) -> (begin_period(closed, Model))#model{row_of_failures = [], window = []}.


begin_period(State, #model{period = Period} = Model) -> Model#model{state = State, period = Period + 1}.
