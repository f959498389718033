"""What a batch norm is to a measurement: a `Layer` of pure functions, or a `Norm` of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

EPSILON = 1e-5
MOMENTUM = 0.99
"""The weight of the old value."""


class Layer(NamedTuple):
    """A batch norm as pure functions, to be jitted, differentiated or compiled for another machine.

    Attributes:
        params: what is trained, a tree of float32 arrays.
        state: a fresh state, a tree of arrays.
        apply: ``apply(params, state, x, train, mask=None)`` returns y and the new state.
        running: ``running(state)`` returns the mean and var by which evaluation normalizes.
        at: ``at(mean, var)`` returns the state by which evaluation normalizes with these.
    """

    params: Any
    state: Any
    apply: Callable[..., tuple[Any, Any]]
    running: Callable[[Any], tuple[Any, Any]]
    at: Callable[[Any, Any], Any]


class Norm(Protocol):
    """A batch norm of NumPy arrays of shape (N, H, W, C); its parameters are ones and zeros."""

    def train(self, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalize by the batch, from a fresh state; return y and, for the cotangent g of y, the gradient of x."""

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        """Normalize by running statistics that are given."""

    def running_mean(self, batches: Iterable[np.ndarray]) -> np.ndarray:
        """Return the running mean after the batches, from a fresh state."""


class Jitted:
    """A `Layer` as a `Norm`, jitted."""

    def __init__(self, layer: Layer, axis: int) -> None:
        self._layer = layer
        self._axis = axis
        self._step = jax.jit(lambda state, x: layer.apply(layer.params, state, x, True)[1])

    def train(self, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def both(state: Any, x: Any, g: Any) -> Any:
            y, pull = jax.vjp(lambda x: self._layer.apply(self._layer.params, state, x, True)[0], x)
            return y, *pull(g)

        # The state is an input, as in any training: a constant one would be folded into another program.
        y, dx = jax.jit(both)(self._layer.state, self._arranged(x), self._arranged(g))
        return self._back(y), self._back(dx)

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        state = self._layer.at(mean, var)
        y = jax.jit(lambda s, x: self._layer.apply(self._layer.params, s, x, False)[0])(state, self._arranged(x))
        return self._back(y)

    def running_mean(self, batches: Iterable[np.ndarray]) -> np.ndarray:
        state = self._layer.state
        for x in batches:
            state = self._step(state, self._arranged(x))
        return np.asarray(self._layer.running(state)[0])

    def _arranged(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(x, -1, self._axis))

    def _back(self, y: Any) -> np.ndarray:
        return np.moveaxis(np.asarray(y), self._axis, -1)


class Torch:
    """PyTorch's BatchNorm2d as a `Norm`.

    Args:
        features: the number of features.
        channels_last: whether it gets x in the memory format of that name, in which it comes.
    """

    def __init__(self, features: int, channels_last: bool = False) -> None:
        self._features = features
        self._channels_last = channels_last

    def module(self) -> Any:
        """Return a fresh module."""
        import torch

        return torch.nn.BatchNorm2d(self._features, eps=EPSILON, momentum=1 - MOMENTUM)

    def tensor(self, x: np.ndarray) -> Any:
        """Return x of shape (N, H, W, C) as a tensor of shape (N, C, H, W), in the memory format."""
        import torch

        x = np.moveaxis(x, -1, 1)
        return torch.from_numpy(x if self._channels_last else np.ascontiguousarray(x))

    def train(self, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tensor = self.tensor(x).requires_grad_()
        y = self.module()(tensor)
        y.backward(self.tensor(g))
        return self._array(y), self._array(tensor.grad)

    def evaluate(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        import torch

        module = self.module().eval()
        module.running_mean = torch.tensor(mean)
        module.running_var = torch.tensor(var)
        return self._array(module(self.tensor(x)))

    def running_mean(self, batches: Iterable[np.ndarray]) -> np.ndarray:
        module = self.module()
        for x in batches:
            module(self.tensor(x))
        return np.asarray(module.running_mean)

    @staticmethod
    def _array(tensor: Any) -> np.ndarray:
        return np.moveaxis(tensor.detach().numpy(), 1, -1)
