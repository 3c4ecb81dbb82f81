%%% @doc Metrics of the shards: once a second native counters become rates and percentiles.
%%%
%%% Routes count admitted and refused messages in native memory anyway; no caller waits for this
%%% process, and {@link get/0} reads a table. Rates are differences of counters divided by the time that has
%%% really passed, so a late measurement makes no peak.
%%%
%%% Messages are counted as admitted where admission control has a threshold. With `admission' set to
%%% `infinity', or `backpressure' to `off', routes do not count, and the rates are zero. Messages that the
%%% pure-Erlang registry routes are not counted either ({@link erlmcp_rollout}).
-module(erlmcp_shard_metrics).

-behaviour(gen_server).

-export([get/0, age_ms/0]).
%% Process
-export([start_link/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([metrics/0, refusals/0]).

-type shard_id() :: erlmcp_admission_control:shard_id().
-type refusals() :: #{
                      not_found := non_neg_integer(),
                      circuit_open := non_neg_integer(),
                      shard_overloaded := non_neg_integer(),
                      rate_limited := non_neg_integer(),
                      store_full := non_neg_integer()
                     }.
-type metrics() :: #{
                     measured_at_ms := integer(),
                     interval_ms := pos_integer(),
                     messages_per_second := non_neg_integer(),
                     messages_per_second_of_shards := #{shard_id() => pos_integer()},
                     refusals_per_second := refusals(),
                     last_minute :=
                         #{
                           messages_per_second := erlmcp_admission_control:percentiles(),
                           refusals_per_second := erlmcp_admission_control:percentiles()
                          },
                     latency_us := erlmcp_admission_control:percentiles(),
                     admitted := non_neg_integer(),
                     refused := refusals()
                    }.

-define(INTERVAL_MS, 1_000).
%% Seconds over which the percentiles of rates are computed.
-define(WINDOW,  60).
-define(REASONS, [not_found, circuit_open, shard_overloaded, rate_limited, store_full]).

%% The counters at one moment: messages admitted by each shard, and refused for each reason.
-record(counters, {
          at_us :: integer(),
          admitted :: [{shard_id(), non_neg_integer()}],
          refused :: [non_neg_integer()]
         }).
-record(state, {
          counters :: #counters{},
          %% The rates of the last minute, the latest one first.
          message_rates = [] :: [non_neg_integer()],
          refusal_rates = [] :: [non_neg_integer()]
         }).


%% @doc The metrics of the last second. Asks no process.
%%
%% `measured_at_ms' is the system time of the measurement, `interval_ms' the time that it covers.
%% Shards that have admitted nothing are not in `messages_per_second_of_shards'. `latency_us' is the
%% time that messages wait in the mailboxes of the shards with traffic, from the last samples of their
%% managers ({@link erlmcp_admission_control:get_shard_stats/1}). `admitted' and `refused' are the
%% counts since the registry was made. The result is `{error, not_running}' if the process does not run, and in its
%% first second.
-spec get() -> metrics() | {error, not_running}.
get() ->
    try ets:lookup(?MODULE, metrics) of
        [{metrics, Metrics}] -> Metrics;
        [] -> {error, not_running}
    catch
        error:badarg -> {error, not_running}
    end.


%% @private
%% The time since the last measurement or, before the first one, since the start of the process.
-spec age_ms() -> integer() | none.
age_ms() ->
    try
        erlang:monotonic_time(millisecond) - ets:lookup_element(?MODULE, measured_ms, 2)
    catch
        error:badarg -> none
    end.


%%% Process


%% @private
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @private
-spec init([]) -> {ok, #state{}}.
init([]) ->
    _ = ets:new(?MODULE, [named_table, {read_concurrency, true}]),
    true = ets:insert(?MODULE, {measured_ms, erlang:monotonic_time(millisecond)}),
    ok = start_timer(),
    {ok, #state{counters = read_counters()}}.


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
    {noreply, measure(State)};
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


%%% Measuring


-spec read_counters() -> #counters{}.
read_counters() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Ids = lists:seq(0, Shards - 1),
    #counters{
      at_us = erlang:monotonic_time(microsecond),
      admitted = [ {Shard, admitted(Shard)} || Shard <- Ids ],
      refused = lists:foldl(fun(Shard, Sums) -> add(tuple_to_list(erlmcp_nif:refused(Shard)), Sums) end, [ 0 || _ <- ?REASONS ], Ids)
     }.


-spec admitted(shard_id()) -> non_neg_integer().
admitted(Shard) ->
    {_Depth, _Threshold, Admitted, _IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    Admitted.


-spec add([non_neg_integer()], [non_neg_integer()]) -> [non_neg_integer()].
add(Counts, Sums) ->
    lists:zipwith(fun erlang:'+'/2, Counts, Sums).


-spec measure(#state{}) -> #state{}.
measure(#state{counters = Before} = State) ->
    Now = read_counters(),
    Us = max(1, Now#counters.at_us - Before#counters.at_us),
    PerSecond = fun(Count) -> (Count * 1_000_000 + Us div 2) div Us end,
    Active = [ {Shard, Is - Was}
               || {{Shard, Is}, {Shard, Was}} <- lists:zip(Now#counters.admitted, Before#counters.admitted), Is =/= Was ],
    Messages = PerSecond(lists:sum([ Count || {_Shard, Count} <- Active ])),
    Refused = lists:zipwith(fun erlang:'-'/2, Now#counters.refused, Before#counters.refused),
    MessageRates = lists:sublist([Messages | State#state.message_rates], ?WINDOW),
    RefusalRates = lists:sublist([PerSecond(lists:sum(Refused)) | State#state.refusal_rates], ?WINDOW),
    Latencies = lists:append([ erlmcp_shard_sampler:latencies_us(Shard) || {Shard, _Count} <- Active ]),
    Metrics = #{
                measured_at_ms => erlang:system_time(millisecond),
                interval_ms => max(1, Us div 1000),
                messages_per_second => Messages,
                messages_per_second_of_shards =>
                    maps:from_list([ {Shard, Rate} || {Shard, Count} <- Active, Rate <- [PerSecond(Count)], Rate > 0 ]),
                refusals_per_second => by_reason([ PerSecond(Count) || Count <- Refused ]),
                last_minute =>
                    #{
                      messages_per_second => erlmcp_shard_sampler:percentiles(MessageRates),
                      refusals_per_second => erlmcp_shard_sampler:percentiles(RefusalRates)
                     },
                latency_us => erlmcp_shard_sampler:percentiles(Latencies),
                admitted => lists:sum([ Count || {_Shard, Count} <- Now#counters.admitted ]),
                refused => by_reason(Now#counters.refused)
               },
    true = ets:insert(?MODULE, [{metrics, Metrics}, {measured_ms, erlang:monotonic_time(millisecond)}]),
    State#state{counters = Now, message_rates = MessageRates, refusal_rates = RefusalRates}.


-spec by_reason([non_neg_integer()]) -> refusals().
by_reason(Counts) ->
    maps:from_list(lists:zip(?REASONS, Counts)).
