%%% The rollout: modes, switches between them, and what goes on meanwhile.
%%%
%%% The contract: in every mode the registry answers the same; a switch loses no registration, no binding
%%% and no message, doubles none, and keeps the order between each sender and receiver; what it cannot
%%% copy makes it fail and leaves everything as it was.
%%%
%%% ROLLOUT_SECONDS: how long the switches under load go on (5).
-module(rollout_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

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
     the_native_path_needs_no_process,
     changes_go_through_the_process_while_there_are_two,
     killed_in_every_mode,
     killed_during_a_switch,
     stopped_in_every_mode,
     one_switch_at_a_time,
     whoever_wants_the_same_mode_waits,
     caller_of_a_switch_ends,
     application_controller_is_busy,
     wrong_mode_in_the_environment_is_replaced,
     application_starts_during_a_switch,
     start_that_fails_leaves_nothing,
     bindings_that_cannot_be_change_none,
     ids_that_only_one_takes_end_a_switch,
     what_was_different_is_repaired,
     registrations_race_a_switch,
     nothing_overtakes_what_waits_in_the_mailbox,
     broadcasts_keep_their_place,
     comparison_counts_differences,
     comparison_of_equals_counts_none,
     anonymous_instances_are_of_the_mode,
     the_shell_shows_the_mode,
     switches_under_load].


init_per_suite(Config) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, error),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = erlmcp_backpressure:configure(),
    [{logger_level, Level} | Config].


end_per_suite(Config) ->
    ok = logger:set_primary_config(level, proplists:get_value(logger_level, Config)),
    application:unset_env(erlmcp_native, token_bucket),
    ok = erlmcp_backpressure:configure().


init_per_testcase(_Case, Config) ->
    undefined = whereis(erlmcp_registry),
    start_registry(),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = whereis(erlmcp_registry) =:= undefined orelse gen_server:stop(erlmcp_registry),
    application:unset_env(erlmcp, architecture_version),
    application:unset_env(erlmcp_native, architecture_version),
    start_registry(),
    ok = gen_server:stop(erlmcp_registry).


%%% Modes


modes_that_are_none(_Config) ->
    [ ?assertMatch({error, {bad_option, architecture_version, Bad, "current" ++ _}}, erlmcp_rollout:set(Bad))
      || Bad <- [native, classic, "100x", <<"100x">>, {percent, -1}, {percent, 101}, {percent, 1.0}, {percent}, 50, []] ],
    ?assertEqual('100x', erlmcp_rollout:get()),
    ?assertError(function_clause, erlmcp_rollout:compare(true)).


set_before_the_registry_starts(_Config) ->
    ok = gen_server:stop(erlmcp_registry),
    ?assertEqual(ok, erlmcp_rollout:set({percent, 20})),
    ?assertEqual({percent, 20}, erlmcp_rollout:get()),
    ?assertMatch(#{mode := {percent, 20}, registry_process := undefined}, erlmcp_rollout:status()),
    ?assertEqual({error, registry_not_running}, erlmcp_rollout:compare(on)),
    ?assertEqual(ok, erlmcp_registry:route_to_server(s, t, nobody)),
    Pid = start_registry(),
    ?assertMatch(#{mode := {percent, 20}, registry_process := Pid, configured := {percent, 20}},
                 erlmcp_rollout:status()).


configured_mode(_Config) ->
    ok = gen_server:stop(erlmcp_registry),
    ok = application:set_env(erlmcp_native, architecture_version, current),
    start_registry(),
    ?assertEqual(current, erlmcp_rollout:get()),
    %% The application asks too, of a registry that runs already.
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
    #{last_switch := #{from := current, to := '100x', result := ok, copied := Copied, repaired := 0}} =
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


%% With the process suspended, ids on the native path are routed and found at once, others wait.
an_id_takes_the_path_of_its_hash(_Config) ->
    Ids = [ {id, N} || N <- lists:seq(1, 200) ],
    [ ok = erlmcp_registry:register_server(Id, self(), #{}) || Id <- Ids ],
    ok = erlmcp_rollout:set({percent, 30}),
    {Native, Classic} = lists:partition(fun(Id) -> erlang:phash2(Id, 100) < 30 end, Ids),
    ?assert(length(Native) > 20, length(Native)),
    ok = sys:suspend(erlmcp_registry),
    [ ok = erlmcp_registry:route_to_server(Id, t, Id) || Id <- Native ],
    ?assertEqual([ {mcp_message, t, Id} || Id <- Native ], received(length(Native))),
    [ ?assertEqual({ok, {self(), #{}}}, erlmcp_registry:find_server(Id)) || Id <- Native ],
    Waiting = [ spawn_monitor(fun() -> exit({done, erlmcp_registry:route_to_server(Id, t, Id)}) end)
                || Id <- Classic ],
    timer:sleep(50),
    ?assert(lists:all(fun({Pid, _}) -> is_process_alive(Pid) end, Waiting)),
    ?assertEqual([], received(0)),
    ok = sys:resume(erlmcp_registry),
    [ receive {'DOWN', M, process, P, Reason} -> ?assertEqual({done, ok}, Reason) end || {P, M} <- Waiting ],
    ?assertEqual(lists:sort(Classic), lists:sort([ Id || {mcp_message, t, Id} <- received(length(Classic)) ])).


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


changes_go_through_the_process_while_there_are_two(_Config) ->
    ok = erlmcp_rollout:set({percent, 100}),
    ok = sys:suspend(erlmcp_registry),
    {Pid, Monitor} = spawn_monitor(fun() -> exit(erlmcp_registry:register_server(s, whereis(init), #{})) end),
    timer:sleep(20),
    ?assertEqual({error, not_found}, erlmcp_registry:find_server(s)),
    ok = sys:resume(erlmcp_registry),
    receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(ok, Reason) end,
    ?assertMatch({ok, {_, #{}}}, erlmcp_registry:find_server(s)),
    ?assertEqual(ok, erlmcp_registry:unregister_server(s)),
    %% At once again, when there is only one.
    ok = erlmcp_rollout:set('100x'),
    ok = sys:suspend(erlmcp_registry),
    ?assertEqual(ok, erlmcp_registry:register_server(s, self(), #{})),
    ok = sys:resume(erlmcp_registry).


%%% The process ends


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


%% Whoever called set/1 learns of it, and the mode is what it was, with everything in it.
killed_during_a_switch(_Config) ->
    Holder = sleeper(),
    Ids = lists:seq(1, 3000),
    [ ok = erlmcp_registry:register_transport(Id, Holder, #{server_id => s}) || Id <- Ids ],
    Switch = fun(From, To) ->
                     ok = erlmcp_rollout:set(From),
                     {Setter, Monitor} = spawn_monitor(fun() -> exit({set, erlmcp_rollout:set(To)}) end),
                     ok = await(To, fun() -> maps:get(switching_to, erlmcp_rollout:status()) end),
                     killed = test_support:kill(whereis(erlmcp_registry)),
                     receive {'DOWN', Monitor, process, Setter, Reason} -> ?assertMatch({killed, _}, Reason) end,
                     start_registry(),
                     ?assertEqual(From, erlmcp_rollout:get()),
                     ?assertEqual(length(Ids), length(erlmcp_registry:list_transports())),
                     [ ?assertEqual({ok, s}, erlmcp_registry:get_server_for_transport(Id)) || Id <- Ids ]
             end,
    [ Switch(From, To) || {From, To} <- [{'100x', current},
                                         {'100x', {percent, 50}},
                                         {current, '100x'},
                                         {current, {percent, 50}},
                                         {{percent, 50}, current},
                                         {{percent, 50}, '100x'}] ],
    end_all([Holder]).


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


%%% Switches


one_switch_at_a_time(_Config) ->
    Holder = many_transports(),
    {Setter, Monitor} = spawn_monitor(fun() -> exit({set, erlmcp_rollout:set(current)}) end),
    ok = await(current, fun() -> maps:get(switching_to, erlmcp_rollout:status()) end),
    ?assertEqual({error, {switching_to, current}}, erlmcp_rollout:set({percent, 5})),
    receive {'DOWN', Monitor, process, Setter, Reason} -> ?assertEqual({set, ok}, Reason) end,
    ?assertEqual(current, erlmcp_rollout:get()),
    ?assertMatch(#{switching_to := none, last_switch := #{entries := 5000, copied := 5000, repaired := 0}},
                 erlmcp_rollout:status()),
    end_all([Holder]).


whoever_wants_the_same_mode_waits(_Config) ->
    Holder = many_transports(),
    Setters = [ spawn_monitor(fun() -> exit({erlmcp_rollout:set(current), erlmcp_rollout:get()}) end)
                || _ <- lists:seq(1, 5) ],
    [ receive {'DOWN', Monitor, process, Setter, Reason} -> ?assertEqual({ok, current}, Reason) end
      || {Setter, Monitor} <- Setters ],
    end_all([Holder]).


%% The mode stays, also for the next process.
caller_of_a_switch_ends(_Config) ->
    Holder = many_transports(),
    Setter = spawn(fun() -> erlmcp_rollout:set(current) end),
    ok = await(current, fun() -> maps:get(switching_to, erlmcp_rollout:status()) end),
    killed = test_support:kill(Setter),
    ok = await(none, fun() -> maps:get(switching_to, erlmcp_rollout:status()) end),
    ok = await(current, fun() -> maps:get(configured, erlmcp_rollout:status()) end),
    ?assertEqual(current, erlmcp_rollout:get()),
    killed = test_support:kill(whereis(erlmcp_registry)),
    start_registry(),
    ?assertEqual(current, erlmcp_rollout:get()),
    end_all([Holder]).


%% The registry serves all the same, and whoever has asked waits until the mode is configured.
application_controller_is_busy(_Config) ->
    ok = sys:suspend(application_controller),
    Registry = whereis(erlmcp_registry),
    {Setter, Monitor} = spawn_monitor(fun() -> exit({set, erlmcp_rollout:set({percent, 100})}) end),
    try
        %% Longer than a call to the controller would wait.
        timer:sleep(5500),
        ?assertEqual(Registry, whereis(erlmcp_registry)),
        ?assertEqual(ok, gen_server:call(erlmcp_registry, {register_server, s, self(), #{}})),
        ?assertEqual({percent, 100}, erlmcp_rollout:get())
    after
        ok = sys:resume(application_controller)
    end,
    receive {'DOWN', Monitor, process, Setter, Reason} -> ?assertEqual({set, ok}, Reason) end,
    ?assertMatch(#{mode := {percent, 100}, configured := {percent, 100}}, erlmcp_rollout:status()).


wrong_mode_in_the_environment_is_replaced(_Config) ->
    ok = application:set_env(erlmcp_native, architecture_version, wrong),
    ?assertEqual(ok, erlmcp_rollout:set('100x')),
    ?assertEqual({ok, '100x'}, application:get_env(erlmcp_native, architecture_version)),
    ok = application:start(erlmcp_native),
    ok = application:stop(erlmcp_native).


%% The registry's process has been restarted and makes the mode be the configured one.
application_starts_during_a_switch(_Config) ->
    [ begin
          ok = erlmcp_rollout:set('100x'),
          Holder = many_transports(),
          ok = application:set_env(erlmcp_native, architecture_version, current),
          killed = test_support:kill(whereis(erlmcp_registry)),
          {ok, _} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
          ?assertMatch(#{switching_to := current}, erlmcp_rollout:status()),
          ok = application:set_env(erlmcp_native, architecture_version, Mode),
          ok = application:start(erlmcp_native),
          ?assertEqual(Mode, erlmcp_rollout:get()),
          ok = application:stop(erlmcp_native),
          end_all([Holder])
      end || Mode <- [current, {percent, 5}] ].


%% Neither thresholds, for which nobody would sample, nor a filter of logs.
start_that_fails_leaves_nothing(_Config) ->
    Long = binary:copy(<<"long">>, 20_000),
    ok = erlmcp_rollout:set(current),
    ok = erlmcp_registry:register_server(Long, self(), #{}),
    ok = application:set_env(erlmcp_native, architecture_version, '100x'),
    {ok, Handler} = logger:get_handler_config(default),
    ?assertMatch({error, {{cannot_copy, {server, Long}, badarg}, _}}, application:start(erlmcp_native)),
    ?assertEqual({ok, Handler}, logger:get_handler_config(default)),
    ?assertMatch(#{threshold := infinity}, erlmcp_admission_control:get_shard_stats(0)),
    ok = erlmcp_registry:unregister_server(Long),
    ok = application:start(erlmcp_native),
    ?assertEqual('100x', erlmcp_rollout:get()),
    ok = application:stop(erlmcp_native).


%% An id that is too long for the native registry is told before any binding is changed.
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


many_transports() ->
    Holder = sleeper(),
    [ ok = erlmcp_registry:register_transport(Id, Holder, #{}) || Id <- lists:seq(1, 5000) ],
    Holder.


ids_that_only_one_takes_end_a_switch(_Config) ->
    Long = binary:copy(<<"long">>, 20_000),
    ?assertError(badarg, erlmcp_registry:register_server(Long, self(), #{})),
    ok = erlmcp_rollout:set(current),
    ok = erlmcp_registry:register_server(short, self(), #{}),
    ok = erlmcp_registry:register_server(Long, self(), #{}),
    [ begin
          ?assertEqual({error, {cannot_copy, {server, Long}, badarg}}, erlmcp_rollout:set(Mode)),
          ?assertMatch(#{
                         mode := current,
                         configured := current,
                         switching_to := none,
                         native := not_in_use,
                         last_switch := #{result := {error, _}}
                        },
                       erlmcp_rollout:status()),
          ok = erlmcp_registry:route_to_server(Long, t, Mode),
          ok = erlmcp_registry:route_to_server(short, t, Mode),
          ?assertEqual([{mcp_message, t, Mode}, {mcp_message, t, Mode}], received(2))
      end || Mode <- [{percent, 10}, '100x'] ],
    ok = erlmcp_registry:unregister_server(Long),
    ?assertEqual(ok, erlmcp_rollout:set('100x')),
    ?assertEqual({ok, {self(), #{}}}, erlmcp_registry:find_server(short)).


%% Behind the back of both, what one registry has is changed.
what_was_different_is_repaired(_Config) ->
    [ ok = erlmcp_registry:register_server(Id, self(), #{}) || Id <- [a, b, c] ],
    [ ok = erlmcp_registry:register_transport(Id, self(), #{server_id => a}) || Id <- [a, b, c] ],
    ok = erlmcp_rollout:set({percent, 50}),
    ok = erlmcp_nif:unregister(exclusive, server, b),
    ok = erlmcp_nif:bind(exclusive, c, c, true),
    ok = erlmcp_nif:register(exclusive, transport, d, self(), self(), #{}),
    ok = erlmcp_rollout:set(current),
    #{last_switch := #{copied := 3, result := ok}} = erlmcp_rollout:status(),
    %% The native registry had the say.
    ?assertEqual({error, not_found}, erlmcp_registry:find_server(b)),
    ?assertEqual({ok, c}, erlmcp_registry:get_server_for_transport(c)),
    ?assertEqual({ok, {self(), #{}}}, erlmcp_registry:find_transport(d)).


%% An id is registered from many processes while modes change: exactly one of them has it.
registrations_race_a_switch(_Config) ->
    Switcher = spawn_link(fun() -> switch_on(undefined, 0) end),
    [ begin
          Racers = [ spawn_monitor(fun() ->
                                           Won = erlmcp_registry:register_server({raced, Round}, self(), #{}),
                                           exit({won, Won =:= ok andalso wait_found({raced, Round})})
                                   end) || _ <- lists:seq(1, 16) ],
          Won = [ Won || {Pid, Monitor} <- Racers,
                         Won <- [receive {'DOWN', Monitor, process, Pid, {won, W}} -> W end],
                         Won =/= false ],
          ?assertMatch([_ | _], Won),
          ?assertEqual([true], lists:usort(Won)),
          %% A second one won only after the first one had ended.
          ok = await({error, not_found}, fun() -> erlmcp_registry:find_server({raced, Round}) end)
      end || Round <- lists:seq(1, 200) ],
    ?assert(stop_switcher(Switcher) > 10).


wait_found(Id) ->
    {ok, {Pid, #{}}} = erlmcp_registry:find_server(Id),
    Pid =:= self().


%% A mailbox full of messages that were sent by `current', and a sender that goes on.
nothing_overtakes_what_waits_in_the_mailbox(_Config) ->
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
      end || Mode <- ['100x', {percent, 50}, '100x', {percent, 100}] ].


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


broadcasts_keep_their_place(_Config) ->
    Receivers = [ {Id, start_receiver()} || Id <- lists:seq(1, 20) ],
    ok = erlmcp_registry:register_server(s, self(), #{}),
    [ ok = erlmcp_registry:register_transport(Id, Pid, #{server_id => s}) || {Id, Pid} <- Receivers ],
    Switcher = spawn_link(fun() -> switch_on(undefined, 0) end),
    Last = 3000,
    [ case N rem 3 of
          0 -> ok = erlmcp_registry:route_to_transport(broadcast, s, {from, self(), N});
          1 -> [ ok = erlmcp_registry:route_to_transport(Id, s, {from, self(), N}) || {Id, _} <- Receivers ];
          2 -> ok = erlmcp_registry:route_message({server, s}, {from, self(), N})
      end || N <- lists:seq(1, Last) ],
    [ ?assertEqual(Last, last_in_order(Pid, self(), Last)) || {_, Pid} <- Receivers ],
    ?assert(stop_switcher(Switcher) > 10),
    end_all([ Pid || {_, Pid} <- Receivers ]).


%%% Comparison


comparison_counts_differences(_Config) ->
    Ids = lists:seq(1, 100),
    [ ok = erlmcp_registry:register_server(Id, self(), #{}) || Id <- Ids ],
    ok = erlmcp_rollout:set({percent, 50}),
    [ ok = erlmcp_registry:route_to_server(Id, t, Id) || Id <- Ids ],
    ?assertMatch(#{is_on := false, compared := 0, differences := 0}, comparison()),
    ok = erlmcp_rollout:compare(on),
    [ ok = erlmcp_registry:route_to_server(Id, t, Id) || Id <- Ids ],
    ?assertMatch(#{is_on := true, compared := 100, differences := 0, last_difference := none}, comparison()),
    %% One registry has lost two of them.
    {Native, Classic} = lists:partition(fun(Id) -> erlang:phash2(Id, 100) < 50 end, Ids),
    [ ok = erlmcp_nif:unregister(exclusive, server, Id) || Id <- [hd(Native), hd(Classic)] ],
    [ ok = erlmcp_registry:route_to_server(Id, t, Id) || Id <- Ids ],
    ?assertMatch(#{compared := 200, differences := 2, last_difference := #{kind := server, native := none}}, comparison()),
    {error, not_found} = erlmcp_registry:find_server(hd(Native)),
    {ok, _} = erlmcp_registry:find_server(hd(Classic)),
    ?assertMatch(#{compared := 202, differences := 4}, comparison()),
    ok = erlmcp_rollout:compare(off),
    [ ok = erlmcp_registry:route_to_server(Id, t, Id) || Id <- Ids ],
    ?assertMatch(#{is_on := false, compared := 202, differences := 4}, comparison()).


%% Changes that come between the one answer and the other are no differences.
comparison_of_equals_counts_none(_Config) ->
    ok = erlmcp_rollout:set({percent, 50}),
    ok = erlmcp_rollout:compare(on),
    End = now_ms() + 1000,
    Workers = [ spawn_monitor(fun() -> churn(Worker, End) end) || Worker <- lists:seq(1, 4) ],
    [ receive {'DOWN', M, process, P, Reason} -> ?assertEqual(normal, Reason) end || {P, M} <- Workers ],
    #{compared := Compared, differences := Differences} = comparison(),
    ?assert(Compared > 1000, Compared),
    ?assertEqual(0, Differences),
    ok = erlmcp_rollout:compare(off).


%% Few ids for all workers, so that they get into each other's way.
churn(Worker, End) ->
    Id = rand:uniform(10),
    case rand:uniform(6) of
        1 -> _ = erlmcp_registry:register_server(Id, spawn(fun() -> timer:sleep(rand:uniform(3)) end), Worker);
        2 -> _ = erlmcp_registry:unregister_server(Id);
        3 -> _ = erlmcp_registry:register_transport(Id, spawn(fun() -> timer:sleep(rand:uniform(3)) end), #{server_id => Id});
        4 -> _ = erlmcp_registry:find_server(Id);
        5 -> ok = erlmcp_registry:route_to_server(Id, Id, Worker);
        6 -> ok = erlmcp_registry:route_to_transport(Id, Id, Worker)
    end,
    now_ms() >= End orelse churn(Worker, End).


comparison() ->
    %% What was sent to the process before is counted.
    maps:get(comparison, erlmcp_rollout:status()).


%%% Others


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


%%% Load


%% Senders with numbered messages, processes that register, bind, unregister and die, and one switch
%% after the other.
switches_under_load(_Config) ->
    Seconds = test_support:positive_integer("ROLLOUT_SECONDS", 5),
    End = now_ms() + Seconds * 1000,
    Receivers = maps:from_list([ {N, start_receiver()} || N <- lists:seq(1, 64) ]),
    maps:foreach(fun(N, Pid) ->
                         ok = erlmcp_registry:register_server({s, N}, Pid, #{number => N}),
                         ok = erlmcp_registry:register_transport({t, N}, Pid, #{server_id => {s, N}})
                 end,
                 Receivers),
    Senders = [ spawn_monitor(fun() -> exit({sent, send_numbered(#{}, #{}, map_size(Receivers), End)}) end)
                || _ <- lists:seq(1, 4) ],
    Owners = [ spawn_monitor(fun() -> exit({owns, own(Owner, #{}, End)}) end) || Owner <- lists:seq(1, 4) ],
    Switcher = spawn_link(fun() -> switch_on([current, {percent, 10}, {percent, 50}, '100x', current], 200) end),
    Sent = [ {Pid, Counts} || {Pid, _} = Sender <- Senders, {sent, Counts} <- [result(Sender)] ],
    ?assertEqual(4, length(Sent)),
    Owned = lists:append([ maps:to_list(Own) || Owner <- Owners, {owns, Own} <- [result(Owner)] ]),
    Switches = stop_switcher(Switcher),
    ct:pal("~b switches in ~b s, ~b messages, ~b registrations in the end",
           [Switches, Seconds, lists:sum([ N || {_, {Counts, _}} <- Sent, N <- maps:values(Counts) ]), length(Owned)]),
    ?assert(Switches >= Seconds, Switches),
    %% Nothing lost, nothing doubled, in order.
    [ ?assertEqual({Number, Count}, {Number, last_in_order(maps:get(Number, Receivers), Sender, Count)})
      || {Sender, {Counts, _Refused}} <- Sent, {Number, Count} <- maps:to_list(Counts) ],
    ?assertEqual([], [ Refused || {_, {_, Refused}} <- Sent, Refused =/= #{} ]),
    %% Everybody has what he has registered, by either registry.
    Expected = lists:sort([ {{s, N}, none} || N <- maps:keys(Receivers) ] ++
                          [ {{t, N}, {s, N}} || N <- maps:keys(Receivers) ] ++
                          [ {Id, Binding} || {Id, {_Pid, Binding}} <- Owned ]),
    [ begin
          ok = erlmcp_rollout:set(Mode),
          ?assertEqual(Expected, present())
      end || Mode <- [current, {percent, 50}, '100x'] ],
    #{last_switch := #{repaired := 0}} = erlmcp_rollout:status(),
    end_all(maps:values(Receivers)).


%% What a process has ended with: with an error, if it has not come to its end.
result({Pid, Monitor}) ->
    receive
        {'DOWN', Monitor, process, Pid, {Kind, _} = Result} when Kind =:= sent; Kind =:= owns -> Result;
        {'DOWN', Monitor, process, Pid, Reason} -> error({ended, Reason})
    end.


%% Servers with `none', transports with their bindings.
present() ->
    lists:sort([ {Id, none} || {Id, _} <- erlmcp_registry:list_servers() ] ++
               [ {Id,
                  case erlmcp_registry:get_server_for_transport(Id) of
                      {ok, Server} -> Server;
                      {error, not_found} -> unbound
                  end} || {Id, _} <- erlmcp_registry:list_transports() ]).


send_numbered(Counts0, Refused0, Receivers, End) ->
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
    case now_ms() >= End of
        true -> {Counts, Refused};
        false -> send_numbered(Counts, Refused, Receivers, End)
    end.


%% The pure-Erlang registry takes any number of messages, and with a long queue requests time out.
keep_pace() ->
    case erlmcp_registry:get_queue_depth() > 1_000 of
        true ->
            timer:sleep(1),
            keep_pace();
        false ->
            ok
    end.


%% Registers, binds and ends what is its own; returns what there must be in the end. Own servers
%% live, so that the bindings to them are known.
own(Owner, Own0, End) ->
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
    case now_ms() >= End of
        true -> Own;
        false -> own(Owner, Own, End)
    end.


%%% Tools


%% The named process, in its mode.
start_registry() ->
    {ok, Pid} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = await(none, fun() -> maps:get(switching_to, erlmcp_rollout:status()) end),
    Pid.


%% Switches until it is stopped, with so many milliseconds in between; returns how often.
switch_on(undefined, PauseMs) -> switch_on([current, {percent, 40}, '100x', {percent, 80}, {percent, 20}], PauseMs);
switch_on(Modes, PauseMs) -> switch_on(Modes, Modes, PauseMs, 0).


switch_on([], Modes, PauseMs, Count) ->
    switch_on(Modes, Modes, PauseMs, Count);
switch_on([Mode | Others], Modes, PauseMs, Count) ->
    receive
        {stop, From} -> From ! {stopped, self(), Count}
    after
        PauseMs ->
            ok = erlmcp_rollout:set(Mode),
            switch_on(Others, Modes, PauseMs, Count + 1)
    end.


stop_switcher(Switcher) ->
    Switcher ! {stop, self()},
    receive {stopped, Switcher, Count} -> Count end.


%% Takes messages with {from, Sender, N}; N must be the next one of that sender.
start_receiver() ->
    spawn(fun() -> receiver(#{}) end).


receiver(Last) ->
    receive
        {Kind, _, {from, Sender, N}} when Kind =:= mcp_message; Kind =:= mcp_response ->
            case maps:get(Sender, Last, 0) + 1 of
                N -> receiver(Last#{Sender => N});
                Expected -> receiver(Last#{Sender => {out_of_order, N, Expected}})
            end;
        {last, Sender, From} ->
            From ! {last, self(), maps:get(Sender, Last, 0)},
            receiver(Last)
    end.


%% The number of the last message, once that is the expected one, or what is wrong.
last_in_order(Receiver, Sender, Expected) ->
    case await(Expected,
               fun() ->
                       Receiver ! {last, Sender, self()},
                       receive {last, Receiver, Last} -> Last end
               end) of
        ok -> Expected;
        {still, Last} -> Last
    end.


await(Expected, Look) ->
    await(Expected, Look, now_ms() + ?DEADLINE_MS).


await(Expected, Look, Deadline) ->
    case Look() of
        Expected ->
            ok;
        Other ->
            case now_ms() > Deadline orelse is_tuple(Other) andalso element(1, Other) =:= out_of_order of
                true ->
                    {still, Other};
                false ->
                    timer:sleep(1),
                    await(Expected, Look, Deadline)
            end
    end.


%% So many messages, and no more of them.
received(0) ->
    receive
        {Kind, _, _} = Message when Kind =:= mcp_message; Kind =:= mcp_response -> [{unexpected, Message}]
    after
        0 ->
            []
    end;
received(Number) ->
    receive
        {Kind, _, _} = Message when Kind =:= mcp_message; Kind =:= mcp_response -> [Message | received(Number - 1)]
    after
        ?DEADLINE_MS ->
            [{missing, Number}]
    end.


sleeper() ->
    spawn(fun() -> receive stop -> ok end end).


end_all(Pids) ->
    [ test_support:kill(Pid) || Pid <- Pids ].


now_ms() ->
    erlang:monotonic_time(millisecond).
