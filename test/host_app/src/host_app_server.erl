%%% @doc A server: registers itself, answers every request with its id and the request.
-module(host_app_server).

-behaviour(gen_server).

-export([start/2, start_link/2, publish/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-record(state, {
          id :: erlmcp_registry:server_id()
         }).


%% @doc Starts a server outside of the supervision tree.
-spec start(erlmcp_registry:server_id(), map()) -> gen_server:start_ret().
start(Id, Config) ->
    gen_server:start(?MODULE, {Id, Config}, []).


-spec start_link(erlmcp_registry:server_id(), map()) -> gen_server:start_ret().
start_link(Id, Config) ->
    gen_server:start_link(?MODULE, {Id, Config}, []).


%% @doc Has the server send an event to every transport bound to it.
-spec publish(pid(), term()) -> ok.
publish(Server, Event) ->
    gen_server:call(Server, {publish, Event}).


-spec init({erlmcp_registry:server_id(), map()}) -> {ok, #state{}} | {stop, term()}.
init({Id, Config}) ->
    case erlmcp_registry:register_server(Id, self(), Config) of
        ok -> {ok, #state{id = Id}};
        {error, Reason} -> {stop, Reason}
    end.


-spec handle_call({publish, term()}, gen_server:from(), #state{}) -> {reply, ok, #state{}}.
handle_call({publish, Event}, _From, #state{id = Id} = State) ->
    {reply, erlmcp_registry:route_to_transport(broadcast, Id, {event, Event}), State}.


-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Cast, State) ->
    {noreply, State}.


-spec handle_info({mcp_message, erlmcp_registry:transport_id(), {request, reference(), term()}},
                  #state{}) -> {noreply, #state{}}.
handle_info({mcp_message, TransportId, {request, Ref, Request}}, #state{id = Id} = State) ->
    ok = erlmcp_registry:route_to_transport(TransportId, Id, {answer, Ref, {Id, Request}}),
    {noreply, State}.
