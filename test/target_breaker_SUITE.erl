%%% Circuit breakers of single targets of routes.
%%%
%%% The contract of erlmcp_target_breaker: a target whose breaker is open is refused alone. Outcomes are reported, and refusals
%%% of other layers are none. The breaker belongs to the id, and outlives registrations. Never more than `probe_limit'
%%% messages are under way while it is half open, whatever the other layers do.
-module(target_breaker_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(M, erlmcp_target_breaker).
-define(R, erlmcp_shard_registry).
%% Longer than any case takes.
-define(NEVER_MS, 3_600_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [refuses_its_target_alone,
     servers_and_transports,
     broadcasts,
     opens_at_the_threshold_within_the_window,
     probes,
     lost_probes,
     other_layers_give_probes_back,
     outlives_registrations,
     batches,
     groups_are_not_guarded,
     changes_of_options,
     open_and_close,
     not_there,
     wrong_arguments,
     backpressure_off,
     explained,
     transitions_are_logged,
     a_bounded_number,
     one_id_again_and_again,
     concurrent_failures_open_once,
     outcomes_against_deletions,
     probes_of_many_processes].


init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    application:stop(erlmcp_native).


init_per_testcase(_Case, Config) ->
    ok = erlmcp_native:set(token_bucket, infinity),
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    [{registry, Registry} | Config].


end_per_testcase(_Case, Config) ->
    ok = gen_server:stop(proplists:get_value(registry, Config)),
    [ ok = ?M:delete(Target) || {Target, _State} <- ?M:list() ],
    _ = [ ?R:unregister_connection(Id) || Shard <- lists:seq(0, 63), {Id, _} <- ?R:list_connections(Shard) ],
    [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker, backpressure] ],
    ok = erlmcp_native_config:configure().


%%% Routes


refuses_its_target_alone(_Config) ->
    ok = connect([a, b]),
    ok = opened({connection, a}, #{}),
    ?assertEqual({error, circuit_open}, route(a)),
    ?assertEqual(ok, route(b)),
    ?assertEqual(closed, erlmcp_circuit_breaker:get_state()),
    %% The same id in another namespace has a breaker of its own.
    ?assertEqual({error, no_breaker}, ?M:state({server, a})),
    ?assertEqual([{{connection, a}, open}], ?M:list()).


servers_and_transports(_Config) ->
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_registry:register_server(other, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    Server = fun(Id) -> erlmcp_registry:route_to_server(Id, t, hello) end,
    ?assertEqual(ok, Server(s)),
    ok = opened({server, s}, #{}),
    ?assertEqual({error, circuit_open}, Server(s)),
    ?assertEqual(ok, Server(other)),
    ?assertEqual(ok, erlmcp_registry:route_to_transport(t, s, hello)),
    ok = opened({transport, t}, #{}),
    ?assertEqual({error, circuit_open}, erlmcp_registry:route_to_transport(t, s, hello)),
    ok = erlmcp_registry:bind_transport_to_server(t, s),
    ?assertEqual({error, circuit_open}, erlmcp_registry:route_message(t, hello)),
    test_support:flush().


%% Transport by transport.
broadcasts(_Config) ->
    ok = erlmcp_registry:register_server(s, self(), #{}),
    [ ok = erlmcp_registry:register_transport(Id, self(), #{server_id => s}) || Id <- [t1, t2, t3] ],
    ok = opened({transport, t2}, #{}),
    ?assertEqual({error, circuit_open}, erlmcp_registry:route_to_transport(broadcast, s, hello)),
    ?assertEqual(2, received(0)).


batches(_Config) ->
    Ids = lists:seq(1, 100),
    ok = connect(Ids),
    [ ok = opened({connection, Id}, #{}) || Id <- Ids, Id rem 3 =:= 0 ],
    Expected = [ if Id rem 3 =:= 0 -> {error, circuit_open}; true -> ok end || Id <- Ids ],
    ?assertEqual(Expected, erlmcp_shard_manager:route_batch([ {Id, hello} || Id <- Ids ])),
    test_support:flush().


groups_are_not_guarded(_Config) ->
    ok = erlmcp_group:join(g, self()),
    [ ok = opened({Kind, g}, #{}) || Kind <- [server, transport, connection] ],
    ?assertEqual(ok, erlmcp_group:route_group(g, hello)),
    ?assertEqual(ok, erlmcp_group:route_member(g, round_robin, hello)),
    ok = erlmcp_group:leave(g, self()),
    test_support:flush().


%%% States


opens_at_the_threshold_within_the_window(_Config) ->
    ok = connect([a]),
    ok = ?M:set({connection, a}, #{failure_threshold => 3, window_ms => ?NEVER_MS}),
    [ begin
          ok = ?M:record_failure({connection, a}),
          ?assertMatch({ok, #{state := closed, failures := N}}, ?M:stats({connection, a})),
          %% Successes of a closed breaker do not count.
          ok = ?M:record_success({connection, a}),
          ?assertEqual(ok, route(a))
      end || N <- [1, 2] ],
    %% Equal options change nothing.
    ok = ?M:set({connection, a}, #{failure_threshold => 3, window_ms => ?NEVER_MS}),
    ok = ?M:record_failure({connection, a}),
    ?assertEqual(open, ?M:state({connection, a})),
    ?assertEqual({error, circuit_open}, route(a)),
    %% Failures leave the window.
    ok = ?M:set({connection, b}, #{failure_threshold => 2, window_ms => 1}),
    ok = ?M:record_failure({connection, b}),
    ok = test_support:await(fun() -> {ok, #{failures := N}} = ?M:stats({connection, b}), N =:= 0 end),
    test_support:flush().


probes(_Config) ->
    ok = connect([a]),
    ok = opened({connection, a}, #{timeout_ms => 1, probe_limit => 3, success_threshold => 2}),
    ok = test_support:await(fun() -> ?M:state({connection, a}) =:= half_open end),
    ?assertEqual(ok, route(a)),
    %% From now on the breaker waits longer than the case takes.
    ok = ?M:set({connection, a}, #{timeout_ms => ?NEVER_MS, probe_limit => 3, success_threshold => 2}),
    ?assertEqual([ok, ok, {error, circuit_open}, {error, circuit_open}], [ route(a) || _ <- lists:seq(1, 4) ]),
    ?assertMatch({ok, #{state := half_open, probes := 3, successes := 0}}, ?M:stats({connection, a})),
    ok = ?M:record_success({connection, a}),
    ?assertEqual([ok, {error, circuit_open}], [ route(a) || _ <- lists:seq(1, 2) ]),
    ok = ?M:record_success({connection, a}),
    ?assertEqual(closed, ?M:state({connection, a})),
    ?assertEqual(lists:duplicate(10, ok), [ route(a) || _ <- lists:seq(1, 10) ]),
    %% A failure while half open opens it.
    ok = half_opened({connection, a}, #{probe_limit => 1}),
    ok = ?M:record_failure({connection, a}),
    ?assertEqual(open, ?M:state({connection, a})),
    test_support:flush().


%% Nobody reports their outcomes.
lost_probes(_Config) ->
    ok = connect([a]),
    ok = opened({connection, a}, #{timeout_ms => 20, probe_limit => 1}),
    ok = test_support:await(fun() -> route(a) =:= ok end),
    ok = test_support:await(fun() -> route(a) =:= ok end),
    ?assertEqual(half_open, ?M:state({connection, a})),
    test_support:flush().


%% A probe that the bucket, the shard or the node's circuit refuses is not under way.
other_layers_give_probes_back(_Config) ->
    ok = connect([a]),
    ok = half_opened({connection, a}, #{probe_limit => 1}),
    NotUnderWay = fun(Refusal) ->
                          [ ?assertEqual({error, Refusal}, route(a)) || _ <- lists:seq(1, 10) ],
                          ?assertMatch({ok, #{state := half_open, probes := 0}}, ?M:stats({connection, a}))
                  end,
    ok = erlmcp_circuit_breaker:force_open(),
    NotUnderWay(circuit_open),
    ok = erlmcp_circuit_breaker:force_close(),
    ok = connect([c]),
    ok = half_opened({connection, c}, #{probe_limit => 1}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 1, rate_per_second => 1 / 3600}),
    ?assertEqual(ok, route(c)),
    ok = ?M:set({connection, c}, #{probe_limit => 2, timeout_ms => ?NEVER_MS}),
    [ ?assertEqual({error, rate_limited}, route(c)) || _ <- lists:seq(1, 10) ],
    ?assertMatch({ok, #{probes := 1}}, ?M:stats({connection, c})),
    ok = erlmcp_native:set(token_bucket, infinity),
    Shard = ?R:get_shard_id(a),
    ok = erlmcp_native:set(admission, #{threshold => 1, sample_interval_ms => 100}),
    Other = hd([ N || N <- lists:seq(1, 10_000), ?R:get_shard_id(N) =:= Shard ]),
    ok = connect([Other]),
    %% The calling process takes nothing from its mailbox.
    ok = test_support:await(fun() -> route(Other) =:= {error, shard_overloaded} end),
    NotUnderWay(shard_overloaded),
    test_support:flush().


outlives_registrations(_Config) ->
    ok = opened({connection, a}, #{}),
    [ begin
          Pid = test_support:process(),
          ok = ?R:register_connection(a, Pid, #{}),
          ?assertEqual({error, circuit_open}, route(a)),
          test_support:stop(Pid),
          ok = test_support:await(fun() -> ?R:whereis_connection(a) =:= undefined end),
          ?assertEqual({error, not_found}, route(a))
      end || _ <- lists:seq(1, 3) ],
    ok = application:stop(erlmcp_native),
    ok = application:start(erlmcp_native),
    ?assertEqual(open, ?M:state({connection, a})).


changes_of_options(_Config) ->
    ok = connect([a]),
    ok = opened({connection, a}, #{timeout_ms => ?NEVER_MS}),
    ok = ?M:set({connection, a}, [{timeout_ms, 0}]),
    ?assertEqual(half_open, ?M:state({connection, a})),
    ?assertEqual([{{connection, a}, half_open}], ?M:list()),
    ok = ?M:delete({connection, a}),
    ok = ?M:set({connection, a}, #{}),
    ?assertMatch({ok, #{state := closed, failures := 0}}, ?M:stats({connection, a})).


open_and_close(_Config) ->
    ok = connect([a]),
    ok = ?M:set({connection, a}, #{}),
    [ begin
          ok = ?M:open({connection, a}),
          ?assertEqual({open, {error, circuit_open}}, {?M:state({connection, a}), route(a)}),
          ok = ?M:close({connection, a}),
          ?assertEqual({closed, ok}, {?M:state({connection, a}), route(a)})
      end || _ <- [1, 2] ],
    test_support:flush().


not_there(_Config) ->
    [ ?assertEqual({error, no_breaker}, Call({server, nobody})) || Call <- calls() ].


%% All functions of a target alone.
calls() ->
    [fun ?M:delete/1,
     fun ?M:record_success/1,
     fun ?M:record_failure/1,
     fun ?M:open/1,
     fun ?M:close/1,
     fun ?M:state/1,
     fun ?M:stats/1].


wrong_arguments(_Config) ->
    [ begin
          ?assertError(badarg, ?M:set(Target, #{})),
          [ ?assertError(badarg, Call(Target)) || Call <- calls() ]
      end || Target <- [weather,
                        {weather},
                        {member, weather},
                        {server, a, b},
                        {server, binary:copy(<<"x">>, 70_000)},
                        {server, fun() -> self() end}] ],
    [ ?assertMatch({error, {bad_option, _, _, [_ | _]}}, ?M:set({server, a}, Options))
      || Options <- [none,
                     off,
                     infinity,
                     [a],
                     #{threshold => 1},
                     #{failure_threshold => 0},
                     #{failure_threshold => 1.0},
                     #{failure_threshold => 1_001},
                     #{window_ms => 0},
                     #{success_threshold => 0},
                     #{success_threshold => 1_024},
                     #{timeout_ms => -1},
                     #{timeout_ms => infinity},
                     #{probe_limit => 0},
                     #{probe_limit => 1 bsl 64}] ],
    {error, {bad_option, target_breaker, _, Expected}} = ?M:set({server, a}, #{failure_threshold => 1_001}),
    ?assertNotEqual(nomatch, string:find(Expected, "failure_threshold (an integer from 1 to 1000)")),
    ?assertEqual([], ?M:list()),
    %% The bounds themselves.
    ok = ?M:set({server, a},
                #{
                  failure_threshold => 1_000,
                  window_ms => (1 bsl 42) - 1,
                  success_threshold => 1_023,
                  timeout_ms => (1 bsl 42) - 1,
                  probe_limit => 1_023
                 }).


backpressure_off(_Config) ->
    ok = connect([a]),
    ok = opened({connection, a}, #{}),
    ok = erlmcp_native:set(backpressure, off),
    ?assertEqual(ok, route(a)),
    ?assertEqual(0, erlmcp_native:retry_after_ms(a)),
    ok = opened({connection, b}, #{}),
    ok = erlmcp_native:set(backpressure, on),
    ?assertEqual({error, circuit_open}, route(a)),
    ok = connect([b]),
    ?assertEqual({error, circuit_open}, route(b)),
    test_support:flush().


explained(_Config) ->
    ok = connect([a]),
    #{connection := Before} = erlmcp_native:explain(a),
    ?assertNot(is_map_key(target_breaker, Before)),
    ok = ?M:set({connection, a}, #{failure_threshold => 1, timeout_ms => ?NEVER_MS}),
    ?assertMatch(#{connection := #{route := ok, target_breaker := closed}}, erlmcp_native:explain(a)),
    ?assertEqual(0, erlmcp_native:retry_after_ms(a)),
    ok = ?M:record_failure({connection, a}),
    #{connection := Open} = erlmcp_native:explain(a),
    ?assertMatch(#{route := {error, circuit_open}, decided_by := circuit, target_breaker := open}, Open),
    #{retry_after_ms := WaitMs} = Open,
    ?assert(WaitMs > 0 andalso WaitMs =< ?NEVER_MS, WaitMs),
    AfterMs = erlmcp_native:retry_after_ms(a),
    ?assert(AfterMs > 0 andalso AfterMs =< WaitMs, {AfterMs, WaitMs}).


transitions_are_logged(_Config) ->
    Test = self(),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => Test}),
    ok = opened({server, a}, #{timeout_ms => 0, success_threshold => 1}),
    ok = ?M:close({server, a}),
    ok = logger:remove_handler(?MODULE),
    ?assertEqual([{circuit_opened, {target, {server, a}}}, {circuit_closed, {target, {server, a}}}],
                 [ receive {logged, Event, Breaker} -> {Event, Breaker} after 0 -> none end || _ <- [1, 2] ]).


log(#{msg := {report, #{event := Event, breaker := Breaker}}}, #{config := Test}) ->
    Test ! {logged, Event, Breaker};
log(_Event, _Config) ->
    ok.


%%% Many


a_bounded_number(_Config) ->
    Set = fun(N) -> ?M:set({connection, {many, N}}, #{failure_threshold => 1}) end,
    [ ok = Set(N) || N <- lists:seq(1, 100_000) ],
    ?assertEqual({error, too_many_breakers}, Set(100_001)),
    %% One that is there can be changed.
    ?assertEqual(ok, Set(7)),
    ok = ?M:delete({connection, {many, 7}}),
    ?assertEqual(ok, Set(100_001)),
    ?assertEqual({error, too_many_breakers}, Set(7)),
    ?assertEqual(100_000, length(?M:list())).


%% An id whose breaker comes and goes among others does not fill its map.
one_id_again_and_again(_Config) ->
    [ ok = ?M:set({server, N}, #{}) || N <- lists:seq(1, 5_000) ],
    Turn = fun() -> ok = ?M:set({server, again}, #{}), ok = ?M:delete({server, again}) end,
    Turns = fun(N) -> [ Turn() || _ <- lists:seq(1, N) ] end,
    _ = Turns(10_000),
    Before = test_support:resident_bytes(),
    _ = Turns(50_000),
    Grown = test_support:resident_bytes() - Before,
    ?assert(Grown < 20_000_000, Grown).


concurrent_failures_open_once(_Config) ->
    Test = self(),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => Test}),
    [ begin
          ok = ?M:set({server, N}, #{failure_threshold => 50}),
          Pids = [ spawn_link(fun() ->
                                      [ ok = ?M:record_failure({server, N}) || _ <- lists:seq(1, 25) ],
                                      Test ! {self(), done}
                              end) || _ <- lists:seq(1, 4) ],
          [ receive {Pid, done} -> ok end || Pid <- Pids ],
          ?assertEqual(open, ?M:state({server, N}))
      end || N <- lists:seq(1, 100) ],
    ok = logger:remove_handler(?MODULE),
    ?assertEqual([ {target, {server, N}} || N <- lists:seq(1, 100) ],
                 [ receive {logged, circuit_opened, Breaker} -> Breaker after 0 -> none end || _ <- lists:seq(1, 100) ]),
    receive {logged, _, _} = More -> error(More) after 0 -> ok end.


outcomes_against_deletions(_Config) ->
    {Receiver, Test} = {spawn_link(fun() -> forget_all() end), self()},
    ok = ?R:register_connection(x, Receiver, #{}),
    Repeat = fun(Call) ->
                     spawn_link(fun() -> [ Call() || _ <- lists:seq(1, 20_000) ], Test ! {self(), done} end)
             end,
    Target = {connection, x},
    Pids = [ Repeat(Call)
             || Call <- [fun() -> ok = ?M:set(Target, #{failure_threshold => 1, timeout_ms => 0}) end,
                         fun() -> _ = ?M:delete(Target) end,
                         fun() -> _ = ?M:record_failure(Target) end,
                         fun() -> _ = ?M:record_success(Target) end,
                         fun() -> case route(x) of ok -> ok; {error, circuit_open} -> ok; {error, shard_overloaded} -> ok end end] ],
    [ receive {Pid, done} -> ok end || Pid <- Pids ],
    _ = ?M:delete(Target),
    ?assertEqual([], ?M:list()),
    ok = test_support:await(fun() -> route(x) =:= ok end),
    unlink(Receiver),
    exit(Receiver, kill).


%% Whatever they do, at most three messages are under way. Again until some were refused: until then no three were.
probes_of_many_processes(_Config) ->
    Receiver = spawn_link(fun() -> forget_all() end),
    ok = ?R:register_connection(x, Receiver, #{}),
    ok = probes_until_refused(),
    unlink(Receiver),
    exit(Receiver, kill).


probes_until_refused() ->
    UnderWay = counters:new(1, []),
    ok = half_opened({connection, x}, #{probe_limit => 3, success_threshold => 1_023}),
    Test = self(),
    Pids = [ spawn_link(fun() -> Test ! {self(), probe(UnderWay, 100, 0)} end) || _ <- lists:seq(1, 8) ],
    Refused = lists:sum([ receive {Pid, N} -> N end || Pid <- Pids ]),
    ?assertMatch({ok, #{state := half_open, probes := 0, successes := 801}}, ?M:stats({connection, x})),
    case Refused of
        0 ->
            ok = ?M:delete({connection, x}),
            probes_until_refused();
        _ ->
            ok
    end.


probe(_UnderWay, 0, Refused) ->
    Refused;
probe(UnderWay, More, Refused) ->
    case route(x) of
        ok ->
            ok = counters:add(UnderWay, 1, 1),
            true = counters:get(UnderWay, 1) =< 3,
            erlang:yield(),
            ok = counters:sub(UnderWay, 1, 1),
            ok = ?M:record_success({connection, x}),
            probe(UnderWay, More - 1, Refused);
        {error, circuit_open} ->
            erlang:yield(),
            probe(UnderWay, More, Refused + 1)
    end.


forget_all() ->
    receive _ -> forget_all() end.


%%% Helpers


connect(Ids) ->
    lists:foreach(fun(Id) -> ok = ?R:register_connection(Id, self(), #{}) end, Ids).


route(Id) ->
    erlmcp_shard_manager:route_message(Id, hello).


opened(Target, Options) ->
    ok = ?M:set(Target, maps:merge(#{failure_threshold => 1, timeout_ms => ?NEVER_MS}, Options)),
    ok = ?M:record_failure(Target).


%% Half open, with no message under way, for longer than any case takes.
half_opened(Target, Options) ->
    ok = opened(Target, Options#{timeout_ms => 0}),
    half_open = ?M:state(Target),
    {connection, Id} = Target,
    %% The first probe makes it half open whatever its timeout is from then on.
    ok = route(Id),
    ok = ?M:set(Target, maps:merge(#{success_threshold => 2}, Options#{timeout_ms => ?NEVER_MS})),
    ok = ?M:record_success(Target),
    {ok, #{state := half_open, probes := 0, successes := 1}} = ?M:stats(Target),
    ok.


received(N) ->
    receive
        {mcp_response, _, _} -> received(N + 1)
    after
        0 ->
            N
    end.
