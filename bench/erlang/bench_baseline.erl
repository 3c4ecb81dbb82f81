%%% The baseline of all comparisons: the registry as one gen_server, without native code. It is erlmcp_registry
%%% in the mode `current' and in its fastest form: an instance that keeps no copy of its registrations for a
%%% successor, with an off-heap mailbox, driven by raw requests.
-module(bench_baseline).

-export([start_link/0]).
-export([register_server/3, register_transport/3, unregister_server/1, find_server/1, list_servers/0, route_to_server/3]).


%% Must be called before the registry with its own name is started.
-spec start_link() -> ok.
start_link() ->
    ok = erlmcp_rollout:set(current),
    {ok, _} = gen_server:start_link({local, ?MODULE}, erlmcp_registry, [], []),
    erlmcp_rollout:set('100x').


-spec register_server(term(), pid(), term()) -> ok | {error, already_registered}.
register_server(Id, Pid, Config) ->
    gen_server:call(?MODULE, {register_server, Id, Pid, Config}, infinity).


-spec register_transport(term(), pid(), term()) -> ok | {error, already_registered}.
register_transport(Id, Pid, Config) ->
    gen_server:call(?MODULE, {register_transport, Id, Pid, Config}, infinity).


-spec unregister_server(term()) -> ok.
unregister_server(Id) ->
    gen_server:call(?MODULE, {unregister_server, Id}).


-spec find_server(term()) -> {ok, {pid(), term()}} | {error, not_found}.
find_server(Id) ->
    gen_server:call(?MODULE, {find_server, Id}).


-spec list_servers() -> [{term(), {pid(), term()}}].
list_servers() ->
    gen_server:call(?MODULE, list_servers).


-spec route_to_server(term(), term(), term()) -> ok.
route_to_server(Id, Transport, Message) ->
    gen_server:cast(?MODULE, {route_to_server, Id, Transport, Message}).
