"""How fast XLA sums over rows on this device: the study ``sums``.

What is summed, and in which steps: all rows at once; the positions of each image, then the images; the last axis of the
positions, then all else. Two sums of one program may share what precedes them, or each has its own behind a barrier.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.specs import BATCH, RESNET50
from benchmarks.timing import copying, quartiles
from jbn.studies.timing import interleaved

SHAPES = tuple(spec for spec in RESNET50 if spec.example in ((56, 56, 64), (14, 14, 256)))


def stepwise(*axes: int) -> Callable[[Array], Array]:
    """Return a sum over all rows that begins with some of them."""

    def total(values: Array) -> Array:
        return (
            lax.optimization_barrier(values.sum(axes, keepdims=True)).sum((0, 1, 2)) if axes else values.sum((0, 1, 2))
        )

    return total


STEPS = {"at once": stepwise(), "H·W, then N": stepwise(1, 2), "W, then N·H": stepwise(2)}


def programs(total: Callable[[Array], Array]) -> dict[str, Callable[[Array, Array, Array], Any]]:
    """Return what is summed, of x, a cotangent and a pilot."""

    def wide(x: Array) -> Array:
        return x.astype(jnp.float32)

    def apart(x: Array, k: Array) -> Array:
        own, pilot = map(lax.optimization_barrier, (x, k))
        return total(jnp.square(wide(own) - pilot))

    return {
        "Σ x": lambda x, g, k: total(wide(x)),
        "Σ (x-k)": lambda x, g, k: total(wide(x) - k),
        "Σ (x-k)²": lambda x, g, k: total(jnp.square(wide(x) - k)),
        "Σ g·(x-k)": lambda x, g, k: total(wide(g) * (wide(x) - k)),
        "Σ x and Σ x²": lambda x, g, k: (total(wide(x)), total(jnp.square(wide(x)))),
        "Σ (x-k) and Σ (x-k)²": lambda x, g, k: (total(wide(x) - k), total(jnp.square(wide(x) - k))),
        "the same, apart": lambda x, g, k: (total(wide(x) - k), apart(x, k)),
    }


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each shape and dtype: times in passes of a copy."""
    rows = []
    for spec in SHAPES:
        for dtype in ("float32", "bfloat16"):
            struct = spec.images(BATCH, dtype)
            x, g = (jax.random.normal(jax.random.key(i), struct.shape, dtype) for i in range(2))
            k = jnp.full((1, 1, 1, struct.shape[-1]), 0.1)
            calls: dict[str, Any] = {"copy": copying(struct)}
            for steps, total in STEPS.items():
                right = programs(stepwise())["Σ (x-k)²"](x.astype("float32"), g, k)
                np.testing.assert_allclose(programs(total)["Σ (x-k)²"](x, g, k), right, rtol=1e-4)
                for what, f in programs(total).items():
                    program = jax.jit(f).lower(x, g, k).compile()
                    calls[f"{what}, {steps}"] = lambda program=program, x=x, g=g, k=k: program(x, g, k)
            seconds = interleaved(calls, repeats)
            one = np.median(seconds["copy"]) / 2
            passes = {
                what: {steps: float(f"{np.median(seconds[f'{what}, {steps}']) / one:.3g}") for steps in STEPS}
                for what in programs(stepwise())
            }
            times = {name: quartiles(values) for name, values in seconds.items()}
            rows.append({"spec": spec.name, "batch": BATCH, "dtype": dtype, "passes": passes, "seconds": times})
    return rows
