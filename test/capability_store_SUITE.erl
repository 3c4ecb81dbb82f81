%%% The capability store: equal terms are kept once and read without a copy.
%%%
%%% The contract: a key exists exactly while a process holds it, whatever happens to holders, callers and the store's process.
%%% All readers of equal terms get one term. The store is bounded, unused terms are removed slowly, and nothing is left of it
%%% when the application has stopped. `fallback_SUITE' shows that it works without the native library.
-module(capability_store_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_testcase/2, end_per_testcase/2]).
-export([readers_get_one_term/1,
         equal_terms_are_kept_once/1,
         keys_are_compared_exactly/1,
         every_kind_of_term/1,
         a_key_exists_while_it_is_held/1,
         a_process_holds_a_key_once/1,
         released_terms_are_used_again/1,
         exits_release/1,
         nothing_is_left_of_a_fun_that_raises/1,
         a_fun_may_call_the_store/1]).
-export([no_more_terms_than_max_terms/1,
         no_more_bytes_than_max_bytes/1,
         no_term_above_a_mebibyte/1,
         no_process_holds_more_than_a_thousand/1,
         shared_parts_are_counted_each_time/1,
         bytes_are_those_of_the_heap/1,
         unused_terms_are_removed_slowly/1,
         a_removed_term_stays_with_its_reader/1]).
-export([one_result_wins/1,
         holds_and_releases_race/1,
         killed_callers_leave_nothing/1,
         killed_process_loses_nothing/1,
         holders_that_exit_meanwhile/1,
         killed_under_load/1,
         suspended_process_stops_no_reader/1]).
-export([stopped_application_leaves_nothing/1,
         killed_supervisors_leave_nothing/1,
         totals_of_the_node/1,
         wrong_arguments/1,
         wrong_bounds/1]).

-import(test_support, [await/1, await/2, await_value/2, await_end/1, in_process/1, kill/1, shown_error/1]).

-define(S,           erlmcp_capability_store).
-define(DEADLINE_MS, 60_000).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [readers_get_one_term,
     equal_terms_are_kept_once,
     keys_are_compared_exactly,
     every_kind_of_term,
     a_key_exists_while_it_is_held,
     a_process_holds_a_key_once,
     released_terms_are_used_again,
     exits_release,
     nothing_is_left_of_a_fun_that_raises,
     a_fun_may_call_the_store,
     no_more_terms_than_max_terms,
     no_more_bytes_than_max_bytes,
     no_term_above_a_mebibyte,
     no_process_holds_more_than_a_thousand,
     shared_parts_are_counted_each_time,
     bytes_are_those_of_the_heap,
     unused_terms_are_removed_slowly,
     a_removed_term_stays_with_its_reader,
     one_result_wins,
     holds_and_releases_race,
     killed_callers_leave_nothing,
     killed_process_loses_nothing,
     holders_that_exit_meanwhile,
     killed_under_load,
     suspended_process_stops_no_reader,
     stopped_application_leaves_nothing,
     killed_supervisors_leave_nothing,
     totals_of_the_node,
     wrong_arguments,
     wrong_bounds].


init_per_testcase(_Case, Config) ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Config.


%% Every case ends with a store that can be stopped without a trace.
end_per_testcase(_Case, _Config) ->
    _ = application:stop(erlmcp_native),
    ok = application:unset_env(erlmcp_native, capability_store),
    case stored() of
        [] -> ok;
        Left -> {fail, {left, length(Left)}}
    end.


%%% Terms and keys


readers_get_one_term(_Config) ->
    Key = {tools, <<"weather">>},
    {ok, Held} = ?S:get_or_create(Key, fun() -> term(1) end),
    ?assertEqual(term(1), Held),
    ?assert(erts_debug:flat_size(term(1)) > 5_000),
    Parent = self(),
    %% A process that copied it would be killed.
    Read = fun() -> Parent ! {self(), ?S:get(Key)} end,
    Readers = [ spawn_opt(Read, [monitor, {max_heap_size, #{size => 3_000, kill => true, error_logger => false}}])
                || _ <- lists:seq(1, 10) ],
    [ receive
          {Pid, {ok, Term}} -> ?assert(erts_debug:same(Term, Held));
          {'DOWN', Monitor, process, Pid, Reason} -> ct:fail(Reason)
      end || {Pid, Monitor} <- Readers ].


equal_terms_are_kept_once(_Config) ->
    {ok, First} = ?S:get_or_create(first, fun() -> term(1) end),
    {ok, Second} = ?S:get_or_create(second, fun() -> term(1) end),
    {ok, Other} = ?S:get_or_create(other, fun() -> term(2) end),
    ?assert(erts_debug:same(First, Second)),
    ?assertEqual(term(2), Other),
    ?assertMatch(#{keys := 3, terms := 2, unused_terms := 0, holders := 1}, ?S:info()),
    ?assertEqual(2, length(stored())),
    %% The term stays for the other key.
    ok = ?S:release(first),
    ?assertEqual({ok, term(1)}, ?S:get(second)),
    ?assertMatch(#{keys := 2, terms := 2, unused_terms := 0}, ?S:info()).


keys_are_compared_exactly(_Config) ->
    Keys = [1, 1.0, <<"1">>, "1", '1', {1}, {1.0}, [1], [1.0], #{1 => 1}, #{1 => 1.0}, <<1:1>>, self(), make_ref()],
    [ {ok, {value, Key}} = ?S:get_or_create(Key, fun() -> {value, Key} end) || Key <- Keys ],
    [ ?assertEqual({ok, {value, Key}}, ?S:get(Key)) || Key <- Keys ],
    ?assertMatch(#{keys := N} when N =:= length(Keys), ?S:info()),
    lists:foldl(fun(Key, Left) ->
                        ok = ?S:release(Key),
                        ?assertEqual({error, not_found}, ?S:get(Key)),
                        [ ?assertEqual({ok, {value, Other}}, ?S:get(Other)) || Other <- Left -- [Key] ],
                        Left -- [Key]
                end,
                Keys,
                Keys).


every_kind_of_term(_Config) ->
    Terms = [a,
             undefined,
             false,
             [],
             {},
             #{},
             0,
             -1.5,
             1 bsl 59,
             -(1 bsl 59),
             1 bsl 2000,
             <<>>,
             <<5:77>>,
             binary:copy(<<"x">>, 100_000),
             self(),
             make_ref(),
             hd(erlang:ports()),
             test_terms:external_pid(<<"other@host">>, 7),
             fun lists:map/2,
             test_terms:fun_with(lists:seq(1, 10)),
             [a | b],
             {error, not_found},
             {ok, term},
             removed,
             maps:from_list([ {N, {N, <<N:32>>}} || N <- lists:seq(1, 1_000) ]),
             lists:foldl(fun(_, T) -> {T} end, {}, lists:seq(1, 20_000))],
    [ begin
          ?assert({ok, Term} =:= ?S:get_or_create({key, N}, fun() -> Term end)),
          ?assert({ok, Term} =:= ?S:get({key, N}))
      end || {N, Term} <- lists:enumerate(Terms) ],
    ?assertMatch(#{terms := N} when N =:= length(Terms), ?S:info()).


%%% Holders


a_key_exists_while_it_is_held(_Config) ->
    ?assertEqual({error, not_found}, ?S:get(key)),
    ?assertEqual({error, not_held}, ?S:release(key)),
    ?assertEqual({ok, one}, ?S:get_or_create(key, fun() -> one end)),
    ?assertEqual({ok, one}, ?S:get_or_create(key, fun() -> two end)),
    Other = holder(key),
    ?assertEqual({error, not_held}, in_process(fun() -> ?S:release(key) end)),
    ok = ?S:release(key),
    ?assertEqual({ok, one}, ?S:get(key)),
    ok = ask(Other, release),
    ?assertEqual({error, not_found}, ?S:get(key)),
    ?assertEqual({ok, two}, ?S:get_or_create(key, fun() -> two end)),
    ?assertEqual({ok, two}, ?S:get(key)).


a_process_holds_a_key_once(_Config) ->
    [ {ok, one} = ?S:get_or_create(key, fun() -> one end) || _ <- [1, 2, 3] ],
    ok = ?S:release(key),
    ?assertEqual({error, not_found}, ?S:get(key)),
    ?assertEqual({error, not_held}, ?S:release(key)),
    ?assertMatch(#{keys := 0, holders := 0}, ?S:info()),
    %% One monitor for a holder, however many keys.
    Monitors = fun() -> element(2, process_info(whereis(?S), monitors)) end,
    [ {ok, _} = ?S:get_or_create(Key, fun() -> one end) || Key <- [a, b] ],
    ?assertEqual([{process, self()}], Monitors()),
    ok = ?S:release(a),
    ?assertEqual([{process, self()}], Monitors()),
    ok = ?S:release(b),
    ?assertEqual([], Monitors()).


released_terms_are_used_again(_Config) ->
    {ok, First} = ?S:get_or_create(key, fun() -> term(1) end),
    ok = ?S:release(key),
    ?assertMatch(#{keys := 0, terms := 1, unused_terms := 1}, ?S:info()),
    {ok, Second} = ?S:get_or_create(another, fun() -> term(1) end),
    ?assert(erts_debug:same(First, Second)),
    ?assertMatch(#{keys := 1, terms := 1, unused_terms := 0}, ?S:info()),
    %% The fun is called again, and may return something else.
    {ok, Third} = ?S:get_or_create(key, fun() -> term(3) end),
    ?assertEqual(term(3), Third).


exits_release(_Config) ->
    Keys = [a, b, c],
    [ begin
          Holders = [ holder(Key) || Key <- Keys ],
          All = holder(a),
          [ {ok, _} = ask(All, {hold, Key}) || Key <- Keys ],
          ?assertMatch(#{keys := 3, holders := 4}, ?S:info()),
          [ End(Pid) || Pid <- Holders ],
          await_value(1, fun() -> maps:get(holders, ?S:info()) end),
          [ ?assertEqual({ok, {value, Key}}, ?S:get(Key)) || Key <- Keys ],
          End(All),
          await_value({0, 0}, fun counts/0),
          [ ?assertEqual({error, not_found}, ?S:get(Key)) || Key <- Keys ]
      end || End <- [fun test_support:kill/1, fun(Pid) -> exit(Pid, shutdown), await_end(Pid) end, fun(Pid) -> ask(Pid, stop) end] ].


nothing_is_left_of_a_fun_that_raises(_Config) ->
    ?assertError(oops, ?S:get_or_create(key, fun() -> error(oops) end)),
    ?assertThrow(oops, ?S:get_or_create(key, fun() -> throw(oops) end)),
    ?assertExit(oops, ?S:get_or_create(key, fun() -> exit(oops) end)),
    ?assertEqual({error, not_found}, ?S:get(key)),
    ?assertMatch(#{keys := 0, holders := 0, terms := 0, bytes := 0}, ?S:info()),
    ?assertEqual({ok, one}, ?S:get_or_create(key, fun() -> one end)).


a_fun_may_call_the_store(_Config) ->
    ?assertEqual({ok, {outer, {ok, inner}}},
                 ?S:get_or_create(outer, fun() -> {outer, ?S:get_or_create(inner, fun() -> inner end)} end)),
    ?assertEqual({ok, inner}, ?S:get(inner)),
    %% The inner call is complete first.
    ?assertEqual({ok, inner},
                 ?S:get_or_create(same,
                                  fun() ->
                                          {ok, inner} = ?S:get_or_create(same, fun() -> inner end),
                                          outer
                                  end)),
    ?assertEqual({ok, outer},
                 ?S:get_or_create(released,
                                  fun() ->
                                          {ok, inner} = ?S:get_or_create(released, fun() -> inner end),
                                          ok = ?S:release(released),
                                          outer
                                  end)),
    %% Two funs that ask for each other's key.
    Parent = self(),
    Ask = fun(Mine, Other) ->
                  spawn_link(fun() ->
                                     Result = ?S:get_or_create(Mine,
                                                               fun() ->
                                                                       Parent ! {self(), runs},
                                                                       receive go -> ok end,
                                                                       {ok, _} = ?S:get_or_create(Other, fun() -> leaf end),
                                                                       Mine
                                                               end),
                                     Parent ! {self(), Result},
                                     receive stop -> ok end
                             end)
          end,
    Pids = [Ask(x, y), Ask(y, x)],
    [ receive {Pid, runs} -> Pid ! go end || Pid <- Pids ],
    [ receive {Pid, {ok, _}} -> ok end || Pid <- Pids ],
    [ Pid ! stop || Pid <- Pids ].


%%% Bounds


no_more_terms_than_max_terms(_Config) ->
    ok = application:set_env(erlmcp_native, capability_store, #{max_terms => 3}),
    [ {ok, N} = ?S:get_or_create(N, fun() -> N end) || N <- [1, 2, 3] ],
    ?assertEqual({error, full}, ?S:get_or_create(4, fun() -> 4 end)),
    ?assertEqual({error, not_found}, ?S:get(4)),
    ?assertMatch(#{terms := 3, max_terms := 3, keys := 3}, ?S:info()),
    %% What is there needs no room.
    ?assertEqual({ok, 1}, ?S:get_or_create(4, fun() -> 1 end)),
    ?assertEqual({ok, 1}, in_process(fun() -> ?S:get_or_create(1, fun() -> 9 end) end)),
    %% An unused term makes room, later.
    ok = ?S:release(2),
    await(fun() -> ?S:get_or_create(5, fun() -> 5 end) =:= {ok, 5} end),
    ?assertEqual([{ok, 1}, {ok, 3}, {ok, 1}, {ok, 5}], [ ?S:get(Key) || Key <- [1, 3, 4, 5] ]).


no_more_bytes_than_max_bytes(_Config) ->
    Bytes = erts_debug:flat_size(term(1)) * 8,
    ok = application:set_env(erlmcp_native, capability_store, [{max_bytes, Bytes * 5 div 2}]),
    {ok, _} = ?S:get_or_create(1, fun() -> term(1) end),
    {ok, _} = ?S:get_or_create(2, fun() -> term(2) end),
    ?assertEqual({error, full}, ?S:get_or_create(3, fun() -> term(3) end)),
    ?assertEqual({ok, small}, ?S:get_or_create(3, fun() -> small end)),
    #{bytes := Used, max_bytes := Most} = ?S:info(),
    ?assert(Used =< Most),
    ok = ?S:release(1),
    await(fun() -> ?S:get_or_create(4, fun() -> term(4) end) =:= {ok, term(4)} end).


no_term_above_a_mebibyte(_Config) ->
    Large = binary:copy(<<0>>, 1 bsl 20),
    [ ?assertEqual({error, term_too_large}, ?S:get_or_create(key, fun() -> Term end))
      || Term <- [Large,
                  [Large],
                  binary:part(Large, 7, 100),
                  begin <<_:56, Bits:801/bits, _/bits>> = Large, Bits end,
                  lists:seq(1, 70_000),
                  list_to_tuple(lists:seq(1, 140_000)),
                  maps:from_list([ {N, N} || N <- lists:seq(1, 40_000) ]),
                  test_terms:fun_with(lists:seq(1, 70_000)),
                  lists:duplicate(10, 1 bsl 1_000_000)] ],
    ?assertMatch(#{keys := 0, terms := 0, bytes := 0}, ?S:info()),
    {ok, _} = ?S:get_or_create(key, fun() -> lists:seq(1, 65_000) end).


no_process_holds_more_than_a_thousand(_Config) ->
    [ {ok, term} = ?S:get_or_create(N, fun() -> term end) || N <- lists:seq(1, 1_000) ],
    ?assertError(system_limit, ?S:get_or_create(1_001, fun() -> term end)),
    ?assertError(system_limit, ?S:get_or_create(1_002, fun() -> another end)),
    ?assertMatch({match, _}, re:run(shown_error(fun() -> ?S:get_or_create(1_001, fun() -> term end) end), "holds 1000 keys already")),
    %% What is refused is not kept.
    ?assertMatch(#{terms := 1, unused_terms := 0}, ?S:info()),
    ?assertEqual({error, not_found}, ?S:get(1_001)),
    ?assertEqual({ok, term}, ?S:get_or_create(1_000, fun() -> other end)),
    ?assertEqual({ok, term}, in_process(fun() -> ?S:get_or_create(1_001, fun() -> term end) end)),
    ok = ?S:release(500),
    ?assertEqual({ok, term}, ?S:get_or_create(1_001, fun() -> term end)),
    ?assertMatch(#{keys := 1_000}, ?S:info()).


%% A term of 40 words that has 2^40 leaves.
shared_parts_are_counted_each_time(_Config) ->
    Shared = lists:foldl(fun(_, T) -> {T, T} end, {}, lists:seq(1, 40)),
    ?assertEqual({error, term_too_large}, ?S:get_or_create(key, fun() -> Shared end)),
    ?assertError(badarg, ?S:get_or_create(Shared, fun() -> term end)).


bytes_are_those_of_the_heap(_Config) ->
    Terms = [term(1),
             lists:seq(1, 1_000),
             list_to_tuple(lists:seq(1, 1_000)),
             [ #{a => N, b => 1.5 * N, c => -N} || N <- lists:seq(1, 100) ],
             maps:from_list([ {N, N} || N <- lists:seq(1, 1_000) ]),
             maps:from_list([ {{N}, [N]} || N <- lists:seq(1, 10_000) ]),
             [ 1 bsl N || N <- lists:seq(60, 500) ],
             [ binary:copy(<<N:256>>) || N <- lists:seq(1, 100) ]],
    [ begin
          {ok, _} = ?S:get_or_create(Number, fun() -> Term end),
          #{bytes := Bytes} = ?S:info(),
          ok = ?S:release(Number),
          Heap = erts_debug:flat_size(Term) * 8,
          Counted = Bytes - Before,
          ?assert(Counted >= Heap * 0.8 andalso Counted =< Heap * 1.5, {Number, Counted, Heap})
      end || {Number, Term} <- lists:enumerate(Terms), #{bytes := Before} <- [?S:info()] ].


%% Five of ten, the first that were released, one in a second at most. A timer is never early.
unused_terms_are_removed_slowly(_Config) ->
    ok = application:set_env(erlmcp_native, capability_store, #{max_terms => 10}),
    [ {ok, N} = ?S:get_or_create(N, fun() -> N end) || N <- lists:seq(1, 10) ],
    Began = erlang:monotonic_time(millisecond),
    [ begin
          ok = ?S:release(N),
          %% The next millisecond.
          timer:sleep(2)
      end || N <- [3, 1, 2, 5, 4, 7, 6, 10, 9, 8] ],
    await(fun() -> lists:sort(stored()) =:= [6, 7, 8, 9, 10] end, ?DEADLINE_MS),
    TookMs = erlang:monotonic_time(millisecond) - Began,
    ?assert(TookMs >= 5_000, TookMs),
    %% Half of the bound stays.
    timer:sleep(2_500),
    ?assertEqual([6, 7, 8, 9, 10], lists:sort(stored())),
    ?assertMatch(#{terms := 5, unused_terms := 5}, ?S:info()).


a_removed_term_stays_with_its_reader(_Config) ->
    ok = application:set_env(erlmcp_native, capability_store, #{max_terms => 1}),
    Reader = holder({tools, 1}, fun() -> term(1) end),
    ok = ask(Reader, release),
    await_value([], fun stored/0),
    ?assertEqual({ok, term(1)}, ask(Reader, last)),
    %% After the VM has given it a copy.
    await(fun() ->
                  {total_heap_size, Words} = process_info(Reader, total_heap_size),
                  Words > erts_debug:flat_size(term(1))
          end),
    ?assertEqual({ok, term(1)}, ask(Reader, last)).


%%% Races


%% Funs run at the same time in several processes, whose results differ. All get one of them.
one_result_wins(_Config) ->
    ok = application:set_env(erlmcp_native, capability_store, #{max_terms => 10_000}),
    one_result_wins(0, 0).


one_result_wins(Rounds, 50) ->
    %% No other result was stored.
    ?assertMatch(#{terms := Rounds}, ?S:info());
one_result_wins(Round, Contended) ->
    Runs = counters:new(1, []),
    Results = at_once(8,
                      fun(N) ->
                              ?S:get_or_create(Round,
                                               fun() ->
                                                       ok = counters:add(Runs, 1, 1),
                                                       erlang:yield(),
                                                       {Round, N}
                                               end)
                      end),
    ?assertMatch([{ok, {Round, _}}], lists:usort(Results)),
    await_value({0, 0}, fun counts/0),
    case counters:get(Runs, 1) of
        1 -> one_result_wins(Round + 1, Contended);
        _ -> one_result_wins(Round + 1, Contended + 1)
    end.


%% Holders come and go on a few keys. A held key has a term all the time, and it is the one that was returned.
holds_and_releases_race(_Config) ->
    Runs = counters:new(1, []),
    Pids = [ spawn_monitor(fun() -> hold_and_release(Runs, N) end) || N <- lists:seq(1, 8) ],
    [ receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(normal, Reason) end || {Pid, Monitor} <- Pids ],
    await_value({0, 0}, fun counts/0),
    ?assertMatch(#{terms := Terms, unused_terms := Terms} when Terms =< 4, ?S:info()).


%% Until keys have ended and begun again a thousand times.
hold_and_release(Runs, N) ->
    case counters:get(Runs, 1) > 1_000 of
        true ->
            ok;
        false ->
            Key = rand:uniform(3),
            Value = {value, rand:uniform(4)},
            {ok, Held} = ?S:get_or_create(Key,
                                          fun() ->
                                                  ok = counters:add(Runs, 1, 1),
                                                  Value
                                          end),
            {ok, Held} = ?S:get(Key),
            {ok, Held} = ?S:get_or_create(Key, fun() -> error(not_held) end),
            ok = ?S:release(Key),
            {error, not_held} = ?S:release(Key),
            hold_and_release(Runs, N)
    end.


%% At any moment of a call.
killed_callers_leave_nothing(_Config) ->
    [ begin
          Pid = spawn(fun() -> create_for_ever(N, 1) end),
          timer:sleep(rand:uniform(4) - 1),
          _ = kill(Pid)
      end || N <- lists:seq(1, 200) ],
    await_value({0, 0}, fun counts/0),
    #{terms := Terms, unused_terms := Unused} = ?S:info(),
    ?assert(Terms > 0),
    ?assertEqual(Terms, Unused),
    ?assertEqual(Terms, length(stored())).


create_for_ever(N, I) ->
    _ = ?S:get_or_create({N, I}, fun() -> term(I rem 20) end),
    create_for_ever(N, I + 1).


killed_process_loses_nothing(_Config) ->
    {ok, Term} = ?S:get_or_create(key, fun() -> term(1) end),
    Other = holder(other),
    Before = ?S:info(),
    killed = kill(whereis(?S)),
    ?assertEqual({ok, Term}, ?S:get(key)),
    ok = await_process(),
    ?assertEqual(Before, ?S:info()),
    {ok, Again} = ?S:get_or_create(key, fun() -> error(held) end),
    ?assert(erts_debug:same(Term, Again)),
    {ok, Equal} = ?S:get_or_create(equal, fun() -> term(1) end),
    ?assert(erts_debug:same(Term, Equal)),
    ok = ?S:release(key),
    ok = ?S:release(equal),
    ?assertEqual({error, not_found}, ?S:get(key)),
    %% Its successor monitors the holders.
    killed = kill(Other),
    await_value({0, 0}, fun counts/0).


holders_that_exit_meanwhile(_Config) ->
    {ok, here} = ?S:get_or_create(here, fun() -> here end),
    [ begin
          Holders = [ holder(Key) || Key <- [a, b, c] ],
          killed = kill(whereis(?S)),
          [ killed = kill(Pid) || Pid <- Holders ],
          await_value({1, 1}, fun counts/0),
          ok = await_process()
      end || _ <- lists:seq(1, 10) ],
    ?assertEqual({ok, here}, ?S:get(here)).


%% Fewer kills than those for which it is given up.
killed_under_load(_Config) ->
    Refused = counters:new(1, []),
    Workers = [ spawn_monitor(fun() -> work(Refused, N) end) || N <- lists:seq(1, 4) ],
    kill_until(fun(Kills) -> Kills >= 10 andalso (Kills >= 30 orelse counters:get(Refused, 1) >= 5) end, 0),
    ?assert(counters:get(Refused, 1) > 0),
    [ Pid ! stop || {Pid, _} <- Workers ],
    [ receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(normal, Reason) end || {Pid, Monitor} <- Workers ],
    await_value({0, 0}, fun counts/0),
    #{terms := Terms, unused_terms := Unused} = ?S:info(),
    ?assertEqual({Terms, Terms}, {Unused, length(stored())}),
    ?assertEqual({ok, new}, ?S:get_or_create(1, fun() -> new end)).


kill_until(IsEnough, Kills) ->
    case IsEnough(Kills) of
        true ->
            await_process();
        false ->
            ok = await_process(),
            timer:sleep(rand:uniform(20)),
            _ = kill(whereis(?S)),
            kill_until(IsEnough, Kills + 1)
    end.


work(Refused, N) ->
    receive
        stop -> ok
    after
        0 ->
            Key = rand:uniform(10),
            case ?S:get_or_create(Key, fun() -> {rand:uniform(20), lists:seq(1, 1_000)} end) of
                {ok, Held} ->
                    %% Held, whatever happens to the process.
                    {ok, Held} = ?S:get(Key),
                    {ok, Held} = ?S:get_or_create(Key, fun() -> error(not_held) end);
                {error, not_running} ->
                    ok = counters:add(Refused, 1, 1)
            end,
            case ?S:release(Key) of
                ok -> ok;
                {error, not_held} -> ok;
                {error, not_running} -> counters:add(Refused, 1, 1)
            end,
            work(Refused, N)
    end.


suspended_process_stops_no_reader(_Config) ->
    {ok, Term} = ?S:get_or_create(key, fun() -> term(1) end),
    ok = sys:suspend(?S),
    ?assertEqual({ok, Term}, in_process(fun() -> ?S:get(key) end)),
    ?assertEqual({error, not_found}, ?S:get(none)),
    ?assertEqual({ok, Term}, ?S:get_or_create(key, fun() -> error(held) end)),
    ?assertMatch(#{keys := 1}, ?S:info()),
    ?assertMatch(#{capability_store := #{keys := 1}}, erlmcp_native:info()),
    ok = sys:resume(?S).


%%% The application


stopped_application_leaves_nothing(_Config) ->
    Holder = holder({tools, 1}, fun() -> term(1) end),
    {ok, Term} = ?S:get_or_create(key, fun() -> term(2) end),
    ok = ?S:release(key),
    ?assertEqual(2, length(stored())),
    ok = application:stop(erlmcp_native),
    ?assertEqual([], stored()),
    ?assertEqual({error, not_found}, ?S:get({tools, 1})),
    ?assertEqual({error, not_running}, ?S:get_or_create(key, fun() -> error(ran) end)),
    ?assertEqual({error, not_running}, ?S:release(key)),
    ?assertMatch(#{keys := 0, terms := 0, bytes := 0, holders := 0, max_terms := 1_000}, ?S:info()),
    %% What was read stays.
    ?assertEqual(term(2), Term),
    ?assertEqual({ok, term(1)}, ask(Holder, last)),
    ok = application:start(erlmcp_native),
    ?assertMatch(#{keys := 0, terms := 0, holders := 0}, ?S:info()),
    ?assertEqual({ok, term(3)}, ?S:get_or_create({tools, 1}, fun() -> term(3) end)).


killed_supervisors_leave_nothing(_Config) ->
    Holder = holder(key),
    %% The store's own: the store goes on.
    killed = kill(whereis(erlmcp_capability_store_sup)),
    ok = await_process(),
    ?assertEqual({ok, {value, key}}, ?S:get(key)),
    killed = kill(whereis(erlmcp_native_sup)),
    await(fun() -> not lists:keymember(erlmcp_native, 1, application:which_applications()) end, ?DEADLINE_MS),
    ?assertEqual([], stored()),
    ?assertEqual({error, not_found}, ?S:get(key)),
    ok = ask(Holder, stop).


totals_of_the_node(_Config) ->
    #{capability_store := Empty} = erlmcp_native:info(),
    ?assertEqual(#{
                   keys => 0,
                   holders => 0,
                   terms => 0,
                   unused_terms => 0,
                   bytes => 0,
                   max_terms => 1_000,
                   max_bytes => 64 bsl 20
                  },
                 Empty),
    {ok, _} = ?S:get_or_create(a, fun() -> [1, 2, 3] end),
    {ok, _} = ?S:get_or_create(b, fun() -> [1, 2, 3] end),
    Holder = holder(c),
    #{capability_store := Now} = erlmcp_native:info(),
    %% Two words for each element of a list, and a tuple of two.
    ?assertMatch(#{keys := 3, holders := 2, terms := 2, unused_terms := 0, bytes := 72}, Now),
    ok = ask(Holder, stop),
    await_value({2, 1}, fun counts/0),
    ?assertMatch(#{terms := 2, unused_terms := 1, bytes := 72}, ?S:info()).


%%% Errors


wrong_arguments(_Config) ->
    [ ?assertError(badarg, ?S:get_or_create(key, Wrong)) || Wrong <- [term, fun(X) -> X end, {?MODULE, all, []}] ],
    ?assertMatch({match, _}, re:run(shown_error(fun() -> ?S:get_or_create(key, term) end), "not a fun without arguments")),
    Large = binary:copy(<<0>>, 70_000),
    ?assertError(badarg, ?S:get_or_create(Large, fun() -> term end)),
    ?assertMatch({match, _},
                 re:run(shown_error(fun() -> ?S:get_or_create(Large, fun() -> term end) end), "a key of more than 65535 bytes")),
    ?assertEqual({error, not_found}, ?S:get(Large)),
    ?assertEqual({error, not_held}, ?S:release(Large)),
    ?assertEqual({error, unknown_request}, gen_server:call(?S, unknown)),
    ok = gen_server:cast(?S, unknown),
    ?S ! unknown,
    ?assertMatch(#{keys := 0, terms := 0, holders := 0}, ?S:info()).


wrong_bounds(_Config) ->
    ok = application:stop(erlmcp_native),
    [ begin
          ok = application:set_env(erlmcp_native, capability_store, Wrong),
          ?assertMatch({error, {{bad_option, capability_store, Wrong, [_ | _]}, _}}, application:start(erlmcp_native))
      end || Wrong <- [off,
                       10,
                       #{max_terms => 0},
                       #{max_terms => 10_001},
                       #{max_bytes => 0},
                       #{max_bytes => (1 bsl 29) + 1},
                       #{max_keys => 1}] ],
    ok = application:set_env(erlmcp_native, capability_store, [{max_terms, 7}]),
    ok = application:start(erlmcp_native),
    ?assertMatch(#{max_terms := 7, max_bytes := 67_108_864}, ?S:info()),
    %% A wrong value in a running system is ignored.
    ok = application:set_env(erlmcp_native, capability_store, #{max_terms => none}),
    ?assertMatch(#{max_terms := 1_000}, ?S:info()).


%%% Instruments


%% About 50 KB, made anew by each call.
term(N) ->
    #{
      version => N,
      tools => [ #{name => <<"tool-", (integer_to_binary(I))/binary>>, arguments => [{<<"a">>, I}, {<<"b">>, N}]}
                 || I <- lists:seq(1, 300) ]
     }.


%% The persistent terms of the store.
stored() ->
    [ Term || {{?S, _, _}, {ok, Term}} <- persistent_term:get() ].


counts() ->
    #{keys := Keys, holders := Holders} = ?S:info(),
    {Keys, Holders}.


await_process() ->
    await(fun() ->
                  try
                      {error, unknown_request} =:= gen_server:call(?S, ping)
                  catch
                      exit:_ -> false
                  end
          end).


%% A process that holds a key, and keeps the term that it has read last. It exits with its parent at the latest.
holder(Key) ->
    holder(Key, fun() -> {value, Key} end).


holder(Key, Fun) ->
    Parent = self(),
    Pid = spawn(fun() ->
                        _ = monitor(process, Parent),
                        Result = ?S:get_or_create(Key, Fun),
                        Parent ! {self(), Result},
                        hold(Key, Result)
                end),
    receive {Pid, {ok, _}} -> Pid end.


hold(Key, Last) ->
    receive
        {From, {hold, Another}} ->
            From ! {self(), ?S:get_or_create(Another, fun() -> {value, Another} end)},
            hold(Key, Last);
        {From, release} ->
            From ! {self(), ?S:release(Key)},
            hold(Key, Last);
        {From, last} ->
            From ! {self(), Last},
            hold(Key, Last);
        {From, stop} ->
            From ! {self(), ok};
        {'DOWN', _, process, _, _} ->
            ok
    end.


ask(Pid, Request) ->
    Pid ! {self(), Request},
    receive {Pid, Reply} -> Reply after ?DEADLINE_MS -> ct:fail({no_reply, Request}) end.


%% Runs the fun in several processes that begin together, and returns their results when all have one.
at_once(Number, Fun) ->
    Parent = self(),
    Pids = [ spawn_link(fun() ->
                                receive go -> Parent ! {self(), Fun(N)} end,
                                receive stop -> ok end
                        end)
             || N <- lists:seq(1, Number) ],
    _ = [ Pid ! go || Pid <- Pids ],
    Results = [ receive {Pid, Result} -> Result end || Pid <- Pids ],
    _ = [ Pid ! stop || Pid <- Pids ],
    Results.
