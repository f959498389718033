"""Public models of Flax, Linen's and NNX's. Each has what made trouble once; what it is stands beside it."""

from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.zoo.cases import IMAGES, Case, Model
from benchmarks.zoo.linen import Linen, draw_variables
from benchmarks.zoo.nnx import NNX, draw_model

CLASSES = 100


def _example(name: str) -> Model:
    """Return a ResNet of Flax's own examples: its norms name the axis of a ``pmap``."""
    model = getattr(import_module("flax_example_resnet"), name)(num_classes=CLASSES)
    variables = draw_variables(model, IMAGES, train=False)
    return Linen(model=model, variables=variables, axis="batch", training={"train": True}, evaluation={"train": False})


def _flaxmodels(name: str) -> Model:
    """Return a ResNet whose norm is a copy of Flax's of long ago."""
    models: Any = import_module("flaxmodels")
    model = getattr(models, name)(output="logits", pretrained=None, num_classes=CLASSES)
    variables = draw_variables(model, IMAGES, train=False)
    copied = (import_module("flaxmodels.resnet.ops").BatchNorm,)
    calls: dict[str, Any] = {"training": {"train": True}, "evaluation": {"train": False}}
    return Linen(model=model, variables=variables, also=copied, **calls)


def _jax_resnet(name: str) -> Model:
    """Return a ResNet that trains where ``batch_stats`` is mutable."""
    model = getattr(import_module("jax_resnet"), name)(n_classes=CLASSES)
    return Linen(model=model, variables=draw_variables(model, IMAGES))


def _hugging_face(name: str, **options: Any) -> Model:
    """Return a model of transformers. The layers of RegNet "y" do not pass on whether they train."""
    configs: Any = import_module("transformers")
    models = import_module(f"transformers.models.{name.lower()}.modeling_flax_{name.lower()}")
    config = getattr(configs, f"{name}Config")(num_labels=CLASSES, **options)
    model = getattr(models, f"Flax{name}ForImageClassification")(config, _do_init=False).module
    calls: dict[str, Any] = {"training": {"deterministic": False}, "evaluation": {"deterministic": True}}
    variables = draw_variables(model, IMAGES, deterministic=True)
    return Linen(model=model, variables=variables, logits=lambda y: y.logits, **calls)


def _bonsai(name: str) -> Model:
    """Return a model of NNX."""
    from flax import nnx

    models: Any = import_module(f"bonsai.models.{name.lower()}.modeling")
    if name == "EfficientNet":
        # Dropout would drop other values in float64.
        config = models.ModelConfig(**vars(models.ModelConfig.b0(CLASSES)) | {"dropout_rate": 0.0})
        model = draw_model(lambda: models.EfficientNet(config, rngs=nnx.Rngs(0)))
        return NNX(model=model, training={"training": True}, evaluation={"training": False})
    return NNX(model=draw_model(lambda: models.ResNet(models.ModelConfig.resnet50(CLASSES), rngs=nnx.Rngs(0))))


_BASIC = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
_REGNET = {"layer_type": "y", "depths": [1, 1, 2, 2], "hidden_sizes": [32, 64, 160, 384], "groups_width": 16}

CASES = (
    *(Case("flax", f"examples {name}", partial(_example, name)) for name in ("ResNet18", "ResNet50")),
    *(Case("flaxmodels", name, partial(_flaxmodels, name)) for name in ("ResNet18", "ResNet50")),
    *(Case("jax_resnet", name, partial(_jax_resnet, name)) for name in ("ResNet18", "ResNet50")),
    Case("transformers", "FlaxResNet-18", partial(_hugging_face, "ResNet", **_BASIC)),
    Case("transformers", "FlaxResNet-50", partial(_hugging_face, "ResNet")),
    Case("transformers", "FlaxRegNet-Y", partial(_hugging_face, "RegNet", **_REGNET)),
    *(Case("jax-bonsai", name, partial(_bonsai, name)) for name in ("ResNet", "EfficientNet")),
)
