"""Where the features are: axis, mask, parameter shapes; sums over the rest; every shape and dtype error."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike, DTypeLike

from jbn.core.axes import cuts_of

FLOATS = ("float16", "bfloat16", "float32", "float64")
# XLA's CPU loops added one row after the other, and the error of such a sum grows with the number of its terms.
_IN_TURN = jax.__version_info__ < (0, 10)
# XLA sums so many rows on a GPU by one block of threads for 32 features, and its compiler rather writes x - k, and
# g (x - μ), to memory, in float32, than let those few threads compute them.
_AT_ONCE = 64**2
_GPUS = ("cuda", "rocm")


class Layout(NamedTuple):
    """The shape of x and the axes of its features; the other axes are rows, over which statistics are taken.

    The first axis of rows is that of the examples. Where ``group`` of them at a time share statistics, these have one
    more axis in front, for the groups.
    """

    shape: tuple[int, ...]
    axis: tuple[int, ...]  # ascending, not negative
    group: int | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes that statistics reduce."""
        return tuple(i for i in range(len(self.shape)) if i not in self.axis)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of scale, bias, mean and var."""
        return tuple(self.shape[i] for i in self.axis)

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.shape[self.rows[0]] if self.rows else 1

    @property
    def values(self) -> int:
        """The number of values per feature, in each group."""
        return math.prod(self.shape[i] for i in self.rows[1:]) * (self.group or self.examples)

    def vector(self, vector: Array) -> Array:
        """Give a per-feature vector the rank of the statistics."""
        return vector if self.group is None else vector[None]

    def spread(self, vector: Array) -> Array:
        """Give a per-feature vector, with one row for each group or one for all, the rank of x."""
        if self.group is None:
            return lax.expand_dims(vector, self.rows)
        if vector.shape[0] > 1:  # as jnp.repeat, which does not take Explicit shardings
            groups, *features = vector.shape
            vector = lax.broadcast_in_dim(vector, (groups, self.group, *features), (0, *range(2, vector.ndim + 1)))
            vector = vector.reshape(groups * self.group, *features)
        return jnp.expand_dims(jnp.moveaxis(vector, 0, self.rows[0]), self.rows[1:])

    @partial(jax.jit, static_argnums=0, inline=True)  # so that two sums of one kind are traced once
    def sum(self, values: Array) -> Array:
        """Sum over the rows; in two steps on platforms where XLA is inexact or slow in one."""
        if self.group is not None:
            return self._in_groups(jnp.moveaxis(values.sum(self.rows[1:]), self.rows[0], 0)).sum(1)

        def in_two_steps(parts: Layout, values: Array) -> Array:
            first = values.reshape(parts.shape).sum(parts.rows[1:], keepdims=True)
            return lax.optimization_barrier(first).sum(parts.rows)  # without the barrier XLA makes one sum of the two

        at_once, parts = partial(jnp.sum, axis=self.rows), self._parts(values)
        steps = {"cpu": partial(in_two_steps, self)} if _IN_TURN and len(self.rows) > 1 else {}
        steps |= {} if parts is None else dict.fromkeys(_GPUS, partial(in_two_steps, parts))
        return lax.platform_dependent(values, default=at_once, **steps) if steps else at_once(values)

    def repeat(self, vector: Array, like: Array) -> Array:
        """Spread a per-feature vector so that the transpose, on a GPU, sums in the steps of ``sum``."""
        parts = None if self.group is not None else self._parts(like)
        if parts is None:
            return self.spread(vector)

        def in_two_steps(vector: Array) -> Array:
            first = (parts.shape[0], *(1 for _ in parts.rows[1:]), *self.features)
            vector = lax.optimization_barrier(jnp.broadcast_to(parts.spread(vector), first))
            return jnp.broadcast_to(vector, parts.shape).reshape(self.shape)

        def at_once(vector: Array) -> Array:
            return jnp.broadcast_to(self.spread(vector), self.shape)

        return lax.platform_dependent(vector, default=at_once, **dict.fromkeys(_GPUS, in_two_steps))

    def _parts(self, x: Array) -> "Layout | None":
        """Return the parts, in the place of the examples, that a GPU sums first; None where it should sum at once."""
        if self.rows != tuple(range(len(self.rows))) or not self.rows or any(map(is_symbolic_dim, self.shape)):
            return None
        if any(cuts_of(x, i) > 1 for i in range(len(self.shape))):  # on an Explicit mesh steps would gather what is cut
            return None
        examples, rest = self.examples, math.prod(self.shape[i] for i in self.rows[1:])
        # Small examples are joined, by powers of two and to a multiple of 64 parts: what an Auto mesh shards over up to
        # 64 devices, or an odd number, stays where it is.
        joined = max(n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or (examples % (64 * n) == 0 and n * rest <= 64))
        parts, rows, length = examples // joined, examples * rest, joined * rest
        if not (parts >= 16 and length >= 8 if rows <= _AT_ONCE else rows <= 8 * _AT_ONCE and 32 <= length <= 64):
            return None  # eight times as many rows may be those of eight devices
        return self if joined == 1 else Layout((parts, joined, *self.shape[1:]), tuple(i + 1 for i in self.axis))

    def _in_groups(self, each: Array) -> Array:
        size = self.group or 1
        groups, devices = self.examples // size, cuts_of(each, 0)
        if groups % devices:
            raise ValueError(
                f"group_size is {self.group}, but the {self.examples} examples lie on {devices} devices of a mesh with "
                f"Explicit axes, {self.examples // devices} on each, and JAX does not regroup those. Expected a "
                f"divisor of {self.examples // devices}; or use an Auto mesh, or jax.shard_map with axis_name."
            )
        return each.reshape(groups, size, *each.shape[1:])

    def valid(self, mask: Array | None) -> Array:
        """Count the valid rows, for all features together or, if the mask tells features apart, for each one."""
        if mask is None:
            return jnp.asarray(self.values)
        # In the dtype of the sums of x, XLA makes one collective of both. Up to 2²⁴ float32 counts exactly.
        most = math.prod(self.shape[i] for i in self.rows)
        exact = jnp.float32 if not is_symbolic_dim(most) and most < 2**24 else jnp.int32
        if self.group is not None:
            first = self.rows[0]
            mask = jnp.broadcast_to(mask, (*mask.shape[:first], self.examples, *mask.shape[first + 1 :]))
            return self.sum(mask.astype(exact)) * math.prod(self.shape[i] for i in self.rows[1:] if mask.shape[i] == 1)
        repeats = math.prod(self.shape[i] for i in self.rows if mask.shape[i] == 1)
        count = mask.sum(self.rows, dtype=exact) * repeats
        return count.reshape(()) if count.size == 1 else jnp.broadcast_to(count, self.features)


def as_array(name: str, value: Any) -> Any:
    """Refuse what is not an array; ``None`` passes."""
    if value is None or isinstance(value, jax.Array):
        return value
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected a jax or NumPy array.")
    return jnp.asarray(value)


def entries(name: str, tree: Any, fields: tuple[str, ...], required: bool = False) -> tuple[Any, ...]:
    """Read the fields of a NamedTuple or a mapping; what is absent is None."""
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
    if set(found) - set(fields) or (required and len(present) < len(fields)):
        inner = [key for key, value in found.items() if isinstance(value, Mapping) and set(fields) & set(value)]
        raise ValueError(
            f"{name} has the entries {', '.join(sorted(map(str, found))) or 'none'}; expected {' and '.join(fields)}. "
            + (
                f"Pass {name}[{inner[0]!r}]."
                if len(inner) == 1
                else "The order is bn_forward(params, state, x, train)."
            )
        )
    return tuple(as_array(field, found.get(field)) for field in fields)


def feature_shape(num_features: Any) -> tuple[int, ...]:
    """Read ``num_features``, one size or several."""
    sizes = num_features if isinstance(num_features, tuple | list) else (num_features,)
    if not sizes or not all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0 for n in sizes):
        given = getattr(num_features, "shape", num_features)
        raise ValueError(
            f"num_features is {given!r} of type {type(num_features).__name__}; expected a positive integer or a "
            "tuple of them: the sizes of the feature axes, x.shape[-1] for features last."
        )
    return tuple(map(int, sizes))


def layout_of(x: Array | np.ndarray[Any, Any], axis: int | Sequence[int]) -> Layout:
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


def check_vector(name: str, value: Array | None, layout: Layout) -> Array | None:
    """Refuse a scale, bias, mean or var that does not belong to the features of x."""
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
            + f", or make params and state with bn_init({size})."
        )
    return value


def check_mask(mask: Array | None, layout: Layout) -> Array | None:
    """Refuse a mask that is not boolean or does not fit x."""
    if mask is None:
        return None
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask has dtype {mask.dtype.name}; expected bool, True where x is valid: try mask > 0.")
    if len(mask.shape) != len(layout.shape):
        missing = len(layout.shape) - len(mask.shape)
        leading = tuple(mask.shape) == layout.shape[: len(mask.shape)]
        fix = f": pass mask[..., {', '.join(['None'] * missing)}]." if leading else "."
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, x has shape {layout.shape}; expected the same rank, each dimension "
            f"1 or that of x{fix}"
        )
    if any(m not in (1, n) for m, n in zip(mask.shape, layout.shape, strict=True)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, x has shape {layout.shape}; expected each dimension to be 1 or that "
            "of x."
        )
    return mask


def broadcast_mask(mask: ArrayLike | None, x: Array) -> Array | None:
    """Read a mask as Flax takes it: of any dtype and rank that broadcasts to x as in NumPy."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, dtype=bool)
    if all(m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        mask = jnp.expand_dims(mask, tuple(range(x.ndim - mask.ndim)))
    return mask


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
    if layout.values * shards == 1:
        raise OneValue(
            f"x of shape {layout.shape} has one value per channel in training (features on axis {layout.axis}, "
            f"{shards} shard{'s' * (shards > 1)}{f', group_size {layout.group}' * bool(layout.group)}), so its "
            "variance is zero. Expected at least two: use a larger batch or group, axis_name= to share statistics, or "
            "train=False, without update=, for a single example (use_running_average=True in Flax)."
        )


def groups_of(group_size: object, layout: Layout, shards: int) -> tuple[int | None, int]:
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
            f"{layout.rows[0] if layout.rows else None})."
        )
    if not local:
        return None, shards
    if layout.rows and local % size == 0 and size < local * shards:
        return size, shards
    if size % local:
        raise ValueError(f"group_size is {size}; expected a divisor or a multiple of the examples of a shard: {total}.")
    return None, size // local


def check_flag(name: str, value: object) -> bool:
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


def epsilon_of(epsilon: object) -> float:
    """Return epsilon as a number; refuse one that is not positive."""
    if isinstance(epsilon, bool) or not (isinstance(epsilon, int | float | np.number) or _is_known_scalar(epsilon)):
        raise TypeError(f"epsilon is {epsilon!r}; expected a Python number above 0, known when tracing.")
    known = float(epsilon)  # type: ignore[arg-type]
    if not 0 < known < math.inf:
        raise ValueError(f"epsilon is {epsilon}; expected a number above 0, for instance 1e-5.")
    return known


def _is_known_scalar(value: object) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and value.shape == () and not isinstance(value, jax.core.Tracer)


def new_weight(momentum: ArrayLike) -> ArrayLike:
    """Return 1 - momentum, the weight of the new value; refuse a momentum outside [0, 1] where it is known."""
    if not (hasattr(momentum, "dtype") or isinstance(momentum, int | float)) or isinstance(momentum, bool):
        raise TypeError(f"momentum is {momentum!r}; expected a number from 0 to 1, the weight of the old value.")
    if isinstance(momentum, int | float | np.number):
        if not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum is {momentum}; expected 0 to 1, the weight of the old value (PyTorch's momentum is one "
                "minus it)."
            )
        return 1.0 - float(momentum)
    if jnp.shape(momentum) != () or jnp.result_type(momentum).name not in FLOATS:
        raise ValueError(
            f"momentum has shape {jnp.shape(momentum)} and dtype {jnp.result_type(momentum).name}; expected one "
            "floating-point number from 0 to 1."
        )
    return lax.sub(jnp.ones((), jnp.result_type(momentum)), momentum)


def output_dtype(dtype: DTypeLike | None, x: Array) -> np.dtype[Any]:
    """Return the dtype of the output, that of ``x`` unless another is asked for."""
    try:
        chosen = x.dtype if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; expected {', '.join(FLOATS)}.") from None
    if chosen.name not in FLOATS:
        raise TypeError(f"dtype is {chosen.name}; expected {', '.join(FLOATS)}.")
    return np.dtype(chosen)


def compute_dtype(*dtypes: DTypeLike) -> np.dtype[Any]:
    """Return the dtype of statistics and arithmetic: the widest of ``dtypes`` and float32."""
    return np.dtype(np.float64 if any(jnp.dtype(dtype) == np.float64 for dtype in dtypes) else np.float32)
