%%% @doc Circuit breakers for single targets of routes: a server, transport or connection that fails is refused alone,
%%% while all others are served.
%%%
%%% ```
%%% ok = erlmcp_target_breaker:set({server, weather}, #{failure_threshold => 5, timeout_ms => 30_000}).
%%% %% By whoever learns how a request to the server has ended:
%%% ok = erlmcp_target_breaker:record_failure({server, weather}).
%%% %% After five failures within ten seconds:
%%% {error, circuit_open} = erlmcp_registry:route_to_server(weather, TransportId, Message).
%%% '''
%%%
%%% A route sends a message and does not wait for an answer, so it cannot know whether the target works. The outcomes are
%%% reported by {@link record_success/1} and {@link record_failure/1}, by the process that waits for the answer, say. No
%%% refusal of another layer counts as an outcome.
%%%
%%% The states are those of the node's breaker ({@link erlmcp_circuit_breaker}). Open, routes to the target return
%%% `{error, circuit_open}'. After `timeout_ms' it is half open: at most `probe_limit' messages are under way, until their
%%% outcomes are reported. `success_threshold' successes close it, a failure opens it. Probes whose outcomes nobody has
%%% reported within `timeout_ms' are taken for lost, and their places are free again.
%%%
%%% A breaker belongs to the id: it may be set before the target is registered, and stays when the target is registered
%%% anew, until {@link delete/1}. It outlives the application, like the default registry.
%%%
%%% == Routes ==
%%% The breaker guards {@link erlmcp_shard_manager:route_message/2} and batches to a connection; and messages to a server
%%% or transport, broadcasts included, that the native registry routes ({@link erlmcp_rollout}). A route checks it before
%%% the other layers. Members of groups are not guarded, since they have no ids. With `backpressure' set to `off' no breaker
%%% refuses anything.
%%%
%%% == Cost ==
%%% Each function is one native call on the calling scheduler, in constant time, or in proportion to `failure_threshold' where
%%% failures are counted or forgotten. {@link list/0} runs on a dirty scheduler, in proportion to the breakers; so does
%%% one call of {@link set/2} in some sixty for an id whose breaker is set and deleted again and again among thousands. A
%%% breaker takes some 160 bytes, and 8 for each failure of its threshold. While a
%%% node has no breaker of this kind, routes do nothing more than read one word; with any, each route looks for that of
%%% its target, which takes some 30 ns where it is in the processor's caches.
%%%
%%% == Errors ==
%%% A target that is not `{server | transport | connection, Id}', or an id that is too long to be registered, raises
%%% `badarg'. A target without a breaker is `{error, no_breaker}'.
-module(erlmcp_target_breaker).

-export([set/2, delete/1]).
-export([record_success/1, record_failure/1]).
-export([open/1, close/1]).
-export([state/1, stats/1, list/0]).

-export_type([target/0, options/0, stats/0]).

-type target() :: {server | transport | connection, Id :: term()}.
%% Or a property list or keyword list.
-type options() :: #{
                     failure_threshold => pos_integer(),
                     window_ms => pos_integer(),
                     success_threshold => pos_integer(),
                     timeout_ms => non_neg_integer(),
                     probe_limit => pos_integer()
                    } |
                   [{atom(), non_neg_integer()}].
-type stats() :: #{
                   state := erlmcp_circuit_breaker:state(),
                   failures := non_neg_integer(),
                   successes := non_neg_integer(),
                   probes := non_neg_integer(),
                   since_ms := non_neg_integer()
                  }.


%% @doc Makes the breaker of a target, closed; or changes the options of the one that it has, which keeps its state and
%% counts its failures anew. Equal options change nothing.
%%
%% Options and defaults: `failure_threshold' (5; up to 1,000) failures within `window_ms' (10,000) open it, for `timeout_ms'
%% (30,000); `success_threshold' (2) successes close it; when half open `probe_limit' (2) messages are under way. Options
%% that are not given have their defaults. There are at most 100,000 such breakers.
-spec set(target(), options()) -> ok | {error, erlmcp_native_config:error() | too_many_breakers}.
set(Target, Options) ->
    {Namespace, Id} = parts(Target),
    case erlmcp_native_config:check_target_breaker(Options) of
        {ok, Config} ->
            case erlmcp_nif:target_breaker_set(Namespace, Id, Config) of
                ok -> ok;
                too_many_breakers -> {error, too_many_breakers}
            end;
        {error, _} = Error ->
            Error
    end.


%% @doc Removes the breaker of a target.
-spec delete(target()) -> ok | {error, no_breaker}.
delete(Target) ->
    {Namespace, Id} = parts(Target),
    case erlmcp_nif:target_breaker_remove(Namespace, Id) of
        true -> ok;
        false -> {error, no_breaker}
    end.


%% @doc A message to the target has succeeded. Counts only while the breaker is half open.
-spec record_success(target()) -> ok | {error, no_breaker}.
record_success(Target) ->
    change(Target, success).


%% @doc A message to the target has failed.
-spec record_failure(target()) -> ok | {error, no_breaker}.
record_failure(Target) ->
    change(Target, failure).


%% @doc Opens the breaker now, for `timeout_ms'.
-spec open(target()) -> ok | {error, no_breaker}.
open(Target) ->
    change(Target, open).


%% @doc Closes the breaker now. Former failures are forgotten.
-spec close(target()) -> ok | {error, no_breaker}.
close(Target) ->
    change(Target, closed).


-spec change(target(), erlmcp_nif:breaker_change()) -> ok | {error, no_breaker}.
change(Target, Change) ->
    {Namespace, Id} = parts(Target),
    case erlmcp_nif:target_breaker_change(Namespace, Id, Change) of
        ok -> ok;
        none -> {error, no_breaker};
        State -> erlmcp_circuit_breaker:log_transition({target, Target}, State)
    end.


%% @doc The state of a target's breaker.
-spec state(target()) -> erlmcp_circuit_breaker:state() | {error, no_breaker}.
state(Target) ->
    case stats(Target) of
        {ok, #{state := State}} -> State;
        Error -> Error
    end.


%% @doc The state and the counters of a target's breaker: failures within the window, at most one less than the threshold;
%% successes and messages under way while half open; and how long it has been in this state.
-spec stats(target()) -> {ok, stats()} | {error, no_breaker}.
stats(Target) ->
    {Namespace, Id} = parts(Target),
    case erlmcp_nif:target_breaker_stats(Namespace, Id) of
        none -> {error, no_breaker};
        Stats -> {ok, maps:remove(config, Stats)}
    end.


%% @doc All targets that have a breaker, in no order, with its state.
-spec list() -> [{target(), erlmcp_circuit_breaker:state()}].
list() ->
    [ {{Namespace, Id}, State} || {Namespace, Id, State} <- erlmcp_nif:target_breakers() ].


%% The native library checks the namespace.
-spec parts(target() | term()) -> target().
parts({_Namespace, _Id} = Target) -> Target;
parts(Wrong) -> error(badarg, [Wrong]).
