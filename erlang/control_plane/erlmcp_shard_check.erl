%%% @private
%%% Whether the entries of a shard are what they should be: no process among them that has ended, and
%%% as many as are counted.
%%%
%%% Registrations go on meanwhile, and processes end before their entries go. So one look proves
%%% nothing but that all is well. What is wrong must be so at every look, over some five seconds:
%%% the <em>same</em> ended processes, and a number of entries that was at no time between the counts of
%%% before and after the walk. Each look is one native call on a dirty scheduler.
-module(erlmcp_shard_check).

-export([run/1, exit_with_verdict/1]).

-export_type([verdict/0, damage/0]).

-type damage() :: #{
                    ended => [pid()],
                    found => non_neg_integer(),
                    counted => {Before :: non_neg_integer(), After :: non_neg_integer()}
                   }.
%% The ended processes that are still registered; what was found and counted at the last look.

-type verdict() :: ok | {damaged, damage()}.

%% Between two looks; 5.1 s together.
-define(PAUSES_MS, [10, 20, 40, 80, 160, 320, 640, 1280, 2560]).


%% @doc Looks at a shard of the default registry until all is well or nothing has changed for long.
-spec run(erlmcp_admission_control:shard_id()) -> verdict().
run(Shard) ->
    run(Shard, look(Shard), ?PAUSES_MS).


%% @doc As {@link run/1}, in a process of its own that ends with `{verdict, Verdict}'.
-spec exit_with_verdict(erlmcp_admission_control:shard_id()) -> no_return().
exit_with_verdict(Shard) ->
    exit({verdict, run(Shard)}).


-spec run(erlmcp_admission_control:shard_id(), damage(), [pos_integer()]) -> verdict().
run(_Shard, Damage, _PausesMs) when map_size(Damage) =:= 0 ->
    ok;
run(_Shard, Damage, []) ->
    {damaged, Damage};
run(Shard, Damage, [PauseMs | PausesMs]) ->
    ok = timer:sleep(PauseMs),
    run(Shard, in_both(Damage, look(Shard)), PausesMs).


%% Empty if all is well.
-spec look(erlmcp_admission_control:shard_id()) -> damage().
look(Shard) ->
    #{found := Found, counted := {Before, After} = Counted, ended := Ended} =
        erlmcp_native_registry:check_shard(default, Shard),
    Wrong = [ {ended, lists:usort(Ended)} || Ended =/= [] ] ++
        [ Fact || Found < min(Before, After) orelse Found > max(Before, After),
                  Fact <- [{found, Found}, {counted, Counted}] ],
    maps:from_list(Wrong).


%% What is wrong still.
-spec in_both(damage(), damage()) -> damage().
in_both(Former, Present) ->
    Ended = ordsets:intersection(maps:get(ended, Former, []), maps:get(ended, Present, [])),
    Counts = maps:with([ Key || Key <- [found, counted], is_map_key(Key, Former) ], Present),
    case Ended of
        [] -> maps:remove(ended, Counts);
        _ -> Counts#{ended => Ended}
    end.
