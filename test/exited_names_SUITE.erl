%%% A name never leads to a process that has exited: a process that has seen the exit acquires the name at its first
%%% attempt, although the monitor of the former owner may not have fired yet.
%%%
%%% A process signals its links, one by one, before its monitors fire. So the exit of a process with many links is seen
%%% some time before its entries are removed.
-module(exited_names_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([via_restarts_succeed/1,
         names_of_own_registries_are_free/1,
         ids_of_every_namespace_are_free/1,
         ids_are_free_beside_readers/1,
         bindings_of_exited_processes_are_gone/1,
         places_of_exited_processes_are_free/1,
         via_start_on_a_full_registry/1]).

%% A gen_server to be named
-export([init/1, handle_call/3, handle_cast/2]).
%% A `via' module, whose names are those of a registry that a case makes
-export([register_name/2, unregister_name/1, whereis_name/1, send/2]).

-define(M,     erlmcp_shard_registry).
-define(LINKS, 200).


all() ->
    [via_restarts_succeed,
     names_of_own_registries_are_free,
     ids_of_every_namespace_are_free,
     ids_are_free_beside_readers,
     bindings_of_exited_processes_are_gone,
     places_of_exited_processes_are_free,
     via_start_on_a_full_registry].


init_per_suite(Config) ->
    %% A registry process of an earlier suite may have closed it when it was stopped.
    ok = erlmcp_nif:open(default),
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% Names


via_restarts_succeed(_Config) ->
    Name = {?MODULE, ?FUNCTION_NAME},
    Start = fun() ->
                    {ok, Pid} = gen_server:start_link({via, ?M, Name}, ?MODULE, linked, []),
                    ?assertEqual(Pid, ?M:whereis_name(Name)),
                    Pid
            end,
    Free = fun() -> ?assertEqual(undefined, ?M:whereis_name(Name)) end,
    restart(1000, Start, Free).


names_of_own_registries_are_free(_Config) ->
    R = ?M:new(),
    Start = fun() ->
                    Pid = linked(),
                    ?assertEqual(yes, ?M:register_name(R, name, Pid)),
                    ?assertEqual(Pid, ?M:whereis_name(R, name)),
                    Pid
            end,
    Free = fun() ->
                   ?assertEqual(undefined, ?M:whereis_name(R, name)),
                   ?assertExit({badarg, {name, hello}}, ?M:send(R, name, hello))
           end,
    restart(1000, Start, Free).


ids_of_every_namespace_are_free(_Config) ->
    Own = ?M:new(),
    [ begin
          Id = {?MODULE, NS},
          Start = fun() ->
                          Pid = linked(),
                          ?assertEqual(ok, erlmcp_nif:register(R, NS, Id, Pid, Pid, none)),
                          Pid
                  end,
          Free = fun() ->
                         ?assertEqual(undefined, erlmcp_nif:whereis(R, NS, Id)),
                         ?assertEqual({error, not_found}, erlmcp_nif:find(R, NS, Id))
                 end,
          restart(200, Start, Free)
      end || R <- [default, Own], NS <- [server, transport, connection] ].


%% No registration is refused, whatever other processes look up, bind and list meanwhile.
ids_are_free_beside_readers(_Config) ->
    R = ?M:new(),
    Readers = [ spawn_link(fun() -> read(R) end) || _ <- [1, 2] ],
    Start = fun() ->
                    Pid = linked(),
                    ?assertEqual(ok, erlmcp_nif:register(R, server, s, Pid, Pid, none)),
                    ?assertEqual(ok,
                                 erlmcp_nif:register(R, transport, t, Pid, Pid, #{server_id => s})),
                    Pid
            end,
    restart(1000, Start, fun() -> ok end),
    [ begin
          unlink(Reader),
          exit(Reader, kill)
      end || Reader <- Readers ].


read(R) ->
    _ = erlmcp_nif:find(R, server, s),
    _ = erlmcp_nif:bound_server(R, t),
    _ = erlmcp_nif:bind(R, t, s, true),
    _ = erlmcp_nif:list(R, transport),
    read(R).


bindings_of_exited_processes_are_gone(_Config) ->
    R = ?M:new(),
    Server = test_support:process(),
    ok = erlmcp_nif:register(R, server, s, Server, Server, none),
    Start = fun() ->
                    Pid = linked(),
                    ?assertEqual(ok,
                                 erlmcp_nif:register(R, transport, t, Pid, Pid, #{server_id => s})),
                    ?assertEqual([Pid], erlmcp_nif:bound_transports(R, s)),
                    ?assertEqual([{t, s}], erlmcp_nif:bindings(R)),
                    Pid
            end,
    Free = fun() ->
                   ?assertEqual([], erlmcp_nif:bound_transports(R, s)),
                   ?assertEqual([], erlmcp_nif:bindings(R)),
                   ?assertEqual([], erlmcp_nif:list(R, transport)),
                   ?assertEqual({error, not_found}, erlmcp_nif:bound_server(R, t))
           end,
    restart(200, Start, Free),
    test_support:stop(Server).


%%% Full registries


%% Each registration has another id.
places_of_exited_processes_are_free(_Config) ->
    [ begin
          R = ?M:new(#{max_entries => Max}),
          Others = test_support:process(),
          [ ok = ?M:register_connection(R, {other, N}, Others, none) || N <- lists:seq(2, Max) ],
          Start = fun() ->
                          Pid = linked(),
                          ?assertEqual(ok, ?M:register_connection(R, make_ref(), Pid, none)),
                          ?assertEqual({error, registry_full},
                                       ?M:register_connection(R, more, Pid, none)),
                          Pid
                  end,
          restart(Times, Start, fun() -> ok end),
          test_support:stop(Others)
      end || {Max, Times} <- [{1, 500}, {10, 500}, {2000, 100}] ].


via_start_on_a_full_registry(_Config) ->
    R = ?M:new(#{max_entries => 1}),
    ok = ?M:register_connection(R, first, self(), none),
    ok = persistent_term:put(?MODULE, R),
    process_flag(trap_exit, true),
    [ ?assertEqual({error, registry_full}, Module:Start({via, ?MODULE, second}, ?MODULE, plain, []))
      || {Module, Start} <- [{gen_server, start}, {gen_server, start_link}] ],
    ?assertMatch({error, {registry_full, _}},
                 supervisor_start(#{
                                    id => child,
                                    start => {gen_server,
                                              start_link,
                                              [{via, ?MODULE, second}, ?MODULE, plain, []]}
                                   })),
    ?assertExit(registry_full, ?M:register_name(R, second, self())),
    true = persistent_term:erase(?MODULE).


supervisor_start(Child) ->
    {ok, Sup} = supervisor:start_link(?MODULE, supervisor),
    Result = supervisor:start_child(Sup, Child),
    unlink(Sup),
    exit(Sup, shutdown),
    Result.


%%% A process that exits slowly, again and again


%% Starts a process, kills it and calls Free as soon as its exit has been seen, so many times. The process may signal
%% its other links later than the caller.
restart(0, _Start, _Free) ->
    ok;
restart(Times, Start, Free) ->
    process_flag(trap_exit, true),
    Pid = Start(),
    true = exit(Pid, kill),
    receive {'EXIT', Pid, killed} -> ok end,
    _ = Free(),
    restart(Times - 1, Start, Free).


%% A process with many links, one of them to the caller.
linked() ->
    {ok, Pid} = gen_server:start_link(?MODULE, linked, []),
    Pid.


init(supervisor) ->
    {ok, {#{}, []}};
init(plain) ->
    {ok, plain};
init(linked) ->
    [ spawn_link(fun() -> receive after infinity -> ok end end) || _ <- lists:seq(1, ?LINKS) ],
    {ok, linked}.


handle_call(_Request, _From, State) -> {reply, ok, State}.


handle_cast(_Request, State) -> {noreply, State}.


%%% A `via' registry


register_name(Name, Pid) -> ?M:register_name(persistent_term:get(?MODULE), Name, Pid).


unregister_name(Name) -> ?M:unregister_name(persistent_term:get(?MODULE), Name).


whereis_name(Name) -> ?M:whereis_name(persistent_term:get(?MODULE), Name).


send(Name, Message) -> ?M:send(persistent_term:get(?MODULE), Name, Message).
