%%% @doc The public registry of connections, in native memory.
%%%
%%% A connection is an id (any term without a fun other than `fun M:F/A', compared with `=:='), a process,
%%% and a capabilities term that is returned unchanged. It stays until the process exits or it is unregistered. Every
%%% function runs in the calling process; there is no server behind it.
%%%
%%% A connection belongs to the shard `erlang:phash2(Id, Shards)', fixed when it is registered.
%%%
%%% The functions work on the default registry, which is made on first use, or on a registry from
%%% {@link new/1} as an additional first argument. Registrations of the default registry outlive
%%% every process but their own; a registry from {@link new/1} is freed with the last reference to it.
%%%
%%% As an OTP name registry: `{via, erlmcp_shard_registry, Name}'. Names are connections of the default registry
%%% whose capabilities are `undefined'. A name of the form `{Registry, Name}' is such a name too: it does not name
%%% anything in that registry.
%%%
%%% == Consistency ==
%%% Each function on one id is one atomic step. Lists are not snapshots: an entry that is there throughout the call is
%%% seen exactly once; an id that is removed and registered again meanwhile, or replaced, may be listed twice or missed. Counts are exact
%%% when no change is under way.
%%%
%%% == Cost ==
%%% All functions take constant time except the lists, whose cost is in proportion to the largest number of connections
%%% that the shard has had at one time; more than a few hundred are listed on a dirty scheduler.
%%% {@link whereis_connection/1} is the fastest: it copies no term.
%%%
%%% == Errors ==
%%% Wrong arguments raise `badarg' and change nothing. So do ids whose encoding takes more than
%%% `max_id_bytes', and funs that were made in a function, also inside an id: the size of what they
%%% have captured has no known bound.
-module(erlmcp_shard_registry).

%% Registries
-export([new/0, new/1, limits/0, limits/1]).
%% Registration
-export([register_connection/3, register_connection/4]).
-export([register_or_find_connection/3, register_or_find_connection/4]).
-export([replace_connection/3, replace_connection/4]).
-export([update_connection/2, update_connection/3]).
-export([unregister_connection/1, unregister_connection/2]).
-export([release_connection/2, release_connection/3]).
%% Look-up
-export([lookup_connection/1, lookup_connection/2]).
-export([whereis_connection/1, whereis_connection/2]).
-export([connections_of/1, connections_of/2]).
%% Shards
-export([get_shard_id/1, get_shard_id/2]).
-export([list_connections/1, list_connections/2]).
-export([fold_connections/2, fold_connections/3]).
-export([select_connections/1, select_connections/2]).
%% Counting
-export([count/0, count/1, count/2, stats/0, stats/1, stats/2]).
%% OTP `via' names
-export([register_name/2, register_name/3]).
-export([unregister_name/1, unregister_name/2]).
-export([whereis_name/1, whereis_name/2]).
-export([send/2, send/3]).
%% Explanations of errors
-export([format_error/2]).

-export_type([registry/0, options/0, shard_id/0, stats/0, shard_stats/0]).

-type registry() :: erlmcp_nif:registry().
%% `default', or what {@link new/1} returns.

-type options() :: #{
                     shards => pos_integer(),
                     max_entries => pos_integer(),
                     max_id_bytes => pos_integer()
                    }.
-type shard_id() :: 0..1023.
-type stats() :: #{
                   shards := pos_integer(),
                   max_entries := pos_integer(),
                   max_id_bytes := pos_integer(),
                   servers := non_neg_integer(),
                   transports := non_neg_integer(),
                   connections := non_neg_integer(),
                   memberships := non_neg_integer(),
                   fullest_shard := {shard_id(), non_neg_integer()},
                   emptiest_shard := {shard_id(), non_neg_integer()}
                  }.
-type shard_stats() :: #{
                         shard_id := shard_id(),
                         servers := non_neg_integer(),
                         transports := non_neg_integer(),
                         connections := non_neg_integer(),
                         memberships := non_neg_integer()
                        }.

%% Places of a shard that a fold reads at a time, in some 100 microseconds with small capabilities.
-define(PAGE, 256).

-define(IS_REGISTRY(R), (R =:= default orelse is_reference(R))).

%%% Registries


%% @equiv new(#{})
-spec new() -> registry().
new() ->
    new(#{}).


%% @doc An empty registry of its own. It is freed when no reference to it is left.
%%
%% If the capabilities of an entry refer to the registry of that entry, they count as a reference until the entry is
%% removed: by unregistering it, or by the exit of its process. A registry that nothing else refers to therefore
%% lives as long as that process.
%%
%% Options and defaults: `shards' (64; a power of two from 1 to 1024), `max_entries' (2,000,000; up to
%% 2^28) and `max_id_bytes' (65,535; up to 2^24), as a map, a property list or a keyword list. Raises
%% `{bad_option, Key, Value, Expected}'.
-spec new(options() | [proplists:property()]) -> registry().
new(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{} = Map ->
            case erlmcp_native_config:registry_limits(Map) of
                {ok, {Shards, MaxEntries, MaxIdBytes}} -> erlmcp_nif:new(Shards, MaxEntries, MaxIdBytes);
                {error, Reason} -> error(Reason, [Options])
            end;
        _ ->
            error(badarg, [Options], [{error_info, #{module => ?MODULE}}])
    end.


%% @equiv limits(default)
-spec limits() -> options().
limits() ->
    limits(default).


%% @doc The options that a registry was made with.
-spec limits(registry()) -> options().
limits(Registry) ->
    {Shards, MaxEntries, MaxIdBytes} = erlmcp_nif:limits(Registry),
    #{shards => Shards, max_entries => MaxEntries, max_id_bytes => MaxIdBytes}.


%%% Registration


%% @equiv register_connection(default, Id, Pid, Capabilities)
-spec register_connection(term(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_connection(Id, Pid, Capabilities) ->
    register_connection(default, Id, Pid, Capabilities).


%% @doc Registers a connection. The first registration of an id wins; if its process has exited it is
%% replaced, even before the monitor has fired. A `Pid' that has exited is accepted, and not found afterwards. Equal
%% capabilities are kept once.
%%
%% A registry that is full first looks for entries of processes that have exited. With more
%% than 20,000 entries it does so on a dirty scheduler and for at most a tenth of the time. If one is just being
%% removed, the call waits for that, on a dirty scheduler and for 20 ms at most.
-spec register_connection(registry(), term(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_connection(Registry, Id, Pid, Capabilities) when is_pid(Pid) ->
    case erlmcp_registry_native:register(Registry, connection, Id, Pid, Capabilities, none) of
        ok -> ok;
        {error, {already_registered, _Pid}} -> {error, already_registered};
        {error, registry_full} -> {error, registry_full}
    end;
register_connection(Registry, Id, NoPid, Capabilities) ->
    error(badarg, [Registry, Id, NoPid, Capabilities], [{error_info, #{module => ?MODULE}}]).


%% @equiv register_or_find_connection(default, Id, Pid, Capabilities)
-spec register_or_find_connection(term(), pid(), term()) ->
          {registered | found, {pid(), term()}} | {error, registry_full}.
register_or_find_connection(Id, Pid, Capabilities) ->
    register_or_find_connection(default, Id, Pid, Capabilities).


%% @doc Registers a connection, or finds the one that has the id, in one step. Returns the process and the capabilities
%% that are registered now. Of several concurrent calls one registers, and the others find what it has registered.
-spec register_or_find_connection(registry(), term(), pid(), term()) ->
          {registered | found, {pid(), term()}} | {error, registry_full}.
register_or_find_connection(Registry, Id, Pid, Capabilities) when is_pid(Pid) ->
    erlmcp_registry_native:register_or_find(Registry, Id, Pid, Capabilities);
register_or_find_connection(Registry, Id, NoPid, Capabilities) ->
    error(badarg, [Registry, Id, NoPid, Capabilities], [{error_info, #{module => ?MODULE}}]).


%% @equiv replace_connection(default, Id, Pid, Capabilities)
-spec replace_connection(term(), pid(), term()) -> {ok, Former :: pid() | undefined} | {error, registry_full}.
replace_connection(Id, Pid, Capabilities) ->
    replace_connection(default, Id, Pid, Capabilities).


%% @doc Registers a connection whether the id is registered or not. A process that had the id loses it; it is returned,
%% and it is the caller's choice whether to tell it. `undefined': the id was free.
%%
%% One atomic step: a look-up finds the former process or the new one. A list that is made meanwhile may have either,
%% both or neither of them. The connection begins anew: its token bucket is full, and has the limits of
%% the configuration. {@link update_connection/3} changes capabilities alone.
-spec replace_connection(registry(), term(), pid(), term()) ->
          {ok, Former :: pid() | undefined} | {error, registry_full}.
replace_connection(Registry, Id, Pid, Capabilities) when is_pid(Pid) ->
    erlmcp_registry_native:replace(Registry, Id, Pid, Capabilities);
replace_connection(Registry, Id, NoPid, Capabilities) ->
    error(badarg, [Registry, Id, NoPid, Capabilities], [{error_info, #{module => ?MODULE}}]).


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, new, [_Options], _Info} | _]) ->
    #{1 => "not " ++ erlmcp_native_config:map_expected()};
format_error(_Reason, [{?MODULE, Function, [_Registry, _Id, _NoPid, _Capabilities], _Info} | _])
  when Function =:= register_connection;
       Function =:= register_or_find_connection;
       Function =:= replace_connection ->
    #{3 => "not a pid"};
format_error(_Reason, [{?MODULE, release_connection, [_Registry, _Id, _NoPid], _Info} | _]) ->
    #{3 => "not a pid"};
format_error(_Reason, [{?MODULE, connections_of, [_Registry, _Other], _Info} | _]) ->
    #{2 => "not a pid of this node"};
format_error(_Reason, [{?MODULE, select_connections, [_Registry, _MatchSpec], _Info} | _]) ->
    #{2 => "not a match specification"};
format_error(_Reason, [{?MODULE, fold_connections, [_Registry, _NoFun, _Acc], _Info} | _]) ->
    #{2 => "not a function of three arguments"};
format_error(_Reason, _Stacktrace) ->
    #{}.


%% @equiv update_connection(default, Id, Capabilities)
-spec update_connection(term(), term()) -> ok | {error, not_found}.
update_connection(Id, Capabilities) ->
    update_connection(default, Id, Capabilities).


%% @doc Replaces the capabilities of a connection, in one atomic step. Its process stays, and so does its token bucket with
%% its tokens and limits.
%%
%% Constant time. From the first update on, the bucket is stored apart from the connection: less than 100 bytes, and each
%% message to this connection takes some 100 ns longer.
-spec update_connection(registry(), term(), term()) -> ok | {error, not_found}.
update_connection(Registry, Id, Capabilities) ->
    erlmcp_registry_native:update_connection(Registry, Id, Capabilities).


%% @equiv unregister_connection(default, Id)
-spec unregister_connection(term()) -> ok.
unregister_connection(Id) ->
    unregister_connection(default, Id).


%% @doc Removes a connection; `ok' also if there is none.
-spec unregister_connection(registry(), term()) -> ok.
unregister_connection(Registry, Id) ->
    erlmcp_registry_native:unregister(Registry, connection, Id).


%% @equiv release_connection(default, Id, Pid)
-spec release_connection(term(), pid()) -> ok | {error, not_held}.
release_connection(Id, Pid) ->
    release_connection(default, Id, Pid).


%% @doc Removes a connection only if `Pid' holds it, in one atomic step. For a late clean-up: another process that
%% has registered the id meanwhile keeps it. Constant time.
-spec release_connection(registry(), term(), pid()) -> ok | {error, not_held}.
release_connection(Registry, Id, Pid) when is_pid(Pid) ->
    erlmcp_registry_native:release(Registry, Id, Pid);
release_connection(Registry, Id, NoPid) ->
    error(badarg, [Registry, Id, NoPid], [{error_info, #{module => ?MODULE}}]).


%%% Look-up


%% @equiv lookup_connection(default, Id)
-spec lookup_connection(term()) -> {ok, {pid(), term()}} | {error, not_found}.
lookup_connection(Id) ->
    lookup_connection(default, Id).


%% @doc The process and the capabilities of a connection; never a process of this node that has
%% exited.
-spec lookup_connection(registry(), term()) -> {ok, {pid(), term()}} | {error, not_found}.
lookup_connection(Registry, Id) ->
    erlmcp_registry_native:find(Registry, connection, Id).


%% @doc The process of a connection, without a check whether it is alive: until its monitor has fired,
%% a process that has exited is still returned. {@link whereis_name/1} makes that check.
-spec whereis_connection(term()) -> pid() | undefined.
whereis_connection(Id) ->
    erlmcp_nif:whereis_connection(Id).


%% @doc The process of a connection of a given registry; never a process of this node that has exited.
-spec whereis_connection(registry(), term()) -> pid() | undefined.
whereis_connection(Registry, Id) ->
    erlmcp_nif:whereis(Registry, connection, Id).


%% @equiv connections_of(default, Pid)
-spec connections_of(pid()) -> [Id :: term()].
connections_of(Pid) ->
    connections_of(default, Pid).


%% @doc The ids of the connections of a process, in no particular order; `[]' if it has exited. An id that the process has
%% throughout is listed once. Raises `badarg' for a process of another node.
%%
%% Costs in proportion to the monitors of the process, in all registries. The process is asked for them, by
%% `process_info/2', so the call waits until it is scheduled.
-spec connections_of(registry(), pid()) -> [Id :: term()].
connections_of(Registry, Pid) when is_pid(Pid), node(Pid) =:= node() ->
    erlmcp_registry_native:connections_of(Registry, Pid);
connections_of(Registry, Other) ->
    error(badarg, [Registry, Other], [{error_info, #{module => ?MODULE}}]).


%%% Shards


%% @equiv get_shard_id(default, Id)
-spec get_shard_id(term()) -> shard_id().
get_shard_id(Id) ->
    get_shard_id(default, Id).


%% @doc The shard of an id, registered or not: `erlang:phash2(Id, Shards)'.
-spec get_shard_id(registry(), term()) -> shard_id().
get_shard_id(Registry, Id) ->
    erlmcp_nif:shard(Registry, Id).


%% @equiv list_connections(default, ShardId)
-spec list_connections(shard_id()) -> [{term(), {pid(), term()}}].
list_connections(ShardId) ->
    list_connections(default, ShardId).


%% @doc The connections of a shard, in no particular order.
-spec list_connections(registry(), shard_id()) -> [{term(), {pid(), term()}}].
list_connections(Registry, ShardId) ->
    erlmcp_registry_native:list_shard(Registry, ShardId).


%% @equiv fold_connections(default, Fun, Acc)
-spec fold_connections(fun((Id :: term(), {pid(), Capabilities :: term()}, Acc) -> Acc), Acc) -> Acc.
fold_connections(Fun, Acc) ->
    fold_connections(default, Fun, Acc).


%% @doc Folds over all connections, shard by shard, in no particular order.
%%
%% A few hundred connections are read at a time, on a dirty scheduler, so the memory in use does not depend on their
%% number. `Fun' runs in the calling process and may change the registry. A connection that is registered throughout is
%% visited exactly once, one that is registered or removed meanwhile at most once for each registration. Costs in
%% proportion to the largest number of connections that there were at one time.
-spec fold_connections(registry(), fun((Id :: term(), {pid(), Capabilities :: term()}, Acc) -> Acc), Acc) -> Acc.
fold_connections(Registry, Fun, Acc) when is_function(Fun, 3) ->
    fold_pages(Registry,
               fun(Page, PageAcc) ->
                       lists:foldl(fun({Id, Pid, Capabilities}, RowAcc) -> Fun(Id, {Pid, Capabilities}, RowAcc) end, PageAcc, Page)
               end,
               Acc);
fold_connections(Registry, NoFun, Acc) ->
    error(badarg, [Registry, NoFun, Acc], [{error_info, #{module => ?MODULE}}]).


%% @equiv select_connections(default, MatchSpec)
-spec select_connections(ets:match_spec()) -> [term()].
select_connections(MatchSpec) ->
    select_connections(default, MatchSpec).


%% @doc What a match specification, as for {@link ets:select/2}, makes of all connections, in no particular order. A connection
%% is the tuple `{Id, Pid, Capabilities}'. Raises `badarg' for what is no match specification.
%%
%% ```
%% %% The processes of all connections that have tools:
%% erlmcp_shard_registry:select_connections([{{'_', '$1', #{tools => true}}, [], ['$1']}]).
%% '''
%%
%% Visits all connections, as {@link fold_connections/3} does, with the same consistency and cost; the memory in use depends
%% only on the result.
-spec select_connections(registry(), ets:match_spec()) -> [term()].
select_connections(Registry, MatchSpec) ->
    try ets:match_spec_compile(MatchSpec) of
        Compiled ->
            fold_pages(Registry, fun(Page, Selected) -> ets:match_spec_run(Page, Compiled) ++ Selected end, [])
    catch
        error:badarg -> error(badarg, [Registry, MatchSpec], [{error_info, #{module => ?MODULE}}])
    end.


-spec fold_pages(registry(), fun(([{Id :: term(), pid(), Capabilities :: term()}], Acc) -> Acc), Acc) -> Acc.
fold_pages(Registry, Fun, Acc) ->
    {Shards, _MaxEntries, _MaxIdBytes} = erlmcp_nif:limits(Registry),
    lists:foldl(fun(ShardId, ShardAcc) -> fold_shard(Registry, ShardId, 0, Fun, ShardAcc) end, Acc, lists:seq(0, Shards - 1)).


-spec fold_shard(registry(), shard_id(), Place, fun(([{term(), pid(), term()}], Acc) -> Acc), Acc) -> Acc
              when Place :: non_neg_integer() | none.
fold_shard(_Registry, _ShardId, none, _Fun, Acc) ->
    Acc;
fold_shard(Registry, ShardId, Place, Fun, Acc) ->
    {Page, Next} = erlmcp_nif:page(Registry, connection, ShardId, Place, ?PAGE),
    Rows = [ {Id, Pid, Capabilities} || {Id, Pid, Capabilities, unbound} <- Page ],
    fold_shard(Registry, ShardId, Next, Fun, Fun(Rows, Acc)).


%%% Counting


%% @equiv count(default)
-spec count() -> non_neg_integer().
count() ->
    count(default).


%% @doc The number of connections of a shard of the default registry, or of a whole registry.
-spec count(registry() | shard_id()) -> non_neg_integer().
count(Registry) when ?IS_REGISTRY(Registry) ->
    erlmcp_nif:count(Registry, connection);
count(ShardId) ->
    count(default, ShardId).


%% @doc The number of connections of a shard.
-spec count(registry(), shard_id()) -> non_neg_integer().
count(Registry, ShardId) ->
    {_Servers, _Transports, Connections, _Memberships} = erlmcp_nif:count_shard(Registry, ShardId),
    Connections.


%% @equiv stats(default)
-spec stats() -> stats().
stats() ->
    stats(default).


%% @doc Bounds and counts of a registry, or the counts of a shard of the default registry. `max_entries' bounds the sum of
%% `servers', `transports', `connections' and `memberships' (of groups: {@link erlmcp_group}).
-spec stats(registry() | shard_id()) -> stats() | shard_stats().
stats(Registry) when ?IS_REGISTRY(Registry) ->
    #{shards := Shards} = Limits = limits(Registry),
    BySize = lists:sort([ {S + T + C, ShardId}
                          || ShardId <- lists:seq(0, Shards - 1),
                             {S, T, C, _M} <- [erlmcp_nif:count_shard(Registry, ShardId)] ]),
    {Least, Emptiest} = hd(BySize),
    {Most, Fullest} = lists:last(BySize),
    Limits#{
      servers => erlmcp_nif:count(Registry, server),
      transports => erlmcp_nif:count(Registry, transport),
      connections => erlmcp_nif:count(Registry, connection),
      memberships => erlmcp_nif:count(Registry, member),
      fullest_shard => {Fullest, Most},
      emptiest_shard => {Emptiest, Least}
     };
stats(ShardId) ->
    stats(default, ShardId).


%% @doc The counts of a shard.
-spec stats(registry(), shard_id()) -> shard_stats().
stats(Registry, ShardId) ->
    {Servers, Transports, Connections, Memberships} = erlmcp_nif:count_shard(Registry, ShardId),
    #{
      shard_id => ShardId,
      servers => Servers,
      transports => Transports,
      connections => Connections,
      memberships => Memberships
     }.


%%% OTP `via' names


%% @equiv register_name(default, Name, Pid)
-spec register_name(term(), pid()) -> yes | no.
register_name(Name, Pid) ->
    register_name(default, Name, Pid).


%% @doc Registers a name; `no' if a process that is alive has it. Exits with `registry_full' if the
%% registry is full, so that a `via' start returns `{error, registry_full}': after `no' it would return
%% `{error, {already_started, undefined}}'.
-spec register_name(registry(), term(), pid()) -> yes | no.
register_name(Registry, Name, Pid) ->
    case register_connection(Registry, Name, Pid, undefined) of
        ok -> yes;
        {error, already_registered} -> no;
        {error, registry_full} -> exit(registry_full)
    end.


%% @equiv unregister_name(default, Name)
-spec unregister_name(term()) -> ok.
unregister_name(Name) ->
    unregister_name(default, Name).


%% @doc Removes a name; `ok' also if there is none.
-spec unregister_name(registry(), term()) -> ok.
unregister_name(Registry, Name) ->
    unregister_connection(Registry, Name).


%% @equiv whereis_name(default, Name)
-spec whereis_name(term()) -> pid() | undefined.
whereis_name(Name) ->
    erlmcp_nif:whereis_name(Name).


%% @doc The process that has a name; never a process of this node that has exited.
-spec whereis_name(registry(), term()) -> pid() | undefined.
whereis_name(Registry, Name) ->
    erlmcp_nif:whereis(Registry, connection, Name).


%% @doc Sends a message to the process that has a name and returns the process. Exits with
%% `{badarg, {Name, Message}}' if there is none.
-spec send(term(), term()) -> pid().
send(Name, Message) ->
    deliver(whereis_name(Name), Name, Message).


%% @doc As {@link send/2}, in a given registry.
-spec send(registry(), term(), term()) -> pid().
send(Registry, Name, Message) ->
    deliver(whereis_name(Registry, Name), Name, Message).


-spec deliver(pid() | undefined, term(), term()) -> pid().
deliver(undefined, Name, Message) ->
    exit({badarg, {Name, Message}});
deliver(Pid, _Name, Message) ->
    Pid ! Message,
    Pid.
