"""The `calm` command."""
