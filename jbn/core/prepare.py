"""Arguments become what is computed with: x, operands, state and sharing are read here, once, before any arithmetic."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jbn.core import checks
from jbn.core.activation import Activation, trace_activation
from jbn.core.axes import name_mesh
from jbn.core.choice import Basis, NormalizeBy, trace_choice
from jbn.core.layout import Layout
from jbn.core.normalize import Operands, Recipe
from jbn.core.numbers import read_epsilon, read_number
from jbn.core.programs import find_types
from jbn.core.saved import INPUT, name_arrays
from jbn.core.state import Observation
from jbn.core.statistics import Moments, SharedRows, choose_pilot, statistics

AxisName: TypeAlias = Hashable | Sequence[Hashable]
"""The name of an axis of ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap``, or several of them."""

Axis: TypeAlias = int | Sequence[int]
"""The axis of the features, or several of them; negative ones count from the last."""

Groups: TypeAlias = Sequence[Sequence[int]]
"""Groups of indices of a named axis, each index in one of them."""


class NamedFields(Protocol):
    """A ``NamedTuple``, such as ``jbn.Params`` and ``jbn.State``, or one of your own with fields of these names."""

    def _asdict(self) -> dict[str, Any]: ...


ParamsLike: TypeAlias = NamedFields | Mapping[str, Any] | None
"""What a layer learns: ``jbn.Params``, or a mapping with ``scale`` and ``bias``, either or both absent or None.

Such as the ``params`` of one layer of Flax Linen or ``nnx.state(layer, nnx.Param)``. None is neither.
"""

StateLike: TypeAlias = NamedFields | Mapping[str, Any]
"""What a layer remembers: ``jbn.State``, ``jbn.CountedState``, or a mapping with ``mean`` and ``var``, and ``count``.

Such as the ``batch_stats`` of one layer of Flax Linen or ``nnx.state(layer, nnx.BatchStat)``.
"""


def read_rows(x: ArrayLike, axis: Axis, mask: ArrayLike | None) -> tuple[Layout, Array, Array | None]:
    """Read x and which of its rows count."""
    values = checks.read_array("x", x)
    layout = checks.read_layout(values, axis)
    return layout, values, checks.check_mask(checks.read_array("mask", mask), layout)


def read_pilot(pilot: ArrayLike | None, layout: Layout) -> Array | None:
    """Read a number near the mean, one for all features or one for each."""
    if pilot is None:
        return None
    known = read_number(pilot)
    with np.errstate(over="ignore"):  # infinity is no pilot, and neither is what overflows
        value = checks.read_array("pilot", pilot) if known is None else jnp.asarray(known)
    if tuple(value.shape) not in ((), layout.features) or value.dtype.name not in checks.FLOATS:
        raise ValueError(
            f"pilot has shape {tuple(value.shape)} and dtype {value.dtype.name}; expected one floating-point number or "
            f"an array of the shape of the features, {layout.features}: a number near the mean of each."
        )
    return value


def fill_affine(params: dict[str, Any], **given: ArrayLike | None) -> dict[str, Any]:
    """Return what a layer learns, with the scale and bias of its call in the places of what it does not learn."""
    filled = {name: checks.cast_array(name, value) for name, value in given.items() if value is not None}
    for name in filled:
        if params[name] is not None:
            raise ValueError(
                f"{name} is given at the call of a layer that learns its own; expected one of the two. Make the layer "
                f"with use_{name}=False; a learned one that is to meet that of the call is a parameter of the module "
                f"around the layer: {'scale=scale * learned' if name == 'scale' else 'bias=bias + learned'}."
            )
    return params | filled


def read_operands(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *state: Array,
    axis: Axis,
    epsilon: float,
    mask: ArrayLike | None,
    activation: Activation | None,
    residual: ArrayLike | None,
    dtype: DTypeLike | None,
    by_batch: bool,
) -> tuple[Recipe, Operands]:
    """Read x and what is applied to it, ``by_batch`` or not; ``state`` are the other arrays of which z is made."""
    layout, values, valid = read_rows(x, axis, mask)
    scale, bias = (
        checks.check_affine(name, checks.read_array(name, value), layout)
        for name, value in (("scale", scale), ("bias", bias))
    )
    added = checks.check_residual(checks.read_array("residual", residual), layout)
    out = checks.read_dtype(dtype, values)
    wide = checks.arithmetic_dtype(values.dtype, out)
    arrays = [value for value in (values, scale, bias, added, *state) if value is not None]
    program, held = trace_activation(activation, jax.ShapeDtypeStruct(layout.shape, wide), *arrays)
    by_position = any(value is not None and value.ndim > len(layout.axis) for value in (scale, bias))
    recipe = Recipe(layout, read_epsilon(epsilon, wide, by_batch=by_batch), program, out, wide, by_position)
    # Named once, outside the derivative rules, each of which would save an x of its own; and outside what is compiled,
    # in which the alias would be a new output. JAX keeps an input that passes through, and looks for NaN in outputs.
    values, added = name_arrays(INPUT, (values, added))
    return recipe, Operands(values, valid, scale, bias, added, held)


def read_state(state: Any) -> tuple[Array | Observation, Array, Array, Array | None]:
    """Read what stands in the place of the running mean, that mean itself, the running variance, and the count."""
    held, var, count = checks.read_fields("state", state, ("mean", "var"), required=True, also=("count",))
    held = held if isinstance(held, Observation) else checks.read_array("mean", held)
    mean = held.mean if isinstance(held, Observation) else held
    return held, mean, checks.read_array("var", var), checks.read_array("count", count)


def read_sharing(
    recipe: Recipe,
    x: Array,
    axis_name: AxisName | None,
    axis_index_groups: Groups | None,
    group_size: int | None,
) -> SharedRows:
    """Read which rows share statistics."""
    layout, sync = recipe.layout, checks.read_axis_name(axis_name, axis_index_groups)
    if group_size is None:
        return SharedRows(layout, sync, recipe.epsilon)
    if axis_index_groups is not None:
        raise ValueError("axis_index_groups and group_size are both given; expected one: they group the same shards.")
    examples, shards = checks.read_group_size(group_size, layout, int(sync.shards()))
    layout = replace(layout, group=examples)
    checks.check_groups_on_mesh(layout, x)
    return SharedRows(layout, sync.divide(shards), recipe.epsilon)


def read_choice(
    normalize_by: NormalizeBy, rows: SharedRows, recipe: Recipe, operands: Operands, mean: Array, var: Array
) -> tuple[Recipe, Operands]:
    """Read the function that chooses what the batch is normalized by."""
    mean, var = mean.astype(recipe.wide), var.astype(recipe.wide)
    mask = None if operands.mask is None else jax.typeof(operands.mask)
    mesh = jax.sharding.get_abstract_mesh()
    batch = _find_types(rows, mesh, jax.typeof(operands.x), mask, jax.typeof(mean))
    grouped = rows.layout.group is not None
    choice, held = trace_choice(normalize_by, batch, mean, var, recipe.epsilon, grouped=grouped)
    return replace(recipe, choice=choice), operands._replace(basis=Basis(mean, var, held))


# An eager call that has nothing new must trace nothing but the function; what is traced is of the mesh on which it was.
@lru_cache(maxsize=1024)
def _find_types(rows: SharedRows, mesh: Any, x: Any, mask: Any, mean: Any) -> Moments:
    """Return the types of the moments that a shard normalizes by."""

    def find(x: Array, mask: Array | None, mean: Array) -> Moments:
        return rows.sums_over.pick(statistics(rows, x, mask, choose_pilot(mean, mean.dtype)))

    with name_mesh():
        return find_types(find, x, mask, mean)  # type: ignore[no-any-return]
