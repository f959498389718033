"""Calls that nobody compiled, beside Flax: the study ``eager``.

Small x, so that what counts is dispatch. Both answers are checked against float64 first.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jbn.linen
from benchmarks.timing import quartiles
from jbn.studies.timing import Call, interleaved


def calls(layer: type[nn.Module]) -> dict[str, Call]:
    """Return what is timed for one library: a training call, its gradient, an evaluation."""
    x = jax.random.normal(jax.random.key(0), (32, 64))
    variables = layer(use_running_average=False).init(jax.random.key(1), x)
    params, stats = variables["params"], variables["batch_stats"]
    train, evaluate = layer(use_running_average=False), layer(use_running_average=True)

    def loss(params: Any, x: Any) -> Any:
        y, _ = train.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (y**2).sum()

    y, _ = train.apply(variables, x, mutable=["batch_stats"])
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(y, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), atol=1e-5)
    return {
        "training": lambda: train.apply(variables, x, mutable=["batch_stats"]),
        "gradient": lambda: jax.grad(loss, (0, 1))(params, x),
        "evaluation": lambda: evaluate.apply(variables, x),
    }


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each kind of call."""
    ours, theirs = calls(jbn.linen.BatchNorm), calls(nn.BatchNorm)
    rows = []
    for name in ours:
        seconds = interleaved({"jbn": ours[name], "Flax Linen": theirs[name]}, 3 * repeats)
        times = {who: quartiles(values) for who, values in seconds.items()}
        ratio = {"Flax Linen": quartiles(seconds["jbn"] / seconds["Flax Linen"])}
        rows.append({"call": name, "seconds": times, "ratio": ratio})
    return rows
