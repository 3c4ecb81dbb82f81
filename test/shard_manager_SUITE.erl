%%% Guarded routes: erlmcp_shard_manager and the routes of erlmcp_registry, and how the three layers of
%%% backpressure work together.
%%%
%%% The contract: circuit breaker, admission control and token bucket are checked in this order, and the first
%%% one that refuses determines the reason. Each message is charged once, to the right bucket. Messages from one
%%% process to one target arrive in the order sent, single or in batches. A probe is concluded by the outcome of
%%% its message. With backpressure off, or without the application, nothing is refused that the original would
%%% not have refused.
-module(shard_manager_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).

-export([route_message/1,
         route_message_to_a_shard/1,
         route_batch/1,
         route_batch_of_thousands/1,
         route_batch_with_refusals/1,
         wrong_batches_send_nothing/1,
         order_of_one_sender/1,
         no_manager_is_needed/1,
         managers_ignore_the_unknown/1,
         open_circuit/1,
         probes_that_are_admitted_close_it/1,
         probe_that_closes_it_at_once/1,
         probe_that_its_shard_refuses/1,
         probe_that_is_rate_limited/1,
         overload_of_many_shards_opens_it/1,
         overload_of_one_shard_does_not_open_it/1,
         layers_are_asked_in_order/1,
         transports_pay_for_requests/1,
         thousands_of_transports_of_one_server/1,
         answers_cost_nothing/1,
         broadcast_admits_each_by_itself/1,
         backpressure_off/1,
         long_transport_id/1,
         without_the_application/1,
         after_the_application/1]).

%% Called in peer nodes
-export([in_without_application/0, in_after_application/0]).

-define(M,           erlmcp_shard_manager).
-define(A,           erlmcp_admission_control).
-define(B,           erlmcp_token_bucket).
-define(R,           erlmcp_registry).
-define(SLOW,        1 / 3600).
-define(SHARD,       5).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [route_message,
     route_message_to_a_shard,
     route_batch,
     route_batch_of_thousands,
     route_batch_with_refusals,
     wrong_batches_send_nothing,
     order_of_one_sender,
     no_manager_is_needed,
     managers_ignore_the_unknown,
     open_circuit,
     probes_that_are_admitted_close_it,
     probe_that_closes_it_at_once,
     probe_that_its_shard_refuses,
     probe_that_is_rate_limited,
     overload_of_many_shards_opens_it,
     overload_of_one_shard_does_not_open_it,
     layers_are_asked_in_order,
     transports_pay_for_requests,
     thousands_of_transports_of_one_server,
     answers_cost_nothing,
     broadcast_admits_each_by_itself,
     backpressure_off,
     long_transport_id,
     without_the_application,
     after_the_application].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    ok = application:start(erlmcp_native),
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    _ = erlmcp_nif:breaker_set(closed),
    ok = test_support:await_samplers(),
    [{registry, Registry} | Config].


end_per_testcase(_Case, Config) ->
    ok = gen_server:stop(proplists:get_value(registry, Config)),
    _ = [ application:unset_env(erlmcp_native, Key) || Key <- [backpressure, token_bucket, admission, circuit_breaker] ],
    ok = erlmcp_native_config:configure(),
    _ = erlmcp_nif:breaker_set(closed),
    ok = application:stop(erlmcp_native),
    _ = [ erlmcp_shard_registry:unregister_connection(Id)
          || Shard <- lists:seq(0, 63), {Id, _} <- erlmcp_shard_registry:list_connections(Shard) ],
    ok.


%%% Routes to connections


route_message(_Config) ->
    _ = [ begin
              ok = erlmcp_shard_registry:register_connection(Id, self(), #{}),
              ?assertEqual(ok, ?M:route_message(Id, {message, Id})),
              ?assertEqual([{message, Id}], test_support:flush()),
              ok = erlmcp_shard_registry:unregister_connection(Id),
              ?assertEqual({error, not_found}, ?M:route_message(Id, x)),
              ?assertEqual([], test_support:flush())
          end || Id <- [a, <<"b">>, {c, 1}, 1, 1.0, "s", #{k => v}, self(), make_ref(), undefined, <<>>, []] ],
    %% Neither a server nor a transport is a connection.
    ok = ?R:register_server(s, self(), #{}),
    ok = ?R:register_transport(s, self(), #{}),
    ?assertEqual({error, not_found}, ?M:route_message(s, x)),
    ?assertError(badarg, ?M:route_message(binary:copy(<<"x">>, 65_536), x)),
    ?assertEqual([], test_support:flush()),
    %% A process that has exited.
    {Pid, Monitor} = spawn_monitor(fun() -> receive stop -> ok end end),
    ok = erlmcp_shard_registry:register_connection(ended, Pid, #{}),
    Pid ! stop,
    receive {'DOWN', Monitor, process, Pid, _} -> ok end,
    test_support:await(fun() -> ?M:route_message(ended, x) =:= {error, not_found} end).


route_message_to_a_shard(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    Shard = erlmcp_shard_registry:get_shard_id(c),
    Other = (Shard + 1) rem 64,
    ?assertEqual(ok, ?M:route_message(Shard, c, 1)),
    ?assertEqual(ok, ?M:route_message(manager(Shard), c, 2)),
    ?assertEqual({error, not_found}, ?M:route_message(Other, c, 3)),
    ?assertEqual({error, not_found}, ?M:route_message(manager(Other), c, 4)),
    ?assertEqual({error, not_found}, ?M:route_message(erlmcp_shard_registry:get_shard_id(unknown), unknown, 5)),
    _ = [ ?assertError(badarg, ?M:route_message(Wrong, c, 6))
          || Wrong <- [-1, 64, 1024, 1 bsl 64, 1.0, "0", <<0>>, default, self(), whereis(erlmcp_shard_sup), make_ref()] ],
    ?assertError(badarg, ?M:route_message(Shard, binary:copy(<<"x">>, 65_536), 7)),
    ?assertEqual([1, 2], test_support:flush()),
    ?assertEqual(?A:get_shard_stats(Shard), ?M:get_stats(Shard)).


route_batch(_Config) ->
    ?assertEqual([], ?M:route_batch([])),
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, self(), #{}) || Id <- [a, <<"b">>, {c, 3}] ],
    ?assertEqual([ok], ?M:route_batch([{a, 1}])),
    ?assertEqual([1], test_support:flush()),
    Long = binary:copy(<<"x">>, 65_536),
    ?assertEqual([ok, {error, not_found}, ok, ok, {error, not_found}, ok, {error, not_found}],
                 ?M:route_batch([{a, 1}, {unknown, 2}, {<<"b">>, 3}, {a, 4}, {{c, 4}, 5}, {{c, 3}, 6}, {Long, 7}])),
    ?assertEqual([1, 3, 4, 6], test_support:flush()),
    %% Any term is a message.
    Messages = [[], {}, <<>>, undefined, [improper | list], #{}, fun() -> ok end],
    ?assertEqual([ ok || _ <- Messages ], ?M:route_batch([ {a, Message} || Message <- Messages ])),
    ?assertEqual(Messages, test_support:flush()).


%% Batches of all lengths around the size of a slice, and of a group that is looked up together.
route_batch_of_thousands(_Config) ->
    ok = erlmcp_native:set(token_bucket, infinity),
    Self = self(),
    Pids = list_to_tuple([ spawn_link(fun() -> forward(Self) end) || _ <- lists:seq(1, 7) ]),
    _ = [ ok = erlmcp_shard_registry:register_connection({c, N}, element(N, Pids), #{}) || N <- lists:seq(1, 7) ],
    lists:foreach(fun(Length) ->
                          %% Every eighth id is unknown.
                          Batch = [ {{c, N rem 8}, N} || N <- lists:seq(1, Length) ],
                          Expected = [ if N rem 8 =:= 0 -> {error, not_found}; true -> ok end || N <- lists:seq(1, Length) ],
                          ?assertEqual(Expected, ?M:route_batch(Batch)),
                          [ ?assertEqual([ N || N <- lists:seq(1, Length), N rem 8 =:= Of ],
                                         forwarded(element(Of, Pids)))
                            || Of <- lists:seq(1, 7) ]
                  end,
                  [1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 10_000]).


%% The bucket has two tokens. The third and fourth message to it are refused in the middle of the batch.
route_batch_with_refusals(_Config) ->
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, self(), #{}) || Id <- [limited, free] ],
    ok = ?B:set_limits(limited, #{capacity => 2, rate_per_second => ?SLOW}),
    ?assertEqual([ok, ok, ok, {error, rate_limited}, ok, {error, rate_limited}, {error, not_found}, ok],
                 ?M:route_batch([{limited, 1}, {free, 2}, {limited, 3}, {limited, 4}, {free, 5}, {limited, 6}, {unknown, 7}, {free, 8}])),
    ?assertEqual([1, 2, 3, 5, 8], test_support:flush()),
    %% The shard admits three messages.
    ok = ?B:set_limits(free, infinity),
    Shard = erlmcp_shard_registry:get_shard_id(free),
    ok = supervisor:terminate_child(erlmcp_shard_sup, Shard),
    ok = ?A:set_threshold(Shard, 3),
    ok = ?A:update_queue_depth(Shard, -1000),
    ?assertEqual([ok, ok, ok, {error, shard_overloaded}, {error, shard_overloaded}],
                 ?M:route_batch([ {free, N} || N <- lists:seq(1, 5) ])),
    ?assertEqual([1, 2, 3], test_support:flush()),
    %% The open circuit admits none.
    open = erlmcp_nif:breaker_set(open),
    ?assertEqual([{error, circuit_open}, {error, not_found}], ?M:route_batch([{free, 1}, {unknown, 2}])),
    ?assertEqual([], test_support:flush()).


wrong_batches_send_nothing(_Config) ->
    ok = erlmcp_shard_registry:register_connection(a, self(), #{}),
    Good = [ {a, N} || N <- lists:seq(1, 600) ],
    _ = [ ?assertError(badarg, ?M:route_batch(Wrong))
          || Wrong <- [[{a, 1} | {a, 2}],
                       [{a, 1} | improper],
                       [{a, 1}, {a, 2, 3}],
                       [{a, 1}, {a}],
                       [{a, 1}, a],
                       Good ++ [a],
                       Good ++ improper,
                       [[a, 1]],
                       a,
                       {a, 1},
                       #{a => 1},
                       <<>>,
                       self()] ],
    ?assertEqual([], test_support:flush()).


%% One sender sends single messages and batches, concurrently with other senders.
order_of_one_sender(_Config) ->
    ok = erlmcp_native:set(token_bucket, infinity),
    ok = erlmcp_native:set(admission, infinity),
    Receiver = spawn_link(fun() -> check_order(#{}) end),
    ok = erlmcp_shard_registry:register_connection(c, Receiver, #{}),
    ok = ?R:register_server(c, Receiver, #{}),
    Senders = [ spawn_monitor(fun() -> send_numbered(Sender, 1, 20_000) end) || Sender <- lists:seq(1, 4) ],
    _ = [ receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(normal, Reason) end
          || {Pid, Monitor} <- Senders ],
    Receiver ! {report, self()},
    receive {last, Last} -> ?assertEqual(#{1 => 20_000, 2 => 20_000, 3 => 20_000, 4 => 20_000}, Last) end,
    unlink(Receiver),
    exit(Receiver, kill).


send_numbered(_Sender, N, Last) when N > Last ->
    ok;
send_numbered(Sender, N, Last) ->
    case N rem 3 of
        0 ->
            ok = ?M:route_message(c, {Sender, N}),
            send_numbered(Sender, N + 1, Last);
        1 ->
            ok = ?R:route_to_server(c, Sender, N),
            send_numbered(Sender, N + 1, Last);
        2 ->
            To = min(Last, N + Sender * 100),
            Numbers = lists:seq(N, To),
            [ok] = lists:usort(?M:route_batch([ {c, {Sender, I}} || I <- Numbers ])),
            send_numbered(Sender, To + 1, Last)
    end.


check_order(Last) ->
    receive
        {mcp_message, Sender, N} -> check_next(Sender, N, Last);
        {report, From} -> From ! {last, Last};
        {Sender, N} -> check_next(Sender, N, Last)
    end.


check_next(Sender, N, Last) ->
    N = maps:get(Sender, Last, 0) + 1,
    check_order(Last#{Sender => N}).


no_manager_is_needed(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_shard_sup),
    ?assertEqual(undefined, manager(0)),
    ?assertEqual(ok, ?M:route_message(c, 1)),
    ?assertEqual([ok, ok], ?M:route_batch([{c, 2}, {c, 3}])),
    ?assertEqual(ok, ?M:route_message(erlmcp_shard_registry:get_shard_id(c), c, 4)),
    ?assertEqual([1, 2, 3, 4], test_support:flush()),
    ?assertMatch(#{shard_id := 0, messages_per_second := 0, latency_us := #{p50 := 0}}, ?M:get_stats(0)),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_shard_sup),
    ok.


managers_ignore_the_unknown(_Config) ->
    Manager = manager(?SHARD),
    _ = [ Manager ! Unknown
          || Unknown <- [hello, {timeout, make_ref(), tick}, {'DOWN', make_ref(), process, self(), normal}, tick, {sample, 1}] ],
    ok = gen_server:cast(Manager, hello),
    ?assertEqual({error, unknown_request}, gen_server:call(Manager, hello)),
    ?assertEqual(Manager, manager(?SHARD)).


%%% The circuit


open_circuit(_Config) ->
    [{Id, _}] = receivers(?SHARD, 1),
    ok = ?R:register_server(s, self(), #{}),
    ok = ?R:register_transport(t, self(), #{server_id => s}),
    open = erlmcp_nif:breaker_set(open),
    ?assertEqual({error, circuit_open}, ?M:route_message(Id, x)),
    ?assertEqual({error, circuit_open}, ?M:route_message(?SHARD, Id, x)),
    ?assertEqual([{error, circuit_open}], ?M:route_batch([{Id, x}])),
    ?assertEqual({error, circuit_open}, ?R:route_to_server(s, t, x)),
    ?assertEqual({error, circuit_open}, ?R:route_to_transport(t, s, x)),
    ?assertEqual({error, circuit_open}, ?R:route_to_transport(broadcast, s, x)),
    ?assertEqual({error, circuit_open}, ?R:route_message({transport, t}, x)),
    ?assertEqual({error, circuit_open}, ?R:route_message({server, s}, x)),
    %% Unknown targets are still reported as such.
    ?assertEqual({error, not_found}, ?M:route_message(unknown, x)),
    ?assertEqual(ok, ?R:route_to_server(unknown, t, x)),
    ?assertEqual(ok, ?R:route_to_transport(unknown, s, x)),
    ?assertEqual([], test_support:flush()),
    %% No bucket was charged for that, and no sender is refused afterwards.
    ?assertMatch(#{tokens := 1000}, ?B:get_state(transport, t)),
    ?assertMatch(#{tokens := 1000}, ?B:get_state(Id)),
    closed = erlmcp_nif:breaker_set(closed),
    ?assertEqual(ok, ?R:route_to_server(s, t, 1)),
    ?assertEqual([{mcp_message, t, 1}], test_support:flush()).


half_open() ->
    ok = erlmcp_native:set(circuit_breaker, circuit()),
    _ = erlmcp_nif:breaker_set(open),
    test_support:await_value(half_open, fun erlmcp_nif:breaker_state/0).


probes_that_are_admitted_close_it(_Config) ->
    ok = half_open(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    %% Look-ups that find nothing are no probes.
    {error, not_found} = ?M:route_message(unknown, x),
    ?assertMatch(#{state := half_open, successes := 0, probes := 0}, erlmcp_nif:breaker_stats()),
    ?assertEqual(ok, ?M:route_message(c, 1)),
    ?assertMatch(#{state := half_open, successes := 1, probes := 0}, erlmcp_nif:breaker_stats()),
    ?assertEqual([ok], ?M:route_batch([{c, 2}])),
    ?assertMatch(#{state := half_open, successes := 2, probes := 0}, erlmcp_nif:breaker_stats()),
    ?assertEqual(ok, ?M:route_message(c, 3)),
    ?assertEqual(closed, erlmcp_nif:breaker_state()),
    ?assertEqual([1, 2, 3], test_support:flush()).


%% One message that causes two changes reports both, in their order.
probe_that_closes_it_at_once(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_native:set(circuit_breaker, (circuit())#{success_threshold => 1, timeout_ms => 0}),
    _ = erlmcp_nif:breaker_set(open),
    {Pid, Events} = erlmcp_nif:route_connection(c),
    ?assertEqual(self(), Pid),
    ?assertEqual([half_open, closed], [ State || {circuit, State} <- Events ]).


probe_that_its_shard_refuses(_Config) ->
    Receivers = [{Id, _} | _] = overloaded(?SHARD),
    ok = half_open(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = ?M:route_message(c, 1),
    ?assertEqual(half_open, erlmcp_nif:breaker_state()),
    ?assertEqual({error, shard_overloaded}, ?M:route_message(Id, x)),
    ?assertEqual(open, erlmcp_nif:breaker_state()),
    ?assertEqual({error, circuit_open}, ?M:route_message(c, 2)),
    %% The same holds for the first probe.
    ok = test_support:await_value(half_open, fun() -> erlmcp_nif:breaker_state() end),
    ?assertEqual({error, shard_overloaded}, ?M:route_message(Id, x)),
    ?assertEqual(open, erlmcp_nif:breaker_state()),
    end_all(Receivers).


probe_that_is_rate_limited(_Config) ->
    ok = half_open(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = ?B:set_limits(c, #{capacity => 1, rate_per_second => ?SLOW}),
    {ok, 0} = ?B:consume(c, 1),
    %% The outcome is neither a success nor a failure, and the probe's place is released: there are more probes
    %% than places.
    _ = [ begin
              ?assertEqual({error, rate_limited}, ?M:route_message(c, x)),
              ?assertMatch(#{state := half_open, successes := 0, probes := 0}, erlmcp_nif:breaker_stats())
          end || _ <- lists:seq(1, 10) ],
    ok = ?B:set_limits(c, infinity),
    ?assertEqual([ok, ok, ok], [ ?M:route_message(c, x) || _ <- [1, 2, 3] ]),
    ?assertEqual(closed, erlmcp_nif:breaker_state()).


%% Each shard that becomes overloaded counts as a failure.
overload_of_many_shards_opens_it(_Config) ->
    ok = erlmcp_native:set(circuit_breaker, (circuit())#{timeout_ms => 60_000}),
    Receivers = lists:append([ overloaded(Shard) || Shard <- lists:seq(0, 3) ]),
    ?assertMatch(#{state := closed, failures := 4}, erlmcp_nif:breaker_stats()),
    More = overloaded(4),
    ?assertEqual(open, erlmcp_nif:breaker_state()),
    end_all(Receivers ++ More).


%% However many messages it refuses, and however often it becomes overloaded within a second.
overload_of_one_shard_does_not_open_it(_Config) ->
    ok = erlmcp_native:set(circuit_breaker, circuit()),
    ok = erlmcp_native:set(admission, #{threshold => 20, sample_interval_ms => 10}),
    Receivers = [{Id, _} | _] = receivers(?SHARD, 1),
    ok = ?B:set_limits(Id, infinity),
    %% On a busy machine it may take several attempts until there were so many within a second.
    ok = test_support:await(fun() -> overloads_within_a_second(Id, Receivers) > 5 end, ?DEADLINE_MS),
    end_all(Receivers).


overloads_within_a_second(Id, Receivers) ->
    ok = erlmcp_circuit_breaker:force_close(),
    Began = now_ms(),
    Overloads = overload_again(Id, Receivers, Began + 900, 0),
    #{state := State, failures := Failures} = erlmcp_nif:breaker_stats(),
    Seconds = (now_ms() - Began) div 1000,
    ct:log("~b overloads, ~b failures, ~b s", [Overloads, Failures, Seconds]),
    ?assert(Failures =< 1 + Seconds, Failures),
    ?assert(State =:= closed orelse 1 + Seconds >= maps:get(failure_threshold, circuit())),
    Overloads.


overload_again(Id, Receivers, Until, Overloads) ->
    case now_ms() < Until of
        true ->
            test_support:await(fun() -> ?M:route_message(Id, x) =:= {error, shard_overloaded} end),
            _ = [ Pid ! {take, self()} || {_, Pid} <- Receivers ],
            _ = [ receive {taken, Pid} -> ok end || {_, Pid} <- Receivers ],
            test_support:await(fun() -> not maps:get(is_overloaded, ?A:get_shard_stats(?SHARD)) end),
            overload_again(Id, Receivers, Until, Overloads + 1);
        false ->
            Overloads
    end.


layers_are_asked_in_order(_Config) ->
    Receivers = [{Id, _} | _] = overloaded(?SHARD),
    ok = ?B:set_limits(Id, infinity),
    ok = ?B:set_limits(Id, #{capacity => 1, rate_per_second => ?SLOW}),
    %% The shard refuses before the bucket is charged,
    ?assertEqual({error, shard_overloaded}, ?M:route_message(Id, x)),
    ?assertMatch(#{tokens := 1}, ?B:get_state(Id)),
    _ = ?B:consume(Id, 1),
    ?assertEqual({error, shard_overloaded}, ?M:route_message(Id, x)),
    %% and the circuit before the shard.
    open = erlmcp_nif:breaker_set(open),
    ?assertEqual({error, circuit_open}, ?M:route_message(Id, x)),
    closed = erlmcp_nif:breaker_set(closed),
    %% A message that the bucket refuses is not counted in the shard.
    #{admitted := Admitted} = ?A:get_shard_stats(?SHARD),
    ok = ?A:set_threshold(?SHARD, 1000),
    ?assertEqual({error, rate_limited}, ?M:route_message(Id, x)),
    ?assertEqual(Admitted, maps:get(admitted, ?A:get_shard_stats(?SHARD))),
    end_all(Receivers).


%%% Which bucket is charged


transports_pay_for_requests(_Config) ->
    ok = ?R:register_server(s, self(), #{}),
    _ = [ ok = ?R:register_transport(T, self(), #{}) || T <- [t1, t2] ],
    _ = [ ok = ?B:set_limits(transport, T, #{capacity => 2, rate_per_second => ?SLOW}) || T <- [t1, t2] ],
    ?assertEqual([ok, ok, {error, rate_limited}, {error, rate_limited}],
                 [ ?R:route_to_server(s, t1, N) || N <- lists:seq(1, 4) ]),
    %% The other transport is not affected, and an unregistered transport has no bucket.
    ?assertEqual([ok, ok, {error, rate_limited}], [ ?R:route_to_server(s, t2, N) || N <- lists:seq(1, 3) ]),
    ?assertEqual([], [ E || E <- [ ?R:route_to_server(s, unknown, N) || N <- lists:seq(1, 2000) ], E =/= ok ]),
    _ = test_support:flush(),
    %% A connection or a server of the same id is not charged for it.
    ok = erlmcp_shard_registry:register_connection(t1, self(), #{}),
    ok = ?R:register_server(t1, self(), #{}),
    ?assertEqual({error, rate_limited}, ?R:route_to_server(t1, t1, x)),
    ?assertMatch(#{tokens := 1000}, ?B:get_state(connection, t1)),
    %% A message to an unknown target is not charged.
    ok = ?B:set_limits(transport, t2, default),
    ok = ?R:route_to_server(unknown, t2, x),
    Tokens = fun() -> maps:get(tokens, ?B:get_state(transport, t2)) end,
    ok = test_support:await_value(1000, Tokens),
    ?assertEqual([], test_support:flush()).


%% Three messages each. Together they exceed by far what any one of them may send.
thousands_of_transports_of_one_server(_Config) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 2, rate_per_second => ?SLOW}),
    ok = ?R:register_server(s, self(), #{}),
    Ids = [ <<"transport ", N:32>> || N <- lists:seq(1, 3000) ],
    _ = [ ok = ?R:register_transport(Id, self(), #{server_id => s}) || Id <- Ids ],
    Results = [ [ ?R:route_to_server(s, Id, {N, Id}) || N <- [1, 2, 3] ] || Id <- Ids ],
    ?assertEqual([[ok, ok, {error, rate_limited}]], lists:usort(Results)),
    ?assertEqual([ {mcp_message, Id, {N, Id}} || Id <- Ids, N <- [1, 2] ], test_support:flush()).


%% Neither side is charged, but the transport's shard admits or refuses.
answers_cost_nothing(_Config) ->
    [{Id, Pid}] = receivers(?SHARD, 1),
    ok = ?R:register_transport(Id, Pid, #{server_id => s}),
    ok = ?R:register_server(s, self(), #{}),
    ok = ?B:set_limits(transport, Id, #{capacity => 1, rate_per_second => ?SLOW}),
    ?assertEqual([], [ E || E <- [ ?R:route_to_transport(Id, s, N) || N <- lists:seq(1, 2000) ], E =/= ok ]),
    ?assertMatch(#{tokens := 1}, ?B:get_state(transport, Id)),
    ok = ?A:set_threshold(?SHARD, 100),
    test_support:await(fun() -> ?R:route_to_transport(Id, s, x) =:= {error, shard_overloaded} end),
    ?assertEqual({error, shard_overloaded}, ?R:route_message({transport, Id}, x)),
    end_all([{Id, Pid}]).


broadcast_admits_each_by_itself(_Config) ->
    Full = overloaded(?SHARD),
    [{FullId, FullPid} | _] = Full,
    Others = lists:append([ receivers(Shard, 1) || Shard <- lists:seq(?SHARD + 1, ?SHARD + 5) ]),
    ok = ?R:register_server(s, self(), #{}),
    _ = [ ok = ?R:register_transport(Id, Pid, #{server_id => s}) || {Id, Pid} <- Others ],
    ?assertEqual(ok, ?R:route_to_transport(broadcast, s, 1)),
    ok = ?R:register_transport(FullId, FullPid, #{server_id => s}),
    Waiting = queue(FullPid),
    ?assertEqual({error, shard_overloaded}, ?R:route_to_transport(broadcast, s, 2)),
    ?assertEqual({error, shard_overloaded}, ?R:route_message({server, s}, 3)),
    ?assertEqual(Waiting, queue(FullPid)),
    _ = [ ?assertEqual({messages, [ {mcp_response, s, N} || N <- [1, 2, 3] ]}, process_info(Pid, messages))
          || {_, Pid} <- Others ],
    %% More transports than are handled on a normal scheduler.
    Many = [ {<<"many ", N:32>>, spawn(fun() -> stalled() end)} || N <- lists:seq(1, 2000) ],
    _ = [ ok = ?R:register_transport(Id, Pid, #{server_id => s}) || {Id, Pid} <- Many ],
    ?assertEqual({error, shard_overloaded}, ?R:route_to_transport(broadcast, s, 4)),
    InFull = [ Pid || {Id, Pid} <- Many, erlmcp_shard_registry:get_shard_id(Id) =:= ?SHARD ],
    ?assertEqual([0], lists:usort([ queue(Pid) || Pid <- InFull ])),
    ?assertEqual([1], lists:usort([ queue(Pid) || {_, Pid} <- Many, not lists:member(Pid, InFull) ])),
    end_all(Full ++ Others ++ Many).


%%% Off


backpressure_off(_Config) ->
    Receivers = [{Id, Pid} | _] = overloaded(?SHARD),
    ok = ?R:register_server(Id, Pid, #{}),
    ok = ?R:register_transport(Id, Pid, #{server_id => Id}),
    _ = [ ok = ?B:set_limits(NS, Id, #{capacity => 1, rate_per_second => ?SLOW}) || NS <- [connection, transport] ],
    open = erlmcp_nif:breaker_set(open),
    Routes = fun() ->
                     [?M:route_message(Id, x),
                      ?M:route_message(?SHARD, Id, x),
                      hd(?M:route_batch([{Id, x}])),
                      ?R:route_to_server(Id, Id, x),
                      ?R:route_to_transport(Id, Id, x),
                      ?R:route_to_transport(broadcast, Id, x),
                      ?R:route_message({transport, Id}, x),
                      ?R:route_message({server, Id}, x)]
             end,
    ?assertEqual([{error, circuit_open}], lists:usort(Routes())),
    Before = queue(Pid),
    ok = erlmcp_native:set(backpressure, off),
    ?assertEqual([ok], lists:usort(lists:append([ Routes() || _ <- lists:seq(1, 500) ]))),
    ?assertEqual(Before + 8 * 500, queue(Pid)),
    ?assertEqual(ok, ?A:check_admission(?SHARD)),
    %% Other settings are stored and not in force.
    ok = erlmcp_native:set(admission, #{threshold => 1}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 1, rate_per_second => ?SLOW}),
    ok = erlmcp_native:set(circuit_breaker, circuit()),
    _ = erlmcp_nif:breaker_set(open),
    ?assertEqual([ok], lists:usort(lists:append([ Routes() || _ <- lists:seq(1, 100) ]))),
    ?assertEqual({error, not_found}, ?M:route_message(unknown, x)),
    %% Backpressure is switched on again, with all of these settings.
    ok = erlmcp_native:set(backpressure, on),
    ?assertMatch(#{threshold := 1}, ?A:get_shard_stats(?SHARD)),
    test_support:await(fun() -> ?M:route_message(Id, x) =:= {error, shard_overloaded} end),
    ?assertMatch({error, {bad_option, backpressure, sometimes, _}}, erlmcp_native:set(backpressure, sometimes)),
    end_all(Receivers).


%% The transport's id is not validated: a transport whose id is too long to be registered has no bucket.
long_transport_id(_Config) ->
    ok = ?R:register_server(s, self(), #{}),
    Long = binary:copy(<<"x">>, 65_536),
    ?assertEqual(ok, ?R:route_to_server(s, Long, 1)),
    ?assertEqual(ok, ?R:route_to_server(s, {a, [Long]}, 2)),
    ?assertEqual([{mcp_message, Long, 1}, {mcp_message, {a, [Long]}, 2}], test_support:flush()).


%% The defaults apply, except that no message is refused because of a shard's load.
without_the_application(_Config) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, in_without_application)).


in_without_application() ->
    {ok, _} = erlmcp_registry:start_link(),
    Receiver = spawn(fun() -> timer:sleep(infinity) end),
    ok = erlmcp_shard_registry:register_connection(c, Receiver, #{}),
    ok = ?R:register_server(s, Receiver, #{}),
    #{tokens := 1000, capacity := 1000, rate_per_second := 10000.0} = ?B:get_state(c),
    Default = erlmcp_native_config:default(circuit_breaker),
    #{
      failure_threshold := Failures,
      window_ms := Window,
      success_threshold := Successes,
      timeout_ms := Timeout,
      probe_limit := Probes
     } = Default,
    #{state := closed, config := {Failures, Window, Successes, Timeout, Probes}} = erlmcp_nif:breaker_stats(),
    #{capacity := Capacity, rate_per_second := Rate} = erlmcp_native_config:default(token_bucket),
    {Capacity, SharedRate} = erlmcp_nif:shared_limits(),
    true = SharedRate == Rate,
    %% 50,000 messages to a receiver that processes none.
    [] = [ E || E <- [ ?R:route_to_server(s, t, N) || N <- lists:seq(1, 50_000) ], E =/= ok ],
    {message_queue_len, 50_000} = process_info(Receiver, message_queue_len),
    ok = ?A:check_admission(0),
    #{threshold := infinity, queue_depth := 0, sample_age_ms := infinity, messages_per_second := 0} =
        ?A:get_shard_stats(0),
    %% Token buckets work.
    Results = [ ?M:route_message(c, x) || _ <- lists:seq(1, 3000) ],
    true = lists:member({error, rate_limited}, Results),
    %% The settings can be changed as with the application.
    ok = erlmcp_native:set(token_bucket, infinity),
    [ok] = lists:usort([ ?M:route_message(c, x) || _ <- lists:seq(1, 3000) ]),
    ok = erlmcp_native:set(admission, #{threshold => 10}),
    [ok] = lists:usort([ ?M:route_message(c, x) || _ <- lists:seq(1, 3000) ]),
    ok = erlmcp_native:set(backpressure, off),
    [ok] = lists:usort([ ?M:route_message(c, x) || _ <- lists:seq(1, 3000) ]),
    ok.


%% The application samples no more, so from then on no message is refused because of a shard's load.
after_the_application(_Config) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, in_after_application)).


in_after_application() ->
    ok = application:start(erlmcp_native),
    {ok, _} = erlmcp_registry:start_link(),
    Receiver = spawn(fun() -> timer:sleep(infinity) end),
    ok = ?R:register_server(s, Receiver, #{}),
    _ = [ ?R:route_to_server(s, t, N) || N <- lists:seq(1, 5000) ],
    ok = application:stop(erlmcp_native),
    [] = [ E || E <- [ ?R:route_to_server(s, t, N) || N <- lists:seq(1, 50_000) ], E =/= ok ],
    %% Refusals start again with the application.
    ok = application:start(erlmcp_native),
    test_support:await(fun() -> ?R:route_to_server(s, t, x) =:= {error, shard_overloaded} end),
    ok.


%%% Instruments


receivers(Shard, Number) ->
    receivers(Shard, Number, 1).


receivers(_Shard, 0, _N) ->
    [];
receivers(Shard, Number, N) ->
    Id = <<"receiver ", (integer_to_binary(N))/binary>>,
    case erlmcp_shard_registry:get_shard_id(Id) of
        Shard ->
            Pid = spawn(fun() -> stalled() end),
            ok = erlmcp_shard_registry:register_connection(Id, Pid, #{}),
            [{Id, Pid} | receivers(Shard, Number - 1, N + 1)];
        _ ->
            receivers(Shard, Number, N + 1)
    end.


%% The receivers of a shard, which have just overloaded it.
overloaded(Shard) ->
    Receivers = [{Id, _} | _] = receivers(Shard, 1),
    ok = ?B:set_limits(Id, infinity),
    ok = ?A:set_threshold(Shard, 50),
    ok = fill(Id),
    Receivers.


fill(Id) ->
    case ?M:route_message(Id, x) of
        ok -> fill(Id);
        {error, shard_overloaded} -> ok
    end.


stalled() ->
    receive
        {take, From} ->
            ok = take(),
            From ! {taken, self()},
            stalled()
    end.


take() ->
    receive x -> take() after 0 -> ok end.


end_all(Receivers) ->
    _ = [ exit(Pid, kill) || {_, Pid} <- Receivers ],
    test_support:await(fun() -> not lists:any(fun({_, Pid}) -> is_process_alive(Pid) end, Receivers) end),
    ok.


queue(Pid) ->
    {message_queue_len, Length} = process_info(Pid, message_queue_len),
    Length.


manager(Shard) ->
    whereis(list_to_atom("erlmcp_shard_manager_" ++ integer_to_list(Shard))).


%% Reports on request what it has received so far, in order.
forward(To) ->
    receive
        {report, Ref} -> To ! {Ref, self(), lists:reverse(received([]))}, forward(To)
    end.


received(Got) ->
    receive N when is_integer(N) -> received([N | Got]) after 0 -> Got end.


forwarded(Pid) ->
    Ref = make_ref(),
    Pid ! {report, Ref},
    receive {Ref, Pid, Got} -> Got end.


now_ms() ->
    erlang:monotonic_time(millisecond).


circuit() ->
    #{
      failure_threshold => 5,
      window_ms => 60_000,
      success_threshold => 3,
      timeout_ms => 100,
      probe_limit => 2
     }.
