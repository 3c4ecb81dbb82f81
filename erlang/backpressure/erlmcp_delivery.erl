%%% @private
%%% Carries out the decision of a native route: sends the message, or returns the refusal, and passes on
%%% the events that the call has returned.
%%%
%%% {@link erlmcp_native} describes the layers that decide.
%%%
%%% It also has the counts of the messages that the registry's process routes, since these pass no layer and no native call
%%% counts them. They outlive that process.
-module(erlmcp_delivery).

-export([deliver/2, deliver_all/2, send/2, notify/1]).
%% Messages that the registry's process routes
-export([new_counts/0, count/1, counts/0]).

-export_type([reason/0, undelivered/0, unsent/0]).

-type reason() :: not_found | circuit_open | shard_overloaded | rate_limited | undelivered() | unsent().
%% A message to a connection with a message store.
-type undelivered() :: store_full | message_too_large.
%% A message to a process of another node.
-type unsent() :: noconnection | busy.

-define(COUNTS,    {?MODULE, counts}).
-define(OK,        1).
-define(NOT_FOUND, 2).


%% @doc Sends a message to the target that a native call returned, and passes on the events of that call.
%% On the hot path the result is only a pid of this node, which callers test for themselves. `ok' and `batched': the message
%% is in a message store, or in a list that the caller sends.
-spec deliver(Routed | {Routed, [erlmcp_nif:event()]}, term()) -> ok | {error, reason()}
              when Routed :: erlmcp_nif:route() | ok | batched | message_too_large.
deliver(Pid, Message) when is_pid(Pid) ->
    send(Pid, Message);
deliver(Delivered, _Message) when Delivered =:= ok; Delivered =:= batched ->
    ok;
deliver({Route, Events}, Message) ->
    Result = deliver(Route, Message),
    ok = notify(Events),
    Result;
deliver(Refusal, _Message) ->
    refused(Refusal).


%% @doc Sends a message. To a process of another node it neither connects nor suspends the caller:
%% `noconnection' if that node is not connected, `busy' if the VM's buffer of data to that node is full.
-spec send(pid(), term()) -> ok | {error, unsent()}.
send(Pid, Message) when node(Pid) =:= node() ->
    Pid ! Message,
    ok;
send(Pid, Message) ->
    case erlang:send(Pid, Message, [nosuspend, noconnect]) of
        ok -> ok;
        noconnect -> {error, noconnection};
        nosuspend -> {error, busy}
    end.


%% @doc Sends a message to all targets that a native call returned. `not_found' if there are none.
-spec deliver_all({[pid()], none | erlmcp_nif:refusal(), [erlmcp_nif:event()]}, term()) -> ok | {error, reason()}.
deliver_all({Pids, Refused, Events}, Message) ->
    Unsent = [ Error || Pid <- Pids, {error, _} = Error <- [send(Pid, Message)] ],
    ok = notify(Events),
    case Refused of
        none when Pids =:= [] -> {error, not_found};
        none when Unsent =/= [] -> hd(Unsent);
        none -> ok;
        Refusal -> refused(Refusal)
    end.


%% What a route returns for a message that was not admitted.
-spec refused(erlmcp_nif:refusal() | message_too_large) -> {error, reason()}.
refused(undefined) -> {error, not_found};
refused(Reason) -> {error, Reason}.


%% @doc Passes on the events of a native call: to the samplers of the shards, and to the log.
-spec notify([erlmcp_nif:event()]) -> ok.
notify(Events) ->
    lists:foreach(fun notify_one/1, Events).


-spec notify_one(erlmcp_nif:event()) -> ok.
notify_one({sample, Shard}) ->
    erlmcp_shard_sampler:tell(Shard, sample);
notify_one({overloaded, Shard}) ->
    erlmcp_shard_sampler:tell(Shard, overloaded);
notify_one({circuit, State}) ->
    erlmcp_circuit_breaker:log_transition(node, State).


%%% Messages that the registry's process routes


%% @doc Makes the counts, unless there are any. Called by the process of the registered name `erlmcp_registry' alone.
-spec new_counts() -> ok.
new_counts() ->
    case persistent_term:get(?COUNTS, none) of
        none -> persistent_term:put(?COUNTS, counters:new(2, []));
        _Counts -> ok
    end.


%% @doc Counts a message to one target: sent, or its target was not registered. Takes 20 to 30 ns, of one or
%% two microseconds that the process spends on a message.
-spec count(ok | not_found) -> ok.
count(ok) -> counters:add(persistent_term:get(?COUNTS), ?OK, 1);
count(not_found) -> counters:add(persistent_term:get(?COUNTS), ?NOT_FOUND, 1).


-spec counts() -> #{ok := non_neg_integer(), not_found := non_neg_integer()}.
counts() ->
    case persistent_term:get(?COUNTS, none) of
        none -> #{ok => 0, not_found => 0};
        Counts -> #{ok => counters:get(Counts, ?OK), not_found => counters:get(Counts, ?NOT_FOUND)}
    end.
