%%% Named circuit breakers: what calls return, and when a breaker opens and closes.
-module(named_breaker_calls_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-define(CB,          erlmcp_circuit_breaker).
-define(S,           breaker_support).
-define(DEADLINE_MS, 20000).
-define(HOUR,        3600000).


suite() -> [{timetrap, {minutes, 5}}].


all() -> cases() ++ [without_the_library].


cases() ->
    [failures_in_a_row_open,
     success_ends_a_row,
     failure_rate_opens,
     partly_filled_window_never_opens,
     success_never_opens,
     window_slides,
     window_is_empty_after_closing,
     half_open_when_the_time_is_up,
     not_half_open_before,
     successes_close_and_a_failure_opens_again,
     success_threshold_is_in_a_row,
     probe_limit_is_the_success_threshold_by_default,
     time_begins_anew_when_opened_again,
     results,
     fun_runs_in_the_caller,
     fallback,
     hundred_calls_side_by_side,
     no_process_takes_part,
     nested_calls,
     wrong_arguments,
     bounded_call_returns,
     bounded_call_runs_elsewhere,
     bounded_call_times_out,
     bounded_probe_gives_its_slot_back,
     bounded_call_is_killed_with_its_caller,
     slot_is_reclaimed_after_five_seconds].


init_per_suite(Config) ->
    _ = application:stop(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    ok.


end_per_testcase(_Case, _Config) ->
    ?S:remove_all().


%% The same cases with the breakers of erlmcp_circuit_breaker_pure.
without_the_library(Config) ->
    ?S:without_library(?MODULE, cases(), Config).


failures_in_a_row_open(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    ?S:fail(b, 2),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?S:fail(b, 1),
    % The caller's next call is refused even if no caller has read the new state.
    ?S:refused(b),
    ?assertEqual(open, ?CB:get_state(b)).


success_ends_a_row(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, window_size => 1000}),
    _ = [ begin
              ?S:fail(b, 2),
              ?S:succeed(b, 1)
          end || _ <- lists:seq(1, 20) ],
    {ok, #{state := closed, consecutive_failures := 0, total_failures := 40}} = ?CB:get_stats(b).


failure_rate_opens(_Config) ->
    Options = #{failure_threshold => 100, window_size => 10, failure_rate_threshold => 0.5, timeout => ?HOUR},
    ok = ?CB:register_breaker(b, Options),
    _ = [ begin
              ?S:succeed(b, 1),
              ?S:fail(b, 1)
          end || _ <- lists:seq(1, 4) ],
    ?S:succeed(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    % The tenth call is the fifth failure.
    ?S:fail(b, 1),
    {ok, #{state := open, failure_rate := 0.5}} = ?CB:get_stats(b),
    ok = ?CB:register_breaker(c, Options#{failure_rate_threshold => 0.6}),
    _ = [ begin
              ?S:succeed(c, 1),
              ?S:fail(c, 1)
          end || _ <- lists:seq(1, 20) ],
    {ok, #{state := closed, failure_rate := 0.5}} = ?CB:get_stats(c).


partly_filled_window_never_opens(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 10}),
    ?S:fail(b, 9),
    {ok, #{state := closed, failure_rate := 1.0}} = ?CB:get_stats(b),
    ?S:fail(b, 1),
    ?assertEqual(open, ?CB:get_state(b)).


success_never_opens(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 3}),
    ?S:fail(b, 2),
    ?S:succeed(b, 1),
    {ok, #{state := closed, failure_rate := Rate}} = ?CB:get_stats(b),
    ?assert(Rate > 0.6),
    ?S:succeed(b, 2),
    {ok, #{state := closed, failure_rate := +0.0}} = ?CB:get_stats(b).


window_slides(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 4, failure_rate_threshold => 0.75}),
    % Half of any four calls fail.
    _ = [ begin
              ?S:fail(b, 2),
              ?S:succeed(b, 2)
          end || _ <- lists:seq(1, 50) ],
    {ok, #{state := closed, failure_rate := 0.5}} = ?CB:get_stats(b),
    ?S:fail(b, 2),
    {ok, #{state := closed, failure_rate := 0.5}} = ?CB:get_stats(b),
    ?S:fail(b, 1),
    {ok, #{state := open, failure_rate := 0.75}} = ?CB:get_stats(b).


window_is_empty_after_closing(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 4, timeout => 1}),
    ?S:fail(b, 4),
    ?S:await_state(half_open, b),
    ?S:succeed(b, 2),
    {ok, #{state := closed, failure_rate := +0.0}} = ?CB:get_stats(b),
    ?S:fail(b, 3),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?S:fail(b, 1),
    ?assertNotEqual(closed, ?CB:get_state(b)).


half_open_when_the_time_is_up(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => 50}),
    Before = erlang:monotonic_time(millisecond),
    ?S:fail(b, 1),
    % No call is needed for this.
    ?S:await_state(half_open, b),
    ?assert(erlang:monotonic_time(millisecond) - Before >= 50),
    {ok, #{consecutive_failures := 0, consecutive_successes := 0}} = ?CB:get_stats(b),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    {ok, #{state := half_open, consecutive_successes := 1}} = ?CB:get_stats(b).


not_half_open_before(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => 200}),
    Before = erlang:monotonic_time(millisecond),
    ?S:fail(b, 1),
    test_support:await(fun() ->
                               IsHalfOpen = ?CB:get_state(b) =:= half_open,
                               ?assert(not IsHalfOpen orelse erlang:monotonic_time(millisecond) - Before >= 200),
                               IsHalfOpen
                       end,
                       ?DEADLINE_MS).


successes_close_and_a_failure_opens_again(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, success_threshold => 3, timeout => 1}),
    ?S:fail(b, 1),
    ?S:await_state(half_open, b),
    ?S:succeed(b, 2),
    ?assertEqual(half_open, ?CB:get_state(b)),
    ?S:fail(b, 1),
    ?S:await_state(half_open, b),
    ?S:succeed(b, 2),
    ?assertEqual(half_open, ?CB:get_state(b)),
    ?S:succeed(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    {ok, #{total_failures := 2, total_successes := 5}} = ?CB:get_stats(b).


success_threshold_is_in_a_row(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, success_threshold => 2, timeout => 1}),
    ?S:succeed(b, 5),
    ?S:fail(b, 1),
    ?S:await_state(half_open, b),
    % Earlier successes do not count.
    ?S:succeed(b, 1),
    ?assertEqual(half_open, ?CB:get_state(b)).


probe_limit_is_the_success_threshold_by_default(_Config) ->
    _ = [ begin
              ok = ?CB:register_breaker(b, Options#{timeout => 1}),
              ok = ?CB:force_open(b),
              ?S:await_state(half_open, b),
              Callers = [ ?S:blocked_call(b) || _ <- lists:seq(1, Limit) ],
              ?S:refused(b),
              ?S:finish(hd(Callers), {ok, 1}),
              % A slot is free again.
              ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
              _ = [ ?S:finish(C, {ok, 1}) || C <- tl(Callers) ],
              ok = ?CB:unregister_breaker(b)
          end || {Options, Limit} <- [{#{success_threshold => 2}, 2},
                                      {#{success_threshold => 7}, 7},
                                      {#{success_threshold => 7, probe_limit => 3}, 3},
                                      {#{success_threshold => 3, probe_limit => 1}, 1}] ].


time_begins_anew_when_opened_again(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => 300}),
    ?S:fail(b, 1),
    % Most of the timeout has passed.
    ok = test_support:sleep_until(erlang:monotonic_time(microsecond) + 200_000),
    ok = ?CB:force_close(b),
    Before = erlang:monotonic_time(millisecond),
    ?S:fail(b, 1),
    ?S:await_state(half_open, b),
    ?assert(erlang:monotonic_time(millisecond) - Before >= 300).


results(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1000, window_size => 1000}),
    Successes = [{ok, 1}, ok, {ok}, {ok, 1, 2}, error, {error}, {error, 1, 2}, 7, [], undefined, <<>>, {errors, x}],
    _ = [ ?assertEqual(R, ?CB:call(b, fun() -> R end)) || R <- Successes ],
    N = length(Successes),
    {ok, #{total_successes := N, total_failures := 0, total_calls := N}} = ?CB:get_stats(b),
    Failures = [{fun() -> {error, x} end, {error, x}},
                {fun() -> {error, {deep, x}} end, {error, {deep, x}}},
                {fun() -> throw(ball) end, {error, {exception, throw, ball}}},
                {fun() -> error(wrong) end, {error, {exception, error, wrong}}},
                {fun() -> exit(door) end, {error, {exception, exit, door}}},
                {fun() -> exit(normal) end, {error, {exception, exit, normal}}},
                {fun() -> element(2, list_to_tuple([self()])) end, {error, {exception, error, badarg}}}],
    _ = [ ?assertEqual(R, ?CB:call(b, F)) || {F, R} <- Failures ],
    M = length(Failures),
    {ok, #{total_successes := N, total_failures := M, consecutive_failures := M}} = ?CB:get_stats(b).


fun_runs_in_the_caller(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    ?assertEqual(self(), ?CB:call(b, fun() -> self() end)).


fallback(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 2, timeout => ?HOUR}),
    Never = fun() -> error(ran) end,
    ?assertEqual({ok, 1}, ?CB:call_with_fallback(b, fun() -> {ok, 1} end, Never)),
    ?assertEqual({error, x}, ?CB:call_with_fallback(b, fun() -> {error, x} end, Never)),
    ?assertEqual({error, {exception, error, y}}, ?CB:call_with_fallback(b, fun() -> error(y) end, Never)),
    ?assertEqual(open, ?CB:get_state(b)),
    _ = [ ?assertEqual(V, ?CB:call_with_fallback(b, Never, fun() -> V end)) || V <- [{ok, 2}, {error, z}, anything] ],
    ?assertThrow(ball, ?CB:call_with_fallback(b, Never, fun() -> throw(ball) end)),
    ?assertEqual(2, ?CB:call_with_fallback(b, Never, fun() -> 2 end, 100)),
    {ok, #{total_failures := 2, total_rejected := 5}} = ?CB:get_stats(b).


hundred_calls_side_by_side(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    Callers = [ ?S:blocked_call(b) || _ <- lists:seq(1, 100) ],
    % All callers are in their funs.
    _ = [ ?assertEqual({ok, C}, ?S:finish(C, {ok, C})) || C <- Callers ],
    {ok, #{total_successes := 100, total_calls := 100}} = ?CB:get_stats(b).


%% Calls do not involve the breaker's process, which may be suspended.
no_process_takes_part(_Config) ->
    {ok, Pid} = ?CB:start_link(b, #{failure_threshold => 1, timeout => ?HOUR}),
    ok = sys:suspend(Pid),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    ?S:fail(Pid, 1),
    _ = [ ?S:refused(b) || _ <- lists:seq(1, 100) ],
    {ok, #{total_rejected := 100, total_calls := 102}} = ?CB:get_stats(b),
    ?assertEqual({message_queue_len, 0}, process_info(Pid, message_queue_len)),
    ok = sys:resume(Pid).


nested_calls(_Config) ->
    ok = ?CB:register_breaker(a, #{}),
    ok = ?CB:register_breaker(b, #{}),
    Inner = fun() -> ?CB:call(b, fun() -> ?CB:call(a, fun() -> {ok, 1} end) end) end,
    ?assertEqual({ok, 1}, ?CB:call(a, Inner)),
    {ok, #{total_successes := 2}} = ?CB:get_stats(a),
    % A fun may do anything with its own breaker.
    ?assertEqual(ok, ?CB:call(a, fun() -> ?CB:reset(a) end)),
    ?assertEqual(ok, ?CB:call(a, fun() -> ?CB:stop(a) end)),
    ?assertExit({noproc, _}, ?CB:get_state(a)).


wrong_arguments(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    ?assertError(function_clause, ?CB:call(b, not_a_fun)),
    ?assertError(function_clause, ?CB:call(b, fun(X) -> X end)),
    ?assertError(function_clause, ?CB:call(b, fun() -> ok end, -1)),
    ?assertError(function_clause, ?CB:call(b, fun() -> ok end, 1 bsl 32)),
    ?assertError(function_clause, ?CB:call(b, fun() -> ok end, soon)),
    ?assertError(function_clause, ?CB:call_with_fallback(b, fun() -> ok end, none)),
    ?assertError(function_clause, ?CB:register_breaker(c, #{}, nobody)),
    {ok, #{total_calls := 0}} = ?CB:get_stats(b).


bounded_call_returns(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1000, window_size => 1000}),
    Call = fun(Fun) -> ?CB:call(b, Fun, 60_000) end,
    _ = [ ?assertEqual(R, Call(fun() -> R end)) || R <- [{ok, 1}, ok, 7, undefined, {error, 1, 2}, {error, x}] ],
    ?assertEqual({error, {exception, throw, ball}}, Call(fun() -> throw(ball) end)),
    ?assertEqual({error, {exception, error, wrong}}, Call(fun() -> error(wrong) end)),
    ?assertEqual({error, {exception, exit, normal}}, Call(fun() -> exit(normal) end)),
    % A signal that kills the fun's process does not kill the caller.
    ?assertEqual({error, {exception, exit, killed}}, Call(fun() -> exit(self(), kill), forever() end)),
    ?assertEqual({error, {exception, exit, crash}}, Call(fun() -> spawn_link(fun() -> exit(crash) end), forever() end)),
    {ok, #{total_successes := 5, total_failures := 6}} = ?CB:get_stats(b),
    ?assertEqual([], test_support:flush()).


bounded_call_runs_elsewhere(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    ?assertNotEqual(self(), ?CB:call(b, fun() -> self() end, 60_000)),
    ?assertEqual(self(), ?CB:call(b, fun() -> self() end, infinity)),
    ?assertEqual(group_leader(), ?CB:call(b, fun() -> group_leader() end, 60_000)).


bounded_call_times_out(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => ?HOUR}),
    Self = self(),
    Fun = fun() -> Self ! {runs, self()}, forever() end,
    ?assertExit({timeout, _}, ?CB:call(b, Fun, 20)),
    % The failure counts at that moment.
    {ok, #{state := open, total_failures := 1, total_successes := 0, total_calls := 1}} = ?CB:get_stats(b),
    Worker = receive {runs, Pid} -> Pid end,
    _ = test_support:await_end(Worker),
    ?assertEqual([], test_support:flush()),
    ok = ?CB:reset(b),
    ?assertExit({timeout, _}, ?CB:call_with_fallback(b, fun() -> forever() end, fun() -> error(ran) end, 0)).


bounded_probe_gives_its_slot_back(_Config) ->
    ok = ?CB:register_breaker(b, #{probe_limit => 1, success_threshold => 1, timeout => ?HOUR}),
    ok = ?CB:force_open(b),
    ok = ?CB:force_half_open(b),
    ?assertExit({timeout, _}, ?CB:call(b, fun() -> forever() end, 20)),
    ?assertEqual(open, ?CB:get_state(b)),
    ok = ?CB:force_half_open(b),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    ?assertEqual(closed, ?CB:get_state(b)).


bounded_call_is_killed_with_its_caller(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => ?HOUR}),
    Self = self(),
    Caller = spawn(fun() -> ?CB:call(b, fun() -> Self ! {runs, self()}, forever() end, ?HOUR) end),
    Worker = receive {runs, Pid} -> Pid end,
    test_support:kill(Caller),
    _ = test_support:await_end(Worker),
    ?S:await_state(open, b).


%% The slot of call/2 is reclaimed, that of call/3 with `infinity' never.
slot_is_reclaimed_after_five_seconds(_Config) ->
    ok = ?CB:register_breaker(b, #{probe_limit => 1, success_threshold => 2, timeout => ?HOUR}),
    ok = ?CB:register_breaker(c, #{probe_limit => 1, success_threshold => 1, timeout => ?HOUR}),
    _ = [ begin
              ok = ?CB:force_open(B),
              ok = ?CB:force_half_open(B)
          end || B <- [b, c] ],
    Before = erlang:monotonic_time(millisecond),
    _ = ?S:blocked_call(c),
    Self = self(),
    Hanging = spawn(fun() ->
                            Result = ?CB:call(b, fun() -> Self ! {runs, self()}, receive {finish, R} -> R end end),
                            Self ! {self(), {result, Result}}
                    end),
    receive {runs, Hanging} -> ok end,
    test_support:await(fun() ->
                               IsThrough = {ok, 1} =:= ?CB:call(b, fun() -> {ok, 1} end),
                               ?assert(not IsThrough orelse erlang:monotonic_time(millisecond) - Before >= 5000),
                               IsThrough
                       end,
                       ?DEADLINE_MS),
    % The call that has lost its slot counts only in the totals.
    ?assertEqual({error, x}, ?S:finish(Hanging, {error, x})),
    {ok, #{state := half_open, total_failures := 1, total_successes := 1, consecutive_successes := 1}} =
        ?CB:get_stats(b),
    ?S:succeed(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?S:refused(c).


forever() ->
    receive never -> ok end.
