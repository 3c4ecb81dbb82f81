%%% Messages delivered per second, by the number of receivers. The cost of a message must not grow with the
%%% number of connections.
%%%
%%% Each size has its own VM. Every receiver is registered there as a connection, as a server, and with its own
%%% transport, whose bucket is charged for `route_to_server/3'. All layers of backpressure have their default
%%% configuration, and the shard managers are running. The ways are compared in interleaved rounds ({@link
%%% bench_rounds}):
%%%
%%% <ul>
%%% <li>`bare': `Pid ! Msg' with the pids in hand</li>
%%% <li>`ets': `ets:lookup_element/3' in a table of `{Id, Pid, Config}', then `!'</li>
%%% <li>`connection': `erlmcp_shard_manager:route_message/2'</li>
%%% <li>`native': `erlmcp_registry:route_to_server/3'</li>
%%% <li>`off': `erlmcp_shard_manager:route_message/2' with `backpressure' off</li>
%%% </ul>
%%%
%%% The load is the closed loop of {@link bench_load}. The receivers keep up, so a refused message is a fault.
%%%
%%% *A rate* is the number of messages that receivers have counted within the time, after a run-up in which the
%%% loop closes.
%%%
%%% A way without admission control starts when the shard managers are idle, because they sample again what a
%%% former way has left in the mailboxes.
%%%
%%% *The samplers' share* is measured in separate runs: see {@link bench_samplers}.
-module(growth_bench).

-export([run/1]).
%% In the peer
-export([measure/4]).

-type way() :: bench_load:way() | off.
-type figures() :: #{{pos_integer(), way() | samplers} => bench_rounds:figures()}.

%% For connections, servers and transports.
-define(MAX_ENTRIES, "4000000").
-define(WAYS,        [bare, ets, connection, native, off]).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{progress := Progress} = Options) ->
    #{sizes := Sizes, senders := Senders, rounds := Rounds, seconds := Seconds} = extent(Options),
    lists:append([ begin
                       Peer = bench_peer:start(["-erlmcp_native", "max_entries", ?MAX_ENTRIES]),
                       {Figures, Refused} =
                           bench_peer:call(Peer, ?MODULE, measure, [Size, Senders, Rounds, Seconds]),
                       ok = bench_peer:stop(Peer),
                       _ = Progress(),
                       lists:append([ rows(Size, Number, Figures) || Number <- Senders ]) ++
                       [refused_row(Size, Refused)]
                   end
                   || Size <- Sizes ]).


%% All sizes if this is the only part. As part of all, only the sizes that take seconds.
-spec extent(registry_bench:options()) -> registry_bench:options().
extent(#{sections := [growth], rounds := Rounds, seconds := Seconds} = Options) ->
    given(Options#{rounds := min(Rounds, 5), seconds := Seconds / 2}, [1000, 15_000, 100_000, 500_000, 1_000_000], [2, 200]);
extent(#{rounds := Rounds, seconds := Seconds} = Options) ->
    given(Options#{rounds := min(Rounds, 3), seconds := Seconds * 0.3}, [1000, 15_000, 100_000], [2]).


-spec given(registry_bench:options(), [pos_integer()], [pos_integer()]) -> registry_bench:options().
given(Options, Sizes, Senders) ->
    Choose = fun(Key, Default) ->
                     case map_get(Key, Options) of
                         default -> Default;
                         Given -> Given
                     end
             end,
    Options#{sizes := Choose(sizes, Sizes), senders := Choose(senders, Senders)}.


-spec rows(pos_integer(), pos_integer(), figures()) -> [bench_report:row()].
rows(Size, Senders, Figures) ->
    Of = fun(Way) -> map_get({Senders, Way}, Figures) end,
    To = " to " ++ bench_report:thousands(Size) ++ ", " ++ integer_to_list(Senders) ++ " senders",
    Compare = fun(Way, Name, Other, OtherName) ->
                      bench_report:rate_row("growth", Name ++ To, Of(Way), OtherName, Of(Other))
              end,
    Guarded = [ bench_report:floor(ratio, Floor, Compare(Way, Name, Other, OtherName))
                || {Way, Name} <- [{connection, "route_message/2"}, {native, "route_to_server/3"}],
                   {Other, OtherName, Floor} <- [{bare, bench_senders:name(bare), 0.8},
                                                 {ets, "ets:lookup_element/3 and !", 1.2}] ],
    Guarded ++
    [Compare(connection, "route_message/2", off, "the same, all layers off"),
     bench_report:floor(figure,
                        2.0,
                        bench_report:size_row("growth",
                                              "samplers" ++ To ++ ", of all schedulers",
                                              bench_rounds:median(Of(samplers)),
                                              "%",
                                              none,
                                              none))].


-spec refused_row(pos_integer(), non_neg_integer()) -> bench_report:row().
refused_row(Size, Refused) ->
    bench_report:floor(figure,
                       0.0,
                       bench_report:size_row("growth",
                                             "refused though " ++ bench_report:thousands(Size) ++ " keep up",
                                             float(Refused),
                                             "msgs",
                                             none,
                                             none)).


%%% In the peer


%% The figures, and the number of refused messages in all.
-spec measure(pos_integer(), [pos_integer()], pos_integer(), float()) -> {figures(), non_neg_integer()}.
measure(Size, Senders, Rounds, Seconds) ->
    {Load, Population} = bench_load:start(Size, lists:max(Senders)),
    ok = bench_population:register_all(Population),
    Figures = bench_rounds:interleave(
                Rounds,
                [ {{Number, Way}, fun() -> rate(Way, Number, Load, Seconds) end}
                  || Number <- Senders, Way <- ?WAYS ] ++
                [ {{Number, samplers}, fun() -> samplers_percent(Number, Load, Seconds) end}
                  || Number <- Senders ],
                fun() -> ok end),
    {Figures, bench_load:refused(Load)}.


%% Messages per second.
-spec rate(way(), pos_integer(), bench_load:load(), float()) -> float().
rate(off, Senders, Load, Seconds) ->
    ok = erlmcp_native:set(backpressure, off),
    ok = bench_samplers:await_idle(),
    Rate = delivered(connection, Senders, Load, Seconds),
    ok = erlmcp_native:set(backpressure, on),
    Rate;
rate(Way, Senders, Load, Seconds) when Way =:= bare; Way =:= ets ->
    ok = bench_samplers:await_idle(),
    delivered(Way, Senders, Load, Seconds);
rate(Way, Senders, Load, Seconds) ->
    delivered(Way, Senders, Load, Seconds).


-spec delivered(bench_load:way(), pos_integer(), bench_load:load(), float()) -> float().
delivered(Way, Senders, Load, Seconds) ->
    bench_load:during(Way, Senders, Load, fun() -> bench_load:rate(Load, Seconds) end).


%% Percent of the time of all schedulers.
-spec samplers_percent(pos_integer(), bench_load:load(), float()) -> float().
samplers_percent(Senders, Load, Seconds) ->
    bench_load:during(connection, Senders, Load, fun() -> bench_samplers:percent(round(Seconds * 1000)) end).
