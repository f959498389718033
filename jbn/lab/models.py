"""The two networks that batch normalization is taught with, each with and without it, and a small ResNet."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jbn.linen import BatchNorm

# The running statistics lag 1 / (1 - momentum) steps behind the weights. Runs here are a few hundred steps
# long: Flax's 0.99 would need 100 of them before evaluation means anything, 0.9 needs 10.
MOMENTUM = 0.9

CLASSES = 10


def _activate(
    x: jax.Array,
    activation: Callable[..., jax.Array] | None,
    batch_norm: bool,
    train: bool,
    valid: jax.Array | None,
) -> jax.Array:
    if batch_norm:
        mask = None if valid is None else valid.reshape(-1, *[1] * (x.ndim - 1))
        return BatchNorm(use_running_average=not train, momentum=MOMENTUM, activation=activation)(x, mask=mask)
    return x if activation is None else activation(x)


class DenseNetwork(nn.Module):
    """Dense 128, BN, ReLU, Dense 64, BN, ReLU, Dense 10; without BN the hidden layers get a bias."""

    batch_norm: bool
    classes: int = CLASSES
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, valid: jax.Array | None = None, preactivations: bool = False
    ) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, 10), or to what enters the last ReLU (n, 64)."""
        x = images.reshape(len(images), -1)
        x = nn.Dense(128, use_bias=not self.batch_norm, dtype=self.dtype)(x)
        x = _activate(x, nn.relu, self.batch_norm, train, valid)
        x = nn.Dense(64, use_bias=not self.batch_norm, dtype=self.dtype)(x)
        if preactivations:
            return _activate(x, None, self.batch_norm, train, valid)
        x = _activate(x, nn.relu, self.batch_norm, train, valid)
        return nn.Dense(self.classes, dtype=self.dtype)(x)


class ConvNetwork(nn.Module):
    """Conv 32 of 3x3, BN, ReLU, Flatten, Dense 10; without BN the convolution gets a bias."""

    batch_norm: bool
    classes: int = CLASSES
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, valid: jax.Array | None = None, preactivations: bool = False
    ) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, 10), or to what enters the ReLU (n, h, w, 32)."""
        x = nn.Conv(32, (3, 3), use_bias=not self.batch_norm, dtype=self.dtype)(images)
        if preactivations:
            return _activate(x, None, self.batch_norm, train, valid)
        x = _activate(x, nn.relu, self.batch_norm, train, valid)
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(len(x), -1))


class ResNet(nn.Module):
    """Conv 16, BN, ReLU; residual blocks of 16, 32 and 64 features, from the second on at half the size; Dense.

    A block is conv, BN, ReLU, conv, BN, add, ReLU. Its addition and its activations are those of BatchNorm.
    """

    classes: int = CLASSES
    dtype: DTypeLike | None = None
    momentum: float = MOMENTUM

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, valid: jax.Array | None = None) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, classes)."""
        norm = partial(BatchNorm, use_running_average=not train, momentum=self.momentum)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        mask = None if valid is None else valid[:, None, None, None]
        x = norm(activation=nn.relu)(conv(16, (3, 3))(images), mask=mask)
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            y = norm(activation=nn.relu)(conv(features, (3, 3), stride)(x), mask=mask)
            y = conv(features, (3, 3))(y)
            shortcut = x if x.shape == y.shape else norm()(conv(features, (1, 1), stride)(x), mask=mask)
            x = norm(activation=nn.relu)(y, residual=shortcut, mask=mask)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


class Model(NamedTuple):
    """One choice of `--model`: the network, its input and a learning rate for both variants."""

    network: type[DenseNetwork] | type[ConvNetwork]
    enlarged: bool
    learning_rate: float


# One step of gradient descent moves a logit by about learning_rate * |features|^2, and 64x64 positions
# instead of 8x8 give 64 times as many features: at 0.1 the first steps of `conv64` are far too long.
MODELS = {
    "dense": Model(DenseNetwork, enlarged=False, learning_rate=0.1),
    "conv": Model(ConvNetwork, enlarged=False, learning_rate=0.1),
    "conv64": Model(ConvNetwork, enlarged=True, learning_rate=0.1 / 64),
}
