%%% The contract of erlmcp_registry: names of tools and transports; modules and tables of the host.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_names_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [module/1]).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               module =>
                                   [names,
                                    normalized_names,
                                    modules_and_tables_of_the_host]
                              }).


init_per_group(Group, Config) ->
    registry_contract:init_per_group(Group, Config).


end_per_group(Group, Config) ->
    registry_contract:end_per_group(Group, Config).


init_per_testcase(Case, Config) ->
    registry_contract:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_contract:end_per_testcase(Case, Config).


%%% The module and the process


names(Config) ->
    Module = module(Config),
    lists:foreach(
      fun(Validate) ->
              _ = [ ?assertEqual(ok, Module:Validate(Name))
                    || Name <- [<<"read_file-2">>,
                                <<"名前"/utf8>>,
                                <<"हिन्दी"/utf8>>,
                                <<"👍🏽"/utf8>>,
                                <<"👨‍👩‍👧_🇫🇷-❤️"/utf8>>,
                                <<"أداة_٣"/utf8>>,
                                <<"a b">>,
                                <<"files/read.text:v1@example.org">>,
                                <<"инструмент 2"/utf8>>,
                                <<" ">>,
                                binary:copy(<<"é"/utf8>>, 255)] ],
              _ = [ ?assertEqual({error, Error}, Module:Validate(Name))
                    || {Error, Name} <- [{empty, <<>>},
                                         {too_long, binary:copy(<<"x">>, 256)},
                                         {invalid_characters, <<"a\tb">>},
                                         {invalid_characters, <<"a", 16#A0/utf8, "b">>},
                                         {invalid_characters, <<"a,b">>},
                                         {invalid_characters, <<"a\\b">>},
                                         {invalid_characters, <<"<a>">>},
                                         {too_long, binary:copy(<<"/">>, 256)},
                                         {invalid_characters, <<"a\n">>},
                                         {invalid_characters, <<0>>},
                                         {invalid_characters, <<"a", 255>>},
                                         {invalid_characters, <<16#C3>>},
                                         {too_long, binary:copy(<<"e", 769/utf8>>, 256)},
                                         {invalid_binary, name},
                                         {invalid_binary, "name"},
                                         {invalid_binary, 17}] ]
      end,
      [validate_tool_name, validate_transport_name]).


normalized_names(Config) ->
    Module = module(Config),
    ?assertEqual(?MODULE, Module:normalize_name(atom_to_binary(?MODULE))),
    ?assertEqual(?MODULE, Module:normalize_name(?MODULE)),
    Unknown = <<"never an atom ", (integer_to_binary(erlang:unique_integer([positive])))/binary>>,
    ?assertEqual(Unknown, Module:normalize_name(Unknown)),
    Composed = unicode:characters_to_nfc_binary(<<"é"/utf8, Unknown/binary>>),
    ?assertEqual(Composed, Module:normalize_name(unicode:characters_to_nfd_binary(Composed))),
    Long = binary:copy(<<"x">>, 1000),
    ?assertEqual(Long, Module:normalize_name(Long)),
    ?assertError(badarg, Module:normalize_name(<<255>>)),
    _ = [ ?assertError(badarg, binary_to_existing_atom(Name)) || Name <- [Unknown, Composed] ].


%% A release refuses two modules of one name, and later erlmcp has these.
modules_and_tables_of_the_host(_Config) ->
    ?assertEqual([],
                 [ Module
                   || Module <- [erlmcp_recovery_manager,
                                 erlmcp_health_monitor,
                                 erlmcp_metrics,
                                 erlmcp_metrics_aggregator,
                                 erlmcp_capability_cache,
                                 erlmcp_rate_limiter],
                      code:which(Module) =/= non_existing ]),
    ?assertEqual([],
                 [ Table
                   || Table <- ets:all(),
                      is_atom(Table),
                      Table =:= erlmcp_circuit_breaker_registry orelse
                      lists:prefix("erlmcp_shard_", atom_to_list(Table)) ]).
