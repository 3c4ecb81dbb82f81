%%% @private
%%% The application: checks the configuration and makes the default registry with it.
-module(erlmcp_native_app).

-behaviour(application).

-include_lib("kernel/include/logger.hrl").

-export([start/2, stop/1]).


-spec start(application:start_type(), []) -> {ok, pid()} | {error, term()}.
start(_Type, []) ->
    case erlmcp_native_registry:load_error() of
        none -> configure();
        LoadError -> {error, {nif_not_loaded, LoadError}}
    end.


-spec configure() -> {ok, pid()} | {error, term()}.
configure() ->
    case erlmcp_native_config:check() of
        {ok, Limits} ->
            make_default_registry(Limits),
            erlmcp_native_sup:start_link();
        {error, _} = Error ->
            Error
    end.


%% The default registry outlives the application, and may have been used before it was started.
-spec make_default_registry(erlmcp_native_config:limits()) -> ok.
make_default_registry({Shards, MaxEntries, MaxIdBytes}) ->
    case erlmcp_native_registry:make_default(Shards, MaxEntries, MaxIdBytes) of
        created ->
            ok;
        exists ->
            Wanted = #{shards => Shards, max_entries => MaxEntries, max_id_bytes => MaxIdBytes},
            warn_unless_equal(erlmcp_shard_registry:limits(), Wanted)
    end.


-spec warn_unless_equal(erlmcp_shard_registry:options(), erlmcp_shard_registry:options()) -> ok.
warn_unless_equal(Limits, Limits) ->
    ok;
warn_unless_equal(Existing, Wanted) ->
    ?LOG_WARNING("erlmcp_native: the default registry exists already with ~p and keeps these bounds; "
                 "the configured ~p take effect if the application is started before the registry is "
                 "first used",
                 [Existing, Wanted],
                 #{domain => [erlmcp_native]}).


-spec stop(term()) -> ok.
stop(_State) ->
    ok.
