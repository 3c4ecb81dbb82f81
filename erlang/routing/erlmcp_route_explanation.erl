%%% @private
%%% What a route to an id would answer now, and why. Asks the layers in their order (see {@link
%%% erlmcp_backpressure}) without a trace: no token is taken, no probe, nothing is counted.
%%%
%%% It is no snapshot: the layers are asked one after the other, and a message routed meanwhile may
%%% get another answer.
-module(erlmcp_route_explanation).

-export([of_id/1]).

-export_type([explanation/0, entry/0, error/0]).

-type explanation() :: #{connection := entry(), server := entry(), transport := entry()}.
-type entry() :: #{
                   registered := boolean(),
                   registry := native | classic,
                   shard := erlmcp_admission_control:shard_id(),
                   route := ok | {error, erlmcp_backpressure:reason()},
                   decided_by := layer(),
                   pid => pid(),
                   config_bytes => pos_integer(),
                   binding => {ok, Server :: term()} | {error, not_found},
                   bucket => erlmcp_token_bucket:state(),
                   sends => ok | {error, rate_limited}
                  }.
-type layer() :: registry | circuit | admission | token_bucket | none.
-type error() :: {id_too_long, MaxIdBytes :: pos_integer()} |
                 {native_library, erlmcp_nif:load_error()} |
                 registry_busy.

-define(REGISTRY, erlmcp_registry).


-spec of_id(term()) -> explanation() | {error, error()}.
of_id(Id) ->
    case erlmcp_native_registry:load_error() of
        none ->
            try
                maps:from_list([ {Namespace, entry(Namespace, Id)} || Namespace <- [connection, server, transport] ])
            catch
                %% Nothing else is wrong with an id.
                error:badarg -> {error, {id_too_long, maps:get(max_id_bytes, erlmcp_shard_registry:limits())}};
                throw:registry_busy -> {error, registry_busy}
            end;
        LoadError ->
            {error, {native_library, LoadError}}
    end.


-spec entry(erlmcp_nif:namespace(), term()) -> entry().
entry(Namespace, Id) ->
    Registry = registry(Namespace, Id),
    Known = #{registry => Registry, shard => erlmcp_shard_registry:get_shard_id(Id)},
    case find(Registry, Namespace, Id) of
        {ok, {Pid, Config}} ->
            Entry = Known#{registered => true, pid => Pid, config_bytes => erlang:external_size(Config)},
            details(Namespace, Id, Entry);
        {error, not_found} ->
            not_registered(Namespace, Known)
    end.


%% Messages to a server or a transport that is not there are dropped with a warning.
-spec not_registered(erlmcp_nif:namespace(), map()) -> entry().
not_registered(connection, Known) ->
    Known#{registered => false, route => {error, not_found}, decided_by => registry};
not_registered(_Namespace, Known) ->
    Known#{registered => false, route => ok, decided_by => registry}.


%%% The registry that looks an id up, and routes to it


-spec registry(erlmcp_nif:namespace(), term()) -> native | classic.
registry(connection, _Id) ->
    native;
registry(_Namespace, Id) ->
    Plan = erlmcp_rollout_plan:read(),
    case erlmcp_rollout_plan:path(Id, Plan) of
        classic ->
            case erlmcp_rollout_plan:keepers(Plan) =:= both andalso whereis(?REGISTRY) =:= undefined of
                %% Routes go on without the process that has the other one.
                true -> native;
                false -> classic
            end;
        _NativeOrJoining ->
            native
    end.


-spec find(native | classic, erlmcp_nif:namespace(), term()) -> {ok, {pid(), term()}} | {error, not_found}.
find(native, Namespace, Id) -> erlmcp_native_registry:find(default, Namespace, Id);
find(classic, server, Id) -> ask({find_server, Id});
find(classic, transport, Id) -> ask({find_transport, Id}).


-spec binding(native | classic, term()) -> {ok, term()} | {error, not_found}.
binding(native, Id) -> erlmcp_native_registry:bound_server(default, Id);
binding(classic, Id) -> ask({get_server_for_transport, Id}).


%% Without the process nothing is registered there, as far as a route is concerned.
-spec ask(term()) -> {ok, term()} | {error, not_found}.
ask(Request) ->
    try
        gen_server:call(?REGISTRY, Request)
    catch
        exit:{timeout, _} -> throw(registry_busy);
        exit:_ -> {error, not_found}
    end.


%%% Layers


-spec details(erlmcp_nif:namespace(), term(), entry() | map()) -> entry().
details(server, _Id, Entry) ->
    %% The bucket that pays is that of the transport that the message comes from.
    answered(layers(server, Entry), Entry);
details(transport, Id, #{registry := Registry} = Entry) ->
    answered(layers(transport, Entry), maps:merge(Entry#{binding => binding(Registry, Id)}, payer(Id)));
details(connection, Id, Entry) ->
    case erlmcp_token_bucket:get_state(connection, Id) of
        %% Gone meanwhile.
        {error, not_found} -> not_registered(connection, maps:with([registry, shard], Entry));
        Bucket -> answered(layers(connection, Entry), Entry#{bucket => Bucket})
    end.


%% The registry's process asks none.
-spec layers(erlmcp_nif:namespace(), map()) -> [layer()].
layers(_Namespace, #{registry := classic}) -> [];
layers(connection, _Entry) -> [circuit, admission, token_bucket];
layers(_Namespace, _Entry) -> [circuit, admission].


%% What a transport's messages to servers are paid from, if they are; only the native registry has
%% buckets.
-spec payer(Transport :: term()) -> map().
payer(Id) ->
    case erlmcp_token_bucket:get_state(transport, Id) of
        {error, not_found} ->
            #{};
        Bucket ->
            case lets_through(token_bucket, #{bucket => Bucket}) of
                true -> #{bucket => Bucket, sends => ok};
                false -> #{bucket => Bucket, sends => {error, rate_limited}}
            end
    end.


-spec answered([layer()], map()) -> entry().
answered([], Entry) ->
    Entry#{route => ok, decided_by => none};
answered([Layer | Layers], Entry) ->
    case lets_through(Layer, Entry) of
        true -> answered(Layers, Entry);
        false -> Entry#{route => {error, refusal(Layer)}, decided_by => Layer}
    end.


-spec lets_through(layer(), map()) -> boolean().
lets_through(circuit, _Entry) -> erlmcp_circuit_breaker_node:would_allow();
lets_through(admission, #{shard := Shard}) -> erlmcp_admission_control:check_admission(Shard) =:= ok;
lets_through(token_bucket, #{bucket := #{tokens := 0}}) -> not erlmcp_backpressure:has_token_buckets();
lets_through(token_bucket, _Entry) -> true.


-spec refusal(layer()) -> erlmcp_backpressure:reason().
refusal(circuit) -> circuit_open;
refusal(admission) -> shard_overloaded;
refusal(token_bucket) -> rate_limited.
