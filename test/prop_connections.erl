%%% Stateful properties of connections: one model of a map of ids, against erlmcp_shard_registry.
%%%
%%% Once the caller has observed the exit of a process, no function returns it, and its ids are free. Parallel histories
%%% must be linearizable.
-module(prop_connections).
-behaviour(proper_statem).

-import(prop_world, [name/2, pid/2]).

-include_lib("proper/include/proper.hrl").

%% Properties
-export([prop_sequential/0, prop_parallel/0]).

%% proper_statem
-export([initial_state/0, command/1, precondition/2, postcondition/3, next_state/3]).

%% Commands
-export([register/4, register_or_find/4, replace/4, release/3, unregister/2, lookup/2]).

-define(M,   erlmcp_shard_registry).
-define(IDS, [a, {b, 1}]).

-type name() :: prop_world:name().
-type world() :: prop_world:world().

-record(state, {
          %% Of processes that are alive.
          entries = #{} :: #{term() => {name(), Capabilities :: term()}},
          ended = [] :: [name()]
         }).

%%% Properties


prop_sequential() -> prop_world:sequential(?MODULE).


prop_parallel() -> prop_world:parallel(?MODULE, initial_state()).


%%% The model


initial_state() -> #state{}.


command(_State) ->
    World = {var, world},
    Id = elements(?IDS),
    Name = elements(prop_world:names()),
    Capabilities = elements([none, #{tools => true}, [1, 2]]),
    frequency([{3, {call, ?MODULE, register, [World, Id, Name, Capabilities]}},
               {4, {call, ?MODULE, register_or_find, [World, Id, Name, Capabilities]}},
               {4, {call, ?MODULE, replace, [World, Id, Name, Capabilities]}},
               {3, {call, ?MODULE, release, [World, Id, Name]}},
               {2, {call, ?MODULE, unregister, [World, Id]}},
               {4, {call, ?MODULE, lookup, [World, Id]}},
               {1, {call, prop_world, end_process, [World, Name]}}]).


precondition(_State, _Call) -> true.


%% What holds the id, if anything does.
held(Id, #state{entries = Entries}) ->
    maps:get(Id, Entries, free).


postcondition(State, {call, _, register, [_World, Id, _Name, _Capabilities]}, Result) ->
    Result =:= case held(Id, State) of
                   free -> ok;
                   _ -> {error, already_registered}
               end;
postcondition(State, {call, _, register_or_find, [_World, Id, Name, Capabilities]}, Result) ->
    Result =:= case held(Id, State) of
                   free -> {registered, {Name, Capabilities}};
                   Entry -> {found, Entry}
               end;
postcondition(State, {call, _, replace, [_World, Id, _Name, _Capabilities]}, Result) ->
    Result =:= case held(Id, State) of
                   free -> {ok, undefined};
                   {Former, _} -> {ok, Former}
               end;
postcondition(#state{ended = Ended} = State, {call, _, release, [_World, Id, Name]}, Result) ->
    case held(Id, State) of
        {Name, _} -> Result =:= ok;
        %% Its entry may still be there.
        _ -> Result =:= {error, not_held} orelse Result =:= ok andalso lists:member(Name, Ended)
    end;
postcondition(_State, {call, _, unregister, [_World, _Id]}, Result) ->
    Result =:= ok;
postcondition(State, {call, _, lookup, [_World, Id]}, Result) ->
    Result =:= case held(Id, State) of
                   free -> {error, not_found};
                   Entry -> {ok, Entry}
               end;
postcondition(_State, {call, _, end_process, [_World, _Name]}, Result) ->
    Result =:= ok.


next_state(State, _Result, {call, _, Function, [_World, Id, Name, Capabilities]}) ->
    case Function =:= replace orelse held(Id, State) =:= free of
        true -> entered(Id, Name, Capabilities, State);
        false -> State
    end;
next_state(State, _Result, {call, _, release, [_World, Id, Name]}) ->
    case held(Id, State) of
        {Name, _} -> left(Id, State);
        _ -> State
    end;
next_state(State, _Result, {call, _, unregister, [_World, Id]}) ->
    left(Id, State);
next_state(State, _Result, {call, _, lookup, _}) ->
    State;
next_state(#state{entries = Entries, ended = Ended} = State, _Result, {call, _, end_process, [_World, Name]}) ->
    State#state{entries = maps:filter(fun(_Id, {Holder, _}) -> Holder =/= Name end, Entries), ended = [Name | Ended]}.


%% A process that has exited is registered and removed at once.
entered(Id, Name, Capabilities, #state{entries = Entries, ended = Ended} = State) ->
    case lists:member(Name, Ended) of
        true -> left(Id, State);
        false -> State#state{entries = Entries#{Id => {Name, Capabilities}}}
    end.


left(Id, #state{entries = Entries} = State) ->
    State#state{entries = maps:remove(Id, Entries)}.


%%% Commands


-spec register(world(), term(), name(), term()) -> term().
register(#{registry := Registry} = World, Id, Name, Capabilities) ->
    ?M:register_connection(Registry, Id, pid(Name, World), Capabilities).


-spec register_or_find(world(), term(), name(), term()) -> term().
register_or_find(#{registry := Registry} = World, Id, Name, Capabilities) ->
    {How, {Pid, Held}} = ?M:register_or_find_connection(Registry, Id, pid(Name, World), Capabilities),
    {How, {name(Pid, World), Held}}.


-spec replace(world(), term(), name(), term()) -> term().
replace(#{registry := Registry} = World, Id, Name, Capabilities) ->
    {ok, Former} = ?M:replace_connection(Registry, Id, pid(Name, World), Capabilities),
    {ok, name(Former, World)}.


-spec release(world(), term(), name()) -> term().
release(#{registry := Registry} = World, Id, Name) ->
    ?M:release_connection(Registry, Id, pid(Name, World)).


-spec unregister(world(), term()) -> term().
unregister(#{registry := Registry}, Id) ->
    ?M:unregister_connection(Registry, Id).


-spec lookup(world(), term()) -> term().
lookup(#{registry := Registry} = World, Id) ->
    case ?M:lookup_connection(Registry, Id) of
        {ok, {Pid, Capabilities}} -> {ok, {name(Pid, World), Capabilities}};
        NotFound -> NotFound
    end.
