%%% Functions that the suites of circuit breakers share.
-module(breaker_support).

-include_lib("stdlib/include/assert.hrl").

-export([fail/2, succeed/2, refused/1]).
-export([blocked_call/1, finish/2]).
-export([await_state/2, spin/1]).
-export([remove_all/0, without_library/3]).

-define(CB,          erlmcp_circuit_breaker).
-define(DEADLINE_MS, 20000).


fail(Breaker, Times) ->
    _ = [ {error, failed} = ?CB:call(Breaker, fun() -> {error, failed} end) || _ <- lists:seq(1, Times) ],
    ok.


succeed(Breaker, Times) ->
    _ = [ {ok, done} = ?CB:call(Breaker, fun() -> {ok, done} end) || _ <- lists:seq(1, Times) ],
    ok.


refused(Breaker) ->
    ?assertEqual({error, circuit_breaker_open}, ?CB:call(Breaker, fun() -> error(ran) end)).


%% A process whose call was let through and runs until `finish'.
blocked_call(Breaker) ->
    Parent = self(),
    Pid = spawn(fun() ->
                        Result = ?CB:call(Breaker,
                                          fun() ->
                                                  Parent ! {self(), runs},
                                                  receive {finish, Result} -> Result end
                                          end,
                                          infinity),
                        Parent ! {self(), {result, Result}}
                end),
    receive {Pid, runs} -> Pid after ?DEADLINE_MS -> exit({not_let_through, Breaker}) end.


finish(Pid, Result) ->
    Pid ! {finish, Result},
    receive {Pid, {result, Returned}} -> Returned after ?DEADLINE_MS -> exit(deadline_passed) end.


await_state(State, Breaker) ->
    test_support:await(fun() -> State =:= ?CB:get_state(Breaker) end, ?DEADLINE_MS).


spin(0) -> ok;
spin(N) -> spin(N - 1).


remove_all() ->
    lists:foreach(fun(Name) -> ok = ?CB:unregister_breaker(Name) end, maps:keys(?CB:get_all_states())).


%% Runs cases in a node with a copy of the application that lacks the native library.
without_library(Suite, Cases, Config) ->
    From = filename:dirname(code:which(erlmcp_nif)),
    Ebin = filename:join([proplists:get_value(priv_dir, Config), "erlmcp_native", "ebin"]),
    ok = filelib:ensure_dir(filename:join(Ebin, "any")),
    [ {ok, _} = file:copy(File, filename:join(Ebin, filename:basename(File)))
      || File <- filelib:wildcard(filename:join(From, "*")), filelib:is_regular(File) ],
    {ok, Peer, _} = test_support:start_peer(Suite, #{}),
    true = peer:call(Peer, code, add_patha, [Ebin]),
    ?assertMatch(#{path := _}, peer:call(Peer, erlmcp_nif, load_error, [])),
    lists:foreach(fun(Case) ->
                          try
                              peer:call(Peer, Suite, Case, [Config], 300_000),
                              peer:call(Peer, ?MODULE, remove_all, [], 60_000)
                          catch
                              Class:Reason:Stacktrace -> erlang:raise(Class, {without_library, Case, Reason}, Stacktrace)
                          end
                  end,
                  Cases),
    peer:stop(Peer).
