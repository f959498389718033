"""One compiled program that trains a network with many seeds and learning rates at once, on digits."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jbn.lab.data.images import TRAINING, Images, digits
from jbn.studies.networks import Dense

CLASSES, PIXELS = 10, 64
CHANCE = 1 / CLASSES


class Rows(NamedTuple):
    """Rows with their labels: x (n, 64) float32 in [0, 1], labels (n,) int32; before these axes one of seeds."""

    x: Any
    labels: Any


class Parts(NamedTuple):
    """The digits of a seed."""

    training: Rows
    validation: Rows
    test: Rows


class Accuracies(NamedTuple):
    """How a network did, each (seeds, rates); what has diverged has the accuracy of chance."""

    validation: Array
    test: Array
    diverged: Array  # bool: a parameter or a logit is not finite


# The state to evaluate with, of parameters, states and training rows: what training has left, or another one.
Readout: TypeAlias = Callable[[Any, Any, Array], Any]


def keep_state(params: Any, states: Any, x: Array) -> Any:
    """Evaluate with the running statistics as training has left them."""
    return states


def sweep(
    network: Dense,
    rates: Sequence[float],
    seeds: int,
    batch_size: int,
    examples: int,
    readouts: dict[str, Readout],
) -> dict[str, Accuracies]:
    """Train with each seed and each rate, by stochastic gradient descent whose rate falls linearly to 0.

    A seed decides how the digits are split, the order in which they come and the first parameters, whatever the network
    and the rate: so arms can be compared seed by seed.

    Args:
        network: what is trained.
        rates: the rates of the first step.
        seeds: how many seeds, from 0 on.
        batch_size: rows a step; it divides ``examples``.
        examples: rows that training sees, each epoch in an order of its own.
        readouts: by what states each trained network is evaluated.

    Returns:
        For each readout its accuracies.
    """
    steps = examples // batch_size
    given = [(_parts(seed), network.init(seed), _order(seed, examples)) for seed in range(seeds)]
    data, begin, order = jax.tree.map(lambda *arrays: np.stack(arrays), *given)

    def run(data: Parts, begin: Any, order: Array, rate: Array) -> dict[str, Accuracies]:
        params, states = _train(network, begin, data.training, order.reshape(steps, batch_size), rate)
        return {
            name: _evaluate(network, params, readout(params, states, data.training.x), data)
            for name, readout in readouts.items()
        }

    of_all = jax.vmap(jax.vmap(run, (None, None, None, 0)), (0, 0, 0, None))
    return jax.device_get(  # type: ignore[no-any-return]
        jax.jit(of_all)(data, begin, order, np.asarray(rates, np.float32))
    )


def _train(network: Dense, begin: Any, rows: Rows, order: Array, rate: Array) -> tuple[Any, Any]:
    """Return parameters and states after one step for each line of ``order`` (steps, batch)."""
    descent = optax.sgd(optax.linear_schedule(rate, 0.0, len(order)))

    def step(carry: Any, chosen: Array) -> tuple[Any, None]:
        params, states, memory, done = carry

        def loss(params: Any) -> tuple[Array, Any]:
            logits, moved = network(params, states, rows.x[chosen], True, done)
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels[chosen]).mean(), moved

        grads, states = jax.grad(loss, has_aux=True)(params)
        updates, memory = descent.update(grads, memory)
        return (optax.apply_updates(params, updates), states, memory, done + 1), None

    params, states = begin
    first: Any = (params, states, descent.init(params), jnp.int32(0))
    (params, states, *_), _ = jax.lax.scan(step, first, order)
    return params, states


def _evaluate(network: Dense, params: Any, states: Any, data: Parts) -> Accuracies:
    """Return the accuracies of one network."""
    never = jnp.int32(0)
    logits = [network(params, states, part.x, False, never)[0] for part in (data.validation, data.test)]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in (*jax.tree.leaves(params), *logits)]).all()
    validation, test = (
        jnp.where(finite, (each.argmax(-1) == part.labels).mean(), CHANCE)
        for each, part in zip(logits, (data.validation, data.test), strict=True)
    )
    return Accuracies(validation, test, ~finite)


@lru_cache(64)
def _parts(seed: int) -> Parts:
    def flat(part: Images) -> Rows:
        return Rows(part.images.reshape(-1, PIXELS), part.labels)

    return Parts(*map(flat, digits(seed)))


def _order(seed: int, examples: int) -> np.ndarray:
    """Return the rows that training sees, one after the other."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(TRAINING) for _ in range(-(-examples // TRAINING))]
    return np.concatenate(epochs)[:examples].astype(np.int32)
