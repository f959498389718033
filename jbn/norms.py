"""Norms that others wrote: whose computation a layer is, and which classes can be taken for Flax's norm."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from jbn.arguments import is_several, refuse
from jbn.paths import name_few

Classes: TypeAlias = type | Sequence[type]
"""A class of norms, or several of them."""

STATISTICS = ("mean", "var")

# Without them nobody knows what a norm computes; a copy that lacks others of Flax's fields has Flax's defaults.
_NEEDED = ("momentum", "epsilon")
# The fields of Flax's norms, and how copies name the first values of statistics, which only their own code makes.
_KNOWN = frozenset(
    {
        *_NEEDED, *STATISTICS, "use_running_average", "axis", "dtype", "param_dtype", "use_bias", "use_scale",
        "bias_init", "scale_init", "axis_name", "axis_index_groups", "use_fast_variance", "force_float32_reductions",
        "promote_dtype", "num_features", "scale", "bias", "mean_init", "var_init",
    }
)  # fmt: skip
_TAKEN = ("use_running_average", "mask")


def find_class(layer: Any, classes: Iterable[type]) -> type | None:
    """Return the one of some classes whose computation a layer is; subclasses may have code of their own."""
    mine = type(layer).__call__
    return next((kind for kind in classes if isinstance(layer, kind) and mine is kind.__call__), None)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class NormClasses:
    """The classes that compute what Flax's norm does.

    Attributes:
        also: those that the user says do so, beside jbn's and Flax's own, ``own``.
    """

    own: ClassVar[tuple[type, ...]]
    also: tuple[type, ...] = ()

    def find_class(self, module: Any) -> type | None:
        """Return the class whose computation a module is, where that is a norm's."""
        return find_class(module, (*self.own, *self.also))


def read_also(also: Classes, base: type) -> tuple[type, ...]:
    """Read the argument ``also``: classes of norms, modules of one kind, that are called as Flax's norm is."""
    kinds = (also,) if isinstance(also, type) else tuple(also) if is_several(also) else None
    if kinds is None:
        raise refuse("also", also, f"classes of norms, subclasses of {_module(base)}, such as also=(BatchNorm,)")
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise TypeError(
                f"also has {kind!r}; expected classes of norms, subclasses of {_module(base)}, "
                "such as also=(BatchNorm,)."
            )
        taken = list(inspect.signature(kind.__call__).parameters)[2:]  # type: ignore[attr-defined]
        if unknown := [name for name in taken if name not in _TAKEN]:
            raise TypeError(
                f"also has {kind.__name__}, whose call takes {', '.join(unknown)}; expected (x, "
                f"use_running_average=None, *, mask=None), or less of it. {_fix(kind)}"
            )
    return kinds


def _module(base: type) -> str:
    return f"{base.__module__.split('.')[1]}.Module of Flax"


def check_fields(kind: type, fields: Iterable[str]) -> None:
    """Refuse a class of ``also`` that has fields whose meaning is not known, or lacks one that is needed."""
    names = list(fields)
    if unknown := [name for name in names if name not in _KNOWN]:
        raise TypeError(
            f"also has {kind.__name__}, whose fields {name_few(unknown)} Flax's BatchNorm has not, and may change what "
            f"it computes; expected fields of Flax's. {_fix(kind)}"
        )
    called = inspect.signature(kind.__call__).parameters  # type: ignore[attr-defined]
    lacking = [name for name in _NEEDED if name not in names]
    lacking += ["use_running_average"] * ("use_running_average" not in {*names, *called})
    if lacking:
        raise TypeError(
            f"also has {kind.__name__}, which has no field {', '.join(lacking)}; expected it by the name that Flax's "
            f"BatchNorm gives it. {_fix(kind)}"
        )


def check_variables(kind: type, path: str, params: Iterable[str], statistics: Iterable[str]) -> None:
    """Refuse a layer of a class of ``also`` that holds more than Flax's norm does, or names it otherwise."""
    if more := sorted({*params} - {"scale", "bias"}) + sorted({*statistics} - {*STATISTICS}):
        raise ValueError(
            f"also has {kind.__name__}, which holds {name_few(more)} at {path or 'the root'}; expected no parameters "
            f"but scale and bias, and no statistics but mean and var. {_fix(kind)}"
        )


def _fix(kind: type) -> str:
    return f"Leave {kind.__name__} out of also, or put jbn's BatchNorm in its place in the model."
