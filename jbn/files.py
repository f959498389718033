"""Arrays in files: ``.safetensors``, which needs the package of that name, and ``.npz``."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jbn.converting.trees import as_numpy

Array = np.ndarray[Any, np.dtype[Any]]

# What every file keeps; .safetensors keeps bfloat16 too, which .npz would give back as bytes without a meaning.
_DTYPES = {np.dtype(code).name for code in "?bBhHiIqQefd"}


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write arrays by name into a file, aside first and then in one move.

    Args:
        path: a file that ends in ``.safetensors`` or ``.npz``.
        arrays: names to arrays of NumPy, jax or PyTorch, such as a ``state_dict`` or what ``jbn.convert`` makes for
            "torch" and "keras".

    Raises:
        ValueError: for another suffix, and for dtypes that the file would not give back: ``.npz`` has no bfloat16, and
            neither has complex numbers or eight bits.
        TypeError: for what is not a mapping of strings to arrays.
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
    path = Path(path)
    suffix = _suffix(path)
    kept = _DTYPES | ({"bfloat16"} if suffix == ".safetensors" else set())
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays is of type {type(arrays).__name__}; expected a mapping of names to arrays.")
    found: dict[str, Array] = {}
    for name, value in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"arrays: {name!r} is of type {type(name).__name__}; expected a string.")
        try:
            found[name] = np.array(as_numpy(value), order="C")
        except TypeError as error:
            raise TypeError(f"arrays: {name!r} {error}") from error
        if found[name].dtype.name not in kept:
            raise ValueError(
                f"arrays: {name!r} is of {found[name].dtype}, which {suffix} lacks; expected another dtype, such as "
                "float32. For bfloat16 there is .safetensors."
            )
    partial = path.with_name(f".{path.name}.partial")
    try:
        _FORMATS[suffix][1](partial, found)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of a file, by name; nothing in it is run.

    Args:
        path: a file that ends in ``.safetensors`` or ``.npz``, of any writer.

    Returns:
        Names to NumPy arrays, of bfloat16 too. A flipped bit is noticed in ``.npz`` alone, which has checksums.

    Raises:
        ValueError: for another suffix, and for a file that is damaged or holds other things than arrays.
        OSError: where there is no such file, or it cannot be read.
        ImportError: where ``safetensors`` is needed and not installed.

    >>> import jbn
    >>> state_dict = jbn.load_arrays("model.safetensors")  # doctest: +SKIP
    >>> variables = jbn.convert(state_dict, "torch", "linen", like=variables)  # doctest: +SKIP

    Source: see ``jbn.save_arrays``.
    """
    path = Path(path)
    read = _FORMATS[_suffix(path)][0]
    try:
        return read(path)
    except (OSError, ImportError):
        raise
    except Exception as error:  # each format has its own, and they have no common base
        raise ValueError(
            f"{path} cannot be read: {error}. Expected a whole {path.suffix} file of arrays; copy or save it again."
        ) from error


def _suffix(path: Path) -> str:
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"path is {str(path)!r}; expected a file that ends in {' or '.join(_FORMATS)}. Of .pt and .pth PyTorch "
            "makes one: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    return path.suffix


def _read_npz(path: Path) -> dict[str, Array]:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = dict(file)
    if lost := [name for name, array in arrays.items() if array.dtype.kind == "V"]:
        raise ValueError(f"{lost[0]!r} is bytes without a meaning, as .npz keeps bfloat16")
    return arrays


def _write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    # Not np.savez: its own arguments are names that arrays cannot have.
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Files that end in .safetensors need a package: pip install safetensors.") from error
    return safetensors.numpy


def _read_safetensors(path: Path) -> dict[str, Array]:
    return {name: np.array(array) for name, array in _safetensors().load_file(path).items()}


def _write_safetensors(path: Path, arrays: Mapping[str, Array]) -> None:
    path.write_bytes(_safetensors().save(dict(arrays)))  # its own writer hides what the system says


_FORMATS = {".safetensors": (_read_safetensors, _write_safetensors), ".npz": (_read_npz, _write_npz)}
