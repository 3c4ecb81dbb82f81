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
%%% A store with a <em>keeper</em> has its entries in tables, which survive the process ({@link
%%% erlmcp_registry_tables}). The tables have everything but the monitors, so the next process serves
%%% requests at once. It makes the monitors in slices between the requests: it <em>adopts</em> the entries. Each entry
%%% says which process monitors it, so an entry is adopted once, in its turn or when a request names it. If its
%%% process has exited by then, it is removed. Without a keeper the entries are in maps
%%% ({@link erlmcp_registry_maps}), and every request costs less.
-module(erlmcp_registry_classic).

-export([open/1, new/1, close/1, discard/1, unmonitor/2, delete/1]).
-export([execute/2, route/2, info/2]).
-export([counts/1, bindings/1, is_adopted/1]).
%% For copying a store
-export([insert/3, remove/3, row/3, bound_to/2, first/1, next/2, release/2, has_server/2]).

-export_type([state/0, iterator/0, kind/0, holder/0, bindings/0]).

-type server_id() :: term().
-type transport_id() :: term().
-type bindings() :: #{transport_id() => server_id()}.
-type kind() :: server | transport.
%% The process of an entry, its monitor, and the process that made the monitor. Each registration has a monitor, not
%% each process: if a process has several ids, each of its entries gets a 'DOWN' of its own, and no entry has to
%% know of the others.
-type holder() :: {pid(), Monitor :: reference(), MonitoredBy :: pid()}.

-record(state, {
          module :: erlmcp_registry_maps | erlmcp_registry_tables,
          entries :: erlmcp_registry_maps:entries() | erlmcp_registry_tables:entries(),
          keeper = none :: #{name := atom(), monitor := reference(), tables := erlmcp_registry_tables:tables()} | none,
          %% Entries that are still to be adopted.
          unadopted = done :: iterator() | done,
          %% When the last warning was logged (monotonic ms), and how many were suppressed since.
          warned = never :: integer() | never,
          suppressed = 0 :: non_neg_integer()
         }).

-opaque state() :: #state{}.

%% Entries that are still to be visited, servers first.
-type iterator() :: erlmcp_registry_tables:iterator() | [{kind(), [Id :: term()]}].

%% Calls a function of the entries' module. A call to a module in a variable takes 100 ns longer.
-define(OF(Module, Call),
        case Module of
            erlmcp_registry_maps -> erlmcp_registry_maps:Call;
            erlmcp_registry_tables -> erlmcp_registry_tables:Call
        end).

%% A slice of the adoption ends with the first entry after this time.
-define(SLICE_US,         4_000).
-define(MONITORS,         1_000).
-define(WARN_INTERVAL_MS, 1000).

%%% Beginning and end


%% @doc An empty store of the calling process. With the name of a keeper: the store of a former process that used this
%% keeper and was killed.
-spec open(Keeper :: atom()) -> state().
open(none) ->
    new(none);
open(Keeper) ->
    case erlmcp_registry_tables:claim(Keeper) of
        {ok, Tables, Monitor} ->
            State = in_tables(Keeper, Monitor, Tables),
            adopt(State#state{unadopted = first(State)});
        none ->
            new(Keeper)
    end.


%% @doc An empty store of the calling process; what the keeper holds is discarded.
-spec new(Keeper :: atom()) -> state().
new(none) ->
    #state{module = erlmcp_registry_maps, entries = erlmcp_registry_maps:new()};
new(Keeper) ->
    ok = discard(Keeper),
    Tables = erlmcp_registry_tables:new_tables(),
    in_tables(Keeper, erlmcp_registry_tables:start_keeper(Keeper, Tables), Tables).


-spec in_tables(Keeper :: atom(), Monitor :: reference(), erlmcp_registry_tables:tables()) -> state().
in_tables(Keeper, Monitor, Tables) ->
    #state{
      module = erlmcp_registry_tables,
      entries = erlmcp_registry_tables:new(Tables),
      keeper = #{name => Keeper, monitor => Monitor, tables => Tables}
     }.


%% @doc From now on no process adopts this store. If the calling process goes on, it has to {@link unmonitor/2} all
%% entries and then {@link delete/1} the store.
-spec close(state()) -> ok.
close(#state{keeper = none}) ->
    ok;
close(#state{keeper = #{name := Keeper, monitor := Monitor}}) ->
    true = demonitor(Monitor, [flush]),
    discard(Keeper).


%% @doc From now on no process adopts what the keeper holds.
-spec discard(Keeper :: atom()) -> ok.
discard(Keeper) ->
    erlmcp_registry_tables:stop_keeper(Keeper).


%% @doc Removes the monitors of some entries. Returns `done' if there are no more.
-spec unmonitor(iterator(), state()) -> iterator() | done.
unmonitor(Iterator, State) ->
    unmonitor(?MONITORS, Iterator, State).


-spec unmonitor(Count :: non_neg_integer(), iterator(), state()) -> iterator() | done.
unmonitor(0, Iterator, _State) ->
    Iterator;
unmonitor(Count, Iterator, #state{module = Module, entries = Entries} = State) ->
    case ?OF(Module, step(Iterator)) of
        none ->
            done;
        {Kind, Id, Next} ->
            true = demonitor_own(?OF(Module, holder(Kind, Id, Entries)), [flush]),
            unmonitor(Count - 1, Next, State)
    end.


%% @doc Deletes the tables of a store, if it has any.
-spec delete(state()) -> ok.
delete(#state{module = erlmcp_registry_tables, entries = Entries}) -> erlmcp_registry_tables:drop(Entries);
delete(#state{module = erlmcp_registry_maps}) -> ok.


%%% Adoption


%% Adopts entries for some milliseconds, and then sends a message to continue behind those that have arrived.
-spec adopt(state()) -> state().
adopt(State) ->
    adopt(State, now_us() + ?SLICE_US).


-spec adopt(state(), DeadlineUs :: integer()) -> state().
adopt(#state{module = Module, unadopted = Iterator} = State0, DeadlineUs) ->
    case ?OF(Module, step(Iterator)) of
        none ->
            State0#state{unadopted = done};
        {Kind, Id, Next} ->
            {_Pid, State} = living(Kind, Id, State0#state{unadopted = Next}),
            case now_us() >= DeadlineUs of
                false ->
                    adopt(State, DeadlineUs);
                true ->
                    self() ! {?MODULE, adopt},
                    State
            end
    end.


%% @doc Whether no entry of a former process is left to be adopted.
-spec is_adopted(state()) -> boolean().
is_adopted(#state{unadopted = Unadopted}) ->
    Unadopted =:= done.


-spec now_us() -> integer().
now_us() ->
    erlang:monotonic_time(microsecond).


%%% Requests


%% @doc Carries out a request.
-spec execute(term(), state()) -> {Reply :: term(), state()}.
execute({find_server, Id}, State) ->
    find(server, Id, State);
execute({find_transport, Id}, State) ->
    find(transport, Id, State);
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
    case living(server, Id, State0) of
        {none, State} ->
            {{error, not_found}, State};
        {_Pid, #state{module = Module, entries = Entries} = State} ->
            {ok, State#state{entries = ?OF(Module, set_config(server, Id, Config, Entries))}}
    end;
execute({bind_transport_to_server, TransportId, ServerId}, State0) ->
    {Server, State1} = living(server, ServerId, State0),
    {Transport, State} = living(transport, TransportId, State1),
    case {Server, Transport} of
        {none, _} -> {{error, server_not_found}, State};
        {_, none} -> {{error, transport_not_found}, State};
        {_, Pid} -> {ok, bind(TransportId, Pid, ServerId, State)}
    end;
execute({unbind_transport, TransportId}, State) ->
    {ok, unbind(TransportId, State)};
execute({get_server_for_transport, TransportId}, State0) ->
    {_Pid, State1} = living(transport, TransportId, State0),
    State = reap_target(binding(TransportId, State1), State1),
    case binding(TransportId, State) of
        {bound, ServerId} when ServerId =/= undefined -> {{ok, ServerId}, State};
        _ -> {{error, not_found}, State}
    end;
execute(list_servers, State) ->
    {list(server, State), State};
execute(list_transports, State) ->
    {list(transport, State), State};
execute(get_all_state, State) ->
    {{ok, {registry_state, bindings(State)}}, State};
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
    route(server, ServerId, {mcp_message, TransportId, Message}, State);
route({route_to_transport, broadcast, ServerId, Message}, State0) ->
    {Members, State} = members(ServerId, State0),
    case map_size(Members) of
        0 ->
            warn(transport_of, ServerId, State);
        _ ->
            Response = {mcp_response, ServerId, Message},
            Send = fun(TransportId, Pid, S) -> sent(erlmcp_delivery:send(Pid, Response), transport, TransportId, S) end,
            maps:fold(Send, State, Members)
    end;
route({route_to_transport, TransportId, ServerId, Message}, State) ->
    route(transport, TransportId, {mcp_response, ServerId, Message}, State);
route(_Unknown, State) ->
    State.


-spec route(kind(), Id :: term(), Message :: term(), state()) -> state().
route(Kind, Id, Message, #state{module = Module, entries = Entries} = State0) ->
    case ?OF(Module, target(Kind, Id, Entries)) of
        none ->
            case living(Kind, Id, State0) of
                {none, State} ->
                    ok = count(not_found, State),
                    warn(Kind, Id, State);
                {Pid, State} ->
                    Kept = State#state{entries = ?OF(Module, keep_target(Kind, Id, Pid, State#state.entries))},
                    sent(erlmcp_delivery:send(Pid, Message), Kind, Id, Kept)
            end;
        Pid ->
            sent(erlmcp_delivery:send(Pid, Message), Kind, Id, State0)
    end.


%% The transports that are bound to a server. The bindings to a server that exited before it was monitored have ended.
-spec members(server_id(), state()) -> {#{transport_id() => pid()}, state()}.
members(ServerId, #state{unadopted = done, module = Module, entries = Entries} = State) ->
    {Members, Kept} = ?OF(Module, members(ServerId, Entries)),
    {Members, State#state{entries = Kept}};
members(ServerId, State0) ->
    {_Server, #state{module = Module, entries = Entries} = State} = living(server, ServerId, State0),
    {Members, Kept} = ?OF(Module, members(ServerId, Entries)),
    {Members, State#state{entries = Kept}}.


%% @doc Handles a message that may be the 'DOWN' of a registered process.
-spec info(Info :: term(), state()) -> state().
info({{down, Kind, Id}, Monitor, process, _Pid, _Reason}, #state{module = Module, entries = Entries} = State) ->
    %% The id may have a new process by now, and a demonitor does not remove a 'DOWN' that has arrived
    %% already: the reference tells them apart.
    case ?OF(Module, holder(Kind, Id, Entries)) of
        {_, Monitor, _} -> remove(Kind, Id, State);
        _ -> State
    end;
info({?MODULE, adopt}, #state{unadopted = [_ | _]} = State) ->
    adopt(State);
info({'DOWN', Monitor, process, _Pid, _Reason}, #state{keeper = #{monitor := Monitor} = Keeper} = State) ->
    #{name := Name, tables := Tables} = Keeper,
    State#state{keeper = Keeper#{monitor := erlmcp_registry_tables:start_keeper(Name, Tables)}};
info({transport_data, TransportId, Data}, State) ->
    case execute({get_server_for_transport, TransportId}, State) of
        {{ok, ServerId}, Found} -> route({route_to_server, ServerId, TransportId, Data}, Found);
        {{error, not_found}, Found} -> warn(server_of, TransportId, Found)
    end;
info(_Info, State) ->
    State.


-spec counts(state()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(#state{module = Module, entries = Entries}) ->
    ?OF(Module, counts(Entries)).


%% @doc The bindings, without those that ended with a process before it was adopted.
-spec bindings(state()) -> bindings().
bindings(#state{unadopted = done, module = Module, entries = Entries}) ->
    ?OF(Module, bindings(Entries));
bindings(#state{module = Module, entries = Entries}) ->
    Exited = fun(Kind) -> [ Id || {Id, {Pid, _Config}} <- ?OF(Module, list(Kind, Entries)), not is_alive(Pid) ] end,
    Servers = maps:from_keys(Exited(server), exited),
    Bound = maps:without(Exited(transport), ?OF(Module, bindings(Entries))),
    maps:filter(fun(_TransportId, ServerId) -> not is_map_key(ServerId, Servers) end, Bound).


%%% Copying


%% @doc Inserts a registration of another store under an id that is free here. Its process may have exited.
-spec insert(kind(), erlmcp_registry_native:row(), state()) -> state().
insert(Kind, {Id, Pid, Config, Binding}, #state{module = Module, entries = Entries} = State) ->
    State#state{entries = ?OF(Module, insert(Kind, {Id, Config, Binding}, monitored(Kind, Id, Pid), Entries))}.


%% @doc For {@link next/2}. A walk that is not continued to its end has to be released.
-spec first(state()) -> iterator().
first(#state{module = Module, entries = Entries}) ->
    ?OF(Module, first(Entries)).


%% @doc The next entry, with its present values. Each that was there at {@link first/1} and still exists comes once;
%% those registered since may come.
-spec next(iterator(), state()) -> {kind(), erlmcp_registry_native:row(), iterator()} | none.
next(Iterator, #state{module = Module} = State) ->
    case ?OF(Module, step(Iterator)) of
        none ->
            none;
        {Kind, Id, Next} ->
            case row(Kind, Id, State) of
                none -> next(Next, State);
                Row -> {Kind, Row, Next}
            end
    end.


-spec release(iterator(), state()) -> ok.
release(Iterator, #state{module = Module}) ->
    ?OF(Module, release(Iterator)).


%% @doc An entry, whose process may have exited.
-spec row(kind(), term(), state()) -> erlmcp_registry_native:row() | none.
row(Kind, Id, #state{module = Module, entries = Entries} = State) ->
    case ?OF(Module, holder(Kind, Id, Entries)) of
        none -> none;
        {Pid, _, _} when Kind =:= server -> {Id, Pid, ?OF(Module, config(Kind, Id, Entries)), unbound};
        {Pid, _, _} -> {Id, Pid, ?OF(Module, config(Kind, Id, Entries)), binding(Id, State)}
    end.


%% @doc The transports that are bound to a server.
-spec bound_to(server_id(), state()) -> [transport_id()].
bound_to(ServerId, #state{module = Module, entries = Entries}) ->
    ?OF(Module, bound_to(ServerId, Entries)).


-spec has_server(server_id(), state()) -> boolean().
has_server(Id, #state{module = Module, entries = Entries}) ->
    ?OF(Module, has(server, Id, Entries)).


%%% Entries


-spec find(kind(), term(), state()) -> {{ok, {pid(), Config :: term()}} | {error, not_found}, state()}.
find(Kind, Id, State0) ->
    case living(Kind, Id, State0) of
        {none, State} ->
            {{error, not_found}, State};
        {Pid, #state{module = Module, entries = Entries} = State} ->
            {{ok, {Pid, ?OF(Module, config(Kind, Id, Entries))}}, State}
    end.


-spec register(kind(), term(), pid(), term(), state()) -> {ok | {error, already_registered}, state()}.
register(Kind, Id, Pid, Config, #state{module = Module, entries = Entries} = State0) ->
    case ?OF(Module, has(Kind, Id, Entries)) andalso living(Kind, Id, State0) of
        false -> {ok, enter(Kind, Id, Pid, Config, State0)};
        {none, State} -> {ok, enter(Kind, Id, Pid, Config, State)};
        {Pid, State} -> {same_pid(), State};
        {_Other, State} -> {{error, already_registered}, State}
    end.


-spec enter(kind(), term(), pid(), term(), state()) -> state().
enter(transport, Id, Pid, #{server_id := ServerId} = Config, State) when ServerId =/= undefined ->
    Binding = {bound, ServerId},
    insert(transport, {Id, Pid, Config, Binding}, reap_target(Binding, State));
enter(Kind, Id, Pid, Config, State) ->
    insert(Kind, {Id, Pid, Config, unbound}, State).


%% A binding made ahead of a server must not be removed by the 'DOWN' of an earlier server of that id.
-spec reap_target(erlmcp_registry_native:binding(), state()) -> state().
reap_target({bound, ServerId}, State) -> element(2, living(server, ServerId, State));
reap_target(unbound, State) -> State.


%% @doc Removes an entry, if there is one of that id.
-spec remove(kind(), term(), state()) -> state().
remove(Kind, Id, #state{module = Module, entries = Entries} = State) ->
    case ?OF(Module, holder(Kind, Id, Entries)) of
        %% The bindings of an unknown server stay too: they were made ahead of it.
        none -> State;
        Holder -> remove(Kind, Id, Holder, State)
    end.


-spec remove(kind(), term(), holder(), state()) -> state().
remove(Kind, Id, Holder, #state{module = Module, entries = Entries} = State) ->
    true = demonitor_own(Holder, []),
    State#state{entries = ?OF(Module, delete(Kind, Id, Entries))}.


%% The process of an id, if it is alive. If it has exited, removes the entry, before its 'DOWN' arrives. If this process
%% does not monitor it yet, adopts it.
-spec living(kind(), term(), state()) -> {pid() | none, state()}.
living(Kind, Id, #state{module = Module, entries = Entries} = State) ->
    case ?OF(Module, holder(Kind, Id, Entries)) of
        none ->
            {none, State};
        {Pid, _Monitor, MonitoredBy} = Holder ->
            case is_alive(Pid) of
                true when MonitoredBy =:= self() -> {Pid, State};
                true -> {Pid, State#state{entries = ?OF(Module, set_holder(Kind, Id, monitored(Kind, Id, Pid), Entries))}};
                false -> {none, remove(Kind, Id, Holder, State)}
            end
    end.


-spec monitored(kind(), term(), pid()) -> holder().
monitored(Kind, Id, Pid) ->
    {Pid, monitor(process, Pid, [{tag, {down, Kind, Id}}]), self()}.


%% The monitors of a former process went with it.
-spec demonitor_own(holder() | none, [flush]) -> true.
demonitor_own({_Pid, Monitor, MonitoredBy}, Options) when MonitoredBy =:= self() -> demonitor(Monitor, Options);
demonitor_own(_NotOwn, _Options) -> true.


-spec list(kind(), state()) -> [{Id :: term(), {pid(), Config :: term()}}].
list(Kind, #state{module = Module, entries = Entries}) ->
    [ Entry || {_Id, {Pid, _Config}} = Entry <- ?OF(Module, list(Kind, Entries)), is_alive(Pid) ].


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


-spec binding(transport_id(), state()) -> erlmcp_registry_native:binding().
binding(Id, #state{module = Module, entries = Entries}) ->
    ?OF(Module, binding(Id, Entries)).


%% The transport is registered.
-spec bind(transport_id(), pid(), server_id(), state()) -> state().
bind(Id, Pid, ServerId, #state{module = Module, entries = Entries} = State) ->
    State#state{entries = ?OF(Module, bind(Id, Pid, ServerId, Entries))}.


-spec unbind(transport_id(), state()) -> state().
unbind(Id, #state{module = Module, entries = Entries} = State) ->
    State#state{entries = ?OF(Module, unbind(Id, Entries))}.


-spec restore(bindings(), state()) -> state().
restore(Bindings, #state{module = Module, entries = Entries} = State0) ->
    maps:fold(
      fun(TransportId, ServerId, State1) ->
              {_Server, State2} = living(server, ServerId, State1),
              case living(transport, TransportId, State2) of
                  {none, State} -> State;
                  {Pid, State} -> bind(TransportId, Pid, ServerId, State)
              end
      end,
      lists:foldl(fun unbind/2, State0, maps:keys(?OF(Module, bindings(Entries)))),
      Bindings).


%%% Warnings


-spec warn(server | transport | transport_of | server_of, term(), #state{}) -> #state{}.
warn(Target, Id, State) ->
    warn(unknown_target, Target, Id, #{}, State).


-spec sent(ok | {error, erlmcp_delivery:unsent()}, kind(), term(), #state{}) -> #state{}.
sent(Sent, Target, Id, State) ->
    ok = count(ok, State),
    case Sent of
        ok -> State;
        {error, Reason} -> warn(undelivered, Target, Id, #{reason => Reason}, State)
    end.


%% Messages that the named process routes are counted. Only that one has a keeper.
-spec count(ok | not_found, #state{}) -> ok.
count(_Status, #state{keeper = none}) -> ok;
count(Status, _Named) -> erlmcp_delivery:count(Status).


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
