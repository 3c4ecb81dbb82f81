%%% @private
%%% What the shard managers have measured last, for whoever asks: a table that outlives them, so
%%% that nobody has to wait for one.
-module(erlmcp_shard_stats).

-export([new/0, insert/3, lookup/1]).

-export_type([percentiles/0]).

-type percentiles() :: #{p50 := non_neg_integer(), p95 := non_neg_integer(), p99 := non_neg_integer()}.

-define(NONE, #{p50 => 0, p95 => 0, p99 => 0}).


%% Makes the table; it goes with the calling process.
-spec new() -> ok.
new() ->
    _ = ets:new(?MODULE, [named_table, public, {read_concurrency, true}]),
    ok.


%% `LatenciesUs': the latest measurements in any order.
-spec insert(non_neg_integer(), MessagesPerSecond :: non_neg_integer(), LatenciesUs :: [non_neg_integer()]) -> ok.
insert(Shard, MessagesPerSecond, LatenciesUs) ->
    true = ets:insert(?MODULE, {Shard, MessagesPerSecond, LatenciesUs}),
    ok.


-spec lookup(non_neg_integer()) -> {MessagesPerSecond :: non_neg_integer(), percentiles()}.
lookup(Shard) ->
    try ets:lookup(?MODULE, Shard) of
        [{Shard, MessagesPerSecond, LatenciesUs}] -> {MessagesPerSecond, percentiles(lists:sort(LatenciesUs))};
        [] -> {0, ?NONE}
    catch
        %% The application is not running.
        error:badarg -> {0, ?NONE}
    end.


-spec percentiles([non_neg_integer()]) -> percentiles().
percentiles([]) ->
    ?NONE;
percentiles(Sorted) ->
    Length = length(Sorted),
    %% The nearest rank.
    At = fun(Percent) -> lists:nth((Percent * Length + 99) div 100, Sorted) end,
    #{p50 => At(50), p95 => At(95), p99 => At(99)}.
