"""Where libraries keep the arrays of a model: the address of each leaf of a tree, arrays of any kind, new trees."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from jbn.core.state import CountedState, Params, State
from jbn.paths import flatten, read_keys


class AnyArray(Protocol):
    """An array of NumPy, JAX or PyTorch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def dtype(self) -> Any:
        """Its dtype, as its library has them."""


LibraryTree: TypeAlias = Annotated[Any, "arrays as a library holds them"]
"""The arrays of a layer or a model as its library holds them; ``jbn.convert`` has a table of what that is."""

Array = np.ndarray[Any, np.dtype[Any]]
Path = tuple[str, ...]
Layer = dict[str, Array]
Address = tuple[Path, str]  # a layer, and the name of an array in it
Addresses = list[Address | None]  # of the leaves of a tree, in jax's order; None for what is no array

STATISTICS = ("mean", "var")
VECTORS = ("scale", "bias", *STATISTICS)
_AVERAGES = ("state/mean", "state/var")  # those of a norm of Equinox
OTHER = "="  # before the name of an array that has no meaning here; twice where it is not trained


def index(addresses: Addresses, tree: Any) -> dict[Address, Any]:
    """Return the leaves of a tree by their addresses."""
    places = zip(addresses, jax.tree.leaves(tree), strict=True)
    arrays = [(address, leaf) for address, leaf in places if address is not None]
    found = dict(arrays)
    if len(found) < len(arrays):  # The later one would stand for both.
        (((path, name), _),) = Counter(address for address, _ in arrays).most_common(1)
        raise ValueError(
            f"has two arrays {'/'.join((*path, name))!r}, such as one among params and one in state; expected one, "
            "because what is converted is known by its layer and name: rename one of them."
        )
    return found


def index_shapes(addresses: Addresses, tree: Any) -> dict[Address, Any]:
    """Return the leaves of a tree that is to be filled by their addresses."""
    found = index(addresses, tree)
    for (path, name), leaf in found.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            place = "/".join((*path, name))
            raise TypeError(f"has a {type(leaf).__name__} at {place!r}; expected arrays, or their shapes and dtypes.")
    return found


def address_mapping(separator: str, expected: str) -> Callable[[Any], Addresses]:
    """Return the reader of a mapping of names to arrays."""

    def addresses(tree: Any) -> Addresses:
        paths = flatten(tree)[0] if isinstance(tree, Mapping) else [()]
        if deeper := {path[0] for path in paths if len(path) > 1}:
            # Checkpoints, such as those of Lightning, hold it among others.
            key, fix = ("state_dict", ": pass its ['state_dict']") if "state_dict" in deeper else (min(deeper), "")
            raise TypeError(f"holds a tree under {key!r}; expected {expected}, a mapping of names to arrays{fix}.")
        if () in paths:
            raise TypeError(f"is of type {type(tree).__name__}; expected {expected}, a mapping of names to arrays.")
        return [_address(tuple(name.split(separator))) for (name,) in paths]

    return addresses


def address_variables(tree: Any) -> Addresses:
    """Read the variables of a Linen model, and those in an object that has them, such as a ``TrainState``."""
    paths, parts = flatten(tree)[0], {"params", "batch_stats"}
    held = hasattr(tree, "params") and not isinstance(tree, Mapping)
    if not held and (strange := {path[0] if len(path) > 1 else "an array" for path in paths} - parts):
        raise ValueError(
            f"holds {', '.join(sorted(strange))}; expected the variables of Flax Linen, a mapping with 'params' and, "
            "where there are normalizations, 'batch_stats', and nothing else."
        )
    return [_address_part(path[1:], path[0] == "params") if path[0] in parts else None for path in paths]


def address_model(tree: Any) -> Addresses:
    """Read the state of an NNX model."""
    paths = flatten(tree)[0]
    if () in paths:
        raise TypeError(f"is of type {type(tree).__name__}; expected nnx.state(model, (nnx.Param, nnx.BatchStat)).")
    return [_address(path) for path in paths]


def address_pair(tree: Any) -> Addresses:
    """Read params and state of functions that call ``jbn.bn_forward``."""
    paths = flatten(_read_pair(tree, "(params, state)"))[0]
    if any(len(path) < 2 for path in paths):
        raise TypeError("has arrays without names; expected (params, state), such as those of jbn.bn_init.")
    return [_address_part(path[1:], path[0] == "0") for path in paths]


def address_modules(tree: Any) -> Addresses:
    """Read params and state of Haiku; running averages belong to the norm above them.

    A module that somebody calls ``mean_ema`` has other arrays than such an average.
    """
    paths = flatten(_read_pair(tree, "(params, state) of hk.transform_with_state"))[0]
    if any(len(path) != 3 for path in paths):
        raise TypeError("is no tree of Haiku; expected (params, state), each {module: {name: array}}.")
    found: Addresses = []
    for _, module, name in paths:
        keys = tuple(module.split("/"))
        average = keys[-2:] in (("~", "mean_ema"), ("~", "var_ema")) and name in ("hidden", "average", "counter")
        found.append((keys[:-2], f"{keys[-1]}/{name}") if average else (keys, name))
    return found


def address_equinox(tree: Any) -> Addresses:
    """Read model and state of Equinox, which need not be imported for it."""
    model, state = _read_pair(tree, "(model, state) of eqx.nn.make_with_state")
    size = len(jax.tree.leaves(state))
    # A state whose values are their own positions: what it gives for an index says where that is kept.
    positions = jax.tree.unflatten(jax.tree.structure(state), range(size))
    where: dict[int, Address] = {}
    for path, norm in _norms(model):
        for index, *names in (
            (norm.batch_state_index, "state/mean", "state/var"),
            (norm.ema_state_index, "state/mean", "state/var"),
            (norm.batch_counter, "state/counter"),
            (norm.ema_first_time_index, "state/first_time"),
        ):
            if index is not None:
                where |= {at: (path, name) for at, name in zip(_position(positions, index), names, strict=True)}
    return [
        *(_address(keys) if hasattr(leaf, "shape") else None for keys, leaf in zip(*flatten(model)[:2], strict=True)),
        *(where.get(at, (("eqx.nn.State",), str(at))) for at in range(size)),
    ]


def _position(positions: Any, index: Any) -> list[int]:
    try:
        return jax.tree.leaves(positions.get(index))
    except (AttributeError, KeyError) as error:
        raise TypeError("has norms without a state; expected (model, state) of eqx.nn.make_with_state.") from error


def read_evaluation(tree: Any) -> dict[Address, Any]:
    """Read model and state of Equinox with the statistics that it evaluates with, rounded as there."""
    found = index(address_equinox(tree), tree)
    for path, norm in _norms(tree[0]):
        if norm.mode == "batch":
            count = found[path, "state/counter"]
            found |= {(path, name): found[path, name] / _share(norm, count, found[path, name]) for name in _AVERAGES}
    return found


def write_evaluation(like: Any, layers: Mapping[Path, Layer]) -> Mapping[Path, Layer]:
    """Return layers with the averages from which Equinox makes the statistics that it evaluates with."""
    hidden = {}
    for path, norm in _norms(like[0]):
        if norm.mode == "batch" and "state/counter" in layers.get(path, ()):
            layer = layers[path]
            count = layer["state/counter"]
            hidden[path] = {name: layer[name] * np.asarray(_share(norm, count, layer[name])) for name in _AVERAGES}
    return {path: layer | hidden.get(path, {}) for path, layer in layers.items()}


def _share(norm: Any, count: Any, averages: Any) -> Any:
    """Return the sum of the weights of the batches in the averages of a norm of Equinox, as it computes it.

    Stacked norms, of an ensemble, have a count each.
    """
    count = jnp.asarray(count)
    count = count.reshape(count.shape + (1,) * (averages.ndim - count.ndim))
    return jnp.where(count == 0, 1, 1 - norm.momentum**count)


def make_mapping(separator: str) -> Callable[[Mapping[Path, Layer]], Any]:
    """Return the maker of a mapping of names to arrays."""

    def make(layers: Mapping[Path, Layer]) -> Any:
        return {separator.join(path): value for path, value in _flatten_layers(layers).items()}

    return make


def make_pair(layers: Mapping[Path, Layer]) -> Any:
    """Make params and state; a normalization has ``Params`` and ``State``."""
    norms = {path: layer for path, layer in layers.items() if "mean" in layer and set(layer) <= {*VECTORS, "count"}}
    params, stats = _split({path: layer for path, layer in layers.items() if path not in norms})
    for path, norm in norms.items():
        scale, bias, mean, var = (norm.get(name) for name in VECTORS)
        params[path] = Params(scale, bias)  # type: ignore[arg-type]
        stats[path] = CountedState(mean, var, norm["count"]) if "count" in norm else State(mean, var)  # type: ignore[arg-type]
    return _nest(params), _nest(stats)


def make_variables(layers: Mapping[Path, Layer]) -> Any:
    """Make the variables of a Linen model."""
    params, stats = map(_nest, _split(layers))
    return {"params": params, **({"batch_stats": stats} if stats else {})}


def make_model(layers: Mapping[Path, Layer]) -> Any:
    """Make the state of an NNX model; a node whose keys are all numbers is a list."""
    return _number(_nest(_flatten_layers(layers)))


def _number(tree: Any) -> Any:
    """Make numbers of the keys of a node, if that is what all of them are: jax sorts no others beside them."""
    if not isinstance(tree, dict):
        return tree
    numbers = all(key.isdecimal() and str(int(key)) == key for key in tree)
    return {int(key) if numbers else key: _number(node) for key, node in tree.items()}


def fill(like: Any, addresses: Addresses, layers: Mapping[Path, Layer], numpy: bool) -> Any:
    """Return a tree with the structure, the dtypes and the kinds of arrays of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    places = zip(addresses, leaves, strict=True)
    return jax.tree.unflatten(
        structure, [leaf if at is None else _as_leaf(layers[at[0]][at[1]], leaf, at, numpy) for at, leaf in places]
    )


def as_numpy(leaf: Any) -> Array:
    """Copy an array of any library; NumPy does not read bfloat16 and float8 of PyTorch."""
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"has a leaf of type {type(leaf).__name__}; expected an array.")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("is a key of random numbers; expected nnx.state(model, (nnx.Param, nnx.BatchStat)).")
    if isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "is_meta", False):
        raise TypeError(f"has a {type(leaf).__name__} without values; expected an array: shapes alone are for like.")
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError("has a masked array of NumPy, whose mask would be lost; expected a plain one: array.filled(0).")
    dtype = dtype_of(leaf)
    if not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        raise TypeError(f"has an array of {dtype}; expected numbers: leave it out.")
    if not hasattr(leaf, "detach"):
        return np.array(leaf)
    if getattr(leaf, "layout", None) is not None and "strided" not in str(leaf.layout):
        raise TypeError(f"has a tensor of layout {leaf.layout}; expected a dense one, such as tensor.to_dense().")
    leaf = leaf.detach().cpu().resolve_conj().resolve_neg()
    return np.array((leaf if dtype.isbuiltin == 1 else leaf.float()).numpy()).astype(dtype)


def dtype_of(leaf: Any) -> np.dtype[Any]:
    """Return the dtype of an array of any library."""
    if isinstance(leaf.dtype, np.dtype):  # not by its name, for those of records are no names
        return leaf.dtype
    try:
        return jnp.dtype(str(leaf.dtype).removeprefix("torch."))
    except TypeError as error:
        raise TypeError(
            f"has an array of {leaf.dtype}, which NumPy and JAX lack; expected a float, such as tensor.dequantize()."
        ) from error


def is_float(dtype: Any) -> bool:
    """Say whether numbers of a dtype, bfloat16 and float8 too, can be trained."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def narrow(value: Array, dtype: np.dtype[Any]) -> tuple[Array, bool]:
    """Cast an array, and say whether what was finite stayed so, and whole numbers what they were."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(dtype, order="C")
    whole = value.dtype.kind in "iu" and cast.dtype.kind in "iu"
    return cast, bool((cast == value).all() if whole else not (np.isfinite(value) & ~np.isfinite(cast)).any())


def convey(layers: Mapping[Path, Layer], numpy: bool) -> dict[Path, Layer]:
    """Return layers in the dtypes that NumPy, or else jax, keeps."""
    return {
        path: {
            name: _cast(value, value.dtype if numpy else _kept(value.dtype), (path, name), "which jax has for it")
            for name, value in layer.items()
        }
        for path, layer in layers.items()
    }


def _kept(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def _cast(value: Array, dtype: np.dtype[Any], address: Address, why: str) -> Array:
    cast, fits = narrow(value, dtype)
    if not fits:
        raise ValueError(f"{'/'.join((*address[0], address[1]))!r} does not fit into {cast.dtype}, {why}.")
    return cast


def _as_leaf(value: Array, leaf: Any, address: Address, numpy: bool) -> Any:
    cast = _cast(value, dtype_of(leaf), address, "the dtype in like")
    if hasattr(leaf, "new_tensor") and not leaf.is_meta:
        return leaf.new_tensor(cast.astype(np.float32) if cast.dtype == jnp.bfloat16 else cast)
    if numpy:
        return cast
    return jax.device_put(cast, leaf.sharding if getattr(leaf, "committed", False) else None)


def _read_pair(tree: Any, expected: str) -> tuple[Any, Any]:
    if not isinstance(tree, tuple) or len(tree) != 2 or hasattr(tree, "_fields"):
        raise TypeError(f"is of type {type(tree).__name__}; expected a pair, {expected}.")
    return tree


def _address(path: Path) -> Address:
    return path[:-1], path[-1]


def _address_part(path: Path, trained: bool) -> Address:
    """Return the address of an array of which the tree says whether it is trained; statistics are not."""
    *keys, name = path
    return tuple(keys), name if trained != (name in STATISTICS) else f"{OTHER if trained else OTHER * 2}{name}"


def _norms(model: Any) -> Iterator[tuple[Path, Any]]:
    """Find the batch norms of an Equinox model."""

    def is_norm(node: Any) -> bool:
        return hasattr(node, "batch_state_index") and hasattr(node, "ema_state_index")

    for keys, node in tree_flatten_with_path(model, is_leaf=is_norm)[0]:
        if is_norm(node):
            yield read_keys(keys), node


def _flatten_layers(layers: Mapping[Path, Layer]) -> dict[Path, Array]:
    return {(*path, name): value for path, layer in layers.items() for name, value in layer.items()}


def _split(layers: Mapping[Path, Layer]) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """Return parameters and statistics."""
    flat = _flatten_layers(layers)
    counts = {(*path, "count") for path, layer in layers.items() if "mean" in layer}
    stats = {path: value for path, value in flat.items() if path[-1] in STATISTICS or path in counts}
    return {path: value for path, value in flat.items() if path not in stats}, stats


def _nest(leaves: Mapping[Path, Any]) -> Any:
    if clash := {path[:n] for path in leaves for n in range(len(path)) if path[:n] in leaves}:
        both = ", ".join("/".join(path) or "the root" for path in sorted(clash))
        raise ValueError(
            f"names: there are layers under {both}, which is a layer itself; expected a path of its own for each."
        )
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        if not path:
            return leaf
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
