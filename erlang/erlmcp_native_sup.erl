%%% @private
%%% The top supervisor. Registrations live in native memory and routing runs in the callers, so what
%%% it looks after can be restarted at any time. Where the native library is not loaded there is
%%% nothing to look after.
%%%
%%% The intensity: two supervisors that are each killed ten times a second make 200 restarts in the 10
%%% seconds that are looked at, and this bears five times as many. A start
%%% that always fails uses all of them up within a second, and then the application ends.
-module(erlmcp_native_sup).

-behaviour(supervisor).

-export([start_link/0, init/1]).

-define(INTENSITY,      1_000).
-define(PERIOD_SECONDS, 10).


-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    case supervisor:start_link({local, ?MODULE}, ?MODULE, []) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} -> {error, Reason};
        ignore -> {error, ignore}
    end.


-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    %% On a busy node, too, a restart is made at once.
    _ = process_flag(priority, high),
    Flags = #{strategy => one_for_one, intensity => ?INTENSITY, period => ?PERIOD_SECONDS},
    {ok, {Flags, children(erlmcp_native_registry:load_error())}}.


-spec children(none | erlmcp_nif:load_error()) -> [supervisor:child_spec()].
children(none) ->
    %% Here, so that they outlive the supervisor of those who use them.
    ok = erlmcp_shard_recovery_records:new(),
    ok = erlmcp_shard_health:new(),
    [ supervisor(Module) || Module <- [erlmcp_shard_sup, erlmcp_control_plane_sup] ];
children(_LoadError) ->
    [].


-spec supervisor(module()) -> supervisor:child_spec().
supervisor(Module) ->
    #{id => Module, start => {erlmcp_takeover, start_link, [Module, start_link, []]}, type => supervisor}.
