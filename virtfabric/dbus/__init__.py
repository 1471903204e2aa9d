"""The API: a skin over `daemon.api.AgentApi`; parse, call the agent, format. Decides nothing."""
