%%% Batches of a sender: messages that are collected in its own process, and routed together.
-module(message_batch_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([routed_when_it_is_full/1,
         routed_when_its_time_has_come/1,
         a_timer_of_a_former_batch_routes_nothing/1,
         without_a_delay_only_number_and_flush_count/1,
         refused_messages_are_returned/1,
         one_message_for_a_receiver_that_takes_lists/1,
         each_message_once_and_in_order/1,
         flushed_on_exit/1,
         wrong_arguments/1]).
%% gen_server
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-import(test_support, [await/1]).

-define(B, erlmcp_message_batch).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [routed_when_it_is_full,
     routed_when_its_time_has_come,
     a_timer_of_a_former_batch_routes_nothing,
     without_a_delay_only_number_and_flush_count,
     refused_messages_are_returned,
     one_message_for_a_receiver_that_takes_lists,
     each_message_once_and_in_order,
     flushed_on_exit,
     wrong_arguments].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    {ok, Started} = application:ensure_all_started(erlmcp_native),
    [{started, Started} | Config].


end_per_suite(Config) ->
    lists:foreach(fun application:stop/1, proplists:get_value(started, Config)).


routed_when_it_is_full(_Config) ->
    ok = connect(a),
    {[], One} = ?B:batch_and_send(a, 1, ?B:new(#{max_messages => 3, max_delay_ms => infinity})),
    {[], Two} = ?B:batch_and_send(a, 2, One),
    ?assertEqual({2, []}, {?B:size(Two), mailbox()}),
    {[], Empty} = ?B:batch_and_send(a, 3, Two),
    ?assertEqual({0, [1, 2, 3]}, {?B:size(Empty), mailbox()}),
    %% As a batch of one: nothing waits.
    {[], _} = ?B:batch_and_send(a, 4, ?B:new([{max_messages, 1}])),
    ?assertEqual([4], mailbox()),
    disconnect(a).


routed_when_its_time_has_come(_Config) ->
    ok = connect(a),
    lists:foreach(fun(Ms) ->
                          {[], One} = ?B:batch_and_send(a, 1, ?B:new(#{max_delay_ms => Ms})),
                          {[], Two} = ?B:batch_and_send(a, 2, One),
                          Timeout = receive {timeout, _, erlmcp_message_batch} = Message -> Message end,
                          ?assertEqual([], mailbox()),
                          {[], Empty} = ?B:handle_timeout(Timeout, Two),
                          ?assertEqual({0, [1, 2]}, {?B:size(Empty), mailbox()})
                  end,
                  [0, 1, 20]),
    disconnect(a).


a_timer_of_a_former_batch_routes_nothing(_Config) ->
    ok = connect(a),
    {[], One} = ?B:batch_and_send(a, 1, ?B:new(#{max_delay_ms => 0})),
    Former = receive {timeout, _, erlmcp_message_batch} = Message -> Message end,
    {[], Empty} = ?B:flush(One),
    ?assertEqual([1], mailbox()),
    ?assertEqual({[], Empty}, ?B:handle_timeout(Former, Empty)),
    %% The next batch has its own timer.
    {[], Next} = ?B:batch_and_send(a, 2, Empty),
    ?assertEqual({[], Next}, ?B:handle_timeout(Former, Next)),
    ?assertEqual(1, ?B:size(Next)),
    Own = receive {timeout, _, erlmcp_message_batch} = Other -> Other end,
    {[], _} = ?B:handle_timeout(Own, Next),
    ?assertEqual([2], mailbox()),
    disconnect(a).


without_a_delay_only_number_and_flush_count(_Config) ->
    ok = connect(a),
    {[], One} = ?B:batch_and_send(a, 1, ?B:new(#{max_delay_ms => infinity})),
    receive {timeout, _, erlmcp_message_batch} -> ct:fail("a timer") after 50 -> ok end,
    {[], Empty} = ?B:flush(One),
    ?assertEqual([1], mailbox()),
    ?assertEqual({[], Empty}, ?B:flush(Empty)),
    disconnect(a).


refused_messages_are_returned(_Config) ->
    ok = connect(a),
    ok = erlmcp_token_bucket:set_limits(a, #{capacity => 1, rate_per_second => 0.001}),
    Messages = [{nobody, 1}, {a, 2}, {a, 3}, {fun() -> self() end, 4}, {<<0:1_000_000>>, 5}],
    {Refused, Empty} = ?B:flush(added(Messages, ?B:new())),
    ?assertMatch([{nobody, 1, not_found}, {a, 3, rate_limited}, {_, 4, not_found}, {_, 5, not_found}], Refused),
    ?assertEqual({0, [2]}, {?B:size(Empty), mailbox()}),
    disconnect(a).


one_message_for_a_receiver_that_takes_lists(_Config) ->
    ok = connect(a),
    ok = erlmcp_shard_manager:set_delivery(a, {batch, 100}),
    {[], _} = ?B:flush(added([{a, 1}, {a, 2}, {a, 3}], ?B:new())),
    ?assertEqual([{erlmcp_batch, [1, 2, 3]}], mailbox()),
    disconnect(a).


%% Batches of every size between single ones and more than one native call takes.
each_message_once_and_in_order(_Config) ->
    Ids = [a, b, c],
    lists:foreach(fun(Id) ->
                          ok = connect(Id),
                          ok = erlmcp_token_bucket:set_limits(Id, infinity)
                  end,
                  Ids),
    lists:foreach(fun(Max) ->
                          Messages = [ {lists:nth(rand:uniform(3), Ids), N} || N <- lists:seq(1, 2000) ],
                          Last = lists:foldl(fun({Id, N}, Batch) ->
                                                     {[], Next} = ?B:batch_and_send(Id, {Id, N}, Batch),
                                                     Next
                                             end,
                                             ?B:new(#{max_messages => Max, max_delay_ms => infinity}),
                                             Messages),
                          {[], _} = ?B:flush(Last),
                          ?assertEqual(Messages, mailbox())
                  end,
                  [1, 2, 17, 100, 255, 256, 257, 1000, 10_000]),
    lists:foreach(fun disconnect/1, Ids).


%% A process that flushes in `terminate/2', as the documentation has it, loses nothing when it is stopped.
flushed_on_exit(_Config) ->
    ok = connect(a),
    lists:foreach(fun(Stop) ->
                          {ok, Sender} = gen_server:start(?MODULE, [], []),
                          [ Sender ! {to, a, N} || N <- [1, 2, 3] ],
                          ok = Stop(Sender),
                          await(fun() -> not is_process_alive(Sender) end),
                          ?assertEqual([1, 2, 3], mailbox())
                  end,
                  [fun gen_server:stop/1,
                   fun(Sender) ->
                           true = exit(Sender, shutdown),
                           ok
                   end]),
    disconnect(a).


init([]) ->
    _ = process_flag(trap_exit, true),
    {ok, ?B:new(#{max_delay_ms => 60_000})}.


handle_call(_Request, _From, Batch) ->
    {reply, ok, Batch}.


handle_cast(_Cast, Batch) ->
    {noreply, Batch}.


handle_info({to, Id, Message}, Batch) ->
    {[], Next} = ?B:batch_and_send(Id, Message, Batch),
    {noreply, Next};
handle_info({'EXIT', _From, Reason}, Batch) ->
    {stop, Reason, Batch}.


terminate(_Reason, Batch) ->
    {[], _} = ?B:flush(Batch),
    ok.


wrong_arguments(_Config) ->
    [ ?assertError({bad_option, Key, Value, _}, ?B:new(#{Key => Value}))
      || {Key, Values} <- [{max_messages, [0, 10_001, 1.0, infinity, a]}, {max_delay_ms, [-1, 60_001, 1.0, a]}, {other, [1]}],
         Value <- Values ],
    [ ?assertError(badarg, ?B:new(Options)) || Options <- [a, 100, {max_messages, 1}, [1]] ],
    ?assertError(function_clause, ?B:handle_timeout({timeout, make_ref(), other}, ?B:new())).


%%% Connections of the test's process


connect(Id) ->
    erlmcp_shard_registry:register_connection(Id, self(), #{}).


disconnect(Id) ->
    ok = erlmcp_shard_registry:release_connection(Id, self()).


added(Messages, Batch) ->
    lists:foldl(fun({Id, Message}, Acc) ->
                        {[], Next} = ?B:batch_and_send(Id, Message, Acc),
                        Next
                end,
                Batch,
                Messages).


%% Messages but timeouts, in order.
mailbox() ->
    receive Message when element(1, Message) =/= timeout; not is_tuple(Message) -> [Message | mailbox()] after 0 -> [] end.
