%%% The restart of the pure-Erlang store with a keeper, after its process was killed.
%%%
%%% The contract: the next process serves every request at once, although it does not monitor the entries of its
%%% predecessor yet. At every moment of the adoption requests have the results that they have after it. In the end
%%% each entry has exactly one monitor, and no entry of an exited process is left.
%%%
%%% Most cases use the store alone, in a process (the owner) that adopts a slice only when the case asks for one. The
%%% others use the named registry, whose requests arrive together and are handled between two slices.
-module(adoption_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_testcase/2, end_per_testcase/2]).
-export([requests_are_served_before_the_end/1,
         exits_before_the_monitor/1,
         servers_that_exited_have_no_bindings/1,
         registered_anew_before_the_monitor/1,
         killed_again_and_again/1,
         changes_as_in_a_model/1,
         switched_before_the_end/1,
         switch_is_given_up_before_the_end/1,
         stopped_before_the_end/1,
         keeper_is_killed/1,
         interrupted_binding_is_none/1,
         equal_numbers_are_different_servers/1]).

-import(rollout_support, [sleeper/0, end_all/1]).

-define(C,      erlmcp_registry_classic).
-define(KEEPER, ?MODULE).
%% Many more than are adopted in two slices.
-define(ENTRIES, 40_000).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [requests_are_served_before_the_end,
     exits_before_the_monitor,
     servers_that_exited_have_no_bindings,
     registered_anew_before_the_monitor,
     killed_again_and_again,
     changes_as_in_a_model,
     switched_before_the_end,
     switch_is_given_up_before_the_end,
     stopped_before_the_end,
     keeper_is_killed,
     interrupted_binding_is_none,
     equal_numbers_are_different_servers].


init_per_testcase(Case, Config) ->
    rollout_support:init_per_testcase(Case, rollout_support:init_per_suite(Config)).


end_per_testcase(Case, Config) ->
    ok = ?C:discard(?KEEPER),
    rollout_support:end_per_testcase(Case, Config),
    rollout_support:end_per_suite(Config).


%%% The store


%% Processes of entries exit during the outage, and before their entries are adopted. Their ids are free at once.
exits_before_the_monitor(_Config) ->
    Owner = filled_owner(),
    First = [ {{early, N}, sleeper()} || N <- lists:seq(1, 200) ],
    Second = [ {{late, N}, sleeper()} || N <- lists:seq(1, 200) ],
    Stay = [ {{stay, N}, sleeper()} || N <- lists:seq(1, 200) ],
    [ ok = execute(Owner, {register_transport, Id, Pid, #{server_id => s}}) || {Id, Pid} <- First ++ Second ++ Stay ],
    killed = test_support:kill(Owner),
    end_all([ Pid || {_, Pid} <- First ]),
    Next = owner(),
    end_all([ Pid || {_, Pid} <- Second ]),
    Ended = First ++ Second,
    ?assertEqual(?ENTRIES + 200, length(execute(Next, list_transports))),
    {ok, {registry_state, Bindings}} = execute(Next, get_all_state),
    ?assertEqual(?ENTRIES + 200, map_size(Bindings)),
    {New, Forgotten} = lists:partition(fun({{_, N}, _}) -> N rem 2 =:= 0 end, Ended),
    [ begin
          ?assertEqual({error, not_found}, execute(Next, {find_transport, Id})),
          ?assertEqual({error, not_found}, execute(Next, {get_server_for_transport, Id})),
          ?assertEqual({error, transport_not_found}, execute(Next, {bind_transport_to_server, Id, s})),
          ?assertEqual(ok, execute(Next, {register_transport, Id, self(), new}))
      end || {Id, _} <- New ],
    ?assert(is_adopting(Next)),
    ok = adopt_all(Next),
    ok = has_entries(1, ?ENTRIES + 200 + length(New), Next),
    [ ?assertEqual({ok, {self(), new}}, execute(Next, {find_transport, Id})) || {Id, _} <- New ],
    [ ?assertEqual({error, not_found}, execute(Next, {find_transport, Id})) || {Id, _} <- Forgotten ],
    %% The entries that stay are monitored.
    end_all([ Pid || {_, Pid} <- Stay ]),
    ok = has_entries(1, ?ENTRIES + length(New), Next),
    killed = test_support:kill(Next).


%% A broadcast reaches no transport of a server that has exited. A binding made ahead of a server stays.
servers_that_exited_have_no_bindings(_Config) ->
    Owner = filled_owner(),
    Receiver = receiver(),
    [Early, Late, Seen] = [ sleeper() || _ <- [1, 2, 3] ],
    [ begin
          ok = execute(Owner, {register_server, Id, Pid, #{}}),
          ok = execute(Owner, {register_transport, {of_server, Id}, Receiver, #{server_id => Id}})
      end || {Id, Pid} <- [{early, Early}, {late, Late}, {seen, Seen}] ],
    ok = execute(Owner, {register_transport, ahead, Receiver, #{server_id => to_come}}),
    killed = test_support:kill(Owner),
    end_all([Early]),
    Next = owner(),
    [ ok = route(Next, {route_to_transport, broadcast, Id, m}) || Id <- [seen, to_come, early] ],
    ?assertEqual([{mcp_response, seen, m}, {mcp_response, to_come, m}], messages(Receiver)),
    end_all([Late, Seen]),
    [ ok = route(Next, {route_to_transport, broadcast, Id, m}) || Id <- [seen, late] ],
    ?assertEqual([], messages(Receiver)),
    [ ?assertEqual(ok, execute(Next, {register_server, Id, self(), #{}})) || Id <- [early, late, seen, to_come] ],
    ?assert(is_adopting(Next)),
    ok = adopt_all(Next),
    {ok, {registry_state, Bindings}} = execute(Next, get_all_state),
    ?assertEqual(#{ahead => to_come}, maps:filter(fun(_, Id) -> Id =/= s end, Bindings)),
    killed = test_support:kill(Next).


%% An entry that is replaced has one monitor, that of its new process. The exit of the former process changes nothing.
registered_anew_before_the_monitor(_Config) ->
    Owner = filled_owner(),
    Former = [ {{former, N}, sleeper()} || N <- lists:seq(1, 300) ],
    [ ok = execute(Owner, {register_transport, Id, Pid, #{}}) || {Id, Pid} <- Former ],
    killed = test_support:kill(Owner),
    Next = owner(),
    New = [ {Id, sleeper()} || {Id, _} <- Former ],
    [ begin
          ok = execute(Next, {unregister_transport, Id}),
          ok = execute(Next, {register_transport, Id, Pid, #{}})
      end || {Id, Pid} <- New ],
    %% These are found, and so adopted before their turn.
    [ {ok, _} = execute(Next, {find_transport, N}) || N <- lists:seq(1, 300) ],
    ?assert(is_adopting(Next)),
    end_all([ Pid || {_, Pid} <- Former ]),
    ok = adopt_all(Next),
    ok = has_entries(1, ?ENTRIES + 300, Next),
    [ ?assertEqual({ok, {Pid, #{}}}, execute(Next, {find_transport, Id})) || {Id, Pid} <- New ],
    end_all([ Pid || {_, Pid} <- New ]),
    ok = has_entries(1, ?ENTRIES, Next),
    killed = test_support:kill(Next).


%% Each owner is killed when it has adopted a part of the entries and made changes.
killed_again_and_again(_Config) ->
    First = filled_owner(),
    Last = lists:foldl(fun(N, Owner) ->
                               killed = test_support:kill(Owner),
                               Next = owner(),
                               ok = execute(Next, {register_transport, {new, N}, self(), #{server_id => s}}),
                               ok = execute(Next, {unregister_transport, N}),
                               ok = slice(Next),
                               ?assert(is_adopting(Next)),
                               Next
                       end,
                       First,
                       lists:seq(1, 20)),
    ok = adopt_all(Last),
    ok = has_entries(1, ?ENTRIES, Last),
    {ok, {registry_state, Bindings}} = execute(Last, get_all_state),
    ?assertEqual(lists:seq(21, ?ENTRIES) ++ [ {new, N} || N <- lists:seq(1, 20) ], lists:sort(maps:keys(Bindings))),
    killed = test_support:kill(Last).


%% Random changes, exits, kills of the owner, and slices. A model has servers and transports, each with its process,
%% and bindings.
changes_as_in_a_model(_Config) ->
    _ = rand:seed(exsss, test_support:seed("TEST_SEED")),
    Pids = [ sleeper() || _ <- lists:seq(1, 8) ],
    {Owner, Model, Left} = change(1500, filled_owner(), {#{}, #{}, #{}}, Pids),
    ok = as_in_the_model(Owner, Model),
    ok = adopt_all(Owner),
    ok = as_in_the_model(Owner, Model),
    {Servers, Transports, _} = Model,
    ok = has_entries(1 + map_size(Servers), ?ENTRIES + map_size(Transports), Owner),
    killed = test_support:kill(Owner),
    end_all(Left).


change(0, Owner, Model, Pids) ->
    {Owner, Model, Pids};
change(Count, Owner0, Model0, Pids0) ->
    {Expected, Result, Owner, Model, Pids} =
        change(rand:uniform(23), {s, rand:uniform(6)}, {t, rand:uniform(40)}, Owner0, Model0, Pids0),
    ?assertEqual({Count, Expected}, {Count, Result}),
    _ = Count rem 50 =:= 0 andalso (ok = as_in_the_model(Owner, Model)),
    change(Count - 1, Owner, Model, Pids).


change(Kind, S, T, Owner, {Servers, Transports, Bound} = Model, Pids) ->
    P = lists:nth(rand:uniform(length(Pids)), Pids),
    Executed = fun(Request, Expected, NewModel) -> {Expected, execute(Owner, Request), Owner, NewModel, Pids} end,
    case Kind of
        _ when Kind =< 3, is_map_key(S, Servers) ->
            Executed({register_server, S, P, S}, {error, already_registered}, Model);
        _ when Kind =< 3 ->
            Executed({register_server, S, P, S}, ok, {Servers#{S => P}, Transports, Bound});
        _ when Kind =< 5 ->
            Executed({unregister_server, S}, ok, without_server(S, Model));
        _ when Kind =< 9, is_map_key(T, Transports) ->
            Executed({register_transport, T, P, #{server_id => S}}, {error, already_registered}, Model);
        _ when Kind =< 9 ->
            Executed({register_transport, T, P, #{server_id => S}}, ok, {Servers, Transports#{T => P}, Bound#{T => S}});
        _ when Kind =< 11 ->
            Executed({unregister_transport, T}, ok, {Servers, maps:remove(T, Transports), maps:remove(T, Bound)});
        _ when Kind =< 14, is_map_key(S, Servers), is_map_key(T, Transports) ->
            Executed({bind_transport_to_server, T, S}, ok, {Servers, Transports, Bound#{T => S}});
        _ when Kind =< 14, is_map_key(S, Servers) ->
            Executed({bind_transport_to_server, T, S}, {error, transport_not_found}, Model);
        _ when Kind =< 14 ->
            Executed({bind_transport_to_server, T, S}, {error, server_not_found}, Model);
        15 ->
            Executed({unbind_transport, T}, ok, {Servers, Transports, maps:remove(T, Bound)});
        16 ->
            Expected = case Bound of #{T := Server} -> {ok, Server}; _ -> {error, not_found} end,
            Executed({get_server_for_transport, T}, Expected, Model);
        17 ->
            ok = route(Owner, {route_to_transport, broadcast, S, m}),
            ok = route(Owner, {route_to_transport, T, S, m}),
            {ok, route(Owner, {route_to_server, S, T, m}), Owner, Model, Pids};
        _ when Kind =< 19 ->
            {ok, slice(Owner), Owner, Model, Pids};
        20 ->
            {killed, test_support:kill(Owner), owner(), Model, Pids};
        _ ->
            Exited = [ Id || {Id, Pid} <- maps:to_list(Servers), Pid =:= P ],
            {Servers1, Transports1, Bound1} = lists:foldl(fun without_server/2, Model, Exited),
            Left = maps:filter(fun(_, Pid) -> Pid =/= P end, Transports1),
            {killed, test_support:kill(P), Owner, {Servers1, Left, maps:with(maps:keys(Left), Bound1)}, [sleeper() | lists:delete(P, Pids)]}
    end.


without_server(Id, {Servers, Transports, Bound}) when is_map_key(Id, Servers) ->
    {maps:remove(Id, Servers), Transports, maps:filter(fun(_, ServerId) -> ServerId =/= Id end, Bound)};
without_server(_Id, Model) ->
    Model.


as_in_the_model(Owner, {Servers, Transports, Bound}) ->
    Own = fun(Request) -> maps:from_list([ {Id, Pid} || {{_, _} = Id, {Pid, _}} <- execute(Owner, Request) ]) end,
    ?assertEqual(Servers, Own(list_servers)),
    ?assertEqual(Transports, Own(list_transports)),
    %% When all entries are monitored, a binding ends with the 'DOWN' of its process.
    test_support:await_value(Bound,
                             fun() ->
                                     {ok, {registry_state, Bindings}} = execute(Owner, get_all_state),
                                     maps:filter(fun(Id, _) -> is_tuple(Id) end, Bindings)
                             end).


%% A process that was killed between the two writes of a binding leaves a row of the index that no transport points to.
interrupted_binding_is_none(_Config) ->
    Owner = owner(),
    Receiver = receiver(),
    [ ok = execute(Owner, {register_server, Id, self(), #{}}) || Id <- [s, other] ],
    ok = execute(Owner, {register_transport, t, Receiver, #{server_id => s}}),
    ok = execute(Owner, {register_transport, u, Receiver, #{server_id => s}}),
    ok = in_owner(Owner,
                  fun() ->
                          [Members] = [ Table || Table <- ets:all(),
                                                 ets:info(Table, owner) =:= self(),
                                                 ets:info(Table, name) =:= erlmcp_registry_members ],
                          [{{Hash, Number}, s, _} | _] = ets:tab2list(Members),
                          true = ets:insert(Members, [{{Hash, Number + 1_000_000}, s, t}, {{Hash, Number + 2_000_000}, s, nobody}]),
                          ok
                  end),
    ok = execute(Owner, {bind_transport_to_server, t, other}),
    killed = test_support:kill(Owner),
    Next = owner(),
    ok = route(Next, {route_to_transport, broadcast, s, m}),
    ok = route(Next, {route_to_transport, broadcast, other, m}),
    ?assertEqual([{mcp_response, s, m}, {mcp_response, other, m}], messages(Receiver)),
    ok = execute(Next, {unregister_server, s}),
    ?assertEqual({ok, {registry_state, #{t => other}}}, execute(Next, get_all_state)),
    killed = test_support:kill(Next).


equal_numbers_are_different_servers(_Config) ->
    Owner = owner(),
    Receiver = receiver(),
    Ids = [1, 1.0, {1}, {1.0}, '_', '$1'],
    [ begin
          ok = execute(Owner, {register_server, Id, self(), #{}}),
          ok = execute(Owner, {register_transport, Id, Receiver, #{server_id => Id}})
      end || Id <- Ids ],
    killed = test_support:kill(Owner),
    Next = owner(),
    [ begin
          ok = route(Next, {route_to_transport, broadcast, Id, m}),
          ?assertEqual([{mcp_response, Id, m}], messages(Receiver)),
          ok = execute(Next, {unregister_server, Id}),
          ?assertEqual({error, not_found}, execute(Next, {get_server_for_transport, Id}))
      end || Id <- Ids ],
    killed = test_support:kill(Next).


%%% The named registry


requests_are_served_before_the_end(_Config) ->
    [Holder, Gone, New] = [ sleeper() || _ <- [1, 2, 3] ],
    ok = filled_registry(Holder),
    ok = erlmcp_registry:register_transport(gone, Gone, #{server_id => s}),
    ok = erlmcp_registry:register_transport(own, self(), #{server_id => other}),
    killed = test_support:kill(whereis(erlmcp_registry)),
    end_all([Gone]),
    _ = restart(),
    Config = #{server_id => s},
    Expected = [{{find_server, s}, {ok, {Holder, #{}}}},
                {{find_transport, 1}, {ok, {Holder, Config}}},
                {{find_transport, gone}, {error, not_found}},
                {{register_transport, gone, New, new}, ok},
                {{register_transport, 2, New, new}, {error, already_registered}},
                {{unregister_transport, 2}, ok},
                {{register_transport, 2, New, new}, ok},
                {{find_transport, 2}, {ok, {New, new}}},
                {{get_server_for_transport, 3}, {ok, s}},
                {{unbind_transport, 3}, ok},
                {{get_server_for_transport, 3}, {error, not_found}},
                {{bind_transport_to_server, 3, s}, ok},
                {{get_server_for_transport, own}, {ok, other}},
                {{update_server, s, updated}, ok},
                {list_servers, [{s, {Holder, updated}}]},
                {{register_server, other, New, #{}}, ok},
                {{unregister_server, s}, ok},
                {get_all_state, {ok, {registry_state, #{own => other}}}},
                {{restore_state, {registry_state, #{1 => other, gone => other}}}, ok},
                {get_all_state, {ok, {registry_state, #{1 => other, gone => other}}}}],
    Replies = before_the_end([ Request || {Request, _} <- Expected ] ++ [list_transports]),
    ?assertEqual([ Reply || {_, Reply} <- Expected ], lists:droplast(Replies)),
    ?assertEqual(?ENTRIES + 2, length(lists:last(Replies))),
    ok = await_adopted(),
    %% And the keeper.
    {monitors, Monitors} = process_info(whereis(erlmcp_registry), monitors),
    ?assertEqual(1 + ?ENTRIES + 2 + 1, length(Monitors)),
    end_all([Holder]),
    test_support:await_value(3, fun() -> length(erlmcp_registry:list_transports()) end),
    end_all([New]),
    test_support:await_value([{own, {self(), #{server_id => other}}}], fun erlmcp_registry:list_transports/0).


%% The copy and the adoption go on side by side. Processes exit meanwhile.
switched_before_the_end(_Config) ->
    Holder = sleeper(),
    [Early, Late] = [ [ {{Name, N}, sleeper()} || N <- lists:seq(1, 200) ] || Name <- [early, late] ],
    ok = filled_registry(Holder),
    [ ok = erlmcp_registry:register_transport(Id, Pid, #{server_id => s}) || {Id, Pid} <- Early ++ Late ],
    killed = test_support:kill(whereis(erlmcp_registry)),
    end_all([ Pid || {_, Pid} <- Early ]),
    _ = restart(),
    [Switch] = before_the_end_of([{erlmcp_rollout, {set, '100x', #{}}}]),
    ?assertMatch(#{switching_to := '100x', classic := #{adopting := true}}, erlmcp_rollout:status()),
    end_all([ Pid || {_, Pid} <- Late ]),
    ?assertEqual(ok, answer(Switch)),
    ?assertEqual('100x', erlmcp_rollout:get()),
    Left = fun() -> lists:sort([ Id || {Id, {Pid, _}} <- erlmcp_registry:list_transports(), Pid =:= Holder ]) end,
    ?assertEqual(lists:seq(1, ?ENTRIES), Left()),
    test_support:await_value(?ENTRIES, fun() -> length(erlmcp_registry:list_transports()) end),
    ok = erlmcp_rollout:set(current),
    ?assertEqual(lists:seq(1, ?ENTRIES), Left()),
    ?assertMatch(#{classic := #{transports := ?ENTRIES, adopting := false}}, erlmcp_rollout:status()),
    end_all([Holder]),
    test_support:await_value(0, fun() -> maps:get(transports, maps:get(classic, erlmcp_rollout:status())) end).


%% The store stays in force, and its adoption goes on.
switch_is_given_up_before_the_end(_Config) ->
    Holder = sleeper(),
    ok = filled_registry(Holder),
    {ok, Before} = erlmcp_registry:get_all_state(),
    killed = test_support:kill(whereis(erlmcp_registry)),
    _ = restart(),
    [Switch, Change] = before_the_end_of([{erlmcp_rollout, {set, '100x', #{max_pause_ms => 1}}}, {restore_state, Before}]),
    ?assertMatch({error, {too_slow, _, _}}, answer(Switch)),
    ?assertEqual(ok, answer(Change)),
    ok = await_adopted(),
    ?assertEqual(current, erlmcp_rollout:get()),
    ?assertEqual({ok, Before}, erlmcp_registry:get_all_state()),
    end_all([Holder]),
    test_support:await_value(#{servers => 0, transports => 0, adopting => false},
                             fun() -> maps:get(classic, erlmcp_rollout:status()) end),
    %% No table is still fixed.
    ?assertEqual([],
                 [ Table || Table <- ets:all(),
                            ets:info(Table, owner) =:= whereis(erlmcp_registry),
                            ets:info(Table, safe_fixed) =/= false ]).


stopped_before_the_end(_Config) ->
    Holder = sleeper(),
    ok = filled_registry(Holder),
    killed = test_support:kill(whereis(erlmcp_registry)),
    Registry = restart(),
    [_] = before_the_end([list_servers]),
    ok = gen_server:stop(Registry),
    _ = rollout_support:start_registry(),
    ?assertEqual([], erlmcp_registry:list_servers()),
    ?assertEqual([], erlmcp_registry:list_transports()),
    ?assertMatch(#{classic := #{servers := 0, transports := 0, adopting := false}}, erlmcp_rollout:status()),
    end_all([Holder]).


%% Another keeper takes its place, also before the end of an adoption.
keeper_is_killed(_Config) ->
    Holder = sleeper(),
    ok = filled_registry(Holder),
    [ begin
          Keeper = whereis(erlmcp_registry_keeper),
          killed = test_support:kill(Keeper),
          %% The registry has handled the exit of the keeper.
          ok = test_support:await(fun() -> not lists:member(whereis(erlmcp_registry_keeper), [Keeper, undefined]) end),
          _ = erlmcp_registry:list_servers(),
          killed = test_support:kill(whereis(erlmcp_registry)),
          _ = restart(),
          [Transports] = before_the_end([list_transports]),
          ?assertEqual(?ENTRIES, length(Transports))
      end || _ <- lists:seq(1, 3) ],
    end_all([Holder]).


%%% Instruments


%% The server s and transports that are bound to it, all of the process Holder.
filled_registry(Holder) ->
    ok = erlmcp_rollout:set(current),
    ok = erlmcp_registry:register_server(s, Holder, #{}),
    lists:foreach(fun(Id) -> ok = erlmcp_registry:register_transport(Id, Holder, #{server_id => s}) end, lists:seq(1, ?ENTRIES)).


%% Starts the process, and suspends it after the first slice. The request to suspend arrives while the process waits
%% for the keeper.
restart() ->
    Keeper = whereis(erlmcp_registry_keeper),
    true = erlang:suspend_process(Keeper),
    Starter = spawn_monitor(fun() -> exit(gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], [])) end),
    ok = test_support:await(fun() -> is_pid(whereis(erlmcp_registry)) end),
    Registry = whereis(erlmcp_registry),
    Suspender = spawn_monitor(fun() -> exit(sys:suspend(Registry, infinity)) end),
    test_support:await_value({message_queue_len, 1}, fun() -> process_info(Registry, message_queue_len) end),
    true = erlang:resume_process(Keeper),
    ?assertEqual([{ok, Registry}, ok],
                 [ receive {'DOWN', Monitor, process, Pid, Result} -> Result end || {Pid, Monitor} <- [Starter, Suspender] ]),
    Registry.


%% The replies to requests that are all handled before the end of the adoption.
before_the_end(Requests) ->
    [ answer(Request) || Request <- before_the_end_of(Requests) ].


before_the_end_of(Requests) ->
    Registry = whereis(erlmcp_registry),
    Status = {erlmcp_rollout, status},
    Sent = [ gen_server:send_request(Registry, Request) || Request <- Requests ++ [Status] ],
    ok = sys:resume(Registry),
    ?assertMatch(#{classic := #{adopting := true}}, answer(lists:last(Sent))),
    lists:droplast(Sent).


answer(Request) ->
    {reply, Reply} = gen_server:receive_response(Request, 60_000),
    Reply.


await_adopted() ->
    test_support:await(fun() -> not maps:get(adopting, maps:get(classic, erlmcp_rollout:status())) end, 60_000).


filled_owner() ->
    Holder = sleeper(),
    Owner = owner(),
    ok = execute(Owner, {register_server, s, Holder, #{}}),
    [ ok = execute(Owner, {register_transport, Id, Holder, #{server_id => s}}) || Id <- lists:seq(1, ?ENTRIES) ],
    Owner.


%% A process with the store of the keeper. Exits of processes are handled as they are noticed, slices when they are
%% asked for.
owner() ->
    Case = self(),
    Owner = spawn(fun() ->
                          Store = ?C:open(?KEEPER),
                          Case ! {self(), opened},
                          own(Store)
                  end),
    receive {Owner, opened} -> Owner end.


own(Store0) ->
    receive
        {?MODULE, From, Do} ->
            {Result, Store} = Do(Store0),
            From ! {self(), Result},
            own(Store);
        {{down, _, _}, _, process, _, _} = Down ->
            own(?C:info(Down, Store0))
    end.


ask(Owner, Do) ->
    Owner ! {?MODULE, self(), Do},
    receive {Owner, Result} -> Result end.


execute(Owner, Request) -> ask(Owner, fun(Store) -> ?C:execute(Request, Store) end).


route(Owner, Cast) -> ask(Owner, fun(Store) -> {ok, ?C:route(Cast, Store)} end).


counts(Owner) -> ask(Owner, fun(Store) -> {?C:counts(Store), Store} end).


is_adopting(Owner) -> ask(Owner, fun(Store) -> {not ?C:is_adopted(Store), Store} end).


in_owner(Owner, Fun) -> ask(Owner, fun(Store) -> {Fun(), Store} end).


slice(Owner) ->
    ask(Owner,
        fun(Store) ->
                receive {?C, adopt} = Message -> {ok, ?C:info(Message, Store)} after 0 -> {ok, Store} end
        end).


adopt_all(Owner) ->
    case is_adopting(Owner) of
        true ->
            ok = slice(Owner),
            adopt_all(Owner);
        false ->
            ok
    end.


%% Each entry has one monitor, and there is one of the keeper. The last exits may not have been handled yet.
has_entries(Servers, Transports, Owner) ->
    test_support:await_value({#{servers => Servers, transports => Transports}, Servers + Transports + 1},
                             fun() ->
                                     Counts = counts(Owner),
                                     {monitors, Monitors} = process_info(Owner, monitors),
                                     {Counts, length(Monitors)}
                             end).


receiver() ->
    spawn_link(fun() -> receive_messages([]) end).


receive_messages(Messages) ->
    receive
        {messages, From} ->
            From ! {self(), lists:reverse(Messages)},
            receive_messages([]);
        Message ->
            receive_messages([Message | Messages])
    end.


%% The messages since the last call. The owner, which has sent them, has answered since.
messages(Receiver) ->
    Receiver ! {messages, self()},
    receive {Receiver, Messages} -> Messages end.
