%% The contract of erlmcp_registry, case by case, for the native and for the pure-Erlang registry.
%%
%% `current', `mixed' and `verified' are erlmcp_registry in other modes of the rollout: by the process
%% alone, half of the ids by either registry, and all of them natively with the other one kept equal.
%%
%% The cases of the groups `..._api' call the module's functions on the named instance; those of
%% `..._raw' send the same requests to an anonymous instance. A case is written once, in terms of
%% requests: request/2 makes a function call or a gen_server call of it. What concerns the module or
%% the process as such is in `..._module'.
-module(erlmcp_registry_contract_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(DEADLINE_MS, 5000).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    [ {Group, [], cases(How)}
      || {Group, How} <- [{native_api, request},
                          {native_raw, request},
                          {native_module, module},
                          {current_api, request},
                          {current_raw, request},
                          {current_module, module},
                          {mixed_api, request},
                          {mixed_module, module},
                          {verified_api, request},
                          {classic_api, request},
                          {classic_raw, request},
                          {classic_module, module}] ].


cases(request) ->
    [registered_is_found,
     config_is_returned_verbatim,
     config_that_is_no_map,
     ids_are_compared_exactly,
     same_id_for_server_and_transport,
     taken_id,
     taken_id_of_the_same_pid,
     unknown_is_not_found,
     lists,
     unregister_unknown,
     unregister_server_keeps_transports,
     unregister_server_ends_bindings,
     unregister_unknown_server_keeps_dangling_bindings,
     unregister_transport_ends_binding,
     bind_checks_server_first,
     bind_unknown_transport,
     rebinding_overwrites,
     later_binds_do_not_show_in_the_config,
     unbind,
     automatic_binding,
     automatic_binding_to_a_server_to_come,
     server_id_undefined_is_unbound,
     bound_to_the_id_undefined,
     server_ends,
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
     unregister_does_not_purge_a_later_binding,
     update_server_keeps_pid_bindings_and_monitor,
     update_unknown_server,
     route_to_server,
     route_to_server_checks_neither_transport_nor_binding,
     route_to_transport,
     route_to_transport_checks_no_server,
     route_to_unknown_ids,
     broadcast_reaches_the_bound_and_no_others,
     broadcast_to_a_server_to_come,
     broadcast_to_nobody,
     transport_named_broadcast_cannot_be_reached,
     order_of_one_sender,
     all_state_and_restore,
     restore_leaves_out_unknown_transports,
     restore_invalid_state,
     remote_pid_ends_with_its_node];
cases(module) ->
    [exports,
     second_start_link,
     not_a_pid_is_a_function_clause,
     raw_not_a_pid_is_a_badarg,
     unknown_requests_casts_and_messages,
     exit_signals_of_others_are_ignored,
     not_running,
     stop_clears,
     shutdown_by_the_parent_clears,
     killed_and_restarted_adopts,
     killed_and_restarted_adopts_the_latest,
     killed_again_and_again,
     killed_server_process_while_down,
     anonymous_instances_are_isolated,
     anonymous_instance_stops,
     works_without_the_application,
     route_message_to_a_server,
     route_message_to_a_transport,
     route_message_to_a_transport_named_broadcast,
     order_of_all_routes,
     pid_and_queue_depth,
     servers,
     graceful_shutdown_asks_everybody,
     format_status_shows_no_configs,
     unknown_route_is_logged_rarely,
     unlogged_routes_are_counted,
     local_scope,
     other_scopes_are_a_function_clause,
     global_scope,
     global_scope_of_one_node,
     global_end_race,
     names,
     normalized_names,
     modules_and_tables_of_the_host,
     same_pid_can_be_ok].


init_per_group(Group, Config) ->
    [Backend, How] = string:split(atom_to_list(Group), "_"),
    {Module, Mode} = case Backend of
                         "classic" -> {erlmcp_registry_classic, '100x'};
                         "native" -> {erlmcp_registry, '100x'};
                         "current" -> {erlmcp_registry, current};
                         "mixed" -> {erlmcp_registry, {percent, 50}};
                         "verified" -> {erlmcp_registry, {percent, 100}}
                     end,
    undefined = whereis(erlmcp_registry),
    ok = erlmcp_rollout:set(Mode),
    [{module, Module}, {mode, Mode}, {how, list_to_atom(How)} | Config].


%% The plan is that of the last process, until the next one.
end_per_group(_Group, _Config) ->
    ok = erlmcp_rollout:set('100x'),
    {ok, Pid} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = await_mode('100x'),
    ok = gen_server:stop(Pid),
    application:unset_env(erlmcp_native, architecture_version).


%% A process switches to the mode after its start.
await_mode(Mode) ->
    case erlmcp_rollout:status() of
        #{mode := Mode, switching_to := none} -> ok;
        #{switching_to := Mode} -> await_mode(Mode)
    end.


%% Every case has an instance of its own, which has ended when the next one begins.
init_per_testcase(_Case, Config) ->
    Module = module(Config),
    Instance = case proplists:get_value(how, Config) of
                   raw ->
                       {ok, Pid} = gen_server:start(Module, [], []),
                       Pid;
                   _ when Module =:= erlmcp_registry ->
                       Named = start(Module),
                       ok = await_mode(proplists:get_value(mode, Config)),
                       Named;
                   _ ->
                       start(Module)
               end,
    [{instance, Instance} | Config].


end_per_testcase(_Case, Config) ->
    Module = module(Config),
    _ = [ gen_server:stop(Pid) || Pid <- [proplists:get_value(instance, Config), whereis(Module)],
                                  is_pid(Pid),
                                  is_process_alive(Pid) ],
    application:unset_env(erlmcp_native, same_pid),
    ok.


%%% Requests


registered_is_found(Config) ->
    [A, B] = processes(2),
    ok = request(Config, {register_server, s, A, #{a => 1}}),
    ok = request(Config, {register_transport, t, B, #{b => 2}}),
    ?assertEqual({ok, {A, #{a => 1}}}, request(Config, {find_server, s})),
    ?assertEqual({ok, {B, #{b => 2}}}, request(Config, {find_transport, t})).


config_is_returned_verbatim(Config) ->
    Table = ets:new(table, []),
    Configs = [#{},
               #{1 => 1.0, nested => #{list => [1, 2 | 3]}},
               #{binary => binary:copy(<<7>>, 5000)},
               #{pid => self(), ref => make_ref(), table => Table, f => fun(X) -> X end},
               #{big => lists:seq(1, 20000)},
               maps:from_list([ {N, N} || N <- lists:seq(1, 100) ])],
    lists:foreach(fun(C) ->
                          ok = request(Config, {register_server, s, self(), C}),
                          ?assertEqual({ok, {self(), C}}, request(Config, {find_server, s})),
                          ?assertEqual([{s, {self(), C}}], request(Config, list_servers)),
                          ok = request(Config, {unregister_server, s})
                  end,
                  Configs).


config_that_is_no_map(Config) ->
    lists:foreach(
      fun(C) ->
              ok = request(Config, {register_server, {s, C}, self(), C}),
              ok = request(Config, {register_transport, {t, C}, self(), C}),
              ?assertEqual({ok, {self(), C}}, request(Config, {find_server, {s, C}})),
              ?assertEqual({ok, {self(), C}}, request(Config, {find_transport, {t, C}})),
              ?assertEqual({error, not_found},
                           request(Config, {get_server_for_transport, {t, C}}))
      end,
      [undefined, [], [{server_id, s}], <<"x">>, 17, {server_id, s}, -0.5]).


ids_are_compared_exactly(Config) ->
    Ids = [1,
           1.0,
           <<"1">>,
           "1",
           '1',
           {1},
           {1.0},
           [1],
           [1.0],
           #{1 => 1},
           #{1.0 => 1},
           <<1:1>>,
           [],
           {},
           #{},
           1 bsl 80,
           self(),
           make_ref(),
           [a | b],
           <<>>,
           <<"1", 0>>],
    lists:foreach(fun({N, Id}) -> ok = request(Config, {register_server, Id, self(), N}) end,
                  lists:enumerate(Ids)),
    lists:foreach(fun({N, Id}) ->
                          ?assertEqual({ok, {self(), N}}, request(Config, {find_server, Id}))
                  end,
                  lists:enumerate(Ids)),
    Expected = maps:from_list([ {Id, {self(), N}} || {N, Id} <- lists:enumerate(Ids) ]),
    ?assertEqual(Expected, maps:from_list(request(Config, list_servers))).


same_id_for_server_and_transport(Config) ->
    [A, B] = processes(2),
    ok = request(Config, {register_server, x, A, #{}}),
    ok = request(Config, {register_transport, x, B, #{server_id => x}}),
    ?assertEqual({ok, {A, #{}}}, request(Config, {find_server, x})),
    ?assertEqual({ok, {B, #{server_id => x}}}, request(Config, {find_transport, x})),
    ok = request(Config, {unregister_transport, x}),
    ?assertEqual({ok, {A, #{}}}, request(Config, {find_server, x})).


taken_id(Config) ->
    [A, B, T] = processes(3),
    ok = request(Config, {register_server, s, A, first}),
    ok = request(Config, {register_server, s2, A, first}),
    ok = request(Config, {register_transport, t, T, #{server_id => s}}),
    ?assertEqual({error, already_registered}, request(Config, {register_server, s, B, second})),
    ?assertEqual({error, already_registered},
                 request(Config, {register_transport, t, B, #{server_id => s2}})),
    ?assertEqual({ok, {A, first}}, request(Config, {find_server, s})),
    ?assertEqual({ok, {T, #{server_id => s}}}, request(Config, {find_transport, t})),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})).


taken_id_of_the_same_pid(Config) ->
    ok = request(Config, {register_server, s, self(), first}),
    ?assertEqual({error, already_registered}, request(Config, {register_server, s, self(), second})),
    ?assertEqual({ok, {self(), first}}, request(Config, {find_server, s})).


unknown_is_not_found(Config) ->
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {find_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


lists(Config) ->
    ?assertEqual([], request(Config, list_servers)),
    ?assertEqual([], request(Config, list_transports)),
    Ids = lists:seq(1, 1500),
    _ = [ ok = request(Config, {register_server, {s, N}, self(), N}) || N <- Ids ],
    _ = [ ok = request(Config, {register_transport, {t, N}, self(), N}) || N <- Ids ],
    ?assertEqual([ {{s, N}, {self(), N}} || N <- Ids ], lists:sort(request(Config, list_servers))),
    ?assertEqual([ {{t, N}, {self(), N}} || N <- Ids ], lists:sort(request(Config, list_transports))).


unregister_unknown(Config) ->
    ?assertEqual(ok, request(Config, {unregister_server, s})),
    ?assertEqual(ok, request(Config, {unregister_transport, t})),
    ?assertEqual(ok, request(Config, {unbind_transport, t})).


unregister_server_keeps_transports(Config) ->
    bound(Config),
    ok = request(Config, {unregister_server, s}),
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertMatch({ok, {_, _}}, request(Config, {find_transport, t})).


unregister_server_ends_bindings(Config) ->
    [S | _] = bound(Config),
    ok = request(Config, {unregister_server, s}),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ok = request(Config, {register_server, s, S, #{}}),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


unregister_unknown_server_keeps_dangling_bindings(Config) ->
    ok = request(Config, {register_transport, t, self(), #{server_id => s}}),
    ok = request(Config, {unregister_server, s}),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})).


unregister_transport_ends_binding(Config) ->
    [_, T] = bound(Config),
    ok = request(Config, {unregister_transport, t}),
    ?assertEqual({error, not_found}, request(Config, {find_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ok = request(Config, {register_transport, t, T, #{}}),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


bind_checks_server_first(Config) ->
    Bind = {bind_transport_to_server, t, s},
    ?assertEqual({error, server_not_found}, request(Config, Bind)),
    ok = request(Config, {register_transport, t, self(), #{}}),
    ?assertEqual({error, server_not_found}, request(Config, Bind)).


bind_unknown_transport(Config) ->
    ok = request(Config, {register_server, s, self(), #{}}),
    ?assertEqual({error, transport_not_found},
                 request(Config, {bind_transport_to_server, t, s})).


rebinding_overwrites(Config) ->
    bound(Config),
    [S2] = processes(1),
    ok = request(Config, {register_server, s2, S2, #{}}),
    ok = request(Config, {bind_transport_to_server, t, s2}),
    ?assertEqual({ok, s2}, request(Config, {get_server_for_transport, t})),
    ok = request(Config, {unregister_server, s}),
    ?assertEqual({ok, s2}, request(Config, {get_server_for_transport, t})),
    ?assertEqual({error, server_not_found},
                 request(Config, {bind_transport_to_server, t, s})),
    ?assertEqual({ok, s2}, request(Config, {get_server_for_transport, t})).


later_binds_do_not_show_in_the_config(Config) ->
    [S, T] = processes(2),
    ok = request(Config, {register_server, s, S, #{}}),
    ok = request(Config, {register_transport, t, T, #{x => 1}}),
    ok = request(Config, {bind_transport_to_server, t, s}),
    ?assertEqual({ok, {T, #{x => 1}}}, request(Config, {find_transport, t})).


unbind(Config) ->
    bound(Config),
    ?assertEqual(ok, request(Config, {unbind_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ?assertEqual(ok, request(Config, {unbind_transport, t})),
    ?assertMatch({ok, _}, request(Config, {find_transport, t})).


automatic_binding(Config) ->
    ok = request(Config, {register_server, <<"s">>, self(), #{}}),
    ok = request(Config, {register_transport, t, self(), #{server_id => <<"s">>}}),
    ?assertEqual({ok, <<"s">>}, request(Config, {get_server_for_transport, t})).


automatic_binding_to_a_server_to_come(Config) ->
    [S] = processes(1),
    ok = request(Config, {register_transport, t, self(), #{server_id => {s, 1}}}),
    ?assertEqual({ok, {s, 1}}, request(Config, {get_server_for_transport, t})),
    ok = request(Config, {register_server, {s, 1}, S, #{}}),
    ?assertEqual({ok, {s, 1}}, request(Config, {get_server_for_transport, t})),
    test_support:kill(S),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


server_id_undefined_is_unbound(Config) ->
    ok = request(Config, {register_server, undefined, self(), #{}}),
    ok = request(Config, {register_transport, t, self(), #{server_id => undefined}}),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})),
    ok = cast(Config, {route_to_transport, broadcast, undefined, hello}),
    ok = cast(Config, {route_to_transport, t, undefined, last}),
    ?assertEqual([{mcp_response, undefined, last}], received(1)).


bound_to_the_id_undefined(Config) ->
    ok = request(Config, {register_server, undefined, self(), #{}}),
    ok = request(Config, {register_transport, t, self(), #{}}),
    ?assertEqual(ok, request(Config, {bind_transport_to_server, t, undefined})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


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


%% The requests are in the mailbox before the process ends, and are handled after it has.
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


%% A transport bound ahead of a server is not unbound by the end, known late, of an earlier one.
new_binding_outlives_the_end_of_the_old_server(Config) ->
    [S, S2] = processes(2),
    ok = request(Config, {register_server, s, S, #{}}),
    ?assertEqual([ok], overtaken(Config, S, [{register_transport, t, self(), #{server_id => s}}])),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    ok = request(Config, {register_server, s, S2, #{}}),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})).


%% A registry may keep a monitor of its own, but not one for each registration there ever was.
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


unregister_does_not_purge_a_later_binding(Config) ->
    [S | _] = bound(Config),
    ok = request(Config, {unregister_server, s}),
    ok = request(Config, {register_server, s, self(), #{}}),
    ok = request(Config, {bind_transport_to_server, t, s}),
    test_support:kill(S),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    ?assertEqual({ok, {self(), #{}}}, request(Config, {find_server, s})).


update_server_keeps_pid_bindings_and_monitor(Config) ->
    [S | _] = bound(Config),
    ?assertEqual(ok, request(Config, {update_server, s, #{new => true}})),
    ?assertEqual({ok, {S, #{new => true}}}, request(Config, {find_server, s})),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    test_support:kill(S),
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


update_unknown_server(Config) ->
    ?assertEqual({error, not_found}, request(Config, {update_server, s, #{}})).


route_to_server(Config) ->
    ok = request(Config, {register_server, s, self(), #{}}),
    ?assertEqual(ok, cast(Config, {route_to_server, s, t, {hello, 1}})),
    ?assertEqual([{mcp_message, t, {hello, 1}}], received(1)).


route_to_server_checks_neither_transport_nor_binding(Config) ->
    ok = request(Config, {register_server, s, self(), #{}}),
    ok = request(Config, {register_transport, t, self(), #{server_id => other}}),
    ?assertEqual(ok, cast(Config, {route_to_server, s, nobody, a})),
    ?assertEqual(ok, cast(Config, {route_to_server, s, t, b})),
    ?assertEqual([{mcp_message, nobody, a}, {mcp_message, t, b}], received(2)).


route_to_transport(Config) ->
    ok = request(Config, {register_transport, t, self(), #{}}),
    ?assertEqual(ok, cast(Config, {route_to_transport, t, s, hello})),
    ?assertEqual([{mcp_response, s, hello}], received(1)).


route_to_transport_checks_no_server(Config) ->
    ok = request(Config, {register_transport, t, self(), #{server_id => other}}),
    ?assertEqual(ok, cast(Config, {route_to_transport, t, {no, server}, hello})),
    ?assertEqual([{mcp_response, {no, server}, hello}], received(1)).


route_to_unknown_ids(Config) ->
    ?assertEqual(ok, cast(Config, {route_to_server, nobody, t, hello})),
    ?assertEqual(ok, cast(Config, {route_to_transport, nobody, s, hello})),
    ok = request(Config, {register_server, s, self(), #{}}),
    ?assertEqual(ok, cast(Config, {route_to_server, s, t, still_here})),
    ?assertEqual([{mcp_message, t, still_here}], received(1)).


broadcast_reaches_the_bound_and_no_others(Config) ->
    ok = request(Config, {register_server, s, self(), #{}}),
    ok = request(Config, {register_server, s2, self(), #{}}),
    Bound = [ spawn_forwarder({bound, N}) || N <- lists:seq(1, 700) ],
    _ = [ ok = request(Config, {register_transport, P, P, #{server_id => s}}) || P <- Bound ],
    Other = spawn_forwarder(other),
    ok = request(Config, {register_transport, other, Other, #{server_id => s2}}),
    Moved = spawn_forwarder(moved),
    ok = request(Config, {register_transport, moved, Moved, #{server_id => s}}),
    ok = request(Config, {bind_transport_to_server, moved, s2}),
    Unbound = spawn_forwarder(unbound),
    ok = request(Config, {register_transport, unbound, Unbound, #{server_id => s}}),
    ok = request(Config, {unbind_transport, unbound}),
    ok = cast(Config, {route_to_transport, broadcast, s, hello}),
    Expected = lists:sort([ {{bound, N}, {mcp_response, s, hello}} || N <- lists:seq(1, 700) ]),
    ?assertEqual(Expected, lists:sort(received(700))),
    ok = cast(Config, {route_to_transport, broadcast, s2, bye}),
    ?assertEqual([{moved, {mcp_response, s2, bye}}, {other, {mcp_response, s2, bye}}],
                 lists:sort(received(2))).


broadcast_to_a_server_to_come(Config) ->
    ok = request(Config, {register_transport, t, self(), #{server_id => s}}),
    ok = cast(Config, {route_to_transport, broadcast, s, hello}),
    ?assertEqual([{mcp_response, s, hello}], received(1)).


broadcast_to_nobody(Config) ->
    bound(Config),
    ok = request(Config, {unbind_transport, t}),
    ?assertEqual(ok, cast(Config, {route_to_transport, broadcast, s, hello})),
    ?assertEqual(ok, cast(Config, {route_to_transport, broadcast, unknown, hello})).


transport_named_broadcast_cannot_be_reached(Config) ->
    ok = request(Config, {register_transport, broadcast, self(), #{}}),
    ok = request(Config, {register_transport, t, self(), #{}}),
    ok = cast(Config, {route_to_transport, broadcast, s, lost}),
    ok = cast(Config, {route_to_transport, t, s, seen}),
    ?assertEqual([{mcp_response, s, seen}], received(1)).


order_of_one_sender(Config) ->
    ok = request(Config, {register_server, s, self(), #{}}),
    _ = [ ok = cast(Config, {route_to_server, s, t, N}) || N <- lists:seq(1, 10000) ],
    ?assertEqual([ {mcp_message, t, N} || N <- lists:seq(1, 10000) ], received(10000)).


all_state_and_restore(Config) ->
    bound(Config),
    [U, V] = processes(2),
    ok = request(Config, {register_transport, u, U, #{server_id => to_come}}),
    ok = request(Config, {register_transport, v, V, #{}}),
    {ok, Saved} = request(Config, get_all_state),
    ?assertEqual({registry_state, #{t => s, u => to_come}}, Saved),
    ok = request(Config, {unbind_transport, t}),
    ok = request(Config, {bind_transport_to_server, u, s}),
    ok = request(Config, {bind_transport_to_server, v, s}),
    ?assertEqual(ok, request(Config, {restore_state, Saved})),
    ?assertEqual({ok, Saved}, request(Config, get_all_state)),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, v})).


restore_leaves_out_unknown_transports(Config) ->
    [_, T] = bound(Config),
    Saved = {registry_state, #{t => s, unknown => s}},
    ?assertEqual(ok, request(Config, {restore_state, Saved})),
    ?assertEqual({ok, {registry_state, #{t => s}}}, request(Config, get_all_state)),
    ok = request(Config, {register_transport, unknown, T, #{}}),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, unknown})),
    ?assertEqual(ok, request(Config, {restore_state, {registry_state, #{}}})),
    ?assertEqual({ok, {registry_state, #{}}}, request(Config, get_all_state)).


restore_invalid_state(Config) ->
    bound(Config),
    _ = [ ?assertEqual({error, invalid_state}, request(Config, {restore_state, Invalid}))
          || Invalid <- [nonsense, {registry_state, []}, {other, #{}}, #{}, {registry_state}] ],
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})).


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


%%% The module and the process


exports(Config) ->
    Exports = (module(Config)):module_info(exports),
    Expected =
        [{start_link, 0},
         {register_server, 3},
         {register_transport, 3},
         {unregister_server, 1},
         {unregister_transport, 1},
         {route_to_server, 3},
         {route_to_transport, 3},
         {find_server, 1},
         {find_transport, 1},
         {list_servers, 0},
         {list_transports, 0},
         {bind_transport_to_server, 2},
         {unbind_transport, 1},
         {get_server_for_transport, 1},
         {init, 1},
         {handle_call, 3},
         {handle_cast, 2},
         {handle_info, 2},
         {terminate, 2},
         {code_change, 3},
         {register_server, 4},
         {register_transport, 4},
         {unregister_server, 2},
         {unregister_transport, 2},
         {find_server, 2},
         {find_transport, 2},
         {list_servers, 1},
         {list_transports, 1},
         {update_server, 2},
         {get_pid, 0},
         {get_queue_depth, 0},
         {get_servers, 0},
         {get_all_state, 0},
         {restore_state, 1},
         {route_message, 2},
         {validate_tool_name, 1},
         {validate_transport_name, 1},
         {normalize_name, 1},
         {graceful_shutdown, 0},
         {format_status, 1}],
    ?assertEqual([], Expected -- Exports).


second_start_link(Config) ->
    Instance = instance(Config),
    ?assertEqual({error, {already_started, Instance}}, (module(Config)):start_link()),
    ?assertEqual(Instance, whereis(module(Config))).


not_a_pid_is_a_function_clause(Config) ->
    Module = module(Config),
    _ = [ ?assertError(function_clause, Module:Function(id, NoPid, #{}))
          || Function <- [register_server, register_transport],
             NoPid <- [undefined, make_ref(), <<"pid">>, hd(erlang:ports())] ],
    ?assertEqual([], Module:list_servers()),
    ?assertEqual([], Module:list_transports()).


raw_not_a_pid_is_a_badarg(Config) ->
    Instance = instance(Config),
    _ = [ ?assertEqual({error, badarg}, gen_server:call(Instance, {Request, id, NoPid, #{}}))
          || Request <- [register_server, register_transport], NoPid <- [undefined, make_ref(), 7] ],
    ?assertEqual([], gen_server:call(Instance, list_servers)),
    ?assert(is_process_alive(Instance)).


unknown_requests_casts_and_messages(Config) ->
    Instance = instance(Config),
    _ = [ ?assertEqual({error, unknown_request}, gen_server:call(Instance, Request))
          || Request <- [nonsense, {register_server, id}, {find_server}, {}, "list"] ],
    _ = [ gen_server:cast(Instance, Cast) || Cast <- [nonsense, {route_to_server, s}, {}] ],
    _ = [ Instance ! Message
          || Message <- [nonsense,
                         {transport_connected, t},
                         {'DOWN', x},
                         {'EXIT', self(), x},
                         {'DOWN', make_ref(), process, self(), normal}] ],
    ?assertEqual([], gen_server:call(Instance, list_servers)),
    ?assertEqual(Instance, whereis(module(Config))).


exit_signals_of_others_are_ignored(Config) ->
    Instance = instance(Config),
    _ = [ exit(Instance, Reason) || Reason <- [normal, shutdown, {some, error}] ],
    ?assertEqual([], gen_server:call(Instance, list_servers)).


not_running(Config) ->
    Module = module(Config),
    gen_server:stop(instance(Config)),
    ?assertEqual(ok, Module:route_to_server(s, t, hello)),
    ?assertEqual(ok, Module:route_to_transport(t, s, hello)),
    ?assertEqual(ok, Module:route_to_transport(broadcast, s, hello)),
    P = self(),
    lists:foreach(
      fun({Function, Arguments, Request}) ->
              ?assertExit({noproc, {gen_server, call, [Module, Request]}},
                          apply(Module, Function, Arguments))
      end,
      [{register_server, [s, P, #{}], {register_server, s, P, #{}}},
       {register_transport, [t, P, #{}], {register_transport, t, P, #{}}},
       {unregister_server, [s], {unregister_server, s}},
       {unregister_transport, [t], {unregister_transport, t}},
       {find_server, [s], {find_server, s}},
       {find_transport, [t], {find_transport, t}},
       {list_servers, [], list_servers},
       {list_transports, [], list_transports},
       {bind_transport_to_server, [t, s], {bind_transport_to_server, t, s}},
       {unbind_transport, [t], {unbind_transport, t}},
       {get_server_for_transport, [t], {get_server_for_transport, t}},
       {update_server, [s, #{}], {update_server, s, #{}}},
       {get_all_state, [], get_all_state}]),
    ?assertEqual(undefined, Module:get_pid()),
    ?assertEqual(0, Module:get_queue_depth()).


stop_clears(Config) ->
    Module = module(Config),
    lists:foreach(fun(Reason) ->
                          {ok, Pid} = case whereis(Module) of
                                          undefined -> Module:start_link();
                                          Running -> {ok, Running}
                                      end,
                          unlink(Pid),
                          ?assertEqual([], Module:list_servers()),
                          ok = Module:register_server(s, self(), #{}),
                          ok = Module:register_transport(t, self(), #{server_id => s}),
                          ok = gen_server:stop(Pid, Reason, 5000)
                  end,
                  [normal, shutdown, {shutdown, why}]),
    {ok, Last} = Module:start_link(),
    unlink(Last),
    ?assertEqual([], Module:list_servers()),
    ?assertEqual([], Module:list_transports()),
    ?assertEqual({ok, {registry_state, #{}}}, Module:get_all_state()).


shutdown_by_the_parent_clears(Config) ->
    Module = module(Config),
    gen_server:stop(instance(Config)),
    Tester = self(),
    Parent = spawn(fun() ->
                           {ok, Pid} = Module:start_link(),
                           ok = Module:register_server(s, Tester, #{}),
                           Tester ! {started, Pid},
                           receive stop -> exit(shutdown) end
                   end),
    Pid = receive {started, Started} -> Started end,
    Monitor = monitor(process, Pid),
    Parent ! stop,
    receive {'DOWN', Monitor, _, _, shutdown} -> ok end,
    {ok, Next} = Module:start_link(),
    unlink(Next),
    ?assertEqual([], Module:list_servers()).


killed_and_restarted_adopts(Config) ->
    Module = module(Config),
    [S, T, U, Dead] = processes(4),
    ok = Module:register_server(s, S, #{s => 1}),
    ok = Module:register_server(dead, Dead, #{}),
    ok = Module:register_transport(t, T, #{server_id => s}),
    ok = Module:register_transport(u, U, #{}),
    ok = Module:register_transport(v, U, #{server_id => dead}),
    ok = Module:bind_transport_to_server(u, s),
    test_support:kill(instance(Config)),
    test_support:kill(Dead),
    {ok, Next} = Module:start_link(),
    unlink(Next),
    ?assertEqual({ok, {S, #{s => 1}}}, Module:find_server(s)),
    ?assertEqual({error, not_found}, Module:find_server(dead)),
    ?assertEqual({ok, s}, Module:get_server_for_transport(t)),
    ?assertEqual({ok, s}, Module:get_server_for_transport(u)),
    ?assertEqual({error, not_found}, Module:get_server_for_transport(v)),
    test_support:kill(S),
    ?assertEqual({error, not_found}, Module:find_server(s)),
    ?assertEqual({error, not_found}, Module:get_server_for_transport(t)),
    test_support:kill(T),
    ?assertEqual({error, not_found}, Module:find_transport(t)).


killed_and_restarted_adopts_the_latest(Config) ->
    Module = module(Config),
    [S, S2, T, U, V] = processes(5),
    ok = Module:register_server(s, S, #{version => 1}),
    ok = Module:update_server(s, #{version => 2}),
    ok = Module:register_server(s2, S2, #{}),
    _ = [ ok = Module:register_transport(Id, Pid, #{server_id => s2})
          || {Id, Pid} <- [{t, T}, {u, U}, {v, V}, {w, V}, {x, V}] ],
    ok = Module:bind_transport_to_server(t, s),
    ok = Module:register_transport(z, T, #{server_id => s}),
    ok = Module:unbind_transport(z),
    ok = Module:unregister_transport(v),
    ok = Module:register_transport(y, V, #{server_id => to_come}),
    test_support:kill(U),
    ok = Module:unregister_server(s2),
    ok = Module:bind_transport_to_server(w, s),
    test_support:kill(instance(Config)),
    {ok, Next} = Module:start_link(),
    unlink(Next),
    ?assertEqual([{s, {S, #{version => 2}}}], Module:list_servers()),
    ?assertEqual([t, w, x, y, z], lists:sort([ Id || {Id, _} <- Module:list_transports() ])),
    ?assertEqual({ok, {registry_state, #{t => s, w => s, y => to_come}}}, Module:get_all_state()).


killed_again_and_again(Config) ->
    Module = module(Config),
    bound(Config),
    lists:foreach(fun(N) ->
                          test_support:kill(whereis(Module)),
                          {ok, Next} = Module:start_link(),
                          unlink(Next),
                          ok = Module:register_server(N, self(), #{}),
                          ?assertEqual(N + 1, length(Module:list_servers())),
                          ?assertEqual({ok, s}, Module:get_server_for_transport(t))
                  end,
                  lists:seq(1, 50)).


killed_server_process_while_down(Config) ->
    Module = module(Config),
    [S] = processes(1),
    ok = Module:register_server(s, S, #{}),
    test_support:kill(instance(Config)),
    test_support:kill(S),
    {ok, Next} = Module:start_link(),
    unlink(Next),
    ?assertEqual([], Module:list_servers()),
    ?assertEqual(ok, Module:register_server(s, self(), #{})).


anonymous_instances_are_isolated(Config) ->
    Module = module(Config),
    {ok, A} = gen_server:start(Module, [], []),
    {ok, B} = gen_server:start(Module, [], []),
    ok = Module:register_server(s, self(), named),
    ok = gen_server:call(A, {register_server, s, self(), a}),
    ?assertEqual({ok, {self(), a}}, gen_server:call(A, {find_server, s})),
    ?assertEqual({error, not_found}, gen_server:call(B, {find_server, s})),
    ok = gen_server:stop(A),
    ?assertEqual({ok, {self(), named}}, Module:find_server(s)),
    ok = gen_server:stop(B),
    ?assertEqual({ok, {self(), named}}, Module:find_server(s)).


anonymous_instance_stops(Config) ->
    lists:foreach(fun(Reason) ->
                          {ok, Pid} = gen_server:start(module(Config), [], []),
                          ok = gen_server:call(Pid, {register_server, s, self(), #{}}),
                          ?assertEqual(ok, gen_server:stop(Pid, Reason, 5000)),
                          ?assertNot(is_process_alive(Pid))
                  end,
                  [normal, shutdown]).


works_without_the_application(Config) ->
    ?assertNot(lists:keymember(erlmcp_native, 1, application:which_applications())),
    ?assertEqual(ok, (module(Config)):register_server(s, self(), #{})).


route_message_to_a_server(Config) ->
    Module = module(Config),
    ?assertEqual({error, server_not_found}, Module:route_message({server, s}, hello)),
    ok = Module:register_server(s, self(), #{}),
    A = spawn_forwarder(a),
    ok = Module:register_transport(a, A, #{server_id => s}),
    ?assertEqual(ok, Module:route_message({server, s}, hello)),
    ?assertEqual([{a, {mcp_response, s, hello}}], received(1)).


route_message_to_a_transport(Config) ->
    Module = module(Config),
    ?assertEqual({error, transport_not_found}, Module:route_message({transport, t}, hello)),
    ok = Module:register_server(s, self(), #{}),
    ok = Module:register_transport(t, self(), #{}),
    ok = Module:bind_transport_to_server(t, s),
    ?assertEqual({error, no_bound_server}, Module:route_message({transport, t}, hello)),
    ok = Module:register_transport(v, self(), #{server_id => undefined}),
    ok = Module:register_transport(w, self(), no_map),
    ?assertEqual({error, no_bound_server}, Module:route_message({transport, v}, hello)),
    ?assertEqual({error, no_bound_server}, Module:route_message({transport, w}, hello)),
    ok = Module:register_transport(u, self(), #{server_id => named_by_the_config}),
    ok = Module:bind_transport_to_server(u, s),
    ?assertEqual(ok, Module:route_message({transport, u}, hello)),
    ?assertEqual([{mcp_response, named_by_the_config, hello}], received(1)).


route_message_to_a_transport_named_broadcast(Config) ->
    Module = module(Config),
    Other = spawn_forwarder(other),
    ok = Module:register_transport(other, Other, #{server_id => s}),
    ok = Module:register_transport(broadcast, self(), #{server_id => s}),
    ?assertEqual(ok, Module:route_message({transport, broadcast}, hello)),
    ?assertEqual([{mcp_response, s, hello}], received(1)).


order_of_all_routes(Config) ->
    Module = module(Config),
    ok = Module:register_server(s, self(), #{}),
    ok = Module:register_transport(t, self(), #{server_id => s}),
    Routes = [fun(N) -> Module:route_to_server(s, t, N) end,
              fun(N) -> Module:route_to_transport(t, s, N) end,
              fun(N) -> Module:route_to_transport(broadcast, s, N) end,
              fun(N) -> Module:route_message({transport, t}, N) end,
              fun(N) -> Module:route_message({server, s}, N) end],
    Order = [ (N * 7) rem 5 + 1 || N <- lists:seq(1, 2000) ],
    _ = [ ok = (lists:nth(Route, Routes))(N) || {N, Route} <- lists:enumerate(Order) ],
    ?assertEqual(lists:seq(1, 2000), [ element(3, Message) || Message <- received(2000) ]).


pid_and_queue_depth(Config) ->
    Module = module(Config),
    Instance = instance(Config),
    ?assertEqual(Instance, Module:get_pid()),
    ?assertEqual(0, Module:get_queue_depth()),
    ok = sys:suspend(Instance),
    _ = [ Instance ! {some, N} || N <- lists:seq(1, 5) ],
    ?assertEqual(5, Module:get_queue_depth()),
    ok = sys:resume(Instance).


servers(Config) ->
    Module = module(Config),
    [A, B] = processes(2),
    ?assertEqual([], Module:get_servers()),
    ok = Module:register_server(a, A, #{}),
    ok = Module:register_server(b, B, #{}),
    ?assertEqual(lists:sort([A, B]), lists:sort(Module:get_servers())).


graceful_shutdown_asks_everybody(Config) ->
    Module = module(Config),
    ok = Module:register_server(s, self(), #{}),
    ok = Module:register_transport(t, self(), #{}),
    Start = erlang:monotonic_time(millisecond),
    ?assertEqual(ok, Module:graceful_shutdown()),
    ?assert(erlang:monotonic_time(millisecond) - Start >= 1000),
    ?assertEqual([{erlmcp_shutdown, s, normal}, {erlmcp_shutdown, t, normal}],
                 lists:sort(received(2))),
    ?assertEqual(instance(Config), whereis(Module)),
    ?assertMatch({ok, _}, Module:find_server(s)).


format_status_shows_no_configs(Config) ->
    Module = module(Config),
    ok = Module:register_server(s, self(), #{password => "a secret"}),
    ok = Module:register_transport(t, self(), #{server_id => s, password => "a secret"}),
    Shown = lists:flatten(io_lib:format("~p", [sys:get_status(instance(Config))])),
    ?assertEqual(nomatch, string:find(Shown, "secret")),
    ?assertNotEqual(nomatch, string:find(Shown, "bindings")),
    % What a crash report shows beside the state.
    Request = {'$gen_call', {self(), make_ref()}, {register_server, s, self(), #{p => "a secret"}}},
    Report = Module:format_status(#{
                                    state => sys:get_state(instance(Config)),
                                    message => Request,
                                    log => [{in, Request}],
                                    reason => normal
                                   }),
    ?assertEqual(nomatch, string:find(lists:flatten(io_lib:format("~p", [Report])), "secret")),
    ?assertMatch(#{reason := normal}, Report).


unknown_route_is_logged_rarely(Config) ->
    Module = module(Config),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{tester => self()}}),
    try
        timer:sleep(1100),
        _ = [ ok = Module:route_to_server(nobody, t, N) || N <- lists:seq(1, 1000) ],
        _ = [ ok = Module:route_to_transport(broadcast, nobody, N) || N <- lists:seq(1, 1000) ],
        _ = gen_server:call(instance(Config), list_servers),
        Logged = logged(),
        ?assert(length(Logged) >= 1),
        ?assert(length(Logged) =< 2),
        ?assertMatch([#{level := warning, meta := #{domain := [erlmcp_native]}} | _], Logged)
    after
        logger:remove_handler(?MODULE)
    end.


unlogged_routes_are_counted(Config) ->
    Module = module(Config),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{tester => self()}}),
    try
        _ = next_warning(Module, 50),
        _ = [ ok = Module:route_to_server(nobody, t, N) || N <- lists:seq(1, 17) ],
        ?assertEqual([], logged()),
        timer:sleep(1100),
        ?assertMatch({match, _}, re:run(next_warning(Module, 1), "\\b17\\b"))
    after
        logger:remove_handler(?MODULE)
    end.


%% Routes to nobody until that is logged, at most so many times; the text of what is logged.
next_warning(Module, Times) when Times > 0 ->
    ok = Module:route_to_transport(nobody, s, hello),
    case logged() of
        [#{msg := {Format, Arguments}} | _] -> lists:flatten(io_lib:format(Format, Arguments));
        [] -> next_warning(Module, Times - 1)
    end.


%% The handler of the cases before.
log(#{meta := #{domain := [erlmcp_native]}} = Event, #{config := #{tester := Tester}}) ->
    Tester ! {logged, Event};
log(_Event, _Config) ->
    ok.


local_scope(Config) ->
    Module = module(Config),
    ok = Module:register_server(local, s, self(), #{a => 1}),
    ok = Module:register_transport(local, t, self(), #{}),
    ?assertEqual({ok, {self(), #{a => 1}}}, Module:find_server(s)),
    ?assertEqual({ok, {self(), #{a => 1}}}, Module:find_server(local, s)),
    ?assertEqual({ok, {self(), #{}}}, Module:find_transport(local, t)),
    ?assertEqual([{s, {self(), #{a => 1}}}], Module:list_servers(local)),
    ?assertEqual([{t, {self(), #{}}}], Module:list_transports(local)),
    ok = Module:unregister_server(local, s),
    ok = Module:unregister_transport(local, t),
    ?assertEqual([], Module:list_servers() ++ Module:list_transports()).


other_scopes_are_a_function_clause(Config) ->
    Module = module(Config),
    ?assertError(function_clause, Module:register_server(cluster, s, self(), #{})),
    ?assertError(function_clause, Module:register_server(global, s, no_pid, #{})),
    _ = [ ?assertError(function_clause, Module:Function(cluster, id))
          || Function <- [unregister_server, unregister_transport, find_server, find_transport] ],
    ?assertError(function_clause, Module:list_servers(cluster)),
    ?assertError(function_clause, Module:list_transports(cluster)).


global_scope(Config) ->
    Module = module(Config),
    with_peer(
      fun(_Peer, Node) ->
              ok = erpc:call(Node, code, add_paths, [code:get_path()]),
              % A node that has just joined knows the others' names after this.
              ok = global:sync(),
              ok = erpc:call(Node, global, sync, []),
              ok = Module:register_server(global, s, self(), #{g => 1}),
              ?assertEqual({error, already_registered},
                           erpc:call(Node, Module, register_server, [global, s, self(), #{}])),
              ?assertEqual({ok, {node(), self(), #{g => 1}}},
                           erpc:call(Node, Module, find_server, [global, s])),
              ?assertEqual({error, not_found}, Module:find_server(s)),
              Remote = erpc:call(Node, erlang, spawn, [timer, sleep, [infinity]]),
              ok = erpc:call(Node, Module, register_transport, [global, t, Remote, #{}]),
              ?assertEqual([{t, {Node, Remote, #{}}}], Module:list_transports(global)),
              ?assertEqual([{s, {node(), self(), #{g => 1}}}], Module:list_servers(global)),
              true = exit(Remote, kill),
              test_support:await(fun() -> {error, not_found} =:= Module:find_transport(global, t) end, ?DEADLINE_MS),
              ok = erpc:call(Node, Module, unregister_server, [global, s]),
              ?assertEqual({error, not_found}, Module:find_server(global, s)),
              ?assertEqual(ok, Module:unregister_server(global, s))
      end).


global_scope_of_one_node(Config) ->
    Module = module(Config),
    Before = processes(),
    [A, B] = processes(2),
    Watchers = processes() -- Before,
    ?assertEqual([], Module:list_servers(global)),
    ok = Module:register_server(global, 1, A, no_map),
    ok = Module:register_server(global, 1.0, B, #{b => 1}),
    ok = Module:register_transport(global, 1, B, #{}),
    ?assertEqual({ok, {node(), A, no_map}}, Module:find_server(global, 1)),
    ?assertEqual({ok, {node(), B, #{b => 1}}}, Module:find_server(global, 1.0)),
    ?assertEqual({ok, {node(), B, #{}}}, Module:find_transport(global, 1)),
    ?assertEqual(2, length(Module:list_servers(global))),
    ?assertEqual({error, already_registered}, Module:register_server(global, 1, B, #{})),
    ?assertEqual({error, already_registered}, Module:register_server(global, 1, A, #{})),
    application:set_env(erlmcp_native, same_pid, ok),
    ?assertEqual(ok, Module:register_server(global, 1, A, #{})),
    ?assertEqual({ok, {node(), A, no_map}}, Module:find_server(global, 1)),
    test_support:kill(B),
    ?assertEqual({error, not_found}, Module:find_server(global, 1.0)),
    ?assertEqual([{1, {node(), A, no_map}}], Module:list_servers(global)),
    ?assertEqual(ok, Module:register_server(global, dead, B, #{})),
    ?assertEqual({error, not_found}, Module:find_server(global, dead)),
    ok = Module:unregister_server(global, 1),
    ?assertEqual({error, not_found}, Module:find_server(global, 1)),
    ?assertEqual([], Module:list_servers(global)),
    ?assertEqual([], Module:list_transports(global)),
    % Nothing is left behind, whichever way the entries ended, also if nobody looks for them.
    ok = Module:register_server(global, dead, B, #{}),
    ok = Module:register_server(global, ends, A, #{}),
    test_support:kill(A),
    test_support:await(fun() -> (processes() -- Before) -- Watchers =:= [] end, ?DEADLINE_MS).


global_end_race(Config) ->
    Module = module(Config),
    lists:foreach(fun(N) ->
                          [P] = processes(1),
                          ?assertEqual(ok, Module:register_transport(global, t, P, N)),
                          ?assertEqual({ok, {node(), P, N}}, Module:find_transport(global, t)),
                          test_support:kill(P),
                          N rem 2 =:= 0 andalso
                          ?assertEqual({error, not_found}, Module:find_transport(global, t))
                  end,
                  lists:seq(1, 100)),
    ?assertEqual([], Module:list_transports(global)).


names(Config) ->
    Module = module(Config),
    lists:foreach(
      fun(Validate) ->
              _ = [ ?assertEqual(ok, Module:Validate(Name))
                    || Name <- [<<"read_file-2">>,
                                <<"名前"/utf8>>,
                                <<"हिन्दी"/utf8>>,
                                <<"👍🏽"/utf8>>,
                                <<"👨‍👩‍👧_🇫🇷-❤️"/utf8>>,
                                <<"أداة_٣"/utf8>>,
                                binary:copy(<<"é"/utf8>>, 255)] ],
              _ = [ ?assertEqual({error, Error}, Module:Validate(Name))
                    || {Error, Name} <- [{empty, <<>>},
                                         {too_long, binary:copy(<<"x">>, 256)},
                                         {invalid_characters, <<"a b">>},
                                         {invalid_characters, <<"a\n">>},
                                         {invalid_characters, <<0>>},
                                         {invalid_characters, <<"a", 255>>},
                                         {invalid_characters, <<16#C3>>},
                                         {too_long, binary:copy(<<"e", 769/utf8>>, 256)},
                                         {invalid_binary, name},
                                         {invalid_binary, "name"},
                                         {invalid_binary, 17}] ]
      end,
      [validate_tool_name, validate_transport_name]).


normalized_names(Config) ->
    Module = module(Config),
    ?assertEqual(?MODULE, Module:normalize_name(atom_to_binary(?MODULE))),
    ?assertEqual(?MODULE, Module:normalize_name(?MODULE)),
    Unknown = <<"never an atom ", (integer_to_binary(erlang:unique_integer([positive])))/binary>>,
    ?assertEqual(Unknown, Module:normalize_name(Unknown)),
    Composed = unicode:characters_to_nfc_binary(<<"é"/utf8, Unknown/binary>>),
    ?assertEqual(Composed, Module:normalize_name(unicode:characters_to_nfd_binary(Composed))),
    Long = binary:copy(<<"x">>, 1000),
    ?assertEqual(Long, Module:normalize_name(Long)),
    ?assertError(badarg, Module:normalize_name(<<255>>)),
    _ = [ ?assertError(badarg, binary_to_existing_atom(Name)) || Name <- [Unknown, Composed] ].


%% A release refuses two modules of one name, and later erlmcp has these.
modules_and_tables_of_the_host(_Config) ->
    ?assertEqual([],
                 [ Module
                   || Module <- [erlmcp_recovery_manager,
                                 erlmcp_health_monitor,
                                 erlmcp_metrics,
                                 erlmcp_metrics_aggregator,
                                 erlmcp_capability_cache,
                                 erlmcp_rate_limiter],
                      code:which(Module) =/= non_existing ]),
    ?assertEqual([],
                 [ Table
                   || Table <- ets:all(),
                      is_atom(Table),
                      Table =:= erlmcp_circuit_breaker_registry orelse
                      lists:prefix("erlmcp_shard_", atom_to_list(Table)) ]).


same_pid_can_be_ok(Config) ->
    Module = module(Config),
    application:set_env(erlmcp_native, same_pid, ok),
    [P] = processes(1),
    ok = Module:register_server(s, P, first),
    ?assertEqual(ok, Module:register_server(s, P, second)),
    ?assertEqual({ok, {P, first}}, Module:find_server(s)),
    ?assertEqual({error, already_registered}, Module:register_server(s, self(), third)),
    %% What it cannot be is the default.
    application:set_env(erlmcp_native, same_pid, true),
    ?assertEqual({error, already_registered}, Module:register_server(s, P, fourth)),
    {ok, Anonymous} = gen_server:start(Module, [], []),
    ?assertEqual(ok, gen_server:call(Anonymous, {register_server, s, P, first})),
    ?assertEqual({error, already_registered}, gen_server:call(Anonymous, {register_server, s, P, second})),
    ok = gen_server:stop(Anonymous).


%%% Drivers


module(Config) ->
    proplists:get_value(module, Config).


%% Starts the named instance. Its parent has ended when this returns.
start(Module) ->
    {Parent, Monitor} = spawn_monitor(fun() ->
                                              {ok, Pid} = Module:start_link(),
                                              unlink(Pid),
                                              exit({started, Pid})
                                      end),
    receive {'DOWN', Monitor, process, Parent, Reason} -> element(2, {started, _} = Reason) end.


instance(Config) ->
    proplists:get_value(instance, Config).


request(Config, Request) ->
    case proplists:get_value(how, Config) of
        raw -> gen_server:call(instance(Config), Request);
        _ when is_atom(Request) -> (module(Config)):Request();
        _ -> apply(module(Config), element(1, Request), tl(tuple_to_list(Request)))
    end.


cast(Config, Cast) ->
    case proplists:get_value(how, Config) of
        raw -> gen_server:cast(instance(Config), Cast);
        _ -> apply(module(Config), element(1, Cast), tl(tuple_to_list(Cast)))
    end.


%% The answers to requests that the registry receives while Pid lives, and handles after its end.
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


%% The server s, and the transport t that is bound to it.
bound(Config) ->
    [S, T] = processes(2),
    ok = request(Config, {register_server, s, S, #{}}),
    ok = request(Config, {register_transport, t, T, #{}}),
    ok = request(Config, {bind_transport_to_server, t, s}),
    {ok, s} = request(Config, {get_server_for_transport, t}),
    [S, T].


%% They end with the case, whose process they are linked to in one direction.
processes(N) ->
    [ spawn_watched(fun() -> timer:sleep(infinity) end) || _ <- lists:seq(1, N) ].


spawn_forwarder(Name) ->
    Tester = self(),
    spawn_watched(fun() -> forward(Name, Tester) end).


forward(Name, Tester) ->
    receive
        Message ->
            Tester ! {Name, Message},
            forward(Name, Tester)
    end.


spawn_watched(Fun) ->
    Tester = self(),
    Pid = spawn(Fun),
    spawn(fun() ->
                  Monitor = monitor(process, Tester),
                  receive {'DOWN', Monitor, _, _, _} -> exit(Pid, kill) end
          end),
    Pid.


%% The next N messages, in order; and there is no other one then.
received(N) ->
    Messages = [ receive Message -> Message after ?DEADLINE_MS -> exit({only, M, 'of', N}) end
                 || M <- lists:seq(0, N - 1) ],
    receive Other -> exit({unexpected, Other}) after 50 -> Messages end.


logged() ->
    receive {logged, Event} -> [Event | logged()] after 100 -> [] end.


%% Another node. This one becomes distributed if it is not.
with_peer(Fun) ->
    Started = case is_alive() of
                  true ->
                      already;
                  false ->
                      _ = os:cmd("epmd -daemon"),
                      Name = "contract_" ++ os:getpid(),
                      {ok, _} = net_kernel:start([list_to_atom(Name), shortnames]),
                      here
              end,
    {ok, Peer, Node} = peer:start(#{name => peer:random_name()}),
    try
        Fun(Peer, Node)
    after
        is_process_alive(Peer) andalso peer:stop(Peer),
        Started =:= here andalso net_kernel:stop()
    end.
