%%% Names of erlmcp_shard_registry, and the module as an OTP `via' registry.
%%%
%%% The grouped cases run on the default registry and on registries from new/1: see registry_variants.
-module(via_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([names/1,
         via_gen_server/1,
         via_supervisor/1,
         send_through_via/1]).

%% A gen_server to be named
-export([init/1, handle_call/3, handle_cast/2, start_named/1]).

-import(registry_variants, [api/3, registry/1]).
-import(test_support, [process/0, stop/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [{group, default},
     {group, named},
     {group, own},
     via_gen_server,
     via_supervisor,
     send_through_via].


groups() ->
    registry_variants:groups([names]).


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_group(Group, Config) ->
    registry_variants:init_per_group(Group, Config).


end_per_group(_Group, _Config) ->
    ok.


init_per_testcase(Case, Config) ->
    registry_variants:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_variants:end_per_testcase(Case, Config).


%%% On any registry


names(Config) ->
    R = registry(Config),
    Name = {a, "name"},
    Pid = process(),
    ?assertEqual(undefined, api(R, whereis_name, [Name])),
    ?assertEqual(yes, api(R, register_name, [Name, Pid])),
    ?assertEqual(no, api(R, register_name, [Name, self()])),
    ?assertEqual(no, api(R, register_name, [Name, Pid])),
    ?assertEqual(Pid, api(R, whereis_name, [Name])),
    %% Names are connections whose capabilities are `undefined'.
    ?assertEqual({ok, {Pid, undefined}}, api(R, lookup_connection, [Name])),
    ?assertEqual(Pid, api(R, send, [Name, {self(), ping}])),
    ?assertEqual(pong, receive {Pid, Reply} -> Reply after 5000 -> none end),
    ?assertEqual(ok, api(R, unregister_name, [Name])),
    ?assertEqual(ok, api(R, unregister_name, [Name])),
    ?assertEqual(undefined, api(R, whereis_name, [Name])),
    ?assertExit({badarg, {Name, message}}, api(R, send, [Name, message])),
    ?assertEqual(yes, api(R, register_name, [Name, Pid])),
    stop(Pid),
    ?assertEqual(yes, api(R, register_name, [Name, self()])),
    ?assertEqual(self(), api(R, send, [Name, to_myself])),
    ?assertEqual(to_myself, receive Message -> Message after 0 -> none end),
    ?assertEqual(ok, api(R, unregister_name, [Name])).


%%% OTP `via' names


via_gen_server(_Config) ->
    Name = {via_server, [1, 2]},
    Via = {via, ?M, Name},
    {ok, Pid} = gen_server:start(Via, ?MODULE, first, []),
    ?assertEqual({error, {already_started, Pid}}, gen_server:start(Via, ?MODULE, second, [])),
    ?assertEqual(Pid, ?M:whereis_name(Name)),
    ?assertEqual({first, hello}, gen_server:call(Via, hello)),
    ok = gen_server:cast(Via, {tell, self()}),
    ?assertEqual(told, receive {Pid, told} -> told after 5000 -> none end),
    ok = gen_server:stop(Via),
    ?assertEqual(undefined, ?M:whereis_name(Name)),
    ?assertExit({noproc, _}, gen_server:call(Via, hello)),
    ?assertEqual(ok, gen_server:cast(Via, nobody)),
    {ok, Next} = gen_server:start(Via, ?MODULE, next, []),
    ?assertEqual({next, hello}, gen_server:call(Via, hello)),
    exit(Next, kill),
    test_support:await(fun() -> not is_process_alive(Next) end),
    {ok, Last} = gen_server:start(Via, ?MODULE, last, []),
    ?assertEqual({last, hello}, gen_server:call(Via, hello)),
    ok = gen_server:stop(Last),
    %% A process whose init fails leaves no name.
    ?assertEqual({error, refused}, gen_server:start(Via, ?MODULE, refuse, [])),
    ?assertEqual(undefined, ?M:whereis_name(Name)).


via_supervisor(_Config) ->
    Name = <<"supervised">>,
    Via = {via, ?M, Name},
    {ok, Sup} = supervisor:start_link(?MODULE, supervise),
    Child = #{id => child, start => {?MODULE, start_named, [Via]}},
    {ok, First} = supervisor:start_child(Sup, Child),
    %% Restarted under the same name each time it exits.
    lists:foldl(fun(_, Pid) ->
                        exit(Pid, kill),
                        IsAnother = fun() ->
                                            Now = ?M:whereis_name(Name),
                                            is_pid(Now) andalso Now =/= Pid
                                    end,
                        test_support:await(IsAnother),
                        ?M:whereis_name(Name)
                end,
                First,
                lists:seq(1, 50)),
    ?assertEqual({named, hello}, gen_server:call(Via, hello)),
    unlink(Sup),
    ok = gen_server:stop(Sup),
    ?assertEqual(undefined, ?M:whereis_name(Name)).


send_through_via(_Config) ->
    ?assertEqual(yes, ?M:register_name({mine}, self())),
    ?assertEqual(self(), ?M:send({mine}, one)),
    ok = gen_server:cast({via, ?M, {mine}}, two),
    ?assertEqual([one, {'$gen_cast', two}], [receive A -> A end, receive B -> B end]),
    ok = ?M:unregister_name({mine}),
    ?assertExit({badarg, {{mine}, three}}, ?M:send({mine}, three)).


start_named(Via) ->
    gen_server:start_link(Via, ?MODULE, named, []).


init(refuse) -> {stop, refused};
init(supervise) -> {ok, {#{intensity => 1000, period => 1}, []}};
init(Name) -> {ok, Name}.


handle_call(Request, _From, Name) -> {reply, {Name, Request}, Name}.


handle_cast({tell, Pid}, Name) ->
    Pid ! {self(), told},
    {noreply, Name};
handle_cast(_, Name) ->
    {noreply, Name}.
