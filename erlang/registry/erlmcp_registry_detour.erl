%%% @private
%%% Routes of {@link erlmcp_registry} that do not go straight to the native registry, because the plan
%%% has the classic one as well or instead ({@link erlmcp_rollout_plan}).
%%%
%%% In the calling process. Whatever path an id takes, what the process sends to it arrives in the order
%%% sent; {@link erlmcp_rollout_switch} says why.
-module(erlmcp_registry_detour).

-export([request/1, route/4, route_elsewhere/4, broadcast/2, broadcast_natively/2, deliver/3]).

-define(REGISTRY, erlmcp_registry).

-type reason() :: erlmcp_backpressure:reason().

%%% Requests


%% A request on the named instance. `noproc' if there is no such process.
-spec request(term()) -> term().
request(Request) ->
    Plan = erlmcp_rollout_plan:read(),
    case whereis(?REGISTRY) of
        undefined -> not_running(Request);
        _Pid -> request(Request, path(Request, Plan), Plan)
    end.


%% Who reads sees the plan change if the native registry has been emptied, or left to grow old, before
%% the look into it.
-spec request(term(), native | process, erlmcp_rollout_plan:plan()) -> term().
request(Request, process, _Plan) ->
    gen_server:call(?REGISTRY, Request);
request(Request, native, Plan) ->
    case erlmcp_registry_native:execute(default, Request) of
        diverted ->
            gen_server:call(?REGISTRY, Request);
        {error, registry_closed} ->
            not_running(Request);
        Result ->
            case erlmcp_rollout_plan:read() of
                Plan ->
                    ok = check(Request, Result, Plan),
                    Result;
                _Changed ->
                    again(Request, Result)
            end
    end.


%% What is no read has been made when the plan was in force, or it would have been diverted.
-spec again(term(), term()) -> term().
again(Request, Result) ->
    case entry(Request) of
        none -> Result;
        _ -> request(Request)
    end.


-spec not_running(term()) -> no_return().
not_running(Request) ->
    exit({noproc, {gen_server, call, [?REGISTRY, Request]}}).


-spec path(term(), erlmcp_rollout_plan:plan()) -> native | process.
path(Request, Plan) ->
    case erlmcp_rollout_plan:keepers(Plan) of
        native ->
            native;
        classic ->
            process;
        both ->
            case entry(Request) of
                {_Kind, Id} ->
                    case erlmcp_rollout_plan:path(Id, Plan) of
                        native -> native;
                        %% Both are complete when ids are joining.
                        _ -> process
                    end;
                _ ->
                    process
            end
    end.


%% The entry that a request reads, `all' of them, or `none' if it is a change.
-spec entry(term()) -> erlmcp_registry_pair:entry() | all | none.
entry({find_server, Id}) -> {server, Id};
entry({find_transport, Id}) -> {transport, Id};
entry({get_server_for_transport, Id}) -> {transport, Id};
entry(list_servers) -> all;
entry(list_transports) -> all;
entry(get_all_state) -> all;
entry(_Change) -> none.


-spec check(term(), term(), erlmcp_rollout_plan:plan()) -> ok.
check({Find, Id}, Result, Plan) when Find =:= find_server; Find =:= find_transport ->
    Pid = case Result of
              {ok, {Found, _Config}} -> Found;
              {error, not_found} -> undefined
          end,
    check_routed(entry({Find, Id}), Pid, Plan);
check(_Request, _Result, _Plan) ->
    ok.


-spec check_routed(erlmcp_registry_pair:entry(), pid() | undefined, erlmcp_rollout_plan:plan()) -> ok.
check_routed(Entry, Pid, Plan) ->
    case erlmcp_rollout_plan:keepers(Plan) =:= both andalso erlmcp_rollout_plan:is_comparing(Plan) of
        true -> gen_server:cast(?REGISTRY, {erlmcp_rollout, {check, Entry, Pid}});
        false -> ok
    end.


%%% Routes


%% Sends `Message' to a server or transport. `Sender' is the transport that a message to a server comes
%% from, or the server that an answer comes from.
-spec route(erlmcp_registry_pair:entry(), Sender :: term(), Content :: term(), Message :: term()) ->
          ok | {error, reason()}.
route({_Kind, Id} = Entry, Sender, Content, Message) ->
    Plan = erlmcp_rollout_plan:read(),
    case erlmcp_rollout_plan:path(Id, Plan) of
        classic ->
            Cast = classic_cast(Entry, Sender, Content, Message),
            case erlmcp_rollout_plan:keepers(Plan) of
                classic -> cast(Cast, Id, Plan);
                both -> route_by_call(Cast, Entry, Sender, Content, Message)
            end;
        native ->
            route_natively(Entry, Sender, Content, Message, Plan);
        joining ->
            ok = wait(),
            route_natively(Entry, Sender, Content, Message, Plan)
    end.


%% As {@link route/4}, after a native route that has found nobody, and has counted that. Where there is no
%% other registry the answer stays.
-spec route_elsewhere(erlmcp_registry_pair:entry(), Sender :: term(), Content :: term(), Message :: term()) ->
          ok | {error, reason()}.
route_elsewhere({Kind, Id} = Entry, Sender, Content, Message) ->
    Plan = erlmcp_rollout_plan:read(),
    %% It may have been emptied at that time, and filled again since.
    IsNowhere = erlmcp_rollout_plan:keepers(Plan) =:= native andalso
        erlmcp_nif:whereis(exclusive, Kind, Id) =:= undefined andalso
        erlmcp_rollout_plan:read() =:= Plan,
    case IsNowhere of
        true -> {error, not_found};
        false -> route(Entry, Sender, Content, Message)
    end.


-spec classic_cast(erlmcp_registry_pair:entry(), term(), term(), term()) -> term().
classic_cast({server, Id}, Sender, Content, _Message) ->
    {route_to_server, Id, Sender, Content};
classic_cast({transport, broadcast}, _Sender, _Content, Message) ->
    {erlmcp_rollout, {send_to_transport, broadcast, Message}};
classic_cast({transport, Id}, Sender, Content, _Message) ->
    {route_to_transport, Id, Sender, Content}.


%% By a call, so that it has been sent when this returns, before the caller sends something to the same
%% process under an id that takes the other path.
-spec route_by_call(term(), erlmcp_registry_pair:entry(), term(), term(), term()) -> ok | {error, reason()}.
route_by_call(Cast, Entry, Sender, Content, Message) ->
    try
        gen_server:call(?REGISTRY, {erlmcp_rollout, {route, Cast}}, infinity)
    catch
        %% Routing goes on without the process.
        exit:{noproc, _} -> route_natively(Entry, Sender, Content, Message, erlmcp_rollout_plan:read());
        %% It was killed before or after it sent the message.
        exit:_ -> ok
    end.


%% The message may have come into the mailbox behind what tells the process that there are no more.
-spec cast(term(), Id :: term(), erlmcp_rollout_plan:plan()) -> ok.
cast(Cast, Id, Plan) ->
    ok = gen_server:cast(?REGISTRY, Cast),
    case erlmcp_rollout_plan:read() of
        Plan ->
            ok;
        Changed ->
            case erlmcp_rollout_plan:path(Id, Changed) of
                classic -> ok;
                _ -> wait()
            end
    end.


%% Until the registry's process has handled everything that this one has sent to it. If it ends, there is
%% nothing left to wait for.
-spec wait() -> ok.
wait() ->
    try
        gen_server:call(?REGISTRY, {erlmcp_rollout, barrier}, infinity)
    catch
        exit:_ -> ok
    end.


-spec route_natively(erlmcp_registry_pair:entry(), term(), term(), term(), erlmcp_rollout_plan:plan()) ->
          ok | {error, reason()}.
route_natively({Kind, Id} = Entry, Sender, Content, Message, Plan) ->
    Routed = case Kind of
                 server -> erlmcp_nif:route_server_exclusive(Id, Sender);
                 transport -> erlmcp_nif:route_transport_exclusive(Id)
             end,
    case erlmcp_backpressure:deliver(Routed, Message) of
        ok ->
            check_routed(Entry, target(Routed), Plan);
        {error, not_found} ->
            case erlmcp_rollout_plan:read() of
                Plan ->
                    ok = check_routed(Entry, undefined, Plan),
                    {error, not_found};
                _Changed ->
                    route(Entry, Sender, Content, Message)
            end;
        Refused ->
            Refused
    end.


-spec target(erlmcp_nif:routed()) -> pid().
target({Pid, _Events}) when is_pid(Pid) -> Pid;
target(Pid) when is_pid(Pid) -> Pid.


%%% Broadcasts


%% To every transport bound to a server. If the process has both registries, by a call: that way a
%% broadcast stays in order with what the caller sends to one of the transports, whatever path that takes.
-spec broadcast(Server :: term(), Content :: term()) -> ok | {error, reason()}.
broadcast(ServerId, Content) ->
    Plan = erlmcp_rollout_plan:read(),
    case erlmcp_rollout_plan:keepers(Plan) of
        classic ->
            ok = gen_server:cast(?REGISTRY, {route_to_transport, broadcast, ServerId, Content}),
            case erlmcp_rollout_plan:read() of
                Plan -> ok;
                _Changed -> wait()
            end;
        _WithNative ->
            try
                gen_server:call(?REGISTRY, {erlmcp_rollout, {broadcast, ServerId, Content}}, infinity)
            catch
                %% As in route_by_call/5.
                exit:{noproc, _} -> broadcast_natively(ServerId, Content);
                exit:_ -> ok
            end
    end.


%% By the native registry, diverted or not.
-spec broadcast_natively(Server :: term(), Content :: term()) -> ok | {error, reason()}.
broadcast_natively(ServerId, Content) ->
    deliver(erlmcp_nif:route_bound_exclusive(ServerId), ServerId, Content).


%% Sends to those whom a native broadcast found. Each transport has been admitted by itself.
-spec deliver({[pid()], none | erlmcp_nif:refusal(), [erlmcp_nif:event()]}, Server :: term(), Content :: term()) ->
          ok | {error, reason()}.
deliver({Pids, Refused, Events}, ServerId, Content) ->
    Message = {mcp_response, ServerId, Content},
    ok = lists:foreach(fun(Pid) -> Pid ! Message end, Pids),
    ok = erlmcp_backpressure:notify(Events),
    case Refused of
        none when Pids =:= [] -> erlmcp_registry_native:unknown_target(transport_of, ServerId);
        none -> ok;
        Refusal -> erlmcp_backpressure:refused(Refusal)
    end.
