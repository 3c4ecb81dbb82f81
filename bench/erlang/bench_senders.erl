%%% The ways of a message to its receiver, each spelled out: through the native registry, one by one or in
%%% batches; through the registry as one gen_server; and with the pid in hand.
%%%
%%% All deliver the same term, `{mcp_message, Transport, Message}', and take the same list of `{Id, Pid,
%%% Transport}'.
-module(bench_senders).

-export([prepare/1, send/3, offer/3, ways/0, name/1]).
-export([connection_ways/0]).

-export_type([way/0, connection/0]).

-type way() :: native | connection | batch | classic | bare.
-type connection() :: {Id :: binary(), pid(), Transport :: binary()}.


-spec ways() -> [way()].
ways() -> [native, classic, bare].


%% The ways to connections.
-spec connection_ways() -> [way()].
connection_ways() -> [connection, batch].


-spec name(way()) -> string().
name(native) -> "erlmcp_registry:route_to_server/3";
name(connection) -> "erlmcp_shard_manager:route_message/2";
name(batch) -> "erlmcp_shard_manager:route_batch/1";
name(classic) -> "classic route_to_server/3";
name(bare) -> "Pid ! Msg, pids in hand".


%% Runs before a way is measured. A way without admission control must not pay for samples of a former way's
%% messages.
-spec prepare(way()) -> ok.
prepare(Way) when Way =:= bare; Way =:= classic -> bench_samplers:await_idle();
prepare(_Guarded) -> ok.


%% Sends `Message' to each connection in the list. A refused route is an error here.
-spec send(way(), [connection()], term()) -> ok.
send(native, Connections, Message) -> native(Connections, Message);
send(connection, Connections, Message) -> connection(Connections, Message);
send(batch, Connections, Message) -> batch(Connections, Message);
send(classic, Connections, Message) -> classic(Connections, Message);
send(bare, Connections, Message) -> bare(Connections, Message).


%% Sends as {@link send/3} does, and returns the reason for each message that was refused.
-spec offer(native | classic | bare, [connection()], term()) -> [Reason :: term()].
offer(native, Connections, Message) ->
    offer_native(Connections, Message, []);
offer(Unguarded, Connections, Message) ->
    ok = send(Unguarded, Connections, Message),
    [].


-spec offer_native([connection()], term(), [term()]) -> [term()].
offer_native([{Id, _Pid, Transport} | Others], Message, Refused) ->
    case erlmcp_registry:route_to_server(Id, Transport, Message) of
        ok -> offer_native(Others, Message, Refused);
        {error, Reason} -> offer_native(Others, Message, [Reason | Refused])
    end;
offer_native([], _Message, Refused) ->
    Refused.


-spec native([connection()], term()) -> ok.
native([{Id, _Pid, Transport} | Others], Message) ->
    ok = erlmcp_registry:route_to_server(Id, Transport, Message),
    native(Others, Message);
native([], _Message) ->
    ok.


-spec connection([connection()], term()) -> ok.
connection([{Id, _Pid, Transport} | Others], Message) ->
    ok = erlmcp_shard_manager:route_message(Id, {mcp_message, Transport, Message}),
    connection(Others, Message);
connection([], _Message) ->
    ok.


%% Making the list is part of the cost.
-spec batch([connection()], term()) -> ok.
batch(Connections, Message) ->
    Messages = [ {Id, {mcp_message, Transport, Message}} || {Id, _Pid, Transport} <- Connections ],
    true = lists:all(fun(Result) -> Result =:= ok end, erlmcp_shard_manager:route_batch(Messages)),
    ok.


-spec classic([connection()], term()) -> ok.
classic([{Id, _Pid, Transport} | Others], Message) ->
    ok = bench_baseline:route_to_server(Id, Transport, Message),
    classic(Others, Message);
classic([], _Message) ->
    ok.


-spec bare([connection()], term()) -> ok.
bare([{_Id, Pid, Transport} | Others], Message) ->
    Pid ! {mcp_message, Transport, Message},
    bare(Others, Message);
bare([], _Message) ->
    ok.
