defmodule MixApp.MixProject do
  use Mix.Project

  def project do
    [
      app: :mix_app,
      version: "0.1.0",
      deps: [{:erlmcp_native, git: System.fetch_env!("ERLMCP_NATIVE_URL"), branch: "main"}]
    ]
  end

  def application do
    [mod: {MixApp, []}]
  end
end
