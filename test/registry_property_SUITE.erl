%%% Runs the model of `prop_registry' against both registries, and against one that is switched between them all
%%% the time; and the models of `prop_connections' and `prop_groups' against connections and groups.
%%%
%%% The environment variables PROP_SEQUENTIAL and PROP_PARALLEL are the numbers of histories for each registry.
%%% A default run takes about 10 s for a sequential and 4 s for a parallel property on two cores.
-module(registry_property_SUITE).

-export([suite/0, all/0, init_per_suite/1, end_per_suite/1]).
-export([sequential_native/1, sequential_classic/1, parallel_native/1, parallel_classic/1]).
-export([sequential_switching/1, parallel_switching/1]).
-export([sequential_connections/1, parallel_connections/1]).
-export([sequential_groups/1, parallel_groups/1]).

-define(SEQUENTIAL, 1000).
-define(PARALLEL,   200).

%% The size of histories grows with every test, from start_size to max_size. A failure found by a passed
%% deadline costs that deadline in every attempt to shrink it.
-define(OPTIONS, [{start_size, 20}, {max_size, 100}, {max_shrinks, 100}, {to_file, user}]).


suite() -> [{timetrap, {hours, 8}}].


all() ->
    [sequential_native,
     sequential_classic,
     sequential_switching,
     parallel_native,
     parallel_classic,
     parallel_switching,
     sequential_connections,
     parallel_connections,
     sequential_groups,
     parallel_groups].


%% The histories route to unknown ids all the time, and every registry logs a warning for them.
init_per_suite(Config) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, error),
    [{logger_level, Level} | Config].


end_per_suite(Config) ->
    ok = erlmcp_rollout:set('100x'),
    {ok, Registry} = gen_server:start({local, erlmcp_registry}, erlmcp_registry, [], []),
    ok = erlmcp_rollout:set('100x'),
    ok = gen_server:stop(Registry),
    ok = logger:set_primary_config(level, proplists:get_value(logger_level, Config)).


sequential_native(_Config) ->
    check(prop_registry:prop_sequential_native(), "PROP_SEQUENTIAL", ?SEQUENTIAL).


sequential_classic(_Config) ->
    check(prop_registry:prop_sequential_classic(), "PROP_SEQUENTIAL", ?SEQUENTIAL).


sequential_switching(_Config) ->
    check(prop_registry:prop_sequential_switching(), "PROP_SEQUENTIAL", ?SEQUENTIAL).


parallel_switching(_Config) ->
    check(prop_registry:prop_parallel_switching(), "PROP_PARALLEL", ?PARALLEL).


parallel_native(_Config) ->
    check(prop_registry:prop_parallel_native(), "PROP_PARALLEL", ?PARALLEL).


parallel_classic(_Config) ->
    check(prop_registry:prop_parallel_classic(), "PROP_PARALLEL", ?PARALLEL).


sequential_connections(_Config) ->
    {comment, _} = quickcheck(prop_connections:prop_sequential(), "PROP_SEQUENTIAL", ?SEQUENTIAL).


parallel_connections(_Config) ->
    {comment, _} = quickcheck(prop_connections:prop_parallel(), "PROP_PARALLEL", ?PARALLEL).


sequential_groups(_Config) ->
    {comment, _} = quickcheck(prop_groups:prop_sequential(), "PROP_SEQUENTIAL", ?SEQUENTIAL).


parallel_groups(_Config) ->
    {comment, _} = quickcheck(prop_groups:prop_parallel(), "PROP_PARALLEL", ?PARALLEL).


%% A run shorter than the default may miss an outcome by chance; a run of the default length or longer may not.
check(Property, Variable, Default) ->
    {comment, Summary} = quickcheck(Property, Variable, Default),
    Unseen = prop_registry:unseen(),
    case Unseen =:= [] orelse test_support:positive_integer(Variable, Default) < Default of
        true -> {comment, lists:flatten(io_lib:format("~s, unseen: ~0p", [Summary, Unseen]))};
        false -> ct:fail({unseen, Unseen})
    end.


quickcheck(Property, Variable, Default) ->
    Histories = test_support:positive_integer(Variable, Default),
    Started = erlang:monotonic_time(millisecond),
    io:format(user, "~n~b histories (~s)~n", [Histories, Variable]),
    case proper:quickcheck(Property, [{numtests, Histories} | ?OPTIONS]) of
        true -> ok;
        Failure -> ct:fail({Failure, proper:counterexample()})
    end,
    Milliseconds = erlang:monotonic_time(millisecond) - Started,
    Summary = lists:flatten(io_lib:format("~b histories in ~b ms", [Histories, Milliseconds])),
    io:format(user, "~s~n", [Summary]),
    {comment, Summary}.
