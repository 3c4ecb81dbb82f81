#!/usr/bin/env escript
%% calls.escript FOLDER: fails for calls of functions of the project that do not exist, in the tests that are compiled in
%% FOLDER/test. xref as rebar3 runs it does not see them.

main([Folder]) ->
    Folders = [ filename:absname_join(Folder, Name) || Name <- ["ebin", "test"] ],
    ok = code:add_pathsa(Folders),
    {undefined, Calls} = lists:keyfind(undefined, 1, xref:d(lists:last(Folders))),
    Own = [ Call || {_, {Module, _, _}} = Call <- Calls,
                    Path <- [code:which(Module)],
                    is_list(Path),
                    lists:member(filename:dirname(Path), Folders) ],
    lists:foreach(fun({{M, F, A}, {OfM, OfF, OfA}}) ->
                          io:format("~ts:~ts/~b calls ~ts:~ts/~b, which does not exist~n", [M, F, A, OfM, OfF, OfA])
                  end,
                  lists:usort(Own)),
    halt(length(lists:sublist(Own, 1))).
