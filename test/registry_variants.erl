%%% The registries on which the cases of several suites run: the default one without an argument, the atom
%%% `default', and registries from erlmcp_shard_registry:new/1. A case leaves no entries in the default
%%% registry.
-module(registry_variants).

-export([groups/1, init_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([api/3, default_counts/0, nif_registry/1, registry/1, settled_configs/1]).

-import(test_support, [on_every_scheduler/1]).

-define(M, erlmcp_shard_registry).


%% The same cases on each kind of registry.
-spec groups([atom()]) -> [{default | named | own, [], [atom()]}].
groups(Cases) ->
    [ {Group, [], Cases} || Group <- [default, named, own] ].


init_per_group(Group, Config) when Group =:= default; Group =:= named; Group =:= own ->
    [{on, Group} | Config];
init_per_group(_Group, Config) ->
    Config.


init_per_testcase(_Case, Config) ->
    Found = default_counts(),
    Registry =
        case proplists:get_value(on, Config) of
            undefined -> none;
            default -> default;
            named -> {explicit, default};
            own -> {explicit, ?M:new(#{shards => 16})}
        end,
    [{found, Found}, {registry, Registry} | Config].


%% The processes of a case exit with it, which removes their entries.
end_per_testcase(_Case, Config) ->
    Found = proplists:get_value(found, Config),
    try
        test_support:await(fun() -> default_counts() =:= Found end)
    catch
        error:{deadline_passed, _} -> {fail, {default_registry, {found, Found}, {left, default_counts()}}}
    end.


default_counts() ->
    [ erlmcp_nif:count(default, NS) || NS <- [server, transport, connection, member] ].


%% A removed entry is freed some operations later, on the thread that removed it.
settled_configs(R) ->
    Registry = nif_registry(R),
    %% Registries of earlier cases may still be garbage.
    [ garbage_collect(Pid) || Pid <- processes() ],
    Nudge = fun(Scheduler) ->
                    [ begin
                          Id = <<"nudge", Scheduler:16, N:32>>,
                          ok = erlmcp_nif:register(Registry, connection, Id, self(), self(), nudge),
                          ok = erlmcp_nif:unregister(Registry, connection, Id)
                      end || N <- lists:seq(1, 300) ]
            end,
    on_every_scheduler(Nudge),
    on_every_scheduler(Nudge),
    erlmcp_nif:distinct_configs().


%%% Registries under test


registry(Config) ->
    proplists:get_value(registry, Config).


%% Calls a function with or without a registry as its first argument.
api(default, Function, Arguments) -> apply(?M, Function, Arguments);
api({explicit, Registry}, Function, Arguments) -> apply(?M, Function, [Registry | Arguments]).


nif_registry(default) -> default;
nif_registry({explicit, Registry}) -> Registry.
