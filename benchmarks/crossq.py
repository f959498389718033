"""Does a client learn with jbn's Batch Renormalization as with its own? ``python -m benchmarks.crossq``.

CrossQ of sbx-rl on Pendulum-v1, with sbx-rl's layer, with jbn's in its place, and with none; and two faults of that
layer, found anew. It needs ``pip install --no-deps -r benchmarks/crossq.txt``, and writes
``benchmarks/results/crossq.json``.

CrossQ has no target networks: one forward pass of its critics takes (s, a) and (s', a') as one batch, whose statistics
are those of the mixture. Two passes would normalize each half by itself, and move the running statistics twice.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from rich.console import Console
from rich.table import Table
from scipy import stats

import jbn
from jbn.linen import BatchNorm

RESULTS = Path(__file__).parent / "results" / "crossq.json"
NETWORKS = {"pi": [64, 64], "qf": [128, 128]}  # the default, 256 and 1024, takes hours on two cores
PACKAGES = ("jax", "flax", "sbx-rl", "stable-baselines3", "gymnasium")
ARMS = ("sbx-rl", "jbn", "none")
TASK = "Pendulum-v1"
LOT = 3  # environment steps between updates, as many of which follow: the actor's turn is then always the same
MARGIN = 0.1  # two arms are alike if they differ by less than this share of what sbx-rl's learned


class BatchRenorm(nn.Module):
    """The layer of sbx-rl, made of jbn's: its fields that CrossQ sets, its call, and its schedule, a switch."""

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-3
    warmup_steps: int = 100_000

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Normalize x as plain batch normalization does until the warm-up ends."""
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        warm = steps.value >= self.warmup_steps
        by = jbn.renorm(jnp.where(warm, 3.0, 1.0), jnp.where(warm, 5.0, 0.0))
        y = BatchNorm(evaluate, momentum=self.momentum, epsilon=self.epsilon, normalize_by=by)(x)
        if not evaluate and not self.is_initializing():
            steps.value += 1
        return y


def returns(model: Any, episodes: int = 20) -> float:
    """Return the mean return of a policy without its noise, in episodes that are the same for all."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    mean, _ = evaluate_policy(model, make_vec_env(TASK, n_envs=episodes, seed=10_000), n_eval_episodes=episodes)
    return float(mean)


def learn(arm: str, seed: int, steps: int, warmup: int, looks: int) -> list[float]:
    """Train one agent, and return what its policy earns at the start and after each of ``looks`` equal parts."""
    import torch
    from sbx import CrossQ

    torch.set_num_threads(1)  # it holds the replay buffer, and its threads would wait for work on JAX's cores
    began = time.perf_counter()
    norm = mock.patch("sbx.crossq.policies.BatchRenorm", BatchRenorm) if arm == "jbn" else nullcontext()
    switches = {"batch_norm": False, "batch_norm_actor": False} if arm == "none" else {}
    with norm:  # while the networks are built and traced
        model = CrossQ(
            "MlpPolicy", TASK, seed=seed, train_freq=LOT, gradient_steps=LOT,
            policy_kwargs={"net_arch": NETWORKS, "renorm_warmup_steps": warmup, **switches},
        )  # fmt: skip
        curve = [returns(model)]
        for _ in range(looks):
            model.learn(steps // looks, reset_num_timesteps=False)
            curve.append(returns(model))
    print(f"seed {seed}, {arm}: {curve} in {time.perf_counter() - began:.0f} s", flush=True)
    return curve


def interval(values: Any) -> list[float]:
    """Return the ends of the 95 % interval of a mean by Student's t, around the mean: low, mean, high."""
    values = np.asarray(values, np.float64)
    mean, half = values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return [float(end) for end in (mean - half, mean, mean + half)]


def verdict(difference: list[float], margin: float) -> str:
    """Say what the interval of the difference, jbn less sbx-rl, shows."""
    low, _, high = difference
    if margin <= 0:
        return "shows nothing, as it has not learned with sbx-rl's"
    if -margin < low and high < margin:
        return "learns as with sbx-rl's"
    if high < 0 or low > 0:
        return f"learns {'worse' if high < 0 else 'better'} than with sbx-rl's"
    return "may learn as with sbx-rl's or not: so few seeds do not show it"


def summary(curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Return the intervals of what was earned at each look, those of the difference by seeds, and the verdict.

    The verdict is on the last look: before, some agents have found the way up and others have not.
    """
    earned = {arm: np.array(rows).T for arm, rows in curves.items()}  # (looks, seeds)
    differences = [interval(rows) for rows in earned["jbn"] - earned["sbx-rl"]]
    margin = MARGIN * float(earned["sbx-rl"][-1].mean() - earned["sbx-rl"][0].mean())
    intervals = {arm: [interval(row) for row in rows] for arm, rows in earned.items()}
    said = verdict(differences[-1], margin)
    return {"intervals": intervals, "jbn - sbx-rl": differences, "margin": margin, "verdict": said}


def faults() -> list[dict[str, Any]]:
    """Hold both layers to the formula of Ioffe 2017, in float64, where a feature is constant and where ε ≈ σ²."""
    from sbx.common import jax_layers

    rng, epsilon = np.random.default_rng(0), 1e-3
    x = rng.standard_normal((256, 2)).astype(np.float32)
    found = []
    for case, batch in {"a constant feature": x * [1, 0], "σ² = ε": x * epsilon**0.5}.items():
        batch = batch.astype(np.float32)
        wide, mean, var = batch.astype(np.float64), np.array([0.1, 0.0]), np.array([2e-3, 2e-3])
        sigma_b, sigma = np.sqrt(wide.var(0) + epsilon), np.sqrt(var + epsilon)
        r = np.clip(sigma_b / sigma, 1 / 3, 3)
        d = np.clip((wide.mean(0) - mean) / sigma, -5, 5)
        want = (wide - wide.mean(0)) / sigma_b * r + d
        row: dict[str, Any] = {"case": case, "largest |y|": float(np.abs(want).max())}
        for name, layer in {"sbx-rl": jax_layers.BatchRenorm, "jbn": BatchRenorm}.items():
            for warmup in (0, 10):  # with and without r and d
                model = layer(use_running_average=False, epsilon=epsilon, warmup_steps=warmup)
                variables = _set(model.init(jax.random.key(0), batch), mean=mean, var=var)

                def apply(x: Array, model: nn.Module = model, variables: Any = variables) -> Array:
                    return model.apply(variables, x, mutable=["batch_stats"])[0]

                y, pull = jax.vjp(apply, jnp.asarray(batch))
                (dx,) = pull(jnp.asarray(rng.standard_normal(batch.shape), jnp.float32))
                when = "warming up" if warmup else "warm"
                row[f"{name}, dx {when}"] = "NaN" if np.isnan(dx).any() else "finite"
                if not warmup:
                    row[f"{name}, error of y"] = float(np.abs(np.asarray(y, np.float64) - want).max())
        found.append(row)
    return found


def _set(variables: Any, **arrays: np.ndarray) -> Any:
    """Put running statistics in the place of those of a layer, at whatever depth they are."""
    put = lambda path, old: jnp.asarray(arrays[path[-1].key], old.dtype) if path[-1].key in arrays else old  # noqa: E731
    return jax.tree_util.tree_map_with_path(put, variables)


def show(console: Console, found: dict[str, Any]) -> None:
    """Print the tables and the verdict."""
    table = Table("", *(name for name in found["faults"][0] if name != "case"), title="One layer")
    for row in found["faults"]:
        table.add_row(*(f"{value:.1e}" if isinstance(value, float) else value for value in row.values()))
    console.print(table)
    steps, looks = found["settings"]["steps"], len(found["jbn - sbx-rl"]) - 1
    after = [f"after {look * (steps // looks)} steps" for look in range(looks + 1)]
    seeds = len(found["returns"]["jbn"])
    table = Table("norm", *after, title=f"CrossQ on {TASK}: mean return of {seeds} agents, 95 % intervals")
    for arm, rows in (*found["intervals"].items(), ("jbn - sbx-rl, by seeds", found["jbn - sbx-rl"])):
        table.add_row(arm, *(f"{mean:.0f} ({low:.0f} to {high:.0f})" for low, mean, high in rows))
    console.print(table)
    console.print(f"With jbn's CrossQ {found['verdict']}; what differs by less than {found['margin']:.0f} is alike.")


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Agents of each norm.")] = 5,
    steps: Annotated[int, typer.Option(min=300, help="Steps in the environment of each.")] = 3000,
    warmup: Annotated[int, typer.Option(min=0, help="Updates of a layer until it renormalizes.")] = 500,
    looks: Annotated[int, typer.Option(min=1, help="Times that the policy is tried out while it learns.")] = 2,
    processes: Annotated[int, typer.Option(min=1, help="Agents that learn at the same time.")] = 2,
) -> None:
    """Train CrossQ with its own norm, with jbn's and with none, and print what the policies earn."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        runs = [(arm, seed) for seed in range(seeds) for arm in ARMS]
        made = {run: pool.submit(learn, *run, steps, warmup, looks) for run in runs}
        curves = {arm: [made[arm, seed].result() for seed in range(seeds)] for arm in ARMS}
    found = {
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {"task": TASK, "steps": steps, "warmup": warmup, "lot": LOT, "networks": NETWORKS},
        "faults": faults(),
        "returns": curves,
        **summary(curves),
    }
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(Console(width=130), found)


if __name__ == "__main__":
    typer.run(main)
