"""What the gateway decides: how OpenAI's JSON and our messages correspond. Pure."""
