#!/usr/bin/env escript
%% -*- erlang -*-

%%% Compiles the application and its tests with the options of rebar.config and warnings as errors, and runs
%%% suites. It works without rebar3, which may not exist for the release. See test/otp.

-mode(compile).


main(Patterns) ->
    Root = filename:dirname(filename:dirname(filename:absname(escript:script_name()))),
    ok = file:set_cwd(Root),
    {ok, Project} = file:consult("rebar.config"),
    Profiles = proplists:get_value(profiles, Project, []),
    Test = proplists:get_value(test, Profiles, []),
    Options = proplists:get_value(erl_opts, Project, []),
    TestOptions = Options ++ proplists:get_value(erl_opts, Test, []),
    Compiled = compile(files("erlang/**/*.erl"), "ebin", Options),
    ok = application_file(Compiled),
    true = code:add_patha(filename:absname("ebin")),
    Others = compile(files("test/*.erl"), "test", TestOptions) ++ compile(files("bench/erlang/*.erl"), "bench", Options),
    %% Of open_loop_SUITE.
    true = code:add_patha(filename:absname("bench")),
    Suites = suites(Patterns),
    io:format("Erlang/OTP ~s: ~b modules compiled without a warning; ~s~n",
              [otp_version(), length(Compiled ++ Others), lists:join(" ", Suites)]),
    run(Suites).


otp_version() ->
    File = filename:join([code:root_dir(), "releases", erlang:system_info(otp_release), "OTP_VERSION"]),
    case file:read_file(File) of
        {ok, Version} -> string:trim(Version);
        {error, enoent} -> erlang:system_info(otp_release)
    end.


files(Pattern) ->
    lists:sort(filelib:wildcard(Pattern)).


compile(Files, Folder, Options) ->
    ok = filelib:ensure_dir(filename:join(Folder, "any")),
    Results = [ {File, compile:file(File, [{outdir, Folder}, warnings_as_errors, report | Options])} || File <- Files ],
    case [ File || {File, Result} <- Results, element(1, tuple(Result)) =/= ok ] of
        [] ->
            [ list_to_atom(filename:basename(File, ".erl")) || File <- Files ];
        Failed ->
            io:format("does not compile without warnings: ~s~n", [lists:join(" ", Failed)]),
            halt(1)
    end.


tuple(error) -> {error};
tuple(Result) -> Result.


application_file(Modules) ->
    {ok, [{application, Name, Keys}]} = file:consult("erlang/erlmcp_native.app.src"),
    Application = {application, Name, lists:keystore(modules, 1, Keys, {modules, Modules})},
    file:write_file("ebin/erlmcp_native.app", io_lib:format("~p.~n", [Application])).


suites(Patterns) ->
    Files = lists:usort(lists:append([ filelib:wildcard(Pattern ++ ".beam", "test") || Pattern <- Patterns ])),
    Files =/= [] orelse
        begin
            io:format("no such suite: ~s~n", [lists:join(" ", Patterns)]),
            halt(2)
        end,
    [ filename:basename(File, ".beam") || File <- Files ].


%% Prints the results in the format of rebar3, which test/run parses.
run(Suites) ->
    ok = filelib:ensure_dir("logs/any"),
    %% Common Test writes log events to its own logs.
    ok = logger:set_handler_config(default, level, none),
    Result = ct:run_test([{dir, filename:absname("test")},
                          {suite, Suites},
                          {auto_compile, false},
                          {logdir, filename:absname("logs")},
                          {abort_if_missing_suites, true}]),
    case Result of
        {Passed, 0, {0, 0}} ->
            io:format("All ~b tests passed.~n", [Passed]),
            halt(0);
        {Passed, 0, {UserSkipped, 0}} ->
            io:format("Skipped ~b (~b, 0) tests. Passed ~b tests.~n", [UserSkipped, UserSkipped, Passed]),
            halt(0);
        {Passed, Failed, {UserSkipped, AutoSkipped}} ->
            io:format("Failed ~b tests. Skipped ~b (~b, ~b) tests. Passed ~b tests.~n",
                      [Failed, UserSkipped + AutoSkipped, UserSkipped, AutoSkipped, Passed]),
            halt(1);
        {error, Reason} ->
            io:format("Common Test: ~tp~n", [Reason]),
            halt(1)
    end.
