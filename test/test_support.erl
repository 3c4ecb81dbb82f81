%%% What several suites need and none of them is about: functions that run in a node of their own, waiting
%%% for what becomes true, the end of processes, and what the environment says.
-module(test_support).

-include_lib("stdlib/include/assert.hrl").

-export([in_peer/2, in_peer/4, start_peer/2]).
-export([await/1, await/2, await_value/2, await_value/3]).
-export([kill/1, await_end/1, flush/0, sleep_until/1]).
-export([positive_integer/2, seed/1]).

%% flags are arguments of the emulator; timeout_ms is for the function and not for the start of its node.
-type peer_options() :: #{flags => [string()], timeout_ms => timeout()}.

-define(BOOT_MS,     60_000).
-define(CALL_MS,     60_000).
-define(DEADLINE_MS, 10_000).
-define(STEP_MS,     1).

%%% Nodes


-spec in_peer(module(), atom()) -> term().
in_peer(Module, Function) ->
    in_peer(Module, Function, [], #{}).


%% What the function returns in a node of its own, whose end ends the case.
-spec in_peer(module(), atom(), [term()], peer_options()) -> term().
in_peer(Module, Function, Arguments, Options) ->
    {ok, Peer, _} = start_peer(Module, #{args => maps:get(flags, Options, [])}),
    Result = peer:call(Peer, Module, Function, Arguments, maps:get(timeout_ms, Options, ?CALL_MS)),
    peer:stop(Peer),
    Result.


%% A node that finds the module and all that this one finds. It ends with the process that starts it.
-spec start_peer(module(), peer:start_options()) -> {ok, pid(), node()}.
start_peer(Module, Options) ->
    Root = code:root_dir(),
    Paths = [ filename:absname(Path) || Path <- code:get_path(), not lists:prefix(Root, Path), Path =/= "." ],
    %% Compiled for cover, a module has no file.
    Own = [ filename:dirname(File) || File <- [code:which(Module)], is_list(File) ],
    {ok, _, _} = peer:start_link(Options#{
                                   connection => standard_io,
                                   wait_boot => ?BOOT_MS,
                                   args => maps:get(args, Options, []) ++ ["-pa" | Paths ++ Own]
                                  }).


%%% Conditions


-spec await(fun(() -> boolean())) -> ok.
await(Condition) ->
    await(Condition, ?DEADLINE_MS).


%% Asks until it is true, once at least.
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


%% Reads until it is what was expected. If it is not in time, the error says what it is.
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


%%% Processes


%% The reason of its end, which is another one than `killed' if it was ending already. The caller may be
%% linked to it.
-spec kill(pid()) -> term().
kill(Pid) ->
    true = unlink(Pid),
    Monitor = monitor(process, Pid),
    true = exit(Pid, kill),
    receive {'DOWN', Monitor, process, Pid, Reason} -> Reason end.


%% The reason of its end, or `noproc' if it has ended before.
-spec await_end(pid()) -> term().
await_end(Pid) ->
    Monitor = monitor(process, Pid),
    receive {'DOWN', Monitor, process, Pid, Reason} -> Reason end.


%% All messages of the caller, in the order in which they came.
-spec flush() -> [term()].
flush() ->
    receive Message -> [Message | flush()] after 0 -> [] end.


%% Returns at this monotonic time, in microseconds, or later.
-spec sleep_until(integer()) -> ok.
sleep_until(DueUs) ->
    case DueUs - erlang:monotonic_time(microsecond) of
        LeftUs when LeftUs > 0 ->
            timer:sleep(LeftUs div 1000 + 1),
            sleep_until(DueUs);
        _ ->
            ok
    end.


%%% The environment


%% What the variable says, or the default if it is not set. A wrong value fails the case.
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


%% Another one in each run, unless the variable says which. It is shown, so that a run can be repeated.
-spec seed(string()) -> integer().
seed(Variable) ->
    Seed = case os:getenv(Variable) of
               false -> erlang:system_time(microsecond) band 16#ffffffff;
               Given -> list_to_integer(Given)
           end,
    ct:pal("~s=~b", [Variable, Seed]),
    Seed.
