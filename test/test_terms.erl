%%% Terms of every kind, for ids and configs.
-module(test_terms).

-export([all_ids/0, look_alikes/0]).
-export([external_pid/2, external_port/1, external_reference/1, fun_with/1]).
-export([map_of/2, some_binary/1, nested/2, nested/3, zero/1, make_anew/1]).

-import(test_support, [process/0]).


fun_with(Environment) ->
    fun(X) -> {Environment, X} end.


%% At least one of every kind of term.
all_ids() ->
    Ref = make_ref(),
    [Port | _] = erlang:ports(),
    [a,
     '',
     undefined,
     true,
     'an atom of many letters',
     '\x{3b1}\x{1f600}',
     <<>>,
     <<0>>,
     <<"id">>,
     some_binary(30),
     some_binary(31),
     some_binary(64),
     some_binary(65),
     some_binary(60_000),
     <<1:1>>,
     <<0:7>>,
     <<5:67>>,
     0,
     1,
     -1,
     127,
     128,
     255,
     1 bsl 27,
     1 bsl 59,
     -(1 bsl 59),
     1 bsl 63,
     (1 bsl 63) - 1,
     -(1 bsl 63),
     1 bsl 64,
     -(1 bsl 64),
     1 bsl 1000,
     0.0,
     1.0,
     -1.5,
     1.0e300,
     5.0e-324,
     [],
     [a],
     "string",
     [1, 2.0, <<3>>],
     [a | b],
     [[a | b], [c | [d | e]] | {f}],
     [[] | []],
     {},
     {a},
     {{}},
     {a, {b, [c]}},
     list_to_tuple(lists:seq(1, 255)),
     #{},
     #{a => 1},
     #{1 => a, 1.0 => b},
     map_of(31, up),
     map_of(32, up),
     map_of(33, up),
     map_of(100, up),
     #{#{a => []} => #{{} => <<1:3>>}},
     self(),
     process(),
     Ref,
     {Ref, self()},
     #{Ref => [self() | Ref]},
     Port,
     {Port},
     fun lists:map/2,
     {fun lists:map/2, [self(), Ref]},
     atomics:new(1, []),
     erlang:alias(),
     external_pid(<<"other@host">>, 1),
     external_reference(<<"other@host">>),
     external_port(<<"other@host">>),
     {external_pid(<<"other@host">>, 2)},
     external_pid(atom_to_binary(node()), 77),
     nested(20, fun(T) -> [T] end),
     nested(500, fun(T) -> {T} end),
     nested(500, fun(T) -> [a | T] end),
     nested(500, fun(T) -> [T | a] end),
     nested(200, fun(T) -> #{T => b} end, fun(_) -> a end),
     nested(100, fun(T) -> #{k => T} end),
     nested(4000, fun(T) -> [T] end)].


%% Terms that are easily mistaken for each other.
look_alikes() ->
    [1,
     1.0,
     <<1>>,
     <<1:8/little>>,
     [1],
     {1},
     "1",
     <<"1">>,
     '1',
     #{1 => 1},
     #{1 => 1.0},
     #{1.0 => 1},
     [1 | 1],
     [1, 1],
     {1, 1},
     {[1]},
     [{1}],
     [[1]],
     {{1}},
     <<1:1>>,
     <<1:2>>,
     <<1:7>>,
     <<2:8>>,
     <<0:1>>,
     <<0:2>>,
     <<>>,
     [],
     {},
     #{},
     '',
     [[]],
     [[], []],
     [[] | []],
     {[]},
     {[], []},
     [{}],
     a,
     "a",
     <<"a">>,
     [a],
     {a},
     {a, a},
     [a, a],
     [a | a],
     [a, [a]],
     [[a], a],
     [[a | a]],
     {a, {a}},
     {{a}, a},
     #{a => a},
     #{a => #{a => a}},
     #{a => b, b => a},
     #{a => a, b => b},
     [a, b, c],
     [a, [b, c]],
     [a, [b | c]],
     [a, b | c],
     {a, b, c},
     {a, {b, c}},
     {{a, b}, c},
     true,
     <<"true">>,
     "true",
     undefined,
     0,
     0.0,
     -1,
     -1.0,
     <<"ab">>,
     [<<"a">>, <<"b">>],
     {<<"a">>, <<"b">>},
     [<<"ab">>],
     [<<"a">>, <<"b">> | <<"c">>],
     <<97, 0>>,
     <<0, 97>>,
     <<97>>,
     fun lists:map/2,
     fun lists:filter/2,
     fun lists:map/3,
     fun maps:map/2,
     external_pid(<<"a@b">>, 1),
     external_pid(<<"a@c">>, 1),
     external_pid(<<"a@b">>, 2),
     term_to_binary(1),
     term_to_binary({1}),
     term_to_binary(self())].


map_of(N, up) -> maps:from_list([ {key(I), I rem 3} || I <- lists:seq(1, N) ]);
map_of(N, down) -> lists:foldl(fun(I, M) -> M#{key(I) => I rem 3} end, #{}, lists:seq(N, 1, -1));
map_of(N, shuffled) ->
    Sorted = lists:sort([ {erlang:phash2({I, salt}), I} || I <- lists:seq(1, N) ]),
    lists:foldl(fun({_, I}, M) -> M#{key(I) => I rem 3} end, #{}, Sorted);
map_of(N, regrown) ->
    More = lists:foldl(fun(I, M) -> M#{key(I) => I rem 3} end, #{}, lists:seq(1, N + 50)),
    lists:foldl(fun(I, M) -> maps:remove(key(I), M) end, More, lists:seq(N + 50, N + 1, -1)).


%% Keys of several kinds. Their orders by comparison, by hash and by insertion differ. No integer is above one
%% byte.
key(I) when I rem 4 =:= 0 -> <<"key", I:16>>;
key(I) when I rem 4 =:= 1 -> float(I);
key(I) when I rem 4 =:= 2 -> {I div 256, [I rem 256]};
key(I) -> [<<I:16>> | tail].


zero(Zero) ->
    Zero.


some_binary(Bytes) ->
    << <<(erlang:phash2({binary, Bytes, N}, 256))>> || N <- lists:seq(1, Bytes) >>.


nested(Depth, Wrap) ->
    nested(Depth, Wrap, fun(T) -> T end).


nested(Depth, Wrap, Inner) ->
    lists:foldl(fun(_, T) -> Wrap(T) end, Inner(x), lists:seq(1, Depth)).


external_pid(Node, N) ->
    binary_to_term(<<131, 88, 119, (byte_size(Node)), Node/binary, N:32, 0:32, 99:32>>).


external_reference(Node) ->
    binary_to_term(<<131, 90, 3:16, 119, (byte_size(Node)), Node/binary, 99:32, 1:32, 2:32, 3:32>>).


external_port(Node) ->
    binary_to_term(<<131, 89, 119, (byte_size(Node)), Node/binary, 5:32, 99:32>>).


%%% Configs


make_anew(Term) ->
    binary_to_term(term_to_binary(Term)).
