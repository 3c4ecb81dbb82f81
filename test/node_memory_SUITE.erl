%%% The memory that the node uses, and the limits that the machine and its control groups set.
-module(node_memory_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0]).
-export([memory_limit_of_the_machine/1, memory_limit_of_a_control_group/1, memory_used/1]).


all() ->
    [memory_limit_of_the_machine, memory_limit_of_a_control_group, memory_used].


memory_limit_of_the_machine(Config) ->
    Root = root(Config),
    ?assertEqual(infinity, erlmcp_shard_health:memory_limit_bytes(Root)),
    file(Root, "proc/meminfo", "MemTotal:        1000 kB\nMemFree:          10 kB\nMemAvailable:     10 kB\n"),
    ?assertEqual(900 * 1024, erlmcp_shard_health:memory_limit_bytes(Root)),
    file(Root, "proc/meminfo", "MemFree:          10 kB\nMemTotal:       2000 kB\n"),
    ?assertEqual(1800 * 1024, erlmcp_shard_health:memory_limit_bytes(Root)),
    file(Root, "proc/meminfo", "nothing that one could read\n"),
    ?assertEqual(infinity, erlmcp_shard_health:memory_limit_bytes(Root)).


memory_limit_of_a_control_group(Config) ->
    %% Version 2: the group itself and a parent.
    V2 = root(Config),
    file(V2, "proc/meminfo", "MemTotal: 1000000 kB\n"),
    file(V2, "proc/self/cgroup", "0::/a/b\n"),
    Machine = 900_000 * 1024,
    ?assertEqual(Machine, erlmcp_shard_health:memory_limit_bytes(V2)),
    file(V2, "sys/fs/cgroup/a/b/memory.max", "max\n"),
    ?assertEqual(Machine, erlmcp_shard_health:memory_limit_bytes(V2)),
    file(V2, "sys/fs/cgroup/a/b/memory.max", "500000\n"),
    ?assertEqual(450_000, erlmcp_shard_health:memory_limit_bytes(V2)),
    file(V2, "sys/fs/cgroup/a/memory.max", "100000\n"),
    ?assertEqual(90_000, erlmcp_shard_health:memory_limit_bytes(V2)),
    %% A limit above the memory of the machine has no effect.
    file(V2, "sys/fs/cgroup/a/memory.max", "9000000000000\n"),
    file(V2, "sys/fs/cgroup/a/b/memory.max", "9000000000000\n"),
    ?assertEqual(Machine, erlmcp_shard_health:memory_limit_bytes(V2)),
    %% The limit of another group has no effect.
    file(V2, "sys/fs/cgroup/other/memory.max", "1000\n"),
    ?assertEqual(Machine, erlmcp_shard_health:memory_limit_bytes(V2)),
    %% In a container the group is the root of the mounted tree, whatever path the machine gives it.
    Container = root(Config),
    file(Container, "proc/self/cgroup", "0::/\n"),
    file(Container, "sys/fs/cgroup/memory.max", "200000\n"),
    ?assertEqual(180_000, erlmcp_shard_health:memory_limit_bytes(Container)),
    file(Container, "proc/self/cgroup", "0::/system.slice/docker-1234.scope\n"),
    ?assertEqual(180_000, erlmcp_shard_health:memory_limit_bytes(Container)),
    %% Names with colons, as container runtimes give them.
    file(Container, "proc/self/cgroup", "0::/system.slice/kubepods-pod1.slice:cri-containerd:1234\n"),
    ?assertEqual(180_000, erlmcp_shard_health:memory_limit_bytes(Container)),
    file(Container, "sys/fs/cgroup/system.slice/kubepods-pod1.slice:cri-containerd:1234/memory.max", "100000\n"),
    ?assertEqual(90_000, erlmcp_shard_health:memory_limit_bytes(Container)),
    %% Version 1.
    V1 = root(Config),
    file(V1, "proc/self/cgroup", "11:cpu,cpuacct:/x\n4:memory:/docker/1\n1:name=systemd:/docker/1\n0::/\n"),
    ?assertEqual(infinity, erlmcp_shard_health:memory_limit_bytes(V1)),
    file(V1, "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "300000\n"),
    ?assertEqual(270_000, erlmcp_shard_health:memory_limit_bytes(V1)),
    file(V1, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
    ?assertEqual(270_000, erlmcp_shard_health:memory_limit_bytes(V1)),
    file(V1, "sys/fs/cgroup/memory/memory.limit_in_bytes", "100000\n"),
    ?assertEqual(90_000, erlmcp_shard_health:memory_limit_bytes(V1)),
    %% Controllers that are mounted together.
    file(V1, "proc/self/cgroup", "4:hugetlb,memory:/docker/1\n"),
    ?assertEqual(90_000, erlmcp_shard_health:memory_limit_bytes(V1)),
    %% A group of other controllers has no memory limit.
    file(V1, "proc/self/cgroup", "4:cpuset:/docker/1\n"),
    ?assertEqual(infinity, erlmcp_shard_health:memory_limit_bytes(V1)).


memory_used(_Config) ->
    Before = erlmcp_shard_health:memory_used_bytes(),
    Binary = binary:copy(<<1>>, 200_000_000),
    After = erlmcp_shard_health:memory_used_bytes(),
    ?assertEqual(200_000_000, byte_size(Binary)),
    ?assert(After - Before > 100_000_000, {Before, After}),
    case erlmcp_shard_health:memory_limit_bytes() of
        infinity -> ok;
        Limit -> ?assert(Limit > After, {Limit, After})
    end.


root(Config) ->
    Root = filename:join([proplists:get_value(priv_dir, Config), "machine_" ++ integer_to_list(erlang:unique_integer([positive]))]),
    ok = file:make_dir(Root),
    Root.


file(Root, Path, Content) ->
    File = filename:join(Root, Path),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, Content).
