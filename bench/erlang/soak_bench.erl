%%% A steady load for minutes: does memory grow?
%%%
%%% In a separate VM there are as many connections as `--connections' says, each an `erlmcp_connection' that also is a server
%%% and its own transport. All layers have their default configuration. One process makes each second:
%%%
%%% <ul>
%%% <li>20,000 routes to random connections, half of them by `route_message/2' and half by `route_to_server/3'</li>
%%% <li>200 deaths: a random process is killed, or unregisters its connection and exits; another one is started in its place, with
%%% new ids, and registers them</li>
%%% <li>200 changes of capabilities to a term that no other connection has</li>
%%% <li>a change of the token buckets' limits</li>
%%% </ul>
%%%
%%% On a machine that is too slow it makes fewer; the rates that it has reached are rows. The resident memory of the VM is read
%%% once a second, without a garbage collection.
%%%
%%% *The verdict* is about the second half of the time: the growth along the line of least squares through its samples, in
%%% percent of their mean. At most one percent is flat. At the end all processes exit, and the registry must be empty.
-module(soak_bench).
-behaviour(supervisor).

-export([run/1]).
%% In the peer
-export([measure/2]).
-export([init/1]).

-type sample() :: #{seconds := float(), resident := pos_integer(), vm := pos_integer(), connections := non_neg_integer()}.

-record(load, {
          supervisor :: pid(),
          %% {Slot, Serial, Pid}: the present connection of each slot. A serial number is used once.
          slots :: ets:table(),
          size :: pos_integer(),
          next :: pos_integer(),
          request = bench_session:request() :: binary(),
          routes = 0 :: non_neg_integer(),
          deaths = 0 :: non_neg_integer(),
          changes = 0 :: non_neg_integer(),
          %% Operations with another result than `ok'.
          failed = #{} :: #{term() => pos_integer()}
         }).

-define(SLICE_MS,       10).
-define(ROUTES_A_SLICE, 200).
-define(DEATHS_A_SLICE, 2).
-define(LATE_MS,        100).
%% Short, so that most sessions hibernate at any time, also when the load falters.
-define(HIBERNATE_MS, 100).
-define(SAMPLE_MS,    1000).
-define(POINTS,       20).
%% A thread frees what it has removed in batches of some dozens, and an idle one keeps its last batch.
-define(KEPT_CONFIGS, 100.0).
-define(FLAT_PERCENT, 1.0).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Connections, minutes := Minutes, progress := Progress}) ->
    Peer = bench_peer:start(),
    Result = bench_peer:call(Peer, ?MODULE, measure, [Connections, Minutes]),
    ok = bench_peer:stop(Peer),
    _ = Progress(),
    #{samples := Samples, routes := Routes, deaths := Deaths, failed := Failed, left := Left, configs_left := ConfigsLeft} = Result,
    Failed =:= #{} orelse io:format(standard_error, " failed: ~0p ", [Failed]),
    {_, Second} = lists:split(length(Samples) div 2, Samples),
    {BytesASecond, Mean} = trend(Second),
    HalfSeconds = Minutes * 30,
    DeathsASecond = Deaths / (Minutes * 60),
    Size = fun(Name, Figure, Unit) -> bench_report:size_row("soak", Name, float(Figure), Unit, none, none) end,
    Floor = fun(Limit, Row) -> bench_report:floor(figure, Limit, Row) end,
    [bench_report:series("resident memory",
                         points(Samples),
                         Floor(?FLAT_PERCENT, Size("growth in the second half", 100 * BytesASecond * HalfSeconds / Mean, "%"))),
     Size("the same for each death and registration", BytesASecond / DeathsASecond, "B"),
     Size("resident memory in the second half", Mean / 1.0e6, "MB"),
     Size("routes a second", Routes / (Minutes * 60), ""),
     Size("deaths and registrations a second", DeathsASecond, ""),
     Floor(0.0, Size("failed operations", lists:sum(maps:values(Failed)), "")),
     Floor(0.0, Size("entries left when all have exited", Left, "")),
     Floor(?KEPT_CONFIGS, Size("configs left when all have exited", ConfigsLeft, ""))].


%% The slope in bytes a second, and the mean in bytes.
-spec trend([sample()]) -> {float(), float()}.
trend(Samples) ->
    Number = length(Samples),
    Mean = fun(Key) -> lists:sum([ map_get(Key, Sample) || Sample <- Samples ]) / Number end,
    {MeanSeconds, MeanBytes} = {Mean(seconds), Mean(resident)},
    {Covariance, Variance} = lists:foldl(fun(#{seconds := Seconds, resident := Bytes}, {C, V}) ->
                                                 Distance = Seconds - MeanSeconds,
                                                 {C + Distance * (Bytes - MeanBytes), V + Distance * Distance}
                                         end,
                                         {0.0, 0.0},
                                         Samples),
    {Covariance / Variance, MeanBytes}.


%% About twenty samples, evenly spaced.
-spec points([sample()]) -> [bench_report:point()].
points(Samples) ->
    Every = max(1, length(Samples) div ?POINTS),
    [ #{
        seconds => Seconds,
        resident_mb => Resident / 1.0e6,
        vm_mb => Vm / 1.0e6,
        connections => Connections
       }
      || {N, #{seconds := Seconds, resident := Resident, vm := Vm, connections := Connections}} <- lists:enumerate(Samples),
         N rem Every =:= 0 ].


%%% In the peer


-spec measure(pos_integer(), float()) ->
          #{samples := [sample()], routes | deaths | changes | left | configs_left := non_neg_integer(), failed := map()}.
measure(Connections, Minutes) ->
    %% The supervisor reports each process that is killed.
    ok = logger:set_primary_config(level, none),
    ConfigsBefore = erlmcp_nif:distinct_configs(),
    {ok, Supervisor} = supervisor:start_link(?MODULE, []),
    End = erlang:monotonic_time(millisecond) + round(Minutes * 60_000),
    Asking = self(),
    {Driver, Monitor} = spawn_monitor(fun() ->
                                              Load = filled(Supervisor, Connections),
                                              Asking ! {self(), filled},
                                              exit({done, driven(erlang:monotonic_time(millisecond), End, Load)})
                                      end),
    receive {Driver, filled} -> ok end,
    Samples = samples(erlang:monotonic_time(millisecond), 0, End),
    #load{routes = Routes, deaths = Deaths, changes = Changes, failed = Failed} =
        receive {'DOWN', Monitor, process, Driver, {done, Done}} -> Done end,
    true = unlink(Supervisor),
    Stopped = monitor(process, Supervisor),
    true = exit(Supervisor, shutdown),
    receive {'DOWN', Stopped, process, Supervisor, _} -> ok end,
    Left = entries_left(100),
    #{
      samples => Samples,
      routes => Routes,
      deaths => Deaths,
      changes => Changes,
      failed => Failed,
      left => Left,
      configs_left => max(0, erlmcp_nif:distinct_configs() - ConfigsBefore)
     }.


-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    Child = #{id => connection, start => {erlmcp_connection, start_link, []}, restart => temporary},
    {ok, {#{strategy => simple_one_for_one}, [Child]}}.


-spec samples(integer(), non_neg_integer(), integer()) -> [sample()].
samples(Start, N, End) when Start + N * ?SAMPLE_MS >= End ->
    [];
samples(Start, N, End) ->
    ok = sleep_until(Start + N * ?SAMPLE_MS),
    Sample = #{
               seconds => float(N * ?SAMPLE_MS) / 1000,
               resident => bench_peer:resident_now(),
               vm => erlang:memory(total),
               connections => erlmcp_shard_registry:count()
              },
    [Sample | samples(Start, N + 1, End)].


-spec sleep_until(integer()) -> ok.
sleep_until(DueMs) ->
    timer:sleep(max(0, DueMs - erlang:monotonic_time(millisecond))).


%% Zero, or what is left after so many looks, a tenth of a second each.
-spec entries_left(non_neg_integer()) -> non_neg_integer().
entries_left(Looks) ->
    ok = free(),
    #{servers := Servers, transports := Transports, connections := Connections} = erlmcp_shard_registry:stats(),
    case Servers + Transports + Connections of
        0 ->
            0;
        Some when Looks =:= 0 ->
            Some;
        _ ->
            ok = timer:sleep(100),
            entries_left(Looks - 1)
    end.


%% Each scheduler frees what it has removed some operations later.
-spec free() -> ok.
free() ->
    bench_population:await([ spawn_opt(fun() -> lists:foreach(fun register_and_unregister/1, lists:seq(1, 300)) end,
                                       [monitor, {scheduler, Scheduler}])
                             || Scheduler <- lists:seq(1, erlang:system_info(schedulers_online)) ]).


-spec register_and_unregister(pos_integer()) -> ok.
register_and_unregister(N) ->
    Id = {?MODULE, self(), N},
    ok = erlmcp_shard_registry:register_connection(Id, self(), none),
    erlmcp_shard_registry:unregister_connection(Id).


%%% The load


-spec filled(pid(), pos_integer()) -> #load{}.
filled(Supervisor, Size) ->
    Empty = #load{supervisor = Supervisor, slots = ets:new(?MODULE, [set, private]), size = Size, next = 1},
    lists:foldl(fun started/2, Empty, lists:seq(1, Size)).


%% Starts a new connection in a slot.
-spec started(pos_integer(), #load{}) -> #load{}.
started(Slot, #load{supervisor = Supervisor, slots = Slots, next = Serial} = Load) ->
    Id = bench_population:id(Serial),
    Config = bench_population:small_config(),
    Options = #{id => Id, module => bench_session, capabilities => Config, hibernate_after_ms => ?HIBERNATE_MS},
    {ok, Pid} = supervisor:start_child(Supervisor, [Options]),
    true = ets:insert(Slots, {Slot, Serial, Pid}),
    Results = [erlmcp_registry:register_server(Id, Pid, Config),
               erlmcp_registry:register_transport(bench_population:transport(Id), Pid, Config#{server_id => Id})],
    lists:foldl(fun counted/2, Load#load{next = Serial + 1}, Results).


-spec counted(ok | {error, term()}, #load{}) -> #load{}.
counted(ok, Load) ->
    Load;
counted({error, Reason}, #load{failed = Failed} = Load) ->
    Load#load{failed = maps:update_with(Reason, fun(Number) -> Number + 1 end, 1, Failed)}.


%% A slice that is late by much begins a new schedule, so that the load stays steady.
-spec driven(DueMs :: integer(), EndMs :: integer(), #load{}) -> #load{}.
driven(Due, End, Load) when Due >= End ->
    Load;
driven(Due, End, Load) ->
    ok = sleep_until(Due),
    Now = erlang:monotonic_time(millisecond),
    Done = slice(Load),
    Next = case Now - Due > ?LATE_MS of
               true -> Now;
               false -> Due
           end,
    driven(Next + ?SLICE_MS, End, Done).


-spec slice(#load{}) -> #load{}.
slice(Load) ->
    Routed = times(?ROUTES_A_SLICE, fun routed/1, Load),
    Changed = times(?DEATHS_A_SLICE, fun changed/1, times(?DEATHS_A_SLICE, fun replaced/1, Routed)),
    case Changed#load.changes rem (?DEATHS_A_SLICE * 1000 div ?SLICE_MS) of
        0 -> counted(erlmcp_native:set(token_bucket, #{capacity => 1000 + Changed#load.changes rem 7}), Changed);
        _ -> Changed
    end.


-spec times(non_neg_integer(), fun((#load{}) -> #load{}), #load{}) -> #load{}.
times(0, _Do, Load) -> Load;
times(N, Do, Load) -> times(N - 1, Do, Do(Load)).


-spec random(#load{}) -> {pos_integer(), binary(), pid()}.
random(#load{slots = Slots, size = Size}) ->
    [{Slot, Serial, Pid}] = ets:lookup(Slots, rand:uniform(Size)),
    {Slot, bench_population:id(Serial), Pid}.


-spec routed(#load{}) -> #load{}.
routed(#load{routes = Routes, request = Request} = Load) ->
    {_, Id, _} = random(Load),
    Transport = bench_population:transport(Id),
    Result = case Routes rem 2 of
                 0 -> erlmcp_shard_manager:route_message(Id, {mcp_message, Transport, Request});
                 1 -> erlmcp_registry:route_to_server(Id, Transport, Request)
             end,
    counted(Result, Load#load{routes = Routes + 1}).


-spec replaced(#load{}) -> #load{}.
replaced(#load{deaths = Deaths} = Load) ->
    {Slot, Id, Pid} = random(Load),
    true = case Deaths rem 2 of
               0 ->
                   exit(Pid, kill);
               1 ->
                   ok = erlmcp_shard_registry:unregister_connection(Id),
                   exit(Pid, shutdown)
           end,
    started(Slot, Load#load{deaths = Deaths + 1}).


-spec changed(#load{}) -> #load{}.
changed(#load{changes = Changes} = Load) ->
    {_, Id, _} = random(Load),
    Config = (bench_population:small_config())#{version => integer_to_binary(Changes)},
    counted(erlmcp_shard_registry:update_connection(Id, Config), Load#load{changes = Changes + 1}).
