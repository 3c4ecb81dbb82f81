%%% @doc A transport: registers itself, and is bound at once if its config has a `server_id'. Sends
%%% requests to the server it is bound to and gives the answers to the callers; keeps the events
%%% that servers publish.
-module(host_app_transport).

-behaviour(gen_server).

-export([start/2, start_link/2, call/2, events/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-record(state, {
          id :: erlmcp_registry:transport_id(),
          %% Who waits for which answer.
          waiting = #{} :: #{reference() => gen_server:from()},
          %% The newest first.
          events = [] :: [{erlmcp_registry:server_id(), term()}]
         }).

-define(CALL_MS, 5000).


%% @doc Starts a transport outside of the supervision tree.
-spec start(erlmcp_registry:transport_id(), map()) -> gen_server:start_ret().
start(Id, Config) ->
    gen_server:start(?MODULE, {Id, Config}, []).


-spec start_link(erlmcp_registry:transport_id(), map()) -> gen_server:start_ret().
start_link(Id, Config) ->
    gen_server:start_link(?MODULE, {Id, Config}, []).


%% @doc Sends a request to the bound server and waits for its answer.
-spec call(pid(), term()) -> {ok, term()} | {error, not_bound}.
call(Transport, Request) ->
    gen_server:call(Transport, {call, Request}, ?CALL_MS).


%% @doc The events received up to now, the oldest first.
-spec events(pid()) -> [{erlmcp_registry:server_id(), term()}].
events(Transport) ->
    gen_server:call(Transport, events).


-spec init({erlmcp_registry:transport_id(), map()}) -> {ok, #state{}} | {stop, term()}.
init({Id, Config}) ->
    case erlmcp_registry:register_transport(Id, self(), Config) of
        ok -> {ok, #state{id = Id}};
        {error, Reason} -> {stop, Reason}
    end.


-spec handle_call({call, term()} | events, gen_server:from(), #state{}) ->
          {reply, term(), #state{}} | {noreply, #state{}}.
handle_call({call, Request}, From, #state{id = Id, waiting = Waiting} = State) ->
    case erlmcp_registry:get_server_for_transport(Id) of
        {ok, ServerId} ->
            Ref = make_ref(),
            ok = erlmcp_registry:route_to_server(ServerId, Id, {request, Ref, Request}),
            {noreply, State#state{waiting = Waiting#{Ref => From}}};
        {error, not_found} ->
            {reply, {error, not_bound}, State}
    end;
handle_call(events, _From, #state{events = Events} = State) ->
    {reply, lists:reverse(Events), State}.


-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Cast, State) ->
    {noreply, State}.


-spec handle_info({mcp_response, erlmcp_registry:server_id(), Message}, #state{}) ->
          {noreply, #state{}}
              when Message :: {answer, reference(), term()} | {event, term()}.
handle_info({mcp_response, _ServerId, {answer, Ref, Answer}}, #state{waiting = Waiting} = State) ->
    {From, Others} = maps:take(Ref, Waiting),
    ok = gen_server:reply(From, {ok, Answer}),
    {noreply, State#state{waiting = Others}};
handle_info({mcp_response, ServerId, {event, Event}}, #state{events = Events} = State) ->
    {noreply, State#state{events = [{ServerId, Event} | Events]}}.
