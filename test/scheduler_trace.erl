%%% Measures for how long a call holds normal schedulers.
%%%
%%% A native function may move to a dirty scheduler, so the duration of a call is not the time for which it
%%% keeps other processes from running. The VM's trace of scheduling tells the two apart: a dirty scheduler has
%%% the number 0 there.
-module(scheduler_trace).

-export([start/0, held_us/1]).

-type event() :: {in | out, Scheduler :: non_neg_integer(), Time :: integer()}.


%% @doc Starts to trace the calling process, until it exits.
-spec start() -> ok.
start() ->
    Traced = self(),
    Tracer = spawn_link(fun() -> trace(Traced, []) end),
    1 = erlang:trace(self(),
                     true,
                     [running, scheduler_id, monotonic_timestamp, {tracer, Tracer}]),
    _ = put(?MODULE, Tracer),
    ok.


%% @doc Runs `Call' and returns the longest time, in microseconds, for which it held a normal scheduler without
%% a break. In a process that is not traced it returns the duration of the call.
-spec held_us(fun(() -> term())) -> non_neg_integer().
held_us(Call) ->
    Start = erlang:monotonic_time(),
    _ = Call(),
    End = erlang:monotonic_time(),
    Longest =
        case get(?MODULE) of
            undefined -> End - Start;
            Tracer -> longest(events(Tracer, Start, End), Start, End)
        end,
    erlang:convert_time_unit(Longest, native, microsecond).


-spec trace(pid(), [event()]) -> no_return().
trace(Traced, Events) ->
    receive
        {trace_ts, Traced, Direction, _Function, Scheduler, Time} ->
            trace(Traced, [{Direction, Scheduler, Time} | Events]);
        {events, Reference} ->
            Traced ! {Reference, Events},
            trace(Traced, [])
    end.


%% The events between two times, oldest first.
-spec events(pid(), integer(), integer()) -> [event()].
events(Tracer, Start, End) ->
    Delivered = erlang:trace_delivered(self()),
    receive {trace_delivered, _, Delivered} -> ok end,
    Reference = make_ref(),
    Tracer ! {events, Reference},
    receive
        {Reference, Events} ->
            [ Event || {_, _, Time} = Event <- lists:reverse(Events), Time >= Start, Time =< End ]
    end.


%% The caller runs on a normal scheduler at both times.
-spec longest([event()], integer(), integer()) -> integer().
longest(Events, Start, End) -> longest(Events, Start, End, 0).


-spec longest([event()], In :: integer() | none, integer(), integer()) -> integer().
longest([], In, End, Longest) -> max(Longest, End - In);
longest([{out, Scheduler, Time} | Events], In, End, Longest) when Scheduler > 0 ->
    longest(Events, none, End, max(Longest, Time - In));
longest([{in, Scheduler, Time} | Events], none, End, Longest) when Scheduler > 0 ->
    longest(Events, Time, End, Longest);
longest([{_, 0, _} | Events], none, End, Longest) ->
    longest(Events, none, End, Longest).
