%%% The node's circuit breaker: its transitions, its metrics, and the functions that erlmcp calls.
-module(node_circuit_breaker_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-define(CB,          erlmcp_circuit_breaker).
-define(S,           breaker_support).
-define(DEADLINE_MS, 20000).
-define(HOUR,        3600000).
-define(WINDOW_MS,   500).


suite() -> [{timetrap, {minutes, 5}}].


all() ->
    [metrics,
     metrics_of_latencies,
     metrics_process,
     state_is_kept_by_nobody_else,
     node_opens_at_its_threshold,
     node_forgets_old_failures,
     node_probes_and_closes,
     node_opens_again_at_a_failure,
     node_gives_out_no_more_probes_than_its_limit,
     node_refuses_routes_while_open,
     node_is_forced_and_reset,
     node_is_switched_off,
     node_metrics_have_its_counters,
     node_transitions_are_logged_once,
     functions_of_other_generations].


init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    ok = erlmcp_native:set(circuit_breaker, erlmcp_native_config:default(circuit_breaker)),
    ok = ?CB:reset(),
    _ = application:stop(erlmcp_native),
    ok.


end_per_testcase(_Case, _Config) ->
    ?S:remove_all().


metrics(_Config) ->
    {ok, Pid} = ?CB:start_link(),
    ?assertMatch(#{total_requests := 0, total_errors := 0, p95_latency_ms := 0, error_rate_percent := +0.0},
                 erlmcp_circuit_breaker_metrics:read()),
    ok = sys:suspend(Pid),
    _ = test_support:at_once(16, fun(_) -> [ ok = ?CB:record_request(N, 10) || N <- lists:seq(1, 1000) ] end),
    _ = [ ok = erlmcp_circuit_breaker_metrics:error() || _ <- lists:seq(1, 1600) ],
    ?assertMatch(#{
                   total_requests := 16000,
                   total_errors := 1600,
                   requests_in_window := 16000,
                   errors_in_window := 1600,
                   error_rate_percent := 10.0,
                   average_latency_ms := 10.0,
                   p95_latency_ms := 10
                  },
                 erlmcp_circuit_breaker_metrics:read()),
    % Requests send no messages to the process.
    ?assertEqual({message_queue_len, 0}, process_info(Pid, message_queue_len)),
    ok = sys:resume(Pid),
    ok = erlmcp_circuit_breaker_metrics:clear(),
    ?assertMatch(#{total_requests := 0, total_errors := 0, p95_latency_ms := 0}, erlmcp_circuit_breaker_metrics:read()),
    ?assertEqual(ok, ?CB:stop()).


metrics_of_latencies(_Config) ->
    {ok, _} = ?CB:start_link(),
    _ = [ begin
              ok = erlmcp_circuit_breaker_metrics:clear(),
              _ = [ ok = ?CB:record_request(x, L) || L <- Latencies ],
              #{p95_latency_ms := P95} = erlmcp_circuit_breaker_metrics:read(),
              Sorted = lists:sort([ min(max(trunc(L), 0), 16#ffffffff) || L <- Latencies ]),
              Exact = lists:nth((length(Sorted) * 95 + 99) div 100, Sorted),
              ?assert(P95 >= Exact andalso P95 =< Exact + Exact div 8)
          end || Latencies <- [[0],
                               [1],
                               [-5],
                               [15],
                               [16],
                               [17],
                               [31],
                               [32],
                               [12.9],
                               [16#ffffffff],
                               [1 bsl 60],
                               lists:seq(1, 100),
                               [ N * N || N <- lists:seq(1, 2000) ]] ],
    ?assertError(function_clause, ?CB:record_request(x, soon)),
    ok = ?CB:stop().


metrics_process(_Config) ->
    ?assertExit({noproc, _}, ?CB:stop()),
    ?assertExit({noproc, _}, ?CB:get_metrics()),
    ?assertEqual(ok, ?CB:record_request(1, 10)),
    {ok, Pid} = ?CB:start_link(),
    ?assertEqual(Pid, whereis(erlmcp_circuit_breaker)),
    ?assertEqual({error, {already_started, Pid}}, ?CB:start_link()),
    ?assertEqual({error, unknown_request}, gen_server:call(Pid, junk)),
    ok = gen_server:cast(Pid, junk),
    ok = ?CB:record_request(1, 10),
    ok = ?CB:stop(),
    ?assertExit({noproc, _}, ?CB:get_metrics()),
    {ok, _} = ?CB:start_link(),
    ?assertMatch(#{total_requests := 0}, erlmcp_circuit_breaker_metrics:read()),
    ok = ?CB:stop().


%% The process of this name is not a named breaker, and a breaker may have its name.
state_is_kept_by_nobody_else(_Config) ->
    {ok, _} = ?CB:start_link(),
    ?assertExit({noproc, _}, ?CB:get_state(erlmcp_circuit_breaker)),
    ?assertEqual(#{}, ?CB:get_all_states()),
    ok = ?CB:register_breaker(erlmcp_circuit_breaker, #{}),
    ?assertEqual(closed, ?CB:get_state(erlmcp_circuit_breaker)),
    ok = ?CB:unregister_breaker(erlmcp_circuit_breaker),
    ?assert(is_pid(whereis(erlmcp_circuit_breaker))),
    ok = ?CB:stop().


node_opens_at_its_threshold(_Config) ->
    node_breaker(?HOUR),
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    %% A success in the closed state removes no failure.
    ok = ?CB:record_error(some_id),
    ?assertEqual(open, ?CB:get_state()),
    ?assertEqual({ok, open}, ?CB:get_status()),
    ?assert(?CB:is_open()),
    ?assertNot(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    ok = ?CB:record_failure(),
    ?assertEqual(open, ?CB:get_state()).


node_forgets_old_failures(_Config) ->
    test_support:await(fun forgets_old_failures/0, ?DEADLINE_MS).


%% False if the last three failures were not within one window, because this process waited for a processor.
forgets_old_failures() ->
    node_breaker(?HOUR),
    ok = fail_node(2),
    ok = test_support:sleep_until(now_us() + (?WINDOW_MS + 50) * 1000),
    Began = now_us(),
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()),
    ok = fail_node(1),
    case now_us() - Began < (?WINDOW_MS - 10) * 1000 of
        true ->
            ?assertEqual(open, ?CB:get_state()),
            true;
        false ->
            false
    end.


now_us() ->
    erlang:monotonic_time(microsecond).


node_probes_and_closes(_Config) ->
    node_breaker(20),
    ok = fail_node(3),
    %% The state is half open, whether a caller has asked for a probe or not.
    test_support:await_value(half_open, fun() -> ?CB:get_state() end, ?DEADLINE_MS),
    ?assertEqual({ok, half_open}, ?CB:get_status()),
    ?assertNot(?CB:is_open()),
    %% No probe was let through yet, so this is not the success of a probe.
    ok = ?CB:record_success(),
    ?assert(?CB:allow_test_request()),
    ?assertEqual(half_open, ?CB:get_state()),
    ?assertNot(?CB:is_open()),
    ok = ?CB:record_success(),
    ?assertEqual(half_open, ?CB:get_state()),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    ?assertEqual(closed, ?CB:get_state()),
    %% The failures that opened the breaker no longer count.
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()).


node_opens_again_at_a_failure(_Config) ->
    node_breaker(0),
    ok = fail_node(3),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    ?assert(?CB:allow_test_request()),
    ok = set_timeout(?HOUR),
    ok = ?CB:record_failure(),
    ?assertEqual(open, ?CB:get_state()),
    %% The timeout starts anew.
    ?assertNot(?CB:allow_test_request()).


node_gives_out_no_more_probes_than_its_limit(_Config) ->
    node_breaker(0),
    ok = ?CB:force_open(),
    ?assert(?CB:allow_test_request()),
    ok = set_timeout(?HOUR),
    Allowed = test_support:at_once(100, fun(_) -> ?CB:allow_test_request() end),
    ?assertEqual(1, length([ true || true <- Allowed ])).


node_refuses_routes_while_open(_Config) ->
    node_breaker(?HOUR),
    Self = self(),
    ok = erlmcp_shard_registry:register_connection({?MODULE, route}, Self, none),
    ok = erlmcp_shard_manager:route_message({?MODULE, route}, sent),
    ok = ?CB:force_open(),
    ?assertEqual({error, circuit_open}, erlmcp_shard_manager:route_message({?MODULE, route}, never)),
    ?assertEqual({error, not_found}, erlmcp_shard_manager:route_message({?MODULE, nobody}, never)),
    ok = ?CB:force_close(),
    ok = erlmcp_shard_manager:route_message({?MODULE, route}, sent_again),
    ok = erlmcp_shard_registry:unregister_connection({?MODULE, route}),
    %% The caller itself has sent these messages.
    ?assertEqual([sent, sent_again], test_support:flush()).


node_is_forced_and_reset(_Config) ->
    node_breaker(?HOUR),
    ok = ?CB:force_open(),
    ok = ?CB:force_open(),
    ?assertEqual(open, ?CB:get_state()),
    ok = ?CB:force_close(),
    ?assertEqual(closed, ?CB:get_state()),
    ok = fail_node(2),
    ok = ?CB:reset(),
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()).


node_is_switched_off(_Config) ->
    node_breaker(?HOUR),
    ok = ?CB:force_open(),
    ok = erlmcp_native:set(circuit_breaker, off),
    ?assertEqual(off, ?CB:get_state()),
    ?assertEqual({ok, closed}, ?CB:get_status()),
    ?assert(?CB:allow_test_request()),
    ok = fail_node(100),
    ok = ?CB:force_open(),
    ?assertEqual(off, ?CB:get_state()),
    node_breaker(?HOUR).


node_metrics_have_its_counters(_Config) ->
    node_breaker(?HOUR),
    {ok, _} = ?CB:start_link(),
    ok = ?CB:record_error(some_id),
    ?assertMatch({ok, #{total_errors := 1, breaker := #{state := closed, failures := 1}}}, ?CB:get_metrics()),
    ok = ?CB:stop(),
    %% The process has exited, and the breaker is still there.
    ok = fail_node(2),
    ?assertEqual(open, ?CB:get_state()).


node_transitions_are_logged_once(_Config) ->
    node_breaker(30),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, notice),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{pid => self()}}),
    _ = test_support:at_once(16, fun(_) -> fail_node(3) end),
    test_support:await_value(half_open, fun() -> ?CB:get_state() end, ?DEADLINE_MS),
    _ = test_support:at_once(16, fun(_) -> ?CB:allow_test_request() end),
    _ = test_support:at_once(16, fun(_) -> ?CB:record_success() end),
    _ = [ ?CB:is_open() || _ <- lists:seq(1, 100) ],
    Events = [ receive {logged, #{msg := {report, #{event := Event, breaker := node}}}} -> Event after ?DEADLINE_MS -> none end
               || _ <- [1, 2, 3] ],
    ok = logger:remove_handler(?MODULE),
    ok = logger:set_primary_config(level, Level),
    ?assertEqual([circuit_closed, circuit_half_open, circuit_opened], lists:sort(Events)),
    receive {logged, _} = More -> ct:fail(More) after 0 -> ok end.


%% Functions that later generations of erlmcp call.
functions_of_other_generations(_Config) ->
    node_breaker(?HOUR),
    ?assertEqual(ok, ?CB:record_retry_attempt()),
    ?assertEqual(true, ?CB:can_execute()),
    ok = ?CB:force_open(),
    ?assertEqual(false, ?CB:can_execute()),
    ?assertEqual(ok, ?CB:record_retry_attempt()),
    ?assertEqual(open, ?CB:get_state()),
    node_breaker(0),
    ok = ?CB:force_open(),
    % Half open: can_execute/0 acquires no probe.
    _ = [ ?assertEqual(true, ?CB:can_execute()) || _ <- lists:seq(1, 100) ],
    ?assertEqual(true, ?CB:allow_test_request()).


%% A closed breaker of the node that opens quickly and, `TimeoutMs' later, closes quickly.
node_breaker(TimeoutMs) ->
    ok = set_timeout(TimeoutMs),
    ok = ?CB:reset(),
    ?assertEqual(closed, ?CB:get_state()).


fail_node(Times) ->
    _ = [ ok = ?CB:record_failure() || _ <- lists:seq(1, Times) ],
    ok.


%% Logger handler
log(Event, #{config := #{pid := Pid}}) ->
    Pid ! {logged, Event}.


set_timeout(TimeoutMs) ->
    erlmcp_native:set(circuit_breaker,
                      #{
                        failure_threshold => 3,
                        window_ms => ?WINDOW_MS,
                        success_threshold => 2,
                        timeout_ms => TimeoutMs,
                        probe_limit => 2
                       }).
