%%% @doc The registry of erlmcp, with every look-up, registration, binding and route in native code.
%%%
%%% The API is that of erlmcp's own `erlmcp_registry', in all its generations. The functions on the
%%% named instance run in the calling process and send no message to the registry's process, which
%%% is a `gen_server' because callers start, link, stop and `call' it. It owns a registry in native
%%% memory: the named instance owns the servers and transports of the default registry, an anonymous instance
%%% (`gen_server:start(erlmcp_registry, [], [])') a registry of its own.
%%%
%%% == Consistency ==
%%% Each function is one atomic step: after it has returned, every process sees
%%% its effect. Lists and broadcasts are not snapshots: an entry that is there throughout the call is seen exactly
%%% once, one that is registered or removed during the call may or may not be seen, and an id that is removed and
%%% registered again may be listed twice. Messages from one process through the registry to one target arrive in the
%%% order sent.
%%%
%%% == Exits of the registry's process ==
%%% If the process was killed, registrations and bindings stay, routing goes on, and the next process of the
%%% name takes them over. An orderly exit (`normal', `shutdown', `{shutdown, _}') clears them. While
%%% no process has the name, `route_*' return `ok' and every other function exits with `noproc'.
%%%
%%% == Errors ==
%%% A pid argument that is not a pid raises `function_clause'. An id whose encoding takes more than `max_id_bytes'
%%% raises `badarg'. With `max_entries' registrations the result is `{error, registry_full}'.
-module(erlmcp_registry).

-behaviour(gen_server).

%% Registration
-export([start_link/0]).
-export([register_server/3, register_server/4]).
-export([register_transport/3, register_transport/4]).
-export([unregister_server/1, unregister_server/2]).
-export([unregister_transport/1, unregister_transport/2]).
-export([update_server/2]).
%% Look-up
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
-export([init/1, handle_continue/2, handle_call/3, handle_cast/2, handle_info/2]).
-export([terminate/2, code_change/3]).
-export([format_status/1]).

-export_type([server_id/0, transport_id/0, scope/0, entry/0, global_entry/0, saved_state/0, name_error/0]).

-type server_id() :: term().
-type transport_id() :: term().
-type scope() :: local | global.
-type entry() :: {pid(), Config :: term()}.
-type global_entry() :: {node(), pid(), Config :: term()}.
-type saved_state() :: {registry_state, #{transport_id() => server_id()}}.
-type name_error() :: empty | too_long | invalid_characters | invalid_binary.

-define(SHUTDOWN_MS, 1000).
%% The maximum length of an atom, and therefore of a name.
-define(MAX_NAME_CHARACTERS, 255).
%% Letters (L) with their marks (M), decimal digits (Nd), separators of the parts of names, and the parts of emoji:
%% symbols (So), skin tones (Sk), the joiner, and the tags that make flags of regions.
-define(NAME_CHARACTERS, <<"^(?:[\\p{L}\\p{M}\\p{Nd}\\p{So}_\\-./:@ ]|[\\x{1F3FB}-\\x{1F3FF}]|\\x{200D}"
                           "|[\\x{1F000}-\\x{1FAFF}]|[\\x{E0020}-\\x{E007F}])+$">>).

%% A native call of the calling process; if the call is diverted, a request to the registry's process
%% ({@link erlmcp_rollout}). The request exits with `noproc' if there is no such process, or if it has closed the
%% native registry and is about to exit.
-define(NATIVE(Call, Request),
        case whereis(?MODULE) =/= undefined andalso Call of
            Reply when Reply =:= false; Reply =:= diverted; Reply =:= {error, registry_closed} ->
                gen_server:call(?MODULE, Request);
            Reply ->
                Reply
        end).

%%% Registration


%% @doc Starts the registry under the local name `erlmcp_registry'.
%%
%% Returns `{error, {already_started, Pid}}' if there is one. If the last one was killed, its
%% registrations and bindings are still there.
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @doc Registers `Pid' as the server `Id', until it exits or is unregistered.
%%
%% `Config' is any term; finds return it unchanged. Returns `{error, already_registered}' if a living
%% process has the id, and keeps the first registration. If that process is `Pid' itself and `same_pid' is `ok' in the
%% application environment, returns `ok'. A process that has exited is accepted,
%% and not found afterwards.
-spec register_server(server_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_server(Id, Pid, Config) when is_pid(Pid) ->
    ?NATIVE(erlmcp_registry_native:register(default, server, Id, Pid, Config), {register_server, Id, Pid, Config}).


%% @doc Registers a server on this node, or in the whole cluster
%% ({@link erlmcp_registry_global}).
-spec register_server(scope(), server_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full | timeout}.
register_server(local, Id, Pid, Config) when is_pid(Pid) ->
    register_server(Id, Pid, Config);
register_server(global, Id, Pid, Config) when is_pid(Pid) ->
    erlmcp_registry_global:register(server, Id, Pid, Config).


%% @doc Registers `Pid' as the transport `Id', as {@link register_server/3} does.
%%
%% If `Config' is a map with a `server_id' other than `undefined', the transport is bound to that
%% server at once, whether the server is registered or not.
-spec register_transport(transport_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_transport(Id, Pid, Config) when is_pid(Pid) ->
    ?NATIVE(erlmcp_registry_native:register(default, transport, Id, Pid, Config), {register_transport, Id, Pid, Config}).


%% @doc Registers a transport on this node, or in the whole cluster (without bindings).
-spec register_transport(scope(), transport_id(), pid(), term()) ->
          ok | {error, already_registered | registry_full | timeout}.
register_transport(local, Id, Pid, Config) when is_pid(Pid) ->
    register_transport(Id, Pid, Config);
register_transport(global, Id, Pid, Config) when is_pid(Pid) ->
    erlmcp_registry_global:register(transport, Id, Pid, Config).


%% @doc Removes a server with every binding to it; its transports stay.
%%
%% For an unknown server nothing changes, not even automatic bindings that name it.
-spec unregister_server(server_id()) -> ok.
unregister_server(Id) ->
    ?NATIVE(erlmcp_registry_native:unregister(default, server, Id), {unregister_server, Id}).


%% @doc Removes a server of this node, or of the cluster.
-spec unregister_server(scope(), server_id()) -> ok | {error, timeout}.
unregister_server(local, Id) ->
    unregister_server(Id);
unregister_server(global, Id) ->
    erlmcp_registry_global:unregister(server, Id).


%% @doc Removes a transport with its binding.
-spec unregister_transport(transport_id()) -> ok.
unregister_transport(Id) ->
    ?NATIVE(erlmcp_registry_native:unregister(default, transport, Id), {unregister_transport, Id}).


%% @doc Removes a transport of this node, or of the cluster.
-spec unregister_transport(scope(), transport_id()) -> ok | {error, timeout}.
unregister_transport(local, Id) ->
    unregister_transport(Id);
unregister_transport(global, Id) ->
    erlmcp_registry_global:unregister(transport, Id).


%% @doc Replaces the config of a server; its process and its bindings stay.
-spec update_server(server_id(), term()) -> ok | {error, not_found}.
update_server(Id, Config) ->
    ?NATIVE(erlmcp_registry_native:update_server(default, Id, Config), {update_server, Id, Config}).


%%% Look-up


%% @doc The process and the config of a server; never a process of this node that has exited.
-spec find_server(server_id()) -> {ok, entry()} | {error, not_found}.
find_server(Id) ->
    ?NATIVE(erlmcp_registry_native:find(default, server, Id), {find_server, Id}).


%% @doc The process and the config of a server of this node; in the cluster, its node too.
%% `timeout' if the node that holds the entry does not answer ({@link erlmcp_registry_global}).
-spec find_server(scope(), server_id()) ->
          {ok, entry() | global_entry()} | {error, not_found | timeout}.
find_server(local, Id) ->
    find_server(Id);
find_server(global, Id) ->
    erlmcp_registry_global:find(server, Id).


%% @doc The process and the config of a transport; never a process of this node that has exited.
-spec find_transport(transport_id()) -> {ok, entry()} | {error, not_found}.
find_transport(Id) ->
    ?NATIVE(erlmcp_registry_native:find(default, transport, Id), {find_transport, Id}).


%% @doc The process and the config of a transport of this node; in the cluster, its node too.
%% `timeout' if the node that holds the entry does not answer.
-spec find_transport(scope(), transport_id()) ->
          {ok, entry() | global_entry()} | {error, not_found | timeout}.
find_transport(local, Id) ->
    find_transport(Id);
find_transport(global, Id) ->
    erlmcp_registry_global:find(transport, Id).


%% @doc All servers, in no particular order. More than a few hundred are listed on a dirty scheduler.
-spec list_servers() -> [{server_id(), entry()}].
list_servers() ->
    ?NATIVE(erlmcp_registry_native:list(default, server), list_servers).


%% @doc All servers of this node; in the cluster, with their nodes. An entry whose node does not answer is
%% `{Id, {error, timeout}}'.
-spec list_servers(scope()) -> [{server_id(), entry() | global_entry() | {error, timeout}}].
list_servers(local) ->
    list_servers();
list_servers(global) ->
    erlmcp_registry_global:list(server).


%% @doc All transports, in no particular order. See {@link list_servers/0}.
-spec list_transports() -> [{transport_id(), entry()}].
list_transports() ->
    ?NATIVE(erlmcp_registry_native:list(default, transport), list_transports).


%% @doc All transports of this node; in the cluster, with their nodes. An entry whose node does not answer is
%% `{Id, {error, timeout}}'.
-spec list_transports(scope()) -> [{transport_id(), entry() | global_entry() | {error, timeout}}].
list_transports(local) ->
    list_transports();
list_transports(global) ->
    erlmcp_registry_global:list(transport).


%% @doc The processes of all servers, one for each id.
-spec get_servers() -> [pid()].
get_servers() ->
    [ Pid || {_Id, {Pid, _Config}} <- list_servers() ].


%%% Bindings


%% @doc Binds a transport to a server, in place of its present binding. The server must be registered.
-spec bind_transport_to_server(transport_id(), server_id()) ->
          ok | {error, server_not_found | transport_not_found}.
bind_transport_to_server(TransportId, ServerId) ->
    ?NATIVE(erlmcp_registry_native:bind(default, TransportId, ServerId, true), {bind_transport_to_server, TransportId, ServerId}).


%% @doc Ends the binding of a transport; `ok' also if there is none.
-spec unbind_transport(transport_id()) -> ok.
unbind_transport(TransportId) ->
    ?NATIVE(erlmcp_registry_native:unbind(default, TransportId), {unbind_transport, TransportId}).


%% @doc The server that a transport is bound to. A binding to the id `undefined' is `not_found'.
-spec get_server_for_transport(transport_id()) -> {ok, server_id()} | {error, not_found}.
get_server_for_transport(TransportId) ->
    ?NATIVE(erlmcp_registry_native:bound_server(default, TransportId), {get_server_for_transport, TransportId}).


%%% Routing


%% @doc Sends `{mcp_message, TransportId, Message}' to a server. Neither the transport nor a binding
%% is checked. An unknown server is logged, at most once a second, and the result is `ok'.
%%
%% The transport's token bucket is charged, if the transport is registered, and the server's shard admits. A message
%% that is refused is not sent; see {@link erlmcp_native}.
%%
%% A message to a process of another node neither connects nor suspends the caller: `noconnection' or `busy'.
-spec route_to_server(server_id(), transport_id(), term()) ->
          ok | {error, circuit_open | shard_overloaded | rate_limited | erlmcp_delivery:unsent()}.
route_to_server(ServerId, TransportId, Message) ->
    case erlmcp_nif:route_server(ServerId, TransportId) of
        Pid when is_pid(Pid), node(Pid) =:= node() ->
            Pid ! {mcp_message, TransportId, Message},
            ok;
        Other ->
            case deliver(Other, {server, ServerId}, TransportId, Message, {mcp_message, TransportId, Message}) of
                {error, not_found} -> erlmcp_registry_native:unknown_target(server, ServerId);
                Result -> Result
            end
    end.


%% @doc Sends `{mcp_response, ServerId, Message}' to a transport, or with the id `broadcast' to
%% every transport bound to the server. The server is not checked. If there is no target this is logged, at
%% most once a second, and the result is `ok'.
%%
%% The transport's shard admits, and no bucket is charged. A broadcast admits each transport by itself: an
%% error says that some transports were refused, and the others have got the message.
-spec route_to_transport(transport_id() | broadcast, server_id(), term()) ->
          ok | {error, circuit_open | shard_overloaded | erlmcp_delivery:unsent()}.
route_to_transport(broadcast, ServerId, Message) ->
    broadcast(ServerId, Message);
route_to_transport(TransportId, ServerId, Message) ->
    case route_to_transport_id(TransportId, ServerId, Message) of
        {error, not_found} -> erlmcp_registry_native:unknown_target(transport, TransportId);
        Result -> Result
    end.


-spec route_to_transport_id(transport_id(), server_id(), term()) ->
          ok | {error, erlmcp_delivery:reason()}.
route_to_transport_id(TransportId, ServerId, Message) ->
    case erlmcp_nif:route_transport(TransportId) of
        Pid when is_pid(Pid), node(Pid) =:= node() ->
            Pid ! {mcp_response, ServerId, Message},
            ok;
        Other ->
            deliver(Other, {transport, TransportId}, ServerId, Message, {mcp_response, ServerId, Message})
    end.


-spec deliver(erlmcp_nif:routed() | diverted,
              {erlmcp_registry_native:kind(), Id :: term()},
              Sender :: term(),
              Content :: term(),
              Message :: term()) -> ok | {error, erlmcp_delivery:reason()}.
deliver(diverted, Target, Sender, Content, Message) ->
    erlmcp_rollout_path:route(Target, Sender, Content, Message);
deliver(Routed, _Target, _Sender, _Content, Message) ->
    erlmcp_delivery:deliver(Routed, Message).


-spec broadcast(server_id(), term()) -> ok | {error, erlmcp_delivery:reason()}.
broadcast(ServerId, Message) ->
    Result = case erlmcp_nif:route_bound(ServerId) of
                 diverted -> erlmcp_rollout_path:broadcast(ServerId, Message);
                 Routed -> erlmcp_delivery:deliver_all(Routed, {mcp_response, ServerId, Message})
             end,
    case Result of
        {error, not_found} -> erlmcp_registry_native:unknown_target(transport_of, ServerId);
        _ -> Result
    end.


%% @doc Sends `{mcp_response, ServerId, Message}' to every transport bound to a server, or to one
%% transport in the name of the server that its config names (not the server that it is bound to).
%%
%% With the id of a transport alone: sends `{mcp_message, TransportId, Message}' to the server that the
%% transport is bound to, as the process does with the message `{transport_data, TransportId, Message}'.
%% `not_found' if there is no such transport, `no_bound_server' if it is not bound. A server that is not
%% registered is logged, as by {@link route_to_server/3}.
-spec route_message({server, server_id()} | {transport, transport_id()} | transport_id(), term()) ->
          ok |
          {error,
           server_not_found |
           transport_not_found |
           no_bound_server |
           erlmcp_delivery:reason()}.
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
    end;
route_message(TransportId, Message) ->
    case get_server_for_transport(TransportId) of
        {ok, ServerId} ->
            route_to_server(ServerId, TransportId, Message);
        {error, not_found} ->
            case find_transport(TransportId) of
                {ok, _} -> {error, no_bound_server};
                {error, not_found} -> {error, not_found}
            end
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


%% @doc All bindings, in the form that {@link restore_state/1} accepts.
-spec get_all_state() -> {ok, saved_state()}.
get_all_state() ->
    case ?NATIVE(erlmcp_registry_native:bindings(default), get_all_state) of
        {ok, Saved} -> {ok, Saved};
        Bindings -> {ok, {registry_state, maps:from_list(Bindings)}}
    end.


%% @doc Replaces all bindings by those of a saved state. Transports that are not registered are skipped; the
%% servers need not be registered.
-spec restore_state(saved_state() | term()) -> ok | {error, invalid_state}.
restore_state({registry_state, Bindings} = State) when is_map(Bindings) ->
    ?NATIVE(erlmcp_registry_native:restore(default, Bindings), {restore_state, State});
restore_state(State) ->
    ?NATIVE({error, invalid_state}, {restore_state, State}).


%% @doc Sends `{erlmcp_shutdown, Id, normal}' to every server and transport, and waits a second for
%% them to exit. The registry stays.
-spec graceful_shutdown() -> ok.
graceful_shutdown() ->
    Entries = list_servers() ++ list_transports(),
    _ = [ erlmcp_delivery:send(Pid, {erlmcp_shutdown, Id, normal}) || {Id, {Pid, _Config}} <- Entries ],
    timer:sleep(?SHUTDOWN_MS).


%%% Names

%% No function here ever makes an atom: atoms are not garbage-collected, and a name may come from the network.
%% Lengths are counted in extended grapheme clusters (Unicode Annex #29), so a family emoji or a letter with its accents
%% counts once.


%% @doc Checks the name of a tool.
%%
%% Letters and digits of any script, `_', `-', `.', `/', `:', `@', the space and emoji are valid. The first fault
%% found is returned: `invalid_binary' for anything but a binary, `empty', `too_long' above 255 characters, and
%% `invalid_characters' for any other character (including control characters) and for binaries that are not UTF-8.
-spec validate_tool_name(term()) -> ok | {error, name_error()}.
validate_tool_name(Name) ->
    validate_name(Name).


%% @doc Checks the name of a transport. The rules are those of {@link validate_tool_name/1}.
-spec validate_transport_name(term()) -> ok | {error, name_error()}.
validate_transport_name(Name) ->
    validate_name(Name).


%% @doc Returns the atom of this name if it exists, otherwise the name as an NFC binary.
%%
%% Names that differ only in their composition (é as one code point or as two) have the same result. Compare two results
%% only within the life of one node: which atoms exist depends on the modules that are loaded.
%% An atom is returned as it is, and a string is treated as its binary. Raises `badarg' for anything
%% that is not UTF-8 text.
-spec normalize_name(binary() | string() | atom()) -> atom() | binary().
normalize_name(Name) when is_atom(Name) ->
    Name;
normalize_name(Name) when is_binary(Name); is_list(Name) ->
    case unicode:characters_to_nfc_binary(Name) of
        Normal when is_binary(Normal) -> existing_atom(Normal);
        {error, _, _} -> error(badarg, [Name])
    end;
normalize_name(Name) ->
    error(badarg, [Name]).


-spec validate_name(term()) -> ok | {error, name_error()}.
validate_name(<<>>) ->
    {error, empty};
validate_name(Name) when is_binary(Name) ->
    try string:length(Name) of
        Length when Length > ?MAX_NAME_CHARACTERS -> {error, too_long};
        _ -> validate_name_characters(Name)
    catch
        error:_ -> {error, invalid_characters}
    end;
validate_name(_) ->
    {error, invalid_binary}.


%% The name is valid UTF-8 here: string:length/1 has accepted it.
-spec validate_name_characters(binary()) -> ok | {error, invalid_characters}.
validate_name_characters(Name) ->
    case re:run(Name, ?NAME_CHARACTERS, [unicode, dollar_endonly, {capture, none}]) of
        match -> ok;
        nomatch -> {error, invalid_characters}
    end.


-spec existing_atom(binary()) -> atom() | binary().
existing_atom(Name) ->
    try
        binary_to_existing_atom(Name, utf8)
    catch
        error:_ -> Name
    end.


%%% gen_server


%% @private
-spec init([]) -> {ok, erlmcp_registry_server:state(), {continue, start}} | {stop, term()}.
init([]) ->
    _ = process_flag(trap_exit, true),
    %% gen has registered the name by now, if there is one.
    Name = case process_info(self(), registered_name) of
               {registered_name, ?MODULE} -> named;
               _ -> anonymous
           end,
    case erlmcp_registry_server:init(Name) of
        {ok, State} -> {ok, State, {continue, start}};
        Stop -> Stop
    end.


%% @private
-spec handle_continue(start, erlmcp_registry_server:state()) -> {noreply, erlmcp_registry_server:state()}.
handle_continue(start, State) ->
    {noreply, erlmcp_registry_server:continue(State)}.


%% @private
-spec handle_call(term(), gen_server:from(), erlmcp_registry_server:state()) ->
          {reply, term(), erlmcp_registry_server:state()} | {noreply, erlmcp_registry_server:state()}.
handle_call(Request, From, State) ->
    erlmcp_registry_server:call(Request, From, State).


%% @private
-spec handle_cast(term(), erlmcp_registry_server:state()) -> {noreply, erlmcp_registry_server:state()}.
handle_cast(Cast, State) ->
    {noreply, erlmcp_registry_server:cast(Cast, State)}.


%% @private
%% Exit signals from processes other than the parent arrive here, and all messages that erlmcp sends to the process.
-spec handle_info(term(), erlmcp_registry_server:state()) -> {noreply, erlmcp_registry_server:state()}.
handle_info(Info, State) ->
    {noreply, erlmcp_registry_server:info(Info, State)}.


%% @private
-spec terminate(term(), erlmcp_registry_server:state()) -> ok.
terminate(Reason, State) ->
    erlmcp_registry_server:terminate(Reason, State).


%% @private
-spec code_change(term(), erlmcp_registry_server:state(), term()) -> {ok, erlmcp_registry_server:state()}.
code_change(_OldVsn, State, _Extra) ->
    {ok, State}.


%% @private
%% Configs may hold secrets, and status reports end up in logs.
-spec format_status(gen_server:format_status()) -> gen_server:format_status().
format_status(Status) ->
    maps:map(
      fun(state, State) -> erlmcp_registry_server:summary(State);
         (message, Message) -> without_config(Message);
         (log, _Events) -> [];
         (_Key, Value) -> Value
      end,
      Status).


-spec without_config(term()) -> term().
without_config({'$gen_call', From, Request}) -> {'$gen_call', From, without_config(Request)};
without_config({register_server, Id, Pid, _Config}) -> {register_server, Id, Pid, redacted};
without_config({register_transport, Id, Pid, _Config}) -> {register_transport, Id, Pid, redacted};
without_config({update_server, Id, _Config}) -> {update_server, Id, redacted};
without_config(Message) -> Message.
