%%% Recovery of shards: which processes are notified of a manager's restart, how often, and the account of
%%% downtimes.
%%%
%%% The contract of erlmcp_shard_recovery: each subscriber is notified once of each recovery. Downtimes are
%%% measured; a downtime whose beginning was not observed is counted separately, with an upper bound. All this
%%% outlives the process itself and its supervisor.
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
     first_samples_that_find_another_sampler,
     subscriptions_survive_the_process,
     subscriptions_survive_the_supervisors,
     subscribing_needs_no_process,
     news_that_come_in_another_order,
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
    %% Waits for the first samples of all managers, because downtimes are measured only after one.
    ok = test_support:await_samplers(),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = ?M:unsubscribe(),
    _ = logger:remove_handler(?MODULE),
    _ = [ erlmcp_shard_registry:unregister_connection(Id)
          || Shard <- shards(), {Id, _} <- erlmcp_shard_registry:list_connections(Shard) ],
    application:unset_env(erlmcp_native, token_bucket),
    ok = erlmcp_native_config:configure(),
    _ = application:stop(erlmcp_native),
    ok.


%%% Subscriptions


a_killed_manager_is_told_once(_Config) ->
    ok = ?M:subscribe(),
    _ = [ begin
              Began = now_us(),
              New = kill_manager(Shard),
              {Shard, Ms} = told(),
              Elapsed = now_us() - Began,
              ?assertEqual(New, manager(Shard)),
              %% On a busy machine a downtime may be over before it is observed, and is an upper bound.
              #{count := Count, unobserved_count := Unobserved, unobserved_worst_us := Bound, down := []} = ?M:downtimes(),
              ?assertEqual(N, Count + Unobserved),
              ?assert(Ms >= 0 andalso Ms * 1000 =< max(Elapsed, Bound) + 1000, {Ms, Elapsed, Bound})
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
    %% One unsubscription cancels all subscriptions of the process.
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
    ok = told_nothing_more(),
    ?assertMatch([_], told_to(Other)).


subscribers_that_end(_Config) ->
    Other = subscriber(),
    ok = ?M:subscribe(Other),
    ?assertEqual([Other], subscribers()),
    exit(Other, kill),
    test_support:await(fun() -> subscribers() =:= [] end, ?DEADLINE_MS),
    %% The same holds if the process that knew the subscriber was killed.
    Third = subscriber(),
    ok = ?M:subscribe(Third),
    test_support:kill(whereis(?M)),
    test_support:await(fun() -> is_pid(whereis(?M)) end, ?DEADLINE_MS),
    exit(Third, kill),
    test_support:await(fun() -> subscribers() =:= [] end, ?DEADLINE_MS),
    %% Others are still notified.
    ok = ?M:subscribe(),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told().


subscribers_that_have_ended(_Config) ->
    {Pid, Monitor} = spawn_monitor(fun() -> ok end),
    receive {'DOWN', Monitor, process, Pid, _} -> ok end,
    ok = ?M:subscribe(Pid),
    test_support:await(fun() -> subscribers() =:= [] end, ?DEADLINE_MS).


not_running(_Config) ->
    ok = application:stop(erlmcp_native),
    ?assertEqual({error, not_running}, ?M:subscribe()),
    ?assertEqual({error, not_running}, ?M:subscribe(self())),
    ?assertEqual(ok, ?M:unsubscribe()),
    ?assertEqual(ok, ?M:unsubscribe(self())),
    ?assertEqual(no_downtimes(), ?M:downtimes()).


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
    ?assertEqual([], subscribers()).


%%% Downtimes


downtimes_are_those_that_there_were(_Config) ->
    ?assertEqual(no_downtimes(), ?M:downtimes()),
    ok = ?M:subscribe(),
    Bounds = [ begin
                   Before = now_us(),
                   ok = supervisor:terminate_child(erlmcp_shard_sup, Shard),
                   test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [Shard] end, ?DEADLINE_MS),
                   ok = test_support:sleep_until(now_us() + Ms * 1000),
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
    %% The observing process may be replaced meanwhile.
    test_support:kill(whereis(?M)),
    test_support:await(fun() -> is_pid(whereis(?M)) end, ?DEADLINE_MS),
    _ = [ {ok, _} = supervisor:restart_child(erlmcp_shard_sup, Shard) || Shard <- [40, ?SHARD] ],
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [] end, ?DEADLINE_MS),
    %% The beginning of these downtimes was observed.
    ?assertMatch(#{count := 2, unobserved_count := 0}, ?M:downtimes()).


all_managers_at_once(_Config) ->
    ok = ?M:subscribe(),
    test_support:kill(whereis(erlmcp_shard_sup)),
    Told = [ told() || _ <- shards() ],
    ?assertEqual(shards(), lists:sort([ Shard || {Shard, _} <- Told ])),
    ok = told_nothing_more(),
    #{count := Count, unobserved_count := Unobserved, down := []} = ?M:downtimes(),
    ?assertEqual(?SHARDS, Count + Unobserved).


%% There are as many notifications as downtimes, and none is missing. Every other manager is killed at any time,
%% also before its first sample; that extends the former downtime.
managers_killed_at_random(_Config) ->
    ok = ?M:subscribe(),
    Supervisors = [ whereis(Name) || Name <- [erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup] ],
    Killed = lists:append([ kill_at_random(N rem 2 =:= 0) || N <- lists:seq(1, 300) ]),
    settle(),
    Told = all_told(),
    #{count := Count, unobserved_count := Unobserved, worst_us := Worst, median_us := Median} = ?M:downtimes(),
    ct:pal("~b killed, ~b recovered, ~b unobserved; median ~b us, worst ~b us",
           [length(Killed), Count, Unobserved, Median, Worst]),
    ?assertEqual(Count + Unobserved, length(Told)),
    ?assertEqual(lists:usort([ Shard || {Shard, _} <- Killed ]), lists:usort([ Shard || {Shard, _} <- Told ])),
    ?assert(length(Told) =< length(Killed), {length(Told), length(Killed)}),
    %% The exit of a manager that was known to have sampled is a downtime of its own.
    OfKnown = length([ Shard || {Shard, true} <- Killed ]),
    ?assert(length(Told) >= OfKnown andalso OfKnown >= 150, {length(Told), OfKnown}),
    ?assertEqual(Supervisors, [ whereis(Name) || Name <- [erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup] ]),
    ?assert(Worst < 30_000_000, Worst).


%% The shard of the killed manager, and whether that manager was known to have sampled. Empty if there is no
%% manager at the moment.
kill_at_random(IsAwaited) ->
    Shard = rand:uniform(?SHARDS) - 1,
    _ = IsAwaited andalso test_support:await(fun() -> is_known(Shard, manager(Shard)) end, ?DEADLINE_MS),
    case manager(Shard) of
        undefined ->
            [];
        Pid ->
            IsKnown = is_known(Shard, Pid),
            _ = test_support:kill(Pid),
            [{Shard, IsKnown}]
    end.


%%% Without the process


killed_while_nobody_watches(_Config) ->
    ok = ?M:subscribe(),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, ?M),
    LastAlive = last_alive_us(),
    _ = [ kill_manager(Shard) || Shard <- [3, ?SHARD] ],
    test_support:await(fun() -> has_sampled(3) andalso has_sampled(?SHARD) end, ?DEADLINE_MS),
    ?assertMatch(#{count := 0, unobserved_count := 0}, ?M:downtimes()),
    %% Nothing runs that could report more later.
    ?assertEqual([], all_told()),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, ?M),
    ?assertEqual([3, ?SHARD], lists:sort([ element(1, told()) || _ <- [1, 2] ])),
    ok = told_nothing_more(),
    #{count := 0, worst_us := 0, mean_us := 0, unobserved_count := 2, unobserved_worst_us := Bound} = ?M:downtimes(),
    %% The bound counts from the last sign of life.
    ?assert(Bound > 0 andalso Bound =< now_us() - LastAlive, Bound),
    %% Downtimes that it observes again are measured again.
    ok = supervisor:terminate_child(erlmcp_shard_sup, 5),
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [5] end, ?DEADLINE_MS),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, 5),
    {5, _} = told(),
    ?assertMatch(#{count := 1, unobserved_count := 2}, ?M:downtimes()).


%% A restart that is noticed only when it is over was not observed from its beginning.
killed_while_the_watcher_stands_still(_Config) ->
    ok = ?M:subscribe(),
    ok = sys:suspend(?M),
    LastAlive = last_alive_us(),
    %% Its own signs of life wait in the mailbox as well, and are not current.
    test_support:await(fun() -> has_waiting(sign_of_life) end, ?DEADLINE_MS),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    Ended = now_us(),
    ok = test_support:sleep_until(Ended + 300_000),
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> has_sampled(?SHARD) end, ?DEADLINE_MS),
    After = now_us(),
    ok = sys:resume(?M),
    {?SHARD, Ms} = told(),
    ok = told_nothing_more(),
    #{count := Count, unobserved_count := Unobserved, unobserved_worst_us := Bound} = ?M:downtimes(),
    ?assertEqual({0, 1}, {Count, Unobserved}),
    %% The bound is not less than the downtime.
    ?assert(Bound >= 300_000 andalso Bound =< After - LastAlive, Bound),
    ?assert(Ms >= 300, Ms).


%% In whatever order they exit, each restart is notified, and counted either as observed or as unobserved. Each
%% round waits for that: two restarts of one shard that the observer notices at once count as one.
watcher_is_killed_too(_Config) ->
    ok = ?M:subscribe(),
    Rounds = 40,
    _ = [ begin
              Old = [ {Shard, manager(Shard)} || Shard <- lists:seq(Round, Round + 3) ],
              _ = [ exit(Pid, kill) || {_, Pid} <- Old ],
              killed = test_support:kill(whereis(?M)),
              HasSuccessor = fun({Shard, Pid}) -> manager(Shard) =/= Pid andalso has_sampled(Shard) end,
              test_support:await(fun() -> is_pid(whereis(?M)) andalso lists:all(HasSuccessor, Old) end, ?DEADLINE_MS),
              ok = settle()
          end || Round <- lists:seq(1, Rounds) ],
    Told = all_told(),
    #{count := Count, unobserved_count := Unobserved, unobserved_worst_us := Bound} = ?M:downtimes(),
    ct:pal("~b seen, ~b unobserved, at most ~b us; ~b messages", [Count, Unobserved, Bound, length(Told)]),
    ?assertEqual(4 * Rounds, Count + Unobserved),
    %% A notification that was in progress at the kill may arrive twice.
    ?assert(length(Told) >= 4 * Rounds, length(Told)),
    ?assert(length(Told) =< 4 * Rounds + Rounds, length(Told)).


%% There is one downtime, from the first exit to the first sample by any successor.
killed_again_before_the_first_sample(_Config) ->
    ok = ?M:subscribe(),
    Supervisor = whereis(erlmcp_shard_sup),
    Before = now_us(),
    ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
    test_support:await(fun() -> maps:get(down, ?M:downtimes()) =:= [?SHARD] end, ?DEADLINE_MS),
    ok = test_support:sleep_until(now_us() + 100_000),
    %% Most of these managers exit before their first sample.
    _ = [ begin
              {ok, Pid} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
              ok = supervisor:terminate_child(erlmcp_shard_sup, ?SHARD),
              ?assertNot(is_process_alive(Pid))
          end || _ <- lists:seq(1, 20) ],
    {ok, _} = supervisor:restart_child(erlmcp_shard_sup, ?SHARD),
    settle(),
    Told = all_told(),
    #{count := Count, unobserved_count := Unobserved, worst_us := Worst} = ?M:downtimes(),
    ?assertEqual(Count + Unobserved, length(Told)),
    ?assertEqual([?SHARD], lists:usort([ Shard || {Shard, _} <- Told ])),
    ?assert(Worst >= 100_000 andalso Worst =< now_us() - Before, Worst),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)).


%% The sampler of a killed manager may hold what the first sample of its successor needs. No message arrives
%% that would make the successor sample later, so it retries by itself.
first_samples_that_find_another_sampler(_Config) ->
    ok = ?M:subscribe(),
    Rounds = 20,
    Samplers = [ spawn_link(fun() -> sample_without_end(?SHARD) end) || _ <- lists:seq(1, 2) ],
    _ = [ begin
              _ = kill_manager(?SHARD),
              ?assertMatch({?SHARD, _}, told())
          end || _ <- lists:seq(1, Rounds) ],
    lists:foreach(fun test_support:stop/1, Samplers),
    ok = counted(Rounds).


sample_without_end(Shard) ->
    _ = erlmcp_nif:sample_take(Shard, false),
    receive
        stop -> ok
    after
        0 ->
            sample_without_end(Shard)
    end.


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


%% Subscriptions and unsubscriptions made without the process are in force when it runs again.
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
    ok = told_nothing_more(),
    ?assertEqual([], told_to(Other)),
    test_support:await(fun() -> subscribers() =:= [self()] end, ?DEADLINE_MS).


%% The first sample of a manager is reported after that of a later manager, or before its predecessor's exit.
news_that_come_in_another_order(_Config) ->
    ok = ?M:subscribe(),
    Old = manager(?SHARD),
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told(),
    settle(),
    ?M ! {first_sample, ?SHARD, Old, now_us()},
    settle(),
    ok = told_nothing_more(),
    ok = sys:suspend(?M),
    _ = kill_manager(?SHARD),
    test_support:await(fun() -> has_sampled(?SHARD) end, ?DEADLINE_MS),
    {Manager, Us} = erlmcp_shard_sampler:first_sample(?SHARD),
    %% Handled before the messages in the mailbox.
    _ = sys:replace_state(?M,
                          fun(State) ->
                                  {noreply, Next} = ?M:handle_info({first_sample, ?SHARD, Manager, Us}, State),
                                  Next
                          end),
    ok = sys:resume(?M),
    {?SHARD, _} = told(),
    settle(),
    ok = told_nothing_more(),
    #{count := Count, unobserved_count := Unobserved, down := []} = ?M:downtimes(),
    ?assertEqual(2, Count + Unobserved),
    %% The current manager is monitored.
    _ = kill_manager(?SHARD),
    {?SHARD, _} = told().


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
    whereis(erlmcp_shard_sampler:name(Shard)).


has_sampled(Shard) ->
    Manager = manager(Shard),
    case erlmcp_shard_sampler:first_sample(Shard) of
        {Manager, _Us} -> is_pid(Manager);
        _ -> false
    end.


%% Kills a manager and returns its successor.
kill_manager(Shard) ->
    Old = manager(Shard),
    true = is_pid(Old),
    exit(Old, kill),
    test_support:await(fun() -> manager(Shard) =/= Old andalso is_pid(manager(Shard)) end, ?DEADLINE_MS),
    manager(Shard).


subscribers() ->
    lists:append(ets:match(?M, {{subscriber, '$1'}})).


%% Waits until all changes of managers are known and notified.
settle() ->
    test_support:await(fun() ->
                               lists:all(fun(Shard) -> is_known(Shard, manager(Shard)) end, shards())
                       end,
                       ?DEADLINE_MS),
    _ = sys:get_state(?M),
    ok.


%% The manager is known to have sampled, and all earlier recoveries have been notified.
is_known(Shard, Manager) ->
    ets:lookup(?M, {shard, Shard}) =:= [{{shard, Shard}, Manager, up}].


last_alive_us() ->
    ets:lookup_element(?M, alive_us, 2).


%% Whether a message of this kind waits in the mailbox of the process.
has_waiting(Kind) ->
    {messages, Messages} = process_info(whereis(?M), messages),
    lists:any(fun(Message) -> is_tuple(Message) andalso element(1, Message) =:= Kind end, Messages).


%% Waits for `Number' downtimes, and until all of them are notified.
counted(Number) ->
    Counted = fun() ->
                      #{count := Count, unobserved_count := Unobserved} = ?M:downtimes(),
                      Count + Unobserved
              end,
    test_support:await_value(Number, Counted, ?DEADLINE_MS),
    settle().


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
    settle(),
    receive {erlmcp_shard_recovered, _, _} = More -> More after 0 -> ok end.


%% A process that keeps its notifications.
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
