%%% The registry and distribution: the node becomes distributed, registered processes live on another node, and that
%%% node goes down.
%%%
%%% A node can become distributed only once, so each case runs in a peer node.
-module(distribution_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).
-export([ids_with_pids_and_references_after_net_kernel_start/1,
         configs_after_net_kernel_start/1,
         process_of_another_node/1,
         other_node_goes_down/1,
         frozen_node_is_not_asked/1,
         entries_outlive_the_application_that_registers_them/1]).

%% Called in peer nodes
-export([in_ids_after_distribution/0, in_configs_after_distribution/0, in_other_node/0, in_other_node_down/0, idle/0]).
-export([in_frozen_node/0, in_stopped_application/0]).
%% An application that registers
-export([start/2, stop/1]).

-import(registry_variants, [default_counts/0, settled_configs/1]).
-import(test_terms, [external_pid/2, external_reference/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [ids_with_pids_and_references_after_net_kernel_start,
     configs_after_net_kernel_start,
     process_of_another_node,
     other_node_goes_down,
     frozen_node_is_not_asked,
     entries_outlive_the_application_that_registers_them].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(Case, Config) ->
    registry_variants:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_variants:end_per_testcase(Case, Config).


%%% The node


%% The terms that a process holds stay the same (`=:=') when its node gets a name.
ids_with_pids_and_references_after_net_kernel_start(_Config) ->
    in_peer(in_ids_after_distribution).


in_ids_after_distribution() ->
    Alias = erlang:alias(),
    after_distribution([self(),
                        make_ref(),
                        Alias,
                        {self(), make_ref()},
                        [self() | make_ref()],
                        #{self() => make_ref()},
                        atomics:new(1, []),
                        ets:new(t, []),
                        external_pid(<<"other@host">>, 1),
                        external_reference(<<"other@host">>),
                        {external_pid(<<"other@host">>, 1)},
                        <<"plain">>,
                        {plain, [1.0]}]).


after_distribution(Ids) ->
    R = ?M:new(#{shards => 1}),
    Registered = [ {Id, {self(), {nth, Nth}}} || {Nth, Id} <- lists:enumerate(Ids) ],
    [ ok = ?M:register_connection(R, Id, Pid, Caps) || {Id, {Pid, Caps}} <- Registered ],
    test_support:become_distributed(),
    NotFound = [ {Id, Found} || {Id, Entry} <- Registered,
                                Found <- [?M:lookup_connection(R, Id)],
                                Found =/= {ok, Entry} ],
    Listed = ?M:list_connections(R, 0),
    Shards = [ Id || Id <- Ids, ?M:get_shard_id(default, Id) =/= erlang:phash2(Id, 64) ],
    Again = [ Id || Id <- Ids,
                    ?M:register_connection(R, Id, self(), again) =/= {error, already_registered} ],
    {[], [], [], [], []} =
        {NotFound, Registered -- Listed, Listed -- Registered, Shards, Again},
    ok.


configs_after_net_kernel_start(_Config) -> in_peer(in_configs_after_distribution).


in_configs_after_distribution() ->
    [Port | _] = erlang:ports(),
    R = ?M:new(),
    Configs = [self(),
               {self()},
               #{owner => self()},
               make_ref(),
               {make_ref()},
               Port,
               [Port],
               [self() | fun lists:map/2],
               lists:duplicate(200, self()),
               external_pid(<<"other@host">>, 1),
               #{pid => external_pid(<<"other@host">>, 1)}],
    Named = [ {<<Nth>>, Caps} || {Nth, Caps} <- lists:enumerate(Configs) ],
    [ ok = ?M:register_connection(R, Id, self(), Caps) || {Id, Caps} <- Named ],
    test_support:become_distributed(),
    [] = [ {Caps, Found} || {Id, Caps} <- Named,
                            Found <- [?M:lookup_connection(R, Id)],
                            Found =/= {ok, {self(), Caps}} ],
    ok.


process_of_another_node(_Config) -> in_peer(in_other_node).


in_other_node() ->
    test_support:become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    Pid = spawn(Node, ?MODULE, idle, []),
    pong = net_adm:ping(Node),
    Processes = erlang:system_info(process_count),
    Configs = erlmcp_nif:distinct_configs(),
    Caps = #{remote => Pid, list => lists:seq(1, 100)},
    [ begin
          ok = apply(?M, register_connection, Arguments ++ [<<"remote">>, Pid, Caps]),
          {error, already_registered} =
              apply(?M, register_connection, Arguments ++ [<<"remote">>, self(), other]),
          {ok, {Pid, Caps}} = apply(?M, lookup_connection, Arguments ++ [<<"remote">>]),
          Pid = apply(?M, whereis_connection, Arguments ++ [<<"remote">>]),
          [{<<"remote">>, {Pid, Caps}}] =
              lists:append([ apply(?M, list_connections, Arguments ++ [Shard])
                             || Shard <- lists:seq(0, 63) ]),
          Pid = apply(?M, send, Arguments ++ [<<"remote">>, {self(), ping}]),
          receive {Pid, pong} -> ok end,
          {error, not_held} = apply(?M, release_connection, Arguments ++ [<<"remote">>, self()]),
          ok = apply(?M, release_connection, Arguments ++ [<<"remote">>, Pid]),
          {registered, {Pid, Caps}} = apply(?M, register_or_find_connection, Arguments ++ [<<"remote">>, Pid, Caps]),
          {found, {Pid, Caps}} = apply(?M, register_or_find_connection, Arguments ++ [<<"remote">>, Pid, none]),
          {found, {Pid, Caps}} = apply(?M, register_or_find_connection, Arguments ++ [<<"remote">>, self(), none]),
          {ok, Pid} = apply(?M, replace_connection, Arguments ++ [<<"remote">>, self(), none]),
          true = {ok, self()} =:= apply(?M, replace_connection, Arguments ++ [<<"remote">>, Pid, Caps]),
          {ok, Pid} = apply(?M, replace_connection, Arguments ++ [<<"remote">>, Pid, Caps]),
          {ok, {Pid, Caps}} = apply(?M, lookup_connection, Arguments ++ [<<"remote">>]),
          ok = apply(?M, unregister_connection, Arguments ++ [<<"remote">>]),
          {error, not_found} = apply(?M, lookup_connection, Arguments ++ [<<"remote">>])
      end || R <- [?M:new()], Arguments <- [[], [default], [R]], _ <- lists:seq(1, 3) ],
    %% The processes that watched it have exited.
    test_support:await(fun() -> erlang:system_info(process_count) =< Processes + 1 end),
    %% The process exits after its registration, or has exited before it.
    ok = ?M:register_connection(<<"ends">>, Pid, none),
    Other = spawn(Node, ?MODULE, idle, []),
    ok = ?M:register_connection(<<"stays">>, Other, none),
    Pid ! stop,
    test_support:await(fun() -> ?M:lookup_connection(<<"ends">>) =:= {error, not_found} end),
    ok = ?M:register_connection(<<"ended">>, Pid, none),
    test_support:await(fun() -> ?M:lookup_connection(<<"ended">>) =:= {error, not_found} end),
    Other = ?M:whereis_connection(<<"stays">>),
    ok = ?M:register_connection(<<"ends">>, self(), none),
    1 = length([ x || _ <- [?M:whereis_connection(<<"ends">>)] ]),
    ok = ?M:unregister_connection(<<"ends">>),
    %% Loading new code of the watching processes purges the old code and removes no entry.
    [ begin
          {module, erlmcp_registry_native} = code:load_file(erlmcp_registry_native),
          true = code:soft_purge(erlmcp_registry_native)
      end || _ <- [1, 2, 3] ],
    {ok, {Other, none}} = ?M:lookup_connection(<<"stays">>),
    Other ! stop,
    test_support:await(fun() -> ?M:count() =:= 0 end),
    test_support:await(fun() -> settled_configs(default) =< Configs + 1 end),
    peer:stop(Peer).


other_node_goes_down(_Config) -> in_peer(in_other_node_down).


in_other_node_down() ->
    test_support:become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    pong = net_adm:ping(Node),
    R = ?M:new(),
    {ok, _} = erlmcp_registry:start_link(),
    Processes = erlang:system_info(process_count),
    Pids = [ spawn(Node, ?MODULE, idle, []) || _ <- lists:seq(1, 500) ],
    [ begin
          ok = ?M:register_connection(<<N:32>>, Pid, {caps, N}),
          ok = ?M:register_connection(R, <<N:32>>, Pid, {caps, N}),
          ok = erlmcp_registry:register_server(<<N:32>>, Pid, {caps, N}),
          ok = erlmcp_registry:register_transport(<<N:32>>, Pid, #{server_id => <<N:32>>})
      end || {N, Pid} <- lists:enumerate(Pids) ],
    {500, 500} = {?M:count(), ?M:count(R)},
    {ok, {P1, {caps, 1}}} = erlmcp_registry:find_server(<<1:32>>),
    Node = node(P1),
    peer:stop(Peer),
    test_support:await(fun() -> {?M:count(), ?M:count(R)} =:= {0, 0} end),
    test_support:await(fun() -> default_counts() =:= [0, 0, 0, 0] end),
    [] = erlmcp_nif:bindings(default),
    {error, not_found} = erlmcp_registry:find_server(<<1:32>>),
    [ ok = ?M:register_connection(<<N:32>>, self(), anew) || N <- lists:seq(1, 500) ],
    test_support:await(fun() -> erlang:system_info(process_count) =< Processes + 1 end),
    500 = ?M:count(),
    %% A process on an unreachable node counts as exited.
    ok = ?M:register_connection(R, <<"gone">>, hd(Pids), none),
    test_support:await(fun() -> ?M:lookup_connection(R, <<"gone">>) =:= {error, not_found} end),
    ok.


%% No caller waits for a node that does not answer.
frozen_node_is_not_asked(_Config) -> in_peer(in_frozen_node).


in_frozen_node() ->
    test_support:become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    Pid = spawn(Node, ?MODULE, idle, []),
    R = ?M:new(#{max_entries => 1}),
    yes = ?M:register_name(R, remote, Pid),
    OsPid = erpc:call(Node, os, getpid, []),
    ok = test_support:freeze(OsPid),
    {Us, _} = timer:tc(fun() ->
                               Pid = ?M:whereis_name(R, remote),
                               no = ?M:register_name(R, remote, self()),
                               {error, registry_full} = ?M:register_connection(R, other, self(), none),
                               Pid = ?M:whereis_name(R, remote)
                       end),
    ok = test_support:thaw(OsPid),
    peer:stop(Peer),
    test_support:await(fun() -> ?M:whereis_name(R, remote) =:= undefined end),
    yes = ?M:register_name(R, remote, self()),
    %% This is less than the tick after which the node would count as down.
    true = Us < 5_000_000,
    ok.


%% Stopping an application kills all processes whose group leader is the application master.
entries_outlive_the_application_that_registers_them(_Config) -> in_peer(in_stopped_application).


in_stopped_application() ->
    test_support:become_distributed(),
    {ok, Peer, Node} = test_support:start_peer(?MODULE, #{name => peer:random_name()}),
    Pid = spawn(Node, ?MODULE, idle, []),
    R = ?M:new(),
    {ok, _} = erlmcp_registry:start_link(),
    ok = application:load({application,
                           gateway,
                           [{vsn, "1"},
                            {modules, []},
                            {registered, []},
                            {applications, [kernel, stdlib]},
                            {mod, {?MODULE, {R, Pid, self()}}}]}),
    ok = application:start(gateway),
    {1, 1} = {?M:count(), ?M:count(R)},
    ok = application:stop(gateway),
    Pid = ?M:whereis_name(connection),
    Pid = ?M:whereis_name(R, connection),
    {ok, {Pid, #{}}} = erlmcp_registry:find_server(server),
    {ok, {Pid, #{server_id := server}}} = erlmcp_registry:find_transport(transport),
    {ok, server} = erlmcp_registry:get_server_for_transport(transport),
    Self = self(),
    {ok, {_, Pid, #{}}} = erlmcp_registry:find_server(global, remote),
    {ok, {_, Self, #{}}} = erlmcp_registry:find_server(global, local),
    Pid ! stop,
    test_support:await(fun() -> {?M:count(), ?M:count(R)} =:= {0, 0} end),
    test_support:await(fun() -> default_counts() =:= [0, 0, 0, 0] end),
    peer:stop(Peer),
    ok.


start(_Type, {R, Pid, Parent}) ->
    ok = ?M:register_connection(connection, Pid, none),
    ok = ?M:register_connection(R, connection, Pid, none),
    ok = erlmcp_registry:register_server(server, Pid, #{}),
    ok = erlmcp_registry:register_transport(transport, Pid, #{server_id => server}),
    ok = erlmcp_registry:register_server(global, remote, Pid, #{}),
    ok = erlmcp_registry:register_server(global, local, Parent, #{}),
    {ok, spawn_link(?MODULE, idle, [])}.


stop(_State) -> ok.


%% Runs until it receives `stop'.
idle() ->
    receive
        {From, ping} -> From ! {self(), pong}, idle();
        {mcp_message, _, {From, ping}} -> From ! {self(), pong}, idle();
        crash -> exit(crashed);
        stop -> ok
    end.


%%% Peer nodes


in_peer(Function) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, Function, [], #{timeout_ms => 120_000})).
