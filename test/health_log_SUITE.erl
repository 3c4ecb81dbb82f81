%%% What the monitor of health logs: one line for each change that lasts, and none for a condition that comes and goes.
-module(health_log_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [one_line_for_each_change_that_lasts].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, health, quiet()),
    ok = application:start(erlmcp_native),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = logger:remove_handler(?MODULE),
    ok = application:unset_env(erlmcp_native, health),
    ok = erlmcp_native_config:configure(),
    _ = application:stop(erlmcp_native),
    ok.


one_line_for_each_change_that_lasts(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    Degrade = fun() -> ok = erlmcp_native:set(health, (quiet())#{memory_bytes => 1}) end,
    Mend = fun() -> ok = erlmcp_native:set(health, quiet()) end,
    %% A condition of fewer than three checks is not logged.
    ok = flap(Degrade, Mend, 3),
    ?assertEqual([], health_lines()),
    Degraded = now_ms(),
    Degrade(),
    {warning, #{event := health_degraded}, Text} = next_health_line(),
    %% Checks are a second apart.
    ?assert(now_ms() - Degraded > 1_900),
    ?assertNotEqual(nomatch, string:find(Text, "memory_bytes")),
    %% There is one line, however long the condition lasts and whatever is added. A new monitor process knows what is
    %% logged.
    killed = test_support:kill(whereis(erlmcp_shard_health)),
    ok = supervisor:terminate_child(erlmcp_shard_sup, 3),
    _ = test_support:await_received(erlmcp_shard_health, measure, 4),
    ok = flap(Mend, Degrade, 2),
    ?assertEqual([], health_lines()),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, 3),
    killed = test_support:kill(whereis(erlmcp_shard_health)),
    Mended = now_ms(),
    Mend(),
    ?assertMatch({notice, #{event := health_ok}, _}, next_health_line()),
    ?assert(now_ms() - Mended > 1_900),
    _ = test_support:await_received(erlmcp_shard_health, measure, 2),
    ?assertEqual([], health_lines()).


%% Changes the condition for one check, and back for one check. Retries if the machine was so busy that three or more
%% checks fell between two changes.
flap(There, Back, Times) ->
    Checks = [ begin
                   Change(),
                   test_support:await_received(erlmcp_shard_health, measure, 1)
               end || _ <- lists:seq(1, Times), Change <- [There, Back] ],
    case lists:max(Checks) < 3 of
        true ->
            ok;
        false ->
            ct:log("too busy: ~p", [Checks]),
            _ = test_support:await_received(erlmcp_shard_health, measure, 4),
            _ = health_lines(),
            flap(There, Back, Times)
    end.


log(#{level := Level, msg := {report, Report}, meta := #{application := erlmcp_native}} = Event, #{config := Pid}) ->
    Text = lists:flatten(logger_formatter:format(Event, #{template => [msg], single_line => true})),
    Pid ! {logged, Level, Report, Text};
log(_Event, _Config) ->
    ok.


health_lines() ->
    receive
        {logged, Level, #{event := Event} = Meta, Text} when Event =:= health_degraded; Event =:= health_ok ->
            [{Level, Meta, Text} | health_lines()]
    after
        0 ->
            []
    end.


next_health_line() ->
    receive
        {logged, Level, #{event := Event} = Meta, Text} when Event =:= health_degraded; Event =:= health_ok ->
            {Level, Meta, Text}
    after
        ?DEADLINE_MS ->
            none
    end.


%%% Tools


%% The load of the machine is no reason.
quiet() ->
    #{run_queue_per_scheduler => infinity, scheduler_use_percent => infinity, memory_bytes => infinity}.


now_ms() ->
    erlang:monotonic_time(millisecond).
