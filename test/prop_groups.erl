%%% Stateful properties of groups: one model of a set of members for each group, against erlmcp_group.
%%%
%%% Once the caller has observed the exit of a process, no function returns it. Parallel histories must be linearizable; they
%%% list nothing, since a list is not a snapshot.
-module(prop_groups).
-behaviour(proper_statem).

-import(prop_world, [name/2, pid/2]).

-include_lib("proper/include/proper.hrl").

%% Properties
-export([prop_sequential/0, prop_parallel/0]).

%% proper_statem
-export([initial_state/0, command/1, precondition/2, postcondition/3, next_state/3]).

%% Commands
-export([join/3, leave/3, members/2, pick/3, groups_of/2]).

-define(M,      erlmcp_group).
-define(GROUPS, [a, {b, 1}]).

-type name() :: prop_world:name().
-type world() :: prop_world:world().

-record(state, {
          lists = true :: boolean(),
          %% Of processes that are alive.
          members = [] :: [{Group :: term(), name()}],
          ended = [] :: [name()]
         }).

%%% Properties


prop_sequential() -> prop_world:sequential(?MODULE).


prop_parallel() -> prop_world:parallel(?MODULE, #state{lists = false}).


%%% The model


initial_state() -> #state{}.


command(#state{lists = Lists}) ->
    World = {var, world},
    Group = elements(?GROUPS),
    Name = elements(prop_world:names()),
    frequency([{5, {call, ?MODULE, join, [World, Group, Name]}},
               {4, {call, ?MODULE, leave, [World, Group, Name]}},
               {1, {call, prop_world, end_process, [World, Name]}}] ++
              [ {2, Call} || Lists,
                             Call <- [{call, ?MODULE, members, [World, Group]},
                                      {call, ?MODULE, pick, [World, Group, elements([round_robin, random, {key, 17}])]},
                                      {call, ?MODULE, groups_of, [World, Name]}] ]).


precondition(_State, _Call) -> true.


postcondition(_State, {call, _, join, [_World, _Group, _Name]}, Result) ->
    Result =:= ok;
postcondition(#state{members = Members, ended = Ended}, {call, _, leave, [_World, Group, Name]}, Result) ->
    case lists:member({Group, Name}, Members) of
        true -> Result =:= ok;
        %% Its entry may still be there.
        false -> Result =:= {error, not_joined} orelse Result =:= ok andalso lists:member(Name, Ended)
    end;
postcondition(State, {call, _, members, [_World, Group]}, Result) ->
    lists:sort(Result) =:= lists:sort(members_of(Group, State));
postcondition(State, {call, _, pick, [_World, Group, _Selection]}, Result) ->
    case members_of(Group, State) of
        [] -> Result =:= undefined;
        Members -> lists:member(Result, Members)
    end;
postcondition(#state{members = Members}, {call, _, groups_of, [_World, Name]}, Result) ->
    lists:sort(Result) =:= lists:sort([ Group || {Group, Member} <- Members, Member =:= Name ]);
postcondition(_State, {call, _, end_process, [_World, _Name]}, Result) ->
    Result =:= ok.


members_of(Group, #state{members = Members}) ->
    [ Name || {Of, Name} <- Members, Of =:= Group ].


next_state(#state{members = Members, ended = Ended} = State, _Result, {call, _, join, [_World, Group, Name]}) ->
    %% A process that has exited joins and leaves at once.
    case lists:member(Name, Ended) of
        true -> State;
        false -> State#state{members = lists:usort([{Group, Name} | Members])}
    end;
next_state(#state{members = Members} = State, _Result, {call, _, leave, [_World, Group, Name]}) ->
    State#state{members = lists:delete({Group, Name}, Members)};
next_state(#state{members = Members, ended = Ended} = State, _Result, {call, _, end_process, [_World, Name]}) ->
    State#state{members = [ Member || {_, Of} = Member <- Members, Of =/= Name ], ended = [Name | Ended]};
next_state(State, _Result, _Call) ->
    State.


%%% Commands


-spec join(world(), term(), name()) -> term().
join(#{registry := Registry} = World, Group, Name) ->
    ?M:join(Registry, Group, pid(Name, World)).


-spec leave(world(), term(), name()) -> term().
leave(#{registry := Registry} = World, Group, Name) ->
    ?M:leave(Registry, Group, pid(Name, World)).


-spec members(world(), term()) -> [name()].
members(#{registry := Registry} = World, Group) ->
    [ name(Pid, World) || Pid <- ?M:members(Registry, Group) ].


-spec pick(world(), term(), erlmcp_group:selection()) -> name() | undefined.
pick(#{registry := Registry} = World, Group, Selection) ->
    name(?M:pick(Registry, Group, Selection), World).


-spec groups_of(world(), name()) -> [term()].
groups_of(#{registry := Registry} = World, Name) ->
    ?M:groups_of(Registry, pid(Name, World)).
