%%% What a node with many connections and nothing to do costs.
%%%
%%% The contract: 15,000 idle connections and the running application take less than one percent of one core, over all
%%% threads of the virtual machine. The measurement runs in a node of its own and in processor time, so that other work
%%% on the machine does not count. The least of several measurements counts, so that one-time work after the load can
%%% finish on a busy machine, too.
-module(idle_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([many_idle_connections_cost_nothing/1]).
%% Called in peer nodes
-export([in_idle/0, idle/0]).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [many_idle_connections_cost_nothing].


%% Less than one percent of one core, of which the runtime alone takes a part.
many_idle_connections_cost_nothing(_Config) ->
    #{percent := Percent, seconds := Seconds, cpu_ms := CpuMs, connections := 15_000, health := ok} =
        test_support:in_peer(?MODULE, in_idle, [], #{timeout_ms => 120_000}),
    ct:pal("15,000 idle connections: ~.3f % of a core (~.1f ms in ~.1f s)", [Percent, CpuMs, Seconds]),
    ?assert(Percent < 1.0, Percent).


in_idle() ->
    ok = application:load(erlmcp_native),
    %% Other work on the machine must not degrade health.
    ok = application:set_env(erlmcp_native, health, #{run_queue_per_scheduler => infinity, scheduler_use_percent => infinity}),
    ok = application:start(erlmcp_native),
    Pids = [ begin
                 Pid = spawn(fun idle/0),
                 ok = erlmcp_shard_registry:register_connection({connection, N}, Pid, #{client => idle}),
                 Pid
             end || N <- lists:seq(1, 15_000) ],
    %% Each connection has received a message.
    [ok] = lists:usort([ erlmcp_shard_manager:route_message({connection, N}, x) || N <- lists:seq(1, 15_000) ]),
    _ = erlang:garbage_collect(),
    {Percent, CpuMs, Seconds} = lists:min([ measure(10_000) || _ <- [1, 2, 3] ]),
    #{
      percent => Percent,
      seconds => Seconds,
      cpu_ms => CpuMs,
      connections => length([ Pid || Pid <- Pids, is_process_alive(Pid) ]),
      health => erlmcp_native:health()
     }.


%% Percent of a core, milliseconds of processor time, and seconds.
measure(Ms) ->
    Began = now_us(),
    Before = cpu_ms(),
    timer:sleep(Ms),
    CpuMs = cpu_ms() - Before,
    Seconds = (now_us() - Began) / 1_000_000,
    {CpuMs / (10 * Seconds), CpuMs, Seconds}.


idle() ->
    receive
        x -> erlang:hibernate(?MODULE, idle, [])
    end.


%% Processor time of all threads, in nanoseconds where the scheduler of the operating system provides it.
cpu_ms() ->
    Files = filelib:wildcard("/proc/self/task/*/schedstat"),
    Times = [ Ns || File <- Files, {ok, Content} <- [file:read_file(File)], [Ns | _] <- [string:split(Content, " ")] ],
    case lists:sum([ binary_to_integer(Ns) || Ns <- Times ]) of
        0 -> float(element(1, statistics(runtime)));
        Ns -> Ns / 1_000_000
    end.


now_us() ->
    erlang:monotonic_time(microsecond).
