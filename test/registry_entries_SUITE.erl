%%% The contract of erlmcp_registry: ids, configs, look-ups and lists.
%%%
%%% registry_contract says in which groups the cases run.
-module(registry_entries_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0]).
-export([init_per_group/2, end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-compile([export_all, nowarn_export_all]).

-import(registry_contract, [bound/1, module/1, processes/1, request/2]).


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    registry_contract:groups(#{
                               request =>
                                   [registered_is_found,
                                    config_is_returned_verbatim,
                                    config_that_is_no_map,
                                    ids_are_compared_exactly,
                                    same_id_for_server_and_transport,
                                    taken_id,
                                    taken_id_of_the_same_pid,
                                    unknown_is_not_found,
                                    lists,
                                    unregister_unknown,
                                    update_server_keeps_pid_bindings_and_monitor,
                                    update_unknown_server],
                               module =>
                                   [same_pid_can_be_ok]
                              }).


init_per_group(Group, Config) ->
    registry_contract:init_per_group(Group, Config).


end_per_group(Group, Config) ->
    registry_contract:end_per_group(Group, Config).


init_per_testcase(Case, Config) ->
    registry_contract:init_per_testcase(Case, Config).


end_per_testcase(Case, Config) ->
    registry_contract:end_per_testcase(Case, Config).


%%% Requests


registered_is_found(Config) ->
    [A, B] = processes(2),
    ok = request(Config, {register_server, s, A, #{a => 1}}),
    ok = request(Config, {register_transport, t, B, #{b => 2}}),
    ?assertEqual({ok, {A, #{a => 1}}}, request(Config, {find_server, s})),
    ?assertEqual({ok, {B, #{b => 2}}}, request(Config, {find_transport, t})).


config_is_returned_verbatim(Config) ->
    Table = ets:new(table, []),
    Configs = [#{},
               #{1 => 1.0, nested => #{list => [1, 2 | 3]}},
               #{binary => binary:copy(<<7>>, 5000)},
               #{pid => self(), ref => make_ref(), table => Table, f => fun(X) -> X end},
               #{big => lists:seq(1, 20000)},
               maps:from_list([ {N, N} || N <- lists:seq(1, 100) ])],
    lists:foreach(fun(C) ->
                          ok = request(Config, {register_server, s, self(), C}),
                          ?assertEqual({ok, {self(), C}}, request(Config, {find_server, s})),
                          ?assertEqual([{s, {self(), C}}], request(Config, list_servers)),
                          ok = request(Config, {unregister_server, s})
                  end,
                  Configs).


config_that_is_no_map(Config) ->
    lists:foreach(
      fun(C) ->
              ok = request(Config, {register_server, {s, C}, self(), C}),
              ok = request(Config, {register_transport, {t, C}, self(), C}),
              ?assertEqual({ok, {self(), C}}, request(Config, {find_server, {s, C}})),
              ?assertEqual({ok, {self(), C}}, request(Config, {find_transport, {t, C}})),
              ?assertEqual({error, not_found},
                           request(Config, {get_server_for_transport, {t, C}}))
      end,
      [undefined, [], [{server_id, s}], <<"x">>, 17, {server_id, s}, -0.5]).


ids_are_compared_exactly(Config) ->
    Ids = [1,
           1.0,
           <<"1">>,
           "1",
           '1',
           {1},
           {1.0},
           [1],
           [1.0],
           #{1 => 1},
           #{1.0 => 1},
           <<1:1>>,
           [],
           {},
           #{},
           1 bsl 80,
           self(),
           make_ref(),
           [a | b],
           <<>>,
           <<"1", 0>>],
    lists:foreach(fun({N, Id}) -> ok = request(Config, {register_server, Id, self(), N}) end,
                  lists:enumerate(Ids)),
    lists:foreach(fun({N, Id}) ->
                          ?assertEqual({ok, {self(), N}}, request(Config, {find_server, Id}))
                  end,
                  lists:enumerate(Ids)),
    Expected = maps:from_list([ {Id, {self(), N}} || {N, Id} <- lists:enumerate(Ids) ]),
    ?assertEqual(Expected, maps:from_list(request(Config, list_servers))).


same_id_for_server_and_transport(Config) ->
    [A, B] = processes(2),
    ok = request(Config, {register_server, x, A, #{}}),
    ok = request(Config, {register_transport, x, B, #{server_id => x}}),
    ?assertEqual({ok, {A, #{}}}, request(Config, {find_server, x})),
    ?assertEqual({ok, {B, #{server_id => x}}}, request(Config, {find_transport, x})),
    ok = request(Config, {unregister_transport, x}),
    ?assertEqual({ok, {A, #{}}}, request(Config, {find_server, x})).


taken_id(Config) ->
    [A, B, T] = processes(3),
    ok = request(Config, {register_server, s, A, first}),
    ok = request(Config, {register_server, s2, A, first}),
    ok = request(Config, {register_transport, t, T, #{server_id => s}}),
    ?assertEqual({error, already_registered}, request(Config, {register_server, s, B, second})),
    ?assertEqual({error, already_registered},
                 request(Config, {register_transport, t, B, #{server_id => s2}})),
    ?assertEqual({ok, {A, first}}, request(Config, {find_server, s})),
    ?assertEqual({ok, {T, #{server_id => s}}}, request(Config, {find_transport, t})),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})).


taken_id_of_the_same_pid(Config) ->
    ok = request(Config, {register_server, s, self(), first}),
    ?assertEqual({error, already_registered}, request(Config, {register_server, s, self(), second})),
    ?assertEqual({ok, {self(), first}}, request(Config, {find_server, s})).


unknown_is_not_found(Config) ->
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {find_transport, t})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


lists(Config) ->
    ?assertEqual([], request(Config, list_servers)),
    ?assertEqual([], request(Config, list_transports)),
    Ids = lists:seq(1, 1500),
    _ = [ ok = request(Config, {register_server, {s, N}, self(), N}) || N <- Ids ],
    _ = [ ok = request(Config, {register_transport, {t, N}, self(), N}) || N <- Ids ],
    ?assertEqual([ {{s, N}, {self(), N}} || N <- Ids ], lists:sort(request(Config, list_servers))),
    ?assertEqual([ {{t, N}, {self(), N}} || N <- Ids ], lists:sort(request(Config, list_transports))).


unregister_unknown(Config) ->
    ?assertEqual(ok, request(Config, {unregister_server, s})),
    ?assertEqual(ok, request(Config, {unregister_transport, t})),
    ?assertEqual(ok, request(Config, {unbind_transport, t})).


update_server_keeps_pid_bindings_and_monitor(Config) ->
    [S | _] = bound(Config),
    ?assertEqual(ok, request(Config, {update_server, s, #{new => true}})),
    ?assertEqual({ok, {S, #{new => true}}}, request(Config, {find_server, s})),
    ?assertEqual({ok, s}, request(Config, {get_server_for_transport, t})),
    test_support:kill(S),
    ?assertEqual({error, not_found}, request(Config, {find_server, s})),
    ?assertEqual({error, not_found}, request(Config, {get_server_for_transport, t})).


update_unknown_server(Config) ->
    ?assertEqual({error, not_found}, request(Config, {update_server, s, #{}})).


%%% The module and the process


same_pid_can_be_ok(Config) ->
    Module = module(Config),
    application:set_env(erlmcp_native, same_pid, ok),
    [P] = processes(1),
    ok = Module:register_server(s, P, first),
    ?assertEqual(ok, Module:register_server(s, P, second)),
    ?assertEqual({ok, {P, first}}, Module:find_server(s)),
    ?assertEqual({error, already_registered}, Module:register_server(s, self(), third)),
    %% A value that the setting does not accept counts as the default.
    application:set_env(erlmcp_native, same_pid, true),
    ?assertEqual({error, already_registered}, Module:register_server(s, P, fourth)),
    {ok, Anonymous} = gen_server:start(Module, [], []),
    ?assertEqual(ok, gen_server:call(Anonymous, {register_server, s, P, first})),
    ?assertEqual({error, already_registered}, gen_server:call(Anonymous, {register_server, s, P, second})),
    ok = gen_server:stop(Anonymous).
