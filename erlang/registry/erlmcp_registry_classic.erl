%%% @private
%%% The pure-Erlang store of servers, transports and bindings: the state of one process, which handles one
%%% request after the other. {@link erlmcp_registry} uses it in the mode `current' and where the native
%%% library cannot be loaded, and the benchmarks use it as the baseline.
%%%
%%% == Guarantees ==
%%% All requests are totally ordered, by the process that holds the state. A registration ends with its
%%% process, a binding with its transport and with its server. No function calls native code.
%%%
%%% == Consistency ==
%%% An id whose process has exited is free, for every later find, list, bind and register, also while its
%%% 'DOWN' waits in the mailbox: these requests call is_process_alive/1. That works for processes of this node only;
%%% the entry of a process of another node is removed when its 'DOWN' has been handled.
%%%
%%% == Trade-offs ==
%%% The mailbox of the process is the bottleneck. It grows without bound when messages come faster than
%%% one scheduler routes them, and calls then time out. A look-up is a message and an answer, and copies the
%%% config.
%%%
%%% == Crashes ==
%%% A store with a <em>keeper</em> mirrors registrations and bindings (not messages) into an ETS table whose
%%% heir is a small process of that name. If the process of the store is killed, the next one takes the table over and
%%% adopts the entries of living processes. Without a keeper there is no mirror, and every change costs less.
-module(erlmcp_registry_classic).

-export([open/1, new/1, close/1, discard/1, unmonitor/2]).
-export([execute/2, route/2, info/2]).
-export([counts/1, bindings/1]).
%% For copying a store
-export([insert/3, remove/3, row/3, bound_to/2, first/1, next/2, has_server/2]).

-export_type([state/0, iterator/0]).

-type server_id() :: term().
-type transport_id() :: term().
-type bindings() :: #{transport_id() => server_id()}.
-type kind() :: server | transport.
-type binding() :: unbound | {bound, server_id()}.
-type row() :: {Key :: {kind(), term()}, pid(), Config :: term(), binding()}.

-record(entry, {
          pid :: pid(),
          config :: term(),
          %% One for each registration, not for each process: if a process has several ids, each of its entries
          %% gets a 'DOWN' of its own, and no entry has to know of the others.
          monitor :: reference()
         }).

-record(state, {
          servers = #{} :: #{server_id() => #entry{}},
          transports = #{} :: #{transport_id() => #entry{}},
          bindings = #{} :: bindings(),
          %% The inverse of bindings, without empty sets. A broadcast and the removal of a server
          %% walk through it.
          members = #{} :: #{server_id() => #{transport_id() => pid()}},
          mirror = none :: ets:table() | none,
          keeper = none :: reference() | none,
          keeper_name = none :: atom(),
          %% When the last warning was logged (monotonic ms), and how many were suppressed since.
          warned = never :: integer() | never,
          suppressed = 0 :: non_neg_integer()
         }).

-opaque state() :: #state{}.

%% A snapshot of the entries that are still to be visited, servers first.
-type iterator() :: [{kind(), maps:iterator(term(), #entry{})}].

%% Positions in a row of the mirror.
-define(CONFIG,  3).
-define(BINDING, 4).

-define(WARN_INTERVAL_MS, 1000).

%%% Beginning and end


%% @doc An empty store of the calling process, without a mirror. With the name of a keeper: the store of a former
%% process that used this keeper and was killed.
-spec open(Keeper :: atom()) -> state().
open(none) -> #state{};
open(Keeper) -> adopt(open_mirror(Keeper)).


%% @doc An empty store of the calling process; what the keeper holds is discarded.
-spec new(Keeper :: atom()) -> state().
new(none) ->
    #state{};
new(Keeper) ->
    ok = discard(Keeper),
    new_mirror(Keeper).


%% @doc From now on no process adopts this store. If the calling process goes on, it has to {@link unmonitor/2} all
%% entries.
-spec close(state()) -> ok.
close(#state{mirror = none}) ->
    ok;
close(#state{mirror = Mirror, keeper = Monitor, keeper_name = Name}) ->
    true = demonitor(Monitor, [flush]),
    try
        Keeper = whereis(Name),
        true = unregister(Name),
        %% A table of a million rows takes long to delete, and this process has requests to serve.
        true = ets:give_away(Mirror, Keeper, closed),
        Keeper ! {stop, self()},
        ok
    catch
        %% The keeper was killed.
        error:badarg -> delete_mirror(Mirror)
    end.


%% @doc Removes the monitors of some entries.
-spec unmonitor(iterator(), Count :: non_neg_integer()) -> iterator().
unmonitor([], _Count) ->
    [];
unmonitor(Iterator, 0) ->
    Iterator;
unmonitor([{Kind, Entries} | Others], Count) ->
    case maps:next(Entries) of
        none ->
            unmonitor(Others, Count);
        {_Id, #entry{monitor = Monitor}, Next} ->
            true = demonitor(Monitor, [flush]),
            unmonitor([{Kind, Next} | Others], Count - 1)
    end.


%% @doc From now on no process adopts what the keeper holds.
-spec discard(Keeper :: atom()) -> ok.
discard(Keeper) ->
    case whereis(Keeper) of
        undefined -> ok;
        _Pid -> close(open_mirror(Keeper))
    end.


%%% Requests


%% @doc Carries out a request.
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


%%% Messages


%% @doc Routes a message that was sent to the process.
-spec route(Cast :: term(), state()) -> state().
route({route_to_server, ServerId, TransportId, Message}, State) ->
    case State#state.servers of
        #{ServerId := #entry{pid = Pid}} ->
            sent(erlmcp_delivery:send(Pid, {mcp_message, TransportId, Message}), server, ServerId, State);
        _ ->
            warn(server, ServerId, State)
    end;
route({route_to_transport, broadcast, ServerId, Message}, State) ->
    case State#state.members of
        #{ServerId := Members} ->
            Response = {mcp_response, ServerId, Message},
            Send = fun(TransportId, Pid, S) -> sent(erlmcp_delivery:send(Pid, Response), transport, TransportId, S) end,
            maps:fold(Send, State, Members);
        _ ->
            warn(transport_of, ServerId, State)
    end;
route({route_to_transport, TransportId, ServerId, Message}, State) ->
    case State#state.transports of
        #{TransportId := #entry{pid = Pid}} ->
            sent(erlmcp_delivery:send(Pid, {mcp_response, ServerId, Message}), transport, TransportId, State);
        _ ->
            warn(transport, TransportId, State)
    end;
route(_Unknown, State) ->
    State.


%% @doc Handles a message that may be the 'DOWN' of a registered process.
-spec info(Info :: term(), state()) -> state().
info({{down, Kind, Id}, Monitor, process, _Pid, _Reason}, State) ->
    %% The id may have a new process by now, and a demonitor does not remove a 'DOWN' that has arrived
    %% already: the reference tells them apart.
    case entries(Kind, State) of
        #{Id := #entry{monitor = Monitor}} -> remove(Kind, Id, State);
        _ -> State
    end;
info({'DOWN', Keeper, process, _Pid, _Reason}, #state{keeper = Keeper} = State) ->
    #state{mirror = Mirror, keeper_name = Name} = State,
    State#state{keeper = start_keeper(Name, Mirror)};
info({transport_data, TransportId, Data}, State) ->
    case execute({get_server_for_transport, TransportId}, State) of
        {{ok, ServerId}, Found} -> route({route_to_server, ServerId, TransportId, Data}, Found);
        {{error, not_found}, Found} -> warn(server_of, TransportId, Found)
    end;
info(_Info, State) ->
    State.


-spec counts(state()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(#state{servers = Servers, transports = Transports}) ->
    #{servers => map_size(Servers), transports => map_size(Transports)}.


-spec bindings(state()) -> bindings().
bindings(#state{bindings = Bindings}) ->
    Bindings.


%%% Copying


%% @doc Inserts a registration of another store under an id that is free here. Its process may have exited.
-spec insert(kind(), erlmcp_registry_native:row(), state()) -> state().
insert(Kind, {Id, Pid, Config, Binding}, State) ->
    Row = {{Kind, Id}, Pid, Config, Binding},
    true = mirror_insert(State, Row),
    add(Row, State).


%% @doc For {@link next/2}.
-spec first(state()) -> iterator().
first(#state{servers = Servers, transports = Transports}) ->
    [{server, maps:iterator(Servers)}, {transport, maps:iterator(Transports)}].


%% @doc The next entry that was there at {@link first/1} and still exists, with its present values.
-spec next(iterator(), state()) -> {kind(), erlmcp_registry_native:row(), iterator()} | none.
next([], _State) ->
    none;
next([{Kind, Iterator} | Others], State) ->
    case maps:next(Iterator) of
        none ->
            next(Others, State);
        {Id, _Then, Next} ->
            case row(Kind, Id, State) of
                none -> next([{Kind, Next} | Others], State);
                Row -> {Kind, Row, [{Kind, Next} | Others]}
            end
    end.


%% @doc An entry, whose process may have exited.
-spec row(kind(), term(), state()) -> erlmcp_registry_native:row() | none.
row(Kind, Id, State) ->
    case entries(Kind, State) of
        #{Id := #entry{pid = Pid, config = Config}} -> {Id, Pid, Config, binding(Kind, Id, State)};
        _ -> none
    end.


%% @doc The transports that are bound to a server, registered or not.
-spec bound_to(server_id(), state()) -> [transport_id()].
bound_to(ServerId, #state{members = Members}) ->
    case Members of
        #{ServerId := Bound} -> maps:keys(Bound);
        _ -> []
    end.


-spec has_server(server_id(), state()) -> boolean().
has_server(Id, #state{servers = Servers}) ->
    is_map_key(Id, Servers).


-spec binding(kind(), term(), state()) -> binding().
binding(transport, Id, #state{bindings = Bindings}) when is_map_key(Id, Bindings) -> {bound, map_get(Id, Bindings)};
binding(_Kind, _Id, _State) -> unbound.


%%% Entries


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


%% The new entry for a row of the mirror.
-spec add(row(), #state{}) -> #state{}.
add({{Kind, Id}, Pid, Config, Binding}, State0) ->
    State = set_entries(Kind, (entries(Kind, State0))#{Id => new_entry(Kind, Id, Pid, Config)}, State0),
    case Binding of
        {bound, ServerId} -> bind(Id, ServerId, State);
        unbound -> State
    end.


-spec new_entry(kind(), term(), pid(), Config :: term()) -> #entry{}.
new_entry(Kind, Id, Pid, Config) ->
    #entry{pid = Pid, config = Config, monitor = monitor(process, Pid, [{tag, {down, Kind, Id}}])}.


%% @doc Removes an entry, if there is one of that id.
-spec remove(kind(), term(), state()) -> state().
remove(Kind, Id, State0) ->
    case maps:take(Id, entries(Kind, State0)) of
        {#entry{monitor = Monitor}, Entries} ->
            true = demonitor(Monitor),
            State = case Kind of
                        server -> unbind_all(Id, State0);
                        transport -> forget_binding(Id, State0)
                    end,
            %% After the bindings: if the registry is killed before this, the mirror has no binding to a server
            %% that it has lost.
            mirror_delete(State, {Kind, Id}),
            set_entries(Kind, Entries, State);
        error ->
            %% The bindings of an unknown server stay too: they were made ahead of it.
            State0
    end.


%% Removes an entry whose process has exited, before its 'DOWN' arrives.
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


%% A binding made ahead of a server must not be removed by the 'DOWN' of an earlier server of that id.
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


-spec list(#{term() => #entry{}}) -> [{Id :: term(), {pid(), Config :: term()}}].
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


%%% Bindings


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


%%% Warnings


-spec warn(server | transport | transport_of | server_of, term(), #state{}) -> #state{}.
warn(Target, Id, State) ->
    warn(unknown_target, Target, Id, #{}, State).


-spec sent(ok | {error, erlmcp_delivery:unsent()}, kind(), term(), #state{}) -> #state{}.
sent(ok, _Target, _Id, State) -> State;
sent({error, Reason}, Target, Id, State) -> warn(undelivered, Target, Id, #{reason => Reason}, State).


-spec warn(unknown_target | undelivered, server | transport | transport_of | server_of, term(), map(), #state{}) ->
          #state{}.
warn(Event, Target, Id, Details, #state{warned = Warned, suppressed = Suppressed} = State) ->
    Now = erlang:monotonic_time(millisecond),
    case Warned =:= never orelse Now - Warned >= ?WARN_INTERVAL_MS of
        true ->
            ok = erlmcp_native_log:log(warning, Event, Details#{target => Target, id => Id, suppressed => Suppressed}),
            State#state{warned = Now, suppressed = 0};
        false ->
            State#state{suppressed = Suppressed + 1}
    end.


%%% The mirror and its keeper
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


%% The registrations of the table, as they would be if this process had handled every exit since
%% its predecessor was killed.
-spec adopt(#state{}) -> #state{}.
adopt(#state{mirror = Mirror} = State) ->
    Rows = ets:tab2list(Mirror),
    %% Whole maps at once, which takes half the time of inserting entry by entry.
    Bound = [ {Id, Pid, ServerId} || {{transport, Id}, Pid, _, {bound, ServerId}} <- Rows ],
    Members = maps:groups_from_list(fun({_Id, _Pid, ServerId}) -> ServerId end,
                                    fun({Id, Pid, _ServerId}) -> {Id, Pid} end,
                                    Bound),
    Adopted = State#state{
                servers = maps:from_list(entries_of(server, Rows)),
                transports = maps:from_list(entries_of(transport, Rows)),
                bindings = maps:from_list([ {Id, ServerId} || {Id, _Pid, ServerId} <- Bound ]),
                members = maps:map(fun(_ServerId, Siblings) -> maps:from_list(Siblings) end, Members)
               },
    %% Entries of exited processes last: this removes the bindings to them, and keeps those made ahead of a server.
    lists:foldl(fun({{Kind, Id}, Pid, _, _}, State1) ->
                        case is_alive(Pid) of
                            true -> State1;
                            false -> remove(Kind, Id, State1)
                        end
                end,
                Adopted,
                Rows).


-spec entries_of(kind(), [row()]) -> [{Id :: term(), #entry{}}].
entries_of(Kind, Rows) ->
    [ {Id, new_entry(Kind, Id, Pid, Config)} || {{RowKind, Id}, Pid, Config, _} <- Rows, RowKind =:= Kind ].


%% The state of a registry without entries yet, and the mirror of its predecessor or an empty one.
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
    %% Registered by this process: a registry that is started after this one was killed must find the keeper.
    true = erlang:register(Name, Keeper),
    true = ets:setopts(Mirror, {heir, Keeper, inherited}),
    Monitor.


%% The runtime transfers the tables of an exited process before it fires the monitors. If no table has
%% arrived, the registry deleted it in an orderly exit, or exited before this process was its heir.
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


%% The keeper stays the heir of the table, so that the table always has one.
-spec hand_over(ets:table()) -> ok.
hand_over(Mirror) ->
    receive
        {claim, Registry} ->
            try ets:give_away(Mirror, Registry, claimed) of
                true -> keeper(Registry)
            catch
                %% The claimant has exited too.
                error:badarg -> hand_over(Mirror)
            end
    end.
