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
-type error() :: {id_too_long, MaxIdBytes :: pos_integer()} | {native_library, erlmcp_nif:load_error()}.


-spec of_id(term()) -> explanation() | {error, error()}.
of_id(Id) ->
    case erlmcp_native_registry:load_error() of
        none ->
            try
                maps:from_list([ {Namespace, entry(Namespace, Id)} || Namespace <- [connection, server, transport] ])
            catch
                %% Nothing else is wrong with an id.
                error:badarg -> {error, {id_too_long, maps:get(max_id_bytes, erlmcp_shard_registry:limits())}}
            end;
        LoadError ->
            {error, {native_library, LoadError}}
    end.


-spec entry(erlmcp_nif:namespace(), term()) -> entry().
entry(Namespace, Id) ->
    Shard = erlmcp_shard_registry:get_shard_id(Id),
    case erlmcp_native_registry:find(default, Namespace, Id) of
        {ok, {Pid, Config}} ->
            Entry = #{registered => true, shard => Shard, pid => Pid, config_bytes => erlang:external_size(Config)},
            details(Namespace, Id, Entry);
        {error, not_found} ->
            not_registered(Namespace, Shard)
    end.


%% Messages to a server or a transport that is not there are dropped with a warning.
-spec not_registered(erlmcp_nif:namespace(), erlmcp_admission_control:shard_id()) -> entry().
not_registered(connection, Shard) ->
    #{registered => false, shard => Shard, route => {error, not_found}, decided_by => registry};
not_registered(_Namespace, Shard) ->
    #{registered => false, shard => Shard, route => ok, decided_by => registry}.


-spec details(erlmcp_nif:namespace(), term(), entry() | map()) -> entry().
details(server, _Id, Entry) ->
    %% The bucket that pays is that of the transport that the message comes from.
    answered([circuit, admission], Entry);
details(Namespace, Id, #{shard := Shard} = Entry) ->
    case erlmcp_token_bucket:get_state(Namespace, Id) of
        {error, not_found} ->
            %% Gone meanwhile.
            not_registered(Namespace, Shard);
        Bucket when Namespace =:= connection ->
            answered([circuit, admission, token_bucket], Entry#{bucket => Bucket});
        Bucket ->
            Sends =
                case lets_through(token_bucket, #{bucket => Bucket}) of
                    true -> ok;
                    false -> {error, rate_limited}
                end,
            Binding = erlmcp_native_registry:bound_server(default, Id),
            answered([circuit, admission], Entry#{bucket => Bucket, sends => Sends, binding => Binding})
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
