"""What a step of training does, against its definitions written out in NumPy, a layer after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.studies.networks import BatchNorm, Bias, Dense
from jbn.studies.noise import CENTRE, SCALE, SPREAD, Noisy, add_noise
from jbn.studies.steps import drift, landscape, loss_at, shift_of_gradients
from jbn.studies.training import Rows, Step

WIDTHS = (6, 5, 5, 4)
NORMS = {"bias": Bias(), "batch norm": BatchNorm(0.9), "noisy": Noisy(BatchNorm(0.9))}


def step_of(norm, rate=0.3):
    network, rng = Dense(WIDTHS, norm), np.random.default_rng(5)
    params, states = network.init(1)
    rows = Rows(jnp.asarray(rng.standard_normal((12, 6)), jnp.float32), jnp.asarray(rng.integers(0, 4, 12)))
    step = Step(jax.tree.map(jnp.asarray, params), states, rows, jnp.float32(rate), jnp.int32(3))
    loss = loss_at(network, step)
    grads = jax.grad(loss)(step.params)
    return network, step, loss, grads, jax.tree.map(lambda param, grad: param - rate * grad, step.params, grads)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_shift_of_gradients_is_that_of_the_definition(norm):
    _, step, loss, grads, after = step_of(norm)
    found = []
    for layer in (1, 2):
        mixed = {name: [*after[name][:layer], *step.params[name][layer:]] for name in ("kernels", "norms")}
        moved = jax.grad(loss)(step.params | mixed)["kernels"][layer]
        one, two = (np.float64(each).ravel() for each in (grads["kernels"][layer], moved))
        size, other = np.linalg.norm(one), np.linalg.norm(two)
        found.append([np.linalg.norm(two - one), np.linalg.norm(two - one) / size, one @ two / size / other])
    seen = shift_of_gradients(loss, step.params, after)
    np.testing.assert_allclose([seen[name] for name in ("shift", "share", "cosine")], np.mean(found, 0), rtol=1e-3)


def test_drift_is_told_in_spreads_of_the_unit():
    network, step, *_, after = step_of(Bias())
    x = np.random.default_rng(2).standard_normal((40, 6)).astype(np.float32)
    seen = drift(network, step, after, jnp.asarray(x))
    moments = []
    for params in (step.params, after):
        y, found = np.float64(x), []
        for kernel, bias in zip(params["kernels"], params["norms"], strict=False):
            y = y @ np.float64(kernel) + np.float64(bias)
            found.append((y.mean(0), y.std(0)))
            y = np.maximum(y, 0)
        moments.append(found)
    layers = [np.median(np.hypot(two[0] - one[0], two[1] - one[1]) / one[1]) for one, two in zip(*moments, strict=True)]
    np.testing.assert_allclose(seen["made"], np.mean(layers), rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_step_nothing_but_noise_moves_inputs(norm):
    network, step, *_ = step_of(NORMS[norm])
    seen = drift(network, step, step.params, step.batch.x)
    assert (seen["made"] > 0.1) == (seen["given"] > 0.05) == (norm == "noisy"), seen


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_landscape_lies_along_the_gradient(norm):
    _, step, loss, grads, _ = step_of(norm)
    lengths, multiples = jnp.asarray([0.1, 0.7]), (0.5, 2.0)
    seen = landscape(loss, step.params, grads, lengths, multiples)

    def flat(tree):
        return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])

    for index, length in enumerate(np.asarray(lengths)):
        losses, changes, ways = [float(loss(step.params))], [], []
        for multiple in multiples:
            place = jax.tree.map(lambda p, g, way=length * multiple: p - way * g, step.params, grads)
            losses.append(float(loss(place)))
            changes.append(np.linalg.norm(flat(jax.grad(loss)(place)) - flat(grads)))
            ways.append(length * multiple * np.linalg.norm(flat(grads)))
        expected = {
            "range": np.ptp(losses),
            "change": max(changes),
            "share": max(changes) / np.linalg.norm(flat(grads)),
            "smoothness": max(np.divide(changes, ways)),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(seen[name][index], value, rtol=1e-3, err_msg=name)


def test_noise_is_of_a_unit_first_and_of_a_row_then():
    y = jnp.ones((4000, 300)).at[2000:].set(0.0)
    noisy = np.float64(add_noise(y, jax.random.key(0)))
    scaled, shifts = noisy[:2000], noisy[2000:]
    centres = shifts.mean(0)
    assert np.abs(centres).max() <= CENTRE + 0.02
    np.testing.assert_allclose(centres.std(), CENTRE / 3**0.5, rtol=0.15)
    np.testing.assert_allclose(shifts.std(0), SPREAD / 3**0.5, rtol=0.1)
    scales = scaled.mean(0) - centres
    assert (scales.min() > 0.98, scales.max() < SCALE + 0.02, np.ptp(scales) > 0.2) == (True, True, True)
    np.testing.assert_allclose(scaled.std(0), SPREAD * (4 / 3) ** 0.5, rtol=0.1)


def test_noise_changes_at_each_step_and_ends_with_training():
    norm = Noisy(BatchNorm(0.9), activation=lambda y: y)
    params, state = norm.init(5, np.random.default_rng(0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 5)), jnp.float32)
    plain, _ = norm.norm(params, state[0], x, False, jnp.int32(0))
    still, _ = norm(params, state, x, False, jnp.int32(0))
    np.testing.assert_array_equal(jax.nn.relu(still), plain)
    one, two, again = (norm(params, state, x, True, jnp.int32(step))[0] for step in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert (np.abs(one - two) > 0.01).mean() > 0.8
