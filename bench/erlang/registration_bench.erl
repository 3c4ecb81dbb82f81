%%% Register and unregister with a monitor, from one process and from several.
%%%
%%% A round registers every connection, each a living process of its own, and then unregisters them
%%% all; the figure is the time for a pair of both. The several processes, four for each scheduler,
%%% have a share of the connections each.
%%%
%%% The named classic registry keeps a copy of each registration in an ETS table, for its
%%% successor. An anonymous one does not: driven by raw calls it is the quickest that one
%%% gen_server can be, and what the floor is taken against.
-module(registration_bench).

-export([run/1]).

-type kind() :: native | connection | classic | anonymous.

-define(PROCESSES_A_SCHEDULER, 4).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, progress := Progress}) ->
    {_, Connections} = Population =
        bench_population:start(Count, fun() -> receive stop -> ok end end),
    {ok, Anonymous} = gen_server:start_link(erlmcp_registry_classic, [], []),
    Parts = shares(Connections, ?PROCESSES_A_SCHEDULER * erlang:system_info(schedulers_online)),
    Cases = [native, connection, classic, anonymous],
    Figures = bench_rounds:interleave(
                Rounds,
                [ {{Case, From}, fun() -> time(Case, Anonymous, Shares) end}
                  || {From, Shares} <- [{one, [Connections]}, {several, Parts}], Case <- Cases ],
                Progress),
    ok = gen_server:stop(Anonymous),
    ok = bench_population:stop(Population),
    rows(Figures, one, "1 process") ++
    rows(Figures, several, integer_to_list(length(Parts)) ++ " processes").


-spec rows(#{{kind(), one | several} => bench_rounds:figures()}, one | several, string()) ->
          [bench_report:row()].
rows(Figures, From, Who) ->
    Compare =
        fun(Case, Other) ->
                bench_report:time_row("registration",
                                      name(Case) ++ ", " ++ Who,
                                      map_get({Case, From}, Figures),
                                      name(Other),
                                      map_get({Other, From}, Figures))
        end,
    [bench_report:floor(ratio, 0.7, Compare(native, anonymous)),
     Compare(native, classic),
     Compare(connection, anonymous)].


-spec name(kind()) -> string().
name(native) -> "register + unregister_server";
name(connection) -> "register + unregister_connection";
name(classic) -> "classic, named (mirrored in ETS)";
name(anonymous) -> "classic, anonymous (raw calls)".


-spec shares([Element], pos_integer()) -> [[Element]].
shares(List, Number) ->
    [ lists:sublist(List, First, Last - First + 1)
      || {First, Last} <- bench_population:ranges(length(List), Number) ].


%% Nanoseconds a connection.
-spec time(kind(), pid(), [[{binary(), pid()}]]) -> float().
time(Case, Anonymous, Parts) ->
    Config = bench_population:small_config(),
    Count = lists:sum([ length(Part) || Part <- Parts ]),
    Tasks = [ fun() ->
                      receive go -> ok end,
                      ok = register_all(Case, Part, Anonymous, Config),
                      ok = unregister_all(Case, Part, Anonymous)
              end
              || Part <- Parts ],
    Started = [ spawn_monitor(Task) || Task <- Tasks ],
    Start = erlang:monotonic_time(),
    lists:foreach(fun({Pid, _}) -> Pid ! go end, Started),
    ok = bench_population:await(Started),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond) / Count.


-spec register_all(kind(), [{binary(), pid()}], pid(), term()) -> ok.
register_all(_Case, [], _Anonymous, _Config) ->
    ok;
register_all(native, [{Id, Pid} | Others], Anonymous, Config) ->
    ok = erlmcp_registry:register_server(Id, Pid, Config),
    register_all(native, Others, Anonymous, Config);
register_all(connection, [{Id, Pid} | Others], Anonymous, Config) ->
    ok = erlmcp_shard_registry:register_connection(Id, Pid, Config),
    register_all(connection, Others, Anonymous, Config);
register_all(classic, [{Id, Pid} | Others], Anonymous, Config) ->
    ok = erlmcp_registry_classic:register_server(Id, Pid, Config),
    register_all(classic, Others, Anonymous, Config);
register_all(anonymous, [{Id, Pid} | Others], Anonymous, Config) ->
    ok = gen_server:call(Anonymous, {register_server, Id, Pid, Config}),
    register_all(anonymous, Others, Anonymous, Config).


-spec unregister_all(kind(), [{binary(), pid()}], pid()) -> ok.
unregister_all(_Case, [], _Anonymous) ->
    ok;
unregister_all(native, [{Id, _} | Others], Anonymous) ->
    ok = erlmcp_registry:unregister_server(Id),
    unregister_all(native, Others, Anonymous);
unregister_all(connection, [{Id, _} | Others], Anonymous) ->
    ok = erlmcp_shard_registry:unregister_connection(Id),
    unregister_all(connection, Others, Anonymous);
unregister_all(classic, [{Id, _} | Others], Anonymous) ->
    ok = erlmcp_registry_classic:unregister_server(Id),
    unregister_all(classic, Others, Anonymous);
unregister_all(anonymous, [{Id, _} | Others], Anonymous) ->
    ok = gen_server:call(Anonymous, {unregister_server, Id}),
    unregister_all(anonymous, Others, Anonymous).
