%%% The cost of a message in a store, against the mailbox of a process: to add it, and to take it out again.
%%%
%%% One process fills a store, and then drains it in portions of 100. The mailbox is that of another process, which receives
%%% nothing while it is filled, and then takes all. The message is the one that a transport gets from erlmcp. The last
%%% row is the native memory of an idle store that was used once.
-module(message_store_bench).

-export([run/1]).
%% In the peer
-export([used_bytes/0]).

-type work() :: push | send | drain | take | refused.

-define(MESSAGE,  {mcp_message, <<"transport-17">>, <<"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}">>}).
-define(MESSAGES, 20_000).
-define(PORTION,  100).
%% A process has 1,000 at most.
-define(STORES,    900).
-define(CONSUMERS, 20).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{rounds := Rounds, progress := Progress}) ->
    Figures = bench_rounds:interleave(Rounds,
                                      [ {Work, fun() -> bench_rounds:in_process(fun() -> measure(Work) end) end} || Work <- [push, send, drain, take, refused] ],
                                      Progress),
    Row = fun(Name, Work, OtherName, Other) ->
                  bench_report:time_row("stores", Name, map_get(Work, Figures), OtherName, map_get(Other, Figures))
          end,
    [Row("message store, push/2", push, "Pid ! Msg to a process that does not run", send),
     Row("message store, drain/2 of 100", drain, "receive, from a long mailbox", take),
     Row("message store, push/2 to a full one", refused, "push/2", push),
     bench_report:size_row("stores", "an idle message store", idle_bytes(), "B", none, none)].


%% Nanoseconds for each message.
-spec measure(work()) -> float().
measure(push) ->
    Store = erlmcp_message_store:new(?MESSAGES),
    each(fun() -> push(Store, ?MESSAGES) end);
measure(refused) ->
    Store = erlmcp_message_store:new(1),
    ok = push(Store, 1),
    each(fun() -> refused(Store, ?MESSAGES) end);
measure(drain) ->
    Store = erlmcp_message_store:new(?MESSAGES),
    ok = push(Store, ?MESSAGES),
    each(fun() -> drain(Store) end);
measure(send) ->
    Pid = spawn_link(fun idle/0),
    Ns = each(fun() -> send(Pid, ?MESSAGES) end),
    Pid ! stop,
    Ns;
measure(take) ->
    Parent = self(),
    Pid = spawn_link(fun() ->
                             receive start -> ok end,
                             Parent ! {self(), each(fun() -> take(?MESSAGES) end)}
                     end),
    ok = send(Pid, ?MESSAGES),
    Pid ! start,
    receive {Pid, Ns} -> Ns end.


-spec each(fun(() -> ok)) -> float().
each(Fun) ->
    Start = erlang:monotonic_time(),
    ok = Fun(),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond) / ?MESSAGES.


-spec push(erlmcp_message_store:store(), non_neg_integer()) -> ok.
push(_Store, 0) ->
    ok;
push(Store, N) ->
    ok = erlmcp_message_store:push(Store, ?MESSAGE),
    push(Store, N - 1).


-spec refused(erlmcp_message_store:store(), non_neg_integer()) -> ok.
refused(_Store, 0) ->
    ok;
refused(Store, N) ->
    {error, full} = erlmcp_message_store:push(Store, ?MESSAGE),
    refused(Store, N - 1).


-spec drain(erlmcp_message_store:store()) -> ok.
drain(Store) ->
    case erlmcp_message_store:drain(Store, ?PORTION) of
        Messages when length(Messages) < ?PORTION -> ok;
        _ -> drain(Store)
    end.


-spec send(pid(), non_neg_integer()) -> ok.
send(_Pid, 0) ->
    ok;
send(Pid, N) ->
    Pid ! ?MESSAGE,
    send(Pid, N - 1).


-spec take(non_neg_integer()) -> ok.
take(0) ->
    ok;
take(N) ->
    receive {mcp_message, _, _} -> take(N - 1) end.


%% A selective receive, so that the mailbox grows.
-spec idle() -> ok.
idle() ->
    receive stop -> ok end.


%% In a VM of its own.
-spec idle_bytes() -> float().
idle_bytes() ->
    Peer = bench_peer:start([]),
    Bytes = bench_peer:call(Peer, ?MODULE, used_bytes, []),
    ok = bench_peer:stop(Peer),
    Bytes.


%% Native memory for each of many stores that were used once, and of their share of a process.
-spec used_bytes() -> float().
used_bytes() ->
    Before = bench_peer:resident(),
    Self = self(),
    Consumers = [ spawn_link(fun() ->
                                     Stores = used(?STORES),
                                     Self ! {used, self()},
                                     receive stop -> true = lists:all(fun is_empty/1, Stores) end
                             end)
                  || _ <- lists:seq(1, ?CONSUMERS) ],
    lists:foreach(fun(Consumer) -> receive {used, Consumer} -> ok end end, Consumers),
    Bytes = (bench_peer:resident() - Before) / (?STORES * ?CONSUMERS),
    lists:foreach(fun(Consumer) -> Consumer ! stop end, Consumers),
    Bytes.


-spec is_empty(erlmcp_message_store:store()) -> boolean().
is_empty(Store) -> erlmcp_message_store:len(Store) =:= 0.


-spec used(pos_integer()) -> [erlmcp_message_store:store()].
used(Number) ->
    Stores = [ erlmcp_message_store:new(1000) || _ <- lists:seq(1, Number) ],
    lists:foreach(fun(Store) ->
                          ok = push(Store, 1),
                          [_] = erlmcp_message_store:drain(Store, 2),
                          receive {erlmcp_message_store, ready, Store} -> ok end
                  end,
                  Stores),
    Stores.
