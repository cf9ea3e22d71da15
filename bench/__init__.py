"""Benchmarks: `python -m bench.NAME` prints a table, states the machine, and with `--json FILE` writes the same."""
