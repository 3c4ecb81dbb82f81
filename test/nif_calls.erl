%%% Measures how long calls of the native library hold a normal scheduler, each in a peer node of its own.
%%%
%%% The length of a call is the shortest of several: a busy machine makes many calls long, but not the same one each
%%% time. A measurement that cannot be repeated is done anew as a whole, or judged by processor time.
-module(nif_calls).

-include_lib("stdlib/include/assert.hrl").

-export([in_peer/4, short/2]).
-export([shortest/1, quickest/1, times/1, shortest_times/1, time_us/1, timed_seconds/1]).
-export([sleeper/0, fill/4, nudge/3, pick/1]).

%% Called in a peer node
-export([in_measured/2]).

-import(test_support, [result/1]).

-define(NIF,      erlmcp_nif).
-define(LIMIT_US, 1000).
%% Repetitions of a long call.
-define(REPEATS, 20).


nudge(Registry, NS, Id) ->
    _ = ?NIF:register(Registry, NS, Id, self(), self(), [nudge]),
    _ = ?NIF:unregister(Registry, NS, Id).


sleeper() ->
    Parent = self(),
    spawn(fun() -> _ = monitor(process, Parent), receive {'DOWN', _, _, _, _} -> ok end end).


pick(Pool) ->
    element(rand:uniform(tuple_size(Pool)), Pool).


%% Measures in a node of its own the calls of a function of the module, which returns [{What, Us}].
short(Module, Function) ->
    {Seconds, Calls} = timed_seconds(fun() -> in_peer(?MODULE, in_measured, [Module, Function], []) end),
    [_ | _] = Calls,
    Longest = lists:sublist(lists:reverse(lists:keysort(2, Calls)), 5),
    ct:pal("~b calls measured in ~.1f s, the longest in microseconds:~n~0p",
           [length(Calls), Seconds, Longest]),
    ?assertEqual([], [ Call || {_, Us} = Call <- Longest, Us > ?LIMIT_US ]).


%% No other process of the node preempts the process, and its heap is large enough for most calls to run without a
%% garbage collection.
in_measured(Module, Function) ->
    Parent = self(),
    Pid = spawn_opt(fun() ->
                            ok = scheduler_trace:start(),
                            Parent ! {self(), Module:Function()}
                    end,
                    [link, {priority, max}, {min_heap_size, 1_000_000}]),
    receive {Pid, Calls} -> Calls end.


%% The shortest of several times, up to the first one within the limit.
shortest(Time) -> shortest(Time, ?REPEATS, infinity).


shortest(_Time, 0, Shortest) ->
    Shortest;
shortest(Time, Left, Shortest) ->
    case min(Time(), Shortest) of
        Us when Us =< ?LIMIT_US -> Us;
        Us -> shortest(Time, Left - 1, Us)
    end.


quickest(Call) -> shortest(fun() -> time_us(Call) end).


%% The time on normal schedulers.
time_us(Call) -> scheduler_trace:held_us(Call).


times(Calls) ->
    [ {Name, time_us(fun() -> result(Call) end)} || {Name, Call} <- Calls ].


%% The shortest time of each of several calls, which are repeated together.
shortest_times(Times) -> shortest_times(Times, ?REPEATS, Times()).


shortest_times(Times, Left, Shortest) ->
    case lists:all(fun({_, Us}) -> Us =< ?LIMIT_US end, Shortest) of
        false when Left > 0 ->
            shortest_times(Times,
                           Left - 1,
                           lists:zipwith(fun({Name, A}, {Name, B}) -> {Name, min(A, B)} end,
                                         Shortest,
                                         Times()));
        _ ->
            Shortest
    end.


fill(Registry, NS, Pid, Entries) ->
    %% Not an atom, since atoms do not count as distinct configs.
    [ ok = ?NIF:register(Registry, NS, <<N:32>>, Pid, Pid, #{}) || N <- lists:seq(1, Entries) ],
    ok.


timed_seconds(Fun) ->
    {Us, Result} = timer:tc(Fun),
    {Us / 1_000_000, Result}.


%% The exit of the node fails the case.
in_peer(Module, Function, Arguments, Flags) ->
    test_support:in_peer(Module, Function, Arguments, #{flags => Flags, timeout_ms => 600_000}).
