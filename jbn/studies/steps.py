"""What a step of training does to the inputs of layers and to their gradients, and what lies along the gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from jbn.studies.networks import Dense, keep
from jbn.studies.training import Step, loss_of

Loss: TypeAlias = Callable[[Any], Array]


def size_of(tree: Any) -> Array:
    """Return the Euclidean norm of all numbers of a tree."""
    return jnp.sqrt(jnp.asarray(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree))))


def loss_at(network: Dense, step: Step) -> Loss:
    """Return the loss of the rows of a step, of any parameters; what is random is as it is at that step."""
    return lambda params: loss_of(network, params, step.states, step.batch, step.number)[0]


@dataclass(frozen=True)
class Tap:
    """A norm that tells what goes through it.

    Attributes:
        norm: the norm, with an activation that it can be given.
        given: what it is given, a layer after the other.
        made: what its activation is given.
    """

    norm: Any
    given: list[Array] = field(default_factory=list)
    made: list[Array] = field(default_factory=list)

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters and state of a layer."""
        return self.norm.init(features, rng)  # type: ignore[no-any-return]

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state."""
        self.given.append(x)
        y, state = replace(self.norm, activation=keep)(params, state, x, train, step)
        self.made.append(y)
        return self.norm.activation(y), state


def drift(network: Dense, step: Step, after: Any, x: Array) -> dict[str, Array]:
    """Return how far a step moves the distribution of a unit, in units of its spread.

    It is the Wasserstein distance of normal distributions with the means and variances of before and after, in standard
    deviations of before: the median of the units of a layer, and of the layers their mean. The rows are the same both
    times, so that nothing moves it but the step; what is random is that of the step and of the next one.

    Args:
        network: hidden layers of one width.
        step: about to be made.
        after: the parameters that it makes.
        x: rows (n, features).

    Returns:
        "given": of what norms are given; "made": of what activations are given.
    """

    def moments(params: Any, number: Array) -> dict[str, tuple[Array, Array]]:
        tap = Tap(network.norm)
        replace(network, norm=tap)(params, step.states, x, True, number)
        found = {"given": jnp.stack(tap.given), "made": jnp.stack(tap.made)}
        return {name: (each.mean(1), each.std(1)) for name, each in found.items()}

    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), step.params, after)
    moved = jax.vmap(moments)(both, step.number + jnp.arange(2))
    return {
        name: jnp.median(jnp.hypot(mean[1] - mean[0], spread[1] - spread[0]) / spread[0], -1).mean()
        for name, (mean, spread) in moved.items()
    }


def shift_of_gradients(loss: Loss, before: Any, after: Any) -> dict[str, Array]:
    """Return how far the step of earlier layers moves the gradient of a layer: Santurkar et al. 2018, definition 2.1.

    Args:
        loss: of parameters of a ``Dense``.
        before: the parameters.
        after: those that the step makes.

    Returns:
        Means over all layers but the first, which has no earlier one, of what concerns their kernels: "shift", the
        distance of the two gradients; "share", the distance in units of the first one; "cosine", of their angle.
    """
    count = len(before["kernels"])

    def mix(layer: Array) -> Any:
        """Return the parameters of after in the layers in front of this one."""
        kernels, norms = (
            [
                jax.tree.map(lambda new, old, index=index: jnp.where(index < layer, new, old), *pair)
                for index, pair in enumerate(zip(after[name], before[name], strict=True))
            ]
            for name in ("kernels", "norms")
        )
        return before | {"kernels": kernels, "norms": norms}

    grads = jax.vmap(lambda layer: jax.grad(loss)(mix(layer))["kernels"])(jnp.arange(count))
    # With no layer in front of it, the first of these gradients is that of the step.
    pairs = [(grads[layer][0].ravel(), grads[layer][layer].ravel()) for layer in range(1, count)]
    found = [
        {
            "shift": jnp.linalg.norm(two - one),
            "share": jnp.linalg.norm(two - one) / jnp.linalg.norm(one),
            "cosine": one @ two / (jnp.linalg.norm(one) * jnp.linalg.norm(two)),
        }
        for one, two in pairs
    ]
    return jax.tree.map(lambda *values: jnp.stack(values).mean(), *found)


def landscape(loss: Loss, params: Any, grads: Any, lengths: Array, multiples: Sequence[float]) -> dict[str, Array]:
    """Return what lies along the gradient: Santurkar et al. 2018, section 3.1 and figure 4.

    Args:
        loss: of parameters.
        params: from where one goes.
        grads: the gradient there.
        lengths: (m,): of the way, in units of the gradient, as a learning rate is.
        multiples: of each length, where one looks.

    Returns:
        Arrays (m,). "range": of the loss, from the largest to the smallest; "change": the largest of the gradient, as a
        distance; "share": the same in units of the gradient; "smoothness": the largest change by the way to it.
    """
    (start, unflatten), (grad, _) = ravel_pytree(params), ravel_pytree(grads)
    ways = jnp.outer(lengths, jnp.asarray(multiples))

    def look(way: Array) -> tuple[Array, Array]:
        """Return the loss at the end of a way, and how far the gradient has moved."""
        value, there = jax.value_and_grad(lambda flat: loss(unflatten(flat)))(start - way * grad)
        return value, jnp.linalg.norm(there - grad)

    values, moved = jax.vmap(look)(jnp.concatenate([jnp.zeros(1), ways.ravel()]))
    size, changes, ends = jnp.linalg.norm(grad), moved[1:].reshape(ways.shape), values[1:].reshape(ways.shape)
    return {
        "range": jnp.maximum(ends.max(1), values[0]) - jnp.minimum(ends.min(1), values[0]),
        "change": changes.max(1),
        "share": changes.max(1) / size,
        "smoothness": (changes / (ways * size)).max(1),
    }
