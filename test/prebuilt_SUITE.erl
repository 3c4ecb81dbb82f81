%%% The compile hook `native/build.sh', with and without cargo, and with prebuilt libraries from folders and HTTP
%%% servers.
%%%
%%% Each case runs the script of this tree in a copy, with a PATH that has only the programs that the case names. Where
%%% cargo is there, it is a script that records its calls: the suite builds no crate. The library is the one that this
%%% project was compiled with.
-module(prebuilt_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/0]).
-export([init_per_suite/1, end_per_suite/1]).
-export([init_per_group/2, end_per_group/2]).
-export([init_per_testcase/2, end_per_testcase/2]).
%% From a server
-export([takes_the_file/1,
         refuses_another_sum/1,
         refuses_a_short_file/1,
         refuses_a_short_transfer/1,
         refuses_what_is_not_there/1,
         refuses_without_a_server/1,
         verifies_certificates/1]).
%% From a folder
-export([takes_the_file_of_a_folder/1, refuses_other_places/1]).
-export([refuses_what_the_manifest_does_not_name/1]).
%% With and without cargo
-export([cargo_builds/1,
         cargo_builds_where_there_is_no_prebuilt_library/1,
         cargo_is_forced/1,
         cargo_is_forbidden/1,
         cargo_fails/1,
         other_settings_are_errors/1]).
%% Libraries of other sources
-export([library_of_other_sources_is_removed/1, library_by_hand_stays/1, versions_agree/1]).
-export([library_lands_where_mix_expects_it/1]).
-export([prebuild_writes_the_manifest/1]).
%% The application
-export([application_runs_without_the_library_and_with_it/1]).

-define(RUN_MS,   60_000).
-define(BUILD_MS, 300_000).

%% All that the script needs, and erl's own scripts.
-define(PROGRAMS,
        ["sh", "awk", "basename", "cat", "chmod", "cksum", "cmp", "cp", "cut", "dirname", "env", "erl", "escript", "find",
         "head", "mkdir", "mv", "rm", "sed", "sha256sum", "sort", "tail", "xargs"]).


suite() ->
    [{timetrap, {minutes, 6}}].


all() ->
    [{group, curl}, {group, httpc}, {group, local}, application_runs_without_the_library_and_with_it].


groups() ->
    FromServer = [takes_the_file,
                  refuses_another_sum,
                  refuses_a_short_file,
                  refuses_a_short_transfer,
                  refuses_what_is_not_there,
                  refuses_without_a_server,
                  verifies_certificates],
    [{curl, [], FromServer},
     {httpc, [], FromServer},
     {local,
      [],
      [takes_the_file_of_a_folder,
       refuses_other_places,
       refuses_what_the_manifest_does_not_name,
       cargo_builds,
       cargo_builds_where_there_is_no_prebuilt_library,
       cargo_is_forced,
       cargo_is_forbidden,
       cargo_fails,
       other_settings_are_errors,
       library_of_other_sources_is_removed,
       library_by_hand_stays,
       versions_agree,
       library_lands_where_mix_expects_it,
       prebuild_writes_the_manifest]}].


init_per_suite(Config) ->
    Programs = [ Program || Program <- ["rebar3", "uname" | ?PROGRAMS], os:find_executable(Program) =:= false ],
    Applications = [ Name || Name <- [inets, ssl], code:lib_dir(Name) =:= {error, bad_name} ],
    case {Programs, Applications} of
        {[], []} ->
            {ok, _} = application:ensure_all_started(inets),
            {ok, _} = application:ensure_all_started(ssl),
            [{root, project_root(?config(data_dir, Config))} | Config];
        Missing ->
            {skip, {missing, Missing}}
    end.


end_per_suite(_Config) ->
    ok.


init_per_group(curl, Config) ->
    case os:find_executable("curl") of
        false -> {skip, "curl is not on the PATH"};
        _ -> [{programs, ["curl" | ?PROGRAMS]} | Config]
    end;
init_per_group(_, Config) ->
    [{programs, ?PROGRAMS} | Config].


end_per_group(_Group, _Config) ->
    ok.


%% A copy of what the script reads, a folder that a server or the script itself finds the library in, and a manifest
%% that names it.
init_per_testcase(Case, Config) ->
    Group = proplists:get_value(name, ?config(tc_group_properties, Config), none),
    Folder = filename:join([?config(priv_dir, Config), Group, Case]),
    Tree = filename:join(Folder, "tree"),
    [ copy(filename:join(?config(root, Config), Part), filename:join(Tree, Part))
      || Part <- ["Cargo.toml", "Cargo.lock", ".cargo", "native"] ],
    Bin = filename:join(Folder, "bin"),
    ok = filelib:ensure_dir(filename:join(Bin, "any")),
    [ ok = file:make_symlink(executable(Program), filename:join(Bin, Program))
      || Program <- proplists:get_value(programs, Config, ?PROGRAMS) ],
    Published = filename:join(Folder, "published"),
    ok = filelib:ensure_dir(filename:join(Published, "any")),
    Prepared = [{folder, Folder}, {tree, Tree}, {bin, Bin}, {published, Published} | Config],
    publish(Prepared, contents()),
    manifest(Prepared, [{contents(), name(Prepared)}]),
    Prepared.


end_per_testcase(_Case, Config) ->
    [ inets:stop(httpd, Server) || {httpd, Server} <- inets:services() ],
    file:del_dir_r(?config(folder, Config)).


%%% From a server


takes_the_file(Config) ->
    Env = [{"ERLMCP_NATIVE_PREBUILT", serve(Config)}],
    {0, Output} = build(Config, Env),
    contains(Output, ["took the prebuilt library http://127.0.0.1:", name(Config), "SHA-256"]),
    1 = length(string:lexemes(Output, "\n")),
    ?assertEqual(sum(contents()), installed(Config)),
    %% It is not fetched again.
    end_servers(),
    ?assertEqual({0, ""}, build(Config, Env)),
    ?assertEqual(sum(contents()), installed(Config)).


refuses_another_sum(Config) ->
    <<First, Rest/binary>> = contents(),
    publish(Config, <<(First bxor 1), Rest/binary>>),
    refuses(Config, serve(Config), ["has the SHA-256", "native/prebuilt.sha256 says " ++ sum(contents())]).


refuses_a_short_file(Config) ->
    Library = contents(),
    publish(Config, binary:part(Library, 0, byte_size(Library) div 2)),
    refuses(Config, serve(Config), ["has the SHA-256"]).


%% The server closes the connection in the middle. Until then the file is not in priv/.
refuses_a_short_transfer(Config) ->
    Library = contents(),
    Half = binary:part(Library, 0, byte_size(Library) div 2),
    {ok, Listen} = gen_tcp:listen(0, [binary, {active, false}, {ip, {127, 0, 0, 1}}]),
    {ok, Port} = inet:port(Listen),
    Suite = self(),
    Server = spawn_link(fun() ->
                                {ok, Socket} = gen_tcp:accept(Listen, ?RUN_MS),
                                {ok, <<"GET ", _/binary>>} = gen_tcp:recv(Socket, 0, ?RUN_MS),
                                Header = ["HTTP/1.1 200 OK\r\nContent-Length: ", integer_to_list(byte_size(Library)), "\r\n\r\n"],
                                ok = gen_tcp:send(Socket, [Header, Half]),
                                test_support:await(fun() -> partial(Config) =/= [] end, ?RUN_MS),
                                Suite ! {half, self(), in_priv(Config)},
                                ok = gen_tcp:close(Socket)
                        end),
    refuses(Config, "http://127.0.0.1:" ++ integer_to_list(Port), client(Config, "127.0.0.1")),
    receive {half, Server, InPriv} -> ?assertEqual([], InPriv) end,
    ok = gen_tcp:close(Listen).


refuses_what_is_not_there(Config) ->
    ok = file:delete(filename:join(?config(published, Config), name(Config))),
    refuses(Config, serve(Config), client(Config, "404")).


refuses_without_a_server(Config) ->
    Address = serve(Config),
    end_servers(),
    refuses(Config, Address, client(Config, Address)).


%% The sum is right, but the server's certificate is not, until the client trusts its root.
verifies_certificates(Config) ->
    %% The record of public_key.hrl, whose other records have no types. The identifier is that of subjectAltName.
    IsLocalhost = {'Extension', {2, 5, 29, 17}, _IsCritical = false, [{dNSName, "localhost"}]},
    Options = [{key, {namedCurve, secp256r1}}, {digest, sha256}],
    Chain = #{root => Options, intermediates => [], peer => [{extensions, [IsLocalhost]} | Options]},
    #{server_config := Server, client_config := Client} =
        public_key:pkix_test_data(#{server_chain => Chain, client_chain => Chain}),
    "http://127.0.0.1" ++ Port = serve(Config, [{socket_type, {ssl, Server}}]),
    Address = "https://localhost" ++ Port,
    refuses(Config, Address, client(Config, "localhost")),
    Roots = filename:join(?config(folder, Config), "roots.pem"),
    ok = file:write_file(Roots,
                         public_key:pem_encode([ {'Certificate', Root, not_encrypted} || Root <- proplists:get_value(cacerts, Client) ])),
    {0, Output} = build(Config,
                        [{"ERLMCP_NATIVE_PREBUILT", Address},
                         {"CURL_CA_BUNDLE", Roots},
                         {"ERL_AFLAGS", "-eval 'public_key:cacerts_load(\"" ++ Roots ++ "\")'"}]),
    contains(Output, ["took the prebuilt library " ++ Address]),
    ?assertEqual(sum(contents()), installed(Config)).


%% The reason begins with the name of the client that the group is about.
client(Config, Part) ->
    ["no prebuilt library: " ++ atom_to_list(proplists:get_value(name, ?config(tc_group_properties, Config))) ++ ": ", Part].


%%% From a folder


takes_the_file_of_a_folder(Config) ->
    Env = [{"ERLMCP_NATIVE_PREBUILT", ?config(published, Config)}],
    {0, Output} = build(Config, Env),
    contains(Output, ["took the prebuilt library " ++ filename:join(?config(published, Config), name(Config))]),
    ?assertEqual(sum(contents()), installed(Config)),
    %% A later version takes the place of this one, and a damaged file does not stay either.
    ok = file:write_file(library(Config), "damaged"),
    {0, _} = build(Config, Env),
    ?assertEqual(sum(contents()), installed(Config)),
    publish(Config, <<"later">>),
    manifest(Config, [{<<"later">>, name(Config)}]),
    {0, _} = build(Config, Env),
    ?assertEqual(sum(<<"later">>), installed(Config)).


refuses_other_places(Config) ->
    refuses(Config, "published", ["neither an absolute path nor an http(s) address"]),
    refuses(Config, "ftp://127.0.0.1", ["neither an absolute path nor an http(s) address"]),
    refuses(Config, filename:join(?config(folder, Config), "nowhere"), [name(Config)]).


%% The manifest is what is trusted: without it, and without a line in it, no file is.
refuses_what_the_manifest_does_not_name(Config) ->
    Prebuilt = ?config(published, Config),
    Other = [{"ERLMCP_NATIVE_PREBUILT", Prebuilt}, {"ERLMCP_NATIVE_TARGET", "riscv64gc-unknown-linux-gnu"}],
    {0, Output} = build(Config, Other),
    contains(Output, ["native/prebuilt.sha256 has no sum for", "riscv64gc-unknown-linux-gnu", "compiled without"]),
    nothing_installed(Config),
    Missing = ["native/prebuilt.sha256 has no sum for " ++ name(Config)],
    manifest(Config, []),
    refuses(Config, Prebuilt, Missing),
    ok = file:write_file(manifest_file(Config), "not a sum  " ++ name(Config) ++ "\n"),
    refuses(Config, Prebuilt, Missing),
    ok = file:delete(manifest_file(Config)),
    refuses(Config, Prebuilt, Missing).


%%% With and without cargo


cargo_builds(Config) ->
    add_cargo(Config, 0),
    ?assertEqual({0, ""}, build(Config, [])),
    ?assertMatch(["build --locked --release -p erlmcp_nif" ++ _], cargo_calls(Config)),
    ?assertEqual(sum(<<"by cargo">>), installed(Config)).


cargo_builds_where_there_is_no_prebuilt_library(Config) ->
    add_cargo(Config, 0),
    Env = [{"ERLMCP_NATIVE_PREBUILT", ?config(published, Config)}],
    {0, _} = build(Config, Env),
    ?assertEqual([], cargo_calls(Config)),
    ?assertEqual(sum(contents()), installed(Config)),
    manifest(Config, []),
    {0, Output} = build(Config, Env),
    contains(Output, ["no prebuilt library: "]),
    ?assertMatch([_], cargo_calls(Config)),
    ?assertEqual(sum(<<"by cargo">>), installed(Config)).


cargo_is_forced(Config) ->
    Env = [{"ERLMCP_NATIVE_BUILD", "1"}, {"ERLMCP_NATIVE_PREBUILT", ?config(published, Config)}],
    {1, Output} = build(Config, Env),
    contains(Output, ["ERLMCP_NATIVE_BUILD is 1, but cargo is not on the PATH", "rustup.rs"]),
    nothing_installed(Config),
    add_cargo(Config, 0),
    ?assertEqual({0, ""}, build(Config, Env)),
    ?assertEqual(sum(<<"by cargo">>), installed(Config)).


cargo_is_forbidden(Config) ->
    add_cargo(Config, 0),
    {0, Output} = build(Config, [{"ERLMCP_NATIVE_BUILD", "0"}]),
    contains(Output, ["compiled without the native library, because ERLMCP_NATIVE_BUILD is 0."]),
    nothing_installed(Config),
    {0, _} = build(Config, [{"ERLMCP_NATIVE_BUILD", "0"}, {"ERLMCP_NATIVE_PREBUILT", ?config(published, Config)}]),
    ?assertEqual(sum(contents()), installed(Config)),
    ?assertEqual([], cargo_calls(Config)).


cargo_fails(Config) ->
    add_cargo(Config, 101),
    {1, Output} = build(Config, []),
    contains(Output, ["error: this is what cargo says", "cargo could not build the native library"]),
    nothing_installed(Config).


other_settings_are_errors(Config) ->
    {1, Output} = build(Config, [{"ERLMCP_NATIVE_BUILD", "yes"}]),
    contains(Output, ["ERLMCP_NATIVE_BUILD is yes; expected 1"]).


%%% Libraries of other sources


library_of_other_sources_is_removed(Config) ->
    {0, _} = build(Config, [{"ERLMCP_NATIVE_PREBUILT", ?config(published, Config)}]),
    %% Another version of the manifest alone changes nothing.
    manifest(Config, []),
    {0, Kept} = build(Config, []),
    contains(Kept, ["keeps ./priv/erlmcp_nif.so, which is for these sources"]),
    ?assertEqual(sum(contents()), installed(Config)),
    ok = file:write_file(filename:join(?config(tree, Config), "native/erlmcp_nif/src/lib.rs"), "\n// Changed.\n", [append]),
    {0, Removed} = build(Config, []),
    contains(Removed, ["compiled without", "The library of other sources in priv/ was removed"]),
    nothing_installed(Config).


%% For example by an image that another one copies from. The library checks the version when it is loaded.
library_by_hand_stays(Config) ->
    ok = filelib:ensure_dir(library(Config)),
    ok = file:write_file(library(Config), "by hand"),
    {0, Output} = build(Config, []),
    contains(Output, ["keeps ./priv/erlmcp_nif.so, which was put there by hand"]),
    ?assertEqual({ok, <<"by hand">>}, file:read_file(library(Config))),
    ?assertEqual(["erlmcp_nif.so"], in_priv(Config)),
    %% Where there is a choice, it is that of the sources.
    add_cargo(Config, 0),
    {0, _} = build(Config, []),
    ?assertEqual(sum(<<"by cargo">>), installed(Config)).


%% The library is loaded only by modules of its version, so the third one is right where any other suite passes.
versions_agree(Config) ->
    _ = application:load(erlmcp_native),
    {ok, Version} = application:get_key(erlmcp_native, vsn),
    ?assertNotEqual(nomatch, string:prefix(name(Config), "erlmcp_nif-" ++ Version ++ "-nif-2.")).


library_lands_where_mix_expects_it(Config) ->
    Folder = filename:join(?config(folder, Config), "_build/dev/lib/erlmcp_native"),
    ok = filelib:ensure_dir(filename:join(Folder, "any")),
    add_cargo(Config, 0),
    {0, _} = build(Config, [{"REBAR_BARE_COMPILER_OUTPUT_DIR", Folder}]),
    ?assertEqual({ok, <<"by cargo">>}, file:read_file(filename:join(Folder, "priv/erlmcp_nif.so"))),
    ?assertEqual([], in_priv(Config)).


%% The libraries of other targets stay in the manifest, and those of other versions do not.
prebuild_writes_the_manifest(Config) ->
    Name = name(Config),
    Other = re:replace(Name, "[^-.]*-unknown", "sparc64-unknown", [{return, list}]),
    Former = re:replace(Name, "nif-[0-9.]*-", "nif-0.0.9-", [{return, list}]),
    manifest(Config, [{<<"damaged">>, Name}, {<<"other">>, Other}, {<<"former">>, Former}]),
    add_cargo(Config, 0),
    Bin = ?config(bin, Config),
    Target = target(Config),
    ok = filelib:ensure_dir(filename:join([Bin, "lib/rustlib", Target, "lib/any"])),
    write_script(filename:join(Bin, "rustc"),
                 ["case $1 in\n-vV) echo 'host: ", Target, "' ;;\n--print) echo '", Bin, "' ;;\nesac\n"]),
    Built = filename:join(?config(tree, Config), "target/release/liberlmcp_nif.so"),
    ok = filelib:ensure_dir(Built),
    ok = file:write_file(Built, "by cargo"),
    {1, Output} = run(Config, ["native/prebuild.sh", "sparc64-unknown-linux-gnu", Target], [], ?RUN_MS),
    contains(Output, ["rustup target add sparc64-unknown-linux-gnu", Name ++ " " ++ sum(<<"by cargo">>)]),
    {ok, Manifest} = file:read_file(manifest_file(Config)),
    ?assertEqual(lists:sort([sum(<<"by cargo">>) ++ "  " ++ Name, sum(<<"other">>) ++ "  " ++ Other]),
                 lists:sort([ Line || [Char | _] = Line <- string:lexemes(binary_to_list(Manifest), "\n"), Char =/= $# ])),
    %% What one script publishes is what the other one takes.
    {0, _} = build(Config, [{"ERLMCP_NATIVE_PREBUILT", filename:join(?config(tree, Config), "target/prebuilt")}]),
    ?assertEqual(sum(<<"by cargo">>), installed(Config)).


%%% The application


%% Compiled by rebar3 on a machine without Rust; then the library is at hand.
application_runs_without_the_library_and_with_it(Config) ->
    Tree = ?config(tree, Config),
    [ copy(filename:join(?config(root, Config), Part), filename:join(Tree, Part))
      || Part <- ["erlang", "rebar.config", "rebar.lock"] ],
    [ ok = file:make_symlink(executable(Program), filename:join(?config(bin, Config), Program)) || Program <- ["rebar3", "uname"] ],
    Home = filename:join(?config(folder, Config), "rebar3_home"),
    Env = [{"REBAR_GLOBAL_CONFIG_DIR", Home}, {"REBAR_CACHE_DIR", Home}],
    {0, Without} = run(Config, ["rebar3", "compile"], Env, ?BUILD_MS),
    contains(Without, ["compiled without the native library, because cargo is not on the PATH", "mode current"]),
    ?assertMatch({current, {not_loaded, _}}, in_node(Tree)),
    {0, With} = run(Config, ["rebar3", "compile"], [{"ERLMCP_NATIVE_PREBUILT", ?config(published, Config)} | Env], ?BUILD_MS),
    contains(With, ["took the prebuilt library"]),
    ?assertEqual({'100x', loaded}, in_node(Tree)).


%% Routes a message to this process through a node with the compiled application.
in_node(Tree) ->
    Ebin = filename:join(Tree, "_build/default/lib/erlmcp_native/ebin"),
    {ok, Peer, _} = peer:start_link(#{connection => standard_io, args => ["-pa", Ebin], wait_boot => ?RUN_MS}),
    Call = fun(Module, Function, Arguments) -> peer:call(Peer, Module, Function, Arguments, ?RUN_MS) end,
    {ok, [erlmcp_native]} = Call(application, ensure_all_started, [erlmcp_native]),
    {ok, _} = Call(gen_server, start, [{local, erlmcp_registry}, erlmcp_registry, [], []]),
    Receiver = Call(erlang, whereis, [erlmcp_native_sup]),
    ok = Call(erlmcp_registry, register_server, [server, Receiver, #{}]),
    ok = Call(erlmcp_registry, route_to_server, [server, transport, hello]),
    {ok, {Receiver, #{}}} = Call(erlmcp_registry, find_server, [server]),
    #{mode := Mode, nif := Nif} = Call(erlmcp_native, info, []),
    ok = peer:stop(Peer),
    {Mode, Nif}.


%%% What the cases share


%% The compile succeeds, says why the prebuilt library was not taken, and leaves no file.
refuses(Config, Prebuilt, Parts) ->
    {0, Output} = build(Config, [{"ERLMCP_NATIVE_PREBUILT", Prebuilt}]),
    [Reason, Consequence] = string:lexemes(Output, "\n"),
    contains(Reason, ["erlmcp_native: no prebuilt library: " | Parts]),
    contains(Consequence,
             ["erlmcp_native: compiled without the native library, because cargo is not on the PATH.",
              "mode current", "rustup.rs", "ERLMCP_NATIVE_PREBUILT", "rebar3 clean -a", "mix deps.compile"]),
    nothing_installed(Config).


nothing_installed(Config) ->
    ?assertEqual([], in_priv(Config)),
    ?assertEqual([], partial(Config)).


%% Not in the configuration, which Common Test writes into its logs.
contents() ->
    {ok, Library} = file:read_file(filename:join(code:priv_dir(erlmcp_native), "erlmcp_nif.so")),
    Library.


library(Config) ->
    filename:join(?config(tree, Config), "priv/erlmcp_nif.so").


%% The sum of the library in priv/.
installed(Config) ->
    ?assertEqual([], partial(Config)),
    ?assertEqual(["erlmcp_nif.so", "erlmcp_nif.source"], in_priv(Config)),
    {ok, Library} = file:read_file(library(Config)),
    sum(Library).


in_priv(Config) ->
    case file:list_dir_all(filename:join(?config(tree, Config), "priv")) of
        {ok, Names} -> lists:sort(Names);
        {error, enoent} -> []
    end.


%% Files that the script writes before they are complete.
partial(Config) ->
    {ok, Names} = file:list_dir_all(?config(tree, Config)),
    [ Name || ".erlmcp_nif" ++ _ = Name <- Names ].


publish(Config, Library) ->
    ok = file:write_file(filename:join(?config(published, Config), name(Config)), Library).


manifest(Config, Libraries) ->
    ok = file:write_file(manifest_file(Config), ["# Sums\n" | [ [sum(Library), "  ", Name, "\n"] || {Library, Name} <- Libraries ]]).


manifest_file(Config) ->
    filename:join(?config(tree, Config), "native/prebuilt.sha256").


sum(Library) ->
    string:lowercase(binary_to_list(binary:encode_hex(crypto:hash(sha256, Library)))).


name(Config) ->
    sourced(Config, "library_name \"$(library_target)\"").


target(Config) ->
    sourced(Config, "library_target").


sourced(Config, Command) ->
    {0, Output} = run(Config, ["sh", "-c", ". native/library.sh; " ++ Command], [], ?RUN_MS),
    string:trim(Output).


%% A cargo that records its calls and, like the real one, says where the library is.
add_cargo(Config, Status) ->
    Folder = ?config(folder, Config),
    Built = filename:join(Folder, "built.so"),
    ok = file:write_file(Built, "by cargo"),
    write_script(filename:join(?config(bin, Config), "cargo"),
                 ["echo \"$*\" >>'",
                  Folder,
                  "/calls'\n",
                  "[ ",
                  integer_to_list(Status),
                  " = 0 ] || echo 'error: this is what cargo says' >&2\n",
                  "echo '{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"erlmcp_nif\"},\"filenames\":[\"",
                  Built,
                  "\"]}'\n",
                  "exit ",
                  integer_to_list(Status),
                  "\n"]).


cargo_calls(Config) ->
    case file:read_file(filename:join(?config(folder, Config), "calls")) of
        {ok, Calls} -> string:lexemes(binary_to_list(Calls), "\n");
        {error, enoent} -> []
    end.


write_script(File, Lines) ->
    ok = file:write_file(File, ["#!/bin/sh\n" | Lines]),
    ok = file:change_mode(File, 8#755).


%% The address of a server of what is published.
serve(Config) ->
    serve(Config, []).


serve(Config, Options) ->
    {ok, Server} = inets:start(httpd,
                               [{port, 0},
                                {bind_address, {127, 0, 0, 1}},
                                {server_name, "localhost"},
                                {server_root, ?config(published, Config)},
                                {document_root, ?config(published, Config)} | Options]),
    [{port, Port}] = httpd:info(Server, [port]),
    "http://127.0.0.1:" ++ integer_to_list(Port).


end_servers() ->
    [ ok = inets:stop(httpd, Server) || {httpd, Server} <- inets:services() ].


build(Config, Env) ->
    run(Config, ["sh", "native/build.sh"], Env, ?RUN_MS).


%% The exit status and the output of a program in the copy of the tree. The PATH is that of the case.
run(Config, [Program | Arguments], Env, TimeoutMs) ->
    Tree = ?config(tree, Config),
    Executable =
        case filename:pathtype(Program) =:= relative andalso lists:member($/, Program) of
            true -> filename:join(Tree, Program);
            false -> filename:join(?config(bin, Config), Program)
        end,
    Prefixes = ["ERLMCP_", "REBAR_", "ERL_", "http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"],
    Unset = [ {Name, false} || {Name, _} <- os:env(), lists:any(fun(Prefix) -> lists:prefix(Prefix, Name) end, Prefixes) ],
    Port = open_port({spawn_executable, Executable},
                     [{args, Arguments},
                      {cd, Tree},
                      {env, Unset ++ [{"PATH", ?config(bin, Config)}, {"HOME", ?config(folder, Config)} | Env]},
                      exit_status,
                      stderr_to_stdout,
                      hide,
                      binary]),
    collect(Port, <<>>, erlang:monotonic_time(millisecond) + TimeoutMs).


collect(Port, Output, Deadline) ->
    receive
        {Port, {data, Data}} ->
            collect(Port, <<Output/binary, Data/binary>>, Deadline);
        {Port, {exit_status, Status}} ->
            ct:log("~p~n~ts", [Status, Output]),
            {Status, unicode:characters_to_list(Output)}
    after
        max(0, Deadline - erlang:monotonic_time(millisecond)) ->
            ct:fail({timeout, Output})
    end.


contains(Output, Parts) ->
    ?assertEqual([], [ Part || Part <- Parts, string:find(Output, Part) =:= nomatch ], Output).


executable(Program) ->
    Path = os:find_executable(Program),
    Path =/= false orelse ct:fail({not_on_the_path, Program}),
    Path.


copy(From, To) ->
    case filelib:is_dir(From) of
        true ->
            {ok, Names} = file:list_dir_all(From),
            [ copy(filename:join(From, Name), filename:join(To, Name)) || Name <- Names ];
        false ->
            ok = filelib:ensure_dir(To),
            {ok, _} = file:copy(From, To),
            {ok, #file_info{mode = Mode}} = file:read_file_info(From),
            ok = file:change_mode(To, Mode)
    end.


%% The root folder of the sources, found from a folder below it.
project_root(Folder) ->
    case filelib:is_regular(filename:join(Folder, "native/build.sh")) of
        true -> Folder;
        false -> project_root(filename:dirname(Folder))
    end.
