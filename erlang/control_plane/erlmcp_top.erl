%%% @private
%%% The busiest shards and connections, for {@link erlmcp_native:busiest/1}.
%%%
%%% Two readings of the counts of all shards make the rates. Mailboxes are looked at by a process of their own, since
%%% process_info/2 waits for a process that is busy in native code: what it has found when its time is over is the result.
-module(erlmcp_top).

-export([busiest/1]).

-export_type([busiest/0, shard/0, connection/0]).

-type busiest() :: #{
                     interval_ms := pos_integer(),
                     shards := [shard()],
                     not_found_per_second := non_neg_integer(),
                     connections := [connection()],
                     connections_looked_at := non_neg_integer(),
                     connections_registered := non_neg_integer()
                    }.
-type shard() :: #{
                   shard_id := erlmcp_admission_control:shard_id(),
                   messages_per_second := non_neg_integer(),
                   refusals_per_second := non_neg_integer(),
                   queue_depth := non_neg_integer(),
                   threshold := pos_integer() | infinity,
                   connections := non_neg_integer()
                  }.
-type connection() :: #{
                        id := term(),
                        pid := pid(),
                        shard_id := erlmcp_admission_control:shard_id(),
                        message_queue_len := pos_integer()
                       }.
-type counts() :: {Ok :: non_neg_integer(), Refused :: non_neg_integer(), NotFound :: non_neg_integer()}.

-define(MAX_INTERVAL_MS, 60_000).
%% Shards by each of three criteria.
-define(SHARDS, 5).
%% Connections that are returned, and that are looked at.
-define(CONNECTIONS, 10).
-define(LOOKS,       1_000).
-define(LOOKING_MS,  500).
%% Places of a shard that are read at a time, with the capabilities of their connections.
-define(PAGE, 64).


-spec busiest(IntervalMs :: 1..60_000) -> busiest() | {error, {native_library, erlmcp_nif:load_error()}}.
busiest(IntervalMs) when is_integer(IntervalMs), IntervalMs >= 1, IntervalMs =< ?MAX_INTERVAL_MS ->
    case erlmcp_registry_native:load_error() of
        none -> measure(IntervalMs);
        LoadError -> {error, {native_library, LoadError}}
    end;
busiest(IntervalMs) ->
    error({bad_option, interval_ms, IntervalMs, "an integer from 1 to 60000"}, [IntervalMs]).


-spec measure(pos_integer()) -> busiest().
measure(IntervalMs) ->
    #{shards := Count} = erlmcp_shard_registry:limits(),
    Ids = lists:seq(0, Count - 1),
    Read = fun() -> {erlang:monotonic_time(microsecond), [ counts(Id) || Id <- Ids ]} end,
    {BeganUs, Before} = Read(),
    ok = timer:sleep(IntervalMs),
    {EndedUs, After} = Read(),
    Us = EndedUs - BeganUs,
    Rates = [ {per_second(Ok1 - Ok0, Us), per_second(Refused1 - Refused0, Us), NotFound1 - NotFound0}
              || {{Ok0, Refused0, NotFound0}, {Ok1, Refused1, NotFound1}} <- lists:zip(Before, After) ],
    Shards = [ shard(Id, Ok, Refused) || {Id, {Ok, Refused, _}} <- lists:zip(Ids, Rates) ],
    {Connections, LookedAt} = look([ Id || #{shard_id := Id} <- by(queue_depth, Shards) ]),
    #{
      interval_ms => max(1, Us div 1_000),
      shards => by(messages_per_second, busy(Shards)),
      not_found_per_second => per_second(lists:sum([ NotFound || {_, _, NotFound} <- Rates ]), Us),
      connections => Connections,
      connections_looked_at => LookedAt,
      connections_registered => erlmcp_shard_registry:count()
     }.


-spec counts(erlmcp_admission_control:shard_id()) -> counts().
counts(Id) ->
    #{not_found := NotFound} = Refused = erlmcp_shard_metrics:refused(Id),
    {erlmcp_shard_metrics:admitted(Id), lists:sum(maps:values(Refused)) - NotFound, NotFound}.


-spec per_second(non_neg_integer(), Us :: pos_integer()) -> non_neg_integer().
per_second(Count, Us) ->
    (Count * 1_000_000 + Us div 2) div Us.


-spec shard(erlmcp_admission_control:shard_id(), non_neg_integer(), non_neg_integer()) -> shard().
shard(Id, Messages, Refusals) ->
    {Depth, Threshold, _IsOverloaded} = erlmcp_admission_control:load(Id),
    #{
      shard_id => Id,
      messages_per_second => Messages,
      refusals_per_second => Refusals,
      queue_depth => Depth,
      threshold => Threshold,
      connections => erlmcp_shard_registry:count(Id)
     }.


-spec busy([shard()]) -> [shard()].
busy(Shards) ->
    lists:usort(lists:append([ lists:sublist([ Shard || #{Key := Value} = Shard <- by(Key, Shards), Value > 0 ], ?SHARDS)
                               || Key <- [messages_per_second, queue_depth, refusals_per_second] ])).


%% The largest value first.
-spec by(messages_per_second | queue_depth | refusals_per_second, [shard()]) -> [shard()].
by(Key, Shards) ->
    lists:sort(fun(#{Key := One}, #{Key := Other}) -> One >= Other end, Shards).


%%% Mailboxes


%% The longest mailboxes, and the number of connections that were looked at.
-spec look([erlmcp_admission_control:shard_id()]) -> {[connection()], non_neg_integer()}.
look(Shards) ->
    To = self(),
    {Looking, Monitor} = spawn_monitor(fun() -> look(To, Shards, 0, ?LOOKS) end),
    Timer = erlang:start_timer(?LOOKING_MS, self(), stop),
    Found = collect(Looking, Monitor, Timer, {[], 0}),
    _ = erlang:cancel_timer(Timer),
    receive
        {timeout, Timer, stop} -> ok
    after
        0 ->
            ok
    end,
    Found.


-spec collect(pid(), reference(), reference(), {[connection()], non_neg_integer()}) -> {[connection()], non_neg_integer()}.
collect(Looking, Monitor, Timer, {Longest, LookedAt} = Found) ->
    receive
        {Looking, Connections, Number} ->
            collect(Looking, Monitor, Timer, {longest(Connections ++ Longest), LookedAt + Number});
        {timeout, Timer, stop} ->
            true = exit(Looking, kill),
            collect(Looking, Monitor, Timer, Found);
        {'DOWN', Monitor, process, Looking, Reason} when Reason =:= normal; Reason =:= killed ->
            Found;
        {'DOWN', Monitor, process, Looking, Reason} ->
            error(Reason)
    end.


-spec longest([connection()]) -> [connection()].
longest(Connections) ->
    Sorted = lists:sort(fun(#{message_queue_len := One}, #{message_queue_len := Other}) -> One >= Other end, Connections),
    lists:sublist(Sorted, ?CONNECTIONS).


%% Sends what each page has, so that nothing is lost if this process is killed.
-spec look(pid(), [erlmcp_admission_control:shard_id()], Place :: non_neg_integer() | none, Left :: integer()) -> ok.
look(_To, _Shards, _Place, Left) when Left =< 0 ->
    ok;
look(_To, [], _Place, _Left) ->
    ok;
look(To, [_Shard | Shards], none, Left) ->
    look(To, Shards, 0, Left);
look(To, [Shard | _] = Shards, Place, Left) ->
    {Rows, Next} = erlmcp_registry_native:page(default, connection, Shard, Place, ?PAGE),
    Local = lists:sublist([ {Id, Pid} || {Id, Pid, _Capabilities, _Binding} <- Rows, node(Pid) =:= node() ], Left),
    Found = [ #{id => Id, pid => Pid, shard_id => Shard, message_queue_len => Length}
              || {Id, Pid} <- Local,
                 {message_queue_len, Length} <- [process_info(Pid, message_queue_len)],
                 Length > 0 ],
    To ! {self(), longest(Found), length(Local)},
    look(To, Shards, Next, Left - length(Local)).
