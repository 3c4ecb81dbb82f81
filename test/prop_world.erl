%%% What the models of connections and groups run in: a registry of their own, and three processes.
-module(prop_world).

-include_lib("proper/include/proper.hrl").

%% Properties
-export([sequential/1, parallel/2]).
%% Processes
-export([names/0, pid/2, name/2]).
%% Command
-export([end_process/2]).

-export_type([name/0, world/0]).

-type name() :: p1 | p2 | p3.
-type world() :: #{registry := erlmcp_shard_registry:registry(), name() => pid()}.

%% Runs of each parallel history. Each run is scheduled differently.
-define(PARALLEL_RUNS, 5).

%%% Properties


sequential(Model) ->
    ?FORALL(Commands,
            commands(Model),
            in_world(fun(World) ->
                             {History, State, Result} = run_commands(Model, Commands, [{world, World}]),
                             ?WHENFAIL(io:format(user, "~p~n~p~n~p~n", [History, State, Result]),
                                       aggregate(command_names(Commands), Result =:= ok))
                     end)).


parallel(Model, InitialState) ->
    ?FORALL(Commands,
            parallel_commands(Model, InitialState),
            repeated(?PARALLEL_RUNS,
                     fun(World) ->
                             {Before, Tails, Result} = run_parallel_commands(Model, Commands, [{world, World}]),
                             Result =:= ok orelse io:format(user, "~p~n~p~n~p~n", [Before, Tails, Result]),
                             Result =:= ok
                     end)).


repeated(0, _Run) -> true;
repeated(Runs, Run) -> in_world(Run) andalso repeated(Runs - 1, Run).


in_world(Run) ->
    Processes = maps:from_list([ {Name, test_support:process()} || Name <- names() ]),
    try
        Run(Processes#{registry => erlmcp_shard_registry:new(#{shards => 2})})
    after
        maps:foreach(fun(_Name, Pid) -> exit(Pid, kill) end, Processes)
    end.


%%% Processes


-spec names() -> [name()].
names() -> [p1, p2, p3].


-spec pid(name(), world()) -> pid().
pid(Name, World) -> maps:get(Name, World).


-spec name(pid() | undefined, world()) -> name() | undefined.
name(undefined, _World) -> undefined;
name(Pid, World) -> hd([ Name || {Name, P} <- maps:to_list(World), P =:= Pid ]).


%% Returns when the caller has observed the exit.
-spec end_process(world(), name()) -> ok.
end_process(World, Name) ->
    Pid = pid(Name, World),
    exit(Pid, kill),
    _ = test_support:await_end(Pid),
    ok.
