%%% @private
%%% The top supervisor. Registrations live in native memory and routing runs in the callers, so it
%%% has no processes to look after as yet.
-module(erlmcp_native_sup).

-behaviour(supervisor).

-export([start_link/0, init/1]).


-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    case supervisor:start_link({local, ?MODULE}, ?MODULE, []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.


-spec init([]) -> {ok, {supervisor:sup_flags(), []}}.
init([]) ->
    {ok, {#{strategy => one_for_one}, []}}.
