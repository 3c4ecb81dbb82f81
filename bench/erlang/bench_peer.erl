%%% A VM of its own for measurements that must not share memory or a process table with others, and the resident
%%% memory of a VM as the operating system sees it.
-module(bench_peer).

-export([start/0, start/1, stop/1, call/4]).
-export([resident/0, resident_now/0]).

-export_type([peer/0]).

-opaque peer() :: pid().

%% Enough for two million processes. It costs 16 MB before anything is measured.
-define(PROCESSES, "2000000").


%% Starts a VM with the application and both registries running.
-spec start() -> peer().
start() ->
    start([]).


%% Starts such a VM with further arguments of the emulator.
-spec start([string()]) -> peer().
start(Arguments) ->
    Paths = [ filename:absname(Path) || Path <- code:get_path(), Path =/= "." ],
    {ok, Peer, _} = peer:start_link(#{
                                      connection => standard_io,
                                      args => ["+P", ?PROCESSES] ++ Arguments ++ ["-pa" | Paths]
                                     }),
    ok = call(Peer, registry_bench, start_registries, []),
    Peer.


-spec stop(peer()) -> ok.
stop(Peer) ->
    peer:stop(Peer).


-spec call(peer(), module(), atom(), [term()]) -> term().
call(Peer, Module, Function, Arguments) ->
    peer:call(Peer, Module, Function, Arguments, infinity).


%% Resident memory of this VM in bytes, after a garbage collection of all processes.
-spec resident() -> non_neg_integer().
resident() ->
    _ = [ erlang:garbage_collect(Pid) || Pid <- processes() ],
    resident_now().


%% Resident memory of this VM in bytes.
-spec resident_now() -> non_neg_integer().
resident_now() ->
    Kilobytes = case file:read_file("/proc/self/status") of
                    {ok, Status} ->
                        {match, [Digits]} =
                            re:run(Status, "VmRSS:\\s+(\\d+)", [{capture, all_but_first, list}]),
                        Digits;
                    {error, _} ->
                        string:trim(os:cmd("ps -o rss= -p " ++ os:getpid()))
                end,
    list_to_integer(Kilobytes) * 1024.
