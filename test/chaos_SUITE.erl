%%% Processes of the application are killed again and again while messages are routed.
%%%
%%% The contract:
%%% Whatever is killed, an accepted message is delivered once and in the order of its sender. A message that was not
%%% accepted is not delivered. No registration and no binding is lost. Only killed processes are restarted. Afterwards
%%% the application is healthy.
%%%
%%% chaos_load makes the load and compares, when it stops, what was sent with what has arrived.
%%%
%%% CHAOS_SECONDS: how long each kind of process is killed, every 100 ms (5).
-module(chaos_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([managers_are_killed/1,
         manager_is_killed_before_it_has_recovered/1,
         control_plane_is_killed/1,
         managers_and_control_plane_are_killed/1,
         registry_process_is_killed/1,
         supervisors_are_killed/1,
         documented_rates_are_borne/1]).

-define(R,           erlmcp_registry).
-define(RECOVERY,    erlmcp_shard_recovery).
-define(DEADLINE_MS, 60_000).

-define(SHARDS,        64).
-define(KILL_MS,       100).
-define(CONTROL_PLANE,
        [erlmcp_shard_health, erlmcp_shard_recovery, erlmcp_shard_metrics, erlmcp_control_plane_sup]).


suite() ->
    [{timetrap, {seconds, 600 + 2 * seconds()}}].


all() ->
    [managers_are_killed,
     manager_is_killed_before_it_has_recovered,
     control_plane_is_killed,
     managers_and_control_plane_are_killed,
     registry_process_is_killed,
     supervisors_are_killed,
     documented_rates_are_borne].


%% Suppresses the supervisors' report of each restart.
init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, critical),
    [{logger_level, Level} | Config].


end_per_suite(Config) ->
    logger:set_primary_config(level, proplists:get_value(logger_level, Config)).


init_per_testcase(_Case, Config) ->
    ok = application:start(erlmcp_native),
    '100x' = erlmcp_rollout:get(),
    _ = erlmcp_nif:breaker_set(closed),
    is(0, fun() -> erlmcp_shard_registry:count() end),
    is(ok, fun erlmcp_native:health/0),
    Config.


end_per_testcase(_Case, _Config) ->
    ok = chaos_load:stop_host(),
    ok = application:stop(erlmcp_native),
    ok = erlmcp_native_config:configure_alone(),
    _ = erlmcp_nif:breaker_set(closed),
    lists:foreach(fun({Id, _}) -> ok = erlmcp_shard_registry:unregister_connection(Id) end, chaos_load:connections()).


%%% Shard managers


%% A manager is killed again only after the notification of its last recovery. So each kill has exactly one
%% notification.
managers_are_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = chaos_load:start(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup | ?CONTROL_PLANE]),
    #{count := 0, unobserved_count := 0} = ?RECOVERY:downtimes(),
    {Kills, {Managers0, Recovering, Told0}} = kill_until(fun(_State) -> true end, fun kill_a_manager/1, {managers(), #{}, []}),
    {Managers, Told} = await_recoveries(Managers0, Recovering, Told0),
    Sent = chaos_load:stop(Load),
    report("shard managers", Kills, Sent),
    ?assertEqual(Kills, length(Told)),
    %% There is no further notification, and nothing else was restarted: no other manager, and no killed one once more.
    ?assertEqual([], told()),
    ?assertEqual(Managers, managers()),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup | ?CONTROL_PLANE])),
    #{
      count := Count,
      unobserved_count := Unobserved,
      worst_us := WorstUs,
      unobserved_worst_us := WorstBoundUs,
      down := []
     } = ?RECOVERY:downtimes(),
    %% Some downtimes are over before erlmcp_shard_recovery is notified of their start.
    ?assertEqual(Kills, Count + Unobserved),
    ?assert(Unobserved * 4 < Kills, {Unobserved, Kills}),
    ?assert(WorstUs < 1_000_000, WorstUs),
    ?assertEqual((max(WorstUs, WorstBoundUs) + 999) div 1000, lists:max(Told)).


kill_a_manager({Managers0, Recovering0, Told0}) ->
    {Managers, Recovering, Told} = recovered(told(), Managers0, Recovering0, Told0),
    case maps:keys(maps:without(maps:keys(Recovering), Managers)) of
        [] ->
            {0, {Managers, Recovering, Told}};
        Ready ->
            Shard = one_of(Ready),
            Manager = maps:get(Shard, Managers),
            %% It was not restarted since.
            ?assertEqual(Manager, whereis(manager(Shard))),
            killed = test_support:kill(Manager),
            {1, {Managers, Recovering#{Shard => Manager}, Told}}
    end.


recovered([], Managers, Recovering, Told) ->
    {Managers, Recovering, Told};
recovered([{Shard, Ms} | Others], Managers, Recovering0, Told) ->
    {Former, Recovering} = maps:take(Shard, Recovering0),
    Manager = whereis(manager(Shard)),
    ?assert(is_pid(Manager)),
    ?assertNotEqual(Former, Manager),
    recovered(Others, Managers#{Shard => Manager}, Recovering, [Ms | Told]).


await_recoveries(Managers, Recovering, Told) when map_size(Recovering) =:= 0 ->
    {Managers, Told};
await_recoveries(Managers0, Recovering0, Told0) ->
    receive
        {erlmcp_shard_recovered, Shard, Ms} ->
            {Managers, Recovering, Told} = recovered([{Shard, Ms}], Managers0, Recovering0, Told0),
            await_recoveries(Managers, Recovering, Told)
    after
        ?DEADLINE_MS ->
            error({not_told, Recovering0})
    end.


%% Consecutive kills make one downtime if each manager in between was killed before its first sample. Each downtime has
%% exactly one notification.
manager_is_killed_before_it_has_recovered(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Supervisor = whereis(erlmcp_shard_sup),
    Rounds = 50,
    InARow = 4,
    Told = [ begin
                 Shard = rand:uniform(?SHARDS) - 1,
                 Before = all_downtimes(),
                 ok = kill_in_a_row(manager(Shard), InARow),
                 Manager = live(manager(Shard)),
                 is([{{shard, Shard}, Manager, up}], fun() -> ets:lookup(?RECOVERY, {shard, Shard}) end),
                 After = all_downtimes(),
                 ?assert(After - Before >= 1 andalso After - Before =< InARow, {Before, After}),
                 [ receive {erlmcp_shard_recovered, Shard, Ms} -> Ms after ?DEADLINE_MS -> error({not_told, Shard}) end
                   || _ <- lists:seq(1, After - Before) ]
             end || _ <- lists:seq(1, Rounds) ],
    ?assertEqual([], told()),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)),
    %% The exit of a manager may be reported after the first sample of its successor.
    #{count := Observed, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
    ?assert(Unobserved < Observed, {Unobserved, Observed}),
    ct:pal("~b managers killed in ~b rows: ~b downtimes, ~b of them unobserved",
           [Rounds * InARow, Rounds, length(lists:append(Told)), Unobserved]),
    ?assert(length(lists:append(Told)) =< Rounds * InARow).


all_downtimes() ->
    #{count := Observed, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
    Observed + Unobserved.


%%% The control plane


%% There is no notification for managers that have not exited, and subscriptions are kept.
control_plane_is_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = chaos_load:start(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup]),
    Managers = managers(),
    {Kills, Killed} = kill_until(fun(Killed0) -> map_size(Killed0) =:= length(?CONTROL_PLANE) end, fun(Killed0) -> kill_one_of(?CONTROL_PLANE, Killed0) end, #{}),
    Sent = chaos_load:stop(Load),
    report("processes of the control plane", Kills, Sent),
    ?assertEqual(lists:sort(?CONTROL_PLANE), lists:sort(maps:keys(Killed))),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup])),
    ?assertEqual(Managers, managers()),
    ?assertMatch(#{count := 0, unobserved_count := 0, down := []}, ?RECOVERY:downtimes()),
    ?assertEqual([], told()),
    ok = has_its_children(erlmcp_control_plane_sup),
    %% From here on erlmcp_shard_recovery is not killed.
    [ begin
          killed = test_support:kill(whereis(manager(Shard))),
          receive {erlmcp_shard_recovered, Told, _Ms} -> ?assertEqual(Shard, Told) after ?DEADLINE_MS -> error(not_told) end
      end || Shard <- lists:seq(0, ?SHARDS - 1) ],
    ?assertEqual([], told()).


%% erlmcp_shard_recovery may be killed before it notifies of a recovery. Its successor then does so, possibly for the
%% second time: each downtime has at least one notification, and each shard has one after its last kill.
managers_and_control_plane_are_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = chaos_load:start(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup]),
    Managers = managers(),
    %% erlmcp_shard_recovery is killed most often, before or after a manager, at once or with up to a millisecond in
    %% between: before the manager's exit, after it, and while it notifies.
    %% The supervisor is killed often enough for its successor to count few restarts.
    Names = lists:duplicate(3, erlmcp_shard_recovery) ++ [erlmcp_control_plane_sup | ?CONTROL_PLANE],
    Kill = fun(State0) ->
                   Both = [one_of(Names), one_of(maps:keys(Managers))],
                   [First, Second] = case rand:uniform(3) of 1 -> Both; _ -> lists:reverse(Both) end,
                   State = kill_one(First, {0, State0}),
                   ok = spin(now_us() + rand:uniform(1500) - 500),
                   kill_one(Second, State)
           end,
    %% Some downtimes are over before erlmcp_shard_recovery is notified of their start.
    IsOneUnseen = fun(_State) -> maps:get(unobserved_count, ?RECOVERY:downtimes()) > 0 end,
    {Kills, {Killed, Told0}} = kill_until(IsOneUnseen, Kill, {#{}, []}),
    Shards = maps:filter(fun(Name, _ToldBefore) -> is_integer(Name) end, Killed),
    Told = await_told(fun(Told) ->
                              #{count := Count, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
                              length(Told) >= Count + Unobserved andalso
                              [] =:= [ Shard || {Shard, ToldBefore} <- maps:to_list(Shards), times_told(Shard, Told) =< ToldBefore ]
                      end,
                      Told0),
    Sent = chaos_load:stop(Load),
    report("managers and processes of the control plane", Kills, Sent),
    ct:pal("~b recoveries told of ~b shards", [length(Told), map_size(Shards)]),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup])),
    ?assertEqual(lists:sort(maps:keys(Shards)),
                 [ Shard || {Shard, Manager} <- lists:sort(maps:to_list(Managers)), whereis(manager(Shard)) =/= Manager ]),
    ?assertEqual([], lists:usort([ Shard || {Shard, _Ms} <- Told ]) -- maps:keys(Shards)),
    ?assertMatch(#{down := []}, ?RECOVERY:downtimes()).


%% Keeps for each name the number of its notifications at its last kill.
kill_one(Name, {Kills, {Killed, Told0}}) ->
    Told = told() ++ Told0,
    case test_support:kill(live(name(Name))) of
        killed -> {Kills + 1, {Killed#{Name => times_told(Name, Told)}, Told}};
        _Ending -> {Kills, {Killed, Told}}
    end.


spin(UntilUs) ->
    now_us() >= UntilUs orelse spin(UntilUs),
    ok.


times_told(Shard, Told) ->
    length([ Ms || {Of, Ms} <- Told, Of =:= Shard ]).


%%% The registry's process


%% In the mode '100x' routes do not need the process: messages are delivered alike if they are sent before it is killed,
%% while it is absent, or afterwards. Any other function either has its effect, or exits with `noproc' and has none.
registry_process_is_killed(_Config) ->
    Load = chaos_load:start(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup]),
    Managers = managers(),
    Kill = fun(Sent0) -> {1, kill_registry(Load, Sent0)} end,
    {Kills, Own} = kill_until(fun(_Sent) -> true end, Kill, chaos_load:nothing_sent()),
    %% These were sent while the process was absent.
    ?assertMatch(#{server := _, transport := _, broadcast := _, single := _, batch := _}, chaos_load:routes(Own)),
    Sent = chaos_load:stop(Load, #{self() => Own}),
    report("processes of the registry", Kills, Sent),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup])),
    ?assertEqual(Managers, managers()).


%% The host's supervisor shuts down the sibling before it restarts both processes, and the sibling waits for this
%% function. Until then there is no registry process.
kill_registry(Load, Sent0) ->
    Sibling = receive {up, Pid} -> Pid after ?DEADLINE_MS -> error(host_is_not_up) end,
    Registry = whereis(?R),
    killed = test_support:kill(Registry),
    receive {ending, Sibling} -> ok after ?DEADLINE_MS -> error(host_has_not_noticed) end,
    ?assertEqual(undefined, whereis(?R)),
    Sent = chaos_load:burst(Load, Sent0, 50),
    {Server, Transport} = chaos_load:server_and_transport(Load),
    [ ?assertExit({noproc, {gen_server, call, [?R, Request]}}, Call())
      || {Request, Call} <- [{{find_server, Server}, fun() -> ?R:find_server(Server) end},
                             {{unregister_server, Server}, fun() -> ?R:unregister_server(Server) end},
                             {{unregister_transport, Transport}, fun() -> ?R:unregister_transport(Transport) end},
                             {{unbind_transport, Transport}, fun() -> ?R:unbind_transport(Transport) end},
                             {{register_server, new, self(), #{}}, fun() -> ?R:register_server(new, self(), #{}) end},
                             {list_servers, fun ?R:list_servers/0}] ],
    ?assertEqual(undefined, whereis(?R)),
    Sibling ! go_on,
    ?assertNotEqual(Registry, live(?R)),
    Sent.


%%% Supervisors


supervisors_are_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = chaos_load:start(),
    Top = whereis(erlmcp_native_sup),
    Managers = managers(),
    Names = [erlmcp_shard_sup, erlmcp_control_plane_sup],
    {Kills, Killed} = kill_until(fun(Killed0) -> map_size(Killed0) =:= length(Names) end, fun(Killed0) -> kill_one_of(Names, Killed0) end, #{}),
    Sent = chaos_load:stop(Load),
    report("supervisors", Kills, Sent),
    ?assertEqual(lists:sort(Names), lists:sort(maps:keys(Killed))),
    ?assertEqual(Top, whereis(erlmcp_native_sup)),
    ok = lists:foreach(fun has_its_children/1, [erlmcp_native_sup | Names]),
    %% No manager was left behind.
    is(?SHARDS, fun() -> length([ Pid || Pid <- processes(), is_manager(Pid) ]) end),
    ?assertEqual([], [ Shard || {Shard, Manager} <- maps:to_list(Managers), whereis(manager(Shard)) =:= Manager ]),
    %% Each shard and each downtime has at least one notification.
    is([], fun() -> maps:get(down, ?RECOVERY:downtimes()) end),
    Told = await_told(fun(Told) ->
                              #{count := Count, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
                              length(Told) >= Count + Unobserved andalso
                              length(lists:usort([ Shard || {Shard, _Ms} <- Told ])) =:= ?SHARDS
                      end,
                      []),
    ct:pal("~b recoveries told", [length(Told)]).


is_manager(Pid) ->
    case process_info(Pid, dictionary) of
        {dictionary, Dictionary} ->
            proplists:get_value('$initial_call', Dictionary) =:= {erlmcp_shard_manager, init, 1};
        undefined ->
            false
    end.


%%% Restart intensities


%% As many kills within ten seconds as the supervisors document that they bear. None of them gives up.
documented_rates_are_borne(_Config) ->
    Top = whereis(erlmcp_native_sup),
    Names = [erlmcp_shard_sup, erlmcp_control_plane_sup],
    %% Two supervisors, each killed ten times a second.
    ok = kill_within_ten_seconds(200, Names),
    %% A supervisor that is still starting would exit with a child.
    ok = lists:foreach(fun has_its_children/1, [erlmcp_native_sup | Names]),
    ?assertEqual(Top, whereis(erlmcp_native_sup)),
    Supervisors = pids(Names),
    %% 13 kills of each process of the control plane.
    ok = kill_within_ten_seconds(39, ?CONTROL_PLANE -- Names),
    %% Ten managers a second, and then all at once.
    ok = kill_within_ten_seconds(100, [ manager(Shard) || Shard <- lists:seq(0, ?SHARDS - 1) ]),
    Managers = managers(),
    _ = [ exit(Manager, kill) || Manager <- maps:values(Managers) ],
    is([], fun() -> [ S || {S, M} <- maps:to_list(Managers), lists:member(whereis(manager(S)), [undefined, M]) ] end),
    ok = lists:foreach(fun has_its_children/1, [erlmcp_native_sup | Names]),
    ?assertEqual({Top, Supervisors}, {whereis(erlmcp_native_sup), pids(Names)}),
    is(ok, fun erlmcp_native:health/0).


%% Kills the processes in turn until so many kills fall within the ten seconds that supervisors consider.
kill_within_ten_seconds(Number, Names) ->
    kill_within_ten_seconds(Number, Names, Names, [], now_ms() + ?DEADLINE_MS).


kill_within_ten_seconds(Number, [], Names, Times, Deadline) ->
    kill_within_ten_seconds(Number, Names, Names, Times, Deadline);
kill_within_ten_seconds(Number, [Name | Others], Names, Times0, Deadline) ->
    Now = now_ms(),
    ?assert(Now < Deadline, {too_slow_for_so_many, Number}),
    case lists:takewhile(fun(Ms) -> Ms > Now - 10_000 end, Times0) of
        Times when length(Times) >= Number ->
            ok;
        Times ->
            killed = test_support:kill(live(Name)),
            kill_within_ten_seconds(Number, Others, Names, [Now | Times], Deadline)
    end.


%%% Killing


%% Calls Kill every KILL_MS until CHAOS_SECONDS are over, three processes a second have been killed, and IsEnough accepts the
%% state. Kill returns how many processes it has killed.
kill_until(IsEnough, Kill, State) ->
    Now = now_ms(),
    kill_until(IsEnough, Now, Now + seconds() * 1000, Kill, 0, State).


kill_until(IsEnough, Due, End, Kill, Kills, State0) ->
    case Due >= End andalso Kills >= 3 * seconds() andalso IsEnough(State0) of
        true ->
            {Kills, State0};
        false ->
            ok = timer:sleep(max(0, Due - now_ms())),
            {Killed, State} = Kill(State0),
            kill_until(IsEnough, max(Due + ?KILL_MS, now_ms()), End, Kill, Kills + Killed, State)
    end.


kill_one_of(Names, Killed) ->
    Name = one_of(Names),
    case test_support:kill(live(Name)) of
        killed -> {1, plus(Name, 1, Killed)};
        %% It was exiting already, since its supervisor had exited.
        _Ending -> {0, Killed}
    end.


kill_in_a_row(_Name, 0) ->
    ok;
kill_in_a_row(Name, Times) ->
    killed = test_support:kill(live(Name)),
    kill_in_a_row(Name, Times - 1).


%% The process with this name, as soon as there is one.
live(Name) ->
    live(Name, now_ms() + ?DEADLINE_MS).


live(Name, Deadline) ->
    case whereis(Name) of
        undefined ->
            ?assert(now_ms() < Deadline, Name),
            erlang:yield(),
            live(Name, Deadline);
        Pid ->
            Pid
    end.


pids(Names) ->
    [ {Name, live(Name)} || Name <- Names ].


manager(Shard) ->
    erlmcp_shard_sampler:name(Shard).


managers() ->
    maps:from_list([ {Shard, live(manager(Shard))} || Shard <- lists:seq(0, ?SHARDS - 1) ]).


%% The names belong to the supervisor's children, and its only other link is to its own supervisor.
has_its_children(Supervisor) ->
    is({[], 1},
       fun() ->
               Children = supervisor:which_children(Supervisor),
               {links, Links} = process_info(whereis(Supervisor), links),
               {[ Child || {Id, Pid, _, _} = Child <- Children, not is_pid(Pid) orelse not has_name(Id, Pid) ],
                length(Links) - length(Children)}
       end).


%% The child of a shard is the supervisor of its manager.
has_name(Shard, Pid) when is_integer(Shard) ->
    [{_, Manager, worker, _}] = supervisor:which_children(Pid),
    is_pid(Manager) andalso whereis(manager(Shard)) =:= Manager;
has_name(Name, Pid) ->
    whereis(Name) =:= Pid.


name(Shard) when is_integer(Shard) -> manager(Shard);
name(Name) -> Name.


%% The notifications received so far.
told() ->
    receive
        {erlmcp_shard_recovered, Shard, Ms} -> [{Shard, Ms} | told()]
    after
        0 ->
            []
    end.


await_told(IsEnough, Told) ->
    case IsEnough(Told) of
        true ->
            Told;
        false ->
            receive
                {erlmcp_shard_recovered, Shard, Ms} -> await_told(IsEnough, [{Shard, Ms} | Told])
            after
                ?DEADLINE_MS ->
                    error({not_told, length(Told), ?RECOVERY:downtimes()})
            end
    end.


%%% Reports


report(What, Kills, #{attempts := Attempts, delivered := Delivered, refused := Refused, routes := Routes} = Sent) ->
    #{
      count := Count,
      median_us := MedianUs,
      worst_us := WorstUs,
      unobserved_count := Unobserved,
      unobserved_worst_us := UnobservedUs
     } = ?RECOVERY:downtimes(),
    #{ms := Ms, changes := Changes} = Sent,
    ct:pal("~b ~ts killed in ~b ms.~n"
           "~b messages sent = ~b delivered + ~b refused ~0p, by ~0p.~n"
           "Changes made, and refused since there was no process of the registry: ~0p.~n"
           "Downtimes of managers: ~b, median ~b us, worst ~b us; ~b that nobody saw begin, worst ~b us at most",
           [Kills,
            What,
            Ms,
            Attempts,
            Delivered,
            lists:sum(maps:values(Refused)),
            Refused,
            Routes,
            Changes,
            Count,
            MedianUs,
            WorstUs,
            Unobserved,
            UnobservedUs]).


%%% Tools


%% Waits until Look returns Expected.
is(Expected, Look) ->
    test_support:await_value(Expected, Look, ?DEADLINE_MS).


one_of(Tuple) when is_tuple(Tuple) -> element(rand:uniform(tuple_size(Tuple)), Tuple);
one_of(List) -> lists:nth(rand:uniform(length(List)), List).


plus(Key, N, Counts) ->
    maps:update_with(Key, fun(M) -> M + N end, N, Counts).


seconds() ->
    test_support:positive_integer("CHAOS_SECONDS", 5).


now_ms() ->
    erlang:monotonic_time(millisecond).


now_us() ->
    erlang:monotonic_time(microsecond).
