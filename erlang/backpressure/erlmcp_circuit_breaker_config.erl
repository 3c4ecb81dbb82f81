%%% @private
%%% The configuration of a named circuit breaker, checked once when it is started.
-module(erlmcp_circuit_breaker_config).

-export([check/1]).

-export_type([config/0, options/0, error/0]).

-type options() :: #{
                     failure_threshold => pos_integer(),
                     success_threshold => pos_integer(),
                     timeout => pos_integer(),
                     window_size => pos_integer(),
                     failure_rate_threshold => number(),
                     probe_limit => pos_integer(),
                     priority_level => term(),
                     reset_timeout => term()
                    }.
-type config() :: #{
                    failure_threshold := pos_integer(),
                    success_threshold := pos_integer(),
                    timeout := pos_integer(),
                    window_size := pos_integer(),
                    failure_rate_threshold := number(),
                    probe_limit := pos_integer(),
                    priority_level => term(),
                    reset_timeout => term()
                   }.
-type error() :: {bad_option, Key :: term(), Value :: term(), Expected :: string()}.

-define(KEYS,
        [failure_threshold,
         success_threshold,
         timeout,
         window_size,
         failure_rate_threshold,
         probe_limit]).
%% Keys of some generations of erlmcp, taken and shown, and without effect here.
-define(NO_EFFECT, [priority_level, reset_timeout]).

-define(MAX_WINDOW, 1_000_000).
%% The longest time that a receive takes, about 50 days.
-define(MAX_MS, 16#ffffffff).


%% @doc The options with the defaults of those that are not given.
-spec check(options() | term()) -> {ok, config()} | {error, error()}.
check(Options) when is_map(Options) ->
    Defaults = #{
                 failure_threshold => 5,
                 success_threshold => 2,
                 timeout => 60_000,
                 window_size => 10,
                 failure_rate_threshold => 0.5
                },
    case first_error(maps:to_list(Options)) of
        none ->
            #{success_threshold := SuccessThreshold} = Config = maps:merge(Defaults, Options),
            {ok, maps:merge(#{probe_limit => SuccessThreshold}, Config)};
        Error ->
            {error, Error}
    end;
check(Options) ->
    {error, {bad_option, config, Options, "a map"}}.


-spec first_error([{term(), term()}]) -> none | error().
first_error([]) ->
    none;
first_error([{Key, Value} | Rest]) ->
    case validate(Key, Value) of
        ok -> first_error(Rest);
        {expected, Expected} -> {bad_option, Key, Value, lists:flatten(Expected)}
    end.


-spec validate(term(), term()) -> ok | {expected, iolist()}.
validate(failure_threshold, N) -> positive(N);
validate(success_threshold, N) -> positive(N);
validate(probe_limit, N) -> positive(N);
validate(timeout, N) -> within(N, ?MAX_MS);
validate(window_size, N) -> within(N, ?MAX_WINDOW);
validate(failure_rate_threshold, N) when is_number(N), N >= 0, N =< 1 -> ok;
validate(failure_rate_threshold, _) -> {expected, "a number from 0.0 to 1.0"};
validate(Key, _) ->
    case lists:member(Key, ?NO_EFFECT) of
        true -> ok;
        false -> {expected, ["one of the keys ", lists:join(", ", [ atom_to_list(K) || K <- ?KEYS ])]}
    end.


-spec positive(term()) -> ok | {expected, iolist()}.
positive(N) when is_integer(N), N >= 1 -> ok;
positive(_) -> {expected, "a positive integer"}.


-spec within(term(), pos_integer()) -> ok | {expected, iolist()}.
within(N, Max) when is_integer(N), N >= 1, N =< Max -> ok;
within(_, Max) -> {expected, ["an integer from 1 to ", integer_to_list(Max)]}.
