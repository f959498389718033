"""What differs from ``flax.linen.BatchNorm``, a closed list with figures: ``python -m benchmarks.flax_differences``.

With ``--write`` the table in docs/guides/flax_step.md is replaced by what was just measured.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jbn.linen
from benchmarks import readme

HEAD = ("", "jbn", f"Flax {flax.__version__}")
C = 8


class Difference(NamedTuple):
    """One item: what is looked at, and what the layer of each library gives for it."""

    item: str
    look: Callable[[type[nn.Module]], str]


def _x(mean: float = 0.0, rows: int = 4096, dtype: Any = jnp.float32) -> Any:
    x = np.random.default_rng(0).standard_normal((rows, C)) + mean
    return jnp.asarray(x.astype(np.float32), dtype)


def _variables(x: Any) -> dict[str, Any]:
    zeros, ones = (jnp.full(x.shape[-1], value, jnp.float32) for value in (0, 1))
    return {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}


def _train(layer: type[nn.Module], x: Any, variables: Any = None, mask: Any = None, **options: Any) -> Any:
    model = layer(use_running_average=False, **options)
    return model.apply(variables or _variables(x), x, mask=mask, mutable=["batch_stats"])


def _or_error(act: Callable[[], str]) -> str:
    try:
        return act()
    except (ValueError, TypeError) as error:
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__


def _accuracy(layer: type[nn.Module]) -> str:
    x = _x(1e4)
    y, _ = _train(layer, x)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    return f"{np.abs(np.asarray(y, np.float64) - want).max():.0e}"


MASK = jnp.arange(4096)[:, None] < 4000


def _masked_output(layer: type[nn.Module]) -> str:
    y, _ = _train(layer, _x(3.0), mask=MASK)
    return f"{np.abs(y[4000:]).max():.1f}"


def _masked_nan(layer: type[nn.Module]) -> str:
    x = _x().at[4000:].set(jnp.nan)

    def loss(x: Any) -> Any:
        return jnp.where(MASK, _train(layer, x, mask=MASK)[0], 0).sum()

    return "NaN" if jnp.isnan(jax.grad(loss)(x)[:4000]).any() else "finite"


def _output_dtype(layer: type[nn.Module]) -> str:
    return _train(layer, _x(dtype=jnp.bfloat16))[0].dtype.name


def _state_dtype(layer: type[nn.Module]) -> str:
    with jax.enable_x64(True):
        return _train(layer, jnp.asarray(_x(), jnp.float64))[1]["batch_stats"]["mean"].dtype.name


def _state_gradient(layer: type[nn.Module]) -> str:
    gradient = jax.grad(lambda x: _train(layer, x)[1]["batch_stats"]["mean"].sum())(_x())
    return "yes" if gradient.any() else "no"


def _moments_gradient(layer: type[nn.Module]) -> str:
    def loss(x: Any) -> Any:
        _, sown = layer(use_running_average=True, sow_moments=True).apply(_variables(x), x, mutable=["intermediates"])
        return sown["intermediates"]["moments"][0].mean.sum()

    return _or_error(lambda: "yes" if jax.grad(loss)(_x()).any() else "no")


def _kind(dtype: Any) -> Callable[[type[nn.Module]], str]:
    return lambda layer: _or_error(lambda: _train(layer, _x().astype(dtype))[0].dtype.name)


def _not_finite(layer: type[nn.Module]) -> str:
    _, new = _train(layer, _x().at[0, 0].set(jnp.nan))
    return "kept" if jnp.isfinite(new["batch_stats"]["mean"]).all() else "NaN from then on"


def _one_value(layer: type[nn.Module]) -> str:
    return _or_error(lambda: f"y = {_train(layer, _x(rows=1))[0][0, 0]:.0f}, var moves towards 0")


def _few_rows(rows: int) -> Callable[[type[nn.Module]], str]:
    def look(layer: type[nn.Module]) -> str:
        _, new = _train(layer, _x(3.0), mask=jnp.arange(4096)[:, None] < rows)
        mean, var = (new["batch_stats"][name] for name in ("mean", "var"))
        if jnp.isnan(mean).any():
            return "NaN"
        return "kept" if (mean == 0).all() and (var == 1).all() else f"var moves to {var[0]:.2f}"

    return look


def _gradient_of_x(layer: type[nn.Module]) -> str:
    """Measure dx for cotangents that are nearly constant, where its two parts nearly cancel."""
    x, noise = _x(1.0, dtype=jnp.bfloat16), np.random.default_rng(1).standard_normal((4096, C))
    g = jnp.asarray(1 + 0.01 * noise, jnp.bfloat16)
    _, pull = jax.vjp(lambda x: _train(layer, x, dtype=jnp.bfloat16)[0], x)
    wide, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    c, var = wide - wide.mean(0), wide.var(0) + 1e-5
    want = (g64 - g64.mean(0) - c * (g64 * c).mean(0) / var) / np.sqrt(var)
    return f"{np.linalg.norm(np.asarray(pull(g)[0], np.float64) - want) / np.linalg.norm(want):.0e}"


def _narrow_state(layer: type[nn.Module]) -> str:
    x = _x(5.0)
    variables = _variables(x)
    variables["batch_stats"] = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["batch_stats"])

    def step(_: Any, stats: Any) -> Any:
        new = _train(layer, x, {**variables, "batch_stats": stats})[1]["batch_stats"]
        return jax.tree.map(lambda v: v.astype(jnp.bfloat16), new)

    return _or_error(lambda: f"mean {jax.lax.fori_loop(0, 2000, step, variables['batch_stats'])['mean'][0]:.1f} for 5")


def _flat_mask(layer: type[nn.Module]) -> str:
    x = _x(rows=C)  # as many examples as features
    return _or_error(lambda: "masks features" if _train(layer, x, mask=jnp.arange(C) < C - 1)[0].any() else "")


def _traced_epsilon(layer: type[nn.Module]) -> str:
    return _or_error(lambda: "accepted" if jax.jit(lambda e: _train(layer, _x(), epsilon=e)[0])(1e-5).any() else "")


def _option(**options: Any) -> Callable[[type[nn.Module]], str]:
    return lambda layer: _or_error(lambda: "accepted" if _train(layer, _x(), **options) else "")


def _slow_variance(layer: type[nn.Module]) -> str:
    fast, slow = (_train(layer, _x(1e3), use_fast_variance=fast)[0] for fast in (True, False))
    return f"changes y by {np.abs(fast - slow).max():.0e}" if (fast != slow).any() else "no effect"


def _no_statistics(layer: type[nn.Module]) -> str:
    x = _x()
    return _or_error(lambda: "restarts silently" if _train(layer, x, {"params": _variables(x)["params"]}) else "")


DIFFERENCES = [
    Difference("largest error of y at mean/std = 10⁴, float32", _accuracy),
    Difference("error of dx for nearly constant dy, bfloat16, relative L2", _gradient_of_x),
    Difference("largest masked output", _masked_output),
    Difference("NaN in masked rows: the gradient of valid x is", _masked_nan),
    Difference("y of bfloat16 x, `dtype=None`", _output_dtype),
    Difference("a float32 state after float64 x", _state_dtype),
    Difference("gradient through the new statistics", _state_gradient),
    Difference("gradient through the moments of the batch, `sow_moments=True`", _moments_gradient),
    Difference("complex x", _kind(jnp.complex64)),
    Difference("integer x", _kind(jnp.int32)),
    Difference("boolean x", _kind(jnp.bool_)),
    Difference("running statistics after a NaN in the batch", _not_finite),
    Difference("running statistics after one valid row in the mask", _few_rows(1)),
    Difference("running statistics after no valid row in the mask", _few_rows(0)),
    Difference("a bfloat16 state in training", _narrow_state),
    Difference("a mask of examples, (N,), for as many features", _flat_mask),
    Difference("one value per channel in training", _one_value),
    Difference("`epsilon=0` in training", _option(epsilon=0.0)),
    Difference("`epsilon` traced", _traced_epsilon),
    Difference("`momentum=1.5`", _option(momentum=1.5)),
    Difference("`use_fast_variance=False` at mean/std = 10³", _slow_variance),
    Difference("training without passing `batch_stats`", _no_statistics),
]


def measure() -> list[tuple[str, str, str]]:
    """Return a row per item: the item, what jbn does, what Flax does."""
    return [(item, look(jbn.linen.BatchNorm), look(nn.BatchNorm)) for item, look in DIFFERENCES]


def main() -> None:
    """Print the table, and write it into its page if asked to."""
    parser = argparse.ArgumentParser(description="What differs from flax.linen.BatchNorm, measured.")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/guides/flax_step.md")
    write = parser.parse_args().write
    rows = measure()
    table = Table(*HEAD, title="What differs from flax.linen.BatchNorm")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if write:
        readme.replace("flax-differences", readme.markdown(HEAD, rows))


if __name__ == "__main__":
    main()
