"""Arguments that several tools and both modules take: read here, and refused by name where they are of another kind."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.core.checks import FLOATS, read_array, read_axis_names, read_flag
from jbn.core.numbers import check_momentum, read_epsilon


def refuse(name: str, value: object, expected: str) -> TypeError:
    """Return the error about an argument of another kind; what is short is shown, of the rest the type."""
    plain = value is None or isinstance(value, str | bool | int | float) or callable(value)
    shown = repr(value) if plain and len(repr(value)) <= 60 else f"of type {type(value).__name__}"
    return TypeError(f"{name} is {shown}; expected {expected}.")


def is_several(value: object) -> bool:
    """Say whether something has items, and is no mapping, no text and no array."""
    return isinstance(value, Iterable) and not isinstance(value, Mapping | str | bytes) and not hasattr(value, "dtype")


def read_choice(name: str, value: object, choices: Iterable[str], what: str = "") -> Any:
    """Return one of several words."""
    if not isinstance(value, str) or value not in choices:
        known = " or ".join(map(repr, choices)) if len([*choices]) < 3 else f"one of {', '.join(map(repr, choices))}"
        raise ValueError(f"{name} is {value!r}; expected {known}{what}.")
    return value


def read_path(name: str, value: object) -> Path:
    """Return the path of a file."""
    if not isinstance(value, str | os.PathLike):
        raise refuse(name, value, "the path of a file, text or pathlib.Path")
    return Path(value)


def read_real(name: str, value: object) -> Array:
    """Return real numbers as an array, of Python, NumPy or JAX, traced or not."""
    dtype = getattr(value, "dtype", np.dtype(type(value)) if type(value) in (int, float) else None)
    if not isinstance(dtype, np.dtype) or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise refuse(name, value, "a real number, or an array of them")
    return read_array(name, value) if hasattr(value, "dtype") else jnp.asarray(value)  # type: ignore[no-any-return]


def check_model(model: object, kind: type, library: str) -> None:
    """Refuse what is no module of a library."""
    if isinstance(model, kind):
        return
    fix = ""
    if isinstance(model, type) and issubclass(model, kind):
        fix = f": an instance of it, {model.__name__}(...)"
    elif isinstance(getattr(model, "__self__", None), kind):
        fix = f": the model itself, without .{getattr(model, '__name__', 'apply')}"
    raise TypeError(f"model is of type {type(model).__name__}; expected a {library}.Module{fix}.")


def check_options(**options: Any) -> None:
    """Refuse options of a layer that are of other kinds, where they are written; others than these pass."""
    for name, value in options.items():
        if name in _READERS:
            _READERS[name](name, value)


def _check_kind(fits: Callable[[Any], bool], expected: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not fits(value):
            raise refuse(name, value, expected)

    return check


def _is_float(value: Any) -> bool:
    try:
        plain = not isinstance(value, tuple | list | np.ndarray | Array)
        return value is None or (plain and jnp.dtype(value).name in FLOATS)
    except TypeError:
        return False


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_integers(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, Sequence) and all(map(_is_integer, value)))


def _is_group(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, Mapping) and all(map(_is_integer, value))


_FUNCTION = _check_kind(lambda value: value is None or callable(value), "a function or None")
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "num_features": _check_kind(lambda n: _is_integer(n) and n >= 0, "the size of the feature axis, x.shape[-1]"),
    "use_running_average": lambda name, value: None if value is None else read_flag(name, value),
    "axis": _check_kind(_is_integers, "an integer or a tuple of integers, the axes of the features"),
    "momentum": lambda _, value: check_momentum(value),
    "epsilon": lambda _, value: read_epsilon(value),
    **dict.fromkeys(("dtype", "param_dtype"), _check_kind(_is_float, f"one of {', '.join(FLOATS)}, or None")),
    "axis_name": lambda _, value: None if value is None else read_axis_names(value),
    "axis_index_groups": _check_kind(
        lambda value: value is None or (is_several(value) and all(map(_is_group, value))),
        "lists of integers, one for each group, or None",
    ),
    "activation": _FUNCTION,
    "normalize_by": _FUNCTION,
    "group_size": _check_kind(
        lambda value: value is None or _is_integer(value), "an integer, the number of examples in a group, or None"
    ),
    **dict.fromkeys(("unbiased", "sow_moments"), read_flag),
    # Flax reads these by their truth.
    **dict.fromkeys(
        ("use_bias", "use_scale", "use_fast_variance", "force_float32_reductions"),
        _check_kind(lambda value: value is None or isinstance(value, bool | int | np.bool_), "True or False"),
    ),
}
