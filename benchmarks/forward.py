"""Other ways through a float32 forward pass on this device, beside jbn's and Flax's: the study ``forward``.

Each is the whole of it, BN and ReLU of images with their moments, so that a way that is quick with its sums and slow
with what follows does not shine. Every y is compared with float64 before it is timed; x has a mean of half a deviation,
and the running mean, k, is near it. What the ways lack, the guard, the new state and the derivative, makes them cheaper
than what could be built of them.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console

import jbn
from benchmarks.specs import BATCH, RESNET50
from benchmarks.timing import quartiles
from jbn.lab.devices import mesh_of
from jbn.lab.options import TrainOptions, TrainPlace
from jbn.lab.run.saved import find_saved
from jbn.lab.train import train
from jbn.studies.timing import interleaved

SHAPES = tuple(spec for spec in RESNET50 if spec.example in ((56, 56, 64), (14, 14, 256), (14, 14, 1024), (7, 7, 512)))
EPSILON, ROWS = 1e-5, (0, 1, 2)
NEAR = 2  # a mean whose square is no more variances than this costs plain sums no more digits than jbn's guard allows

Way = Callable[[Array, Array], Array]
Sums = tuple[Array, Array]


def normalized(x: Array, k: Array, first: Array, second: Array) -> Array:
    """Return BN and ReLU of x by its sums around k."""
    share = x.shape[-1] / x.size
    offset = first * share
    r = lax.rsqrt(jnp.maximum(second * share - offset**2, 0) + EPSILON)
    return nn.relu(((x - k) - offset) * r)


def apart(*arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return two copies, so that XLA lets each of two sums compute what precedes it."""
    first = lax.optimization_barrier(arrays)
    return first, lax.optimization_barrier(first)


def shifted(x: Array, k: Array) -> Sums:
    """Sum x - k and (x - k)², as jbn does on a CPU."""
    (a, ka), (b, kb) = apart(x, k)
    return (a - ka).sum(ROWS), jnp.square(b - kb).sum(ROWS)


def plain(x: Array) -> Sums:
    """Sum x and x²."""
    (a,), (b,) = apart(x)
    return a.sum(ROWS), jnp.square(b).sum(ROWS)


def is_near(mean: Any, var: Any) -> Any:
    """Return which means are so near 0 that plain sums serve them."""
    return mean**2 <= NEAR * (var + EPSILON)


def by_state(x: Array, k: Array) -> Array:
    """Take the plain sums where every running mean is small, as one of a unit running deviation is."""
    near = is_near(k, jnp.ones_like(k)).all()
    first, second = lax.cond(near, lambda: plain(x), lambda: shifted(x, k))
    return normalized(x, jnp.where(near, 0, k), first, second)


def mean_by_plain_sum(x: Array, k: Array) -> Array:
    """Sum x, and (x - k)²."""
    (a, _), (b, kb) = apart(x, k)
    return normalized(x, k, a.sum(ROWS) - x.size // x.shape[-1] * k, jnp.square(b - kb).sum(ROWS))


def one_reduction(x: Array, k: Array) -> Array:
    """Sum x - k and (x - k)² by one reduction of two operands."""
    c = x - k
    none = jnp.zeros((), x.dtype)
    sums = lax.reduce((c, c * c), (none, none), lambda a, b: (a[0] + b[0], a[1] + b[1]), ROWS)
    return normalized(x, k, *sums)


def products(x: Array, k: Array) -> Array:
    """Sum x - k and (x - k)² by products with a row of ones."""
    (a, ka), (b, kb) = apart(x.reshape(-1, x.shape[-1]), k)
    ones = jnp.ones((1, a.shape[0]), x.dtype)
    return normalized(x, k, (ones @ (a - ka))[0], (ones @ jnp.square(b - kb))[0])


def channel_blocks(width: int, x: Array, k: Array) -> Array:
    """Do all there is to do for one block of channels after the other, whose second sweep finds it in the cache."""

    def block(i: Any, y: Array) -> Array:
        cut = partial(lax.dynamic_slice_in_dim, start_index=i * width, slice_size=width, axis=-1)
        return lax.dynamic_update_slice_in_dim(y, normalized(cut(x), cut(k), *shifted(cut(x), cut(k))), i * width, -1)

    return lax.fori_loop(0, x.shape[-1] // width, block, jnp.zeros_like(x))


def row_tiles(size: int, x: Array, k: Array) -> Array:
    """Sum one tile of images of about ``size`` bytes after the other, whose second sweep finds it in the cache."""
    images = max(
        n for n in range(1, x.shape[0] + 1) if x.shape[0] % n == 0 and n * x[0].nbytes <= max(size, x[0].nbytes)
    )

    def tile(total: Sums, x: Array) -> tuple[Sums, None]:
        first, second = shifted(x, k)
        return (total[0] + first, total[1] + second), None

    sums, _ = lax.scan(tile, (jnp.zeros_like(k), jnp.zeros_like(k)), x.reshape(-1, images, *x.shape[1:]))
    return normalized(x, k, *sums)


def by_jbn(x: Array, k: Array) -> Array:
    """Normalize by jbn, with its guard and new state."""
    params, state = jbn.bn_init(x.shape[-1])
    y, new = jbn.bn_forward(params, state._replace(mean=k), x, True, activation=nn.relu)
    return lax.optimization_barrier((y, new))[0]


def by_flax(x: Array, k: Array) -> Array:
    """Normalize by Flax, with its new state."""
    ones = jnp.ones_like(k)
    variables = {"params": {"scale": ones, "bias": 0 * k}, "batch_stats": {"mean": k, "var": ones}}
    y, new = nn.BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    return lax.optimization_barrier((nn.relu(y), new))[0]


WAYS: dict[str, Way] = {
    "jbn": by_jbn,
    "Flax Linen": by_flax,
    "Σ (x-k) and Σ (x-k)², no guard": lambda x, k: normalized(x, k, *shifted(x, k)),
    "Σ x and Σ x²": lambda x, k: normalized(x, jnp.zeros_like(k), *plain(x)),
    "Σ x and Σ x² where every k is near 0": by_state,
    "Σ x and Σ (x-k)²": mean_by_plain_sum,
    "one reduction of both": one_reduction,
    "products with ones": products,
    "blocks of 32 channels": partial(channel_blocks, 32),
    "tiles of 1 MB": partial(row_tiles, 2**20),
}


def near_zero(epochs: int = 5) -> list[dict[str, Any]]:
    """Return for each norm of a trained network how many of its running means are near 0: the study ``near``.

    A layer could take plain sums where all of them are.
    """
    options = TrainOptions(model="resnet", data="mnist", epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        place = TrainPlace(out=Path(folder) / "run", devices=1)
        train(options, place, Console(quiet=True))
        _, state = find_saved(place.out).read(mesh_of(1))
    rows = []
    for name, of in sorted(jax.device_get(state.batch_stats).items()):
        near = is_near(of["mean"], of["var"])
        row = {"network": f"resnet, {epochs} epochs of mnist", "norm": name}
        rows.append(row | {"channels": near.size, "near 0": int(near.sum())})
    return rows


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each shape: each way's time, and its ratio to Flax's."""
    rows = []
    for spec in SHAPES:
        shape = spec.images(BATCH, "float32").shape
        drawn = np.random.default_rng(0).standard_normal(shape, np.float32) + np.float32(0.5)
        x, k = jnp.asarray(drawn), jnp.full(shape[-1], 0.45)
        wide = drawn.astype(np.float64)
        want = np.maximum((wide - wide.mean(ROWS)) / np.sqrt(wide.var(ROWS) + EPSILON), 0)
        calls = {}
        for name, way in WAYS.items():
            program = jax.jit(way).lower(x, k).compile()
            np.testing.assert_allclose(program(x, k), want, atol=1e-4, err_msg=name)
            calls[name] = lambda program=program, x=x, k=k: program(x, k)
        seconds = interleaved(calls, repeats)
        rows.append(
            {
                "spec": spec.name,
                "batch": BATCH,
                "dtype": "float32",
                "seconds": {name: quartiles(values) for name, values in seconds.items()},
                "to Flax": {name: quartiles(values / seconds["Flax Linen"]) for name, values in seconds.items()},
            }
        )
    return rows
