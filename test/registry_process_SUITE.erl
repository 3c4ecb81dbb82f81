%%% The contract of erlmcp_registry: the module's functions and its process, which is started, stopped,
%%% killed and restarted.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_process_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [bound/1, instance/1, module/1, processes/1, received/1]).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               module =>
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
                                    pid_and_queue_depth,
                                    servers,
                                    graceful_shutdown_asks_everybody,
                                    format_status_shows_no_configs]
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
