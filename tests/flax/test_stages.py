"""Training in stages: a backbone that is frozen and then trains, and normalizations that train alone."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn.linen
import jbn.nnx
from jbn.linen import BatchNorm

X = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32) * 2 + 3
LABELS = np.arange(32) % 3


class Backbone(nn.Module):
    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x)))
        return nn.relu(self.norm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x)))


class Classifier(nn.Module):
    norm: type = BatchNorm

    def setup(self):
        self.backbone, self.bn, self.head = Backbone(self.norm), self.norm(use_running_average=False), nn.Dense(3)

    def __call__(self, x):
        return self.head(self.bn(self.backbone(x)))


def make_step(model, tx, traces):
    def step(variables, opt_state, x, labels):
        traces.append(1)

        def loss(params):
            logits, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    return step


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm], ids=["jbn", "Flax in replace"])
@pytest.mark.parametrize("compiled_again", [False, True])
def test_two_stages_in_linen(norm, compiled_again):
    """The same step, compiled before the block or after it, is frozen inside it alone."""
    model, traces = Classifier(norm), []
    variables = model.init(jax.random.key(0), X)
    mask = partial(jbn.trainable_mask, frozen="backbone")
    frozen_tx = optax.multi_transform({True: optax.adam(1e-2), False: optax.set_to_zero()}, mask)
    with jbn.linen.replace():
        first = jax.jit(make_step(model, frozen_tx, traces))
        opt_state = frozen_tx.init(variables["params"])
        with jbn.linen.freeze("backbone", affine=True) as frozen:
            now, _ = first(*first(variables, opt_state, X, LABELS), X, LABELS)
        assert len(frozen.paths) == 2
        assert len(traces) == 1
        for kind in ("params", "batch_stats"):
            assert same(now[kind]["backbone"], variables[kind]["backbone"])
        assert not same(now["params"]["head"], variables["params"]["head"])
        assert not same(now["batch_stats"]["bn"], variables["batch_stats"]["bn"])

        tx = optax.adam(1e-2)
        step = make_step(model, tx, traces)
        second = jax.jit(step) if compiled_again else first
        state = tx.init(now["params"]) if compiled_again else opt_state
        after, _ = second(now, state, X, LABELS)
        want, _ = (
            step(now, state, X, LABELS) if compiled_again else make_step(model, frozen_tx, [])(now, state, X, LABELS)
        )
    assert not same(after["batch_stats"]["backbone"], now["batch_stats"]["backbone"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after["batch_stats"], want["batch_stats"])


@pytest.mark.parametrize("transform", [jax.jit, nn.jit, jax.checkpoint, jax.vmap, jax.make_jaxpr, jax.eval_shape])
def test_a_block_leaves_nothing_behind(transform):
    """A step that was met inside the block is what it was before after it, by whatever holds it in a cache."""
    model = Classifier()
    variables = model.init(jax.random.key(0), X)

    def moved(x):
        return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["bn"]["mean"]

    if transform is nn.jit:
        lifted = nn.jit(Classifier)()

        def call(x):
            return lifted.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["bn"]["mean"]
    elif transform is jax.make_jaxpr:
        traced = jax.make_jaxpr(moved)

        def call(x):
            return jax.core.eval_jaxpr(traced(x).jaxpr, traced(x).consts, x)[0]
    elif transform is jax.eval_shape:
        jax.eval_shape(moved, X)
        call = moved
    elif transform is jax.vmap:

        def call(x):
            return jax.vmap(moved)(x[None])[0]
    else:
        call = transform(moved)
    for _ in range(2):
        assert call(X).any()
        with jbn.linen.freeze():
            assert not call(X).any()
    assert call(X).any()


def test_a_context_entered_again_compiles_nothing_and_does_not_warn():
    model, traces = Classifier(), []
    variables = model.init(jax.random.key(0), X)
    step = jax.jit(lambda v: (traces.append(1), model.apply(v, X, mutable=["batch_stats"])[1])[1])
    for number in (2, 0, 0):
        with jbn.linen.freeze("backbone", affine=True) as frozen:
            step(variables)
        assert len(frozen.paths) == number
        step(variables)
    assert len(traces) == 2
    flax = Classifier(nn.BatchNorm)
    step = jax.jit(lambda v: flax.apply(v, X, mutable=["batch_stats"])[1])
    for number in (3, 0):  # the second time no Python runs, and nothing warns that no norm was met
        with jbn.linen.replace(momentum=0.625) as replaced:
            step(variables)
        assert len(replaced.paths) == number


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), jbn.nnx.BatchNorm(8, rngs=rngs), nnx.relu)
        self.bn, self.head = jbn.nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.bn(self.backbone(x)))


@nnx.jit
def nnx_step(model, optimizer, x, labels):
    grads = nnx.grad(lambda m: optax.softmax_cross_entropy_with_integer_labels(m(x), labels).mean())(model)
    optimizer.update(model, grads)


def numbers(model):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_two_stages_in_nnx():
    model = Network()
    jbn.nnx.freeze(model, "backbone", affine=True)
    mask = partial(jbn.trainable_mask, frozen="backbone")
    tx = optax.multi_transform({True: optax.adam(1e-2), False: optax.set_to_zero()}, mask)
    before = numbers(model)
    nnx_step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), X, LABELS)
    middle = numbers(model)
    assert not [path for path in changed(before, middle) if "backbone" in path]
    assert any("head" in path for path in changed(before, middle))
    jbn.nnx.freeze(model, "backbone", use_running_average=False, update=True)
    nnx_step(model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), X, LABELS)
    assert changed(middle, numbers(model)) == set(middle)


def test_normalizations_alone_in_linen():
    model, traces = Classifier(), []
    variables = model.init(jax.random.key(0), X)
    mask = partial(jbn.norm_mask, state=variables["batch_stats"])
    tx = optax.multi_transform({True: optax.adam(1e-2), False: optax.set_to_zero()}, mask)
    step = jax.jit(make_step(model, tx, traces))
    with jbn.linen.freeze(use_running_average=False):  # normalized by the batch, which is not remembered
        new, _ = step(variables, tx.init(variables["params"]), X, LABELS)
    assert same(new["batch_stats"], variables["batch_stats"])
    trained = {
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(variables["params"]), jax.tree.leaves(new["params"]), strict=True
        )
        if not np.array_equal(a, b)
    }
    assert trained == {
        f"['{place}']['{name}']".replace("/", "']['")
        for place in ("backbone/BatchNorm_0", "backbone/BatchNorm_1", "bn")
        for name in ("scale", "bias")
    }


def test_normalizations_alone_in_nnx():
    model = Network()
    jbn.nnx.freeze(model, use_running_average=False)
    mask = partial(jbn.norm_mask, state=nnx.state(model, nnx.BatchStat))
    tx = optax.multi_transform({True: optax.adam(1e-2), False: optax.set_to_zero()}, mask)
    before = numbers(model)
    nnx_step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), X, LABELS)
    moved = changed(before, numbers(model))
    assert len(moved) == 4
    assert all("scale" in path or "bias" in path for path in moved)


def test_norm_mask_of_other_trees():
    with pytest.raises(ValueError, match=r"params has head/kernel, and state statistics at bn; expected"):
        jbn.norm_mask({"head": {"kernel": jnp.ones(2)}}, {"bn": jbn.bn_init(2)[1]})
    assert jbn.norm_mask(jbn.bn_init(2)[0], jbn.bn_init(2)[1]) == jbn.Params(True, True)
