%%% Measures for how long a call holds normal schedulers.
%%%
%%% A native function may move to a dirty scheduler, so the duration of a call is not the time for which it
%%% keeps other processes from running. The VM's trace of scheduling tells the two apart: a dirty scheduler has
%%% the number 0 there.
%%%
%%% On a busy machine a scheduler also waits for a processor. So a time that looks long is compared with the processor
%%% time of the scheduler's thread, where the operating system tells it (Linux).
-module(scheduler_trace).

-export([start/0, held_us/1]).

-type event() :: {in | out, Scheduler :: non_neg_integer(), Time :: integer()}.
-type held() :: #{Scheduler :: pos_integer() => Longest :: integer()}.

%% A shorter time is not compared.
-define(LONG_US, 1000).
%% After this time the processor time of every thread has been added up.
-define(TICKS_MS, 20).


%% @doc Starts to trace the calling process, until it exits.
-spec start() -> ok.
start() ->
    Traced = self(),
    Tracer = spawn_link(fun() -> trace(Traced, []) end),
    1 = erlang:trace(self(),
                     true,
                     [running, scheduler_id, monotonic_timestamp, {tracer, Tracer}]),
    _ = put(?MODULE, {Tracer, scheduler_threads()}),
    ok.


%% @doc Runs `Call' and returns the longest time, in microseconds, for which it held a normal scheduler without
%% a break. In a process that is not traced it returns the duration of the call.
-spec held_us(fun(() -> term())) -> non_neg_integer().
held_us(Call) ->
    case get(?MODULE) of
        undefined ->
            {Us, _} = timer:tc(Call),
            Us;
        {Tracer, Threads} ->
            Before = processor_times(Threads),
            Start = erlang:monotonic_time(),
            _ = Call(),
            Last = erlang:system_info(scheduler_id),
            End = erlang:monotonic_time(),
            Held = longest(events(Tracer, Start, End), Last, Start, End),
            Us = longest_us(Held),
            case Us > ?LONG_US andalso Threads =/= #{} of
                false -> Us;
                true ->
                    ok = timer:sleep(?TICKS_MS),
                    Used = maps:merge_with(fun(_, Then, Now) -> Now - Then end, Before, processor_times(Threads)),
                    longest_us(maps:map(fun(N, Time) -> min(Time, map_get(N, Used)) end, Held))
            end
    end.


-spec longest_us(held()) -> non_neg_integer().
longest_us(Held) -> erlang:convert_time_unit(lists:max([0 | maps:values(Held)]), native, microsecond).


%% The files that tell the processor time of each normal scheduler's thread. The thread's name depends on the release.
-spec scheduler_threads() -> #{Scheduler :: pos_integer() => file:fd()}.
scheduler_threads() ->
    maps:from_list(
      [ {list_to_integer(Number), Fd}
        || Folder <- filelib:wildcard("/proc/self/task/*"),
           {ok, Name} <- [file:read_file(filename:join(Folder, "comm"))],
           {match, [Number]} <- [re:run(Name, "^(?:erts_sched_)?([0-9]+)(?:_scheduler)?$", [{capture, all_but_first, list}])],
           {ok, Fd} <- [file:open(filename:join(Folder, "schedstat"), [read, raw, binary])] ]).


%% In native units, without the last few milliseconds of a thread that runs: the operating system adds them up with ticks.
-spec processor_times(#{Scheduler :: pos_integer() => file:fd()}) -> #{Scheduler :: pos_integer() => integer()}.
processor_times(Threads) -> maps:map(fun(_, Fd) -> processor_time(Fd) end, Threads).


%% It is the first field, in nanoseconds.
processor_time(Fd) ->
    {ok, Fields} = file:pread(Fd, 0, 100),
    {Ns, _} = string:to_integer(Fields),
    erlang:convert_time_unit(Ns, nanosecond, native).


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


%% For each normal scheduler the longest time. The caller runs on a normal scheduler at both times, at the end on `Last'.
-spec longest([event()], Last :: pos_integer(), integer(), integer()) -> held().
longest(Events, Last, Start, End) -> longest(Events, Last, Start, End, #{}).


-spec longest([event()], Last :: pos_integer(), In :: integer() | none, integer(), held()) -> held().
longest([], Last, In, End, Held) ->
    add(Last, End - In, Held);
longest([{out, Scheduler, Time} | Events], Last, In, End, Held) when Scheduler > 0 ->
    longest(Events, Last, none, End, add(Scheduler, Time - In, Held));
longest([{in, Scheduler, Time} | Events], Last, none, End, Held) when Scheduler > 0 ->
    longest(Events, Last, Time, End, Held);
longest([{_, 0, _} | Events], Last, none, End, Held) ->
    longest(Events, Last, none, End, Held).


-spec add(Scheduler :: pos_integer(), integer(), held()) -> held().
add(Scheduler, Time, Held) ->
    maps:update_with(Scheduler, fun(Longest) -> max(Longest, Time) end, Time, Held).
