"""What are statistics per time step worth in an LSTM? ``python -m benchmarks.sequences``.

LSTMs without a norm, with batch normalization of γ = 0.1 and of γ = 1 at first (Cooijmans et al. 2017), and with layer
normalization read digits row by row, of which 5 to 8 are there; or, with ``--data vowels``, JapaneseVowels, whose files
come with ``pip install --no-deps aeon``. Each is trained at every rate of one grid, with the same splits and batches,
and is told at the rate that is best on its validation rows. It writes ``benchmarks/results/sequences.json``, what it
found on one data set beside what it found on the other.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from jax import Array
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.crossq import interval
from jbn.linen import BatchNorm

RESULTS = Path(__file__).parent / "results" / "sequences.json"
PACKAGES = ("jax", "flax", "optax", "scikit-learn")
# The norm, and the scale that it begins with.
ARMS: dict[str, tuple[str, float]] = {
    "plain": ("none", 1.0), "batch, γ = 0.1": ("batch", 0.1), "batch, γ = 1": ("batch", 1.0), "layer": ("layer", 1.0)
}  # fmt: skip
OURS = "batch, γ = 0.1"
LEVELS = {"digits": 0.85, "vowels": 0.9}  # the accuracy on validation rows to which steps are counted
REST = 0.1  # later steps than this share of the training rows has use the statistics of the last that it has


@dataclass(frozen=True)
class Sequences:
    """Sequences of unequal lengths.

    Attributes:
        x: (N, T, C), float32, 0 after the end of a sequence; with a leading axis of seeds once they are split.
        lengths: (N,), how many steps are there.
        labels: (N,), the classes.
    """

    x: Any
    lengths: Any
    labels: Any

    def __getitem__(self, rows: Any) -> "Sequences":
        return Sequences(self.x[rows], self.lengths[rows], self.labels[rows])


jax.tree_util.register_dataclass(Sequences, data_fields=["x", "lengths", "labels"], meta_fields=[])


def digits() -> Sequences:
    """Return the digits of scikit-learn row by row, of which each keeps the first 5, 6, 7 or all 8."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    lengths = np.random.default_rng(0).integers(5, 9, len(labels))
    x = images.reshape(-1, 8, 8).astype(np.float32) / 16
    return Sequences(np.where(np.arange(8)[:, None] < lengths[:, None, None], x, 0), lengths, labels)


def vowels() -> Sequences:
    """Return the 640 utterances of JapaneseVowels: nine speakers, 7 to 29 steps of 12 coefficients.

    The files are read where they are, because what ``import aeon`` needs is not installed.
    """
    package = find_spec("aeon")
    if package is None or not package.submodule_search_locations:
        raise typer.BadParameter("--data vowels needs the files of aeon: pip install --no-deps aeon")
    folder = Path(package.submodule_search_locations[0]) / "datasets/data/JapaneseVowels"
    lines = [
        line
        for part in ("TRAIN", "TEST")
        for line in (folder / f"JapaneseVowels_{part}.ts").read_text(encoding="utf-8").splitlines()
        if line and line[0] not in "#@"
    ]
    rows = [[np.array(channel.split(","), np.float32) for channel in line.split(":")] for line in lines]
    lengths = np.array([len(channels[0]) for channels in rows])
    x = np.zeros((len(rows), lengths.max(), 12), np.float32)
    for row, channels in zip(x, rows, strict=True):
        row[: len(channels[0])] = np.stack(channels[:12], 1)
    return Sequences(x, lengths, np.array([int(channels[12][0]) - 1 for channels in rows]))


class Cell(nn.Module):
    """An LSTM cell with norms of the input's part, of the recurrent one's and of the cell's, for one time step."""

    features: int
    norm: str
    gamma: float
    train: bool

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        """Return the new cell and hidden state; where a sequence has ended, they stay."""
        (c, h), (x, valid, push) = carry, inputs
        dense = partial(nn.Dense, 4 * self.features, use_bias=False)
        bias = self.param("bias", nn.initializers.zeros, (4, self.features)).at[0].add(1)  # to remember at first
        gates = self._normalize("input", dense(name="input")(x), valid, False)
        gates += self._normalize("recurrent", dense(name="recurrent")(h), valid, False) + bias.reshape(1, -1)
        forget, add, out, new = jnp.split(gates, 4, -1)
        moved = nn.sigmoid(forget) * c + nn.sigmoid(add) * nn.tanh(new)
        shown = nn.sigmoid(out) * nn.tanh(self._normalize("cell", moved, valid, True)) + push
        return (jnp.where(valid, moved, c), jnp.where(valid, shown, h)), None

    def _normalize(self, name: str, z: Array, valid: Array, use_bias: bool) -> Array:
        options: dict[str, Any] = {
            "use_bias": use_bias, "scale_init": nn.initializers.constant(self.gamma), "name": f"norm_{name}"
        }  # fmt: skip
        if self.norm == "batch":
            return BatchNorm(not self.train, momentum=0.9, **options)(z, mask=valid)
        return nn.LayerNorm(**options)(z) if self.norm == "layer" else z


class Reader(nn.Module):
    """An LSTM over time and a dense layer on its last hidden state; batch statistics are those of each step."""

    arm: str
    features: int
    classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, lengths: Array, push: Array | None = None) -> Array:
        """Return the logits; ``push`` (T, N, features) is added to the hidden states, for the gradient in them."""
        n, steps, _ = x.shape
        valid = (jnp.arange(steps)[:, None] < lengths[None])[..., None]
        layer = nn.scan(
            Cell, variable_axes={"batch_stats": 0}, variable_broadcast="params", split_rngs={"params": False}
        )(self.features, *ARMS[self.arm], self.train)
        start = jnp.zeros((n, self.features))
        push = jnp.zeros((steps, 1, 1)) if push is None else push
        (_, h), _ = layer((start, start), (x.swapaxes(0, 1), valid, push))
        return nn.Dense(self.classes)(h)


@dataclass(frozen=True)
class Settings:
    """What is trained how long, the same for all arms; in the results as it is."""

    data: str
    seeds: int
    steps: int
    features: int
    batch: int
    look: int
    rates: tuple[float, ...]


def split(data: Sequences, settings: Settings) -> tuple[Sequences, Sequences, Sequences, np.ndarray]:
    """Return training, validation and test rows of each seed, 60, 15 and 25 %, and the rows of its batches."""
    n = len(data.labels)
    ends = [int(0.6 * n), int(0.75 * n)]
    orders, batches = [], []
    for seed in range(settings.seeds):
        rng = np.random.default_rng(seed)
        orders.append(rng.permutation(n))
        epochs = -(-settings.steps * settings.batch // (full := ends[0] // settings.batch * settings.batch))
        rows = [rng.permutation(ends[0])[:full] for _ in range(epochs)]
        batches.append(np.concatenate(rows)[: settings.steps * settings.batch].reshape(settings.steps, settings.batch))
    train, valid, test = (data[part] for part in np.split(np.stack(orders), ends, axis=1))
    return train, valid, test, np.stack(batches)


def reuse_last(stats: Any, lengths: Array) -> Any:
    """Return statistics in which the steps that too few rows reach are those of the last step that enough did."""
    steps = jnp.arange(jax.tree.leaves(stats)[0].shape[0]) if jax.tree.leaves(stats) else jnp.arange(0)
    last = jnp.sort(lengths)[int((1 - REST) * lengths.size)] - 1
    return jax.tree.map(lambda s: s[jnp.minimum(steps, last)], stats)


def train(arm: str, settings: Settings, parts: Any, classes: int, advance: Any) -> dict[str, np.ndarray]:
    """Train one arm at all rates with all seeds at once.

    Returns:
        Accuracies: on validation rows at each look, (looks, rates, seeds), and on test rows at the end, (rates, seeds).
    """
    rows, valid, test, batches = parts
    model = Reader(arm, settings.features, classes)
    learner = model.clone(train=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def start(seed: Array, rows: Sequences) -> Any:
        variables = learner.init(jax.random.key(seed), rows.x[:2], rows.lengths[:2])
        return variables["params"], variables.get("batch_stats", {}), tx.init(variables["params"])

    def step(rate: Array, rows: Sequences, carry: Any, batch: Array) -> Any:
        params, stats, moving = carry
        some = rows[batch]

        def loss_fn(params: Any) -> Any:
            held = {"params": params, "batch_stats": stats}
            logits, new = learner.apply(held, some.x, some.lengths, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, some.labels)
            return losses.mean(), new.get("batch_stats", {})

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, moving = tx.update(grads, moving, params)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), stats, moving), None

    def advance_to_look(rate: Array, rows: Sequences, batches: Array, carry: Any) -> Any:
        return jax.lax.scan(partial(step, rate, rows), carry, batches)[0]

    def accuracy(rows: Sequences, known: Array, carry: Any) -> Array:
        held = {"params": carry[0], "batch_stats": reuse_last(carry[1], known)}
        logits: Any = model.apply(held, rows.x, rows.lengths)
        return (logits.argmax(-1) == rows.labels).mean()

    def of_all(function: Any, *seeds_of: int) -> Any:
        """Map a function over seeds, and that over rates: of the arguments with a 1 here only over seeds."""
        seeds = jax.vmap(function, in_axes=[None if kind == 2 else 0 for kind in seeds_of])
        return jax.jit(jax.vmap(seeds, in_axes=[None if kind == 1 else 0 for kind in seeds_of]))

    rates = jnp.asarray(settings.rates)
    carry = jax.jit(jax.vmap(start))(jnp.arange(settings.seeds), rows)
    carry = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rates), *a.shape)), carry)
    learn, judge = of_all(advance_to_look, 2, 1, 1, 0), of_all(accuracy, 1, 1, 0)
    curve = []
    for first in range(0, settings.steps, settings.look):
        carry = learn(rates, rows, batches[:, first : first + settings.look], carry)
        curve.append(np.asarray(judge(valid, rows.lengths, carry)))
        advance()
    return {"valid": np.stack(curve), "test": np.asarray(judge(test, rows.lengths, carry))}


def gradient_inputs(data: Sequences, settings: Settings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return batches without an end inside: of the data, of noise that is as long as makes a difference, of pixels.

    The first pixels of digits are constant, or nearly so.
    """
    steps = min(data.x.shape[1], 16)
    rows = data[np.flatnonzero(data.lengths >= steps)[: settings.batch]]
    noise = np.random.default_rng(0).standard_normal((len(rows.x), 64, data.x.shape[2])).astype(np.float32)
    inputs = {f"{steps} steps of the data": rows.x[:, :steps], "64 steps of noise": noise}
    if settings.data == "digits":
        inputs["64 steps of a pixel"] = rows.x.reshape(len(rows.x), 64, 1)
    return {title: (x, rows.labels) for title, x in inputs.items()}


def norms_through_time(arm: str, features: int, x: np.ndarray, labels: np.ndarray, seeds: int) -> list[float]:
    """Return ‖∂loss/∂hₜ‖ of the first step to that of the last, at initialization, the geometric mean over seeds."""
    lengths = jnp.full(len(x), x.shape[1])
    model = Reader(arm, features, int(labels.max()) + 1, train=True)

    def norms(seed: Array) -> Array:
        variables = model.init(jax.random.key(seed), x, lengths)

        def loss(push: Array) -> Array:
            logits, _ = model.apply(variables, x, lengths, push, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        grads = jax.grad(loss)(jnp.zeros((x.shape[1], len(x), features)))
        return jnp.log(jnp.sqrt((grads**2).sum((1, 2))))

    found = np.asarray(jax.jit(jax.vmap(norms))(jnp.arange(seeds)), np.float64).mean(0)
    return [float(value) for value in np.exp(found - found[-1])]


def steps_to(level: float, curve: np.ndarray, look: int) -> list[int | None]:
    """Return of each seed the number of steps after which it was first seen to reach an accuracy; None for never."""
    reached = curve >= level  # (looks, seeds)
    return [int(of_seed.argmax() + 1) * look if of_seed.any() else None for of_seed in reached.T]


def summary(found: dict[str, dict[str, np.ndarray]], settings: Settings) -> dict[str, Any]:
    """Return what each arm reached at its best rate, and how far the others are from batch normalization by seeds."""
    arms: dict[str, Any] = {}
    for arm, curves in found.items():
        by_rate = curves["valid"][-1].mean(-1)
        best = int(by_rate.argmax())
        arms[arm] = {
            "rate": settings.rates[best],
            "validation by rate": [float(value) for value in by_rate],
            "test": curves["test"][best].astype(float).tolist(),
            "interval": interval(curves["test"][best]),
            "validation by look": [float(value) for value in curves["valid"][:, best].mean(-1)],
            "steps": steps_to(LEVELS[settings.data], curves["valid"][:, best], settings.look),
        }
    ours = np.array(arms[OURS]["test"])
    return {"arms": arms, f"{OURS} less": {arm: interval(ours - arms[arm]["test"]) for arm in arms if arm != OURS}}


def verdict(other: str, difference: list[float]) -> str:
    """Say what the interval of a difference shows."""
    low, mean, high = difference
    if low <= 0 <= high:
        return f"{OURS} and {other}: not told apart ({low:+.3f} to {high:+.3f})"
    return f"{OURS} is {'more' if mean > 0 else 'less'} accurate than {other}, by {low:+.3f} to {high:+.3f}"


def show(console: Console, found: dict[str, Any]) -> None:
    """Print the tables and what they show."""
    settings, level = found["settings"], LEVELS[found["settings"]["data"]]
    title = f"{settings['data']}, {settings['seeds']} seeds, {settings['steps']} steps, 95 % intervals"
    steps_column = f"steps to {level:.0%}: median"
    table = Table("norm", "rate", "validation", "test accuracy", steps_column, "least and most", title=title)
    for arm, row in found["arms"].items():
        steps = [np.inf if value is None else value for value in row["steps"]]
        low, mean, high = row["interval"]
        ends = f"{min(steps):.0f}, {max(steps):.0f}"
        accuracies = f"{max(row['validation by rate']):.3f}", f"{mean:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(arm, f"{row['rate']:g}", *accuracies, f"{np.median(steps):.0f}", ends)
    console.print(table)
    for other, difference in found[f"{OURS} less"].items():
        console.print(f"{verdict(other, difference)}.")
    for title, rows in found["gradient"].items():
        table = Table("norm", "first step", "middle", "last", title=f"‖∂loss/∂hₜ‖, {title}")
        for arm, norms in rows.items():
            table.add_row(arm, *(f"{norms[at]:.2g}" for at in (0, len(norms) // 2, -1)))
        console.print(table)


def main(
    data: Annotated[Literal["digits", "vowels"], typer.Option(help="What is read.")] = "digits",
    seeds: Annotated[int, typer.Option(min=2, help="Networks of each norm and rate.")] = 10,
    steps: Annotated[int, typer.Option(min=20, help="Training steps of each.")] = 400,
    features: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 32,
) -> None:
    """Train LSTMs without and with norms, and print how accurate they become and how soon."""
    began, loads = time.perf_counter(), [os.getloadavg()[0]]
    settings = Settings(data, seeds, steps, features, 64, 10, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
    whole = {"digits": digits, "vowels": vowels}[data]()
    parts = split(whole, settings)
    found = {}
    with Progress() as progress:
        for arm in ARMS:
            task = progress.add_task(arm, total=-(-steps // settings.look))
            found[arm] = train(arm, settings, parts, int(whole.labels.max()) + 1, partial(progress.advance, task))
            loads.append(os.getloadavg()[0])
    result = {
        "versions": {name: version(name) for name in PACKAGES},
        "settings": asdict(settings),
        **summary(found, settings),
        "gradient": {
            title: {arm: norms_through_time(arm, features, x, labels, seeds) for arm in ARMS}
            for title, (x, labels) in gradient_inputs(whole, settings).items()
        },
        "seconds": round(time.perf_counter() - began),
        "load": [round(load, 1) for load in loads],
    }
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept | {data: result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(Console(width=130), result)


if __name__ == "__main__":
    typer.run(main)
