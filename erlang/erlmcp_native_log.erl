%%% @doc The log events of the application, which are telemetry events too.
%%%
%%% Every log event is a report: a map with the key `event' and the details of that event. Its metadata has
%%% `application => erlmcp_native', and a `report_cb' that formats it as one sentence. It has no domain,
%%% so OTP's default handler prints it without further configuration. This filter drops all of these events:
%%%
%%% ```
%%% logger:add_handler_filter(default, no_erlmcp_native,
%%%                           {fun(#{meta := #{application := erlmcp_native}}, _) -> stop;
%%%                               (_Event, _) -> ignore
%%%                            end, []}).
%%% '''
%%%
%%% Transitions are logged, never a single refused message.
%%%
%%% Where the host has the library <a href="https://github.com/beam-telemetry/telemetry">telemetry</a> loaded, each event is
%%% also executed as `[erlmcp_native, Event]', whatever the log level, with the measurements `#{count => 1}' and the
%%% details as metadata. Its handlers run in the process that has noticed the event: a caller, or a process of the
%%% application.
%%%
%%% <table border="1">
%%% <tr><th>event</th><th>level</th><th>details</th></tr>
%%% <tr><td>`native_library_not_loaded'</td><td>warning</td><td>`path', `reason', `remedy'</td></tr>
%%% <tr><td>`default_registry_exists'</td><td>warning</td><td>`existing', `configured'</td></tr>
%%% <tr><td>`bad_option'</td><td>warning</td><td>`reason'</td></tr>
%%% <tr><td>`registry_full'</td><td>warning</td><td>`max_entries', `suppressed'</td></tr>
%%% <tr><td>`shard_overloaded'</td><td>warning</td><td>`shard_id'</td></tr>
%%% <tr><td>`shard_recovered'</td><td>notice</td><td>`shard_id'</td></tr>
%%% <tr><td>`circuit_opened'</td><td>warning</td><td>`breaker': `node', `{name, Name}' or `{target, Target}'</td></tr>
%%% <tr><td>`circuit_half_open', `circuit_closed'</td><td>notice</td><td>`breaker'</td></tr>
%%% <tr><td>`health_degraded'</td><td>warning</td><td>`reasons'</td></tr>
%%% <tr><td>`health_ok'</td><td>notice</td><td></td></tr>
%%% <tr><td>`control_plane_not_started', `connection_events_not_started', `capability_store_not_started'</td><td>error</td><td>`reason'</td></tr>
%%% <tr><td>`switched'</td><td>notice</td><td>`from', `to', `details'</td></tr>
%%% <tr><td>`switch_failed'</td><td>error</td><td>`from', `to', `reason', `details'</td></tr>
%%% <tr><td>`unknown_target'</td><td>warning</td><td>`target', `id', `suppressed': the number of such
%%% events that were not logged since the last one</td></tr>
%%% <tr><td>`undelivered'</td><td>warning</td><td>`target', `id', `reason', `suppressed': a message that the
%%% registry's process could not pass on</td></tr>
%%% </table>
-module(erlmcp_native_log).

-include_lib("kernel/include/logger.hrl").

-export([log/3, format/1, health_format/2]).


%% @private
%% Logs an event, and executes it as a telemetry event.
-spec log(logger:level(), Event :: atom(), Details :: map()) -> ok.
log(Level, Event, Details) ->
    ok = ?LOG(Level, Details#{event => Event}, #{application => erlmcp_native, report_cb => fun ?MODULE:format/1}),
    execute(Event, Details).


%% The library is the host's, and optional: it is neither required nor loaded here. It catches the exceptions of
%% handlers.
-spec execute(Event :: atom(), Details :: map()) -> ok.
execute(Event, Details) ->
    Telemetry = telemetry,
    case erlang:function_exported(Telemetry, execute, 3) of
        true -> Telemetry:execute([erlmcp_native, Event], #{count => 1}, Details);
        false -> ok
    end.


%% @private
%% The `report_cb' of every line.
-spec format(logger:report()) -> {io:format(), [term()]}.
format(#{event := Event} = Report) ->
    {Format, Arguments} = text(Event, Report),
    {"erlmcp_native: " ++ Format, Arguments}.


-spec text(atom(), map()) -> {io:format(), [term()]}.
text(native_library_not_loaded, #{path := Path, reason := Reason, remedy := Remedy}) ->
    {"starts with the pure-Erlang registry (architecture_version current), because the native library ~ts cannot "
     "be loaded: ~0tp. To fix this, ~ts. Set require_native to true in the environment of erlmcp_native to refuse "
     "to start instead.",
     [Path, Reason, Remedy]};
text(default_registry_exists, #{existing := Existing, configured := Configured}) ->
    {"the default registry exists already with ~0tp and keeps these bounds; the configured ~0tp take effect if the "
     "application is started before the registry is first used",
     [Existing, Configured]};
text(bad_option, #{reason := Reason}) ->
    {"the settings of backpressure stay as they are, because of ~0tp in the environment of erlmcp_native", [Reason]};
text(registry_full, #{max_entries := MaxEntries, suppressed := Suppressed}) ->
    {"a registration was refused, since the registry has its ~b entries (max_entries)~ts", [MaxEntries, suppressed(Suppressed)]};
text(shard_overloaded, #{shard_id := Shard}) ->
    {"shard ~b is overloaded: its receivers have as many messages queued as it admits, and further ones are refused "
     "until they have caught up",
     [Shard]};
text(shard_recovered, #{shard_id := Shard}) ->
    {"shard ~b has recovered from overload", [Shard]};
text(circuit_opened, #{breaker := Breaker}) ->
    {"circuit breaker ~ts: open", [breaker(Breaker)]};
text(circuit_half_open, #{breaker := Breaker}) ->
    {"circuit breaker ~ts: half open", [breaker(Breaker)]};
text(circuit_closed, #{breaker := Breaker}) ->
    {"circuit breaker ~ts: closed", [breaker(Breaker)]};
text(health_degraded, #{reasons := Reasons}) ->
    {"health is degraded: [" ++ lists:append(lists:join(",", [ health_format(Reason, "0") || Reason <- Reasons ])) ++ "]",
     lists:append([ [Reason, 100] || Reason <- Reasons ])};
text(health_ok, _Report) ->
    {"health is ok again", []};
text(control_plane_not_started, #{reason := Reason}) ->
    {"the control plane could not be started: ~0tP. Messages are routed without it.", [Reason, 100]};
text(connection_events_not_started, #{reason := Reason}) ->
    {"the events of connections could not be started: ~0tP. Connections are registered without them.", [Reason, 100]};
text(capability_store_not_started, #{reason := Reason}) ->
    {"the capability store could not be started: ~0tP. Connections are registered and routed without it.", [Reason, 100]};
text(switched, #{from := From, to := To, details := Details}) ->
    {"switched from ~0tp to ~0tp: ~0tp", [From, To, Details]};
text(switch_failed, #{from := From, to := To, reason := Reason, details := Details}) ->
    {"not switched from ~0tp to ~0tp, because of ~0tp: ~0tp", [From, To, Reason, Details]};
text(unknown_target, #{target := Target, id := Id, suppressed := Suppressed}) ->
    {"no ~ts ~0tP to route to~ts", [target(Target), Id, 20, suppressed(Suppressed)]};
text(undelivered, #{target := Target, id := Id, reason := Reason, suppressed := Suppressed}) ->
    {"a message to ~ts ~0tP was not delivered: ~0tp~ts", [target(Target), Id, 20, Reason, suppressed(Suppressed)]};
text(Event, Report) ->
    {"~tp: ~0tp", [Event, maps:remove(event, Report)]}.


%% @private
%% The format of a reason of bad health, whose second argument is the depth. Shards are numbers, so only the reason
%% about the native library is printed with text.
-spec health_format(erlmcp_shard_health:reason(), Width :: string()) -> string().
health_format({native_library, _}, Width) -> "~" ++ Width ++ "tP";
health_format(_Reason, Width) -> "~" ++ Width ++ "ltP".


-spec breaker(node | {name, term()} | {target, term()}) -> iolist().
breaker(node) -> "of the node";
breaker({target, Target}) -> ["of ", io_lib:format("~0tP", [Target, 20])];
breaker({name, Name}) -> io_lib:format("~0tP", [Name, 20]).


-spec target(atom()) -> string().
target(transport_of) -> "transport bound to server";
target(server_of) -> "server bound to transport";
target(Target) -> atom_to_list(Target).


-spec suppressed(non_neg_integer()) -> iolist().
suppressed(0) -> "";
suppressed(Count) -> io_lib:format(" (~b such warnings suppressed)", [Count]).
