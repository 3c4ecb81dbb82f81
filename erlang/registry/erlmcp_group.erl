%%% @doc Groups: an id with any number of members. The subscribers of a resource, the workers behind a server.
%%%
%%% ```
%%% ok = erlmcp_group:join({resource, <<"file:///log">>}, self()).
%%% ok = erlmcp_group:route_group({resource, <<"file:///log">>}, {updated, <<"file:///log">>}).
%%% ok = erlmcp_group:route_member({resource, <<"file:///log">>}, round_robin, {job, 17}).
%%% '''
%%%
%%% A process is a member from {@link join/2} until it leaves or exits; joining twice is joining once. A group exists while
%%% it has members, and nobody owns it. Its id is any term that may be the id of a connection; groups and connections of
%%% the same id have nothing to do with each other. Everything runs in the calling process, in native memory.
%%%
%%% The functions work on the default registry, or on a registry from {@link erlmcp_shard_registry:new/1} as an additional
%%% first argument; messages are routed in the default registry alone. A membership counts as an entry of its registry
%%% (`max_entries').
%%%
%%% == Consistency ==
%%% Joining and leaving are one atomic step each: a function that begins after `join' has returned sees the member. A
%%% list is not a snapshot: a process that is a member throughout is seen exactly once, one that joins or leaves meanwhile may
%%% or may not be seen. A member of this node that has exited is never returned, even before it is removed.
%%%
%%% == Cost ==
%%% {@link join/2}, {@link leave/2} and {@link count/1} take constant time, however large the group. {@link members/1} and
%%% {@link route_group/2} cost in proportion to the most members that the group has had at one time, on a dirty scheduler if
%%% those were more than a few hundred. Picking one member takes constant time while at least a part of them are still members;
%%% if most have left, a search among their places. A membership takes about as much memory as a connection
%%% (470 bytes), and a group some 700 bytes.
%%%
%%% == Which member is picked ==
%%% <ul>
%%% <li>`round_robin': each in turn, in no particular order;</li>
%%% <li>`random': any, all equally likely;</li>
%%% <li>`{key, Key}': the same member for the same term `Key', until members join or leave. Keys are spread evenly. A member
%%% that joins gets its share of the keys from all others, and a member that leaves is replaced for its keys alone
%%% (jump consistent hash). The choice differs from node to node and from start to start.</li>
%%% </ul>
%%%
%%% == Errors ==
%%% Wrong arguments raise `badarg' and change nothing; so do ids and keys that {@link erlmcp_shard_registry} refuses.
-module(erlmcp_group).

%% Membership
-export([join/2, join/3, leave/2, leave/3]).
%% Look-up
-export([members/1, members/2, count/1, count/2, pick/2, pick/3]).
-export([groups_of/1, groups_of/2]).
%% Routing
-export([route_group/2, route_member/3]).
%% Explanations of errors
-export([format_error/2]).

-export_type([selection/0]).

-type selection() :: round_robin | random | {key, term()}.

%%% Membership


%% @equiv join(default, Group, Pid)
-spec join(Group :: term(), pid()) -> ok | {error, registry_full}.
join(Group, Pid) ->
    join(default, Group, Pid).


%% @doc Makes a process a member of a group; `ok' also if it is one, or has exited. A process of another node is a member
%% until it exits, leaves or is no longer connected.
-spec join(erlmcp_shard_registry:registry(), Group :: term(), pid()) -> ok | {error, registry_full}.
join(Registry, Group, Pid) when is_pid(Pid) ->
    erlmcp_registry_native:join(Registry, Group, Pid);
join(Registry, Group, NoPid) ->
    error(badarg, [Registry, Group, NoPid], [{error_info, #{module => ?MODULE}}]).


%% @equiv leave(default, Group, Pid)
-spec leave(Group :: term(), pid()) -> ok | {error, not_joined}.
leave(Group, Pid) ->
    leave(default, Group, Pid).


%% @doc Ends a membership.
-spec leave(erlmcp_shard_registry:registry(), Group :: term(), pid()) -> ok | {error, not_joined}.
leave(Registry, Group, Pid) when is_pid(Pid) ->
    erlmcp_registry_native:leave(Registry, Group, Pid);
leave(Registry, Group, NoPid) ->
    error(badarg, [Registry, Group, NoPid], [{error_info, #{module => ?MODULE}}]).


%%% Look-up


%% @equiv members(default, Group)
-spec members(Group :: term()) -> [pid()].
members(Group) ->
    members(default, Group).


%% @doc The members of a group, in no particular order.
-spec members(erlmcp_shard_registry:registry(), Group :: term()) -> [pid()].
members(Registry, Group) ->
    erlmcp_nif:group_members(Registry, Group).


%% @equiv count(default, Group)
-spec count(Group :: term()) -> non_neg_integer().
count(Group) ->
    count(default, Group).


%% @doc The number of members of a group. Exact when none is just joining, leaving or exiting.
-spec count(erlmcp_shard_registry:registry(), Group :: term()) -> non_neg_integer().
count(Registry, Group) ->
    erlmcp_nif:group_count(Registry, Group).


%% @equiv pick(default, Group, Selection)
-spec pick(Group :: term(), selection()) -> pid() | undefined.
pick(Group, Selection) ->
    pick(default, Group, Selection).


%% @doc One member of a group; `undefined' if it has none. Checks no layer of backpressure, unlike {@link route_member/3}.
-spec pick(erlmcp_shard_registry:registry(), Group :: term(), selection()) -> pid() | undefined.
pick(Registry, Group, Selection) ->
    case native(Selection) of
        none -> error(badarg, [Registry, Group, Selection], [{error_info, #{module => ?MODULE}}]);
        Pick -> erlmcp_nif:pick_member(Registry, Group, Pick)
    end.


%% @equiv groups_of(default, Pid)
-spec groups_of(pid()) -> [Group :: term()].
groups_of(Pid) ->
    groups_of(default, Pid).


%% @doc The groups of a process, in no particular order; `[]' if it has exited. Raises `badarg' for a process of another
%% node. Costs what {@link erlmcp_shard_registry:connections_of/2} costs.
-spec groups_of(erlmcp_shard_registry:registry(), pid()) -> [Group :: term()].
groups_of(Registry, Pid) when is_pid(Pid), node(Pid) =:= node() ->
    erlmcp_registry_native:groups_of(Registry, Pid);
groups_of(Registry, Other) ->
    error(badarg, [Registry, Other], [{error_info, #{module => ?MODULE}}]).


%%% Routing


%% @doc Sends a message to every member of a group. `not_found' if it has none. A member that has exited counts until its
%% membership is removed.
%%
%% The node's circuit and the shard of each member admit, where a process belongs to the shard
%% `erlang:phash2(Pid, Shards)'; no bucket is charged. An error says that some members were refused, and the others have got
%% the message. Messages from one process to one member arrive in the order sent.
-spec route_group(Group :: term(), Message :: term()) -> ok | {error, erlmcp_delivery:reason()}.
route_group(Group, Message) ->
    erlmcp_delivery:deliver_all(erlmcp_nif:route_group(Group), Message).


%% @doc Sends a message to one member of a group. `not_found' if it has none.
%%
%% The layers are those of {@link route_group/2}. They are asked for the member that was picked and for no other: after a
%% refusal, `round_robin' and `random' pick another one at the next call.
-spec route_member(Group :: term(), selection(), Message :: term()) -> ok | {error, erlmcp_delivery:reason()}.
route_member(Group, Selection, Message) ->
    case native(Selection) of
        none -> error(badarg, [Group, Selection, Message], [{error_info, #{module => ?MODULE}}]);
        Pick -> erlmcp_delivery:deliver(erlmcp_nif:route_member(Group, Pick), Message)
    end.


-spec native(selection() | term()) -> erlmcp_nif:pick() | none.
native(round_robin) -> round_robin;
native(random) -> random;
native({key, Key}) -> [Key];
native(_Other) -> none.


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, Function, [_Registry, _Group, _NoPid], _Info} | _])
  when Function =:= join;
       Function =:= leave ->
    #{3 => "not a pid"};
format_error(_Reason, [{?MODULE, groups_of, [_Registry, _Other], _Info} | _]) ->
    #{2 => "not a pid of this node"};
format_error(_Reason, [{?MODULE, pick, [_Registry, _Group, _Selection], _Info} | _]) ->
    #{3 => selection_expected()};
format_error(_Reason, [{?MODULE, route_member, [_Group, _Selection, _Message], _Info} | _]) ->
    #{2 => selection_expected()};
format_error(_Reason, _Stacktrace) ->
    #{}.


-spec selection_expected() -> string().
selection_expected() ->
    "not round_robin, random or {key, Key}".
