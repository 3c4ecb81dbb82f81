%%% @private
%%% The functions of the native library: stubs, and loading it.
%%%
%%% A `Registry' is the atom `default' or a reference from {@link new/3}; a namespace is `server',
%%% `transport' or `connection'. Every function raises `badarg' for arguments of the wrong kind and
%%% for ids that take more than the registry's `max_id_bytes', and changes nothing then.
%%%
%%% Functions that may have much to do return `dirty' instead of working for long on a normal
%%% scheduler; the caller then calls the one named `..._dirty'. {@link erlmcp_native_registry} does
%%% that for all of them.
%%%
%%% Without the library every function raises `{nif_not_loaded, Info}', where `Info' names path,
%%% target, NIF version, reason and remedy.
-module(erlmcp_nif).

%% Registries
-export([new/3, make_default/3, limits/1, close/1, open/1]).
%% Look-up
-export([whereis_connection/1, whereis_server/1, whereis_transport/1, whereis/3]).
-export([find/3, find_dirty/3]).
%% Registration
-export([register/6, register_dirty/6, unregister/3, update_server/3, update_server_dirty/3]).
%% Bindings
-export([bind/4, unbind/2, bound_server/2, bindings/1]).
-export([bound_transports/2, bound_transports_dirty/2]).
%% Listing and counting
-export([list/2, list_dirty/2, list_shard/2, list_shard_dirty/2]).
-export([count/2, count_shard/2, shard/2, distinct_configs/0]).
%% Loading
-export([load_error/0]).

-export_type([registry/0, namespace/0, load_error/0]).

-on_load(load/0).

-nifs([new/3,
       make_default/3,
       limits/1,
       close/1,
       open/1,
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
       count/2,
       count_shard/2,
       shard/2,
       distinct_configs/0]).

-type registry() :: default | reference().
-type namespace() :: server | transport | connection.
-type load_error() :: #{
                        path := file:filename(),
                        target := string(),
                        nif_version := string(),
                        reason := term(),
                        remedy := string()
                       }.

-define(LOAD_ERROR, {?MODULE, load_error}).

%%% Loading


%% Never fails, so that callers get an error that says why and what to do instead of `undef'.
-spec load() -> ok.
load() ->
    Path = library(),
    case erlang:load_nif(Path, []) of
        ok ->
            _ = persistent_term:erase(?LOAD_ERROR),
            ok;
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
          ok | {already_registered, pid()} | registry_full | registry_closed | dirty.
register(_Registry, _Namespace, _Id, _Pid, _Monitored, _Config) -> ?NOT_LOADED.


-spec register_dirty(registry(), namespace(), term(), pid(), pid(), term()) ->
          ok | {already_registered, pid()} | registry_full | registry_closed.
register_dirty(_Registry, _Namespace, _Id, _Pid, _Monitored, _Config) -> ?NOT_LOADED.


%% Returns the sentinel to end, if the entry had one.
-spec unregister(registry(), namespace(), term()) -> ok | {ok, pid()}.
unregister(_Registry, _Namespace, _Id) -> ?NOT_LOADED.


-spec update_server(registry(), term(), term()) -> ok | {error, not_found} | dirty.
update_server(_Registry, _Id, _Config) -> ?NOT_LOADED.


-spec update_server_dirty(registry(), term(), term()) -> ok | {error, not_found}.
update_server_dirty(_Registry, _Id, _Config) -> ?NOT_LOADED.


%%% Bindings


%% `false' makes a binding like an automatic one, also to a server that does not exist.
-spec bind(registry(), Transport :: term(), Server :: term(), ServerMustExist :: boolean()) ->
          ok | {error, server_not_found | transport_not_found}.
bind(_Registry, _Transport, _Server, _ServerMustExist) -> ?NOT_LOADED.


-spec unbind(registry(), Transport :: term()) -> ok.
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


%% `erlang:phash2(Id, Shards)'.
-spec shard(registry(), term()) -> non_neg_integer().
shard(_Registry, _Id) -> ?NOT_LOADED.


%% Number of different config terms that are kept, over all registries.
-spec distinct_configs() -> non_neg_integer().
distinct_configs() -> ?NOT_LOADED.
