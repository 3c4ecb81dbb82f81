%%% Processes of the application, killed again and again while messages are routed.
%%%
%%% The contract: whatever is killed, a message that was accepted is delivered, once and in the order of
%%% its sender; what was not accepted is not delivered; no registration and no binding is lost; nobody
%%% restarts but who was killed; and afterwards all is well again.
%%%
%%% The load: 5,000 connections, the servers and transports of a host, and senders that use every kind
%%% of route. Each sender numbers its messages. Sender and receiver keep, each for itself, how many of
%%% them were accepted or delivered and a hash over their numbers in order, and both are compared in the
%%% end. One connection and one transport have small buckets, some messages go to connections that are
%%% not there, and some receivers take nothing until the load is over, so that their shard is overloaded:
%%% part of what is sent is refused, for each of the reasons but an open circuit.
%%%
%%% What changes meanwhile: owners register, bind, unregister and end connections, servers and
%%% transports. Each result says what there must be from then on.
%%%
%%% CHAOS_SECONDS: how long each kind of process is killed, every 100 ms (5).
-module(chaos_SUITE).

-behaviour(supervisor).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([managers_are_killed/1,
         manager_is_killed_before_it_has_recovered/1,
         control_plane_is_killed/1,
         managers_and_control_plane_are_killed/1,
         registry_process_is_killed/1,
         supervisors_are_killed/1,
         documented_rates_are_borne/1,
         more_than_that_ends_one_supervisor_alone/1,
         orphans_lose_their_names/1,
         an_orphan_that_has_just_ended_is_no_obstacle/1]).
%% The host
-export([init/1, start_sibling/1, sibling/1]).
-export([orphan/1, start_when_free/1]).

-define(M,           erlmcp_shard_manager).
-define(R,           erlmcp_registry).
-define(S,           erlmcp_shard_registry).
-define(RECOVERY,    erlmcp_shard_recovery).
-define(DEADLINE_MS, 60_000).

-define(SHARDS,      64).
-define(CONNECTIONS, 5_000).
-define(SERVERS,     50).
%% Bound to each server.
-define(TRANSPORTS, 5).
-define(SENDERS,    3).
-define(OWNERS,     2).
-define(KILL_MS,    100).
%% Receivers that take nothing, and what their shard admits.
-define(STALLED,        5).
-define(STALLED_ADMITS, 200).
-define(CONTROL_PLANE,
        [erlmcp_shard_health, erlmcp_shard_recovery, erlmcp_shard_metrics, erlmcp_control_plane_sup]).

%% What messages are sent to.
-record(targets, {
          %% Ids, in tuples to choose from.
          connections :: tuple(),
          servers :: tuple(),
          transports :: tuple(),
          bound :: #{term() => [term()]},
          %% Ids of connections.
          limited :: term(),
          stalled :: [term()],
          missing :: term(),
          %% A transport.
          limited_transport :: term(),
          %% Of all but the stalled ones, for pings.
          awake :: tuple()
         }).
%% What a sender has sent.
-record(sent, {
          number = 0 :: non_neg_integer(),
          attempts = 0 :: non_neg_integer(),
          accepted = #{} :: #{term() => {non_neg_integer(), non_neg_integer()}},
          refused = #{} :: #{atom() => pos_integer()},
          routes = #{} :: #{atom() => pos_integer()}
         }).
-record(load, {
          began :: integer(),
          targets :: #targets{},
          receivers :: #{term() => pid()},
          senders :: [pid()],
          owners :: [pid()]
         }).


suite() ->
    [{timetrap, {seconds, 600 + 2 * seconds()}}].


all() ->
    [managers_are_killed,
     manager_is_killed_before_it_has_recovered,
     control_plane_is_killed,
     managers_and_control_plane_are_killed,
     registry_process_is_killed,
     supervisors_are_killed,
     documented_rates_are_borne,
     more_than_that_ends_one_supervisor_alone,
     orphans_lose_their_names,
     an_orphan_that_has_just_ended_is_no_obstacle].


%% Supervisors report each restart.
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
    is(0, fun() -> ?S:count() end),
    is(ok, fun erlmcp_native:health/0),
    Config.


end_per_testcase(_Case, _Config) ->
    ok = stop_host(),
    ok = application:stop(erlmcp_native),
    ok = erlmcp_backpressure:configure(),
    _ = erlmcp_nif:breaker_set(closed),
    lists:foreach(fun({Id, _}) -> ok = ?S:unregister_connection(Id) end, connections()).


%%% Shard managers


%% A manager is killed again only after its last recovery was told. So each kill is told exactly once.
managers_are_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = start_load(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup | ?CONTROL_PLANE]),
    #{count := 0, unobserved_count := 0} = ?RECOVERY:downtimes(),
    {Kills, {Managers0, Recovering, Told0}} = kill_for(seconds(), fun kill_a_manager/1, {managers(), #{}, []}),
    {Managers, Told} = await_recoveries(Managers0, Recovering, Told0),
    Sent = stop_load(Load),
    report("shard managers", Kills, Sent),
    ?assertEqual(Kills, length(Told)),
    %% Nothing more is told, and nobody else has been restarted: not another manager, nor the killed one
    %% once more.
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
    %% Some are over before the news of their beginning is there.
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
            %% Nobody has restarted it since.
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


%% Several managers in a row may make one downtime, if nobody has seen those in between sample. Each
%% downtime is told exactly once.
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
                 is({Manager, []},
                    fun() -> {erlmcp_shard_recovery_records:manager(Shard), maps:get(down, ?RECOVERY:downtimes())} end),
                 After = all_downtimes(),
                 ?assert(After - Before >= 1 andalso After - Before =< InARow, {Before, After}),
                 [ receive {erlmcp_shard_recovered, Shard, Ms} -> Ms after ?DEADLINE_MS -> error({not_told, Shard}) end
                   || _ <- lists:seq(1, After - Before) ]
             end || _ <- lists:seq(1, Rounds) ],
    ?assertEqual([], told()),
    ?assertEqual(Supervisor, whereis(erlmcp_shard_sup)),
    %% The end of one may be told when its successor has sampled already.
    #{count := Observed, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
    ?assert(Unobserved < Observed, {Unobserved, Observed}),
    ct:pal("~b managers killed in ~b rows: ~b downtimes, ~b of them unobserved",
           [Rounds * InARow, Rounds, length(lists:append(Told)), Unobserved]),
    %% Some did run into each other.
    ?assert(length(lists:append(Told)) < Rounds * InARow).


all_downtimes() ->
    #{count := Observed, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
    Observed + Unobserved.


%%% The control plane


%% Nobody tells of managers that have not ended, and subscriptions stay.
control_plane_is_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = start_load(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup]),
    Managers = managers(),
    {Kills, Killed} = kill_for(seconds(), fun(Killed0) -> kill_one_of(?CONTROL_PLANE, Killed0) end, #{}),
    Sent = stop_load(Load),
    report("processes of the control plane", Kills, Sent),
    ?assertEqual(lists:sort(?CONTROL_PLANE), lists:sort(maps:keys(Killed))),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup])),
    ?assertEqual(Managers, managers()),
    ?assertMatch(#{count := 0, unobserved_count := 0, down := []}, ?RECOVERY:downtimes()),
    ?assertEqual([], told()),
    ok = has_its_children(erlmcp_control_plane_sup),
    %% Now nobody kills the one who tells.
    [ begin
          killed = test_support:kill(whereis(manager(Shard))),
          receive {erlmcp_shard_recovered, Told, _Ms} -> ?assertEqual(Shard, Told) after ?DEADLINE_MS -> error(not_told) end
      end || Shard <- lists:seq(0, ?SHARDS - 1) ],
    ?assertEqual([], told()).


%% Whoever tells of a recovery may be killed before he does. Then the next one tells of it, or a second
%% time: each downtime at least once, and in the end of every shard what came after its last kill.
managers_and_control_plane_are_killed(_Config) ->
    ok = ?RECOVERY:subscribe(),
    Load = start_load(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup]),
    Managers = managers(),
    %% Most often the one who tells, in any order, at once or with up to a millisecond in between: before the
    %% manager's end, after it, and while he checks the shard.
    Names = lists:duplicate(4, erlmcp_shard_recovery) ++ ?CONTROL_PLANE,
    Kill = fun(State0) ->
                   Both = [one_of(Names), one_of(maps:keys(Managers))],
                   [First, Second] = case rand:uniform(3) of 1 -> Both; _ -> lists:reverse(Both) end,
                   State = kill_one(First, {0, State0}),
                   ok = spin(now_us() + rand:uniform(1500) - 500),
                   kill_one(Second, State)
           end,
    {Kills, {Killed, Told0}} = kill_for(seconds(), Kill, {#{}, []}),
    Shards = maps:filter(fun(Name, _ToldBefore) -> is_integer(Name) end, Killed),
    Told = await_told(fun(Told) ->
                              #{count := Count, unobserved_count := Unobserved} = ?RECOVERY:downtimes(),
                              length(Told) >= Count + Unobserved andalso
                              [] =:= [ Shard || {Shard, ToldBefore} <- maps:to_list(Shards), times_told(Shard, Told) =< ToldBefore ]
                      end,
                      Told0),
    Sent = stop_load(Load),
    report("managers and processes of the control plane", Kills, Sent),
    ct:pal("~b recoveries told of ~b shards", [length(Told), map_size(Shards)]),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup])),
    ?assertEqual(lists:sort(maps:keys(Shards)),
                 [ Shard || {Shard, Manager} <- lists:sort(maps:to_list(Managers)), whereis(manager(Shard)) =/= Manager ]),
    ?assertEqual([], lists:usort([ Shard || {Shard, _Ms} <- Told ]) -- maps:keys(Shards)),
    #{down := Down, unobserved_count := Unseen} = ?RECOVERY:downtimes(),
    ?assertEqual([], Down),
    ?assert(Unseen > 0).


%% Of each name, how often its recovery had been told when it was killed last.
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


%% In the mode '100x' routes do not need the process: those that were begun before it was killed, those
%% that were made while there is none, and those after that are delivered alike. Any other function
%% either has its effect or exits with `noproc' and has none.
registry_process_is_killed(_Config) ->
    Load = start_load(),
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup]),
    Managers = managers(),
    Kill = fun(Sent0) -> {1, kill_registry(Load, Sent0)} end,
    {Kills, Own} = kill_for(seconds(), Kill, #sent{}),
    %% These were sent while there was no process.
    ?assertMatch(#{server := _, transport := _, broadcast := _, single := _, batch := _}, Own#sent.routes),
    Sent = stop_load(Load, #{self() => Own}),
    report("processes of the registry", Kills, Sent),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup])),
    ?assertEqual(Managers, managers()).


%% The host's supervisor ends the sibling of the process before it restarts both, and the sibling waits
%% for this function: so long there is no process.
kill_registry(#load{targets = Targets}, Sent0) ->
    Sibling = receive {up, Pid} -> Pid after ?DEADLINE_MS -> error(host_is_not_up) end,
    Registry = whereis(?R),
    killed = test_support:kill(Registry),
    receive {ending, Sibling} -> ok after ?DEADLINE_MS -> error(host_has_not_noticed) end,
    ?assertEqual(undefined, whereis(?R)),
    Sent = burst(Targets, Sent0, 50),
    Server = element(1, Targets#targets.servers),
    Transport = element(1, Targets#targets.transports),
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
    Load = start_load(),
    Top = whereis(erlmcp_native_sup),
    Managers = managers(),
    Names = [erlmcp_shard_sup, erlmcp_control_plane_sup],
    {Kills, Killed} = kill_for(seconds(), fun(Killed0) -> kill_one_of(Names, Killed0) end, #{}),
    Sent = stop_load(Load),
    report("supervisors", Kills, Sent),
    ?assertEqual(lists:sort(Names), lists:sort(maps:keys(Killed))),
    ?assertEqual(Top, whereis(erlmcp_native_sup)),
    ok = lists:foreach(fun has_its_children/1, [erlmcp_native_sup | Names]),
    %% Nobody has been left behind.
    is(?SHARDS, fun() -> length([ Pid || Pid <- processes(), is_manager(Pid) ]) end),
    ?assertEqual([], [ Shard || {Shard, Manager} <- maps:to_list(Managers), whereis(manager(Shard)) =:= Manager ]),
    %% Of every shard at least one recovery is told; of each downtime, once at least.
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
            proplists:get_value('$initial_call', Dictionary) =:= {?M, init, 1};
        undefined ->
            false
    end.


%%% Restart intensities


%% As many kills within ten seconds as the supervisors say that they were made for. None of them gives
%% up.
documented_rates_are_borne(_Config) ->
    Top = whereis(erlmcp_native_sup),
    Names = [erlmcp_shard_sup, erlmcp_control_plane_sup],
    %% Two that are each killed ten times a second.
    ok = kill_within_ten_seconds(200, Names),
    %% A supervisor that is still starting would end with a child.
    ok = lists:foreach(fun has_its_children/1, [erlmcp_native_sup | Names]),
    ?assertEqual(Top, whereis(erlmcp_native_sup)),
    Supervisors = pids(Names),
    %% Three of them.
    ok = kill_within_ten_seconds(300, ?CONTROL_PLANE -- Names),
    %% One manager ten times a second, and all at once.
    ok = kill_within_ten_seconds(100, [ manager(Shard) || Shard <- lists:seq(0, ?SHARDS - 1) ]),
    Managers = managers(),
    _ = [ exit(Manager, kill) || Manager <- maps:values(Managers) ],
    is([], fun() -> [ S || {S, M} <- maps:to_list(Managers), lists:member(whereis(manager(S)), [undefined, M]) ] end),
    ok = lists:foreach(fun has_its_children/1, [erlmcp_native_sup | Names]),
    ?assertEqual({Top, Supervisors}, {whereis(erlmcp_native_sup), pids(Names)}),
    is(ok, fun erlmcp_native:health/0).


%% What is restarted more than a thousand times in ten seconds cannot go on. Its supervisor ends and is
%% itself restarted; the application goes on.
more_than_that_ends_one_supervisor_alone(_Config) ->
    Others = pids([erlmcp_native_sup, erlmcp_shard_sup]),
    Managers = managers(),
    Supervisor = whereis(erlmcp_control_plane_sup),
    Monitor = monitor(process, Supervisor),
    Kills = kill_until_down(erlmcp_shard_metrics, Supervisor, Monitor, 0, now_ms() + ?DEADLINE_MS),
    ?assert(Kills > 1000, Kills),
    ?assertNotEqual(Supervisor, live(erlmcp_control_plane_sup)),
    ?assertEqual(Others, pids([erlmcp_native_sup, erlmcp_shard_sup])),
    ?assertEqual(Managers, managers()),
    is(ok, fun erlmcp_native:health/0).


kill_until_down(Name, Supervisor, Monitor, Kills, Deadline) ->
    receive
        {'DOWN', Monitor, process, Supervisor, Reason} ->
            ?assertEqual(shutdown, Reason),
            Kills
    after
        0 ->
            ?assert(now_ms() < Deadline, Kills),
            case whereis(Name) of
                undefined ->
                    erlang:yield(),
                    kill_until_down(Name, Supervisor, Monitor, Kills, Deadline);
                Pid ->
                    Killed = case test_support:kill(Pid) of killed -> 1; _Ending -> 0 end,
                    kill_until_down(Name, Supervisor, Monitor, Kills + Killed, Deadline)
            end
    end.


%% Kills them by turns until so many kills were made within the ten seconds that supervisors look at.
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


%% A process that has the name of a child of these supervisors and does not let go of it is ended by the
%% start of that child, which counts as one restart.
orphans_lose_their_names(_Config) ->
    [ begin
          SupervisorPid = whereis(Supervisor),
          ok = sys:suspend(Supervisor),
          killed = test_support:kill(whereis(Name)),
          Orphan = start_orphan(Name),
          Monitor = monitor(process, Orphan),
          ok = sys:resume(Supervisor),
          receive {'DOWN', Monitor, process, Orphan, Reason} -> ?assertEqual(killed, Reason) after ?DEADLINE_MS -> error(Name) end,
          ok = has_its_children(Supervisor),
          ?assertEqual(SupervisorPid, whereis(Supervisor))
      end || {Supervisor, Name} <- [{erlmcp_shard_sup, manager(7)},
                                    {erlmcp_control_plane_sup, erlmcp_shard_metrics},
                                    {erlmcp_native_sup, erlmcp_control_plane_sup},
                                    {erlmcp_native_sup, erlmcp_shard_sup}] ],
    is(ok, fun erlmcp_native:health/0).


%% A start may find a name taken, and nobody who has it a moment later.
an_orphan_that_has_just_ended_is_no_obstacle(_Config) ->
    Attempts = counters:new(1, []),
    ?assertEqual({ok, self()}, erlmcp_takeover:start_link(?MODULE, start_when_free, [Attempts])),
    ?assertEqual(3, counters:get(Attempts, 1)).


start_when_free(Attempts) ->
    ok = counters:add(Attempts, 1, 1),
    case counters:get(Attempts, 1) of
        3 -> {ok, self()};
        _ -> {error, {already_started, undefined}}
    end.


start_orphan(Name) ->
    proc_lib:start(?MODULE, orphan, [Name]).


orphan(Name) ->
    process_flag(trap_exit, true),
    %% Orphans of a supervisor that was killed may have the name for a moment.
    is(undefined, fun() -> whereis(Name) end),
    true = register(Name, self()),
    ok = proc_lib:init_ack(self()),
    receive never -> ok end.


%%% Killing


%% Until the time is over, every KILL_MS; Kill returns how many it has killed.
kill_for(Seconds, Kill, State) ->
    Now = now_ms(),
    kill_for(Now, Now + Seconds * 1000, Kill, 0, State).


kill_for(Due, End, _Kill, Kills, State) when Due >= End ->
    {Kills, State};
kill_for(Due, End, Kill, Kills, State0) ->
    ok = timer:sleep(max(0, Due - now_ms())),
    {Killed, State} = Kill(State0),
    kill_for(max(Due + ?KILL_MS, now_ms()), End, Kill, Kills + Killed, State).


kill_one_of(Names, Killed) ->
    Name = one_of(Names),
    case test_support:kill(live(Name)) of
        killed -> {1, plus(Name, 1, Killed)};
        %% It was ending already, since its supervisor had.
        _Ending -> {0, Killed}
    end.


kill_in_a_row(_Name, 0) ->
    ok;
kill_in_a_row(Name, Times) ->
    killed = test_support:kill(live(Name)),
    kill_in_a_row(Name, Times - 1).


%% Who has a name, as soon as somebody has it.
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
    erlmcp_backpressure:sampler(Shard).


managers() ->
    maps:from_list([ {Shard, live(manager(Shard))} || Shard <- lists:seq(0, ?SHARDS - 1) ]).


%% The names belong to the children of the supervisor, and it is linked to nobody else but its own one.
has_its_children(Supervisor) ->
    is({[], 1},
       fun() ->
               Children = supervisor:which_children(Supervisor),
               {links, Links} = process_info(whereis(Supervisor), links),
               {[ Child || {Id, Pid, _, _} = Child <- Children, not is_pid(Pid) orelse whereis(name(Id)) =/= Pid ],
                length(Links) - length(Children)}
       end).


name(Shard) when is_integer(Shard) -> manager(Shard);
name(Name) -> Name.


%% What has been told by now.
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


%%% The host


%% In erlmcp's shape, the registry first; with an intensity for a registry that is killed on purpose.
init(Killer) ->
    {ok, {#{strategy => one_for_all, intensity => 1_000, period => 10},
          [#{id => ?R, start => {?R, start_link, []}},
           #{id => sibling, start => {?MODULE, start_sibling, [Killer]}, shutdown => ?DEADLINE_MS}]}}.


start_host() ->
    {ok, _Pid} = supervisor:start_link({local, chaos_host}, ?MODULE, self()).


%% Clears servers and transports.
stop_host() ->
    case whereis(chaos_host) of
        undefined ->
            ok;
        Host ->
            Monitor = monitor(process, Host),
            true = unlink(Host),
            true = exit(Host, shutdown),
            stop_host(Host, Monitor)
    end.


stop_host(Host, Monitor) ->
    receive
        {ending, Sibling} ->
            Sibling ! go_on,
            stop_host(Host, Monitor);
        {'DOWN', Monitor, process, Host, _Reason} ->
            ok
    end.


start_sibling(Killer) ->
    proc_lib:start_link(?MODULE, sibling, [Killer]).


%% A server of the host, under one id in each of its lives.
sibling(Killer) ->
    process_flag(trap_exit, true),
    ok = ?R:register_server(sibling, self(), #{id => sibling}),
    Monitor = monitor(process, Killer),
    ok = proc_lib:init_ack({ok, self()}),
    Killer ! {up, self()},
    receive
        {'EXIT', _Host, shutdown} -> ok
    end,
    Killer ! {ending, self()},
    receive
        go_on -> ok;
        {'DOWN', Monitor, process, Killer, _Reason} -> ok
    end,
    exit(shutdown).


%%% Load


start_load() ->
    start_host(),
    {Targets, Receivers} = start_receivers(),
    #load{
      began = now_ms(),
      targets = Targets,
      receivers = Receivers,
      senders = [ start_sender(Targets) || _ <- lists:seq(1, ?SENDERS) ],
      owners = [ start_owner(Owner) || Owner <- lists:seq(1, ?OWNERS) ]
     }.


start_receivers() ->
    Connections = [ <<"connection ", (integer_to_binary(N))/binary>> || N <- lists:seq(1, ?CONNECTIONS) ],
    [Limited, OneStalled | _] = Connections,
    Slow = ?S:get_shard_id(OneStalled),
    Stalled = lists:sublist([ Id || Id <- Connections, ?S:get_shard_id(Id) =:= Slow, Id =/= Limited ], ?STALLED),
    Servers = [ {server, N} || N <- lists:seq(1, ?SERVERS) ],
    %% Broadcasts must be admitted, since their result says not whom they have reached.
    Ids = [ Id || N <- lists:seq(1, 1_000), Id <- [{transport, N}], ?S:get_shard_id(Id) =/= Slow ],
    Transports = lists:zip(lists:sublist(Ids, ?SERVERS * ?TRANSPORTS), lists:append(lists:duplicate(?TRANSPORTS, Servers))),
    Receivers = maps:from_list([ {{connection, Id}, start_receiver(lists:member(Id, Stalled))} || Id <- Connections ] ++
                               [ {{server, Id}, start_receiver(false)} || Id <- Servers ++ servers_of_owners() ] ++
                               [ {{transport, Id}, start_receiver(false)} || {Id, _Server} <- [{limited, none} | Transports] ]),
    maps:foreach(fun({connection, Id}, Pid) -> ok = ?S:register_connection(Id, Pid, #{id => Id});
                    ({server, Id}, Pid) -> ok = ?R:register_server(Id, Pid, #{id => Id});
                    ({transport, Id}, Pid) -> ok = ?R:register_transport(Id, Pid, #{id => Id})
                 end,
                 Receivers),
    [ ok = ?R:bind_transport_to_server(Id, Server) || {Id, Server} <- Transports ],
    Limits = #{capacity => 5, rate_per_second => 5},
    ok = erlmcp_token_bucket:set_limits(Limited, Limits),
    ok = erlmcp_token_bucket:set_limits(transport, limited, Limits),
    ok = erlmcp_admission_control:set_threshold(Slow, ?STALLED_ADMITS),
    Awake = maps:without([ {connection, Id} || Id <- Stalled ], Receivers),
    Targets = #targets{
                connections = list_to_tuple(Connections),
                servers = list_to_tuple(Servers),
                transports = list_to_tuple([ Id || {Id, _Server} <- Transports ]),
                bound = maps:from_list([ {Server, [ Id || {Id, Of} <- Transports, Of =:= Server ]} || Server <- Servers ]),
                limited = Limited,
                stalled = Stalled,
                missing = <<"no connection">>,
                limited_transport = limited,
                awake = list_to_tuple(maps:values(Awake))
               },
    {Targets, Receivers}.


stop_load(Load) ->
    stop_load(Load, #{}).


%% Compares what was sent with what has arrived, and what should be registered with what is; then waits
%% until all is well. More is what others have sent. Returns sums.
stop_load(#load{receivers = Receivers, targets = Targets} = Load, More) ->
    Sent = maps:merge(More, maps:from_list([ {Pid, ask(Pid, stop)} || Pid <- Load#load.senders ])),
    Ms = now_ms() - Load#load.began,
    {Owned, Changes} = lists:unzip([ ask(Pid, stop) || Pid <- Load#load.owners ]),
    _ = [ maps:get({connection, Id}, Receivers) ! go_on || Id <- Targets#targets.stalled ],
    maps:foreach(fun(Target, Pid) -> is(accepted(Target, Sent), fun() -> {Target, ask(Pid, tell)} end) end, Receivers),
    Delivered = lists:sum([ Count || Pid <- maps:values(Receivers), {Count, _} <- maps:values(ask(Pid, tell)) ]),
    #{attempts := Attempts, refused := Refused, routes := Routes} = Sums = sums(maps:values(Sent)),
    ?assertEqual(Attempts, Delivered + lists:sum(maps:values(Refused))),
    ?assertMatch(#{rate_limited := _, shard_overloaded := _, not_found := _}, Refused),
    ?assertMatch(#{single := _, batch := _, server := _, transport := _, broadcast := _}, Routes),
    %% A thousand a second is little for any machine.
    ?assert(Delivered > Ms, {Delivered, Ms}),
    Owns = lists:append([ maps:to_list(O) || O <- Owned ]),
    ok = has_registered([ {Target, Pid, binding(Target, Targets)} || {Target, Pid} <- maps:to_list(Receivers) ] ++
                        [ {Target, Pid, Binding} || {Target, {Pid, Binding}} <- Owns ]),
    ?assert(lists:sum([ Made || {Made, _NotRunning} <- Changes ]) > Ms div 20, Changes),
    is(ok, fun erlmcp_native:health/0),
    ?assert(lists:keymember(erlmcp_native, 1, application:which_applications())),
    lists:foreach(fun(Pid) -> unlink(Pid), exit(Pid, kill) end, maps:values(Receivers) ++ [ Pid || {_, {Pid, _}} <- Owns ]),
    Sums#{delivered => Delivered, ms => Ms, changes => Changes}.


accepted(Target, Sent) ->
    {Target, maps:from_list([ {Sender, Chain} || {Sender, #sent{accepted = #{Target := Chain}}} <- maps:to_list(Sent) ])}.


binding({transport, Id}, #targets{bound = Bound}) ->
    hd([ Server || {Server, Ids} <- maps:to_list(Bound), lists:member(Id, Ids) ] ++ [none]);
binding(_Target, _Targets) ->
    none.


%% These, the host's sibling, and nothing else.
has_registered(All) ->
    {sibling, Sibling, _, _} = lists:keyfind(sibling, 1, supervisor:which_children(chaos_host)),
    Expected = fun(Kind) -> lists:sort([ {Id, {Pid, #{id => Id}}} || {{Of, Id}, Pid, _} <- All, Of =:= Kind ]) end,
    OfSibling = {sibling, {Sibling, #{id => sibling}}},
    ok = are(Expected(connection), fun connections/0, fun ?S:lookup_connection/1),
    ok = are([OfSibling | Expected(server)], fun ?R:list_servers/0, fun ?R:find_server/1),
    ok = are(Expected(transport), fun ?R:list_transports/0, fun ?R:find_transport/1),
    Bindings = maps:from_list([ {Id, Server} || {{transport, Id}, _, Server} <- All, Server =/= none ]),
    is({ok, {registry_state, Bindings}}, fun ?R:get_all_state/0),
    is({length(Expected(connection)), length(Expected(server)) + 1, length(Expected(transport))},
       fun() ->
               #{connections := C, servers := S, transports := T} = ?S:stats(),
               {C, S, T}
       end).


%% If not, a list that differs tells of each missing one whether its process lives and can be found.
are(Expected, List, Find) ->
    is({[], []},
       fun() ->
               Listed = List(),
               {[ {Entry, is_process_alive(Pid), Find(Id)} || {Id, {Pid, _}} = Entry <- lists:sort(Expected) -- lists:sort(Listed) ],
                lists:sort(Listed) -- lists:sort(Expected)}
       end).


connections() ->
    lists:append([ ?S:list_connections(Shard) || Shard <- lists:seq(0, ?SHARDS - 1) ]).


sums(All) ->
    #{
      attempts => lists:sum([ Attempts || #sent{attempts = Attempts} <- All ]),
      refused => sum([ Refused || #sent{refused = Refused} <- All ]),
      routes => sum([ Routes || #sent{routes = Routes} <- All ])
     }.


sum(Maps) ->
    lists:foldl(fun({Key, N}, Sum) -> plus(Key, N, Sum) end, #{}, lists:append([ maps:to_list(Map) || Map <- Maps ])).


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
            UnobservedUs]),
    %% Of ten each second.
    ?assert(Kills >= 3 * seconds(), Kills).


%%% Receivers


%% Of each sender the last number, and how many there were with their hash.
start_receiver(IsStalled) ->
    spawn_link(fun() ->
                       _ = IsStalled andalso receive go_on -> ok end,
                       receiver(#{})
               end).


receiver(Senders) ->
    receive
        {from, Sender, N} -> receiver(taken(Sender, N, Senders));
        {mcp_message, _Transport, {from, Sender, N}} -> receiver(taken(Sender, N, Senders));
        {mcp_response, _Server, {from, Sender, N}} -> receiver(taken(Sender, N, Senders));
        {ping, From} ->
            From ! pong,
            receiver(Senders);
        {tell, From} ->
            From ! {tell, self(), maps:map(fun(_Sender, {_Last, Chain}) -> Chain end, Senders)},
            receiver(Senders)
    end.


taken(Sender, N, Senders) ->
    case Senders of
        #{Sender := {Last, Chain}} when N > Last -> Senders#{Sender := {N, chain(N, Chain)}};
        #{Sender := {Last, _Chain}} -> Senders#{Sender := {Last, {came_after, Last, N}}};
        #{} -> Senders#{Sender => {N, chain(N, {0, 0})}}
    end.


%% So many numbers, and a hash over them in this order.
chain(N, {Count, Hash}) -> {Count + 1, erlang:phash2([Hash | N])};
chain(_N, OutOfOrder) -> OutOfOrder.


%%% Senders


start_sender(Targets) ->
    spawn_link(fun() -> sender(Targets, #sent{}) end).


%% A burst after the other, as soon as a receiver has come to the end of its mailbox: as much as the
%% machine can do, and no more.
sender(Targets, Sent0) ->
    receive
        {stop, From} -> From ! {stop, self(), Sent0}
    after
        0 ->
            Sent = burst(Targets, Sent0, 50),
            one_of(Targets#targets.awake) ! {ping, self()},
            receive pong -> ok after ?DEADLINE_MS -> error(no_pong) end,
            sender(Targets, Sent)
    end.


burst(_Targets, Sent, 0) ->
    Sent;
burst(Targets, Sent, More) ->
    burst(Targets, send(rand:uniform(10), Targets, Sent), More - 1).


send(1, #targets{servers = Servers, transports = Transports}, Sent) ->
    to_server(one_of(Servers), one_of(Transports), Sent);
send(2, #targets{servers = Servers, transports = Transports}, Sent) ->
    Id = one_of(Transports),
    Route = fun(Message) -> ?R:route_to_transport(Id, one_of(Servers), Message) end,
    single(transport, {transport, Id}, Route, Sent);
send(3, #targets{servers = Servers, bound = Bound}, #sent{number = Number} = Sent) ->
    Server = one_of(Servers),
    ok = ?R:route_to_transport(broadcast, Server, {from, self(), Number + 1}),
    lists:foldl(fun(Id, Sent1) -> result(broadcast, {transport, Id}, Number + 1, ok, Sent1) end,
                Sent#sent{number = Number + 1},
                maps:get(Server, Bound));
send(4, #targets{servers = Servers, limited_transport = Limited}, Sent) ->
    to_server(one_of(Servers), Limited, Sent);
send(5, #targets{limited = Limited, stalled = Stalled, missing = Missing}, Sent) ->
    to_connection(one_of([Limited, Missing | Stalled]), Sent);
send(6, #targets{connections = Connections}, Sent) ->
    batch([ one_of(Connections) || _ <- lists:seq(1, 40) ], Sent);
send(7, #targets{connections = Connections, limited = Limited, stalled = Stalled, missing = Missing}, Sent) ->
    %% Now refused, now not.
    batch([ one_of([Limited, Missing, one_of(Stalled), one_of(Connections), one_of(Connections)]) || _ <- lists:seq(1, 10) ],
          Sent);
send(_Others, #targets{connections = Connections}, Sent) ->
    to_connection(one_of(Connections), Sent).


to_connection(Id, Sent) ->
    single(single, {connection, Id}, fun(Message) -> ?M:route_message(Id, Message) end, Sent).


to_server(Id, Transport, Sent) ->
    single(server, {server, Id}, fun(Message) -> ?R:route_to_server(Id, Transport, Message) end, Sent).


single(Kind, Target, Route, #sent{number = Number} = Sent) ->
    Result = Route({from, self(), Number + 1}),
    result(Kind, Target, Number + 1, Result, Sent#sent{number = Number + 1}).


batch(Ids, #sent{number = Number} = Sent) ->
    Numbers = lists:seq(Number + 1, Number + length(Ids)),
    Results = ?M:route_batch([ {Id, {from, self(), N}} || {Id, N} <- lists:zip(Ids, Numbers) ]),
    lists:foldl(fun({Id, N, Result}, Sent1) -> result(batch, {connection, Id}, N, Result, Sent1) end,
                Sent#sent{number = Number + length(Ids)},
                lists:zip3(Ids, Numbers, Results)).


result(Kind, Target, N, ok, #sent{attempts = Attempts, accepted = Accepted, routes = Routes} = Sent) ->
    Chain = maps:get(Target, Accepted, {0, 0}),
    Sent#sent{
      attempts = Attempts + 1,
      accepted = Accepted#{Target => chain(N, Chain)},
      routes = plus(Kind, 1, Routes)
     };
result(_Kind, _Target, _N, {error, Reason}, #sent{attempts = Attempts, refused = Refused} = Sent) ->
    Sent#sent{attempts = Attempts + 1, refused = plus(Reason, 1, Refused)}.


%%% Owners


%% What is theirs, and how many changes they have made or could not make.
start_owner(Owner) ->
    spawn_link(fun() -> owner(Owner, #{}, {0, 0}) end).


owner(Owner, Owned0, {Made, NotRunning}) ->
    receive
        {stop, From} -> From ! {stop, self(), {Owned0, {Made, NotRunning}}}
    after
        1 ->
            Target = {one_of([connection, server, transport]), {owner, Owner, rand:uniform(20)}},
            case change(Target, Owned0) of
                not_running -> owner(Owner, Owned0, {Made, NotRunning + 1});
                Owned -> owner(Owner, Owned, {Made + 1, NotRunning})
            end
    end.


change({Kind, _Id} = Target, Owned) ->
    case Owned of
        #{Target := {Pid, _Binding}} -> change(rand:uniform(5), Kind, Target, Pid, Owned);
        #{} -> change(0, Kind, Target, sleeper(), Owned)
    end.


change(0, _Kind, Target, Pid, Owned) ->
    case attempt(fun() -> add(Target, Pid) end) of
        ok ->
            has(Target, Pid),
            Owned#{Target => {Pid, none}};
        not_running ->
            exit(Pid, kill),
            not_running
    end;
change(1, _Kind, Target, Pid, Owned) ->
    case attempt(fun() -> remove(Target) end) of
        ok ->
            has(Target, none),
            exit(Pid, kill),
            maps:remove(Target, Owned);
        not_running ->
            has(Target, Pid),
            not_running
    end;
change(2, _Kind, Target, Pid, Owned) ->
    killed = test_support:kill(Pid),
    has(Target, none),
    maps:remove(Target, Owned);
change(3, transport, {transport, Id} = Target, Pid, Owned) ->
    Server = one_of(servers_of_owners()),
    case attempt(fun() -> ?R:bind_transport_to_server(Id, Server) end) of
        ok -> Owned#{Target := {Pid, Server}};
        not_running -> not_running
    end;
change(4, transport, {transport, Id} = Target, Pid, Owned) ->
    case attempt(fun() -> ?R:unbind_transport(Id) end) of
        ok -> Owned#{Target := {Pid, none}};
        not_running -> not_running
    end;
change(_Others, _Kind, Target, Pid, Owned) ->
    case attempt(fun() -> add(Target, self()) end) of
        {error, already_registered} ->
            has(Target, Pid),
            Owned;
        not_running ->
            not_running
    end.


%% To which nobody broadcasts: the transports of owners take nothing.
servers_of_owners() ->
    [ {owners, N} || N <- lists:seq(1, 5) ].


add({connection, Id}, Pid) -> ?S:register_connection(Id, Pid, #{id => Id});
add({server, Id}, Pid) -> ?R:register_server(Id, Pid, #{id => Id});
add({transport, Id}, Pid) -> ?R:register_transport(Id, Pid, #{id => Id}).


remove({connection, Id}) -> ?S:unregister_connection(Id);
remove({server, Id}) -> ?R:unregister_server(Id);
remove({transport, Id}) -> ?R:unregister_transport(Id).


%% Unless nobody can tell.
has({Kind, Id} = Target, Pid) ->
    Found = attempt(fun() ->
                            case Kind of
                                connection -> ?S:lookup_connection(Id);
                                server -> ?R:find_server(Id);
                                transport -> ?R:find_transport(Id)
                            end
                    end),
    case Found of
        {ok, {Process, #{id := Id}}} -> ?assertEqual({Target, Pid}, {Target, Process});
        {error, not_found} -> ?assertEqual({Target, Pid}, {Target, none});
        not_running -> ?assertNotEqual(connection, Kind)
    end.


attempt(Change) ->
    try
        Change()
    catch
        exit:{noproc, {gen_server, call, [?R, _Request]}} -> not_running
    end.


sleeper() ->
    spawn(fun() -> receive stop -> ok end end).


%%% Tools


%% Waits until it is.
is(Expected, Look) ->
    test_support:await_value(Expected, Look, ?DEADLINE_MS).


ask(Pid, Question) ->
    Pid ! {Question, self()},
    receive
        {Question, Pid, Answer} -> Answer
    after
        ?DEADLINE_MS ->
            error({no_answer, Question, process_info(Pid)})
    end.


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
