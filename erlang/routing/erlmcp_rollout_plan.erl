%%% @private
%%% The plan: which registry keeps the servers and transports, and by which one an id is routed.
%%%
%%% One integer for the whole node, which every caller reads and only the registry's process writes.
%%% It is a persistent term, and an integer so that a change of it makes no process collect its
%%% garbage.
%%%
%%% <ul>
%%% <li>`native': the native registry alone. Everybody changes it from its own process.</li>
%%% <li>`classic': the state of the registry's process alone.</li>
%%% <li>`both': the registry's process makes every change, in both. `share' percent of the ids are
%%% looked up and routed in the native one, those with `erlang:phash2(Id, 100) < Share', by whoever
%%% asks; the others by the process.</li>
%%% </ul>
%%%
%%% While the share grows, ids are on their way to the native registry (`joining'): messages to them may
%%% still wait in the mailbox of the registry's process, and nothing may overtake them. Whoever routes
%%% to such an id waits for the process to have got that far.
%%%
%%% A reader that acts upon a plan, and then finds the plan to be the same integer as before, has acted
%%% while that plan was in force: no two plans of a node's life are the same.
-module(erlmcp_rollout_plan).

-export([read/0, write/2, compare/1, path/2, keepers/1, share/1, authority/1, is_comparing/1]).

-export_type([plan/0, keepers/0, path/0]).

-type plan() :: non_neg_integer().
-type keepers() :: native | classic | both.
-type path() :: native | classic | joining.
-type fields() :: #{share := 0..100, joining => 0..100, authority => native | classic}.

-define(KEY, ?MODULE).

%% From the lowest bit: keepers (2), authority (1), comparing (1), share (7), share when all that are
%% joining have joined (7), version.
-define(KEEPERS(Plan), (Plan band 3)).
-define(AUTHORITY(Plan), ((Plan bsr 2) band 1)).
-define(COMPARING(Plan), ((Plan bsr 3) band 1)).
-define(SHARE(Plan), ((Plan bsr 4) band 127)).
-define(SHARE_TO_COME(Plan), ((Plan bsr 11) band 127)).
-define(VERSION(Plan), (Plan bsr 18)).
-define(NATIVE,  0).
-define(CLASSIC, 1).
-define(BOTH,    2).


%% Until one is written it is the native registry, or the classic one where there is no other.
-spec read() -> plan().
read() ->
    case persistent_term:get(?KEY, none) of
        none -> first();
        Plan -> Plan
    end.


-spec first() -> plan().
first() ->
    case erlmcp_native_registry:load_error() of
        none -> ?NATIVE;
        _NotLoaded -> ?CLASSIC
    end.


%% Puts a plan in force, by the registry's process. `joining' is the share when all that are joining
%% have joined.
-spec write(keepers(), fields()) -> ok.
write(Keepers, #{share := Share} = Fields) ->
    Former = read(),
    Plan = number(Keepers) bor
        (number(maps:get(authority, Fields, native)) bsl 2) bor
        (?COMPARING(Former) bsl 3) bor
        (Share bsl 4) bor
        (maps:get(joining, Fields, Share) bsl 11) bor
        ((?VERSION(Former) + 1) bsl 18),
    persistent_term:put(?KEY, Plan).


%% Whether what is routed by one registry is checked by the other, as long as there are both. By the
%% registry's process.
-spec compare(boolean()) -> ok.
compare(IsComparing) ->
    Former = read(),
    Others = Former band (bnot (1 bsl 3)),
    Bit = case IsComparing of
              true -> 1 bsl 3;
              false -> 0
          end,
    persistent_term:put(?KEY, (Others bor Bit) + (1 bsl 18)).


-spec number(keepers()) -> 0..2.
number(native) -> ?NATIVE;
number(classic) -> ?CLASSIC;
number(both) -> ?BOTH.


-spec keepers(plan()) -> keepers().
keepers(Plan) ->
    case ?KEEPERS(Plan) of
        ?NATIVE -> native;
        ?CLASSIC -> classic;
        ?BOTH -> both
    end.


%% How an id is looked up and routed.
-spec path(Id :: term(), plan()) -> path().
path(_Id, Plan) when ?KEEPERS(Plan) =:= ?NATIVE ->
    native;
path(_Id, Plan) when ?KEEPERS(Plan) =:= ?CLASSIC ->
    classic;
path(Id, Plan) ->
    case erlang:phash2(Id, 100) of
        Hash when Hash < ?SHARE(Plan) -> native;
        Hash when Hash < ?SHARE_TO_COME(Plan) -> joining;
        _ -> classic
    end.


%% The percentage of the ids that take the native path.
-spec share(plan()) -> 0..100.
share(Plan) ->
    case keepers(Plan) of
        native -> 100;
        classic -> 0;
        both -> ?SHARE(Plan)
    end.


%% With `both', the registry that decides; the other one follows.
-spec authority(plan()) -> native | classic.
authority(Plan) ->
    case ?AUTHORITY(Plan) of
        ?NATIVE -> native;
        ?CLASSIC -> classic
    end.


%% With `both', whether what is routed by one registry is checked by the other.
-spec is_comparing(plan()) -> boolean().
is_comparing(Plan) ->
    ?COMPARING(Plan) =:= 1.
