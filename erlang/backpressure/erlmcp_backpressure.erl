%%% @doc The three layers of backpressure together: switched, configured, and what their decisions lead
%%% to.
%%%
%%% A message to a connection passes the node's circuit ({@link erlmcp_circuit_breaker}), the admission
%%% control of its shard ({@link erlmcp_admission_control}) and the token bucket of the connection
%%% that pays ({@link erlmcp_token_bucket}), in that order, in one native call with the look-up. A
%%% refusal reaches the caller as a value; nothing that was accepted is dropped. With `backpressure'
%%% set to `off' nothing is refused.
%%%
%%% The layers are native and guard the default registry, whether the application runs or not. While
%%% it does not, nobody samples, and admission control admits everything.
%%%
%%% == Logs ==
%%% Opening and closing of the circuit, overload and recovery of a shard: one line each, with the
%%% domain `[erlmcp_native]' and the keys `event' and `shard_id' or `circuit' in the metadata. Never
%%% one for a refused message.
-module(erlmcp_backpressure).

-include_lib("kernel/include/logger.hrl").

-export([set/2, configure/0, configure_alone/0, admit_everything/0, info/0]).
-export([has_token_buckets/0]).
-export([deliver/2, refused/1, notify/1, sampler/1, sample_interval_ms/0]).

-export_type([reason/0, info/0]).

-type info() :: #{
                  backpressure := on | off,
                  circuit := erlmcp_nif:circuit_state(),
                  overloaded_shards := [non_neg_integer()]
                 }.
-type reason() :: not_found | circuit_open | shard_overloaded | rate_limited.

-define(SAMPLE_INTERVAL, {?MODULE, sample_interval_ms}).

%%% Configuration


%% @doc Changes `backpressure', `token_bucket', `admission' or `circuit_breaker', in the application
%% environment and in the running system. See {@link erlmcp_native_config}.
%%
%% Tokens that buckets hold stay, up to the new capacity; the state of the circuit stays, and its
%% failures are counted anew. Messages under way are judged by the former values or the new ones. With
%% `admission' and with `backpressure' all shards get the threshold of the configuration.
%%
%% `{error, {bad_option, Key, Value, Expected}}' changes nothing, and may be about another key of these that
%% was set in the environment to what it cannot be.
%%
%% `{error, too_many_changes}' changes nothing. It comes after some hundred changes of limits with which
%% a bucket takes months to fill, and after many millions where it takes minutes.
-spec set(erlmcp_native_config:key(), term()) ->
          ok | {error, erlmcp_native_config:error() | too_many_changes}.
set(Key, Value) ->
    case erlmcp_native_config:check_live(Key, Value) of
        ok ->
            Former = application:get_env(erlmcp_native, Key),
            ok = application:set_env(erlmcp_native, Key, Value),
            case apply_setting(Key) of
                ok ->
                    ok;
                {error, too_many_changes} = Error ->
                    restore(Key, Former),
                    Error
            end;
        Error ->
            Error
    end.


-spec restore(erlmcp_native_config:key(), {ok, term()} | undefined) -> ok.
restore(Key, {ok, Former}) -> application:set_env(erlmcp_native, Key, Former);
restore(Key, undefined) -> application:unset_env(erlmcp_native, Key).


%% @private
%% Makes the native layers be what the application environment says.
-spec configure() -> ok | {error, too_many_changes}.
configure() ->
    apply_setting(backpressure).


%% @private
%% When the registry starts alone, without the application: as {@link configure/0}, but for admission
%% control, which has no sampler then. Nobody has checked the environment.
-spec configure_alone() -> ok.
configure_alone() ->
    case whereis(erlmcp_native_sup) =:= undefined andalso erlmcp_native_config:check_live() of
        false ->
            ok;
        ok ->
            ok = erlmcp_nif:enforce_limits(is_on()),
            ok = apply_setting(circuit_breaker),
            _ = apply_setting(token_bucket),
            ok;
        {error, Error} ->
            ?LOG_WARNING("erlmcp_native: the settings of backpressure stay as they are, because of ~0tp in the "
                         "environment of erlmcp_native",
                         [Error],
                         #{domain => [erlmcp_native], event => bad_option})
    end.


%% @private
%% Nobody samples any more. Without this a shard would refuse for ten intervals what nobody finds
%% gone.
-spec admit_everything() -> ok.
admit_everything() ->
    set_thresholds(infinity).


-spec apply_setting(erlmcp_native_config:key()) -> ok | {error, too_many_changes}.
apply_setting(backpressure) ->
    ok = erlmcp_nif:enforce_limits(is_on()),
    ok = apply_setting(admission),
    ok = apply_setting(circuit_breaker),
    apply_setting(token_bucket);
apply_setting(token_bucket) ->
    set_token_bucket(erlmcp_native_config:get(token_bucket));
apply_setting(admission) ->
    set_admission(is_on(), erlmcp_native_config:get(admission));
apply_setting(circuit_breaker) ->
    set_circuit_breaker(is_on(), erlmcp_native_config:get(circuit_breaker)).


-spec is_on() -> boolean().
is_on() ->
    erlmcp_native_config:get(backpressure) =:= on.


%% What has not changed is left alone, since a change has a price: positions (see the native module).
-spec set_token_bucket(infinity | map()) -> ok | {error, too_many_changes}.
set_token_bucket(Setting) ->
    Limits =
        case Setting of
            infinity -> infinity;
            #{capacity := Capacity, rate_per_second := Rate} -> {Capacity, float(Rate)}
        end,
    case erlmcp_nif:shared_limits() of
        Limits ->
            ok;
        _ ->
            case erlmcp_nif:set_shared_limits(Limits) of
                ok -> ok;
                too_many_changes -> {error, too_many_changes}
            end
    end.


-spec set_admission(boolean(), infinity | map()) -> ok.
set_admission(true, #{threshold := Threshold, sample_interval_ms := IntervalMs}) ->
    ok = set_sample_interval(IntervalMs),
    set_thresholds(Threshold);
set_admission(false, _Setting) ->
    set_thresholds(infinity);
set_admission(true, infinity) ->
    set_thresholds(infinity).


%% The managers' interval is the one that was checked, whatever the application environment says
%% meanwhile. Those who wait for the end of a former one are told.
-spec set_sample_interval(pos_integer()) -> ok.
set_sample_interval(IntervalMs) ->
    ok = erlmcp_nif:set_sample_interval(IntervalMs),
    case sample_interval_ms() of
        IntervalMs ->
            ok;
        _Former ->
            ok = persistent_term:put(?SAMPLE_INTERVAL, IntervalMs),
            {Shards, _, _} = erlmcp_nif:limits(default),
            lists:foreach(fun(Shard) -> tell_sampler(Shard, interval_changed) end, lists:seq(0, Shards - 1))
    end.


%% @private
%% The interval in force; the default one until another one is set.
-spec sample_interval_ms() -> pos_integer().
sample_interval_ms() ->
    case persistent_term:get(?SAMPLE_INTERVAL, none) of
        none -> maps:get(sample_interval_ms, erlmcp_native_config:default(admission));
        IntervalMs -> IntervalMs
    end.


-spec set_thresholds(pos_integer() | infinity) -> ok.
set_thresholds(Threshold) ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    lists:foreach(fun(Shard) -> set_threshold(Shard, Threshold) end, lists:seq(0, Shards - 1)).


-spec set_threshold(non_neg_integer(), pos_integer() | infinity) -> ok.
set_threshold(Shard, Threshold) ->
    case erlmcp_nif:admission_stats(Shard) of
        {_Depth, Threshold, _Admitted, _IsOverloaded, _Age} -> ok;
        _ -> erlmcp_nif:admission_set_threshold(Shard, Threshold)
    end.


-spec set_circuit_breaker(boolean(), off | map()) -> ok.
set_circuit_breaker(true,
                    #{
                      failure_threshold := FailureThreshold,
                      window_ms := WindowMs,
                      success_threshold := SuccessThreshold,
                      timeout_ms := TimeoutMs,
                      probe_limit := ProbeLimit
                     }) ->
    Config = {FailureThreshold, WindowMs, SuccessThreshold, TimeoutMs, ProbeLimit},
    case erlmcp_nif:breaker_stats() of
        #{config := Config} -> ok;
        _ -> erlmcp_nif:breaker_configure(Config)
    end;
set_circuit_breaker(false, _Setting) ->
    erlmcp_nif:breaker_configure(off);
set_circuit_breaker(true, off) ->
    erlmcp_nif:breaker_configure(off).


%% @doc What the layers do at the moment.
%%
%% `overloaded_shards' are those that have refused messages and not recovered since.
-spec info() -> info().
info() ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    #{
      backpressure =>
          case erlmcp_nif:enforces_limits() of
              true -> on;
              false -> off
          end,
      circuit => erlmcp_nif:breaker_state(),
      overloaded_shards => [ Shard || Shard <- lists:seq(0, Shards - 1), is_overloaded(Shard) ]
     }.


-spec is_overloaded(non_neg_integer()) -> boolean().
is_overloaded(Shard) ->
    {_Depth, _Threshold, _Admitted, IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    IsOverloaded.


%% @private
%% Whether any bucket is asked at all.
-spec has_token_buckets() -> boolean().
has_token_buckets() ->
    erlmcp_nif:has_token_buckets().


%%% Decisions


%% @private
%% Sends a message where a native call says it may go, and tells others what that call has seen.
%% Callers test for a pid alone themselves, which is what comes back for most messages.
-spec deliver(erlmcp_nif:routed(), term()) -> ok | {error, reason()}.
deliver(Pid, Message) when is_pid(Pid) ->
    Pid ! Message,
    ok;
deliver({Route, Events}, Message) ->
    Result = deliver(Route, Message),
    ok = notify(Events),
    Result;
deliver(Refusal, _Message) ->
    refused(Refusal).


%% @private
%% What a route answers that was not admitted.
-spec refused(erlmcp_nif:refusal()) -> {error, reason()}.
refused(undefined) -> {error, not_found};
refused(Reason) -> {error, Reason}.


%% @private
%% Tells others of what a native call has seen.
-spec notify([erlmcp_nif:event()]) -> ok.
notify(Events) ->
    lists:foreach(fun notify_one/1, Events).


-spec notify_one(erlmcp_nif:event()) -> ok.
notify_one({sample, Shard}) ->
    tell_sampler(Shard, sample);
notify_one({overloaded, Shard}) ->
    tell_sampler(Shard, overloaded);
notify_one({circuit, State}) ->
    erlmcp_circuit_breaker_log:transition(node, State).


-spec tell_sampler(non_neg_integer(), sample | overloaded | interval_changed) -> ok.
tell_sampler(Shard, Message) ->
    case whereis(sampler(Shard)) of
        undefined ->
            ok;
        Manager ->
            Manager ! Message,
            ok
    end.


%% @private
%% The registered name of a shard's manager.
-spec sampler(non_neg_integer()) -> atom().
sampler(Shard) ->
    binary_to_atom(<<"erlmcp_shard_manager_", (integer_to_binary(Shard))/binary>>).
