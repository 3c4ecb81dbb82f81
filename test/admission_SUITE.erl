%%% Admission control on real routes, with real shard managers and receivers that stall.
%%%
%%% The contract:
%%% At most the threshold, and one message for each concurrent caller, waits in the mailboxes of a shard. Only that
%%% shard refuses. Receivers that take their messages make room within an interval, and receivers that keep up are
%%% refused nothing. No caller is refused for lack of a sampler. No accepted message is lost. Transitions are logged,
%%% refusals are not. An idle shard costs nothing.
-module(admission_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).

-export([refuses_at_the_threshold/1,
         receivers_that_resume_make_room/1,
         receivers_that_keep_up_are_refused_nothing/1,
         nobody_is_refused_for_want_of_a_sampler/1,
         nothing_counts_without_the_application/1,
         killed_manager_samples_again/1,
         managers_killed_under_load/1,
         update_queue_depth/1,
         set_threshold/1,
         threshold_of_one/1,
         threshold_of_one_shard_alone/1,
         interval_changes_live/1,
         environment_alone_changes_nothing/1,
         stats/1,
         stats_show_rate_and_latency/1,
         first_rate_after_a_pause/1,
         idle_shards_cost_nothing/1,
         one_line_for_overload_and_recovery/1,
         one_line_for_an_overload_that_comes_and_goes/1,
         wrong_arguments_change_nothing/1]).

%% Logger handler
-export([log/2]).

-define(M,           erlmcp_admission_control).
-define(SHARD,       17).
-define(THRESHOLD,   500).
-define(INTERVAL_MS, 50).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [refuses_at_the_threshold,
     receivers_that_resume_make_room,
     receivers_that_keep_up_are_refused_nothing,
     nobody_is_refused_for_want_of_a_sampler,
     nothing_counts_without_the_application,
     killed_manager_samples_again,
     managers_killed_under_load,
     update_queue_depth,
     set_threshold,
     threshold_of_one,
     threshold_of_one_shard_alone,
     interval_changes_live,
     environment_alone_changes_nothing,
     stats,
     stats_show_rate_and_latency,
     first_rate_after_a_pause,
     idle_shards_cost_nothing,
     one_line_for_overload_and_recovery,
     one_line_for_an_overload_that_comes_and_goes,
     wrong_arguments_change_nothing].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    ok = start(),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = [ exit(Pid, kill) || Shard <- lists:seq(0, 63), {_, {Pid, receiver}} <- erlmcp_shard_registry:list_connections(Shard) ],
    try
        test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end)
    after
        _ = [ application:unset_env(erlmcp_native, Key)
              || Key <- [admission, token_bucket, circuit_breaker, backpressure] ],
        ok = erlmcp_native_config:configure(),
        ok = application:stop(erlmcp_native)
    end.


%% Only admission control is on.
start() ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:set_env(erlmcp_native, circuit_breaker, off),
    ok = application:start(erlmcp_native),
    test_support:await_samplers().


%%% The threshold


refuses_at_the_threshold(_Config) ->
    Receivers = receivers(?SHARD, 8),
    Callers = 6,
    Others = [ {Shard, Id} || Shard <- lists:seq(0, 63), Shard =/= ?SHARD, {Id, _} <- receivers(Shard, 1) ],
    RefusedBefore = refusals(?SHARD),
    Running = [ spawn_link(fun() -> send_until_told(ids(Receivers), 0, 0) end) || _ <- lists:seq(1, Callers) ],
    test_support:await(fun() -> refused(?SHARD) end),
    %% Samples are taken while the shard refuses, and they admit nothing.
    _ = [ begin
              ?assert(queued(Receivers) =< ?THRESHOLD + Callers),
              [ ?assertEqual({Shard, ok}, {Shard, erlmcp_shard_manager:route_message(Id, x)}) || {Shard, Id} <- Others ],
              [ ?assertEqual({Shard, ok}, {Shard, ?M:check_admission(Shard)}) || {Shard, _} <- Others ],
              await_looks(?SHARD, 8)
          end || _ <- lists:seq(1, 10) ],
    test_support:await(fun() -> refusals(?SHARD) - RefusedBefore > 100 * Callers end, ?DEADLINE_MS),
    {Accepted, Refused} = stop_senders(Running),
    ct:log("~b accepted, ~b refused", [Accepted, Refused]),
    ?assertEqual(Accepted, queued(Receivers)),
    ?assert(Accepted >= ?THRESHOLD, Accepted),
    ?assert(Accepted =< ?THRESHOLD + Callers, Accepted),
    %% Each refusal was counted once.
    ?assertEqual(Refused, refusals(?SHARD) - RefusedBefore),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertMatch(#{is_overloaded := true}, ?M:get_shard_stats(?SHARD)),
    ?assertEqual([], [ Shard || {Shard, _} <- Others, maps:get(is_overloaded, ?M:get_shard_stats(Shard)) ]).


%% The shard admits messages as soon as each mailbox was sampled empty. In at least one of six attempts, this is within
%% one interval and 50 ms of the moment when they are empty; a busy machine needs more attempts.
receivers_that_resume_make_room(_Config) ->
    Receivers = receivers(?SHARD, 4),
    IsShort = fun(Us) -> Us =< (?INTERVAL_MS + 50) * 1000 end,
    First = [ resume(Receivers) || _ <- lists:seq(1, 6) ],
    ct:log("accepted again after ~p us", [First]),
    ok = test_support:await(fun() -> lists:any(IsShort, First) orelse IsShort(resume(Receivers)) end, ?DEADLINE_MS).


%% The time from the moment when the mailboxes are empty to the first accepted message.
resume([{Id, _} | _] = Receivers) ->
    Accepted = fill(Receivers),
    await_looks(?SHARD, 4),
    {error, shard_overloaded} = erlmcp_shard_manager:route_message(Id, x),
    ?assertEqual(Accepted, take_all(Receivers)),
    Empty = now_us(),
    %% Samples that were under way may have read the mailboxes before that moment.
    Seen = looks(?SHARD) + 2 * length(Receivers),
    test_support:await(fun() -> is_accepted_if(looks(?SHARD) >= Seen, Id) end, ?DEADLINE_MS),
    Us = now_us() - Empty,
    %% The shard then accepts as many messages as it has room for.
    test_support:await(fun() -> not refused(?SHARD) end),
    More = fill(Receivers),
    ?assert(More > ?THRESHOLD div 2, More),
    ?assertEqual(More + 1, take_all(Receivers)),
    test_support:await(fun() -> not maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
    Us.


is_accepted_if(MustBe, Id) ->
    IsAccepted = erlmcp_shard_manager:route_message(Id, x) =:= ok,
    ?assert(IsAccepted orelse not MustBe),
    IsAccepted.


%% Three times the threshold a second for three seconds, then bursts of a third of the threshold.
receivers_that_keep_up_are_refused_nothing(_Config) ->
    Receivers = receivers(?SHARD, 10),
    _ = [ Pid ! keep_taking || {_, Pid} <- Receivers ],
    Ids = ids(Receivers),
    %% A sender that made up for its own delays would exceed the pace.
    Results = [ [ send_round(Ids, ?THRESHOLD * 3 div 100) || _ <- [timer:sleep(10)] ] || _ <- lists:seq(1, 300) ],
    Burst = [ [ send_round(Ids, ?THRESHOLD div 3) || _ <- [timer:sleep(100)] ] || _ <- lists:seq(1, 10) ],
    Sent = lists:flatten([Results, Burst]),
    ?assertEqual([], [ R || R <- Sent, R =/= ok ]),
    ?assert(length(Sent) > ?THRESHOLD * 5, length(Sent)),
    ?assertEqual(length(Sent), taken(Receivers)).


%%% Managers that are not there


nobody_is_refused_for_want_of_a_sampler(_Config) ->
    Receivers = [{Id, _} | _] = receivers(?SHARD, 4),
    _ = fill(Receivers),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    %% The shard still refuses at first,
    ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
    test_support:await(fun() -> ?M:check_admission(?SHARD) =:= ok end),
    %% and then admits everything until a manager runs again.
    ?assertEqual([], [ R || R <- send_round(ids(Receivers), 3 * ?THRESHOLD), R =/= ok ]),
    ?assertEqual([], [ R || R <- send_round(ids(Receivers), 3 * ?THRESHOLD), R =/= ok ]),
    #{sample_age_ms := Age} = ?M:get_shard_stats(?SHARD),
    ?assert(Age >= 10 * ?INTERVAL_MS, Age),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> refused(?SHARD) end),
    ?assertMatch(#{queue_depth := Depth} when Depth >= 6 * ?THRESHOLD, ?M:get_shard_stats(?SHARD)),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end).


%% Without the application no message counts, whatever is set meanwhile. After its start the settings are in force and
%% nothing is charged.
nothing_counts_without_the_application(_Config) ->
    ok = application:stop(erlmcp_native),
    [{Id, _}] = Receivers = receivers(?SHARD, 1),
    All = fun() -> [ R || R <- send_round([Id], 3 * ?THRESHOLD), R =/= ok ] end,
    Changes = [fun() -> ok end,
               fun() -> erlmcp_native_config:configure() end,
               fun() -> erlmcp_native:set(admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}) end,
               fun() -> erlmcp_native:set(backpressure, off) end,
               fun() -> erlmcp_native:set(backpressure, on) end,
               fun() -> ?M:set_threshold(?THRESHOLD) end,
               fun() -> ?M:set_threshold(?SHARD, ?THRESHOLD) end],
    [ begin
          ok = Change(),
          ?assertEqual([], All()),
          ?assertMatch(#{queue_depth := 0, threshold := infinity}, ?M:get_shard_stats(?SHARD))
      end || Change <- Changes ],
    ?assertEqual(length(Changes) * 3 * ?THRESHOLD, take_all(Receivers)),
    ok = start(),
    ?assertMatch(#{queue_depth := 0, threshold := ?THRESHOLD}, ?M:get_shard_stats(?SHARD)),
    ?assertEqual([], [ R || R <- send_round([Id], ?THRESHOLD), R =/= ok ]).


killed_manager_samples_again(_Config) ->
    Receivers = receivers(?SHARD, 4),
    Accepted = fill(Receivers),
    Old = manager(?SHARD),
    exit(Old, kill),
    test_support:await(fun() -> is_pid(manager(?SHARD)) andalso manager(?SHARD) =/= Old end),
    test_support:await(fun() -> maps:get(sample_age_ms, ?M:get_shard_stats(?SHARD)) =< 2 * ?INTERVAL_MS end),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertEqual(Accepted, queued(Receivers)),
    %% It keeps sampling without being asked.
    await_looks(?SHARD, 12 * length(Receivers)),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    test_support:await(fun() -> maps:get(sample_age_ms, ?M:get_shard_stats(?SHARD)) < 5 * ?INTERVAL_MS end),
    ?assertEqual(Accepted, take_all(Receivers)),
    test_support:await(fun() -> not refused(?SHARD) end).


%% At most fifty kills a second: the supervisor survives, and every accepted message arrives.
managers_killed_under_load(_Config) ->
    Supervisor = whereis(erlmcp_shard_sup),
    Receivers = [ {Id, Pid} || Shard <- lists:seq(0, 63), {Id, Pid} <- receivers(Shard, 1) ],
    _ = [ Pid ! keep_taking || {_, Pid} <- Receivers ],
    Senders = [ spawn_link(fun() -> send_until_told(ids(Receivers), 0, 0) end) || _ <- [1, 2] ],
    _ = [ begin
              timer:sleep(20),
              Shard = rand:uniform(64) - 1,
              test_support:await(fun() -> is_pid(manager(Shard)) end, ?DEADLINE_MS),
              killed = test_support:kill(manager(Shard))
          end || _ <- lists:seq(1, 200) ],
    test_support:await(fun() -> taken(Receivers) > 10_000 end, ?DEADLINE_MS),
    {Accepted, _Refused} = stop_senders(Senders),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)),
    ?assertEqual(Accepted, taken(Receivers)),
    test_support:await(fun() -> lists:all(fun(Shard) -> is_pid(manager(Shard)) end, lists:seq(0, 63)) end),
    ?assertEqual([], [ Shard || Shard <- lists:seq(0, 63), not is_pid(manager(Shard)) ]).


%%% Exact accounting, and settings


update_queue_depth(_Config) ->
    %% No process samples this shard meanwhile.
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    ok = ?M:set_threshold(?SHARD, 100),
    Depth = fun() -> maps:get(queue_depth, ?M:get_shard_stats(?SHARD)) end,
    ?assertEqual(0, Depth()),
    ok = ?M:update_queue_depth(?SHARD, 60),
    ?assertEqual(60, Depth()),
    ok = ?M:update_queue_depth(?SHARD, -20),
    ?assertEqual(40, Depth()),
    ok = ?M:update_queue_depth(?SHARD, 0),
    ?assertEqual(40, Depth()),
    ok = ?M:update_queue_depth(?SHARD, -50),
    ?assertEqual(0, Depth()),
    ok = ?M:update_queue_depth(?SHARD, -1_000_000),
    ?assertEqual(0, Depth()),
    %% What was subtracted below zero is not owed.
    ok = ?M:update_queue_depth(?SHARD, 1),
    ?assertEqual(1, Depth()),
    %% Routed messages count in the same depth.
    [{Id, Pid}] = receivers(?SHARD, 1),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 9) ],
    ?assertEqual(10, Depth()),
    ok = ?M:update_queue_depth(?SHARD, 1_000_000),
    ?assertEqual(1_000_010, Depth()),
    ?assertMatch([_, _ | _], [ S || S <- lists:seq(0, 63), S =/= ?SHARD, ?M:check_admission(S) =:= ok ]),
    %% The next sample finds the actual depth.
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> Depth() =:= 9 end),
    ok = ?M:update_queue_depth(?SHARD, 91),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
    test_support:await(fun() -> ?M:check_admission(?SHARD) =:= ok end),
    exit(Pid, kill).


set_threshold(_Config) ->
    Receivers = receivers(?SHARD, 2),
    Other = receivers(?SHARD + 1, 2),
    Threshold = fun(Shard) -> maps:get(threshold, ?M:get_shard_stats(Shard)) end,
    ok = ?M:set_threshold(?SHARD, 50),
    ?assertEqual({50, ?THRESHOLD}, {Threshold(?SHARD), Threshold(?SHARD + 1)}),
    ok = check_filled(50, fill(Receivers)),
    ok = check_filled(?THRESHOLD, fill(Other)),
    %% A higher threshold makes room at once.
    ok = ?M:set_threshold(?SHARD, 80),
    ?assertEqual(ok, ?M:check_admission(?SHARD)),
    ok = check_filled(80, queued(Receivers) + fill(Receivers)),
    %% A lower threshold leaves the waiting messages.
    ok = ?M:set_threshold(?SHARD, 10),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ok = check_filled(80, queued(Receivers)),
    %% This shard alone has no bound.
    ok = ?M:set_threshold(?SHARD, infinity),
    ?assertEqual([], [ R || R <- send_round(ids(Receivers), 3000), R =/= ok ]),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD + 1)),
    %% A threshold for all shards is also stored in the configuration.
    ok = ?M:set_threshold(600),
    ?assertEqual({ok, #{threshold => 600, sample_interval_ms => ?INTERVAL_MS}},
                 application:get_env(erlmcp_native, admission)),
    ?assertEqual([600], lists:usort([ Threshold(Shard) || Shard <- lists:seq(0, 63) ])),
    ok = check_filled(600, queued(Other) + fill(Other)),
    %% The first message leads to a sample, which finds the messages routed without a bound.
    _ = erlmcp_shard_manager:route_message(element(1, hd(Receivers)), x),
    test_support:await(fun() -> refused(?SHARD) end),
    ok = ?M:set_threshold(infinity),
    ?assertEqual({ok, infinity}, application:get_env(erlmcp_native, admission)),
    ?assertEqual([infinity], lists:usort([ Threshold(Shard) || Shard <- lists:seq(0, 63) ])),
    ?assertEqual([], [ R || R <- send_round(ids(Other), 3000), R =/= ok ]),
    ?assertEqual([ ok || _ <- lists:seq(0, 63) ], [ ?M:check_admission(Shard) || Shard <- lists:seq(0, 63) ]),
    %% On again, with the default interval.
    ok = ?M:set_threshold(700),
    ?assertEqual([700], lists:usort([ Threshold(Shard) || Shard <- lists:seq(0, 63) ])),
    _ = erlmcp_shard_manager:route_message(element(1, hd(Other)), x),
    test_support:await(fun() -> refused(?SHARD + 1) end).


%% One above the threshold: the one caller's message may be admitted and not yet sent when a sample is taken.
check_filled(Threshold, Queued) ->
    ?assert(Queued >= Threshold andalso Queued =< Threshold + 1, {Threshold, Queued}).


%% The smallest threshold works as any other and costs no more.
threshold_of_one(_Config) ->
    [{Id, _}] = Receivers = receivers(?SHARD, 1),
    ok = ?M:set_threshold(?SHARD, 1),
    _ = [ begin
              test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end),
              ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
              await_looks(?SHARD, 2),
              ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
              ?assertEqual(1, take_all(Receivers))
          end || _ <- lists:seq(1, 5) ],
    %% Half a second has some samples, and not as many as the processor can do: with room for one,
    _ = ?assert(reductions_in(?SHARD, 500) < 100_000),
    %% with one place left,
    ok = ?M:set_threshold(?SHARD, 2),
    test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end),
    _ = ?assert(reductions_in(?SHARD, 500) < 100_000),
    %% and with none.
    test_support:await(fun() -> refused(?SHARD) orelse erlmcp_shard_manager:route_message(Id, x) =/= ok end),
    ?assert(reductions_in(?SHARD, 500) < 100_000).


%% A manager does not wait for the end of an interval that has been replaced.
interval_changes_live(_Config) ->
    Receivers = receivers(?SHARD, 2),
    ok = erlmcp_native:set(admission, #{threshold => ?THRESHOLD, sample_interval_ms => 600_000}),
    _ = fill_once(ids(Receivers), 0),
    ok = erlmcp_native:set(admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}),
    await_looks(?SHARD, 12 * length(Receivers)),
    %% The manager samples: the bound holds, and emptied mailboxes make room.
    _ = fill(Receivers),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    test_support:await(fun() -> maps:get(sample_age_ms, ?M:get_shard_stats(?SHARD)) < 10 * ?INTERVAL_MS end),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end).


%% A value that is set without validation takes effect at the next start, if it is valid.
environment_alone_changes_nothing(_Config) ->
    Receivers = receivers(?SHARD, 2),
    Managers = [ manager(Shard) || Shard <- lists:seq(0, 63) ],
    ok = application:set_env(erlmcp_native, admission, #{threshold => many}),
    ok = check_filled(?THRESHOLD, fill(Receivers)),
    ok = application:set_env(erlmcp_native, admission, unlimited),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end),
    _ = [ erlmcp_shard_manager:route_message(Id, x) || Shard <- lists:seq(0, 63), {Id, _} <- receivers(Shard, 1) ],
    %% Mailboxes are still sampled, and no manager has been restarted.
    await_looks(?SHARD + 1, 3),
    ?assertEqual(Managers, [ manager(Shard) || Shard <- lists:seq(0, 63) ]).


%%% Statistics


stats(_Config) ->
    Keys = lists:sort([shard_id,
                       queue_depth,
                       threshold,
                       threshold_mode,
                       connections,
                       messages_per_second,
                       latency_us,
                       admitted,
                       is_overloaded,
                       sample_age_ms]),
    _ = [ begin
              Stats = ?M:get_shard_stats(Shard),
              ?assertEqual(Keys, lists:sort(maps:keys(Stats))),
              ?assertMatch(#{
                             shard_id := Shard,
                             queue_depth := 0,
                             threshold := ?THRESHOLD,
                             threshold_mode := ?THRESHOLD,
                             connections := 0,
                             is_overloaded := false
                            },
                           Stats),
              #{admitted := Admitted, messages_per_second := Rate, latency_us := Latency} = Stats,
              ?assert(is_integer(Admitted) andalso Admitted >= 0),
              ?assert(is_integer(Rate) andalso Rate >= 0),
              ?assertEqual([p50, p95, p99], lists:sort(maps:keys(Latency))),
              ?assertEqual(maps:remove(sample_age_ms, Stats),
                           maps:remove(sample_age_ms, erlmcp_shard_manager:get_stats(Shard)))
          end || Shard <- lists:seq(0, 63) ],
    Receivers = receivers(?SHARD, 3),
    #{admitted := Before} = ?M:get_shard_stats(?SHARD),
    _ = send_round(ids(Receivers), 30),
    ?assertMatch(#{queue_depth := 30, connections := 3}, ?M:get_shard_stats(?SHARD)),
    ?assertEqual(Before + 30, maps:get(admitted, ?M:get_shard_stats(?SHARD))),
    %% Refused messages are not counted.
    More = fill(Receivers),
    ?assertEqual(Before + 30 + More, maps:get(admitted, ?M:get_shard_stats(?SHARD))),
    %% A check changes no statistics.
    Overloaded = maps:with([queue_depth, admitted, is_overloaded], ?M:get_shard_stats(?SHARD)),
    _ = [ ?M:check_admission(?SHARD) || _ <- lists:seq(1, 1000) ],
    ?assertEqual(Overloaded, maps:with([queue_depth, admitted, is_overloaded], ?M:get_shard_stats(?SHARD))).


%% The latency follows by Little's law from a rate. The case bounds the time behind this rate on both sides.
stats_show_rate_and_latency(_Config) ->
    [{Id, _}] = Receivers = receivers(?SHARD, 1),
    Manager = manager(?SHARD),
    Number = ?THRESHOLD div 2,
    %% The messages arrive within one tick.
    ok = sys:suspend(Manager),
    ?assertEqual([ok], lists:usort(send_round([Id], Number))),
    Resumed = now_us(),
    ok = sys:resume(Manager),
    %% The receiver takes nothing, so all later samples are equal.
    Stats = fun() -> maps:with([messages_per_second, latency_us, queue_depth], ?M:get_shard_stats(?SHARD)) end,
    test_support:await(fun() -> maps:get(p50, maps:get(latency_us, Stats())) > 0 end),
    Ms = (now_us() - Resumed) div 1000 + 1,
    #{messages_per_second := Rate} = Stats(),
    ?assert(Rate =< Number * 1000 div ?INTERVAL_MS andalso Rate >= Number * 1000 div Ms, {Rate, Ms}),
    Us = Number * 1_000_000 div Rate,
    Expected = #{messages_per_second => Rate, latency_us => #{p50 => Us, p95 => Us, p99 => Us}, queue_depth => Number},
    ?assertEqual(Expected, Stats()),
    await_looks(?SHARD, 3),
    ?assertEqual(Expected, Stats()),
    %% Without new and waiting messages the rate is zero.
    ?assertEqual(Number, take_all(Receivers)),
    test_support:await(fun() -> maps:get(messages_per_second, ?M:get_shard_stats(?SHARD)) =:= 0 end).


%% The rate covers the time since the messages arrived, and not the pause before them.
first_rate_after_a_pause(_Config) ->
    [{Id, _}] = Receivers = receivers(?SHARD, 1),
    Rate = fun() -> maps:get(messages_per_second, ?M:get_shard_stats(?SHARD)) end,
    ok = erlmcp_shard_manager:route_message(Id, x),
    ?assertEqual(1, take_all(Receivers)),
    await_sleep([?SHARD]),
    ?assertEqual(0, Rate()),
    ok = test_support:sleep_until(now_us() + 3_000_000),
    %% The messages arrive within one tick; averaged over the pause they would be 33 a second.
    ok = sys:suspend(manager(?SHARD)),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 100) ],
    Resumed = now_us(),
    ok = sys:resume(manager(?SHARD)),
    %% The receiver takes nothing, so the rate stays.
    test_support:await(fun() -> Rate() > 0 end, ?DEADLINE_MS),
    Ms = (now_us() - Resumed) div 1000 + 1,
    First = Rate(),
    ?assert(First =< 100 * 1000 div ?INTERVAL_MS andalso First >= 100 * 1000 div Ms, {First, Ms}).


idle_shards_cost_nothing(_Config) ->
    %% Every shard has routed messages before.
    Receivers = [ R || Shard <- lists:seq(0, 63), R <- receivers(Shard, 2) ],
    _ = [ Pid ! keep_taking || {_, Pid} <- Receivers ],
    _ = send_round(ids(Receivers), 5000),
    ?assertEqual(5000, taken(Receivers)),
    await_sleep(lists:seq(0, 63)),
    %% On a busy machine some managers take longer to become idle.
    Before = await_idle_window(20),
    %% A single message wakes one manager, which soon hibernates again.
    [{Id, _} | _] = [ R || {I, _} = R <- Receivers, erlmcp_shard_registry:get_shard_id(I) =:= ?SHARD ],
    ok = erlmcp_shard_manager:route_message(Id, x),
    test_support:await(fun() -> reductions(?SHARD) > proplists:get_value(?SHARD, Before) end),
    %% Calls to the other managers would cost them reductions.
    await_sleep([?SHARD]),
    Between = all_reductions(),
    ?assertEqual([?SHARD], [ Shard || {{Shard, Was}, {Shard, Is}} <- lists:zip(Before, Between), Was =/= Is ]).


%% Waits until these managers hibernate with no mailbox left to sample: none of them waits for a timer.
await_sleep(Shards) ->
    IsAsleep = fun(Shard) ->
                       is_hibernated(manager(Shard)) andalso
                       element(2, erlmcp_nif:sample_counts(Shard)) =:= 0
               end,
    test_support:await(fun() -> lists:all(IsAsleep, Shards) end, ?DEADLINE_MS).


%% OTP 28 and later hibernate in another function.
is_hibernated(Process) ->
    case process_info(Process, current_function) of
        {current_function, {erlang, hibernate, 3}} -> true;
        {current_function, {gen_server, loop_hibernate, _}} -> true;
        {current_function, _} -> false
    end.


%% Waits for half a second in which no manager runs.
await_idle_window(Attempts) ->
    Before = all_reductions(),
    timer:sleep(500),
    case all_reductions() of
        Before -> Before;
        _Other when Attempts > 1 -> await_idle_window(Attempts - 1);
        After -> error({never_idle, After -- Before})
    end.


all_reductions() ->
    [ {Shard, reductions(Shard)} || Shard <- lists:seq(0, 63) ].


%%% Logs


one_line_for_overload_and_recovery(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, all),
    try
        Receivers = receivers(?SHARD, 2),
        Senders = [ spawn_link(fun() -> send_until_told(ids(Receivers), 0, 0) end) || _ <- [1, 2, 3, 4] ],
        test_support:await(fun() -> refused(?SHARD) end),
        await_looks(?SHARD, 6 * length(Receivers)),
        {_, Refused} = stop_senders(Senders),
        ?assert(Refused > 0),
        _ = take_all(Receivers),
        ?assertMatch([{warning, #{event := shard_overloaded, shard_id := ?SHARD}},
                      {notice, #{event := shard_recovered, shard_id := ?SHARD}}],
                     logged_until(shard_recovered))
    after
        ok = logger:set_primary_config(level, Level),
        ok = logger:remove_handler(?MODULE)
    end.


%% A shard that is overloaded again after each recovery logs one overload, even if its manager is killed meanwhile.
one_line_for_an_overload_that_comes_and_goes(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, all),
    try
        Receivers = receivers(?SHARD, 2),
        test_support:await(fun() -> is_one_overload(Receivers) end, ?DEADLINE_MS)
    after
        ok = logger:set_primary_config(level, Level),
        ok = logger:remove_handler(?MODULE)
    end.


%% False if the machine was so busy that two overloads are correct.
is_one_overload(Receivers) ->
    Times = [ begin
                  _ = fill(Receivers),
                  test_support:await(fun() -> maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
                  N =:= 5 andalso exit(manager(?SHARD), kill),
                  _ = take_all(Receivers),
                  test_support:await(fun() -> not maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
                  erlang:monotonic_time(millisecond)
              end || N <- lists:seq(1, 10) ],
    Pauses = [ After - Before || {Before, After} <- lists:zip(lists:droplast(Times), tl(Times)) ],
    IsOne = lists:max(Pauses) < 1000,
    Lines = logged_until(shard_recovered),
    %% A hibernated manager logs nothing more.
    await_sleep([?SHARD]),
    IsOne andalso
    ?assertMatch([{warning, #{event := shard_overloaded}}, {notice, #{event := shard_recovered}}], Lines ++ logged()),
    _ = logged(),
    IsOne.


%% Health logs lines of its own about an overload, if a check falls into it. They are ignored.
log(#{level := Level, msg := {report, #{shard_id := _} = Report}, meta := #{application := erlmcp_native}}, #{config := Pid}) ->
    Pid ! {logged, Level, Report};
log(_Event, _Config) ->
    ok.


logged_until(Event) ->
    receive
        {logged, Level, #{event := Event} = Meta} -> [{Level, Meta}];
        {logged, Level, Meta} -> [{Level, Meta} | logged_until(Event)]
    after
        ?DEADLINE_MS ->
            [{missing, Event}]
    end.


logged() ->
    receive {logged, Level, Meta} -> [{Level, Meta} | logged()] after 0 -> [] end.


%% A shard's own threshold holds while the others have none.
threshold_of_one_shard_alone(_Config) ->
    ok = ?M:set_threshold(infinity),
    ok = ?M:set_threshold(?SHARD, 100),
    Receivers = receivers(?SHARD, 2),
    ok = check_filled(100, fill(Receivers)),
    %% Waits for longer than a shard without samples would refuse.
    await_looks(?SHARD, 30 * length(Receivers)),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end).


%%% Wrong arguments


wrong_arguments_change_nothing(_Config) ->
    Before = [ maps:with([threshold, queue_depth], ?M:get_shard_stats(Shard)) || Shard <- lists:seq(0, 63) ],
    _ = [ begin
              ?assertError(badarg, ?M:check_admission(Wrong)),
              ?assertError(badarg, ?M:get_shard_stats(Wrong)),
              ?assertError(badarg, erlmcp_shard_manager:get_stats(Wrong)),
              ?assertError(badarg, ?M:update_queue_depth(Wrong, 1)),
              ?assertError(badarg, ?M:set_threshold(Wrong, 100))
          end || Wrong <- [-1, 64, 1024, 1 bsl 64, 1.0, zero, "0", <<0>>, {0}, [], self(), infinity, default] ],
    _ = [ ?assertError(badarg, ?M:update_queue_depth(?SHARD, Wrong))
          || Wrong <- [1.0, one, "1", infinity, {1}, [], self()] ],
    _ = [ ?assertError(badarg, ?M:set_threshold(?SHARD, Wrong)) || Wrong <- wrong_thresholds() ],
    _ = [ begin
              ?assertMatch({error, {bad_option, admission, #{threshold := Wrong}, [_ | _]}}, ?M:set_threshold(Wrong)),
              ?assertEqual({ok, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}},
                           application:get_env(erlmcp_native, admission))
          end || Wrong <- wrong_thresholds() ],
    ?assertEqual(Before, [ maps:with([threshold, queue_depth], ?M:get_shard_stats(Shard)) || Shard <- lists:seq(0, 63) ]).


wrong_thresholds() ->
    [0, -1, 1.0, (1 bsl 40) + 1, 1 bsl 64, many, "1", undefined, off, [], #{}].


%%% Receivers


%% Connections of one shard, whose processes take nothing until they are asked to.
receivers(Shard, Number) ->
    [ begin
          Pid = spawn(fun() -> stalled(0) end),
          ok = erlmcp_shard_registry:register_connection(Id, Pid, receiver),
          {Id, Pid}
      end || {Id, _} <- free_ids(Shard, Number) ].


ids(Receivers) ->
    [ Id || {Id, _} <- Receivers ].


%% Unregistered ids of a shard.
free_ids(Shard, Number) ->
    free_ids(Shard, Number, 1).


free_ids(_Shard, 0, _N) ->
    [];
free_ids(Shard, Number, N) ->
    Id = <<"receiver ", (integer_to_binary(N))/binary>>,
    case erlmcp_shard_registry:get_shard_id(Id) =:= Shard andalso
         erlmcp_shard_registry:whereis_connection(Id) =:= undefined of
        true -> [{Id, Shard} | free_ids(Shard, Number - 1, N + 1)];
        false -> free_ids(Shard, Number, N + 1)
    end.


stalled(Taken) ->
    receive
        {take, From} -> From ! {taken, self(), take(0)}, stalled(Taken);
        keep_taking -> taking(Taken)
    end.


take(Taken) ->
    receive x -> take(Taken + 1) after 0 -> Taken end.


taking(Taken) ->
    receive
        x -> taking(Taken + 1);
        {how_many, From} -> From ! {taken, self(), Taken}, taking(Taken)
    end.


%% The number of messages that wait in the receivers' mailboxes.
queued(Receivers) ->
    lists:sum([ Length || {_, Pid} <- Receivers, {message_queue_len, Length} <- [process_info(Pid, message_queue_len)] ]).


take_all(Receivers) ->
    answers(take, Receivers).


%% The number of messages that receivers have taken since `keep_taking'.
taken(Receivers) ->
    answers(how_many, Receivers).


answers(Question, Receivers) ->
    _ = [ Pid ! {Question, self()} || {_, Pid} <- Receivers ],
    lists:sum([ receive {taken, Pid, Number} -> Number end || {_, Pid} <- Receivers ]).


%%% Senders


%% Sends until the shard refuses even after new samples, and returns the number of accepted messages. Messages admitted
%% while a sample was taken count twice until the next sample.
fill(Receivers) ->
    case fill_once(ids(Receivers), 0) of
        0 -> 0;
        Accepted ->
            [{Id, _} | _] = Receivers,
            await_looks(erlmcp_shard_registry:get_shard_id(Id), 3 * length(Receivers)),
            Accepted + fill(Receivers)
    end.


%% Waits until so many more mailboxes were sampled.
await_looks(Shard, More) ->
    Looks = looks(Shard),
    test_support:await(fun() -> looks(Shard) >= Looks + More end).


%% The number of mailboxes sampled so far.
looks(Shard) ->
    element(1, erlmcp_nif:sample_counts(Shard)).


fill_once([Id | Ids], Accepted) ->
    case erlmcp_shard_manager:route_message(Id, x) of
        ok -> fill_once(Ids ++ [Id], Accepted + 1);
        {error, shard_overloaded} -> Accepted
    end.


send_round(Ids, Number) ->
    {Results, _} = lists:mapfoldl(fun(_, [Id | Rest]) -> {erlmcp_shard_manager:route_message(Id, x), Rest ++ [Id]} end,
                                  Ids,
                                  lists:seq(1, Number)),
    Results.


send_until_told([Id | Ids], Accepted, Refused) ->
    receive
        {stop, From} -> From ! {sent, self(), Accepted, Refused}
    after
        0 ->
            case erlmcp_shard_manager:route_message(Id, x) of
                ok -> send_until_told(Ids ++ [Id], Accepted + 1, Refused);
                {error, shard_overloaded} -> send_until_told(Ids ++ [Id], Accepted, Refused + 1)
            end
    end.


stop_senders(Pids) ->
    _ = [ Pid ! {stop, self()} || Pid <- Pids ],
    Sent = [ receive {sent, Pid, Accepted, Refused} -> {Accepted, Refused} end || Pid <- Pids ],
    {Accepted, Refused} = lists:unzip(Sent),
    {lists:sum(Accepted), lists:sum(Refused)}.


%%% Instruments


%% The number of refusals by admission control so far.
refusals(Shard) ->
    element(3, erlmcp_nif:refused(Shard)).


refused(Shard) ->
    ?M:check_admission(Shard) =:= {error, shard_overloaded}.


manager(Shard) ->
    whereis(list_to_atom("erlmcp_shard_manager_" ++ integer_to_list(Shard))).


reductions(Shard) ->
    {reductions, Reductions} = process_info(manager(Shard), reductions),
    Reductions.


%% The reductions in this time, scaled down from the time that was measured.
reductions_in(Shard, Ms) ->
    Began = now_us(),
    Before = reductions(Shard),
    ok = test_support:sleep_until(Began + Ms * 1000),
    (reductions(Shard) - Before) * Ms * 1000 div (now_us() - Began).


now_us() ->
    erlang:monotonic_time(microsecond).
