%%% The machine and the versions that the figures belong to.
-module(bench_machine).

-export([describe/1]).


%% `Root' is the folder of the project.
-spec describe(file:filename()) -> [{atom(), io_lib:chars()}].
describe(Root) ->
    [{cpu, cpu()},
     {cores, io_lib:format("~p, ~b schedulers",
                           [erlang:system_info(logical_processors),
                            erlang:system_info(schedulers_online)])},
     {memory, memory()},
     {load, command("cut -d ' ' -f 1-3 /proc/loadavg || sysctl -n vm.loadavg") ++ " (1, 5 and 15 minutes before)"},
     {os, os_name() ++ ", " ++ command("uname -srm")},
     {otp, otp_version() ++ ", " ++ flavour(erlang:system_info(emu_flavor)) ++ ", NIF " ++
           erlang:system_info(nif_version)},
     {rustc, command("rustc --version")},
     {version, version()},
     {revision, revision(Root)},
     {date, calendar:system_time_to_rfc3339(erlang:system_time(second), [{offset, "Z"}])}].


-spec cpu() -> string().
cpu() ->
    case captured("/proc/cpuinfo", "model name\\s*:\\s*(.*)") of
        none -> command("sysctl -n machdep.cpu.brand_string || uname -p");
        Model -> Model
    end.


-spec memory() -> string().
memory() ->
    Bytes = case captured("/proc/meminfo", "MemTotal:\\s*(\\d+) kB") of
                none -> list_to_integer("0" ++ command("sysctl -n hw.memsize"));
                Kilobytes -> list_to_integer(Kilobytes) * 1024
            end,
    float_to_list(Bytes / (1 bsl 30), [{decimals, 1}]) ++ " GiB".


-spec os_name() -> string().
os_name() ->
    case captured("/etc/os-release", "PRETTY_NAME=\"(.*)\"") of
        none -> command("uname -s");
        Name -> Name
    end.


-spec otp_version() -> string().
otp_version() ->
    Release = erlang:system_info(otp_release),
    File = filename:join([code:root_dir(), "releases", Release, "OTP_VERSION"]),
    case file:read_file(File) of
        {ok, Version} -> string:trim(binary_to_list(Version));
        {error, _} -> Release
    end.


-spec flavour(atom()) -> string().
flavour(jit) -> "JIT";
flavour(Other) -> "no JIT (" ++ atom_to_list(Other) ++ ")".


-spec version() -> string().
version() ->
    {ok, Version} = application:get_key(erlmcp_native, vsn),
    "erlmcp_native " ++ Version.


-spec revision(file:filename()) -> string().
revision(Root) ->
    command("GIT_OPTIONAL_LOCKS=0 git -C '" ++ Root ++ "' describe --always --dirty").


%% The output of a command, `unknown' if it fails.
-spec command(string()) -> string().
command(Command) ->
    case string:trim(os:cmd("{ " ++ Command ++ "; } 2>/dev/null")) of
        "" -> "unknown";
        Output -> Output
    end.


-spec captured(file:filename(), string()) -> string() | none.
captured(File, Pattern) ->
    case file:read_file(File) of
        {ok, Content} ->
            case re:run(Content, Pattern, [{capture, all_but_first, list}]) of
                {match, [Captured]} -> Captured;
                nomatch -> none
            end;
        {error, _} ->
            none
    end.
