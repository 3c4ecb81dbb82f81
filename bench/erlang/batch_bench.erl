%%% Messages of batches, routed and delivered per second: one by one, by `route_batch/1' with each delivery that a connection
%%% can choose, and by a bare send.
%%%
%%% As many senders as schedulers iterate over all connections, each from a different starting point, and send the same
%%% batches whichever way is measured. A batch has 10 or 100 messages, ten for each of its receivers or one. Ten for each take
%%% turns: one message to each receiver, then the next to each. The list that `route_batch/1' takes is made while the
%%% clock runs.
%%%
%%% *Delivered*: receivers add up what they got until no message is left, and then add it to a counter, whichever way is
%%% measured. A list counts its length. The clock stops when all messages have been counted. In front of the receivers is a
%%% window, as in `routing_bench'.
%%%
%%% *Checked*: a route that does not return `ok' is an error. So is, for a receiver, a message that its delivery does not have: one
%%% outside of a list, a list of another length, or anything but a wake-up of its store.
-module(batch_bench).

-export([run/1]).

-type shape() :: {Messages :: pos_integer(), Receivers :: pos_integer()}.
-type way() :: bare | single | mailbox | lists | store.

-define(SHAPES, [{10, 1}, {100, 10}, {10, 10}, {100, 100}]).
%% Messages for each connection in a round, from all senders together.
-define(MESSAGES, 40).
%% Messages in flight per connection.
-define(WINDOW, 8).
%% Messages between two checks of the window.
-define(CHUNK, 500).
%% More than a connection is sent in a round.
-define(CAPACITY, 1000).
-define(DRAINED,  100).
-define(MESSAGE,  <<"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}">>).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, progress := Progress}) ->
    Delivered = counters:new(1, [write_concurrency]),
    {{Hub, _}, Connections} = Population = bench_population:start(Count, fun() -> receiver(Delivered) end),
    %% A receiver that fails takes the benchmark with it.
    true = link(Hub),
    Config = bench_population:small_config(),
    lists:foreach(fun({Id, Pid}) -> ok = erlmcp_shard_registry:register_connection(Id, Pid, Config) end, Connections),
    Visited = bench_population:visited(Connections),
    Rows = [ rows(Shape,
                  bench_rounds:interleave(Rounds,
                                          [ {Way, fun() -> measure(Shape, Way, Visited, Delivered) end}
                                            || Way <- [bare, single, mailbox, lists, store] ],
                                          Progress))
             || Shape <- ?SHAPES ],
    true = unlink(Hub),
    ok = bench_population:stop(Population),
    lists:append(Rows).


-spec rows(shape(), #{way() => bench_rounds:figures()}) -> [bench_report:row()].
rows({Messages, Receivers}, #{bare := Bare} = Figures) ->
    Row = fun(Way, Name) ->
                  bench_report:rate_row("batches",
                                        lists:flatten(io_lib:format("~b to ~b, ~ts", [Messages, Receivers, Name])),
                                        map_get(Way, Figures),
                                        bench_senders:name(bare),
                                        Bare)
          end,
    Lists = Row(lists, "route_batch/1, {batch, 100}"),
    [Row(single, "route_message/2"),
     Row(mailbox, "route_batch/1, mailbox"),
     case Messages > Receivers of
         true -> bench_report:goal(ratio, 1.0, Lists);
         false -> Lists
     end,
     Row(store, "route_batch/1, {store, 1000}")].


%% Messages per second.
-spec measure(shape(), way(), [bench_senders:connection()], counters:counters_ref()) -> float().
measure({Messages, Receivers} = Shape, Way, Connections, Delivered) ->
    ok = deliver(expected(Way, Shape), Connections),
    Number = erlang:system_info(schedulers_online),
    Each = Messages div Receivers,
    Passes = max(1, ?MESSAGES div Each div Number),
    Count = length(Connections),
    Total = Passes * Number * Each * Count,
    ok = counters:put(Delivered, 1, 0),
    Self = self(),
    Senders = [ spawn_link(fun() ->
                                   {Last, First} = lists:split(Sender * Count div Number, Connections),
                                   Chunks = chunks(Shape, First ++ Last),
                                   true = garbage_collect(),
                                   Self ! {ready, self()},
                                   receive start -> ok end,
                                   Pass = fun(_, Sent) -> pass(Chunks, route(Way), Number, ?WINDOW * Count, Delivered, Sent) end,
                                   _ = lists:foldl(Pass, 0, lists:seq(1, Passes)),
                                   Self ! {sent, self()}
                           end)
                || Sender <- lists:seq(0, Number - 1) ],
    lists:foreach(fun(Sender) -> receive {ready, Sender} -> ok end end, Senders),
    ok = bench_senders:prepare(route(Way)),
    Start = erlang:monotonic_time(),
    lists:foreach(fun(Sender) -> Sender ! start end, Senders),
    ok = routing_bench:await(Delivered, Total),
    Time = erlang:monotonic_time() - Start,
    %% A sender may still be asleep, and compare what it has sent with the counter, which the next round sets to 0.
    lists:foreach(fun(Sender) -> receive {sent, Sender} -> ok end end, Senders),
    Total / bench_report:seconds(Time).


-spec route(way()) -> bench_senders:way().
route(bare) -> bare;
route(single) -> connection;
route(_) -> batch.


%%% Receivers

-type expected() :: mailbox | {lists, Length :: pos_integer()} | store.


%% What receivers get.
-spec expected(way(), shape()) -> expected().
expected(lists, {Messages, Receivers}) -> {lists, Messages div Receivers};
expected(store, _Shape) -> store;
expected(_, _Shape) -> mailbox.


%% Each connection's own process chooses its delivery.
-spec deliver(expected(), [bench_senders:connection()]) -> ok.
deliver(Expected, Connections) ->
    lists:foreach(fun({Id, Pid, _}) -> Pid ! {deliver, self(), Id, Expected} end, Connections),
    lists:foreach(fun({_, Pid, _}) -> receive {delivers, Pid} -> ok end end, Connections).


-spec receiver(counters:counters_ref()) -> no_return().
receiver(Delivered) ->
    receive
        {deliver, From, Id, Expected} ->
            ok = choose(Id, Expected),
            From ! {delivers, self()},
            receiver(Delivered, Expected, 0)
    end.


-spec choose(Id :: term(), expected()) -> ok.
choose(Id, Expected) ->
    case Expected of
        mailbox -> ok = erlmcp_shard_manager:set_delivery(Id, mailbox);
        {lists, _Length} -> ok = erlmcp_shard_manager:set_delivery(Id, {batch, 100});
        store -> {ok, _Store} = erlmcp_shard_manager:set_delivery(Id, {store, ?CAPACITY})
    end,
    %% No way pays for the messages and stores of a former one.
    true = garbage_collect(),
    ok.


%% `Got' messages are to be counted when none is left.
-spec receiver(counters:counters_ref(), expected(), non_neg_integer()) -> no_return().
receiver(Delivered, Expected, Got) ->
    receive
        Message -> received(Message, Delivered, Expected, Got)
    after
        0 ->
            ok = counters:add(Delivered, 1, Got),
            receive Message -> received(Message, Delivered, Expected, 0) end
    end.


-spec received(term(), counters:counters_ref(), expected(), non_neg_integer()) -> no_return().
received({mcp_message, _, _}, Delivered, mailbox, Got) ->
    receiver(Delivered, mailbox, Got + 1);
received({erlmcp_batch, Messages}, Delivered, {lists, Length} = Expected, Got) when length(Messages) =:= Length ->
    receiver(Delivered, Expected, Got + Length);
received({erlmcp_message_store, ready, Store}, Delivered, store, Got) ->
    receiver(Delivered, store, Got + drain(Store, 0));
received({deliver, From, Id, Expected}, Delivered, _Former, Got) ->
    ok = choose(Id, Expected),
    From ! {delivers, self()},
    receiver(Delivered, Expected, Got);
received(Message, _Delivered, Expected, _Got) ->
    error({unexpected, Message, Expected}).


%% The number of messages until the store has been found empty.
-spec drain(erlmcp_message_store:store(), non_neg_integer()) -> non_neg_integer().
drain(Store, Sofar) ->
    case length(erlmcp_message_store:drain(Store, ?DRAINED)) of
        ?DRAINED -> drain(Store, Sofar + ?DRAINED);
        Fewer -> Sofar + Fewer
    end.


%%% Senders


%% All batches of a pass, with the number of messages of some at a time.
-spec chunks(shape(), [Connection]) -> [{pos_integer(), [[Connection]]}] when Connection :: bench_senders:connection().
chunks({Messages, Receivers}, Connections) ->
    Batches = [ lists:append(lists:duplicate(Messages div Receivers, Group))
                || Group <- routing_bench:chunks(Connections, Receivers) ],
    [ {length(lists:append(Chunk)), Chunk} || Chunk <- routing_bench:chunks(Batches, ?CHUNK div Messages) ].


-spec pass([{pos_integer(), [[bench_senders:connection()]]}],
           bench_senders:way(),
           pos_integer(),
           pos_integer(),
           counters:counters_ref(),
           non_neg_integer()) -> non_neg_integer().
pass([], _Route, _Number, _Window, _Delivered, Sent) ->
    Sent;
pass([{Messages, Batches} | Chunks], Route, Number, Window, Delivered, Sent) ->
    ok = send(Route, Batches),
    Now = Sent + Messages,
    ok = routing_bench:keep_to_window(Now * Number, Window, Delivered),
    pass(Chunks, Route, Number, Window, Delivered, Now).


-spec send(bench_senders:way(), [[bench_senders:connection()]]) -> ok.
send(Route, [Batch | Batches]) ->
    ok = bench_senders:send(Route, Batch, ?MESSAGE),
    send(Route, Batches);
send(_Route, []) ->
    ok.
