%%% @private
%%% The samplers of the shards, for modules that do not depend on their processes: how a sampler is
%%% addressed, how often it samples, and its latest measurements.
%%%
%%% {@link erlmcp_shard_manager} registers the names and writes the measurements. A caller that learns from a
%%% native call that a shard needs a sample sends the message by name. Readers read a table, which outlives the
%%% managers, so that no reader waits for a manager.
-module(erlmcp_shard_sampler).

%% Address and interval
-export([name/1, tell/2]).
-export([default_interval_ms/0, interval_ms/0, set_interval_ms/2]).
%% Measurements
-export([new/0]).
-export([insert/3, has_sampled/1, set_overload/2, is_overload/1]).
-export([lookup/1, latencies_us/1, first_sample/1, percentiles/1]).

-export_type([percentiles/0]).

-type percentiles() :: #{p50 := non_neg_integer(), p95 := non_neg_integer(), p99 := non_neg_integer()}.

-define(INTERVAL,            {?MODULE, interval_ms}).
-define(DEFAULT_INTERVAL_MS, 100).
-define(NONE,                #{p50 => 0, p95 => 0, p99 => 0}).


%% @doc The registered name of a shard's sampler.
-spec name(non_neg_integer()) -> atom().
name(Shard) ->
    binary_to_atom(<<"erlmcp_shard_manager_", (integer_to_binary(Shard))/binary>>).


%% @doc Sends a message to the sampler of a shard, if there is one.
-spec tell(non_neg_integer(), sample | overloaded | interval_changed) -> ok.
tell(Shard, Message) ->
    case whereis(name(Shard)) of
        undefined ->
            ok;
        Sampler ->
            Sampler ! Message,
            ok
    end.


%% @doc The interval of a configuration that does not name one.
-spec default_interval_ms() -> pos_integer().
default_interval_ms() ->
    ?DEFAULT_INTERVAL_MS.


%% @doc The interval in force. It is kept outside the application environment, which may hold values that
%% were not checked.
-spec interval_ms() -> pos_integer().
interval_ms() ->
    persistent_term:get(?INTERVAL, ?DEFAULT_INTERVAL_MS).


%% @doc Changes the interval, and notifies the samplers, which may wait for the end of the former one.
-spec set_interval_ms(pos_integer(), Shards :: [non_neg_integer()]) -> ok.
set_interval_ms(IntervalMs, Shards) ->
    case interval_ms() of
        IntervalMs ->
            ok;
        _Former ->
            ok = persistent_term:put(?INTERVAL, IntervalMs),
            lists:foreach(fun(Shard) -> tell(Shard, interval_changed) end, Shards)
    end.


%%% Measurements


%% Makes the table, owned by the calling process.
-spec new() -> ok.
new() ->
    _ = ets:new(?MODULE, [named_table, public, {read_concurrency, true}]),
    ok.


%% `LatenciesUs': the latest measurements in any order.
-spec insert(non_neg_integer(), MessagesPerSecond :: non_neg_integer(), LatenciesUs :: [non_neg_integer()]) -> ok.
insert(Shard, MessagesPerSecond, LatenciesUs) ->
    insert({Shard, MessagesPerSecond, LatenciesUs}).


%% The calling manager has taken its first sample. The message to recovery goes to its registered name, so that this
%% folder does not depend on it.
-spec has_sampled(non_neg_integer()) -> ok.
has_sampled(Shard) ->
    SampledUs = erlang:monotonic_time(microsecond),
    %% Before the message: a recovery process that starts now reads the row, and gets no message.
    ok = insert({{first_sample, Shard}, self(), SampledUs}),
    case whereis(erlmcp_shard_recovery) of
        undefined ->
            ok;
        Recovery ->
            Recovery ! {first_sample, Shard, self(), SampledUs},
            ok
    end.


%% Whether the start of an overload of the shard was logged, and its end not yet.
-spec set_overload(non_neg_integer(), boolean()) -> ok.
set_overload(Shard, IsOverload) ->
    insert({{overload, Shard}, IsOverload}).


-spec is_overload(non_neg_integer()) -> boolean().
is_overload(Shard) ->
    case row({overload, Shard}) of
        {_Key, IsOverload} -> IsOverload;
        none -> false
    end.


%% If the table was deleted with its supervisor, the manager is about to exit too.
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


%% The manager that has sampled, and the time of its first sample (monotonic time).
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


%% By the nearest rank; zeros if there are no values.
-spec percentiles([non_neg_integer()]) -> percentiles().
percentiles([]) ->
    ?NONE;
percentiles(Values) ->
    Sorted = lists:sort(Values),
    Length = length(Sorted),
    At = fun(Percent) -> lists:nth((Percent * Length + 99) div 100, Sorted) end,
    #{p50 => At(50), p95 => At(95), p99 => At(99)}.
