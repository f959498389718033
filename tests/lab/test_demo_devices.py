import itertools

import jax
import numpy as np
import pytest

from jbn.lab import training
from jbn.lab.data import Images, batch, digits
from jbn.lab.devices import mesh_of, replicated, sharded
from jbn.lab.models import MODELS
from jbn.lab.training import Interrupted, initial_state, train_step

STEPS = 20
# Measured: at most 9 ulps of an array's largest value after 20 steps, on 2 to 8 devices.
ULPS_PER_STEP = 4

pytestmark = pytest.mark.usefixtures("smooth")


@pytest.fixture(scope="module")
def data():
    return digits(3)


def train(data, folder, devices, *, model="dense", report=lambda done, history: None):
    """Return all that training leaves behind but the times of its steps, by name."""
    trained = training.train(
        MODELS[model].network(batch_norm=True),
        data,
        folder,
        learning_rate=0.1,
        steps=STEPS,
        batch_size=50,
        seed=3,
        mesh=mesh_of(devices),
        report=report,
    )
    for leaf in jax.tree.leaves(trained.state):
        assert len(leaf.sharding.device_set) == devices
        assert leaf.sharding.is_fully_replicated
    return by_name((trained.state, trained.history))


def by_name(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_same_to_rounding(arrived, expected, ulps):
    assert arrived.keys() == expected.keys()
    for name, array in expected.items():
        tolerance = ulps * 2.0**-23 * np.max(np.abs(array))
        np.testing.assert_allclose(arrived[name], array, rtol=0, atol=tolerance, err_msg=name)


# 50 images are two shares of 25, and with one or two rows of padding three, four or seven; of 360 only seven need one.
@pytest.mark.parametrize(("model", "counts"), [("dense", (2, 3, 4, 7)), ("conv", (3,))])
def test_the_number_of_devices_does_not_matter(data, tmp_path, model, counts):
    expected = train(data, tmp_path / "1", 1, model=model)
    for count in counts:
        compiled = train_step._cache_size()
        arrived = train(data, tmp_path / str(count), count, model=model)
        assert train_step._cache_size() <= compiled + 1
        assert_same_to_rounding(arrived, expected, STEPS * ULPS_PER_STEP)


def test_more_devices_than_images(data):
    # One step: with so few images the next ones multiply a rounding error by 2 to 10 each.
    network = MODELS["dense"].network(batch_norm=True)
    images = batch(data.training, 3, 0, 5)
    ends = []
    for mesh in (mesh_of(8), mesh_of(1)):
        state = replicated(initial_state(network, 0.1, np.uint32(3), images.images), mesh)
        ends.append(by_name(train_step(network, 0.1, state, *sharded(images, mesh))))
    assert_same_to_rounding(*ends, 16)


@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 1), (1, 4)])
def test_a_run_goes_on_on_other_devices(data, tmp_path, monkeypatch, before, after):
    def stop(done, history):
        if done == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "CHECKPOINT_INTERVAL", 10)
    with pytest.raises(Interrupted):
        train(data, tmp_path / "run", before, report=stop)
    steps = itertools.count(10)
    resumed = train(data, tmp_path / "run", after, report=lambda done, history: next(steps))
    assert next(steps) == STEPS + 1  # it did not start anew
    expected = train(data, tmp_path / "whole", before)
    if before == after:
        assert all(array.tobytes() == resumed[name].tobytes() for name, array in expected.items())
    assert_same_to_rounding(resumed, expected, STEPS * ULPS_PER_STEP)


def test_padding_is_marked_and_equal_shares_need_none(data):
    spread = sharded(Images(data.test.images[:10], data.test.labels[:10]), mesh_of(4))
    assert (spread.images.shape, spread.labels.shape) == ((12, 8, 8, 1), (12,))
    assert [shard.data.shape for shard in spread.images.addressable_shards] == [(3, 8, 8, 1)] * 4
    assert np.flatnonzero(~np.asarray(spread.valid)).tolist() == [10, 11]
    for count in (1, 2, 3):
        assert sharded(data.test, mesh_of(count)).valid is None
