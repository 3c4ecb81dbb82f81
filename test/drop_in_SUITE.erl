%%% The promise of a drop-in replacement, tested on hosts built from scratch.
%%%
%%% `host_app', an application in the shape of erlmcp, gets the registry from `erlmcp_native' as a git dependency, in a
%%% release and through `_checkouts', there also as the package that Hex would make. A project that only depends on an erlmcp with its own registry replaces that
%%% registry by `overrides'. A project of Mix, `mix_app', takes it from git. The suite also tests the README's first steps in
%%% the project itself: its shell and its reference.
%%%
%%% Everything happens in a temporary folder. The source is a commit, made there, of the project's present files. Hosts
%%% run in nodes of their own, which are not distributed and stop with the node of the suite at the latest.
%%%
%%% Cost: cargo compiles the two crates of the project four times, some 60 s on two cores. The first run also compiles their
%%% dependencies, which takes another minute.
-module(drop_in_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/0]).
-export([init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2]).
-export([init_per_testcase/2, end_per_testcase/2]).
%% Builds
-export([git_dependency_builds/1, release_builds/1, release_brings_its_vm/1]).
-export([checkout_builds/1, package_builds/1, overrides_build/1]).
%% The project
-export([shell_has_the_application/1, reference_is_of_the_application/1]).
%% A project of Mix
-export([mix_project_runs/1]).
%% Any host
-export([starts_in_order/1, registry_and_library_are_ours/1, pair_exchanges/1]).
-export([broadcast_reaches_the_bound/1]).
%% Exits of the host's processes
-export([transport_ends/1, server_ends_and_restarts/1]).
-export([killed_registry_keeps_the_living/1, stopped_registry_forgets/1]).
-export([terminated_registry_is_not_running/1, foreign_exits_and_messages_are_ignored/1]).
-export([applications_restart/1]).

-define(BRANCH, "main").

-define(BUILD_MS, 300_000).
-define(GIT_MS,   30_000).
-define(BOOT_MS,  60_000).
-define(CALL_MS,  10_000).


suite() ->
    [{timetrap, {minutes, 6}}].


all() ->
    [{group, git_dependency}, {group, release}, {group, checkout}, {group, package}, {group, overrides}, {group, project}, {group, mix}].


groups() ->
    [{git_dependency, [sequence], [git_dependency_builds, {group, any_host}]},
     {release, [sequence], [release_builds, release_brings_its_vm, {group, any_host}, {group, ends}]},
     {checkout, [sequence], [checkout_builds, {group, any_host}]},
     {package, [sequence], [package_builds, {group, any_host}]},
     {overrides, [sequence], [overrides_build, {group, any_host}]},
     {mix, [], [mix_project_runs]},
     {project, [], [shell_has_the_application, reference_is_of_the_application]},
     {any_host,
      [],
      [starts_in_order,
       registry_and_library_are_ours,
       pair_exchanges,
       broadcast_reaches_the_bound]},
     {ends,
      [],
      [transport_ends,
       server_ends_and_restarts,
       killed_registry_keeps_the_living,
       stopped_registry_forgets,
       terminated_registry_is_not_running,
       foreign_exits_and_messages_are_ignored,
       applications_restart]}].


init_per_suite(Config) ->
    case [ Tool || Tool <- ["git", "rebar3", "cargo", "mix"], os:find_executable(Tool) =:= false ] of
        [] ->
            Root = project_root(?config(data_dir, Config)),
            Temporary = string:trim(os:cmd("d=$(mktemp -d) && cd \"$d\" && pwd -P")),
            Source = filename:join(Temporary, "erlmcp_native"),
            Files = run(Root, "git", ["ls-files", "-coz", "--exclude-standard"], [], ?GIT_MS),
            copy_files(Root, Source, string:lexemes(Files, [0])),
            commit(Source),
            %% Cargo identifies sources by their times and not by their folder, so in the project's own target folder it
            %% would confuse the libraries of both folders. In a target folder of this suite alone all sources are the
            %% same, and crates from the registry are kept for the next run. The commit's files are new, so every run
            %% compiles them.
            [{temporary, Temporary},
             {source, Source},
             {host_source, filename:join(Root, "test/host_app")},
             {cargo_target, filename:join(Root, "target/drop_in")} | Config];
        Missing ->
            {skip, "not on the PATH: " ++ lists:append(lists:join(", ", Missing))}
    end.


end_per_suite(Config) ->
    ok = file:del_dir_r(?config(temporary, Config)).


init_per_group(Cases, Config) when Cases =:= any_host; Cases =:= ends ->
    Config;
init_per_group(Host, Config) ->
    Folder = filename:join(?config(temporary, Config), atom_to_list(Host)),
    [{host, Host}, {folder, Folder} | Config].


end_per_group(_Group, _Config) ->
    ok.


init_per_testcase(Case, Config) ->
    case needs_no_node(Case) of
        true -> Config;
        false -> [{node, start_node(?config(host, Config), ?config(folder, Config))} | Config]
    end.


end_per_testcase(Case, Config) ->
    needs_no_node(Case) orelse peer:stop(?config(node, Config)),
    ok.


needs_no_node(Case) ->
    lists:member(Case,
                 [git_dependency_builds,
                  release_builds,
                  release_brings_its_vm,
                  checkout_builds,
                  package_builds,
                  overrides_build,
                  mix_project_runs,
                  shell_has_the_application,
                  reference_is_of_the_application]).


%%% Builds


git_dependency_builds(Config) ->
    make_host(Config, ?config(folder, Config)),
    rebar3(Config, ?config(folder, Config), ["compile"]).


%% The releases, with the VM and without, run after the folder that they were built in was deleted.
release_builds(Config) ->
    Built = filename:join(?config(temporary, Config), "git_dependency"),
    filelib:is_dir(Built) orelse make_host(Config, Built),
    rebar3(Config, Built, ["release"]),
    ok = file:rename(filename:join(Built, "_build/default/rel/host_app"), ?config(folder, Config)),
    File = filename:join(Built, "rebar.config"),
    {ok, Terms} = file:consult(File),
    {relx, Relx} = lists:keyfind(relx, 1, Terms),
    WithVm = lists:keystore(include_erts, 1, Relx, {include_erts, true}),
    write_terms(File, lists:keystore(relx, 1, Terms, {relx, WithVm})),
    rebar3(Config, Built, ["release"]),
    ok = file:rename(filename:join(Built, "_build/default/rel/host_app"), with_vm(Config)),
    ok = file:del_dir_r(Built).


release_brings_its_vm(Config) ->
    Folder = with_vm(Config),
    Node = start_node(release, Folder),
    InRelease = [{folder, Folder}, {node, Node} | lists:keydelete(folder, 1, Config)],
    ?assertEqual(Folder, call(InRelease, code, root_dir, [])),
    registry_and_library_are_ours(InRelease),
    pair_exchanges(InRelease),
    ok = peer:stop(Node).


with_vm(Config) ->
    ?config(folder, Config) ++ "_with_vm".


%% The host's own rebar.config stays as it is, with a URL that cannot be fetched.
checkout_builds(Config) ->
    Folder = ?config(folder, Config),
    copy_host(Config, Folder),
    Checkout = filename:join(Folder, "_checkouts/erlmcp_native"),
    ok = filelib:ensure_dir(Checkout),
    ok = file:make_symlink(?config(source, Config), Checkout),
    rebar3(Config, Folder, ["compile"]).


%% The package as a checkout, since no package can be fetched here.
package_builds(Config) ->
    Folder = ?config(folder, Config),
    copy_host(Config, Folder),
    Archive = Folder ++ ".tar.gz",
    Files = pack(?config(source, Config), Archive),
    ?assertEqual([], ["LICENSE", "native/prebuilt.sha256", ".cargo/config.toml", "docs/licences.md"] -- Files),
    ?assertEqual([], [ File || File <- Files, Part <- ["test/", "bench/", "priv/"], lists:prefix(Part, File) ]),
    ok = erl_tar:extract(Archive, [compressed, {cwd, filename:join(Folder, "_checkouts/erlmcp_native")}]),
    rebar3(Config, Folder, ["compile"]).


%% As rebar3_hex does: the files and folders of `files', and the application's file in src/ in any case.
pack(Source, Archive) ->
    {ok, [{application, erlmcp_native, Keys} = Application]} = file:consult(filename:join(Source, "erlang/erlmcp_native.app.src")),
    Found = [ filename:join(Path, Inner)
              || Path <- proplists:get_value(files, Keys), Inner <- ["" | filelib:wildcard("**", filename:join(Source, Path))] ],
    Files = [ File || File <- Found, filelib:is_regular(filename:join(Source, File)), filename:extension(File) =/= ".so" ],
    InSrc = {"src/erlmcp_native.app.src", unicode:characters_to_binary(io_lib:format("~tp.~n", [Application]))},
    ok = erl_tar:create(Archive, [InSrc | [ {File, filename:join(Source, File)} || File <- Files ]], [compressed]),
    Files.


%% The case builds a release, because a release refuses two modules of one name.
overrides_build(Config) ->
    Folder = ?config(folder, Config),
    Erlmcp = filename:join(?config(temporary, Config), "erlmcp"),
    make_erlmcp(Config, Erlmcp),
    make_consumer(Config, Folder, Erlmcp),
    rebar3(Config, Folder, ["release"]),
    ?assert(filelib:is_regular(filename:join(Erlmcp, "src/erlmcp_registry.erl"))),
    ?assertMatch([_], filelib:wildcard("_build/default/lib/*/ebin/erlmcp_registry.beam", Folder)),
    Release = "_build/default/rel/consumer/releases/0.1.0/consumer.rel",
    {ok, [{release, _, _, Versions}]} = file:consult(filename:join(Folder, Release)),
    ?assertEqual([erlmcp_native, erlmcp, consumer], besides_otp(Versions)).


%% The host with its dependency in the temporary folder.
make_host(Config, Folder) ->
    copy_host(Config, Folder),
    File = filename:join(Folder, "rebar.config"),
    {ok, Terms} = file:consult(File),
    Dependency = dependency(erlmcp_native, ?config(source, Config)),
    write_terms(File, lists:keystore(deps, 1, Terms, {deps, [Dependency]})).


%% An erlmcp with its own registry: the host under that name.
make_erlmcp(Config, Folder) ->
    copy_host(Config, Folder),
    {ok, [{application, host_app, Keys}]} =
        file:consult(filename:join(Folder, "src/host_app.app.src")),
    ok = file:delete(filename:join(Folder, "src/host_app.app.src")),
    write_terms(
      filename:join(Folder, "src/erlmcp.app.src"),
      [{application,
        erlmcp,
        lists:keystore(applications, 1, Keys, {applications, [kernel, stdlib]})}]),
    write_terms(filename:join(Folder, "rebar.config"), [{erl_opts, [debug_info]}, {deps, []}]),
    ok = file:write_file(
           filename:join(Folder, "src/erlmcp_registry.erl"),
           "-module(erlmcp_registry).\n"
           "-export([start_link/0]).\n"
           "-export_type([server_id/0, transport_id/0]).\n"
           "-type server_id() :: atom().\n"
           "-type transport_id() :: atom().\n"
           "-spec start_link() -> {error, original}.\n"
           "start_link() -> {error, original}.\n"),
    commit(Folder).


%% A project that depends on erlmcp, with the configuration from the README.
make_consumer(Config, Folder, Erlmcp) ->
    Override =
        {add, erlmcp,
              [{deps, [dependency(erlmcp_native, ?config(source, Config))]},
               {pre_hooks,
                [{compile, "rm -f src/erlmcp_registry.erl src/erlmcp_circuit_breaker.erl"}]}]},
    Application =
        {application, consumer,
                      [{description, "A project that depends on erlmcp"},
                       {vsn, "0.1.0"},
                       {registered, []},
                       {applications, [kernel, stdlib, erlmcp_native, erlmcp]}]},
    write_terms(
      filename:join(Folder, "rebar.config"),
      [{deps, [dependency(erlmcp, Erlmcp)]},
       {overrides, [Override]},
       {relx, [{release, {consumer, "0.1.0"}, [consumer]}, {include_src, false}]}]),
    write_terms(filename:join(Folder, "src/consumer.app.src"), [Application]).


%%% A project of Mix


%% Mix builds the dependency with rebar3. The functions are called in the project and in its release.
mix_project_runs(Config) ->
    Folder = ?config(folder, Config),
    Source = filename:join(filename:dirname(?config(host_source, Config)), "mix_app"),
    copy_files(Source, Folder, ["mix.exs", "lib/mix_app.ex"]),
    Home = filename:join(?config(temporary, Config), "mix"),
    Env = rebar3_env(Config) ++
        [{"ERLMCP_NATIVE_URL", "file://" ++ ?config(source, Config)},
         {"MIX_ENV", "prod"},
         {"MIX_HOME", Home},
         {"HEX_HOME", Home},
         {"MIX_REBAR3", os:find_executable("rebar3")},
         {"LC_ALL", "C.UTF-8"}],
    Mix = fun(Arguments) -> run(Folder, "mix", Arguments, Env, ?BUILD_MS) end,
    _ = Mix(["do", "deps.get,", "compile"]),
    expect_as_expected(Mix(["run", "-e", "MixApp.check()"])),
    _ = Mix(["release", "--quiet"]),
    Release = filename:join(Folder, "_build/prod/rel/mix_app/bin/mix_app"),
    expect_as_expected(run(Folder, Release, ["eval", "{:ok, _} = Application.ensure_all_started(:mix_app); MixApp.check()"], Env, ?BUILD_MS)).


expect_as_expected(Output) ->
    ?assertNotEqual({nomatch, Output}, {string:find(Output, "as expected"), Output}).


%%% The project


%% Input before the prompt is lost. Applications are started at the same time, so the case awaits both.
shell_has_the_application(Config) ->
    Deadline = erlang:monotonic_time(millisecond) + ?BUILD_MS,
    Shell = open(?config(source, Config), "rebar3", ["shell"], rebar3_env(Config)),
    ok = await_output(Shell, ["1> ", "Booted erlmcp_native"], [], Deadline),
    true = port_command(Shell, "maps:with([application, registry_process], erlmcp_native:info()).\nhalt(0).\n"),
    {0, Output} = collect(Shell, [], Deadline),
    ?assertNotEqual({nomatch, Output}, {string:find(Output, "#{application => running,registry_process => undefined}"), Output}).


%% The reference covers all folders of the application, and neither tests nor benchmarks.
reference_is_of_the_application(Config) ->
    Source = ?config(source, Config),
    rebar3(Config, Source, ["edoc"]),
    Documented = [ filename:basename(File, ".html") || File <- filelib:wildcard("erlmcp_*.html", filename:join(Source, "doc")) ],
    ?assertEqual([], [ Module || Module <- Documented, sources(Source, Module) =:= [] ]),
    Pages = length(filelib:wildcard("*.html", filename:join(Source, "doc"))),
    ?assertEqual(length(Documented) + length(["index", "modules-frame", "overview-summary"]), Pages),
    Public = [ filename:basename(File, ".erl")
               || File <- sources(Source, "*"), {ok, Text} <- [file:read_file(File)], binary:match(Text, <<"%%% @private">>) =:= nomatch ],
    ?assertEqual([], Public -- Documented).


sources(Folder, Module) ->
    filelib:wildcard(filename:join([Folder, "erlang", "**", Module ++ ".erl"])).


%%% Any host


starts_in_order(Config) ->
    Running = call(Config, application, which_applications, []),
    Expected =
        case ?config(host, Config) of
            overrides -> [erlmcp_native, erlmcp, consumer];
            _ -> [erlmcp_native, host_app]
        end,
    ?assertEqual(Expected, besides_otp(lists:reverse(Running))).


registry_and_library_are_ours(Config) ->
    Folder = ?config(folder, Config),
    Ebin = filename:join(call(Config, code, lib_dir, [erlmcp_native]), "ebin"),
    ?assertNotEqual(nomatch, string:prefix(Ebin, Folder)),
    ?assertEqual(filename:join(Ebin, "erlmcp_registry.beam"),
                 call(Config, code, which, [erlmcp_registry])),
    Library =
        case ?config(host, Config) of
            checkout -> filename:join(?config(source, Config), "priv/erlmcp_nif.so");
            package -> filename:join(Folder, "_checkouts/erlmcp_native/priv/erlmcp_nif.so");
            _ -> filename:join(call(Config, code, priv_dir, [erlmcp_native]), "erlmcp_nif.so")
        end,
    ?assert(filelib:is_regular(Library)),
    %% Only Linux shows which files are mapped.
    case file:read_file("/proc/" ++ call(Config, os, getpid, []) ++ "/maps") of
        {ok, Maps} ->
            {match, Mapped} = re:run(Maps, "/\\S*erlmcp_nif\\S*", [global, {capture, first, list}]),
            ?assertEqual([[Library]], lists:usort(Mapped));
        {error, _} ->
            ok
    end.


pair_exchanges(Config) ->
    start_server(Config, <<"calculator">>),
    start_transport(Config, {tcp, 1}, #{server_id => <<"calculator">>}),
    start_transport(Config, {tcp, 2}, #{}),
    ?assertEqual({ok, {<<"calculator">>, sum}}, request(Config, {tcp, 1}, sum)),
    ?assertEqual({error, not_bound}, request(Config, {tcp, 2}, sum)),
    ok = registry(Config, bind_transport_to_server, [{tcp, 2}, <<"calculator">>]),
    ?assertEqual({ok, {<<"calculator">>, sum}}, request(Config, {tcp, 2}, sum)),
    ?assertEqual({error, already_registered},
                 call(Config, host_app, start_server, [<<"calculator">>, #{}])).


broadcast_reaches_the_bound(Config) ->
    start_server(Config, news),
    start_server(Config, weather),
    start_transport(Config, a, #{server_id => news}),
    start_transport(Config, b, #{server_id => news}),
    start_transport(Config, c, #{server_id => weather}),
    start_transport(Config, d, #{}),
    ok = call(Config, host_app, publish, [news, 1]),
    ok = call(Config, host_app, publish, [weather, 2]),
    ok = call(Config, host_app, publish, [news, 3]),
    Expected = [[{news, 1}, {news, 3}], [{news, 1}, {news, 3}], [{weather, 2}], []],
    test_support:await_value(Expected, fun() -> [ events(Config, Id) || Id <- [a, b, c, d] ] end).


%%% Exits of the host's processes


transport_ends(Config) ->
    start_server(Config, server),
    Ended = start_transport(Config, ended, #{server_id => server}),
    start_transport(Config, other, #{server_id => server}),
    kill(Config, Ended),
    ?assertEqual({error, not_found}, registry(Config, find_transport, [ended])),
    ?assertEqual({ok, {server, 1}}, request(Config, other, 1)),
    test_support:await_value([other], fun() -> ids(registry(Config, list_transports, [])) end),
    eventually_unbound(Config, ended),
    start_transport(Config, ended, #{}),
    ?assertEqual({error, not_bound}, request(Config, ended, 2)),
    ok = call(Config, host_app, publish, [server, event]),
    test_support:await_value([{server, event}], fun() -> events(Config, other) end),
    ?assertEqual([], events(Config, ended)).


%% The server's supervisor restarts it at once. The restart restores no binding.
server_ends_and_restarts(Config) ->
    Ended = start_server(Config, server),
    start_transport(Config, transport, #{server_id => server}),
    Transport = registry(Config, find_transport, [transport]),
    kill(Config, Ended),
    test_support:await_value(true,
                             fun() ->
                                     case registry(Config, find_server, [server]) of
                                         {ok, {Pid, #{}}} -> Pid =/= Ended;
                                         {error, not_found} -> false
                                     end
                             end),
    eventually_unbound(Config, transport),
    ?assertEqual({error, not_bound}, request(Config, transport, 1)),
    ?assertEqual(Transport, registry(Config, find_transport, [transport])),
    ok = registry(Config, bind_transport_to_server, [transport, server]),
    ?assertEqual({ok, {server, 2}}, request(Config, transport, 2)).


%% The supervisor terminates its other children with the registry. A server and its transports outside of it survive.
killed_registry_keeps_the_living(Config) ->
    start_outsiders(Config),
    start_server(Config, server),
    start_transport(Config, transport, #{server_id => server}),
    ok = registry(Config, bind_transport_to_server, [bound_to_server, server]),
    Before = outsiders(Config),
    restart_registry(Config, fun(Registry) -> kill(Config, Registry) end),
    test_support:await_value([outside], fun() -> ids(registry(Config, list_servers, [])) end),
    test_support:await_value([bound_by_call, bound_by_config, bound_to_server],
                             fun() -> ids(registry(Config, list_transports, [])) end),
    ?assertEqual(Before, outsiders(Config)),
    ?assertEqual({ok, {outside, 1}}, request(Config, bound_by_config, 1)),
    ?assertEqual({ok, {outside, 2}}, request(Config, bound_by_call, 2)),
    eventually_unbound(Config, bound_to_server),
    %% The monitors survive as well.
    {ok, {Transport, _}} = registry(Config, find_transport, [bound_by_call]),
    kill(Config, Transport),
    ?assertEqual({error, not_found}, registry(Config, find_transport, [bound_by_call])),
    start_server(Config, server),
    start_transport(Config, transport, #{server_id => server}),
    ?assertEqual({ok, {server, 3}}, request(Config, transport, 3)).


stopped_registry_forgets(Config) ->
    start_outsiders(Config),
    {ok, {Outsider, _}} = registry(Config, find_server, [outside]),
    restart_registry(Config,
                     fun(Registry) -> ok = call(Config, gen_server, stop, [Registry]) end),
    ?assertEqual({[], []}, all(Config)),
    ?assertEqual({ok, {registry_state, #{}}}, registry(Config, get_all_state, [])),
    ok = registry(Config, register_server, [outside, Outsider, #{}]),
    start_transport(Config, transport, #{server_id => outside}),
    ?assertEqual({ok, {outside, 1}}, request(Config, transport, 1)).


terminated_registry_is_not_running(Config) ->
    Server = start_server(Config, server),
    start_transport(Config, transport, #{server_id => server}),
    ok = call(Config, supervisor, terminate_child, [host_app_sup, erlmcp_registry]),
    ?assertEqual(undefined, call(Config, erlang, whereis, [erlmcp_registry])),
    ?assertEqual(ok, registry(Config, route_to_server, [server, transport, unseen])),
    ?assertEqual(ok, registry(Config, route_to_transport, [transport, server, unseen])),
    ?assertEqual(ok, registry(Config, route_to_transport, [broadcast, server, unseen])),
    ?assertExit({noproc, {gen_server, call, [erlmcp_registry, {find_server, server}]}},
                registry(Config, find_server, [server])),
    {ok, _} = call(Config, supervisor, restart_child, [host_app_sup, erlmcp_registry]),
    ?assertEqual({[], []}, all(Config)),
    %% Only the registry was terminated: a second registration is possible.
    ok = registry(Config, register_server, [server, Server, #{}]),
    start_transport(Config, another, #{server_id => server}),
    ?assertEqual({ok, {server, 1}}, request(Config, another, 1)).


foreign_exits_and_messages_are_ignored(Config) ->
    start_server(Config, server),
    start_transport(Config, transport, #{server_id => server}),
    Registry = call(Config, erlang, whereis, [erlmcp_registry]),
    _ = [ true = call(Config, erlang, exit, [Registry, Reason])
          || Reason <- [normal, shutdown, {shutdown, stop}, crash] ],
    _ = call(Config, erlang, send, [Registry, {transport_connected, transport}]),
    ok = call(Config, gen_server, cast, [Registry, unknown]),
    ?assertEqual({error, unknown_request}, call(Config, gen_server, call, [Registry, unknown])),
    ?assertMatch([{server, _}], call(Config, gen_server, call, [Registry, list_servers])),
    ?assertEqual(Registry, call(Config, erlang, whereis, [erlmcp_registry])),
    ?assertEqual({ok, {server, 1}}, request(Config, transport, 1)).


applications_restart(Config) ->
    start_outsiders(Config),
    ok = call(Config, application, stop, [host_app]),
    ok = call(Config, application, start, [host_app]),
    ?assertEqual({[], []}, all(Config)),
    ok = call(Config, application, stop, [host_app]),
    ok = call(Config, application, stop, [erlmcp_native]),
    ?assertEqual({ok, [erlmcp_native, host_app]},
                 call(Config, application, ensure_all_started, [host_app])),
    start_server(Config, server),
    start_transport(Config, transport, #{server_id => server}),
    ?assertEqual({ok, {server, 1}}, request(Config, transport, 1)).


%%% Hosts


start_node(release, Folder) ->
    start_peer(#{exec => filename:join(Folder, "bin/host_app")});
start_node(Host, Folder) ->
    Paths = filelib:wildcard(filename:join(Folder, "_build/default/{lib,checkouts}/*/ebin")),
    Node = start_peer(#{args => ["-pa" | Paths]}),
    Application =
        case Host of
            overrides -> consumer;
            _ -> host_app
        end,
    {ok, _} = peer:call(Node, application, ensure_all_started, [Application], ?CALL_MS),
    Node.


start_peer(Options) ->
    Env = [ {Name, ""} || {Name, false} <- clean_environment() ],
    {ok, Node, _} =
        peer:start(Options#{connection => standard_io, env => Env, wait_boot => ?BOOT_MS}),
    Node.


call(Config, Module, Function, Arguments) ->
    peer:call(?config(node, Config), Module, Function, Arguments, ?CALL_MS).


registry(Config, Function, Arguments) ->
    call(Config, erlmcp_registry, Function, Arguments).


start_server(Config, Id) ->
    {ok, Pid} = call(Config, host_app, start_server, [Id, #{}]),
    Pid.


start_transport(Config, Id, TransportConfig) ->
    {ok, Pid} = call(Config, host_app, start_transport, [Id, TransportConfig]),
    Pid.


request(Config, TransportId, Request) ->
    call(Config, host_app, call, [TransportId, Request]).


events(Config, TransportId) ->
    {ok, Events} = call(Config, host_app, events, [TransportId]),
    Events.


%% A server and its transports outside of the host's supervisor.
start_outsiders(Config) ->
    {ok, _} = call(Config, host_app_server, start, [outside, #{}]),
    {ok, _} = call(Config, host_app_transport, start, [bound_by_config, #{server_id => outside}]),
    {ok, _} = call(Config, host_app_transport, start, [bound_by_call, #{}]),
    {ok, _} = call(Config, host_app_transport, start, [bound_to_server, #{}]),
    ok = registry(Config, bind_transport_to_server, [bound_by_call, outside]).


outsiders(Config) ->
    Transports = [bound_by_config, bound_by_call, bound_to_server],
    {registry(Config, find_server, [outside]),
     [ registry(Config, find_transport, [Id]) || Id <- Transports ]}.


all(Config) ->
    {registry(Config, list_servers, []), registry(Config, list_transports, [])}.


ids(Entries) ->
    lists:sort([ Id || {Id, _} <- Entries ]).


%% Makes the registry exit by End, and returns when the supervisor has restarted all of its children.
restart_registry(Config, End) ->
    Children = supervised(Config),
    End(proplists:get_value(erlmcp_registry, Children)),
    test_support:await_value(true,
                             fun() ->
                                     New = supervised(Config),
                                     lists:all(fun({_, Pid}) -> is_pid(Pid) end, New) andalso
                                     New -- Children =:= New
                             end).


supervised(Config) ->
    [ {Id, Pid} || {Id, Pid, _, _} <- call(Config, supervisor, which_children, [host_app_sup]) ].


kill(Config, Pid) ->
    true = call(Config, erlang, exit, [Pid, kill]),
    test_support:await_value(false, fun() -> call(Config, erlang, is_process_alive, [Pid]) end).


eventually_unbound(Config, Id) ->
    test_support:await_value({error, not_found}, fun() -> registry(Config, get_server_for_transport, [Id]) end).


besides_otp(Applications) ->
    [ element(1, A) || A <- Applications ] -- [kernel, stdlib, sasl].


%%% Files


%% The root folder of the sources, found from a folder below it.
project_root(Folder) ->
    case filelib:is_regular(filename:join(Folder, "native/build.sh")) of
        true -> Folder;
        false -> project_root(filename:dirname(Folder))
    end.


copy_host(Config, Folder) ->
    Host = ?config(host_source, Config),
    Files = [ filelib:wildcard(Pattern, Host) || Pattern <- ["rebar.config", "config/*", "src/*"] ],
    copy_files(Host, Folder, lists:append(Files)).


%% The list may contain files that have been deleted and not yet removed from git.
copy_files(From, To, Files) ->
    lists:foreach(
      fun({Source, Target}) ->
              ok = filelib:ensure_dir(Target),
              {ok, _} = file:copy(Source, Target)
      end,
      [ {filename:join(From, File), filename:join(To, File)}
        || File <- Files, filelib:is_regular(filename:join(From, File)) ]).


write_terms(File, Terms) ->
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, [ io_lib:format("~tp.~n", [Term]) || Term <- Terms ]).


%%% Programs


dependency(Name, Folder) ->
    {Name, {git, "file://" ++ Folder, {branch, ?BRANCH}}}.


%% Makes a repository of the folder, with one commit.
commit(Folder) ->
    Settings = ["-c", "user.name=drop_in", "-c", "user.email=drop_in@localhost",
                "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"],
    lists:foreach(
      fun(Arguments) -> run(Folder, "git", Settings ++ Arguments, [], ?GIT_MS) end,
      [["init", "-q"],
       ["checkout", "-q", "-b", ?BRANCH],
       ["add", "-A"],
       ["commit", "-q", "-m", "Snapshot"]]).


rebar3(Config, Folder, Arguments) ->
    _ = run(Folder, "rebar3", Arguments, rebar3_env(Config), ?BUILD_MS),
    ok.


%% Settings and caches are those of a new user.
rebar3_env(Config) ->
    Home = filename:join(?config(temporary, Config), "rebar3"),
    [{"CARGO_TARGET_DIR", ?config(cargo_target, Config)},
     {"REBAR_GLOBAL_CONFIG_DIR", Home},
     {"REBAR_CACHE_DIR", Home}].


%% The output of a program, which has to succeed in time.
run(Folder, Program, Arguments, Env, Timeout) ->
    Port = open(Folder, Program, Arguments, Env),
    {os_pid, Pid} = erlang:port_info(Port, os_pid),
    {Status, Output} = collect(Port, [], erlang:monotonic_time(millisecond) + Timeout),
    Status =:= timeout andalso kill_tree(Pid),
    Status =:= 0 orelse
    begin
        ct:pal("~ts ~tp in ~ts: ~p~n~ts", [Program, Arguments, Folder, Status, Output]),
        ct:fail({Program, Arguments, Status})
    end,
    ct:log("~ts ~tp in ~ts~n~ts", [Program, Arguments, Folder, Output]),
    Output.


open(Folder, Program, Arguments, Env) ->
    open_port({spawn_executable, os:find_executable(Program)},
              [{args, Arguments},
               {cd, Folder},
               {env, clean_environment() ++ Env},
               exit_status,
               stderr_to_stdout,
               hide,
               binary]).


await_output(Port, Parts, Before, Deadline) ->
    receive
        {Port, {data, Data}} ->
            Output = Before ++ unicode:characters_to_list(Data),
            case [ Part || Part <- Parts, string:find(Output, Part) =:= nomatch ] of
                [] -> ok;
                _ -> await_output(Port, Parts, Output, Deadline)
            end;
        {Port, {exit_status, Status}} ->
            ct:fail({Status, Before})
    after
        max(0, Deadline - erlang:monotonic_time(millisecond)) ->
            ct:fail({missing, Parts, Before})
    end.


collect(Port, Output, Deadline) ->
    receive
        {Port, {data, Data}} -> collect(Port, [Output, Data], Deadline);
        {Port, {exit_status, Status}} -> {Status, unicode:characters_to_list(Output)}
    after
        max(0, Deadline - erlang:monotonic_time(millisecond)) ->
            {timeout, unicode:characters_to_list(Output)}
    end.


%% A program that rebar3 has started is in a process group of its own, so the tree of parents is followed.
kill_tree(Root) ->
    Table = [ list_to_tuple([ list_to_integer(Number) || Number <- string:lexemes(Line, " ") ])
              || Line <- string:lexemes(os:cmd("ps -A -o pid= -o ppid= 2>/dev/null"), "\n") ],
    Pids = [ integer_to_list(Pid) || Pid <- descendants(Root, Table) ],
    os:cmd(lists:join(" ", ["kill", "-KILL" | Pids])).


descendants(Parent, Table) ->
    [Parent | [ Pid || {Child, Of} <- Table, Of =:= Parent, Pid <- descendants(Child, Table) ]].


%% Removes what git, rebar3 and the VM would inherit from the program that started the suite, for example a git hook.
clean_environment() ->
    [ {Name, false}
      || {Name, _} <- os:env(),
         lists:any(fun(Prefix) -> lists:prefix(Prefix, Name) end, ["GIT_", "REBAR_", "ERL_", "ERLMCP_"]) ].
