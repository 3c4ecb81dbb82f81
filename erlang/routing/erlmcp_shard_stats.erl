%%% @private
%%% What the shard managers have measured last, for whoever asks: a table that outlives them, so
%%% that nobody has to wait for one.
-module(erlmcp_shard_stats).

-export([new/0]).
-export([insert/3, has_sampled/1, set_overload/2, is_overload/1]).
-export([lookup/1, latencies_us/1, first_sample/1, percentiles/1]).

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
    insert({Shard, MessagesPerSecond, LatenciesUs}).


%% The calling manager has taken its first sample.
-spec has_sampled(non_neg_integer()) -> ok.
has_sampled(Shard) ->
    insert({{first_sample, Shard}, self(), erlang:monotonic_time(microsecond)}).


%% Whether there is an overload of the shard of which the log tells the beginning and not yet the end.
-spec set_overload(non_neg_integer(), boolean()) -> ok.
set_overload(Shard, IsOverload) ->
    insert({{overload, Shard}, IsOverload}).


-spec is_overload(non_neg_integer()) -> boolean().
is_overload(Shard) ->
    case row({overload, Shard}) of
        {_Key, IsOverload} -> IsOverload;
        none -> false
    end.


%% Where the table has gone with its supervisor, the manager is about to go too.
-spec insert(tuple()) -> ok.
insert(Row) ->
    try ets:insert(?MODULE, Row) of
        true -> ok
    catch
        error:badarg -> ok
    end.


-spec lookup(non_neg_integer()) -> {MessagesPerSecond :: non_neg_integer(), percentiles()}.
lookup(Shard) ->
    case row(Shard) of
        {Shard, MessagesPerSecond, LatenciesUs} -> {MessagesPerSecond, percentiles(LatenciesUs)};
        none -> {0, ?NONE}
    end.


%% The latest measurements in any order.
-spec latencies_us(non_neg_integer()) -> [non_neg_integer()].
latencies_us(Shard) ->
    case row(Shard) of
        {Shard, _MessagesPerSecond, LatenciesUs} -> LatenciesUs;
        none -> []
    end.


%% The manager that has sampled, and since when (monotonic time).
-spec first_sample(non_neg_integer()) -> {pid(), Us :: integer()} | none.
first_sample(Shard) ->
    case row({first_sample, Shard}) of
        {_Key, Manager, Us} -> {Manager, Us};
        none -> none
    end.


-spec row(term()) -> tuple() | none.
row(Key) ->
    try ets:lookup(?MODULE, Key) of
        [Row] -> Row;
        [] -> none
    catch
        %% The application is not running.
        error:badarg -> none
    end.


%% By the nearest rank; zeros of none.
-spec percentiles([non_neg_integer()]) -> percentiles().
percentiles([]) ->
    ?NONE;
percentiles(Values) ->
    Sorted = lists:sort(Values),
    Length = length(Sorted),
    At = fun(Percent) -> lists:nth((Percent * Length + 99) div 100, Sorted) end,
    #{p50 => At(50), p95 => At(95), p99 => At(99)}.
