"""Keras' layer with ``renorm=True`` and jbn agree through an adapter of a few lines, in training.

Keras keeps statistics of its own for r and d, the deviation and not the variance, with ε inside; and its clips are
three, without a schedule.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support import oracle

# What a library calls although it is deprecated is not for this library to mend.
pytestmark = [
    pytest.mark.usefixtures("foreign"),
    *(pytest.mark.filterwarnings(f"default::{kind}Warning") for kind in ("Deprecation", "Future", "User")),
]
EPSILON, MOMENTUM, SHAPE = 1e-3, 0.9, (16, 5, 6)


def as_the_state(layer, clips):
    """Give Keras' statistics to ``renorm`` as the running ones; its r is clipped symmetrically."""
    state = jbn.State(layer.renorm_mean.value, layer.renorm_stddev.value**2 - EPSILON)
    return state, jbn.renorm(clips["rmax"], clips["dmax"])


def as_a_function(layer, clips):
    """Let a function of one's own hold Keras' statistics, and what it has for clips."""
    mean, stddev = layer.renorm_mean.value, layer.renorm_stddev.value

    def correct(batch, _, epsilon):
        batch = jax.lax.stop_gradient(batch)
        sigma = jnp.maximum(stddev, epsilon**0.5)
        r = jnp.clip(jnp.sqrt(batch.var + epsilon) / sigma, clips.get("rmin"), clips.get("rmax"))
        d = (batch.mean - mean) / sigma
        return jbn.Correction(r, jnp.clip(d, -clips["dmax"], clips["dmax"]) if "dmax" in clips else d)

    return jbn.State(layer.moving_mean.value, layer.moving_variance.value), correct


@pytest.mark.parametrize(
    ("adapt", "clips", "smallest"),
    [
        (as_the_state, {"rmin": 1 / 1.3, "rmax": 1.3, "dmax": 0.4}, 0.3),
        (as_a_function, {"rmin": 0.9, "rmax": 1.5, "dmax": 0.4}, 0.0),  # a deviation of 0 is taken for √ε
        (as_a_function, {}, 0.3),
    ],
    ids=["the state", "a function", "no clips"],
)
def test_keras_agrees(keras, adapt, clips, smallest):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    layer = keras.layers.BatchNormalization(
        epsilon=EPSILON, momentum=MOMENTUM, renorm=True, renorm_clipping=clips, renorm_momentum=MOMENTUM
    )
    layer.build(SHAPE)
    scale, bias, mean = rng.standard_normal((3, SHAPE[-1])).astype(np.float32)
    stddev = np.linspace(smallest, 2, SHAPE[-1]).astype(np.float32)  # r and d of some features are clipped
    for name, value in {"gamma": scale, "beta": bias, "renorm_mean": mean, "renorm_stddev": stddev}.items():
        getattr(layer, name).assign(value)
    state, normalize_by = adapt(layer, clips)

    trainable, others = layer.trainable_variables, layer.non_trainable_variables
    theirs = lambda x: layer.stateless_call([v.value for v in trainable], [v.value for v in others], x, training=True)  # noqa: E731
    options = {"epsilon": EPSILON, "momentum": MOMENTUM, "normalize_by": normalize_by}
    ours = lambda x: jbn.bn_forward(jbn.Params(scale, bias), state, x, True, **options)  # noqa: E731

    def outcome(call):
        y, pull, new = jax.vjp(call, x, has_aux=True)
        return y, pull(g)[0], new

    want, want_dx, moved = jax.jit(outcome, static_argnums=0)(theirs)
    got, got_dx, new = jax.jit(outcome, static_argnums=0)(ours)
    # The mean moves as Keras' does; the variance does not, as an average of deviations is none.
    which = [v.name for v in others].index("renorm_mean" if adapt is as_the_state else "moving_mean")
    for a, b in ((got, want), (got_dx, want_dx), (new.mean, moved[which])):
        size = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=oracle.tolerance("float32", 80, size))
