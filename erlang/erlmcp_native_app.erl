%%% @private
%%% The application: checks the configuration, makes the default registry with it, sets the layers of
%%% backpressure and switches to the configured mode. Without the native library it only switches to
%%% the mode.
-module(erlmcp_native_app).

-behaviour(application).

-export([start/2, stop/1]).


-spec start(application:start_type(), []) -> {ok, pid()} | {error, term()}.
start(_Type, []) ->
    case erlmcp_native_config:check() of
        {ok, Limits} ->
            case erlmcp_rollout:wanted() of
                {ok, _Mode} -> start_with(erlmcp_registry_native:load_error(), Limits);
                {error, LoadError} -> {error, {nif_not_loaded, LoadError}}
            end;
        {error, _} = Error ->
            Error
    end.


-spec start_with(none | erlmcp_nif:load_error(), erlmcp_native_config:limits()) -> {ok, pid()} | {error, term()}.
start_with(none, Limits) ->
    make_default_registry(Limits),
    case erlmcp_native_config:configure() of
        ok ->
            case start_supervisor() of
                {ok, Supervisor} ->
                    ok = erlmcp_native_config:begin_admission(),
                    {ok, Supervisor};
                Error ->
                    Error
            end;
        {error, _} = Error ->
            Error
    end;
start_with(_LoadError, _Limits) ->
    start_supervisor().


-spec start_supervisor() -> {ok, pid()} | {error, term()}.
start_supervisor() ->
    case erlmcp_rollout:configure() of
        ok ->
            erlmcp_native_sup:start_link();
        {error, _} = Error ->
            ok = stop([]),
            Error
    end.


%% The default registry outlives the application, and may have been used before it was started.
-spec make_default_registry(erlmcp_native_config:limits()) -> ok.
make_default_registry({Shards, MaxEntries, MaxIdBytes}) ->
    case erlmcp_registry_native:make_default(Shards, MaxEntries, MaxIdBytes) of
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
    erlmcp_native_log:log(warning, default_registry_exists, #{existing => Existing, configured => Wanted}).


-spec stop(term()) -> ok.
stop(_State) ->
    erlmcp_native_config:forget().
