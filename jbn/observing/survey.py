"""What the layers of a model see when it runs, asked through their states: count, mean and variance of their rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core.checks import COUNTS, FLOATS
from jbn.core.state import Observation, Upstream
from jbn.paths import ArrayTree, Keys, flatten, join, name_few

Vector = np.ndarray[Any, np.dtype[np.float64]]

Batch: TypeAlias = Annotated[Any, "what a model is called with once"]
"""What a model is called with once: an array, or any tree of them."""

Apply: TypeAlias = Callable[[ArrayTree, ArrayTree, Batch], ArrayTree]
"""``apply(params, state, batch)``, which runs a model as in training and returns its new state."""

_FOREIGN = (
    "gave no moments; expected every layer to call jbn.bn_forward and to return what it returns. Flax's own layers do "
    "in the tools of jbn.linen and jbn.nnx, inside jbn.linen.replace() and after jbn.nnx.replace(model); copies of "
    "their class where one of these is told so: also=(Class,). Nothing may be exported or compiled ahead of time."
)
_IDLE = (
    "gave no moments: in this call they evaluate, or it does not reach them. Expected a call as in training: with the "
    "flag of the model, such as train=True or use_running_average=False, and not all of its layers frozen."
)
_AVERAGED = (
    "returned statistics that were averaged over shards, and those of all their rows do not follow from averages. "
    "Expected one of two: the layer shares statistics, by axis_name, or it returns those of a shard. Leave "
    "jax.lax.pmean of the state out of apply."
)


@dataclass(frozen=True, order=True)
class Layer:
    """Where the statistics of a layer are among the leaves of the state."""

    keys: Keys
    mean: int
    var: int
    count: int | None = field(default=None, compare=False)  # of its updates, where the state counts them

    @property
    def path(self) -> str:
        """The keys, for a message."""
        return join(self.keys) or "the layer"


class ForeignLayers(ValueError):
    """Layers whose code is not jbn's, so that they cannot be observed."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__(f"{name_few(layer.path for layer in layers)} {_FOREIGN}")
        self.layers = layers


@dataclass(frozen=True)
class Statistics:
    """The running statistics of a layer, in float64."""

    mean: Vector
    var: Vector


@dataclass(frozen=True)
class Seen:
    """The moments of the rows that a layer has seen, in float64, and in how many calls."""

    count: Vector
    mean: Vector
    var: Vector
    updates: Vector

    @property
    def is_alone(self) -> bool:
        """Whether there was, on average, no second row beside any."""
        return bool((self.count <= self.updates).all())

    def merge(self, other: "Seen") -> "Seen":
        """Return the moments of both, as ``jbn.merge`` does in float32: counts of a whole data set need more."""
        total = self.count + other.count
        share = other.count / np.maximum(total, 1)
        delta = other.mean - self.mean
        spread = self.var + share * (other.var - self.var) + share * (1 - share) * delta * delta
        return Seen(total, self.mean + share * delta, spread, self.updates + other.updates)


@dataclass(frozen=True)
class Survey:
    """The state of a model, taken apart."""

    layers: list[Layer]
    leaves: list[Any]
    structure: Any

    def dtype(self, layer: Layer) -> str:
        """Return the narrower dtype of the running statistics of a layer."""
        return min(
            (jnp.dtype(self.leaves[i].dtype) for i in (layer.mean, layer.var)), key=lambda kind: kind.itemsize
        ).name

    def remembered(self) -> dict[Layer, Statistics]:
        """Return the running statistics of every layer."""
        found = ((layer, self.leaves[layer.mean], self.leaves[layer.var]) for layer in self.layers)
        return {layer: Statistics(*(np.asarray(leaf, np.float64) for leaf in leaves)) for layer, *leaves in found}

    def question(self, statistics: dict[Layer, Statistics], upstream: Upstream) -> Any:
        """Return a state with these statistics that observes what the layers see."""
        leaves = list(self.leaves)
        wide = jax.dtypes.canonicalize_dtype(np.float64)
        for layer, known in statistics.items():
            like = self.leaves[layer.mean]
            mean, none = (put(value, like, wide) for value in (known.mean, np.zeros_like(known.mean)))
            updates = put(np.zeros_like(known.mean), like, np.int32)
            leaves[layer.mean] = Observation(mean, none, none, none, none, none, updates, upstream=upstream)
            leaves[layer.var] = put(known.var, self.leaves[layer.var], wide)
        return jax.tree.unflatten(self.structure, leaves)

    def ask(self, apply: Apply, params: Any, question: Any, batch: Any) -> dict[Layer, Observation]:
        """Run one batch and return what the layers have observed that the question asks.

        Raises:
            ForeignLayers: some of them cannot observe.
        """
        asked = jax.tree.leaves(question, is_leaf=_is_observation)
        layers = [layer for layer in self.layers if _is_observation(asked[layer.mean])]
        try:
            new = apply(params, question, batch)
        except Exception as error:
            _check_arrays(error, params=params, batch=batch)
            if strangers := self._strangers(apply, params, layers, asked, batch):
                raise ForeignLayers(strangers) from error
            raise
        expected: Any = jax.tree.structure(question, is_leaf=_is_observation)
        found = jax.tree.structure(new, is_leaf=_is_observation)
        if expected != found:
            raise ValueError(
                f"apply returned a tree of the structure {found}; expected the new state, of that of state, "
                f"{expected}: a new state alone, without y."
            )
        leaves = jax.tree.leaves(new, is_leaf=_is_observation)
        answers = {layer: leaves[layer.mean] for layer in layers}
        if strangers := [
            layer
            for layer, found in answers.items()
            if not _is_observation(found) or found.shape != asked[layer.mean].shape
        ]:
            raise ForeignLayers(strangers)
        # ``updates`` is int32, and ``lax.pmean`` makes a float of it: apply has averaged the states of shards.
        if averaged := [layer.path for layer, found in answers.items() if found.updates.dtype != np.int32]:
            raise ValueError(f"{name_few(averaged)} {_AVERAGED}")
        return answers

    def _strangers(self, apply: Apply, params: Any, layers: list[Layer], asked: list[Any], batch: Any) -> list[Layer]:
        """Return the layers that make ``apply`` fail when they are observed.

        None where it fails without any observation too: then the fault is elsewhere.
        """

        def runs(observed: list[Layer]) -> bool:
            indices = {i for layer in observed for i in (layer.mean, layer.var)}
            leaves = [asked[i] if i in indices else leaf for i, leaf in enumerate(self.leaves)]
            try:
                jax.eval_shape(apply, params, jax.tree.unflatten(self.structure, leaves), batch)
            except Exception:
                return False
            return True

        def search(suspects: list[Layer]) -> list[Layer]:
            # By halves, because each trial traces the whole model.
            if runs(suspects):
                return []
            half = len(suspects) // 2
            return search(suspects[:half]) + search(suspects[half:]) if half else suspects

        return search(layers) if runs([]) else []

    def merge(
        self, answers: Iterable[dict[Layer, Observation]], before: Mapping[Layer, Seen] | None = None
    ) -> dict[Layer, Seen]:
        """Return what every layer that was asked has seen in all runs, and before."""
        seen = dict(before or {})
        with np.errstate(invalid="ignore", over="ignore"):
            for answer in answers:
                for layer, found in answer.items():
                    count, rest, pilot, offset, var, updates = (
                        np.asarray(getattr(found, name), np.float64)
                        for name in ("count", "rest", "pilot", "offset", "var", "updates")
                    )
                    new = Seen(count + rest, pilot + offset, var, updates)
                    seen[layer] = seen[layer].merge(new) if layer in seen else new
        return seen

    def select(self, seen: dict[Layer, Seen]) -> tuple[dict[Layer, Seen], list[Layer]]:
        """Return what was seen by the layers that took statistics, and the layers that took none in this run.

        Of a stack of layers some may have taken statistics and others not; it is in both.

        Raises:
            ValueError: none has taken any.
        """
        took = {layer: found for layer, found in seen.items() if found.updates.any()}
        idle = [layer for layer, found in seen.items() if not found.updates.all()]
        if not took:
            foreign = [layer for layer in self.layers if layer not in seen]
            others = f" {ForeignLayers(foreign)}" if foreign else ""
            raise ValueError(f"{name_few(layer.path for layer in idle)} {_IDLE}{others}")
        return took, idle

    def fill(self, statistics: dict[Layer, Statistics]) -> Any:
        """Return the state with these statistics, each on the devices and in the dtype of the leaf it replaces."""
        leaves = list(self.leaves)
        for layer, found in statistics.items():
            for name, value, i in (("mean", found.mean, layer.mean), ("var", found.var, layer.var)):
                dtype = leaves[i].dtype
                with np.errstate(over="ignore"):
                    fits = np.isfinite(value.astype(dtype))
                if (np.isfinite(value) & ~fits).any():
                    raise ValueError(
                        f"The {name} of {layer.path} is up to {np.abs(value).max():.2g}, more than the state holds, "
                        f"which is {dtype.name}. Expected float32: cast the state first."
                    )
                leaves[i] = put(value, leaves[i], dtype)
        return jax.tree.unflatten(self.structure, leaves)


def survey(state: Any) -> Survey:
    """Find every mean that has a var beside it."""
    paths, leaves, structure = flatten(state, "state")
    places: dict[Keys, dict[str, int]] = {}
    for i, keys in enumerate(paths):
        if keys and (keys[-1] in ("mean", "var") or (keys[-1] == "count" and _counts(leaves[i]))):
            places.setdefault(keys[:-1], {})[keys[-1]] = i
    layers = [Layer(keys, **at) for keys, at in places.items() if {"mean", "var"} <= at.keys()]
    # One without features has nothing to see, and none of its statistics moves.
    layers = [layer for layer in layers if np.size(leaves[layer.mean])]
    if not layers:
        held = name_few(join(keys) or "the state" for keys in paths[:5]) if paths else "nothing"
        raise ValueError(
            f"state holds {held}; expected statistics of layers, a mean and a var beside each "
            "other, of one feature or more."
        )
    for layer in layers:
        for name, leaf in (("mean", leaves[layer.mean]), ("var", leaves[layer.var])):
            kind = getattr(getattr(leaf, "dtype", type(leaf)), "name", type(leaf).__name__)
            if kind not in FLOATS:
                raise TypeError(f"The {name} of {layer.path} is of {kind}; expected an array of {', '.join(FLOATS)}.")
    return Survey(layers, leaves, structure)


def _counts(leaf: Any) -> bool:
    """Say whether a leaf can be a number of updates: others keep a number of rows under this name, as a float."""
    return getattr(getattr(leaf, "dtype", None), "name", None) in COUNTS


def _check_arrays(error: Exception, **trees: Any) -> None:
    """Refuse what jax does not take for an array, where that has made a call fail."""
    for name, tree in trees.items():
        for keys, leaf in zip(*flatten(tree, name)[:2], strict=True):
            try:
                jax.typeof(leaf)
            except TypeError:
                kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
                raise TypeError(
                    f"{join((name, *keys))} is of type {kind}; expected an array of NumPy or jax. One of PyTorch is "
                    "tensor.numpy(); what is no array belongs into apply."
                ) from error


def _is_observation(node: object) -> bool:
    return isinstance(node, Observation)


def put(value: np.ndarray[Any, Any], leaf: Any, dtype: Any) -> Array:
    """Put a value where a leaf is."""
    cast = value.astype(dtype)
    return jax.device_put(cast, leaf.sharding) if getattr(leaf, "committed", False) else jnp.asarray(cast)
