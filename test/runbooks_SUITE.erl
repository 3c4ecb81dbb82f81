%%% The alerts, and the runbooks that they lead to: the rules are tested by promtool, each alert has its runbook, and every
%%% command in there does something. What the runbooks say of upgrades holds.
-module(runbooks_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, suite/0, init_per_suite/1, end_per_suite/1]).
-export([rules_pass_their_tests/1,
         rules_know_the_metrics/1,
         every_alert_has_a_runbook/1,
         commands_of_runbooks/1,
         modules_are_reloaded_under_load/1,
         the_native_module_is_not_reloaded/1]).

%% Called in a peer node
-export([in_commands/0, in_reloaded/0, in_native_reloaded/0]).

-import(test_support, [await/1]).


suite() ->
    [{timetrap, {minutes, 3}}].


all() ->
    [rules_pass_their_tests,
     rules_know_the_metrics,
     every_alert_has_a_runbook,
     commands_of_runbooks,
     modules_are_reloaded_under_load,
     the_native_module_is_not_reloaded].


init_per_suite(Config) ->
    none = erlmcp_nif:load_error(),
    {ok, Started} = application:ensure_all_started(erlmcp_native),
    [{started, Started} | Config].


end_per_suite(Config) ->
    lists:foreach(fun application:stop/1, proplists:get_value(started, Config)).


%%% Alerts


rules_pass_their_tests(_Config) ->
    case os:find_executable("promtool") of
        false ->
            {skip, "promtool is not installed (Debian: apt-get install prometheus)"};
        Promtool ->
            ?assertMatch({0, _}, run(Promtool, ["check", "rules", "alerts.yml"])),
            ?assertMatch({0, _}, run(Promtool, ["test", "rules", "alerts_test.yml"]))
    end.


%% A rule over a metric or label that does not exist never fires.
rules_know_the_metrics(_Config) ->
    ok = erlmcp_shard_registry:register_connection(known, self(), #{}),
    %% A shard without traffic has no queueing time.
    await(fun() ->
                  ok = erlmcp_shard_manager:route_message(known, message),
                  receive message -> ok end,
                  nomatch =/= re:run(text(), "queueing_seconds")
          end),
    Text = text(),
    {match, Names} = re:run(rules(), "erlmcp_[a-z_]+(?=[{\\[)])", [global, {capture, first, binary}]),
    ?assert(length(Names) > 10),
    [ ?assertMatch({Name, {match, _}}, {Name, re:run(Text, ["# TYPE ", Name, " "])}) || [Name] <- lists:usort(Names) ],
    {match, Labels} = re:run(rules(), "(status|state|quantile|group)=(\"[a-z0-9._]+\")", [global, {capture, [1, 2], binary}]),
    [ ?assertMatch({Label, {match, _}}, {Label, re:run(Text, [Label, "=", Value])})
      || [Label, Value] <- lists:usort(Labels) ],
    ok = erlmcp_shard_registry:unregister_connection(known).


text() ->
    iolist_to_binary(erlmcp_metrics_text:prometheus()).


every_alert_has_a_runbook(_Config) ->
    {match, Alerts} = re:run(rules(), "- alert:", [global]),
    {match, Anchors} = re:run(rules(), "runbook_url: \"docs/runbooks.md#([a-z-]+)\"", [global, {capture, [1], list}]),
    ?assertEqual(length(Alerts), length(Anchors)),
    {match, Headings} = re:run(runbooks(), "^## (.*)$", [global, multiline, {capture, [1], list}]),
    Sections = [ lists:flatten(string:replace(string:lowercase(Heading), " ", "-", all)) || [Heading] <- Headings ],
    [ ?assert(lists:member(Anchor, Sections), Anchor) || [Anchor] <- Anchors ].


%%% Runbooks


%% All commands, in order, in a node with the connection that they name.
commands_of_runbooks(_Config) ->
    in_peer(in_commands).


in_commands() ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    {ok, Registry} = erlmcp_registry:start_link(),
    ok = erlmcp_shard_registry:register_connection(<<"client-17">>, self(), #{}),
    {match, Blocks} = re:run(runbooks(), "```erlang\n(.*?)```", [global, dotall, {capture, [1], list}]),
    Expressions = lists:append([ expressions(Block) || [Block] <- Blocks ]),
    ?assert(length(Expressions) > 20),
    lists:foreach(fun(Expression) -> {value, _Value, _Bindings} = erl_eval:expr(Expression, []) end, Expressions),
    %% The application was stopped and started in between.
    ?assertEqual(self(), erlmcp_shard_registry:whereis_connection(<<"client-17">>)),
    ?assertMatch(#{mode := current}, erlmcp_rollout:status()),
    ok = gen_server:stop(Registry).


expressions(Block) ->
    [ begin
          {ok, Tokens, _} = erl_scan:string(Text ++ "."),
          {ok, [Expression]} = erl_parse:parse_exprs(Tokens),
          Expression
      end
      || Line <- string:split(Block, "\n", all),
         Text <- [string:trim(hd(string:split(Line, ".  ")), both, " .")],
         Text =/= "" ].


%% Messages are routed while every module is loaded anew, but the native one.
modules_are_reloaded_under_load(_Config) ->
    in_peer(in_reloaded).


in_reloaded() ->
    {ok, _} = application:ensure_all_started(erlmcp_native),
    Receiver = spawn_link(fun() -> receiver(0) end),
    ok = erlmcp_shard_registry:register_connection(reloaded, Receiver, #{}),
    ok = erlmcp_token_bucket:set_limits(reloaded, infinity),
    Self = self(),
    Sender = spawn_link(fun() -> send(Self, 0) end),
    {ok, Modules} = application:get_key(erlmcp_native, modules),
    lists:foreach(fun(Module) ->
                          %% Processes of the former code go on: none is killed, as code:purge/1 would.
                          true = code:soft_purge(Module),
                          {module, Module} = code:load_file(Module)
                  end,
                  Modules -- [erlmcp_nif]),
    Sender ! {stop, self()},
    Sent = receive {sent, Number} -> Number end,
    ?assert(Sent > 0),
    Receiver ! {stop, self()},
    ?assertEqual(Sent, receive {received, Received} -> Received end),
    await(fun() -> erlmcp_native:health() =:= ok end).


%% In order and without a gap, or it takes the test with it. A refused message is sent again, and is none.
send(To, Sent) ->
    receive
        {stop, To} ->
            To ! {sent, Sent},
            ok
    after
        0 ->
            case erlmcp_shard_manager:route_message(reloaded, {number, Sent + 1}) of
                ok -> send(To, Sent + 1);
                {error, shard_overloaded} -> send(To, Sent)
            end
    end.


receiver(Received) ->
    Next = Received + 1,
    receive
        {number, Number} when Number =:= Next -> receiver(Next);
        {number, Other} -> exit({expected, Next, Other});
        {stop, From} -> From ! {received, Received}
    end.


%% The VM refuses it, and the loaded library goes on.
the_native_module_is_not_reloaded(_Config) ->
    in_peer(in_native_reloaded).


in_native_reloaded() ->
    ok = erlmcp_shard_registry:register_connection(kept, self(), #{}),
    ?assertMatch({error, _}, code:load_file(erlmcp_nif)),
    ?assertEqual(none, erlmcp_nif:load_error()),
    ok = erlmcp_shard_manager:route_message(kept, hello),
    receive hello -> ok end,
    ok = erlmcp_shard_registry:unregister_connection(kept).


%%% Files and nodes


%% Not in this node: modules that are measured for coverage would be replaced, and settings changed.
in_peer(Function) ->
    ok = test_support:in_peer(?MODULE, Function, [], #{}).


rules() ->
    read("docs/monitoring/alerts.yml").


runbooks() ->
    read("docs/runbooks.md").


read(Name) ->
    {ok, Text} = file:read_file(filename:join(test_support:root(), Name)),
    Text.


run(Program, Arguments) ->
    Port = open_port({spawn_executable, Program},
                     [{args, Arguments}, {cd, filename:join(test_support:root(), "docs/monitoring")}, exit_status, stderr_to_stdout, binary]),
    output(Port, <<>>).


output(Port, Text) ->
    receive
        {Port, {data, More}} -> output(Port, <<Text/binary, More/binary>>);
        {Port, {exit_status, Status}} -> {Status, Text}
    end.
