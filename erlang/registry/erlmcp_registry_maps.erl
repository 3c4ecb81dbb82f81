%%% @private
%%% The entries of a pure-Erlang store ({@link erlmcp_registry_classic}) in maps, which are lost with the process. The
%%% quickest form.
-module(erlmcp_registry_maps).

-export([new/0, counts/1]).
-export([has/3, holder/3, config/3, insert/4, set_holder/4, set_config/4, delete/3]).
-export([binding/2, bind/4, unbind/2, bound_to/2, bindings/1]).
-export([target/3, keep_target/4, members/2]).
-export([list/2, first/1, step/1, release/1]).

-export_type([entries/0]).

-record(entry, {
          pid :: pid(),
          config :: term(),
          monitor :: reference()
         }).

-record(entries, {
          servers = #{} :: #{Id :: term() => #entry{}},
          transports = #{} :: #{Id :: term() => #entry{}},
          bindings = #{} :: erlmcp_registry_classic:bindings(),
          %% The inverse of bindings, without empty sets. A broadcast and the removal of a server
          %% walk through it.
          members = #{} :: #{Server :: term() => #{Transport :: term() => pid()}}
         }).

-opaque entries() :: #entries{}.
-type kind() :: erlmcp_registry_classic:kind().
-type holder() :: erlmcp_registry_classic:holder().


-spec new() -> entries().
new() ->
    #entries{}.


-spec counts(entries()) -> #{servers := non_neg_integer(), transports := non_neg_integer()}.
counts(#entries{servers = Servers, transports = Transports}) ->
    #{servers => map_size(Servers), transports => map_size(Transports)}.


%%% Entries


-spec has(kind(), Id :: term(), entries()) -> boolean().
has(Kind, Id, Entries) ->
    is_map_key(Id, of_kind(Kind, Entries)).


-spec holder(kind(), Id :: term(), entries()) -> holder() | none.
holder(Kind, Id, Entries) ->
    case of_kind(Kind, Entries) of
        #{Id := #entry{pid = Pid, monitor = Monitor}} -> {Pid, Monitor, self()};
        _ -> none
    end.


%% @doc The config of an entry, which exists.
-spec config(kind(), Id :: term(), entries()) -> term().
config(Kind, Id, Entries) ->
    #{Id := #entry{config = Config}} = of_kind(Kind, Entries),
    Config.


%% @doc Inserts an entry. There must be none of that id.
-spec insert(kind(), {Id :: term(), Config :: term(), erlmcp_registry_native:binding()}, holder(), entries()) ->
          entries().
insert(Kind, {Id, Config, Binding}, {Pid, Monitor, _MonitoredBy}, Entries0) ->
    Entry = #entry{pid = Pid, config = Config, monitor = Monitor},
    Entries = set(Kind, (of_kind(Kind, Entries0))#{Id => Entry}, Entries0),
    case Binding of
        {bound, ServerId} -> bind(Id, Pid, ServerId, Entries);
        unbound -> Entries
    end.


-spec set_holder(kind(), Id :: term(), holder(), entries()) -> entries().
set_holder(Kind, Id, {Pid, Monitor, _MonitoredBy}, Entries) ->
    #{Id := Entry} = All = of_kind(Kind, Entries),
    set(Kind, All#{Id := Entry#entry{pid = Pid, monitor = Monitor}}, Entries).


-spec set_config(kind(), Id :: term(), Config :: term(), entries()) -> entries().
set_config(Kind, Id, Config, Entries) ->
    #{Id := Entry} = All = of_kind(Kind, Entries),
    set(Kind, All#{Id := Entry#entry{config = Config}}, Entries).


%% @doc Removes an entry with its bindings.
-spec delete(kind(), Id :: term(), entries()) -> entries().
delete(server, Id, #entries{servers = Servers} = Entries) ->
    unbind_all(Id, Entries#entries{servers = maps:remove(Id, Servers)});
delete(transport, Id, #entries{transports = Transports} = Entries) ->
    unbind(Id, Entries#entries{transports = maps:remove(Id, Transports)}).


-spec of_kind(kind(), entries()) -> #{Id :: term() => #entry{}}.
of_kind(server, Entries) -> Entries#entries.servers;
of_kind(transport, Entries) -> Entries#entries.transports.


-spec set(kind(), #{Id :: term() => #entry{}}, entries()) -> entries().
set(server, Servers, Entries) -> Entries#entries{servers = Servers};
set(transport, Transports, Entries) -> Entries#entries{transports = Transports}.


%%% Bindings


-spec binding(Transport :: term(), entries()) -> erlmcp_registry_native:binding().
binding(Id, #entries{bindings = Bindings}) ->
    case Bindings of
        #{Id := ServerId} -> {bound, ServerId};
        _ -> unbound
    end.


%% @doc Binds a transport, which is registered.
-spec bind(Transport :: term(), pid(), Server :: term(), entries()) -> entries().
bind(Id, Pid, ServerId, Entries0) ->
    #entries{bindings = Bindings, members = Members} = Entries = unbind(Id, Entries0),
    Siblings = maps:get(ServerId, Members, #{}),
    Entries#entries{
      bindings = Bindings#{Id => ServerId},
      members = Members#{ServerId => Siblings#{Id => Pid}}
     }.


-spec unbind(Transport :: term(), entries()) -> entries().
unbind(Id, #entries{members = Members} = Entries) ->
    case maps:take(Id, Entries#entries.bindings) of
        {ServerId, Bindings} ->
            Siblings = maps:remove(Id, map_get(ServerId, Members)),
            Entries#entries{
              bindings = Bindings,
              members = case map_size(Siblings) of
                            0 -> maps:remove(ServerId, Members);
                            _ -> Members#{ServerId := Siblings}
                        end
             };
        error ->
            Entries
    end.


-spec unbind_all(Server :: term(), entries()) -> entries().
unbind_all(ServerId, #entries{bindings = Bindings} = Entries) ->
    case maps:take(ServerId, Entries#entries.members) of
        {Siblings, Members} ->
            Entries#entries{bindings = maps:without(maps:keys(Siblings), Bindings), members = Members};
        error ->
            Entries
    end.


-spec bound_to(Server :: term(), entries()) -> [Transport :: term()].
bound_to(ServerId, #entries{members = Members}) ->
    maps:keys(maps:get(ServerId, Members, #{})).


-spec bindings(entries()) -> erlmcp_registry_classic:bindings().
bindings(#entries{bindings = Bindings}) ->
    Bindings.


%%% Targets of routes


-spec target(kind(), Id :: term(), entries()) -> pid() | none.
target(Kind, Id, Entries) ->
    case of_kind(Kind, Entries) of
        #{Id := #entry{pid = Pid}} -> Pid;
        _ -> none
    end.


-spec keep_target(kind(), Id :: term(), pid(), entries()) -> entries().
keep_target(_Kind, _Id, _Pid, Entries) ->
    Entries.


%% @doc The transports that are bound to a server.
-spec members(Server :: term(), entries()) -> {#{Transport :: term() => pid()}, entries()}.
members(ServerId, #entries{members = Members} = Entries) ->
    {maps:get(ServerId, Members, #{}), Entries}.


%%% Walks


-spec list(kind(), entries()) -> [{Id :: term(), {pid(), Config :: term()}}].
list(Kind, Entries) ->
    [ {Id, {Pid, Config}} || {Id, #entry{pid = Pid, config = Config}} <- maps:to_list(of_kind(Kind, Entries)) ].


-spec first(entries()) -> [{kind(), [Id :: term()]}].
first(#entries{servers = Servers, transports = Transports}) ->
    [{server, maps:keys(Servers)}, {transport, maps:keys(Transports)}].


-spec step([{kind(), [Id :: term()]}]) -> {kind(), Id :: term(), [{kind(), [Id :: term()]}]} | none.
step([{Kind, [Id | Ids]} | Others]) -> {Kind, Id, [{Kind, Ids} | Others]};
step([{_Kind, []} | Others]) -> step(Others);
step([]) -> none.


-spec release([{kind(), [Id :: term()]}]) -> ok.
release(_Left) ->
    ok.
