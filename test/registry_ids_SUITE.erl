%%% Ids of every kind in erlmcp_shard_registry: an id is any term, two ids are the same exactly if they are
%%% `=:=', and their size is bounded.
%%%
%%% The grouped cases run on the default registry and on registries from new/1: see registry_variants.
-module(registry_ids_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([every_kind_of_id_is_returned_exactly/1,
         different_ids_are_apart/1,
         integers_are_apart/1,
         equal_ids_made_apart_are_the_same/1,
         funs_are_no_ids_but_external_ones/1,
         random_ids_are_a_map/1,
         no_atom_is_made/1,
         max_id_bytes/1,
         long_ids_change_nothing/1]).

-import(registry_variants, [api/3, registry/1]).
-import(test_support, [process/0, result/1, stop/1]).
-import(test_terms, [all_ids/0, fun_with/1, look_alikes/0, map_of/2, nested/2, some_binary/1, zero/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [max_id_bytes,
     long_ids_change_nothing,
     {group, default},
     {group, named},
     {group, own}].


groups() ->
    registry_variants:groups([every_kind_of_id_is_returned_exactly,
                              different_ids_are_apart,
                              integers_are_apart,
                              equal_ids_made_apart_are_the_same,
                              funs_are_no_ids_but_external_ones,
                              random_ids_are_a_map,
                              no_atom_is_made]).


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


%%% Ids


every_kind_of_id_is_returned_exactly(Config) ->
    R = registry(Config),
    Shard = fun(Id) -> api(R, get_shard_id, [Id]) end,
    Wrong =
        [ {Id, Got}
          || Id <- all_ids(),
             Got <- [begin
                         ok = api(R, register_connection, [Id, self(), {of_id, Id}]),
                         Found = api(R, lookup_connection, [Id]),
                         Where = api(R, whereis_connection, [Id]),
                         Listed = [ L || {L, {Of, _}} <- api(R, list_connections, [Shard(Id)]),
                                         Of =:= self() ],
                         ok = api(R, unregister_connection, [Id]),
                         {Found, Where, Listed, api(R, lookup_connection, [Id])}
                     end],
             Got =/= {{ok, {self(), {of_id, Id}}}, self(), [Id], {error, not_found}} ],
    ?assertEqual([], Wrong).


%% All ids are registered together. Integers above one byte have their own case.
different_ids_are_apart(Config) ->
    R = registry(Config),
    Ids = unique(look_alikes() ++ [ Id || Id <- all_ids(), not has_integer_above_byte(Id) ]),
    check_apart(R, Ids).


integers_are_apart(Config) ->
    R = registry(Config),
    Near = fun(N) -> [N - 1, N, N + 1, -N - 1, -N, -N + 1] end,
    Powers = [ 1 bsl Bits || Bits <- lists:seq(1, 70) ++ [127, 128, 129, 255, 256, 2048, 8000] ],
    Integers = unique(lists:seq(-300, 1100) ++ lists:append([ Near(P) || P <- Powers ])),
    check_apart(R, Integers),
    check_apart(R, [ {tuple, [N | N], #{N => N}} || N <- Integers ]).


check_apart(R, Ids) ->
    Pid = process(),
    Results = [ {Id, api(R, register_connection, [Id, Pid, {nth, Nth}])}
                || {Nth, Id} <- lists:enumerate(Ids) ],
    ?assertEqual([], [ Refused || {_, Result} = Refused <- Results, Result =/= ok ]),
    Wrong = [ {Id, Nth, Found}
              || {Nth, Id} <- lists:enumerate(Ids),
                 Found <- [api(R, lookup_connection, [Id])],
                 Found =/= {ok, {Pid, {nth, Nth}}} ],
    ?assertEqual([], Wrong),
    %% Unregistering an id removes that id alone.
    lists:foldl(fun(Id, Left) ->
                        ok = api(R, unregister_connection, [Id]),
                        ?assertEqual({error, not_found}, api(R, lookup_connection, [Id])),
                        case Left of
                            [] -> [];
                            [Next | Rest] ->
                                ?assertMatch({ok, _}, api(R, lookup_connection, [Next])),
                                Rest
                        end
                end,
                tl(Ids),
                Ids),
    stop(Pid).


equal_ids_made_apart_are_the_same(Config) ->
    R = registry(Config),
    Big = some_binary(100),
    First = binary:part(Big, 0, 5),
    <<_:3, Unaligned:100/binary, _/bitstring>> = <<0:3, Big/binary, 0:5>>,
    <<_:24, Sub:100/binary, _/binary>> = <<1, 2, 3, Big/binary, 4, 5>>,
    <<_:7, UnalignedBits:43/bitstring, _/bitstring>> = <<0:7, First/binary, 5:9>>,
    <<Bits:43/bitstring, _/bitstring>> = <<First/binary, 5:9>>,
    Pairs =
        [ {map_of(N, up), map_of(N, Order)} || N <- [1, 2, 31, 32, 33, 64, 100, 1000],
                                               Order <- [down, shuffled, regrown] ] ++
        [{Big, Unaligned},
         {Big, Sub},
         {{Big}, {Unaligned}},
         {Bits, UnalignedBits},
         {[Bits], [UnalignedBits]},
         {0.0, zero(-0.0)},
         {#{0.0 => {0.0}}, #{zero(-0.0) => {zero(-0.0)}}},
         {"string", [$s, $t, $r, $i, $n, $g]},
         {fun lists:map/2, fun lists:map/2},
         {1 bsl 200, (1 bsl 100) * (1 bsl 100)},
         {self(), list_to_pid(pid_to_list(self()))}],
    %% Whether 0.0 and -0.0 are equal depends on the VM.
    Wrong = [ {Made, MadeApart, Got}
              || {Made, MadeApart} <- Pairs,
                 Got <- [begin
                             ok = api(R, register_connection, [Made, self(), none]),
                             Where = api(R, whereis_connection, [MadeApart]),
                             _ = api(R, unregister_connection, [Made]),
                             Where
                         end],
                 (Got =:= self()) =/= (Made =:= MadeApart) ],
    ?assertEqual([], Wrong).


%% Comparing the environments of funs may cost 2^40 steps, so no id is or contains a local fun.
funs_are_no_ids_but_external_ones(Config) ->
    R = registry(Config),
    Shared = lists:foldl(fun(_, T) -> {T, T} end, {}, lists:seq(1, 40)),
    [ ?assertError(badarg, api(R, Function, [Id | Arguments]))
      || Fun <- [fun_with(Shared), fun_with([]), fun() -> ok end],
         Id <- [Fun, {Fun}, [Fun], [a | Fun], #{Fun => a}, #{a => {id, Fun}}],
         {Function, Arguments} <- [{register_connection, [self(), none]},
                                   {unregister_connection, []},
                                   {lookup_connection, []},
                                   {whereis_connection, []},
                                   {register_name, [self()]},
                                   {whereis_name, []},
                                   {get_shard_id, []}] ],
    External = {fun lists:map/2, [fun erlang:self/0]},
    ok = api(R, register_connection, [External, self(), none]),
    ?assertEqual(self(), api(R, whereis_connection, [{fun lists:map/2, [fun erlang:self/0]}])),
    ok = api(R, unregister_connection, [External]).


%% Against a map of this VM, which compares keys as the registry must. The seed is printed; TEST_SEED repeats a
%% run with it.
random_ids_are_a_map(Config) ->
    R = registry(Config),
    Seed = test_support:seed("TEST_SEED"),
    _ = rand:seed(exsss, Seed),
    Pid = process(),
    Before = api(R, count, []),
    Ids = lists:append([ [Id, changed(Id)] || _ <- lists:seq(1, 3000),
                                              Id <- [random_term(4)],
                                              erlang:external_size(Id) < 4000 ]),
    Model =
        lists:foldl(fun(Id, Model) ->
                            Expected =
                                case Model of
                                    #{Id := _} -> {error, already_registered};
                                    #{} -> ok
                                end,
                            Caps = {caps, map_size(Model)},
                            ?assertEqual({Id, Expected},
                                         {Id, api(R, register_connection, [Id, Pid, Caps])}),
                            maps:merge(#{Id => Caps}, Model)
                    end,
                    #{},
                    Ids),
    ?assertEqual(Before + map_size(Model), api(R, count, [])),
    maps:foreach(fun(Id, Caps) ->
                         ?assertEqual({Id, {ok, {Pid, Caps}}},
                                      {Id, api(R, lookup_connection, [Id])})
                 end,
                 Model),
    #{shards := Shards} = api(R, limits, []),
    Listed = maps:from_list([ {Id, Caps} || Shard <- lists:seq(0, Shards - 1),
                                            {Id, {Of, Caps}} <- api(R, list_connections, [Shard]),
                                            Of =:= Pid ]),
    ?assert(Listed =:= Model),
    stop(Pid).


no_atom_is_made(Config) ->
    R = registry(Config),
    Names = [ <<"never an atom ", N:64>> || N <- lists:seq(1, 1000) ],
    Count = erlang:system_info(atom_count),
    [ begin
          ok = api(R, register_connection, [Name, self(), Name]),
          {ok, _} = api(R, lookup_connection, [Name]),
          undefined = api(R, whereis_connection, [binary_to_list(Name)]),
          ok = api(R, unregister_connection, [Name])
      end || Name <- Names ],
    ?assertEqual(Count, erlang:system_info(atom_count)).


has_integer_above_byte(N) when is_integer(N) -> N < 0 orelse N > 255;
has_integer_above_byte([H | T]) -> has_integer_above_byte(H) orelse has_integer_above_byte(T);
has_integer_above_byte(T) when is_tuple(T) -> has_integer_above_byte(tuple_to_list(T));
has_integer_above_byte(M) when is_map(M) -> has_integer_above_byte(maps:to_list(M));
has_integer_above_byte(_) -> false.


unique(Terms) ->
    maps:keys(maps:from_list([ {Term, x} || Term <- Terms ])).


random_term(Depth) ->
    case rand:uniform(if Depth > 0 -> 12; true -> 8 end) of
        1 -> lists:nth(rand:uniform(5), [a, b, true, undefined, '']);
        2 -> rand:uniform(1200) - 600;
        3 -> (rand:uniform(3) - 2) * (1 bsl rand:uniform(70)) + rand:uniform(3) - 2;
        4 -> lists:nth(rand:uniform(6), [0.0, 1.0, -1.0, 0.5, 256.0, 1.0e10]);
        5 -> rand:bytes(rand:uniform(3) - 1);
        6 -> <<(rand:uniform(8)):(rand:uniform(12))>>;
        7 -> [];
        8 -> lists:nth(rand:uniform(3), [self(), fun lists:map/2, fun lists:foldl/3]);
        9 -> [ random_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(4)) ];
        10 -> [random_term(Depth - 1) | random_term(Depth - 1)];
        11 -> list_to_tuple([ random_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(4)) ]);
        12 ->
            maps:from_list([ {random_term(Depth - 1), random_term(Depth - 1)}
                             || _ <- lists:seq(1, rand:uniform(40)) ])
    end.


%% The term with a small difference somewhere.
changed(N) when is_integer(N) -> lists:nth(rand:uniform(3), [N + 256, N + 65536, -N]);
changed([H | T]) -> case rand:uniform(2) of 1 -> [changed(H) | T]; 2 -> [H | changed(T)] end;
changed({}) -> {{}};
changed(T) when is_tuple(T) ->
    N = rand:uniform(tuple_size(T)),
    setelement(N, T, changed(element(N, T)));
changed(M) when map_size(M) > 0 ->
    [{K, V} | _] = maps:to_list(M),
    M#{K => changed(V)};
changed(B) when is_binary(B) -> <<B/binary, 0>>;
changed(T) -> {T}.


%%% Registries


%% The size of a binary is its number of bytes. The size of any other term is unspecified, but there is one
%% bound: terms above it are refused, and terms below it are found.
max_id_bytes(_Config) ->
    [ begin
          R = ?M:new(#{max_id_bytes => Max}),
          Longest = binary:copy(<<"x">>, Max),
          ?assertEqual(ok, ?M:register_connection(R, Longest, self(), none)),
          ?assertEqual({ok, {self(), none}}, ?M:lookup_connection(R, Longest)),
          check_too_long(R, <<Longest/binary, "x">>),
          check_too_long(R, [Longest]),
          check_too_long(R, lists:duplicate(Max + 1, [])),
          check_too_long(R, list_to_tuple(lists:duplicate(Max + 1, []))),
          check_too_long(R, maps:from_list([ {<<N:32>>, []} || N <- lists:seq(1, Max + 1) ])),
          check_too_long(R, 1 bsl (8 * Max)),
          check_too_long(R, <<0:(8 * Max + 1)>>),
          check_too_long(R, nested(Max + 1, fun(T) -> [T] end)),
          ?assertEqual(1, ?M:count(R))
      end || Max <- [1, 10, 30, 31, 1000, 65_535] ],
    %% The default bound.
    R = ?M:new(),
    ?assertEqual(ok, ?M:register_connection(R, binary:copy(<<"x">>, 65_535), self(), none)),
    check_too_long(R, binary:copy(<<"x">>, 65_536)),
    Large = ?M:new(#{max_id_bytes => 1 bsl 24}),
    ?assertEqual(ok, ?M:register_connection(Large, binary:copy(<<"x">>, 1 bsl 24), self(), none)),
    check_too_long(Large, binary:copy(<<"x">>, (1 bsl 24) + 1)).


check_too_long(R, Id) ->
    %% No assertion macro, which would print the id.
    [ {F, badarg} = {F, result(fun() -> apply(?M, F, [R, Id | Rest]) end)}
      || {F, Rest} <- [{register_connection, [self(), none]},
                       {unregister_connection, []},
                       {lookup_connection, []},
                       {whereis_connection, []},
                       {get_shard_id, []},
                       {register_name, [self()]},
                       {unregister_name, []},
                       {whereis_name, []},
                       {send, [message]}] ].


%% Terms that are too large to be copied. They are refused before any work in proportion to their size.
long_ids_change_nothing(_Config) ->
    R = ?M:new(),
    Memory = resident(),
    Long = binary:copy(<<0>>, 200_000_000),
    [ ?assertEqual(badarg, result(fun() -> ?M:register_connection(R, Id, self(), none) end))
      || Id <- [Long, [Long], {a, Long}, #{Long => Long}, [ Long || _ <- lists:seq(1, 1000) ]] ],
    ?assertEqual(0, ?M:count(R)),
    ?assert(resident() - Memory < 300_000_000).


%%% Processes and time


%% Resident memory of this node's operating system process, in bytes.
resident() ->
    [ garbage_collect(P) || P <- processes() ],
    case file:read_file("/proc/self/statm") of
        {ok, Statm} ->
            [_, Pages | _] = binary:split(Statm, <<" ">>, [global]),
            binary_to_integer(Pages) * 4096;
        {error, _} ->
            erlang:memory(total)
    end.
