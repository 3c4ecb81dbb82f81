%%% Groups of processes, against OTP's pg and Elixir's Registry with duplicate keys, where Elixir is installed.
%%%
%%% One group has as many members as there are connections, each a process of its own. The three keep to what each is
%%% made for: pg has a scope of its own on this node, and Elixir's Registry as many partitions as schedulers. Its functions
%%% work on the calling process alone, so the members register themselves.
%%%
%%% *Churn*: of a second group of ten times as many members, 1,000 members a second leave and join again, each at a time that
%%% is due independently of the others, while a sender for each scheduler routes to all connections. What is measured is the
%%% time from when it is due until the member has left and joined, and the messages of the senders meanwhile.
-module(group_bench).

-export([run/1]).

-type system() :: native | pg | elixir.

-define(GROUP,     {resource, <<"file:///log">>}).
-define(CROWD,     {resource, <<"file:///crowd">>}).
-define(SCOPE,     group_bench_scope).
-define(DUPLICATE, group_bench_duplicate).
-define(UNIQUE,    group_bench_unique).
-define(MESSAGE,   <<"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/resources/updated\"}">>).

-define(CHURN_FACTOR,     10).
-define(CHURN_PER_SECOND, 1000).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, seconds := Seconds, progress := Progress}) ->
    Systems = systems(),
    Owners = lists:append([ start(System) || System <- Systems ]),
    Delivered = counters:new(1, [write_concurrency]),
    {_, Members} = Population = bench_population:start(Count, fun() -> member(Delivered) end),
    Pids = [ Pid || {_Id, Pid} <- Members ],
    Ids = [ Id || {Id, _Pid} <- Members ],
    lists:foreach(fun({Id, Pid}) -> ok = erlmcp_shard_registry:register_connection(Id, Pid, none) end, Members),
    ok = lists:foreach(fun(System) -> fill(System, ?GROUP, Pids) end, Systems),
    Figures = bench_rounds:interleave(
                Rounds,
                [ {{Work, System}, fun() -> measure(Work, System, Pids, Ids, Delivered) end}
                  || Work <- [join, members, one, all, found], System <- Systems, {Work, System} =/= {found, pg} ],
                Progress),
    {_, Crowd} = Others = bench_population:start(?CHURN_FACTOR * Count, fun() -> member(Delivered) end),
    ok = lists:foreach(fun(System) -> fill(System, ?CROWD, [ Pid || {_Id, Pid} <- Crowd ]) end, Systems),
    Churn = [ {System, [ churn(System, [ Pid || {_Id, Pid} <- Crowd ], Ids, Seconds) || _ <- lists:seq(1, min(3, Rounds)) ]} || System <- [nothing | Systems] ],
    %% Before the members exit: pg writes its list anew for each of them.
    ok = stop_all(Owners),
    ok = bench_population:stop(Others),
    ok = bench_population:stop(Population),
    [ bench_report:time_row("groups", name(Work, Count), map_get({Work, native}, Figures), peer(Work, System), Peer)
      || Work <- [join, members, one, all, found],
         System <- Systems -- [native],
         {ok, Peer} <- [maps:find({Work, System}, Figures)] ] ++
    churn_rows(Churn, ?CHURN_FACTOR * Count).


-spec name(atom(), pos_integer()) -> string().
name(join, Count) -> "leave/2 and join/2, " ++ bench_report:thousands(Count) ++ " members";
name(members, Count) -> "members/1 of " ++ bench_report:thousands(Count);
name(one, Count) -> "route_member/3, one of " ++ bench_report:thousands(Count);
name(all, Count) -> "route_group/2 to " ++ bench_report:thousands(Count) ++ ", each";
name(found, _Count) -> "register_or_find_connection/3, found".


-spec peer(atom(), system()) -> string().
peer(join, pg) -> "pg:leave/3, join/3";
peer(members, pg) -> "pg:get_members/2";
peer(one, pg) -> "pg, a random one of the list, !";
peer(all, pg) -> "pg, ! to each of the list";
peer(join, elixir) -> "Elixir's Registry, register, unregister";
peer(members, elixir) -> "Elixir's Registry, lookup";
peer(one, elixir) -> "Elixir's Registry, a random one of the list, !";
peer(all, elixir) -> "Elixir's Registry, dispatch";
peer(found, elixir) -> "Elixir's Registry, register, already registered".


%%% The systems


-spec systems() -> [system(), ...].
systems() ->
    case bench_elixir:start() of
        ok -> [native, pg, elixir];
        not_installed -> [native, pg]
    end.


%% The processes that a system ends with.
-spec start(system()) -> [pid()].
start(native) ->
    [];
start(pg) ->
    {ok, Scope} = pg:start_link(?SCOPE),
    [Scope];
start(elixir) ->
    [ begin
          Options = [{keys, Keys}, {name, Name}, {partitions, erlang:system_info(schedulers_online)}],
          {ok, Supervisor} = 'Elixir.Registry':start_link(Options),
          Supervisor
      end || {Name, Keys} <- [{?DUPLICATE, duplicate}, {?UNIQUE, unique}] ].


%% A partition of Elixir's Registry has a link to each member, and takes longer to exit than its supervisor waits, which
%% would be reported.
-spec stop_all([pid()]) -> ok.
stop_all(Owners) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    ok = lists:foreach(fun stop/1, Owners),
    logger:set_primary_config(level, Level).


%% By the signal that a supervisor sends: a crash would be reported with the state of every member.
-spec stop(pid()) -> ok.
stop(Owner) ->
    true = unlink(Owner),
    Monitor = monitor(process, Owner),
    true = exit(Owner, shutdown),
    receive {'DOWN', Monitor, process, Owner, _} -> ok end.


-spec fill(system(), term(), [pid()]) -> ok.
fill(native, Group, Pids) ->
    lists:foreach(fun(Pid) -> ok = erlmcp_group:join(Group, Pid) end, Pids);
fill(pg, Group, Pids) ->
    ok = pg:join(?SCOPE, Group, Pids);
fill(elixir, Group, Pids) ->
    lists:foreach(fun(Pid) -> Pid ! {register, Group, self()} end, Pids),
    lists:foreach(fun(Pid) -> receive {Pid, registered} -> ok end end, Pids).


%% Counts the messages to a group.
-spec member(counters:counters_ref()) -> no_return().
member(Delivered) ->
    receive
        ?MESSAGE ->
            ok = counters:add(Delivered, 1, 1);
        {register, Group, From} ->
            {ok, _} = 'Elixir.Registry':register(?DUPLICATE, Group, none),
            From ! {self(), registered};
        {rejoin, System, At, From} ->
            ok = rejoin(System),
            From ! {rejoined, erlang:monotonic_time() - At};
        _Load ->
            ok
    end,
    member(Delivered).


%%% One function


%% Nanoseconds, of a message to all for each member.
-spec measure(join | members | one | all | found, system(), [pid()], [binary()], counters:counters_ref()) -> float().
measure(join, System, Pids, _Ids, _Delivered) ->
    Some = lists:sublist(bench_population:shuffled(Pids), repetitions(System)),
    each(1, fun() -> lists:foreach(fun(Pid) -> ok = leave_and_join(System, Pid) end, Some) end) / length(Some);
measure(members, System, Pids, _Ids, _Delivered) ->
    Count = length(Pids),
    each(10, fun() -> Count = length(members(System)) end);
measure(one, System, _Pids, _Ids, Delivered) ->
    ok = counters:put(Delivered, 1, 0),
    Repetitions = case System of
                      native -> 10_000;
                      _ -> 100
                  end,
    Ns = each(Repetitions, fun() -> ok = send_one(System) end),
    ok = await(Delivered, Repetitions),
    Ns;
measure(all, System, Pids, _Ids, Delivered) ->
    ok = counters:put(Delivered, 1, 0),
    each(5,
         fun() ->
                 ok = counters:put(Delivered, 1, 0),
                 ok = send_all(System),
                 await(Delivered, length(Pids))
         end) /
    length(Pids);
measure(found, System, _Pids, Ids, _Delivered) ->
    Some = lists:sublist(Ids, 1000),
    Holder = holder(System, Some),
    Ns = each(20, fun() -> lists:foreach(fun(Id) -> ok = found(System, Id) end, Some) end),
    exit(Holder, kill),
    Ns / length(Some).


%% pg writes the list of members anew.
-spec repetitions(system()) -> pos_integer().
repetitions(native) -> 5000;
repetitions(pg) -> 50;
repetitions(elixir) -> 5000.


-spec each(pos_integer(), fun(() -> term())) -> float().
each(Repetitions, Fun) ->
    Start = erlang:monotonic_time(),
    ok = repeat(Repetitions, Fun),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond) / Repetitions.


-spec repeat(non_neg_integer(), fun(() -> term())) -> ok.
repeat(0, _Fun) ->
    ok;
repeat(Left, Fun) ->
    _ = Fun(),
    repeat(Left - 1, Fun).


%% A member, but in Elixir's Registry the calling process.
-spec leave_and_join(system(), pid()) -> ok.
leave_and_join(native, Pid) ->
    ok = erlmcp_group:leave(?GROUP, Pid),
    ok = erlmcp_group:join(?GROUP, Pid);
leave_and_join(pg, Pid) ->
    ok = pg:leave(?SCOPE, ?GROUP, Pid),
    ok = pg:join(?SCOPE, ?GROUP, Pid);
leave_and_join(elixir, _Pid) ->
    {ok, _} = 'Elixir.Registry':register(?DUPLICATE, ?GROUP, none),
    ok = 'Elixir.Registry':unregister(?DUPLICATE, ?GROUP).


-spec members(system()) -> [pid() | {pid(), term()}].
members(native) -> erlmcp_group:members(?GROUP);
members(pg) -> pg:get_members(?SCOPE, ?GROUP);
members(elixir) -> 'Elixir.Registry':lookup(?DUPLICATE, ?GROUP).


-spec send_one(system()) -> ok.
send_one(native) ->
    erlmcp_group:route_member(?GROUP, round_robin, ?MESSAGE);
send_one(System) ->
    Members = members(System),
    case lists:nth(rand:uniform(length(Members)), Members) of
        {Pid, none} -> Pid ! ?MESSAGE;
        Pid -> Pid ! ?MESSAGE
    end,
    ok.


-spec send_all(system()) -> ok.
send_all(native) ->
    erlmcp_group:route_group(?GROUP, ?MESSAGE);
send_all(pg) ->
    lists:foreach(fun(Pid) -> Pid ! ?MESSAGE end, members(pg));
send_all(elixir) ->
    Send = fun(Entries) -> lists:foreach(fun({Pid, none}) -> Pid ! ?MESSAGE end, Entries) end,
    'Elixir.Registry':dispatch(?DUPLICATE, ?GROUP, Send).


%% A process that has these ids.
-spec holder(system(), [binary()]) -> pid().
holder(System, Ids) ->
    Asking = self(),
    Pid = spawn(fun() ->
                        lists:foreach(fun(Id) -> ok = hold(System, Id) end, Ids),
                        Asking ! {self(), holds},
                        receive stop -> ok end
                end),
    receive {Pid, holds} -> Pid end.


%% The connections are registered already.
-spec hold(system(), binary()) -> ok.
hold(native, _Id) ->
    ok;
hold(elixir, Id) ->
    {ok, _} = 'Elixir.Registry':register(?UNIQUE, Id, none),
    ok.


-spec found(system(), binary()) -> ok.
found(native, Id) ->
    {found, _} = erlmcp_shard_registry:register_or_find_connection(Id, self(), none),
    ok;
found(elixir, Id) ->
    {error, {already_registered, _}} = 'Elixir.Registry':register(?UNIQUE, Id, none),
    ok.


%% Does not sleep: a millisecond is a twentieth of what is measured.
-spec await(counters:counters_ref(), pos_integer()) -> ok.
await(Delivered, Total) ->
    case counters:get(Delivered, 1) of
        Total ->
            ok;
        Fewer when Fewer < Total ->
            erlang:yield(),
            await(Delivered, Total)
    end.


%%% Churn beside a full load

-type churned() :: #{ns_95 := float(), messages_per_second := float()}.


-spec churn(system() | nothing, [pid()], [binary()], float()) -> churned().
churn(System, Crowd, Ids, Seconds) ->
    Sent = counters:new(1, [write_concurrency]),
    Senders = [ spawn_link(fun() -> send_for_ever(Ids, Ids, Sent) end)
                || _ <- lists:seq(1, erlang:system_info(schedulers_online)) ],
    Rejoining = lists:sublist(Crowd, trunc(Seconds * ?CHURN_PER_SECOND)),
    Start = erlang:monotonic_time(),
    ok = lists:foreach(fun({N, Pid}) ->
                               At = Start + erlang:convert_time_unit(N * 1_000_000 div ?CHURN_PER_SECOND, microsecond, native),
                               ok = bench_open_loop:sleep_until(At),
                               Pid ! {rejoin, System, At, self()}
                       end,
                       lists:enumerate(Rejoining)),
    Delays = [ receive {rejoined, Delay} -> Delay end || _ <- Rejoining ],
    MessagesPerSecond = counters:get(Sent, 1) / bench_report:seconds(erlang:monotonic_time() - Start),
    ok = lists:foreach(fun stop/1, Senders),
    Ns = lists:nth(max(1, length(Delays) * 95 div 100), lists:sort(Delays)),
    #{ns_95 => erlang:convert_time_unit(Ns, native, nanosecond) / 1, messages_per_second => MessagesPerSecond}.


-spec rejoin(system() | nothing) -> ok.
rejoin(nothing) ->
    ok;
rejoin(native) ->
    ok = erlmcp_group:leave(?CROWD, self()),
    ok = erlmcp_group:join(?CROWD, self());
rejoin(pg) ->
    ok = pg:leave(?SCOPE, ?CROWD, self()),
    ok = pg:join(?SCOPE, ?CROWD, self());
rejoin(elixir) ->
    ok = 'Elixir.Registry':unregister(?DUPLICATE, ?CROWD),
    {ok, _} = 'Elixir.Registry':register(?DUPLICATE, ?CROWD, none),
    ok.


%% A message that is refused, because its receiver has not been scheduled for long, does not count.
-spec send_for_ever([binary()], [binary()], counters:counters_ref()) -> no_return().
send_for_ever([], Ids, Sent) ->
    send_for_ever(Ids, Ids, Sent);
send_for_ever([Id | Left], Ids, Sent) ->
    case erlmcp_shard_manager:route_message(Id, load) of
        ok -> ok = counters:add(Sent, 1, 1);
        {error, _} -> true = erlang:yield()
    end,
    send_for_ever(Left, Ids, Sent).


-spec churn_rows([{system() | nothing, [churned()]}], pos_integer()) -> [bench_report:row()].
churn_rows(Churn, Members) ->
    Of = fun(System, Key) -> [ map_get(Key, Churned) || Churned <- proplists:get_value(System, Churn) ] end,
    Name = bench_report:thousands(?CHURN_PER_SECOND) ++ " rejoins/s of " ++ bench_report:thousands(Members),
    Load = fun(Against, System) ->
                   bench_report:rate_row("groups",
                                         "load beside " ++ Name,
                                         Of(native, messages_per_second),
                                         Against,
                                         Of(System, messages_per_second))
           end,
    [Load("load alone", nothing) | lists:append([ [Load("load beside " ++ system(System), System),
                                                   bench_report:time_row("groups", Name ++ ", p95", Of(native, ns_95), system(System), Of(System, ns_95))]
                                                  || {System, _} <- Churn, System =/= nothing, System =/= native ])].


-spec system(system()) -> string().
system(pg) -> "pg";
system(elixir) -> "Elixir's Registry".
