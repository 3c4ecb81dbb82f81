%%% Unregistering the connections of live processes takes no more memory than registering them did, and the memory that
%%% it keeps is reused.
-module(forgetting_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1]).
-export([forgetting_takes_no_memory/1,
         monitors_are_used_again/1,
         monitors_are_used_again_by_several_processes/1,
         process_with_many_idle_monitors_exits/1]).

%% Called in a peer node
-export([in_forgetting/1]).

-define(M, erlmcp_shard_registry).


all() ->
    [forgetting_takes_no_memory,
     monitors_are_used_again,
     monitors_are_used_again_by_several_processes,
     process_with_many_idle_monitors_exits].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    Config.


end_per_suite(_Config) ->
    ok.


%% FORGOTTEN: the number of processes (50,000).
forgetting_takes_no_memory(_Config) ->
    Processes = test_support:positive_integer("FORGOTTEN", 50_000),
    #{registered := Registered, unregistered := Unregistered} = Sizes =
        test_support:in_peer(?MODULE,
                             in_forgetting,
                             [Processes],
                             #{flags => ["+P", "1000000"], timeout_ms => 300_000}),
    ct:pal("resident bytes: ~0p", [Sizes]),
    %% The tolerance for the allocators is half of the memory of an entry.
    ?assert(Unregistered =< Registered + 100 * Processes, Sizes).


in_forgetting(Processes) ->
    Parent = self(),
    Pids = [ {N, spawn_link(fun() -> receive Parent -> ok end end)} || N <- lists:seq(1, Processes) ],
    Started = test_support:resident_bytes(),
    [ ok = ?M:register_connection(N, Pid, none) || {N, Pid} <- Pids ],
    Registered = test_support:resident_bytes(),
    [ ok = ?M:unregister_connection(N) || {N, _} <- Pids ],
    Unregistered = test_support:resident_bytes(),
    [ ok = ?M:register_connection({again, N}, Pid, none) || {N, Pid} <- Pids ],
    #{
      started => Started,
      registered => Registered,
      unregistered => Unregistered,
      registered_again => test_support:resident_bytes()
     }.


%% A process has as many monitors as it had registrations at one time, in whatever order they come and go.
monitors_are_used_again(_Config) ->
    Pid = test_support:process(),
    Ids = lists:seq(1, 1000),
    [ begin
          R = ?M:new(),
          [ ok = ?M:register_connection(R, {Round, Id}, Pid, none) || Id <- Ids ],
          ?assertEqual(1000, monitors(Pid)),
          [ ok = ?M:unregister_connection(R, {Round, Id}) || Id <- shuffled(Ids) ]
      end || Round <- lists:seq(1, 5) ],
    ?assertEqual(1000, monitors(Pid)),
    test_support:stop(Pid).


%% Several processes on several schedulers use the pool of one process. Each of them has one registration at a time.
monitors_are_used_again_by_several_processes(_Config) ->
    Pid = test_support:process(),
    R = ?M:new(),
    Workers = 4,
    Done = [ spawn_monitor(fun() ->
                                   [ begin
                                         ok = ?M:register_connection(R, {Worker, N}, Pid, none),
                                         ok = ?M:unregister_connection(R, {Worker, N})
                                     end || N <- lists:seq(1, 20_000) ]
                           end)
             || Worker <- lists:seq(1, Workers) ],
    [ receive {'DOWN', Monitor, process, _, Reason} -> ?assertEqual(normal, Reason) end
      || {_, Monitor} <- Done ],
    ?assert(monitors(Pid) =< Workers, monitors(Pid)),
    ?assertEqual(0, ?M:count(R)),
    test_support:stop(Pid).


%% Other processes use their pools meanwhile.
process_with_many_idle_monitors_exits(_Config) ->
    R = ?M:new(),
    Others = [ spawn_link(fun() -> come_and_go(R, self(), make_ref()) end) || _ <- [1, 2] ],
    [ begin
          Pid = test_support:process(),
          Ids = lists:seq(1, 10_000),
          [ ok = ?M:register_connection(R, Id, Pid, none) || Id <- Ids ],
          [ ok = ?M:unregister_connection(R, Id) || Id <- Ids ],
          test_support:stop(Pid)
      end || _ <- lists:seq(1, 3) ],
    [ test_support:kill(Other) || Other <- Others ].


come_and_go(R, Pid, Id) ->
    ok = ?M:register_connection(R, Id, Pid, none),
    ok = ?M:unregister_connection(R, Id),
    come_and_go(R, Pid, Id).


%% The registry's monitors are references to resources.
monitors(Pid) ->
    {monitored_by, By} = process_info(Pid, monitored_by),
    length([ Resource || Resource <- By, is_reference(Resource) ]).


shuffled(List) ->
    [ Element || {_, Element} <- lists:sort([ {rand:uniform(), Element} || Element <- List ]) ].
