"""Models of torchvision, of keras.applications and of Haiku, with random weights, behind one interface.

PyTorch, torchvision (of which ``pip install --no-deps torchvision`` will do), Keras and Haiku are imported when a model
of theirs is asked for.
"""

import os
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")  # before anything imports Keras

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from jbn.converting.convert import Library


@dataclass(frozen=True)
class Source:
    """A model of another library.

    Attributes:
        tree: what ``jbn.convert`` takes.
        norms: the options of Flax's norm for each of its norms.
        logits: a function of images, features last, that evaluates it.
    """

    tree: Any
    norms: Mapping[str, Mapping[str, Any]]
    logits: Callable[[np.ndarray], np.ndarray]


class Draw:
    """It moves arrays away from what they start as, so that a swapped pair is seen."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def scale(self, old: Any) -> Any:
        return self.rng.uniform(0.6, 1.5, old.shape).astype(old.dtype)

    def bias(self, old: Any) -> Any:
        return self.rng.normal(0, 0.2, old.shape).astype(old.dtype)

    def statistics(self, mean: Any, var: Any) -> tuple[Any, Any]:
        """Move the mean of a batch towards 0, and take the mean square about it: what follows stays of order one.

        With the statistics of the batch themselves the examples of a random network, which are more alike from layer
        to layer, are spread out again by each norm, and so are rounding errors.
        """
        mean, var = np.asarray(mean), np.asarray(var)
        moved = mean / 4 + self.bias(mean) * np.sqrt(var)
        return moved, (var + (mean - moved) ** 2) * np.sqrt(self.scale(var))


def translate(options: Any, library: Library) -> dict[str, Any]:
    """Return the options of a norm for Flax's own, whose running variance is never that of a sample."""
    return {name: value for name, value in jbn.convert_options(options, library, "linen").items() if name != "unbiased"}


def import_torchvision() -> Any:
    """Return the models of torchvision.

    A torchvision that was built for another torch cannot load its operators in C++, and asks for their declarations. No
    model here calls one of them.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            return import_module("torchvision.models")
        except RuntimeError as error:
            lacking = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not lacking:
                raise
            library.define(f"{lacking[1]}(Tensor x) -> Tensor")
            for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
                del sys.modules[module]


def read_torchvision(name: str, images: np.ndarray | None = None) -> Source:
    """Return a model of torchvision; with images its scales, biases and statistics are random."""
    models = import_torchvision()
    import torch

    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    norms = {path: layer for path, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    options = {path: translate(layer, "torch") for path, layer in norms.items()}

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(model(torch.from_numpy(np.moveaxis(images, -1, 1).copy())))

    def randomize(images: np.ndarray) -> None:
        draw = Draw()
        for name, value in model.named_parameters():
            if value.ndim == 1:
                move = draw.scale if name.endswith("weight") else draw.bias
                value.data = torch.from_numpy(move(value.detach().numpy()))
        for layer in norms.values():
            layer.momentum = 1.0
        run(images)
        for path, layer in norms.items():
            layer.momentum = 1 - options[path]["momentum"]
            mean, var = draw.statistics(layer.running_mean, layer.running_var)
            layer.running_mean[:], layer.running_var[:] = torch.from_numpy(mean), torch.from_numpy(var)

    if images is not None:
        randomize(images)
    model.eval()
    return Source(model.state_dict(), options, run)


def read_keras(name: str, images: np.ndarray | None = None) -> Source:
    """Return a model of keras.applications; with images its scales, biases and statistics are random."""
    import keras

    keras.utils.set_random_seed(0)
    shape = {} if images is None else {"input_shape": images.shape[1:]}
    model = getattr(keras.applications, name)(weights=None, classifier_activation=None, **shape)
    norms = {layer.name: layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
    options = {path: translate(layer, "keras") for path, layer in norms.items()}
    # The twins begin after what divides images by 255.
    factor = next((1 / layer.scale for layer in model.layers if isinstance(layer, keras.layers.Rescaling)), 1)

    def randomize(images: np.ndarray) -> None:
        draw, others = Draw(), model.non_trainable_variables
        for weight in model.trainable_weights:
            if weight.value.ndim == 1:
                weight.assign((draw.scale if weight.name == "gamma" else draw.bias)(weight.value))
        for layer in norms.values():
            layer.momentum = 0.0
        values = [[variable.value for variable in kind] for kind in (model.trainable_variables, others)]
        _, moved = jax.jit(partial(model.stateless_call, training=True))(*values, images * factor)
        for variable, value in zip(others, moved, strict=True):
            variable.assign(value)
        for path, layer in norms.items():
            layer.momentum = options[path]["momentum"]
            mean, var = draw.statistics(layer.moving_mean.value, layer.moving_variance.value)
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(var)

    if images is not None:
        randomize(images)
    tree = {weight.path: np.asarray(weight.value) for weight in model.weights}
    return Source(tree, options, lambda images: np.asarray(model.predict_on_batch(images * factor)))


def read_haiku(name: str, images: np.ndarray | None = None) -> Source:
    """Return a model of ``hk.nets``; with images its scales, biases and statistics are random."""
    import haiku as hk

    options: dict[str, dict[str, Any]] = {}

    def note(method: Any, args: tuple[Any, ...], given: dict[str, Any], context: Any) -> Any:
        result = method(*args, **given)
        if isinstance(context.module, hk.BatchNorm) and context.method_name == "__init__":
            known = {
                name: given[name] for name in ("create_scale", "create_offset", "decay_rate", "eps") if name in given
            }
            options[context.module.module_name] = translate(known, "haiku")
        return result

    def call(x: Any, train: bool) -> Any:
        with hk.intercept_methods(note):
            return getattr(hk.nets, name)(num_classes=1000)(x, train)

    model = hk.transform_with_state(call)
    x = jnp.zeros((1, 64, 64, 3)) if images is None else jnp.asarray(images)
    order: list[str] = []

    def start(x: Any) -> Any:
        params, state = model.init(jax.random.key(0), x, True)
        order[:] = params
        return params, state

    params, state = jax.jit(start)(x)
    params = {module: params[module] for module in order}  # which a transformation sorts
    if images is not None:
        draw = Draw()
        for module in params.values():
            if "w" in module and not np.any(module["w"]):  # the dense layer of a ResNet starts as zeros
                module["w"] = draw.bias(module["w"])
            for array, move in (("scale", draw.scale), ("offset", draw.bias), ("b", draw.bias)):
                if array in module:
                    module[array] = move(module[array])
        _, state = jax.jit(lambda params, state, x: model.apply(params, state, None, x, True))(params, state, x)
        for path in options:
            mean, var = (state[f"{path}/~/{average}_ema"] for average in ("mean", "var"))
            mean["average"], var["average"] = draw.statistics(mean["average"], var["average"])
    evaluate = jax.jit(lambda params, state, x: model.apply(params, state, None, x, False)[0])
    return Source((params, state), options, lambda images: np.asarray(evaluate(params, state, images)))


READERS: dict[Library, Callable[..., Source]] = {
    "torch": read_torchvision,
    "keras": read_keras,
    "haiku": read_haiku,
}
