%%% @private
%%% The settings in force, and the lock under which they are changed.
%%%
%%% The native layers, and the settings in force in them, outlive every process and the application. The settings
%%% and the lock have no owner process, so no exit removes them:
%%%
%%% <ul>
%%% <li>Each key has an array of atomics, referred to by a persistent term that is written once. (A replaced
%%% term makes the VM scan every process, a million of them on a large node, and adaptive
%%% controllers change settings all the time. An ETS table is deleted with its owner.)</li>
%%% <li>An array has two slots and a version. A writer fills the slot that readers do not use, then
%%% increments the version: readers see whole values, also where a writer was killed.</li>
%%% <li>The lock is a registered name. It is released when the process that has it exits, whatever the
%%% reason.</li>
%%% </ul>
-module(erlmcp_setting_store).

-export([serialised/1, read/1, write/2, clear/1]).
%% Process
-export([run/1]).

-define(LOCK,     erlmcp_setting_lock).
-define(ATTEMPTS, 3).
%% Words of eight bytes in a slot: most settings need some 40. A larger value gets a larger array.
-define(WORDS,   128).
-define(VERSION, 1).
-define(REF(Key), {?MODULE, Key}).


%% @doc Runs a fun while no other fun runs here, in a process of its own, so that the death of the caller does not
%% interrupt it. The fun must be idempotent: it is run again if that process is killed.
%%
%% The process has the group leader of `init', so that no application kills it when it stops.
-spec serialised(fun(() -> Result)) -> Result.
serialised(Fun) ->
    serialised(Fun, ?ATTEMPTS).


-spec serialised(fun(() -> Result), pos_integer()) -> Result.
serialised(Fun, Attempts) ->
    {Pid, Monitor} = spawn_monitor(?MODULE, run, [Fun]),
    receive
        {'DOWN', Monitor, process, Pid, {done, Result}} -> Result;
        {'DOWN', Monitor, process, Pid, {raised, Class, Reason, Stack}} -> erlang:raise(Class, Reason, Stack);
        {'DOWN', Monitor, process, Pid, _Killed} when Attempts > 1 -> serialised(Fun, Attempts - 1);
        {'DOWN', Monitor, process, Pid, Killed} -> exit(Killed)
    end.


%% @private
-spec run(fun(() -> term())) -> no_return().
run(Fun) ->
    true = group_leader(whereis(init), self()),
    ok = lock(),
    Outcome =
        try
            {done, Fun()}
        catch
            Class:Reason:Stack -> {raised, Class, Reason, Stack}
        end,
    exit(Outcome).


-spec lock() -> ok.
lock() ->
    try register(?LOCK, self()) of
        true -> ok
    catch
        error:badarg ->
            Monitor = monitor(process, ?LOCK),
            receive
                {'DOWN', Monitor, process, _Holder, _Reason} -> lock()
            end
    end.


%% @doc The value of a key; `none' if none was written.
-spec read(atom()) -> {ok, term()} | none.
read(Key) ->
    case persistent_term:get(?REF(Key), none) of
        none -> none;
        Ref -> read_slot(Ref, atomics:get(Ref, ?VERSION))
    end.


-spec read_slot(atomics:atomics_ref(), Version :: non_neg_integer()) -> {ok, term()} | none.
read_slot(_Ref, 0) ->
    none;
read_slot(Ref, Version) ->
    First = first_word(Version, slot_words(Ref)),
    Size = atomics:get(Ref, First),
    Words = << <<(atomics:get(Ref, First + N)):64>> || N <- lists:seq(1, words(Size)) >>,
    case atomics:get(Ref, ?VERSION) of
        Version ->
            %% A writer enters this slot only after the next version has been written.
            <<Binary:Size/binary, _/binary>> = Words,
            binary_to_term(Binary);
        Newer ->
            read_slot(Ref, Newer)
    end.


%% @doc Writes the value of a key. Only within {@link serialised/1}.
-spec write(atom(), term()) -> ok.
write(Key, Value) ->
    put_binary(Key, term_to_binary({ok, Value})).


%% @doc Deletes the value of a key. Only within {@link serialised/1}.
-spec clear(atom()) -> ok.
clear(Key) ->
    put_binary(Key, term_to_binary(none)).


-spec put_binary(atom(), binary()) -> ok.
put_binary(Key, Binary) ->
    Size = byte_size(Binary),
    Ref = ref(Key, words(Size) + 1),
    Version = atomics:get(Ref, ?VERSION) + 1,
    First = first_word(Version, slot_words(Ref)),
    Padding = words(Size) * 64 - Size * 8,
    ok = atomics:put(Ref, First, Size),
    _ = lists:foldl(fun(Word, Index) ->
                            ok = atomics:put(Ref, Index, Word),
                            Index + 1
                    end,
                    First + 1,
                    [ Word || <<Word:64>> <= <<Binary/binary, 0:Padding>> ]),
    ok = atomics:put(Ref, ?VERSION, Version),
    publish(Key, Ref).


%% The array of a key, or a new one if the key has none with slots of so many words.
-spec ref(atom(), pos_integer()) -> atomics:atomics_ref().
ref(Key, Words) ->
    Ref = persistent_term:get(?REF(Key), none),
    case Ref =/= none andalso slot_words(Ref) >= Words of
        true -> Ref;
        false -> atomics:new(?VERSION + 2 * max(?WORDS, Words), [{signed, false}])
    end.


%% A new array becomes visible to readers once it has a value. Writing the same array again costs nothing.
-spec publish(atom(), atomics:atomics_ref()) -> ok.
publish(Key, Ref) ->
    persistent_term:put(?REF(Key), Ref).


-spec slot_words(atomics:atomics_ref()) -> pos_integer().
slot_words(Ref) ->
    #{size := Size} = atomics:info(Ref),
    (Size - ?VERSION) div 2.


-spec first_word(Version :: pos_integer(), SlotWords :: pos_integer()) -> pos_integer().
first_word(Version, SlotWords) ->
    ?VERSION + 1 + (Version band 1) * SlotWords.


-spec words(Bytes :: non_neg_integer()) -> non_neg_integer().
words(Bytes) ->
    (Bytes + 7) div 8.
