%%% @doc Guarded routing to connections, and the process that samples the mailboxes of one shard.
%%%
%%% == Routing ==
%%% {@link route_message/2} and {@link route_batch/1} run in the calling process: one native call finds
%%% the connection and passes circuit, admission control and token bucket, then the message is sent.
%%% No manager is involved, and none needs to be alive. What one process sends to one connection
%%% arrives in the order sent.
%%%
%%% == Sampling ==
%%% A manager owns no registration. It finds out how many messages wait in its shard's mailboxes:
%%%
%%% <ul>
%%% <li>at once when a caller has used up half of the room that the last sample left;</li>
%%% <li>with every tick (`sample_interval_ms') while the shard is more than half full, or messages wait
%%% and none are admitted; with other ticks it only shows that it is there, since what was admitted
%%% is a bound already;</li>
%%% <li>when it starts.</li>
%%% </ul>
%%%
%%% When nothing waits and nothing comes it stops ticking, until the next message to its shard asks for
%%% a sample: an idle shard costs nothing.
%%%
%%% The mailboxes are looked at by a process of its own, the <em>sampler</em>, since asking a process
%%% that is busy in native code waits for it. A process that has not answered within an interval is
%%% passed over, and counts with the most that it can have: what the whole shard had the last time, and
%%% all that was admitted since.
%%%
%%% == Logs ==
%%% An overload is logged when it begins, and when the shard has refused nothing for a second: one line each,
%%% with `event' `shard_overloaded' or `shard_recovered'. A shard that comes and goes makes no more lines
%%% than one that stays.
-module(erlmcp_shard_manager).

-behaviour(gen_server).

-include_lib("kernel/include/logger.hrl").

%% Routing
-export([route_message/2, route_message/3, route_batch/1]).
-export([get_stats/1]).
%% Process
-export([start_link/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([shard_id/0]).

-type shard_id() :: erlmcp_admission_control:shard_id().

%% Latencies that are kept.
-define(LATENCIES, 128).
%% An overload that comes back before that is the same one to the log.
-define(RECOVERED_AFTER_MS, 1_000).

-record(sampling, {
          sampler :: pid(),
          monitor :: reference(),
          began :: non_neg_integer(),
          %% 1: receivers looked at; 2: messages found there.
          progress :: counters:counters_ref(),
          receivers :: [pid()],
          %% Progress at the last tick; `none' before the first one.
          looked_at = none :: none | non_neg_integer(),
          %% What samplers before this one have found, and the bounds of those that were passed over.
          found = 0 :: non_neg_integer(),
          passed_over = #{} :: #{pid() => non_neg_integer()}
         }).

-record(state, {
          shard :: shard_id(),
          timer = idle :: idle | reference(),
          sampling = none :: none | #sampling{},
          %% A sample was asked for while one is being taken.
          is_wanted = false :: boolean(),
          %% Messages admitted, and the time, at the last tick.
          ticked :: {non_neg_integer(), Ms :: integer()},
          %% Messages admitted, and messages found, at the last sample.
          sampled :: {non_neg_integer(), non_neg_integer()},
          has_sampled = false :: boolean(),
          %% Of the overload that the log tells of: whether it is one still, or since when not.
          overload = none :: none | present | {since, Ms :: integer()},
          messages_per_second = 0 :: non_neg_integer(),
          latencies_us = [] :: [non_neg_integer()],
          %% The bounds of receivers that were passed over in the last sample.
          passed_over = #{} :: #{pid() => non_neg_integer()}
         }).

%%% Routing


%% @doc Sends a message to a connection.
%%
%% The connection's bucket pays, and its shard admits. Constant time; see {@link erlmcp_backpressure}.
%% Raises `badarg' for an id that is too long to be registered.
-spec route_message(Id :: term(), Message :: term()) -> ok | {error, erlmcp_backpressure:reason()}.
route_message(Id, Message) ->
    case erlmcp_nif:route_connection(Id) of
        Pid when is_pid(Pid) ->
            Pid ! Message,
            ok;
        Other ->
            erlmcp_backpressure:deliver(Other, Message)
    end.


%% @doc As {@link route_message/2}, for a connection of a certain shard, given by its id or its manager.
%% A connection of another shard is `not_found'. Raises `badarg' if there is no such shard.
-spec route_message(shard_id() | pid(), Id :: term(), Message :: term()) ->
          ok | {error, erlmcp_backpressure:reason()}.
route_message(Manager, Id, Message) when is_pid(Manager) ->
    route_message(shard_of(Manager), Id, Message);
route_message(ShardId, Id, Message) ->
    _ = erlmcp_nif:count_shard(default, ShardId),
    case erlmcp_nif:shard(default, Id) of
        ShardId ->
            route_message(Id, Message);
        _Other ->
            ok = erlmcp_nif:count_not_found(),
            {error, not_found}
    end.


%% @doc Sends many messages, as {@link route_message/2} does one after the other. The results have the
%% order of the list.
%%
%% Costs less than one by one: the clock is read once for some hundred messages, and what their
%% look-ups wait for overlaps. The native call does so many at once and is repeated for longer lists, so
%% that none takes a millisecond. Raises `badarg' for anything but a list of pairs, before anything is sent.
-spec route_batch([{Id :: term(), Message :: term()}]) -> [ok | {error, erlmcp_backpressure:reason()}].
route_batch(Messages) ->
    case is_batch(Messages) of
        true -> slices(Messages);
        false -> error(badarg, [Messages])
    end.


-spec is_batch(term()) -> boolean().
is_batch([{_Id, _Message} | Others]) -> is_batch(Others);
is_batch(End) -> End =:= [].


%% Each slice is sent before the next one is admitted.
-spec slices([{term(), term()}]) -> [ok | {error, erlmcp_backpressure:reason()}].
slices([]) ->
    [];
slices(Messages) ->
    {Routed, Rest} = erlmcp_nif:route_batch(Messages),
    deliver_all(Routed, Messages, Rest).


-spec deliver_all([erlmcp_nif:routed()], [{term(), term()}], Rest :: [{term(), term()}]) ->
          [ok | {error, erlmcp_backpressure:reason()}].
deliver_all([Pid | Routed], [{_Id, Message} | Messages], Rest) when is_pid(Pid) ->
    Pid ! Message,
    [ok | deliver_all(Routed, Messages, Rest)];
deliver_all([Other | Routed], [{_Id, Message} | Messages], Rest) ->
    Result = erlmcp_backpressure:deliver(Other, Message),
    [Result | deliver_all(Routed, Messages, Rest)];
deliver_all([], _Messages, Rest) ->
    slices(Rest).


%% @equiv erlmcp_admission_control:get_shard_stats(ShardId)
-spec get_stats(shard_id()) -> erlmcp_admission_control:stats().
get_stats(ShardId) ->
    erlmcp_admission_control:get_shard_stats(ShardId).


-spec shard_of(pid()) -> shard_id().
shard_of(Manager) ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    IsManager = fun(Shard) -> whereis(erlmcp_backpressure:sampler(Shard)) =:= Manager end,
    case lists:search(IsManager, lists:seq(0, Shards - 1)) of
        {value, Shard} -> Shard;
        false -> error(badarg)
    end.


%%% Process


%% @doc Starts the manager of a shard of the default registry.
-spec start_link(shard_id()) -> gen_server:start_ret().
start_link(ShardId) ->
    %% Samples are short, and what they are needed for is overload.
    Options = [{spawn_opt, [{priority, high}]}],
    gen_server:start_link({local, erlmcp_backpressure:sampler(ShardId)}, ?MODULE, ShardId, Options).


%% @private
-spec init(shard_id()) -> {ok, #state{}}.
init(Shard) ->
    %% What the manager before this one has left is a bound of what it would have found.
    {Depth, _Threshold, _Admitted, _IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    Began = erlmcp_nif:sample_begin(Shard),
    State = #state{shard = Shard, ticked = {Began, now_ms()}, sampled = {Began, Depth}},
    %% One that began, or ended, while there was no manager.
    Known = case erlmcp_shard_stats:is_overload(Shard) of
                true -> State#state{overload = present};
                false -> State
            end,
    {ok, start_timer(sample(follow_overload(Known)))}.


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) -> {reply, {error, unknown_request}, #state{}}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Cast, State) ->
    {noreply, State}.


%% @private
-spec handle_info(term(), #state{}) -> {noreply, #state{}} | {noreply, #state{}, hibernate}.
handle_info(sample, State) ->
    next(start_timer(sample(resume(State))));
handle_info(overloaded, State) ->
    next(start_timer(sample(overloaded(resume(State)))));
handle_info(interval_changed, State) ->
    next(start_timer(sample(cancel_timer(State))));
handle_info({timeout, Timer, tick}, #state{timer = Timer} = State) ->
    next(tick(State#state{timer = idle}));
handle_info({'DOWN', Monitor, process, _Sampler, Reason}, #state{sampling = #sampling{monitor = Monitor}} = State) ->
    next(sampled(Reason, State));
handle_info(_Unknown, State) ->
    {noreply, State}.


%% @private
-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, _State) ->
    ok.


-spec next(#state{}) -> {noreply, #state{}} | {noreply, #state{}, hibernate}.
next(#state{timer = idle, sampling = none} = State) -> {noreply, State, hibernate};
next(State) -> {noreply, State}.


%%% Ticks


%% After a pause the next tick's rate is that of the time from here on: all that is new since the last
%% one has come just now.
-spec resume(#state{}) -> #state{}.
resume(#state{timer = idle, ticked = {Admitted, _Ms}} = State) -> State#state{ticked = {Admitted, now_ms()}};
resume(State) -> State.


-spec tick(#state{}) -> #state{}.
tick(State) ->
    sample_if_due(follow_overload(State)).


-spec sample_if_due(#state{}) -> #state{}.
sample_if_due(#state{shard = Shard, ticked = {Before, BeforeMs}} = State0) ->
    {Depth, Threshold, _Admitted, _IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    Admitted = erlmcp_nif:sample_begin(Shard),
    NowMs = now_ms(),
    State1 = State0#state{ticked = {Admitted, NowMs}},
    State = case Admitted - Before of
                0 -> State1;
                New -> publish(State1#state{messages_per_second = New * 1000 div max(1, NowMs - BeforeMs)})
            end,
    case State of
        #state{sampling = #sampling{}} ->
            ok = erlmcp_nif:sample_skip(Shard),
            start_timer(pass_over(State));
        #state{overload = none} when Threshold =:= infinity ->
            State;
        #state{overload = none, sampled = {Admitted, 0}} when Admitted =:= Before ->
            stop_ticking(State);
        #state{} when Admitted =:= Before; Depth >= Threshold div 2 ->
            start_timer(sample(State));
        #state{} ->
            ok = erlmcp_nif:sample_skip(Shard),
            start_timer(State)
    end.


%% Nothing waits, and nothing has been admitted since that was found out.
-spec stop_ticking(#state{}) -> #state{}.
stop_ticking(#state{shard = Shard, sampled = {Admitted, 0}} = State) ->
    case erlmcp_nif:sample_begin(Shard) of
        Began when Began =:= Admitted ->
            case erlmcp_nif:sample_end(Shard, Began, 0, true) of
                false -> publish(State#state{messages_per_second = 0});
                %% A message was admitted meanwhile.
                true -> start_timer(sample(State))
            end;
        _More ->
            start_timer(State)
    end.


-spec start_timer(#state{}) -> #state{}.
start_timer(#state{timer = idle} = State) ->
    State#state{timer = erlang:start_timer(erlmcp_backpressure:sample_interval_ms(), self(), tick)};
start_timer(State) ->
    State.


%% A tick that is under way is ignored.
-spec cancel_timer(#state{}) -> #state{}.
cancel_timer(#state{timer = idle} = State) ->
    State;
cancel_timer(#state{timer = Timer} = State) ->
    _ = erlang:cancel_timer(Timer),
    State#state{timer = idle}.


%%% Samples


-spec sample(#state{}) -> #state{}.
sample(#state{sampling = #sampling{}} = State) ->
    State#state{is_wanted = true};
sample(#state{shard = Shard} = State) ->
    %% The count comes first: what is admitted from here on counts in addition to what is found.
    Began = erlmcp_nif:sample_begin(Shard),
    Receivers = lists:usort(receivers(Shard)),
    State#state{sampling = start_sampler(Began, Receivers), is_wanted = false}.


-spec receivers(shard_id()) -> [pid()].
receivers(Shard) ->
    case erlmcp_nif:shard_receivers(Shard) of
        dirty -> erlmcp_nif:shard_receivers_dirty(Shard);
        Pids -> Pids
    end.


-spec start_sampler(non_neg_integer(), [pid()]) -> #sampling{}.
start_sampler(Began, Receivers) ->
    Progress = counters:new(2, []),
    {Sampler, Monitor} =
        spawn_opt(fun() -> look_at(Receivers, Progress) end, [monitor, {priority, high}]),
    #sampling{
      sampler = Sampler,
      monitor = Monitor,
      began = Began,
      progress = Progress,
      receivers = Receivers
     }.


-spec look_at([pid()], counters:counters_ref()) -> ok.
look_at(Receivers, Progress) ->
    lists:foreach(fun(Pid) ->
                          ok = counters:add(Progress, 2, mailbox(Pid)),
                          ok = counters:add(Progress, 1, 1)
                  end,
                  Receivers).


-spec mailbox(pid()) -> non_neg_integer().
mailbox(Pid) ->
    case process_info(Pid, message_queue_len) of
        {message_queue_len, Length} -> Length;
        undefined -> 0
    end.


%% The sampler has ended.
-spec sampled(term(), #state{}) -> #state{}.
sampled(normal, #state{shard = Shard, sampling = Sampling, is_wanted = IsWanted} = State0) ->
    #sampling{began = Began, progress = Progress, found = Found, passed_over = PassedOver} = Sampling,
    Queued = Found + counters:get(Progress, 2),
    State1 = State0#state{sampling = none, sampled = {Began, Queued}, passed_over = PassedOver},
    IsUsedUp = erlmcp_nif:sample_end(Shard, Began, Queued, false),
    State = tell_first_sample(publish(add_latency(Queued, State1))),
    case IsWanted orelse IsUsedUp of
        true -> start_timer(sample(State));
        false -> start_timer(State)
    end;
sampled(_Killed, State) ->
    %% Somebody has killed it. The next tick takes another sample.
    start_timer(State#state{sampling = none}).


%% A tick has come during a sample. If the sampler has not got on since the last one, the process that
%% it waits for is passed over.
-spec pass_over(#state{}) -> #state{}.
pass_over(#state{sampling = Sampling} = State) ->
    #sampling{progress = Progress, receivers = Receivers, looked_at = Before} = Sampling,
    %% Read once: the sampler may get on at any time.
    case counters:get(Progress, 1) of
        Before when Before < length(Receivers) ->
            State#state{sampling = without_next(Before, Sampling, State)};
        LookedAt ->
            State#state{sampling = Sampling#sampling{looked_at = LookedAt}}
    end.


-spec without_next(non_neg_integer(), #sampling{}, #state{}) -> #sampling{}.
without_next(LookedAt, Sampling, #state{sampled = {SampledAt, Queued}, passed_over = Bounds}) ->
    #sampling{sampler = Sampler, monitor = Monitor, began = Began, progress = Progress, receivers = Receivers} = Sampling,
    true = demonitor(Monitor, [flush]),
    true = exit(Sampler, kill),
    [Busy | Others] = lists:nthtail(LookedAt, Receivers),
    Bound = maps:get(Busy, Bounds, Queued) + max(0, Began - SampledAt),
    Next = start_sampler(Began, Others),
    Next#sampling{
      %% It has the whole interval until the next tick.
      looked_at = 0,
      found = Sampling#sampling.found + counters:get(Progress, 2) + Bound,
      passed_over = (Sampling#sampling.passed_over)#{Busy => Bound}
     }.


-spec add_latency(non_neg_integer(), #state{}) -> #state{}.
add_latency(_Queued, #state{messages_per_second = 0} = State) ->
    State;
add_latency(Queued, #state{messages_per_second = Rate, latencies_us = Latencies} = State) ->
    State#state{latencies_us = lists:sublist([Queued * 1_000_000 div Rate | Latencies], ?LATENCIES)}.


-spec publish(#state{}) -> #state{}.
publish(#state{shard = Shard, messages_per_second = Rate, latencies_us = Latencies} = State) ->
    ok = erlmcp_shard_stats:insert(Shard, Rate, Latencies),
    State.


-spec tell_first_sample(#state{}) -> #state{}.
tell_first_sample(#state{shard = Shard, has_sampled = false} = State) ->
    ok = erlmcp_shard_stats:has_sampled(Shard),
    State#state{has_sampled = true};
tell_first_sample(State) ->
    State.


%%% The log of overloads


%% A caller was the first one to be refused.
-spec overloaded(#state{}) -> #state{}.
overloaded(#state{shard = Shard, overload = none} = State) ->
    ok = erlmcp_shard_stats:set_overload(Shard, true),
    ?LOG_WARNING("erlmcp_native: shard ~b is overloaded: its receivers have as many messages queued as "
                 "it admits, and further ones are refused until they have caught up",
                 [Shard],
                 #{domain => [erlmcp_native], event => shard_overloaded, shard_id => Shard}),
    State#state{overload = present};
overloaded(State) ->
    State#state{overload = present}.


-spec follow_overload(#state{}) -> #state{}.
follow_overload(#state{shard = Shard, overload = Overload} = State) ->
    {_Depth, _Threshold, _Admitted, IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    case {IsOverloaded, Overload} of
        {true, _} ->
            overloaded(State);
        {false, none} ->
            State;
        {false, present} ->
            State#state{overload = {since, now_ms()}};
        {false, {since, SinceMs}} ->
            case now_ms() - SinceMs >= ?RECOVERED_AFTER_MS of
                true -> recovered(State);
                false -> State
            end
    end.


-spec recovered(#state{}) -> #state{}.
recovered(#state{shard = Shard} = State) ->
    ok = erlmcp_shard_stats:set_overload(Shard, false),
    ?LOG_NOTICE("erlmcp_native: shard ~b has recovered from overload",
                [Shard],
                #{domain => [erlmcp_native], event => shard_recovered, shard_id => Shard}),
    State#state{overload = none}.


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).
