%%% The memory of an idle connection: its process, its registration, and its share of a supervisor.
%%%
%%% Each way to have connections is measured in a fresh VM of its own, for each number of connections. A supervisor
%%% (`simple_one_for_one', `temporary') starts the processes, which run {@link bench_session} and do nothing then. A figure is
%%% the growth of the resident memory of that VM from the first hundred connections to the last one, for each connection. The
%%% id and its capabilities are part of it; ids are not kept elsewhere.
%%%
%%% <ul>
%%% <li>`connection': `erlmcp_connection', which registers itself and hibernates</li>
%%% <li>`used': the same after its first message, which has built its state, and hibernating again</li>
%%% <li>`own': the same, each with capabilities that no other one has</li>
%%% <li>`unregistered': the process of `erlmcp_connection' without its registration</li>
%%% <li>`gen_server': a `gen_server' without options</li>
%%% <li>`current': the same, registered as a server in the registry that is one `gen_server' ({@link bench_baseline})</li>
%%% <li>`elixir': the same, named in Elixir's Registry with unique keys and as many partitions as schedulers</li>
%%% </ul>
%%%
%%% *The parts* of a connection: `process' is what `process_info/2' returns as its memory. The *native part* is what
%%% `connection' takes more than `unregistered', less the id. Of that, `watch and monitor' is the growth of `erlang:memory(system)':
%%% the resource and its monitor, which the VM allocates. The rest is table, entry and lease, and what the allocators waste.
-module(memory_bench).
-behaviour(supervisor).

-export([run/1]).
%% In the peer
-export([measure/2]).
-export([init/1, start_connection/2, start_unregistered/4]).

-type way() :: connection | own | unregistered | gen_server | current | elixir.
%% Bytes for each connection.
-type figures() :: #{resident := float(), process := float(), vm := float(), supervisor := float(), used => float()}.

-define(SIZES,       [1000, 15_000, 100_000, 1_000_000]).
-define(FIRST,       100).
-define(ID_BYTES,    24).
-define(SAMPLE,      1000).
-define(LARGE_BYTES, 100_000).
-define(MANY,        1_000_000).
-define(REGISTRY,    memory_bench_registry).
-define(FLOOR,       200.0e3).
-define(GOAL,        4096.0).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{sizes := Given, progress := Progress}) ->
    Sizes = case Given of
                default -> ?SIZES;
                _ -> Given
            end,
    Ways = [connection, own, unregistered, gen_server, current] ++ [ elixir || bench_elixir:start() =:= ok ],
    lists:append([ rows(Size, maps:from_list([ {Way, in_peer(Way, Size, Progress)} || Way <- Ways ])) || Size <- Sizes ]).


-spec in_peer(way(), pos_integer(), fun(() -> term())) -> figures().
in_peer(Way, Size, Progress) ->
    Peer = bench_peer:start(["-erlmcp_native", "max_entries", integer_to_list(Size + ?FIRST)]),
    Figures = bench_peer:call(Peer, ?MODULE, measure, [Way, Size]),
    ok = bench_peer:stop(Peer),
    _ = Progress(),
    Figures.


-spec rows(pos_integer(), #{way() => figures()}) -> [bench_report:row()].
rows(Size, #{connection := Connection} = Ways) ->
    Of = fun(Quantity, Way) -> map_get(Quantity, map_get(Way, Ways)) end,
    #{resident := InAll, used := Used, process := Process, vm := Vm, supervisor := Supervisor} = Connection,
    Row = fun(Name, Figure, Against, Baseline) ->
                  bench_report:size_row("memory",
                                        bench_report:thousands(Size) ++ ": " ++ Name,
                                        Figure,
                                        "B",
                                        Against,
                                        Baseline)
          end,
    InAllRow = fun(Name, Figure, Against, Way) ->
                       Compared = Row(Name, Figure, Against, Of(resident, Way)),
                       bench_report:goal(figure, ?GOAL, bench_report:floor(figure, ?FLOOR, Compared))
               end,
    [InAllRow("a connection, in all", InAll, "a gen_server, not registered", gen_server),
     InAllRow("the same, used once", Used, "a gen_server, not registered", gen_server)] ++
    [ Row("a connection, in all", InAll, Name, Of(resident, Way))
      || {Way, Name} <- [{current, "a gen_server in the mode current"}, {elixir, "a gen_server in Elixir's Registry"}],
         is_map_key(Way, Ways) ] ++
    [Row("process", Process, "a gen_server", Of(process, gen_server)),
     native_row(Size, Row("native part, beside the id", InAll - Of(resident, unregistered) - ?ID_BYTES, none, none)),
     Row("of that, watch and monitor", Vm - Of(vm, unregistered), none, none),
     Row("capabilities of its own", Of(resident, own) - InAll, none, none),
     Row("share of the supervisor", Supervisor, none, none)].


%% The difference of two VMs. With few connections it is within what their allocators keep in reserve.
-spec native_row(pos_integer(), bench_report:row()) -> bench_report:row().
native_row(Size, Row) when Size < ?MANY -> Row;
native_row(_Size, Row) -> bench_report:goal(figure, 300.0, bench_report:floor(figure, 400.0, Row)).


%%% In the peer


-spec measure(way(), pos_integer()) -> figures().
measure(Way, Size) ->
    ok = prepare(Way),
    {ok, Supervisor} = supervisor:start_link(?MODULE, Way),
    _ = start(Supervisor, 1, ?FIRST, 1, []),
    Before = memory(Supervisor),
    Sample = start(Supervisor, ?FIRST + 1, ?FIRST + Size, max(1, Size div ?SAMPLE), []),
    After = memory(Supervisor),
    Each = maps:map(fun(Quantity, Bytes) -> (Bytes - map_get(Quantity, Before)) / Size end, After),
    Processes = [ Bytes || Pid <- Sample, {memory, Bytes} <- [process_info(Pid, memory)] ],
    Idle = Each#{process => lists:sum(Processes) / length(Processes)},
    case Way of
        connection ->
            ok = use(?FIRST + Size, Sample),
            #{resident := Resident} = memory(Supervisor),
            Idle#{used => (Resident - map_get(resident, Before)) / Size};
        _ ->
            Idle
    end.


-spec prepare(way()) -> ok.
prepare(elixir) ->
    ok = bench_elixir:start(),
    {ok, Registry} = 'Elixir.Registry':start_link([{keys, unique},
                                                   {name, ?REGISTRY},
                                                   {partitions, erlang:system_info(schedulers_online)}]),
    true = unlink(Registry),
    ok;
prepare(_Way) ->
    ok.


-spec init(way()) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init(Way) ->
    Child = #{id => Way, start => {?MODULE, start_connection, [Way]}, restart => temporary},
    {ok, {#{strategy => simple_one_for_one}, [Child]}}.


%% Starts the connections from `N' to `Last'. Returns each `Every'-th process.
-spec start(pid(), pos_integer(), pos_integer(), pos_integer(), [pid()]) -> [pid()].
start(_Supervisor, N, Last, _Every, Sample) when N > Last ->
    Sample;
start(Supervisor, N, Last, Every, Sample) ->
    {ok, Pid} = supervisor:start_child(Supervisor, [N]),
    start(Supervisor, N + 1, Last, Every, [ Pid || N rem Every =:= 0 ] ++ Sample).


%% After a collection of the large processes, which are no connections: a collection would give a hibernating process more
%% memory than it has.
-spec memory(pid()) -> #{resident | vm | supervisor := non_neg_integer()}.
memory(Supervisor) ->
    _ = [ erlang:garbage_collect(Pid)
          || Pid <- processes(), {memory, Bytes} <- [process_info(Pid, memory)], Bytes > ?LARGE_BYTES ],
    {memory, OfSupervisor} = process_info(Supervisor, memory),
    #{resident => bench_peer:resident_now(), vm => erlang:memory(system), supervisor => OfSupervisor}.


-spec start_connection(way(), pos_integer()) -> {ok, pid()}.
start_connection(connection, N) ->
    start_registered(N, bench_population:small_config());
start_connection(own, N) ->
    start_registered(N, (bench_population:small_config())#{version => integer_to_binary(N)});
start_connection(unregistered, N) ->
    %% With arguments of the same size.
    Start = [default, bench_population:id(N), bench_population:small_config(), [bench_session, N, 1000]],
    proc_lib:start_link(?MODULE, start_unregistered, Start, infinity, erlmcp_process:spawn_opts());
start_connection(gen_server, N) ->
    gen_server:start_link(bench_session, N, []);
start_connection(current, N) ->
    {ok, Pid} = gen_server:start_link(bench_session, N, []),
    ok = bench_baseline:register_server(bench_population:id(N), Pid, bench_population:small_config()),
    {ok, Pid};
start_connection(elixir, N) ->
    Name = {?REGISTRY, bench_population:id(N), bench_population:small_config()},
    gen_server:start_link({via, 'Elixir.Registry', Name}, bench_session, N, []).


-spec start_registered(pos_integer(), map()) -> {ok, pid()}.
start_registered(N, Capabilities) ->
    erlmcp_connection:start_link(#{
                                   id => bench_population:id(N),
                                   module => bench_session,
                                   args => N,
                                   capabilities => Capabilities
                                  }).


-spec start_unregistered(term(), term(), term(), [term()]) -> no_return().
start_unregistered(_Registry, _Id, _Capabilities, Unused) ->
    _ = put('$initial_call', {bench_session, init, 1}),
    ok = proc_lib:init_ack({ok, self()}),
    proc_lib:hibernate(erlmcp_connection, use, Unused).


%% Sends a request to each connection, and returns when the sample has handled it and hibernates again.
-spec use(pos_integer(), [pid()]) -> ok.
use(Last, Sample) ->
    Request = bench_session:request(),
    lists:foreach(fun(N) -> ok = send(bench_population:id(N), {mcp_message, N, Request}) end, lists:seq(1, Last)),
    lists:foreach(fun await_hibernation/1, Sample).


-spec await_hibernation(pid()) -> ok.
await_hibernation(Pid) ->
    case process_info(Pid, [current_function, message_queue_len]) of
        [{current_function, {erlang, hibernate, 3}}, {message_queue_len, 0}] ->
            ok;
        _ ->
            ok = timer:sleep(10),
            await_hibernation(Pid)
    end.


-spec send(binary(), term()) -> ok.
send(Id, Message) ->
    case erlmcp_shard_manager:route_message(Id, Message) of
        ok ->
            ok;
        {error, shard_overloaded} ->
            ok = timer:sleep(1),
            send(Id, Message)
    end.
