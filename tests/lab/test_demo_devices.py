"""A network of the demo on other numbers of devices, before and after it was interrupted."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from jbn.lab import train as trainer
from jbn.lab.data import digits
from jbn.lab.data.batches import Batches
from jbn.lab.data.images import Held, Images
from jbn.lab.demo import plan_of
from jbn.lab.devices import mesh_of, replicate
from jbn.lab.options import DemoOptions, TrainPlace
from jbn.lab.step import State, initial_state, update
from tests.lab.test_train import by_name
from tests.support.runs import arrays, lines_of

STEPS = 20
OPTIONS = DemoOptions(steps=STEPS, batch_size=50, seed=3)
# Measured: at most 9 ulps of an array's largest value after 20 steps, on 2 to 8 devices.
ULPS_PER_STEP = 4

pytestmark = pytest.mark.usefixtures("smooth")


def train(out, devices, *, model="dense", resume=False):
    """Return all that training leaves behind but the times of its steps, by name, and what it says."""
    console = Console(file=io.StringIO(), width=1000)
    place = TrainPlace(out=out, devices=devices, save_every=10, keep=1, resume=resume)
    trainer.train(plan_of(OPTIONS, model, batch_norm=True), place, console)
    lines = lines_of(out)
    history = {name: np.array([line[name] for line in lines if name in line]) for name in {*lines[0], *lines[1]}}
    return arrays(out) | history, console.file.getvalue()


def assert_same_to_rounding(arrived, expected, ulps):
    assert arrived.keys() == expected.keys()
    for name, array in expected.items():
        tolerance = ulps * 2.0**-23 * np.max(np.abs(array))
        np.testing.assert_allclose(arrived[name], array, rtol=0, atol=tolerance, err_msg=name)


# 50 images are two shares of 25, and with one or two rows of padding three, four or seven; of 360 only seven need one.
@pytest.mark.parametrize(("model", "counts"), [("dense", (2, 3, 4, 7)), ("conv", (3,))])
def test_the_number_of_devices_does_not_matter(tmp_path, model, counts):
    expected, _ = train(tmp_path / "1", 1, model=model)
    assert {"validation_loss", "loss", "preactivation_50"} < expected.keys()
    for count in counts:
        compiled = update._cache_size()
        arrived, _ = train(tmp_path / str(count), count, model=model)
        assert update._cache_size() <= compiled + 1
        assert_same_to_rounding(arrived, expected, STEPS * ULPS_PER_STEP)


def test_more_devices_than_images():
    # One step: with so few images the next ones multiply a rounding error by 2 to 10 each.
    data = Images(*(part[:5] for part in digits(3).training))
    ends = []
    for mesh in (mesh_of(8), mesh_of(1)):
        batches = Batches(Held("five", data), 5, mesh)
        recipe = trainer.recipe_of(plan_of(OPTIONS, "dense", batch_norm=True), batches)
        state = State(*replicate(initial_state(recipe, data.images.shape[1:]), mesh))
        ends.append(by_name(update(recipe, state, batches.read(batches.in_order(0)))))
    assert_same_to_rounding(*ends, 16)


@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 1), (1, 4)])
def test_a_run_goes_on_on_other_devices(tmp_path, monkeypatch, before, after):
    def interrupt(recipe, state, batch):
        if int(state.step) == 13:
            raise KeyboardInterrupt
        return update(recipe, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", before)
    resumed, said = train(tmp_path / "run", after, resume=True)
    assert f"Going on with '{tmp_path / 'run'}' after step 10 of {STEPS}" in said
    expected, _ = train(tmp_path / "whole", before)
    if before == after:
        assert all(array.tobytes() == resumed[name].tobytes() for name, array in expected.items())
    assert_same_to_rounding(resumed, expected, STEPS * ULPS_PER_STEP)


def test_a_state_is_whole_on_every_device():
    mesh = mesh_of(4)
    batches = Batches(Held("digits", digits(3).training), 50, mesh)
    recipe = trainer.recipe_of(plan_of(OPTIONS, "dense", batch_norm=True), batches)
    state, _ = update(
        recipe, State(*replicate(initial_state(recipe, (8, 8, 1)), mesh)), batches.read(batches.rows(0, 3))
    )
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 4
        assert leaf.sharding.is_fully_replicated
