"""Eager calls beside Flax, as ratios within one run: ``python -m benchmarks.eager``.

Not jitted by the caller, small x, so that what counts is dispatch. Both answers are checked against float64 first.
Writes ``benchmarks/results/eager.json``.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jbn.linen

REPEATS = 60
RESULTS = Path(__file__).parent / "results" / "eager.json"
Call = Callable[[], Any]


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


def interleaved(contenders: dict[str, Call]) -> dict[str, np.ndarray]:
    """Return the seconds of every repeat; the contenders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(REPEATS + 3):
        for name, call in contenders.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if repeat >= 3:  # the first ones compile
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def main() -> None:
    """Print and write the table."""
    ours, theirs = calls(jbn.linen.BatchNorm), calls(nn.BatchNorm)
    table = Table("call", "jbn µs", "Flax µs", "ratio", "quartiles of the ratio", title="Eager calls, x (32, 64)")
    rows = {}
    for name in ours:
        seconds = interleaved({"jbn": ours[name], "flax": theirs[name]})
        ratio = np.percentile(seconds["jbn"] / seconds["flax"], [25, 50, 75])
        micro = {who: float(np.median(values) * 1e6) for who, values in seconds.items()}
        rows[name] = {"jbn_us": micro["jbn"], "flax_us": micro["flax"], "ratio_quartiles": ratio.tolist()}
        table.add_row(
            name, f"{micro['jbn']:.0f}", f"{micro['flax']:.0f}", f"{ratio[1]:.2f}", f"{ratio[0]:.2f} to {ratio[2]:.2f}"
        )
    Console().print(table)
    versions = {"jax": jax.__version__, "flax": flax.__version__, "device": jax.devices()[0].device_kind}
    RESULTS.write_text(json.dumps({"versions": versions, "calls": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
