%%% Interleaved rounds, medians, and ratios within a round.
%%%
%%% The cases are measured in turn, round after round, and each round starts with another case, so that other
%%% work on the machine affects all of them alike. A ratio is the median of the ratios of the rounds, not the
%%% ratio of two medians. Its spread is the least and the greatest of those ratios.
-module(bench_rounds).

-export([interleave/3, in_process/1, median/1, ratio/2, spread/1]).

-export_type([figures/0, ratio/0]).

%% One figure per round, in the order of the rounds.
-type figures() :: [float()].
-type ratio() :: {Median :: float(), Least :: float(), Greatest :: float()}.


%% Runs every case once per round. The first round warms up and does not count.
-spec interleave(pos_integer(), [{Case, fun(() -> float())}], fun(() -> term())) ->
          #{Case => figures()}.
interleave(Rounds, Cases, Progress) ->
    Empty = maps:from_list([ {Case, []} || {Case, _} <- Cases ]),
    _ = round(Cases, Empty),
    Figures = rounds(Rounds, Cases, Progress, Empty),
    maps:map(fun(_Case, Reversed) -> lists:reverse(Reversed) end, Figures).


%% The result of a fun that runs in a process of its own: what it holds, and what is sent to it, ends with it.
-spec in_process(fun(() -> Result)) -> Result.
in_process(Fun) ->
    {Pid, Monitor} = spawn_monitor(fun() -> exit({result, Fun()}) end),
    receive {'DOWN', Monitor, process, Pid, {result, Result}} -> Result end.


-spec rounds(non_neg_integer(), [{Case, fun(() -> float())}], fun(() -> term()), Figures) ->
          Figures when Figures :: #{Case => figures()}.
rounds(0, _Cases, _Progress, Figures) ->
    Figures;
rounds(Left, [First | Others] = Cases, Progress, Figures) ->
    After = round(Cases, Figures),
    _ = Progress(),
    rounds(Left - 1, Others ++ [First], Progress, After).


-spec round([{Case, fun(() -> float())}], Figures) -> Figures
              when Figures :: #{Case => figures()}.
round(Cases, Figures) ->
    lists:foldl(
      fun({Case, Measure}, Sofar) ->
              true = erlang:garbage_collect(),
              Figure = Measure(),
              maps:update_with(Case, fun(Earlier) -> [Figure | Earlier] end, Sofar)
      end,
      Figures,
      Cases).


-spec median(figures()) -> float().
median(Figures) ->
    Sorted = lists:sort(Figures),
    Length = length(Sorted),
    Middle = lists:nth((Length + 1) div 2, Sorted),
    case Length rem 2 of
        1 -> Middle;
        0 -> (Middle + lists:nth(Length div 2 + 1, Sorted)) / 2
    end.


-spec ratio(figures(), figures()) -> ratio().
ratio(Figures, Others) ->
    Ratios = [ Figure / Other || {Figure, Other} <- lists:zip(Figures, Others) ],
    {median(Ratios), lists:min(Ratios), lists:max(Ratios)}.


%% Half the distance between the least and the greatest figure, as a part of the median.
-spec spread(figures()) -> float().
spread(Figures) ->
    (lists:max(Figures) - lists:min(Figures)) / 2 / median(Figures).
