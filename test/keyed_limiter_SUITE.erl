%%% Keyed limiters through erlmcp_keyed_limiter.
%%%
%%% The contract: each key has what a token bucket of its own would have, although a bucket is forgotten once it is full
%%% again. There are never more than max_keys buckets, whatever keys come; a key that has a bucket notices nothing of
%%% the others. From several buckets all is taken or nothing. Wrong arguments raise an error and change nothing.
-module(keyed_limiter_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).

-export([each_key_has_a_bucket/1,
         options_and_defaults/1,
         nothing_and_more_than_capacity/1,
         wait_time_is_honoured/1,
         refunds/1,
         all_or_nothing/1,
         limits_change_live/1,
         without_limits/1,
         a_flood_of_keys/1,
         full_buckets_make_room/1,
         wrong_arguments_change_nothing/1,
         a_limiter_is_freed_with_its_last_reference/1,
         sixteen_processes_on_one_key/1]).

%% Called in a peer node
-export([in_use/0]).

-define(M, erlmcp_keyed_limiter).
%% One token an hour, so that refilled tokens do not interfere.
-define(SLOW, 1 / 3600).


suite() ->
    [{timetrap, {minutes, 5}}].


all() ->
    [each_key_has_a_bucket,
     options_and_defaults,
     nothing_and_more_than_capacity,
     wait_time_is_honoured,
     refunds,
     all_or_nothing,
     limits_change_live,
     without_limits,
     a_flood_of_keys,
     full_buckets_make_room,
     wrong_arguments_change_nothing,
     a_limiter_is_freed_with_its_last_reference,
     sixteen_processes_on_one_key].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


slow(Capacity) ->
    ?M:new(#{capacity => Capacity, rate_per_second => ?SLOW}).


keys(Limiter) ->
    #{keys := Keys} = ?M:info(Limiter),
    Keys.


%% Keys are compared by =:=.
each_key_has_a_bucket(_Config) ->
    Limiter = slow(5),
    Keys = [a, "a", <<"a">>, 1, 1.0, {a, 1}, {a, 1.0}, {tool, <<"c">>}, [], #{}, self(), make_ref(), <<1:3>>, fun lists:map/2],
    ?assertEqual([ {ok, 4} || _ <- Keys ], [ ?M:consume(Limiter, Key) || Key <- Keys ]),
    ?assertEqual([ {ok, 1} || _ <- Keys ], [ ?M:consume(Limiter, Key, 3) || Key <- Keys ]),
    ?assertEqual([ {error, rate_limited} || _ <- Keys ], [ ?M:consume(Limiter, Key, 2) || Key <- Keys ]),
    %% A refused request takes nothing.
    ?assertEqual([ {ok, 0} || _ <- Keys ], [ ?M:consume(Limiter, Key, 1) || Key <- Keys ]),
    ?assertEqual(length(Keys), keys(Limiter)),
    ?assertEqual(#{tokens => 0, capacity => 5, rate_per_second => ?SLOW}, ?M:get_state(Limiter, a)),
    %% Looking makes no bucket.
    ?assertEqual(#{tokens => 5, capacity => 5, rate_per_second => ?SLOW}, ?M:get_state(Limiter, unknown)),
    ?assertEqual(length(Keys), keys(Limiter)),
    %% Another limiter has its own.
    ?assertEqual({ok, 4}, ?M:consume(slow(5), a)).


options_and_defaults(_Config) ->
    Default = #{keys => 0, max_keys => 1_000_000, capacity => 1000, rate_per_second => 10000.0},
    ?assertEqual(Default, ?M:info(?M:new(#{}))),
    ?assertEqual(Default, ?M:info(?M:new([]))),
    ?assertEqual(Default#{max_keys => 1, capacity => 7, rate_per_second => 0.5},
                 ?M:info(?M:new([{capacity, 7}, {rate_per_second, 0.5}, {max_keys, 1}]))),
    ?assertEqual(Default#{max_keys => 1 bsl 28}, ?M:info(?M:new(#{max_keys => 1 bsl 28}))),
    [ ?assertError({bad_option, max_keys, Wrong, [_ | _]}, ?M:new(#{max_keys => Wrong}))
      || Wrong <- [0, -1, 1.0, infinity, many, (1 bsl 28) + 1, 1 bsl 70] ],
    [ ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:new(Wrong))
      || Wrong <- [#{capacity => 0},
                   #{rate_per_second => fast},
                   #{capacity => 1 bsl 31, rate_per_second => 1},
                   #{keys => 1}] ],
    [ ?assertError(badarg, ?M:new(Wrong)) || Wrong <- [infinity, 5, {1, 2}] ],
    ok.


nothing_and_more_than_capacity(_Config) ->
    Limiter = slow(5),
    ?assertEqual({ok, 5}, ?M:consume(Limiter, a, 0)),
    [ ?assertEqual({error, exceeds_capacity}, ?M:consume(Limiter, a, N)) || N <- [6, 1 bsl 32, 1 bsl 64, 1 bsl 300] ],
    %% Neither makes a bucket.
    ?assertEqual(0, keys(Limiter)),
    ?assertEqual({ok, 0}, ?M:consume(Limiter, a, 5)),
    ?assertEqual({ok, 0}, ?M:consume(Limiter, a, 0)).


wait_time_is_honoured(_Config) ->
    Limiter = ?M:new(#{capacity => 10, rate_per_second => 50}),
    {ok, 0} = ?M:consume(Limiter, a, 10),
    [ begin
          {error, {rate_limited, WaitMs}} = ?M:consume_or_wait_time(Limiter, a, N),
          ?assert(WaitMs >= 1 andalso WaitMs =< N * 20, WaitMs),
          timer:sleep(WaitMs),
          ?assertMatch({ok, _}, ?M:consume_or_wait_time(Limiter, a, N))
      end || N <- [1, 5] ],
    ok.


refunds(_Config) ->
    Limiter = slow(10),
    Bucket = erlmcp_token_bucket:new(#{capacity => 10, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(c, self(), none),
    ok = erlmcp_token_bucket:set_limits(c, #{capacity => 10, rate_per_second => ?SLOW}),
    %% It had no tokens of its own limits before.
    #{tokens := Tokens} = erlmcp_token_bucket:get_state(c),
    ok = erlmcp_token_bucket:refund(c, 10 - Tokens),
    [ begin
          {ok, 2} = Consume(8),
          ok = Refund(3),
          %% Each acquisition from a full bucket loses a fraction to rounding.
          ?assertEqual({ok, 1}, Consume(4)),
          %% Never more than the capacity.
          ok = Refund(1 bsl 70),
          ?assertEqual({error, exceeds_capacity}, Consume(11)),
          ?assertEqual({ok, 0}, Consume(10)),
          ok = Refund(0),
          ?assertEqual({error, rate_limited}, Consume(1))
      end || {Consume, Refund} <- [{fun(N) -> ?M:consume(Limiter, a, N) end, fun(N) -> ?M:refund(Limiter, a, N) end},
                                   {fun(N) -> erlmcp_token_bucket:consume(Bucket, N) end,
                                    fun(N) -> erlmcp_token_bucket:refund(Bucket, N) end},
                                   {fun(N) -> erlmcp_token_bucket:consume(c, N) end,
                                    fun(N) -> erlmcp_token_bucket:refund(c, N) end}] ],
    %% A key without a bucket has nothing to get back.
    ok = ?M:refund(Limiter, unknown, 5),
    ?assertEqual(1, keys(Limiter)),
    ok = erlmcp_shard_registry:unregister_connection(c),
    ?assertEqual({error, not_found}, erlmcp_token_bucket:refund(c, 1)),
    ?assertEqual({error, not_found}, erlmcp_token_bucket:refund(transport, c, 1)),
    [ ?assertError(badarg, erlmcp_token_bucket:refund(Bucket, Wrong)) || Wrong <- [-1, 1.0, a] ],
    ok.


all_or_nothing(_Config) ->
    Client = slow(5),
    Tool = slow(3),
    Node = erlmcp_token_bucket:new(#{capacity => 100, rate_per_second => ?SLOW}),
    Shares = [{Client, c, 1}, {Tool, {c, search}, 1}, {Node, 10}],
    ?assertEqual(ok, ?M:consume_all(Shares)),
    ?assertEqual(ok, ?M:consume_all(Shares)),
    ?assertEqual(ok, ?M:consume_all(Shares)),
    {error, {Refused, {rate_limited, WaitMs}}} = ?M:consume_all(Shares),
    ?assertEqual({Tool, {c, search}, 1}, Refused),
    ?assert(WaitMs > 0 andalso WaitMs =< 3_600_000),
    %% Nothing was taken by that.
    ?assertMatch(#{tokens := 2}, ?M:get_state(Client, c)),
    ?assertMatch(#{tokens := 70}, erlmcp_token_bucket:get_state(Node)),
    ?assertEqual(ok, ?M:consume_all([])),
    [ ?assertEqual({error, {{Node, N}, exceeds_capacity}}, ?M:consume_all([{Client, c, 2}, {Node, N}]))
      || N <- [101, 1 bsl 64, 1 bsl 200] ],
    ?assertEqual({ok, 0}, ?M:consume(Client, c, 2)),
    Small = ?M:new(#{capacity => 1, rate_per_second => ?SLOW, max_keys => 1}),
    {ok, 0} = ?M:consume(Small, a),
    ?assertEqual({error, {{Small, b, 1}, limiter_full}}, ?M:consume_all([{Node, 1}, {Small, b, 1}])),
    ?assertMatch(#{tokens := 70}, erlmcp_token_bucket:get_state(Node)),
    %% The same bucket may occur more than once.
    ?assertMatch({error, {{Node, 40}, {rate_limited, _}}}, ?M:consume_all([{Node, 40}, {Node, 40}])),
    ?assertEqual(ok, ?M:consume_all(lists:duplicate(16, {Node, 1}))),
    [ ?assertError(badarg, ?M:consume_all(Wrong))
      || Wrong <- [lists:duplicate(17, {Node, 1}),
                   [{Node, 1} | a],
                   a,
                   [{Node}],
                   [{Node, a}],
                   [{Node, 1}, {Client, 1}],
                   [{Node, 1}, {make_ref(), a, 1}],
                   [{Node, -1}],
                   [{Client, binary:copy(<<"k">>, 4096), 1}],
                   [{Client, fun() -> Node end, 1}]] ],
    ?assertMatch(#{tokens := 54}, erlmcp_token_bucket:get_state(Node)).


limits_change_live(_Config) ->
    Limiter = slow(10),
    {ok, 6} = ?M:consume(Limiter, a, 4),
    ok = ?M:set_limits(Limiter, #{capacity => 5}),
    ?assertMatch(#{capacity := 5, rate_per_second := ?SLOW}, ?M:info(Limiter)),
    ?assertMatch(#{tokens := 5, capacity := 5}, ?M:get_state(Limiter, a)),
    ok = ?M:set_limits(Limiter, [{capacity, 20}]),
    ?assertMatch(#{tokens := Tokens} when Tokens =< 6, ?M:get_state(Limiter, a)),
    %% A key without a bucket was full before, and has no more than that at first.
    ?assertMatch(#{tokens := Tokens} when Tokens =< 6, ?M:get_state(Limiter, b)),
    [ ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:set_limits(Limiter, Wrong))
      || Wrong <- [#{capacity => 0}, #{max_keys => 5}, off, default, #{capacity => (1 bsl 32) - 1}] ],
    ?assertMatch(#{capacity := 20, rate_per_second := ?SLOW}, ?M:info(Limiter)).


without_limits(_Config) ->
    Limiter = slow(10),
    {ok, 0} = ?M:consume(Limiter, a, 10),
    ok = ?M:set_limits(Limiter, infinity),
    ?assertEqual({ok, infinity}, ?M:consume(Limiter, a, 1 bsl 40)),
    ?assertEqual({ok, infinity}, ?M:consume(Limiter, b)),
    ?assertMatch(#{capacity := infinity, rate_per_second := infinity, keys := 1}, ?M:info(Limiter)),
    ok = ?M:refund(Limiter, a, 10),
    %% The last limits again, and the tokens of that time.
    ok = ?M:set_limits(Limiter, #{rate_per_second => ?SLOW}),
    ?assertMatch(#{tokens := 0, capacity := 10}, ?M:get_state(Limiter, a)).


%% Whatever keys come, a limiter holds no more than max_keys, and those that it has notice nothing.
a_flood_of_keys(_Config) ->
    Limiter = ?M:new(#{capacity => 5, rate_per_second => ?SLOW, max_keys => 1000}),
    {ok, 4} = ?M:consume(Limiter, mine),
    Results = [ ?M:consume(Limiter, {client, N}) || N <- lists:seq(1, 100_000) ],
    ?assertEqual(999, length([ ok || {ok, 4} <- Results ])),
    ?assertEqual(99_001, length([ full || {error, limiter_full} <- Results ])),
    ?assertMatch(#{keys := 1000, max_keys := 1000}, ?M:info(Limiter)),
    ?assertEqual([{ok, 3}, {ok, 2}, {ok, 1}, {ok, 0}, {error, rate_limited}],
                 [ ?M:consume(Limiter, mine) || _ <- lists:seq(1, 5) ]).


full_buckets_make_room(_Config) ->
    Limiter = ?M:new(#{capacity => 5, rate_per_second => 1.0e6, max_keys => 10}),
    [ begin
          test_support:await(fun() ->
                                     case ?M:consume(Limiter, N) of
                                         {ok, 4} -> true;
                                         {error, limiter_full} -> false
                                     end
                             end),
          ?assert(keys(Limiter) =< 10)
      end || N <- lists:seq(1, 10_000) ],
    ok.


wrong_arguments_change_nothing(_Config) ->
    Limiter = slow(5),
    {ok, 4} = ?M:consume(Limiter, a),
    References = [make_ref(), erlmcp_shard_registry:new(), erlmcp_token_bucket:new(#{}), default, a, <<"a">>],
    [ ?assertError(badarg, ?M:Function(Wrong, a, 1))
      || Function <- [consume, consume_or_wait_time, refund], Wrong <- References ],
    [ ?assertError(badarg, Call(Wrong))
      || Call <- [fun ?M:info/1, fun(L) -> ?M:get_state(L, a) end, fun(L) -> ?M:set_limits(L, infinity) end],
         Wrong <- References ],
    [ ?assertError(badarg, ?M:Function(Limiter, a, Wrong))
      || Function <- [consume, consume_or_wait_time, refund], Wrong <- [-1, 1.0, infinity, a, "1"] ],
    [ ?assertError(badarg, Call(Wrong))
      || Call <- [fun(K) -> ?M:consume(Limiter, K) end,
                  fun(K) -> ?M:refund(Limiter, K, 1) end,
                  fun(K) -> ?M:get_state(Limiter, K) end],
         Wrong <- [binary:copy(<<"k">>, 65_536), fun() -> Limiter end, {k, lists:seq(1, 65_536)}] ],
    ?assertEqual({ok, 3}, ?M:consume(Limiter, a)),
    ?assertEqual(1, keys(Limiter)).


%% A hundred limiters, one after the other, need the memory of a few. One takes some 3 MB.
a_limiter_is_freed_with_its_last_reference(_Config) ->
    ok = test_support:in_peer(?MODULE, in_use, [], #{timeout_ms => 240_000}).


in_use() ->
    use_a_limiter(),
    Before = test_support:resident_bytes(),
    [ use_a_limiter() || _ <- lists:seq(1, 100) ],
    %% Another thread frees them.
    test_support:await(fun() -> test_support:resident_bytes() - Before < 100_000_000 end).


use_a_limiter() ->
    test_support:in_process(fun() ->
                                    Limiter = ?M:new(#{capacity => 5, rate_per_second => ?SLOW}),
                                    [ {ok, 4} = ?M:consume(Limiter, N) || N <- lists:seq(1, 50_000) ],
                                    ?assertEqual(50_000, keys(Limiter))
                            end).


sixteen_processes_on_one_key(_Config) ->
    Limiter = ?M:new(#{capacity => 100_000, rate_per_second => 0.02}),
    Parent = self(),
    Pids = [ spawn_link(fun() -> Parent ! {self(), taken(Limiter, 0)} end) || _ <- lists:seq(1, 16) ],
    Taken = lists:sum([ receive {Pid, N} -> N end || Pid <- Pids ]),
    %% Rounding may lose one. A token is refilled in 50 seconds.
    ?assert(Taken >= 99_999 andalso Taken =< 100_002, Taken).


taken(Limiter, N) ->
    case ?M:consume(Limiter, one) of
        {ok, _} -> taken(Limiter, N + 1);
        {error, rate_limited} -> N
    end.
