"""What the layers of a model see when it runs, asked through their states: count, mean and variance of their rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core.checks import FLOATS
from jbn.core.state import Observation, Upstream
from jbn.paths import Keys, flatten, join, name_few

Vector = np.ndarray[Any, np.dtype[np.float64]]
Apply = Callable[[Any, Any, Any], Any]

_NO_MOMENTS = (
    "gave no moments; expected every layer to call jbn.bn_forward, once or more, and to update its state. For Flax's "
    "own layers use jbn.linen.replace() or jbn.nnx.replace(model); run apply as in training, with no layer frozen and "
    "nothing that was exported or compiled ahead of time."
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

    @property
    def path(self) -> str:
        """The keys, for a message."""
        return join(self.keys) or "the layer"


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
            mean, none = (_put(value, like, wide) for value in (known.mean, np.zeros_like(known.mean)))
            updates = _put(np.zeros_like(known.mean), like, np.int32)
            leaves[layer.mean] = Observation(mean, none, none, none, none, updates, upstream=upstream)
            leaves[layer.var] = _put(known.var, self.leaves[layer.var], wide)
        return jax.tree.unflatten(self.structure, leaves)

    def ask(self, apply: Apply, params: Any, question: Any, batch: Any) -> dict[Layer, Observation]:
        """Run one batch and return what every layer has observed; where a layer cannot observe, say which."""
        try:
            new = apply(params, question, batch)
        except Exception as error:
            if strangers := self._strangers(apply, params, question, batch):
                raise ValueError(f"{name_few(strangers)} {_NO_MOMENTS}") from error
            raise
        expected: Any = jax.tree.structure(question, is_leaf=_is_observation)
        found = jax.tree.structure(new, is_leaf=_is_observation)
        if expected != found:
            raise ValueError(
                f"apply returned a tree of the structure {found}; expected the new state, of that of state, "
                f"{expected}: a new state alone, without y."
            )
        leaves = jax.tree.leaves(new, is_leaf=_is_observation)
        answers = {layer: leaves[layer.mean] for layer in self.layers}
        before = {layer: jax.tree.leaves(question, is_leaf=_is_observation)[layer.mean].shape for layer in self.layers}
        if strangers := [
            layer.path for layer, found in answers.items() if not _is_observation(found) or found.shape != before[layer]
        ]:
            raise ValueError(f"{name_few(strangers)} {_NO_MOMENTS}")
        # ``updates`` is int32, and ``lax.pmean`` makes a float of it: apply has averaged the states of shards.
        if averaged := [layer.path for layer, found in answers.items() if found.updates.dtype != np.int32]:
            raise ValueError(f"{name_few(averaged)} {_AVERAGED}")
        return answers

    def _strangers(self, apply: Apply, params: Any, question: Any, batch: Any) -> list[str]:
        """Return the paths of layers that make ``apply`` fail when they alone are observed.

        None where it fails without any observation too: then the fault is elsewhere.
        """
        asked = jax.tree.leaves(question, is_leaf=_is_observation)

        def runs(*indices: int) -> bool:
            leaves = [asked[i] if i in indices else leaf for i, leaf in enumerate(self.leaves)]
            try:
                jax.eval_shape(apply, params, jax.tree.unflatten(self.structure, leaves), batch)
            except Exception:
                return False
            return True

        return [layer.path for layer in self.layers if not runs(layer.mean, layer.var)] if runs() else []

    def merge(self, answers: Iterable[dict[Layer, Observation]]) -> dict[Layer, Seen]:
        """Return what every layer has seen in all runs."""
        seen: dict[Layer, Seen] = {}
        with np.errstate(invalid="ignore", over="ignore"):
            for answer in answers:
                for layer, found in answer.items():
                    if not np.asarray(found.updates).all():
                        raise ValueError(f"{layer.path} {_NO_MOMENTS}")
                    count, pilot, offset, var = (
                        np.asarray(value, np.float64) for value in (found.count, found.pilot, found.offset, found.var)
                    )
                    new = Seen(count, pilot + offset, var, np.asarray(found.updates, np.float64))
                    seen[layer] = seen[layer].merge(new) if layer in seen else new
        return seen

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
                leaves[i] = _put(value, leaves[i], dtype)
        return jax.tree.unflatten(self.structure, leaves)


def survey(state: Any) -> Survey:
    """Find every mean that has a var beside it."""
    paths, leaves, structure = flatten(state)
    places: dict[Keys, dict[str, int]] = {}
    for i, keys in enumerate(paths):
        if keys and keys[-1] in ("mean", "var"):
            places.setdefault(keys[:-1], {})[keys[-1]] = i
    layers = [Layer(keys, at["mean"], at["var"]) for keys, at in places.items() if len(at) == 2]
    if not layers:
        held = name_few(join(keys) or "the state" for keys in paths[:5]) if paths else "nothing"
        raise ValueError(f"state holds {held}; expected statistics of layers, a mean and a var beside each other.")
    for layer in layers:
        for name, leaf in (("mean", leaves[layer.mean]), ("var", leaves[layer.var])):
            kind = getattr(getattr(leaf, "dtype", type(leaf)), "name", type(leaf).__name__)
            if kind not in FLOATS:
                raise TypeError(f"The {name} of {layer.path} is of {kind}; expected an array of {', '.join(FLOATS)}.")
    return Survey(layers, leaves, structure)


def _is_observation(node: object) -> bool:
    return isinstance(node, Observation)


def _put(value: Vector, leaf: Any, dtype: Any) -> Array:
    """Put a value where a leaf is."""
    cast = value.astype(dtype)
    return jax.device_put(cast, leaf.sharding) if getattr(leaf, "committed", False) else jnp.asarray(cast)
