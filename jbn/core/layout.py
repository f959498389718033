"""The geometry of x: which of its axes are features, which are rows, and how vectors of features meet it."""

import math
from dataclasses import dataclass

from jax import Array
from jax.numpy import expand_dims, moveaxis

from jbn.core.lax import lax


@dataclass(frozen=True)
class Layout:
    """The shape of x and the axes of its features; the other axes are rows, over which statistics are taken.

    The first axis of rows is that of the examples. Where ``group`` of them at a time share statistics, statistics have
    one more axis in front, for the groups.
    """

    shape: tuple[int, ...]
    axis: tuple[int, ...]  # ascending, not negative
    group: int | None = None

    @property
    def row_axes(self) -> tuple[int, ...]:
        """The axes that statistics reduce."""
        return tuple(i for i in range(len(self.shape)) if i not in self.axis)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of scale, bias, mean and var."""
        return tuple(self.shape[i] for i in self.axis)

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.shape[self.row_axes[0]] if self.row_axes else 1

    @property
    def row_count(self) -> int:
        """The number of rows, which is that of the values of a feature."""
        return math.prod(self.shape[i] for i in self.row_axes)

    @property
    def group_row_count(self) -> int:
        """The number of rows that share statistics."""
        return math.prod(self.shape[i] for i in self.row_axes[1:]) * (self.group or self.examples)

    def lift(self, vector: Array) -> Array:
        """Give a vector of features the rank of the statistics."""
        return vector if self.group is None else vector[None]

    def spread(self, vector: Array) -> Array:
        """Give a vector of features, with one row for each group or one for all, the rank of x."""
        if self.group is None:
            return lax.expand_dims(vector, self.row_axes)
        if vector.shape[0] > 1:  # as jnp.repeat, which does not take Explicit shardings
            groups, *features = vector.shape
            vector = lax.broadcast_in_dim(vector, (groups, self.group, *features), (0, *range(2, vector.ndim + 1)))
            vector = vector.reshape(groups * self.group, *features)
        return expand_dims(moveaxis(vector, 0, self.row_axes[0]), self.row_axes[1:])
