"""Recurrent networks with norms at each step, for sequences of any lengths, and what trains many of them at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from jbn import batch_norm
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
        recurrent: whether what comes from the hidden state, and the cell, are normalized too, and not the input alone.
    """

    kind: Literal["none", "batch", "layer"]
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
        options: dict[str, Any] = {"name": f"norm_{name}", "use_bias": name == "cell"}  # the gates have one for both
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


def begin(reader: Reader, seed: Array, scale: Array, rows: Sequences) -> tuple[Any, Any]:
    """Return the first parameters and statistics of a network, all of whose γ begin at ``scale``."""
    variables = reader.init(jax.random.key(seed), rows.x[:2], rows.lengths[:2])
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * scale if path[-1].key == "scale" else leaf, variables["params"]
    )
    return params, variables.get("batch_stats", {})


def loss(reader: Reader, params: Any, push: Array, stats: Any, rows: Sequences) -> tuple[Array, Any]:
    """Return the loss of a batch, and new statistics."""
    held = {"params": params, "batch_stats": stats}
    logits, new = reader.apply(held, rows.x, rows.lengths, push, mutable=["batch_stats"])
    return cross_entropy(logits, rows.labels), new.get("batch_stats", {})


@dataclass(frozen=True)
class Tanh:
    """A recurrent network of tanh units that begin with noise, as it is before training; sequences are of one length.

    Attributes:
        kind: of the norms.
        apart: whether what comes from the hidden state and the input have a norm each, as in ``Cell``, or one of both.
        identity: whether the recurrent kernel is the identity, as in Cooijmans et al. 2017, or any orthogonal matrix.
        saturates: whether the derivative of tanh is its own, or is taken for 1.
        features: hidden units.
        noise: the standard deviation of the first hidden states.
    """

    kind: Literal["none", "batch", "layer"]
    apart: bool = False
    identity: bool = True
    saturates: bool = True
    features: int = 100
    noise: float = 0.1

    def gradients(self, seed: Array, scale: Array, rows: Sequences, classes: int) -> Array:
        """Return log₁₀ ‖∂loss/∂hₜ‖ (T,) of a batch, where γ is ``scale``."""
        keys, orthogonal = jax.random.split(jax.random.key(seed), 4), nn.initializers.orthogonal()
        shape = (self.features, self.features)
        recurrent = jnp.eye(self.features) if self.identity else orthogonal(keys[0], shape)
        of_input = orthogonal(keys[1], (rows.x.shape[-1], self.features))
        last = orthogonal(keys[2], (self.features, classes))
        first = self.noise * jax.random.normal(keys[3], (len(rows.x), self.features))

        def of_push(push: Array) -> Array:
            def step(h: Array, inputs: Any) -> tuple[Array, None]:
                x, push = inputs
                parts = [h @ recurrent, x @ of_input]
                z = sum(self._normalize(part, scale) for part in (parts if self.apart else [parts[0] + parts[1]]))
                y = jnp.tanh(z)
                return (y if self.saturates else z + jax.lax.stop_gradient(y - z)) + push, None

            h, _ = jax.lax.scan(step, first, (rows.x.swapaxes(0, 1), push))
            return cross_entropy(h @ last, rows.labels)

        return norms_of(jax.grad(of_push)(no_push(rows, self.features)))

    def _normalize(self, z: Array, scale: Array) -> Array:
        if self.kind == "none":
            return z
        if self.kind == "layer":
            return scale * (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-6)
        return batch_norm(z, jnp.full(self.features, scale))[0]


def no_push(rows: Sequences, features: int) -> Array:
    """Return the nothing (T, N, features) that is added to hidden states."""
    return jnp.zeros((rows.x.shape[1], len(rows.x), features))


def norms_of(grads: Array) -> Array:
    """Return log₁₀ ‖∂loss/∂hₜ‖ (T,) of ∂loss/∂h (T, N, features)."""
    return jnp.log10(jnp.maximum(jnp.sqrt((grads**2).sum((1, 2))), jnp.finfo(jnp.float32).tiny))


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


def reuse_last(stats: Any, lengths: Array) -> Any:
    """Return statistics in which the steps that too few rows reach are those of the last step that enough did."""
    steps = jnp.arange(jax.tree.leaves(stats)[0].shape[0]) if jax.tree.leaves(stats) else jnp.arange(0)
    last = jnp.sort(lengths)[int((1 - REST) * lengths.size)] - 1
    return jax.tree.map(lambda s: s[jnp.minimum(steps, last)], stats)


def pool(stats: Any) -> Any:
    """Return at every step the statistics of all steps together, of sequences of one length; steps are axis -2."""
    if not isinstance(stats, dict) or "mean" not in stats:
        return {name: pool(inner) for name, inner in stats.items()}
    means, variances = np.asarray(stats["mean"]), np.asarray(stats["var"])
    mean = means.mean(-2, keepdims=True)
    var = (variances + (means - mean) ** 2).mean(-2, keepdims=True)
    return {"mean": np.broadcast_to(mean, means.shape), "var": np.broadcast_to(var, means.shape)}


class Trained(NamedTuple):
    """What came of training."""

    validation: np.ndarray  # accuracies (looks, rates, seeds)
    test: np.ndarray  # likewise
    pooled: np.ndarray  # on test rows at the end by pooled statistics, (rates, seeds)
    gradients: np.ndarray  # log₁₀ ‖∂loss/∂hₜ‖ at the first and at the last step of training, (2, rates, seeds, T)


def train(
    reader: Reader, effort: Effort, parts: Parts, scale: float = 1.0, advance: Callable[[], Any] = int
) -> Trained:
    """Train a network at all rates with all seeds at once, by Adam with clipped gradients.

    Args:
        reader: the network.
        effort: how long.
        parts: of ``split``.
        scale: what every γ begins with.
        advance: is called after each look.
    """
    start, learn, judge = _programs(reader)
    rates, rows = np.asarray(effort.rates, np.float32), parts.training
    seen: Sequences = jax.tree.map(lambda *both: np.concatenate(both, 1), parts.validation, parts.test)

    def accuracies(params: Any, stats: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return those on validation and on test rows, (rates, seeds)."""
        right = np.asarray(judge(params, stats, rows.lengths, seen))
        at = parts.validation.labels.shape[1]
        return right[..., :at].mean(-1), right[..., at:].mean(-1)

    first = start(np.arange(effort.seeds), np.float32(scale), rows)
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), first)
    curves, norms = [], []
    for done in range(0, effort.steps, effort.look):
        carry, of_steps = learn(rates, rows, parts.batches[:, done : done + effort.look], carry)
        norms.append(of_steps)
        curves.append(accuracies(*carry[:2]))
        advance()
    validation, test = (np.stack(curve) for curve in zip(*curves, strict=True))
    gradients = np.stack([np.asarray(norms[end])[:, :, end] for end in (0, -1)])
    return Trained(validation, test, accuracies(carry[0], pool(carry[1]))[1], gradients)


@lru_cache(8)
def _programs(reader: Reader) -> tuple[Any, Any, Any]:
    """Return what starts, trains and evaluates networks of all seeds and rates: one program whatever γ begins with."""
    learner = reader.clone(train=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def start(seed: Array, scale: Array, rows: Sequences) -> Any:
        params, stats = begin(learner, seed, scale, rows)
        return params, stats, tx.init(params)

    def learn(rate: Array, rows: Sequences, batches: Array, carry: Any) -> Any:
        def step(carry: Any, batch: Array) -> Any:
            params, stats, moving = carry
            some = rows[batch]
            differentiate = jax.grad(partial(loss, learner), (0, 1), has_aux=True)
            (grads, of_hidden), stats = differentiate(params, no_push(some, reader.features), stats, some)
            updates, moving = tx.update(grads, moving, params)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, stats, moving), norms_of(of_hidden)

        return jax.lax.scan(step, carry, batches)

    def judge(params: Any, stats: Any, known: Array, rows: Sequences) -> Array:
        held = {"params": params, "batch_stats": reuse_last(stats, known)}
        logits: Any = reader.apply(held, rows.x, rows.lengths)
        return logits.argmax(-1) == rows.labels

    return (
        jax.jit(jax.vmap(start, (0, None, 0))),
        jax.jit(jax.vmap(jax.vmap(learn, (None, 0, 0, 0)), (0, None, None, 0))),
        jax.jit(jax.vmap(jax.vmap(judge), (0, 0, None, None))),
    )


def steps_to(level: float, curve: np.ndarray, look: int) -> list[int | None]:
    """Return of each seed the number of steps after which it was first seen to reach an accuracy; None for never."""
    reached = curve >= level  # (looks, seeds)
    return [int(of_seed.argmax() + 1) * look if of_seed.any() else None for of_seed in reached.T]
