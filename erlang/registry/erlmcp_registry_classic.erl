%% The registry of erlmcp as one gen_server over maps: the API of `erlmcp_registry' without native
%% code. It is the baseline of the benchmarks, the oracle of the property tests, the target of a
%% rollback, and what runs where the native library cannot be loaded.
%%
%% *Guarantees*: every request is handled by one process, one at a time, so all of them are totally
%% ordered; what one process sends through the registry to one target arrives in the order sent. A
%% registration ends with its process, a binding with its transport and with its server. No function
%% calls native code.
%%
%% *Consistency*: a process that has ended is gone for every later find, list, bind and register,
%% also while its 'DOWN' waits in the mailbox, because those ask is_process_alive/1. That works for
%% processes of this node only; one of another node is gone when its 'DOWN' has been handled.
%%
%% *Trade-offs*: the mailbox of that process is the bottleneck: it grows without bound when messages
%% come faster than one scheduler routes them, and calls then time out. A lookup is a message and an
%% answer, and copies the configuration.
%%
%% *Crashes*: the named instance mirrors registrations and bindings (not messages) into an ETS table
%% whose heir is a small process, the keeper. If the registry is killed, the next one with the name
%% takes the table over and adopts what still lives. An orderly end deletes the table. Anonymous
%% instances have no mirror.
-module(erlmcp_registry_classic).

-behaviour(gen_server).

-include_lib("kernel/include/logger.hrl").

%% Registration
-export([start_link/0,
         register_server/3, register_server/4,
         register_transport/3, register_transport/4,
         unregister_server/1, unregister_server/2,
         unregister_transport/1, unregister_transport/2,
         update_server/2]).
%% Lookup
-export([find_server/1, find_server/2,
         find_transport/1, find_transport/2,
         list_servers/0, list_servers/1,
         list_transports/0, list_transports/1,
         get_servers/0]).
%% Bindings
-export([bind_transport_to_server/2, unbind_transport/1, get_server_for_transport/1]).
%% Routing
-export([route_to_server/3, route_to_transport/3, route_message/2]).
%% Operation
-export([get_pid/0,
         get_queue_depth/0,
         get_all_state/0,
         restore_state/1,
         graceful_shutdown/0]).
%% Names
-export([validate_tool_name/1, validate_transport_name/1, normalize_name/1]).
%% gen_server
-export([init/1,
         handle_call/3,
         handle_cast/2,
         handle_info/2,
         terminate/2,
         code_change/3,
         format_status/1]).
%% As a part of another process
-export([open/1, new/1, close/1, execute/2, route/2, info/2]).
-export([ids/2, counts/1, members/2, row/3, put/4]).

-export_type([server_id/0, transport_id/0, saved_state/0, state/0]).

-type server_id() :: term().
-type transport_id() :: term().
-type scope() :: local | global.
-type entry(Id) :: {Id, {pid(), Config :: term()}}.
-type global_entry(Id) :: {Id, {node(), pid(), Config :: term()}}.
-type bindings() :: #{transport_id() => server_id()}.
-type saved_state() :: {registry_state, bindings()}.
-type kind() :: server | transport.
-type binding() :: unbound | {bound, server_id()}.
-type row() :: {Key :: {kind(), term()}, pid(), Config :: term(), binding()}.

-record(entry, {
          pid :: pid(),
          config :: term(),
          % One a registration, not one a process: a process under several ids ends them all, and
          % none of them has to know of the others.
          monitor :: reference()
         }).

-record(state, {
          servers = #{} :: #{server_id() => #entry{}},
          transports = #{} :: #{transport_id() => #entry{}},
          bindings = #{} :: bindings(),
          % The inverse of bindings, with no empty sets; what a broadcast and the removal of a server
          % walk through.
          members = #{} :: #{server_id() => #{transport_id() => pid()}},
          mirror = none :: ets:table() | none,
          keeper = none :: reference() | none,
          keeper_name = none :: atom(),
          % When the last warning was logged (monotonic ms), and how many were not since.
          warned = never :: integer() | never,
          suppressed = 0 :: non_neg_integer()
         }).

-opaque state() :: #state{}.

%% Positions in a row of the mirror.
-define(CONFIG,  3).
-define(BINDING, 4).

-define(KEEPER,           erlmcp_registry_classic_keeper).
-define(WARN_INTERVAL_MS, 1000).
-define(SHUTDOWN_MS,      1000).

%% Registration


%% @doc Starts the registry under the local name `erlmcp_registry_classic'.
%%
%% Returns `{error, {already_started, Pid}}' if there is one. If the last one of the name was killed,
%% its living registrations and their bindings are adopted.
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @doc Registers Pid as the server Id, until it ends or is unregistered.
%%
%% Config is any term and is returned verbatim by finds. Returns `{error, already_registered}' if a
%% living process has the id; if that is Pid itself, the application environment `same_pid' of
%% `erlmcp_native' (`already_registered' or `ok') is what is answered. The first registration stays
%% as it is in both cases. A dead pid is accepted, and not found afterwards. Exits with `noproc' if
%% the registry does not run, as do all functions here but the routes and what says otherwise.
-spec register_server(server_id(), pid(), term()) -> ok | {error, already_registered}.
register_server(Id, Pid, Config) when is_pid(Pid) ->
    gen_server:call(?MODULE, {register_server, Id, Pid, Config}).


%% @doc Registers a server on this node or in the whole cluster.
%%
%% The `global' scope is that of {@link erlmcp_registry_global} and needs no registry process.
-spec register_server(scope(), server_id(), pid(), term()) -> ok | {error, already_registered}.
register_server(local, Id, Pid, Config) when is_pid(Pid) ->
    register_server(Id, Pid, Config);
register_server(global, Id, Pid, Config) when is_pid(Pid) ->
    erlmcp_registry_global:register(server, Id, Pid, Config).


%% @doc Registers Pid as the transport Id, until it ends or is unregistered.
%%
%% If Config is a map with a `server_id' other than `undefined', the transport is bound to that server
%% at once, whether or not it exists yet. Otherwise as {@link register_server/3}.
-spec register_transport(transport_id(), pid(), term()) -> ok | {error, already_registered}.
register_transport(Id, Pid, Config) when is_pid(Pid) ->
    gen_server:call(?MODULE, {register_transport, Id, Pid, Config}).


%% @doc Registers a transport on this node or in the whole cluster.
%%
%% Transports of the `global' scope have no bindings.
-spec register_transport(scope(), transport_id(), pid(), term()) ->
          ok | {error, already_registered}.
register_transport(local, Id, Pid, Config) when is_pid(Pid) ->
    register_transport(Id, Pid, Config);
register_transport(global, Id, Pid, Config) when is_pid(Pid) ->
    erlmcp_registry_global:register(transport, Id, Pid, Config).


%% @doc Removes a server and every binding to it; its transports stay.
%%
%% For an unknown server returns `ok', and bindings made ahead of it stay.
-spec unregister_server(server_id()) -> ok.
unregister_server(Id) ->
    gen_server:call(?MODULE, {unregister_server, Id}).


%% @doc Removes a server of one scope. Returns `ok' for an unknown one.
-spec unregister_server(scope(), server_id()) -> ok.
unregister_server(local, Id) ->
    unregister_server(Id);
unregister_server(global, Id) ->
    erlmcp_registry_global:unregister(server, Id).


%% @doc Removes a transport and its binding. Returns `ok' for an unknown one.
-spec unregister_transport(transport_id()) -> ok.
unregister_transport(Id) ->
    gen_server:call(?MODULE, {unregister_transport, Id}).


%% @doc Removes a transport of one scope. Returns `ok' for an unknown one.
-spec unregister_transport(scope(), transport_id()) -> ok.
unregister_transport(local, Id) ->
    unregister_transport(Id);
unregister_transport(global, Id) ->
    erlmcp_registry_global:unregister(transport, Id).


%% @doc Replaces the configuration of a server; its process and bindings stay.
%%
%% Returns `{error, not_found}' for an unknown server.
-spec update_server(server_id(), term()) -> ok | {error, not_found}.
update_server(Id, Config) ->
    gen_server:call(?MODULE, {update_server, Id, Config}).


%% Lookup


%% @doc Finds the process and the configuration of a server.
%%
%% Returns `{error, not_found}' if there is none, and never a process of this node that has ended.
-spec find_server(server_id()) -> {ok, {pid(), Config :: term()}} | {error, not_found}.
find_server(Id) ->
    gen_server:call(?MODULE, {find_server, Id}).


%% @doc Finds a server of one scope; in the `global' one with the node of its process.
-spec find_server(scope(), server_id()) ->
          {ok, {pid(), Config :: term()} | {node(), pid(), Config :: term()}} | {error, not_found}.
find_server(local, Id) ->
    find_server(Id);
find_server(global, Id) ->
    erlmcp_registry_global:find(server, Id).


%% @doc Finds the process and the configuration of a transport, as {@link find_server/1}.
-spec find_transport(transport_id()) -> {ok, {pid(), Config :: term()}} | {error, not_found}.
find_transport(Id) ->
    gen_server:call(?MODULE, {find_transport, Id}).


%% @doc Finds a transport of one scope; in the `global' one with the node of its process.
-spec find_transport(scope(), transport_id()) ->
          {ok, {pid(), Config :: term()} | {node(), pid(), Config :: term()}} | {error, not_found}.
find_transport(local, Id) ->
    find_transport(Id);
find_transport(global, Id) ->
    erlmcp_registry_global:find(transport, Id).


%% @doc Lists the servers, in no particular order.
-spec list_servers() -> [entry(server_id())].
list_servers() ->
    gen_server:call(?MODULE, list_servers).


%% @doc Lists the servers of one scope; in the `global' one with the nodes of their processes.
-spec list_servers(scope()) -> [entry(server_id())] | [global_entry(server_id())].
list_servers(local) ->
    list_servers();
list_servers(global) ->
    erlmcp_registry_global:list(server).


%% @doc Lists the transports, in no particular order.
-spec list_transports() -> [entry(transport_id())].
list_transports() ->
    gen_server:call(?MODULE, list_transports).


%% @doc Lists the transports of one scope; in the `global' one with the nodes of their processes.
-spec list_transports(scope()) -> [entry(transport_id())] | [global_entry(transport_id())].
list_transports(local) ->
    list_transports();
list_transports(global) ->
    erlmcp_registry_global:list(transport).


%% @doc Lists the processes of the servers; one under several ids is there once for each.
-spec get_servers() -> [pid()].
get_servers() ->
    [ Pid || {_Id, {Pid, _Config}} <- list_servers() ].


%% Bindings


%% @doc Binds a transport to a server, instead of the one that it was bound to.
%%
%% Returns `{error, server_not_found}', which is checked first, or `{error, transport_not_found}'.
-spec bind_transport_to_server(transport_id(), server_id()) ->
          ok | {error, server_not_found | transport_not_found}.
bind_transport_to_server(TransportId, ServerId) ->
    gen_server:call(?MODULE, {bind_transport_to_server, TransportId, ServerId}).


%% @doc Removes the binding of a transport. Returns `ok' for an unknown or unbound one.
-spec unbind_transport(transport_id()) -> ok.
unbind_transport(TransportId) ->
    gen_server:call(?MODULE, {unbind_transport, TransportId}).


%% @doc Finds the server that a transport is bound to.
%%
%% Returns `{error, not_found}' if it is unknown, unbound, or bound to the id `undefined'.
-spec get_server_for_transport(transport_id()) -> {ok, server_id()} | {error, not_found}.
get_server_for_transport(TransportId) ->
    gen_server:call(?MODULE, {get_server_for_transport, TransportId}).


%% Routing


%% @doc Sends `{mcp_message, TransportId, Message}' to a server.
%%
%% Always `ok', also if the server is unknown (a warning is logged, at most one a second) or the
%% registry does not run. Neither the transport nor a binding is checked.
-spec route_to_server(server_id(), transport_id(), term()) -> ok.
route_to_server(ServerId, TransportId, Message) ->
    gen_server:cast(?MODULE, {route_to_server, ServerId, TransportId, Message}).


%% @doc Sends `{mcp_response, ServerId, Message}' to a transport, or with `broadcast' in its place to
%% every transport bound to the server.
%%
%% Always `ok', as {@link route_to_server/3}. The server is not checked. A transport with the id
%% `broadcast' cannot be reached in this way.
-spec route_to_transport(transport_id() | broadcast, server_id(), term()) -> ok.
route_to_transport(TransportId, ServerId, Message) ->
    gen_server:cast(?MODULE, {route_to_transport, TransportId, ServerId, Message}).


%% @doc Sends `{mcp_response, ServerId, Message}' to every transport bound to a server, or to one
%% transport in the name of the server that its configuration names.
%%
%% Returns `{error, server_not_found}', `{error, transport_not_found}', or `{error, no_bound_server}'
%% if the configuration of the transport has no `server_id', whatever it is bound to.
-spec route_message({server, server_id()} | {transport, transport_id()}, term()) ->
          ok | {error, server_not_found | transport_not_found | no_bound_server}.
route_message({server, ServerId}, Message) ->
    case find_server(ServerId) of
        {ok, _} -> route_to_transport(broadcast, ServerId, Message);
        {error, not_found} -> {error, server_not_found}
    end;
route_message({transport, TransportId}, Message) ->
    case find_transport(TransportId) of
        {ok, {Pid, #{server_id := ServerId}}} when ServerId =/= undefined ->
            case TransportId of
                broadcast ->
                    Pid ! {mcp_response, ServerId, Message},
                    ok;
                _ ->
                    % Through the registry, to stay in order with the other routes of the caller.
                    route_to_transport(TransportId, ServerId, Message)
            end;
        {ok, _} ->
            {error, no_bound_server};
        {error, not_found} ->
            {error, transport_not_found}
    end.


%% Operation


%% @doc Returns the process of the registry, or `undefined' if it does not run.
-spec get_pid() -> pid() | undefined.
get_pid() ->
    whereis(?MODULE).


%% @doc Returns the length of the registry's mailbox, 0 if it does not run.
-spec get_queue_depth() -> non_neg_integer().
get_queue_depth() ->
    case get_pid() of
        undefined ->
            0;
        Pid ->
            case process_info(Pid, message_queue_len) of
                {message_queue_len, Length} -> Length;
                undefined -> 0
            end
    end.


%% @doc Returns the bindings, in the form that {@link restore_state/1} takes.
-spec get_all_state() -> {ok, saved_state()}.
get_all_state() ->
    gen_server:call(?MODULE, get_all_state).


%% @doc Replaces all bindings by saved ones.
%%
%% Those of transports that are not registered are left out; their servers may be missing, as in
%% automatic bindings. Returns `{error, invalid_state}' for anything but a saved state, and changes
%% nothing then.
-spec restore_state(saved_state() | term()) -> ok | {error, invalid_state}.
restore_state(Saved) ->
    gen_server:call(?MODULE, {restore_state, Saved}).


%% @doc Sends `{erlmcp_shutdown, Id, normal}' to every server and transport and gives them one second.
%%
%% The registry and its registrations stay.
-spec graceful_shutdown() -> ok.
graceful_shutdown() ->
    Entries = list_servers() ++ list_transports(),
    lists:foreach(fun({Id, {Pid, _Config}}) -> Pid ! {erlmcp_shutdown, Id, normal} end, Entries),
    timer:sleep(?SHUTDOWN_MS).


%% Names


%% @doc Checks the name of a tool: see {@link erlmcp_registry_name:validate_tool_name/1}.
-spec validate_tool_name(term()) -> ok | {error, erlmcp_registry_name:name_error()}.
validate_tool_name(Name) ->
    erlmcp_registry_name:validate_tool_name(Name).


%% @doc Checks the name of a transport: see {@link erlmcp_registry_name:validate_transport_name/1}.
-spec validate_transport_name(term()) -> ok | {error, erlmcp_registry_name:name_error()}.
validate_transport_name(Name) ->
    erlmcp_registry_name:validate_transport_name(Name).


%% @doc Normalises a name: see {@link erlmcp_registry_name:normalize_name/1}.
-spec normalize_name(binary() | string() | atom()) -> atom() | binary().
normalize_name(Name) ->
    erlmcp_registry_name:normalize_name(Name).


%% gen_server


%% @private
-spec init([]) -> {ok, #state{}}.
init([]) ->
    process_flag(trap_exit, true),
    % In a flood the mailbox would otherwise go through the garbage collections of this process: 1.7
    % against 2.3 us a route, two senders and 15,000 transports on two cores.
    process_flag(message_queue_data, off_heap),
    case process_info(self(), registered_name) of
        {registered_name, ?MODULE} -> {ok, open(?KEEPER)};
        _ -> {ok, open(none)}
    end.


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) -> {reply, term(), #state{}}.
handle_call(Request, _From, State0) ->
    {Reply, State} = execute(Request, State0),
    {reply, Reply, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast({route_to_server, ServerId, TransportId, Message}, State) ->
    case State#state.servers of
        #{ServerId := #entry{pid = Pid}} ->
            Pid ! {mcp_message, TransportId, Message},
            {noreply, State};
        _ ->
            {noreply, warn("no server ~tP to route to", ServerId, State)}
    end;
handle_cast({route_to_transport, broadcast, ServerId, Message}, State) ->
    case State#state.members of
        #{ServerId := Members} ->
            Response = {mcp_response, ServerId, Message},
            maps:foreach(fun(_TransportId, Pid) -> Pid ! Response end, Members),
            {noreply, State};
        _ ->
            {noreply, warn("no transport bound to ~tP to broadcast to", ServerId, State)}
    end;
handle_cast({route_to_transport, TransportId, ServerId, Message}, State) ->
    case State#state.transports of
        #{TransportId := #entry{pid = Pid}} ->
            Pid ! {mcp_response, ServerId, Message},
            {noreply, State};
        _ ->
            {noreply, warn("no transport ~tP to route to", TransportId, State)}
    end;
handle_cast(_Request, State) ->
    {noreply, State}.


%% @private
-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({{down, Kind, Id}, Monitor, process, _Pid, _Reason}, State) ->
    % The id may have a new process by now, and a demonitor does not take back a message that is
    % here already: the reference tells.
    case entries(Kind, State) of
        #{Id := #entry{monitor = Monitor}} -> {noreply, remove(Kind, Id, State)};
        _ -> {noreply, State}
    end;
handle_info({'DOWN', Keeper, process, _Pid, _Reason}, #state{keeper = Keeper} = State) ->
    #state{mirror = Mirror, keeper_name = Name} = State,
    {noreply, State#state{keeper = start_keeper(Name, Mirror)}};
handle_info(_Info, State) ->
    % Exit signals too: those of the parent do not come here.
    {noreply, State}.


%% @private
-spec terminate(term(), #state{}) -> ok.
terminate(Reason, #state{mirror = Mirror}) when Mirror =/= none ->
    case Reason of
        normal -> delete_mirror(Mirror);
        shutdown -> delete_mirror(Mirror);
        {shutdown, _} -> delete_mirror(Mirror);
        _ -> ok
    end;
terminate(_Reason, _State) ->
    ok.


%% @private
-spec code_change(term(), #state{}, term()) -> {ok, #state{}}.
code_change(_OldVsn, State, _Extra) ->
    {ok, State}.


%% @private
%% Configurations may hold secrets, and status reports end in logs.
-spec format_status(gen_server:format_status()) -> gen_server:format_status().
format_status(Status) ->
    maps:map(
      fun(state, #state{servers = Servers, transports = Transports, bindings = Bindings}) ->
              #{
                servers => map_size(Servers),
                transports => map_size(Transports),
                bindings => Bindings
               };
         (message, Message) ->
              redact(Message);
         (log, _Events) ->
              [];
         (_Key, Value) ->
              Value
      end,
      Status).


-spec redact(term()) -> term().
redact({'$gen_call', From, Request}) -> {'$gen_call', From, redact(Request)};
redact({register_server, Id, Pid, _Config}) -> {register_server, Id, Pid, redacted};
redact({register_transport, Id, Pid, _Config}) -> {register_transport, Id, Pid, redacted};
redact({update_server, Id, _Config}) -> {update_server, Id, redacted};
redact(Message) -> Message.


%% Requests, for this process and for others that keep such a registry in their state


%% @private
-spec execute(term(), state()) -> {Reply :: term(), state()}.
execute({find_server, Id}, State0) ->
    State = reap(server, Id, State0),
    {find(Id, State#state.servers), State};
execute({find_transport, Id}, State0) ->
    State = reap(transport, Id, State0),
    {find(Id, State#state.transports), State};
execute({register_server, Id, Pid, Config}, State) when is_pid(Pid) ->
    register(server, Id, Pid, Config, State);
execute({register_transport, Id, Pid, Config}, State) when is_pid(Pid) ->
    register(transport, Id, Pid, Config, State);
execute({register_server, _Id, _NotPid, _Config}, State) ->
    {{error, badarg}, State};
execute({register_transport, _Id, _NotPid, _Config}, State) ->
    {{error, badarg}, State};
execute({unregister_server, Id}, State) ->
    {ok, remove(server, Id, State)};
execute({unregister_transport, Id}, State) ->
    {ok, remove(transport, Id, State)};
execute({update_server, Id, Config}, State0) ->
    case reap(server, Id, State0) of
        #state{servers = #{Id := Entry} = Servers} = State ->
            mirror_update(State, {server, Id}, {?CONFIG, Config}),
            {ok, State#state{servers = Servers#{Id := Entry#entry{config = Config}}}};
        State ->
            {{error, not_found}, State}
    end;
execute({bind_transport_to_server, TransportId, ServerId}, State0) ->
    case reap(transport, TransportId, reap(server, ServerId, State0)) of
        #state{servers = #{ServerId := _}, transports = #{TransportId := _}} = State ->
            mirror_update(State, {transport, TransportId}, {?BINDING, {bound, ServerId}}),
            {ok, bind(TransportId, ServerId, State)};
        #state{servers = #{ServerId := _}} = State ->
            {{error, transport_not_found}, State};
        State ->
            {{error, server_not_found}, State}
    end;
execute({unbind_transport, TransportId}, State) ->
    {ok, unbind(TransportId, State)};
execute({get_server_for_transport, TransportId}, State0) ->
    State = reap_bound(TransportId, State0),
    case State#state.bindings of
        #{TransportId := ServerId} when ServerId =/= undefined -> {{ok, ServerId}, State};
        _ -> {{error, not_found}, State}
    end;
execute(list_servers, State) ->
    {list(State#state.servers), State};
execute(list_transports, State) ->
    {list(State#state.transports), State};
execute(get_all_state, State) ->
    {{ok, {registry_state, State#state.bindings}}, State};
execute({restore_state, {registry_state, Bindings}}, State) when is_map(Bindings) ->
    {ok, restore(Bindings, State)};
execute({restore_state, _Invalid}, State) ->
    {{error, invalid_state}, State};
execute(_Request, State) ->
    {{error, unknown_request}, State}.


%% @private
-spec route(Cast :: term(), state()) -> state().
route(Cast, State0) ->
    {noreply, State} = handle_cast(Cast, State0),
    State.


%% @private
-spec info(Info :: term(), state()) -> state().
info(Info, State0) ->
    {noreply, State} = handle_info(Info, State0),
    State.


%% @private
%% An empty registry of the calling process, or with the name of a keeper the registrations of the
%% process that had one with that keeper and was killed.
-spec open(Keeper :: atom()) -> state().
open(none) -> #state{};
open(Keeper) -> adopt(open_mirror(Keeper)).


%% @private
%% An empty registry of the calling process, whatever the keeper has.
-spec new(Keeper :: atom()) -> state().
new(none) ->
    #state{};
new(Keeper) ->
    ok = close(open_mirror(Keeper)),
    new_mirror(Keeper).


%% @private
%% The process goes on without this registry, and nobody adopts it.
-spec close(state()) -> ok.
close(#state{mirror = Mirror, keeper = Monitor} = State) ->
    Entries = maps:values(State#state.servers) ++ maps:values(State#state.transports),
    lists:foreach(fun(#entry{monitor = Reference}) -> demonitor(Reference, [flush]) end, Entries),
    case Mirror of
        none ->
            ok;
        _ ->
            ok = delete_mirror(Mirror),
            true = demonitor(Monitor, [flush]),
            end_keeper(State#state.keeper_name)
    end.


%% @private
-spec ids(kind(), state()) -> [term()].
ids(Kind, State) ->
    maps:keys(entries(Kind, State)).


%% @private
-spec counts(state()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(#state{servers = Servers, transports = Transports}) ->
    #{servers => map_size(Servers), transports => map_size(Transports)}.


%% @private
%% The ids of the transports bound to a server.
-spec members(server_id(), state()) -> [transport_id()].
members(ServerId, #state{members = Members}) ->
    maps:keys(maps:get(ServerId, Members, #{})).


%% @private
%% The entry of an id, if its process lives.
-spec row(kind(), term(), state()) -> {erlmcp_registry_native:row() | none, state()}.
row(Kind, Id, State0) ->
    State = case Kind of
                server -> reap(server, Id, State0);
                transport -> reap_bound(Id, State0)
            end,
    case entries(Kind, State) of
        #{Id := #entry{pid = Pid, config = Config}} -> {{Pid, Config, binding(Kind, Id, State)}, State};
        _ -> {none, State}
    end.


-spec binding(kind(), term(), state()) -> binding().
binding(transport, Id, #state{bindings = Bindings}) when is_map_key(Id, Bindings) -> {bound, map_get(Id, Bindings)};
binding(_Kind, _Id, _State) -> unbound.


%% @private
%% Makes the entry of an id be this one, or none.
-spec put(kind(), term(), erlmcp_registry_native:row() | none, state()) -> state().
put(Kind, Id, none, State) ->
    remove(Kind, Id, State);
put(Kind, Id, {Pid, Config, Binding}, State0) ->
    case entries(Kind, State0) of
        #{Id := #entry{pid = Pid, config = Config}} ->
            set_binding(Kind, Id, Binding, State0);
        #{Id := #entry{pid = Pid} = Entry} = Entries ->
            mirror_update(State0, {Kind, Id}, {?CONFIG, Config}),
            State = set_entries(Kind, Entries#{Id := Entry#entry{config = Config}}, State0),
            set_binding(Kind, Id, Binding, State);
        _ ->
            State = remove(Kind, Id, State0),
            Row = {{Kind, Id}, Pid, Config, Binding},
            mirror_insert(State, Row),
            add(Row, State)
    end.


-spec set_binding(kind(), term(), binding(), state()) -> state().
set_binding(server, _Id, unbound, State) ->
    State;
set_binding(transport, Id, unbound, State) ->
    unbind(Id, State);
set_binding(transport, Id, Binding, State) ->
    case binding(transport, Id, State) of
        Binding ->
            State;
        _ ->
            {bound, ServerId} = Binding,
            mirror_update(State, {transport, Id}, {?BINDING, Binding}),
            bind(Id, ServerId, State)
    end.


%% Entries


-spec register(kind(), term(), pid(), term(), #state{}) ->
          {ok | {error, already_registered}, #state{}}.
register(Kind, Id, Pid, Config, State0) ->
    State = reap(Kind, Id, State0),
    case entries(Kind, State) of
        #{Id := #entry{pid = Pid}} ->
            {same_pid(), State};
        #{Id := _} ->
            {{error, already_registered}, State};
        _ ->
            Row = {{Kind, Id}, Pid, Config, configured_binding(Kind, Config)},
            mirror_insert(State, Row),
            {ok, add(Row, reap_target(Row, State))}
    end.


%% The new entry of a row of the mirror.
-spec add(row(), #state{}) -> #state{}.
add({{Kind, Id}, Pid, Config, Binding}, State0) ->
    Monitor = monitor(process, Pid, [{tag, {down, Kind, Id}}]),
    Entry = #entry{pid = Pid, config = Config, monitor = Monitor},
    State = set_entries(Kind, (entries(Kind, State0))#{Id => Entry}, State0),
    case Binding of
        {bound, ServerId} -> bind(Id, ServerId, State);
        unbound -> State
    end.


-spec remove(kind(), term(), #state{}) -> #state{}.
remove(Kind, Id, State0) ->
    case maps:take(Id, entries(Kind, State0)) of
        {#entry{monitor = Monitor}, Entries} ->
            true = demonitor(Monitor),
            State = case Kind of
                        server -> unbind_all(Id, State0);
                        transport -> forget_binding(Id, State0)
                    end,
            % After the bindings: if the registry is killed in here, the mirror has none to a server
            % that it lost.
            mirror_delete(State, {Kind, Id}),
            set_entries(Kind, Entries, State);
        error ->
            % Nor are the bindings of an unknown server touched: they were made ahead of it.
            State0
    end.


%% Does now for an entry whose process has ended what its 'DOWN', still on the way, would do.
-spec reap(kind(), term(), #state{}) -> #state{}.
reap(Kind, Id, State) ->
    case entries(Kind, State) of
        #{Id := #entry{pid = Pid}} ->
            case is_alive(Pid) of
                true -> State;
                false -> remove(Kind, Id, State)
            end;
        _ ->
            State
    end.


%% A binding made ahead of a server must not fall to the 'DOWN' of an earlier one of that id.
-spec reap_target(row(), #state{}) -> #state{}.
reap_target({_Key, _Pid, _Config, {bound, ServerId}}, State) -> reap(server, ServerId, State);
reap_target({_Key, _Pid, _Config, unbound}, State) -> State.


-spec reap_bound(transport_id(), #state{}) -> #state{}.
reap_bound(TransportId, State0) ->
    State = reap(transport, TransportId, State0),
    case State#state.bindings of
        #{TransportId := ServerId} -> reap(server, ServerId, State);
        _ -> State
    end.


-spec find(term(), #{term() => #entry{}}) -> {ok, {pid(), term()}} | {error, not_found}.
find(Id, Entries) ->
    case Entries of
        #{Id := #entry{pid = Pid, config = Config}} -> {ok, {Pid, Config}};
        _ -> {error, not_found}
    end.


-spec list(#{term() => #entry{}}) -> [entry(term())].
list(Entries) ->
    [ {Id, {Pid, Config}}
      || {Id, #entry{pid = Pid, config = Config}} <- maps:to_list(Entries), is_alive(Pid) ].


-spec entries(kind(), #state{}) -> #{term() => #entry{}}.
entries(server, State) -> State#state.servers;
entries(transport, State) -> State#state.transports.


-spec set_entries(kind(), #{term() => #entry{}}, #state{}) -> #state{}.
set_entries(server, Servers, State) -> State#state{servers = Servers};
set_entries(transport, Transports, State) -> State#state{transports = Transports}.


-spec same_pid() -> ok | {error, already_registered}.
same_pid() ->
    case application:get_env(erlmcp_native, same_pid, already_registered) of
        ok -> ok;
        _ -> {error, already_registered}
    end.


-spec is_alive(pid()) -> boolean().
is_alive(Pid) ->
    node(Pid) =/= node() orelse is_process_alive(Pid).


%% Bindings


-spec configured_binding(kind(), term()) -> binding().
configured_binding(transport, #{server_id := ServerId}) when ServerId =/= undefined ->
    {bound, ServerId};
configured_binding(_Kind, _Config) ->
    unbound.


%% The transport is registered.
-spec bind(transport_id(), server_id(), #state{}) -> #state{}.
bind(TransportId, ServerId, State0) ->
    State = forget_binding(TransportId, State0),
    #state{transports = #{TransportId := #entry{pid = Pid}}, members = Members} = State,
    Siblings = maps:get(ServerId, Members, #{}),
    State#state{
      bindings = (State#state.bindings)#{TransportId => ServerId},
      members = Members#{ServerId => Siblings#{TransportId => Pid}}
     }.


-spec unbind(transport_id(), #state{}) -> #state{}.
unbind(TransportId, State) ->
    mirror_update(State, {transport, TransportId}, {?BINDING, unbound}),
    forget_binding(TransportId, State).


-spec forget_binding(transport_id(), #state{}) -> #state{}.
forget_binding(TransportId, #state{members = Members} = State) ->
    case maps:take(TransportId, State#state.bindings) of
        {ServerId, Bindings} ->
            Siblings = maps:remove(TransportId, map_get(ServerId, Members)),
            State#state{
              bindings = Bindings,
              members = case map_size(Siblings) of
                            0 -> maps:remove(ServerId, Members);
                            _ -> Members#{ServerId := Siblings}
                        end
             };
        error ->
            State
    end.


-spec unbind_all(server_id(), #state{}) -> #state{}.
unbind_all(ServerId, State) ->
    case maps:take(ServerId, State#state.members) of
        {Siblings, Members} ->
            Ids = maps:keys(Siblings),
            lists:foreach(fun(Id) ->
                                  mirror_update(State, {transport, Id}, {?BINDING, unbound})
                          end,
                          Ids),
            State#state{bindings = maps:without(Ids, State#state.bindings), members = Members};
        error ->
            State
    end.


-spec restore(bindings(), #state{}) -> #state{}.
restore(Bindings, State0) ->
    Unbound = lists:foldl(fun unbind/2, State0, maps:keys(State0#state.bindings)),
    maps:fold(
      fun(TransportId, ServerId, State1) ->
              case reap(transport, TransportId, reap(server, ServerId, State1)) of
                  #state{transports = #{TransportId := _}} = State ->
                      mirror_update(State,
                                    {transport, TransportId},
                                    {?BINDING, {bound, ServerId}}),
                      bind(TransportId, ServerId, State);
                  State ->
                      State
              end
      end,
      Unbound,
      Bindings).


%% Warnings


-spec warn(string(), term(), #state{}) -> #state{}.
warn(Format, Id, #state{warned = Warned, suppressed = Suppressed} = State) ->
    Now = erlang:monotonic_time(millisecond),
    case Warned =:= never orelse Now - Warned >= ?WARN_INTERVAL_MS of
        true ->
            ?LOG_WARNING("erlmcp registry: " ++ Format ++ " (~b such warnings suppressed)",
                         [Id, 20, Suppressed],
                         #{domain => [erlmcp_native]}),
            State#state{warned = Now, suppressed = 0};
        false ->
            State#state{suppressed = Suppressed + 1}
    end.


%% The mirror of the named instance, and its keeper
%%
%% One row an entry. The registry owns the table, so that a write never depends on another process;
%% the keeper is its heir, and holds it from the death of one registry to the start of the next.


-spec mirror_insert(#state{}, row()) -> true.
mirror_insert(#state{mirror = none}, _Row) -> true;
mirror_insert(#state{mirror = Mirror}, Row) -> ets:insert(Mirror, Row).


%% Changes nothing if there is no such row.
-spec mirror_update(#state{}, {kind(), term()}, {pos_integer(), term()}) -> ok.
mirror_update(#state{mirror = none}, _Key, _Change) ->
    ok;
mirror_update(#state{mirror = Mirror}, Key, Change) ->
    _ = ets:update_element(Mirror, Key, Change),
    ok.


-spec mirror_delete(#state{}, {kind(), term()}) -> true.
mirror_delete(#state{mirror = none}, _Key) -> true;
mirror_delete(#state{mirror = Mirror}, Key) -> ets:delete(Mirror, Key).


-spec delete_mirror(ets:table()) -> ok.
delete_mirror(Mirror) ->
    true = ets:delete(Mirror),
    ok.


%% The registrations of the table, as they would be if this process had seen all that happened since
%% its predecessor died.
-spec adopt(#state{}) -> #state{}.
adopt(State0) ->
    Rows = ets:tab2list(State0#state.mirror),
    State1 = lists:foldl(fun add/2, State0, Rows),
    % The dead last: they take the bindings to them along, and leave those made ahead of a server.
    lists:foldl(fun({{Kind, Id}, _, _, _}, State) -> reap(Kind, Id, State) end, State1, Rows).


%% The state of a registry with no entries yet, and the mirror of its predecessor or an empty one.
-spec open_mirror(atom()) -> #state{}.
open_mirror(Name) ->
    case whereis(Name) of
        undefined ->
            new_mirror(Name);
        Keeper ->
            Monitor = monitor(process, Keeper),
            Keeper ! {claim, self()},
            receive
                {'ETS-TRANSFER', Mirror, Keeper, claimed} ->
                    #state{mirror = Mirror, keeper = Monitor, keeper_name = Name};
                {'DOWN', Monitor, process, Keeper, _} ->
                    new_mirror(Name)
            end
    end.


-spec new_mirror(atom()) -> #state{}.
new_mirror(Name) ->
    Mirror = ets:new(?MODULE, [set, protected]),
    #state{mirror = Mirror, keeper = start_keeper(Name, Mirror), keeper_name = Name}.


-spec start_keeper(atom(), ets:table()) -> reference().
start_keeper(Name, Mirror) ->
    Registry = self(),
    {Keeper, Monitor} = spawn_monitor(fun() -> keeper(Registry) end),
    % By this process: a registry that is started after this one was killed must see the keeper.
    true = erlang:register(Name, Keeper),
    true = ets:setopts(Mirror, {heir, Keeper, inherited}),
    Monitor.


%% The runtime hands the tables of a dead process over before it fires the monitors: without a table
%% here, the registry deleted it in an orderly end or died before this process was its heir.
-spec keeper(pid()) -> ok.
keeper(Registry) ->
    Monitor = monitor(process, Registry),
    receive
        {'DOWN', Monitor, process, Registry, _} ->
            receive
                {'ETS-TRANSFER', Mirror, Registry, inherited} -> hand_over(Mirror)
            after
                0 ->
                    ok
            end;
        {stop, Registry} ->
            ok
    end.


%% The name is free afterwards.
-spec end_keeper(atom()) -> ok.
end_keeper(Name) ->
    case whereis(Name) of
        undefined ->
            ok;
        Keeper ->
            Monitor = monitor(process, Keeper),
            Keeper ! {stop, self()},
            receive {'DOWN', Monitor, process, Keeper, _} -> ok end
    end.


%% The keeper stays the heir of the table, so that no moment is without one.
-spec hand_over(ets:table()) -> ok.
hand_over(Mirror) ->
    receive
        {claim, Registry} ->
            try ets:give_away(Mirror, Registry, claimed) of
                true -> keeper(Registry)
            catch
                % The claimant is dead too.
                error:badarg -> hand_over(Mirror)
            end
    end.
