%%% @doc Collects messages in the calling process, and routes them together: once there are enough of them, or after a time.
%%%
%%% A process that sends many messages, such as one that reads a socket for many connections, pays less for a message of a batch
%%% than for a single route ({@link erlmcp_shard_manager:route_batch/1}). A receiver may get those of a batch as one message
%%% ({@link erlmcp_shard_manager:set_delivery/2}). A batch is a value in the state of its process; no other process is
%%% involved:
%%%
%%% ```
%%% init(_) ->
%%%     {ok, #{batch => erlmcp_message_batch:new(#{max_messages => 100, max_delay_ms => 5})}}.
%%%
%%% handle_info({tcp, _Socket, Data}, #{batch := Batch} = State) ->
%%%     {Id, Message} = decode(Data),
%%%     {Refused, Next} = erlmcp_message_batch:batch_and_send(Id, Message, Batch),
%%%     ok = answer(Refused),
%%%     {noreply, State#{batch := Next}};
%%% handle_info({timeout, _Timer, erlmcp_message_batch} = Timeout, #{batch := Batch} = State) ->
%%%     {Refused, Next} = erlmcp_message_batch:handle_timeout(Timeout, Batch),
%%%     ok = answer(Refused),
%%%     {noreply, State#{batch := Next}}.
%%%
%%% terminate(_Reason, #{batch := Batch}) ->
%%%     {Refused, _} = erlmcp_message_batch:flush(Batch),
%%%     answer(Refused).
%%% '''
%%%
%%% == Guarantees ==
%%% Messages of one batch to one id are sent in the order in which they were added, and before those of later batches. A message
%%% that the process routes in another way meanwhile overtakes those that wait. Each message is routed or returned as refused,
%%% once. What waits in a process that is killed is lost with it, as its mailbox is; a process that traps exits and flushes in
%%% `terminate/2' loses nothing otherwise.
-module(erlmcp_message_batch).

-export([new/0, new/1, batch_and_send/3, handle_timeout/2, flush/1, size/1]).
%% Explanations of errors
-export([format_error/2]).

-export_type([batch/0, options/0, refused/0]).

-define(DEFAULT_MAX_MESSAGES, 100).
-define(DEFAULT_MAX_DELAY_MS, 5).
-define(MOST_MAX_MESSAGES,    10_000).
-define(MOST_MAX_DELAY_MS,    60_000).

-record(batch, {
          max_messages :: pos_integer(),
          max_delay_ms :: non_neg_integer() | infinity,
          count = 0 :: non_neg_integer(),
          %% The latest one first.
          messages = [] :: [{Id :: term(), Message :: term()}],
          %% Of the oldest message.
          timer = none :: reference() | none
         }).

-opaque batch() :: #batch{}.
%% Or a property list or keyword list.
-type options() :: #{max_messages => 1..10_000, max_delay_ms => 0..60_000 | infinity} |
                   [{max_messages, 1..10_000} | {max_delay_ms, 0..60_000 | infinity}].
-type refused() :: {Id :: term(), Message :: term(), erlmcp_delivery:reason()}.


%% @equiv new(#{})
-spec new() -> batch().
new() ->
    new(#{}).


%% @doc An empty batch of the calling process. Options and defaults:
%%
%% <ul>
%% <li>`max_messages' (100; 1 to 10,000): with that many the batch is routed by {@link batch_and_send/3}</li>
%% <li>`max_delay_ms' (5; 0 to 60,000, or `infinity'): so long after its first message the process gets
%% `{timeout, Timer, erlmcp_message_batch}', for {@link handle_timeout/2}. With `infinity' it gets none.</li>
%% </ul>
%%
%% Raises `{bad_option, Key, Value, Expected}' for options that no batch can have.
-spec new(options()) -> batch().
new(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{} = Map ->
            ok = maps:foreach(fun check_option/2, Map),
            #batch{
              max_messages = maps:get(max_messages, Map, ?DEFAULT_MAX_MESSAGES),
              max_delay_ms = maps:get(max_delay_ms, Map, ?DEFAULT_MAX_DELAY_MS)
             };
        _ ->
            error(badarg, [Options], [{error_info, #{module => ?MODULE}}])
    end.


-spec check_option(term(), term()) -> ok.
check_option(max_messages, N) when is_integer(N), N >= 1, N =< ?MOST_MAX_MESSAGES -> ok;
check_option(max_messages, N) -> error({bad_option, max_messages, N, "an integer from 1 to 10000"});
check_option(max_delay_ms, infinity) -> ok;
check_option(max_delay_ms, Ms) when is_integer(Ms), Ms >= 0, Ms =< ?MOST_MAX_DELAY_MS -> ok;
check_option(max_delay_ms, Ms) -> error({bad_option, max_delay_ms, Ms, "an integer from 0 to 60000, or infinity"});
check_option(Key, Value) -> error({bad_option, Key, Value, "the keys max_messages and max_delay_ms"}).


%% @doc Adds a message, and routes the batch if it is full then. Returns the messages that were refused, in order: none as long as
%% the batch is not full. Constant time, or that of {@link erlmcp_shard_manager:route_batch/1}.
%%
%% Any term is accepted as an id. One that cannot be registered is refused when the batch is routed, with `not_found'.
-spec batch_and_send(Id :: term(), Message :: term(), batch()) -> {[refused()], batch()}.
batch_and_send(Id, Message, #batch{count = Count, messages = Messages} = Batch) ->
    Added = Batch#batch{count = Count + 1, messages = [{Id, Message} | Messages]},
    case Added of
        #batch{count = Max, max_messages = Max} -> flush(Added);
        #batch{count = 1, max_delay_ms = Ms} when is_integer(Ms) ->
            {[], Added#batch{timer = erlang:start_timer(Ms, self(), ?MODULE)}};
        _ -> {[], Added}
    end.


%% @doc Routes the batch whose time has come. The timer of a batch that was routed before its time may still be in the mailbox:
%% then nothing happens.
-spec handle_timeout({timeout, reference(), erlmcp_message_batch}, batch()) -> {[refused()], batch()}.
handle_timeout({timeout, Timer, ?MODULE}, #batch{timer = Timer} = Batch) ->
    flush(Batch#batch{timer = none});
handle_timeout({timeout, _Former, ?MODULE}, Batch) ->
    {[], Batch}.


%% @doc Routes what the batch holds now.
-spec flush(batch()) -> {[refused()], batch()}.
flush(#batch{count = 0} = Batch) ->
    {[], Batch};
flush(#batch{messages = Latest} = Batch) ->
    ok = cancel_timer(Batch),
    Messages = lists:reverse(Latest),
    Results = erlmcp_shard_manager:route_batch(Messages),
    {refused(Messages, Results), Batch#batch{count = 0, messages = [], timer = none}}.


-spec cancel_timer(batch()) -> ok.
cancel_timer(#batch{timer = none}) ->
    ok;
cancel_timer(#batch{timer = Timer}) ->
    erlang:cancel_timer(Timer, [{async, true}, {info, false}]).


-spec refused([{term(), term()}], [ok | {error, erlmcp_delivery:reason()}]) -> [refused()].
refused([_ | Messages], [ok | Results]) -> refused(Messages, Results);
refused([{Id, Message} | Messages], [{error, Reason} | Results]) -> [{Id, Message, Reason} | refused(Messages, Results)];
refused([], []) -> [].


%% @doc The number of messages that wait in a batch.
-spec size(batch()) -> non_neg_integer().
size(#batch{count = Count}) ->
    Count.


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(_Reason, [{?MODULE, new, [_Options], _Info} | _]) ->
    #{1 => "not " ++ erlmcp_native_config:map_expected()};
format_error(_Reason, _Stacktrace) ->
    #{}.
