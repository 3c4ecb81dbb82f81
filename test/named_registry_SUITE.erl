%%% Registries that have a name: under a supervisor, and as OTP `via' names.
%%%
%%% The contract: names of different registries, and of the default one, are apart. A registry ends with its process, and
%%% its names with it. No look-up passes the process.
-module(named_registry_SUITE).
-behaviour(supervisor).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([under_a_supervisor/1,
         via_names/1,
         registries_are_apart/1,
         ends_with_its_process/1,
         look_ups_pass_no_process/1,
         a_name_is_restarted_at_the_first_try/1,
         taken_names/1,
         wrong_options/1,
         functions_of_the_registry/1]).

%% A supervisor, and a gen_server to be named
-export([init/1, handle_call/3, handle_cast/2]).

-define(M, erlmcp_named_registry).


all() ->
    [under_a_supervisor,
     via_names,
     registries_are_apart,
     ends_with_its_process,
     look_ups_pass_no_process,
     a_name_is_restarted_at_the_first_try,
     taken_names,
     wrong_options,
     functions_of_the_registry].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%% The supervisor, or the named process.
init({children, Children}) -> {ok, {#{strategy => rest_for_one, intensity => 10, period => 1}, Children}};
init(Argument) -> {ok, Argument}.


handle_call(ask, _From, Argument) -> {reply, Argument, Argument};
handle_call(crash, _From, _Argument) -> exit(crashed).


handle_cast(_Message, Argument) -> {noreply, Argument}.


started(Options) ->
    {ok, Pid} = ?M:start_link(Options),
    Pid.


via(Registry, Id) -> {via, ?M, {Registry, Id}}.


stopped(Pid) ->
    unlink(Pid),
    test_support:kill(Pid).


%% Options as a map and as a keyword list, as Elixir passes them.
under_a_supervisor(_Config) ->
    process_flag(trap_exit, true),
    Named = fun(Registry, Id) ->
                    #{id => {Registry, Id}, start => {gen_server, start_link, [via(Registry, Id), ?MODULE, Id, []]}}
            end,
    Children = [?M:child_spec(#{name => sessions, shards => 4}),
                Named(sessions, <<"a">>),
                ?M:child_spec([{name, 'Elixir.Tools'}, {max_entries, 10}]),
                Named('Elixir.Tools', <<"a">>)],
    ?assertMatch([#{id := sessions}, _, #{id := 'Elixir.Tools'}, _], Children),
    {ok, Supervisor} = supervisor:start_link(?MODULE, {children, Children}),
    ?assertEqual([<<"a">>, <<"a">>], [ gen_server:call(via(R, <<"a">>), ask) || R <- [sessions, 'Elixir.Tools'] ]),
    %% The registry's process is killed: it and what comes after it are started again.
    Former = ?M:whereis_name({sessions, <<"a">>}),
    test_support:kill(whereis(sessions)),
    test_support:await(fun() ->
                               case ?M:whereis_name({sessions, <<"a">>}) of
                                   undefined -> false;
                                   Pid -> Pid =/= Former andalso ?M:whereis_name({'Elixir.Tools', <<"a">>}) =/= undefined
                               end
                       end),
    ?assertEqual(<<"a">>, gen_server:call(via(sessions, <<"a">>), ask)),
    exit(Supervisor, shutdown),
    receive {'EXIT', Supervisor, shutdown} -> ok end,
    ?assertEqual(undefined, ?M:whereis_name({sessions, <<"a">>})),
    ?assertEqual(undefined, whereis(sessions)).


via_names(_Config) ->
    Registry = started(#{name => named}),
    {ok, Pid} = gen_server:start(via(named, {id, 1}), ?MODULE, one, []),
    ?assertEqual({error, {already_started, Pid}}, gen_server:start(via(named, {id, 1}), ?MODULE, two, [])),
    ?assertEqual(one, gen_server:call(via(named, {id, 1}), ask)),
    ?assertEqual(Pid, ?M:whereis_name({named, {id, 1}})),
    ?assertEqual(no, ?M:register_name({named, {id, 1}}, self())),
    ?assertEqual(yes, ?M:register_name({named, {id, 1.0}}, self())),
    Me = self(),
    ?assertEqual(Me, ?M:send({named, {id, 1.0}}, hello)),
    receive hello -> ok end,
    ok = ?M:unregister_name({named, {id, 1.0}}),
    ?assertEqual(undefined, ?M:whereis_name({named, {id, 1.0}})),
    ?assertExit({badarg, {{named, {id, 1.0}}, hello}}, ?M:send({named, {id, 1.0}}, hello)),
    ok = gen_server:stop(Pid),
    ?assertEqual(undefined, ?M:whereis_name({named, {id, 1}})),
    stopped(Registry).


registries_are_apart(_Config) ->
    Registries = [ started(#{name => Name}) || Name <- [one, other] ],
    yes = ?M:register_name({one, same}, self()),
    ?assertEqual(undefined, ?M:whereis_name({other, same})),
    ?assertEqual(undefined, erlmcp_shard_registry:whereis_name(same)),
    %% A tuple is an id of the default registry as any other.
    yes = erlmcp_shard_registry:register_name({other, same}, self()),
    ?assertEqual(undefined, ?M:whereis_name({other, same})),
    ok = erlmcp_shard_registry:unregister_name({other, same}),
    ?assertEqual(self(), ?M:whereis_name({one, same})),
    lists:foreach(fun stopped/1, Registries).


ends_with_its_process(_Config) ->
    [ begin
          Pid = started(#{name => mortal}),
          yes = ?M:register_name({mortal, me}, self()),
          End(Pid),
          ?assertEqual(undefined, ?M:whereis_name({mortal, me})),
          ok = ?M:unregister_name({mortal, me}),
          ?assertError({no_registry, mortal}, ?M:register_name({mortal, me}, self())),
          ?assertError({no_registry, mortal}, ?M:registry(mortal)),
          %% The next one is empty.
          Next = started(#{name => mortal}),
          ?assertEqual(undefined, ?M:whereis_name({mortal, me})),
          stopped(Next)
      end || End <- [fun stopped/1, fun gen_server:stop/1] ],
    ok.


look_ups_pass_no_process(_Config) ->
    Pid = started(#{name => silent}),
    ok = sys:suspend(Pid),
    yes = ?M:register_name({silent, me}, self()),
    ?assertEqual(self(), ?M:whereis_name({silent, me})),
    ok = ?M:unregister_name({silent, me}),
    ok = sys:resume(Pid),
    %% It answers what it does not know, and lives.
    ?assertEqual({error, unknown_request}, gen_server:call(Pid, anything)),
    ok = gen_server:cast(Pid, anything),
    Pid ! anything,
    ?assertEqual({error, unknown_request}, gen_server:call(Pid, anything)),
    stopped(Pid).


a_name_is_restarted_at_the_first_try(_Config) ->
    Registry = started(#{name => again}),
    [ begin
          {ok, Pid} = gen_server:start(via(again, worker), ?MODULE, N, []),
          Monitor = monitor(process, Pid),
          _ = catch_exit(fun() -> gen_server:call(via(again, worker), crash) end),
          receive {'DOWN', Monitor, process, Pid, _} -> ok end
      end || N <- lists:seq(1, 500) ],
    stopped(Registry).


catch_exit(Fun) ->
    try
        Fun()
    catch
        exit:Reason -> Reason
    end.


taken_names(_Config) ->
    Pid = started(#{name => taken}),
    ?assertEqual({error, {already_started, Pid}}, ?M:start_link(#{name => taken})),
    process_flag(trap_exit, true),
    tables = ets:new(tables, [named_table]),
    ?assertEqual({error, {ets_table_exists, tables}}, ?M:start_link(#{name => tables})),
    stopped(Pid).


wrong_options(_Config) ->
    [ ?assertError({bad_option, Key, _, [_ | _]}, Call(Options))
      || Call <- [fun ?M:start_link/1, fun ?M:child_spec/1],
         {Key, Options} <- [{name, #{}},
                            {name, []},
                            {name, #{name => "sessions"}},
                            {name, #{name => undefined}},
                            {shards, #{name => s, shards => 3}},
                            {max_entries, [{name, s}, {max_entries, 0}]},
                            {unknown, #{name => s, unknown => 1}},
                            {options, sessions},
                            {options, {name, s}}] ],
    ?assertEqual(undefined, whereis(s)).


functions_of_the_registry(_Config) ->
    Pid = started(#{name => whole, max_entries => 2}),
    Registry = ?M:registry(whole),
    ok = erlmcp_shard_registry:register_connection(Registry, <<"c">>, self(), #{tools => true}),
    ?assertEqual({ok, {self(), #{tools => true}}}, erlmcp_shard_registry:lookup_connection(Registry, <<"c">>)),
    ?assertEqual(self(), ?M:whereis_name({whole, <<"c">>})),
    yes = ?M:register_name({whole, second}, self()),
    ?assertExit(registry_full, ?M:register_name({whole, third}, self())),
    ?assertEqual({error, registry_full}, gen_server:start(via(whole, third), ?MODULE, third, [])),
    stopped(Pid).
