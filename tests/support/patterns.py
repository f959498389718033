"""Small copies of what public models do with batch norms, in Linen and in NNX.

Each has norms of Flax after convolutions and dense layers, and a call in evaluation and in training.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

IMAGES = (8, 6, 6, 3)
WIDTH = 4


def normalized(x: Any, mean: Any, var: Any, epsilon: float, scale: Any, bias: Any) -> Any:
    mean, var, scale, bias = (jnp.expand_dims(value, tuple(range(x.ndim - 1))) for value in (mean, var, scale, bias))
    return (x - mean) * jax.lax.rsqrt(var + epsilon) * scale + bias


class Copied(nn.Module):
    """Flax's code as it is copied into other packages: a class of its own, fields and variables of Flax's names."""

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-4
    dtype: Any = jnp.float32
    scale_init: Any = nn.initializers.ones
    mean_init: Any = lambda shape: jnp.full(shape, 0.25)
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, use_running_average: bool | None = None) -> Any:
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", self.mean_init, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        m, v = mean.value, var.value
        if not evaluate:
            rows = tuple(range(x.ndim - 1))
            m, v = x.mean(rows), x.var(rows)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        scale, bias = self.param("scale", self.scale_init, shape), self.param("bias", nn.initializers.zeros, shape)
        return jnp.asarray(normalized(x, m, v, self.epsilon, scale, bias), self.dtype)


class CopiedNNX(nnx.Module):
    """The same in NNX."""

    def __init__(
        self, num_features: int, *, use_running_average: bool = False, momentum: float = 0.9, epsilon: float = 1e-4
    ) -> None:
        self.mean = nnx.BatchStat(jnp.full(num_features, 0.25))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.scale, self.bias = nnx.Param(jnp.ones(num_features)), nnx.Param(jnp.zeros(num_features))
        self.use_running_average, self.momentum, self.epsilon = use_running_average, momentum, epsilon

    def __call__(self, x: Any, use_running_average: bool | None = None) -> Any:
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        m, v = self.mean[...], self.var[...]
        if not evaluate:
            rows = tuple(range(x.ndim - 1))
            m, v = x.mean(rows), x.var(rows)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * m
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * v
        return normalized(x, m, v, self.epsilon, self.scale[...], self.bias[...])


class Decides(nn.Module):
    """It trains where its statistics are mutable, as the blocks of jax_resnet do: no flag anywhere."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        evaluate = not self.is_mutable_collection("batch_stats")
        x = nn.relu(nn.BatchNorm(name="n0")(nn.Conv(WIDTH, (3, 3), name="c0")(x), use_running_average=evaluate))
        x = nn.BatchNorm(name="n1")(nn.Conv(WIDTH, (3, 3), name="c1")(x), use_running_average=evaluate)
        return nn.Dense(3, name="out")(nn.relu(x).mean((1, 2)))


class WithCopies(nn.Module):
    """A copied class beside Flax's, as in flaxmodels; ``dtype`` is a string there."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = Copied(use_running_average=not train, dtype="float32", name="n0")(nn.Conv(WIDTH, (3, 3), name="c0")(x))
        x = nn.BatchNorm(not train, name="n1")(nn.Conv(WIDTH, (3, 3), name="c1")(nn.relu(x)))
        return nn.Dense(3, name="out")(nn.relu(x).mean((1, 2)))


class Forgets(nn.Module):
    """It passes the flag to one of its norms, the other evaluates in training too, as in the Y blocks of a RegNet."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(not train, name="n0")(nn.Conv(WIDTH, (3, 3), name="c0")(x))
        x = nn.BatchNorm(name="n1")(nn.Conv(WIDTH, (3, 3), name="c1")(nn.relu(x)), use_running_average=True)
        return nn.Dense(3, name="out")(nn.relu(x).mean((1, 2)))


class NamesAnAxis(nn.Module):
    """The name of an axis is written into it, as in the ResNets of Flax's examples."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.BatchNorm(not train, axis_name="batch", name="n0")(nn.Conv(WIDTH, (3, 3), name="c0")(x))
        x = nn.BatchNorm(not train, axis_name="batch", name="n1")(nn.Conv(WIDTH, (3, 3), name="c1")(nn.relu(x)))
        return nn.Dense(3, name="out")(nn.relu(x).mean((1, 2)))


class OfNNX(nnx.Module):
    """A network whose first norm is of the class that is given."""

    def __init__(self, first: Any, *, forgets: bool = False, axis_name: str | None = None) -> None:
        rngs = nnx.Rngs(0)
        self.forgets = forgets
        self.c0, self.c1 = (nnx.Conv(n, WIDTH, (3, 3), rngs=rngs) for n in (3, WIDTH))
        options: dict[str, Any] = {} if first is CopiedNNX else {"rngs": rngs, "axis_name": axis_name}
        self.n0 = first(WIDTH, **options)
        self.n1 = nnx.BatchNorm(WIDTH, rngs=rngs, axis_name=axis_name)
        self.out = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.n0(self.c0(x)))
        x = self.n1(self.c1(x), use_running_average=True if self.forgets else None)
        return self.out(nnx.relu(x).mean((1, 2)))
