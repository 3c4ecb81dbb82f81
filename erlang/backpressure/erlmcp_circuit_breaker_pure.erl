%%% @private
%%% Named circuit breakers where the native library cannot be loaded: the same rules as a state machine in
%%% Erlang, and one process for all breakers of the node.
%%%
%%% The functions have the names, arguments and results of those of {@link erlmcp_nif} that begin with
%%% `named_breaker', except that a call is identified by a reference and not by a number. The rules are those of
%%% `native/erlmcp_core/src/call_breaker.rs'; one property runs both against one model.
%%%
%%% A <em>period</em> is the time from one transition or reset to the next. An outcome takes part in decisions
%%% only in the period in which its call was let through; a later outcome is counted in the totals alone. A call that
%%% is let through half open holds a slot until it ends, also beyond its period.
%%%
%%% == Trade-offs ==
%%% Each call is two requests to the process, which is started with the first breaker and belongs to no
%%% caller and no application. If it is killed all breakers are lost.
-module(erlmcp_circuit_breaker_pure).

-behaviour(gen_server).

-export([register/4, remove/1, owner/1, names/0]).
-export([enter/2, leave/2]).
-export([state/1, stats/1, force/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-type state() :: closed | open | half_open.
-type outcome() :: success | failure.
-type period() :: non_neg_integer().
-type call_id() :: reference().

-record(breaker, {
          config :: erlmcp_nif:named_breaker_config(),
          options :: term(),
          % Distinguishes it from another breaker of the same name.
          instance = make_ref() :: reference(),
          % The process with which it ends, and our monitor of that process.
          owner = none :: none | {pid(), reference()},
          state = closed :: state(),
          period = 0 :: period(),
          consecutive_failures = 0 :: non_neg_integer(),
          consecutive_successes = 0 :: non_neg_integer(),
          % The outcomes of the last calls, the oldest first; how many, and how many are failures.
          window = queue:new() :: queue:queue(outcome()),
          window_length = 0 :: non_neg_integer(),
          window_failures = 0 :: non_neg_integer(),
          % The calls that hold a slot, and their deadlines.
          slots = #{} :: #{call_id() => integer() | infinity},
          total_successes = 0 :: non_neg_integer(),
          total_failures = 0 :: non_neg_integer(),
          total_rejected = 0 :: non_neg_integer(),
          last_failure_time = undefined :: integer() | undefined,
          last_state_change :: integer(),
          % Transitions that were not returned to a caller yet, the last one first.
          untold = [] :: [state()]
         }).

-record(call, {
          name :: term(),
          instance :: reference(),
          period :: period(),
          kind :: call | probe,
          monitor :: reference()
         }).

-record(server, {
          breakers = #{} :: #{term() => #breaker{}},
          calls = #{} :: #{call_id() => #call{}}
         }).

-define(MAX_BREAKERS, 100_000).
%% Size in the external format: about the limit of native code.
-define(MAX_NAME_BYTES,   1_024).
-define(MAX_CONFIG_BYTES, 4_096).
-define(REQUEST_MS,       5_000).

%%% Requests


-spec register(term(), erlmcp_nif:named_breaker_config(), term(), boolean()) ->
          ok | {already_registered, pid() | none} | name_too_long | config_too_large | too_many_breakers.
register(Name, Config, Options, IsOwned) ->
    case {erlang:external_size(Name) > ?MAX_NAME_BYTES, erlang:external_size(Options) > ?MAX_CONFIG_BYTES} of
        {true, _} -> name_too_long;
        {false, true} -> config_too_large;
        {false, false} -> request({register, Name, Config, Options, IsOwned})
    end.


-spec remove(term()) -> ok | undefined.
remove(Name) ->
    request({remove, Name}).


-spec owner(term()) -> pid() | none | undefined.
owner(Name) ->
    request({owner, Name}).


-spec names() -> [term()].
names() ->
    request(names).


-spec enter(term(), timeout()) ->
          call_id() | refused | {call_id() | refused, [erlmcp_nif:transition()]} | undefined.
enter(Breaker, LimitMs) ->
    request({enter, Breaker, LimitMs}).


-spec leave(call_id(), outcome()) -> ok | [erlmcp_nif:transition()].
leave(Call, Outcome) ->
    request({leave, Call, Outcome}).


-spec state(term()) -> {state(), [erlmcp_nif:transition()]} | undefined.
state(Breaker) ->
    request({state, Breaker}).


-spec stats(term()) -> {map(), [erlmcp_nif:transition()]} | undefined.
stats(Breaker) ->
    request({stats, Breaker}).


-spec force(term(), reset | state()) -> [erlmcp_nif:transition()] | undefined.
force(Breaker, State) ->
    request({force, Breaker, State}).


-spec request(term()) -> term().
request(Request) ->
    case whereis(?MODULE) of
        undefined ->
            % Lost to a concurrent start, whose process serves as well.
            _ = gen_server:start({local, ?MODULE}, ?MODULE, [], []),
            request(Request);
        Pid ->
            gen_server:call(Pid, Request, ?REQUEST_MS)
    end.


%%% The process


%% @private
-spec init([]) -> {ok, #server{}}.
init([]) ->
    % An application that stops kills the processes that have its group leader.
    true = group_leader(whereis(init), self()),
    {ok, #server{}}.


%% @private
-spec handle_call(term(), gen_server:from(), #server{}) -> {reply, term(), #server{}}.
handle_call({register, Name, Config, Options, IsOwned}, {Caller, _}, #server{breakers = Breakers} = Server) ->
    case find(Name, Breakers) of
        {Name, #breaker{owner = Owner}} ->
            {reply, {already_registered, owner_pid(Owner)}, Server};
        _ when map_size(Breakers) >= ?MAX_BREAKERS ->
            {reply, too_many_breakers, Server};
        _ ->
            Owner = case IsOwned of
                        true -> {Caller, monitor(process, Caller)};
                        false -> none
                    end,
            Breaker = #breaker{config = Config, options = Options, owner = Owner, last_state_change = now_ms()},
            {reply, ok, Server#server{breakers = Breakers#{Name => Breaker}}}
    end;
handle_call({remove, Name}, _From, #server{breakers = Breakers} = Server) ->
    case find(Name, Breakers) of
        undefined -> {reply, undefined, Server};
        {Found, _} -> {reply, ok, Server#server{breakers = maps:remove(Found, Breakers)}}
    end;
handle_call({owner, Name}, _From, #server{breakers = Breakers} = Server) ->
    case find(Name, Breakers) of
        undefined -> {reply, undefined, Server};
        {_, #breaker{owner = Owner}} -> {reply, owner_pid(Owner), Server}
    end;
handle_call(names, _From, #server{breakers = Breakers} = Server) ->
    {reply, [ Name || {Name, Breaker} <- maps:to_list(Breakers), is_alive(Breaker) ], Server};
handle_call({enter, Name, LimitMs}, {Caller, _}, Server) ->
    with_breaker(Name, fun(Found, Breaker) -> enter(Found, Breaker, LimitMs, Caller, Server) end, Server);
handle_call({leave, Id, Outcome}, _From, #server{calls = Calls} = Server) when is_map_key(Id, Calls) ->
    Name = (map_get(Id, Calls))#call.name,
    Concluded = conclude(Id, Outcome, Server),
    case Concluded#server.breakers of
        #{Name := #breaker{untold = [_ | _]} = Breaker} ->
            {reply, transitions(Name, Breaker), told(Name, Breaker, Concluded)};
        _ ->
            {reply, ok, Concluded}
    end;
handle_call({state, Name}, _From, Server) ->
    with_breaker(Name,
                 fun(Found, #breaker{state = State} = Breaker) ->
                         {reply, {State, transitions(Found, Breaker)}, told(Found, Breaker, Server)}
                 end,
                 Server);
handle_call({stats, Name}, _From, Server) ->
    with_breaker(Name,
                 fun(Found, Breaker) ->
                         Stats = figures(Found, Breaker),
                         {reply, {Stats, transitions(Found, Breaker)}, told(Found, Breaker, Server)}
                 end,
                 Server);
handle_call({force, Name, State}, _From, Server) ->
    with_breaker(Name,
                 fun(Found, Breaker) ->
                         Forced = forced(State, now_ms(), Breaker),
                         {reply, transitions(Found, Forced), told(Found, Forced, Server)}
                 end,
                 Server);
handle_call(_Request, _From, Server) ->
    {reply, {error, unknown_request}, Server}.


%% @private
-spec handle_cast(term(), #server{}) -> {noreply, #server{}}.
handle_cast(_Request, Server) ->
    {noreply, Server}.


%% @private
-spec handle_info(term(), #server{}) -> {noreply, #server{}}.
handle_info({{caller, Id}, _Monitor, process, _Pid, _Reason}, Server) ->
    {noreply, conclude(Id, failure, Server)};
handle_info({'DOWN', Monitor, process, Pid, _Reason}, #server{breakers = Breakers} = Server) ->
    IsOthers = fun(_Name, #breaker{owner = Owner}) -> Owner =/= {Pid, Monitor} end,
    {noreply, Server#server{breakers = maps:filter(IsOthers, Breakers)}};
handle_info(_Info, Server) ->
    {noreply, Server}.


%% The breaker of that name or, if there is none, of that process. The name of a process that has
%% exited is free, also while its 'DOWN' is on the way.
-spec find(term(), #{term() => #breaker{}}) -> {term(), #breaker{}} | undefined.
find(Name, Breakers) ->
    Owned = fun({_, #breaker{owner = {Owner, _}}}) -> Owner =:= Name;
               (_) -> false
            end,
    Candidates = [ {Name, map_get(Name, Breakers)} || is_map_key(Name, Breakers) ] ++
        [ Entry || is_pid(Name), Entry <- lists:filter(Owned, maps:to_list(Breakers)) ],
    case [ Entry || {_, Breaker} = Entry <- Candidates, is_alive(Breaker) ] of
        [Entry | _] -> Entry;
        [] -> undefined
    end.


-spec is_alive(#breaker{}) -> boolean().
is_alive(#breaker{owner = none}) -> true;
is_alive(#breaker{owner = {Pid, _}}) -> is_process_alive(Pid).


-spec owner_pid(none | {pid(), reference()}) -> pid() | none.
owner_pid(none) -> none;
owner_pid({Pid, _}) -> Pid.


%% Makes the breaker half open, if the time of the open state is up.
-spec with_breaker(term(), fun((term(), #breaker{}) -> Reply), #server{}) -> Reply | {reply, undefined, #server{}}.
with_breaker(Name, Fun, #server{breakers = Breakers} = Server) ->
    case find(Name, Breakers) of
        undefined -> {reply, undefined, Server};
        {Found, Breaker} -> Fun(Found, settle(now_ms(), Breaker))
    end.


-spec transitions(term(), #breaker{}) -> [erlmcp_nif:transition()].
transitions(Name, #breaker{untold = Untold}) ->
    [ {Name, State} || State <- lists:reverse(Untold) ].


-spec told(term(), #breaker{}, #server{}) -> #server{}.
told(Name, Breaker, #server{breakers = Breakers} = Server) ->
    Server#server{breakers = Breakers#{Name => Breaker#breaker{untold = []}}}.


-spec enter(term(), #breaker{}, timeout(), pid(), #server{}) -> {reply, term(), #server{}}.
enter(Name, Breaker0, LimitMs, Caller, #server{calls = Calls} = Server0) ->
    Id = make_ref(),
    {Result, Breaker, Server} =
        case permit(Id, LimitMs, now_ms(), Breaker0) of
            {granted, Kind, Granted} ->
                Call = #call{
                         name = Name,
                         instance = Granted#breaker.instance,
                         period = Granted#breaker.period,
                         kind = Kind,
                         monitor = monitor(process, Caller, [{tag, {caller, Id}}])
                        },
                {Id, Granted, Server0#server{calls = Calls#{Id => Call}}};
            {refused, Refused} ->
                {refused, Refused, Server0}
        end,
    Reply = case transitions(Name, Breaker) of
                [] -> Result;
                Transitions -> {Result, Transitions}
            end,
    {reply, Reply, told(Name, Breaker, Server)}.


%% A call ends by its outcome or by its caller's exit, whichever comes first.
-spec conclude(call_id(), outcome(), #server{}) -> #server{}.
conclude(Id, Outcome, #server{calls = Calls0, breakers = Breakers} = Server) ->
    case maps:take(Id, Calls0) of
        {#call{name = Name, instance = Instance, monitor = Monitor} = Call, Calls} ->
            true = demonitor(Monitor),
            case Breakers of
                #{Name := #breaker{instance = Instance} = Breaker} ->
                    Concluded = concluded(Outcome, Id, Call, now_ms(), Breaker),
                    Server#server{calls = Calls, breakers = Breakers#{Name := Concluded}};
                _ ->
                    Server#server{calls = Calls}
            end;
        error ->
            Server
    end.


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).


%%% The state machine, without process or clock


%% A slot whose deadline has passed is given to the next caller.
-spec permit(call_id(), timeout(), integer(), #breaker{}) -> {granted, call | probe, #breaker{}} | {refused, #breaker{}}.
permit(_Id, _LimitMs, _Now, #breaker{state = closed} = Breaker) ->
    {granted, call, Breaker};
permit(Id, LimitMs, Now, #breaker{state = half_open, slots = Slots, config = Config} = Breaker) ->
    Deadline = case LimitMs of
                   infinity -> infinity;
                   _ -> Now + LimitMs
               end,
    % Atoms come after numbers.
    Overdue = [ Held || {Held, Until} <- maps:to_list(Slots), Until =< Now ],
    case {map_size(Slots) < element(6, Config), Overdue} of
        {true, _} -> {granted, probe, Breaker#breaker{slots = Slots#{Id => Deadline}}};
        {false, [Held | _]} -> {granted, probe, Breaker#breaker{slots = (maps:remove(Held, Slots))#{Id => Deadline}}};
        {false, []} -> refuse(Breaker)
    end;
permit(_Id, _LimitMs, _Now, #breaker{state = open} = Breaker) ->
    refuse(Breaker).


-spec refuse(#breaker{}) -> {refused, #breaker{}}.
refuse(#breaker{total_rejected = Rejected} = Breaker) ->
    {refused, Breaker#breaker{total_rejected = Rejected + 1}}.


-spec concluded(outcome(), call_id(), #call{}, integer(), #breaker{}) -> #breaker{}.
concluded(Outcome, Id, #call{period = Period, kind = Kind}, Now, #breaker{slots = Slots} = Breaker0) ->
    Breaker = count(Outcome, Breaker0#breaker{slots = maps:remove(Id, Slots)}),
    IsInTime = Kind =:= call orelse is_map_key(Id, Slots),
    case Breaker of
        #breaker{period = Period} when IsInTime -> decide(Outcome, Now, Breaker);
        _ -> Breaker
    end.


-spec count(outcome(), #breaker{}) -> #breaker{}.
count(success, #breaker{total_successes = N} = Breaker) -> Breaker#breaker{total_successes = N + 1};
count(failure, #breaker{total_failures = N} = Breaker) -> Breaker#breaker{total_failures = N + 1}.


%% No call is let through in the open state, so an outcome of the present period finds the breaker
%% closed or half open.
-spec decide(outcome(), integer(), #breaker{}) -> #breaker{}.
decide(success, Now, #breaker{state = State, consecutive_successes = N, config = Config} = Breaker0) ->
    Breaker = slide(success, Breaker0#breaker{consecutive_successes = N + 1, consecutive_failures = 0}),
    case State =:= half_open andalso N + 1 >= element(2, Config) of
        true -> begin_period(closed, Now, Breaker);
        false -> Breaker
    end;
decide(failure, Now, #breaker{state = State, consecutive_failures = N} = Breaker0) ->
    Breaker = slide(failure,
                    Breaker0#breaker{
                      consecutive_failures = N + 1,
                      consecutive_successes = 0,
                      last_failure_time = Now
                     }),
    case State =:= half_open orelse has_tripped(Breaker) of
        true -> begin_period(open, Now, Breaker);
        false -> Breaker
    end.


%% Checked after failures only: a success that fills the window never opens the breaker.
-spec has_tripped(#breaker{}) -> boolean().
has_tripped(#breaker{config = {FailureThreshold, _, _, WindowSize, Rate, _}} = Breaker) ->
    #breaker{consecutive_failures = N, window_length = Length, window_failures = Failures} = Breaker,
    N >= FailureThreshold orelse (Length >= WindowSize andalso Failures / Length >= Rate).


-spec slide(outcome(), #breaker{}) -> #breaker{}.
slide(Outcome, #breaker{window = Window0, window_length = Length, config = Config} = Breaker) ->
    Window = queue:in(Outcome, Window0),
    Failures = Breaker#breaker.window_failures + failures(Outcome),
    case element(4, Config) of
        Length ->
            {{value, Oldest}, Rest} = queue:out(Window),
            Breaker#breaker{window = Rest, window_failures = Failures - failures(Oldest)};
        _ ->
            Breaker#breaker{window = Window, window_length = Length + 1, window_failures = Failures}
    end.


-spec failures(outcome()) -> 0 | 1.
failures(success) -> 0;
failures(failure) -> 1.


-spec settle(integer(), #breaker{}) -> #breaker{}.
settle(Now, #breaker{state = open, last_state_change = Since, config = Config} = Breaker)
  when Now - Since >= element(3, Config) ->
    begin_period(half_open, Now, Breaker);
settle(_Now, Breaker) ->
    Breaker.


-spec forced(reset | state(), integer(), #breaker{}) -> #breaker{}.
forced(reset, Now, #breaker{state = closed, untold = Untold} = Breaker) ->
    (forced_reset(Now, Breaker))#breaker{untold = Untold};
forced(reset, Now, Breaker) ->
    forced_reset(Now, Breaker);
forced(State, _Now, #breaker{state = State} = Breaker) ->
    Breaker;
forced(half_open, _Now, #breaker{state = closed} = Breaker) ->
    Breaker;
forced(State, Now, Breaker) ->
    begin_period(State, Now, Breaker).


-spec forced_reset(integer(), #breaker{}) -> #breaker{}.
forced_reset(Now, Breaker) ->
    (begin_period(closed, Now, Breaker))#breaker{consecutive_successes = 0, last_failure_time = undefined}.


%% The closed state starts with an empty window: the failures that opened the breaker must not open it again at the
%% first failure that follows.
-spec begin_period(state(), integer(), #breaker{}) -> #breaker{}.
begin_period(State, Now, #breaker{period = Period, untold = Untold} = Breaker0) ->
    Breaker = Breaker0#breaker{
                state = State,
                period = Period + 1,
                last_state_change = Now,
                untold = [State | Untold]
               },
    case State of
        closed ->
            Breaker#breaker{
              consecutive_failures = 0,
              window = queue:new(),
              window_length = 0,
              window_failures = 0
             };
        open ->
            Breaker#breaker{consecutive_successes = 0};
        half_open ->
            Breaker#breaker{consecutive_failures = 0, consecutive_successes = 0}
    end.


-spec figures(term(), #breaker{}) -> map().
figures(Name, #breaker{window_length = Length, window_failures = Failures} = Breaker) ->
    #{
      name => Name,
      state => Breaker#breaker.state,
      consecutive_failures => Breaker#breaker.consecutive_failures,
      consecutive_successes => Breaker#breaker.consecutive_successes,
      total_successes => Breaker#breaker.total_successes,
      total_failures => Breaker#breaker.total_failures,
      total_rejected => Breaker#breaker.total_rejected,
      last_failure_time => Breaker#breaker.last_failure_time,
      last_state_change => Breaker#breaker.last_state_change,
      failure_rate => Failures / max(Length, 1),
      config => Breaker#breaker.options
     }.
