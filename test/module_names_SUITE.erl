%%% The application has no name of erlmcp: no module except the two that a host deletes in favour of ours, and no ETS
%%% table.
%%%
%%% `upstream_modules.txt' lists the modules in the `src' folders of all generations of erlmcp. A release with two
%%% modules of one name is refused. On a plain code path the first one is loaded, and the application that needs the
%%% other one breaks.
-module(module_names_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).

-export([two_modules_have_names_of_erlmcp/1, no_table_has_a_name_of_erlmcp/1, no_process_has_a_name_of_erlmcp/1]).

%% Modules that a host deletes.
-define(REPLACED, [erlmcp_circuit_breaker, erlmcp_registry]).


suite() ->
    [{timetrap, {minutes, 1}}].


all() ->
    [two_modules_have_names_of_erlmcp, no_table_has_a_name_of_erlmcp, no_process_has_a_name_of_erlmcp].


init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    application:stop(erlmcp_native).


two_modules_have_names_of_erlmcp(Config) ->
    {ok, Ours} = application:get_key(erlmcp_native, modules),
    %% A compiled module that is missing in the .app file would be in a release, too.
    Compiled = [ list_to_atom(filename:basename(Beam, ".beam"))
                 || Beam <- filelib:wildcard(filename:join([code:lib_dir(erlmcp_native), "ebin", "*.beam"])) ],
    Upstream = upstream_modules(Config),
    ?assert(length(Ours) > 25),
    ?assert(length(Upstream) > 700),
    ?assertEqual(?REPLACED, shared(Ours, Upstream)),
    ?assertEqual(?REPLACED, shared(Compiled, Upstream)).


%% Everything that makes tables is in use.
no_table_has_a_name_of_erlmcp(_Config) ->
    Before = ets:all(),
    ok = erlmcp_circuit_breaker:register_breaker(?MODULE, #{}),
    {ok, _Value} = erlmcp_circuit_breaker:call(?MODULE, fun() -> {ok, value} end),
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = erlmcp_shard_registry:register_connection(?MODULE, self(), #{}),
    ok = erlmcp_shard_manager:route_message(?MODULE, message),
    Tables = [ begin
                   ok = erlmcp_rollout:set(Mode),
                   ok = erlmcp_registry:register_server(Mode, self(), #{}),
                   ets:all()
               end || Mode <- [current, {percent, 50}, '100x'] ],
    Names = lists:usort([ Name || Table <- lists:append([Before | Tables]), Name <- [ets:info(Table, name)], is_atom(Name) ]),
    %% The list includes a table of the application.
    ?assertEqual(true, lists:member(erlmcp_shard_sampler, Names)),
    ?assertEqual([], [ Name || Name <- Names, is_table_of_erlmcp(Name) ]),
    ok = gen_server:stop(Registry),
    ok = erlmcp_circuit_breaker:unregister_breaker(?MODULE),
    ok = erlmcp_shard_registry:unregister_connection(?MODULE).


%% The supervisors of erlmcp start these two, and fail if the names are taken.
no_process_has_a_name_of_erlmcp(_Config) ->
    ?assertEqual([], [ Name || Name <- ?REPLACED, whereis(Name) =/= undefined ]).


%%% Instruments


shared(Ours, Upstream) ->
    ordsets:intersection(lists:usort(Ours), Upstream).


upstream_modules(Config) ->
    {ok, Text} = file:read_file(filename:join(proplists:get_value(data_dir, Config), "upstream_modules.txt")),
    lists:usort([ binary_to_atom(Name) || Name <- string:lexemes(Text, "\n") ]).


is_table_of_erlmcp(erlmcp_circuit_breaker_registry) ->
    true;
is_table_of_erlmcp(Name) ->
    re:run(atom_to_list(Name), "^erlmcp_shard_[0-9]+$") =/= nomatch.
