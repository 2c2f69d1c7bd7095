"""Timings against peers; each module is run with ``python -m benchmarks.<name>``."""
