%%% Changes of the limits of token buckets.
%%%
%%% The contract: a change keeps the limits that it does not name, and the tokens in buckets up to the new
%%% capacity, however many changes there are. A connection that gets its own limits starts with the shared ones.
%%% Concurrent changes of different limits are all kept. Senders that never stop do not delay a change.
-module(token_limits_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).

-export([a_change_keeps_the_other_limit/1,
         own_limits_begin_with_the_shared_ones/1,
         limits_come_back_after_infinity/1,
         all_forms_are_taken/1,
         what_depends_on_the_other_limit_is_checked/1,
         tokens_stay_under_many_changes/1,
         an_exchange_costs_no_token/1,
         concurrent_changes_lose_nothing/1,
         senders_do_not_delay_a_change/1]).

-define(M,    erlmcp_token_bucket).
-define(SLOW, (1 / 3600)).


suite() ->
    [{timetrap, {minutes, 1}}].


all() ->
    [a_change_keeps_the_other_limit,
     own_limits_begin_with_the_shared_ones,
     limits_come_back_after_infinity,
     all_forms_are_taken,
     what_depends_on_the_other_limit_is_checked,
     tokens_stay_under_many_changes,
     an_exchange_costs_no_token,
     concurrent_changes_lose_nothing,
     senders_do_not_delay_a_change].


init_per_suite(Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Config.


end_per_suite(_Config) ->
    application:stop(erlmcp_native).


init_per_testcase(_Case, Config) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 200, rate_per_second => 100}),
    ok = erlmcp_shard_registry:register_connection(c, self(), #{}),
    Config.


end_per_testcase(_Case, _Config) ->
    ok = erlmcp_shard_registry:unregister_connection(c),
    application:unset_env(erlmcp_native, token_bucket),
    ok = erlmcp_native_config:configure().


a_change_keeps_the_other_limit(_Config) ->
    Bucket = ?M:new(#{capacity => 30, rate_per_second => 20}),
    _ = [ begin
              ok = ?M:set_limits(Of, #{capacity => 30, rate_per_second => 20}),
              ok = ?M:set_limits(Of, #{capacity => 60}),
              ?assertEqual({60, 20.0}, limits(Of)),
              ok = ?M:set_limits(Of, #{rate_per_second => 40}),
              ?assertEqual({60, 40.0}, limits(Of)),
              ok = ?M:set_limits(Of, #{}),
              ?assertEqual({60, 40.0}, limits(Of))
          end || Of <- [c, Bucket] ],
    ok.


own_limits_begin_with_the_shared_ones(_Config) ->
    ok = ?M:set_limits(c, #{capacity => 60}),
    ?assertEqual({60, 100.0}, limits(c)),
    %% They are kept from then on.
    ok = erlmcp_native:set(token_bucket, #{rate_per_second => 300}),
    ?assertEqual({60, 100.0}, limits(c)),
    ok = ?M:set_limits(c, default),
    ?assertEqual({200, 300.0}, limits(c)),
    ok = ?M:set_limits(c, #{rate_per_second => 5}),
    ?assertEqual({200, 5.0}, limits(c)).


limits_come_back_after_infinity(_Config) ->
    ok = ?M:set_limits(c, infinity),
    ok = ?M:set_limits(c, #{capacity => 60}),
    ?assertEqual({60, 100.0}, limits(c)),
    ok = ?M:set_limits(c, infinity),
    ?assertEqual({infinity, infinity}, limits(c)),
    ok = ?M:set_limits(c, #{rate_per_second => 7}),
    ?assertEqual({60, 7.0}, limits(c)),
    %% The shared limits were switched off meanwhile.
    ok = ?M:set_limits(c, default),
    ok = erlmcp_native:set(token_bucket, infinity),
    ok = ?M:set_limits(c, #{rate_per_second => 7}),
    ?assertEqual({200, 7.0}, limits(c)),
    Bucket = ?M:new(infinity),
    ok = ?M:set_limits(Bucket, #{rate_per_second => 7}),
    ?assertEqual({1000, 7.0}, limits(Bucket)).


all_forms_are_taken(_Config) ->
    Bucket = ?M:new([{capacity, 3}]),
    ?assertEqual({3, 10000.0}, limits(Bucket)),
    _ = [ begin
              ok = ?M:set_limits(Of, [{capacity, 4}, {rate_per_second, 5}]),
              ?assertEqual({4, 5.0}, limits(Of)),
              ok = ?M:set_limits(Of, [{capacity, 6}]),
              ?assertEqual({6, 5.0}, limits(Of)),
              _ = [ ?assertError({bad_option, token_bucket, Wrong, [_ | _]}, ?M:set_limits(Of, Wrong))
                    || Wrong <- [[capacity], [{capacity, 0}], [{size, 1}], "limits", off, [{capacity, 1} | 2]] ],
              ?assertEqual({6, 5.0}, limits(Of))
          end || Of <- [c, Bucket] ],
    ok.


what_depends_on_the_other_limit_is_checked(_Config) ->
    Bucket = ?M:new(#{}),
    _ = [ begin
              ok = ?M:set_limits(Of, #{capacity => 1_000_000, rate_per_second => 1}),
              ?assertError({bad_option, token_bucket, #{rate_per_second := 0.01}, _},
                           ?M:set_limits(Of, #{rate_per_second => 0.01})),
              ?assertEqual({1_000_000, 1.0}, limits(Of))
          end || Of <- [c, Bucket] ],
    %% The same holds for the first change.
    ok = ?M:set_limits(c, default),
    ?assertError({bad_option, token_bucket, #{capacity := 4_000_000_000}, _},
                 ?M:set_limits(c, #{capacity => 4_000_000_000})),
    ?assertEqual({200, 100.0}, limits(c)).


%% Hourly quotas and a thousand changes, all within the time in which a bucket fills.
tokens_stay_under_many_changes(_Config) ->
    Hourly = fun(N) -> #{capacity => N, rate_per_second => N / 3600} end,
    Bucket = ?M:new(Hourly(1000)),
    ok = erlmcp_native:set(token_bucket, Hourly(1000)),
    ok = erlmcp_shard_registry:register_connection(used, self(), #{}),
    {ok, 600} = ?M:consume(used, 400),
    {ok, 600} = ?M:consume(Bucket, 400),
    ok = erlmcp_shard_registry:register_connection(unused, self(), #{}),
    lists:foreach(fun(N) ->
                          Limits = Hourly(1000 + N * 13 rem 50),
                          ok = erlmcp_native:set(token_bucket, Limits),
                          ok = ?M:set_limits(Bucket, Limits)
                  end,
                  lists:seq(1, 1000)),
    %% A few tokens may have been refilled.
    _ = [ ?assertMatch(#{tokens := Tokens} when Tokens >= Held - 1 andalso Tokens =< Held + 10, ?M:get_state(Of))
          || {Of, Held} <- [{used, 600}, {Bucket, 600}, {unused, 1000}] ],
    _ = [ ok = erlmcp_shard_registry:unregister_connection(Id) || Id <- [used, unused] ],
    ok.


an_exchange_costs_no_token(_Config) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 100, rate_per_second => ?SLOW}),
    ok = erlmcp_shard_registry:register_connection(x, self(), #{}),
    {ok, 60} = ?M:consume(x, 40),
    lists:foreach(fun(N) ->
                          ok = ?M:set_limits(x, #{capacity => 100 + N}),
                          ?assertMatch(#{tokens := 60}, ?M:get_state(x)),
                          ok = ?M:set_limits(x, default),
                          ?assertMatch(#{tokens := 60, capacity := 100}, ?M:get_state(x))
                  end,
                  lists:seq(1, 100)),
    ok = erlmcp_shard_registry:unregister_connection(x).


concurrent_changes_lose_nothing(_Config) ->
    Bucket = ?M:new(#{}),
    Rounds = 2000,
    _ = [ begin
              Change = fun(Key) ->
                               spawn_monitor(fun() ->
                                                     _ = [ ok = ?M:set_limits(Of, #{Key => N}) || N <- lists:seq(1, Rounds) ],
                                                     exit(done)
                                             end)
                       end,
              Setters = [ Change(Key) || Key <- [capacity, rate_per_second] ],
              _ = [ receive
                        {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(done, Reason)
                    end || {Pid, Monitor} <- Setters ],
              ?assertEqual({Rounds, float(Rounds)}, limits(Of))
          end || Of <- [c, Bucket] ],
    ok.


%% Senders that consume tokens all the time never make a change start over.
senders_do_not_delay_a_change(_Config) ->
    ok = erlmcp_native:set(token_bucket, #{capacity => 1 bsl 31, rate_per_second => 1_000_000_000}),
    Senders = [ spawn_link(fun() -> consume_until_stopped(c, 0, 0) end)
                || _ <- lists:seq(1, erlang:system_info(schedulers_online)) ],
    lists:foreach(fun(N) ->
                          ok = ?M:set_limits(c, #{capacity => (1 bsl 31) + N}),
                          ok = ?M:set_limits(c, default),
                          ok = erlmcp_native:set(token_bucket, #{capacity => (1 bsl 31) - N rem 2})
                  end,
                  lists:seq(1, 500)),
    {Taken, Refused} = lists:unzip([ begin
                                         Sender ! {stop, self()},
                                         receive {Sender, Counts} -> Counts end
                                     end || Sender <- Senders ]),
    ct:log("~p taken, ~p refused", [Taken, Refused]),
    ?assertMatch(#{capacity := Capacity} when Capacity >= (1 bsl 31) - 1, ?M:get_state(c)),
    %% The bucket never runs empty.
    ?assertEqual(0, lists:sum(Refused)).


consume_until_stopped(Id, Taken, Refused) ->
    receive
        {stop, From} -> From ! {self(), {Taken, Refused}}
    after
        0 ->
            case ?M:consume(Id, 1) of
                {ok, _} -> consume_until_stopped(Id, Taken + 1, Refused);
                {error, rate_limited} -> consume_until_stopped(Id, Taken, Refused + 1)
            end
    end.


limits(Of) ->
    #{capacity := Capacity, rate_per_second := Rate} = ?M:get_state(Of),
    {Capacity, Rate}.
