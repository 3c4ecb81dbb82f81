%%% The registry's process in the mode `current' is killed and started again: how long until it answers, and until it
%%% monitors all entries.
%%%
%%% In a separate VM each transport is a process of its own, and is bound to one of 10,000 servers. The clock runs
%%% from the exit of the process, which its supervisor would see. How long the exit itself takes is a row of its own: it
%%% removes all monitors. A process that monitors the same transports and does nothing else shows what the monitors take.
-module(restart_bench).

-export([run/1]).
%% In the peer
-export([restart/1]).

-define(SERVERS, 10_000).
-define(POLL_MS, 10).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{entries := Entries, progress := Progress}) ->
    Peer = bench_peer:start(),
    #{monitors := Monitors, exited := Exited, answered := Answered, adopted := Adopted} =
        bench_peer:call(Peer, ?MODULE, restart, [Entries]),
    _ = Progress(),
    ok = bench_peer:stop(Peer),
    Of = " of " ++ bench_report:thousands(Entries),
    Row = fun(Name, Seconds) ->
                  Compared = bench_report:size_row("restart", Name, Seconds, "s", "the monitors alone", Monitors),
                  bench_report:growth(Compared)
          end,
    [bench_report:floor(figure, 2.0, Row("first answer" ++ Of, Answered)),
     Row("all monitored" ++ Of, Adopted),
     Row("exit of the killed process" ++ Of, Exited)].


%%% In the peer


-spec restart(pos_integer()) ->
          #{monitors := float(), exited := float(), answered := float(), adopted := float()}.
restart(Entries) ->
    %% It would crash with the registry's process, which is linked to the process that has started both.
    ok = gen_server:stop(bench_baseline),
    ok = erlmcp_rollout:set(current),
    {_, Transports} = bench_population:start(Entries, fun() -> receive stop -> ok end end),
    ok = register_all(Transports, 0),
    Monitors = bench_report:seconds(monitors_alone([ Pid || {_Id, Pid} <- Transports ])),
    [{Id, Pid} | _] = Transports,
    Registry = whereis(erlmcp_registry),
    Monitor = monitor(process, Registry),
    Killed = erlang:monotonic_time(),
    true = exit(Registry, kill),
    receive {'DOWN', Monitor, process, Registry, killed} -> ok end,
    Down = erlang:monotonic_time(),
    {ok, Next} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], [{timeout, infinity}]),
    {ok, {Pid, _Config}} = gen_server:call(Next, {find_transport, Id}, infinity),
    Answered = erlang:monotonic_time(),
    ok = await_adopted(),
    Adopted = erlang:monotonic_time(),
    #{
      monitors => Monitors,
      exited => bench_report:seconds(Down - Killed),
      answered => bench_report:seconds(Answered - Down),
      adopted => bench_report:seconds(Adopted - Down)
     }.


-spec register_all([{Id :: binary(), pid()}], non_neg_integer()) -> ok.
register_all([], _N) ->
    ok;
register_all([{Id, Pid} | Others], N) ->
    ok = erlmcp_registry:register_transport(Id, Pid, #{server_id => {server, N rem ?SERVERS}}),
    register_all(Others, N + 1).


%% In native time units.
-spec monitors_alone([pid()]) -> integer().
monitors_alone(Pids) ->
    Start = fun() ->
                    Began = erlang:monotonic_time(),
                    lists:foreach(fun(Pid) -> _ = monitor(process, Pid) end, Pids),
                    exit({took, erlang:monotonic_time() - Began})
            end,
    {Process, Monitor} = spawn_monitor(Start),
    receive {'DOWN', Monitor, process, Process, {took, Time}} -> Time end.


-spec await_adopted() -> ok.
await_adopted() ->
    case erlmcp_rollout:status() of
        #{classic := #{adopting := false}} ->
            ok;
        _Adopting ->
            receive
            after
                ?POLL_MS ->
                    await_adopted()
            end
    end.
