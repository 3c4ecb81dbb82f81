%%% @doc The configuration: the application environment of `erlmcp_native', checked at start, and the settings in
%%% force, which it writes to native memory.
%%%
%%% <table border="1">
%%% <tr><th>key</th><th>default</th><th>values</th></tr>
%%% <tr><td>`shards'</td><td>64</td><td>a power of two from 1 to 1024</td></tr>
%%% <tr><td>`max_entries'</td><td>2,000,000</td><td>1 to 2^28</td></tr>
%%% <tr><td>`max_id_bytes'</td><td>65,535</td><td>1 to 2^24</td></tr>
%%% <tr><td>`architecture_version' *</td><td>`` '100x' ''</td><td>`current', `` '100x' '' or `{percent,
%%% 0..100}': which registry routes; see {@link erlmcp_rollout}. If it is not set, the value of the application
%%% `erlmcp' is used</td></tr>
%%% <tr><td>`require_native'</td><td>`false'</td><td>`true' or `false': whether to refuse to start where
%%% the native library cannot be loaded, instead of starting with `current'</td></tr>
%%% <tr><td>`same_pid'</td><td>`already_registered'</td><td>`already_registered' or `ok': the result of
%%% registering a server or transport under an id that the same process already has</td></tr>
%%% <tr><td>`global_timeout_ms'</td><td>5000</td><td>1 to 86,400,000: how long a call in the scope `global'
%%% waits for other nodes</td></tr>
%%% <tr><td>`capability_store'</td><td>`#{max_terms => 1000, max_bytes => 67108864}'</td><td>a map with
%%% either key or both: 1 to 10,000 terms, 1 to 2^29 bytes; see {@link erlmcp_capability_store}</td></tr>
%%% <tr><td>`backpressure' *</td><td>`on'</td><td>`on' or `off': whether messages are refused at
%%% all</td></tr>
%%% <tr><td>`token_bucket' *</td><td>`#{capacity => 1000, rate_per_second => 10000}'</td><td>a map with
%%% either key or both, or `infinity'; see {@link erlmcp_token_bucket}</td></tr>
%%% <tr><td>`admission' *</td><td>`#{threshold => auto, sample_interval_ms => 100}'</td><td>a map with
%%% either key or both, or `infinity'; see {@link erlmcp_admission_control}</td></tr>
%%% <tr><td>`circuit_breaker' *</td><td>`#{failure_threshold => 50, window_ms => 10000,
%%% success_threshold => 10, timeout_ms => 30000, probe_limit => 10}'</td><td>a map with any of these keys,
%%% or `off'; see {@link erlmcp_circuit_breaker}</td></tr>
%%% <tr><td>`health' *</td><td>`#{queue_depth_percent => 80, run_queue_per_scheduler => 100,
%%% scheduler_use_percent => 95, memory_bytes => machine}'</td><td>a map with any of these keys; see
%%% {@link erlmcp_shard_health}</td></tr>
%%% </table>
%%%
%%% Where {@link erlmcp_registry} is started without the application it reads `architecture_version',
%%% `require_native', `same_pid', `backpressure', `token_bucket' and `circuit_breaker' too; admission control
%%% is off then.
%%%
%%% The first three keys are the bounds of the default registry and cannot be changed once it exists.
%%% `same_pid', `global_timeout_ms' and `capability_store' are read whenever they are needed. Keys with a star are changed in a running
%%% system: `architecture_version' by {@link erlmcp_rollout:set/1}, the others by {@link erlmcp_native:set/2};
%%% `application:set_env/3' alone takes effect at the next start.
%%%
%%% Every value that is a map can also be given as a property list or an Elixir keyword list. Keys that it does not
%%% name have their defaults at the start.
-module(erlmcp_native_config).

-export([check/0,
         check_mode/1,
         registry_limits/1,
         token_bucket/1,
         token_bucket_change/1,
         too_slow_to_fill/0,
         default/1,
         to_map/1,
         check_target_breaker/1,
         map_expected/0]).
%% What is in force, and changes in a running system
-export([get/1, health/0, global_timeout_ms/0, capability_store/0, set/2, configure/0, configure_alone/0, begin_admission/0, forget/0, switch/0]).
-export([set_threshold/2]).

-export_type([limits/0, error/0, not_loaded/0, key/0, live_key/0]).

-type limits() :: {Shards :: pos_integer(), MaxEntries :: pos_integer(), MaxIdBytes :: pos_integer()}.
-type error() :: {bad_option, Key :: term(), Value :: term(), Expected :: string()}.
-type not_loaded() :: {nif_not_loaded, erlmcp_nif:load_error()}.
-type key() :: shards |
               max_entries |
               max_id_bytes |
               same_pid |
               global_timeout_ms |
               capability_store |
               architecture_version |
               require_native |
               backpressure |
               token_bucket |
               admission |
               circuit_breaker |
               health.
%% Values that are checked alike.
-type checked() :: key() | target_breaker.
-type live_key() :: backpressure | token_bucket | admission | circuit_breaker | health.

%% 2^53 ns.
-define(MAX_FILL_SECONDS, 9_007_199).
-define(REGISTRY_KEYS,    [shards, max_entries, max_id_bytes]).
%% The keys of the native layers. They are checked together, since `backpressure' applies them all.
-define(LAYER_KEYS, [backpressure, token_bucket, admission, circuit_breaker]).
-define(LIVE_KEYS,  [health | ?LAYER_KEYS]).
-define(IS_LIVE(Key), Key =:= backpressure; Key =:= token_bucket; Key =:= admission; Key =:= circuit_breaker; Key =:= health).
%% How long a change waits for the application controller, which does not answer while it stops an
%% application.
-define(ENVIRONMENT_MS, 100).
-define(ROLLOUT_KEYS,   [architecture_version, require_native]).
-define(KEYS,           (?REGISTRY_KEYS ++ ?ROLLOUT_KEYS ++ [same_pid, global_timeout_ms, capability_store | ?LIVE_KEYS])).


%% @doc The value of a key in force: the one that was set last, or was configured when the application started; else
%% that of the application environment, completed by defaults.
-spec get(key()) -> term().
get(Key) when ?IS_LIVE(Key) ->
    case erlmcp_setting_store:read(Key) of
        {ok, {Value, _LastMap}} -> Value;
        none -> configured(Key)
    end;
get(Key) ->
    configured(Key).


%% @doc The limits of health in force. Without the application the environment has not been checked: wrong limits
%% are ignored.
-spec health() -> map().
health() ->
    case in_force([health]) of
        {ok, #{health := Limits}} -> Limits;
        {error, _} -> default(health)
    end.


%% @doc How long a call in the scope `global' waits for other nodes. The environment may have been changed since it
%% was checked, or not checked at all without the application: a wrong value is ignored.
-spec global_timeout_ms() -> pos_integer().
global_timeout_ms() ->
    valid_or_default(global_timeout_ms).


%% @doc The bounds of {@link erlmcp_capability_store}. A wrong value is ignored, as above.
-spec capability_store() -> #{max_terms := pos_integer(), max_bytes := pos_integer()}.
capability_store() ->
    valid_or_default(capability_store).


-spec valid_or_default(key()) -> term().
valid_or_default(Key) ->
    case check_value(Key, of_environment(Key), default(Key)) of
        {ok, Complete} -> Complete;
        {expected, _} -> default(Key)
    end.


-spec of_environment(key()) -> term().
of_environment(Key) ->
    application:get_env(erlmcp_native, Key, default_or_of_erlmcp(Key)).


%% Wrong values are returned as they are.
-spec configured(key()) -> term().
configured(Key) ->
    Value = of_environment(Key),
    case check_value(Key, Value, default(Key)) of
        {ok, Complete} -> Complete;
        {expected, _} -> Value
    end.


%% erlmcp itself has this key too.
-spec default_or_of_erlmcp(key()) -> term().
default_or_of_erlmcp(architecture_version) ->
    application:get_env(erlmcp, architecture_version, default(architecture_version));
default_or_of_erlmcp(Key) ->
    default(Key).


%% @doc Checks a value of `architecture_version'.
-spec check_mode(term()) -> ok | {error, error()}.
check_mode(Mode) ->
    case first_error([{architecture_version, Mode}], ?ROLLOUT_KEYS) of
        none -> ok;
        Error -> {error, Error}
    end.


%% @doc The bounds of the default registry, from the application environment. Checks all keys of it.
-spec check() -> {ok, limits()} | {error, error()}.
check() ->
    %% `included_applications' is added to every application's environment by some releases of OTP.
    Own = [ Setting
            || {Key, _} = Setting <- application:get_all_env(erlmcp_native), Key =/= included_applications ],
    Environment = [{architecture_version, ?MODULE:get(architecture_version)} | lists:keydelete(architecture_version, 1, Own)],
    case first_error(Environment, ?KEYS) of
        none ->
            registry_limits(maps:with(?REGISTRY_KEYS, maps:from_list(Environment)));
        Error ->
            {error, Error}
    end.


%% @doc The bounds of a registry from a map of options; an option that is not given has its default.
-spec registry_limits(map()) -> {ok, limits()} | {error, error()}.
registry_limits(Options) ->
    case first_error(maps:to_list(Options), ?REGISTRY_KEYS) of
        none -> {ok, list_to_tuple([ maps:get(K, Options, default(K)) || K <- ?REGISTRY_KEYS ])};
        Error -> {error, Error}
    end.


%% @doc Limits of a token bucket, checked and completed.
-spec token_bucket(term()) -> {ok, infinity | map()} | {error, error()}.
token_bucket(Limits) ->
    case check_value(token_bucket, Limits, default(token_bucket)) of
        {ok, Complete} -> {ok, Complete};
        {expected, Expected} -> {error, {bad_option, token_bucket, Limits, Expected}}
    end.


%% @doc Limits of a token bucket, checked and not completed. Whether the bucket fills within 104 days depends on
%% the limits that are not given.
-spec token_bucket_change(term()) -> {ok, infinity | map()} | {error, error()}.
token_bucket_change(Limits) ->
    Change = to_map(Limits),
    Checked =
        case validate(token_bucket, Change) of
            ok when map_size(Change) =:= 2 -> check_complete(token_bucket, Change);
            ok -> {ok, Change};
            Wrong -> Wrong
        end,
    case Checked of
        {ok, _} -> Checked;
        {expected, Expected} -> {error, {bad_option, token_bucket, Limits, lists:flatten(Expected)}}
    end.


%% @private
%% The options of a target's breaker ({@link erlmcp_target_breaker:set/2}), in the order of the native config.
-spec check_target_breaker(term()) -> {ok, erlmcp_nif:breaker_config()} | {error, error()}.
check_target_breaker(Options) ->
    case check_value(target_breaker, Options, default(target_breaker)) of
        {ok, Complete} -> {ok, native_breaker(Complete)};
        {expected, Expected} -> {error, {bad_option, target_breaker, Options, Expected}}
    end.


-spec native_breaker(#{atom() => integer()}) -> erlmcp_nif:breaker_config().
native_breaker(CircuitBreaker) ->
    #{
      failure_threshold := FailureThreshold,
      window_ms := WindowMs,
      success_threshold := SuccessThreshold,
      timeout_ms := TimeoutMs,
      probe_limit := ProbeLimit
     } = CircuitBreaker,
    {FailureThreshold, WindowMs, SuccessThreshold, TimeoutMs, ProbeLimit}.


%% @doc The default of a key.
-spec default(atom()) -> term().
default(shards) -> 64;
default(max_entries) -> 2_000_000;
default(max_id_bytes) -> 65_535;
default(same_pid) -> already_registered;
default(global_timeout_ms) -> 5000;
default(capability_store) -> #{max_terms => 1000, max_bytes => 64 bsl 20};
default(architecture_version) -> '100x';
default(require_native) -> false;
default(backpressure) -> on;
default(token_bucket) -> #{capacity => 1000, rate_per_second => 10000};
default(admission) -> #{threshold => auto, sample_interval_ms => erlmcp_shard_sampler:default_interval_ms()};
default(health) ->
    #{
      queue_depth_percent => 80,
      run_queue_per_scheduler => 100,
      scheduler_use_percent => 95,
      memory_bytes => machine
     };
%% No key of the environment.
default(target_breaker) ->
    #{
      failure_threshold => 5,
      window_ms => 10000,
      success_threshold => 2,
      timeout_ms => 30000,
      probe_limit => 2
     };
default(circuit_breaker) ->
    #{
      failure_threshold => 50,
      window_ms => 10000,
      success_threshold => 10,
      timeout_ms => 30000,
      probe_limit => 10
     }.


%%% Changes in a running system


%% @doc Changes a key in the running system and in the application environment; see {@link erlmcp_native:set/2}.
%%
%% Changes the layers first, then the setting in force, then the environment. If the process that does this is killed
%% in between, all of it is done again.
-spec set(live_key() | term(), term()) -> ok | {error, error() | not_loaded()}.
set(Key, Value) when ?IS_LIVE(Key) ->
    erlmcp_setting_store:serialised(fun() -> set_live(Key, Value) end);
set(Key, Value) ->
    {error, {bad_option, Key, Value, one_of(?LIVE_KEYS)}}.


-spec set_live(live_key(), term()) -> ok | {error, error() | not_loaded()}.
set_live(Key, Value) ->
    {InForce, LastMap} = in_force_and_last(Key),
    case check_value(Key, Value, first_map([InForce, LastMap, configured_or_default(Key), default(Key)])) of
        {ok, New} ->
            case apply_setting(Key, New) of
                ok ->
                    ok = erlmcp_setting_store:write(Key, {New, first_map([New, InForce, LastMap])}),
                    set_environment(Key, New);
                Error ->
                    Error
            end;
        {expected, Expected} ->
            {error, {bad_option, Key, Value, Expected}}
    end.


-spec in_force_and_last(live_key()) -> {term(), map() | none}.
in_force_and_last(Key) ->
    case erlmcp_setting_store:read(Key) of
        {ok, Stored} -> Stored;
        none -> {configured_or_default(Key), none}
    end.


%% Falls back to the default, so that a wrong value of the environment can be corrected.
-spec configured_or_default(live_key()) -> term().
configured_or_default(Key) ->
    case checked([{Key, configured(Key)}]) of
        {ok, #{Key := Value}} -> Value;
        {error, _} -> default(Key)
    end.


-spec first_map([term()]) -> map() | none.
first_map([Map | _]) when is_map(Map) -> Map;
first_map([_ | Rest]) -> first_map(Rest);
first_map([]) -> none.


%% So that a start of the application finds the setting. A controller that does not answer in time still has the
%% request, in the order of the changes.
-spec set_environment(live_key(), term()) -> ok.
set_environment(Key, Value) ->
    try
        application:set_env(erlmcp_native, Key, Value, [{timeout, ?ENVIRONMENT_MS}])
    catch
        exit:{timeout, _} -> ok
    end.


%% @private
%% Puts the application environment in force, whatever was set before.
-spec configure() -> ok | {error, error()}.
configure() ->
    erlmcp_setting_store:serialised(fun() ->
                                            ok = clear(),
                                            configure_layers()
                                    end).


-spec configure_layers() -> ok | {error, error()}.
configure_layers() ->
    case in_force(?LIVE_KEYS) of
        {ok, Settings} ->
            ok = apply_layer(backpressure, Settings),
            ok = apply_layer(token_bucket, Settings),
            maps:foreach(fun(Key, Value) -> ok = erlmcp_setting_store:write(Key, {Value, none}) end, Settings);
        Error ->
            Error
    end.


%% @private
%% When the registry starts alone, without the application: as {@link configure/0}, but keeps settings that were set.
%% The environment has not been checked.
-spec configure_alone() -> ok.
configure_alone() ->
    case is_started() orelse erlmcp_setting_store:serialised(fun() -> apply_in_force([backpressure, token_bucket]) end) of
        true -> ok;
        ok -> ok;
        {error, Error} -> erlmcp_native_log:log(warning, bad_option, #{reason => Error})
    end.


%% @private
%% When the samplers have been started: puts the configured thresholds in force.
-spec begin_admission() -> ok | {error, error()}.
begin_admission() ->
    erlmcp_setting_store:serialised(fun() -> apply_in_force([admission]) end).


%% @private
%% When the application has stopped: the next start finds the settings in the environment. Every shard admits
%% everything, since nothing samples any more.
-spec forget() -> ok.
forget() ->
    erlmcp_setting_store:serialised(fun() ->
                                            _ = erlmcp_nif:load_error() =:= none andalso set_thresholds(infinity),
                                            clear()
                                    end).


%% @private
%% Whether routes can be refused at all, now.
-spec switch() -> on | off.
switch() ->
    case erlmcp_nif:enforces_limits() of
        true -> on;
        false -> off
    end.


-spec clear() -> ok.
clear() ->
    lists:foreach(fun erlmcp_setting_store:clear/1, ?LIVE_KEYS).


%% The values of these keys in force. Values of the environment may be wrong, since they are not checked when
%% they are set.
-spec in_force([live_key()]) -> {ok, #{live_key() => term()}} | {error, error()}.
in_force(Keys) ->
    checked([ {Key, ?MODULE:get(Key)} || Key <- Keys ]).


-spec checked([{live_key(), term()}]) -> {ok, #{live_key() => term()}} | {error, error()}.
checked(Settings) ->
    case first_error(Settings, ?LIVE_KEYS) of
        none -> {ok, maps:from_list(Settings)};
        Error -> {error, Error}
    end.


%% Applies the settings in force to their layers.
-spec apply_in_force([live_key()]) -> ok | {error, error()}.
apply_in_force(Layers) ->
    case in_force(?LAYER_KEYS) of
        {ok, Settings} -> lists:foreach(fun(Layer) -> ok = apply_layer(Layer, Settings) end, Layers);
        Error -> Error
    end.


%% Whether the application has been started, and samples.
-spec is_started() -> boolean().
is_started() ->
    whereis(erlmcp_native_sup) =/= undefined.


-spec apply_setting(live_key(), term()) -> ok | {error, error() | not_loaded()}.
apply_setting(health, _Limits) ->
    %% Read with each check.
    ok;
apply_setting(Key, Value) ->
    Others = ?LAYER_KEYS -- [Key],
    case {erlmcp_nif:load_error(), in_force(Others), in_force([Key])} of
        {none, {ok, Settings}, _} ->
            apply_layer(Key, Settings#{Key => Value});
        {none, _, {error, _}} ->
            %% A wrong value of the environment can be put right, also where another one is wrong.
            apply_layer(Key, maps:from_list([{Key, Value} | [ {Other, element(1, in_force_and_last(Other))} || Other <- Others ]]));
        {none, Error, _} ->
            Error;
        {LoadError, _, _} ->
            {error, {nif_not_loaded, LoadError}}
    end.


-spec apply_layer(live_key(), #{live_key() => term()}) -> ok.
apply_layer(backpressure, #{backpressure := Switch} = Settings) ->
    ok = erlmcp_nif:enforce_limits(Switch =:= on),
    ok = apply_layer(admission, Settings),
    apply_layer(circuit_breaker, Settings);
apply_layer(token_bucket, #{token_bucket := infinity}) ->
    erlmcp_nif:set_shared_limits(infinity);
apply_layer(token_bucket, #{token_bucket := #{capacity := Capacity, rate_per_second := Rate}}) ->
    erlmcp_nif:set_shared_limits({Capacity, float(Rate)});
apply_layer(admission, #{backpressure := on, admission := #{threshold := Threshold, sample_interval_ms := IntervalMs}}) ->
    ok = erlmcp_nif:set_sample_interval(IntervalMs),
    ok = erlmcp_shard_sampler:set_interval_ms(IntervalMs, shards()),
    set_thresholds(Threshold);
apply_layer(admission, #{}) ->
    set_thresholds(infinity);
apply_layer(circuit_breaker, #{backpressure := on, circuit_breaker := #{} = CircuitBreaker}) ->
    Config = native_breaker(CircuitBreaker),
    case erlmcp_nif:breaker_stats() of
        %% An equal configuration changes nothing: a change counts failures anew.
        #{config := Config} -> ok;
        _ -> erlmcp_nif:breaker_configure(Config)
    end;
apply_layer(circuit_breaker, #{}) ->
    erlmcp_nif:breaker_configure(off).


-spec set_thresholds(pos_integer() | auto | infinity) -> ok.
set_thresholds(Threshold) ->
    lists:foreach(fun(Shard) -> put_threshold(Shard, Threshold) end, shards()).


%% @private
%% Changes the threshold of one shard, until the threshold of all shards is set. Raises `badarg' for a wrong value.
-spec set_threshold(Shard :: non_neg_integer(), pos_integer() | auto | infinity) -> ok.
set_threshold(Shard, Threshold) ->
    _ = erlmcp_nif:admission_threshold(Shard),
    _ = Threshold =:= infinity orelse is_valid(threshold, Threshold) orelse error(badarg, [Shard, Threshold]),
    erlmcp_setting_store:serialised(fun() -> put_threshold(Shard, Threshold) end).


%% Without samplers every shard admits everything and counts nothing: counts that no sample corrects would make
%% the shard refuse as soon as there is a sampler.
-spec put_threshold(non_neg_integer(), pos_integer() | auto | infinity) -> ok.
put_threshold(Shard, Threshold) ->
    Wanted = case is_started() of
                 true -> Threshold;
                 false -> infinity
             end,
    case erlmcp_nif:admission_threshold(Shard) of
        Wanted -> ok;
        _Other -> erlmcp_nif:admission_set_threshold(Shard, Wanted)
    end.


-spec shards() -> [non_neg_integer()].
shards() ->
    {Shards, _, _} = erlmcp_nif:limits(default),
    lists:seq(0, Shards - 1).


%%% Checks


-spec first_error([{term(), term()}], [atom()]) -> none | error().
first_error([], _Keys) ->
    none;
first_error([{Key, Value} | Rest], Keys) ->
    Checked =
        case lists:member(Key, Keys) of
            true -> check_value(Key, Value, default(Key));
            false -> {expected, one_of(Keys)}
        end,
    case Checked of
        {ok, _Complete} -> first_error(Rest, Keys);
        {expected, Expected} -> {bad_option, Key, Value, Expected}
    end.


-spec one_of([atom()]) -> string().
one_of(Keys) ->
    lists:flatten("one of the keys " ++ lists:join(", ", [ atom_to_list(Key) || Key <- Keys ])).


%% Checks a value. Where it names some keys of a map, `Base' completes it.
-spec check_value(checked(), term(), Base :: term()) -> {ok, term()} | {expected, string()}.
check_value(Key, Value, Base) ->
    Normal =
        case is_map(default(Key)) of
            true -> to_map(Value);
            false -> Value
        end,
    case validate(Key, Normal) of
        ok when is_map(Normal) -> check_complete(Key, maps:merge(Base, Normal));
        ok -> {ok, Normal};
        {expected, Expected} -> {expected, lists:flatten(Expected)}
    end.


%% @private
%% Options as a map, from a map, a property list or a keyword list of Elixir; of equal keys the first one counts.
%% Anything else is returned as it is.
-spec to_map(term()) -> term().
to_map([]) ->
    #{};
to_map([_ | _] = List) ->
    try
        maps:from_list(lists:reverse([ to_pair(Property) || Property <- List ]))
    catch
        %% No property list, or an improper one.
        error:_ -> List
    end;
to_map(Value) ->
    Value.


%% @private
%% The values that {@link to_map/1} makes a map of.
-spec map_expected() -> string().
map_expected() -> "a map, a property list or a keyword list".


-spec to_pair({term(), term()} | atom()) -> {term(), term()}.
to_pair({_Key, _Value} = Pair) -> Pair;
to_pair(Key) when is_atom(Key) -> {Key, true}.


%% Checks conditions that depend on keys which the setting does not name.
-spec check_complete(checked(), map()) -> {ok, map()} | {expected, string()}.
check_complete(token_bucket, #{capacity := Capacity, rate_per_second := Rate} = Complete) ->
    case Capacity / Rate =< ?MAX_FILL_SECONDS of
        true -> {ok, Complete};
        false -> {expected, too_slow_to_fill()}
    end;
check_complete(_Key, Complete) ->
    {ok, Complete}.


%% @doc The text of `Expected' for limits with which a bucket would fill too slowly.
-spec too_slow_to_fill() -> string().
too_slow_to_fill() ->
    "a bucket that is full after 104 days at most (capacity / rate_per_second)".


-spec validate(atom(), term()) -> ok | {expected, string()}.
validate(shards, N) when is_integer(N), N >= 1, N =< 1024, N band (N - 1) =:= 0 -> ok;
validate(shards, _) -> {expected, "a power of two from 1 to 1024"};
validate(max_entries, N) when is_integer(N), N >= 1, N =< 1 bsl 28 -> ok;
validate(max_entries, _) -> {expected, "an integer from 1 to 268435456"};
validate(max_id_bytes, N) when is_integer(N), N >= 1, N =< 1 bsl 24 -> ok;
validate(max_id_bytes, _) -> {expected, "an integer from 1 to 16777216"};
validate(same_pid, ok) -> ok;
validate(same_pid, already_registered) -> ok;
validate(same_pid, _) -> {expected, "already_registered or ok"};
validate(global_timeout_ms, N) when is_integer(N), N >= 1, N =< 86_400_000 -> ok;
validate(global_timeout_ms, _) -> {expected, "an integer from 1 to 86400000"};
validate(capability_store, Map) -> validate_map(capability_store, Map, "");
validate(architecture_version, current) -> ok;
validate(architecture_version, '100x') -> ok;
validate(architecture_version, {percent, P}) when is_integer(P), P >= 0, P =< 100 -> ok;
validate(architecture_version, _) -> {expected, "current, '100x' or {percent, P} with an integer P from 0 to 100"};
validate(require_native, Boolean) when is_boolean(Boolean) -> ok;
validate(require_native, _) -> {expected, "true or false"};
validate(backpressure, on) -> ok;
validate(backpressure, off) -> ok;
validate(backpressure, _) -> {expected, "on or off"};
validate(token_bucket, infinity) -> ok;
validate(token_bucket, Map) -> validate_map(token_bucket, Map, "infinity, or ");
validate(admission, infinity) -> ok;
validate(admission, Map) -> validate_map(admission, Map, "infinity, or ");
validate(circuit_breaker, off) -> ok;
validate(circuit_breaker, Map) -> validate_map(circuit_breaker, Map, "off, or ");
validate(target_breaker, Map) -> validate_map(target_breaker, Map, "");
validate(health, Map) -> validate_map(health, Map, "").


-spec validate_map(checked(), term(), string()) -> ok | {expected, string()}.
validate_map(Key, Map, Instead) when is_map(Map) ->
    Keys = maps:keys(default(Key)),
    Bad = [ Field || {Field, Value} <- maps:to_list(Map), not lists:member(Field, Keys) orelse not is_valid(field(Key, Field), Value) ],
    case Bad of
        [] -> ok;
        _ -> expected_map(Key, Instead)
    end;
validate_map(Key, _NotAMap, Instead) ->
    expected_map(Key, Instead).


-spec expected_map(checked(), string()) -> {expected, string()}.
expected_map(Key, Instead) ->
    Fields = [ [atom_to_list(Field), " (", range(field(Key, Field)), ")"] || Field <- maps:keys(default(Key)) ],
    {expected, lists:flatten([Instead, "a map with any of ", lists:join(", ", Fields)])}.


%% What bounds a field. A node has many breakers of targets, and each failure of the threshold takes 8 bytes.
-spec field(checked(), atom()) -> atom().
field(target_breaker, failure_threshold) -> target_failure_threshold;
field(_Key, Field) -> Field.


-spec is_valid(atom(), term()) -> boolean().
is_valid(max_terms, N) -> is_integer(N) andalso N >= 1 andalso N =< 10_000;
%% The VM has a gigabyte for all persistent terms and literals, and crashes without room.
is_valid(max_bytes, N) -> is_integer(N) andalso N >= 1 andalso N =< 1 bsl 29;
is_valid(capacity, N) -> is_integer(N) andalso N >= 1 andalso N < 1 bsl 32;
is_valid(rate_per_second, N) -> is_number(N) andalso N >= 1 / 3600 andalso N =< 1.0e9;
is_valid(threshold, N) -> N =:= auto orelse is_integer(N) andalso N >= 1 andalso N =< 1 bsl 40;
is_valid(sample_interval_ms, N) -> is_integer(N) andalso N >= 1 andalso N =< 86_400_000;
is_valid(failure_threshold, N) -> is_integer(N) andalso N >= 1 andalso N =< 65_536;
is_valid(target_failure_threshold, N) -> is_integer(N) andalso N >= 1 andalso N =< 1_000;
is_valid(window_ms, N) -> is_integer(N) andalso N >= 1 andalso N < 1 bsl 42;
is_valid(success_threshold, N) -> is_integer(N) andalso N >= 1 andalso N =< 1_023;
is_valid(timeout_ms, N) -> is_integer(N) andalso N >= 0 andalso N < 1 bsl 42;
is_valid(probe_limit, N) -> is_integer(N) andalso N >= 1 andalso N =< 1_023;
is_valid(queue_depth_percent, N) -> is_integer(N) andalso N >= 1 andalso N =< 100;
is_valid(run_queue_per_scheduler, N) -> N =:= infinity orelse is_integer(N) andalso N >= 1;
is_valid(scheduler_use_percent, N) -> N =:= infinity orelse is_integer(N) andalso N >= 1 andalso N =< 100;
is_valid(memory_bytes, N) -> N =:= machine orelse N =:= infinity orelse is_integer(N) andalso N >= 1.


-spec range(atom()) -> string().
range(max_terms) -> "an integer from 1 to 10000";
range(max_bytes) -> "an integer from 1 to 536870912";
range(capacity) -> "an integer from 1 to 2^32 - 1";
range(rate_per_second) -> "a number from 1/3600 to 10^9";
range(threshold) -> "auto, or an integer from 1 to 2^40";
range(sample_interval_ms) -> "an integer from 1 to 86400000";
range(failure_threshold) -> "an integer from 1 to 65536";
range(target_failure_threshold) -> "an integer from 1 to 1000";
range(window_ms) -> "an integer from 1 to 2^42 - 1";
range(timeout_ms) -> "an integer from 0 to 2^42 - 1";
range(queue_depth_percent) -> "an integer from 1 to 100";
range(run_queue_per_scheduler) -> "an integer from 1, or infinity";
range(scheduler_use_percent) -> "an integer from 1 to 100, or infinity";
range(memory_bytes) -> "an integer from 1, machine or infinity";
range(Count) when Count =:= success_threshold; Count =:= probe_limit -> "an integer from 1 to 1023".
