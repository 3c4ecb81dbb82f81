%%% The ways a message takes to its receiver, each spelled out: through the native registry, one by one or
%%% in batches, through the registry as one gen_server, and with the pid in hand.
%%%
%%% All deliver the same term, `{mcp_message, Transport, Message}', and are called with the
%%% same list of `{Id, Pid}'.
-module(bench_senders).

-export([send/4, ways/0, name/1]).
-export([connection_ways/0]).

-export_type([way/0]).

-type way() :: native | connection | batch | classic | bare.


-spec ways() -> [way()].
ways() -> [native, classic, bare].


%% To connections, past all three layers of backpressure.
-spec connection_ways() -> [way()].
connection_ways() -> [connection, batch].


-spec name(way()) -> string().
name(native) -> "erlmcp_registry:route_to_server/3";
name(connection) -> "erlmcp_shard_manager:route_message/2";
name(batch) -> "erlmcp_shard_manager:route_batch/1";
name(classic) -> "classic route_to_server/3";
name(bare) -> "Pid ! Msg, pids in hand".


%% Sends `Message' to every one of the list. A route that is refused is an error here.
-spec send(way(), [{binary(), pid()}], binary(), term()) -> ok.
send(native, Connections, Transport, Message) -> native(Connections, Transport, Message);
send(connection, Connections, Transport, Message) -> connection(Connections, Transport, Message);
send(batch, Connections, Transport, Message) -> batch(Connections, Transport, Message);
send(classic, Connections, Transport, Message) -> classic(Connections, Transport, Message);
send(bare, Connections, Transport, Message) -> bare(Connections, Transport, Message).


-spec native([{binary(), pid()}], binary(), term()) -> ok.
native([{Id, _Pid} | Others], Transport, Message) ->
    ok = erlmcp_registry:route_to_server(Id, Transport, Message),
    native(Others, Transport, Message);
native([], _Transport, _Message) ->
    ok.


-spec connection([{binary(), pid()}], binary(), term()) -> ok.
connection([{Id, _Pid} | Others], Transport, Message) ->
    ok = erlmcp_shard_manager:route_message(Id, {mcp_message, Transport, Message}),
    connection(Others, Transport, Message);
connection([], _Transport, _Message) ->
    ok.


%% Making the list is part of it.
-spec batch([{binary(), pid()}], binary(), term()) -> ok.
batch(Connections, Transport, Message) ->
    Messages = [ {Id, {mcp_message, Transport, Message}} || {Id, _Pid} <- Connections ],
    true = lists:all(fun(Result) -> Result =:= ok end, erlmcp_shard_manager:route_batch(Messages)),
    ok.


-spec classic([{binary(), pid()}], binary(), term()) -> ok.
classic([{Id, _Pid} | Others], Transport, Message) ->
    ok = erlmcp_registry_classic:route_to_server(Id, Transport, Message),
    classic(Others, Transport, Message);
classic([], _Transport, _Message) ->
    ok.


-spec bare([{binary(), pid()}], binary(), term()) -> ok.
bare([{_Id, Pid} | Others], Transport, Message) ->
    Pid ! {mcp_message, Transport, Message},
    bare(Others, Transport, Message);
bare([], _Transport, _Message) ->
    ok.
