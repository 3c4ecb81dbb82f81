%%% @private
%%% Registrations in native memory, for the modules that give them a public face
%%% ({@link erlmcp_shard_registry}, {@link erlmcp_registry}).
%%%
%%% This module chooses the scheduler (see {@link erlmcp_nif}) and looks after processes of other
%%% nodes, which native code cannot monitor: each such entry has a <em>sentinel</em>, a local
%%% process that monitors the remote one and ends with it. The entry goes when its sentinel ends,
%%% as it would for a local process.
%%%
%%% Everything runs in the calling process. Nothing here is a server.
%%%
%%% Changes of servers, transports and bindings of `default' return `diverted', and change nothing,
%%% while they are diverted ({@link erlmcp_nif:divert/0}).
-module(erlmcp_native_registry).

-export([register/6,
         unregister/3,
         update_server/3,
         find/3,
         list/2,
         list_shard/2,
         list_ids/2,
         bound_transports/2,
         close/1]).
-export([load_error/0, make_default/3, bindings/1, bound_server/2, distinct_configs/0]).
-export([check_shard/2]).
%% Sentinels
-export([init_sentinel/2, wake_sentinel/0]).

-export_type([entry/0]).

-type entry() :: {pid(), Config :: term()}.


%% @doc Registers `Id'. Raises `badarg' if `Pid' is not a pid or `Id' is too long.
%%
%% `Owner' is the process that the registry ends with, if there is one: a sentinel then ends with it
%% too, since nobody unregisters the entries of a registry that is gone.
-spec register(erlmcp_nif:registry(), erlmcp_nif:namespace(), term(), pid(), term(), Owner :: pid() | none) ->
          ok | {error, {already_registered, pid()} | registry_full | registry_closed} | diverted.
register(Registry, Namespace, Id, Pid, Config, _Owner) when node(Pid) =:= node() ->
    register_monitored(Registry, Namespace, Id, Pid, Pid, Config);
register(Registry, Namespace, Id, Pid, Config, Owner) when is_pid(Pid) ->
    Sentinel = start_sentinel(Pid, Owner),
    try register_monitored(Registry, Namespace, Id, Pid, Sentinel, Config) of
        ok ->
            ok;
        Refused ->
            end_sentinel(Sentinel),
            Refused
    catch
        Class:Reason:Stacktrace ->
            end_sentinel(Sentinel),
            erlang:raise(Class, Reason, Stacktrace)
    end;
register(_Registry, _Namespace, _Id, _Pid, _Config, _Owner) ->
    error(badarg).


-spec register_monitored(erlmcp_nif:registry(), erlmcp_nif:namespace(), term(), pid(), pid(), term()) ->
          ok | {error, {already_registered, pid()} | registry_full | registry_closed} | diverted.
register_monitored(Registry, Namespace, Id, Pid, Monitored, Config) ->
    Result =
        case erlmcp_nif:register(Registry, Namespace, Id, Pid, Monitored, Config) of
            dirty ->
                erlmcp_nif:register_dirty(Registry, Namespace, Id, Pid, Monitored, Config);
            Done ->
                Done
        end,
    case Result of
        ok -> ok;
        diverted -> diverted;
        Reason -> {error, Reason}
    end.


%% @doc Removes `Id' if it is registered.
-spec unregister(erlmcp_nif:registry(), erlmcp_nif:namespace(), term()) -> ok | diverted.
unregister(Registry, Namespace, Id) ->
    case erlmcp_nif:unregister(Registry, Namespace, Id) of
        {ok, Sentinel} -> end_sentinel(Sentinel);
        Done -> Done
    end.


%% @doc Exchanges the config of a server; its process and its bindings stay.
-spec update_server(erlmcp_nif:registry(), term(), term()) -> ok | {error, not_found} | diverted.
update_server(Registry, Id, Config) ->
    case erlmcp_nif:update_server(Registry, Id, Config) of
        dirty -> erlmcp_nif:update_server_dirty(Registry, Id, Config);
        Done -> Done
    end.


%% @doc The process and the config of `Id'; never a local process that has ended.
-spec find(erlmcp_nif:registry(), erlmcp_nif:namespace(), term()) ->
          {ok, entry()} | {error, not_found}.
find(Registry, Namespace, Id) ->
    case erlmcp_nif:find(Registry, Namespace, Id) of
        dirty -> erlmcp_nif:find_dirty(Registry, Namespace, Id);
        Done -> Done
    end.


%% @doc All entries of a namespace.
-spec list(erlmcp_nif:registry(), erlmcp_nif:namespace()) -> [{term(), entry()}].
list(Registry, Namespace) ->
    case erlmcp_nif:list(Registry, Namespace) of
        dirty -> erlmcp_nif:list_dirty(Registry, Namespace);
        Done -> Done
    end.


%% @doc The ids of all entries of a namespace, on a dirty scheduler.
-spec list_ids(erlmcp_nif:registry(), erlmcp_nif:namespace()) -> [term()].
list_ids(Registry, Namespace) ->
    erlmcp_nif:list_ids(Registry, Namespace).


%% @doc The connections of a shard.
-spec list_shard(erlmcp_nif:registry(), non_neg_integer()) -> [{term(), entry()}].
list_shard(Registry, Shard) ->
    case erlmcp_nif:list_shard(Registry, Shard) of
        dirty -> erlmcp_nif:list_shard_dirty(Registry, Shard);
        Done -> Done
    end.


%% @doc The processes of the transports that are bound to a server.
-spec bound_transports(erlmcp_nif:registry(), term()) -> [pid()].
bound_transports(Registry, Server) ->
    case erlmcp_nif:bound_transports(Registry, Server) of
        dirty -> erlmcp_nif:bound_transports_dirty(Registry, Server);
        Done -> Done
    end.


%% @doc Removes all servers and transports, and refuses new ones until `erlmcp_nif:open/1'.
-spec close(erlmcp_nif:registry()) -> ok.
close(Registry) ->
    lists:foreach(fun end_sentinel/1, erlmcp_nif:close(Registry)).


%%% What others than the registries need


%% @doc Why the native library is not loaded; `none' if it is.
-spec load_error() -> none | erlmcp_nif:load_error().
load_error() ->
    erlmcp_nif:load_error().


%% @doc Makes the default registry with these bounds, unless it exists.
-spec make_default(Shards :: pos_integer(), MaxEntries :: pos_integer(), MaxIdBytes :: pos_integer()) ->
          created | exists.
make_default(Shards, MaxEntries, MaxIdBytes) ->
    erlmcp_nif:make_default(Shards, MaxEntries, MaxIdBytes).


%% @doc All bindings, on a dirty scheduler.
-spec bindings(erlmcp_nif:registry()) -> [{Transport :: term(), Server :: term()}].
bindings(Registry) ->
    erlmcp_nif:bindings(Registry).


%% @doc The server that a transport is bound to.
-spec bound_server(erlmcp_nif:registry(), Transport :: term()) -> {ok, Server :: term()} | {error, not_found}.
bound_server(Registry, Transport) ->
    erlmcp_nif:bound_server(Registry, Transport).


%% @doc Walks through a shard, on a dirty scheduler: how many entries there are, how many there
%% should be by the counts of before and after, and the processes among them that have ended.
-spec check_shard(erlmcp_nif:registry(), non_neg_integer()) ->
          #{
            found := non_neg_integer(),
            counted := {Before :: non_neg_integer(), After :: non_neg_integer()},
            ended := [pid()]
           }.
check_shard(Registry, Shard) ->
    Before = count(Registry, Shard),
    {Found, Ended} = erlmcp_nif:check_shard(Registry, Shard),
    #{found => Found, counted => {Before, count(Registry, Shard)}, ended => Ended}.


-spec count(erlmcp_nif:registry(), non_neg_integer()) -> non_neg_integer().
count(Registry, Shard) ->
    {Servers, Transports, Connections} = erlmcp_nif:count_shard(Registry, Shard),
    Servers + Transports + Connections.


%% @doc The number of different config terms that all registries keep.
-spec distinct_configs() -> non_neg_integer().
distinct_configs() ->
    erlmcp_nif:distinct_configs().


%%% Sentinels


-spec start_sentinel(pid(), pid() | none) -> pid().
start_sentinel(Pid, Owner) ->
    spawn(?MODULE, init_sentinel, [Pid, Owner]).


%% @private
-spec init_sentinel(pid(), pid() | none) -> no_return().
init_sentinel(Pid, Owner) ->
    _ = monitor(process, Pid),
    _ = is_pid(Owner) andalso monitor(process, Owner),
    hibernate_sentinel().


%% Hibernating, it refers to no version of this module: purging an old one would kill it, and its death
%% removes the entry.
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
