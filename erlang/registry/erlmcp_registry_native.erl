%%% @private
%%% Registrations in native memory, for the modules with the public API ({@link erlmcp_registry},
%%% {@link erlmcp_shard_registry}, {@link erlmcp_group}) and for the registry's process.
%%%
%%% Everything runs in the calling process. Nothing here is a server.
%%%
%%% The registry is `default' for callers in their own processes; `exclusive' for the same registry used by
%%% the process that owns it; or a reference. With `default', changes and look-ups of servers,
%%% transports and bindings return `diverted' while they are diverted ({@link divert/1}); a diverted change
%%% has changed nothing.
%%%
%%% Native code cannot monitor a process of another node. Its entry has a <em>sentinel</em>, a local
%%% process that monitors the remote one and exits with it. The entry is removed when its sentinel exits, as it
%%% would be for a local process.
-module(erlmcp_registry_native).

%% Registration
-export([register/5, register/6, register_or_find/4, replace/4, unregister/3, release/3]).
-export([update_server/3, update_connection/3]).
%% Groups
-export([join/3, leave/3]).
%% Look-up
-export([find/3, row/3, list/2, list_shard/2, connections_of/2, groups_of/2, counts/1]).
%% A process of its own
-export([exit_with_watched/3]).
%% Bindings
-export([bind/4, unbind/2, bound_server/2, bindings/1, restore/2]).
%% Requests and casts of the registry's process
-export([execute/2, route/2, unknown_target/2, undelivered/3]).
%% For the owner of the default registry
-export([open/1, close/1, divert/1, page/5]).
-export([route_server/2, route_transport/1, route_bound/1]).
%% What a route would return
-export([forecast/3]).
%% The library and the default registry
-export([load_error/0, make_default/3, distinct_configs/0]).
%% Sentinels
-export([init_sentinel/2, wake_sentinel/0]).

-export_type([kind/0, entry/0, binding/0, row/0]).

-type kind() :: server | transport.
-type entry() :: {pid(), Config :: term()}.
-type binding() :: unbound | {bound, Server :: term()}.
-type row() :: {Id :: term(), pid(), Config :: term(), binding()}.

%%% Registration


%% @doc Registers a server or a transport. Raises `badarg' if `Pid' is not a pid or `Id' is too long.
-spec register(erlmcp_nif:registry(), kind(), term(), pid(), term()) ->
          ok | {error, already_registered | registry_full | registry_closed} | diverted.
register(Registry, Kind, Id, Pid, Config) ->
    case register(Registry, Kind, Id, Pid, Config, owner(Registry)) of
        {error, {already_registered, Pid}} ->
            case application:get_env(erlmcp_native, same_pid, already_registered) of
                ok -> ok;
                _ -> {error, already_registered}
            end;
        {error, {already_registered, _Other}} ->
            {error, already_registered};
        Result ->
            Result
    end.


%% A registry given by reference is used by its own process alone.
-spec owner(erlmcp_nif:registry()) -> pid() | none.
owner(Own) when is_reference(Own) -> self();
owner(_Default) -> none.


%% @doc Registers in any namespace. Raises `badarg' if `Pid' is not a pid or `Id' is too long.
%%
%% `Owner' is the process that the registry ends with, if there is one. A sentinel then exits with it
%% too, since no process unregisters the entries of a registry that was freed.
-spec register(erlmcp_nif:registry(), erlmcp_nif:namespace(), term(), pid(), term(), Owner :: pid() | none) ->
          ok | {error, {already_registered, pid()} | registry_full | registry_closed} | diverted.
register(Registry, Namespace, Id, Pid, Config, Owner) ->
    Register = fun(Monitored) -> erlmcp_nif:register(Registry, Namespace, Id, Pid, Monitored, Config) end,
    case monitored(Pid, Owner, Register) of
        ok -> ok;
        diverted -> diverted;
        registry_full -> full(Registry);
        Reason -> {error, Reason}
    end.


%% @doc Registers a connection, or returns the present one.
-spec register_or_find(erlmcp_nif:registry(), term(), pid(), term()) ->
          {registered | found, entry()} | {error, registry_full}.
register_or_find(Registry, Id, Pid, Config) ->
    case monitored(Pid, none, fun(Monitored) -> erlmcp_nif:register_or_find(Registry, Id, Pid, Monitored, Config) end) of
        ok -> {registered, {Pid, Config}};
        {found, Entry} -> {found, Entry};
        registry_full -> full(Registry)
    end.


%% @doc Registers a connection in the place of the present one, if there is one.
-spec replace(erlmcp_nif:registry(), term(), pid(), term()) ->
          {ok, Former :: pid() | undefined} | {error, registry_full}.
replace(Registry, Id, Pid, Config) ->
    case monitored(Pid, none, fun(Monitored) -> erlmcp_nif:replace(Registry, Id, Pid, Monitored, Config) end) of
        ok ->
            {ok, undefined};
        {replaced, Former, none} ->
            {ok, Former};
        {replaced, Former, Sentinel} ->
            ok = end_sentinel(Sentinel),
            {ok, Former};
        registry_full ->
            full(Registry)
    end.


%% @doc Makes a process a member of a group; `ok' also if it is one.
-spec join(erlmcp_nif:registry(), Group :: term(), pid()) -> ok | {error, registry_full}.
join(Registry, Group, Pid) ->
    case monitored(Pid, none, fun(Monitored) -> erlmcp_nif:join_group(Registry, Group, Pid, Monitored) end) of
        ok -> ok;
        {already_registered, Pid} -> ok;
        registry_full -> full(Registry)
    end.


%% @doc Ends the membership of a process in a group.
-spec leave(erlmcp_nif:registry(), Group :: term(), pid()) -> ok | {error, not_joined}.
leave(Registry, Group, Pid) ->
    case erlmcp_nif:leave_group(Registry, Group, Pid) of
        ok -> ok;
        {ok, Sentinel} -> end_sentinel(Sentinel);
        not_joined -> {error, not_joined}
    end.


-spec full(erlmcp_nif:registry()) -> {error, registry_full}.
full(Registry) ->
    {_Shards, MaxEntries, _MaxIdBytes} = erlmcp_nif:limits(Registry),
    ok = warn(registrations, registry_full, #{max_entries => MaxEntries}),
    {error, registry_full}.


%% Calls the fun with the process that an entry for `Pid' monitors. A sentinel stays if the result says that the entry
%% was made.
-spec monitored(pid(), Owner :: pid() | none, fun((pid()) -> Result)) -> Result.
monitored(Pid, _Owner, Register) when node(Pid) =:= node() ->
    Register(Pid);
monitored(Pid, Owner, Register) when is_pid(Pid) ->
    Sentinel = start_sentinel(Pid, Owner),
    try Register(Sentinel) of
        ok ->
            ok;
        {replaced, _Former, _Sentinel} = Replaced ->
            Replaced;
        Refused ->
            end_sentinel(Sentinel),
            Refused
    catch
        Class:Reason:Stacktrace ->
            end_sentinel(Sentinel),
            erlang:raise(Class, Reason, Stacktrace)
    end;
monitored(_NoPid, _Owner, _Register) ->
    error(badarg).


%% @doc Removes `Id' if it is registered.
-spec unregister(erlmcp_nif:registry(), erlmcp_nif:namespace(), term()) -> ok | diverted.
unregister(Registry, Namespace, Id) ->
    case erlmcp_nif:unregister(Registry, Namespace, Id) of
        {ok, Sentinel} -> end_sentinel(Sentinel);
        Done -> Done
    end.


%% @doc Removes a connection if the process holds it.
-spec release(erlmcp_nif:registry(), term(), pid()) -> ok | {error, not_held}.
release(Registry, Id, Pid) ->
    case erlmcp_nif:release(Registry, Id, Pid) of
        ok -> ok;
        {ok, Sentinel} -> end_sentinel(Sentinel);
        not_held -> {error, not_held}
    end.


%% @doc Replaces the config of a server; its process and its bindings stay.
-spec update_server(erlmcp_nif:registry(), term(), term()) -> ok | {error, not_found} | diverted.
update_server(Registry, Id, Config) ->
    erlmcp_nif:update(Registry, server, Id, Config).


%% @doc Replaces the capabilities of a connection; its process and its bucket stay.
-spec update_connection(erlmcp_nif:registry(), term(), term()) -> ok | {error, not_found}.
update_connection(Registry, Id, Capabilities) ->
    erlmcp_nif:update(Registry, connection, Id, Capabilities).


%%% Look-up


%% @doc The process and the config of `Id'; never a local process that has exited.
-spec find(erlmcp_nif:registry(), erlmcp_nif:namespace(), term()) ->
          {ok, entry()} | {error, not_found} | diverted.
find(Registry, Namespace, Id) ->
    erlmcp_nif:find(Registry, Namespace, Id).


%% @doc An entry, in the form that a page has.
-spec row(erlmcp_nif:registry(), kind(), Id :: term()) -> row() | none.
row(Registry, Kind, Id) ->
    case find(Registry, Kind, Id) of
        {ok, {Pid, Config}} when Kind =:= transport ->
            case erlmcp_nif:bound_server(Registry, Id) of
                {ok, ServerId} -> {Id, Pid, Config, {bound, ServerId}};
                {error, not_found} -> {Id, Pid, Config, unbound}
            end;
        {ok, {Pid, Config}} ->
            {Id, Pid, Config, unbound};
        {error, not_found} ->
            none
    end.


%% @doc All entries of a namespace.
-spec list(erlmcp_nif:registry(), erlmcp_nif:namespace()) -> [{term(), entry()}] | diverted.
list(Registry, Namespace) ->
    erlmcp_nif:list(Registry, Namespace).


%% @doc The connections of a shard.
-spec list_shard(erlmcp_nif:registry(), non_neg_integer()) -> [{term(), entry()}].
list_shard(Registry, Shard) ->
    erlmcp_nif:list_shard(Registry, Shard).


%% @doc The ids of the connections of a local process.
-spec connections_of(erlmcp_nif:registry(), pid()) -> [term()].
connections_of(Registry, Pid) ->
    watched(Registry, Pid, fun erlmcp_nif:watched_connections/2).


%% @doc The groups of a local process.
-spec groups_of(erlmcp_nif:registry(), pid()) -> [term()].
groups_of(Registry, Pid) ->
    watched(Registry, Pid, fun erlmcp_nif:watched_groups/2).


%% The VM knows which native monitors a process has, so nothing is kept for this.
%%
%% A process that asks for its own monitors is not told of those whose signals it has not received yet. So it has another
%% process ask.
-spec watched(erlmcp_nif:registry(), pid(), fun((erlmcp_nif:registry(), [reference()]) -> [term()])) -> [term()].
watched(Registry, Pid, Watched) when Pid =:= self() ->
    %% A wrong registry is the caller's error.
    _ = erlmcp_nif:limits(Registry),
    {Asking, Monitor} = spawn_monitor(?MODULE, exit_with_watched, [Registry, Pid, Watched]),
    receive
        {'DOWN', Monitor, process, Asking, {watched, Ids}} -> Ids;
        {'DOWN', Monitor, process, Asking, Reason} -> error(Reason)
    end;
watched(Registry, Pid, Watched) ->
    case process_info(Pid, monitored_by) of
        {monitored_by, Watches} -> Watched(Registry, [ Watch || Watch <- Watches, is_reference(Watch) ]);
        undefined -> []
    end.


%% @private
-spec exit_with_watched(erlmcp_nif:registry(), pid(), fun((erlmcp_nif:registry(), [reference()]) -> [term()])) -> no_return().
exit_with_watched(Registry, Pid, Watched) ->
    exit({watched, watched(Registry, Pid, Watched)}).


-spec counts(erlmcp_nif:registry()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(Registry) ->
    #{servers => erlmcp_nif:count(Registry, server), transports => erlmcp_nif:count(Registry, transport)}.


%%% Bindings


%% @doc Binds a transport to a server. With `false', also to one that is not registered.
-spec bind(erlmcp_nif:registry(), Transport :: term(), Server :: term(), ServerMustExist :: boolean()) ->
          ok | {error, server_not_found | transport_not_found} | diverted.
bind(Registry, TransportId, ServerId, ServerMustExist) ->
    erlmcp_nif:bind(Registry, TransportId, ServerId, ServerMustExist).


-spec unbind(erlmcp_nif:registry(), Transport :: term()) -> ok | diverted.
unbind(Registry, TransportId) ->
    erlmcp_nif:unbind(Registry, TransportId).


%% @doc The server that a transport is bound to. A binding to the id `undefined' is `not_found'.
-spec bound_server(erlmcp_nif:registry(), Transport :: term()) ->
          {ok, Server :: term()} | {error, not_found} | diverted.
bound_server(Registry, TransportId) ->
    case erlmcp_nif:bound_server(Registry, TransportId) of
        {ok, undefined} -> {error, not_found};
        Found -> Found
    end.


%% @doc All bindings, on a dirty scheduler.
-spec bindings(erlmcp_nif:registry()) -> [{Transport :: term(), Server :: term()}] | diverted.
bindings(Registry) ->
    erlmcp_nif:bindings(Registry).


%% @doc Replaces all bindings, one after the other: a transport that is registered meanwhile keeps
%% its own. Raises `badarg' for an id that is too long, and changes nothing then.
-spec restore(erlmcp_nif:registry(), #{term() => term()}) -> ok | diverted.
restore(Registry, Bindings) ->
    case bindings(Registry) of
        diverted ->
            diverted;
        Former ->
            ok = check_ids(Registry, maps:keys(Bindings)),
            ok = check_ids(Registry, maps:values(Bindings)),
            Unbound = [ unbind(Registry, Id) || {Id, _} <- Former, not is_map_key(Id, Bindings) ],
            Bound = [ bind(Registry, Id, ServerId, false) || {Id, ServerId} <- maps:to_list(Bindings) ],
            %% If diverted, the registry's process does all of it again.
            case lists:member(diverted, Unbound) orelse lists:member(diverted, Bound) of
                true -> diverted;
                false -> ok
            end
    end.


-spec check_ids(erlmcp_nif:registry(), [term()]) -> ok.
check_ids(Registry, Ids) ->
    lists:foreach(fun(Id) -> erlmcp_nif:shard(Registry, Id) end, Ids).


%%% Requests


%% @doc Carries out a request of the registry's process. Raises `badarg' for an id that is too long, and
%% for an argument that is not a pid.
-spec execute(exclusive | reference(), term()) -> term().
execute(Registry, {register_server, Id, Pid, Config}) ->
    register(Registry, server, Id, Pid, Config);
execute(Registry, {register_transport, Id, Pid, Config}) ->
    register(Registry, transport, Id, Pid, Config);
execute(Registry, {unregister_server, Id}) ->
    unregister(Registry, server, Id);
execute(Registry, {unregister_transport, Id}) ->
    unregister(Registry, transport, Id);
execute(Registry, {update_server, Id, Config}) ->
    update_server(Registry, Id, Config);
execute(Registry, {find_server, Id}) ->
    find(Registry, server, Id);
execute(Registry, {find_transport, Id}) ->
    find(Registry, transport, Id);
execute(Registry, list_servers) ->
    list(Registry, server);
execute(Registry, list_transports) ->
    list(Registry, transport);
execute(Registry, {bind_transport_to_server, TransportId, ServerId}) ->
    bind(Registry, TransportId, ServerId, true);
execute(Registry, {unbind_transport, TransportId}) ->
    unbind(Registry, TransportId);
execute(Registry, {get_server_for_transport, TransportId}) ->
    bound_server(Registry, TransportId);
execute(Registry, get_all_state) ->
    {ok, {registry_state, maps:from_list(bindings(Registry))}};
execute(Registry, {restore_state, {registry_state, Bindings}}) when is_map(Bindings) ->
    restore(Registry, Bindings);
execute(_Registry, {restore_state, _Invalid}) ->
    {error, invalid_state};
execute(_Registry, _Request) ->
    {error, unknown_request}.


%%% Casts


%% @doc Routes a message that was sent to the registry's process. It passes no layer of backpressure.
-spec route(erlmcp_nif:registry(), term()) -> ok.
route(Registry, Cast) ->
    try
        route_cast(Registry, Cast)
    catch
        %% The id is longer than any that can be registered.
        error:badarg -> unknown_target(id, too_long)
    end.


-spec route_cast(erlmcp_nif:registry(), term()) -> ok.
route_cast(Registry, {route_to_server, ServerId, TransportId, Message}) ->
    send(Registry, server, ServerId, {mcp_message, TransportId, Message});
route_cast(Registry, {route_to_transport, broadcast, ServerId, Message}) ->
    case bound_transports(Registry, ServerId) of
        [] ->
            unknown_target(transport_of, ServerId);
        Pids ->
            lists:foreach(fun(Pid) ->
                                  ok = count(Registry, ok),
                                  warn_unless_sent(erlmcp_delivery:send(Pid, {mcp_response, ServerId, Message}),
                                                   transport_of,
                                                   ServerId)
                          end,
                          Pids)
    end;
route_cast(Registry, {route_to_transport, TransportId, ServerId, Message}) ->
    send(Registry, transport, TransportId, {mcp_response, ServerId, Message});
route_cast(_Registry, _Unknown) ->
    ok.


-spec send(erlmcp_nif:registry(), kind(), term(), term()) -> ok.
send(Registry, Kind, Id, Message) ->
    case erlmcp_nif:whereis(Registry, Kind, Id) of
        undefined ->
            ok = count(Registry, not_found),
            unknown_target(Kind, Id);
        Pid ->
            ok = count(Registry, ok),
            warn_unless_sent(erlmcp_delivery:send(Pid, Message), Kind, Id)
    end.


%% Messages that the named process routes are counted.
-spec count(erlmcp_nif:registry(), ok | not_found) -> ok.
count(exclusive, Status) -> erlmcp_delivery:count(Status);
count(_Own, _Status) -> ok.


-spec warn_unless_sent(ok | {error, erlmcp_delivery:unsent()}, kind() | transport_of, term()) -> ok.
warn_unless_sent(ok, _Kind, _Id) -> ok;
warn_unless_sent({error, Reason}, Kind, Id) -> undelivered(Kind, Id, Reason).


-spec bound_transports(erlmcp_nif:registry(), Server :: term()) -> [pid()].
bound_transports(Registry, Server) ->
    erlmcp_nif:bound_transports(Registry, Server).


%%% Warnings

-define(WARNINGS(Group), {?MODULE, warnings, Group}).
-define(WARNING_INTERVAL_MS, 1000).


%% @doc Logs a route without a target, at most once a second, with the number of routes that were not
%% logged since. The cell has the time of the last warning (1) and that number (2).
-spec unknown_target(kind() | transport_of | server_of | id, term()) -> ok.
unknown_target(Kind, Id) ->
    warn(routes, unknown_target, #{target => Kind, id => Id}).


%% @doc Logs a message that the registry's process could not pass on, since it cannot return an error. Shares the
%% interval of {@link unknown_target/2}.
-spec undelivered(kind() | transport_of, term(), erlmcp_delivery:reason()) -> ok.
undelivered(Kind, Id, Reason) ->
    warn(routes, undelivered, #{target => Kind, id => Id, reason => Reason}).


-spec warn(routes | registrations, unknown_target | undelivered | registry_full, map()) -> ok.
warn(Group, Event, Details) ->
    Cell = warning_cell(Group),
    Now = erlang:monotonic_time(millisecond),
    Last = atomics:get(Cell, 1),
    case Now - Last >= ?WARNING_INTERVAL_MS andalso
         atomics:compare_exchange(Cell, 1, Last, Now) =:= ok of
        true ->
            Suppressed = atomics:exchange(Cell, 2, 0),
            erlmcp_native_log:log(warning, Event, Details#{suppressed => Suppressed});
        false ->
            atomics:add(Cell, 2, 1)
    end.


%% Two processes may both make the first cell. Then one more warning is logged.
-spec warning_cell(routes | registrations) -> atomics:atomics_ref().
warning_cell(Group) ->
    case persistent_term:get(?WARNINGS(Group), undefined) of
        undefined ->
            Cell = atomics:new(2, [{signed, true}]),
            atomics:put(Cell, 1, erlang:monotonic_time(millisecond) - ?WARNING_INTERVAL_MS),
            persistent_term:put(?WARNINGS(Group), Cell),
            Cell;
        Cell ->
            Cell
    end.


%%% For the owner of the default registry


%% @doc Accepts registrations of servers and transports again, after {@link close/1}.
-spec open(erlmcp_nif:registry()) -> ok.
open(Registry) ->
    erlmcp_nif:open(Registry).


%% @doc Removes all servers and transports, and refuses new ones until {@link open/1}.
-spec close(erlmcp_nif:registry()) -> ok.
close(Registry) ->
    lists:foreach(fun end_sentinel/1, erlmcp_nif:close(Registry)).


-define(CHANGES_TAKE_MS, 1).


%% @doc Diverts exactly these kinds of calls with `default', and returns when no change is under way
%% that began before.
-spec divert([changes | lookups | routes]) -> ok.
divert(Whom) ->
    case lists:member(changes, Whom) andalso erlmcp_nif:divert(Whom) of
        false ->
            _ = erlmcp_nif:divert(Whom),
            ok;
        ok ->
            ok;
        busy ->
            ok = timer:sleep(?CHANGES_TAKE_MS),
            divert(Whom)
    end.


%% @doc The entries of a namespace at some places of a shard, and the place at which to continue. An entry keeps
%% its place.
-spec page(erlmcp_nif:registry(), kind() | connection, Shard :: non_neg_integer(), From :: non_neg_integer(), Count :: pos_integer()) ->
          {[row()], Next :: non_neg_integer() | none}.
page(Registry, Kind, Shard, From, Count) ->
    erlmcp_nif:page(Registry, Kind, Shard, From, Count).


%% @doc What a route by the default registry would return now, and the milliseconds until every layer would admit the
%% message. `Payer' is a list of the transport whose bucket is charged, or empty.
-spec forecast(erlmcp_nif:namespace(), Id :: term(), Payer :: [term()]) ->
          {ok | erlmcp_nif:refusal(), WaitMs :: non_neg_integer()}.
forecast(Namespace, Id, Payer) ->
    erlmcp_nif:forecast(Namespace, Id, Payer).


%% @doc Routes by the default registry, even if routes are diverted.
-spec route_server(Server :: term(), Transport :: term()) -> erlmcp_nif:routed().
route_server(ServerId, TransportId) ->
    erlmcp_nif:route_server_exclusive(ServerId, TransportId).


-spec route_transport(Transport :: term()) -> erlmcp_nif:routed().
route_transport(TransportId) ->
    erlmcp_nif:route_transport_exclusive(TransportId).


-spec route_bound(Server :: term()) -> {[pid()], none | erlmcp_nif:refusal(), [erlmcp_nif:event()]}.
route_bound(ServerId) ->
    erlmcp_nif:route_bound_exclusive(ServerId).


%%% The library and the default registry


%% @doc Why the native library is not loaded; `none' if it is.
-spec load_error() -> none | erlmcp_nif:load_error().
load_error() ->
    erlmcp_nif:load_error().


%% @doc Makes the default registry with these bounds, unless it exists.
-spec make_default(Shards :: pos_integer(), MaxEntries :: pos_integer(), MaxIdBytes :: pos_integer()) ->
          created | exists.
make_default(Shards, MaxEntries, MaxIdBytes) ->
    erlmcp_nif:make_default(Shards, MaxEntries, MaxIdBytes).


%% @doc The number of different config terms that all registries keep.
-spec distinct_configs() -> non_neg_integer().
distinct_configs() ->
    erlmcp_nif:distinct_configs().


%%% Sentinels


-spec start_sentinel(pid(), pid() | none) -> pid().
start_sentinel(Pid, Owner) ->
    Sentinel = spawn(?MODULE, init_sentinel, [Pid, Owner]),
    %% A process belongs to the application whose master is its group leader, and exits when that application stops.
    %% The group leader is changed before the entry exists.
    true = group_leader(whereis(init), Sentinel),
    Sentinel.


%% @private
-spec init_sentinel(pid(), pid() | none) -> no_return().
init_sentinel(Pid, Owner) ->
    _ = monitor(process, Pid),
    _ = is_pid(Owner) andalso monitor(process, Owner),
    hibernate_sentinel().


%% A hibernating process refers to no version of this module. Purging an old version would kill a process that
%% refers to it, and the exit would remove the entry.
-spec hibernate_sentinel() -> no_return().
hibernate_sentinel() ->
    erlang:hibernate(?MODULE, wake_sentinel, []).


%% @private
-spec wake_sentinel() -> ok.
wake_sentinel() ->
    receive
        {'DOWN', _, process, _, _} -> ok;
        {?MODULE, stop} -> ok;
        _Unknown -> hibernate_sentinel()
    end.


-spec end_sentinel(pid()) -> ok.
end_sentinel(Sentinel) ->
    Sentinel ! {?MODULE, stop},
    ok.
