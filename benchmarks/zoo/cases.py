"""A public model, and what is measured of it whatever library it is written with."""

import importlib.metadata
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jbn.folding.links import Folds
from jbn.observing.diagnose import Diagnosis

IMAGES = (16, 64, 64, 3)
"""A batch of which the last norms of a network that halves images five times see 64 values per channel."""

ABSENT = "not installed"
"""The version of a package that is not there."""


@dataclass(frozen=True)
class Functions:
    """A model as pure functions.

    Attributes:
        params: its parameters.
        others: its other arrays, such as running statistics.
        evaluate: of params, others and images; returns logits.
        train: likewise; the new statistics are lost.
    """

    params: Any
    others: Any
    evaluate: Callable[[Any, Any, Any], Any]
    train: Callable[[Any, Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Model(ABC):
    """A model with its arrays, and how it is called. `benchmarks.zoo.linen` and `benchmarks.zoo.nnx` say the rest.

    Attributes:
        shape: that of a batch of images.
        training: keyword arguments of a call in training.
        evaluation: those in evaluation.
        also: the norm classes that it has copied from Flax.
        logits: takes the logits out of what the call returns.
        images: for a model that came from another library, a batch, and what it returns for it there.
        source: its logits for them.
    """

    shape: tuple[int, ...] = IMAGES
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    also: Sequence[type] = ()
    logits: Callable[[Any], Any] = lambda y: y
    images: np.ndarray | None = None
    source: np.ndarray | None = None

    @abstractmethod
    def count(self) -> int:
        """Return the number of norms, of whatever class."""

    @abstractmethod
    def functions(self) -> Functions:
        """Return the model as it came."""

    @abstractmethod
    def widen(self) -> Functions:
        """Return the model as it came, in float64 throughout; to be called where that is enabled."""

    @abstractmethod
    def replace(self) -> tuple[Functions, int]:
        """Return the model inside ``replace``, and the number of norms that it takes."""

    @abstractmethod
    def fold(self, x: np.ndarray) -> tuple[Functions, Folds]:
        """Return the folded model, which cannot train."""

    @abstractmethod
    def diagnose(self, x: np.ndarray) -> Diagnosis:
        """Diagnose the model."""

    @abstractmethod
    def recalibrate(self, batches: Sequence[np.ndarray]) -> tuple[Any, Any]:
        """Return the statistics before and after."""

    @abstractmethod
    def freeze(self, x: np.ndarray) -> tuple[Any, int, Any, Any]:
        """Call the frozen model in training; return logits, the number of frozen norms, statistics before and after."""


@dataclass(frozen=True)
class Case:
    """A public model.

    Attributes:
        package: the distribution that has it.
        model: what it is called there.
        build: makes it; imports the package.
    """

    package: str
    model: str
    build: Callable[[], Model]

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return f"{self.package}/{self.model}"

    @property
    def version(self) -> str:
        """The version of the package, or the commit where it was installed from one; `ABSENT` without the package."""
        try:
            found = importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ABSENT
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", "")[:9]
        return commit or found.version.partition("+")[0]


def draw(shape: Sequence[int], seed: int) -> np.ndarray:
    """Draw a batch of images."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fill(name: str, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw an array of a model by its name, so that every norm scales, shifts and remembers something.

    Kernels keep the sizes of what they are given, as those of LeCun do: the arrays of a norm would not be seen
    beside numbers that grow from layer to layer.
    """
    z = rng.standard_normal(shape)
    of_norm = {"mean": 0.1 * z, "var": rng.uniform(0.5, 1.5, shape), "scale": 1 + 0.1 * z, "bias": 0.1 * z}
    return np.asarray(of_norm.get(name, z / math.sqrt(max(1, math.prod(shape[:-1])))), np.float32)


def widen(tree: Any) -> Any:
    """Return arrays of floats in float64."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if np.issubdtype(a.dtype, np.floating) else a, tree)
