%%% The contract of erlmcp_registry: the scopes `local' and `global'.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_scopes_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [module/1, processes/1, with_peer/1]).

-define(DEADLINE_MS, 5000).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               module =>
                                   [local_scope,
                                    other_scopes_are_a_function_clause,
                                    global_scope,
                                    global_scope_of_one_node,
                                    global_scope_with_a_wrong_timeout,
                                    global_end_race]
                              }).


init_per_group(Group, Config) ->
    registry_contract:init_per_group(Group, Config).


end_per_group(Group, Config) ->
    registry_contract:end_per_group(Group, Config).


init_per_testcase(Case, Config) ->
    registry_contract:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_contract:end_per_testcase(Case, Config).


%%% The module and the process


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
              % After this, a node that has just joined knows the others' names.
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
    % No process is left behind, however the entries were removed, even without a later look-up.
    ok = Module:register_server(global, dead, B, #{}),
    ok = Module:register_server(global, ends, A, #{}),
    test_support:kill(A),
    test_support:await(fun() -> (processes() -- Before) -- Watchers =:= [] end, ?DEADLINE_MS).


%% The environment is not validated while the application is not running, nor after its start.
global_scope_with_a_wrong_timeout(Config) ->
    Module = module(Config),
    try
        [ begin
              ok = application:set_env(erlmcp_native, global_timeout_ms, Wrong),
              ok = Module:register_server(global, Wrong, self(), #{}),
              ?assertEqual({ok, {node(), self(), #{}}}, Module:find_server(global, Wrong)),
              ?assertEqual([{Wrong, {node(), self(), #{}}}], Module:list_servers(global)),
              ok = Module:unregister_server(global, Wrong)
          end || Wrong <- [infinity, "5000", 0, -1, 1.5, 1 bsl 64] ]
    after
        application:unset_env(erlmcp_native, global_timeout_ms)
    end.


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
