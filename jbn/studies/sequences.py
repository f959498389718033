"""Recurrent networks that read sequences of any lengths, with norms at each step, and what trains many of them at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from jbn.linen import BatchNorm

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


@dataclass(frozen=True)
class Norms:
    """The norms of a cell.

    Attributes:
        kind: of all of them.
        scale: what γ begins with.
        recurrent: whether what comes from the hidden state, and the cell, are normalized too, and not the input alone.
    """

    kind: Literal["none", "batch", "layer"]
    scale: float = 1.0
    recurrent: bool = True


class Cell(nn.Module):
    """An LSTM cell with norms of the input's part, of the recurrent one's and of the cell's, for one time step."""

    features: int
    norms: Norms
    train: bool

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        """Return the new cell and hidden state; where a sequence has ended, they stay."""
        (c, h), (x, valid, push) = carry, inputs
        dense = partial(nn.Dense, 4 * self.features, use_bias=False)
        bias = self.param("bias", nn.initializers.zeros, (4, self.features)).at[0].add(1)  # to remember at first
        gates = self._normalize("input", dense(name="input")(x), valid)
        gates += self._normalize("recurrent", dense(name="recurrent")(h), valid) + bias.reshape(1, -1)
        forget, add, out, new = jnp.split(gates, 4, -1)
        moved = nn.sigmoid(forget) * c + nn.sigmoid(add) * nn.tanh(new)
        shown = nn.sigmoid(out) * nn.tanh(self._normalize("cell", moved, valid)) + push
        return (jnp.where(valid, moved, c), jnp.where(valid, shown, h)), None

    def _normalize(self, name: str, z: Array, valid: Array) -> Array:
        norms = self.norms
        if norms.kind == "none" or not (norms.recurrent or name == "input"):
            return z
        options: dict[str, Any] = {"scale_init": nn.initializers.constant(norms.scale), "name": f"norm_{name}"}
        options |= {"use_bias": name == "cell"}  # the gates have one for both
        if norms.kind == "batch":
            return BatchNorm(not self.train, momentum=0.9, **options)(z, mask=valid)
        return nn.LayerNorm(**options)(z)


class Reader(nn.Module):
    """An LSTM over time and a dense layer on its last hidden state; batch statistics are those of each step."""

    norms: Norms
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
        )(self.features, self.norms, self.train)
        start = jnp.zeros((n, self.features))
        push = jnp.zeros((steps, 1, 1)) if push is None else push
        (_, h), _ = layer((start, start), (x.swapaxes(0, 1), valid, push))
        return nn.Dense(self.classes)(h)

    def gradients(self, params: Any, stats: Any, rows: Sequences) -> Array:
        """Return log₁₀ ‖∂loss/∂hₜ‖ (T,) of a batch in training."""

        def loss(push: Array) -> Array:
            held = {"params": params, "batch_stats": stats}
            logits, _ = self.clone(train=True).apply(held, rows.x, rows.lengths, push, mutable=["batch_stats"])
            return cross_entropy(logits, rows.labels)

        return norms_through_time(loss, rows, self.features)


def norms_through_time(loss: Callable[[Array], Array], rows: Sequences, features: int) -> Array:
    """Return log₁₀ ‖∂loss/∂hₜ‖ (T,), of a loss as a function of what is added to the hidden states (T, N, features)."""
    grads = jax.grad(loss)(jnp.zeros((rows.x.shape[1], len(rows.x), features)))
    return jnp.log10(jnp.sqrt((grads**2).sum((1, 2))))


def cross_entropy(logits: Any, labels: Array) -> Array:
    """Return the mean loss of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@dataclass(frozen=True)
class Effort:
    """What is trained how long, the same for all arms.

    Attributes:
        seeds: networks of each rate, each with a split of its own.
        steps: of each training.
        features: hidden units.
        batch: sequences a step.
        look: the networks are evaluated after so many steps, and again.
        rates: of Adam's.
    """

    seeds: int
    steps: int
    features: int
    batch: int
    look: int
    rates: tuple[float, ...]


class Parts(NamedTuple):
    """The sequences of each seed, with a leading axis of seeds."""

    training: Sequences
    validation: Sequences
    test: Sequences
    batches: np.ndarray  # (seeds, steps, batch), rows of training


def split(data: Sequences, effort: Effort) -> Parts:
    """Return training, validation and test rows of each seed, 60, 15 and 25 %, and the rows of its batches."""
    n = len(data.labels)
    ends = [int(0.6 * n), int(0.75 * n)]
    orders, batches = [], []
    for seed in range(effort.seeds):
        rng = np.random.default_rng(seed)
        orders.append(rng.permutation(n))
        epochs = -(-effort.steps * effort.batch // (full := ends[0] // effort.batch * effort.batch))
        rows = [rng.permutation(ends[0])[:full] for _ in range(epochs)]
        batches.append(np.concatenate(rows)[: effort.steps * effort.batch].reshape(effort.steps, effort.batch))
    training, validation, test = (data[part] for part in np.split(np.stack(orders), ends, axis=1))
    return Parts(training, validation, test, np.stack(batches))


# The statistics to evaluate with, of those that training has left, with a leading axis of steps, and of the lengths of
# training.
Readout = Callable[[Any, Array], Any]


def reuse_last(stats: Any, lengths: Array) -> Any:
    """Return statistics in which the steps that too few rows reach are those of the last step that enough did."""
    steps = jnp.arange(jax.tree.leaves(stats)[0].shape[0]) if jax.tree.leaves(stats) else jnp.arange(0)
    last = jnp.sort(lengths)[int((1 - REST) * lengths.size)] - 1
    return jax.tree.map(lambda s: s[jnp.minimum(steps, last)], stats)


class Trained(NamedTuple):
    """What training has left."""

    validation: np.ndarray  # accuracies (looks, rates, seeds)
    test: np.ndarray  # likewise
    begin: Any  # parameters and statistics, with an axis of seeds
    end: Any  # likewise, with axes of rates and seeds


def train(
    reader: Reader, effort: Effort, parts: Parts, readout: Readout = reuse_last, advance: Callable[[], Any] = int
) -> Trained:
    """Train a network at all rates with all seeds at once, by Adam with clipped gradients.

    Args:
        reader: the network.
        effort: how long.
        parts: of ``split``.
        readout: by what statistics it is evaluated.
        advance: is called after each look.
    """
    learner = reader.clone(train=True)
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
            return cross_entropy(logits, some.labels), new.get("batch_stats", {})

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, moving = tx.update(grads, moving, params)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), stats, moving), None

    def advance_to_look(rate: Array, rows: Sequences, batches: Array, carry: Any) -> Any:
        return jax.lax.scan(partial(step, rate, rows), carry, batches)[0]

    def of_all(function: Any, *seeds_of: int) -> Any:
        """Map a function over seeds, and that over rates: of the arguments with a 1 here only over seeds."""
        seeds = jax.vmap(function, in_axes=[None if kind == 2 else 0 for kind in seeds_of])
        return jax.jit(jax.vmap(seeds, in_axes=[None if kind == 1 else 0 for kind in seeds_of]))

    rates, rows = jnp.asarray(effort.rates), parts.training
    begin = jax.jit(jax.vmap(start))(jnp.arange(effort.seeds), rows)
    carry = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rates), *a.shape)), begin)
    learn, judge = of_all(advance_to_look, 2, 1, 1, 0), of_all(partial(accuracy, reader, readout), 1, 1, 0)
    seen: list[list[np.ndarray]] = [[], []]
    for first in range(0, effort.steps, effort.look):
        carry = learn(rates, rows, parts.batches[:, first : first + effort.look], carry)
        for curve, part in zip(seen, (parts.validation, parts.test), strict=True):
            curve.append(np.asarray(judge(part, rows.lengths, carry[:2])))
        advance()
    return Trained(np.stack(seen[0]), np.stack(seen[1]), begin[:2], carry[:2])


def accuracy(reader: Reader, readout: Readout, rows: Sequences, known: Array, learnt: Any) -> Array:
    """Return the share of rows that are right, of parameters and statistics after training on the lengths ``known``."""
    params, stats = learnt
    logits: Any = reader.apply({"params": params, "batch_stats": readout(stats, known)}, rows.x, rows.lengths)
    return (logits.argmax(-1) == rows.labels).mean()


def steps_to(level: float, curve: np.ndarray, look: int) -> list[int | None]:
    """Return of each seed the number of steps after which it was first seen to reach an accuracy; None for never."""
    reached = curve >= level  # (looks, seeds)
    return [int(of_seed.argmax() + 1) * look if of_seed.any() else None for of_seed in reached.T]
