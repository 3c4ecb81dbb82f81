%%% @private
%%% Supervises what looks after the shards: health, recovery, metrics.
%%%
%%% Nothing that routes a message calls any of them, and none needs another one, so each is restarted
%%% alone. The intensity: three processes that are each killed ten times a second make 300 restarts
%%% in the 10 seconds that are looked at, and this bears more than three times as many. A process that
%%% cannot start at all uses them up within a second, and then this supervisor ends.
-module(erlmcp_control_plane_sup).

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
    Flags = #{strategy => one_for_one, intensity => ?INTENSITY, period => ?PERIOD_SECONDS},
    {ok, {Flags, [ child(Module) || Module <- [erlmcp_shard_recovery, erlmcp_shard_metrics, erlmcp_shard_health] ]}}.


-spec child(module()) -> supervisor:child_spec().
child(Module) ->
    #{id => Module, start => {erlmcp_takeover, start_link, [Module, start_link, []]}, modules => [Module]}.
