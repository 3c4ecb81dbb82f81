%%% Connected nodes that do not answer, because their operating system processes are stopped by SIGSTOP. The
%%% scope `global' waits for all of them together no longer than `global_timeout_ms'. Routes to processes on
%%% them do not wait.
-module(silent_nodes_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/0]).
-export([init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([find_is_bounded/1,
         list_returns_what_is_known/1,
         registration_is_bounded/1,
         removal_needs_the_holder_only/1,
         removal_is_bounded/1,
         exit_is_known_whoever_is_silent/1,
         answers_to_a_silent_node_hold_up_nobody/1,
         routes_do_not_suspend/1,
         casts_do_not_suspend_the_process/1,
         sends_do_not_connect/1]).

%% Called in peer nodes
-export([register_all/3, idle/0, others/1]).

-define(BOUND_MS, 1_000).
%% Added to the bound, this limits a call that waits for one bound. Two bounds would take longer.
-define(SLACK_MS, 900).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [{group, erlmcp_registry},
     routes_do_not_suspend,
     casts_do_not_suspend_the_process,
     sends_do_not_connect].


groups() ->
    [ {Module,
       [],
       [find_is_bounded,
        list_returns_what_is_known,
        registration_is_bounded,
        removal_needs_the_holder_only,
        removal_is_bounded,
        exit_is_known_whoever_is_silent,
        answers_to_a_silent_node_hold_up_nobody]}
      || Module <- [erlmcp_registry] ].


init_per_suite(Config) ->
    false = is_alive(),
    _ = os:cmd("epmd -daemon"),
    {ok, _} = net_kernel:start([list_to_atom("silent_nodes_" ++ os:getpid()), shortnames]),
    Config.


end_per_suite(_Config) ->
    net_kernel:stop().


init_per_group(Module, Config) ->
    [{module, Module} | Config].


end_per_group(_Module, _Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    ok = application:set_env(erlmcp_native, global_timeout_ms, ?BOUND_MS),
    Peers = [ start_peer() || _ <- [1, 2] ],
    [ ok = test_support:await(fun() -> length(erpc:call(Node, erlang, nodes, [])) =:= length(Peers) end)
      || {_, Node, _} <- Peers ],
    ok = global:sync(),
    [ ok = erpc:call(Node, global, sync, []) || {_, Node, _} <- Peers ],
    [{peers, Peers} | Config].


end_per_testcase(_Case, Config) ->
    ok = application:unset_env(erlmcp_native, global_timeout_ms),
    Peers = proplists:get_value(peers, Config),
    [ ok = thaw(Peer) || Peer <- Peers ],
    [ ok = peer:stop(Peer) || {Peer, _, _} <- Peers ],
    test_support:await(fun() -> global:registered_names() =:= [] andalso nodes() =:= [] end).


%%% Reads


find_is_bounded(Config) ->
    Module = module(Config),
    [{_, A, _} = Silent, {_, B, _}] = peers(Config),
    [PidA] = register_all(A, Module, [a]),
    [PidB] = register_all(B, Module, [b]),
    ?assertEqual({ok, {A, PidA, #{}}}, Module:find_server(global, a)),
    %% An entry that node B holds for a process on the silent node.
    ok = erpc:call(B, Module, register_transport, [global, held_by_b, PidA, #{}]),
    Running = running([A, B]),
    ok = freeze(Silent),
    ?assertEqual({error, timeout}, bounded(fun() -> Module:find_server(global, a) end)),
    ?assertEqual({ok, {B, PidB, #{}}}, quick(fun() -> Module:find_server(global, b) end)),
    ?assertEqual({error, not_found}, quick(fun() -> Module:find_server(global, nobody) end)),
    ?assertEqual({ok, {A, PidA, #{}}}, quick(fun() -> Module:find_transport(global, held_by_b) end)),
    ok = thaw(Silent),
    ?assertEqual({ok, {A, PidA, #{}}}, Module:find_server(global, a)),
    ?assertEqual(none, stray(Running)).


%% Two silent nodes with many entries take no longer than one with one entry.
list_returns_what_is_known(Config) ->
    Module = module(Config),
    [{_, A, _}, {_, B, _}] = Peers = peers(Config),
    Ids = fun(Node) -> [ {Node, N} || N <- lists:seq(1, 50) ] end,
    _ = [ register_all(Node, Module, Ids(Node)) || Node <- [A, B] ],
    ok = Module:register_server(global, here, self(), #{}),
    Complete = lists:sort(Module:list_servers(global)),
    ?assertEqual(101, length(Complete)),
    Running = running([A, B]),
    [ ok = freeze(Peer) || Peer <- Peers ],
    Known = bounded(fun() -> Module:list_servers(global) end),
    ?assertEqual(lists:sort([{here, {node(), self(), #{}}} | [ {Id, {error, timeout}} || Id <- Ids(A) ++ Ids(B) ]]),
                 lists:sort(Known)),
    ?assertEqual([], quick(fun() -> Module:list_transports(global) end)),
    [ ok = thaw(Peer) || Peer <- Peers ],
    ?assertEqual(Complete, lists:sort(Module:list_servers(global))),
    ok = Module:unregister_server(global, here),
    ?assertEqual(none, stray(Running)).


%%% Changes


%% A registration is cluster-wide. One that timed out leaves nothing behind.
registration_is_bounded(Config) ->
    Module = module(Config),
    [{_, A, _} = Silent, {_, B, _}] = peers(Config),
    _ = register_all(A, Module, [a]),
    ok = freeze(Silent),
    ?assertEqual({error, timeout}, bounded(fun() -> Module:register_server(global, new, self(), #{}) end)),
    ?assertEqual({error, timeout}, bounded(fun() -> Module:register_server(global, a, self(), #{}) end)),
    ok = thaw(Silent),
    ok = test_support:await(fun() -> Module:register_server(global, new, self(), #{n => 1}) =:= ok end),
    [ ?assertEqual({ok, {node(), self(), #{n => 1}}}, erpc:call(Node, Module, find_server, [global, new]))
      || Node <- [A, B] ],
    ok = Module:unregister_server(global, new).


removal_needs_the_holder_only(Config) ->
    Module = module(Config),
    [{_, A, _} = Silent, {_, B, _}] = peers(Config),
    _ = register_all(A, Module, [a]),
    _ = register_all(B, Module, [b]),
    ok = Module:register_server(global, here, self(), #{}),
    ok = freeze(Silent),
    [ begin
          ?assertEqual(ok, quick(fun() -> Module:unregister_server(global, Id) end)),
          ?assertEqual({error, not_found}, quick(fun() -> Module:find_server(global, Id) end))
      end || Id <- [here, b, nobody] ],
    ok = thaw(Silent),
    [ ok = test_support:await(fun() -> Module:register_server(global, Id, self(), #{}) =:= ok end) || Id <- [here, b] ],
    [ ok = Module:unregister_server(global, Id) || Id <- [here, b] ].


removal_is_bounded(Config) ->
    Module = module(Config),
    [{_, A, _} = Silent, _] = peers(Config),
    _ = register_all(A, Module, [a]),
    ok = freeze(Silent),
    ?assertEqual({error, timeout}, bounded(fun() -> Module:unregister_server(global, a) end)),
    ok = thaw(Silent),
    %% When the node runs again, the removal is completed.
    ok = test_support:await(fun() -> Module:find_server(global, a) =:= {error, not_found} end).


exit_is_known_whoever_is_silent(Config) ->
    Module = module(Config),
    [{_, A, _} = Silent, {_, B, _}] = peers(Config),
    _ = register_all(A, Module, [a]),
    [Pid] = register_all(B, Module, [b]),
    ok = freeze(Silent),
    true = exit(Pid, kill),
    ok = test_support:await(fun() -> quick(fun() -> Module:find_server(global, b) end) =:= {error, not_found} end).


%% Sending to a node that does not read suspends the sender once the buffers are full.
answers_to_a_silent_node_hold_up_nobody(Config) ->
    Module = module(Config),
    [{_, A, _} = Silent, {_, B, _}] = peers(Config),
    Large = #{large => binary:copy(<<1>>, 1_000_000)},
    [Pid] = [erpc:call(B, erlang, spawn, [?MODULE, idle, []])],
    ok = erpc:call(B, Module, register_server, [global, b, Pid, Large]),
    %% The same message that find_server/2 sends on the silent node.
    Alias = erpc:call(A, erlang, alias, []),
    Holder = global:whereis_name({erlmcp_registry, server, b}),
    ok = freeze(Silent),
    [ Holder ! {erlmcp_registry_global, read, Alias} || _ <- lists:seq(1, 50) ],
    [ ?assertEqual({ok, {B, Pid, Large}}, quick(fun() -> Module:find_server(global, b) end)) || _ <- lists:seq(1, 20) ].


%%% Routes


%% Each route to a process on a silent node returns at once: `ok' until the buffers are full, then `busy'.
routes_do_not_suspend(Config) ->
    [{_, A, _} = Silent, _] = peers(Config),
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = erlmcp_native:set(backpressure, off),
    [Server, Transport, Connection] = [ erpc:call(A, erlang, spawn, [?MODULE, idle, []]) || _ <- [1, 2, 3] ],
    ok = erlmcp_registry:register_server(s, Server, #{}),
    ok = erlmcp_registry:register_transport(t, Transport, #{server_id => s}),
    ok = erlmcp_shard_registry:register_connection(c, Connection, none),
    ok = freeze(Silent),
    Message = binary:copy(<<1>>, 1_000_000),
    Routes = [fun() -> erlmcp_registry:route_to_server(s, t, Message) end,
              fun() -> erlmcp_registry:route_to_transport(t, s, Message) end,
              fun() -> erlmcp_registry:route_to_transport(broadcast, s, Message) end,
              fun() -> erlmcp_registry:route_message(t, Message) end,
              fun() -> erlmcp_registry:route_message({server, s}, Message) end,
              fun() -> erlmcp_registry:route_message({transport, t}, Message) end,
              fun() -> erlmcp_shard_manager:route_message(c, Message) end,
              fun() -> hd(erlmcp_shard_manager:route_batch([{c, Message}])) end],
    %% One route after the other: between two of them, buffered data may move into the socket's buffer.
    [ ok = until_busy(Route) || Route <- Routes ],
    ok = thaw(Silent),
    [ ok = test_support:await(fun() -> Route() =:= ok end) || Route <- Routes ],
    ok = erlmcp_native:set(backpressure, on),
    ok = erlmcp_shard_registry:unregister_connection(c),
    ok = gen_server:stop(Registry).


until_busy(Route) ->
    case quick(Route) of
        ok -> until_busy(Route);
        {error, busy} -> ok
    end.


casts_do_not_suspend_the_process(Config) ->
    [{_, A, _} = Silent, _] = peers(Config),
    Pid = erpc:call(A, erlang, spawn, [?MODULE, idle, []]),
    Message = binary:copy(<<1>>, 1_000_000),
    Registries = [ begin
                       ok = erlmcp_rollout:set(Mode),
                       {ok, Registry} = gen_server:start(erlmcp_registry, [], []),
                       ok = gen_server:call(Registry, {register_server, s, Pid, #{}}),
                       ok = gen_server:call(Registry, {register_transport, t, Pid, #{server_id => s}}),
                       Registry
                   end || Mode <- [current, '100x'] ],
    ok = freeze(Silent),
    [ begin
          [ gen_server:cast(Registry, Cast)
            || Cast <- [{route_to_server, s, t, Message},
                        {route_to_transport, t, s, Message},
                        {route_to_transport, broadcast, s, Message}],
               _ <- lists:seq(1, 20) ],
          Registry ! {transport_data, t, Message},
          ?assertMatch({ok, {Pid, _}}, quick(fun() -> gen_server:call(Registry, {find_server, s}) end))
      end || Registry <- Registries ],
    ok = thaw(Silent),
    [ ok = gen_server:stop(Registry) || Registry <- Registries ].


sends_do_not_connect(_Config) ->
    Before = nodes(connected),
    Pid = test_terms:external_pid(list_to_binary("nobody@" ++ tl(lists:dropwhile(fun(C) -> C =/= $@ end, atom_to_list(node())))), 1),
    ?assertEqual({error, noconnection}, quick(fun() -> erlmcp_delivery:send(Pid, hello) end)),
    ?assertEqual(Before, nodes(connected)).


%%% Nodes


%% A peer with the process id of its operating system process.
start_peer() ->
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    ok = peer:call(Peer, application, set_env, [erlmcp_native, global_timeout_ms, 60_000]),
    pong = net_adm:ping(Node),
    {Peer, Node, peer:call(Peer, os, getpid, [])}.


freeze({_Peer, _Node, OsPid}) -> test_support:freeze(OsPid).


thaw({_Peer, _Node, OsPid}) -> test_support:thaw(OsPid).


%% Registers a process on the node under each id, from that node.
register_all(Node, Module, Ids) when Node =/= node() ->
    erpc:call(Node, ?MODULE, register_all, [Node, Module, Ids]);
register_all(_Node, Module, Ids) ->
    [ begin
          Pid = spawn(?MODULE, idle, []),
          ok = Module:register_server(global, Id, Pid, #{}),
          Pid
      end || Id <- Ids ].


idle() ->
    receive after infinity -> ok end.


%%% Times


%% The result of a call that waits for one bound but not for two.
bounded(Fun) ->
    {Us, Result} = timer:tc(Fun),
    ?assert(Us >= ?BOUND_MS * 1000, Us),
    ?assert(Us < (?BOUND_MS + ?SLACK_MS) * 1000, Us),
    Result.


%% The result of a call that does not wait for the bound.
quick(Fun) ->
    {Us, Result} = timer:tc(Fun),
    ?assert(Us < ?BOUND_MS * 1000, Us),
    Result.


%% The processes on these nodes.
running(Nodes) ->
    [ {Node, erpc:call(Node, erlang, processes, [])} || Node <- Nodes ].


%% A message that arrived for this process, once all processes that were started on the nodes since then have
%% exited.
stray(Running) ->
    [ test_support:await_value([], fun() -> erpc:call(Node, ?MODULE, others, [Pids]) end) || {Node, Pids} <- Running ],
    receive Message -> Message after 0 -> none end.


others(Pids) ->
    [ process_info(Pid) || Pid <- processes() -- [self() | Pids] ].


module(Config) ->
    proplists:get_value(module, Config).


peers(Config) ->
    proplists:get_value(peers, Config).
