%%% @private
%%% What the recovery of shards must not forget when its process ends: a table that belongs to the top
%%% supervisor, and so outlives {@link erlmcp_shard_recovery}, its supervisor, and the managers' one.
%%%
%%% Subscribers; which manager was known for a shard; since when it is missing; which shards have
%%% recovered and are being checked, and which were found damaged; and the downtimes.
-module(erlmcp_shard_recovery_records).

-export([new/0]).
%% Subscribers
-export([subscribe/1, unsubscribe/1, subscribers/0]).
%% Shards
-export([manager/1, set_manager/2]).
-export([went_down/3, came_up/1, down/0]).
-export([checking/3, checked/2, unchecked/0]).
-export([set_damaged/1, repaired/1, damaged/0]).
%% Signs of life
-export([set_alive_us/1, alive_us/0]).
%% Downtimes
-export([add_downtime/2, downtimes/0]).

-export_type([kind/0]).

-type shard_id() :: erlmcp_admission_control:shard_id().
-type kind() :: exact | bound.
%% Whether a downtime was measured, or is an upper bound since nobody was there to see its beginning.

%% Downtimes that are kept for the median.
-define(KEPT, 1_000).


%% Makes the table; it goes with the calling process.
-spec new() -> ok.
new() ->
    _ = ets:new(?MODULE, [named_table, public, {read_concurrency, true}]),
    ok.


%%% Subscribers


%% `false' where the application is not running, and there is no table.
-spec subscribe(pid()) -> boolean().
subscribe(Pid) ->
    try
        ets:insert(?MODULE, {{subscriber, Pid}})
    catch
        error:badarg -> false
    end.


-spec unsubscribe(pid()) -> boolean().
unsubscribe(Pid) ->
    try
        ets:delete(?MODULE, {subscriber, Pid})
    catch
        error:badarg -> false
    end.


-spec subscribers() -> [pid()].
subscribers() ->
    [ Pid || [Pid] <- match({{subscriber, '$1'}}) ].


%%% Shards


%% The manager that was there last.
-spec manager(shard_id()) -> pid() | none.
manager(Shard) ->
    case match({{manager, Shard}, '$1'}) of
        [[Pid]] -> Pid;
        [] -> none
    end.


-spec set_manager(shard_id(), pid()) -> ok.
set_manager(Shard, Pid) ->
    insert({{manager, Shard}, Pid}).


-spec went_down(shard_id(), SinceUs :: integer(), kind()) -> ok.
went_down(Shard, SinceUs, Kind) ->
    insert({{down, Shard}, SinceUs, Kind}).


-spec came_up(shard_id()) -> ok.
came_up(Shard) ->
    delete({down, Shard}).


-spec down() -> [{shard_id(), SinceUs :: integer(), kind()}].
down() ->
    [ {Shard, SinceUs, Kind} || [Shard, SinceUs, Kind] <- match({{down, '$1'}, '$2', '$3'}) ].


%% Has this manager now after so long without one, and nobody has been told.
-spec checking(shard_id(), pid(), DowntimeUs :: non_neg_integer()) -> ok.
checking(Shard, Manager, DowntimeUs) ->
    insert({{checking, Shard, Manager}, DowntimeUs}).


-spec checked(shard_id(), pid()) -> ok.
checked(Shard, Manager) ->
    delete({checking, Shard, Manager}).


-spec unchecked() -> [{shard_id(), pid(), DowntimeUs :: non_neg_integer()}].
unchecked() ->
    [ {Shard, Manager, DowntimeUs} || [Shard, Manager, DowntimeUs] <- match({{checking, '$1', '$2'}, '$3'}) ].


%% Returns whether that is news.
-spec set_damaged(shard_id()) -> boolean().
set_damaged(Shard) ->
    ets:insert_new(?MODULE, {{damaged, Shard}}).


%% Returns whether that is news.
-spec repaired(shard_id()) -> boolean().
repaired(Shard) ->
    ets:take(?MODULE, {damaged, Shard}) =/= [].


-spec damaged() -> [shard_id()].
damaged() ->
    lists:sort([ Shard || [Shard] <- match({{damaged, '$1'}}) ]).


%%% Signs of life


%% The process that watches the managers was watching them at that time.
-spec set_alive_us(integer()) -> ok.
set_alive_us(Us) ->
    insert({alive_us, Us}).


-spec alive_us() -> integer() | none.
alive_us() ->
    case match({alive_us, '$1'}) of
        [[Us]] -> Us;
        [] -> none
    end.


%%% Downtimes


-spec add_downtime(DowntimeUs :: non_neg_integer(), kind()) -> ok.
add_downtime(Us, Kind) ->
    {Count, Sum, Worst, Latest} = downtimes(Kind),
    insert({{downtimes, Kind}, Count + 1, Sum + Us, max(Worst, Us), lists:sublist([Us | Latest], ?KEPT)}).


%% Of a kind: how many, their sum, the worst, and the latest ones; zeros without any.
-spec downtimes() -> #{kind() => {non_neg_integer(), non_neg_integer(), non_neg_integer(), [non_neg_integer()]}}.
downtimes() ->
    #{exact => downtimes(exact), bound => downtimes(bound)}.


-spec downtimes(kind()) -> {non_neg_integer(), non_neg_integer(), non_neg_integer(), [non_neg_integer()]}.
downtimes(Kind) ->
    case match({{downtimes, Kind}, '$1', '$2', '$3', '$4'}) of
        [[Count, Sum, Worst, Latest]] -> {Count, Sum, Worst, Latest};
        [] -> {0, 0, 0, []}
    end.


%%% The table


-spec insert(tuple()) -> ok.
insert(Row) ->
    true = ets:insert(?MODULE, Row),
    ok.


-spec delete(term()) -> ok.
delete(Key) ->
    true = ets:delete(?MODULE, Key),
    ok.


%% Nothing where the application is not running.
-spec match(tuple()) -> [[term()]].
match(Pattern) ->
    try
        ets:match(?MODULE, Pattern)
    catch
        error:badarg -> []
    end.
