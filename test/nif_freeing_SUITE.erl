%%% Registries and configs are freed on one thread, which outlives the module, and never for longer than a millisecond
%%% on a normal scheduler. nif_calls says how calls are measured.
-module(nif_freeing_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([freeing_starts_one_thread/1,
         freeing_goes_on_without_the_module/1,
         freeing_a_registry_that_was_large_is_short/1,
         freeing_a_large_registry_is_short/1,
         keys_that_come_and_go_cost_no_memory/1]).

%% Called in peer nodes
-export([in_freeing/0, in_purged/0, free_shrunk/0, free_large/0, in_coming_and_going/1]).

-import(nif_calls, [fill/4, in_peer/4, short/2, shortest/1, sleeper/0, time_us/1]).

-define(NIF, erlmcp_nif).


suite() ->
    [{timetrap, {minutes, 10}}].


all() ->
    [freeing_starts_one_thread,
     freeing_goes_on_without_the_module,
     freeing_a_registry_that_was_large_is_short,
     freeing_a_large_registry_is_short,
     keys_that_come_and_go_cost_no_memory].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%%% No call above a millisecond


%% There is one thread, however much is to be freed at the same time.
freeing_starts_one_thread(_Config) ->
    #{before := Before, most := Most} = Threads = in_peer(?MODULE, in_freeing, [], []),
    ct:pal("threads: ~0p", [Threads]),
    ?assert(Most =< Before + 1, Threads).


in_freeing() ->
    Parent = self(),
    Pid = sleeper(),
    Configs = [ [N | lists:seq(1, 11_000)] || N <- lists:seq(1, 1500) ],
    Holder = spawn_link(fun() ->
                                R = ?NIF:new(4, 100_000, 65_535),
                                [ ok = ?NIF:register(R, connection, N, Pid, Pid, Config)
                                  || [N | _] = Config <- Configs ],
                                Parent ! {self(), ?NIF:distinct_configs()},
                                receive drop -> _ = ?NIF:limits(R) end
                        end),
    1500 = receive {Holder, Distinct} -> Distinct end,
    Before = threads(),
    Counter = spawn_link(fun() -> most_threads(Before) end),
    Holder ! drop,
    test_support:await(fun() -> ?NIF:distinct_configs() =:= 0 end, 60_000),
    %% Configs are removed one by one, so that the threads come and go with each.
    R = ?NIF:new(4, 100_000, 65_535),
    [ begin
          ok = ?NIF:register(R, connection, N, Pid, Pid, Config),
          ok = ?NIF:unregister(R, connection, N)
      end || [N | _] = Config <- Configs ],
    Counter ! {most, self()},
    Most = receive {Counter, Seen} -> Seen end,
    exit(Pid, kill),
    #{before => Before, most => Most}.


most_threads(Most) ->
    receive
        {most, From} -> From ! {self(), Most}
    after
        0 ->
            most_threads(max(Most, threads()))
    end.


threads() ->
    {ok, Threads} = file:list_dir("/proc/self/task"),
    length(Threads).


%% The thread that frees runs code of the library, which the VM must not unload meanwhile.
freeing_goes_on_without_the_module(_Config) ->
    ?assertEqual({purged, reloaded}, in_peer(?MODULE, in_purged, [], [])).


in_purged() ->
    Drop = fun() ->
                   Pid = sleeper(),
                   {Holder, Monitor} = spawn_monitor(fun() ->
                                                             ok = fill(?NIF:new(4, 100_000, 65_535),
                                                                       connection,
                                                                       Pid,
                                                                       2000)
                                                     end),
                   receive {'DOWN', Monitor, process, Holder, normal} -> exit(Pid, kill) end
           end,
    Before = threads(),
    Drop(),
    test_support:await(fun() -> threads() =:= Before + 1 end),
    true = code:delete(?NIF),
    false = code:purge(?NIF),
    timer:sleep(100),
    {ok, Maps} = file:read_file("/proc/self/maps"),
    {_, _} = binary:match(Maps, <<"erlmcp_nif.so">>),
    {module, ?NIF} = code:load_file(?NIF),
    Drop(),
    test_support:await(fun() -> ?NIF:distinct_configs() =:= 0 end),
    {purged, reloaded}.


%% One key is added and removed many times among many others: a name, a config, or a name that only bindings have.
keys_that_come_and_go_cost_no_memory(_Config) ->
    [ begin
          {Before, After} = in_peer(?MODULE, in_coming_and_going, [Kind], []),
          ct:pal("~p: ~b MB, ~b MB", [Kind, Before, After]),
          ?assert(After - Before < 15, {Kind, Before, After})
      end || Kind <- [id, config, server] ].


in_coming_and_going(Kind) ->
    Pid = sleeper(),
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    {NS, Of} = case Kind of
                   id -> {connection, fun(_) -> none end};
                   config -> {connection, fun(N) -> {config, N} end};
                   server -> {server, fun(_) -> none end}
               end,
    [ ok = ?NIF:register(Registry, NS, <<N:32>>, Pid, Pid, Of(N)) || N <- lists:seq(1, 300_000) ],
    Turns = fun(Count) -> [ comes_and_goes(Kind, Registry, Pid, N) || N <- lists:seq(1, Count) ] end,
    _ = Turns(500),
    Before = rss_mb(),
    _ = Turns(5_000),
    {Before, rss_mb()}.


comes_and_goes(id, Registry, Pid, _N) ->
    ok = ?NIF:register(Registry, connection, id, Pid, Pid, none),
    ok = ?NIF:unregister(Registry, connection, id);
comes_and_goes(config, Registry, Pid, N) ->
    %% Only the last user of a config removes it, when the entry's memory is freed.
    [ begin
          ok = ?NIF:register(Registry, connection, {N, M}, Pid, Pid, Config),
          ok = ?NIF:unregister(Registry, connection, {N, M})
      end || {M, Config} <- [{0, [config]} | [ {M, none} || M <- lists:seq(1, 40) ]] ];
comes_and_goes(server, Registry, Pid, N) ->
    ok = ?NIF:register(Registry, transport, N, Pid, Pid, #{server_id => id}),
    ok = ?NIF:unregister(Registry, transport, N).


rss_mb() ->
    test_support:resident_bytes() div (1024 * 1024).


%% A garbage collection drops the last reference, on the scheduler of the process that held it.
freeing_a_registry_that_was_large_is_short(_Config) -> short(?MODULE, free_shrunk).


free_shrunk() ->
    free(fun(Registry) ->
                 [ ok = ?NIF:unregister(Registry, connection, <<N:32>>)
                   || N <- lists:seq(401, 100_000) ],
                 400 = ?NIF:count(Registry, connection)
         end).


freeing_a_large_registry_is_short(_Config) -> short(?MODULE, free_large).


free_large() ->
    free(fun(_Registry) -> ok end).


free(Prepare) ->
    Pid = sleeper(),
    Us = shortest(fun() -> time_to_free(Prepare, Pid) end),
    exit(Pid, kill),
    [{garbage_collect, Us}].


time_to_free(Prepare, Pid) ->
    Parent = self(),
    Owner = spawn_opt(fun() ->
                              put(registry, filled(Prepare, Pid)),
                              _ = garbage_collect(),
                              1 = ?NIF:distinct_configs(),
                              _ = erase(registry),
                              Us = time_us(fun() -> garbage_collect() end),
                              Parent ! {self(), Us}
                      end,
                      [link, {priority, max}]),
    receive
        {Owner, Us} ->
            %% The entries of the freed registry are freed, too.
            test_support:await(fun() -> ?NIF:distinct_configs() =:= 0 end, 60_000),
            Us
    end.


filled(Prepare, Pid) ->
    Registry = ?NIF:new(64, 2_000_000, 65_535),
    ok = fill(Registry, connection, Pid, 100_000),
    _ = Prepare(Registry),
    Registry.
