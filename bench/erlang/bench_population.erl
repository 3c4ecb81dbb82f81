%%% The data of the benchmarks: ids, their processes, and configs.
%%%
%%% An id is a binary of 24 bytes. It is made from a number, so that a million of them need not be kept while
%%% memory is measured. Connections are registered in one shuffled order and visited in another one, with newly
%%% made ids ({@link visited/1}), so that neighbours in the visit were not allocated together. Both orders are
%%% the same in every run.
-module(bench_population).

-export([id/1, ids/1, shuffled/1]).
-export([start/2, stop/1]).
-export([register_all/1, visited/1, transport/1]).
-export([ets_table/1]).
-export([small_config/0, large_config/0]).
-export([ranges/2, in_parallel/1, await/1]).

-export_type([population/0]).

%% The hub, to which all other processes are linked, with the processes that hold transports; and the
%% connections in the order in which they are to be registered.
-type population() :: {{pid(), Holders :: [pid()]}, [{binary(), pid()}]}.

%% Number of processes that hold transports.
-define(HOLDERS, 16).

%%% Ids


-spec id(integer()) -> binary().
id(N) ->
    <<(erlang:phash2(N, 1 bsl 32)):32, (erlang:phash2({N}, 1 bsl 32)):32, N:64, "session-">>.


-spec ids(pos_integer()) -> [binary()].
ids(Count) ->
    [ id(N) || N <- shuffled(lists:seq(1, Count)) ].


-spec shuffled([Element]) -> [Element].
shuffled(List) ->
    shuffled(List, {24, 15000, 1000000}).


-spec shuffled([Element], {integer(), integer(), integer()}) -> [Element].
shuffled(List, Order) ->
    Seed = rand:seed_s(exsss, Order),
    {Keyed, _} = lists:mapfoldl(fun(Element, State0) ->
                                        {Key, State} = rand:uniform_s(1 bsl 58, State0),
                                        {{Key, Element}, State}
                                end,
                                Seed,
                                List),
    [ Element || {_, Element} <- lists:sort(Keyed) ].


%%% Processes


%% Starts one process per connection. Each runs `Loop'.
-spec start(pos_integer(), fun(() -> term())) -> population().
start(Count, Loop) ->
    Asking = self(),
    {Hub, Monitor} =
        spawn_monitor(
          fun() ->
                  Holders = [ spawn_link(fun() -> receive stop -> ok end end) || _ <- lists:seq(1, ?HOLDERS) ],
                  Asking ! {self(), Holders, [ {Id, spawn_opt(Loop, [link])} || Id <- ids(Count) ]},
                  receive stop -> exit(shutdown) end
          end),
    receive
        {Hub, Holders, Connections} ->
            true = demonitor(Monitor, [flush]),
            {{Hub, Holders}, Connections};
        {'DOWN', Monitor, process, Hub, Reason} ->
            error(Reason)
    end.


%% Stops all processes and returns when they have exited.
-spec stop(population()) -> ok.
stop({{Hub, Holders}, Connections}) ->
    Monitors = [ monitor(process, Pid) || Pid <- Holders ++ [ Connection || {_, Connection} <- Connections ] ],
    Hub ! stop,
    lists:foreach(fun(Monitor) -> receive {'DOWN', Monitor, process, _, _} -> ok end end, Monitors).


%% Registers each process as a connection and as a server, and registers a transport for it, whose bucket is
%% charged for routes to the server. A few processes hold all transports and receive nothing.
-spec register_all(population()) -> ok.
register_all({{_Hub, Holding}, Connections}) ->
    Config = small_config(),
    Holders = list_to_tuple(Holding),
    Holder = fun(Id) -> element(erlang:phash2(Id, tuple_size(Holders)) + 1, Holders) end,
    %% One kind after the other, so that each lies together in memory as if it were the only one.
    Each = fun(Register) -> lists:foreach(fun({Id, Pid}) -> ok = Register(Id, Pid) end, Connections) end,
    ok = Each(fun(Id, Pid) -> erlmcp_shard_registry:register_connection(Id, Pid, Config) end),
    ok = Each(fun(Id, Pid) -> erlmcp_registry:register_server(Id, Pid, Config) end),
    Each(fun(Id, _Pid) -> erlmcp_registry:register_transport(transport(Id), Holder(Id), Config) end).


%% The id of a connection's transport.
-spec transport(binary()) -> binary().
transport(<<Unique:16/binary, _/binary>>) ->
    <<Unique/binary, "transprt">>.


%% The connections in an order other than that of their registration, with copied ids, and with their
%% transports.
-spec visited([{binary(), pid()}]) -> [bench_senders:connection()].
visited(Connections) ->
    [ {binary:copy(Id), Pid, transport(Id)} || {Id, Pid} <- shuffled(Connections, {2, 200, 500_000}) ].


%%% ETS


%% A table of these rows, inserted in one call.
-spec ets_table([tuple()]) -> ets:table().
ets_table(Rows) ->
    Table = ets:new(?MODULE, [set, public, {read_concurrency, true}]),
    lists:foreach(fun(Row) -> true = ets:insert(Table, Row) end, Rows),
    Table.


%%% Configs


%% A small MCP server's description of itself.
-spec small_config() -> map().
small_config() ->
    #{
      name => <<"weather">>,
      version => <<"1.4.0">>,
      capabilities => #{tools => true, resources => false, prompts => true}
     }.


%% About 50 KB on a heap: the descriptions of 100 tools. Each call makes a new term, so that no two configs are
%% one term in memory.
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


%% Runs each task in its own process, and returns when the last one has exited.
-spec in_parallel([fun(() -> term())]) -> ok.
in_parallel(Tasks) ->
    await([ spawn_monitor(Task) || Task <- Tasks ]).


%% Returns when all these processes have exited. None of them may fail.
-spec await([{pid(), reference()}]) -> ok.
await(Started) ->
    lists:foreach(fun({Pid, Monitor}) ->
                          receive
                              {'DOWN', Monitor, process, Pid, normal} -> ok;
                              {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
                          end
                  end,
                  Started).
