%%% Elixir, where it is installed.
-module(bench_elixir).

-export([start/0]).


%% Makes Elixir's modules known to this VM and starts its application.
-spec start() -> ok | not_installed.
start() ->
    case os:find_executable("elixir") of
        false ->
            io:format(standard_error, "(without Elixir) ", []),
            not_installed;
        Executable ->
            true = code:add_pathz(ebin(Executable)),
            {ok, _} = application:ensure_all_started(elixir),
            ok
    end.


%% The script prints where it looks for its code.
-spec ebin(file:filename()) -> file:filename().
ebin(Executable) ->
    Output = os:cmd("'" ++ Executable ++ "' -e 'IO.write(:code.lib_dir(:elixir))'"),
    Ebin = filename:join(Output, "ebin"),
    true = filelib:is_dir(Ebin),
    Ebin.
