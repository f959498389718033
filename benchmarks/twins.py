"""Public architectures in Flax Linen, each layer of which knows what it is called in torchvision, Keras or Haiku.

They compute what the models of these libraries compute, but for dropout and what Keras does to images first. Flax gives
the names: nothing of those of the other libraries is in them. The sizes are arguments, so that tests have small ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn.converting.convert import Library


class Truth:
    """What the layers of a model are called in another library, noted while it is called, and what its norms are there.

    ``norms`` are the options of Flax's norm, by the name of the layer there.
    """

    def __init__(self, library: str, norms: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.library, self.norms = library, norms or {}
        self.names: dict[str, str] = {}

    def note(self, layer: nn.Module, name: str) -> None:
        self.names[name] = "/".join(layer.path)


class Part(nn.Module):
    """A part of a model, whose layers are made by methods."""

    truth: Truth

    def conv(self, x: Any, name: str, features: int, size: int = 1, stride: int = 1, **options: Any) -> Any:
        """Convolve; without a padding both sides get the same one in PyTorch, the last the larger one elsewhere."""
        padding = size // 2 if self.truth.library == "torch" else "SAME"
        options = {"use_bias": False, "padding": padding, **options}
        layer = nn.Conv(features, (size, size), stride, **options)
        self.truth.note(layer, name)
        return layer(x)

    def norm(self, x: Any, name: str, train: bool, activation: Callable[..., Any] | None = None) -> Any:
        layer = nn.BatchNorm(not train, **self.truth.norms.get(name, {}))
        self.truth.note(layer, name)
        y = layer(x)
        return activation(y) if activation else y

    def dense(self, x: Any, name: str, features: int) -> Any:
        layer = nn.Dense(features)
        self.truth.note(layer, name)
        return layer(x)


class Spelling(NamedTuple):
    """The names of a ResNet; those of a block follow its own."""

    stem: tuple[str, str]
    block: Callable[[int, int], str]
    branch: Sequence[tuple[str, str]]
    shortcut: tuple[str, str]
    dense: str


RESNETS = {
    "torch": Spelling(
        ("conv1", "bn1"),
        lambda stage, block: f"layer{stage + 1}.{block}.",
        [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)],
        ("downsample.0", "downsample.1"),
        "fc",
    ),
    "keras": Spelling(
        ("conv1_conv", "conv1_bn"),
        lambda stage, block: f"conv{stage + 2}_block{block + 1}_",
        [(f"{i}_conv", f"{i}_bn") for i in (1, 2, 3)],
        ("0_conv", "0_bn"),
        "predictions",
    ),
    "haiku": Spelling(
        ("res_net50/~/initial_conv", "res_net50/~/initial_batchnorm"),
        lambda stage, block: f"res_net50/~/block_group_{stage}/~/block_{block}/~/",
        [(f"conv_{i}", f"batchnorm_{i}") for i in range(3)],
        ("shortcut_conv", "shortcut_batchnorm"),
        "res_net50/~/logits",
    ),
}


class Bottleneck(Part):
    """A residual block, whose shortcut has a convolution and a norm where it ``projects``."""

    at: str
    projects: bool
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        library, spelling = self.truth.library, RESNETS[self.truth.library]
        y, wide, bias = x, 4 * self.features, library == "keras"
        strides = (self.stride, 1, 1) if library == "keras" else (1, self.stride, 1)
        shapes = zip((self.features, self.features, wide), (1, 3, 1), strides, strict=True)
        for i, ((conv, norm), shape) in enumerate(zip(spelling.branch, shapes, strict=True)):
            y = self.conv(y, self.at + conv, *shape, use_bias=bias)
            y = self.norm(y, self.at + norm, train, nn.relu if i < 2 else None)
        if self.projects:
            conv, norm = spelling.shortcut
            x = self.conv(x, self.at + conv, wide, 1, self.stride, use_bias=bias)
            x = self.norm(x, self.at + norm, train)
        return nn.relu(x + y)


class ResNet(Part):
    """ResNet of bottlenecks, of torchvision, Keras or Haiku."""

    depths: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        library, spelling = self.truth.library, RESNETS[self.truth.library]
        padding, border = ("SAME", "SAME") if library == "haiku" else (3, ((1, 1), (1, 1)))
        conv, norm = spelling.stem
        x = self.conv(x, conv, self.width, 7, 2, use_bias=library == "keras", padding=padding)
        x = nn.max_pool(self.norm(x, norm, train, nn.relu), (3, 3), (2, 2), border)
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                at, stride = spelling.block(stage, block), 2 if stage and not block else 1
                x = Bottleneck(self.truth, at, not block, self.width * 2**stage, stride)(x, train)
        return self.dense(x.mean((1, 2)), spelling.dense, self.classes)


class InvertedResidual(Part):
    """A block of MobileNetV2 or EfficientNet; without a name for a part it has none."""

    names: Sequence[tuple[str, str] | None]  # of expansion, depthwise convolution, squeeze and excitation, projection
    features: int
    wide: int
    size: int
    stride: int
    activation: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        expansion, depthwise, squeeze, projection = self.names
        y, act = x, self.activation
        if expansion:
            y = self.norm(self.conv(y, expansion[0], self.wide), expansion[1], train, act)
        assert depthwise
        assert projection
        y = self.conv(y, depthwise[0], self.wide, self.size, self.stride, feature_group_count=self.wide)
        y = self.norm(y, depthwise[1], train, act)
        if squeeze:
            s = y.mean((1, 2), keepdims=True)
            s = act(self.conv(s, squeeze[0], max(1, x.shape[-1] // 4), use_bias=True))
            y = y * nn.sigmoid(self.conv(s, squeeze[1], self.wide, use_bias=True))
        y = self.norm(self.conv(y, projection[0], self.features), projection[1], train)
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
SEPARABLE = (  # features, stride
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
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
    """MobileNetV2, or EfficientNet with ``squeeze``, of torchvision or Keras."""

    squeeze: bool
    stages: Sequence[tuple[int, int, int, int, int]]
    top: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        act = nn.silu if self.squeeze else nn.relu6
        stem, top, dense = self._ends()
        x = self.norm(self.conv(x, stem[0], 32, 3, 2), stem[1], train, act)
        number = 0
        for stage, (expansion, features, depth, size, stride) in enumerate(self.stages):
            for block in range(depth):
                wide, number = x.shape[-1] * expansion, number + 1
                names = self._block(stage, block, number, expansion > 1)
                step = 1 if block else stride
                x = InvertedResidual(self.truth, names, features, wide, size, step, act)(x, train)
        x = self.norm(self.conv(x, top[0], self.top), top[1], train, act)
        return self.dense(x.mean((1, 2)), dense, self.classes)

    def _ends(self) -> tuple[tuple[str, str], tuple[str, str], str]:
        if self.truth.library == "torch":
            last = f"features.{1 + (len(self.stages) if self.squeeze else sum(stage[2] for stage in self.stages))}"
            return ("features.0.0", "features.0.1"), (f"{last}.0", f"{last}.1"), "classifier.1"
        if self.squeeze:
            return ("stem_conv", "stem_bn"), ("top_conv", "top_bn"), "predictions"
        return ("Conv1", "bn_Conv1"), ("Conv_1", "Conv_1_bn"), "predictions"

    def _block(self, stage: int, block: int, number: int, expands: bool) -> list[tuple[str, str] | None]:
        torch, i = self.truth.library == "torch", int(expands)
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
    def __call__(self, x: Any, train: bool = False) -> Any:
        y = self.conv(self.norm(x, f"{self.at}.norm1", train, nn.relu), f"{self.at}.conv1", 4 * self.growth)
        return self.conv(self.norm(y, f"{self.at}.norm2", train, nn.relu), f"{self.at}.conv2", self.growth, 3)


class DenseNet(Part):
    """DenseNet of torchvision."""

    depths: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = self.conv(x, "features.conv0", 2 * self.growth, 7, 2)
        x = nn.max_pool(self.norm(x, "features.norm0", train, nn.relu), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, depth in enumerate(self.depths, 1):
            for k in range(depth):
                y = DenseLayer(self.truth, f"features.denseblock{i}.denselayer{k + 1}", self.growth)(x, train)
                x = jnp.concatenate([x, y], -1)
            if i < len(self.depths):
                at = f"features.transition{i}"
                x = self.conv(self.norm(x, f"{at}.norm", train, nn.relu), f"{at}.conv", x.shape[-1] // 2)
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = self.norm(x, "features.norm5", train, nn.relu)
        return self.dense(x.mean((1, 2)), "classifier", self.classes)


class Separable(Part):
    """MobileNetV1 of Haiku: stages of features and strides."""

    stages: Sequence[tuple[int, int]]
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        root = "mobile_net_v1"
        x = self.conv(x, f"{root}/conv2_d", 32, 3, 2, padding="VALID")
        x = self.norm(x, f"{root}/batch_norm", train, nn.relu)
        for number, (features, stride) in enumerate(self.stages):
            at, wide = f"{root}/{root}_block{f'_{number}' if number else ''}", x.shape[-1]
            x = self.conv(x, f"{at}/depthwise_conv", wide, 3, stride, feature_group_count=wide, padding=1)
            x = self.norm(x, f"{at}/batch_norm", train, nn.relu)
            x = self.norm(self.conv(x, f"{at}/pointwise_conv", features), f"{at}/batch_norm_1", train, nn.relu)
        return self.dense(x.mean((1, 2)), f"{root}/logits", self.classes)


# By what they are called on the command line: the library, the name there, and what makes the twin.
TWINS: dict[str, tuple[Library, str, Callable[[Truth], Part]]] = {
    "resnet50": ("torch", "resnet50", ResNet),
    "mobilenet_v2": ("torch", "mobilenet_v2", lambda truth: Mobile(truth, False, MOBILE)),
    "efficientnet_b0": ("torch", "efficientnet_b0", lambda truth: Mobile(truth, True, EFFICIENT)),
    "densenet121": ("torch", "densenet121", DenseNet),
    "ResNet50": ("keras", "ResNet50", ResNet),
    "MobileNetV2": ("keras", "MobileNetV2", lambda truth: Mobile(truth, False, MOBILE)),
    "EfficientNetB0": ("keras", "EfficientNetB0", lambda truth: Mobile(truth, True, EFFICIENT)),
    "hk.ResNet50": ("haiku", "ResNet50", ResNet),
    "hk.MobileNetV1": ("haiku", "MobileNetV1", lambda truth: Separable(truth, SEPARABLE)),
}


def shapes(model: Part, size: int = 32) -> tuple[Any, Any]:
    """Return the shapes of the variables of a model, and of x; its truth is full then."""
    x = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), x), x
