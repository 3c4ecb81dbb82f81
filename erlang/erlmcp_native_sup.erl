%%% @private
%%% The top supervisor. Registrations live in native memory and routing runs in the callers, so what
%%% it looks after can be restarted at any time.
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


-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    {ok, {#{strategy => one_for_one}, children(erlmcp_native_registry:load_error())}}.


%% Without the native library there is nothing to look after.
-spec children(none | erlmcp_nif:load_error()) -> [supervisor:child_spec()].
children(none) ->
    [#{id => erlmcp_shard_sup, start => {erlmcp_shard_sup, start_link, []}, type => supervisor}];
children(_LoadError) ->
    [].
