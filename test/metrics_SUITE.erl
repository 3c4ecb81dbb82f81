%%% All counts at the moment of a call, as a map and as text for Prometheus, and the busiest shards and connections.
%%%
%%% The contract: each message to one target is counted once, under its status, in every setting of backpressure and in every
%%% mode of the rollout. A snapshot asks no process, and names what it leaves out. The text has the numbers of the snapshot, in
%%% the grammar of the format, and promtool has no objection. Neither has an id of a connection. The work of busiest/1 is
%%% bounded.
-module(metrics_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-define(M,           erlmcp_shard_metrics).
-define(SHARDS,      64).
-define(SLOW,        1 / 3600).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [a_known_load,
     routes_are_counted_in_every_setting,
     routes_are_counted_in_every_mode,
     counts_of_the_process_outlive_it,
     no_message_of_many_processes_is_lost,
     contents_of_shards,
     transitions_of_the_circuit,
     restarts_of_managers,
     named_breakers_by_state,
     queueing_times,
     asks_no_process,
     without_the_control_plane,
     without_the_application,
     text_has_the_numbers_of_the_snapshot,
     text_of_promtool,
     text_is_bounded,
     busiest_shards,
     longest_mailboxes,
     looks_are_bounded,
     a_process_that_does_not_answer,
     wrong_intervals,
     top_prints_the_columns_of_the_readme].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    _ = application:load(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    _ = application:stop(erlmcp_native),
    ok.


init_per_testcase(_Case, Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    ok = erlmcp_native:set(token_bucket, infinity),
    ok = erlmcp_native:set(admission, #{threshold => 1_000_000, sample_interval_ms => 50}),
    ok = test_support:await_samplers(),
    {ok, _} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    Config.


end_per_testcase(_Case, _Config) ->
    ok = erlmcp_rollout:set('100x'),
    ok = gen_server:stop(erlmcp_registry),
    _ = [ begin
              ok = erlmcp_shard_registry:unregister_connection(Id),
              Pid =:= self() orelse exit(Pid, kill)
          end || Shard <- shards(), {Id, {Pid, _}} <- erlmcp_shard_registry:list_connections(Shard) ],
    _ = [ application:unset_env(erlmcp_native, Key)
          || Key <- [admission, token_bucket, circuit_breaker, backpressure, architecture_version] ],
    ok = erlmcp_native_config:configure(),
    erlmcp_circuit_breaker:force_close().


%%% Messages


%% So many of each status, all to one shard but those that are not found.
a_known_load(_Config) ->
    [Id, Limited, Full] = ids(17, 3),
    ok = erlmcp_shard_registry:register_connection(Id, receiver(), #{}),
    ok = erlmcp_shard_registry:register_connection(Limited, receiver(), #{}),
    ok = erlmcp_token_bucket:set_limits(Limited, #{capacity => 10, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(Full, self(), #{}),
    {ok, _Store} = erlmcp_shard_manager:set_delivery(Full, {store, 3}),
    Before = ?M:snapshot(),
    Route = fun(To, Number) -> [ erlmcp_shard_manager:route_message(To, x) || _ <- lists:seq(1, Number) ] end,
    _ = [ ok = Result || Result <- Route(Id, 100) ],
    _ = [ {error, not_found} = Result || Result <- Route(nobody, 7) ],
    _ = Route(Limited, 25),
    _ = Route(Full, 8),
    ok = erlmcp_circuit_breaker:force_open(),
    _ = [ {error, circuit_open} = Result || Result <- Route(Id, 11) ],
    ok = erlmcp_circuit_breaker:force_close(),
    ok = erlmcp_admission_control:set_threshold(17, 1),
    Stalled = spawn(fun() -> receive stop -> ok end end),
    {ok, _Former} = erlmcp_shard_registry:replace_connection(Id, Stalled, #{}),
    Overloaded = length([ Refused || {error, shard_overloaded} = Refused <- Route(Id, 500) ]),
    ?assert(Overloaded > 0),
    After = ?M:snapshot(),
    Expected = #{
                 ok => 100 + 10 + 3 + 500 - Overloaded,
                 rate_limited => 15,
                 store_full => 5,
                 circuit_open => 11,
                 shard_overloaded => Overloaded
                },
    ?assertEqual(Expected#{not_found => 7}, of_native(Before, After)),
    ?assertEqual(#{ok => 0, not_found => 0}, of_process(Before, After)),
    Changed = [ {Shard, maps:remove(not_found, Difference)}
                || Shard <- shards(),
                   Difference <- [difference(of_shard(Shard, Before), of_shard(Shard, After))],
                   lists:sum(maps:values(maps:remove(not_found, Difference))) > 0 ],
    ?assertEqual([{17, Expected}], Changed).


routes_are_counted_in_every_setting(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    ok = erlmcp_registry:register_server(s, receiver(), #{}),
    _ = [ ok = erlmcp_registry:register_transport({t, N}, receiver(), #{server_id => s}) || N <- [1, 2, 3] ],
    _ = [ ok = erlmcp_group:join(group, receiver()) || _ <- [1, 2] ],
    Settings = [fun() -> ok end,
                fun() -> ok = erlmcp_native:set(admission, infinity) end,
                fun() -> ok = erlmcp_native:set(circuit_breaker, off) end,
                fun() -> ok = erlmcp_native:set(backpressure, off) end],
    [ begin
          ok = Set(),
          Before = ?M:snapshot(),
          _ = [ ok = erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, 100) ],
          _ = [ ok = Result || Result <- erlmcp_shard_manager:route_batch([ {c, x} || _ <- lists:seq(1, 600) ]) ],
          ok = erlmcp_registry:route_to_server(s, {t, 1}, x),
          ok = erlmcp_registry:route_to_transport({t, 2}, s, x),
          ok = erlmcp_registry:route_to_transport(broadcast, s, x),
          ok = erlmcp_group:route_group(group, x),
          {error, not_found} = erlmcp_shard_manager:route_message(nobody, x),
          Difference = of_native(Before, ?M:snapshot()),
          ?assertEqual(#{ok => 700 + 1 + 1 + 3 + 2, not_found => 1}, maps:filter(fun(_, Count) -> Count > 0 end, Difference))
      end || Set <- Settings ].


%% The process has counted a message of its own when it answers.
routes_are_counted_in_every_mode(_Config) ->
    Ids = lists:seq(1, 200),
    _ = [ ok = erlmcp_registry:register_server(Id, receiver(), #{}) || Id <- Ids ],
    _ = [ ok = erlmcp_registry:register_transport({t, N}, receiver(), #{server_id => 1}) || N <- [1, 2, 3] ],
    Load = fun() ->
                   _ = [ ok = erlmcp_registry:route_to_server(Id, t, x) || Id <- Ids ],
                   _ = [ ok = erlmcp_registry:route_to_transport({t, N}, 1, x) || N <- [1, 2, 3] ],
                   ok = erlmcp_registry:route_to_transport(broadcast, 1, x),
                   _ = [ ok = erlmcp_registry:route_to_server({nobody, N}, t, x) || N <- lists:seq(1, 50) ],
                   _ = erlmcp_rollout:status(),
                   ok
           end,
    Of = fun(Mode) ->
                 ok = erlmcp_rollout:set(Mode),
                 Before = #{rollout_version := Version} = ?M:snapshot(),
                 ok = Load(),
                 After = ?M:snapshot(),
                 ?assertMatch(#{mode := Mode, rollout_version := Version}, After),
                 {maps:with([ok, not_found], of_native(Before, After)), of_process(Before, After)}
         end,
    All = #{ok => 206, not_found => 50},
    None = #{ok => 0, not_found => 0},
    ?assertEqual({All, None}, Of('100x')),
    ?assertEqual({None, All}, Of(current)),
    ?assertEqual({None, All}, Of({percent, 0})),
    ?assertEqual({All, None}, Of({percent, 100})),
    {#{ok := Native}, #{ok := Process}} = {NativeHalf, ProcessHalf} = Of({percent, 50}),
    ?assert(Native > 0 andalso Process > 0, {Native, Process}),
    ?assertEqual(All, maps:merge_with(fun(_, One, Other) -> One + Other end, NativeHalf, ProcessHalf)).


counts_of_the_process_outlive_it(_Config) ->
    ok = erlmcp_rollout:set(current),
    ok = erlmcp_registry:register_server(s, receiver(), #{}),
    Before = ?M:snapshot(),
    ok = erlmcp_registry:route_to_server(s, t, x),
    _ = erlmcp_rollout:status(),
    killed = test_support:kill(whereis(erlmcp_registry)),
    ?assertEqual(#{ok => 1, not_found => 0}, of_process(Before, ?M:snapshot())),
    {ok, _} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = erlmcp_registry:route_to_server(s, t, x),
    _ = erlmcp_rollout:status(),
    ?assertEqual(#{ok => 2, not_found => 0}, of_process(Before, ?M:snapshot())),
    %% An anonymous registry is not the one that the snapshot is of.
    {ok, Anonymous} = gen_server:start(erlmcp_registry, [], []),
    ok = gen_server:call(Anonymous, {register_server, s, receiver(), #{}}),
    ok = gen_server:cast(Anonymous, {route_to_server, s, t, x}),
    _ = sys:get_state(Anonymous),
    ok = gen_server:stop(Anonymous),
    ?assertEqual(#{ok => 2, not_found => 0}, of_process(Before, ?M:snapshot())).


no_message_of_many_processes_is_lost(_Config) ->
    Ids = [ {c, N} || N <- lists:seq(1, 100) ],
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, receiver(), #{}) || Id <- Ids ],
    ok = erlmcp_native:set(backpressure, off),
    Before = ?M:snapshot(),
    test_support:at_once(16, fun(_) -> [ ok = erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 20), Id <- Ids ] end),
    ?assertMatch(#{ok := 32_000}, of_native(Before, ?M:snapshot())).


%%% Gauges


contents_of_shards(_Config) ->
    [Id, Other] = ids(5, 2),
    ok = erlmcp_admission_control:set_threshold(5, 77),
    Before = ?M:snapshot(),
    ok = erlmcp_shard_registry:register_connection(Id, receiver(), #{}),
    ok = erlmcp_registry:register_server(Id, receiver(), #{}),
    ok = erlmcp_registry:register_transport(Id, receiver(), #{}),
    ok = erlmcp_registry:register_transport(Other, receiver(), #{}),
    ok = erlmcp_group:join(group, receiver()),
    Consumer = spawn(fun() ->
                             Store = erlmcp_message_store:new(10),
                             ok = erlmcp_message_store:push(Store, x),
                             receive stop -> Store end
                     end),
    #{message_stores := #{stores := Stores}, memory_bytes := #{message_stores := Bytes}} = Before,
    test_support:await(fun() -> map_get(messages, erlmcp_message_store:totals()) > map_get(messages, map_get(message_stores, Before)) end,
                       ?DEADLINE_MS),
    After = ?M:snapshot(),
    Counts = fun(Counted) -> [ map_get(Key, Counted) || Key <- [servers, transports, connections] ] end,
    Minus = fun(Is, Was) -> lists:zipwith(fun erlang:'-'/2, Counts(Is), Counts(Was)) end,
    ?assertEqual([1, 2, 1], Minus(After, Before)),
    ?assertEqual([1, 2, 1], Minus(shard(5, After), shard(5, Before))),
    ?assertEqual(1, map_get(memberships, After) - map_get(memberships, Before)),
    ?assertEqual(map_get(memberships, After), lists:sum([ map_get(memberships, shard(Shard, After)) || Shard <- shards() ])),
    ?assertMatch(#{threshold := 77, is_overloaded := false}, shard(5, After)),
    #{message_stores := #{stores := StoresNow}, memory_bytes := #{message_stores := BytesNow}} = After,
    ?assert(StoresNow > Stores andalso BytesNow > Bytes),
    ?assertEqual([], map_get(left_out, After)),
    exit(Consumer, kill).


transitions_of_the_circuit(_Config) ->
    #{circuit := #{transitions := Before}} = ?M:snapshot(),
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 1, success_threshold => 1}),
    ok = erlmcp_circuit_breaker:force_open(),
    ok = erlmcp_circuit_breaker:force_open(),
    test_support:await(fun erlmcp_circuit_breaker:allow_test_request/0, ?DEADLINE_MS),
    ?assertMatch(#{circuit := #{state := half_open}}, ?M:snapshot()),
    ok = erlmcp_circuit_breaker:record_success(),
    #{circuit := #{state := closed, transitions := After}} = ?M:snapshot(),
    ?assertEqual(#{open => 1, half_open => 1, closed => 1}, difference(Before, After)),
    ok = erlmcp_native:set(circuit_breaker, off),
    ?assertMatch(#{circuit := #{state := off, transitions := After}}, ?M:snapshot()).


restarts_of_managers(_Config) ->
    #{shard_managers := #{restarts := Before}} = ?M:snapshot(),
    killed = test_support:kill(whereis(erlmcp_shard_sampler:name(3))),
    test_support:await(fun() -> #{shard_managers := #{restarts := Now, down := Down}} = ?M:snapshot(), Now > Before andalso Down =:= 0 end,
                       ?DEADLINE_MS),
    ?assertMatch(#{shard_managers := #{restarts := After}} when After =:= Before + 1, ?M:snapshot()).


named_breakers_by_state(_Config) ->
    #{named_breakers := Before} = ?M:snapshot(),
    Names = [ {breaker, N} || N <- lists:seq(1, 1_001) ],
    _ = [ ok = erlmcp_circuit_breaker:register_breaker(Name, #{}) || Name <- lists:sublist(Names, 3) ],
    ok = erlmcp_circuit_breaker:force_open({breaker, 2}),
    #{named_breakers := After} = ?M:snapshot(),
    ?assertEqual(#{closed => 2, open => 1, half_open => 0}, difference(Before, After)),
    _ = [ ok = erlmcp_circuit_breaker:register_breaker(Name, #{}) || Name <- lists:nthtail(3, Names) ],
    Many = ?M:snapshot(),
    _ = [ ok = erlmcp_circuit_breaker:unregister_breaker(Name) || Name <- Names ],
    ?assertMatch(#{left_out := [named_breakers]}, Many),
    ?assertNot(is_map_key(named_breakers, Many)),
    ?assertMatch(#{left_out := []}, ?M:snapshot()).


%% They are those of the last samples of a shard with traffic.
queueing_times(_Config) ->
    Managers = [1, 2],
    _ = [ ok = supervisor:terminate_child(erlmcp_shard_sup, Shard) || Shard <- Managers ],
    try
        ok = erlmcp_shard_sampler:insert(1, 10, lists:seq(1, 100)),
        ok = erlmcp_shard_sampler:insert(2, 0, lists:seq(1, 100)),
        Snapshot = ?M:snapshot(),
        ?assertMatch(#{estimated_queueing_us := #{p50 := 50, p95 := 95, p99 := 99}}, shard(1, Snapshot)),
        ?assertNot(is_map_key(estimated_queueing_us, shard(2, Snapshot)))
    after
        [ {ok, _} = supervisor:restart_child(erlmcp_shard_sup, Shard) || Shard <- Managers ]
    end.


%%% Processes


%% No process of the application runs meanwhile.
asks_no_process(_Config) ->
    Pids = [ Pid || Name <- registered(), lists:prefix("erlmcp_", atom_to_list(Name)), Pid <- [whereis(Name)], is_pid(Pid) ],
    ?assert(length(Pids) > ?SHARDS),
    _ = [ true = erlang:suspend_process(Pid) || Pid <- Pids ],
    try
        ?assertMatch(#{left_out := []}, ?M:snapshot()),
        ?assertMatch([_ | _], erlmcp_metrics_text:prometheus()),
        ?assertMatch(#{shards := _}, erlmcp_native:busiest(1))
    after
        [ true = erlang:resume_process(Pid) || Pid <- Pids ]
    end.


without_the_control_plane(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_control_plane_sup),
    try
        Before = ?M:snapshot(),
        ?assertMatch(#{left_out := [shard_managers]}, Before),
        ?assertNot(is_map_key(shard_managers, Before)),
        ok = erlmcp_shard_manager:route_message(c, x),
        ?assertMatch(#{ok := 1}, of_native(Before, ?M:snapshot())),
        Text = samples(prometheus),
        ?assertEqual(1, maps:get({"erlmcp_metrics_left_out", [{"group", "shard_managers"}]}, Text)),
        ?assertEqual(0, maps:get({"erlmcp_metrics_left_out", [{"group", "native"}]}, Text)),
        ?assertEqual([], [ Name || {Name, _} <- maps:keys(Text), lists:prefix("erlmcp_shard_manager", Name) ])
    after
        {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup)
    end.


without_the_application(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, receiver(), #{}),
    ok = application:stop(erlmcp_native),
    Before = ?M:snapshot(),
    ?assertMatch(#{left_out := [queueing, shard_managers]}, Before),
    ok = erlmcp_shard_manager:route_message(c, x),
    ?assertMatch(#{ok := 1}, of_native(Before, ?M:snapshot())),
    ?assertMatch(#{shards := _, connections_looked_at := 1}, erlmcp_native:busiest(1)),
    ok = application:start(erlmcp_native),
    ok = test_support:await_samplers().


%%% Text


%% Every line is parsed, and every number of the snapshot is there once.
text_has_the_numbers_of_the_snapshot(_Config) ->
    a_known_load([]),
    ok = erlmcp_rollout:set(current),
    ok = erlmcp_registry:route_to_server(nobody, t, x),
    _ = erlmcp_rollout:status(),
    ok = erlmcp_circuit_breaker:register_breaker(named, #{}),
    ok = erlmcp_admission_control:set_threshold(40, infinity),
    killed = test_support:kill(whereis(erlmcp_shard_sampler:name(3))),
    test_support:await(fun() -> #{shard_managers := #{restarts := Restarts, down := Down}} = ?M:snapshot(), Restarts > 0 andalso Down =:= 0 end,
                       ?DEADLINE_MS),
    %% Nothing is sampled meanwhile.
    Managers = [ whereis(erlmcp_shard_sampler:name(Shard)) || Shard <- shards() ],
    _ = [ true = erlang:suspend_process(Pid) || Pid <- Managers ],
    try
        Expected = expected(?M:snapshot()),
        ?assertEqual(Expected, samples(prometheus)),
        ?assertEqual(Expected, samples(openmetrics))
    after
        [ true = erlang:resume_process(Pid) || Pid <- Managers ],
        ok = erlmcp_circuit_breaker:unregister_breaker(named)
    end.


%% Written independently of the module.
expected(Snapshot) ->
    #{
      messages := #{process := OfProcess},
      shards := Shards,
      circuit := #{state := Circuit, transitions := Transitions},
      named_breakers := Breakers,
      memory_bytes := #{capability_store := CapabilityBytes, message_stores := StoreBytes},
      message_stores := #{stores := Stores, messages := Stored},
      shard_managers := #{restarts := Restarts, mean_downtime_us := MeanUs, worst_downtime_us := WorstUs, down := Down},
      mode := Mode,
      rollout_version := Version
     } = Snapshot,
    Text = fun atom_to_list/1,
    OfShards = [ [ {{"erlmcp_messages_total",
                     [{"architecture", "native"}, {"shard_id", Id}, {"status", Text(Status)}]},
                    Count} || {Status, Count} <- maps:to_list(map_get(messages, Shard)) ] ++
                 [ {{Name, [{"shard_id", Id}]}, Value}
                   || {Name, Value} <- [{"erlmcp_connections", map_get(connections, Shard)},
                                        {"erlmcp_servers", map_get(servers, Shard)},
                                        {"erlmcp_transports", map_get(transports, Shard)},
                                        {"erlmcp_memberships", map_get(memberships, Shard)},
                                        {"erlmcp_shard_queue_depth", map_get(queue_depth, Shard)},
                                        {"erlmcp_shard_threshold", map_get(threshold, Shard)},
                                        {"erlmcp_shard_overloaded", case Shard of #{is_overloaded := true} -> 1; _ -> 0 end}] ] ++
                 [ {{"erlmcp_estimated_queueing_seconds", [{"shard_id", Id}, {"quantile", Quantile}]}, map_get(Key, Us) / 1_000_000}
                   || #{estimated_queueing_us := Us} <- [Shard], {Quantile, Key} <- [{"0.5", p50}, {"0.95", p95}, {"0.99", p99}] ]
                 || {Number, Shard} <- maps:to_list(Shards), Id <- [integer_to_list(Number)] ],
    Others = [ {{"erlmcp_messages_total", [{"architecture", "process"}, {"shard_id", "none"}, {"status", Text(Status)}]}, Count}
               || {Status, Count} <- maps:to_list(OfProcess) ] ++
        [ {{"erlmcp_circuit_transitions_total", [{"state", Text(State)}]}, Count} || {State, Count} <- maps:to_list(Transitions) ] ++
        [ {{"erlmcp_circuit_state", [{"state", Text(State)}]}, case Circuit of State -> 1; _ -> 0 end}
          || State <- [closed, half_open, off, open] ] ++
        [ {{"erlmcp_named_breakers", [{"state", Text(State)}]}, Count} || {State, Count} <- maps:to_list(Breakers) ] ++
        [ {{"erlmcp_metrics_left_out", [{"group", Group}]}, 0}
          || Group <- ["native", "queueing", "named_breakers", "shard_managers"] ] ++
        [{{"erlmcp_memory_bytes", [{"kind", "capability_store"}]}, CapabilityBytes},
         {{"erlmcp_memory_bytes", [{"kind", "message_stores"}]}, StoreBytes},
         {{"erlmcp_message_stores", []}, Stores},
         {{"erlmcp_message_store_messages", []}, Stored},
         {{"erlmcp_shard_manager_restarts_total", []}, Restarts},
         {{"erlmcp_shard_manager_downtime_seconds", [{"statistic", "mean"}]}, MeanUs / 1_000_000},
         {{"erlmcp_shard_manager_downtime_seconds", [{"statistic", "worst"}]}, WorstUs / 1_000_000},
         {{"erlmcp_shard_managers_down", []}, Down},
         {{"erlmcp_rollout_info", [{"mode", Text(Mode)}]}, 1},
         {{"erlmcp_rollout_version", []}, Version}],
    maps:from_list(lists:append([Others | OfShards])).


text_of_promtool(Config) ->
    case os:find_executable("promtool") of
        false ->
            {skip, "promtool is not installed (Debian: apt-get install prometheus)"};
        Promtool ->
            a_known_load([]),
            File = filename:join(proplists:get_value(priv_dir, Config), "metrics.txt"),
            ok = file:write_file(File, erlmcp_metrics_text:prometheus()),
            ?assertEqual("0\n", os:cmd("'" ++ Promtool ++ "' check metrics < '" ++ File ++ "'; echo $?"))
    end.


%% Connections and what they are called change no line. A shard has lines of its queueing time while it has traffic.
text_is_bounded(_Config) ->
    Count = fun() ->
                    length([ Name || {Name, _} <- maps:keys(samples(prometheus)), Name =/= "erlmcp_estimated_queueing_seconds" ])
            end,
    Few = Count(),
    _ = [ ok = erlmcp_shard_registry:register_connection({c, N}, receiver(), #{}) || N <- lists:seq(1, 2_000) ],
    ?assertEqual(Few, Count()),
    ?assert(Few < 20 * ?SHARDS, Few).


%% All samples of the text, by name and labels. A strict parser: anything that it does not know is an error.
samples(Format) ->
    Text = unicode:characters_to_list(iolist_to_binary(erlmcp_metrics_text:Format())),
    ?assertEqual($\n, lists:last(Text)),
    Lines = string:split(lists:droplast(Text), "\n", all),
    Families = case Format of
                   prometheus -> Lines;
                   openmetrics -> ?assertEqual("# EOF", lists:last(Lines)), lists:droplast(Lines)
               end,
    parse(Format, Families, none, #{}, #{}).


parse(_Format, [], {Name, _Type, Number}, Types, Samples) ->
    ?assert(Number > 0, Name),
    ?assertNot(is_map_key(Name, Types)),
    Samples;
parse(Format, ["# HELP " ++ Help, "# TYPE " ++ Type | Lines], Former, Types, Samples) ->
    Known = case Former of
                none -> Types;
                {FormerName, FormerType, Number} -> ?assert(Number > 0, FormerName), Types#{FormerName => FormerType}
            end,
    [Name, HelpText] = string:split(Help, " "),
    ?assertNotEqual("", HelpText),
    [Name, TypeName] = string:split(Type, " "),
    ?assert(lists:member(TypeName, ["counter", "gauge", "summary"])),
    ?assertMatch({match, _}, re:run(Name, "^[a-z][a-z_]*$")),
    %% The samples of a family stand together.
    ?assertNot(is_map_key(Name, Known)),
    parse(Format, Lines, {Name, TypeName, 0}, Known, Samples);
parse(Format, [Line | Lines], {Family, Type, Number}, Types, Samples) ->
    {match, [Name, LabelText, Value]} =
        re:run(Line, "^([a-z_]+)(?:\\{([^{}]+)\\})? (\\S+)$", [{capture, all_but_first, list}]),
    Expected = case {Format, Type} of
                   {openmetrics, "counter"} -> Family ++ "_total";
                   _ -> Family
               end,
    ?assertEqual(Expected, Name),
    ?assertEqual(Type =:= "counter", lists:suffix("_total", Name)),
    Labels = [ begin
                   {match, [Label, LabelValue]} =
                       re:run(Pair, "^([a-z_]+)=\"([^\"\\\\\\n]*)\"$", [{capture, all_but_first, list}]),
                   {Label, LabelValue}
               end || LabelText =/= "", Pair <- string:split(LabelText, ",", all) ],
    ?assertEqual(length(Labels), length(lists:ukeysort(1, Labels))),
    ?assertNot(is_map_key({Name, Labels}, Samples)),
    parse(Format, Lines, {Family, Type, Number + 1}, Types, Samples#{{Name, Labels} => value(Value)}).


value("+Inf") -> infinity;
value(Text) ->
    try
        list_to_integer(Text)
    catch
        error:badarg -> list_to_float(Text)
    end.


%%% The busiest


%% Traffic to one shard, refusals in another one, and a queue in a third.
busiest_shards(_Config) ->
    [Fast] = ids(1, 1),
    [Limited] = ids(2, 1),
    [Slow] = ids(3, 1),
    ok = erlmcp_shard_registry:register_connection(Fast, receiver(), #{}),
    ok = erlmcp_shard_registry:register_connection(Limited, receiver(), #{}),
    ok = erlmcp_token_bucket:set_limits(Limited, #{capacity => 1, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(Slow, spawn(fun() -> receive stop -> ok end end), #{}),
    _ = [ ok = erlmcp_shard_manager:route_message(Slow, x) || _ <- lists:seq(1, 300) ],
    Load = spawn_link(fun Loop() ->
                              ok = erlmcp_shard_manager:route_message(Fast, x),
                              _ = erlmcp_shard_manager:route_message(Limited, x),
                              {error, not_found} = erlmcp_shard_manager:route_message(nobody, x),
                              receive
                                  {stop, From} -> From ! stopped
                              after
                                  1 ->
                                      Loop()
                              end
                      end),
    %% The load may not have run during one measurement on a busy machine.
    test_support:await(
      fun() ->
              #{shards := Shards, not_found_per_second := NotFound, interval_ms := Ms} = erlmcp_native:busiest(200),
              ?assert(Ms >= 200),
              ByShard = maps:from_list([ {Id, Shard} || #{shard_id := Id} = Shard <- Shards ]),
              Rates = [ Rate || #{messages_per_second := Rate} <- Shards ],
              ?assertEqual(lists:reverse(lists:sort(Rates)), Rates),
              case ByShard of
                  #{
                    1 := #{messages_per_second := Messages, refusals_per_second := 0},
                    2 := #{messages_per_second := 0, refusals_per_second := Refusals},
                    3 := #{messages_per_second := 0, refusals_per_second := 0, queue_depth := Depth, threshold := 1_000_000, connections := 1}
                   } ->
                      Messages > 0 andalso Refusals > 0 andalso NotFound > 0 andalso Depth >= 300;
                  _ ->
                      false
              end
      end,
      ?DEADLINE_MS),
    Load ! {stop, self()},
    receive stopped -> ok end,
    %% The rate is the count divided by the time.
    test_support:await(
      fun() ->
              Sender = spawn_link(fun() ->
                                          receive
                                          after
                                              300 ->
                                                  [ ok = erlmcp_shard_manager:route_message(Fast, x) || _ <- lists:seq(1, 500) ]
                                          end
                                  end),
              #{shards := Shards, interval_ms := Ms} = erlmcp_native:busiest(1_500),
              _ = test_support:await_end(Sender),
              [] =/= [ Rate || #{shard_id := 1, messages_per_second := Rate} <- Shards, abs(Rate * Ms / 1_000 - 500) =< 2 ]
      end,
      ?DEADLINE_MS).


longest_mailboxes(_Config) ->
    Stalled = [ {{stalled, N}, spawn(fun() -> receive stop -> ok end end), N} || N <- lists:seq(1, 20) ],
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, Pid, #{}) || {Id, Pid, _} <- Stalled ],
    _ = [ ok = erlmcp_shard_registry:register_connection({idle, N}, receiver(), #{}) || N <- lists:seq(1, 100) ],
    _ = [ Pid ! x || {_, Pid, Number} <- Stalled, _ <- lists:seq(1, Number) ],
    #{connections := Longest, connections_looked_at := LookedAt, connections_registered := Registered} = erlmcp_native:busiest(1),
    ?assertEqual({120, 120}, {LookedAt, Registered}),
    ?assertEqual([ {{stalled, N}, N} || N <- lists:seq(20, 11, -1) ],
                 [ {Id, Length} || #{id := Id, message_queue_len := Length} <- Longest ]),
    _ = [ ?assertEqual({erlmcp_shard_registry:get_shard_id(Id), erlmcp_shard_registry:whereis_connection(Id)}, {Shard, Pid})
          || #{id := Id, shard_id := Shard, pid := Pid} <- Longest ],
    ok.


looks_are_bounded(_Config) ->
    Receiver = receiver(),
    _ = [ ok = erlmcp_shard_registry:register_connection({c, N}, Receiver, #{}) || N <- lists:seq(1, 3_000) ],
    %% The deepest shard comes first.
    [Deep] = ids(60, 1),
    ok = erlmcp_shard_registry:register_connection(Deep, spawn(fun() -> receive stop -> ok end end), #{}),
    _ = [ ok = erlmcp_shard_manager:route_message(Deep, x) || _ <- lists:seq(1, 50) ],
    #{connections := Longest, connections_looked_at := LookedAt, connections_registered := 3_001} = erlmcp_native:busiest(1),
    ?assert(LookedAt =< 1_000 andalso LookedAt > 0, LookedAt),
    ?assertMatch([#{id := Deep, message_queue_len := 50} | _], Longest).


%% It is in a native function for five seconds. What was found before is returned.
a_process_that_does_not_answer(_Config) ->
    [Deep] = ids(60, 1),
    [Busy] = ids(61, 1),
    ok = erlmcp_shard_registry:register_connection(Deep, spawn(fun() -> receive stop -> ok end end), #{}),
    _ = [ ok = erlmcp_shard_manager:route_message(Deep, x) || _ <- lists:seq(1, 5) ],
    Self = self(),
    Pid = spawn(fun() ->
                        receive block -> ok end,
                        _ = erts_debug:set_internal_state(available_internal_state, true),
                        Self ! blocking,
                        _ = erts_debug:set_internal_state(block, 5_000),
                        Self ! answers
                end),
    ok = erlmcp_shard_registry:register_connection(Busy, Pid, #{}),
    Pid ! block,
    receive blocking -> ok end,
    #{connections := Longest, connections_looked_at := LookedAt} = erlmcp_native:busiest(100),
    HasAnswered = receive answers -> true after 0 -> false end,
    ?assertMatch([#{id := Deep, message_queue_len := 5}], Longest),
    %% The machine may have been so busy that it answered in time after all.
    ?assert(HasAnswered orelse LookedAt =:= 1, LookedAt),
    HasAnswered orelse receive answers -> ok end,
    ?assertEqual([], test_support:flush()).


wrong_intervals(_Config) ->
    [ ?assertError({bad_option, interval_ms, Wrong, _}, erlmcp_native:busiest(Wrong)) || Wrong <- [0, -1, 60_001, 1.0, second] ].


%% The header lines are those of the README's example.
top_prints_the_columns_of_the_readme(_Config) ->
    Id = list_to_binary(lists:duplicate(300, $x)),
    ok = erlmcp_shard_registry:register_connection(Id, spawn(fun() -> receive stop -> ok end end), #{}),
    _ = [ ok = erlmcp_shard_manager:route_message(Id, x) || _ <- lists:seq(1, 42) ],
    ct:capture_start(),
    ok = erlmcp_native:top(),
    ct:capture_stop(),
    Lines = string:split(lists:flatten(ct:capture_get()), "\n", all),
    {ok, Readme} = file:read_file(filename:join(test_support:root(), "README.md")),
    InReadme = [ string:trim(Line) || Line <- string:split(binary_to_list(Readme), "\n", all) ],
    Headers = [ Line || Line <- Lines, lists:any(fun(Column) -> string:find(Line, Column) =/= nomatch end, ["MESSAGES/S", "MAILBOX"]) ],
    ?assertEqual(2, length(Headers)),
    [ ?assert(lists:member(string:trim(Header), InReadme), Header) || Header <- Headers ],
    Shard = integer_to_list(erlmcp_shard_registry:get_shard_id(Id)),
    ?assert(lists:any(fun(Line) -> lists:sublist(string:lexemes(Line, " "), 4) =:= [Shard, "0", "0", "42"] end, Lines), Lines),
    [Connection] = [ Line || Line <- Lines, lists:prefix(["42", Shard], string:lexemes(Line, " ")) ],
    ?assert(length(Connection) < 150, Connection),
    ?assert(lists:member("looked at 1 of 1 connections", Lines)).


%%% Tools


of_native(#{messages := #{native := Before}}, #{messages := #{native := After}}) -> difference(Before, After).


of_process(#{messages := #{process := Before}}, #{messages := #{process := After}}) -> difference(Before, After).


of_shard(Shard, Snapshot) -> map_get(messages, shard(Shard, Snapshot)).


shard(Shard, #{shards := Shards}) -> map_get(Shard, Shards).


difference(Before, After) ->
    maps:map(fun(Key, Count) -> Count - map_get(Key, Before) end, After).


shards() ->
    lists:seq(0, ?SHARDS - 1).


ids(Shard, Number) ->
    lists:sublist([ Id || N <- lists:seq(1, 2000), Id <- [{id, N}], erlmcp_shard_registry:get_shard_id(Id) =:= Shard ], Number).


receiver() ->
    spawn(fun Loop() -> receive _ -> Loop() end end).
