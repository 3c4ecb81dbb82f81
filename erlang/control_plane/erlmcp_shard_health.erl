%%% @doc Health of the node: all that is wrong with it now.
%%%
%%% {@link check/0} checks everything in the calling process, so its result is right also while the
%%% control plane is dead. Only what needs a window of time, the run queue and the use of the
%%% schedulers, comes from a monitor process, and the absence of this process is a reason itself.
%%%
%%% == Reasons ==
%%% <table border="1">
%%% <tr><th>reason</th><th>meaning</th></tr>
%%% <tr><td>`{application, stopped}'</td><td>messages are routed, but no process samples the shards: every shard
%%% admits everything</td></tr>
%%% <tr><td>`{native_library, LoadError}'</td><td>the library is not loaded; has the cause and the remedy</td></tr>
%%% <tr><td>`{shard_managers_down, [ShardId]}'</td><td>no process samples these shards</td></tr>
%%% <tr><td>`{stale_samples, [ShardId]}'</td><td>messages were admitted since the last sample, and that sample is
%%% older than ten intervals: these shards admit everything. A shard without traffic needs no
%%% samples</td></tr>
%%% <tr><td>`{circuit, open}'</td><td>the node's circuit breaker refuses all messages. The half-open state is not a
%%% reason: it waits for messages to try, and a node that gets none because it is degraded would stay
%%% so</td></tr>
%%% <tr><td>`{overloaded_shards, [ShardId]}'</td><td>these shards have refused messages, and have not recovered
%%% since</td></tr>
%%% <tr><td>`{queue_depths, [{ShardId, Depth, Threshold}]}'</td><td>shards that are nearly full
%%% (`queue_depth_percent')</td></tr>
%%% <tr><td>`{run_queue, Length, Limit}'</td><td>processes wait for a scheduler: the median of the last
%%% five seconds, so that a spike is no reason (`run_queue_per_scheduler')</td></tr>
%%% <tr><td>`{scheduler_use_percent, Used, Limit}'</td><td>the mean of the last five seconds</td></tr>
%%% <tr><td>`{memory_bytes, Used, Limit}'</td><td>the resident memory of the VM</td></tr>
%%% <tr><td>`{control_plane_down, [Name]}'</td><td>these processes do not run, or, of the control plane, have done
%%% nothing for five seconds. If all of a supervisor are named for longer than a moment, one of them has crashed repeatedly, and the
%%% supervisor was given up: of the control plane, of {@link erlmcp_connection_events}, or of {@link erlmcp_capability_store}</td></tr>
%%% </table>
%%%
%%% == Limits ==
%%% The key `health' of the configuration: `queue_depth_percent'
%%% (80), `run_queue_per_scheduler' (100), `scheduler_use_percent' (95) and `memory_bytes' (`machine':
%%% 90 % of the machine's memory, or of the control group's if that is less). All but the first can be
%%% `infinity'. {@link erlmcp_native:set/2} changes them in a running system.
%%%
%%% == Logs ==
%%% The monitor process logs when the node has been degraded for three seconds, and when it has been healthy for
%%% three seconds: one line each, with `event' `health_degraded' or `health_ok'. A restarted monitor process knows
%%% what its predecessor has logged.
-module(erlmcp_shard_health).

-behaviour(gen_server).

-export([check/0]).
%% Memory of the node
-export([memory_used_bytes/0, memory_limit_bytes/0, memory_limit_bytes/1]).
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
                  {control_plane_down, [Name :: atom(), ...]}.
-type limits() :: #{
                    queue_depth_percent => 1..100,
                    run_queue_per_scheduler => pos_integer() | infinity,
                    scheduler_use_percent => 1..100 | infinity,
                    memory_bytes => pos_integer() | machine | infinity
                   }.
-type memory_limit() :: pos_integer() | infinity.

-define(INTERVAL_MS, 1_000).
%% The share of the machine's memory that one node may use.
-define(MEMORY_PERCENT, 90).
%% The seconds over which run queue and use of the schedulers are measured.
-define(WINDOW, 5).
%% Checks in a row that agree before a line is logged.
-define(LOGGED_AFTER, 3).
-define(SILENT_MS,    5_000).
-define(PROCESSES,    [erlmcp_control_plane_sup,
                       erlmcp_shard_health,
                       erlmcp_shard_metrics,
                       erlmcp_shard_recovery,
                       erlmcp_connection_events_sup,
                       erlmcp_connection_events,
                       erlmcp_capability_store_sup,
                       erlmcp_capability_store]).

-record(state, {
          %% The latest first.
          run_queues = [] :: [non_neg_integer()],
          uses = [] :: [scheduler_use()],
          %% How many checks in a row had another result than the one that was logged last.
          otherwise = 0 :: non_neg_integer()
         }).

%% The time that the online normal schedulers have worked, and their total time.
-type scheduler_use() :: {Schedulers :: pos_integer(), Active :: non_neg_integer(), Total :: non_neg_integer()}.


%% @doc Checks everything that health consists of. Takes some hundred microseconds, in the calling
%% process.
-spec check() -> health().
check() ->
    #{memory_bytes := MemoryLimit} = Limits = erlmcp_native_config:health(),
    Reasons =
        case erlmcp_registry_native:load_error() of
            none -> native_reasons(Limits) ++ process_reasons(Limits);
            LoadError -> [{native_library, LoadError}]
        end ++ memory_reasons(MemoryLimit),
    case Reasons of
        [] -> ok;
        _ -> {degraded, Reasons}
    end.


%%% Reasons


-spec native_reasons(map()) -> [reason()].
native_reasons(#{queue_depth_percent := Percent}) ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Ids = lists:seq(0, Shards - 1),
    Loads = [ {Shard, erlmcp_admission_control:load(Shard)} || Shard <- Ids ],
    some(stale_samples, unwatched(Ids)) ++
    [ {circuit, open} || erlmcp_circuit_breaker:get_state() =:= open ] ++
    some(overloaded_shards, [ Shard || {Shard, {_Depth, _Threshold, true}} <- Loads ]) ++
    some(queue_depths,
         [ {Shard, Depth, Threshold}
           || {Shard, {Depth, Threshold, _IsOverloaded}} <- Loads,
              is_integer(Threshold),
              Depth > 0,
              Depth * 100 >= Threshold * Percent ]).


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
    [ Shard || Shard <- lists:seq(0, Shards - 1), whereis(erlmcp_shard_sampler:name(Shard)) =:= undefined ].


-spec control_plane_down() -> [atom()].
control_plane_down() ->
    [ Name || Name <- ?PROCESSES, whereis(Name) =:= undefined orelse is_silent(Name) ].


-spec is_silent(atom()) -> boolean().
is_silent(?MODULE) ->
    %% The process writes its window first when it starts.
    window() =:= none;
is_silent(erlmcp_shard_recovery) ->
    erlmcp_shard_recovery:silent_ms() > ?SILENT_MS;
is_silent(erlmcp_shard_metrics) ->
    case erlmcp_shard_metrics:age_ms() of
        none -> false;
        AgeMs -> AgeMs > ?SILENT_MS
    end;
is_silent(_Other) ->
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
memory_reasons(machine) -> memory_reasons(memory_limit_bytes());
memory_reasons(Limit) -> above(memory_bytes, memory_used_bytes(), Limit).


%% A limit is the last healthy value; no number is greater than an atom.
-spec above(run_queue | scheduler_use_percent | memory_bytes, non_neg_integer(), pos_integer() | infinity) ->
          [reason()].
above(Reason, Value, Limit) when Value > Limit -> [{Reason, Value, Limit}];
above(_Reason, _Value, _Limit) -> [].


%%% Memory
%%%
%%% The memory of the operating system's process, since this is what a machine or a container runs out of, and
%%% registrations live in memory that `erlang:memory/0' does not count.


%% @private
%% The resident memory; where the operating system does not report it, the memory that the VM has allocated.
-spec memory_used_bytes() -> pos_integer().
memory_used_bytes() ->
    case numbers("/proc/self/status", "^VmRSS:\\s+(\\d+) kB") of
        [Kilobytes] -> Kilobytes * 1024;
        [] -> erlang:memory(total)
    end.


%% @private
%% 90 % of the machine's memory or of what the control group of this node may use, whichever is
%% less; `infinity' where neither can be read.
-spec memory_limit_bytes() -> memory_limit().
memory_limit_bytes() ->
    memory_limit_bytes("/").


%% @private
%% As {@link memory_limit_bytes/0}, for a machine whose files are under this folder.
-spec memory_limit_bytes(file:filename()) -> memory_limit().
memory_limit_bytes(Root) ->
    Machine = [ Kilobytes * 1024
                || Kilobytes <- numbers(filename:join([Root, "proc", "meminfo"]), "^MemTotal:\\s+(\\d+) kB") ],
    Groups = lists:append([ numbers(File, "^(\\d+)$") || File <- control_group_files(Root) ]),
    case Machine ++ Groups of
        [] -> infinity;
        Limits -> max(1, lists:min(Limits) * ?MEMORY_PERCENT div 100)
    end.


%% The limits of a group hold for all groups within it. In a container the group's path is that of the machine
%% outside, or `/'. A file that does not exist, or contains `max', sets no limit.
-spec control_group_files(file:filename()) -> [file:filename()].
control_group_files(Root) ->
    %% A path may have colons itself, and a hierarchy several controllers.
    Groups = [ {binary:split(Controllers, <<",">>, [global]), Path}
               || Line <- binary:split(content(filename:join([Root, "proc", "self", "cgroup"])), <<"\n">>, [global]),
                  [_Id, Group] <- [binary:split(Line, <<":">>)],
                  [Controllers, Path] <- [binary:split(Group, <<":">>)] ],
    lists:usort(lists:append([ limit_files(Root, Controllers, Path) || {Controllers, Path} <- Groups ])).


-spec limit_files(file:filename(), Controllers :: [binary()], Path :: binary()) -> [file:filename()].
limit_files(Root, [<<>>], Path) ->
    files(Root, "sys/fs/cgroup", Path, "memory.max");
limit_files(Root, Controllers, Path) ->
    case lists:member(<<"memory">>, Controllers) of
        true -> files(Root, "sys/fs/cgroup/memory", Path, "memory.limit_in_bytes");
        false -> []
    end.


-spec files(file:filename(), file:filename(), binary(), file:filename()) -> [file:filename()].
files(Root, Mount, Path, File) ->
    Parts = [ binary_to_list(Part) || Part <- binary:split(Path, <<"/">>, [global]), Part =/= <<>> ],
    [ filename:join([Root, Mount] ++ lists:sublist(Parts, N) ++ [File]) || N <- lists:seq(0, length(Parts)) ].


-spec numbers(file:filename(), string()) -> [non_neg_integer()].
numbers(File, Pattern) ->
    case re:run(content(File), Pattern, [multiline, {capture, all_but_first, list}]) of
        {match, [Digits]} -> [list_to_integer(Digits)];
        nomatch -> []
    end.


%% Read by the calling process, without the file server; empty if it cannot be.
-spec content(file:filename()) -> binary().
content(File) ->
    case file:open(File, [read, raw, binary]) of
        {ok, Device} ->
            Read = file:read(Device, 65_536),
            ok = file:close(Device),
            case Read of
                {ok, Content} -> Content;
                _ -> <<>>
            end;
        {error, _Reason} ->
            <<>>
    end.


%%% Process


%% @private
%% Makes the table of what the process measures and has logged. The calling process owns it, so the table
%% outlives the process that writes it.
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
    %% It measures nodes that are too busy to run a process of normal priority.
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
    {noreply, log_change(check(), Measured)};
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
    %% One sample more than intervals. Samples with another number of schedulers cannot be compared.
    {Schedulers, _, _} = Use = scheduler_use(),
    Comparable = lists:takewhile(fun({Online, _, _}) -> Online =:= Schedulers end, Uses0),
    Uses = lists:sublist([Use | Comparable], ?WINDOW + 1),
    Median = lists:nth((length(RunQueues) + 1) div 2, lists:sort(RunQueues)),
    ok = set_window(Median, use_percent(hd(Uses), lists:last(Uses))),
    State#state{run_queues = RunQueues, uses = Uses}.


-spec scheduler_use() -> scheduler_use().
scheduler_use() ->
    %% Normal schedulers have the lowest numbers, and online schedulers the lowest of these.
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


%% `none' if the last measurement is so old that it says nothing about now.
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


%% The result that was logged last, by this process or its predecessor.
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
    erlmcp_native_log:log(notice, health_ok, #{});
log({degraded, Reasons}) ->
    erlmcp_native_log:log(warning, health_degraded, #{reasons => Reasons}).


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).
