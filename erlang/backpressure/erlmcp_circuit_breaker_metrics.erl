%%% @private
%%% The metrics that callers of the node's circuit breaker report of their requests: counts, latencies and
%%% errors. The process has the local name `erlmcp_circuit_breaker', and a host's supervisor
%%% starts it.
%%%
%%% The reports go into counters that all processes share, and never to this process. It is there to
%%% be supervised, and resets the counts when it starts.
%%%
%%% Latencies are counted in buckets, eight to each power of two: a percentile is the upper end of
%%% its bucket, at most an eighth above the true value. A reading is not a snapshot: what is reported
%%% meanwhile may be in one figure and not yet in another.
-module(erlmcp_circuit_breaker_metrics).

-behaviour(gen_server).

-export([start_link/0, stop/0, request/1, error/0, clear/0, read/0]).
-export([init/1, handle_call/3, handle_cast/2]).

-define(NAME,     erlmcp_circuit_breaker).
-define(COUNTERS, {?MODULE, counters}).

%% Positions of the counters.
-define(REQUESTS,     1).
-define(ERRORS,       2).
-define(LATENCY_SUM,  3).
-define(FIRST_BUCKET, 4).

%% Buckets 0 to 15 are of one millisecond each. The last bucket counts everything longer than 2^32 ms.
-define(MAX_LATENCY, 16#ffffffff).
-define(BUCKETS,     240).


%% @doc Starts the process.
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?NAME}, ?MODULE, [], []).


%% @doc Stops the process.
-spec stop() -> ok.
stop() ->
    try
        gen_server:stop(?NAME)
    catch
        exit:noproc -> exit({noproc, {gen_server, stop, [?NAME]}})
    end.


%% @doc Counts a request and its latency in milliseconds.
-spec request(number()) -> ok.
request(LatencyMs) ->
    case counters() of
        undefined ->
            ok;
        Counters ->
            Latency = min(max(trunc(LatencyMs), 0), ?MAX_LATENCY),
            ok = counters:add(Counters, ?FIRST_BUCKET + bucket(Latency), 1),
            ok = counters:add(Counters, ?LATENCY_SUM, Latency),
            counters:add(Counters, ?REQUESTS, 1)
    end.


%% @doc Counts an error.
-spec error() -> ok.
error() ->
    case counters() of
        undefined -> ok;
        Counters -> counters:add(Counters, ?ERRORS, 1)
    end.


%% @doc Resets the counts.
-spec clear() -> ok.
clear() ->
    case counters() of
        undefined ->
            ok;
        Counters ->
            lists:foreach(fun(I) -> counters:put(Counters, I, 0) end,
                          lists:seq(1, ?FIRST_BUCKET + ?BUCKETS - 1))
    end.


%% @doc The counts; exits with `{noproc, _}' if the process does not run.
-spec read() -> map().
read() ->
    case whereis(?NAME) of
        undefined -> exit({noproc, {gen_server, call, [?NAME, get_metrics]}});
        _Pid -> read(counters())
    end.


-spec read(counters:counters_ref()) -> map().
read(Counters) ->
    Requests = counters:get(Counters, ?REQUESTS),
    Errors = counters:get(Counters, ?ERRORS),
    #{
      total_requests => Requests,
      total_errors => Errors,
      requests_in_window => Requests,
      errors_in_window => Errors,
      error_rate_percent => error_rate(Errors, Requests),
      average_latency_ms => average(counters:get(Counters, ?LATENCY_SUM), Requests),
      p95_latency_ms => percentile(95, Counters),
      cpu_usage_percent => 0.0,
      memory_usage_percent => 0.0,
      last_update => erlang:system_time(millisecond)
     }.


-spec error_rate(non_neg_integer(), non_neg_integer()) -> float().
error_rate(0, _Requests) -> 0.0;
error_rate(Errors, Requests) -> min(100.0, 100 * Errors / max(Requests, 1)).


-spec average(non_neg_integer(), non_neg_integer()) -> float().
average(_Sum, 0) -> 0.0;
average(Sum, Requests) -> Sum / Requests.


-spec percentile(1..100, counters:counters_ref()) -> non_neg_integer().
percentile(Percent, Counters) ->
    Counts = [ {Bucket, counters:get(Counters, ?FIRST_BUCKET + Bucket)} || Bucket <- lists:seq(0, ?BUCKETS - 1) ],
    case lists:sum([ N || {_, N} <- Counts ]) of
        0 -> 0;
        Total -> reach((Total * Percent + 99) div 100, Counts)
    end.


%% The upper end of the bucket with the Rank-th latency.
-spec reach(pos_integer(), [{non_neg_integer(), non_neg_integer()}]) -> non_neg_integer().
reach(Rank, [{Bucket, N} | _]) when Rank =< N -> upper_end(Bucket);
reach(Rank, [{_Bucket, N} | Rest]) -> reach(Rank - N, Rest).


%% From 16 on: the exponent, and the three bits below the leading one.
-spec bucket(non_neg_integer()) -> non_neg_integer().
bucket(Latency) when Latency < 16 -> Latency;
bucket(Latency) -> bucket(Latency, 1).


-spec bucket(non_neg_integer(), pos_integer()) -> non_neg_integer().
bucket(Latency, Shift) ->
    case Latency bsr Shift of
        Mantissa when Mantissa < 16 -> 8 * Shift + Mantissa;
        _ -> bucket(Latency, Shift + 1)
    end.


-spec upper_end(non_neg_integer()) -> non_neg_integer().
upper_end(Bucket) when Bucket < 16 ->
    Bucket;
upper_end(Bucket) ->
    Shift = Bucket div 8 - 1,
    Mantissa = Bucket - 8 * Shift,
    ((Mantissa + 1) bsl Shift) - 1.


-spec counters() -> counters:counters_ref() | undefined.
counters() ->
    persistent_term:get(?COUNTERS, undefined).


%% @private
-spec init([]) -> {ok, []}.
init([]) ->
    % Made once in the life of a node: replacing a persistent term costs a scan of all processes.
    case counters() of
        undefined ->
            persistent_term:put(?COUNTERS,
                                counters:new(?FIRST_BUCKET + ?BUCKETS - 1, [write_concurrency]));
        _ ->
            clear()
    end,
    {ok, []}.


%% @private
-spec handle_call(term(), gen_server:from(), []) -> {reply, {error, unknown_request}, []}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.


%% @private
-spec handle_cast(term(), []) -> {noreply, []}.
handle_cast(_Request, State) ->
    {noreply, State}.
