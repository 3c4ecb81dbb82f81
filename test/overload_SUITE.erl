%%% Ten times as much as the receivers take, for seconds, and what becomes of it.
%%%
%%% The contract: memory stays where the thresholds bound it; each message that was accepted is
%%% delivered, once and in the order of its sender; the accepted ones do not wait long; when the
%%% load is over everything is accepted again within a second.
%%%
%%% OVERLOAD_SECONDS: how long the load lasts (5).
-module(overload_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([tenfold_load/1]).

-define(RECEIVERS, 16).
-define(SENDERS,   4).
%% Messages that a receiver takes every PERIOD_MS.
-define(BATCH,     10).
-define(PERIOD_MS, 10).
-define(THRESHOLD, 100).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [tenfold_load].


%% Circuit and buckets would take the load off the shards.
init_per_suite(Config) ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, admission, #{threshold => ?THRESHOLD, sample_interval_ms => 50}),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:set_env(erlmcp_native, circuit_breaker, off),
    ok = application:start(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    _ = [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker] ],
    ok = erlmcp_backpressure:configure(),
    application:stop(erlmcp_native).


tenfold_load(_Config) ->
    Seconds = test_support:positive_integer("OVERLOAD_SECONDS", 5),
    Ids = ids(),
    Receivers = [ begin
                      Pid = spawn_link(fun() -> receiver(#{}, []) end),
                      ok = erlmcp_shard_registry:register_connection(Id, Pid, #{}),
                      Pid
                  end || Id <- Ids ],
    MemoryBefore = memory(),
    Began = now_us(),
    End = Began + Seconds * 1_000_000,
    %% Together ten times what the receivers take.
    EachPeriod = 10 * ?RECEIVERS * ?BATCH div ?SENDERS,
    Load = [ sender(Name, Ids, EachPeriod, End) || Name <- lists:seq(1, ?SENDERS) ],
    MemoryMost = most_memory(End, 0),
    {Accepted, Refused} = sent(Load),
    Offered = Accepted + Refused,
    %% The load is over. From the end of the second after it everything is accepted.
    LoadEnded = now_us(),
    After = [sender(after_load, Ids, ?RECEIVERS * ?BATCH div 2, LoadEnded + 2_000_000)],
    {AcceptedAfter, _} = sent(After),
    LastRefused = receive {last_refused, after_load, Us} -> Us end,
    timer:sleep(20 * ?PERIOD_MS),
    Reports = [ begin Pid ! {report, self()}, receive {report, Pid, Report} -> Report end end || Pid <- Receivers ],
    Delivered = lists:sum([ N || {Last, _} <- Reports, N <- maps:values(Last) ]),
    Latencies = lists:sort(lists:append([ L || {_, L} <- Reports ])),
    P95 = lists:nth(length(Latencies) * 95 div 100, Latencies),
    ct:pal("~b offered, ~b accepted in ~b s, p95 ~b us, ~b MB more at most, refused until ~b ms after the load",
           [Offered,
            Accepted,
            Seconds,
            P95,
            (MemoryMost - MemoryBefore) div 1_000_000,
            max(0, LastRefused - LoadEnded) div 1000]),
    %% It was an overload, and the receivers had as much to do as they could.
    ?assert(Refused > 2 * Accepted, {Accepted, Refused}),
    ?assert(Accepted > Seconds * ?RECEIVERS * 200, Accepted),
    %% Each receiver has checked the numbers of each sender.
    ?assertEqual(Accepted + AcceptedAfter, Delivered),
    ?assert(MemoryMost - MemoryBefore < 50_000_000, {MemoryBefore, MemoryMost}),
    %% A full shard is emptied in THRESHOLD / BATCH periods, 100 ms.
    ?assert(P95 < 500_000, P95),
    ?assert(LastRefused < LoadEnded + 1_000_000, LastRefused - LoadEnded),
    _ = [ begin unlink(Pid), exit(Pid, kill) end || Pid <- Receivers ],
    ok.


%% One in each of so many shards.
ids() ->
    [ hd([ Id || N <- lists:seq(1, 10_000),
                 Id <- [<<"receiver ", N:32>>],
                 erlmcp_shard_registry:get_shard_id(Id) =:= Shard ])
      || Shard <- lists:seq(0, ?RECEIVERS - 1) ].


%%% Receivers


%% The last number of each sender, provided that none was missing.
receiver(Last, Latencies) ->
    timer:sleep(?PERIOD_MS),
    {Last1, Latencies1} = take(?BATCH, Last, Latencies),
    receive
        {report, From} -> From ! {report, self(), {Last1, Latencies1}}
    after
        0 ->
            receiver(Last1, Latencies1)
    end.


take(0, Last, Latencies) ->
    {Last, Latencies};
take(More, Last, Latencies) ->
    receive
        {message, Sender, N, SentUs} ->
            N = maps:get(Sender, Last, 0) + 1,
            take(More - 1, Last#{Sender => N}, [now_us() - SentUs | Latencies])
    after
        0 ->
            {Last, Latencies}
    end.


%%% Senders


%% Tries so many messages in each period, to one receiver after the other.
sender(Name, Ids, EachPeriod, End) ->
    Parent = self(),
    Send = fun() ->
                   Result = send_until(#{
                                         name => Name,
                                         each => EachPeriod,
                                         until => End,
                                         accepted => 0,
                                         refused => 0,
                                         last_refused => now_us()
                                        },
                                       [ {Id, 1} || Id <- Ids ],
                                       now_us()),
                   Parent ! {sent, self(), Result},
                   Name =:= after_load andalso (Parent ! {last_refused, Name, maps:get(last_refused, Result)})
           end,
    spawn_link(Send).


send_until(#{until := End} = State, _Targets, Due) when Due >= End ->
    State;
send_until(#{each := Each} = State, Targets, Due) ->
    test_support:sleep_until(Due),
    {Next, Rest} = send(Each, State, Targets, []),
    send_until(Next, Rest, Due + ?PERIOD_MS * 1000).


%% A number is used up by the message that is accepted with it.
send(0, State, Targets, Done) ->
    {State, Targets ++ lists:reverse(Done)};
send(More, State, [], Done) ->
    send(More, State, lists:reverse(Done), []);
send(More, #{name := Name, accepted := Accepted, refused := Refused} = State, [{Id, N} | Targets], Done) ->
    Now = now_us(),
    case erlmcp_shard_manager:route_message(Id, {message, Name, N, Now}) of
        ok ->
            send(More - 1, State#{accepted := Accepted + 1}, Targets, [{Id, N + 1} | Done]);
        {error, shard_overloaded} ->
            send(More - 1, State#{refused := Refused + 1, last_refused := Now}, Targets, [{Id, N} | Done])
    end.


sent(Senders) ->
    Results = [ receive {sent, Pid, Result} -> Result end || Pid <- Senders ],
    {lists:sum([ N || #{accepted := N} <- Results ]), lists:sum([ N || #{refused := N} <- Results ])}.


%%% Instruments


most_memory(End, Most) ->
    case now_us() >= End of
        true -> Most;
        false -> timer:sleep(50), most_memory(End, max(Most, memory()))
    end.


memory() ->
    erlang:memory(total).


now_us() ->
    erlang:monotonic_time(microsecond).
