%%% @private
%%% The memory that this node uses, and that it may use.
%%%
%%% What counts is the memory of the operating system's process, since that is what a machine or a
%%% container runs out of, and the registrations live in memory that `erlang:memory/0' does not know.
-module(erlmcp_node_memory).

-export([used_bytes/0, limit_bytes/0, limit_bytes/1]).

-export_type([limit/0]).

-type limit() :: pos_integer() | infinity.

%% The part of the machine's memory that one node may use.
-define(PERCENT, 90).


%% @doc The resident memory; where the operating system does not tell it, what the VM has allocated.
-spec used_bytes() -> pos_integer().
used_bytes() ->
    case numbers("/proc/self/status", "^VmRSS:\\s+(\\d+) kB") of
        [Kilobytes] -> Kilobytes * 1024;
        [] -> erlang:memory(total)
    end.


%% @doc 90 % of the machine's memory or of what the control group of this node may use, whichever is
%% less; `infinity' where neither can be read.
-spec limit_bytes() -> limit().
limit_bytes() ->
    limit_bytes("/").


%% @doc As {@link limit_bytes/0}, of a machine whose files begin there.
-spec limit_bytes(file:filename()) -> limit().
limit_bytes(Root) ->
    Machine = [ Kilobytes * 1024
                || Kilobytes <- numbers(filename:join([Root, "proc", "meminfo"]), "^MemTotal:\\s+(\\d+) kB") ],
    Groups = lists:append([ numbers(File, "^(\\d+)$") || File <- control_group_files(Root) ]),
    case Machine ++ Groups of
        [] -> infinity;
        Limits -> max(1, lists:min(Limits) * ?PERCENT div 100)
    end.


%% The limits of a group hold for all within it. In a container the group's path is that of the machine
%% outside, or `/'. A file that is not there, or says `max', sets no limit.
-spec control_group_files(file:filename()) -> [file:filename()].
control_group_files(Root) ->
    %% A path may have colons itself, and a hierarchy several controllers.
    Groups = [ {binary:split(Controllers, <<",">>, [global]), Path}
               || Line <- binary:split(content(filename:join([Root, "proc", "self", "cgroup"])), <<"\n">>, [global]),
                  [_Id, Group] <- [binary:split(Line, <<":">>)],
                  [Controllers, Path] <- [binary:split(Group, <<":">>)] ],
    lists:usort(lists:append([ limit_files(Root, Controllers, Path) || {Controllers, Path} <- Groups ])).


-spec limit_files(file:filename(), Controllers :: [binary()], Path :: binary()) -> [file:filename()].
limit_files(Root, [<<>>], Path) ->
    files(Root, "sys/fs/cgroup", Path, "memory.max");
limit_files(Root, Controllers, Path) ->
    case lists:member(<<"memory">>, Controllers) of
        true -> files(Root, "sys/fs/cgroup/memory", Path, "memory.limit_in_bytes");
        false -> []
    end.


-spec files(file:filename(), file:filename(), binary(), file:filename()) -> [file:filename()].
files(Root, Mount, Path, File) ->
    Parts = [ binary_to_list(Part) || Part <- binary:split(Path, <<"/">>, [global]), Part =/= <<>> ],
    [ filename:join([Root, Mount] ++ lists:sublist(Parts, N) ++ [File]) || N <- lists:seq(0, length(Parts)) ].


-spec numbers(file:filename(), string()) -> [non_neg_integer()].
numbers(File, Pattern) ->
    case re:run(content(File), Pattern, [multiline, {capture, all_but_first, list}]) of
        {match, [Digits]} -> [list_to_integer(Digits)];
        nomatch -> []
    end.


%% Read by the calling process, without the file server; empty if it cannot be.
-spec content(file:filename()) -> binary().
content(File) ->
    case file:open(File, [read, raw, binary]) of
        {ok, Device} ->
            Read = file:read(Device, 65_536),
            ok = file:close(Device),
            case Read of
                {ok, Content} -> Content;
                _ -> <<>>
            end;
        {error, _Reason} ->
            <<>>
    end.
