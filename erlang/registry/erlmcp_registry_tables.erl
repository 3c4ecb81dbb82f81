%%% @private
%%% The entries of a pure-Erlang store ({@link erlmcp_registry_classic}) in ETS tables, which survive their process.
%%%
%%% == The keeper ==
%%% The owner writes to its tables itself, so that a write never depends on another process. Their heir is the
%%% <em>keeper</em>: a small process with a name, which holds the tables from the exit of one owner until the next
%%% one claims them. It stays their heir after that.
%%%
%%% The tables belong together. They are claimed all or none, also if an owner or the keeper is killed while they are
%%% passed on one by one.
%%%
%%% == Consistency ==
%%% The row of a transport says what it is bound to. The rows of `members' are an index of that, in the
%%% other direction. The index row is inserted before the transport's row points to it, and deleted after that. So a
%%% process that is killed in between leaves at most a row too many, which no transport points to and which is skipped.
%%% A server's row is deleted after its bindings, so no binding leads to a server that is lost.
%%%
%%% == Caches ==
%%% A map of the process answers in half the time of a table. So the targets of routes are kept in maps, once a
%%% message has been routed to them. The maps hold nothing that the tables do not have.
-module(erlmcp_registry_tables).

%% The tables and their keeper
-export([new_tables/0, start_keeper/2, claim/1, stop_keeper/1]).
%% Entries
-export([new/1, drop/1, counts/1]).
-export([has/3, holder/3, config/3, insert/4, set_holder/4, set_config/4, delete/3]).
-export([binding/2, bind/4, unbind/2, bound_to/2, bindings/1]).
-export([target/3, keep_target/4, members/2]).
-export([list/2, first/1, step/1, release/1]).

-export_type([entries/0, iterator/0, tables/0]).

%% Positions in a row of servers or transports: {Id, holder(), Config, place()}.
-define(HOLDER, 2).
-define(CONFIG, 3).
-define(PLACE,  4).

-record(entries, {
          servers :: ets:table(),
          transports :: ets:table(),
          members :: ets:table(),
          cached_servers = #{} :: #{Id :: term() => pid()},
          cached_transports = #{} :: #{Id :: term() => pid()},
          %% Without empty sets.
          cached_members = #{} :: #{Server :: term() => #{Transport :: term() => pid()}}
         }).

-opaque entries() :: #entries{}.
-type tables() :: #{servers | transports | members := ets:table()}.
-type kind() :: erlmcp_registry_classic:kind().
-type holder() :: erlmcp_registry_classic:holder().
%% The number makes the key of the index row unique: {{Hash of the server's id, Number}, Server, Transport}. The
%% ids are not in the key, because the keys of an ordered table are compared by `=='.
-type place() :: unbound | {Server :: term(), Number :: pos_integer()}.
%% What is left of each table, with a page of ids. The tables are fixed meanwhile, so each entry that stays is visited
%% exactly once.
-type iterator() :: [{kind(), ets:table(), {Ids :: [term()], Continuation :: term()} | '$end_of_table'}].

-define(PAGE,  64).
-define(ROLES, [servers, transports, members]).

%%% The tables and their keeper


-spec new_tables() -> tables().
new_tables() ->
    #{
      servers => ets:new(erlmcp_registry_servers, [set, protected]),
      transports => ets:new(erlmcp_registry_transports, [set, protected]),
      members => ets:new(erlmcp_registry_members, [ordered_set, protected])
     }.


%% @doc Deletes a table of the calling process, which does not wait: a million rows take some hundred milliseconds.
-spec delete_table(ets:table()) -> ok.
delete_table(Table) ->
    true = ets:give_away(Table, spawn(fun() -> receive {'ETS-TRANSFER', Table, _, delete} -> ok end end), delete),
    ok.


%% @doc Starts a keeper of the calling process's tables, and monitors it. There must be none of that name.
-spec start_keeper(Name :: atom(), tables()) -> Monitor :: reference().
start_keeper(Name, Tables) ->
    Owner = self(),
    {Keeper, Monitor} = spawn_monitor(fun() -> keep(Owner, #{}) end),
    %% Registered by this process: an owner that is started after this one was killed must find the keeper.
    true = register(Name, Keeper),
    _ = [ ets:setopts(map_get(Role, Tables), {heir, Keeper, Role}) || Role <- ?ROLES ],
    Monitor.


%% @doc Acquires the tables of a former owner, which was killed, and monitors their keeper.
-spec claim(Name :: atom()) -> {ok, tables(), Monitor :: reference()} | none.
claim(Name) ->
    case whereis(Name) of
        undefined ->
            none;
        Keeper ->
            Monitor = monitor(process, Keeper),
            Keeper ! {claim, self()},
            claimed(?ROLES, #{}, Keeper, Monitor)
    end.


-spec claimed([atom()], #{atom() => ets:table()}, Keeper :: pid(), Monitor :: reference()) ->
          {ok, tables(), reference()} | none.
claimed([], Tables, _Keeper, Monitor) ->
    {ok, Tables, Monitor};
claimed([Role | Roles], Tables, Keeper, Monitor) ->
    receive
        {'ETS-TRANSFER', Table, Keeper, {claimed, Role}} ->
            claimed(Roles, Tables#{Role => Table}, Keeper, Monitor);
        {'DOWN', Monitor, process, Keeper, _} ->
            lists:foreach(fun delete_table/1, maps:values(Tables)),
            delete_transferred(Keeper)
    end.


%% Tables that an exited keeper has handed over in another order than they are claimed in.
-spec delete_transferred(Keeper :: pid()) -> none.
delete_transferred(Keeper) ->
    receive
        {'ETS-TRANSFER', Table, Keeper, {claimed, _Role}} ->
            ok = delete_table(Table),
            delete_transferred(Keeper)
    after
        0 ->
            none
    end.


%% @doc From now on no process can claim the tables of this name. Those that the keeper holds are deleted.
-spec stop_keeper(Name :: atom()) -> ok.
stop_keeper(Name) ->
    try
        Name ! stop,
        true = unregister(Name),
        ok
    catch
        %% There is no keeper, or it has exited already.
        error:badarg -> ok
    end.


%%% Entries


-spec new(tables()) -> entries().
new(#{servers := Servers, transports := Transports, members := Members}) ->
    #entries{servers = Servers, transports = Transports, members = Members}.


%% @doc Deletes the tables.
-spec drop(entries()) -> ok.
drop(#entries{servers = Servers, transports = Transports, members = Members}) ->
    lists:foreach(fun delete_table/1, [Servers, Transports, Members]).


-spec counts(entries()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(#entries{servers = Servers, transports = Transports}) ->
    #{servers => ets:info(Servers, size), transports => ets:info(Transports, size)}.


-spec has(kind(), Id :: term(), entries()) -> boolean().
has(Kind, Id, Entries) ->
    ets:member(table(Kind, Entries), Id).


-spec holder(kind(), Id :: term(), entries()) -> holder() | none.
holder(Kind, Id, Entries) ->
    element(Kind, Id, ?HOLDER, none, Entries).


%% @doc The config of an entry, which exists.
-spec config(kind(), Id :: term(), entries()) -> term().
config(Kind, Id, Entries) ->
    ets:lookup_element(table(Kind, Entries), Id, ?CONFIG).


%% @doc Inserts an entry. There must be none of that id.
-spec insert(kind(), {Id :: term(), Config :: term(), erlmcp_registry_native:binding()}, holder(), entries()) ->
          entries().
insert(Kind, {Id, Config, Binding}, {Pid, _, _} = Holder, Entries) ->
    Place = reserve(Id, Binding, Entries),
    true = ets:insert(table(Kind, Entries), {Id, Holder, Config, Place}),
    join(Id, Pid, Place, Entries).


-spec set_holder(kind(), Id :: term(), holder(), entries()) -> entries().
set_holder(Kind, Id, Holder, Entries) ->
    true = ets:update_element(table(Kind, Entries), Id, {?HOLDER, Holder}),
    Entries.


-spec set_config(kind(), Id :: term(), Config :: term(), entries()) -> entries().
set_config(Kind, Id, Config, Entries) ->
    true = ets:update_element(table(Kind, Entries), Id, {?CONFIG, Config}),
    Entries.


%% @doc Removes an entry with its bindings.
-spec delete(kind(), Id :: term(), entries()) -> entries().
delete(server, Id, Entries0) ->
    #entries{servers = Table, cached_servers = Cached} = Entries = unbind_all(Id, Entries0),
    true = ets:delete(Table, Id),
    Entries#entries{cached_servers = maps:remove(Id, Cached)};
delete(transport, Id, #entries{transports = Table, cached_transports = Cached} = Entries) ->
    Place = place(Id, Entries),
    true = ets:delete(Table, Id),
    leave(Id, Place, Entries#entries{cached_transports = maps:remove(Id, Cached)}).


-spec table(kind(), entries()) -> ets:table().
table(server, Entries) -> Entries#entries.servers;
table(transport, Entries) -> Entries#entries.transports.


-spec element(kind(), Id :: term(), pos_integer(), Default, entries()) -> term() | Default.
element(Kind, Id, Position, Default, Entries) ->
    try
        ets:lookup_element(table(Kind, Entries), Id, Position)
    catch
        error:badarg -> Default
    end.


%%% Bindings


-spec binding(Transport :: term(), entries()) -> erlmcp_registry_native:binding().
binding(Id, Entries) ->
    case place(Id, Entries) of
        {ServerId, _Number} -> {bound, ServerId};
        unbound -> unbound
    end.


-spec place(Transport :: term(), entries()) -> place().
place(Id, Entries) ->
    element(transport, Id, ?PLACE, unbound, Entries).


%% @doc Binds a transport, which is registered.
-spec bind(Transport :: term(), pid(), Server :: term(), entries()) -> entries().
bind(Id, Pid, ServerId, Entries) ->
    Former = place(Id, Entries),
    Place = reserve(Id, {bound, ServerId}, Entries),
    true = ets:update_element(Entries#entries.transports, Id, {?PLACE, Place}),
    join(Id, Pid, Place, leave(Id, Former, Entries)).


%% Inserts the index row of a binding to come.
-spec reserve(Transport :: term(), erlmcp_registry_native:binding(), entries()) -> place().
reserve(_Id, unbound, _Entries) ->
    unbound;
reserve(Id, {bound, ServerId}, #entries{members = Members}) ->
    Number = erlang:unique_integer([positive]),
    true = ets:insert(Members, {{hash(ServerId), Number}, ServerId, Id}),
    {ServerId, Number}.


%% Notes a new binding in the cache.
-spec join(Transport :: term(), pid(), place(), entries()) -> entries().
join(Id, Pid, {ServerId, _Number}, #entries{cached_members = Cached} = Entries)
  when is_map_key(ServerId, Cached) ->
    Siblings = map_get(ServerId, Cached),
    Entries#entries{cached_members = Cached#{ServerId := Siblings#{Id => Pid}}};
join(_Id, _Pid, _Place, Entries) ->
    Entries.


-spec unbind(Transport :: term(), entries()) -> entries().
unbind(Id, Entries) ->
    case place(Id, Entries) of
        unbound ->
            Entries;
        Place ->
            true = ets:update_element(Entries#entries.transports, Id, {?PLACE, unbound}),
            leave(Id, Place, Entries)
    end.


%% Deletes the index row of a former binding.
-spec leave(Transport :: term(), place(), entries()) -> entries().
leave(_Id, unbound, Entries) ->
    Entries;
leave(Id, {ServerId, Number}, #entries{members = Members, cached_members = Cached} = Entries) ->
    true = ets:delete(Members, {hash(ServerId), Number}),
    case Cached of
        #{ServerId := #{Id := _} = Siblings} when map_size(Siblings) =:= 1 ->
            Entries#entries{cached_members = maps:remove(ServerId, Cached)};
        #{ServerId := Siblings} ->
            Entries#entries{cached_members = Cached#{ServerId := maps:remove(Id, Siblings)}};
        _ ->
            Entries
    end.


-spec unbind_all(Server :: term(), entries()) -> entries().
unbind_all(ServerId, #entries{transports = Table, cached_members = Cached} = Entries0) ->
    Entries = Entries0#entries{cached_members = maps:remove(ServerId, Cached)},
    Unbind = fun({Id, Number}) ->
                     Place = {ServerId, Number},
                     _ = place(Id, Entries) =:= Place andalso ets:update_element(Table, Id, {?PLACE, unbound}),
                     Entries = leave(Id, Place, Entries)
             end,
    lists:foreach(Unbind, index_rows(ServerId, Entries)),
    Entries.


-spec bound_to(Server :: term(), entries()) -> [Transport :: term()].
bound_to(ServerId, Entries) ->
    [ Id || {Id, Number} <- index_rows(ServerId, Entries), place(Id, Entries) =:= {ServerId, Number} ].


%% The rows of the index for a server.
-spec index_rows(Server :: term(), entries()) -> [{Transport :: term(), Number :: pos_integer()}].
index_rows(ServerId, #entries{members = Members}) ->
    Hash = hash(ServerId),
    case ets:next(Members, {Hash, 0}) of
        {Hash, _Number} ->
            %% Servers whose ids have the same hash share this range.
            ets:select(Members, [{{{Hash, '$1'}, '$2', '$3'}, [{'=:=', '$2', {const, ServerId}}], [{{'$3', '$1'}}]}]);
        %% A select takes longer to find nothing.
        _Other ->
            []
    end.


-spec hash(Server :: term()) -> non_neg_integer().
hash(ServerId) ->
    erlang:phash2(ServerId, 1 bsl 32).


-spec bindings(entries()) -> erlmcp_registry_classic:bindings().
bindings(#entries{transports = Table}) ->
    maps:from_list(ets:select(Table, [{{'$1', '_', '_', {'$2', '_'}}, [], [{{'$1', '$2'}}]}])).


%%% Targets of routes


-spec target(kind(), Id :: term(), entries()) -> pid() | none.
target(server, Id, #entries{cached_servers = Cached}) -> maps:get(Id, Cached, none);
target(transport, Id, #entries{cached_transports = Cached}) -> maps:get(Id, Cached, none).


%% @doc From now on {@link target/3} returns the process of this entry.
-spec keep_target(kind(), Id :: term(), pid(), entries()) -> entries().
keep_target(server, Id, Pid, #entries{cached_servers = Cached} = Entries) ->
    Entries#entries{cached_servers = Cached#{Id => Pid}};
keep_target(transport, Id, Pid, #entries{cached_transports = Cached} = Entries) ->
    Entries#entries{cached_transports = Cached#{Id => Pid}}.


%% @doc The transports that are bound to a server.
-spec members(Server :: term(), entries()) -> {#{Transport :: term() => pid()}, entries()}.
members(ServerId, #entries{cached_members = Cached} = Entries) ->
    case Cached of
        #{ServerId := Members} ->
            {Members, Entries};
        _ ->
            case maps:from_list([ {Id, element(1, holder(transport, Id, Entries))} || Id <- bound_to(ServerId, Entries) ]) of
                None when map_size(None) =:= 0 -> {None, Entries};
                Members -> {Members, Entries#entries{cached_members = Cached#{ServerId => Members}}}
            end
    end.


%%% Walks


-spec list(kind(), entries()) -> [{Id :: term(), {pid(), Config :: term()}}].
list(Kind, Entries) ->
    ets:select(table(Kind, Entries), [{{'$1', {'$2', '_', '_'}, '$3', '_'}, [], [{{'$1', {{'$2', '$3'}}}}]}]).


-spec first(entries()) -> iterator().
first(Entries) ->
    [ begin
          Table = table(Kind, Entries),
          true = ets:safe_fixtable(Table, true),
          {Kind, Table, ets:select(Table, [{{'$1', '_', '_', '_'}, [], ['$1']}], ?PAGE)}
      end || Kind <- [server, transport] ].


-spec step(iterator()) -> {kind(), Id :: term(), iterator()} | none.
step([]) ->
    none;
step([{Kind, Table, {[Id | Ids], Continuation}} | Others]) ->
    {Kind, Id, [{Kind, Table, {Ids, Continuation}} | Others]};
step([{Kind, Table, {[], Continuation}} | Others]) ->
    step([{Kind, Table, ets:select(Continuation)} | Others]);
step([{_Kind, Table, '$end_of_table'} | Others]) ->
    true = ets:safe_fixtable(Table, false),
    step(Others).


-spec release(iterator()) -> ok.
release(Left) ->
    lists:foreach(fun({_Kind, Table, _Page}) -> true = ets:safe_fixtable(Table, false) end, Left).


%%% The process of the keeper


%% `Kept': tables that the keeper has besides those that it inherits. The runtime transfers the tables of an exited
%% process before it fires the monitors. If not all tables have arrived, the owner exited before this process was the
%% heir of all.
-spec keep(Owner :: pid(), Kept :: #{atom() => ets:table()}) -> ok.
keep(Owner, Kept) ->
    Monitor = monitor(process, Owner),
    receive
        {'DOWN', Monitor, process, Owner, _} ->
            case inherited(?ROLES, Owner, Kept) of
                Tables when map_size(Tables) =:= length(?ROLES) -> hand_over(Tables);
                _Incomplete -> ok
            end;
        stop ->
            ok
    end.


-spec inherited([atom()], Owner :: pid(), #{atom() => ets:table()}) -> #{atom() => ets:table()}.
inherited([], _Owner, Tables) ->
    Tables;
inherited([Role | Roles], Owner, Tables) ->
    receive
        {'ETS-TRANSFER', Table, Owner, Role} -> inherited(Roles, Owner, Tables#{Role => Table})
    after
        0 ->
            inherited(Roles, Owner, Tables)
    end.


-spec hand_over(tables()) -> ok.
hand_over(Tables) ->
    receive
        {claim, Owner} -> keep(Owner, maps:filter(fun(Role, Table) -> not given(Table, Owner, Role) end, Tables));
        stop -> ok
    end.


-spec given(ets:table(), Owner :: pid(), Role :: atom()) -> boolean().
given(Table, Owner, Role) ->
    try
        ets:give_away(Table, Owner, {claimed, Role})
    catch
        %% The claimant has exited. The keeper inherits the tables that it has been given.
        error:badarg -> false
    end.
