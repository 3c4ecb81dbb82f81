%%% Registries from erlmcp_shard_registry:new/0,1: their options and bounds, their independence, and that a
%%% reference in a message keeps a registry.
-module(own_registries_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([init_per_testcase/2, end_per_testcase/2]).
-export([options_and_defaults/1,
         wrong_options/1,
         options_as_lists/1,
         registries_are_independent/1,
         no_registry/1,
         max_entries/1,
         max_entries_counts_all_namespaces/1,
         reference_in_a_message_keeps_it/1]).

-import(test_support, [in_process/1, process/0, stop/1]).
-import(test_terms, [external_reference/1, make_anew/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [options_and_defaults,
     wrong_options,
     options_as_lists,
     registries_are_independent,
     no_registry,
     max_entries,
     max_entries_counts_all_namespaces,
     reference_in_a_message_keeps_it].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


init_per_testcase(Case, Config) ->
    registry_variants:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_variants:end_per_testcase(Case, Config).


%%% Registries


options_and_defaults(_Config) ->
    Defaults = #{shards => 64, max_entries => 2_000_000, max_id_bytes => 65_535},
    ?assertEqual(Defaults, ?M:limits(?M:new())),
    ?assertEqual(Defaults, ?M:limits(?M:new(#{}))),
    [ ?assertEqual(maps:merge(Defaults, Options), ?M:limits(?M:new(Options)))
      || Options <- [ #{shards => 1 bsl N} || N <- lists:seq(0, 10) ] ++
                    [ #{max_entries => N} || N <- [1, 2, 1000, 1 bsl 28] ] ++
                    [ #{max_id_bytes => N} || N <- [1, 100, 1 bsl 24] ] ++
                    [#{shards => 2, max_entries => 3, max_id_bytes => 4}] ],
    ?assertEqual(?M:limits(), ?M:limits(default)).


wrong_options(_Config) ->
    [ ?assertError({bad_option, Key, Value, [_ | _]}, ?M:new(#{Key => Value}))
      || {Key, Values} <- [{shards, [0, -1, 3, 63, 1025, 2048, 1 bsl 64, 64.0, a, <<"64">>, []]},
                           {max_entries, [0, -1, (1 bsl 28) + 1, 1 bsl 70, 1.0, infinity]},
                           {max_id_bytes, [0, -1, (1 bsl 24) + 1, 1.0, infinity, #{}]},
                           {same_pid, [ok]},
                           {unknown, [1]},
                           {<<"shards">>, [64]},
                           {"shards", [64]},
                           {{shards}, [64]}],
         Value <- Values ],
    [ begin
          ?assertError(badarg, ?M:new(Options)),
          Shown = test_support:shown_error(fun() -> ?M:new(Options) end),
          ?assertNotEqual({nomatch, Shown}, {string:find(Shown, "argument 1: not a map, a property list or a keyword list"), Shown})
      end || Options <- [[{shards}], [{shards, 64} | improper], undefined, 64, default, make_ref()] ],
    ?assertError({bad_option, shards, 3, _}, ?M:new([{shards, 3}])).


options_as_lists(_Config) ->
    #{shards := 2, max_entries := 5} = Limits = ?M:limits(?M:new([{shards, 2}, {max_entries, 5}, {shards, 4}])),
    ?assertEqual(Limits, ?M:limits(?M:new(#{shards => 2, max_entries => 5}))),
    ?assertEqual(?M:limits(?M:new()), ?M:limits(?M:new([]))).


registries_are_independent(_Config) ->
    Registries = [default | [ ?M:new(#{shards => 8}) || _ <- lists:seq(1, 20) ]],
    Pid = process(),
    Before = ?M:count(),
    [ ok = ?M:register_connection(R, <<"the same">>, Pid, {nth, Nth})
      || {Nth, R} <- lists:enumerate(Registries) ],
    [ ?assertEqual({ok, {Pid, {nth, Nth}}}, ?M:lookup_connection(R, <<"the same">>))
      || {Nth, R} <- lists:enumerate(Registries) ],
    [ ?assertEqual(1, ?M:count(R)) || R <- tl(Registries) ],
    ?assertEqual(Before + 1, ?M:count()),
    ok = ?M:unregister_connection(lists:nth(3, Registries), <<"the same">>),
    ?assertEqual([1, 0 | lists:duplicate(18, 1)], [ ?M:count(R) || R <- tl(Registries) ]),
    %% All registries notice the exit of the process.
    stop(Pid),
    test_support:await(fun() -> lists:all(fun(R) -> ?M:count(R) =:= 0 end, tl(Registries)) end),
    test_support:await(fun() -> ?M:count() =:= Before end).


no_registry(_Config) ->
    NoRegistries = [make_ref(),
                    atomics:new(1, []),
                    ets:new(t, []),
                    undefined,
                    'Default',
                    1,
                    [],
                    {},
                    <<>>,
                    self(),
                    "default",
                    <<"default">>,
                    external_reference(<<"other@host">>)],
    [ ?assertError(badarg, apply(?M, F, [NoRegistry | Arguments]), {F, NoRegistry})
      || NoRegistry <- NoRegistries,
         {F, Arguments} <- [{limits, []},
                            {register_connection, [id, self(), caps]},
                            {unregister_connection, [id]},
                            {lookup_connection, [id]},
                            {whereis_connection, [id]},
                            {get_shard_id, [id]},
                            {list_connections, [0]},
                            {count, [0]},
                            {stats, [0]},
                            {register_name, [id, self()]},
                            {unregister_name, [id]},
                            {whereis_name, [id]},
                            {send, [id, message]}] ],
    [ ?assertError(badarg, apply(?M, F, [NoRegistry]), {F, NoRegistry})
      || NoRegistry <- NoRegistries, F <- [count, stats], not is_integer(NoRegistry) ].


max_entries(_Config) ->
    R = ?M:new(#{max_entries => 10}),
    Pid = process(),
    Ids = [ <<"bound", N>> || N <- lists:seq(1, 10) ],
    [ ?assertEqual(ok, ?M:register_connection(R, Id, Pid, none)) || Id <- Ids ],
    ?assertEqual({error, registry_full}, ?M:register_connection(R, <<"more">>, Pid, none)),
    ?assertExit(registry_full, ?M:register_name(R, <<"more">>, Pid)),
    ?assertEqual({error, not_found}, ?M:lookup_connection(R, <<"more">>)),
    ?assertEqual(10, ?M:count(R)),
    ?assertEqual({error, registry_full}, ?M:register_or_find_connection(R, <<"more">>, Pid, none)),
    ?assertEqual({error, registry_full}, ?M:replace_connection(R, <<"more">>, Pid, none)),
    %% A replacement needs no room.
    ?assertEqual({found, {Pid, none}}, ?M:register_or_find_connection(R, hd(Ids), self(), none)),
    ?assertEqual({ok, Pid}, ?M:replace_connection(R, hd(Ids), self(), none)),
    ?assertEqual({ok, self()}, ?M:replace_connection(R, hd(Ids), Pid, none)),
    ?assertEqual(10, ?M:count(R)),
    %% `already_registered' takes precedence over `registry_full'.
    ?assertEqual({error, already_registered}, ?M:register_connection(R, hd(Ids), Pid, none)),
    %% An entry can be removed and inserted again any number of times.
    [ begin
          ok = ?M:unregister_connection(R, hd(Ids)),
          ?assertEqual(ok, ?M:register_connection(R, hd(Ids), Pid, none)),
          ?assertEqual({error, registry_full}, ?M:register_connection(R, <<"more">>, Pid, none))
      end || _ <- lists:seq(1, 1000) ],
    %% A process that has exited takes no room.
    ok = ?M:unregister_connection(R, hd(Ids)),
    Ended = process(),
    stop(Ended),
    [ ?assertEqual(ok, ?M:register_connection(R, <<"ended", N>>, Ended, none))
      || N <- lists:seq(1, 20) ],
    ?assertEqual(ok, ?M:register_connection(R, hd(Ids), self(), none)),
    stop(Pid),
    test_support:await(fun() -> ?M:count(R) =:= 1 end),
    [ ?assertEqual(ok, ?M:register_connection(R, Id, self(), none)) || Id <- tl(Ids) ],
    ?assertEqual({error, registry_full}, ?M:register_connection(R, <<"more">>, self(), none)),
    One = ?M:new(#{max_entries => 1}),
    ?assertEqual(ok, ?M:register_connection(One, a, self(), none)),
    ?assertEqual({error, registry_full}, ?M:register_connection(One, b, self(), none)).


max_entries_counts_all_namespaces(_Config) ->
    R = ?M:new(#{max_entries => 3}),
    ok = erlmcp_nif:register(R, server, a, self(), self(), none),
    ok = erlmcp_nif:register(R, transport, a, self(), self(), #{server_id => not_there}),
    ?assertEqual(ok, ?M:register_connection(R, a, self(), none)),
    ?assertEqual({error, registry_full}, ?M:register_connection(R, b, self(), none)),
    ?assertMatch(#{servers := 1, transports := 1, connections := 1}, ?M:stats(R)),
    ok = erlmcp_nif:unregister(R, transport, a),
    ?assertEqual(ok, ?M:register_connection(R, b, self(), none)).


reference_in_a_message_keeps_it(_Config) ->
    Holder = spawn_link(fun() -> receive stop -> ok end end),
    Pid = process(),
    in_process(fun() ->
                       R = ?M:new(),
                       ok = ?M:register_connection(R, <<"kept">>, Pid, none),
                       Holder ! {a, [registry, R]}
               end),
    [ garbage_collect(P) || P <- processes() ],
    ?assertEqual(1, monitors_of(Pid)),
    {messages, [{a, [registry, R]}]} = process_info(Holder, messages),
    ?assertEqual({ok, {Pid, none}}, ?M:lookup_connection(R, <<"kept">>)),
    %% Decoding the reference from the external term format yields the same registry.
    ?assertEqual({ok, {Pid, none}}, ?M:lookup_connection(make_anew(R), <<"kept">>)),
    Holder ! stop,
    stop(Pid).


monitors_of(Pid) ->
    {monitored_by, By} = process_info(Pid, monitored_by),
    length(By).
