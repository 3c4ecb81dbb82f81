%%% Messages routed and delivered per second, from senders on all cores to all connections.
%%%
%%% As many senders as schedulers iterate over all connections, each from a different starting point, and send
%%% the same number of messages whichever way is measured. Every connection has a registered transport, so that
%%% `route_to_server/3' is charged by all three layers, as `route_message/2' is. Receivers count the messages.
%%% The clock stops when the last message has been received, so that messages still in a mailbox, including that
%%% of the gen_server, do not count as routed.
%%%
%%% *Bounded*: a sender that is more than `?WINDOW' messages per connection ahead of the receivers sleeps a
%%% millisecond. That keeps the mailbox of the gen_server short and never empty: the window takes it some
%%% hundred milliseconds.
%%%
%%% Receivers report every fourth message, which costs all ways the same few nanoseconds.
-module(routing_bench).

-export([run/1]).
%% For other parts with a window
-export([chunks/2, await/2, keep_to_window/3]).

%% Messages that a receiver counts before it reports them.
-define(REPORT, 4).
%% Messages in flight per connection. This is more than receivers may leave unreported.
-define(WINDOW, 8).
%% Messages between two checks of the window.
-define(CHUNK,   500).
-define(MESSAGE, <<"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}">>).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, progress := Progress}) ->
    Delivered = counters:new(1, [write_concurrency]),
    {_, Connections} = Population = bench_population:start(Count, fun() -> receiver(Delivered) end),
    ok = bench_population:register_all(Population),
    lists:foreach(fun({Id, Pid}) -> ok = bench_baseline:register_server(Id, Pid, #{}) end, Connections),
    Senders = start_senders(bench_population:visited(Connections), Delivered),
    Figures = bench_rounds:interleave(
                Rounds,
                [ {Way,
                   fun() ->
                           ok = bench_senders:prepare(Way),
                           throughput(Way, Senders, Count, Delivered)
                   end}
                  || Way <- bench_senders:ways() ++ bench_senders:connection_ways() ],
                Progress),
    lists:foreach(fun(Sender) -> Sender ! stop end, Senders),
    ok = bench_population:stop(Population),
    rows(Figures, integer_to_list(length(Senders))).


-spec rows(#{bench_senders:way() => bench_rounds:figures()}, string()) -> [bench_report:row()].
rows(#{native := Native, classic := Classic, bare := Bare} = Figures, Senders) ->
    Name = "route_to_server/3, " ++ Senders ++ " senders",
    #{connection := Connection, batch := Batch} = Figures,
    Against = fun(Way, Rates) ->
                      bench_report:rate_row("routing",
                                            Way ++ ", " ++ Senders ++ " senders",
                                            Rates,
                                            bench_senders:name(bare),
                                            Bare)
              end,
    [bench_report:floor(ratio,
                        2.0,
                        bench_report:rate_row("routing",
                                              Name,
                                              Native,
                                              bench_senders:name(classic),
                                              Classic)),
     bench_report:floor(ratio,
                        0.8,
                        bench_report:rate_row("routing",
                                              Name,
                                              Native,
                                              bench_senders:name(bare),
                                              Bare)),
     bench_report:floor(ratio, 0.8, Against("route_message/2", Connection)),
     Against("route_batch/1 of 500", Batch)].


%% Messages per second.
-spec throughput(bench_senders:way(), [pid()], pos_integer(), counters:counters_ref()) -> float().
throughput(Way, Senders, Count, Delivered) ->
    ok = counters:put(Delivered, 1, 0),
    Passes = passes(length(Senders)),
    Total = Passes * length(Senders) * Count,
    Start = erlang:monotonic_time(),
    lists:foreach(fun(Sender) -> Sender ! {send, self(), Way, Passes} end, Senders),
    ok = await(Delivered, Total),
    Time = erlang:monotonic_time() - Start,
    %% A sender may still be asleep, and compare what it has sent with the counter, which the next round sets to 0.
    lists:foreach(fun(Sender) -> receive {sent, Sender} -> ok end end, Senders),
    Total / bench_report:seconds(Time).


%% About 32 messages for every connection in all. Each sender sends a multiple of `?REPORT'.
-spec passes(pos_integer()) -> pos_integer().
passes(Senders) ->
    ?REPORT * max(1, 32 div ?REPORT div Senders).


-spec await(counters:counters_ref(), pos_integer()) -> ok.
await(Delivered, Total) ->
    case counters:get(Delivered, 1) of
        Total ->
            ok;
        Fewer when Fewer < Total ->
            receive
            after
                1 ->
                    await(Delivered, Total)
            end
    end.


%%% Receivers


-spec receiver(counters:counters_ref()) -> no_return().
receiver(Delivered) ->
    receiver(Delivered, ?REPORT).


-spec receiver(counters:counters_ref(), 0..?REPORT) -> no_return().
receiver(Delivered, 0) ->
    ok = counters:add(Delivered, 1, ?REPORT),
    receiver(Delivered, ?REPORT);
receiver(Delivered, Left) ->
    receive
        {mcp_message, _Transport, _Message} -> receiver(Delivered, Left - 1)
    end.


%%% Senders


-spec start_senders([bench_senders:connection()], counters:counters_ref()) -> [pid()].
start_senders(Connections, Delivered) ->
    Number = erlang:system_info(schedulers_online),
    Count = length(Connections),
    [ begin
          {Last, First} = lists:split(Sender * Count div Number, Connections),
          Chunks = chunks(First ++ Last, ?CHUNK),
          spawn_link(fun() -> sender(Chunks, Number, ?WINDOW * Count, Delivered) end)
      end
      || Sender <- lists:seq(0, Number - 1) ].


-spec chunks([Element], pos_integer()) -> [[Element]].
chunks(List, Length) ->
    chunks(List, length(List), Length).


-spec chunks([Element], non_neg_integer(), pos_integer()) -> [[Element]].
chunks(List, Left, Length) when Left =< Length ->
    [List];
chunks(List, Left, Length) ->
    {Chunk, Others} = lists:split(Length, List),
    [Chunk | chunks(Others, Left - Length, Length)].


-spec sender([[bench_senders:connection()]], pos_integer(), pos_integer(), counters:counters_ref()) -> ok.
sender(Chunks, Number, Window, Delivered) ->
    receive
        {send, From, Way, Passes} ->
            Pass = fun(_, Sent) -> pass(Chunks, Way, Number, Window, Delivered, Sent) end,
            _ = lists:foldl(Pass, 0, lists:seq(1, Passes)),
            From ! {sent, self()},
            sender(Chunks, Number, Window, Delivered);
        stop ->
            ok
    end.


-spec pass([[bench_senders:connection()]],
           bench_senders:way(),
           pos_integer(),
           pos_integer(),
           counters:counters_ref(),
           non_neg_integer()) -> non_neg_integer().
pass([], _Way, _Number, _Window, _Delivered, Sent) ->
    Sent;
pass([Chunk | Chunks], Way, Number, Window, Delivered, Sent) ->
    ok = bench_senders:send(Way, Chunk, ?MESSAGE),
    Now = Sent + length(Chunk),
    ok = keep_to_window(Now * Number, Window, Delivered),
    pass(Chunks, Way, Number, Window, Delivered, Now).


%% Assumes that all senders have sent as much as this one. The slowest sender is held up by the receivers alone,
%% so this terminates.
-spec keep_to_window(pos_integer(), pos_integer(), counters:counters_ref()) -> ok.
keep_to_window(Sent, Window, Delivered) ->
    case Sent - counters:get(Delivered, 1) > Window of
        true ->
            receive
            after
                1 ->
                    keep_to_window(Sent, Window, Delivered)
            end;
        false ->
            ok
    end.
