"""One compiled program that trains a network with many seeds and learning rates at once, on digits or on MNIST.

``sweep`` trains by a ``Plan``; it takes a ``Look`` at the network meanwhile, ``accuracies``, which returns
``Accuracies``, or ``unseen``, and a ``Probe`` at a ``Step``. A ``Readout`` such as ``keep_state`` says by which state
to evaluate. ``parts_of`` are the ``Parts`` of the data, each of ``Rows``; ``loss_of`` is what is descended, and
``note_diverged`` names what was not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jbn.lab.data.images import DATA, TRAINING, Images
from jbn.studies.networks import Network

__all__ = [
    "Accuracies",
    "Look",
    "Parts",
    "Plan",
    "Probe",
    "Readout",
    "Rows",
    "Step",
    "accuracies",
    "keep_state",
    "loss_of",
    "note_diverged",
    "parts_of",
    "sweep",
    "unseen",
]

CLASSES = 10
PIXELS = {"digits": 64, "mnist": 784}
CHANCE = 1 / CLASSES


class Rows(NamedTuple):
    """Rows with their labels; before the axes of both there may be one of seeds.

    Attributes:
        x: (n, pixels), float32, from 0 to 1.
        labels: (n,), int32, from 0 on.
    """

    x: Any
    labels: Any


class Parts(NamedTuple):
    """The data of a seed, without a row in common.

    Attributes:
        training: the rows, and the labels, that training sees.
        validation: the rows by which rates are chosen.
        test: the rows that are reported.
    """

    training: Rows
    validation: Rows
    test: Rows


@dataclass(frozen=True)
class Plan:
    """How networks are trained, whatever they are.

    Attributes:
        rates: of the first step, ascending.
        seeds: how many, from ``first_seed`` on.
        batch_size: rows a step; it divides ``examples``.
        examples: rows that training sees, each epoch in an order of its own.
        data: "digits" or "mnist".
        rows: how many rows there are to train with; all for None.
        label_noise: the share of these rows whose label is drawn anew, from all classes.
        looks: how often a network is looked at, at equal distances and at the end; it divides the number of steps.
        decay: whether the rate falls linearly to 0; otherwise it stays.
        first_seed: the first of the seeds.
    """

    rates: tuple[float, ...]
    seeds: int
    batch_size: int
    examples: int
    data: str = "digits"
    rows: int | None = None
    label_noise: float = 0.0
    looks: int = 1
    decay: bool = True
    first_seed: int = 0

    @property
    def steps(self) -> int:
        """How many there are."""
        return self.examples // self.batch_size

    @property
    def seed_range(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def look_steps(self) -> list[int]:
        """After which steps there is a look."""
        return [self.steps * look // self.looks for look in range(1, self.looks + 1)]


class Accuracies(NamedTuple):
    """How a network did, each (seeds, rates, looks); what has diverged has the accuracy of chance.

    Attributes:
        training: the share of rows, 0 to 1, on as many rows of training as there are for validation, or on all.
        validation: the share of the rows for validation, 0 to 1.
        test: the share of the rows for test, 0 to 1.
        diverged: bool: whether a parameter or a logit is not finite.
    """

    training: Array
    validation: Array
    test: Array
    diverged: Array


class Step(NamedTuple):
    """A step of training that is about to be made.

    Attributes:
        params: the parameters before it.
        states: the states before it.
        batch: its rows.
        rate: its learning rate, a scalar > 0.
        number: of the steps that are done, an int32 scalar.
    """

    params: Any
    states: Any
    batch: Rows
    rate: Array
    number: Array


# What is seen of a network at a look: of parameters, states and the data of a seed, arrays.
Look: TypeAlias = Callable[[Any, Any, Parts], Any]
# What is seen of a step, and of the data of a seed.
Probe: TypeAlias = Callable[[Step, Parts], Any]
# The state to evaluate with, of parameters, states and training rows: what training has left, or another one.
Readout: TypeAlias = Callable[[Any, Any, Array], Any]


def keep_state(params: Any, states: Any, x: Array) -> Any:
    """Evaluate with the running statistics as training has left them."""
    return states


def sweep(
    network: Network,
    plan: Plan,
    looks: dict[str, Look],
    probes: dict[str, Probe] | None = None,
    starts: Sequence[Network] | None = None,
) -> dict[str, Any]:
    """Train with each seed and each rate, by stochastic gradient descent.

    A seed decides how the data are split, the order in which they come and the first parameters, whatever the network
    and the rate: so arms can be compared seed by seed.

    Args:
        network: what is trained.
        plan: how.
        looks: what is seen of it.
        probes: what is seen of the first step, and of the step after each look but the last.
        starts: networks that differ from this one in their first parameters alone; each of them is trained, and all
            arrays have an axis of them after that of the seeds.

    Returns:
        For each look and probe its arrays, with axes (seeds, rates, looks) before their own, and under "loss" the mean
        loss of the steps since the look before.
    """
    given = [(parts_of(seed, plan), _init(network, starts, seed), _order(seed, plan)) for seed in plan.seed_range]
    data, begin, order = _stack(given)

    def run(data: Parts, begin: Any, order: Array, rate: Array) -> dict[str, Any]:
        rate_of = optax.linear_schedule(rate, 0.0, plan.steps) if plan.decay else optax.constant_schedule(rate)
        descent = optax.sgd(rate_of)
        step = partial(_step, network, descent, data.training)

        def stretch(carry: Any, order: Array) -> tuple[Any, dict[str, Any]]:
            params, states, _, done = carry
            chosen = Rows(data.training.x[order[0]], data.training.labels[order[0]])
            first = Step(params, states, chosen, jnp.asarray(rate_of(done)), done)
            found = {name: probe(first, data) for name, probe in (probes or {}).items()}
            carry, losses = jax.lax.scan(step, carry, order)
            params, states, *_ = carry
            found |= {name: look(params, states, data) for name, look in looks.items()}
            return carry, found | {"loss": losses.mean()}

        params, states = begin
        first: Any = (params, states, descent.init(params), jnp.int32(0))
        return jax.lax.scan(stretch, first, order.reshape(plan.looks, -1, plan.batch_size))[1]

    of_rates = jax.vmap(run, (None, None, None, 0))
    of_starts = of_rates if starts is None else jax.vmap(of_rates, (None, 0, None, None))
    of_all = jax.vmap(of_starts, (0, 0, 0, None))
    return jax.device_get(  # type: ignore[no-any-return]
        jax.jit(of_all)(data, begin, order, np.asarray(plan.rates, np.float32))
    )


def loss_of(network: Network, params: Any, states: Any, rows: Rows, step: Array) -> tuple[Array, Any]:
    """Return the mean cross-entropy of rows in training, and the new states."""
    logits, moved = network(params, states, rows.x, True, step)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels).mean(), moved


def accuracies(network: Network, readout: Readout = keep_state) -> Look:
    """Return a look at the accuracies of a network, evaluated by the states that ``readout`` gives."""

    def look(params: Any, states: Any, data: Parts) -> Accuracies:
        states, never = readout(params, states, data.training.x), jnp.int32(0)
        seen = jax.tree.map(lambda array: array[: len(data.validation.labels)], data.training)
        parts = (seen, data.validation, data.test)
        logits = [network(params, states, part.x, False, never)[0] for part in parts]
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in (*jax.tree.leaves(params), *logits)]).all()
        found = (
            jnp.where(finite, (each.argmax(-1) == part.labels).mean(), CHANCE)
            for each, part in zip(logits, parts, strict=True)
        )
        training, validation, test = found
        return Accuracies(training, validation, test, ~finite)

    return look


def unseen(network: Network) -> Look:
    """Return a look at the accuracies on validation and on test rows (2,), in one pass: faster than ``accuracies``."""

    def look(params: Any, states: Any, data: Parts) -> Array:
        x, labels = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *data[1:])
        logits, _ = network(params, states, x, False, jnp.int32(0))
        right = (logits.argmax(-1) == labels).reshape(2, -1).mean(-1)
        return jnp.where(jnp.isfinite(logits).all(), right, CHANCE)

    return look


@lru_cache(128)
def parts_of(seed: int, plan: Plan) -> Parts:
    """Return the data of a seed, rows flat, with the labels that training is given."""

    def flat(part: Images) -> Rows:
        return Rows(part.images.reshape(-1, PIXELS[plan.data]), part.labels)

    training, validation, test = map(flat, DATA[plan.data](seed))
    x, labels = training.x[: plan.rows], training.labels[: plan.rows].copy()
    rng = np.random.default_rng((seed, 1))
    noisy = rng.permutation(len(labels))[: round(plan.label_noise * len(labels))]
    labels[noisy] = rng.integers(0, CLASSES, len(noisy))
    return Parts(Rows(x, labels), validation, test)


def note_diverged(found: Iterable[tuple[str, int]]) -> list[str]:
    """Return a sentence about the arms, by name and number, of which seeds diverged; none where none did."""
    named = [f"{count} of {name}" for name, count in found if count]
    return [f"Seeds that diverged, and count as chance ({CHANCE:.0%}): {', '.join(named)}."] * bool(named)


def _init(network: Network, starts: Sequence[Network] | None, seed: int) -> Any:
    return network.init(seed) if starts is None else _stack([each.init(seed) for each in starts])


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)


def _step(network: Network, descent: Any, rows: Rows, carry: Any, chosen: Array) -> tuple[Any, Array]:
    """Make a step with the rows that are chosen, and return its loss."""
    params, states, memory, done = carry
    batch = Rows(rows.x[chosen], rows.labels[chosen])
    (loss, states), grads = jax.value_and_grad(
        lambda params: loss_of(network, params, states, batch, done), has_aux=True
    )(params)
    updates, memory = descent.update(grads, memory)
    return (optax.apply_updates(params, updates), states, memory, done + 1), loss


def _order(seed: int, plan: Plan) -> np.ndarray:
    """Return the rows that training sees, one after the other."""
    rng, rows = np.random.default_rng(seed), plan.rows or TRAINING[plan.data]
    epochs = [rng.permutation(rows) for _ in range(-(-plan.examples // rows))]
    return np.concatenate(epochs)[: plan.examples].astype(np.int32)


def __dir__() -> list[str]:
    return __all__
