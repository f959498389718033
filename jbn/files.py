"""Arrays in files: ``.npz``, ``.safetensors``, which needs the package of that name, and Keras's, which need h5py."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jbn.arguments import read_path
from jbn.atomic import replace_file
from jbn.converting.trees import as_numpy
from jbn.keras_files import read_h5, read_keras
from jbn.paths import ArrayTree, flatten, join

NumPyArray = np.ndarray[Any, np.dtype[Any]]

# What every file keeps: NumPy's own, of whose kind .npz keeps all, and of others the bytes alone.
_OWN = {np.dtype(code).name for code in "?bBhHiIqQefd"}
_CODES = {
    "BOOL": "bool",
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "C64": "complex64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

# How the files of others are read.
_TORCH = (
    'state_dict = torch.load({!r}, map_location="cpu", weights_only=True), then jbn.convert(state_dict, "torch", ...)'
)
_WAYS = {
    **dict.fromkeys((".pt", ".pth", ".bin"), _TORCH),
    ".ckpt": (
        'of PyTorch Lightning it is torch.load({!r}, map_location="cpu", weights_only=True)["state_dict"], '
        "of TensorFlow tf.train.load_checkpoint"
    ),
    **dict.fromkeys((".pkl", ".pickle"), "a pickle can run any code; open it where you trust it, and save its arrays"),
    **dict.fromkeys((".h5", ".keras"), "give it that suffix, for jbn.load_arrays"),
    ".msgpack": 'flax.serialization.msgpack_restore(open({!r}, "rb").read()), and jbn.convert(variables, "linen", ...)',
    ".eqx": 'eqx.tree_deserialise_leaves({!r}, (model, state)), then jbn.convert((model, state), "equinox", ...)',
    ".onnx": "{{t.name: onnx.numpy_helper.to_array(t) for t in onnx.load({!r}).graph.initializer}}",
    ".gguf": "{{t.name: t.data for t in gguf.GGUFReader({!r}).tensors}}",
    ".tflite": "take the model that it was made from, for its norms are folded and gone",
    ".npy": "np.load({!r}), which is one array",
    "/": (
        "of Orbax it is orbax.checkpoint.StandardCheckpointer().restore(os.path.abspath({!r})), of TensorFlow "
        'tf.saved_model.load; then jbn.convert(variables, "linen", ...)'
    ),
}
# Where a file has another one's name: its first bytes.
_STARTS = {b"\x93NUMPY": ".npy", b"\x89HDF\r\n": ".h5", b"GGUF": ".gguf", b"\x80\x02": ".pkl", b"\x80\x04": ".pkl"}


class _Unfit(ValueError):
    """What is wrong with a file that is whole, with the fix."""


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[Any, ArrayTree] | tuple[ArrayTree, ...]) -> None:
    """Write arrays by name into a file, aside first and then in one move; ``load_arrays`` gives back the same.

    Args:
        path: a file that ends in ``.safetensors`` or ``.npz``, or a link to one, which stays. A process that is killed
            meanwhile leaves the old file, and beside it a hidden one that the next call in that folder removes.
        arrays: names to arrays of NumPy, jax or PyTorch, such as a ``state_dict`` or what ``jbn.convert`` makes for
            "torch" and "keras". Or a tree, such as the variables of Linen, ``nnx.state(model)`` or
            ``(params, state)``: its arrays get the keys above them as names, joined by slashes, and come back so, flat.

    Raises:
        ValueError: for another suffix, a folder, and before anything is written for what the file would not give back:
            names such as "a" beside "a.npy" in ``.npz`` and "__metadata__" in ``.safetensors``; dtypes, of which
            ``.npz`` has no bfloat16 and no float8, and neither has complex numbers.
        TypeError: for what is not a mapping of strings to arrays, or a tree of arrays.
        OSError: where the file cannot be written.
        ImportError: where ``safetensors`` is needed and not installed.

    >>> import jax.numpy as jnp, jbn, tempfile
    >>> file = tempfile.mkdtemp() + "/norm.npz"
    >>> jbn.save_arrays(file, {"norm.weight": jnp.ones(3)})
    >>> jbn.load_arrays(file)["norm.weight"].tolist()
    [1.0, 1.0, 1.0]

    Source: https://huggingface.co/docs/safetensors, and ``numpy.lib.format``. ``torch.save`` writes pickles, which can
    run any code where they are read: in PyTorch use ``safetensors.torch.save_file(model.state_dict(), path)``.
    """
    path = read_path("path", path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"path is {str(path)!r}; expected a file that ends in {' or '.join(_FORMATS)}.")
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"path is {str(path)!r}, {what}; expected a file, or a name that is free.")
    if not isinstance(arrays, Mapping | tuple):
        raise TypeError(
            f"arrays is of type {type(arrays).__name__}; expected a mapping of names to arrays, or a tree: variables "
            "of Linen, nnx.state(model), a state_dict(); of a TrainState a mapping of its params and batch_stats."
        )
    found = {name: _read_array(name, value, path.suffix) for name, value in _flatten(arrays).items()}
    form = _FORMATS[path.suffix]
    if lost := _find_lost(form, list(found)):
        raise ValueError(
            f"arrays: {path.suffix} does not give back the name {lost[0]!r}: {form.names}. Expected another name."
        )
    replace_file(path, lambda file: form.write(file, found))


def load_arrays(path: str | os.PathLike[str]) -> dict[str, NumPyArray]:
    """Read the arrays of a file, by name; nothing in it is run.

    Args:
        path: a file that ends in ``.safetensors`` or ``.npz``, of any writer, or in ``.keras``, ``.h5`` or ``.hdf5``,
            of Keras: of such a file the weights, as in ``model.weights``.

    Returns:
        Names to NumPy arrays, of bfloat16 and float8 too. Those of Keras are as ``v.path``, without the name of the
        whole model (an older ``.h5`` may keep that), such as "norm/moving_mean", for
        ``jbn.convert(arrays, "keras", ...)``. Where a file does not tell what an array is they end in its number, such
        as "norm/vars/0": those without a configuration, ``.weights.h5``, for layers of other classes, and for norms of
        which scale or bias is lacking. A flipped bit is noticed in ``.npz`` alone, which has checksums.

    Raises:
        ValueError: for another suffix, with how such files are read; and for a file that is damaged or holds other
            things than arrays.
        OSError: where there is no such file, or it cannot be read.
        ImportError: where ``safetensors`` or ``h5py`` is needed and not installed.

    >>> import jbn
    >>> state_dict = jbn.load_arrays("model.safetensors")  # doctest: +SKIP
    >>> variables = jbn.convert(state_dict, "torch", "linen", like=variables)  # doctest: +SKIP

    Source: see ``jbn.save_arrays``.
    """
    path = read_path("path", path)
    kind = "/" if path.is_dir() else path.suffix
    if kind not in _READERS:
        what = "a folder" if kind == "/" else "a file"
        known = ", ".join(_READERS)
        raise ValueError(f"path is {str(path)!r}, {what}; expected a file that ends in {known}.{_way(kind, path)}")
    try:
        with path.open("rb") as file:
            return _READERS[kind](file)
    except ImportError:
        raise
    except _Unfit as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # each format has its own, and they have no common base
        # Libraries have OSErrors for content too, which no call of the system gave, or one that content had misled.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        other = _recognize(path)
        fix = (
            f"Expected a whole {kind} file of arrays; copy or save it again."
            if other is None or other == kind.replace(".hdf5", ".h5")
            else f"It begins as {other} does.{_way(other, path)}"
        )
        raise ValueError(f"{path} cannot be read: {error}. {fix}") from error


def _way(kind: str, path: Path) -> str:
    """Say how the file of another library is read."""
    return f" To read it: {_WAYS[kind].format(str(path))}." if kind in _WAYS else ""


def _recognize(path: Path) -> str | None:
    """Return the suffix that a file should have, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    if not zipfile.is_zipfile(path):
        return next((suffix for first, suffix in _STARTS.items() if start.startswith(first)), None)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # as many kinds as ways to damage it
        return None
    theirs = {"data.pkl": ".pt", "config.json": ".keras"}
    return next((suffix for name in names for last, suffix in theirs.items() if Path(name).name == last), ".npz")


def _flatten(arrays: Mapping[Any, ArrayTree] | tuple[ArrayTree, ...]) -> Mapping[Any, Any]:
    """Return arrays by name: those of a mapping as they are, those of a tree by the keys above them."""
    if isinstance(arrays, Mapping) and not any(isinstance(value, Mapping | tuple | list) for value in arrays.values()):
        return arrays
    paths, leaves, _ = flatten(arrays, "arrays")
    names = [join(path) for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"arrays: {twice[0]!r} is there as a name and as keys of a tree; expected another name.")
    return dict(zip(names, leaves, strict=True))


def _read_array(name: object, value: Any, suffix: str) -> NumPyArray:
    """Return an array as it is written, contiguous and in the order of bytes of this machine."""
    if not isinstance(name, str):
        raise TypeError(f"arrays: {name!r} is of type {type(name).__name__}; expected a string.")
    try:
        array = as_numpy(value)
    except TypeError as error:
        raise TypeError(f"arrays: {name!r} {error}") from error
    if array.dtype.name not in _FORMATS[suffix].dtypes:
        elsewhere = [other for other, form in _FORMATS.items() if array.dtype.name in form.dtypes]
        raise ValueError(
            f"arrays: {name!r} is of {array.dtype}, which {suffix} lacks; expected another dtype, such as float32."
            + "".join(f" There is {other} for it." for other in elsewhere)
        )
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def _find_lost(form: _Format, names: list[str]) -> list[str]:
    """Write names on trial, with a number each, and return those that do not come back with it."""
    file = io.BytesIO()
    try:
        form.write(file, {name: np.asarray(i) for i, name in enumerate(names)})
        file.seek(0)
        found = form.read_elsewhere(file)
    except ImportError:
        raise
    except Exception:  # as many kinds as writers
        return names if len(names) < 2 else [lost for name in names for lost in _find_lost(form, [name])]
    return [name for i, name in enumerate(names) if name not in found or found[name] != i]


def _read_npz(file: IO[bytes]) -> dict[str, NumPyArray]:
    arrays = {}
    # Not np.load: beside "a.npy.npy" it takes "a.npy" for another array than it is.
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                raise ValueError(f"it holds {member!r}, which is no array")
            name = member.removesuffix(".npy")
            with archive.open(member) as opened:
                arrays[name] = _read_member(name, opened)
    return arrays


def _read_member(name: str, file: IO[bytes]) -> NumPyArray:
    try:
        array: NumPyArray = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise ValueError(f"{name!r}: {error}") from error
        raise _Unfit(
            f"{name!r} holds Python objects, as a pickle, which can run any code. Expected numbers: open it with "
            "np.load(..., allow_pickle=True) where you trust it, and save its arrays."
        ) from error
    if array.dtype.kind == "V" and not array.dtype.names:
        raise _Unfit(
            f"{name!r} is bytes without a meaning, as .npz keeps bfloat16 and float8. Expected another dtype, or "
            ".safetensors, from where it was made."
        )
    return array


def _write_npz(file: IO[bytes], arrays: Mapping[str, NumPyArray]) -> None:
    # Not np.savez: its own arguments are names that arrays cannot have.
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Files that end in .safetensors need a package: pip install safetensors.") from error
    return safetensors


def _read_safetensors(file: IO[bytes]) -> dict[str, NumPyArray]:
    # Not its load_file: it looks for the dtypes of ml_dtypes in NumPy.
    library, arrays = _safetensors(), {}
    for name, found in library.deserialize(file.read()):
        if found["dtype"] not in _CODES:
            raise _Unfit(f"{name!r} is of {found['dtype']}, which NumPy lacks. Expected one of {', '.join(_CODES)}.")
        dtype = jnp.dtype(_CODES[found["dtype"]])
        arrays[name] = np.array(np.frombuffer(found["data"], dtype).reshape(found["shape"]))
    return arrays


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, NumPyArray]) -> None:
    file.write(_safetensors().numpy.save(dict(arrays)))  # its own writer hides what the system says


class _Format(NamedTuple):
    """How files of a suffix are read and written."""

    read: Callable[[IO[bytes]], dict[str, NumPyArray]]
    write: Callable[[IO[bytes], Mapping[str, NumPyArray]], None]
    read_elsewhere: Callable[[IO[bytes]], Mapping[str, NumPyArray]]  # as those read it who do not have jbn
    dtypes: Iterable[str]
    names: str  # why a name is lost


_FORMATS = {
    ".safetensors": _Format(
        _read_safetensors,
        _write_safetensors,
        _read_safetensors,
        _OWN | {"bfloat16", "float8_e4m3fn", "float8_e5m2"},
        "it must be text, other than its own '__metadata__'",
    ),
    ".npz": _Format(
        _read_npz,
        _write_npz,
        lambda file: dict(np.load(file)),
        _OWN,
        "it must be text without NUL, and 'a.npy' beside 'a' is taken for it",
    ),
}

_READERS: dict[str, Callable[[IO[bytes]], dict[str, NumPyArray]]] = {
    **{suffix: form.read for suffix, form in _FORMATS.items()},
    ".keras": read_keras,
    ".h5": read_h5,
    ".hdf5": read_h5,
}
