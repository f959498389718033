"""How often the second sweep is taken, and what its guard costs where it is not: ``python -m benchmarks.guard``.

The guard of ``jbn.core.statistics`` fires in a layer and step where the pilot, the running mean, is so far from the
mean of the batch that digits would be lost. Writes ``benchmarks/results/guard.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from rich.console import Console
from rich.table import Table

import jbn
from jbn.core import statistics
from jbn.core.axes import Sync
from jbn.core.checks import read_layout
from jbn.lab.data import digits
from jbn.lab.models import NETWORKS
from jbn.linen import BatchNorm

RESULTS = Path(__file__).parent / "results" / "guard.json"


class ResNet(nn.Module):
    """Three residual blocks of 16, 32 and 64 features on images (n, 8, 8, 1)."""

    momentum: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Return logits (n, 10)."""

        def norm(**options: Any) -> BatchNorm:
            return BatchNorm(use_running_average=not train, momentum=self.momentum, **options)

        x = norm(activation=nn.relu)(nn.Conv(16, (3, 3), use_bias=False)(x))
        for features in (16, 32, 64):
            y = norm(activation=nn.relu)(nn.Conv(features, (3, 3), use_bias=False)(x))
            y = nn.Conv(features, (3, 3), use_bias=False)(y)
            x = x if x.shape == y.shape else norm()(nn.Conv(features, (1, 1), use_bias=False)(x))
            x = norm(activation=nn.relu)(y, residual=x)
        return nn.Dense(10)(x.mean((1, 2)))


def fires(x: Array, mean: Array, epsilon: float) -> Array:
    """Return whether the guard fires for a batch and a running mean."""
    rows = statistics.SharedRows(read_layout(x, -1), Sync(), epsilon)
    pilot = statistics.choose_pilot(mean, np.dtype(np.float32))
    return (statistics.statistics(rows, x, None, pilot).pilot != pilot).any()


def watched(model: nn.Module, variables: Any, images: Array) -> tuple[Any, Any, list[Array]]:
    """Return logits, new statistics and whether the guard fires, for each layer."""
    fired = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, BatchNorm):
            fired.append(fires(args[0], layer.get_variable("batch_stats", "mean"), layer.epsilon))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, new["batch_stats"], fired


def share(model: nn.Module, steps: int) -> np.ndarray:
    """Train on digits for some steps and return (steps, layers): whether the guard fired."""
    data = digits(0).training
    optimizer = optax.sgd(0.1, momentum=0.9)
    variables = model.init(jax.random.key(0), data.images[:2], train=True)
    params, stats = variables["params"], variables["batch_stats"]
    moving = optimizer.init(params)

    @jax.jit
    def step(params: Any, stats: Any, moving: Any, images: Array, labels: Array) -> Any:
        def loss(params: Any) -> Any:
            logits, new, fired = watched(model, {"params": params, "batch_stats": stats}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (new, jnp.stack(fired))

        grads, (new, fired) = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, moving)
        return optax.apply_updates(params, updates), new, state, fired

    history = []
    for i in range(steps):
        epoch, index = divmod(i, len(data.labels) // 128)
        rows = np.random.default_rng((0, epoch)).permutation(len(data.labels))[index * 128 : (index + 1) * 128]
        params, stats, moving, fired = step(params, stats, moving, data.images[rows], data.labels[rows])
        history.append(np.asarray(fired))
    return np.array(history)


@partial(jax.jit, static_argnums=1)
def closes_after(value: Array, updates: int, momentum: Array) -> Array:
    """Return the last of the updates at which a constant channel fires, from a fresh state; 0 if it never does."""
    x = jnp.full((256, 1), value)

    def step(state: jbn.State, i: Array) -> tuple[jbn.State, Array]:
        fired = fires(x, state.mean, 1e-5)
        return jbn.bn_forward(None, state, x, True, momentum=momentum)[1], jnp.where(fired, i + 1, 0)

    return lax.scan(step, jbn.bn_init(1)[1], jnp.arange(updates))[1].max()


def cost(repeats: int) -> np.ndarray:
    """Return the ratios of the time of forward and backward with the guard to that without, f32 32×56×56×64."""
    x = jax.random.normal(jax.random.key(0), (32, 56, 56, 64))
    params, state = jbn.bn_init(64)

    def build() -> Callable[[], Any]:
        def loss(x: Array, params: Any, state: Any) -> tuple[Array, Any]:
            y, new = jbn.bn_forward(params, state, x, True)
            return (y * y).sum(), new

        jax.clear_caches()
        compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(x, params, state).compile()
        return lambda: jax.block_until_ready(compiled(x, params, state))

    guarded = build()
    with mock.patch("jbn.core.lax.lax.cond", lambda _, again, once: once()):
        free = build()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), guarded(), free())

    def seconds(call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def ratio(turn: int) -> float:  # the second of two calls finds warmer caches
        pair = {call: seconds(call) for call in ((guarded, free) if turn % 2 else (free, guarded))}
        return pair[guarded] / pair[free]

    return np.array([ratio(turn) for turn in range(repeats)])


def main() -> None:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description="How often the second sweep is taken, and what its guard costs.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=600)
    options = parser.parse_args()
    dense, conv = (NETWORKS[name](batch_norm=True) for name in ("dense", "conv"))
    networks = {
        "dense of the demo": dense,
        "conv of the demo": conv,
        "ResNet, momentum 0.9": ResNet(0.9),
        "ResNet, momentum 0.99": ResNet(0.99),
    }
    shares = {}
    table = Table("network", "layers", "first 100 steps", "later steps", title="Share of layer-steps that sweep twice")
    for name, model in networks.items():
        fired = share(model, options.steps)
        shares[name] = {"first 100": float(fired[:100].mean()), "later": float(fired[100:].mean())}
        table.add_row(name, str(fired.shape[1]), f"{fired[:100].mean():.1%}", f"{fired[100:].mean():.2%}")
    constants = {
        f"{value:g}, momentum {momentum}": int(closes_after(jnp.float32(value), 4000, jnp.float32(momentum)))
        for momentum in (0.9, 0.99)
        for value in (0.1, 1.0, 100.0, 1e4, 1e6)
    }
    ratios = np.percentile(cost(options.repeats), [25, 50, 75])
    console = Console()
    console.print(table)
    console.print("A constant channel, from a fresh state: the last update that fires.", constants)
    console.print(
        f"Time of forward and backward with the guard / without: {ratios[1]:.3f} ({ratios[0]:.3f}-{ratios[2]:.3f})"
    )
    content = {
        "share": shares,
        "constant channel: last update that fires": constants,
        "cost quartiles": ratios.tolist(),
    }
    RESULTS.write_text(json.dumps({"jax": jax.__version__, **content}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
