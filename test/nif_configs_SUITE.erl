%%% No call of the native library takes longer than a millisecond on a normal scheduler, whatever the present and past
%%% configs. nif_calls says how calls are measured.
-module(nif_configs_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([calls_with_large_configs_are_short/1,
         small_configs_are_found_on_any_scheduler/1,
         calls_after_large_configs_are_short/1,
         calls_after_many_configs_are_short/1]).

%% Called in peer nodes
-export([in_found/0, large_configs/0, after_large_configs/0, after_many_configs/0]).

-import(nif_calls, [in_peer/4, nudge/3, short/2, shortest/1, shortest_times/1, sleeper/0, time_us/1, times/1]).
-import(test_terms, [external_pid/2, fun_with/1]).

-define(NIF, erlmcp_nif).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [calls_with_large_configs_are_short,
     small_configs_are_found_on_any_scheduler,
     calls_after_large_configs_are_short,
     calls_after_many_configs_are_short].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% No call above a millisecond


%% Configs around the sizes from which they are stored differently or left to a dirty scheduler.
calls_with_large_configs_are_short(_Config) -> short(?MODULE, large_configs).


large_configs() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    [ {{Name, Shape, Size}, Us}
      || Size <- [64, 1000, 4990, 9990, 10_010, 1_000_000],
         Shape <- [list,
                   tuple,
                   map,
                   binaries,
                   binary,
                   server_id,
                   references,
                   nested,
                   'fun',
                   funs,
                   bits,
                   integer,
                   integers],
         Config <- [large(Shape, Size)],
         {Name, Us} <- shortest_times(fun() -> times_with_config(R, Config) end) ].


%% Later calls find, change and remove what the first one registers.
times_with_config(R, Config) ->
    times([{register, fun() -> ?NIF:register(R, server, a, self(), self(), Config) end},
           {register_transport, fun() -> ?NIF:register(R, transport, a, self(), self(), Config) end},
           {find, fun() -> ?NIF:find(R, server, a) end},
           {update, fun() -> ?NIF:update(R, server, a, Config) end},
           {list, fun() -> ?NIF:list(R, server) end},
           {unregister, fun() -> ?NIF:unregister(R, server, a) end},
           {unregister_transport, fun() -> ?NIF:unregister(R, transport, a) end}]).


large(list, N) -> lists:seq(1, N);
large(tuple, N) -> list_to_tuple(lists:seq(1, N));
large(map, N) -> maps:from_list([ {I, I} || I <- lists:seq(1, N div 2) ]);
large(binaries, N) -> [ <<I:64>> || I <- lists:seq(1, N) ];
large(binary, N) -> binary:copy(<<"x">>, N * 16);
large(server_id, N) -> #{server_id => lists:seq(1, N)};
large(references, N) -> lists:duplicate(N, make_ref());
large(nested, N) -> lists:foldl(fun(_, T) -> {T} end, {}, lists:seq(1, N));
large('fun', N) -> #{handler => fun_with(lists:seq(1, N))};
large(funs, N) -> [ fun_with(I) || I <- lists:seq(1, N) ];
large(bits, N) -> #{bits => <<0:(N * 128), 1:1>>};
large(integer, N) -> #{integer => power_of_two(min(N * 128, 32_000_000))};
large(integers, N) -> [ 1 bsl 64 + I || I <- lists:seq(1, N) ].


%% Since OTP 27 an integer has about 4,000,000 bits at most.
power_of_two(Bits) ->
    try
        1 bsl Bits
    catch
        error:system_limit -> 1 bsl 4_000_000
    end.


%% Configs are found even if the VM does not report their size, once they were weighed on a dirty scheduler.
small_configs_are_found_on_any_scheduler(_Config) ->
    ?assertEqual([], in_peer(?MODULE, in_found, [], [])).


in_found() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    Configs = [#{handler => fun_with(lists:seq(1, 100))},
               fun_with([]),
               fun lists:map/2,
               <<1:1>>,
               #{bits => <<0:100_001>>},
               1 bsl 64,
               #{integers => [1 bsl 64, -(1 bsl 64), 1 bsl 1000, -(1 bsl 10_000)]},
               [make_ref(), self(), hd(erlang:ports()), external_pid(<<"other@host">>, 1)]],
    [ {Nth, Name}
      || {Nth, Config} <- lists:enumerate(Configs),
         Expected <- [{self(), Config}],
         ok <- [registered(R, server, Config)],
         {Name, Wrong} <- [{find, {ok, Expected} =/= ?NIF:find(R, server, a)},
                           {list, [{a, Expected}] =/= ?NIF:list(R, server)},
                           {unregister, ok =/= ?NIF:unregister(R, server, a)}],
         Wrong ].


registered(R, NS, Config) -> ?NIF:register(R, NS, a, self(), self(), Config).


%% A removed config is freed some calls later, in a call of any process.
calls_after_large_configs_are_short(_Config) -> short(?MODULE, after_large_configs).


after_large_configs() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    Shared = [ binary:copy(<<N:32>>, 25) || N <- lists:seq(1, 300_000) ],
    [ {{Shape, Size}, shortest(fun() -> longest_after(R, Config) end)}
      || {Shape, Size, Config} <- [{shared_binaries, 300_000, Shared},
                                   {shared_binaries, 9000, lists:sublist(Shared, 9000)},
                                   {list, 3_000_000, lists:seq(1, 3_000_000)}] ].


longest_after(R, Config) ->
    ok = ?NIF:register(R, connection, large, self(), self(), Config),
    Removal = time_us(fun() -> ok = ?NIF:unregister(R, connection, large) end),
    lists:max([Removal | [ time_us(fun() -> nudge(R, connection, N) end) || N <- lists:seq(1, 300) ]]).


%% Many configs that are freed together: configs of middle size, and configs whose parts are freed one by one.
calls_after_many_configs_are_short(_Config) -> short(?MODULE, after_many_configs).


after_many_configs() ->
    R = ?NIF:new(64, 2_000_000, 65_535),
    Pid = sleeper(),
    Times = [ {{Shape, Size}, shortest(fun() -> longest_removal(R, Pid, Shape, Size) end)}
              || Shape <- [list, binaries, references, funs], Size <- [20, 100, 1000, 4000] ],
    exit(Pid, kill),
    Times.


longest_removal(R, Pid, Shape, Size) ->
    Ids = lists:seq(1, 200),
    [ begin
          Config = {Id, many(Shape, Size)},
          ok = ?NIF:register(R, connection, Id, Pid, Pid, Config)
      end || Id <- Ids ],
    lists:max([ time_us(fun() -> ok = ?NIF:unregister(R, connection, Id) end) || Id <- Ids ] ++
              [ time_us(fun() -> nudge(R, connection, {nudge, N}) end) || N <- lists:seq(1, 300) ]).


many(binaries, N) -> [ binary:copy(<<I:32>>, 20) || I <- lists:seq(1, N) ];
many(references, N) -> [ atomics:new(1, []) || _ <- lists:seq(1, N) ];
many(Shape, N) -> large(Shape, N).
