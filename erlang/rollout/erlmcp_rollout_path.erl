%%% @private
%%% The path of a request or a message to the servers and transports of the named registry, and why
%%% messages from one process to another arrive in the order sent, whatever path they take.
%%%
%%% == The plan ==
%%% One integer for the whole node, a persistent term: which store has the entries, and the share of the
%%% ids that are routed straight. Only the registry's process writes it. No two plans of a node's life are
%%% equal, so a caller that reads the same plan before and after a step has made that step while the plan
%%% was in force. In the default mode nothing reads it: the native library knows from one load whether a
%%% call has to be `diverted' ({@link erlmcp_nif:divert/1}), and only diverted calls use this module.
%%%
%%% == The paths of a route ==
%%% <ul>
%%% <li><em>straight</em>: the caller looks the target up natively and sends by itself.</li>
%%% <li><em>call</em>: the registry's process sends, and the caller waits until it has. Without the process
%%% the route goes straight.</li>
%%% <li><em>cast</em>: the entries are in the process, and the caller does not wait.</li>
%%% </ul>
%%%
%%% == Order ==
%%% A sends m1 to B and then m2, under whatever ids, and each of the two routes reads a plan of its own.
%%% <ol>
%%% <li>m1 went straight or by call: it was in B's mailbox when the route returned. Whatever path m2 takes,
%%% it is sent later. That holds even if the plan changed between A's read and A's step, since no message of
%%% A is under way at that time. So the share may grow and shrink at any moment.</li>
%%% <li>m1 went by cast, m2 by cast or call: both are messages from A to the process, which handles them
%%% in that order. If the process has exited, m1 is lost, and cannot be overtaken.</li>
%%% <li>m1 went by cast, m2 straight. After the cast A reads the plan again.
%%% <ol>
%%% <li>The plan is the same: m1 was in the mailbox of the process before the plan changed. The next plan after
%%% `current' sends nothing straight, and stays until two messages of the process to itself have come
%%% through its mailbox. So m1 has been handled when the first plan comes that sends straight. (Two,
%%% because the runtime may put one message before those that came a little earlier from other processes,
%%% but no second one.)</li>
%%% <li>The plan has changed: A has read a plan and had not sent yet when the process put another one in force,
%%% so m1 may be behind those two messages. A waits until the process has answered a call, which is behind
%%% m1.</li>
%%% </ol></li>
%%% </ol>
%%%
%%% == Look-ups and changes ==
%%% While the native store has the entries, callers use it directly, and the library decides which calls to divert:
%%% changes as soon as the process begins to copy, look-ups when the other store is in force.
%%% A diverted call becomes a request to the process, whose store is in force.
-module(erlmcp_rollout_path).

-export([read/0, plan/2, mode/1, version/1, store/1, of_id/2]).
-export([put_in_force/1, hold_changes/0]).
-export([route/4, broadcast/2]).

-export_type([plan/0, path/0, store/0]).

-type plan() :: non_neg_integer().
-type store() :: native | classic.
-type path() :: straight | call | cast.
-type target() :: {erlmcp_registry_native:kind(), Id :: term()}.
-type result() :: ok | {error, erlmcp_delivery:reason()}.

-define(REGISTRY, erlmcp_registry).
-define(KEY,      ?MODULE).

%% From the lowest bit: store (1), share (7), version. A share of 101 stands for '100x'.
-define(STORE(Plan), (Plan band 1)).
-define(SHARE(Plan), ((Plan bsr 1) band 127)).
-define(VERSION(Plan), (Plan bsr 8)).
-define(NATIVE,        0).
-define(CLASSIC,       1).
-define(SHARE_OF_100X, 101).

%%% The plan


%% @doc The plan in force. Until a plan is written it is `` '100x' '', or `current' without the library.
-spec read() -> plan().
read() ->
    case persistent_term:get(?KEY, none) of
        none -> first();
        Plan -> Plan
    end.


-spec first() -> plan().
first() ->
    case erlmcp_registry_native:load_error() of
        none -> plan('100x', 0);
        _NotLoaded -> plan(current, 0)
    end.


%% @doc A plan that is not in force: a mode and any number in one integer.
-spec plan(erlmcp_rollout:mode(), Version :: non_neg_integer()) -> plan().
plan(current, Version) -> ?CLASSIC bor (Version bsl 8);
plan('100x', Version) -> ?NATIVE bor (?SHARE_OF_100X bsl 1) bor (Version bsl 8);
plan({percent, Share}, Version) -> ?NATIVE bor (Share bsl 1) bor (Version bsl 8).


-spec mode(plan()) -> erlmcp_rollout:mode().
mode(Plan) when ?STORE(Plan) =:= ?CLASSIC -> current;
mode(Plan) when ?SHARE(Plan) =:= ?SHARE_OF_100X -> '100x';
mode(Plan) -> {percent, ?SHARE(Plan)}.


-spec version(plan()) -> non_neg_integer().
version(Plan) -> ?VERSION(Plan).


%% @doc Which store has the entries.
-spec store(plan()) -> store().
store(Plan) when ?STORE(Plan) =:= ?CLASSIC -> classic;
store(_Plan) -> native.


%% @doc The path of a route to an id.
-spec of_id(Id :: term(), plan()) -> path().
of_id(_Id, Plan) when ?STORE(Plan) =:= ?CLASSIC ->
    cast;
of_id(Id, Plan) ->
    case erlang:phash2(Id, 100) < ?SHARE(Plan) of
        true -> straight;
        false -> call
    end.


%% @doc Puts a mode in force, by the registry's process, whose store must be that of the mode.
%%
%% The plan is written first, so that callers which the library diverts find it. Callers that are not diverted yet, or
%% no longer, use the native store, which does not change until the diversion has been set.
-spec put_in_force(erlmcp_rollout:mode()) -> ok.
put_in_force(Mode) ->
    ok = persistent_term:put(?KEY, plan(Mode, ?VERSION(read()) + 1)),
    divert(diverted(Mode)).


%% @doc From now on only the registry's process changes the native store. Look-ups and routes go on.
-spec hold_changes() -> ok.
hold_changes() ->
    divert([changes | diverted(mode(read()))]).


-spec diverted(erlmcp_rollout:mode()) -> [changes | lookups | routes].
diverted(current) -> [changes, lookups, routes];
diverted(Mode) when Mode =:= '100x'; Mode =:= {percent, 100} -> [];
diverted({percent, _Share}) -> [routes].


-spec divert([changes | lookups | routes]) -> ok.
divert(Whom) ->
    case erlmcp_registry_native:load_error() of
        none -> erlmcp_registry_native:divert(Whom);
        %% Without the library everything is diverted.
        _NotLoaded -> ok
    end.


%%% Routes that were diverted


%% @doc Routes to a server or a transport. `Sender' is the transport that a message to a server comes
%% from, or the server that an answer comes from.
-spec route(target(), Sender :: term(), Content :: term(), Message :: term()) -> result().
route({_Kind, Id} = Target, Sender, Content, Message) ->
    Plan = read(),
    case of_id(Id, Plan) of
        straight -> straight(Target, Sender, Content, Message, Plan);
        call -> call(Target, Sender, Content, Message);
        cast -> cast(request(Target, Sender, Content, Message), Plan)
    end.


-spec straight(target(), Sender :: term(), Content :: term(), Message :: term(), plan()) -> result().
straight({Kind, Id} = Target, Sender, Content, Message, Plan) ->
    Routed = case Kind of
                 server -> erlmcp_registry_native:route_server(Id, Sender);
                 transport -> erlmcp_registry_native:route_transport(Id)
             end,
    case erlmcp_delivery:deliver(Routed, Message) of
        {error, not_found} ->
            %% The entry may have been moved from the native store since.
            case read() of
                Plan -> {error, not_found};
                _Changed -> route(Target, Sender, Content, Message)
            end;
        Result ->
            Result
    end.


-spec call(target(), Sender :: term(), Content :: term(), Message :: term()) -> result().
call(Target, Sender, Content, Message) ->
    try
        gen_server:call(?REGISTRY, {erlmcp_rollout, {route, request(Target, Sender, Content, Message)}}, infinity)
    catch
        exit:{noproc, _} -> straight(Target, Sender, Content, Message, read());
        %% The process was killed before or after it sent the message.
        exit:_ -> ok
    end.


%% The request to the process. A transport with the name `broadcast' cannot be reached by any cast of erlmcp's
%% API.
-spec request(target(), Sender :: term(), Content :: term(), Message :: term()) -> term().
request({server, Id}, Sender, Content, _Message) ->
    {route_to_server, Id, Sender, Content};
request({transport, broadcast}, _Sender, _Content, Message) ->
    {erlmcp_rollout, {send_to_transport, broadcast, Message}};
request({transport, Id}, Sender, Content, _Message) ->
    {route_to_transport, Id, Sender, Content}.


-spec cast(Request :: term(), plan()) -> ok.
cast(Request, Plan) ->
    ok = gen_server:cast(?REGISTRY, Request),
    case read() of
        Plan -> ok;
        _Changed -> barrier()
    end.


%% Returns when the process has handled everything that the caller has sent to it. If the process exits, none of
%% these messages is left.
-spec barrier() -> ok.
barrier() ->
    try
        gen_server:call(?REGISTRY, {erlmcp_rollout, barrier}, infinity)
    catch
        exit:_ -> ok
    end.


%% @doc Routes to every transport that is bound to a server, by the path of the server's id.
-spec broadcast(Server :: term(), Content :: term()) -> result().
broadcast(ServerId, Content) ->
    Plan = read(),
    case of_id(ServerId, Plan) of
        straight ->
            Routed = erlmcp_registry_native:route_bound(ServerId),
            case read() of
                Plan -> erlmcp_delivery:deliver_all(Routed, {mcp_response, ServerId, Content});
                %% Some of the transports may have been moved from the native store, and nothing has been sent yet.
                _Changed -> broadcast(ServerId, Content)
            end;
        call ->
            try
                gen_server:call(?REGISTRY, {erlmcp_rollout, {route, {route_to_transport, broadcast, ServerId, Content}}}, infinity)
            catch
                exit:{noproc, _} ->
                    Routed = erlmcp_registry_native:route_bound(ServerId),
                    erlmcp_delivery:deliver_all(Routed, {mcp_response, ServerId, Content});
                exit:_ ->
                    ok
            end;
        cast ->
            cast({route_to_transport, broadcast, ServerId, Content}, Plan)
    end.
