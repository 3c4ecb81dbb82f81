%%% @private
%%% The native and the classic registry kept equal by the process that has both.
%%%
%%% One of them decides and the other one follows: a request is carried out by the one with the
%%% authority, and then the entries that it touched are made the same in the other one. All requests are
%%% handled one after the other by one process, so what ends processes is all that can come between:
%%%
%%% <ul>
%%% <li>Neither registry reports an entry whose process has ended (on this node), and both drop it by
%%% themselves.</li>
%%% <li>The end of a server ends bindings. In the native registry that happens at once, in the classic
%%% one when its 'DOWN' is handled. So the bindings of its transports follow once more then.</li>
%%% <li>Before a binding follows, its server does: either the server is known to both, and then its end
%%% is too, or it is unknown to both, and stays so until the next request.</li>
%%% </ul>
-module(erlmcp_registry_pair).

-export([execute/3, info/3, follow/3, are_equal/2, ids/2]).

-type classic() :: erlmcp_registry_classic:state().
-type authority() :: native | classic.
-type entry() :: {erlmcp_registry_native:kind(), Id :: term()}.

-export_type([authority/0, entry/0]).


%% `{error, Reason}' in the end: an entry that the follower did not take.
-spec execute(Request :: term(), authority(), classic()) -> {Reply :: term(), ok | {error, term()}, classic()}.
execute(Request, native, Classic) ->
    Before = bound(Request, native, Classic),
    Reply = erlmcp_registry_native:execute(exclusive, Request),
    {Followed, State} = follow_all(touched(Request) ++ Before, native, Classic),
    {Reply, Followed, State};
execute(Request, classic, Classic0) ->
    Before = bound(Request, classic, Classic0),
    {Reply, Classic} = erlmcp_registry_classic:execute(Request, Classic0),
    {Followed, State} = follow_all(touched(Request) ++ Before, classic, Classic),
    {Reply, Followed, State}.


%% The transports that are bound before all bindings are exchanged.
-spec bound(term(), authority(), classic()) -> [entry()].
bound({restore_state, {registry_state, Bindings}}, native, _Classic) when is_map(Bindings) ->
    [ {transport, Id} || {Id, _Server} <- erlmcp_native_registry:bindings(exclusive) ];
bound({restore_state, {registry_state, Bindings}}, classic, Classic) when is_map(Bindings) ->
    {{ok, {registry_state, Former}}, _} = erlmcp_registry_classic:execute(get_all_state, Classic),
    [ {transport, Id} || Id <- maps:keys(Former) ];
bound(_Request, _Authority, _Classic) ->
    [].


-spec touched(term()) -> [entry()].
touched({register_server, Id, _Pid, _Config}) -> [{server, Id}];
touched({register_transport, Id, _Pid, _Config}) -> [{transport, Id}];
touched({unregister_server, Id}) -> [{server, Id}];
touched({unregister_transport, Id}) -> [{transport, Id}];
touched({update_server, Id, _Config}) -> [{server, Id}];
touched({bind_transport_to_server, Id, _ServerId}) -> [{transport, Id}];
touched({unbind_transport, Id}) -> [{transport, Id}];
touched({restore_state, {registry_state, #{} = Bindings}}) -> [ {transport, Id} || Id <- maps:keys(Bindings) ];
touched(_Request) -> [].


%% A message that may be the end of a process.
-spec info(term(), authority(), classic()) -> {ok | {error, term()}, classic()}.
info({{down, server, Id}, _, process, _, _} = Down, Authority, Classic) ->
    Members = [ {transport, Transport} || Transport <- erlmcp_registry_classic:members(Id, Classic) ],
    follow_all(Members, Authority, erlmcp_registry_classic:info(Down, Classic));
info(Info, _Authority, Classic) ->
    {ok, erlmcp_registry_classic:info(Info, Classic)}.


-spec follow_all([entry()], authority(), classic()) -> {ok | {error, term()}, classic()}.
follow_all(Entries, Authority, Classic) ->
    lists:foldl(fun(Entry, {Result0, Classic0}) ->
                        case follow(Entry, Authority, Classic0) of
                            {ok, Classic1} -> {Result0, Classic1};
                            Failed -> Failed
                        end
                end,
                {ok, Classic},
                Entries).


%% Makes one entry the same in the registry that follows.
-spec follow(entry(), authority(), classic()) -> {ok | {error, term()}, classic()}.
follow({server, Id} = Entry, Authority, Classic0) ->
    {Row, Classic} = row(Entry, Authority, Classic0),
    put(server, Id, Row, Authority, Classic);
follow({transport, Id} = Entry, Authority, Classic0) ->
    case row(Entry, Authority, Classic0) of
        {{_Pid, _Config, {bound, ServerId}}, Classic1} ->
            case follow({server, ServerId}, Authority, Classic1) of
                {ok, Classic2} ->
                    %% Anew, since the server may have ended before it followed.
                    {Row, Classic} = row(Entry, Authority, Classic2),
                    put(transport, Id, Row, Authority, Classic);
                Failed ->
                    Failed
            end;
        {Row, Classic} ->
            put(transport, Id, Row, Authority, Classic)
    end.


-spec row(entry(), authority(), classic()) -> {erlmcp_registry_native:row() | none, classic()}.
row({Kind, Id}, native, Classic) -> {erlmcp_registry_native:row(Kind, Id), Classic};
row({Kind, Id}, classic, Classic) -> erlmcp_registry_classic:row(Kind, Id, Classic).


-spec put(erlmcp_registry_native:kind(), term(), erlmcp_registry_native:row() | none, authority(), classic()) ->
          {ok | {error, term()}, classic()}.
put(Kind, Id, Row, native, Classic) ->
    {ok, erlmcp_registry_classic:put(Kind, Id, Row, Classic)};
put(Kind, Id, Row, classic, Classic) ->
    case erlmcp_registry_native:put(Kind, Id, Row) of
        ok -> {ok, Classic};
        {error, Reason} -> {{error, {cannot_copy, {Kind, Id}, Reason}}, Classic}
    end.


%% A process may end between the looks into the one and into the other, so only what is different
%% several times is.
-spec are_equal(entry(), classic()) -> {boolean(), classic()}.
are_equal(Entry, Classic) ->
    are_equal(Entry, Classic, 3).


-spec are_equal(entry(), classic(), non_neg_integer()) -> {boolean(), classic()}.
are_equal(_Entry, Classic, 0) ->
    {false, Classic};
are_equal({Kind, Id} = Entry, Classic0, Tries) ->
    {InClassic, Classic} = erlmcp_registry_classic:row(Kind, Id, Classic0),
    case erlmcp_registry_native:row(Kind, Id) of
        InClassic -> {true, Classic};
        _Other -> are_equal(Entry, Classic, Tries - 1)
    end.


%% All entries of a registry, servers first.
-spec ids(authority(), classic()) -> [entry()].
ids(native, _Classic) ->
    [ {Kind, Id} || Kind <- [server, transport], Id <- erlmcp_registry_native:ids(Kind) ];
ids(classic, Classic) ->
    [ {Kind, Id} || Kind <- [server, transport], Id <- erlmcp_registry_classic:ids(Kind, Classic) ].
