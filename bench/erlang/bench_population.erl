%%% What the benchmarks work on: ids, the processes that they stand for, and configs.
%%%
%%% An id is a binary of 24 bytes. It is made from a number, so that a million of them need not be
%%% kept while memory is measured. All lists come in one shuffled order, the same in every run:
%%% neighbours in a list are no neighbours in any table.
-module(bench_population).

-export([id/1, ids/1, shuffled/1]).
-export([start/2, stop/1]).
-export([ets_table/1]).
-export([small_config/0, large_config/0]).
-export([ranges/2, in_parallel/1, await/1]).

-export_type([population/0]).

%% The process that all others are linked to, and the connections in shuffled order.
-type population() :: {pid(), [{binary(), pid()}]}.

%%% Ids


-spec id(integer()) -> binary().
id(N) ->
    <<(erlang:phash2(N, 1 bsl 32)):32, (erlang:phash2({N}, 1 bsl 32)):32, N:64, "session-">>.


-spec ids(pos_integer()) -> [binary()].
ids(Count) ->
    [ id(N) || N <- shuffled(lists:seq(1, Count)) ].


-spec shuffled([Element]) -> [Element].
shuffled(List) ->
    Seed = rand:seed_s(exsss, {24, 15000, 1000000}),
    {Keyed, _} = lists:mapfoldl(fun(Element, State0) ->
                                        {Key, State} = rand:uniform_s(1 bsl 58, State0),
                                        {{Key, Element}, State}
                                end,
                                Seed,
                                List),
    [ Element || {_, Element} <- lists:sort(Keyed) ].


%%% Processes


%% One process a connection, each of which runs `Loop'.
-spec start(pos_integer(), fun(() -> term())) -> population().
start(Count, Loop) ->
    Asking = self(),
    {Hub, Monitor} =
        spawn_monitor(
          fun() ->
                  Ids = ids(Count),
                  Asking ! {self(), [ {Id, spawn_opt(Loop, [link])} || Id <- Ids ]},
                  receive stop -> exit(shutdown) end
          end),
    receive
        {Hub, Connections} ->
            true = demonitor(Monitor, [flush]),
            {Hub, Connections};
        {'DOWN', Monitor, process, Hub, Reason} ->
            error(Reason)
    end.


%% Returns when all of them have ended.
-spec stop(population()) -> ok.
stop({Hub, Connections}) ->
    Monitors = [ monitor(process, Pid) || {_, Pid} <- Connections ],
    Hub ! stop,
    lists:foreach(fun(Monitor) -> receive {'DOWN', Monitor, process, _, _} -> ok end end, Monitors).


%%% ETS


%% A table of such rows, filled in one go.
-spec ets_table([tuple()]) -> ets:table().
ets_table(Rows) ->
    Table = ets:new(?MODULE, [set, public, {read_concurrency, true}]),
    lists:foreach(fun(Row) -> true = ets:insert(Table, Row) end, Rows),
    Table.


%%% Configs


%% What a small MCP server has to say about itself.
-spec small_config() -> map().
small_config() ->
    #{
      name => <<"weather">>,
      version => <<"1.4.0">>,
      capabilities => #{tools => true, resources => false, prompts => true}
     }.


%% About 50 KB on a heap: the descriptions of 100 tools. Each call makes it anew, so that no two of
%% them are one term in memory.
-spec large_config() -> map().
large_config() ->
    #{
      name => <<"everything">>,
      tools => [ #{
                   name => <<"tool-", (integer_to_binary(N))/binary>>,
                   description => <<"Reads the table and returns its rows, numbered.">>,
                   input => [ {Name, string, [required, {max_bytes, 1024 + N}]}
                              || Name <- [database, table, filter] ]
                  }
                 || N <- lists:seq(1, 100) ]
     }.


%%% Work in parallel


%% The numbers from 1 to `Total' as ranges of about the same length.
-spec ranges(pos_integer(), pos_integer()) -> [{pos_integer(), pos_integer()}].
ranges(Total, Parts) ->
    [ {Part * Total div Parts + 1, (Part + 1) * Total div Parts}
      || Part <- lists:seq(0, Parts - 1) ].


%% Runs all of them, each in a process of its own, and returns when the last one has ended.
-spec in_parallel([fun(() -> term())]) -> ok.
in_parallel(Tasks) ->
    await([ spawn_monitor(Task) || Task <- Tasks ]).


%% Returns when all these processes have ended; none of them may fail.
-spec await([{pid(), reference()}]) -> ok.
await(Started) ->
    lists:foreach(fun({Pid, Monitor}) ->
                          receive
                              {'DOWN', Monitor, process, Pid, normal} -> ok;
                              {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
                          end
                  end,
                  Started).
