%%% The modes of the rollout: where registrations are stored, which path routes take, which mode is configured,
%%% and what holds after the registry's process was killed or stopped.
%%%
%%% The contract: the registry gives the same answers in every mode.
-module(rollout_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(rollout_support, [start_registry/0, await_queue/1, received/1, sleeper/0, end_all/1]).

-define(DEADLINE_MS, 10_000).
-define(MODES,       [current, {percent, 0}, {percent, 30}, {percent, 100}, '100x']).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [modes_that_are_none,
     set_before_the_registry_starts,
     configured_mode,
     mode_of_erlmcp_counts_unless_there_is_an_own_one,
     registrations_are_in_every_mode,
     requests_to_the_process_work_in_every_mode,
     an_id_takes_the_path_of_its_hash,
     broadcasts_take_the_path_of_the_server,
     an_id_is_free_when_its_process_has_exited,
     the_native_path_needs_no_process,
     killed_in_every_mode,
     stopped_in_every_mode,
     bindings_that_cannot_be_change_none,
     anonymous_instances_are_of_the_mode,
     the_shell_shows_the_mode].


init_per_suite(Config) -> rollout_support:init_per_suite(Config).


end_per_suite(Config) -> rollout_support:end_per_suite(Config).


init_per_testcase(Case, Config) -> rollout_support:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) -> rollout_support:end_per_testcase(Case, Config).


modes_that_are_none(_Config) ->
    [ ?assertMatch({error, {bad_option, architecture_version, Bad, "current" ++ _}}, erlmcp_rollout:set(Bad))
      || Bad <- [native, classic, "100x", <<"100x">>, {percent, -1}, {percent, 101}, {percent, 1.0}, {percent}, 50, []] ],
    ?assertEqual('100x', erlmcp_rollout:get()),
    [ ?assertMatch({error, {bad_option, Key, Value, [_ | _]}}, erlmcp_rollout:set(current, #{Key => Value}))
      || {Key, Value} <- [{max_pause_ms, 0}, {max_pause_ms, -1}, {max_pause_ms, 1.5}, {max_pause_ms, soon}, {other, 1}] ],
    [ ?assertMatch({error, {bad_option, options, Wrong, "a map, a property list or a keyword list"}},
                   erlmcp_rollout:set(current, Wrong))
      || Wrong <- [off, 5, [{max_pause_ms}], [{max_pause_ms, 1} | improper]] ],
    ?assertEqual('100x', erlmcp_rollout:get()),
    ?assertEqual(ok, erlmcp_rollout:set('100x', [{max_pause_ms, infinity}])),
    ?assertEqual(ok, erlmcp_rollout:set('100x', #{max_pause_ms => infinity})).


set_before_the_registry_starts(_Config) ->
    ok = gen_server:stop(erlmcp_registry),
    ?assertEqual(ok, erlmcp_rollout:set({percent, 20})),
    ?assertEqual({percent, 20}, erlmcp_rollout:get()),
    ?assertMatch(#{mode := {percent, 20}, registry_process := undefined}, erlmcp_rollout:status()),
    ?assertEqual(ok, erlmcp_registry:route_to_server(s, t, nobody)),
    Pid = start_registry(),
    ?assertMatch(#{mode := {percent, 20}, registry_process := Pid, configured := {percent, 20}},
                 erlmcp_rollout:status()).


configured_mode(_Config) ->
    ok = gen_server:stop(erlmcp_registry),
    ok = application:set_env(erlmcp_native, architecture_version, current),
    start_registry(),
    ?assertEqual(current, erlmcp_rollout:get()),
    %% The application also sets the configured mode in a registry that is already running.
    ok = application:set_env(erlmcp_native, architecture_version, {percent, 7}),
    ok = application:start(erlmcp_native),
    ?assertEqual({percent, 7}, erlmcp_rollout:get()),
    ok = application:stop(erlmcp_native),
    ok = application:set_env(erlmcp_native, architecture_version, seven),
    ?assertMatch({error, {{bad_option, architecture_version, seven, _}, _}}, application:start(erlmcp_native)).


mode_of_erlmcp_counts_unless_there_is_an_own_one(_Config) ->
    ok = gen_server:stop(erlmcp_registry),
    ok = application:set_env(erlmcp, architecture_version, {percent, 3}),
    start_registry(),
    ?assertEqual({percent, 3}, erlmcp_rollout:get()),
    ok = gen_server:stop(erlmcp_registry),
    ok = application:set_env(erlmcp_native, architecture_version, {percent, 4}),
    start_registry(),
    ?assertEqual({percent, 4}, erlmcp_rollout:get()),
    ok = gen_server:stop(erlmcp_registry),
    application:unset_env(erlmcp_native, architecture_version),
    ok = application:set_env(erlmcp, architecture_version, four),
    ?assertMatch({error, {{bad_option, architecture_version, four, _}, _}}, application:start(erlmcp_native)).


registrations_are_in_every_mode(_Config) ->
    Ids = [ {id, N} || N <- lists:seq(1, 50) ] ++ [1, 1.0, broadcast, undefined, <<"b">>, "l", #{m => 1}],
    Expected = [ begin
                     {Server, Transport} = {sleeper(), sleeper()},
                     ok = erlmcp_registry:register_server(Id, Server, {config, Id}),
                     ok = erlmcp_registry:register_transport(Id, Transport, #{server_id => {id, 1}, of_id => Id}),
                     {Id, Server, Transport}
                 end || Id <- Ids ],
    ok = erlmcp_registry:bind_transport_to_server({id, 2}, {id, 3}),
    ok = erlmcp_registry:unbind_transport({id, 4}),
    ok = erlmcp_registry:register_transport(early, self(), #{server_id => later}),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          ?assertEqual(Mode, erlmcp_rollout:get()),
          [ begin
                ?assertEqual({ok, {Server, {config, Id}}}, erlmcp_registry:find_server(Id)),
                ?assertEqual({ok, {Transport, #{server_id => {id, 1}, of_id => Id}}}, erlmcp_registry:find_transport(Id)),
                Bound = case Id of
                            {id, 2} -> {ok, {id, 3}};
                            {id, 4} -> {error, not_found};
                            _ -> {ok, {id, 1}}
                        end,
                ?assertEqual(Bound, erlmcp_registry:get_server_for_transport(Id))
            end || {Id, Server, Transport} <- Expected ],
          ?assertEqual({ok, later}, erlmcp_registry:get_server_for_transport(early)),
          ?assertEqual(length(Ids), length(erlmcp_registry:list_servers())),
          ?assertEqual(length(Ids) + 1, length(erlmcp_registry:list_transports()))
      end || Mode <- ?MODES ++ lists:reverse(?MODES) ++ ['100x', current, {percent, 50}, current, '100x'] ],
    #{last_switch := #{from := current, to := '100x', result := ok, copied := Copied, entries := Copied}} =
        erlmcp_rollout:status(),
    ?assertEqual(2 * length(Ids) + 1, Copied),
    end_all([ Pid || {_, Server, Transport} <- Expected, Pid <- [Server, Transport] ]).


requests_to_the_process_work_in_every_mode(_Config) ->
    Pid = sleeper(),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          ?assertEqual(ok, gen_server:call(erlmcp_registry, {register_server, s, Pid, Mode})),
          ?assertEqual({ok, {Pid, Mode}}, gen_server:call(erlmcp_registry, {find_server, s})),
          ?assertEqual({ok, {Pid, Mode}}, erlmcp_registry:find_server(s)),
          ?assertEqual({error, unknown_request}, gen_server:call(erlmcp_registry, what)),
          ?assertEqual({error, unknown_request}, gen_server:call(erlmcp_registry, {erlmcp_rollout, what})),
          ?assertEqual({error, badarg}, gen_server:call(erlmcp_registry, {register_server, s2, no_pid, x})),
          ok = gen_server:cast(erlmcp_registry, {erlmcp_rollout, what}),
          ok = gen_server:call(erlmcp_registry, {register_transport, t, self(), #{}}),
          ok = gen_server:cast(erlmcp_registry, {route_to_transport, t, s, Mode}),
          receive {mcp_response, s, Mode} -> ok after ?DEADLINE_MS -> ct:fail(not_routed) end,
          ?assertEqual(ok, gen_server:call(erlmcp_registry, {unregister_server, s})),
          ?assertEqual(ok, gen_server:call(erlmcp_registry, {unregister_transport, t})),
          ?assertEqual([], erlmcp_registry:list_servers())
      end || Mode <- ?MODES ],
    end_all([Pid]).


the_native_path_needs_no_process(_Config) ->
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{server_id => s}),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          killed = test_support:kill(whereis(erlmcp_registry)),
          ?assertEqual(ok, erlmcp_registry:route_to_server(s, t, Mode)),
          ?assertEqual(ok, erlmcp_registry:route_to_transport(t, s, Mode)),
          ?assertEqual(ok, erlmcp_registry:route_to_transport(broadcast, s, Mode)),
          ?assertEqual([{mcp_message, t, Mode}, {mcp_response, s, Mode}, {mcp_response, s, Mode}], received(3)),
          Find = {find_server, s},
          ?assertExit({noproc, {gen_server, call, [erlmcp_registry, Find]}}, erlmcp_registry:find_server(s)),
          start_registry()
      end || Mode <- [{percent, 100}, {percent, 50}, {percent, 0}, '100x'] ].


killed_in_every_mode(_Config) ->
    {Server, Transport} = {sleeper(), sleeper()},
    ok = erlmcp_registry:register_server(s, Server, #{config => s}),
    ok = erlmcp_registry:register_transport(t, Transport, #{server_id => s}),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          Ending = sleeper(),
          ok = erlmcp_registry:register_transport({ending, Mode}, Ending, #{server_id => s}),
          killed = test_support:kill(whereis(erlmcp_registry)),
          end_all([Ending]),
          start_registry(),
          ?assertEqual(Mode, erlmcp_rollout:get()),
          ?assertEqual([{s, {Server, #{config => s}}}], erlmcp_registry:list_servers()),
          ?assertEqual([{t, {Transport, #{server_id => s}}}], erlmcp_registry:list_transports()),
          ?assertEqual({ok, s}, erlmcp_registry:get_server_for_transport(t)),
          ?assertEqual({error, not_found}, erlmcp_registry:find_transport({ending, Mode}))
      end || Mode <- ?MODES ++ lists:reverse(?MODES) ],
    end_all([Server]),
    ok = erlmcp_rollout:set(current),
    ?assertEqual({error, not_found}, erlmcp_registry:get_server_for_transport(t)),
    end_all([Transport]).


stopped_in_every_mode(_Config) ->
    [ begin
          ok = erlmcp_rollout:set(Mode),
          ok = erlmcp_registry:register_server(s, self(), #{}),
          ok = gen_server:stop(erlmcp_registry),
          ?assertEqual(ok, erlmcp_registry:route_to_server(s, t, Mode)),
          start_registry(),
          ?assertEqual({error, not_found}, erlmcp_registry:find_server(s)),
          ?assertEqual([], received(0))
      end || Mode <- ?MODES ].


%% An id that is too long for the native registry is refused before any binding is changed.
bindings_that_cannot_be_change_none(_Config) ->
    Holder = sleeper(),
    Long = binary:copy(<<"long">>, 20_000),
    [ ok = erlmcp_registry:register_transport(Id, Holder, #{server_id => s}) || Id <- lists:seq(1, 20) ],
    {ok, Before} = erlmcp_registry:get_all_state(),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          [ begin
                Refused = try
                              erlmcp_registry:restore_state({registry_state, Bindings})
                          catch
                              error:badarg -> {error, badarg}
                          end,
                ?assertEqual({error, badarg}, Refused),
                ?assertEqual({ok, Before}, erlmcp_registry:get_all_state()),
                [ ?assertEqual({ok, s}, erlmcp_registry:get_server_for_transport(Id)) || Id <- lists:seq(1, 20) ]
            end || Bindings <- [#{Long => s}, #{1 => Long}] ]
      end || Mode <- ['100x', {percent, 50}] ],
    end_all([Holder]).


anonymous_instances_are_of_the_mode(_Config) ->
    [ begin
          ok = erlmcp_rollout:set(Mode),
          {ok, Anonymous} = gen_server:start(erlmcp_registry, [], []),
          ok = gen_server:call(Anonymous, {register_server, s, self(), #{}}),
          ?assertEqual({error, not_found}, erlmcp_registry:find_server(s)),
          ok = erlmcp_rollout:set('100x'),
          ?assertEqual({ok, {self(), #{}}}, gen_server:call(Anonymous, {find_server, s})),
          ok = gen_server:cast(Anonymous, {route_to_server, s, t, Mode}),
          ?assertEqual([{mcp_message, t, Mode}], received(1)),
          ?assertEqual({error, unknown_request}, gen_server:call(Anonymous, {erlmcp_rollout, {set, current}})),
          ok = gen_server:stop(Anonymous)
      end || Mode <- ?MODES ].


the_shell_shows_the_mode(_Config) ->
    ok = erlmcp_rollout:set({percent, 12}),
    ?assertMatch(#{mode := {percent, 12}}, erlmcp_native:info()),
    ok = erlmcp_rollout:set(current),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ?assertMatch(#{mode := current}, erlmcp_native:info()).


%% While the process is suspended, routes to some ids are delivered at once and routes to others wait. All ids
%% can be registered and found.
an_id_takes_the_path_of_its_hash(_Config) ->
    Ids = [ {id, N} || N <- lists:seq(1, 200) ],
    ok = erlmcp_rollout:set({percent, 30}),
    ok = sys:suspend(erlmcp_registry),
    [ ok = erlmcp_registry:register_server(Id, self(), #{}) || Id <- Ids ],
    [ ?assertEqual({ok, {self(), #{}}}, erlmcp_registry:find_server(Id)) || Id <- Ids ],
    {Straight, Called} = lists:partition(fun(Id) -> erlang:phash2(Id, 100) < 30 end, Ids),
    ?assert(length(Straight) > 20, length(Straight)),
    [ ok = erlmcp_registry:route_to_server(Id, t, Id) || Id <- Straight ],
    ?assertEqual([ {mcp_message, t, Id} || Id <- Straight ], received(length(Straight))),
    Waiting = [ spawn_monitor(fun() -> exit({done, erlmcp_registry:route_to_server(Id, t, Id)}) end)
                || Id <- Called ],
    ok = await_queue(length(Called)),
    ?assert(lists:all(fun({Pid, _}) -> is_process_alive(Pid) end, Waiting)),
    ?assertEqual([], received(0)),
    ok = sys:resume(erlmcp_registry),
    [ receive {'DOWN', M, process, P, Reason} -> ?assertEqual({done, ok}, Reason) end || {P, M} <- Waiting ],
    ?assertEqual(lists:sort(Called), lists:sort([ Id || {mcp_message, t, Id} <- received(length(Called)) ])).


broadcasts_take_the_path_of_the_server(_Config) ->
    {Straight, Called} = {id(fun(Hash) -> Hash < 30 end), id(fun(Hash) -> Hash >= 30 end)},
    [ ok = erlmcp_registry:register_server(Id, self(), #{}) || Id <- [Straight, Called] ],
    [ ok = erlmcp_registry:register_transport({of_server, Id, N}, self(), #{server_id => Id})
      || Id <- [Straight, Called], N <- [1, 2] ],
    ok = erlmcp_rollout:set({percent, 30}),
    ok = sys:suspend(erlmcp_registry),
    ok = erlmcp_registry:route_to_transport(broadcast, Straight, m),
    ?assertEqual([{mcp_response, Straight, m}, {mcp_response, Straight, m}], received(2)),
    {Pid, Monitor} = spawn_monitor(fun() -> exit({done, erlmcp_registry:route_message({server, Called}, m)}) end),
    ok = await_queue(1),
    ok = sys:resume(erlmcp_registry),
    receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual({done, ok}, Reason) end,
    ?assertEqual([{mcp_response, Called, m}, {mcp_response, Called, m}], received(2)).


id(IsRight) ->
    hd([ Id || Id <- lists:seq(1, 1000), IsRight(erlang:phash2(Id, 100)) ]).


%% An id is free before the store has noticed the exit.
an_id_is_free_when_its_process_has_exited(_Config) ->
    [ begin
          ok = erlmcp_rollout:set(Mode),
          Pids = [Server, Transport, Bound] = [ sleeper() || _ <- [1, 2, 3] ],
          %% These monitors fire before the store's.
          [ monitor(process, Pid) || Pid <- Pids, _ <- lists:seq(1, 200) ],
          ok = erlmcp_registry:register_server(s, Server, first),
          ok = erlmcp_registry:register_transport(t, Transport, #{server_id => s}),
          ok = erlmcp_registry:register_transport(bound, Bound, #{server_id => s}),
          [ exit(Pid, kill) || Pid <- Pids ],
          [ receive {'DOWN', _, process, Pid, killed} -> ok end || Pid <- Pids ],
          ?assertEqual({error, not_found}, erlmcp_registry:find_server(s)),
          ?assertEqual(ok, erlmcp_registry:register_server(s, self(), second)),
          ?assertEqual({error, not_found}, erlmcp_registry:find_transport(t)),
          ?assertEqual(ok, erlmcp_registry:register_transport(t, self(), #{})),
          ?assertEqual({error, not_found}, erlmcp_registry:get_server_for_transport(t)),
          ?assertEqual({error, transport_not_found}, erlmcp_registry:bind_transport_to_server(bound, s)),
          ?assertEqual(ok, erlmcp_registry:update_server(s, third)),
          ?assertEqual({ok, {self(), third}}, erlmcp_registry:find_server(s)),
          ?assertEqual([{s, {self(), third}}], erlmcp_registry:list_servers()),
          ok = erlmcp_registry:unregister_server(s),
          ok = erlmcp_registry:unregister_transport(t),
          _ = test_support:flush()
      end || Mode <- ?MODES ].
