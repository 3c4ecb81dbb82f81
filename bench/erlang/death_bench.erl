%%% Many connections exit at once: how long until the registry is clean.
%%%
%%% In a separate VM there is one process per connection. All of them are linked to a few hubs, one per
%%% scheduler. The hubs are killed, as if a listener crashed. The clock runs from the kill until the registry
%%% counts no connection. The same number of processes without registrations is killed first, which shows the
%%% VM's own part of the time.
%%%
%%% *Probe*: meanwhile a process routes a message to a connection every millisecond, on schedule, and waits for the answer. The
%%% latency counts from the scheduled time, so a probe that is late counts as slow. One pair of processes has normal priority: it
%%% waits in the run queues behind the processes that exit, as all others do. The other pair has high priority: it waits only for
%%% what a scheduler does in one go. In both runs the same.
%%%
%%% *Memory*: resident memory of that VM before there are any connections, with all of them, and once they are gone.
-module(death_bench).

-export([run/1]).
%% In the peer
-export([die/2, connection/0]).

-type result() :: #{seconds := float(), normal := bench_histogram:counts(), high := bench_histogram:counts(), before := pos_integer(), peak := pos_integer(), later := pos_integer()}.

%% In words. This is the minimum of the VM.
-define(HEAP,              12).
-define(PROBE_INTERVAL_US, 1000).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{deaths := Deaths, progress := Progress}) ->
    Peer = bench_peer:start(),
    Alone = bench_peer:call(Peer, ?MODULE, die, [Deaths, alone]),
    _ = Progress(),
    Registered = bench_peer:call(Peer, ?MODULE, die, [Deaths, registered]),
    _ = Progress(),
    ok = bench_peer:stop(Peer),
    Name = bench_report:thousands(Deaths) ++ " at once, ",
    Row = fun(What, Figure, Unit) ->
                  bench_report:size_row("deaths", Name ++ What, Figure(Registered), Unit, "the processes alone", Figure(Alone))
          end,
    [bench_report:floor(figure, 30.0, bench_report:growth(Row("until clean", fun(#{seconds := Seconds}) -> Seconds end, "s"))),
     bench_report:growth(Row("probe, p99", probe(normal, 0.99), "ms")),
     bench_report:growth(Row("probe, slowest", probe(normal, 1.0), "ms")),
     bench_report:growth(Row("high-priority probe, p99", probe(high, 0.99), "ms")),
     bench_report:growth(Row("high-priority probe, slowest", probe(high, 1.0), "ms")),
     bench_report:growth(Row("memory, most", fun(#{peak := Bytes}) -> Bytes / 1.0e6 end, "MB")),
     bench_report:growth(Row("memory that stays", fun(#{before := Before, later := Later}) -> (Later - Before) / 1.0e6 end, "MB"))].


-spec probe(normal | high, float()) -> fun((result()) -> float()).
probe(Priority, Quantile) ->
    fun(#{Priority := Counts}) -> hd(bench_histogram:percentiles([Quantile], Counts)) end.


%%% In the peer


%% `seconds': from the kill to the exit of the last process, or to the removal of the last registration. Memory in bytes.
-spec die(pos_integer(), alone | registered) -> result().
die(Deaths, Kind) ->
    Resident = bench_peer:resident(),
    Echoes = [ {Priority, start_echo(Priority)} || Priority <- [normal, high] ],
    Before = erlang:system_info(process_count),
    Ranges = bench_population:ranges(Deaths, erlang:system_info(schedulers_online)),
    Asking = self(),
    Hubs = [ spawn(fun() ->
                           ok = populate(First, Last, Kind),
                           Asking ! {self(), ready},
                           receive stop -> ok end
                   end)
             || {First, Last} <- Ranges ],
    lists:foreach(fun(Hub) -> receive {Hub, ready} -> ok end end, Hubs),
    Expected = case Kind of
                   alone -> length(Echoes);
                   registered -> Deaths + length(Echoes)
               end,
    Expected = erlmcp_shard_registry:count(),
    Peak = bench_peer:resident_now(),
    Probes = [ {Priority, start_probe(Priority)} || {Priority, _} <- Echoes ],
    Start = erlang:monotonic_time(),
    lists:foreach(fun(Hub) -> exit(Hub, kill) end, Hubs),
    ok = await_processes(Kind, Before + length(Probes)),
    ok = await_clean(length(Echoes)),
    Time = erlang:monotonic_time() - Start,
    Counts = maps:from_list([ {Priority, stop_probe(Probe)} || {Priority, Probe} <- Probes ]),
    lists:foreach(fun({Priority, Echo}) ->
                          ok = erlmcp_shard_registry:unregister_connection(Priority),
                          Echo ! stop
                  end,
                  Echoes),
    Counts#{
      seconds => bench_report:seconds(Time),
      before => Resident,
      peak => Peak,
      later => bench_peer:resident()
     }.


%% Its id is its priority.
-spec start_echo(normal | high) -> pid().
start_echo(Priority) ->
    Echo = spawn_opt(fun echo/0, [{priority, Priority}]),
    ok = erlmcp_shard_registry:register_connection(Priority, Echo, connected),
    ok = erlmcp_token_bucket:set_limits(Priority, infinity),
    Echo.


-spec echo() -> ok.
echo() ->
    receive
        {From, Reference} ->
            From ! Reference,
            echo();
        stop ->
            ok
    end.


-spec start_probe(normal | high) -> {pid(), bench_histogram:histogram()}.
start_probe(Priority) ->
    Latencies = bench_histogram:new(),
    Probe = fun() -> probe(Priority, Latencies, erlang:monotonic_time(microsecond)) end,
    {spawn_opt(Probe, [{priority, Priority}]), Latencies}.


%% Until it is told to stop, and once at least.
-spec probe(normal | high, bench_histogram:histogram(), ScheduledUs :: integer()) -> ok.
probe(Id, Latencies, ScheduledUs) ->
    Reference = make_ref(),
    ok = erlmcp_shard_manager:route_message(Id, {self(), Reference}),
    receive Reference -> ok end,
    Now = erlang:monotonic_time(microsecond),
    ok = bench_histogram:add(Latencies, Now - ScheduledUs),
    Next = ScheduledUs + ?PROBE_INTERVAL_US,
    receive
        stop -> ok
    after
        max(0, (Next - Now + 999) div 1000) ->
            probe(Id, Latencies, Next)
    end.


-spec stop_probe({pid(), bench_histogram:histogram()}) -> bench_histogram:counts().
stop_probe({Probe, Latencies}) ->
    Monitor = monitor(process, Probe),
    Probe ! stop,
    receive {'DOWN', Monitor, process, Probe, normal} -> bench_histogram:counts(Latencies) end.


-spec populate(pos_integer(), non_neg_integer(), alone | registered) -> ok.
populate(N, Last, _Kind) when N > Last ->
    ok;
populate(N, Last, Kind) ->
    Pid = spawn_opt(?MODULE, connection, [], [link, {min_heap_size, ?HEAP}]),
    ok = case Kind of
             alone -> ok;
             registered ->
                 Id = bench_population:id(N),
                 erlmcp_shard_registry:register_connection(Id, Pid, connected)
         end,
    populate(N + 1, Last, Kind).


-spec connection() -> ok.
connection() ->
    receive stop -> ok end.


-spec await_processes(alone | registered, pos_integer()) -> ok.
await_processes(registered, _Before) ->
    ok;
await_processes(alone, Before) ->
    case erlang:system_info(process_count) of
        Left when Left =< Before ->
            ok;
        _ ->
            receive
            after
                1 ->
                    await_processes(alone, Before)
            end
    end.


%% Those that the probes are sent to stay.
-spec await_clean(non_neg_integer()) -> ok.
await_clean(Left) ->
    case erlmcp_shard_registry:count() of
        Left ->
            ok;
        _ ->
            receive
            after
                1 ->
                    await_clean(Left)
            end
    end.
