%%% No call of the native library takes longer than a millisecond on a normal scheduler, whatever the id; and
%%% an id beyond the bound takes no memory. nif_calls says how calls are measured.
-module(nif_ids_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([calls_with_the_longest_ids_are_short/1,
         ids_beyond_the_bound_are_refused_at_once/1,
         ids_beyond_the_bound_take_no_memory/1,
         listing_entries_with_long_ids_is_short/1]).

%% Called in peer nodes
-export([in_memory/0, longest_ids/0, beyond_bound/0, long_id_lists/0]).

-import(nif_calls, [in_peer/4, quickest/1, short/2, shortest_times/1, times/1]).
-import(test_support, [result/1]).
-import(test_terms, [fun_with/1]).

-define(NIF, erlmcp_nif).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [calls_with_the_longest_ids_are_short,
     ids_beyond_the_bound_are_refused_at_once,
     ids_beyond_the_bound_take_no_memory,
     listing_entries_with_long_ids_is_short].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% No call above a millisecond


%% Ids of the most bytes and of the most terms that the default bounds allow, in each form.
calls_with_the_longest_ids_are_short(_Config) -> short(?MODULE, longest_ids).


longest_ids() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    ok = ?NIF:register(R, transport, t, self(), self(), none),
    Ids = [{binary, binary:copy(<<"x">>, 65_535)},
           {nils, lists:duplicate(4095, [])},
           {bytes, lists:duplicate(4095, 7)},
           {tuple, list_to_tuple(lists:duplicate(4095, []))},
           {nested, lists:foldl(fun(_, T) -> [T] end, [], lists:seq(1, 4095))},
           {map, maps:from_list([ {<<N:16>>, []} || N <- lists:seq(1, 2040) ])},
           {improper, [ [a | b] || _ <- lists:seq(1, 1300) ]},
           {integer, 1 bsl 400_000},
           {bits, <<0:400_001>>},
           {integers, lists:duplicate(450, 1 bsl 64)},
           {references, lists:duplicate(450, make_ref())},
           {funs, lists:duplicate(450, fun lists:map/2)},
           {pids, lists:duplicate(4095, self())}],
    [ {{Name, Form}, Us}
      || {Form, Id} <- Ids,
         is_integer(?NIF:shard(R, Id)),
         {Name, Us} <- shortest_times(fun() -> times_with_id(R, Id) end) ].


times_with_id(R, Id) ->
    times([{shard, fun() -> ?NIF:shard(R, Id) end},
           {bind, fun() -> ?NIF:bind(R, Id, Id, true) end},
           {register, fun() -> ?NIF:register(R, connection, Id, self(), self(), none) end},
           {whereis, fun() -> ?NIF:whereis(R, connection, Id) end},
           {whereis_connection, fun() -> ?NIF:whereis_connection(Id) end},
           {find, fun() -> ?NIF:find(R, connection, Id) end},
           {unregister, fun() -> ?NIF:unregister(R, connection, Id) end},
           {bind_automatically, fun() -> ?NIF:bind(R, t, Id, false) end},
           {bound_server, fun() -> {ok, Id} = ?NIF:bound_server(R, t) end},
           {unbind, fun() -> ?NIF:unbind(R, t) end}]).


%% An id beyond the bound is recognized before it is read as a whole. The VM shows bit strings, binaries that do not
%% begin at a byte and large integers only as a copy, so they cost in proportion to their size. Funs are refused,
%% whatever they have captured.
ids_beyond_the_bound_are_refused_at_once(_Config) -> short(?MODULE, beyond_bound).


beyond_bound() ->
    Binary = binary:copy(<<0>>, 50_000_000),
    List = lists:seq(1, 1_000_000),
    Map = maps:from_list([ {N, N} || N <- lists:seq(1, 300_000) ]),
    <<_:1, Unaligned:200_000/binary, _/bitstring>> = Binary,
    <<Bits:1_999_999/bitstring, _/bitstring>> = Binary,
    Fun = fun_with(lists:seq(1, 20_000)),
    Shared = lists:foldl(fun(_, T) -> {T, T} end, {}, lists:seq(1, 40)),
    Sharing = fun_with(Shared),
    Integer = 1 bsl 2_000_000,
    Ids = [Binary,
           List,
           list_to_tuple(List),
           Map,
           {Binary},
           [List],
           {a, List},
           [Map],
           list_to_tuple(lists:duplicate(4000, list_to_tuple(lists:duplicate(4000, [])))),
           lists:foldl(fun(_, T) -> [T] end, [], List),
           lists:foldl(fun(_, T) -> {T, T} end, {}, lists:seq(1, 60)),
           Unaligned,
           Bits,
           Fun,
           Shared,
           [Shared | Shared],
           #{Shared => Shared},
           Sharing,
           {Sharing},
           [a | Sharing],
           #{a => [Sharing]},
           Integer,
           {Unaligned},
           [Bits],
           #{Fun => a},
           [a | Integer]],
    [ {{Name, Nth}, quickest(fun() -> badarg = result(Call) end)}
      || {Nth, Id} <- lists:enumerate(Ids), {Name, Call} <- refused_calls(Id) ].


%% The exceptions are ids that the VM shows only as a copy.
ids_beyond_the_bound_take_no_memory(_Config) ->
    Grown = in_peer(?MODULE, in_memory, [], []),
    ct:pal("{id, kB}: ~0p", [Grown]),
    ?assertEqual([], [ Of || {_, Kb} = Of <- Grown, Kb > 2000 ]).


in_memory() ->
    Binary = binary:copy(<<0>>, 50_000_000),
    List = lists:seq(1, 1_000_000),
    Ids = [{binary, Binary},
           {binary_inside, {Binary}},
           {list, List},
           {tuple, list_to_tuple(List)},
           {map, maps:from_list([ {N, N} || N <- lists:seq(1, 300_000) ])},
           {nested, lists:foldl(fun(_, T) -> {T} end, {}, List)}],
    [ {Name, grown_kb(fun() -> [ badarg = result(Call) || {_, Call} <- refused_calls(Id) ] end)}
      || {Name, Id} <- Ids ].


%% The smaller of two measurements, since a garbage collection of the ids themselves may fall into one.
grown_kb(Fun) ->
    min(grown_once_kb(Fun), grown_once_kb(Fun)).


%% The peak of resident memory meanwhile, above the memory before.
grown_once_kb(Fun) ->
    ok = file:write_file("/proc/self/clear_refs", "5"),
    Before = most_resident_kb(),
    _ = Fun(),
    most_resident_kb() - Before.


most_resident_kb() ->
    {ok, Status} = file:read_file("/proc/self/status"),
    {match, [Kb]} = re:run(Status, "VmHWM:\\s+([0-9]+) kB", [{capture, all_but_first, binary}]),
    binary_to_integer(Kb).


refused_calls(Id) ->
    Me = self(),
    [{whereis_connection, fun() -> ?NIF:whereis_connection(Id) end},
     {find, fun() -> ?NIF:find(default, server, Id) end},
     {shard, fun() -> ?NIF:shard(default, Id) end},
     {register, fun() -> ?NIF:register(default, server, Id, Me, Me, none) end},
     {register_automatic,
      fun() -> ?NIF:register(default, transport, t, Me, Me, #{server_id => Id}) end},
     {unregister, fun() -> ?NIF:unregister(default, transport, Id) end},
     {bind, fun() -> ?NIF:bind(default, a, Id, true) end}].


%% An entry that is listed without config may be large by its id.
listing_entries_with_long_ids_is_short(_Config) -> short(?MODULE, long_id_lists).


long_id_lists() ->
    [ {{Name, Form, Entries}, Us}
      || Form <- [binary, list, tuple, small], Entries <- [1, 8, 400], {Name, Us} <- list_times(Form, Entries) ].


list_times(Form, Entries) ->
    R = ?NIF:new(1, 2_000_000, 65_535),
    [ ok = ?NIF:register(R, NS, long_id(Form, N), self(), self(), none)
      || N <- lists:seq(1, Entries), NS <- [server, connection] ],
    Times = [{list_servers, quickest(fun() -> ?NIF:list(R, server) end)},
             {list_connections, quickest(fun() -> ?NIF:list(R, connection) end)},
             {list_shard, quickest(fun() -> ?NIF:list_shard(R, 0) end)}],
    [ ok = ?NIF:unregister(R, NS, long_id(Form, N))
      || N <- lists:seq(1, Entries), NS <- [server, connection] ],
    Times.


long_id(binary, N) -> <<N:32, 0:(8 * 60_000)>>;
long_id(list, N) -> [N | lists:duplicate(4000, [])];
long_id(tuple, N) -> list_to_tuple([N | lists:duplicate(999, a)]);
long_id(small, N) -> {conn, N}.
