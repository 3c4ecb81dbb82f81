defmodule MixApp do
  @moduledoc """
  A host written in Elixir: names under a supervisor, options as keyword lists.
  """
  use Application

  def start(_type, _args) do
    children = [
      {:erlmcp_named_registry, name: MixApp.Sessions, max_entries: 1000},
      %{id: :counter, start: {Agent, :start_link, [fn -> 41 end, [name: named("counter")]]}},
      %{id: :default, start: {Agent, :start_link, [fn -> :default end, [name: via("counter")]]}}
    ]

    Supervisor.start_link(children, strategy: :rest_for_one, name: MixApp.Supervisor)
  end

  def named(id), do: {:via, :erlmcp_named_registry, {MixApp.Sessions, id}}
  def via(id), do: {:via, :erlmcp_shard_registry, id}

  @doc "Raises if anything is not as expected."
  def check do
    42 = Agent.get_and_update(named("counter"), &{&1 + 1, &1 + 1})
    :default = Agent.get(via("counter"), & &1)
    pid = GenServer.whereis(named("counter"))
    {:error, {:already_started, ^pid}} = Agent.start(fn -> 0 end, name: named("counter"))
    :ok = Agent.stop(pid, :shutdown)
    41 = restarted(named("counter"), pid)

    :ok = :erlmcp_native.set(:admission, threshold: 20_000)
    limiter = :erlmcp_keyed_limiter.new(capacity: 2, rate_per_second: 0.001)
    {:ok, 1} = :erlmcp_keyed_limiter.consume(limiter, {"client", :search})
    :ok = :erlmcp_circuit_breaker.register_breaker("weather", failure_threshold: 3)
    :ok = :erlmcp_target_breaker.set({:connection, "client"}, failure_threshold: 3)
    {:ok, 21} = :erlmcp_circuit_breaker.call("weather", fn -> {:ok, 21} end)
    :ok = :erlmcp_shard_registry.register_connection("client", self(), %{tools: true})
    :ok = :erlmcp_shard_manager.route_message("client", :hello)
    :hello = receive(do: (message -> message))
    IO.puts("as expected")
  end

  defp restarted(name, former) do
    case GenServer.whereis(name) do
      pid when is_pid(pid) and pid != former ->
        Agent.get(name, & &1)

      _ ->
        Process.sleep(1)
        restarted(name, former)
    end
  end
end
