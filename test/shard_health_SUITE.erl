%%% Health is accurate: each reason of erlmcp_shard_health is provoked for real, is reported, and disappears by
%%% itself when its cause is gone.
%%%
%%% The contract: every current problem is a reason, and nothing else is. The caller alone computes the answer,
%%% in whatever state the control plane is. Limits, the log and the memory of the node have their own suites
%%% (health_limits_SUITE, health_log_SUITE, node_memory_SUITE).
%%%
%%% Cases wait for conditions, so other work on the machine makes a case slower but not wrong.
-module(shard_health_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(SHARD,       17).
-define(SHARDS,      64).
-define(THRESHOLD,   200).
-define(INTERVAL_MS, 20).
-define(DEADLINE_MS, 60_000).


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
     several_reasons_at_once,
     asks_no_process,
     answers_while_everything_stands_still,
     unknown_messages_change_nothing].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    ok = start(),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = [ exit(Pid, kill) || Shard <- shards(), {_, {Pid, receiver}} <- erlmcp_shard_registry:list_connections(Shard) ],
    try
        test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end, ?DEADLINE_MS)
    after
        _ = [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker, health] ],
        ok = erlmcp_native_config:configure(),
        ok = erlmcp_circuit_breaker:force_close(),
        _ = application:stop(erlmcp_native)
    end.


start() ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:set_env(erlmcp_native, health, quiet()),
    ok = application:start(erlmcp_native),
    ok = test_support:await_samplers(),
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
    %% All managers, and their supervisor.
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_shard_sup),
    ?assertEqual({degraded, [{shard_managers_down, shards()}]}, erlmcp_native:health()),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_shard_sup),
    ok = health_is(ok),
    %% Killed managers are restarted.
    _ = [ exit(manager(Shard), kill) || Shard <- shards() ],
    ok = health_is(ok).


%% The manager is alive and does nothing.
stale_samples(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    ok = sys:suspend(manager(?SHARD)),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_manager:route_message(Id, x),
    ok = health_is({degraded, [{stale_samples, [?SHARD]}]}),
    %% The shard behaves as reported: it admits every message, except perhaps from a sender that requests a sample and
    %% waits for it.
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


%% The process that was to request a sample exited before it did so, and no process sends any more. Health
%% reports that and does nothing about it; the next sender requests the sample again.
lost_requests_for_samples(_Config) ->
    Shards = [3, ?SHARD],
    Ids = [ lose_request(Shard) || Shard <- Shards ],
    ok = health_is({degraded, [{stale_samples, Shards}]}),
    _ = test_support:await_received(erlmcp_shard_health, measure, 2),
    ?assertEqual({degraded, [{stale_samples, Shards}]}, erlmcp_native:health()),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || Id <- Ids ],
    ok = health_is(ok).


%% The next senders request a sample again, also while the control plane is down. A stalled receiver gets as
%% many messages as the threshold, and none after that.
lost_request_at_a_stalled_receiver(_Config) ->
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    _ = lose_request(?SHARD),
    [{Id, Pid}] = receivers(?SHARD, 1),
    test_support:await(fun() -> erlmcp_admission_control:is_unwatched(?SHARD) end, ?DEADLINE_MS),
    Overloaded = {error, shard_overloaded},
    test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= Overloaded end, ?DEADLINE_MS),
    ?assertEqual({message_queue_len, ?THRESHOLD}, process_info(Pid, message_queue_len)),
    %% A shard that is not sampled for ten intervals admits every message.
    ok = sampled(12, [?SHARD]),
    ?assertEqual(Overloaded, erlmcp_shard_manager:route_message(Id, x)),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup).


lose_request(Shard) ->
    [{Id, Pid}] = receivers(Shard, 1),
    %% An idle manager has no timer, and the next message requests a sample from it.
    ok = test_support:await(fun() -> has_paused(Shard) end, ?DEADLINE_MS),
    ?assertEqual({Pid, [{sample, Shard}]}, erlmcp_nif:route_connection(Id)),
    Id.


%% Reads the fields `timer' and `sampling' of the manager's state.
has_paused(Shard) ->
    State = sys:get_state(erlmcp_shard_sampler:name(Shard)),
    {element(3, State), element(4, State)} =:= {idle, none}.


%% Waits until the managers of shards with one stalled receiver have each sampled it `Times' more times. While
%% no process sends, they do so once per interval.
sampled(Times, Shards) ->
    Looks = fun(Shard) -> element(1, erlmcp_nif:sample_counts(Shard)) end,
    Due = [ {Shard, Looks(Shard) + Times} || Shard <- Shards ],
    test_support:await(fun() -> lists:all(fun({Shard, Number}) -> Looks(Shard) >= Number end, Due) end, ?DEADLINE_MS).


idle_shards_need_no_samples(_Config) ->
    _ = receivers(?SHARD, 3),
    test_support:await(fun() ->
                               #{sample_age_ms := Age} = erlmcp_admission_control:get_shard_stats(?SHARD),
                               is_integer(Age) andalso Age > 10 * ?INTERVAL_MS
                       end,
                       ?DEADLINE_MS),
    ?assertEqual(ok, erlmcp_native:health()).


circuit(_Config) ->
    ok = erlmcp_native:set(circuit_breaker,
                           #{failure_threshold => 3, timeout_ms => 50, success_threshold => 2, probe_limit => 2}),
    [{Id, _}] = receivers(?SHARD, 1),
    _ = [ erlmcp_circuit_breaker:record_failure() || _ <- [1, 2] ],
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_circuit_breaker:record_failure(),
    ?assertEqual({degraded, [{circuit, open}]}, erlmcp_native:health()),
    test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end, ?DEADLINE_MS),
    %% The circuit is half-open.
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_shard_manager:route_message(Id, x),
    ?assertEqual(closed, erlmcp_circuit_breaker:get_state()),
    ok = erlmcp_circuit_breaker:force_open(),
    ?assertEqual({degraded, [{circuit, open}]}, erlmcp_native:health()),
    %% A circuit that is off refuses nothing.
    ok = erlmcp_native:set(circuit_breaker, off),
    ?assertEqual(ok, erlmcp_native:health()).


%% No process sends anything, because the node is degraded or its circuit open. The circuit becomes half-open
%% nevertheless, so that sending starts again.
circuit_without_messages(_Config) ->
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 50, success_threshold => 1}),
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
    %% The reason lasts as long as the receivers stall.
    ok = sampled(15, [5, ?SHARD]),
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


%% The reason appears before any message is refused.
queue_depths(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    Nearly = ?THRESHOLD * 80 div 100,
    _ = send(Id, Nearly - 1),
    ?assertEqual(ok, settled(?SHARD, Nearly - 1)),
    _ = send(Id, 1),
    ok = health_is({degraded, [{queue_depths, [{?SHARD, Nearly, ?THRESHOLD}]}]}),
    %% The limit is read at each check.
    ok = erlmcp_native:set(health, (quiet())#{queue_depth_percent => 81}),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_native:set(health, (quiet())#{queue_depth_percent => 1}),
    ?assertEqual({degraded, [{queue_depths, [{?SHARD, Nearly, ?THRESHOLD}]}]}, erlmcp_native:health()),
    Pid ! take_all,
    ok = health_is(ok).


%% A shard without a threshold is never full.
queue_depths_of_shards_without_a_threshold(_Config) ->
    ok = erlmcp_native:set(health, (quiet())#{queue_depth_percent => 1}),
    [{Id, _}] = receivers(?SHARD, 1),
    ok = erlmcp_admission_control:set_threshold(?SHARD, infinity),
    _ = send(Id, 10 * ?THRESHOLD),
    ?assertEqual(ok, erlmcp_native:health()),
    %% The other shards are empty.
    ok = erlmcp_admission_control:set_threshold(1),
    ?assertEqual(ok, erlmcp_native:health()).


run_queue_and_scheduler_use(_Config) ->
    Schedulers = erlang:system_info(schedulers_online),
    ok = erlmcp_native:set(health, (quiet())#{run_queue_per_scheduler => 5, scheduler_use_percent => 90}),
    Busy = [ spawn(fun Loop() -> Loop() end) || _ <- lists:seq(1, 20 * Schedulers) ],
    %% A spike is no reason: the first measurements do not suffice.
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
    %% Each limit alone.
    ok = erlmcp_native:set(health, (quiet())#{run_queue_per_scheduler => 1}),
    ?assertMatch({degraded, [{run_queue, _, Schedulers}]}, erlmcp_native:health()),
    ok = erlmcp_native:set(health, (quiet())#{scheduler_use_percent => 1}),
    ?assertMatch({degraded, [{scheduler_use_percent, _, 1}]}, erlmcp_native:health()),
    ok = erlmcp_native:set(health, (quiet())#{scheduler_use_percent => 100, run_queue_per_scheduler => 1000}),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_native:set(health, (quiet())#{run_queue_per_scheduler => 5, scheduler_use_percent => 90}),
    %% A measurement older than five seconds says nothing about the current load.
    ok = sys:suspend(erlmcp_shard_health),
    _ = [ exit(Pid, kill) || Pid <- Busy ],
    ok = health_is({degraded, [{control_plane_down, [erlmcp_shard_health]}]}),
    ok = sys:resume(erlmcp_shard_health),
    ok = health_is(ok).


%% The only scheduler that is online is fully used.
schedulers_that_are_not_online(_Config) ->
    test_support:in_peer(?MODULE, one_of_four_is_online, [], #{flags => ["+S", "4:4"]}).


one_of_four_is_online() ->
    ok = start(),
    4 = erlang:system_flag(schedulers_online, 1),
    ok = erlmcp_native:set(health, (quiet())#{scheduler_use_percent => 90}),
    Busy = spawn(fun Loop() -> Loop() end),
    IsBusy = fun() ->
                     case erlmcp_native:health() of
                         {degraded, [{scheduler_use_percent, Used, 90}]} -> Used > 90 andalso Used =< 100;
                         ok -> false
                     end
             end,
    test_support:await(IsBusy, ?DEADLINE_MS),
    %% With the other schedulers online, there is spare time again.
    1 = erlang:system_flag(schedulers_online, 4),
    ok = health_is(ok),
    exit(Busy, kill),
    application:stop(erlmcp_native).


memory(_Config) ->
    ok = erlmcp_native:set(health, (quiet())#{memory_bytes => 1000}),
    {degraded, [{memory_bytes, Used, 1000}]} = erlmcp_native:health(),
    %% Roughly the memory of the operating system's process.
    Total = erlang:memory(total),
    ?assert(Used > Total div 2 andalso Used < 20 * Total, {Used, Total}),
    ok = erlmcp_native:set(health, (quiet())#{memory_bytes => 1 bsl 50}),
    ?assertEqual(ok, erlmcp_native:health()),
    ok = erlmcp_native:set(health, maps:without([memory_bytes], quiet())),
    ?assertEqual(ok, erlmcp_native:health()),
    %% A limit that a real allocation exceeds, and that memory falls below again.
    Limit = erlmcp_shard_health:memory_used_bytes() + 100_000_000,
    ok = erlmcp_native:set(health, (quiet())#{memory_bytes => Limit}),
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
    %% Killed processes are restarted.
    _ = [ exit(whereis(Name), kill) || Name <- [erlmcp_control_plane_sup | Names] ],
    ok = health_is(ok).


%% The processes are alive and do nothing.
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


%% Processes that are suspended before their first measurement.
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


several_reasons_at_once(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    overload(Id),
    ok = erlmcp_circuit_breaker:force_open(),
    ok = supervisor:terminate_child(erlmcp_shard_sup, 3),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, erlmcp_shard_metrics),
    ok = erlmcp_native:set(health, (quiet())#{memory_bytes => 1}),
    {degraded, Reasons} = erlmcp_native:health(),
    ?assertEqual([circuit, control_plane_down, memory_bytes, overloaded_shards, queue_depths, shard_managers_down],
                 lists:sort([ element(1, Reason) || Reason <- Reasons ])),
    ?assertEqual([open, [erlmcp_shard_metrics], [?SHARD], [3]],
                 [ proplists:get_value(Key, Reasons)
                   || Key <- [circuit, control_plane_down, overloaded_shards, shard_managers_down] ]),
    %% The shell shows all reasons.
    ct:capture_start(),
    ok = erlmcp_native:i(),
    ct:capture_stop(),
    Shown = lists:flatten(ct:capture_get()),
    _ = [ ?assertNotEqual(nomatch, string:find(Shown, atom_to_list(element(1, Reason)))) || Reason <- Reasons ],
    %% The reasons disappear one after the other.
    ok = erlmcp_circuit_breaker:force_close(),
    ok = erlmcp_native:set(health, quiet()),
    Pid ! take_all,
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, 3),
    Left = fun() ->
                   {degraded, Others} = erlmcp_native:health(),
                   lists:sort([ element(1, Reason) || Reason <- Others ])
           end,
    test_support:await_value([control_plane_down], Left, ?DEADLINE_MS),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, erlmcp_shard_metrics),
    ok = health_is(ok).


%%% Which processes it asks


%% It asks none: the caller sends no message and links to no port.
asks_no_process(_Config) ->
    ok = erlmcp_native:set(health, maps:without([memory_bytes], quiet())),
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
    Names = [ erlmcp_shard_sampler:name(Shard) || Shard <- shards() ] ++
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
    %% It also answers while none of these processes exists.
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_shard_sup),
    ?assertMatch({degraded, [{shard_managers_down, [0 | _]}, {control_plane_down, [_, _, _, _]}]}, erlmcp_native:health()),
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


%%% Tools


shards() ->
    lists:seq(0, ?SHARDS - 1).


manager(Shard) ->
    whereis(erlmcp_shard_sampler:name(Shard)).


%% Connections of one shard whose processes receive nothing until they are told to.
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


%% Sends until messages are refused, and are still refused after the next samples.
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


%% Health after a sample has found `Depth' messages.
settled(Shard, Depth) ->
    test_support:await(fun() -> element(1, erlmcp_admission_control:load(Shard)) =:= Depth end, ?DEADLINE_MS),
    erlmcp_native:health().


health_is(Expected) ->
    test_support:await_value(Expected, fun erlmcp_native:health/0, ?DEADLINE_MS).


now_ms() ->
    erlang:monotonic_time(millisecond).


%% None of these limits can be reached.
quiet() ->
    #{run_queue_per_scheduler => infinity, scheduler_use_percent => infinity, memory_bytes => infinity}.
