"""The errors about arguments of the core: what arrived, what was expected, and the likely fix.

``read_...`` returns what an argument stands for, ``check_...`` refuses what does not fit to other arguments. All of it
comes before x is touched. The tools keep the errors about their own arguments.
"""

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike, DTypeLike

from jbn.core.axes import Sync, bound_names, count_cuts, manual_axes, varying_axes
from jbn.core.lax import lax
from jbn.core.layout import Layout

FLOATS = ("float16", "bfloat16", "float32", "float64")
COUNTS = ("int32", "int64")


def read_array(name: str, value: Any) -> Any:
    """Refuse what is not an array; ``None`` passes."""
    if value is None or isinstance(value, jax.Array):
        return value
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected a jax or NumPy array.")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array of NumPy, whose mask would be lost; expected a plain one: {name}.filled(0), and "
            f"what is valid as mask=~np.ma.getmaskarray({name})."
        )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        detach = ": detach it" if hasattr(value, "detach") else ""
        raise TypeError(
            f"{name} is of type {type(value).__name__} and dtype {value.dtype}, which JAX does not read; expected a "
            f"jax or NumPy array of numbers{detach}."
        ) from error


def read_fields(
    name: str, tree: Any, fields: tuple[str, ...], required: bool = False, also: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """Return the fields of a NamedTuple or a mapping, and those that it may have also; what is absent is None."""
    if isinstance(tree, Mapping):
        found = dict(tree)
    elif hasattr(tree, "_asdict"):
        found = tree._asdict()
    elif tree is None and not required:
        found = {}
    else:
        raise TypeError(
            f"{name} is of type {type(tree).__name__}; expected jbn.{name.capitalize()} or a mapping with "
            f"{' and '.join(fields)}."
        )
    present = [field for field in fields if found.get(field) is not None]
    if set(found) - {*fields, *also} or (required and len(present) < len(fields)):
        inner = [key for key, value in found.items() if isinstance(value, Mapping) and set(fields) & set(value)]
        raise ValueError(
            f"{name} has the entries {', '.join(sorted(map(str, found))) or 'none'}; expected {' and '.join(fields)}. "
            + (
                f"Pass {name}[{inner[0]!r}]."
                if len(inner) == 1
                else "The order is bn_forward(params, state, x, train)."
            )
        )
    return tuple(found.get(field) for field in (*fields, *also))


def read_features(num_features: Any) -> tuple[int, ...]:
    """Read ``num_features``, one size or several."""
    sizes = num_features if isinstance(num_features, tuple | list) else (num_features,)
    if not sizes or not all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in sizes):
        given = getattr(num_features, "shape", num_features)
        raise ValueError(
            f"num_features is {given!r} of type {type(num_features).__name__}; expected an integer from 0 on or a "
            "tuple of them: the sizes of the feature axes, x.shape[-1] for features last."
        )
    return tuple(map(int, sizes))


def read_layout(x: Array | np.ndarray[Any, Any], axis: int | Sequence[int]) -> Layout:
    """Read where the features of ``x`` are."""
    if x is None:
        raise TypeError("x is None; expected a jax or NumPy array.")
    if x.dtype.name not in FLOATS:
        fix = {
            "c": "normalize real and imaginary part as two features (flax.linen.BatchNorm itself takes complex x)",
            "b": "a boolean array is passed as mask=, or cast with x.astype(jnp.float32)",
        }.get(x.dtype.kind, "cast it first, for instance x.astype(jnp.float32)")
        raise TypeError(f"x has dtype {x.dtype.name} (shape {x.shape}); expected {', '.join(FLOATS)}: {fix}.")
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    rank = len(x.shape)
    if rank == 0:
        raise ValueError("x is a scalar; expected at least one axis, that of the features.")
    for one in axes:
        if not isinstance(one, int | np.integer) or isinstance(one, bool):
            raise TypeError(f"axis is {axis!r}; expected an integer or a tuple of integers, the axes of the features.")
        if not -rank <= one < rank:
            raise ValueError(f"axis {one} is out of range for x of shape {x.shape}; expected -{rank} to {rank - 1}.")
    positive = tuple(sorted({int(one) % rank for one in axes}))
    if len(positive) != len(axes) or not axes:
        raise ValueError(f"axis is {axis!r}; expected one or several different axes of x, of shape {x.shape}.")
    return Layout(tuple(x.shape), positive)


def check_vector(name: str, value: Array | None, layout: Layout, also: str = "") -> Array | None:
    """Refuse a mean, var, scale or bias that does not belong to the features of x; ``also`` says what else is taken."""
    if value is None:
        return None
    if value.dtype.name not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype.name}; expected {', '.join(FLOATS)}.")
    if tuple(value.shape) != layout.features:
        (where, size) = (layout.axis, layout.features) if len(layout.axis) > 1 else (layout.axis[0], layout.features[0])
        fitting = [i for i, n in enumerate(layout.shape) if (n,) == tuple(value.shape)]
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but x of shape {layout.shape} has features of shape "
            f"{layout.features} on axis {where}. "
            + (
                f"Axis {fitting[0]} has that size: pass axis={fitting[0]}"
                if len(fitting) == 1
                else "Pass the right axis="
            )
            + f", or make params and state with bn_init({size}).{also}"
        )
    return value


def check_affine(name: str, value: Array | None, layout: Layout) -> Array | None:
    """Refuse a scale or bias that belongs neither to the features of x nor, by its rank, to its positions."""
    if value is None or not layout.row_axes:
        return check_vector(name, value, layout)
    shape, full = tuple(value.shape), len(value.shape) == len(layout.shape)
    of_examples = shape == (layout.examples, *layout.features) and layout.row_axes[0] < layout.axis[0]
    if value.dtype.name in FLOATS and (full or of_examples):
        if full and all(m in (1, n) for m, n in zip(shape, layout.shape, strict=True)):
            return value
        index = ", ".join(":" if i in (layout.row_axes[0], *layout.axis) else "None" for i in range(len(layout.shape)))
        raise ValueError(
            f"{name} has shape {shape}, x has shape {layout.shape}; expected {layout.features}, the shape of the "
            "features, or the rank of x with each dimension 1 or that of x"
            + (f": pass {name}[{index}]." if of_examples and not full else ".")
        )
    also = " Values per example or position have the rank of x, each dimension 1 or that of x."
    return check_vector(name, value, layout, also)


def check_mask(mask: Array | None, layout: Layout) -> Array | None:
    """Refuse a mask that is not boolean or does not fit x."""
    if mask is None:
        return None
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask has dtype {mask.dtype.name}; expected bool, True where x is valid: try mask > 0.")
    arrived = f"mask has shape {tuple(mask.shape)}, x has shape {layout.shape}"
    if len(mask.shape) != len(layout.shape):
        missing = len(layout.shape) - len(mask.shape)
        leading = tuple(mask.shape) == layout.shape[: len(mask.shape)]
        fix = f": pass mask[..., {', '.join(['None'] * missing)}]." if leading else "."
        raise ValueError(f"{arrived}; expected the same rank, each dimension 1 or that of x{fix}")
    if any(m not in (1, n) for m, n in zip(mask.shape, layout.shape, strict=True)):
        raise ValueError(f"{arrived}; expected each dimension to be 1 or that of x.")
    return mask


def cast_array(name: str, value: ArrayLike) -> Array:
    """Read an array as Flax takes it, nested lists of numbers too."""
    if hasattr(value, "dtype"):
        return read_array(name, value)  # type: ignore[no-any-return]
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is of type {type(value).__name__}, which JAX does not read as numbers.") from error


def cast_mask(mask: ArrayLike | None) -> Array | None:
    """Read a mask as Flax takes it, of any dtype that holds numbers."""
    found = None if mask is None else cast_array("mask", mask)
    return found if found is None or not jnp.issubdtype(found.dtype, np.number) else found.astype(bool)


def check_moving(mean: Array, var: Array) -> None:
    """Refuse to move statistics of 16 bits: an average of them stalls, and a variance of float16 soon overflows."""
    for name, value in (("state.mean", mean), ("state.var", var)):
        if value.dtype.itemsize < 4:
            raise ValueError(
                f"{name} has dtype {value.dtype.name}, in which running statistics stall: their steps are smaller than "
                "its rounding. Expected float32; cast them once, before training: state = jax.tree.map(lambda v: "
                f"v.astype(jnp.float32) if v.dtype == jnp.{value.dtype.name} else v, state)."
            )


def check_count(count: Array | None) -> None:
    """Refuse what cannot be the number of updates of a state; ``None`` passes."""
    if count is None or (count.dtype.name in COUNTS and count.shape == ()):
        return
    made = (
        ": what casts or averages a whole state, such as jax.lax.pmean, makes a float of it, and has to leave it out."
        if count.dtype.name in FLOATS
        else "."
    )
    raise ValueError(
        f"state.count has shape {tuple(count.shape)} and dtype {count.dtype.name}; expected the number of updates done "
        f"of one layer, a scalar of int32{made}"
    )


IN_FUNCTION = (
    "This came up while {name} was traced. It may read arrays from outside and not change them; a layer with state "
    "of its own, such as running statistics or a count of random numbers, is called outside of it."
)
HELD_BY_RULE = (
    "{name} is, or calls, a function with a derivative rule of its own (jax.custom_jvp or jax.custom_vjp) that "
    "reads a traced array from outside, by which such a rule is not differentiated. Expected it as an argument of that "
    "function, f(z, slope) in the place of f(z), with a rule for both arguments of f."
)
HELD_BY_VJP = (
    "{name} is, or calls, a jax.custom_vjp whose backward pass reads arrays from outside, which jbn cannot follow. "
    "Expected jax.custom_jvp, which JAX transposes, or these arrays as arguments of it, with cotangents of their own."
)
HELD_BY_INNER_RULE = (
    "{name} has a rule, in another one or for jax.vmap, that reads a traced array: make it an argument of its function."
)
HELD_INSIDE = (
    "{name} has a compiled function inside a loop or a condition that reads arrays from outside. Expected them as "
    "arguments of that function."
)


def check_callable(name: str, value: object, arguments: str) -> None:
    """Refuse what is no function."""
    if not callable(value):
        raise TypeError(f"{name} is {value!r}; expected a function {arguments}.")


def check_activation_output(found: Sequence[Any], z: jax.ShapeDtypeStruct) -> None:
    """Refuse an activation that does not return one floating-point array of the shape of z."""
    returned = [f"{y.dtype.name}{list(y.shape)}" for y in found]
    if len(returned) != 1 or found[0].dtype.name not in FLOATS or found[0].shape != z.shape:
        raise ValueError(
            f"activation returns {', '.join(returned) or 'nothing'} for {z.dtype.name}{list(z.shape)}; expected one "
            "floating-point array of the same shape."
        )


def check_residual(residual: Array | None, layout: Layout) -> Array | None:
    """Refuse a residual that cannot be added to x as it is."""
    if residual is None:
        return None
    if residual.dtype.name not in FLOATS:
        raise TypeError(f"residual has dtype {residual.dtype.name}; expected {', '.join(FLOATS)}.")
    if tuple(residual.shape) != layout.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; expected that of x, {layout.shape}: broadcast it first."
        )
    return residual


class OneValue(ValueError):
    """One value per feature, where the statistics of a batch are asked for."""


def check_rows(layout: Layout, shards: int) -> None:
    """Refuse to train on one value per feature: its variance is zero and the output is the bias, whatever x is."""
    if layout.group_row_count * shards == 1:
        group = "" if layout.group is None else f", group_size {layout.group}"
        raise OneValue(
            f"x of shape {layout.shape} has one value per channel in training (features on axis {layout.axis}, "
            f"{'1 shard' if shards == 1 else f'{shards} shards'}{group}), so its variance is zero. "
            "Expected at least two: use a larger batch or group, axis_name= for one batch over shards, or train=False "
            "for a single example (use_running_average=True in Flax). Batch norm has no gradients of single examples: "
            "for these use GroupNorm, or train=False."
        )


def read_group_size(group_size: object, layout: Layout, shards: int) -> tuple[int | None, int]:
    """Return how many examples of a shard share statistics, or None for all of them, and how many shards do."""
    if not isinstance(group_size, int | np.integer) or isinstance(group_size, bool):
        raise TypeError(f"group_size is {group_size!r}; expected an integer, the number of examples in a group.")
    size, local = int(group_size), layout.examples
    if is_symbolic_dim(local):
        raise ValueError(
            f"group_size is {size}, but x of shape {layout.shape} has a symbolic number of examples; expected a known "
            "one, as the number of groups is known when tracing: export the size of the batch, or without groups."
        )
    total = f"the {local * shards} examples of x" + f", {local} on each of {shards} shards" * (shards > 1)
    if size < 1 or local * shards % size:
        raise ValueError(
            f"group_size is {size}; expected a divisor of {total} (shape {layout.shape}, examples on axis "
            f"{layout.row_axes[0] if layout.row_axes else None})."
        )
    if not local:
        return None, shards
    if layout.row_axes and local % size == 0 and size < local * shards:
        return size, shards
    if size % local:
        raise ValueError(f"group_size is {size}; expected a divisor or a multiple of the examples of a shard: {total}.")
    return None, size // local


def read_flag(name: str, value: object) -> bool:
    """Refuse anything but ``True`` and ``False``."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is a traced value ({value.aval}); expected a Python bool, known when tracing: write True or "
            f"False, or mark the argument static where the step is compiled: jax.jit(step, static_argnames={name!r}) "
            "or static_argnums with its position."
        )
    raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected True or False.")


def read_dtype(dtype: DTypeLike | None, x: Array) -> np.dtype[Any]:
    """Return the dtype of the output, that of ``x`` unless another is asked for."""
    try:
        chosen = x.dtype if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; expected {', '.join(FLOATS)}.") from None
    if chosen.name not in FLOATS:
        raise TypeError(f"dtype is {chosen.name}; expected {', '.join(FLOATS)}.")
    return np.dtype(chosen)


def arithmetic_dtype(*dtypes: DTypeLike) -> np.dtype[Any]:
    """Return the dtype of statistics and arithmetic: the widest of ``dtypes`` and float32."""
    return np.dtype(np.float64 if any(jnp.dtype(dtype) == np.float64 for dtype in dtypes) else np.float32)


def read_axis_name(
    axis_name: Hashable | Sequence[Hashable] | None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Sync:
    """Read ``axis_name`` (one name or several) and its groups; an unbound name is a ``ValueError``."""
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError("axis_index_groups needs axis_name, the axis whose indices are grouped; it is None.")
        return Sync()
    names = read_axis_names(axis_name)
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            bound = bound_names()
            known = f"the names bound here are {', '.join(map(repr, bound))}" if bound else "no name is bound here"
            raise ValueError(
                f"axis_name {name!r} is not bound: {known}. Names are bound by jax.shard_map, jax.pmap and "
                "jax.vmap(..., axis_name=...); under jax.jit alone a sharded batch is already one batch, so leave "
                "axis_name out."
            ) from None
    manual = manual_axes()
    mapped = [name for name in names if name not in manual]
    if mapped and any(name in varying_axes(lax.axis_index(name)) for name in manual):
        raise ValueError(
            f"axis_name {mapped[0]!r} is an axis of jax.vmap, and in a jax.shard_map that checks JAX has no "
            "collectives over such an axis. Pass check_vma=False to jax.shard_map, or make it an axis of rows of x."
        )
    sync = Sync(names)
    return sync if axis_index_groups is None else replace(sync, groups=_read_shard_groups(axis_index_groups, sync))


def read_axis_names(axis_name: object) -> tuple[Hashable, ...]:
    """Return the names of axes; numbers are none, for to JAX they are positions."""
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    try:
        different = len(set(names)) == len(names) > 0
        named = not any(isinstance(name, int | float) or name is None for name in names)
    except TypeError:  # not hashable
        different, named = True, False
    if not (named and different):
        raise (ValueError if named else TypeError)(
            f"axis_name is {axis_name!r}; expected one name or several different ones, such as 'data', or None."
        )
    return names


def _read_shard_groups(groups: Sequence[Sequence[int]], sync: Sync) -> tuple[tuple[int, ...], ...]:
    try:
        read = tuple(tuple(operator.index(shard) for shard in group) for group in groups)
    except TypeError:
        raise TypeError(f"axis_index_groups is {groups!r}; expected lists of integers, one for each group.") from None
    if sorted(shard for group in read for shard in group) != list(range(int(sync.shards()))) or not all(read):
        raise ValueError(
            f"axis_index_groups is {[list(group) for group in read]}; expected every index from 0 to "
            f"{int(sync.shards()) - 1} of axis {', '.join(map(repr, sync.names))} in exactly one group, none empty."
        )
    return read


def check_groups_on_mesh(layout: Layout, x: Array) -> None:
    """Refuse groups of examples that lie on two devices of an Explicit mesh."""
    if layout.group is None:
        return
    devices = count_cuts(x, layout.row_axes[0])
    if layout.examples // layout.group % devices:
        each = layout.examples // devices
        raise ValueError(
            f"group_size is {layout.group}, but the {layout.examples} examples lie on {devices} devices of a mesh with "
            f"Explicit axes, {each} on each, and JAX does not regroup those. Expected a divisor of {each}; or use an "
            "Auto mesh, or jax.shard_map with axis_name."
        )


def check_replicas(sync: Sync, x: Array, mask: Array | None, mean: Array, name: str = "x") -> None:
    """Refuse statistics of one shard where x, or moments of it that have another name, vary and the state does not."""
    from_batch = varying_axes(x) | (frozenset() if mask is None else varying_axes(mask))
    loose = sorted(from_batch - varying_axes(mean) - frozenset(sync.names), key=str)
    if loose:
        named, together = (names[0] if len(names) == 1 else tuple(names) for names in (loose, [*sync.names, *loose]))
        raise ValueError(
            f"{name} varies over the mesh axis {named!r}, the state does not, and axis_name lacks it: the new state "
            f"would differ between shards. Pass axis_name={together!r} for one batch over all shards; or give each "
            f"shard a state of its own: jax.lax.pcast(state, {named!r}, to='varying')."
        )
