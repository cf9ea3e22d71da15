"""The gateway: an OpenAI-compatible HTTP API in front of `calm.query`, with health and metrics."""
