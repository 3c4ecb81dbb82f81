%%% @doc Token buckets: how many messages, in one burst and in the long run.
%%%
%%% A bucket holds up to `capacity' tokens and is refilled continuously, at `rate_per_second'. It is
%%% one word in native memory, updated when it is used, without a process or a timer. In every
%%% window of time `t' at most `capacity + rate_per_second * t' tokens are taken, by however many
%%% processes.
%%%
%%% Every connection and every transport has one. A message routed to a connection, or from a
%%% transport to a server, takes a token from its bucket. All share the limits of the configuration (`token_bucket' in
%%% {@link erlmcp_native_config}), except those to which {@link set_limits/2} gives limits of their own. {@link new/1}
%%% makes a bucket for anything else.
%%%
%%% Where a function accepts a bucket or an id, the id is that of a connection, any term; a bucket is never taken
%%% for an id. Functions with the first argument `connection' or `transport' accept ids of that kind.
%%%
%%% == Cost ==
%%% Constant time, on the calling scheduler, without a lock: about as much as a look-up.
%%%
%%% == Errors ==
%%% A number of tokens that is not a non-negative integer raises `badarg'; limits that no bucket can have
%%% raise `{bad_option, Key, Value, Expected}'.
-module(erlmcp_token_bucket).

-export([new/1]).
-export([consume/2, consume/3, consume_or_wait_time/2, consume_or_wait_time/3]).
-export([refund/2, refund/3]).
-export([get_state/1, get_state/2, set_limits/2, set_limits/3]).
%% For other modules of this application
-export([are_asked/0]).
-export([native_limits/1, native_change/1, bounded/1, with_wait/1, without_wait/1, changed/2, state/1]).

-export_type([bucket/0, limits/0, state/0, namespace/0]).

-define(MORE_THAN_ANY, (1 bsl 32)).

-type bucket() :: erlmcp_nif:bucket().
%% Or a property list or keyword list.
-type limits() :: #{capacity => pos_integer(), rate_per_second => number()} | [{atom(), number()}] | infinity.
-type state() :: #{
                   tokens := non_neg_integer() | infinity,
                   capacity := pos_integer() | infinity,
                   rate_per_second := float() | infinity
                  }.
-type namespace() :: connection | transport.


%% @doc A full bucket. `capacity' is 1000 if it is not given, `rate_per_second' 10000. It is freed with
%% the last reference to it.
-spec new(limits()) -> bucket().
new(Limits) ->
    erlmcp_nif:bucket_new(native_limits(Limits)).


%% @doc Takes `N' tokens, or none. `Remaining' is the number of tokens left, `infinity' without limits.
-spec consume(bucket() | Id :: term(), N :: non_neg_integer()) ->
          {ok, Remaining :: non_neg_integer() | infinity} |
          {error, rate_limited | exceeds_capacity | not_found}.
consume(Of, N) ->
    without_wait(take(Of, N)).


%% @doc Takes tokens from the bucket of a connection or a transport.
-spec consume(namespace(), Id :: term(), N :: non_neg_integer()) ->
          {ok, Remaining :: non_neg_integer() | infinity} |
          {error, rate_limited | exceeds_capacity | not_found}.
consume(Namespace, Id, N) ->
    without_wait(entry_take(Namespace, Id, N)).


%% @doc As {@link consume/2}, but a refusal says in how many milliseconds `N' tokens will be available if no process
%% takes any meanwhile.
-spec consume_or_wait_time(bucket() | Id :: term(), N :: non_neg_integer()) ->
          {ok, Remaining :: non_neg_integer() | infinity} |
          {error, {rate_limited, WaitMs :: pos_integer()} | exceeds_capacity | not_found}.
consume_or_wait_time(Of, N) ->
    with_wait(take(Of, N)).


%% @doc As {@link consume/3}, with the time to wait.
-spec consume_or_wait_time(namespace(), Id :: term(), N :: non_neg_integer()) ->
          {ok, Remaining :: non_neg_integer() | infinity} |
          {error, {rate_limited, WaitMs :: pos_integer()} | exceeds_capacity | not_found}.
consume_or_wait_time(Namespace, Id, N) ->
    with_wait(entry_take(Namespace, Id, N)).


%% @doc Gives back `N' tokens that were taken and not used. The bucket holds no more than its capacity afterwards; it is
%% the caller's duty to give back no more than was taken.
-spec refund(bucket() | Id :: term(), N :: non_neg_integer()) -> ok | {error, not_found}.
refund(Of, N) ->
    case is_bucket(Of) of
        true -> erlmcp_nif:bucket_refund(Of, bounded(N));
        false -> refund(connection, Of, N)
    end.


%% @doc Gives back tokens to the bucket of a connection or a transport; see {@link refund/2}.
-spec refund(namespace(), Id :: term(), N :: non_neg_integer()) -> ok | {error, not_found}.
refund(Namespace, Id, N) when Namespace =:= connection; Namespace =:= transport ->
    case erlmcp_nif:entry_refund(Namespace, Id, bounded(N)) of
        ok -> ok;
        not_found -> {error, not_found}
    end.


%% @doc The tokens and the limits of a bucket. For a connection that is not registered the result is `{error,
%% not_found}'.
-spec get_state(bucket() | Id :: term()) -> state() | {error, not_found}.
get_state(Of) ->
    case is_bucket(Of) of
        true -> state(erlmcp_nif:bucket_state(Of));
        false -> get_state(connection, Of)
    end.


%% @doc The tokens and the limits of the bucket of a connection or a transport.
-spec get_state(namespace(), Id :: term()) -> state() | {error, not_found}.
get_state(Namespace, Id) when Namespace =:= connection; Namespace =:= transport ->
    case erlmcp_nif:entry_bucket_state(Namespace, Id) of
        not_found -> {error, not_found};
        State -> state(State)
    end.


%% @doc Changes the limits of a bucket, or gives a connection limits of its own. With `default' a
%% connection has the limits of the configuration again.
%%
%% A key that is not given keeps its value. A connection that has no limits of its own begins with those of the
%% configuration, and keeps them from then on. Where the limits were `infinity', a key that is not given has the last
%% value that it had. The bucket keeps its tokens, up to the new capacity, however often limits change.
-spec set_limits(bucket() | Id :: term(), limits() | default) -> ok | {error, not_found}.
set_limits(Of, Limits) ->
    case is_bucket(Of) of
        true -> changed(erlmcp_nif:bucket_set_limits(Of, native_change(Limits)), Limits);
        false -> set_limits(connection, Of, Limits)
    end.


%% @doc Gives a connection or a transport limits of its own; see {@link set_limits/2}.
-spec set_limits(namespace(), Id :: term(), limits() | default) -> ok | {error, not_found}.
set_limits(Namespace, Id, default) when Namespace =:= connection; Namespace =:= transport ->
    changed(erlmcp_nif:entry_set_limits(Namespace, Id, shared), default);
set_limits(Namespace, Id, Limits) when Namespace =:= connection; Namespace =:= transport ->
    changed(erlmcp_nif:entry_set_limits(Namespace, Id, native_change(Limits)), Limits).


%% @private
%% Whether routes take tokens from any bucket at all.
-spec are_asked() -> boolean().
are_asked() ->
    erlmcp_nif:has_token_buckets().


%% Most ids are not references, and need no native call.
-spec is_bucket(term()) -> boolean().
is_bucket(Of) ->
    is_reference(Of) andalso erlmcp_nif:is_bucket(Of).


-spec take(bucket() | term(), non_neg_integer()) -> erlmcp_nif:taken() | not_found.
take(Of, N) ->
    case is_bucket(Of) of
        true -> erlmcp_nif:bucket_take(Of, bounded(N));
        false -> erlmcp_nif:entry_take(connection, Of, bounded(N))
    end.


-spec entry_take(namespace(), term(), non_neg_integer()) -> erlmcp_nif:taken() | not_found.
entry_take(Namespace, Id, N) when Namespace =:= connection; Namespace =:= transport ->
    erlmcp_nif:entry_take(Namespace, Id, bounded(N)).


%% @private
%% No bucket has so many tokens, and the native function takes no larger number.
-spec bounded(non_neg_integer() | term()) -> non_neg_integer() | term().
bounded(N) when is_integer(N), N > ?MORE_THAN_ANY -> ?MORE_THAN_ANY;
bounded(N) -> N.


%% @private
%% `Other' is a reason beside those of a bucket.
-spec without_wait(erlmcp_nif:taken() | Other) ->
          {ok, non_neg_integer() | infinity} | {error, rate_limited | exceeds_capacity | Other} when Other :: atom().
without_wait({ok, _Remaining} = Taken) -> Taken;
without_wait({rate_limited, _WaitNs}) -> {error, rate_limited};
without_wait(Reason) -> {error, Reason}.


%% @private
-spec with_wait(erlmcp_nif:taken() | Other) ->
          {ok, non_neg_integer() | infinity} |
          {error, {rate_limited, pos_integer()} | exceeds_capacity | Other} when Other :: atom().
with_wait({ok, _Remaining} = Taken) -> Taken;
with_wait({rate_limited, WaitNs}) -> {error, {rate_limited, max(1, (WaitNs + 999_999) div 1_000_000)}};
with_wait(Reason) -> {error, Reason}.


%% @private
-spec changed(ok | not_found | too_slow_to_fill, limits() | default) -> ok | {error, not_found}.
changed(ok, _Limits) -> ok;
changed(not_found, _Limits) -> {error, not_found};
changed(too_slow_to_fill, Limits) -> error({bad_option, token_bucket, Limits, erlmcp_native_config:too_slow_to_fill()}).


%% @private
-spec state({non_neg_integer() | infinity, erlmcp_nif:limits()}) -> state().
state({Tokens, infinity}) ->
    #{tokens => Tokens, capacity => infinity, rate_per_second => infinity};
state({Tokens, {Capacity, Rate}}) ->
    #{tokens => Tokens, capacity => Capacity, rate_per_second => Rate}.


%% @private
-spec native_limits(limits() | term()) -> erlmcp_nif:limits().
native_limits(Limits) ->
    case erlmcp_native_config:token_bucket(Limits) of
        {ok, infinity} -> infinity;
        {ok, #{capacity := Capacity, rate_per_second := Rate}} -> {Capacity, float(Rate)};
        {error, Error} -> error(Error)
    end.


%% @private
-spec native_change(limits() | term()) -> erlmcp_nif:change().
native_change(Limits) ->
    case erlmcp_native_config:token_bucket_change(Limits) of
        {ok, infinity} -> infinity;
        {ok, Map} -> {maps:get(capacity, Map, undefined), rate(Map)};
        {error, Error} -> error(Error)
    end.


-spec rate(map()) -> float() | undefined.
rate(#{rate_per_second := Rate}) -> float(Rate);
rate(#{}) -> undefined.
