%%% Shared by several suites and the subject of none: functions that run in a peer node, waiting for conditions,
%%% processes and their exits, and environment variables.
-module(test_support).

-include_lib("stdlib/include/assert.hrl").

-export([root/0]).
-export([in_peer/2, in_peer/4, start_peer/2, become_distributed/0, freeze/1, thaw/1]).
-export([await/1, await/2, await_value/2, await_value/3]).
-export([await_samplers/0]).
-export([process/0, stop/1, in_process/1, at_once/2, on_every_scheduler/1]).
-export([kill/1, await_end/1, await_received/3, flush/0, sleep_until/1, result/1]).
-export([shown_error/1, resident_bytes/0]).
-export([positive_integer/2, seed/1]).

%% `flags' are arguments of the emulator. `timeout_ms' applies to the function and not to the start of its node.
-type peer_options() :: #{flags => [string()], timeout_ms => timeout()}.

-define(BOOT_MS,     60_000).
-define(CALL_MS,     60_000).
-define(DEADLINE_MS, 10_000).
-define(STEP_MS,     1).

%%% Nodes


-spec in_peer(module(), atom()) -> term().
in_peer(Module, Function) ->
    in_peer(Module, Function, [], #{}).


%% The result of the function in a peer node. If that node crashes, the case fails.
-spec in_peer(module(), atom(), [term()], peer_options()) -> term().
in_peer(Module, Function, Arguments, Options) ->
    {ok, Peer, _} = start_peer(Module, #{args => maps:get(flags, Options, [])}),
    Result = peer:call(Peer, Module, Function, Arguments, maps:get(timeout_ms, Options, ?CALL_MS)),
    peer:stop(Peer),
    Result.


%% A node that finds the module and all modules that this node finds. It stops when the calling process exits.
-spec start_peer(module(), peer:start_options()) -> {ok, pid(), node()}.
start_peer(Module, Options) ->
    Root = code:root_dir(),
    Paths = [ filename:absname(Path) || Path <- code:get_path(), not lists:prefix(Root, Path), Path =/= "." ],
    %% A module compiled for cover has no file.
    Own = [ filename:dirname(File) || File <- [code:which(Module)], is_list(File) ],
    {ok, _, _} = peer:start_link(Options#{
                                   connection => standard_io,
                                   wait_boot => ?BOOT_MS,
                                   args => maps:get(args, Options, []) ++ ["-pa" | Paths ++ Own]
                                  }).


%% Gives this node a name. A node that is started with a name starts epmd.
-spec become_distributed() -> ok.
become_distributed() ->
    nonode@nohost = node(),
    {ok, Starter, _} = start_peer(?MODULE, #{name => peer:random_name()}),
    {ok, _} = net_kernel:start([list_to_atom(peer:random_name()), shortnames]),
    true = is_alive(),
    peer:stop(Starter).


%% Stops all threads of an operating system process, and waits for that. The signal alone stops each thread when
%% it is scheduled next, which takes many milliseconds on a busy machine.
-spec freeze(OsPid :: string()) -> ok.
freeze(OsPid) ->
    "" = os:cmd("kill -STOP " ++ OsPid),
    await(fun() -> lists:all(fun is_stopped/1, filelib:wildcard("/proc/" ++ OsPid ++ "/task/*/stat")) end).


%% By the state, which is the first field after the thread's name in parentheses.
is_stopped(Stat) ->
    {ok, Fields} = file:read_file(Stat),
    lists:prefix(") T", string:find(binary_to_list(Fields), ")", trailing)).


-spec thaw(OsPid :: string()) -> ok.
thaw(OsPid) ->
    "" = os:cmd("kill -CONT " ++ OsPid),
    ok.


%%% Conditions


-spec await(fun(() -> boolean())) -> ok.
await(Condition) ->
    await(Condition, ?DEADLINE_MS).


%% Polls until the condition is true, at least once.
-spec await(fun(() -> boolean()), non_neg_integer()) -> ok.
await(Condition, TimeoutMs) ->
    await_until(Condition, now_ms() + TimeoutMs, TimeoutMs).


await_until(Condition, DeadlineMs, TimeoutMs) ->
    case Condition() of
        true ->
            ok;
        false ->
            now_ms() < DeadlineMs orelse error({deadline_passed, TimeoutMs}),
            timer:sleep(?STEP_MS),
            await_until(Condition, DeadlineMs, TimeoutMs)
    end.


-spec await_value(term(), fun(() -> term())) -> ok.
await_value(Expected, Read) ->
    await_value(Expected, Read, ?DEADLINE_MS).


%% Reads until the value is the expected one. After the timeout the error shows the actual value.
-spec await_value(term(), fun(() -> term()), non_neg_integer()) -> ok.
await_value(Expected, Read, TimeoutMs) ->
    await_value_until(Expected, Read, now_ms() + TimeoutMs).


await_value_until(Expected, Read, DeadlineMs) ->
    case Read() of
        Expected ->
            ok;
        Actual ->
            now_ms() < DeadlineMs orelse ?assertEqual(Expected, Actual),
            timer:sleep(?STEP_MS),
            await_value_until(Expected, Read, DeadlineMs)
    end.


now_ms() ->
    erlang:monotonic_time(millisecond).


%%% Shards


%% Waits until every manager of the default registry has sampled, and no message of earlier cases counts any
%% more: the shards outlive the application. After the timeout the error shows the shards concerned.
-spec await_samplers() -> ok.
await_samplers() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    await_value([],
                fun() ->
                        [ {Shard, has_sampled(Shard), erlmcp_admission_control:load(Shard), erlmcp_nif:sample_counts(Shard)}
                          || Shard <- lists:seq(0, Shards - 1),
                             not has_sampled(Shard) orelse element(1, erlmcp_admission_control:load(Shard)) > 0 ]
                end,
                ?CALL_MS).


has_sampled(Shard) ->
    Manager = whereis(erlmcp_shard_sampler:name(Shard)),
    case erlmcp_shard_sampler:first_sample(Shard) of
        {Manager, _Us} -> is_pid(Manager);
        _ -> false
    end.


%%% Processes


%% A process that answers pings. It exits with its parent at the latest.
-spec process() -> pid().
process() ->
    Parent = self(),
    Pid = spawn(fun() ->
                        _ = monitor(process, Parent),
                        Parent ! {self(), ready},
                        served()
                end),
    receive {Pid, ready} -> Pid end.


served() ->
    receive
        {From, ping} -> From ! {self(), pong}, served();
        {mcp_message, _, {From, ping}} -> From ! {self(), pong}, served();
        crash -> exit(crashed);
        stop -> ok;
        {'DOWN', _, process, _, _} -> ok
    end.


-spec stop(pid()) -> ok.
stop(Pid) ->
    Monitor = monitor(process, Pid),
    Pid ! stop,
    receive {'DOWN', Monitor, process, Pid, _} -> ok end.


%% Runs a fun in many processes that start together, and returns their results.
-spec at_once(pos_integer(), fun((pos_integer()) -> Result)) -> [Result].
at_once(Number, Fun) ->
    Parent = self(),
    Pids = [ spawn_link(fun() ->
                                receive go -> Parent ! {self(), Fun(N)} end
                        end) || N <- lists:seq(1, Number) ],
    _ = [ Pid ! go || Pid <- Pids ],
    [ receive {Pid, Result} -> Result end || Pid <- Pids ].


%% The fun's result, from a process that has exited, so that its references are gone.
-spec in_process(fun(() -> Result)) -> Result.
in_process(Fun) ->
    Parent = self(),
    {Pid, Monitor} = spawn_monitor(fun() -> Parent ! {self(), Fun()} end),
    receive
        {Pid, Result} ->
            receive {'DOWN', Monitor, process, Pid, normal} -> Result end;
        {'DOWN', Monitor, process, Pid, Reason} ->
            error(Reason)
    end.


%% The memory of this node, as the operating system counts it.
-spec resident_bytes() -> non_neg_integer().
resident_bytes() ->
    {ok, Statm} = file:read_file("/proc/self/statm"),
    [_, Pages | _] = binary:split(Statm, <<" ">>, [global]),
    binary_to_integer(Pages) * 4096.


%% Runs the fun once on each scheduler, with the scheduler's number.
-spec on_every_scheduler(fun((pos_integer()) -> term())) -> ok.
on_every_scheduler(Fun) ->
    Monitors = [ Monitor
                 || N <- lists:seq(1, erlang:system_info(schedulers_online)),
                    {_, Monitor} <- [spawn_opt(fun() -> Fun(N) end, [monitor, {scheduler, N}])] ],
    lists:foreach(fun(Monitor) ->
                          receive {'DOWN', Monitor, process, _, Reason} -> normal = Reason end
                  end,
                  Monitors).


%% Kills a process and returns its exit reason. That is not `killed' if it was already exiting. The caller may
%% be linked to it.
-spec kill(pid()) -> term().
kill(Pid) ->
    true = unlink(Pid),
    Monitor = monitor(process, Pid),
    true = exit(Pid, kill),
    receive {'DOWN', Monitor, process, Pid, Reason} -> Reason end.


%% The exit reason of a process, or `noproc' if it had exited before.
-spec await_end(pid()) -> term().
await_end(Pid) ->
    Monitor = monitor(process, Pid),
    receive {'DOWN', Monitor, process, Pid, Reason} -> Reason end.


%% Waits until the named process has received and handled a message `Number' times. Returns how often it has
%% received it in all. The process must be a `gen_server' and must not be traced otherwise.
-spec await_received(atom(), term(), pos_integer()) -> pos_integer().
await_received(Name, Message, Number) ->
    ok = await(fun() -> is_pid(whereis(Name)) end, ?CALL_MS),
    Pid = whereis(Name),
    1 = erlang:trace(Pid, true, ['receive']),
    _ = [ receive
              {trace, Pid, 'receive', Message} -> ok
          after
              ?CALL_MS ->
                  error({not_received, Message})
          end || _ <- lists:seq(1, Number) ],
    _ = sys:get_state(Pid),
    1 = erlang:trace(Pid, false, ['receive']),
    Delivered = erlang:trace_delivered(Pid),
    receive {trace_delivered, Pid, Delivered} -> ok end,
    Number + length([ Trace || Trace <- traces(), Trace =:= {trace, Pid, 'receive', Message} ]).


traces() ->
    receive Trace when element(1, Trace) =:= trace -> [Trace | traces()] after 0 -> [] end.


%% All messages of the caller, in the order of arrival.
-spec flush() -> [term()].
flush() ->
    receive Message -> [Message | flush()] after 0 -> [] end.


%% Returns at or after this monotonic time in microseconds.
-spec sleep_until(integer()) -> ok.
sleep_until(DueUs) ->
    case DueUs - erlang:monotonic_time(microsecond) of
        LeftUs when LeftUs > 0 ->
            timer:sleep(LeftUs div 1000 + 1),
            sleep_until(DueUs);
        _ ->
            ok
    end.


%% The fun's result, or the reason of the error that it raises.
-spec result(fun(() -> term())) -> term().
result(Fun) ->
    try
        Fun()
    catch
        error:Reason -> Reason
    end.


%%% The environment


%% The value of the variable, or the default if it is not set. An invalid value fails the case.
-spec positive_integer(string(), pos_integer()) -> pos_integer().
positive_integer(Variable, Default) ->
    case os:getenv(Variable) of
        false ->
            Default;
        Text ->
            case string:to_integer(Text) of
                {Number, ""} when is_integer(Number), Number > 0 -> Number;
                _ -> ct:fail({bad_environment, Variable, Text, "a positive integer"})
            end
    end.


%% A different seed in each run, unless the variable sets it. The seed is printed, so that a run can be
%% repeated.
-spec seed(string()) -> integer().
seed(Variable) ->
    Seed = case os:getenv(Variable) of
               false -> erlang:system_time(microsecond) band 16#ffffffff;
               Given -> list_to_integer(Given)
           end,
    ct:pal("~s=~b", [Variable, Seed]),
    Seed.


%% What the shell prints for the error that a function raises.
-spec shown_error(fun(() -> term())) -> string().
shown_error(Function) ->
    try
        _ = Function(),
        error(no_error)
    catch
        error:Reason:Stacktrace -> lists:flatten(erl_error:format_exception(error, Reason, Stacktrace))
    end.


%% The folder of the project.
-spec root() -> file:filename().
root() ->
    root(filename:dirname(code:which(?MODULE))).


-spec root(file:filename()) -> file:filename().
root(Folder) ->
    case filelib:is_regular(filename:join(Folder, "CHANGELOG.md")) of
        true -> Folder;
        false when Folder =:= "/" -> error(outside_of_the_project);
        false -> root(filename:dirname(Folder))
    end.
