%%% A long run with many connections: how a node with a million of them behaves for a minute, when one receiver
%%% stalls, and when all receivers exit.
%%%
%%% It runs only by its name (`--only stress'). In a separate VM every receiver is registered as a connection, and
%%% all layers of backpressure have their default configuration. The load is the closed loop of {@link
%%% bench_load} with `route_message/2'. Before and after it, `Pid ! Msg' is measured for a sixth of the time.
%%%
%%% <ul>
%%% <li>`delivered': messages per second.</li>
%%% <li>`refused': all receivers keep up, so there must be none.</li>
%%% <li>`long schedules': the number per minute of schedules of at least a millisecond that
%%% `erlang:system_monitor/2' reports in a function of the application. Beside it is the number of all that it
%%% reports while bare messages are sent, because the operating system takes a scheduler's processor away too.</li>
%%% <li>`samplers': see {@link bench_samplers}.</li>
%%% <li>`a stalled receiver': messages that one suspended process accepts before it is refused, and how many of
%%% the messages to up to 10,000 others of its shard are refused then.</li>
%%% <li>`exit': from the exit of all receivers until no connection is registered.</li>
%%% </ul>
-module(stress_bench).

-export([run/1]).
%% In the peer
-export([measure/3]).

-define(SENDERS,          200).
-define(SECONDS_A_SECOND, 60).
-define(MAX_OTHERS,       10_000).
-define(MAX_ENTRIES,      "4000000").


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{entries := Receivers, seconds := Seconds, senders := Given, progress := Progress}) ->
    Peer = bench_peer:start(["-erlmcp_native", "max_entries", ?MAX_ENTRIES]),
    Senders = case Given of
                  default -> ?SENDERS;
                  [Number | _] -> Number
              end,
    Result = bench_peer:call(Peer, ?MODULE, measure, [Receivers, Senders, Seconds * ?SECONDS_A_SECOND]),
    ok = bench_peer:stop(Peer),
    _ = Progress(),
    #{
      rates := Rates,
      bare := Bare,
      refused := Refused,
      long_schedules := Long,
      bare_long_schedules := BareLong,
      samplers_percent := Samplers,
      taken := Taken,
      others_refused := OthersRefused,
      exit_seconds := Exit
     } = Result,
    To = " to " ++ bench_report:thousands(Receivers),
    Size = fun(Name, Figure, Unit, Floor) ->
                   bench_report:floor(figure, Floor, bench_report:size_row("stress", Name, Figure, Unit, none, none))
           end,
    [bench_report:floor(ratio,
                        0.8,
                        bench_report:rate_row("stress",
                                              "route_message/2" ++ To,
                                              Rates,
                                              bench_senders:name(bare),
                                              Bare)),
     Size("refused though all keep up", float(Refused), "msgs", 0.0),
     bench_report:growth(bench_report:size_row("stress",
                                               "long schedules of ours, a minute",
                                               Long,
                                               "events",
                                               "all with bare sends",
                                               max(BareLong, 0.1))),
     Size("samplers, of all schedulers", Samplers, "%", 2.0),
     %% One more where a sample falls between the admission of a message and its sending.
     Size("taken for a receiver that stalls", float(Taken), "msgs", 10_001.0),
     Size("refused to others of its shard", float(OthersRefused), "msgs", 0.0),
     Size("all exit, until clean", Exit, "s", 30.0)].


%%% In the peer


-spec measure(pos_integer(), pos_integer(), float()) -> map().
measure(Receivers, Senders, Seconds) ->
    {Load, {{Hub, _}, Connections}} = bench_load:start(Receivers, Senders),
    Config = bench_population:small_config(),
    lists:foreach(fun({Id, Pid}) -> ok = erlmcp_shard_registry:register_connection(Id, Pid, Config) end, Connections),
    {Bare1, BareLong1} = loaded(bare, Senders, Load, Seconds / 6),
    {Rate, Long} = loaded(connection, Senders, Load, Seconds),
    Samplers = bench_load:during(connection, Senders, Load, fun() -> bench_samplers:percent(round(Seconds * 1000 / 6)) end),
    {Bare2, BareLong2} = loaded(bare, Senders, Load, Seconds / 6),
    {Taken, OthersRefused} = stall(Connections),
    #{
      rates => [Rate],
      bare => [(Bare1 + Bare2) / 2],
      refused => bench_load:refused(Load),
      long_schedules => a_minute(of_ours(Long), Seconds),
      bare_long_schedules => a_minute(BareLong1 ++ BareLong2, Seconds / 3),
      samplers_percent => Samplers,
      taken => Taken,
      others_refused => OthersRefused,
      exit_seconds => exit_all(Hub)
     }.


-spec a_minute([term()], float()) -> float().
a_minute(Events, Seconds) ->
    length(Events) * 60 / Seconds.


-spec loaded(bench_load:way(), pos_integer(), bench_load:load(), float()) -> {float(), [list()]}.
loaded(Way, Senders, Load, Seconds) ->
    ok = bench_samplers:await_idle(),
    bench_load:during(Way,
                      Senders,
                      Load,
                      fun() ->
                              Monitor = start_monitor(),
                              Rate = bench_load:rate(Load, Seconds),
                              {Rate, stop_monitor(Monitor)}
                      end).


-spec start_monitor() -> pid().
start_monitor() ->
    Asking = self(),
    Monitor = spawn_link(fun() ->
                                 _ = erlang:system_monitor(self(), [{long_schedule, 1}]),
                                 Asking ! {self(), started},
                                 collect([])
                         end),
    receive {Monitor, started} -> Monitor end.


-spec collect([list()]) -> {pid(), [list()]}.
collect(Events) ->
    receive
        {monitor, _ProcessOrPort, long_schedule, Event} -> collect([Event | Events]);
        {stop, Asking} ->
            _ = erlang:system_monitor(undefined),
            Asking ! {self(), Events}
    end.


-spec stop_monitor(pid()) -> [list()].
stop_monitor(Monitor) ->
    Monitor ! {stop, self()},
    receive {Monitor, Events} -> Events end.


%% The schedules that began or ended in a function of the application.
-spec of_ours([list()]) -> [list()].
of_ours(Events) ->
    [ Event
      || Event <- Events,
         lists:any(fun({_, {Module, _, _}}) -> lists:prefix("erlmcp_", atom_to_list(Module));
                      (_) -> false
                   end,
                   Event) ].


%% Messages that a suspended process accepts, and how many of those to others of its shard are refused
%% afterwards.
-spec stall([{binary(), pid()}]) -> {non_neg_integer(), non_neg_integer()}.
stall([{Stalled, Pid} | Others]) ->
    true = erlang:suspend_process(Pid),
    Taken = taken(Stalled, 0),
    Shard = erlmcp_shard_registry:get_shard_id(Stalled),
    OfItsShard = lists:sublist([ Id || {Id, _} <- Others, erlmcp_shard_registry:get_shard_id(Id) =:= Shard ], ?MAX_OTHERS),
    Refused = [ Id || Id <- OfItsShard, erlmcp_shard_manager:route_message(Id, {mcp_message, Id, stalled}) =/= ok ],
    true = erlang:resume_process(Pid),
    {Taken, length(Refused)}.


%% The bucket refills until the shard refuses.
-spec taken(binary(), non_neg_integer()) -> non_neg_integer().
taken(Id, Taken) ->
    case erlmcp_shard_manager:route_message(Id, {mcp_message, Id, stalled}) of
        ok ->
            taken(Id, Taken + 1);
        {error, rate_limited} ->
            ok = timer:sleep(1),
            taken(Id, Taken);
        {error, shard_overloaded} ->
            Taken
    end.


%% Seconds until no connection is registered.
-spec exit_all(pid()) -> float().
exit_all(Hub) ->
    Start = erlang:monotonic_time(),
    Hub ! stop,
    ok = await_clean(),
    bench_report:seconds(erlang:monotonic_time() - Start).


-spec await_clean() -> ok.
await_clean() ->
    case erlmcp_shard_registry:count() of
        0 ->
            ok;
        _ ->
            ok = timer:sleep(1),
            await_clean()
    end.
