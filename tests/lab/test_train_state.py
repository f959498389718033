"""The training steps that a guide prints, checkpoints of what they move, and masks of what they may move."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.freezing import decay_mask, trainable_mask
from tests.support import oracle

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "flax_step.md").read_text(encoding="utf-8")
MARKERS = {"flax": "# a training step with flax.training", "optax": "# a training step with optax alone"}
MOMENTUM, STEPS, ROWS = 0.9, 60, 48


def block(marker):
    """Return the example of the guide that begins with this line."""
    return re.search(rf"```python\n({re.escape(marker)}\n.*?)```", GUIDE, re.DOTALL)[1]  # type: ignore[index]


def defined(marker):
    scope = {}
    exec(block(marker), scope)
    return scope


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jbn.linen.BatchNorm(not train, momentum=MOMENTUM)(x)
        x = nn.Dense(16, use_bias=False)(x)
        x = jbn.linen.BatchNorm(not train, momentum=MOMENTUM, activation=nn.relu, param_dtype=jnp.bfloat16)(x)
        return nn.Dense(3)(x)


def batches(steps):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 4)) * 4
    for _ in range(steps):
        labels = rng.integers(0, 3, ROWS)
        yield (centres[labels] + rng.standard_normal((ROWS, 4)) + 5).astype(np.float32), labels


def tx():
    return optax.adamw(0.02, weight_decay=1e-3, mask=decay_mask)


def by_flax(steps=STEPS):
    scope = defined(MARKERS["flax"])
    state = scope["create"](Network(), tx(), jax.random.key(0), jnp.zeros((2, 4)))
    losses = []
    for x, labels in batches(steps):
        state, loss = scope["train_step"](state, x, labels)
        losses.append(loss)
    return {"params": state.params, "batch_stats": state.batch_stats, "opt_state": state.opt_state}, losses


def by_optax(steps=STEPS):
    variables = Network().init(jax.random.key(0), jnp.zeros((2, 4)), train=True)
    params, batch_stats, opt_state = variables["params"], variables["batch_stats"], tx().init(variables["params"])
    train_step = defined(MARKERS["optax"])["make_train_step"](Network(), tx())
    losses = []
    for x, labels in batches(steps):
        params, batch_stats, opt_state, loss = train_step(params, batch_stats, opt_state, x, labels)
        losses.append(loss)
    return {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}, losses


WAYS = {"flax": by_flax, "optax": by_optax}
both = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module", params=WAYS)
def trained(request):
    return WAYS[request.param]()


@both
def test_a_step_is_twelve_lines(way):
    step = re.search(r"\n\n((?:@jax.jit\ndef train_step|def make_train_step).*?)\n\n\n", block(MARKERS[way]), re.DOTALL)
    lines = [line for line in step[1].splitlines() if line.strip()]
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 120


def test_the_loss_falls_and_evaluation_agrees(trained):
    state, losses = trained
    assert losses[-1] < 0.3 * losses[0]
    x, labels = next(batches(1))
    logits = Network().apply({name: state[name] for name in ("params", "batch_stats")}, x, train=False)
    assert (logits.argmax(-1) == labels).mean() > 0.9


def test_the_statistics_are_those_of_every_batch(trained):
    state, _ = trained
    mean, var = np.zeros(4), np.ones(4)
    for x, _ in batches(STEPS):
        _, batch_mean, batch_var = oracle.moments(x)
        mean, var = (m + (1 - MOMENTUM) * (b - m) for m, b in ((mean, batch_mean), (var, batch_var)))
    got = state["batch_stats"]["BatchNorm_0"]
    bound = oracle.tolerance("float32", ROWS, 10) / (1 - MOMENTUM)
    np.testing.assert_allclose(got["mean"], mean, rtol=0, atol=bound)
    np.testing.assert_allclose(got["var"], var, rtol=0, atol=bound)


def test_both_steps_give_the_same_bits():
    same(by_flax(5), by_optax(5))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), a, b)


def through_a_checkpoint(folder, state):
    """Return what is read where there is nothing of the state but shapes and dtypes."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


def test_a_checkpoint_of_linen_variables_comes_back_to_the_bit(tmp_path, trained):
    state, _ = trained
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "bfloat16", "int32"}
    same(through_a_checkpoint(tmp_path, state), state)


class Model(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first = jbn.nnx.BatchNorm(4, momentum=MOMENTUM, rngs=rngs)
        self.hidden = nnx.Linear(4, 16, use_bias=False, rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(16, momentum=MOMENTUM, activation=nnx.relu, param_dtype=jnp.bfloat16, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(self.hidden(self.first(x))))


@nnx.jit
def nnx_step(model, optimizer, x, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def fresh(seed):
    model = Model(seed)
    return model, nnx.Optimizer(model, tx(), wrt=nnx.Param)


def test_a_checkpoint_of_an_nnx_model_comes_back_to_the_bit_and_goes_on(tmp_path):
    model, optimizer = fresh(0)
    *most, last = batches(6)
    for x, labels in most:
        nnx_step(model, optimizer, x, labels)
    state = nnx.to_pure_dict(nnx.state((model, optimizer)))
    restored = through_a_checkpoint(tmp_path, state)
    same(restored, state)
    others = fresh(1)
    nnx.update(others, restored)
    for pair in ((model, optimizer), others):
        nnx_step(*pair, *last)
    same(nnx.state(others), nnx.state((model, optimizer)))
    assert all(np.asarray(leaf != 0).any() for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat)))


def test_what_is_decayed():
    params = {"conv": {"kernel": 1.0, "bias": 1.0}, "bn": jbn.bn_init(2, use_bias=False)[0], "scale": {"w": 1.0}}
    assert decay_mask(params) == {
        "conv": {"kernel": True, "bias": False}, "bn": jbn.Params(False, None), "scale": {"w": True}
    }  # fmt: skip
    model = Model(0)
    boxed, pure = nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for mask in (decay_mask(pure), nnx.to_pure_dict(decay_mask(boxed))):
        assert mask["out"] == {"kernel": True, "bias": False}
        assert mask["norm"] == {"scale": False, "bias": False}
    box = nn.Partitioned(jnp.ones(2), ("model",))
    assert decay_mask({"bn": {"scale": box}, "kernel": box, "value": 1.0}) == {
        "bn": {"scale": box.replace(value=False)}, "kernel": box.replace(value=True), "value": True
    }  # fmt: skip


def test_decay_moves_kernels_and_nothing_else():
    model = Model(0)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.5, mask=decay_mask), wrt=nnx.Param)
    before = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda value: value + 1, nnx.state(model, nnx.Param)))
    nnx.update(model, jax.tree.map(lambda value: value + 1, nnx.state(model, nnx.Param)))
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    after = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    for (path, a), (_, b) in zip(before, after, strict=True):
        factor = 0.95 if "kernel" in jax.tree_util.keystr(path) else 1.0
        np.testing.assert_allclose(b, a * factor, rtol=(factor < 1) * 1e-6)


def heavy(frozen):
    """Momentum and weight decay, for what is not frozen."""
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.adamw(0.05, weight_decay=0.1))
    return optax.multi_transform(
        {True: tx, False: optax.set_to_zero()}, lambda params: trainable_mask(params, frozen=frozen)
    )


def steps_of_linen(frozen):
    variables = Network().init(jax.random.key(0), jnp.zeros((2, 4)), train=True)
    train_step = defined(MARKERS["optax"])["make_train_step"](Network(), heavy(frozen))
    params = before = jax.tree.map(lambda value: value + 0.5, variables["params"])
    batch_stats, opt_state = variables["batch_stats"], heavy(frozen).init(params)
    for x, labels in batches(5):
        params, batch_stats, opt_state, _ = train_step(params, batch_stats, opt_state, x, labels)
    return before, params


def steps_of_nnx(frozen):
    model = Model(0)
    nnx.update(model, jax.tree.map(lambda value: value + 0.5, nnx.state(model, nnx.Param)))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, heavy(frozen), wrt=nnx.Param)
    for x, labels in batches(5):
        nnx_step(model, optimizer, x, labels)
    return before, nnx.state(model, nnx.Param)


@pytest.mark.parametrize(
    ("steps", "frozen", "keys"),
    [
        (steps_of_linen, "Dense_0", ["['Dense_0']"]),
        (steps_of_linen, "**/BatchNorm_*", ["['BatchNorm_0']", "['BatchNorm_1']"]),
        (steps_of_nnx, ["first", "hidden/*"], ["['first']", "['hidden']"]),
        (steps_of_nnx, "*/scale", ["['scale']"]),
    ],
)
def test_what_is_frozen_does_not_move_a_bit_and_the_rest_does(steps, frozen, keys):
    before, after = map(jax.tree_util.tree_leaves_with_path, steps(frozen))
    still = 0
    for (path, a), (_, b) in zip(before, after, strict=True):
        rests = any(key in jax.tree_util.keystr(path) for key in keys)
        assert np.array_equal(a, b) == rests, path
        still += rests
    assert 0 < still < len(before)
