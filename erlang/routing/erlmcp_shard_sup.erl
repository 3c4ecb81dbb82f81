%%% @private
%%% Supervises one manager a shard of the default registry.
%%%
%%% Managers own nothing that others need to go on, so each is restarted alone. The intensity is
%%% there for managers that are killed at random under load, ten a second and for minutes, which
%%% makes 100 restarts in the 10 seconds that are looked at; and for all 1,024 that there can be,
%%% killed at once. Ten times the former is no accident any more.
%%%
%%% After a supervisor before it was killed, its managers may still be there: see {@link
%%% erlmcp_takeover}.
-module(erlmcp_shard_sup).

-behaviour(supervisor).

-export([start_link/0, init/1]).

-define(INTENSITY,      2_000).
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
    %% Managers start one after the other; on a busy node each start would wait for its turn.
    _ = process_flag(priority, high),
    ok = erlmcp_shard_stats:new(),
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Flags = #{strategy => one_for_one, intensity => ?INTENSITY, period => ?PERIOD_SECONDS},
    {ok, {Flags, [ manager(Shard) || Shard <- lists:seq(0, Shards - 1) ]}}.


-spec manager(non_neg_integer()) -> supervisor:child_spec().
manager(Shard) ->
    #{
      id => Shard,
      start => {erlmcp_takeover, start_link, [erlmcp_shard_manager, start_link, [Shard]]},
      modules => [erlmcp_shard_manager]
     }.
