%% The application: its start with valid and invalid configuration, and its functions for the shell.
%%
%% The contract of explain/1: it says what a route would then return, and why, in every state of the layers and for
%% either registry; and it changes nothing. The contract of retry_after_ms/1,2: a message that is sent after that time is
%% not refused by a layer that would have refused it before, if no other message comes first.
-module(erlmcp_native_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_testcase/2, end_per_testcase/2]).
-export([starts_and_stops/1,
         refuses_a_bad_environment/1,
         keeps_an_existing_default_registry/1,
         loading_the_library_again_is_refused/1,
         info_is_complete/1,
         i_prints_an_overview/1,
         explains_what_is_not_there/1,
         explains_each_layer/1,
         explains_the_bucket_that_pays/1,
         explains_a_receiver_that_takes_nothing/1,
         explanations_agree_with_routes/1,
         explains_without_the_application/1,
         explains_ids_that_are_too_long/1,
         explains_in_every_mode/1,
         explains_when_the_registry_was_killed/1,
         explains_while_the_registry_stands_still/1,
         retry_after_a_bucket/1,
         retry_after_the_circuit/1,
         retry_after_a_sample/1,
         retry_after_the_last_layer/1,
         retry_after_of_what_passes_no_layer/1]).

%% In a node of its own
-export([load_again/0]).

-define(SLOW,        1 / 3600).
-define(MODES,       [current, {percent, 0}, {percent, 50}, {percent, 100}, '100x']).
-define(DEADLINE_MS, 30_000).


all() ->
    [starts_and_stops,
     refuses_a_bad_environment,
     keeps_an_existing_default_registry,
     loading_the_library_again_is_refused,
     info_is_complete,
     i_prints_an_overview,
     explains_what_is_not_there,
     explains_each_layer,
     explains_the_bucket_that_pays,
     explains_a_receiver_that_takes_nothing,
     explanations_agree_with_routes,
     explains_without_the_application,
     explains_ids_that_are_too_long,
     explains_in_every_mode,
     explains_when_the_registry_was_killed,
     explains_while_the_registry_stands_still,
     retry_after_a_bucket,
     retry_after_the_circuit,
     retry_after_a_sample,
     retry_after_the_last_layer,
     retry_after_of_what_passes_no_layer].


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = whereis(erlmcp_registry) =:= undefined orelse gen_server:stop(erlmcp_registry),
    _ = application:stop(erlmcp_native),
    _ = [ application:unset_env(erlmcp_native, Key)
          || {Key, _} <- application:get_all_env(erlmcp_native) ],
    _ = [ erlmcp_shard_registry:unregister_connection(Id)
          || Shard <- lists:seq(0, 63), {Id, _} <- erlmcp_shard_registry:list_connections(Shard) ],
    ok = erlmcp_native_config:configure(),
    ok = erlmcp_native_config:forget(),
    ok = erlmcp_circuit_breaker:force_close(),
    %% The mode of the next registry process.
    start_registry(),
    ok = erlmcp_rollout:set('100x'),
    ok = gen_server:stop(erlmcp_registry),
    _ = application:unset_env(erlmcp_native, architecture_version),
    ok.


starts_and_stops(_Config) ->
    ok = application:start(erlmcp_native),
    ?assertMatch(#{application := running}, erlmcp_native:info()),
    ?assertEqual(undefined, whereis(erlmcp_registry)),
    ok = erlmcp_shard_registry:register_connection(survivor, self(), #{}),
    ok = application:stop(erlmcp_native),
    ?assertMatch(#{application := stopped}, erlmcp_native:info()),
    ?assertEqual({ok, {self(), #{}}}, erlmcp_shard_registry:lookup_connection(survivor)),
    ok = erlmcp_shard_registry:unregister_connection(survivor).


refuses_a_bad_environment(_Config) ->
    lists:foreach(fun({Key, Value}) ->
                          application:set_env(erlmcp_native, Key, Value),
                          {error, {Reason, _}} = application:start(erlmcp_native),
                          ?assertMatch({bad_option, Key, Value, [_ | _]}, Reason),
                          application:unset_env(erlmcp_native, Key)
                  end,
                  [{shards, 3},
                   {shards, 0},
                   {shards, 2048},
                   {shards, many},
                   {max_entries, 0},
                   {max_entries, -1},
                   {max_id_bytes, 1.0},
                   {max_id_bytes, 1 bsl 25},
                   {same_pid, error},
                   {no_such_key, 1}]),
    ok = application:start(erlmcp_native).


%% The existing registry cannot be changed. The application reports this and starts.
keeps_an_existing_default_registry(_Config) ->
    Limits = #{shards := Shards} = erlmcp_shard_registry:limits(),
    application:set_env(erlmcp_native, shards, Shards * 2),
    ok = application:start(erlmcp_native),
    ?assertEqual(Limits, erlmcp_shard_registry:limits()).


%% The loaded code stays, with the library and all registrations.
loading_the_library_again_is_refused(_Config) ->
    test_support:in_peer(?MODULE, load_again).


load_again() ->
    ok = application:start(erlmcp_native),
    start_registry(),
    Registry = whereis(erlmcp_registry),
    Supervisor = whereis(erlmcp_native_sup),
    Processes = processes_of_the_application(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    _ = [ begin
              {error, on_load_failure} = code:load_file(erlmcp_nif),
              none = erlmcp_registry_native:load_error(),
              ok = erlmcp_shard_manager:route_message(c, {message, N}),
              {ok, {_, #{}}} = erlmcp_registry:find_server(s),
              _ = code:soft_purge(erlmcp_nif)
          end || N <- [1, 2, 3] ],
    [{message, 1}, {message, 2}, {message, 3}] = test_support:flush(),
    %% The same processes still work at intervals. The first interval may have been under way.
    ok = await_intervals(),
    ok = await_intervals(),
    Processes = processes_of_the_application(),
    Registry = whereis(erlmcp_registry),
    Supervisor = whereis(erlmcp_native_sup),
    ok = erlmcp_native:health(),
    ok = application:stop(erlmcp_native).


%% Waits until health, metrics and recovery have once more done what they do once a second.
await_intervals() ->
    Read = fun() ->
                   [ets:lookup_element(erlmcp_shard_health, window, 2),
                    ets:lookup_element(erlmcp_shard_metrics, measured_ms, 2),
                    ets:lookup_element(erlmcp_shard_recovery, alive_us, 2)]
           end,
    Before = Read(),
    IsNewer = fun({Now, Then}) -> Now > Then end,
    test_support:await(fun() -> lists:all(IsNewer, lists:zip(Read(), Before)) end, ?DEADLINE_MS).


processes_of_the_application() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Managers = [ erlmcp_shard_sampler:name(Shard) || Shard <- lists:seq(0, Shards - 1) ],
    [ {Name, Pid}
      || Name <- [erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery | Managers],
         Pid <- [whereis(Name)],
         is_pid(Pid) orelse error({not_there, Name}) ].


info_is_complete(_Config) ->
    Info = erlmcp_native:info(),
    ?assertMatch(#{
                   version := [_ | _],
                   otp_release := [_ | _],
                   nif_version := [_ | _],
                   system_architecture := [_ | _],
                   nif := loaded,
                   registry := #{shards := _, servers := _, transports := _, connections := _},
                   bindings := _,
                   distinct_configs := _
                  },
                 Info).


i_prints_an_overview(_Config) ->
    ct:capture_start(),
    ok = erlmcp_native:i(),
    ct:capture_stop(),
    Printed = lists:flatten(ct:capture_get()),
    _ = [ ?assertNotEqual(nomatch, string:find(Printed, Part), Part)
          || Part <- ["erlmcp_native", "native library", "loaded", "connections", "shards", "bindings"] ],
    ok.


%%% Explanations


explains_what_is_not_there(_Config) ->
    ok = start_for_explanations(),
    Shard = erlmcp_shard_registry:get_shard_id(nobody),
    Unknown = #{registered => false, registry => native, routed_by => caller, shard => Shard, route => ok, decided_by => registry},
    ?assertEqual(#{connection => Unknown#{route := {error, not_found}}, server => Unknown, transport => Unknown},
                 erlmcp_native:explain(nobody)),
    %% The layers decide only about registered ids.
    ok = erlmcp_circuit_breaker:force_open(),
    ?assertEqual(#{connection => Unknown#{route := {error, not_found}}, server => Unknown, transport => Unknown},
                 erlmcp_native:explain(nobody)).


%% Circuit, admission and bucket, in this order: each decides once, since the layers after it refuse as well.
explains_each_layer(_Config) ->
    ok = start_for_explanations(),
    Shard = erlmcp_shard_registry:get_shard_id(id),
    ok = erlmcp_shard_registry:register_connection(id, self(), #{a => 1}),
    ok = erlmcp_registry:register_server(id, self(), #{}),
    ok = erlmcp_registry:register_transport(id, self(), #{server_id => id}),
    Pid = self(),
    Bytes = erlang:external_size(#{a => 1}),
    #{connection := Connection, server := Server, transport := Transport} = erlmcp_native:explain(id),
    ?assertMatch(#{
                   registered := true,
                   registry := native,
                   shard := Shard,
                   pid := Pid,
                   config_bytes := Bytes,
                   route := ok,
                   decided_by := none,
                   bucket := #{tokens := 1000, capacity := 1000}
                  },
                 Connection),
    ?assertEqual(false, is_map_key(bucket, Server)),
    ?assertMatch(#{registered := true, pid := Pid, route := ok, decided_by := none}, Server),
    ?assertMatch(#{binding := {ok, id}, sends := ok, bucket := #{tokens := 1000}, route := ok, decided_by := none}, Transport),
    Decided = fun() ->
                      [ {maps:get(route, Entry), maps:get(decided_by, Entry)}
                        || Explanation <- [erlmcp_native:explain(id)],
                           Entry <- [ maps:get(Namespace, Explanation) || Namespace <- [connection, server, transport] ] ]
              end,
    ok = erlmcp_token_bucket:set_limits(id, #{capacity => 1, rate_per_second => ?SLOW}),
    {ok, 0} = erlmcp_token_bucket:consume(id, 1),
    ?assertEqual([{{error, rate_limited}, token_bucket}, {ok, none}, {ok, none}], Decided()),
    ok = erlmcp_admission_control:set_threshold(Shard, 10),
    ok = erlmcp_admission_control:update_queue_depth(Shard, 10),
    ?assertEqual([ {{error, shard_overloaded}, admission} || _ <- [1, 2, 3] ], Decided()),
    ok = erlmcp_circuit_breaker:force_open(),
    ?assertEqual([ {{error, circuit_open}, circuit} || _ <- [1, 2, 3] ], Decided()),
    ok = erlmcp_native:set(backpressure, off),
    ?assertEqual([ {ok, none} || _ <- [1, 2, 3] ], Decided()).


%% This is the bucket of the transport that a message comes from.
explains_the_bucket_that_pays(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    ok = erlmcp_token_bucket:set_limits(transport, t, #{capacity => 3, rate_per_second => ?SLOW}),
    _ = [ begin
              #{transport := #{bucket := #{tokens := Left}, sends := Sends, route := ok}} = erlmcp_native:explain(t),
              ?assertEqual({Left, Sends}, {Left, erlmcp_registry:route_to_server(s, t, x)})
          end || Left <- [3, 2, 1, 0, 0] ],
    ?assertMatch(#{transport := #{sends := {error, rate_limited}, route := ok, binding := {error, not_found}}},
                 erlmcp_native:explain(t)),
    %% The sender's bucket does not concern the server.
    ?assertMatch(#{server := #{route := ok, decided_by := none}}, erlmcp_native:explain(s)),
    ok = erlmcp_token_bucket:set_limits(transport, t, infinity),
    ?assertMatch(#{transport := #{sends := ok, bucket := #{tokens := infinity}}}, erlmcp_native:explain(t)).


%% With the threshold `auto' a process is refused further messages that nobody has seen it take, and its shard is not.
explains_a_receiver_that_takes_nothing(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_native:set(token_bucket, infinity),
    ok = erlmcp_native:set(admission, #{threshold => auto}),
    Shard = erlmcp_shard_registry:get_shard_id(stalled),
    %% Enough receivers for a threshold of several times the limit of one process.
    Others = [ test_support:process() || _ <- lists:seq(1, 1000) ],
    Ids = lists:sublist([ N || N <- lists:seq(1, 200_000), erlmcp_shard_registry:get_shard_id(N) =:= Shard ], 1000),
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, Pid, #{}) || {Id, Pid} <- lists:zip(Ids, Others) ],
    Stalled = test_support:process(),
    ok = erlmcp_shard_registry:register_connection(stalled, Stalled, #{}),
    true = erlang:suspend_process(Stalled),
    {error, shard_overloaded} = send_until_refused(stalled, 20_000),
    #{connection := Entry} = erlmcp_native:explain(stalled),
    ?assertMatch(#{route := {error, shard_overloaded}, decided_by := admission}, Entry),
    ?assert(erlmcp_native:retry_after_ms(stalled) > 0),
    ?assertMatch(#{connection := #{route := ok, decided_by := none, retry_after_ms := 0}}, erlmcp_native:explain(hd(Ids))),
    lists:foreach(fun(Pid) -> exit(Pid, kill) end, [Stalled | Others]).


send_until_refused(Id, Left) when Left > 0 ->
    case erlmcp_shard_manager:route_message(Id, x) of
        ok -> send_until_refused(Id, Left - 1);
        Refused -> Refused
    end.


%% Random states of all layers. The seed is in the log.
explanations_agree_with_routes(_Config) ->
    ok = start_for_explanations(),
    Seed = erlang:unique_integer([positive]) + erlang:system_time(),
    ct:pal("seed ~b", [Seed]),
    _ = rand:seed(exsss, Seed),
    Ids = [a, <<"b">>, {c, 3}],
    _ = [ begin
              ok = erlmcp_shard_registry:register_connection(Id, self(), #{}),
              ok = erlmcp_registry:register_server(Id, self(), #{}),
              ok = erlmcp_registry:register_transport(Id, self(), #{})
          end || Id <- Ids ],
    Rounds = 3_000,
    Decided = [ begin
                    ok = random_state(Ids),
                    Id = one_of([nobody | Ids]),
                    Namespace = one_of([connection, server, transport]),
                    Before = traces(Ids),
                    #{Namespace := #{route := Route, decided_by := Layer, registered := IsRegistered} = Entry} = erlmcp_native:explain(Id),
                    RetryMs = retry_after_ms(Namespace, Id),
                    ?assertEqual(Before, traces(Ids)),
                    State = {Namespace, Id, Before},
                    ?assertEqual({State, IsRegistered andalso Route =/= ok}, {State, is_integer(RetryMs) andalso RetryMs > 0}),
                    ?assertEqual({State, IsRegistered}, {State, is_integer(RetryMs)}),
                    ?assertEqual({State, IsRegistered}, {State, is_map_key(retry_after_ms, Entry)}),
                    ?assertEqual({State, RetryMs > 0}, {State, maps:get(retry_after_ms, Entry, none) > 0}),
                    ?assertEqual({State, Route}, {State, route(Namespace, Id)}),
                    ?assertEqual({State, Layer}, {State, layer(Route, IsRegistered)}),
                    ?assertEqual({State, received_if(Route =:= ok andalso IsRegistered)}, {State, received()}),
                    {Namespace, Layer}
                end || _ <- lists:seq(1, Rounds) ],
    Counts = lists:foldl(fun(Key, Counts) -> Counts#{Key => maps:get(Key, Counts, 0) + 1} end, #{}, Decided),
    ct:pal("~p", [Counts]),
    %% Every possible pair has occurred.
    Possible = [{connection, token_bucket} | [ {Namespace, Layer} || Namespace <- [connection, server, transport],
                                                                     Layer <- [none, registry, circuit, admission] ]],
    ?assertEqual(lists:sort(Possible), lists:sort(maps:keys(Counts))).


random_state(Ids) ->
    Id = one_of(Ids),
    case rand:uniform(11) of
        1 ->
            erlmcp_circuit_breaker:force_open();
        2 ->
            erlmcp_circuit_breaker:force_close();
        3 ->
            %% Open, with a timeout that is over at once or lasts long.
            ok = erlmcp_native:set(circuit_breaker, (circuit_settings())#{timeout_ms => one_of([0, 3_600_000])}),
            erlmcp_circuit_breaker:force_open();
        4 ->
            %% Half open, with one probe left or none.
            ok = erlmcp_native:set(circuit_breaker, (circuit_settings())#{timeout_ms => 0}),
            ok = erlmcp_circuit_breaker:force_open(),
            true = erlmcp_circuit_breaker:allow_test_request(),
            ok = erlmcp_native:set(circuit_breaker, (circuit_settings())#{timeout_ms => 3_600_000}),
            _ = one_of([true, false]) andalso erlmcp_circuit_breaker:allow_test_request(),
            ok;
        5 ->
            erlmcp_native:set(circuit_breaker, one_of([off, circuit_settings()]));
        6 ->
            erlmcp_native:set(backpressure, one_of([on, on, off]));
        7 ->
            erlmcp_admission_control:set_threshold(erlmcp_shard_registry:get_shard_id(Id), one_of([1, 3, 1000, infinity]));
        8 ->
            erlmcp_admission_control:update_queue_depth(erlmcp_shard_registry:get_shard_id(Id), one_of([1, 3, -1, -1000]));
        9 ->
            erlmcp_token_bucket:set_limits(Id, one_of([infinity, default, #{capacity => 2, rate_per_second => ?SLOW}]));
        10 ->
            _ = erlmcp_token_bucket:consume(Id, 1),
            ok;
        11 ->
            erlmcp_native:set(token_bucket, one_of([infinity, #{capacity => 3, rate_per_second => ?SLOW}]))
    end.


one_of(List) ->
    lists:nth(rand:uniform(length(List)), List).


%% Everything that a route, a probe or a counted query would change.
traces(Ids) ->
    Shards = lists:seq(0, 63),
    #{
      circuit => maps:without([since_ms], erlmcp_circuit_breaker:node_stats()),
      shards => [ {Depth, Threshold, Admitted, IsOverloaded}
                  || Shard <- Shards, {Depth, Threshold, Admitted, IsOverloaded, _Age} <- [erlmcp_nif:admission_stats(Shard)] ],
      refused => [ erlmcp_nif:refused(Shard) || Shard <- Shards ],
      buckets => [ erlmcp_token_bucket:get_state(Namespace, Id) || Namespace <- [connection, transport], Id <- Ids ]
     }.


retry_after_ms(server, Id) -> erlmcp_native:retry_after_ms(server, {Id, no_transport});
retry_after_ms(Namespace, Id) -> erlmcp_native:retry_after_ms(Namespace, Id).


route(connection, Id) -> erlmcp_shard_manager:route_message(Id, x);
route(server, Id) -> erlmcp_registry:route_to_server(Id, no_transport, x);
route(transport, Id) -> erlmcp_registry:route_to_transport(Id, no_server, x).


layer(ok, true) -> none;
layer(_Dropped, false) -> registry;
layer({error, circuit_open}, true) -> circuit;
layer({error, shard_overloaded}, true) -> admission;
layer({error, rate_limited}, true) -> token_bucket.


received_if(true) -> 1;
received_if(false) -> 0.


received() ->
    receive
        x -> 1 + received();
        {mcp_message, no_transport, x} -> 1 + received();
        {mcp_response, no_server, x} -> 1 + received()
    after
        0 ->
            0
    end.


explains_without_the_application(_Config) ->
    ok = erlmcp_shard_registry:register_connection(id, self(), #{}),
    ?assertMatch(#{
                   connection := #{registered := true, route := ok, decided_by := none},
                   server := #{registered := false, route := ok, decided_by := registry}
                  },
                 erlmcp_native:explain(id)).


explains_ids_that_are_too_long(_Config) ->
    ok = start_for_explanations(),
    #{max_id_bytes := Max} = erlmcp_shard_registry:limits(),
    ?assertEqual({error, {id_too_long, Max}}, erlmcp_native:explain(binary:copy(<<"x">>, Max + 1))),
    ?assertEqual({error, {id_too_long, Max}}, erlmcp_native:explain(lists:seq(1, Max))),
    ?assertMatch(#{connection := #{registered := false}}, erlmcp_native:explain(binary:copy(<<"x">>, Max))),
    %% The same holds where the other registry would accept the id.
    ok = erlmcp_rollout:set(current),
    ?assertEqual({error, {id_too_long, Max}}, erlmcp_native:explain(binary:copy(<<"x">>, Max + 1))).


%% With an open circuit the result of a route shows which registry routes.
explains_in_every_mode(_Config) ->
    ok = start_for_explanations(),
    Ids = lists:seq(1, 60),
    _ = [ begin
              ok = erlmcp_registry:register_server(Id, self(), #{of_server => Id}),
              ok = erlmcp_registry:register_transport(Id, self(), #{server_id => Id})
          end || Id <- Ids ],
    Natively = [ begin
                     ok = erlmcp_rollout:set(Mode),
                     ok = erlmcp_circuit_breaker:force_open(),
                     agree(Mode, Ids)
                 end || Mode <- ?MODES ],
    [0, 0, Some, 60, 60] = Natively,
    ?assert(Some > 10 andalso Some < 50, Some),
    %% With a closed circuit everything is routed, and unregistered ids are explained as such.
    ok = erlmcp_circuit_breaker:force_close(),
    _ = [ begin
              ok = erlmcp_rollout:set(Mode),
              _ = agree(Mode, [1, 2, 3, 61, 62]),
              ?assertMatch(#{server := #{registered := false, route := ok, decided_by := registry}}, erlmcp_native:explain(61)),
              %% Connections are native in every mode.
              ?assertMatch(#{connection := #{registry := native, route := {error, not_found}}}, erlmcp_native:explain(1))
          end || Mode <- ?MODES ],
    %% An entry has no bucket where the native registry has no transports.
    ok = erlmcp_rollout:set(current),
    #{transport := Entry} = erlmcp_native:explain(1),
    ?assertEqual([binding, config_bytes, decided_by, pid, registered, registry, retry_after_ms, route, routed_by, shard],
                 lists:sort(maps:keys(Entry))),
    ?assertEqual({ok, 1}, maps:get(binding, Entry)).


%% The number of natively routed servers, if all explanations agree with the routes.
agree(Mode, Ids) ->
    lists:sum([ begin
                    #{server := Server, transport := Transport} = erlmcp_native:explain(Id),
                    _ = [ begin
                              #{route := Route, decided_by := Layer, registered := IsRegistered} = Entry,
                              ?assertEqual({Mode, Namespace, Id, Route}, {Mode, Namespace, Id, route(Namespace, Id)}),
                              ?assertEqual({Mode, Id, Layer}, {Mode, Id, layer(Route, IsRegistered)}),
                              case Route =:= ok andalso IsRegistered of
                                  true -> ?assertEqual({Mode, 1}, {Mode, received_in_time()});
                                  false -> ok
                              end
                          end || {Namespace, Entry} <- [{server, Server}, {transport, Transport}] ],
                    ?assertEqual(maps:get(registry, Server), maps:get(registry, Transport)),
                    case Server of
                        #{registered := true, routed_by := caller} -> 1;
                        _ -> 0
                    end
                end || Id <- Ids ]).


received_in_time() ->
    receive
        {mcp_message, no_transport, x} -> 1;
        {mcp_response, no_server, x} -> 1
    after
        ?DEADLINE_MS ->
            0
    end.


%% Routes continue where the native registry has all entries, and with `current' reach no process.
explains_when_the_registry_was_killed(_Config) ->
    ok = start_for_explanations(),
    Ids = lists:seq(1, 20),
    _ = [ ok = erlmcp_registry:register_server(Id, self(), #{}) || Id <- Ids ],
    _ = [ begin
              ok = erlmcp_rollout:set(Mode),
              ok = erlmcp_circuit_breaker:force_open(),
              test_support:kill(whereis(erlmcp_registry)),
              Explained = [ maps:get(server, erlmcp_native:explain(Id)) || Id <- Ids ],
              ?assertEqual({Mode, [ maps:get(route, Entry) || Entry <- Explained ]},
                           {Mode, [ route(server, Id) || Id <- Ids ]}),
              Expected = case Mode of
                             current -> {classic, registry, false};
                             _ -> {native, circuit, true}
                         end,
              ?assertEqual({Mode, [Expected]},
                           {Mode,
                            lists:usort([ {Registry, Layer, IsRegistered}
                                          || #{registry := Registry, decided_by := Layer, registered := IsRegistered} <- Explained ])}),
              start_registry(),
              ?assertEqual(20, length([ Id || Id <- Ids, #{server := #{registered := true}} <- [erlmcp_native:explain(Id)] ]))
          end || Mode <- ?MODES ].


explains_while_the_registry_stands_still(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = sys:suspend(erlmcp_registry),
    %% The registry's process is not asked,
    ?assertMatch(#{server := #{registered := true, registry := native}}, erlmcp_native:explain(s)),
    ok = sys:resume(erlmcp_registry),
    ok = erlmcp_rollout:set(current),
    ok = sys:suspend(erlmcp_registry),
    %% or explain/1 reports that it does not answer.
    ?assertEqual({error, registry_busy}, erlmcp_native:explain(s)),
    ok = sys:resume(erlmcp_registry),
    ?assertMatch(#{server := #{registered := true, registry := classic}}, erlmcp_native:explain(s)).


%% No process samples, and within a case no bucket is refilled and no timeout is over.
%%% Times after which to try again


%% The time is exact: a message that is sent after it is admitted. A timer never fires too early.
retry_after_a_bucket(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    ok = erlmcp_token_bucket:set_limits(c, #{capacity => 1, rate_per_second => 50}),
    ok = erlmcp_token_bucket:set_limits(transport, t, #{capacity => 1, rate_per_second => 50}),
    Targets = [{connection, c, fun() -> erlmcp_shard_manager:route_message(c, x) end},
               {server, {s, t}, fun() -> erlmcp_registry:route_to_server(s, t, x) end}],
    _ = [ begin
              ?assertEqual(0, erlmcp_native:retry_after_ms(Kind, Target)),
              ?assertEqual(ok, Route()),
              WaitMs = erlmcp_native:retry_after_ms(Kind, Target),
              ?assert(WaitMs >= 0 andalso WaitMs =< 20, WaitMs),
              timer:sleep(WaitMs)
          end || _ <- lists:seq(1, 20), {Kind, Target, Route} <- Targets ],
    %% The bucket of the transport concerns no message to it, and none from another transport.
    ok = erlmcp_token_bucket:set_limits(transport, t, #{rate_per_second => ?SLOW}),
    ok = erlmcp_registry:route_to_server(s, t, x),
    ?assert(erlmcp_native:retry_after_ms(server, {s, t}) > 3_500_000),
    ?assertEqual({0, 0}, {erlmcp_native:retry_after_ms(transport, t), erlmcp_native:retry_after_ms(server, {s, other})}),
    ?assertEqual({error, not_found}, erlmcp_native:retry_after_ms(nobody)),
    ?assertEqual({error, not_found}, erlmcp_native:retry_after_ms(server, {nobody, t})),
    ?assertError(badarg, erlmcp_native:retry_after_ms(binary:copy(<<"x">>, 65_536))),
    ?assertError(function_clause, erlmcp_native:retry_after_ms(server, s)),
    ?assertError(function_clause, erlmcp_native:retry_after_ms(bucket, c)).


retry_after_the_circuit(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 50, probe_limit => 1}),
    _ = [ begin
              ok = erlmcp_circuit_breaker:force_open(),
              WaitMs = erlmcp_native:retry_after_ms(c),
              ?assert(WaitMs =< 50, WaitMs),
              timer:sleep(WaitMs),
              ?assertEqual(half_open, erlmcp_circuit_breaker:get_state()),
              ?assertEqual(0, erlmcp_native:retry_after_ms(c)),
              ?assertEqual(ok, erlmcp_shard_manager:route_message(c, x))
          end || _ <- lists:seq(1, 5) ],
    %% An answer to a probe may come at any time.
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 0}),
    ok = erlmcp_circuit_breaker:force_open(),
    true = erlmcp_circuit_breaker:allow_test_request(),
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 3_600_000}),
    ?assertEqual(1, erlmcp_native:retry_after_ms(c)),
    ok = erlmcp_circuit_breaker:record_success(),
    ?assertEqual(0, erlmcp_native:retry_after_ms(c)).


%% The next sample is due within an interval.
retry_after_a_sample(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    Shard = erlmcp_shard_registry:get_shard_id(t),
    ok = erlmcp_admission_control:set_threshold(Shard, 10),
    ?assertEqual(0, erlmcp_native:retry_after_ms(transport, t)),
    ok = erlmcp_admission_control:update_queue_depth(Shard, 10),
    WaitMs = erlmcp_native:retry_after_ms(transport, t),
    ?assert(WaitMs > 3_000_000 andalso WaitMs =< 3_600_000, WaitMs),
    ok = erlmcp_admission_control:update_queue_depth(Shard, -1),
    ?assertEqual(0, erlmcp_native:retry_after_ms(transport, t)).


%% A message has to pass all layers, so the longest time counts, whichever layer refuses first.
retry_after_the_last_layer(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_token_bucket:set_limits(c, #{capacity => 1, rate_per_second => ?SLOW}),
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => 60_000}),
    {ok, 0} = erlmcp_token_bucket:consume(c, 1),
    ok = erlmcp_circuit_breaker:force_open(),
    ?assertMatch(#{connection := #{decided_by := circuit}}, erlmcp_native:explain(c)),
    ?assert(erlmcp_native:retry_after_ms(c) > 3_000_000),
    ok = erlmcp_token_bucket:set_limits(c, infinity),
    WaitMs = erlmcp_native:retry_after_ms(c),
    ?assert(WaitMs > 0 andalso WaitMs =< 60_000, WaitMs),
    ok = erlmcp_native:set(backpressure, off),
    ?assertEqual(0, erlmcp_native:retry_after_ms(c)).


%% What the registry's process sends.
retry_after_of_what_passes_no_layer(_Config) ->
    ok = start_for_explanations(),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_circuit_breaker:force_open(),
    ?assert(erlmcp_native:retry_after_ms(server, {s, t}) > 0),
    ok = erlmcp_rollout:set(current),
    ?assertEqual(ok, erlmcp_registry:route_to_server(s, t, x)),
    ?assertEqual(0, erlmcp_native:retry_after_ms(server, {s, t})).


start_for_explanations() ->
    ok = application:set_env(erlmcp_native, admission, #{threshold => 10_000, sample_interval_ms => 3_600_000}),
    ok = application:set_env(erlmcp_native, token_bucket, #{capacity => 1000, rate_per_second => ?SLOW}),
    ok = application:set_env(erlmcp_native, circuit_breaker, circuit_settings()),
    ok = application:start(erlmcp_native),
    IsSampled = fun(Shard) ->
                        maps:get(sample_age_ms, erlmcp_admission_control:get_shard_stats(Shard)) =/= infinity
                end,
    test_support:await(fun() -> lists:all(IsSampled, lists:seq(0, 63)) end, ?DEADLINE_MS),
    ok = supervisor:terminate_child(erlmcp_native_sup, erlmcp_shard_sup),
    start_registry().


circuit_settings() ->
    #{failure_threshold => 5, window_ms => 3_600_000, success_threshold => 3, timeout_ms => 3_600_000, probe_limit => 2}.


start_registry() ->
    {ok, _} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    test_support:await(fun() -> maps:get(switching_to, erlmcp_rollout:status()) =:= none end, ?DEADLINE_MS),
    ok.
