%%% @private
%%% Starting a process under a name that its predecessor may still hold.
%%%
%%% A supervisor that is killed leaves orphans: its children end a moment later, by their links. The
%%% supervisor after it then finds their names taken. It cannot say when they will be free, since a
%%% child that was just being started takes its name even later. So whoever holds the name is ended,
%%% its end is waited for, and the start is tried again. A name is given free before the `DOWN' of
%%% its process is sent, so each further attempt is another orphan's doing, and a supervisor that is
%%% gone starts no more of them.
%%%
%%% It is right for names that one supervisor alone gives: a process that has the name and is not
%%% this supervisor's child is an orphan.
-module(erlmcp_takeover).

-export([start_link/3]).


%% @doc `apply(Module, Function, Arguments)', which starts a process under a name and links it.
-spec start_link(module(), atom(), [term()]) -> {ok, pid()} | {error, term()}.
start_link(Module, Function, Arguments) ->
    case apply(Module, Function, Arguments) of
        {error, {already_started, Orphan}} ->
            ok = end_process(Orphan),
            start_link(Module, Function, Arguments);
        Result ->
            Result
    end.


%% `undefined': it had the name when that was to be given to another one, and not any more a moment later.
-spec end_process(pid() | undefined) -> ok.
end_process(undefined) ->
    ok;
end_process(Pid) ->
    Monitor = monitor(process, Pid),
    true = exit(Pid, kill),
    receive
        {'DOWN', Monitor, process, Pid, _Reason} -> ok
    end.
