%%% @doc Token buckets by key: one for each client, for each tool of a client, for each method.
%%%
%%% A limiter holds the buckets of any number of keys, all with the same limits. A bucket is made when its key is first
%%% used, and forgotten once it is full again: a key without a bucket counts as one with a full bucket, so
%%% forgetting gives nobody a token. There is no timer and no process. A key is a term that may be an id in a registry,
%%% compared with `=:='; its encoding takes at most 65,535 bytes.
%%%
%%% At most `max_keys' buckets exist at one time. A key without a bucket that finds no room, and no full bucket among
%%% the few that are examined for it, gets `{error, limiter_full}'. So keys from the network, however many, cost no more
%%% memory than that, and no token of any other key. In such a flood a key that uses all its tokens keeps its
%%% bucket; one whose bucket is full may find no room at its next use.
%%%
%%% ```
%%% Limiter = erlmcp_keyed_limiter:new(#{capacity => 20, rate_per_second => 5, max_keys => 100_000}).
%%% persistent_term:put(tool_calls, Limiter).
%%% {ok, 19} = erlmcp_keyed_limiter:consume(Limiter, {<<"client-17">>, <<"search">>}).
%%% '''
%%%
%%% A limiter is freed with the last reference to it.
%%%
%%% == Guarantee ==
%%% For each key, in every window of time `t' at most `capacity + rate_per_second * t' tokens are taken, less what was
%%% refunded, by however many processes. Two keys share a bucket if a 63 bit hash of both, keyed at random, is equal:
%%% with ten million keys, once in a hundred thousand runs. That admits less and never more.
%%%
%%% == Cost ==
%%% Constant time, on the calling scheduler, without a lock: about as much as `ets:update_counter/4'. The first use of a
%%% key costs some four times as much (`./bench/run --only limits'). A key with a bucket takes some 60 bytes.
%%%
%%% == Errors ==
%%% A number of tokens that is not a non-negative integer raises `badarg'. So does a key that is too long, or that is or
%%% contains a fun other than `fun M:F/A'. Options that no limiter can have raise `{bad_option, Key, Value, Expected}'.
-module(erlmcp_keyed_limiter).

-export([new/1, info/1, set_limits/2]).
-export([consume/2, consume/3, consume_or_wait_time/2, consume_or_wait_time/3]).
-export([consume_all/1, refund/3]).
-export([get_state/2]).
%% Explanations of errors
-export([format_error/2]).

-export_type([limiter/0, options/0, info/0, share/0, refusal/0]).

-define(DEFAULT_MAX_KEYS, 1_000_000).
-define(MOST_MAX_KEYS,    (1 bsl 28)).
-define(MOST_SHARES,      16).

-type limiter() :: erlmcp_nif:limiter().
%% Or a property list or keyword list.
-type options() :: #{
                     capacity => pos_integer(),
                     rate_per_second => number(),
                     max_keys => pos_integer()
                    } |
                   [{atom(), number()}].
-type info() :: #{
                  keys := non_neg_integer(),
                  max_keys := pos_integer(),
                  capacity := pos_integer() | infinity,
                  rate_per_second := float() | infinity
                 }.
%% Tokens of the bucket of a key, or of a bucket from {@link erlmcp_token_bucket:new/1}.
-type share() :: {limiter(), Key :: term(), N :: non_neg_integer()} |
                 {erlmcp_token_bucket:bucket(), N :: non_neg_integer()}.
-type refusal() :: rate_limited | exceeds_capacity | limiter_full.


%% @doc A limiter without keys. Options and defaults: `capacity' (1000) and `rate_per_second' (10,000) of each key's
%% bucket, with the bounds of {@link erlmcp_token_bucket:new/1}, and `max_keys' (1,000,000; up to 2^28).
-spec new(options()) -> limiter().
new(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{} = Map ->
            MaxKeys = maps:get(max_keys, Map, ?DEFAULT_MAX_KEYS),
            is_integer(MaxKeys) andalso MaxKeys >= 1 andalso MaxKeys =< ?MOST_MAX_KEYS orelse
            error({bad_option, max_keys, MaxKeys, "an integer from 1 to 268435456"}),
            erlmcp_nif:limiter_new(erlmcp_token_bucket:native_limits(maps:remove(max_keys, Map)), MaxKeys);
        _ ->
            error(badarg, [Options], [{error_info, #{module => ?MODULE}}])
    end.


%% @doc The number of keys that have a bucket, the bound on it, and the limits.
-spec info(limiter()) -> info().
info(Limiter) ->
    {Keys, MaxKeys, Limits} = erlmcp_nif:limiter_info(Limiter),
    (maps:remove(tokens, erlmcp_token_bucket:state({0, Limits})))#{keys => Keys, max_keys => MaxKeys}.


%% @doc Changes the limits of all keys, or removes them (`infinity').
%%
%% A limit that is not given keeps its value; where the limits were `infinity', the last one that it had. Buckets keep
%% their tokens, up to the new capacity; so does a key without a bucket, which was full.
-spec set_limits(limiter(), erlmcp_token_bucket:limits()) -> ok.
set_limits(Limiter, Limits) ->
    Changed = erlmcp_nif:limiter_set_limits(Limiter, erlmcp_token_bucket:native_change(Limits)),
    erlmcp_token_bucket:changed(Changed, Limits).


%% @equiv consume(Limiter, Key, 1)
-spec consume(limiter(), Key :: term()) -> {ok, Remaining :: non_neg_integer() | infinity} | {error, refusal()}.
consume(Limiter, Key) ->
    consume(Limiter, Key, 1).


%% @doc Takes `N' tokens of a key, or none. `Remaining' is the number of tokens left, `infinity' without limits.
-spec consume(limiter(), Key :: term(), N :: non_neg_integer()) ->
          {ok, Remaining :: non_neg_integer() | infinity} | {error, refusal()}.
consume(Limiter, Key, N) ->
    erlmcp_token_bucket:without_wait(take(Limiter, Key, N)).


%% @equiv consume_or_wait_time(Limiter, Key, 1)
-spec consume_or_wait_time(limiter(), Key :: term()) ->
          {ok, Remaining :: non_neg_integer() | infinity} |
          {error, {rate_limited, WaitMs :: pos_integer()} | exceeds_capacity | limiter_full}.
consume_or_wait_time(Limiter, Key) ->
    consume_or_wait_time(Limiter, Key, 1).


%% @doc As {@link consume/3}, but a refusal says in how many milliseconds `N' tokens will be available if no process
%% takes any meanwhile.
-spec consume_or_wait_time(limiter(), Key :: term(), N :: non_neg_integer()) ->
          {ok, Remaining :: non_neg_integer() | infinity} |
          {error, {rate_limited, WaitMs :: pos_integer()} | exceeds_capacity | limiter_full}.
consume_or_wait_time(Limiter, Key, N) ->
    erlmcp_token_bucket:with_wait(take(Limiter, Key, N)).


-spec take(limiter(), Key :: term(), N :: non_neg_integer()) -> erlmcp_nif:taken() | limiter_full.
take(Limiter, Key, N) ->
    erlmcp_nif:limiter_take(Limiter, Key, erlmcp_token_bucket:bounded(N)).


%% @doc Takes from all of these buckets, or from none: from those of a client, of a tool and of the whole node, say. At
%% most 16, with keys whose encoding takes at most 4,095 bytes.
%%
%% An error has the first share that was refused. Takes from one bucket after the other, and refunds when one refuses;
%% a concurrent caller may be refused tokens that are refunded a moment later. No process can be killed in between.
-spec consume_all([share()]) ->
          ok |
          {error, {share(), {rate_limited, WaitMs :: pos_integer()} | exceeds_capacity | limiter_full}}.
consume_all(Shares) ->
    case erlmcp_nif:take_together(bounded(Shares)) of
        ok ->
            ok;
        {Position, Refusal} ->
            {error, Reason} = erlmcp_token_bucket:with_wait(Refusal),
            {error, {lists:nth(Position, Shares), Reason}}
    end.


-spec bounded([share()] | term()) -> [share()] | term().
bounded(Shares) when is_list(Shares), length(Shares) =< ?MOST_SHARES -> lists:map(fun bounded_share/1, Shares);
bounded(Wrong) -> Wrong.


-spec bounded_share(share() | term()) -> share() | term().
bounded_share({Limiter, Key, N}) -> {Limiter, Key, erlmcp_token_bucket:bounded(N)};
bounded_share({Bucket, N}) -> {Bucket, erlmcp_token_bucket:bounded(N)};
bounded_share(Wrong) -> Wrong.


%% @doc Gives back `N' tokens that were taken for a key and not used. The bucket holds no more than its capacity
%% afterwards; it is the caller's duty to give back no more than was taken.
-spec refund(limiter(), Key :: term(), N :: non_neg_integer()) -> ok.
refund(Limiter, Key, N) ->
    erlmcp_nif:limiter_refund(Limiter, Key, erlmcp_token_bucket:bounded(N)).


%% @doc The tokens and the limits of a key's bucket. Makes none.
-spec get_state(limiter(), Key :: term()) -> erlmcp_token_bucket:state().
get_state(Limiter, Key) ->
    erlmcp_token_bucket:state(erlmcp_nif:limiter_state(Limiter, Key)).


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, new, [_Options], _Info} | _]) ->
    #{1 => "not " ++ erlmcp_native_config:map_expected()};
format_error(_Reason, _Stacktrace) ->
    #{}.
