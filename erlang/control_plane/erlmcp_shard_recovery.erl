%%% @doc Recovery of shards: notices when a shard's manager has been restarted, checks the shard's
%%% entries, tells who wants to know, and keeps account of the downtimes.
%%%
%%% A manager's end stops no route: its shard is only not sampled until the next one is there. Its
%%% <em>downtime</em> is from its end to the end of its successor's first sample. Then the entries are
%%% checked: no process among them that has ended, and as many as are counted; what is wrong for five
%%% seconds is told by {@link erlmcp_native:health/0} and logged, and looked at again every second.
%%% After the check each subscriber gets
%%%
%%% ```
%%% {erlmcp_shard_recovered, ShardId, DowntimeMs}
%%% '''
%%%
%%% == When this process is not there ==
%%% Subscriptions, downtimes and what was under way stay in a table of the application's top supervisor
%%% ({@link erlmcp_shard_recovery_records}). The next process finds in it which managers there were,
%%% and so the restarts that nobody has seen. Their downtimes are given as an upper bound: from the
%%% last second in which this process is known to have been there. They are counted apart, as are those
%%% that were over before this process was told that they had begun: about one in a hundred on two busy
%%% cores, and whatever came while it was suspended. A
%%% message may come twice if this process was killed while it told of it.
%%%
%%% == Cost ==
%%% One monitor for each manager, and a sign of life once a second; managers that are missing are
%%% looked for every millisecond, less often after a second.
-module(erlmcp_shard_recovery).

-behaviour(gen_server).

-include_lib("kernel/include/logger.hrl").

%% Subscriptions
-export([subscribe/0, subscribe/1, unsubscribe/0, unsubscribe/1]).
%% What is known
-export([downtimes/0, damaged/0, check/1]).
%% Process
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

-define(RECORDS,    erlmcp_shard_recovery_records).
-define(ALIVE_MS,   1_000).
-define(RECHECK_MS, 1_000).

-record(state, {
          %% The managers and subscribers that are monitored, and the checks that are under way.
          managers = #{} :: #{reference() => shard_id()},
          subscribers = #{} :: #{pid() => reference()},
          checks = #{} :: #{reference() => {shard_id(), pid() | none}},
          %% Looking for missing managers.
          timer = idle :: idle | reference()
         }).

%%% Subscriptions


%% @equiv subscribe(self())
-spec subscribe() -> ok | {error, not_running}.
subscribe() ->
    subscribe(self()).


%% @doc Has a process told of each recovery, until it ends, is unsubscribed or the application stops.
%% Once is enough.
-spec subscribe(pid()) -> ok | {error, not_running}.
subscribe(Pid) when is_pid(Pid) ->
    case ?RECORDS:subscribe(Pid) of
        true -> gen_server:cast(?MODULE, {subscribed, Pid});
        false -> {error, not_running}
    end.


%% @equiv unsubscribe(self())
-spec unsubscribe() -> ok.
unsubscribe() ->
    unsubscribe(self()).


%% @doc Ends a subscription; `ok' also if there is none. What was sent before may still arrive.
-spec unsubscribe(pid()) -> ok.
unsubscribe(Pid) when is_pid(Pid) ->
    _ = ?RECORDS:unsubscribe(Pid),
    gen_server:cast(?MODULE, {unsubscribed, Pid}).


%%% What is known


%% @doc The downtimes of managers since the application was started.
%%
%% `count', `mean_us' (the mean time to recovery) and `worst_us' are of all that were measured,
%% `median_us' of the latest thousand. `unobserved_count' are those that nobody has seen begin, and
%% `unobserved_worst_us' an upper bound of them. `down' are the shards without a manager that has
%% sampled. Asks no process; all zero where the application is not running.
-spec downtimes() -> downtimes().
downtimes() ->
    #{exact := {Count, Sum, Worst, Latest}, bound := {Unobserved, _, WorstBound, _}} = ?RECORDS:downtimes(),
    #{
      count => Count,
      mean_us => Sum div max(1, Count),
      median_us => median(lists:sort(Latest)),
      worst_us => Worst,
      unobserved_count => Unobserved,
      unobserved_worst_us => WorstBound,
      down => lists:sort([ Shard || {Shard, _SinceUs, _Kind} <- ?RECORDS:down() ])
     }.


-spec median([non_neg_integer()]) -> non_neg_integer().
median([]) -> 0;
median(Sorted) -> lists:nth((length(Sorted) + 1) div 2, Sorted).


%% @doc The shards whose entries were found wrong at their last check. Asks no process.
-spec damaged() -> [shard_id()].
damaged() ->
    ?RECORDS:damaged().


%% @doc Checks the entries of a shard now, in the calling process. That takes a moment where all is well,
%% and five seconds where something stays wrong. Raises `badarg' if there is no such shard.
-spec check(shard_id()) -> erlmcp_shard_check:verdict().
check(ShardId) ->
    erlmcp_shard_check:run(ShardId).


%%% Process


%% @private
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @private
-spec init([]) -> {ok, #state{}}.
init([]) ->
    %% A restart is seen while the node is under load, or not measured rightly.
    _ = process_flag(priority, high),
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Down = [ Shard || {Shard, _SinceUs, _Kind} <- ?RECORDS:down() ],
    Watched = lists:foldl(fun watch/2, #state{}, lists:seq(0, Shards - 1) -- Down),
    Subscribed = lists:foldl(fun monitor_subscriber/2, Watched, ?RECORDS:subscribers()),
    Checking = lists:foldl(fun({Shard, Manager, _DowntimeUs}, State) -> start_check(Shard, Manager, State) end,
                           Subscribed,
                           ?RECORDS:unchecked()),
    Rechecking = lists:foldl(fun(Shard, State) -> start_check(Shard, none, State) end, Checking, ?RECORDS:damaged()),
    ok = sign_of_life(now_us()),
    {ok, start_timer(Rechecking)}.


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
handle_info({timeout, Timer, look}, #state{timer = Timer} = State) ->
    {noreply, start_timer(look_for_managers(State#state{timer = idle}))};
handle_info({sign_of_life, DueUs}, State) ->
    ok = sign_of_life(DueUs),
    {noreply, State};
handle_info({check, Shard, Manager}, State) ->
    {noreply, start_check(Shard, Manager, State)};
handle_info({'DOWN', Monitor, process, Pid, Reason}, State) ->
    {noreply, ended(Monitor, Pid, Reason, State)};
handle_info(_Unknown, State) ->
    {noreply, State}.


%% @private
-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, _State) ->
    ok.


-spec ended(reference(), pid(), term(), #state{}) -> #state{}.
ended(Monitor, Pid, Reason, #state{managers = Managers, checks = Checks} = State) ->
    case {Managers, Checks} of
        {#{Monitor := Shard}, _} ->
            ok = manager_ended(Shard, Pid),
            start_timer(State#state{managers = maps:remove(Monitor, Managers)});
        {_, #{Monitor := {Shard, Manager}}} ->
            checked(Reason, Shard, Manager, State#state{checks = maps:remove(Monitor, Checks)});
        _ ->
            _ = ?RECORDS:unsubscribe(Pid),
            State#state{subscribers = maps:remove(Pid, State#state.subscribers)}
    end.


%%% Managers


-spec watch(shard_id(), #state{}) -> #state{}.
watch(Shard, State) ->
    case {whereis(erlmcp_backpressure:sampler(Shard)), ?RECORDS:manager(Shard)} of
        {Manager, Manager} when is_pid(Manager) ->
            monitor_manager(Shard, Manager, State);
        {Manager, none} when is_pid(Manager) ->
            %% The application has just been started.
            monitor_manager(Shard, Manager, State);
        {_Other, _Former} ->
            ok = ?RECORDS:went_down(Shard, last_alive_us(), bound),
            State
    end.


%% A successor that has sampled already: the end was told too late to measure anything from it.
-spec manager_ended(shard_id(), pid()) -> ok.
manager_ended(Shard, Manager) ->
    case erlmcp_shard_stats:first_sample(Shard) of
        {Successor, _SampledUs} when Successor =/= Manager -> ?RECORDS:went_down(Shard, last_alive_us(), bound);
        _OfManagerOrNone -> ?RECORDS:went_down(Shard, now_us(), exact)
    end.


-spec monitor_manager(shard_id(), pid(), #state{}) -> #state{}.
monitor_manager(Shard, Manager, #state{managers = Managers} = State) ->
    ok = ?RECORDS:set_manager(Shard, Manager),
    State#state{managers = Managers#{monitor(process, Manager) => Shard}}.


-spec look_for_managers(#state{}) -> #state{}.
look_for_managers(State) ->
    lists:foldl(fun look_for_manager/2, State, ?RECORDS:down()).


-spec look_for_manager({shard_id(), integer(), ?RECORDS:kind()}, #state{}) -> #state{}.
look_for_manager({Shard, SinceUs, Kind}, State) ->
    Manager = whereis(erlmcp_backpressure:sampler(Shard)),
    case erlmcp_shard_stats:first_sample(Shard) of
        {Manager, SampledUs} ->
            DowntimeUs = max(0, SampledUs - SinceUs),
            ok = ?RECORDS:checking(Shard, Manager, DowntimeUs),
            ok = ?RECORDS:add_downtime(DowntimeUs, Kind),
            Watching = monitor_manager(Shard, Manager, State),
            ok = ?RECORDS:came_up(Shard),
            start_check(Shard, Manager, Watching);
        _NoneOrFormer ->
            State
    end.


%% Runs while a manager is missing, and slower if that lasts.
-spec start_timer(#state{}) -> #state{}.
start_timer(#state{timer = idle} = State) ->
    case [ SinceUs || {_Shard, SinceUs, _Kind} <- ?RECORDS:down() ] of
        [] -> State;
        Since -> State#state{timer = erlang:start_timer(pause_ms(now_us() - lists:max(Since)), self(), look)}
    end;
start_timer(State) ->
    State.


-spec pause_ms(AgeUs :: integer()) -> pos_integer().
pause_ms(AgeUs) when AgeUs < 1_000_000 -> 1;
pause_ms(AgeUs) when AgeUs < 10_000_000 -> 10;
pause_ms(_AgeUs) -> 100.


%%% Checks


%% For subscribers to be told of this manager, or for none.
-spec start_check(shard_id(), pid() | none, #state{}) -> #state{}.
start_check(Shard, Manager, #state{checks = Checks} = State) ->
    {_Checker, Monitor} = spawn_monitor(erlmcp_shard_check, exit_with_verdict, [Shard]),
    State#state{checks = Checks#{Monitor => {Shard, Manager}}}.


-spec checked(term(), shard_id(), pid() | none, #state{}) -> #state{}.
checked({verdict, Verdict}, Shard, Manager, State) ->
    IsNews = record(Verdict, Shard),
    %% Of a damaged shard one check follows the other, until it is right.
    Verdict =/= ok andalso (IsNews orelse Manager =:= none) andalso check_later(Shard, none),
    ok = tell_subscribers(Shard, Manager),
    State;
checked(_Killed, Shard, Manager, State) ->
    ok = check_later(Shard, Manager),
    State.


-spec check_later(shard_id(), pid() | none) -> ok.
check_later(Shard, Manager) ->
    _ = erlang:send_after(?RECHECK_MS, self(), {check, Shard, Manager}),
    ok.


%% Whether that is news, and then a line in the log.
-spec record(erlmcp_shard_check:verdict(), shard_id()) -> boolean().
record(ok, Shard) ->
    IsNews = ?RECORDS:repaired(Shard),
    IsNews andalso
    ?LOG_NOTICE("erlmcp_native: the entries of shard ~b are right again",
                [Shard],
                #{domain => [erlmcp_native], event => shard_repaired, shard_id => Shard}),
    IsNews;
record({damaged, Damage}, Shard) ->
    IsNews = ?RECORDS:set_damaged(Shard),
    IsNews andalso
    ?LOG_ERROR("erlmcp_native: the entries of shard ~b are not what they should be: ~tP",
               [Shard, Damage, 30],
               #{domain => [erlmcp_native], event => shard_damaged, shard_id => Shard}),
    IsNews.


-spec tell_subscribers(shard_id(), pid() | none) -> ok.
tell_subscribers(Shard, Manager) ->
    Downtimes = [ Us || {S, M, Us} <- ?RECORDS:unchecked(), S =:= Shard, M =:= Manager ],
    _ = [ Pid ! {erlmcp_shard_recovered, Shard, (Us + 999) div 1000} || Us <- Downtimes, Pid <- ?RECORDS:subscribers() ],
    is_pid(Manager) andalso ?RECORDS:checked(Shard, Manager),
    ok.


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


%% Whatever came before it has been handled. So what counts is when it was due: if it has waited, what
%% came after it has waited as well.
-spec sign_of_life(DueUs :: integer()) -> ok.
sign_of_life(DueUs) ->
    _ = erlang:send_after(?ALIVE_MS, self(), {sign_of_life, now_us() + ?ALIVE_MS * 1000}),
    ?RECORDS:set_alive_us(DueUs).


-spec last_alive_us() -> integer().
last_alive_us() ->
    case ?RECORDS:alive_us() of
        none -> now_us();
        Us -> Us
    end.


-spec now_us() -> integer().
now_us() ->
    erlang:monotonic_time(microsecond).
