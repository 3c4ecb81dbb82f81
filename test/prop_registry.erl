%%% Stateful properties of the registry: one model, run unchanged against `erlmcp_registry' with the native
%%% store (`native'), with the one in pure Erlang (`classic'), and while it switches between them.
%%%
%%% Model. A map of entries, a map of bindings, and the messages owed to each process. The model states the
%%% contract of erlmcp's registry and knows nothing of an implementation.
%%%
%%% Contract. Ids are compared exactly. The first registration of an id stays. Unregistering a server, or the
%%% exit of its process, removes every binding to it, and unregistering an unknown server removes none. A later
%%% registration never revives a binding. A missing server is reported before a missing transport. Settings are
%%% the defaults, under which no history here is long enough to be refused by backpressure.
%%%
%%% Exits. Once the caller has observed the exit of a process, find and route never return it and its ids can be
%%% registered again. Lists and bindings follow asynchronously: until `settle' has waited for them they may be
%%% read either way. Preconditions exclude what the contract leaves open in that time: binding, updating or
%%% broadcasting to an id whose process has just exited, a new automatic binding to it, and registering an
%%% exited process as a server that has dangling bindings.
%%%
%%% Parallel histories must be linearizable. They leave out what no order of single steps can explain. These are
%%% lists and broadcasts, which read many entries one after another, and the combination of exits and deliveries
%%% in one history, because the inbox of an exited process cannot be read. So a parallel history covers either
%%% deliveries or exits.
-module(prop_registry).
-behaviour(proper_statem).

-include_lib("proper/include/proper.hrl").

%% Properties
-export([prop_sequential_native/0,
         prop_sequential_classic/0,
         prop_parallel_native/0,
         prop_sequential_switching/0,
         prop_parallel_switching/0,
         prop_parallel_classic/0]).
-export([unseen/0]).

%% proper_statem
-export([initial_state/0, command/1, precondition/2, postcondition/3, next_state/3]).

%% Commands
-export([register_server/4,
         register_transport/4,
         register_no_process/3,
         unregister_server/2,
         unregister_transport/2,
         update_server/3,
         find_server/2,
         find_transport/2,
         list_servers/1,
         list_transports/1,
         bind_transport_to_server/3,
         unbind_transport/2,
         get_server_for_transport/2]).
-export([route_to_server/4,
         route_to_transport/4,
         broadcast/3,
         deliver_to_server/3,
         deliver_to_transport/3]).
-export([end_process/3, settle/1]).

%% The names of the processes of one history. Few are in use at a time, so that ids share processes.
-define(NAMES,        [p1, p2, p3, p4, p5, p6, p7, p8]).
-define(NAMES_IN_USE, 3).

%% The ids of one history, and how many of them it uses at most. Servers and transports have the same ids.
-define(IDS,            [a, <<"b">>, 1, 1.0, {t, 1}, undefined, broadcast]).
-define(SEQUENTIAL_IDS, 3).
-define(PARALLEL_IDS,   2).

%% Runs of each parallel history. Each run is scheduled differently.
-define(PARALLEL_RUNS, 5).

%% Monitors fire in the order of their creation. The monitor of the process that runs the history is older than
%% the registry's, and those of the bystander lie between. An exiting process that has used up most of its time
%% slice is preempted among the bystander's monitors, and the history goes on before the registry knows of the
%% exit: after 99 of 100 such exits on OTP 25, after 3 of 100 without this. An exit signal cannot have that
%% effect.
-define(BYSTANDERS,            150).
-define(REDUCTIONS_BEFORE_END, 3700).

%% How long anything that the contract promises eventually may take.
-define(DEADLINE_MS, 2000).

%% A run must have seen all of these for its success to be meaningful.
-define(SEQUENTIAL_OUTCOMES,
        [already_registered,
         ended_replaced,
         ended_and_bound_replaced,
         ended_registered,
         bound_to_unknown,
         config_not_a_map,
         refused,
         bound_unregistered,
         unknown_left_dangling,
         bound,
         rebound,
         no_server_first,
         no_transport,
         unbound,
         dangling_read,
         undefined_read,
         found,
         not_found,
         updated,
         listed,
         routed,
         routed_nowhere,
         broadcast_to_many,
         broadcast_to_none,
         broadcast_to_dangling,
         shared_ended,
         server_and_transport_ended,
         bound_ended]).
-define(PARALLEL_OUTCOMES,
        [already_registered,
         ended_replaced,
         bound_to_unknown,
         bound_unregistered,
         rebound,
         routed,
         shared_ended,
         interleaved]).
-define(OUTCOMES,            [interleaved | ?SEQUENTIAL_OUTCOMES]).

-type name() :: atom().
-type id() :: term().
-type config() :: term().
-type key() :: {server | transport, id()}.
-type binding() :: {Transport :: id(), Server :: id()}.

%% Calls go to an anonymous instance as plain requests, or to the named one through the module. The named one
%% may be switched between stores all the time.
-type face() :: requests | functions | switching.
-type world() :: #{
                   face := requests | functions,
                   registry := pid(),
                   processes := #{name() => {pid(), reference()}},
                   bystander := pid(),
                   switcher => pid(),
                   owner := pid(),
                   arrivals := atomics:atomics_ref()
                  }.

-record(state, {
          mode = sequential :: sequential | deliveries | ends,
          ids = ?IDS :: [id()],
          alive = ?NAMES :: [name()],
          entries = #{} :: #{key() => {name(), config()}},
          bindings = #{} :: #{Transport :: id() => Server :: id()},
          %% Entries and bindings of exited processes that may still be read.
          ended = [] :: [{key(), {name(), config()}}],
          fading = [] :: [binding()],
          inboxes = #{} :: #{name() => [term()]}
         }).

-type run() :: #{
                 verdict := ok | term(),
                 seen := [atom()],
                 stories := [{Title :: string(), [{tuple(), Result :: term()}]}],
                 model := #state{}
                }.

%%%=============================================================================
%%% Properties
%%%=============================================================================


prop_sequential_native() -> sequential('100x', face()).


prop_sequential_classic() -> sequential(current, face()).


%% The registry is switched between stores all the time.
prop_sequential_switching() -> sequential('100x', switching).


prop_parallel_switching() -> parallel('100x', switching).


prop_parallel_native() -> parallel('100x', face()).


prop_parallel_classic() -> parallel(current, face()).


%% The outcomes that the property created last was expected to see and has not seen.
-spec unseen() -> [atom()].
unseen() ->
    {Wanted, Counters} = persistent_term:get(?MODULE),
    [ Outcome || Outcome <- Wanted, counters:get(Counters, position(Outcome)) =:= 0 ].


sequential(Mode, AnyFace) ->
    expect(?SEQUENTIAL_OUTCOMES),
    ?FORALL(Ids,
            ids(?SEQUENTIAL_IDS),
            ?FORALL({Face, Commands},
                    {AnyFace, commands(?MODULE, #state{ids = Ids})},
                    judged(Commands,
                           in_world(Mode, Face, sequential_run(Commands))))).


parallel(Registry, AnyFace) ->
    expect(?PARALLEL_OUTCOMES),
    ?FORALL({Mode, Ids},
            {elements([deliveries, ends]), ids(?PARALLEL_IDS)},
            ?FORALL({Face, Commands},
                    {AnyFace, parallel_commands(?MODULE, #state{mode = Mode, ids = Ids})},
                    judged(Commands,
                           repeated(?PARALLEL_RUNS,
                                    fun() -> in_world(Registry, Face, parallel_run(Commands)) end)))).


sequential_run([{init, #state{ids = Ids} = Initial} | _] = Commands) ->
    fun(World) ->
            {History, State, Result} = run_commands(?MODULE, Commands, [{world, World}]),
            Steps = steps(Commands, [ Value || {_Before, Value} <- History ]),
            #{
              verdict => case Result of
                             ok -> settled(State, World);
                             _ -> {Result, view(World, Ids, State#state.alive)}
                         end,
              seen => outcomes(Steps, Initial),
              stories => [{"history", Steps}],
              model => State
             }
    end.


parallel_run({[{init, #state{ids = Ids} = Initial} | _] = Prefix, _Tails} = Commands) ->
    fun(World) ->
            {History, TailHistories, Result} =
                run_parallel_commands(?MODULE, Commands, [{world, World}]),
            Steps = steps(Prefix, [ Value || {_Before, Value} <- History ]),
            Tails = [ [ {Call, Value} || {{set, _Var, Call}, Value} <- Tail ]
                      || Tail <- TailHistories ],
            State = state_after(?MODULE, Prefix),
            #{
              verdict => case Result of
                             ok -> coherent(Ids, World);
                             _ -> {Result, view(World, Ids, [])}
                         end,
              seen => outcomes(Steps, Initial) ++
              [ interleaved || is_interleaved(Tails, State) ],
              stories => [{"before", Steps} | [ {"in parallel", Tail} || Tail <- Tails ]],
              model => State
             }
    end.


repeated(1, Run) -> Run();
repeated(Runs, Run) ->
    case Run() of
        #{verdict := ok} -> repeated(Runs - 1, Run);
        Failed -> Failed
    end.


judged(Commands, #{verdict := Verdict, seen := Seen} = Run) ->
    ok = count(Seen),
    ?WHENFAIL(explain(Run), aggregate(names(Commands) ++ Seen, Verdict =:= ok)).


face() -> elements([requests, functions]).


ids(Number) ->
    noshrink(?LET(Ids, vector(Number, elements(?IDS)), maps:keys(maps:from_keys(Ids, [])))).


names(Commands) -> [ Name || {_Module, Name, _Arity} <- command_names(Commands) ].


steps(Commands, Values) -> zip([ Call || {set, _Var, Call} <- Commands ], Values).


%% Neither order of the two workers, one completely before the other, explains the results: they did overlap.
is_interleaved([First, Second], State) ->
    not explained(First ++ Second, State) andalso not explained(Second ++ First, State);
is_interleaved(_NotRun, _State) ->
    false.


explained([], _State) -> true;
explained([{Call, Value} | Steps], State) ->
    postcondition(State, Call, Value) andalso explained(Steps, next_state(State, Value, Call)).


explain(#{verdict := Verdict, stories := Stories, model := State}) ->
    lists:foreach(fun({Title, Steps}) ->
                          io:format(user, "~n~s:~n", [Title]),
                          lists:foreach(fun explain_step/1, Steps)
                  end,
                  Stories),
    io:format(user, "~nmodel: ~p~n~nverdict: ~p~n", [model(State), Verdict]).


explain_step({{call, _Module, Name, [_World | Arguments]}, Value}) ->
    io:format(user, "  ~s ~0p -> ~0p~n", [Name, Arguments, Value]).


%%%=============================================================================
%%% The model
%%%=============================================================================


initial_state() -> #state{}.


%% The name is drawn first: building the generators of all commands for each draw would take most of the time.
command(State) ->
    ?LET(Name,
         frequency(weights(State)),
         {call, ?MODULE, Name, [{var, world} | arguments(Name, State)]}).


weights(#state{mode = Mode, alive = Alive}) ->
    Common = [{9, register_server},
              {8, register_transport},
              {4, unregister_server},
              {4, unregister_transport},
              {1, update_server},
              {2, find_server},
              {2, find_transport},
              {8, bind_transport_to_server},
              {2, unbind_transport},
              {6, get_server_for_transport}],
    Routes = [{4, route_to_server}, {4, route_to_transport}, {4, broadcast}],
    Others = [{2, list_servers}, {2, list_transports}, {2, settle}, {1, register_no_process}],
    Deliveries = [{5, deliver_to_server}, {5, deliver_to_transport}],
    %% The last process never exits.
    Ends = [ {3, end_process} || length(Alive) > 1 ],
    case Mode of
        sequential -> Common ++ Routes ++ Others ++ Ends;
        deliveries -> Common ++ Deliveries;
        ends -> Common ++ Ends
    end.


arguments(register_server, State) -> [id(State), name(State), config(State)];
arguments(register_transport, State) -> [id(State), name(State), config(State)];
arguments(register_no_process, State) ->
    [elements([register_server, register_transport]), id(State)];
arguments(unregister_server, State) -> [id(server, State)];
arguments(unregister_transport, State) -> [id(transport, State)];
arguments(update_server, State) -> [id(server, State), config(State)];
arguments(find_server, State) -> [id(server, State)];
arguments(find_transport, State) -> [id(transport, State)];
arguments(bind_transport_to_server, State) -> [id(transport, State), id(server, State)];
arguments(unbind_transport, State) -> [id(transport, State)];
arguments(get_server_for_transport, State) -> [id(transport, State)];
arguments(route_to_server, State) -> [id(server, State), id(State), message()];
arguments(route_to_transport, State) -> [id(transport, State), id(State), message()];
arguments(broadcast, State) -> [id(server, State), message()];
arguments(deliver_to_server, State) -> [id(server, State), id(State)];
arguments(deliver_to_transport, State) -> [id(transport, State), id(State)];
arguments(end_process, State) -> [elements(in_use(State)), reason()];
arguments(_NoArguments, _State) -> [].


name(#state{alive = Alive} = State) ->
    Ended = ?NAMES -- Alive,
    frequency([{8, elements(in_use(State))} | [ {1, elements(Ended)} || Ended =/= [] ]]).


in_use(#state{alive = Alive}) -> lists:sublist(Alive, ?NAMES_IN_USE).


reason() -> elements([kill, normal, shutdown, crash]).


message() -> choose(1, 1000000).


id(#state{ids = Ids}) -> elements(Ids).


%% Mostly an id that is in use.
id(Kind, State) ->
    case known_ids(Kind, State) of
        [] -> id(State);
        Known -> frequency([{1, id(State)}, {3, elements(Known)}])
    end.


known_ids(Kind, #state{bindings = Bindings, ended = Ended} = State) ->
    Bound = case Kind of
                server -> maps:values(Bindings);
                transport -> []
            end,
    maps:keys(entries(Kind, State)) ++ Bound ++ [ Id || {{K, Id}, _} <- Ended, K =:= Kind ].


config(#state{ids = Ids}) ->
    frequency([{4, ?LET(Id, elements(Ids), #{server_id => Id})},
               {2, #{}},
               {1, #{mode => stdio, limits => [1, 1.0]}},
               {1, #{server_id => undefined}},
               {1, [{server_id, hd(Ids)}]},
               {1, no_config}]).


precondition(State, {call, _, register_server, [_, Id, Name, _]}) ->
    is_alive(Name, State) orelse not is_server_bound(Id, State);
precondition(State, {call, _, register_transport, [_, Id, _, Config]}) ->
    not lists:any(fun({_, Server}) -> is_ending({server, Server}, State) end,
                  automatic_binding(Id, Config));
precondition(State, {call, _, update_server, [_, Id, _]}) ->
    not is_ending({server, Id}, State);
precondition(State, {call, _, bind_transport_to_server, [_, Transport, Server]}) ->
    not is_ending({transport, Transport}, State) andalso not is_ending({server, Server}, State);
precondition(State, {call, _, broadcast, [_, Server, _]}) ->
    %% A binding to the id `undefined' reads as unbound.
    Server =/= undefined andalso not lists:any(concerns({server, Server}), State#state.fading);
precondition(_State, {call, _, Route, [_, Transport | _]})
  when Route =:= route_to_transport; Route =:= deliver_to_transport ->
    %% A route cannot address the transport `broadcast'.
    Transport =/= broadcast;
precondition(State, {call, _, end_process, [_, Name, _]}) ->
    is_alive(Name, State);
precondition(_State, _Call) ->
    true.


next_state(State, _, {call, _, register_server, [_, Id, Name, Config]}) ->
    register({server, Id}, Name, Config, [], State);
next_state(State, _, {call, _, register_transport, [_, Id, Name, Config]}) ->
    register({transport, Id}, Name, Config, automatic_binding(Id, Config), State);
next_state(State, _, {call, _, unregister_server, [_, Id]}) ->
    unregister({server, Id}, State);
next_state(State, _, {call, _, unregister_transport, [_, Id]}) ->
    unregister({transport, Id}, State);
next_state(State, _, {call, _, update_server, [_, Id, Config]}) ->
    update({server, Id}, Config, State);
next_state(State, _, {call, _, bind_transport_to_server, [_, Transport, Server]}) ->
    case bind_result(Transport, Server, State) of
        ok -> bind([{Transport, Server}], unbind({transport, Transport}, State));
        {error, _} -> State
    end;
next_state(State, _, {call, _, unbind_transport, [_, Transport]}) ->
    unbind({transport, Transport}, State);
next_state(State, _, {call, _, route_to_server, [_, Server, From, Message]}) ->
    owe({mcp_message, From, Message}, receivers({server, Server}, State), State);
next_state(State, _, {call, _, route_to_transport, [_, Transport, From, Message]}) ->
    owe({mcp_response, From, Message}, receivers({transport, Transport}, State), State);
next_state(State, _, {call, _, broadcast, [_, Server, Message]}) ->
    Names = lists:append([ receivers({transport, Transport}, State)
                           || Transport <- bound_to(Server, State) ]),
    owe({mcp_response, Server, Message}, Names, State);
next_state(State, _, {call, _, end_process, [_, Name, _]}) ->
    end_of(Name, State);
next_state(State, _, {call, _, settle, _}) ->
    State#state{ended = [], fading = []};
next_state(State, _, _Reads) ->
    State.


postcondition(State, {call, _, register_server, [_, Id, _, _]}, Result) ->
    Result =:= register_result({server, Id}, State);
postcondition(State, {call, _, register_transport, [_, Id, _, _]}, Result) ->
    Result =:= register_result({transport, Id}, State);
postcondition(_State, {call, _, register_no_process, _}, Result) ->
    Result =:= refused;
postcondition(State, {call, _, update_server, [_, Id, _]}, Result) ->
    case find({server, Id}, State) of
        {ok, _} -> Result =:= ok;
        Missing -> Result =:= Missing
    end;
postcondition(State, {call, _, find_server, [_, Id]}, Result) ->
    Result =:= find({server, Id}, State);
postcondition(State, {call, _, find_transport, [_, Id]}, Result) ->
    Result =:= find({transport, Id}, State);
postcondition(State, {call, _, list_servers, _}, Result) ->
    is_listing(Result, server, State);
postcondition(State, {call, _, list_transports, _}, Result) ->
    is_listing(Result, transport, State);
postcondition(State, {call, _, bind_transport_to_server, [_, Transport, Server]}, Result) ->
    Result =:= bind_result(Transport, Server, State);
postcondition(State, {call, _, get_server_for_transport, [_, Transport]}, Result) ->
    lists:member(Result, binding_results(Transport, State));
postcondition(State, {call, _, deliver_to_server, [_, Server, From]}, Result) ->
    Result =:= [ {Name, mcp_message, From} || Name <- receivers({server, Server}, State) ];
postcondition(State, {call, _, deliver_to_transport, [_, Transport, From]}, Result) ->
    Result =:= [ {Name, mcp_response, From} || Name <- receivers({transport, Transport}, State) ];
postcondition(State, {call, _, settle, [World]}, _Result) ->
    settled(State, World) =:= ok;
postcondition(_State, _Call, Result) ->
    Result =:= ok.


%%% Changes


register(Key, Name, Config, Bindings, #state{entries = Entries, ended = Ended} = State) ->
    case {is_map_key(Key, Entries), is_alive(Name, State)} of
        {true, _} ->
            State;
        {false, true} ->
            %% A dangling binding becomes a binding when its server is registered. A fading one is gone.
            Fading = [ Binding || Binding <- State#state.fading, not (concerns(Key))(Binding) ],
            bind(Bindings,
                 State#state{
                   entries = Entries#{Key => {Name, Config}},
                   ended = forget(Key, Ended),
                   fading = Fading
                  });
        {false, false} ->
            State#state{
              ended = [{Key, {Name, Config}} | Ended],
              fading = Bindings ++ State#state.fading
             }
    end.


unregister(Key, #state{entries = Entries, ended = Ended} = State) ->
    case is_map_key(Key, Entries) of
        true -> unbind(Key, State#state{entries = maps:remove(Key, Entries)});
        false -> State#state{ended = forget(Key, Ended)}
    end.


update(Key, Config, #state{entries = Entries} = State) ->
    case Entries of
        #{Key := {Name, _}} -> State#state{entries = Entries#{Key => {Name, Config}}};
        #{} -> State
    end.


bind(Bindings, State) ->
    State#state{bindings = maps:merge(State#state.bindings, maps:from_list(Bindings))}.


unbind(Key, #state{bindings = Bindings, fading = Fading} = State) ->
    Concerns = concerns(Key),
    State#state{
      bindings = maps:filter(fun(T, S) -> not Concerns({T, S}) end, Bindings),
      fading = [ Binding || Binding <- Fading, not Concerns(Binding) ]
     }.


end_of(Name, #state{entries = Entries, bindings = Bindings} = State) ->
    Ended = maps:to_list(maps:filter(fun(_, {Holder, _}) -> Holder =:= Name end, Entries)),
    Lost = [ Binding || Binding <- maps:to_list(Bindings),
                        {Key, _} <- Ended,
                        (concerns(Key))(Binding) ],
    State#state{
      alive = lists:delete(Name, State#state.alive),
      entries = maps:without([ Key || {Key, _} <- Ended ], Entries),
      bindings = maps:without([ Transport || {Transport, _} <- Lost ], Bindings),
      ended = Ended ++ State#state.ended,
      fading = Lost ++ State#state.fading
     }.


owe(Message, Names, #state{inboxes = Inboxes} = State) ->
    Deliver = fun(Name, Acc) ->
                      maps:update_with(Name, fun(Inbox) -> Inbox ++ [Message] end, [Message], Acc)
              end,
    State#state{inboxes = lists:foldl(Deliver, Inboxes, Names)}.


forget(Key, Ended) -> [ Entry || {Other, _} = Entry <- Ended, Other =/= Key ].


%%% Reads


register_result(Key, #state{entries = Entries}) when is_map_key(Key, Entries) ->
    {error, already_registered};
register_result(_Key, _State) ->
    ok.


bind_result(Transport, Server, #state{entries = Entries}) ->
    case {is_map_key({server, Server}, Entries), is_map_key({transport, Transport}, Entries)} of
        {true, true} -> ok;
        {true, false} -> {error, transport_not_found};
        {false, _} -> {error, server_not_found}
    end.


find(Key, #state{entries = Entries}) ->
    case Entries of
        #{Key := Entry} -> {ok, Entry};
        #{} -> {error, not_found}
    end.


binding_results(Transport, #state{bindings = Bindings, fading = Fading}) ->
    case Bindings of
        #{Transport := undefined} -> [{error, not_found}];
        #{Transport := Server} -> [{ok, Server}];
        #{} -> [{error, not_found} | [ {ok, Server} || {T, Server} <- Fading, T =:= Transport ]]
    end.


%% Every entry is listed once. The only other entries listed are those of processes that have just exited.
is_listing(Listed, Kind, #state{ended = Ended} = State) when is_map(Listed) ->
    Expected = entries(Kind, State),
    Surplus = maps:without(maps:keys(Expected), Listed),
    maps:with(maps:keys(Expected), Listed) =:= Expected andalso
    lists:all(fun({Id, Entry}) -> lists:member({{Kind, Id}, Entry}, Ended) end,
              maps:to_list(Surplus));
is_listing(_Failure, _Kind, _State) ->
    false.


entries(Kind, #state{entries = Entries}) ->
    maps:from_list([ {Id, Entry} || {{K, Id}, Entry} <- maps:to_list(Entries), K =:= Kind ]).


receivers(Key, State) ->
    case find(Key, State) of
        {ok, {Name, _}} -> [Name];
        {error, not_found} -> []
    end.


bound_to(Server, #state{bindings = Bindings}) ->
    [ Transport || {Transport, S} <- maps:to_list(Bindings), S =:= Server ].


is_server_bound(Server, State) -> bound_to(Server, State) =/= [].


is_alive(Name, #state{alive = Alive}) -> lists:member(Name, Alive).


is_ending(Key, #state{ended = Ended}) -> lists:member(Key, [ Other || {Other, _} <- Ended ]).


%% Whether a binding is removed with an entry.
concerns({server, Server}) -> fun({_, S}) -> S =:= Server end;
concerns({transport, Transport}) -> fun({T, _}) -> T =:= Transport end.


automatic_binding(_Transport, #{server_id := undefined}) -> [];
automatic_binding(Transport, #{server_id := Server}) -> [{Transport, Server}];
automatic_binding(_Transport, _Config) -> [].


%%%=============================================================================
%%% Outcomes
%%%=============================================================================


outcomes([], _State) -> [];
outcomes([{Call, Value} | Steps], State) ->
    outcomes_of(Call, Value, State) ++ outcomes(Steps, next_state(State, Value, Call)).


outcomes_of({call, _, register_server, [_, Id, Name, _]}, Result, State) ->
    [ ended_and_bound_replaced
      || Result =:= ok,
         is_alive(Name, State),
         is_ending({server, Id}, State),
         lists:any(concerns({server, Id}), State#state.fading) ] ++
    registration_outcomes({server, Id}, Name, Result, State);
outcomes_of({call, _, register_transport, [_, Id, Name, Config]}, Result, State) ->
    [ config_not_a_map || Result =:= ok, not is_map(Config) ] ++
    [ bound_to_unknown || Result =:= ok,
                          {_, Server} <- automatic_binding(Id, Config),
                          receivers({server, Server}, State) =:= [] ] ++
    registration_outcomes({transport, Id}, Name, Result, State);
outcomes_of({call, _, register_no_process, _}, Result, _State) ->
    [Result];
outcomes_of({call, _, unregister_server, [_, Id]}, ok, State) ->
    case {receivers({server, Id}, State), is_server_bound(Id, State)} of
        {[_], true} -> [bound_unregistered];
        {[], true} -> [unknown_left_dangling];
        {_, false} -> []
    end;
outcomes_of({call, _, bind_transport_to_server, [_, Transport, Server]}, Result, State) ->
    case {Result, State#state.bindings} of
        {ok, #{Transport := Other}} when Other =/= Server -> [rebound];
        {ok, _} -> [bound];
        {{error, server_not_found}, _} ->
            [ no_server_first || receivers({transport, Transport}, State) =:= [] ];
        {{error, transport_not_found}, _} -> [no_transport];
        {_Unexpected, _} -> []
    end;
outcomes_of({call, _, unbind_transport, [_, Transport]}, ok, State) ->
    [ unbound || is_map_key(Transport, State#state.bindings) ];
outcomes_of({call, _, get_server_for_transport, [_, Transport]}, Result, State) ->
    case {Result, State#state.bindings} of
        {{ok, Server}, _} -> [ dangling_read || receivers({server, Server}, State) =:= [] ];
        {_, #{Transport := undefined}} -> [undefined_read];
        {_, _} -> []
    end;
outcomes_of({call, _, Find, _}, Result, _State)
  when Find =:= find_server; Find =:= find_transport ->
    case Result of
        {ok, _} -> [found];
        {error, not_found} -> [not_found];
        _Unexpected -> []
    end;
outcomes_of({call, _, update_server, _}, Result, _State) ->
    [ updated || Result =:= ok ];
outcomes_of({call, _, List, _}, Result, _State)
  when List =:= list_servers; List =:= list_transports ->
    [ listed || is_map(Result), map_size(Result) > 1 ];
outcomes_of({call, _, route_to_server, [_, Id, _, _]}, ok, State) ->
    [route_outcome({server, Id}, State)];
outcomes_of({call, _, route_to_transport, [_, Id, _, _]}, ok, State) ->
    [route_outcome({transport, Id}, State)];
outcomes_of({call, _, deliver_to_server, [_, Id, _]}, _Result, State) ->
    [route_outcome({server, Id}, State)];
outcomes_of({call, _, deliver_to_transport, [_, Id, _]}, _Result, State) ->
    [route_outcome({transport, Id}, State)];
outcomes_of({call, _, broadcast, [_, Server, _]}, ok, State) ->
    Bound = bound_to(Server, State),
    [ broadcast_to_none || Bound =:= [] ] ++
    [ broadcast_to_many || length(Bound) > 1 ] ++
    [ broadcast_to_dangling || Bound =/= [], receivers({server, Server}, State) =:= [] ];
outcomes_of({call, _, end_process, [_, Name, _]}, ok, State) ->
    Held = [ Key || {Key, {Holder, _}} <- maps:to_list(State#state.entries), Holder =:= Name ],
    [ shared_ended || length(Held) > 1 ] ++
    [ server_and_transport_ended || length(lists:usort([ Kind || {Kind, _} <- Held ])) > 1 ] ++
    [ bound_ended || lists:any(fun({server, Id}) -> is_server_bound(Id, State);
                                  ({transport, _}) -> false
                               end,
                               Held) ];
outcomes_of(_Call, _Result, _State) ->
    [].


registration_outcomes(_Key, _Name, {error, already_registered}, _State) ->
    [already_registered];
registration_outcomes(Key, Name, ok, State) ->
    case {is_alive(Name, State), is_ending(Key, State)} of
        {true, true} -> [ended_replaced];
        {true, false} -> [];
        {false, _} -> [ended_registered]
    end;
registration_outcomes(_Key, _Name, _Unexpected, _State) ->
    [].


route_outcome(Key, State) ->
    case receivers(Key, State) of
        [_] -> routed;
        [] -> routed_nowhere
    end.


expect(Wanted) ->
    persistent_term:put(?MODULE, {Wanted, counters:new(length(?OUTCOMES), [])}).


count(Seen) ->
    {_Wanted, Counters} = persistent_term:get(?MODULE),
    lists:foreach(fun(Outcome) -> counters:add(Counters, position(Outcome), 1) end, Seen).


position(Outcome) -> length(lists:takewhile(fun(Other) -> Other =/= Outcome end, ?OUTCOMES)) + 1.


%%%=============================================================================
%%% Commands
%%%=============================================================================


register_server(World, Id, Name, Config) ->
    request(World, register_server, [Id, process(Name, World), Config]).


register_transport(World, Id, Name, Config) ->
    request(World, register_transport, [Id, process(Name, World), Config]).


%% A function raises function_clause for what is not a pid; a request returns an error.
register_no_process(#{face := Face} = World, Register, Id) ->
    case {Face, request(World, Register, [Id, not_a_process, #{}])} of
        {functions, {raised, error, function_clause}} -> refused;
        {requests, {error, badarg}} -> refused;
        {_, Unexpected} -> Unexpected
    end.


unregister_server(World, Id) -> request(World, unregister_server, [Id]).


unregister_transport(World, Id) -> request(World, unregister_transport, [Id]).


update_server(World, Id, Config) -> request(World, update_server, [Id, Config]).


find_server(World, Id) -> found(request(World, find_server, [Id]), World).


find_transport(World, Id) -> found(request(World, find_transport, [Id]), World).


list_servers(World) -> listed(request(World, list_servers, []), World).


list_transports(World) -> listed(request(World, list_transports, []), World).


bind_transport_to_server(World, Transport, Server) ->
    request(World, bind_transport_to_server, [Transport, Server]).


unbind_transport(World, Transport) -> request(World, unbind_transport, [Transport]).


get_server_for_transport(World, Transport) ->
    request(World, get_server_for_transport, [Transport]).


route_to_server(World, Server, From, Message) ->
    route(World, route_to_server, [Server, From, Message]).


route_to_transport(World, Transport, From, Message) ->
    route(World, route_to_transport, [Transport, From, Message]).


broadcast(World, Server, Message) -> route(World, route_to_transport, [broadcast, Server, Message]).


%% The process that received the message. A reference identifies the message.
deliver_to_server(World, Server, From) -> deliver(World, route_to_server, Server, From).


deliver_to_transport(World, Transport, From) -> deliver(World, route_to_transport, Transport, From).


deliver(#{processes := Processes} = World, Route, To, From) ->
    Message = make_ref(),
    case {route(World, Route, [To, From, Message]), catch_up(World)} of
        {ok, ok} ->
            [ {Name, Tag, Sender}
              || Name <- maps:keys(Processes),
                 {Tag, Sender, Received} <- inbox(process(Name, World)),
                 Received =:= Message ];
        Failure ->
            Failure
    end.


%% A route sent as a request is handled asynchronously and uses the bindings of that moment. It is completed
%% before a process exits, so that the model knows the receivers.
end_process(World, Name, Reason) ->
    ok = meet(World),
    case catch_up(World) of
        ok -> end_now(World, Name, Reason);
        Failure -> Failure
    end.


end_now(#{owner := Owner, processes := Processes}, Name, Reason) ->
    #{Name := {Process, OldMonitor}} = Processes,
    Monitor = case self() of
                  Owner -> OldMonitor;
                  _Worker -> monitor(process, Process)
              end,
    case Reason of
        kill -> exit(Process, kill);
        _ -> Process ! {end_of_process, Reason}
    end,
    receive
        {'DOWN', Monitor, process, Process, _} -> ok
    after
        ?DEADLINE_MS ->
            {alive, Name}
    end.


%% The postcondition waits, because it knows the expected state.
settle(_World) -> ok.


%%% The two faces of a registry


request(#{face := functions} = World, Name, Arguments) ->
    attempt(World, fun() -> apply(erlmcp_registry, Name, Arguments) end);
request(#{face := requests, registry := Registry} = World, Name, []) ->
    attempt(World, fun() -> gen_server:call(Registry, Name) end);
request(#{face := requests, registry := Registry} = World, Name, Arguments) ->
    attempt(World, fun() -> gen_server:call(Registry, list_to_tuple([Name | Arguments])) end).


route(#{face := functions} = World, Name, Arguments) ->
    request(World, Name, Arguments);
route(#{face := requests, registry := Registry} = World, Name, Arguments) ->
    attempt(World, fun() -> gen_server:cast(Registry, list_to_tuple([Name | Arguments])) end).


%% The answer shows that the registry has handled all earlier requests of this process.
catch_up(#{registry := Registry}) ->
    try gen_server:call(Registry, list_servers) of
        _Servers -> ok
    catch
        Class:Reason -> {raised, Class, Reason}
    end.


attempt(World, Operation) ->
    ok = meet(World),
    try
        Operation()
    catch
        Class:Reason -> {raised, Class, Reason}
    end.


%%% Without synchronization the first worker of a parallel history would finish before the second starts. So
%%% each waits for the other at every step, for a short time.


meet(#{owner := Owner}) when Owner =:= self() ->
    ok;
meet(#{arrivals := Arrivals}) ->
    Step = case get(step) of
               undefined -> 1;
               Last -> Last + 1
           end,
    _ = put(step, Step),
    ok = atomics:add(Arrivals, 1, 1),
    Patience = case Step of
                   1 -> 100000;
                   _ -> 2000
               end,
    await_arrivals(Arrivals, 2 * Step, Patience).


await_arrivals(_Arrivals, _Expected, 0) -> ok;
await_arrivals(Arrivals, Expected, Patience) ->
    case atomics:get(Arrivals, 1) of
        Enough when Enough >= Expected -> ok;
        _TooFew -> await_arrivals(Arrivals, Expected, Patience - 1)
    end.


%%% Results in the model's terms


-spec process(name(), world()) -> pid().
process(Name, #{processes := Processes}) ->
    {Process, _Monitor} = map_get(Name, Processes),
    Process.


found({ok, {Process, Config}}, World) -> {ok, {name_of(Process, World), Config}};
found(Other, _World) -> Other.


listed(List, World) when is_list(List) ->
    Listed = maps:from_list([ {Id, {name_of(Process, World), Config}}
                              || {Id, {Process, Config}} <- List ]),
    case map_size(Listed) =:= length(List) of
        true -> Listed;
        false -> {listed_twice, List}
    end;
listed(Failure, _World) -> Failure.


name_of(Process, #{processes := Processes}) ->
    case [ Name || {Name, {Pid, _}} <- maps:to_list(Processes), Pid =:= Process ] of
        [Name] -> Name;
        [] -> Process
    end.


%%%=============================================================================
%%% A registry and its processes
%%%=============================================================================


%% An exception becomes a verdict with its reason, because this version of PropEr cannot report one on later
%% releases of OTP.
-spec in_world(erlmcp_rollout:mode(), face(), fun((world()) -> run())) -> run().
in_world(Mode, Face, Run) ->
    try
        World = start(Mode, Face),
        try
            Run(World)
        after
            stop(World)
        end
    catch
        Class:Reason:Stack ->
            #{
              verdict => {raised, Class, Reason, Stack},
              seen => [],
              stories => [],
              model => initial_state()
             }
    end.


-spec start(erlmcp_rollout:mode(), face()) -> world().
start(Mode, switching) ->
    World = start(Mode, functions),
    World#{switcher => start_switcher()};
start(Mode, Face) ->
    Processes = maps:from_list([ {Name, spawn_monitor(fun() -> record([]) end)}
                                 || Name <- ?NAMES ]),
    #{
      face => Face,
      registry => start_registry(Face, Mode),
      processes => Processes,
      bystander => start_bystander([ Process || {Process, _} <- maps:values(Processes) ]),
      owner => self(),
      arrivals => atomics:new(1, [])
     }.


start_registry(requests, Mode) ->
    ok = erlmcp_rollout:set(Mode),
    {ok, Registry} = gen_server:start(erlmcp_registry, [], []),
    Registry;
start_registry(functions, Mode) ->
    ok = erlmcp_rollout:set(Mode),
    {ok, Registry} = erlmcp_registry:start_link(),
    true = unlink(Registry),
    %% The process switches after its start.
    ok = erlmcp_rollout:set(Mode),
    Registry.


%% Switches to random modes until it is stopped, and then to the mode that a registry starts with.
start_switcher() ->
    spawn_link(fun() -> switch(rand:seed(exsss)) end).


switch(Random0) ->
    receive
        {stop, From} ->
            ok = erlmcp_rollout:set('100x'),
            From ! {stopped, self()}
    after
        0 ->
            Modes = {current, {percent, 0}, {percent, 30}, {percent, 70}, {percent, 100}, '100x'},
            {Nth, Random} = rand:uniform_s(tuple_size(Modes), Random0),
            ok = erlmcp_rollout:set(element(Nth, Modes)),
            switch(Random)
    end.


start_bystander(Processes) ->
    Owner = self(),
    Bystander = spawn(fun() ->
                              _ = [ monitor(process, Process)
                                    || Process <- Processes, _ <- lists:seq(1, ?BYSTANDERS) ],
                              Owner ! {standing_by, self()},
                              receive never -> ok end
                      end),
    receive {standing_by, Bystander} -> Bystander end.


stop(#{switcher := Switcher} = World) ->
    Switcher ! {stop, self()},
    receive {stopped, Switcher} -> ok end,
    stop(maps:remove(switcher, World));
stop(#{registry := Registry, processes := Processes, bystander := Bystander}) ->
    %% A registry that has crashed must not hide the history that made it crash.
    ok = case is_process_alive(Registry) of
             true -> gen_server:stop(Registry);
             false -> ok
         end,
    true = exit(Bystander, kill),
    lists:foreach(fun({Process, Monitor}) ->
                          true = demonitor(Monitor, [flush]),
                          exit(Process, kill)
                  end,
                  maps:values(Processes)).


record(Inbox) ->
    receive
        {read_inbox, Reader, Tag} ->
            Reader ! {Tag, lists:reverse(Inbox)},
            record(Inbox);
        {end_of_process, Reason} ->
            true = erlang:yield(),
            true = erlang:bump_reductions(?REDUCTIONS_BEFORE_END),
            exit(Reason);
        Message ->
            record([Message | Inbox])
    end.


inbox(Process) ->
    Tag = make_ref(),
    Process ! {read_inbox, self(), Tag},
    receive
        {Tag, Inbox} -> Inbox
    after
        ?DEADLINE_MS ->
            no_answer
    end.


%% Eventually the registry equals the model, and every process has received exactly the messages owed to it.
%% Lists are read first and alone: they must become right by time alone.
settled(#state{ids = Ids, alive = Alive} = State, World) ->
    Model = model(State),
    Lists = maps:with([servers, transports], Model),
    case await(fun() -> lists(World) end, fun(View) -> View =:= Lists end) of
        ok -> await(fun() -> view(World, Ids, Alive) end, fun(View) -> View =:= Model end);
        Failure -> Failure
    end.


%% For runs without a model to compare with. Eventually nothing is left of an exited process, every listed entry
%% is found, and only registered transports are bound.
coherent(Ids, World) ->
    await(fun() -> view(World, Ids, []) end, fun(View) -> is_coherent(View, World) end).


is_coherent(#{servers := Servers, transports := Transports, bindings := Bindings, finds := Finds},
            World) when is_map(Servers), is_map(Transports) ->
    Holders = [ Name || {Name, _} <- maps:values(Finds) ],
    maps:from_list(keyed(server, Servers) ++ keyed(transport, Transports)) =:= Finds andalso
    maps:keys(Bindings) -- maps:keys(Transports) =:= [] andalso
    lists:all(fun(Name) -> is_process_alive(process(Name, World)) end, Holders);
is_coherent(_Failure, _World) ->
    false.


keyed(Kind, Listed) -> [ {{Kind, Id}, Entry} || {Id, Entry} <- maps:to_list(Listed) ].


await(Read, IsExpected) -> await(Read, IsExpected, ?DEADLINE_MS).


await(Read, IsExpected, Left) ->
    View = Read(),
    case IsExpected(View) of
        true ->
            ok;
        false when Left > 0 ->
            ok = timer:sleep(1),
            await(Read, IsExpected, Left - 1);
        false ->
            {never_settled, View}
    end.


model(#state{bindings = Bindings, alive = Alive, inboxes = Inboxes} = State) ->
    #{
      servers => entries(server, State),
      transports => entries(transport, State),
      finds => State#state.entries,
      bindings => maps:filter(fun(_, Server) -> Server =/= undefined end, Bindings),
      inboxes => maps:from_list([ {Name, maps:get(Name, Inboxes, [])} || Name <- Alive ])
     }.


lists(World) -> #{servers => list_servers(World), transports => list_transports(World)}.


view(World, Ids, Alive) ->
    (lists(World))#{
      finds => maps:from_list([ {{Kind, Id}, Entry}
                                || {Kind, Find} <- [{server, fun find_server/2},
                                                    {transport, fun find_transport/2}],
                                   Id <- Ids,
                                   {ok, Entry} <- [Find(World, Id)] ]),
      bindings => maps:from_list([ {Id, Server}
                                   || Id <- Ids,
                                      {ok, Server} <- [get_server_for_transport(World, Id)] ]),
      inboxes => maps:from_list([ {Name, inbox(process(Name, World))} || Name <- Alive ])
     }.
