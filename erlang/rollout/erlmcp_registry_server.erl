%%% @private
%%% The implementation of the process of {@link erlmcp_registry}: it has one store, carries out requests and routes
%%% messages by it. The named process switches from one store to the other.
%%%
%%% The named process has the default native registry, or a pure-Erlang store with a keeper; the plan says
%%% which ({@link erlmcp_rollout_path}). An anonymous process has a store of its own, of the kind that is in
%%% force when it starts, and keeps it.
%%%
%%% == A switch ==
%%% Each stage continues by a message of the process to itself, behind the messages that have arrived meanwhile:
%%% <ol>
%%% <li><em>Copying</em>, if the store changes: slices of {@link erlmcp_rollout_copy}. Requests and routes are
%%% served from the source in between. Changes are served too, and are reported to the copy. A change that the copy
%%% refuses waits until the end of this stage. If the oldest change has waited for too long, or an entry cannot be
%%% copied, the switch is given up and the source stays. At the end of the stage the target is put in force, and the
%%% changes that have waited are made there.</li>
%%% <li><em>Draining</em>, if the source was the pure-Erlang store: no message goes straight before all messages
%%% in the mailbox have been sent.</li>
%%% <li><em>Cleaning</em>: the other store is emptied. The mode is already in force; only another switch waits for
%%% the end of this stage.</li>
%%% </ol>
%%%
%%% == If the process is killed during a switch ==
%%% The plan says which store has the entries, and is written in one step when the target is complete. The
%%% next process uses that store, and empties the other one. Changes that waited are lost, and their
%%% callers get an exit; so does the caller of the switch.
-module(erlmcp_registry_server).

-export([init/1, continue/1, call/3, cast/2, info/2, terminate/2, summary/1]).

-export_type([state/0, result/0]).

-type store() :: {native, exclusive | reference()} | {classic, erlmcp_registry_classic:state()}.
-type change() :: {gen_server:from(), Request :: term()}.
-type error() :: erlmcp_rollout_copy:error() | {too_slow, Copied :: non_neg_integer(), Total :: non_neg_integer()}.
-type result() :: #{
                    from := erlmcp_rollout:mode(),
                    to := erlmcp_rollout:mode(),
                    result := ok | {error, error()},
                    copied := non_neg_integer(),
                    entries := non_neg_integer(),
                    duration_ms := non_neg_integer(),
                    longest_wait_ms := non_neg_integer()
                   }.
%% The result of a switch. `copied': entries copied, without those that were changed meanwhile; `entries': entries of
%% the source; `longest_wait_ms': how long the oldest waiting change has waited.

-record(switch, {
          from :: erlmcp_rollout:mode(),
          to :: erlmcp_rollout:mode(),
          max_pause_ms :: timeout(),
          began_ms :: integer(),
          stage :: {copying, erlmcp_rollout_copy:copy()} | {draining, Left :: 0..1},
          %% Callers that wait for the end of the switch.
          callers :: [gen_server:from() | none],
          %% Changes that wait, the latest first, and the time since which the oldest waits.
          changes = [] :: [change()],
          waiting_since_ms = none :: none | integer(),
          longest_wait_ms = 0 :: non_neg_integer(),
          progress = {0, 0} :: {Copied :: non_neg_integer(), Total :: non_neg_integer()}
         }).

-record(state, {
          kind :: named | anonymous,
          store :: store(),
          switch = none :: none | #switch{},
          %% With the switches that wait for the end of the cleaning.
          cleaning = none :: none | erlmcp_rollout_copy:cleaning(),
          postponed = [] :: [{gen_server:from() | none, Command :: term()}],
          %% Of the message of this process to itself that continues either of them.
          turn = none :: none | reference(),
          last_switch = none :: none | result()
         }).

-opaque state() :: #state{}.

-define(KEEPER, erlmcp_registry_keeper).

%%% Start


%% @doc Adopts the store of the named process before this one.
-spec init(named | anonymous) -> {ok, state()} | {stop, term()}.
init(Kind) ->
    case erlmcp_rollout:wanted() of
        {error, LoadError} ->
            {stop, {nif_not_loaded, LoadError}};
        {ok, Mode} when Kind =:= anonymous ->
            {ok, #state{kind = anonymous, store = own_store(Mode)}};
        {ok, _Mode} ->
            ok = erlmcp_rollout:warn_unless_started(),
            ok = erlmcp_delivery:new_counts(),
            _ = erlmcp_registry_native:load_error() =:= none andalso erlmcp_native_config:configure_alone(),
            {ok, adopt(erlmcp_rollout_path:read())}
    end.


-spec own_store(erlmcp_rollout:mode()) -> store().
own_store(current) -> classic(erlmcp_registry_classic:open(none));
own_store(_Native) -> {native, erlmcp_shard_registry:new(#{})}.


%% With messages on the heap, the garbage collector would process the mailbox under load: 1.7 against
%% 2.3 us a route, two senders and 15,000 transports on two cores.
-spec classic(erlmcp_registry_classic:state()) -> store().
classic(Store) ->
    _ = process_flag(message_queue_data, off_heap),
    {classic, Store}.


%% The mailbox of the previous process is lost, and with it what a switch would have drained. What the process had
%% copied into the other store is discarded.
-spec adopt(erlmcp_rollout_path:plan()) -> state().
adopt(Plan) ->
    State = case erlmcp_rollout_path:store(Plan) of
                native ->
                    ok = erlmcp_registry_native:open(exclusive),
                    ok = erlmcp_registry_classic:discard(?KEEPER),
                    #state{kind = named, store = {native, exclusive}};
                classic ->
                    Store = classic(erlmcp_registry_classic:open(?KEEPER)),
                    #state{kind = named, store = Store, cleaning = leftovers()}
            end,
    ok = erlmcp_rollout_path:put_in_force(erlmcp_rollout_path:mode(Plan)),
    State.


-spec leftovers() -> none | erlmcp_rollout_copy:cleaning().
leftovers() ->
    case erlmcp_registry_native:load_error() =:= none andalso erlmcp_registry_native:counts(exclusive) of
        #{servers := Servers, transports := Transports} when Servers + Transports > 0 ->
            erlmcp_rollout_copy:cleaning(native);
        _NothingThere ->
            none
    end.


%% @doc Returns to the mode that was set while there was no process, or that an interrupted switch was to reach.
-spec continue(state()) -> state().
continue(#state{kind = anonymous} = State) ->
    State;
continue(State) ->
    case {erlmcp_rollout:wanted(), mode()} of
        {{ok, Mode}, Mode} ->
            go_on(State);
        {{ok, Wanted}, _Other} when State#state.cleaning =:= none ->
            start_switch(Wanted, #{}, [none], State);
        {{ok, Wanted}, _Other} ->
            go_on(State#state{postponed = [{none, {set, Wanted, #{}}}]})
    end.


-spec mode() -> erlmcp_rollout:mode().
mode() ->
    erlmcp_rollout_path:mode(erlmcp_rollout_path:read()).


%%% Requests


-spec call(term(), gen_server:from(), state()) -> {reply, term(), state()} | {noreply, state()}.
call({erlmcp_rollout, Command}, From, #state{kind = named} = State) ->
    command(Command, From, State);
call(Request, From, #state{switch = #switch{stage = {copying, Copy}} = Switch, store = Store} = State) ->
    case is_change(Request) andalso erlmcp_rollout_copy:changed(Request, source(Store), Copy) of
        false -> execute(Request, State);
        {ok, Changed} -> change(Request, Changed, State);
        refused -> {noreply, State#state{switch = keep(From, Request, Switch)}}
    end;
call(Request, _From, State) ->
    execute(Request, State).


-spec execute(term(), state()) -> {reply, term(), state()}.
execute(Request, #state{store = {native, Registry}} = State) ->
    Reply = try
                erlmcp_registry_native:execute(Registry, Request)
            catch
                error:badarg -> {error, badarg}
            end,
    {reply, Reply, State};
execute(Request, #state{store = {classic, Store}} = State) ->
    {Reply, New} = erlmcp_registry_classic:execute(Request, Store),
    {reply, Reply, State#state{store = {classic, New}}}.


%% Makes a change in the source of a copy. `Changed' is the copy after the change.
-spec change(term(), erlmcp_rollout_copy:copy(), state()) -> {reply, term(), state()}.
change(Request, Changed, State) ->
    case execute(Request, State) of
        {reply, ok, #state{switch = Switch} = Done} ->
            {reply, ok, Done#state{switch = Switch#switch{stage = {copying, Changed}}}};
        Refused ->
            Refused
    end.


-spec source(store()) -> erlmcp_registry_classic:state() | none.
source({classic, Classic}) -> Classic;
source({native, _Registry}) -> none.


-spec is_change(term()) -> boolean().
is_change({register_server, _Id, _Pid, _Config}) -> true;
is_change({register_transport, _Id, _Pid, _Config}) -> true;
is_change({unregister_server, _Id}) -> true;
is_change({unregister_transport, _Id}) -> true;
is_change({update_server, _Id, _Config}) -> true;
is_change({bind_transport_to_server, _TransportId, _ServerId}) -> true;
is_change({unbind_transport, _TransportId}) -> true;
is_change({restore_state, _Saved}) -> true;
is_change(_LookUp) -> false.


-spec keep(gen_server:from(), term(), #switch{}) -> #switch{}.
keep(From, Request, #switch{changes = [], waiting_since_ms = none} = Switch) ->
    Switch#switch{changes = [{From, Request}], waiting_since_ms = now_ms()};
keep(From, Request, #switch{changes = Changes} = Switch) ->
    Switch#switch{changes = [{From, Request} | Changes]}.


%%% Messages


-spec cast(term(), state()) -> state().
cast({erlmcp_rollout, {send_to_transport, Id, Message}}, #state{kind = named} = State) ->
    %% A transport with the name `broadcast'.
    case execute({find_transport, Id}, State) of
        {reply, {ok, {Pid, _Config}}, Found} ->
            ok = erlmcp_delivery:count(ok),
            case erlmcp_delivery:send(Pid, Message) of
                ok -> ok;
                {error, Reason} -> ok = erlmcp_registry_native:undelivered(transport, Id, Reason)
            end,
            Found;
        {reply, {error, _}, Found} ->
            ok = erlmcp_delivery:count(not_found),
            ok = erlmcp_registry_native:unknown_target(transport, Id),
            Found
    end;
cast(Cast, #state{store = {native, Registry}} = State) ->
    ok = erlmcp_registry_native:route(Registry, Cast),
    State;
cast(Cast, #state{store = {classic, Store}} = State) ->
    State#state{store = {classic, erlmcp_registry_classic:route(Cast, Store)}}.


-spec info(term(), state()) -> state().
info({erlmcp_rollout, Turn, continue}, #state{turn = Turn, switch = #switch{}} = State) ->
    go_on_switching(State);
info({erlmcp_rollout, Turn, continue}, #state{turn = Turn} = State) ->
    go_on_cleaning(State);
info({transport_data, TransportId, Data}, #state{store = {native, _}} = State) ->
    try
        transport_data(TransportId, Data, State)
    catch
        %% The id is longer than any that can be registered.
        error:badarg ->
            ok = erlmcp_registry_native:unknown_target(id, too_long),
            State
    end;
info(Info, #state{store = {classic, Store}} = State) ->
    State#state{store = {classic, erlmcp_registry_classic:info(Info, Store)}};
info(Info, #state{switch = #switch{stage = {copying, Copy}} = Switch} = State) ->
    State#state{switch = Switch#switch{stage = {copying, erlmcp_rollout_copy:info(Info, Copy)}}};
info(_Info, State) ->
    State.


%% Routes data that a transport of erlmcp 3.x has received to the server that it is bound to.
-spec transport_data(term(), term(), state()) -> state().
transport_data(TransportId, Data, State) ->
    case execute({get_server_for_transport, TransportId}, State) of
        {reply, {ok, ServerId}, Found} ->
            case is_guarded(ServerId, Found) of
                true ->
                    ok = route_guarded(ServerId, TransportId, Data),
                    Found;
                false ->
                    cast({route_to_server, ServerId, TransportId, Data}, Found)
            end;
        {reply, {error, _}, Found} ->
            ok = erlmcp_registry_native:unknown_target(server_of, TransportId),
            Found
    end.


%% Whether messages to a server pass the layers of backpressure: if callers route them by themselves.
-spec is_guarded(term(), state()) -> boolean().
is_guarded(ServerId, #state{store = {native, exclusive}}) ->
    erlmcp_rollout_path:of_id(ServerId, erlmcp_rollout_path:read()) =:= straight;
is_guarded(_ServerId, _State) ->
    false.


-spec route_guarded(term(), term(), term()) -> ok.
route_guarded(ServerId, TransportId, Data) ->
    Routed = erlmcp_registry_native:route_server(ServerId, TransportId),
    case erlmcp_delivery:deliver(Routed, {mcp_message, TransportId, Data}) of
        ok -> ok;
        {error, not_found} -> erlmcp_registry_native:unknown_target(server, ServerId);
        {error, Reason} -> erlmcp_registry_native:undelivered(server, ServerId, Reason)
    end.


%%% Commands of `erlmcp_rollout'


-spec command(term(), gen_server:from() | none, state()) -> {reply, term(), state()} | {noreply, state()}.
command({set, Mode, _Options}, From, #state{switch = #switch{to = Mode, callers = Callers} = Switch} = State) ->
    {noreply, State#state{switch = Switch#switch{callers = [From | Callers]}}};
command({set, _Mode, _Options}, _From, #state{switch = #switch{to = Other}} = State) ->
    {reply, {error, {switching_to, Other}}, State};
command({set, Mode, Options}, From, #state{cleaning = Cleaning, postponed = Postponed} = State) ->
    case mode() of
        Mode ->
            ok = erlmcp_rollout:remember(Mode),
            {reply, ok, State};
        _Other when Cleaning =:= none ->
            {noreply, start_switch(Mode, Options, [From], State)};
        _Other ->
            {noreply, State#state{postponed = Postponed ++ [{From, {set, Mode, Options}}]}}
    end;
command(await_switch, From, #state{switch = #switch{callers = Callers} = Switch} = State) ->
    {noreply, State#state{switch = Switch#switch{callers = [From | Callers]}}};
command(await_switch, _From, State) ->
    {reply, ok, State};
command(barrier, _From, State) ->
    {reply, ok, State};
command({route, Cast}, _From, State) ->
    {reply, ok, cast(Cast, State)};
command(status, _From, State) ->
    {reply, status(State), State};
command(_Unknown, _From, State) ->
    {reply, {error, unknown_request}, State}.


-spec status(state()) -> map().
status(#state{store = Store, switch = Switch, last_switch = LastSwitch}) ->
    {Classic, Native} = case Store of
                            {classic, State} -> {classic_status(State), not_in_use};
                            {native, Registry} -> {not_in_use, erlmcp_registry_native:counts(Registry)}
                        end,
    #{
      mode => mode(),
      switching_to =>
          case Switch of
              none -> none;
              #switch{to = Mode} -> Mode
          end,
      last_switch => LastSwitch,
      classic => Classic,
      native => Native
     }.


-spec classic_status(erlmcp_registry_classic:state()) -> map().
classic_status(Store) ->
    (erlmcp_registry_classic:counts(Store))#{adopting => not erlmcp_registry_classic:is_adopted(Store)}.


%%% A switch


-spec start_switch(erlmcp_rollout:mode(), erlmcp_rollout:options(), [gen_server:from() | none], state()) -> state().
start_switch(Mode, Options, Callers, #state{store = Store} = State) ->
    Switch = fun(Stage) ->
                     #switch{
                       from = mode(),
                       to = Mode,
                       max_pause_ms = erlmcp_rollout:max_pause_ms(Options),
                       began_ms = now_ms(),
                       stage = Stage,
                       callers = Callers
                      }
             end,
    case Store of
        {native, exclusive} when Mode =:= current ->
            ok = erlmcp_rollout_path:hold_changes(),
            Copy = erlmcp_rollout_copy:to_classic(erlmcp_registry_classic:new(?KEEPER)),
            go_on(State#state{switch = Switch({copying, Copy})});
        {classic, Source} when Mode =/= current ->
            ok = erlmcp_registry_native:open(exclusive),
            go_on(State#state{switch = Switch({copying, erlmcp_rollout_copy:to_native(Source)})});
        _SameStore ->
            done(ok, State#state{switch = Switch({draining, 0})})
    end.


-spec go_on(state()) -> state().
go_on(State) ->
    Turn = make_ref(),
    self() ! {erlmcp_rollout, Turn, continue},
    State#state{turn = Turn}.


-spec go_on_switching(state()) -> state().
go_on_switching(#state{switch = #switch{stage = {copying, Copy}} = Switch, store = Store} = State) ->
    case is_too_slow(Switch) of
        true ->
            {Copied, Total} = erlmcp_rollout_copy:progress(Copy),
            give_up({too_slow, Copied, Total}, Copy, State);
        false ->
            case erlmcp_rollout_copy:slice(Copy, source(Store)) of
                {continue, Next} ->
                    go_on(State#state{switch = Switch#switch{stage = {copying, Next}}});
                {done, Next} ->
                    flip(Next, State);
                {error, Error, Next} ->
                    give_up(Error, Next, State)
            end
    end;
go_on_switching(#state{switch = #switch{stage = {draining, 0}}} = State) ->
    done(ok, State);
go_on_switching(#state{switch = #switch{stage = {draining, Left}} = Switch} = State) ->
    go_on(State#state{switch = Switch#switch{stage = {draining, Left - 1}}}).


-spec is_too_slow(#switch{}) -> boolean().
is_too_slow(#switch{waiting_since_ms = none}) -> false;
is_too_slow(#switch{max_pause_ms = infinity}) -> false;
is_too_slow(#switch{waiting_since_ms = Since, max_pause_ms = Max}) -> now_ms() - Since >= Max.


%% The target is complete. Puts it in force.
-spec flip(erlmcp_rollout_copy:copy(), state()) -> state().
flip(Copy, #state{store = {native, exclusive}, switch = #switch{to = Mode} = Switch} = State) ->
    ok = erlmcp_rollout_path:put_in_force(Mode),
    Flipped = State#state{
                store = classic(erlmcp_rollout_copy:target(Copy)),
                cleaning = erlmcp_rollout_copy:cleaning(native),
                switch = Switch#switch{progress = erlmcp_rollout_copy:progress(Copy)}
               },
    done(ok, make_changes(Flipped));
flip(Copy, #state{store = {classic, Source}, switch = Switch} = State) ->
    %% Nothing goes straight before the mailbox has been drained.
    ok = erlmcp_rollout_path:put_in_force({percent, 0}),
    ok = erlmcp_registry_classic:close(Source),
    go_on(make_changes(State#state{
                         store = {native, exclusive},
                         cleaning = erlmcp_rollout_copy:cleaning(Source),
                         switch = Switch#switch{
                                    stage = {draining, 1},
                                    progress = erlmcp_rollout_copy:progress(Copy)
                                   }
                        })).


%% The source stays in force.
-spec give_up(error(), erlmcp_rollout_copy:copy(), state()) -> state().
give_up(Error, Copy, #state{store = Store, switch = #switch{from = Mode} = Switch} = State) ->
    ok = erlmcp_rollout_path:put_in_force(Mode),
    Target = erlmcp_rollout_copy:abandon(Copy, source(Store)),
    _ = Target =:= native orelse erlmcp_registry_classic:close(Target),
    Kept = State#state{
             cleaning = erlmcp_rollout_copy:cleaning(Target),
             switch = Switch#switch{progress = erlmcp_rollout_copy:progress(Copy)}
            },
    done({error, Error}, make_changes(Kept)).


%% Makes the changes that have waited, in the order in which they arrived.
-spec make_changes(state()) -> state().
make_changes(#state{switch = #switch{changes = Changes, waiting_since_ms = Since} = Switch} = State) ->
    Waited = case Since of
                 none -> 0;
                 _ -> now_ms() - Since
             end,
    Made = lists:foldr(fun({From, Request}, State0) ->
                               {reply, Reply, State1} = execute(Request, State0),
                               ok = gen_server:reply(From, Reply),
                               State1
                       end,
                       State,
                       Changes),
    Made#state{switch = Switch#switch{changes = [], waiting_since_ms = none, longest_wait_ms = Waited}}.


-spec done(ok | {error, error()}, state()) -> state().
done(Result, #state{switch = #switch{from = From, to = To, callers = Callers} = Switch} = State) ->
    {Copied, Total} = Switch#switch.progress,
    Done = #{
             from => From,
             to => To,
             result => Result,
             copied => Copied,
             entries => Total,
             duration_ms => now_ms() - Switch#switch.began_ms,
             longest_wait_ms => Switch#switch.longest_wait_ms
            },
    case Result of
        ok ->
            _ = mode() =:= To orelse erlmcp_rollout_path:put_in_force(To),
            ok = erlmcp_rollout:remember(To),
            ok = erlmcp_native_log:log(notice, switched, #{from => From, to => To, details => Done});
        {error, Reason} ->
            ok = erlmcp_native_log:log(error, switch_failed, #{from => From, to => To, reason => Reason, details => Done})
    end,
    lists:foreach(fun(Caller) -> reply(Caller, Result) end, Callers),
    go_on(State#state{switch = none, last_switch = Done}).


%% The caller is `none' when the process itself switches to the configured mode at its start.
-spec reply(gen_server:from() | none, term()) -> ok.
reply(none, _Result) -> ok;
reply(Caller, Result) -> gen_server:reply(Caller, Result).


%% When nothing is left to clean, starts the switches that have waited for that.
-spec go_on_cleaning(state()) -> state().
go_on_cleaning(#state{cleaning = none, postponed = []} = State) ->
    State;
go_on_cleaning(#state{cleaning = none, postponed = [{From, Command} | Others]} = State0) ->
    case command(Command, From, State0#state{postponed = Others}) of
        {noreply, State} ->
            State;
        {reply, Reply, State} ->
            ok = reply(From, Reply),
            go_on(State)
    end;
go_on_cleaning(#state{cleaning = Cleaning} = State) ->
    case erlmcp_rollout_copy:clean(Cleaning) of
        {continue, Left} -> go_on(State#state{cleaning = Left});
        done -> go_on(State#state{cleaning = none})
    end.


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).


%%% Termination


%% @doc For status reports, which end up in logs: no configs.
-spec summary(state()) -> map().
summary(#state{store = {native, Registry}}) ->
    (erlmcp_registry_native:counts(Registry))#{bindings => maps:from_list(erlmcp_registry_native:bindings(Registry))};
summary(#state{store = {classic, Store}}) ->
    (erlmcp_registry_classic:counts(Store))#{bindings => erlmcp_registry_classic:bindings(Store)}.


%% @doc An orderly exit clears the registry. After any other exit the next process of the name adopts it. The
%% native registry of an anonymous process is freed with the last reference to it.
-spec terminate(term(), state()) -> ok.
terminate(normal, State) -> clear(State);
terminate(shutdown, State) -> clear(State);
terminate({shutdown, _}, State) -> clear(State);
terminate(_Reason, _State) -> ok.


-spec clear(state()) -> ok.
clear(#state{kind = anonymous}) ->
    ok;
clear(#state{store = Store}) ->
    case Store of
        {classic, Classic} ->
            ok = erlmcp_registry_classic:close(Classic),
            ok = erlmcp_registry_classic:delete(Classic);
        {native, exclusive} -> ok = erlmcp_registry_classic:discard(?KEEPER)
    end,
    case erlmcp_registry_native:load_error() of
        none -> erlmcp_registry_native:close(exclusive);
        _NotLoaded -> ok
    end.
