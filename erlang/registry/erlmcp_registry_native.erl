%%% @private
%%% The requests of {@link erlmcp_registry}, carried out in native memory by the calling process.
%%%
%%% The registry is `default' for callers in their own processes, whose changes may be `diverted' (see
%%% {@link erlmcp_nif}); `exclusive' for the same one in the hands of the process that owns it; or a
%%% reference.
-module(erlmcp_registry_native).

-include_lib("kernel/include/logger.hrl").

-export([execute/2, route/2]).
-export([ids/1, row/2, put/3, counts/1]).
-export([unknown_target/2]).

-export_type([kind/0, row/0]).

-type kind() :: server | transport.
%% What a registration consists of: `Binding' is that of a transport.
-type row() :: {pid(), Config :: term(), Binding :: unbound | {bound, Server :: term()}}.

%%% Requests


%% Raises `badarg' for an id that is too long, and for a pid that is none. `diverted' is no answer: the
%% request must go to the registry's process.
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


-spec register(erlmcp_nif:registry(), kind(), term(), pid(), term()) ->
          ok | {error, already_registered | registry_full | registry_closed} | diverted.
register(Registry, Kind, Id, Pid, Config) ->
    case erlmcp_native_registry:register(Registry, Kind, Id, Pid, Config, owner(Registry)) of
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


%% Requests on a registry of our own are carried out by our own process.
-spec owner(erlmcp_nif:registry()) -> pid() | none.
owner(Own) when is_reference(Own) -> self();
owner(_Default) -> none.


%% One binding after the other: a transport that is registered meanwhile keeps its own.
-spec restore(erlmcp_nif:registry(), #{term() => term()}) -> ok | diverted.
restore(Registry, Bindings) ->
    %% Before anything is changed: `badarg' for what is too long to be bound.
    ok = check_ids(Registry, maps:keys(Bindings)),
    ok = check_ids(Registry, maps:values(Bindings)),
    Unbound = [ erlmcp_nif:unbind(Registry, TransportId)
                || {TransportId, _} <- erlmcp_nif:bindings(Registry), not is_map_key(TransportId, Bindings) ],
    Bound = [ erlmcp_nif:bind(Registry, TransportId, ServerId, false)
              || {TransportId, ServerId} <- maps:to_list(Bindings) ],
    %% Then the registry's process does all of it again.
    case lists:member(diverted, Unbound) orelse lists:member(diverted, Bound) of
        true -> diverted;
        false -> ok
    end.


-spec check_ids(erlmcp_nif:registry(), [term()]) -> ok.
check_ids(Registry, Ids) ->
    lists:foreach(fun(Id) -> erlmcp_nif:shard(Registry, Id) end, Ids).


%%% Casts


%% What was sent to the registry's process. No layer of backpressure is asked.
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
    case erlmcp_native_registry:bound_transports(Registry, ServerId) of
        [] -> unknown_target(transport_of, ServerId);
        Pids -> lists:foreach(fun(Pid) -> Pid ! {mcp_response, ServerId, Message} end, Pids)
    end;
route_cast(Registry, {route_to_transport, TransportId, ServerId, Message}) ->
    send(Registry, transport, TransportId, {mcp_response, ServerId, Message});
route_cast(_Registry, _Unknown) ->
    ok.


-spec send(erlmcp_nif:registry(), kind(), term(), term()) -> ok.
send(Registry, Kind, Id, Message) ->
    case erlmcp_nif:whereis(Registry, Kind, Id) of
        undefined ->
            unknown_target(Kind, Id);
        Pid ->
            Pid ! Message,
            ok
    end.


%%% Rows, of the default registry by its owner


%% The ids of all entries, on a dirty scheduler.
-spec ids(kind()) -> [term()].
ids(Kind) ->
    erlmcp_native_registry:list_ids(exclusive, Kind).


-spec counts(erlmcp_nif:registry()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(Registry) ->
    #{servers => erlmcp_nif:count(Registry, server), transports => erlmcp_nif:count(Registry, transport)}.


%% `none' also for an id that is too long to be registered.
-spec row(kind(), Id :: term()) -> row() | none.
row(Kind, Id) ->
    try erlmcp_native_registry:find(exclusive, Kind, Id) of
        {ok, {Pid, Config}} when Kind =:= server -> {Pid, Config, unbound};
        {ok, {Pid, Config}} -> {Pid, Config, binding(Id)};
        {error, not_found} -> none
    catch
        error:badarg -> none
    end.


-spec binding(Transport :: term()) -> unbound | {bound, term()}.
binding(TransportId) ->
    case erlmcp_nif:bound_server(exclusive, TransportId) of
        {ok, ServerId} -> {bound, ServerId};
        {error, not_found} -> unbound
    end.


%% Makes the entry of an id be this one, or none.
-spec put(kind(), Id :: term(), row() | none) -> ok | {error, term()}.
put(Kind, Id, Row) ->
    try
        put(Kind, Id, row(Kind, Id), Row)
    catch
        error:badarg -> {error, badarg}
    end.


-spec put(kind(), term(), Former :: row() | none, row() | none) -> ok | {error, term()}.
put(_Kind, _Id, Row, Row) ->
    ok;
put(Kind, Id, _Former, none) ->
    erlmcp_native_registry:unregister(exclusive, Kind, Id);
put(server, Id, {Pid, _Other, unbound}, {Pid, Config, unbound}) ->
    erlmcp_native_registry:update_server(exclusive, Id, Config);
put(transport, Id, {Pid, Config, _Other}, {Pid, Config, Binding}) ->
    bind(Id, Binding);
put(Kind, Id, none, {Pid, Config, Binding}) ->
    case execute(exclusive, {request(Kind), Id, Pid, Config}) of
        ok when Kind =:= transport -> bind(Id, Binding);
        Result -> Result
    end;
put(Kind, Id, _Former, Row) ->
    ok = erlmcp_native_registry:unregister(exclusive, Kind, Id),
    put(Kind, Id, none, Row).


-spec request(kind()) -> register_server | register_transport.
request(server) -> register_server;
request(transport) -> register_transport.


-spec bind(Transport :: term(), unbound | {bound, term()}) -> ok | {error, term()}.
bind(TransportId, unbound) ->
    erlmcp_nif:unbind(exclusive, TransportId);
bind(TransportId, {bound, ServerId}) ->
    case erlmcp_nif:bind(exclusive, TransportId, ServerId, false) of
        %% It has ended meanwhile.
        {error, transport_not_found} -> ok;
        Result -> Result
    end.


%%% Warnings

-define(WARNINGS,            {?MODULE, warnings}).
-define(WARNING_INTERVAL_MS, 1000).


%% Logs a route without a target, at most once a second, with the number of those that were not
%% logged since. The cell has the time of the last one (1) and that number (2).
-spec unknown_target(kind() | transport_of | id, term()) -> ok.
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


-spec target_name(kind() | transport_of | id) -> string().
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
