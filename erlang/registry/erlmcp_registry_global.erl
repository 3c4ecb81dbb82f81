%% The `global' scope of both registries: servers and transports that the whole cluster can find.
%%
%% Each entry is one small holder process, registered with OTP's `global' as
%% {erlmcp_registry, Kind, Id}. The holder keeps the pid and the configuration of the entry, monitors
%% the pid, answers reads, and ends with the pid.
%%
%% *Consistency*: a registration or its removal is a transaction of `global' over all connected
%% nodes; two registrations of one id never both win while the network is whole. A read asks the
%% holder, so an ended holder is `not_found' even where `global' has not yet forgotten its name.
%%
%% *Trade-offs*: writes cost a cluster-wide lock (milliseconds) and reads a message to the holder's
%% node; use this scope for few, long-lived services. The holder lives on the node that registered:
%% when that node goes, so does the entry, even if the pid is elsewhere. When a split network heals
%% and both halves have the id, `global' keeps one holder and ends the other; a lost connection to
%% the pid counts as its end.
-module(erlmcp_registry_global).

-behaviour(gen_server).

-export([register/4, unregister/2, find/2, list/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).
-export_type([kind/0]).

-type kind() :: server | transport.
-type name() :: {erlmcp_registry, kind(), Id :: term()}.
-type location() :: {node(), pid(), Config :: term()}.

-record(holder, {
          name :: name(),
          pid :: pid(),
          config :: term()
         }).

-define(NAME(Kind, Id), {erlmcp_registry, Kind, Id}).


%% @doc Registers Pid as Id in the whole cluster, until it ends or is unregistered.
%%
%% Returns `{error, already_registered}' if a living process has the id; if that is Pid itself, the
%% application environment `same_pid' decides, as in the local scope. A pid that is dead already is
%% accepted and not found afterwards.
-spec register(kind(), term(), pid(), term()) -> ok | {error, already_registered}.
register(Kind, Id, Pid, Config) when is_pid(Pid) ->
    Name = ?NAME(Kind, Id),
    case gen_server:start({global, Name}, ?MODULE, {Name, Pid, Config}, []) of
        {ok, _Holder} ->
            ok;
        ignore ->
            ok;
        {error, {already_started, Holder}} ->
            case read(Holder) of
                {ok, {_, Pid, _}} ->
                    same_pid();
                {ok, _} ->
                    {error, already_registered};
                {error, not_found} ->
                    % Its process or the holder itself has ended, and `global' is about to know.
                    release(Holder),
                    register(Kind, Id, Pid, Config)
            end
    end.


%% @doc Removes Id, wherever in the cluster it was registered. Returns `ok' for an unknown id too.
-spec unregister(kind(), term()) -> ok.
unregister(Kind, Id) ->
    release(global:whereis_name(?NAME(Kind, Id))).


%% @doc Finds Id in the cluster: the node of its process, the process, its configuration.
-spec find(kind(), term()) -> {ok, location()} | {error, not_found}.
find(Kind, Id) ->
    read(global:whereis_name(?NAME(Kind, Id))).


%% @doc Lists the entries of one kind in the cluster, in no particular order.
-spec list(kind()) -> [{Id :: term(), location()}].
list(Kind) ->
    % All holders are asked before the first answer is awaited: one round trip, not one an entry.
    Requests = [ {Id, gen_server:send_request(Holder, read)}
                 || ?NAME(K, Id) = Name <- global:registered_names(),
                    K =:= Kind,
                    Holder <- [global:whereis_name(Name)],
                    is_pid(Holder) ],
    Answers = [ {Id, answer(Request)} || {Id, Request} <- Requests ],
    [ {Id, Location} || {Id, {ok, Location}} <- Answers ].


-spec read(pid() | undefined) -> {ok, location()} | {error, not_found}.
read(undefined) ->
    {error, not_found};
read(Holder) ->
    answer(gen_server:send_request(Holder, read)).


-spec answer(gen_server:request_id()) -> {ok, location()} | {error, not_found}.
answer(Request) ->
    case gen_server:receive_response(Request, infinity) of
        {reply, {ok, {_, Pid, _}} = Found} ->
            % The holder may be on another node, and not have heard yet of a death on this one.
            case is_alive(Pid) of
                true -> Found;
                false -> {error, not_found}
            end;
        {reply, {error, not_found} = Error} ->
            Error;
        {error, {_Reason, _Holder}} ->
            {error, not_found}
    end.


%% Returns when the name is free, or the holder gone.
-spec release(pid() | undefined) -> ok.
release(undefined) ->
    ok;
release(Holder) ->
    _ = gen_server:receive_response(gen_server:send_request(Holder, release), infinity),
    ok.


-spec same_pid() -> ok | {error, already_registered}.
same_pid() ->
    case application:get_env(erlmcp_native, same_pid, already_registered) of
        ok -> ok;
        _ -> {error, already_registered}
    end.


%% Only a process of this node can be asked; of others the monitor tells.
-spec is_alive(pid()) -> boolean().
is_alive(Pid) ->
    node(Pid) =/= node() orelse is_process_alive(Pid).


%% The holder


%% @private
-spec init({name(), pid(), term()}) -> {ok, #holder{}} | ignore.
init({Name, Pid, Config}) ->
    % An application that stops kills the processes of its group leader. The entry ends with Pid,
    % which need not belong to the application of the process that registered it.
    true = group_leader(whereis(init), self()),
    case is_alive(Pid) of
        true ->
            _ = monitor(process, Pid),
            {ok, #holder{name = Name, pid = Pid, config = Config}};
        false ->
            ignore
    end.


%% @private
-spec handle_call(term(), gen_server:from(), #holder{}) ->
          {reply, term(), #holder{}} | {stop, normal, term(), #holder{}}.
handle_call(read, _From, #holder{pid = Pid, config = Config} = Holder) ->
    case is_alive(Pid) of
        true -> {reply, {ok, {node(Pid), Pid, Config}}, Holder};
        false -> {stop, normal, {error, not_found}, Holder}
    end;
handle_call(release, _From, Holder) ->
    {stop, normal, ok, Holder};
handle_call(_Request, _From, Holder) ->
    {reply, {error, unknown_request}, Holder}.


%% @private
-spec handle_cast(term(), #holder{}) -> {noreply, #holder{}}.
handle_cast(_Request, Holder) ->
    {noreply, Holder}.


%% @private
-spec handle_info(term(), #holder{}) -> {noreply, #holder{}} | {stop, normal, #holder{}}.
handle_info({'DOWN', _, process, Pid, _}, #holder{pid = Pid} = Holder) ->
    {stop, normal, Holder};
handle_info(_Info, Holder) ->
    {noreply, Holder}.


%% @private
%% gen_server runs this before it replies to the call that stopped it: after unregister/2 the name is
%% free on every node.
-spec terminate(term(), #holder{}) -> term().
terminate(_Reason, #holder{name = Name}) ->
    global:unregister_name(Name).
