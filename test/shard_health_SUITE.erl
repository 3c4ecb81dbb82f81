%%% Health tells the truth: each reason of erlmcp_shard_health is provoked for real, is seen, and goes by
%%% itself when its cause has gone.
%%%
%%% The contract: what is not as it should be now is a reason, and nothing else is; the question is
%%% answered by the caller alone, however dead the control plane is; limits are checked before they
%%% change anything; the log has one line for each change that lasts, and none for what comes and goes.
%%%
%%% What waits, waits for a condition: other work on the machine makes a case slower and not wrong.
-module(shard_health_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(SHARD,       17).
-define(SHARDS,      64).
-define(THRESHOLD,   200).
-define(INTERVAL_MS, 20).
-define(DEADLINE_MS, 60_000).
%% No reason comes from how busy the machine is.
-define(QUIET, #{run_queue_per_scheduler => infinity, scheduler_use_percent => infinity, memory_bytes => infinity}).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [application_stopped,
     shard_managers_down,
     stale_samples,
     stale_samples_without_a_manager,
     lost_requests_for_samples,
     lost_request_at_a_stalled_receiver,
     idle_shards_need_no_samples,
     circuit,
     circuit_without_messages,
     overloaded_shards,
     queue_depths,
     queue_depths_of_shards_without_a_threshold,
     run_queue_and_scheduler_use,
     schedulers_that_are_not_online,
     memory,
     control_plane_down,
     control_plane_is_silent,
     silent_from_the_beginning,
     shard_damaged,
     several_reasons_at_once,
     limits_are_checked,
     wrong_limits_in_the_environment,
     the_application_checks_limits,
     one_line_for_each_change_that_lasts,
     asks_no_process,
     answers_while_everything_stands_still,
     unknown_messages_change_nothing,
     memory_limit_of_the_machine,
     memory_limit_of_a_control_group,
     memory_used].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    ok = start(),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = logger:remove_handler(?MODULE),
    _ = [ exit(Pid, kill) || Shard <- shards(), {_, {Pid, receiver}} <- erlmcp_shard_registry:list_connections(Shard) ],
    try
        test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end, ?DEADLINE_MS)
    after
        _ = [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker, health] ],
        ok = erlmcp_backpressure:configure(),
        ok = erlmcp_circuit_breaker:force_close(),
        _ = application:stop(erlmcp_native)
    end.


start() ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:set_env(erlmcp_native, health, ?QUIET),
    ok = application:start(erlmcp_native),
    ok = health_is(ok).


%%% Reasons


application_stopped(_Config) ->
    ok = application:stop(erlmcp_native),
    ?assertEqual({degraded, [{application, stopped}]}, erlmcp_native:health()),
    ?assertMatch(#{health := {degraded, [{application, stopped}]}}, erlmcp_native:info()),
    ok = application:start(erlmcp_native),
    ok = health_is(ok).


shard_managers_down(_Config) ->
    Down = [3, ?SHARD, 63],
    _ = [ ok = supervisor:terminate_child(erlmcp_shard_sup, Shard) || Shard <- Down ],
    ?assertEqual({degraded, [{shard_managers_down, Down}]}, erlmcp_native:health()),
    _ = [ {ok, _} = supervisor:restart_child(erlmcp_shard_sup, Shard) || Shard <- Down ],
    ?assertEqual(ok, erlmcp_native:health()),
    %% All of them, with their supervisor.
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_shard_sup),
    ?assertEqual({degraded, [{shard_managers_down, shards()}]}, erlmcp_native:health()),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_shard_sup),
    ok = health_is(ok),
    %% Killed, they come back by themselves.
    _ = [ exit(manager(Shard), kill) || Shard <- shards() ],
    ok = health_is(ok).


%% The manager is there, and does nothing.
stale_samples(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    ok = sys:suspend(manager(?SHARD)),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_manager:route_message(Id, x),
    ok = health_is({degraded, [{stale_samples, [?SHARD]}]}),
    %% It is as it says: everything is admitted, if not to whoever asks for a sample and waits for that.
    test_support:await(fun() -> lists:usort(send(Id, 2 * ?THRESHOLD)) =:= [ok] end, ?DEADLINE_MS),
    {degraded, Reasons} = erlmcp_native:health(),
    ?assertEqual([?SHARD], proplists:get_value(stale_samples, Reasons)),
    Pid ! take_all,
    ok = sys:resume(manager(?SHARD)),
    ok = health_is(ok).


stale_samples_without_a_manager(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    ok = erlmcp_shard_manager:route_message(Id, x),
    Reasons = fun() ->
                      {degraded, Unsorted} = erlmcp_native:health(),
                      lists:sort(Unsorted)
              end,
    test_support:await_value([{shard_managers_down, [?SHARD]}, {stale_samples, [?SHARD]}], Reasons, ?DEADLINE_MS),
    Pid ! take_all,
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    ok = health_is(ok).


%% Whoever was to ask for a sample has ended before it did so. Nobody sends any more, and yet these shards
%% are sampled.
lost_requests_for_samples(_Config) ->
    Shards = [3, ?SHARD],
    _ = [ ok = lose_request(Shard) || Shard <- Shards ],
    timer:sleep(12 * ?INTERVAL_MS),
    ok = health_is(ok),
    _ = [ ?assertMatch(#{sample_age_ms := Age} when is_integer(Age), erlmcp_admission_control:get_shard_stats(Shard))
          || Shard <- Shards ],
    ?assertEqual([], [ Shard || Shard <- Shards, erlmcp_admission_control:is_unwatched(Shard) ]).


%% The next ones who send ask again, also while the control plane is dead; a receiver that takes nothing
%% gets as much as the threshold, and then nothing any more.
lost_request_at_a_stalled_receiver(_Config) ->
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ok = lose_request(?SHARD),
    [{Id, Pid}] = receivers(?SHARD, 1),
    timer:sleep(12 * ?INTERVAL_MS),
    Overloaded = {error, shard_overloaded},
    test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= Overloaded end, ?DEADLINE_MS),
    ?assertEqual({message_queue_len, ?THRESHOLD}, process_info(Pid, message_queue_len)),
    timer:sleep(12 * ?INTERVAL_MS),
    ?assertEqual(Overloaded, erlmcp_shard_manager:route_message(Id, x)),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup).


lose_request(Shard) ->
    [{Id, Pid}] = receivers(Shard, 1),
    test_support:await(fun() ->
                               %% The manager has nothing to do, so the next message asks for a sample.
                               timer:sleep(5 * ?INTERVAL_MS),
                               erlmcp_nif:route_connection(Id) =:= {Pid, [{sample, Shard}]}
                       end,
                       ?DEADLINE_MS).


idle_shards_need_no_samples(_Config) ->
    _ = receivers(?SHARD, 3),
    timer:sleep(20 * ?INTERVAL_MS),
    ?assertMatch(#{sample_age_ms := Age} when Age > 10 * ?INTERVAL_MS,
                 erlmcp_admission_control:get_shard_stats(?SHARD)),
    ?assertEqual(ok, erlmcp_native:health()).


circuit(_Config) ->
    ok = erlmcp_backpressure:set(circuit_breaker,
                                 #{failure_threshold => 3, timeout_ms => 50, success_threshold => 2, probe_limit => 2}),
    [{Id, _}] = receivers(?SHARD, 1),
    _ = [ erlmcp_circuit_breaker:record_failure() || _ <- [1, 2] ],
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_circuit_breaker:record_failure(),
    ?assertEqual({degraded, [{circuit, open}]}, erlmcp_native:health()),
    test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end, ?DEADLINE_MS),
    %% Half open.
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_manager:route_message(Id, x),
    ?assertEqual(closed, erlmcp_circuit_breaker:get_state()),
    ok = erlmcp_circuit_breaker:force_open(),
    ?assertEqual({degraded, [{circuit, open}]}, erlmcp_native:health()),
    %% Off, it refuses nothing.
    ok = erlmcp_backpressure:set(circuit_breaker, off),
    ?assertEqual(ok, erlmcp_native:health()).


%% Nobody sends anything because the node is degraded, or its circuit open: it becomes half open all the
%% same, so that somebody does.
circuit_without_messages(_Config) ->
    ok = erlmcp_backpressure:set(circuit_breaker, #{timeout_ms => 50, success_threshold => 1}),
    [{Id, _}] = receivers(?SHARD, 1),
    ok = erlmcp_circuit_breaker:force_open(),
    ok = health_is(ok),
    ?assertEqual(half_open, erlmcp_circuit_breaker:get_state()),
    ok = erlmcp_circuit_breaker:force_open(),
    test_support:await(fun() -> not erlmcp_circuit_breaker:is_open() end, ?DEADLINE_MS),
    ok = erlmcp_shard_manager:route_message(Id, x),
    ?assertEqual(closed, erlmcp_circuit_breaker:get_state()).


overloaded_shards(_Config) ->
    Stalled = [ hd(receivers(Shard, 1)) || Shard <- [5, ?SHARD] ],
    _ = [ overload(Id) || {Id, _} <- Stalled ],
    {degraded, Reasons} = erlmcp_native:health(),
    ?assertEqual([5, ?SHARD], proplists:get_value(overloaded_shards, Reasons)),
    ?assertMatch([{5, D5, ?THRESHOLD}, {?SHARD, D17, ?THRESHOLD}] when D5 >= ?THRESHOLD andalso D17 >= ?THRESHOLD,
                 proplists:get_value(queue_depths, Reasons)),
    ?assertEqual([overloaded_shards, queue_depths], lists:sort([ element(1, R) || R <- Reasons ])),
    %% It lasts as long as they stall.
    timer:sleep(15 * ?INTERVAL_MS),
    {degraded, Later} = erlmcp_native:health(),
    ?assertEqual([5, ?SHARD], proplists:get_value(overloaded_shards, Later)),
    [{_, First}, {_, Second}] = Stalled,
    First ! take_all,
    Overloaded = fun() ->
                         {degraded, Left} = erlmcp_native:health(),
                         proplists:get_value(overloaded_shards, Left)
                 end,
    test_support:await_value([?SHARD], Overloaded, ?DEADLINE_MS),
    Second ! take_all,
    ok = health_is(ok).


%% No message has been refused yet.
queue_depths(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    Nearly = ?THRESHOLD * 80 div 100,
    _ = send(Id, Nearly - 1),
    ?assertEqual(ok, settled(?SHARD, Nearly - 1)),
    _ = send(Id, 1),
    ok = health_is({degraded, [{queue_depths, [{?SHARD, Nearly, ?THRESHOLD}]}]}),
    %% The limit is read with each check.
    ok = erlmcp_shard_health:set_limits((?QUIET)#{queue_depth_percent => 81}),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{queue_depth_percent => 1}),
    ?assertEqual({degraded, [{queue_depths, [{?SHARD, Nearly, ?THRESHOLD}]}]}, erlmcp_native:health()),
    Pid ! take_all,
    ok = health_is(ok).


%% What has no threshold is never full.
queue_depths_of_shards_without_a_threshold(_Config) ->
    ok = erlmcp_shard_health:set_limits((?QUIET)#{queue_depth_percent => 1}),
    [{Id, _}] = receivers(?SHARD, 1),
    ok = erlmcp_admission_control:set_threshold(?SHARD, infinity),
    _ = send(Id, 10 * ?THRESHOLD),
    ?assertEqual(ok, erlmcp_native:health()),
    %% The others are empty.
    ok = erlmcp_admission_control:set_threshold(1),
    ?assertEqual(ok, erlmcp_native:health()).


run_queue_and_scheduler_use(_Config) ->
    Schedulers = erlang:system_info(schedulers_online),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{run_queue_per_scheduler => 5, scheduler_use_percent => 90}),
    Busy = [ spawn(fun Loop() -> Loop() end) || _ <- lists:seq(1, 20 * Schedulers) ],
    %% A spike is no reason: the first measurements are not enough.
    test_support:await(fun() ->
                               case erlmcp_native:health() of
                                   {degraded, Reasons} ->
                                       is_tuple(lists:keyfind(run_queue, 1, Reasons)) andalso
                                       is_tuple(lists:keyfind(scheduler_use_percent, 1, Reasons));
                                   ok ->
                                       false
                               end
                       end,
                       ?DEADLINE_MS),
    {degraded, [{run_queue, Length, QueueLimit}, {scheduler_use_percent, Used, 90}]} = erlmcp_native:health(),
    ?assertEqual(5 * Schedulers, QueueLimit),
    ?assert(Length > QueueLimit andalso Length =< 21 * Schedulers, Length),
    ?assert(Used > 90 andalso Used =< 100, Used),
    %% Each limit for itself.
    ok = erlmcp_shard_health:set_limits((?QUIET)#{run_queue_per_scheduler => 1}),
    ?assertMatch({degraded, [{run_queue, _, Schedulers}]}, erlmcp_native:health()),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{scheduler_use_percent => 1}),
    ?assertMatch({degraded, [{scheduler_use_percent, _, 1}]}, erlmcp_native:health()),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{scheduler_use_percent => 100, run_queue_per_scheduler => 1000}),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{run_queue_per_scheduler => 5, scheduler_use_percent => 90}),
    %% What was measured more than five seconds ago says nothing of now.
    ok = sys:suspend(erlmcp_shard_health),
    _ = [ exit(Pid, kill) || Pid <- Busy ],
    ok = health_is({degraded, [{control_plane_down, [erlmcp_shard_health]}]}),
    ok = sys:resume(erlmcp_shard_health),
    ok = health_is(ok).


%% The only scheduler that is online has no time left.
schedulers_that_are_not_online(_Config) ->
    test_support:in_peer(?MODULE, one_of_four_is_online, [], #{flags => ["+S", "4:4"]}).


one_of_four_is_online() ->
    ok = start(),
    4 = erlang:system_flag(schedulers_online, 1),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{scheduler_use_percent => 90}),
    Busy = spawn(fun Loop() -> Loop() end),
    IsBusy = fun() ->
                     case erlmcp_native:health() of
                         {degraded, [{scheduler_use_percent, Used, 90}]} -> Used > 90 andalso Used =< 100;
                         ok -> false
                     end
             end,
    test_support:await(IsBusy, ?DEADLINE_MS),
    %% With the others it has time again.
    1 = erlang:system_flag(schedulers_online, 4),
    ok = health_is(ok),
    exit(Busy, kill),
    application:stop(erlmcp_native).


memory(_Config) ->
    ok = erlmcp_shard_health:set_limits((?QUIET)#{memory_bytes => 1000}),
    {degraded, [{memory_bytes, Used, 1000}]} = erlmcp_native:health(),
    %% That of the operating system's process, give or take.
    Total = erlang:memory(total),
    ?assert(Used > Total div 2 andalso Used < 20 * Total, {Used, Total}),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{memory_bytes => 1 bsl 50}),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_health:set_limits(maps:without([memory_bytes], ?QUIET)),
    ?assertEqual(ok, erlmcp_native:health()),
    %% A limit that memory is really allocated beyond, and that it falls below again.
    Limit = erlmcp_node_memory:used_bytes() + 100_000_000,
    ok = erlmcp_shard_health:set_limits((?QUIET)#{memory_bytes => Limit}),
    ?assertEqual(ok, erlmcp_native:health()),
    Holder = spawn(fun() ->
                           Large = binary:copy(<<1>>, 300_000_000),
                           receive stop -> byte_size(Large) end
                   end),
    test_support:await(fun() ->
                               case erlmcp_native:health() of
                                   {degraded, [{memory_bytes, Now, Limit}]} -> Now > Limit;
                                   ok -> false
                               end
                       end,
                       ?DEADLINE_MS),
    Holder ! stop,
    ok = health_is(ok).


%%% The control plane


control_plane_down(_Config) ->
    Names = [erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery],
    _ = [ begin
              ok = supervisor:terminate_child(erlmcp_control_plane_sup, Name),
              ?assertEqual({degraded, [{control_plane_down, [Name]}]}, erlmcp_native:health()),
              {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, Name),
              ?assertEqual(ok, erlmcp_native:health())
          end || Name <- Names ],
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ?assertEqual({degraded, [{control_plane_down, [erlmcp_control_plane_sup | Names]}]}, erlmcp_native:health()),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ?assertEqual(ok, erlmcp_native:health()),
    %% Killed, they come back by themselves.
    _ = [ exit(whereis(Name), kill) || Name <- [erlmcp_control_plane_sup | Names] ],
    ok = health_is(ok).


%% They are there, and do nothing.
control_plane_is_silent(_Config) ->
    Names = [erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery],
    test_support:await(fun() -> is_map(erlmcp_shard_metrics:get()) end, ?DEADLINE_MS),
    _ = [ ok = sys:suspend(Name) || Name <- Names ],
    ?assertEqual(ok, erlmcp_native:health()),
    Suspended = now_ms(),
    ok = health_is({degraded, [{control_plane_down, Names}]}),
    ?assert(now_ms() - Suspended > 3_000),
    ok = sys:resume(erlmcp_shard_metrics),
    ok = health_is({degraded, [{control_plane_down, [erlmcp_shard_health, erlmcp_shard_recovery]}]}),
    ok = sys:resume(erlmcp_shard_health),
    ok = health_is({degraded, [{control_plane_down, [erlmcp_shard_recovery]}]}),
    ok = sys:resume(erlmcp_shard_recovery),
    ok = health_is(ok).


%% Processes that stand still before they have measured anything.
silent_from_the_beginning(_Config) ->
    Names = [erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery],
    _ = [ begin
              ok = supervisor:terminate_child(erlmcp_control_plane_sup, Name),
              {ok, Pid} = supervisor:restart_child(erlmcp_control_plane_sup, Name),
              ok = sys:suspend(Pid)
          end || Name <- Names ],
    ?assertEqual(ok, erlmcp_native:health()),
    ok = health_is({degraded, [{control_plane_down, Names}]}),
    _ = [ ok = sys:resume(Name) || Name <- Names ],
    ok = health_is(ok).


%% Entries that are wrong are somebody's fault in native code, so here it is only said that they are.
%% Whoever looks at the shard next says that they are right.
shard_damaged(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    true = erlmcp_shard_recovery_records:set_damaged(?SHARD),
    true = erlmcp_shard_recovery_records:set_damaged(5),
    ?assertEqual({degraded, [{shard_damaged, [5, ?SHARD]}]}, erlmcp_native:health()),
    ?assertEqual([5, ?SHARD], erlmcp_shard_recovery:damaged()),
    %% The check after a restart of the manager,
    exit(manager(?SHARD), kill),
    ok = health_is({degraded, [{shard_damaged, [5]}]}),
    ?assertMatch(#{event := shard_repaired, shard_id := ?SHARD}, logged_event(shard_repaired)),
    %% and those of a process of recovery that finds damaged shards.
    exit(whereis(erlmcp_shard_recovery), kill),
    ok = health_is(ok),
    ?assertMatch(#{event := shard_repaired, shard_id := 5}, logged_event(shard_repaired)).


several_reasons_at_once(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    overload(Id),
    ok = erlmcp_circuit_breaker:force_open(),
    ok = supervisor:terminate_child(erlmcp_shard_sup, 3),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, erlmcp_shard_metrics),
    true = erlmcp_shard_recovery_records:set_damaged(8),
    ok = erlmcp_shard_health:set_limits((?QUIET)#{memory_bytes => 1}),
    {degraded, Reasons} = erlmcp_native:health(),
    ?assertEqual([circuit, control_plane_down, memory_bytes, overloaded_shards, queue_depths, shard_damaged, shard_managers_down],
                 lists:sort([ element(1, Reason) || Reason <- Reasons ])),
    ?assertEqual([open, [erlmcp_shard_metrics], [?SHARD], [8], [3]],
                 [ proplists:get_value(Key, Reasons)
                   || Key <- [circuit, control_plane_down, overloaded_shards, shard_damaged, shard_managers_down] ]),
    %% The shell shows all of them.
    ct:capture_start(),
    ok = erlmcp_native:i(),
    ct:capture_stop(),
    Shown = lists:flatten(ct:capture_get()),
    _ = [ ?assertNotEqual(nomatch, string:find(Shown, atom_to_list(element(1, Reason)))) || Reason <- Reasons ],
    %% One goes after the other.
    ok = erlmcp_circuit_breaker:force_close(),
    ok = erlmcp_shard_health:set_limits(?QUIET),
    Pid ! take_all,
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, 3),
    Left = fun() ->
                   {degraded, Others} = erlmcp_native:health(),
                   lists:sort([ element(1, Reason) || Reason <- Others ])
           end,
    test_support:await_value([control_plane_down, shard_damaged], Left, ?DEADLINE_MS),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, erlmcp_shard_metrics),
    exit(manager(8), kill),
    ok = health_is(ok).


%%% Limits


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
             [{memory_bytes, 1}],
             infinity,
             off,
             42],
    _ = [ begin
              {error, {bad_option, health, Value, Expected}} = erlmcp_shard_health:set_limits(Value),
              _ = [ ?assertNotEqual(nomatch, string:find(Expected, Part), {Value, Part, Expected})
                    || Part <- ["queue_depth_percent (an integer from 1 to 100)",
                                "run_queue_per_scheduler (an integer from 1, or infinity)",
                                "scheduler_use_percent (an integer from 1 to 100, or infinity)",
                                "memory_bytes (an integer from 1, machine or infinity)"] ],
              ?assertEqual({ok, ?QUIET}, application:get_env(erlmcp_native, health)),
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
              ?assertEqual(ok, erlmcp_shard_health:set_limits(Limits)),
              ?assertEqual({ok, Limits}, application:get_env(erlmcp_native, health))
          end || Limits <- Right ].


%% Set by others without a check: the defaults hold.
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
    ?assertMatch({bad_option, health, #{queue_depth_percent := 200}, "#{}, or a map with any of " ++ _}, Reason),
    ok = application:set_env(erlmcp_native, health, (?QUIET)#{memory_bytes => 1}),
    ok = application:start(erlmcp_native),
    ?assertMatch({degraded, [{memory_bytes, _, 1}]}, erlmcp_native:health()).


%% A busy machine is a reason by the default limits.
reasons_without_load(Reasons) ->
    [ Reason || Reason <- Reasons, not lists:member(element(1, Reason), [run_queue, scheduler_use_percent]) ].


%%% Logs


one_line_for_each_change_that_lasts(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    Degrade = fun() -> ok = erlmcp_shard_health:set_limits((?QUIET)#{memory_bytes => 1}) end,
    Mend = fun() -> ok = erlmcp_shard_health:set_limits(?QUIET) end,
    %% What is there for less than three checks, a second apart, is not told.
    ok = flap(Degrade, Mend, 3),
    ?assertEqual([], health_lines()),
    Degraded = now_ms(),
    Degrade(),
    {warning, #{event := health_degraded, domain := [erlmcp_native]}, Text} = next_health_line(),
    ?assert(now_ms() - Degraded > 1_900),
    ?assertNotEqual(nomatch, string:find(Text, "memory_bytes")),
    %% Once, however long it lasts and whatever is added; a new monitor process knows what is told.
    exit(whereis(erlmcp_shard_health), kill),
    true = erlmcp_shard_recovery_records:set_damaged(?SHARD),
    timer:sleep(4_500),
    ok = flap(Mend, Degrade, 2),
    ?assertEqual([], health_lines()),
    true = erlmcp_shard_recovery_records:repaired(?SHARD),
    exit(whereis(erlmcp_shard_health), kill),
    Mended = now_ms(),
    Mend(),
    ?assertMatch({notice, #{event := health_ok, domain := [erlmcp_native]}, _}, next_health_line()),
    ?assert(now_ms() - Mended > 1_900),
    timer:sleep(1_000),
    ?assertEqual([], health_lines()).


%% Changes the condition every 1.2 seconds, which is two checks at most. A machine that is too busy for
%% that gets another chance.
flap(There, Back, Times) ->
    Began = now_ms(),
    Phases = lists:append([ [phase(There), phase(Back)] || _ <- lists:seq(1, Times) ]),
    case lists:max(Phases) < 1_900 of
        true ->
            ok;
        false ->
            ct:log("too busy: ~p ms, ~p", [now_ms() - Began, Phases]),
            timer:sleep(4_000),
            _ = health_lines(),
            flap(There, Back, Times)
    end.


phase(Change) ->
    Began = now_ms(),
    Change(),
    timer:sleep(1_200),
    now_ms() - Began.


log(#{level := Level, meta := #{domain := [erlmcp_native | _], event := _} = Meta} = Event, #{config := Pid}) ->
    Text = lists:flatten(logger_formatter:format(Event, #{template => [msg], single_line => true})),
    Pid ! {logged, Level, maps:with([event, shard_id, domain], Meta), Text};
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


logged_event(Event) ->
    receive {logged, _Level, #{event := Event} = Meta, _Text} -> Meta after ?DEADLINE_MS -> none end.


%%% Whom it asks


%% Nobody: the caller sends no message and links no port.
asks_no_process(_Config) ->
    ok = erlmcp_shard_health:set_limits(maps:without([memory_bytes], ?QUIET)),
    Self = self(),
    Asker = spawn_link(fun() ->
                               receive go -> ok end,
                               _ = erlmcp_native:health(),
                               erlang:trace(self(), false, [send, procs, ports]),
                               Self ! asked
                       end),
    1 = erlang:trace(Asker, true, [send, procs, ports, {tracer, self()}]),
    Asker ! go,
    receive asked -> ok end,
    Delivered = erlang:trace_delivered(Asker),
    receive {trace_delivered, Asker, Delivered} -> ok end,
    ?assertEqual([], traces()).


traces() ->
    receive Trace when element(1, Trace) =:= trace -> [Trace | traces()] after 0 -> [] end.


answers_while_everything_stands_still(_Config) ->
    Names = [ erlmcp_backpressure:sampler(Shard) || Shard <- shards() ] ++
        [erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery, erlmcp_shard_sup, erlmcp_control_plane_sup,
         erlmcp_native_sup],
    Pids = [ whereis(Name) || Name <- Names ],
    _ = [ erlang:suspend_process(Pid) || Pid <- Pids ],
    Fastest = try
                  lists:min([ element(1, timer:tc(fun() -> ok = erlmcp_native:health() end)) || _ <- lists:seq(1, 20) ])
              after
                  _ = [ erlang:resume_process(Pid) || Pid <- Pids ]
              end,
    ct:pal("health takes ~b us", [Fastest]),
    ?assert(Fastest < 10_000, Fastest),
    %% And while nothing is there.
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_shard_sup),
    {Us, Health} = timer:tc(fun() -> erlmcp_native:health() end),
    ?assertMatch({degraded, [{shard_managers_down, [0 | _]}, {control_plane_down, [_, _, _, _]}]}, Health),
    ?assert(Us < 1_000_000, Us),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_shard_sup),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ok = health_is(ok).


unknown_messages_change_nothing(_Config) ->
    Processes = processes_of_the_control_plane(),
    _ = [ begin
              ?assertEqual({error, unknown_request}, gen_server:call(Name, anything)),
              ok = gen_server:cast(Name, anything),
              Name ! anything,
              Name ! {'DOWN', make_ref(), process, self(), normal},
              Name ! {timeout, make_ref(), look},
              ?assertEqual({error, unknown_request}, gen_server:call(Name, anything))
          end || Name <- [erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery] ],
    ?assertEqual(Processes, processes_of_the_control_plane()),
    ?assertEqual(ok, erlmcp_native:health()).


processes_of_the_control_plane() ->
    [ {Name, whereis(Name)}
      || Name <- [erlmcp_control_plane_sup, erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery] ].


%%% Memory


memory_limit_of_the_machine(Config) ->
    Root = root(Config),
    ?assertEqual(infinity, erlmcp_node_memory:limit_bytes(Root)),
    file(Root, "proc/meminfo", "MemTotal:        1000 kB\nMemFree:          10 kB\nMemAvailable:     10 kB\n"),
    ?assertEqual(900 * 1024, erlmcp_node_memory:limit_bytes(Root)),
    file(Root, "proc/meminfo", "MemFree:          10 kB\nMemTotal:       2000 kB\n"),
    ?assertEqual(1800 * 1024, erlmcp_node_memory:limit_bytes(Root)),
    file(Root, "proc/meminfo", "nothing that one could read\n"),
    ?assertEqual(infinity, erlmcp_node_memory:limit_bytes(Root)).


memory_limit_of_a_control_group(Config) ->
    %% Version 2, the group itself and a parent.
    V2 = root(Config),
    file(V2, "proc/meminfo", "MemTotal: 1000000 kB\n"),
    file(V2, "proc/self/cgroup", "0::/a/b\n"),
    Machine = 900_000 * 1024,
    ?assertEqual(Machine, erlmcp_node_memory:limit_bytes(V2)),
    file(V2, "sys/fs/cgroup/a/b/memory.max", "max\n"),
    ?assertEqual(Machine, erlmcp_node_memory:limit_bytes(V2)),
    file(V2, "sys/fs/cgroup/a/b/memory.max", "500000\n"),
    ?assertEqual(450_000, erlmcp_node_memory:limit_bytes(V2)),
    file(V2, "sys/fs/cgroup/a/memory.max", "100000\n"),
    ?assertEqual(90_000, erlmcp_node_memory:limit_bytes(V2)),
    %% More than the machine has is no limit.
    file(V2, "sys/fs/cgroup/a/memory.max", "9000000000000\n"),
    file(V2, "sys/fs/cgroup/a/b/memory.max", "9000000000000\n"),
    ?assertEqual(Machine, erlmcp_node_memory:limit_bytes(V2)),
    %% Another group's.
    file(V2, "sys/fs/cgroup/other/memory.max", "1000\n"),
    ?assertEqual(Machine, erlmcp_node_memory:limit_bytes(V2)),
    %% In a container: the group is the root of what is mounted, whatever path the machine gives it.
    Container = root(Config),
    file(Container, "proc/self/cgroup", "0::/\n"),
    file(Container, "sys/fs/cgroup/memory.max", "200000\n"),
    ?assertEqual(180_000, erlmcp_node_memory:limit_bytes(Container)),
    file(Container, "proc/self/cgroup", "0::/system.slice/docker-1234.scope\n"),
    ?assertEqual(180_000, erlmcp_node_memory:limit_bytes(Container)),
    %% Names with colons, as container runtimes give them.
    file(Container, "proc/self/cgroup", "0::/system.slice/kubepods-pod1.slice:cri-containerd:1234\n"),
    ?assertEqual(180_000, erlmcp_node_memory:limit_bytes(Container)),
    file(Container, "sys/fs/cgroup/system.slice/kubepods-pod1.slice:cri-containerd:1234/memory.max", "100000\n"),
    ?assertEqual(90_000, erlmcp_node_memory:limit_bytes(Container)),
    %% Version 1.
    V1 = root(Config),
    file(V1, "proc/self/cgroup", "11:cpu,cpuacct:/x\n4:memory:/docker/1\n1:name=systemd:/docker/1\n0::/\n"),
    ?assertEqual(infinity, erlmcp_node_memory:limit_bytes(V1)),
    file(V1, "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "300000\n"),
    ?assertEqual(270_000, erlmcp_node_memory:limit_bytes(V1)),
    file(V1, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
    ?assertEqual(270_000, erlmcp_node_memory:limit_bytes(V1)),
    file(V1, "sys/fs/cgroup/memory/memory.limit_in_bytes", "100000\n"),
    ?assertEqual(90_000, erlmcp_node_memory:limit_bytes(V1)),
    %% Controllers that are mounted together.
    file(V1, "proc/self/cgroup", "4:hugetlb,memory:/docker/1\n"),
    ?assertEqual(90_000, erlmcp_node_memory:limit_bytes(V1)),
    %% A group of other controllers has no limit of memory.
    file(V1, "proc/self/cgroup", "4:cpuset:/docker/1\n"),
    ?assertEqual(infinity, erlmcp_node_memory:limit_bytes(V1)).


memory_used(_Config) ->
    Before = erlmcp_node_memory:used_bytes(),
    Binary = binary:copy(<<1>>, 200_000_000),
    After = erlmcp_node_memory:used_bytes(),
    ?assertEqual(200_000_000, byte_size(Binary)),
    ?assert(After - Before > 100_000_000, {Before, After}),
    case erlmcp_node_memory:limit_bytes() of
        infinity -> ok;
        Limit -> ?assert(Limit > After, {Limit, After})
    end.


root(Config) ->
    Root = filename:join([proplists:get_value(priv_dir, Config), "machine_" ++ integer_to_list(erlang:unique_integer([positive]))]),
    ok = file:make_dir(Root),
    Root.


file(Root, Path, Content) ->
    File = filename:join(Root, Path),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, Content).


%%% Tools


shards() ->
    lists:seq(0, ?SHARDS - 1).


manager(Shard) ->
    whereis(erlmcp_backpressure:sampler(Shard)).


%% Connections of one shard, whose processes take nothing until they are told.
receivers(Shard, Number) ->
    [ begin
          Pid = spawn(fun stalled/0),
          ok = erlmcp_shard_registry:register_connection(Id, Pid, receiver),
          {Id, Pid}
      end || Id <- free_ids(Shard, Number, 1) ].


free_ids(_Shard, 0, _N) ->
    [];
free_ids(Shard, Number, N) ->
    Id = <<"receiver ", (integer_to_binary(N))/binary>>,
    case erlmcp_shard_registry:get_shard_id(Id) =:= Shard andalso
         erlmcp_shard_registry:whereis_connection(Id) =:= undefined of
        true -> [Id | free_ids(Shard, Number - 1, N + 1)];
        false -> free_ids(Shard, Number, N + 1)
    end.


stalled() ->
    receive take_all -> taking() end.


taking() ->
    receive _ -> taking() end.


send(Id, Number) ->
    [ erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, Number) ].


%% Until it is refused, also after the next samples.
overload(Id) ->
    Shard = erlmcp_shard_registry:get_shard_id(Id),
    test_support:await(fun() ->
                               _ = send(Id, ?THRESHOLD),
                               {Depth, _, IsOverloaded} = erlmcp_admission_control:load(Shard),
                               IsOverloaded andalso Depth >= ?THRESHOLD andalso
                               erlmcp_shard_manager:route_message(Id, x) =:= {error, shard_overloaded}
                       end,
                       ?DEADLINE_MS),
    ok.


%% Health is ok after samples have found so many messages.
settled(Shard, Depth) ->
    test_support:await(fun() -> element(1, erlmcp_admission_control:load(Shard)) =:= Depth end, ?DEADLINE_MS),
    erlmcp_native:health().


health_is(Expected) ->
    test_support:await_value(Expected, fun erlmcp_native:health/0, ?DEADLINE_MS).


now_ms() ->
    erlang:monotonic_time(millisecond).
