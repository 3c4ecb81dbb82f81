%%% @private
%%% The application: its start, and all its supervisors. The start checks the configuration, makes the default registry with
%%% it, sets the layers of backpressure and switches to the configured mode. Without the native library it only switches
%%% to the mode.
%%%
%%% Registrations live in native memory and routing runs in the
%%% callers, so every process here can be restarted at any time. Without the native library there is
%%% only the capability store to supervise.
%%%
%%% ```
%%% erlmcp_native_sup                      owns the tables of recovery, health, events and the capability store
%%% |- erlmcp_shard_sup                    owns the table of the samplers
%%% |  `- {manager, Shard}, one a shard    erlmcp_shard_manager
%%% |- erlmcp_capability_store_sup         erlmcp_capability_store
%%% |- erlmcp_connection_events_sup        erlmcp_connection_events
%%% `- erlmcp_control_plane_sup            erlmcp_shard_recovery, erlmcp_shard_metrics, erlmcp_shard_health
%%% '''
%%%
%%% == What is restarted, and what is given up ==
%%% A process that is killed, or crashes once, is restarted alone. A process that crashes repeatedly
%%% is given up by its own supervisor, which exits with `shutdown'. That is not a crash, so the supervisor is not
%%% restarted (`transient'). What stops with it depends on the process:
%%%
%%% <ul>
%%% <li>`erlmcp_shard_sup' and `erlmcp_native_sup' exit with the supervisor of a shard's manager
%%% (`significant'), and so the application stops;</li>
%%% <li>`erlmcp_control_plane_sup' exits alone: messages are routed without it. {@link erlmcp_native:health/0}
%%% reports it, and `supervisor:restart_child(erlmcp_native_sup, erlmcp_control_plane_sup)' starts it
%%% again. A control plane that cannot be started is one line in the log;</li>
%%% <li>`erlmcp_connection_events_sup' exits alone too: no events are sent, and {@link
%%% erlmcp_connection_events:subscribe/1} returns `{error, not_running}'. So does `erlmcp_capability_store_sup': terms
%%% are read as before, and none is added or removed.</li>
%%% </ul>
%%%
%%% OTP's report of the supervisor that gives up names the process, with the reason
%%% `reached_max_restart_intensity'.
%%%
%%% == Intensities ==
%%% <ul>
%%% <li>The supervisor of one manager: 40 restarts in 55 seconds. A manager that cannot run differs from
%%% managers that are killed at random in that the <em>same</em> manager exits again and again, so each shard
%%% counts for itself. (One intensity for all would have to allow 1,024 restarts at once where all are killed,
%%% and a manager that crashes with each of its ticks, ten times a second, would be restarted for ever.) A
%%% manager that crashes once a second or more often is given up in 41 seconds or less. Random kills, ten a
%%% second over 64 shards, hit one shard 8.6 times in 55 seconds on average; more than 40 have a
%%% probability of 10<sup>-15</sup>. At 20 kills a second it is 10<sup>-6</sup>.</li>
%%% <li>The control plane: 40 restarts in 55 seconds. Its processes tick once a second, so a process that crashes
%%% with each tick has 55 crashes in that time, and is given up at the 41st. 13 kills of each of the three
%%% processes are allowed. The processes of events and of the capability store have the same intensity, each by itself.</li>
%%% <li>`erlmcp_shard_sup' and `erlmcp_native_sup' count supervisors that were killed, since those do not crash
%%% by themselves. Ten kills a second cause 100 restarts of managers' supervisors in 10 seconds (200 are allowed);
%%% four supervisors that are each killed ten times a second cause 400 (500 are allowed).</li>
%%% </ul>
-module(erlmcp_native_sup).

-behaviour(application).
-behaviour(supervisor).

%% Application
-export([start/2, stop/1]).
%% Supervisors
-export([start_link/1, init/1]).
-export([start_child/2]).

-export_type([tree/0]).

%% The name of a supervisor, or the shard whose manager it supervises.
-type tree() :: erlmcp_native_sup |
                erlmcp_shard_sup |
                erlmcp_capability_store_sup |
                erlmcp_connection_events_sup |
                erlmcp_control_plane_sup |
                {manager, non_neg_integer()}.

%% An orphan exits by its link, as soon as it is scheduled.
-define(ORPHAN_MS, 5_000).

%%% Application


%% @private
-spec start(application:start_type(), []) -> {ok, pid()} | {error, term()}.
start(_Type, []) ->
    case erlmcp_native_config:check() of
        {ok, Limits} ->
            case erlmcp_rollout:wanted() of
                {ok, _Mode} -> start_with(erlmcp_registry_native:load_error(), Limits);
                {error, LoadError} -> {error, {nif_not_loaded, LoadError}}
            end;
        {error, _} = Error ->
            Error
    end.


-spec start_with(none | erlmcp_nif:load_error(), erlmcp_native_config:limits()) -> {ok, pid()} | {error, term()}.
start_with(none, Limits) ->
    make_default_registry(Limits),
    case erlmcp_native_config:configure() of
        ok ->
            case start_supervisor() of
                {ok, Supervisor} ->
                    ok = erlmcp_native_config:begin_admission(),
                    {ok, Supervisor};
                Error ->
                    Error
            end;
        {error, _} = Error ->
            Error
    end;
start_with(_LoadError, _Limits) ->
    start_supervisor().


-spec start_supervisor() -> {ok, pid()} | {error, term()}.
start_supervisor() ->
    case erlmcp_rollout:configure() of
        ok ->
            start_top();
        {error, _} = Error ->
            ok = stop([]),
            Error
    end.


%% The default registry outlives the application, and may have been used before it was started.
-spec make_default_registry(erlmcp_native_config:limits()) -> ok.
make_default_registry({Shards, MaxEntries, MaxIdBytes}) ->
    case erlmcp_registry_native:make_default(Shards, MaxEntries, MaxIdBytes) of
        created ->
            ok;
        exists ->
            Wanted = #{shards => Shards, max_entries => MaxEntries, max_id_bytes => MaxIdBytes},
            warn_unless_equal(erlmcp_shard_registry:limits(), Wanted)
    end.


-spec warn_unless_equal(erlmcp_shard_registry:options(), erlmcp_shard_registry:options()) -> ok.
warn_unless_equal(Limits, Limits) ->
    ok;
warn_unless_equal(Existing, Wanted) ->
    erlmcp_native_log:log(warning, default_registry_exists, #{existing => Existing, configured => Wanted}).


%% @private
-spec stop(term()) -> ok.
stop(_State) ->
    ok = erlmcp_capability_store:erase(),
    erlmcp_native_config:forget().


-spec start_top() -> {ok, pid()} | {error, term()}.
start_top() ->
    case start_link(?MODULE) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.


%%% Supervisors


%% @doc Starts the supervisor of a tree.
-spec start_link(tree()) -> supervisor:startlink_ret().
start_link({manager, _Shard} = Tree) ->
    supervisor:start_link(?MODULE, Tree);
start_link(Name) when Name =:= erlmcp_control_plane_sup;
                      Name =:= erlmcp_connection_events_sup;
                      Name =:= erlmcp_capability_store_sup ->
    case supervisor:start_link({local, Name}, ?MODULE, Name) of
        %% If a child was killed during its start, the next attempt starts it.
        {error, {shutdown, {failed_to_start_child, _Child, Reason}} = Failure} when Reason =/= killed ->
            Event = case Name of
                        erlmcp_control_plane_sup -> control_plane_not_started;
                        erlmcp_connection_events_sup -> connection_events_not_started;
                        erlmcp_capability_store_sup -> capability_store_not_started
                    end,
            ok = erlmcp_native_log:log(error, Event, #{reason => Failure}),
            ignore;
        Result ->
            Result
    end;
start_link(Name) ->
    supervisor:start_link({local, Name}, ?MODULE, Name).


%% @private
-spec init(tree()) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init(?MODULE) ->
    ok = raise_priority(),
    {ok, {(flags(500, 10))#{auto_shutdown => any_significant}, trees(erlmcp_registry_native:load_error())}};
init(erlmcp_shard_sup) ->
    ok = raise_priority(),
    ok = erlmcp_shard_sampler:new(),
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Managers = [ (tree(Shard, start_link, [{manager, Shard}]))#{significant => true} || Shard <- lists:seq(0, Shards - 1) ],
    {ok, {(flags(200, 10))#{auto_shutdown => any_significant}, Managers}};
init({manager, Shard}) ->
    ok = raise_priority(),
    {ok, {flags(40, 55), [process({erlmcp_shard_manager, Shard}, erlmcp_shard_manager, [Shard])]}};
init(erlmcp_connection_events_sup) ->
    {ok, {flags(40, 55), [process(erlmcp_connection_events, erlmcp_connection_events, [])]}};
init(erlmcp_capability_store_sup) ->
    {ok, {flags(40, 55), [process(erlmcp_capability_store, erlmcp_capability_store, [])]}};
init(erlmcp_control_plane_sup) ->
    Modules = [erlmcp_shard_recovery, erlmcp_shard_metrics, erlmcp_shard_health],
    {ok, {flags(40, 55), [ process(Module, Module, []) || Module <- Modules ]}}.


%% With normal priority each start and restart would wait for its turn on a busy node.
-spec raise_priority() -> ok.
raise_priority() ->
    _ = process_flag(priority, high),
    ok.


%% The tables are owned by the top supervisor, so that they outlive the supervisors of their writers.
-spec trees(none | erlmcp_nif:load_error()) -> [supervisor:child_spec()].
trees(none) ->
    ok = erlmcp_shard_recovery:new(),
    ok = erlmcp_shard_health:new(),
    ok = erlmcp_connection_events:new(),
    ok = erlmcp_capability_store:new(),
    [ top_tree(Name)
      || Name <- [erlmcp_shard_sup, erlmcp_capability_store_sup, erlmcp_connection_events_sup, erlmcp_control_plane_sup] ];
trees(_LoadError) ->
    ok = erlmcp_capability_store:new(),
    [top_tree(erlmcp_capability_store_sup)].


-spec top_tree(tree()) -> supervisor:child_spec().
top_tree(Name) ->
    (tree(Name, start_child, [?MODULE, [Name]]))#{significant => Name =:= erlmcp_shard_sup}.


-spec flags(Intensity :: pos_integer(), PeriodSeconds :: pos_integer()) -> supervisor:sup_flags().
flags(Intensity, PeriodSeconds) ->
    #{strategy => one_for_one, intensity => Intensity, period => PeriodSeconds}.


-spec tree(Id :: term(), start_link | start_child, [term()]) -> supervisor:child_spec().
tree(Id, Function, Arguments) ->
    #{id => Id, start => {?MODULE, Function, Arguments}, type => supervisor, restart => transient}.


-spec process(Id :: term(), module(), [term()]) -> supervisor:child_spec().
process(Id, Module, Arguments) ->
    #{id => Id, start => {?MODULE, start_child, [Module, Arguments]}, modules => [Module]}.


%% @doc `apply(Module, start_link, Arguments)', which starts a process under a name.
%%
%% A supervisor that is killed leaves its children behind for a moment: they exit by their links, and until
%% then the next supervisor finds their names taken. So this function waits for the exit of the process that has the
%% name, and tries again. A name is free before the `DOWN' of its process is sent, so each further attempt is
%% due to another orphan.
-spec start_child(module(), [term()]) -> supervisor:startchild_ret() | ignore.
start_child(Module, Arguments) ->
    case apply(Module, start_link, Arguments) of
        {error, {already_started, Orphan}} = Error ->
            case has_exited(Orphan) of
                true -> start_child(Module, Arguments);
                false -> Error
            end;
        Result ->
            Result
    end.


%% `undefined': the process had the name when the start failed, and no longer a moment later.
-spec has_exited(pid() | undefined) -> boolean().
has_exited(undefined) ->
    true;
has_exited(Pid) ->
    Monitor = monitor(process, Pid),
    receive
        {'DOWN', Monitor, process, Pid, _Reason} -> true
    after
        ?ORPHAN_MS ->
            true = demonitor(Monitor, [flush]),
            false
    end.
