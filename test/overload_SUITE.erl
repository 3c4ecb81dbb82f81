%%% Behavior under a load of ten times what the receivers process, sustained for seconds.
%%%
%%% The contract: memory stays within the bound that the thresholds set; each accepted message is delivered
%%% exactly once and in the order of its sender; accepted messages do not wait long; after a sample has found
%%% the receivers' mailboxes empty, all messages are accepted again.
%%%
%%% Times are bounded in periods of the receivers, each of which counts its own, because a busy machine makes a
%%% period longer.
%%%
%%% OVERLOAD_SECONDS: how long the load lasts (5).
-module(overload_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([tenfold_load/1]).

-define(RECEIVERS, 16).
-define(SENDERS,   4).
%% Messages that a receiver processes every PERIOD_MS.
-define(BATCH,     10).
-define(PERIOD_MS, 10).
-define(THRESHOLD, 100).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [tenfold_load].


%% The circuit breaker and the token buckets would keep the load away from the shards.
init_per_suite(Config) ->
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, admission, #{threshold => ?THRESHOLD, sample_interval_ms => 50}),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    ok = application:set_env(erlmcp_native, circuit_breaker, off),
    ok = application:start(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    _ = [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker] ],
    ok = erlmcp_native_config:configure(),
    application:stop(erlmcp_native).


tenfold_load(_Config) ->
    Seconds = test_support:positive_integer("OVERLOAD_SECONDS", 5),
    Targets = targets(),
    Receivers = [ begin
                      Pid = spawn_link(fun() -> receiver(#{}, [], Periods) end),
                      ok = erlmcp_shard_registry:register_connection(Id, Pid, #{}),
                      Pid
                  end || {Id, Periods} <- Targets ],
    MemoryBefore = memory(),
    End = now_us() + Seconds * 1_000_000,
    %% All senders together offer ten times what the receivers process.
    EachPeriod = 10 * ?RECEIVERS * ?BATCH div ?SENDERS,
    Load = [ sender(Name, Targets, EachPeriod, End) || Name <- lists:seq(1, ?SENDERS) ],
    MemoryMost = most_memory(End, 0),
    {Accepted, Refused} = sent(Load),
    PeriodsOfLoad = lists:sum([ counters:get(Periods, 1) || {_, Periods} <- Targets ]),
    Offered = Accepted + Refused,
    ok = test_support:await(fun() -> lists:all(fun is_empty/1, Receivers) end, 60_000),
    %% A shard admits messages again after the next sample of empty mailboxes. Two samples are allowed, because
    %% one may have been in progress.
    Looks = [ {Shard, looks(Shard)} || Shard <- shards() ],
    ok = test_support:await(fun() -> lists:all(fun({Shard, N}) -> admits(Shard) orelse looks(Shard) >= N + 2 end, Looks) end),
    ?assertEqual([], [ Shard || Shard <- shards(), not admits(Shard) ]),
    Rounds = 3,
    Samplers = [ erlmcp_shard_sampler:name(Shard) || Shard <- shards() ],
    _ = [ begin
              ok = test_support:await(fun() -> lists:all(fun is_forgotten/1, shards()) end),
              Numbers = lists:seq((Round - 1) * ?THRESHOLD + 1, Round * ?THRESHOLD),
              %% Without samples meanwhile: a message that is sent while a sample is taken counts twice until the next one.
              ok = lists:foreach(fun sys:suspend/1, Samplers),
              [ ok = erlmcp_shard_manager:route_message(Id, message(after_load, N, Periods))
                || N <- Numbers, {Id, Periods} <- Targets ],
              ok = lists:foreach(fun sys:resume/1, Samplers),
              ok = test_support:await(fun() -> lists:all(fun is_empty/1, Receivers) end, 60_000)
          end || Round <- lists:seq(1, Rounds) ],
    Reports = [ begin Pid ! {report, self()}, receive {report, Pid, Report} -> Report end end || Pid <- Receivers ],
    Delivered = lists:sum([ N || {Last, _} <- Reports, N <- maps:values(Last) ]),
    {LatenciesUs, Waited} = lists:unzip(lists:append([ L || {_, L} <- Reports ])),
    P95 = fun(Values) -> lists:nth(length(Values) * 95 div 100, lists:sort(Values)) end,
    ct:pal("~b offered, ~b accepted in ~b s, p95 ~b us and ~b periods, ~b MB more at most",
           [Offered,
            Accepted,
            Seconds,
            P95(LatenciesUs),
            P95(Waited),
            (MemoryMost - MemoryBefore) div 1_000_000]),
    %% The load was an overload, and the receivers were kept busy.
    ?assert(Refused > 2 * Accepted, {Accepted, Refused}),
    ?assert(5 * Accepted > PeriodsOfLoad * ?BATCH, {Accepted, PeriodsOfLoad}),
    %% Each receiver has checked that the numbers of each sender are consecutive.
    ?assertEqual(Accepted + Rounds * ?THRESHOLD * ?RECEIVERS, Delivered),
    ?assert(MemoryMost - MemoryBefore < 50_000_000, {MemoryBefore, MemoryMost}),
    %% A full shard is emptied in THRESHOLD / BATCH periods, which is 10.
    ?assert(P95(Waited) < 50, P95(Waited)),
    _ = [ begin unlink(Pid), exit(Pid, kill) end || Pid <- Receivers ],
    ok.


is_empty(Receiver) ->
    process_info(Receiver, message_queue_len) =:= {message_queue_len, 0}.


shards() ->
    lists:seq(0, ?RECEIVERS - 1).


looks(Shard) ->
    {Looks, _} = erlmcp_nif:sample_counts(Shard),
    Looks.


admits(Shard) ->
    erlmcp_admission_control:check_admission(Shard) =:= ok.


%% No message counts towards the shard's load any more.
is_forgotten(Shard) ->
    element(1, erlmcp_admission_control:load(Shard)) =:= 0.


%% The id of one receiver in each shard, and a counter of that receiver's periods.
targets() ->
    [ {hd([ Id || N <- lists:seq(1, 10_000),
                  Id <- [<<"receiver ", N:32>>],
                  erlmcp_shard_registry:get_shard_id(Id) =:= Shard ]),
       counters:new(1, [])}
      || Shard <- shards() ].


message(Sender, N, Periods) ->
    {message, Sender, N, now_us(), counters:get(Periods, 1)}.


%%% Receivers


%% Keeps the last number of each sender, which must be consecutive, and for how long each message has waited, in
%% microseconds and in periods.
receiver(Last, Latencies, Periods) ->
    timer:sleep(?PERIOD_MS),
    ok = counters:add(Periods, 1, 1),
    {Last1, Latencies1} = take(?BATCH, Last, Latencies, counters:get(Periods, 1)),
    receive
        {report, From} -> From ! {report, self(), {Last1, Latencies1}}
    after
        0 ->
            receiver(Last1, Latencies1, Periods)
    end.


take(0, Last, Latencies, _Period) ->
    {Last, Latencies};
take(More, Last, Latencies, Period) ->
    receive
        {message, Sender, N, SentUs, SentPeriod} ->
            N = maps:get(Sender, Last, 0) + 1,
            take(More - 1, Last#{Sender => N}, [{now_us() - SentUs, Period - SentPeriod} | Latencies], Period)
    after
        0 ->
            {Last, Latencies}
    end.


%%% Senders


%% Offers `EachPeriod' messages in each period, to the receivers in turn.
sender(Name, Targets, EachPeriod, End) ->
    Parent = self(),
    Send = fun() ->
                   Result = send_until(#{
                                         name => Name,
                                         each => EachPeriod,
                                         until => End,
                                         accepted => 0,
                                         refused => 0
                                        },
                                       [ {Target, 1} || Target <- Targets ],
                                       now_us()),
                   Parent ! {sent, self(), Result}
           end,
    spawn_link(Send).


send_until(#{until := End} = State, _Targets, Due) when Due >= End ->
    State;
send_until(#{each := Each} = State, Targets, Due) ->
    test_support:sleep_until(Due),
    {Next, Rest} = send(Each, State, Targets, []),
    send_until(Next, Rest, Due + ?PERIOD_MS * 1000).


%% A number is used up only by an accepted message.
send(0, State, Targets, Done) ->
    {State, Targets ++ lists:reverse(Done)};
send(More, State, [], Done) ->
    send(More, State, lists:reverse(Done), []);
send(More, #{name := Name, accepted := Accepted, refused := Refused} = State, [{{Id, Periods} = Target, N} | Targets], Done) ->
    case erlmcp_shard_manager:route_message(Id, message(Name, N, Periods)) of
        ok ->
            send(More - 1, State#{accepted := Accepted + 1}, Targets, [{Target, N + 1} | Done]);
        {error, shard_overloaded} ->
            send(More - 1, State#{refused := Refused + 1}, Targets, [{Target, N} | Done])
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
