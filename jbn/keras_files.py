"""Weights in files of Keras, ``.keras`` and ``.h5``: what is numbered there gets its name."""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Files number the arrays of a layer, in this order; by the name of its class, as files spell it.
_NORM, _KERNEL = ("gamma", "beta"), ("kernel", "bias")
_NAMES = {
    "batch_normalization": (*_NORM, "moving_mean", "moving_variance"),
    **dict.fromkeys(("layer_normalization", "group_normalization"), _NORM),
    **dict.fromkeys(("dense", "einsum_dense"), _KERNEL),
    **dict.fromkeys((f"conv{n}d{end}" for n in (1, 2, 3) for end in ("", "_transpose")), _KERNEL),
    **dict.fromkeys((f"depthwise_conv{n}d" for n in (1, 2)), _KERNEL),
    **dict.fromkeys((f"separable_conv{n}d" for n in (1, 2)), ("depthwise_kernel", "pointwise_kernel", "bias")),
    **dict.fromkeys((f"{kind}_cell" for kind in ("lstm", "gru", "simple_rnn")), ("kernel", "recurrent_kernel", "bias")),
    "embedding": ("embeddings",),
    "normalization": ("mean", "variance", "count"),
    "p_re_lu": ("alpha",),
}
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
_OPTIONS = {"gamma": "scale", "beta": "center", "bias": "use_bias"}
_LISTS = ("layers", "_layer_checkpoint_dependencies")  # of layers, whose own name says nothing
_NO_WEIGHTS = ("seed_generator", "optimizer")
_INPUT = "input_layer"  # among the layers of models that were made of inputs and outputs, and of no others


class _Layer(NamedTuple):
    """A layer with arrays."""

    keys: tuple[str, ...]  # as in the file
    path: tuple[str, ...]  # as in the model
    arrays: dict[str, Array]


def read_h5(file: IO[bytes]) -> dict[str, Array]:
    """Read weights, of Keras 3 or older, or those of a whole model."""
    with _h5py().File(file, "r") as opened:
        top = opened.get("model_weights", opened)
        return _read_legacy(top) if _read_list(top, "layer_names") else _read_weights(top, None)


def read_keras(file: IO[bytes]) -> dict[str, Array]:
    """Read the weights of a whole model, whose configuration says what is what."""
    library = _h5py()
    with zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read("config.json"))
        with archive.open("model.weights.h5") as member, library.File(member, "r") as opened:
            return _read_weights(opened, config)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Files of Keras, .keras and .h5, need a package: pip install h5py.") from error
    return h5py


def _read_weights(root: Any, config: Mapping[str, Any] | None) -> dict[str, Array]:
    layers = list(_walk(root, (), (), config))
    # Layers of explicit names may have the same path; what the file calls them is their own.
    count = Counter(layer.path for layer in layers)
    chosen = [(layer.path if count[layer.path] == 1 else layer.keys, layer.arrays) for layer in layers]
    found = {"/".join((*path, name)): array for path, arrays in chosen for name, array in arrays.items()}
    if not found:
        raise ValueError("it holds no weights of Keras")
    return found


def _walk(group: Any, keys: tuple[str, ...], path: tuple[str, ...], config: Any) -> Iterator[_Layer]:
    own = _own(group, "vars") if "vars" in group else {}
    inside = (config or {}).get("config", {})
    if len(own):
        kind = _snake(config["class_name"]) if config else _guess(keys, getattr(own, "attrs", {}))
        yield _Layer(keys, path, _read_layer(own, kind, inside))
    for key, below in _sort_children(group, inside):
        if re.sub(r"_\d+$", "", key) in _NO_WEIGHTS:
            continue
        child = _own(group, key)
        if key in _LISTS:
            for name, layer in _sort_children(child, inside):
                yield from _step(_own(child, name), (*keys, name), path, layer)
        else:
            yield from _step(child, (*keys, key), path, below)


def _step(group: Any, keys: tuple[str, ...], path: tuple[str, ...], config: Any) -> Iterator[_Layer]:
    """Walk into a layer, or into what has no name in paths.

    That is a list of layers, and a model of inputs and outputs: its layers have theirs before it is there.
    """
    attributes = _own(group, "vars").attrs if "vars" in group else {}
    name = (config or {}).get("config", {}).get("name") or attributes.get("name") or keys[-1]
    is_list = "vars" not in group and config is None
    is_functional = any(key in group and _INPUT in _own(group, key) for key in _LISTS)
    yield from _walk(group, keys, path if is_list or is_functional else (*path, name), config)


def _sort_children(group: Any, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what is in a group, in the order of the configuration where it says one, with what that says."""
    used: Counter[str] = Counter()
    known = {}
    for layer in config.get("layers", []):
        name = _snake(layer["class_name"])
        known[f"{name}_{used[name]}" if used[name] else name] = layer
        used[name] += 1
    known |= {key: value for key, value in config.items() if isinstance(value, Mapping) and "class_name" in value}
    rest = sorted((key for key in group if key != "vars" and key not in known), key=_by_number)
    return [(key, known.get(key)) for key in (*(key for key in known if key in group), *rest)]


def _by_number(key: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key))


def _guess(keys: tuple[str, ...], attributes: Mapping[str, Any]) -> str:
    """Return the class of a layer from what the file or the user calls it."""
    names = (re.sub(r"_\d+$", "", str(name)) for name in (keys[-1] if keys else "", attributes.get("name", "")))
    return next((name for name in names if name in _NAMES), "")


def _read_layer(group: Any, kind: str, config: Mapping[str, Any]) -> dict[str, Array]:
    arrays = {key: _read_array(group, key) for key in sorted(group, key=_by_number)}
    kind = kind or _guess_by_shape([array.shape for array in arrays.values()])
    names = [name for name in _NAMES.get(kind, ()) if config.get(_OPTIONS.get(name, ""), True)]
    names += _RENORM if kind == "batch_normalization" and len(arrays) == len(names) + len(_RENORM) else ()
    if len(arrays) == len(names) - 1 and names[-1] == "bias":
        names = names[:-1]
    if len(arrays) == len(names) - 2 and names[:2] == [*_NORM]:
        names = names[2:]
    if list(arrays) != [str(i) for i in range(len(names))]:
        return {f"vars/{key}": array for key, array in arrays.items()}
    return dict(zip(names, arrays.values(), strict=True))


def _guess_by_shape(shapes: list[tuple[int, ...]]) -> str:
    """Return the class of a layer of which nothing else is known, such as one in a model of the user's own class."""
    axes = [len(shape) for shape in shapes]
    if axes == [1, 1, 1, 1] and len({*shapes}) == 1:
        return "batch_normalization"
    return "dense" if len(axes) == 2 and axes[0] > 1 and axes[1] == 1 else ""


def _read_legacy(root: Any) -> dict[str, Array]:
    """Read what Keras 2 has written, and Keras 3 for it: names such as "norm/gamma:0"."""
    found: dict[str, Array] = {}
    for layer in (*_read_list(root, "layer_names"), "top_level_model_weights"):
        group = _own(root, layer) if layer in root else {}
        names = _read_list(group, "weight_names") if layer in root else []
        for name in names:
            path = re.sub(r":\d+$", "", name)
            if path.endswith("/depthwise_kernel") and not any("pointwise_kernel" in other for other in names):
                path = path.removesuffix("depthwise_kernel") + "kernel"  # as Keras 3 calls it
            path = f"{layer}/{path}" if path in found else path
            if path in found:
                raise ValueError(f"it holds {path!r} twice")
            found[path] = _read_array(group, name)
    return found


def _read_list(group: Any, name: str) -> list[str]:
    """Read an attribute that is a list of strings; a long one is in several parts."""
    parts = [name] if name in group.attrs else [key for key in sorted(group.attrs, key=_by_number)]
    parts = [key for key in parts if re.fullmatch(rf"{name}\d*", key)]
    return [text.decode() if isinstance(text, bytes) else str(text) for key in parts for text in group.attrs[key]]


def _own(group: Any, key: str) -> Any:
    """Return what is in a group, and in this file: links to other files could open any."""
    kind = type(group.get(key, getlink=True)).__name__
    if kind != "HardLink":
        raise ValueError(f"{key!r} is a link elsewhere")
    return group[key]


def _read_array(group: Any, key: str) -> Array:
    for part in key.split("/")[:-1]:
        group = _own(group, part)
    data = _own(group, key.split("/")[-1])
    if not hasattr(data, "shape") or data.external or data.is_virtual:
        raise ValueError(f"{key!r} is no array of this file")
    array = np.asarray(data[()])
    if data.attrs.get("dtype") == "bfloat16" or array.dtype == "V2":  # Keras has no other that HDF5 lacks
        return array.view(jnp.bfloat16) if array.dtype.kind == "V" else array.astype(jnp.bfloat16)
    return array


def _snake(name: str) -> str:
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
