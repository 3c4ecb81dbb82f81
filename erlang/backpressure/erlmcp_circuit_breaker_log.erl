%%% @private
%%% One line for each transition of a circuit breaker, and none for what it refuses.
-module(erlmcp_circuit_breaker_log).

-include_lib("kernel/include/logger.hrl").

-export([transition/2]).


%% @doc Logs the state that a breaker has just entered.
-spec transition(node | {name, term()}, closed | open | half_open) -> ok.
transition(Breaker, open) ->
    ?LOG_WARNING("circuit breaker~ts: open", [label(Breaker)], metadata(Breaker, circuit_opened));
transition(Breaker, closed) ->
    ?LOG_NOTICE("circuit breaker~ts: closed", [label(Breaker)], metadata(Breaker, circuit_closed));
transition(Breaker, half_open) ->
    ?LOG_NOTICE("circuit breaker~ts: half open", [label(Breaker)], metadata(Breaker, circuit_half_open)).


-spec label(node | {name, term()}) -> iolist().
label(node) -> " of the node";
label({name, Name}) -> io_lib:format(" ~tP", [Name, 20]).


-spec metadata(node | {name, term()}, atom()) -> map().
metadata(node, Event) -> #{domain => [erlmcp_native], event => Event};
metadata({name, Name}, Event) -> #{domain => [erlmcp_native], event => Event, breaker => Name}.
