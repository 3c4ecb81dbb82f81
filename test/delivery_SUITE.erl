%%% How routed messages get to a connection: erlmcp_shard_manager:set_delivery/2.
%%%
%%% The contract: the connection's process chooses between its mailbox, lists and a message store. Nothing that was accepted is
%%% lost or comes twice while it lives. A change back from a store keeps the order of each sender. A message that a store
%%% refuses leaves no trace in the layers before it, and what a store holds counts in its shard, exactly.
-module(delivery_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(test_support, [await/1, await_value/2, await_samplers/0, in_process/1, kill/1, process/0]).

-define(M,    erlmcp_shard_manager).
-define(R,    erlmcp_shard_registry).
-define(S,    erlmcp_message_store).
-define(FULL, {error, store_full}).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [mailbox_by_default,
     to_a_store,
     batches_to_a_store,
     only_the_holder_chooses,
     ends_with_the_registration,
     a_store_goes_with_its_connection,
     outlives_an_update,
     a_full_store_refuses,
     a_refusal_leaves_no_trace,
     large_messages,
     bounds_change_in_place,
     what_waits_counts_exactly,
     the_end_of_the_consumer_gives_all_back,
     back_to_the_mailbox_after_the_last_message,
     back_to_the_store_before_it,
     order_is_kept_on_the_way_back,
     changes_beside_updates,
     lists_of_a_batch,
     lists_have_their_length,
     lists_and_their_process,
     wrong_arguments].


init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    ok = await_samplers(),
    Config.


end_per_suite(_Config) ->
    application:stop(erlmcp_native).


init_per_testcase(_Case, Config) ->
    ok = erlmcp_native:set(token_bucket, infinity),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = test_support:flush(),
    _ = [ ?R:unregister_connection(Id) || Shard <- lists:seq(0, 63), {Id, _} <- ?R:list_connections(Shard) ],
    [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker] ],
    ok = erlmcp_native_config:configure().


%%% Mailbox and store


mailbox_by_default(_Config) ->
    ?assertEqual({error, not_found}, ?M:delivery(a)),
    ok = connect(a),
    ?assertEqual({ok, mailbox}, ?M:delivery(a)),
    ?assertEqual(ok, ?M:set_delivery(a, mailbox)),
    ok = ?M:route_message(a, hello),
    ?assertEqual([hello], test_support:flush()).


to_a_store(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 100}),
    ?assertEqual({ok, {store, Store}}, ?M:delivery(a)),
    ?assertEqual([ ok || _ <- lists:seq(1, 10) ], [ ?M:route_message(a, N) || N <- lists:seq(1, 10) ]),
    ?assertEqual([{erlmcp_message_store, ready, Store}], test_support:flush()),
    ?assertEqual(lists:seq(1, 10), ?S:drain(Store, 100)),
    %% Look-ups find the connection as before.
    ?assertEqual({ok, {self(), caps}}, ?R:lookup_connection(a)),
    ?assertEqual(self(), ?R:whereis_connection(a)),
    %% The store counts in the totals of the node.
    ok = ?M:route_message(a, again),
    ?assertMatch(#{message_stores := #{stores := Stores, messages := 1}} when Stores > 0, erlmcp_native:info()),
    ?assertMatch(#{route := ok, delivery := {store, #{len := 1, capacity := 100}}}, connection_of(erlmcp_native:explain(a))).


batches_to_a_store(_Config) ->
    ok = connect(a),
    ok = connect(b),
    {ok, Store} = ?M:set_delivery(a, {store, #{capacity => 3}}),
    Messages = [{a, 1}, {b, 1}, {nobody, 1}, {a, 2}, {a, 3}, {b, 2}, {a, 4}],
    ?assertEqual([ok, ok, {error, not_found}, ok, ok, ok, ?FULL], ?M:route_batch(Messages)),
    ?assertEqual([1, 2, 3], ?S:drain(Store, 10)),
    ?assertEqual([1, 2], [ N || N <- test_support:flush(), is_integer(N) ]).


only_the_holder_chooses(_Config) ->
    ?assertEqual({error, not_held}, ?M:set_delivery(a, mailbox)),
    ok = connect(a),
    [ ?assertEqual({error, not_held}, in_process(fun() -> ?M:set_delivery(a, Delivery) end))
      || Delivery <- [mailbox, {batch, 10}, {store, 10}] ],
    ?assertEqual({ok, mailbox}, ?M:delivery(a)).


ends_with_the_registration(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 10}),
    ok = ?M:route_message(a, 1),
    ok = ?R:unregister_connection(a),
    ok = connect(a),
    ?assertEqual({ok, mailbox}, ?M:delivery(a)),
    Other = process(),
    {ok, Self} = ?R:replace_connection(a, Other, caps),
    ?assertEqual(self(), Self),
    ?assertEqual({ok, mailbox}, ?M:delivery(a)),
    %% What the store has accepted is still there.
    ?assertEqual([1], ?S:drain(Store, 10)).


%% With its messages and their charge, if nothing else refers to it.
a_store_goes_with_its_connection(_Config) ->
    ok = erlmcp_native:set(admission, #{threshold => 1_000}),
    End = fun(unregister) -> ok = ?R:unregister_connection(a);
             (replace) -> {ok, _} = ?R:replace_connection(a, self(), caps), ok
          end,
    [ begin
          ok = connect(a),
          {ok, _} = ?M:set_delivery(a, {store, 100}),
          [ ok = ?M:route_message(a, N) || N <- lists:seq(1, 10) ],
          [{erlmcp_message_store, ready, _}] = test_support:flush(),
          ok = End(How),
          ok = await_value({0, 0}, fun() -> garbage_collect(), {maps:get(messages, ?S:totals()), depth(a)} end),
          ok = ?R:unregister_connection(a)
      end
      || How <- [unregister, replace] ].


outlives_an_update(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 10}),
    ok = ?R:update_connection(a, #{tools => make_ref()}),
    ok = ?M:route_message(a, 1),
    ok = ?R:update_connection(a, caps),
    ?assertEqual({ok, {store, Store}}, ?M:delivery(a)),
    ?assertEqual([1], ?S:drain(Store, 10)),
    %% And the config the change of a delivery.
    Ref = make_ref(),
    ok = ?R:update_connection(a, Ref),
    ok = ?M:set_delivery(a, {batch, 7}),
    ?assertEqual({ok, {self(), Ref}}, ?R:lookup_connection(a)),
    ok = ?M:set_delivery(a, mailbox),
    ?assertEqual({ok, {self(), Ref}}, ?R:lookup_connection(a)).


%%% Refusals


a_full_store_refuses(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 2}),
    Before = refused(),
    ?assertEqual([ok, ok, ?FULL, ?FULL], [ ?M:route_message(a, N) || N <- [1, 2, 3, 4] ]),
    ?assertEqual(Before + 2, refused()),
    ?assertMatch(#{route := ?FULL, decided_by := message_store, retry_after_ms := Ms} when Ms > 0,
                 connection_of(erlmcp_native:explain(a))),
    ?assertEqual(true, erlmcp_native:retry_after_ms(a) > 0),
    ?assertEqual([1], ?S:drain(Store, 1)),
    ?assertEqual(0, erlmcp_native:retry_after_ms(a)),
    ?assertEqual([ok, ?FULL], [ ?M:route_message(a, N) || N <- [5, 6] ]),
    ?assertEqual([2, 5], ?S:drain(Store, 10)).


a_refusal_leaves_no_trace(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, #{capacity => 1, max_bytes => 1000}}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 10, rate_per_second => 1 / 3600}),
    ok = ?M:route_message(a, 1),
    ?assertMatch(#{tokens := 9}, erlmcp_token_bucket:get_state(connection, a)),
    ok = half_open_target(),
    ok = half_open_circuit(),
    Depth = depth(a),
    [ ?assertEqual(?FULL, ?M:route_message(a, N)) || N <- lists:seq(1, 20) ],
    ?assertMatch({ok, #{probes := 0}}, erlmcp_target_breaker:stats({connection, a})),
    ?assertEqual([1], ?S:drain(Store, 10)),
    [ ?assertEqual({error, message_too_large}, ?M:route_message(a, <<0:100_000>>)) || _ <- lists:seq(1, 20) ],
    ?assertMatch({ok, #{probes := 0}}, erlmcp_target_breaker:stats({connection, a})),
    ?assertMatch(#{tokens := 9}, erlmcp_token_bucket:get_state(connection, a)),
    ?assertEqual(Depth - 1, depth(a)),
    %% Both breakers still have their probe.
    ?assertMatch(#{state := half_open, probes := 0}, erlmcp_nif:breaker_stats()),
    ?assertEqual(ok, ?M:route_message(a, 2)),
    ok = erlmcp_target_breaker:delete({connection, a}),
    %% An empty bucket is asked before the store.
    [ {ok, _} = erlmcp_token_bucket:consume(connection, a, 1) || _ <- lists:seq(1, 8) ],
    ?assertEqual([2], ?S:drain(Store, 10)),
    ?assertEqual({error, rate_limited}, ?M:route_message(a, 3)).


half_open_circuit() ->
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 1, success_threshold => 100, probe_limit => 1}),
    ok = erlmcp_circuit_breaker:force_open(),
    await_value(half_open, fun erlmcp_nif:breaker_state/0).


half_open_target() ->
    Options = #{failure_threshold => 1, success_threshold => 100, probe_limit => 1},
    ok = erlmcp_target_breaker:set({connection, a}, Options#{timeout_ms => 0}),
    ok = erlmcp_target_breaker:record_failure({connection, a}),
    await_value(half_open, fun() -> erlmcp_target_breaker:state({connection, a}) end).


large_messages(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, #{max_bytes => 1 bsl 30}}),
    Messages = [lists:seq(1, 100_000),
                #{ref => make_ref(), binary => binary:copy(<<"x">>, 5_000_000)},
                {[], <<>>, fun() -> Store end}],
    ?assertEqual([ ok || _ <- Messages ], [ ?M:route_message(a, Message) || Message <- Messages ]),
    ?assertEqual(Messages, ?S:drain(Store, 10)).


bounds_change_in_place(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 1}),
    ?assertEqual([ok, ?FULL], [ ?M:route_message(a, N) || N <- [1, 2] ]),
    ?assertEqual({ok, Store}, ?M:set_delivery(a, {store, [{capacity, 3}, {max_bytes, 1000}]})),
    ?assertEqual({error, message_too_large}, ?M:route_message(a, lists:seq(1, 1000))),
    ?assertEqual([ok, ok, ?FULL], [ ?M:route_message(a, N) || N <- [3, 4, 5] ]),
    ?assertEqual({ok, Store}, ?M:set_delivery(a, {store, 1})),
    ?assertEqual([1, 3, 4], ?S:drain(Store, 10)),
    ?assertEqual([ok, ?FULL], [ ?M:route_message(a, N) || N <- [6, 7] ]).


%%% Admission control


what_waits_counts_exactly(_Config) ->
    ok = connect(a),
    ok = erlmcp_native:set(admission, #{threshold => 100}),
    ok = await_value(0, fun() -> depth(a) end),
    {ok, Store} = ?M:set_delivery(a, {store, 1000}),
    [ ok = ?M:route_message(a, N) || N <- lists:seq(1, 60) ],
    ?assertEqual(60, depth(a)),
    %% Past the registry.
    [ ok = ?S:push(Store, N) || N <- lists:seq(61, 100) ],
    ?assertEqual(100, depth(a)),
    ?assertEqual({error, shard_overloaded}, ?M:route_message(a, 101)),
    ?assertEqual(10, length(?S:drain(Store, 10))),
    ?assertEqual(90, depth(a)),
    %% At once: nothing has to be sampled.
    ?assertEqual([ ok || _ <- lists:seq(1, 10) ] ++ [{error, shard_overloaded}],
                 [ ?M:route_message(a, N) || N <- lists:seq(101, 111) ]),
    ?assertEqual(100, length(?S:drain(Store, 1000))),
    ?assertEqual(0, depth(a)),
    %% What was stored without a threshold counts when there is one.
    ok = erlmcp_native:set(admission, infinity),
    [ ok = ?M:route_message(a, N) || N <- lists:seq(1, 50) ],
    ok = erlmcp_native:set(admission, #{threshold => 100}),
    ?assertEqual(50, depth(a)),
    ?assertEqual(50, length(?S:drain(Store, 1000))),
    ?assertEqual(0, depth(a)).


the_end_of_the_consumer_gives_all_back(_Config) ->
    ok = erlmcp_native:set(admission, #{threshold => 1_000_000}),
    Parent = self(),
    Senders = [ spawn_link(fun() -> send_for_ever(a) end) || _ <- lists:seq(1, 3) ],
    [ begin
          {Pid, Monitor} = spawn_monitor(fun() ->
                                                 ok = ?R:register_connection(a, self(), caps),
                                                 {ok, Store} = ?M:set_delivery(a, {store, 1000}),
                                                 Parent ! {self(), Store},
                                                 receive never -> ok end
                                         end),
          receive {Pid, Store} -> await(fun() -> ?S:len(Store) > 500 end) end,
          exit(Pid, kill),
          receive {'DOWN', Monitor, _, _, _} -> ok end
      end
      || _ <- lists:seq(1, 20) ],
    [ begin unlink(Sender), kill(Sender) end || Sender <- Senders ],
    ok = await_value(0, fun() -> depth(a) end),
    ok = await_value(0, fun() -> garbage_collect(), maps:get(messages, ?S:totals()) end).


send_for_ever(Id) ->
    _ = ?M:route_message(Id, {some, <<"message">>}),
    send_for_ever(Id).


%%% Back from a store


back_to_the_mailbox_after_the_last_message(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 10}),
    %% Empty: at once.
    ?assertEqual(ok, ?M:set_delivery(a, mailbox)),
    ?assertEqual({ok, mailbox}, ?M:delivery(a)),
    ok = ?M:route_message(a, 1),
    ?assertEqual([1], test_support:flush()),
    ?assertEqual({error, closed}, ?S:push(Store, 2)),
    {ok, Second} = ?M:set_delivery(a, {store, 10}),
    ok = ?M:route_message(a, 1),
    ok = ?M:set_delivery(a, {batch, 10}),
    ?assertEqual({ok, {store, Second}}, ?M:delivery(a)),
    ok = ?M:route_message(a, 2),
    [{erlmcp_message_store, ready, Second}] = test_support:flush(),
    %% As many as were asked for: there may be more.
    ?assertEqual([1, 2], ?S:drain(Second, 2)),
    ?assertEqual({ok, {store, Second}}, ?M:delivery(a)),
    ?assertEqual([], ?S:drain(Second, 2)),
    ?assertEqual({ok, {batch, 10}}, ?M:delivery(a)),
    [ok, ok, ok] = ?M:route_batch([{a, 3}, {a, 4}, {a, 5}]),
    ok = ?M:route_message(a, 6),
    ?assertEqual([3, 4, 5, 6], lists:append([ case M of {erlmcp_batch, List} -> List; N -> [N] end || M <- test_support:flush() ])).


back_to_the_store_before_it(_Config) ->
    ok = connect(a),
    {ok, Store} = ?M:set_delivery(a, {store, 10}),
    ok = ?M:route_message(a, 1),
    ok = ?M:set_delivery(a, mailbox),
    ?assertEqual({ok, Store}, ?M:set_delivery(a, {store, 10})),
    ?assertEqual([1], ?S:drain(Store, 10)),
    ?assertEqual({ok, {store, Store}}, ?M:delivery(a)),
    ok = ?M:route_message(a, 2),
    ?assertEqual([2], ?S:drain(Store, 10)).


%% Until senders have met all three: the store, a full one, and the mailbox.
order_is_kept_on_the_way_back(_Config) ->
    order_is_kept([]).


order_is_kept(Met) ->
    case lists:usort(Met) of
        [full, mailbox, store] -> ok;
        _ -> order_is_kept(in_process(fun order_of_one/0) ++ Met)
    end.


order_of_one() ->
    Id = make_ref(),
    ok = connect(Id),
    {ok, Store} = ?M:set_delivery(Id, {store, 20}),
    Each = 200,
    Senders = [ spawn_link(fun() -> exit({refused, send_numbers(Id, self(), 1, Each, 0)}) end) || _ <- [1, 2] ],
    process_flag(trap_exit, true),
    Stored = drain_some(Store, 100, []),
    ok = ?M:set_delivery(Id, mailbox),
    Late = drain_until_closed(Id, Store, []),
    Sent = receive_numbers(2 * Each - length(Stored) - length(Late)),
    [ ?assertEqual(lists:seq(1, Each), [ N || {From, N} <- Stored ++ Late ++ Sent, From =:= Sender ]) || Sender <- Senders ],
    Refused = lists:sum([ receive {'EXIT', Sender, {refused, Times}} -> Times end || Sender <- Senders ]),
    [ store || Stored =/= [] ] ++ [ mailbox || Sent =/= [] ] ++ [ full || Refused > 0 ].


send_numbers(_Id, _From, N, Last, Refused) when N > Last ->
    Refused;
send_numbers(Id, From, N, Last, Refused) ->
    case ?M:route_message(Id, {From, N}) of
        ok -> send_numbers(Id, From, N + 1, Last, Refused);
        ?FULL -> send_numbers(Id, From, N, Last, Refused + 1)
    end.


drain_some(_Store, Left, Drained) when Left =< 0 ->
    Drained;
drain_some(Store, Left, Drained) ->
    Messages = ?S:drain(Store, 7),
    drain_some(Store, Left - length(Messages), Drained ++ Messages).


drain_until_closed(Id, Store, Drained) ->
    Messages = ?S:drain(Store, 7),
    case ?M:delivery(Id) of
        {ok, mailbox} -> Drained ++ Messages;
        {ok, {store, Store}} -> drain_until_closed(Id, Store, Drained ++ Messages)
    end.


receive_numbers(0) -> [];
receive_numbers(Left) -> receive {_, N} = Message when is_integer(N) -> [Message | receive_numbers(Left - 1)] end.


%% Neither change undoes the other.
changes_beside_updates(_Config) ->
    ok = connect(a),
    Parent = self(),
    Updater = spawn_link(fun() -> update_for_ever(Parent, 1) end),
    [ begin
          {ok, Store} = ?M:set_delivery(a, {store, 10}),
          ?assertEqual({ok, {store, Store}}, ?M:delivery(a)),
          ok = ?M:route_message(a, N),
          ?assertEqual([{erlmcp_message_store, ready, Store}], test_support:flush()),
          ?assertEqual([N], ?S:drain(Store, 10)),
          ok = ?M:set_delivery(a, mailbox),
          ?assertEqual({ok, mailbox}, ?M:delivery(a))
      end
      || N <- lists:seq(1, 5_000) ],
    Updater ! stop,
    receive {updates, Updates} -> ?assert(Updates > 1, Updates) end.


update_for_ever(Parent, N) ->
    Caps = case N rem 3 of 0 -> caps; 1 -> #{n => N rem 17}; 2 -> make_ref() end,
    ok = ?R:update_connection(a, Caps),
    {ok, {Parent, Caps}} = ?R:lookup_connection(a),
    receive
        stop -> Parent ! {updates, N}
    after
        0 ->
            update_for_ever(Parent, N + 1)
    end.


%%% Lists


lists_of_a_batch(_Config) ->
    [ ok = connect(Id) || Id <- [a, b, c] ],
    ok = ?M:set_delivery(a, {batch, 100}),
    ?assertEqual({ok, {batch, 100}}, ?M:delivery(a)),
    Other = collector(),
    ok = ?R:register_connection(other, Other, caps),
    Collect = fun() -> Other ! {self(), collected}, receive {Other, Messages} -> Messages end end,
    ok = ?M:route_message(a, single),
    ?assertEqual([single], test_support:flush()),
    ?assertEqual([ok, ok, {error, not_found}, ok, ok], ?M:route_batch([{a, 1}, {other, 1}, {nobody, 1}, {other, 2}, {a, 2}])),
    ?assertEqual([{erlmcp_batch, [1, 2]}], test_support:flush()),
    ?assertEqual([1, 2], Collect()),
    %% Longer than one native call.
    N = 1000,
    ?assertEqual([ ok || _ <- lists:seq(1, N) ], ?M:route_batch([ {a, M} || M <- lists:seq(1, N) ])),
    Lists = [ List || {erlmcp_batch, List} <- test_support:flush() ],
    ?assertEqual(lists:seq(1, N), lists:append(Lists)),
    ?assert(length(Lists) =< N div 10),
    %% Refused ones are not in a list.
    ok = erlmcp_native:set(token_bucket, #{capacity => 3, rate_per_second => 1 / 3600}),
    ?assertEqual([ok, ok, ok, {error, rate_limited}], ?M:route_batch([ {a, M} || M <- [1, 2, 3, 4] ])),
    ?assertEqual([{erlmcp_batch, [1, 2, 3]}], test_support:flush()).


collector() ->
    spawn_link(fun() -> collector([]) end).


collector(Messages) ->
    receive
        {From, collected} -> From ! {self(), lists:reverse(Messages)}, collector([]);
        Message -> collector([Message | Messages])
    end.


lists_have_their_length(_Config) ->
    ok = connect(a),
    [ begin
          ok = ?M:set_delivery(a, {batch, Most}),
          Sent = lists:seq(1, Count),
          _ = ?M:route_batch([ {a, N} || N <- Sent ]),
          Lists = [ List || {erlmcp_batch, List} <- test_support:flush() ],
          ?assertEqual(Sent, lists:append(Lists)),
          ?assert(lists:all(fun(List) -> length(List) =< Most end, Lists))
      end
      || Most <- [2, 3, 16, 255, 256], Count <- [1, 2, 3, 16, 17, 255, 256, 257, 600] ].


%% Many processes, some of which take lists, in one batch: all get all, in order.
lists_and_their_process(_Config) ->
    _ = rand:seed(exsss, test_support:seed("TEST_SEED")),
    Collectors = [ {{id, N}, collecting({id, N}, rand:uniform(4))} || N <- lists:seq(1, 300) ],
    Batch = [ {{id, rand:uniform(300)}, N} || N <- lists:seq(1, 20_000) ],
    ?assertEqual([ ok || _ <- Batch ], ?M:route_batch(Batch)),
    ByPid = maps:groups_from_list(fun({Id, _}) -> Id end, fun({_, N}) -> N end, Batch),
    [ begin
          Pid ! {self(), collected},
          receive {Pid, Messages} -> ?assertEqual(maps:get(Id, ByPid, []), Messages) end
      end
      || {Id, Pid} <- Collectors ].


%% A process with a delivery: 1 mailbox, else lists.
collecting(Id, Kind) ->
    Parent = self(),
    Pid = spawn_link(fun() ->
                             ok = ?R:register_connection(Id, self(), caps),
                             ok = ?M:set_delivery(Id, case Kind of 1 -> mailbox; N -> {batch, N * N} end),
                             Parent ! {self(), ready},
                             collecting_lists([])
                     end),
    receive {Pid, ready} -> Pid end.


collecting_lists(Messages) ->
    receive
        {From, collected} -> From ! {self(), Messages}, collecting_lists([]);
        {erlmcp_batch, List} -> collecting_lists(Messages ++ List);
        Message -> collecting_lists(Messages ++ [Message])
    end.


%%% Arguments


wrong_arguments(_Config) ->
    ok = connect(a),
    [ ?assertError(badarg, ?M:set_delivery(a, Delivery))
      || Delivery <- [none, {batch, 1}, {batch, 257}, {batch, 1.0}, {batch, all}, {batch, 2, 3}, {store, 10, 1000}, {}, "mailbox", 1 bsl 70] ],
    Shown = test_support:shown_error(fun() -> ?M:set_delivery(a, none) end),
    ?assertNotEqual(nomatch, string:find(Shown, "argument 2: not mailbox, {batch, 2 to 256}")),
    [ ?assertError({bad_option, _, _, _}, ?M:set_delivery(a, {store, Options}))
      || Options <- [0, -1, 1_000_001, #{capacity => 0}, #{max_bytes => 0}, [{capacity, many}], #{size => 1}, many] ],
    TooLong = binary:copy(<<"x">>, 70_000),
    ?assertError(badarg, ?M:set_delivery(TooLong, mailbox)),
    ?assertError(badarg, ?M:delivery(TooLong)),
    ?assertEqual({ok, mailbox}, ?M:delivery(a)),
    %% At most 1,000 stores.
    Held = [ begin ok = connect(N), {ok, Store} = ?M:set_delivery(N, {store, 1}), Store end || N <- lists:seq(1, 1000) ],
    ?assertError(system_limit, ?M:set_delivery(a, {store, 1})),
    ?assertEqual(1000, length(Held)).


%%% Shared


connect(Id) -> ?R:register_connection(Id, self(), caps).


depth(Id) ->
    #{queue_depth := Depth} = erlmcp_admission_control:get_shard_stats(?R:get_shard_id(Id)),
    Depth.


refused() ->
    lists:sum([ element(5, erlmcp_nif:refused(Shard)) || Shard <- lists:seq(0, 63) ]).


connection_of(#{connection := Connection}) -> Connection.
