"""Are the names that propose themselves right? ``python -m benchmarks.names [MODEL ...]``.

Models of torchvision and of keras.applications, with random weights, and their twins in Flax (`benchmarks.twins`), each
layer of which knows its name there: how many pairs are right, ambiguous, and wrong without a word. It needs Keras,
PyTorch and torchvision, of which ``pip install --no-deps torchvision`` will do.
"""

import os
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")  # before anything imports Keras

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import jbn
from benchmarks.twins import EFFICIENT, MOBILE, DenseNet, Mobile, Part, ResNet, Truth, shapes
from jbn.converting.convert import Library

TWINS: dict[str, tuple[Library, Callable[[Truth], Part]]] = {
    "resnet50": ("torch", lambda truth: ResNet(truth, "torch")),
    "efficientnet_b0": ("torch", lambda truth: Mobile(truth, "torch", True, EFFICIENT)),
    "mobilenet_v2": ("torch", lambda truth: Mobile(truth, "torch", False, MOBILE)),
    "densenet121": ("torch", lambda truth: DenseNet(truth)),
    "ResNet50": ("keras", lambda truth: ResNet(truth, "keras")),
    "EfficientNetB0": ("keras", lambda truth: Mobile(truth, "keras", True, EFFICIENT)),
    "MobileNetV2": ("keras", lambda truth: Mobile(truth, "keras", False, MOBILE)),
}


def read_torchvision(name: str) -> Any:
    """Return the arrays of a model of torchvision.

    A torchvision that was built for another torch cannot load its operators in C++, and asks for their declarations. No
    model here calls one of them.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            models = import_module("torchvision.models")
            return models.get_model(name, weights=None).state_dict()
        except RuntimeError as error:
            lacking = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not lacking:
                raise
            library.define(f"{lacking[1]}(Tensor x) -> Tensor")
            for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
                del sys.modules[module]


def read_keras(name: str) -> Any:
    """Return the arrays of a model of keras.applications."""
    import keras

    model = getattr(keras.applications, name)(weights=None)
    return {weight.path: np.asarray(weight.value) for weight in model.weights}


def measure(name: str) -> dict[str, Any]:
    """Propose the names of a model, and hold them against those that its twin knows."""
    library, make = TWINS[name]
    tree = (read_torchvision if library == "torch" else read_keras)(name)
    truth = Truth()
    model = make(truth)
    like, x = shapes(model)
    proposal = jbn.propose_names(tree, library, "linen", x, like=like, call=model.apply)
    known = {match.source: match for match in proposal.matches}
    right = {old: known[old].target == new for old, new in truth.names.items()}
    jbn.convert(  # which raises if the twin is none
        tree, library, "linen", like=like, names=lambda path: truth.names.get(path), kinds=proposal.kinds or None
    )
    others = [old for old in known if old not in truth.names]
    return {
        "model": name,
        "layers": len(truth.names),
        "certain": sum(known[old].certain and fits for old, fits in right.items()),
        "wrong": [old for old, fits in right.items() if not fits and known[old].certain],
        "ambiguous": sum(not known[old].certain for old in right),
        "guessed": sum(not known[old].certain and fits for old, fits in right.items()),
        "left out": others,
        "wrongly taken": [old for old in others if known[old].target is not None],
    }


def main(models: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(TWINS)}.")] = None) -> None:
    """Print how many of the names that are proposed for public models are right."""
    table = Table(
        "model", "layers", "certain and right", "certain and wrong", "ambiguous", "of them guessed right", "left out"
    )
    for name in models or TWINS:
        row = measure(name)
        wrong = ", ".join(row["wrong"] + row["wrongly taken"]) or "0"
        figures = row["layers"], row["certain"], wrong, row["ambiguous"], row["guessed"], ", ".join(row["left out"])
        table.add_row(name, *map(str, figures))
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
