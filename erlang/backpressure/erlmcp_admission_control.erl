%%% @doc Admission control: a bound on the messages that wait in the mailboxes of one shard's
%%% receivers.
%%%
%%% The depth of a shard is an upper bound that needs no help of the receivers: what the last sample
%%% of their mailboxes found, and everything admitted since. A shard at its threshold refuses alone.
%%% Receivers that take their messages make room with the next sample, which is taken at once when
%%% half of the room is used up, and else every `sample_interval_ms' while there is traffic.
%%%
%%% Mailboxes are sampled by {@link erlmcp_shard_manager}. A shard whose last sample is older than
%%% ten intervals admits everything: it is never refused for want of a sampler.
%%%
%%% The shards are those of the default registry. A shard id that is none raises `badarg'.
-module(erlmcp_admission_control).

-export([check_admission/1, update_queue_depth/2]).
-export([get_shard_stats/1, set_threshold/1, set_threshold/2]).
-export([load/1, is_unwatched/1]).

-export_type([shard_id/0, stats/0, percentiles/0]).

-type shard_id() :: non_neg_integer().
-type percentiles() :: #{p50 := non_neg_integer(), p95 := non_neg_integer(), p99 := non_neg_integer()}.
-type stats() :: #{
                   shard_id := shard_id(),
                   queue_depth := non_neg_integer(),
                   threshold := pos_integer() | infinity,
                   connections := non_neg_integer(),
                   messages_per_second := non_neg_integer(),
                   latency_us := percentiles(),
                   admitted := non_neg_integer(),
                   is_overloaded := boolean(),
                   sample_age_ms := non_neg_integer() | infinity
                  }.


%% @doc Whether a message to this shard would be admitted now. Changes nothing.
-spec check_admission(shard_id()) -> ok | {error, shard_overloaded}.
check_admission(ShardId) ->
    case erlmcp_nif:admission_check(ShardId) of
        true -> ok;
        false -> {error, shard_overloaded}
    end.


%% @doc For exact accounting between samples: `Delta' messages were queued, or taken if it is negative.
%% The depth never goes below zero, and the next sample finds out what it really is.
-spec update_queue_depth(shard_id(), Delta :: integer()) -> ok.
update_queue_depth(ShardId, Delta) ->
    erlmcp_nif:admission_adjust(ShardId, Delta).


%% @doc What is known of a shard.
%%
%% `queue_depth' is the upper bound described above, 0 while there is no threshold. `connections'
%% counts all entries of the shard. `messages_per_second' is the rate of admission in the last
%% interval with traffic. `latency_us' is the time that messages wait in a mailbox, as Little's law
%% has it: messages found waiting divided by the rate, over the last samples; zeros without any.
%% `admitted' counts the messages since the registry was made, while there was a threshold.
-spec get_shard_stats(shard_id()) -> stats().
get_shard_stats(ShardId) ->
    {Depth, Threshold, Admitted, IsOverloaded, SampleAgeMs} = erlmcp_nif:admission_stats(ShardId),
    {Servers, Transports, Connections} = erlmcp_nif:count_shard(default, ShardId),
    {MessagesPerSecond, LatencyUs} = erlmcp_shard_stats:lookup(ShardId),
    #{
      shard_id => ShardId,
      queue_depth => Depth,
      threshold => Threshold,
      connections => Servers + Transports + Connections,
      messages_per_second => MessagesPerSecond,
      latency_us => LatencyUs,
      admitted => Admitted,
      is_overloaded => IsOverloaded,
      sample_age_ms => SampleAgeMs
     }.


%% @doc Three of {@link get_shard_stats/1}, at a fraction of its price.
-spec load(shard_id()) ->
          {QueueDepth :: non_neg_integer(), Threshold :: pos_integer() | infinity, IsOverloaded :: boolean()}.
load(ShardId) ->
    {Depth, Threshold, _Admitted, IsOverloaded, _Age} = erlmcp_nif:admission_stats(ShardId),
    {Depth, Threshold, IsOverloaded}.


%% @doc Whether messages were admitted to this shard since its last sample, and that is older than ten
%% intervals: nobody samples it, and it admits everything. A shard where nothing happens needs no
%% samples.
-spec is_unwatched(shard_id()) -> boolean().
is_unwatched(ShardId) ->
    erlmcp_nif:admission_is_unwatched(ShardId).


%% @doc Changes the threshold of all shards, and of the configuration.
-spec set_threshold(pos_integer() | infinity) ->
          ok | {error, erlmcp_native_config:error() | too_many_changes}.
set_threshold(infinity) ->
    erlmcp_backpressure:set(admission, infinity);
set_threshold(Threshold) ->
    Others =
        case erlmcp_native_config:get(admission) of
            infinity -> #{};
            Admission -> Admission
        end,
    erlmcp_backpressure:set(admission, Others#{threshold => Threshold}).


%% @doc Changes the threshold of one shard, until those of all are set: by {@link set_threshold/1}, by {@link
%% erlmcp_backpressure:set/2}, or by a start of the application. Raises `badarg' for a threshold that is not
%% within 1 to 2^40.
-spec set_threshold(shard_id(), pos_integer() | infinity) -> ok.
set_threshold(ShardId, Threshold) ->
    erlmcp_nif:admission_set_threshold(ShardId, Threshold).
