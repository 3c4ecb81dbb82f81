%%% @doc The configuration: the application environment of `erlmcp_native', checked at start.
%%%
%%% <table border="1">
%%% <tr><th>key</th><th>default</th><th>values</th></tr>
%%% <tr><td>`shards'</td><td>64</td><td>a power of two from 1 to 1024</td></tr>
%%% <tr><td>`max_entries'</td><td>2,000,000</td><td>1 to 2^28</td></tr>
%%% <tr><td>`max_id_bytes'</td><td>65,535</td><td>1 to 2^24</td></tr>
%%% <tr><td>`architecture_version' *</td><td>`` '100x' ''</td><td>`current', `` '100x' '' or `{percent,
%%% 0..100}': which registry routes; see {@link erlmcp_rollout}. If it is not set, that of the application
%%% `erlmcp' counts</td></tr>
%%% <tr><td>`require_native'</td><td>`false'</td><td>`true' or `false': whether to refuse to start where
%%% the native library cannot be loaded, instead of starting with `current'</td></tr>
%%% <tr><td>`same_pid'</td><td>`already_registered'</td><td>`already_registered' or `ok': what
%%% registering a server or transport answers if the id has the same process already</td></tr>
%%% <tr><td>`backpressure' *</td><td>`on'</td><td>`on' or `off': whether messages are refused at
%%% all</td></tr>
%%% <tr><td>`token_bucket' *</td><td>`#{capacity => 1000, rate_per_second => 10000}'</td><td>a map with
%%% either key or both, or `infinity'; see {@link erlmcp_token_bucket}</td></tr>
%%% <tr><td>`admission' *</td><td>`#{threshold => 10000, sample_interval_ms => 100}'</td><td>a map with
%%% either key or both, or `infinity'; see {@link erlmcp_admission_control}</td></tr>
%%% <tr><td>`circuit_breaker' *</td><td>`#{failure_threshold => 50, window_ms => 10000,
%%% success_threshold => 10, timeout_ms => 30000, probe_limit => 10}'</td><td>a map with any of these keys,
%%% or `off'; see {@link erlmcp_circuit_breaker}</td></tr>
%%% <tr><td>`health' *</td><td>`#{queue_depth_percent => 80, run_queue_per_scheduler => 100,
%%% scheduler_use_percent => 95, memory_bytes => machine}'</td><td>a map with any of these keys; see
%%% {@link erlmcp_shard_health}</td></tr>
%%% </table>
%%%
%%% Where {@link erlmcp_registry} is started without the application it looks at `architecture_version',
%%% `require_native', `same_pid', `backpressure', `token_bucket' and `circuit_breaker' too; admission control
%%% is off then.
%%%
%%% The first three are the bounds of the default registry and cannot be changed once it exists.
%%% `same_pid' is read whenever it is needed. What has a star is changed in a running system:
%%% `architecture_version' by {@link erlmcp_rollout:set/1}, `health' by {@link
%%% erlmcp_shard_health:set_limits/1}, the others by {@link erlmcp_backpressure:set/2};
%%% `application:set_env/3' alone takes effect with the next start.
-module(erlmcp_native_config).

-export([check/0, check_live/0, check_live/2, check_mode/1, registry_limits/1, token_bucket/1, health/1, default/1, get/1]).

-export_type([limits/0, error/0, key/0]).

-type limits() :: {Shards :: pos_integer(), MaxEntries :: pos_integer(), MaxIdBytes :: pos_integer()}.
-type error() :: {bad_option, Key :: term(), Value :: term(), Expected :: string()}.
-type key() :: shards |
               max_entries |
               max_id_bytes |
               same_pid |
               architecture_version |
               require_native |
               backpressure |
               token_bucket |
               admission |
               circuit_breaker |
               health.

%% 2^53 ns.
-define(MAX_FILL_SECONDS, 9_007_199).
-define(REGISTRY_KEYS,    [shards, max_entries, max_id_bytes]).
-define(LIVE_KEYS,        [backpressure, token_bucket, admission, circuit_breaker]).
-define(ROLLOUT_KEYS,     [architecture_version, require_native]).
-define(KEYS,             (?REGISTRY_KEYS ++ ?ROLLOUT_KEYS ++ [same_pid, health | ?LIVE_KEYS])).


%% @doc The value in force of a key: from the application environment, completed by defaults.
-spec get(key()) -> term().
get(Key) ->
    complete(Key, application:get_env(erlmcp_native, Key, default_or_of_erlmcp(Key))).


%% erlmcp itself has this one too.
-spec default_or_of_erlmcp(key()) -> term().
default_or_of_erlmcp(architecture_version) ->
    application:get_env(erlmcp, architecture_version, default(architecture_version));
default_or_of_erlmcp(Key) ->
    default(Key).


%% @doc Checks the settings of backpressure in the application environment.
-spec check_live() -> ok | {error, error()}.
check_live() ->
    check_live([]).


%% @doc Checks one setting of backpressure, and those of the others in the application environment.
-spec check_live(term(), term()) -> ok | {error, error()}.
check_live(Key, Value) ->
    check_live([{Key, Value}]).


-spec check_live([{term(), term()}]) -> ok | {error, error()}.
check_live(New) ->
    Others = [ {Key, Value} || Key <- ?LIVE_KEYS,
                               not lists:keymember(Key, 1, New),
                               {ok, Value} <- [application:get_env(erlmcp_native, Key)] ],
    case first_error(New ++ Others, ?LIVE_KEYS) of
        none -> ok;
        Error -> {error, Error}
    end.


%% @doc Checks a value of `architecture_version'.
-spec check_mode(term()) -> ok | {error, error()}.
check_mode(Mode) ->
    case first_error([{architecture_version, Mode}], ?ROLLOUT_KEYS) of
        none -> ok;
        Error -> {error, Error}
    end.


%% @doc The bounds of the default registry from the application environment, all of which is checked.
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


%% @doc The bounds of a registry from a map of options; what is not given has its default.
-spec registry_limits(map()) -> {ok, limits()} | {error, error()}.
registry_limits(Options) ->
    case first_error(maps:to_list(Options), ?REGISTRY_KEYS) of
        none -> {ok, list_to_tuple([ maps:get(K, Options, default(K)) || K <- ?REGISTRY_KEYS ])};
        Error -> {error, Error}
    end.


%% @doc Limits of a token bucket, checked and completed.
-spec token_bucket(term()) -> {ok, infinity | map()} | {error, error()}.
token_bucket(Limits) ->
    case first_error([{token_bucket, Limits}], [token_bucket]) of
        none -> {ok, complete(token_bucket, Limits)};
        Error -> {error, Error}
    end.


%% @doc Limits of health, checked and completed.
-spec health(term()) -> {ok, map()} | {error, error()}.
health(Limits) ->
    case first_error([{health, Limits}], [health]) of
        none -> {ok, complete(health, Limits)};
        Error -> {error, Error}
    end.


%% @doc The default of a key.
-spec default(atom()) -> term().
default(shards) -> 64;
default(max_entries) -> 2_000_000;
default(max_id_bytes) -> 65_535;
default(same_pid) -> already_registered;
default(architecture_version) -> '100x';
default(require_native) -> false;
default(backpressure) -> on;
default(token_bucket) -> #{capacity => 1000, rate_per_second => 10000};
default(admission) -> #{threshold => 10000, sample_interval_ms => 100};
default(health) ->
    #{
      queue_depth_percent => 80,
      run_queue_per_scheduler => 100,
      scheduler_use_percent => 95,
      memory_bytes => machine
     };
default(circuit_breaker) ->
    #{
      failure_threshold => 50,
      window_ms => 10000,
      success_threshold => 10,
      timeout_ms => 30000,
      probe_limit => 10
     }.


-spec complete(key(), term()) -> term().
complete(Key, Value) when is_map(Value) -> maps:merge(default(Key), Value);
complete(_Key, Value) -> Value.


-spec first_error([{term(), term()}], [atom()]) -> none | error().
first_error([], _Keys) ->
    none;
first_error([{Key, Value} | Rest], Keys) ->
    Checked =
        case lists:member(Key, Keys) of
            true -> validate(Key, Value);
            false -> {expected, "one of the keys " ++ lists:join(", ", [ atom_to_list(K) || K <- Keys ])}
        end,
    case Checked of
        ok -> first_error(Rest, Keys);
        {expected, Expected} -> {bad_option, Key, Value, lists:flatten(Expected)}
    end.


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
validate(token_bucket, Map) -> validate_map(token_bucket, Map, "infinity");
validate(admission, infinity) -> ok;
validate(admission, Map) -> validate_map(admission, Map, "infinity");
validate(circuit_breaker, off) -> ok;
validate(circuit_breaker, Map) -> validate_map(circuit_breaker, Map, "off");
validate(health, Map) -> validate_map(health, Map, "#{}").


-spec validate_map(key(), term(), string()) -> ok | {expected, string()}.
validate_map(Key, Map, Instead) when is_map(Map) ->
    Keys = maps:keys(default(Key)),
    Bad = [ Field || {Field, Value} <- maps:to_list(Map), not lists:member(Field, Keys) orelse not is_valid(Field, Value) ],
    case Bad of
        [] when Key =:= token_bucket -> validate_fill_time(complete(Key, Map));
        [] -> ok;
        _ -> expected_map(Keys, Instead)
    end;
validate_map(Key, _NotAMap, Instead) ->
    expected_map(maps:keys(default(Key)), Instead).


-spec expected_map([atom()], string()) -> {expected, string()}.
expected_map(Keys, Instead) ->
    Fields = [ [atom_to_list(Key), " (", range(Key), ")"] || Key <- Keys ],
    {expected, lists:flatten([Instead, ", or a map with any of ", lists:join(", ", Fields)])}.


-spec validate_fill_time(map()) -> ok | {expected, string()}.
validate_fill_time(#{capacity := Capacity, rate_per_second := Rate}) when Capacity / Rate =< ?MAX_FILL_SECONDS -> ok;
validate_fill_time(_) -> {expected, "a bucket that is full after 104 days at most (capacity / rate_per_second)"}.


-spec is_valid(atom(), term()) -> boolean().
is_valid(capacity, N) -> is_integer(N) andalso N >= 1 andalso N < 1 bsl 32;
is_valid(rate_per_second, N) -> is_number(N) andalso N >= 1 / 3600 andalso N =< 1.0e9;
is_valid(threshold, N) -> is_integer(N) andalso N >= 1 andalso N =< 1 bsl 40;
is_valid(sample_interval_ms, N) -> is_integer(N) andalso N >= 1 andalso N =< 86_400_000;
is_valid(failure_threshold, N) -> is_integer(N) andalso N >= 1 andalso N =< 65_536;
is_valid(window_ms, N) -> is_integer(N) andalso N >= 1 andalso N < 1 bsl 42;
is_valid(success_threshold, N) -> is_integer(N) andalso N >= 1 andalso N =< 1_023;
is_valid(timeout_ms, N) -> is_integer(N) andalso N >= 0 andalso N < 1 bsl 42;
is_valid(probe_limit, N) -> is_integer(N) andalso N >= 1 andalso N =< 1_023;
is_valid(queue_depth_percent, N) -> is_integer(N) andalso N >= 1 andalso N =< 100;
is_valid(run_queue_per_scheduler, N) -> N =:= infinity orelse is_integer(N) andalso N >= 1;
is_valid(scheduler_use_percent, N) -> N =:= infinity orelse is_integer(N) andalso N >= 1 andalso N =< 100;
is_valid(memory_bytes, N) -> N =:= machine orelse N =:= infinity orelse is_integer(N) andalso N >= 1.


-spec range(atom()) -> string().
range(capacity) -> "an integer from 1 to 2^32 - 1";
range(rate_per_second) -> "a number from 1/3600 to 10^9";
range(threshold) -> "an integer from 1 to 2^40";
range(sample_interval_ms) -> "an integer from 1 to 86400000";
range(failure_threshold) -> "an integer from 1 to 65536";
range(window_ms) -> "an integer from 1 to 2^42 - 1";
range(timeout_ms) -> "an integer from 0 to 2^42 - 1";
range(queue_depth_percent) -> "an integer from 1 to 100";
range(run_queue_per_scheduler) -> "an integer from 1, or infinity";
range(scheduler_use_percent) -> "an integer from 1 to 100, or infinity";
range(memory_bytes) -> "an integer from 1, machine or infinity";
range(Count) when Count =:= success_threshold; Count =:= probe_limit -> "an integer from 1 to 1023".
