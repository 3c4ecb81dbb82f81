%% The `global' scope of both registries: servers and transports that the whole cluster can find.
%%
%% Each entry is one small holder process, registered with OTP's `global' as
%% {erlmcp_registry, Kind, Id}. The holder keeps the pid and the configuration of the entry, monitors
%% the pid, answers reads, and exits with the pid.
%%
%% *Consistency*: a registration is a transaction of `global' over all connected nodes; two
%% registrations of one id never both succeed while the network is whole. A removal is the exit of the
%% holder. A read asks the holder, so an exited holder is `not_found' even where `global' has not yet
%% removed its name.
%%
%% *Silence*: a node that is connected and does not answer (frozen, or cut off and not yet detected) delays
%% a call by at most `global_timeout_ms' (5,000), however many entries and nodes are silent. An entry or node that
%% has not answered by then is `{error, timeout}'. A removal and a read need the holder's node only; a registration
%% needs all nodes.
%%
%% *Trade-offs*: registrations cost a cluster-wide lock (milliseconds) and reads a message to the holder's
%% node; use this scope for few, long-lived services. The holder runs on the node that registered the entry:
%% when that node goes down, the entry is removed, even if the pid is on another node. When a split network heals
%% and both halves have the id, `global' keeps one holder and kills the other; a lost connection to
%% the pid counts as its exit.
-module(erlmcp_registry_global).

-behaviour(gen_server).

-export([register/4, unregister/2, find/2, list/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).
-export_type([kind/0]).

-type kind() :: server | transport.
-type name() :: {erlmcp_registry, kind(), Id :: term()}.
-type location() :: {node(), pid(), Config :: term()}.

%% Of a holder; `timeout' is none.
-type answer() :: {entry, pid(), Config :: term()} | exited | timeout.

-record(holder, {
          pid :: pid(),
          config :: term()
         }).

-define(NAME(Kind, Id), {erlmcp_registry, Kind, Id}).


%% @doc Registers Pid as Id in the whole cluster, until it exits or is unregistered.
%%
%% Returns `{error, already_registered}' if a living process has the id; if that is Pid itself, the
%% application environment `same_pid' decides, as in the local scope. A pid that is dead already is
%% accepted and not found afterwards. `{error, timeout}': a node did not answer, and nothing is
%% registered.
-spec register(kind(), term(), pid(), term()) -> ok | {error, already_registered | timeout}.
register(Kind, Id, Pid, Config) when is_pid(Pid) ->
    register(?NAME(Kind, Id), Pid, Config, deadline(), still_time).


-spec register(name(), pid(), term(), integer(), still_time | time_is_up) ->
          ok | {error, already_registered | timeout}.
register(_Name, _Pid, _Config, _Deadline, time_is_up) ->
    {error, timeout};
register(Name, Pid, Config, Deadline, still_time) ->
    %% A holder that has not got its name by then is killed; `global' then releases its locks and its name.
    Options = [{timeout, max(1, left(Deadline))}],
    case gen_server:start({global, Name}, ?MODULE, {Pid, Config}, Options) of
        {ok, _Holder} ->
            ok;
        ignore ->
            ok;
        {error, timeout} ->
            {error, timeout};
        {error, {already_started, Holder}} ->
            case read(Holder, Deadline) of
                {ok, {_, Pid, _}} ->
                    same_pid();
                {ok, _} ->
                    {error, already_registered};
                {error, timeout} ->
                    {error, timeout};
                {error, not_found} ->
                    %% The holder has exited, and `global' is about to detect it.
                    register(Name, Pid, Config, Deadline, time_left(Deadline))
            end
    end.


%% @doc Removes Id, wherever in the cluster it was registered. Returns `ok' for an unknown id too.
%%
%% `{error, timeout}': the node that holds the entry did not answer. It removes the entry when it runs again.
-spec unregister(kind(), term()) -> ok | {error, timeout}.
unregister(Kind, Id) ->
    case ask([ {Id, Holder} || Holder <- holders(?NAME(Kind, Id)) ], release, deadline()) of
        [{Id, timeout}] -> {error, timeout};
        _ -> ok
    end.


%% @doc Finds Id in the cluster: the node of its process, the process, its configuration.
%%
%% `{error, timeout}': the node that holds the entry did not answer.
-spec find(kind(), term()) -> {ok, location()} | {error, not_found | timeout}.
find(Kind, Id) ->
    read(global:whereis_name(?NAME(Kind, Id)), deadline()).


%% @doc Lists the entries of one kind in the cluster, in no particular order. An entry whose node did not
%% answer is `{Id, {error, timeout}}'.
-spec list(kind()) -> [{Id :: term(), location() | {error, timeout}}].
list(Kind) ->
    Holders = [ {Id, Holder} || ?NAME(K, Id) = Name <- global:registered_names(), K =:= Kind, Holder <- holders(Name) ],
    [ {Id,
       case Result of
           {ok, Location} -> Location;
           Error -> Error
       end} || {Id, Answer} <- ask(Holders, read, deadline()),
               Result <- [result(Answer)],
               Result =/= {error, not_found} ].


-spec holders(name()) -> [pid()].
holders(Name) ->
    [ Holder || Holder <- [global:whereis_name(Name)], is_pid(Holder) ].


-spec read(pid() | undefined, integer()) -> {ok, location()} | {error, not_found | timeout}.
read(undefined, _Deadline) ->
    {error, not_found};
read(Holder, Deadline) ->
    [{read, Answer}] = ask([{read, Holder}], read, Deadline),
    result(Answer).


-spec result(answer()) -> {ok, location()} | {error, not_found | timeout}.
result({entry, Pid, Config}) ->
    %% The holder may be on another node, and not have received the exit of a process of this node yet.
    case is_alive(Pid) of
        true -> {ok, {node(Pid), Pid, Config}};
        false -> {error, not_found}
    end;
result(exited) ->
    {error, not_found};
result(timeout) ->
    {error, timeout}.


%% Requests


%% Asks all holders at once, and returns the answers that arrive by the deadline. The caller only waits for answers:
%% a process for each node sends the requests, since that may suspend it, and reports the exits.
-spec ask([{Key, pid()}], read | release, integer()) -> [{Key, answer()}].
ask(Holders, Request, Deadline) ->
    Asked = [ {Key, Holder, alias([reply])} || {Key, Holder} <- Holders ],
    Caller = self(),
    Askers = [ spawn(fun() -> asker(Caller, [ {Holder, Alias} || {_, Holder, Alias} <- Asked, node(Holder) =:= Node ], Request) end)
               || Node <- lists:usort([ node(Holder) || {_, Holder} <- Holders ]) ],
    Answers = [ {Key, await(Alias, Deadline)} || {Key, _Holder, Alias} <- Asked ],
    lists:foreach(fun(Asker) -> exit(Asker, kill) end, Askers),
    Answers.


%% An alias receives one answer.
-spec await(reference(), integer()) -> answer().
await(Alias, Deadline) ->
    receive
        {Alias, Answer} -> Answer
    after
        left(Deadline) ->
            _ = unalias(Alias),
            receive {Alias, Answer} -> Answer after 0 -> timeout end
    end.


-spec asker(pid(), [{pid(), reference()}], read | release) -> ok.
asker(Caller, Asked, Request) ->
    Watch = monitor(process, Caller),
    Monitors = maps:from_list([ {monitor(process, Holder), Alias} || {Holder, Alias} <- Asked ]),
    lists:foreach(fun({Holder, Alias}) -> erlang:send(Holder, {?MODULE, Request, Alias}, [noconnect]) end, Asked),
    tell_of_exits(Watch, Monitors).


-spec tell_of_exits(reference(), #{reference() => reference()}) -> ok.
tell_of_exits(Watch, Monitors) ->
    receive
        {'DOWN', Watch, process, _, _} ->
            ok;
        {'DOWN', Monitor, process, _, _} ->
            #{Monitor := Alias} = Monitors,
            Alias ! {Alias, exited},
            tell_of_exits(Watch, Monitors)
    end.


-spec deadline() -> integer().
deadline() ->
    erlang:monotonic_time(millisecond) + erlmcp_native_config:global_timeout_ms().


-spec left(integer()) -> non_neg_integer().
left(Deadline) ->
    max(0, Deadline - erlang:monotonic_time(millisecond)).


-spec time_left(integer()) -> still_time | time_is_up.
time_left(Deadline) ->
    case left(Deadline) of
        0 -> time_is_up;
        _ -> still_time
    end.


-spec same_pid() -> ok | {error, already_registered}.
same_pid() ->
    case application:get_env(erlmcp_native, same_pid, already_registered) of
        ok -> ok;
        _ -> {error, already_registered}
    end.


%% Only processes of this node can be checked; for other processes the monitor reports the exit.
-spec is_alive(pid()) -> boolean().
is_alive(Pid) ->
    node(Pid) =/= node() orelse is_process_alive(Pid).


%% The holder


%% @private
-spec init({pid(), term()}) -> {ok, #holder{}} | ignore.
init({Pid, Config}) ->
    % An application that stops kills the processes that have its group leader. The entry ends with Pid,
    % which may belong to another application than the process that registered it.
    true = group_leader(whereis(init), self()),
    case is_alive(Pid) of
        true ->
            _ = monitor(process, Pid),
            {ok, #holder{pid = Pid, config = Config}};
        false ->
            ignore
    end.


%% @private
-spec handle_call(term(), gen_server:from(), #holder{}) -> {reply, {error, unknown_request}, #holder{}}.
handle_call(_Request, _From, Holder) ->
    {reply, {error, unknown_request}, Holder}.


%% @private
-spec handle_cast(term(), #holder{}) -> {noreply, #holder{}}.
handle_cast(_Request, Holder) ->
    {noreply, Holder}.


%% @private
%% Exits without `global:unregister_name/1', which would wait for every node: each node removes the name
%% of a process that has exited.
-spec handle_info(term(), #holder{}) -> {noreply, #holder{}} | {stop, normal, #holder{}}.
handle_info({?MODULE, read, Alias}, #holder{pid = Pid, config = Config} = Holder) ->
    case is_alive(Pid) of
        true ->
            ok = answer(Alias, {entry, Pid, Config}),
            {noreply, Holder};
        false ->
            ok = answer(Alias, exited),
            {stop, normal, Holder}
    end;
handle_info({?MODULE, release, Alias}, Holder) ->
    ok = answer(Alias, exited),
    {stop, normal, Holder};
handle_info({'DOWN', _, process, Pid, _}, #holder{pid = Pid} = Holder) ->
    {stop, normal, Holder};
handle_info(_Info, Holder) ->
    {noreply, Holder}.


%% Never suspends the holder, which has other requests to answer.
-spec answer(reference(), answer()) -> ok.
answer(Alias, Answer) ->
    case erlang:send(Alias, {Alias, Answer}, [nosuspend, noconnect]) of
        nosuspend ->
            _ = spawn(fun() -> erlang:send(Alias, {Alias, Answer}, [noconnect]) end),
            ok;
        _SentOrNotConnected ->
            ok
    end.
