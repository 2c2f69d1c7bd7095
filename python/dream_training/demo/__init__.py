"""``dream demo``: what a frozen language model teaches, on data that every installation has."""

from dream_training.demo.run import run_demo

__all__ = ["run_demo"]
