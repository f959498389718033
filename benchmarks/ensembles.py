"""Ensembles, members of one network under ``jax.vmap``, beside Flax: the study ``ensembles``.

The guard of the statistics is asked for all members at once: none is swept again where none needs it. So it is timed
with a state that is warm, where none does, and with a fresh one and means of 3, where all do.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jbn.linen
from benchmarks.timing import quartiles
from jbn.studies.timing import Call, interleaved

SHAPES = ((8, 32, 28, 28, 64), (8, 32, 14, 14, 256), (16, 1024, 256))  # members first
MEAN = 3.0
LIBRARIES = {"jbn": jbn.linen.BatchNorm, "Flax Linen": nn.BatchNorm}


def calls(layer: type[nn.Module], shape: tuple[int, ...], warm: bool) -> dict[str, Call]:
    """Return a training call and its gradient, compiled, after y was compared with float64."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32) + np.float32(MEAN)
    norm = layer(use_running_average=False)
    params = norm.init(jax.random.key(0), x[0])["params"]
    near = np.full(shape[-1], MEAN if warm else 0, np.float32)
    stats = {"mean": jnp.stack([near] * shape[0]), "var": jnp.ones((shape[0], shape[-1]))}

    def train(stats: Any, x: Any) -> Any:
        y, new = norm.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return nn.relu(y), new["batch_stats"]

    def loss(x: Any, stats: Any) -> Any:
        y, new = jax.vmap(train)(stats, x)
        return (y**2).sum(), new

    forward = jax.jit(jax.vmap(train)).lower(stats, x).compile()
    both = jax.jit(jax.grad(loss, has_aux=True)).lower(x, stats).compile()
    wide, rows = x.astype(np.float64), tuple(range(1, x.ndim - 1))
    want = (wide - wide.mean(rows, keepdims=True)) / np.sqrt(wide.var(rows, keepdims=True) + 1e-5)
    np.testing.assert_allclose(forward(stats, x)[0], np.maximum(want, 0), atol=1e-4)
    there = jax.device_put(x)
    return {"forward": lambda: forward(stats, there), "forward and backward": lambda: both(there, stats)}


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each shape, state and call."""
    rows = []
    for shape in SHAPES:
        for warm in (True, False):
            made = {name: calls(layer, shape, warm) for name, layer in LIBRARIES.items()}
            for call in made["jbn"]:
                seconds = interleaved({name: each[call] for name, each in made.items()}, repeats)
                of_all = {name: quartiles(values) for name, values in seconds.items()}
                ratio = {"Flax Linen": quartiles(seconds["jbn"] / seconds["Flax Linen"])}
                spec = f"{shape[0]} × {'×'.join(map(str, shape[1:]))}, {'warm' if warm else 'fresh'}"
                rows.append({"spec": spec, "call": call, "seconds": of_all, "ratio": ratio})
    return rows
