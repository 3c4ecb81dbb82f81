%%% @doc Selects the store of servers and transports, and the path that messages take to them.
%%%
%%% <table border="1">
%%% <tr><th>mode</th><th>registrations, bindings and look-ups</th><th>routes</th></tr>
%%% <tr><td>`current'</td><td>in the state of the registry's process, by requests to it, as in erlmcp
%%% itself</td><td>by that process, without waiting for it; no backpressure</td></tr>
%%% <tr><td>`{percent, P}'</td><td>in native memory, by the caller</td><td>by the caller for the ids with
%%% `erlang:phash2(Id, 100) < P'. For the other ids by that process, and the caller waits until the message is
%%% sent; no backpressure. A broadcast takes the path of the server's id</td></tr>
%%% <tr><td>`` '100x' ''</td><td>in native memory, by the caller</td><td>by the caller</td></tr>
%%% </table>
%%%
%%% This applies to the servers and transports of {@link erlmcp_registry}, by its functions and by requests
%%% to its named process. Connections ({@link erlmcp_shard_registry}) are always native. An anonymous
%%% instance has the kind of store that is configured when it starts.
%%%
%%% ```
%%% 1> erlmcp_rollout:set({percent, 10}).
%%% ok
%%% 2> erlmcp_rollout:status().
%%% '''
%%%
%%% == Switching ==
%%% {@link set/1} switches a running system, in both directions, in steps or at once. Only a switch from or
%%% to `current' copies anything. Meanwhile all requests are served from the store that is in force; changes
%%% are made by the registry's process. Only `restore_state', and changes that come faster than they can be copied,
%%% wait until the other store is complete and in force. If a change waits for too long, or an entry
%%% cannot be copied, everything stays as it was. No registration, binding or accepted message is lost by a
%%% switch, and messages from one process to another arrive in the order sent
%%% (`erlmcp_rollout_path' explains why).
%%%
%%% == Caveats ==
%%% <ul>
%%% <li>If a target has `message_queue_data' set to `off_heap', the runtime may, under contention, reorder messages
%%% from different senders (OTP 25 and newer). A message that the registry's process forwards and the next message,
%%% sent directly, have different senders.</li>
%%% <li>Killing the registry's process loses what waits in its mailbox: with `current' all messages that
%%% are on their way, with `{percent, P}' those whose senders wait for it. With `` '100x' '' there are
%%% none.</li>
%%% <li>A state that `current' accepts and the native store does not (more than `max_entries' registrations,
%%% ids longer than `max_id_bytes') makes a switch away from `current' fail.</li>
%%% <li>While a change waits, a process that does not wait for the answer to its change before it sends the next
%%% request to the registry's process may get the answer to that request first.</li>
%%% </ul>
%%%
%%% == Without the native library ==
%%% The mode is `current', whatever is configured, unless `require_native' is set; then neither the
%%% application nor the registry starts.
-module(erlmcp_rollout).

-export([set/1, set/2, get/0, status/0]).
-export([wanted/0, configure/0, remember/1, max_pause_ms/1, warn_unless_started/0]).

-export_type([mode/0, options/0, status/0]).

-type mode() :: current | '100x' | {percent, 0..100}.
-type options() :: #{max_pause_ms => pos_integer() | infinity}.
-type counts() :: #{servers := non_neg_integer(), transports := non_neg_integer()}.
-type classic() :: #{servers := non_neg_integer(), transports := non_neg_integer(), adopting := boolean()}.
%% `adopting': the process does not monitor all entries of its predecessor yet, which was killed. Requests have the same
%% results as afterwards, except that entries of exited processes of other nodes are still found.
-type status() :: #{
                    mode := mode(),
                    configured := mode(),
                    native_library := loaded | {not_loaded, erlmcp_nif:load_error()},
                    registry_process := pid() | undefined,
                    switching_to => none | mode(),
                    last_switch => none | map(),
                    classic => not_in_use | classic(),
                    native => not_in_use | counts()
                   }.

-define(REGISTRY, erlmcp_registry).
%% Callers of gen_server:call/2 give up after 5,000.
-define(MAX_PAUSE_MS, 3_000).
%% The mode that was set last, with a hash of the environment at that time; and which of these modes is in the
%% environment. Integers, since replacing a persistent term of any other kind scans all processes.
-define(REMEMBERED, {?MODULE, remembered}).
-define(WRITTEN,    {?MODULE, written}).


%% @equiv set(Mode, #{})
-spec set(mode()) -> ok | {error, term()}.
set(Mode) ->
    set(Mode, #{}).


%% @doc Switches to a mode, and returns when it is in force.
%%
%% The registry's process copies in slices of at most 5 milliseconds, between other requests. Changes that
%% have to wait are made at the end of the copy; if a change has waited for `max_pause_ms' (3,000, less than the
%% default timeout of callers, 5,000) the switch is given up. If there is no such process the mode takes effect
%% when it starts.
%%
%% A mode that is in force is put into the application environment, as `architecture_version', so that the
%% next process starts with it. The environment is written a moment later, and no function here waits for
%% that: the application controller does not answer while it stops an application.
%%
%% Errors:
%%
%% <ul>
%% <li>`{bad_option, Key, Value, Expected}': not a mode, or not an option</li>
%% <li>`{nif_not_loaded, Info}': without the native library there is only `current'</li>
%% <li>`{switching_to, Other}': a switch to another mode is going on. If it is a switch to the same mode, the function
%% waits for it and returns its result</li>
%% <li>`{cannot_copy, {Kind, Id}, Reason}', `{too_slow, Copied, Total}': the switch was given up, everything is as
%% before</li>
%% </ul>
-spec set(mode(), options() | [proplists:property()]) -> ok | {error, term()}.
set(Mode, MapOrList) ->
    Options = erlmcp_native_config:to_map(MapOrList),
    case check([erlmcp_native_config:check_mode(Mode), check_options(Options)]) of
        ok ->
            case erlmcp_registry_native:load_error() of
                LoadError when LoadError =/= none, Mode =/= current -> {error, {nif_not_loaded, LoadError}};
                _ -> switch(Mode, Options)
            end;
        Error ->
            Error
    end.


-spec check([ok | {error, term()}]) -> ok | {error, term()}.
check([]) -> ok;
check([ok | Others]) -> check(Others);
check([Error | _]) -> Error.


-spec check_options(term()) -> ok | {error, term()}.
check_options(Options) when is_map(Options) ->
    check([ check_option(Key, Value) || {Key, Value} <- maps:to_list(Options) ]);
check_options(Options) ->
    {error, {bad_option, options, Options, erlmcp_native_config:map_expected()}}.


-spec check_option(term(), term()) -> ok | {error, term()}.
check_option(max_pause_ms, infinity) -> ok;
check_option(max_pause_ms, Ms) when is_integer(Ms), Ms > 0 -> ok;
check_option(max_pause_ms, Other) -> {error, {bad_option, max_pause_ms, Other, "a positive integer or infinity"}};
check_option(Key, Value) -> {error, {bad_option, Key, Value, "the key max_pause_ms"}}.


%% @private
-spec max_pause_ms(options()) -> timeout().
max_pause_ms(Options) ->
    maps:get(max_pause_ms, Options, ?MAX_PAUSE_MS).


-spec switch(mode(), options()) -> ok | {error, term()}.
switch(Mode, Options) ->
    case whereis(?REGISTRY) of
        undefined -> remember(Mode);
        Registry -> command(Registry, {set, Mode, Options})
    end.


-spec command(pid(), term()) -> term().
command(Registry, Command) ->
    gen_server:call(Registry, {erlmcp_rollout, Command}, infinity).


%% @private
%% Makes the mode that is in force, or will be, the configured mode. The environment is written later.
-spec remember(mode()) -> ok.
remember(Mode) ->
    Environment = environment(),
    IsWritten = persistent_term:get(?REMEMBERED, none) =:= persistent_term:get(?WRITTEN, none),
    case IsWritten andalso Environment =:= Mode of
        true ->
            ok;
        false ->
            Unique = erlang:unique_integer([positive]) band 16#ffff,
            Remembered = erlmcp_rollout_path:plan(Mode, (Unique bsl 27) bor hash(Environment)),
            ok = persistent_term:put(?REMEMBERED, Remembered),
            _ = spawn(fun write_environment/0),
            ok
    end.


%% Another mode may be set while this process waits for the application controller, and its writer may be served
%% first. So every writer checks afterwards that it has written the last mode.
-spec write_environment() -> ok.
write_environment() ->
    Remembered = persistent_term:get(?REMEMBERED),
    Mode = erlmcp_rollout_path:mode(Remembered),
    ok = application:set_env(erlmcp_native, architecture_version, Mode, [{timeout, infinity}]),
    ok = persistent_term:put(?WRITTEN, Remembered),
    case persistent_term:get(?REMEMBERED) of
        Remembered -> ok;
        _Changed -> write_environment()
    end.


%% The mode that was set by {@link set/2}, until the environment has it or was changed otherwise.
-spec configured_mode() -> term().
configured_mode() ->
    Environment = environment(),
    Remembered = persistent_term:get(?REMEMBERED, none),
    IsPending = Remembered =/= persistent_term:get(?WRITTEN, none) andalso
        erlmcp_rollout_path:version(Remembered) band 16#7ffffff =:= hash(Environment),
    case IsPending of
        true -> erlmcp_rollout_path:mode(Remembered);
        false -> Environment
    end.


-spec environment() -> term().
environment() ->
    erlmcp_native_config:get(architecture_version).


-spec hash(term()) -> 0..16#7ffffff.
hash(Term) ->
    erlang:phash2(Term).


%% @doc The mode in force. While the registry's process does not run, the mode that it will start with.
%%
%% After a switch from `current' it is `{percent, 0}' until the messages that wait in the mailbox of the
%% registry's process have been sent.
-spec get() -> mode().
get() ->
    case whereis(?REGISTRY) of
        undefined -> configured();
        _Pid -> erlmcp_rollout_path:mode(erlmcp_rollout_path:read())
    end.


%% @doc The mode in force and the configured one, the switch that is going on and the last one, and the numbers of
%% servers and transports in the store in force.
%%
%% The parts that only the registry's process knows are missing while it does not run. The request waits behind the
%% messages in its mailbox.
-spec status() -> status().
status() ->
    Registry = whereis(?REGISTRY),
    Status = #{
               mode => ?MODULE:get(),
               configured => configured(),
               native_library =>
                   case erlmcp_registry_native:load_error() of
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
        %% The process has exited meanwhile.
        exit:_ -> #{registry_process => undefined}
    end.


-spec configured() -> mode().
configured() ->
    case wanted() of
        {ok, Mode} -> Mode;
        {error, _LoadError} -> current
    end.


%% @private
%% The mode to start with; an error if there is none, because the native library is required but not loaded.
-spec wanted() -> {ok, mode()} | {error, erlmcp_nif:load_error()}.
wanted() ->
    case erlmcp_registry_native:load_error() of
        none ->
            Mode = configured_mode(),
            case erlmcp_native_config:check_mode(Mode) of
                ok -> {ok, Mode};
                %% The application has reported the error, or was not started.
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
    case erlmcp_registry_native:load_error() of
        none ->
            {ok, Mode} = wanted(),
            set_if_running(Mode);
        LoadError ->
            warn(LoadError)
    end.


%% @private
%% When the registry starts alone, without the application, which would have logged the warning.
-spec warn_unless_started() -> ok.
warn_unless_started() ->
    case erlmcp_registry_native:load_error() of
        LoadError when LoadError =/= none ->
            case whereis(erlmcp_native_sup) of
                undefined -> warn(LoadError);
                _Pid -> ok
            end;
        none ->
            ok
    end.


-spec warn(erlmcp_nif:load_error()) -> ok.
warn(LoadError) ->
    erlmcp_native_log:log(warning, native_library_not_loaded, LoadError).


%% Nothing to do if the registry's process does not run: it reads the mode when it starts. A process that has just been
%% restarted may be continuing an interrupted switch.
-spec set_if_running(mode()) -> ok | {error, term()}.
set_if_running(Mode) ->
    case whereis(?REGISTRY) of
        undefined -> ok;
        Registry -> set_when_possible(Mode, Registry)
    end.


-spec set_when_possible(mode(), pid()) -> ok | {error, term()}.
set_when_possible(Mode, Registry) ->
    case command(Registry, {set, Mode, #{}}) of
        {error, {switching_to, _Other}} ->
            _ = command(Registry, await_switch),
            set_when_possible(Mode, Registry);
        Result ->
            Result
    end.
