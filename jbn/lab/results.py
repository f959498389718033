"""What a trained network is worth: the figures of the table, the plot and the JSON file."""

import math
from importlib import metadata
from platform import python_version
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jbn import __version__
from jbn.lab.data import TEST_SIZE, VALIDATION_SIZE
from jbn.lab.devices import Batch
from jbn.lab.training import PERCENTILES, Trained, evaluate, evaluation_steps


def network_results(network: nn.Module, trained: Trained, test: Batch) -> dict[str, Any]:
    """Return the figures of a trained network as JSON values, null for what is not finite or never came."""
    accuracy, loss = evaluate(network, trained.state, *test)
    history = trained.history
    percentiles = history["preactivation_percentiles"]
    timed = trained.seconds[np.isfinite(trained.seconds)]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.state.params)),
        "test_accuracy": _share(accuracy, TEST_SIZE),
        "test_loss": _json_value(loss),
        "steps_to_90_percent": _steps_to(0.90, history["validation_accuracy"], len(trained.seconds)),
        "steps_to_95_percent": _steps_to(0.95, history["validation_accuracy"], len(trained.seconds)),
        "median_step_ms": round(float(np.median(timed)) * 1e3, 4) if timed.size else None,
        "first_step_with_loss_not_finite": _first_not_finite(history["training_loss"]),
        "history": {
            "training_loss": _json_value(history["training_loss"]),
            "evaluation_steps": evaluation_steps(len(trained.seconds)),
            "validation_accuracy": [_share(value, VALIDATION_SIZE) for value in history["validation_accuracy"]],
            "validation_loss": _json_value(history["validation_loss"]),
            "preactivation_percentiles": {
                str(percentile): _json_value(values)
                for percentile, values in zip(PERCENTILES, percentiles.T, strict=True)
            },
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the figures depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")
    installed = {package: metadata.version(package) for package in packages}
    return {"python": python_version(), "jbn": __version__} | installed


def _steps_to(accuracy: float, history: np.ndarray, steps: int) -> int | None:
    # In float32 0.9 is a little more than 0.9, and 324 of 360 right is 0.9.
    reached = np.flatnonzero(history >= np.float32(accuracy))
    return evaluation_steps(steps)[reached[0]] if reached.size else None


def _first_not_finite(losses: np.ndarray) -> int | None:
    steps = np.flatnonzero(~np.isfinite(losses))
    return int(steps[0]) + 1 if steps.size else None


def _json_value(values: Any) -> Any:
    if np.ndim(values):
        return [_json_value(value) for value in values]
    # The shortest decimal of a float32: 0.1, not 0.10000000149011612.
    return float(str(np.float32(values))) if math.isfinite(values) else None


def _share(accuracy: Any, total: int) -> float:
    return round(float(accuracy) * total) / total
