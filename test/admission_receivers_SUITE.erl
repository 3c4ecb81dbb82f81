%%% What admission control charges to receivers, and how often it samples their mailboxes.
%%%
%%% The contract:
%%% With the threshold `auto' a shard admits 43 messages for each receiver. One receiver that takes nothing is refused
%%% at 10,000 messages, while the others are refused nothing. A process counts once, whatever the number of its ids. The
%%% number of samples depends on messages and not on connections. Samples are taken before a shard is full, also when its
%%% threshold was lowered, or their request was lost. A sent message counts until its process was seen to
%%% have taken it or has exited, whatever happens to its id or to the sampler. Then nothing is left of it.
-module(admission_receivers_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([stalled_receiver_among_many/1,
         process_with_many_ids/1,
         trickle_to_a_large_shard/1,
         unregistered_with_messages_waiting/1,
         receivers_that_come_and_go/1,
         samplers_killed_at_random/1,
         automatic_threshold/1,
         a_lower_threshold/1,
         a_lost_request/1,
         receivers_that_cooperate/1]).
%% Called in peer nodes
-export([in_stalled_receiver_among_many/0,
         in_process_with_many_ids/0,
         in_trickle/0,
         in_unregistered/0,
         in_coming_and_going/0,
         in_killed_samplers/0,
         in_automatic_threshold/0,
         in_lower_threshold/0,
         in_lost_request/0,
         in_cooperating/0]).

-define(A, erlmcp_admission_control).
-define(M, erlmcp_shard_manager).
%% All connections of the design point in one shard.
-define(MANY,  15_000).
-define(LIMIT, 10_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [stalled_receiver_among_many,
     process_with_many_ids,
     trickle_to_a_large_shard,
     unregistered_with_messages_waiting,
     receivers_that_come_and_go,
     samplers_killed_at_random,
     automatic_threshold,
     a_lower_threshold,
     a_lost_request,
     receivers_that_cooperate].


in_peer(Function) ->
    ?assertEqual(ok, test_support:in_peer(?MODULE, Function, [], #{timeout_ms => 120_000})).


%% One shard. Only admission control is on.
start(Admission) ->
    ok = logger:set_primary_config(level, error),
    ok = application:load(erlmcp_native),
    _ = [ ok = application:set_env(erlmcp_native, Key, Value)
          || {Key, Value} <- [{shards, 1}, {admission, Admission}, {token_bucket, infinity}, {circuit_breaker, off}] ],
    {ok, _} = application:ensure_all_started(erlmcp_native),
    test_support:await(fun() -> maps:get(sample_age_ms, ?A:get_shard_stats(0)) =/= infinity end).


%%% One receiver and the others


stalled_receiver_among_many(_Config) ->
    in_peer(in_stalled_receiver_among_many).


in_stalled_receiver_among_many() ->
    ok = start(#{threshold => auto, sample_interval_ms => 50}),
    Ids = [ {receiver, N} || N <- lists:seq(1, ?MANY) ],
    _ = [ connect(Id, spawn(fun taking/0)) || Id <- Ids ],
    Stalled = spawn(fun stalled/0),
    ok = connect(stalled, Stalled),
    #{threshold := 645_043, threshold_mode := auto} = ?A:get_shard_stats(0),
    %% Messages to the others are routed in between.
    Results = [ {?M:route_message(stalled, x), ?M:route_message(Id, x)} || Id <- Ids ],
    {Stalls, Others} = lists:unzip(Results),
    [ok] = lists:usort(Others),
    [ok, {error, shard_overloaded}] = lists:usort(Stalls),
    ok = is_filled_to_the_limit(stalled, Stalled),
    %% The shard is not overloaded.
    #{is_overloaded := false} = ?A:get_shard_stats(0),
    ok = ?A:check_admission(0),
    %% A receiver that takes its messages gets more.
    Stalled ! take,
    test_support:await(fun() -> ?M:route_message(stalled, x) =:= ok end),
    ok.


process_with_many_ids(_Config) ->
    in_peer(in_process_with_many_ids).


in_process_with_many_ids() ->
    ok = start(#{threshold => auto, sample_interval_ms => 50}),
    %% These raise the threshold of the shard above the limit of one process.
    _ = [ connect({receiver, N}, spawn(fun taking/0)) || N <- lists:seq(1, 1_000) ],
    Pid = spawn(fun stalled/0),
    Ids = [ {many, N} || N <- lists:seq(1, 1_000) ],
    _ = [ ok = connect(Id, Pid) || Id <- Ids ],
    #{threshold := 43_043, connections := 2_000} = ?A:get_shard_stats(0),
    Results = [ ?M:route_message(Id, x) || _ <- lists:seq(1, 12), Id <- Ids ],
    [ok, {error, shard_overloaded}] = lists:usort(Results),
    ok = is_filled_to_the_limit(hd(Ids), Pid),
    %% The process has one record. With nothing else to sample, each pass takes one sample.
    {_, 1} = erlmcp_nif:sample_counts(0),
    #{queue_depth := Depth} = ?A:get_shard_stats(0),
    ok = is_limit(Depth),
    %% Its messages count even without any of its ids.
    _ = [ ok = erlmcp_shard_registry:unregister_connection(Id) || Id <- Ids ],
    #{queue_depth := Left, threshold := 43_000} = ?A:get_shard_stats(0),
    ok = is_limit(Left),
    exit(Pid, kill),
    test_support:await_value(0, fun() -> maps:get(queue_depth, ?A:get_shard_stats(0)) end),
    ok.


%% Messages sent while their receiver is sampled count twice until its next sample.
is_filled_to_the_limit(Id, Pid) ->
    Fill = fun Fill() ->
                   case ?M:route_message(Id, x) of
                       ok -> Fill();
                       {error, shard_overloaded} -> element(2, process_info(Pid, message_queue_len)) >= ?LIMIT
                   end
           end,
    test_support:await(Fill),
    {message_queue_len, Messages} = process_info(Pid, message_queue_len),
    is_limit(Messages).


%% One above the limit if a sample fell between the admission of a message and its sending.
is_limit(Messages) when Messages =:= ?LIMIT; Messages =:= ?LIMIT + 1 -> ok;
is_limit(Messages) -> error({not_the_limit, Messages}).


%%% Samples


trickle_to_a_large_shard(_Config) ->
    in_peer(in_trickle).


in_trickle() ->
    ok = start(#{threshold => auto, sample_interval_ms => 20}),
    _ = [ ok = connect({receiver, N}, spawn(fun taking/0)) || N <- lists:seq(1, ?MANY) ],
    {Before, 0} = erlmcp_nif:sample_counts(0),
    Messages = 20,
    _ = [ begin
              ok = ?M:route_message({receiver, N * 100}, x),
              %% A receiver is sampled until it was seen empty twice. Then its record is freed.
              test_support:await(fun() -> element(2, erlmcp_nif:sample_counts(0)) =:= 0 end)
          end || N <- lists:seq(1, Messages) ],
    {After, 0} = erlmcp_nif:sample_counts(0),
    Looks = After - Before,
    true = Looks =< 3 * Messages orelse error({looks, Looks}),
    ok.


%%% Messages count until they are taken


unregistered_with_messages_waiting(_Config) ->
    in_peer(in_unregistered).


in_unregistered() ->
    ok = start(#{threshold => 100, sample_interval_ms => 20}),
    Pid = spawn(fun stalled/0),
    ok = connect(a, Pid),
    ok = fill(a),
    {message_queue_len, Waiting} = process_info(Pid, message_queue_len),
    ok = erlmcp_shard_registry:unregister_connection(a),
    ok = connect(b, spawn(fun taking/0)),
    ok = connect(c, Pid),
    %% Waits for longer than a shard without a sampler would refuse.
    ok = await_looks(20),
    [{error, shard_overloaded}] = lists:usort([ ?M:route_message(Id, x) || Id <- [b, c] ]),
    {message_queue_len, Waiting} = process_info(Pid, message_queue_len),
    exit(Pid, kill),
    test_support:await(fun() -> ?M:route_message(b, x) =:= ok end),
    ok.


%% Under traffic that never pauses, so that nothing is left to a pause.
receivers_that_come_and_go(_Config) ->
    in_peer(in_coming_and_going).


in_coming_and_going() ->
    ok = start(#{threshold => auto, sample_interval_ms => 20}),
    ok = erlmcp_shard_registry:register_connection(stays, spawn_link(fun take_all/0), caps),
    Parent = self(),
    Sender = spawn_link(fun() -> send_until_stopped(Parent, stays, 0) end),
    Come = fun() ->
                   Pid = spawn(fun take_all/0),
                   ok = erlmcp_shard_registry:register_connection(Pid, Pid, caps),
                   %% On a busy machine the sampler may be late for the pings.
                   test_support:await(fun() -> ?M:route_message(Pid, hello) =:= ok end),
                   Pid
           end,
    %% Some are sampled while they live.
    [ begin
          Pids = [ Come() || _ <- lists:seq(1, 100) ],
          _ = N rem 10 =:= 0 andalso timer:sleep(1),
          [ test_support:kill(Pid) || Pid <- Pids ]
      end
      || N <- lists:seq(1, 300) ],
    %% Without a record for most of the 30,000.
    test_support:await(fun() -> element(2, erlmcp_nif:sample_counts(0)) < 3_000 end, 30_000),
    Sender ! stop,
    receive {sent, Sent} -> true = Sent > 0 end,
    test_support:await_value(0, fun() -> element(2, erlmcp_nif:sample_counts(0)) end, 30_000).


take_all() ->
    receive
        {From, ping} -> From ! pong, take_all();
        _ -> take_all()
    end.


send_until_stopped(Parent, Id, Sent) ->
    _ = ?M:route_message(Id, {self(), ping}) =:= ok andalso receive pong -> ok end,
    receive
        stop -> Parent ! {sent, Sent}
    after
        0 ->
            send_until_stopped(Parent, Id, Sent + 1)
    end.


samplers_killed_at_random(_Config) ->
    in_peer(in_killed_samplers).


in_killed_samplers() ->
    ok = start(#{threshold => 500, sample_interval_ms => 5}),
    Ids = lists:seq(1, 50),
    Pids = [ begin Pid = spawn(fun taking/0), ok = connect(Id, Pid), Pid end || Id <- Ids ],
    Stalled = spawn(fun stalled/0),
    ok = connect(stalled, Stalled),
    _ = [ ok = ?M:route_message(stalled, x) || _ <- lists:seq(1, 100) ],
    Sent = counters:new(1, []),
    Sender = spawn_link(fun() -> send_until_told(Ids, Sent) end),
    ok = kill_samplers(200, 5_000, Sent),
    ok = test_support:stop(Sender),
    %% No charge was lost: the messages of the stalled receiver count. No charge is left of the others.
    test_support:await_value(100, fun() -> maps:get(queue_depth, ?A:get_shard_stats(0)) end),
    Stalled ! take,
    test_support:await_value({0, 0},
                             fun() ->
                                     {_, Active} = erlmcp_nif:sample_counts(0),
                                     {maps:get(queue_depth, ?A:get_shard_stats(0)), Active}
                             end),
    true = lists:all(fun is_process_alive/1, Pids),
    ok.


%% Kills at least `Left' samplers, and continues until so many messages have been sent.
kill_samplers(Left, Messages, Sent) ->
    case Left > 0 orelse counters:get(Sent, 1) < Messages of
        true -> kill_samplers(kill_sampler(Left), Messages, Sent);
        false -> ok
    end.


kill_sampler(Left) ->
    Manager = whereis(erlmcp_shard_manager_0),
    case process_info(Manager, monitors) of
        {monitors, [{process, Sampler} | _]} when is_pid(Sampler) ->
            exit(Sampler, kill),
            Left - 1;
        _None ->
            erlang:yield(),
            Left
    end.


send_until_told([Id | Ids], Sent) ->
    receive
        stop -> ok
    after
        0 ->
            case ?M:route_message(Id, x) of
                ok -> counters:add(Sent, 1, 1);
                {error, shard_overloaded} -> erlang:yield()
            end,
            send_until_told(Ids ++ [Id], Sent)
    end.


%%% Thresholds


automatic_threshold(_Config) ->
    in_peer(in_automatic_threshold).


in_automatic_threshold() ->
    Default = erlmcp_native_config:default(admission),
    #{threshold := auto} = Default,
    ok = start(Default),
    Stats = fun() -> maps:with([threshold, threshold_mode], ?A:get_shard_stats(0)) end,
    #{threshold := 10_000, threshold_mode := auto} = Stats(),
    Pids = [ spawn(fun taking/0) || _ <- lists:seq(1, 300) ],
    _ = [ ok = connect({c, N}, Pid) || {N, Pid} <- lists:zip(lists:seq(1, 300), Pids) ],
    #{threshold := 12_900} = Stats(),
    %% Further ids of the same processes add no receivers.
    _ = [ ok = connect({d, N}, Pid) || {N, Pid} <- lists:zip(lists:seq(1, 300), Pids) ],
    #{threshold := 12_900} = Stats(),
    _ = [ exit(Pid, kill) || Pid <- lists:nthtail(250, Pids) ],
    test_support:await_value(#{threshold => 10_750, threshold_mode => auto}, Stats),
    %% An integer is exact, and `auto' can be set again.
    ok = ?A:set_threshold(0, 77),
    #{threshold := 77, threshold_mode := 77} = Stats(),
    ok = ?A:set_threshold(0, infinity),
    #{threshold := infinity, threshold_mode := infinity} = Stats(),
    ok = ?A:set_threshold(0, auto),
    #{threshold := 10_750, threshold_mode := auto} = Stats(),
    ok = ?A:set_threshold(500),
    #{threshold := 500, threshold_mode := 500} = Stats(),
    ok = ?A:set_threshold(auto),
    #{threshold := 10_750, threshold_mode := auto} = Stats(),
    ok.


%% Entries count as receivers until the processes behind them are counted. Samples are requested at three quarters of
%% the threshold that follows. No tick takes them within the test.
a_lower_threshold(_Config) ->
    in_peer(in_lower_threshold).


in_lower_threshold() ->
    ok = start(#{threshold => auto, sample_interval_ms => 60_000}),
    {ok, _} = erlmcp_registry:start_link(),
    %% The sampler that counts the receivers is one that the first message requests.
    ok = test_support:await_samplers(),
    Connections = [ {{receiver, N}, spawn(fun taking/0)} || N <- lists:seq(1, 400) ],
    _ = [ begin
              ok = connect(Id, Pid),
              ok = erlmcp_registry:register_server(Id, Pid, #{}),
              ok = erlmcp_registry:register_transport({transport, Id}, Pid, #{})
          end
          || {Id, Pid} <- Connections ],
    %% Statistics for users would count the processes.
    Threshold = fun() -> element(2, erlmcp_nif:admission_stats(0)) end,
    51_600 = Threshold(),
    Ids = [ Id || {Id, _} <- Connections ],
    ok = ?M:route_message(hd(Ids), x),
    test_support:await_value(17_200, Threshold),
    ok = fill_to(12_901, Ids, fun(Id) -> ok = ?M:route_message(Id, x) end),
    test_support:await(fun() -> maps:get(queue_depth, ?A:get_shard_stats(0)) < 12_900 end).


%% A caller that is killed between the native call and the request leaves it to the next tick.
a_lost_request(_Config) ->
    in_peer(in_lost_request).


in_lost_request() ->
    ok = start(#{threshold => 10_000, sample_interval_ms => 50}),
    Ids = [ {receiver, N} || N <- lists:seq(1, 100) ],
    _ = [ ok = connect(Id, spawn(fun taking/0)) || Id <- Ids ],
    %% The first message of a shard requests a sample. A pass sets when the next ones are due.
    ok = ?M:route_message(hd(Ids), x),
    test_support:await_value(0, fun() -> maps:get(queue_depth, ?A:get_shard_stats(0)) end),
    Route = fun(Id) ->
                    case erlmcp_nif:route_connection(Id) of
                        {Pid, _Requests} -> Pid ! x;
                        Pid -> Pid ! x
                    end
            end,
    ok = fill_to(7_501, Ids, Route),
    %% Ticks go on as long as messages come.
    test_support:await(fun() ->
                               _ = Route(hd(Ids)),
                               maps:get(queue_depth, ?A:get_shard_stats(0)) < 7_500
                       end).


%% Sends messages until so many of them count.
fill_to(Depth, Ids, Route) ->
    lists:foreach(Route, Ids),
    case ?A:get_shard_stats(0) of
        #{queue_depth := Now} when Now < Depth - length(Ids) -> fill_to(Depth, Ids, Route);
        #{queue_depth := Now} -> lists:foreach(Route, lists:sublist(Ids, Depth - Now))
    end.


%% Messages that a receiver reports as taken make room at once, and are subtracted once.
receivers_that_cooperate(_Config) ->
    in_peer(in_cooperating).


in_cooperating() ->
    ok = start(#{threshold => 100, sample_interval_ms => 20}),
    Depth = fun() -> maps:get(queue_depth, ?A:get_shard_stats(0)) end,
    ok = connect(me, self()),
    ok = fill(me),
    _ = [ receive x -> ok end || _ <- lists:seq(1, 40) ],
    ok = ?A:update_queue_depth(0, -40),
    {message_queue_len, Waiting} = process_info(self(), message_queue_len),
    test_support:await_value(Waiting, Depth),
    ok = await_looks(3),
    Waiting = Depth(),
    ok = ?M:route_message(me, x),
    %% Messages that it reports from other sources are not in its mailbox, and soon stop counting.
    ok = ?A:update_queue_depth(0, 10),
    test_support:await_value(Waiting + 1, Depth),
    ok.


%%% Receivers


connect(Id, Pid) ->
    erlmcp_shard_registry:register_connection(Id, Pid, #{}).


taking() ->
    receive _ -> taking() end.


stalled() ->
    receive take -> taking() end.


%% Sends until the receiver is refused even after new samples.
fill(Id) ->
    case fill_once(Id, 0) of
        0 -> ok;
        _More -> ok = await_looks(3), fill(Id)
    end.


fill_once(Id, Accepted) ->
    case ?M:route_message(Id, x) of
        ok -> fill_once(Id, Accepted + 1);
        {error, shard_overloaded} -> Accepted
    end.


%% Waits until so many more mailboxes were sampled.
await_looks(More) ->
    {Looks, _} = erlmcp_nif:sample_counts(0),
    test_support:await(fun() -> element(1, erlmcp_nif:sample_counts(0)) >= Looks + More end).
