%%% Ctrl-C ends a run early, with what it has measured: `bench/run' turns SIGINT into SIGTERM, because the VM does not let
%%% programs handle SIGINT.
-module(bench_interrupt).
-behaviour(gen_event).

-export([start/1, stop/0]).
-export([init/1, handle_event/2, handle_call/2]).


%% From now on the process gets the message `interrupted' at SIGTERM, and the VM does not stop.
-spec start(pid()) -> ok.
start(Pid) ->
    gen_event:swap_handler(erl_signal_server, {erl_signal_handler, []}, {?MODULE, Pid}).


%% SIGTERM stops the VM again.
-spec stop() -> ok.
stop() ->
    gen_event:swap_handler(erl_signal_server, {?MODULE, []}, {erl_signal_handler, []}).


-spec init({pid() | [], term()}) -> {ok, pid()}.
init({Pid, _}) ->
    {ok, Pid}.


-spec handle_event(Signal :: atom(), pid()) -> {ok, pid()}.
handle_event(sigterm, Pid) ->
    Pid ! interrupted,
    {ok, Pid};
handle_event(_Signal, Pid) ->
    {ok, Pid}.


-spec handle_call(term(), pid()) -> {ok, ok, pid()}.
handle_call(_Request, Pid) ->
    {ok, ok, Pid}.
