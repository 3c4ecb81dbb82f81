%%% How evenly ids are distributed over the 64 shards, by their shape.
%%%
%%% The figure is the standard deviation of the number of ids in a shard. Beside it is that of ids that are thrown into shards
%%% at random: the square root of n p (1 - p). Rows whose shape is random by itself differ from it by chance; a shape that is
%%% distributed badly would be far above. No clock runs, so the figures do not depend on the machine.
-module(shard_bench).

-export([run/1]).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{connections := Count, progress := Progress}) ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Ideal = math:sqrt(Count / Shards * (1 - 1 / Shards)),
    [ begin
          Ids = [ Id(N) || N <- lists:seq(1, Count) ],
          %% An id that came twice would be counted twice.
          Count = length(lists:usort(Ids)),
          Counts = counts(Ids, Shards),
          _ = Progress(),
          Row = bench_report:size_row("shards",
                                      bench_report:thousands(Count) ++ " ids, " ++ Shape,
                                      deviation(Counts, Count / Shards),
                                      "ids",
                                      "at random",
                                      Ideal),
          %% Above or below the ideal by chance.
          bench_report:growth(Row)
      end
      || {Shape, Id} <- shapes() ].


-spec shapes() -> [{string(), fun((pos_integer()) -> term())}].
shapes() ->
    [{"numbers in order", fun(N) -> N end},
     {"<<\"client-N\">>", fun(N) -> <<"client-", (integer_to_binary(N))/binary>> end},
     {"UUIDs", fun uuid/1},
     {"UUIDs that begin with the time", fun(N) -> <<(hex(<<(1_790_000_000_000 + N):48>>))/binary, (uuid(N))/binary>> end},
     {"hashes in hexadecimal", fun(N) -> hex(crypto:hash(sha256, <<N:32>>)) end},
     {"{client, N}", fun(N) -> {client, N} end},
     {"{session, N, random bytes}", fun(N) -> {session, N, rand:bytes(16)} end}].


%% Of version 4.
-spec uuid(pos_integer()) -> binary().
uuid(_N) ->
    <<A:32, B:16, C:12, D:14, E:48, _:6>> = rand:bytes(16),
    iolist_to_binary(io_lib:format("~8.16.0b-~4.16.0b-4~3.16.0b-~4.16.0b-~12.16.0b", [A, B, C, 2#10 bsl 14 bor D, E])).


-spec hex(binary()) -> binary().
hex(Bytes) ->
    string:lowercase(binary:encode_hex(Bytes)).


%% Of each shard, the empty ones included.
-spec counts([term()], pos_integer()) -> [non_neg_integer()].
counts(Ids, Shards) ->
    Counts = lists:foldl(fun(Id, Sums) ->
                                 maps:update_with(erlmcp_shard_registry:get_shard_id(Id), fun(Sum) -> Sum + 1 end, Sums)
                         end,
                         maps:from_keys(lists:seq(0, Shards - 1), 0),
                         Ids),
    maps:values(Counts).


-spec deviation([non_neg_integer()], float()) -> float().
deviation(Counts, Mean) ->
    math:sqrt(lists:sum([ (Number - Mean) * (Number - Mean) || Number <- Counts ]) / length(Counts)).
