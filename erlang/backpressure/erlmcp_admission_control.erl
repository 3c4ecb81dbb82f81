%%% @doc Admission control: a bound on the messages that wait in the mailboxes of one shard's
%%% receivers.
%%%
%%% The depth of a shard is an upper bound that needs no help of the receivers: the messages that the last sample of
%%% each mailbox found, and all admitted since. A message that is sent while its receiver is sampled counts twice until the
%%% next sample. A shard at its threshold refuses, independently of other shards.
%%% Receivers that take their messages make room when they are sampled: at once when half of the room is used up, and
%%% otherwise every `sample_interval_ms' while there is traffic. Only receivers that were sent something since they
%%% were last seen empty are sampled, so that the cost depends on messages and not on connections.
%%%
%%% With the threshold `auto' a shard admits 43 messages for each of its receivers (different processes, of this
%%% node), but at least 10,000; and at most 10,000 of them may be charged to one process. Messages that a sample finds
%%% taken are no longer charged. An integer is the exact bound of the shard, and its receivers share it in any way.
%%%
%%% Mailboxes are sampled by {@link erlmcp_shard_manager}. A shard whose last sample is older than
%%% ten intervals admits everything: it never refuses for lack of a sampler.
%%%
%%% The shards are those of the default registry. A number that is not the id of a shard raises `badarg'.
-module(erlmcp_admission_control).

-export([check_admission/1, update_queue_depth/2]).
-export([get_shard_stats/1, set_threshold/1, set_threshold/2]).
-export([load/1, is_unwatched/1]).
-export([count_receivers/1]).

-export_type([shard_id/0, threshold/0, stats/0, percentiles/0]).

-type shard_id() :: non_neg_integer().
-type threshold() :: pos_integer() | auto | infinity.
-type percentiles() :: #{p50 := non_neg_integer(), p95 := non_neg_integer(), p99 := non_neg_integer()}.
-type stats() :: #{
                   shard_id := shard_id(),
                   queue_depth := non_neg_integer(),
                   threshold := pos_integer() | infinity,
                   threshold_mode := threshold(),
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


%% @doc For exact accounting by a receiver that cooperates: the calling process has received so many messages of the
%% shard (`Delta' is negative), or was sent so many by other ways (`Delta' is positive).
%%
%% Received messages make room at once, and are not counted again by a sample. Received messages in excess of
%% those sent to the process make room until the next sample of any mailbox. The depth never goes below zero. Added
%% messages count until the process's own mailbox is sampled. Does nothing while the shard has no threshold.
-spec update_queue_depth(shard_id(), Delta :: integer()) -> ok.
update_queue_depth(ShardId, Delta) ->
    erlmcp_nif:admission_adjust(ShardId, Delta).


%% @doc The statistics of a shard.
%%
%% `queue_depth' is the upper bound described above, 0 while there is no threshold. `threshold' is the one in
%% force, `threshold_mode' the one that was set. For `auto' the receivers are counted if entries were added or removed,
%% which costs in proportion to the entries of the shard. `connections' counts all entries of the shard.
%% `messages_per_second' is the rate of admission in the last interval with traffic. `latency_us' is the time that
%% messages wait in a mailbox, by Little's law: messages found waiting divided by the rate, over the last samples;
%% zeros if there are none. `admitted' counts the messages since the registry was made, while there was a threshold.
-spec get_shard_stats(shard_id()) -> stats().
get_shard_stats(ShardId) ->
    Mode = erlmcp_nif:admission_threshold(ShardId),
    ok = case Mode of
             auto -> count_receivers(ShardId);
             _ -> ok
         end,
    {Depth, Threshold, Admitted, IsOverloaded, SampleAgeMs} = erlmcp_nif:admission_stats(ShardId),
    {Servers, Transports, Connections, _Memberships} = erlmcp_nif:count_shard(default, ShardId),
    {MessagesPerSecond, LatencyUs} = erlmcp_shard_sampler:lookup(ShardId),
    #{
      shard_id => ShardId,
      queue_depth => Depth,
      threshold => Threshold,
      threshold_mode => Mode,
      connections => Servers + Transports + Connections,
      messages_per_second => MessagesPerSecond,
      latency_us => LatencyUs,
      admitted => Admitted,
      is_overloaded => IsOverloaded,
      sample_age_ms => SampleAgeMs
     }.


%% @private
%% Counts the receivers of a shard, unless nothing has changed since the last count.
-spec count_receivers(shard_id()) -> ok.
count_receivers(ShardId) ->
    erlmcp_nif:count_receivers(ShardId).


%% @doc Three values of {@link get_shard_stats/1}, at a fraction of the cost: receivers are not counted.
-spec load(shard_id()) ->
          {QueueDepth :: non_neg_integer(), Threshold :: pos_integer() | infinity, IsOverloaded :: boolean()}.
load(ShardId) ->
    {Depth, Threshold, _Admitted, IsOverloaded, _Age} = erlmcp_nif:admission_stats(ShardId),
    {Depth, Threshold, IsOverloaded}.


%% @doc Whether messages were admitted to this shard since its last sample, and that sample is older than ten
%% intervals: then nothing samples the shard, and it admits everything. A shard without traffic needs no
%% samples.
-spec is_unwatched(shard_id()) -> boolean().
is_unwatched(ShardId) ->
    erlmcp_nif:admission_is_unwatched(ShardId).


%% @doc Changes the threshold of all shards: `erlmcp_native:set(admission, #{threshold => Threshold})', or
%% `infinity'.
-spec set_threshold(threshold()) ->
          ok | {error, erlmcp_native_config:error() | erlmcp_native_config:not_loaded()}.
set_threshold(infinity) ->
    erlmcp_native_config:set(admission, infinity);
set_threshold(Threshold) ->
    erlmcp_native_config:set(admission, #{threshold => Threshold}).


%% @doc Changes the threshold of one shard, until the threshold of all shards is set: by {@link set_threshold/1}, by
%% {@link erlmcp_native:set/2}, or by a start of the application. Raises `badarg' for a threshold that is not
%% within 1 to 2^40. Without the application, which samples, every shard admits everything all the same.
-spec set_threshold(shard_id(), threshold()) -> ok.
set_threshold(ShardId, Threshold) ->
    erlmcp_native_config:set_threshold(ShardId, Threshold).
