%%% The node stops in time, whatever an application asks of erlmcp_native meanwhile.
%%%
%%% The contract: no public function waits for the application controller, which does not answer while it stops
%%% an application. A host application calls these functions in its `prep_stop' and its `stop', in a peer node
%%% that `init:stop/0' stops.
-module(shutdown_SUITE).

-behaviour(application).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([node_stops_while_an_application_asks/1,
         node_stops_without_the_application/1,
         application_stops_while_another_one_asks/1,
         version_without_the_application/1]).
%% In the other node
-export([run_host/2, stop_host/0, version/0]).
%% The host application
-export([start/2, prep_stop/1, stop/1]).

-define(HOST,        shutdown_host).
-define(DEADLINE_MS, 60_000).
%% Far less than the number of calls times the timeout of one call (5 s).
-define(STOPPED_MS, 20_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [node_stops_while_an_application_asks,
     node_stops_without_the_application,
     application_stops_while_another_one_asks,
     version_without_the_application].


node_stops_while_an_application_asks(Config) ->
    Peer = start_peer(),
    File = results_file(Config),
    ok = peer:call(Peer, ?MODULE, run_host, [File, [erlmcp_native]], ?DEADLINE_MS),
    stops(Peer),
    ?assertEqual({[], []}, {failed(prep_stop, File), failed(stop, File)}).


%% A host that does not list the application uses the library.
node_stops_without_the_application(Config) ->
    Peer = start_peer(),
    File = results_file(Config),
    ok = peer:call(Peer, ?MODULE, run_host, [File, []], ?DEADLINE_MS),
    stops(Peer),
    ?assertEqual({[], []}, {failed(prep_stop, File), failed(stop, File)}).


%% One application stops and not the node. This is the other case in which the controller does not answer.
application_stops_while_another_one_asks(Config) ->
    Peer = start_peer(),
    File = results_file(Config),
    ok = peer:call(Peer, ?MODULE, run_host, [File, [erlmcp_native]], ?DEADLINE_MS),
    Ms = peer:call(Peer, ?MODULE, stop_host, [], ?DEADLINE_MS),
    peer:stop(Peer),
    ?assertEqual({[], []}, {failed(prep_stop, File), failed(stop, File)}),
    ?assert(Ms < ?STOPPED_MS, Ms).


version_without_the_application(_Config) ->
    {ok, Version} = test_support:in_peer(?MODULE, version),
    ok = application_loaded(),
    ?assertEqual(application:get_key(erlmcp_native, vsn), {ok, Version}).


application_loaded() ->
    case application:load(erlmcp_native) of
        ok -> ok;
        {error, {already_loaded, erlmcp_native}} -> ok
    end.


stops(Peer) ->
    Monitor = monitor(process, Peer),
    Began = now_ms(),
    ok = peer:call(Peer, init, stop, [], ?DEADLINE_MS),
    receive {'DOWN', Monitor, process, Peer, _} -> ok after ?DEADLINE_MS -> error(node_does_not_stop) end,
    Ms = now_ms() - Began,
    ct:log("stopped in ~b ms", [Ms]),
    ?assert(Ms < ?STOPPED_MS, Ms).


%% The peer is unlinked, because the case waits for its exit.
start_peer() ->
    {ok, Peer, _} = test_support:start_peer(?MODULE, #{}),
    true = unlink(Peer),
    Peer.


results_file(Config) ->
    filename:join(proplists:get_value(priv_dir, Config), "results_" ++ integer_to_list(erlang:unique_integer([positive]))).


%% The calls that did not return.
failed(Callback, File) ->
    {ok, Results} = file:consult(File ++ "." ++ atom_to_list(Callback)),
    ?assert(length(Results) > 15, Results),
    [ Result || {_Name, Outcome} = Result <- Results, Outcome =/= returned ].


%%% In the other node


version() ->
    false = lists:keymember(erlmcp_native, 1, application:loaded_applications()),
    #{version := Version} = erlmcp_native:info(),
    {ok, Version}.


run_host(File, Applications) ->
    ok = application:load({application,
                           ?HOST,
                           [{vsn, "1"},
                            {modules, [?MODULE]},
                            {registered, []},
                            {applications, [kernel, stdlib | Applications]},
                            {env, [{file, File}]},
                            {mod, {?MODULE, []}}]}),
    {ok, _} = application:ensure_all_started(?HOST),
    ok.


%% The duration in milliseconds.
stop_host() ->
    Began = now_ms(),
    ok = application:stop(?HOST),
    now_ms() - Began.


%%% The host application


start(_Type, []) ->
    Pid = spawn_link(fun() ->
                             {ok, _} = erlmcp_registry:start_link(),
                             ok = erlmcp_registry:register_server(s, self(), #{}),
                             ok = erlmcp_registry:register_transport(t, self(), #{server_id => s}),
                             ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
                             receive stop -> ok end
                     end),
    ok = test_support:await(fun() -> erlmcp_shard_registry:whereis_connection(c) =:= Pid end, ?DEADLINE_MS),
    {ok, Pid}.


prep_stop(State) ->
    ok = ask_everything(prep_stop),
    State.


stop(_State) ->
    ask_everything(stop).


ask_everything(Callback) ->
    {ok, File} = application:get_env(?HOST, file),
    Results = [ io_lib:format("~tp.~n", [{Name, outcome(Call)}]) || {Name, Call} <- calls() ],
    ok = file:write_file(File ++ "." ++ atom_to_list(Callback), Results).


%% Some calls fail where the application or the registry's process is not running.
outcome(Call) ->
    Began = now_ms(),
    try Call() of
        _Any -> returned_in(now_ms() - Began)
    catch
        exit:{noproc, _} -> returned_in(now_ms() - Began);
        Class:Reason -> {Class, Reason}
    end.


returned_in(Ms) when Ms < 4_000 -> returned;
returned_in(Ms) -> {took_ms, Ms}.


calls() ->
    [{info, fun erlmcp_native:info/0},
     {i, fun erlmcp_native:i/0},
     {health, fun erlmcp_native:health/0},
     {explain, fun() -> erlmcp_native:explain(c) end},
     {explain_nobody, fun() -> erlmcp_native:explain(nobody) end},
     {get_shard_stats, fun() -> erlmcp_admission_control:get_shard_stats(0) end},
     {get_stats, fun() -> erlmcp_shard_manager:get_stats(0) end},
     {stats, fun erlmcp_shard_registry:stats/0},
     {limits, fun erlmcp_shard_registry:limits/0},
     {lookup, fun() -> erlmcp_shard_registry:lookup_connection(c) end},
     {register, fun() -> erlmcp_shard_registry:register_connection(d, self(), #{}) end},
     {unregister, fun() -> erlmcp_shard_registry:unregister_connection(d) end},
     {find_server, fun() -> erlmcp_registry:find_server(s) end},
     {list_transports, fun() -> erlmcp_registry:list_transports() end},
     {route_to_server, fun() -> erlmcp_registry:route_to_server(s, t, x) end},
     {route_message, fun() -> erlmcp_shard_manager:route_message(c, x) end},
     {bucket, fun() -> erlmcp_token_bucket:get_state(connection, c) end},
     {node_circuit, fun erlmcp_circuit_breaker:get_status/0},
     {subscribe, fun erlmcp_shard_recovery:subscribe/0},
     {capability, fun() -> erlmcp_capability_store:get_or_create(tools, fun() -> [add] end) end},
     {capability_release, fun() -> erlmcp_capability_store:release(tools) end},
     {capability_get, fun() -> erlmcp_capability_store:get(tools) end},
     {capability_info, fun erlmcp_capability_store:info/0},
     {downtimes, fun erlmcp_shard_recovery:downtimes/0},
     {metrics, fun erlmcp_shard_metrics:get/0},
     {mode, fun erlmcp_rollout:get/0},
     {set_health, fun() -> erlmcp_native:set(health, #{memory_bytes => infinity}) end},
     {set_admission, fun() -> erlmcp_native:set(admission, #{threshold => 5_000}) end},
     {set_backpressure, fun() -> erlmcp_native:set(backpressure, off) end}].


now_ms() ->
    erlang:monotonic_time(millisecond).
