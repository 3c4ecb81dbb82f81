%%% @doc Events of connections: when an id is registered, and when it is removed.
%%%
%%% A process that has subscribed gets
%%%
%%% ```
%%% {erlmcp_connection, joined, Id, Pid}
%%% {erlmcp_connection, left, Id, Pid}
%%% {erlmcp_connection, lost, N}
%%% '''
%%%
%%% for the connections of {@link erlmcp_shard_registry} in the default registry, or in one from
%%% {@link erlmcp_shard_registry:new/1}, which is given as an additional first argument. A connection that is replaced
%%% leaves, and the new one joins. {@link await/2} waits for one id and sends no message.
%%%
%%% == Guarantees ==
%%% <ul>
%%% <li>The events of one id arrive in the order in which its connections were registered and removed. Those of different
%%% ids may arrive in another order than they happened.</li>
%%% <li>Each event is sent when its change is visible, and once, also to a process with several subscriptions that it
%%% belongs to.</li>
%%% <li>A process that subscribes and then looks up an id misses nothing: the look-up finds the connection, or an event
%%% follows. A change that is made during the call may be both in the look-up and in an event.</li>
%%% <li>What cannot be sent is counted. `lost' arrives behind all events that were sent before. It means: look again. `N'
%%% is the number of events, those included that belong to other subscriptions of the registry, or an estimate.</li>
%%% </ul>
%%%
%%% == Bounds ==
%%% A process is sent no more events than there is room for in its mailbox, up to its limit of messages (`max_queue', 1,000
%%% by default). Further events are counted, and it gets one `lost' when a quarter of the limit is free again. A process that
%%% does not tell the length of its mailbox within 50 ms, because it is suspended or not scheduled, counts as full until it does. Up to 65,536 changes wait in native
%%% memory for this module's process; when it is that far behind, all subscribers get `lost'. So do they if this process
%%% was killed, or if a connection is removed just while somebody subscribes to it.
%%%
%%% == Cost ==
%%% A registration or removal loads one word two or three times, and has one fence, while nobody subscribes. A change that somebody has subscribed to adds
%%% one entry to a queue, also when the process of the connection exits. One process sends all events. A subscription takes
%%% some hundred bytes, and a registry that has ever had one 1.5 MB of native memory.
%%%
%%% == Lifetime ==
%%% A subscription ends with {@link unsubscribe/2}, with the exit of the subscriber, or with the application. Until then
%%% it is a reference to its registry: a registry from {@link erlmcp_shard_registry:new/1} is not freed before. So is a
%%% call of {@link await/3}.
-module(erlmcp_connection_events).

-behaviour(gen_server).

%% Subscriptions
-export([subscribe/1, subscribe/2, subscribe/3]).
-export([unsubscribe/1, unsubscribe/2]).
%% Waiting
-export([await/2, await/3]).
%% Explanations of errors
-export([format_error/2]).
%% Process
-export([new/0]).
-export([start_link/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).
-export([look/1]).

-export_type([what/0, options/0]).

-type registry() :: erlmcp_nif:registry().
-type what() :: all | {shard, erlmcp_shard_registry:shard_id()} | {id, Id :: term()}.
%% `max_queue': no events are sent while so many messages wait in the subscriber's mailbox.
-type options() :: #{max_queue => pos_integer()}.

-define(IS_REGISTRY(R), (R =:= default orelse is_reference(R))).
-define(IS_TIMEOUT(T), (T =:= infinity orelse is_integer(T) andalso T >= 0 andalso T =< 16#FFFFFFFF)).

-define(DEFAULT_MAX_QUEUE, 1_000).
%% A process that is restarted is there again after some milliseconds; one that is not after a second has been given up.
-define(PAUSE_MS, 10).
-define(ATTEMPTS, 100).

%% The rows of the table: `{{registry(), what(), pid()}, MaxQueue}' for a subscription, and
%% `{{registry(), {id, Id}, Tag :: reference()}, pid()}' for a process that waits. A row is there from before its interest
%% is set until after it is cleared.
-define(TABLE, ?MODULE).
%% How long the process waits for the length of a mailbox. A process that has messages waiting and is not running tells
%% it when it is scheduled.
-define(PATIENCE_MS, 50).
%% When a full mailbox is looked at again.
-define(RETRY_MS, 100).

%% A subscriber, or a process that waits.
-type owner() :: pid() | (Tag :: reference()).
-type registry_number() :: non_neg_integer().

-record(source, {
          registry :: registry(),
          targets = #{} :: #{what() => #{owner() => []}},
          %% Those whose announcements begin at a position that has not been reached yet, by position.
          waiting = [] :: [{Since :: non_neg_integer(), owner(), what(), gen_server:from()}],
          %% Whether a message to go on is in the mailbox.
          is_going_on = false :: boolean()
         }).
-record(subscriber, {
          monitor :: reference(),
          %% Those included that wait.
          subscriptions = #{} :: #{{registry_number(), what()} => []},
          max_queue :: pos_integer(),
          %% Events that can be sent before the mailbox is looked at.
          room = 0 :: non_neg_integer(),
          lost = 0 :: non_neg_integer(),
          %% How the next look at the mailbox comes about, if one is needed.
          look = none :: none | timer | reference()
         }).
-record(awaiter, {
          number :: registry_number(),
          id :: term(),
          from :: gen_server:from(),
          monitor :: reference()
         }).
-record(state, {
          sources = #{} :: #{registry_number() => #source{}},
          numbers = #{} :: #{registry() => registry_number()},
          subscribers = #{} :: #{pid() => #subscriber{}},
          awaiters = #{} :: #{reference() => #awaiter{}},
          %% Of subscribers, processes that wait, and looks at mailboxes.
          monitors = #{} :: #{reference() => owner() | {look, pid()}}
         }).

%%% Subscriptions


%% @equiv subscribe(default, What)
-spec subscribe(what()) -> ok | {error, not_running}.
subscribe(What) ->
    subscribe(default, What).


%% @equiv subscribe(Registry, What, #{})
-spec subscribe(registry(), what()) -> ok | {error, not_running}.
subscribe(Registry, What) ->
    subscribe(Registry, What, #{}).


%% @doc Subscribes the calling process to all connections, those of a shard, or one id. A further call for the same has
%% no effect, except that the latest `max_queue' of a process is in force for all its subscriptions. Returns when changes
%% from now on are sent, after some microseconds, or milliseconds if many changes are waiting to be sent.
%%
%% `{error, not_running}': the application is not running, or the process that sends events was given up. Raises
%% `badarg' for a wrong registry or an id that is none, and `{bad_option, Key, Value, Expected}'.
-spec subscribe(registry(), what(), options() | [proplists:property()]) -> ok | {error, not_running}.
subscribe(Registry, What, Options) ->
    MaxQueue = max_queue(erlmcp_native_config:to_map(Options), Options),
    wrong_argument(Registry, What) =:= none orelse
    error(badarg, [Registry, What, Options], [{error_info, #{module => ?MODULE}}]),
    {message_queue_len, Length} = process_info(self(), message_queue_len),
    case ask({subscribe, Registry, What, MaxQueue, Length}, infinity) of
        ok -> ok;
        {error, not_running} = Error -> Error
    end.


-spec max_queue(term(), term()) -> pos_integer().
max_queue(#{} = Map, _Options) ->
    case maps:to_list(maps:remove(max_queue, Map)) of
        [] -> ok;
        [{Key, Value} | _] -> error({bad_option, Key, Value, "max_queue"})
    end,
    case maps:get(max_queue, Map, ?DEFAULT_MAX_QUEUE) of
        MaxQueue when is_integer(MaxQueue), MaxQueue > 0 -> MaxQueue;
        Other -> error({bad_option, max_queue, Other, "a positive integer"})
    end;
max_queue(_NoMap, Options) ->
    error({bad_option, options, Options, erlmcp_native_config:map_expected()}).


%% @equiv unsubscribe(default, What)
-spec unsubscribe(what()) -> ok.
unsubscribe(What) ->
    unsubscribe(default, What).


%% @doc Ends a subscription of the calling process; `ok' also if there is none. What was sent before may still be in the
%% mailbox.
-spec unsubscribe(registry(), what()) -> ok.
unsubscribe(Registry, What) ->
    wrong_argument(Registry, What) =:= none orelse
    error(badarg, [Registry, What], [{error_info, #{module => ?MODULE}}]),
    case ask({unsubscribe, Registry, What}, infinity) of
        ok -> ok;
        {error, not_running} -> forget_row({Registry, What, self()})
    end.


%% No process sends anything now; one that is started later does not resume the subscription.
-spec forget_row({registry(), what(), pid()}) -> ok.
forget_row(Key) ->
    try
        true = ets:delete(?TABLE, Key),
        ok
    catch
        %% The table has gone with the application.
        error:badarg -> ok
    end.


%% The position of the argument that is wrong.
-spec wrong_argument(term(), term()) -> none | 1 | 2.
wrong_argument(Registry, What) when ?IS_REGISTRY(Registry) ->
    case raises_badarg(fun() -> erlmcp_nif:limits(Registry) end) of
        true -> 1;
        false ->
            case raises_badarg(fun() -> check(Registry, What) end) of
                true -> 2;
                false -> none
            end
    end;
wrong_argument(_Registry, _What) ->
    1.


-spec check(registry(), term()) -> term().
check(_Registry, all) -> ok;
check(Registry, {shard, Shard}) -> erlmcp_nif:count_shard(Registry, Shard);
check(Registry, {id, Id}) -> erlmcp_nif:shard(Registry, Id);
check(_Registry, _Other) -> error(badarg).


-spec raises_badarg(fun(() -> term())) -> boolean().
raises_badarg(Fun) ->
    try
        _ = Fun(),
        false
    catch
        error:badarg -> true
    end.


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, await, [Registry, Id, Timeout], _Info} | _]) ->
    case wrong_argument(Registry, {id, Id}) of
        none when not ?IS_TIMEOUT(Timeout) -> #{3 => "not a timeout"};
        none -> #{};
        1 -> #{1 => "not a registry"};
        2 -> #{2 => "not an id that can be registered"}
    end;
format_error(_Reason, [{?MODULE, _Function, [Registry, What | _], _Info} | _]) ->
    case wrong_argument(Registry, What) of
        none -> #{};
        1 -> #{1 => "not a registry"};
        2 -> #{2 => "not all, {shard, Shard} or {id, Id} of this registry"}
    end;
format_error(_Reason, _Stacktrace) ->
    #{}.


%%% Waiting


%% @equiv await(default, Id, TimeoutMs)
-spec await(term(), timeout()) -> {ok, {pid(), Capabilities :: term()}} | {error, timeout | not_running}.
await(Id, TimeoutMs) ->
    await(default, Id, TimeoutMs).


%% @doc Returns the process and the capabilities of a connection when it is registered, at once if it is. Sends the
%% caller no message. Without the application running, and also if the process that sends events was given up and the
%% timeout is not over before that is known: `{error, not_running}', unless the id is registered. A timeout is at most
%% 4,294,967,295.
-spec await(registry(), term(), timeout()) ->
          {ok, {pid(), Capabilities :: term()}} | {error, timeout | not_running}.
await(Registry, Id, TimeoutMs) ->
    ?IS_TIMEOUT(TimeoutMs) andalso wrong_argument(Registry, {id, Id}) =:= none orelse
    error(badarg, [Registry, Id, TimeoutMs], [{error_info, #{module => ?MODULE}}]),
    await_until(Registry, Id, deadline(TimeoutMs)).


-spec await_until(registry(), term(), integer() | infinity) ->
          {ok, {pid(), term()}} | {error, timeout | not_running}.
await_until(Registry, Id, Deadline) ->
    case {erlmcp_registry_native:find(Registry, connection, Id), left_ms(Deadline)} of
        {{ok, Found}, _LeftMs} ->
            {ok, Found};
        {{error, not_found}, 0} ->
            {error, timeout};
        {{error, not_found}, _LeftMs} ->
            Tag = make_ref(),
            case ask({await, Registry, Id, Tag}, Deadline) of
                %% It has joined, or may have.
                ok ->
                    await_until(Registry, Id, Deadline);
                {error, timeout} ->
                    ok = gen_server:cast(?MODULE, {forget, Tag}),
                    await_until(Registry, Id, Deadline);
                {error, not_running} = Error ->
                    case erlmcp_registry_native:find(Registry, connection, Id) of
                        {ok, _} = Found -> Found;
                        {error, not_found} -> Error
                    end
            end
    end.


-spec deadline(timeout()) -> integer() | infinity.
deadline(infinity) -> infinity;
deadline(TimeoutMs) -> erlang:monotonic_time(millisecond) + TimeoutMs.


-spec left_ms(integer() | infinity) -> timeout().
left_ms(infinity) -> infinity;
left_ms(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).


%% Calls the process. If it exits meanwhile the call is made again: a request is about a state and not about a change.
-spec ask(tuple(), integer() | infinity) -> ok | {error, timeout | not_running}.
ask(Request, Deadline) ->
    ask(Request, Deadline, ?ATTEMPTS).


-spec ask(tuple(), integer() | infinity, non_neg_integer()) -> ok | {error, timeout | not_running}.
ask(_Request, _Deadline, 0) ->
    {error, not_running};
ask(Request, Deadline, Attempts) ->
    try
        gen_server:call(?MODULE, Request, left_ms(Deadline))
    catch
        exit:{timeout, _Call} ->
            {error, timeout};
        exit:{noproc, _Call} ->
            case {ets:whereis(?TABLE), left_ms(Deadline)} of
                {undefined, _LeftMs} ->
                    {error, not_running};
                {_Restarting, 0} ->
                    {error, timeout};
                {_Restarting, LeftMs} ->
                    ok = timer:sleep(min(?PAUSE_MS, LeftMs)),
                    ask(Request, Deadline, Attempts - 1)
            end;
        %% It has exited during the call.
        exit:{_Reason, _Call} ->
            ask(Request, Deadline)
    end.


%%% Process


%% @private
%% Makes the table, owned by the calling process.
-spec new() -> ok.
new() ->
    _ = ets:new(?TABLE, [named_table, public]),
    ok.


%% @private
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%% @private
%% The rows of an earlier process that was killed. What it had read and not sent is lost.
-spec init([]) -> {ok, #state{}}.
init([]) ->
    %% For `terminate/2'.
    _ = process_flag(trap_exit, true),
    Rows = ets:tab2list(?TABLE),
    {Awaiters, Subscriptions} = lists:partition(fun({{_, _, Owner}, _}) -> is_reference(Owner) end, Rows),
    %% Interests that a process left when it was killed together with the table.
    _ = erlmcp_nif:announcements_attach(default),
    _ = lists:member(default, [ Registry || {{Registry, _, _}, _} <- Rows ]) orelse
        erlmcp_nif:announcements_detach(default),
    %% The callers ask again.
    lists:foreach(fun({{Registry, What, _Tag} = Key, _Pid}) ->
                          _ = erlmcp_nif:announcements_set(Registry, What, false),
                          ets:delete(?TABLE, Key)
                  end,
                  Awaiters),
    State = lists:foldl(fun resume/2, #state{}, Subscriptions),
    Resumed = lists:foldl(fun(Pid, Each) -> lose(Pid, 1, Each) end, State, maps:keys(State#state.subscribers)),
    %% The rows of those that waited may hold a registry that nobody has subscribed to any more.
    self() ! collect,
    {ok, lists:foldl(fun go_on/2, Resumed, maps:keys(Resumed#state.sources))}.


-spec resume({{registry(), what(), pid()}, pos_integer()}, #state{}) -> #state{}.
resume({{Registry, What, Pid}, MaxQueue}, State) ->
    {Number, Attached} = source(Registry, State),
    _ = erlmcp_nif:announcements_set(Registry, What, true),
    #state{subscribers = Subscribers} = Known = subscriber(Pid, MaxQueue, 0, Attached),
    activate(Number, Pid, What, Known#state{subscribers = add_subscription(Number, Pid, What, Subscribers)}).


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) ->
          {reply, ok | {error, unknown_request}, #state{}} | {noreply, #state{}}.
handle_call({subscribe, Registry, What, MaxQueue, Length}, {Pid, _} = From, State) ->
    {Number, Attached} = source(Registry, State),
    Known = subscriber(Pid, MaxQueue, room(MaxQueue, Length), Attached),
    true = ets:insert(?TABLE, {{Registry, What, Pid}, MaxQueue}),
    case Known#state.subscribers of
        #{Pid := #subscriber{subscriptions = #{{Number, What} := _}}} ->
            {reply, ok, Known};
        Subscribers ->
            Added = Known#state{subscribers = add_subscription(Number, Pid, What, Subscribers)},
            {noreply, wait(Number, Pid, What, From, Added)}
    end;
handle_call({unsubscribe, Registry, What}, {Pid, _}, #state{numbers = Numbers} = State) ->
    case Numbers of
        #{Registry := Number} ->
            {reply, ok, forget_subscription(Number, Pid, What, State)};
        _ ->
            %% The request refers to the registry.
            self() ! collect,
            {reply, ok, State}
    end;
handle_call({await, Registry, Id, Tag}, {Pid, _} = From, State) ->
    {Number, Attached} = source(Registry, State),
    #state{awaiters = Awaiters, monitors = Monitors} = Attached,
    Monitor = monitor(process, Pid),
    Awaiter = #awaiter{number = Number, id = Id, from = From, monitor = Monitor},
    true = ets:insert(?TABLE, {{Registry, {id, Id}, Tag}, Pid}),
    Known = Attached#state{awaiters = Awaiters#{Tag => Awaiter}, monitors = Monitors#{Monitor => Tag}},
    {noreply, wait(Number, Tag, {id, Id}, From, Known)};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast({forget, Tag}, State) ->
    {noreply, forget_awaiter(Tag, State)};
handle_cast(_Cast, State) ->
    {noreply, State}.


%% @private
-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({announced, Number}, State) ->
    {noreply, read(Number, State)};
handle_info({go_on, Number}, #state{sources = Sources} = State) ->
    case Sources of
        #{Number := Source} ->
            {noreply, read(Number, State#state{sources = Sources#{Number := Source#source{is_going_on = false}}})};
        _ ->
            {noreply, State}
    end;
handle_info({'DOWN', Monitor, process, _Pid, Reason}, #state{monitors = Monitors} = State) ->
    Forgotten = State#state{monitors = maps:remove(Monitor, Monitors)},
    case Monitors of
        #{Monitor := {look, Pid}} -> {noreply, looked(Pid, Monitor, Reason, Forgotten)};
        #{Monitor := Pid} when is_pid(Pid) -> {noreply, forget_subscriber(Pid, Forgotten)};
        #{Monitor := Tag} -> {noreply, forget_awaiter(Tag, Forgotten)};
        _ -> {noreply, State}
    end;
handle_info({look_again, Pid}, #state{subscribers = Subscribers} = State) ->
    case Subscribers of
        #{Pid := #subscriber{look = timer}} -> {noreply, begin_look(Pid, State)};
        _ -> {noreply, State}
    end;
handle_info(collect, State) ->
    true = garbage_collect(),
    {noreply, State};
handle_info(_Unknown, State) ->
    {noreply, State}.


%% @private
-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, #state{sources = Sources}) ->
    lists:foreach(fun(#source{registry = Registry}) -> erlmcp_nif:announcements_detach(Registry) end, maps:values(Sources)).


%%% Registries


%% The number of a registry. This process reads its announcements from now on.
-spec source(registry(), #state{}) -> {registry_number(), #state{}}.
source(Registry, #state{numbers = Numbers, sources = Sources} = State) ->
    case Numbers of
        #{Registry := Number} ->
            {Number, State};
        _ ->
            Number = erlmcp_nif:announcements_attach(Registry),
            {Number,
             State#state{
               numbers = Numbers#{Registry => Number},
               sources = Sources#{Number => #source{registry = Registry}}
              }}
    end.


%% Sets an interest. It counts from the announcement that is the next one then: what came before is out of date for
%% whoever looks up an id afterwards.
-spec wait(registry_number(), owner(), what(), gen_server:from(), #state{}) -> #state{}.
wait(Number, Owner, What, From, #state{sources = Sources} = State) ->
    #{Number := #source{registry = Registry, waiting = Waiting} = Source} = Sources,
    Since = erlmcp_nif:announcements_set(Registry, What, true),
    Waits = State#state{sources = Sources#{Number := Source#source{waiting = Waiting ++ [{Since, Owner, What, From}]}}},
    case Source#source.is_going_on of
        true -> Waits;
        false -> read(Number, Waits)
    end.


%% Sends a slice of the events, and then what becomes due at that position.
-spec read(registry_number(), #state{}) -> #state{}.
read(Number, #state{sources = Sources} = State) ->
    case Sources of
        #{Number := #source{registry = Registry, waiting = Waiting}} ->
            Until = case Waiting of
                        [{Since, _, _, _} | _] -> Since;
                        [] -> infinity
                    end,
            {Events, Lost, Position, HasMore} = erlmcp_nif:announcements_read(Registry, Until),
            Sent = lists:foldl(fun(Event, Each) -> event(Number, Event, Each) end, State, Events),
            Due = due(Number, Position, lost(Number, Lost, Sent)),
            case HasMore of
                true -> go_on(Number, Due);
                false -> Due
            end;
        _ ->
            State
    end.


%% By a message, behind those that wait.
-spec go_on(registry_number(), #state{}) -> #state{}.
go_on(Number, #state{sources = Sources} = State) ->
    case Sources of
        #{Number := #source{is_going_on = false} = Source} ->
            self() ! {go_on, Number},
            State#state{sources = Sources#{Number := Source#source{is_going_on = true}}};
        _ ->
            State
    end.


%% Those that have waited for the position.
-spec due(registry_number(), Position :: non_neg_integer(), #state{}) -> #state{}.
due(Number, Position, #state{sources = Sources} = State) ->
    case Sources of
        #{Number := #source{registry = Registry, waiting = [{Since, Owner, What, From} | Waiting]} = Source} when Since =< Position ->
            Taken = State#state{sources = Sources#{Number := Source#source{waiting = Waiting}}},
            Active = activate(Number, Owner, What, Taken),
            Replied = case What of
                          {id, Id} when is_reference(Owner) ->
                              case erlmcp_nif:whereis(Registry, connection, Id) of
                                  undefined -> Active;
                                  _Pid -> joined(Owner, Active)
                              end;
                          _ ->
                              ok = gen_server:reply(From, ok),
                              Active
                      end,
            due(Number, Position, Replied);
        _ ->
            State
    end.


%% From now on events are sent.
-spec activate(registry_number(), owner(), what(), #state{}) -> #state{}.
activate(Number, Owner, What, #state{sources = Sources} = State) ->
    #{Number := #source{targets = Targets} = Source} = Sources,
    Owners = maps:get(What, Targets, #{}),
    State#state{sources = Sources#{Number := Source#source{targets = Targets#{What => Owners#{Owner => []}}}}}.


%% Clears an interest that nobody else has. The registry is forgotten with the last one.
-spec forget_target(registry_number(), owner(), what(), #state{}) -> #state{}.
forget_target(Number, Owner, What, #state{sources = Sources, numbers = Numbers} = State) ->
    #{Number := #source{registry = Registry, targets = Targets, waiting = Waiting} = Source} = Sources,
    Owners = maps:remove(Owner, maps:get(What, Targets, #{})),
    Others = [ Wait || {_, Waits, For, _} = Wait <- Waiting, {Waits, For} =/= {Owner, What} ],
    IsWanted = map_size(Owners) > 0 orelse lists:any(fun({_, _, For, _}) -> For =:= What end, Others),
    _ = IsWanted orelse erlmcp_nif:announcements_set(Registry, What, false),
    true = ets:delete(?TABLE, {Registry, What, Owner}),
    Left = case map_size(Owners) of
               0 -> maps:remove(What, Targets);
               _ -> Targets#{What => Owners}
           end,
    case {map_size(Left), Others} of
        {0, []} ->
            ok = erlmcp_nif:announcements_detach(Registry),
            %% A reference to a registry may be in what is not collected yet.
            _ = is_reference(Registry) andalso (self() ! collect),
            State#state{sources = maps:remove(Number, Sources), numbers = maps:remove(Registry, Numbers)};
        _ ->
            State#state{sources = Sources#{Number := Source#source{targets = Left, waiting = Others}}}
    end.


%%% Events


-spec event(registry_number(), erlmcp_nif:announcement(), #state{}) -> #state{}.
event(Number, {Change, Id, Pid, Shard}, #state{sources = Sources} = State) ->
    case Sources of
        #{Number := #source{targets = Targets}} ->
            Owners = lists:foldl(fun(What, Each) -> maps:merge(Each, maps:get(What, Targets, #{})) end,
                                 maps:get(all, Targets, #{}),
                                 [ What || What <- [{shard, Shard}, {id, Id}], is_map_key(What, Targets) ]),
            Message = {erlmcp_connection, Change, Id, Pid},
            Send = fun(Tag, [], {Unknown, Each}) when is_reference(Tag), Change =:= joined -> {Unknown, joined(Tag, Each)};
                      (Tag, [], Result) when is_reference(Tag) -> Result;
                      (Subscriber, [], {Unknown, Each}) ->
                           case has_unknown_room(Subscriber, Each) of
                               true -> {[Subscriber | Unknown], Each};
                               false -> {Unknown, send(Subscriber, Message, Each)}
                           end
                   end,
            {Unknown, Sent} = maps:fold(Send, {[], State}, Owners),
            lists:foldl(fun(Subscriber, Each) -> send(Subscriber, Message, Each) end, look_at(Unknown, Sent), Unknown);
        %% The last one was a process that has waited for an event of this slice.
        _ ->
            State
    end.


%% All subscribers of a registry have lost events.
-spec lost(registry_number(), non_neg_integer(), #state{}) -> #state{}.
lost(_Number, 0, State) ->
    State;
lost(Number, Lost, #state{sources = Sources} = State) ->
    case Sources of
        #{Number := #source{targets = Targets}} ->
            Owners = lists:foldl(fun maps:merge/2, #{}, maps:values(Targets)),
            maps:fold(fun(Tag, [], Each) when is_reference(Tag) -> joined(Tag, Each);
                         (Subscriber, [], Each) -> lose(Subscriber, Lost, Each)
                      end,
                      State,
                      Owners);
        _ ->
            State
    end.


%%% Subscribers


-spec subscriber(pid(), pos_integer(), Room :: non_neg_integer(), #state{}) -> #state{}.
subscriber(Pid, MaxQueue, Room, #state{subscribers = Subscribers, monitors = Monitors} = State) ->
    case Subscribers of
        #{Pid := #subscriber{max_queue = MaxQueue}} ->
            State;
        #{Pid := #subscriber{subscriptions = Subscriptions} = Subscriber} ->
            %% A next process resumes any of them first.
            Others = [ {{Registry, What, Pid}, MaxQueue}
                       || {Number, What} <- maps:keys(Subscriptions),
                          #source{registry = Registry} <- [map_get(Number, State#state.sources)] ],
            true = ets:insert(?TABLE, Others),
            Changed = Subscriber#subscriber{max_queue = MaxQueue, room = Room},
            State#state{subscribers = Subscribers#{Pid := Changed}};
        _ ->
            Monitor = monitor(process, Pid),
            Subscriber = #subscriber{monitor = Monitor, max_queue = MaxQueue, room = Room},
            State#state{subscribers = Subscribers#{Pid => Subscriber}, monitors = Monitors#{Monitor => Pid}}
    end.


-spec add_subscription(registry_number(), pid(), what(), #{pid() => #subscriber{}}) -> #{pid() => #subscriber{}}.
add_subscription(Number, Pid, What, Subscribers) ->
    #{Pid := #subscriber{subscriptions = Subscriptions} = Subscriber} = Subscribers,
    Subscribers#{Pid := Subscriber#subscriber{subscriptions = Subscriptions#{{Number, What} => []}}}.


-spec forget_subscription(registry_number(), pid(), what(), #state{}) -> #state{}.
forget_subscription(Number, Pid, What, #state{subscribers = Subscribers, monitors = Monitors} = State) ->
    case Subscribers of
        #{Pid := #subscriber{subscriptions = #{{Number, What} := _} = Subscriptions, monitor = Monitor} = Subscriber} ->
            Forgotten = forget_target(Number, Pid, What, State),
            case maps:remove({Number, What}, Subscriptions) of
                Others when map_size(Others) > 0 ->
                    Left = Subscriber#subscriber{subscriptions = Others},
                    Forgotten#state{subscribers = Subscribers#{Pid := Left}};
                _None ->
                    true = demonitor(Monitor, [flush]),
                    Forgotten#state{
                      subscribers = maps:remove(Pid, Subscribers),
                      monitors = maps:remove(Monitor, Monitors)
                     }
            end;
        _ ->
            State
    end.


%% The subscriber has exited.
-spec forget_subscriber(pid(), #state{}) -> #state{}.
forget_subscriber(Pid, #state{subscribers = Subscribers} = State) ->
    {#subscriber{subscriptions = Subscriptions}, Others} = maps:take(Pid, Subscribers),
    maps:fold(fun({Number, What}, [], Each) -> forget_target(Number, Pid, What, Each) end,
              State#state{subscribers = Others},
              Subscriptions).


-spec send(pid(), tuple(), #state{}) -> #state{}.
send(Pid, Message, #state{subscribers = Subscribers} = State) ->
    case Subscribers of
        #{Pid := #subscriber{lost = 0, room = Room} = Subscriber} when Room > 0 ->
            Pid ! Message,
            State#state{subscribers = Subscribers#{Pid := Subscriber#subscriber{room = Room - 1}}};
        #{Pid := #subscriber{}} ->
            lose(Pid, 1, State)
    end.


%% The subscriber has lost events. It is told when there is room in its mailbox.
-spec lose(pid(), pos_integer(), #state{}) -> #state{}.
lose(Pid, Number, #state{subscribers = Subscribers} = State) ->
    #{Pid := #subscriber{lost = Lost, look = Look} = Subscriber} = Subscribers,
    Counted = State#state{subscribers = Subscribers#{Pid := Subscriber#subscriber{lost = Lost + Number}}},
    case Look of
        none -> tell(Pid, Counted);
        _UnderWay -> Counted
    end.


%% Sends `lost' if there is room; otherwise arranges for a look at the mailbox.
-spec tell(pid(), #state{}) -> #state{}.
tell(Pid, #state{subscribers = Subscribers} = State) ->
    case Subscribers of
        #{Pid := #subscriber{lost = 0}} ->
            State;
        #{Pid := #subscriber{lost = Lost, room = Room} = Subscriber} when Room > 0 ->
            Pid ! {erlmcp_connection, lost, Lost},
            State#state{subscribers = Subscribers#{Pid := Subscriber#subscriber{lost = 0, room = Room - 1}}};
        _ ->
            begin_look(Pid, State)
    end.


%%% Mailboxes


%% Whether the mailbox has to be looked at before the next event is sent.
-spec has_unknown_room(pid(), #state{}) -> boolean().
has_unknown_room(Pid, #state{subscribers = Subscribers}) ->
    case Subscribers of
        #{Pid := #subscriber{lost = 0, room = 0, look = none}} -> true;
        _ -> false
    end.


%% Looks at mailboxes. All are asked before any answer is waited for, so that many that do not answer cost as much time as
%% one.
-spec look_at([pid()], #state{}) -> #state{}.
look_at([], State) ->
    State;
look_at(Pids, State) ->
    Asked = lists:foldl(fun begin_look/2, State, Pids),
    Deadline = deadline(?PATIENCE_MS),
    lists:foldl(fun(Pid, Each) -> await_look(Pid, Deadline, Each) end, Asked, Pids).


%% Another process asks for the length, since the answer of a process that is suspended or in a long native call does not
%% come.
-spec begin_look(pid(), #state{}) -> #state{}.
begin_look(Pid, #state{subscribers = Subscribers, monitors = Monitors} = State) ->
    #{Pid := Subscriber} = Subscribers,
    {_Looking, Monitor} = spawn_monitor(?MODULE, look, [Pid]),
    State#state{
      subscribers = Subscribers#{Pid := Subscriber#subscriber{look = Monitor}},
      monitors = Monitors#{Monitor => {look, Pid}}
     }.


%% @private
-spec look(pid()) -> no_return().
look(Pid) ->
    exit({length, process_info(Pid, message_queue_len)}).


%% Without an answer the subscriber counts as full until it comes.
-spec await_look(pid(), DeadlineMs :: integer(), #state{}) -> #state{}.
await_look(Pid, Deadline, #state{subscribers = Subscribers, monitors = Monitors} = State) ->
    #{Pid := #subscriber{look = Monitor}} = Subscribers,
    receive
        {'DOWN', Monitor, process, _Looking, Reason} ->
            looked(Pid, Monitor, Reason, State#state{monitors = maps:remove(Monitor, Monitors)})
    after
        left_ms(Deadline) ->
            State
    end.


%% A quarter of the limit must be free: otherwise a mailbox that is nearly full would be looked at for each event.
-spec room(MaxQueue :: pos_integer(), Length :: non_neg_integer()) -> non_neg_integer().
room(MaxQueue, Length) when MaxQueue > Length, MaxQueue - Length >= MaxQueue div 4 -> MaxQueue - Length;
room(_MaxQueue, _Length) -> 0.


-spec looked(pid(), reference(), Reason :: term(), #state{}) -> #state{}.
looked(Pid, Monitor, Reason, #state{subscribers = Subscribers} = State) ->
    case Subscribers of
        #{Pid := #subscriber{look = Monitor, max_queue = MaxQueue} = Subscriber} ->
            Room = case Reason of
                       {length, {message_queue_len, Length}} -> room(MaxQueue, Length);
                       %% It has exited. This process is about to be told.
                       {length, undefined} -> MaxQueue;
                       %% The process that was to look was killed.
                       _ -> 0
                   end,
            case Room of
                0 ->
                    _ = erlang:send_after(?RETRY_MS, self(), {look_again, Pid}),
                    Seen = Subscriber#subscriber{look = timer, room = 0},
                    State#state{subscribers = Subscribers#{Pid := Seen}};
                _ ->
                    Seen = Subscriber#subscriber{look = none, room = Room},
                    tell(Pid, State#state{subscribers = Subscribers#{Pid := Seen}})
            end;
        %% It is no longer a subscriber.
        _ ->
            State
    end.


%%% Processes that wait


%% The id has joined, or may have: the caller looks.
-spec joined(Tag :: reference(), #state{}) -> #state{}.
joined(Tag, #state{awaiters = Awaiters} = State) ->
    case Awaiters of
        #{Tag := #awaiter{from = From}} ->
            ok = gen_server:reply(From, ok),
            forget_awaiter(Tag, State);
        _ ->
            State
    end.


-spec forget_awaiter(Tag :: reference(), #state{}) -> #state{}.
forget_awaiter(Tag, #state{awaiters = Awaiters, monitors = Monitors} = State) ->
    case maps:take(Tag, Awaiters) of
        {#awaiter{number = Number, id = Id, monitor = Monitor}, Others} ->
            true = demonitor(Monitor, [flush]),
            Forgotten = State#state{awaiters = Others, monitors = maps:remove(Monitor, Monitors)},
            forget_target(Number, Tag, {id, Id}, Forgotten);
        error ->
            State
    end.
