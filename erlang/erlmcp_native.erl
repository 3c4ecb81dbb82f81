%%% @doc The face of `erlmcp_native' in the shell.
%%%
%%% ```
%%% 1> erlmcp_native:i().
%%% '''
-module(erlmcp_native).

-export([i/0, info/0, health/0, explain/1]).

-export_type([info/0]).
-export_type([health/0, explanation/0]).

-type health() :: erlmcp_shard_health:health().
-type explanation() :: erlmcp_route_explanation:explanation().

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
                  registry => erlmcp_shard_registry:stats(),
                  backpressure => erlmcp_backpressure:info(),
                  bindings => non_neg_integer(),
                  distinct_configs => non_neg_integer()
                 }.


%% @doc What is installed, what runs, and what the default registry holds.
%%
%% `registry', `backpressure', `bindings' and `distinct_configs' are there if the native library is loaded. `registry'
%% is that of {@link erlmcp_shard_registry:stats/0}; `distinct_configs' counts the different config
%% terms that all registries keep. Counting the bindings costs in proportion to the transports, on a
%% dirty scheduler.
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
             health => health()
            },
    case erlmcp_native_registry:load_error() of
        none ->
            Info#{
              nif => loaded,
              registry => erlmcp_shard_registry:stats(),
              backpressure => erlmcp_backpressure:info(),
              bindings => length(erlmcp_native_registry:bindings(default)),
              distinct_configs => erlmcp_native_registry:distinct_configs()
             };
        LoadError ->
            Info#{nif => {not_loaded, LoadError}}
    end.


%% @doc Whether all is well in the whole node; if not, why. Computed now, by the calling process, whether
%% the control plane is there or not. The reasons: {@link erlmcp_shard_health}.
-spec health() -> health().
health() ->
    erlmcp_shard_health:check().


%% @doc What is known of an id as a connection, as a server and as a transport, and what a route to it
%% would answer now.
%%
%% `registered' says whether it is there at all, `registry' which one looks it up and routes to it now:
%% `native', or `classic' for the pure-Erlang one ({@link erlmcp_rollout}). If it is there, so are its `pid' and `config_bytes', the size
%% that its config or capabilities have in the external term format. `bucket' is the token bucket of a
%% connection or a transport, `binding' the server that a transport is bound to.
%%
%% `route' is what {@link erlmcp_shard_manager:route_message/2} would answer for a connection, {@link
%% erlmcp_registry:route_to_server/3} for a server, whatever the bucket of the transport that pays says,
%% and {@link erlmcp_registry:route_to_transport/3} for a transport. `decided_by' is the layer that
%% decides it: `circuit', `admission', `token_bucket', `registry' where the id is not registered (a
%% message to no server or no transport is dropped with a warning and `ok', as in erlmcp), or `none'. What the
%% pure-Erlang registry routes passes no layer.
%% `sends' is what the bucket of a transport would answer to a message that it sends to a server of the
%% native registry. Where that has no such transport, `bucket' and `sends' are missing.
%%
%% Takes no token and no probe and counts nothing. An id that is too long for the native registry, for
%% which the other functions raise `badarg', is `{error, {id_too_long, MaxIdBytes}}', also where the
%% pure-Erlang one has it. That one is asked by a message to its process; if it does not answer within five
%% seconds that is `{error, registry_busy}'.
-spec explain(Id :: term()) -> explanation() | {error, erlmcp_route_explanation:error()}.
explain(Id) ->
    erlmcp_route_explanation:of_id(Id).


%% @doc Prints what {@link info/0} returns.
-spec i() -> ok.
i() ->
    Info = info(),
    io:format("erlmcp_native ~ts on OTP ~ts, ~ts~n",
              [maps:get(version, Info), maps:get(otp_release, Info), maps:get(system_architecture, Info)]),
    print("application", "~p", [maps:get(application, Info)]),
    print_mode(maps:get(mode, Info)),
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
          distinct_configs := Configs
         } ->
            print("native library", "loaded (NIF ~ts)", [maps:get(nif_version, Info)]),
            print_registry(Registry),
            print("bindings", "~b", [Bindings]),
            print("distinct configs", "~b", [Configs]),
            print_backpressure(Backpressure)
    end.


-spec print_mode(erlmcp_rollout:mode()) -> ok.
print_mode('100x') ->
    print("mode", "~tp", ['100x']);
print_mode(Mode) ->
    print("mode", "~tp (below is the native registry; of both tells erlmcp_rollout:status())", [Mode]).


-spec print_health(health()) -> ok.
print_health(ok) ->
    print("health", "ok", []);
print_health({degraded, Reasons}) ->
    print("health", "degraded", []),
    lists:foreach(fun(Reason) -> print("", "~tP", [Reason, 20]) end, Reasons).


-spec print_registry(erlmcp_shard_registry:stats()) -> ok.
print_registry(Registry) ->
    #{
      servers := Servers,
      transports := Transports,
      connections := Connections,
      max_entries := MaxEntries,
      shards := Shards,
      fullest_shard := {Fullest, Most},
      emptiest_shard := {Emptiest, Least}
     } = Registry,
    print("servers", "~b", [Servers]),
    print("transports", "~b", [Transports]),
    print("connections", "~b", [Connections]),
    print("entries", "~b of ~b", [Servers + Transports + Connections, MaxEntries]),
    print("shards",
          "~b (fullest ~b: ~b, emptiest ~b: ~b)",
          [Shards, Fullest, Most, Emptiest, Least]).


-spec print_backpressure(erlmcp_backpressure:info()) -> ok.
print_backpressure(#{backpressure := Switch, circuit := Circuit, overloaded_shards := Overloaded}) ->
    print("backpressure", "~p", [Switch]),
    print("circuit", "~p", [Circuit]),
    print("overloaded", "~b shards ~w", [length(Overloaded), lists:sublist(Overloaded, 10)]).


-spec print(string(), io:format(), [term()]) -> ok.
print(Name, Format, Arguments) ->
    io:format("  ~-18ts" ++ Format ++ "~n", [Name | Arguments]).


-spec process_state(pid() | undefined) -> string().
process_state(undefined) -> "not running";
process_state(Pid) -> "running as " ++ pid_to_list(Pid).


-spec application_state() -> running | stopped.
application_state() ->
    case lists:keymember(?MODULE, 1, application:which_applications()) of
        true -> running;
        false -> stopped
    end.


-spec version() -> string().
version() ->
    _ = application:load(?MODULE),
    case application:get_key(?MODULE, vsn) of
        {ok, Version} -> Version;
        undefined -> "unknown"
    end.
