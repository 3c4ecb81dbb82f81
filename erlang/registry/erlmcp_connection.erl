%%% @doc A process for one connection: registered, small while it is idle, and with a state that is built when it is first
%%% used.
%%%
%%% Most connections of a node wait. A process of this module registers itself with {@link erlmcp_shard_registry} and then
%%% hibernates. The first message wakes it: it calls `init/1' of a `gen_server' callback module, and from then on it is that
%%% `gen_server', which handles this message and all others. It hibernates again when it has received nothing for some time.
%%%
%%% ```
%%% %% In the init/1 of a supervisor:
%%% {ok, {#{strategy => simple_one_for_one}, [#{id => session, start => {erlmcp_connection, start_link, []}, restart => temporary}]}}.
%%%
%%% {ok, _} = supervisor:start_child(Sessions, [#{id => <<"client-17">>, module => session, args => Socket}]).
%%% ok = erlmcp_shard_manager:route_message(<<"client-17">>, hello).    % session:init(Socket), session:handle_info(hello, State)
%%% '''
%%%
%%% A `gen_server' that one writes needs nothing of this but `{hibernate_after, Ms}', the options of {@link
%%% erlmcp_process:spawn_opts/1}, and {@link erlmcp_shard_registry:register_connection/3} in its `init/1': its state is built
%%% at the start then.
%%%
%%% == First use ==
%%% Every message is a use, a system message or a call too. `init/1' may return what that of a `gen_server' may. Nobody waits
%%% for it: a process that it stops exits, with the reason of `{stop, Reason}' or `{error, Reason}', or with `normal' for
%%% `ignore', and the messages in its mailbox are lost.
%%%
%%% == Exit ==
%%% The connection leaves the registry when the process exits. A supervisor that restarts it gets the id at the first try.
%%% Before its first use the process does not trap exits, and `terminate/2' is not called.
%%%
%%% == Cost ==
%%% A start costs a process and a registration. An idle connection takes about 2 KB, registration included (`./bench/run
%%% --memory'). The messages to a process in use pass nothing of this module.
-module(erlmcp_connection).

%% Under a supervisor
-export([child_spec/1, start_link/1]).
%% The process
-export([init_it/5, use/3]).

-export_type([options/0]).

%% Or a property list or keyword list. `id' and `module' are required.
-type options() :: #{
                     id := term(),
                     module := module(),
                     args => term(),
                     capabilities => term(),
                     registry => erlmcp_shard_registry:registry(),
                     profile => erlmcp_process:profile(),
                     hibernate_after_ms => timeout()
                    } |
                   [{atom(), term()}].

-define(DEFAULTS, #{
                    args => [],
                    capabilities => undefined,
                    registry => default,
                    profile => idle,
                    hibernate_after_ms => 1000
                   }).
-define(MAX_MS,   16#ffffffff).


%% @doc The specification of a permanent child, for a supervisor. Raises `{bad_option, Key, Value, Expected}'.
-spec child_spec(options()) -> supervisor:child_spec().
child_spec(Options) ->
    #{id := Id, module := Module} = checked(Options),
    #{id => Id, start => {?MODULE, start_link, [Options]}, modules => [Module]}.


%% @doc Starts a process and registers it as a connection. Returns when it is registered.
%%
%% <ul>
%% <li>`id': of the connection</li>
%% <li>`module', `args': `Module:init(Args)' builds the state. `args' is `[]' by default, and is copied to the process</li>
%% <li>`capabilities': what {@link erlmcp_shard_registry:lookup_connection/1} returns (`undefined')</li>
%% <li>`registry': the default one, or one from {@link erlmcp_shard_registry:new/1}</li>
%% <li>`profile': see {@link erlmcp_process:spawn_opts/1} (`idle')</li>
%% <li>`hibernate_after_ms': how long the process waits for a message before it hibernates, in milliseconds (1000), or
%% `infinity'</li>
%% </ul>
%%
%% `{error, {already_started, Pid}}': the id is that of a process that is alive. `{error, registry_full}': see {@link
%% erlmcp_shard_registry:register_connection/4}. Raises `{bad_option, Key, Value, Expected}', and `badarg' for an id that no
%% connection may have or a registry that does not exist.
-spec start_link(options()) -> {ok, pid()} | {error, {already_started, pid()} | registry_full | term()}.
start_link(Options) ->
    #{
      id := Id,
      module := Module,
      args := Args,
      capabilities := Capabilities,
      registry := Registry,
      profile := Profile,
      hibernate_after_ms := Ms
     } = checked(Options),
    %% A wrong id or registry, and a missing native library, are errors of the caller and not of the new process.
    _ = erlmcp_shard_registry:get_shard_id(Registry, Id),
    Start = [self(), Registry, Id, Capabilities, [Module, Args, Ms]],
    %% Not linked before it is registered: a caller that traps exits would get the exit of a process that it never had.
    proc_lib:start(?MODULE, init_it, Start, infinity, erlmcp_process:spawn_opts(Profile)).


-spec checked(options() | term()) -> map().
checked(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{id := _, module := _} = Map ->
            ok = maps:foreach(fun check_option/2, Map),
            maps:merge(?DEFAULTS, Map);
        #{id := _} ->
            error({bad_option, module, undefined, "a gen_server callback module"});
        #{} ->
            error({bad_option, id, undefined, "the id of a connection"});
        _ ->
            error({bad_option, options, Options, erlmcp_native_config:map_expected()})
    end.


-spec check_option(term(), term()) -> ok.
check_option(Key, _Any) when Key =:= id; Key =:= args; Key =:= capabilities ->
    ok;
check_option(module, Module) ->
    is_server(Module) orelse error({bad_option, module, Module, "a gen_server callback module"}),
    ok;
check_option(registry, Registry) when Registry =:= default; is_reference(Registry) ->
    ok;
check_option(registry, Other) ->
    error({bad_option, registry, Other, "default, or what erlmcp_shard_registry:new/1 returns"});
check_option(profile, Profile) ->
    _ = erlmcp_process:spawn_opts(Profile),
    ok;
check_option(hibernate_after_ms, infinity) ->
    ok;
check_option(hibernate_after_ms, Ms) when is_integer(Ms), Ms >= 0, Ms =< ?MAX_MS ->
    ok;
check_option(hibernate_after_ms, Other) ->
    error({bad_option, hibernate_after_ms, Other, "an integer from 0 to 4294967295, or infinity"});
check_option(Key, Value) ->
    error({bad_option, Key, Value, "the keys id, module, args, capabilities, registry, profile and hibernate_after_ms"}).


-spec is_server(term()) -> boolean().
is_server(Module) ->
    is_atom(Module) andalso
    (erlang:function_exported(Module, init, 1) orelse
     %% Not loaded yet.
     code:ensure_loaded(Module) =:= {module, Module} andalso erlang:function_exported(Module, init, 1)).


%%% The process


%% @private
-spec init_it(pid(), erlmcp_shard_registry:registry(), term(), term(), [term()]) -> ok.
init_it(Parent, Registry, Id, Capabilities, [Module | _] = Unused) ->
    %% For crash reports and the observer, as that of a gen_server.
    _ = put('$initial_call', {Module, init, 1}),
    case erlmcp_shard_registry:register_or_find_connection(Registry, Id, self(), Capabilities) of
        {registered, _} ->
            true = link(Parent),
            ok = proc_lib:init_ack({ok, self()}),
            proc_lib:hibernate(?MODULE, use, Unused);
        {found, {Pid, _}} ->
            proc_lib:init_ack({error, {already_started, Pid}});
        {error, registry_full} = Full ->
            proc_lib:init_ack(Full)
    end.


%% @private
%% Runs when the first message is in the mailbox.
-spec use(module(), term(), timeout()) -> no_return().
use(Module, Args, HibernateAfterMs) ->
    Options = [{hibernate_after, HibernateAfterMs}],
    %% A gen_server takes what is thrown for the result.
    Result = try
                 Module:init(Args)
             catch
                 throw:Thrown -> Thrown
             end,
    case Result of
        {ok, State} -> gen_server:enter_loop(Module, Options, State);
        {ok, State, Next} -> gen_server:enter_loop(Module, Options, State, self(), Next);
        {stop, Reason} -> exit(Reason);
        {error, Reason} -> exit(Reason);
        ignore -> exit(normal);
        Other -> exit({bad_return_value, Other})
    end.
