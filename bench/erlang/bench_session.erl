%%% A session of a client, as the callback module of a `gen_server': it decodes a request, changes its state, and encodes a
%%% response.
-module(bench_session).
-behaviour(gen_server).

-export([request/0, handled/1]).
%% gen_server
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-record(state, {
          handled = 0 :: non_neg_integer(),
          recent :: #{non_neg_integer() => {pos_integer(), Transport :: term()}}
         }).

-type state() :: #state{}.

%% The state takes about 1.3 KB.
-define(RECENT, 20).


%% A request of about 200 bytes. The external term format stands for JSON.
-spec request() -> binary().
request() ->
    term_to_binary(#{
                     <<"jsonrpc">> => <<"2.0">>,
                     <<"id">> => 17,
                     <<"method">> => <<"tools/call">>,
                     <<"params">> => #{
                                       <<"name">> => <<"get_weather">>,
                                       <<"arguments">> => #{<<"city">> => <<"Paris">>, <<"units">> => <<"metric">>},
                                       <<"_meta">> => #{<<"progressToken">> => <<"abcdef0123456789">>}
                                      }
                    }).


%% The number of requests that a session has handled. Returns when it has handled all that were sent before.
-spec handled(pid()) -> non_neg_integer().
handled(Session) ->
    gen_server:call(Session, handled, infinity).


-spec init(term()) -> {ok, state()}.
init(Transport) ->
    {ok, #state{recent = maps:from_list([ {N, {200, Transport}} || N <- lists:seq(0, ?RECENT - 1) ])}}.


-spec handle_call(handled, gen_server:from(), state()) -> {reply, non_neg_integer(), state()}.
handle_call(handled, _From, #state{handled = Handled} = State) ->
    {reply, Handled, State}.


-spec handle_cast(term(), state()) -> {noreply, state()}.
handle_cast(_Message, State) ->
    {noreply, State}.


-spec handle_info({mcp_message, term(), binary()}, state()) -> {noreply, state()}.
handle_info({mcp_message, Transport, Request}, #state{handled = Handled, recent = Recent} = State) ->
    #{<<"id">> := Id} = Decoded = binary_to_term(Request),
    Response = term_to_binary(#{<<"jsonrpc">> => <<"2.0">>, <<"id">> => Id, <<"result">> => Decoded}),
    {noreply, State#state{
                handled = Handled + 1,
                recent = Recent#{Handled rem ?RECENT => {byte_size(Response), Transport}}
               }}.
