%%% @doc The functions for the shell, and the settings of a running node.
%%%
%%% ```
%%% 1> erlmcp_native:i().
%%% 2> erlmcp_native:top().
%%% 3> erlmcp_native:set(admission, #{threshold => 20000}).
%%% '''
%%%
%%% == Backpressure ==
%%% A message to a connection passes the connection's own breaker, if it has one ({@link erlmcp_target_breaker}), the
%%% node's circuit ({@link erlmcp_circuit_breaker}), the admission
%%% control of its shard ({@link erlmcp_admission_control}) and the token bucket of the connection
%%% that is charged ({@link erlmcp_token_bucket}), in that order, in one native call with the look-up. A connection with a
%%% message store gets it there ({@link erlmcp_shard_manager:set_delivery/2}), unless the store is full. A
%%% refusal is returned to the caller; nothing that was accepted is dropped. With `backpressure'
%%% set to `off' nothing is refused, except by a full store.
%%%
%%% The layers are native and guard the default registry, whether the application runs or not. While
%%% it does not run, nothing samples mailboxes, and admission control admits everything.
%%%
%%% == Logs ==
%%% Each opening and closing of the circuit, and each overload and recovery of a shard, is one line; a
%%% refused message never is. {@link erlmcp_native_log} lists all events, and shows how to filter them.
-module(erlmcp_native).

-export([i/0, info/0, health/0, explain/1, retry_after_ms/1, retry_after_ms/2]).
-export([top/0, busiest/1]).
-export([set/2]).

-export_type([info/0]).
-export_type([health/0, explanation/0, entry/0, explain_error/0]).

-type health() :: erlmcp_shard_health:health().

-type explanation() :: #{connection := entry(), server := entry(), transport := entry()}.
-type entry() :: #{
                   registered := boolean(),
                   registry := native | classic,
                   routed_by := caller | process,
                   shard := erlmcp_admission_control:shard_id(),
                   route := ok | {error, erlmcp_delivery:reason()},
                   decided_by := layer(),
                   retry_after_ms => non_neg_integer(),
                   pid => pid(),
                   config_bytes => pos_integer(),
                   binding => {ok, Server :: term()} | {error, not_found},
                   bucket => erlmcp_token_bucket:state(),
                   target_breaker => erlmcp_circuit_breaker:state(),
                   %% Of a connection.
                   delivery => mailbox | {batch, pos_integer()} | {store, erlmcp_message_store:info()},
                   sends => ok | {error, rate_limited}
                  }.
-type layer() :: registry | circuit | admission | token_bucket | message_store | none.
-type explain_error() :: {id_too_long, MaxIdBytes :: pos_integer()} |
                         {native_library, erlmcp_nif:load_error()} |
                         registry_busy.

%% Overloaded are the shards that have refused messages and have not recovered since.
-type backpressure() :: #{
                          backpressure := on | off,
                          circuit := erlmcp_circuit_breaker:node_state(),
                          overloaded_shards := [erlmcp_admission_control:shard_id()]
                         }.

-type info() :: #{
                  version := string(),
                  otp_release := string(),
                  nif_version := string(),
                  system_architecture := string(),
                  nif := loaded | {not_loaded, erlmcp_nif:load_error()},
                  application := running | stopped,
                  mode := erlmcp_rollout:mode(),
                  registry_process := pid() | undefined,
                  health := health(),
                  capability_store := erlmcp_capability_store:info(),
                  registry => erlmcp_shard_registry:stats(),
                  backpressure => backpressure(),
                  bindings => non_neg_integer(),
                  distinct_configs => non_neg_integer(),
                  message_stores => erlmcp_message_store:totals()
                 }.


%% @doc What is installed, what runs, and what the default registry holds.
%%
%% Like every function of this module it does not request the state of an application from a process, so it may
%% be called while the node stops.
%%
%% `registry', `backpressure', `bindings', `distinct_configs' and `message_stores' are there if the native library is loaded. `registry'
%% is the result of {@link erlmcp_shard_registry:stats/0}; `distinct_configs' counts the different config
%% terms that all registries keep, without those that take no memory (atoms, an empty list, local pids). Counting the
%% bindings costs in proportion to the transports, on a dirty scheduler.
-spec info() -> info().
info() ->
    Info = #{
             version => version(),
             otp_release => erlang:system_info(otp_release),
             nif_version => erlang:system_info(nif_version),
             system_architecture => erlang:system_info(system_architecture),
             application => application_state(),
             mode => erlmcp_rollout:get(),
             registry_process => whereis(erlmcp_registry),
             health => health(),
             capability_store => erlmcp_capability_store:info()
            },
    case erlmcp_registry_native:load_error() of
        none ->
            Info#{
              nif => loaded,
              registry => erlmcp_shard_registry:stats(),
              backpressure => backpressure_now(),
              bindings => length(erlmcp_registry_native:bindings(exclusive)),
              distinct_configs => erlmcp_registry_native:distinct_configs(),
              message_stores => erlmcp_message_store:totals()
             };
        LoadError ->
            Info#{nif => {not_loaded, LoadError}}
    end.


-spec backpressure_now() -> backpressure().
backpressure_now() ->
    #{shards := Shards} = erlmcp_shard_registry:limits(),
    Loads = [ {Shard, erlmcp_admission_control:load(Shard)} || Shard <- lists:seq(0, Shards - 1) ],
    #{
      backpressure => erlmcp_native_config:switch(),
      circuit => erlmcp_circuit_breaker:get_state(),
      overloaded_shards => [ Shard || {Shard, {_Depth, _Threshold, true}} <- Loads ]
     }.


%% @doc Whether the whole node is healthy; if not, why. Computed now, by the calling process, whether
%% the control plane runs or not. {@link erlmcp_shard_health} lists the reasons.
-spec health() -> health().
health() ->
    erlmcp_shard_health:check().


%% @doc Explains an id as a connection, as a server and as a transport: its entry, and what a route to it
%% would return now.
%%
%% `registered' says whether the id is registered at all; `registry' which store has it, `native' or `classic' for
%% the pure-Erlang one; and `routed_by' which process sends the messages routed to it, the `caller' or the registry's
%% `process' ({@link erlmcp_rollout}). For a registered id there are also its `pid' and `config_bytes', the size of its
%% config or capabilities in the external term format. `bucket' is the token bucket of a connection or a transport,
%% `binding' the server that a transport is bound to. `target_breaker' is there if the id has a breaker of its own
%% ({@link erlmcp_target_breaker}); where `circuit' decides, it is the node's circuit or that one. `delivery' is how a
%% connection gets its messages ({@link erlmcp_shard_manager:set_delivery/2}), with what is in its store.
%%
%% `route' is what {@link erlmcp_shard_manager:route_message/2} would return for a connection, {@link
%% erlmcp_registry:route_to_server/3} for a server, without regard to the bucket of the sending transport,
%% and {@link erlmcp_registry:route_to_transport/3} for a transport. `decided_by' is the layer that
%% decides it: `circuit', `admission', `token_bucket', `message_store', `registry' where the id is not registered (a
%% message to an unknown server or transport is dropped with a warning and `ok', as in erlmcp), or `none'. Messages
%% that the registry's process routes pass no layer. `retry_after_ms' is the time of {@link retry_after_ms/1}, 0 if the
%% message would be admitted; it is missing where the id is not registered.
%% `sends' is what the bucket of a transport would answer to a message that it sends to a server of the
%% native registry. Where the native registry has no such transport, `bucket' and `sends' are missing.
%%
%% Takes no token and no probe and counts nothing. The result is not a snapshot: the layers are asked one after the
%% other, and a message routed meanwhile may get another answer. An id that is too long for the native registry, for
%% which the other functions raise `badarg', is `{error, {id_too_long, MaxIdBytes}}', and so is one with a fun
%% other than `fun M:F/A', even if the pure-Erlang store has it. The pure-Erlang store is asked by a message to its
%% process; if the process does not answer within five seconds the result is `{error, registry_busy}'.
-spec explain(Id :: term()) -> explanation() | {error, explain_error()}.
explain(Id) ->
    case erlmcp_registry_native:load_error() of
        none ->
            try
                maps:from_list([ {Namespace, entry(Namespace, Id)} || Namespace <- [connection, server, transport] ])
            catch
                %% The only other fault of an id: a fun in it, whose size has no known bound.
                error:badarg -> {error, {id_too_long, maps:get(max_id_bytes, erlmcp_shard_registry:limits())}};
                throw:registry_busy -> {error, registry_busy}
            end;
        LoadError ->
            {error, {native_library, LoadError}}
    end.


%% @equiv retry_after_ms(connection, Id)
-spec retry_after_ms(Id :: term()) -> non_neg_integer() | {error, not_found}.
retry_after_ms(Id) ->
    retry_after_ms(connection, Id).


%% @doc After a refusal: the milliseconds until a message would be admitted, 0 if it would be admitted now.
%%
%% `connection': a message to a connection by {@link erlmcp_shard_manager:route_message/2}. `server': a message to
%% the server `ServerId' from the transport `TransportId', whose bucket is charged. `transport': a message to a
%% transport, which is charged to no bucket.
%%
%% The result is the longest of the times of the layers. A bucket: until it holds a whole token, if no other message
%% takes it. The circuit, and the target's own breaker: until it is half open; 1 while it is half open and all probes are
%% under way. A shard: until
%% the next sample is due, which may find its receivers as they were. If all of them admit it and the connection's message
%% store is full: 10. Another message may be admitted first, so a
%% caller that retries counts on another refusal.
%%
%% Takes no token and no probe and counts nothing. Constant time, on the calling scheduler: about as much as a
%% refusal. Messages that the registry's process routes pass no layer: 0. Raises `badarg' for an id that is too long to
%% be registered.
-spec retry_after_ms(connection, Id :: term()) -> non_neg_integer() | {error, not_found};
                    (transport, Id :: term()) -> non_neg_integer() | {error, not_found};
                    (server, {ServerId :: term(), TransportId :: term()}) -> non_neg_integer() | {error, not_found}.
retry_after_ms(connection, Id) -> wait_ms(connection, Id, []);
retry_after_ms(transport, Id) -> wait_ms(transport, Id, []);
retry_after_ms(server, {ServerId, TransportId}) -> wait_ms(server, ServerId, [TransportId]).


-spec wait_ms(erlmcp_nif:namespace(), term(), Payer :: [term()]) -> non_neg_integer() | {error, not_found}.
wait_ms(Namespace, Id, Payer) ->
    case erlmcp_registry_native:load_error() =:= none andalso sender(Namespace, Id) of
        caller ->
            case erlmcp_registry_native:forecast(Namespace, Id, Payer) of
                {undefined, 0} -> {error, not_found};
                {_Outcome, WaitMs} -> WaitMs
            end;
        process ->
            0;
        false when Namespace =:= connection ->
            {error, not_found};
        false ->
            0
    end.


%% @doc Changes `backpressure', `token_bucket', `admission', `circuit_breaker' or `health' in the running node and,
%% for the next start, in the application environment. See {@link erlmcp_native_config}.
%%
%% A map, property list or keyword list changes the keys that it names and keeps the others. Where the setting was
%% `infinity' or `off' it switches the layer on; keys that it does not name take their last value in force, else the
%% configured one, else the default.
%%
%% Concurrent changes are made one after the other. A change is completed even if the caller is killed.
%% It waits for no process except one that changes a setting. While the application controller stops an application
%% and does not answer, the environment is written later.
%%
%% Buckets keep their tokens, up to the new capacity; the circuit keeps its state, and its
%% failures are counted anew. Messages under way are judged by the former values or the new ones. A change of
%% `admission' or `backpressure' gives all shards the threshold of the configuration.
%%
%% `{error, {bad_option, Key, Value, Expected}}' changes nothing, and may be about another of these keys whose
%% value in the environment is wrong. Without the native library all keys but `health' return `{error,
%% {nif_not_loaded, Info}}'.
-spec set(erlmcp_native_config:live_key(), term()) ->
          ok | {error, erlmcp_native_config:error() | erlmcp_native_config:not_loaded()}.
set(Key, Value) ->
    erlmcp_native_config:set(Key, Value).


%% @doc Prints what {@link info/0} returns.
-spec i() -> ok.
i() ->
    Info = info(),
    io:format("erlmcp_native ~ts on OTP ~ts, ~ts~n",
              [maps:get(version, Info), maps:get(otp_release, Info), maps:get(system_architecture, Info)]),
    print("application", "~p", [maps:get(application, Info)]),
    print_mode(Info),
    print("erlmcp_registry", "~ts", [process_state(maps:get(registry_process, Info))]),
    print_health(maps:get(health, Info)),
    case Info of
        #{nif := {not_loaded, #{path := Path, reason := Reason, remedy := Remedy}}} ->
            print("native library", "NOT LOADED: ~ts", [Path]),
            print("reason", "~tp", [Reason]),
            print("remedy", "~ts", [Remedy]);
        #{
          nif := loaded,
          registry := Registry,
          backpressure := Backpressure,
          bindings := Bindings,
          distinct_configs := Configs,
          message_stores := #{stores := Stores, messages := Messages, bytes := Bytes}
         } ->
            print("native library", "loaded (NIF ~ts)", [maps:get(nif_version, Info)]),
            print_registry(Registry),
            print("bindings", "~b", [Bindings]),
            print("distinct configs", "~b", [Configs]),
            print("message stores", "~b with ~b messages, ~b bytes", [Stores, Messages, Bytes]),
            print_backpressure(Backpressure)
    end,
    print_capabilities(maps:get(capability_store, Info)).


%% @doc Measures for a time, and returns the busiest shards, and the connections with the longest mailboxes among those looked
%% at. Works whatever of the application runs.
%%
%% `shards' has those with the most messages a second, the deepest queues or the most refusals a second in that time: five
%% of each at most, without idle ones, ordered by messages. `not_found_per_second' is of all shards together, since a
%% message to an unknown id belongs to none.
%%
%% `connections' has ten connections at most with messages in their mailbox, the longest first. They are looked for in the
%% shards by depth, until 1,000 connections have been looked at or half a second has passed: `connections_looked_at' of
%% `connections_registered'. A connection with a message store has those messages there and not in its mailbox. Processes of
%% other nodes are not looked at.
%%
%% The caller sleeps for `IntervalMs' (1 to 60,000), in between two readings of the counts of all shards. Looking copies
%% the capabilities of the connections. `{error, {native_library, _}}' where the library is not loaded.
-spec busiest(IntervalMs :: 1..60_000) -> erlmcp_top:busiest() | {error, {native_library, erlmcp_nif:load_error()}}.
busiest(IntervalMs) ->
    erlmcp_top:busiest(IntervalMs).


%% @doc Measures for a second, and prints what {@link busiest/1} returns.
-spec top() -> ok.
top() ->
    case busiest(1_000) of
        {error, {native_library, #{path := Path}}} ->
            io:format("native library NOT LOADED: ~ts~n", [Path]);
        #{
          shards := Shards,
          not_found_per_second := NotFound,
          connections := Connections,
          connections_looked_at := LookedAt,
          connections_registered := Registered
         } ->
            io:format("~5ts ~11ts ~11ts ~11ts ~11ts ~11ts~n", ["SHARD", "MESSAGES/S", "REFUSED/S", "QUEUED", "THRESHOLD", "CONNECTIONS"]),
            lists:foreach(fun print_busy_shard/1, Shards),
            io:format("not found: ~b/s~n~n", [NotFound]),
            io:format("~11ts ~5ts ~-16ts ~ts~n", ["MAILBOX", "SHARD", "PROCESS", "CONNECTION"]),
            lists:foreach(fun print_busy_connection/1, Connections),
            io:format("looked at ~b of ~b connections~n", [LookedAt, Registered])
    end.


-spec print_busy_shard(erlmcp_top:shard()) -> ok.
print_busy_shard(Shard) ->
    #{
      shard_id := Id,
      messages_per_second := Messages,
      refusals_per_second := Refusals,
      queue_depth := Depth,
      threshold := Threshold,
      connections := Connections
     } = Shard,
    io:format("~5b ~11b ~11b ~11b ~11w ~11b~n", [Id, Messages, Refusals, Depth, Threshold, Connections]).


%% Long ids are cut.
-spec print_busy_connection(erlmcp_top:connection()) -> ok.
print_busy_connection(#{id := Id, pid := Pid, shard_id := Shard, message_queue_len := Length}) ->
    io:format("~11b ~5b ~-16ts ~ts~n", [Length, Shard, pid_to_list(Pid), io_lib:format("~0tP", [Id, 12])]).


%%% What is installed and what runs: printing


-spec print_mode(info()) -> ok.
print_mode(#{nif := loaded, mode := Mode}) when Mode =/= '100x' ->
    print("mode", "~tp (the figures below are those of the native registry; see erlmcp_rollout:status())", [Mode]);
print_mode(#{mode := Mode}) ->
    print("mode", "~tp", [Mode]).


-spec print_health(health()) -> ok.
print_health(ok) ->
    print("health", "ok", []);
print_health({degraded, Reasons}) ->
    print("health", "degraded", []),
    lists:foreach(fun(Reason) -> print("", erlmcp_native_log:health_format(Reason, ""), [Reason, 20]) end, Reasons).


-spec print_registry(erlmcp_shard_registry:stats()) -> ok.
print_registry(Registry) ->
    #{
      servers := Servers,
      transports := Transports,
      connections := Connections,
      memberships := Memberships,
      max_entries := MaxEntries,
      shards := Shards,
      fullest_shard := {Fullest, Most},
      emptiest_shard := {Emptiest, Least}
     } = Registry,
    print("servers", "~b", [Servers]),
    print("transports", "~b", [Transports]),
    print("connections", "~b", [Connections]),
    print("memberships", "~b", [Memberships]),
    print("entries", "~b of ~b", [Servers + Transports + Connections + Memberships, MaxEntries]),
    print("shards",
          "~b (fullest ~b: ~b, emptiest ~b: ~b)",
          [Shards, Fullest, Most, Emptiest, Least]).


-spec print_backpressure(backpressure()) -> ok.
print_backpressure(#{backpressure := Switch, circuit := Circuit, overloaded_shards := Overloaded}) ->
    print("backpressure", "~p", [Switch]),
    print("circuit", "~p", [Circuit]),
    print("overloaded", "~b shards ~w", [length(Overloaded), lists:sublist(Overloaded, 10)]).


-spec print_capabilities(erlmcp_capability_store:info()) -> ok.
print_capabilities(#{keys := Keys, terms := Terms, bytes := Bytes, max_bytes := MaxBytes}) ->
    print("capabilities", "~b keys of ~b terms, ~b of ~b bytes", [Keys, Terms, Bytes, MaxBytes]).


-spec print(string(), io:format(), [term()]) -> ok.
print(Name, Format, Arguments) ->
    io:format("  ~-18ts" ++ Format ++ "~n", [Name | Arguments]).


-spec process_state(pid() | undefined) -> string().
process_state(undefined) -> "not running";
process_state(Pid) -> "running as " ++ pid_to_list(Pid).


%% By the name of its top supervisor: the application controller does not answer while it stops an
%% application.
-spec application_state() -> running | stopped.
application_state() ->
    case whereis(erlmcp_native_sup) of
        undefined -> stopped;
        _Pid -> running
    end.


%% `get_key/2' reads a table. Where the application is not loaded, because only its modules are used,
%% the version is read from its resource file.
-spec version() -> string().
version() ->
    case application:get_key(?MODULE, vsn) of
        {ok, Version} -> Version;
        undefined -> version_of_file(code:where_is_file("erlmcp_native.app"))
    end.


-spec version_of_file(file:filename() | non_existing) -> string().
version_of_file(non_existing) ->
    "unknown";
version_of_file(File) ->
    case file:consult(File) of
        {ok, [{application, ?MODULE, Keys}]} -> proplists:get_value(vsn, Keys, "unknown");
        _ -> "unknown"
    end.


%%% Explanation: an id in one namespace


-spec entry(erlmcp_nif:namespace(), term()) -> entry().
entry(Namespace, Id) ->
    Registry = store(Namespace),
    Known = #{
              registry => Registry,
              routed_by => sender(Namespace, Id),
              shard => erlmcp_shard_registry:get_shard_id(Id)
             },
    case find(Registry, Namespace, Id) of
        {ok, {Pid, Config}} ->
            Entry = Known#{registered => true, pid => Pid, config_bytes => erlang:external_size(Config)},
            details(Namespace, Id, Entry);
        {error, not_found} ->
            not_registered(Namespace, Known)
    end.


%% Messages to a server or a transport that is not registered are dropped with a warning.
-spec not_registered(erlmcp_nif:namespace(), map()) -> entry().
not_registered(connection, Known) ->
    Known#{registered => false, route => {error, not_found}, decided_by => registry};
not_registered(_Namespace, Known) ->
    Known#{registered => false, route => ok, decided_by => registry}.


%%% The store that has an id, and the process that sends the messages routed to it


-spec store(erlmcp_nif:namespace()) -> native | classic.
store(connection) -> native;
store(_Namespace) -> erlmcp_rollout_path:store(erlmcp_rollout_path:read()).


-spec sender(erlmcp_nif:namespace(), term()) -> caller | process.
sender(connection, _Id) ->
    caller;
sender(_Namespace, Id) ->
    case erlmcp_rollout_path:of_id(Id, erlmcp_rollout_path:read()) of
        straight ->
            caller;
        call ->
            case whereis(erlmcp_registry) of
                undefined -> caller;
                _Pid -> process
            end;
        cast ->
            process
    end.


-spec find(native | classic, erlmcp_nif:namespace(), term()) -> {ok, {pid(), term()}} | {error, not_found}.
find(native, Namespace, Id) -> erlmcp_registry_native:find(exclusive, Namespace, Id);
find(classic, server, Id) -> ask({find_server, Id});
find(classic, transport, Id) -> ask({find_transport, Id}).


-spec binding(native | classic, term()) -> {ok, term()} | {error, not_found}.
binding(native, Id) -> erlmcp_registry_native:bound_server(exclusive, Id);
binding(classic, Id) -> ask({get_server_for_transport, Id}).


%% Without the process nothing is registered there, as far as a route is concerned.
-spec ask(term()) -> {ok, term()} | {error, not_found}.
ask(Request) ->
    try
        gen_server:call(erlmcp_registry, Request)
    catch
        exit:{timeout, _} -> throw(registry_busy);
        exit:_ -> {error, not_found}
    end.


%%% Layers


-spec details(erlmcp_nif:namespace(), term(), entry() | map()) -> entry().
details(server, Id, Entry) ->
    %% The bucket that is charged is that of the transport that the message comes from.
    with_forecast(server, Id, Entry);
details(transport, Id, #{registry := Registry} = Entry) ->
    with_forecast(transport, Id, maps:merge(Entry#{binding => binding(Registry, Id)}, payer(Registry, Id)));
details(connection, Id, Entry) ->
    case erlmcp_token_bucket:get_state(connection, Id) of
        {error, not_found} -> removed(connection, Entry);
        Bucket -> with_forecast(connection, Id, with_delivery(Id, Entry#{bucket => Bucket}))
    end.


-spec with_delivery(term(), map()) -> map().
with_delivery(Id, Entry) ->
    case erlmcp_shard_manager:delivery(Id) of
        {ok, {store, Store}} -> Entry#{delivery => {store, erlmcp_message_store:info(Store)}};
        {ok, Delivery} -> Entry#{delivery => Delivery};
        {error, not_found} -> Entry
    end.


%% The registry's process asks no layer.
-spec with_forecast(erlmcp_nif:namespace(), term(), map()) -> entry().
with_forecast(_Namespace, _Id, #{routed_by := process} = Entry) ->
    Entry#{route => ok, decided_by => none, retry_after_ms => 0};
with_forecast(Namespace, Id, Entry0) ->
    Entry = case erlmcp_target_breaker:state({Namespace, Id}) of
                {error, no_breaker} -> Entry0;
                State -> Entry0#{target_breaker => State}
            end,
    case erlmcp_registry_native:forecast(Namespace, Id, []) of
        {undefined, 0} -> removed(Namespace, Entry);
        {ok, 0} -> Entry#{route => ok, decided_by => none, retry_after_ms => 0};
        {Refusal, WaitMs} -> Entry#{route => {error, Refusal}, decided_by => layer(Refusal), retry_after_ms => WaitMs}
    end.


%% The entry was removed since it was found.
-spec removed(erlmcp_nif:namespace(), map()) -> entry().
removed(Namespace, Entry) ->
    not_registered(Namespace, maps:with([registry, routed_by, shard], Entry)).


-spec layer(circuit_open | shard_overloaded | rate_limited | store_full) -> layer().
layer(circuit_open) -> circuit;
layer(shard_overloaded) -> admission;
layer(rate_limited) -> token_bucket;
layer(store_full) -> message_store.


%% The bucket that a transport's messages to servers are charged to, if any; only the native registry has
%% buckets. After a switch to the other store its entries are removed in the background.
-spec payer(native | classic, Transport :: term()) -> map().
payer(classic, _Id) ->
    #{};
payer(native, Id) ->
    case erlmcp_token_bucket:get_state(transport, Id) of
        {error, not_found} -> #{};
        #{tokens := Tokens} = Bucket -> #{bucket => Bucket, sends => sends(Tokens)}
    end.


-spec sends(Tokens :: non_neg_integer() | infinity) -> ok | {error, rate_limited}.
sends(0) ->
    case erlmcp_token_bucket:are_asked() of
        true -> {error, rate_limited};
        false -> ok
    end;
sends(_Tokens) ->
    ok.
