%%% Order and load across switches of the rollout.
%%%
%%% The contract: during any number of switches no message is lost or duplicated, and messages from one process
%%% to another through the registry arrive in the order sent.
%%%
%%% ROLLOUT_SECONDS is the duration of the switches under load (5).
-module(rollout_order_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(rollout_support,
        [start_switcher/2, stop_switcher/1, rounds_under_switches/3, start_receiver/0, last_in_order/3, await/2, sleeper/0, end_all/1, now_ms/0]).

-define(MODES, [current, {percent, 40}, '100x', {percent, 80}, {percent, 20}]).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [registrations_race_a_switch,
     nothing_overtakes_what_waits_in_the_mailbox,
     broadcasts_keep_their_place,
     switches_under_load].


init_per_suite(Config) -> rollout_support:init_per_suite(Config).


end_per_suite(Config) -> rollout_support:end_per_suite(Config).


init_per_testcase(Case, Config) -> rollout_support:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) -> rollout_support:end_per_testcase(Case, Config).


%% An id is registered from many processes while modes change: exactly one of them owns it at a time.
registrations_race_a_switch(_Config) ->
    rounds_under_switches(
      200,
      ?MODES,
      fun(Round) ->
              Racers = [ spawn_monitor(fun() ->
                                               Won = erlmcp_registry:register_server({raced, Round}, self(), #{}),
                                               exit({won, Won =:= ok andalso wait_found({raced, Round})})
                                       end) || _ <- lists:seq(1, 16) ],
              Won = [ Won || {Pid, Monitor} <- Racers,
                             Won <- [receive {'DOWN', Monitor, process, Pid, {won, W}} -> W end],
                             Won =/= false ],
              ?assertMatch([_ | _], Won),
              ?assertEqual([true], lists:usort(Won)),
              %% A second process won only after the first one had exited.
              ok = await({error, not_found}, fun() -> erlmcp_registry:find_server({raced, Round}) end)
      end).


%% The mailbox is full of messages that were sent in the mode `current', and the sender goes on.
nothing_overtakes_what_waits_in_the_mailbox(_Config) ->
    %% One mailbox holds more messages than the native registry admits.
    ok = erlmcp_native:set(admission, infinity),
    [ begin
          ok = erlmcp_rollout:set(current),
          Receiver = start_receiver(),
          ok = erlmcp_registry:register_server(s, Receiver, #{}),
          ok = erlmcp_registry:register_transport(t, Receiver, #{}),
          ok = sys:suspend(erlmcp_registry),
          Sent = 20_000,
          [ ok = erlmcp_registry:route_to_server(s, me, {from, self(), N}) || N <- lists:seq(1, Sent) ],
          {Setter, Monitor} = spawn_monitor(fun() -> exit({set, erlmcp_rollout:set(Mode)}) end),
          ok = sys:resume(erlmcp_registry),
          More = send_until_set(Setter, Monitor, Sent + 1),
          [ ok = erlmcp_registry:route_to_transport(t, me, {from, self(), N}) || N <- lists:seq(More, More + 100) ],
          ?assertEqual(More + 100, last_in_order(Receiver, self(), More + 100)),
          ok = erlmcp_registry:unregister_server(s),
          ok = erlmcp_registry:unregister_transport(t),
          end_all([Receiver])
      end || Mode <- ['100x', {percent, 50}, '100x', {percent, 100}] ],
    ok = erlmcp_native:set(admission, #{threshold => auto}).


broadcasts_keep_their_place(_Config) ->
    Receivers = [ {Id, start_receiver()} || Id <- lists:seq(1, 20) ],
    ok = erlmcp_registry:register_server(s, self(), #{}),
    [ ok = erlmcp_registry:register_transport(Id, Pid, #{server_id => s}) || {Id, Pid} <- Receivers ],
    Last = rounds_under_switches(
             3000,
             ?MODES,
             fun(N) ->
                     case N rem 3 of
                         0 -> ok = erlmcp_registry:route_to_transport(broadcast, s, {from, self(), N});
                         1 -> [ ok = erlmcp_registry:route_to_transport(Id, s, {from, self(), N}) || {Id, _} <- Receivers ];
                         2 -> ok = erlmcp_registry:route_message({server, s}, {from, self(), N})
                     end
             end),
    [ ?assertEqual(Last, last_in_order(Pid, self(), Last)) || {_, Pid} <- Receivers ],
    end_all([ Pid || {_, Pid} <- Receivers ]).


%% Senders send numbered messages and processes register, bind, unregister and exit, while one switch follows
%% another: for some seconds, and until there were as many switches.
switches_under_load(_Config) ->
    Seconds = test_support:positive_integer("ROLLOUT_SECONDS", 5),
    End = now_ms() + Seconds * 1000,
    Stop = atomics:new(1, []),
    Receivers = maps:from_list([ {N, start_receiver()} || N <- lists:seq(1, 64) ]),
    maps:foreach(fun(N, Pid) ->
                         ok = erlmcp_registry:register_server({s, N}, Pid, #{number => N}),
                         ok = erlmcp_registry:register_transport({t, N}, Pid, #{server_id => {s, N}})
                 end,
                 Receivers),
    Senders = [ spawn_monitor(fun() -> exit({sent, send_numbered(#{}, #{}, map_size(Receivers), Stop)}) end)
                || _ <- lists:seq(1, 4) ],
    Owners = [ spawn_monitor(fun() -> exit({owns, own(Owner, #{}, Stop)}) end) || Owner <- lists:seq(1, 4) ],
    Switcher = start_switcher([current, {percent, 10}, {percent, 50}, '100x', current], 200),
    test_support:await(fun() -> now_ms() >= End andalso rollout_support:switches(Switcher) >= Seconds end,
                       (Seconds + 120) * 1000),
    ok = atomics:put(Stop, 1, 1),
    Sent = [ {Pid, Counts} || {Pid, _} = Sender <- Senders, {sent, Counts} <- [result(Sender)] ],
    ?assertEqual(4, length(Sent)),
    Owned = lists:append([ maps:to_list(Own) || Owner <- Owners, {owns, Own} <- [result(Owner)] ]),
    Switches = stop_switcher(Switcher),
    ct:pal("~b switches in ~b s, ~b messages, ~b registrations in the end",
           [Switches, Seconds, lists:sum([ N || {_, {Counts, _}} <- Sent, N <- maps:values(Counts) ]), length(Owned)]),
    %% No message was lost or duplicated, and all arrived in order.
    [ ?assertEqual({Number, Count}, {Number, last_in_order(maps:get(Number, Receivers), Sender, Count)})
      || {Sender, {Counts, _Refused}} <- Sent, {Number, Count} <- maps:to_list(Counts) ],
    ?assertEqual([], [ Refused || {_, {_, Refused}} <- Sent, Refused =/= #{} ]),
    %% In either store, every owner has exactly its registrations.
    Expected = lists:sort([ {{s, N}, none} || N <- maps:keys(Receivers) ] ++
                          [ {{t, N}, {s, N}} || N <- maps:keys(Receivers) ] ++
                          [ {Id, Binding} || {Id, {_Pid, Binding}} <- Owned ]),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          ?assertEqual(Expected, present())
      end || Mode <- [current, {percent, 50}, '100x'] ],
    end_all(maps:values(Receivers)).


wait_found(Id) ->
    {ok, {Pid, #{}}} = erlmcp_registry:find_server(Id),
    Pid =:= self().


send_until_set(Setter, Monitor, N) ->
    receive
        {'DOWN', Monitor, process, Setter, Reason} ->
            ?assertEqual({set, ok}, Reason),
            N
    after
        0 ->
            ok = case N rem 2 of
                     0 -> erlmcp_registry:route_to_server(s, me, {from, self(), N});
                     1 -> erlmcp_registry:route_to_transport(t, me, {from, self(), N})
                 end,
            send_until_set(Setter, Monitor, N + 1)
    end.


%% The result that a process exited with. A process that crashed has an error as its result.
result({Pid, Monitor}) ->
    receive
        {'DOWN', Monitor, process, Pid, {Kind, _} = Result} when Kind =:= sent; Kind =:= owns -> Result;
        {'DOWN', Monitor, process, Pid, Reason} -> error({ended, Reason})
    end.


%% Servers with `none', and transports with their bindings.
present() ->
    lists:sort([ {Id, none} || {Id, _} <- erlmcp_registry:list_servers() ] ++
               [ {Id,
                  case erlmcp_registry:get_server_for_transport(Id) of
                      {ok, Server} -> Server;
                      {error, not_found} -> unbound
                  end} || {Id, _} <- erlmcp_registry:list_transports() ]).


send_numbered(Counts0, Refused0, Receivers, Stop) ->
    ok = keep_pace(),
    Number = rand:uniform(Receivers),
    N = maps:get(Number, Counts0, 0) + 1,
    Content = {from, self(), N},
    Result = case rand:uniform(3) of
                 1 -> erlmcp_registry:route_to_server({s, Number}, {t, Number}, Content);
                 2 -> erlmcp_registry:route_to_transport({t, Number}, {s, Number}, Content);
                 3 -> erlmcp_registry:route_to_transport(broadcast, {s, Number}, Content)
             end,
    {Counts, Refused} =
        case Result of
            ok -> {Counts0#{Number => N}, Refused0};
            {error, Reason} -> {Counts0, maps:update_with(Reason, fun(R) -> R + 1 end, 1, Refused0)}
        end,
    case atomics:get(Stop, 1) of
        1 -> {Counts, Refused};
        0 -> send_numbered(Counts, Refused, Receivers, Stop)
    end.


%% The pure-Erlang registry accepts any number of messages, and requests time out behind a long queue.
keep_pace() ->
    case erlmcp_registry:get_queue_depth() > 1_000 of
        true ->
            timer:sleep(1),
            keep_pace();
        false ->
            ok
    end.


%% Registers, binds and removes the owner's own transports, and returns those that must be left. Their servers
%% stay alive, so that their bindings are known.
own(Owner, Own0, Stop) ->
    Id = {owner, Owner, rand:uniform(50)},
    Server = {s, rand:uniform(64)},
    Own = case Own0 of
              #{Id := {Pid, _}} ->
                  case rand:uniform(5) of
                      1 ->
                          ok = erlmcp_registry:unregister_transport(Id),
                          exit(Pid, kill),
                          maps:remove(Id, Own0);
                      2 ->
                          test_support:kill(Pid),
                          {error, not_found} = erlmcp_registry:find_transport(Id),
                          maps:remove(Id, Own0);
                      3 ->
                          ok = erlmcp_registry:bind_transport_to_server(Id, Server),
                          {ok, Server} = erlmcp_registry:get_server_for_transport(Id),
                          Own0#{Id := {Pid, Server}};
                      4 ->
                          ok = erlmcp_registry:unbind_transport(Id),
                          Own0#{Id := {Pid, unbound}};
                      5 ->
                          {ok, {Pid, Id}} = erlmcp_registry:find_transport(Id),
                          {error, already_registered} = erlmcp_registry:register_transport(Id, self(), taken),
                          Own0
                  end;
              _ ->
                  Pid = sleeper(),
                  ok = erlmcp_registry:register_transport(Id, Pid, Id),
                  {ok, {Pid, Id}} = erlmcp_registry:find_transport(Id),
                  Own0#{Id => {Pid, unbound}}
          end,
    case atomics:get(Stop, 1) of
        1 -> Own;
        0 -> own(Owner, Own, Stop)
    end.
