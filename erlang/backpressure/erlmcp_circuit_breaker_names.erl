%%% @private
%%% The names of circuit breakers: any term, compared exactly, unknown to the node's own registry.
%%%
%%% A module for `via' names. One process, the keeper, is started with the first breaker and stays;
%%% it owns the table, monitors the breakers and is the only one to write. Reads do not ask it.
%%%
%%% *Consistency*: two breakers never both get a name. The name of a process that has ended is free
%%% at once, also while its 'DOWN' is on the way. If the keeper is killed, the breakers start the
%%% next one and register again; a name can be missing meanwhile.
%%%
%%% Each name has a <em>gate</em>, which says without a message that the breaker is open, and counts
%%% what was refused there.
-module(erlmcp_circuit_breaker_names).

-behaviour(gen_server).

-export([register_name/2, unregister_name/1, whereis_name/1, send/2]).
-export([join/1, lookup/1, list/0]).
-export([is_shut/1, shut/1, open/1, refuse/1, refused/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-export_type([gate/0]).

%% Two words: whether calls are refused (1), and how many were (2).
-opaque gate() :: atomics:atomics_ref().

-define(SHUT,    1).
-define(REFUSED, 2).

%%% Names


%% @doc Gives a name to a process of this node.
-spec register_name(term(), pid()) -> yes | no.
register_name(Name, Pid) ->
    request({register, Name, Pid}).


%% @doc Takes a name back.
-spec unregister_name(term()) -> ok.
unregister_name(Name) ->
    request({unregister, Name}).


%% @doc The living process that has a name.
-spec whereis_name(term()) -> pid() | undefined.
whereis_name(Name) ->
    case lookup(Name) of
        {ok, Pid, _Gate} -> Pid;
        error -> undefined
    end.


%% @doc Sends a message to the process that has a name; exits with `badarg' if there is none.
-spec send(term(), term()) -> pid().
send(Name, Message) ->
    case whereis_name(Name) of
        undefined ->
            exit({badarg, {Name, Message}});
        Pid ->
            Pid ! Message,
            Pid
    end.


%% @doc The gate of a name that the calling process has, and a monitor of the keeper, after whose
%% end the name must be registered again.
-spec join(term()) -> {ok, gate(), reference()} | error.
join(Name) ->
    % Monitored first: a keeper that ends after the look-up is not missed.
    Monitor = monitor(process, ?MODULE),
    case lookup(Name) of
        {ok, Pid, Gate} when Pid =:= self() ->
            {ok, Gate, Monitor};
        _ ->
            true = demonitor(Monitor, [flush]),
            case register_name(Name, self()) of
                yes -> join(Name);
                no -> error
            end
    end.


%% @doc The living process that has a name, and its gate.
-spec lookup(term()) -> {ok, pid(), gate()} | error.
lookup(Name) ->
    try ets:lookup(?MODULE, Name) of
        [{_, Pid, Gate}] ->
            case is_process_alive(Pid) of
                true -> {ok, Pid, Gate};
                false -> error
            end;
        [] ->
            error
    catch
        % There is no keeper.
        error:badarg -> error
    end.


%% @doc All names and their processes.
-spec list() -> [{term(), pid()}].
list() ->
    try ets:tab2list(?MODULE) of
        Rows -> [ {Name, Pid} || {Name, Pid, _Gate} <- Rows ]
    catch
        error:badarg -> []
    end.


%%% Gates


%% @doc Whether the breaker is open.
-spec is_shut(gate()) -> boolean().
is_shut(Gate) -> atomics:get(Gate, ?SHUT) =:= 1.


%% @doc The breaker refuses from now on.
-spec shut(gate()) -> ok.
shut(Gate) -> atomics:put(Gate, ?SHUT, 1).


%% @doc The breaker is to be asked from now on.
-spec open(gate()) -> ok.
open(Gate) -> atomics:put(Gate, ?SHUT, 0).


%% @doc Counts a call that was refused at the gate.
-spec refuse(gate()) -> ok.
refuse(Gate) -> atomics:add(Gate, ?REFUSED, 1).


%% @doc How many were refused at the gate.
-spec refused(gate()) -> non_neg_integer().
refused(Gate) -> atomics:get(Gate, ?REFUSED).


%%% The keeper


-spec request(term()) -> term().
request(Request) ->
    case whereis(?MODULE) of
        undefined ->
            % Lost to another start of the keeper: that one is as good.
            _ = gen_server:start({local, ?MODULE}, ?MODULE, [], []),
            request(Request);
        Keeper ->
            try
                gen_server:call(Keeper, Request, infinity)
            catch
                exit:{_Ended, {gen_server, call, _}} -> request(Request)
            end
    end.


%% @private
-spec init([]) -> {ok, ets:table()} | ignore.
init([]) ->
    % An application that stops kills the processes of its group leader. The keeper serves them all.
    true = group_leader(whereis(init), self()),
    try
        {ok, ets:new(?MODULE, [named_table, protected, {read_concurrency, true}])}
    catch
        % A keeper that was killed has lost its name already, and not its table yet.
        error:badarg -> ignore
    end.


%% @private
-spec handle_call(term(), gen_server:from(), ets:table()) -> {reply, term(), ets:table()}.
handle_call({register, Name, Pid}, _From, Table) when node(Pid) =:= node() ->
    case lookup(Name) of
        error ->
            _ = monitor(process, Pid, [{tag, {down, Name}}]),
            true = ets:insert(Table, {Name, Pid, atomics:new(2, [{signed, false}])}),
            {reply, yes, Table};
        {ok, Pid, _Gate} ->
            {reply, yes, Table};
        {ok, _Other, _Gate} ->
            {reply, no, Table}
    end;
handle_call({unregister, Name}, _From, Table) ->
    true = ets:delete(Table, Name),
    {reply, ok, Table};
handle_call(_Request, _From, Table) ->
    {reply, {error, unknown_request}, Table}.


%% @private
-spec handle_cast(term(), ets:table()) -> {noreply, ets:table()}.
handle_cast(_Request, Table) ->
    {noreply, Table}.


%% @private
-spec handle_info(term(), ets:table()) -> {noreply, ets:table()}.
handle_info({{down, Name}, _Monitor, process, Pid, _Reason}, Table) ->
    % The name may have a new process already.
    _ = case ets:lookup(Table, Name) of
            [{_, Pid, _Gate}] -> ets:delete(Table, Name);
            _ -> true
        end,
    {noreply, Table};
handle_info(_Info, Table) ->
    {noreply, Table}.
