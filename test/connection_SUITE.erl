%%% Processes of connections: registered, small while they are idle, and with a state that is built at the first use.
%%%
%%% The contract: a process that was not used has called nothing of its callback module, and an idle one takes less than 4 KB.
%%% From its first message on it is the `gen_server' of that module. It leaves the registry with its exit, and a supervisor
%%% starts it again at the first try.
-module(connection_SUITE).
-behaviour(gen_server).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([registered_when_it_has_started/1,
         built_at_the_first_use_only/1,
         the_first_message_is_handled_as_all_others/1,
         every_kind_of_message_is_a_use/1,
         small_while_idle/1,
         hibernates_again/1,
         what_init_may_return/1,
         leaves_the_registry_when_it_exits/1,
         ids_that_are_registered/1,
         a_full_registry/1,
         under_a_supervisor/1,
         crash_reports_name_the_module/1,
         a_module_is_loaded_anew_while_it_is_idle/1,
         wrong_options/1]).

%% Supervisor or gen_server
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, handle_continue/2, terminate/2]).
%% A handler of the logger
-export([log/2]).

-import(test_support, [await/1, await_value/2, kill/1]).

-define(C,          erlmcp_connection).
-define(R,          erlmcp_shard_registry).
-define(IDLE_BYTES, 4096).


all() ->
    [registered_when_it_has_started,
     built_at_the_first_use_only,
     the_first_message_is_handled_as_all_others,
     every_kind_of_message_is_a_use,
     small_while_idle,
     hibernates_again,
     what_init_may_return,
     leaves_the_registry_when_it_exits,
     ids_that_are_registered,
     a_full_registry,
     under_a_supervisor,
     crash_reports_name_the_module,
     a_module_is_loaded_anew_while_it_is_idle,
     wrong_options].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% The callback module. It reports each call of init to a process.


init({children, Flags, Children}) ->
    {ok, {Flags, Children}};
init({returns, Result}) ->
    Result;
init({throws, Result}) ->
    throw(Result);
init(Reported) ->
    Reported ! {init, self()},
    {ok, {Reported, []}}.


handle_call(stop, _From, State) -> {stop, normal, stopped, State};
handle_call(crash, _From, _State) -> exit(crashed);
handle_call(Request, _From, State) -> {reply, {Request, State}, State}.


handle_cast(Message, State) -> {noreply, reported({cast, Message}, State)}.


handle_info(Message, State) -> {noreply, reported({info, Message}, State)}.


handle_continue(Term, State) -> {noreply, reported({continue, Term}, State)}.


terminate(Reason, State) ->
    _ = reported({terminate, Reason}, State),
    ok.


reported(Event, {Reported, Events}) ->
    Reported ! {Event, self()},
    {Reported, [Event | Events]};
reported(_Event, State) ->
    State.


%% A connection of the default registry, or another one, that reports to this process. It exits with the case.
started(Id) -> started(Id, #{}).


started(Id, Options) ->
    {ok, Pid} = ?C:start_link(maps:merge(#{id => Id, module => ?MODULE, args => self()}, Options)),
    Pid.


stopped(Pid) ->
    true = unlink(Pid),
    kill(Pid).


received(Event, Pid) ->
    receive {Event, Pid} -> ok end.


%% Only a hibernating process has a heap that is smaller than its minimum.
is_hibernating(Pid) ->
    [{status, Status}, {message_queue_len, Messages}, {total_heap_size, Words}, {garbage_collection, Collection}] =
        process_info(Pid, [status, message_queue_len, total_heap_size, garbage_collection]),
    Status =:= waiting andalso Messages =:= 0 andalso Words < proplists:get_value(min_heap_size, Collection).


await_hibernation(Pid) ->
    await(fun() -> is_hibernating(Pid) end).


bytes(Pid) ->
    {memory, Bytes} = process_info(Pid, memory),
    Bytes.


%%% Start and first use


registered_when_it_has_started(_Config) ->
    Registry = ?R:new(#{shards => 4}),
    [ begin
          Pid = started({?FUNCTION_NAME, 1}, Options),
          ?assertEqual({ok, {Pid, Capabilities}}, ?R:lookup_connection(R, {?FUNCTION_NAME, 1})),
          ?assertEqual([{?FUNCTION_NAME, 1}], ?R:connections_of(R, Pid)),
          stopped(Pid)
      end || {R, Capabilities, Options} <- [{default, undefined, #{}},
                                            {default, #{tools => true}, #{capabilities => #{tools => true}}},
                                            {Registry, none, #{registry => Registry, capabilities => none}}] ],
    %% As a property list or keyword list.
    {ok, Pid} = ?C:start_link([{id, <<"list">>}, {module, ?MODULE}]),
    ?assertEqual(Pid, ?R:whereis_connection(<<"list">>)),
    stopped(Pid).


built_at_the_first_use_only(_Config) ->
    Pid = started(lazy),
    await_hibernation(Pid),
    %% Neither a look-up nor a change of its entry is a use.
    {ok, {Pid, undefined}} = ?R:lookup_connection(lazy),
    ok = ?R:update_connection(lazy, #{tools => true}),
    true = is_hibernating(Pid),
    ?assertEqual([], test_support:flush()),
    [ ok = erlmcp_shard_manager:route_message(lazy, N) || N <- [1, 2, 3] ],
    ?assertMatch({ask, {_, [{info, 3}, {info, 2}, {info, 1}]}}, gen_server:call(Pid, ask)),
    ?assertEqual([{init, Pid}, {{info, 1}, Pid}, {{info, 2}, Pid}, {{info, 3}, Pid}], test_support:flush()),
    stopped(Pid).


the_first_message_is_handled_as_all_others(_Config) ->
    [ begin
          Pid = started(first),
          Use(Pid),
          received(init, Pid),
          received(Event, Pid),
          stopped(Pid)
      end || {Use, Event} <- [{fun(Pid) -> Pid ! hello end, {info, hello}},
                              {fun(Pid) -> gen_server:cast(Pid, hello) end, {cast, hello}},
                              {fun(_) -> ok = erlmcp_shard_manager:route_message(first, hello) end, {info, hello}}] ],
    Pid = started(first),
    ?assertEqual({ask, {self(), []}}, gen_server:call({via, ?R, first}, ask)),
    stopped(Pid).


every_kind_of_message_is_a_use(_Config) ->
    Pid = started(system),
    ?assertEqual({self(), []}, sys:get_state(Pid)),
    received(init, Pid),
    stopped(Pid).


%%% Idle


small_while_idle(_Config) ->
    [ begin
          Pid = started({small, Profile}, #{profile => Profile, hibernate_after_ms => 1}),
          await_hibernation(Pid),
          Unused = bytes(Pid),
          ok = erlmcp_shard_manager:route_message({small, Profile}, lists:seq(1, 10_000)),
          received(init, Pid),
          {Pid, #{}} = {Pid, sys:replace_state(Pid, fun(_) -> #{} end)},
          await_hibernation(Pid),
          Used = bytes(Pid),
          ct:pal("~p: ~b bytes, after use ~b", [Profile, Unused, Used]),
          ?assertEqual(true, Unused < ?IDLE_BYTES, Unused),
          ?assertEqual(true, Used < ?IDLE_BYTES, Used),
          stopped(Pid)
      end || Profile <- [idle, steady, bursty] ],
    ok.


hibernates_again(_Config) ->
    Pid = started(sleepy, #{hibernate_after_ms => 1}),
    [ begin
          await_hibernation(Pid),
          ok = erlmcp_shard_manager:route_message(sleepy, N),
          received({info, N}, Pid)
      end || N <- lists:seq(1, 10) ],
    await_hibernation(Pid),
    %% With the state that it has.
    {ask, {_, Events}} = gen_server:call(Pid, ask),
    ?assertEqual([ {info, N} || N <- lists:seq(10, 1, -1) ], Events),
    stopped(Pid),
    %% Not before it was idle long enough.
    Awake = started(awake, #{hibernate_after_ms => infinity}),
    _ = gen_server:call(Awake, ask),
    await_value([{status, waiting}], fun() -> process_info(Awake, [status]) end),
    ?assertEqual(false, is_hibernating(Awake)),
    stopped(Awake).


%%% What init/1 returns, and exits


what_init_may_return(_Config) ->
    State = {self(), []},
    Start = fun(How, Result) ->
                    {ok, Pid} = ?C:start_link(#{id => returns, module => ?MODULE, args => {How, Result}}),
                    Pid
            end,
    Running = fun(Result) -> Start(returns, Result) end,
    [ begin
          Pid = Running(Result),
          Pid ! hello,
          received({info, hello}, Pid),
          stopped(Pid)
      end || Result <- [{ok, State}, {ok, State, hibernate}, {ok, State, infinity}, {ok, State, 60_000}] ],
    %% The continuation is first.
    Continued = Running({ok, State, {continue, on}}),
    {ask, {_, [{continue, on}]}} = gen_server:call(Continued, ask),
    stopped(Continued),
    %% As a gen_server: what is thrown is returned.
    Thrown = Start(throws, {ok, State}),
    {ask, _} = gen_server:call(Thrown, ask),
    stopped(Thrown),
    process_flag(trap_exit, true),
    [ begin
          Pid = Start(How, Result),
          ?assertExit({Reason, _}, gen_server:call(Pid, ask)),
          receive {'EXIT', Pid, Reason} -> ok end,
          ?assertEqual(undefined, ?R:whereis_name(returns))
      end || How <- [returns, throws],
             {Result, Reason} <- [{{stop, no_socket}, no_socket},
                                  {{error, no_socket}, no_socket},
                                  {ignore, normal},
                                  {other, {bad_return_value, other}}] ],
    process_flag(trap_exit, false).


leaves_the_registry_when_it_exits(_Config) ->
    process_flag(trap_exit, true),
    [ begin
          Pid = started(mortal),
          ?assertEqual(Pid, ?R:whereis_connection(mortal)),
          End(Pid),
          receive {'EXIT', Pid, _} -> ok end,
          ?assertEqual({error, not_found}, ?R:lookup_connection(mortal)),
          await_value(0, fun() -> length([ Id || {Id, _} <- ?R:list_connections(?R:get_shard_id(mortal)), Id =:= mortal ]) end)
      end || End <- [fun(Pid) -> exit(Pid, kill) end,
                     fun(Pid) -> exit(Pid, shutdown) end,
                     fun(Pid) -> gen_server:call(Pid, stop) end,
                     fun(Pid) -> ?assertExit({crashed, _}, gen_server:call(Pid, crash)) end,
                     fun gen_server:stop/1] ],
    process_flag(trap_exit, false).


ids_that_are_registered(_Config) ->
    Pid = started(taken),
    process_flag(trap_exit, true),
    ?assertEqual({error, {already_started, Pid}}, ?C:start_link(#{id => taken, module => ?MODULE})),
    %% Other ways of registration.
    ok = ?R:register_connection(other, self(), none),
    ?assertEqual({error, {already_started, self()}}, ?C:start_link(#{id => other, module => ?MODULE})),
    ok = ?R:unregister_connection(other),
    %% An id that no connection may have, and a registry that does not exist.
    ?assertError(badarg, ?C:start_link(#{id => test_terms:fun_with([1]), module => ?MODULE})),
    ?assertError(badarg, ?C:start_link(#{id => other, module => ?MODULE, registry => make_ref()})),
    %% No exit comes of a process that was never started.
    [ {error, _} = ?C:start_link(#{id => taken, module => ?MODULE}) || _ <- lists:seq(1, 100) ],
    ?assertEqual([], test_support:flush()),
    process_flag(trap_exit, false),
    ?assertEqual(Pid, ?R:whereis_connection(taken)),
    stopped(Pid).


a_full_registry(_Config) ->
    Registry = ?R:new(#{max_entries => 1}),
    Pid = started(one, #{registry => Registry}),
    process_flag(trap_exit, true),
    ?assertEqual({error, registry_full}, ?C:start_link(#{id => two, module => ?MODULE, registry => Registry})),
    process_flag(trap_exit, false),
    stopped(Pid).


%%% Supervisors, logs, code


under_a_supervisor(_Config) ->
    process_flag(trap_exit, true),
    Flags = #{strategy => one_for_one, intensity => 1000, period => 1},
    Options = #{id => worker, module => ?MODULE, args => self()},
    ?assertMatch(#{modules := [?MODULE]}, ?C:child_spec(Options)),
    {ok, Supervisor} = supervisor:start_link(?MODULE, {children, Flags, [?C:child_spec(Options)]}),
    %% Unused and used, the next process has the id at the first try.
    [ begin
          Pid = ?R:whereis_name(worker),
          true = is_pid(Pid),
          _ = N rem 2 =:= 0 andalso gen_server:call(Pid, ask),
          kill(Pid),
          await(fun() -> not lists:member(?R:whereis_name(worker), [Pid, undefined]) end)
      end || N <- lists:seq(1, 100) ],
    ?assertMatch([{worker, Pid, worker, _}] when is_pid(Pid), supervisor:which_children(Supervisor)),
    ?assertMatch([_, {active, 1} | _], supervisor:count_children(Supervisor)),
    exit(Supervisor, shutdown),
    receive {'EXIT', Supervisor, shutdown} -> ok end,
    ?assertEqual(undefined, ?R:whereis_name(worker)),
    _ = test_support:flush(),
    %% Many of one kind.
    Child = #{id => session, start => {?C, start_link, []}, restart => temporary},
    {ok, Sessions} = supervisor:start_link(?MODULE, {children, #{strategy => simple_one_for_one}, [Child]}),
    Pids = [ begin
                 {ok, Pid} = supervisor:start_child(Sessions, [#{id => {session, N}, module => ?MODULE, args => self()}]),
                 Pid
             end || N <- lists:seq(1, 100) ],
    ?assertEqual({error, {already_started, hd(Pids)}}, supervisor:start_child(Sessions, [#{id => {session, 1}, module => ?MODULE}])),
    ?assertEqual(Pids, [ ?R:whereis_connection({session, N}) || N <- lists:seq(1, 100) ]),
    exit(Sessions, shutdown),
    receive {'EXIT', Sessions, shutdown} -> ok end,
    %% None was used.
    ?assertEqual([], test_support:flush()),
    ?assertEqual([], [ N || N <- lists:seq(1, 100), ?R:whereis_name({session, N}) =/= undefined ]),
    process_flag(trap_exit, false).


%% The report of a process that crashes before its first use is complete names the callback module.
crash_reports_name_the_module(_Config) ->
    process_flag(trap_exit, true),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self()}),
    {ok, Pid} = ?C:start_link(#{id => crashing, module => ?MODULE, args => {returns, {stop, no_socket}}}),
    Pid ! hello,
    receive {'EXIT', Pid, no_socket} -> ok end,
    receive {crash_report, Pid, InitialCall} -> ?assertEqual({?MODULE, init, 1}, InitialCall) end,
    ok = logger:remove_handler(?MODULE),
    process_flag(trap_exit, false).


log(#{msg := {report, #{label := {proc_lib, crash}, report := [Info | _]}}}, #{config := Reported}) ->
    {initial_call, {Module, Function, Arguments}} = lists:keyfind(initial_call, 1, Info),
    {pid, Pid} = lists:keyfind(pid, 1, Info),
    Reported ! {crash_report, Pid, {Module, Function, length(Arguments)}};
log(_Event, _Config) ->
    ok.


%% An idle process runs no code of either module, so a purge of old code does not kill it.
a_module_is_loaded_anew_while_it_is_idle(_Config) ->
    Pid = started(upgraded),
    await_hibernation(Pid),
    [ begin
          _ = code:purge(?C),
          {module, ?C} = code:load_file(?C)
      end || _ <- [1, 2, 3] ],
    _ = code:purge(?C),
    ?assertMatch({ask, _}, gen_server:call(Pid, ask)),
    stopped(Pid).


wrong_options(_Config) ->
    Right = #{id => wrong, module => ?MODULE},
    [ begin
          ?assertError({bad_option, Key, Value, [_ | _]}, ?C:start_link(Options)),
          ?assertError({bad_option, Key, Value, [_ | _]}, ?C:child_spec(Options))
      end || {Key, Value, Options} <- [{id, undefined, #{}},
                                       {id, undefined, #{module => ?MODULE}},
                                       {module, undefined, #{id => wrong}},
                                       {module, "session", Right#{module => "session"}},
                                       {module, no_such_module, Right#{module => no_such_module}},
                                       {module, lists, Right#{module => lists}},
                                       {registry, sessions, Right#{registry => sessions}},
                                       {profile, fast, Right#{profile => fast}},
                                       {hibernate_after_ms, -1, Right#{hibernate_after_ms => -1}},
                                       {hibernate_after_ms, 1.0, Right#{hibernate_after_ms => 1.0}},
                                       {hibernate_after_ms, 1 bsl 32, Right#{hibernate_after_ms => 1 bsl 32}},
                                       {timeout, 5, Right#{timeout => 5}},
                                       {options, wrong, wrong}] ],
    ?assertEqual(undefined, ?R:whereis_connection(wrong)).
