"""How sums over rows are taken: what compilers, for GPUs, TPUs and CPUs, do badly, and what is done instead.

Each function here stands for one of them. Its docstring tells the version that was seen to need it, the symptom
without it, and the test in ``tests/core/test_sums.py``, or elsewhere, that shows the symptom: the day it fails, the
function can go for that version.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim
from jax.numpy import asarray, broadcast_to, moveaxis
from jax.typing import ArrayLike, DTypeLike

from jbn.core.axes import count_cuts, hold_for_any, leave_to_members, vary_as
from jbn.core.lax import lax
from jbn.core.layout import Layout

Tree = TypeVar("Tree")

GPUS = ("cuda", "rocm")
# For so few rows XLA's GPU compiler takes one block of threads for 32 features.
_FEW_ROWS = 64**2


@partial(jax.jit, static_argnums=0, inline=True)  # Two sums of one kind are traced once.
def sum_rows(layout: Layout, values: Array) -> Array:
    """Sum values of the shape of x over the rows, or over those of each group.

    In two steps instead of one, the rows of each example first, where one of these holds:

    - CPUs before jax 0.10 add one row after another, so that the error grows with the number of rows
      (``test_accuracy`` on the oldest jax).
    - XLA:GPU, in jax 0.10.2, sums up to 4096 rows by one block of threads for 32 features. Instead of letting these few
      threads compute x - k and g·(x - μ), it writes both to memory, in float32, before the sum: 22 passes over x
      instead of 10, forward and backward (``test_gpus_still_write_what_few_threads_sum``).
    """
    if layout.group is not None:
        first, *rest = layout.row_axes
        return _split_groups(layout, moveaxis(values.sum(tuple(rest)), first, 0)).sum(1)

    def in_two_steps(parts: Layout, values: Array) -> Array:
        first = values.reshape(parts.shape).sum(parts.row_axes[1:], keepdims=True)
        return lax.optimization_barrier(first).sum(parts.row_axes)  # Without the barrier XLA makes one sum of the two.

    def at_once(values: Array) -> Array:
        return values.sum(layout.row_axes)

    parts = split_few_rows(layout, values)
    one_after_another = jax.__version_info__ < (0, 10) and len(layout.row_axes) > 1
    steps = {"cpu": partial(in_two_steps, layout)} if one_after_another else {}
    steps |= {} if parts is None else dict.fromkeys(GPUS, partial(in_two_steps, parts))
    return lax.platform_dependent(values, default=at_once, **steps) if steps else at_once(values)


def repeat_rows(layout: Layout, vector: Array, like: Array) -> Array:
    """Broadcast a vector of features to x, whose array is ``like``.

    The transpose of a broadcast is a sum. On GPUs that sum is then taken in the same two steps as by ``sum_rows``, and
    for the same reason.
    """
    parts = None if layout.group is not None else split_few_rows(layout, like)
    if parts is None:
        return layout.spread(vector)

    def in_two_steps(vector: Array) -> Array:
        first = (parts.shape[0], *(1 for _ in parts.row_axes[1:]), *layout.features)
        vector = lax.optimization_barrier(broadcast_to(parts.spread(vector), first))
        return broadcast_to(vector, parts.shape).reshape(layout.shape)

    def at_once(vector: Array) -> Array:
        return broadcast_to(layout.spread(vector), layout.shape)

    return lax.platform_dependent(vector, default=at_once, **dict.fromkeys(GPUS, in_two_steps))


def split_few_rows(layout: Layout, x: Array) -> Layout | None:
    """Return the layout of x cut into parts, in the place of its examples, that a GPU sums first.

    None where it should sum at once: where there are many rows, where features lie between them, and on an Explicit
    mesh, on which steps would gather what is cut.
    """
    axes = layout.row_axes
    if axes != tuple(range(len(axes))) or not axes or any(map(is_symbolic_dim, layout.shape)):
        return None
    if any(count_cuts(x, i) > 1 for i in range(len(layout.shape))):
        return None
    examples, rest = layout.examples, math.prod(layout.shape[i] for i in axes[1:])
    # Examples of few positions make parts that are too short to pay, so neighbours are joined. A joined part must not
    # lie on two devices of an Auto mesh, which cuts the examples: hence powers of two, and a multiple of 64 parts left.
    joined = max(n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or (examples % (64 * n) == 0 and n * rest <= 64))
    parts, rows, length = examples // joined, examples * rest, joined * rest
    few = rows <= _FEW_ROWS and parts >= 16 and length >= 8
    # Under an Auto mesh the shape is that of all devices: eight times as many rows may be few on each of eight of them.
    few_on_each_device = _FEW_ROWS < rows <= 8 * _FEW_ROWS and 32 <= length <= 64
    if not (few or few_on_each_device):
        return None
    return layout if joined == 1 else Layout((parts, joined, *layout.shape[1:]), tuple(i + 1 for i in layout.axis))


def _split_groups(layout: Layout, values: Array) -> Array:
    size = layout.group or 1
    return values.reshape(layout.examples // size, size, *values.shape[1:])


def count_rows(layout: Layout, mask: Array | None, dtype: DTypeLike) -> Array:
    """Count the valid rows, for all features together or, if the mask tells features apart, for each one.

    The counts have the dtype of the sums of x: XLA then makes one collective of both, on all targets
    (``test_passes`` counts collectives). A sum of ones in float32 stops at 2²⁴, and one in int32 at 2³¹. So the rows of
    each example are counted in int32, or as many of its last axes as int32 counts, and these counts added as floats,
    which is exact up to 2²⁴ and right to rounding beyond.
    """
    if mask is None:
        return asarray(layout.group_row_count, dtype)
    first, rest = layout.row_axes[:1], layout.row_axes[1:]
    repeats = [layout.shape[i] for i in layout.row_axes if mask.shape[i] == 1]
    if layout.group is not None:
        (axis,) = first
        mask = broadcast_to(mask, (*mask.shape[:axis], layout.examples, *mask.shape[axis + 1 :]))
        repeats = [layout.shape[i] for i in rest if mask.shape[i] == 1]
    few = not is_symbolic_dim(layout.row_count) and layout.row_count < 2**24
    last = next(i for i in range(len(rest) + 1) if i == len(rest) - 1 or _is_counted([mask.shape[j] for j in rest[i:]]))
    whole = mask.sum(rest[last:], dtype=dtype if few else jnp.int32, keepdims=True).astype(dtype)
    of_examples = whole.sum(rest[:last], keepdims=True) if last else whole
    factor = float(math.prod(repeats)) if not any(map(is_symbolic_dim, repeats)) else math.prod(repeats)
    if layout.group is not None:
        return sum_rows(layout, of_examples) * factor
    count = of_examples.sum(layout.row_axes) * factor
    return count.reshape(()) if count.size == 1 else broadcast_to(count, layout.features)


def _is_counted(sizes: list[int]) -> bool:
    """Say whether int32 counts the positions of axes of these sizes, as far as these are known."""
    return math.prod(size for size in sizes if not is_symbolic_dim(size)) < 2**31


def divide(part: Array | float, count: ArrayLike) -> Array:
    """Divide by a count, or by 1 where it is 0, to rounding.

    TPUs up to v5 divide to 2e-5 (198 ulps in JAX's table, docs.jax.dev/en/latest/accuracy.html), and what that leaves
    over is divided once more. ``jbn check`` shows in its row "arithmetic" how a device divides.
    """
    if not isinstance(count, Array):  # known when tracing
        return asarray(part / np.maximum(count, 1))
    count = lax.max(count, lax.full_like(count, 1))
    rough = part / count
    return rough + (part - rough * count) / count


def read_apart(times: int, *arrays: Array) -> list[tuple[Array, ...]]:
    """Return ``times`` copies of some arrays, each to be read by one reduction alone.

    XLA:CPU, in jax 0.10.2, lets a reduction compute what precedes it, such as x - k and the conversion of x to float32,
    only if nothing else uses the result, and otherwise writes that result to memory: 17 passes over x instead of 13,
    forward and backward (``test_cpus_still_write_what_two_sums_read``). Behind an optimization barrier of its own each
    copy has one user.
    """

    def behind_barriers(*read: Array) -> list[tuple[Array, ...]]:
        found = [read]
        for _ in range(times):  # Each behind the last, because XLA would make one of two that are alike.
            found.append(lax.optimization_barrier(found[-1]))
        return found[1:]

    arrays = tuple(vary_as(array, *arrays) for array in arrays)  # What passes a barrier together varies together.
    return lax.platform_dependent(*arrays, cpu=behind_barriers, default=lambda *read: [read] * times)


def keep_rounding(tree: Tree) -> Tree:
    """Let the means k + d in a tree be rounded to numbers before anything is subtracted from them.

    Where groups are merged, (k + d) - k is computed, and the rounding of k + d is counted on. XLA's simplifier makes d
    of that expression, in jax 0.10.2 and no longer in 0.12.0; behind a barrier it sees no sum
    (``test_sums_of_a_pilot_and_an_offset_are_still_taken_apart``).
    """
    return lax.optimization_barrier(tree)


def sweep_again_if(
    far: Array, sweep: Callable[[Array], tuple[Array, ...]], pilot: Array, found: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Return ``sweep(pilot)`` where ``far`` is true, and otherwise what was ``found`` before.

    A ``lax.cond`` with three peculiarities. Under ``jax.vmap`` it asks whether any member is far, because a condition
    that differs between members becomes a selection, which always sweeps twice; a member that is not far then keeps
    what was found, so that its bits do not depend on its neighbours. The pilot goes through a barrier, because
    otherwise XLA:GPU, in jax 0.10.2, finds both branches cheap and always runs them, in one more pass over x
    (``test_gpus_still_run_both_branches``). And the branches return arrays of two ranks, because libtpu 0.0.52 crashes
    on a conditional whose branches return two sums of one shape
    (``test_the_tpu_compiler_still_crashes_on_two_sums_of_one_shape``).
    """

    def again() -> tuple[Array, Array]:
        first, second = sweep(lax.optimization_barrier(pilot))
        return first, second[None]

    first, second = lax.cond(hold_for_any(far), again, lambda: (found[0], found[1][None]))
    return leave_to_members(far, first, found[0]), leave_to_members(far, second[0], found[1])
