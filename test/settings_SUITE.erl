%%% Changes of settings in a running node.
%%%
%%% The contract: a setting changes the keys that it names and keeps the others, in whichever form it is given.
%%% After `infinity' or `off' the other keys have the values that were in force last, else the configured ones,
%%% else the defaults. The native values in force are those that were set, regardless of concurrent setters and
%%% of processes that are killed. No setter waits for the application controller.
-module(settings_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_testcase/2, end_per_testcase/2]).

-export([each_key_changes_alone/1,
         configured_keys_stay/1,
         keys_come_back_after_off/1,
         configured_keys_come_back/1,
         defaults_come_where_nothing_else_is/1,
         all_forms_are_taken/1,
         all_forms_are_taken_from_the_environment/1,
         wrong_lists_are_refused/1,
         thresholds_over_every_environment/1,
         wrong_keys_of_the_environment_are_put_right/1,
         what_depends_on_other_keys_is_checked/1,
         environment_alone_changes_nothing/1,
         settings_survive_a_restart/1,
         concurrent_changes_lose_nothing/1,
         killed_setters_leave_it_consistent/1,
         killed_workers_are_made_good/1,
         blocked_controller/1,
         without_the_application/1,
         large_values_are_kept/1]).

%% Called in peer nodes
-export([in_blocked_controller/0, in_no_application/0]).

-define(C, erlmcp_native_config).


suite() ->
    [{timetrap, {minutes, 1}}].


all() ->
    [each_key_changes_alone,
     configured_keys_stay,
     keys_come_back_after_off,
     configured_keys_come_back,
     defaults_come_where_nothing_else_is,
     all_forms_are_taken,
     all_forms_are_taken_from_the_environment,
     wrong_lists_are_refused,
     thresholds_over_every_environment,
     wrong_keys_of_the_environment_are_put_right,
     what_depends_on_other_keys_is_checked,
     environment_alone_changes_nothing,
     settings_survive_a_restart,
     concurrent_changes_lose_nothing,
     killed_setters_leave_it_consistent,
     killed_workers_are_made_good,
     blocked_controller,
     without_the_application,
     large_values_are_kept].


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = application:stop(erlmcp_native),
    _ = [ application:unset_env(erlmcp_native, Key) || {Key, _} <- application:get_all_env(erlmcp_native) ],
    ok = application:start(erlmcp_native),
    application:stop(erlmcp_native).


%% For each key, values that differ from the defaults, and values that differ from those.
settings() ->
    #{
      token_bucket => {#{capacity => 70, rate_per_second => 30}, #{capacity => 60, rate_per_second => 20}},
      admission => {#{threshold => 500, sample_interval_ms => 500}, #{threshold => 400, sample_interval_ms => 400}},
      circuit_breaker =>
          {#{failure_threshold => 5, window_ms => 6, success_threshold => 7, timeout_ms => 8, probe_limit => 9},
           #{failure_threshold => 15, window_ms => 16, success_threshold => 17, timeout_ms => 18, probe_limit => 19}},
      health =>
          {#{
             queue_depth_percent => 11,
             run_queue_per_scheduler => 12,
             scheduler_use_percent => 13,
             memory_bytes => 14
            },
           #{
             queue_depth_percent => 21,
             run_queue_per_scheduler => infinity,
             scheduler_use_percent => infinity,
             memory_bytes => machine
            }}
     }.


off(circuit_breaker) -> off;
off(_Layer) -> infinity.


layers() -> [token_bucket, admission, circuit_breaker].


%%% What a setting changes


each_key_changes_alone(_Config) ->
    ok = application:start(erlmcp_native),
    maps:foreach(fun(Key, {Before, After}) ->
                         ok = erlmcp_native:set(Key, Before),
                         _ = maps:fold(fun(Field, Value, InForce) ->
                                               ok = erlmcp_native:set(Key, #{Field => Value}),
                                               ok = is_in_force(Key, InForce#{Field => Value}),
                                               InForce#{Field => Value}
                                       end,
                                       Before,
                                       After),
                         ok = is_in_force(Key, After),
                         %% A setting may name no key at all.
                         ok = erlmcp_native:set(Key, #{}),
                         ok = is_in_force(Key, After)
                 end,
                 settings()).


configured_keys_stay(_Config) ->
    ok = application:set_env(erlmcp_native, admission, #{sample_interval_ms => 500}),
    ok = application:set_env(erlmcp_native, token_bucket, [{rate_per_second, 100}]),
    ok = application:start(erlmcp_native),
    ok = is_in_force(admission, #{threshold => default_threshold(), sample_interval_ms => 500}),
    ok = erlmcp_native:set(admission, #{threshold => 20000}),
    ok = is_in_force(admission, #{threshold => 20000, sample_interval_ms => 500}),
    ok = erlmcp_admission_control:set_threshold(30000),
    ok = is_in_force(admission, #{threshold => 30000, sample_interval_ms => 500}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 60}),
    ok = is_in_force(token_bucket, #{capacity => 60, rate_per_second => 100}).


keys_come_back_after_off(_Config) ->
    _ = [ ok = application:set_env(erlmcp_native, Layer, configured(Layer)) || Layer <- layers() ],
    ok = application:start(erlmcp_native),
    lists:foreach(fun(Layer) ->
                          #{Layer := {Before, After}} = settings(),
                          ok = erlmcp_native:set(Layer, Before),
                          [Field | _] = maps:keys(After),
                          ok = erlmcp_native:set(Layer, off(Layer)),
                          ok = is_in_force(Layer, off(Layer)),
                          %% Switching off twice has the effect of once.
                          ok = erlmcp_native:set(Layer, off(Layer)),
                          ok = erlmcp_native:set(Layer, maps:with([Field], After)),
                          ok = is_in_force(Layer, Before#{Field => maps:get(Field, After)}),
                          ok = erlmcp_native:set(Layer, off(Layer)),
                          ok = erlmcp_native:set(Layer, #{}),
                          ok = is_in_force(Layer, Before#{Field => maps:get(Field, After)})
                  end,
                  layers()).


%% No value was set before the layer was switched off.
configured_keys_come_back(_Config) ->
    _ = [ ok = application:set_env(erlmcp_native, Layer, configured(Layer)) || Layer <- layers() ],
    ok = application:start(erlmcp_native),
    lists:foreach(fun(Layer) ->
                          Configured = maps:merge(?C:default(Layer), configured(Layer)),
                          ok = erlmcp_native:set(Layer, off(Layer)),
                          ok = erlmcp_native:set(Layer, #{}),
                          ok = is_in_force(Layer, Configured)
                  end,
                  layers()).


configured(token_bucket) -> #{rate_per_second => 55};
configured(admission) -> #{sample_interval_ms => 55};
configured(circuit_breaker) -> #{timeout_ms => 55}.


defaults_come_where_nothing_else_is(_Config) ->
    _ = [ ok = application:set_env(erlmcp_native, Layer, off(Layer)) || Layer <- layers() ],
    ok = application:start(erlmcp_native),
    lists:foreach(fun(Layer) ->
                          ok = is_in_force(Layer, off(Layer)),
                          ok = erlmcp_native:set(Layer, configured(Layer)),
                          ok = is_in_force(Layer, maps:merge(?C:default(Layer), configured(Layer)))
                  end,
                  layers()).


%%% Forms


all_forms_are_taken(_Config) ->
    ok = application:start(erlmcp_native),
    maps:foreach(fun(Key, {Before, After}) ->
                         _ = [ begin
                                   ok = erlmcp_native:set(Key, Before),
                                   ok = erlmcp_native:set(Key, Form),
                                   ok = is_in_force(Key, After)
                               end || Form <- [After, maps:to_list(After), [ {F, V} || {F, V} <- maps:to_list(After) ] ++ maps:to_list(Before)] ],
                         ok = erlmcp_native:set(Key, []),
                         ok = is_in_force(Key, After)
                 end,
                 settings()).


all_forms_are_taken_from_the_environment(_Config) ->
    maps:foreach(fun(Key, {Before, _After}) ->
                         ok = application:set_env(erlmcp_native, Key, maps:to_list(Before)),
                         ok = application:start(erlmcp_native),
                         ok = is_in_force(Key, Before),
                         ok = application:stop(erlmcp_native),
                         [{Field, Value} | _] = maps:to_list(Before),
                         ok = application:set_env(erlmcp_native, Key, [{Field, Value}]),
                         ok = application:start(erlmcp_native),
                         ok = is_in_force(Key, (?C:default(Key))#{Field => Value}),
                         ok = application:stop(erlmcp_native)
                 end,
                 settings()).


wrong_lists_are_refused(_Config) ->
    ok = application:start(erlmcp_native),
    maps:foreach(fun(Key, {Before, _After}) ->
                         ok = erlmcp_native:set(Key, Before),
                         [{Field, Value} | _] = maps:to_list(Before),
                         _ = [ begin
                                   ?assertMatch({error, {bad_option, Key, Wrong, [_ | _]}}, erlmcp_native:set(Key, Wrong)),
                                   ok = is_in_force(Key, Before)
                               end || Wrong <- ["on",
                                                [Field],
                                                [{Field}],
                                                [{Field, Value, Value}],
                                                [{Field, Value} | improper],
                                                [{Field, 0}, {Field, Value}],
                                                [{Field, -1}],
                                                [{no_such_key, Value}],
                                                [#{Field => Value}]] ]
                 end,
                 settings()).


thresholds_over_every_environment(_Config) ->
    _ = [ begin
              ok = application:set_env(erlmcp_native, admission, Environment),
              ok = application:start(erlmcp_native),
              ?assertMatch({error, {bad_option, admission, _, _}}, erlmcp_admission_control:set_threshold(0)),
              ?assertMatch({error, {bad_option, admission, _, _}}, erlmcp_admission_control:set_threshold(off)),
              ?assertEqual(ok, erlmcp_admission_control:set_threshold(77)),
              ok = is_in_force(admission, #{threshold => 77, sample_interval_ms => Interval}),
              ?assertEqual(ok, erlmcp_admission_control:set_threshold(infinity)),
              ok = is_in_force(admission, infinity),
              ok = application:stop(erlmcp_native)
          end || {Environment, Interval} <- [{infinity, 100},
                                             {[{sample_interval_ms, 200}], 200},
                                             {#{sample_interval_ms => 200}, 200},
                                             {[], 100}] ],
    %% The same holds without the application.
    ok = application:set_env(erlmcp_native, admission, [{sample_interval_ms, 300}]),
    ?assertEqual(ok, erlmcp_admission_control:set_threshold(78)),
    ?assertEqual(#{threshold => 78, sample_interval_ms => 300}, ?C:get(admission)).


%% Wrong values of other keys do not prevent the correction of one wrong key.
wrong_keys_of_the_environment_are_put_right(_Config) ->
    Keys = [ Key || Key <- maps:keys(settings()) ] ++ [backpressure],
    [ ok = application:set_env(erlmcp_native, Key, wrong) || Key <- Keys ],
    maps:foreach(fun(Key, {Before, _After}) ->
                         ?assertEqual(ok, erlmcp_native:set(Key, Before)),
                         ?assertEqual(Before, ?C:get(Key))
                 end,
                 settings()),
    ?assertEqual(ok, erlmcp_native:set(backpressure, on)),
    ok = application:start(erlmcp_native),
    maps:foreach(fun(Key, {Before, _After}) -> ok = is_in_force(Key, Before) end, settings()).


what_depends_on_other_keys_is_checked(_Config) ->
    ok = application:start(erlmcp_native),
    ok = erlmcp_native:set(token_bucket, #{capacity => 1_000_000, rate_per_second => 1}),
    {error, {bad_option, token_bucket, #{rate_per_second := 0.01}, Expected}} =
        erlmcp_native:set(token_bucket, #{rate_per_second => 0.01}),
    ?assertNotEqual(nomatch, string:find(Expected, "104 days")),
    ok = is_in_force(token_bucket, #{capacity => 1_000_000, rate_per_second => 1}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 1000, rate_per_second => 0.01}).


%%% The environment


environment_alone_changes_nothing(_Config) ->
    ok = application:start(erlmcp_native),
    maps:foreach(fun(Key, {Before, After}) ->
                         ok = erlmcp_native:set(Key, Before),
                         _ = [ begin
                                   ok = application:set_env(erlmcp_native, Key, Other),
                                   ok = is_in_force(Key, Before),
                                   _ = [ ok = erlmcp_native:set(K, #{}) || K <- maps:keys(settings()), K =/= Key ],
                                   ok = erlmcp_native:set(backpressure, on),
                                   ok = is_in_force(Key, Before),
                                   [Field | _] = maps:keys(After),
                                   ok = erlmcp_native:set(Key, maps:with([Field], Before)),
                                   ok = is_in_force(Key, Before)
                               end || Other <- [After, off, nonsense, [{no_such_key, 1}]] ]
                 end,
                 settings()).


settings_survive_a_restart(_Config) ->
    ok = application:start(erlmcp_native),
    _ = [ ok = erlmcp_native:set(Key, Before) || {Key, {Before, _}} <- maps:to_list(settings()) ],
    ok = application:stop(erlmcp_native),
    ok = application:start(erlmcp_native),
    _ = [ ok = is_in_force(Key, Before) || {Key, {Before, _}} <- maps:to_list(settings()) ],
    ok = application:stop(erlmcp_native),
    %% Values that were changed while the application was stopped come into force.
    _ = [ ok = application:set_env(erlmcp_native, Key, After) || {Key, {_, After}} <- maps:to_list(settings()) ],
    ok = application:start(erlmcp_native),
    _ = [ ok = is_in_force(Key, After) || {Key, {_, After}} <- maps:to_list(settings()) ],
    ok.


%%% Several at once


concurrent_changes_lose_nothing(_Config) ->
    ok = application:start(erlmcp_native),
    Rounds = 50,
    Start = fun(Key, Field, Value) ->
                    spawn_monitor(fun() ->
                                          _ = [ ok = erlmcp_native:set(Key, #{Field => Value(N)}) || N <- lists:seq(1, Rounds) ],
                                          exit(done)
                                  end)
            end,
    Fields = [ {Key, Field} || Key <- layers(), Field <- maps:keys(?C:default(Key)) ],
    Setters = [ Start(Key, Field, fun(N) -> N end) || {Key, Field} <- Fields ],
    Switch = spawn_monitor(fun() ->
                                   _ = [ ok = erlmcp_native:set(backpressure, OnOff)
                                         || _ <- lists:seq(1, Rounds div 2), OnOff <- [off, on] ],
                                   exit(done)
                           end),
    _ = [ receive
              {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(done, Reason)
          end || {Pid, Monitor} <- [Switch | Setters] ],
    _ = [ is_in_force(Key, maps:map(fun(_Field, _) -> Rounds end, ?C:default(Key))) || Key <- layers() ],
    ok.


killed_setters_leave_it_consistent(_Config) ->
    ok = application:start(erlmcp_native),
    lists:foreach(fun(N) ->
                          Setter = spawn(fun() -> change_for_ever(N) end),
                          %% The setter is killed at a different point each time.
                          busy(N * 37 rem 1000),
                          exit(Setter, kill),
                          ok = await_consistent()
                  end,
                  lists:seq(1, 200)).


%% The process that makes a change is killed. The caller has the change made again.
killed_workers_are_made_good(_Config) ->
    ok = application:start(erlmcp_native),
    Self = self(),
    Killer = spawn_link(fun() -> kill_workers(Self, 0) end),
    Set = fun Set(N) ->
                  Threshold = 1000 + N,
                  try erlmcp_native:set(admission, #{threshold => Threshold}) of
                      ok -> ?assertMatch(#{threshold := Threshold}, ?C:get(admission))
                  catch
                      %% The process was killed three times in a row.
                      exit:killed -> ok
                  end,
                  receive
                      enough -> N
                  after
                      0 ->
                          Set(N + 1)
                  end
          end,
    ?assert(Set(1) >= 1),
    unlink(Killer),
    exit(Killer, kill),
    ok = erlmcp_native:set(admission, #{threshold => 5}),
    ok = is_in_force(admission, #{threshold => 5, sample_interval_ms => 100}).


kill_workers(Owner, 50) ->
    Owner ! enough,
    receive
    after
        infinity ->
            ok
    end;
kill_workers(Owner, Killed) ->
    case whereis(erlmcp_setting_lock) of
        undefined ->
            kill_workers(Owner, Killed);
        Worker ->
            _ = test_support:kill(Worker),
            kill_workers(Owner, Killed + 1)
    end.


change_for_ever(N) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 1 + N rem 100}),
    ok = erlmcp_native:set(circuit_breaker, #{timeout_ms => N}),
    ok = erlmcp_native:set(admission, #{threshold => 1 + N}),
    change_for_ever(N + 1).


busy(0) -> ok;
busy(N) ->
    _ = erlang:phash2(lists:seq(1, 20)),
    busy(N - 1).


%% A change that was in progress when its setter was killed is completed.
await_consistent() ->
    test_support:await(fun() -> lists:all(fun is_consistent/1, layers()) end).


is_consistent(Key) ->
    native(Key) =:= expected_native(Key, ?C:get(Key)).


%%% Where nothing runs


%% The application controller does not answer while it stops an application.
blocked_controller(_Config) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, in_blocked_controller)).


in_blocked_controller() ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    ok = sys:suspend(application_controller),
    Began = erlang:monotonic_time(millisecond),
    ok = erlmcp_native:set(admission, #{threshold => 5}),
    ok = erlmcp_native:set(admission, #{sample_interval_ms => 6}),
    ok = erlmcp_native:set(health, #{memory_bytes => 7}),
    true = erlang:monotonic_time(millisecond) - Began < 5000,
    ok = is_in_force(admission, #{threshold => 5, sample_interval_ms => 6}),
    #{memory_bytes := 7} = ?C:get(health),
    ok = sys:resume(application_controller),
    test_support:await(fun() ->
                               application:get_env(erlmcp_native, admission) =:= {ok, #{threshold => 5, sample_interval_ms => 6}}
                       end).


without_the_application(_Config) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, in_no_application)).


in_no_application() ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 5}),
    {5, 10000.0} = erlmcp_nif:shared_limits(),
    ok = erlmcp_native:set(token_bucket, #{rate_per_second => 6}),
    {5, 6.0} = erlmcp_nif:shared_limits(),
    ok = erlmcp_native:set(circuit_breaker, [{timeout_ms, 7}]),
    #{config := {50, 10000, 10, 7, 10}} = erlmcp_nif:breaker_stats(),
    %% The registry's process starts, and starts again after being killed: the values that were set stay.
    _ = [ begin
              {ok, Pid} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
              {5, 6.0} = erlmcp_nif:shared_limits(),
              #{config := {50, 10000, 10, 7, 10}} = erlmcp_nif:breaker_stats(),
              test_support:kill(Pid)
          end || _ <- [1, 2] ],
    false = lists:keymember(erlmcp_native, 1, application:which_applications()),
    ok.


large_values_are_kept(_Config) ->
    ok = application:start(erlmcp_native),
    ok = erlmcp_native:set(health, #{memory_bytes => 1 bsl 20_000}),
    ?assertMatch(#{memory_bytes := Bytes} when Bytes =:= 1 bsl 20_000, ?C:get(health)),
    ok = erlmcp_native:set(health, #{memory_bytes => 1, run_queue_per_scheduler => 1 bsl 9000}),
    ?assertMatch(#{memory_bytes := 1, run_queue_per_scheduler := N} when N =:= 1 bsl 9000, ?C:get(health)).


%%% Instruments


is_in_force(Key, Expected) ->
    ?assertEqual({Key, Expected}, {Key, ?C:get(Key)}),
    ?assertEqual({Key, expected_native(Key, Expected)}, {Key, native(Key)}).


native(token_bucket) ->
    erlmcp_nif:shared_limits();
native(admission) ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    Thresholds = lists:usort([ erlmcp_nif:admission_threshold(Shard)
                               || Shard <- lists:seq(0, Shards - 1) ]),
    {Thresholds, erlmcp_shard_sampler:interval_ms()};
native(circuit_breaker) ->
    maps:get(config, erlmcp_nif:breaker_stats());
native(health) ->
    health.


expected_native(token_bucket, #{capacity := Capacity, rate_per_second := Rate}) ->
    {Capacity, float(Rate)};
expected_native(token_bucket, infinity) ->
    infinity;
expected_native(admission, #{threshold := Threshold, sample_interval_ms := IntervalMs}) ->
    {[Threshold], IntervalMs};
expected_native(admission, infinity) ->
    %% The sampling interval stays.
    {[infinity], erlmcp_shard_sampler:interval_ms()};
expected_native(circuit_breaker, off) ->
    off;
expected_native(circuit_breaker, Map) ->
    list_to_tuple([ maps:get(Field, Map)
                    || Field <- [failure_threshold, window_ms, success_threshold, timeout_ms, probe_limit] ]);
expected_native(health, _Limits) ->
    health.


default_threshold() ->
    maps:get(threshold, ?C:default(admission)).
