"""Trees out of what people hold in their place: models of Keras and PyTorch, and flat names as files have them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from jbn.converting.trees import Path
from jbn.paths import name_few

Kinds = dict[Path, str]  # of layers of which the arrays do not tell what they are

# By the names of classes, so that nothing need be imported, and subclasses count.
_KINDS = {
    **{f"Conv{n}DTranspose": "transposed" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": "transposed" for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": "depthwise" for n in (1, 2)},
    "Embedding": "embedding",
}


def unpack_names(tree: Any) -> tuple[Any, Kinds]:
    """Read a tree of Flax or jbn whose keys are joined by slashes, as ``save_arrays`` writes it."""
    return (_nest(tree) if _is_flat(tree) and all("/" in name for name in map(str, tree)) else tree), {}


def unpack_keras(tree: Any) -> tuple[Any, Kinds]:
    """Read the weights of a Keras model or layer by their paths; the states of random numbers are none."""
    if isinstance(tree, Mapping) or not hasattr(tree, "_flatten_layers"):
        return tree, {}
    if not tree.weights:
        raise ValueError("is a model without weights; expected a built one, such as after a call.")
    paths = Counter(variable.path for variable in tree.weights)
    if several := [path for path, count in paths.items() if count > 1]:
        raise ValueError(
            f"has several arrays at {name_few(map(repr, several))}; expected paths of their own: give the models "
            "inside of it, or their layers, names that differ."
        )
    kinds = {
        tuple(variable.path.split("/")[:-1]): kind
        for layer in tree._flatten_layers(recursive=True, include_self=True)
        if (kind := _kind_of(layer))
        for variable in layer.weights
    }
    return {variable.path: variable.numpy() for variable in tree.weights}, kinds


def unpack_torch(tree: Any) -> tuple[Any, Kinds]:
    """Read the state of a PyTorch module."""
    if isinstance(tree, Mapping) or not hasattr(tree, "state_dict"):
        return tree, {}
    kinds = {tuple(path.split(".")) if path else (): _kind_of(module) for path, module in tree.named_modules()}
    return tree.state_dict(), {path: kind for path, kind in kinds.items() if kind}


def unpack_haiku(tree: Any) -> tuple[Any, Kinds]:
    """Read a flat mapping of Haiku, or a pair of them, parameters and state."""
    if _is_flat(tree):
        parts = {name[:2] for name in tree}
        tree = {name[2:]: leaf for name, leaf in tree.items()} if parts <= {"0/", "1/"} else tree
        return (_group_modules(tree), {}), {}
    if isinstance(tree, tuple) and all(map(_is_flat, tree)):
        return tuple(map(_group_modules, tree)), {}
    return tree, {}


def _kind_of(layer: Any) -> str | None:
    names = [base.__name__ for base in type(layer).__mro__]
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def _is_flat(tree: Any) -> bool:
    return isinstance(tree, Mapping) and bool(tree) and all(hasattr(leaf, "shape") for leaf in tree.values())


def _nest(flat: Mapping[str, Any]) -> Any:
    """Make a tree of flat names; keys that are 0 and 1 are those of a pair."""
    above = {name[:end] for name in flat for end, sign in enumerate(name) if sign == "/"}
    if both := [name for name in flat if name in above]:
        raise ValueError(f"has an array {both[0]!r} and others under it; expected names of one tree.")
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *keys, last = name.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return (tree.get("0", {}), tree.get("1", {})) if tree.keys() <= {"0", "1"} else tree


def _group_modules(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group arrays by module; the last key of a name, after "//", ":" or "/", is that of the array."""
    modules: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        separator = next((sign for sign in ("//", ":") if sign in name), "/")
        module, _, last = name.rpartition(separator)
        modules.setdefault(module, {})[last] = leaf
    return modules
