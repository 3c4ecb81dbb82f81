%%% Log lines: shown by OTP's default handler in OTP's configuration, as reports that can be filtered by their metadata,
%%% one sentence each.
-module(native_log_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0]).
-export([default_handler_is_left_alone/1, lines_can_be_dropped_by_their_metadata/1, each_event_is_one_sentence/1, numbers_are_no_text/1]).
%% In a node of its own
-export([log_with_default_handler/0, log_with_filter/0]).


suite() ->
    [{timetrap, {minutes, 2}}].


all() ->
    [default_handler_is_left_alone, lines_can_be_dropped_by_their_metadata, each_event_is_one_sentence, numbers_are_no_text].


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
               #{event => switched, from => current, to => '100x', details => #{}},
               #{event => switch_failed, from => current, to => '100x', reason => r, details => #{}},
               #{event => unknown_target, target => transport_of, id => <<"s">>, suppressed => 0},
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
