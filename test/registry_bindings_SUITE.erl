%%% The contract of erlmcp_registry: which transport is bound to which server, and the state of the bindings
%%% that can be read and restored.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_bindings_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [bound/1, cast/2, processes/1, received/1, request/2]).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               request =>
                                   [unregister_server_keeps_transports,
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
                                    unregister_does_not_purge_a_later_binding,
                                    all_state_and_restore,
                                    restore_leaves_out_unknown_transports,
                                    restore_invalid_state]
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


unregister_does_not_purge_a_later_binding(Config) ->
    [S | _] = bound(Config),
    ok = request(Config, {unregister_server, s}),
    ok = request(Config, {register_server, s, self(), #{}}),
    ok = request(Config, {bind_transport_to_server, t, s}),
    test_support:kill(S),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    ?assertEqual({ok, {self(), #{}}}, request(Config, {find_server, s})).


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
