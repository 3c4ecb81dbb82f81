%%% The settings of backpressure in the configuration.
%%%
%%% The contract:
%%% An invalid value is refused with its key, the value and what was expected. This holds at the start of the
%%% application and in a running system, and changes nothing. A valid value is in force at once. Without the application
%%% the native layers have the documented defaults of the configuration.
-module(config_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_testcase/2, end_per_testcase/2]).

-export([wrong_values_stop_the_start/1,
         wrong_values_are_refused_live/1,
         right_values_are_in_force/1,
         values_at_the_bounds/1,
         maps_are_completed/1,
         only_some_keys_change_live/1,
         wrong_environment_of_another_key/1,
         registry_without_the_application/1,
         environment_is_in_force_after_the_start/1,
         native_defaults_are_the_documented_ones/1]).

%% Called in peer nodes
-export([in_native_defaults/0, in_registry_alone/0]).

-define(C,    erlmcp_native_config).
-define(KEYS, [backpressure, token_bucket, admission, circuit_breaker]).


suite() ->
    [{timetrap, {minutes, 1}}].


all() ->
    [wrong_values_stop_the_start,
     wrong_values_are_refused_live,
     right_values_are_in_force,
     values_at_the_bounds,
     maps_are_completed,
     only_some_keys_change_live,
     wrong_environment_of_another_key,
     registry_without_the_application,
     environment_is_in_force_after_the_start,
     native_defaults_are_the_documented_ones].


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = application:stop(erlmcp_native),
    _ = [ application:unset_env(erlmcp_native, Key) || {Key, _} <- application:get_all_env(erlmcp_native) ],
    ok = application:start(erlmcp_native),
    application:stop(erlmcp_native).


%% Key, value, and a part of what was expected.
wrong_values() ->
    [{backpressure, true, "on or off"},
     {backpressure, undefined, "on or off"},
     {backpressure, "on", "on or off"},
     {token_bucket, unlimited, "infinity"},
     {token_bucket, off, "infinity"},
     {token_bucket, [{capacity, 0}], "capacity"},
     {token_bucket, #{capacity => 0}, "2^32 - 1"},
     {token_bucket, #{capacity => 1.5}, "an integer"},
     {token_bucket, #{capacity => 1 bsl 32}, "2^32 - 1"},
     {token_bucket, #{rate_per_second => 0}, "1/3600"},
     {token_bucket, #{rate_per_second => 1.1e9}, "10^9"},
     {token_bucket, #{rate_per_second => infinity}, "a number"},
     {token_bucket, #{rate => 1}, "rate_per_second"},
     {token_bucket, #{capacity => (1 bsl 32) - 1, rate_per_second => 1}, "104 days"},
     {admission, off, "infinity"},
     {admission, 10000, "threshold"},
     {admission, #{threshold => 0}, "from 1 to 2^40"},
     {admission, #{threshold => infinity}, "from 1 to 2^40"},
     {admission, #{threshold => (1 bsl 40) + 1}, "from 1 to 2^40"},
     {admission, #{sample_interval_ms => 0}, "from 1 to 86400000"},
     {admission, #{sample_interval_ms => 86_400_001}, "from 1 to 86400000"},
     {admission, #{treshold => 1}, "threshold"},
     {circuit_breaker, infinity, "off"},
     {circuit_breaker, on, "off"},
     {circuit_breaker, #{failure_threshold => 0}, "from 1 to 65536"},
     {circuit_breaker, #{failure_threshold => 65_537}, "from 1 to 65536"},
     {circuit_breaker, #{window_ms => 0}, "2^42 - 1"},
     {circuit_breaker, #{window_ms => 1 bsl 42}, "2^42 - 1"},
     {circuit_breaker, #{success_threshold => 0}, "from 1 to 1023"},
     {circuit_breaker, #{success_threshold => 1024}, "from 1 to 1023"},
     {circuit_breaker, #{timeout_ms => -1}, "from 0 to 2^42 - 1"},
     {circuit_breaker, #{timeout_ms => 1 bsl 42}, "from 0 to 2^42 - 1"},
     {circuit_breaker, #{probe_limit => 0}, "from 1 to 1023"},
     {circuit_breaker, #{probe_limit => 1024}, "from 1 to 1023"},
     {circuit_breaker, #{probe_limit => 10, timeout => 1}, "timeout_ms"}].


wrong_values_stop_the_start(_Config) ->
    lists:foreach(fun({Key, Value, Part}) ->
                          Before = in_force(),
                          ok = application:set_env(erlmcp_native, Key, Value),
                          {error, {Reason, {erlmcp_native_sup, start, _}}} = application:start(erlmcp_native),
                          ok = check_error(Reason, Key, Value, Part),
                          ?assertEqual(Before, in_force()),
                          ok = application:unset_env(erlmcp_native, Key)
                  end,
                  wrong_values()).


wrong_values_are_refused_live(_Config) ->
    ok = application:start(erlmcp_native),
    lists:foreach(fun({Key, Value, Part}) ->
                          Before = {in_force(), application:get_all_env(erlmcp_native)},
                          {error, Reason} = erlmcp_native:set(Key, Value),
                          ok = check_error(Reason, Key, Value, Part),
                          ?assertEqual(Before, {in_force(), application:get_all_env(erlmcp_native)})
                  end,
                  wrong_values()).


check_error({bad_option, Key, Value, Expected}, Key, Value, Part) ->
    ?assert(io_lib:printable_unicode_list(Expected)),
    ?assertNotEqual({Key, Value, nomatch}, {Key, Value, string:find(Expected, Part)}).


right_values_are_in_force(_Config) ->
    ok = application:start(erlmcp_native),
    lists:foreach(fun({Key, Value, Expected}) ->
                          ?assertEqual({Key, ok}, {Key, erlmcp_native:set(Key, Value)}),
                          ?assertEqual({ok, Value}, application:get_env(erlmcp_native, Key)),
                          ?assertEqual({Key, Expected}, {Key, maps:get(Key, in_force())})
                  end,
                  [{token_bucket, #{capacity => 7, rate_per_second => 0.5}, {7, 0.5}},
                   {token_bucket, infinity, infinity},
                   {token_bucket, #{capacity => 7, rate_per_second => 3}, {7, 3.0}},
                   {admission, #{threshold => 12, sample_interval_ms => 34}, 12},
                   {admission, infinity, infinity},
                   {admission, #{threshold => 13, sample_interval_ms => 34}, 13},
                   {circuit_breaker,
                    #{
                      failure_threshold => 2,
                      window_ms => 3,
                      success_threshold => 4,
                      timeout_ms => 0,
                      probe_limit => 5
                     },
                    {2, 3, 4, 0, 5}},
                   {circuit_breaker, off, off},
                   {circuit_breaker,
                    #{
                      failure_threshold => 50,
                      window_ms => 10000,
                      success_threshold => 10,
                      timeout_ms => 30000,
                      probe_limit => 1
                     },
                    {50, 10000, 10, 30000, 1}}]),
    %% Off as a whole, and then as before.
    Before = in_force(),
    ok = erlmcp_native:set(backpressure, off),
    ?assertMatch(#{admission := infinity, circuit_breaker := off}, in_force()),
    ok = erlmcp_native:set(backpressure, on),
    ?assertEqual(Before, in_force()).


values_at_the_bounds(_Config) ->
    ok = application:start(erlmcp_native),
    _ = [ ?assertEqual({Key, Value, ok}, {Key, Value, erlmcp_native:set(Key, Value)})
          || {Key, Value} <- [{token_bucket, #{capacity => 1, rate_per_second => 1 / 3600}},
                              {token_bucket, #{capacity => (1 bsl 32) - 1, rate_per_second => 1_000_000_000}},
                              {token_bucket, #{capacity => 9_007_199, rate_per_second => 1}},
                              {admission, #{threshold => 1, sample_interval_ms => 86_400_000}},
                              {admission, #{threshold => 1 bsl 40, sample_interval_ms => 1}},
                              {circuit_breaker,
                               #{
                                 failure_threshold => 65_536,
                                 window_ms => (1 bsl 42) - 1,
                                 success_threshold => 1023,
                                 timeout_ms => (1 bsl 42) - 1,
                                 probe_limit => 1023
                                }},
                              {circuit_breaker,
                               #{
                                 failure_threshold => 1,
                                 window_ms => 1,
                                 success_threshold => 1,
                                 timeout_ms => 0,
                                 probe_limit => 1
                                }}] ],
    ok.


maps_are_completed(_Config) ->
    ok = application:start(erlmcp_native),
    ok = erlmcp_native:set(token_bucket, #{capacity => 3}),
    ?assertEqual(#{capacity => 3, rate_per_second => 10000}, ?C:get(token_bucket)),
    ok = erlmcp_native:set(admission, #{sample_interval_ms => 7}),
    ?assertEqual(#{threshold => auto, sample_interval_ms => 7}, ?C:get(admission)),
    ok = erlmcp_native:set(circuit_breaker, #{}),
    ?assertEqual(?C:default(circuit_breaker), ?C:get(circuit_breaker)).


only_some_keys_change_live(_Config) ->
    ok = application:start(erlmcp_native),
    _ = [ begin
              {error, {bad_option, Key, Value, Expected}} = erlmcp_native:set(Key, Value),
              [ ?assertNotEqual(nomatch, string:find(Expected, atom_to_list(Known))) || Known <- ?KEYS ],
              ?assertEqual(undefined, application:get_env(erlmcp_native, Key))
          end || {Key, Value} <- [{shards, 64}, {max_entries, 1}, {max_id_bytes, 1}, {same_pid, ok}, {admision, infinity}] ],
    ?assertMatch({error, {bad_option, "admission", infinity, _}}, erlmcp_native:set("admission", infinity)).


%% Some keys are applied together: none is applied if one of them is invalid. The application validates all of them when
%% it starts, so the case runs without it.
wrong_environment_of_another_key(_Config) ->
    _ = [ begin
              ok = application:set_env(erlmcp_native, Wrong, Value),
              Before = {in_force(), maps:get(backpressure, erlmcp_native:info()), application:get_all_env(erlmcp_native)},
              _ = [ ?assertMatch({error, {bad_option, Wrong, Value, [_ | _]}}, erlmcp_native:set(Key, ?C:default(Key)))
                    || Key <- ?KEYS, Key =/= Wrong ],
              ?assertMatch({error, {bad_option, Wrong, Value, _}}, erlmcp_native:set(backpressure, off)),
              ?assertEqual(Before, {in_force(), maps:get(backpressure, erlmcp_native:info()), application:get_all_env(erlmcp_native)}),
              %% The invalid key itself can be corrected.
              ok = erlmcp_native:set(Wrong, ?C:default(Wrong))
          end || {Wrong, Value} <- [{token_bucket, [{capacity, 0}]},
                                    {admission, unlimited},
                                    {circuit_breaker, #{timeout => 1}}] ],
    ok.


%% The registry applies the environment without the application, except for settings that need a sampler.
registry_without_the_application(_Config) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, in_registry_alone)).


in_registry_alone() ->
    Route = fun() ->
                    {ok, _} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
                    ok = erlmcp_registry:register_server(s, self(), #{}),
                    ok = erlmcp_registry:register_transport(t, self(), #{}),
                    Routed = [ erlmcp_registry:route_to_server(s, t, N) || N <- lists:seq(1, 3000) ],
                    ok = gen_server:stop(erlmcp_registry),
                    _ = test_support:flush(),
                    #{backpressure := #{backpressure := Backpressure}} = erlmcp_native:info(),
                    {Backpressure, lists:usort(Routed), in_force()}
            end,
    Defaults = #{token_bucket => {1000, 10000.0}, admission => infinity, circuit_breaker => {50, 10000, 10, 30000, 10}},
    {on, [ok, {error, rate_limited}], Defaults} = Route(),
    _ = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, backpressure, off),
    {off, [ok], #{circuit_breaker := off}} = Route(),
    ok = application:set_env(erlmcp_native, backpressure, on),
    {on, [ok, {error, rate_limited}], Defaults} = Route(),
    ok = application:set_env(erlmcp_native, token_bucket, infinity),
    {on, [ok], #{token_bucket := infinity}} = Route(),
    %% An invalid value changes nothing and stops no process.
    ok = application:set_env(erlmcp_native, token_bucket, [{capacity, 0}]),
    {on, [ok], #{token_bucket := infinity}} = Route(),
    ok.


environment_is_in_force_after_the_start(_Config) ->
    Settings = #{
                 token_bucket => #{capacity => 9, rate_per_second => 9},
                 admission => #{threshold => 99},
                 circuit_breaker => off
                },
    _ = [ ok = application:set_env(erlmcp_native, Key, Value) || {Key, Value} <- maps:to_list(Settings) ],
    ok = application:start(erlmcp_native),
    ?assertEqual(#{token_bucket => {9, 9.0}, admission => 99, circuit_breaker => off}, in_force()),
    ok = application:stop(erlmcp_native),
    ok = application:set_env(erlmcp_native, backpressure, off),
    ok = application:start(erlmcp_native),
    ?assertMatch(#{admission := infinity, circuit_breaker := off}, in_force()).


native_defaults_are_the_documented_ones(_Config) ->
    #{capacity := Capacity, rate_per_second := Rate} = ?C:default(token_bucket),
    Circuit = ?C:default(circuit_breaker),
    %% No process samples, so admission control has no bound.
    ?assertEqual(#{
                   token_bucket => {Capacity, float(Rate)},
                   admission => infinity,
                   circuit_breaker =>
                       list_to_tuple([ maps:get(Key, Circuit)
                                       || Key <- [failure_threshold, window_ms, success_threshold, timeout_ms, probe_limit] ])
                  },
                 test_support:in_peer(?MODULE, in_native_defaults)).


in_native_defaults() ->
    in_force().


%%% Instruments


%% The settings in the native layers.
in_force() ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    [Threshold] = lists:usort([ maps:get(threshold, erlmcp_admission_control:get_shard_stats(Shard))
                                || Shard <- lists:seq(0, Shards - 1) ]),
    #{
      token_bucket => erlmcp_nif:shared_limits(),
      admission => Threshold,
      circuit_breaker => maps:get(config, erlmcp_nif:breaker_stats())
     }.
