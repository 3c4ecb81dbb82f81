%%% @doc Terms that many processes read and none changes: capabilities of servers, lists of tools. Equal terms are kept once in the
%%% node, and are read without a copy.
%%%
%%% ```
%%% {ok, Tools} = erlmcp_capability_store:get_or_create({tools, <<"weather">>}, fun() -> read_tools(<<"weather">>) end),
%%% {ok, Tools} = erlmcp_capability_store:get({tools, <<"weather">>}),    % in any process
%%% ok = erlmcp_capability_store:release({tools, <<"weather">>}).
%%% '''
%%%
%%% == Keys and holders ==
%%% A key exists while at least one process holds it. {@link get_or_create/2} makes the calling process a holder, once however
%%% often it is called; {@link release/1} and the exit of the process end that. With its last holder a key is gone: {@link get/1}
%%% returns `{error, not_found}', and the next {@link get_or_create/2} calls its fun.
%%%
%%% Only a process that keeps the term has to hold the key: the process of a server, for example. Connections that read the
%%% term, use it and drop it call {@link get/1}.
%%%
%%% == Terms ==
%%% A term is a <em>persistent term</em> of the VM. Keys with equal terms (`=:=') share one. The removal of a persistent term makes the VM
%%% schedule every process of the node, to look for references to it; a process that has one gets a copy on its heap. That costs
%%% some 1 to 2 microseconds of processor time for each process and each removed term, and hardly less if several are removed
%%% together (`./bench/run --only capabilities'). So a term that no key has any more stays, and is used again when an equal one is
%%% created. Such terms are removed only while the store is more than half full, the one that has been unused for longest first: one in
%%% a second, or in 0.2 ms for each process of the node if that is longer (200 s with a million processes). That bounds the
%%% cost to about one percent of one processor, however fast terms change.
%%%
%%% A removal is safe for a process that still refers to the term. It is dear if many do: each gets a copy of its own. Therefore a
%%% process that keeps the term in its state should hold the key.
%%%
%%% == Bounds ==
%%% The key `capability_store' of the configuration: `max_terms' (1,000) and `max_bytes' (64 MiB) of all terms together, unused ones
%%% included. One term has at most 1 MiB, a key at most 65,535 bytes, and a process holds at most 1,000 keys. Bytes are those of the
%%% heap, counted without sharing, and those of the binaries that the term refers to, each of them whole; what a bit string of
%%% less than eight bits refers to is not counted.
%%%
%%% == Consistency ==
%%% Each function is atomic on its key. The fun of {@link get_or_create/2} runs in its caller and holds no lock: it may raise, be
%%% killed, or call the store. Where several processes create one key at the same time the fun may run in each of them. The first
%%% result counts, and all get that one.
%%%
%%% One process makes all changes. {@link get/1} does not need it. If it is killed, keys, holders and terms stay, and its
%%% successor goes on with them. When the application stops, all keys and terms are removed: a process that still refers to a
%%% term gets a copy.
%%%
%%% == Cost ==
%%% {@link get/1}: a look-up in an ETS table and one of a persistent term, whatever the size of the term. {@link get_or_create/2} of a key that
%%% the caller holds: one more look-up, which copies the keys that the caller holds. Of another key that exists, and {@link release/1}: a call of a process. For a new key the fun's result is
%%% walked, hashed and compared in the caller; a term without an equal one in the store is copied twice. A holder takes some 250 bytes (`./bench/run --only capabilities').
%%%
%%% It works without the native library too.
-module(erlmcp_capability_store).

-behaviour(gen_server).

-compile({no_auto_import, [get/1]}).

-export([get_or_create/2, get/1, release/1, info/0]).
%% The application
-export([new/0, start_link/0, erase/0]).
%% gen_server
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).
%% Explanations of errors
-export([format_error/2]).

-export_type([info/0]).

-type key() :: term().
%% The key of a persistent term, whose value is `{ok, Term}'.
-type name() :: {?MODULE, Hash :: non_neg_integer(), Number :: non_neg_integer()}.
-type info() :: #{
                  keys := non_neg_integer(),
                  holders := non_neg_integer(),
                  terms := non_neg_integer(),
                  unused_terms := non_neg_integer(),
                  bytes := non_neg_integer(),
                  max_terms := pos_integer(),
                  max_bytes := pos_integer()
                 }.
-type refusal() :: full | term_too_large | not_running.

%% {key(), name(), Holders :: non_neg_integer()}
-define(KEYS, erlmcp_capability_store_keys).
%% {pid(), Monitor :: reference(), [key(), ...]}
-define(HOLDERS, erlmcp_capability_store_holders).
%% {name(), bytes(), Keys :: non_neg_integer(), UnusedSinceMs :: integer()}. Ordered, so that those of one hash are
%% neighbours.
-define(TERMS, erlmcp_capability_store_terms).

-define(MOST_TERM_BYTES, (1 bsl 20)).
-define(MOST_KEY_BYTES,  65_535).
%% A process has them in one row, which is copied by each change.
-define(MOST_KEYS, 1000).
-define(HASHES,    (1 bsl 32)).

%% A removal takes 1 to 2 microseconds for each process.
-define(LEAST_REMOVAL_MS,     1000).
-define(PROCESSES_FOR_ONE_MS, 5).

-record(state, {
          %% Of all terms.
          bytes :: non_neg_integer(),
          %% Whether a removal is due later.
          removes = false :: boolean()
         }).

%%% Users


%% @doc The term of a key, which the calling process holds from now on. A key that does not exist gets the fun's result.
%%
%% <ul>
%% <li>`{error, full}': the store has no room for a new term now. The fun's result is not kept</li>
%% <li>`{error, term_too_large}': the fun's result has more than 1 MiB</li>
%% <li>`{error, not_running}': the application does not run, or the store's process has just been killed. The caller may be a
%% holder in that case</li>
%% </ul>
%%
%% An exception of the fun is raised in the caller, and nothing is kept. Raises `badarg' for anything but a fun without
%% arguments, and for a key of more than 65,535 bytes; `system_limit' for a process that holds 1,000 keys already.
-spec get_or_create(Key :: term(), fun(() -> Term)) -> {ok, Term} | {error, refusal()}.
get_or_create(Key, Fun) when is_function(Fun, 0) ->
    case is_held(Key) orelse hold_or_create(Key, Fun) of
        true -> read(Key);
        ok -> read(Key);
        {error, _} = Error -> Error;
        Raised -> error(Raised, [Key, Fun], [{error_info, #{module => ?MODULE}}])
    end;
get_or_create(Key, Fun) ->
    error(badarg, [Key, Fun], [{error_info, #{module => ?MODULE}}]).


-spec hold_or_create(key(), fun(() -> term())) -> ok | badarg | system_limit | {error, refusal()}.
hold_or_create(Key, Fun) ->
    case bytes(Key, ?MOST_KEY_BYTES) of
        too_large ->
            badarg;
        _Bytes ->
            case request({hold, Key}) of
                missing -> create(Key, Fun());
                Reply -> Reply
            end
    end.


-spec create(key(), term()) -> ok | system_limit | {error, refusal()}.
create(Key, Term) ->
    case bytes(Term, ?MOST_TERM_BYTES) of
        too_large -> {error, term_too_large};
        Bytes -> create(Key, Term, erlang:phash2(Term, ?HASHES), Bytes)
    end.


%% Only a new term is sent to the process.
-spec create(key(), term(), non_neg_integer(), non_neg_integer()) -> ok | system_limit | {error, refusal()}.
create(Key, Term, Hash, Bytes) ->
    case equal(Term, Hash) of
        none ->
            request({create, Key, Term, Hash, Bytes});
        Name ->
            case request({share, Key, Name}) of
                %% The equal term was removed.
                missing -> request({create, Key, Term, Hash, Bytes});
                Reply -> Reply
            end
    end.


%% Of a key that the caller holds.
-spec read(key()) -> {ok, term()} | {error, not_running}.
read(Key) ->
    case get(Key) of
        {ok, _} = Found -> Found;
        {error, not_found} -> {error, not_running}
    end.


%% @doc The term of a key. It is not copied: all processes get the same term.
-spec get(Key :: term()) -> {ok, Term :: term()} | {error, not_found}.
get(Key) ->
    try
        persistent_term:get(ets:lookup_element(?KEYS, Key, 2))
    catch
        %% No such key, or no table. Or the key was released in between, and its term removed.
        error:badarg -> {error, not_found}
    end.


%% @doc Ends the hold of the calling process on a key.
-spec release(Key :: term()) -> ok | {error, not_held | not_running}.
release(Key) ->
    request({release, Key}).


%% @doc The number of keys, of processes that hold any, of terms and, of these, of unused ones; the bytes of all terms, and the
%% bounds in force. Costs in proportion to the terms, and waits for no process.
-spec info() -> info().
info() ->
    Rows = try
               ets:tab2list(?TERMS)
           catch
               error:badarg -> []
           end,
    maps:merge(erlmcp_native_config:capability_store(),
               #{
                 keys => size_of(?KEYS),
                 holders => size_of(?HOLDERS),
                 terms => length(Rows),
                 unused_terms => length([ unused || {_, _, 0, _} <- Rows ]),
                 bytes => bytes_of(Rows)
                }).


-spec size_of(atom()) -> non_neg_integer().
size_of(Table) ->
    case ets:info(Table, size) of
        undefined -> 0;
        Size -> Size
    end.


-spec bytes_of([tuple()]) -> non_neg_integer().
bytes_of(Rows) ->
    lists:sum([ Bytes || {_, Bytes, _, _} <- Rows ]).


-spec is_held(key()) -> boolean().
is_held(Key) ->
    try
        lists:member(Key, ets:lookup_element(?HOLDERS, self(), 3))
    catch
        error:badarg -> false
    end.


-spec request(term()) -> ok | missing | system_limit | {error, refusal() | not_held}.
request(Request) ->
    try
        gen_server:call(?MODULE, Request, infinity)
    catch
        %% Not started, or it exited before it replied.
        exit:{_, {gen_server, call, _}} -> {error, not_running}
    end.


%%% Terms


%% The name of an equal term.
-spec equal(term(), non_neg_integer()) -> name() | none.
equal(Term, Hash) ->
    try
        equal({ok, Term}, Hash, {?MODULE, Hash, 0})
    catch
        %% No table any more.
        error:badarg -> none
    end.


-spec equal({ok, term()}, non_neg_integer(), name()) -> name() | none.
equal(Value, Hash, Before) ->
    case ets:next(?TERMS, Before) of
        {?MODULE, Hash, _} = Name ->
            case persistent_term:get(Name, removed) =:= Value of
                true -> Name;
                false -> equal(Value, Hash, Name)
            end;
        _ ->
            none
    end.


%% The bytes of a term, or `too_large' after a walk of at most so many bytes: the VM's own functions count without
%% preemption, and for ever if a term shares enough of its parts.
-spec bytes(term(), pos_integer()) -> non_neg_integer() | too_large.
bytes(Term, Most) ->
    try
        Most - left(Term, Most)
    catch
        throw:too_large -> too_large
    end.


-spec left(term(), integer()) -> non_neg_integer().
left([Head | Tail], Left) ->
    left(Tail, left(Head, spend_words(2, Left)));
left(Tuple, Left) when is_tuple(Tuple) ->
    After = spend_words(1 + tuple_size(Tuple), Left),
    lists:foldl(fun left/2, After, tuple_to_list(Tuple));
left(Map, Left) when is_map(Map) ->
    %% Small maps are two arrays, large ones are trees: about 5 words for each pair.
    Words = case map_size(Map) of
                Size when Size =< 32 -> 4 + 2 * Size;
                Size -> 5 * Size
            end,
    maps:fold(fun(Key, Value, Sofar) -> left(Value, left(Key, Sofar)) end, spend_words(Words, Left), Map);
left(Binary, Left) when is_binary(Binary) ->
    Size = byte_size(Binary),
    case binary:referenced_byte_size(Binary) of
        %% On the heap. OTP 27 returns bits for these.
        Referenced when Size =< 64, Referenced =< 8 * Size -> spend_words(2 + (Size + 7) div 8, Left);
        Referenced -> spend_words(6, spend(Referenced, Left))
    end;
left(Bits, Left) when is_bitstring(Bits) ->
    %% What it refers to is known of whole bytes only.
    Whole = bit_size(Bits) div 8,
    <<Bytes:Whole/binary, _/bits>> = Bits,
    spend_words(8, left(Bytes, Left));
left(Integer, Left) when is_integer(Integer), Integer >= -(1 bsl 59), Integer < 1 bsl 59 ->
    Left;
left(Number, Left) when is_number(Number) ->
    spend_words(1, spend(erlang:external_size(Number), Left));
left(Fun, Left) when is_function(Fun) ->
    {env, Environment} = erlang:fun_info(Fun, env),
    left(Environment, spend_words(6, Left));
left(Term, Left) when is_atom(Term); Term =:= [] ->
    Left;
left(_PidPortOrReference, Left) ->
    spend_words(5, Left).


-spec spend_words(non_neg_integer(), integer()) -> non_neg_integer().
spend_words(Words, Left) ->
    spend(Words * 8, Left).


-spec spend(non_neg_integer(), integer()) -> non_neg_integer().
spend(Bytes, Left) when Bytes =< Left -> Left - Bytes;
spend(_Bytes, _Left) -> throw(too_large).


%%% The application


%% @private
%% Makes the tables, owned by the calling process.
-spec new() -> ok.
new() ->
    _ = ets:new(?KEYS, [named_table, public, {read_concurrency, true}]),
    _ = ets:new(?HOLDERS, [named_table, public, {read_concurrency, true}]),
    _ = ets:new(?TERMS, [named_table, public, ordered_set]),
    ok.


%% @private
%% Removes all persistent terms of the store. The process must not run.
-spec erase() -> ok.
erase() ->
    lists:foreach(fun({Name, _Value}) -> _ = persistent_term:erase(Name) end, persistent_terms()).


-spec persistent_terms() -> [{name(), {ok, term()}}].
persistent_terms() ->
    [ Entry || {{?MODULE, _Hash, _Number}, _Value} = Entry <- persistent_term:get() ].


%% @private
-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).


%%% The process that makes all changes


%% @private
%% Resumes after a predecessor that was killed, maybe in the middle of a change. Every change writes in such an order that a held
%% key has a row in `?KEYS', and a key has its term. The numbers of holders and keys are counted anew.
-spec init([]) -> {ok, #state{}, hibernate}.
init([]) ->
    Present = maps:from_list(persistent_terms()),
    _ = [ ets:delete(?TERMS, Name) || {Name, _, _, _} <- ets:tab2list(?TERMS), not is_map_key(Name, Present) ],
    Now = now_ms(),
    maps:foreach(fun(Name, {ok, Term}) ->
                         _ = ets:update_element(?TERMS, Name, [{3, 0}, {4, Now}]) orelse
                             ets:insert(?TERMS, {Name, bytes(Term, ?MOST_TERM_BYTES), 0, Now})
                 end,
                 Present),
    Keys = ets:foldl(fun({Key, Name, _}, Sofar) -> [{Key, Name} | Sofar] end, [], ?KEYS),
    lists:foreach(fun({Key, _}) -> true = ets:update_element(?KEYS, Key, {3, 0}) end, Keys),
    ok = ets:foldl(fun({Pid, _Monitor, Held}, ok) ->
                           true = ets:update_element(?HOLDERS, Pid, {2, monitor(process, Pid)}),
                           lists:foreach(fun(Key) -> _ = ets:update_counter(?KEYS, Key, {3, 1}) end, Held)
                   end,
                   ok,
                   ?HOLDERS),
    lists:foreach(fun({Key, Name}) ->
                          case ets:lookup_element(?KEYS, Key, 3) of
                              0 -> ets:delete(?KEYS, Key);
                              _ -> ets:update_counter(?TERMS, Name, {3, 1})
                          end
                  end,
                  Keys),
    {ok, remove_later(#state{bytes = bytes_of(ets:tab2list(?TERMS))}), hibernate}.


%% @private
-spec handle_call(term(), gen_server:from(), #state{}) ->
          {reply, ok | missing | system_limit | {error, not_held | unknown_request}, #state{}} |
          {reply, ok | system_limit | {error, full}, #state{}, hibernate}.
handle_call({hold, Key}, {Pid, _}, State) ->
    {reply, hold(Pid, Key, none), State};
handle_call({share, Key, Name}, {Pid, _}, State) ->
    Reply = case ets:member(?TERMS, Name) of
                true -> hold(Pid, Key, Name);
                false -> hold(Pid, Key, none)
            end,
    {reply, Reply, State};
handle_call({create, Key, Term, Hash, Bytes}, {Pid, _}, State) ->
    {Reply, Added} = case hold(Pid, Key, none) of
                         missing -> add(Pid, Key, Term, Hash, Bytes, State);
                         Held -> {Held, State}
                     end,
    %% The term is garbage on this heap.
    {reply, Reply, remove_later(Added), hibernate};
handle_call({release, Key}, {Pid, _}, State) ->
    {Monitor, Held} = holder(Pid),
    case lists:member(Key, Held) of
        true ->
            ok = keep(Pid, Monitor, lists:delete(Key, Held)),
            {reply, ok, drop([Key], State)};
        false ->
            {reply, {error, not_held}, State}
    end;
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.


%% @private
-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Message, State) ->
    {noreply, State}.


%% @private
-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({'DOWN', _Monitor, process, Pid, _Reason}, State) ->
    case ets:take(?HOLDERS, Pid) of
        [{Pid, _, Held}] -> {noreply, drop(Held, State)};
        [] -> {noreply, State}
    end;
handle_info(remove, State) ->
    {noreply, remove_later(remove_longest_unused(State#state{removes = false}))};
handle_info(_Message, State) ->
    {noreply, State}.


%% Makes a process a holder of a key. A key that does not exist gets the named term.
-spec hold(pid(), key(), name() | none) -> ok | missing | system_limit.
hold(Pid, Key, Name) ->
    {Monitor, Held} = holder(Pid),
    case lists:member(Key, Held) of
        true ->
            ok;
        %% Before a fun is run and its result is stored.
        false when length(Held) >= ?MOST_KEYS ->
            system_limit;
        false ->
            case ets:member(?KEYS, Key) of
                false when Name =:= none ->
                    missing;
                IsKey ->
                    IsKey orelse add_key(Key, Name),
                    ok = keep(Pid, Monitor, [Key | Held]),
                    _ = ets:update_counter(?KEYS, Key, {3, 1}),
                    ok
            end
    end.


-spec add_key(key(), name()) -> true.
add_key(Key, Name) ->
    _ = ets:update_counter(?TERMS, Name, {3, 1}),
    ets:insert(?KEYS, {Key, Name, 0}).


-spec holder(pid()) -> {reference() | none, [key()]}.
holder(Pid) ->
    case ets:lookup(?HOLDERS, Pid) of
        [{Pid, Monitor, Held}] -> {Monitor, Held};
        [] -> {none, []}
    end.


-spec keep(pid(), reference() | none, [key()]) -> ok.
keep(Pid, Monitor, []) ->
    true = demonitor(Monitor, [flush]),
    true = ets:delete(?HOLDERS, Pid),
    ok;
keep(Pid, none, Held) ->
    keep(Pid, monitor(process, Pid), Held);
keep(Pid, Monitor, Held) ->
    true = ets:insert(?HOLDERS, {Pid, Monitor, Held}),
    ok.


%% A process holds these keys no longer.
-spec drop([key()], #state{}) -> #state{}.
drop(Keys, State) ->
    Unused = [ Key || Key <- Keys, ets:update_counter(?KEYS, Key, {3, -1}) =:= 0 ],
    lists:foreach(fun(Key) ->
                          [{Key, Name, 0}] = ets:take(?KEYS, Key),
                          ets:update_counter(?TERMS, Name, {3, -1}) =:= 0 andalso
                          ets:update_element(?TERMS, Name, {4, now_ms()})
                  end,
                  Unused),
    case Unused of
        [] -> State;
        _ -> remove_later(State)
    end.


%% An equal term may have been added since the caller looked for one.
-spec add(pid(), key(), term(), non_neg_integer(), non_neg_integer(), #state{}) ->
          {ok | system_limit | {error, full}, #state{}}.
add(Pid, Key, Term, Hash, Bytes, #state{bytes = Before} = State) ->
    case equal(Term, Hash) of
        none ->
            #{max_terms := MaxTerms, max_bytes := MaxBytes} = erlmcp_native_config:capability_store(),
            case size_of(?TERMS) < MaxTerms andalso Before + Bytes =< MaxBytes of
                true ->
                    %% A number that has never been used: a reader may still have the name of a removed term.
                    Name = {?MODULE, Hash, erlang:unique_integer([positive])},
                    ok = persistent_term:put(Name, {ok, Term}),
                    true = ets:insert(?TERMS, {Name, Bytes, 0, now_ms()}),
                    {hold(Pid, Key, Name), State#state{bytes = Before + Bytes}};
                false ->
                    {{error, full}, State}
            end;
        Name ->
            {hold(Pid, Key, Name), State}
    end.


%%% Removal of unused terms


%% Sets the timer if there may be something to remove. Never two at a time, and a successor of a killed process waits anew.
-spec remove_later(#state{}) -> #state{}.
remove_later(#state{removes = true} = State) ->
    State;
remove_later(State) ->
    case is_half_full(State) andalso ets:match(?TERMS, {'$1', '_', 0, '_'}, 1) of
        {_, _} ->
            PauseMs = max(?LEAST_REMOVAL_MS, erlang:system_info(process_count) div ?PROCESSES_FOR_ONE_MS),
            _ = erlang:send_after(PauseMs, self(), remove),
            State#state{removes = true};
        _ ->
            State
    end.


-spec remove_longest_unused(#state{}) -> #state{}.
remove_longest_unused(#state{bytes = Before} = State) ->
    Unused = case is_half_full(State) of
                 true -> ets:select(?TERMS, [{{'$1', '$2', 0, '$3'}, [], [{{'$3', '$1', '$2'}}]}]);
                 false -> []
             end,
    case lists:sort(Unused) of
        [] ->
            State;
        [{_UnusedSinceMs, Name, Bytes} | _] ->
            true = ets:delete(?TERMS, Name),
            true = persistent_term:erase(Name),
            State#state{bytes = Before - Bytes}
    end.


-spec is_half_full(#state{}) -> boolean().
is_half_full(#state{bytes = Bytes}) ->
    #{max_terms := MaxTerms, max_bytes := MaxBytes} = erlmcp_native_config:capability_store(),
    size_of(?TERMS) * 2 > MaxTerms orelse Bytes * 2 > MaxBytes.


-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).


%%% Errors


%% @private
%% For the shell and for crash reports, as in {@link erlang:error/3}.
-spec format_error(term(), [tuple()]) -> #{pos_integer() => string()}.
format_error(badarg, [{?MODULE, get_or_create, [_Key, Fun], _Info} | _]) when is_function(Fun, 0) ->
    #{1 => "a key of more than 65535 bytes"};
format_error(badarg, [{?MODULE, get_or_create, [_Key, _Fun], _Info} | _]) ->
    #{2 => "not a fun without arguments"};
format_error(system_limit, [{?MODULE, get_or_create, [_Key, _Fun], _Info} | _]) ->
    #{general => "the process holds 1000 keys already; release some, or hold them in several processes"};
format_error(_Reason, _Stacktrace) ->
    #{}.
