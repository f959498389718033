"""Batch normalization as pure functions, with jax and numpy alone: begin with ``forward``."""
