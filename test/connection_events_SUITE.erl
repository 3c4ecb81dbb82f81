%%% Events of connections, and waiting for one.
%%%
%%% The contract of erlmcp_connection_events: subscribers are told of each registration and removal once, those of one id
%%% in order. What cannot be sent is counted, and the subscriber is told that it has to look again. A process that
%%% subscribes and then looks up an id misses nothing, also if the process that sends the events is killed.
-module(connection_events_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(test_support, [await/1, await_value/2, flush/0, kill/1, process/0, stop/1]).

-define(M,           erlmcp_connection_events).
-define(R,           erlmcp_shard_registry).
-define(DEADLINE_MS, 30_000).


suite() ->
    [{timetrap, {minutes, 5}}].


all() ->
    [changes_are_told_in_order,
     subscriptions_select_ids_and_shards,
     each_event_is_sent_once,
     ids_are_matched_exactly,
     processes_that_exit_leave,
     processes_of_other_nodes,
     unsubscribed_are_told_nothing,
     nobody_left_nothing_watched,
     own_registries,
     own_registry_is_freed,
     wrong_arguments,
     not_running,
     subscriptions_end_with_the_application,
     await_what_is_there,
     await_what_comes,
     await_times_out,
     await_sends_no_message,
     await_ends_with_its_caller,
     await_register_race,
     subscribe_leave_race,
     concurrent_changes_are_told_in_order,
     full_mailboxes_are_told_once,
     suspended_subscriber_delays_nobody,
     many_suspended_subscribers_cost_as_much_as_one,
     await_against_update,
     overflow_is_told_to_all,
     many_exits_at_once,
     dispatcher_killed,
     caller_killed,
     dispatcher_killed_under_load,
     dispatcher_killed_while_processes_wait,
     dispatcher_given_up,
     subscriber_killed].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    ok = application:start(erlmcp_native),
    Config.


end_per_testcase(_Case, _Config) ->
    ok = application:stop(erlmcp_native),
    _ = [ ?R:unregister_connection(Id) || Id <- ids(default) ],
    ok.


%%% What is told


changes_are_told_in_order(_Config) ->
    {A, B} = {process(), process()},
    ok = ?M:subscribe(all),
    ok = ?R:register_connection(x, A, caps),
    {error, already_registered} = ?R:register_connection(x, B, caps),
    {found, {A, caps}} = ?R:register_or_find_connection(x, B, caps),
    %% An update of the capabilities is no change.
    ok = ?R:update_connection(x, other),
    {ok, A} = ?R:replace_connection(x, B, caps),
    {error, not_held} = ?R:release_connection(x, A),
    ok = ?R:release_connection(x, B),
    {registered, {A, caps}} = ?R:register_or_find_connection(x, A, caps),
    ok = ?R:unregister_connection(x),
    ok = ?R:unregister_connection(x),
    {ok, undefined} = ?R:replace_connection(x, B, caps),
    yes = ?R:register_name({<<"y">>, [1]}, A),
    Expected = [{joined, x, A},
                {left, x, A},
                {joined, x, B},
                {left, x, B},
                {joined, x, A},
                {left, x, A},
                {joined, x, B},
                {joined, {<<"y">>, [1]}, A}],
    ?assertEqual(Expected, events(length(Expected))).


subscriptions_select_ids_and_shards(_Config) ->
    Pid = process(),
    Shard = ?R:get_shard_id(x),
    Other = hd([ Id || Id <- lists:seq(1, 1000), ?R:get_shard_id(Id) =/= Shard ]),
    Same = hd([ Id || Id <- lists:seq(1, 1000), ?R:get_shard_id(Id) =:= Shard ]),
    ByShard = subscriber({shard, Shard}),
    ById = subscriber({id, x}),
    ok = ?M:subscribe(all),
    [ ok = ?R:register_connection(Id, Pid, caps) || Id <- [x, Other, Same] ],
    [ ok = ?R:unregister_connection(Id) || Id <- [x, Other, Same] ],
    ?assertEqual([ {joined, Id, Pid} || Id <- [x, Other, Same] ] ++ [ {left, Id, Pid} || Id <- [x, Other, Same] ], events(6)),
    ?assertEqual([ {joined, Id, Pid} || Id <- [x, Same] ] ++ [ {left, Id, Pid} || Id <- [x, Same] ], told(ByShard, 4)),
    ?assertEqual([{joined, x, Pid}, {left, x, Pid}], told(ById, 2)).


each_event_is_sent_once(_Config) ->
    Pid = process(),
    Shard = ?R:get_shard_id(x),
    [ ok = ?M:subscribe(What) || What <- [all, all, {shard, Shard}, {id, x}, {id, x}] ],
    ok = ?R:register_connection(x, Pid, caps),
    ok = ?R:register_connection(last, Pid, caps),
    ?assertEqual([{joined, x, Pid}, {joined, last, Pid}], events(2)),
    %% The others remain when one ends.
    ok = ?M:unsubscribe(all),
    ok = ?M:unsubscribe({shard, Shard}),
    ok = ?R:unregister_connection(last),
    ok = ?R:unregister_connection(x),
    ?assertEqual([{left, x, Pid}], events(1)).


ids_are_matched_exactly(_Config) ->
    Pid = process(),
    ok = ?M:subscribe({id, 1}),
    [ ok = ?R:register_connection(Id, Pid, caps) || Id <- [1.0, <<"1">>, '1', [1], 1] ],
    ?assertEqual([{joined, 1, Pid}], events(1)),
    ?assertEqual([], flush()).


processes_that_exit_leave(_Config) ->
    ok = ?M:subscribe(all),
    Pid = process(),
    ok = ?R:register_connection(x, Pid, caps),
    stop(Pid),
    ?assertEqual([{joined, x, Pid}, {left, x, Pid}], events(2)),
    %% One that has exited leaves before its successor joins, also if its monitor has not fired yet.
    Pids = [ begin
                 Next = process(),
                 ok = ?R:register_connection(x, Next, caps),
                 killed = kill(Next),
                 Next
             end || _ <- lists:seq(1, 100) ],
    ?assertEqual(lists:append([ [{joined, x, Each}, {left, x, Each}] || Each <- Pids ]), events(200)).


processes_of_other_nodes(_Config) ->
    Remote = test_terms:external_pid(<<"other@host">>, 1),
    ok = ?M:subscribe({id, x}),
    _ = ?R:register_connection(x, Remote, caps),
    ok = ?R:unregister_connection(x),
    ?assertEqual([{joined, x, Remote}, {left, x, Remote}], events(2)).


unsubscribed_are_told_nothing(_Config) ->
    Pid = process(),
    Other = subscriber(all),
    ok = ?M:subscribe(all),
    ok = ?M:unsubscribe(all),
    ok = ?M:unsubscribe(all),
    ok = ?M:unsubscribe({id, never}),
    ok = ?R:register_connection(x, Pid, caps),
    ?assertEqual([{joined, x, Pid}], told(Other, 1)),
    ?assertEqual([], flush()),
    %% What was registered before leaves.
    ok = ?M:subscribe({id, x}),
    stop(Pid),
    ?assertEqual([{left, x, Pid}], events(1)).


nobody_left_nothing_watched(_Config) ->
    0 = erlmcp_nif:announcements_interests(default),
    Subscribers = [ subscriber(What) || What <- [all, all, {shard, 3}, {id, x}, {id, x}, {id, y}] ],
    5 = 1 + erlmcp_nif:announcements_interests(default),
    [First | Others] = Subscribers,
    stop(First),
    ok = ?M:subscribe(all),
    4 = erlmcp_nif:announcements_interests(default),
    ok = ?M:unsubscribe(all),
    _ = [ killed = kill(Each) || Each <- Others ],
    await_value(0, fun() -> erlmcp_nif:announcements_interests(default) end),
    {error, timeout} = ?M:await(nobody, 1),
    await_value(0, fun() -> erlmcp_nif:announcements_interests(default) end),
    ?assertEqual([], ets:tab2list(?M)).


%%% Registries


own_registries(_Config) ->
    {A, B, Pid} = {?R:new(), ?R:new(#{shards => 2}), process()},
    InA = subscriber(A, all),
    InB = subscriber(B, {shard, 1}),
    Id = hd([ Id || Id <- lists:seq(1, 100), ?R:get_shard_id(B, Id) =:= 1 ]),
    ok = ?M:subscribe({id, Id}),
    [ ok = ?R:register_connection(Registry, Id, Pid, caps) || Registry <- [A, B, default] ],
    ok = ?R:unregister_connection(B, Id),
    ?assertEqual([{joined, Id, Pid}], told(InA, 1)),
    ?assertEqual([{joined, Id, Pid}, {left, Id, Pid}], told(InB, 2)),
    ?assertEqual([{joined, Id, Pid}], events(1)),
    {error, timeout} = ?M:await(B, Id, 10),
    {ok, {Pid, caps}} = ?M:await(A, Id, 10).


%% A subscription refers to its registry, and ends with the subscriber. Then the registry is freed, with the configs of its
%% entries.
own_registry_is_freed(_Config) ->
    {Case, Pid, Configs} = {self(), process(), erlmcp_nif:distinct_configs()},
    [ begin
          Subscriber = test_support:in_process(
                         fun() ->
                                 Registry = ?R:new(),
                                 Each = subscriber_of(Case, Registry, What, #{}),
                                 ok = ?R:register_connection(Registry, x, Pid, {caps, Case}),
                                 {ok, {_, _}} = ?M:await(Registry, x, infinity),
                                 {error, timeout} = ?M:await(Registry, nobody, 1),
                                 told(Each, 1),
                                 Each
                         end),
          ok = await(fun() -> erlang:garbage_collect(Subscriber) end),
          ?assertEqual({1, Configs + 1}, {length(registries()), erlmcp_nif:distinct_configs()}),
          stop(Subscriber),
          await_value([], fun registries/0),
          true = erlang:garbage_collect(),
          await_value(Configs, fun erlmcp_nif:distinct_configs/0)
      end || What <- [all, {id, x}, {shard, ?R:get_shard_id(x)}] ].


%% The registries that are subscribed to.
registries() ->
    lists:usort([ Registry || {{Registry, _What, _Owner}, _} <- ets:tab2list(?M) ]).


%%% Arguments


wrong_arguments(_Config) ->
    Registry = ?R:new(#{shards => 2, max_id_bytes => 10}),
    Wrong = [{undefined, all},
             {exclusive, all},
             {make_ref(), all},
             {default, none},
             {default, {shard, 64}},
             {default, {shard, -1}},
             {default, {shard, 1.0}},
             {Registry, {shard, 2}},
             {Registry, {id, <<"longer than ten">>}},
             {default, {id, fun() -> Wrong = Registry, Wrong end}},
             {default, x}],
    [ begin
          ?assertError(badarg, ?M:subscribe(In, What)),
          ?assertError(badarg, ?M:unsubscribe(In, What))
      end || {In, What} <- Wrong ],
    [ ?assertError(badarg, ?M:await(In, Id, Timeout))
      || {In, Id, Timeout} <- [{make_ref(), x, 1},
                               {default, x, -1},
                               {default, x, 1.0},
                               {default, x, soon},
                               {default, x, 1 bsl 32},
                               {Registry, <<"longer than ten">>, 1}] ],
    [ ?assertError({bad_option, _, _, [_ | _]}, ?M:subscribe(default, all, Options))
      || Options <- [#{max_queue => 0}, #{max_queue => infinity}, #{queue => 1}, none] ],
    Shown = test_support:shown_error(fun() -> ?M:subscribe(default, {shard, 64}) end),
    ?assertNotEqual(nomatch, string:find(Shown, "argument 2: not all, {shard, Shard} or {id, Id} of this registry")),
    ?assertEqual([], ets:tab2list(?M)).


not_running(_Config) ->
    ok = application:stop(erlmcp_native),
    ?assertEqual({error, not_running}, ?M:subscribe(all)),
    ?assertEqual(ok, ?M:unsubscribe(all)),
    ?assertEqual({error, not_running}, ?M:await(x, 1000)),
    ?assertEqual({error, not_running}, ?M:await(x, infinity)),
    ok = ?R:register_connection(x, self(), caps),
    ?assertEqual({ok, {self(), caps}}, ?M:await(x, infinity)),
    ok = ?R:unregister_connection(x),
    ok = application:start(erlmcp_native).


subscriptions_end_with_the_application(_Config) ->
    Waiting = awaiting(x),
    ok = ?M:subscribe(all),
    ok = application:stop(erlmcp_native),
    ?assertEqual({error, not_running}, awaited(Waiting)),
    ?assertEqual(0, erlmcp_nif:announcements_interests(default)),
    ok = application:start(erlmcp_native),
    ok = ?R:register_connection(x, process(), caps),
    {ok, _} = ?M:await(x, infinity),
    ?assertEqual([], flush()).


%%% Waiting


await_what_is_there(_Config) ->
    Pid = process(),
    ok = ?R:register_connection(x, Pid, caps),
    ?assertEqual({ok, {Pid, caps}}, ?M:await(x, 0)),
    ?assertEqual({ok, {Pid, caps}}, ?M:await(default, x, infinity)).


await_what_comes(_Config) ->
    Pid = process(),
    Waiting = [ awaiting(x) || _ <- lists:seq(1, 10) ],
    await(fun() -> ets:info(?M, size) =:= 10 end),
    ok = ?R:register_connection(y, Pid, caps),
    ok = ?R:register_connection(x, Pid, caps),
    ?assertEqual(lists:duplicate(10, {ok, {Pid, caps}}), [ awaited(Each) || Each <- Waiting ]),
    ?assertEqual([], ets:tab2list(?M)),
    await_value(0, fun() -> erlmcp_nif:announcements_interests(default) end).


await_times_out(_Config) ->
    Pid = process(),
    ok = ?R:register_connection(x, Pid, caps),
    stop(Pid),
    ?assertEqual({error, timeout}, ?M:await(x, 0)),
    ?assertEqual({error, timeout}, ?M:await(x, 20)),
    await_value([], fun() -> ets:tab2list(?M) end).


await_sends_no_message(_Config) ->
    {error, timeout} = ?M:await(x, 1),
    _ = spawn_link(fun() -> ok = ?R:register_connection(x, process(), caps), receive stop -> ok end end),
    {ok, _} = ?M:await(x, infinity),
    _ = sys:get_state(?M),
    ?assertEqual([], flush()).


await_ends_with_its_caller(_Config) ->
    {Waiting, _} = awaiting(x),
    await(fun() -> ets:info(?M, size) =:= 1 end),
    killed = kill(Waiting),
    await_value([], fun() -> ets:tab2list(?M) end),
    ?assertEqual(0, erlmcp_nif:announcements_interests(default)).


%%% Races


%% Whenever the id is registered during the call, the call returns.
await_register_race(_Config) ->
    [ begin
          Id = {await, N},
          Waiting = awaiting(Id),
          Registering = spawn_link(fun() ->
                                           %% At another moment of the call each time.
                                           [ erlang:yield() || _ <- lists:seq(1, N rem 20) ],
                                           ok = ?R:register_connection(Id, self(), caps),
                                           receive stop -> ok end
                                   end),
          ?assertEqual({ok, {Registering, caps}}, awaited(Waiting)),
          Registering ! stop
      end || N <- lists:seq(1, 1000) ].


%% Whenever the connection leaves during the call, the look-up behind it does not find it, or an event follows.
subscribe_leave_race(_Config) ->
    [ begin
          Pid = process(),
          ok = ?R:register_connection(x, Pid, caps),
          Leaving = spawn_monitor(fun() ->
                                          [ erlang:yield() || _ <- lists:seq(1, N rem 20) ],
                                          case N rem 2 of
                                              0 -> ok = ?R:unregister_connection(x);
                                              1 -> kill(Pid)
                                          end
                                  end),
          ok = ?M:subscribe({id, x}),
          case ?R:whereis_connection(x) of
              undefined -> ok;
              Pid ->
                  receive
                      {erlmcp_connection, left, x, Pid} -> ok;
                      {erlmcp_connection, lost, _} -> await_value(undefined, fun() -> ?R:whereis_connection(x) end)
                  after
                      ?DEADLINE_MS ->
                          error({missed, N})
                  end
          end,
          {Remover, Monitor} = Leaving,
          receive {'DOWN', Monitor, process, Remover, normal} -> ok end,
          _ = [ stop(Pid) || N rem 2 =:= 0 ],
          ok = ?M:unsubscribe({id, x}),
          flush()
      end || N <- lists:seq(1, 1000) ].


%% Joins and leaves of an id alternate, whoever makes them, and the last one is the state.
concurrent_changes_are_told_in_order(_Config) ->
    ok = ?M:subscribe(default, all, #{max_queue => 1_000_000}),
    Ids = [a, {b, 1}],
    Changing = [ spawn_monitor(fun() -> change(Ids, 3_000, rand:seed_s(exsss, N)) end) || N <- lists:seq(1, 4) ],
    [ receive {'DOWN', Monitor, process, Pid, normal} -> ok end || {Pid, Monitor} <- Changing ],
    %% What they have registered leaves with them.
    await(fun() -> ids(default) =:= [] end),
    {ok, undefined} = ?R:replace_connection(last, self(), caps),
    Events = until_joined(last),
    ?assert(length(Events) > 2_000, length(Events)),
    ?assertEqual(#{}, lists:foldl(fun follow/2, #{}, Events)).


change(_Ids, 0, _Random) ->
    ok;
change(Ids, Number, Random) ->
    {N, Next} = rand:uniform_s(5, Random),
    {M, Last} = rand:uniform_s(length(Ids), Next),
    Id = lists:nth(M, Ids),
    _ = case N of
            1 -> ?R:unregister_connection(Id);
            2 -> ?R:replace_connection(Id, self(), caps);
            3 -> ?R:release_connection(Id, self());
            4 ->
                {Pid, Monitor} = spawn_monitor(fun() -> ?R:register_connection(Id, self(), caps) end),
                receive {'DOWN', Monitor, process, Pid, _} -> ok end;
            5 -> ?R:register_connection(Id, self(), caps)
        end,
    change(Ids, Number - 1, Last).


follow({joined, Id, Pid}, State) ->
    ?assertNot(is_map_key(Id, State), {joined, Id, Pid}),
    State#{Id => Pid};
follow({left, Id, Pid}, State) ->
    ?assertMatch(#{Id := Pid}, State, {left, Id, Pid}),
    maps:remove(Id, State).


%%% Bounds


%% No more events than the limit are in the mailbox. There is one `lost' for the others, when there is room again.
full_mailboxes_are_told_once(_Config) ->
    Pid = process(),
    Slow = subscriber(default, all, #{max_queue => 100}),
    ok = ?M:subscribe(default, all, #{max_queue => 100_000}),
    [ ok = ?R:register_connection({n, N}, Pid, caps) || N <- lists:seq(1, 1_000) ],
    1_000 = length(events(1_000)),
    ?assertEqual({message_queue_len, 100}, process_info(Slow, message_queue_len)),
    %% The answer to this request comes behind the events.
    Told = told(Slow, 100),
    ?assertEqual([ {joined, {n, N}, Pid} || N <- lists:seq(1, 100) ], Told),
    ?assertEqual([{lost, 900}], told(Slow, 1)),
    ok = ?R:unregister_connection({n, 1}),
    ?assertEqual([{left, {n, 1}, Pid}], told(Slow, 1)).


%% Other messages count too, and a process that does not run delays no other one.
suspended_subscriber_delays_nobody(_Config) ->
    Pid = process(),
    Suspended = subscriber(default, all, #{max_queue => 10}),
    true = erlang:suspend_process(Suspended),
    [ Suspended ! {filler, N} || N <- lists:seq(1, 20) ],
    ok = ?M:subscribe(all),
    [ ok = ?R:register_connection({n, N}, Pid, caps) || N <- lists:seq(1, 500) ],
    ?assertEqual([ {joined, {n, N}, Pid} || N <- lists:seq(1, 500) ], events(500)),
    true = erlang:resume_process(Suspended),
    Suspended ! skip_fillers,
    %% It had room for ten when it subscribed.
    ?assertEqual([ {joined, {n, N}, Pid} || N <- lists:seq(1, 10) ] ++ [{lost, 490}], told(Suspended, 11)).


%% All are asked for the length of their mailbox before an answer is waited for. One after the other they would take ten
%% seconds.
many_suspended_subscribers_cost_as_much_as_one(_Config) ->
    Suspended = [ subscriber(default, all, #{max_queue => 1}) || _ <- lists:seq(1, 200) ],
    ok = ?M:subscribe(all),
    [ true = erlang:suspend_process(Pid) || Pid <- Suspended ],
    {Us, _} = timer:tc(fun() ->
                               [ ok = ?R:register_connection({n, N}, self(), caps) || N <- lists:seq(1, 5) ],
                               ?assertEqual([ {joined, {n, N}, self()} || N <- lists:seq(1, 5) ], events(5))
                       end),
    ?assert(Us < 5_000_000, Us),
    [ true = erlang:resume_process(Pid) || Pid <- Suspended ],
    [ ?assertEqual([{joined, {n, 1}, self()}, {lost, 4}], told(Pid, 2)) || Pid <- Suspended ].


%% More changes than the native queue holds, while the process does not run.
overflow_is_told_to_all(_Config) ->
    Pid = process(),
    All = subscriber(default, all, #{max_queue => 1_000_000}),
    One = subscriber({id, x}),
    ok = sys:suspend(?M),
    true = erlang:suspend_process(whereis(?M)),
    Changes = 70_000,
    [ begin
          ok = ?R:register_connection(y, Pid, caps),
          ok = ?R:unregister_connection(y)
      end || _ <- lists:seq(1, Changes div 2) ],
    ok = ?R:register_connection(x, Pid, caps),
    true = erlang:resume_process(whereis(?M)),
    ok = sys:resume(?M),
    [{lost, Lost}] = told(One, 1),
    ?assert(Lost >= Changes + 1 - 65_536, Lost),
    Events = told(All, Changes + 1 - Lost + 1),
    ?assertEqual([{lost, Lost}], [ Event || {lost, _} = Event <- Events ]),
    %% There is room again.
    ok = ?R:unregister_connection(x),
    ?assertEqual([{left, x, Pid}], told(One, 1)),
    ?assertEqual([{left, x, Pid}], told(All, 1)).


%% 15,000 connections exit at once. One subscriber takes all, one is slow: it is told how many it has not got.
many_exits_at_once(_Config) ->
    Number = 15_000,
    Parent = self(),
    Owner = spawn(fun() ->
                          Pids = [ spawn_link(fun() -> receive stop -> ok end end) || _ <- lists:seq(1, Number) ],
                          [ ok = ?R:register_connection({n, N}, Pid, caps) || {N, Pid} <- lists:enumerate(Pids) ],
                          Parent ! {self(), ready},
                          receive stop -> exit(all_at_once) end
                  end),
    receive {Owner, ready} -> ok end,
    Slow = subscriber(default, all, #{max_queue => 100}),
    ok = ?M:subscribe(default, all, #{max_queue => 100_000}),
    Owner ! stop,
    Left = events(Number),
    ?assertEqual(lists:seq(1, Number), lists:sort([ N || {left, {n, N}, _} <- Left ])),
    ?assertEqual(0, ?R:count()),
    Got = length([ Event || {left, _, _} = Event <- told(Slow, 100) ]),
    ?assertEqual(100, Got),
    Rest = until_complete(fun() -> hd(told(Slow, 1)) end, Number - Got),
    ?assertEqual([], [ Event || {joined, _, _} = Event <- Rest ]),
    %% And the next connection is told to both.
    ok = ?R:register_connection(next, Parent, caps),
    ?assertEqual([{joined, next, Parent}], events(1)),
    ?assertEqual([{joined, next, Parent}], told(Slow, 1)).


%% Events, of which `lost' counts for as many as it says.
until_complete(_Next, 0) ->
    [];
until_complete(Next, Missing) when Missing > 0 ->
    case Next() of
        {lost, N} -> [{lost, N} | until_complete(Next, Missing - N)];
        Event -> [Event | until_complete(Next, Missing - 1)]
    end.


%%% Processes that exit


dispatcher_killed(_Config) ->
    Pid = process(),
    Registry = ?R:new(),
    Own = subscriber(Registry, all),
    ById = subscriber({id, x}),
    ok = ?M:subscribe(all),
    ok = ?M:subscribe(default, {id, y}),
    killed = kill(whereis(?M)),
    %% During the restart.
    ok = ?R:register_connection(x, Pid, caps),
    ok = ?R:register_connection(Registry, x, Pid, caps),
    %% One is lost at least. The next one is too, if it comes before the mailbox has been looked at.
    Next = fun(Each) -> fun() -> hd(told(Each, 1)) end end,
    [ ?assert(lists:member(Told, [[{lost, 1}, {joined, x, Pid}], [{lost, 2}]]), Told)
      || Told <- [ lists:sort(until_complete(Event, 2)) || Event <- [Next(Own), Next(ById), fun() -> hd(events(1)) end] ] ],
    ok = ?R:unregister_connection(x),
    ok = ?R:unregister_connection(Registry, x),
    [ ?assertEqual([{left, x, Pid}], told(Each, 1)) || Each <- [Own, ById] ],
    ?assertEqual([{left, x, Pid}], events(1)),
    ?assertEqual(3, erlmcp_nif:announcements_interests(default)).


%% It is killed while it registers a large config on a dirty scheduler. If that took place, subscribers are told.
caller_killed(_Config) ->
    Pid = process(),
    Large = lists:seq(1, 300_000),
    ok = ?M:subscribe(all),
    [ begin
          Id = {Ms, make_ref()},
          {Caller, Monitor} = spawn_monitor(fun() -> ?R:register_connection(Id, Pid, Large) end),
          timer:sleep(Ms),
          exit(Caller, kill),
          receive {'DOWN', Monitor, process, Caller, _} -> ok end,
          %% It may take place after the exit, or not at all.
          Joined = receive {erlmcp_connection, joined, Id, Pid} -> true after 2_000 -> false end,
          case Joined orelse ?R:whereis_connection(Id) =/= undefined of
              true ->
                  _ = Joined orelse ?assertEqual([{joined, Id, Pid}], events(1)),
                  ok = ?R:unregister_connection(Id),
                  ?assertEqual([{left, Id, Pid}], events(1));
              false ->
                  ok
          end
      end || Ms <- [0, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20] ].


%% What a subscriber knows from events, and from looking again when it has lost some, is the state in the end.
dispatcher_killed_under_load(_Config) ->
    ok = ?M:subscribe(default, all, #{max_queue => 1_000_000}),
    Ids = [ {n, N} || N <- lists:seq(1, 5) ],
    Changing = [ spawn_monitor(fun() -> change(Ids, 5_000, rand:seed_s(exsss, N)) end) || N <- lists:seq(1, 4) ],
    Kills = kill_while_alive([ Pid || {Pid, _} <- Changing ], 0),
    ?assert(Kills > 0),
    [ receive {'DOWN', Monitor, process, Pid, normal} -> ok end || {Pid, Monitor} <- Changing ],
    ok = ?M:unsubscribe({id, not_there}),
    {ok, undefined} = ?R:replace_connection(last, self(), caps),
    State = known_until_joined(last, #{}),
    ?assertEqual([ {Id, ?R:whereis_connection(Id)} || Id <- Ids ], [ {Id, maps:get(Id, State, undefined)} || Id <- Ids ]).


kill_while_alive(Pids, Kills) ->
    case lists:any(fun is_process_alive/1, Pids) andalso Kills < 20 of
        true ->
            await(fun() -> is_pid(whereis(?M)) end),
            case whereis(?M) of
                undefined -> kill_while_alive(Pids, Kills);
                Pid ->
                    _ = kill(Pid),
                    kill_while_alive(Pids, Kills + 1)
            end;
        false ->
            Kills
    end.


known_until_joined(Last, State) ->
    receive
        {erlmcp_connection, lost, _} ->
            Ids = maps:from_list([ {Id, Pid} || {Id, {Pid, _}} <- connections(default) ]),
            %% The event of the last one may be what was lost.
            case Ids of
                #{Last := _} -> drain_known(Ids);
                _ -> known_until_joined(Last, Ids)
            end;
        {erlmcp_connection, joined, Last, Pid} ->
            drain_known(State#{Last => Pid});
        {erlmcp_connection, joined, Id, Pid} ->
            known_until_joined(Last, State#{Id => Pid});
        {erlmcp_connection, left, Id, _Pid} ->
            known_until_joined(Last, maps:remove(Id, State))
    after
        ?DEADLINE_MS ->
            error({not_joined, Last})
    end.


%% Nothing changes any more, but events that are sent may not have arrived, and processes may be exiting.
drain_known(State) ->
    case [ Id || {Id, Pid} <- maps:to_list(State), ?R:whereis_connection(Id) =/= Pid ] of
        [] ->
            State;
        _Differ ->
            receive
                {erlmcp_connection, lost, _} -> drain_known(maps:from_list([ {Id, Pid} || {Id, {Pid, _}} <- connections(default) ]));
                {erlmcp_connection, joined, Id, Pid} -> drain_known(State#{Id => Pid});
                {erlmcp_connection, left, Id, _Pid} -> drain_known(maps:remove(Id, State))
            after
                ?DEADLINE_MS ->
                    error({out_of_date, State})
            end
    end.


dispatcher_killed_while_processes_wait(_Config) ->
    Waiting = [ awaiting(x) || _ <- lists:seq(1, 10) ],
    await(fun() -> ets:info(?M, size) =:= 10 end),
    killed = kill(whereis(?M)),
    Pid = process(),
    ok = ?R:register_connection(x, Pid, caps),
    ?assertEqual(lists:duplicate(10, {ok, {Pid, caps}}), [ awaited(Each) || Each <- Waiting ]),
    await_value([], fun() -> ets:tab2list(?M) end),
    ?assertEqual(0, erlmcp_nif:announcements_interests(default)).


%% Then nothing else stops.
dispatcher_given_up(_Config) ->
    ok = ?M:subscribe({id, z}),
    Others = [ whereis(Name) || Name <- [erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup] ],
    Monitor = monitor(process, whereis(erlmcp_connection_events_sup)),
    ok = kill_until_down(Monitor),
    ?assertEqual(Others, [ whereis(Name) || Name <- [erlmcp_native_sup, erlmcp_shard_sup, erlmcp_control_plane_sup] ]),
    {degraded, Reasons} = erlmcp_native:health(),
    ?assertEqual([erlmcp_connection_events_sup, erlmcp_connection_events], proplists:get_value(control_plane_down, Reasons)),
    ?assertEqual({error, not_running}, ?M:subscribe(all)),
    ok = ?R:register_connection(x, self(), caps),
    ?assertEqual({ok, {self(), caps}}, ?M:await(x, 0)),
    ?assertEqual({error, timeout}, ?M:await(y, 1)),
    ?assertEqual({error, not_running}, ?M:await(y, infinity)),
    %% A subscription that is ended meanwhile does not come back.
    ?assertEqual(ok, ?M:unsubscribe({id, z})),
    {ok, _} = supervisor:restart_child(erlmcp_native_sup, erlmcp_connection_events_sup),
    Subscriber = subscriber({id, y}),
    ?assertMatch([{{default, {id, y}, Subscriber}, _}], ets:tab2list(?M)),
    ok = ?R:register_connection(z, self(), caps),
    ok = ?R:register_connection(y, self(), caps),
    ?assertEqual([{joined, y, self()}], told(Subscriber, 1)),
    receive {erlmcp_connection, joined, _, _} = Event -> error({told, Event}) after 0 -> ok end.


kill_until_down(Monitor) ->
    receive
        {'DOWN', Monitor, process, _, Reason} ->
            ?assertEqual(shutdown, Reason),
            ok
    after
        0 ->
            _ = [ kill(Pid) || Pid <- [whereis(?M)], is_pid(Pid) ],
            kill_until_down(Monitor)
    end.


%% An update writes the connection anew while its registration is about to be announced: whoever waits is told.
await_against_update(_Config) ->
    Updater = spawn_link(fun() -> update_until_stopped() end),
    [ begin
          Parent = self(),
          Waiting = spawn_link(fun() -> Parent ! {self(), ?M:await(x, infinity)} end),
          ok = ?R:register_connection(x, Parent, 0),
          receive {Waiting, {ok, {Parent, _}}} -> ok end,
          ok = ?R:unregister_connection(x)
      end || _ <- lists:seq(1, 3000) ],
    Updater ! {self(), stop},
    receive {Updater, Updates} -> ?assert(Updates > 0) end.


update_until_stopped() ->
    update_until_stopped(0).


update_until_stopped(Updates) ->
    Updated = case ?R:update_connection(x, Updates) of
                  ok -> 1;
                  {error, not_found} -> 0
              end,
    receive
        {From, stop} -> From ! {self(), Updates + Updated}
    after
        0 ->
            update_until_stopped(Updates + Updated)
    end.


subscriber_killed(_Config) ->
    Pid = process(),
    Subscribers = [ subscriber(default, all, #{max_queue => 10}) || _ <- lists:seq(1, 20) ],
    ok = ?M:subscribe(all),
    [ begin
          ok = ?R:register_connection({n, N}, Pid, caps),
          killed = kill(Each)
      end || {N, Each} <- lists:enumerate(Subscribers) ],
    ?assertEqual([ {joined, {n, N}, Pid} || N <- lists:seq(1, 20) ], events(20)),
    await_value([{{default, all, self()}, 1_000}], fun() -> ets:tab2list(?M) end),
    ?assertEqual(1, erlmcp_nif:announcements_interests(default)).


%%% Subscribers


subscriber(What) -> subscriber(default, What).


subscriber(Registry, What) -> subscriber(Registry, What, #{}).


%% A process that receives events when it is asked to. It exits with its parent at the latest.
subscriber(Registry, What, Options) -> subscriber_of(self(), Registry, What, Options).


subscriber_of(Parent, Registry, What, Options) ->
    Caller = self(),
    Pid = spawn(fun() ->
                        _ = monitor(process, Parent),
                        ok = ?M:subscribe(Registry, What, Options),
                        Caller ! {self(), subscribed},
                        subscribed()
                end),
    receive {Pid, subscribed} -> Pid end.


subscribed() ->
    receive
        {From, tell, Number} -> From ! {self(), events(Number)}, subscribed();
        skip_fillers -> skip_fillers(), subscribed();
        stop -> ok;
        {'DOWN', _, process, _, _} -> ok
    end.


skip_fillers() ->
    receive {filler, _} -> skip_fillers() after 0 -> ok end.


told(Subscriber, Number) ->
    Subscriber ! {self(), tell, Number},
    receive
        {Subscriber, Events} -> Events
    after
        2 * ?DEADLINE_MS ->
            error({not_told, Number})
    end.


%% The next events of the caller.
events(Number) ->
    [ receive
          {erlmcp_connection, Change, Id, Pid} -> {Change, Id, Pid};
          {erlmcp_connection, lost, N} -> {lost, N}
      after
          ?DEADLINE_MS ->
              error({only, Nth - 1, events, Number})
      end || Nth <- lists:seq(1, Number) ].


until_joined(Last) ->
    case events(1) of
        [{joined, Last, _}] -> [];
        [Event] -> [Event | until_joined(Last)]
    end.


%% A process that waits for an id.
awaiting(Id) ->
    spawn_monitor(fun() -> exit({awaited, ?M:await(Id, infinity)}) end).


awaited({Pid, Monitor}) ->
    receive
        {'DOWN', Monitor, process, Pid, {awaited, Result}} -> Result
    after
        ?DEADLINE_MS ->
            error(waits)
    end.


ids(Registry) ->
    [ Id || {Id, _} <- connections(Registry) ].


connections(Registry) ->
    ?R:fold_connections(Registry, fun(Id, Entry, All) -> [{Id, Entry} | All] end, []).
