"""Norms with ReLU, each before a 1×1 convolution, forward in training: by jbn and XLA, and by the kernel."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jbn
from benchmarks.experiments.kernel import Affine, normalized_matmul
from jbn.core import statistics
from jbn.core.axes import Sync
from jbn.core.checks import read_layout

EPSILON = 1e-5


class Block(NamedTuple):
    """A norm and the product after it."""

    params: Any
    state: Any
    weights: Array


def blocks(channels: tuple[int, ...], key: Array) -> list[Block]:
    """Make the blocks that lead from each number of channels to the next."""

    def make(before: int, after: int, key: Array) -> Block:
        return Block(*jbn.bn_init(before), jax.random.normal(key, (before, after)) / before**0.5)

    keys = jax.random.split(key, len(channels) - 1)
    return [make(before, after, key) for before, after, key in zip(channels, channels[1:], keys, strict=False)]


def plain(chain: list[Block], x: Array) -> tuple[Array, list[Any]]:
    """Return the last product and the new states, by `jbn.bn_forward` and `lax.dot_general`.

    A product over the last axis of rows is how XLA's compilers do a 1×1 convolution best: on TPU the convolution itself
    takes two passes more, on GPU as many.
    """
    states = []
    for params, state, weights in chain:
        z, new = jbn.bn_forward(params, state, x, True, epsilon=EPSILON, activation=jax.nn.relu)
        x = lax.dot_general(z, weights.astype(z.dtype), (((1,), (0,)), ((), ())))
        states.append(new)
    return x, states


def fused(chain: list[Block], x: Array, *, on: str, interpret: bool = False) -> tuple[Array, list[Any]]:
    """Return the same by the kernel: only the first norm sums its input in a sweep of its own."""
    states, m = [], jbn.moments(x, pilot=chain[0].state.mean)
    pilots: Iterator[Any] = (block.state.mean for block in chain[1:])
    for params, state, weights in chain:
        norm = Affine(m.pilot, m.offset, lax.rsqrt(m.var + EPSILON) * params.scale, params.bias)
        # The last product has no norm after it: its sums go nowhere.
        pilot = statistics.choose_pilot(next(pilots, jnp.zeros(weights.shape[1])), jnp.dtype(jnp.float32))
        x, *sums = normalized_matmul(x, norm, weights.astype(x.dtype), pilot, on=on, interpret=interpret)
        states.append(jbn.update(state, m))
        m = moments_of(x, pilot, *sums)
    return x, states


def moments_of(y: Array, pilot: Array, first: Array, second: Array) -> jbn.Moments:
    """Return the moments of y from its sums, with the package's guard: a far pilot costs a second sweep here too."""
    layout, found = read_layout(y, -1), iter([(first, second)])

    def sums(around: Array) -> tuple[Array, Array]:
        return next(found, None) or statistics._sum_around(layout, y, None, around)

    return statistics._find_moments(pilot, sums, jnp.float32(y.shape[0]), Sync(), EPSILON, guarded=True)
