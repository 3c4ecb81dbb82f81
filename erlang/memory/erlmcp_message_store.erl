%%% @doc Bounded queues of messages outside of any process: for a consumer that may be slower than its senders.
%%%
%%% A mailbox has no bound, and its messages are part of its process: each garbage collection of a process that lags behind
%%% costs more, and it is the sender that has to know. A store holds at most `capacity' messages and `max_bytes' bytes in
%%% native memory. A sender to a full store gets `{error, full}', at once, and decides what to do; nothing that was accepted
%%% is dropped while the consumer lives.
%%%
%%% ```
%%% init([]) ->
%%%     Store = erlmcp_message_store:new(1000),
%%%     {ok, _} = register_somewhere(Store),    % for the processes that push
%%%     {ok, Store}.
%%%
%%% handle_info({erlmcp_message_store, ready, Store}, Store) ->
%%%     Messages = erlmcp_message_store:drain(Store, 100),
%%%     ok = handle_all(Messages),
%%%     %% There may be more.
%%%     _ = length(Messages) =:= 100 andalso (self() ! {erlmcp_message_store, ready, Store}),
%%%     {noreply, Store}.
%%% '''
%%%
%%% The process that makes a store is its consumer, the only one that may drain it. Any process of the node may push. A store
%%% is closed when its consumer exits: its messages are freed, and pushes return `{error, closed}'. It is freed with the last
%%% reference to it, which may be a wake-up in the consumer's mailbox. A message that refers to its own store keeps it until the
%%% message is drained or the consumer exits.
%%%
%%% == Wake-ups ==
%%% The consumer gets the message `{erlmcp_message_store, ready, Store}' when the first message comes to a store that is new,
%%% or that its last {@link drain/2} has found empty: when it returned fewer messages than it was asked for. After a result with
%%% as many messages as were asked for no wake-up comes: the consumer has to drain again. A wake-up may
%%% come for messages that were drained already, so an empty result is nothing to worry about.
%%%
%%% == Order ==
%%% First in, first out. Messages of one sender come in the order in which it has pushed them.
%%%
%%% == Bytes ==
%%% A message counts 16 bytes for each term in it (two terms for an element of a list), the bytes of its binaries, each rounded
%%% down to a multiple of 16, and for a fun sixteen times its external format. All of it is copied, so that a part of a large binary does not keep the whole: except for messages with references, ports, funs, bit
%%% strings that are not binaries, or integers that do not fit in 64 bits. These share their large binaries, as messages in a
%%% mailbox do, and take about 2.5 KB more, which is not counted.
%%%
%%% == Cost ==
%%% A push and a drain copy the message, on the calling scheduler; on a dirty one if it counts more than 80,000 bytes, and a push
%%% also if it has funs, bit strings or large integers. A binary that does not begin at a byte boundary is copied before its
%%% size is known. A full store refuses before it copies. Senders and consumer share no lock. A
%%% push costs some two to three times as much as `!', a drain about twice as much as `receive', and a store some 2 KB once it was
%%% used (`./bench/run --only stores').
-module(erlmcp_message_store).

-export([new/1, push/2, drain/2, len/1, info/1, totals/0]).
-export([of_connection/2]).
%% Explanations of errors
-export([format_error/2]).

-export_type([store/0, options/0, info/0, totals/0]).

-define(DEFAULT_CAPACITY,  1000).
-define(MOST_CAPACITY,     1_000_000).
-define(DEFAULT_MAX_BYTES, (64 bsl 20)).
%% How long a process with too many stores waits for those that it no longer refers to.
-define(FREED_MS,       100).
-define(MOST_MAX_BYTES, (1 bsl 32 - 1)).

-type store() :: erlmcp_nif:message_store().
%% Or a property list or keyword list.
-type options() :: #{capacity => pos_integer(), max_bytes => pos_integer()} | [{capacity | max_bytes, pos_integer()}].
-type info() :: #{
                  len := non_neg_integer(),
                  bytes := non_neg_integer(),
                  capacity := pos_integer(),
                  max_bytes := pos_integer(),
                  consumer := pid(),
                  closed := boolean()
                 }.
-type totals() :: #{stores := non_neg_integer(), messages := non_neg_integer(), bytes := non_neg_integer()}.


%% @doc An empty store whose consumer is the calling process. Options and defaults: `capacity' (1000 messages; up to 1,000,000)
%% and `max_bytes' (64 MiB; up to 4 GiB less one byte). An integer is a capacity.
%%
%% Raises `{bad_option, Key, Value, Expected}' for options that no store can have, and `system_limit' for a process that
%% consumes 1,000 stores already, after a garbage collection and a tenth of a second.
-spec new(pos_integer() | options()) -> store().
new(Options) ->
    case bounds(Options) of
        {Capacity, MaxBytes} -> made(fun() -> erlmcp_nif:message_store_new(Capacity, MaxBytes) end);
        error -> error(badarg, [Options], [{error_info, #{module => ?MODULE}}])
    end.


%% @private
%% The store of a connection of the calling process, which gets its messages: a new one, or the one that it has, with these
%% bounds.
-spec of_connection(Id :: term(), pos_integer() | options()) -> store() | not_held.
of_connection(Id, Options) ->
    case bounds(Options) of
        {Capacity, MaxBytes} -> made(fun() -> erlmcp_nif:set_delivery(Id, {store, Capacity, MaxBytes}) end);
        error -> error({bad_option, store, Options, "a capacity or " ++ erlmcp_native_config:map_expected()})
    end.


-spec bounds(term()) -> {Capacity :: pos_integer(), MaxBytes :: pos_integer()} | error.
bounds(Capacity) when is_integer(Capacity) ->
    bounds(#{capacity => Capacity});
bounds(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{} = Map ->
            ok = maps:foreach(fun check_option/2, Map),
            {maps:get(capacity, Map, ?DEFAULT_CAPACITY), maps:get(max_bytes, Map, ?DEFAULT_MAX_BYTES)};
        _ ->
            error
    end.


-spec made(fun(() -> Result | too_many_stores)) -> Result when Result :: store() | not_held.
made(Make) ->
    case Make() of
        too_many_stores ->
            true = garbage_collect(),
            made(Make, ?FREED_MS);
        Result ->
            Result
    end.


%% The VM frees what the collection has found a little later.
-spec made(fun(() -> Result | too_many_stores), LeftMs :: non_neg_integer()) -> Result when Result :: store() | not_held.
made(Make, LeftMs) ->
    case Make() of
        too_many_stores when LeftMs =:= 0 ->
            error(system_limit);
        too_many_stores ->
            ok = timer:sleep(1),
            made(Make, LeftMs - 1);
        Result ->
            Result
    end.


-spec check_option(term(), term()) -> ok.
check_option(capacity, N) when is_integer(N), N >= 1, N =< ?MOST_CAPACITY -> ok;
check_option(capacity, N) -> error({bad_option, capacity, N, "an integer from 1 to 1000000"});
check_option(max_bytes, N) when is_integer(N), N >= 1, N =< ?MOST_MAX_BYTES -> ok;
check_option(max_bytes, N) -> error({bad_option, max_bytes, N, "an integer from 1 to 4294967295"});
check_option(Key, Value) -> error({bad_option, Key, Value, "the keys capacity and max_bytes"}).


%% @doc Adds a message, and wakes the consumer if its last drain found the store empty.
%%
%% <ul>
%% <li>`{error, full}': the store has no room for it now, or 1,000 other pushes and drains came before it meanwhile</li>
%% <li>`{error, message_too_large}': it has more than `max_bytes' bytes</li>
%% <li>`{error, closed}': the consumer has exited</li>
%% </ul>
%%
%% Time in proportion to the message. Raises `badarg' for anything but a store of this node.
-spec push(store(), Message :: term()) -> ok | {error, full | message_too_large | closed}.
push(Store, Message) ->
    case erlmcp_nif:message_store_push(Store, Message) of
        ok -> ok;
        Refusal -> {error, Refusal}
    end.


%% @doc Removes up to `Max' messages (at most 1,000,000), oldest first. Only the consumer may: another process gets `{error, not_consumer}'.
%%
%% Fewer than `Max' messages: the store was found empty, and the next push wakes the consumer. As many as `Max': there may be
%% more, and no wake-up comes for them.
-spec drain(store(), Max :: pos_integer()) -> [Message :: term()] | {error, not_consumer}.
drain(Store, Max) when is_integer(Max), Max > 0, Max =< ?MOST_CAPACITY ->
    drain(Store, Max, []);
drain(Store, Max) ->
    error(badarg, [Store, Max], [{error_info, #{module => ?MODULE}}]).


%% The native call ends when it has decoded for about half a millisecond.
-spec drain(store(), non_neg_integer(), Slices :: [[term()]]) -> [term()] | {error, not_consumer}.
drain(_Store, 0, Slices) ->
    joined(Slices);
drain(Store, Left, Slices) ->
    case erlmcp_nif:message_store_drain(Store, Left) of
        not_consumer ->
            {error, not_consumer};
        {empty, Messages} ->
            joined([Messages | Slices]);
        {more, Messages} ->
            drain(Store, Left - length(Messages), [Messages | Slices]);
        {Large, Messages} ->
            Message = erlmcp_nif:message_store_open(Large),
            drain(Store, Left - length(Messages) - 1, [[Message], Messages | Slices])
    end.


-spec joined([[term()]]) -> [term()].
joined([Messages]) -> Messages;
joined(Slices) -> lists:append(lists:reverse(Slices)).


%% @doc The number of messages in a store. Those that are being pushed or drained at the moment may be counted.
-spec len(store()) -> non_neg_integer().
len(Store) ->
    #{len := Len} = info(Store),
    Len.


%% @doc What a store holds, its bounds, its consumer, and whether it was closed.
-spec info(store()) -> info().
info(Store) ->
    {Len, Bytes, Capacity, MaxBytes, Consumer, IsClosed} = erlmcp_nif:message_store_info(Store),
    #{
      len => Len,
      bytes => Bytes,
      capacity => Capacity,
      max_bytes => MaxBytes,
      consumer => Consumer,
      closed => IsClosed
     }.


%% @doc The number of stores in this node, and what they hold together. Costs in proportion to the stores, on a dirty
%% scheduler.
-spec totals() -> totals().
totals() ->
    {Stores, Messages, Bytes} = erlmcp_nif:message_stores(),
    #{stores => Stores, messages => Messages, bytes => Bytes}.


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, new, [_Options], _Info} | _]) ->
    #{1 => "not a capacity, nor " ++ erlmcp_native_config:map_expected()};
format_error(_Reason, [{?MODULE, drain, [_Store, _Max], _Info} | _]) ->
    #{2 => "not an integer from 1 to 1000000"};
format_error(_Reason, _Stacktrace) ->
    #{}.
