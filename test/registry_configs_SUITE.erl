%%% Configs of every kind in erlmcp_shard_registry: they are returned verbatim, stay usable for as long as they
%%% are registered, and equal ones are stored once.
%%%
%%% The grouped cases run on the default registry and on registries from new/1: see registry_variants.
-module(registry_configs_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([configs_are_returned_verbatim/1,
         large_configs_are_returned_verbatim/1,
         configs_stay_usable/1,
         equal_configs_are_kept_once/1,
         literal_as_config/1]).

-import(registry_variants, [api/3, registry/1, settled_configs/1]).
-import(test_support, [in_process/1, process/0, stop/1]).
-import(test_terms, [all_ids/0, fun_with/1, look_alikes/0, make_anew/1, map_of/2, nested/2, some_binary/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [literal_as_config,
     {group, default},
     {group, named},
     {group, own}].


groups() ->
    registry_variants:groups([configs_are_returned_verbatim,
                              large_configs_are_returned_verbatim,
                              configs_stay_usable,
                              equal_configs_are_kept_once]).


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


%%% Configs


configs_are_returned_verbatim(Config) ->
    R = registry(Config),
    Configs = all_ids() ++ look_alikes() ++ [ [I] || I <- all_ids() ],
    Pid = process(),
    Named = [ {<<"config", Nth:32>>, Caps} || {Nth, Caps} <- lists:enumerate(Configs) ],
    [ ok = api(R, register_connection, [Id, Pid, Caps]) || {Id, Caps} <- Named ],
    Wrong = [ {Caps, Found} || {Id, Caps} <- Named,
                               Found <- [api(R, lookup_connection, [Id])],
                               Found =/= {ok, {Pid, Caps}} ],
    ?assertEqual([], Wrong),
    #{shards := Shards} = api(R, limits, []),
    Listed = [ {Id, Caps} || Shard <- lists:seq(0, Shards - 1),
                             {Id, {Of, Caps}} <- api(R, list_connections, [Shard]),
                             Of =:= Pid ],
    ?assert(lists:sort(Named) =:= lists:sort(Listed)),
    stop(Pid).


%% From one word to 5 MB and of every shape, through look-ups and lists.
large_configs_are_returned_verbatim(Config) ->
    R = registry(Config),
    Tool = fun(N) -> #{name => <<"tool", N:32>>, schema => #{type => <<"object">>, n => N}} end,
    Configs =
        [ lists:seq(1, N) || N <- [10, 60, 70, 1000, 19_990, 20_010, 300_000] ] ++
        [ some_binary(N) || N <- [63, 64, 65, 1023, 1024, 1025, 50_000] ] ++
        [ binary:copy(<<"x">>, N) || N <- [320_000, 330_000, 5_000_000] ] ++
        [ list_to_tuple(lists:seq(1, N)) || N <- [100, 30_000, 200_000] ] ++
        [ #{tools => [ Tool(N) || N <- lists:seq(1, Tools) ]} || Tools <- [5, 500, 50_000] ] ++
        [map_of(10_000, up),
         nested(100_000, fun(T) -> [T] end),
         fun_with(lists:seq(1, 50_000)),
         1 bsl 1_000_000,
         <<1:800_001>>],
    ?assert(lists:any(fun(C) -> erts_debug:flat_size(C) * 8 > 5_000_000 end, Configs)),
    Pid = process(),
    [ begin
          Id = <<"large">>,
          ok = api(R, register_connection, [Id, Pid, Caps]),
          Shard = api(R, get_shard_id, [Id]),
          ?assert({ok, {Pid, Caps}} =:= api(R, lookup_connection, [Id])),
          ?assertEqual(Pid, api(R, whereis_connection, [Id])),
          ?assert([{Id, {Pid, Caps}}] =:=
                  [ E || {_, {Of, _}} = E <- api(R, list_connections, [Shard]), Of =:= Pid ]),
          ok = api(R, unregister_connection, [Id])
      end || Caps <- Configs ],
    stop(Pid).


%% The registry holds the only references to resources that are freed with their last reference.
configs_stay_usable(Config) ->
    R = registry(Config),
    Pid = process(),
    in_process(fun() ->
                       Atomics = atomics:new(1, []),
                       ok = atomics:put(Atomics, 1, 42),
                       Counters = counters:new(1, [write_concurrency]),
                       ok = counters:put(Counters, 1, 43),
                       Own = ?M:new(),
                       ok = ?M:register_connection(Own, here, Pid, inner),
                       Binary = some_binary(100_000),
                       <<_:100/binary, Sub:200/binary, _/binary>> = Binary,
                       Fun = fun() -> {atomics:get(Atomics, 1), Sub} end,
                       Caps = {Atomics, #{counters => Counters}, [Own], Binary, Sub, Fun},
                       ok = api(R, register_connection, [<<"usable">>, Pid, Caps]),
                       ok = api(R, register_connection, [<<"atomics">>, Pid, Atomics])
               end),
    Tid = ets:new(table, [public]),
    true = ets:insert(Tid, {key, value}),
    ok = api(R, register_connection, [<<"tid">>, Pid, #{table => Tid}]),
    [ garbage_collect(P) || P <- processes() ],
    {ok, {Pid, {Atomics, #{counters := Counters}, [Own], Binary, Sub, Fun} = Caps}} =
        api(R, lookup_connection, [<<"usable">>]),
    ?assertEqual(42, atomics:get(Atomics, 1)),
    ?assertEqual(43, counters:get(Counters, 1)),
    ?assertEqual({ok, {Pid, inner}}, ?M:lookup_connection(Own, here)),
    ?assert(Binary =:= some_binary(100_000)),
    ?assert(Sub =:= binary:part(Binary, 100, 200)),
    ?assert(Fun() =:= {42, Sub}),
    ?assert({ok, {Pid, Caps}} =:= api(R, lookup_connection, [<<"usable">>])),
    {ok, {Pid, Again}} = api(R, lookup_connection, [<<"atomics">>]),
    ?assertEqual(42, atomics:get(Again, 1)),
    {ok, {Pid, #{table := Table}}} = api(R, lookup_connection, [<<"tid">>]),
    ?assertEqual([{key, value}], ets:lookup(Table, key)),
    stop(Pid).


equal_configs_are_kept_once(Config) ->
    R = registry(Config),
    [ begin
          Before = lists:min([ settled_configs(R) || _ <- lists:seq(1, 5) ]),
          Pid = process(),
          %% Each config is built separately, so that it is equal to the others but not the same term.
          [ ok = api(R, register_connection, [<<"once", N:32>>, Pid, Make()])
            || N <- lists:seq(1, 1000) ],
          %% There may be fewer, because garbage of an earlier case may be freed meanwhile.
          ?assert(erlmcp_nif:distinct_configs() =< Before + 1, {Name, Before}),
          ok = api(R, register_connection, [<<"another">>, Pid, {another, Make()}]),
          ?assert(erlmcp_nif:distinct_configs() =< Before + 2, {Name, Before}),
          stop(Pid),
          test_support:await_value({Name, Before}, fun() -> {Name, max(Before, settled_configs(R))} end)
      end || {Name, Make} <- [{word, fun() -> make_anew(only_here) end},
                              {small, fun() -> make_anew(#{small => [1, 2.0, <<"3">>]}) end},
                              {large, fun() -> make_anew(lists:seq(1, 7000)) end},
                              {map, fun() ->
                                            map_of(100,
                                                   lists:nth(rand:uniform(3),
                                                             [up, down, shuffled]))
                                    end},
                              {binary, fun() -> some_binary(2000) end},
                              {huge, fun() -> make_anew(list_to_tuple(lists:seq(1, 30_000))) end}],
             %% 1,000 copies of the huge config take long, so they run on the default registry alone.
             Name =/= huge orelse R =:= default ].


%%% Registries


%% A term of the constant pool is copied, so the pool it came from may be purged.
literal_as_config(_Config) ->
    Key = {?MODULE, literal},
    Term = #{list => lists:seq(1, 500), binary => some_binary(100), fn => fun_with(1)},
    R = ?M:new(),
    %% Without the fun, because funs are refused in ids.
    LiteralId = maps:remove(fn, Term),
    ok = persistent_term:put(Key, {Term, LiteralId}),
    Id = {literal, <<"id">>},
    ok = ?M:register_connection(R, Id, self(), element(1, persistent_term:get(Key))),
    ok = ?M:register_connection(R, element(2, persistent_term:get(Key)), self(), none),
    true = persistent_term:erase(Key),
    [ begin
          [ garbage_collect(P) || P <- processes() ],
          ok = persistent_term:put(Key, [ make_anew(Term) || _ <- lists:seq(1, 20) ]),
          true = persistent_term:erase(Key)
      end || _ <- lists:seq(1, 5) ],
    ?assert({ok, {self(), Term}} =:= ?M:lookup_connection(R, Id)),
    ?assertEqual(self(), ?M:whereis_connection(R, LiteralId)),
    ?assert(lists:sort([Id, LiteralId]) =:=
            lists:sort([ L || Shard <- lists:seq(0, 63),
                              {L, _} <- ?M:list_connections(R, Shard) ])).
