%%% @doc The public registry of connections, in native memory.
%%%
%%% A connection is an id (any term, compared with `=:='), a process, and a capabilities term that is
%%% returned unchanged. It stays until the process ends or it is unregistered. Every function runs in
%%% the calling process; there is no server behind it.
%%%
%%% A connection belongs to the shard `erlang:phash2(Id, Shards)', fixed when it is registered.
%%%
%%% The functions work on the default registry, which is made on first use, or on one from
%%% {@link new/1} as an additional first argument. Registrations of the default registry outlive
%%% every process but their own; those of another one go with the last reference to it.
%%%
%%% As an OTP name registry: `{via, erlmcp_shard_registry, Name}'. Names are connections whose
%%% capabilities are `undefined'.
%%%
%%% == Consistency ==
%%% Each function on one id is one atomic step. Lists are no snapshots: what is there throughout is
%%% seen exactly once. Counts are exact when nothing is under way.
%%%
%%% == Cost ==
%%% All functions take constant time but the lists, which cost in proportion to the most connections
%%% the shard has had at one time; more than a few hundred are listed on a dirty scheduler.
%%% {@link whereis_connection/1} is the quickest: it copies no term.
%%%
%%% == Errors ==
%%% Wrong arguments raise `badarg' and change nothing, as do ids whose encoding takes more than
%%% `max_id_bytes'.
-module(erlmcp_shard_registry).

%% Registries
-export([new/0, new/1, limits/0, limits/1]).
%% Registration
-export([register_connection/3, register_connection/4]).
-export([unregister_connection/1, unregister_connection/2]).
%% Lookup
-export([lookup_connection/1, lookup_connection/2]).
-export([whereis_connection/1, whereis_connection/2]).
%% Shards
-export([get_shard_id/1, get_shard_id/2]).
-export([list_connections/1, list_connections/2]).
%% Counting
-export([count/0, count/1, count/2, stats/0, stats/1, stats/2]).
%% OTP `via' names
-export([register_name/2, register_name/3]).
-export([unregister_name/1, unregister_name/2]).
-export([whereis_name/1, whereis_name/2]).
-export([send/2, send/3]).

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
                   fullest_shard := {shard_id(), non_neg_integer()},
                   emptiest_shard := {shard_id(), non_neg_integer()}
                  }.
-type shard_stats() :: #{
                         shard_id := shard_id(),
                         servers := non_neg_integer(),
                         transports := non_neg_integer(),
                         connections := non_neg_integer()
                        }.

-define(IS_REGISTRY(R), (R =:= default orelse is_reference(R))).

%%% Registries


%% @equiv new(#{})
-spec new() -> registry().
new() ->
    new(#{}).


%% @doc An empty registry of its own. It is freed when the last reference to it is gone.
%%
%% Options and defaults: `shards' (64; a power of two from 1 to 1024), `max_entries' (2,000,000; up to
%% 2^28) and `max_id_bytes' (65,535; up to 2^24). Raises `{bad_option, Key, Value, Expected}'.
-spec new(options()) -> registry().
new(Options) when is_map(Options) ->
    case erlmcp_native_config:registry_limits(Options) of
        {ok, {Shards, MaxEntries, MaxIdBytes}} -> erlmcp_nif:new(Shards, MaxEntries, MaxIdBytes);
        {error, Reason} -> error(Reason, [Options])
    end;
new(Options) ->
    error(badarg, [Options]).


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


%% @doc Registers a connection. The first one of an id wins; a process that has ended gives way. A
%% process that has ended is accepted, and not found afterwards. Equal capabilities are kept once.
-spec register_connection(registry(), term(), pid(), term()) ->
          ok | {error, already_registered | registry_full}.
register_connection(Registry, Id, Pid, Capabilities) ->
    case erlmcp_native_registry:register(Registry, connection, Id, Pid, Capabilities, none) of
        ok -> ok;
        {error, {already_registered, _Pid}} -> {error, already_registered};
        {error, registry_full} -> {error, registry_full}
    end.


%% @equiv unregister_connection(default, Id)
-spec unregister_connection(term()) -> ok.
unregister_connection(Id) ->
    unregister_connection(default, Id).


%% @doc Removes a connection; `ok' also if there is none.
-spec unregister_connection(registry(), term()) -> ok.
unregister_connection(Registry, Id) ->
    erlmcp_native_registry:unregister(Registry, connection, Id).


%%% Lookup


%% @equiv lookup_connection(default, Id)
-spec lookup_connection(term()) -> {ok, {pid(), term()}} | {error, not_found}.
lookup_connection(Id) ->
    lookup_connection(default, Id).


%% @doc The process and the capabilities of a connection; never a process of this node that has
%% ended.
-spec lookup_connection(registry(), term()) -> {ok, {pid(), term()}} | {error, not_found}.
lookup_connection(Registry, Id) ->
    erlmcp_native_registry:find(Registry, connection, Id).


%% @doc The process of a connection. As with `whereis/1', it may have ended just now.
-spec whereis_connection(term()) -> pid() | undefined.
whereis_connection(Id) ->
    erlmcp_nif:whereis_connection(Id).


%% @doc As {@link whereis_connection/1}, in a given registry.
-spec whereis_connection(registry(), term()) -> pid() | undefined.
whereis_connection(Registry, Id) ->
    erlmcp_nif:whereis(Registry, connection, Id).


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
    erlmcp_native_registry:list_shard(Registry, ShardId).


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
    {_Servers, _Transports, Connections} = erlmcp_nif:count_shard(Registry, ShardId),
    Connections.


%% @equiv stats(default)
-spec stats() -> stats().
stats() ->
    stats(default).


%% @doc Bounds and counts of a registry, or the counts of a shard of the default registry.
-spec stats(registry() | shard_id()) -> stats() | shard_stats().
stats(Registry) when ?IS_REGISTRY(Registry) ->
    #{shards := Shards} = Limits = limits(Registry),
    BySize = lists:sort([ {S + T + C, ShardId}
                          || ShardId <- lists:seq(0, Shards - 1),
                             {S, T, C} <- [erlmcp_nif:count_shard(Registry, ShardId)] ]),
    {Least, Emptiest} = hd(BySize),
    {Most, Fullest} = lists:last(BySize),
    Limits#{
      servers => erlmcp_nif:count(Registry, server),
      transports => erlmcp_nif:count(Registry, transport),
      connections => erlmcp_nif:count(Registry, connection),
      fullest_shard => {Fullest, Most},
      emptiest_shard => {Emptiest, Least}
     };
stats(ShardId) ->
    stats(default, ShardId).


%% @doc The counts of a shard.
-spec stats(registry(), shard_id()) -> shard_stats().
stats(Registry, ShardId) ->
    {Servers, Transports, Connections} = erlmcp_nif:count_shard(Registry, ShardId),
    #{
      shard_id => ShardId,
      servers => Servers,
      transports => Transports,
      connections => Connections
     }.


%%% OTP `via' names


%% @equiv register_name(default, Name, Pid)
-spec register_name(term(), pid()) -> yes | no.
register_name(Name, Pid) ->
    register_name(default, Name, Pid).


%% @doc Registers a name; `no' if it is taken or the registry is full.
-spec register_name(registry(), term(), pid()) -> yes | no.
register_name(Registry, Name, Pid) ->
    case register_connection(Registry, Name, Pid, undefined) of
        ok -> yes;
        {error, _} -> no
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
    whereis_connection(Name).


%% @doc The process that has a name.
-spec whereis_name(registry(), term()) -> pid() | undefined.
whereis_name(Registry, Name) ->
    whereis_connection(Registry, Name).


%% @doc Sends a message to the process that has a name and returns the process. Exits with
%% `{badarg, {Name, Message}}' if there is none.
-spec send(term(), term()) -> pid().
send(Name, Message) ->
    deliver(whereis_connection(Name), Name, Message).


%% @doc As {@link send/2}, in a given registry.
-spec send(registry(), term(), term()) -> pid().
send(Registry, Name, Message) ->
    deliver(whereis_connection(Registry, Name), Name, Message).


-spec deliver(pid() | undefined, term(), term()) -> pid().
deliver(undefined, Name, Message) ->
    exit({badarg, {Name, Message}});
deliver(Pid, _Name, Message) ->
    Pid ! Message,
    Pid.
