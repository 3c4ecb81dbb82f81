%%% The processes that keep the depths of the shards up to date: waiting until they are idle, and their share of
%%% the processors' time.
-module(bench_samplers).

-export([await_idle/0, percent/1]).

%% Longer than the interval of sampling.
-define(STILL_MS, 250).
-define(LOOKS,    20).


%% Returns when no shard manager has run for some time. Otherwise the next measurement would pay for the former
%% one: messages that a sample finds in a mailbox are sampled again, whichever process sent them.
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


%% Percent of the time of all schedulers during which the processes of the application's supervision tree, and
%% those that they spawn, are scheduled within `Ms' milliseconds, by the events of `erlang:trace/3'.
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
    %% Spawned processes are short-lived, and their events arrive after the end.
    lists:foreach(fun(Pid) -> trace(Pid, false, [running, exiting, set_on_spawn, monotonic_timestamp]) end, Traced),
    Delivered = erlang:trace_delivered(all),
    receive {trace_delivered, all, Delivered} -> ok end,
    Tracer ! stop,
    Running = receive {Tracer, Sum} -> Sum end,
    100 * Running / (End - Start) / erlang:system_info(schedulers_online).


%% A process that has exited is not traced.
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


%% Sums up the times between `in' and `out' events, up to the end.
-spec tracer(#{pid() => integer()}, non_neg_integer(), integer(), pid()) -> {pid(), non_neg_integer()}.
tracer(Running, Sum, End, Asking) ->
    receive
        {trace_ts, Pid, In, _, Time} when In =:= in; In =:= in_exiting ->
            tracer(Running#{Pid => Time}, Sum, End, Asking);
        {trace_ts, Pid, Out, _, Time} when Out =:= out; Out =:= out_exiting; Out =:= out_exited ->
            case maps:take(Pid, Running) of
                {Since, Others} -> tracer(Others, Sum + max(0, min(Time, End) - Since), End, Asking);
                %% The process was running when tracing began.
                error -> tracer(Running, Sum, End, Asking)
            end;
        stop ->
            %% Processes that are still running have run until the end.
            Left = lists:sum([ max(0, End - Since) || Since <- maps:values(Running) ]),
            Asking ! {self(), Sum + Left}
    end.
