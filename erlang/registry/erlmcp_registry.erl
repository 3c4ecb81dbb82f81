%%% @doc The registry of erlmcp, with every lookup, registration, binding and route in native code.
%%%
%%% The API is that of erlmcp's own `erlmcp_registry', in all its generations. The functions on the
%%% named instance run in the calling process and send no message to the registry's process, which
%%% is a `gen_server' because callers start, link, stop and `call' it. It owns a registry in native
%%% memory: the named instance the servers and transports of the default registry, an anonymous one
%%% (`gen_server:start(erlmcp_registry, [], [])') a registry of its own.
%%%
%%% == Consistency ==
%%% Each function is one atomic step, whoever else is active: after it returned, every process sees
%%% its effect. Lists and broadcasts are no snapshots: what is there throughout is seen exactly once,
%%% what comes or goes meanwhile may be seen or not. What one process sends through the registry to
%%% one target arrives in the order sent.
%%%
%%% == When the process is not there ==
%%% If it was killed, registrations and bindings stay, routing goes on, and the next one under the
%%% name goes on with them. An orderly end (`normal', `shutdown', `{shutdown, _}') clears them. While
%%% no process has the name, `route_*' return `ok' and all else exits with `noproc'.
%%%
%%% == Errors ==
%%% A pid that is none is a `function_clause'. An id whose encoding takes more than `max_id_bytes' is
%%% a `badarg'. With `max_entries' registrations there is `{error, registry_full}'.
-module(erlmcp_registry).

-behaviour(gen_server).

-include_lib("kernel/include/logger.hrl").

%% Registration
-export([start_link/0]).
-export([register_server/3, register_server/4]).
-export([register_transport/3, register_transport/4]).
-export([unregister_server/1, unregister_server/2]).
-export([unregister_transport/1, unregister_transport/2]).
-export([update_server/2]).
%% Lookup
-export([find_server/1, find_server/2]).
-export([find_transport/1, find_transport/2]).
-export([list_servers/0, list_servers/1]).
-export([list_transports/0, list_transports/1]).
-export([get_servers/0]).
%% Bindings
-export([bind_transport_to_server/2, unbind_transport/1, get_server_for_transport/1]).
%% Routing
-export([route_to_server/3, route_to_transport/3, route_message/2]).
%% Operation
-export([get_pid/0, get_queue_depth/0, get_all_state/0, restore_state/1, graceful_shutdown/0]).
%% Names
-export([validate_tool_name/1, validate_transport_name/1, normalize_name/1]).
%% gen_server
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2, code_change/3]).
-export([format_status/1]).

-export_type([server_id/0, transport_id/0, scope/0, entry/0, global_entry/0, saved_state/0]).

-type server_id() :: term().
-type transport_id() :: term().
-type scope() :: local | global.
-type entry() :: {pid(), Config :: term()}.
-type global_entry() :: {node(), pid(), Config :: term()}.
-type saved_state() :: {registry_state, #{transport_id() => server_id()}}.

-record(state, {
          registry :: erlmcp_nif:registry()
         }).

-define(SHUTDOWN_MS, 1000).

%%% Registration


%% @doc Starts the registry under the local name `erlmcp_registry'.
%%
%% Returns `{error, {already_started, Pid}}' if there is one. If the last one was killed, its
%% registrations and bindings are still there.
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @doc Registers `Pid' as the server `Id', until it ends or is unregistered.
%%
%% `Config' is any term; finds return it unchanged. Returns `{error, already_registered}' if a living
%% process has the id (with the application environment `same_pid' set to `ok' that is `ok' if the
%% process is `Pid'); the first registration stays as it is. A process that has ended is accepted,
%% and not found afterwards.
-spec register_server(server_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_server(Id, Pid, Config) when is_pid(Pid) ->
    local({register_server, Id, Pid, Config}).


%% @doc Registers a server on this node, or in the whole cluster
%% ({@link erlmcp_registry_global}).
-spec register_server(scope(), server_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_server(local, Id, Pid, Config) when is_pid(Pid) ->
    register_server(Id, Pid, Config);
register_server(global, Id, Pid, Config) when is_pid(Pid) ->
    erlmcp_registry_global:register(server, Id, Pid, Config).


%% @doc Registers `Pid' as the transport `Id', as {@link register_server/3} does.
%%
%% If `Config' is a map with a `server_id' other than `undefined', the transport is bound to that
%% server at once, whether that is registered or not.
-spec register_transport(transport_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_transport(Id, Pid, Config) when is_pid(Pid) ->
    local({register_transport, Id, Pid, Config}).


%% @doc Registers a transport on this node, or in the whole cluster (without bindings).
-spec register_transport(scope(), transport_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_transport(local, Id, Pid, Config) when is_pid(Pid) ->
    register_transport(Id, Pid, Config);
register_transport(global, Id, Pid, Config) when is_pid(Pid) ->
    erlmcp_registry_global:register(transport, Id, Pid, Config).


%% @doc Removes a server with every binding to it; its transports stay.
%%
%% For an unknown server nothing changes, not even automatic bindings that name it.
-spec unregister_server(server_id()) -> ok.
unregister_server(Id) ->
    local({unregister_server, Id}).


%% @doc Removes a server of this node, or of the cluster.
-spec unregister_server(scope(), server_id()) -> ok.
unregister_server(local, Id) ->
    unregister_server(Id);
unregister_server(global, Id) ->
    erlmcp_registry_global:unregister(server, Id).


%% @doc Removes a transport with its binding.
-spec unregister_transport(transport_id()) -> ok.
unregister_transport(Id) ->
    local({unregister_transport, Id}).


%% @doc Removes a transport of this node, or of the cluster.
-spec unregister_transport(scope(), transport_id()) -> ok.
unregister_transport(local, Id) ->
    unregister_transport(Id);
unregister_transport(global, Id) ->
    erlmcp_registry_global:unregister(transport, Id).


%% @doc Exchanges the config of a server; its process and its bindings stay.
-spec update_server(server_id(), term()) -> ok | {error, not_found}.
update_server(Id, Config) ->
    local({update_server, Id, Config}).


%%% Lookup


%% @doc The process and the config of a server; never a process of this node that has ended.
-spec find_server(server_id()) -> {ok, entry()} | {error, not_found}.
find_server(Id) ->
    local({find_server, Id}).


%% @doc The process and the config of a server of this node, or of the cluster, then with its node.
-spec find_server(scope(), server_id()) -> {ok, entry() | global_entry()} | {error, not_found}.
find_server(local, Id) ->
    find_server(Id);
find_server(global, Id) ->
    erlmcp_registry_global:find(server, Id).


%% @doc The process and the config of a transport; never a process of this node that has ended.
-spec find_transport(transport_id()) -> {ok, entry()} | {error, not_found}.
find_transport(Id) ->
    local({find_transport, Id}).


%% @doc The process and the config of a transport of this node, or of the cluster, then with its
%% node.
-spec find_transport(scope(), transport_id()) ->
          {ok, entry() | global_entry()} | {error, not_found}.
find_transport(local, Id) ->
    find_transport(Id);
find_transport(global, Id) ->
    erlmcp_registry_global:find(transport, Id).


%% @doc All servers, in no particular order. More than a few hundred are listed on a dirty scheduler.
-spec list_servers() -> [{server_id(), entry()}].
list_servers() ->
    local(list_servers).


%% @doc All servers of this node, or of the cluster, then with their nodes.
-spec list_servers(scope()) -> [{server_id(), entry() | global_entry()}].
list_servers(local) ->
    list_servers();
list_servers(global) ->
    erlmcp_registry_global:list(server).


%% @doc All transports, in no particular order. See {@link list_servers/0}.
-spec list_transports() -> [{transport_id(), entry()}].
list_transports() ->
    local(list_transports).


%% @doc All transports of this node, or of the cluster, then with their nodes.
-spec list_transports(scope()) -> [{transport_id(), entry() | global_entry()}].
list_transports(local) ->
    list_transports();
list_transports(global) ->
    erlmcp_registry_global:list(transport).


%% @doc The processes of all servers, one for each id.
-spec get_servers() -> [pid()].
get_servers() ->
    [ Pid || {_Id, {Pid, _Config}} <- list_servers() ].


%%% Bindings


%% @doc Binds a transport to a server, instead of what it is bound to. The server is checked first.
-spec bind_transport_to_server(transport_id(), server_id()) ->
          ok | {error, server_not_found | transport_not_found}.
bind_transport_to_server(TransportId, ServerId) ->
    local({bind_transport_to_server, TransportId, ServerId}).


%% @doc Ends the binding of a transport; `ok' also if there is none.
-spec unbind_transport(transport_id()) -> ok.
unbind_transport(TransportId) ->
    local({unbind_transport, TransportId}).


%% @doc The server that a transport is bound to. Bound to the id `undefined' is `not_found'.
-spec get_server_for_transport(transport_id()) -> {ok, server_id()} | {error, not_found}.
get_server_for_transport(TransportId) ->
    local({get_server_for_transport, TransportId}).


%%% Routing


%% @doc Sends `{mcp_message, TransportId, Message}' to a server. Neither the transport nor a binding
%% is checked. An unknown server is logged, at most once a second, and `ok' all the same.
%%
%% The transport's token bucket pays, if it is registered, and the server's shard admits. A message
%% that is refused is not sent; see {@link erlmcp_backpressure}.
-spec route_to_server(server_id(), transport_id(), term()) ->
          ok | {error, circuit_open | shard_overloaded | rate_limited}.
route_to_server(ServerId, TransportId, Message) ->
    case erlmcp_nif:route_server(ServerId, TransportId) of
        Pid when is_pid(Pid) ->
            Pid ! {mcp_message, TransportId, Message},
            ok;
        Other ->
            case erlmcp_backpressure:deliver(Other, {mcp_message, TransportId, Message}) of
                {error, not_found} -> unknown_target(server, ServerId);
                Result -> Result
            end
    end.


%% @doc Sends `{mcp_response, ServerId, Message}' to a transport, or with `broadcast' for its id to
%% every transport bound to the server. The server is not checked. No target at all is logged, at
%% most once a second, and `ok' all the same.
%%
%% The transport's shard admits, and no bucket pays. A broadcast admits each transport by itself: an
%% error says that it was refused for some of them, and the others have got it.
-spec route_to_transport(transport_id() | broadcast, server_id(), term()) ->
          ok | {error, circuit_open | shard_overloaded}.
route_to_transport(broadcast, ServerId, Message) ->
    broadcast(ServerId, Message);
route_to_transport(TransportId, ServerId, Message) ->
    case route_to_transport_id(TransportId, ServerId, Message) of
        {error, not_found} -> unknown_target(transport, TransportId);
        Result -> Result
    end.


-spec route_to_transport_id(transport_id(), server_id(), term()) ->
          ok | {error, erlmcp_backpressure:reason()}.
route_to_transport_id(TransportId, ServerId, Message) ->
    case erlmcp_nif:route_transport(TransportId) of
        Pid when is_pid(Pid) ->
            Pid ! {mcp_response, ServerId, Message},
            ok;
        Other ->
            erlmcp_backpressure:deliver(Other, {mcp_response, ServerId, Message})
    end.


%% @doc Sends `{mcp_response, ServerId, Message}' to every transport bound to a server, or to one
%% transport in the name of the server that its config names (not the one that it is bound to).
-spec route_message({server, server_id()} | {transport, transport_id()}, term()) ->
          ok |
          {error,
           server_not_found | transport_not_found | no_bound_server | circuit_open | shard_overloaded}.
route_message({server, ServerId}, Message) ->
    case find_server(ServerId) of
        {ok, _} -> broadcast(ServerId, Message);
        {error, not_found} -> {error, server_not_found}
    end;
route_message({transport, TransportId}, Message) ->
    case find_transport(TransportId) of
        {ok, {_Pid, #{server_id := ServerId}}} when ServerId =/= undefined ->
            case route_to_transport_id(TransportId, ServerId, Message) of
                {error, not_found} -> {error, transport_not_found};
                Result -> Result
            end;
        {ok, _} ->
            {error, no_bound_server};
        {error, not_found} ->
            {error, transport_not_found}
    end.


%%% Operation


%% @doc The registry's process.
-spec get_pid() -> pid() | undefined.
get_pid() ->
    whereis(?MODULE).


%% @doc The length of the registry process's mailbox; 0 if there is none. Messages do not pass
%% through it.
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


%% @doc All bindings, in the form that {@link restore_state/1} takes.
-spec get_all_state() -> {ok, saved_state()}.
get_all_state() ->
    local(get_all_state).


%% @doc Makes the bindings be those of a saved state, as far as its transports are registered. Its
%% servers need not be.
-spec restore_state(saved_state() | term()) -> ok | {error, invalid_state}.
restore_state(State) ->
    local({restore_state, State}).


%% @doc Sends `{erlmcp_shutdown, Id, normal}' to every server and transport, and waits a second for
%% them to finish. The registry stays.
-spec graceful_shutdown() -> ok.
graceful_shutdown() ->
    Entries = list_servers() ++ list_transports(),
    _ = [ Pid ! {erlmcp_shutdown, Id, normal} || {Id, {Pid, _Config}} <- Entries ],
    timer:sleep(?SHUTDOWN_MS).


%%% Names


%% @equiv erlmcp_registry_name:validate_tool_name(Name)
-spec validate_tool_name(term()) -> ok | {error, erlmcp_registry_name:name_error()}.
validate_tool_name(Name) ->
    erlmcp_registry_name:validate_tool_name(Name).


%% @equiv erlmcp_registry_name:validate_transport_name(Name)
-spec validate_transport_name(term()) -> ok | {error, erlmcp_registry_name:name_error()}.
validate_transport_name(Name) ->
    erlmcp_registry_name:validate_transport_name(Name).


%% @equiv erlmcp_registry_name:normalize_name(Name)
-spec normalize_name(binary() | string() | atom()) -> atom() | binary().
normalize_name(Name) ->
    erlmcp_registry_name:normalize_name(Name).


%%% gen_server


%% @private
-spec init([]) -> {ok, #state{}}.
init([]) ->
    _ = process_flag(trap_exit, true),
    %% gen has registered the name by now, if there is one.
    case process_info(self(), registered_name) of
        {registered_name, ?MODULE} ->
            ok = erlmcp_nif:open(default),
            {ok, #state{registry = default}};
        _ ->
            {ok, #state{registry = erlmcp_shard_registry:new(#{})}}
    end.


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) -> {reply, term(), #state{}}.
handle_call(Request, _From, #state{registry = Registry} = State) ->
    Reply =
        try
            execute(Registry, Request)
        catch
            error:badarg -> {error, badarg}
        end,
    {reply, Reply, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(Cast, #state{registry = Registry} = State) ->
    try
        route(Registry, Cast)
    catch
        %% The id is longer than any that can be registered.
        error:badarg -> unknown_target(id, too_long)
    end,
    {noreply, State}.


%% @private
%% Exit signals of others than the parent arrive here, and whatever erlmcp sends us.
-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info(_Info, State) ->
    {noreply, State}.


%% @private
%% An orderly end clears the registry. Anything else leaves it to the next one under the name. An
%% anonymous instance's registry goes with the last reference to it.
-spec terminate(term(), #state{}) -> ok.
terminate(Reason, #state{registry = Registry}) ->
    case Reason of
        normal -> erlmcp_native_registry:close(Registry);
        shutdown -> erlmcp_native_registry:close(Registry);
        {shutdown, _} -> erlmcp_native_registry:close(Registry);
        _ -> ok
    end.


%% @private
-spec code_change(term(), #state{}, term()) -> {ok, #state{}}.
code_change(_OldVsn, State, _Extra) ->
    {ok, State}.


%% @private
%% Configs may hold secrets, and status reports end up in logs.
-spec format_status(gen_server:format_status()) -> gen_server:format_status().
format_status(Status) ->
    maps:map(
      fun(state, #state{registry = Registry}) ->
              #{
                servers => erlmcp_nif:count(Registry, server),
                transports => erlmcp_nif:count(Registry, transport),
                bindings => maps:from_list(erlmcp_nif:bindings(Registry))
               };
         (message, Message) ->
              without_config(Message);
         (log, _Events) ->
              [];
         (_Key, Value) ->
              Value
      end,
      Status).


-spec without_config(term()) -> term().
without_config({'$gen_call', From, Request}) -> {'$gen_call', From, without_config(Request)};
without_config({register_server, Id, Pid, _Config}) -> {register_server, Id, Pid, redacted};
without_config({register_transport, Id, Pid, _Config}) -> {register_transport, Id, Pid, redacted};
without_config({update_server, Id, _Config}) -> {update_server, Id, redacted};
without_config(Message) -> Message.


%%% Requests


%% A request on the named instance, carried out here. `whereis/1' is what makes it fail as a call
%% would while there is no process.
-spec local(term()) -> term().
local(Request) ->
    case whereis(?MODULE) of
        undefined ->
            not_running(Request);
        _Pid ->
            case execute(default, Request) of
                {error, registry_closed} -> not_running(Request);
                Result -> Result
            end
    end.


-spec not_running(term()) -> no_return().
not_running(Request) ->
    exit({noproc, {gen_server, call, [?MODULE, Request]}}).


-spec execute(erlmcp_nif:registry(), term()) -> term().
execute(Registry, {register_server, Id, Pid, Config}) ->
    register(Registry, server, Id, Pid, Config);
execute(Registry, {register_transport, Id, Pid, Config}) ->
    register(Registry, transport, Id, Pid, Config);
execute(Registry, {unregister_server, Id}) ->
    erlmcp_native_registry:unregister(Registry, server, Id);
execute(Registry, {unregister_transport, Id}) ->
    erlmcp_native_registry:unregister(Registry, transport, Id);
execute(Registry, {update_server, Id, Config}) ->
    erlmcp_native_registry:update_server(Registry, Id, Config);
execute(Registry, {find_server, Id}) ->
    erlmcp_native_registry:find(Registry, server, Id);
execute(Registry, {find_transport, Id}) ->
    erlmcp_native_registry:find(Registry, transport, Id);
execute(Registry, list_servers) ->
    erlmcp_native_registry:list(Registry, server);
execute(Registry, list_transports) ->
    erlmcp_native_registry:list(Registry, transport);
execute(Registry, {bind_transport_to_server, TransportId, ServerId}) ->
    erlmcp_nif:bind(Registry, TransportId, ServerId, true);
execute(Registry, {unbind_transport, TransportId}) ->
    erlmcp_nif:unbind(Registry, TransportId);
execute(Registry, {get_server_for_transport, TransportId}) ->
    case erlmcp_nif:bound_server(Registry, TransportId) of
        {ok, undefined} -> {error, not_found};
        Found -> Found
    end;
execute(Registry, get_all_state) ->
    {ok, {registry_state, maps:from_list(erlmcp_nif:bindings(Registry))}};
execute(Registry, {restore_state, {registry_state, Bindings}}) when is_map(Bindings) ->
    restore(Registry, Bindings);
execute(_Registry, {restore_state, _Invalid}) ->
    {error, invalid_state};
execute(_Registry, _Request) ->
    {error, unknown_request}.


-spec register(erlmcp_nif:registry(), server | transport, term(), pid(), term()) ->
          ok | {error, already_registered | registry_full | registry_closed}.
register(Registry, Namespace, Id, Pid, Config) ->
    case erlmcp_native_registry:register(Registry, Namespace, Id, Pid, Config, owner(Registry)) of
        {error, {already_registered, Pid}} ->
            case application:get_env(erlmcp_native, same_pid, already_registered) of
                ok -> ok;
                already_registered -> {error, already_registered}
            end;
        {error, {already_registered, _Other}} ->
            {error, already_registered};
        Result ->
            Result
    end.


%% Requests on a registry of our own are carried out by our own process.
-spec owner(erlmcp_nif:registry()) -> pid() | none.
owner(default) -> none;
owner(_Own) -> self().


%% One binding after the other: a transport that is registered meanwhile keeps its own.
-spec restore(erlmcp_nif:registry(), #{transport_id() => server_id()}) -> ok.
restore(Registry, Bindings) ->
    _ = [ erlmcp_nif:unbind(Registry, TransportId)
          || {TransportId, _} <- erlmcp_nif:bindings(Registry), not is_map_key(TransportId, Bindings) ],
    _ = [ erlmcp_nif:bind(Registry, TransportId, ServerId, false)
          || {TransportId, ServerId} <- maps:to_list(Bindings) ],
    ok.


-spec route(erlmcp_nif:registry(), term()) -> ok.
route(Registry, {route_to_server, ServerId, TransportId, Message}) ->
    send(Registry, server, ServerId, {mcp_message, TransportId, Message});
route(Registry, {route_to_transport, broadcast, ServerId, Message}) ->
    broadcast(Registry, ServerId, Message);
route(Registry, {route_to_transport, TransportId, ServerId, Message}) ->
    send(Registry, transport, TransportId, {mcp_response, ServerId, Message});
route(_Registry, _Unknown) ->
    ok.


-spec send(erlmcp_nif:registry(), server | transport, term(), term()) -> ok.
send(Registry, Namespace, Id, Message) ->
    case erlmcp_nif:whereis(Registry, Namespace, Id) of
        undefined ->
            unknown_target(Namespace, Id);
        Pid ->
            Pid ! Message,
            ok
    end.


%% Each transport is admitted by itself.
-spec broadcast(server_id(), term()) -> ok | {error, erlmcp_backpressure:reason()}.
broadcast(ServerId, Message) ->
    {Pids, Refused, Events} =
        case erlmcp_nif:route_bound(ServerId) of
            dirty -> erlmcp_nif:route_bound_dirty(ServerId);
            Done -> Done
        end,
    ok = send_all(Pids, {mcp_response, ServerId, Message}),
    ok = erlmcp_backpressure:notify(Events),
    case Refused of
        none when Pids =:= [] -> unknown_target(transport_of, ServerId);
        none -> ok;
        Refusal -> erlmcp_backpressure:refused(Refusal)
    end.


-spec send_all([pid()], term()) -> ok.
send_all(Pids, Message) ->
    lists:foreach(fun(Pid) -> Pid ! Message end, Pids).


-spec broadcast(erlmcp_nif:registry(), server_id(), term()) -> ok.
broadcast(Registry, ServerId, Message) ->
    case erlmcp_native_registry:bound_transports(Registry, ServerId) of
        [] -> unknown_target(transport_of, ServerId);
        Pids -> send_all(Pids, {mcp_response, ServerId, Message})
    end.


%%% Warnings

-define(WARNINGS,            {?MODULE, warnings}).
-define(WARNING_INTERVAL_MS, 1000).


%% Logs a route without a target, at most once a second, with the number of those that were not
%% logged since. The cell has the time of the last one (1) and that number (2).
-spec unknown_target(server | transport | transport_of | id, term()) -> ok.
unknown_target(Kind, Id) ->
    Cell = warning_cell(),
    Now = erlang:monotonic_time(millisecond),
    Last = atomics:get(Cell, 1),
    case Now - Last >= ?WARNING_INTERVAL_MS andalso
         atomics:compare_exchange(Cell, 1, Last, Now) =:= ok of
        true ->
            Suppressed = atomics:exchange(Cell, 2, 0),
            ?LOG_WARNING(
              "erlmcp_registry: no ~ts ~tP to route to (~b such warnings suppressed)",
              [target_name(Kind), Id, 20, Suppressed],
              #{domain => [erlmcp_native]});
        false ->
            atomics:add(Cell, 2, 1)
    end.


-spec target_name(server | transport | transport_of | id) -> string().
target_name(transport_of) -> "transport bound to server";
target_name(Kind) -> atom_to_list(Kind).


%% Two processes may both make the first cell. Then one warning more is logged.
-spec warning_cell() -> atomics:atomics_ref().
warning_cell() ->
    case persistent_term:get(?WARNINGS, undefined) of
        undefined ->
            Cell = atomics:new(2, [{signed, true}]),
            atomics:put(Cell, 1, erlang:monotonic_time(millisecond) - ?WARNING_INTERVAL_MS),
            persistent_term:put(?WARNINGS, Cell),
            Cell;
        Cell ->
            Cell
    end.
