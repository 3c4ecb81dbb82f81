%%% @doc The host's API: servers, transports, and what they send each other through the registry.
-module(host_app).

-export([start_server/2, start_transport/2, call/2, publish/2, events/1]).


%% @doc Starts a server, which registers itself with `Config'.
-spec start_server(erlmcp_registry:server_id(), map()) -> {ok, pid()} | {error, term()}.
start_server(Id, Config) ->
    host_app_sup:start_child(host_app_server_sup, [Id, Config]).


%% @doc Starts a transport, which registers itself with `Config'; the config's `server_id' binds it.
-spec start_transport(erlmcp_registry:transport_id(), map()) -> {ok, pid()} | {error, term()}.
start_transport(Id, Config) ->
    host_app_sup:start_child(host_app_transport_sup, [Id, Config]).


%% @doc Sends a request from a transport to its server, and waits for the answer.
-spec call(erlmcp_registry:transport_id(), term()) ->
          {ok, term()} | {error, not_bound | not_found}.
call(TransportId, Request) ->
    case erlmcp_registry:find_transport(TransportId) of
        {ok, {Pid, _Config}} -> host_app_transport:call(Pid, Request);
        {error, not_found} -> {error, not_found}
    end.


%% @doc Sends an event from a server to every transport bound to it.
-spec publish(erlmcp_registry:server_id(), term()) -> ok | {error, not_found}.
publish(ServerId, Event) ->
    case erlmcp_registry:find_server(ServerId) of
        {ok, {Pid, _Config}} -> host_app_server:publish(Pid, Event);
        {error, not_found} -> {error, not_found}
    end.


%% @doc The events that a transport has received.
-spec events(erlmcp_registry:transport_id()) ->
          {ok, [{erlmcp_registry:server_id(), term()}]} | {error, not_found}.
events(TransportId) ->
    case erlmcp_registry:find_transport(TransportId) of
        {ok, {Pid, _Config}} -> {ok, host_app_transport:events(Pid)};
        {error, not_found} -> {error, not_found}
    end.
