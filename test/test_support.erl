%%% What several suites need and none of them is about: functions that run in a node of their own.
-module(test_support).

-export([in_peer/2, in_peer/4, start_peer/2]).

%% flags are arguments of the emulator; timeout_ms is for the function and not for the start of its node.
-type peer_options() :: #{flags => [string()], timeout_ms => timeout()}.

-define(BOOT_MS, 60_000).
-define(CALL_MS, 60_000).

%%% Nodes


-spec in_peer(module(), atom()) -> term().
in_peer(Module, Function) ->
    in_peer(Module, Function, [], #{}).


%% What the function returns in a node of its own, whose end ends the case.
-spec in_peer(module(), atom(), [term()], peer_options()) -> term().
in_peer(Module, Function, Arguments, Options) ->
    {ok, Peer, _} = start_peer(Module, #{args => maps:get(flags, Options, [])}),
    Result = peer:call(Peer, Module, Function, Arguments, maps:get(timeout_ms, Options, ?CALL_MS)),
    peer:stop(Peer),
    Result.


%% A node that finds the module and all that this one finds. It ends with the process that starts it.
-spec start_peer(module(), peer:start_options()) -> {ok, pid(), node()}.
start_peer(Module, Options) ->
    Root = code:root_dir(),
    Paths = [ filename:absname(Path) || Path <- code:get_path(), not lists:prefix(Root, Path), Path =/= "." ],
    %% Compiled for cover, a module has no file.
    Own = [ filename:dirname(File) || File <- [code:which(Module)], is_list(File) ],
    {ok, _, _} = peer:start_link(Options#{
                                   connection => standard_io,
                                   wait_boot => ?BOOT_MS,
                                   args => maps:get(args, Options, []) ++ ["-pa" | Paths ++ Own]
                                  }).
