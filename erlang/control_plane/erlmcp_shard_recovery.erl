%%% @doc Recovery of shards: detects that a shard's manager has been restarted, notifies subscribers, and
%%% records the downtimes.
%%%
%%% The exit of a manager stops no route: its shard is only not sampled until the next manager runs. The
%%% <em>downtime</em> is the time from the exit of a manager, which a monitor reports, to the end of its successor's
%%% first sample, which the successor reports. Then each subscriber gets
%%%
%%% ```
%%% {erlmcp_shard_recovered, ShardId, DowntimeMs}
%%% '''
%%%
%%% == Guarantees ==
%%% Each downtime is counted once, and each subscriber is notified of it once; twice if this process was killed
%%% while it sent the notifications. Subscriptions, downtimes and the last known manager of each shard are kept in a
%%% table of the application's top supervisor, and what a recovery changes in it is written in one step. In this table
%%% the next process finds the restarts that were not observed. Their downtimes are given as an upper
%%% bound: from the last second in which this process is known to have run. These downtimes are counted separately,
%%% and so are those that were over before this process was notified of their start: one or two in a hundred
%%% on two busy cores, and all that occurred while the process was suspended.
%%%
%%% == Cost ==
%%% A monitor for each manager, two messages for each restart, and a sign of life once a second.
-module(erlmcp_shard_recovery).

-behaviour(gen_server).

%% Subscriptions
-export([subscribe/0, subscribe/1, unsubscribe/0, unsubscribe/1]).
%% What is known
-export([downtimes/0]).
-export([silent_ms/0]).
%% Process
-export([new/0]).
-export([start_link/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([downtimes/0]).

-type shard_id() :: erlmcp_admission_control:shard_id().
-type downtimes() :: #{
                       count := non_neg_integer(),
                       mean_us := non_neg_integer(),
                       median_us := non_neg_integer(),
                       worst_us := non_neg_integer(),
                       unobserved_count := non_neg_integer(),
                       unobserved_worst_us := non_neg_integer(),
                       down := [shard_id()]
                      }.
%% Whether a downtime was measured, or is an upper bound since its beginning was not observed.
-type kind() :: exact | bound.
%% The condition of a manager: running; running, and subscribers are being notified of its recovery; exited.
-type condition() :: up | {untold, DowntimeUs :: non_neg_integer()} | {down, SinceUs :: integer(), kind()}.

%% The rows of the table: `{{subscriber, pid()}}'; `{{shard, shard_id()}, pid() | none, condition()}', the
%% manager that was there last; `{{downtimes, kind()}, Count, SumUs, WorstUs, LatestUs}'; `{alive_us, Us}'.
-define(TABLE,    ?MODULE).
-define(ALIVE_MS, 1_000).
%% The number of downtimes that are kept for the median.
-define(KEPT, 1_000).

-record(state, {
          %% Monitors.
          managers = #{} :: #{shard_id() => {pid(), reference()}},
          shards = #{} :: #{reference() => shard_id()},
          subscribers = #{} :: #{pid() => reference()}
         }).

%%% Subscriptions


%% @equiv subscribe(self())
-spec subscribe() -> ok | {error, not_running}.
subscribe() ->
    subscribe(self()).


%% @doc Subscribes a process to recoveries, until it exits, is unsubscribed or the application stops.
%% Further calls for the same process have no effect.
-spec subscribe(pid()) -> ok | {error, not_running}.
subscribe(Pid) when is_pid(Pid) ->
    try ets:insert(?TABLE, {{subscriber, Pid}}) of
        true -> gen_server:cast(?MODULE, {subscribed, Pid})
    catch
        error:badarg -> {error, not_running}
    end.


%% @equiv unsubscribe(self())
-spec unsubscribe() -> ok.
unsubscribe() ->
    unsubscribe(self()).


%% @doc Ends a subscription; `ok' also if there is none. What was sent before may still arrive.
-spec unsubscribe(pid()) -> ok.
unsubscribe(Pid) when is_pid(Pid) ->
    try ets:delete(?TABLE, {subscriber, Pid}) of
        true -> gen_server:cast(?MODULE, {unsubscribed, Pid})
    catch
        error:badarg -> ok
    end.


%%% What is known


%% @doc The downtimes of managers since the application was started.
%%
%% `count', `mean_us' (the mean time to recovery) and `worst_us' are of all measured downtimes,
%% `median_us' of the latest thousand. `unobserved_count' counts the downtimes whose start was not observed, and
%% `unobserved_worst_us' is an upper bound of them. `down' are the shards whose manager has exited and that no new
%% manager has sampled yet. Asks no process; all zero where the application is not running.
-spec downtimes() -> downtimes().
downtimes() ->
    {Count, Sum, Worst, Latest} = downtimes(exact),
    {Unobserved, _Sum, WorstBound, _Latest} = downtimes(bound),
    #{
      count => Count,
      mean_us => Sum div max(1, Count),
      median_us => median(lists:sort(Latest)),
      worst_us => Worst,
      unobserved_count => Unobserved,
      unobserved_worst_us => WorstBound,
      down => lists:sort([ Shard || [Shard] <- match({{shard, '$1'}, '_', {down, '_', '_'}}) ])
     }.


-spec median([non_neg_integer()]) -> non_neg_integer().
median([]) -> 0;
median(Sorted) -> lists:nth((length(Sorted) + 1) div 2, Sorted).


%% @private
%% The time since the last sign of life of the process; 0 if it has never run.
-spec silent_ms() -> integer().
silent_ms() ->
    (now_us() - last_alive_us()) div 1000.


%%% Process


%% @private
%% Makes the table, owned by the calling process.
-spec new() -> ok.
new() ->
    _ = ets:new(?TABLE, [named_table, public, {read_concurrency, true}]),
    ok.


%% @private
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @private
-spec init([]) -> {ok, #state{}}.
init([]) ->
    %% The process runs for some microseconds at a restart. With normal priority it would be notified of an exit on a
    %% busy node only when the restart is over.
    _ = process_flag(priority, high),
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Watching = lists:foldl(fun watch/2, #state{}, lists:seq(0, Shards - 1)),
    Subscribed = lists:foldl(fun monitor_subscriber/2, Watching, subscribers()),
    ok = sign_of_life(now_us()),
    {ok, Subscribed}.


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) -> {reply, {error, unknown_request}, #state{}}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast({subscribed, Pid}, State) ->
    {noreply, monitor_subscriber(Pid, State)};
handle_cast({unsubscribed, Pid}, State) ->
    {noreply, demonitor_subscriber(Pid, State)};
handle_cast(_Cast, State) ->
    {noreply, State}.


%% @private
-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({first_sample, Shard, Manager, SampledUs}, State) ->
    {noreply, sampled(Shard, Manager, SampledUs, State)};
handle_info({'DOWN', Monitor, process, Pid, _Reason}, State) ->
    {noreply, ended(Monitor, Pid, State)};
handle_info({sign_of_life, DueUs}, State) ->
    ok = sign_of_life(DueUs),
    {noreply, State};
handle_info(_Unknown, State) ->
    {noreply, State}.


%% @private
-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, _State) ->
    ok.


%%% Managers


%% If a manager takes its first sample before this process has its name, its message has no receiver; but it has
%% written the row that is read here before that.
-spec watch(shard_id(), #state{}) -> #state{}.
watch(Shard, State) ->
    case {whereis(erlmcp_shard_sampler:name(Shard)), known(Shard)} of
        {_Any, {Former, {untold, DowntimeUs}}} ->
            ok = tell(Shard, Former, DowntimeUs),
            watch(Shard, State);
        {Manager, {Manager, up}} ->
            monitor_manager(Shard, Manager, State);
        {Manager, {none, up}} when is_pid(Manager) ->
            %% The application has just been started.
            ok = insert([{{shard, Shard}, Manager, up}]),
            monitor_manager(Shard, Manager, State);
        {_Other, {Former, up}} ->
            ok = went_down(Shard, Former, last_alive_us(), bound),
            look_for_successor(Shard, State);
        {_Any, {_Former, {down, _SinceUs, _Kind}}} ->
            look_for_successor(Shard, State)
    end.


-spec look_for_successor(shard_id(), #state{}) -> #state{}.
look_for_successor(Shard, State) ->
    Manager = whereis(erlmcp_shard_sampler:name(Shard)),
    case erlmcp_shard_sampler:first_sample(Shard) of
        {Manager, SampledUs} -> sampled(Shard, Manager, SampledUs, State);
        %% The manager will send a message.
        _NoneOrFormer -> State
    end.


%% A manager has taken its first sample.
-spec sampled(shard_id(), pid(), SampledUs :: integer(), #state{}) -> #state{}.
sampled(Shard, Manager, SampledUs, State) ->
    case {erlmcp_shard_sampler:first_sample(Shard), known(Shard)} of
        {{Manager, _Us}, {Former, {down, SinceUs, Kind}}} when Former =/= Manager ->
            recovered(Shard, Manager, max(0, SampledUs - SinceUs), Kind, State);
        {{Manager, _Us}, {Former, up}} when Former =/= Manager ->
            %% The 'DOWN' of the former manager is still on its way.
            recovered(Shard, Manager, max(0, SampledUs - last_alive_us()), bound, demonitor_manager(Shard, State));
        _ ->
            %% The manager was known before it had sampled, or has exited, or a later one has sampled since.
            State
    end.


-spec recovered(shard_id(), pid(), DowntimeUs :: non_neg_integer(), kind(), #state{}) -> #state{}.
recovered(Shard, Manager, DowntimeUs, Kind, State) ->
    {Count, Sum, Worst, Latest} = downtimes(Kind),
    Downtimes = {{downtimes, Kind}, Count + 1, Sum + DowntimeUs, max(Worst, DowntimeUs), lists:sublist([DowntimeUs | Latest], ?KEPT)},
    %% Both rows or none, if this process is killed.
    ok = insert([{{shard, Shard}, Manager, {untold, DowntimeUs}}, Downtimes]),
    ok = tell(Shard, Manager, DowntimeUs),
    monitor_manager(Shard, Manager, State).


-spec tell(shard_id(), pid(), DowntimeUs :: non_neg_integer()) -> ok.
tell(Shard, Manager, DowntimeUs) ->
    Message = {erlmcp_shard_recovered, Shard, (DowntimeUs + 999) div 1000},
    lists:foreach(fun(Pid) -> Pid ! Message end, subscribers()),
    insert([{{shard, Shard}, Manager, up}]).


-spec ended(reference(), pid(), #state{}) -> #state{}.
ended(Monitor, Pid, #state{shards = Shards, managers = Managers, subscribers = Subscribers} = State) ->
    case Shards of
        #{Monitor := Shard} ->
            ok = manager_ended(Shard, Pid),
            State#state{shards = maps:remove(Monitor, Shards), managers = maps:remove(Shard, Managers)};
        _ ->
            true = ets:delete(?TABLE, {subscriber, Pid}),
            State#state{subscribers = maps:remove(Pid, Subscribers)}
    end.


%% If a successor has sampled already, the exit was reported too late to measure anything from it.
-spec manager_ended(shard_id(), pid()) -> ok.
manager_ended(Shard, Manager) ->
    case erlmcp_shard_sampler:first_sample(Shard) of
        {Successor, _SampledUs} when Successor =/= Manager -> went_down(Shard, Manager, last_alive_us(), bound);
        _OfManagerOrNone -> went_down(Shard, Manager, now_us(), exact)
    end.


-spec went_down(shard_id(), pid() | none, SinceUs :: integer(), kind()) -> ok.
went_down(Shard, Manager, SinceUs, Kind) ->
    insert([{{shard, Shard}, Manager, {down, SinceUs, Kind}}]).


-spec monitor_manager(shard_id(), pid(), #state{}) -> #state{}.
monitor_manager(Shard, Manager, #state{managers = Managers, shards = Shards} = State) ->
    Monitor = monitor(process, Manager),
    State#state{managers = Managers#{Shard => {Manager, Monitor}}, shards = Shards#{Monitor => Shard}}.


-spec demonitor_manager(shard_id(), #state{}) -> #state{}.
demonitor_manager(Shard, #state{managers = Managers, shards = Shards} = State) ->
    {{_Manager, Monitor}, Others} = maps:take(Shard, Managers),
    true = demonitor(Monitor, [flush]),
    State#state{managers = Others, shards = maps:remove(Monitor, Shards)}.


%%% Subscribers


-spec monitor_subscriber(pid(), #state{}) -> #state{}.
monitor_subscriber(Pid, #state{subscribers = Subscribers} = State) when is_map_key(Pid, Subscribers) ->
    State;
monitor_subscriber(Pid, #state{subscribers = Subscribers} = State) ->
    State#state{subscribers = Subscribers#{Pid => monitor(process, Pid)}}.


-spec demonitor_subscriber(pid(), #state{}) -> #state{}.
demonitor_subscriber(Pid, #state{subscribers = Subscribers} = State) ->
    case maps:take(Pid, Subscribers) of
        {Monitor, Others} ->
            true = demonitor(Monitor, [flush]),
            State#state{subscribers = Others};
        error ->
            State
    end.


%%% Signs of life


%% Every message before this one has been handled. So the time that counts is when it was due: if it has waited, the
%% messages after it have waited as well.
-spec sign_of_life(DueUs :: integer()) -> ok.
sign_of_life(DueUs) ->
    _ = erlang:send_after(?ALIVE_MS, self(), {sign_of_life, now_us() + ?ALIVE_MS * 1000}),
    insert([{alive_us, DueUs}]).


-spec last_alive_us() -> integer().
last_alive_us() ->
    case match({alive_us, '$1'}) of
        [[Us]] -> Us;
        [] -> now_us()
    end.


-spec now_us() -> integer().
now_us() ->
    erlang:monotonic_time(microsecond).


%%% The table


-spec subscribers() -> [pid()].
subscribers() ->
    [ Pid || [Pid] <- match({{subscriber, '$1'}}) ].


-spec known(shard_id()) -> {pid() | none, condition()}.
known(Shard) ->
    case match({{shard, Shard}, '$1', '$2'}) of
        [[Manager, Condition]] -> {Manager, Condition};
        [] -> {none, up}
    end.


-spec downtimes(kind()) ->
          {Count :: non_neg_integer(), SumUs :: non_neg_integer(), WorstUs :: non_neg_integer(), LatestUs :: [non_neg_integer()]}.
downtimes(Kind) ->
    case match({{downtimes, Kind}, '$1', '$2', '$3', '$4'}) of
        [[Count, Sum, Worst, Latest]] -> {Count, Sum, Worst, Latest};
        [] -> {0, 0, 0, []}
    end.


-spec insert([tuple()]) -> ok.
insert(Rows) ->
    true = ets:insert(?TABLE, Rows),
    ok.


%% Empty where the application is not running.
-spec match(tuple()) -> [[term()]].
match(Pattern) ->
    try
        ets:match(?TABLE, Pattern)
    catch
        error:badarg -> []
    end.
