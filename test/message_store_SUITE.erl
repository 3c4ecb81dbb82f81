%%% Message stores: bounded queues outside of any process, with one consumer each.
-module(message_store_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([first_in_first_out_within_the_bounds/1,
         one_wake_up_for_all_that_comes_to_an_empty_store/1,
         messages_arrive_as_sent/1,
         what_a_message_refers_to_stays/1,
         a_part_of_a_large_binary_does_not_keep_it/1,
         only_the_consumer_drains/1,
         closed_with_its_consumer/1,
         freed_with_its_last_reference/1,
         a_process_has_a_bounded_number_of_stores/1,
         many_producers_and_a_consumer_that_sleeps/1,
         a_sender_that_is_killed_wakes_the_consumer/1,
         consumers_killed_under_load/1,
         calls_are_short/1,
         totals_of_the_node/1,
         wrong_arguments/1]).
%% Called in a peer node
-export([large_messages/0]).

-import(nif_calls, [short/2, time_us/1]).
-import(test_support, [await/1, await_value/2, in_process/1]).
-import(test_terms, [fun_with/1]).

-define(S, erlmcp_message_store).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [first_in_first_out_within_the_bounds,
     one_wake_up_for_all_that_comes_to_an_empty_store,
     messages_arrive_as_sent,
     what_a_message_refers_to_stays,
     a_part_of_a_large_binary_does_not_keep_it,
     only_the_consumer_drains,
     closed_with_its_consumer,
     freed_with_its_last_reference,
     a_process_has_a_bounded_number_of_stores,
     many_producers_and_a_consumer_that_sleeps,
     a_sender_that_is_killed_wakes_the_consumer,
     consumers_killed_under_load,
     calls_are_short,
     totals_of_the_node,
     wrong_arguments].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% Messages and bounds


first_in_first_out_within_the_bounds(_Config) ->
    Store = ?S:new(3),
    ?assertEqual([], ?S:drain(Store, 10)),
    ?assertEqual([ok, ok, ok, {error, full}], [ ?S:push(Store, N) || N <- [1, 2, 3, 4] ]),
    ?assertEqual(3, ?S:len(Store)),
    ?assertEqual([1, 2], ?S:drain(Store, 2)),
    ?assertEqual([ok, ok, {error, full}], [ ?S:push(Store, N) || N <- [5, 6, 7] ]),
    ?assertEqual([3, 5, 6], ?S:drain(Store, 1_000_000)),
    %% 16 bytes for each term, and those of binaries.
    Small = ?S:new([{max_bytes, 100}, {capacity, 100}]),
    ?assertEqual(ok, ?S:push(Small, {a, b})),
    ?assertMatch(#{len := 1, bytes := 48, max_bytes := 100, capacity := 100}, ?S:info(Small)),
    ?assertEqual({error, full}, ?S:push(Small, {a, b, c})),
    ?assertEqual(ok, ?S:push(Small, [a | b])),
    ?assertEqual({error, full}, ?S:push(Small, a)),
    ?assertEqual({error, message_too_large}, ?S:push(?S:new(#{max_bytes => 100}), <<0:1000>>)),
    ?assertEqual({error, message_too_large}, ?S:push(?S:new(#{max_bytes => 100}), lists:seq(1, 1_000_000))),
    ?assertEqual({error, message_too_large}, ?S:push(?S:new(#{max_bytes => 100}), fun_with(lists:seq(1, 1_000)))),
    ?assertEqual([{a, b}, [a | b]], ?S:drain(Small, 10)),
    ?assertMatch(#{len := 0, bytes := 0}, ?S:info(Small)).


one_wake_up_for_all_that_comes_to_an_empty_store(_Config) ->
    Store = ?S:new(1000),
    Push = fun(N) -> [ ok = ?S:push(Store, M) || M <- lists:seq(1, N) ] end,
    Push(100),
    ?assertEqual(1, wake_ups(Store)),
    %% As many as were asked for.
    ?assertEqual(60, length(?S:drain(Store, 60))),
    Push(1),
    ?assertEqual(0, wake_ups(Store)),
    ?assertEqual(41, length(?S:drain(Store, 41))),
    Push(1),
    ?assertEqual(0, wake_ups(Store)),
    %% Fewer.
    ?assertEqual(1, length(?S:drain(Store, 60))),
    ?assertEqual(0, wake_ups(Store)),
    Push(100),
    ?assertEqual(1, wake_ups(Store)).


wake_ups(Store) ->
    receive
        {erlmcp_message_store, ready, Store} -> 1 + wake_ups(Store)
    after
        0 ->
            0
    end.


messages_arrive_as_sent(_Config) ->
    Store = ?S:new(#{capacity => 1000, max_bytes => 1 bsl 30}),
    Messages = [a,
                [],
                {},
                #{},
                0,
                -1,
                1 bsl 63,
                1 bsl 200,
                -(1 bsl 2000),
                1.5,
                -0.0,
                <<>>,
                <<"x">>,
                <<1:1>>,
                <<5:77>>,
                binary:copy(<<"x">>, 1_000_000),
                self(),
                make_ref(),
                hd(erlang:ports()),
                test_terms:external_pid(<<"other@host">>, 7),
                fun lists:map/2,
                fun_with(lists:seq(1, 10)),
                [a | b],
                "text",
                lists:seq(1, 300_000),
                maps:from_list([ {N, {N, <<N:32>>}} || N <- lists:seq(1, 100_000) ]),
                lists:foldl(fun(_, T) -> {T} end, {}, lists:seq(1, 200_000)),
                #{<<"jsonrpc">> => <<"2.0">>, params => [#{1 => [2, 3.0]}, {self(), make_ref(), <<0:9>>}]}],
    [ ?assertEqual({ok, [Message]}, {?S:push(Store, Message), ?S:drain(Store, 2)}) || Message <- Messages ],
    [ ok = ?S:push(Store, Message) || Message <- Messages ],
    ?assert(Messages =:= ?S:drain(Store, 1000)),
    [ ok = ?S:push(Store, Message) || Message <- Messages ],
    ?assert(Messages =:= lists:append([ ?S:drain(Store, 1) || _ <- Messages ])).


%% Nothing else keeps the counter.
what_a_message_refers_to_stays(_Config) ->
    Store = ?S:new(10),
    ok = in_process(fun() ->
                            Counter = atomics:new(1, []),
                            ok = atomics:put(Counter, 1, 17),
                            ?S:push(Store, {counter, Counter})
                    end),
    [{counter, Counter}] = ?S:drain(Store, 10),
    ?assertEqual(17, atomics:get(Counter, 1)).


a_part_of_a_large_binary_does_not_keep_it(_Config) ->
    Store = ?S:new(100),
    Before = erlang:memory(binary),
    Size = 1 bsl 26,
    ok = in_process(fun() ->
                            Large = binary:copy(<<"x">>, Size),
                            ?S:push(Store, {part, binary:part(Large, 17, 1000)})
                    end),
    await(fun() -> erlang:memory(binary) < Before + Size div 2 end),
    ?assertEqual([{part, binary:copy(<<"x">>, 1000)}], ?S:drain(Store, 1)).


%%% The consumer


only_the_consumer_drains(_Config) ->
    Store = ?S:new(10),
    ok = in_process(fun() -> ?S:push(Store, hello) end),
    ?assertEqual({error, not_consumer}, in_process(fun() -> ?S:drain(Store, 10) end)),
    Consumer = self(),
    ?assertMatch(#{consumer := Consumer, closed := false}, in_process(fun() -> ?S:info(Store) end)),
    ?assertEqual([hello], ?S:drain(Store, 10)).


closed_with_its_consumer(_Config) ->
    {Consumer, Store} = consumer(1000),
    Counter = counters:new(1, []),
    [ ok = ?S:push(Store, {N, Counter}) || N <- lists:seq(1, 1000) ],
    exit(Consumer, kill),
    await(fun() -> {error, closed} =:= ?S:push(Store, late) end),
    await(fun() -> maps:get(len, ?S:info(Store)) =:= 0 end),
    ?assertMatch(#{closed := true, consumer := Consumer, bytes := 0}, ?S:info(Store)).


%% A process that makes a store and sleeps.
consumer(Options) ->
    Parent = self(),
    Consumer = spawn(fun() ->
                             Parent ! {self(), ?S:new(Options)},
                             receive stop -> ok end
                     end),
    receive {Consumer, Store} -> {Consumer, Store} end.


freed_with_its_last_reference(_Config) ->
    #{stores := Before} = ?S:totals(),
    Fill = fun() ->
                   Store = ?S:new(1000),
                   [ ok = ?S:push(Store, {N, lists:seq(1, 100)}) || N <- lists:seq(1, 1000) ],
                   ok
           end,
    %% A wake-up refers to its store.
    Consumer = spawn(fun() -> ok = Fill(), garbage_collected() end),
    await(fun() -> maps:get(stores, ?S:totals()) =:= Before + 1 end),
    Consumer ! collect,
    await(fun() -> maps:get(stores, ?S:totals()) =:= Before end),
    ?assert(is_process_alive(Consumer)),
    exit(Consumer, kill).


garbage_collected() ->
    receive collect -> ok end,
    receive {erlmcp_message_store, ready, _Store} -> ok end,
    garbage_collect(),
    receive stop -> ok end.


a_process_has_a_bounded_number_of_stores(_Config) ->
    Made = fun() ->
                   Stores = [ ?S:new(1) || _ <- lists:seq(1, 1_000) ],
                   Refused = try ?S:new(1) catch error:Reason -> Reason end,
                   Last = lists:last(Stores),
                   ok = ?S:push(Last, x),
                   {Refused, ?S:drain(Last, 1)}
           end,
    ?assertEqual({{system_limit, [x]}, ok},
                 in_process(fun() ->
                                    Result = Made(),
                                    receive {erlmcp_message_store, ready, _} -> ok end,
                                    garbage_collect(),
                                    %% Those that were freed make room.
                                    {Result, lists:foreach(fun(_) -> ?S:new(1) end, lists:seq(1, 2_000))}
                            end)).


%%% Contention

-define(PRODUCERS, 8).
-define(EACH,      20_000).


%% It begins asleep.
many_producers_and_a_consumer_that_sleeps(_Config) ->
    Store = ?S:new(100),
    [] = ?S:drain(Store, 50),
    _ = [ spawn_link(fun() -> produce(Store, Producer, 1) end) || Producer <- lists:seq(1, ?PRODUCERS) ],
    Last = sleep(Store, ?PRODUCERS * ?EACH, #{}),
    ?assertEqual(maps:from_list([ {Producer, ?EACH} || Producer <- lists:seq(1, ?PRODUCERS) ]), Last),
    ?assertEqual([], ?S:drain(Store, 1)).


produce(_Store, _Producer, N) when N > ?EACH ->
    ok;
produce(Store, Producer, N) ->
    case ?S:push(Store, {Producer, N}) of
        ok ->
            produce(Store, Producer, N + 1);
        {error, full} ->
            erlang:yield(),
            produce(Store, Producer, N)
    end.


%% Sleeps whenever the store was found empty. Each producer's messages come in order.
consume(_Store, 0, Last) ->
    Last;
consume(Store, Left, Last) ->
    Messages = ?S:drain(Store, 50),
    Now = lists:foldl(fun({Producer, N}, Seen) ->
                              ?assertEqual(N - 1, maps:get(Producer, Seen, 0)),
                              Seen#{Producer => N}
                      end,
                      Last,
                      Messages),
    case Left - length(Messages) of
        More when More =:= 0; length(Messages) =:= 50 -> consume(Store, More, Now);
        More -> sleep(Store, More, Now)
    end.


sleep(Store, Left, Last) ->
    receive
        {erlmcp_message_store, ready, Store} -> consume(Store, Left, Last)
    after
        60_000 ->
            ct:fail({missed_wake_up, ?S:info(Store)})
    end.


%% It is killed while it copies a large message on a dirty scheduler. If the message was stored, the consumer is told.
a_sender_that_is_killed_wakes_the_consumer(_Config) ->
    Store = ?S:new(10),
    Large = lists:seq(1, 500_000),
    [ begin
          {Sender, Monitor} = spawn_monitor(fun() -> ?S:push(Store, Large) end),
          timer:sleep(Ms),
          exit(Sender, kill),
          receive {'DOWN', Monitor, process, Sender, _} -> ok end,
          %% It may be stored after the exit, or not at all.
          Woken = receive {erlmcp_message_store, ready, Store} -> true after 2_000 -> false end,
          case Woken orelse ?S:len(Store) > 0 of
              true ->
                  _ = Woken orelse receive {erlmcp_message_store, ready, Store} -> ok after 10_000 -> ct:fail({not_woken, Ms}) end,
                  ?assertEqual(1, length(?S:drain(Store, 2)));
              false ->
                  ok
          end
      end || Ms <- [0, 1, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20] ].


%% Producers go on until the store is closed. Then nothing is left of it.
consumers_killed_under_load(_Config) ->
    Before = ?S:totals(),
    [ begin
          {Consumer, Store} = consumer(100),
          Producers = [ spawn_monitor(fun() -> produce_until_closed(Store) end) || _ <- lists:seq(1, 4) ],
          timer:sleep(rand:uniform(5)),
          exit(Consumer, kill),
          [ receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(closed, Reason) end
            || {Pid, Monitor} <- Producers ],
          await_value(0, fun() -> ?S:len(Store) end)
      end || _ <- lists:seq(1, 50) ],
    true = garbage_collect(),
    await_value(Before, fun() -> ?S:totals() end).


produce_until_closed(Store) ->
    case ?S:push(Store, {lists:seq(1, 10), make_ref()}) of
        ok -> produce_until_closed(Store);
        {error, full} -> erlang:yield(), produce_until_closed(Store);
        {error, closed} -> exit(closed)
    end.


%%% Cost


calls_are_short(_Config) -> short(?MODULE, large_messages).


large_messages() ->
    Store = ?S:new(#{capacity => 100_000, max_bytes => 1 bsl 30}),
    Large = [{list, lists:seq(1, 1_000_000)},
             {binary, binary:copy(<<"x">>, 30_000_000)},
             {references, [ make_ref() || _ <- lists:seq(1, 100_000) ]},
             {map, maps:from_list([ {N, N} || N <- lists:seq(1, 4_900) ])},
             {'fun', fun_with([ lists:duplicate(50_000, N) || N <- [1, 2, 3] ])},
             {middle, lists:seq(1, 2_400)}],
    Of = fun(Message) ->
                 [time_us(fun() -> ok = ?S:push(Store, Message) end),
                  time_us(fun() -> [_] = ?S:drain(Store, 1) end),
                  time_us(fun() -> ok = ?S:push(Store, Message) end),
                  time_us(fun() -> ok = ?S:push(Store, Message) end),
                  time_us(fun() -> [_, _] = ?S:drain(Store, 2) end)]
         end,
    Many = fun() ->
                   _ = [ ok = ?S:push(Store, {N, <<N:512>>, [a, b, c]}) || N <- lists:seq(1, 20_000) ],
                   time_us(fun() -> 20_000 = length(?S:drain(Store, 50_000)) end)
           end,
    [ {Name, nif_calls:shortest(fun() -> lists:max(Of(Message)) end)} || {Name, Message} <- Large ] ++
    [{many, nif_calls:shortest(Many)}].


totals_of_the_node(_Config) ->
    #{stores := Stores, messages := Messages, bytes := Bytes} = ?S:totals(),
    Store = ?S:new(10),
    ok = ?S:push(Store, {a, b}),
    ok = ?S:push(Store, c),
    Totals = #{stores => Stores + 1, messages => Messages + 2, bytes => Bytes + 64},
    ?assertEqual(Totals, ?S:totals()),
    ?assertMatch(#{message_stores := Totals}, erlmcp_native:info()),
    ?assertEqual([{a, b}, c], ?S:drain(Store, 3)).


%%% Errors


wrong_arguments(_Config) ->
    Store = ?S:new(#{}),
    [ ?assertError({bad_option, Key, Value, [_ | _]}, ?S:new(#{Key => Value}))
      || {Key, Value} <- [{capacity, 0},
                          {capacity, 1_000_001},
                          {capacity, 1.0},
                          {max_bytes, 0},
                          {max_bytes, infinity},
                          {max_bytes, 1 bsl 32},
                          {size, 1}] ],
    ?assertError({bad_option, capacity, -1, _}, ?S:new(-1)),
    ?assertError(badarg, ?S:new(many)),
    [ ?assertError(badarg, ?S:drain(Store, Max)) || Max <- [0, -1, a, 1.0, 1_000_001] ],
    [ ?assertError(badarg, Call(Wrong))
      || Wrong <- [a, make_ref(), self(), atomics:new(1, []), erlmcp_token_bucket:new(#{})],
         Call <- [fun(S) -> ?S:push(S, x) end, fun(S) -> ?S:drain(S, 1) end, fun ?S:len/1, fun ?S:info/1] ],
    ?assertMatch({match, _},
                 re:run(test_support:shown_error(fun() -> ?S:new(many) end), "not a capacity, nor a map, a property list or a keyword list")).
