"""ResNet-50 in plain Flax, once in Linen and once in NNX: the network into which measurements and tests put jbn.

Version 1.5, in which the 3×3 convolution of a block has its stride: 53 norms, 25 557 032 parameters. Source: K. He and
others, "Deep Residual Learning for Image Recognition", 2015; P. Goyal and others, "Accurate, Large Minibatch SGD",
2017, for the scales of 0 at the end of each block.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

NORMS = 53


class Sizes(NamedTuple):
    """What a test makes smaller: ``Sizes(width=8, classes=10)``."""

    stages: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each
    width: int = 64  # features of the stem
    classes: int = 1000
    dtype: DTypeLike = jnp.float32  # of the arithmetic
    param_dtype: DTypeLike = jnp.float32

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield features and stride of each block, in order."""
        for stage, length in enumerate(self.stages):
            for block in range(length):
                yield self.width * 2**stage, 2 if stage and not block else 1

    def dtypes(self) -> dict[str, Any]:
        """Return the options that every layer gets."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


FULL = Sizes()


def pool(x: Array) -> Array:
    """Take the largest of 3×3 positions, at every second one."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


def activated(norm: Callable[..., Any], fused: bool, **options: Any) -> Callable[[Array], Array]:
    """Return a norm with a ReLU, inside it or after it."""
    if fused:
        return norm(activation=nn.relu, **options)
    layer = norm(**options)
    return lambda x: nn.relu(layer(x))


class Bottleneck(nn.Module):
    """A block in Linen: 1×1, 3×3 and 1×1 convolutions beside a shortcut."""

    features: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    fused: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        strides, wide = (self.stride,) * 2, 4 * self.features
        y = activated(self.norm, self.fused)(self.conv(self.features, (1, 1))(x))
        y = activated(self.norm, self.fused)(self.conv(self.features, (3, 3), strides)(y))
        y = self.conv(wide, (1, 1))(y)
        last = partial(self.norm, scale_init=nn.initializers.zeros)
        y = y if self.fused else last()(y)
        if x.shape != y.shape:
            x = self.norm(name="norm_shortcut")(self.conv(wide, (1, 1), strides, name="shortcut")(x))
        return last(activation=nn.relu)(y, residual=x) if self.fused else nn.relu(x + y)


class ResNet50(nn.Module):
    """The network in Linen, for images (n, h, w, c); jbn's norm can do the ReLUs and the additions too: ``fused``."""

    sizes: Sizes = FULL
    norm: Callable[..., Any] = nn.BatchNorm
    fused: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Return logits (n, classes)."""
        dtypes = self.sizes.dtypes()
        conv: Callable[..., Any] = partial(nn.Conv, use_bias=False, **dtypes)
        norm = partial(self.norm, use_running_average=not train, momentum=0.9, **dtypes)
        x = conv(self.sizes.width, (7, 7), (2, 2), padding=[(3, 3)] * 2, name="stem")(x)
        x = pool(activated(norm, self.fused, name="norm_stem")(x))
        for features, stride in self.sizes.blocks():
            x = Bottleneck(features, stride, conv, norm, self.fused)(x)
        return nn.Dense(self.sizes.classes, name="head", **dtypes)(x.mean((1, 2)))


class NNXBottleneck(nnx.Module):
    """A block in NNX."""

    def __init__(
        self, given: int, features: int, stride: int, conv: Callable[..., Any], norm: Callable[..., Any]
    ) -> None:
        strides, wide = (stride,) * 2, 4 * features
        self.conv1, self.norm1 = conv(given, features, (1, 1)), norm(features)
        self.conv2, self.norm2 = conv(features, features, (3, 3), strides), norm(features)
        self.conv3, self.norm3 = conv(features, wide, (1, 1)), norm(wide, scale_init=nnx.initializers.zeros)
        changes = stride > 1 or given != wide
        self.shortcut: Any = conv(given, wide, (1, 1), strides) if changes else None
        self.norm_shortcut: Any = norm(wide) if changes else None

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.shortcut is not None:
            x = self.norm_shortcut(self.shortcut(x))
        return nnx.relu(x + y)


class NNXResNet50(nnx.Module):
    """The network in NNX, for images (n, h, w, 3); ``train()`` and ``eval()`` switch it."""

    def __init__(self, sizes: Sizes = FULL, norm: Callable[..., Any] = nnx.BatchNorm, *, rngs: nnx.Rngs) -> None:
        dtypes = {**sizes.dtypes(), "rngs": rngs}
        conv: Callable[..., Any] = partial(nnx.Conv, use_bias=False, **dtypes)
        norm = partial(norm, momentum=0.9, **dtypes)
        self.stem, self.norm_stem = conv(3, sizes.width, (7, 7), (2, 2), padding=[(3, 3)] * 2), norm(sizes.width)
        blocks, given = [], sizes.width
        for features, stride in sizes.blocks():
            blocks.append(NNXBottleneck(given, features, stride, conv, norm))
            given = 4 * features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(given, sizes.classes, **dtypes)

    def __call__(self, x: Array) -> Array:
        """Return logits (n, classes)."""
        x = pool(nnx.relu(self.norm_stem(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))
