%%% Register and unregister with a monitor, from one process and from several.
%%%
%%% A round registers every connection, each a living process of its own, and then unregisters them all. The
%%% figure is the time of one such pair. The processes, four per scheduler, each have a share of the
%%% connections.
%%%
%%% The floor applies against {@link bench_baseline}, the fastest form of one gen_server.
-module(registration_bench).

-export([run/1]).

-type kind() :: native | connection | classic.

-define(PROCESSES_A_SCHEDULER, 4).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, rounds := Rounds, progress := Progress}) ->
    {_, Connections} = Population =
        bench_population:start(Count, fun() -> receive stop -> ok end end),
    Parts = shares(Connections, ?PROCESSES_A_SCHEDULER * erlang:system_info(schedulers_online)),
    Cases = [native, connection, classic],
    Figures = bench_rounds:interleave(
                Rounds,
                [ {{Case, From}, fun() -> time(Case, Shares) end}
                  || {From, Shares} <- [{one, [Connections]}, {several, Parts}], Case <- Cases ],
                Progress),
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
    [bench_report:floor(ratio, 0.5, Compare(native, classic)),
     Compare(connection, classic)].


-spec name(kind()) -> string().
name(native) -> "register + unregister_server";
name(connection) -> "register + unregister_connection";
name(classic) -> "classic (raw calls)".


-spec shares([Element], pos_integer()) -> [[Element]].
shares(List, Number) ->
    [ lists:sublist(List, First, Last - First + 1)
      || {First, Last} <- bench_population:ranges(length(List), Number) ].


%% Nanoseconds per connection.
-spec time(kind(), [[{binary(), pid()}]]) -> float().
time(Case, Parts) ->
    Config = bench_population:small_config(),
    Count = lists:sum([ length(Part) || Part <- Parts ]),
    Tasks = [ fun() ->
                      receive go -> ok end,
                      ok = register_all(Case, Part, Config),
                      ok = unregister_all(Case, Part)
              end
              || Part <- Parts ],
    Started = [ spawn_monitor(Task) || Task <- Tasks ],
    Start = erlang:monotonic_time(),
    lists:foreach(fun({Pid, _}) -> Pid ! go end, Started),
    ok = bench_population:await(Started),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond) / Count.


-spec register_all(kind(), [{binary(), pid()}], term()) -> ok.
register_all(_Case, [], _Config) ->
    ok;
register_all(native, [{Id, Pid} | Others], Config) ->
    ok = erlmcp_registry:register_server(Id, Pid, Config),
    register_all(native, Others, Config);
register_all(connection, [{Id, Pid} | Others], Config) ->
    ok = erlmcp_shard_registry:register_connection(Id, Pid, Config),
    register_all(connection, Others, Config);
register_all(classic, [{Id, Pid} | Others], Config) ->
    ok = bench_baseline:register_server(Id, Pid, Config),
    register_all(classic, Others, Config).


-spec unregister_all(kind(), [{binary(), pid()}]) -> ok.
unregister_all(_Case, []) ->
    ok;
unregister_all(native, [{Id, _} | Others]) ->
    ok = erlmcp_registry:unregister_server(Id),
    unregister_all(native, Others);
unregister_all(connection, [{Id, _} | Others]) ->
    ok = erlmcp_shard_registry:unregister_connection(Id),
    unregister_all(connection, Others);
unregister_all(classic, [{Id, _} | Others]) ->
    ok = bench_baseline:unregister_server(Id),
    unregister_all(classic, Others).
