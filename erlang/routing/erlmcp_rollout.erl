%%% @doc Which architecture routes: the pure-Erlang registry, the native one, or each a share of the ids.
%%%
%%% <table border="1">
%%% <tr><th>mode</th><th>registrations are in</th><th>looked up and routed by</th></tr>
%%% <tr><td>`current'</td><td>the registry's process, as in erlmcp itself</td><td>that process; no
%%% backpressure</td></tr>
%%% <tr><td>`{percent, P}'</td><td>both; that process makes every change</td><td>the native registry for
%%% the ids with `erlang:phash2(Id, 100) < P', that process for the others</td></tr>
%%% <tr><td>`` '100x' ''</td><td>the native registry</td><td>the native registry</td></tr>
%%% </table>
%%%
%%% This is about the servers and transports of {@link erlmcp_registry}, by its functions and by requests
%%% to its named process. Connections ({@link erlmcp_shard_registry}) are always native. An anonymous
%%% instance has the kind of registry that is in use when it starts.
%%%
%%% ```
%%% 1> erlmcp_rollout:set({percent, 10}).
%%% ok
%%% 2> erlmcp_rollout:compare(on).
%%% ok
%%% 3> erlmcp_rollout:status().
%%% '''
%%%
%%% == Switching ==
%%% {@link set/1} switches a running system, in both directions, in steps or at once. Registrations are
%%% copied where they are missing, then all are verified to be the same in both registries, and only then
%%% ids change sides; requests are served meanwhile. If the registries cannot be made equal, everything
%%% stays as it was. No registration, binding or accepted message is lost by a switch, and what one
%%% process sends to another one arrives in the order sent.
%%%
%%% == Caveats ==
%%% <ul>
%%% <li>With `{percent, P}' whoever routes by the registry's process waits until it has sent the message
%%% (with `current' it does not): the next one to the same target may take the other way, and must not
%%% overtake it.</li>
%%% <li>A target with `message_queue_data' set to `off_heap' may, under contention, have messages of
%%% different processes exchanged by the runtime (OTP 25 and newer). One that the registry's process
%%% forwarded and the next one, sent directly, are such a pair, at the moment of a switch.</li>
%%% <li>Killing the registry's process loses what waits in its mailbox: with `current' all messages that
%%% are on their way, with `{percent, P}' those whose senders wait for it. With `` '100x' '' there are
%%% none.</li>
%%% <li>What is accepted by `current' and not by the native registry (more than `max_entries'
%%% registrations, ids longer than `max_id_bytes') makes a switch away from `current' fail.</li>
%%% </ul>
%%%
%%% == Without the native library ==
%%% The mode is `current', whatever is configured, unless `require_native' is set; then neither the
%%% application nor the registry starts.
-module(erlmcp_rollout).

-include_lib("kernel/include/logger.hrl").

-export([set/1, get/0, status/0, compare/1]).
-export([wanted/0, configure/0, remember/1, warn_unless_started/0]).

-export_type([mode/0, status/0]).

-type mode() :: current | '100x' | {percent, 0..100}.
-type status() :: #{
                    mode := mode(),
                    configured := mode(),
                    native_library := loaded | {not_loaded, erlmcp_nif:load_error()},
                    registry_process := pid() | undefined,
                    switching_to => none | mode(),
                    last_switch => none | erlmcp_rollout_switch:result(),
                    comparison => #{
                                    is_on := boolean(),
                                    compared := non_neg_integer(),
                                    differences := non_neg_integer(),
                                    last_difference := none | map()
                                   },
                    classic => not_in_use | #{servers := non_neg_integer(), transports := non_neg_integer()},
                    native => not_in_use | #{servers := non_neg_integer(), transports := non_neg_integer()}
                   }.

-define(REGISTRY, erlmcp_registry).


%% @doc Switches to a mode, and returns when it is in force.
%%
%% The registry's process copies and verifies, some hundred entries at a time between requests, and takes
%% some 20 microseconds an entry: with 15,000 entries 0.1 to 0.4 s on two cores, in which no request waited
%% for more than 25 ms. If there is no such process the mode takes effect when it starts.
%%
%% The mode is put into the application environment, as `architecture_version', if it is in force. Errors:
%%
%% <ul>
%% <li>`{bad_option, architecture_version, Mode, Expected}': no mode</li>
%% <li>`{nif_not_loaded, Info}': without the native library there is only `current'</li>
%% <li>`{switching_to, Other}': a switch to another mode is going on. One to the same mode is waited for,
%% and its result returned</li>
%% <li>`{cannot_copy, {Kind, Id}, Reason}', `{registries_differ, {Kind, Id}}': given up, everything is as
%% before</li>
%% </ul>
-spec set(mode()) -> ok | {error, term()}.
set(Mode) ->
    case erlmcp_native_config:check_mode(Mode) of
        ok ->
            case erlmcp_native_registry:load_error() of
                LoadError when LoadError =/= none, Mode =/= current -> {error, {nif_not_loaded, LoadError}};
                _ -> switch(Mode)
            end;
        Error ->
            Error
    end.


-spec switch(mode()) -> ok | {error, term()}.
switch(Mode) ->
    case whereis(?REGISTRY) of
        undefined -> remember(Mode);
        Registry -> command(Registry, {set, Mode})
    end.


-spec command(pid(), term()) -> term().
command(Registry, Command) ->
    gen_server:call(Registry, {erlmcp_rollout, Command}, infinity).


%% @private
%% The mode that is in force, or will be, is the configured one from now on.
-spec remember(mode()) -> ok.
remember(Mode) ->
    case erlmcp_native_config:get(architecture_version) of
        Mode -> ok;
        _ -> application:set_env(erlmcp_native, architecture_version, Mode, [{timeout, infinity}])
    end.


%% @doc The mode in force. While the registry's process does not run, the one that it will start with.
%%
%% During a switch that is a mode with the same routes: `{percent, 100}' while {@link set/1} copies from the
%% native registry, `{percent, 0}' while it copies from the other one.
-spec get() -> mode().
get() ->
    case whereis(?REGISTRY) of
        undefined -> configured();
        _Pid -> erlmcp_rollout_switch:mode(erlmcp_rollout_plan:read())
    end.


%% @doc With `on', whatever one registry answers is checked by the other one, as long as both are in use
%% (`{percent, 0}' to `{percent, 100}').
%%
%% {@link status/0} counts what was compared and what was different, and has the last difference. That
%% costs a message to the registry's process for each look-up and route, of every id; what is different
%% because it has just changed does not count.
-spec compare(on | off) -> ok | {error, registry_not_running}.
compare(Switch) when Switch =:= on; Switch =:= off ->
    case whereis(?REGISTRY) of
        undefined -> {error, registry_not_running};
        Registry -> command(Registry, {compare, Switch =:= on})
    end.


%% @doc The mode in force and the configured one, the switch that is going on and the last one, how many
%% servers and transports either registry has, and what was compared since the registry's process started.
%%
%% What only that process knows is missing while it does not run. Takes its turn behind the messages
%% that wait for it.
-spec status() -> status().
status() ->
    Registry = whereis(?REGISTRY),
    Status = #{
               mode => ?MODULE:get(),
               configured => configured(),
               native_library =>
                   case erlmcp_native_registry:load_error() of
                       none -> loaded;
                       LoadError -> {not_loaded, LoadError}
                   end,
               registry_process => Registry
              },
    maps:merge(Status, of_process(Registry)).


-spec of_process(pid() | undefined) -> map().
of_process(undefined) ->
    #{};
of_process(Registry) ->
    try
        command(Registry, status)
    catch
        %% It has ended meanwhile.
        exit:_ -> #{registry_process => undefined}
    end.


-spec configured() -> mode().
configured() ->
    case wanted() of
        {ok, Mode} -> Mode;
        {error, _LoadError} -> current
    end.


%% @private
%% The mode to start with; an error if there is none, because the native library is required.
-spec wanted() -> {ok, mode()} | {error, erlmcp_nif:load_error()}.
wanted() ->
    case erlmcp_native_registry:load_error() of
        none ->
            Mode = erlmcp_native_config:get(architecture_version),
            case erlmcp_native_config:check_mode(Mode) of
                ok -> {ok, Mode};
                %% The application has said so, or was not asked.
                {error, _} -> {ok, erlmcp_native_config:default(architecture_version)}
            end;
        LoadError ->
            case erlmcp_native_config:get(require_native) of
                true -> {error, LoadError};
                _ -> {ok, current}
            end
    end.


%% @private
%% When the application starts: the configured mode, or `current' with a warning.
-spec configure() -> ok | {error, term()}.
configure() ->
    case erlmcp_native_registry:load_error() of
        none ->
            {ok, Mode} = wanted(),
            set_if_running(Mode);
        LoadError ->
            warn(LoadError)
    end.


%% @private
%% When the registry starts alone, without the application, which would have said so.
-spec warn_unless_started() -> ok.
warn_unless_started() ->
    case erlmcp_native_registry:load_error() of
        LoadError when LoadError =/= none ->
            case whereis(erlmcp_native_sup) of
                undefined -> warn(LoadError);
                _Pid -> ok
            end;
        none ->
            ok
    end.


-spec warn(erlmcp_nif:load_error()) -> ok.
warn(#{path := Path, reason := Reason, remedy := Remedy}) ->
    ?LOG_WARNING("erlmcp_native: starts with the pure-Erlang registry (architecture_version current), "
                 "because the native library ~ts cannot be loaded: ~0tp. To mend it, ~ts. Set "
                 "require_native to true in the environment of erlmcp_native to refuse to start instead.",
                 [Path, Reason, Remedy],
                 #{domain => [erlmcp_native], event => native_library_not_loaded}).


%% Nothing to do where nothing runs: the registry's process asks for itself. One that has just been
%% restarted may be at a switch that was cut short.
-spec set_if_running(mode()) -> ok | {error, term()}.
set_if_running(Mode) ->
    case whereis(?REGISTRY) of
        undefined -> ok;
        Registry -> set_when_possible(Mode, Registry)
    end.


-spec set_when_possible(mode(), pid()) -> ok | {error, term()}.
set_when_possible(Mode, Registry) ->
    case command(Registry, {set, Mode}) of
        {error, {switching_to, _Other}} ->
            _ = command(Registry, await_switch),
            set_when_possible(Mode, Registry);
        Result ->
            Result
    end.
