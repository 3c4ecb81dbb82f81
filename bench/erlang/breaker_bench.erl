%%% The cost of a call through a named, closed circuit breaker, against an ETS look-up and a call of a
%%% gen_server.
%%%
%%% A thousand breakers with binary names are called in turn, in shuffled order; the table has the same names.
%%% The fun returns at once. The time of the same loop with the fun alone is subtracted.
%%%
%%% The first call of a process creates a monitor of it. A process that makes one call and exits is compared
%%% with one that runs the fun and exits.
-module(breaker_bench).

-behaviour(gen_server).

-export([run/1]).
-export([init/1, handle_call/3, handle_cast/2]).

-type work() :: nothing | call | lookup_element | gen_server_call | process | process_call.

-define(BREAKERS, 1000).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{rounds := Rounds, lookups := Lookups, progress := Progress}) ->
    Ids = bench_population:ids(?BREAKERS),
    lists:foreach(fun(Id) -> ok = erlmcp_circuit_breaker:register_breaker(Id, #{}) end, Ids),
    Table = bench_population:ets_table([ {Id, self(), []} || Id <- Ids ]),
    {ok, Server} = gen_server:start(?MODULE, [], []),
    Passes = max(1, Lookups div ?BREAKERS),
    Measure = fun(Work, Context) -> {Work, fun() -> measure(Work, Ids, Context, Passes) end} end,
    Figures = bench_rounds:interleave(Rounds,
                                      [Measure(call, none),
                                       Measure(lookup_element, Table),
                                       Measure(gen_server_call, Server),
                                       Measure(process, none),
                                       Measure(process_call, none)],
                                      Progress),
    ok = gen_server:stop(Server),
    true = ets:delete(Table),
    lists:foreach(fun erlmcp_circuit_breaker:unregister_breaker/1, Ids),
    Against = fun(Name, Work) ->
                      bench_report:time_row("breakers",
                                            "call/2 of a closed breaker",
                                            map_get(call, Figures),
                                            Name,
                                            map_get(Work, Figures))
              end,
    [bench_report:floor(ratio, 4.0, Against("ets:lookup_element/3", lookup_element)),
     Against("gen_server:call/2", gen_server_call),
     bench_report:time_row("breakers",
                           "a process with one call/2",
                           map_get(process_call, Figures),
                           "a process without",
                           map_get(process, Figures))].


-spec measure(work(), [binary()], term(), pos_integer()) -> float().
measure(Work, Ids, Context, Passes) ->
    ok = passes(Work, Ids, Context, 1),
    Loop = elapsed(nothing, Ids, Context, Passes),
    Whole = elapsed(Work, Ids, Context, Passes),
    max(0.1, (Whole - Loop) / (length(Ids) * Passes)).


-spec elapsed(work(), [binary()], term(), pos_integer()) -> integer().
elapsed(Work, Ids, Context, Passes) ->
    Start = erlang:monotonic_time(),
    ok = passes(Work, Ids, Context, Passes),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond).


-spec passes(work(), [binary()], term(), non_neg_integer()) -> ok.
passes(_Work, _Ids, _Context, 0) ->
    ok;
passes(Work, Ids, Context, Left) ->
    ok = case Work of
             nothing -> nothing(Ids, fun() -> ok end);
             call -> call(Ids, fun() -> ok end);
             lookup_element -> lookup_element(Ids, Context);
             gen_server_call -> gen_server_call(Ids, Context);
             process -> process(Ids, fun() -> ok end);
             process_call -> process_call(Ids, fun() -> ok end)
         end,
    passes(Work, Ids, Context, Left - 1).


-spec nothing([binary()], fun(() -> ok)) -> ok.
nothing([_Id | Ids], Fun) ->
    ok = Fun(),
    nothing(Ids, Fun);
nothing([], _Fun) ->
    ok.


-spec call([binary()], fun(() -> ok)) -> ok.
call([Id | Ids], Fun) ->
    ok = erlmcp_circuit_breaker:call(Id, Fun),
    call(Ids, Fun);
call([], _Fun) ->
    ok.


-spec lookup_element([binary()], ets:table()) -> ok.
lookup_element([Id | Ids], Table) ->
    _ = ets:lookup_element(Table, Id, 2),
    lookup_element(Ids, Table);
lookup_element([], _Table) ->
    ok.


-spec gen_server_call([binary()], pid()) -> ok.
gen_server_call([Id | Ids], Server) ->
    ok = gen_server:call(Server, Id),
    gen_server_call(Ids, Server);
gen_server_call([], _Server) ->
    ok.


-spec process([binary()], fun(() -> ok)) -> ok.
process([_Id | Ids], Fun) ->
    {Pid, Monitor} = spawn_monitor(Fun),
    receive {'DOWN', Monitor, process, Pid, normal} -> ok end,
    process(Ids, Fun);
process([], _Fun) ->
    ok.


-spec process_call([binary()], fun(() -> ok)) -> ok.
process_call([Id | Ids], Fun) ->
    {Pid, Monitor} = spawn_monitor(fun() -> erlmcp_circuit_breaker:call(Id, Fun) end),
    receive {'DOWN', Monitor, process, Pid, normal} -> ok end,
    process_call(Ids, Fun);
process_call([], _Fun) ->
    ok.


%%% The server


-spec init([]) -> {ok, []}.
init([]) -> {ok, []}.


-spec handle_call(term(), gen_server:from(), []) -> {reply, ok, []}.
handle_call(_Request, _From, State) -> {reply, ok, State}.


-spec handle_cast(term(), []) -> {noreply, []}.
handle_cast(_Request, State) -> {noreply, State}.
