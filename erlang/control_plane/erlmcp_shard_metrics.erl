%%% @doc Metrics: all counts at the moment of a call, and once a second their rates and percentiles.
%%%
%%% Routes count admitted and refused messages in native memory, and no caller waits for a process. {@link snapshot/0}
%%% reads these counts. {@link get/0} has the rates of the last second, which the process of this module computes:
%%% differences of counts divided by the time that has really passed, so a late measurement makes no peak.
%%%
%%% == What is counted ==
%%% Each message to one target, once, in every setting of backpressure; a broadcast or a message to a group once for each
%%% target. A message that a caller routes by itself (`native') is counted when it is admitted or refused. With layers
%%% switched off this takes some 3 ns of a route. A message that the registry's process routes (`process': in the mode
%%% `current', and a share of them in `{percent, P}'; {@link erlmcp_rollout}) is counted there when it is sent. It passes no
%%% layer and no shard. {@link get/0} has no such messages.
%%%
%%% A message to a process of another node that could not be sent (`noconnection', `busy') is counted as `ok'. A message to
%%% a pid or a `via' name does not pass a route, and is not counted.
-module(erlmcp_shard_metrics).

-behaviour(gen_server).

-export([get/0, snapshot/0, age_ms/0]).
-export([admitted/1, refused/1]).
%% Process
-export([start_link/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([metrics/0, refusals/0, snapshot/0, shard/0, messages/0, group/0]).

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

%% Messages by status.
-type messages() :: #{
                      ok := non_neg_integer(),
                      not_found := non_neg_integer(),
                      circuit_open := non_neg_integer(),
                      shard_overloaded := non_neg_integer(),
                      rate_limited := non_neg_integer(),
                      store_full := non_neg_integer()
                     }.
-type shard() :: #{
                   messages := messages(),
                   servers := non_neg_integer(),
                   transports := non_neg_integer(),
                   connections := non_neg_integer(),
                   memberships := non_neg_integer(),
                   queue_depth := non_neg_integer(),
                   threshold := pos_integer() | infinity,
                   is_overloaded := boolean(),
                   estimated_queueing_us => erlmcp_admission_control:percentiles()
                  }.
-type snapshot() :: #{
                      read_at_ms := integer(),
                      left_out := [group()],
                      mode := erlmcp_rollout:mode(),
                      rollout_version := non_neg_integer(),
                      messages :=
                          #{
                            native => messages(),
                            process := #{ok := non_neg_integer(), not_found := non_neg_integer()}
                           },
                      memory_bytes :=
                          #{
                            capability_store := non_neg_integer(),
                            message_stores => non_neg_integer()
                           },
                      shards => #{shard_id() => shard()},
                      servers => non_neg_integer(),
                      transports => non_neg_integer(),
                      connections => non_neg_integer(),
                      memberships => non_neg_integer(),
                      circuit =>
                          #{
                            state := erlmcp_circuit_breaker:node_state(),
                            transitions := #{erlmcp_circuit_breaker:state() => non_neg_integer()}
                           },
                      named_breakers => #{erlmcp_circuit_breaker:state() => non_neg_integer()},
                      message_stores => erlmcp_message_store:totals(),
                      shard_managers =>
                          #{
                            restarts := non_neg_integer(),
                            mean_downtime_us := non_neg_integer(),
                            worst_downtime_us := non_neg_integer(),
                            down := non_neg_integer()
                           }
                     }.
%% What a snapshot may leave out.
-type group() :: native | queueing | named_breakers | shard_managers.

-define(INTERVAL_MS, 1_000).
%% Named breakers whose states a snapshot reads.
-define(MAX_BREAKERS, 1_000).
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
%% estimated time that messages wait in the mailboxes of the shards with traffic, from the last samples of their
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


%% @doc All counts and gauges, read at the moment of the call. Asks no process, whatever of the application runs.
%%
%% <ul>
%% <li>`messages': by the path that they took and by status. `native' is the sum over the shards. A message to an id that is
%% not registered counts in an arbitrary shard, since the id has none: only the sum of `not_found' means something.</li>
%% <li>`shards': for each shard its messages, entries and {@link erlmcp_admission_control:load/1}. `estimated_queueing_us' is
%% computed and not measured: messages waiting at the last samples of the shard, divided by its rate (Little's law). A shard
%% without traffic has none.</li>
%% <li>`circuit': the node's circuit, and how often it changed to each state. A circuit counts as half open from its first
%% probe on.</li>
%% <li>`named_breakers': how many are in each state ({@link erlmcp_circuit_breaker}).</li>
%% <li>`memory_bytes': what the stores of capabilities and of messages hold.</li>
%% <li>`shard_managers': restarts since the application was started, and their downtimes
%% ({@link erlmcp_shard_recovery}).</li>
%% </ul>
%%
%% `left_out' names what is missing: `native' (shards, entries, circuit, message stores and the `native' messages) where the
%% native library is not loaded; `queueing' while the application does not run, since nothing samples then; `named_breakers' if
%% there are more than 1,000; `shard_managers' while the process that observes restarts does not run.
%%
%% Counts never go back, except that those of shard managers begin anew with the application. They are read one after the
%% other, so they are not those of one moment. On the calling scheduler, in proportion to the shards: 0.4 ms for 64
%% and 3 ms for 1,024 on a 2-core machine; counting what message stores hold costs in proportion to them, on a dirty scheduler, and the names of breakers
%% are listed.
-spec snapshot() -> snapshot().
snapshot() ->
    Plan = erlmcp_rollout_path:read(),
    #{bytes := CapabilityBytes} = erlmcp_capability_store:info(),
    Common = #{
               read_at_ms => erlang:system_time(millisecond),
               left_out => [],
               mode => erlmcp_rollout_path:mode(Plan),
               rollout_version => erlmcp_rollout_path:version(Plan),
               messages => #{process => erlmcp_delivery:counts()},
               memory_bytes => #{capability_store => CapabilityBytes}
              },
    Groups = [{native, fun native/1},
              {queueing, fun queueing/1},
              {named_breakers, fun named_breakers/1},
              {shard_managers, fun shard_managers/1}],
    lists:foldl(fun({Group, Add}, #{left_out := LeftOut} = Snapshot) ->
                        case Add(Snapshot) of
                            none -> Snapshot#{left_out := LeftOut ++ [Group]};
                            More -> More
                        end
                end,
                Common,
                Groups).


-spec native(map()) -> map() | none.
native(#{messages := Messages, memory_bytes := MemoryBytes} = Snapshot) ->
    case erlmcp_nif:load_error() of
        none ->
            Shards = maps:from_list([ {Id, shard(Id)} || Id <- shard_ids() ]),
            All = maps:values(Shards),
            #{bytes := StoreBytes} = Stores = erlmcp_message_store:totals(),
            Entries = sum([ maps:with([servers, transports, connections, memberships], Shard) || Shard <- All ]),
            (maps:merge(Snapshot, Entries))#{
              messages := Messages#{native => sum([ OfShard || #{messages := OfShard} <- All ])},
              memory_bytes := MemoryBytes#{message_stores => StoreBytes},
              message_stores => Stores,
              shards => Shards,
              circuit => maps:with([state, transitions], erlmcp_circuit_breaker:node_stats())
             };
        _NotLoaded ->
            none
    end.


-spec shard_ids() -> [shard_id()].
shard_ids() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    lists:seq(0, Shards - 1).


-spec sum([#{Key => non_neg_integer()}, ...]) -> #{Key => non_neg_integer()}.
sum([First | Others]) ->
    Add = fun(_Key, One, Other) -> One + Other end,
    lists:foldl(fun(Map, Sum) -> maps:merge_with(Add, Map, Sum) end, First, Others).


-spec queueing(map()) -> map() | none.
queueing(#{shards := Shards} = Snapshot) ->
    case whereis(erlmcp_native_sup) of
        undefined -> none;
        _Runs -> Snapshot#{shards := maps:map(fun with_queueing/2, Shards)}
    end;
queueing(_WithoutNative) ->
    none.


-spec with_queueing(shard_id(), shard()) -> shard().
with_queueing(Id, Shard) ->
    case erlmcp_shard_sampler:lookup(Id) of
        {0, _Former} -> Shard;
        {_MessagesPerSecond, LatencyUs} -> Shard#{estimated_queueing_us => LatencyUs}
    end.


-spec named_breakers(map()) -> map() | none.
named_breakers(Snapshot) ->
    case erlmcp_circuit_breaker:count_states(?MAX_BREAKERS) of
        too_many -> none;
        States -> Snapshot#{named_breakers => States}
    end.


-spec shard_managers(map()) -> map() | none.
shard_managers(Snapshot) ->
    case whereis(erlmcp_shard_recovery) of
        undefined ->
            none;
        _Observes ->
            #{
              count := Observed,
              unobserved_count := Unobserved,
              mean_us := MeanUs,
              worst_us := WorstUs,
              down := Down
             } = erlmcp_shard_recovery:downtimes(),
            Snapshot#{
              shard_managers =>
                  #{
                    restarts => Observed + Unobserved,
                    mean_downtime_us => MeanUs,
                    worst_downtime_us => WorstUs,
                    down => length(Down)
                   }
             }
    end.


-spec shard(shard_id()) -> shard().
shard(Id) ->
    {Servers, Transports, Connections, Memberships} = erlmcp_nif:count_shard(default, Id),
    {Depth, Threshold, IsOverloaded} = erlmcp_admission_control:load(Id),
    #{
      messages => (refused(Id))#{ok => admitted(Id)},
      servers => Servers,
      transports => Transports,
      connections => Connections,
      memberships => Memberships,
      queue_depth => Depth,
      threshold => Threshold,
      is_overloaded => IsOverloaded
     }.


%% @private
%% The messages that a shard has admitted.
-spec admitted(shard_id()) -> non_neg_integer().
admitted(Shard) ->
    erlmcp_nif:admitted(Shard).


%% @private
%% The messages that a shard has refused.
-spec refused(shard_id()) -> refusals().
refused(Shard) ->
    by_reason(tuple_to_list(erlmcp_nif:refused(Shard))).


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
    Ids = shard_ids(),
    #counters{
      at_us = erlang:monotonic_time(microsecond),
      admitted = [ {Shard, admitted(Shard)} || Shard <- Ids ],
      refused = lists:foldl(fun(Shard, Sums) -> add(tuple_to_list(erlmcp_nif:refused(Shard)), Sums) end, [ 0 || _ <- ?REASONS ], Ids)
     }.


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
