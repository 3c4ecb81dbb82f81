%%% @private
%%% Copies one store to another one, in slices, by the registry's process while it goes on serving from the
%%% source.
%%%
%%% The source is changed only by the process itself, which executes the changes that callers request
%%% and reports them to {@link changed/3}; and by exits. The target is used by nothing else until the process puts
%%% it in force.
%%%
%%% == Changes during the copy ==
%%% The ids of changed entries are kept. When everything else has been copied, each changed entry is copied again as it
%%% is in the source at that time (it is <em>renewed</em>), and once more if it changes once more. The
%%% copy is done when no such id is left; the process puts the target in force before it executes another change.
%%%
%%% Renewing a server ends its bindings in the target, and its registration or removal changes bindings in the
%%% source, including those made ahead of it. So the transports that are bound to it in the pure-Erlang store, whether
%%% that is the source or the target, are renewed after it; not if only its config has changed. All servers are renewed
%%% before any transport.
%%%
%%% If changes come faster than entries are renewed, so that as many have been renewed as were to be copied,
%%% {@link changed/3} refuses further changes, which have to wait for the end of the copy.
%%%
%%% == Exits during the copy ==
%%% Both stores monitor their processes by themselves, so an entry that has been copied is removed from both. Bindings
%%% need care, since they end with their server too:
%%% <ul>
%%% <li>Servers are copied before transports. So a server that a transport is bound to is in the target
%%% already, unless it is not registered at all (a binding made ahead of it), has exited, or was registered
%%% during the copy; then it will be renewed.</li>
%%% <li>To the pure-Erlang store: a page of the native one has no binding to a server that has exited. The
%%% rows of a page are entered before the process handles another message, hence before the 'DOWN' of a
%%% server that exits after the page was read, and that 'DOWN' ends the binding.</li>
%%% <li>To the native store: a transport is bound only if the server is still registered there, and the
%%% native store ends the binding with the server from then on.</li>
%%% <li>A binding made ahead of a server must not end with an earlier server of that id whose exit only the source
%%% has handled. So that server is renewed, which removes it, before the transport is bound.</li>
%%% </ul>
-module(erlmcp_rollout_copy).

-export([to_classic/1, to_native/1, changed/3, slice/2, info/2, target/1, abandon/2, progress/1]).
-export([cleaning/1, clean/1]).

-export_type([copy/0, error/0, cleaning/0]).

-type error() :: {cannot_copy, {erlmcp_registry_native:kind(), Id :: term()}, Reason :: term()}.
%% A place in the native store: entries of this kind, in this shard, from this place on.
-type place() :: {erlmcp_registry_native:kind(), Shard :: non_neg_integer(), From :: non_neg_integer()}.

-record(copy, {
          %% What is left to copy.
          from :: {native, place() | none} | {classic, erlmcp_registry_classic:iterator()},
          to :: native | erlmcp_registry_classic:state(),
          %% Entries that were changed in the source and are to be renewed. `config': only the config has changed.
          servers = #{} :: #{Id :: term() => config | all},
          transports = #{} :: #{Id :: term() => all},
          renewed = 0 :: non_neg_integer(),
          %% The number of copied entries that have not been changed.
          copied = 0 :: non_neg_integer(),
          %% The number of entries of the source at the beginning.
          total :: non_neg_integer()
         }).

-opaque copy() :: #copy{}.

%% What is left to remove: entries of the native store, or monitors of the pure-Erlang store.
-type cleaning() :: {native, place()} |
                    {classic, erlmcp_registry_classic:iterator(), erlmcp_registry_classic:state()}.

%% A slice ends with the first step after this time. A step takes some 100 microseconds with small configs.
-define(SLICE_US, 4_000).
-define(PAGE,     256).
-define(STEP,     64).
%% Entries that may be renewed while changes are accepted, beyond the number of entries to be copied.
-define(RENEWALS, 10_000).
-define(REGISTRY, exclusive).

%%% Copying


%% @doc Starts a copy from the native store to an empty pure-Erlang store.
-spec to_classic(erlmcp_registry_classic:state()) -> copy().
to_classic(Target) ->
    #{servers := Servers, transports := Transports} = erlmcp_registry_native:counts(?REGISTRY),
    #copy{from = {native, {server, 0, 0}}, to = Target, total = Servers + Transports}.


%% @doc Starts a copy from the pure-Erlang store to the native store, which must be empty.
-spec to_native(erlmcp_registry_classic:state()) -> copy().
to_native(Source) ->
    #{servers := Servers, transports := Transports} = erlmcp_registry_classic:counts(Source),
    #copy{from = {classic, erlmcp_registry_classic:first(Source)}, to = native, total = Servers + Transports}.


%% @doc Records what is changed by a request that the process is about to execute in the source.
%% `Source' is the pure-Erlang store before the change, if it is the source. `refused': the request must not be
%% executed before the copy is done.
-spec changed(Request :: term(), Source :: erlmcp_registry_classic:state() | none, copy()) -> {ok, copy()} | refused.
changed(_Request, _Source, #copy{renewed = Renewed, total = Total}) when Renewed > Total + ?RENEWALS ->
    refused;
changed({update_server, Id, _Config}, _Source, Copy) ->
    {ok, server_changed(Id, config, Copy)};
changed({register_server, Id, _Pid, _Config}, Source, Copy) ->
    {ok, bound_changed(Id, Source, server_changed(Id, all, Copy))};
changed({unregister_server, Id}, Source, Copy) ->
    {ok, bound_changed(Id, Source, server_changed(Id, all, Copy))};
changed({register_transport, Id, _Pid, _Config}, _Source, Copy) ->
    {ok, transport_changed(Id, Copy)};
changed({unregister_transport, Id}, _Source, Copy) ->
    {ok, transport_changed(Id, Copy)};
changed({bind_transport_to_server, Id, _ServerId}, _Source, Copy) ->
    {ok, transport_changed(Id, Copy)};
changed({unbind_transport, Id}, _Source, Copy) ->
    {ok, transport_changed(Id, Copy)};
changed({restore_state, _Saved}, _Source, _Copy) ->
    %% The request changes all bindings.
    refused.


%% The transports that are bound to a server in a pure-Erlang store. The native store does not return their ids.
-spec bound_changed(Server :: term(), erlmcp_registry_classic:state() | none, copy()) -> copy().
bound_changed(_Id, none, Copy) -> Copy;
bound_changed(Id, Store, Copy) -> lists:foldl(fun transport_changed/2, Copy, erlmcp_registry_classic:bound_to(Id, Store)).


-spec server_changed(Id :: term(), config | all, copy()) -> copy().
server_changed(Id, config, #copy{servers = Servers} = Copy) when is_map_key(Id, Servers) -> Copy;
server_changed(Id, What, #copy{servers = Servers} = Copy) -> Copy#copy{servers = Servers#{Id => What}}.


-spec transport_changed(Id :: term(), copy()) -> copy().
transport_changed(Id, #copy{transports = Transports} = Copy) -> Copy#copy{transports = Transports#{Id => all}}.


-spec is_changed(erlmcp_registry_native:kind(), Id :: term(), copy()) -> boolean().
is_changed(server, Id, #copy{servers = Servers}) -> is_map_key(Id, Servers);
is_changed(transport, Id, #copy{transports = Transports}) -> is_map_key(Id, Transports).


%% @doc Copies for some milliseconds. `Source' is the pure-Erlang store as it is now, if it is the source.
-spec slice(copy(), Source :: erlmcp_registry_classic:state() | none) ->
          {continue | done, copy()} | {error, error(), copy()}.
slice(Copy, Source) ->
    slice(Copy, Source, now_us() + ?SLICE_US).


-spec slice(copy(), erlmcp_registry_classic:state() | none, DeadlineUs :: integer()) ->
          {continue | done, copy()} | {error, error(), copy()}.
slice(Copy, Source, DeadlineUs) ->
    case step(Copy, Source) of
        {continue, Next} ->
            case now_us() >= DeadlineUs of
                true -> {continue, Next};
                false -> slice(Next, Source, DeadlineUs)
            end;
        Ended ->
            Ended
    end.


-spec step(copy(), erlmcp_registry_classic:state() | none) -> {continue | done, copy()} | {error, error(), copy()}.
step(#copy{from = {native, none}} = Copy, none) ->
    renew(?STEP, none, Copy);
step(#copy{from = {native, {Kind, _, _} = Place}, to = Target, copied = Copied} = Copy, none) ->
    {Page, Next} = page(Place),
    Rows = [ Row || {Id, _, _, _} = Row <- Page, not is_changed(Kind, Id, Copy) ],
    {continue,
     Copy#copy{
       from = {native, Next},
       to = lists:foldl(fun(Row, State) -> erlmcp_registry_classic:insert(Kind, Row, State) end, Target, Rows),
       copied = Copied + length(Rows)
      }};
step(#copy{from = {classic, []}} = Copy, Source) ->
    renew(?STEP, Source, Copy);
step(#copy{from = {classic, Iterator}} = Copy, Source) ->
    to_native(?STEP, Iterator, Source, Copy).


-spec to_native(non_neg_integer(), erlmcp_registry_classic:iterator(), erlmcp_registry_classic:state(), copy()) ->
          {continue, copy()} | {error, error(), copy()}.
to_native(0, Iterator, _Source, Copy) ->
    {continue, Copy#copy{from = {classic, Iterator}}};
to_native(Left, Iterator, Source, #copy{copied = Copied} = Copy) ->
    case erlmcp_registry_classic:next(Iterator, Source) of
        none ->
            {continue, Copy#copy{from = {classic, []}}};
        {Kind, {Id, _, _, _} = Row, Next} ->
            case is_changed(Kind, Id, Copy) orelse enter(Kind, Row, Source) of
                true -> to_native(Left - 1, Next, Source, Copy);
                ok -> to_native(Left - 1, Next, Source, Copy#copy{copied = Copied + 1});
                %% The walk is released where it is.
                {error, Reason} -> {error, {cannot_copy, {Kind, Id}, Reason}, Copy#copy{from = {classic, Next}}}
            end
    end.


%%% Renewals


-spec renew(non_neg_integer(), erlmcp_registry_classic:state() | none, copy()) ->
          {continue | done, copy()} | {error, error(), copy()}.
renew(_Left, _Source, #copy{servers = Servers, transports = Transports} = Copy)
  when map_size(Servers) =:= 0, map_size(Transports) =:= 0 ->
    {done, Copy};
renew(0, _Source, Copy) ->
    {continue, Copy};
renew(Left, Source, #copy{servers = Servers, renewed = Renewed} = Copy) when map_size(Servers) > 0 ->
    {Id, What, _} = maps:next(maps:iterator(Servers)),
    case renew_server(Id, What, Source, Copy#copy{servers = maps:remove(Id, Servers), renewed = Renewed + 1}) of
        {ok, Next} -> renew(Left - 1, Source, Next);
        {error, Reason} -> {error, {cannot_copy, {server, Id}, Reason}, Copy}
    end;
renew(Left, Source, #copy{transports = Transports, renewed = Renewed} = Copy) ->
    {Id, all, _} = maps:next(maps:iterator(Transports)),
    Row = row(transport, Id, Source),
    case outlived(Row, Source, Copy) of
        {true, ServerId} ->
            renew(Left - 1, Source, server_changed(ServerId, all, Copy));
        false ->
            Rest = Copy#copy{transports = maps:remove(Id, Transports), renewed = Renewed + 1},
            case replace(transport, Id, Row, Source, Rest) of
                {ok, Next} -> renew(Left - 1, Source, Next);
                {error, Reason} -> {error, {cannot_copy, {transport, Id}, Reason}, Copy}
            end
    end.


-spec renew_server(Id :: term(), config | all, erlmcp_registry_classic:state() | none, copy()) ->
          {ok, copy()} | {error, term()}.
renew_server(Id, What, Source, #copy{to = Target} = Copy) ->
    case {row(server, Id, Source), target_row(server, Id, Target)} of
        {{_, Pid, Config, _}, {_, Pid, _, _}} when What =:= config ->
            {ok, Copy#copy{to = update(Id, Config, Target)}};
        {Row, _} when Source =:= none ->
            replace(server, Id, Row, none, bound_changed(Id, Target, Copy));
        {Row, _} ->
            replace(server, Id, Row, Source, bound_changed(Id, Source, Copy))
    end.


%% The server that a transport is bound to ahead of it, if the target still has an earlier server of that id.
-spec outlived(erlmcp_registry_native:row() | none, erlmcp_registry_classic:state() | none, copy()) ->
          {true, Server :: term()} | false.
outlived({_Id, _Pid, _Config, {bound, ServerId}}, Source, #copy{to = Target}) ->
    case row(server, ServerId, Source) =:= none andalso target_row(server, ServerId, Target) =/= none of
        true -> {true, ServerId};
        false -> false
    end;
outlived(_Row, _Source, _Copy) ->
    false.


-spec row(erlmcp_registry_native:kind(), Id :: term(), erlmcp_registry_classic:state() | none) ->
          erlmcp_registry_native:row() | none.
row(Kind, Id, none) -> target_row(Kind, Id, native);
row(Kind, Id, Source) -> target_row(Kind, Id, Source).


-spec target_row(erlmcp_registry_native:kind(), Id :: term(), native | erlmcp_registry_classic:state()) ->
          erlmcp_registry_native:row() | none.
target_row(Kind, Id, native) ->
    try
        erlmcp_registry_native:row(?REGISTRY, Kind, Id)
    catch
        %% No id of that length can be registered there.
        error:badarg -> none
    end;
target_row(Kind, Id, Classic) ->
    erlmcp_registry_classic:row(Kind, Id, Classic).


-spec update(Server :: term(), Config :: term(), native | erlmcp_registry_classic:state()) ->
          native | erlmcp_registry_classic:state().
update(Id, Config, native) ->
    %% The server may have exited.
    _ = erlmcp_registry_native:update_server(?REGISTRY, Id, Config),
    native;
update(Id, Config, Target) ->
    {_, Updated} = erlmcp_registry_classic:execute({update_server, Id, Config}, Target),
    Updated.


-spec replace(erlmcp_registry_native:kind(),
              Id :: term(),
              erlmcp_registry_native:row() | none,
              erlmcp_registry_classic:state() | none,
              copy()) -> {ok, copy()} | {error, term()}.
replace(Kind, Id, Row, Source, #copy{to = native} = Copy) ->
    ok = remove(Kind, Id),
    case Row =:= none orelse enter(Kind, Row, Source) of
        {error, Reason} -> {error, Reason};
        _Replaced -> {ok, Copy}
    end;
replace(Kind, Id, Row, none, #copy{to = Target} = Copy) ->
    Removed = erlmcp_registry_classic:remove(Kind, Id, Target),
    {ok, Copy#copy{
           to = case Row of
                    none -> Removed;
                    _ -> erlmcp_registry_classic:insert(Kind, Row, Removed)
                end
          }}.


-spec remove(erlmcp_registry_native:kind(), Id :: term()) -> ok.
remove(Kind, Id) ->
    try
        erlmcp_registry_native:unregister(?REGISTRY, Kind, Id)
    catch
        %% No id of that length can be registered there.
        error:badarg -> ok
    end.


-spec enter(erlmcp_registry_native:kind(), erlmcp_registry_native:row(), erlmcp_registry_classic:state()) ->
          ok | {error, term()}.
enter(Kind, {Id, Pid, Config, Binding}, Source) ->
    try erlmcp_registry_native:register(?REGISTRY, Kind, Id, Pid, Config) of
        ok when Kind =:= transport -> bind(Id, Binding, configured(Config), Source);
        Result -> Result
    catch
        error:badarg -> {error, badarg}
    end.


%% The native store has bound a transport as its config says.
-spec bind(Transport :: term(), erlmcp_registry_native:binding(), erlmcp_registry_native:binding(), erlmcp_registry_classic:state()) -> ok.
bind(_Id, unbound, unbound, _Source) ->
    ok;
bind(Id, unbound, _Configured, _Source) ->
    erlmcp_registry_native:unbind(?REGISTRY, Id);
bind(Id, {bound, ServerId} = Binding, Configured, Source) ->
    case erlmcp_registry_classic:has_server(ServerId, Source) of
        false when Binding =:= Configured ->
            ok;
        IsRegistered ->
            case erlmcp_registry_native:bind(?REGISTRY, Id, ServerId, IsRegistered) of
                ok -> ok;
                {error, server_not_found} -> erlmcp_registry_native:unbind(?REGISTRY, Id);
                {error, transport_not_found} -> ok
            end
    end.


-spec configured(Config :: term()) -> erlmcp_registry_native:binding().
configured(#{server_id := ServerId}) when ServerId =/= undefined -> {bound, ServerId};
configured(_Config) -> unbound.


%% @doc Handles a message that may be the 'DOWN' of a process that has been copied.
-spec info(Info :: term(), copy()) -> copy().
info(_Info, #copy{to = native} = Copy) -> Copy;
info(Info, #copy{to = Target} = Copy) -> Copy#copy{to = erlmcp_registry_classic:info(Info, Target)}.


-spec target(copy()) -> native | erlmcp_registry_classic:state().
target(#copy{to = Target}) ->
    Target.


%% @doc Ends an unfinished copy. Returns its target, which is incomplete.
-spec abandon(copy(), Source :: erlmcp_registry_classic:state() | none) -> native | erlmcp_registry_classic:state().
abandon(#copy{from = {classic, Left}, to = native}, Source) ->
    ok = erlmcp_registry_classic:release(Left, Source),
    native;
abandon(#copy{from = {native, _Place}, to = Target}, none) ->
    Target.


-spec progress(copy()) -> {Copied :: non_neg_integer(), Total :: non_neg_integer()}.
progress(#copy{copied = Copied, total = Total}) ->
    {Copied, Total}.


%%% Cleaning


%% @doc Starts {@link clean/1}, which removes the contents of a store that is no longer in force.
-spec cleaning(native | erlmcp_registry_classic:state()) -> cleaning().
cleaning(native) -> {native, {server, 0, 0}};
cleaning(Classic) -> {classic, erlmcp_registry_classic:first(Classic), Classic}.


%% @doc Removes for some milliseconds.
-spec clean(cleaning()) -> {continue, cleaning()} | done.
clean(Cleaning) ->
    clean(Cleaning, now_us() + ?SLICE_US).


-spec clean(cleaning(), DeadlineUs :: integer()) -> {continue, cleaning()} | done.
clean(Cleaning, DeadlineUs) ->
    case clean_step(Cleaning) of
        done ->
            done;
        Next ->
            case now_us() >= DeadlineUs of
                true -> {continue, Next};
                false -> clean(Next, DeadlineUs)
            end
    end.


-spec clean_step(cleaning()) -> cleaning() | done.
clean_step({native, {Kind, _, _} = Place}) ->
    {Rows, Next} = page(Place),
    ok = lists:foreach(fun({Id, _, _, _}) -> ok = erlmcp_registry_native:unregister(?REGISTRY, Kind, Id) end, Rows),
    case Next of
        none -> done;
        _ -> {native, Next}
    end;
clean_step({classic, Iterator, Classic}) ->
    case erlmcp_registry_classic:unmonitor(Iterator, Classic) of
        done ->
            ok = erlmcp_registry_classic:delete(Classic),
            done;
        Left ->
            {classic, Left, Classic}
    end.


%%% The native store


-spec page(place()) -> {[erlmcp_registry_native:row()], place() | none}.
page({Kind, Shard, From}) ->
    {Rows, Next} = erlmcp_registry_native:page(?REGISTRY, Kind, Shard, From, ?PAGE),
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    {Rows,
     case Next of
         none when Shard + 1 < Shards -> {Kind, Shard + 1, 0};
         none when Kind =:= server -> {transport, 0, 0};
         none -> none;
         _ -> {Kind, Shard, Next}
     end}.


-spec now_us() -> integer().
now_us() ->
    erlang:monotonic_time(microsecond).
