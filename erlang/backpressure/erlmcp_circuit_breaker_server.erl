%%% @private
%%% The process of one named circuit breaker: {@link erlmcp_circuit_breaker_fsm} with a timer, a
%%% monitor for each call that runs, and a name.
%%%
%%% It never runs a caller's fun and never waits for anybody but its logger. A call costs it a request
%%% and a cast: the permission has to be asked for, since a caller that has just seen its failure
%%% open the breaker must find it open, and since the monitor must exist before the fun runs. While
%%% the breaker is open nothing is sent: the gate of its name says so.
-module(erlmcp_circuit_breaker_server).

-behaviour(gen_server).

-export([start/2, start_link/2, stop/1]).
-export([permit/2, conclude/2, request/2, request_all/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-export_type([permission/0]).

-opaque permission() :: {pid(), call_id()}.
-type call_id() :: reference().

-record(call, {
          ticket :: erlmcp_circuit_breaker_fsm:ticket(),
          monitor :: reference(),
          timer :: reference() | none
         }).

-record(server, {
          name :: term(),
          breaker :: erlmcp_circuit_breaker_fsm:breaker(),
          gate :: erlmcp_circuit_breaker_names:gate(),
          % Refused at gates that this name had under earlier keepers.
          refused = 0 :: non_neg_integer(),
          keeper :: reference(),
          % Ends the open state.
          timer = none :: reference() | none,
          % The calls that run.
          calls = #{} :: #{call_id() => #call{}}
         }).

%% A breaker that nobody uses gives its heap back.
-define(HIBERNATE_AFTER_MS, 30_000).
-define(REQUEST_MS,         5_000).
-define(MAX_MS,             16#ffffffff).

%%% Start and end


%% @doc Starts a breaker that belongs to nobody.
-spec start(term(), erlmcp_circuit_breaker_config:config()) -> {ok, pid()} | {error, term()}.
start(Name, Config) ->
    gen_server:start({via, erlmcp_circuit_breaker_names, Name},
                     ?MODULE,
                     {Name, Config},
                     [{hibernate_after, ?HIBERNATE_AFTER_MS}]).


%% @doc Starts a breaker for a supervisor.
-spec start_link(term(), erlmcp_circuit_breaker_config:config()) -> {ok, pid()} | {error, term()}.
start_link(Name, Config) ->
    gen_server:start_link({via, erlmcp_circuit_breaker_names, Name},
                          ?MODULE,
                          {Name, Config},
                          [{hibernate_after, ?HIBERNATE_AFTER_MS}]).


%% @doc Ends a breaker. Calls that run are not interrupted.
-spec stop(Breaker :: term()) -> ok.
stop(Breaker) ->
    Pid = pid(Breaker, stop),
    try
        gen_server:stop(Pid)
    catch
        exit:_ -> not_running(Breaker, stop)
    end.


%%% Requests


%% @doc Asks to run a fun in the calling process. A permission must be brought back to
%% {@link conclude/2}.
-spec permit(Breaker :: term(), timeout()) -> {granted, permission()} | refused.
permit(Breaker, Timeout) ->
    case erlmcp_circuit_breaker_names:lookup(Breaker) of
        {ok, Pid, Gate} ->
            case erlmcp_circuit_breaker_names:is_shut(Gate) of
                true ->
                    ok = erlmcp_circuit_breaker_names:refuse(Gate),
                    refused;
                false ->
                    ask(Breaker, Pid, Timeout)
            end;
        error ->
            ask(Breaker, pid(Breaker, permit), Timeout)
    end.


-spec ask(Breaker :: term(), pid(), timeout()) -> {granted, permission()} | refused.
ask(Breaker, Pid, Timeout) ->
    Id = make_ref(),
    try gen_server:call(Pid, {permit, Id, Timeout}, Timeout) of
        granted -> {granted, {Pid, Id}};
        refused -> refused
    catch
        exit:{timeout, _} = Reason ->
            % It may be granted later, and the fun will not run.
            conclude({Pid, Id}, withdrawn),
            exit(Reason);
        exit:{_Ended, {gen_server, call, _}} ->
            not_running(Breaker, permit)
    end.


%% @doc Brings back a permission.
-spec conclude(permission(), erlmcp_circuit_breaker_fsm:outcome()) -> ok.
conclude({Pid, Id}, Outcome) ->
    gen_server:cast(Pid, {conclude, Id, Outcome}).


%% @doc Anything but calls; exits with `{noproc, _}' if there is no such breaker.
-spec request(Breaker :: term(), get_state | get_stats | reset | force_open | force_close) -> term().
request(Breaker, Request) ->
    Pid = pid(Breaker, Request),
    try
        gen_server:call(Pid, Request, ?REQUEST_MS)
    catch
        exit:{timeout, _} = Reason -> exit(Reason);
        exit:{_Ended, {gen_server, call, _}} -> not_running(Breaker, Request)
    end.


%% @doc The answers of all breakers of this node; those that end meanwhile are left out.
-spec request_all(get_state | get_stats | reset) -> #{Name :: term() => term()}.
request_all(Request) ->
    % All are asked before the first answer is awaited.
    Asked = [ {Name, gen_server:send_request(Pid, Request)}
              || {Name, Pid} <- erlmcp_circuit_breaker_names:list() ],
    Answers = [ {Name, gen_server:receive_response(Id, ?REQUEST_MS)} || {Name, Id} <- Asked ],
    maps:from_list([ {Name, Answer} || {Name, {reply, Answer}} <- Answers ]).


%% A name comes before a process: a pid can be a name too.
-spec pid(Breaker :: term(), term()) -> pid().
pid(Breaker, Request) ->
    case erlmcp_circuit_breaker_names:whereis_name(Breaker) of
        undefined when is_pid(Breaker) -> Breaker;
        undefined -> not_running(Breaker, Request);
        Pid -> Pid
    end.


-spec not_running(Breaker :: term(), term()) -> no_return().
not_running(Breaker, Request) ->
    exit({noproc, {gen_server, call, [Breaker, Request]}}).


%%% gen_server


%% @private
-spec init({term(), erlmcp_circuit_breaker_config:config()}) -> {ok, #server{}} | {stop, name_taken}.
init({Name, Config}) ->
    % Callers may link themselves to their breaker; only its parent ends it.
    _ = process_flag(trap_exit, true),
    case erlmcp_circuit_breaker_names:join(Name) of
        {ok, Gate, Keeper} ->
            {ok, #server{
                   name = Name,
                   breaker = erlmcp_circuit_breaker_fsm:new(Config, now_ms()),
                   gate = Gate,
                   keeper = Keeper
                  }};
        error ->
            {stop, name_taken}
    end.


%% @private
-spec handle_call(term(), gen_server:from(), #server{}) -> {reply, term(), #server{}}.
handle_call({permit, Id, Timeout}, {Caller, _}, #server{breaker = Breaker0, calls = Calls} = Server)
  when is_reference(Id),
       not is_map_key(Id, Calls),
       Timeout =:= infinity orelse (is_integer(Timeout) andalso Timeout >= 0 andalso Timeout =< ?MAX_MS) ->
    case erlmcp_circuit_breaker_fsm:permit(Breaker0) of
        {granted, Ticket, Breaker} ->
            Call = #call{
                     ticket = Ticket,
                     monitor = monitor(process, Caller, [{tag, {down, Id}}]),
                     timer = start_timer(Timeout, {overdue, Id})
                    },
            {reply, granted, Server#server{breaker = Breaker, calls = Calls#{Id => Call}}};
        {refused, Breaker} ->
            {reply, refused, Server#server{breaker = Breaker}}
    end;
handle_call(get_state, _From, Server) ->
    {reply, erlmcp_circuit_breaker_fsm:state(Server#server.breaker), Server};
handle_call(get_stats, _From, #server{name = Name, refused = Refused, gate = Gate} = Server) ->
    Rejected = Refused + erlmcp_circuit_breaker_names:refused(Gate),
    Stats = erlmcp_circuit_breaker_fsm:stats(Rejected, Server#server.breaker),
    {reply, {ok, Stats#{name => Name}}, Server};
handle_call(reset, _From, #server{breaker = Breaker} = Server) ->
    {reply, ok, update(erlmcp_circuit_breaker_fsm:reset(now_ms(), Breaker), Server)};
handle_call(force_open, _From, #server{breaker = Breaker} = Server) ->
    {reply, ok, update(erlmcp_circuit_breaker_fsm:force_open(now_ms(), Breaker), Server)};
handle_call(force_close, _From, #server{breaker = Breaker} = Server) ->
    {reply, ok, update(erlmcp_circuit_breaker_fsm:force_close(now_ms(), Breaker), Server)};
handle_call(_Request, _From, Server) ->
    {reply, {error, unknown_request}, Server}.


%% @private
-spec handle_cast(term(), #server{}) -> {noreply, #server{}}.
handle_cast({conclude, Id, Outcome}, Server)
  when Outcome =:= success; Outcome =:= failure; Outcome =:= withdrawn ->
    {noreply, conclude_call(Id, Outcome, Server)};
handle_cast(_Request, Server) ->
    {noreply, Server}.


%% @private
-spec handle_info(term(), #server{}) -> {noreply, #server{}} | {stop, {shutdown, name_taken}, #server{}}.
handle_info({{down, Id}, _Monitor, process, _Caller, _Reason}, Server) ->
    % The outcome of a call that has ended would have come before this.
    {noreply, conclude_call(Id, failure, Server)};
handle_info({timeout, Timer, {overdue, Id}}, #server{calls = Calls} = Server) ->
    case Calls of
        #{Id := #call{timer = Timer}} -> {noreply, conclude_call(Id, failure, Server)};
        _ -> {noreply, Server}
    end;
handle_info({timeout, Timer, half_open}, #server{timer = Timer, breaker = Breaker} = Server) ->
    {noreply, update(erlmcp_circuit_breaker_fsm:expire(now_ms(), Breaker), Server)};
handle_info({'DOWN', Keeper, process, _, _}, #server{keeper = Keeper, name = Name, gate = Old} = Server) ->
    case erlmcp_circuit_breaker_names:join(Name) of
        {ok, Gate, NewKeeper} ->
            set_gate(Gate, Server#server.breaker),
            Refused = Server#server.refused + erlmcp_circuit_breaker_names:refused(Old),
            {noreply, Server#server{gate = Gate, keeper = NewKeeper, refused = Refused}};
        error ->
            {stop, {shutdown, name_taken}, Server}
    end;
handle_info(_Info, Server) ->
    {noreply, Server}.


%% Whichever comes first ends a call: its outcome, its caller's end, or its time.
-spec conclude_call(term(), erlmcp_circuit_breaker_fsm:outcome(), #server{}) -> #server{}.
conclude_call(Id, Outcome, #server{calls = Calls0, breaker = Breaker} = Server) ->
    case maps:take(Id, Calls0) of
        {#call{ticket = Ticket, monitor = Monitor, timer = Timer}, Calls} ->
            true = demonitor(Monitor),
            cancel_timer(Timer),
            update(erlmcp_circuit_breaker_fsm:conclude(Outcome, Ticket, now_ms(), Breaker),
                   Server#server{calls = Calls});
        error ->
            Server
    end.


%% The next state of the machine, with what a new period brings: its timer, the gate, a log line.
-spec update(erlmcp_circuit_breaker_fsm:breaker(), #server{}) -> #server{}.
update(New, #server{breaker = Old, timer = OldTimer} = Server) ->
    case erlmcp_circuit_breaker_fsm:period(New) =:= erlmcp_circuit_breaker_fsm:period(Old) of
        true ->
            Server#server{breaker = New};
        false ->
            cancel_timer(OldTimer),
            State = erlmcp_circuit_breaker_fsm:state(New),
            Timer =
                case State of
                    open -> start_timer(erlmcp_circuit_breaker_fsm:timeout(New), half_open);
                    _ -> none
                end,
            % Before any reply, so that nobody who was told of the state finds the gate otherwise.
            set_gate(Server#server.gate, New),
            _ = State =/= erlmcp_circuit_breaker_fsm:state(Old) andalso
                erlmcp_circuit_breaker_log:transition({name, Server#server.name}, State),
            Server#server{breaker = New, timer = Timer}
    end.


-spec set_gate(erlmcp_circuit_breaker_names:gate(), erlmcp_circuit_breaker_fsm:breaker()) -> ok.
set_gate(Gate, Breaker) ->
    case erlmcp_circuit_breaker_fsm:state(Breaker) of
        open -> erlmcp_circuit_breaker_names:shut(Gate);
        _ -> erlmcp_circuit_breaker_names:open(Gate)
    end.


-spec start_timer(timeout(), term()) -> reference() | none.
start_timer(infinity, _Message) -> none;
start_timer(Ms, Message) -> erlang:start_timer(Ms, self(), Message).


%% One that has fired meanwhile is told from the present one by its reference.
-spec cancel_timer(reference() | none) -> ok.
cancel_timer(none) -> ok;
cancel_timer(Timer) -> erlang:cancel_timer(Timer, [{async, true}, {info, false}]).


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).
