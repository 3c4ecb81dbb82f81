%%% @doc Guarded routing to connections, and the process that samples the mailboxes of one shard.
%%%
%%% == Routing ==
%%% {@link route_message/2} and {@link route_batch/1} run in the calling process: one native call finds
%%% the connection and passes circuit, admission control and token bucket, then the message is sent.
%%% No manager is involved, and none needs to be alive. Messages from one process to one connection
%%% arrive in the order sent.
%%%
%%% == Sampling ==
%%% A manager owns no registration. It starts a process, the <em>sampler</em>, which reads the mailbox lengths of the
%%% receivers that were sent something and have not been seen empty since:
%%%
%%% <ul>
%%% <li>at once when the shard's depth has come to three quarters of its threshold: in turn, receivers that were sent
%%% something since their last sample, until the depth is below five eighths; or when one receiver has
%%% half of its maximum charge: only that receiver;</li>
%%% <li>with every tick (`sample_interval_ms') while the shard is overloaded, or nothing is admitted and some
%%% receivers have not been seen empty, or there are many more of these than receivers, most of which have exited then: in
%%% turn, as many as there is time for; other ticks only show that the manager is alive, since the count of admitted messages
%%% is a bound already, and take the samples whose request was lost with its caller;</li>
%%% <li>when it starts.</li>
%%% </ul>
%%%
%%% The result of each batch of samples takes effect by itself, in native memory. A sampler that is killed loses
%%% nothing: its receivers keep their charge, and the next sampler samples them. When nothing waits and nothing is
%%% admitted the manager stops ticking, until the next message to its shard requests a sample: an idle shard costs
%%% nothing.
%%%
%%% == Priority ==
%%% Samples must not wait behind the load that they make room for: with 200 senders and 15,000 receivers there are
%%% 14,000 processes in the run queues (measured on 2 cores), each turn takes 60 ms, and a shard of 10,000 has been
%%% filled by then. So samples have high priority where they are bounded: a pass that callers have requested samples
%%% one mailbox for eight messages at most (in practice one for 40 or more), and all ticks together take 2 % of the
%%% time. In a shard so full that samples are requested after every few messages they have normal priority.
%%%
%%% The sampler waits for a process that is busy in native code. A process that has not answered within an interval
%%% is skipped, and keeps its charge.
%%%
%%% == Logs ==
%%% An overload is logged when it begins, and when the shard has refused nothing for a second: one line each,
%%% with `event' `shard_overloaded' or `shard_recovered'. A shard that is overloaded again and again makes no more
%%% lines than one that stays overloaded.
-module(erlmcp_shard_manager).

-behaviour(gen_server).

%% Routing
-export([route_message/2, route_message/3, route_batch/1]).
-export([set_delivery/2, delivery/1]).
%% Explanations of errors
-export([format_error/2]).
-export([get_stats/1]).
%% Process
-export([start_link/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-export_type([shard_id/0]).

-type shard_id() :: erlmcp_admission_control:shard_id().

%% The number of latencies that are kept.
-define(LATENCIES, 128).
%% An overload that returns before this time is logged as the same overload.
-define(RECOVERED_AFTER_MS, 1_000).

%% The share of the processors' time that all shards together spend on samples by ticks. Samples that callers have
%% requested come in addition, in proportion to messages.
-define(TICK_PERCENT, 2).
%% The key in a sampler's dictionary for the receiver that it waits for.
-define(RECEIVER, receiver).

-record(sampling, {
          sampler :: pid(),
          monitor :: reference(),
          pass :: asked | all,
          priority :: high | normal,
          %% The receiver that the sampler waited for at the last tick; `none' before the first one.
          asked = none :: none | pid(),
          %% Receivers that have not answered during this pass.
          passed_over = [] :: [pid()]
         }).

-record(state, {
          shard :: shard_id(),
          timer = idle :: idle | reference(),
          sampling = none :: none | #sampling{},
          %% A sample was requested while one is being taken.
          is_wanted = false :: boolean(),
          %% Messages admitted, and the time, at the last tick.
          ticked :: {non_neg_integer(), Ms :: integer()},
          has_sampled = false :: boolean(),
          %% The overload whose start was logged and its end not yet: still present, or over since a time.
          overload = none :: none | present | {since, Ms :: integer()},
          messages_per_second = 0 :: non_neg_integer(),
          latencies_us = [] :: [non_neg_integer()]
         }).

%%% Routing


%% @doc Sends a message to a connection.
%%
%% The connection's bucket is charged, and its shard admits. Constant time, and for a connection with a message store in
%% addition {@link erlmcp_message_store:push/2}; see {@link erlmcp_native}.
%% Raises `badarg' for an id that is too long to be registered.
-spec route_message(Id :: term(), Message :: term()) -> ok | {error, erlmcp_delivery:reason()}.
route_message(Id, Message) ->
    case erlmcp_nif:route_connection(Id) of
        Pid when is_pid(Pid), node(Pid) =:= node() ->
            Pid ! Message,
            ok;
        stored ->
            route_by_lease(Id, Message);
        Other ->
            erlmcp_delivery:deliver(Other, Message)
    end.


%% To a connection with a message store.
-spec route_by_lease(Id :: term(), Message :: term()) -> ok | {error, erlmcp_delivery:reason()}.
route_by_lease(Id, Message) ->
    erlmcp_delivery:deliver(erlmcp_nif:route_by_lease(Id, Message), Message).


%% @doc As {@link route_message/2}, for a connection of a certain shard, given by its id or its manager.
%% A connection of another shard is `not_found'. Raises `badarg' if there is no such shard.
-spec route_message(shard_id() | pid(), Id :: term(), Message :: term()) ->
          ok | {error, erlmcp_delivery:reason()}.
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
%% Costs less than single calls: the clock is read once for some hundred messages, and the cache misses of the
%% look-ups overlap. The native call handles so many at once and is repeated for longer lists, so
%% that no call takes a millisecond. Raises `badarg' for anything but a list of pairs, before anything is sent.
-spec route_batch([{Id :: term(), Message :: term()}]) -> [ok | {error, erlmcp_delivery:reason()}].
route_batch(Messages) ->
    case is_batch(Messages) of
        true -> slices(Messages);
        false -> error(badarg, [Messages])
    end.


-spec is_batch(term()) -> boolean().
is_batch([{_Id, _Message} | Others]) -> is_batch(Others);
is_batch(End) -> End =:= [].


%% Each slice is sent before the next one is admitted.
-spec slices([{term(), term()}]) -> [ok | {error, erlmcp_delivery:reason()}].
slices([]) ->
    [];
slices(Messages) ->
    {Routed, Rest, Lists} = erlmcp_nif:route_batch(Messages),
    deliver_all(Routed, Messages, Rest, Lists).


-spec deliver_all([Routed | {Routed, [erlmcp_nif:event()]}], [{term(), term()}], Rest :: [{term(), term()}], [{pid(), [term()]}]) ->
          [ok | {error, erlmcp_delivery:reason()}]
              when Routed :: erlmcp_nif:route() | stored | batched.
deliver_all([Pid | Routed], [{_Id, Message} | Messages], Rest, Lists) when is_pid(Pid), node(Pid) =:= node() ->
    Pid ! Message,
    [ok | deliver_all(Routed, Messages, Rest, Lists)];
deliver_all([batched | Routed], [_Message | Messages], Rest, Lists) ->
    [ok | deliver_all(Routed, Messages, Rest, Lists)];
deliver_all([stored | Routed], [{Id, Message} | Messages], Rest, Lists) ->
    Result = route_by_lease(Id, Message),
    [Result | deliver_all(Routed, Messages, Rest, Lists)];
deliver_all([Other | Routed], [{_Id, Message} | Messages], Rest, Lists) ->
    Result = erlmcp_delivery:deliver(Other, Message),
    [Result | deliver_all(Routed, Messages, Rest, Lists)];
deliver_all([], _Messages, Rest, Lists) ->
    ok = send_lists(Lists),
    slices(Rest).


-spec send_lists([{pid(), [term()]}]) -> ok.
send_lists([]) ->
    ok;
send_lists([{Pid, Messages} | Lists]) ->
    Pid ! {erlmcp_batch, Messages},
    send_lists(Lists).


%%% Delivery


%% @doc Changes how routed messages get to a connection of the calling process.
%%
%% <ul>
%% <li>`mailbox': each is sent to the process. So it is for a connection that has just been registered.</li>
%% <li>`{batch, N}' (2 to 256): those messages of one {@link route_batch/1} that go to this process are sent to it as one,
%% `{erlmcp_batch, Messages}', up to `N' in a list, in order. It is woken once for many. This pays where several
%% messages of a batch go to one process; where each goes to another one, lists cost more than the mailbox. Other routes send
%% each message as it is. To admission control a list that waits is one message, once its receiver was sampled.</li>
%% <li>`{store, Capacity}' or `{store, Options}': messages go to a message store of which the calling process is the consumer
%% ({@link erlmcp_message_store:new/1} names the options), and which is returned. The process is woken by
%% `{erlmcp_message_store, ready, Store}', and gets the messages by {@link erlmcp_message_store:drain/2}. A route to a full store
%% returns `{error, store_full}'. Admission control counts what waits in the store exactly, without a look at
%% the mailbox. The connection's store may be pushed to directly too; those messages count as well. With other bounds the
%% same store gets these.</li>
%% </ul>
%%
%% From a store back to another delivery: as long as the store holds messages, the next ones go there too. It is closed when
%% {@link erlmcp_message_store:drain/2} finds it empty. So the messages of each sender come in order, and all have to be
%% drained. From the mailbox to a store a message that was on its way may arrive after later ones of its sender: a process that
%% minds chooses the store before its id is known to senders.
%%
%% The delivery ends with the registration: another process with the same id, or a new registration of this one, begins with
%% `mailbox'. Only guarded routes follow it, those of this module. Messages to the pid, `via' names, broadcasts and groups go to
%% the mailbox. With another delivery than `mailbox' the connection takes some 80 bytes more, besides the store.
%%
%% `{error, not_held}': the calling process has no connection with this id. Constant time. Raises `badarg' for what is no
%% delivery, `{bad_option, Key, Value, Expected}' for options that no store can have, and `system_limit' for a process that
%% consumes 1,000 stores already, after a garbage collection and a tenth of a second.
-spec set_delivery(Id :: term(), mailbox | {batch, 2..256} | {store, pos_integer() | erlmcp_message_store:options()}) ->
          ok | {ok, erlmcp_message_store:store()} | {error, not_held}.
set_delivery(Id, {store, Options}) ->
    case erlmcp_message_store:of_connection(Id, Options) of
        not_held -> {error, not_held};
        Store -> {ok, Store}
    end;
set_delivery(Id, Delivery) when Delivery =:= mailbox; tuple_size(Delivery) =:= 2, element(1, Delivery) =:= batch ->
    try erlmcp_nif:set_delivery(Id, Delivery) of
        not_held -> {error, not_held};
        ok -> ok
    catch
        error:badarg -> error(badarg, [Id, Delivery], [{error_info, #{module => ?MODULE}}])
    end;
set_delivery(Id, Delivery) ->
    error(badarg, [Id, Delivery], [{error_info, #{module => ?MODULE}}]).


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, set_delivery, [_Id, {batch, N}], _Info} | _]) when is_integer(N), N >= 2, N =< 256 ->
    #{1 => "not an id: too long, or with a fun in it"};
format_error(_Reason, [{?MODULE, set_delivery, [_Id, mailbox], _Info} | _]) ->
    #{1 => "not an id: too long, or with a fun in it"};
format_error(_Reason, [{?MODULE, set_delivery, [_Id, _Delivery], _Info} | _]) ->
    #{2 => "not mailbox, {batch, 2 to 256}, or {store, Capacity or Options}"};
format_error(_Reason, _Stacktrace) ->
    #{}.


%% @doc How routed messages get to a connection, as {@link set_delivery/2} has it. A store that is to be left is named as long as
%% it gets messages.
-spec delivery(Id :: term()) ->
          {ok, mailbox | {batch, 2..256} | {store, erlmcp_message_store:store()}} | {error, not_found}.
delivery(Id) ->
    case erlmcp_nif:delivery(Id) of
        not_found -> {error, not_found};
        Delivery -> {ok, Delivery}
    end.


%% @equiv erlmcp_admission_control:get_shard_stats(ShardId)
-spec get_stats(shard_id()) -> erlmcp_admission_control:stats().
get_stats(ShardId) ->
    erlmcp_admission_control:get_shard_stats(ShardId).


-spec shard_of(pid()) -> shard_id().
shard_of(Manager) ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    IsManager = fun(Shard) -> whereis(erlmcp_shard_sampler:name(Shard)) =:= Manager end,
    case lists:search(IsManager, lists:seq(0, Shards - 1)) of
        {value, Shard} -> Shard;
        false -> error(badarg)
    end.


%%% Process


%% @doc Starts the manager of a shard of the default registry.
-spec start_link(shard_id()) -> gen_server:start_ret().
start_link(ShardId) ->
    %% A manager has little to do at a time, and has to do it under overload.
    Options = [{spawn_opt, [{priority, high}]}],
    gen_server:start_link({local, erlmcp_shard_sampler:name(ShardId)}, ?MODULE, ShardId, Options).


%% @private
-spec init(shard_id()) -> {ok, #state{}}.
init(Shard) ->
    {_Depth, _Threshold, Admitted, _IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    State = #state{shard = Shard, ticked = {Admitted, now_ms()}},
    %% An overload may have begun or ended while there was no manager.
    Known = case erlmcp_shard_sampler:is_overload(Shard) of
                true -> State#state{overload = present};
                false -> State
            end,
    {ok, start_timer(sample(all, follow_overload(Known)))}.


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
    next(start_timer(sample(asked, resume(State))));
handle_info(overloaded, State) ->
    next(start_timer(sample(all, overloaded(resume(State)))));
handle_info(interval_changed, State) ->
    next(start_timer(sample(all, cancel_timer(State))));
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


%% After a pause the rate at the next tick is computed from now on: all messages since the last tick
%% have been admitted just now.
-spec resume(#state{}) -> #state{}.
resume(#state{timer = idle, ticked = {Admitted, _Ms}} = State) -> State#state{ticked = {Admitted, now_ms()}};
resume(State) -> State.


-spec tick(#state{}) -> #state{}.
tick(State) ->
    sample_if_due(follow_overload(State)).


-spec sample_if_due(#state{}) -> #state{}.
sample_if_due(#state{shard = Shard, ticked = {Before, BeforeMs}} = State0) ->
    {_Depth, Threshold, Admitted, _IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    NowMs = now_ms(),
    State1 = State0#state{ticked = {Admitted, NowMs}},
    State = case Admitted - Before of
                0 -> State1;
                New -> publish(State1#state{messages_per_second = New * 1000 div max(1, NowMs - BeforeMs)})
            end,
    case State of
        #state{sampling = #sampling{}} ->
            _ = erlmcp_nif:sample_skip(Shard),
            start_timer(pass_over(State));
        #state{has_sampled = false} ->
            %% Another sampler was in the way, and recovery waits for the first sample.
            start_timer(sample(all, State));
        #state{overload = none} when Threshold =:= infinity ->
            State;
        #state{overload = none} when Admitted =:= Before ->
            pause(State);
        #state{overload = Overload} when Overload =/= none ->
            start_timer(sample(all, State));
        #state{} ->
            case erlmcp_nif:sample_skip(Shard) of
                none -> start_timer(State);
                %% The caller that was to request them may have been killed; or there are records of processes that have
                %% exited.
                Pass -> start_timer(sample(Pass, State))
            end
    end.


%% Nothing was admitted. Stops ticking if nothing waits.
-spec pause(#state{}) -> #state{}.
pause(#state{shard = Shard} = State) ->
    case erlmcp_nif:sample_pause(Shard) of
        true -> publish(State#state{messages_per_second = 0});
        false -> start_timer(sample(all, State))
    end.


-spec start_timer(#state{}) -> #state{}.
start_timer(#state{timer = idle} = State) ->
    State#state{timer = erlang:start_timer(erlmcp_shard_sampler:interval_ms(), self(), tick)};
start_timer(State) ->
    State.


%% A tick that is already on its way is ignored.
-spec cancel_timer(#state{}) -> #state{}.
cancel_timer(#state{timer = idle} = State) ->
    State;
cancel_timer(#state{timer = Timer} = State) ->
    _ = erlang:cancel_timer(Timer),
    State#state{timer = idle}.


%%% Samples


-spec sample(asked | all, #state{}) -> #state{}.
sample(_Pass, #state{sampling = #sampling{}} = State) ->
    State#state{is_wanted = true};
sample(Pass, #state{shard = Shard} = State) ->
    %% If another sampler makes a pass, the next tick tries again.
    case erlmcp_nif:sample_begin(Shard, Pass) of
        busy -> State#state{is_wanted = false};
        Priority -> State#state{sampling = start_sampler(Shard, Pass, Priority, []), is_wanted = false}
    end.


-spec start_sampler(shard_id(), asked | all, high | normal, [pid()]) -> #sampling{}.
start_sampler(Shard, Pass, Priority, PassedOver) ->
    EndNs = end_ns(Pass),
    {Sampler, Monitor} = spawn_opt(fun() -> look(Shard, EndNs, PassedOver) end, [monitor, {priority, Priority}]),
    #sampling{sampler = Sampler, monitor = Monitor, pass = Pass, priority = Priority, passed_over = PassedOver}.


%% A pass of a tick has its share of the time, and takes one batch of samples at least. The next pass continues there.
-spec end_ns(asked | all) -> integer() | infinity.
end_ns(asked) ->
    infinity;
end_ns(all) ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    TickNs = erlmcp_shard_sampler:interval_ms() * 1_000_000 * erlang:system_info(schedulers_online),
    now_ns() + TickNs * ?TICK_PERCENT div (100 * Shards).


-spec look(shard_id(), EndNs :: integer() | infinity, [pid()]) -> no_return().
look(Shard, EndNs, PassedOver) ->
    look(Shard, EndNs, PassedOver, erlmcp_nif:sample_take(Shard, false)).


-spec look(shard_id(), integer() | infinity, [pid()], Taken) -> no_return()
              when Taken :: {non_neg_integer(), [pid()]} | done | due | busy.
look(Shard, EndNs, PassedOver, {Batch, Receivers}) ->
    Lengths = [ mailbox(Pid, PassedOver) || Pid <- Receivers ],
    _ = Receivers =/= [] andalso erlmcp_nif:sample_report(Shard, Batch, Lengths),
    %% No integer is greater than an atom.
    look(Shard, EndNs, PassedOver, erlmcp_nif:sample_take(Shard, now_ns() > EndNs));
look(Shard, _EndNs, _PassedOver, End) ->
    ok = count_receivers(Shard),
    exit(End).


-spec mailbox(pid(), PassedOver :: [pid()]) -> non_neg_integer() | none.
mailbox(Pid, PassedOver) ->
    _ = put(?RECEIVER, Pid),
    case PassedOver =/= [] andalso lists:member(Pid, PassedOver) of
        true ->
            none;
        false ->
            case process_info(Pid, message_queue_len) of
                {message_queue_len, Length} -> Length;
                undefined -> 0
            end
    end.


%% Updates the count that a threshold of `auto' depends on, when enough has changed.
-spec count_receivers(shard_id()) -> ok.
count_receivers(Shard) ->
    case erlmcp_nif:is_receiver_count_due(Shard) of
        true -> erlmcp_admission_control:count_receivers(Shard);
        false -> ok
    end.


%% The sampler has exited.
-spec sampled(term(), #state{}) -> #state{}.
sampled(End, #state{shard = Shard, is_wanted = IsWanted} = State0) when End =:= done; End =:= due ->
    {Depth, _Threshold, _Admitted, _IsOverloaded, _Age} = erlmcp_nif:admission_stats(Shard),
    State = tell_first_sample(publish(add_latency(Depth, State0#state{sampling = none}))),
    case IsWanted orelse End =:= due of
        true -> start_timer(sample(asked, State));
        false -> start_timer(State)
    end;
sampled(_KilledOrBusy, State) ->
    %% The next tick takes another sample.
    start_timer(State#state{sampling = none}).


%% A tick has come during a sample. If the sampler still waits for the same receiver as at the last tick,
%% this receiver is skipped.
-spec pass_over(#state{}) -> #state{}.
pass_over(#state{shard = Shard, sampling = Sampling} = State) ->
    #sampling{
      sampler = Sampler,
      monitor = Monitor,
      pass = Pass,
      priority = Priority,
      asked = Before,
      passed_over = PassedOver
     } = Sampling,
    case asked(Sampler) of
        Before when is_pid(Before) ->
            true = demonitor(Monitor, [flush]),
            true = exit(Sampler, kill),
            State#state{sampling = start_sampler(Shard, Pass, Priority, [Before | PassedOver])};
        Asked ->
            State#state{sampling = Sampling#sampling{asked = Asked}}
    end.


-spec asked(pid()) -> pid() | none.
asked(Sampler) ->
    case process_info(Sampler, dictionary) of
        {dictionary, Dictionary} -> proplists:get_value(?RECEIVER, Dictionary, none);
        undefined -> none
    end.


-spec add_latency(non_neg_integer(), #state{}) -> #state{}.
add_latency(_Queued, #state{messages_per_second = 0} = State) ->
    State;
add_latency(Queued, #state{messages_per_second = Rate, latencies_us = Latencies} = State) ->
    State#state{latencies_us = lists:sublist([Queued * 1_000_000 div Rate | Latencies], ?LATENCIES)}.


-spec publish(#state{}) -> #state{}.
publish(#state{shard = Shard, messages_per_second = Rate, latencies_us = Latencies} = State) ->
    ok = erlmcp_shard_sampler:insert(Shard, Rate, Latencies),
    State.


-spec tell_first_sample(#state{}) -> #state{}.
tell_first_sample(#state{shard = Shard, has_sampled = false} = State) ->
    ok = erlmcp_shard_sampler:has_sampled(Shard),
    State#state{has_sampled = true};
tell_first_sample(State) ->
    State.


%%% The log of overloads


%% A caller was the first one to be refused in an overload.
-spec overloaded(#state{}) -> #state{}.
overloaded(#state{shard = Shard, overload = none} = State) ->
    ok = erlmcp_shard_sampler:set_overload(Shard, true),
    ok = erlmcp_native_log:log(warning, shard_overloaded, #{shard_id => Shard}),
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
    ok = erlmcp_shard_sampler:set_overload(Shard, false),
    ok = erlmcp_native_log:log(notice, shard_recovered, #{shard_id => Shard}),
    State#state{overload = none}.


-spec now_ns() -> integer().
now_ns() ->
    erlang:monotonic_time(nanosecond).


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).
