%%% @private
%%% The application.
-module(host_app_app).

-behaviour(application).

-export([start/2, stop/1]).


-spec start(application:start_type(), []) -> {ok, pid()} | {error, term()}.
start(_Type, []) ->
    host_app_sup:start_link().


-spec stop(term()) -> ok.
stop(_State) ->
    ok.
