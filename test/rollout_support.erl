%%% Shared parts of the rollout suites: the named registry in its mode, a process that switches modes all the
%%% time, receivers that check the order of messages, and idle processes.
-module(rollout_support).

-include_lib("stdlib/include/assert.hrl").

-export([init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([start_registry/0, many_transports/1, await_queue/1, await_written/0]).
-export([start_switcher/2, stop_switcher/1, switches/1, rounds_under_switches/3]).
-export([start_receiver/0, last_in_order/3, received/1]).
-export([await/2, sleeper/0, end_all/1, now_ms/0]).

-define(DEADLINE_MS, 10_000).


init_per_suite(Config) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, error),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = erlmcp_native_config:configure(),
    [{logger_level, Level} | Config].


end_per_suite(Config) ->
    ok = logger:set_primary_config(level, proplists:get_value(logger_level, Config)),
    application:unset_env(erlmcp_native, token_bucket),
    ok = erlmcp_native_config:configure().


init_per_testcase(_Case, Config) ->
    undefined = whereis(erlmcp_registry),
    _ = start_registry(),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = whereis(erlmcp_registry) =:= undefined orelse gen_server:stop(erlmcp_registry),
    _ = application:stop(erlmcp_native),
    application:unset_env(erlmcp, architecture_version),
    _ = start_registry(),
    ok = erlmcp_rollout:set('100x'),
    ok = await_written(),
    ok = gen_server:stop(erlmcp_registry),
    application:unset_env(erlmcp_native, architecture_version).


%% Starts the named process and waits until it is in its mode.
start_registry() ->
    {ok, Pid} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = await_switch(),
    Pid.


await_switch() ->
    await(none, fun() -> maps:get(switching_to, erlmcp_rollout:status()) end).


%% Waits until the registry's mailbox holds `Length' messages.
await_queue(Length) ->
    Registry = whereis(erlmcp_registry),
    test_support:await_value({message_queue_len, Length}, fun() -> process_info(Registry, message_queue_len) end).


%% Waits until the mode set last is in the application's environment.
await_written() ->
    test_support:await(fun() ->
                               persistent_term:get({erlmcp_rollout, remembered}, none) =:=
                               persistent_term:get({erlmcp_rollout, written}, none)
                       end).


%% Registers transports of one process, all bound to s.
many_transports(Number) ->
    Holder = sleeper(),
    [ ok = erlmcp_registry:register_transport(Id, Holder, #{server_id => s}) || Id <- lists:seq(1, Number) ],
    Holder.


%% Calls Round(1), Round(2), ... while the mode is switched: at least `AtLeast' times, and until there were more
%% than ten switches. Returns the number of calls.
rounds_under_switches(AtLeast, Modes, Round) ->
    rounds_under_switches(1, AtLeast, start_switcher(Modes, 0), Round).


rounds_under_switches(N, AtLeast, Switcher, Round) ->
    _ = Round(N),
    case N >= AtLeast andalso switches(Switcher) > 10 of
        true ->
            _ = stop_switcher(Switcher),
            N;
        false ->
            rounds_under_switches(N + 1, AtLeast, Switcher, Round)
    end.


switches(Switcher) ->
    Switcher ! {count, self()},
    receive {count, Switcher, Count} -> Count end.


%% Switches until it is stopped, with `PauseMs' milliseconds between two switches. Being asked for the number of
%% switches does not make a pause longer.
start_switcher(Modes, PauseMs) ->
    spawn_link(fun() -> switch_on(Modes, Modes, PauseMs, now_ms() + PauseMs, 0) end).


switch_on([], Modes, PauseMs, NextMs, Count) ->
    switch_on(Modes, Modes, PauseMs, NextMs, Count);
switch_on([Mode | Others], Modes, PauseMs, NextMs, Count) ->
    receive
        {count, From} ->
            From ! {count, self(), Count},
            switch_on([Mode | Others], Modes, PauseMs, NextMs, Count);
        {stop, From} ->
            From ! {stopped, self(), Count}
    after
        max(0, NextMs - now_ms()) ->
            ok = erlmcp_rollout:set(Mode),
            switch_on(Others, Modes, PauseMs, now_ms() + PauseMs, Count + 1)
    end.


stop_switcher(Switcher) ->
    Switcher ! {stop, self()},
    receive {stopped, Switcher, Count} -> Count end.


%% Receives messages with {from, Sender, N}. N must be the sender's next number.
start_receiver() ->
    spawn(fun() -> receiver(#{}) end).


receiver(Last) ->
    receive
        {Kind, _, {from, Sender, N}} when Kind =:= mcp_message; Kind =:= mcp_response ->
            receiver(Last#{Sender => next(N, maps:get(Sender, Last, 0))});
        {last, Sender, From} ->
            From ! {last, self(), maps:get(Sender, Last, 0)},
            receiver(Last)
    end.


%% The first message out of order is kept.
next(_N, {out_of_order, _, _} = Wrong) -> Wrong;
next(N, Last) when N =:= Last + 1 -> N;
next(N, Last) -> {out_of_order, N, Last + 1}.


%% The number of the last message, once it is the expected one, or else what is wrong.
last_in_order(Receiver, Sender, Expected) ->
    case await(Expected,
               fun() ->
                       Receiver ! {last, Sender, self()},
                       receive {last, Receiver, Last} -> Last end
               end) of
        ok -> Expected;
        {still, Last} -> Last
    end.


await(Expected, Look) ->
    await(Expected, Look, now_ms() + ?DEADLINE_MS).


await(Expected, Look, Deadline) ->
    case Look() of
        Expected ->
            ok;
        Other ->
            case now_ms() > Deadline orelse is_tuple(Other) andalso element(1, Other) =:= out_of_order of
                true ->
                    {still, Other};
                false ->
                    timer:sleep(1),
                    await(Expected, Look, Deadline)
            end
    end.


%% The next `Number' messages. No further message may have arrived.
received(0) ->
    receive
        {Kind, _, _} = Message when Kind =:= mcp_message; Kind =:= mcp_response -> [{unexpected, Message}]
    after
        0 ->
            []
    end;
received(Number) ->
    receive
        {Kind, _, _} = Message when Kind =:= mcp_message; Kind =:= mcp_response -> [Message | received(Number - 1)]
    after
        ?DEADLINE_MS ->
            [{missing, Number}]
    end.


sleeper() ->
    spawn(fun() -> receive stop -> ok end end).


end_all(Pids) ->
    [ test_support:kill(Pid) || Pid <- Pids ].


now_ms() ->
    erlang:monotonic_time(millisecond).
