"""What x is normalized by: the statistics of the batch, or what a function of them and the running ones returns."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import eval_jaxpr
from jax.numpy import asarray, broadcast_to, zeros, zeros_like

from jbn.core import checks
from jbn.core.programs import bodies, equations, find_settings, inline, write
from jbn.core.statistics import Moments


class Correction(NamedTuple):
    """What follows the normalization by the statistics of the batch, and precedes γ and β: scale · x̂ + shift."""

    scale: Array  # (features,)
    shift: Array  # (features,)


_MEAN_AND_VAR = ("pilot", "offset", "var")

NormalizeBy: TypeAlias = Callable[[Moments, Moments, float], Moments | Correction]


class Basis(NamedTuple):
    """What is chosen from beside the moments of the batch: the running statistics, and what the function holds."""

    mean: Array  # (features,)
    var: Array  # (features,)
    held: tuple[Array, ...]


@dataclass(frozen=True)
class Choice:
    """A function that chooses what x is normalized by, as a program; two are equal if they compute the same."""

    text: str
    settings: tuple[Any, ...]  # what is no part of its text
    corrects: bool  # whether it returns a Correction, or Moments
    program: Any = field(compare=False, repr=False)

    def __call__(self, batch: Moments, basis: Basis) -> Moments | Correction:
        """Return what the function returns."""
        arrays = jax.tree.leaves((batch, basis.mean, basis.var))
        found = eval_jaxpr(self.program, (), *arrays, *basis.held)
        return Correction(*found) if self.corrects else replace(batch, **dict(zip(_MEAN_AND_VAR, found, strict=True)))


def moments_of_state(mean: Array, var: Array) -> Moments:
    """Return running statistics as moments, of nobody knows how many rows: the count is 0."""
    none = zeros((), var.dtype)
    return Moments(none, mean, zeros_like(mean), var, none)


def trace_choice(
    normalize_by: NormalizeBy, batch: Moments, mean: Array, var: Array, epsilon: float, *, grouped: bool
) -> tuple[Choice, tuple[Array, ...]]:
    """Return a function as a program, and the arrays that it holds.

    Args:
        normalize_by: a function of the moments of the batch, of those of the state, and of epsilon.
        batch: the types of the moments of the batch.
        mean: the running mean, or its type.
        var: the running variance, or its type.
        epsilon: what will be added to the variance.
        grouped: whether there are moments of several groups, with a leading axis: the function sees those of one.
    """
    checks.check_callable("normalize_by", normalize_by, "of the moments of the batch, those of the state and epsilon")
    corrects = False

    def of_one(batch: Moments, mean: Array, var: Array) -> tuple[Array, ...]:
        nonlocal corrects
        found = normalize_by(batch, moments_of_state(mean, var), epsilon)
        corrects = isinstance(found, Correction)
        return _read_fields(found, mean)

    of_each = jax.tree.map(lambda array: 0 if array.ndim else None, batch)
    of_all = jax.vmap(of_one, in_axes=(of_each, None, None)) if grouped else of_one
    traced = jax.make_jaxpr(of_all)(batch, mean, var)
    types = jax.tree.leaves((batch, mean, var))
    f = jax.make_jaxpr(lambda *args: inline(traced.jaxpr, traced.consts, *args))(*types)

    def slope(args: Any, dargs: Any, held: Any) -> Any:
        return jax.jvp(lambda *args: eval_jaxpr(f.jaxpr, held, *args), args, dargs)[1]

    derivative = jax.make_jaxpr(slope)(tuple(types), tuple(types), tuple(f.consts))
    if any(body.consts for program in (f, derivative) for eqn in equations(program.jaxpr) for body in bodies(eqn)):
        raise TypeError(checks.HELD_INSIDE.format(name="normalize_by"))

    def value(*args: Array) -> Any:
        return eval_jaxpr(f.jaxpr, args[len(types) :], *args[: len(types)])

    program = jax.make_jaxpr(value)(*types, *f.consts)
    text, settings = "\n".join(map(write, (program, derivative))), tuple(find_settings(program, derivative))
    return Choice(text, settings, corrects, program.jaxpr), tuple(f.consts)


def _read_fields(found: object, mean: Array) -> tuple[Array, ...]:
    """Return the arrays of what a function has returned, per feature and in the dtype of the arithmetic."""
    names = Correction._fields if isinstance(found, Correction) else _MEAN_AND_VAR
    if not isinstance(found, Correction | Moments):
        raise TypeError(
            f"normalize_by returns {type(found).__name__}; expected jbn.Moments, or jbn.Correction(scale, shift)."
        )
    arrays = [asarray(getattr(found, name)) for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.shape not in ((), mean.shape) or not jnp.issubdtype(array.dtype, jnp.number):
            raise ValueError(
                f"normalize_by returns {type(found).__name__} with {name} of shape {array.shape} and dtype "
                f"{array.dtype.name}; expected numbers of the shape of the features, {mean.shape}."
            )
    return tuple(broadcast_to(array, mean.shape).astype(mean.dtype) for array in arrays)
