%%% Recovery of shards: who is told of a manager's restart, how often, and what is kept account of.
%%%
%%% The contract of erlmcp_shard_recovery: each subscriber is told once of each recovery, after the
%%% shard's entries were checked; the downtimes are those that there were, measured, or given as an upper
%%% bound and counted apart where nobody has seen them begin; and all that outlives the process itself
%%% and its supervisor.
-module(shard_recovery_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(M,           erlmcp_shard_recovery).
-define(SHARD,       17).
-define(SHARDS,      64).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [a_killed_manager_is_told_once,
     every_subscriber_is_told,
     subscribing_twice_is_once,
     unsubscribed_are_told_nothing,
     subscribers_that_end,
     subscribers_that_have_ended,
     not_running,
     subscriptions_end_with_the_application,
     wrong_arguments,
     downtimes_are_those_that_there_were,
     downtimes_begin_with_the_application,
     managers_that_cannot_start_are_down,
     all_managers_at_once,
     managers_killed_at_random,
     killed_while_nobody_watches,
     killed_while_the_watcher_stands_still,
     watcher_is_killed_too,
     killed_again_before_the_first_sample,
     subscriptions_survive_the_process,
     subscriptions_survive_the_supervisors,
     subscribing_needs_no_process,
     check,
     check_under_way_of_changes,
     damaged_is_looked_at_until_it_is_right,
     entries_of_the_ended_are_gone,
     routes_go_on].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:start(erlmcp_native),
    %% The first samples of all managers, since downtimes are measured from one on.
    test_support:await(fun() -> lists:all(fun has_sampled/1, shards()) end, ?DEADLINE_MS),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = ?M:unsubscribe(),
    _ = logger:remove_handler(?MODULE),
    _ = [ erlmcp_shard_registry:unregister_connection(Id)
          || Shard <- shards(), {Id, _} <- erlmcp_shard_registry:list_connections(Shard) ],
    application:unset_env(erlmcp_native, token_bucket),
    ok = erlmcp_backpressure:configure(),
    _ = application:stop(erlmcp_native),
    ok.


%%% Subscriptions


a_killed_manager_is_told_once(_Config) ->
    ok = ?M:subscribe(),
    _ = [ begin
              Began = now_us(),
              New = kill_manager(Shard),
              {Shard, Ms} = told(),
              ?assert(is_integer(Ms) andalso Ms >= 0 andalso Ms * 1000 =< now_us() - Began + 1000, Ms),
              ?assertEqual(New, manager(Shard)),
              %% On a busy machine one may be over before anybody can see it.
              #{count := Count, unobserved_count := Unobserved, down := []} = ?M:downtimes(),
              ?assertEqual(N, Count + Unobserved)
          end || {N, Shard} <- [{1, 0}, {2, ?SHARD}, {3, 63}, {4, ?SHARD}] ],
    ok = told_nothing_more().


every_subscriber_is_told(_Config) ->
    Others = [ subscriber() || _ <- [1, 2, 3] ],
    _ = [ ok = ?M:subscribe(Pid) || Pid <- Others ],
    ok = ?M:subscribe(),
    _ = kill_manager(?SHARD),
    {?SHARD, Ms} = told(),
    _ = [ ?assertEqual([{?SHARD, Ms}], await_told_to(Pid, 1)) || Pid <- Others ],
    ok = told_nothing_more(),
    _ = [ ?assertEqual([{?SHARD, Ms}], told_to(Pid)) || Pid <- Others ].


subscribing_twice_is_once(_Config) ->
    _ = [ ok = ?M:subscribe() || _ <- [1, 2, 3] ],
    ok = ?M:subscribe(self()),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    ok = told_nothing_more(),
    %% One unsubscription ends it.
    ok = ?M:unsubscribe(),
    _ = kill_manager(?SHARD),
    ok = counted(2),
    ok = told_nothing_more().


unsubscribed_are_told_nothing(_Config) ->
    Other = subscriber(),
    ?assertEqual(ok, ?M:unsubscribe()),
    ?assertEqual(ok, ?M:unsubscribe(Other)),
    ok = ?M:subscribe(Other),
    ok = ?M:subscribe(),
    ok = ?M:unsubscribe(),
    _ = kill_manager(?SHARD),
    [{?SHARD, _}] = await_told_to(Other, 1),
    ok = told_nothing_more(),
    ok = ?M:unsubscribe(Other),
    ok = ?M:subscribe(),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    ?assertMatch([_], told_to(Other)).


subscribers_that_end(_Config) ->
    Other = subscriber(),
    ok = ?M:subscribe(Other),
    ?assertEqual([Other], erlmcp_shard_recovery_records:subscribers()),
    exit(Other, kill),
    test_support:await(fun() -> erlmcp_shard_recovery_records:subscribers() =:= [] end, ?DEADLINE_MS),
    %% Also if the process that knew of them has ended.
    Third = subscriber(),
    ok = ?M:subscribe(Third),
    test_support:kill(whereis(?M)),
    test_support:await(fun() -> is_pid(whereis(?M)) end, ?DEADLINE_MS),
    exit(Third, kill),
    test_support:await(fun() -> erlmcp_shard_recovery_records:subscribers() =:= [] end, ?DEADLINE_MS),
    %% It goes on for others.
    ok = ?M:subscribe(),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told().


subscribers_that_have_ended(_Config) ->
    {Pid, Monitor} = spawn_monitor(fun() -> ok end),
    receive {'DOWN', Monitor, process, Pid, _} -> ok end,
    ok = ?M:subscribe(Pid),
    test_support:await(fun() -> erlmcp_shard_recovery_records:subscribers() =:= [] end, ?DEADLINE_MS).


not_running(_Config) ->
    ok = application:stop(erlmcp_native),
    ?assertEqual({error, not_running}, ?M:subscribe()),
    ?assertEqual({error, not_running}, ?M:subscribe(self())),
    ?assertEqual(ok, ?M:unsubscribe()),
    ?assertEqual(ok, ?M:unsubscribe(self())),
    ?assertEqual([], ?M:damaged()),
    ?assertEqual(no_downtimes(), ?M:downtimes()),
    ?assertEqual(ok, ?M:check(?SHARD)).


subscriptions_end_with_the_application(_Config) ->
    ok = ?M:subscribe(),
    ok = application:stop(erlmcp_native),
    ok = application:start(erlmcp_native),
    test_support:await(fun() -> lists:all(fun has_sampled/1, shards()) end, ?DEADLINE_MS),
    _ = kill_manager(?SHARD),
    ok = counted(1),
    ok = told_nothing_more().


wrong_arguments(_Config) ->
    _ = [ begin
              ?assertError(function_clause, ?M:subscribe(Wrong)),
              ?assertError(function_clause, ?M:unsubscribe(Wrong))
          end || Wrong <- [erlmcp_shard_recovery, "pid", make_ref(), 1, undefined] ],
    _ = [ ?assertError(badarg, ?M:check(Wrong)) || Wrong <- [-1, ?SHARDS, 1024, 1 bsl 64, 1.0, one, self(), default] ],
    ?assertEqual([], erlmcp_shard_recovery_records:subscribers()).


%%% Downtimes


downtimes_are_those_that_there_were(_Config) ->
    ?assertEqual(no_downtimes(), ?M:downtimes()),
    ok = ?M:subscribe(),
    Bounds = [ begin
                   Before = now_us(),
                   ok = supervisor:terminate_child(erlmcp_shard_sup, Shard),
                   test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [Shard] end, ?DEADLINE_MS),
                   timer:sleep(Ms),
                   Down = now_us(),
                   {ok, _} = supervisor:restart_child(erlmcp_shard_sup, Shard),
                   {Shard, ToldMs} = told(),
                   AtMost = now_us() - Before,
                   ?assert(ToldMs >= Ms, {ToldMs, Ms}),
                   ?assert(ToldMs * 1000 =< AtMost + 1000, {ToldMs, AtMost}),
                   {Ms * 1000, AtMost, Down - Before}
               end || {Shard, Ms} <- [{3, 150}, {?SHARD, 700}, {60, 20}] ],
    {AtLeast, AtMost, _} = lists:unzip3(Bounds),
    #{count := 3, mean_us := Mean, median_us := Median, worst_us := Worst, down := []} = Downtimes = ?M:downtimes(),
    ct:log("~p of ~p", [Downtimes, Bounds]),
    ?assertMatch(#{unobserved_count := 0, unobserved_worst_us := 0}, Downtimes),
    ?assert(Mean >= lists:sum(AtLeast) div 3 andalso Mean =< lists:sum(AtMost) div 3, Mean),
    ?assert(Median >= 150_000 andalso Median =< lists:nth(2, lists:sort(AtMost)), Median),
    ?assert(Worst >= 700_000 andalso Worst =< lists:max(AtMost), Worst).


downtimes_begin_with_the_application(_Config) ->
    _ = kill_manager(?SHARD),
    ok = counted(1),
    ok = application:stop(erlmcp_native),
    ?assertEqual(no_downtimes(), ?M:downtimes()),
    ok = application:start(erlmcp_native),
    ?assertEqual(no_downtimes(), ?M:downtimes()).


managers_that_cannot_start_are_down(_Config) ->
    _ = [ ok = supervisor:terminate_child(erlmcp_shard_sup, Shard) || Shard <- [40, ?SHARD] ],
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [?SHARD, 40] end, ?DEADLINE_MS),
    ?assertMatch(#{count := 0}, ?M:downtimes()),
    %% Who watches may be exchanged meanwhile.
    test_support:kill(whereis(?M)),
    test_support:await(fun() -> is_pid(whereis(?M)) end, ?DEADLINE_MS),
    _ = [ {ok, _} = supervisor:restart_child(erlmcp_shard_sup, Shard) || Shard <- [40, ?SHARD] ],
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [] end, ?DEADLINE_MS),
    %% Their beginning was seen.
    ?assertMatch(#{count := 2, unobserved_count := 0}, ?M:downtimes()).


all_managers_at_once(_Config) ->
    ok = ?M:subscribe(),
    test_support:kill(whereis(erlmcp_shard_sup)),
    Told = [ told() || _ <- shards() ],
    ?assertEqual(shards(), lists:sort([ Shard || {Shard, _} <- Told ])),
    ok = told_nothing_more(),
    #{count := Count, unobserved_count := Unobserved, down := []} = ?M:downtimes(),
    ?assertEqual(?SHARDS, Count + Unobserved).


%% Under load: as many messages as downtimes, and none missing.
managers_killed_at_random(_Config) ->
    ok = ?M:subscribe(),
    Supervisors = [ whereis(Name) || Name <- [erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup] ],
    Killed = lists:append([ begin
                                timer:sleep(10),
                                Shard = rand:uniform(?SHARDS) - 1,
                                [ begin exit(Pid, kill), Shard end || Pid <- [manager(Shard)], is_pid(Pid) ]
                            end || _ <- lists:seq(1, 300) ]),
    test_support:await(fun() -> lists:all(fun(Shard) -> is_pid(manager(Shard)) end, shards()) end, ?DEADLINE_MS),
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [] end, ?DEADLINE_MS),
    test_support:await(fun() -> erlmcp_shard_recovery_records:unchecked() =:= [] end, ?DEADLINE_MS),
    timer:sleep(300),
    Told = all_told(),
    #{count := Count, unobserved_count := Unobserved, worst_us := Worst, median_us := Median} = ?M:downtimes(),
    ct:pal("~b killed, ~b recovered, ~b unobserved; median ~b us, worst ~b us",
           [length(Killed), Count, Unobserved, Median, Worst]),
    ?assertEqual(Count + Unobserved, length(Told)),
    ?assertEqual(lists:usort(Killed), lists:usort([ Shard || {Shard, _} <- Told ])),
    %% Some are killed before they have sampled, and are one downtime.
    ?assert(length(Told) =< length(Killed), {length(Told), length(Killed)}),
    ?assert(length(Told) > length(Killed) div 2, {length(Told), length(Killed)}),
    ?assertEqual(Supervisors, [ whereis(Name) || Name <- [erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup] ]),
    ?assert(Worst < 30_000_000, Worst).


%%% Without the process


killed_while_nobody_watches(_Config) ->
    ok = ?M:subscribe(),
    Before = now_us(),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, ?M),
    _ = [ kill_manager(Shard) || Shard <- [3, ?SHARD] ],
    test_support:await(fun() -> has_sampled(3) andalso has_sampled(?SHARD) end, ?DEADLINE_MS),
    ?assertMatch(#{count := 0, unobserved_count := 0}, ?M:downtimes()),
    ok = told_nothing_more(),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, ?M),
    ?assertEqual([3, ?SHARD], lists:sort([ element(1, told()) || _ <- [1, 2] ])),
    ok = told_nothing_more(),
    #{count := 0, worst_us := 0, mean_us := 0, unobserved_count := 2, unobserved_worst_us := Bound} = ?M:downtimes(),
    %% From the last second in which it was there.
    ?assert(Bound > 0 andalso Bound =< now_us() - Before + 2_000_000, Bound),
    %% What it sees again, it measures again.
    ok = supervisor:terminate_child(erlmcp_shard_sup, 5),
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [5] end, ?DEADLINE_MS),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, 5),
    {5, _} = told(),
    ?assertMatch(#{count := 1, unobserved_count := 2}, ?M:downtimes()).


%% Restarts that it learns of when they are over are none that it has seen begin.
killed_while_the_watcher_stands_still(_Config) ->
    ok = ?M:subscribe(),
    ok = sys:suspend(?M),
    Before = now_us(),
    %% Its signs of life wait too, and are no signs of now.
    timer:sleep(1_100),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    timer:sleep(300),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> has_sampled(?SHARD) end, ?DEADLINE_MS),
    After = now_us(),
    ok = sys:resume(?M),
    {?SHARD, Ms} = told(),
    ok = told_nothing_more(),
    #{count := Count, unobserved_count := Unobserved, unobserved_worst_us := Bound} = ?M:downtimes(),
    ?assertEqual({0, 1}, {Count, Unobserved}),
    %% A bound is no less than what it bounds.
    ?assert(Bound >= 300_000 andalso Bound =< After - Before + 2_000_000, Bound),
    ?assert(Ms >= 300, Ms).


%% Whatever the order of their ends, each restart is told, and counted here or there.
watcher_is_killed_too(_Config) ->
    ok = ?M:subscribe(),
    Rounds = 40,
    _ = [ begin
              Old = [ {Shard, manager(Shard)} || Shard <- lists:seq(Round, Round + 3) ],
              _ = [ exit(Pid, kill) || {_, Pid} <- Old ],
              exit(whereis(?M), kill),
              HasSuccessor = fun({Shard, Pid}) -> manager(Shard) =/= Pid andalso has_sampled(Shard) end,
              test_support:await(fun() -> is_pid(whereis(?M)) andalso lists:all(HasSuccessor, Old) end, ?DEADLINE_MS),
              test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [] end, ?DEADLINE_MS)
          end || Round <- lists:seq(1, Rounds) ],
    test_support:await(fun() -> erlmcp_shard_recovery_records:unchecked() =:= [] end, ?DEADLINE_MS),
    timer:sleep(300),
    Told = all_told(),
    #{count := Count, unobserved_count := Unobserved, unobserved_worst_us := Bound} = ?M:downtimes(),
    ct:pal("~b seen, ~b unobserved, at most ~b us; ~b messages", [Count, Unobserved, Bound, length(Told)]),
    ?assertEqual(4 * Rounds, Count + Unobserved),
    %% One may come twice if it was being told of.
    ?assert(length(Told) >= 4 * Rounds, length(Told)),
    ?assert(length(Told) =< 4 * Rounds + Rounds, length(Told)).


%% One downtime, from the first end to the first sample of whoever takes one.
killed_again_before_the_first_sample(_Config) ->
    ok = ?M:subscribe(),
    Supervisor = whereis(erlmcp_shard_sup),
    Before = now_us(),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [?SHARD] end, ?DEADLINE_MS),
    timer:sleep(100),
    %% Most of them end before their first sample.
    _ = [ begin
              {ok, Pid} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
              ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
              ?assertNot(is_process_alive(Pid))
          end || _ <- lists:seq(1, 20) ],
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [] end, ?DEADLINE_MS),
    test_support:await(fun() -> erlmcp_shard_recovery_records:unchecked() =:= [] end, ?DEADLINE_MS),
    timer:sleep(300),
    Told = all_told(),
    #{count := Count, unobserved_count := Unobserved, worst_us := Worst} = ?M:downtimes(),
    ?assertEqual(Count + Unobserved, length(Told)),
    ?assertEqual([?SHARD], lists:usort([ Shard || {Shard, _} <- Told ])),
    ?assert(Worst >= 100_000 andalso Worst =< now_us() - Before, Worst),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)).


subscriptions_survive_the_process(_Config) ->
    ok = ?M:subscribe(),
    _ = [ begin
              test_support:kill(whereis(?M)),
              test_support:await(fun() -> is_pid(whereis(?M)) end, ?DEADLINE_MS),
              _ = kill_manager(?SHARD),
              ?assertMatch({?SHARD, _}, told())
          end || _ <- lists:seq(1, 10) ],
    ok = told_nothing_more().


subscriptions_survive_the_supervisors(_Config) ->
    ok = ?M:subscribe(),
    test_support:kill(whereis(erlmcp_control_plane_sup)),
    test_support:await(fun() -> is_pid(whereis(?M)) end, ?DEADLINE_MS),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    test_support:kill(whereis(erlmcp_shard_sup)),
    ?assertEqual(shards(), lists:sort([ element(1, told()) || _ <- shards() ])),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    ok = told_nothing_more().


%% What is subscribed and unsubscribed while it is not there counts when it is.
subscribing_needs_no_process(_Config) ->
    Other = subscriber(),
    ok = ?M:subscribe(Other),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, ?M),
    ok = ?M:subscribe(),
    ok = ?M:unsubscribe(Other),
    Third = subscriber(),
    ok = ?M:subscribe(Third),
    exit(Third, kill),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, ?M),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    ?assertEqual([], told_to(Other)),
    test_support:await(fun() -> erlmcp_shard_recovery_records:subscribers() =:= [self()] end, ?DEADLINE_MS).


%%% Checks


check(_Config) ->
    ?assertEqual([ ok || _ <- shards() ], [ ?M:check(Shard) || Shard <- shards() ]),
    _ = [ ok = erlmcp_shard_registry:register_connection({c, N}, self(), #{}) || N <- lists:seq(1, 5000) ],
    ?assertEqual([ ok || _ <- shards() ], [ ?M:check(Shard) || Shard <- shards() ]),
    ?assertEqual([], ?M:damaged()).


%% What comes and goes is no damage, however much of it.
check_under_way_of_changes(_Config) ->
    Changers = [ spawn_link(fun() -> change(K, 0) end) || K <- [1, 2, 3] ],
    End = now_us() + 3_000_000,
    Verdicts = check_until(End, []),
    ?assertEqual([ok], lists:usort(Verdicts)),
    _ = [ Pid ! {stop, self()} || Pid <- Changers ],
    Changes = lists:sum([ receive {stopped, Pid, N} -> N end || Pid <- Changers ]),
    ct:pal("~b checks, ~b changes", [length(Verdicts), Changes]),
    ?assert(length(Verdicts) > 50, length(Verdicts)),
    ?assert(Changes > 1000, Changes).


check_until(End, Verdicts) ->
    case now_us() < End of
        true -> check_until(End, [ ?M:check(Shard) || Shard <- [?SHARD, 18] ] ++ Verdicts);
        false -> Verdicts
    end.


%% Registers, and unregisters by a call or by the end of the process.
change(K, N) ->
    receive
        {stop, From} -> From ! {stopped, self(), N}
    after
        0 ->
            Pids = [ begin
                         Pid = spawn(fun() -> receive stop -> ok end end),
                         ok = erlmcp_shard_registry:register_connection({changing, K, I}, Pid, #{}),
                         Pid
                     end || I <- lists:seq(1, 100) ],
            _ = [ ok = erlmcp_shard_registry:unregister_connection({changing, K, I}) || I <- lists:seq(1, 100, 2) ],
            _ = [ exit(Pid, kill) || Pid <- Pids ],
            IsGone = fun(I) -> erlmcp_shard_registry:whereis_connection({changing, K, I}) =:= undefined end,
            test_support:await(fun() -> lists:all(IsGone, lists:seq(1, 100)) end, ?DEADLINE_MS),
            change(K, N + 200)
    end.


%% Injected, since nothing but a fault of native code makes one.
damaged_is_looked_at_until_it_is_right(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => all}),
    ok = ?M:subscribe(),
    true = erlmcp_shard_recovery_records:set_damaged(?SHARD),
    ?assertEqual([?SHARD], ?M:damaged()),
    test_support:kill(whereis(?M)),
    test_support:await(fun() -> ?M:damaged() =:= [] end, ?DEADLINE_MS),
    ?assertEqual([{notice, shard_repaired, ?SHARD}], logged()),
    %% That is no recovery,
    ok = told_nothing_more(),
    ?assertMatch(#{count := 0, unobserved_count := 0}, ?M:downtimes()),
    %% and one that comes meanwhile is told all the same.
    true = erlmcp_shard_recovery_records:set_damaged(?SHARD),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    ?assertEqual([], ?M:damaged()),
    ?assertEqual([{notice, shard_repaired, ?SHARD}], logged()),
    ok = told_nothing_more().


log(#{level := Level, meta := #{domain := [erlmcp_native | _], event := Event, shard_id := Shard}}, #{config := Pid}) ->
    Pid ! {logged, Level, Event, Shard};
log(_Event, _Config) ->
    ok.


logged() ->
    receive {logged, Level, Event, Shard} -> [{Level, Event, Shard} | logged()] after 0 -> [] end.


%% When a recovery is told, the shard has no entry of a process that has ended before.
entries_of_the_ended_are_gone(_Config) ->
    ok = ?M:subscribe(),
    _ = [ begin
              Pids = [ begin
                           Pid = spawn(fun() -> receive stop -> ok end end),
                           ok = erlmcp_shard_registry:register_connection({ending, Round, N}, Pid, #{}),
                           Pid
                       end || N <- lists:seq(1, 2000) ],
              _ = [ exit(Pid, kill) || Pid <- Pids ],
              Shard = rand:uniform(?SHARDS) - 1,
              _ = kill_manager(Shard),
              {Shard, _} = told(),
              ?assertEqual(0, erlmcp_shard_registry:count(Shard))
          end || Round <- lists:seq(1, 5) ],
    test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end, ?DEADLINE_MS).


routes_go_on(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    _ = [ ok = erlmcp_shard_manager:route_message(c, {n, N}) || N <- lists:seq(1, 1000) ],
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    test_support:kill(whereis(erlmcp_control_plane_sup)),
    _ = [ ok = erlmcp_shard_manager:route_message(c, {n, N}) || N <- lists:seq(1001, 2000) ],
    ?assertEqual(lists:seq(1, 2000), [ receive {n, N} -> N end || _ <- lists:seq(1, 2000) ]).


%%% Tools


shards() ->
    lists:seq(0, ?SHARDS - 1).


no_downtimes() ->
    #{
      count => 0,
      mean_us => 0,
      median_us => 0,
      worst_us => 0,
      unobserved_count => 0,
      unobserved_worst_us => 0,
      down => []
     }.


manager(Shard) ->
    whereis(erlmcp_backpressure:sampler(Shard)).


has_sampled(Shard) ->
    Manager = manager(Shard),
    case erlmcp_shard_stats:first_sample(Shard) of
        {Manager, _Us} -> is_pid(Manager);
        _ -> false
    end.


%% Returns its successor.
kill_manager(Shard) ->
    Old = manager(Shard),
    true = is_pid(Old),
    exit(Old, kill),
    test_support:await(fun() -> manager(Shard) =/= Old andalso is_pid(manager(Shard)) end, ?DEADLINE_MS),
    manager(Shard).


%% Downtimes, and all of them told.
counted(Number) ->
    Counted = fun() ->
                      #{count := Count, unobserved_count := Unobserved} = ?M:downtimes(),
                      Count + Unobserved
              end,
    test_support:await_value(Number, Counted, ?DEADLINE_MS),
    test_support:await(fun() -> erlmcp_shard_recovery_records:unchecked() =:= [] end, ?DEADLINE_MS),
    ok.


told() ->
    receive
        {erlmcp_shard_recovered, Shard, Ms} -> {Shard, Ms}
    after
        ?DEADLINE_MS ->
            nothing
    end.


all_told() ->
    receive {erlmcp_shard_recovered, Shard, Ms} -> [{Shard, Ms} | all_told()] after 0 -> [] end.


told_nothing_more() ->
    receive {erlmcp_shard_recovered, _, _} = More -> More after 200 -> ok end.


%% A process that keeps what it is told.
subscriber() ->
    spawn(fun() -> subscriber([]) end).


subscriber(Told) ->
    receive
        {erlmcp_shard_recovered, Shard, Ms} -> subscriber([{Shard, Ms} | Told]);
        {what, From} -> From ! {told, self(), lists:reverse(Told)}, subscriber(Told)
    end.


told_to(Pid) ->
    Pid ! {what, self()},
    receive {told, Pid, Told} -> Told end.


await_told_to(Pid, Number) ->
    test_support:await(fun() -> length(told_to(Pid)) >= Number end, ?DEADLINE_MS),
    told_to(Pid).


now_us() ->
    erlang:monotonic_time(microsecond).
