"""Deep dense networks, compiled as one layer in a loop, and what the scale of their kernels decides before training."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.studies.networks import BatchNorm, Norm, draw_kernel
from jbn.studies.steps import size_of
from jbn.studies.training import CLASSES, PIXELS, Plan, Rows, loss_of, parts_of


@dataclass(frozen=True)
class Deep:
    """A dense network whose hidden layers have one width: each is a kernel, a normalization and an activation.

    Attributes:
        layers: how many are hidden, two at least.
        width: of them.
        norm: what follows each kernel but the last one, which has a bias.
        gain: of the standard deviation of each kernel: at 1 it is that of He et al. 2015.
        pixels: features of the input.
    """

    layers: int
    width: int
    norm: Norm
    gain: float = 1.0
    pixels: int = PIXELS["digits"]

    def init(self, seed: int) -> tuple[Any, Any]:
        """Return parameters and states; NumPy draws, and compiles nothing; a gain changes nothing but the scale."""
        rng, width = np.random.default_rng(seed), self.width
        shapes = [(self.pixels, width), *[(width, width)] * (self.layers - 1), (width, CLASSES)]
        first, *others, last = (np.float32(self.gain) * draw_kernel(rng, *shape, 2.0) for shape in shapes)
        norms = [self.norm.init(width, rng) for _ in range(self.layers)]
        stacked, states = (jax.tree.map(lambda *arrays: np.stack(arrays), *each) for each in zip(*norms, strict=True))
        params = {"first": first, "kernels": np.stack(others), "norms": stacked, "last": last}
        return params | {"bias": np.zeros((1, CLASSES), np.float32)}, states

    def __call__(self, params: Any, states: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return logits (n, classes) of x (n, pixels), and new states."""

        def layer(x: Array, given: Any) -> tuple[Array, Any]:
            kernel, norm, state = given
            return self.norm(norm, state, x @ kernel, train, step)

        norms = (params["norms"], states)
        x, first = layer(x, (params["first"], *jax.tree.map(lambda leaf: leaf[0], norms)))
        x, others = jax.lax.scan(layer, x, (params["kernels"], *jax.tree.map(lambda leaf: leaf[1:], norms)))
        moved = jax.tree.map(lambda one, many: jnp.concatenate([one[None], many]), first, others)
        return x @ params["last"] + params["bias"], moved


def scale_hidden(params: Any, factor: Array | float) -> Any:
    """Return parameters whose kernels in front of a normalization are so many times as large."""
    return params | {name: factor * params[name] for name in ("first", "kernels")}


def rows_of(seed: int, count: int) -> Rows:
    """Return the first training rows of a seed of digits."""
    return jax.tree.map(lambda array: jnp.asarray(array[:count]), parts_of(seed, Plan((1.0,), 1, 1, 1)).training)


def measure_scale(
    *, seeds: int, gains: tuple[float, ...], epsilon: float, rows: int, steps: int, rate: float
) -> dict[str, Any]:
    """Return what the scale of kernels in front of batch norm changes, beside that of gain 1.

    Returns:
        Arrays (seeds, gains). "logits": how far they are off, as a share (root mean square). "product": the norm of the
        gradient of these kernels times that of the kernels, as a multiple of that at gain 1. "trained": what "logits"
        is after a few steps, those of these kernels at the learning rate times the square of the gain.
    """
    network = Deep(3, 32, BatchNorm(0.9, epsilon=epsilon))

    def run(begin: Any, batch: Rows, gain: Array) -> tuple[Array, Array, Array]:
        params, states = begin
        params = scale_hidden(params, gain)

        def loss(params: Any) -> Array:
            return loss_of(network, params, states, batch, jnp.int32(0))[0]

        def logits(params: Any) -> Array:
            return network(params, states, batch.x, True, jnp.int32(0))[0]

        def descend(params: Any, _: None) -> tuple[Any, None]:
            moves = scale_hidden(jax.grad(loss)(params), gain**2)
            return jax.tree.map(lambda param, move: param - rate * move, params, moves), None

        grads = jax.grad(loss)(params)
        sizes = [size_of((each["first"], each["kernels"])) for each in (params, grads)]
        trained = jax.lax.scan(descend, params, length=steps)[0]
        return logits(params), sizes[0] * sizes[1], logits(trained)

    given = [(network.init(seed), rows_of(seed, rows)) for seed in range(seeds)]
    begin, batch = jax.tree.map(lambda *arrays: jnp.stack(arrays), *given)
    every = jnp.asarray((1.0, *gains), jnp.float32)
    found = jax.jit(jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None)))(begin, batch, every)
    logits, product, trained = (np.asarray(each, np.float64) for each in found)

    def off(values: np.ndarray) -> np.ndarray:
        squares = ((values[:, 1:] - values[:, :1]) ** 2).mean((2, 3)) / (values[:, :1] ** 2).mean((2, 3))
        return np.sqrt(squares)  # type: ignore[no-any-return]

    return {"logits": off(logits), "product": product[:, 1:] / product[:, :1], "trained": off(trained)}


def measure_growth(*, norm: Norm, seeds: int, layers: int, width: int, rows: int) -> np.ndarray:
    """Return the norm of the gradient of each hidden kernel but the first before training, (seeds, layers - 1)."""
    network = Deep(layers, width, norm)

    def run(begin: Any, batch: Rows) -> Array:
        params, states = begin
        grads = jax.grad(lambda params: loss_of(network, params, states, batch, jnp.int32(0))[0])(params)
        return jnp.sqrt((grads["kernels"] ** 2).sum((1, 2)))

    # A seed at a time: all of them at once would need much memory and save no time.
    run = jax.jit(run)
    return np.stack([np.asarray(run(network.init(seed), rows_of(seed, rows))) for seed in range(seeds)])
