%%% Log lines: shown by OTP's default handler in OTP's configuration, as reports that can be filtered by their metadata,
%%% one sentence each.
-module(native_log_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([default_handler_is_left_alone/1,
         lines_can_be_dropped_by_their_metadata/1,
         each_event_is_one_sentence/1,
         numbers_are_no_text/1,
         events_are_telemetry_events/1,
         a_full_registry_is_told_once_a_second/1]).
%% In a node of its own
-export([log_with_default_handler/0, log_with_filter/0, executed_events/0, told_of_a_full_registry/0]).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [default_handler_is_left_alone,
     lines_can_be_dropped_by_their_metadata,
     each_event_is_one_sentence,
     numbers_are_no_text,
     events_are_telemetry_events,
     a_full_registry_is_told_once_a_second].


default_handler_is_left_alone(Config) ->
    Log = logged_in_peer(log_with_default_handler, Config),
    ?assertMatch([_], binary:matches(Log, <<"erlmcp_native: circuit breaker of the node: open">>)),
    ?assertMatch([_], binary:matches(Log, <<"erlmcp_native: circuit breaker of the node: closed">>)).


log_with_default_handler() ->
    {ok, Before} = logger:get_handler_config(default),
    ok = open_and_close(),
    {ok, Before} = logger:get_handler_config(default),
    ok = application:stop(erlmcp_native),
    {ok, Before} = logger:get_handler_config(default),
    logger_std_h:filesync(default).


lines_can_be_dropped_by_their_metadata(Config) ->
    ?assertEqual(nomatch, binary:match(logged_in_peer(log_with_filter, Config), <<"circuit">>)).


%% The filter in the documentation.
log_with_filter() ->
    Filter = fun(#{meta := #{application := erlmcp_native}}, _) -> stop; (_Event, _) -> ignore end,
    ok = logger:add_handler_filter(default, no_erlmcp_native, {Filter, []}),
    ok = open_and_close(),
    logger_std_h:filesync(default).


open_and_close() ->
    ok = application:start(erlmcp_native),
    ok = erlmcp_circuit_breaker:force_open(),
    ok = erlmcp_circuit_breaker:force_close().


%% The output of a node's default handler while the node ran a function.
logged_in_peer(Function, Config) ->
    File = filename:join(proplists:get_value(priv_dir, Config), atom_to_list(Function) ++ ".log"),
    %% The configuration of kernel, except for the file.
    Handler = io_lib:format("[{handler,default,logger_std_h,#{config=>#{type=>file,file=>\"~ts\"},"
                            "filters=>[{remote_gl,{fun logger_filters:remote_gl/2,stop}},"
                            "{domain,{fun logger_filters:domain/2,{log,super,[otp,sasl]}}},"
                            "{no_domain,{fun logger_filters:domain/2,{log,undefined,[]}}}],"
                            "filter_default=>stop}}]",
                            [File]),
    ok = test_support:in_peer(?MODULE, Function, [], #{flags => ["-kernel", "logger", lists:flatten(Handler)]}),
    {ok, Log} = file:read_file(File),
    Log.


each_event_is_one_sentence(_Config) ->
    Reports = [#{event => native_library_not_loaded, path => "/a", reason => {load, "b"}, remedy => "build it"},
               #{event => default_registry_exists, existing => #{shards => 1}, configured => #{shards => 2}},
               #{event => bad_option, reason => {bad_option, admission, x, "y"}},
               #{event => shard_overloaded, shard_id => 1},
               #{event => shard_recovered, shard_id => 1},
               #{event => circuit_opened, breaker => node},
               #{event => circuit_half_open, breaker => {name, "b\n\x{1F600}"}},
               #{event => circuit_closed, breaker => {name, {a, 1}}},
               #{event => health_degraded, reasons => [{circuit, open}]},
               #{event => health_degraded, reasons => [{native_library, #{path => "/a"}}, {overloaded_shards, [39]}]},
               #{event => health_ok},
               #{event => control_plane_not_started, reason => {shutdown, x}},
               #{event => connection_events_not_started, reason => {shutdown, x}},
               #{event => capability_store_not_started, reason => {shutdown, x}},
               #{event => switched, from => current, to => '100x', details => #{}},
               #{event => switch_failed, from => current, to => '100x', reason => r, details => #{}},
               #{event => unknown_target, target => transport_of, id => <<"s">>, suppressed => 0},
               #{event => registry_full, max_entries => 10, suppressed => 3},
               #{event => of_another_version, detail => 1}],
    _ = [ begin
              Text = text(Report),
              ?assertEqual({Report, 0}, {Report, string:str(Text, "erlmcp_native: ") - 1}),
              ?assertNot(lists:member($\n, Text), Text)
          end || Report <- Reports ].


%% Shard numbers may be printable characters, and lists of them are not printed as text.
numbers_are_no_text(_Config) ->
    Text = text(#{event => health_degraded, reasons => [{overloaded_shards, [39, 40]}, {circuit, open}]}),
    ?assertEqual("erlmcp_native: health is degraded: [{overloaded_shards,[39,40]},{circuit,open}]", Text),
    ?assertEqual("erlmcp_native: health is degraded: [{native_library,#{path => \"/a\"}}]",
                 text(#{event => health_degraded, reasons => [{native_library, #{path => "/a"}}]})).


text(Report) ->
    {Format, Arguments} = erlmcp_native_log:format(Report),
    lists:flatten(io_lib:format(Format, Arguments)).


%% The host's library has this function. The events are executed whatever the log level, in the process that has
%% noticed them.
events_are_telemetry_events(_Config) ->
    {Before, Executed} = test_support:in_peer(?MODULE, executed_events),
    ?assertEqual([], Before),
    ?assertEqual([{[erlmcp_native, circuit_opened], #{count => 1}, #{breaker => node}},
                  {[erlmcp_native, circuit_closed], #{count => 1}, #{breaker => node}}],
                 Executed).


executed_events() ->
    ok = logger:set_primary_config(level, none),
    true = register(executed, self()),
    %% Without the library nothing is executed.
    ok = open_and_close(),
    Before = test_support:flush(),
    ok = load_telemetry(),
    ok = erlmcp_circuit_breaker:force_open(),
    ok = erlmcp_circuit_breaker:force_close(),
    {Before, test_support:flush()}.


%% A module with the function of that name which is called, since the library cannot be had everywhere.
load_telemetry() ->
    Lines = ["-module(telemetry).",
             "-export([execute/3]).",
             "execute(Name, Measurements, Metadata) -> executed ! {Name, Measurements, Metadata}, ok."],
    Forms = [ begin
                  {ok, Tokens, _} = erl_scan:string(Line),
                  {ok, Form} = erl_parse:parse_form(Tokens),
                  Form
              end || Line <- Lines ],
    {ok, telemetry, Beam} = compile:forms(Forms),
    {module, telemetry} = code:load_binary(telemetry, "telemetry.erl", Beam),
    ok.


a_full_registry_is_told_once_a_second(_Config) ->
    Executed = test_support:in_peer(?MODULE, told_of_a_full_registry),
    ?assertMatch({[erlmcp_native, registry_full], #{count := 1}, #{max_entries := 1, suppressed := 0}}, hd(Executed)),
    %% Each further one has the number of those that were not told before it.
    {_, _, #{suppressed := Suppressed}} = lists:last(Executed),
    ?assert(Suppressed > 0),
    ?assert(length(Executed) < 10, Executed).


told_of_a_full_registry() ->
    ok = logger:set_primary_config(level, none),
    true = register(executed, self()),
    ok = load_telemetry(),
    Registry = erlmcp_shard_registry:new(#{max_entries => 1}),
    ok = erlmcp_shard_registry:register_connection(Registry, 0, self(), none),
    told(Registry, []).


%% Until the second event.
told(_Registry, [_, _ | _] = Executed) ->
    Executed;
told(Registry, Executed) ->
    [ {error, registry_full} = Refused
      || N <- lists:seq(1, 10),
         Refused <- [erlmcp_shard_registry:register_connection(Registry, N, self(), none),
                     erlmcp_shard_registry:register_or_find_connection(Registry, N, self(), none),
                     erlmcp_shard_registry:replace_connection(Registry, N, self(), none)] ],
    told(Registry, Executed ++ test_support:flush()).
