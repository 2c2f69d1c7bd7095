"""The benchmark suite: every peer in the same run, checked before it is timed, and recorded.

``python -m benchmarks --help`` in a checkout, ``dream bench --help`` when installed.
"""
