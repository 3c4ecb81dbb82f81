%%% The benchmark of load measures what it says: late receivers and late senders show in the latency, what is lost, refused
%%% or not offered is reported, and the report has it.
%%%
%%% Times have lower bounds only, since a busy machine makes them longer.
-module(open_loop_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([percentiles_of_known_latencies/1,
         a_receiver_that_sleeps_shows_in_the_tail/1,
         a_dropped_message_is_lost/1,
         messages_of_a_killed_receiver_are_lost/1,
         what_is_asked_for_is_offered/1,
         a_slow_sender_counts_as_latency/1,
         refused_messages_are_not_lost/1,
         a_backlog_stops_the_senders/1,
         late_senders_are_stopped/1,
         a_ramp_connects_before_it_sends/1,
         several_results_are_added/1,
         the_part_in_small/1,
         an_interrupted_run/1,
         the_page_of_a_collapse/1]).

-define(L,       bench_open_loop).
-define(WAIT_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [percentiles_of_known_latencies,
     a_receiver_that_sleeps_shows_in_the_tail,
     a_dropped_message_is_lost,
     messages_of_a_killed_receiver_are_lost,
     what_is_asked_for_is_offered,
     a_slow_sender_counts_as_latency,
     refused_messages_are_not_lost,
     a_backlog_stops_the_senders,
     late_senders_are_stopped,
     a_ramp_connects_before_it_sends,
     several_results_are_added,
     the_part_in_small,
     an_interrupted_run,
     the_page_of_a_collapse].


init_per_suite(Config) ->
    %% Where rebar3 compiles the benchmarks to; test/otp adds its own folder.
    _ = code:add_pathz(filename:join([code:lib_dir(erlmcp_native), "bench", "erlang"])),
    {module, ?L} = code:ensure_loaded(?L),
    Config.


end_per_suite(_Config) ->
    ok.


%%% Figures


percentiles_of_known_latencies(_Config) ->
    Histogram = bench_histogram:new(),
    lists:foreach(fun(Us) -> ok = bench_histogram:add(Histogram, Us) end, lists:seq(1, 100_000)),
    ?assertEqual(100_000, bench_histogram:total(Histogram)),
    Percentiles = bench_histogram:percentiles([0.5, 0.95, 0.999, 1.0], bench_histogram:counts(Histogram)),
    lists:foreach(fun({Exact, Ms}) ->
                          ?assert(Ms >= Exact, {Ms, Exact}),
                          ?assert(Ms =< Exact * 1.017, {Ms, Exact})
                  end,
                  lists:zip([50.0, 95.0, 99.9, 100.0], Percentiles)),
    ok = bench_histogram:clear(Histogram),
    ?assertEqual(#{}, bench_histogram:counts(Histogram)).


%% Ten messages are due to each receiver in 100 ms, so the tail has those that waited, too.
a_receiver_that_sleeps_shows_in_the_tail(_Config) ->
    Histogram = bench_histogram:new(),
    Once = atomics:new(1, []),
    Sleep = fun(_Due) ->
                    case atomics:add_get(Once, 1, 1) of
                        500 -> timer:sleep(100);
                        _ -> ok
                    end
            end,
    #{lost := 0, asked := 2000, received := 2000, latencies := Latencies} =
        run(#{histogram => Histogram, schedule => {steady, 2000}, seconds => 1.0}, receivers(20, Histogram, Sleep)),
    [P999, Max] = bench_histogram:percentiles([0.999, 1.0], Latencies),
    ?assert(Max >= 100, Max),
    ?assert(P999 >= 60, P999).


a_dropped_message_is_lost(_Config) ->
    Histogram = bench_histogram:new(),
    {Number, Dropped} = {counters:new(1, []), 7},
    %% The last of these is the last message of all.
    Send = fun(Batch, Due) ->
                   lists:foreach(fun({_, Pid, Id}) ->
                                         ok = counters:add(Number, 1, 1),
                                         case counters:get(Number, 1) rem (100 div Dropped) of
                                             0 -> dropped;
                                             _ -> Pid ! {mcp_message, Id, Due}
                                         end
                                 end,
                                 Batch),
                   []
           end,
    Connections = receivers(1, Histogram, fun(_Due) -> ok end),
    #{lost := Lost, sent := Sent, received := Received} =
        run(#{histogram => Histogram, schedule => {steady, 1000}, seconds => 0.098, send => Send}, Connections),
    ?assertEqual(98, Sent),
    ?assertEqual(98 div (100 div Dropped), Lost),
    ?assertEqual(Sent - Lost, Received).


messages_of_a_killed_receiver_are_lost(_Config) ->
    Histogram = bench_histogram:new(),
    [{_, Pid, _} | _] = Connections = receivers(4, Histogram, fun(_Due) -> ok end),
    test_support:kill(Pid),
    #{lost := Lost, sent := Sent, received := Received} =
        run(#{histogram => Histogram, schedule => {steady, 4000}, seconds => 0.1}, Connections),
    ?assertEqual(400, Sent),
    ?assertEqual(Sent, Lost + Received),
    ?assert(Lost > 0),
    ?assert(Received > 0).


%%% Senders


%% On a machine that is too busy the result says so.
what_is_asked_for_is_offered(_Config) ->
    Histogram = bench_histogram:new(),
    #{asked := Asked, sent := Sent, offered := Offered, delivered := Delivered, window_seconds := Window, lost := Lost} = Result =
        run(#{histogram => Histogram, schedule => {steady, 4000}, seconds => 0.5}, receivers(10, Histogram, fun(_Due) -> ok end)),
    ?assertEqual({2000, 2000, 0}, {Asked, Sent, Lost}),
    ?assert(Delivered =< Offered),
    Rate = Offered / Window,
    ?assert(Rate < 1.001 * 4000, Rate),
    ?assertEqual(Rate >= 0.95 * 4000, ?L:is_offered(Result)).


%% A sender that needs five times as long sends all the same messages, and the last ones are late by what it lacks.
a_slow_sender_counts_as_latency(_Config) ->
    Histogram = bench_histogram:new(),
    Connections = receivers(1, Histogram, fun(_Due) -> ok end),
    #{asked := 100, sent := 100, stopped := no, latencies := Latencies} = Result =
        run(#{histogram => Histogram, schedule => {steady, 1000}, seconds => 0.1, send => slow(5)}, Connections),
    [P50, Max] = bench_histogram:percentiles([0.5, 1.0], Latencies),
    ?assert(Max >= 400, Max),
    ?assert(P50 >= 190, P50),
    ?assertNot(?L:is_offered(Result)).


refused_messages_are_not_lost(_Config) ->
    Histogram = bench_histogram:new(),
    Refuse = fun(Batch, Due) ->
                     lists:append([ case Id rem 3 of
                                        0 -> [busy];
                                        1 -> [full];
                                        2 ->
                                            Pid ! {mcp_message, Id, Due},
                                            []
                                    end || {Id, Pid, _} <- Batch ])
             end,
    #{sent := Sent, received := Received, lost := 0, refused := Refused} =
        run(#{histogram => Histogram, schedule => {steady, 3000}, seconds => 0.1, send => Refuse},
            receivers(30, Histogram, fun(_Due) -> ok end)),
    ?assertEqual(300, Sent),
    ?assertEqual([busy, full], lists:sort(maps:keys(Refused))),
    ?assertEqual(Sent - Received, lists:sum(maps:values(Refused))),
    ?assert(Received > 0).


a_backlog_stops_the_senders(_Config) ->
    Histogram = bench_histogram:new(),
    Connections = receivers(5, Histogram, fun(_Due) -> receive never -> ok end end),
    #{stopped := backlog, asked := Asked, sent := Sent, backlog := Backlog, lost := Lost} =
        run(#{
              histogram => Histogram,
              schedule => {steady, 10_000},
              seconds => 10.0,
              max_backlog => 1000,
              give_up_ms => 200
             },
            Connections),
    ?assertEqual(100_000, Asked),
    ?assert(Backlog > 1000, Backlog),
    ?assert(Sent >= 1000, Sent),
    ?assert(Sent < Asked, Sent),
    ?assertEqual(Sent, Lost).


late_senders_are_stopped(_Config) ->
    Histogram = bench_histogram:new(),
    Connections = receivers(1, Histogram, fun(_Due) -> ok end),
    #{stopped := late, asked := 2000, sent := Sent, lost := 0} = Result =
        run(#{histogram => Histogram, schedule => {steady, 1000}, seconds => 2.0, max_seconds => 0.3, send => slow(10)}, Connections),
    ?assert(Sent < 2000, Sent),
    ?assertNot(?L:is_offered(Result)).


a_ramp_connects_before_it_sends(_Config) ->
    Histogram = bench_histogram:new(),
    Connected = ets:new(?MODULE, [public]),
    Send = fun(Batch, Due) ->
                   lists:append([ case ets:member(Connected, Id) of
                                      true ->
                                          Pid ! {mcp_message, Id, Due},
                                          [];
                                      false -> [not_connected]
                                  end || {Id, Pid, _} <- Batch ])
           end,
    Load = #{
             histogram => Histogram,
             schedule => {ramp, 2000, 1.0},
             seconds => 0.5,
             send => Send,
             connect => fun({Id, _, _}) -> true = ets:insert_new(Connected, {Id}) end
            },
    Connections = receivers(100, Histogram, fun(_Due) -> ok end),
    First = run(Load, Connections),
    ?assertEqual(50, ets:info(Connected, size)),
    Second = run(Load#{from => 0.5}, Connections),
    ?assertEqual(100, ets:info(Connected, size)),
    ?assertMatch(#{asked := 250, sent := 250, lost := 0, refused := Refused} when Refused =:= #{}, First),
    ?assertMatch(#{asked := 750, sent := 750, lost := 0, refused := Refused} when Refused =:= #{}, Second).


several_results_are_added(_Config) ->
    Histogram = bench_histogram:new(),
    Connections = receivers(4, Histogram, fun(_Due) -> ok end),
    Load = #{histogram => Histogram, schedule => {steady, 1000}, seconds => 0.1},
    Once = run(Load, Connections),
    Refused = run(Load#{send => fun(Batch, _Due) -> [ full || _ <- Batch ] end}, Connections),
    Merged = ?L:merged([Once, Refused, Refused#{stopped := late}]),
    ?assertMatch(#{asked := 300, sent := 300, received := 100, lost := 0, refused := #{full := 200}, stopped := late}, Merged),
    ?assertEqual(map_get(latencies, Once), map_get(latencies, Merged)).


%%% The part and its page


the_part_in_small(_Config) ->
    Rows = load_bench:run(options(0.1)),
    [#{interrupted := false, results := Results}] = [ Load || #{load := Load} <- Rows ],
    ?assertEqual([ {Size, Stage, Way}
                   || {Size, Stage} <- [{20, sustain}, {50, ramp}, {50, sustain}, {50, rate}, {50, burst}],
                      Way <- [bare, classic, native] ],
                 in_order([ {Size, Stage, Way} || #{connections := Size, stage := Stage, way := Way} <- Results ])),
    lists:foreach(fun(#{way := Way, sent := Sent, received := Received, lost := Lost, refused := Refused} = Result) ->
                          ?assert(Sent > 0, Result),
                          ?assertEqual(0, Lost, Result),
                          Way =:= native orelse ?assertEqual(#{}, Refused),
                          ?assertEqual(Sent, Received + lists:sum(maps:values(Refused)), Result)
                  end,
                  Results),
    %% Neither floor applies to so few connections.
    ?assertEqual(["lost, at all levels"], [ Name || #{met := _, name := Name} <- Rows ]),
    Page = page(Rows),
    ?assertNotEqual(nomatch, string:find(Page, "were not measured in this run")),
    ?assertEqual(nomatch, string:find(Page, "Interrupted")),
    %% Two plots, since memory is left out with so few connections, and a mark for each way in the legend.
    ?assertEqual(5, count("<svg", Page)),
    ?assertEqual(5, count("</svg>", Page)),
    ?assertEqual(1, count("Nothing was measured", Page)),
    lists:foreach(fun(External) -> ?assertEqual(nomatch, string:find(Page, External)) end, ["http", "src=", "href=", "url(", "@import"]).


%% By the event of the signal that bench/run sends at Ctrl-C.
an_interrupted_run(_Config) ->
    Self = self(),
    Before = length(erlang:ports()),
    %% A newer OTP has others, too.
    Handlers = lists:sort(gen_event:which_handlers(erl_signal_server)),
    {Pid, Monitor} = spawn_monitor(fun() -> Self ! {rows, load_bench:run(options(100.0))} end),
    ok = test_support:await(fun() -> lists:member(bench_interrupt, gen_event:which_handlers(erl_signal_server)) end, ?WAIT_MS),
    ok = test_support:await(fun() -> length(erlang:ports()) > Before end, ?WAIT_MS),
    ok = gen_event:notify(erl_signal_server, sigterm),
    receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(normal, Reason) end,
    receive {rows, Rows} -> ?assertEqual([], Rows) end,
    ?assertEqual(Handlers, lists:sort(gen_event:which_handlers(erl_signal_server))),
    test_support:await_value(Before, fun() -> length(erlang:ports()) end).


%% A result without a latency, one that collapsed, and a name that HTML must not take for a tag.
the_page_of_a_collapse(_Config) ->
    Result = #{
               connections => 2000,
               stage => sustain,
               way => native,
               turns => 1,
               asked => 66_000.0,
               offered => 66_000.0,
               delivered => 0.0,
               sent => 198_000,
               received => 0,
               lost => 3,
               refused => #{circuit_open => 197_997},
               backlog => 3,
               collapsed => false,
               not_offered => false,
               memory_kb => 3.25,
               long_gcs => 0,
               longest_gc_ms => 0,
               run_queue => 1.5,
               run_queue_max => 4
              },
    Collapsed = Result#{
                  way => classic,
                  refused => #{"<b>" => 1},
                  collapsed => true,
                  latency => #{p50 => 1.0, p95 => 2.0, p99 => 3.0, p999 => 4.0, max => 5.0}
                 },
    Report = #{interrupted => true, results => [Result, Collapsed]},
    Row = bench_report:floor(figure, 0.0, bench_report:size_row("load", "lost & found", 3.0, "msgs", none, none)),
    Page = page([bench_report:load(Report, Row)]),
    lists:foreach(fun(Text) -> ?assertNotEqual(nomatch, string:find(Page, Text), Text) end,
                  ["Interrupted", "COLLAPSED", "circuit_open 197,997", "lost &amp; found", "&lt;b&gt;", "class=\"missed\">fail", "hollow"]),
    ?assertEqual(nomatch, string:find(Page, "<b> 1")).


%%% Helpers


%% Receivers that call the fun for each message before they count it.
receivers(Number, Histogram, Handle) ->
    [ {Id, spawn_link(fun() -> receiver(Histogram, Handle) end), Id} || Id <- lists:seq(1, Number) ].


receiver(Histogram, Handle) ->
    receive
        {mcp_message, _, Due} ->
            _ = Handle(Due),
            Us = erlang:convert_time_unit(erlang:monotonic_time() - Due, native, microsecond),
            ok = bench_histogram:add(Histogram, Us),
            receiver(Histogram, Handle)
    end.


%% The receivers exit with the run.
run(Load, Connections) ->
    Complete = maps:merge(#{stripes => ?L:stripes(Connections), send => fun(Batch, Due) -> bench_senders:offer(bare, Batch, Due) end}, Load),
    ?L:run(Complete).


%% Sends to each connection, and takes so long for each tick.
slow(Ms) ->
    fun(Batch, Due) ->
            ok = timer:sleep(Ms),
            bench_senders:offer(bare, Batch, Due)
    end.


options(Seconds) ->
    #{sizes => [20, 50], rate => 3000, seconds => Seconds}.


%% The results by level and stage, each with its ways sorted.
in_order([A, B, C | Others]) -> lists:sort([A, B, C]) ++ in_order(Others);
in_order([]) -> [].


page(Rows) ->
    [Report] = [ Load || #{load := Load} <- Rows ],
    unicode:characters_to_list(bench_html:page([{version, "erlmcp_native"}, {revision, "1"}, {date, "today"}], Rows, Report, 61.0)).


count(Text, Page) ->
    length(string:split(Page, Text, all)) - 1.
