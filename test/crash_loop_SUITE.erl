%%% Processes that crash again and again.
%%%
%%% The contract:
%%% A process of the application that crashes again and again is given up within a minute. The log names the process and
%%% says that it was restarted too often. A shard manager stops the application. A process of the control plane stops
%%% the control plane alone, which health reports. Messages are routed all the while. A process that is killed at random
%%% is never given up.
-module(crash_loop_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([manager_that_is_killed_each_time_ends_the_application/1,
         manager_that_crashes_once_a_second_ends_the_application/1,
         control_plane_process_that_crashes_with_each_tick_ends_the_control_plane/1,
         control_plane_process_that_is_killed_each_time_ends_the_control_plane/1,
         control_plane_that_cannot_start_is_no_obstacle/1,
         managers_killed_at_random_are_not_given_up/1,
         all_managers_at_once_are_not_given_up/1,
         supervisors_of_managers_are_restarted/1]).
%% Logger handler
-export([log/2]).

-define(SHARD,         17).
-define(SHARDS,        64).
-define(DEADLINE_MS,   60_000).
-define(CONTROL_PLANE, [erlmcp_control_plane_sup, erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery]).


suite() ->
    [{timetrap, {minutes, 4}}].


all() ->
    [manager_that_is_killed_each_time_ends_the_application,
     manager_that_crashes_once_a_second_ends_the_application,
     control_plane_process_that_crashes_with_each_tick_ends_the_control_plane,
     control_plane_process_that_is_killed_each_time_ends_the_control_plane,
     control_plane_that_cannot_start_is_no_obstacle,
     managers_killed_at_random_are_not_given_up,
     all_managers_at_once_are_not_given_up,
     supervisors_of_managers_are_restarted].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    Quiet = #{run_queue_per_scheduler => infinity, scheduler_use_percent => infinity, memory_bytes => infinity},
    ok = application:set_env(erlmcp_native, health, Quiet),
    ok = application:start(erlmcp_native),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => error}),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = logger:remove_handler(?MODULE),
    _ = application:stop(erlmcp_native),
    _ = application:unset_env(erlmcp_native, health),
    erlmcp_shard_registry:unregister_connection(c).


%%% Given up


manager_that_is_killed_each_time_ends_the_application(_Config) ->
    ends_the_application(fun(Manager) -> exit(Manager, kill) end).


%% As rarely as a process that crashes at each tick, once a second.
manager_that_crashes_once_a_second_ends_the_application(_Config) ->
    %% By the clock, however long a restart takes.
    Began = erlang:monotonic_time(microsecond),
    Crashes = counters:new(1, []),
    ends_the_application(fun(Manager) ->
                                 ok = counters:add(Crashes, 1, 1),
                                 ok = test_support:sleep_until(Began + counters:get(Crashes, 1) * 1_000_000),
                                 ok = crash(Manager)
                         end).


ends_the_application(End) ->
    Top = whereis(erlmcp_native_sup),
    Began = now_ms(),
    Times = again_and_again(erlmcp_shard_sampler:name(?SHARD), monitor(process, Top), End, 0),
    ct:log("given up after ~b times, ~b ms", [Times, now_ms() - Began]),
    test_support:await(fun() -> not is_running() end, ?DEADLINE_MS),
    ?assertMatch([#{supervisor := _, offender := {erlmcp_shard_manager, ?SHARD}}], given_up()),
    ?assertEqual({degraded, [{application, stopped}]}, erlmcp_native:health()),
    ok = is_routed(),
    %% The application can be started again.
    ok = application:start(erlmcp_native),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS).


control_plane_process_that_crashes_with_each_tick_ends_the_control_plane(_Config) ->
    %% The process crashes when it handles its next tick, in a second.
    ends_the_control_plane(fun(Pid) ->
                                   _ = sys:replace_state(Pid, fun(_State) -> no_state end),
                                   test_support:await_end(Pid)
                           end).


control_plane_process_that_is_killed_each_time_ends_the_control_plane(_Config) ->
    ends_the_control_plane(fun test_support:kill/1).


ends_the_control_plane(End) ->
    Others = [ {Name, whereis(Name)} || Name <- [erlmcp_native_sup, erlmcp_shard_sup | managers()] ],
    Began = now_ms(),
    Times = again_and_again(erlmcp_shard_metrics, monitor(process, whereis(erlmcp_control_plane_sup)), End, 0),
    ct:log("given up after ~b times, ~b ms", [Times, now_ms() - Began]),
    ?assertMatch([#{supervisor := {local, erlmcp_control_plane_sup}, offender := erlmcp_shard_metrics}], given_up()),
    Down = {degraded, [{control_plane_down, ?CONTROL_PLANE}]},
    ok = test_support:await_value(Down, fun erlmcp_native:health/0, ?DEADLINE_MS),
    ok = is_routed(),
    %% The control plane stays down, and nothing else was restarted.
    ?assertEqual(Others, [ {Name, whereis(Name)} || {Name, _} <- Others ]),
    ?assertMatch({erlmcp_control_plane_sup, undefined, supervisor, _},
                 lists:keyfind(erlmcp_control_plane_sup, 1, supervisor:which_children(erlmcp_native_sup))),
    ?assert(is_running()),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS).


%% Another process has and keeps a name of the control plane.
control_plane_that_cannot_start_is_no_obstacle(_Config) ->
    ok = application:stop(erlmcp_native),
    true = register(erlmcp_shard_metrics, self()),
    try
        ok = application:start(erlmcp_native),
        receive
            {logged, #{msg := {report, #{event := control_plane_not_started, reason := _}}}} -> ok
        after
            ?DEADLINE_MS ->
                error(not_logged)
        end,
        {degraded, [{control_plane_down, Names}]} = erlmcp_native:health(),
        ?assert(lists:member(erlmcp_control_plane_sup, Names)),
        ok = is_routed()
    after
        unregister(erlmcp_shard_metrics)
    end,
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS).


%% Applies End to each process that is registered under Name, until the supervisor is down. Returns how often.
again_and_again(Name, SupervisorMonitor, End, Times) ->
    receive
        {'DOWN', SupervisorMonitor, process, _, Reason} ->
            ?assertEqual(shutdown, Reason),
            Times
    after
        0 ->
            case whereis(Name) of
                undefined ->
                    erlang:yield(),
                    again_and_again(Name, SupervisorMonitor, End, Times);
                Pid ->
                    Monitor = monitor(process, Pid),
                    _ = End(Pid),
                    receive {'DOWN', Monitor, process, Pid, _} -> ok end,
                    again_and_again(Name, SupervisorMonitor, End, Times + 1)
            end
    end.


%% Makes a `gen_server' crash by itself.
crash(Pid) ->
    _ = sys:replace_state(Pid, fun(_State) -> no_state end),
    Pid ! sample,
    ok.


%%% Not given up


%% Ten times the documented rate, for so short a time that this is not too often.
managers_killed_at_random_are_not_given_up(_Config) ->
    Others = [ {Name, whereis(Name)} || Name <- [erlmcp_native_sup, erlmcp_shard_sup | ?CONTROL_PLANE] ],
    Killed = [ begin
                   killed = test_support:kill(live(erlmcp_shard_sampler:name(rand:uniform(?SHARDS) - 1))),
                   ok = is_routed()
               end || _ <- lists:seq(1, 500) ],
    ?assertEqual(500, length(Killed)),
    ?assertEqual([], given_up()),
    ?assertEqual(Others, [ {Name, whereis(Name)} || {Name, _} <- Others ]),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS).


all_managers_at_once_are_not_given_up(_Config) ->
    Supervisor = whereis(erlmcp_shard_sup),
    _ = [ begin
              Pids = [ live(Name) || Name <- managers() ],
              _ = [ exit(Pid, kill) || Pid <- Pids ],
              test_support:await(fun() ->
                                         Present = [ whereis(Name) || Name <- managers() ],
                                         lists:all(fun({Pid, Old}) -> is_pid(Pid) andalso Pid =/= Old end, lists:zip(Present, Pids))
                                 end,
                                 ?DEADLINE_MS)
          end || _ <- lists:seq(1, 10) ],
    ?assertEqual([], given_up()),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)),
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS).


%% A killed supervisor is restarted and not given up.
supervisors_of_managers_are_restarted(_Config) ->
    Supervisor = whereis(erlmcp_shard_sup),
    _ = [ begin
              {Shard, Pid, supervisor, _} = lists:keyfind(Shard, 1, supervisor:which_children(erlmcp_shard_sup)),
              killed = test_support:kill(Pid)
          end || Shard <- [0, ?SHARD, 63, ?SHARD] ],
    ok = test_support:await_value(ok, fun erlmcp_native:health/0, ?DEADLINE_MS),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)),
    ?assertEqual([], given_up()).


%%% Tools


managers() ->
    [ erlmcp_shard_sampler:name(Shard) || Shard <- lists:seq(0, ?SHARDS - 1) ].


live(Name) ->
    test_support:await(fun() -> is_pid(whereis(Name)) end, ?DEADLINE_MS),
    whereis(Name).


is_running() ->
    lists:keymember(erlmcp_native, 1, application:which_applications()).


is_routed() ->
    ok = erlmcp_shard_manager:route_message(c, hello),
    receive hello -> ok after ?DEADLINE_MS -> error(not_routed) end.


%% The supervisors that have given up, each with the child concerned, from OTP's reports.
given_up() ->
    receive
        {logged, #{
                   msg := {report, #{
                                     label := {supervisor, shutdown},
                                     report := [{supervisor, Supervisor},
                                                {errorContext, shutdown},
                                                {reason, reached_max_restart_intensity},
                                                {offender, Child}]
                                    }}
                  }} ->
            [#{supervisor => Supervisor, offender => proplists:get_value(id, Child)} | given_up()]
    after
        0 ->
            []
    end.


log(#{msg := {report, _}} = Event, #{config := Pid}) ->
    Pid ! {logged, Event};
log(_Event, _Config) ->
    ok.


now_ms() ->
    erlang:monotonic_time(millisecond).
