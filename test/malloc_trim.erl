%%% Returns memory that is free to the operating system, so that the resident memory of a node shows what is in use.
%%%
%%% After millions of allocations of all sizes the C library keeps tens of megabytes of free memory: among objects in use, and
%%% in an arena for each thread.
-module(malloc_trim).

-export([build/1, load/1, trim/0]).

-nifs([trim/0]).


%% Compiles the library in this folder. `none' where there is no C compiler, no header of NIFs, or another C library.
-spec build(file:filename()) -> {ok, file:filename()} | none.
build(Folder) ->
    Source = filename:join(filename:dirname(proplists:get_value(source, module_info(compile))), "malloc_trim.c"),
    Library = filename:join(Folder, "malloc_trim"),
    Include = filename:join([code:root_dir(), "usr", "include"]),
    Command = io_lib:format("cc -shared -fPIC -I '~ts' -o '~ts.so' '~ts' && echo built", [Include, Library, Source]),
    case lists:suffix("built\n", os:cmd(lists:flatten(Command))) of
        true -> {ok, Library};
        false -> none
    end.


%% Loads the library in this node.
-spec load({ok, file:filename()} | none) -> ok.
load({ok, Library}) -> erlang:load_nif(Library, 0);
load(none) -> ok.


%% Without the library does nothing.
-spec trim() -> ok.
trim() ->
    ok.
