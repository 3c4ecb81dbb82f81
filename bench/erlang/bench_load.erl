%%% A closed loop: senders that iterate over all receivers again and again, as fast as the receivers keep up.
%%%
%%% Every sender visits all receivers in an order other than that of their registration, starting at its own
%%% place. Senders sleep while `?WINDOW' messages per receiver are in flight, or `?MOST_UNDER_WAY' in all. A
%%% refused message is counted and sent again.
%%%
%%% *A rate* is the number of messages that receivers have counted within the time, after a run-up in which the
%%% loop closes.
-module(bench_load).

-export([start/2, during/4, rate/2, delivered/1, refused/1]).

-export_type([way/0, load/0]).

-record(load, {
          delivered :: counters:counters_ref(),
          %% 1: whether to stop; 2: refused.
          control :: atomics:atomics_ref(),
          senders :: pos_integer(),
          window :: pos_integer(),
          table :: ets:table()
         }).

-type way() :: bare | ets | connection | native.
-opaque load() :: #load{}.

%% The maximum number of messages in flight, per receiver and in all.
-define(WINDOW,         8).
-define(MOST_UNDER_WAY, 256_000).
-define(LARGEST_CHUNK,  500).
-define(RUN_UP_MS,      200).
-define(MESSAGE,        <<"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}">>).
-define(CHUNKS,         {?MODULE, chunks}).


%% Starts the receivers, which the caller has to register, and prepares the load for up to `Senders' senders.
-spec start(Receivers :: pos_integer(), Senders :: pos_integer()) -> {load(), bench_population:population()}.
start(Size, MostSenders) ->
    Delivered = counters:new(1, [write_concurrency]),
    {_, Connections} = Population = bench_population:start(Size, fun() -> receiver(Delivered) end),
    Config = bench_population:small_config(),
    Table = bench_population:ets_table([ {Id, Pid, Config} || {Id, Pid} <- Connections ]),
    Window = min(?WINDOW * Size, ?MOST_UNDER_WAY),
    %% Several chunks per sender fit into the window.
    Chunk = max(1, min(?LARGEST_CHUNK, Window div (4 * MostSenders))),
    %% All senders share the chunks, however many senders there are.
    ok = persistent_term:put(?CHUNKS, chunks(bench_population:visited(Connections), Chunk)),
    Load = #load{
             delivered = Delivered,
             control = atomics:new(2, []),
             senders = MostSenders,
             window = Window,
             table = Table
            },
    {Load, Population}.


%% Messages per second that the receivers count from now on, during {@link during/4}.
-spec rate(load(), float()) -> float().
rate(Load, Seconds) ->
    {Count, Time} = {delivered(Load), erlang:monotonic_time()},
    ok = timer:sleep(round(Seconds * 1000)),
    (delivered(Load) - Count) / bench_report:seconds(erlang:monotonic_time() - Time).


%% Messages that the receivers have counted since the start of {@link during/4}.
-spec delivered(load()) -> non_neg_integer().
delivered(#load{delivered = Delivered}) ->
    counters:get(Delivered, 1).


%% Messages refused so far.
-spec refused(load()) -> non_neg_integer().
refused(#load{control = Control}) ->
    atomics:get(Control, 2).


-spec chunks([Element], pos_integer()) -> tuple() when Element :: bench_senders:connection().
chunks(Connections, Length) ->
    list_to_tuple(chunks(Connections, length(Connections), Length)).


-spec chunks([Element], non_neg_integer(), pos_integer()) -> [[Element]].
chunks(Connections, Left, Length) when Left =< Length ->
    [Connections];
chunks(Connections, Left, Length) ->
    {Chunk, Others} = lists:split(Length, Connections),
    [Chunk | chunks(Others, Left - Length, Length)].


%% The result of a fun that runs while messages are sent.
-spec during(way(), Senders :: pos_integer(), load(), fun(() -> Result)) -> Result.
during(Way, Number, #load{delivered = Delivered, control = Control} = Loop, Measure) ->
    Load = Loop#load{senders = Number},
    ok = counters:put(Delivered, 1, 0),
    ok = atomics:put(Control, 1, 0),
    Self = self(),
    Senders = [ spawn_monitor(fun() -> Self ! {sent, self(), sender(Way, Sender, Load)} end)
                || Sender <- lists:seq(0, Number - 1) ],
    ok = timer:sleep(?RUN_UP_MS),
    Result = Measure(),
    ok = atomics:put(Control, 1, 1),
    ok = bench_population:await(Senders),
    Sent = lists:sum([ receive {sent, Sender, Messages} -> Messages end || {Sender, _} <- Senders ]),
    ok = await(Delivered, Sent),
    Result.


-spec await(counters:counters_ref(), non_neg_integer()) -> ok.
await(Delivered, Sent) ->
    case counters:get(Delivered, 1) of
        Sent ->
            ok;
        Fewer when Fewer < Sent ->
            ok = timer:sleep(1),
            await(Delivered, Sent)
    end.


%%% Receivers


-spec receiver(counters:counters_ref()) -> no_return().
receiver(Delivered) ->
    receive
        {mcp_message, _Transport, _Message} ->
            ok = counters:add(Delivered, 1, 1),
            receiver(Delivered)
    end.


%%% Senders


%% The number of messages that the sender has sent when it is told to stop.
-spec sender(way(), non_neg_integer(), #load{}) -> non_neg_integer().
sender(Way, Sender, #load{senders = Number} = Load) ->
    Chunks = persistent_term:get(?CHUNKS),
    sender(Way, Sender * tuple_size(Chunks) div Number + 1, Chunks, 0, Load).


-spec sender(way(), pos_integer(), tuple(), non_neg_integer(), #load{}) -> non_neg_integer().
sender(Way, Next, Chunks, Sent, Load) when Next > tuple_size(Chunks) ->
    sender(Way, 1, Chunks, Sent, Load);
sender(Way, Next, Chunks, Sent, #load{control = Control} = Load) ->
    case atomics:get(Control, 1) of
        0 ->
            Chunk = element(Next, Chunks),
            ok = send(Way, Chunk, Load),
            Now = Sent + length(Chunk),
            ok = keep_to_window(Now, Load),
            sender(Way, Next + 1, Chunks, Now, Load);
        1 ->
            Sent
    end.


%% Assumes that all senders have sent as much as this one. Slower senders are held up by the receivers alone.
-spec keep_to_window(non_neg_integer(), #load{}) -> ok.
keep_to_window(Sent, #load{delivered = Delivered, control = Control, senders = Number, window = Window} = Load) ->
    case Sent * Number - counters:get(Delivered, 1) > Window andalso atomics:get(Control, 1) =:= 0 of
        true ->
            ok = timer:sleep(1),
            keep_to_window(Sent, Load);
        false ->
            ok
    end.


%% One loop per way, with the call spelled out.
-spec send(way(), [bench_senders:connection()], #load{}) -> ok.
send(bare, Chunk, _Load) -> bench_senders:send(bare, Chunk, ?MESSAGE);
send(ets, Chunk, #load{table = Table}) -> ets(Chunk, Table);
send(connection, Chunk, #load{control = Control}) -> connection(Chunk, Control);
send(native, Chunk, #load{control = Control}) -> native(Chunk, Control).


-spec ets([bench_senders:connection()], ets:table()) -> ok.
ets([{Id, _Pid, Transport} | Others], Table) ->
    ets:lookup_element(Table, Id, 2) ! {mcp_message, Transport, ?MESSAGE},
    ets(Others, Table);
ets([], _Table) ->
    ok.


-spec connection([bench_senders:connection()], atomics:atomics_ref()) -> ok.
connection([{Id, _Pid, Transport} | Others] = All, Control) ->
    case erlmcp_shard_manager:route_message(Id, {mcp_message, Transport, ?MESSAGE}) of
        ok ->
            connection(Others, Control);
        {error, _Refused} ->
            ok = count_refusal(Control),
            connection(All, Control)
    end;
connection([], _Control) ->
    ok.


-spec native([bench_senders:connection()], atomics:atomics_ref()) -> ok.
native([{Id, _Pid, Transport} | Others] = All, Control) ->
    case erlmcp_registry:route_to_server(Id, Transport, ?MESSAGE) of
        ok ->
            native(Others, Control);
        {error, _Refused} ->
            ok = count_refusal(Control),
            native(All, Control)
    end;
native([], _Control) ->
    ok.


-spec count_refusal(atomics:atomics_ref()) -> ok.
count_refusal(Control) ->
    ok = atomics:add(Control, 2, 1),
    timer:sleep(1).
