%%% @private
%%% The application: checks the configuration, makes the default registry with it, sets the layers of
%%% backpressure and switches to the configured mode. Without the native library it does the last of these
%%% alone.
-module(erlmcp_native_app).

-behaviour(application).

-include_lib("kernel/include/logger.hrl").

-export([start/2, stop/1]).


-spec start(application:start_type(), []) -> {ok, pid()} | {error, term()}.
start(_Type, []) ->
    case erlmcp_native_config:check() of
        {ok, Limits} ->
            case erlmcp_rollout:wanted() of
                {ok, _Mode} -> start_with(erlmcp_native_registry:load_error(), Limits);
                {error, LoadError} -> {error, {nif_not_loaded, LoadError}}
            end;
        {error, _} = Error ->
            Error
    end.


-spec start_with(none | erlmcp_nif:load_error(), erlmcp_native_config:limits()) -> {ok, pid()} | {error, term()}.
start_with(none, Limits) ->
    make_default_registry(Limits),
    ok = erlmcp_backpressure:configure(),
    start_supervisor();
start_with(_LoadError, _Limits) ->
    start_supervisor().


-spec start_supervisor() -> {ok, pid()} | {error, term()}.
start_supervisor() ->
    show_logs(),
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


%% The default handler of OTP logs no domains but its own ones. A filter of ours adds ours; other
%% handlers are the user's business.
-define(LOG_FILTER, {fun logger_filters:domain/2, {log, sub, [erlmcp_native]}}).


-spec show_logs() -> ok.
show_logs() ->
    case logger:add_handler_filter(default, erlmcp_native, ?LOG_FILTER) of
        ok -> ok;
        {error, {already_exist, erlmcp_native}} -> ok;
        %% There is no default handler.
        {error, {not_found, default}} -> ok
    end.


-spec stop(term()) -> ok.
stop(_State) ->
    _ = erlmcp_native_registry:load_error() =:= none andalso erlmcp_backpressure:admit_everything(),
    _ = logger:remove_handler_filter(default, erlmcp_native),
    ok.
