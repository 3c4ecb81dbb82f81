%%% The ways a message takes to its receiver, each spelled out: through the native registry, through
%%% the registry as one gen_server, and with the pid in hand.
%%%
%%% All three deliver the same term, `{mcp_message, Transport, Message}', and are called with the
%%% same list of `{Id, Pid}'.
-module(bench_senders).

-export([send/4, ways/0, name/1]).

-export_type([way/0]).

-type way() :: native | classic | bare.


-spec ways() -> [way()].
ways() -> [native, classic, bare].


-spec name(way()) -> string().
name(native) -> "erlmcp_registry:route_to_server/3";
name(classic) -> "classic route_to_server/3";
name(bare) -> "Pid ! Msg, pids in hand".


%% Sends `Message' to every one of the list. A route that is refused is an error here.
-spec send(way(), [{binary(), pid()}], binary(), term()) -> ok.
send(native, Connections, Transport, Message) -> native(Connections, Transport, Message);
send(classic, Connections, Transport, Message) -> classic(Connections, Transport, Message);
send(bare, Connections, Transport, Message) -> bare(Connections, Transport, Message).


-spec native([{binary(), pid()}], binary(), term()) -> ok.
native([{Id, _Pid} | Others], Transport, Message) ->
    ok = erlmcp_registry:route_to_server(Id, Transport, Message),
    native(Others, Transport, Message);
native([], _Transport, _Message) ->
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
