%%% @private
%%% The functions of the native library: stubs, and loading it.
%%%
%%% A `Registry' is the atom `default', a reference from {@link new/3}, or `exclusive' for the default
%%% one in the hands of whoever has diverted all others ({@link divert/0}). A namespace is `server',
%%% `transport' or `connection'. Every function raises `badarg' for arguments of the wrong kind and
%%% for ids that take more than the registry's `max_id_bytes', and changes nothing then.
%%%
%%% Functions that may have much to do return `dirty' instead of working for long on a normal
%%% scheduler; the caller then calls the one named `..._dirty'. {@link erlmcp_native_registry} does
%%% that for all of them.
%%%
%%% Without the library every function raises `{nif_not_loaded, Info}', where `Info' names path,
%%% target, NIF version, reason and remedy; only those that can be diverted are so instead.
-module(erlmcp_nif).

%% Registries
-export([new/3, make_default/3, limits/1, close/1, open/1, divert/0, undivert/0]).
%% Look-up
-export([whereis_connection/1, whereis_server/1, whereis_transport/1, whereis/3]).
-export([find/3, find_dirty/3]).
%% Registration
-export([register/6, register_dirty/6, unregister/3, update_server/3, update_server_dirty/3]).
%% Bindings
-export([bind/4, unbind/2, bound_server/2, bindings/1]).
-export([bound_transports/2, bound_transports_dirty/2]).
%% Listing and counting
-export([list/2, list_dirty/2, list_shard/2, list_shard_dirty/2, list_ids/2]).
-export([count/2, count_shard/2, check_shard/2, shard/2, distinct_configs/0]).
%% Routing
-export([route_connection/1, route_server/2, route_transport/1, route_batch/1]).
-export([route_server_exclusive/2, route_transport_exclusive/1]).
-export([route_bound/1, route_bound_dirty/1, route_bound_exclusive/1]).
%% Token buckets
-export([bucket_new/1, is_bucket/1, bucket_take/2, bucket_state/1, bucket_set_limits/2]).
-export([entry_take/3, entry_bucket_state/2, entry_set_limits/3]).
-export([set_shared_limits/1, shared_limits/0, are_limits/1]).
-export([enforce_limits/1, enforces_limits/0, has_token_buckets/0]).
%% Admission control
-export([admission_check/1, admission_adjust/2, admission_set_threshold/2, admission_stats/1]).
-export([admission_is_unwatched/1, refused/1, count_not_found/0]).
-export([set_sample_interval/1, sample_begin/1, sample_end/4, sample_skip/1]).
-export([shard_receivers/1, shard_receivers_dirty/1]).
%% Circuit breaker
-export([breaker_state/0, breaker_allow/0, breaker_success/0, breaker_failure/0]).
-export([breaker_set/1, breaker_configure/1, breaker_stats/0]).
%% Loading
-export([load_error/0]).

-export_type([registry/0, namespace/0, load_error/0]).
-export_type([routed/0, route/0, refusal/0, event/0]).
-export_type([bucket/0, limits/0, taken/0, circuit_state/0]).

-on_load(load/0).

-nifs([new/3,
       make_default/3,
       limits/1,
       close/1,
       open/1,
       divert/0,
       undivert/0,
       whereis_connection/1,
       whereis_server/1,
       whereis_transport/1,
       whereis/3,
       find/3,
       find_dirty/3,
       register/6,
       register_dirty/6,
       unregister/3,
       update_server/3,
       update_server_dirty/3,
       bind/4,
       unbind/2,
       bound_server/2,
       bindings/1,
       bound_transports/2,
       bound_transports_dirty/2,
       list/2,
       list_dirty/2,
       list_shard/2,
       list_shard_dirty/2,
       list_ids/2,
       count/2,
       count_shard/2,
       check_shard/2,
       shard/2,
       distinct_configs/0,
       route_connection/1,
       route_server/2,
       route_transport/1,
       route_server_exclusive/2,
       route_transport_exclusive/1,
       route_batch/1,
       route_bound/1,
       route_bound_dirty/1,
       route_bound_exclusive/1,
       bucket_new/1,
       is_bucket/1,
       bucket_take/2,
       bucket_state/1,
       bucket_set_limits/2,
       entry_take/3,
       entry_bucket_state/2,
       entry_set_limits/3,
       set_shared_limits/1,
       shared_limits/0,
       are_limits/1,
       enforce_limits/1,
       enforces_limits/0,
       has_token_buckets/0,
       admission_check/1,
       admission_adjust/2,
       admission_set_threshold/2,
       admission_stats/1,
       admission_is_unwatched/1,
       refused/1,
       count_not_found/0,
       set_sample_interval/1,
       sample_begin/1,
       sample_end/4,
       sample_skip/1,
       shard_receivers/1,
       shard_receivers_dirty/1,
       breaker_state/0,
       breaker_allow/0,
       breaker_success/0,
       breaker_failure/0,
       breaker_set/1,
       breaker_configure/1,
       breaker_stats/0]).

-type registry() :: default | exclusive | reference().
-type namespace() :: server | transport | connection.
-type load_error() :: #{
                        path := file:filename(),
                        target := string(),
                        nif_version := string(),
                        reason := term(),
                        remedy := string()
                       }.

-type refusal() :: undefined | circuit_open | shard_overloaded | rate_limited.
-type event() :: {sample | overloaded, Shard :: non_neg_integer()} | {circuit, circuit_state()}.
-type route() :: pid() | refusal().
-type routed() :: route() | {route(), [event()]}.
-type bucket() :: reference().
-type limits() :: infinity | {Capacity :: pos_integer(), RatePerSecond :: float()}.
-type taken() :: {ok, Left :: non_neg_integer() | infinity} |
                 {rate_limited, WaitNs :: non_neg_integer()} |
                 exceeds_capacity.
-type circuit_state() :: closed | open | half_open | off.

-define(LOAD_ERROR, {?MODULE, load_error}).

%%% Loading


%% Without the library the module is there all the same, so that callers get an error that says why and
%% what to do instead of `undef'. But where the library is in use already, another load of this module
%% fails (the VM replaces none in a running node): with stubs instead of it everything would stop.
-spec load() -> ok | {error, term()}.
load() ->
    Path = library(),
    case erlang:load_nif(Path, []) of
        ok ->
            _ = persistent_term:erase(?LOAD_ERROR),
            ok;
        {error, {Replaces, _} = Reason} when Replaces =:= upgrade; Replaces =:= reload ->
            {error, Reason};
        {error, Reason} ->
            persistent_term:put(?LOAD_ERROR,
                                #{
                                  path => Path ++ ".so",
                                  target => erlang:system_info(system_architecture),
                                  nif_version => erlang:system_info(nif_version),
                                  reason => Reason,
                                  remedy =>
                                      "compile erlmcp_native on this machine with Rust 1.91 or newer and OTP 25 or "
                                      "newer: rebar3 clean -a, then rebar3 compile; a release must contain "
                                      "priv/erlmcp_nif.so"
                                 }),
            ok
    end.


%% Beside the ebin folder that this module was loaded from: right for a project, a dependency, a
%% checkout and a release, also while the code path is being built.
-spec library() -> file:filename().
library() ->
    Priv =
        case code:priv_dir(erlmcp_native) of
            {error, bad_name} ->
                Ebin = filename:dirname(code:which(?MODULE)),
                filename:join(filename:dirname(Ebin), "priv");
            Dir ->
                Dir
        end,
    filename:join(Priv, "erlmcp_nif").


%% Why the library is not loaded; `none' if it is.
-spec load_error() -> none | load_error().
load_error() ->
    persistent_term:get(?LOAD_ERROR, none).


-define(NOT_LOADED, erlang:nif_error({nif_not_loaded, load_error()})).
%% Without the library. (With it none of these lines is ever run.)
-define(DIVERTED,
        case load_error() of
            none -> ?NOT_LOADED;
            _ -> diverted
        end).

%%% Registries


%% An empty registry: shards, max_entries, max_id_bytes.
-spec new(pos_integer(), pos_integer(), pos_integer()) -> reference().
new(_Shards, _MaxEntries, _MaxIdBytes) -> ?NOT_LOADED.


%% Makes the default registry with these bounds, unless it is there already.
-spec make_default(pos_integer(), pos_integer(), pos_integer()) -> created | exists.
make_default(_Shards, _MaxEntries, _MaxIdBytes) -> ?NOT_LOADED.


-spec limits(registry()) -> {pos_integer(), pos_integer(), pos_integer()}.
limits(_Registry) -> ?NOT_LOADED.


%% Removes all servers and transports and refuses new ones. Returns the sentinels to end. Dirty.
-spec close(registry()) -> [pid()].
close(_Registry) -> ?NOT_LOADED.


%% Takes servers and transports again.
-spec open(registry()) -> ok.
open(_Registry) -> ?NOT_LOADED.


%% Turns away, with `diverted', whoever wants to change servers, transports or bindings of `default',
%% or to route by them; who says `exclusive' instead still can. `ok' if all changes that began before
%% have been made; until then `busy'.
-spec divert() -> ok | busy.
divert() -> ?NOT_LOADED.


-spec undivert() -> ok.
undivert() -> ?NOT_LOADED.


%%% Look-up


-spec whereis_connection(term()) -> pid() | undefined.
whereis_connection(_Id) -> ?NOT_LOADED.


-spec whereis_server(term()) -> pid() | undefined.
whereis_server(_Id) -> ?NOT_LOADED.


-spec whereis_transport(term()) -> pid() | undefined.
whereis_transport(_Id) -> ?NOT_LOADED.


-spec whereis(registry(), namespace(), term()) -> pid() | undefined.
whereis(_Registry, _Namespace, _Id) -> ?NOT_LOADED.


-spec find(registry(), namespace(), term()) ->
          {ok, {pid(), term()}} | {error, not_found} | dirty.
find(_Registry, _Namespace, _Id) -> ?NOT_LOADED.


-spec find_dirty(registry(), namespace(), term()) -> {ok, {pid(), term()}} | {error, not_found}.
find_dirty(_Registry, _Namespace, _Id) -> ?NOT_LOADED.


%%% Registration


%% `Monitored' is the local process whose end removes the entry: `Pid' itself, or for a process of
%% another node its sentinel.
-spec register(registry(), namespace(), term(), pid(), pid(), term()) ->
          ok | {already_registered, pid()} | registry_full | registry_closed | diverted | dirty.
register(_Registry, _Namespace, _Id, _Pid, _Monitored, _Config) -> ?NOT_LOADED.


-spec register_dirty(registry(), namespace(), term(), pid(), pid(), term()) ->
          ok | {already_registered, pid()} | registry_full | registry_closed | diverted.
register_dirty(_Registry, _Namespace, _Id, _Pid, _Monitored, _Config) -> ?NOT_LOADED.


%% Returns the sentinel to end, if the entry had one.
-spec unregister(registry(), namespace(), term()) -> ok | {ok, pid()} | diverted.
unregister(_Registry, _Namespace, _Id) -> ?NOT_LOADED.


-spec update_server(registry(), term(), term()) -> ok | {error, not_found} | diverted | dirty.
update_server(_Registry, _Id, _Config) -> ?NOT_LOADED.


-spec update_server_dirty(registry(), term(), term()) -> ok | {error, not_found} | diverted.
update_server_dirty(_Registry, _Id, _Config) -> ?NOT_LOADED.


%%% Bindings


%% `false' makes a binding like an automatic one, also to a server that does not exist.
-spec bind(registry(), Transport :: term(), Server :: term(), ServerMustExist :: boolean()) ->
          ok | {error, server_not_found | transport_not_found} | diverted.
bind(_Registry, _Transport, _Server, _ServerMustExist) -> ?NOT_LOADED.


-spec unbind(registry(), Transport :: term()) -> ok | diverted.
unbind(_Registry, _Transport) -> ?NOT_LOADED.


-spec bound_server(registry(), Transport :: term()) -> {ok, term()} | {error, not_found}.
bound_server(_Registry, _Transport) -> ?NOT_LOADED.


%% All bindings: transport, server. Dirty.
-spec bindings(registry()) -> [{term(), term()}].
bindings(_Registry) -> ?NOT_LOADED.


-spec bound_transports(registry(), Server :: term()) -> [pid()] | dirty.
bound_transports(_Registry, _Server) -> ?NOT_LOADED.


-spec bound_transports_dirty(registry(), Server :: term()) -> [pid()].
bound_transports_dirty(_Registry, _Server) -> ?NOT_LOADED.


%%% Listing and counting


-spec list(registry(), namespace()) -> [{term(), {pid(), term()}}] | dirty.
list(_Registry, _Namespace) -> ?NOT_LOADED.


-spec list_dirty(registry(), namespace()) -> [{term(), {pid(), term()}}].
list_dirty(_Registry, _Namespace) -> ?NOT_LOADED.


%% The ids of all entries. Dirty.
-spec list_ids(registry(), namespace()) -> [term()].
list_ids(_Registry, _Namespace) -> ?NOT_LOADED.


%% The connections of one shard.
-spec list_shard(registry(), non_neg_integer()) -> [{term(), {pid(), term()}}] | dirty.
list_shard(_Registry, _Shard) -> ?NOT_LOADED.


-spec list_shard_dirty(registry(), non_neg_integer()) -> [{term(), {pid(), term()}}].
list_shard_dirty(_Registry, _Shard) -> ?NOT_LOADED.


-spec count(registry(), namespace()) -> non_neg_integer().
count(_Registry, _Namespace) -> ?NOT_LOADED.


%% Servers, transports and connections of one shard.
-spec count_shard(registry(), non_neg_integer()) ->
          {non_neg_integer(), non_neg_integer(), non_neg_integer()}.
count_shard(_Registry, _Shard) -> ?NOT_LOADED.


%% How many entries a walk through one shard finds, and those of their processes on this node that
%% have ended; one for each entry. Dirty.
-spec check_shard(registry(), non_neg_integer()) -> {non_neg_integer(), [pid()]}.
check_shard(_Registry, _Shard) -> ?NOT_LOADED.


%% `erlang:phash2(Id, Shards)'.
-spec shard(registry(), term()) -> non_neg_integer().
shard(_Registry, _Id) -> ?NOT_LOADED.


%% Number of different config terms that are kept, over all registries.
-spec distinct_configs() -> non_neg_integer().
distinct_configs() -> ?NOT_LOADED.


%%% Routing, in the default registry
%%
%% Without the library nothing is routed here: everything is `diverted'.


%% The process of a connection, if a message may be sent to it; the connection's bucket pays.
-spec route_connection(term()) -> routed().
route_connection(_Id) -> ?NOT_LOADED.


%% The process of a server, if a message may be sent to it; the transport's bucket pays.
-spec route_server(Server :: term(), Transport :: term()) -> routed() | diverted.
route_server(_Server, _Transport) -> ?DIVERTED.


%% The process of a transport, if a message may be sent to it; no bucket pays.
-spec route_transport(term()) -> routed() | diverted.
route_transport(_Id) -> ?DIVERTED.


%% The same two, for those who know that the native registry is to be used although it is diverted.
-spec route_server_exclusive(Server :: term(), Transport :: term()) -> routed().
route_server_exclusive(_Server, _Transport) -> ?NOT_LOADED.


-spec route_transport_exclusive(term()) -> routed().
route_transport_exclusive(_Id) -> ?NOT_LOADED.


%% As {@link route_connection/1} for the first messages of the list, some hundreds, and the rest of
%% it. An id that is too long is `undefined' here.
-spec route_batch([{Id :: term(), Message :: term()}]) -> {[routed()], Rest :: [{term(), term()}]}.
route_batch(_Messages) -> ?NOT_LOADED.


%% The processes of the transports bound to a server that a message may be sent to, and why it was
%% refused for others, if it was.
-spec route_bound(Server :: term()) -> {[pid()], none | refusal(), [event()]} | diverted | dirty.
route_bound(_Server) -> ?DIVERTED.


-spec route_bound_dirty(Server :: term()) -> {[pid()], none | refusal(), [event()]} | diverted.
route_bound_dirty(_Server) -> ?DIVERTED.


%% As {@link route_server_exclusive/2}. Dirty.
-spec route_bound_exclusive(Server :: term()) -> {[pid()], none | refusal(), [event()]}.
route_bound_exclusive(_Server) -> ?NOT_LOADED.


%%% Token buckets


-spec bucket_new(limits()) -> bucket().
bucket_new(_Limits) -> ?NOT_LOADED.


-spec is_bucket(term()) -> boolean().
is_bucket(_Term) -> ?NOT_LOADED.


-spec bucket_take(bucket(), non_neg_integer()) -> taken().
bucket_take(_Bucket, _Tokens) -> ?NOT_LOADED.


-spec bucket_state(bucket()) -> {Tokens :: non_neg_integer() | infinity, limits()}.
bucket_state(_Bucket) -> ?NOT_LOADED.


-spec bucket_set_limits(bucket(), limits()) -> ok | too_many_changes.
bucket_set_limits(_Bucket, _Limits) -> ?NOT_LOADED.


%% From the bucket of a connection or transport.
-spec entry_take(namespace(), term(), non_neg_integer()) -> taken() | not_found.
entry_take(_Namespace, _Id, _Tokens) -> ?NOT_LOADED.


-spec entry_bucket_state(namespace(), term()) ->
          {Tokens :: non_neg_integer() | infinity, limits()} | not_found.
entry_bucket_state(_Namespace, _Id) -> ?NOT_LOADED.


%% Limits for one connection or transport; `shared' for those of all.
-spec entry_set_limits(namespace(), term(), limits() | shared) ->
          ok | not_found | too_many_changes.
entry_set_limits(_Namespace, _Id, _Limits) -> ?NOT_LOADED.


%% The limits of all that have none of their own.
-spec set_shared_limits(limits()) -> ok | too_many_changes.
set_shared_limits(_Limits) -> ?NOT_LOADED.


-spec shared_limits() -> limits().
shared_limits() -> ?NOT_LOADED.


%% Whether these are limits that a bucket can have.
-spec are_limits(term()) -> boolean().
are_limits(_Limits) -> ?NOT_LOADED.


%% Whether routes take from buckets.
-spec enforce_limits(boolean()) -> ok.
enforce_limits(_IsOn) -> ?NOT_LOADED.


%% What {@link enforce_limits/1} has said last; `true' at first.
-spec enforces_limits() -> boolean().
enforces_limits() -> ?NOT_LOADED.


%% Whether routes take from any bucket: limits are enforced, and there are some.
-spec has_token_buckets() -> boolean().
has_token_buckets() -> ?NOT_LOADED.


%%% Admission control


-spec admission_check(non_neg_integer()) -> boolean().
admission_check(_Shard) -> ?NOT_LOADED.


-spec admission_adjust(non_neg_integer(), integer()) -> ok.
admission_adjust(_Shard, _Delta) -> ?NOT_LOADED.


-spec admission_set_threshold(non_neg_integer(), pos_integer() | infinity) -> ok.
admission_set_threshold(_Shard, _Threshold) -> ?NOT_LOADED.


-spec admission_stats(non_neg_integer()) ->
          {Depth :: non_neg_integer(),
           Threshold :: pos_integer() | infinity,
           Admitted :: non_neg_integer(),
           IsOverloaded :: boolean(),
           SampleAgeMs :: non_neg_integer() | infinity}.
admission_stats(_Shard) -> ?NOT_LOADED.


%% Whether messages have been admitted since the last sample and that is older than ten intervals.
-spec admission_is_unwatched(non_neg_integer()) -> boolean().
admission_is_unwatched(_Shard) -> ?NOT_LOADED.


%% Messages to a shard that were refused so far. Those that were not found count in any shard.
-spec refused(non_neg_integer()) ->
          {NotFound :: non_neg_integer(),
           CircuitOpen :: non_neg_integer(),
           ShardOverloaded :: non_neg_integer(),
           RateLimited :: non_neg_integer()}.
refused(_Shard) -> ?NOT_LOADED.


%% A message to nobody that was not looked up. All that were are counted where they were.
-spec count_not_found() -> ok.
count_not_found() -> ?NOT_LOADED.


-spec set_sample_interval(Ms :: pos_integer()) -> ok.
set_sample_interval(_IntervalMs) -> ?NOT_LOADED.


-spec sample_begin(non_neg_integer()) -> Began :: non_neg_integer().
sample_begin(_Shard) -> ?NOT_LOADED.


%% `IsLast': no more samples are taken until an event asks for one.
-spec sample_end(non_neg_integer(), Began :: non_neg_integer(), Queued :: non_neg_integer(), IsLast :: boolean()) ->
          IsUsedUp :: boolean().
sample_end(_Shard, _Began, _Queued, _IsLast) -> ?NOT_LOADED.


%% Instead of a sample: what was admitted since the last one counts on.
-spec sample_skip(non_neg_integer()) -> ok.
sample_skip(_Shard) -> ?NOT_LOADED.


%% The processes of this node behind a shard's entries, one for each entry.
-spec shard_receivers(non_neg_integer()) -> [pid()] | dirty.
shard_receivers(_Shard) -> ?NOT_LOADED.


-spec shard_receivers_dirty(non_neg_integer()) -> [pid()].
shard_receivers_dirty(_Shard) -> ?NOT_LOADED.


%%% The node's circuit breaker


-spec breaker_state() -> circuit_state().
breaker_state() -> ?NOT_LOADED.


%% A probe must be answered by a success or a failure.
-spec breaker_allow() -> allowed | {allowed, half_open} | refused.
breaker_allow() -> ?NOT_LOADED.


%% Returns the change that it has led to, as do the next two.
-spec breaker_success() -> none | closed.
breaker_success() -> ?NOT_LOADED.


-spec breaker_failure() -> none | open.
breaker_failure() -> ?NOT_LOADED.


-spec breaker_set(open | closed) -> none | open | closed.
breaker_set(_State) -> ?NOT_LOADED.


-spec breaker_configure(off |
                        {FailureThreshold :: pos_integer(),
                         WindowMs :: pos_integer(),
                         SuccessThreshold :: pos_integer(),
                         TimeoutMs :: non_neg_integer(),
                         ProbeLimit :: pos_integer()}) -> ok.
breaker_configure(_Config) -> ?NOT_LOADED.


-spec breaker_stats() -> #{atom() => term()}.
breaker_stats() -> ?NOT_LOADED.
