%%% Rows of results, as a table for people and as JSON for programs.
%%%
%%% A row is a figure of the native registry, usually beside that of something else, and their ratio. It may
%%% have a floor, for the figure or for the ratio. A row in which the other side is better is marked as *loses*,
%%% whatever its floor.
-module(bench_report).

%% Rows
-export([time_row/5, rate_row/5, latency_row/6, size_row/6]).
-export([floor/3, goal/3, growth/1, series/3, load/2]).
%% Output
-export([print/2, json/1, missed/1, load_texts/1]).
%% Numbers
-export([thousands/1, seconds/1]).

-export_type([row/0, point/0]).

-type point() :: #{seconds := float(), resident_mb := float(), vm_mb := float(), connections := non_neg_integer()}.

-type row() :: #{
                 section := string(),
                 name := string(),
                 figure := float(),
                 unit := string(),
                 better := less | more,
                 against => string(),
                 baseline => float(),
                 ratio => float(),
                 ratio_least => float(),
                 ratio_greatest => float(),
                 floor => float(),
                 floor_of => figure | ratio,
                 met => boolean(),
                 goal => float(),
                 goal_of => figure | ratio,
                 goal_met => boolean(),
                 loses := boolean(),
                 % The ratio is of one thing at two sizes, and nothing loses.
                 growth => true,
                 latency => #{native := map(), against := map()},
                 % Memory over time.
                 series => #{title := string(), points := [point()]},
                 load => load_bench:report()
                }.

-define(BAR, 50).

%%% Rows


%% Nanoseconds.
-spec time_row(string(), string(), bench_rounds:figures(), string(), bench_rounds:figures()) ->
          row().
time_row(Section, Name, Figures, Against, Others) ->
    compared(row(Section, Name, "ns", less), Figures, Against, Others).


%% Messages per second.
-spec rate_row(string(), string(), bench_rounds:figures(), string(), bench_rounds:figures()) ->
          row().
rate_row(Section, Name, Figures, Against, Others) ->
    compared(row(Section, Name, "msg/s", more), Figures, Against, Others).


%% Milliseconds at a percentile. Each measurement is one map with all percentiles.
-spec latency_row(string(), p95 | p99, string(), [map()], string(), [map()]) -> row().
latency_row(Section, Percentile, At, Native, Against, Others) ->
    Row = compared(row(Section, atom_to_list(Percentile) ++ " at " ++ At, "ms", less),
                   [ map_get(Percentile, Result) || Result <- Native ],
                   Against,
                   [ map_get(Percentile, Result) || Result <- Others ]),
    Row#{latency => #{native => medians(Native), against => medians(Others)}}.


-spec medians([map()]) -> map().
medians([First | _] = Results) ->
    maps:map(fun(Key, Value) when is_float(Value) ->
                     bench_rounds:median([ map_get(Key, Result) || Result <- Results ]);
                (saturated, _) ->
                     length([ true || #{saturated := true} <- Results ]) * 2 > length(Results);
                (_Key, Value) ->
                     Value
             end,
             First).


%% A quantity of which less is better, from one measurement.
-spec size_row(string(), string(), float(), string(), string() | none, float() | none) -> row().
size_row(Section, Name, Figure, Unit, none, none) ->
    (row(Section, Name, Unit, less))#{figure => Figure};
size_row(Section, Name, Figure, Unit, Against, Baseline) ->
    compared(row(Section, Name, Unit, less), [Figure], Against, [Baseline]).


-spec row(string(), string(), string(), less | more) -> row().
row(Section, Name, Unit, Better) ->
    #{
      section => Section,
      name => Name,
      figure => 0.0,
      unit => Unit,
      better => Better,
      loses => false
     }.


-spec compared(row(), bench_rounds:figures(), string(), bench_rounds:figures()) -> row().
compared(#{better := Better} = Row, Figures, Against, Others) ->
    {Ratio, Least, Greatest} = bench_rounds:ratio(Figures, Others),
    Row#{
      figure => bench_rounds:median(Figures),
      against => Against,
      baseline => bench_rounds:median(Others),
      ratio => Ratio,
      ratio_least => Least,
      ratio_greatest => Greatest,
      loses => case Better of
                   less -> Ratio > 1;
                   more -> Ratio < 1
               end
     }.


%% The least acceptable value, or the greatest.
-spec floor(figure | ratio, float(), row()) -> row().
floor(Of, Floor, Row) ->
    Row#{floor => Floor, floor_of => Of, met => reaches(Of, Floor, Row)}.


%% The value that the figure or the ratio is to have some day.
-spec goal(figure | ratio, float(), row()) -> row().
goal(Of, Goal, Row) ->
    Row#{goal => Goal, goal_of => Of, goal_met => reaches(Of, Goal, Row)}.


-spec reaches(figure | ratio, float(), row()) -> boolean().
reaches(Of, Limit, #{better := less} = Row) -> map_get(Of, Row) =< Limit;
reaches(Of, Limit, #{better := more} = Row) -> map_get(Of, Row) >= Limit.


-spec growth(row()) -> row().
growth(Row) ->
    Row#{growth => true, loses => false}.


%% Adds the samples that the row's figure was made from, which are printed below the table.
-spec series(string(), [point()], row()) -> row().
series(Title, Points, Row) ->
    Row#{series => #{title => Title, points => Points}}.


%% Adds the results of all levels of load, which are printed below the table.
-spec load(load_bench:report(), row()) -> row().
load(Report, Row) ->
    Row#{load => Report}.


%% The rows that miss their floor.
-spec missed([row()]) -> [row()].
missed(Rows) ->
    [ Row || #{met := false} = Row <- Rows ].


%%% Table


-spec print([{atom(), term()}], [row()]) -> ok.
print(Machine, Rows) ->
    io:format("~n"),
    lists:foreach(fun({Key, Value}) -> io:format("~-11ts~ts~n", [Key, Value]) end, Machine),
    io:format("~n~-47ts ~9ts   ~-34ts ~9ts  ~-18ts ~ts~n",
              ["native", "", "against", "", "ratio (spread)", "floor"]),
    _ = lists:foldl(fun(#{section := Section} = Row, Last) ->
                            Section =:= Last orelse io:format("~ts~n", [Section]),
                            print_row(Row),
                            Section
                    end,
                    none,
                    Rows),
    Latencies = [ Latency || #{latency := Latency} <- Rows ],
    Latencies =:= [] orelse print_latencies(Latencies),
    lists:foreach(fun print_series/1, [ Series || #{series := Series} <- Rows ]),
    lists:foreach(fun print_load/1, [ Load || #{load := Load} <- Rows ]),
    Floors = length([ Row || #{met := _} = Row <- Rows ]),
    Losing = length([ Row || #{loses := true} = Row <- Rows ]),
    io:format("~nratios: native / other, the median of the rounds; less is better, more for msg/s~n"
              "~b of ~b floors missed, ~b of ~b rows lose~n",
              [length(missed(Rows)), Floors, Losing, length(Rows)]).


-spec print_row(row()) -> ok.
print_row(#{name := Name, figure := Figure, unit := Unit} = Row) ->
    Against = maps:get(against, Row, ""),
    Baseline = case Row of
                   #{baseline := Value} -> quantity(Value, Unit);
                   _ -> ""
               end,
    io:format("  ~-45ts ~9ts   ~-34ts ~9ts  ~-18ts ~-11ts ~ts~n",
              [Name,
               quantity(Figure, Unit),
               Against,
               Baseline,
               ratio(Row),
               floor_text(Row),
               lists:join(", ", [ Text || Text <- [verdict(Row), goal_text(Row)], Text =/= "" ])]).


-spec ratio(row()) -> string().
ratio(#{ratio := Ratio, ratio_least := Same, ratio_greatest := Same}) ->
    short(Ratio);
ratio(#{ratio := Ratio, ratio_least := Least, ratio_greatest := Greatest}) ->
    short(Ratio) ++ " (" ++ short(Least) ++ "-" ++ short(Greatest) ++ ")";
ratio(_) ->
    "".


-spec floor_text(row()) -> io_lib:chars().
floor_text(#{floor := Floor, better := less, floor_of := Of, unit := Unit}) ->
    "<= " ++ limit(Floor, Of, Unit);
floor_text(#{floor := Floor, better := more, floor_of := Of, unit := Unit}) ->
    ">= " ++ limit(Floor, Of, Unit);
floor_text(_) ->
    "".


-spec goal_text(row()) -> io_lib:chars().
goal_text(#{goal := Goal, goal_met := Met, goal_of := Of, unit := Unit}) ->
    Verdict = case Met of
                  true -> " met";
                  false -> " missed"
              end,
    ["goal " ++ limit(Goal, Of, Unit), Verdict];
goal_text(_) ->
    "".


-spec limit(float(), figure | ratio, string()) -> io_lib:chars().
limit(Floor, ratio, _Unit) -> io_lib:format("~p", [Floor]);
limit(Floor, figure, Unit) -> io_lib:format("~b ", [round(Floor)]) ++ Unit.


-spec verdict(row()) -> string().
verdict(#{met := true, loses := true}) -> "met, loses";
verdict(#{met := true}) -> "met";
verdict(#{met := false}) -> "MISSED";
verdict(#{loses := true}) -> "loses";
verdict(_) -> "".


-spec print_latencies([#{native := map(), against := map()}]) -> ok.
print_latencies(Latencies) ->
    io:format("~n~-34ts ~10ts ~12ts ~9ts ~9ts ~9ts ~9ts ~9ts~n",
              ["latency, ms", "offered/s", "delivered/s", "p50", "p95", "p99", "p99.9", "max"]),
    Results = lists:usort(
                [ {Offered, Way, Result}
                  || Latency <- Latencies,
                     #{offered := Offered, way := Way} = Result <- maps:values(Latency) ]),
    lists:foreach(
      fun({Offered, Way, #{delivered := Delivered, p50 := P50, p95 := P95, p99 := P99, p999 := P999, max := Max} = Result}) ->
              Note = case Result of
                         #{saturated := true} -> "  saturated";
                         _ -> ""
                     end,
              io:format("~-34ts ~10ts ~12ts ~9.2f ~9.2f ~9.2f ~9.2f ~9.2f~ts~n",
                        [bench_senders:name(Way),
                         thousands(Offered),
                         thousands(round(Delivered)),
                         P50,
                         P95,
                         P99,
                         P999,
                         Max,
                         Note])
      end,
      Results).


%% The bars begin at zero.
-spec print_series(#{title := string(), points := [point()]}) -> ok.
print_series(#{title := Title, points := Points}) ->
    Most = lists:max([ Mb || #{resident_mb := Mb} <- Points ]),
    io:format("~n~-18ts ~12ts ~9ts ~12ts~n", [Title, "resident, MB", "VM, MB", "connections"]),
    lists:foreach(fun(#{seconds := Seconds, resident_mb := Mb, vm_mb := Vm, connections := Connections}) ->
                          Bar = lists:duplicate(round(?BAR * Mb / Most), $#),
                          io:format("~16b s ~13.1f ~9.1f ~12ts  ~ts~n", [round(Seconds), Mb, Vm, thousands(Connections), Bar])
                  end,
                  Points).


-spec print_load(load_bench:report()) -> ok.
print_load(#{results := Results}) ->
    Format = "~-24ts ~-9ts ~11ts ~11ts ~11ts ~8ts ~8ts ~8ts ~8ts ~8ts ~6ts ~9ts ~7ts ~9ts ~9ts  ~ts~n",
    io:format("~n" ++ Format,
              ["load: connections, stage",
               "way",
               "asked/s",
               "offered/s",
               "delivered/s",
               "p50 ms",
               "p95",
               "p99",
               "p99.9",
               "max",
               "lost",
               "refused",
               "KB each",
               "long GCs",
               "run queue",
               ""]),
    lists:foreach(fun(Result) -> io:format(Format, load_texts(Result)) end, Results),
    io:format("long GCs: collections of a millisecond or more, and the longest in ms; run queue: the mean~n").


%% The columns of one result of the load, as texts.
-spec load_texts(load_bench:summary()) -> [io_lib:chars()].
load_texts(#{connections := Connections, stage := Stage, way := Way, lost := Lost, refused := Refused} = Result) ->
    Rate = fun(Key) -> thousands(round(map_get(Key, Result))) end,
    Percentile = fun(Key) ->
                         case Result of
                             #{latency := #{Key := Ms}} -> short(Ms);
                             _ -> "-"
                         end
                 end,
    #{long_gcs := Gcs, longest_gc_ms := Longest, run_queue := RunQueue} = Result,
    [thousands(Connections) ++ ", " ++ atom_to_list(Stage), load_bench:name(Way)] ++
    [ Rate(Key) || Key <- [asked, offered, delivered] ] ++
    [ Percentile(Key) || Key <- [p50, p95, p99, p999, max] ] ++
    [thousands(Lost),
     thousands(lists:sum(maps:values(Refused))),
     case Result of
         #{memory_kb := Kb} -> short(Kb);
         _ -> "-"
     end,
     thousands(Gcs) ++ [ [" (", integer_to_list(Longest), ")"] || Gcs > 0 ],
     thousands(round(RunQueue)),
     load_note(Result)].


%% What a reader of the figures has to know.
-spec load_note(load_bench:summary()) -> io_lib:chars().
load_note(#{collapsed := Collapsed, not_offered := NotOffered, refused := Refused, delivered := Delivered, offered := Offered} = Result) ->
    #{sent := Sent, received := Received} = Result,
    lists:join("; ",
               [ "COLLAPSED" || Collapsed ] ++
               [ "senders too slow" || NotOffered ] ++
               [ "falls behind" || not Collapsed, Delivered < 0.95 * Offered * (Received + map_get(lost, Result)) / Sent ] ++
               [ io_lib:format("~ts ~ts", [Reason, thousands(Number)]) || {Reason, Number} <- lists:sort(maps:to_list(Refused)) ]).


%%% Numbers


-spec quantity(float(), string()) -> string().
quantity(Value, "ns") when Value >= 1.0e6 -> short(Value / 1.0e6) ++ " ms";
quantity(Value, "ns") when Value >= 1.0e3 -> short(Value / 1.0e3) ++ " us";
quantity(Value, "msg/s") -> short(Value / 1.0e6) ++ " M/s";
quantity(Value, Unit) -> short(Value) ++ " " ++ Unit.


%% About three significant figures.
-spec short(float()) -> string().
short(Value) when abs(Value) >= 99.95 -> integer_to_list(round(Value));
short(Value) when abs(Value) >= 9.995 -> float_to_list(Value, [{decimals, 1}]);
short(Value) -> float_to_list(Value, [{decimals, 2}]).


%% With a comma after every three digits from the right.
-spec thousands(integer()) -> string().
thousands(Number) when Number < 1000 ->
    integer_to_list(Number);
thousands(Number) ->
    thousands(Number div 1000) ++ "," ++ lists:flatten(io_lib:format("~3..0b", [Number rem 1000])).


-spec seconds(integer()) -> float().
seconds(Native) ->
    Native / erlang:convert_time_unit(1, second, native).


%%% JSON


%% Maps, strings, atoms, numbers, and lists of maps.
-spec json(term()) -> iolist().
json(Map) when is_map(Map) ->
    Members = [ [json(Key), $:, json(Value)] || {Key, Value} <- lists:sort(maps:to_list(Map)) ],
    [${, lists:join($,, Members), $}];
json([First | _] = List) when is_map(First) ->
    [$[, lists:join(",\n", [ json(Element) || Element <- List ]), $]];
json([]) ->
    "[]";
json(Integer) when is_integer(Integer) ->
    integer_to_list(Integer);
json(Float) when is_float(Float) ->
    float_to_list(Float, [{decimals, 6}, compact]);
json(Bare) when Bare =:= true; Bare =:= false; Bare =:= null ->
    atom_to_list(Bare);
json(Atom) when is_atom(Atom) ->
    json(atom_to_list(Atom));
json(String) ->
    [$", [ escaped(Character) || Character <- unicode:characters_to_list(String) ], $"].


-spec escaped(char()) -> iolist().
escaped($") -> "\\\"";
escaped($\\) -> "\\\\";
escaped(Control) when Control < 32 -> io_lib:format("\\u~4.16.0b", [Control]);
escaped(Character) -> [unicode:characters_to_binary([Character])].
