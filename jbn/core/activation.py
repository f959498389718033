"""The activation as a part of the derivative rule: a function of z, and the arrays that it holds as arguments."""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import jax
from jax import Array

from jbn.core.axes import vary_as
from jbn.core.checks import FLOATS

Activation: TypeAlias = Callable[[Array], Array]


def open_activation(
    activation: Activation | None, z: jax.ShapeDtypeStruct, *others: Array
) -> tuple[Callable[..., Array] | None, tuple[Array, ...]]:
    """Turn the values that an activation closes over, such as a learned slope, into arguments of it.

    Args:
        activation: a function of one array, or None.
        z: the shape and dtype of that array.
        others: the arrays that z will be made of: over which mesh axes z varies follows from theirs.

    Returns:
        A function of z and of the slopes, and the slopes.
    """
    if activation is None:
        return None, ()
    if not callable(activation):
        raise TypeError(f"activation is {activation!r}; expected a function of one array, for instance jax.nn.relu.")
    if _is_plain(activation):
        _check_activation(activation, z)
        return activation, ()
    # Imported here, because it brings Pallas, which takes half of the time that ``import jbn`` takes.
    from jax.extend.core import jaxpr_as_fun

    typed = jax.eval_shape(lambda x, *more: vary_as(x.astype(z.dtype), *more), *others)
    program = _trace(activation, typed)
    # The constants are left out, because what is a static argument is kept for ever.
    empty = program.replace(consts=[None] * len(program.consts))
    return (lambda z, *slopes: jaxpr_as_fun(empty.replace(consts=slopes))(z)[0]), tuple(program.consts)


def _is_plain(part: object) -> bool:
    """Tell whether a function is code alone, so that it is the same at the next call.

    What it holds, in a closure or as the arguments of a partial, may be numbers, strings and other such functions.
    """
    if isinstance(part, partial):
        return all(map(_is_plain, (part.func, *part.args, *part.keywords.values())))
    part = inspect.unwrap(part) if callable(part) else part
    if isinstance(part, FunctionType):
        return all(_is_plain(cell.cell_contents) for cell in part.__closure__ or ())
    return part is None or isinstance(part, int | float | str | BuiltinFunctionType)


def _trace(activation: Activation, z: jax.ShapeDtypeStruct) -> Any:
    program = jax.make_jaxpr(lambda z: activation(z))(z)  # A new function, because JAX keeps the program of an old one.
    returned = [f"{y.dtype.name}{list(y.shape)}" for y in program.out_avals]
    if len(returned) != 1 or returned[0].partition("[")[0] not in FLOATS or program.out_avals[0].shape != z.shape:
        raise ValueError(
            f"activation returns {', '.join(returned) or 'nothing'} for {z.dtype.name}{list(z.shape)}; expected one "
            "floating-point array of the same shape."
        )
    return program


@lru_cache(maxsize=1024)  # An eager call then does not trace the activation again.
def _check_activation(activation: Activation, z: jax.ShapeDtypeStruct) -> None:
    _trace(activation, z)
