%%% The report of the part load: one HTML file that needs no other one and no network, with plots as SVG.
%%%
%%% Colors follow the reader's light or dark mode. Plots scale with the page, and wide tables scroll by themselves.
-module(bench_html).

-export([page/4]).

-type point() :: {X :: number(), Y :: number(), Text :: iodata(), Solid :: boolean()}.
-type series() :: {Class :: string(), Style :: line | dashed, [point()]}.
-type chart() :: #{
                   title := iodata(),
                   x := string(),
                   y := string(),
                   scale := linear | log,
                   series := [series()],
                   % A horizontal line.
                   limit := none | {number(), string()}
                  }.
%% From the value to the coordinate, and the ticks.
-type axis() :: {fun((number()) -> float()), [{number(), iodata()}]}.

%% The drawing, and the margins of the plot in it. The text has 12 pixels, on a phone nine or ten.
-define(WIDTH,  400).
-define(HEIGHT, 280).
-define(LEFT,   56).
-define(RIGHT,  14).
-define(TOP,    12).
-define(BOTTOM, 44).
-define(TICKS,  6).


%% The page about rows of which one carries results of the load. `Machine' is that of {@link bench_machine}.
-spec page([{atom(), io_lib:chars()}], [bench_report:row()], load_bench:report(), TookSeconds :: float()) -> iodata().
page(Machine, Rows, #{results := Results, interrupted := Interrupted}, Took) ->
    unicode:characters_to_binary(
      ["<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
       "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
       "<title>Load benchmark of erlmcp_native</title>\n<style>\n",
       style(),
       "</style></head>\n<body><main>\n<h1>Load benchmark of erlmcp_native</h1>\n<p>",
       escaped(lists:join(", ", [ Text || Key <- [version, revision, date], {_, Text} <- [lists:keyfind(Key, 1, Machine)] ])),
       io_lib:format(". Measured in ~b min ~b s.", [round(Took) div 60, round(Took) rem 60]),
       "</p>\n",
       [ "<p class=\"missed\"><strong>Interrupted: only a part was measured.</strong></p>\n" || Interrupted ],
       "<h2>Requirements</h2>\n",
       requirements(Rows),
       "<h2>Plots</h2>\n",
       legend(),
       "<div class=\"charts\">\n",
       [ chart(Chart) || Chart <- charts(Results) ],
       "</div>\n",
       [ table(Stage, Of) || Stage <- [sustain, ramp, rate, burst], Of <- [[ Result || #{stage := One} = Result <- Results, One =:= Stage ]], Of =/= [] ],
       notes(),
       "<h2>Machine</h2>\n<div class=\"wide\"><table class=\"texts\">\n",
       [ ["<tr><th>", atom_to_list(Key), "</th><td>", escaped(Text), "</td></tr>\n"] || {Key, Text} <- Machine ],
       "</table></div>\n</main></body></html>\n"]).


-spec style() -> string().
style() ->
    ":root{color-scheme:light dark;--text:#1c2024;--faint:#5b636d;--page:#fff;--line:#d9dde2;--band:#f4f6f8;"
    "--native:#1f62d0;--classic:#c25a00;--bare:#557a46;--good:#14703a;--bad:#b3261e}\n"
    "@media (prefers-color-scheme:dark){:root{--text:#e4e7eb;--faint:#9aa4af;--page:#14171a;--line:#363c43;--band:#1d2125;"
    "--native:#6ea8ff;--classic:#ff9d4d;--bare:#93c47d;--good:#5fd08b;--bad:#ff8a80}}\n"
    "body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}\n"
    "main{max-width:1280px;margin:0 auto;padding:16px}\n"
    "h1{font-size:1.5em;margin:.4em 0}h2{font-size:1.15em;margin:1.6em 0 .5em}p,li{max-width:75ch}\n"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}\n"
    "th,td{padding:3px 7px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}\n"
    "thead th{background:var(--band);font-weight:600}.first,.texts th,.texts td{text-align:left}.first:first-child{position:sticky;left:0;background:var(--page)}\n"
    ".texts td:nth-child(2){white-space:normal;overflow-wrap:break-word}.group td,.group th{border-top:2px solid var(--line)}\n"
    ".met{color:var(--good);font-weight:600}.missed{color:var(--bad);font-weight:600}.note{text-align:left;white-space:normal;min-width:9em}thead .first:first-child{background:var(--band)}\n"
    ".charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr))}\n"
    "figure{margin:0}figcaption{font-weight:600;margin-bottom:4px}svg{display:block;width:100%;height:auto}\n"
    "svg text{font:12px system-ui,sans-serif;fill:var(--faint)}.grid{stroke:var(--line);fill:none}\n"
    ".limit{stroke:var(--bad);stroke-dasharray:2 3;fill:none}svg text.over{fill:var(--bad);stroke:var(--page);stroke-width:4px;paint-order:stroke}\n"
    ".series{fill:none;stroke-width:2;stroke-linejoin:round}.dashed{stroke-dasharray:5 4;stroke-width:1.3}\n"
    ".native{stroke:var(--native)}.classic{stroke:var(--classic)}.bare{stroke:var(--bare)}.asked{stroke:var(--faint)}\n"
    ".mark{stroke-width:2}.native.solid{fill:var(--native)}.classic.solid{fill:var(--classic)}.bare.solid{fill:var(--bare)}\n"
    ".hollow{fill:var(--page)}.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 12px;padding:0;list-style:none}\n"
    ".legend svg{display:inline-block;width:26px;height:14px;vertical-align:-2px;margin-right:6px}\n".


%%% Requirements


-spec requirements([bench_report:row()]) -> iodata().
requirements(Rows) ->
    %% A figure that is compared with two others is in two rows.
    Judged = lists:foldr(fun(#{name := Name} = Row, Others) ->
                                 [Row | [ Other || Other <- Others, map_get(name, Other) =/= Name ]]
                         end,
                         [],
                         [ Row || #{met := _} = Row <- Rows ]),
    ["<div class=\"wide\"><table class=\"texts\"><thead><tr><th>verdict</th><th>measured</th><th>figure</th><th>required</th></tr></thead>\n",
     [ requirement(Row) || Row <- Judged ],
     "</table></div>\n",
     [ "<p>The requirements of 500,000 messages a second to 15,000 connections were not measured in this run.</p>\n"
       || [] =:= [ Row || #{unit := "msg/s"} = Row <- Judged ] ]].


-spec requirement(bench_report:row()) -> iodata().
requirement(#{name := Name, met := Met, better := Better, floor := Floor, floor_of := Of, unit := Unit} = Row) ->
    {Sign, Verdict} = {case Better of
                           less -> "≤ ";
                           more -> "≥ "
                       end,
                       case Met of
                           true -> "<td class=\"met\">pass</td>";
                           false -> "<td class=\"missed\">fail</td>"
                       end},
    {Figure, Limit} = case Of of
                          ratio -> {decimals(map_get(ratio, Row)) ++ " × bare send", decimals(Floor) ++ " ×"};
                          figure -> {quantity(map_get(figure, Row)) ++ [$\s | Unit], quantity(Floor) ++ [$\s | Unit]}
                      end,
    ["<tr>", Verdict, "<td>", escaped(Name), "</td><td>", escaped(Figure), "</td><td>", Sign, escaped(Limit), "</td></tr>\n"].


-spec quantity(float()) -> string().
quantity(Value) when Value >= 1000 -> bench_report:thousands(round(Value));
quantity(Value) when Value == trunc(Value) -> integer_to_list(trunc(Value));
quantity(Value) -> decimals(Value).


-spec decimals(float()) -> string().
decimals(Value) ->
    float_to_list(Value, [{decimals, 2}]).


%%% Tables


-spec table(load_bench:stage(), [load_bench:summary(), ...]) -> iodata().
table(Stage, Results) ->
    ["<h2>",
     caption(Stage),
     "</h2>\n<div class=\"wide\"><table><thead><tr>",
     [ ["<th", [ " class=\"first\"" || lists:member(Title, ["connections", "way", "remarks"]) ], ">", Title, "</th>"]
       || Title <- ["connections", "way", "remarks", "asked/s", "offered/s", "delivered/s", "p50 ms", "p95", "p99", "p99.9", "max", "lost", "refused",
                    "KB each", "long GCs", "run queue"] ],
     "</tr></thead>\n",
     rows(Results, none),
     "</table></div>\n"].


-spec caption(load_bench:stage()) -> string().
caption(sustain) -> "Sustained: 33 messages a second to each connection";
caption(ramp) -> "Ramp: from no connection to all";
caption(rate) -> "The highest rate asked for";
caption(burst) -> "Burst: ten times as much".


%% A line above each group of rows with the same number of connections.
-spec rows([load_bench:summary()], none | pos_integer()) -> iodata().
rows([], _Last) ->
    [];
rows([#{connections := Connections} = Result | Others], Last) ->
    [_, Way | Figures] = bench_report:load_texts(Result),
    {Numbers, [Note]} = lists:split(length(Figures) - 1, Figures),
    ["<tr",
     [ " class=\"group\"" || Connections =/= Last ],
     "><td class=\"first\">",
     bench_report:thousands(Connections),
     "</td><td class=\"first\">",
     Way,
     "</td><td class=\"note\">",
     escaped(Note),
     "</td>",
     [ ["<td>", escaped(Number), "</td>"] || Number <- Numbers ],
     "</tr>\n",
     rows(Others, Connections)].


-spec notes() -> string().
notes() ->
    "<h2>How to read it</h2>\n<ul>\n"
    "<li><b>native</b>: <code>erlmcp_registry:route_to_server/3</code>, charged by all three layers; <b>current</b>: the registry as one "
    "gen_server; <b>bare</b>: <code>Pid ! Msg</code> with the pids in hand. Each has a VM of its own; they take turns of some seconds.</li>\n"
    "<li>Latency counts from the time at which a message was due, whether or not its sender was late.</li>\n"
    "<li><b>offered</b>: what the senders sent, refused messages included; <b>delivered</b>: received until 50 ms after the end.</li>\n"
    "<li><b>senders too slow</b>: less than 95 % of what was asked for was offered. The machine, and not the registry, may be the limit.</li>\n"
    "<li><b>COLLAPSED</b>: more than a second's messages waited, and the load was stopped. Figures are those until then.</li>\n"
    "<li><b>lost</b>: sent, not refused, never received.</li>\n"
    "<li><b>KB each</b>: growth of resident memory for each connection, with its process, its mailbox and the senders; <b>long GCs</b>: "
    "collections of a millisecond or more, and the longest in ms; <b>run queue</b>: the mean of processes that are ready to run.</li>\n"
    "</ul>\n".


%%% Plots


-spec charts([load_bench:summary()]) -> [chart()].
charts(Results) ->
    Steady = [ Result || #{stage := Stage} = Result <- Results, Stage =:= sustain orelse Stage =:= rate ],
    Sustained = [ Result || #{stage := sustain} = Result <- Results ],
    Of = fun(Way, All) -> [ Result || #{way := One} = Result <- All, One =:= Way ] end,
    Latency = fun(Percentile, Way) ->
                      [ {Asked, Ms, remark(Result, io_lib:format("~ts ~.1f ms", [percentile(Percentile), Ms])), not Collapsed}
                        || #{asked := Asked, latency := #{Percentile := Ms}, collapsed := Collapsed} = Result <- Of(Way, Steady) ]
              end,
    Ways = bench_senders:ways(),
    [#{
       title => "Latency by load: p95, and p99.9 dashed",
       x => "messages a second, asked for",
       y => "ms",
       scale => log,
       limit => {50, "50 ms"},
       series => [ {atom_to_list(Way), dashed, Latency(p999, Way)} || Way <- Ways ] ++
       [ {atom_to_list(Way), line, Latency(p95, Way)} || Way <- Ways ]
      },
     #{
       title => "Delivered at 33 messages a second each",
       x => "connections",
       y => "messages a second",
       scale => linear,
       limit => none,
       series => [{"asked", dashed, [ {Size, Asked, "", false} || #{connections := Size, asked := Asked} <- Of(native, Sustained) ]} | [ {atom_to_list(Way),
                                                                                                                                          line,
                                                                                                                                          [ {Size, Rate, remark(Result, [bench_report:thousands(round(Rate)), "/s"]), not Collapsed}
                                                                                                                                            || #{connections := Size, delivered := Rate, collapsed := Collapsed} = Result <- Of(Way, Sustained) ]}
                                                                                                                                         || Way <- Ways ]]
      },
     #{
       title => "Memory of a connection, under this load",
       x => "connections",
       y => "KB",
       scale => linear,
       limit => none,
       series => [ {atom_to_list(Way),
                    line,
                    [ {Size, Kb, remark(Result, io_lib:format("~.1f KB", [Kb])), not Collapsed}
                      || #{connections := Size, memory_kb := Kb, collapsed := Collapsed} = Result <- Of(Way, Sustained) ]}
                   || Way <- Ways ]
      }].


-spec percentile(atom()) -> string().
percentile(p999) -> "p99.9";
percentile(Percentile) -> atom_to_list(Percentile).


-spec remark(load_bench:summary(), iodata()) -> iodata().
remark(#{connections := Connections, way := Way, collapsed := Collapsed}, Text) ->
    [load_bench:name(Way), ", ", bench_report:thousands(Connections), " connections: ", Text, [ ", collapsed" || Collapsed ]].


-spec legend() -> iodata().
legend() ->
    ["<ul class=\"legend\">",
     [ ["<li><svg viewBox=\"0 0 26 14\" aria-hidden=\"true\"><path class=\"series ", Class, "\" d=\"M0 7H26\"/>", mark(Class, 13.0, 7.0, true, ""), "</svg>", Name, "</li>"]
       || {Class, Name} <- [{"native", "native"}, {"classic", "current: one gen_server"}, {"bare", "bare send"}] ],
     "<li>hollow mark: collapsed</li><li>grey dashes: asked for</li></ul>\n"].


-spec chart(chart()) -> iodata().
chart(#{title := Title, x := XName, y := YName, scale := Scale, series := Series, limit := Limit}) ->
    Points = lists:append([ Some || {_, _, Some} <- Series ]),
    Caption = ["<figure><figcaption>", escaped(Title), "</figcaption>"],
    case Points of
        [] ->
            [Caption, "<p>Nothing was measured.</p></figure>\n"];
        _ ->
            Limits = [ Value || {Value, _} <- [Limit] ],
            X = axis(linear, [ At || {At, _, _, _} <- Points ], ?LEFT, ?WIDTH - ?RIGHT),
            Y = axis(Scale, Limits ++ [ At || {_, At, _, _} <- Points ], ?HEIGHT - ?BOTTOM, ?TOP),
            [Caption,
             io_lib:format("<svg viewBox=\"0 0 ~b ~b\" role=\"img\" aria-label=\"", [?WIDTH, ?HEIGHT]),
             escaped(Title),
             "\">",
             frame(X, Y, XName, YName),
             [ series(One, X, Y) || One <- Series ],
             limit(Limit, Y),
             "</svg></figure>\n"]
    end.


%% Linear axes begin at zero, logarithmic ones at a power of ten.
-spec axis(linear | log, [number(), ...], pos_integer(), pos_integer()) -> axis().
axis(linear, Values, From, To) ->
    Greatest = max(1.0e-9, lists:max(Values)),
    Step = step(Greatest / ?TICKS),
    End = ceil(Greatest / Step),
    {fun(Value) -> From + (To - From) * Value / (Step * End) end, [ {Step * N, number(Step * N)} || N <- lists:seq(0, End) ]};
axis(log, Values, From, To) ->
    Powers = [ math:log10(max(1.0e-3, Value)) || Value <- Values ],
    {Least, Greatest} = {floor(lists:min(Powers)), max(ceil(lists:max(Powers)), floor(lists:min(Powers)) + 1)},
    {fun(Value) -> From + (To - From) * (math:log10(max(1.0e-3, Value)) - Least) / (Greatest - Least) end,
     [ {math:pow(10, Power), number(math:pow(10, Power))} || Power <- lists:seq(Least, Greatest) ]}.


%% The least of 1, 2 and 5 times a power of ten that is not less.
-spec step(float()) -> number().
step(Least) ->
    Power = math:pow(10, floor(math:log10(Least))),
    hd([ Step || Factor <- [1, 2, 5, 10], Step <- [Factor * Power], Step >= Least * 0.999999 ]).


-spec number(number()) -> string().
number(Value) when Value >= 1_000_000 -> shortest(Value / 1_000_000) ++ "M";
number(Value) when Value >= 1_000 -> shortest(Value / 1_000) ++ "k";
number(Value) -> shortest(Value).


-spec shortest(number()) -> string().
shortest(Value) ->
    float_to_list(float(Value), [{decimals, 3}, compact]) -- ".0".


-spec frame(axis(), axis(), string(), string()) -> iodata().
frame({X, XTicks}, {Y, YTicks}, XName, YName) ->
    {Bottom, Right} = {?HEIGHT - ?BOTTOM, ?WIDTH - ?RIGHT},
    [[ [io_lib:format("<path class=\"grid\" d=\"M~b ~.1fH~b\"/>", [?LEFT, Y(Value), Right]),
        text(?LEFT - 6, Y(Value) + 4, "end", "", Text)]
       || {Value, Text} <- YTicks ],
     [ [io_lib:format("<path class=\"grid\" d=\"M~.1f ~bv4\"/>", [X(Value), Bottom]), text(X(Value), Bottom + 17, "middle", "", Text)]
       || {Value, Text} <- XTicks ],
     text((?LEFT + Right) / 2, ?HEIGHT - 6, "middle", "", XName),
     io_lib:format("<text transform=\"translate(12 ~.1f) rotate(-90)\" text-anchor=\"middle\">~ts</text>", [(?TOP + Bottom) / 2, YName])].


-spec text(number(), number(), string(), string(), iodata()) -> iodata().
text(X, Y, Anchor, Class, Text) ->
    io_lib:format("<text x=\"~.1f\" y=\"~.1f\" text-anchor=\"~ts\" class=\"~ts\">~ts</text>", [float(X), float(Y), Anchor, Class, escaped(Text)]).


-spec limit(none | {number(), string()}, axis()) -> iodata().
limit(none, _Y) ->
    [];
limit({Value, Text}, {Y, _}) ->
    [io_lib:format("<path class=\"limit\" d=\"M~b ~.1fH~b\"/>", [?LEFT, Y(Value), ?WIDTH - ?RIGHT]),
     text(?LEFT + 4, Y(Value) - 4, "start", "over", Text)].


-spec series(series(), axis(), axis()) -> iodata().
series({_Class, _Style, []}, _X, _Y) ->
    [];
series({Class, Style, Unsorted}, {X, _}, {Y, _}) ->
    Points = lists:sort(Unsorted),
    [["<path class=\"series ", Class, [ " dashed" || Style =:= dashed ], "\" d=\"M"],
     lists:join("L", [ io_lib:format("~.1f ~.1f", [X(At), Y(Value)]) || {At, Value, _, _} <- Points ]),
     "\"/>",
     [ mark(Class, X(At), Y(Value), Solid, Text) || Style =:= line, {At, Value, Text, Solid} <- Points ]].


%% Ways differ by the shape of their marks, too.
-spec mark(string(), float(), float(), boolean(), iodata()) -> iodata().
mark(Class, X, Y, Solid, Text) ->
    Shape = case Class of
                "native" -> "a4 4 0 1 0 8 0a4 4 0 1 0 -8 0";
                "classic" -> "v-4h8v8h-8z";
                "bare" -> "l4 -5l4 5l-4 5z"
            end,
    Fill = case Solid of
               true -> "solid";
               false -> "hollow"
           end,
    [io_lib:format("<path class=\"mark ~ts ~ts\" d=\"M~.1f ~.1f~ts\">", [Class, Fill, X - 4, Y, Shape]), "<title>", escaped(Text), "</title></path>"].


-spec escaped(unicode:chardata()) -> unicode:chardata().
escaped(Text) ->
    [ case Character of
          $< -> "&lt;";
          $> -> "&gt;";
          $& -> "&amp;";
          $" -> "&quot;";
          _ -> Character
      end
      || Character <- unicode:characters_to_list(Text) ].
