%% The application: its start with good and bad configuration, and the face it shows in the shell.
-module(erlmcp_native_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_testcase/2, end_per_testcase/2]).
-export([starts_and_stops/1,
         refuses_a_bad_environment/1,
         keeps_an_existing_default_registry/1,
         info_is_complete/1,
         i_prints_an_overview/1]).


all() ->
    [starts_and_stops,
     refuses_a_bad_environment,
     keeps_an_existing_default_registry,
     info_is_complete,
     i_prints_an_overview].


init_per_testcase(_Case, Config) ->
    _ = application:load(erlmcp_native),
    Config.


end_per_testcase(_Case, _Config) ->
    _ = application:stop(erlmcp_native),
    _ = [ application:unset_env(erlmcp_native, Key)
          || {Key, _} <- application:get_all_env(erlmcp_native) ],
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


%% It cannot be changed once it is there; the application says so and goes on.
keeps_an_existing_default_registry(_Config) ->
    Limits = #{shards := Shards} = erlmcp_shard_registry:limits(),
    application:set_env(erlmcp_native, shards, Shards * 2),
    ok = application:start(erlmcp_native),
    ?assertEqual(Limits, erlmcp_shard_registry:limits()).


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
