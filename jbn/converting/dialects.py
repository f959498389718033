"""How libraries name and lay out the arrays of a layer: a dialect each, a few names and rules; and a translation.

Between them stands one form, in Flax's names and layouts: some of

    scale, bias, mean, var     (features,)
    count                      (), beside mean and var: the number of updates done
    kernel                     (in, out) of a dense layer; (*window, in/groups, out) of a convolution; a transposed one
                               has that of the convolution whose gradient it is, (*window, out/groups, in), or that of
                               a convolution over a dilated x, (*window, in/groups, out): see ``adjoint``
    embedding                  (entries, features)

and whatever else a layer has, as it is. Its name begins with "=" then, for it may be one of those above and mean
another thing: a buffer "mean" in PyTorch, whose norms have "running_mean", is no running mean. It begins with "=="
where the source says that it is not trained.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jbn.converting import models, trees
from jbn.converting.trees import OTHER, STATISTICS, VECTORS, Address, Addresses, Array, Layer, Path
from jbn.paths import count_of, name_few

Shape = tuple[int, ...]

TRANSPOSED = ("transposed", "transpose_kernel")
KINDS = (*TRANSPOSED, "depthwise", "embedding")
KNOWN = (*VECTORS, "kernel", "embedding")

LAST = np.iinfo(np.int32).max

# As after so many updates that nothing of the first value is left: in float32, 1 - momentum**SETTLED is 1.
SETTLED = 2**30


def _keep(kernel: Array, kind: str | None, like: Shape | None = None) -> Array:
    return kernel


@dataclass(frozen=True)
class Dialect:
    """How a library keeps, names and lays out arrays."""

    # Where each leaf of a tree belongs.
    addresses: Callable[[Any], Addresses]
    # Makes a tree of layers; None where a tree holds more than arrays.
    make: Callable[[Mapping[Path, Layer]], Any] | None
    # The tree of what is held in its place, such as a model, and the kinds of layers that it tells.
    unpack: Callable[[Any], tuple[Any, models.Kinds]] = models.unpack_names
    # The names that are not Flax's, and that of the bias of a normalization.
    names: Mapping[str, str] = field(default_factory=dict)
    shift: str = "bias"
    # What each normalization remembers beside mean and var, from the arrays written, the leaf that is wanted, and the
    # number of updates where that is known.
    memory: Mapping[str, Callable[[Layer, Any, Array | None], Any]] = field(default_factory=dict)
    # Reads the number of updates of a normalization; None where none has one.
    count: Callable[[Layer], Array | None] | None = None
    # Reads a tree where that takes more than addresses, and undoes that for a tree that is to be filled.
    evaluated: Callable[[Any], dict[Address, Any]] | None = None
    stored: Callable[[Any, Mapping[Path, Layer]], Mapping[Path, Layer]] = lambda like, layers: layers
    # A kernel in the form above, for the kind of layer; and back, for the shape that is wanted.
    inward: Callable[[Array, str | None], Array] = _keep
    outward: Callable[[Array, str | None, Shape | None], Array] = _keep
    # Transposed convolutions of these kinds have the kernel of the convolution whose gradient they are.
    gradient: tuple[str, ...] = TRANSPOSED
    # Whether vectors have more axes, of size 1.
    padded: bool = False
    # Whether examples are flattened features first.
    features_first: bool = False
    # Whether the running variance is that of a sample; None where the layer has a say.
    unbiased: bool | None = False
    # Whether what is trained and what is not are trees of their own.
    apart: bool = False
    # Whether arrays are NumPy's.
    numpy: bool = False
    separator: str = "/"

    def split(self, path: str) -> Path:
        """Read a path."""
        return tuple(path.replace(self.separator, "/").split("/")) if path else ()

    def spell(self, path: Path) -> str:
        """Write a path."""
        return self.separator.join((*path[:-1], path[-1].lstrip(OTHER))) if path else ""

    def read(self, tree: Any) -> dict[Address, Any]:
        """Return the arrays of a tree by their addresses."""
        return self.evaluated(tree) if self.evaluated else trees.index(self.addresses(tree), tree)

    def decode(self, layer: Layer, kind: str | None) -> Layer:
        """Bring a layer into the form above."""
        plain = {self.names.get(name, name): name for name in KNOWN} | {self.shift: "bias"}
        if "weight" in plain and "weight" in layer:
            plain["weight"] = _meaning(layer["weight"], layer.get("bias"), kind)
        is_norm = self.names.get("mean", "mean") in layer
        count = self.count(layer) if is_norm and self.count else None
        memory = [*(self.memory if is_norm else ()), *(_COUNTS if count is not None else ())]
        others = {own: own if own.startswith(OTHER) else OTHER + own for own in layer if own not in plain}
        found = _rename(layer, {own: {**plain, **others}[own] for own in layer if own not in memory})
        if count is not None:
            found["count"] = np.clip(count, 0, LAST).astype(np.int32)
        if "kernel" in found:
            found["kernel"] = self.inward(found["kernel"], kind)
        if self.padded:
            found |= {name: found[name].reshape(_squeeze(found[name].shape)) for name in VECTORS if name in found}
        return found

    def encode(self, layer: Layer, kind: str | None, like: Mapping[str, Any] | None) -> Layer:
        """Bring a layer out of the form above; ``like`` holds its arrays as they are wanted."""
        norm = "kernel" not in layer and ("scale" in layer or "mean" in layer)
        count = layer.get("count")
        layer = {name: value for name, value in layer.items() if name != "count" or not self.memory}
        own = {name: self.shift if norm and name == "bias" else self.names.get(name, name) for name in layer}
        own |= {name: _find_other(name, like or {}) for name in layer if name.startswith(OTHER) or name == "count"}
        found = _rename(layer, own)
        for name, value in layer.items():
            shape = value.shape if like is None else tuple(like.get(own[name], value).shape)
            if name == "kernel":
                found[own[name]] = self.outward(value, kind, None if like is None else shape)
            elif name in VECTORS and _squeeze(shape) == _squeeze(value.shape):
                found[own[name]] = value.reshape(shape)
        if "mean" in layer:
            memory = {name: make(found, (like or {}).get(name), count) for name, make in self.memory.items()}
            found |= {name: value for name, value in memory.items() if like is None or name in like}
        return found


def _meaning(weight: Array, bias: Array | None, kind: str | None) -> str:
    """Say what is called weight: a scale has one axis, or the shape of the bias."""
    if kind == "embedding":
        return "embedding"
    return "scale" if weight.ndim < 2 or (bias is not None and bias.shape == weight.shape) else "kernel"


def _find_other(name: str, like: Mapping[str, Any]) -> str:
    """Return the name in ``like`` of an array of no meaning here, else its own."""
    bare = name.lstrip(OTHER)
    return next((same for same in (name, bare, OTHER + bare, OTHER * 2 + bare) if same in like), bare)


def _rename(layer: Layer, names: Mapping[str, str]) -> Layer:
    """Give the arrays of a layer other names; those without one are left out."""
    found = {new: layer[old] for old, new in names.items()}
    if len(found) < len(names):
        new = next(new for new in found if [*names.values()].count(new) > 1)
        same = " and ".join(old.replace(OTHER, "its own ", 1) for old in names if names[old] == new)
        raise ValueError(f"has {same}, which all become {new}; expected one of them.")
    return found


def _squeeze(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1) or (1,)


@dataclass(frozen=True)
class Said:
    """What the arrays of a layer do not tell."""

    kind: str | None = None  # one of KINDS
    flattened: Shape | None = None  # of the examples, features first
    values: int | None = None  # per feature, from which the running variance was estimated


def translate(layer: Layer, origin: Dialect, goal: Dialect, like: Mapping[str, Any] | None, said: Said) -> Layer:
    """Bring a layer from one dialect into another."""
    layer = origin.decode(layer, said.kind)
    if ("mean" in layer) != ("var" in layer):
        raise ValueError(
            "has one running statistic; expected mean and variance, or neither: leave the layer out, by names."
        )
    if goal.count is None or (origin.memory and not goal.memory and not _COUNTS & {*(like or ())}):
        layer.pop("count", None)  # each has one there, and none is wanted here
    layer |= {name: _widen(name, layer[name]) for name in STATISTICS if name in layer}
    if said.values and "var" in layer and origin.unbiased != goal.unbiased:
        factor = said.values / (said.values - 1)
        wide = layer["var"] * np.float64(factor if goal.unbiased else 1 / factor)
        layer["var"] = trees.narrow(wide, layer["var"].dtype)[0]
    _check_statistics(layer)
    if like is None:  # which else says the place
        _check_others(layer, origin, goal)
    if said.flattened and origin.features_first != goal.features_first:
        layer = _reorder(layer, said.flattened, goal.features_first)
    turned = said.kind in TRANSPOSED and (said.kind in origin.gradient) != (said.kind in goal.gradient)
    if turned and "kernel" in layer and layer["kernel"].ndim > 2:
        if like is None:
            raise ValueError("is a transposed convolution; expected like, which says in how many groups.")
        layer["kernel"] = adjoint(layer["kernel"], _find_groups(layer["kernel"], said.kind, goal, like))
    return goal.encode(layer, said.kind, like)


def _check_statistics(layer: Layer) -> None:
    """Refuse running statistics that no batch has: they evaluate to NaN, or to the bias whatever x is."""
    wide = {name: layer[name].astype(np.float64) for name in STATISTICS if name in layer}
    for name, value in wide.items():
        bad = ~np.isfinite(value) | ((value < 0) if name == "var" else False)
        if bad.any():
            least = ", 0 or more" if name == "var" else ""
            raise ValueError(
                f"has {bad.sum()} of {count_of(bad.size, 'value')} of its running {name} such as "
                f"{value[bad].flat[0]:g}; expected finite ones{least}. An older checkpoint may have them; or leave the "
                "layer out, by names, and measure them anew, by recalibrate."
            )


# As other libraries than these call them, or their files: ``_variance``, ``moving_mean:0``.
_LIKE_STATISTICS = re.compile(r"_?(moving_|running_)?(mean|var|variance|std)(:\d+)?")


def _check_others(layer: Layer, origin: Dialect, goal: Dialect) -> None:
    """Refuse arrays of no meaning here that would be taken for statistics, or be trained although they were not."""
    others = {name: name.lstrip(OTHER) for name in layer if name.startswith(OTHER)}
    statistics = {goal.names.get(name, name) for name in STATISTICS}
    untrained = {
        bare
        for name, bare in others.items()
        if "mean" in layer
        or name.startswith(OTHER * 2)
        or not trees.is_float(layer[name].dtype)
        or (not origin.apart and _LIKE_STATISTICS.fullmatch(bare))
    }
    if lost := (statistics & {*others.values()}) | (untrained if goal.apart else set()):
        raise ValueError(
            f"has {name_few(sorted(lost))}, which may be no parameter, and nothing says what it is; expected like, "
            "which says where it belongs; or by names either what the source's library calls it, as in "
            "{'*/moving_mean:0': '*/moving_mean'}, or None, which leaves the layer out."
        )


def _widen(name: str, statistic: Array) -> Array:
    """Return a running statistic in float32 or more, in which its own corrections lose nothing."""
    if statistic.dtype.kind == "c":
        raise TypeError(f"has a running {name} of {statistic.dtype}; expected real numbers.")
    return statistic.astype(np.promote_types(statistic.dtype, np.float32))


def adjoint(kernel: Array, groups: int) -> Array:
    """Turn the kernel of a transposed convolution from one of its forms into the other: flip it, swap in and out."""
    *window, a, b = kernel.shape
    flipped = np.flip(kernel, tuple(range(len(window)))).reshape(*window, a, groups, b // groups)
    return flipped.swapaxes(-1, -3).reshape(*window, b // groups, groups * a)


def _find_groups(kernel: Array, kind: str | None, goal: Dialect, like: Mapping[str, Any]) -> int:
    """Find in how many groups a kernel (*window, a / groups, b) becomes one (*window, b / groups, a)."""
    leaf = like.get(goal.names.get("kernel", "kernel"))
    if leaf is None or len(leaf.shape) != kernel.ndim:
        return 1
    inner = goal.inward(np.broadcast_to(np.zeros(()), tuple(leaf.shape)), kind).shape[kernel.ndim - 2]
    return 1 if kernel.shape[-1] % inner else kernel.shape[-1] // inner


def _reorder(layer: Layer, shape: Shape, features_first: bool) -> Layer:
    """Reorder what goes through a layer, from features last to features first or the other way round."""
    number = math.prod(shape)
    last = np.moveaxis(np.arange(number).reshape(shape), 0, -1).ravel()  # where its values are, features first
    order = np.argsort(last) if features_first else last
    kernel = layer.get("kernel")
    size = () if kernel is None else kernel.shape
    if size == (number, number) and (order != np.arange(number)).any():
        raise ValueError(
            f"has {number} inputs and {number} outputs, and flattened does not tell which of them; expected one to "
            "differ: reorder the kernel by hand."
        )
    axes = {"kernel": 1, "bias": 0} if size[1:] == (number,) else {"kernel": 0} if size else dict.fromkeys(VECTORS, 0)
    axes = {name: axis for name, axis in axes.items() if name in layer}
    if wrong := [f"{name} {layer[name].shape}" for name, axis in axes.items() if layer[name].shape[axis] != number]:
        raise ValueError(f"has {', '.join(wrong)}, but flattened is {shape}, {number} values; expected as many.")
    return {**layer, **{name: np.take(layer[name], order, axis) for name, axis in axes.items()}}


def _move_inward(kernel: Array, kind: str | None) -> Array:
    return np.moveaxis(kernel, (0, 1), (-1, -2))


def _move_outward(kernel: Array, kind: str | None, like: Shape | None) -> Array:
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _join_channels(kernel: Array, kind: str | None) -> Array:
    """Keras has (*window, in, multiplier) where others have (*window, 1, in · multiplier)."""
    return kernel.reshape(*kernel.shape[:-2], 1, -1) if kind == "depthwise" and kernel.ndim > 2 else kernel


def _split_channels(kernel: Array, kind: str | None, like: Shape | None) -> Array:
    if kind != "depthwise" or kernel.ndim < 3:
        return kernel
    if like is None:
        raise ValueError("needs like, whose kernel (*window, in, multiplier) says how many channels come in.")
    fits = kernel.shape[-2] == 1 and kernel.shape[:-2] == like[:-2] and kernel.size == np.prod(like, dtype=int)
    return kernel.reshape(like) if fits else kernel


def _swap(kernel: Array, kind: str | None, like: Shape | None = None) -> Array:
    """Haiku has (*window, out, in) in transposed convolutions."""
    return kernel.swapaxes(-1, -2) if kind in TRANSPOSED and kernel.ndim > 2 else kernel


# In NNX, and in trees that say that it is not trained.
_COUNTS = {"count", OTHER * 2 + "count"}


def _own_count(layer: Layer) -> Array | None:
    """Return the count of a norm whose momentum depends on it; others keep floats by this name."""
    return next((layer[name] for name in _COUNTS & layer.keys() if layer[name].dtype.kind in "iu"), None)


def _equinox_count(layer: Layer) -> Array | None:
    """Return the counter, or what the flag says: after the first time the average is that of a number."""
    first = layer.get("state/first_time")
    return layer.get("state/counter") if first is None else np.where(first, 0, SETTLED)


def _tracked(written: Layer, leaf: Any, count: Array | None) -> Array:
    """Count on, from the number in ``like`` or from 0 where there is none; PyTorch needs it for momentum=None alone."""
    known = hasattr(leaf, "item") and not getattr(leaf, "is_meta", False)
    return np.asarray((leaf.item() if known else 0) if count is None else count, np.int64)


def _settled(written: Layer, leaf: Any, count: Array | None) -> Array:
    return np.asarray(SETTLED, np.int32)


_FLAX = Dialect(trees.address_model, trees.make_model, count=_own_count, gradient=("transpose_kernel",), unbiased=None)
_WEIGHT = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

DIALECTS = {
    "jbn": replace(_FLAX, addresses=trees.address_pair, make=trees.make_pair, apart=True),
    "linen": replace(_FLAX, addresses=trees.address_variables, make=trees.make_variables, apart=True),
    "nnx": _FLAX,
    "torch": Dialect(
        trees.address_mapping(".", "a state_dict"),
        trees.make_mapping("."),
        models.unpack_torch,
        names={**_WEIGHT, "mean": "running_mean", "var": "running_var"},
        memory={"num_batches_tracked": _tracked},
        count=lambda layer: layer.get("num_batches_tracked"),
        inward=_move_inward,
        outward=_move_outward,
        features_first=True,
        unbiased=True,
        numpy=True,
        separator=".",
    ),
    "keras": Dialect(
        trees.address_mapping("/", "{v.path: v.numpy() for v in model.weights}"),
        trees.make_mapping("/"),
        models.unpack_keras,
        names={"scale": "gamma", "mean": "moving_mean", "var": "moving_variance", "embedding": "embeddings"},
        shift="beta",
        inward=_join_channels,
        outward=_split_channels,
        numpy=True,
    ),
    "haiku": Dialect(
        trees.address_modules,
        None,
        models.unpack_haiku,
        names={
            "kernel": "w",
            "bias": "b",
            "embedding": "embeddings",
            "mean": "mean_ema/average",
            "var": "var_ema/average",
        },
        shift="offset",
        memory={
            # The hidden averages of few updates would need the decay, which is in no array.
            "mean_ema/hidden": lambda written, leaf, count: written["mean_ema/average"],
            "var_ema/hidden": lambda written, leaf, count: written["var_ema/average"],
            "mean_ema/counter": _settled,
            "var_ema/counter": _settled,
        },
        count=lambda layer: layer.get("mean_ema/counter"),
        inward=_swap,
        outward=_swap,
        gradient=(),
        padded=True,
    ),
    "equinox": Dialect(
        trees.address_equinox,
        None,
        names={**_WEIGHT, "mean": "state/mean", "var": "state/var"},
        memory={
            "state/counter": lambda written, leaf, count: np.asarray(SETTLED if count is None else count, np.int32),
            "state/first_time": lambda written, leaf, count: np.asarray(count is not None and count == 0),
        },
        count=_equinox_count,
        evaluated=trees.read_evaluation,
        stored=trees.write_evaluation,
        inward=_move_inward,
        outward=_move_outward,
        gradient=(),
        padded=True,
        features_first=True,
    ),
}
