%%% Named circuit breakers: each transition, each result, the races; and the metrics of the node's.
%%%
%%% Neither our application nor the native library takes part in what is named here. PROP_BREAKER in
%%% the environment is the number of histories of the property (1000, about 10 s on two cores).
-module(circuit_breaker_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-define(CB,          erlmcp_circuit_breaker).
-define(DEADLINE_MS, 20000).
-define(HOUR,        3600000).


suite() -> [{timetrap, {minutes, 5}}].


all() ->
    [{group, names},
     {group, transitions},
     {group, calls},
     {group, operation},
     {group, races},
     {group, node},
     named_breaker_is_the_model].


groups() ->
    [{names,
      [],
      [defaults,
       names_are_any_term,
       no_atom_is_made_of_a_name,
       a_name_is_taken_once,
       a_name_is_free_at_once,
       unknown_names_exit,
       pid_as_breaker,
       pid_as_name,
       bad_options,
       options_without_effect,
       no_foreign_names_are_used,
       keeper_is_killed]},
     {transitions,
      [],
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
       time_begins_anew_when_opened_again]},
     {calls,
      [],
      [results,
       fun_runs_in_the_caller,
       fallback,
       hundred_slow_calls_side_by_side,
       open_breaker_gets_no_message,
       call_costs_two_messages,
       nested_calls,
       nothing_is_left_of_a_call,
       overdue_call_is_a_failure,
       overdue_probe_gives_its_slot_back,
       breaker_that_does_not_answer,
       wrong_arguments]},
     {operation,
      [],
      [reset,
       force_open_and_close,
       force_on_the_same_state_changes_nothing,
       statistics,
       all_breakers,
       transitions_are_logged_once,
       supervised_breaker_starts_anew]},
     {races,
      [],
      [probe_limit_under_100_callers,
       stale_probes_keep_their_slots,
       killed_caller_is_a_failure,
       killed_probe_opens,
       callers_killed_anywhere,
       stale_outcomes_do_not_count,
       force_and_reset_against_calls,
       breaker_killed_under_callers,
       breaker_killed_at_any_moment,
       breaker_survives_its_callers,
       one_name_registered_from_16_processes]},
     {node,
      [],
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
       node_transitions_are_logged_once]}].


init_per_group(node, Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Config;
init_per_group(_Group, Config) ->
    Config.


end_per_group(node, _Config) ->
    ok = erlmcp_backpressure:set(circuit_breaker, erlmcp_native_config:default(circuit_breaker)),
    ok = ?CB:reset(),
    _ = application:stop(erlmcp_native),
    ok;
end_per_group(_Group, _Config) ->
    ok.


init_per_suite(Config) ->
    _ = application:stop(erlmcp_native),
    #{level := Level} = logger:get_primary_config(),
    [{logger_level, Level} | Config].


end_per_suite(_Config) ->
    ok.


end_per_testcase(_Case, _Config) ->
    _ = [ ?CB:unregister_breaker(Name) || Name <- maps:keys(?CB:get_all_states()) ],
    ok.


%%% Names


defaults(_Config) ->
    {ok, Pid} = ?CB:start_link(b),
    ?assertEqual(closed, ?CB:get_state(b)),
    {ok, Stats} = ?CB:get_stats(b),
    ?assertMatch(#{
                   name := b,
                   state := closed,
                   consecutive_failures := 0,
                   consecutive_successes := 0,
                   total_calls := 0,
                   total_successes := 0,
                   total_failures := 0,
                   total_rejected := 0,
                   last_failure_time := undefined,
                   failure_rate := 0.0,
                   failure_threshold := 5,
                   success_threshold := 2,
                   timeout := 60000,
                   window_size := 10,
                   failure_rate_threshold := 0.5,
                   probe_limit := 2
                  },
                 Stats),
    ?assert(is_integer(maps:get(last_state_change, Stats))),
    ?assertEqual(ok, ?CB:stop(b)),
    ?assertNot(is_process_alive(Pid)).


names_are_any_term(_Config) ->
    Names = [a, <<"a">>, "a", 1, 1.0, {a, 1}, #{a => 1}, [], make_ref(), fun() -> ok end, {via, a, b}, {global, c}],
    lists:foreach(fun(Name) -> ?assertEqual(ok, ?CB:register_breaker(Name, #{})) end, Names),
    lists:foreach(fun(Name) ->
                          {ok, #{name := Name, total_calls := 0}} = ?CB:get_stats(Name),
                          {ok, 1} = ?CB:call(Name, fun() -> {ok, 1} end),
                          {ok, #{name := Name, total_calls := 1}} = ?CB:get_stats(Name)
                  end,
                  Names),
    ?assertEqual(lists:sort(Names), lists:sort(maps:keys(?CB:get_all_states()))),
    lists:foreach(fun(Name) -> ?assertEqual(ok, ?CB:unregister_breaker(Name)) end, Names),
    ?assertEqual(#{}, ?CB:get_all_states()).


%% Others may make some meanwhile.
no_atom_is_made_of_a_name(_Config) ->
    ok = use(<<"warm up">>),
    Before = erlang:system_info(atom_count),
    _ = [ ok = use(<<"no atom ", (integer_to_binary(N))/binary>>) || N <- lists:seq(1, 1000) ],
    ?assert(erlang:system_info(atom_count) - Before < 100).


use(Name) ->
    ok = ?CB:register_breaker(Name, #{}),
    {ok, 1} = ?CB:call(Name, fun() -> {ok, 1} end),
    {ok, _} = ?CB:get_stats(Name),
    ?CB:unregister_breaker(Name).


a_name_is_taken_once(_Config) ->
    {ok, Pid} = ?CB:start_link(b, #{failure_threshold => 3}),
    ?assertEqual({error, {already_started, Pid}}, ?CB:start_link(b)),
    ?assertEqual({error, {already_started, Pid}}, ?CB:start_link(b, #{})),
    ?assertEqual({error, already_registered}, ?CB:register_breaker(b, #{})),
    ?assertEqual({error, already_registered}, ?CB:register_breaker(b, #{}, self())),
    ?assertEqual(ok, ?CB:register_breaker(c, #{}, undefined)),
    ?assertEqual({error, already_registered}, ?CB:register_breaker(c, #{})),
    % The first one stays as it is.
    {ok, #{failure_threshold := 3}} = ?CB:get_stats(b),
    ?assertEqual([], test_support:flush()).


a_name_is_free_at_once(_Config) ->
    lists:foreach(
      fun(N) ->
              ok = ?CB:register_breaker(b, #{window_size => N}),
              {ok, #{window_size := N}} = ?CB:get_stats(b),
              case N rem 3 of
                  0 -> ok = ?CB:unregister_breaker(b);
                  1 -> ok = ?CB:stop(b);
                  2 -> test_support:kill(breaker_pid(b))
              end,
              ?assertExit({noproc, _}, ?CB:get_state(b)),
              ?assertEqual(#{}, ?CB:get_all_states())
      end,
      lists:seq(1, 300)),
    ?assertEqual(ok, ?CB:unregister_breaker(b)),
    ?assertEqual(ok, ?CB:unregister_breaker(b)).


unknown_names_exit(_Config) ->
    Dead = spawn(fun() -> ok end),
    test_support:await_end(Dead),
    _ = [ begin
              Never = fun() -> error(ran) end,
              ?assertExit({noproc, _}, ?CB:call(Name, Never)),
              ?assertExit({noproc, _}, ?CB:call(Name, Never, infinity)),
              ?assertExit({noproc, _}, ?CB:call_with_fallback(Name, Never, Never)),
              ?assertExit({noproc, _}, ?CB:get_state(Name)),
              ?assertExit({noproc, _}, ?CB:get_stats(Name)),
              ?assertExit({noproc, _}, ?CB:reset(Name)),
              ?assertExit({noproc, _}, ?CB:force_open(Name)),
              ?assertExit({noproc, _}, ?CB:force_close(Name)),
              ?assertExit({noproc, _}, ?CB:stop(Name)),
              ?assertEqual(ok, ?CB:unregister_breaker(Name))
          end || Name <- [nobody, {no, body}, <<"nobody">>, Dead] ].


pid_as_breaker(_Config) ->
    {ok, Pid} = ?CB:start_link(b, #{failure_threshold => 2, timeout => ?HOUR}),
    {ok, 1} = ?CB:call(Pid, fun() -> {ok, 1} end),
    fail(Pid, 2),
    ?assertEqual(open, ?CB:get_state(Pid)),
    ?assertEqual({error, circuit_breaker_open}, ?CB:call(Pid, fun() -> error(ran) end)),
    ?assertEqual(fallback, ?CB:call_with_fallback(Pid, fun() -> error(ran) end, fun() -> fallback end)),
    ?assertEqual(ok, ?CB:reset(Pid)),
    ?assertEqual(ok, ?CB:force_open(Pid)),
    ?assertEqual(ok, ?CB:force_close(Pid)),
    {ok, #{name := b, state := closed, total_rejected := 2}} = ?CB:get_stats(Pid),
    ?assertEqual(ok, ?CB:stop(Pid)),
    ?assertExit({noproc, _}, ?CB:get_state(Pid)).


%% A breaker of a connection, say.
pid_as_name(_Config) ->
    {ok, Other} = ?CB:start_link(other),
    ok = ?CB:register_breaker(self(), #{}),
    ok = ?CB:register_breaker(Other, #{}),
    ?assertEqual({ok, 1}, ?CB:call(self(), fun() -> {ok, 1} end)),
    {ok, #{name := Other}} = ?CB:get_stats(Other),
    {ok, #{name := other}} = ?CB:get_stats(other).


bad_options(_Config) ->
    Bad = [{failure_threshold, 0},
           {failure_threshold, -1},
           {failure_threshold, 1.0},
           {failure_threshold, infinity},
           {success_threshold, 0},
           {success_threshold, two},
           {timeout, 0},
           {timeout, 1.5},
           {timeout, infinity},
           {timeout, 1 bsl 32},
           {window_size, 0},
           {window_size, 1000001},
           {failure_rate_threshold, -0.1},
           {failure_rate_threshold, 1.1},
           {failure_rate_threshold, 2},
           {failure_rate_threshold, "0.5"},
           {probe_limit, 0},
           {probe_limit, infinity},
           {failure_treshold, 5},
           {<<"timeout">>, 5}],
    _ = [ begin
              ?assertMatch({error, {bad_option, Key, Value, [_ | _]}}, ?CB:start_link(b, #{Key => Value})),
              ?assertMatch({error, {bad_option, Key, Value, [_ | _]}},
                           ?CB:register_breaker(b, #{Key => Value, window_size => Size}))
          end || {Key, Value} <- Bad, Size <- [10], Key =/= window_size ],
    _ = [ ?assertMatch({error, {bad_option, config, V, "a map"}}, ?CB:start_link(b, V))
          || V <- [[], [{timeout, 5}], undefined, 5] ],
    ?assertMatch({error, {bad_option, window_size, 0, "an integer from 1 to 1000000"}},
                 ?CB:start_link(b, #{window_size => 0})),
    ?assertMatch({error, {bad_option, window_size, 1000001, _}},
                 ?CB:register_breaker(b, #{window_size => 1000001})),
    ?assertExit({noproc, _}, ?CB:get_state(b)),
    ?assertEqual([], test_support:flush()),
    _ = [ begin
              ok = ?CB:register_breaker(b, #{Key => Value}),
              {ok, #{Key := Value, config := #{Key := Value}}} = ?CB:get_stats(b),
              ok = ?CB:unregister_breaker(b)
          end || {Key, Value} <- [{failure_threshold, 1},
                                  {timeout, 1},
                                  {timeout, (1 bsl 32) - 1},
                                  {window_size, 1},
                                  {window_size, 1000000},
                                  {failure_rate_threshold, 0},
                                  {failure_rate_threshold, 0.0},
                                  {failure_rate_threshold, 1},
                                  {probe_limit, 1000}] ].


options_without_effect(_Config) ->
    ok = ?CB:register_breaker(b, #{priority_level => high, reset_timeout => infinity}),
    {ok, #{config := #{priority_level := high, reset_timeout := infinity}}} = ?CB:get_stats(b).


no_foreign_names_are_used(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    ?assertEqual(undefined, whereis(erlmcp_circuit_breaker)),
    ?assertEqual(undefined, whereis(b)),
    ?assertEqual(undefined, ets:whereis(erlmcp_circuit_breaker_registry)),
    ?assertNot(lists:keymember(erlmcp_native, 1, application:which_applications())).


%% The breakers keep their names, and what they have counted.
keeper_is_killed(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => ?HOUR}),
    ok = ?CB:register_breaker(c, #{}),
    fail(b, 1),
    refused(b),
    lists:foreach(
      fun(N) ->
              test_support:kill(whereis(erlmcp_circuit_breaker_names)),
              test_support:await(fun() -> #{b => open, c => closed} =:= ?CB:get_all_states() end, ?DEADLINE_MS),
              refused(b),
              {ok, #{total_rejected := Rejected}} = ?CB:get_stats(b),
              ?assertEqual(N + 1, Rejected),
              {ok, 1} = ?CB:call(c, fun() -> {ok, 1} end)
      end,
      lists:seq(1, 50)),
    % The end of an earlier breaker of the name, which the keeper hears of late.
    erlmcp_circuit_breaker_names ! {{down, c}, make_ref(), process, self(), gone},
    ?assertEqual({error, already_registered}, ?CB:register_breaker(c, #{})),
    % The new gate is shut as the old one was.
    ok = sys:suspend(breaker_pid(b)),
    refused(b),
    test_support:kill(breaker_pid(b)),
    ?assertEqual(#{c => closed}, ?CB:get_all_states()).


%%% Transitions


failures_in_a_row_open(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    fail(b, 2),
    ?assertEqual(closed, ?CB:get_state(b)),
    fail(b, 1),
    % Without asking for the state: the caller's next call is refused.
    refused(b),
    ?assertEqual(open, ?CB:get_state(b)).


success_ends_a_row(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, window_size => 1000}),
    _ = [ begin
              fail(b, 2),
              succeed(b, 1)
          end || _ <- lists:seq(1, 20) ],
    {ok, #{state := closed, consecutive_failures := 0, total_failures := 40}} = ?CB:get_stats(b).


failure_rate_opens(_Config) ->
    Options = #{failure_threshold => 100, window_size => 10, failure_rate_threshold => 0.5, timeout => ?HOUR},
    ok = ?CB:register_breaker(b, Options),
    _ = [ begin
              succeed(b, 1),
              fail(b, 1)
          end || _ <- lists:seq(1, 4) ],
    succeed(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    % The tenth call, the fifth failure.
    fail(b, 1),
    {ok, #{state := open, failure_rate := 0.5}} = ?CB:get_stats(b),
    ok = ?CB:register_breaker(c, Options#{failure_rate_threshold => 0.6}),
    _ = [ begin
              succeed(c, 1),
              fail(c, 1)
          end || _ <- lists:seq(1, 20) ],
    {ok, #{state := closed, failure_rate := 0.5}} = ?CB:get_stats(c).


partly_filled_window_never_opens(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 10}),
    fail(b, 9),
    {ok, #{state := closed, failure_rate := 1.0}} = ?CB:get_stats(b),
    fail(b, 1),
    ?assertEqual(open, ?CB:get_state(b)).


success_never_opens(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 3}),
    fail(b, 2),
    succeed(b, 1),
    {ok, #{state := closed, failure_rate := Rate}} = ?CB:get_stats(b),
    ?assert(Rate > 0.6),
    succeed(b, 2),
    {ok, #{state := closed, failure_rate := 0.0}} = ?CB:get_stats(b).


window_slides(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 4, failure_rate_threshold => 0.75}),
    % Half of any four calls fail.
    _ = [ begin
              fail(b, 2),
              succeed(b, 2)
          end || _ <- lists:seq(1, 50) ],
    {ok, #{state := closed, failure_rate := 0.5}} = ?CB:get_stats(b),
    fail(b, 2),
    {ok, #{state := closed, failure_rate := 0.5}} = ?CB:get_stats(b),
    fail(b, 1),
    {ok, #{state := open, failure_rate := 0.75}} = ?CB:get_stats(b).


window_is_empty_after_closing(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100, window_size => 4, timeout => 1}),
    fail(b, 4),
    await_state(half_open, b),
    succeed(b, 2),
    {ok, #{state := closed, failure_rate := 0.0}} = ?CB:get_stats(b),
    fail(b, 3),
    ?assertEqual(closed, ?CB:get_state(b)),
    fail(b, 1),
    ?assertNotEqual(closed, ?CB:get_state(b)).


half_open_when_the_time_is_up(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => 50}),
    Before = erlang:monotonic_time(millisecond),
    fail(b, 1),
    % Nobody has to call for that.
    await_state(half_open, b),
    ?assert(erlang:monotonic_time(millisecond) - Before >= 50),
    {ok, #{consecutive_failures := 0, consecutive_successes := 0}} = ?CB:get_stats(b),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    {ok, #{state := half_open, consecutive_successes := 1}} = ?CB:get_stats(b).


not_half_open_before(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => 2000}),
    fail(b, 1),
    timer:sleep(100),
    refused(b),
    ?assertEqual(open, ?CB:get_state(b)).


successes_close_and_a_failure_opens_again(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, success_threshold => 3, timeout => 1}),
    fail(b, 1),
    await_state(half_open, b),
    succeed(b, 2),
    ?assertEqual(half_open, ?CB:get_state(b)),
    fail(b, 1),
    await_state(half_open, b),
    succeed(b, 2),
    ?assertEqual(half_open, ?CB:get_state(b)),
    succeed(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    {ok, #{total_failures := 2, total_successes := 5}} = ?CB:get_stats(b).


success_threshold_is_in_a_row(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, success_threshold => 2, timeout => 1}),
    succeed(b, 5),
    fail(b, 1),
    await_state(half_open, b),
    % Those before do not count.
    succeed(b, 1),
    ?assertEqual(half_open, ?CB:get_state(b)).


probe_limit_is_the_success_threshold_by_default(_Config) ->
    _ = [ begin
              ok = ?CB:register_breaker(b, Options#{timeout => 1}),
              ok = ?CB:force_open(b),
              await_state(half_open, b),
              Callers = [ blocked_call(b) || _ <- lists:seq(1, Limit) ],
              refused(b),
              finish(hd(Callers), {ok, 1}),
              % A slot is free again.
              ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
              _ = [ finish(C, {ok, 1}) || C <- tl(Callers) ],
              ok = ?CB:unregister_breaker(b)
          end || {Options, Limit} <- [{#{success_threshold => 2}, 2},
                                      {#{success_threshold => 7}, 7},
                                      {#{success_threshold => 7, probe_limit => 3}, 3},
                                      {#{success_threshold => 3, probe_limit => 1}, 1}] ].


time_begins_anew_when_opened_again(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => 1000}),
    fail(b, 1),
    timer:sleep(700),
    ok = ?CB:force_close(b),
    fail(b, 1),
    timer:sleep(500),
    % The timer of the first time would have fired.
    ?assertEqual(open, ?CB:get_state(b)),
    await_state(half_open, b).


%%% Calls


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


hundred_slow_calls_side_by_side(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    Before = erlang:monotonic_time(millisecond),
    Results = at_once(100,
                      fun(N) ->
                              ?CB:call(b,
                                       fun() ->
                                               timer:sleep(500),
                                               {ok, N}
                                       end)
                      end),
    ?assert(erlang:monotonic_time(millisecond) - Before < 5000),
    ?assertEqual([ {ok, N} || N <- lists:seq(1, 100) ], Results),
    {ok, #{total_successes := 100, total_calls := 100}} = ?CB:get_stats(b).


open_breaker_gets_no_message(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => ?HOUR}),
    fail(b, 1),
    ?assertEqual(open, ?CB:get_state(b)),
    Pid = breaker_pid(b),
    ok = sys:suspend(Pid),
    _ = [ refused(b) || _ <- lists:seq(1, 100) ],
    ?assertEqual({message_queue_len, 0}, process_info(Pid, message_queue_len)),
    ok = sys:resume(Pid),
    {ok, #{total_rejected := 100, total_calls := 101}} = ?CB:get_stats(b).


call_costs_two_messages(_Config) ->
    ok = ?CB:register_breaker(b, #{timeout => 1}),
    Pid = breaker_pid(b),
    1 = erlang:trace(Pid, true, ['receive']),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    closed = ?CB:get_state(b),
    1 = erlang:trace(Pid, false, ['receive']),
    Delivered = erlang:trace_delivered(Pid),
    receive {trace_delivered, Pid, Delivered} -> ok end,
    % The third one is get_state's.
    ?assertMatch([_, _, _], [ M || {trace, P, 'receive', M} <- test_support:flush(), P =:= Pid ]).


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


nothing_is_left_of_a_call(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    succeed(b, 100),
    ?assertEqual(closed, ?CB:get_state(b)),
    Pid = breaker_pid(b),
    % The keeper's is left.
    ?assertMatch({monitors, [_]}, process_info(Pid, monitors)),
    Calls = [ E || E <- tuple_to_list(sys:get_state(Pid)), is_map(E) ],
    ?assertEqual([#{}], Calls).


overdue_call_is_a_failure(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, timeout => ?HOUR}),
    Seen = ?CB:call(b,
                    fun() ->
                            await_state(open, b),
                            {ok, late}
                    end,
                    50),
    % The caller gets it, and it counts once.
    ?assertEqual({ok, late}, Seen),
    {ok, #{state := open, total_failures := 1, total_successes := 0, total_calls := 1}} = ?CB:get_stats(b),
    ok = ?CB:reset(b),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end, 200),
    timer:sleep(300),
    {ok, #{state := closed, total_failures := 1, total_successes := 1}} = ?CB:get_stats(b).


overdue_probe_gives_its_slot_back(_Config) ->
    ok = ?CB:register_breaker(b, #{probe_limit => 1, success_threshold => 1, timeout => 20}),
    ok = ?CB:force_open(b),
    await_state(half_open, b),
    Hanging = blocked_call(b, 30),
    test_support:await(fun() -> {ok, 1} =:= ?CB:call(b, fun() -> {ok, 1} end) end, ?DEADLINE_MS),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?assertEqual({error, x}, finish(Hanging, {error, x})),
    {ok, #{state := closed, total_failures := 1, consecutive_failures := 0}} = ?CB:get_stats(b).


%% What is granted too late is given back, since the fun does not run.
breaker_that_does_not_answer(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 1, timeout => 1}),
    ok = ?CB:force_open(b),
    await_state(half_open, b),
    Pid = breaker_pid(b),
    ok = sys:suspend(Pid),
    ?assertExit({timeout, _}, ?CB:call(b, fun() -> error(ran) end, 20)),
    ok = sys:resume(Pid),
    {ok, #{state := half_open, total_calls := 0}} = ?CB:get_stats(b),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?assertEqual([], test_support:flush()).


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


%%% Operation


reset(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 2, timeout => ?HOUR}),
    succeed(b, 1),
    fail(b, 2),
    refused(b),
    ?assertEqual(ok, ?CB:reset(b)),
    {ok, #{
           state := closed,
           consecutive_failures := 0,
           consecutive_successes := 0,
           failure_rate := 0.0,
           last_failure_time := undefined,
           total_calls := 4,
           total_successes := 1,
           total_failures := 2,
           total_rejected := 1
          }} = ?CB:get_stats(b),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    % In the closed state it forgets the failures so far.
    fail(b, 1),
    ok = ?CB:reset(b),
    fail(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    fail(b, 1),
    ?assertEqual(open, ?CB:get_state(b)).


force_open_and_close(_Config) ->
    ok = ?CB:register_breaker(b, #{timeout => 50}),
    ?assertEqual(ok, ?CB:force_open(b)),
    refused(b),
    % For the time of an ordinary opening.
    await_state(half_open, b),
    ?assertEqual(ok, ?CB:force_open(b)),
    refused(b),
    ?assertEqual(ok, ?CB:force_close(b)),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    timer:sleep(100),
    ?assertEqual(closed, ?CB:get_state(b)),
    ok = ?CB:force_open(b),
    await_state(half_open, b),
    ?assertEqual(ok, ?CB:force_close(b)),
    ?assertEqual(closed, ?CB:get_state(b)).


force_on_the_same_state_changes_nothing(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => 1000}),
    fail(b, 2),
    {ok, Closed} = ?CB:get_stats(b),
    timer:sleep(2),
    ok = ?CB:force_close(b),
    ?assertEqual({ok, Closed}, ?CB:get_stats(b)),
    fail(b, 1),
    Before = erlang:monotonic_time(millisecond),
    {ok, Open} = ?CB:get_stats(b),
    timer:sleep(700),
    ok = ?CB:force_open(b),
    ?assertEqual({ok, Open}, ?CB:get_stats(b)),
    await_state(half_open, b),
    % Not prolonged.
    ?assert(erlang:monotonic_time(millisecond) - Before < 1700).


statistics(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    Started = erlang:monotonic_time(millisecond),
    succeed(b, 3),
    fail(b, 1),
    {ok, Stats} = ?CB:get_stats(b),
    ?assertMatch(#{
                   consecutive_failures := 1,
                   consecutive_successes := 0,
                   total_calls := 4,
                   failure_rate := 0.25,
                   success_rate := 0.75
                  },
                 Stats),
    ?assert(maps:get(last_failure_time, Stats) >= Started),
    ?assert(maps:get(last_state_change, Stats) =< Started),
    timer:sleep(5),
    fail(b, 2),
    refused(b),
    {ok, Opened} = ?CB:get_stats(b),
    ?assertMatch(#{consecutive_failures := 3, total_calls := 7, total_rejected := 1}, Opened),
    ?assert(maps:get(last_state_change, Opened) >= Started + 5),
    ?assertEqual(lists:sort([name,
                             state,
                             consecutive_failures,
                             consecutive_successes,
                             total_calls,
                             total_successes,
                             total_failures,
                             total_rejected,
                             last_failure_time,
                             last_state_change,
                             failure_rate,
                             success_rate,
                             config,
                             failure_threshold,
                             success_threshold,
                             timeout,
                             window_size,
                             failure_rate_threshold,
                             probe_limit]),
                 lists:sort(maps:keys(Opened))).


all_breakers(_Config) ->
    ?assertEqual(#{}, ?CB:get_all_states()),
    ?assertEqual(#{}, ?CB:get_all_stats()),
    ?assertEqual(ok, ?CB:reset_all()),
    {ok, _} = ?CB:start_link(a, #{failure_threshold => 1, timeout => ?HOUR}),
    ok = ?CB:register_breaker(b, #{}),
    fail(a, 1),
    ?assertEqual(#{a => open, b => closed}, ?CB:get_all_states()),
    ?assertMatch(#{a := #{name := a, total_failures := 1}, b := #{name := b}}, ?CB:get_all_stats()),
    ?assertEqual(ok, ?CB:reset_all()),
    ?assertEqual(#{a => closed, b => closed}, ?CB:get_all_states()),
    ok = ?CB:stop(a).


transitions_are_logged_once(_Config) ->
    ok = logger:set_primary_config(level, info),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{pid => self()}}),
    try
        ok = ?CB:register_breaker({log, 1}, #{failure_threshold => 2, timeout => 20}),
        fail({log, 1}, 2),
        _ = [ refused({log, 1}) || _ <- lists:seq(1, 50), ?CB:get_state({log, 1}) =:= open ],
        await_state(half_open, {log, 1}),
        succeed({log, 1}, 2),
        ok = ?CB:force_close({log, 1}),
        ok = ?CB:reset({log, 1}),
        ok = ?CB:force_open({log, 1}),
        ok = ?CB:force_open({log, 1}),
        ok = ?CB:reset({log, 1}),
        closed = ?CB:get_state({log, 1}),
        ?assertEqual([{warning, circuit_opened},
                      {notice, circuit_half_open},
                      {notice, circuit_closed},
                      {warning, circuit_opened},
                      {notice, circuit_closed}],
                     [ {Level, Event}
                       || {logged, #{
                                     level := Level,
                                     meta := #{
                                               event := Event,
                                               breaker := {log, 1},
                                               domain := [erlmcp_native]
                                              }
                                    }} <- test_support:flush() ])
    after
        ok = logger:remove_handler(?MODULE)
    end.


%% The handler.
log(Event, #{config := #{pid := Pid}}) ->
    Pid ! {logged, Event}.


supervised_breaker_starts_anew(_Config) ->
    Child = #{id => b, start => {?CB, start_link, [b, #{failure_threshold => 1, timeout => ?HOUR}]}},
    {ok, Supervisor} = supervisor:start_link(?MODULE, [Child]),
    fail(b, 1),
    refused(b),
    Old = breaker_pid(b),
    test_support:kill(Old),
    test_support:await(fun() -> is_pid(breaker_pid(b)) end, ?DEADLINE_MS),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    ok = gen_server:stop(Supervisor),
    ?assertExit({noproc, _}, ?CB:get_state(b)).


%% The supervisor.
init(Children) -> {ok, {#{}, Children}}.


%%% Races


probe_limit_under_100_callers(_Config) ->
    Limit = 5,
    Running = counters:new(1, []),
    ok = ?CB:register_breaker(b, #{success_threshold => 1000, probe_limit => Limit, timeout => 1}),
    ok = ?CB:force_open(b),
    Callers = at_once(100, fun(_) -> probe(b, Running, 20, 0, 0) end),
    {Most, Refused} = lists:unzip(Callers),
    ?assertEqual(Limit, lists:max(Most)),
    ?assert(lists:sum(Refused) > 1000),
    ?assertEqual(0, counters:get(Running, 1)),
    {ok, #{total_failures := Failures}} = ?CB:get_stats(b),
    % It was opened and half open again all the time.
    ?assert(Failures > 50).


%% Calls until it was let through so many times; how many ran at the same time, and its refusals.
probe(_Breaker, _Running, 0, Most, Refused) ->
    {Most, Refused};
probe(Breaker, Running, Times, Most, Refused) ->
    Result = ?CB:call(Breaker,
                      fun() ->
                              ok = counters:add(Running, 1, 1),
                              Before = counters:get(Running, 1),
                              timer:sleep(rand:uniform(2)),
                              After = counters:get(Running, 1),
                              ok = counters:sub(Running, 1, 1),
                              case rand:uniform(20) of
                                  1 -> {error, max(Before, After)};
                                  _ -> {ok, max(Before, After)}
                              end
                      end,
                      infinity),
    case Result of
        {error, circuit_breaker_open} ->
            timer:sleep(1),
            probe(Breaker, Running, Times, Most, Refused + 1);
        {_, N} ->
            probe(Breaker, Running, Times - 1, max(N, Most), Refused)
    end.


stale_probes_keep_their_slots(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 3, probe_limit => 2, timeout => 1}),
    ok = ?CB:force_open(b),
    await_state(half_open, b),
    [First, Second] = [ blocked_call(b) || _ <- [1, 2] ],
    {error, x} = finish(First, {error, x}),
    await_state(half_open, b),
    % One is still running, of the half-open time before.
    Third = blocked_call(b),
    refused(b),
    {ok, 1} = finish(Second, {ok, 1}),
    {ok, #{consecutive_successes := 0, total_successes := 1}} = ?CB:get_stats(b),
    {ok, 2} = ?CB:call(b, fun() -> {ok, 2} end),
    {ok, 3} = finish(Third, {ok, 3}),
    {ok, #{state := half_open, consecutive_successes := 2}} = ?CB:get_stats(b).


killed_caller_is_a_failure(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    _ = [ begin
              Caller = blocked_call(b),
              exit(Caller, Reason)
          end || Reason <- [kill, crash, shutdown] ],
    await_state(open, b),
    {ok, #{total_failures := 3, total_successes := 0}} = ?CB:get_stats(b).


killed_probe_opens(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 1, timeout => 50}),
    ok = ?CB:force_open(b),
    await_state(half_open, b),
    _ = [ begin
              Caller = blocked_call(b),
              refused(b),
              exit(Caller, kill),
              await_state(open, b),
              % Its slot is free, or this would stay so for ever.
              await_state(half_open, b)
          end || _ <- lists:seq(1, 5) ],
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    {ok, #{state := closed, total_failures := 5}} = ?CB:get_stats(b).


%% Before, while, after they are in their fun: no slot and no monitor stays behind.
callers_killed_anywhere(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 1000000, probe_limit => 3, timeout => 1}),
    ok = ?CB:force_open(b),
    lists:foreach(fun(N) ->
                          Caller = spawn(fun() -> call_for_ever(b) end),
                          spin(N * 37 rem 20000),
                          exit(Caller, kill)
                  end,
                  lists:seq(1, 3000)),
    Pid = breaker_pid(b),
    % The keeper's is left.
    test_support:await(fun() -> {monitors, M} = process_info(Pid, monitors), length(M) =:= 1 end, ?DEADLINE_MS),
    await_state(half_open, b),
    Callers = [ blocked_call(b) || _ <- [1, 2, 3] ],
    refused(b),
    _ = [ {ok, 1} = finish(C, {ok, 1}) || C <- Callers ],
    {ok, #{total_failures := Failures}} = ?CB:get_stats(b),
    ?assert(Failures > 10).


call_for_ever(Breaker) ->
    _ = ?CB:call(Breaker, fun() -> spin(100) end),
    call_for_ever(Breaker).


stale_outcomes_do_not_count(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, success_threshold => 1, timeout => 1}),
    % A failure from before a reset.
    Reset = blocked_call(b),
    ok = ?CB:reset(b),
    {error, x} = finish(Reset, {error, x}),
    {ok, #{state := closed, consecutive_failures := 0, failure_rate := 0.0, last_failure_time := undefined}} =
        ?CB:get_stats(b),
    % A success and a failure from the closed state, in the half-open one.
    [Good, Bad] = [ blocked_call(b) || _ <- [1, 2] ],
    ok = ?CB:force_open(b),
    await_state(half_open, b),
    {ok, 1} = finish(Good, {ok, 1}),
    ?assertEqual(half_open, ?CB:get_state(b)),
    {error, x} = finish(Bad, {error, x}),
    ?assertEqual(half_open, ?CB:get_state(b)),
    % A probe, in the closed state.
    Probe = blocked_call(b),
    ok = ?CB:force_close(b),
    {error, x} = finish(Probe, {error, x}),
    ?assertEqual(closed, ?CB:get_state(b)),
    % The end of a caller of an earlier period.
    Killed = blocked_call(b),
    ok = ?CB:reset(b),
    exit(Killed, kill),
    test_support:await(fun() -> {ok, #{total_failures := N}} = ?CB:get_stats(b), N =:= 4 end, ?DEADLINE_MS),
    {ok, #{state := closed, consecutive_failures := 0, total_successes := 1}} = ?CB:get_stats(b).


%% Nothing is counted twice or not at all, and after the last command it does what was said.
force_and_reset_against_calls(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => 1}),
    Self = self(),
    Commander = spawn_link(fun() -> command_until_told(b, Self, 0) end),
    Counts = at_once(16,
                     fun(N) ->
                             lists:foldl(fun(Round, Acc) ->
                                                 Outcome = (N + Round) rem 3,
                                                 count_result(?CB:call(b, fun() -> outcome(Outcome) end), Acc)
                                         end,
                                         {0, 0, 0},
                                         lists:seq(1, 3000))
                     end),
    Commander ! {stop, Self},
    Commands = receive {commands, N} -> N end,
    ?assert(Commands > 100),
    {Good, Bad, Refused} = lists:foldl(fun({A, B, C}, {X, Y, Z}) -> {A + X, B + Y, C + Z} end, {0, 0, 0}, Counts),
    ?assertEqual(48000, Good + Bad + Refused),
    ?assert(lists:all(fun(C) -> C > 0 end, [Good, Bad, Refused])),
    {ok, Stats} = ?CB:get_stats(b),
    ?assertMatch(#{
                   total_calls := 48000,
                   total_successes := Good,
                   total_failures := Bad,
                   total_rejected := Refused
                  },
                 Stats),
    ok = ?CB:reset(b),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end).


command_until_told(Breaker, Parent, Commands) ->
    _ = case Commands rem 3 of
            0 ->
                ok = ?CB:force_open(Breaker),
                refused_or_probe(Breaker);
            1 ->
                ok = ?CB:reset(Breaker);
            2 ->
                ok = ?CB:force_close(Breaker)
        end,
    receive
        {stop, Parent} -> Parent ! {commands, Commands}
    after
        0 ->
            command_until_told(Breaker, Parent, Commands + 1)
    end.


%% The millisecond may be over.
refused_or_probe(Breaker) ->
    true = lists:member(?CB:get_state(Breaker), [open, half_open, closed]).


outcome(0) -> {error, x};
outcome(_) -> {ok, x}.


count_result({error, circuit_breaker_open}, {A, B, C}) -> {A, B, C + 1};
count_result({error, x}, {A, B, C}) -> {A, B + 1, C};
count_result({ok, x}, {A, B, C}) -> {A + 1, B, C}.


breaker_killed_under_callers(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    Callers = [ blocked_call(b) || _ <- lists:seq(1, 20) ],
    test_support:kill(breaker_pid(b)),
    % Who is in its fun gets the result, who comes later exits.
    _ = [ ?assertEqual({ok, C}, finish(C, {ok, C})) || C <- Callers ],
    ?assertExit({noproc, _}, ?CB:call(b, fun() -> error(ran) end)),
    % And the same who waits for its permission.
    ok = ?CB:register_breaker(b, #{}),
    Pid = breaker_pid(b),
    ok = sys:suspend(Pid),
    Waiting = spawn_monitor(fun() -> exit(try ?CB:call(b, fun() -> error(ran) end) catch exit:R -> R end) end),
    test_support:await(fun() -> {message_queue_len, 1} =:= process_info(Pid, message_queue_len) end, ?DEADLINE_MS),
    exit(Pid, kill),
    {Caller, Monitor} = Waiting,
    receive {'DOWN', Monitor, process, Caller, Reason} -> ?assertMatch({noproc, _}, Reason) end.


%% A call either returns what its fun returned, which ran once, or exits, and it did not run.
breaker_killed_at_any_moment(_Config) ->
    Ran = counters:new(1, []),
    Self = self(),
    Killer = spawn_link(fun() -> kill_until_told(b, Self) end),
    Returned = lists:sum(
                 at_once(8,
                         fun(_) ->
                                 length([ x || _ <- lists:seq(1, 3000), called(b, Ran) ])
                         end)),
    Killer ! {stop, Self},
    receive {killed, Times} -> ?assert(Times > 50) end,
    ?assert(Returned < 24000),
    ?assertEqual(Returned, counters:get(Ran, 1)).


called(Breaker, Ran) ->
    try ?CB:call(Breaker, fun() -> counters:add(Ran, 1, 1) end) of
        ok -> true
    catch
        exit:{noproc, _} ->
            erlang:yield(),
            false
    end.


kill_until_told(Breaker, Parent) -> kill_until_told(Breaker, Parent, 0).


kill_until_told(Breaker, Parent, Times) ->
    ok = ?CB:register_breaker(Breaker, #{}),
    spin(rand:uniform(20000)),
    test_support:kill(breaker_pid(Breaker)),
    receive
        {stop, Parent} -> Parent ! {killed, Times}
    after
        0 ->
            kill_until_told(Breaker, Parent, Times + 1)
    end.


breaker_survives_its_callers(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 100}),
    Pid = breaker_pid(b),
    Id = make_ref(),
    _ = [ Pid ! M
          || M <- [junk,
                   {timeout, make_ref(), half_open},
                   {timeout, make_ref(), {overdue, Id}},
                   {{down, Id}, make_ref(), process, self(), normal},
                   {'DOWN', make_ref(), process, self(), normal},
                   {'EXIT', self(), normal},
                   {Id, late}] ],
    _ = [ gen_server:cast(Pid, C)
          || C <- [junk, {conclude, Id, success}, {conclude, Id, junk}, {conclude, junk, failure}] ],
    _ = [ ?assertEqual({error, unknown_request}, gen_server:call(Pid, C))
          || C <- [junk,
                   {permit, junk, 5},
                   {permit, Id, -1},
                   {permit, Id, soon},
                   {permit, Id, 1 bsl 70}] ],
    ok = ?CB:force_open(b),
    Pid ! {timeout, make_ref(), half_open},
    ?assertEqual(open, ?CB:get_state(b)),
    ok = ?CB:reset(b),
    granted = gen_server:call(Pid, {permit, Id, infinity}),
    {error, unknown_request} = gen_server:call(Pid, {permit, Id, infinity}),
    ok = gen_server:cast(Pid, {conclude, Id, withdrawn}),
    % Links and exit signals.
    Linked = spawn(fun() ->
                           link(Pid),
                           ?CB:call(b, fun() -> exit(self(), kill) end)
                   end),
    test_support:await_end(Linked),
    _ = [ exit(Pid, R) || R <- [normal, shutdown, crash] ],
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    ?assertEqual(Pid, breaker_pid(b)),
    Counts = fun() ->
                     {ok, #{total_calls := Calls, total_failures := Failures}} = ?CB:get_stats(b),
                     {Calls, Failures}
             end,
    test_support:await_value({2, 1}, Counts, ?DEADLINE_MS),
    % The process that registered it may end.
    {Parent, Monitor} = spawn_monitor(fun() -> ok = ?CB:register_breaker(c, #{}), exit(crash) end),
    receive {'DOWN', Monitor, process, Parent, crash} -> ok end,
    ?assertEqual(closed, ?CB:get_state(c)).


one_name_registered_from_16_processes(_Config) ->
    lists:foreach(fun(Round) ->
                          Results = at_once(16, fun(N) -> {?CB:register_breaker({b, Round}, #{window_size => N}), N} end),
                          [Winner] = [ N || {ok, N} <- Results ],
                          ?assertEqual(15, length([ x || {{error, already_registered}, _} <- Results ])),
                          {ok, #{window_size := Winner}} = ?CB:get_stats({b, Round}),
                          ok = ?CB:unregister_breaker({b, Round})
                  end,
                  lists:seq(1, 200)).


%%% The metrics of the node's breaker


metrics(_Config) ->
    {ok, Pid} = ?CB:start_link(),
    ?assertMatch(#{total_requests := 0, total_errors := 0, p95_latency_ms := 0, error_rate_percent := 0.0},
                 erlmcp_circuit_breaker_metrics:read()),
    ok = sys:suspend(Pid),
    _ = at_once(16, fun(_) -> [ ok = ?CB:record_request(N, 10) || N <- lists:seq(1, 1000) ] end),
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
    % Never a message a request.
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


%% The process of that name is no named breaker, and a breaker may have its name.
state_is_kept_by_nobody_else(_Config) ->
    {ok, _} = ?CB:start_link(),
    ?assertExit({noproc, _}, ?CB:get_state(erlmcp_circuit_breaker)),
    ?assertEqual(#{}, ?CB:get_all_states()),
    ok = ?CB:register_breaker(erlmcp_circuit_breaker, #{}),
    ?assertEqual(closed, ?CB:get_state(erlmcp_circuit_breaker)),
    ok = ?CB:unregister_breaker(erlmcp_circuit_breaker),
    ?assert(is_pid(whereis(erlmcp_circuit_breaker))),
    ok = ?CB:stop().


%%% The breaker of the node


%% A breaker of the node that is quick to open and, after `TimeoutMs', to close.
node_breaker(TimeoutMs) ->
    ok = erlmcp_backpressure:set(circuit_breaker,
                                 #{
                                   failure_threshold => 3,
                                   window_ms => 500,
                                   success_threshold => 2,
                                   timeout_ms => TimeoutMs,
                                   probe_limit => 2
                                  }),
    ok = ?CB:reset(),
    ?assertEqual(closed, ?CB:get_state()).


fail_node(Times) ->
    _ = [ ok = ?CB:record_failure() || _ <- lists:seq(1, Times) ],
    ok.


node_opens_at_its_threshold(_Config) ->
    node_breaker(?HOUR),
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    %% A success while closed takes no failure back.
    ok = ?CB:record_error(some_id),
    ?assertEqual(open, ?CB:get_state()),
    ?assertEqual({ok, open}, ?CB:get_status()),
    ?assert(?CB:is_open()),
    ?assertNot(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    ok = ?CB:record_failure(),
    ?assertEqual(open, ?CB:get_state()).


node_forgets_old_failures(_Config) ->
    node_breaker(?HOUR),
    ok = fail_node(2),
    timer:sleep(550),
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()),
    ok = fail_node(1),
    ?assertEqual(open, ?CB:get_state()).


node_probes_and_closes(_Config) ->
    node_breaker(20),
    ok = fail_node(3),
    timer:sleep(25),
    %% Whether anybody has asked or not.
    ?assertEqual(half_open, ?CB:get_state()),
    ?assertEqual({ok, half_open}, ?CB:get_status()),
    ?assertNot(?CB:is_open()),
    %% Nobody was let through yet, so this is not the success of a probe.
    ok = ?CB:record_success(),
    ?assert(?CB:allow_test_request()),
    ?assertEqual(half_open, ?CB:get_state()),
    ?assertNot(?CB:is_open()),
    ok = ?CB:record_success(),
    ?assertEqual(half_open, ?CB:get_state()),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    ?assertEqual(closed, ?CB:get_state()),
    %% The failures that opened it do not count any more.
    ok = fail_node(2),
    ?assertEqual(closed, ?CB:get_state()).


node_opens_again_at_a_failure(_Config) ->
    node_breaker(300),
    ok = fail_node(3),
    timer:sleep(310),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_success(),
    ?assert(?CB:allow_test_request()),
    ok = ?CB:record_failure(),
    ?assertEqual(open, ?CB:get_state()),
    %% And its time begins anew.
    ?assertNot(?CB:allow_test_request()).


node_gives_out_no_more_probes_than_its_limit(_Config) ->
    node_breaker(1000),
    ok = ?CB:force_open(),
    timer:sleep(1010),
    Allowed = at_once(100, fun(_) -> ?CB:allow_test_request() end),
    ?assertEqual(2, length([ true || true <- Allowed ])).


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
    ?assertEqual([sent, sent_again], [ receive Message -> Message after 1000 -> none end || _ <- [1, 2] ]).


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
    ok = erlmcp_backpressure:set(circuit_breaker, off),
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
    %% The process has gone, and the breaker has not.
    ok = fail_node(2),
    ?assertEqual(open, ?CB:get_state()).


node_transitions_are_logged_once(_Config) ->
    node_breaker(30),
    ok = logger:set_primary_config(level, notice),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{pid => self()}}),
    _ = at_once(16, fun(_) -> fail_node(3) end),
    timer:sleep(35),
    _ = at_once(16, fun(_) -> ?CB:allow_test_request() end),
    _ = at_once(16, fun(_) -> ?CB:record_success() end),
    _ = [ ?CB:is_open() || _ <- lists:seq(1, 100) ],
    Events = [ receive {logged, #{meta := #{event := Event, domain := [erlmcp_native]}}} -> Event after 1000 -> none end
               || _ <- [1, 2, 3] ],
    ok = logger:remove_handler(?MODULE),
    ?assertEqual([circuit_closed, circuit_half_open, circuit_opened], lists:sort(Events)),
    receive {logged, _} = More -> ct:fail(More) after 0 -> ok end.


%%% The property


named_breaker_is_the_model(Config) ->
    ok = logger:set_primary_config(level, error),
    Seen = ets:new(seen, [public]),
    Histories = test_support:positive_integer("PROP_BREAKER", 1000),
    try proper:quickcheck(prop_circuit_breaker:prop_named(Seen),
                          [{numtests, Histories}, {start_size, 20}, {max_size, 120}, {max_shrinks, 200}, {to_file, user}]) of
        true -> ok;
        Failure -> ct:fail({Failure, proper:counterexample()})
    after
        ok = logger:set_primary_config(level, proplists:get_value(logger_level, Config))
    end,
    Unseen = [ L || L <- prop_circuit_breaker:labels(), not ets:member(Seen, L) ],
    ?assert(Unseen =:= [] orelse Histories < 1000, {unseen, Unseen}).


%%% Instruments


fail(Breaker, Times) ->
    _ = [ {error, failed} = ?CB:call(Breaker, fun() -> {error, failed} end) || _ <- lists:seq(1, Times) ],
    ok.


succeed(Breaker, Times) ->
    _ = [ {ok, done} = ?CB:call(Breaker, fun() -> {ok, done} end) || _ <- lists:seq(1, Times) ],
    ok.


refused(Breaker) ->
    ?assertEqual({error, circuit_breaker_open}, ?CB:call(Breaker, fun() -> error(ran) end)).


%% A process whose call is let through, and runs until `finish'.
blocked_call(Breaker) -> blocked_call(Breaker, infinity).


blocked_call(Breaker, Timeout) ->
    Parent = self(),
    Pid = spawn(fun() ->
                        Result = ?CB:call(Breaker,
                                          fun() ->
                                                  Parent ! {self(), runs},
                                                  receive {finish, Result} -> Result end
                                          end,
                                          Timeout),
                        Parent ! {self(), {result, Result}}
                end),
    receive {Pid, runs} -> Pid after ?DEADLINE_MS -> exit({not_let_through, Breaker}) end.


finish(Pid, Result) ->
    Pid ! {finish, Result},
    receive {Pid, {result, Returned}} -> Returned after ?DEADLINE_MS -> exit(deadline_passed) end.


breaker_pid(Breaker) ->
    case erlmcp_circuit_breaker_names:whereis_name(Breaker) of
        undefined -> undefined;
        Pid -> Pid
    end.


await_state(State, Breaker) ->
    test_support:await(fun() -> State =:= ?CB:get_state(Breaker) end, ?DEADLINE_MS).


%% Runs a fun in many processes that begin together, and returns what they returned.
at_once(Number, Fun) ->
    Parent = self(),
    Pids = [ spawn_link(fun() ->
                                receive go -> Parent ! {self(), Fun(N)} end
                        end) || N <- lists:seq(1, Number) ],
    _ = [ Pid ! go || Pid <- Pids ],
    [ receive {Pid, Result} -> Result end || Pid <- Pids ].


spin(0) -> ok;
spin(N) -> spin(N - 1).
