"""What x is normalized by: the statistics of the batch, or what a function of them and the running ones returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.numpy import asarray, broadcast_to, zeros, zeros_like

from jbn.core.axes import vary_as
from jbn.core.programs import Program, read_program, trace
from jbn.core.statistics import Moments


class Correction(NamedTuple):
    """What follows the normalization by the statistics of the batch, and precedes γ and β: scale · x̂ + shift.

    Attributes:
        scale: real numbers, (features,) or one for all features.
        shift: likewise, in standard deviations of the batch.
    """

    scale: Array
    shift: Array


_MEAN_AND_VAR = ("pilot", "offset", "var")

NormalizeBy: TypeAlias = Callable[[Moments, Moments, float], Moments | Correction]
"""A function of the moments of the batch, those of the state and ε; it returns what to normalize by."""


class Basis(NamedTuple):
    """What is chosen from beside the moments of the batch: the running statistics, and what the function holds."""

    mean: Array  # (features,)
    var: Array  # (features,)
    held: tuple[Array, ...]


@dataclass(frozen=True)
class Choice:
    """A function that chooses what x is normalized by, as a program; two are equal if they compute the same."""

    program: Program
    corrects: bool  # whether it returns a Correction, or Moments

    def __call__(self, batch: Moments, basis: Basis) -> Moments | Correction:
        """Return what the function returns."""
        found = _run(self.program, tuple(jax.tree.leaves((batch, basis.mean, basis.var))), basis.held)
        return Correction(*found) if self.corrects else replace(batch, **dict(zip(_MEAN_AND_VAR, found, strict=True)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(program: Program, args: tuple[Array, ...], held: tuple[Array, ...]) -> list[Array]:
    return program(args, held)


@_run.defjvp
def _run_jvp(program: Program, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    (args, held), (dargs, dheld) = primals, tangents
    found = _run(program, args, held)
    dargs = list(map(vary_as, dargs, args))
    return found, list(map(vary_as, program.differentiate(args, held, dargs, dheld), found))


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
    corrects = False

    def of_one(batch: Moments, mean: Array, var: Array) -> tuple[Array, ...]:
        nonlocal corrects
        found = normalize_by(batch, moments_of_state(mean, var), epsilon)
        corrects = isinstance(found, Correction)
        return _read_fields(found, mean)

    of_each = jax.tree.map(lambda array: 0 if array.ndim else None, batch)
    of_all = jax.vmap(of_one, in_axes=(of_each, None, None)) if grouped else of_one
    leaves, tree = jax.tree.flatten((batch, mean, var))
    traced = trace("normalize_by", lambda *args: of_all(*jax.tree.unflatten(tree, args)), *leaves)
    program, held = read_program("normalize_by", traced, *leaves)
    return Choice(program, corrects), held


def _read_fields(found: object, mean: Array) -> tuple[Array, ...]:
    """Return the arrays of what a function has returned, per feature and in the dtype of the arithmetic."""
    names = Correction._fields if isinstance(found, Correction) else _MEAN_AND_VAR
    if not isinstance(found, Correction | Moments):
        raise TypeError(
            f"normalize_by returns {type(found).__name__}; expected jbn.Moments, or jbn.Correction(scale, shift)."
        )
    values = [getattr(found, name) for name in names]
    for name, value in zip(names, values, strict=True):
        dtype = getattr(value, "dtype", np.asarray(value).dtype if isinstance(value, int | float | complex) else None)
        real = dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))
        if not real or np.shape(value) not in ((), mean.shape):
            what = type(value).__name__ if dtype is None else f"shape {np.shape(value)} and dtype {dtype.name}"
            raise ValueError(
                f"normalize_by returns {type(found).__name__} with {name} of {what}; expected real numbers of the "
                f"shape of the features, {mean.shape}."
            )
    return tuple(broadcast_to(asarray(value), mean.shape).astype(mean.dtype) for value in values)
