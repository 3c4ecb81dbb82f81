%%% @doc A registry of connections of one's own that has a name and a place under a supervisor, and its OTP `via' names.
%%%
%%% ```
%%% %% In the init/1 of a supervisor:
%%% erlmcp_named_registry:child_spec(#{name => sessions, max_entries => 100_000})
%%% %% Names in that registry:
%%% gen_server:start_link({via, erlmcp_named_registry, {sessions, <<"client-17">>}}, session, [], [])
%%% '''
%%%
%%% A process owns the registry; it answers no calls, and no look-up passes it. The registry ends with it, and a
%%% restart begins with an empty one: put it before the processes that it names, in a supervisor with the strategy
%%% `rest_for_one'. All functions of {@link erlmcp_shard_registry} take the registry, from {@link registry/1}, as their first
%%% argument.
%%%
%%% A registered process of another node costs a small local process, which stays until that process exits or is
%%% unregistered, also when the registry has ended.
%%%
%%% == Cost ==
%%% Each function reads an ETS table, and then makes one native call.
-module(erlmcp_named_registry).
-behaviour(gen_server).

%% Under a supervisor
-export([child_spec/1, start_link/1]).
%% The registry
-export([registry/1]).
%% OTP `via' names
-export([register_name/2, unregister_name/1, whereis_name/1, send/2]).
%% gen_server
-export([init/1, handle_call/3, handle_cast/2]).

-export_type([options/0, name/0]).

%% `name' is required; the others are those of {@link erlmcp_shard_registry:new/1}. Or a property list or keyword list.
-type options() :: #{
                     name := atom(),
                     shards => pos_integer(),
                     max_entries => pos_integer(),
                     max_id_bytes => pos_integer()
                    } |
                   [{atom(), term()}].
%% A registry, and an id in it.
-type name() :: {Registry :: atom(), Id :: term()}.


%% @doc The specification of a permanent child, for a supervisor. Raises what {@link start_link/1} raises.
-spec child_spec(options()) -> supervisor:child_spec().
child_spec(Options) ->
    {Name, _Limits} = checked(Options),
    #{id => Name, start => {?MODULE, start_link, [Options]}}.


%% @doc Starts the process that owns a new registry, and is registered locally under its name. The name is also that of an
%% ETS table. Raises `{bad_option, Key, Value, Expected}'.
-spec start_link(options()) -> {ok, pid()} | {error, {already_started, pid()} | term()}.
start_link(Options) ->
    {Name, Limits} = checked(Options),
    gen_server:start_link({local, Name}, ?MODULE, {Name, Limits}, []).


-spec checked(options() | term()) -> {atom(), map()}.
checked(Options) ->
    case erlmcp_native_config:to_map(Options) of
        #{name := Name} = Map when is_atom(Name), Name =/= undefined ->
            Limits = maps:remove(name, Map),
            case erlmcp_native_config:registry_limits(Limits) of
                {ok, _} -> {Name, Limits};
                {error, Reason} -> error(Reason)
            end;
        #{} = Map ->
            error({bad_option, name, maps:get(name, Map, undefined), "an atom other than undefined"});
        _ ->
            error({bad_option, options, Options, erlmcp_native_config:map_expected()})
    end.


%% @doc The registry of a name, for the functions of {@link erlmcp_shard_registry}. It can be used until the registry's
%% process exits; whoever keeps it longer keeps a registry that the name no longer leads to. Raises `{no_registry, Name}'.
-spec registry(atom()) -> erlmcp_shard_registry:registry().
registry(Name) ->
    case find(Name) of
        none -> error({no_registry, Name});
        Registry -> Registry
    end.


-spec find(atom()) -> erlmcp_shard_registry:registry() | none.
find(Name) ->
    try
        ets:lookup_element(Name, ?MODULE, 2)
    catch
        error:badarg -> none
    end.


%%% OTP `via' names


%% @doc Registers a name; `no' if a process that is alive has it. Exits with `registry_full' if the registry is full.
%% Raises `{no_registry, Registry}'.
-spec register_name(name(), pid()) -> yes | no.
register_name({Registry, Id}, Pid) ->
    erlmcp_shard_registry:register_name(registry(Registry), Id, Pid).


%% @doc Removes a name; `ok' also if there is none, or no such registry.
-spec unregister_name(name()) -> ok.
unregister_name({Name, Id}) ->
    case find(Name) of
        none -> ok;
        Registry -> erlmcp_shard_registry:unregister_name(Registry, Id)
    end.


%% @doc The process that has a name; never a process of this node that has exited. `undefined' also if there is no such
%% registry.
-spec whereis_name(name()) -> pid() | undefined.
whereis_name({Name, Id}) ->
    case find(Name) of
        none -> undefined;
        Registry -> erlmcp_shard_registry:whereis_name(Registry, Id)
    end.


%% @doc Sends a message to the process that has a name and returns the process. Exits with `{badarg, {Name, Message}}' if
%% there is none.
-spec send(name(), term()) -> pid().
send(Name, Message) ->
    case whereis_name(Name) of
        undefined ->
            exit({badarg, {Name, Message}});
        Pid ->
            Pid ! Message,
            Pid
    end.


%%% gen_server


%% @private
%% The registry is in a table, so that look-ups need no message, and so that it goes with this process.
-spec init({atom(), map()}) -> {ok, ets:table()} | {stop, term()}.
init({Name, Limits}) ->
    try ets:new(Name, [named_table, protected, {read_concurrency, true}]) of
        Table ->
            true = ets:insert(Table, {?MODULE, erlmcp_shard_registry:new(Limits)}),
            {ok, Table}
    catch
        error:badarg -> {stop, {ets_table_exists, Name}}
    end.


%% @private
-spec handle_call(term(), gen_server:from(), ets:table()) -> {reply, {error, unknown_request}, ets:table()}.
handle_call(_Request, _From, Table) ->
    {reply, {error, unknown_request}, Table}.


%% @private
-spec handle_cast(term(), ets:table()) -> {noreply, ets:table()}.
handle_cast(_Message, Table) ->
    {noreply, Table}.
