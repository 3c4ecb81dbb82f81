%%% @doc Circuit breakers: one each name, for what may fail, and one for the node, for its load.
%%%
%%% A circuit breaker (M. Nygard, <em>Release It!</em>, 2007) stops calling what fails: closed, it
%%% lets calls through and watches their outcomes; open, it refuses at once; half open, it lets a few
%%% probes through to see whether to close. The API is that of erlmcp's own `erlmcp_circuit_breaker',
%%% in all its generations: functions with a breaker for their first argument, or a name, are of the
%%% named breakers, those without are of the node's.
%%%
%%% == Named breakers ==
%%% In pure Erlang; they need neither the native library nor our application. A breaker is a process
%%% with any term for its name (compared exactly, no name of the node's own registry), started by a
%%% supervisor ({@link start_link/2}) or by itself ({@link register_breaker/2}). Where a name is
%%% asked for, the breaker's pid does as well. An unknown name exits with `{noproc, _}'.
%%%
%%% The options, a map:
%%% <table border="1">
%%% <tr><th>key</th><th>default</th><th>meaning</th></tr>
%%% <tr><td>`failure_threshold'</td><td>5</td><td>failures in a row that open it</td></tr>
%%% <tr><td>`window_size'</td><td>10</td><td>the last calls that the failure rate is about; fewer
%%% never open it</td></tr>
%%% <tr><td>`failure_rate_threshold'</td><td>0.5</td><td>the failure rate (0.0 to 1.0) that opens it, at
%%% a failure</td></tr>
%%% <tr><td>`timeout'</td><td>60000</td><td>how many milliseconds it stays open</td></tr>
%%% <tr><td>`success_threshold'</td><td>2</td><td>successes in a row that close it when half
%%% open; one failure opens it</td></tr>
%%% <tr><td>`probe_limit'</td><td>`success_threshold'</td><td>calls that run at a time when half
%%% open</td></tr>
%%% </table>
%%% `priority_level' and `reset_timeout', which some generations have, are taken and without effect.
%%% A wrong option is `{error, {bad_option, Key, Value, Expected}}'.
%%%
%%% == Guarantees ==
%%% The protected fun runs in the calling process, side by side with those of other callers. Whoever
%%% has seen the outcome of its own call finds the breaker in the state that this brought about. When
%%% half open never more than `probe_limit' probes run, of this half-open time and earlier ones. A
%%% caller that ends inside its fun, however, is a failure and gives its slot back. An outcome counts
%%% in the period, from one transition or reset to the next, in which its call was let through; a
%%% later one counts in the totals alone. Refused calls cost no message while the breaker is open.
%%%
%%% If a breaker ends while funs run, their callers get the results, which count nowhere; who asks
%%% after that, or is waiting for permission, exits with `{noproc, _}', and the fun does not run.
%%%
%%% == Trade-offs ==
%%% A call sends two messages to the breaker's process and waits for one answer, before the fun: what
%%% is guarded should be slower than that (some microseconds). Breakers are for one node; a pid of
%%% another node's breaker works, at the price of the network.
%%%
%%% == The node's breaker ==
%%% Its state is native, is asked on every guarded route, and outlives all processes; its options are
%%% `circuit_breaker' in the environment of `erlmcp_native'. Once `timeout_ms' have passed it is half
%%% open, whether anybody has asked or not; the transition is logged when the first one is let through,
%%% and successes count from then on. Its functions run in the calling process. {@link start_link/0}
%%% starts the process that hosts supervise, which keeps the metrics of {@link record_request/2} and
%%% {@link record_error/1}; the breaker works without it.
%%%
%%% == Logs ==
%%% Each transition is logged once, opening as a warning and the others as notices, with the metadata
%%% `event' (`circuit_opened', `circuit_half_open', `circuit_closed'), `domain' (`[erlmcp_native]')
%%% and, of a named breaker, `breaker'. Refused calls are not logged.
-module(erlmcp_circuit_breaker).

%% Named breakers: start and end
-export([start_link/1, start_link/2]).
-export([register_breaker/2, register_breaker/3, unregister_breaker/1]).
-export([stop/1]).
%% Named breakers: calls
-export([call/2, call/3, call_with_fallback/3, call_with_fallback/4]).
%% Named breakers: operation
-export([get_state/1, get_stats/1, reset/1, force_open/1, force_close/1]).
-export([get_all_states/0, get_all_stats/0, reset_all/0]).
%% The node's breaker: the process and its metrics
-export([start_link/0, stop/0, record_request/2, record_error/1, get_metrics/0]).
%% The node's breaker
-export([get_status/0, get_state/0, is_open/0]).
-export([allow_test_request/0, record_success/0, record_failure/0]).
-export([reset/0, force_open/0, force_close/0]).

-export_type([name/0, breaker/0, options/0, option_error/0, state/0, node_state/0]).

-type name() :: term().
-type breaker() :: name() | pid().
-type options() :: erlmcp_circuit_breaker_config:options().
-type option_error() :: erlmcp_circuit_breaker_config:error().
-type state() :: closed | open | half_open.
-type node_state() :: state() | off.

-define(CALL_MS, 5000).
-define(MAX_MS,  16#ffffffff).
-define(IS_TIMEOUT(T),
        (T =:= infinity orelse (is_integer(T) andalso T >= 0 andalso T =< ?MAX_MS))).

%%% Named breakers: start and end


%% @equiv start_link(Name, #{})
-spec start_link(name()) -> {ok, pid()} | {error, {already_started, pid()}}.
start_link(Name) ->
    start_link(Name, #{}).


%% @doc Starts a closed breaker, linked to the calling process: for a supervisor.
-spec start_link(name(), options()) ->
          {ok, pid()} | {error, {already_started, pid()} | option_error()}.
start_link(Name, Options) ->
    case erlmcp_circuit_breaker_config:check(Options) of
        {ok, Config} -> erlmcp_circuit_breaker_server:start_link(Name, Config);
        Error -> Error
    end.


%% @equiv register_breaker(Name, Options, undefined)
-spec register_breaker(name(), options()) -> ok | {error, already_registered | option_error()}.
register_breaker(Name, Options) ->
    register_breaker(Name, Options, undefined).


%% @doc Starts a closed breaker that belongs to nobody, until {@link unregister_breaker/1} or
%% {@link stop/1}.
%%
%% It ends with its application too, if a process of an application starts it. The third argument,
%% once a process to tell, is without effect, as it is in erlmcp.
-spec register_breaker(name(), options(), pid() | undefined) ->
          ok | {error, already_registered | option_error()}.
register_breaker(Name, Options, Monitor) when is_pid(Monitor); Monitor =:= undefined ->
    case erlmcp_circuit_breaker_config:check(Options) of
        {ok, Config} ->
            case erlmcp_circuit_breaker_server:start(Name, Config) of
                {ok, _Pid} -> ok;
                {error, {already_started, _Pid}} -> {error, already_registered}
            end;
        Error ->
            Error
    end.


%% @doc Ends the breaker of a name; `ok' also if there is none.
-spec unregister_breaker(name()) -> ok.
unregister_breaker(Name) ->
    case erlmcp_circuit_breaker_names:whereis_name(Name) of
        undefined ->
            ok;
        Pid ->
            try
                stop(Pid)
            catch
                % Somebody else ended it.
                exit:{noproc, _} -> ok
            end
    end.


%% @doc Ends a breaker. Funs that run are not interrupted.
-spec stop(breaker()) -> ok.
stop(Breaker) ->
    erlmcp_circuit_breaker_server:stop(Breaker).


%%% Named breakers: calls


%% @equiv call(Breaker, Fun, 5000)
-spec call(breaker(), fun(() -> Result)) ->
          Result | {error, circuit_breaker_open | {exception, error | exit | throw, term()}}.
call(Breaker, Fun) ->
    call(Breaker, Fun, ?CALL_MS).


%% @doc Runs a fun in the calling process, if the breaker lets it.
%%
%% Returns what the fun returns; `{error, {exception, Class, Reason}}' if it fails;
%% `{error, circuit_breaker_open}' if it is refused. `{error, _}' and exceptions are failures, all
%% else is a success.
%%
%% `Timeout' is in milliseconds. A breaker that does not answer in that time is an exit
%% `{timeout, _}'. A fun that runs longer is not interrupted and its result is returned, but to the
%% breaker it is a failure from then on, and its slot is free: a call that hangs must not keep
%% the breaker half open.
-spec call(breaker(), fun(() -> Result), timeout()) ->
          Result | {error, circuit_breaker_open | {exception, error | exit | throw, term()}}.
call(Breaker, Fun, Timeout) when is_function(Fun, 0), ?IS_TIMEOUT(Timeout) ->
    case erlmcp_circuit_breaker_server:permit(Breaker, Timeout) of
        {granted, Permission} -> run(Fun, Permission);
        refused -> {error, circuit_breaker_open}
    end.


%% @equiv call_with_fallback(Breaker, Fun, Fallback, 5000)
-spec call_with_fallback(breaker(), fun(() -> Result), fun(() -> Other)) ->
          Result | Other | {error, {exception, error | exit | throw, term()}}.
call_with_fallback(Breaker, Fun, Fallback) ->
    call_with_fallback(Breaker, Fun, Fallback, ?CALL_MS).


%% @doc {@link call/3}, with what `Fallback' returns in place of `{error, circuit_breaker_open}'.
%%
%% No other failure runs the fallback. It is not protected: it counts nowhere, and its exceptions
%% are the caller's.
-spec call_with_fallback(breaker(), fun(() -> Result), fun(() -> Other), timeout()) ->
          Result | Other | {error, {exception, error | exit | throw, term()}}.
call_with_fallback(Breaker, Fun, Fallback, Timeout) when is_function(Fallback, 0) ->
    case call(Breaker, Fun, Timeout) of
        {error, circuit_breaker_open} -> Fallback();
        Result -> Result
    end.


-spec run(fun(() -> term()), erlmcp_circuit_breaker_server:permission()) -> term().
run(Fun, Permission) ->
    try Fun() of
        {error, _} = Failure ->
            ok = erlmcp_circuit_breaker_server:conclude(Permission, failure),
            Failure;
        Success ->
            ok = erlmcp_circuit_breaker_server:conclude(Permission, success),
            Success
    catch
        Class:Reason ->
            ok = erlmcp_circuit_breaker_server:conclude(Permission, failure),
            {error, {exception, Class, Reason}}
    end.


%%% Named breakers: operation


%% @doc The state of a breaker.
-spec get_state(breaker()) -> state().
get_state(Breaker) ->
    erlmcp_circuit_breaker_server:request(Breaker, get_state).


%% @doc The statistics of a breaker.
%%
%% A map of `name', `state', `consecutive_failures', `consecutive_successes', `total_calls' (the sum
%% of the next three), `total_successes', `total_failures', `total_rejected', `failure_rate' (of the
%% window, also if it is not full), `success_rate' (of all calls), `last_failure_time' (or
%% `undefined') and `last_state_change' (both in milliseconds of {@link erlang:monotonic_time/1}),
%% and the options: each under its key, and all as `config'.
-spec get_stats(breaker()) -> {ok, map()}.
get_stats(Breaker) ->
    erlmcp_circuit_breaker_server:request(Breaker, get_stats).


%% @doc Closes a breaker and forgets all but the totals.
%%
%% Also if it is closed: calls that run now do not count any more.
-spec reset(breaker()) -> ok.
reset(Breaker) ->
    erlmcp_circuit_breaker_server:request(Breaker, reset).


%% @doc Opens a breaker, for the time of its `timeout'. One that is open stays as it is.
-spec force_open(breaker()) -> ok.
force_open(Breaker) ->
    erlmcp_circuit_breaker_server:request(Breaker, force_open).


%% @doc Closes a breaker. One that is closed stays as it is.
-spec force_close(breaker()) -> ok.
force_close(Breaker) ->
    erlmcp_circuit_breaker_server:request(Breaker, force_close).


%% @doc The states of all named breakers of this node.
-spec get_all_states() -> #{name() => state()}.
get_all_states() ->
    erlmcp_circuit_breaker_server:request_all(get_state).


%% @doc The statistics of all named breakers of this node.
-spec get_all_stats() -> #{name() => map()}.
get_all_stats() ->
    maps:map(fun(_Name, {ok, Stats}) -> Stats end, erlmcp_circuit_breaker_server:request_all(get_stats)).


%% @doc Resets all named breakers of this node.
-spec reset_all() -> ok.
reset_all() ->
    _ = erlmcp_circuit_breaker_server:request_all(reset),
    ok.


%%% The node's breaker: the process and its metrics


%% @doc Starts the process of the local name `erlmcp_circuit_breaker', with empty metrics.
%%
%% Returns `{error, {already_started, Pid}}' if there is one. The breaker itself stays as it is.
-spec start_link() -> gen_server:start_ret().
start_link() ->
    erlmcp_circuit_breaker_metrics:start_link().


%% @doc Ends that process; exits with `{noproc, _}' if there is none. The breaker stays as it is.
-spec stop() -> ok.
stop() ->
    erlmcp_circuit_breaker_metrics:stop().


%% @doc Counts a request and its latency in the metrics. The id is not looked at.
-spec record_request(Id :: term(), LatencyMs :: number()) -> ok.
record_request(_Id, LatencyMs) when is_number(LatencyMs) ->
    erlmcp_circuit_breaker_metrics:request(LatencyMs).


%% @doc Counts an error in the metrics, and as one failure of the breaker. The id is not looked at.
-spec record_error(Id :: term()) -> ok.
record_error(_Id) ->
    ok = erlmcp_circuit_breaker_metrics:error(),
    erlmcp_circuit_breaker_node:failure().


%% @doc What was recorded since the process started or since {@link reset/0}.
%%
%% A map with `total_requests', `total_errors', `error_rate_percent', `average_latency_ms' and
%% `p95_latency_ms' (at most an eighth too high), and `breaker' with the native counters. For readers
%% of erlmcp's map: `requests_in_window' and `errors_in_window' are the totals, `last_update' is now
%% (system time, ms), `cpu_usage_percent' and `memory_usage_percent' are 0.0, not measured, as there.
%% Exits with `{noproc, _}' if the process does not run.
-spec get_metrics() -> {ok, map()}.
get_metrics() ->
    Metrics = erlmcp_circuit_breaker_metrics:read(),
    {ok, Metrics#{breaker => erlmcp_circuit_breaker_node:stats()}}.


%%% The node's breaker


%% @doc The state, of which erlmcp knows three: a breaker that is off is closed here.
-spec get_status() -> {ok, state()}.
get_status() ->
    case get_state() of
        off -> {ok, closed};
        State -> {ok, State}
    end.


%% @doc The state; `off' if it is switched off, or the native library is not loaded.
-spec get_state() -> node_state().
get_state() ->
    erlmcp_circuit_breaker_node:state().


%% @doc Whether the state is `open'; half open is not.
-spec is_open() -> boolean().
is_open() ->
    get_state() =:= open.


%% @doc Whether a request may be made.
%%
%% If so, and the breaker is half open, this is a probe, and its outcome must be told to
%% {@link record_success/0} or {@link record_failure/0}.
-spec allow_test_request() -> boolean().
allow_test_request() ->
    erlmcp_circuit_breaker_node:allow().


%% @doc Records a success.
-spec record_success() -> ok.
record_success() ->
    erlmcp_circuit_breaker_node:success().


%% @doc Records a failure.
-spec record_failure() -> ok.
record_failure() ->
    erlmcp_circuit_breaker_node:failure().


%% @doc Closes the breaker and begins the metrics anew.
-spec reset() -> ok.
reset() ->
    ok = erlmcp_circuit_breaker_metrics:clear(),
    erlmcp_circuit_breaker_node:force(closed).


%% @doc Opens the breaker, for its `timeout_ms'.
-spec force_open() -> ok.
force_open() ->
    erlmcp_circuit_breaker_node:force(open).


%% @doc Closes the breaker.
-spec force_close() -> ok.
force_close() ->
    erlmcp_circuit_breaker_node:force(closed).
