%%% Named circuit breakers: killed callers, stale outcomes and concurrent operations; and a property against a model of
%%% lists. PROP_BREAKER in the environment is the number of its histories.
-module(named_breaker_races_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-define(CB,          erlmcp_circuit_breaker).
-define(S,           breaker_support).
-define(DEADLINE_MS, 20000).
-define(HOUR,        3600000).


suite() -> [{timetrap, {minutes, 5}}].


all() -> cases() ++ [without_the_library].


cases() ->
    [probe_limit_under_100_callers,
     stale_probes_keep_their_slots,
     killed_caller_is_a_failure,
     killed_probe_opens,
     killed_in_nested_calls,
     callers_killed_anywhere,
     stale_outcomes_do_not_count,
     force_and_reset_against_calls,
     breaker_killed_under_callers,
     breaker_killed_at_any_moment,
     one_name_registered_from_16_processes,
     named_breaker_is_the_model].


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


probe_limit_under_100_callers(_Config) ->
    Limit = 5,
    Running = counters:new(1, []),
    ok = ?CB:register_breaker(b, #{success_threshold => 1000, probe_limit => Limit, timeout => 1}),
    ok = ?CB:force_open(b),
    Callers = test_support:at_once(100, fun(_) -> probe(b, Running, 20, 0, 0) end),
    {Most, Refused} = lists:unzip(Callers),
    ?assertEqual(Limit, lists:max(Most)),
    ?assert(lists:sum(Refused) > 1000),
    ?assertEqual(0, counters:get(Running, 1)),
    {ok, #{total_failures := Failures}} = ?CB:get_stats(b),
    % The breaker opened and became half open all the time.
    ?assert(Failures > 50).


stale_probes_keep_their_slots(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 3, probe_limit => 2, timeout => 1}),
    ok = ?CB:force_open(b),
    ?S:await_state(half_open, b),
    [First, Second] = [ ?S:blocked_call(b) || _ <- [1, 2] ],
    {error, x} = ?S:finish(First, {error, x}),
    ?S:await_state(half_open, b),
    % A probe of the previous half-open period is still running.
    Third = ?S:blocked_call(b),
    ?S:refused(b),
    {ok, 1} = ?S:finish(Second, {ok, 1}),
    {ok, #{consecutive_successes := 0, total_successes := 1}} = ?CB:get_stats(b),
    {ok, 2} = ?CB:call(b, fun() -> {ok, 2} end),
    {ok, 3} = ?S:finish(Third, {ok, 3}),
    {ok, #{state := half_open, consecutive_successes := 2}} = ?CB:get_stats(b).


killed_caller_is_a_failure(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => ?HOUR}),
    _ = [ begin
              Caller = ?S:blocked_call(b),
              exit(Caller, Reason)
          end || Reason <- [kill, crash, shutdown] ],
    ?S:await_state(open, b),
    {ok, #{total_failures := 3, total_successes := 0}} = ?CB:get_stats(b).


killed_probe_opens(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 1, timeout => ?HOUR}),
    ok = ?CB:force_open(b),
    _ = [ begin
              ok = ?CB:force_half_open(b),
              Caller = ?S:blocked_call(b),
              ?S:refused(b),
              exit(Caller, kill),
              % The probe's slot is free, or the breaker would stay half open for ever.
              ?S:await_state(open, b)
          end || _ <- lists:seq(1, 5) ],
    ok = ?CB:force_half_open(b),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end),
    {ok, #{state := closed, total_failures := 5}} = ?CB:get_stats(b).


%% Each call that the killed process was in is a failure of its own breaker.
killed_in_nested_calls(_Config) ->
    Names = [a, {b, 2}, <<"c">>],
    _ = [ ok = ?CB:register_breaker(Name, #{failure_threshold => 1, timeout => ?HOUR}) || Name <- Names ],
    Self = self(),
    Innermost = fun() -> Self ! runs, receive never -> ok end end,
    Nested = lists:foldl(fun(Name, Fun) -> fun() -> ?CB:call(Name, Fun) end end, Innermost, Names),
    Caller = spawn(Nested),
    receive runs -> ok end,
    ?assertEqual([closed, closed, closed], [ ?CB:get_state(Name) || Name <- Names ]),
    test_support:kill(Caller),
    _ = [ ?S:await_state(open, Name) || Name <- Names ],
    ok.


%% Callers are killed before, in or after their fun. No slot is lost.
callers_killed_anywhere(_Config) ->
    ok = ?CB:register_breaker(b, #{success_threshold => 1000000, probe_limit => 3, timeout => 1}),
    ok = ?CB:force_open(b),
    lists:foreach(fun(N) ->
                          Caller = spawn(fun() -> call_for_ever(b) end),
                          ?S:spin(N * 37 rem 20000),
                          exit(Caller, kill)
                  end,
                  lists:seq(1, 3000)),
    test_support:await(fun() -> all_run(b, 3) end, ?DEADLINE_MS),
    {ok, #{total_failures := Failures}} = ?CB:get_stats(b),
    ?assert(Failures > 10).


stale_outcomes_do_not_count(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 1, success_threshold => 1, timeout => 1}),
    % A failure of a call from before a reset.
    Reset = ?S:blocked_call(b),
    ok = ?CB:reset(b),
    {error, x} = ?S:finish(Reset, {error, x}),
    {ok, #{state := closed, consecutive_failures := 0, failure_rate := +0.0, last_failure_time := undefined}} =
        ?CB:get_stats(b),
    % A success and a failure of calls from the closed state, in the half-open state.
    [Good, Bad] = [ ?S:blocked_call(b) || _ <- [1, 2] ],
    ok = ?CB:force_open(b),
    ?S:await_state(half_open, b),
    {ok, 1} = ?S:finish(Good, {ok, 1}),
    ?assertEqual(half_open, ?CB:get_state(b)),
    {error, x} = ?S:finish(Bad, {error, x}),
    ?assertEqual(half_open, ?CB:get_state(b)),
    % The failure of a probe, in the closed state.
    Probe = ?S:blocked_call(b),
    ok = ?CB:force_close(b),
    {error, x} = ?S:finish(Probe, {error, x}),
    ?assertEqual(closed, ?CB:get_state(b)),
    % The exit of a caller of an earlier period.
    Killed = ?S:blocked_call(b),
    ok = ?CB:reset(b),
    exit(Killed, kill),
    test_support:await(fun() -> {ok, #{total_failures := N}} = ?CB:get_stats(b), N =:= 4 end, ?DEADLINE_MS),
    {ok, #{state := closed, consecutive_failures := 0, total_successes := 1}} = ?CB:get_stats(b).


%% Each call is counted once, and after the last command the breaker does what was commanded.
force_and_reset_against_calls(_Config) ->
    ok = ?CB:register_breaker(b, #{failure_threshold => 3, timeout => 1}),
    Commands = counters:new(1, []),
    Self = self(),
    Commander = spawn_link(fun() -> command_until_told(b, Self, Commands) end),
    Counts = test_support:at_once(16, fun(N) -> call_during(300, Commands, N, {0, 0, 0}) end),
    Commander ! {stop, Self},
    receive {stopped, Commander} -> ok end,
    {Good, Bad, Refused} = lists:foldl(fun({A, B, C}, {X, Y, Z}) -> {A + X, B + Y, C + Z} end, {0, 0, 0}, Counts),
    Calls = Good + Bad + Refused,
    {ok, Stats} = ?CB:get_stats(b),
    ?assertMatch(#{
                   total_calls := Calls,
                   total_successes := Good,
                   total_failures := Bad,
                   total_rejected := Refused
                  },
                 Stats),
    ok = ?CB:reset(b),
    {ok, 1} = ?CB:call(b, fun() -> {ok, 1} end).


%% Calls until so many commands were given and each result was seen.
call_during(Wanted, Commands, Round, {Good, Bad, Refused} = Counts) ->
    case counters:get(Commands, 1) >= Wanted andalso Good > 0 andalso Bad > 0 andalso Refused > 0 of
        true ->
            Counts;
        false ->
            Result = ?CB:call(b, fun() -> outcome(Round rem 3) end),
            call_during(Wanted, Commands, Round + 1, count_result(Result, Counts))
    end.


breaker_killed_under_callers(_Config) ->
    {ok, Pid} = ?CB:start_link(b),
    Callers = [ ?S:blocked_call(b) || _ <- lists:seq(1, 20) ],
    test_support:kill(Pid),
    % Callers in their funs get the results, and later callers exit.
    {ok, _} = ?CB:start_link(c),
    _ = [ ?assertEqual({ok, C}, ?S:finish(C, {ok, C})) || C <- Callers ],
    ?assertExit({noproc, _}, ?CB:call(b, fun() -> error(ran) end)),
    % Another breaker of the same name does not count calls that the first one let through.
    {ok, Second} = ?CB:start_link(b, #{failure_threshold => 1}),
    Caller = ?S:blocked_call(b),
    test_support:kill(Second),
    ok = ?CB:register_breaker(b, #{failure_threshold => 1}),
    ?assertEqual({error, x}, ?S:finish(Caller, {error, x})),
    {ok, #{state := closed, total_calls := 0}} = ?CB:get_stats(b).


%% A call either returns the result of its fun, which ran once, or exits without having run it.
breaker_killed_at_any_moment(_Config) ->
    Ran = counters:new(1, []),
    Kills = counters:new(1, []),
    Self = self(),
    Killer = spawn_link(fun() -> kill_until_told(b, Self, Kills) end),
    Counts = test_support:at_once(8, fun(_) -> call_until_killed(100, Kills, Ran, 0, 0) end),
    Killer ! {stop, Self},
    receive {stopped, Killer} -> ok end,
    ?assertEqual(lists:sum([ Returned || {Returned, _} <- Counts ]), counters:get(Ran, 1)).


%% Calls until so many breakers were killed, and some calls have returned and some have exited.
call_until_killed(Wanted, Kills, Ran, Returned, Exited) ->
    case counters:get(Kills, 1) >= Wanted andalso Returned > 0 andalso Exited > 0 of
        true ->
            {Returned, Exited};
        false ->
            case called(b, Ran) of
                true -> call_until_killed(Wanted, Kills, Ran, Returned + 1, Exited);
                false -> call_until_killed(Wanted, Kills, Ran, Returned, Exited + 1)
            end
    end.


one_name_registered_from_16_processes(_Config) ->
    lists:foreach(fun(Round) ->
                          Results = test_support:at_once(16, fun(N) -> {?CB:register_breaker({b, Round}, #{window_size => N}), N} end),
                          [Winner] = [ N || {ok, N} <- Results ],
                          ?assertEqual(15, length([ x || {{error, already_registered}, _} <- Results ])),
                          {ok, #{window_size := Winner}} = ?CB:get_stats({b, Round}),
                          ok = ?CB:unregister_breaker({b, Round})
                  end,
                  lists:seq(1, 200)).


named_breaker_is_the_model(_Config) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, error),
    Seen = ets:new(seen, [public]),
    Histories = test_support:positive_integer("PROP_BREAKER", 1000),
    try proper:quickcheck(prop_circuit_breaker:prop_named(Seen),
                          [{numtests, Histories}, {start_size, 20}, {max_size, 120}, {max_shrinks, 200}, {to_file, user}]) of
        true -> ok;
        Failure -> error({Failure, proper:counterexample()})
    after
        ok = logger:set_primary_config(level, Level)
    end,
    Unseen = [ L || L <- prop_circuit_breaker:labels(), not ets:member(Seen, L) ],
    ?assert(Unseen =:= [] orelse Histories < 1000, {unseen, Unseen}).


%% Calls until so many calls were let through. Returns the most calls that ran at the same time, and the refusals.
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


%% Whether so many calls and not one more can run at the same time.
all_run(Breaker, Times) ->
    Parent = self(),
    Callers = [ spawn(fun() ->
                              Result = ?CB:call(Breaker,
                                                fun() ->
                                                        Parent ! {self(), runs},
                                                        receive {finish, Result} -> Result end
                                                end,
                                                infinity),
                              Parent ! {self(), {result, Result}}
                      end) || _ <- lists:seq(1, Times) ],
    Running = [ Caller || Caller <- Callers, receive {Caller, What} -> What =:= runs end ],
    AllRun = length(Running) =:= Times,
    _ = AllRun andalso ?S:refused(Breaker),
    _ = [ {ok, 1} = ?S:finish(Caller, {ok, 1}) || Caller <- Running ],
    AllRun.


call_for_ever(Breaker) ->
    _ = ?CB:call(Breaker, fun() -> ?S:spin(100) end),
    call_for_ever(Breaker).


command_until_told(Breaker, Parent, Commands) ->
    _ = case counters:get(Commands, 1) rem 3 of
            0 ->
                ok = ?CB:force_open(Breaker),
                refused_or_probe(Breaker);
            1 ->
                ok = ?CB:reset(Breaker);
            2 ->
                ok = ?CB:force_close(Breaker)
        end,
    ok = counters:add(Commands, 1, 1),
    receive
        {stop, Parent} -> Parent ! {stopped, self()}
    after
        0 ->
            command_until_told(Breaker, Parent, Commands)
    end.


%% The timeout of one millisecond may be over.
refused_or_probe(Breaker) ->
    true = lists:member(?CB:get_state(Breaker), [open, half_open, closed]).


outcome(0) -> {error, x};
outcome(_) -> {ok, x}.


count_result({error, circuit_breaker_open}, {A, B, C}) -> {A, B, C + 1};
count_result({error, x}, {A, B, C}) -> {A, B + 1, C};
count_result({ok, x}, {A, B, C}) -> {A + 1, B, C}.


called(Breaker, Ran) ->
    try ?CB:call(Breaker, fun() -> counters:add(Ran, 1, 1) end) of
        ok -> true
    catch
        exit:{noproc, _} ->
            erlang:yield(),
            false
    end.


kill_until_told(Breaker, Parent, Kills) ->
    {ok, Pid} = ?CB:start_link(Breaker, #{}),
    ?S:spin(rand:uniform(20000)),
    test_support:kill(Pid),
    ok = counters:add(Kills, 1, 1),
    receive
        {stop, Parent} -> Parent ! {stopped, self()}
    after
        0 ->
            kill_until_told(Breaker, Parent, Kills)
    end.
