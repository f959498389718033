import gc
import weakref
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given

from jbn import decay_mask
from jbn.lab.data import digits
from jbn.lab.data.batches import Batches
from jbn.lab.data.images import Held, Images
from jbn.lab.devices import mesh_of, replicate
from jbn.lab.models import NETWORKS, ResNet
from jbn.lab.options import TrainOptions
from jbn.lab.run.blame import blame
from jbn.lab.step import Recipe, State, augment, evaluate, initial_state, update
from jbn.linen import BatchNorm
from tests.support import oracle

SHAPE = (8, 8, 1)
DENSE, CONV = NETWORKS["dense"](batch_norm=True), NETWORKS["conv"](batch_norm=True)
RECIPE = Recipe(
    TrainOptions(epochs=20, learning_rate=0.05, schedule="constant", warmup_epochs=0.0, weight_decay=0.0, seed=3),
    network=DENSE,
    per_epoch=1,
)


def changed(recipe, network=None, **options):
    """Return a recipe with another network or other options."""
    return replace(recipe, network=network or recipe.network, options=replace(recipe.options, **options))


def random_data(count, shape=SHAPE, classes=10):
    generator = np.random.default_rng(count)
    images = generator.random((count, *shape), np.float32)
    return Images(images, generator.integers(0, classes, count).astype(np.int32))


class Counted(Held):
    def __init__(self, *data):
        super().__init__(*data)
        self.asked = []

    def rows(self, rows):
        self.asked.append(rows.tolist())
        return super().rows(rows)


def numbered(count):
    """A data set whose labels are the numbers of its rows."""
    return Counted("numbered", random_data(count, (2, 2, 1))._replace(labels=np.arange(count, dtype=np.int32)))


def by_name(tree):
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_same_bits(arrived, expected):
    arrived, expected = by_name(arrived), by_name(expected)
    assert arrived.keys() == expected.keys()
    for name, array in expected.items():
        assert (arrived[name].dtype, arrived[name].shape) == (array.dtype, array.shape), name
        assert arrived[name].tobytes() == array.tobytes(), name


def begun(recipe, devices=1, shape=SHAPE):
    return State(*replicate(initial_state(recipe, shape), mesh_of(devices)))


def trained(recipe, data, size, steps, devices=1):
    """Return the states before and after every step, and what the steps measured."""
    batches = Batches(Held("", data), size, mesh_of(devices))
    state, states, measured = begun(recipe, devices, data.images.shape[1:]), [], []
    for step in range(steps):
        states.append(jax.tree.map(np.array, state))
        state, measures = update(recipe, state, batches.read(batches.rows(step, recipe.options.seed)))
        measured.append(jax.device_get(measures))
    return [*states, jax.tree.map(np.array, state)], measured


def one_batch(data, devices=1, size=None):
    batches = Batches(Held("", data), size or len(data.labels), mesh_of(devices))
    return batches.read(batches.in_order(0))


def dense_judged(params, batch_stats, data):
    """The oracle: the losses of a dense network by its running statistics, and whether it is right."""
    x = oracle.wide(data.images).reshape(len(data.images), -1)
    for layer in range(2):
        norm, stats = params[f"BatchNorm_{layer}"], batch_stats[f"BatchNorm_{layer}"]
        x = x @ oracle.wide(params[f"Dense_{layer}"]["kernel"])
        stats = stats["mean"], stats["var"]
        x = oracle.forward(x, norm["scale"], norm["bias"], stats=stats, activation=jax.nn.relu).y
    logits = x @ oracle.wide(params["Dense_2"]["kernel"]) + oracle.wide(params["Dense_2"]["bias"])
    right = logits.argmax(-1) == data.labels
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, data.labels[:, None], -1)[:, 0], right


@given(st.integers(1, 30), st.integers(2, 40), st.integers(1, 8), st.integers(0, 2))
def test_every_epoch_shows_each_row_once_in_shares_that_are_read_once(count, size, devices, epoch):
    source = numbered(count)
    batches = Batches(source, size, mesh_of(devices))
    shown, lengths = [], set()
    for index in range(batches.per_epoch):
        rows = batches.rows(epoch * batches.per_epoch + index, 5)
        source.asked.clear()
        images, labels, valid, _ = batches.read(rows)
        lengths.add(len(labels))
        assert (valid is None) == (len(rows) == len(labels))
        there = np.arange(len(labels)) < len(rows)
        assert valid is None or np.array_equal(valid, there)
        np.testing.assert_array_equal(np.asarray(labels)[there], rows)
        np.testing.assert_array_equal(np.asarray(images)[there], source.held.images[rows])
        assert not np.asarray(images)[~there].any()
        assert [len(shard.data) for shard in labels.addressable_shards] == [len(labels) // devices] * devices
        assert source.asked == [rows.tolist()]
        shown += rows.tolist()
    assert len(lengths) == 1
    assert len(shown) == count
    assert sorted(shown) == list(range(count))


def test_the_order_is_that_of_seed_and_epoch():
    def order(size, devices, seed, epoch):
        batches = Batches(numbered(50), size, mesh_of(devices))
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        return np.concatenate([batches.rows(step, seed) for step in steps]).tolist()

    assert order(7, 1, 0, 1) == order(12, 5, 0, 1)
    orders = [order(7, 1, seed, epoch) for seed in range(2) for epoch in range(2)]
    assert len(set(map(tuple, orders))) == 4


def test_a_batch_is_no_larger_than_the_data():
    batches = Batches(numbered(10), 10_000_000, mesh_of(4))
    assert len(batches.read(batches.rows(0, 0)).labels) == 12


def test_orders_of_epochs_that_are_past_are_forgotten():
    batches = Batches(numbered(10), 5, mesh_of(1))
    orders = [weakref.ref(batches.rows(step, 0).base) for step in range(20)]
    gc.collect()
    assert sum(order() is not None for order in orders) <= 4


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_an_evaluation_counts_every_row_once(devices):
    data = random_data(37)
    params, stats = (
        {name: jax.tree.map(lambda leaf: leaf + 0.1, layer) for name, layer in tree.items()}
        for tree in begun(RECIPE, devices)[1:3]
    )
    batches = Batches(Held("", data), 8, mesh_of(devices))
    parts = [batches.read(batches.in_order(index)) for index in range(batches.per_epoch)]
    sums = np.sum(
        [evaluate(RECIPE.network, {"params": params, "batch_stats": stats}, part) for part in parts], 0, np.float64
    )
    losses, right = dense_judged(params, stats, data)
    np.testing.assert_allclose(sums[0], losses.sum(), rtol=oracle.tolerance("float32", 64))
    assert sums[1] == right.sum()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_for_kernels_alone(optimizer):
    batch, rate, decay = one_batch(random_data(16)), 0.125, 0.5
    state = begun(RECIPE)
    state = state._replace(params=jax.tree.map(lambda leaf: leaf + 0.25, state.params))  # a bias of 0 has no decay
    before = by_name(state.params)
    ends = []
    for weight_decay in (0.0, decay):
        recipe = changed(RECIPE, optimizer=optimizer, learning_rate=rate, weight_decay=weight_decay)
        start = jax.tree.map(jnp.copy, state._replace(opt_state=begun(recipe).opt_state))
        ends.append(by_name(update(recipe, start, batch)[0].params))
    # The first step of Nesterov's momentum 0.9 goes 1.9 times the gradient; AdamW's decay passes both moments by.
    factor = rate * decay * (1.9 if optimizer == "sgd" else 1)
    for name, wanted in by_name(decay_mask(state.params)).items():
        assert wanted == ("kernel" in name)
        expected = ends[0][name] - factor * wanted * oracle.wide(before[name])
        atol = oracle.tolerance("float32", scale=np.abs(ends[0][name]).max()) if wanted else 0
        np.testing.assert_allclose(ends[1][name], expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5, 20, 30])
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule, warmup):
    rate = changed(RECIPE, schedule=schedule, warmup_epochs=float(warmup)).rate()
    peak, steps = RECIPE.options.learning_rate, RECIPE.steps
    for step in range(steps):
        left = (1 + np.cos(np.pi * (step - warmup) / max(steps - warmup, 1))) / 2 if schedule == "cosine" else 1.0
        expected = peak * (step / warmup if step < warmup else left)
        np.testing.assert_allclose(rate(step), expected, rtol=0, atol=oracle.tolerance("float32", scale=peak))


def test_the_average_of_weights_forgets_its_beginning_faster():
    recipe = changed(RECIPE, ema=0.25, network=CONV)
    states, measured = trained(recipe, random_data(32), 8, 6)
    kept = [by_name({"params": state.params, "batch_stats": state.batch_stats}) for state in states]
    expected = {name: oracle.wide(array) for name, array in kept[0].items()}
    for step, after in enumerate(kept[1:]):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = {name: decay * array + (1 - decay) * after[name] for name, array in expected.items()}
    for name, array in by_name(states[-1].average).items():
        atol = oracle.tolerance("float32", 6, np.abs(expected[name]).max())
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=atol, err_msg=name)
    assert [float(measures.learning_rate) for measures in measured] == [np.float32(0.05)] * 6
    assert begun(RECIPE).average is None


def moves(image, kinds):
    """Return what an augmentation may make of an image, by its shift and flip."""
    height, width, _ = image.shape
    around = [(height // 8,) * 2, (width // 8,) * 2, (0, 0)]
    padded = np.pad(image, around) if "shift" in kinds else image
    corners = [(y, x) for y in range(len(padded) - height + 1) for x in range(padded.shape[1] - width + 1)]
    crops = {(*corner, False): padded[corner[0] :, corner[1] :][:height, :width] for corner in corners}
    flips = {(*corner[:2], True): crop[:, ::-1] for corner, crop in crops.items()} if "flip" in kinds else {}
    return crops | flips


@pytest.mark.parametrize("kinds", [(), ("flip",), ("shift",), ("flip", "shift")])
def test_an_augmentation_shifts_by_an_eighth_over_zeros_and_flips(kinds):
    images = random_data(300, (8, 16, 3)).images + 1
    arrived = np.asarray(augment(changed(RECIPE, augment=kinds).options, jnp.int32(4), images))
    found = []
    for image, moved in zip(images, arrived, strict=True):
        (move,) = [move for move, expected in moves(image, kinds).items() if np.array_equal(moved, expected)]
        found.append(move)
    assert set(found) == set(moves(images[0], kinds))
    for flipped in {move[2] for move in found}:
        assert sum(move[2] == flipped for move in found) > 100 or not {"flip"} & set(kinds)


def test_an_augmentation_depends_on_seed_step_and_place_alone():
    recipe, data = changed(RECIPE, augment=("flip", "shift")), random_data(16)
    same = data._replace(images=np.broadcast_to(data.images[:1], data.images.shape))
    look = jax.jit(augment, static_argnums=0)

    def arrived(devices=1, seed=3, step=0):
        images = one_batch(same, devices).images
        return np.asarray(look(changed(recipe, seed=seed).options, jnp.int32(step), images))[:16]

    for devices in (2, 3):
        np.testing.assert_array_equal(arrived(devices), arrived())
    for other in (arrived(seed=4), arrived(step=1)):
        assert not np.array_equal(other, arrived())
    assert len(np.unique(arrived().reshape(16, -1), axis=0)) > 4  # rows of one image differ by their places


def test_bfloat16_is_for_activations_and_float32_for_what_lasts():
    recipe = changed(RECIPE, network=NETWORKS["dense"](batch_norm=True, dtype=jnp.bfloat16), ema=0.9, weight_decay=0.1)
    seen = []

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Dense | BatchNorm):
            seen.append(y.dtype)
        return y

    data = digits(0).validation
    with nn.intercept_methods(watch):
        states, narrow = trained(recipe, data, 64, 7)
    assert len(seen) >= 5
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    for name, array in by_name(states[-1]).items():
        assert array.dtype in (np.float32, np.int32), name
    _, full = trained(RECIPE, data, 64, 7)
    scale = max(float(measures.loss) for measures in full)
    for one, other in zip(narrow[:1], full[:1], strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=0, atol=oracle.tolerance("bfloat16", 64, scale))
    assert np.isfinite([measures.loss for measures in narrow]).all()


@pytest.mark.parametrize(("devices", "compilations"), [(1, 2), (3, 1)])
def test_a_step_is_compiled_once_and_once_for_a_masked_batch(devices, compilations):
    # 41 images in batches of 8 end with one of a single row; on three devices every batch has padding.
    recipe, before = changed(RECIPE, seed=devices + 10), update._cache_size()
    states, measured = trained(recipe, random_data(41), 8, 12, devices)
    assert update._cache_size() == before + compilations
    assert np.isfinite([measures.loss for measures in measured]).all()
    assert int(states[-1].step) == 12


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05), ("adamw", 1e-3)])
def test_it_learns(optimizer, rate):
    _, measured = trained(changed(RECIPE, optimizer=optimizer, learning_rate=rate), digits(0).training, 128, 18)
    losses = [float(measures.loss) for measures in measured]
    assert np.mean(losses[-9:]) < 0.8 * losses[0]
    assert np.mean([measures.accuracy for measures in measured[-9:]]) > 0.5  # of an epoch


def calls_of(network, shape):
    """Return the norms of a network in their order: the activation, and whether something is added."""
    calls = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            calls.append((context.module.activation, kwargs.get("residual") is not None))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        variables = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros(shape), train=False))
    return calls, variables


@pytest.mark.parametrize("size", [8, 32])
def test_a_resnet_adds_and_activates_in_its_norms(size):
    network = ResNet(classes=7)
    calls, variables = calls_of(network, (2, size, size, 3))
    plain, added, shortcut = (nn.relu, False), (nn.relu, True), (None, False)
    assert calls == [plain, plain, added, plain, shortcut, added, plain, shortcut, added]
    assert len(variables["batch_stats"]) == 9
    images = jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)
    assert jax.eval_shape(lambda v, x: network.apply(v, x, train=False), variables, images).shape == (5, 7)


@pytest.mark.parametrize(
    "network",
    [pytest.param(ResNet(), marks=pytest.mark.slow), CONV],
    ids=["resnet", "conv"],
)
def test_what_is_in_padding_reaches_nothing(network):
    recipe, data = changed(RECIPE, network=network, ema=0.5), random_data(6)
    batch = one_batch(data, 4)  # two rows of padding
    ends = []
    for padding in (0, 1e9, np.nan):
        images = jnp.where(batch.valid[:, None, None, None], batch.images, padding)
        ends.append(update(recipe, begun(recipe, 4), batch._replace(images=images)))
    assert_same_bits(ends[1], ends[0])
    # 0 times NaN is NaN in the gradient of the first kernel: `Batches` pads with zeros. All else is without it.
    assert_same_bits(ends[2][1][:2], ends[0][1][:2])
    _, alone = update(recipe, begun(recipe), one_batch(data))
    for one, other in zip(alone, ends[0][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=oracle.tolerance("float32", 6 * 64 * 64))


def planted(state, layer, name, value):
    params = {key: dict(leaves) for key, leaves in state.params.items()}
    params[layer][name] = params[layer][name].at[..., 0].set(value)
    return state._replace(params=params)


@pytest.mark.parametrize(
    ("layer", "name", "value", "found"),
    [
        ("Dense_0", "kernel", np.inf, "the first statistics that are not finite are those of BatchNorm_0"),
        ("Dense_1", "kernel", np.nan, "the first statistics that are not finite are those of BatchNorm_1"),
        ("BatchNorm_0", "bias", np.inf, "the first statistics that are not finite are those of BatchNorm_1"),
        ("BatchNorm_1", "scale", np.nan, "the statistics of every batch norm are finite: it began after the last"),
        ("Dense_2", "kernel", np.nan, "the statistics of every batch norm are finite: it began after the last"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(layer, name, value, found):
    batch, state = one_batch(random_data(12), 8), planted(begun(RECIPE, 8), layer, name, value)
    assert blame(RECIPE, state, batch).startswith(found)
    before = jax.tree.map(np.array, state)
    kept, measures = update(RECIPE, state, batch)
    assert not np.isfinite(measures.loss)
    assert_same_bits(kept, before)


def test_images_that_are_not_finite_are_named_first():
    data = random_data(6)
    data.images[2, 3, 3] = np.nan
    assert blame(RECIPE, begun(RECIPE), one_batch(data)) == "the images of this batch hold values that are not finite"


class Root(nn.Module):
    """Adds a root to a logit: at 0 its slope is infinite."""

    @nn.compact
    def __call__(self, images, *, train, valid=None):
        x = BatchNorm(use_running_average=not train)(images.reshape(len(images), -1), mask=valid)
        return nn.Dense(10)(x).at[:, 0].add(jnp.sqrt(self.param("root", nn.initializers.zeros, ())))


def test_gradients_that_are_not_finite_are_named():
    recipe, batch = changed(RECIPE, network=Root()), one_batch(random_data(6))
    assert blame(recipe, begun(recipe), batch) == "the loss is finite, the gradients of these are not: root"
    state, measures = update(recipe, begun(recipe), batch)
    assert np.isfinite(measures.loss)
    assert not np.isfinite(measures.gradient_norm)
    assert_same_bits(state, begun(recipe))


def test_a_norm_that_overflows_is_told_from_gradients_that_do():
    state, batch = begun(RECIPE), one_batch(random_data(6))
    state = planted(planted(state, "BatchNorm_1", "scale", 1e25), "Dense_2", "kernel", 0)
    state.params["Dense_2"]["kernel"] *= 0
    assert blame(RECIPE, state, batch) == (
        "loss and gradients are finite, but the gradients are too large for their norm"
    )
