%%% Named circuit breakers: names, options, processes, statistics and the operators' functions.
-module(named_breaker_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-define(CB,          erlmcp_circuit_breaker).
-define(S,           breaker_support).
-define(DEADLINE_MS, 20000).
-define(HOUR,        3600000).


suite() -> [{timetrap, {minutes, 5}}].


all() -> cases() ++ [without_the_library].


cases() ->
    [defaults,
     names_are_any_term,
     no_atom_is_made_of_a_name,
     a_name_is_taken_once,
     a_name_is_free_at_once,
     unknown_names_exit,
     pid_as_breaker,
     pid_as_name,
     long_names_are_refused,
     names_are_bounded,
     bad_options,
     options_as_lists,
     options_without_effect,
     no_foreign_names_are_used,
     process_of_a_breaker,
     breaker_of_a_map,
     breaker_ends_with_its_process,
     breaker_survives_its_callers,
     supervised_breaker_starts_anew,
     reset,
     force_open_and_close,
     force_half_open,
     force_on_the_same_state_changes_nothing,
     statistics,
     all_breakers,
     transitions_are_logged_once,
     transition_by_a_killed_caller_is_logged].


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
                   failure_rate := +0.0,
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
    Names = [a, <<"a">>, "a", 1, 1.0, {a, 1}, #{a => 1}, [], make_ref(), fun erlang:self/0, {via, a, b}, {global, c}],
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


%% Other processes may make some atoms meanwhile.
no_atom_is_made_of_a_name(_Config) ->
    ok = use(<<"warm up">>),
    Before = erlang:system_info(atom_count),
    _ = [ ok = use(<<"no atom ", (integer_to_binary(N))/binary>>) || N <- lists:seq(1, 1000) ],
    ?assert(erlang:system_info(atom_count) - Before < 100).


a_name_is_taken_once(_Config) ->
    {ok, Pid} = ?CB:start_link(b, #{failure_threshold => 3}),
    ?assertEqual({error, {already_started, Pid}}, ?CB:start_link(b)),
    ?assertEqual({error, {already_started, Pid}}, ?CB:start_link(b, #{})),
    ?assertEqual({error, already_registered}, ?CB:register_breaker(b, #{})),
    ?assertEqual({error, already_registered}, ?CB:register_breaker(b, #{}, self())),
    ?assertEqual(ok, ?CB:register_breaker(c, #{}, undefined)),
    ?assertEqual({error, already_registered}, ?CB:register_breaker(c, #{})),
    % The breaker has no process, and its name is free as a local name.
    ?assertEqual({error, already_registered}, ?CB:start_link(c)),
    ?assertEqual(undefined, whereis(c)),
    {ok, Other} = ?CB:start_link({a, tuple}),
    ?assertEqual({error, {already_started, Other}}, ?CB:start_link({a, tuple})),
    % The first breaker is unchanged.
    {ok, #{failure_threshold := 3}} = ?CB:get_stats(b),
    ?assertEqual([], test_support:flush()).


a_name_is_free_at_once(_Config) ->
    lists:foreach(
      fun(N) ->
              case N rem 4 of
                  0 ->
                      ok = ?CB:register_breaker(b, #{window_size => N}),
                      {ok, #{window_size := N}} = ?CB:get_stats(b),
                      ok = ?CB:unregister_breaker(b);
                  1 ->
                      ok = ?CB:register_breaker(b, #{window_size => N}),
                      ok = ?CB:stop(b);
                  2 ->
                      {ok, _} = ?CB:start_link(b, #{window_size => N}),
                      {ok, #{window_size := N}} = ?CB:get_stats(b),
                      ok = ?CB:stop(b);
                  3 ->
                      {ok, Pid} = ?CB:start_link(b, #{window_size => N}),
                      test_support:kill(Pid)
              end,
              ?assertExit({noproc, _}, ?CB:get_state(b)),
              ?assertEqual(#{}, ?CB:get_all_states())
      end,
      lists:seq(1, 400)),
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
              ?assertExit({noproc, {?CB, reset, [Name]}}, ?CB:reset(Name)),
              ?assertExit({noproc, {?CB, force_open, [Name]}}, ?CB:force_open(Name)),
              ?assertExit({noproc, {?CB, force_close, [Name]}}, ?CB:force_close(Name)),
              ?assertExit({noproc, {?CB, force_half_open, [Name]}}, ?CB:force_half_open(Name)),
              ?assertExit({noproc, _}, ?CB:stop(Name)),
              ?assertEqual(ok, ?CB:unregister_breaker(Name))
          end || Name <- [nobody, {no, body}, <<"nobody">>, Dead] ].


pid_as_breaker(_Config) ->
    {ok, Pid} = ?CB:start_link(b, #{failure_threshold => 2, timeout => ?HOUR}),
    {ok, 1} = ?CB:call(Pid, fun() -> {ok, 1} end),
    ?S:fail(Pid, 2),
    ?assertEqual(open, ?CB:get_state(Pid)),
    ?assertEqual({error, circuit_breaker_open}, ?CB:call(Pid, fun() -> error(ran) end)),
    ?assertEqual(fallback, ?CB:call_with_fallback(Pid, fun() -> error(ran) end, fun() -> fallback end)),
    ?assertEqual(ok, ?CB:reset(Pid)),
    ?assertEqual(ok, ?CB:force_open(Pid)),
    ?assertEqual(ok, ?CB:force_close(Pid)),
    {ok, #{name := b, state := closed, total_rejected := 2}} = ?CB:get_stats(Pid),
    ?assertEqual(ok, ?CB:stop(Pid)),
    ?assertExit({noproc, _}, ?CB:get_state(Pid)).


%% For example a breaker of a connection.
pid_as_name(_Config) ->
    {ok, Other} = ?CB:start_link(other),
    ok = ?CB:register_breaker(self(), #{}),
    ok = ?CB:register_breaker(Other, #{}),
    ?assertEqual({ok, 1}, ?CB:call(self(), fun() -> {ok, 1} end)),
    {ok, #{name := Other}} = ?CB:get_stats(Other),
    {ok, #{name := other}} = ?CB:get_stats(other).


%% A refused name costs no more than an accepted one.
long_names_are_refused(_Config) ->
    Long = binary:copy(<<"x">>, 1025),
    ?assertEqual(ok, ?CB:register_breaker(binary:part(Long, 0, 1000), #{})),
    _ = [ begin
              ?assertEqual({error, name_too_long}, ?CB:register_breaker(Name, #{})),
              ?assertEqual({error, name_too_long}, ?CB:start_link(Name)),
              ?assertExit({noproc, _}, ?CB:call(Name, fun() -> error(ran) end)),
              ?assertExit({noproc, _}, ?CB:get_state(Name))
          end || Name <- [Long, lists:seq(1, 100_000), {list_to_tuple(lists:seq(1, 1000))}, binary:copy(<<0>>, 10_000_000)] ],
    ?assertMatch({error, {bad_option, config, _, _}},
                 ?CB:register_breaker(b, #{priority_level => lists:seq(1, 10_000)})),
    ?assertEqual([], test_support:flush()).


%% The number of names is bounded, since names may come from input.
names_are_bounded(_Config) ->
    Registered = register_until_full(0),
    ?assertEqual(100_000, Registered),
    ?assertEqual({error, too_many_breakers}, ?CB:register_breaker(one_more, #{})),
    ?assertEqual({error, too_many_breakers}, ?CB:start_link(one_more)),
    ok = ?CB:unregister_breaker({bounded, 0}),
    ?assertEqual(ok, ?CB:register_breaker(one_more, #{})),
    ok = ?CB:unregister_breaker(one_more),
    ?assertEqual(99_999, maps:size(?CB:get_all_states())).


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
    _ = [ begin
              Error = {error, {bad_option, config, V, "a map, a property list or a keyword list"}},
              ?assertEqual(Error, ?CB:start_link(b, V)),
              ?assertEqual(Error, ?CB:register_breaker(b, V))
          end || V <- [[{timeout}], [{timeout, 5} | improper], undefined, 5] ],
    ?assertMatch({error, {bad_option, timeout, 0, _}}, ?CB:register_breaker(b, [{timeout, 0}])),
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


options_as_lists(_Config) ->
    ok = ?CB:register_breaker(b, [{timeout, 5}, {probe_limit, 2}, {timeout, 6}]),
    ?assertMatch({ok, #{timeout := 5, config := #{timeout := 5, probe_limit := 2}}}, ?CB:get_stats(b)),
    {ok, Pid} = ?CB:start_link(c, [{window_size, 7}]),
    ?assertMatch({ok, #{config := #{window_size := 7}}}, ?CB:get_stats(c)),
    ok = ?CB:register_breaker(d, []),
    [ ok = ?CB:stop(Breaker) || Breaker <- [b, Pid, d] ].


options_without_effect(_Config) ->
    ok = ?CB:register_breaker(b, #{priority_level => high, reset_timeout => infinity}),
    {ok, #{config := #{priority_level := high, reset_timeout := infinity}}} = ?CB:get_stats(b).


no_foreign_names_are_used(_Config) ->
    ok = ?CB:register_breaker(b, #{}),
    ?assertEqual(undefined, whereis(erlmcp_circuit_breaker)),
    ?assertEqual(undefined, whereis(b)),
    ?assertEqual(undefined, ets:whereis(erlmcp_circuit_breaker_registry)),
    ?assertNot(lists:keymember(erlmcp_native, 1, application:which_applications())).


process_of_a_breaker(_Config) ->
    {ok, Pid} = ?CB:start_link(local_breaker, #{failure_threshold => 1, timeout => ?HOUR}),
    ?assertEqual(Pid, whereis(local_breaker)),
    ?assertEqual(closed, gen_statem:call(local_breaker, get_state)),
    ?S:fail(local_breaker, 1),
    ?assertEqual(open, gen_statem:call(local_breaker, get_state)),
    ?assertEqual(?CB:get_stats(local_breaker), gen_statem:call(Pid, get_stats)),
    ?assertEqual({error, unknown_request}, gen_server:call(Pid, junk)),
    ?assertEqual(ok, gen_server:cast(Pid, junk)),
    ?assertEqual(ok, ?CB:stop(local_breaker)),
    ?assertEqual(undefined, whereis(local_breaker)),
    % A local name that another process has.
    true = register(taken, self()),
    Self = self(),
    ?assertEqual({error, {already_started, Self}}, ?CB:start_link(taken)),
    true = unregister(taken),
    % Other terms are not registered as local names.
    Registered = registered(),
    {ok, _} = ?CB:start_link(<<"local_breaker">>),
    ?assertEqual([], registered() -- [erlmcp_circuit_breaker_pure | Registered]).


breaker_of_a_map(_Config) ->
    {ok, One} = ?CB:start_link(#{failure_threshold => 7}),
    {ok, Other} = ?CB:start_link(#{failure_threshold => 8}),
    {ok, #{failure_threshold := 7, name := Name}} = ?CB:get_stats(One),
    {ok, #{failure_threshold := 8}} = ?CB:get_stats(Other),
    ?assertEqual({ok, 1}, ?CB:call(One, fun() -> {ok, 1} end)),
    {ok, #{total_calls := 1}} = ?CB:get_stats(Name),
    ?assertMatch({error, {bad_option, failure_threshold, 0, _}}, ?CB:start_link(#{failure_threshold => 0})).


breaker_ends_with_its_process(_Config) ->
    Self = self(),
    Starter = spawn(fun() ->
                            {ok, Pid} = ?CB:start_link(b),
                            ok = ?CB:register_breaker(c, #{}),
                            Self ! {started, Pid},
                            receive stop -> ok end
                    end),
    Process = receive {started, Pid} -> Pid end,
    Monitor = monitor(process, Process),
    ?assertEqual(closed, ?CB:get_state(b)),
    exit(Starter, shutdown),
    receive {'DOWN', Monitor, process, Process, shutdown} -> ok end,
    ?assertExit({noproc, _}, ?CB:get_state(b)),
    ?assertExit({noproc, _}, ?CB:get_state(Process)),
    % This breaker belongs to no process.
    ?assertEqual(#{c => closed}, ?CB:get_all_states()).


breaker_survives_its_callers(_Config) ->
    {ok, Pid} = ?CB:start_link(b, #{failure_threshold => 100}),
    _ = [ Pid ! M || M <- [junk, {timeout, make_ref(), half_open}, {make_ref(), late}] ],
    % Links and exit signals do not stop the breaker.
    Linked = spawn(fun() ->
                           link(Pid),
                           ?CB:call(b, fun() -> exit(self(), kill) end)
                   end),
    test_support:await_end(Linked),
    _ = spawn(fun() -> _ = [ exit(Pid, R) || R <- [normal, shutdown, crash] ] end),
    Counts = fun() ->
                     {ok, #{total_calls := Calls, total_failures := Failures}} = ?CB:get_stats(b),
                     {Calls, Failures}
             end,
    test_support:await_value({1, 1}, Counts, ?DEADLINE_MS),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    ?assertEqual(closed, gen_statem:call(Pid, get_state)),
    % The process that registered a breaker may exit.
    {Parent, Monitor} = spawn_monitor(fun() -> ok = ?CB:register_breaker(c, #{}), exit(crash) end),
    receive {'DOWN', Monitor, process, Parent, crash} -> ok end,
    ?assertEqual(closed, ?CB:get_state(c)).


supervised_breaker_starts_anew(_Config) ->
    Child = #{id => b, start => {?CB, start_link, [b, #{failure_threshold => 1, timeout => ?HOUR}]}},
    {ok, Supervisor} = supervisor:start_link(?MODULE, [Child]),
    ?S:fail(b, 1),
    ?S:refused(b),
    Old = whereis(b),
    test_support:kill(Old),
    test_support:await(fun() -> is_pid(whereis(b)) andalso #{b => closed} =:= ?CB:get_all_states() end, ?DEADLINE_MS),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    ok = gen_server:stop(Supervisor),
    ?assertExit({noproc, _}, ?CB:get_state(b)).


reset(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 2, timeout => ?HOUR}),
    ?S:succeed(b, 1),
    ?S:fail(b, 2),
    ?S:refused(b),
    ?assertEqual(ok, ?CB:reset(b)),
    {ok, #{
           state := closed,
           consecutive_failures := 0,
           consecutive_successes := 0,
           failure_rate := +0.0,
           last_failure_time := undefined,
           total_calls := 4,
           total_successes := 1,
           total_failures := 2,
           total_rejected := 1
          }} = ?CB:get_stats(b),
    ?assertEqual({ok, 1}, ?CB:call(b, fun() -> {ok, 1} end)),
    % In the closed state reset/1 discards the failures so far.
    ?S:fail(b, 1),
    ok = ?CB:reset(b),
    ?S:fail(b, 1),
    ?assertEqual(closed, ?CB:get_state(b)),
    ?S:fail(b, 1),
    ?assertEqual(open, ?CB:get_state(b)).


force_open_and_close(_Config) ->
    ok = ?CB:register_breaker(b, #{timeout => 50}),
    ok = ?CB:register_breaker(c, #{timeout => ?HOUR}),
    ?assertEqual(ok, ?CB:force_open(b)),
    ?assertEqual(ok, ?CB:force_open(c)),
    ?S:refused(c),
    % A forced opening lasts as long as an ordinary one.
    ?S:await_state(half_open, b),
    ?assertEqual(ok, ?CB:force_half_open(c)),
    ?assertEqual(ok, ?CB:open(c, some_reason)),
    ?S:refused(c),
    ?assertEqual(ok, ?CB:force_close(c)),
    ?assertEqual({ok, 1}, ?CB:call(c, fun() -> {ok, 1} end)),
    ?assertEqual(ok, ?CB:force_close(b)),
    % It stays closed for longer than another breaker with the same timeout is open.
    ok = ?CB:register_breaker(d, #{timeout => 50}),
    ok = ?CB:force_open(d),
    ?S:await_state(half_open, d),
    ?assertEqual(closed, ?CB:get_state(b)).


force_half_open(_Config) ->
    ok = ?CB:register_breaker(b, #{timeout => ?HOUR}),
    ok = ?CB:force_half_open(b),
    ?assertEqual(closed, ?CB:get_state(b)),
    ok = ?CB:force_open(b),
    ok = ?CB:force_half_open(b),
    ?assertEqual(half_open, ?CB:get_state(b)),
    ok = ?CB:force_half_open(b),
    ?S:succeed(b, 2),
    ?assertEqual(closed, ?CB:get_state(b)).


force_on_the_same_state_changes_nothing(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    ?S:fail(b, 2),
    {ok, Closed} = ?CB:get_stats(b),
    ok = next_millisecond(),
    ok = ?CB:force_close(b),
    ?assertEqual({ok, Closed}, ?CB:get_stats(b)),
    ?S:fail(b, 1),
    {ok, Open} = ?CB:get_stats(b),
    ok = next_millisecond(),
    ok = ?CB:force_open(b),
    % The timeout counts from last_state_change, and is not prolonged.
    ?assertEqual({ok, Open}, ?CB:get_stats(b)).


%% A later change has another timestamp.
next_millisecond() ->
    Now = erlang:monotonic_time(millisecond),
    test_support:await(fun() -> erlang:monotonic_time(millisecond) > Now end).


statistics(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    Started = erlang:monotonic_time(millisecond),
    ?S:succeed(b, 3),
    ?S:fail(b, 1),
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
    ?assert(maps:get(last_failure_time, Stats) =< erlang:monotonic_time(millisecond)),
    ?assert(maps:get(last_state_change, Stats) =< Started),
    ok = test_support:sleep_until((Started + 5) * 1000),
    ?S:fail(b, 2),
    ?S:refused(b),
    {ok, Opened} = ?CB:get_stats(b),
    ?assertMatch(#{consecutive_failures := 3, total_calls := 7, total_rejected := 1}, Opened),
    ?assert(maps:get(last_state_change, Opened) >= Started + 5),
    ?assertMatch(#{priority_messages_delivered := 0, priority_latency_us := 0}, Opened),
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
                             priority_messages_delivered,
                             priority_latency_us,
                             config,
                             failure_threshold,
                             success_threshold,
                             timeout,
                             window_size,
                             failure_rate_threshold,
                             probe_limit,
                             priority_level]),
                 lists:sort(maps:keys(Opened))).


all_breakers(_Config) ->
    ?assertEqual(#{}, ?CB:get_all_states()),
    ?assertEqual(#{}, ?CB:get_all_stats()),
    ?assertEqual(ok, ?CB:reset_all()),
    {ok, _} = ?CB:start_link(a, #{failure_threshold => 1, timeout => ?HOUR}),
    ok = ?CB:register_breaker(b, #{}),
    ?S:fail(a, 1),
    ?assertEqual(#{a => open, b => closed}, ?CB:get_all_states()),
    ?assertMatch(#{a := #{name := a, total_failures := 1}, b := #{name := b}}, ?CB:get_all_stats()),
    ?assertEqual(ok, ?CB:reset_all()),
    ?assertEqual(#{a => closed, b => closed}, ?CB:get_all_states()),
    ok = ?CB:stop(a).


transitions_are_logged_once(_Config) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, info),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{pid => self()}}),
    try
        ok = ?CB:register_breaker({log, 1}, #{failure_threshold => 2, timeout => ?HOUR}),
        ?S:fail({log, 1}, 2),
        _ = [ ?S:refused({log, 1}) || _ <- lists:seq(1, 50) ],
        ok = ?CB:force_half_open({log, 1}),
        ?S:succeed({log, 1}, 2),
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
                     logged({log, 1}))
    after
        ok = logger:remove_handler(?MODULE),
        ok = logger:set_primary_config(level, Level)
    end.


%% The next caller logs the transition, even if it makes another one.
transition_by_a_killed_caller_is_logged(_Config) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, info),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{pid => self()}}),
    try
        {ok, Pid} = ?CB:start_link({log, 2}, #{failure_threshold => 1, timeout => 1}),
        Caller = ?S:blocked_call(Pid),
        test_support:kill(Caller),
        ?S:await_state(half_open, Pid),
        ?assertEqual([{warning, circuit_opened}, {notice, circuit_half_open}], logged({log, 2}))
    after
        ok = logger:remove_handler(?MODULE),
        ok = logger:set_primary_config(level, Level)
    end.


use(Name) ->
    ok = ?CB:register_breaker(Name, #{}),
    {ok, 1} = ?CB:call(Name, fun() -> {ok, 1} end),
    {ok, _} = ?CB:get_stats(Name),
    ?CB:unregister_breaker(Name).


register_until_full(N) ->
    case ?CB:register_breaker({bounded, N}, #{}) of
        ok -> register_until_full(N + 1);
        {error, too_many_breakers} -> N
    end.


logged(Name) ->
    [ {Level, Event}
      || {logged, #{level := Level, msg := {report, #{event := Event, breaker := {name, Logged}}}}} <- test_support:flush(),
         Logged =:= Name ].


%% Logger handler
log(Event, #{config := #{pid := Pid}}) ->
    Pid ! {logged, Event}.


%% Supervisor callback
init(Children) -> {ok, {#{}, Children}}.
