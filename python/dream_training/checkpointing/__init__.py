"""Checkpoints: what a run needs to resume as if it had not been stopped."""
