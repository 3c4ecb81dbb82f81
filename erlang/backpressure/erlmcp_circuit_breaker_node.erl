%%% @private
%%% The circuit breaker of the node: the one that native code asks on every guarded route.
%%%
%%% The only module of circuit breakers that calls the native library. Every function runs in the
%%% calling process and works on the native state, which outlives all processes. Whoever makes a
%%% transition learns of it from its own call, and logs it: one line, without a lock.
%%%
%%% Where the native library is not loaded nothing is guarded, and the breaker is `off': it lets
%%% everything through and records nothing.
-module(erlmcp_circuit_breaker_node).

-export([state/0, allow/0, would_allow/0, success/0, failure/0, force/1, stats/0]).

-export_type([state/0]).

-type state() :: closed | open | half_open | off.

-define(UNLESS_LOADED(Call, Otherwise),
        try
            Call
        catch
            error:{nif_not_loaded, _} -> Otherwise
        end).


%% @doc The state.
-spec state() -> state().
state() ->
    ?UNLESS_LOADED(erlmcp_nif:breaker_state(), off).


%% @doc Asks to let a request through. Half open, that takes a probe, which {@link success/0} or
%% {@link failure/0} must give back.
-spec allow() -> boolean().
allow() ->
    case ?UNLESS_LOADED(erlmcp_nif:breaker_allow(), allowed) of
        allowed ->
            true;
        {allowed, State} ->
            log(State),
            true;
        refused ->
            false
    end.


%% @doc Whether {@link allow/0} would let a request through now. Takes no probe and changes nothing.
-spec would_allow() -> boolean().
would_allow() ->
    case stats() of
        #{state := open} ->
            false;
        #{state := half_open, probes := Probes, since_ms := SinceMs, config := {_, _, _, TimeoutMs, Limit}} ->
            %% Probes that were not answered in all this time are lost.
            Probes < Limit orelse (SinceMs > 0 andalso SinceMs >= TimeoutMs);
        #{} ->
            true
    end.


%% @doc Records a success.
-spec success() -> ok.
success() ->
    log(?UNLESS_LOADED(erlmcp_nif:breaker_success(), none)).


%% @doc Records a failure.
-spec failure() -> ok.
failure() ->
    log(?UNLESS_LOADED(erlmcp_nif:breaker_failure(), none)).


%% @doc Closes or opens the breaker.
-spec force(closed | open) -> ok.
force(State) ->
    log(?UNLESS_LOADED(erlmcp_nif:breaker_set(State), none)).


%% @doc The native counters.
-spec stats() -> map().
stats() ->
    ?UNLESS_LOADED(erlmcp_nif:breaker_stats(), #{state => off}).


-spec log(none | closed | open | half_open) -> ok.
log(none) -> ok;
log(State) -> erlmcp_circuit_breaker_log:transition(node, State).
