%%% The contract of erlmcp_registry: routes, broadcasts, their order, and the logging of routes that reach no
%%% process.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_routes_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [bound/1, cast/2, instance/1, module/1, received/1, request/2, spawn_forwarder/1]).

-define(DEADLINE_MS, 10_000).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               request =>
                                   [route_to_server,
                                    route_to_server_checks_neither_transport_nor_binding,
                                    route_to_transport,
                                    route_to_transport_checks_no_server,
                                    route_to_unknown_ids,
                                    broadcast_reaches_the_bound_and_no_others,
                                    broadcast_to_a_server_to_come,
                                    broadcast_to_nobody,
                                    transport_named_broadcast_cannot_be_reached,
                                    order_of_one_sender],
                               module =>
                                   [route_message_to_a_server,
                                    route_message_to_a_transport,
                                    route_message_to_a_transport_named_broadcast,
                                    route_message_of_a_transport,
                                    transport_data_goes_to_the_bound_server,
                                    transport_data_to_nobody_is_logged,
                                    order_of_all_routes,
                                    unknown_route_is_logged_rarely,
                                    unlogged_routes_are_counted]
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


%%% The module and the process


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


%% A message routed to the plain id of a transport is one that it has received, and goes to its server.
route_message_of_a_transport(Config) ->
    Module = module(Config),
    ?assertEqual({error, not_found}, Module:route_message(t, hello)),
    ok = Module:register_transport(t, spawn_forwarder(t), #{server_id => s}),
    %% As with route_to_server/3, that server need not be registered.
    ?assertEqual(ok, Module:route_message(t, hello)),
    ok = Module:register_server(s, spawn_forwarder(s), #{}),
    ?assertEqual(ok, Module:route_message(t, hello)),
    ?assertEqual([{s, {mcp_message, t, hello}}], received(1)),
    ok = Module:register_server(other, spawn_forwarder(other), #{}),
    ok = Module:bind_transport_to_server(t, other),
    ?assertEqual(ok, Module:route_message(t, #{a => 1})),
    ?assertEqual([{other, {mcp_message, t, #{a => 1}}}], received(1)),
    ok = Module:unbind_transport(t),
    ?assertEqual({error, no_bound_server}, Module:route_message(t, hello)),
    %% Ids other than atoms work too.
    ok = Module:register_transport(<<"t">>, spawn_forwarder(<<"t">>), #{server_id => s}),
    ?assertEqual(ok, Module:route_message(<<"t">>, <<"raw">>)),
    ?assertEqual([{s, {mcp_message, <<"t">>, <<"raw">>}}], received(1)).


%% As sent by the sse and ws transports of erlmcp 3.x.
transport_data_goes_to_the_bound_server(Config) ->
    Module = module(Config),
    {ok, Anonymous} = gen_server:start(Module, [], []),
    lists:foreach(fun(Instance) ->
                          ok = gen_server:call(Instance, {register_server, s, self(), #{}}),
                          ok = gen_server:call(Instance, {register_transport, t, spawn_forwarder(t), #{server_id => s}}),
                          _ = [ Instance ! {transport_data, t, N} || N <- lists:seq(1, 100) ],
                          ?assertEqual([ {mcp_message, t, N} || N <- lists:seq(1, 100) ], received(100))
                  end,
                  [instance(Config), Anonymous]),
    ok = gen_server:stop(Anonymous).


transport_data_to_nobody_is_logged(Config) ->
    Module = module(Config),
    Instance = instance(Config),
    ok = Module:register_transport(unbound, self(), #{}),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{tester => self()}}),
    try
        _ = [ ok = await_unknown_target(Config, Id) || Id <- [unbound, binary:copy(<<0>>, 1_000_000)] ],
        ?assertMatch({ok, _}, gen_server:call(Instance, {find_transport, unbound}))
    after
        logger:remove_handler(?MODULE)
    end.


await_unknown_target(Config, Id) ->
    instance(Config) ! {transport_data, Id, data},
    case logged(Config) of
        [#{level := warning, msg := {report, #{event := unknown_target}}}] -> ok;
        [] -> await_unknown_target(Config, Id)
    end.


unknown_route_is_logged_rarely(Config) ->
    Module = module(Config),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{tester => self()}}),
    try
        _ = next_warning(Config),
        Began = erlang:monotonic_time(millisecond),
        _ = [ ok = Module:route_to_server(nobody, t, N) || N <- lists:seq(1, 1000) ],
        _ = [ ok = Module:route_to_transport(broadcast, nobody, N) || N <- lists:seq(1, 1000) ],
        {_Routes, Warning} = next_warning(Config),
        Logged = Warning ++ logged(Config),
        Ms = erlang:monotonic_time(millisecond) - Began,
        ?assert(length(Logged) =< 1 + Ms div 1000, {length(Logged), Ms}),
        ?assertMatch([#{level := warning, msg := {report, #{event := unknown_target}}} | _], Logged)
    after
        logger:remove_handler(?MODULE)
    end.


unlogged_routes_are_counted(Config) ->
    Module = module(Config),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{tester => self()}}),
    try
        _ = next_warning(Config),
        _ = [ ok = Module:route_to_server(nobody, t, N) || N <- lists:seq(1, 17) ],
        {Routes, Logged} = next_warning(Config),
        %% Each route was either logged or counted as suppressed in a later log event.
        Suppressed = [ Number || #{msg := {report, #{suppressed := Number}}} <- Logged ],
        ?assertEqual(17 + Routes, length(Logged) + lists:sum(Suppressed)),
        ?assert(lists:sum(Suppressed) > 0)
    after
        logger:remove_handler(?MODULE)
    end.


%% Routes to an unknown target until a warning is logged. Returns the number of routes and the events logged
%% meanwhile.
next_warning(Config) ->
    next_warning(Config, 1, erlang:monotonic_time(millisecond) + ?DEADLINE_MS).


next_warning(Config, Routes, DeadlineMs) ->
    ok = (module(Config)):route_to_transport(nobody, s, hello),
    case logged(Config) of
        [] ->
            ?assert(erlang:monotonic_time(millisecond) < DeadlineMs),
            timer:sleep(10),
            next_warning(Config, Routes + 1, DeadlineMs);
        Logged ->
            {Routes, Logged}
    end.


%% The log handler of the cases above.
log(#{meta := #{application := erlmcp_native}} = Event, #{config := #{tester := Tester}}) ->
    Tester ! {logged, Event};
log(_Event, _Config) ->
    ok.


%% The events logged so far, by the caller or by the registry's process before it answers.
logged(Config) ->
    _ = gen_server:call(instance(Config), list_servers),
    [ Event || {logged, Event} <- test_support:flush() ].
