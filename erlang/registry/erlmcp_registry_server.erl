%%% @private
%%% What the process of {@link erlmcp_registry} does.
%%%
%%% The named one has the default native registry, or the classic one in its state, or both, as the plan
%%% says ({@link erlmcp_rollout_plan}), and makes the switches between them. An anonymous one has a
%%% registry of its own, of the kind that is in use when it starts, and keeps it.
-module(erlmcp_registry_server).

-include_lib("kernel/include/logger.hrl").

-export([init/1, continue/1, call/3, cast/2, info/2, terminate/2, summary/1]).

-export_type([state/0]).

-record(state, {
          %% `exclusive' for the named one, `none' for an anonymous classic one.
          registry :: exclusive | reference() | none,
          classic = none :: none | erlmcp_registry_classic:state(),
          %% With those who wait for its end.
          switch = none :: none | {reference(), erlmcp_rollout_switch:switch(), [gen_server:from()]},
          last_switch = none :: none | erlmcp_rollout_switch:result(),
          compared = 0 :: non_neg_integer(),
          differences = 0 :: non_neg_integer(),
          last_difference = none :: none | map()
         }).

-opaque state() :: #state{}.

-define(KEEPER, erlmcp_registry_keeper).

%%% Start


%% Registrations that the named process before this one has left are adopted.
-spec init(named | anonymous) -> {ok, state()} | {stop, term()}.
init(Name) ->
    case erlmcp_rollout:wanted() of
        {error, LoadError} -> {stop, {nif_not_loaded, LoadError}};
        {ok, Wanted} when Name =:= anonymous -> {ok, new(Wanted)};
        {ok, _Wanted} ->
            ok = erlmcp_rollout:warn_unless_started(),
            _ = erlmcp_native_registry:load_error() =:= none andalso erlmcp_backpressure:configure_alone(),
            {ok, adopt(erlmcp_rollout_plan:read())}
    end.


-spec new(erlmcp_rollout:mode()) -> state().
new(current) -> with_classic(#state{registry = none}, erlmcp_registry_classic:open(none));
new(_WithNative) -> #state{registry = erlmcp_shard_registry:new(#{})}.


-spec adopt(erlmcp_rollout_plan:plan()) -> state().
adopt(Plan) ->
    State = #state{registry = exclusive},
    case erlmcp_rollout_plan:keepers(Plan) of
        native ->
            ok = erlmcp_nif:open(exclusive),
            State;
        classic ->
            with_classic(State, erlmcp_registry_classic:open(?KEEPER));
        both ->
            ok = erlmcp_nif:open(exclusive),
            adopt_both(erlmcp_rollout_plan:authority(Plan), erlmcp_rollout_plan:share(Plan), State)
    end.


%% The mailbox has gone, and with it what ids that were joining would have waited for.
-spec adopt_both(native | classic, 0..100, state()) -> state().
adopt_both(native, Share, State) ->
    Classic0 = erlmcp_registry_classic:new(?KEEPER),
    Classic = lists:foldl(fun(Entry, Classic1) ->
                                  {ok, Classic2} = erlmcp_registry_pair:follow(Entry, native, Classic1),
                                  Classic2
                          end,
                          Classic0,
                          erlmcp_registry_pair:ids(native, Classic0)),
    ok = erlmcp_rollout_plan:write(both, #{share => Share}),
    with_classic(State, Classic);
adopt_both(classic, _Share, State) ->
    %% Killed while it copied into the native registry, which nobody has used yet.
    ok = erlmcp_rollout_plan:write(classic, #{share => 0}),
    ok = erlmcp_native_registry:close(exclusive),
    with_classic(State, erlmcp_registry_classic:open(?KEEPER)).


%% In a flood the mailbox would otherwise go through the garbage collections of the process.
-spec with_classic(state(), erlmcp_registry_classic:state()) -> state().
with_classic(State, Classic) ->
    _ = process_flag(message_queue_data, off_heap),
    State#state{classic = Classic}.


%% The mode that was set while there was no process, or that a switch which was cut short has left.
-spec continue(state()) -> state().
continue(#state{registry = exclusive} = State) ->
    {ok, Wanted} = erlmcp_rollout:wanted(),
    case erlmcp_rollout_switch:mode(erlmcp_rollout_plan:read()) of
        Wanted -> State;
        _ -> start_switch(Wanted, [], State)
    end;
continue(State) ->
    State.


%%% Requests


-spec call(term(), gen_server:from(), state()) -> {reply, term(), state()} | {noreply, state()}.
call({erlmcp_rollout, Command}, From, #state{registry = exclusive} = State) ->
    command(Command, From, State);
call(Request, _From, State) ->
    try
        execute(Request, State)
    catch
        error:badarg -> {reply, {error, badarg}, State}
    end.


-spec execute(term(), state()) -> {reply, term(), state()}.
execute(Request, State) ->
    case keepers(State) of
        {native, Registry} ->
            {reply, erlmcp_registry_native:execute(Registry, Request), State};
        classic ->
            {Reply, Classic} = erlmcp_registry_classic:execute(Request, State#state.classic),
            {reply, Reply, State#state{classic = Classic}};
        both ->
            execute_in_both(Request, State)
    end.


-spec keepers(state()) -> {native, erlmcp_nif:registry()} | classic | both.
keepers(#state{registry = none}) ->
    classic;
keepers(#state{registry = exclusive}) ->
    case erlmcp_rollout_plan:keepers(erlmcp_rollout_plan:read()) of
        native -> {native, exclusive};
        Others -> Others
    end;
keepers(#state{registry = Registry}) ->
    {native, Registry}.


-spec execute_in_both(term(), state()) -> {reply, term(), state()}.
execute_in_both(Request, State) ->
    case read(Request) of
        none ->
            {Reply, Followed, Classic} =
                erlmcp_registry_pair:execute(Request, authority(State), State#state.classic),
            {reply, Reply, followed(Followed, State#state{classic = Classic})};
        Entry ->
            case reader(State) of
                native ->
                    {reply, erlmcp_registry_native:execute(exclusive, Request), State};
                classic ->
                    {Reply, Classic} = erlmcp_registry_classic:execute(Request, State#state.classic),
                    {reply, Reply, compare(Entry, State#state{classic = Classic})}
            end
    end.


%% The entry that a request reads, `all' of them, or `none' if it is a change.
-spec read(term()) -> none | all | erlmcp_registry_pair:entry().
read({find_server, Id}) -> {server, Id};
read({find_transport, Id}) -> {transport, Id};
read({get_server_for_transport, Id}) -> {transport, Id};
read(list_servers) -> all;
read(list_transports) -> all;
read(get_all_state) -> all;
read(_Change) -> none.


%% Of both, the one that decides.
-spec authority(state()) -> erlmcp_registry_pair:authority().
authority(#state{switch = {_, Switch, _}}) -> erlmcp_rollout_switch:authority(Switch);
authority(#state{switch = none}) -> native.


%% Of both, the one that answers what does not take the native path: as long as it is complete, the
%% classic one.
-spec reader(state()) -> native | classic.
reader(#state{switch = {_, Switch, _}}) ->
    case erlmcp_rollout_switch:source(Switch) of
        '100x' -> native;
        _ -> classic
    end;
reader(#state{switch = none}) ->
    classic.


%%% Messages


-spec cast(term(), state()) -> state().
cast({erlmcp_rollout, Note}, #state{registry = exclusive} = State) ->
    note(Note, State);
cast(Cast, State) ->
    case keepers(State) of
        {native, Registry} ->
            ok = erlmcp_registry_native:route(Registry, Cast),
            State;
        classic ->
            State#state{classic = erlmcp_registry_classic:route(Cast, State#state.classic)};
        both ->
            route_in_both(Cast, State)
    end.


-spec route_in_both(term(), state()) -> state().
route_in_both(Cast, State) ->
    case reader(State) of
        native ->
            ok = erlmcp_registry_native:route(exclusive, Cast),
            State;
        classic ->
            Routed = State#state{classic = erlmcp_registry_classic:route(Cast, State#state.classic)},
            case Cast of
                {route_to_server, Id, _From, _Message} -> compare({server, Id}, Routed);
                {route_to_transport, Id, _From, _Message} when Id =/= broadcast -> compare({transport, Id}, Routed);
                _ -> Routed
            end
    end.


%% From the functions of `erlmcp_registry', in the processes of those who call them.
-spec note(term(), state()) -> state().
note({check, {_Kind, _Id} = Entry, Routed}, State) ->
    case keepers(State) of
        both -> check(Entry, Routed, State);
        _ -> State
    end;
note({send_to_transport, Id, Message}, State) ->
    %% A transport with the name `broadcast'.
    case execute({find_transport, Id}, State) of
        {reply, {ok, {Pid, _Config}}, Found} ->
            Pid ! Message,
            Found;
        {reply, {error, not_found}, Found} ->
            ok = erlmcp_registry_native:unknown_target(transport, Id),
            Found
    end;
note(_Unknown, State) ->
    State.


-spec info(term(), state()) -> state().
info({erlmcp_rollout, Reference, continue}, #state{switch = {Reference, Switch, Waiting}} = State) ->
    switched(erlmcp_rollout_switch:continue(Switch, State#state.classic), Waiting, State);
info(_Info, #state{classic = none} = State) ->
    State;
info(Info, #state{classic = Classic} = State) ->
    case keepers(State) of
        both ->
            {Followed, New} = erlmcp_registry_pair:info(Info, authority(State), Classic),
            followed(Followed, State#state{classic = New});
        classic ->
            State#state{classic = erlmcp_registry_classic:info(Info, Classic)}
    end.


%%% Switches


-spec command(term(), gen_server:from(), state()) -> {reply, term(), state()} | {noreply, state()}.
command({set, Mode}, From, #state{switch = {Reference, Switch, Waiting}} = State) ->
    case erlmcp_rollout_switch:target(Switch) of
        Mode -> {noreply, State#state{switch = {Reference, Switch, [From | Waiting]}}};
        Other -> {reply, {error, {switching_to, Other}}, State}
    end;
command({set, Mode}, From, State) ->
    case erlmcp_rollout_switch:mode(erlmcp_rollout_plan:read()) of
        Mode ->
            ok = remember(Mode, [From]),
            {noreply, State};
        _ -> {noreply, start_switch(Mode, [From], State)}
    end;
command(await_switch, From, #state{switch = {Reference, Switch, Waiting}} = State) ->
    {noreply, State#state{switch = {Reference, Switch, [From | Waiting]}}};
command(await_switch, _From, State) ->
    {reply, ok, State};
command({compare, IsComparing}, _From, State) ->
    ok = erlmcp_rollout_plan:compare(IsComparing),
    {reply, ok, State};
command(barrier, _From, State) ->
    {reply, ok, State};
command({route, Cast}, _From, State) ->
    {reply, ok, cast(Cast, State)};
command({broadcast, ServerId, Message}, _From, State) ->
    case erlmcp_rollout_plan:path(ServerId, erlmcp_rollout_plan:read()) of
        classic -> {reply, ok, cast({route_to_transport, broadcast, ServerId, Message}, State)};
        _ -> {reply, erlmcp_registry_detour:broadcast_natively(ServerId, Message), State}
    end;
command(status, _From, State) ->
    {reply, status(State), State};
command(_Unknown, _From, State) ->
    {reply, {error, unknown_request}, State}.


-spec start_switch(erlmcp_rollout:mode(), [gen_server:from()], state()) -> state().
start_switch(Mode, Waiting, #state{classic = Classic0} = State) ->
    {Switch, Classic} = erlmcp_rollout_switch:start(Mode, ?KEEPER, Classic0),
    switched({continue, Switch, Classic}, Waiting, with_classic(State, Classic)).


-spec switched({continue, erlmcp_rollout_switch:switch(), erlmcp_registry_classic:state()} |
               {done, erlmcp_rollout_switch:result(), erlmcp_registry_classic:state() | none},
               [gen_server:from()],
               state()) -> state().
switched({continue, Switch, Classic}, Waiting, State) ->
    Reference = make_ref(),
    self() ! {erlmcp_rollout, Reference, continue},
    State#state{switch = {Reference, Switch, Waiting}, classic = Classic};
switched({done, #{result := Result, from := Source, to := Target} = Done, Classic}, Waiting, State) ->
    case Result of
        ok ->
            ok = remember(Target, Waiting),
            ?LOG_NOTICE("erlmcp_native: switched from ~tp to ~tp: ~tp",
                        [Source, Target, Done],
                        #{domain => [erlmcp_native], event => switched});
        {error, Reason} ->
            ?LOG_ERROR("erlmcp_native: not switched from ~tp to ~tp, because of ~tp: ~tp",
                       [Source, Target, Reason, Done],
                       #{domain => [erlmcp_native], event => switch_failed}),
            _ = [ gen_server:reply(From, Result) || From <- Waiting ]
    end,
    State#state{switch = none, last_switch = Done, classic = Classic}.


%% The next process under this name starts with what is configured, so that is written whether the one who
%% has asked is still there or not; and not by this process, since the application controller answers
%% nobody while it stops an application. Those who wait are told when it is done.
-spec remember(erlmcp_rollout:mode(), [gen_server:from()]) -> ok.
remember(Mode, Waiting) ->
    _ = spawn(fun() ->
                      ok = erlmcp_rollout:remember(Mode),
                      [ gen_server:reply(From, ok) || From <- Waiting ]
              end),
    ok.


-spec followed(ok | {error, term()}, state()) -> state().
followed(ok, State) ->
    State;
followed({error, Error}, #state{switch = {_, Switch, Waiting}, classic = Classic} = State) ->
    switched(erlmcp_rollout_switch:follow_failed(Error, Switch, Classic), Waiting, State).


%%% Comparison


%% What the classic registry has answered, against the native one.
-spec compare(all | erlmcp_registry_pair:entry(), state()) -> state().
compare(all, State) ->
    State;
compare(Entry, State) ->
    case erlmcp_rollout_plan:is_comparing(erlmcp_rollout_plan:read()) of
        true -> compare_entry(Entry, State);
        false -> State
    end.


%% What the native registry has answered a little while ago, against the classic one. If that is
%% something else, what both answer now.
-spec check(erlmcp_registry_pair:entry(), Routed :: pid() | undefined, state()) -> state().
check({Kind, Id} = Entry, Routed, #state{classic = Classic0} = State) ->
    {Row, Classic} = erlmcp_registry_classic:row(Kind, Id, Classic0),
    case Row of
        {Routed, _Config, _Binding} -> compared(State#state{classic = Classic});
        none when Routed =:= undefined -> compared(State#state{classic = Classic});
        _ -> compare_entry(Entry, State#state{classic = Classic})
    end.


-spec compare_entry(erlmcp_registry_pair:entry(), state()) -> state().
compare_entry({Kind, Id} = Entry, #state{classic = Classic0, differences = Differences} = State) ->
    case erlmcp_registry_pair:are_equal(Entry, Classic0) of
        {true, Classic} ->
            compared(State#state{classic = Classic});
        {false, Classic1} ->
            {InClassic, Classic} = erlmcp_registry_classic:row(Kind, Id, Classic1),
            Difference = #{
                           kind => Kind,
                           id => Id,
                           native => erlmcp_registry_native:row(Kind, Id),
                           classic => InClassic
                          },
            compared(State#state{
                       classic = Classic,
                       differences = Differences + 1,
                       last_difference = Difference
                      })
    end.


-spec compared(state()) -> state().
compared(#state{compared = Compared} = State) ->
    State#state{compared = Compared + 1}.


%%% Status


-spec status(state()) -> map().
status(#state{classic = Classic, switch = Switch} = State) ->
    Plan = erlmcp_rollout_plan:read(),
    #{
      mode => erlmcp_rollout_switch:mode(Plan),
      switching_to =>
          case Switch of
              none -> none;
              {_, Running, _} -> erlmcp_rollout_switch:target(Running)
          end,
      last_switch => State#state.last_switch,
      comparison =>
          #{
            is_on => erlmcp_rollout_plan:is_comparing(Plan),
            compared => State#state.compared,
            differences => State#state.differences,
            last_difference => State#state.last_difference
           },
      classic =>
          case Classic of
              none -> not_in_use;
              _ -> erlmcp_registry_classic:counts(Classic)
          end,
      native =>
          case erlmcp_rollout_plan:keepers(Plan) of
              classic -> not_in_use;
              _ -> erlmcp_registry_native:counts(exclusive)
          end
     }.


%% For status reports, which end up in logs: no configs.
-spec summary(state()) -> map().
summary(#state{classic = Classic} = State) ->
    {Counts, Bindings} =
        case keepers(State) of
            {native, Registry} ->
                {erlmcp_registry_native:counts(Registry),
                 maps:from_list(erlmcp_native_registry:bindings(Registry))};
            _ ->
                {{ok, {registry_state, InClassic}}, _} = erlmcp_registry_classic:execute(get_all_state, Classic),
                {erlmcp_registry_classic:counts(Classic), InClassic}
        end,
    Counts#{bindings => Bindings}.


%%% End


%% An orderly end clears the registry. Anything else leaves it to the next one under the name. The
%% native registry of an anonymous one goes with the last reference to it.
-spec terminate(term(), state()) -> ok.
terminate(normal, State) -> clear(State);
terminate(shutdown, State) -> clear(State);
terminate({shutdown, _}, State) -> clear(State);
terminate(_Reason, _State) -> ok.


-spec clear(state()) -> ok.
clear(#state{classic = Classic} = State) ->
    _ = Classic =:= none orelse erlmcp_registry_classic:close(Classic),
    case keepers(State) of
        {native, Registry} -> erlmcp_native_registry:close(Registry);
        both -> erlmcp_native_registry:close(exclusive);
        classic -> ok
    end.
