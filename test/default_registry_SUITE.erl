%%% The default registry and the application: bounds from the environment, and data that outlives the application.
%%%
%%% The default registry is made only once in the life of a node, so each case runs in a peer node.
-module(default_registry_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).
-export([i_prints_it/1,
         config_errors_name_key_value_expectation/1,
         application_starts_with_defaults/1,
         application_bounds_the_default_registry/1,
         application_refuses_a_wrong_environment/1,
         default_registry_outlives_the_application/1,
         default_registry_made_before_the_application/1]).

%% Called in peer nodes
-export([in_app_defaults/0, in_app_bounds/0, in_app_refuses/0, in_outlives/0, in_made_before/0]).

-import(test_support, [process/0, result/1, stop/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [i_prints_it,
     config_errors_name_key_value_expectation,
     application_starts_with_defaults,
     application_bounds_the_default_registry,
     application_refuses_a_wrong_environment,
     default_registry_outlives_the_application,
     default_registry_made_before_the_application].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(Case, Config) ->
    registry_variants:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_variants:end_per_testcase(Case, Config).


%%% The node


i_prints_it(_Config) ->
    ok = ?M:register_connection(<<"i">>, self(), none),
    ct:capture_start(),
    Result = erlmcp_native:i(),
    ct:capture_stop(),
    Text = lists:flatten(ct:capture_get()),
    ok = ?M:unregister_connection(<<"i">>),
    ?assertEqual(ok, Result),
    Info = erlmcp_native:info(),
    [ ?assertNotEqual({nomatch, Word}, {string:find(Text, Word), Word})
      || Word <- [maps:get(version, Info),
                  "OTP",
                  "loaded",
                  "servers",
                  "transports",
                  "connections",
                  "bindings",
                  "shards",
                  "2000000"] ].


config_errors_name_key_value_expectation(_Config) ->
    Wrong = [{shards, 63, "power of two"},
             {shards, 0, "1024"},
             {shards, -64, "1024"},
             {shards, 2048, "1024"},
             {shards, "64", "1024"},
             {max_entries, 0, "268435456"},
             {max_entries, infinity, "integer"},
             {max_entries, (1 bsl 28) + 1, "268435456"},
             {max_id_bytes, 0, "16777216"},
             {max_id_bytes, (1 bsl 24) + 1, "16777216"},
             {shard, 64, "shards"}],
    [ begin
          {error, {bad_option, K, V, Expected}} =
              erlmcp_native_config:registry_limits(#{Key => Value}),
          ?assertEqual({Key, Value}, {K, V}),
          ?assertNotEqual({nomatch, Key}, {string:find(Expected, Part), Key}),
          ?assert(io_lib:printable_unicode_list(Expected))
      end || {Key, Value, Part} <- Wrong ],
    ?assertEqual({ok, {64, 2_000_000, 65_535}}, erlmcp_native_config:registry_limits(#{})),
    ?assertEqual({ok, {2, 3, 4}},
                 erlmcp_native_config:registry_limits(#{
                                                        shards => 2,
                                                        max_entries => 3,
                                                        max_id_bytes => 4
                                                       })).


application_starts_with_defaults(_Config) -> in_peer(in_app_defaults).


in_app_defaults() ->
    ok = application:start(erlmcp_native),
    true = is_pid(whereis(erlmcp_native_sup)),
    %% The host starts these.
    undefined = whereis(erlmcp_registry),
    undefined = whereis(erlmcp_circuit_breaker),
    #{shards := 64, max_entries := 2_000_000, max_id_bytes := 65_535} = ?M:limits(),
    #{application := running} = erlmcp_native:info(),
    ok = application:stop(erlmcp_native),
    #{application := stopped} = erlmcp_native:info(),
    ok.


application_bounds_the_default_registry(_Config) -> in_peer(in_app_bounds).


in_app_bounds() ->
    ok = application:load(erlmcp_native),
    [ ok = application:set_env(erlmcp_native, Key, Value)
      || {Key, Value} <- [{shards, 4}, {max_entries, 5}, {max_id_bytes, 6}, {same_pid, ok}] ],
    ok = application:start(erlmcp_native),
    #{shards := 4, max_entries := 5, max_id_bytes := 6} = ?M:limits(),
    3 = lists:max([ ?M:get_shard_id(<<N>>) || N <- lists:seq(0, 255) ]),
    badarg = result(fun() ->
                            ?M:register_connection(<<"longer">>, self(), none),
                            ?M:register_connection(<<"longer.">>, self(), none)
                    end),
    [ ok = ?M:register_connection(<<N>>, self(), none) || N <- lists:seq(1, 4) ],
    {error, registry_full} = ?M:register_connection(<<5>>, self(), none),
    {ok, _} = erlmcp_registry:start_link(),
    {error, registry_full} = erlmcp_registry:register_server(<<1>>, self(), none),
    ok.


application_refuses_a_wrong_environment(_Config) -> in_peer(in_app_refuses).


in_app_refuses() ->
    ok = application:load(erlmcp_native),
    [ begin
          ok = application:set_env(erlmcp_native, Key, Value),
          {Key, {error, {{bad_option, Key, Value, [_ | _]}, {erlmcp_native_sup, start, _}}}} =
              {Key, application:start(erlmcp_native)},
          undefined = whereis(erlmcp_native_sup),
          ok = application:unset_env(erlmcp_native, Key)
      end || {Key, Value} <- [{shards, 3},
                              {shards, undefined},
                              {max_entries, -1},
                              {max_entries, "2"},
                              {max_id_bytes, 0},
                              {same_pid, sometimes},
                              {same_pid, already_registred},
                              {shard, 64},
                              {'Shards', 64}] ],
    ok = application:start(erlmcp_native),
    #{shards := 64} = ?M:limits(),
    ok.


default_registry_outlives_the_application(_Config) -> in_peer(in_outlives).


in_outlives() ->
    ok = application:start(erlmcp_native),
    Pid = process(),
    ok = ?M:register_connection(<<"outlives">>, Pid, #{caps => [1]}),
    {ok, _} = erlmcp_registry:start_link(),
    ok = erlmcp_registry:register_server(<<"server">>, Pid, none),
    [ begin
          ok = application:stop(erlmcp_native),
          {ok, {Pid, #{caps := [1]}}} = ?M:lookup_connection(<<"outlives">>),
          {ok, {Pid, none}} = erlmcp_registry:find_server(<<"server">>),
          ok = erlmcp_registry:route_to_server(<<"server">>, <<"t">>, {self(), ping}),
          receive {Pid, pong} -> ok end,
          ok = application:start(erlmcp_native),
          {ok, {Pid, #{caps := [1]}}} = ?M:lookup_connection(<<"outlives">>)
      end || _ <- lists:seq(1, 3) ],
    ok = application:stop(erlmcp_native),
    ok = application:unload(erlmcp_native),
    stop(Pid),
    {error, not_found} = ?M:lookup_connection(<<"outlives">>),
    ok.


%% An existing default registry keeps its bounds and entries, and the application starts.
default_registry_made_before_the_application(_Config) -> in_peer(in_made_before).


in_made_before() ->
    ok = ?M:register_connection(<<"before">>, self(), none),
    ok = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, shards, 2),
    ok = application:start(erlmcp_native),
    #{shards := 64} = ?M:limits(),
    {ok, {_, none}} = ?M:lookup_connection(<<"before">>),
    ok.


%%% Peer nodes


in_peer(Function) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, Function, [], #{timeout_ms => 120_000})).
