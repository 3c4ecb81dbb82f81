%%% The limits of health: checked before they change anything, at start and in a running system.
-module(health_limits_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [limits_are_checked, wrong_limits_in_the_environment, the_application_checks_limits].


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


limits_are_checked(_Config) ->
    Wrong = [#{queue_depth_percent => 0},
             #{queue_depth_percent => 101},
             #{queue_depth_percent => infinity},
             #{queue_depth_percent => 80.0},
             #{run_queue_per_scheduler => 0},
             #{run_queue_per_scheduler => -1},
             #{run_queue_per_scheduler => 1.5},
             #{run_queue_per_scheduler => machine},
             #{scheduler_use_percent => 0},
             #{scheduler_use_percent => 101},
             #{scheduler_use_percent => high},
             #{memory_bytes => 0},
             #{memory_bytes => -1},
             #{memory_bytes => "1 GB"},
             #{memory_bytes => 1.0e9},
             #{no_such_limit => 1},
             #{memory_bytes => 1, no_such_limit => 1},
             #{{queue_depth_percent} => 1},
             [{memory_bytes, 0}],
             infinity,
             off,
             42],
    _ = [ begin
              {error, {bad_option, health, Value, Expected}} = erlmcp_native:set(health, Value),
              _ = [ ?assertNotEqual(nomatch, string:find(Expected, Part), {Value, Part, Expected})
                    || Part <- ["queue_depth_percent (an integer from 1 to 100)",
                                "run_queue_per_scheduler (an integer from 1, or infinity)",
                                "scheduler_use_percent (an integer from 1 to 100, or infinity)",
                                "memory_bytes (an integer from 1, machine or infinity)"] ],
              ?assertEqual({ok, quiet()}, application:get_env(erlmcp_native, health)),
              ?assertEqual(ok, erlmcp_native:health())
          end || Value <- Wrong ],
    Right = [#{},
             #{queue_depth_percent => 1},
             #{queue_depth_percent => 100},
             #{run_queue_per_scheduler => 1},
             #{run_queue_per_scheduler => 1 bsl 70},
             #{scheduler_use_percent => 1},
             #{scheduler_use_percent => 100},
             #{memory_bytes => 1},
             #{memory_bytes => machine},
             #{memory_bytes => infinity, scheduler_use_percent => infinity, run_queue_per_scheduler => infinity}],
    _ = [ begin
              ?assertEqual(ok, erlmcp_native:set(health, Limits)),
              ?assertEqual(Limits, maps:with(maps:keys(Limits), erlmcp_native_config:get(health)))
          end || Limits <- Right ].


%% The limits were set without validation: the defaults hold.
wrong_limits_in_the_environment(_Config) ->
    Processes = processes_of_the_control_plane(),
    _ = [ begin
              ok = application:set_env(erlmcp_native, health, Wrong),
              case erlmcp_native:health() of
                  ok -> ok;
                  {degraded, Reasons} -> ?assertEqual([], reasons_without_load(Reasons))
              end
          end || Wrong <- [#{memory_bytes => 0}, #{memory_bytes => 1, queue_depth_percent => many}, none, []] ],
    test_support:await(fun() -> is_map(erlmcp_shard_metrics:get()) end, ?DEADLINE_MS),
    ?assertEqual(Processes, processes_of_the_control_plane()).


the_application_checks_limits(_Config) ->
    ok = application:stop(erlmcp_native),
    ok = application:set_env(erlmcp_native, health, #{queue_depth_percent => 200}),
    {error, {Reason, _}} = application:start(erlmcp_native),
    ?assertMatch({bad_option, health, #{queue_depth_percent := 200}, "a map with any of " ++ _}, Reason),
    ok = application:set_env(erlmcp_native, health, (quiet())#{memory_bytes => 1}),
    ok = application:start(erlmcp_native),
    ?assertMatch({degraded, [{memory_bytes, _, 1}]}, erlmcp_native:health()).


%% By the default limits a busy machine is a reason.
reasons_without_load(Reasons) ->
    [ Reason || Reason <- Reasons, not lists:member(element(1, Reason), [run_queue, scheduler_use_percent]) ].


%%% Tools


%% The load of the machine is no reason.
quiet() ->
    #{run_queue_per_scheduler => infinity, scheduler_use_percent => infinity, memory_bytes => infinity}.


processes_of_the_control_plane() ->
    [ {Name, whereis(Name)}
      || Name <- [erlmcp_control_plane_sup, erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery] ].
