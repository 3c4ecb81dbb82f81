%%% Many connections exit at once: how long until the registry is clean.
%%%
%%% In a separate VM there is one process per connection. All of them are linked to a few hubs, one per
%%% scheduler. The hubs are killed, as if a listener crashed. The clock runs from the kill until the registry
%%% counts no connection. The same number of processes without registrations is killed first, which shows the
%%% VM's own part of the time.
-module(death_bench).

-export([run/1]).
%% In the peer
-export([die/2, connection/0]).

%% In words. This is the minimum of the VM.
-define(HEAP, 12).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{deaths := Deaths, progress := Progress}) ->
    Peer = bench_peer:start(),
    Alone = bench_peer:call(Peer, ?MODULE, die, [Deaths, alone]),
    _ = Progress(),
    Registered = bench_peer:call(Peer, ?MODULE, die, [Deaths, registered]),
    _ = Progress(),
    ok = bench_peer:stop(Peer),
    Row = bench_report:size_row("deaths",
                                bench_report:thousands(Deaths) ++ " at once, until clean",
                                Registered,
                                "s",
                                "the processes alone",
                                Alone),
    [bench_report:floor(figure, 30.0, bench_report:growth(Row))].


%%% In the peer


%% Seconds from the kill to the exit of the last process, or to the removal of the last registration.
-spec die(pos_integer(), alone | registered) -> float().
die(Deaths, Kind) ->
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
                   alone -> 0;
                   registered -> Deaths
               end,
    Expected = erlmcp_shard_registry:count(),
    Start = erlang:monotonic_time(),
    lists:foreach(fun(Hub) -> exit(Hub, kill) end, Hubs),
    ok = await_processes(Kind, Before),
    ok = await_clean(),
    bench_report:seconds(erlang:monotonic_time() - Start).


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


-spec await_clean() -> ok.
await_clean() ->
    case erlmcp_shard_registry:count() of
        0 ->
            ok;
        _ ->
            receive
            after
                1 ->
                    await_clean()
            end
    end.
