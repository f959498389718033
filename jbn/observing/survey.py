"""What the layers of a model see when it runs: count, mean and variance of their rows, carried by the state."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core.state import ordered

Vector = np.ndarray[Any, np.dtype[np.float64]]

STRANGE = (
    "gave no moments; expected every layer to call jbn.bn_forward, once or more, and to update its state. For Flax's "
    "own layers use jbn.linen.replace() or jbn.nnx.replace(model); run apply as in training, with no layer frozen and "
    "nothing that was exported or compiled ahead of time."
)


class Layer(NamedTuple):
    """Where the statistics of a layer are among the leaves of the state."""

    keys: tuple[str, ...]
    mean: int
    var: int

    @property
    def path(self) -> str:
        """The keys, for a message."""
        return "/".join(self.keys) or "the layer"


class Seen(NamedTuple):
    """The moments of the rows that a layer has seen, in float64."""

    count: Vector  # type: ignore[assignment]
    mean: Vector
    var: Vector

    def merge(self, other: "Seen") -> "Seen":
        """Return the moments of both, as ``jbn.merge`` does in float32: counts of a whole data set need more."""
        total = self.count + other.count
        share = other.count / np.maximum(total, 1)
        delta = other.mean - self.mean
        spread = self.var + share * (other.var - self.var) + share * (1 - share) * delta * delta
        return Seen(total, self.mean + share * delta, spread)


Known = dict[Layer, tuple[Vector, Vector]]


class Survey(NamedTuple):
    """The state of a model, taken apart."""

    layers: list[Layer]
    leaves: list[Any]
    structure: Any

    def known(self) -> Known:
        """Return mean and var of every layer in float64."""
        return {
            layer: (np.asarray(self.leaves[layer.mean], np.float64), np.asarray(self.leaves[layer.var], np.float64))
            for layer in self.layers
        }

    def ask(self, known: Known, order: str) -> Any:
        """Return a state with these statistics in which the layers put their moments; see ``core.state.ORDERS``."""
        leaves = list(self.leaves)
        for layer, statistics in known.items():
            wide = jax.dtypes.canonicalize_dtype(np.float64)
            mean, var = (_like(v, leaves[i], wide) for v, i in zip(statistics, layer[1:], strict=True))
            leaves[layer.mean], leaves[layer.var] = ordered(mean, var, order)
        return jax.tree.unflatten(self.structure, leaves)

    def answer(self, apply: Any, params: Any, asked: Any, batch: Any) -> list[Any]:
        """Run one batch and return the leaves of the new state; where a layer cannot take the order, say which."""
        try:
            new = apply(params, asked, batch)
        except Exception as error:
            wide = jax.tree.leaves(asked)

            def runs(*indices: int) -> bool:
                leaves = [wide[i] if i in indices else leaf for i, leaf in enumerate(self.leaves)]
                try:
                    jax.eval_shape(apply, params, jax.tree.unflatten(self.structure, leaves), batch)
                except Exception:
                    return False
                return True

            strangers = [layer.path for layer in self.layers if not runs(*layer[1:])] if runs() else []
            if not strangers:
                raise
            raise ValueError(f"{listed(strangers)} {STRANGE}") from error
        expected: Any = jax.tree.structure(asked)
        found = jax.tree.structure(new)
        if expected != found:
            raise ValueError(
                f"apply returned a tree of the structure {found}; expected the new state, of that of state, "
                f"{expected}: a new state alone, without y."
            )
        before, after = (jax.tree.leaves(tree) for tree in (asked, new))
        strangers = [layer.path for layer in self.layers if any(after[i].shape != before[i].shape for i in layer[1:])]
        if strangers:
            raise ValueError(f"{listed(strangers)} {STRANGE}")
        return after

    def merged(self, answers: Iterable[list[Any]]) -> dict[Layer, Seen]:
        """Return what every layer has seen in all runs."""
        seen: dict[Layer, Seen] = {}
        with np.errstate(invalid="ignore", over="ignore"):
            for leaves in answers:
                for layer in self.layers:
                    mean, var = (np.asarray(leaves[i], np.float64)[..., 0, :] for i in layer[1:])
                    if not np.isfinite(var[..., 2]).all():
                        raise ValueError(f"{layer.path} {STRANGE}")
                    new = Seen(var[..., 2], mean[..., 1] + mean[..., 2], var[..., 1])
                    seen[layer] = seen[layer].merge(new) if layer in seen else new
        return seen

    def filled(self, known: Known) -> Any:
        """Return the state with these statistics, each where and what its leaf is."""
        leaves = list(self.leaves)
        for layer, statistics in known.items():
            for value, i in zip(statistics, layer[1:], strict=True):
                leaves[i] = _like(value, leaves[i], leaves[i].dtype)
        return jax.tree.unflatten(self.structure, leaves)


def survey_of(state: Any) -> Survey:
    """Find every mean that has a var beside it."""
    found, structure = named_leaves(state)
    named: dict[tuple[str, ...], dict[str, int]] = {}
    for i, (keys, _) in enumerate(found):
        if keys and keys[-1] in ("mean", "var"):
            named.setdefault(keys[:-1], {})[keys[-1]] = i
    layers = [Layer(keys, where["mean"], where["var"]) for keys, where in named.items() if len(where) == 2]
    if not layers:
        paths = ", ".join("/".join(keys) or "the state" for keys, _ in found[:5]) or "nothing"
        raise ValueError(f"state holds {paths}; expected statistics of layers, a mean and a var beside each other.")
    return Survey(layers, [leaf for _, leaf in found], structure)


def named_leaves(tree: Any) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """Return the keys and the leaf of every path, and the structure; boxes such as ``nnx.BatchStat`` add no key."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in found]
    return [(keys[:-1] if keys[-1:] == ("value",) else keys, leaf) for keys, leaf in named], structure


def listed(paths: list[str]) -> str:
    """Name the first few."""
    return ", ".join(paths[:5]) + f" and {len(paths) - 5} more" * (len(paths) > 5)


def _like(value: Vector, leaf: Any, dtype: Any) -> Array:
    """Put a value where a leaf is."""
    cast = value.astype(dtype)
    return jax.device_put(cast, leaf.sharding) if getattr(leaf, "committed", False) else jnp.asarray(cast)
