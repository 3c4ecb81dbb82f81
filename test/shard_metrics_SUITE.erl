%%% Metrics of the shards: rates, refusals and percentiles under a known load.
%%%
%%% The contract of erlmcp_shard_metrics: every refusal is counted once, under its reason. A rate is the count
%%% divided by the time that really passed, so that the sum of rate times interval equals the load. Percentiles
%%% are those of the reported rates. The counts never decrease, whatever happens to the process. No route needs
%%% the process.
-module(shard_metrics_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(M,           erlmcp_shard_metrics).
-define(SHARD,       17).
-define(SHARDS,      64).
-define(SLOW,        1 / 3600).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [not_running,
     complete,
     idle,
     rates_of_a_known_load,
     rates_of_shards,
     not_found_is_counted_once,
     unknown_servers_and_transports_are_counted_once,
     circuit_open_is_counted,
     shard_overloaded_is_counted,
     rate_limited_is_counted,
     refusals_of_batches,
     refusals_of_many_processes,
     explanations_and_questions_are_not_counted,
     percentiles_of_the_last_minute,
     latencies,
     counts_outlive_the_process,
     routes_need_no_process,
     without_thresholds].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    _ = application:load(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    _ = application:stop(erlmcp_native),
    ok.


%% The application is not stopped between cases, because the first measurement takes a second.
init_per_testcase(_Case, Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    ok = erlmcp_native:set(token_bucket, infinity),
    ok = erlmcp_native:set(admission, #{threshold => 1_000_000, sample_interval_ms => 50}),
    ok = test_support:await_samplers(),
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    test_support:await(fun() -> is_map(?M:get()) end, ?DEADLINE_MS),
    [{registry, Registry} | Config].


end_per_testcase(_Case, Config) ->
    ok = gen_server:stop(proplists:get_value(registry, Config)),
    _ = [ begin
              ok = erlmcp_shard_registry:unregister_connection(Id),
              Pid =:= self() orelse exit(Pid, kill)
          end || Shard <- shards(), {Id, {Pid, _}} <- erlmcp_shard_registry:list_connections(Shard) ],
    _ = [ application:unset_env(erlmcp_native, Key) || Key <- [admission, token_bucket, circuit_breaker, backpressure] ],
    ok = erlmcp_native_config:configure(),
    erlmcp_circuit_breaker:force_close().


%%% Contents


not_running(_Config) ->
    ok = application:stop(erlmcp_native),
    ?assertEqual({error, not_running}, ?M:get()),
    ok = application:start(erlmcp_native),
    test_support:await(fun() -> is_map(?M:get()) end, ?DEADLINE_MS),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, ?M),
    ?assertEqual({error, not_running}, ?M:get()),
    %% There is no measurement in the first second.
    Began = now_ms(),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, ?M),
    First = ?M:get(),
    ?assert(First =:= {error, not_running} orelse now_ms() - Began >= 1_000, First),
    test_support:await(fun() -> is_map(?M:get()) end, ?DEADLINE_MS),
    ?assert(now_ms() - Began >= 1_000).


complete(_Config) ->
    Metrics = ?M:get(),
    ?assertEqual([admitted,
                  interval_ms,
                  last_minute,
                  latency_us,
                  measured_at_ms,
                  messages_per_second,
                  messages_per_second_of_shards,
                  refusals_per_second,
                  refused],
                 lists:sort(maps:keys(Metrics))),
    #{
      measured_at_ms := AtMs,
      interval_ms := IntervalMs,
      last_minute := #{messages_per_second := Messages, refusals_per_second := Refusals},
      latency_us := Latency,
      refusals_per_second := RefusalRates,
      refused := Refused
     } = Metrics,
    ?assert(abs(erlang:system_time(millisecond) - AtMs) < ?DEADLINE_MS, AtMs),
    ?assert(IntervalMs >= 900, IntervalMs),
    _ = [ ?assertEqual([p50, p95, p99], lists:sort(maps:keys(Percentiles))) || Percentiles <- [Messages, Refusals, Latency] ],
    _ = [ ?assertEqual([circuit_open, not_found, rate_limited, shard_overloaded, store_full], lists:sort(maps:keys(ByReason)))
          || ByReason <- [RefusalRates, Refused] ].


idle(_Config) ->
    [Metrics] = measurements(1),
    ?assertMatch(#{
                   messages_per_second := 0,
                   refusals_per_second := #{not_found := 0, circuit_open := 0, shard_overloaded := 0, rate_limited := 0, store_full := 0},
                   latency_us := #{p50 := 0, p95 := 0, p99 := 0}
                  },
                 Metrics),
    ?assertEqual(#{}, maps:get(messages_per_second_of_shards, Metrics)).


%%% Rates


%% About 2,000 messages a second, as exactly as this machine keeps time. The reported rates add up to what was
%% sent.
rates_of_a_known_load(_Config) ->
    Receiver = receiver(),
    [Id] = ids(?SHARD, 1),
    ok = erlmcp_shard_registry:register_connection(Id, Receiver, #{}),
    [Before] = measurements(1),
    Sender = spawn_link(fun() -> paced(Id, 20, 10, now_ms(), 0) end),
    Metrics = measurements(4),
    Sender ! {stop, self()},
    Sent = receive {sent, Sender, Number} -> Number end,
    Last = measurements(1),
    Told = [ Rate * Ms / 1000 || #{messages_per_second := Rate, interval_ms := Ms} <- Metrics ++ Last ],
    ct:log("~b sent, ~p told: ~p", [Sent, lists:sum(Told), [ R || #{messages_per_second := R} <- Metrics ++ Last ]]),
    ?assert(abs(lists:sum(Told) - Sent) =< 0.01 * Sent + 5, {Told, Sent}),
    %% The counts are exact.
    ?assertEqual(Sent, maps:get(admitted, hd(Last)) - maps:get(admitted, Before)),
    %% The maximum is a whole second under this load alone, so the rate of the node is that of the shard.
    {Rate, OfShards} = lists:max([ {R, S} || #{messages_per_second := R, messages_per_second_of_shards := S} <- Metrics ]),
    ?assertEqual(#{?SHARD => Rate}, OfShards),
    ?assert(Rate > 0, Rate),
    %% The rate falls to zero after the load.
    ?assertMatch([#{messages_per_second := 0}], measurements(1)).


rates_of_shards(_Config) ->
    Receiver = receiver(),
    Load = [ {Shard, hd(ids(Shard, 1)), Number} || {Shard, Number} <- [{0, 100}, {?SHARD, 3_000}, {63, 700}] ],
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, Receiver, #{}) || {_, Id, _} <- Load ],
    [Before] = measurements(1),
    Metrics = measured_while(fun() ->
                                     [ ok = erlmcp_shard_manager:route_message(Id, x)
                                       || {_, Id, Number} <- Load, _ <- lists:seq(1, Number) ]
                             end),
    Told = fun(Shard) ->
                   lists:sum([ maps:get(Shard, Rates, 0) * Ms / 1000
                               || #{messages_per_second_of_shards := Rates, interval_ms := Ms} <- Metrics ])
           end,
    _ = [ ?assert(abs(Told(Shard) - Number) =< 0.01 * Number + 1 + length(Metrics), {Shard, Told(Shard), Number}) || {Shard, _, Number} <- Load ],
    ?assertEqual([0, ?SHARD, 63],
                 lists:usort([ Shard || #{messages_per_second_of_shards := Rates} <- Metrics, Shard <- maps:keys(Rates) ])),
    ?assertEqual(3_800, maps:get(admitted, lists:last(Metrics)) - maps:get(admitted, Before)).


%%% Refusals


not_found_is_counted_once(_Config) ->
    Counts = refusals_of(fun() ->
                                 _ = [ {error, not_found} = erlmcp_shard_manager:route_message({nobody, N}, x)
                                       || N <- lists:seq(1, 123) ],
                                 [Id] = ids(?SHARD, 1),
                                 ok = erlmcp_shard_registry:register_connection(Id, self(), #{}),
                                 %% The connection is in another shard.
                                 {error, not_found} = erlmcp_shard_manager:route_message(?SHARD + 1, Id, x),
                                 {error, not_found} = erlmcp_shard_manager:route_message(?SHARD, {nobody, 1}, x)
                         end),
    ?assertEqual(#{not_found => 125}, Counts).


%% Such messages are dropped with a warning, and the result is `ok'. The pure-Erlang registry counts none of
%% them.
unknown_servers_and_transports_are_counted_once(_Config) ->
    Route = fun() ->
                    _ = [ ok = erlmcp_registry:route_to_server({nobody, N}, t, x) || N <- lists:seq(1, 10) ],
                    _ = [ ok = erlmcp_registry:route_to_transport({nobody, N}, s, x) || N <- lists:seq(1, 7) ]
            end,
    ?assertEqual(#{not_found => 17}, refusals_of(Route)),
    ok = erlmcp_rollout:set({percent, 100}),
    InBoth = refusals_of(Route),
    ok = erlmcp_rollout:set(current),
    InClassic = refusals_of(Route),
    ok = erlmcp_rollout:set('100x'),
    application:unset_env(erlmcp_native, architecture_version),
    ?assertEqual({#{not_found => 17}, #{}}, {InBoth, InClassic}).


circuit_open_is_counted(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    _ = [ ok = erlmcp_registry:register_transport({t, N}, self(), #{server_id => s}) || N <- [1, 2, 3] ],
    ok = erlmcp_circuit_breaker:force_open(),
    Counts = refusals_of(fun() ->
                                 _ = [ {error, circuit_open} = erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, 50) ],
                                 {error, circuit_open} = erlmcp_registry:route_to_server(s, {t, 1}, x),
                                 {error, circuit_open} = erlmcp_registry:route_to_transport({t, 1}, s, x),
                                 %% Each transport counts separately.
                                 {error, circuit_open} = erlmcp_registry:route_to_transport(broadcast, s, x)
                         end),
    ?assertEqual(#{circuit_open => 55}, Counts).


shard_overloaded_is_counted(_Config) ->
    [Id] = ids(?SHARD, 1),
    Stalled = spawn(fun() -> receive stop -> ok end end),
    ok = erlmcp_shard_registry:register_connection(Id, Stalled, #{}),
    ok = erlmcp_admission_control:set_threshold(?SHARD, 10),
    {Results, Counts} = results_and_refusals_of(fun() -> [ erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 500) ] end),
    Refused = length([ R || R <- Results, R =:= {error, shard_overloaded} ]),
    ?assert(Refused > 400, Refused),
    ?assertEqual(500, Refused + length([ R || R <- Results, R =:= ok ])),
    ?assertEqual(#{shard_overloaded => Refused}, Counts).


rate_limited_is_counted(_Config) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 10, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    ok = erlmcp_registry:register_server(s, receiver(), #{}),
    ok = erlmcp_registry:register_transport(t, receiver(), #{}),
    Counts = refusals_of(fun() ->
                                 _ = [ erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, 40) ],
                                 _ = [ erlmcp_registry:route_to_server(s, t, x) || _ <- lists:seq(1, 15) ]
                         end),
    ?assertEqual(#{rate_limited => 35}, Counts).


refusals_of_batches(_Config) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 10, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    TooLong = binary:copy(<<"x">>, 65_536),
    Batch = lists:append([ [{c, x}, {{nobody, N}, x}] || N <- lists:seq(1, 1000) ]) ++ [{TooLong, x}],
    Counts = refusals_of(fun() ->
                                 Results = erlmcp_shard_manager:route_batch(Batch),
                                 ?assertEqual(1001, length([ R || R <- Results, R =:= {error, not_found} ])),
                                 ?assertEqual(990, length([ R || R <- Results, R =:= {error, rate_limited} ]))
                         end),
    ?assertEqual(#{not_found => 1001, rate_limited => 990}, Counts).


%% No refusal of concurrent senders is lost.
refusals_of_many_processes(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_circuit_breaker:force_open(),
    Counts = refusals_of(fun() ->
                                 Ends = [ spawn_monitor(fun() ->
                                                                _ = [ begin
                                                                          {error, not_found} =
                                                                              erlmcp_shard_manager:route_message(nobody, x),
                                                                          {error, circuit_open} =
                                                                              erlmcp_shard_manager:route_message(c, x)
                                                                      end || _ <- lists:seq(1, 5_000) ]
                                                        end) || _ <- lists:seq(1, 8) ],
                                 _ = [ receive {'DOWN', Monitor, process, Pid, normal} -> ok end || {Pid, Monitor} <- Ends ]
                         end),
    ?assertEqual(#{not_found => 40_000, circuit_open => 40_000}, Counts).


explanations_and_questions_are_not_counted(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_circuit_breaker:force_open(),
    Counts = refusals_of(fun() ->
                                 _ = erlmcp_native:explain(c),
                                 _ = erlmcp_native:explain(nobody),
                                 _ = erlmcp_shard_registry:lookup_connection(nobody),
                                 _ = erlmcp_registry:find_server(nobody),
                                 _ = erlmcp_admission_control:check_admission(?SHARD),
                                 _ = erlmcp_circuit_breaker:allow_test_request(),
                                 _ = erlmcp_token_bucket:consume(nobody, 1)
                         end),
    ?assertEqual(#{}, Counts).


%%% Percentiles


%% The percentiles of a process that has just started, against those of the rates that it has reported.
percentiles_of_the_last_minute(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    ok = supervisor:terminate_child(erlmcp_control_plane_sup, ?M),
    {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, ?M),
    Metrics = [ begin
                    _ = [ ok = erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, N) ],
                    _ = [ {error, not_found} = erlmcp_shard_manager:route_message(nobody, x) || _ <- lists:seq(1, 2 * N) ],
                    next_measurement()
                end || N <- [3_000, 1_000, 200, 50, 0, 10] ],
    Rates = [ Rate || #{messages_per_second := Rate} <- Metrics ],
    Refusals = [ lists:sum(maps:values(ByReason)) || #{refusals_per_second := ByReason} <- Metrics ],
    #{last_minute := #{messages_per_second := OfMessages, refusals_per_second := OfRefusals}} = lists:last(Metrics),
    ct:log("~p ~p~n~p ~p", [Rates, OfMessages, Refusals, OfRefusals]),
    ?assertEqual(percentiles(Rates), OfMessages),
    ?assertEqual(percentiles(Refusals), OfRefusals),
    ?assert(maps:get(p99, OfMessages) > maps:get(p50, OfMessages)).


%% The smallest value that at least `P' percent of the values do not exceed.
percentiles(Values) ->
    maps:from_list([ {Key, hd([ V || V <- lists:sort(Values), 100 * length([ W || W <- Values, W =< V ]) >= P * length(Values) ])}
                     || {Key, P} <- [{p50, 50}, {p95, 95}, {p99, 99}] ]).


%% The latencies are those of the last samples of the shards with traffic, whichever other shards were sampled.
latencies(_Config) ->
    Samples = [{0, lists:seq(100, 199)}, {?SHARD, lists:seq(1, 99)}, {63, [1_000_000]}],
    Shards = [ Shard || {Shard, _} <- Samples ],
    [First, Second, _] = Ids = [ hd(ids(Shard, 1)) || Shard <- Shards ],
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, receiver(), #{}) || Id <- Ids ],
    %% The managers would sample as well.
    _ = [ ok = supervisor:terminate_child(erlmcp_shard_sup, Shard) || Shard <- Shards ],
    try
        _ = [ ok = erlmcp_shard_sampler:insert(Shard, 1, LatenciesUs) || {Shard, LatenciesUs} <- Samples ],
        ?assertEqual(#{p50 => 50, p95 => 95, p99 => 99}, latency_of_traffic_to([Second])),
        ?assertEqual(#{p50 => 100, p95 => 190, p99 => 198}, latency_of_traffic_to([First, Second])),
        %% Shards without traffic have no latency.
        ?assertEqual(#{p50 => 0, p95 => 0, p99 => 0}, latency_of_traffic_to([]))
    after
        [ {ok, _} = supervisor:restart_child(erlmcp_shard_sup, Shard) || Shard <- Shards ]
    end.


%% All of the traffic falls into one measurement.
latency_of_traffic_to(Ids) ->
    ok = sys:suspend(?M),
    Before = ?M:get(),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || Id <- Ids ],
    ok = sys:resume(?M),
    #{latency_us := Latency} = next_measurement(Before),
    Latency.


%%% The process


counts_outlive_the_process(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    Counts = fun() ->
                     [#{admitted := Admitted, refused := Refused}] = measurements(1),
                     [Admitted | maps:values(Refused)]
             end,
    Load = fun() ->
                   _ = [ ok = erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, 100) ],
                   _ = [ {error, not_found} = erlmcp_shard_manager:route_message(nobody, x) || _ <- lists:seq(1, 30) ]
           end,
    First = Counts(),
    Load(),
    Restart = fun() ->
                      ok = supervisor:terminate_child(erlmcp_control_plane_sup, ?M),
                      Load(),
                      {ok, _} = supervisor:restart_child(erlmcp_control_plane_sup, ?M),
                      Load()
              end,
    Restart(),
    Second = Counts(),
    exit(whereis(erlmcp_control_plane_sup), kill),
    Load(),
    test_support:await(fun() -> is_map(?M:get()) end, ?DEADLINE_MS),
    Third = Counts(),
    ?assertEqual(300 + 90, lists:sum(Second) - lists:sum(First)),
    ?assertEqual(100 + 30, lists:sum(Third) - lists:sum(Second)),
    _ = [ ?assert(lists:all(fun({Was, Is}) -> Is >= Was end, lists:zip(Before, After)))
          || {Before, After} <- [{First, Second}, {Second, Third}] ],
    %% Counts from the time without the process make no peak in the first rate.
    Restart(),
    #{messages_per_second := Rate} = next_measurement(),
    ?assert(Rate =< 101, Rate).


routes_need_no_process(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = sys:suspend(?M),
    _ = [ ok = erlmcp_shard_manager:route_message(c, {n, N}) || N <- lists:seq(1, 1000) ],
    ?assertEqual({message_queue_len, 0}, process_info_of_waiting(?M)),
    ok = sys:resume(?M),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    _ = [ ok = erlmcp_shard_manager:route_message(c, {n, N}) || N <- lists:seq(1001, 2000) ],
    ?assertEqual(lists:seq(1, 2000), [ receive {n, N} -> N end || _ <- lists:seq(1, 2000) ]),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup).


%% Apart from the messages of its own timer.
process_info_of_waiting(Name) ->
    {messages, Messages} = process_info(whereis(Name), messages),
    {message_queue_len, length([ M || M <- Messages, M =/= measure ])}.


%% Routes are counted without thresholds too.
without_thresholds(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    ok = erlmcp_admission_control:set_threshold(infinity),
    [#{admitted := Before}] = measurements(1),
    Counts = refusals_of(fun() ->
                                 _ = [ ok = erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, 100) ],
                                 {error, not_found} = erlmcp_shard_manager:route_message(nobody, x)
                         end),
    ?assertEqual(#{not_found => 1}, Counts),
    ?assertMatch(#{admitted := After} when After =:= Before + 100, ?M:get()).


%%% Tools


%% What a function has added to the counts, without zeros.
refusals_of(Fun) ->
    {_, Counts} = results_and_refusals_of(Fun),
    Counts.


results_and_refusals_of(Fun) ->
    Before = refused(),
    Result = Fun(),
    Metrics = [_, #{refused := After}] = measurements(2),
    Counts = maps:map(fun(Reason, Count) -> Count - maps:get(Reason, Before) end, After),
    %% The rates agree with the counts.
    _ = [ begin
              Told = lists:sum([ maps:get(Reason, Rates) * Ms / 1000
                                 || #{refusals_per_second := Rates, interval_ms := Ms} <- Metrics ]),
              ?assert(abs(Told - Count) =< 0.01 * Count + 3, {Reason, Told, Count})
          end || {Reason, Count} <- maps:to_list(Counts), length(Metrics) =:= 2 ],
    {Result, maps:filter(fun(_Reason, Count) -> Count =/= 0 end, Counts)}.


%% Read from the shards themselves.
refused() ->
    Counts = [ tuple_to_list(erlmcp_nif:refused(Shard)) || Shard <- shards() ],
    Sums = [ lists:sum([ lists:nth(N, OfShard) || OfShard <- Counts ]) || N <- [1, 2, 3, 4, 5] ],
    maps:from_list(lists:zip([not_found, circuit_open, shard_overloaded, rate_limited, store_full], Sums)).


shards() ->
    lists:seq(0, ?SHARDS - 1).


%% The next measurements, without a gap.
measurements(Number) ->
    [ next_measurement() || _ <- lists:seq(1, Number) ].


next_measurement() ->
    next_measurement(?M:get()).


next_measurement(Before) ->
    test_support:await(fun() -> Before =/= ?M:get() andalso is_map(?M:get()) end, ?DEADLINE_MS),
    ?M:get().


%% The measurements during the run of the fun, however long it takes.
measured_while(Fun) ->
    Before = ?M:get(),
    Recorder = spawn_opt(fun() -> record(Before, []) end, [link, {priority, high}]),
    _ = Fun(),
    Recorder ! {stop, self()},
    receive {recorded, Recorder, Metrics} -> Metrics end.


record(Last, Metrics) ->
    {Now, Sofar} = case ?M:get() of
                       Last -> {Last, Metrics};
                       New -> {New, [New | Metrics]}
                   end,
    receive
        {stop, From} ->
            %% The next measurement may have been taken before the fun returned. The one after it was not.
            Next = next_measurement(Now),
            From ! {recorded, self(), lists:reverse([next_measurement(Next), Next | Sofar])}
    after
        1 ->
            record(Now, Sofar)
    end.


ids(Shard, Number) ->
    lists:sublist([ Id || N <- lists:seq(1, 2000), Id <- [{id, N}], erlmcp_shard_registry:get_shard_id(Id) =:= Shard ], Number).


receiver() ->
    spawn(fun Loop() -> receive _ -> Loop() end end).


%% Sends `Number' messages every `EveryMs' milliseconds. Late messages are sent at once.
paced(Id, Number, EveryMs, DueMs, Sent) ->
    receive
        {stop, From} -> From ! {sent, self(), Sent}
    after
        max(0, DueMs - now_ms()) ->
            Results = [ erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, Number) ],
            paced(Id, Number, EveryMs, DueMs + EveryMs, Sent + length([ ok || ok <- Results ]))
    end.


now_ms() ->
    erlang:monotonic_time(millisecond).
