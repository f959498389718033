"""Dense networks as functions, with any normalization between their layers: what can be mapped over seeds and rates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jbn import bn_forward, bn_init
from jbn.core.choice import NormalizeBy


class Norm(Protocol):
    """A normalization, or its absence, and the activation after it."""

    def init(self, features: int) -> tuple[Any, Any]:
        """Return parameters and state of a layer."""

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state; ``step`` counts the steps that are done."""


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalization by the functions of jbn.

    Attributes:
        momentum: of the running statistics.
        group_size: rows that are a batch of their own, in training.
        tie: what x is normalized by at a step of training, such as a ``renorm``.
    """

    momentum: float
    group_size: int | None = None
    tie: Callable[[Array], NormalizeBy] | None = None

    def init(self, features: int) -> tuple[Any, Any]:
        """Return parameters and state of a layer."""
        return bn_init(features)

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state."""
        tie = None if self.tie is None or not train else self.tie(step)
        group = self.group_size if train else None
        more: dict[str, Any] = {"group_size": group, "normalize_by": tie, "activation": jax.nn.relu}
        return bn_forward(params, state, x, train, momentum=self.momentum, **more)


@dataclass(frozen=True)
class OfFlax:
    """A normalization of Flax that sees one row at a time: LayerNorm or GroupNorm."""

    module: nn.Module

    def init(self, features: int) -> tuple[Any, Any]:
        """Return parameters of a layer, and no state."""
        return self.module.init(jax.random.key(0), jnp.zeros((1, features))), ()

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and no state."""
        return jax.nn.relu(jnp.asarray(self.module.apply(params, x))), state


@dataclass(frozen=True)
class Bias:
    """No normalization: a bias."""

    def init(self, features: int) -> tuple[Any, Any]:
        """Return the bias of a layer, and no state."""
        return jnp.zeros((1, features)), ()

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and no state."""
        return jax.nn.relu(x + params), state


@dataclass(frozen=True)
class Dense:
    """A dense network: each hidden layer is a kernel, a normalization and an activation.

    Attributes:
        widths: numbers of features, from those of the input to the classes.
        norm: what follows each kernel but the last one, which has a bias.
    """

    widths: tuple[int, ...]
    norm: Norm

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters, kernels as He et al. 2015 draw them, and states; NumPy draws, and compiles nothing."""
        rng, shapes = np.random.default_rng(seed), zip(self.widths[:-1], self.widths[1:], strict=True)
        kernels = [
            (rng.standard_normal((inputs, outputs)) * (2 / inputs) ** 0.5).astype(np.float32)
            for inputs, outputs in shapes
        ]
        layers = [self.norm.init(width) for width in self.widths[1:-1]]
        norms, states = [norm for norm, _ in layers], [state for _, state in layers]
        return {"kernels": kernels, "norms": norms, "bias": np.zeros((1, self.widths[-1]), np.float32)}, states

    def __call__(self, params: Any, states: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return logits (n, classes) of x (n, features), and new states."""
        *hidden, last = params["kernels"]
        moved = []
        for kernel, norm, state in zip(hidden, params["norms"], states, strict=True):
            x, state = self.norm(norm, state, x @ kernel, train, step)
            moved.append(state)
        return x @ last + params["bias"], moved
