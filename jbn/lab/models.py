"""The two networks that batch normalization is taught with, each with and without it, and a small ResNet.

``NETWORKS`` makes them by their names on the command line: a ``Textbook`` network or a ``ResNet``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jbn.linen import BatchNorm

__all__ = [
    "NETWORKS",
    "ResNet",
    "Textbook",
]

# The running statistics lag 1 / (1 - momentum) steps behind the weights. Runs here are a few hundred steps
# long: Flax's 0.99 would need 100 of them before evaluation means anything, 0.9 needs 10.
MOMENTUM = 0.9

CLASSES = 10


class Textbook(nn.Module):
    """3x3 convolutions, then dense layers, each with BN and ReLU, and a last dense layer.

    Attributes:
        batch_norm: whether there is any; without it the hidden layers get a bias.
        convolutions: the features of each.
        dense: the features of each.
        classes: how many logits there are.
        dtype: of the arithmetic, that of the images for None.
        norm: makes the BN.
    """

    batch_norm: bool
    convolutions: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()
    classes: int = CLASSES
    dtype: DTypeLike | None = None
    norm: Callable[..., Any] = BatchNorm

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, valid: jax.Array | None = None, preactivations: bool = False
    ) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, classes), or to what enters the last ReLU."""
        fields: dict[str, Any] = {"use_bias": not self.batch_norm, "dtype": self.dtype}
        layers: list[nn.Module] = [nn.Conv(features, (3, 3), **fields) for features in self.convolutions]
        layers += [nn.Dense(features, **fields) for features in self.dense]
        x = images
        for number, layer in enumerate(layers, 1):
            x = layer(x.reshape(x.shape[0], -1) if isinstance(layer, nn.Dense) else x)  # type: ignore[operator]
            activation = None if preactivations and number == len(layers) else nn.relu
            if self.batch_norm:
                mask = None if valid is None else valid.reshape(-1, *[1] * (x.ndim - 1))
                x = self.norm(use_running_average=not train, momentum=MOMENTUM, activation=activation)(x, mask=mask)
            elif activation is not None:
                x = activation(x)
        return x if preactivations else nn.Dense(self.classes, dtype=self.dtype)(x.reshape(x.shape[0], -1))


class ResNet(nn.Module):
    """Conv 16, BN, ReLU; residual blocks of 16, 32 and 64 features, from the second on at half the size; Dense.

    A block is conv, BN, ReLU, conv, BN, add, ReLU. Its addition and its activations are those of BatchNorm.

    Attributes:
        classes: how many logits there are.
        dtype: of the arithmetic, that of the images for None.
        momentum: weight of the old statistics, 0 to 1.
        norm: makes the BN.
    """

    classes: int = CLASSES
    dtype: DTypeLike | None = None
    momentum: float = MOMENTUM
    norm: Callable[..., Any] = BatchNorm

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, valid: jax.Array | None = None) -> jax.Array:
        """Map images (n, h, w, c) to logits (n, classes)."""
        norm = partial(self.norm, use_running_average=not train, momentum=self.momentum)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        mask = None if valid is None else valid[:, None, None, None]
        x = norm(activation=nn.relu)(conv(16, (3, 3))(images), mask=mask)
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            y = norm(activation=nn.relu)(conv(features, (3, 3), stride)(x), mask=mask)
            y = conv(features, (3, 3))(y)
            shortcut = x if x.shape == y.shape else norm()(conv(features, (1, 1), stride)(x), mask=mask)
            x = norm(activation=nn.relu)(y, residual=shortcut, mask=mask)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


# By their names on the command line. A ResNet has batch norm in any case: without it nobody could train it here.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "dense": partial(Textbook, dense=(128, 64)),
    "conv": partial(Textbook, convolutions=(32,)),
    "conv64": partial(Textbook, convolutions=(32,)),
    "resnet": lambda batch_norm, **fields: ResNet(**fields),
}


def __dir__() -> list[str]:
    return __all__
