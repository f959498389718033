"""Batch normalization as pure functions, with jax and numpy alone: begin with ``forward``.

Functions of ``jax.numpy`` are imported by name here. Exporters to other formats put functions of their own into that
module while they trace, and the programs that are compiled inside, and kept, would keep those too.
"""
