%%% @private
%%% The application: checks the configuration and makes the default registry with it.
-module(erlmcp_native_app).

-behaviour(application).

-include_lib("kernel/include/logger.hrl").

-export([start/2, stop/1]).


-spec start(application:start_type(), []) -> {ok, pid()} | {error, term()}.
start(_Type, []) ->
    case erlmcp_nif:load_error() of
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
make_default_registry({Shards, MaxEntries, MaxIdBytes} = Limits) ->
    created =:= erlmcp_nif:make_default(Shards, MaxEntries, MaxIdBytes) orelse
    Limits =:= erlmcp_nif:limits(default) orelse
    ?LOG_WARNING(
      "erlmcp_native: the default registry exists already with {shards, max_entries, "
      "max_id_bytes} = ~p and keeps them; the configured ~p take effect when the node is "
      "started again and the application is started before the registry is used",
      [erlmcp_nif:limits(default), Limits],
      #{domain => [erlmcp_native]}),
    ok.


-spec stop(term()) -> ok.
stop(_State) ->
    ok.
