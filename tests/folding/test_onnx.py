"""Models go to ONNX, folded or not, and nothing is lost on the way."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import linen as nn
from flax import nnx

import jbn.linen
import jbn.nnx
from tests.support.oracle import relative_l2, tolerance

X = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)


class Net(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(True)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        return nn.Dense(4)(x.mean((1, 2)))


class Twin(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(8, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def shift(tree):
    """Move every array, so that no norm is the identity."""
    return jax.tree.map(lambda leaf: leaf + 0.1, tree)


def linen(norm):
    model = Net(norm)
    return model, shift(model.init(jax.random.key(0), X))


def linen_evaluates(norm):
    model, variables = linen(norm)
    return lambda x: model.apply(variables, x)


def linen_folded(norm):
    """Return the traced program, for an exporter that patches Flax's layers runs past what adds the bias."""
    model, variables = linen(norm)
    apply, folded, folds = jbn.linen.fold(model, variables, X)
    assert not folds.kept
    return jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(lambda x: apply(folded, x))(X))


def nnx_evaluates(norm):
    model = Twin(norm)
    nnx.update(model, shift(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


def nnx_folded(norm):
    model, folds = jbn.nnx.fold(nnx_evaluates(norm), X)
    assert not folds.kept
    return model


LINEN = [
    (linen_evaluates, make, norm)
    for make in (linen_evaluates, linen_folded)
    for norm in (nn.BatchNorm, jbn.linen.BatchNorm)
]
NNX = [
    (nnx_evaluates, make, norm) for make in (nnx_evaluates, nnx_folded) for norm in (nnx.BatchNorm, jbn.nnx.BatchNorm)
]


@pytest.mark.filterwarnings("ignore")  # what the exporter and its packages warn of is theirs
@pytest.mark.parametrize(
    ("evaluates", "make", "norm"),
    LINEN + NNX,
    ids=lambda value: f"{value.__module__}.{value.__name__}".removeprefix("tests.folding.test_onnx."),
)
def test_onnx_gives_what_the_model_does_in_evaluation(evaluates, make, norm):
    exporter, runtime = pytest.importorskip("jax2onnx"), pytest.importorskip("onnxruntime")
    f, expected = make(norm), np.asarray(evaluates(norm)(X))
    with jax.numpy_rank_promotion("allow"):  # the exporter's own layers promote
        model = exporter.to_onnx(f, [X.shape])
    session = runtime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: X})
    assert relative_l2(y, expected) < tolerance(np.float32, X.size)
    if "folded" in make.__name__:
        assert not {"Sqrt", "BatchNormalization"} & {node.op_type for node in model.graph.node}


def test_a_layer_that_an_exporter_replaces_does_not_lose_its_bias_silently(monkeypatch):
    model, variables = linen(jbn.linen.BatchNorm)
    apply, folded, _ = jbn.linen.fold(model, variables, X)
    monkeypatch.setattr(nn.Conv, "__call__", lambda self, x: jnp.repeat(x[..., :1], 8, -1))
    with pytest.raises(ValueError, match=r"^Conv_0 ran past Flax's interceptors.*jaxpr_as_fun"):
        apply(folded, X)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jbn.linen.BatchNorm])
def test_an_exporter_that_tells_a_folded_norm_how_it_evaluates_is_known(norm, monkeypatch):
    """It calls what it has replaced with what the constructor was given, which Flax refuses in words of its own."""
    model, variables = linen(norm)
    apply, folded, _ = jbn.linen.fold(model, variables, X)
    call = norm.__call__
    monkeypatch.setattr(norm, "__call__", lambda self, x: call(self, x, use_running_average=True))
    with pytest.raises(ValueError, match=r"^BatchNorm_0 has use_running_average from its constructor.*jaxpr_as_fun"):
        apply(folded, X)


def test_a_call_is_not_taken_for_such_a_one_where_another_one_ends_meanwhile():
    """As threads make them: one ends between a layer and its norm in the other."""
    under_way = []

    def begin(x):
        if len(under_way) > 1:
            raise KeyError
        return x

    def go_on(x):
        if under_way:
            under_way.append(x)
            with pytest.raises(KeyError):
                apply(folded, x)
        return x

    model = nn.Sequential([begin, nn.Dense(4, use_bias=False), go_on, nn.BatchNorm(True)])
    variables = model.init(jax.random.key(0), X)
    apply, folded, _ = jbn.linen.fold(model, variables, X)
    under_way.append(X)
    y = apply(folded, X)
    under_way.clear()
    np.testing.assert_allclose(y, model.apply(variables, X), atol=1e-5)
