%%% @private
%%% The supervisors, in erlmcp's shape: at the top `one_for_all' with the registry first, below it
%%% one for the servers, which are restarted, and one for the transports, which are not.
-module(host_app_sup).

-behaviour(supervisor).

-export([start_link/0, start_dynamic/3, start_child/2]).
-export([init/1]).

-type dynamic() :: host_app_server_sup | host_app_transport_sup.


-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    started(supervisor:start_link({local, ?MODULE}, ?MODULE, top)).


-spec start_dynamic(dynamic(), module(), supervisor:restart()) -> {ok, pid()} | {error, term()}.
start_dynamic(Name, Module, Restart) ->
    started(supervisor:start_link({local, Name}, ?MODULE, {dynamic, Module, Restart})).


-spec start_child(dynamic(), [term()]) -> {ok, pid()} | {error, term()}.
start_child(Name, Args) ->
    case supervisor:start_child(Name, Args) of
        {ok, Pid} when is_pid(Pid) -> {ok, Pid};
        {error, Reason} -> {error, Reason}
    end.


-spec init(top | {dynamic, module(), supervisor:restart()}) ->
          {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init(top) ->
    {ok, {#{strategy => one_for_all, intensity => 3, period => 60},
          [#{id => erlmcp_registry, start => {erlmcp_registry, start_link, []}},
           dynamic(host_app_server_sup, host_app_server, permanent),
           dynamic(host_app_transport_sup, host_app_transport, temporary)]}};
init({dynamic, Module, Restart}) ->
    {ok, {#{strategy => simple_one_for_one, intensity => 10, period => 1},
          [#{id => Module, start => {Module, start_link, []}, restart => Restart}]}}.


-spec dynamic(dynamic(), module(), supervisor:restart()) -> supervisor:child_spec().
dynamic(Name, Module, Restart) ->
    #{id => Name, start => {?MODULE, start_dynamic, [Name, Module, Restart]}, type => supervisor}.


-spec started(supervisor:startlink_ret()) -> {ok, pid()} | {error, term()}.
started({ok, Pid}) -> {ok, Pid};
started({error, Reason}) -> {error, Reason};
started(ignore) -> {error, ignore}.
