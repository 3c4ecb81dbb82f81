%%% Admission control through routes, with receivers that stall and real shard managers.
%%%
%%% The contract: no more than the threshold, and one message for each concurrent caller, wait in the
%%% mailboxes of a shard; that shard refuses alone; receivers that take their messages make room
%%% within an interval, and those that keep up are refused nothing; nobody is refused for want of a
%%% sampler; nothing that was accepted is lost; transitions are logged, refusals are not; a shard
%%% where nothing happens costs nothing.
-module(admission_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).

-export([refuses_at_the_threshold/1,
         receivers_that_resume_make_room/1,
         receivers_that_keep_up_are_refused_nothing/1,
         nobody_is_refused_for_want_of_a_sampler/1,
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
         default_handler_shows_it/1,
         wrong_arguments_change_nothing/1]).

%% Called in peer nodes
-export([in_default_handler/0]).
%% A handler of logger
-export([log/2]).

-define(M,           erlmcp_admission_control).
-define(SHARD,       17).
-define(THRESHOLD,   500).
-define(INTERVAL_MS, 50).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [refuses_at_the_threshold,
     receivers_that_resume_make_room,
     receivers_that_keep_up_are_refused_nothing,
     nobody_is_refused_for_want_of_a_sampler,
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
     default_handler_shows_it,
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
        ok = erlmcp_backpressure:configure(),
        ok = application:stop(erlmcp_native)
    end.


%% Only admission control is on.
start() ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:set_env(erlmcp_native, circuit_breaker, off),
    ok = application:start(erlmcp_native),
    test_support:await(fun() -> lists:all(fun is_sampled/1, lists:seq(0, 63)) end),
    ok.


is_sampled(Shard) ->
    #{sample_age_ms := Age, queue_depth := Depth} = ?M:get_shard_stats(Shard),
    Age =/= infinity andalso Depth =:= 0.


%%% The threshold


refuses_at_the_threshold(_Config) ->
    Receivers = receivers(?SHARD, 8),
    Callers = 6,
    Others = [ {Shard, Id} || Shard <- lists:seq(0, 63), Shard =/= ?SHARD, {Id, _} <- receivers(Shard, 1) ],
    Running = [ spawn_link(fun() -> send_until_told(ids(Receivers), 0, 0) end) || _ <- lists:seq(1, Callers) ],
    test_support:await(fun() -> refused(?SHARD) end),
    %% While it refuses, samples are taken, and nothing is let through on that account.
    _ = [ begin
              ?assert(queued(Receivers) =< ?THRESHOLD + Callers),
              [ ?assertEqual({Shard, ok}, {Shard, erlmcp_shard_manager:route_message(Id, x)}) || {Shard, Id} <- Others ],
              [ ?assertEqual({Shard, ok}, {Shard, ?M:check_admission(Shard)}) || {Shard, _} <- Others ],
              timer:sleep(?INTERVAL_MS)
          end || _ <- lists:seq(1, 10) ],
    {Accepted, Refused} = stop_senders(Running),
    ct:log("~b accepted, ~b refused", [Accepted, Refused]),
    ?assertEqual(Accepted, queued(Receivers)),
    ?assert(Accepted >= ?THRESHOLD, Accepted),
    ?assert(Accepted =< ?THRESHOLD + Callers, Accepted),
    ?assert(Refused > 100 * Callers, Refused),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertMatch(#{is_overloaded := true}, ?M:get_shard_stats(?SHARD)),
    ?assertEqual([], [ Shard || {Shard, _} <- Others, maps:get(is_overloaded, ?M:get_shard_stats(Shard)) ]).


%% From the moment when their mailboxes are empty, one interval and 50 ms, once in some attempts.
receivers_that_resume_make_room(_Config) ->
    Receivers = [{Id, _} | _] = receivers(?SHARD, 4),
    Times = [ begin
                  Accepted = fill(Receivers),
                  timer:sleep(2 * ?INTERVAL_MS),
                  {error, shard_overloaded} = erlmcp_shard_manager:route_message(Id, x),
                  ?assertEqual(Accepted, take_all(Receivers)),
                  Empty = now_us(),
                  test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end),
                  Us = now_us() - Empty,
                  %% And for as many as there is room for.
                  test_support:await(fun() -> not refused(?SHARD) end),
                  More = fill(Receivers),
                  ?assert(More > ?THRESHOLD div 2, More),
                  ?assertEqual(More + 1, take_all(Receivers)),
                  test_support:await(fun() -> not maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
                  Us
              end || _ <- lists:seq(1, 6) ],
    ct:log("accepted again after ~p us", [Times]),
    ?assert(lists:min(Times) =< (?INTERVAL_MS + 50) * 1000, Times),
    ?assert(lists:max(Times) =< 1_000_000, Times).


%% Three times the threshold a second, and a third of it at once, for three seconds.
receivers_that_keep_up_are_refused_nothing(_Config) ->
    Receivers = receivers(?SHARD, 10),
    _ = [ Pid ! keep_taking || {_, Pid} <- Receivers ],
    Ids = ids(Receivers),
    End = now_us() + 3_000_000,
    Results = paced(Ids, ?THRESHOLD * 3 div 100, 10_000, End),
    Burst = [ [ send_round(Ids, ?THRESHOLD div 3) || _ <- [timer:sleep(100)] ] || _ <- lists:seq(1, 10) ],
    Sent = [ R || R <- lists:flatten([Results, Burst]) ],
    ?assertEqual([], [ R || R <- Sent, R =/= ok ]),
    ?assert(length(Sent) > ?THRESHOLD * 5, length(Sent)),
    ?assertEqual(length(Sent), taken(Receivers)).


%%% Managers that are not there


nobody_is_refused_for_want_of_a_sampler(_Config) ->
    Receivers = [{Id, _} | _] = receivers(?SHARD, 4),
    _ = fill(Receivers),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    %% It is not forgotten at once,
    ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
    timer:sleep(12 * ?INTERVAL_MS),
    %% and then everything is admitted, for good.
    ?assertEqual(ok, ?M:check_admission(?SHARD)),
    ?assertEqual([], [ R || R <- send_round(ids(Receivers), 3 * ?THRESHOLD), R =/= ok ]),
    timer:sleep(2 * ?INTERVAL_MS),
    ?assertEqual([], [ R || R <- send_round(ids(Receivers), 3 * ?THRESHOLD), R =/= ok ]),
    #{sample_age_ms := Age} = ?M:get_shard_stats(?SHARD),
    ?assert(Age >= 10 * ?INTERVAL_MS, Age),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> refused(?SHARD) end),
    ?assertMatch(#{queue_depth := Depth} when Depth >= 6 * ?THRESHOLD, ?M:get_shard_stats(?SHARD)),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end).


killed_manager_samples_again(_Config) ->
    Receivers = receivers(?SHARD, 4),
    Accepted = fill(Receivers),
    Old = manager(?SHARD),
    exit(Old, kill),
    test_support:await(fun() -> is_pid(manager(?SHARD)) andalso manager(?SHARD) =/= Old end),
    test_support:await(fun() -> maps:get(sample_age_ms, ?M:get_shard_stats(?SHARD)) =< 2 * ?INTERVAL_MS end),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertEqual(Accepted, queued(Receivers)),
    %% It goes on doing so, without being asked.
    timer:sleep(12 * ?INTERVAL_MS),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertMatch(#{sample_age_ms := Age} when Age < 5 * ?INTERVAL_MS, ?M:get_shard_stats(?SHARD)),
    ?assertEqual(Accepted, take_all(Receivers)),
    test_support:await(fun() -> not refused(?SHARD) end).


%% Fifty a second: the supervisor stays, and what was accepted arrives in order.
managers_killed_under_load(_Config) ->
    Supervisor = whereis(erlmcp_shard_sup),
    Receivers = [ {Id, Pid} || Shard <- lists:seq(0, 63), {Id, Pid} <- receivers(Shard, 1) ],
    _ = [ Pid ! keep_taking || {_, Pid} <- Receivers ],
    Senders = [ spawn_link(fun() -> send_until_told(ids(Receivers), 0, 0) end) || _ <- [1, 2] ],
    Killed = lists:sum([ begin
                             timer:sleep(20),
                             case manager(rand:uniform(64) - 1) of
                                 undefined -> 0;
                                 Pid -> exit(Pid, kill), 1
                             end
                         end || _ <- lists:seq(1, 200) ]),
    {Accepted, _Refused} = stop_senders(Senders),
    ?assert(Killed > 150, Killed),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)),
    ?assertEqual(Accepted, taken(Receivers)),
    ?assert(Accepted > 10_000, Accepted),
    test_support:await(fun() -> lists:all(fun(Shard) -> is_pid(manager(Shard)) end, lists:seq(0, 63)) end),
    ?assertEqual([], [ Shard || Shard <- lists:seq(0, 63), not is_pid(manager(Shard)) ]).


%%% Exact accounting, and settings


update_queue_depth(_Config) ->
    %% Nobody samples this shard meanwhile.
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
    %% What was taken below zero is not owed.
    ok = ?M:update_queue_depth(?SHARD, 1),
    ?assertEqual(1, Depth()),
    %% What is routed counts with it.
    [{Id, Pid}] = receivers(?SHARD, 1),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 9) ],
    ?assertEqual(10, Depth()),
    ok = ?M:update_queue_depth(?SHARD, 1_000_000),
    ?assertEqual(1_000_010, Depth()),
    ?assertMatch([_, _ | _], [ S || S <- lists:seq(0, 63), S =/= ?SHARD, ?M:check_admission(S) =:= ok ]),
    %% The next sample finds out what it really is.
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
    %% More room, at once.
    ok = ?M:set_threshold(?SHARD, 80),
    ?assertEqual(ok, ?M:check_admission(?SHARD)),
    ok = check_filled(80, queued(Receivers) + fill(Receivers)),
    %% Less: what waits stays.
    ok = ?M:set_threshold(?SHARD, 10),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ok = check_filled(80, queued(Receivers)),
    %% No bound, for this shard alone.
    ok = ?M:set_threshold(?SHARD, infinity),
    ?assertEqual([], [ R || R <- send_round(ids(Receivers), 3000), R =/= ok ]),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD + 1)),
    %% For all, and in the configuration.
    ok = ?M:set_threshold(600),
    ?assertEqual({ok, #{threshold => 600, sample_interval_ms => ?INTERVAL_MS}},
                 application:get_env(erlmcp_native, admission)),
    ?assertEqual([600], lists:usort([ Threshold(Shard) || Shard <- lists:seq(0, 63) ])),
    ok = check_filled(600, queued(Other) + fill(Other)),
    %% What has come meanwhile is found with the first message.
    _ = erlmcp_shard_manager:route_message(element(1, hd(Receivers)), x),
    test_support:await(fun() -> refused(?SHARD) end),
    ok = ?M:set_threshold(infinity),
    ?assertEqual({ok, infinity}, application:get_env(erlmcp_native, admission)),
    ?assertEqual([infinity], lists:usort([ Threshold(Shard) || Shard <- lists:seq(0, 63) ])),
    ?assertEqual([], [ R || R <- send_round(ids(Other), 3000), R =/= ok ]),
    ?assertEqual([ ok || _ <- lists:seq(0, 63) ], [ ?M:check_admission(Shard) || Shard <- lists:seq(0, 63) ]),
    %% And on again, with the default interval.
    ok = ?M:set_threshold(700),
    ?assertEqual([700], lists:usort([ Threshold(Shard) || Shard <- lists:seq(0, 63) ])),
    _ = erlmcp_shard_manager:route_message(element(1, hd(Other)), x),
    test_support:await(fun() -> refused(?SHARD + 1) end).


%% One more for the one caller, whose message was not there yet when a sample was taken.
check_filled(Threshold, Queued) ->
    ?assert(Queued >= Threshold andalso Queued =< Threshold + 1, {Threshold, Queued}).


%% The smallest one: works as any other does, and costs no more.
threshold_of_one(_Config) ->
    [{Id, _}] = Receivers = receivers(?SHARD, 1),
    ok = ?M:set_threshold(?SHARD, 1),
    _ = [ begin
              test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end),
              ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
              timer:sleep(2 * ?INTERVAL_MS),
              ?assertEqual({error, shard_overloaded}, erlmcp_shard_manager:route_message(Id, x)),
              ?assertEqual(1, take_all(Receivers))
          end || _ <- lists:seq(1, 5) ],
    %% Some samples in half a second, and not as many as the processor can do: with room for one,
    _ = ?assert(reductions_in(?SHARD, 500) < 100_000),
    %% with one place left,
    ok = ?M:set_threshold(?SHARD, 2),
    test_support:await(fun() -> erlmcp_shard_manager:route_message(Id, x) =:= ok end),
    _ = ?assert(reductions_in(?SHARD, 500) < 100_000),
    %% and with none.
    test_support:await(fun() -> refused(?SHARD) orelse erlmcp_shard_manager:route_message(Id, x) =/= ok end),
    ?assert(reductions_in(?SHARD, 500) < 100_000).


%% A manager does not wait for the end of an interval that is none any more.
interval_changes_live(_Config) ->
    Receivers = receivers(?SHARD, 2),
    ok = erlmcp_backpressure:set(admission, #{threshold => ?THRESHOLD, sample_interval_ms => 600_000}),
    _ = fill(Receivers),
    timer:sleep(3 * ?INTERVAL_MS),
    ok = erlmcp_backpressure:set(admission, #{threshold => ?THRESHOLD, sample_interval_ms => ?INTERVAL_MS}),
    timer:sleep(12 * ?INTERVAL_MS),
    %% It samples: the bound holds, and room is found.
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    ?assertMatch(#{sample_age_ms := Age} when Age < 10 * ?INTERVAL_MS, ?M:get_shard_stats(?SHARD)),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end, 1000).


%% What is not checked takes effect with the next start, if that finds it right.
environment_alone_changes_nothing(_Config) ->
    Receivers = receivers(?SHARD, 2),
    Managers = [ manager(Shard) || Shard <- lists:seq(0, 63) ],
    ok = application:set_env(erlmcp_native, admission, #{threshold => many}),
    ok = check_filled(?THRESHOLD, fill(Receivers)),
    ok = application:set_env(erlmcp_native, admission, unlimited),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end),
    _ = [ erlmcp_shard_manager:route_message(Id, x) || Shard <- lists:seq(0, 63), {Id, _} <- receivers(Shard, 1) ],
    timer:sleep(5 * ?INTERVAL_MS),
    ?assertEqual(Managers, [ manager(Shard) || Shard <- lists:seq(0, 63) ]).


%%% What is told


stats(_Config) ->
    Keys = lists:sort([shard_id,
                       queue_depth,
                       threshold,
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
    %% Asking leaves no trace.
    Overloaded = maps:with([queue_depth, admitted, is_overloaded], ?M:get_shard_stats(?SHARD)),
    _ = [ ?M:check_admission(?SHARD) || _ <- lists:seq(1, 1000) ],
    ?assertEqual(Overloaded, maps:with([queue_depth, admitted, is_overloaded], ?M:get_shard_stats(?SHARD))).


%% 1,000 messages a second, of which each waits for some 100 ms.
stats_show_rate_and_latency(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    Pid ! {delay, 100},
    _ = paced([Id], 10, 10_000, now_us() + 2_000_000),
    #{messages_per_second := Rate, latency_us := #{p50 := P50, p95 := P95, p99 := P99}} = ?M:get_shard_stats(?SHARD),
    ct:log("~b messages a second, latency ~p us", [Rate, {P50, P95, P99}]),
    ?assert(Rate > 300 andalso Rate < 3000, Rate),
    ?assert(P50 > 20_000 andalso P50 < 500_000, P50),
    ?assert(P95 >= P50 andalso P99 >= P95),
    %% When nothing comes any more the rate is zero.
    test_support:await(fun() -> maps:get(messages_per_second, ?M:get_shard_stats(?SHARD)) =:= 0 end).


%% The rate is that of the time since the messages came, and not of the pause before them.
first_rate_after_a_pause(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    Pid ! keep_taking,
    Rate = fun() -> maps:get(messages_per_second, ?M:get_shard_stats(?SHARD)) end,
    ok = erlmcp_shard_manager:route_message(Id, x),
    timer:sleep(3000),
    ?assertEqual(0, Rate()),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 100) ],
    First = first_that_is_not(0, Rate),
    %% 100 within a tick of 50 ms; together with the pause they would be 33 a second.
    ?assert(First > 100, First).


first_that_is_not(Value, Look) ->
    case Look() of
        Value ->
            timer:sleep(1),
            first_that_is_not(Value, Look);
        Other ->
            Other
    end.


idle_shards_cost_nothing(_Config) ->
    %% They have had something to do.
    Receivers = [ R || Shard <- lists:seq(0, 63), R <- receivers(Shard, 2) ],
    _ = [ Pid ! keep_taking || {_, Pid} <- Receivers ],
    _ = send_round(ids(Receivers), 5000),
    ?assertEqual(5000, taken(Receivers)),
    timer:sleep(10 * ?INTERVAL_MS),
    Before = all_reductions(),
    timer:sleep(2000),
    ?assertEqual([], [ Shard || {{Shard, Was}, {Shard, Is}} <- lists:zip(Before, all_reductions()), Was =/= Is ]),
    %% A single message wakes one up, and soon it sleeps again.
    [{Id, _} | _] = [ R || {I, _} = R <- Receivers, erlmcp_shard_registry:get_shard_id(I) =:= ?SHARD ],
    ok = erlmcp_shard_manager:route_message(Id, x),
    timer:sleep(10 * ?INTERVAL_MS),
    Between = all_reductions(),
    ?assertEqual([?SHARD], [ Shard || {{Shard, Was}, {Shard, Is}} <- lists:zip(Before, Between), Was =/= Is ]),
    timer:sleep(1000),
    ?assertEqual(Between, all_reductions()).


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
        timer:sleep(6 * ?INTERVAL_MS),
        {_, Refused} = stop_senders(Senders),
        ?assert(Refused > 1000),
        _ = take_all(Receivers),
        ?assertMatch([{warning, #{event := shard_overloaded, shard_id := ?SHARD, domain := [erlmcp_native]}},
                      {notice, #{event := shard_recovered, shard_id := ?SHARD, domain := [erlmcp_native]}}],
                     logged_until(shard_recovered))
    after
        ok = logger:set_primary_config(level, Level),
        ok = logger:remove_handler(?MODULE)
    end.


%% A shard that is overloaded again as soon as it has recovered; meanwhile its manager is killed.
one_line_for_an_overload_that_comes_and_goes(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, all),
    try
        Receivers = receivers(?SHARD, 2),
        Times = [ begin
                      _ = fill(Receivers),
                      test_support:await(fun() -> maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
                      N =:= 5 andalso exit(whereis(erlmcp_shard_manager_17), kill),
                      _ = take_all(Receivers),
                      test_support:await(fun() -> not maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
                      erlang:monotonic_time(millisecond)
                  end || N <- lists:seq(1, 10) ],
        %% On a machine that was busy for so long they are two overloads by right.
        Pauses = [ After - Before || {Before, After} <- lists:zip(lists:droplast(Times), tl(Times)) ],
        ?assert(lists:max(Pauses) < 1000, Pauses),
        ?assertMatch([{warning, #{event := shard_overloaded}}, {notice, #{event := shard_recovered}}],
                     logged_until(shard_recovered)),
        timer:sleep(1500),
        ?assertEqual([], logged())
    after
        ok = logger:set_primary_config(level, Level),
        ok = logger:remove_handler(?MODULE)
    end.


log(#{level := Level, meta := #{domain := [erlmcp_native | _]} = Meta}, #{config := Pid}) ->
    Pid ! {logged, Level, maps:with([event, shard_id, domain], Meta)};
log(_Event, _Config) ->
    ok.


logged_until(Event) ->
    receive
        {logged, Level, #{event := Event} = Meta} -> [{Level, Meta}];
        {logged, Level, Meta} -> [{Level, Meta} | logged_until(Event)]
    after
        10_000 ->
            [{missing, Event}]
    end.


logged() ->
    receive {logged, Level, Meta} -> [{Level, Meta} | logged()] after 0 -> [] end.


default_handler_shows_it(Config) ->
    File = filename:join(proplists:get_value(priv_dir, Config), "default_handler.log"),
    Handler = io_lib:format("[{handler,default,logger_std_h,#{config=>#{type=>file,file=>\"~ts\"},"
                            "filters=>[{remote_gl,{fun logger_filters:remote_gl/2,stop}},"
                            "{domain,{fun logger_filters:domain/2,{log,super,[otp,sasl]}}},"
                            "{no_domain,{fun logger_filters:domain/2,{log,undefined,[]}}}],"
                            "filter_default=>stop}}]",
                            [File]),
    ?assertEqual(ok,
                 test_support:in_peer(?MODULE,
                                      in_default_handler,
                                      [],
                                      #{flags => ["-kernel", "logger", lists:flatten(Handler)]})),
    {ok, Log} = file:read_file(File),
    ?assertMatch([_], binary:matches(Log, <<"shard 17 is overloaded">>)),
    ?assertMatch([_], binary:matches(Log, <<"shard 17 has recovered">>)).


in_default_handler() ->
    ok = start(),
    Overload = fun() ->
                       Receivers = receivers(?SHARD, 2),
                       _ = fill(Receivers),
                       _ = take_all(Receivers),
                       test_support:await(fun() -> not maps:get(is_overloaded, ?M:get_shard_stats(?SHARD)) end),
                       %% It is told when nothing was refused for a second.
                       timer:sleep(1000 + 3 * ?INTERVAL_MS)
               end,
    Overload(),
    ok = logger_std_h:filesync(default),
    ok = application:stop(erlmcp_native),
    %% As it was before.
    {ok, #{filters := Filters}} = logger:get_handler_config(default),
    false = lists:keymember(erlmcp_native, 1, Filters),
    ok.


%% A shard's own threshold holds where the others have none.
threshold_of_one_shard_alone(_Config) ->
    ok = ?M:set_threshold(infinity),
    ok = ?M:set_threshold(?SHARD, 100),
    Receivers = receivers(?SHARD, 2),
    ok = check_filled(100, fill(Receivers)),
    timer:sleep(1500),
    ?assertEqual({error, shard_overloaded}, ?M:check_admission(?SHARD)),
    _ = take_all(Receivers),
    test_support:await(fun() -> not refused(?SHARD) end, 1000).


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


%% Connections of one shard, whose processes take nothing until they are told.
receivers(Shard, Number) ->
    [ begin
          Pid = spawn(fun() -> stalled(0) end),
          ok = erlmcp_shard_registry:register_connection(Id, Pid, receiver),
          {Id, Pid}
      end || {Id, _} <- free_ids(Shard, Number) ].


ids(Receivers) ->
    [ Id || {Id, _} <- Receivers ].


%% Ids of a shard that are not registered.
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
        keep_taking -> taking(Taken);
        {delay, Ms} -> taking_in_batches(Ms)
    end.


take(Taken) ->
    receive x -> take(Taken + 1) after 0 -> Taken end.


taking(Taken) ->
    receive
        x -> taking(Taken + 1);
        {how_many, From} -> From ! {taken, self(), Taken}, taking(Taken)
    end.


taking_in_batches(Ms) ->
    timer:sleep(Ms),
    _ = take(0),
    taking_in_batches(Ms).


%% What waits in their mailboxes.
queued(Receivers) ->
    lists:sum([ Length || {_, Pid} <- Receivers, {message_queue_len, Length} <- [process_info(Pid, message_queue_len)] ]).


take_all(Receivers) ->
    answers(take, Receivers).


%% What receivers that keep taking have taken.
taken(Receivers) ->
    answers(how_many, Receivers).


answers(Question, Receivers) ->
    _ = [ Pid ! {Question, self()} || {_, Pid} <- Receivers ],
    lists:sum([ receive {taken, Pid, Number} -> Number end || {_, Pid} <- Receivers ]).


%%% Senders


%% Until they are refused for good: what was admitted while a sample was taken counts twice until
%% the next one. How many were accepted.
fill(Receivers) ->
    case fill_once(ids(Receivers), 0) of
        0 -> 0;
        Accepted -> timer:sleep(3 * ?INTERVAL_MS), Accepted + fill(Receivers)
    end.


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


%% So many every so many microseconds.
paced(Ids, Number, EveryUs, End) ->
    paced(Ids, Number, EveryUs, now_us(), End).


paced(_Ids, _Number, _EveryUs, Due, End) when Due >= End ->
    [];
paced(Ids, Number, EveryUs, Due, End) ->
    test_support:sleep_until(Due),
    Results = send_round(Ids, Number),
    Results ++ paced(Ids, Number, EveryUs, Due + EveryUs, End).


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


refused(Shard) ->
    ?M:check_admission(Shard) =:= {error, shard_overloaded}.


manager(Shard) ->
    whereis(list_to_atom("erlmcp_shard_manager_" ++ integer_to_list(Shard))).


reductions(Shard) ->
    {reductions, Reductions} = process_info(manager(Shard), reductions),
    Reductions.


reductions_in(Shard, Ms) ->
    Before = reductions(Shard),
    timer:sleep(Ms),
    reductions(Shard) - Before.


now_us() ->
    erlang:monotonic_time(microsecond).
