%%% What the spawn options of `erlmcp_process' change, against those of a process without options.
%%%
%%% A session ({@link bench_session}) is a `gen_server' with the options of a profile. Its garbage collections are traced.
%%%
%%% <ul>
%%% <li>`used': its memory after 300 requests that came one by one, before it hibernates.</li>
%%% <li>`steady': 10,000 requests, one by one. Collections for each thousand of them, which are those a second at 1,000
%%% requests a second, and the time that they take for each request.</li>
%%% <li>`burst': 10,000 requests wait in the mailbox when the session begins. The longest and all collections until all are
%%% handled, and the memory afterwards.</li>
%%% </ul>
-module(profile_bench).

-export([run/1]).

-type profile() :: default | erlmcp_process:profile().
-type work() :: used | steady | burst.
-type quantity() :: bytes | collections | collecting_ns | number | longest_ns | total_ns.

-define(FEW,        300).
-define(REQUESTS,   10_000).
-define(PROFILES,   [default, idle, steady, bursty]).
-define(NO_OPTIONS, "a process without options").


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{rounds := Rounds, progress := Progress}) ->
    Figures = bench_rounds:interleave(Rounds,
                                      [ {{Work, Profile}, fun() -> measure(Work, Profile) end}
                                        || Work <- [used, steady, burst], Profile <- ?PROFILES ],
                                      Progress),
    Of = fun(Work, Quantity, Profile) -> [ map_get(Quantity, Figure) || Figure <- map_get({Work, Profile}, Figures) ] end,
    [ row(atom_to_list(Profile) ++ ", " ++ Name, Unit, Of(Work, Quantity, Profile), Of(Work, Quantity, default))
      || {Work, Quantity, Name, Unit} <- quantities(), Profile <- ?PROFILES -- [default] ].


-spec row(string(), string(), bench_rounds:figures(), bench_rounds:figures()) -> bench_report:row().
row(Name, "ns", Figures, Others) ->
    bench_report:time_row("profiles", Name, Figures, ?NO_OPTIONS, Others);
row(Name, Unit, Figures, Others) ->
    bench_report:size_row("profiles",
                          Name,
                          bench_rounds:median(Figures),
                          Unit,
                          ?NO_OPTIONS,
                          bench_rounds:median(Others)).


-spec quantities() -> [{work(), quantity(), string(), string()}].
quantities() ->
    [{used, bytes, "after 300 requests", "B"},
     {steady, bytes, "at steady requests", "B"},
     {steady, collections, "1,000 steady requests", "GCs"},
     {steady, collecting_ns, "a steady request, GCs", "ns"},
     {burst, longest_ns, "burst of 10,000, longest GC", "ns"},
     {burst, total_ns, "burst of 10,000, all GCs", "ns"},
     {burst, bytes, "after a burst of 10,000", "B"}].


-spec measure(work(), profile()) -> #{quantity() => float()}.
measure(Work, Profile) ->
    {ok, Session} = gen_server:start_link(bench_session, <<"transport-17">>, [{spawn_opt, options(Profile)}]),
    ok = one_by_one(Session, ?FEW),
    Figures = measure_session(Work, Session),
    ok = gen_server:stop(Session),
    Figures.


-spec options(profile()) -> [erlmcp_process:option()].
options(default) -> [];
options(Profile) -> erlmcp_process:spawn_opts(Profile).


-spec measure_session(work(), pid()) -> #{quantity() => float()}.
measure_session(used, Session) ->
    #{bytes => bytes(Session)};
measure_session(steady, Session) ->
    #{number := Number, total_ns := Ns} = collections(Session, fun() -> one_by_one(Session, ?REQUESTS) end),
    #{bytes => bytes(Session), collections => Number * 1000 / ?REQUESTS, collecting_ns => Ns / ?REQUESTS};
measure_session(burst, Session) ->
    true = erlang:suspend_process(Session),
    ok = send(Session, ?REQUESTS),
    Collections = collections(Session,
                              fun() ->
                                      true = erlang:resume_process(Session),
                                      _ = bench_session:handled(Session),
                                      ok
                              end),
    Collections#{bytes => bytes(Session)}.


-spec bytes(pid()) -> float().
bytes(Session) ->
    {memory, Bytes} = process_info(Session, memory),
    float(Bytes).


-spec one_by_one(pid(), non_neg_integer()) -> ok.
one_by_one(_Session, 0) ->
    ok;
one_by_one(Session, Requests) ->
    ok = send(Session, 1),
    _ = bench_session:handled(Session),
    one_by_one(Session, Requests - 1).


%% Each request is a binary of its own, as if it came from a socket.
-spec send(pid(), non_neg_integer()) -> ok.
send(Session, Requests) ->
    Request = bench_session:request(),
    lists:foreach(fun(_) -> Session ! {mcp_message, <<"transport-17">>, binary:copy(Request)} end, lists:seq(1, Requests)).


%%% Garbage collections


%% Those of a process while a fun runs.
-spec collections(pid(), fun(() -> ok)) -> #{number := float(), total_ns := float(), longest_ns := float()}.
collections(Pid, Fun) ->
    Tracer = spawn_link(fun() -> tracer([], none) end),
    Flags = [garbage_collection, monotonic_timestamp],
    1 = erlang:trace(Pid, true, [{tracer, Tracer} | Flags]),
    ok = Fun(),
    1 = erlang:trace(Pid, false, Flags),
    Delivered = erlang:trace_delivered(Pid),
    receive {trace_delivered, Pid, Delivered} -> ok end,
    Tracer ! {stop, self()},
    Times = receive {Tracer, Collected} -> Collected end,
    Ns = [ erlang:convert_time_unit(Time, native, nanosecond) || Time <- Times ],
    #{number => float(length(Ns)), total_ns => float(lists:sum(Ns)), longest_ns => float(lists:max([0 | Ns]))}.


-spec tracer([integer()], integer() | none) -> {pid(), [integer()]}.
tracer(Times, Began) ->
    receive
        {trace_ts, _Pid, Event, _Info, Time} when Event =:= gc_minor_start; Event =:= gc_major_start ->
            tracer(Times, Time);
        {trace_ts, _Pid, _End, _Info, Time} when is_integer(Began) ->
            tracer([Time - Began | Times], none);
        {stop, Asking} ->
            Asking ! {self(), Times}
    end.
