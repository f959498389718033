"""Networks as functions, with any normalization between their layers: what can be mapped over seeds and rates.

A ``Network``: ``Dense``, ``Residual``, or ``FromZero``, whose branches begin at 0. A ``Norm`` between its layers:
``BatchNorm``, ``OfFlax``, ``Bias`` for none, ``Dropout`` around another one. Each is followed by an ``Activation``,
which is ``keep`` where there is none. ``draw_kernel`` and ``convolve`` are what networks are made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from jbn import bn_forward, bn_init
from jbn.core.choice import NormalizeBy

__all__ = [
    "Activation",
    "BatchNorm",
    "Bias",
    "Dense",
    "Dropout",
    "FromZero",
    "Network",
    "Norm",
    "OfFlax",
    "Residual",
    "convolve",
    "draw_kernel",
    "keep",
]

Activation: TypeAlias = Callable[[Array], Array]


def keep(y: Array) -> Array:
    """Return y: the activation of what has none."""
    return y


class Network(Protocol):
    """What is trained: a function of parameters and states, and what makes these."""

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters and states; NumPy draws, and compiles nothing."""

    def __call__(self, params: Any, states: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return logits (n, classes) of x (n, features), and new states; ``step`` counts the steps that are done."""


class Norm(Protocol):
    """A normalization, or its absence, and the activation after it."""

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters and state of a layer; what is random in them is drawn from ``rng``."""

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state; ``step`` counts the steps that are done."""


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalization by the functions of jbn.

    Attributes:
        momentum: of the running statistics.
        group_size: rows that are a batch of their own, in training.
        tie: what x is normalized by at a step of training, such as a ``renorm``.
        activation: what follows.
        epsilon: added to the variance.
    """

    momentum: float
    group_size: int | None = None
    tie: Callable[[Array], NormalizeBy] | None = None
    activation: Activation = jax.nn.relu
    epsilon: float = 1e-5

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters and state of a layer."""
        return bn_init(features)

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state."""
        tie = None if self.tie is None or not train else self.tie(step)
        group = self.group_size if train else None
        more: dict[str, Any] = {"group_size": group, "normalize_by": tie, "activation": self.activation}
        more["epsilon"] = self.epsilon
        return bn_forward(params, state, x, train, momentum=self.momentum, **more)


@dataclass(frozen=True)
class Dropout:
    """A normalization, the activation after it, and dropout after both (Srivastava et al. 2014): before the next norm.

    Attributes:
        norm: what is before it.
        rate: the share of features that is dropped in training; those that stay are divided by the share of these.
    """

    norm: Norm
    rate: float

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters of the norm, and its state with a key for what is dropped."""
        params, state = self.norm.init(features, rng)
        return params, (state, rng.integers(0, 2**32, 2, np.uint32))

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state; each step drops other features."""
        inner, key = state
        y, inner = self.norm(params, inner, x, train, step)
        if train:
            stay = jax.random.bernoulli(jax.random.fold_in(key, step), 1 - self.rate, y.shape)
            y = jnp.where(stay, y / (1 - self.rate), 0)
        return y, (inner, key)


@dataclass(frozen=True)
class OfFlax:
    """A normalization of Flax that sees one row at a time: LayerNorm or GroupNorm.

    Attributes:
        module: the layer.
        activation: what follows.
    """

    module: nn.Module
    activation: Activation = jax.nn.relu

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters of a layer, and no state."""
        return self.module.init(jax.random.key(0), jnp.zeros((1, features))), ()

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and no state."""
        return self.activation(jnp.asarray(self.module.apply(params, x))), state


@dataclass(frozen=True)
class Bias:
    """No normalization: a bias for each feature.

    Attributes:
        activation: what follows.
    """

    activation: Activation = jax.nn.relu

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return the bias of a layer, and no state."""
        return np.zeros(features, np.float32), ()

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and no state."""
        return self.activation(x + params.reshape(*[1] * (x.ndim - 1), -1)), state


@dataclass(frozen=True)
class Dense:
    """A dense network: each hidden layer is a kernel, a normalization and an activation.

    Attributes:
        widths: numbers of features, from those of the input to the classes.
        norm: what follows each kernel but the last one, which has a bias.
        variance: of a kernel's numbers times its inputs: 2 as He et al. 2015 draw them for ReLU.
    """

    widths: tuple[int, ...]
    norm: Norm
    variance: float = 2.0

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters and states; NumPy draws, and compiles nothing."""
        rng, shapes = np.random.default_rng(seed), zip(self.widths[:-1], self.widths[1:], strict=True)
        kernels = [draw_kernel(rng, inputs, outputs, self.variance) for inputs, outputs in shapes]
        norms, states = _init_norms(self.norm, self.widths[1:-1], rng)
        return {"kernels": kernels, "norms": norms, "bias": np.zeros((1, self.widths[-1]), np.float32)}, states

    def __call__(self, params: Any, states: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return logits (n, classes) of x (n, features), and new states."""
        *hidden, last = params["kernels"]
        moved = []
        for kernel, norm, state in zip(hidden, params["norms"], states, strict=True):
            x, state = self.norm(norm, state, x @ kernel, train, step)
            moved.append(state)
        return x @ last + params["bias"], moved


@dataclass(frozen=True)
class Residual:
    """A small residual network in which each convolution follows a normalization and an activation (He et al. 2016b).

    A convolution, blocks of two, the mean over all positions, and a dense layer; where features become more, the size
    becomes half. Convolutions are products of matrices: mapped over kernels they stay fast.

    Attributes:
        side: of the images, which have one channel; a power of two.
        norm: what stands in front of each convolution but the first, and of the mean.
        features: of the first convolution and of each block.
        variance: of a kernel's numbers times its inputs.
        classes: how many logits there are.
    """

    side: int
    norm: Norm
    features: tuple[int, ...] = (16, 16, 32)
    variance: float = 2.0
    classes: int = 10

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters and states; NumPy draws, and compiles nothing."""
        rng = np.random.default_rng(seed)
        pairs = list(zip(self.features[:-1], self.features[1:], strict=True))
        shapes = [(1, self.features[0]), *((a, b) for given, made in pairs for a, b in ((given, made), (made, made)))]
        kernels = [draw_kernel(rng, 9 * given, made, self.variance) for given, made in shapes]
        last = draw_kernel(rng, self.features[-1], self.classes, self.variance)
        norms, states = _init_norms(self.norm, [made for _, made in shapes], rng)
        bias = np.zeros((1, self.classes), np.float32)
        return {"kernels": kernels, "norms": norms, "last": last, "bias": bias}, states

    def __call__(self, params: Any, states: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return logits (n, classes) of x (n, side * side), and new states."""
        first, *kernels = params["kernels"]
        norms, moved = zip(params["norms"], states, strict=True), []

        def normalize(x: Array) -> Array:
            y, state = self.norm(*next(norms), x, train, step)
            moved.append(state)
            return y

        x = convolve(x.reshape(-1, self.side, self.side, 1), first)
        for one, two in zip(kernels[::2], kernels[1::2], strict=True):
            stride = 1 if x.shape[-1] == one.shape[-1] else 2
            y = convolve(normalize(convolve(normalize(x), one, stride)), two)
            x = y + _shorten(x, stride, y.shape[-1])
        return normalize(x).mean((1, 2)) @ params["last"] + params["bias"], moved


@dataclass(frozen=True)
class FromZero(Residual):
    """A residual network each of whose branches is multiplied by a number that begins at 0.

    This is SkipInit of De and Smith 2020. Their biases are in a norm that is a ``Bias``.
    """

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters and states; NumPy draws, and compiles nothing."""
        params, states = super().init(seed)
        return params | {"branches": np.zeros(len(self.features) - 1, np.float32)}, states

    def __call__(self, params: Any, states: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return logits (n, classes) of x (n, side * side), and new states."""
        kernels = list(params["kernels"])
        for number in range(len(self.features) - 1):
            kernels[2 * number + 2] = kernels[2 * number + 2] * params["branches"][number]
        return super().__call__(params | {"kernels": kernels}, states, x, train, step)


def draw_kernel(rng: np.random.Generator, inputs: int, outputs: int, variance: float) -> np.ndarray:
    """Return a kernel (inputs, outputs) of normal numbers; their variance times the inputs is ``variance``."""
    return (rng.standard_normal((inputs, outputs)) * (variance / inputs) ** 0.5).astype(np.float32)


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Return the 3x3 convolution of x (n, h, w, c) with a kernel (9 c, features), as a product of matrices."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    places = [(row, column) for row in range(3) for column in range(3)]
    near = [padded[:, row : row + height : stride, column : column + width : stride] for row, column in places]
    return jnp.concatenate(near, -1) @ kernel


def _shorten(x: Array, stride: int, features: int) -> Array:
    """Return what a shortcut carries: without parameters, at the size and with the number of features of its block."""
    smaller = x[:, ::stride, ::stride]
    return jnp.pad(smaller, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def _init_norms(norm: Norm, widths: Sequence[int], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Return the parameters and the states of all layers."""
    layers = [norm.init(width, rng) for width in widths]
    return [params for params, _ in layers], [state for _, state in layers]


def __dir__() -> list[str]:
    return __all__
