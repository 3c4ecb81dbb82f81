%%% A registry is freed with the last outside reference to it, although configs of its own entries referred to
%%% it.
-module(registry_freeing_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([freed_after_unregistering/1,
         freed_after_processes_exited/1,
         freed_after_a_config_was_replaced/1,
         freed_after_bindings_changed/1,
         freed_after_a_name_was_taken_over/1,
         freed_after_refused_registrations/1,
         freed_with_its_last_process/1,
         chain_is_freed/1,
         config_is_found_while_it_is_replaced/1]).

%% Called in a peer node
-export([in_freeing/2, in_chain/1]).

-import(test_support, [process/0, stop/1]).

-define(M,   erlmcp_shard_registry).
-define(NIF, erlmcp_nif).

%% An empty registry takes 72 KB. Some tens of them may wait to be freed on each scheduler.
-define(MOST_BYTES, 40_000_000).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [freed_after_unregistering,
     freed_after_processes_exited,
     freed_after_a_config_was_replaced,
     freed_after_bindings_changed,
     freed_after_a_name_was_taken_over,
     freed_after_refused_registrations,
     freed_with_its_last_process,
     chain_is_freed,
     config_is_found_while_it_is_replaced].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


freed_after_unregistering(_Config) -> freed(unregister).


freed_after_processes_exited(_Config) -> freed(exit).


freed_after_a_config_was_replaced(_Config) -> freed(replace).


freed_after_bindings_changed(_Config) -> freed(bind).


freed_after_a_name_was_taken_over(_Config) -> freed(take_over).


freed_after_refused_registrations(_Config) -> freed(refuse).


%% Only the entry keeps the registry, and only while the process is alive.
freed_with_its_last_process(_Config) -> freed(drop_first).


%% Each registry is referred to by the config of an entry of the next one. Configs that are freed while others
%% read the table of configs, or while it grows, wait for later operations on it.
chain_is_freed(_Config) ->
    test_support:in_peer(?MODULE, in_chain, [2000], #{timeout_ms => 300_000}).


in_chain(Registries) ->
    ok = chain(Registries),
    test_support:await(fun() -> ok = chain(10), ?NIF:distinct_configs() < 100 end, 60_000).


chain(Registries) ->
    {Maker, Monitor} = spawn_monitor(fun() -> chain(?M:new(), Registries) end),
    receive {'DOWN', Monitor, process, Maker, normal} -> ok end.


chain(_R, 0) ->
    ok;
chain(R, Left) ->
    Next = ?M:new(#{shards => 1}),
    ok = ?M:register_connection(Next, a, whereis(init), #{registry => R}),
    chain(Next, Left - 1).


%% REGISTRIES is the number of registries (2,000).
freed(How) ->
    Registries = test_support:positive_integer("REGISTRIES", 2000),
    Grown = test_support:in_peer(?MODULE, in_freeing, [How, Registries], #{timeout_ms => 300_000}),
    ct:pal("~b registries, ~0p: ~b bytes more are resident", [Registries, How, Grown]).


in_freeing(How, Registries) ->
    ok = make_all(How, 100),
    Before = resident(),
    ok = make_all(How, Registries),
    test_support:await(fun() -> resident() - Before < ?MOST_BYTES end, 60_000),
    resident() - Before.


%% Several processes run concurrently, so that several schedulers take part.
make_all(How, Registries) ->
    Makers = 4,
    Each = Registries div Makers,
    Done = [ spawn_monitor(fun() -> make_each(How, Each) end) || _ <- lists:seq(1, Makers) ],
    [ receive {'DOWN', Monitor, process, _, Reason} -> normal = Reason end || {_, Monitor} <- Done ],
    ok.


make_each(_How, 0) ->
    ok;
make_each(How, Left) ->
    ok = make(How, ?M:new()),
    _ = garbage_collect(),
    make_each(How, Left - 1).


make(unregister, R) ->
    ok = ?M:register_connection(R, a, self(), #{registry => R}),
    %% A fun with the registry in its environment.
    ok = ?M:register_connection(R, b, self(), fun() -> R end),
    ok = ?M:unregister_connection(R, a),
    ok = ?M:unregister_connection(R, b);
make(exit, R) ->
    Pid = process(),
    ok = ?M:register_connection(R, a, Pid, #{registry => R}),
    ok = ?NIF:register(R, server, a, Pid, Pid, #{registry => R}),
    ok = ?NIF:register(R, transport, a, Pid, Pid, #{registry => R, server_id => a}),
    stop(Pid),
    test_support:await(fun() -> ?NIF:count(R, connection) + ?NIF:count(R, transport) =:= 0 end);
make(replace, R) ->
    ok = ?NIF:register(R, server, a, self(), self(), #{registry => R}),
    ok = ?NIF:update(R, server, a, #{registry => R, version => 2}),
    ok = ?NIF:update(R, server, a, none),
    {ok, {_, none}} = ?NIF:find(R, server, a),
    ok;
make(bind, R) ->
    ok = ?NIF:register(R, server, a, self(), self(), none),
    ok = ?NIF:register(R, server, b, self(), self(), none),
    ok = ?NIF:register(R, transport, t, self(), self(), #{registry => R}),
    [ ok = ?NIF:bind(R, t, Server, true) || Server <- [a, b, a] ],
    ok = ?NIF:unbind(R, t),
    ok = ?NIF:unregister(R, transport, t);
make(take_over, R) ->
    {Pid, Monitor} = spawn_monitor(fun() -> ok end),
    _ = ?M:register_connection(R, a, Pid, #{registry => R}),
    receive {'DOWN', Monitor, process, Pid, _} -> ok end,
    ok = ?M:register_connection(R, a, self(), none);
make(refuse, R) ->
    ok = ?M:register_connection(R, a, self(), none),
    {error, already_registered} = ?M:register_connection(R, a, self(), #{registry => R}),
    ok;
make(drop_first, R) ->
    {Pid, Monitor} =
        spawn_monitor(fun() -> ok = ?M:register_connection(R, a, self(), #{registry => R}) end),
    receive {'DOWN', Monitor, process, Pid, normal} -> ok end.


%% A look-up of an entry that is registered throughout always returns a config.
config_is_found_while_it_is_replaced(_Config) ->
    R = ?M:new(),
    Refers = fun(N) -> #{registry => R, number => N} end,
    ok = ?NIF:register(R, server, a, self(), self(), Refers(0)),
    Rounds = 20_000,
    {Writer, Monitor} =
        spawn_monitor(fun() -> [ ok = ?NIF:update(R, server, a, Refers(N)) || N <- lists:seq(1, Rounds) ] end),
    ok = look_until_down(R, Writer, Monitor, 0),
    ?assertMatch({ok, {_, #{number := Rounds}}}, ?NIF:find(R, server, a)).


look_until_down(R, Writer, Monitor, Last) ->
    {ok, {_, #{registry := R, number := Found}}} = ?NIF:find(R, server, a),
    [{a, {_, #{number := Listed}}}] = ?NIF:list(R, server),
    {[{a, _, #{number := Paged}, unbound}], none} = page(R),
    ?assert(Last =< Found andalso Found =< Listed andalso Listed =< Paged, {Last, Found, Listed, Paged}),
    receive
        {'DOWN', Monitor, process, Writer, Reason} ->
            ?assertEqual(normal, Reason),
            ok
    after
        0 ->
            look_until_down(R, Writer, Monitor, Paged)
    end.


page(R) -> ?NIF:page(R, server, ?NIF:shard(R, a), 0, 100).


resident() ->
    {ok, Statm} = file:read_file("/proc/self/statm"),
    [_, Pages | _] = binary:split(Statm, <<" ">>, [global]),
    binary_to_integer(Pages) * 4096.
