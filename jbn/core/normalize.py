"""Normalization by given moments, with scale, bias, residual and activation in one derivative rule."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.numpy import where

from jbn.core.activation import selects
from jbn.core.axes import name_mesh, vary_as
from jbn.core.choice import Basis, Choice, Correction
from jbn.core.lax import lax
from jbn.core.layout import Layout
from jbn.core.programs import Program
from jbn.core.saved import MOMENTS, name_arrays
from jbn.core.statistics import Moments, SharedRows, differentiate_statistics, statistics, tangent_moments
from jbn.core.sums import read_apart, repeat_rows


@dataclass(frozen=True)
class Recipe:
    """What is known when tracing: where the features are, ε, the activation, the dtypes of y and of arithmetic."""

    layout: Layout
    epsilon: float
    activation: Program | None
    dtype: np.dtype[Any]
    wide: np.dtype[Any]
    by_position: bool = False  # whether scale or bias has the rank of x: what meets them is then brought to it before
    choice: Choice | None = None  # of what the batch is normalized by, where it is not its own statistics


class Operands(NamedTuple):
    """What y is made of, beside the moments; an absent scale is 1, an absent bias or residual is 0."""

    x: Array
    mask: Array | None  # bool, of the rank of x
    scale: Array | None  # (features,), or of the rank of x, each dimension 1 or that of x
    bias: Array | None  # likewise
    residual: Array | None  # the shape of x
    held: tuple[Array, ...]  # the arrays that the activation holds
    basis: Basis | None = None  # what is chosen from, where there is a choice


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(recipe: Recipe, m: Moments, operands: Operands) -> Array:
    """Return f((x - μ)·γ/√(σ² + ε) + β + residual) in the recipe's dtype, and 0 where the mask is false.

    Scale and bias are such as ``lift`` returns.
    """
    z, _ = _affine(recipe, m, operands)
    y = z if recipe.activation is None else recipe.activation([z], operands.held)[0]
    return _hide(operands.mask, y).astype(recipe.dtype)


def lift(recipe: Recipe, operands: Operands, mask: Array | None) -> Operands:
    """Give scale and bias the rank of the statistics, or that of x.

    Where no valid position reads them they are 0: there they may be no numbers, as x may be.
    """
    layout = recipe.layout

    def lift_one(values: Array | None) -> Array | None:
        if values is None or values.ndim == len(layout.axis):
            return None if values is None else _meet(recipe, layout.lift(values))
        if mask is None or all(values.shape[i] == 1 for i in layout.row_axes):
            return values
        shared = tuple(i for i, size in enumerate(values.shape) if size == 1)
        return where(mask.any(shared, keepdims=True), values, 0)

    return operands._replace(scale=lift_one(operands.scale), bias=lift_one(operands.bias))


def _meet(recipe: Recipe, vector: Array) -> Array:
    """Give what has the rank of the statistics that in which it meets scale and bias."""
    return recipe.layout.spread(vector) if recipe.by_position else vector


def _spread(recipe: Recipe, values: Array) -> Array:
    """Give what was made of statistics, scale and bias the rank of x."""
    return values if recipe.by_position else recipe.layout.spread(values)


def _affine(recipe: Recipe, m: Moments, operands: Operands) -> tuple[Array, Array]:
    """Return z and c."""
    dtype, spread, mask = recipe.wide, recipe.layout.spread, operands.mask
    # The mean is subtracted before anything is multiplied: x·a + (β - μ·a) would lose the digits that x and μ share.
    # The mask is applied here and not only at the end: the activation must not see NaN, whose slope is NaN too.
    centred = _hide(mask, (operands.x.astype(dtype) - spread(m.pilot)) - spread(m.offset))
    r = _meet(recipe, lax.rsqrt(m.var + recipe.epsilon))
    z = centred * _spread(recipe, r if operands.scale is None else r * operands.scale.astype(dtype))
    z = z if operands.bias is None else z + _spread(recipe, operands.bias.astype(dtype))
    return (z if operands.residual is None else z + _hide(mask, operands.residual.astype(dtype))), centred


def _hide(mask: Array | None, values: Array) -> Array:
    return values if mask is None else where(mask, values, 0)


# With c = x - μ, r = (σ² + ε)^-½ and a = γ r, per channel, and f the activation:
#
#     z = c a + β + residual                                 y = f(z)
#     dz = a dx + c u + w + d(residual)                      dy = f'(z) dz
#     u = da = r dγ - ½ a r² dσ²                             w = dβ - a dμ
#
# because dr = -½ r³ dσ². It holds for batch statistics, whose dμ and dσ² are those of ``statistics``, and for running
# ones. The rule is linear in the tangents, and JAX transposes it: as u and w are vectors, the transpose is two sums,
# Σ g c and Σ g, and one element-wise pass, with g the cotangent of z. μ = pilot + offset, and how it is split is
# arbitrary, so that the offset can carry all of dμ and the pilot none.
# Where the moments are those of the batch, dμ and dσ² depend on dx too. Both ways of dx are added in the dtype of the
# arithmetic, and what reaches x is rounded once: for cotangents that are nearly constant the two nearly cancel.
def _differentiate(
    recipe: Recipe, m: Moments, operands: Operands, dmean: Array, dvar: Array, dx: Array, d: Operands
) -> Array:
    """Return dy for dx in the dtype of the arithmetic, and for the tangents ``d`` of all else."""
    dtype, layout = recipe.wide, recipe.layout
    r = _meet(recipe, lax.rsqrt(m.var + recipe.epsilon))
    if recipe.by_position:
        # The transpose sums over the positions of an example first, where it has several; else over all rows at once.
        one_row = all(layout.shape[i] == 1 for i in layout.row_axes[1:])
        repeat = partial(repeat_rows, layout, like=operands.x) if one_row else layout.spread
        dmean, dvar = (repeat(vary_as(vector, operands.x)) for vector in (dmean, dvar))
    a = r if operands.scale is None else r * operands.scale.astype(dtype)
    # Each factor r by itself: where x is large, their product is 0 before what it is multiplied with makes up for it.
    u = -0.5 * (a * (r * (r * dvar)))
    u = u if d.scale is None else u + r * d.scale.astype(dtype)
    w = -a * dmean
    w = w if d.bias is None else w + d.bias.astype(dtype)
    z, _ = _affine(recipe, m, operands)
    # On CPUs each sum reads x by itself, see ``read_apart``. Two of the three readers are in ``statistics``; the third
    # is this one, whose transpose is Σ g c. It is apart from the z above, which the slope of the activation needs.
    own, pilot, offset = read_apart(3, operands.x, m.pilot, m.offset)[-1]
    _, centred = _affine(recipe, replace(m, pilot=pilot, offset=offset), operands._replace(x=own))
    u, w = (vary_as(values, operands.x) for values in (u, w))
    if not recipe.by_position:
        u, w = (repeat_rows(layout, vector, operands.x) for vector in (u, w))
    dz = _spread(recipe, a) * dx + centred * u + w
    if d.residual is not None and _passes_numbers(recipe, operands):
        # Added in the dtype of the arrays, so that the transpose is one array for x and the residual: written once, as
        # the gradient of the residual, and read again for that of x, instead of computed twice.
        dz = (dz.astype(recipe.dtype) + d.residual).astype(dtype)
    elif d.residual is not None:
        dz = dz + d.residual.astype(dtype)
    if recipe.activation is not None:
        z = vary_as(z, *jax.tree.leaves((m, operands)))
        dz = recipe.activation.differentiate([z], operands.held, [vary_as(dz, z)], d.held)[0]
    return _hide(operands.mask, dz).astype(recipe.dtype)


def _passes_numbers(recipe: Recipe, operands: Operands) -> bool:
    """Say whether the cotangent of z has the numbers of that of y, or zeros: to round it to the same dtype is exact."""
    one_dtype = operands.residual is not None and recipe.dtype == operands.x.dtype == operands.residual.dtype
    return one_dtype and (recipe.activation is None or selects(recipe.activation))


@normalize.defjvp
def _normalize_jvp(recipe: Recipe, primals: Any, tangents: Any) -> tuple[Array, Array]:
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(m: Moments, operands: Operands, dm: Moments, d: Operands) -> Array:
        return _differentiate(recipe, m, operands, dm.pilot + dm.offset, dm.var, d.x.astype(recipe.wide), d)

    return normalize(recipe, *primals), tangent(*primals, *tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def normalize_by_batch(rows: SharedRows, recipe: Recipe, pilot: Array, operands: Operands) -> tuple[Array, Moments]:
    """Return y, normalized by the statistics of the batch or of each of its groups, and these statistics."""
    with name_mesh():  # The derivative then finds what was traced for the value.
        m = statistics(rows, operands.x, operands.mask, pilot)
    m, here = name_arrays(MOMENTS, m), replace(recipe, layout=rows.layout)
    mine, operands = _choose(here, rows.sums_over.pick(m), lift(here, operands, operands.mask))
    return normalize(here, mine, operands), m


def _choose(recipe: Recipe, m: Moments, operands: Operands) -> tuple[Moments, Operands]:
    """Return the moments to normalize by, and the operands with a correction in scale and bias."""
    if recipe.choice is None or operands.basis is None:
        return m, operands
    found, rest = recipe.choice(m, operands.basis), operands._replace(basis=None)
    if not isinstance(found, Correction):
        return found, rest
    scale, bias = (None if v is None else v.astype(recipe.wide) for v in (operands.scale, operands.bias))
    corrected, shift = (_meet(recipe, vector) for vector in found)
    if scale is not None:
        shift, corrected = scale * shift, scale * corrected
    return m, rest._replace(scale=corrected, bias=shift if bias is None else bias + shift)


@normalize_by_batch.defjvp
def _normalize_by_batch_jvp(rows: SharedRows, recipe: Recipe, primals: Any, tangents: Any) -> tuple[Any, Any]:
    pilot, operands = primals
    with name_mesh():
        m = name_arrays(MOMENTS, statistics(rows, operands.x, operands.mask, pilot))
    here, pick = replace(recipe, layout=rows.layout), rows.sums_over.pick
    y = normalize(here, *_choose(here, pick(m), lift(here, operands, operands.mask)))

    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(m: Moments, operands: Operands, d: Operands) -> tuple[Array, Array, Array]:
        dx = d.x.astype(recipe.wide)
        dmean, dvar = differentiate_statistics(rows, operands.x, operands.mask, m, dx)
        mine, dmine = pick(m), tangent_moments(pick(m), *pick((dmean, dvar)))
        lifted, d = (lift(here, of, operands.mask) for of in (operands, d))
        if recipe.choice is not None:
            (mine, lifted), (dmine, d) = _differentiate_choice(here, mine, lifted, dmine, d)
        return _differentiate(here, mine, lifted, dmine.pilot + dmine.offset, dmine.var, dx, d), dmean, dvar

    dy, dmean, dvar = tangent(m, operands, tangents[1])
    return (y, m), (dy, tangent_moments(m, dmean, dvar))


def _differentiate_choice(
    recipe: Recipe, m: Moments, operands: Operands, dm: Moments, d: Operands
) -> tuple[tuple[Moments, Operands], tuple[Moments, Operands]]:
    """Return what ``_choose`` returns and its tangents, of which x, the mask and the residual keep their own."""

    def choose(m: Moments, scale: Array | None, bias: Array | None, basis: Basis | None) -> Any:
        chosen, rest = _choose(recipe, m, operands._replace(scale=scale, bias=bias, basis=basis))
        return chosen, rest.scale, rest.bias

    vectors, dvectors = ((of.scale, of.bias, of.basis) for of in (operands, d))
    (chosen, scale, bias), (dchosen, dscale, dbias) = jax.jvp(choose, (m, *vectors), (dm, *dvectors))
    corrected, dcorrected = {"scale": scale, "bias": bias}, {"scale": dscale, "bias": dbias}
    return (chosen, operands._replace(**corrected, basis=None)), (dchosen, d._replace(**dcorrected, basis=None))
