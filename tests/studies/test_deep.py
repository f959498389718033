"""Deep networks of one compiled layer: the same as those of a loop in Python, at any scale of their kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.studies.deep import Deep, measure_growth, measure_scale, rows_of
from jbn.studies.networks import BatchNorm, Bias, Dense
from jbn.studies.training import Plan, loss_of, sweep

NORMS = {"bias": Bias(), "batch norm": BatchNorm(0.9)}


def unroll(params, states):
    """Return parameters and states of ``Deep`` as ``Dense`` has them."""
    kernels = [params["first"], *params["kernels"], params["last"]]
    norms, states = (
        [jax.tree.map(lambda leaf, layer=layer: leaf[layer], tree) for layer in range(len(kernels) - 1)]
        for tree in (params["norms"], states)
    )
    return {"kernels": kernels, "norms": norms, "bias": params["bias"]}, states


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_loop_over_layers_computes_what_layers_do(norm):
    deep, dense = Deep(4, 6, norm, 0.7), Dense((64, *[6] * 4, 10), norm)
    params, states = jax.tree.map(jnp.asarray, deep.init(3))
    x = rows_of(0, 20).x
    y, moved = deep(params, states, x, True, jnp.int32(0))
    expected, others = dense(*unroll(params, states), x, True, jnp.int32(0))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(unroll(params, moved)[1]), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_gain_scales_every_kernel_and_nothing_else():
    (one, _), (other, _) = (Deep(3, 5, Bias(), gain).init(2) for gain in (1.0, 0.25))
    for name in ("first", "kernels", "last"):
        np.testing.assert_allclose(other[name], one[name] / 4, rtol=1e-6)
    np.testing.assert_allclose(one["kernels"].std(), (2 / 5) ** 0.5, rtol=0.2)
    np.testing.assert_array_equal(other["bias"], one["bias"])


def test_starts_are_trained_side_by_side():
    starts, plan = [Deep(2, 4, Bias(), gain) for gain in (0.5, 1.0)], Plan((0.1, 0.5), 2, 8, 32)

    def look(params, states, data):
        return params["first"]

    found = sweep(starts[0], plan, {"first": look}, starts=starts)["first"]
    assert found.shape == (2, 2, 2, 1, 64, 4)
    for index, start in enumerate(starts):
        alone = sweep(start, plan, {"first": look})["first"]
        np.testing.assert_allclose(found[:, index], alone, rtol=1e-4, atol=1e-5)


def test_scale_is_seen_through_epsilon_alone():
    given = {"seeds": 2, "gains": (0.01, 1.0, 10.0), "rows": 32, "steps": 2, "rate": 0.1}
    exact, large = (measure_scale(epsilon=epsilon, **given) for epsilon in (1e-20, 1e-2))
    for found in (exact, large):
        np.testing.assert_allclose(found["product"][:, 1], 1, rtol=1e-5)
        assert found["logits"].shape == found["trained"].shape == (2, 3)
    # The norm of the gradient of a layer with respect to its kernel is told by float32 sums of a few hundred products.
    np.testing.assert_allclose(exact["product"], 1, rtol=1e-4)
    assert exact["logits"].max() < 1e-4
    assert exact["trained"].max() < 1e-3
    assert large["logits"][:, 0].min() > 0.1
    assert np.abs(large["product"][:, 0] - 1).min() > 0.1


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_growth_is_told_by_the_gradients_of_the_kernels(norm):
    found = measure_growth(norm=norm, seeds=2, layers=4, width=6, rows=20)
    network, batch = Dense((64, *[6] * 4, 10), norm), rows_of(1, 20)
    params, states = unroll(*jax.tree.map(jnp.asarray, Deep(4, 6, norm).init(1)))
    grads = jax.grad(lambda params: loss_of(network, params, states, batch, jnp.int32(0))[0])(params)["kernels"]
    expected = [np.linalg.norm(np.float64(grad)) for grad in grads[1:-1]]
    np.testing.assert_allclose(found[1], expected, rtol=1e-3)
