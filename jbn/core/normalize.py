"""Normalization by given moments, with scale, bias, residual and activation in one derivative rule."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn.core.axes import vary_as
from jbn.core.layout import Layout
from jbn.core.statistics import Moments
from jbn.core.sums import read_apart, repeat_rows


@dataclass(frozen=True)
class Recipe:
    """What is known when tracing: where the features are, ε, the activation, the dtypes of y and of arithmetic."""

    layout: Layout
    epsilon: float
    activation: Callable[..., Array] | None  # of z and of the slopes
    dtype: np.dtype[Any]
    wide: np.dtype[Any]


class Operands(NamedTuple):
    """What y is made of, beside the moments; an absent scale is 1, an absent bias or residual is 0."""

    x: Array
    mask: Array | None  # bool, of the rank of x
    scale: Array | None  # (features,)
    bias: Array | None  # (features,)
    residual: Array | None  # the shape of x
    slopes: tuple[Array, ...]  # the values that the activation closes over


# With c = x - μ, r = (σ² + ε)^-½ and a = γ r, per channel, and f the activation:
#
#     z = c a + β + residual                                 y = f(z)
#     dz = a dx + c u + w + d(residual)                      dy = f'(z) dz
#     u = da = r dγ - ½ a r² dσ²                             w = dβ - a dμ
#
# because dr = -½ r³ dσ². It holds for batch statistics, whose dμ and dσ² are those of ``statistics``, and for running
# ones. The rule is linear in the tangents, and JAX transposes it: as u and w are vectors, the transpose is two sums,
# Σ g c and Σ g, and one element-wise pass, with g the cotangent of z. dμ is that of the offset: a pilot has none.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(recipe: Recipe, m: Moments, operands: Operands) -> Array:
    """Return f((x - μ)·γ/√(σ² + ε) + β + residual) in the recipe's dtype, and 0 where the mask is false."""
    z, _ = _affine(recipe, m, operands)
    y = z if recipe.activation is None else recipe.activation(z, *operands.slopes)
    return _hide(operands.mask, y).astype(recipe.dtype)


def _affine(recipe: Recipe, m: Moments, operands: Operands) -> tuple[Array, Array]:
    """Return z and c."""
    dtype, spread, mask = recipe.wide, recipe.layout.spread, operands.mask
    # The mean is subtracted before anything is multiplied: x·a + (β - μ·a) would lose the digits that x and μ share.
    # The mask is applied here and not only at the end: the activation must not see NaN, whose slope is NaN too.
    centred = _hide(mask, (operands.x.astype(dtype) - spread(m.pilot)) - spread(m.offset))
    a = lax.rsqrt(m.var + recipe.epsilon)
    z = centred * spread(a if operands.scale is None else a * operands.scale.astype(dtype))
    z = z if operands.bias is None else z + spread(operands.bias.astype(dtype))
    return (z if operands.residual is None else z + _hide(mask, operands.residual.astype(dtype))), centred


def _hide(mask: Array | None, values: Array) -> Array:
    return values if mask is None else jnp.where(mask, values, 0)


@normalize.defjvp
def _normalize_jvp(recipe: Recipe, primals: Any, tangents: Any) -> tuple[Array, Array]:
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(m: Moments, operands: Operands, dm: Moments, d: Operands) -> Array:
        dtype, layout = recipe.wide, recipe.layout
        r = lax.rsqrt(m.var + recipe.epsilon)
        a = r if operands.scale is None else r * operands.scale.astype(dtype)
        u = -0.5 * a * r * r * dm.var
        u = u if d.scale is None else u + r * d.scale.astype(dtype)
        w = -a * dm.offset
        w = w if d.bias is None else w + d.bias.astype(dtype)
        z, _ = _affine(recipe, m, operands)
        # Of the three readers of x the first two are the sums of ``statistics``; Σ g c, the transpose of c u, is here.
        own, pilot, offset = read_apart(3, operands.x, m.pilot, m.offset)[-1]
        _, centred = _affine(recipe, replace(m, pilot=pilot, offset=offset), operands._replace(x=own))
        u, w = (repeat_rows(layout, vary_as(vector, operands.x), operands.x) for vector in (u, w))
        dz = layout.spread(a) * d.x.astype(dtype) + centred * u + w
        if d.residual is not None:
            # Added in the dtype of the arrays, so that its transpose is one array for x and the residual: written once,
            # as the gradient of the residual, and read again for that of x, instead of computed twice.
            narrow = operands.x.dtype if d.residual.dtype == operands.x.dtype else dtype
            dz = (dz.astype(narrow) + d.residual.astype(narrow)).astype(dtype)
        if recipe.activation is not None:
            z = vary_as(z, *jax.tree.leaves((m, operands)))
            _, dz = jax.jvp(recipe.activation, (z, *operands.slopes), (vary_as(dz, z), *d.slopes))
        return _hide(operands.mask, dz).astype(recipe.dtype)

    return normalize(recipe, *primals), tangent(*primals, *tangents)
