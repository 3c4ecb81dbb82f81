%%% The processes that keep the depths of the shards true: waiting until they have nothing to do, and how much
%%% of the processors' time they take.
-module(bench_samplers).

-export([await_idle/0, percent/1]).

%% Longer than the interval of sampling.
-define(STILL_MS, 250).
-define(LOOKS,    20).


%% Returns when no shard manager has run for some time, so that what is measured next does not pay for what
%% was measured before: messages that a sample finds in a mailbox are looked at again, whoever has sent them.
-spec await_idle() -> ok.
await_idle() ->
    Now = reductions(),
    case get(?MODULE) of
        Now -> ok;
        _Former -> await_idle(Now, ?LOOKS)
    end.


-spec await_idle([integer()], non_neg_integer()) -> ok.
await_idle(_Former, 0) ->
    error(samplers_never_idle);
await_idle(Former, Left) ->
    ok = timer:sleep(?STILL_MS),
    case reductions() of
        Former ->
            _ = put(?MODULE, Former),
            ok;
        Now ->
            await_idle(Now, Left - 1)
    end.


-spec reductions() -> [integer()].
reductions() ->
    [ Reductions
      || {_, Manager, _, _} <- supervisor:which_children(erlmcp_shard_sup),
         is_pid(Manager),
         {reductions, Reductions} <- [process_info(Manager, reductions)] ].


%% Percent of the time of all schedulers that the processes of the application's supervision tree take, with
%% what these spawn, during so many milliseconds: from each scheduling in to the scheduling out, as
%% `erlang:trace/3' tells of them.
-spec percent(pos_integer()) -> float().
percent(Ms) ->
    Traced = below(whereis(erlmcp_native_sup), supervisor),
    Self = self(),
    Start = erlang:monotonic_time(),
    End = Start + erlang:convert_time_unit(Ms, millisecond, native),
    Tracer = spawn_link(fun() -> tracer(#{}, 0, End, Self) end),
    Flags = [running, exiting, set_on_spawn, monotonic_timestamp, {tracer, Tracer}],
    lists:foreach(fun(Pid) -> trace(Pid, true, Flags) end, Traced),
    ok = timer:sleep(Ms),
    %% What was spawned has a short life, and its events come after the end.
    lists:foreach(fun(Pid) -> trace(Pid, false, [running, exiting, set_on_spawn, monotonic_timestamp]) end, Traced),
    Delivered = erlang:trace_delivered(all),
    receive {trace_delivered, all, Delivered} -> ok end,
    Tracer ! stop,
    Running = receive {Tracer, Sum} -> Sum end,
    100 * Running / (End - Start) / erlang:system_info(schedulers_online).


%% One that has exited is none.
-spec trace(pid(), boolean(), [term()]) -> ok.
trace(Pid, How, Flags) ->
    try erlang:trace(Pid, How, Flags) of
        _ -> ok
    catch
        error:badarg -> ok
    end.


-spec below(pid(), worker | supervisor) -> [pid()].
below(Pid, worker) ->
    [Pid];
below(Supervisor, supervisor) ->
    [Supervisor | lists:append([ below(Pid, Type)
                                 || {_, Pid, Type, _} <- supervisor:which_children(Supervisor),
                                    is_pid(Pid) ])].


%% Sums up the times between in and out, as far as they are before the end.
-spec tracer(#{pid() => integer()}, non_neg_integer(), integer(), pid()) -> {pid(), non_neg_integer()}.
tracer(Running, Sum, End, Asking) ->
    receive
        {trace_ts, Pid, In, _, Time} when In =:= in; In =:= in_exiting ->
            tracer(Running#{Pid => Time}, Sum, End, Asking);
        {trace_ts, Pid, Out, _, Time} when Out =:= out; Out =:= out_exiting; Out =:= out_exited ->
            case maps:take(Pid, Running) of
                {Since, Others} -> tracer(Others, Sum + max(0, min(Time, End) - Since), End, Asking);
                %% It was running when tracing began.
                error -> tracer(Running, Sum, End, Asking)
            end;
        stop ->
            %% Those that run still have run until the end.
            Left = lists:sum([ max(0, End - Since) || Since <- maps:values(Running) ]),
            Asking ! {self(), Sum + Left}
    end.
