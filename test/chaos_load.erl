%%% The load of chaos_SUITE, and the comparison at its end.
%%%
%%% The load: 5,000 connections, the servers and transports of a host, and senders that use every kind of route. Each
%%% sender numbers its messages. Senders count the accepted messages and receivers the delivered ones, and both keep a
%%% hash over the numbers in order; these are compared at the end. One connection and one transport have small buckets,
%%% some messages go to missing connections, and some receivers take nothing until the load is over, so that their shard
%%% is overloaded. So part of the messages is refused, for every reason except an open circuit.
%%%
%%% Meanwhile owners register, bind, unregister and kill connections, servers and transports. The result of each change
%%% determines what must be registered from then on.
-module(chaos_load).

-behaviour(supervisor).

-include_lib("stdlib/include/assert.hrl").

%% The load
-export([start/0, stop/1, stop/2]).
-export([nothing_sent/0, burst/3, routes/1, server_and_transport/1]).
-export([stop_host/0, connections/0]).
%% The host
-export([init/1, start_sibling/1, sibling/1]).

-define(M,           erlmcp_shard_manager).
-define(R,           erlmcp_registry).
-define(S,           erlmcp_shard_registry).
-define(DEADLINE_MS, 60_000).

-define(SHARDS,      64).
-define(CONNECTIONS, 5_000).
-define(SERVERS,     50).
%% Bound to each server.
-define(TRANSPORTS, 5).
-define(SENDERS,    3).
-define(OWNERS,     2).
%% Receivers that take nothing, and the threshold of their shard.
-define(STALLED,        5).
-define(STALLED_ADMITS, 200).

%% Targets of messages.
-record(targets, {
          %% Ids, in tuples to choose from.
          connections :: tuple(),
          servers :: tuple(),
          transports :: tuple(),
          bound :: #{term() => [term()]},
          %% Ids of connections.
          limited :: term(),
          stalled :: [term()],
          missing :: term(),
          %% A transport.
          limited_transport :: term(),
          %% Processes of all but the stalled receivers, for pings.
          awake :: tuple()
         }).
%% What a sender has sent.
-record(sent, {
          number = 0 :: non_neg_integer(),
          attempts = 0 :: non_neg_integer(),
          accepted = #{} :: #{term() => {non_neg_integer(), non_neg_integer()}},
          refused = #{} :: #{atom() => pos_integer()},
          routes = #{} :: #{atom() => pos_integer()}
         }).
-record(load, {
          began :: integer(),
          targets :: #targets{},
          receivers :: #{term() => pid()},
          senders :: [pid()],
          owners :: [pid()]
         }).

%%% The host


%% In the shape of erlmcp, with the registry first. The intensity allows for a registry that is killed on purpose.
init(Killer) ->
    {ok, {#{strategy => one_for_all, intensity => 1_000, period => 10},
          [#{id => ?R, start => {?R, start_link, []}},
           #{id => sibling, start => {?MODULE, start_sibling, [Killer]}, shutdown => ?DEADLINE_MS}]}}.


start_host() ->
    {ok, _Pid} = supervisor:start_link({local, chaos_host}, ?MODULE, self()).


%% Stops the host, which clears servers and transports.
stop_host() ->
    case whereis(chaos_host) of
        undefined ->
            ok;
        Host ->
            Monitor = monitor(process, Host),
            true = unlink(Host),
            true = exit(Host, shutdown),
            stop_host(Host, Monitor)
    end.


stop_host(Host, Monitor) ->
    receive
        {ending, Sibling} ->
            Sibling ! go_on,
            stop_host(Host, Monitor);
        {'DOWN', Monitor, process, Host, _Reason} ->
            ok
    end.


start_sibling(Killer) ->
    proc_lib:start_link(?MODULE, sibling, [Killer]).


%% A server of the host, registered under the same id after each restart.
sibling(Killer) ->
    process_flag(trap_exit, true),
    ok = ?R:register_server(sibling, self(), #{id => sibling}),
    Monitor = monitor(process, Killer),
    ok = proc_lib:init_ack({ok, self()}),
    Killer ! {up, self()},
    receive
        {'EXIT', _Host, shutdown} -> ok
    end,
    Killer ! {ending, self()},
    receive
        go_on -> ok;
        {'DOWN', Monitor, process, Killer, _Reason} -> ok
    end,
    exit(shutdown).


%%% Load


start() ->
    start_host(),
    {Targets, Receivers} = start_receivers(),
    #load{
      began = now_ms(),
      targets = Targets,
      receivers = Receivers,
      senders = [ start_sender(Targets) || _ <- lists:seq(1, ?SENDERS) ],
      owners = [ start_owner(Owner) || Owner <- lists:seq(1, ?OWNERS) ]
     }.


start_receivers() ->
    Connections = [ <<"connection ", (integer_to_binary(N))/binary>> || N <- lists:seq(1, ?CONNECTIONS) ],
    [Limited, OneStalled | _] = Connections,
    Slow = ?S:get_shard_id(OneStalled),
    Stalled = lists:sublist([ Id || Id <- Connections, ?S:get_shard_id(Id) =:= Slow, Id =/= Limited ], ?STALLED),
    Servers = [ {server, N} || N <- lists:seq(1, ?SERVERS) ],
    %% Broadcasts must be admitted, since their result does not say which transports they have reached.
    Ids = [ Id || N <- lists:seq(1, 1_000), Id <- [{transport, N}], ?S:get_shard_id(Id) =/= Slow ],
    Transports = lists:zip(lists:sublist(Ids, ?SERVERS * ?TRANSPORTS), lists:append(lists:duplicate(?TRANSPORTS, Servers))),
    Receivers = maps:from_list([ {{connection, Id}, start_receiver(lists:member(Id, Stalled))} || Id <- Connections ] ++
                               [ {{server, Id}, start_receiver(false)} || Id <- Servers ++ servers_of_owners() ] ++
                               [ {{transport, Id}, start_receiver(false)} || {Id, _Server} <- [{limited, none} | Transports] ]),
    maps:foreach(fun({connection, Id}, Pid) -> ok = ?S:register_connection(Id, Pid, #{id => Id});
                    ({server, Id}, Pid) -> ok = ?R:register_server(Id, Pid, #{id => Id});
                    ({transport, Id}, Pid) -> ok = ?R:register_transport(Id, Pid, #{id => Id})
                 end,
                 Receivers),
    [ ok = ?R:bind_transport_to_server(Id, Server) || {Id, Server} <- Transports ],
    Limits = #{capacity => 5, rate_per_second => 5},
    ok = erlmcp_token_bucket:set_limits(Limited, Limits),
    ok = erlmcp_token_bucket:set_limits(transport, limited, Limits),
    ok = erlmcp_admission_control:set_threshold(Slow, ?STALLED_ADMITS),
    Awake = maps:without([ {connection, Id} || Id <- Stalled ], Receivers),
    Targets = #targets{
                connections = list_to_tuple(Connections),
                servers = list_to_tuple(Servers),
                transports = list_to_tuple([ Id || {Id, _Server} <- Transports ]),
                bound = maps:from_list([ {Server, [ Id || {Id, Of} <- Transports, Of =:= Server ]} || Server <- Servers ]),
                limited = Limited,
                stalled = Stalled,
                missing = <<"no connection">>,
                limited_transport = limited,
                awake = list_to_tuple(maps:values(Awake))
               },
    {Targets, Receivers}.


stop(Load) ->
    stop(Load, #{}).


%% Compares sent with delivered messages and expected with actual registrations, then waits until the application is
%% healthy. More holds what other processes have sent. Returns sums.
stop(#load{receivers = Receivers, targets = Targets} = Load, More) ->
    Sent = maps:merge(More, maps:from_list([ {Pid, ask(Pid, stop)} || Pid <- Load#load.senders ])),
    Ms = now_ms() - Load#load.began,
    {Owned, Changes} = lists:unzip([ ask(Pid, stop) || Pid <- Load#load.owners ]),
    _ = [ maps:get({connection, Id}, Receivers) ! go_on || Id <- Targets#targets.stalled ],
    maps:foreach(fun(Target, Pid) -> is(accepted(Target, Sent), fun() -> {Target, ask(Pid, tell)} end) end, Receivers),
    Delivered = lists:sum([ Count || Pid <- maps:values(Receivers), {Count, _} <- maps:values(ask(Pid, tell)) ]),
    #{attempts := Attempts, refused := Refused, routes := Routes} = Sums = sums(maps:values(Sent)),
    ?assertEqual(Attempts, Delivered + lists:sum(maps:values(Refused))),
    ?assertMatch(#{rate_limited := _, shard_overloaded := _, not_found := _}, Refused),
    ?assertMatch(#{single := _, batch := _, server := _, transport := _, broadcast := _}, Routes),
    %% A thousand messages a second are few for any machine.
    ?assert(Delivered > Ms, {Delivered, Ms}),
    Owns = lists:append([ maps:to_list(O) || O <- Owned ]),
    ok = has_registered([ {Target, Pid, binding(Target, Targets)} || {Target, Pid} <- maps:to_list(Receivers) ] ++
                        [ {Target, Pid, Binding} || {Target, {Pid, Binding}} <- Owns ]),
    ?assert(lists:sum([ Made || {Made, _NotRunning} <- Changes ]) > Ms div 20, Changes),
    is(ok, fun erlmcp_native:health/0),
    ?assert(lists:keymember(erlmcp_native, 1, application:which_applications())),
    lists:foreach(fun(Pid) -> unlink(Pid), exit(Pid, kill) end, maps:values(Receivers) ++ [ Pid || {_, {Pid, _}} <- Owns ]),
    Sums#{delivered => Delivered, ms => Ms, changes => Changes}.


accepted(Target, Sent) ->
    {Target, maps:from_list([ {Sender, Chain} || {Sender, #sent{accepted = #{Target := Chain}}} <- maps:to_list(Sent) ])}.


binding({transport, Id}, #targets{bound = Bound}) ->
    hd([ Server || {Server, Ids} <- maps:to_list(Bound), lists:member(Id, Ids) ] ++ [none]);
binding(_Target, _Targets) ->
    none.


%% Exactly these entries and the host's sibling are registered.
has_registered(All) ->
    {sibling, Sibling, _, _} = lists:keyfind(sibling, 1, supervisor:which_children(chaos_host)),
    Expected = fun(Kind) -> lists:sort([ {Id, {Pid, #{id => Id}}} || {{Of, Id}, Pid, _} <- All, Of =:= Kind ]) end,
    OfSibling = {sibling, {Sibling, #{id => sibling}}},
    ok = are(Expected(connection), fun connections/0, fun ?S:lookup_connection/1),
    ok = are([OfSibling | Expected(server)], fun ?R:list_servers/0, fun ?R:find_server/1),
    ok = are(Expected(transport), fun ?R:list_transports/0, fun ?R:find_transport/1),
    Bindings = maps:from_list([ {Id, Server} || {{transport, Id}, _, Server} <- All, Server =/= none ]),
    is({ok, {registry_state, Bindings}}, fun ?R:get_all_state/0),
    is({length(Expected(connection)), length(Expected(server)) + 1, length(Expected(transport))},
       fun() ->
               #{connections := C, servers := S, transports := T} = ?S:stats(),
               {C, S, T}
       end).


%% On failure, the result says of each missing entry whether its process lives and can be found.
are(Expected, List, Find) ->
    is({[], []},
       fun() ->
               Listed = List(),
               {[ {Entry, is_process_alive(Pid), Find(Id)} || {Id, {Pid, _}} = Entry <- lists:sort(Expected) -- lists:sort(Listed) ],
                lists:sort(Listed) -- lists:sort(Expected)}
       end).


connections() ->
    lists:append([ ?S:list_connections(Shard) || Shard <- lists:seq(0, ?SHARDS - 1) ]).


sums(All) ->
    #{
      attempts => lists:sum([ Attempts || #sent{attempts = Attempts} <- All ]),
      refused => sum([ Refused || #sent{refused = Refused} <- All ]),
      routes => sum([ Routes || #sent{routes = Routes} <- All ])
     }.


sum(Maps) ->
    lists:foldl(fun({Key, N}, Sum) -> plus(Key, N, Sum) end, #{}, lists:append([ maps:to_list(Map) || Map <- Maps ])).


%%% Receivers


%% The state holds for each sender its last number, and the count and hash of its numbers.
start_receiver(IsStalled) ->
    spawn_link(fun() ->
                       _ = IsStalled andalso receive go_on -> ok end,
                       receiver(#{})
               end).


receiver(Senders) ->
    receive
        {from, Sender, N} -> receiver(taken(Sender, N, Senders));
        {mcp_message, _Transport, {from, Sender, N}} -> receiver(taken(Sender, N, Senders));
        {mcp_response, _Server, {from, Sender, N}} -> receiver(taken(Sender, N, Senders));
        {ping, From} ->
            From ! pong,
            receiver(Senders);
        {tell, From} ->
            From ! {tell, self(), maps:map(fun(_Sender, {_Last, Chain}) -> Chain end, Senders)},
            receiver(Senders)
    end.


taken(Sender, N, Senders) ->
    case Senders of
        #{Sender := {Last, Chain}} when N > Last -> Senders#{Sender := {N, chain(N, Chain)}};
        #{Sender := {Last, _Chain}} -> Senders#{Sender := {Last, {came_after, Last, N}}};
        #{} -> Senders#{Sender => {N, chain(N, {0, 0})}}
    end.


%% The count of numbers, and a hash over them in this order.
chain(N, {Count, Hash}) -> {Count + 1, erlang:phash2([Hash | N])};
chain(_N, OutOfOrder) -> OutOfOrder.


%%% Senders


start_sender(Targets) ->
    spawn_link(fun() -> sender(Targets, #sent{}) end).


%% Sends a burst each time when a receiver has reached the end of its mailbox: as much as the machine can do, and no
%% more.
sender(Targets, Sent0) ->
    receive
        {stop, From} -> From ! {stop, self(), Sent0}
    after
        0 ->
            Sent = burst(Targets, Sent0, 50),
            one_of(Targets#targets.awake) ! {ping, self()},
            receive pong -> ok after ?DEADLINE_MS -> error(no_pong) end,
            sender(Targets, Sent)
    end.


burst(#load{targets = Targets}, Sent, Number) ->
    burst(Targets, Sent, Number);
burst(_Targets, Sent, 0) ->
    Sent;
burst(Targets, Sent, More) ->
    burst(Targets, send(rand:uniform(10), Targets, Sent), More - 1).


send(1, #targets{servers = Servers, transports = Transports}, Sent) ->
    to_server(one_of(Servers), one_of(Transports), Sent);
send(2, #targets{servers = Servers, transports = Transports}, Sent) ->
    Id = one_of(Transports),
    Route = fun(Message) -> ?R:route_to_transport(Id, one_of(Servers), Message) end,
    single(transport, {transport, Id}, Route, Sent);
send(3, #targets{servers = Servers, bound = Bound}, #sent{number = Number} = Sent) ->
    Server = one_of(Servers),
    ok = ?R:route_to_transport(broadcast, Server, {from, self(), Number + 1}),
    lists:foldl(fun(Id, Sent1) -> result(broadcast, {transport, Id}, Number + 1, ok, Sent1) end,
                Sent#sent{number = Number + 1},
                maps:get(Server, Bound));
send(4, #targets{servers = Servers, limited_transport = Limited}, Sent) ->
    to_server(one_of(Servers), Limited, Sent);
send(5, #targets{limited = Limited, stalled = Stalled, missing = Missing}, Sent) ->
    to_connection(one_of([Limited, Missing | Stalled]), Sent);
send(6, #targets{connections = Connections}, Sent) ->
    batch([ one_of(Connections) || _ <- lists:seq(1, 40) ], Sent);
send(7, #targets{connections = Connections, limited = Limited, stalled = Stalled, missing = Missing}, Sent) ->
    %% Some messages of the batch are refused and some are not.
    batch([ one_of([Limited, Missing, one_of(Stalled), one_of(Connections), one_of(Connections)]) || _ <- lists:seq(1, 10) ],
          Sent);
send(_Others, #targets{connections = Connections}, Sent) ->
    to_connection(one_of(Connections), Sent).


to_connection(Id, Sent) ->
    single(single, {connection, Id}, fun(Message) -> ?M:route_message(Id, Message) end, Sent).


to_server(Id, Transport, Sent) ->
    single(server, {server, Id}, fun(Message) -> ?R:route_to_server(Id, Transport, Message) end, Sent).


single(Kind, Target, Route, #sent{number = Number} = Sent) ->
    Result = Route({from, self(), Number + 1}),
    result(Kind, Target, Number + 1, Result, Sent#sent{number = Number + 1}).


batch(Ids, #sent{number = Number} = Sent) ->
    Numbers = lists:seq(Number + 1, Number + length(Ids)),
    Results = ?M:route_batch([ {Id, {from, self(), N}} || {Id, N} <- lists:zip(Ids, Numbers) ]),
    lists:foldl(fun({Id, N, Result}, Sent1) -> result(batch, {connection, Id}, N, Result, Sent1) end,
                Sent#sent{number = Number + length(Ids)},
                lists:zip3(Ids, Numbers, Results)).


result(Kind, Target, N, ok, #sent{attempts = Attempts, accepted = Accepted, routes = Routes} = Sent) ->
    Chain = maps:get(Target, Accepted, {0, 0}),
    Sent#sent{
      attempts = Attempts + 1,
      accepted = Accepted#{Target => chain(N, Chain)},
      routes = plus(Kind, 1, Routes)
     };
result(_Kind, _Target, _N, {error, Reason}, #sent{attempts = Attempts, refused = Refused} = Sent) ->
    Sent#sent{attempts = Attempts + 1, refused = plus(Reason, 1, Refused)}.


%%% Owners


%% The state holds the owner's registrations, and how many changes it has made and could not make.
start_owner(Owner) ->
    spawn_link(fun() -> owner(Owner, #{}, {0, 0}) end).


owner(Owner, Owned0, {Made, NotRunning}) ->
    receive
        {stop, From} -> From ! {stop, self(), {Owned0, {Made, NotRunning}}}
    after
        1 ->
            Target = {one_of([connection, server, transport]), {owner, Owner, rand:uniform(20)}},
            case change(Target, Owned0) of
                not_running -> owner(Owner, Owned0, {Made, NotRunning + 1});
                Owned -> owner(Owner, Owned, {Made + 1, NotRunning})
            end
    end.


change({Kind, _Id} = Target, Owned) ->
    case Owned of
        #{Target := {Pid, _Binding}} -> change(rand:uniform(5), Kind, Target, Pid, Owned);
        #{} -> change(0, Kind, Target, sleeper(), Owned)
    end.


change(0, _Kind, Target, Pid, Owned) ->
    case attempt(fun() -> add(Target, Pid) end) of
        ok ->
            has(Target, Pid),
            Owned#{Target => {Pid, none}};
        not_running ->
            exit(Pid, kill),
            not_running
    end;
change(1, _Kind, Target, Pid, Owned) ->
    case attempt(fun() -> remove(Target) end) of
        ok ->
            has(Target, none),
            exit(Pid, kill),
            maps:remove(Target, Owned);
        not_running ->
            has(Target, Pid),
            not_running
    end;
change(2, _Kind, Target, Pid, Owned) ->
    killed = test_support:kill(Pid),
    has(Target, none),
    maps:remove(Target, Owned);
change(3, transport, {transport, Id} = Target, Pid, Owned) ->
    Server = one_of(servers_of_owners()),
    case attempt(fun() -> ?R:bind_transport_to_server(Id, Server) end) of
        ok -> Owned#{Target := {Pid, Server}};
        not_running -> not_running
    end;
change(4, transport, {transport, Id} = Target, Pid, Owned) ->
    case attempt(fun() -> ?R:unbind_transport(Id) end) of
        ok -> Owned#{Target := {Pid, none}};
        not_running -> not_running
    end;
change(_Others, _Kind, Target, Pid, Owned) ->
    case attempt(fun() -> add(Target, self()) end) of
        {error, already_registered} ->
            has(Target, Pid),
            Owned;
        not_running ->
            not_running
    end.


%% No sender broadcasts to these servers, since the transports of owners take nothing.
servers_of_owners() ->
    [ {owners, N} || N <- lists:seq(1, 5) ].


add({connection, Id}, Pid) -> ?S:register_connection(Id, Pid, #{id => Id});
add({server, Id}, Pid) -> ?R:register_server(Id, Pid, #{id => Id});
add({transport, Id}, Pid) -> ?R:register_transport(Id, Pid, #{id => Id}).


remove({connection, Id}) -> ?S:unregister_connection(Id);
remove({server, Id}) -> ?R:unregister_server(Id);
remove({transport, Id}) -> ?R:unregister_transport(Id).


%% Checks a registration, unless the registry's process is not running.
has({Kind, Id} = Target, Pid) ->
    Found = attempt(fun() ->
                            case Kind of
                                connection -> ?S:lookup_connection(Id);
                                server -> ?R:find_server(Id);
                                transport -> ?R:find_transport(Id)
                            end
                    end),
    case Found of
        {ok, {Process, #{id := Id}}} -> ?assertEqual({Target, Pid}, {Target, Process});
        {error, not_found} -> ?assertEqual({Target, Pid}, {Target, none});
        not_running -> ?assertNotEqual(connection, Kind)
    end.


attempt(Change) ->
    try
        Change()
    catch
        exit:{noproc, {gen_server, call, [?R, _Request]}} -> not_running
    end.


sleeper() ->
    spawn(fun() -> receive stop -> ok end end).


nothing_sent() ->
    #sent{}.


%% How often each kind of route was used.
routes(#sent{routes = Routes}) ->
    Routes.


%% A server and a transport that are registered all the time.
server_and_transport(#load{targets = #targets{servers = Servers, transports = Transports}}) ->
    {element(1, Servers), element(1, Transports)}.


%%% Tools


%% Waits until Look returns Expected.
is(Expected, Look) ->
    test_support:await_value(Expected, Look, ?DEADLINE_MS).


ask(Pid, Question) ->
    Pid ! {Question, self()},
    receive
        {Question, Pid, Answer} -> Answer
    after
        ?DEADLINE_MS ->
            error({no_answer, Question, process_info(Pid)})
    end.


one_of(Tuple) when is_tuple(Tuple) -> element(rand:uniform(tuple_size(Tuple)), Tuple);
one_of(List) -> lists:nth(rand:uniform(length(List)), List).


plus(Key, N, Counts) ->
    maps:update_with(Key, fun(M) -> M + N end, N, Counts).


now_ms() ->
    erlang:monotonic_time(millisecond).
