"""Public architectures in Flax Linen, each layer of which knows what it is called in torchvision or in Keras.

Flax gives the names: nothing of those of the other libraries is in them. The sizes are arguments, so that tests have
small ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Truth:
    """What the layers of a model are called elsewhere, noted while it is called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def note(self, layer: nn.Module, name: str) -> None:
        self.names[name] = "/".join(layer.path)


class Part(nn.Module):
    """A part of a model, whose layers are made by methods."""

    truth: Truth

    def conv(self, x: Any, name: str, features: int, size: int = 1, stride: int = 1, **options: Any) -> Any:
        layer = nn.Conv(features, (size, size), stride, padding=size // 2, **{"use_bias": False, **options})
        self.truth.note(layer, name)
        return layer(x)

    def norm(self, x: Any, name: str, activation: Callable[..., Any] | None = None) -> Any:
        layer = nn.BatchNorm(use_running_average=True)
        self.truth.note(layer, name)
        y = layer(x)
        return activation(y) if activation else y

    def dense(self, x: Any, name: str, features: int) -> Any:
        layer = nn.Dense(features)
        self.truth.note(layer, name)
        return layer(x)


class Bottleneck(Part):
    """A residual block: the convolutions and norms of its branch, and those of the shortcut if it has some."""

    branch: Sequence[tuple[str, str]]
    shortcut: tuple[str, str] | None
    features: int
    stride: int
    bias: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y, wide = x, 4 * self.features
        sizes = (self.features, 1, self.stride), (self.features, 3, 1), (wide, 1, 1)
        for (conv, norm), size, last in zip(self.branch, sizes, (False, False, True), strict=True):
            y = self.norm(self.conv(y, conv, *size, use_bias=self.bias), norm, None if last else nn.relu)
        if self.shortcut:
            x = self.norm(self.conv(x, self.shortcut[0], wide, 1, self.stride, use_bias=self.bias), self.shortcut[1])
        return nn.relu(x + y)


class ResNet(Part):
    """ResNet of bottlenecks, as torchvision or Keras name it."""

    library: str
    depths: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any) -> Any:
        torch = self.library == "torch"
        stem = ("conv1", "bn1") if torch else ("conv1_conv", "conv1_bn")
        x = self.norm(self.conv(x, stem[0], self.width, 7, 2, use_bias=not torch), stem[1], nn.relu)
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                at = f"layer{stage + 1}.{block}." if torch else f"conv{stage + 2}_block{block + 1}_"
                branch = [
                    (f"{at}conv{i}", f"{at}bn{i}") if torch else (f"{at}{i}_conv", f"{at}{i}_bn") for i in (1, 2, 3)
                ]
                shortcut = (f"{at}downsample.0", f"{at}downsample.1") if torch else (f"{at}0_conv", f"{at}0_bn")
                stride = 2 if stage and not block else 1
                x = Bottleneck(
                    self.truth, branch, None if block else shortcut, self.width * 2**stage, stride, not torch
                )(x)
        return self.dense(x.mean((1, 2)), "fc" if torch else "predictions", self.classes)


class InvertedResidual(Part):
    """A block of MobileNetV2 or EfficientNet; without a name for a part it has none."""

    names: Sequence[tuple[str, str] | None]  # of expansion, depthwise convolution, squeeze and excitation, projection
    features: int
    wide: int
    size: int
    stride: int
    activation: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        expansion, depthwise, squeeze, projection = self.names
        y, act = x, self.activation
        if expansion:
            y = self.norm(self.conv(y, expansion[0], self.wide), expansion[1], act)
        assert depthwise
        assert projection
        y = self.conv(y, depthwise[0], self.wide, self.size, self.stride, feature_group_count=self.wide)
        y = self.norm(y, depthwise[1], act)
        if squeeze:
            s = y.mean((1, 2), keepdims=True)
            s = act(self.conv(s, squeeze[0], max(1, x.shape[-1] // 4), use_bias=True))
            y = y * nn.sigmoid(self.conv(s, squeeze[1], self.wide, use_bias=True))
        y = self.norm(self.conv(y, projection[0], self.features), projection[1])
        return x + y if x.shape == y.shape else y


# Expansion, features, depth, size of the window, stride.
MOBILE = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 32, 3, 3, 2),
    (6, 64, 4, 3, 2),
    (6, 96, 3, 3, 1),
    (6, 160, 3, 3, 2),
    (6, 320, 1, 3, 1),
)
EFFICIENT = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)


class Mobile(Part):
    """MobileNetV2, or EfficientNet with ``squeeze``, as torchvision or Keras name them."""

    library: str
    squeeze: bool
    stages: Sequence[tuple[int, int, int, int, int]]
    top: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any) -> Any:
        act = nn.silu if self.squeeze else nn.relu6
        stem, top, dense = self._ends()
        x = self.norm(self.conv(x, stem[0], 32, 3, 2), stem[1], act)
        number = 0
        for stage, (expansion, features, depth, size, stride) in enumerate(self.stages):
            for block in range(depth):
                wide, number = x.shape[-1] * expansion, number + 1
                names = self._block(stage, block, number, expansion > 1)
                step = 1 if block else stride
                x = InvertedResidual(self.truth, names, features, wide, size, step, act)(x)
        x = self.norm(self.conv(x, top[0], self.top), top[1], act)
        return self.dense(x.mean((1, 2)), dense, self.classes)

    def _ends(self) -> tuple[tuple[str, str], tuple[str, str], str]:
        if self.library == "torch":
            last = f"features.{1 + (len(self.stages) if self.squeeze else sum(stage[2] for stage in self.stages))}"
            return ("features.0.0", "features.0.1"), (f"{last}.0", f"{last}.1"), "classifier.1"
        if self.squeeze:
            return ("stem_conv", "stem_bn"), ("top_conv", "top_bn"), "predictions"
        return ("Conv1", "bn_Conv1"), ("Conv_1", "Conv_1_bn"), "predictions"

    def _block(self, stage: int, block: int, number: int, expands: bool) -> list[tuple[str, str] | None]:
        torch, i = self.library == "torch", int(expands)
        if torch and self.squeeze:
            at = f"features.{stage + 1}.{block}.block."
            plain = [(f"{at}{k}.0", f"{at}{k}.1") for k in range(i + 3)]
            return [plain[0] if expands else None, plain[i], (f"{at}{i + 1}.fc1", f"{at}{i + 1}.fc2"), plain[i + 2]]
        if torch:
            at = f"features.{number}.conv."
            expansion = (f"{at}0.0", f"{at}0.1") if expands else None
            return [expansion, (f"{at}{i}.0", f"{at}{i}.1"), None, (f"{at}{i + 1}", f"{at}{i + 2}")]
        if self.squeeze:
            at = f"block{stage + 1}{'abcdef'[block]}_"
            expansion = (f"{at}expand_conv", f"{at}expand_bn") if expands else None
            squeeze = f"{at}se_reduce", f"{at}se_expand"
            return [expansion, (f"{at}dwconv", f"{at}bn"), squeeze, (f"{at}project_conv", f"{at}project_bn")]
        at = f"block_{number - 1}_" if number > 1 else "expanded_conv_"
        expansion = (f"{at}expand", f"{at}expand_BN") if expands else None
        return [expansion, (f"{at}depthwise", f"{at}depthwise_BN"), None, (f"{at}project", f"{at}project_BN")]


class DenseLayer(Part):
    """A layer of a dense block."""

    at: str
    growth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = self.conv(self.norm(x, f"{self.at}.norm1", nn.relu), f"{self.at}.conv1", 4 * self.growth)
        return self.conv(self.norm(y, f"{self.at}.norm2", nn.relu), f"{self.at}.conv2", self.growth, 3)


class DenseNet(Part):
    """DenseNet as torchvision names it."""

    depths: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.norm(self.conv(x, "features.conv0", 2 * self.growth, 7, 2), "features.norm0", nn.relu)
        for i, depth in enumerate(self.depths, 1):
            for k in range(depth):
                y = DenseLayer(self.truth, f"features.denseblock{i}.denselayer{k + 1}", self.growth)(x)
                x = jnp.concatenate([x, y], -1)
            if i < len(self.depths):
                at = f"features.transition{i}"
                x = self.conv(self.norm(x, f"{at}.norm", nn.relu), f"{at}.conv", x.shape[-1] // 2)
        x = self.norm(x, "features.norm5", nn.relu)
        return self.dense(x.mean((1, 2)), "classifier", self.classes)


def shapes(model: Part, size: int = 32) -> tuple[Any, Any]:
    """Return the shapes of the variables of a model, and of x; its truth is full then."""
    x = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), x), x
