"""Normalization by given moments, with scale, bias, residual and activation in one derivative rule."""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn.core.axes import vary_as
from jbn.core.layout import FLOATS, Layout
from jbn.core.statistics import Moments, apart

Activation: TypeAlias = Callable[[Array], Array]


class Recipe(NamedTuple):
    """What is known when tracing: where the features are, ε, the activation, the dtypes of y and of arithmetic."""

    layout: Layout
    epsilon: float
    activation: Callable[..., Array] | None
    dtype: np.dtype[Any]
    wide: np.dtype[Any]


class Operands(NamedTuple):
    """What y is made of, beside the moments; an absent scale is 1, an absent bias or residual is 0."""

    x: Array
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
def normalize(recipe: Recipe, mask: Array | None, m: Moments, operands: Operands) -> Array:
    """Return f((x - μ)·γ/√(σ² + ε) + β + residual) in the recipe's dtype, and 0 where the mask is false."""
    z, _ = _affine(recipe, mask, m, operands)
    y = z if recipe.activation is None else recipe.activation(z, *operands.slopes)
    return (y if mask is None else jnp.where(mask, y, 0)).astype(recipe.dtype)


def _affine(recipe: Recipe, mask: Array | None, m: Moments, operands: Operands) -> tuple[Array, Array]:
    """Return z and c."""
    x, scale, bias, residual, _ = operands
    dtype, spread = recipe.wide, recipe.layout.spread
    # The mean is subtracted before anything is multiplied: x·a + (β - μ·a) would lose the digits that x and μ share.
    centred = (x.astype(dtype) - spread(m.pilot)) - spread(m.offset)
    residual = None if residual is None else residual.astype(dtype)
    if mask is not None:  # here and not only at the end: the activation must not see NaN, whose slope is NaN too
        centred = jnp.where(mask, centred, 0)
        residual = None if residual is None else jnp.where(mask, residual, 0)
    a = lax.rsqrt(m.var + recipe.epsilon)
    z = centred * spread(a if scale is None else a * scale.astype(dtype))
    z = z if bias is None else z + spread(bias.astype(dtype))
    return (z if residual is None else z + residual), centred


@normalize.defjvp
def _normalize_jvp(recipe: Recipe, primals: Any, tangents: Any) -> tuple[Array, Array]:
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(mask: Array | None, m: Moments, operands: Operands, dm: Moments, d: Operands) -> Array:
        x, scale, _, _, slopes = operands
        dtype, spread = recipe.wide, recipe.layout.spread
        r = lax.rsqrt(m.var + recipe.epsilon)
        a = r if scale is None else r * scale.astype(dtype)
        u = -0.5 * a * r * r * dm.var
        u = u if d.scale is None else u + r * d.scale.astype(dtype)
        w = -a * dm.offset
        w = w if d.bias is None else w + d.bias.astype(dtype)
        # Together, so that their transpose is one collective and rematerialized GPU programs hold less at once; split,
        # whose transpose is one concatenation, where that of indices would be a sum of two padded arrays.
        u, w = (half[0] for half in lax.split(vary_as(jnp.stack([u, w]), x), (1, 1)))
        z, _ = _affine(recipe, mask, m, operands)
        own, pilot, offset = apart(3, x, m.pilot, m.offset)[-1]  # for Σ g c; the first two are those of the statistics
        _, centred = _affine(recipe, mask, m._replace(pilot=pilot, offset=offset), operands._replace(x=own))
        u, w = (recipe.layout.repeat(vector, x) for vector in (u, w))
        dz = spread(a) * d.x.astype(dtype) + centred * u + w
        if d.residual is not None:
            # Added in the dtype of the arrays, so that its transpose is one array for x and the residual: written once,
            # as the gradient of the residual, and read again for that of x, instead of computed twice.
            narrow = x.dtype if d.residual.dtype == x.dtype else dtype
            dz = (dz.astype(narrow) + d.residual.astype(narrow)).astype(dtype)
        if recipe.activation is not None:
            z = vary_as(z, *jax.tree.leaves((m, operands)))
            _, dz = jax.jvp(recipe.activation, (z, *slopes), (vary_as(dz, z), *d.slopes))
        return (dz if mask is None else jnp.where(mask, dz, 0)).astype(recipe.dtype)

    return normalize(recipe, *primals), tangent(*primals, *tangents[1:])


def open_activation(
    activation: Activation | None, z: jax.ShapeDtypeStruct, *others: Array
) -> tuple[Callable[..., Array] | None, tuple[Array, ...]]:
    """Turn the values that an activation closes over, such as a learned slope, into arguments of it."""
    if activation is None:
        return None, ()
    if not callable(activation):
        raise TypeError(f"activation is {activation!r}; expected a function of one array, for instance jax.nn.relu.")
    if _is_plain(activation):
        _check_activation(activation, z)
        return activation, ()
    from jax.extend.core import jaxpr_as_fun  # here: it brings Pallas, and makes half of the time of importing jbn

    typed = jax.eval_shape(lambda x, *more: vary_as(x.astype(z.dtype), *more), *others)
    program = _program(activation, typed)
    # The constants are left out: what is a static argument is kept for ever.
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


def _program(activation: Activation, z: jax.ShapeDtypeStruct) -> Any:
    program = jax.make_jaxpr(lambda z: activation(z))(z)  # a new function: JAX remembers the program of an old one
    returned = [f"{y.dtype.name}{list(y.shape)}" for y in program.out_avals]
    if len(returned) != 1 or returned[0].partition("[")[0] not in FLOATS or program.out_avals[0].shape != z.shape:
        raise ValueError(
            f"activation returns {', '.join(returned) or 'nothing'} for {z.dtype.name}{list(z.shape)}; expected one "
            "floating-point array of the same shape."
        )
    return program


@lru_cache(maxsize=1024)  # so that an eager call does not trace the activation again
def _check_activation(activation: Activation, z: jax.ShapeDtypeStruct) -> None:
    _program(activation, z)
