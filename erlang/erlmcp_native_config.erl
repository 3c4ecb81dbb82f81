%%% @doc The configuration: the application environment of `erlmcp_native', checked at start.
%%%
%%% <table border="1">
%%% <tr><th>key</th><th>default</th><th>values</th></tr>
%%% <tr><td>`shards'</td><td>64</td><td>a power of two from 1 to 1024</td></tr>
%%% <tr><td>`max_entries'</td><td>2,000,000</td><td>1 to 2^28</td></tr>
%%% <tr><td>`max_id_bytes'</td><td>65,535</td><td>1 to 2^24</td></tr>
%%% <tr><td>`same_pid'</td><td>`already_registered'</td><td>`already_registered' or `ok': what
%%% registering a server or transport answers if the id has the same process already</td></tr>
%%% </table>
%%%
%%% The first three are the bounds of the default registry and cannot be changed once it exists.
%%% `same_pid' is read whenever it is needed.
-module(erlmcp_native_config).

-export([check/0, registry_limits/1, default/1]).

-export_type([limits/0, error/0]).

-type limits() :: {Shards :: pos_integer(), MaxEntries :: pos_integer(), MaxIdBytes :: pos_integer()}.
-type error() :: {bad_option, Key :: term(), Value :: term(), Expected :: string()}.

-define(KEYS,          [shards, max_entries, max_id_bytes, same_pid]).
-define(REGISTRY_KEYS, [shards, max_entries, max_id_bytes]).


%% @doc The bounds of the default registry from the application environment, all of which is checked.
-spec check() -> {ok, limits()} | {error, error()}.
check() ->
    %% `included_applications' is added to every application's environment by some releases of OTP.
    Environment = [ Setting
                    || {Key, _} = Setting <- application:get_all_env(erlmcp_native), Key =/= included_applications ],
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


%% @doc The default of a key.
-spec default(atom()) -> term().
default(shards) -> 64;
default(max_entries) -> 2_000_000;
default(max_id_bytes) -> 65_535;
default(same_pid) -> already_registered.


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
validate(same_pid, _) -> {expected, "already_registered or ok"}.
