%%% Starting where the native library cannot be loaded: it is missing, unreadable, another kind of file, made for
%%% another machine, or of another version than the modules.
%%%
%%% The contract: one warning says why and what to do, and everything that erlmcp uses works in the mode `current'. With
%%% `require_native' neither the application nor the registry starts, and the error says the same. Each case runs in a
%%% node of its own, with a copy of the application.
-module(fallback_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, groups/0, suite/0, init_per_group/2, end_per_group/2]).
-export([works_in_current/1,
         warns_once/1,
         works_without_the_application/1,
         refuses_if_native_is_required/1,
         what_is_native_says_why/1]).
%% Called in the other node
-export([in_current/0, in_warned/0, without_application/0, required/0, native/0, log/2]).

-define(DEADLINE_MS, 5000).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [ {group, Group} || {Group, _, _} <- groups() ].


groups() ->
    Cases = [works_in_current,
             warns_once,
             works_without_the_application,
             refuses_if_native_is_required,
             what_is_native_says_why],
    [ {Group, [], Cases} || Group <- [missing, unreadable, no_library, of_another_machine, of_another_version] ].


init_per_group(Group, Config) ->
    From = filename:dirname(filename:dirname(code:which(erlmcp_nif))),
    Copy = filename:join([proplists:get_value(priv_dir, Config), Group, "erlmcp_native"]),
    Library = filename:join([Copy, "priv", "erlmcp_nif.so"]),
    ok = filelib:ensure_dir(Library),
    ok = filelib:ensure_dir(filename:join([Copy, "ebin", "any"])),
    [ {ok, _} = file:copy(File, filename:join([Copy, "ebin", filename:basename(File)]))
      || File <- filelib:wildcard(filename:join([From, "ebin", "*"])), filelib:is_regular(File) ],
    {ok, Whole} = file:read_file(filename:join([From, "priv", "erlmcp_nif.so"])),
    ok = library(Group, Library, Whole),
    Group =/= of_another_version orelse module_of_another_version(Config, filename:join(Copy, "ebin")),
    [{copy, Copy}, {library, Library} | Config].


library(missing, _Library, _Whole) ->
    ok;
library(unreadable, Library, _Whole) ->
    %% A directory is not readable for root either.
    file:make_dir(Library);
library(no_library, Library, _Whole) ->
    file:write_file(Library, "<html>404 Not Found</html>");
library(of_another_machine, Library, <<Ident:18/binary, _Machine:2/binary, Rest/binary>>) ->
    %% The ELF header names the machine: 8 is MIPS.
    file:write_file(Library, [Ident, <<8, 0>>, Rest]);
library(of_another_version, Library, Whole) ->
    file:write_file(Library, Whole).


module_of_another_version(Config, Ebin) ->
    {ok, Source} = file:read_file(source(proplists:get_value(data_dir, Config), "erlang/erlmcp_nif.erl")),
    [Before, After] = re:split(Source, "(?<=-define\\(VERSION, \")[^\"]+"),
    Changed = filename:join(proplists:get_value(priv_dir, Config), "erlmcp_nif.erl"),
    ok = file:write_file(Changed, [Before, "99.0.0", After]),
    {ok, erlmcp_nif} = compile:file(Changed, [{outdir, Ebin}, debug_info]).


%% A file of the sources, found from a folder below them.
source(Folder, File) ->
    Path = filename:join(Folder, File),
    case filelib:is_regular(Path) of
        true -> Path;
        false -> source(filename:dirname(Folder), File)
    end.


end_per_group(_Group, _Config) ->
    ok.


works_in_current(Config) ->
    ?assertEqual(ok, in_node(Config, in_current)).


in_current() ->
    {ok, [erlmcp_native]} = application:ensure_all_started(erlmcp_native),
    current = erlmcp_rollout:get(),
    {ok, Registry} = erlmcp_registry:start_link(),
    ok = erlmcp_registry:register_server(s, self(), #{a => 1}),
    ok = erlmcp_registry:register_transport(t, self(), #{server_id => s}),
    {error, already_registered} = erlmcp_registry:register_server(s, self(), other),
    {ok, {_, #{a := 1}}} = erlmcp_registry:find_server(s),
    {ok, {_, _}} = gen_server:call(erlmcp_registry, {find_transport, t}),
    {ok, s} = erlmcp_registry:get_server_for_transport(t),
    ok = erlmcp_registry:route_to_server(s, t, 1),
    ok = erlmcp_registry:route_to_transport(t, s, 2),
    ok = erlmcp_registry:route_to_transport(broadcast, s, 3),
    ok = erlmcp_registry:route_to_server(unknown, t, 4),
    ok = erlmcp_registry:route_message({transport, t}, 5),
    ok = erlmcp_registry:route_message({server, s}, 6),
    {ok, [add]} = erlmcp_capability_store:get_or_create(tools, fun() -> [add] end),
    {ok, [add]} = erlmcp_capability_store:get(tools),
    ok = erlmcp_capability_store:release(tools),
    {error, not_found} = erlmcp_capability_store:get(tools),
    [{mcp_message, t, 1}, {mcp_response, s, 2}, {mcp_response, s, 3}, {mcp_response, s, 5}, {mcp_response, s, 6}] =
        [ receive
              {Kind, From, Content} when Kind =:= mcp_message; Kind =:= mcp_response -> {Kind, From, Content}
          after
              ?DEADLINE_MS ->
                  none
          end || _ <- [1, 2, 3, 4, 5] ],
    {ok, Anonymous} = gen_server:start(erlmcp_registry, [], []),
    [] = gen_server:call(Anonymous, list_servers),
    %% The circuit breakers that hosts use.
    {ok, closed} = erlmcp_circuit_breaker:get_status(),
    ok = erlmcp_circuit_breaker:record_error(s),
    false = erlmcp_circuit_breaker:is_open(),
    {ok, _} = erlmcp_circuit_breaker:start_link(),
    ok = erlmcp_circuit_breaker:register_breaker(b, #{}),
    {ok, done} = erlmcp_circuit_breaker:call(b, fun() -> {ok, done} end),
    %% The restarted registry has the entries of the killed one.
    killed = test_support:kill(Registry),
    ok = erlmcp_registry:route_to_server(s, t, lost),
    {ok, _} = erlmcp_registry:start_link(),
    {ok, {_, #{a := 1}}} = erlmcp_registry:find_server(s),
    {ok, s} = erlmcp_registry:get_server_for_transport(t),
    %% There is no other mode.
    {error, {nif_not_loaded, #{remedy := _}}} = erlmcp_rollout:set('100x'),
    {error, {nif_not_loaded, #{remedy := _}}} = erlmcp_rollout:set({percent, 1}),
    ok = erlmcp_rollout:set(current),
    #{mode := current, native_library := {not_loaded, _}, classic := #{servers := 1}} = erlmcp_rollout:status(),
    #{nif := {not_loaded, _}, application := running, mode := current} = erlmcp_native:info(),
    ok = erlmcp_native:i(),
    %% Health reports the library and nothing else; there are no shards.
    {degraded, [{native_library, #{path := _, reason := _, remedy := [_ | _]}}]} = erlmcp_native:health(),
    ok = erlmcp_native:set(health, #{memory_bytes => 1}),
    %% There are no layers whose settings could be changed.
    Environment = application:get_all_env(erlmcp_native),
    [ {error, {nif_not_loaded, #{remedy := _}}} = erlmcp_native:set(Key, Value)
      || {Key, Value} <- [{backpressure, off}, {token_bucket, #{capacity => 2}}, {admission, infinity}, {circuit_breaker, off}] ],
    {error, {nif_not_loaded, #{remedy := _}}} = erlmcp_admission_control:set_threshold(5),
    {error, {bad_option, backpressure, no, _}} = erlmcp_native:set(backpressure, no),
    Environment = application:get_all_env(erlmcp_native),
    {degraded, [{native_library, _}, {memory_bytes, _, 1}]} = erlmcp_native:health(),
    {error, {native_library, #{remedy := [_ | _]}}} = erlmcp_native:explain(s),
    {error, not_running} = erlmcp_shard_metrics:get(),
    %% The process counts what it routes: a broadcast to one transport too. One message was to an unknown server.
    #{
      mode := current,
      left_out := [native, queueing, shard_managers],
      messages := #{process := #{ok := 5, not_found := 1}} = Messages,
      named_breakers := #{closed := 1}
     } = Snapshot = erlmcp_shard_metrics:snapshot(),
    false = is_map_key(native, Messages) orelse is_map_key(shards, Snapshot),
    <<_/binary>> = Text = iolist_to_binary(erlmcp_metrics_text:prometheus()),
    match = re:run(Text, "^erlmcp_messages_total\\{architecture=\"process\",shard_id=\"none\",status=\"ok\"\\} 5$", [multiline, {capture, none}]),
    match = re:run(Text, "^erlmcp_metrics_left_out\\{group=\"native\"\\} 1$", [multiline, {capture, none}]),
    {error, {native_library, #{remedy := [_ | _]}}} = erlmcp_native:busiest(1),
    ok = erlmcp_native:top(),
    {error, not_running} = erlmcp_shard_recovery:subscribe(),
    ok = gen_server:stop(erlmcp_registry),
    ok = application:stop(erlmcp_native).


warns_once(Config) ->
    [Warning] = in_node(Config, in_warned),
    [ ?assertNotEqual(nomatch, string:find(Warning, Part), Part)
      || Part <- [proplists:get_value(library, Config), "current", "rebar3", "require_native"] ].


in_warned() ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self()}),
    ok = application:start(erlmcp_native),
    {ok, _} = erlmcp_registry:start_link(),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    logged().


%% A logging process sends to this process before it does anything else: the caller of the functions above, and the
%% registry's process before it answers.
logged() ->
    _ = sys:get_state(erlmcp_registry),
    [ Text || {logged, Text} <- test_support:flush() ].


log(#{level := warning, msg := {report, #{event := health_degraded}}}, _Config) ->
    %% Health reports the missing library as well, some seconds later.
    ok;
log(#{level := warning} = Event, #{config := Pid}) ->
    Pid ! {logged, lists:flatten(logger_formatter:format(Event, #{template => [msg], single_line => true}))};
log(_Event, _Config) ->
    ok.


works_without_the_application(Config) ->
    [Warning] = in_node(Config, without_application),
    ?assertNotEqual(nomatch, string:find(Warning, "require_native")).


without_application() ->
    %% Needs nothing.
    [{fullsweep_after, 0}] = erlmcp_process:spawn_opts(),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self()}),
    ok = erlmcp_registry:route_to_server(s, t, nobody),
    {ok, _} = erlmcp_registry:start_link(),
    ok = erlmcp_registry:register_server(s, self(), #{}),
    ok = erlmcp_registry:route_to_server(s, t, hello),
    receive {mcp_message, t, hello} -> ok end,
    logged().


refuses_if_native_is_required(Config) ->
    Library = proplists:get_value(library, Config),
    {OfApplication, OfRegistry, Bad} = in_node(Config, required),
    ?assertMatch({error, {{nif_not_loaded, #{path := Library, target := [_ | _], reason := {_, _}, remedy := [_ | _]}}, _}},
                 OfApplication),
    ?assertMatch({error, {nif_not_loaded, #{path := Library}}}, OfRegistry),
    ?assertMatch({error, {{bad_option, require_native, yes, "true or false"}, _}}, Bad).


required() ->
    ok = application:load(erlmcp_native),
    ok = application:set_env(erlmcp_native, require_native, true),
    OfApplication = application:start(erlmcp_native),
    process_flag(trap_exit, true),
    OfRegistry = erlmcp_registry:start_link(),
    ok = application:set_env(erlmcp_native, require_native, yes),
    {OfApplication, OfRegistry, application:start(erlmcp_native)}.


what_is_native_says_why(Config) ->
    ?assertEqual(ok, in_node(Config, native)).


native() ->
    ok = application:start(erlmcp_native),
    [ {Call, {nif_not_loaded, #{remedy := _}}} =
          {Call, try Call() catch error:Reason -> Reason end}
      || Call <- [fun() -> erlmcp_shard_registry:register_connection(c, self(), #{}) end,
                  fun() -> erlmcp_shard_registry:whereis_connection(c) end,
                  fun() -> erlmcp_shard_registry:new(#{}) end,
                  fun() -> erlmcp_connection:start_link(#{id => c, module => erlmcp_registry}) end,
                  fun() -> erlmcp_shard_manager:route_message(c, hello) end,
                  fun() -> erlmcp_message_batch:batch_and_send(c, hello, erlmcp_message_batch:new(#{max_messages => 1})) end,
                  fun() -> erlmcp_token_bucket:new(#{}) end,
                  fun() -> erlmcp_keyed_limiter:new(#{}) end,
                  fun() -> erlmcp_message_store:new(10) end,
                  fun() -> erlmcp_target_breaker:set({server, s}, #{}) end,
                  fun() -> erlmcp_target_breaker:state({server, s}) end,
                  fun() -> erlmcp_group:join(g, self()) end,
                  fun() -> erlmcp_group:route_group(g, hello) end,
                  fun() -> erlmcp_admission_control:check_admission(0) end] ],
    ok.


%% Runs a function of this module in a node of its own, with the copy of the application.
in_node(Config, Function) ->
    Here = filename:dirname(code:which(?MODULE)),
    Ebin = filename:join(proplists:get_value(copy, Config), "ebin"),
    {ok, Peer, _Node} = peer:start(#{connection => standard_io, args => ["-pa", Here, "-pa", Ebin]}),
    try
        {error, bad_name} =/= peer:call(Peer, code, priv_dir, [erlmcp_native]) orelse ct:fail(not_found),
        peer:call(Peer, ?MODULE, Function, [], 60_000)
    after
        peer:stop(Peer)
    end.
