"""Benchmarks: each prints a table; run as `python -m benchmarks.NAME` from the project's root."""
