"""Whole models folded, in Linen and in NNX: what is folded, what is kept, and that nothing but rounding changes."""

import re
from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn.linen
import jbn.nnx
from benchmarks.resnet50 import NORMS, NNXResNet50, ResNet50, Sizes
from tests.flax.test_resnet50 import COMPILER, filled, images, shapes
from tests.support import oracle
from tests.support.fold_cases import IMAGES, NETS, ROWS, OfLinen, OfNNX, numbers


def by_linen(net, ours):
    """Return outputs before and after, what was folded, and the paths that have variables left."""
    model = OfLinen(net.body, jbn.linen.BatchNorm if ours else nn.BatchNorm)
    x = numbers(jnp.zeros(net.x))
    variables = numbers(model.init(jax.random.key(0), x))
    apply, folded, folds = jbn.linen.fold(model, variables, x)
    assert jbn.linen.foldable(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype)) == folds
    return (
        model.apply(variables, x),
        jax.jit(apply)(folded, x),
        folds,
        {*folded["params"], *folded.get("batch_stats", ())},
    )


def by_nnx(net, ours):
    x = numbers(jnp.zeros(net.x))
    model = OfNNX(net.body, jbn.nnx.BatchNorm if ours else nnx.BatchNorm, x)
    nnx.update(model, numbers(nnx.state(model)))
    before = jax.tree.map(np.asarray, nnx.state(model))
    folded, folds = jbn.nnx.fold(model, x)
    assert jbn.nnx.foldable(model, jax.ShapeDtypeStruct(x.shape, x.dtype)) == folds
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))  # it stays as it was
    model.eval()
    return (
        model(x),
        nnx.jit(lambda model, x: model(x))(folded, x),
        folds,
        set(nnx.to_pure_dict(nnx.state(folded))),
    )


DOORS = {"linen": by_linen, "nnx": by_nnx}
door = pytest.mark.parametrize("door", DOORS)


@door
@pytest.mark.parametrize("name", NETS)
def test_what_is_folded_and_what_is_kept(name, door):
    net = NETS[name]
    # In turns, so that each norm is folded in half of the networks of each kind.
    ours = not net.theirs or (list(NETS).index(name) + list(DOORS).index(door)) % 2 == 0
    before, after, folds, left = DOORS[door](net, ours)
    assert set(folds.pairs) == set(net.pairs)
    assert set(folds.kept) == set(net.kept)
    norms = {path for pair in folds.pairs for path in pair if path in "nmn0n1n2"}
    assert not left & norms
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert a.dtype == b.dtype
        # Sums over at most 27 products, before and after, of values as large as those that the norm divides.
        np.testing.assert_allclose(b, a, rtol=0, atol=oracle.tolerance("float32", scale=16 * np.abs(a).max()))


def test_nothing_of_a_resnet_50_is_left_but_convolutions():
    """The digits: 53 of 53 norms, 1e-5 relative; the program: that of the same network without norms."""
    model, x = ResNet50(Sizes(width=8, classes=10)), images(jnp.float32)
    variables = filled(shapes(model, jnp.float32), jnp.float32)
    apply, folded, folds = jbn.linen.fold(model, variables, x, train=False)
    assert len(folds.pairs) == NORMS
    assert not folds.kept
    evaluate = partial(model.apply, train=False)
    want, got = jax.jit(evaluate)(variables, x), jax.jit(partial(apply, train=False))(folded, x)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()

    operations = [opcodes(f, v, x) for f, v in ((evaluate, variables), (partial(apply, train=False), folded))]
    assert operations[0]["rsqrt"] > 0
    assert operations[0]["subtract"] >= NORMS
    # One product is the mean over positions at the end.
    assert {"rsqrt", "subtract", "divide", "sqrt"}.isdisjoint(operations[1])
    assert operations[1]["multiply"] <= 1
    assert operations[1]["convolution"] == operations[0]["convolution"]


def opcodes(f, *args):
    """Count the operations of a compiled program, those inside of fusions too."""
    text = jax.jit(f).lower(*args).compile(COMPILER).as_text()
    return Counter(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = \S+ ([a-z][a-z-]*)\(", text, re.MULTILINE))


def test_a_resnet_50_of_nnx():
    model, x = NNXResNet50(Sizes(width=8, classes=10), rngs=nnx.Rngs(0)), images(jnp.float32)
    nnx.update(model, numbers(nnx.state(model, nnx.BatchStat)))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.scale[...] = jnp.full(module.num_features, 0.9)  # that of the last one of a block is 0
    folded, folds = jbn.nnx.fold(model, x)
    assert (len(folds.pairs), folds.kept) == (NORMS, ())
    model.eval()

    def evaluated(model):
        graph, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graph, state)(x)).lower(state).compile(COMPILER)(state)

    want, got = evaluated(model), evaluated(folded)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert not [variable for variable in jax.tree.leaves(nnx.state(folded, nnx.BatchStat))]


@pytest.mark.parametrize("norm", [nn.BatchNorm, jbn.linen.BatchNorm], ids=["Flax's", "jbn's"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=str)
def test_outputs_keep_their_dtype(norm, dtype):
    x = numbers(jnp.zeros(ROWS)).astype(jnp.bfloat16)
    model = nn.Sequential([nn.Dense(4, dtype=jnp.bfloat16), norm(True, dtype=dtype), nn.relu])
    variables = numbers(model.init(jax.random.key(0), x))
    apply, folded, _ = jbn.linen.fold(model, variables, x)
    want, got = model.apply(variables, x), apply(folded, x)
    assert want.dtype == got.dtype
    np.testing.assert_allclose(
        oracle.wide(got), oracle.wide(want), rtol=0, atol=oracle.tolerance("bfloat16", scale=np.abs(want).max())
    )


def test_a_part_of_the_pairs():
    model = OfLinen(NETS["norms on both sides"].body, nn.BatchNorm)
    x = numbers(jnp.zeros(ROWS))
    variables = numbers(model.init(jax.random.key(0), x))
    apply, folded, folds = jbn.linen.fold(model, variables, x, pairs=[("m", "a")])
    assert folds.kept == ("n",)
    np.testing.assert_allclose(apply(folded, x), model.apply(variables, x), atol=1e-5)


def mlp(norm=nn.BatchNorm, **options):
    return nn.Sequential([nn.Dense(4), norm(**options), nn.relu])


REFUSED = {
    "unknown": (
        [("layers_0", "layers_2")],
        r"pairs has \('layers_0', 'layers_2'\).*there is \('layers_0', 'layers_1'\)",
    ),
    "reversed": ([("layers_1", "layers_0")], r"expected \(layer, norm\) or \(norm, layer\)"),
    "twice": ([("layers_0", "layers_1")] * 2, "'layers_1' more than once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_the_call_does_not_show_are_refused(case):
    pairs, message = REFUSED[case]
    x = jnp.ones(ROWS)
    model = mlp(use_running_average=True)
    with pytest.raises(ValueError, match=message):
        jbn.linen.fold(model, model.init(jax.random.key(0), x), x, pairs=pairs)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jbn.linen.BatchNorm], ids=["Flax's", "jbn's"])
def test_a_norm_that_trains_is_refused(norm):
    x = jnp.ones(ROWS)
    model = mlp(norm, use_running_average=False)
    with pytest.raises(ValueError, match="layers_1 normalizes by the batch"):
        jbn.linen.foldable(model, model.init(jax.random.key(0), x), x)

    class Switched(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return norm(use_running_average=not train, name="bn")(nn.Dense(4)(x))

    model = Switched()
    variables = model.init(jax.random.key(0), x, False)
    with jbn.linen.replace(), jbn.linen.freeze():
        model.apply(variables, x, train=True)
        with pytest.raises(ValueError, match="bn normalizes by the batch"):
            jbn.linen.fold(model, variables, x, train=True)
    apply, folded, _ = jbn.linen.fold(model, variables, x, train=False)
    with pytest.raises(ValueError, match="bn is folded into the layer beside it and cannot train"):
        apply(folded, x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jbn.nnx.BatchNorm], ids=["Flax's", "jbn's"])
def test_a_norm_that_trains_is_refused_in_nnx(norm):
    class Switched(nnx.Module):
        def __init__(self):
            self.fc, self.bn = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), norm(4, rngs=nnx.Rngs(0))

        def __call__(self, x, train=None):
            return self.bn(self.fc(x), use_running_average=None if train is None else not train)

    with pytest.raises(ValueError, match="bn normalizes by the batch"):
        jbn.nnx.foldable(Switched(), jnp.ones(ROWS), train=True)
    folded, folds = jbn.nnx.fold(Switched(), jnp.ones(ROWS))
    assert folds.pairs == (("fc", "bn"),)
    folded(jnp.ones(ROWS), train=False)
    with pytest.raises(ValueError, match="is folded into the layer beside it"):
        folded(jnp.ones(ROWS), train=True)
    folded.train()
    with pytest.raises(ValueError, match="is folded into the layer beside it"):
        folded(jnp.ones(ROWS))


def test_layers_with_code_of_their_own_are_kept():
    class Standardized(nn.Conv):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x) * 2

    class Renamed(nn.Conv):
        pass

    class Doubled(nn.BatchNorm):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x) * 2

    x = numbers(jnp.zeros(IMAGES))
    both = (("layers_0", "layers_1"),)
    for layer, norm, pairs in (
        (Standardized, nn.BatchNorm, ()),
        (Renamed, nn.BatchNorm, both),
        (nn.Conv, Doubled, ()),
    ):
        model = nn.Sequential([layer(4, (3, 3)), norm(True)])
        variables = numbers(model.init(jax.random.key(0), x))
        apply, folded, folds = jbn.linen.fold(model, variables, x)
        assert tuple(folds) == (pairs, () if pairs else ("layers_1",))
        np.testing.assert_allclose(apply(folded, x), model.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", ["remat", "jit", "scan"])
def test_layers_under_transformations(wrap):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = nn.relu(nn.BatchNorm(True, name="n")(nn.Dense(3, name="a")(x)))
            return (y, None) if wrap == "scan" else y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            if wrap == "scan":
                axes = {"params": 0, "batch_stats": 0}
                return nn.scan(Block, axes, split_rngs={"params": True}, length=2)(name="block")(x, None)[0]
            return {"remat": nn.remat, "jit": nn.jit}[wrap](Block)(name="block")(x)

    x = numbers(jnp.zeros(ROWS))
    variables = numbers(Model().init(jax.random.key(0), x))
    apply, folded, folds = jbn.linen.fold(Model(), variables, x)
    # The parameters of a scan are stacked; and its layers run more than once.
    assert folds.pairs == (() if wrap == "scan" else (("block/a", "block/n"),))
    np.testing.assert_allclose(apply(folded, x), Model().apply(variables, x), rtol=1e-5, atol=1e-5)


class Reads(nn.Module):
    """A network whose kernel is read in ``way``: nobody but its layer may, and the layer as it is."""

    way: str

    @nn.compact
    def __call__(self, x):
        layer, norm = nn.Dense(3, name="a"), nn.BatchNorm(True, name="n")
        if self.way == "normalized":
            return norm(nn.WeightNorm(layer)(x))
        y = norm(x=layer(x))
        if self.way == "tied":
            return y @ layer.variables["params"]["kernel"].T
        return layer(inputs=nn.relu(y)) if self.way == "called again by name" else y


class ReadsNNX(nnx.Module):
    def __init__(self, way):
        rngs = nnx.Rngs(0)
        self.way, self.a, self.n = way, nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        layer = self.a
        if self.way == "normalized":
            layer = nnx.clone(layer)
            layer.kernel[...] /= jnp.linalg.norm(layer.kernel[...], axis=0, keepdims=True)
        y = self.n(x=layer(inputs=x))
        if self.way == "tied":
            return y @ self.a.kernel[...].T
        return self.a(inputs=nnx.relu(y)) if self.way == "called again by name" else y


@pytest.mark.parametrize("way", ["normalized", "tied", "called again by name", "by name"])
def test_kernels_that_others_read_or_change_are_kept(way):
    x = numbers(jnp.zeros(ROWS))
    pairs = (("a", "n"),) if way == "by name" else ()
    variables = numbers(Reads(way).init(jax.random.key(0), x))
    apply, folded, folds = jbn.linen.fold(Reads(way), variables, x)
    assert tuple(folds) == (pairs, () if pairs else ("n",))
    np.testing.assert_allclose(apply(folded, x), Reads(way).apply(variables, x), rtol=1e-5, atol=1e-5)

    model = ReadsNNX(way)
    nnx.update(model, numbers(nnx.state(model)))
    folded, folds = jbn.nnx.fold(model, x)
    assert tuple(folds) == (pairs, () if pairs else ("n",))
    model.eval()
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_values_that_a_model_stores_stay_what_they_were():
    class Stores(ReadsNNX):
        def __init__(self):
            super().__init__("by name")
            self.seen = nnx.Cache(jnp.zeros(ROWS))

        def __call__(self, x):
            self.seen[...] = self.a(x)
            return self.n(self.seen[...])

    assert jbn.nnx.foldable(Stores(), jnp.ones(ROWS)).kept == ("n",)


@pytest.mark.parametrize("stacked", ["both", "the layer", "the norm", "neither"])
def test_stacks_under_vmap_are_kept(stacked):
    def over(layer, own):
        return nn.vmap(
            layer,
            variable_axes={"params": 0 if own else None, "batch_stats": 0 if own else None},
            split_rngs={"params": own},
        )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = over(nn.Dense, stacked in ("both", "the layer"))(4, use_bias=False, name="a")(x)
            return over(nn.BatchNorm, stacked in ("both", "the norm"))(True, name="n")(y)

    x = numbers(jnp.zeros((2, *ROWS)))
    variables = numbers(Model().init(jax.random.key(0), x))
    apply, folded, folds = jbn.linen.fold(Model(), variables, x)
    assert tuple(folds) == (((("a", "n"),), ()) if stacked == "neither" else ((), ("n",)))
    np.testing.assert_allclose(apply(folded, x), Model().apply(variables, x), rtol=1e-5, atol=1e-5)


def test_stacks_of_nnx_are_kept():
    class Model(nnx.Module):
        def __init__(self):
            @nnx.vmap
            def make(key):
                rngs = nnx.Rngs(key)
                return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))

            self.stack = make(jax.random.split(jax.random.key(0), 2))

        def __call__(self, x):
            return nnx.vmap(lambda layers, x: layers(x))(self.stack, x)

    x = numbers(jnp.zeros((2, *ROWS)))
    folded, folds = jbn.nnx.fold(Model(), x)
    assert tuple(folds) == ((), ("stack/layers/1",))
    model = Model()
    model.eval()
    np.testing.assert_array_equal(folded(x), model(x))


def test_kernels_that_others_share_stay_theirs():
    class Tied(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a, self.n, self.b = (
                nnx.Linear(3, 3, rngs=rngs),
                nnx.BatchNorm(3, rngs=rngs),
                nnx.Linear(3, 3, rngs=rngs),
            )
            self.b.kernel = self.a.kernel

        def __call__(self, x):  # where b is called too, nothing is folded
            return self.n(self.a(x))

    model, x = Tied(), numbers(jnp.zeros(ROWS))
    nnx.update(model, numbers(nnx.state(model)))
    folded, folds = jbn.nnx.fold(model, x)
    assert folds.pairs == (("a", "n"),)
    model.eval()
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(folded.b.kernel[...], model.b.kernel[...])


def test_partitioned_kernels_stay_partitioned():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Sequential([nn.Dense(4, use_bias=False, kernel_init=init), nn.BatchNorm(True)])
    variables = model.init(jax.random.key(0), jnp.ones(ROWS))
    apply, folded, _ = jbn.linen.fold(model, variables, jnp.ones(ROWS))
    assert folded["params"]["layers_0"]["kernel"].names == (None, "model")
    np.testing.assert_allclose(apply(folded, jnp.ones(ROWS)), model.apply(variables, jnp.ones(ROWS)), atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("room", ["linen", "nnx"])
def test_the_dtype_of_y_stays(room, use_bias):
    """Of a layer and a norm whose parameters have different ones."""
    x, half = jnp.ones((2, 3), jnp.bfloat16), jnp.bfloat16
    if room == "linen":
        model = nn.Sequential([nn.Dense(4, use_bias=use_bias, param_dtype=half), jbn.linen.BatchNorm(True)])
        variables = model.init(jax.random.key(0), x)
        apply, folded, folds = jbn.linen.fold(model, variables, x)
        before, after = model.apply(variables, x), apply(folded, x)
    else:
        rngs = nnx.Rngs(0)
        linear = nnx.Linear(3, 4, use_bias=use_bias, param_dtype=half, rngs=rngs)
        model = nnx.Sequential(linear, jbn.nnx.BatchNorm(4, rngs=rngs))
        model.eval()
        folded, folds = jbn.nnx.fold(model, x)
        before, after = model(x), folded(x)
    assert folds.pairs and before.dtype == after.dtype == half  # noqa: PT018
    np.testing.assert_allclose(np.float32(after), np.float32(before), atol=0.03)
