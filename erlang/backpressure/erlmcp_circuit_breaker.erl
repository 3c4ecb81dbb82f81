%%% @doc Circuit breakers: one for each name, for calls that may fail, and one for the node, for its load.
%%%
%%% A circuit breaker (M. Nygard, <em>Release It!</em>, 2007) stops calls that fail: closed, it
%%% lets calls through and watches their outcomes; open, it refuses at once; half open, it lets a few
%%% probes through to decide whether to close. The API is that of erlmcp's own `erlmcp_circuit_breaker',
%%% in all its generations: functions whose first argument is a breaker or a name work on the
%%% named breakers, the others on the node's breaker.
%%%
%%% == Named breakers ==
%%% A breaker is a structure in native memory. Its name is any term (compared exactly; not a name in the
%%% node's own registry). {@link register_breaker/2} makes a breaker without an owner; {@link start_link/2}
%%% starts a process for a supervisor. The breaker ends with this process, and the process's pid can be used in place
%%% of the name. The process takes no part in calls. An unknown name exits with `{noproc, _}'.
%%%
%%% The options, as a map, a property list or a keyword list:
%%% <table border="1">
%%% <tr><th>key</th><th>default</th><th>meaning</th></tr>
%%% <tr><td>`failure_threshold'</td><td>5</td><td>failures in a row that open it</td></tr>
%%% <tr><td>`window_size'</td><td>10</td><td>the number of last calls that the failure rate is computed of, up to
%%% 1,000,000; fewer calls never open it</td></tr>
%%% <tr><td>`failure_rate_threshold'</td><td>0.5</td><td>the failure rate (0.0 to 1.0) that opens it, at
%%% a failure</td></tr>
%%% <tr><td>`timeout'</td><td>60000</td><td>how many milliseconds it stays open</td></tr>
%%% <tr><td>`success_threshold'</td><td>2</td><td>successes in a row that close it when half
%%% open; one failure opens it</td></tr>
%%% <tr><td>`probe_limit'</td><td>`success_threshold'</td><td>calls that may run at a time when half
%%% open, up to 1,000</td></tr>
%%% </table>
%%% `priority_level' (default `normal') and `reset_timeout', which some generations have, are accepted and
%%% ignored. A wrong option is `{error, {bad_option, Key, Value, Expected}}'.
%%%
%%% Names and options may come from input: no atom is made from them, an encoded name takes at most 1,024
%%% bytes (else `{error, name_too_long}', which is also the error for a fun other than `fun M:F/A'), and there are at
%%% most 100,000 breakers (else `{error, too_many_breakers}').
%%%
%%% == Guarantees ==
%%% {@link call/2} runs the protected fun in the calling process, concurrently with those of other callers,
%%% and sends no message to another process. When its outcome has been recorded, every process finds the breaker in
%%% the resulting state. A period is the time from one transition or reset to the next. An outcome takes part in
%%% decisions only in the period in which its call was let through; a later outcome counts in the totals alone.
%%%
%%% A caller that is killed inside its fun, or exits there, counts as a failure, closed and half open. This is done
%%% by a native monitor, which is created by the first call of a process (about a microsecond) and
%%% kept until the process exits (some 400 bytes).
%%%
%%% When half open never more than `probe_limit' calls hold a slot, including calls of earlier half-open
%%% periods. A slot has a deadline: 5 seconds for {@link call/2}, the timeout of {@link call/3}, none for
%%% `infinity'. After the deadline the next caller that finds no slot free takes the slot over, and the outcome of the
%%% call that has lost it counts in the totals alone.
%%%
%%% If a breaker is removed while funs run, their callers get the results, which count nowhere.
%%%
%%% == Trade-offs ==
%%% A breaker does nothing by itself: the transition to half open when the time is up, and the transition caused by a
%%% caller that was killed, are made and logged when the next function is called with that breaker. Breakers are
%%% local to the node.
%%%
%%% Without the native library one process implements the same rules ({@link erlmcp_circuit_breaker_pure}): a call
%%% then costs two requests to it.
%%%
%%% == The node's breaker ==
%%% Its state is native, is read on every guarded route, and outlives all processes; its options are
%%% `circuit_breaker' in the environment of `erlmcp_native'. Once `timeout_ms' have passed it is half
%%% open, even if no request was made; the transition is logged when the first request is let through,
%%% and successes count from then on. Its functions run in the calling process. {@link start_link/0}
%%% starts the process that hosts supervise, which keeps the metrics of {@link record_request/2} and
%%% {@link record_error/1}; the breaker works without it. Without the native library it is `off': it lets
%%% everything through and records nothing.
%%%
%%% == Logs ==
%%% Each transition is logged once ({@link erlmcp_native_log}), opening as a warning and the others as
%%% notices: the events `circuit_opened', `circuit_half_open' and `circuit_closed' with the key `breaker', which is
%%% `node', `{name, Name}', or `{target, Target}' ({@link erlmcp_target_breaker}). Refused calls are not logged.
-module(erlmcp_circuit_breaker).

-behaviour(gen_server).

%% Named breakers: start and end
-export([start_link/1, start_link/2]).
-export([register_breaker/2, register_breaker/3, unregister_breaker/1]).
-export([stop/1]).
%% Named breakers: calls
-export([call/2, call/3, call_with_fallback/3, call_with_fallback/4]).
%% Named breakers: operation
-export([get_state/1, get_stats/1, reset/1, open/2, force_open/1, force_half_open/1, force_close/1]).
-export([get_all_states/0, get_all_stats/0, reset_all/0]).
-export([count_states/1]).
%% The node's breaker: the process and its metrics
-export([start_link/0, stop/0, record_request/2, record_error/1, get_metrics/0]).
%% The node's breaker
-export([get_status/0, get_state/0, is_open/0]).
-export([can_execute/0, allow_test_request/0, record_success/0, record_failure/0, record_retry_attempt/0]).
-export([reset/0, force_open/0, force_close/0]).
%% For other modules of this application
-export([node_stats/0, log_transition/2]).
%% The process of a bounded call
-export([work/3]).
%% The process of a named breaker
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-export_type([name/0, breaker/0, options/0, option_error/0, registration_error/0, state/0, node_state/0]).

-type name() :: term().
-type breaker() :: name() | pid().
-type options() :: #{
                     failure_threshold => pos_integer(),
                     success_threshold => pos_integer(),
                     timeout => pos_integer(),
                     window_size => pos_integer(),
                     failure_rate_threshold => number(),
                     probe_limit => pos_integer(),
                     priority_level => term(),
                     reset_timeout => term()
                    }.
-type option_error() :: {bad_option, Key :: term(), Value :: term(), Expected :: string()}.
-type registration_error() :: already_registered | name_too_long | too_many_breakers | option_error().
-type state() :: closed | open | half_open.
-type node_state() :: state() | off.
-type call_id() :: non_neg_integer() | reference().

%% How long a slot of the half-open state is held for a call without a timeout.
-define(SLOT_MS,    5000).
-define(MAX_MS,     16#ffffffff).
-define(MAX_COUNT,  16#ffffffff).
-define(MAX_WINDOW, 1_000_000).
-define(MAX_PROBES, 1_000).
-define(IS_TIMEOUT(T),
        (T =:= infinity orelse (is_integer(T) andalso T >= 0 andalso T =< ?MAX_MS))).
-define(EXCEPTION(Class, Reason), {error, {exception, Class, Reason}}).

-define(UNLESS_LOADED(Call, Otherwise),
        try
            Call
        catch
            error:{nif_not_loaded, _} -> Otherwise
        end).

%%% Named breakers: start and end


%% @doc Starts a breaker. If the argument is a map, with these options and a unique name; else with this
%% name. See {@link start_link/2}.
-spec start_link(options() | name()) ->
          {ok, pid()} | {error, {already_started, pid()} | registration_error()}.
start_link(Options) when is_map(Options) ->
    start_link(make_ref(), Options);
start_link(Name) ->
    start_link(Name, #{}).


%% @doc Starts a process linked to the calling process, for a supervisor, and a closed breaker that ends with it.
%%
%% A name that is an atom is also the local name of that process. The process answers
%% `gen_statem:call(Process, get_state)' and `get_stats'.
-spec start_link(name(), options() | [proplists:property()]) ->
          {ok, pid()} | {error, {already_started, pid()} | registration_error()}.
start_link(Name, Options) ->
    case check(Options) of
        {ok, Config, Full} ->
            % `ignore' instead of an error, which would also arrive as an exit signal.
            Parent = self(),
            Tag = make_ref(),
            Started = case is_atom(Name) of
                          true -> gen_server:start_link({local, Name}, ?MODULE, {Name, Config, Full, Parent, Tag}, []);
                          false -> gen_server:start_link(?MODULE, {Name, Config, Full, Parent, Tag}, [])
                      end,
            case Started of
                ignore ->
                    receive {Tag, Error} -> {error, Error} end;
                _ ->
                    Started
            end;
        {error, _} = Error ->
            Error
    end.


%% @equiv register_breaker(Name, Options, undefined)
-spec register_breaker(name(), options() | [proplists:property()]) -> ok | {error, registration_error()}.
register_breaker(Name, Options) ->
    register_breaker(Name, Options, undefined).


%% @doc Makes a closed breaker without an owner, which exists until {@link unregister_breaker/1} or {@link stop/1}.
%%
%% It has no process and no local name, and outlives the process that makes it. The third argument, once a
%% process to notify, is ignored, as it is in erlmcp.
-spec register_breaker(name(), options() | [proplists:property()], pid() | undefined) -> ok | {error, registration_error()}.
register_breaker(Name, Options, Monitor) when is_pid(Monitor); Monitor =:= undefined ->
    case check(Options) of
        {ok, Config, Full} ->
            case register_in_store(Name, Config, Full, false) of
                ok -> ok;
                {error, {already_started, _}} -> {error, already_registered};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.


-spec register_in_store(name(), erlmcp_nif:named_breaker_config(), options(), boolean()) ->
          ok | {error, {already_started, pid()} | registration_error()}.
register_in_store(Name, Config, Options, IsOwned) ->
    case in_store(fun() -> erlmcp_nif:named_breaker_register(Name, Config, Options, IsOwned) end,
                  fun() -> erlmcp_circuit_breaker_pure:register(Name, Config, Options, IsOwned) end) of
        ok -> ok;
        {already_registered, none} -> {error, already_registered};
        {already_registered, Owner} -> {error, {already_started, Owner}};
        config_too_large -> {error, {bad_option, config, Options, "less than 4,096 bytes"}};
        Reason -> {error, Reason}
    end.


%% @doc Removes the breaker of a name; `ok' also if there is none.
-spec unregister_breaker(name()) -> ok.
unregister_breaker(Name) ->
    try
        stop(Name)
    catch
        exit:{noproc, _} -> ok
    end.


%% @doc Removes a breaker, and stops its process if it has one. Funs that run are not interrupted.
-spec stop(breaker()) -> ok.
stop(Breaker) ->
    case in_store(fun() -> erlmcp_nif:named_breaker_owner(Breaker) end,
                  fun() -> erlmcp_circuit_breaker_pure:owner(Breaker) end) of
        undefined ->
            unknown(Breaker, stop);
        none ->
            case in_store(fun() -> erlmcp_nif:named_breaker_remove(Breaker) end,
                          fun() -> erlmcp_circuit_breaker_pure:remove(Breaker) end) of
                ok -> ok;
                undefined -> unknown(Breaker, stop)
            end;
        Owner ->
            try
                gen_server:stop(Owner)
            catch
                exit:_ -> unknown(Breaker, stop)
            end
    end.


-spec in_store(fun(() -> Result), fun(() -> Result)) -> Result.
in_store(Native, Pure) ->
    case erlmcp_nif:load_error() of
        none -> Native();
        _ -> Pure()
    end.


-spec unknown(breaker(), term()) -> no_return().
unknown(Breaker, Request) ->
    exit({noproc, {?MODULE, Request, [Breaker]}}).


%%% The process of a named breaker


%% @private
-spec init({name(), erlmcp_nif:named_breaker_config(), options(), pid(), reference()}) ->
          {ok, name(), hibernate} | ignore.
init({Name, Config, Options, Parent, Tag}) ->
    % Callers may link themselves to their breaker; only its parent ends it.
    _ = process_flag(trap_exit, true),
    case register_in_store(Name, Config, Options, true) of
        ok ->
            {ok, Name, hibernate};
        {error, Error} ->
            Parent ! {Tag, Error},
            ignore
    end.


%% @private
-spec handle_call(term(), gen_server:from(), name()) -> {reply, term(), name(), hibernate}.
handle_call(get_state, _From, Name) -> {reply, get_state(Name), Name, hibernate};
handle_call(get_stats, _From, Name) -> {reply, get_stats(Name), Name, hibernate};
handle_call(_Request, _From, Name) -> {reply, {error, unknown_request}, Name, hibernate}.


%% @private
-spec handle_cast(term(), name()) -> {noreply, name(), hibernate}.
handle_cast(_Request, Name) ->
    {noreply, Name, hibernate}.


%% @private
-spec handle_info(term(), name()) -> {noreply, name(), hibernate}.
handle_info(_Info, Name) ->
    {noreply, Name, hibernate}.


%%% Named breakers: options


%% The native configuration of a breaker, and the options completed by defaults.
-spec check(options() | [proplists:property()] | term()) ->
          {ok, erlmcp_nif:named_breaker_config(), options()} | {error, option_error()}.
check(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{} = Map -> check_map(Map);
        _ -> {error, {bad_option, config, Options, erlmcp_native_config:map_expected()}}
    end.


-spec check_map(map()) -> {ok, erlmcp_nif:named_breaker_config(), options()} | {error, option_error()}.
check_map(Options) ->
    Defaults = #{
                 failure_threshold => 5,
                 success_threshold => 2,
                 timeout => 60_000,
                 window_size => 10,
                 failure_rate_threshold => 0.5,
                 priority_level => normal
                },
    case [ {bad_option, Key, Value, Expected}
           || {Key, Value} <- maps:to_list(Options), Expected <- expected(Key, Value) ] of
        [] ->
            #{success_threshold := SuccessThreshold} = Given = maps:merge(Defaults, Options),
            Full = maps:merge(#{probe_limit => min(SuccessThreshold, ?MAX_PROBES)}, Given),
            {ok, config(Full), Full};
        [Error | _] ->
            {error, Error}
    end.


%% Empty if the value is good.
-spec expected(term(), term()) -> [string()].
expected(failure_threshold, N) when is_integer(N), N >= 1 -> [];
expected(failure_threshold, _) -> ["a positive integer"];
expected(success_threshold, N) when is_integer(N), N >= 1 -> [];
expected(success_threshold, _) -> ["a positive integer"];
expected(timeout, N) -> within(N, ?MAX_MS);
expected(window_size, N) -> within(N, ?MAX_WINDOW);
expected(probe_limit, N) -> within(N, ?MAX_PROBES);
expected(failure_rate_threshold, N) when is_number(N), N >= 0, N =< 1 -> [];
expected(failure_rate_threshold, _) -> ["a number from 0.0 to 1.0"];
expected(priority_level, _) -> [];
expected(reset_timeout, _) -> [];
expected(_Key, _) ->
    ["one of the keys failure_threshold, success_threshold, timeout, window_size, failure_rate_threshold, "
     "probe_limit"].


-spec within(term(), pos_integer()) -> [string()].
within(N, Max) when is_integer(N), N >= 1, N =< Max -> [];
within(_, Max) -> ["an integer from 1 to " ++ integer_to_list(Max)].


%% Limits the thresholds to the range of the native counters.
-spec config(options()) -> erlmcp_nif:named_breaker_config().
config(#{
         failure_threshold := FailureThreshold,
         success_threshold := SuccessThreshold,
         timeout := Timeout,
         window_size := WindowSize,
         failure_rate_threshold := Rate,
         probe_limit := ProbeLimit
        }) ->
    {min(FailureThreshold, ?MAX_COUNT), min(SuccessThreshold, ?MAX_COUNT), Timeout, WindowSize, float(Rate), ProbeLimit}.


%%% Named breakers: calls


%% @doc Runs a fun in the calling process, if the breaker allows it.
%%
%% Returns the result of the fun; `{error, {exception, Class, Reason}}' if it raises an exception;
%% `{error, circuit_breaker_open}' if the call is refused. `{error, _}' and exceptions are failures; every
%% other result is a success.
-spec call(breaker(), fun(() -> Result)) ->
          Result | {error, circuit_breaker_open | {exception, error | exit | throw, term()}}.
call(Breaker, Fun) when is_function(Fun, 0) ->
    case erlmcp_nif:named_breaker_enter(Breaker, ?SLOT_MS) of
        Call when is_integer(Call) ->
            run(Call, Fun);
        Entered ->
            case entered(Entered, Breaker, ?SLOT_MS) of
                refused -> {error, circuit_breaker_open};
                Call -> run(Call, Fun)
            end
    end.


%% @doc As {@link call/2}, with a timeout in milliseconds.
%%
%% On a timeout the caller exits with `{timeout, _}'; at that moment the call counts as a failure, and its
%% slot is free. The fun runs in a process of its own, which is killed on a timeout and when the caller exits. With
%% `infinity' it runs in the caller.
-spec call(breaker(), fun(() -> Result), timeout()) ->
          Result | {error, circuit_breaker_open | {exception, error | exit | throw, term()}}.
call(Breaker, Fun, Timeout) when is_function(Fun, 0), ?IS_TIMEOUT(Timeout) ->
    case entered(erlmcp_nif:named_breaker_enter(Breaker, Timeout), Breaker, Timeout) of
        refused -> {error, circuit_breaker_open};
        Call when Timeout =:= infinity -> run(Call, Fun);
        Call -> run_within(Timeout, Call, Breaker, Fun)
    end.


%% @doc As {@link call/2}, but returns the result of `Fallback' instead of `{error, circuit_breaker_open}'.
%%
%% No other failure runs the fallback. The fallback is not protected: it counts nowhere, and its exceptions
%% are raised in the caller.
-spec call_with_fallback(breaker(), fun(() -> Result), fun(() -> Other)) ->
          Result | Other | {error, {exception, error | exit | throw, term()}}.
call_with_fallback(Breaker, Fun, Fallback) when is_function(Fallback, 0) ->
    case call(Breaker, Fun) of
        {error, circuit_breaker_open} -> Fallback();
        Result -> Result
    end.


%% @doc As {@link call/3}, with a fallback as in {@link call_with_fallback/3}. The fallback has no time limit.
-spec call_with_fallback(breaker(), fun(() -> Result), fun(() -> Other), timeout()) ->
          Result | Other | {error, {exception, error | exit | throw, term()}}.
call_with_fallback(Breaker, Fun, Fallback, Timeout) when is_function(Fallback, 0) ->
    case call(Breaker, Fun, Timeout) of
        {error, circuit_breaker_open} -> Fallback();
        Result -> Result
    end.


%% The answer of a breaker. Logs its transitions.
-spec entered(Answer, breaker(), timeout()) -> call_id() | refused
              when Answer :: erlmcp_nif:entered() | undefined.
entered(undefined, Breaker, Limit) ->
    case erlmcp_nif:load_error() =/= none andalso erlmcp_circuit_breaker_pure:enter(Breaker, Limit) of
        false -> unknown(Breaker, call);
        undefined -> unknown(Breaker, call);
        {Answer, Transitions} ->
            log_transitions(Transitions),
            Answer;
        Answer -> Answer
    end;
entered({Answer, Transitions}, _Breaker, _Limit) ->
    log_transitions(Transitions),
    Answer;
entered(Answer, _Breaker, _Limit) ->
    Answer.


-spec run(call_id(), fun(() -> term())) -> term().
run(Call, Fun) ->
    try Fun() of
        {error, _} = Failure ->
            leave(Call, failure),
            Failure;
        Success ->
            leave(Call, success),
            Success
    catch
        Class:Reason ->
            leave(Call, failure),
            ?EXCEPTION(Class, Reason)
    end.


-spec leave(call_id(), success | failure) -> ok.
leave(Call, Outcome) when is_integer(Call) ->
    case erlmcp_nif:named_breaker_leave(Call, Outcome) of
        ok -> ok;
        Transitions -> log_transitions(Transitions)
    end;
leave(Call, Outcome) ->
    case erlmcp_circuit_breaker_pure:leave(Call, Outcome) of
        ok -> ok;
        Transitions -> log_transitions(Transitions)
    end.


%% The worker returns its result as its exit reason, so that a single message has all outcomes.
-spec run_within(non_neg_integer(), call_id(), breaker(), fun(() -> term())) -> term().
run_within(Timeout, Call, Breaker, Fun) ->
    Caller = self(),
    Tag = make_ref(),
    {Worker, Monitor} = spawn_monitor(?MODULE, work, [Caller, Tag, Fun]),
    receive
        {'DOWN', Monitor, process, Worker, {Tag, {error, _} = Failure}} ->
            leave(Call, failure),
            Failure;
        {'DOWN', Monitor, process, Worker, {Tag, Success}} ->
            leave(Call, success),
            Success;
        {'DOWN', Monitor, process, Worker, Reason} ->
            leave(Call, failure),
            ?EXCEPTION(exit, Reason)
    after
        Timeout ->
            true = exit(Worker, kill),
            true = demonitor(Monitor, [flush]),
            leave(Call, failure),
            exit({timeout, {?MODULE, call, [Breaker, Fun, Timeout]}})
    end.


%% @private
%% The process of a bounded call.
-spec work(pid(), reference(), fun(() -> term())) -> no_return().
work(Caller, Tag, Fun) ->
    kill_with(Caller),
    exit({Tag, result(Fun)}).


-spec result(fun(() -> term())) -> term().
result(Fun) ->
    try
        Fun()
    catch
        Class:Reason -> ?EXCEPTION(Class, Reason)
    end.


%% Kills the calling process when `Caller' exits. A link would kill the caller with the fun.
-spec kill_with(pid()) -> ok.
kill_with(Caller) ->
    Worker = self(),
    _ = spawn(fun() ->
                      _ = monitor(process, Worker),
                      _ = monitor(process, Caller),
                      receive {'DOWN', _, process, _, _} -> exit(Worker, kill) end
              end),
    ok.


%%% Named breakers: operation


%% @doc The state of a breaker.
-spec get_state(breaker()) -> state().
get_state(Breaker) ->
    case in_store(fun() -> erlmcp_nif:named_breaker_state(Breaker) end,
                  fun() -> erlmcp_circuit_breaker_pure:state(Breaker) end) of
        {State, Transitions} ->
            log_transitions(Transitions),
            State;
        undefined ->
            unknown(Breaker, get_state)
    end.


%% @doc The statistics of a breaker.
%%
%% A map of `name', `state', `consecutive_failures', `consecutive_successes', `total_calls' (the sum
%% of the next three), `total_successes', `total_failures', `total_rejected', `failure_rate' (of the
%% window, also if it is not full), `success_rate' (of all calls), `last_failure_time' (or
%% `undefined') and `last_state_change' (both in milliseconds of {@link erlang:monotonic_time/1}),
%% and the options: each under its key, and all as `config'. For readers of erlmcp's map,
%% `priority_messages_delivered' and `priority_latency_us' are 0.
-spec get_stats(breaker()) -> {ok, map()}.
get_stats(Breaker) ->
    case in_store(fun() -> erlmcp_nif:named_breaker_stats(Breaker) end,
                  fun() -> erlmcp_circuit_breaker_pure:stats(Breaker) end) of
        {Stats, Transitions} ->
            log_transitions(Transitions),
            {ok, with_derived(Stats)};
        undefined ->
            unknown(Breaker, get_stats)
    end.


-spec with_derived(map()) -> map().
with_derived(#{
               config := Options,
               total_successes := Successes,
               total_failures := Failures,
               total_rejected := Rejected
              } = Stats) ->
    Calls = Successes + Failures + Rejected,
    maps:merge(Options,
               Stats#{
                 total_calls => Calls,
                 success_rate => Successes / max(Calls, 1),
                 priority_messages_delivered => 0,
                 priority_latency_us => 0
                }).


%% @doc Closes a breaker and resets everything but the totals.
%%
%% Also if it is closed already: calls that are running no longer count.
-spec reset(breaker()) -> ok.
reset(Breaker) ->
    force(Breaker, reset).


%% @doc As {@link force_open/1}. The reason is ignored, as it is in erlmcp.
-spec open(breaker(), Reason :: term()) -> ok.
open(Breaker, _Reason) ->
    force_open(Breaker).


%% @doc Opens a breaker, for the time of its `timeout'. An open breaker stays as it is.
-spec force_open(breaker()) -> ok.
force_open(Breaker) ->
    force(Breaker, open).


%% @doc Makes an open breaker half open. In any other state it stays as it is.
-spec force_half_open(breaker()) -> ok.
force_half_open(Breaker) ->
    force(Breaker, half_open).


%% @doc Closes a breaker. A closed breaker stays as it is.
-spec force_close(breaker()) -> ok.
force_close(Breaker) ->
    force(Breaker, closed).


-spec force(breaker(), reset | state()) -> ok.
force(Breaker, State) ->
    case in_store(fun() -> erlmcp_nif:named_breaker_force(Breaker, State) end,
                  fun() -> erlmcp_circuit_breaker_pure:force(Breaker, State) end) of
        undefined -> unknown(Breaker, request(State));
        Transitions -> log_transitions(Transitions)
    end.


%% The function that was called.
-spec request(reset | state()) -> atom().
request(reset) -> reset;
request(open) -> force_open;
request(half_open) -> force_half_open;
request(closed) -> force_close.


%% @doc The states of all named breakers of this node.
-spec get_all_states() -> #{name() => state()}.
get_all_states() ->
    for_all(fun get_state/1).


%% @private
%% How many named breakers are in each state, unless there are more than `Max'.
-spec count_states(Max :: pos_integer()) -> #{state() := non_neg_integer()} | too_many.
count_states(Max) ->
    case length(names()) =< Max of
        true ->
            maps:fold(fun(_Name, State, Counts) -> maps:update_with(State, fun(Count) -> Count + 1 end, Counts) end,
                      #{closed => 0, open => 0, half_open => 0},
                      get_all_states());
        false ->
            too_many
    end.


%% @doc The statistics of all named breakers of this node.
-spec get_all_stats() -> #{name() => map()}.
get_all_stats() ->
    for_all(fun(Name) ->
                    {ok, Stats} = get_stats(Name),
                    Stats
            end).


%% @doc Resets all named breakers of this node.
-spec reset_all() -> ok.
reset_all() ->
    _ = for_all(fun reset/1),
    ok.


%% Breakers that are removed meanwhile are left out.
-spec for_all(fun((name()) -> Result)) -> #{name() => Result}.
for_all(Fun) ->
    lists:foldl(fun(Name, Results) ->
                        try
                            Results#{Name => Fun(Name)}
                        catch
                            exit:{noproc, _} -> Results
                        end
                end,
                #{},
                names()).


-spec names() -> [name()].
names() ->
    in_store(fun erlmcp_nif:named_breakers/0, fun erlmcp_circuit_breaker_pure:names/0).


-spec log_transitions([erlmcp_nif:transition()]) -> ok.
log_transitions(Transitions) ->
    lists:foreach(fun({Name, State}) -> log_transition({name, Name}, State) end, Transitions).


%% @private
%% Logs the state that a breaker has just entered.
-spec log_transition(node | {name, name()} | {target, erlmcp_target_breaker:target()}, state()) -> ok.
log_transition(Breaker, open) -> erlmcp_native_log:log(warning, circuit_opened, #{breaker => Breaker});
log_transition(Breaker, closed) -> erlmcp_native_log:log(notice, circuit_closed, #{breaker => Breaker});
log_transition(Breaker, half_open) -> erlmcp_native_log:log(notice, circuit_half_open, #{breaker => Breaker}).


%%% The node's breaker: the process and its metrics


%% @doc Starts the process of the local name `erlmcp_circuit_breaker', with empty metrics.
%%
%% Returns `{error, {already_started, Pid}}' if there is one. The breaker itself stays as it is.
-spec start_link() -> gen_server:start_ret().
start_link() ->
    erlmcp_circuit_breaker_metrics:start_link().


%% @doc Stops that process; exits with `{noproc, _}' if there is none. The breaker stays as it is.
-spec stop() -> ok.
stop() ->
    erlmcp_circuit_breaker_metrics:stop().


%% @doc Counts a request and its latency in the metrics. The id is ignored.
-spec record_request(Id :: term(), LatencyMs :: number()) -> ok.
record_request(_Id, LatencyMs) when is_number(LatencyMs) ->
    erlmcp_circuit_breaker_metrics:request(LatencyMs).


%% @doc Counts an error in the metrics, and as one failure of the breaker. The id is ignored.
-spec record_error(Id :: term()) -> ok.
record_error(_Id) ->
    ok = erlmcp_circuit_breaker_metrics:error(),
    record_failure().


%% @doc The metrics since the process started or since {@link reset/0}.
%%
%% A map with `total_requests', `total_errors', `error_rate_percent', `average_latency_ms' and
%% `p95_latency_ms' (at most an eighth too high), and `breaker' with the native counters. For readers
%% of erlmcp's map: `requests_in_window' and `errors_in_window' are the totals, `last_update' is now
%% (system time, ms), `cpu_usage_percent' and `memory_usage_percent' are 0.0 (not measured, as in erlmcp).
%% Exits with `{noproc, _}' if the process does not run.
-spec get_metrics() -> {ok, map()}.
get_metrics() ->
    Metrics = erlmcp_circuit_breaker_metrics:read(),
    {ok, Metrics#{breaker => node_stats()}}.


%%% The node's breaker


%% @doc One of the three states that erlmcp has: a breaker that is off is `closed' here.
-spec get_status() -> {ok, state()}.
get_status() ->
    case get_state() of
        off -> {ok, closed};
        State -> {ok, State}
    end.


%% @doc The state; `off' if it is switched off, or the native library is not loaded.
-spec get_state() -> node_state().
get_state() ->
    ?UNLESS_LOADED(erlmcp_nif:breaker_state(), off).


%% @doc Whether the state is `open'; half open is not.
-spec is_open() -> boolean().
is_open() ->
    get_state() =:= open.


%% @doc Whether a request may be made.
%%
%% If so, and the breaker is half open, the request is a probe, and its outcome must be reported by
%% {@link record_success/0} or {@link record_failure/0}.
-spec allow_test_request() -> boolean().
allow_test_request() ->
    case ?UNLESS_LOADED(erlmcp_nif:breaker_allow(), allowed) of
        allowed ->
            true;
        {allowed, State} ->
            ok = log_transition(node, State),
            true;
        refused ->
            false
    end.


%% @doc Whether a request may be made, for callers that report no outcome: takes no probe.
-spec can_execute() -> boolean().
can_execute() ->
    ?UNLESS_LOADED(erlmcp_nif:breaker_would_allow(), true).


%% @doc Records a success.
-spec record_success() -> ok.
record_success() ->
    log_if_changed(?UNLESS_LOADED(erlmcp_nif:breaker_success(), none)).


%% @doc Records a failure.
-spec record_failure() -> ok.
record_failure() ->
    log_if_changed(?UNLESS_LOADED(erlmcp_nif:breaker_failure(), none)).


%% @doc Does nothing: a retry is neither a success nor a failure.
-spec record_retry_attempt() -> ok.
record_retry_attempt() ->
    ok.


%% @doc Closes the breaker and resets the metrics.
-spec reset() -> ok.
reset() ->
    ok = erlmcp_circuit_breaker_metrics:clear(),
    force_node(closed).


%% @doc Opens the breaker, for its `timeout_ms'.
-spec force_open() -> ok.
force_open() ->
    force_node(open).


%% @doc Closes the breaker.
-spec force_close() -> ok.
force_close() ->
    force_node(closed).


-spec force_node(closed | open) -> ok.
force_node(State) ->
    log_if_changed(?UNLESS_LOADED(erlmcp_nif:breaker_set(State), none)).


%% @private
%% The native counters.
-spec node_stats() -> map().
node_stats() ->
    ?UNLESS_LOADED(erlmcp_nif:breaker_stats(), #{state => off}).


%% The caller that makes a transition of the native state gets it as the result of its call.
-spec log_if_changed(none | state()) -> ok.
log_if_changed(none) -> ok;
log_if_changed(State) -> log_transition(node, State).
