%%% No call of the native library takes longer than a millisecond on a normal scheduler, however large the
%%% registry is or was. nif_calls says how calls are measured.
-module(nif_time_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([long_calls_are_noticed/1,
         calls_are_short_among_a_million_entries/1,
         growth_to_a_million_entries_is_gradual/1,
         listing_where_many_entries_were_is_short/1,
         listing_servers_among_dangling_names_is_short/1]).

%% Called in peer nodes
-export([long_call/0, in_growth/0, million/0, shrunk_lists/0, dangling_lists/0]).

-import(nif_calls, [fill/4, in_peer/4, pick/1, quickest/1, short/2, shortest/1, sleeper/0, time_us/1]).
-import(nif_specs, [specs/0]).
-import(test_support, [result/1]).

-define(NIF,        erlmcp_nif).
-define(NAMESPACES, [server, transport, connection]).
-define(LIMIT_US,   1000).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [long_calls_are_noticed,
     calls_are_short_among_a_million_entries,
     growth_to_a_million_entries_is_gradual,
     listing_where_many_entries_were_is_short,
     listing_servers_among_dangling_names_is_short].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% The measure


%% A comparison of binaries yields to no other process in any release of Erlang/OTP.
long_calls_are_noticed(_Config) ->
    [{compare, Us}] = in_peer(nif_calls, in_measured, [?MODULE, long_call], []),
    ?assert(Us > ?LIMIT_US, Us).


long_call() ->
    Bytes = 64 bsl 20,
    [First, Second] = [ binary:copy(<<0>>, Bytes) || _ <- [1, 2] ],
    [{compare, quickest(fun() -> First =:= Second end)}].


%%% No call above a millisecond


%% Valid arguments of every function that does not always run on a dirty scheduler.
calls_are_short_among_a_million_entries(_Config) -> short(?MODULE, million).


million() ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    Pid = sleeper(),
    ok = fill(Registry, connection, Pid, 1_000_000),
    ok = fill(Registry, server, Pid, 100),
    %% One server has as many transports as are listed on a normal scheduler, and one has more.
    [ ok = ?NIF:register(Registry,
                         transport,
                         <<N:32>>,
                         Pid,
                         Pid,
                         #{server_id => if N =< 400 -> <<1:32>>; true -> <<2:32>> end})
      || N <- lists:seq(1, 50_000) ],
    %% One group has more places without a member than are searched on a normal scheduler, and one has as many members as are
    %% listed there.
    Members = [ sleeper() || _ <- lists:seq(1, 25_000) ],
    [ ok = ?NIF:join_group(R, <<1:32>>, Member, Member) || R <- [Registry, default], Member <- Members ],
    [ ok = ?NIF:join_group(R, <<2:32>>, Member, Member) || R <- [Registry, default], Member <- lists:sublist(Members, 500) ],
    [ exit(Member, kill) || Member <- tl(lists:reverse(Members)), Member =/= hd(Members) ],
    test_support:await_value(2, fun() -> ?NIF:group_count(Registry, <<1:32>>) end),
    %% Those of the caller.
    [ ok = ?NIF:register(default, connection, {own, N}, self(), self(), []) || N <- lists:seq(1, 100) ],
    _ = rand:seed(exsss, {1, 2, 3}),
    Ids = list_to_tuple([ <<(rand:uniform(1_000_000)):32>> || _ <- lists:seq(1, 500) ] ++
                        [ <<N:32>> || N <- lists:seq(1, 100) ] ++
                        [ {new, N} || N <- lists:seq(1, 400) ] ++
                        [ {own, N} || N <- lists:seq(1, 100) ]),
    Limiter = full_limiter(300_000),
    Pools = #{
              registry => {Registry},
              namespace => list_to_tuple(?NAMESPACES),
              pick => {round_robin, random, [key]},
              term => Ids,
              pid => {Pid},
              number => {0, 1, 17, 63},
              boolean => {true, false},
              bucket => {?NIF:bucket_new({1000, 1.0e4})},
              limiter => {Limiter},
              message_store => {?NIF:message_store_new(1_000_000, 1 bsl 30)},
              delivery => {mailbox, {batch, 256}, {store, 1_000_000, 1 bsl 30}},
              interest => {all, {shard, 17}, {id, <<17:32>>}},
              limits => {infinity, {1000, 1.0e4}},
              breaker_config => {{5, 10_000, 2, 30_000, 2}},
              breaker_change => {success, failure, open, closed},
              named_breaker_config => {{5, 2, 60_000, 10, 0.5, 2}}
             },
    %% Sixteen keys of the greatest cost.
    Shares = [ {Limiter, lists:seq(N, N + 250), 1} || N <- lists:seq(1, 16) ],
    Together = {{take_together, 16}, quickest(fun() -> result(fun() -> ?NIF:take_together(Shares) end) end)},
    Functions = [ {Name, Kinds}
                  || {{Name, _}, #{kinds := Kinds}} <- specs(),
                     not is_dirty(Name),
                     %% A new default registry can be made only once, and one registry is enough.
                     Name =/= make_default,
                     _ <- lists:seq(1, repetitions(Name)) ],
    Measure = fun({Name, Kinds}, Calls) ->
                      Arguments = [ pick(maps:get(Kind, Pools)) || Kind <- Kinds ],
                      Us = quickest(fun() -> result(fun() -> apply(?NIF, Name, Arguments) end) end),
                      [{{Name, Arguments}, Us} | Calls]
              end,
    %% The stack does not grow: a native call that raises is followed by a garbage collection, which walks the stack.
    Calls = lists:foldl(Measure, [Together], Functions),
    exit(Pid, kill),
    Calls.


%% It has no room for another key, and no bucket to forget.
full_limiter(Keys) ->
    Limiter = ?NIF:limiter_new({1000, 0.01}, Keys),
    [ {ok, _} = ?NIF:limiter_take(Limiter, {key, N}, 500) || N <- lists:seq(1, Keys) ],
    limiter_full = ?NIF:limiter_take(Limiter, another, 1),
    Limiter.


is_dirty(Name) ->
    lists:suffix("_dirty", atom_to_list(Name)) orelse lists:member(Name, [close, bindings, page, announcements_detach, target_breakers, message_store_open, message_stores]).


%% A list of a million entries takes a second.
repetitions(list) -> 10;
repetitions(list_shard) -> 100;
repetitions(bound_transports) -> 200;
repetitions(group_members) -> 200;
repetitions(route_group) -> 200;
repetitions(_Name) -> 2000.


%% The tables grow a little with each registration and never all at once. Of a million calls a busy machine makes one or
%% two long. If growth made calls long, these would be the last four or more of the fifteen times that the table grows.
growth_to_a_million_entries_is_gradual(_Config) ->
    Attempts = attempts(fun() -> in_peer(?MODULE, in_growth, [], ["+S", "1:1"]) end, 3),
    ct:pal("in each attempt the long registrations {nth, us, ms of processor time}: ~0p", [Attempts]),
    ?assert(is_gradual(lists:last(Attempts)), Attempts).


is_gradual(Long) -> length(Long) =< 2.


%% The attempts up to the first gradual one.
attempts(Attempt, Left) ->
    Long = Attempt(),
    case is_gradual(Long) of
        false when Left > 1 -> [Long | attempts(Attempt, Left - 1)];
        _ -> [Long]
    end.


in_growth() ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    grow(Registry, sleeper(), 1, 1_000_000, runtime_ms(), []).


-define(BATCH, 20).


%% A few registrations at a time, which together take less than a tenth of a millisecond. Processor time is of all
%% threads and in whole milliseconds, so that a difference of 2 is more than 1.
grow(_Registry, _Pid, N, Last, _Runtime, Long) when N > Last ->
    Long;
grow(Registry, Pid, N, Last, Runtime, Long) ->
    Us = time_us(fun() -> ok = register_from(Registry, Pid, N, N + ?BATCH - 1) end),
    Now = runtime_ms(),
    case Now - Runtime of
        Ms when Ms >= 2, Us > ?LIMIT_US ->
            grow(Registry, Pid, N + ?BATCH, Last, Now, [{N, Us, Ms} | Long]);
        _ ->
            grow(Registry, Pid, N + ?BATCH, Last, Now, Long)
    end.


register_from(_Registry, _Pid, N, Last) when N > Last ->
    ok;
register_from(Registry, Pid, N, Last) ->
    ok = ?NIF:register(Registry, connection, <<N:32>>, Pid, Pid, none),
    register_from(Registry, Pid, N + 1, Last).


%% Processor time of all threads of this node.
runtime_ms() ->
    {Total, _SinceLastCall} = erlang:statistics(runtime),
    Total.


%% The first listing counts: it may find a table whose growth is not complete.
listing_where_many_entries_were_is_short(_Config) -> short(?MODULE, shrunk_lists).


shrunk_lists() ->
    [ {{list, NS, Most}, shortest(fun() -> list_shrunk(NS, Most) end)}
      || NS <- ?NAMESPACES, Most <- [1500, 6200, 12_500, 19_900, 100_000] ] ++
    [ {{list_shard, Most}, shortest(fun() -> list_shrunk_shard(Most) end)} || Most <- [480, 50_000] ].


list_shrunk(NS, Most) ->
    Registry = shrunk(NS, Most),
    time_us(fun() -> ?NIF:list(Registry, NS) end).


list_shrunk_shard(Most) ->
    Registry = shrunk(connection, Most),
    time_us(fun() -> ?NIF:list_shard(Registry, 0) end).


shrunk(NS, Most) ->
    Registry = ?NIF:new(1, 2_000_000, 65_535),
    ok = fill(Registry, NS, self(), Most),
    [ ok = ?NIF:unregister(Registry, NS, <<N:32>>) || N <- lists:seq(401, Most) ],
    true = ?NIF:count(Registry, NS) =< 400,
    Registry.


%% Names of servers that only automatic bindings have are not servers.
listing_servers_among_dangling_names_is_short(_Config) -> short(?MODULE, dangling_lists).


dangling_lists() ->
    [ {{list, server, Names}, shortest(fun() -> list_dangling(Names) end)}
      || Names <- [1500, 6200, 12_500, 19_900, 100_000] ].


list_dangling(Names) ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    [ ok = ?NIF:register(Registry, transport, <<N:32>>, self(), self(), #{server_id => <<N:32>>})
      || N <- lists:seq(1, Names) ],
    0 = ?NIF:count(Registry, server),
    Us = time_us(fun() -> ?NIF:list(Registry, server) end),
    [] = ?NIF:list(Registry, server),
    Us.
