"""Layers that are called with scale and bias: what they refuse, and that the tools for whole models go on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn.linen
import jbn.nnx

X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32) + 2
LABELS = np.arange(16) % 3


class OfLinen(nn.Module):
    """A layer whose norm takes scale and bias from an embedding of labels, and one whose norm learns its own."""

    train: bool

    @nn.compact
    def __call__(self, x, labels):
        x = nn.Dense(5)(x)
        norm = jbn.linen.BatchNorm(not self.train, use_scale=False, use_bias=False, name="conditional")
        x = norm(x, scale=1 + nn.Embed(3, 5)(labels), bias=nn.Embed(3, 5)(labels))
        return nn.BatchNorm(not self.train, name="plain")(nn.Dense(5)(x))


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 5, rngs=rngs)
        self.embed = nnx.Embed(3, 10, rngs=rngs)
        self.conditional = jbn.nnx.BatchNorm(5, use_scale=False, use_bias=False, rngs=rngs)
        self.plain = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x, labels):
        scale, bias = jnp.split(self.embed(labels), 2, -1)
        return self.plain(self.second(self.conditional(self.first(x), scale=1 + scale, bias=bias)))


def variables():
    return OfLinen(True).init(jax.random.key(0), X, LABELS)


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_that_learns_its_own_refuses_another(name, train):
    words = rf"{name} is given at the call of a layer that learns its own.*use_{name}=False"
    given = {name: jnp.ones((16, 4))}
    layer = jbn.linen.BatchNorm(not train)
    with pytest.raises(ValueError, match=words):
        layer.init(jax.random.key(0), X, **given)
    with pytest.raises(ValueError, match=words):
        jbn.nnx.BatchNorm(4, use_running_average=not train, rngs=nnx.Rngs(0))(X, **given)


def test_the_other_one_may_be_learned():
    learned = jbn.nnx.BatchNorm(4, use_scale=False, rngs=nnx.Rngs(0))
    scale = jnp.arange(16.0)[:, None]
    want, _ = jbn.batch_norm(X, scale)
    np.testing.assert_array_equal(learned(X, scale=scale), want)


@pytest.mark.parametrize("door", ["linen", "nnx"])
def test_freezing_stops_no_gradient_of_what_is_given(door):
    def loss(scale):
        if door == "nnx":
            layer, _ = jbn.nnx.freeze(jbn.nnx.BatchNorm(4, use_scale=False, rngs=nnx.Rngs(0)), affine=True)
            return (layer(X, scale=scale) ** 2).sum()
        layer = jbn.linen.BatchNorm(False, use_scale=False)
        with jbn.linen.freeze(affine=True):
            y, _ = layer.apply(layer.init(jax.random.key(0), X), X, scale=scale, mutable=["batch_stats"])
        return (y**2).sum()

    assert (jax.grad(loss)(jnp.ones((16, 1))) != 0).any()


@pytest.mark.parametrize("door", ["linen", "nnx"])
def test_it_is_kept_where_others_are_folded(door):
    if door == "linen":
        model, held = OfLinen(False), variables()
        apply, folded, folds = jbn.linen.fold(model, held, X, LABELS)
        got, want = apply(folded, X, LABELS), model.apply(held, X, LABELS)
    else:
        model = OfNNX(nnx.Rngs(0))
        folded, folds = jbn.nnx.fold(model, X, LABELS)
        model.eval()
        got, want = folded(X, LABELS), model(X, LABELS)
    assert folds.kept == ("conditional",)
    assert [norm for _, norm in folds.pairs] == ["plain"]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("door", ["linen", "nnx"])
def test_a_folded_norm_takes_none(door):
    """Folded with a call without scale, and called with one."""
    scale = jnp.ones((16, 1))
    if door == "linen":

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, scale=None):
                return jbn.linen.BatchNorm(True, use_scale=False, name="norm")(nn.Dense(5)(x), scale=scale)

        apply, folded, _ = jbn.linen.fold(Net(), Net().init(jax.random.key(0), X), X)
        call = lambda: apply(folded, X, scale)  # noqa: E731
    else:

        class NetOfNNX(nnx.Module):
            def __init__(self):
                self.dense = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
                self.norm = jbn.nnx.BatchNorm(5, use_scale=False, rngs=nnx.Rngs(0))

            def __call__(self, x, scale=None):
                return self.norm(self.dense(x), scale=scale)

        new, _ = jbn.nnx.fold(NetOfNNX(), X)
        call = lambda: new(X, scale)  # noqa: E731
    with pytest.raises(ValueError, match=r"is folded into the layer beside it, and is called with a scale"):
        call()


def test_tools_for_whole_models_go_on():
    batch, held = (X, LABELS), variables()
    model = OfNNX(nnx.Rngs(0))
    linen = jbn.linen.diagnose(OfLinen(True), held, batch), jbn.linen.recalibrate(OfLinen(True), held, [batch])
    assert len(linen[0].layers) == len(jbn.nnx.diagnose(model, batch).layers) == 2
    jbn.nnx.recalibrate(model, [batch])
    for found, (weights, bias) in (
        (linen[1]["batch_stats"]["conditional"]["mean"], held["params"]["Dense_0"].values()),
        (model.conditional.mean[...], (model.first.kernel[...], model.first.bias[...])),
    ):
        np.testing.assert_allclose(found, X.mean(0) @ weights + bias, atol=1e-5)
    with jbn.linen.replace(momentum=0.5) as replaced:
        OfLinen(True).apply(held, X, LABELS, mutable=["batch_stats"])
    assert replaced.paths == ("conditional", "plain")
    calls = jbn.linen.record(OfLinen(False), held, X, LABELS), jbn.nnx.record(model, X, LABELS)
    assert all(call["conditional"].outputs[0].shape == (16, 5) for call in calls)
