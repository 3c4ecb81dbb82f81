%%% @private
%%% A switch from one mode to another, step by step, in the registry's process while it goes on serving.
%%%
%%% == Steps ==
%%% <ol>
%%% <li>From one registry: changes are diverted to this process, which makes each in both registries
%%% from here on ({@link erlmcp_registry_pair}). Whoever was in the middle of a native one is waited
%%% for.</li>
%%% <li><em>Copying</em>: entry by entry, some at a time and requests in between.</li>
%%% <li><em>Verifying</em>: every entry of either registry is looked at in both. What differs is made to
%%% follow, and all are verified anew; what still differs after some rounds ends the switch, and
%%% everything is as before.</li>
%%% <li><em>Draining</em>, if ids are to join the native registry: messages to them wait in the mailbox of
%%% this process, and who routes to them waits for it. The step ends when a message of its own has
%%% come through the mailbox, twice: the runtime may put one before messages that came a little
%%% earlier from other processes, but no second one.</li>
%%% <li>The plan is put in force. To one registry: the other one is emptied.</li>
%%% </ol>
%%%
%%% == Order ==
%%% What one process sends to another one arrives in that order, also across a switch, and also if the
%%% target has several ids. From the native registry, since what was sent that way is in the target's
%%% mailbox already. From both, since whoever has a message sent by this process waits until it is. From
%%% the classic one alone by step 4: of what was sent before nothing is left, or its sender waits. And
%%% whoever has put a message into the mailbox looks at the plan again afterwards, and waits if it has
%%% changed.
-module(erlmcp_rollout_switch).

-export([start/3, continue/2, follow_failed/3]).
-export([mode/1, source/1, target/1, authority/1]).

-export_type([switch/0, result/0]).

-type classic() :: erlmcp_registry_classic:state().
-type mode() :: current | '100x' | {percent, 0..100}.
-type error() :: {cannot_copy, erlmcp_registry_pair:entry(), Reason :: term()} |
                 {registries_differ, erlmcp_registry_pair:entry()}.
%% What a switch ends with. `copied': entries that were not in the other registry, or different there;
%% `repaired': those of them that were found by verifying.
-type result() :: #{
                    from := mode(),
                    to := mode(),
                    result := ok | {error, error()},
                    copied := non_neg_integer(),
                    repaired := non_neg_integer(),
                    entries := non_neg_integer(),
                    duration_ms := non_neg_integer()
                   }.

-record(switch, {
          source :: mode(),
          target :: mode(),
          authority :: erlmcp_registry_pair:authority(),
          stage = copying :: copying | {verifying, Round :: pos_integer()} | {draining, Left :: 0..1},
          left :: [erlmcp_registry_pair:entry()],
          entries = 0 :: non_neg_integer(),
          copied = 0 :: non_neg_integer(),
          %% In this round, the last one of them; and in all.
          differing = none :: none | erlmcp_registry_pair:entry(),
          repaired = 0 :: non_neg_integer(),
          began_ms :: integer()
         }).

-opaque switch() :: #switch{}.

%% Some milliseconds, with small configs.
-define(SLICE, 200).
%% Only processes that end in just that moment make a difference, and that is over with the next round.
-define(MAX_ROUNDS,     10).
-define(WRITERS_ARE_MS, 1).


%% The mode that a plan is.
-spec mode(erlmcp_rollout_plan:plan()) -> mode().
mode(Plan) ->
    case erlmcp_rollout_plan:keepers(Plan) of
        native -> '100x';
        classic -> current;
        both -> {percent, erlmcp_rollout_plan:share(Plan)}
    end.


-spec source(switch()) -> mode().
source(#switch{source = Source}) -> Source.


-spec target(switch()) -> mode().
target(#switch{target = Target}) -> Target.


%% The registry that decides while this switch lasts.
-spec authority(switch()) -> erlmcp_registry_pair:authority().
authority(#switch{authority = Authority}) -> Authority.


%% Step 1. `Classic' is `none' if the process has no classic registry.
-spec start(mode(), Keeper :: atom(), classic() | none) -> {switch(), classic()}.
start(Target, Keeper, Classic0) ->
    Plan = erlmcp_rollout_plan:read(),
    ok = divert(),
    {Authority, Classic} =
        case erlmcp_rollout_plan:keepers(Plan) of
            native ->
                ok = erlmcp_rollout_plan:write(both, #{share => 100, authority => native}),
                {native, erlmcp_registry_classic:new(Keeper)};
            classic ->
                ok = erlmcp_nif:open(exclusive),
                ok = erlmcp_rollout_plan:write(both, #{share => 0, authority => classic}),
                {classic, Classic0};
            both ->
                {erlmcp_rollout_plan:authority(Plan), Classic0}
        end,
    Entries = erlmcp_registry_pair:ids(Authority, Classic),
    Switch = #switch{
               source = mode(Plan),
               target = Target,
               authority = Authority,
               left = Entries,
               entries = length(Entries),
               began_ms = now_ms()
              },
    {Switch, Classic}.


-spec divert() -> ok.
divert() ->
    case erlmcp_nif:divert() of
        ok ->
            ok;
        busy ->
            ok = timer:sleep(?WRITERS_ARE_MS),
            divert()
    end.


%% The next step. The process sends itself a message between two of them.
-spec continue(switch(), classic()) -> {continue, switch(), classic()} | {done, result(), classic() | none}.
continue(#switch{stage = copying, left = []} = Switch, Classic) ->
    verify(1, Switch, Classic);
continue(#switch{stage = {verifying, _}, left = [], differing = none} = Switch, Classic) ->
    flip(Switch#switch{authority = native}, Classic);
continue(#switch{stage = {verifying, ?MAX_ROUNDS}, left = [], differing = Entry} = Switch, Classic) ->
    abort({registries_differ, Entry}, Switch, Classic);
continue(#switch{stage = {verifying, Round}, left = []} = Switch, Classic) ->
    verify(Round + 1, Switch, Classic);
continue(#switch{stage = {draining, 0}} = Switch, Classic) ->
    finish(Switch, Classic);
continue(#switch{stage = {draining, Left}} = Switch, Classic) ->
    {continue, Switch#switch{stage = {draining, Left - 1}}, Classic};
continue(#switch{left = Entries} = Switch, Classic) ->
    {Slice, Left} = lists:split(min(?SLICE, length(Entries)), Entries),
    slice(Slice, Switch#switch{left = Left}, Classic).


-spec verify(pos_integer(), switch(), classic()) -> {continue, switch(), classic()}.
verify(Round, Switch, Classic) ->
    %% By maps, since sorting takes 1 and 1.0 for the same.
    All = maps:from_keys(erlmcp_registry_pair:ids(native, Classic) ++ erlmcp_registry_pair:ids(classic, Classic), []),
    {continue,
     Switch#switch{
       stage = {verifying, Round},
       left = maps:keys(All),
       entries = map_size(All),
       differing = none
      },
     Classic}.


-spec slice([erlmcp_registry_pair:entry()], switch(), classic()) ->
          {continue, switch(), classic()} | {done, result(), classic() | none}.
slice([], Switch, Classic) ->
    {continue, Switch, Classic};
slice([Entry | Entries], #switch{authority = Authority} = Switch, Classic0) ->
    case erlmcp_registry_pair:are_equal(Entry, Classic0) of
        {true, Classic} ->
            slice(Entries, Switch, Classic);
        {false, Classic1} ->
            case erlmcp_registry_pair:follow(Entry, Authority, Classic1) of
                {ok, Classic} -> slice(Entries, copied(Entry, Switch), Classic);
                {{error, Error}, Classic} -> abort(Error, Switch, Classic)
            end
    end.


-spec copied(erlmcp_registry_pair:entry(), switch()) -> switch().
copied(_Entry, #switch{stage = copying, copied = Copied} = Switch) ->
    Switch#switch{copied = Copied + 1};
copied(Entry, #switch{copied = Copied, repaired = Repaired} = Switch) ->
    Switch#switch{copied = Copied + 1, repaired = Repaired + 1, differing = Entry}.


%% A request between two steps has made an entry that the registry that follows does not take.
-spec follow_failed(error(), switch(), classic()) -> {done, result(), classic() | none}.
follow_failed(Error, Switch, Classic) ->
    abort(Error, Switch, Classic).


%% Both are equal. Ids that leave the native registry do so at once.
-spec flip(switch(), classic()) -> {continue, switch(), classic()} | {done, result(), classic() | none}.
flip(#switch{target = Target} = Switch, Classic) ->
    Former = erlmcp_rollout_plan:share(erlmcp_rollout_plan:read()),
    case share(Target) of
        Share when Share > Former ->
            ok = erlmcp_rollout_plan:write(both, #{share => Former, joining => Share, authority => native}),
            {continue, Switch#switch{stage = {draining, 1}}, Classic};
        Share ->
            ok = erlmcp_rollout_plan:write(both, #{share => Share, authority => native}),
            finish(Switch, Classic)
    end.


-spec share(mode()) -> 0..100.
share(current) -> 0;
share('100x') -> 100;
share({percent, Share}) -> Share.


-spec finish(switch(), classic()) -> {done, result(), classic() | none}.
finish(#switch{target = Target} = Switch, Classic) ->
    {done, result(ok, Switch), settle(Target, Classic)}.


-spec abort(error(), switch(), classic()) -> {done, result(), classic() | none}.
abort(Error, #switch{source = Source} = Switch, Classic) ->
    {done, result({error, Error}, Switch), settle(Source, Classic)}.


%% Puts the plan of a mode in force, and empties the registry that it does without.
-spec settle(mode(), classic()) -> classic() | none.
settle(current, Classic) ->
    ok = erlmcp_rollout_plan:write(classic, #{share => 0}),
    ok = erlmcp_native_registry:close(exclusive),
    Classic;
settle('100x', Classic) ->
    ok = erlmcp_rollout_plan:write(native, #{share => 100}),
    ok = erlmcp_nif:undivert(),
    ok = erlmcp_registry_classic:close(Classic),
    none;
settle({percent, Share}, Classic) ->
    ok = erlmcp_rollout_plan:write(both, #{share => Share, authority => native}),
    Classic.


-spec result(ok | {error, error()}, switch()) -> result().
result(Result, Switch) ->
    #{
      from => Switch#switch.source,
      to => Switch#switch.target,
      result => Result,
      copied => Switch#switch.copied,
      repaired => Switch#switch.repaired,
      entries => Switch#switch.entries,
      duration_ms => now_ms() - Switch#switch.began_ms
     }.


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).
