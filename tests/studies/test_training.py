"""What trains the networks of studies: nothing here asserts how accurate a network becomes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbn.lab.data.images import DATA, PART, TRAINING
from jbn.studies.networks import BatchNorm, Bias, Dense, Residual, convolve
from jbn.studies.training import CHANCE, PIXELS, Plan, accuracies, loss_of, parts_of, sweep
from jbn.studies.training import _order as order_of


def test_what_diverges_counts_as_chance():
    network, plan = Dense((64, 16, 10), Bias()), Plan((0.01, 1e30), 2, 32, 96)
    found = sweep(network, plan, {"none": accuracies(network)})["none"]
    assert found.diverged.tolist() == [[[False], [True]]] * 2
    for part in found[:3]:
        np.testing.assert_allclose(part[:, 1], CHANCE)


@pytest.mark.parametrize("rows", [None, 200])
@pytest.mark.parametrize("data", DATA)
def test_an_epoch_shows_each_row_once(data, rows):
    size = rows or TRAINING[data]
    order = order_of(3, Plan((0.1,), 1, 1, 2 * size + 5, data, rows))
    assert len(order) == 2 * size + 5
    first, second = order[:size], order[size : 2 * size]
    assert sorted(first) == sorted(second) == list(range(size))
    assert (first != second).any()


@pytest.mark.parametrize("data", DATA)
def test_no_row_is_in_two_parts_and_classes_have_equal_shares(data):
    split = DATA[data](3)
    sizes = (TRAINING[data], PART[data], PART[data])
    assert tuple(len(part.labels) for part in split) == sizes
    whole = np.concatenate([part.images.reshape(len(part.labels), -1) for part in split])
    other = np.concatenate([part.images.reshape(len(part.labels), -1) for part in DATA[data](4)])
    assert whole.shape == (sum(sizes), PIXELS[data])
    np.testing.assert_array_equal(np.sort(whole @ np.arange(PIXELS[data])), np.sort(other @ np.arange(PIXELS[data])))
    assert (whole.min(), whole.max()) == (0, 1)
    shares = [np.bincount(part.labels, minlength=10) / len(part.labels) for part in split]
    np.testing.assert_allclose(shares, np.broadcast_to(shares[0], (3, 10)), atol=0.01)


def test_a_share_of_labels_is_noise_in_training_alone():
    clean, noisy = (parts_of(2, Plan((0.1,), 1, 1, 1, rows=500, label_noise=share)) for share in (0.0, 0.4))
    np.testing.assert_array_equal(clean.training.x, noisy.training.x)
    assert len(noisy.training.labels) == 500
    # A tenth of those that are drawn anew is right.
    assert (clean.training.labels != noisy.training.labels).sum() == pytest.approx(180, abs=20)
    for one, other in zip(clean[1:], noisy[1:], strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize("decay", [True, False])
def test_training_is_gradient_descent_and_looks_see_it_on_the_way(decay):
    plan = Plan((0.5, 0.1), 2, 2, 8, rows=20, looks=2, decay=decay)
    assert (plan.steps, plan.look_steps) == (4, [2, 4])
    network = Dense((64, 5, 10), Bias())
    probes = {"step": lambda step, data: (step.params, step.batch.labels, step.rate, step.number)}
    found = sweep(network, plan, {"params": lambda params, states, data: params}, probes)
    data, order, (params, states) = parts_of(1, plan), order_of(1, plan).reshape(4, 2), network.init(1)
    losses = []
    for step, chosen in enumerate(order):
        rows = jax.tree.map(lambda array, chosen=chosen: jnp.asarray(array)[chosen], data.training)
        (loss, _), grads = jax.value_and_grad(
            lambda params, rows=rows: loss_of(network, params, states, rows, 0), has_aux=True
        )(params)
        rate = 0.1 * (1 - step / 4 if decay else 1)
        if step % 2 == 0:
            expected = (params, rows.labels, np.float32(rate), step)
            seen = jax.tree.map(lambda array, look=step // 2: array[1, 1, look], found["step"])
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), seen, expected)
        params = jax.tree.map(lambda value, grad, rate=rate: value - rate * grad, params, grads)
        losses.append(float(loss))
        if step + 1 in plan.look_steps:
            look = plan.look_steps.index(step + 1)
            for value, other in zip(jax.tree.leaves(params), jax.tree.leaves(found["params"]), strict=True):
                np.testing.assert_allclose(other[1, 1, look], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["loss"][1, 1], np.mean(np.reshape(losses, (2, 2)), 1), rtol=1e-5)


def test_seeds_may_begin_elsewhere():
    network = Dense((64, 5, 10), Bias())
    both, second = (
        sweep(network, Plan((0.1,), seeds, 2, 4, first_seed=first), {}) for seeds, first in ((2, 3), (1, 4))
    )
    np.testing.assert_allclose(both["loss"][1:], second["loss"], rtol=1e-5)
    assert both["loss"][0] != both["loss"][1]


def test_the_loss_is_the_cross_entropy():
    network = Dense((64, 5, 10), Bias())
    params, states = network.init(0)
    rows = parts_of(0, Plan((0.1,), 1, 1, 1)).test
    loss, _ = loss_of(network, params, states, rows, 0)
    expected = optax.softmax_cross_entropy_with_integer_labels(network(params, states, rows.x, True, 0)[0], rows.labels)
    np.testing.assert_allclose(loss, np.float64(expected).mean(), rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_those_of_jax(stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 8, 8, 3)).astype(np.float32), rng.standard_normal((27, 4)).astype(np.float32)
    # At stride 2 JAX would pad below and to the right alone.
    expected = jax.lax.conv_general_dilated(
        x, kernel.reshape(3, 3, 3, 4), (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(convolve(x, kernel, stride), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [BatchNorm(0.9), Bias()], ids=["batch norm", "bias"])
def test_a_residual_network_trains_under_vmap(norm):
    network = Residual(8, norm, (4, 4, 8))
    found = sweep(network, Plan((0.05, 0.1), 2, 16, 64, looks=2), {"seen": accuracies(network)})
    assert np.isfinite(found["loss"]).all()
    assert (found["loss"][..., 0] != found["loss"][..., 1]).all()
    params, _ = network.init(0)
    assert [kernel.shape for kernel in params["kernels"]] == [(9, 4), (36, 4), (36, 4), (36, 8), (72, 8)]
