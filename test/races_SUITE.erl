%% The races that a registry without a lock must handle correctly, one per case. Every case bounds its own time,
%% checks the state that must hold after the race, and, where possible, that the race did occur.
-module(races_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-define(DEADLINE_MS, 20000).


all() ->
    [same_id_registered_from_16_processes,
     death_during_registration,
     unregister_against_down,
     bind_against_unregister_of_the_server,
     bind_against_unregister_of_the_transport,
     bind_against_death_of_the_server,
     automatic_binding_against_end_of_the_server,
     update_server_against_death,
     registry_killed_and_adopted_under_load,
     orderly_stop_against_registration,
     close_against_registration_of_one_process,
     equal_configs_come_and_go_while_their_table_grows,
     pid_under_many_ids_dies,
     hundred_thousand_die_at_once,
     readers_during_table_growth,
     broadcast_during_binding_changes,
     dangling_names_do_not_leak,
     monitored_by_is_asked_while_entries_go].


init_per_testcase(_Case, Config) ->
    start(),
    Config.


end_per_testcase(_Case, _Config) ->
    is_pid(whereis(erlmcp_registry)) andalso gen_server:stop(erlmcp_registry),
    test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end, ?DEADLINE_MS),
    Left = fun() ->
                   #{servers := S, transports := T} = erlmcp_shard_registry:stats(),
                   S + T
           end,
    test_support:await_value(0, Left, ?DEADLINE_MS).


%% Goes on until not always the same contender has won.
same_id_registered_from_16_processes(_Config) ->
    Won = ets:new(won, [set]),
    test_support:await(fun() ->
                               [ ets:insert(Won, {winner({id, Round})}) || Round <- lists:seq(1, 2000) ],
                               ets:info(Won, size) > 1
                       end,
                       ?DEADLINE_MS).


winner(Id) ->
    Self = self(),
    Results = test_support:at_once(16, fun(N) -> {erlmcp_shard_registry:register_connection(Id, Self, N), N} end),
    [Winner] = [ N || {ok, N} <- Results ],
    ?assertEqual(15, length([ x || {{error, already_registered}, _} <- Results ])),
    ?assertEqual({ok, {Self, Winner}}, erlmcp_shard_registry:lookup_connection(Id)),
    ok = erlmcp_shard_registry:unregister_connection(Id),
    Winner.


%% A process is killed while it registers itself, or while another process registers it.
death_during_registration(_Config) ->
    Died = [ begin
                 Victim = spawn(fun() ->
                                        erlmcp_shard_registry:register_connection({self, N}, self(), x),
                                        timer:sleep(infinity)
                                end),
                 spin(N rem 200),
                 exit(Victim, kill),
                 ok = erlmcp_shard_registry:register_connection({other, N}, Victim, x),
                 Victim
             end || N <- lists:seq(1, 20000) ],
    _ = [ test_support:await_end(Pid) || Pid <- Died ],
    test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end, ?DEADLINE_MS).


%% The exit of the old process never removes a new registration of the same id.
unregister_against_down(_Config) ->
    lists:foreach(
      fun(N) ->
              Old = spawn(fun() -> receive go -> ok end end),
              ok = erlmcp_registry:register_server(s, Old, N),
              Old ! go,
              spin(N rem 100),
              ok = erlmcp_registry:unregister_server(s),
              ok = erlmcp_registry:register_server(s, self(), N),
              test_support:await_end(Old),
              ?assertEqual({ok, {self(), N}}, erlmcp_registry:find_server(s)),
              ok = erlmcp_registry:unregister_server(s)
      end,
      lists:seq(1, 10000)).


bind_against_unregister_of_the_server(_Config) ->
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    Outcomes = [ begin
                     ok = erlmcp_registry:register_server(s, self(), #{}),
                     [Bound, ok] = side_by_side(N,
                                                fun() -> erlmcp_registry:bind_transport_to_server(t, s) end,
                                                fun() -> erlmcp_registry:unregister_server(s) end),
                     ?assertEqual({error, not_found}, erlmcp_registry:get_server_for_transport(t)),
                     ok = erlmcp_registry:register_server(s, self(), #{}),
                     ?assertEqual({error, not_found}, erlmcp_registry:get_server_for_transport(t)),
                     ok = erlmcp_registry:unregister_server(s),
                     Bound
                 end || N <- lists:seq(1, 10000) ],
    assert_both([ok, {error, server_not_found}], Outcomes).


bind_against_unregister_of_the_transport(_Config) ->
    ok = erlmcp_registry:register_server(s, self(), #{}),
    Outcomes = [ begin
                     ok = erlmcp_registry:register_transport(t, self(), #{}),
                     [Bound, ok] = side_by_side(N,
                                                fun() -> erlmcp_registry:bind_transport_to_server(t, s) end,
                                                fun() -> erlmcp_registry:unregister_transport(t) end),
                     ok = erlmcp_registry:register_transport(t, self(), #{}),
                     ?assertEqual({error, not_found}, erlmcp_registry:get_server_for_transport(t)),
                     ok = erlmcp_registry:unregister_transport(t),
                     Bound
                 end || N <- lists:seq(1, 10000) ],
    assert_both([ok, {error, transport_not_found}], Outcomes),
    ?assertEqual({ok, {registry_state, #{}}}, erlmcp_registry:get_all_state()).


bind_against_death_of_the_server(_Config) ->
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    Outcomes = [ begin
                     Server = spawn(fun() -> receive go -> ok end end),
                     ok = erlmcp_registry:register_server(s, Server, #{}),
                     [Bound, _] = side_by_side(N,
                                               fun() -> erlmcp_registry:bind_transport_to_server(t, s) end,
                                               fun() -> Server ! go end),
                     test_support:await_end(Server),
                     ?assertEqual({error, not_found}, erlmcp_registry:get_server_for_transport(t)),
                     Bound
                 end || N <- lists:seq(1, 10000) ],
    assert_both([ok, {error, server_not_found}], Outcomes).


%% Either the binding existed when the server exited, and was removed with it; or it was made after the exit and
%% waits for the next server of that name.
automatic_binding_against_end_of_the_server(_Config) ->
    Outcomes = [ begin
                     Server = spawn(fun() -> receive go -> ok end end),
                     ok = erlmcp_registry:register_server(s, Server, #{}),
                     [ok, _] = side_by_side(N,
                                            fun() ->
                                                    erlmcp_registry:register_transport(t, self_parent(), #{server_id => s})
                                            end,
                                            fun() -> Server ! go end),
                     test_support:await_end(Server),
                     Bound = erlmcp_registry:get_server_for_transport(t),
                     Expected = [ {mcp_response, s, N} || Bound =:= {ok, s} ],
                     ok = erlmcp_registry:route_to_transport(broadcast, s, N),
                     ?assertEqual(Expected, flush()),
                     ok = erlmcp_registry:unregister_transport(t),
                     Bound
                 end || N <- begin put(parent, self()), lists:seq(1, 10000) end ],
    assert_both([{ok, s}, {error, not_found}], Outcomes),
    %% The registry's monitor may fire later than this process's.
    test_support:await_value(0, fun() -> maps:get(servers, erlmcp_shard_registry:stats()) end).


update_server_against_death(_Config) ->
    lists:foreach(
      fun(N) ->
              Server = spawn(fun() -> receive go -> ok end end),
              ok = erlmcp_registry:register_server(s, Server, 0),
              [Updated, _] = side_by_side(N,
                                          fun() -> erlmcp_registry:update_server(s, N) end,
                                          fun() -> Server ! go end),
              ?assert(lists:member(Updated, [ok, {error, not_found}])),
              test_support:await_end(Server),
              ?assertEqual({error, not_found}, erlmcp_registry:find_server(s)),
              test_support:await(fun() -> [] =:= erlmcp_registry:list_servers() end, ?DEADLINE_MS)
      end,
      lists:seq(1, 5000)).


%% Routes go on while the registry's process is killed and restarted: no message is lost, and the order of each
%% sender is kept.
registry_killed_and_adopted_under_load(_Config) ->
    Senders = 4,
    Receiver = spawn_link(fun() -> collect(#{}) end),
    ok = erlmcp_registry:register_server(s, Receiver, #{}),
    Running = [ spawn_monitor(fun() -> send_numbers(Sender, 1) end) || Sender <- lists:seq(1, Senders) ],
    lists:foreach(fun(_) ->
                          killed = test_support:kill(whereis(erlmcp_registry)),
                          start(),
                          ?assertMatch({ok, {Receiver, #{}}}, erlmcp_registry:find_server(s))
                  end,
                  lists:seq(1, 200)),
    _ = [ Pid ! {stop, self()} || {Pid, _} <- Running ],
    Sent = [ receive {sent, Sender, Last} -> {Sender, Last} end || _ <- Running ],
    Receiver ! {report, self()},
    Received = receive {received, Map} -> Map end,
    ?assertEqual(maps:from_list(Sent), Received),
    ?assert(lists:all(fun({_, Last}) -> Last > 200 end, Sent)),
    unlink(Receiver),
    exit(Receiver, kill).


send_numbers(Sender, N) ->
    ok = erlmcp_registry:route_to_server(s, Sender, N),
    receive
        {stop, From} -> From ! {sent, Sender, N}
    after
        0 ->
            send_numbers(Sender, N + 1)
    end.


%% Keeps the last number of each sender, which must be consecutive.
collect(Last) ->
    receive
        {mcp_message, Sender, N} ->
            N = maps:get(Sender, Last, 0) + 1,
            collect(Last#{Sender => N});
        {report, From} ->
            % Received after all messages that were sent before it.
            From ! {received, Last}
    end.


%% A registration that races with the stop of the registry is either cleared or refused.
orderly_stop_against_registration(_Config) ->
    Self = self(),
    Refused = [ begin
                    Loop = spawn_link(fun() -> register_until_refused(Self, 0) end),
                    spin(5000),
                    ok = gen_server:stop(erlmcp_registry),
                    Registered = receive {refused, Loop, Count} -> Count end,
                    #{servers := 0, transports := 0} = erlmcp_shard_registry:stats(),
                    start(),
                    ?assertEqual([], erlmcp_registry:list_servers()),
                    Registered
                end || _ <- lists:seq(1, 300) ],
    ?assert(lists:sum(Refused) > 300).


register_until_refused(Parent, Count) ->
    try erlmcp_registry:register_server({s, Count}, Parent, #{}) of
        ok -> register_until_refused(Parent, Count + 1)
    catch
        %% `normal': the call had reached the process before it stopped, as with any gen_server.
        exit:{Reason, {gen_server, call, [erlmcp_registry, {register_server, {s, Count}, Parent, #{}}]}}
          when Reason =:= noproc; Reason =:= normal ->
            Parent ! {refused, self(), Count}
    end.


%% A process that was registered while the registry was being closed still has a monitor for each later
%% registration: when it exits, all its entries are removed.
close_against_registration_of_one_process(_Config) ->
    Registry = erlmcp_nif:new(4, 100000, 65535),
    Pid = spawn(fun() -> timer:sleep(infinity) end),
    Outcomes = counters:new(2, []),
    Registrars = [ spawn_link(fun() -> register_until_told(Registry, Pid, Outcomes, N, 0) end) || N <- [1, 2] ],
    close_and_open(Registry, Outcomes, erlang:monotonic_time(millisecond) + 3000),
    _ = [ begin
              Registrar ! {stop, self()},
              receive {stopped, Registrar} -> ok end
          end || Registrar <- Registrars ],
    [] = erlmcp_nif:close(Registry),
    ?assertEqual(0, erlmcp_nif:count(Registry, transport)),
    ct:log("registered ~b, refused ~b", [counters:get(Outcomes, 1), counters:get(Outcomes, 2)]),
    ?assert(counters:get(Outcomes, 1) > 0),
    ?assert(counters:get(Outcomes, 2) > 0),
    Other = erlmcp_nif:new(4, 100000, 65535),
    _ = [ ok = erlmcp_nif:register(Other, transport, I, Pid, Pid, #{}) || I <- lists:seq(1, 5000) ],
    killed = test_support:kill(Pid),
    test_support:await_value(0, fun() -> erlmcp_nif:count(Other, transport) end, ?DEADLINE_MS).


close_and_open(Registry, Outcomes, End) ->
    Now = erlang:monotonic_time(millisecond),
    case Now > End andalso (counters:get(Outcomes, 2) > 0 orelse Now > End + ?DEADLINE_MS) of
        true ->
            ok;
        false ->
            [] = erlmcp_nif:close(Registry),
            ok = erlmcp_nif:open(Registry),
            close_and_open(Registry, Outcomes, End)
    end.


register_until_told(Registry, Pid, Outcomes, N, I) ->
    case erlmcp_nif:register(Registry, transport, {N, I rem 50}, Pid, Pid, #{}) of
        ok -> counters:add(Outcomes, 1, 1);
        registry_closed -> counters:add(Outcomes, 2, 1);
        {already_registered, Pid} -> ok
    end,
    receive
        {stop, From} -> From ! {stopped, self()}
    after
        0 ->
            register_until_told(Registry, Pid, Outcomes, N, I + 1)
    end.


%% The last user of a config is removed while another one inserts an equal config, and other configs make the
%% table grow. When all users are gone, so are the configs. The registry is dropped before the configs are
%% counted, because removed entries are freed some operations later.
equal_configs_come_and_go_while_their_table_grows(_Config) ->
    Before = erlmcp_nif:distinct_configs(),
    [Rounds] = test_support:at_once(1, fun(_) -> keep_equal_configs(3000) end),
    ct:log("rounds ~w", [Rounds]),
    ?assert(lists:all(fun(Round) -> Round > 10 end, Rounds)),
    %% The count may be lower, because garbage of earlier cases may be freed meanwhile.
    test_support:await(fun() -> erlmcp_nif:distinct_configs() =< Before end, ?DEADLINE_MS).


keep_equal_configs(Ms) ->
    Registry = erlmcp_nif:new(4, 1000000, 65535),
    End = erlang:monotonic_time(millisecond) + Ms,
    Rounds = test_support:at_once(4,
                                  fun(N) when N =< 3 -> come_and_go(Registry, N, 0, End);
                                     (_) -> grow(Registry, 0, End)
                                  end),
    0 = erlmcp_nif:count(Registry, connection),
    Rounds.


come_and_go(Registry, N, Round, End) ->
    ok = erlmcp_nif:register(Registry, connection, {equal, N}, self(), self(), {equal, Round rem 3}),
    ok = erlmcp_nif:unregister(Registry, connection, {equal, N}),
    case erlang:monotonic_time(millisecond) > End of
        true -> Round;
        false -> come_and_go(Registry, N, Round + 1, End)
    end.


grow(Registry, Round, End) ->
    Ids = lists:seq(1, 200),
    _ = [ ok = erlmcp_nif:register(Registry, connection, {other, I}, self(), self(), {Round, I}) || I <- Ids ],
    _ = [ ok = erlmcp_nif:unregister(Registry, connection, {other, I}) || I <- Ids ],
    case erlang:monotonic_time(millisecond) > End of
        true -> Round;
        false -> grow(Registry, Round + 1, End)
    end.


pid_under_many_ids_dies(_Config) ->
    Pid = spawn(fun() -> timer:sleep(infinity) end),
    _ = [ begin
              ok = erlmcp_registry:register_server(N, Pid, #{}),
              ok = erlmcp_registry:register_transport(N, Pid, #{server_id => N div 2}),
              ok = erlmcp_shard_registry:register_connection(N, Pid, N)
          end || N <- lists:seq(1, 10000) ],
    killed = test_support:kill(Pid),
    Left = fun() ->
                   #{servers := S, transports := T, connections := C} = erlmcp_shard_registry:stats(),
                   S + T + C
           end,
    test_support:await_value(0, Left, ?DEADLINE_MS),
    ?assertEqual({ok, {registry_state, #{}}}, erlmcp_registry:get_all_state()).


hundred_thousand_die_at_once(_Config) ->
    N = 100000,
    Group = spawn(fun() -> timer:sleep(infinity) end),
    _ = [ begin
              Pid = spawn_opt(fun() -> _ = link(Group), timer:sleep(infinity) end, [{min_heap_size, 10}]),
              ok = erlmcp_shard_registry:register_connection({c, I}, Pid, #{})
          end || I <- lists:seq(1, N) ],
    ?assertEqual(N, erlmcp_shard_registry:count()),
    ?assertEqual(N, length(lists:append([ erlmcp_shard_registry:list_connections(S) || S <- lists:seq(0, 63) ]))),
    Before = erlang:monotonic_time(millisecond),
    exit(Group, kill),
    test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end, ?DEADLINE_MS),
    ct:log("clean after ~b ms", [erlang:monotonic_time(millisecond) - Before]),
    ?assertEqual([], lists:append([ erlmcp_shard_registry:list_connections(S) || S <- lists:seq(0, 63) ])).


readers_during_table_growth(_Config) ->
    Self = self(),
    Permanent = lists:seq(1, 1000),
    _ = [ ok = erlmcp_shard_registry:register_connection({permanent, I}, Self, I) || I <- Permanent ],
    Rounds = counters:new(1, []),
    Reader = spawn_link(fun() -> read_until_told(Permanent, Self, Rounds) end),
    Passed = register_until_read(1, Rounds),
    Reader ! {stop, Self},
    receive {stopped, Reader} -> ok end,
    _ = [ erlmcp_shard_registry:unregister_connection({passing, I}) || I <- lists:seq(1, Passed) ],
    ?assertEqual(1000, erlmcp_shard_registry:count()),
    _ = [ erlmcp_shard_registry:unregister_connection({permanent, I}) || I <- Permanent ],
    ok.


%% Registers at least 100,000 connections, and continues until the reader has completed more than three passes.
register_until_read(I, Rounds) ->
    ok = erlmcp_shard_registry:register_connection({passing, I}, self(), I),
    I rem 3 =:= 0 andalso erlmcp_shard_registry:unregister_connection({passing, I}),
    case I >= 100000 andalso (I >= 1000000 orelse counters:get(Rounds, 1) > 3) of
        true ->
            ?assert(counters:get(Rounds, 1) > 3),
            I;
        false ->
            register_until_read(I + 1, Rounds)
    end.


read_until_told(Permanent, Pid, Rounds) ->
    _ = [ Pid = erlmcp_shard_registry:whereis_connection({permanent, I}) || I <- Permanent ],
    Listed = [ I || S <- lists:seq(0, 63), {{permanent, I}, _} <- erlmcp_shard_registry:list_connections(S) ],
    Permanent = lists:sort(Listed),
    counters:add(Rounds, 1, 1),
    receive
        {stop, From} -> From ! {stopped, self()}
    after
        0 ->
            read_until_told(Permanent, Pid, Rounds)
    end.


%% A transport that is bound throughout receives every message exactly once, in order.
broadcast_during_binding_changes(_Config) ->
    Self = self(),
    ok = erlmcp_registry:register_server(s, Self, #{}),
    ok = erlmcp_registry:register_server(other, Self, #{}),
    Permanent = [ spawn_link(fun() -> gather([]) end) || _ <- lists:seq(1, 50) ],
    _ = [ ok = erlmcp_registry:register_transport(P, P, #{server_id => s}) || P <- Permanent ],
    Sink = spawn_link(fun() -> sink() end),
    _ = [ ok = erlmcp_registry:register_transport({passing, I}, Sink, #{}) || I <- lists:seq(1, 20) ],
    Changes = counters:new(1, []),
    Changer = spawn_link(fun() -> change_bindings(Changes) end),
    Last = broadcast_until_changed(1, Changes),
    test_support:stop(Changer),
    Expected = [ {mcp_response, s, N} || N <- lists:seq(1, Last) ],
    _ = [ begin
              P ! {report, Self},
              receive {gathered, P, Got} -> ?assertEqual(Expected, Got) end,
              unlink(P),
              exit(P, kill)
          end || P <- Permanent ],
    unlink(Sink),
    exit(Sink, kill).


%% At least 3,000 broadcasts, and as many more as it takes until more than twenty changes have been made.
broadcast_until_changed(N, Changes) ->
    ok = erlmcp_registry:route_to_transport(broadcast, s, N),
    case N >= 3_000 andalso (N >= 1_000_000 orelse counters:get(Changes, 1) > 20) of
        true ->
            ?assert(counters:get(Changes, 1) > 20),
            N;
        false ->
            broadcast_until_changed(N + 1, Changes)
    end.


change_bindings(Changes) ->
    _ = [ begin
              ok = erlmcp_registry:bind_transport_to_server({passing, I}, s),
              ok = erlmcp_registry:bind_transport_to_server({passing, I}, other),
              ok = erlmcp_registry:unbind_transport({passing, I})
          end || I <- lists:seq(1, 20) ],
    ok = counters:add(Changes, 1, 1),
    receive
        stop -> ok
    after
        0 ->
            change_bindings(Changes)
    end.


dangling_names_do_not_leak(_Config) ->
    Parent = self(),
    _ = test_support:at_once(8,
                             fun(N) ->
                                     _ = [ begin
                                               T = {t, N, I rem 5},
                                               _ = erlmcp_registry:register_transport(T, Parent, #{server_id => {s, I rem 3}}),
                                               _ = erlmcp_registry:bind_transport_to_server(T, {s, 4}),
                                               _ = I rem 2 =:= 0 andalso
                                                   erlmcp_registry:restore_state({registry_state, #{T => {s, 1}}}),
                                               ok = erlmcp_registry:unregister_transport(T)
                                           end || I <- lists:seq(1, 500) ]
                             end),
    ?assertEqual([], erlmcp_registry:list_transports()),
    ?assertEqual({ok, {registry_state, #{}}}, erlmcp_registry:get_all_state()),
    % No transport is bound to the names, so a server that is registered under one has no transports.
    _ = [ begin
              ok = erlmcp_registry:register_server({s, I}, Parent, #{}),
              ok = erlmcp_registry:route_to_transport(broadcast, {s, I}, lost)
          end || I <- lists:seq(0, 4) ],
    ?assertEqual([], flush()).


%% OTP 25 crashes if `monitored_by' meets a resource that was freed after its monitor was removed. The case runs
%% in a peer node, because the crash would end the whole node.
monitored_by_is_asked_while_entries_go(_Config) ->
    Rounds = test_support:in_peer(?MODULE, register_and_unregister, [2000], #{timeout_ms => 30_000}),
    ?assert(Rounds > 1000, Rounds).


register_and_unregister(Ms) ->
    Pid = spawn(fun() -> timer:sleep(infinity) end),
    Observer = spawn(fun() -> observe(Pid) end),
    Registry = erlmcp_shard_registry:new(),
    Rounds = register_until(Registry, Pid, 0, erlang:monotonic_time(millisecond) + Ms),
    exit(Observer, kill),
    {monitored_by, Monitors} = process_info(Pid, monitored_by),
    % Successive registrations of one process need one monitor.
    1 = length(Monitors),
    Rounds.


register_until(Registry, Pid, Round, End) ->
    ok = erlmcp_shard_registry:register_connection(Registry, Round, Pid, #{}),
    ok = erlmcp_shard_registry:unregister_connection(Registry, Round),
    case erlang:monotonic_time(millisecond) > End of
        true -> Round;
        false -> register_until(Registry, Pid, Round + 1, End)
    end.


observe(Pid) ->
    _ = process_info(Pid, monitored_by),
    observe(Pid).


%%% Instruments


start() ->
    {Pid, Monitor} = spawn_monitor(fun() ->
                                           {ok, Registry} = erlmcp_registry:start_link(),
                                           unlink(Registry)
                                   end),
    receive {'DOWN', Monitor, process, Pid, Reason} -> normal = Reason end.


%% Runs two funs concurrently; which one is delayed, and by how much, varies with the round.
side_by_side(Round, First, Second) ->
    Parent = self(),
    Offset = 1 bsl (Round div 2 rem 17),
    {Before, After} = case Round rem 2 of
                          0 -> {0, Offset};
                          1 -> {Offset, 0}
                      end,
    Other = spawn_link(fun() ->
                               put(parent, Parent),
                               Parent ! {self(), ready},
                               receive go -> ok end,
                               spin(Before),
                               Parent ! {self(), First()}
                       end),
    receive {Other, ready} -> ok end,
    Other ! go,
    spin(After),
    Result = Second(),
    receive {Other, FirstResult} -> [FirstResult, Result] end.


self_parent() ->
    get(parent).


spin(0) -> ok;
spin(N) -> spin(N - 1).


assert_both(Possible, Outcomes) ->
    Counts = [ {P, length([ x || O <- Outcomes, O =:= P ])} || P <- Possible ],
    ct:log("~p", [Counts]),
    ?assertEqual(length(Outcomes), lists:sum([ C || {_, C} <- Counts ])),
    ?assert(lists:all(fun({_, C}) -> C > 0 end, Counts)).


flush() ->
    receive {mcp_response, _, _} = Message -> [Message | flush()] after 0 -> [] end.


gather(Got) ->
    receive
        {report, From} -> From ! {gathered, self(), lists:reverse(Got)};
        Message -> gather([Message | Got])
    end.


sink() ->
    receive _ -> sink() end.
