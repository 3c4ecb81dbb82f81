%%% Shared parts of the suites that test erlmcp_registry's contract. Each case runs against the native and
%%% against the pure-Erlang registry.
%%%
%%% In the mode `current' the pure-Erlang store is used, in the registry's process. In `mixed' and `called' the
%%% store is native, and that process routes half of the ids or all of them.
%%%
%%% The cases of the groups `..._api' call the module's functions on the named instance; those of `..._raw' send
%%% the same requests to an anonymous instance. A case is written once, in terms of requests: request/2 turns a
%%% request into a function call or a gen_server call. Cases about the module or the process itself are in
%%% `..._module'.
-module(registry_contract).

-export([groups/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([module/1, instance/1, request/2, cast/2]).
-export([bound/1, processes/1, spawn_forwarder/1, received/1, with_peer/1]).

-define(DEADLINE_MS, 5000).


%% The groups in which the cases run. Each request case runs both through the API and with raw requests.
-spec groups(#{request | module => [atom()]}) -> [{atom(), [], [atom()]}].
groups(Cases) ->
    [ {Group, [], maps:get(How, Cases)}
      || {Group, How} <- [{native_api, request},
                          {native_raw, request},
                          {native_module, module},
                          {current_api, request},
                          {current_raw, request},
                          {current_module, module},
                          {mixed_api, request},
                          {mixed_module, module},
                          {called_api, request},
                          {called_module, module}],
         is_map_key(How, Cases) ].


init_per_group(Group, Config) ->
    [Backend, How] = string:split(atom_to_list(Group), "_"),
    Mode = case Backend of
               "native" -> '100x';
               "current" -> current;
               "mixed" -> {percent, 50};
               "called" -> {percent, 0}
           end,
    undefined = whereis(erlmcp_registry),
    ok = erlmcp_rollout:set(Mode),
    [{module, erlmcp_registry}, {mode, Mode}, {how, list_to_atom(How)} | Config].


%% A plan stays in force until the next registry process starts.
end_per_group(_Group, _Config) ->
    ok = erlmcp_rollout:set('100x'),
    {ok, Pid} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = await_mode('100x'),
    ok = gen_server:stop(Pid),
    application:unset_env(erlmcp_native, architecture_version).


%% A process switches to the mode after its start.
await_mode(Mode) ->
    case erlmcp_rollout:status() of
        #{mode := Mode, switching_to := none} -> ok;
        _Switching -> await_mode(Mode)
    end.


%% Every case has its own instance, which has exited when the next case begins.
init_per_testcase(_Case, Config) ->
    Module = module(Config),
    Instance = case proplists:get_value(how, Config) of
                   raw ->
                       {ok, Pid} = gen_server:start(Module, [], []),
                       Pid;
                   _ ->
                       Named = start(Module),
                       ok = await_mode(proplists:get_value(mode, Config)),
                       Named
               end,
    _ = put({?MODULE, instances}, [Instance, Module]),
    _ = put({?MODULE, forwarders}, []),
    [{instance, Instance} | Config].


end_per_testcase(_Case, Config) ->
    Module = module(Config),
    _ = [ gen_server:stop(Pid) || Pid <- [proplists:get_value(instance, Config), whereis(Module)],
                                  is_pid(Pid),
                                  is_process_alive(Pid) ],
    application:unset_env(erlmcp_native, same_pid),
    ok.


%%% Drivers


module(Config) ->
    proplists:get_value(module, Config).


%% Starts the named instance. Its parent has exited when this returns.
start(Module) ->
    {Parent, Monitor} = spawn_monitor(fun() ->
                                              {ok, Pid} = Module:start_link(),
                                              unlink(Pid),
                                              exit({started, Pid})
                                      end),
    receive {'DOWN', Monitor, process, Parent, Reason} -> element(2, {started, _} = Reason) end.


instance(Config) ->
    proplists:get_value(instance, Config).


request(Config, Request) ->
    case proplists:get_value(how, Config) of
        raw -> gen_server:call(instance(Config), Request);
        _ when is_atom(Request) -> (module(Config)):Request();
        _ -> apply(module(Config), element(1, Request), tl(tuple_to_list(Request)))
    end.


cast(Config, Cast) ->
    case proplists:get_value(how, Config) of
        raw -> gen_server:cast(instance(Config), Cast);
        _ -> apply(module(Config), element(1, Cast), tl(tuple_to_list(Cast)))
    end.


%% Registers the server s and the transport t that is bound to it.
bound(Config) ->
    [S, T] = processes(2),
    ok = request(Config, {register_server, s, S, #{}}),
    ok = request(Config, {register_transport, t, T, #{}}),
    ok = request(Config, {bind_transport_to_server, t, s}),
    {ok, s} = request(Config, {get_server_for_transport, t}),
    [S, T].


%% The processes are killed when the case's process exits, and not the other way round.
processes(N) ->
    [ spawn_watched(fun() -> timer:sleep(infinity) end) || _ <- lists:seq(1, N) ].


spawn_forwarder(Name) ->
    Tester = self(),
    Pid = spawn_watched(fun() -> forward(Name, Tester) end),
    _ = put({?MODULE, forwarders}, [Pid | get({?MODULE, forwarders})]),
    Pid.


forward(Name, Tester) ->
    receive
        {?MODULE, Reference} ->
            Tester ! Reference,
            forward(Name, Tester);
        Message ->
            Tester ! {Name, Message},
            forward(Name, Tester)
    end.


spawn_watched(Fun) ->
    Tester = self(),
    Pid = spawn(Fun),
    spawn(fun() ->
                  Monitor = monitor(process, Tester),
                  receive {'DOWN', Monitor, _, _, _} -> exit(Pid, kill) end
          end),
    Pid.


%% The next N messages, in order. No further message may have arrived.
received(N) ->
    Messages = [ receive Message -> Message after ?DEADLINE_MS -> exit({only, M, 'of', N}) end
                 || M <- lists:seq(0, N - 1) ],
    ok = all_forwarded(),
    receive Other -> exit({unexpected, Other}) after 0 -> Messages end.


%% Returns when the instance has handled all earlier messages and the forwarders have passed on theirs.
all_forwarded() ->
    _ = [ sys:get_state(Instance) || Instance <- get({?MODULE, instances}), is_there(Instance) ],
    References = [ begin
                       Reference = make_ref(),
                       Forwarder ! {?MODULE, Reference},
                       Reference
                   end || Forwarder <- get({?MODULE, forwarders}) ],
    _ = [ receive Reference -> ok after ?DEADLINE_MS -> exit(not_forwarded) end || Reference <- References ],
    ok.


is_there(Pid) when is_pid(Pid) -> is_process_alive(Pid);
is_there(Name) -> is_pid(whereis(Name)).


%% Runs a fun with another node. This node becomes distributed if it is not.
with_peer(Fun) ->
    Started = case is_alive() of
                  true ->
                      already;
                  false ->
                      _ = os:cmd("epmd -daemon"),
                      Name = "contract_" ++ os:getpid(),
                      {ok, _} = net_kernel:start([list_to_atom(Name), shortnames]),
                      here
              end,
    {ok, Peer, Node} = peer:start(#{name => peer:random_name()}),
    try
        Fun(Peer, Node)
    after
        is_process_alive(Peer) andalso peer:stop(Peer),
        Started =:= here andalso net_kernel:stop()
    end.
