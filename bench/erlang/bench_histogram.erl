%%% A log-linear histogram of latencies, as in HDR histograms, to which many processes add.
%%%
%%% There is one bucket per microsecond up to 128, and 64 buckets for each doubling from there, so that a figure is
%%% at most 1.6 % above the latency that it stands for.
-module(bench_histogram).

-export([new/0, clear/1, add/2]).
-export([total/1, counts/1, merged/1, percentiles/2]).

-export_type([histogram/0, counts/0]).

-opaque histogram() :: counters:counters_ref().
%% The buckets that are not empty.
-type counts() :: #{pos_integer() => pos_integer()}.

%% Buckets per doubling. There are 20 doublings from 128 us on, up to 134 s.
-define(LINEAR,  64).
-define(BUCKETS, (2 * ?LINEAR + 20 * ?LINEAR)).


-spec new() -> histogram().
new() ->
    counters:new(?BUCKETS, [write_concurrency]).


%% Nothing may be added meanwhile.
-spec clear(histogram()) -> ok.
clear(Histogram) ->
    lists:foreach(fun(Bucket) -> counters:put(Histogram, Bucket, 0) end, lists:seq(1, ?BUCKETS)).


-spec add(histogram(), LatencyUs :: integer()) -> ok.
add(Histogram, Us) ->
    counters:add(Histogram, bucket(Us), 1).


-spec bucket(integer()) -> 1..?BUCKETS.
bucket(Us) when Us < 2 * ?LINEAR -> max(0, Us) + 1;
bucket(Us) -> bucket(Us bsr 1, 1).


%% `Us' was halved `Halved' times.
-spec bucket(pos_integer(), pos_integer()) -> 1..?BUCKETS.
bucket(Us, Halved) when Us < 2 * ?LINEAR -> min(?BUCKETS, Halved * ?LINEAR + Us + 1);
bucket(Us, Halved) -> bucket(Us bsr 1, Halved + 1).


%% The upper end of a bucket, in milliseconds.
-spec upper_end(1..?BUCKETS) -> float().
upper_end(Bucket) when Bucket =< 2 * ?LINEAR ->
    Bucket / 1000;
upper_end(Bucket) ->
    Halved = (Bucket - 1) div ?LINEAR - 1,
    ((Bucket - Halved * ?LINEAR) bsl Halved) / 1000.


%% All latencies that were added.
-spec total(histogram()) -> non_neg_integer().
total(Histogram) ->
    total(Histogram, ?BUCKETS, 0).


-spec total(histogram(), non_neg_integer(), non_neg_integer()) -> non_neg_integer().
total(_Histogram, 0, Sum) -> Sum;
total(Histogram, Bucket, Sum) -> total(Histogram, Bucket - 1, Sum + counters:get(Histogram, Bucket)).


-spec counts(histogram()) -> counts().
counts(Histogram) ->
    maps:from_list([ {Bucket, Count}
                     || Bucket <- lists:seq(1, ?BUCKETS),
                        Count <- [counters:get(Histogram, Bucket)],
                        Count > 0 ]).


-spec merged([counts()]) -> counts().
merged(Several) ->
    lists:foldl(fun(Counts, Sum) -> maps:merge_with(fun(_Bucket, One, Other) -> One + Other end, Counts, Sum) end,
                #{},
                Several).


%% In milliseconds; the quantile 1.0 is the maximum. At least one latency must have been added.
-spec percentiles([float()], counts()) -> [float()].
percentiles(Quantiles, Counts) when map_size(Counts) > 0 ->
    Total = lists:sum(maps:values(Counts)),
    Sorted = lists:sort(maps:to_list(Counts)),
    [ percentile(Quantile * Total, Sorted, 0) || Quantile <- Quantiles ].


-spec percentile(float(), [{pos_integer(), pos_integer()}], non_neg_integer()) -> float().
percentile(_Rank, [{Bucket, _}], _Below) -> upper_end(Bucket);
percentile(Rank, [{Bucket, Count} | _], Below) when Below + Count >= Rank -> upper_end(Bucket);
percentile(Rank, [{_, Count} | Others], Below) -> percentile(Rank, Others, Below + Count).
