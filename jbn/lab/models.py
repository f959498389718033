"""The two networks that batch normalization is taught with, each with and without it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn

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

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, valid: jax.Array | None = None, preactivations: bool = False
    ) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, 10), or to what enters the last ReLU (n, 64)."""
        x = images.reshape(len(images), -1)
        x = nn.Dense(128, use_bias=not self.batch_norm)(x)
        x = _activate(x, nn.relu, self.batch_norm, train, valid)
        x = nn.Dense(64, use_bias=not self.batch_norm)(x)
        if preactivations:
            return _activate(x, None, self.batch_norm, train, valid)
        x = _activate(x, nn.relu, self.batch_norm, train, valid)
        return nn.Dense(CLASSES)(x)


class ConvNetwork(nn.Module):
    """Conv 32 of 3x3, BN, ReLU, Flatten, Dense 10; without BN the convolution gets a bias."""

    batch_norm: bool

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, valid: jax.Array | None = None, preactivations: bool = False
    ) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, 10), or to what enters the ReLU (n, h, w, 32)."""
        x = nn.Conv(32, (3, 3), use_bias=not self.batch_norm)(images)
        if preactivations:
            return _activate(x, None, self.batch_norm, train, valid)
        x = _activate(x, nn.relu, self.batch_norm, train, valid)
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


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
