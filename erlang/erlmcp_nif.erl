%%% @private
%%% The functions of the native library: stubs, and loading it.
%%%
%%% A `Registry' is the atom `default', a reference from {@link new/3}, or `exclusive': the default
%%% registry used by its owner, which diverts all other callers ({@link divert/1}). A namespace is `server',
%%% `transport' or `connection'. Every function raises `badarg' for arguments of the wrong kind and
%%% for ids that take more than the registry's `max_id_bytes', and changes nothing then.
%%%
%%% Functions that may have much work reschedule themselves on a dirty scheduler when they find that they
%%% do; functions marked dirty always run on one.
%%%
%%% Without the library, functions that can be diverted return `diverted', and every other function raises
%%% `{nif_not_loaded, Info}', where `Info' names path, target, NIF version, reason and remedy.
-module(erlmcp_nif).

%% Registries
-export([new/3, make_default/3, limits/1, close/1, open/1, divert/1]).
%% Look-up
-export([whereis_connection/1, whereis_name/1, whereis/3]).
-export([find/3]).
%% Registration
-export([register/6, register_or_find/5, replace/5, unregister/3, release/3, update/4]).
%% Bindings
-export([bind/4, unbind/2, bound_server/2, bindings/1]).
-export([bound_transports/2]).
%% Groups
-export([join_group/4, leave_group/3, group_members/2, group_count/2, pick_member/3]).
%% Listing and counting
-export([list/2, list_shard/2, page/5, watched_connections/2, watched_groups/2]).
-export([count/2, count_shard/2, shard/2, distinct_configs/0]).
%% Announcements of connections
-export([announcements_attach/1, announcements_detach/1, announcements_set/3, announcements_interests/1]).
-export([announcements_read/2]).
%% Routing
-export([route_connection/1, route_server/2, route_transport/1, route_batch/1]).
-export([route_by_lease/2, set_delivery/2, delivery/1]).
-export([route_server_exclusive/2, route_transport_exclusive/1]).
-export([route_bound/1, route_bound_exclusive/1]).
-export([route_group/1, route_member/2]).
-export([forecast/3]).
%% Token buckets
-export([bucket_new/1, is_bucket/1, bucket_take/2, bucket_refund/2, bucket_state/1, bucket_set_limits/2]).
-export([entry_take/3, entry_refund/3, entry_bucket_state/2, entry_set_limits/3]).
-export([set_shared_limits/1, shared_limits/0, are_limits/1]).
-export([enforce_limits/1, enforces_limits/0, has_token_buckets/0]).
%% Keyed limiters
-export([limiter_new/2, limiter_take/3, limiter_refund/3, limiter_state/2, limiter_set_limits/2, limiter_info/1]).
-export([take_together/1]).
%% Message stores
-export([message_store_new/2, message_store_push/2, message_store_drain/2, message_store_open/1]).
-export([message_store_info/1, message_stores/0]).
%% Admission control
-export([admission_check/1, admission_adjust/2, admission_stats/1]).
-export([admission_set_threshold/2, admission_threshold/1]).
-export([admission_is_unwatched/1, admitted/1, refused/1, count_not_found/0]).
-export([count_receivers/1, is_receiver_count_due/1]).
-export([set_sample_interval/1, sample_begin/2, sample_take/2, sample_report/3]).
-export([sample_skip/1, sample_pause/1, sample_counts/1]).
%% Circuit breaker
-export([breaker_state/0, breaker_allow/0, breaker_would_allow/0, breaker_success/0, breaker_failure/0]).
-export([breaker_set/1, breaker_configure/1, breaker_stats/0]).
%% Circuit breakers of targets
-export([target_breaker_set/3, target_breaker_remove/2, target_breaker_change/3]).
-export([target_breaker_stats/2, target_breakers/0]).
%% Named circuit breakers
-export([named_breaker_register/4, named_breaker_remove/1, named_breaker_owner/1, named_breakers/0]).
-export([named_breaker_enter/2, named_breaker_leave/2]).
-export([named_breaker_state/1, named_breaker_stats/1, named_breaker_force/2]).
%% Loading
-export([load_error/0]).

-export_type([registry/0, namespace/0, load_error/0]).
-export_type([pick/0]).
-export_type([interest/0, announcement/0]).
-export_type([routed/0, route/0, refusal/0, event/0]).
-export_type([bucket/0, limits/0, change/0, taken/0, limiter/0, share/0, message_store/0, circuit_state/0]).
-export_type([breaker_config/0, breaker_change/0]).
-export_type([named_breaker_config/0, transition/0, entered/0]).

-on_load(load/0).

-nifs([new/3,
       make_default/3,
       limits/1,
       close/1,
       open/1,
       divert/1,
       whereis_connection/1,
       whereis_name/1,
       whereis/3,
       find/3,
       register/6,
       register_or_find/5,
       replace/5,
       unregister/3,
       release/3,
       update/4,
       bind/4,
       unbind/2,
       bound_server/2,
       bindings/1,
       bound_transports/2,
       join_group/4,
       leave_group/3,
       group_members/2,
       group_count/2,
       pick_member/3,
       list/2,
       list_shard/2,
       page/5,
       watched_connections/2,
       watched_groups/2,
       count/2,
       count_shard/2,
       shard/2,
       distinct_configs/0,
       announcements_attach/1,
       announcements_detach/1,
       announcements_set/3,
       announcements_interests/1,
       announcements_read/2,
       route_connection/1,
       route_server/2,
       route_transport/1,
       route_server_exclusive/2,
       route_transport_exclusive/1,
       route_batch/1,
       route_by_lease/2,
       set_delivery/2,
       delivery/1,
       route_bound/1,
       route_bound_exclusive/1,
       route_group/1,
       route_member/2,
       forecast/3,
       bucket_new/1,
       is_bucket/1,
       bucket_take/2,
       bucket_refund/2,
       bucket_state/1,
       bucket_set_limits/2,
       entry_take/3,
       entry_refund/3,
       entry_bucket_state/2,
       entry_set_limits/3,
       set_shared_limits/1,
       shared_limits/0,
       are_limits/1,
       enforce_limits/1,
       enforces_limits/0,
       has_token_buckets/0,
       limiter_new/2,
       limiter_take/3,
       limiter_refund/3,
       limiter_state/2,
       limiter_set_limits/2,
       limiter_info/1,
       take_together/1,
       message_store_new/2,
       message_store_push/2,
       message_store_drain/2,
       message_store_open/1,
       message_store_info/1,
       message_stores/0,
       admission_check/1,
       admission_adjust/2,
       admission_stats/1,
       admission_set_threshold/2,
       admission_threshold/1,
       admission_is_unwatched/1,
       admitted/1,
       refused/1,
       count_not_found/0,
       count_receivers/1,
       is_receiver_count_due/1,
       set_sample_interval/1,
       sample_begin/2,
       sample_take/2,
       sample_report/3,
       sample_skip/1,
       sample_pause/1,
       sample_counts/1,
       breaker_state/0,
       breaker_allow/0,
       breaker_would_allow/0,
       breaker_success/0,
       breaker_failure/0,
       breaker_set/1,
       breaker_configure/1,
       breaker_stats/0,
       target_breaker_set/3,
       target_breaker_remove/2,
       target_breaker_change/3,
       target_breaker_stats/2,
       target_breakers/0,
       named_breaker_register/4,
       named_breaker_remove/1,
       named_breaker_owner/1,
       named_breakers/0,
       named_breaker_enter/2,
       named_breaker_leave/2,
       named_breaker_state/1,
       named_breaker_stats/1,
       named_breaker_force/2]).

-type registry() :: default | exclusive | reference().
-type namespace() :: server | transport | connection.
-type pick() :: round_robin | random | [Key :: term()].
-type load_error() :: #{
                        path := file:filename(),
                        target := string(),
                        nif_version := string(),
                        reason := term(),
                        remedy := string()
                       }.

-type interest() :: all | {shard, non_neg_integer()} | {id, Id :: term()}.
-type announcement() :: {joined | left, Id :: term(), pid(), Shard :: non_neg_integer()}.
-type refusal() :: undefined | circuit_open | shard_overloaded | rate_limited | store_full.
-type event() :: {sample | overloaded, Shard :: non_neg_integer()} | {circuit, circuit_state()}.
-type route() :: pid() | refusal().
-type routed() :: route() | {route(), [event()]}.
%% A store with a capacity and bytes.
-type delivery() :: mailbox | {batch, Messages :: pos_integer()} | {store, pos_integer(), pos_integer()}.
-type bucket() :: reference().
-type limits() :: infinity | {Capacity :: pos_integer(), RatePerSecond :: float()}.
%% `undefined' keeps the value.
-type change() :: {Capacity :: pos_integer() | undefined, RatePerSecond :: float() | undefined} | infinity.
-type taken() :: {ok, Left :: non_neg_integer() | infinity} |
                 {rate_limited, WaitNs :: non_neg_integer()} |
                 exceeds_capacity.
-type limiter() :: reference().
-type share() :: {limiter(), Key :: term(), Tokens :: non_neg_integer()} | {bucket(), Tokens :: non_neg_integer()}.
-type message_store() :: reference().
%% A message that is decoded on a dirty scheduler.
-type stored_message() :: reference().
-type circuit_state() :: closed | open | half_open | off.
-type breaker_config() :: {FailureThreshold :: pos_integer(),
                           WindowMs :: pos_integer(),
                           SuccessThreshold :: pos_integer(),
                           TimeoutMs :: non_neg_integer(),
                           ProbeLimit :: pos_integer()}.
-type breaker_change() :: success | failure | open | closed.
%% failure_threshold, success_threshold, timeout, window_size, failure_rate_threshold, probe_limit.
-type named_breaker_config() :: {1..16#ffffffff, 1..16#ffffffff, 1..16#ffffffff, pos_integer(), float(), pos_integer()}.
%% The name of a breaker, and the state that it has entered.
-type transition() :: {term(), closed | open | half_open}.
-type entered() :: non_neg_integer() | refused | {non_neg_integer() | refused, [transition()]}.

-define(LOAD_ERROR, {?MODULE, load_error}).

%% The version of the application. A library of another version refuses to be loaded.
-define(VERSION, "0.1.0").

%%% Loading


%% Without the library the module is loaded all the same, so that callers get an error with the reason and the
%% remedy instead of `undef'. But where the library is already in use, another load of this module
%% fails (the VM does not replace a library in a running node): with stubs in its place everything would stop.
-spec load() -> ok | {error, term()}.
load() ->
    Path = library(),
    case erlang:load_nif(Path, <<?VERSION>>) of
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
                                  reason => reason(Reason),
                                  remedy =>
                                      "compile erlmcp_native on this machine with Rust 1.91 or newer or with a "
                                      "prebuilt library (ERLMCP_NATIVE_PREBUILT), and with OTP 25 or newer: rebar3 "
                                      "clean -a, then rebar3 compile; a release must contain priv/erlmcp_nif.so"
                                 }),
            ok
    end.


%% The library refuses to be loaded only for its version, and where the VM does not register its types.
-spec reason(term()) -> term().
reason({load, Text}) ->
    {load, Text ++ " The library is probably not of version " ?VERSION ", which is that of the modules."};
reason(Reason) ->
    Reason.


%% The `priv' folder beside the `ebin' folder that this module was loaded from: right for a project, a dependency, a
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
%% Without the library. (With it none of these function bodies is ever run.)
-define(DIVERTED, ?DIVERTED(default, server)).
-define(DIVERTED(Registry, Namespace),
        case load_error() =/= none andalso Registry =:= default andalso Namespace =/= connection of
            true -> diverted;
            false -> ?NOT_LOADED
        end).

%%% Registries


%% An empty registry: shards, max_entries, max_id_bytes.
-spec new(pos_integer(), pos_integer(), pos_integer()) -> reference().
new(_Shards, _MaxEntries, _MaxIdBytes) -> ?NOT_LOADED.


%% Makes the default registry with these bounds, unless it exists.
-spec make_default(pos_integer(), pos_integer(), pos_integer()) -> created | exists.
make_default(_Shards, _MaxEntries, _MaxIdBytes) -> ?NOT_LOADED.


-spec limits(registry()) -> {pos_integer(), pos_integer(), pos_integer()}.
limits(_Registry) -> ?NOT_LOADED.


%% Removes all servers and transports and refuses new ones. Returns the sentinels to stop. Dirty.
-spec close(registry()) -> [pid()].
close(_Registry) -> ?NOT_LOADED.


%% Accepts servers and transports again.
-spec open(registry()) -> ok.
open(_Registry) -> ?NOT_LOADED.


%% From now on exactly these kinds of calls with `default' return `diverted': calls that change servers, transports
%% or bindings (`changes'), look them up, or route by them. `ok' if no change is under way that began
%% before; otherwise `busy'.
-spec divert([changes | lookups | routes]) -> ok | busy.
divert(_Whom) -> ?NOT_LOADED.


%%% Look-up


%% A process of this node may have exited already.
-spec whereis_connection(term()) -> pid() | undefined.
whereis_connection(_Id) -> ?NOT_LOADED.


%% The process of a connection; never a process of this node that has exited.
-spec whereis_name(term()) -> pid() | undefined.
whereis_name(_Id) -> ?NOT_LOADED.


%% Never a process of this node that has exited.
-spec whereis(registry(), namespace(), term()) -> pid() | undefined.
whereis(_Registry, _Namespace, _Id) -> ?NOT_LOADED.


-spec find(registry(), namespace(), term()) ->
          {ok, {pid(), term()}} | {error, not_found} | diverted.
find(Registry, Namespace, _Id) -> ?DIVERTED(Registry, Namespace).


%%% Registration


%% `Monitored' is the local process whose exit removes the entry: `Pid' itself, or for a process of
%% another node its sentinel.
-spec register(registry(), namespace(), term(), pid(), pid(), term()) ->
          ok | {already_registered, pid()} | registry_full | registry_closed | diverted.
register(Registry, Namespace, _Id, _Pid, _Monitored, _Config) -> ?DIVERTED(Registry, Namespace).


%% As {@link register/6}, of a connection. Returns the present one if the id is registered.
-spec register_or_find(registry(), term(), pid(), pid(), term()) -> ok | {found, {pid(), term()}} | registry_full.
register_or_find(_Registry, _Id, _Pid, _Monitored, _Config) -> ?NOT_LOADED.


%% As {@link register/6}, of a connection. Takes the place of the present one if the id is registered; returns its
%% process, and the sentinel to stop if it had one.
-spec replace(registry(), term(), pid(), pid(), term()) -> ok | {replaced, pid(), pid() | none} | registry_full.
replace(_Registry, _Id, _Pid, _Monitored, _Config) -> ?NOT_LOADED.


%% Returns the sentinel to stop, if the entry had one.
-spec unregister(registry(), namespace(), term()) -> ok | {ok, pid()} | diverted.
unregister(Registry, Namespace, _Id) -> ?DIVERTED(Registry, Namespace).


%% Removes a connection if the process holds it. Returns the sentinel to stop, if the entry had one.
-spec release(registry(), term(), pid()) -> ok | {ok, pid()} | not_held.
release(_Registry, _Id, _Pid) -> ?NOT_LOADED.


%% Replaces the config of a server or a connection.
-spec update(registry(), namespace(), term(), term()) -> ok | {error, not_found} | diverted.
update(Registry, Namespace, _Id, _Config) -> ?DIVERTED(Registry, Namespace).


%%% Bindings


%% `false' makes a binding like an automatic one, also to a server that does not exist.
-spec bind(registry(), Transport :: term(), Server :: term(), ServerMustExist :: boolean()) ->
          ok | {error, server_not_found | transport_not_found} | diverted.
bind(Registry, _Transport, _Server, _ServerMustExist) -> ?DIVERTED(Registry, transport).


-spec unbind(registry(), Transport :: term()) -> ok | diverted.
unbind(Registry, _Transport) -> ?DIVERTED(Registry, transport).


-spec bound_server(registry(), Transport :: term()) -> {ok, term()} | {error, not_found} | diverted.
bound_server(Registry, _Transport) -> ?DIVERTED(Registry, transport).


%% All bindings: transport, server. Dirty.
-spec bindings(registry()) -> [{term(), term()}] | diverted.
bindings(Registry) -> ?DIVERTED(Registry, transport).


-spec bound_transports(registry(), Server :: term()) -> [pid()].
bound_transports(_Registry, _Server) -> ?NOT_LOADED.


%%% Groups


%% Makes the process a member of a group. `Monitored' is the process whose exit ends that, as in {@link register/6}.
-spec join_group(registry(), Group :: term(), pid(), Monitored :: pid()) ->
          ok | {already_registered, pid()} | registry_full.
join_group(_Registry, _Group, _Pid, _Monitored) -> ?NOT_LOADED.


%% Returns the sentinel to stop, if the membership had one.
-spec leave_group(registry(), Group :: term(), pid()) -> ok | {ok, Sentinel :: pid()} | not_joined.
leave_group(_Registry, _Group, _Pid) -> ?NOT_LOADED.


-spec group_members(registry(), Group :: term()) -> [pid()].
group_members(_Registry, _Group) -> ?NOT_LOADED.


-spec group_count(registry(), Group :: term()) -> non_neg_integer().
group_count(_Registry, _Group) -> ?NOT_LOADED.


-spec pick_member(registry(), Group :: term(), pick()) -> pid() | undefined.
pick_member(_Registry, _Group, _Pick) -> ?NOT_LOADED.


%%% Listing and counting


-spec list(registry(), namespace()) -> [{term(), {pid(), term()}}] | diverted.
list(Registry, Namespace) -> ?DIVERTED(Registry, Namespace).


%% The ids of the connections that belong to any of these references to monitors ({@link process_info/2},
%% `monitored_by'). Other references are ignored.
-spec watched_connections(registry(), [reference()]) -> [term()].
watched_connections(_Registry, _Watches) -> ?NOT_LOADED.


%% As {@link watched_connections/2}, the groups of memberships.
-spec watched_groups(registry(), [reference()]) -> [term()].
watched_groups(_Registry, _Watches) -> ?NOT_LOADED.


%% The entries of a namespace at `Count' places of a shard, and the place after them. An entry keeps its
%% place. Dirty.
-spec page(registry(), namespace(), Shard :: non_neg_integer(), From :: non_neg_integer(), Count :: pos_integer()) ->
          {[{Id :: term(), pid(), Config :: term(), unbound | {bound, Server :: term()}}], non_neg_integer() | none}.
page(_Registry, _Namespace, _Shard, _From, _Count) -> ?NOT_LOADED.


%% The connections of one shard.
-spec list_shard(registry(), non_neg_integer()) -> [{term(), {pid(), term()}}].
list_shard(_Registry, _Shard) -> ?NOT_LOADED.


%% `member': memberships in groups.
-spec count(registry(), namespace() | member) -> non_neg_integer().
count(_Registry, _Namespace) -> ?NOT_LOADED.


%% What one shard has.
-spec count_shard(registry(), non_neg_integer()) ->
          {Servers :: non_neg_integer(),
           Transports :: non_neg_integer(),
           Connections :: non_neg_integer(),
           Memberships :: non_neg_integer()}.
count_shard(_Registry, _Shard) -> ?NOT_LOADED.


%% `erlang:phash2(Id, Shards)'.
-spec shard(registry(), term()) -> non_neg_integer().
shard(_Registry, _Id) -> ?NOT_LOADED.


%% Number of different config terms that are kept, over all registries.
-spec distinct_configs() -> non_neg_integer().
distinct_configs() -> ?NOT_LOADED.


%%% Announcements of connections
%%
%% A registry has one reader, which is sent `{announced, Number}' when there is something to read, once until it has read
%% all.


%% The calling process is the reader from now on. It reads then, whether it is woken or not. Returns the number of the
%% registry.
-spec announcements_attach(registry()) -> Number :: non_neg_integer().
announcements_attach(_Registry) -> ?NOT_LOADED.


%% If the calling process is the reader, there is no reader and no interest any more. Dirty.
-spec announcements_detach(registry()) -> ok.
announcements_detach(_Registry) -> ?NOT_LOADED.


%% Sets or clears an interest. Returns the position of the first announcement that is due to it.
-spec announcements_set(registry(), interest(), boolean()) -> Position :: non_neg_integer().
announcements_set(_Registry, _Interest, _IsOn) -> ?NOT_LOADED.


%% The number of interests that are set.
-spec announcements_interests(registry()) -> non_neg_integer().
announcements_interests(_Registry) -> ?NOT_LOADED.


%% The next announcements, some hundreds at most, those before the position `Until' only; the number of those that
%% were lost behind these; the position of the next one; and whether to read again at once.
-spec announcements_read(registry(), Until :: non_neg_integer() | infinity) ->
          {[announcement()], Lost :: non_neg_integer(), Position :: non_neg_integer(), HasMore :: boolean()}.
announcements_read(_Registry, _Until) -> ?NOT_LOADED.


%%% Routing, in the default registry
%%
%% Without the library nothing is routed here: everything is `diverted'.


%% The process of a connection, if a message may be sent to it; charges the connection's bucket. `stored': the message is to
%% be routed by {@link route_by_lease/2}.
-spec route_connection(term()) -> routed() | stored.
route_connection(_Id) -> ?NOT_LOADED.


%% The process of a server, if a message may be sent to it; charges the transport's bucket.
-spec route_server(Server :: term(), Transport :: term()) -> routed() | diverted.
route_server(_Server, _Transport) -> ?DIVERTED.


%% The process of a transport, if a message may be sent to it; charges no bucket.
-spec route_transport(term()) -> routed() | diverted.
route_transport(_Id) -> ?DIVERTED.


%% As {@link route_server/2} and {@link route_transport/1}, whether routes are diverted or not.
-spec route_server_exclusive(Server :: term(), Transport :: term()) -> routed().
route_server_exclusive(_Server, _Transport) -> ?NOT_LOADED.


-spec route_transport_exclusive(term()) -> routed().
route_transport_exclusive(_Id) -> ?NOT_LOADED.


%% The results of {@link route_connection/1} for the first messages of the list, some hundreds, the rest of the list, and the
%% lists to send for the messages whose result is `batched', after the others. An id that is too long is `undefined' here.
-spec route_batch([{Id :: term(), Message :: term()}]) ->
          {[Routed | {Routed, [event()]}], Rest :: [{term(), term()}], [{pid(), Messages :: [term()]}]}
              when Routed :: route() | stored | batched.
route_batch(_Messages) -> ?NOT_LOADED.


%% Routes a message to a connection that may have a message store, and stores it if it has. The process, if it has none.
-spec route_by_lease(Id :: term(), Message :: term()) -> Result | {Result, [event()]}
              when Result :: route() | ok | message_too_large.
route_by_lease(_Id, _Message) -> ?NOT_LOADED.


%% How messages get to a connection of the calling process. The store, where it gets one.
-spec set_delivery(Id :: term(), delivery()) -> ok | message_store() | not_held | too_many_stores.
set_delivery(_Id, _Delivery) -> ?NOT_LOADED.


-spec delivery(Id :: term()) -> mailbox | {batch, Messages :: pos_integer()} | {store, message_store()} | not_found.
delivery(_Id) -> ?NOT_LOADED.


%% The processes of the transports bound to a server to which a message may be sent, and the reason of refusal for
%% the others, if any was refused.
-spec route_bound(Server :: term()) -> {[pid()], none | refusal(), [event()]} | diverted.
route_bound(_Server) -> ?DIVERTED.


%% As {@link route_server_exclusive/2}.
-spec route_bound_exclusive(Server :: term()) -> {[pid()], none | refusal(), [event()]}.
route_bound_exclusive(_Server) -> ?NOT_LOADED.


%% As {@link route_bound/1}, of the members of a group.
-spec route_group(Group :: term()) -> {[pid()], none | refusal(), [event()]}.
route_group(_Group) -> ?NOT_LOADED.


%% The process of one member of a group, if a message may be sent to it; charges no bucket.
-spec route_member(Group :: term(), pick()) -> routed().
route_member(_Group, _Pick) -> ?NOT_LOADED.


%% What would become of a message to this id, whether routes are diverted or not, and the milliseconds until every layer
%% would admit it. `Payer' is a list of the transport that pays, or empty; a connection pays itself. Leaves no trace of
%% the question.
-spec forecast(namespace(), Id :: term(), Payer :: [term()]) -> {ok | refusal(), WaitMs :: non_neg_integer()}.
forecast(_Namespace, _Id, _Payer) -> ?NOT_LOADED.


%%% Token buckets


-spec bucket_new(limits()) -> bucket().
bucket_new(_Limits) -> ?NOT_LOADED.


-spec is_bucket(term()) -> boolean().
is_bucket(_Term) -> ?NOT_LOADED.


-spec bucket_take(bucket(), non_neg_integer()) -> taken().
bucket_take(_Bucket, _Tokens) -> ?NOT_LOADED.


%% Gives back tokens that were taken.
-spec bucket_refund(bucket(), non_neg_integer()) -> ok.
bucket_refund(_Bucket, _Tokens) -> ?NOT_LOADED.


-spec bucket_state(bucket()) -> {Tokens :: non_neg_integer() | infinity, limits()}.
bucket_state(_Bucket) -> ?NOT_LOADED.


-spec bucket_set_limits(bucket(), change()) -> ok | too_slow_to_fill.
bucket_set_limits(_Bucket, _Limits) -> ?NOT_LOADED.


%% From the bucket of a connection or transport.
-spec entry_take(namespace(), term(), non_neg_integer()) -> taken() | not_found.
entry_take(_Namespace, _Id, _Tokens) -> ?NOT_LOADED.


%% Gives back tokens that were taken.
-spec entry_refund(namespace(), term(), non_neg_integer()) -> ok | not_found.
entry_refund(_Namespace, _Id, _Tokens) -> ?NOT_LOADED.


-spec entry_bucket_state(namespace(), term()) ->
          {Tokens :: non_neg_integer() | infinity, limits()} | not_found.
entry_bucket_state(_Namespace, _Id) -> ?NOT_LOADED.


%% Limits for one connection or transport; `shared' for the limits of all.
-spec entry_set_limits(namespace(), term(), change() | shared) ->
          ok | not_found | too_slow_to_fill.
entry_set_limits(_Namespace, _Id, _Limits) -> ?NOT_LOADED.


%% The limits of all connections and transports that have no limits of their own.
-spec set_shared_limits(limits()) -> ok.
set_shared_limits(_Limits) -> ?NOT_LOADED.


-spec shared_limits() -> limits().
shared_limits() -> ?NOT_LOADED.


%% Whether these are limits that a bucket can have.
-spec are_limits(term()) -> boolean().
are_limits(_Limits) -> ?NOT_LOADED.


%% Whether routes take from buckets.
-spec enforce_limits(boolean()) -> ok.
enforce_limits(_IsOn) -> ?NOT_LOADED.


%% The value that {@link enforce_limits/1} was last called with; `true' at first.
-spec enforces_limits() -> boolean().
enforces_limits() -> ?NOT_LOADED.


%% Whether routes take from any bucket: limits are enforced, and some limits are set.
-spec has_token_buckets() -> boolean().
has_token_buckets() -> ?NOT_LOADED.


%%% Keyed limiters


%% Buckets by key, all with these limits, at most so many at one time.
-spec limiter_new(limits(), MaxKeys :: pos_integer()) -> limiter().
limiter_new(_Limits, _MaxKeys) -> ?NOT_LOADED.


%% `limiter_full' if the key has no bucket and there is no room for one.
-spec limiter_take(limiter(), Key :: term(), non_neg_integer()) -> taken() | limiter_full.
limiter_take(_Limiter, _Key, _Tokens) -> ?NOT_LOADED.


%% Gives back tokens that were taken.
-spec limiter_refund(limiter(), Key :: term(), non_neg_integer()) -> ok.
limiter_refund(_Limiter, _Key, _Tokens) -> ?NOT_LOADED.


%% The bucket of a key; makes none.
-spec limiter_state(limiter(), Key :: term()) -> {Tokens :: non_neg_integer() | infinity, limits()}.
limiter_state(_Limiter, _Key) -> ?NOT_LOADED.


-spec limiter_set_limits(limiter(), change()) -> ok | too_slow_to_fill.
limiter_set_limits(_Limiter, _Limits) -> ?NOT_LOADED.


%% The number of keys with a bucket, the most of them, and the limits.
-spec limiter_info(limiter()) -> {Keys :: non_neg_integer(), MaxKeys :: pos_integer(), limits()}.
limiter_info(_Limiter) -> ?NOT_LOADED.


%% Takes from all of at most 16 buckets or from none. Otherwise the position of the first that refuses, and why.
-spec take_together([share()]) ->
          ok |
          {Position :: pos_integer(), {rate_limited, WaitNs :: non_neg_integer()} | exceeds_capacity | limiter_full}.
take_together(_Shares) -> ?NOT_LOADED.


%%% Message stores


%% An empty store whose consumer is the calling process.
-spec message_store_new(Capacity :: pos_integer(), MaxBytes :: pos_integer()) -> message_store() | too_many_stores.
message_store_new(_Capacity, _MaxBytes) -> ?NOT_LOADED.


%% Adds a message. The first one after a drain that has found the store empty sends the consumer
%% `{erlmcp_message_store, ready, Store}'.
-spec message_store_push(message_store(), Message :: term()) -> ok | full | message_too_large | closed.
message_store_push(_Store, _Message) -> ?NOT_LOADED.


%% Up to `Max' messages, oldest first, and what is left: nothing, maybe more, or a next message that {@link
%% message_store_open/1} decodes.
-spec message_store_drain(message_store(), Max :: non_neg_integer()) ->
          {empty | more | stored_message(), [Message :: term()]} | not_consumer.
message_store_drain(_Store, _Max) -> ?NOT_LOADED.


-spec message_store_open(stored_message()) -> Message :: term().
message_store_open(_Message) -> ?NOT_LOADED.


-spec message_store_info(message_store()) ->
          {Len :: non_neg_integer(),
           Bytes :: non_neg_integer(),
           Capacity :: pos_integer(),
           MaxBytes :: pos_integer(),
           Consumer :: pid(),
           IsClosed :: boolean()}.
message_store_info(_Store) -> ?NOT_LOADED.


%% Of all stores.
-spec message_stores() -> {Stores :: non_neg_integer(), Messages :: non_neg_integer(), Bytes :: non_neg_integer()}.
message_stores() -> ?NOT_LOADED.


%%% Admission control


-spec admission_check(non_neg_integer()) -> boolean().
admission_check(_Shard) -> ?NOT_LOADED.


%% The calling process has received messages from its mailbox (`Delta' is negative), or was sent some by other ways.
-spec admission_adjust(non_neg_integer(), integer()) -> ok.
admission_adjust(_Shard, _Delta) -> ?NOT_LOADED.


-spec admission_set_threshold(non_neg_integer(), pos_integer() | auto | infinity) -> ok.
admission_set_threshold(_Shard, _Threshold) -> ?NOT_LOADED.


%% The threshold that was set; {@link admission_stats/1} has the one in force.
-spec admission_threshold(non_neg_integer()) -> pos_integer() | auto | infinity.
admission_threshold(_Shard) -> ?NOT_LOADED.


-spec admission_stats(non_neg_integer()) ->
          {Depth :: non_neg_integer(),
           Threshold :: pos_integer() | infinity,
           Admitted :: non_neg_integer(),
           IsOverloaded :: boolean(),
           SampleAgeMs :: non_neg_integer() | infinity}.
admission_stats(_Shard) -> ?NOT_LOADED.


%% Whether messages have been admitted since the last sample and that sample is older than ten intervals.
-spec admission_is_unwatched(non_neg_integer()) -> boolean().
admission_is_unwatched(_Shard) -> ?NOT_LOADED.


%% Messages to a shard that were admitted so far, with a threshold or without.
-spec admitted(non_neg_integer()) -> non_neg_integer().
admitted(_Shard) -> ?NOT_LOADED.


%% Messages to a shard that were refused so far. Messages to unregistered ids are counted in an arbitrary shard.
-spec refused(non_neg_integer()) ->
          {NotFound :: non_neg_integer(),
           CircuitOpen :: non_neg_integer(),
           ShardOverloaded :: non_neg_integer(),
           RateLimited :: non_neg_integer(),
           StoreFull :: non_neg_integer()}.
refused(_Shard) -> ?NOT_LOADED.


%% Counts a message to an unregistered id that no native call has looked up. Native look-ups count theirs.
-spec count_not_found() -> ok.
count_not_found() -> ?NOT_LOADED.


-spec set_sample_interval(Ms :: pos_integer()) -> ok.
set_sample_interval(_IntervalMs) -> ?NOT_LOADED.


%% Begins a pass over receivers that have messages waiting: those that callers have requested, or all. Returns the
%% priority for the pass; `busy' while another sampler makes one.
-spec sample_begin(non_neg_integer(), asked | all) -> high | normal | busy.
sample_begin(_Shard, _Pass) -> ?NOT_LOADED.


%% The next receivers to sample; the same receivers until they were reported. At the end of the pass `done', or
%% `due' if another pass is due at once. With `IsLast' only what is urgent comes before the end.
-spec sample_take(non_neg_integer(), IsLast :: boolean()) ->
          {Batch :: non_neg_integer(), [pid()]} | done | due | busy.
sample_take(_Shard, _IsLast) -> ?NOT_LOADED.


%% Reports the lengths of the mailboxes, in the same order; `none' for a process that has not answered. A report
%% of any batch but the last one is ignored, with `false'.
-spec sample_report(non_neg_integer(), Batch :: non_neg_integer(), [non_neg_integer() | none]) -> boolean().
sample_report(_Shard, _Batch, _Lengths) -> ?NOT_LOADED.


%% Instead of a sample: the messages that were admitted since the last sample keep counting. Returns whether samples are
%% due: no pass has ended since.
-spec sample_skip(non_neg_integer()) -> asked | all | none.
sample_skip(_Shard) -> ?NOT_LOADED.


%% No more samples are taken until an event requests one. `false' if there are receivers to sample.
-spec sample_pause(non_neg_integer()) -> boolean().
sample_pause(_Shard) -> ?NOT_LOADED.


%% The number of mailboxes sampled so far, and of receivers that were sent something and not seen empty since.
-spec sample_counts(non_neg_integer()) -> {Looks :: non_neg_integer(), ActiveReceivers :: non_neg_integer()}.
sample_counts(_Shard) -> ?NOT_LOADED.


%% Counts the different processes of this node behind a shard's entries, for a threshold of `auto'. Costs nothing
%% if no entry was added or removed since the last count.
-spec count_receivers(non_neg_integer()) -> ok.
count_receivers(_Shard) -> ?NOT_LOADED.


%% Whether so many entries were added and removed that they should be counted.
-spec is_receiver_count_due(non_neg_integer()) -> boolean().
is_receiver_count_due(_Shard) -> ?NOT_LOADED.


%%% The node's circuit breaker


-spec breaker_state() -> circuit_state().
breaker_state() -> ?NOT_LOADED.


%% `{allowed, half_open}' is a probe, whose outcome must be recorded as a success or a failure.
-spec breaker_allow() -> allowed | {allowed, half_open} | refused.
breaker_allow() -> ?NOT_LOADED.


%% Whether {@link breaker_allow/0} would let a request through now. Takes no probe and changes nothing.
-spec breaker_would_allow() -> boolean().
breaker_would_allow() -> ?NOT_LOADED.


%% Returns the transition that it has caused, as do the next two.
-spec breaker_success() -> none | closed.
breaker_success() -> ?NOT_LOADED.


-spec breaker_failure() -> none | open.
breaker_failure() -> ?NOT_LOADED.


-spec breaker_set(open | closed) -> none | open | closed.
breaker_set(_State) -> ?NOT_LOADED.


-spec breaker_configure(off | breaker_config()) -> ok.
breaker_configure(_Config) -> ?NOT_LOADED.


-spec breaker_stats() -> #{atom() => term()}.
breaker_stats() -> ?NOT_LOADED.


%%% Circuit breakers of targets of the default registry
%%
%% `none': the target has no breaker.


-spec target_breaker_set(namespace(), Id :: term(), breaker_config()) -> ok | too_many_breakers.
target_breaker_set(_Namespace, _Id, _Config) -> ?NOT_LOADED.


-spec target_breaker_remove(namespace(), Id :: term()) -> boolean().
target_breaker_remove(_Namespace, _Id) -> ?NOT_LOADED.


%% The outcome of a message, or the state to set. Returns the state that the breaker has changed to, or `ok'.
-spec target_breaker_change(namespace(), Id :: term(), breaker_change()) -> ok | none | open | closed.
target_breaker_change(_Namespace, _Id, _Change) -> ?NOT_LOADED.


-spec target_breaker_stats(namespace(), Id :: term()) -> none | #{atom() => term()}.
target_breaker_stats(_Namespace, _Id) -> ?NOT_LOADED.


%% On a dirty scheduler.
-spec target_breakers() -> [{namespace(), Id :: term(), circuit_state()}].
target_breakers() -> ?NOT_LOADED.


%%% Named circuit breakers
%%
%% `undefined': there is no such breaker. Without the library there is none.


%% With `true' the breaker is removed when the calling process exits. `Options' is a term that is kept.
-spec named_breaker_register(term(), named_breaker_config(), Options :: term(), boolean()) ->
          ok |
          {already_registered, pid() | none} |
          name_too_long |
          config_too_large |
          too_many_breakers.
named_breaker_register(_Name, _Config, _Options, _IsOwned) -> ?NOT_LOADED.


%% Removes a breaker that has no process, or whose process is the calling one.
-spec named_breaker_remove(term()) -> ok | undefined.
named_breaker_remove(_Name) -> ?NOT_LOADED.


-spec named_breaker_owner(term()) -> pid() | none | undefined.
named_breaker_owner(_Name) -> ?NOT_LOADED.


%% All names. Dirty.
-spec named_breakers() -> [term()].
named_breakers() -> ?NOT_LOADED.


%% Admits the calling process to a call, which gets a number. In the half-open state the call holds a slot for so
%% many milliseconds at most.
-spec named_breaker_enter(term(), timeout()) -> entered() | undefined.
named_breaker_enter(_Breaker, _LimitMs) ->
    case load_error() of
        none -> ?NOT_LOADED;
        _ -> undefined
    end.


%% Ends the call of this number, and those inside it.
-spec named_breaker_leave(non_neg_integer(), success | failure) -> ok | [transition()].
named_breaker_leave(_Call, _Outcome) -> ?NOT_LOADED.


-spec named_breaker_state(term()) -> {closed | open | half_open, [transition()]} | undefined.
named_breaker_state(_Breaker) -> ?NOT_LOADED.


-spec named_breaker_stats(term()) -> {map(), [transition()]} | undefined.
named_breaker_stats(_Breaker) -> ?NOT_LOADED.


-spec named_breaker_force(term(), reset | open | closed | half_open) -> [transition()] | undefined.
named_breaker_force(_Breaker, _State) -> ?NOT_LOADED.
