%%% The benchmark of the registry: options, the order of the parts, and the exit code.
%%%
%%% Started by `bench/run', which explains the options. Progress goes to standard error, the table to standard
%%% output.
-module(registry_bench).

-export([main/0]).
%% In the peers
-export([start_registries/0]).

-export_type([options/0]).

-type options() :: #{
                     sections := [section()],
                     % Rounds of the parts that are measured in rounds.
                     rounds := pos_integer(),
                     connections := pos_integer(),
                     % Receivers and senders of the growth part, connections of memory and load.
                     sizes := default | [pos_integer()],
                     senders := default | [pos_integer()],
                     % Look-ups per round.
                     lookups := pos_integer(),
                     % The greatest rate offered, in messages per second, and the time at each rate in seconds.
                     rate := pos_integer(),
                     seconds := float(),
                     % The length of the soak.
                     minutes := float(),
                     % Entries of the large registry.
                     entries := pos_integer(),
                     deaths := pos_integer(),
                     json := file:filename() | default,
                     html := file:filename() | default,
                     strict := boolean(),
                     progress := fun(() -> ok)
                    }.
-type section() :: lookup | guarded | limits | stores | capabilities | groups | breakers | routing | batches | growth | registration | latency | capacity | deaths | restart | losses | shards | profiles | memory | stress | soak | load.

-define(SECTIONS, [{lookup, lookup_bench},
                   {guarded, backpressure_bench},
                   {limits, keyed_limiter_bench},
                   {stores, message_store_bench},
                   {capabilities, capability_bench},
                   {groups, group_bench},
                   {breakers, breaker_bench},
                   {routing, routing_bench},
                   {batches, batch_bench},
                   {growth, growth_bench},
                   {registration, registration_bench},
                   {latency, latency_bench},
                   {capacity, capacity_bench},
                   {deaths, death_bench},
                   {restart, restart_bench},
                   {losses, losses_bench},
                   {shards, shard_bench},
                   {profiles, profile_bench},
                   {memory, memory_bench},
                   {stress, stress_bench},
                   {soak, soak_bench},
                   {load, load_bench}]).
%% Parts that take minutes run only when they are named.
-define(ON_REQUEST, [batches, profiles, memory, stress, soak, load]).


%% The first argument is the folder of the project.
-spec main() -> no_return().
main() ->
    %% An exit signal of a linked process, such as a sender, cannot be caught in the process that runs the parts.
    {Pid, Monitor} = spawn_monitor(fun run_and_halt/0),
    receive
        {'DOWN', Monitor, process, Pid, Reason} ->
            io:format(standard_error, "~nbench/run: ~tp~n", [Reason]),
            halt(3)
    end.


-spec run_and_halt() -> no_return().
run_and_halt() ->
    [Root | Arguments] = init:get_plain_arguments(),
    try
        halt(run(Root, parse(Arguments, defaults())))
    catch
        throw:{usage, Message} ->
            io:format(standard_error, "bench/run: ~ts; see bench/run --help~n", [Message]),
            halt(2);
        Class:Reason:Stacktrace ->
            io:format(standard_error,
                      "~nbench/run: ~ts~n",
                      [erl_error:format_exception(Class, Reason, Stacktrace)]),
            halt(3)
    end.


-spec run(file:filename(), options()) -> 0 | 1.
run(Root, #{sections := Sections, strict := Strict} = Options) ->
    ok = start_registries(),
    Machine = bench_machine:describe(Root) ++ [{command, lists:join($\s, ["./bench/run" | tl(init:get_plain_arguments())])}],
    Started = erlang:monotonic_time(),
    Rows = lists:append([ section(Section, Module, Options)
                          || {Section, Module} <- ?SECTIONS, lists:member(Section, Sections) ]),
    Took = bench_report:seconds(erlang:monotonic_time() - Started),
    bench_report:print(Machine, Rows),
    Files = write(Root, Options, Machine, Rows, Took),
    io:format("~.1f s; ~ts~n", [Took, lists:join(", ", Files)]),
    case Strict andalso bench_report:missed(Rows) =/= [] of
        true -> 1;
        false -> 0
    end.


-spec section(section(), module(), options()) -> [bench_report:row()].
section(Section, Module, Options) ->
    io:format(standard_error, "~-13ts", [Section]),
    Started = erlang:monotonic_time(),
    Rows = Module:run(Options),
    io:format(standard_error,
              " ~.1f s~n",
              [bench_report:seconds(erlang:monotonic_time() - Started)]),
    Rows.


%% Starts the application, the baseline and the registry, in a process that stays alive.
-spec start_registries() -> ok.
start_registries() ->
    %% Overload and open circuits are among the measured states, so their log events are suppressed.
    ok = logger:set_primary_config(level, error),
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Asking = self(),
    _ = spawn(fun() ->
                      ok = bench_baseline:start_link(),
                      {ok, _} = erlmcp_registry:start_link(),
                      Asking ! registries_started,
                      receive stop -> ok end
              end),
    receive registries_started -> ok end.


%% Writes the results as JSON, and those of a load as HTML.
-spec write(file:filename(),
            options(),
            [{atom(), io_lib:chars()}],
            [bench_report:row()],
            float()) -> [file:filename()].
write(Root, #{json := Json, html := Html} = Options, Machine, Rows, Took) ->
    {date, Date} = lists:keyfind(date, 1, Machine),
    Name = re:replace(Date, "[-:]", "", [global, {return, list}]),
    File = fun(default, Extension) -> filename:join([Root, "bench", "results", Name ++ Extension]);
              (Given, _Extension) -> Given
           end,
    Written = [{File(Json, ".json"),
                [bench_report:json(#{
                                     machine => maps:from_list(Machine),
                                     options => maps:without([progress, json, html, sections, sizes, senders], Options),
                                     seconds => Took,
                                     rows => Rows
                                    }),
                 $\n]} | [ {File(Html, ".html"), bench_html:page(Machine, Rows, Report, Took)} || #{load := Report} <- Rows ]],
    [ begin
          ok = filelib:ensure_dir(Path),
          ok = file:write_file(Path, Content),
          Path
      end
      || {Path, Content} <- Written ].


%%% Options


-spec defaults() -> options().
defaults() ->
    #{
      sections => [ Section || {Section, _} <- ?SECTIONS ] -- ?ON_REQUEST,
      rounds => 7,
      connections => 15_000,
      sizes => default,
      senders => default,
      lookups => 300_000,
      rate => 500_000,
      seconds => 1.0,
      minutes => 30.0,
      entries => 1_000_000,
      deaths => 1_000_000,
      json => default,
      html => default,
      strict => false,
      progress => fun() -> io:put_chars(standard_error, ".") end
     }.


-spec parse([string()], options()) -> options().
parse([], Options) ->
    Options;
parse(["--strict" | Rest], Options) ->
    parse(Rest, Options#{strict => true});
parse(["--quick" | Rest], Options) ->
    parse(Rest,
          Options#{
            rounds => 3,
            lookups => 100_000,
            seconds => 0.3,
            entries => 100_000,
            deaths => 100_000
           });
parse(["--memory" | Rest], Options) ->
    parse(Rest, Options#{sections => [profiles, memory]});
parse(["--load" | Rest], Options) ->
    parse(Rest, Options#{sections => [load]});
parse(["--soak", Value | Rest], Options) ->
    parse(Rest, Options#{sections => [soak], minutes => number(Value, "--soak") / 1});
parse(["--only", Names | Rest], Options) ->
    Sections = [ section_named(Name) || Name <- string:lexemes(Names, ",") ],
    parse(Rest, Options#{sections => Sections});
parse(["--sizes", Values | Rest], Options) ->
    parse(Rest, Options#{sizes => numbers(Values, "--sizes")});
parse(["--senders", Values | Rest], Options) ->
    parse(Rest, Options#{senders => numbers(Values, "--senders")});
parse(["--json", File | Rest], Options) ->
    parse(Rest, Options#{json => File});
parse(["--html", File | Rest], Options) ->
    parse(Rest, Options#{html => File});
parse(["--seconds", Value | Rest], Options) ->
    parse(Rest, Options#{seconds => number(Value, "--seconds") / 1});
parse(["--" ++ Name = Option, Value | Rest], Options) ->
    case lists:keyfind(Name, 1, numeric()) of
        {Name, Key} -> parse(Rest, Options#{Key => trunc(number(Value, Option))});
        false -> throw({usage, "unknown option " ++ Option})
    end;
parse([Argument | _], _Options) ->
    throw({usage, "unknown option or no value: " ++ Argument}).


-spec numeric() -> [{string(), atom()}].
numeric() ->
    [ {atom_to_list(Key), Key}
      || Key <- [rounds, connections, lookups, rate, entries, deaths] ].


-spec numbers(string(), string()) -> [pos_integer(), ...].
numbers(Values, Option) ->
    case string:lexemes(Values, ",") of
        [] -> throw({usage, Option ++ " takes positive numbers, not nothing"});
        Numbers -> [ trunc(number(Value, Option)) || Value <- Numbers ]
    end.


-spec number(string(), string()) -> number().
number(Value, Option) ->
    Digits = lists:delete($_, Value),
    Number = case string:to_float(Digits) of
                 {Float, ""} -> Float;
                 _ ->
                     case string:to_integer(Digits) of
                         {Integer, ""} -> Integer;
                         _ -> 0
                     end
             end,
    Number > 0 orelse throw({usage, Option ++ " takes a positive number, not " ++ Value}),
    Number.


-spec section_named(string()) -> section().
section_named(Name) ->
    case [ Section || {Section, _} <- ?SECTIONS, atom_to_list(Section) =:= Name ] of
        [Section] -> Section;
        [] -> throw({usage, "there is no part " ++ Name})
    end.
