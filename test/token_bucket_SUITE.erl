%%% Token buckets through erlmcp_token_bucket, and what routes consume from them.
%%%
%%% The contract: in every window of time t at most capacity + rate * t tokens are consumed, by any number of
%%% processes. A wait time suffices and is not a millisecond too long. Limits change while buckets are in use,
%%% and the tokens in them stay. A connection's or transport's own limits are removed with its registration.
%%% Wrong arguments raise an error and change nothing.
%%%
%%% All cases run on the default registry, with the application and without it.
-module(token_bucket_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).

-export([full_at_first_and_never_negative/1,
         defaults_complete_limits/1,
         nothing_and_more_than_capacity/1,
         without_limits/1,
         refilled_at_the_rate/1,
         wait_time_is_honoured/1,
         slow_bucket/1,
         limits_of_a_bucket_change_live/1,
         bucket_lives_as_long_as_its_reference/1,
         bucket_of_an_entry/1,
         namespaces_are_apart/1,
         own_limits_and_default_again/1,
         own_limits_go_with_the_entry/1,
         references_that_are_no_buckets_are_ids/1,
         unknown_ids/1,
         routes_take_from_the_bucket/1,
         shared_limits_change_live/1,
         shared_limits_infinity/1,
         wrong_tokens_change_nothing/1,
         wrong_limits_change_nothing/1,
         wrong_namespaces/1,
         sixteen_processes_on_one_bucket/1,
         sixteen_processes_on_one_connection/1,
         limits_change_under_load/1]).

-define(M,       erlmcp_token_bucket).
-define(DEFAULT, #{capacity => 1000, rate_per_second => 10000}).
%% One token an hour, so that refilled tokens do not interfere.
-define(SLOW,        1 / 3600).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [full_at_first_and_never_negative,
     defaults_complete_limits,
     nothing_and_more_than_capacity,
     without_limits,
     refilled_at_the_rate,
     wait_time_is_honoured,
     slow_bucket,
     limits_of_a_bucket_change_live,
     bucket_lives_as_long_as_its_reference,
     bucket_of_an_entry,
     namespaces_are_apart,
     own_limits_and_default_again,
     own_limits_go_with_the_entry,
     references_that_are_no_buckets_are_ids,
     unknown_ids,
     routes_take_from_the_bucket,
     shared_limits_change_live,
     shared_limits_infinity,
     wrong_tokens_change_nothing,
     wrong_limits_change_nothing,
     wrong_namespaces,
     sixteen_processes_on_one_bucket,
     sixteen_processes_on_one_connection,
     limits_change_under_load].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(_Case, Config) ->
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    [{registry, Registry} | Config].


end_per_testcase(_Case, Config) ->
    ok = gen_server:stop(proplists:get_value(registry, Config)),
    ok = erlmcp_native:set(token_bucket, ?DEFAULT),
    ok = application:unset_env(erlmcp_native, token_bucket),
    test_support:await(fun() -> erlmcp_shard_registry:count() =:= 0 end).


%%% Buckets


full_at_first_and_never_negative(_Config) ->
    Bucket = ?M:new(#{capacity => 5, rate_per_second => ?SLOW}),
    ?assertEqual(#{tokens => 5, capacity => 5, rate_per_second => ?SLOW}, ?M:get_state(Bucket)),
    ?assertEqual({ok, 3}, ?M:consume(Bucket, 2)),
    ?assertEqual({ok, 2}, ?M:consume_or_wait_time(Bucket, 1)),
    ?assertEqual({error, rate_limited}, ?M:consume(Bucket, 3)),
    %% A refused request consumes nothing.
    ?assertEqual({ok, 0}, ?M:consume(Bucket, 2)),
    ?assertEqual({error, rate_limited}, ?M:consume(Bucket, 1)),
    ?assertMatch({error, {rate_limited, Ms}} when Ms > 0, ?M:consume_or_wait_time(Bucket, 1)),
    ?assertMatch(#{tokens := 0}, ?M:get_state(Bucket)).


defaults_complete_limits(_Config) ->
    ?assertMatch(#{tokens := 1000, capacity := 1000, rate_per_second := 10000.0},
                 ?M:get_state(?M:new(#{}))),
    ?assertMatch(#{tokens := 7, capacity := 7, rate_per_second := 10000.0},
                 ?M:get_state(?M:new(#{capacity => 7}))),
    ?assertMatch(#{tokens := 1000, capacity := 1000, rate_per_second := 7.0},
                 ?M:get_state(?M:new(#{rate_per_second => 7}))),
    %% Limits at the bounds.
    _ = [ ?assertMatch(#{tokens := Capacity, capacity := Capacity},
                       ?M:get_state(?M:new(#{capacity => Capacity, rate_per_second => Rate})))
          || {Capacity, Rate} <- [{1, 1 / 3600}, {1, 1.0e9}, {(1 bsl 32) - 1, 1.0e9}, {(1 bsl 32) - 1, 477}] ],
    ok.


nothing_and_more_than_capacity(_Config) ->
    Bucket = ?M:new(#{capacity => 5, rate_per_second => ?SLOW}),
    ?assertEqual({ok, 5}, ?M:consume(Bucket, 0)),
    ?assertEqual({ok, 5}, ?M:consume_or_wait_time(Bucket, 0)),
    _ = [ begin
              ?assertEqual({error, exceeds_capacity}, ?M:consume(Bucket, N)),
              ?assertEqual({error, exceeds_capacity}, ?M:consume_or_wait_time(Bucket, N))
          end || N <- more_than_five() ],
    ?assertEqual({ok, 0}, ?M:consume(Bucket, 5)),
    %% Zero tokens can be consumed even from an empty bucket.
    ?assertEqual({ok, 0}, ?M:consume(Bucket, 0)),
    _ = [ ?assertEqual({error, exceeds_capacity}, ?M:consume(Bucket, N)) || N <- more_than_five() ],
    ok.


more_than_five() ->
    [6, 1000, 1 bsl 32, (1 bsl 63) - 1, 1 bsl 63, (1 bsl 64) - 1, 1 bsl 64, 1 bsl 1000].


without_limits(_Config) ->
    Bucket = ?M:new(infinity),
    Infinite = #{tokens => infinity, capacity => infinity, rate_per_second => infinity},
    ?assertEqual(Infinite, ?M:get_state(Bucket)),
    _ = [ begin
              ?assertEqual({ok, infinity}, ?M:consume(Bucket, N)),
              ?assertEqual({ok, infinity}, ?M:consume_or_wait_time(Bucket, N))
          end || N <- [0, 1 | more_than_five()] ],
    ?assertEqual(Infinite, ?M:get_state(Bucket)).


refilled_at_the_rate(_Config) ->
    Bucket = ?M:new(#{capacity => 1000, rate_per_second => 2000}),
    Full = now_us(),
    {ok, 0} = ?M:consume(Bucket, 1000),
    Emptied = now_us(),
    ok = test_support:sleep_until(Emptied + 100_000),
    Before = now_us(),
    #{tokens := Tokens} = ?M:get_state(Bucket),
    After = now_us(),
    %% One or two tokens are held back for rounding.
    ?assert(Tokens >= min(1000, (Before - Emptied) * 2000 div 1_000_000 - 2), Tokens),
    ?assert(Tokens =< (After - Full) * 2000 div 1_000_000 + 2, Tokens),
    %% The bucket does not overflow.
    ok = test_support:sleep_until(Emptied + 700_000),
    ?assertMatch(#{tokens := 1000}, ?M:get_state(Bucket)),
    ?assertEqual({ok, 999}, ?M:consume(Bucket, 1)).


wait_time_is_honoured(_Config) ->
    lists:foreach(fun({Capacity, Rate, N}) ->
                          test_support:await(fun() -> is_wait_time_honoured(Capacity, Rate, N) end, ?DEADLINE_MS)
                  end,
                  [{1, 100, 1}, {10, 100, 10}, {100, 1000, 37}, {1000, 5000, 1000}, {3, 7.5, 1}, {50, 333.3, 50}]).


%% False if the tokens were there before the wait time was read, because this process had to wait for a
%% processor.
is_wait_time_honoured(Capacity, Rate, N) ->
    Bucket = ?M:new(#{capacity => Capacity, rate_per_second => Rate}),
    Full = now_us(),
    {ok, 0} = ?M:consume(Bucket, Capacity),
    case wait_ms(Bucket, N, Rate, Full) of
        none ->
            false;
        WaitMs ->
            Asked = now_us(),
            ?assert(WaitMs =< ceil(N / Rate * 1000) + 1, {WaitMs, N, Rate}),
            %% Reading the wait time consumes nothing.
            Again = wait_ms(Bucket, N, Rate, Full),
            ?assert(Again =:= none orelse Again =< WaitMs, {Again, WaitMs}),
            ok = test_support:sleep_until(Asked + WaitMs * 500),
            Again =/= none andalso
            wait_ms(Bucket, N, Rate, Full) =/= none andalso
            begin
                ok = test_support:sleep_until(Asked + WaitMs * 1000),
                ?assertMatch({ok, _}, ?M:consume_or_wait_time(Bucket, N)),
                true
            end
    end.


%% The wait time for the tokens of a bucket that was emptied after it was full. `none' if they are there, which
%% they must not be before their time.
wait_ms(Bucket, N, Rate, Full) ->
    case ?M:consume_or_wait_time(Bucket, N) of
        {error, {rate_limited, WaitMs}} when WaitMs > 0 ->
            WaitMs;
        {ok, _} ->
            ?assert(now_us() - Full >= trunc(N / Rate * 1_000_000) - 1_000),
            none
    end.


slow_bucket(_Config) ->
    Bucket = ?M:new(#{capacity => 1, rate_per_second => ?SLOW}),
    {ok, 0} = ?M:consume(Bucket, 1),
    {error, {rate_limited, WaitMs}} = ?M:consume_or_wait_time(Bucket, 1),
    ?assert(WaitMs =< 3_600_000),
    ?assert(WaitMs > 3_590_000).


limits_of_a_bucket_change_live(_Config) ->
    Bucket = ?M:new(#{capacity => 10, rate_per_second => ?SLOW}),
    {ok, 7} = ?M:consume(Bucket, 3),
    %% The tokens in it stay,
    ok = ?M:set_limits(Bucket, #{capacity => 100, rate_per_second => ?SLOW}),
    ?assertEqual(#{tokens => 7, capacity => 100, rate_per_second => ?SLOW}, ?M:get_state(Bucket)),
    %% as far as the capacity allows.
    ok = ?M:set_limits(Bucket, #{capacity => 5, rate_per_second => ?SLOW}),
    ?assertMatch(#{tokens := 5, capacity := 5}, ?M:get_state(Bucket)),
    ok = ?M:set_limits(Bucket, infinity),
    ?assertEqual({ok, infinity}, ?M:consume(Bucket, 1000)),
    ok = ?M:set_limits(Bucket, #{capacity => 5, rate_per_second => 1000}),
    test_support:await_value(5, fun() -> maps:get(tokens, ?M:get_state(Bucket)) end, ?DEADLINE_MS),
    %% A key that is not given keeps its value.
    ok = ?M:set_limits(Bucket, #{rate_per_second => 1000}),
    ?assertMatch(#{capacity := 5, rate_per_second := 1000.0}, ?M:get_state(Bucket)),
    %% Buckets are independent.
    ?assertMatch(#{capacity := 1000, rate_per_second := 10000.0}, ?M:get_state(?M:new(#{}))).


bucket_lives_as_long_as_its_reference(_Config) ->
    Self = self(),
    {Maker, Monitor} = spawn_monitor(fun() ->
                                             Bucket = ?M:new(#{capacity => 5, rate_per_second => ?SLOW}),
                                             {ok, 4} = ?M:consume(Bucket, 1),
                                             Self ! {bucket, Bucket}
                                     end),
    receive {'DOWN', Monitor, process, Maker, normal} -> ok end,
    receive {bucket, Bucket} -> ?assertEqual({ok, 3}, ?M:consume(Bucket, 1)) end,
    %% Many buckets leave no trace.
    Before = erlang:memory(total),
    _ = [ ?M:new(#{}) || _ <- lists:seq(1, 200_000) ],
    garbage_collect(),
    ?assert(erlang:memory(total) - Before < 10_000_000).


%%% Buckets of entries


bucket_of_an_entry(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    _ = [ begin
              ?assertMatch(#{tokens := 1000, capacity := 1000, rate_per_second := 10000.0},
                           ?M:get_state(NS, Id)),
              ?assertEqual({ok, 400}, ?M:consume(NS, Id, 600)),
              ?assertMatch({error, {rate_limited, Ms}} when Ms > 0 andalso Ms =< 60,
                           ?M:consume_or_wait_time(NS, Id, 1000)),
              ?assertEqual({error, exceeds_capacity}, ?M:consume(NS, Id, 1001)),
              ?assertEqual({error, exceeds_capacity}, ?M:consume_or_wait_time(NS, Id, 1001))
          end || {NS, Id} <- [{connection, c}, {transport, t}] ],
    %% An id alone is that of a connection.
    ok = ?M:set_limits(c, #{capacity => 10, rate_per_second => ?SLOW}),
    ?assertEqual({ok, 8}, ?M:consume(c, 2)),
    ?assertEqual({ok, 7}, ?M:consume_or_wait_time(c, 1)),
    ?assertEqual({ok, 6}, ?M:consume(connection, c, 1)),
    ?assertEqual({ok, 5}, ?M:consume_or_wait_time(connection, c, 1)),
    ?assertEqual(?M:get_state(connection, c), ?M:get_state(c)),
    ?assertEqual(#{tokens => 5, capacity => 10, rate_per_second => ?SLOW}, ?M:get_state(c)),
    ok = ?M:set_limits(connection, c, #{capacity => 3, rate_per_second => ?SLOW}),
    ?assertMatch(#{tokens := 3}, ?M:get_state(c)),
    ok = erlmcp_shard_registry:unregister_connection(c).


%% The same id is a connection, a transport and a server. The server has no bucket.
namespaces_are_apart(_Config) ->
    ok = erlmcp_shard_registry:register_connection(x, self(), #{}),
    ok = erlmcp_registry:register_transport(x, self(), #{}),
    ok = erlmcp_registry:register_server(x, self(), #{}),
    ok = ?M:set_limits(connection, x, #{capacity => 2, rate_per_second => ?SLOW}),
    ok = ?M:set_limits(transport, x, #{capacity => 4, rate_per_second => ?SLOW}),
    {ok, 1} = ?M:consume(connection, x, 1),
    {ok, 1} = ?M:consume(transport, x, 3),
    ?assertMatch(#{tokens := 1, capacity := 2}, ?M:get_state(connection, x)),
    ?assertMatch(#{tokens := 1, capacity := 4}, ?M:get_state(transport, x)),
    ok = ?M:set_limits(transport, x, default),
    ?assertMatch(#{tokens := 1, capacity := 2}, ?M:get_state(x)),
    ok = erlmcp_shard_registry:unregister_connection(x),
    ?assertEqual({error, not_found}, ?M:get_state(x)),
    ?assertMatch(#{capacity := 1000}, ?M:get_state(transport, x)).


own_limits_and_default_again(_Config) ->
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, self(), #{}) || Id <- [own, other] ],
    ok = ?M:set_limits(own, #{capacity => 3, rate_per_second => ?SLOW}),
    ?assertEqual(#{tokens => 3, capacity => 3, rate_per_second => ?SLOW}, ?M:get_state(own)),
    ?assertMatch(#{tokens := 1000, capacity := 1000}, ?M:get_state(other)),
    {ok, 1} = ?M:consume(own, 2),
    %% Tokens stay when an entry's own limits change or are removed.
    ok = ?M:set_limits(own, #{capacity => 50, rate_per_second => ?SLOW}),
    ?assertMatch(#{tokens := 1, capacity := 50}, ?M:get_state(own)),
    ok = erlmcp_native:set(token_bucket, #{capacity => 20, rate_per_second => ?SLOW}),
    %% The configuration does not change an entry's own limits.
    ?assertMatch(#{tokens := 1, capacity := 50}, ?M:get_state(own)),
    ok = ?M:set_limits(own, default),
    ?assertEqual(#{tokens => 1, capacity => 20, rate_per_second => ?SLOW}, ?M:get_state(own)),
    %% Doing it again changes nothing.
    ok = ?M:set_limits(own, default),
    ?assertMatch(#{tokens := 1}, ?M:get_state(own)),
    %% From then on the bucket follows the configuration.
    ok = erlmcp_native:set(token_bucket, #{capacity => 30, rate_per_second => ?SLOW}),
    ?assertMatch(#{tokens := 1, capacity := 30}, ?M:get_state(own)),
    %% Without limits.
    ok = ?M:set_limits(own, infinity),
    ?assertEqual(#{tokens => infinity, capacity => infinity, rate_per_second => infinity}, ?M:get_state(own)),
    ?assertEqual({ok, infinity}, ?M:consume(own, 1_000_000)),
    _ = [ ok = erlmcp_shard_registry:unregister_connection(Id) || Id <- [own, other] ],
    ok.


%% The next connection of that id starts with a full bucket and the limits of the configuration.
own_limits_go_with_the_entry(_Config) ->
    Strict = #{capacity => 2, rate_per_second => ?SLOW},
    Ends = [{connection, fun(_Pid) -> erlmcp_shard_registry:unregister_connection(x) end},
            {connection, fun(Pid) -> exit(Pid, kill) end},
            {transport, fun(_Pid) -> erlmcp_registry:unregister_transport(x) end},
            {transport, fun(Pid) -> exit(Pid, kill) end}],
    lists:foreach(fun({NS, End}) ->
                          Pid = process(),
                          ok = register(NS, x, Pid),
                          ok = ?M:set_limits(NS, x, Strict),
                          {ok, 0} = ?M:consume(NS, x, 2),
                          _ = End(Pid),
                          test_support:await(fun() -> ?M:get_state(NS, x) =:= {error, not_found} end),
                          ok = register(NS, x, self()),
                          ?assertMatch(#{tokens := 1000, capacity := 1000, rate_per_second := 10000.0},
                                       ?M:get_state(NS, x)),
                          ?assertEqual({ok, 0}, ?M:consume(NS, x, 1000)),
                          _ = erlmcp_registry:unregister_transport(x),
                          ok = erlmcp_shard_registry:unregister_connection(x)
                  end,
                  Ends).


references_that_are_no_buckets_are_ids(_Config) ->
    References = [make_ref(),
                  atomics:new(1, []),
                  erlmcp_shard_registry:new(),
                  erlang:alias(),
                  ets:whereis(code)],
    _ = [ begin
              ?assertEqual({error, not_found}, ?M:consume(Ref, 1)),
              ?assertEqual({error, not_found}, ?M:consume_or_wait_time(Ref, 1)),
              ?assertEqual({error, not_found}, ?M:get_state(Ref)),
              ?assertEqual({error, not_found}, ?M:set_limits(Ref, ?DEFAULT)),
              ?assertEqual({error, not_found}, ?M:set_limits(Ref, default)),
              ok = erlmcp_shard_registry:register_connection(Ref, self(), #{}),
              ok = ?M:set_limits(Ref, #{capacity => 3, rate_per_second => ?SLOW}),
              ?assertEqual({ok, 2}, ?M:consume(Ref, 1)),
              ?assertEqual({ok, 1}, ?M:consume_or_wait_time(Ref, 1)),
              ?assertMatch(#{tokens := 1}, ?M:get_state(Ref)),
              ok = erlmcp_shard_registry:unregister_connection(Ref)
          end || Ref <- References ],
    %% A reference to a bucket is not an id, even if a connection is registered under it.
    Bucket = ?M:new(#{capacity => 5, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(Bucket, self(), #{}),
    ?assertEqual({ok, 4}, ?M:consume(Bucket, 1)),
    ?assertMatch(#{tokens := 1000}, ?M:get_state(connection, Bucket)),
    ok = erlmcp_shard_registry:unregister_connection(Bucket).


unknown_ids(_Config) ->
    ok = erlmcp_registry:register_server(s, self(), #{}),
    _ = [ begin
              ?assertEqual({error, not_found}, ?M:consume(Id, 1)),
              ?assertEqual({error, not_found}, ?M:consume(Id, 0)),
              ?assertEqual({error, not_found}, ?M:consume_or_wait_time(Id, 1)),
              ?assertEqual({error, not_found}, ?M:get_state(Id)),
              ?assertEqual({error, not_found}, ?M:set_limits(Id, infinity)),
              [ begin
                    ?assertEqual({error, not_found}, ?M:consume(NS, Id, 1)),
                    ?assertEqual({error, not_found}, ?M:consume_or_wait_time(NS, Id, 1)),
                    ?assertEqual({error, not_found}, ?M:get_state(NS, Id)),
                    ?assertEqual({error, not_found}, ?M:set_limits(NS, Id, ?DEFAULT)),
                    ?assertEqual({error, not_found}, ?M:set_limits(NS, Id, default))
                end || NS <- [connection, transport] ]
          end || Id <- [s, unknown, <<"unknown">>, {a, 1}, infinity, default, 1.0] ],
    ok.


%%% Routes


%% A message to a connection consumes one of its own tokens; one to a server consumes one of the transport's.
routes_take_from_the_bucket(_Config) ->
    Limits = #{capacity => 3, rate_per_second => ?SLOW},
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = ?M:set_limits(c, Limits),
    ?assertEqual([ok, ok, ok, {error, rate_limited}, {error, rate_limited}],
                 [ erlmcp_shard_manager:route_message(c, {n, N}) || N <- lists:seq(1, 5) ]),
    ?assertEqual([{n, 1}, {n, 2}, {n, 3}], test_support:flush()),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    ok = ?M:set_limits(transport, t, Limits),
    ?assertEqual([ok, ok, ok, {error, rate_limited}],
                 [ erlmcp_registry:route_to_server(s, t, N) || N <- lists:seq(1, 4) ]),
    ?assertEqual([ {mcp_message, t, N} || N <- lists:seq(1, 3) ], test_support:flush()),
    %% Answers consume nothing, because requests already limit them.
    ?assertEqual([ ok || _ <- lists:seq(1, 20) ],
                 [ erlmcp_registry:route_to_transport(t, s, N) || N <- lists:seq(1, 20) ]),
    %% Tokens consumed by hand are missing for routes.
    ok = ?M:set_limits(c, default),
    ok = ?M:set_limits(c, #{capacity => 100, rate_per_second => ?SLOW}),
    #{tokens := Tokens} = ?M:get_state(c),
    {ok, 0} = ?M:consume(c, Tokens),
    ?assertEqual({error, rate_limited}, erlmcp_shard_manager:route_message(c, x)),
    _ = test_support:flush(),
    ok = erlmcp_shard_registry:unregister_connection(c).


%%% The limits of the configuration


shared_limits_change_live(_Config) ->
    Ids = lists:seq(1, 200),
    _ = [ ok = erlmcp_shard_registry:register_connection(Id, self(), #{}) || Id <- Ids ],
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 10, rate_per_second => ?SLOW}),
    ?assertEqual({ok, #{capacity => 10, rate_per_second => ?SLOW}},
                 application:get_env(erlmcp_native, token_bucket)),
    Expected = #{tokens => 10, capacity => 10, rate_per_second => ?SLOW},
    _ = [ ?assertEqual(Expected, ?M:get_state(Id)) || Id <- Ids ],
    ?assertEqual(Expected, ?M:get_state(transport, t)),
    %% A later registration has the same limits.
    ok = erlmcp_shard_registry:register_connection(later, self(), #{}),
    ?assertEqual(Expected, ?M:get_state(later)),
    _ = [ ?assertEqual({ok, 10 - Id rem 10}, ?M:consume(Id, Id rem 10)) || Id <- Ids ],
    ok = erlmcp_native:set(token_bucket, #{capacity => 5, rate_per_second => ?SLOW}),
    _ = [ ?assertEqual({Id, min(5, 10 - Id rem 10)}, {Id, maps:get(tokens, ?M:get_state(Id))}) || Id <- Ids ],
    %% Wrong limits change nothing.
    _ = [ begin
              ?assertMatch({error, {bad_option, token_bucket, Wrong, [_ | _]}},
                           erlmcp_native:set(token_bucket, Wrong)),
              ?assertEqual({ok, #{capacity => 5, rate_per_second => ?SLOW}},
                           application:get_env(erlmcp_native, token_bucket)),
              ?assertMatch(#{capacity := 5}, ?M:get_state(later))
          end || Wrong <- wrong_limits() ],
    %% That still holds after very many changes.
    ok = change_shared(1000),
    _ = [ ?assertEqual({Id, min(5, 10 - Id rem 10)}, {Id, maps:get(tokens, ?M:get_state(Id))}) || Id <- Ids ],
    %% A new registration starts with a full bucket.
    ok = erlmcp_shard_registry:register_connection(last, self(), #{}),
    ok = erlmcp_registry:register_transport(last, self(), #{}),
    ?assertMatch(#{tokens := 5, capacity := 5}, ?M:get_state(last)),
    ?assertMatch(#{tokens := 5, capacity := 5}, ?M:get_state(transport, last)),
    %% A connection that had its own limits and holds two tokens keeps these two.
    ok = ?M:set_limits(last, #{capacity => 2, rate_per_second => ?SLOW}),
    ok = ?M:set_limits(last, default),
    ?assertMatch(#{tokens := 2, capacity := 5}, ?M:get_state(last)),
    _ = [ ok = erlmcp_shard_registry:unregister_connection(Id) || Id <- [last, later | Ids] ],
    ok.


change_shared(Times) ->
    lists:foreach(fun(N) ->
                          Limits = #{capacity => 5 + N rem 2, rate_per_second => ?SLOW},
                          ok = erlmcp_native:set(token_bucket, Limits)
                  end,
                  lists:seq(Times, 0, -1)).


shared_limits_infinity(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_native:set(token_bucket, infinity),
    ?assertEqual(#{tokens => infinity, capacity => infinity, rate_per_second => infinity}, ?M:get_state(c)),
    ?assertEqual([], [ E || E <- [ erlmcp_shard_manager:route_message(c, x) || _ <- lists:seq(1, 5000) ], E =/= ok ]),
    ?assertEqual(5000, length(test_support:flush())),
    %% A connection can have limits nevertheless.
    ok = ?M:set_limits(c, #{capacity => 1, rate_per_second => ?SLOW}),
    ?assertEqual([ok, {error, rate_limited}], [ erlmcp_shard_manager:route_message(c, x) || _ <- [1, 2] ]),
    [x] = test_support:flush(),
    ok = erlmcp_native:set(token_bucket, ?DEFAULT),
    ?assertEqual({error, rate_limited}, erlmcp_shard_manager:route_message(c, x)),
    ok = erlmcp_shard_registry:unregister_connection(c).


%%% Wrong arguments


wrong_tokens_change_nothing(_Config) ->
    Limits = #{capacity => 5, rate_per_second => ?SLOW},
    Bucket = ?M:new(Limits),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_registry:register_transport(t, self(), #{}),
    ok = ?M:set_limits(c, Limits),
    ok = ?M:set_limits(transport, t, Limits),
    _ = [ begin
              ?assertError(badarg, ?M:F(Of, Wrong)),
              ?assertError(badarg, ?M:F(connection, c, Wrong)),
              ?assertError(badarg, ?M:F(transport, t, Wrong))
          end || F <- [consume, consume_or_wait_time],
                 Of <- [Bucket, c, unknown],
                 Wrong <- [-1, -(1 bsl 64), -(1 bsl 63), 1.0, 0.0, one, "1", <<1>>, [], {1}, #{}, self(), infinity] ],
    _ = [ ?assertMatch(#{tokens := 5}, State)
          || State <- [?M:get_state(Bucket), ?M:get_state(c), ?M:get_state(transport, t)] ],
    %% Ids that are too long to be registered.
    Long = binary:copy(<<0>>, 70_000),
    _ = [ ?assertError(badarg, Call())
          || Call <- [fun() -> ?M:consume(Long, 1) end,
                      fun() -> ?M:consume_or_wait_time(Long, 1) end,
                      fun() -> ?M:get_state(Long) end,
                      fun() -> ?M:set_limits(Long, infinity) end,
                      fun() -> ?M:consume(transport, Long, 1) end] ],
    ok = erlmcp_shard_registry:unregister_connection(c).


wrong_limits_change_nothing(_Config) ->
    Limits = #{capacity => 5, rate_per_second => ?SLOW},
    Bucket = ?M:new(Limits),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = ?M:set_limits(c, Limits),
    _ = [ begin
              ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:new(Wrong)),
              ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:set_limits(Bucket, Wrong)),
              ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:set_limits(c, Wrong)),
              ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:set_limits(connection, c, Wrong)),
              ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:set_limits(transport, unknown, Wrong))
          end || Wrong <- wrong_limits() ],
    ?assertError({bad_option, token_bucket, default, [_ | _]}, ?M:new(default)),
    ?assertError({bad_option, token_bucket, default, [_ | _]}, ?M:set_limits(Bucket, default)),
    Expected = #{tokens => 5, capacity => 5, rate_per_second => ?SLOW},
    ?assertEqual(Expected, ?M:get_state(Bucket)),
    ?assertEqual(Expected, ?M:get_state(c)),
    ok = erlmcp_shard_registry:unregister_connection(c).


wrong_limits() ->
    [ #{capacity => Wrong} || Wrong <- [0, -1, 1.0, 1 bsl 32, 1 bsl 100, many, infinity, "5", undefined] ] ++
    [ #{rate_per_second => Wrong}
      || Wrong <- [0, 0.0, -1, -0.5, 1 / 3601, 1.0e9 + 1, 1 bsl 100, 1.0e300, 1 bsl 5000, fast, infinity, <<"9">>] ] ++
    %% The first two would take months to fill.
    [#{capacity => (1 bsl 32) - 1, rate_per_second => 1 / 3600},
     #{capacity => (1 bsl 32) - 1, rate_per_second => 476},
     #{capacity => 5, rate => 5},
     #{capacity => 5, rate_per_second => 5, burst => 1},
     #{"capacity" => 5},
     unlimited,
     off,
     undefined,
     5,
     {5, 5.0},
     [{capacity, 0}],
     "infinity",
     self()].


wrong_namespaces(_Config) ->
    ok = erlmcp_registry:register_server(s, self(), #{}),
    _ = [ begin
              ?assertError(_, ?M:consume(NS, s, 1)),
              ?assertError(_, ?M:consume_or_wait_time(NS, s, 1)),
              ?assertError(_, ?M:get_state(NS, s)),
              ?assertError(_, ?M:set_limits(NS, s, infinity)),
              ?assertError(_, ?M:set_limits(NS, s, default))
          end || NS <- [server, connections, <<"connection">>, 1, self()] ],
    ok.


%%% Many processes


sixteen_processes_on_one_bucket(_Config) ->
    never_exceeded(fun(Limits) ->
                           Bucket = ?M:new(Limits),
                           fun(N) -> ?M:consume(Bucket, N) end
                   end).


sixteen_processes_on_one_connection(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    never_exceeded(fun(Limits) ->
                           %% A full bucket in each trial.
                           ok = erlmcp_shard_registry:unregister_connection(c),
                           ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
                           ok = ?M:set_limits(c, infinity),
                           ok = ?M:set_limits(c, Limits),
                           fun(N) -> ?M:consume(c, N) end
                   end),
    ok = erlmcp_shard_registry:unregister_connection(c).


%% In each of 100 trials, compares the tokens consumed by all processes with the time that passed, by the clock
%% of the operating system, from before the first call to after the last one.
never_exceeded(Make) ->
    Trials = [ begin
                   {Capacity, Rate, N} = lists:nth(Trial rem 4 + 1,
                                                   [{100, 100_000, 1}, {1, 500_000, 1}, {1000, 1.0e6, 3}, {10, 5000, 2}]),
                   Take = Make(#{capacity => Capacity, rate_per_second => Rate}),
                   {Taken, Refused, Schedulers, Us} = trial(Take, N, 16, 5000),
                   Allowed = Capacity + Rate * Us / 1_000_000,
                   ?assert(Taken =< Allowed, {Trial, Taken, Allowed}),
                   %% At least the tokens that were there at first are consumed.
                   ?assert(Taken >= Capacity - N, {Trial, Taken}),
                   {Refused > 0, Schedulers, Taken / Allowed}
               end || Trial <- lists:seq(1, 100) ],
    {Refusals, Schedulers, Shares} = lists:unzip3(Trials),
    ct:log("share of what was allowed: ~p", [lists:sort(Shares)]),
    %% The processes did contend: nearly every trial saw a refusal, and most saw tokens go to processes on
    %% different schedulers.
    ?assert(length([ x || true <- Refusals ]) > 90),
    erlang:system_info(schedulers_online) =:= 1 orelse
    ?assert(length([ x || Number <- Schedulers, Number > 1 ]) > 50, Schedulers).


trial(Take, N, Processes, Us) ->
    Parent = self(),
    Takers = [ spawn_link(fun() ->
                                  receive {go, Until} -> Parent ! {self(), take_until(Take, N, Until, 0, 0, [])} end
                          end) || _ <- lists:seq(1, Processes) ],
    Start = os:perf_counter(microsecond),
    _ = [ Pid ! {go, Start + Us} || Pid <- Takers ],
    Results = [ receive {Pid, Result} -> Result end || Pid <- Takers ],
    End = os:perf_counter(microsecond),
    {Taken, Refused, Schedulers} = lists:unzip3(Results),
    {lists:sum(Taken), lists:sum(Refused), length(lists:usort(lists:append(Schedulers))), End - Start}.


%% Continues at least until one refusal. Then the initial tokens have been consumed, however late a process ran.
take_until(Take, N, Until, Taken, Refused, Schedulers) ->
    case Refused > 0 andalso os:perf_counter(microsecond) >= Until of
        true ->
            {Taken, Refused, Schedulers};
        false ->
            case Take(N) of
                {ok, _} ->
                    Here = erlang:system_info(scheduler_id),
                    take_until(Take, N, Until, Taken + N, Refused, lists:umerge([Here], Schedulers));
                {error, rate_limited} ->
                    take_until(Take, N, Until, Taken, Refused + 1, Schedulers)
            end
    end.


%% Whichever limits are in force, at most what the largest of them allow is consumed, and no process is refused
%% for good.
limits_change_under_load(_Config) ->
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    ok = erlmcp_native:set(token_bucket, #{capacity => 10, rate_per_second => 50_000}),
    Changes = counters:new(1, []),
    Changer = spawn_opt(fun() -> change_limits(Changes) end, [link, {priority, high}]),
    ok = take_while_limits_change(Changes, 0, 0),
    test_support:stop(Changer),
    ok = erlmcp_shard_registry:unregister_connection(c).


%% Goes on until enough has happened. A busy machine takes longer.
take_while_limits_change(Changes, Taken, Refused) when Taken > 5_000, Refused > 0 ->
    case counters:get(Changes, 1) > 20 of
        true -> ok;
        false -> take_while_limits_change(Changes, 0, Refused)
    end;
take_while_limits_change(Changes, Taken0, Refused0) ->
    {Taken, Refused, _Schedulers, Us} = trial(fun(N) -> ?M:consume(c, N) end, 1, 8, 1_000_000),
    ct:log("~b taken, ~b refused in ~b us, ~b changes so far", [Taken, Refused, Us, counters:get(Changes, 1)]),
    ?assert(Taken =< 100 + 50_000 * Us / 1_000_000, Taken),
    take_while_limits_change(Changes, Taken0 + Taken, Refused0 + Refused).


change_limits(Changes) ->
    N = counters:get(Changes, 1),
    Capacity = lists:nth(N rem 3 + 1, [10, 1, 100]),
    Rate = lists:nth(N rem 2 + 1, [50_000, 20_000]),
    ok = erlmcp_native:set(token_bucket, #{capacity => Capacity, rate_per_second => Rate}),
    ok = counters:add(Changes, 1, 1),
    receive
        stop -> ok
    after
        2 ->
            change_limits(Changes)
    end.


%%% Instruments


register(connection, Id, Pid) -> erlmcp_shard_registry:register_connection(Id, Pid, #{});
register(transport, Id, Pid) -> erlmcp_registry:register_transport(Id, Pid, #{}).


process() ->
    spawn(fun() -> timer:sleep(infinity) end).


now_us() ->
    erlang:monotonic_time(microsecond).
