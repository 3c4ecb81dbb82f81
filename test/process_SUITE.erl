%%% Spawn options of processes that serve one connection each.
%%%
%%% The contract: every way to start a process takes them, each profile keeps to what it promises against a process without
%%% options, and neither the native library nor the application is needed (fallback_SUITE).
-module(process_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0]).
-export([every_way_to_start_takes_them/1,
         idle_keeps_no_garbage/1,
         steady_collects_less/1,
         bursty_does_not_copy_its_mailbox/1,
         wrong_profiles/1]).

%% A gen_server, a gen_statem and a gen_event handler that do nothing; a process
-export([init/1, handle_call/3, handle_cast/2, handle_event/2, handle_call/2, callback_mode/0, state/3, echo/0, started/0]).

-import(test_support, [kill/1]).

-define(P,        erlmcp_process).
-define(PROFILES, [idle, steady, bursty]).


all() ->
    [every_way_to_start_takes_them,
     idle_keeps_no_garbage,
     steady_collects_less,
     bursty_does_not_copy_its_mailbox,
     wrong_profiles].


every_way_to_start_takes_them(_Config) ->
    ?assertEqual(?P:spawn_opts(idle), ?P:spawn_opts()),
    [ begin
          Options = ?P:spawn_opts(Profile),
          Start = [{spawn_opt, Options}],
          Pids = [spawn_opt(?MODULE, echo, [], [link | Options]),
                  proc_lib:spawn_opt(?MODULE, echo, [], [link | Options]),
                  ok(proc_lib:start_link(?MODULE, started, [], infinity, Options)),
                  ok(gen_server:start_link(?MODULE, server, Start)),
                  ok(gen_statem:start_link(?MODULE, statem, Start)),
                  ok(gen_event:start_link(Start))],
          [ ?assertEqual([], in_force(Pid, Options), {Profile, Pid}) || Pid <- Pids ],
          [ kill(Pid) || Pid <- Pids ]
      end || Profile <- ?PROFILES ],
    ok.


%% The options that a process does not have.
in_force(Pid, Options) ->
    [{garbage_collection, Collection}, Queue] = process_info(Pid, [garbage_collection, message_queue_data]),
    Options -- [Queue | Collection].


ok({ok, Pid}) -> Pid.


%% Garbage that has survived a collection stays in the old heap of a process without options.
idle_keeps_no_garbage(_Config) ->
    ?assertEqual(true, memory_after_work(?P:spawn_opts(idle)) * 2 < memory_after_work([])).


memory_after_work(Options) ->
    Pid = spawn_opt(?MODULE, echo, [], [link | Options]),
    work(Pid, 1000),
    {memory, Bytes} = process_info(Pid, memory),
    kill(Pid),
    Bytes.


steady_collects_less(_Config) ->
    ?assertEqual(true, collections_of_work(?P:spawn_opts(steady)) * 2 < collections_of_work([])).


collections_of_work(Options) ->
    Pid = spawn_opt(?MODULE, echo, [], [link | Options]),
    work(Pid, 1000),
    ok = traced(Pid, fun() -> work(Pid, 1000) end),
    Collections = length([ Event || {trace, P, Event, _} <- test_support:flush(), P =:= Pid, is_start(Event) ]),
    kill(Pid),
    Collections.


%% Requests one by one, each of which makes some garbage.
work(Pid, Requests) ->
    [ begin
          Pid ! {self(), lists:seq(1, 100)},
          receive {Pid, _} -> ok end
      end || _ <- lists:seq(1, Requests) ].


%% The largest heap, with the fragments of messages, that a collection finds.
bursty_does_not_copy_its_mailbox(_Config) ->
    Words = fun(Options) ->
                    Pid = spawn_opt(?MODULE, echo, [], [link | Options]),
                    true = erlang:suspend_process(Pid),
                    [ Pid ! {self(), lists:seq(1, 100)} || _ <- lists:seq(1, 1000) ],
                    ok = traced(Pid,
                                fun() ->
                                        true = erlang:resume_process(Pid),
                                        [ receive {Pid, _} -> ok end || _ <- lists:seq(1, 1000) ]
                                end),
                    Found = [ proplists:get_value(heap_size, Info) + proplists:get_value(mbuf_size, Info)
                              || {trace, P, Event, Info} <- test_support:flush(), P =:= Pid, is_start(Event) ],
                    kill(Pid),
                    lists:max(Found)
            end,
    ?assertEqual(true, Words(?P:spawn_opts(bursty)) * 10 < Words([])).


is_start(Event) -> Event =:= gc_minor_start orelse Event =:= gc_major_start.


traced(Pid, Fun) ->
    1 = erlang:trace(Pid, true, [garbage_collection]),
    _ = Fun(),
    1 = erlang:trace(Pid, false, [garbage_collection]),
    Delivered = erlang:trace_delivered(Pid),
    receive {trace_delivered, Pid, Delivered} -> ok end.


wrong_profiles(_Config) ->
    [ ?assertError({bad_option, profile, Wrong, "idle, steady or bursty"}, ?P:spawn_opts(Wrong))
      || Wrong <- [default, "idle", <<"idle">>, [], undefined] ].


%%% Processes


echo() ->
    receive
        {From, List} ->
            From ! {self(), lists:reverse(List)},
            echo()
    end.


started() ->
    proc_lib:init_ack({ok, self()}),
    echo().


init(server) -> {ok, none};
init(statem) -> {ok, state, none};
init([]) -> {ok, none}.


handle_call(_Request, _From, State) -> {reply, ok, State}.


handle_cast(_Message, State) -> {noreply, State}.


handle_event(_Event, State) -> {ok, State}.


handle_call(_Request, State) -> {ok, ok, State}.


callback_mode() -> state_functions.


state(_Type, _Event, _State) -> keep_state_and_data.
