%%% @doc Health of the node: what is not as it should be, now.
%%%
%%% {@link check/0} looks at everything in the calling process, so it tells the truth also while the
%%% control plane is dead. Only what needs a window of time, the run queue and the use of the
%%% schedulers, comes from a monitor process, and its absence is a reason itself.
%%%
%%% == Reasons ==
%%% <table border="1">
%%% <tr><th>reason</th><th>meaning</th></tr>
%%% <tr><td>`{application, stopped}'</td><td>messages are routed, and nobody samples the shards: every one admits
%%% everything</td></tr>
%%% <tr><td>`{native_library, LoadError}'</td><td>it is not loaded; says why, and what to do</td></tr>
%%% <tr><td>`{shard_managers_down, [ShardId]}'</td><td>no process samples these shards</td></tr>
%%% <tr><td>`{stale_samples, [ShardId]}'</td><td>something was admitted since the last sample, and that is
%%% older than ten intervals: these shards admit everything. A shard where nothing happens needs no
%%% samples</td></tr>
%%% <tr><td>`{circuit, open}'</td><td>the node's circuit breaker refuses all messages. Half open it is no
%%% reason: it waits for messages to try, and a node that gets none because it is degraded would stay
%%% so</td></tr>
%%% <tr><td>`{overloaded_shards, [ShardId]}'</td><td>these shards have refused messages, and not recovered
%%% since</td></tr>
%%% <tr><td>`{queue_depths, [{ShardId, Depth, Threshold}]}'</td><td>shards that are nearly full
%%% (`queue_depth_percent')</td></tr>
%%% <tr><td>`{run_queue, Length, Limit}'</td><td>processes wait for a scheduler: the median of the last
%%% five seconds, so that a spike is no reason (`run_queue_per_scheduler')</td></tr>
%%% <tr><td>`{scheduler_use_percent, Used, Limit}'</td><td>the mean of the last five seconds</td></tr>
%%% <tr><td>`{memory_bytes, Used, Limit}'</td><td>the resident memory of the VM</td></tr>
%%% <tr><td>`{control_plane_down, [Name]}'</td><td>these processes are not there, or have done nothing for
%%% five seconds</td></tr>
%%% <tr><td>`{shard_damaged, [ShardId]}'</td><td>entries and counts do not agree; see {@link
%%% erlmcp_shard_recovery}</td></tr>
%%% </table>
%%%
%%% == Limits ==
%%% The key `health' of the application's configuration, read with each check: `queue_depth_percent'
%%% (80), `run_queue_per_scheduler' (100), `scheduler_use_percent' (95) and `memory_bytes' (`machine':
%%% 90 % of the machine's memory, or of the control group's if that is less). All but the first can be
%%% `infinity'. {@link set_limits/1} changes them in a running system.
%%%
%%% == Logs ==
%%% The monitor logs when the node has been degraded for three seconds, and when it has been well for as
%%% long: one line each, with `event' `health_degraded' or `health_ok'. A monitor that was restarted knows
%%% what the one before has logged.
-module(erlmcp_shard_health).

-behaviour(gen_server).

-include_lib("kernel/include/logger.hrl").

-export([check/0, set_limits/1]).
%% Process
-export([new/0]).
-export([start_link/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([health/0, reason/0, limits/0]).

-type shard_id() :: erlmcp_admission_control:shard_id().
-type health() :: ok | {degraded, [reason(), ...]}.
-type reason() :: {application, stopped} |
                  {native_library, erlmcp_nif:load_error()} |
                  {shard_managers_down, [shard_id(), ...]} |
                  {stale_samples, [shard_id(), ...]} |
                  {circuit, open} |
                  {overloaded_shards, [shard_id(), ...]} |
                  {queue_depths, [{shard_id(), Depth :: pos_integer(), Threshold :: pos_integer()}, ...]} |
                  {run_queue, Length :: pos_integer(), Limit :: pos_integer()} |
                  {scheduler_use_percent, Used :: pos_integer(), Limit :: pos_integer()} |
                  {memory_bytes, Used :: pos_integer(), Limit :: pos_integer()} |
                  {control_plane_down, [Name :: atom(), ...]} |
                  {shard_damaged, [shard_id(), ...]}.
-type limits() :: #{
                    queue_depth_percent => 1..100,
                    run_queue_per_scheduler => pos_integer() | infinity,
                    scheduler_use_percent => 1..100 | infinity,
                    memory_bytes => pos_integer() | machine | infinity
                   }.

-define(INTERVAL_MS, 1_000).
%% Seconds that run queue and use of the schedulers are looked at.
-define(WINDOW, 5).
%% Checks in a row that agree before a line is logged.
-define(LOGGED_AFTER,  3).
-define(SILENT_MS,     5_000).
-define(CONTROL_PLANE, [erlmcp_control_plane_sup, erlmcp_shard_health, erlmcp_shard_metrics, erlmcp_shard_recovery]).

-record(state, {
          %% The latest first.
          run_queues = [] :: [non_neg_integer()],
          uses = [] :: [scheduler_use()],
          %% How many checks in a row have found otherwise than what was logged last.
          otherwise = 0 :: non_neg_integer()
         }).

%% Time that the normal schedulers which are online have worked, and all that they had.
-type scheduler_use() :: {Schedulers :: pos_integer(), Active :: non_neg_integer(), Total :: non_neg_integer()}.


%% @doc Looks at everything that health consists of. Takes some hundred microseconds, in the calling
%% process.
-spec check() -> health().
check() ->
    #{memory_bytes := MemoryLimit} = Limits = limits(),
    Reasons =
        case erlmcp_native_registry:load_error() of
            none -> native_reasons(Limits) ++ process_reasons(Limits);
            LoadError -> [{native_library, LoadError}]
        end ++ memory_reasons(MemoryLimit),
    case Reasons of
        [] -> ok;
        _ -> {degraded, Reasons}
    end.


%% @doc Changes the limits, in the application environment. What is not given has its default. A check
%% from now on uses them.
-spec set_limits(limits()) -> ok | {error, erlmcp_native_config:error()}.
set_limits(Limits) ->
    case erlmcp_native_config:health(Limits) of
        {ok, _Completed} -> application:set_env(erlmcp_native, health, Limits);
        Error -> Error
    end.


%% The environment may have been changed by others: wrong limits are none.
-spec limits() -> map().
limits() ->
    case erlmcp_native_config:health(application:get_env(erlmcp_native, health, #{})) of
        {ok, Limits} -> Limits;
        {error, _} -> erlmcp_native_config:default(health)
    end.


%%% Reasons


-spec native_reasons(map()) -> [reason()].
native_reasons(#{queue_depth_percent := Percent}) ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Ids = lists:seq(0, Shards - 1),
    Loads = [ {Shard, erlmcp_admission_control:load(Shard)} || Shard <- Ids ],
    some(stale_samples, unwatched(Ids)) ++
    [ {circuit, open} || erlmcp_circuit_breaker_node:state() =:= open ] ++
    some(overloaded_shards, [ Shard || {Shard, {_Depth, _Threshold, true}} <- Loads ]) ++
    some(queue_depths,
         [ {Shard, Depth, Threshold}
           || {Shard, {Depth, Threshold, _IsOverloaded}} <- Loads,
              is_integer(Threshold),
              Depth > 0,
              Depth * 100 >= Threshold * Percent ]) ++
    some(shard_damaged, erlmcp_shard_recovery_records:damaged()).


-spec unwatched([shard_id()]) -> [shard_id()].
unwatched(Shards) ->
    [ Shard || Shard <- Shards, erlmcp_admission_control:is_unwatched(Shard) ].


-spec process_reasons(map()) -> [reason()].
process_reasons(Limits) ->
    case whereis(erlmcp_native_sup) of
        undefined ->
            [{application, stopped}];
        _Pid ->
            some(shard_managers_down, managers_down()) ++
            some(control_plane_down, control_plane_down()) ++
            window_reasons(Limits)
    end.


-spec some(Reason :: atom(), [term()]) -> [reason()].
some(_Reason, []) -> [];
some(Reason, List) -> [{Reason, List}].


-spec managers_down() -> [shard_id()].
managers_down() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    [ Shard || Shard <- lists:seq(0, Shards - 1), whereis(erlmcp_backpressure:sampler(Shard)) =:= undefined ].


-spec control_plane_down() -> [atom()].
control_plane_down() ->
    [ Name || Name <- ?CONTROL_PLANE, whereis(Name) =:= undefined orelse is_silent(Name) ].


-spec is_silent(atom()) -> boolean().
is_silent(?MODULE) ->
    %% It has a window from its start on.
    window() =:= none;
is_silent(erlmcp_shard_recovery) ->
    case erlmcp_shard_recovery_records:alive_us() of
        none -> false;
        AliveUs -> now_ms() - AliveUs div 1000 > ?SILENT_MS
    end;
is_silent(erlmcp_shard_metrics) ->
    case erlmcp_shard_metrics:age_ms() of
        none -> false;
        AgeMs -> AgeMs > ?SILENT_MS
    end;
is_silent(_Supervisor) ->
    false.


-spec window_reasons(map()) -> [reason()].
window_reasons(#{run_queue_per_scheduler := PerScheduler, scheduler_use_percent := UseLimit}) ->
    case window() of
        {RunQueue, UsePercent} ->
            QueueLimit =
                case PerScheduler of
                    infinity -> infinity;
                    _ -> PerScheduler * erlang:system_info(schedulers_online)
                end,
            above(run_queue, RunQueue, QueueLimit) ++ above(scheduler_use_percent, UsePercent, UseLimit);
        none ->
            []
    end.


-spec memory_reasons(pos_integer() | machine | infinity) -> [reason()].
memory_reasons(infinity) -> [];
memory_reasons(machine) -> memory_reasons(erlmcp_node_memory:limit_bytes());
memory_reasons(Limit) -> above(memory_bytes, erlmcp_node_memory:used_bytes(), Limit).


%% A limit is what is still well; no number is greater than an atom.
-spec above(run_queue | scheduler_use_percent | memory_bytes, non_neg_integer(), pos_integer() | infinity) ->
          [reason()].
above(Reason, Value, Limit) when Value > Limit -> [{Reason, Value, Limit}];
above(_Reason, _Value, _Limit) -> [].


%%% Process


%% @private
%% Makes the table of what the process measures and has logged; it goes with the calling process, and
%% so outlives the one that writes it.
-spec new() -> ok.
new() ->
    _ = ets:new(?MODULE, [named_table, public, {read_concurrency, true}]),
    ok.


%% @private
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @private
-spec init([]) -> {ok, #state{}}.
init([]) ->
    %% What it measures is a node that is too busy to run it.
    _ = process_flag(priority, high),
    %% Until this process ends.
    _ = erlang:system_flag(scheduler_wall_time, true),
    ok = set_window(0, 0),
    ok = start_timer(),
    {ok, #state{uses = [scheduler_use()]}}.


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) -> {reply, {error, unknown_request}, #state{}}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Cast, State) ->
    {noreply, State}.


%% @private
-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info(measure, State) ->
    ok = start_timer(),
    Measured = measure(State),
    Checked = log_change(check(), Measured),
    ok = ask_for_samples(),
    {noreply, Checked};
handle_info(_Unknown, State) ->
    {noreply, State}.


%% @private
-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, _State) ->
    ok.


-spec start_timer() -> ok.
start_timer() ->
    _ = erlang:send_after(?INTERVAL_MS, self(), measure),
    ok.


-spec measure(#state{}) -> #state{}.
measure(#state{run_queues = RunQueues0, uses = Uses0} = State) ->
    RunQueues = lists:sublist([erlang:statistics(total_run_queue_lengths) | RunQueues0], ?WINDOW),
    %% One more, for as many intervals. Those with other schedulers do not compare.
    {Schedulers, _, _} = Use = scheduler_use(),
    Comparable = lists:takewhile(fun({Online, _, _}) -> Online =:= Schedulers end, Uses0),
    Uses = lists:sublist([Use | Comparable], ?WINDOW + 1),
    Median = lists:nth((length(RunQueues) + 1) div 2, lists:sort(RunQueues)),
    ok = set_window(Median, use_percent(hd(Uses), lists:last(Uses))),
    State#state{run_queues = RunQueues, uses = Uses}.


%% Whoever was to ask for a sample may have ended before it did so, and where nobody sends any more
%% nobody else asks.
-spec ask_for_samples() -> ok.
ask_for_samples() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    erlmcp_backpressure:notify([ {sample, Shard} || Shard <- unwatched(lists:seq(0, Shards - 1)) ]).


-spec scheduler_use() -> scheduler_use().
scheduler_use() ->
    %% Those of normal schedulers have the lowest numbers, and of these the ones that are online.
    Online = erlang:system_info(schedulers_online),
    Used = [ {Active, Total} || {Id, Active, Total} <- erlang:statistics(scheduler_wall_time), Id =< Online ],
    {Actives, Totals} = lists:unzip(Used),
    {Online, lists:sum(Actives), lists:sum(Totals)}.


-spec use_percent(scheduler_use(), scheduler_use()) -> non_neg_integer().
use_percent({_, Active, Total}, {_, ActiveBefore, TotalBefore}) ->
    round((Active - ActiveBefore) * 100 / max(1, Total - TotalBefore)).


-spec set_window(RunQueue :: non_neg_integer(), UsePercent :: non_neg_integer()) -> ok.
set_window(RunQueue, UsePercent) ->
    true = ets:insert(?MODULE, {window, now_ms(), RunQueue, UsePercent}),
    ok.


%% `none' if nothing was measured for so long that it says nothing of now.
-spec window() -> {RunQueue :: non_neg_integer(), UsePercent :: non_neg_integer()} | none.
window() ->
    try ets:lookup(?MODULE, window) of
        [{window, AtMs, RunQueue, UsePercent}] ->
            case now_ms() - AtMs > ?SILENT_MS of
                true -> none;
                false -> {RunQueue, UsePercent}
            end;
        [] ->
            none
    catch
        error:badarg -> none
    end.


%%% Logs


-spec log_change(health(), #state{}) -> #state{}.
log_change(Health, #state{otherwise = Otherwise} = State) ->
    Logged = logged(),
    case condition(Health) of
        Logged ->
            State#state{otherwise = 0};
        Condition when Otherwise + 1 >= ?LOGGED_AFTER ->
            true = ets:insert(?MODULE, {logged, Condition}),
            ok = log(Health),
            State#state{otherwise = 0};
        _Condition ->
            State#state{otherwise = Otherwise + 1}
    end.


%% What was logged last, by this process or the one before.
-spec logged() -> ok | degraded.
logged() ->
    case ets:lookup(?MODULE, logged) of
        [{logged, Condition}] -> Condition;
        [] -> ok
    end.


-spec condition(health()) -> ok | degraded.
condition(ok) -> ok;
condition({degraded, _Reasons}) -> degraded.


-spec log(health()) -> ok.
log(ok) ->
    ?LOG_NOTICE("erlmcp_native: health is ok again", [], #{domain => [erlmcp_native], event => health_ok});
log({degraded, Reasons}) ->
    ?LOG_WARNING("erlmcp_native: health is degraded: ~tP",
                 [Reasons, 100],
                 #{domain => [erlmcp_native], event => health_degraded}).


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).
