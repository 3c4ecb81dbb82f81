%%% The contract of erlmcp_registry: what the exit of a registered process removes, and when.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_exits_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [bound/1, cast/2, instance/1, processes/1, request/2, with_peer/1]).

-define(DEADLINE_MS, 5000).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               request =>
                                   [server_ends,
                                    server_ends_for_any_reason,
                                    transport_ends,
                                    registered_again_after_the_end,
                                    dead_pid_is_registered,
                                    find_never_returns_the_dead,
                                    requests_that_overtake_the_end,
                                    new_owner_outlives_the_end_of_the_old,
                                    new_binding_outlives_the_end_of_the_old_server,
                                    registering_over_and_over_collects_no_monitors,
                                    pid_under_many_ids_ends,
                                    one_of_two_ids_unregistered_then_the_pid_ends,
                                    remote_pid_ends_with_its_node]
                              }).


init_per_group(Group, Config) ->
    registry_contract:init_per_group(Group, Config).


end_per_group(Group, Config) ->
    registry_contract:end_per_group(Group, Config).


init_per_testcase(Case, Config) ->
    registry_contract:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_contract:end_per_testcase(Case, Config).


%%% Requests


server_ends(Config) ->
    [S | _] = bound(Config),
    test_support:kill(S),
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ?assertMatch({ok, _}, request(Config, {find_transport, t})),
    ?assertEqual([], request(Config, list_servers)).


server_ends_for_any_reason(Config) ->
    lists:foreach(fun(Reason) ->
                          S = spawn(fun() -> receive {stop, Why} -> exit(Why) end end),
                          ok = request(Config, {register_server, s, S, #{}}),
                          Monitor = monitor(process, S),
                          S ! {stop, Reason},
                          receive {'DOWN', Monitor, _, _, _} -> ok end,
                          ?assertEqual({error, not_found}, request(Config, {find_server, s}))
                  end,
                  [normal, shutdown, kill, {some, error}]).


transport_ends(Config) ->
    [S, T] = bound(Config),
    test_support:kill(T),
    ?assertEqual({error, not_found}, request(Config, {find_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ?assertEqual({ok, {S, #{}}}, request(Config, {find_server, s})),
    ?assertEqual([], request(Config, list_transports)).


registered_again_after_the_end(Config) ->
    [S, T] = bound(Config),
    [S2, T2] = processes(2),
    test_support:kill(S),
    ?assertEqual(ok, request(Config, {register_server, s, S2, new})),
    ?assertEqual({ok, {S2, new}}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    test_support:kill(T),
    ?assertEqual(ok, request(Config, {register_transport, t, T2, #{}})),
    ?assertEqual({ok, {T2, #{}}}, request(Config, {find_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


dead_pid_is_registered(Config) ->
    [P] = processes(1),
    test_support:kill(P),
    ?assertEqual(ok, request(Config, {register_server, s, P, #{}})),
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertEqual(ok, request(Config, {register_transport, t, P, #{server_id => s}})),
    ?assertEqual({error, not_found}, request(Config, {find_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ?assertEqual(ok, request(Config, {register_server, s, self(), #{}})).


find_never_returns_the_dead(Config) ->
    lists:foreach(fun(N) ->
                          [P] = processes(1),
                          ok = request(Config, {register_server, N, P, #{}}),
                          ok = request(Config, {register_transport, N, P, #{server_id => N}}),
                          test_support:kill(P),
                          ?assertEqual({error, not_found}, request(Config, {find_server, N})),
                          ?assertEqual({error, not_found}, request(Config, {find_transport, N}))
                  end,
                  lists:seq(1, 500)).


%% The requests are in the mailbox before the process exits, and are handled after its exit.
requests_that_overtake_the_end(Config) ->
    [S, T] = bound(Config),
    ?assertEqual([{error, not_found}, {error, not_found}],
                 overtaken(Config, S, [{find_server, s}, {get_server_for_transport, t}])),
    [S2, S3] = processes(2),
    ok = request(Config, {register_server, s2, S2, #{}}),
    ok = request(Config, {register_server, s3, S3, #{}}),
    ?assertEqual([{error, server_not_found}],
                 overtaken(Config, S2, [{bind_transport_to_server, t, s2}])),
    ?assertEqual([{error, not_found}], overtaken(Config, S3, [{update_server, s3, #{}}])),
    ?assertEqual([{error, not_found}, {error, not_found}],
                 overtaken(Config, T, [{find_transport, t}, {get_server_for_transport, t}])).


new_owner_outlives_the_end_of_the_old(Config) ->
    [S, T] = bound(Config),
    [S2, T2] = processes(2),
    ?assertEqual([ok], overtaken(Config, S, [{register_server, s, S2, new}])),
    ?assertEqual({ok, {S2, new}}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ?assertEqual([ok], overtaken(Config, T, [{register_transport, t, T2, #{server_id => s}}])),
    ?assertEqual({ok, {T2, #{server_id => s}}}, request(Config, {find_transport, t})),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    test_support:kill(T2),
    ?assertEqual({error, not_found}, request(Config, {find_transport, t})).


%% A transport bound ahead of a server stays bound when the exit of an earlier server is noticed late.
new_binding_outlives_the_end_of_the_old_server(Config) ->
    [S, S2] = processes(2),
    ok = request(Config, {register_server, s, S, #{}}),
    ?assertEqual([ok], overtaken(Config, S, [{register_transport, t, self(), #{server_id => s}}])),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    ok = request(Config, {register_server, s, S2, #{}}),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})).


%% A registry may keep a monitor of its own, but not one for each past registration.
registering_over_and_over_collects_no_monitors(Config) ->
    [P] = processes(1),
    Monitors = fun() -> length(element(2, process_info(P, monitored_by))) end,
    Before = Monitors(),
    _ = [ begin
              ok = request(Config, {register_server, s, P, #{}}),
              ok = request(Config, {register_transport, t, P, #{server_id => s}}),
              ok = request(Config, {unregister_server, s}),
              ok = request(Config, {unregister_transport, t})
          end || _ <- lists:seq(1, 100) ],
    test_support:await(fun() -> Monitors() - Before =< 2 end, ?DEADLINE_MS).


pid_under_many_ids_ends(Config) ->
    [P, T] = processes(2),
    _ = [ ok = request(Config, {register_server, N, P, #{}}) || N <- lists:seq(1, 20) ],
    _ = [ ok = request(Config, {register_transport, N, P, #{}}) || N <- lists:seq(1, 20) ],
    ok = request(Config, {register_transport, other, T, #{server_id => 7}}),
    test_support:kill(P),
    _ = [ ?assertEqual({error, not_found}, request(Config, {Find, N}))
          || Find <- [find_server, find_transport], N <- lists:seq(1, 20) ],
    ?assertEqual([], request(Config, list_servers)),
    ?assertMatch([{other, _}], request(Config, list_transports)),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, other})).


one_of_two_ids_unregistered_then_the_pid_ends(Config) ->
    [P] = processes(1),
    ok = request(Config, {register_server, a, P, #{}}),
    ok = request(Config, {register_server, b, P, #{}}),
    ok = request(Config, {unregister_server, a}),
    ok = request(Config, {register_server, a, self(), mine}),
    ?assertEqual({ok, {P, #{}}}, request(Config, {find_server, b})),
    test_support:kill(P),
    ?assertEqual({error, not_found}, request(Config, {find_server, b})),
    ?assertEqual({ok, {self(), mine}}, request(Config, {find_server, a})).


remote_pid_ends_with_its_node(Config) ->
    with_peer(fun(Peer, Node) ->
                      Remote = erpc:call(Node, erlang, spawn, [timer, sleep, [infinity]]),
                      ok = request(Config, {register_server, s, Remote, #{r => 1}}),
                      ok = request(Config, {register_transport, t, Remote, #{server_id => s}}),
                      ?assertEqual({error, already_registered},
                                   request(Config, {register_server, s, self(), #{}})),
                      ?assertEqual({ok, {Remote, #{r => 1}}}, request(Config, {find_server, s})),
                      ?assertEqual([{s, {Remote, #{r => 1}}}], request(Config, list_servers)),
                      ?assertEqual(ok, request(Config, {update_server, s, #{r => 2}})),
                      ?assertEqual({ok, {Remote, #{r => 2}}}, request(Config, {find_server, s})),
                      ok = cast(Config, {route_to_server, s, t, hello}),
                      Messages = fun() -> erpc:call(Node, erlang, process_info, [Remote, messages]) end,
                      test_support:await_value({messages, [{mcp_message, t, hello}]}, Messages, ?DEADLINE_MS),
                      peer:stop(Peer),
                      _ = [ test_support:await_value({error, not_found},
                                                     fun() -> request(Config, Request) end,
                                                     ?DEADLINE_MS)
                            || Request <- [{find_server, s}, {get_server_for_transport, t}] ],
                      ?assertEqual(ok, request(Config, {register_server, s, self(), #{}}))
              end).


%%% Drivers


%% The answers to requests that the registry receives while Pid is alive, and handles after its exit.
overtaken(Config, Pid, Requests) ->
    Instance = instance(Config),
    ok = sys:suspend(Instance),
    Ids = [ gen_server:send_request(Instance, Request) || Request <- Requests ],
    test_support:kill(Pid),
    ok = sys:resume(Instance),
    [ begin
          {reply, Answer} = gen_server:receive_response(Id, ?DEADLINE_MS),
          Answer
      end || Id <- Ids ].
