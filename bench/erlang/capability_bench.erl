%%% Terms that are shared: to read one, to hold its key, to create it, and what a removal costs the node.
%%%
%%% *Reads* are of a term of 1 KB and one of 50 KB, in one process, with the loop subtracted. Beside the store: a persistent term, an
%%% ETS table with `read_concurrency', the registry, the external term format of the term in an ETS table (all of it decoded, or a slice
%%% of the binary, which is not copied), and the registry with the key of the term as config.
%%%
%%% *Changes* are of the term of 50 KB. `hold and release' is of a key that another process holds.
%%%
%%% *Removals* of persistent terms are measured in VMs with many idle processes. Each term refers to a binary, whose memory tells when
%%% the VM has freed the term. The processor time is that of the whole VM, from the removal until then.
%%%
%%% *Holders* are processes that each hold one key, in a VM of their own.
-module(capability_bench).

-export([run/1]).
%% In the peers
-export([start_idle/1, remove/1, hold/1]).

-type work() :: nothing | get | persistent | ets | native | encoded | slice | by_key.
-type figures() :: #{{atom(), pos_integer()} => bench_rounds:figures()}.

-define(S,            erlmcp_capability_store).
-define(READS,        [get, persistent, ets, native, encoded, slice, by_key]).
-define(SIZES,        [1, 50]).
-define(CHANGES,      300).
-define(BINARY_BYTES, (16 bsl 20)).
-define(TOGETHER,     5).
-define(HOLDERS,      100_000).


-spec run(registry_bench:options()) -> [bench_report:row()].
run(#{rounds := Rounds, progress := Progress} = Options) ->
    Table = ets:new(?MODULE, [public, {read_concurrency, true}]),
    Holder = spawn_link(fun() -> receive stop -> ok end end),
    lists:foreach(fun(Kb) -> ok = store(Kb, term(Kb), Table, Holder) end, ?SIZES),
    Reads = [ {{Work, Kb}, fun() -> read(Work, Kb, Table) end} || Work <- ?READS, Kb <- ?SIZES ],
    Changes = [ {{Work, 50}, fun() -> change(Work) end} || Work <- [held, hold, create, create_equal, put] ],
    Figures = bench_rounds:interleave(Rounds, Reads ++ Changes, Progress),
    lists:foreach(fun(Kb) -> ok = forget(Kb) end, ?SIZES),
    true = ets:delete(Table),
    Holder ! stop,
    rows(Figures) ++ removals(Options) ++ holders(Progress).


%%% Reads


%% So many kilobytes on a heap, about.
-spec term(1 | 50) -> map().
term(50) -> bench_population:large_config();
term(1) -> maps:update_with(tools, fun(Tools) -> lists:sublist(Tools, 2) end, term(50)).


-spec store(pos_integer(), term(), ets:table(), pid()) -> ok.
store(Kb, Term, Table, Holder) ->
    {ok, Term} = ?S:get_or_create({?MODULE, Kb}, fun() -> Term end),
    ok = persistent_term:put({?MODULE, Kb}, Term),
    true = ets:insert(Table, [{{term, Kb}, Term}, {{encoded, Kb}, term_to_binary(Term)}]),
    ok = erlmcp_shard_registry:register_connection({term, Kb}, Holder, Term),
    erlmcp_shard_registry:register_connection({key, Kb}, Holder, {?MODULE, Kb}).


-spec forget(pos_integer()) -> ok.
forget(Kb) ->
    ok = ?S:release({?MODULE, Kb}),
    true = persistent_term:erase({?MODULE, Kb}),
    ok = erlmcp_shard_registry:unregister_connection({term, Kb}),
    erlmcp_shard_registry:unregister_connection({key, Kb}).


%% Nanoseconds for each read.
-spec read(work(), pos_integer(), ets:table()) -> float().
read(Work, Kb, Table) ->
    Reads = reads(Work, Kb),
    max(0.1, (elapsed(Work, Kb, Table, Reads) - elapsed(nothing, Kb, Table, Reads)) / Reads).


-spec reads(work(), pos_integer()) -> pos_integer().
reads(Work, 50) when Work =:= ets; Work =:= native; Work =:= encoded -> 1000;
reads(_Work, 1) -> 100_000;
reads(_Work, 50) -> 300_000.


-spec elapsed(work(), pos_integer(), ets:table(), pos_integer()) -> integer().
elapsed(Work, Kb, Table, Reads) ->
    Start = erlang:monotonic_time(),
    ok = loop(Work, {?MODULE, Kb}, {term, Kb}, {encoded, Kb}, {key, Kb}, Table, Reads),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond).


-spec loop(work(), term(), term(), term(), term(), ets:table(), non_neg_integer()) -> ok.
loop(_Work, _Key, _Term, _Encoded, _ById, _Table, 0) ->
    ok;
loop(Work, Key, Term, Encoded, ById, Table, Left) ->
    _ = case Work of
            nothing -> Key;
            get -> {ok, #{}} = ?S:get(Key);
            persistent -> #{} = persistent_term:get(Key);
            ets -> [{_, #{}}] = ets:lookup(Table, Term);
            native -> {ok, {_, #{}}} = erlmcp_shard_registry:lookup_connection(Term);
            encoded ->
                [{_, Binary}] = ets:lookup(Table, Encoded),
                #{} = binary_to_term(Binary);
            slice ->
                [{_, Binary}] = ets:lookup(Table, Encoded),
                binary:part(Binary, 100, 200);
            by_key ->
                {ok, {_, Found}} = erlmcp_shard_registry:lookup_connection(ById),
                {ok, #{}} = ?S:get(Found)
        end,
    loop(Work, Key, Term, Encoded, ById, Table, Left - 1).


%%% Changes


%% Nanoseconds for each.
-spec change(held | hold | create | create_equal | put) -> float().
change(held) ->
    Key = {?MODULE, 50},
    repeat(30_000, fun(_N) -> {ok, #{}} = ?S:get_or_create(Key, fun no_call/0) end);
change(hold) ->
    %% In a process that does not hold it.
    Key = {?MODULE, 50},
    bench_rounds:in_process(fun() ->
                                    repeat(3000,
                                           fun(_N) ->
                                                   {ok, #{}} = ?S:get_or_create(Key, fun no_call/0),
                                                   ok = ?S:release(Key)
                                           end)
                            end);
change(create) ->
    %% A few: no term of the store is removed while they are measured.
    bench_rounds:in_process(fun() ->
                                    Terms = fresh_terms(),
                                    repeat(length(Terms), fun(N) -> {ok, #{}} = ?S:get_or_create(N, fun() -> lists:nth(N, Terms) end) end)
                            end);
change(create_equal) ->
    Term = term(50),
    bench_rounds:in_process(fun() -> repeat(?CHANGES, fun(N) -> {ok, #{}} = ?S:get_or_create(N, fun() -> Term end) end) end);
change(put) ->
    Terms = fresh_terms(),
    Ns = repeat(length(Terms), fun(N) -> ok = persistent_term:put({?MODULE, put, N}, lists:nth(N, Terms)) end),
    _ = [ persistent_term:erase({?MODULE, put, N}) || N <- lists:seq(1, length(Terms)) ],
    Ns.


-spec fresh_terms() -> [map()].
fresh_terms() ->
    [ (term(50))#{version => erlang:unique_integer()} || _ <- lists:seq(1, 10) ].


-spec no_call() -> no_return().
no_call() ->
    error(not_held).


-spec repeat(pos_integer(), fun((pos_integer()) -> term())) -> float().
repeat(Times, Fun) ->
    Start = erlang:monotonic_time(),
    lists:foreach(Fun, lists:seq(1, Times)),
    erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond) / Times.


-spec rows(figures()) -> [bench_report:row()].
rows(Figures) ->
    Row = fun(Name, Work, Kb, OtherName, Other) ->
                  bench_report:time_row("capabilities",
                                        Name ++ ", " ++ integer_to_list(Kb) ++ " KB",
                                        map_get({Work, Kb}, Figures),
                                        OtherName,
                                        map_get({Other, Kb}, Figures))
          end,
    lists:append([ [Row("get/1", get, Kb, "persistent_term:get/1", persistent),
                    Row("get/1", get, Kb, "ets:lookup/2", ets),
                    Row("get/1", get, Kb, "lookup_connection/1", native),
                    Row("get/1", get, Kb, "ets:lookup/2, binary_to_term/1", encoded),
                    Row("get/1", get, Kb, "ets:lookup/2, slice of the binary", slice),
                    Row("lookup_connection/1 of a key, get/1", by_key, Kb, "lookup_connection/1 of the term", native)]
                   || Kb <- ?SIZES ]) ++
    [Row("get_or_create/2, held", held, 50, "get/1", get),
     Row("hold and release", hold, 50, "get/1", get),
     Row("get_or_create/2, new term", create, 50, "persistent_term:put/2", put),
     Row("get_or_create/2, new key, equal term", create_equal, 50, "persistent_term:put/2", put)].


%%% Removals


%% A million processes if this is the only part.
-spec removals(registry_bench:options()) -> [bench_report:row()].
removals(#{sections := Sections, sizes := Given, progress := Progress}) ->
    Sizes = case Given of
                default when Sections =:= [capabilities] -> [1000, 100_000, 1_000_000];
                default -> [1000, 100_000];
                _ -> Given
            end,
    lists:append([ begin
                       Peer = bench_peer:start(),
                       ok = bench_peer:call(Peer, ?MODULE, start_idle, [Size]),
                       Removed = [ bench_peer:call(Peer, ?MODULE, remove, [Number]) || Number <- [1, 1, 1, ?TOGETHER] ],
                       ok = bench_peer:stop(Peer),
                       _ = Progress(),
                       removal_rows(Size, Removed)
                   end
                   || Size <- Sizes ]).


-spec removal_rows(pos_integer(), [{float(), float()}]) -> [bench_report:row()].
removal_rows(Size, Removed) ->
    {Alone, [{TogetherCpuMs, TogetherMs}]} = lists:split(3, Removed),
    {CpuMs, Ms} = lists:unzip(Alone),
    Row = fun(Name, Figures, Together) ->
                  bench_report:growth(
                    bench_report:size_row("capabilities",
                                          Name ++ ", " ++ bench_report:thousands(Size) ++ " processes",
                                          bench_rounds:median(Figures),
                                          "ms",
                                          "each of " ++ integer_to_list(?TOGETHER) ++ " at once",
                                          Together / ?TOGETHER))
          end,
    [Row("removal, processor time", CpuMs, TogetherCpuMs), Row("removal, until freed", Ms, TogetherMs)].


-spec start_idle(pos_integer()) -> ok.
start_idle(Number) ->
    Parent = self(),
    _ = spawn(fun() ->
                      _ = [ spawn(fun() -> receive stop -> ok end end) || _ <- lists:seq(1, Number) ],
                      Parent ! started,
                      receive stop -> ok end
              end),
    receive started -> ok end.


%% Removes so many terms one after the other. Milliseconds of processor time, and until all are freed.
-spec remove(pos_integer()) -> {float(), float()}.
remove(Number) ->
    Before = erlang:memory(binary),
    bench_rounds:in_process(fun() ->
                                    _ = [ persistent_term:put({?MODULE, N}, {term(50), binary:copy(<<N>>, ?BINARY_BYTES)})
                                          || N <- lists:seq(1, Number) ],
                                    ok
                            end),
    true = erlang:memory(binary) >= Before + Number * ?BINARY_BYTES - ?BINARY_BYTES div 2,
    {RuntimeMs, _} = erlang:statistics(runtime),
    Start = erlang:monotonic_time(),
    _ = [ true = persistent_term:erase({?MODULE, N}) || N <- lists:seq(1, Number) ],
    ok = await_freed(Before + ?BINARY_BYTES div 2),
    Ms = bench_report:seconds(erlang:monotonic_time() - Start) * 1000,
    {LaterMs, _} = erlang:statistics(runtime),
    {float(LaterMs - RuntimeMs), Ms}.


-spec await_freed(non_neg_integer()) -> ok.
await_freed(Bytes) ->
    case erlang:memory(binary) =< Bytes of
        true ->
            ok;
        false ->
            ok = timer:sleep(1),
            await_freed(Bytes)
    end.


%%% Holders


-spec holders(fun(() -> term())) -> [bench_report:row()].
holders(Progress) ->
    Peer = bench_peer:start(),
    {Ns, Bytes} = bench_peer:call(Peer, ?MODULE, hold, [?HOLDERS]),
    ok = bench_peer:stop(Peer),
    _ = Progress(),
    Of = " of " ++ bench_report:thousands(?HOLDERS),
    [bench_report:size_row("capabilities", "a hold" ++ Of ++ ", one after the other", Ns / 1000, "us", none, none),
     bench_report:size_row("capabilities", "memory of a holder" ++ Of, Bytes, "B", none, none)].


%% Nanoseconds for each process that becomes a holder, and bytes of its hold.
-spec hold(pos_integer()) -> {float(), float()}.
hold(Number) ->
    Term = term(50),
    {ok, _} = ?S:get_or_create(?MODULE, fun() -> Term end),
    Parent = self(),
    Pids = [ spawn_link(fun() ->
                                receive hold -> ok end,
                                {ok, #{}} = ?S:get_or_create(?MODULE, fun no_call/0),
                                Parent ! held,
                                receive stop -> ok end
                        end)
             || _ <- lists:seq(1, Number) ],
    Before = allocated(),
    Start = erlang:monotonic_time(),
    lists:foreach(fun(Pid) ->
                          Pid ! hold,
                          receive held -> ok end
                  end,
                  Pids),
    Ns = erlang:convert_time_unit(erlang:monotonic_time() - Start, native, nanosecond),
    {Ns / Number, (allocated() - Before) / Number}.


%% Resident memory tells less: the heaps of the holders shrink by the collection.
-spec allocated() -> non_neg_integer().
allocated() ->
    _ = [ erlang:garbage_collect(Pid) || Pid <- processes() ],
    erlang:memory(total).
