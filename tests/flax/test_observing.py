"""``diagnose`` and ``recalibrate`` of both Flax modules: exact on models as people have them."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.observing import findings
from tests.observing.test_recalibrate import C, check, cut, rows
from tests.support import oracle

UNEVEN = (16, 32, 37)
EPSILON = 1e-3
KEY = jax.random.key(0)


def exact(kernels, batches, idle=(), stats=None, masks=None):
    """Return mean and var of dense, norm, silu, as often as there are kernels, from all rows at once in float64."""
    parts, found, masks = [*batches], [], masks or [None] * len(batches)
    for i, kernel in enumerate(kernels):
        parts = [oracle.wide(part) @ oracle.wide(kernel) for part in parts]
        mask = None if masks[0] is None else np.concatenate(masks)
        found.append(oracle.moments(np.concatenate(parts), mask=mask)[1:])
        known = tuple(map(oracle.wide, stats[i])) if i in idle else None
        options = {"epsilon": EPSILON, "activation": jax.nn.silu, "stats": known}
        parts = [oracle.forward(part, mask=m, **options).y for part, m in zip(parts, masks, strict=True)]
    return found


def check_all(states, want):
    for state, pair in zip(states, want, strict=True):
        check({"a": state}, {"a": pair})


# Linen


class Net(nn.Module):
    """Layers of Flax; how it says that it trains is one of three ways."""

    says: str = "train"
    axis_name: str | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        train = self.is_mutable_collection("batch_stats") if self.says == "mutable" else train
        if self.says == "counts":
            calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
            calls.value += 1
        for _ in range(3):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.Dense(C, use_bias=False)(x)
            x = nn.silu(nn.BatchNorm(not train, epsilon=EPSILON, axis_name=self.axis_name)(x))
        return x

    def encode(self, x, train):
        return self(x * 2, train)


def linen_parts(variables):
    kernels = [variables["params"][f"Dense_{i}"]["kernel"] for i in range(3)]
    return kernels, [dict(variables["batch_stats"][f"BatchNorm_{i}"]) for i in range(3)]


@pytest.mark.parametrize("kind", [dict, FrozenDict])
@pytest.mark.parametrize("says", ["train", "mutable", "counts"])
def test_linen(says, kind):
    model, batches = Net(says), cut(rows(), *UNEVEN)
    variables = model.init(KEY, batches[0])
    variables = freeze(variables) if kind is FrozenDict else variables
    call = {} if says == "mutable" else {"train": True}
    new = jbn.linen.recalibrate(model, variables, batches, **call)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    assert type(new) is type(variables)
    for name in set(variables) - {"batch_stats"}:
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (new[name], variables[name])), strict=True))
    kernels, states = linen_parts(new)
    want = exact(kernels, batches)
    check_all(states, want)
    diagnosis = jbn.linen.diagnose(model, new, rows(), epsilon=EPSILON, **call)
    assert [layer.path for layer in diagnosis.layers] == [f"BatchNorm_{i}" for i in range(3)]
    seen = [jbn.State(layer.batch_mean, layer.batch_var) for layer in diagnosis.layers]
    check_all(seen, exact(kernels, [rows()]))


def test_linen_methods_and_statistics_that_evaluation_will_use():
    model, batches = Net(), cut(rows(), *UNEVEN)
    variables = model.init(KEY, batches[0])
    passes = []
    new = jbn.linen.recalibrate(
        model, variables, batches, upstream="recalibrated", method="encode", train=True,
        progress=lambda number, done: passes.append((number, done)),
    )  # fmt: skip
    kernels, states = linen_parts(new)
    doubled = [2 * x for x in batches]
    check_all(states, exact(kernels, doubled, idle=range(3), stats=[(s["mean"], s["var"]) for s in states]))
    assert passes[:4] == [(1, n) for n in range(1, 5)]


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train):
        for _ in range(2):
            x = nn.Dense(C, use_bias=False)(x)
            x = nn.silu(nn.BatchNorm(not train, epsilon=EPSILON)(x, mask=mask))
        return x


def test_a_tuple_is_several_arguments_and_nan_under_a_mask_does_not_matter():
    x, mask = rows(), np.arange(len(rows()))[:, None] % 3 > 0
    model, spoiled = Masked(), np.where(mask, x, np.nan).astype(np.float32)
    variables = model.init(KEY, x, mask, False)
    batches = list(zip(cut(spoiled, *UNEVEN), cut(mask, *UNEVEN), strict=True))
    kernels = [variables["params"][f"Dense_{i}"]["kernel"] for i in range(2)]
    new = jbn.linen.recalibrate(model, variables, batches, train=True)
    want = exact(kernels, cut(x, *UNEVEN), masks=cut(mask, *UNEVEN))
    check_all([new["batch_stats"][f"BatchNorm_{i}"] for i in range(2)], want)
    first = jbn.linen.diagnose(model, variables, (x, mask), epsilon=EPSILON, train=True).layers[0]
    np.testing.assert_array_equal(first.count, mask.sum())


def test_an_axis_of_pmap_is_taken_away_by_a_context_around():
    model, batches = Net(axis_name="batch"), cut(rows(), *UNEVEN)
    variables = model.init(KEY, batches[0])
    with jbn.linen.replace(axis_name=None):
        new = jbn.linen.recalibrate(model, variables, batches, train=True)
    kernels, states = linen_parts(new)
    check_all(states, exact(kernels, batches))


@pytest.mark.parametrize("door", ["linen", "nnx"])
def test_dropout_differs_from_batch_to_batch_and_not_from_run_to_run(door):
    """Of a constant input a dropout of half makes 0 and 2: with one mask for all batches channels would be 0 or 2."""
    batches = [np.ones((1, 64), np.float32) for _ in range(200)]
    if door == "linen":
        model = nn.Sequential([nn.Dropout(0.5, deterministic=False), nn.BatchNorm(False)])
        variables = model.init({"params": KEY, "dropout": KEY}, batches[0])

        def run():
            options = {"upstream": "recalibrated", "rngs": {"dropout": KEY}}
            return jbn.linen.recalibrate(model, variables, batches, **options)["batch_stats"]["layers_1"]["mean"]

    else:
        model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.BatchNorm(64, rngs=nnx.Rngs(0)))

        def run():
            return jbn.nnx.recalibrate(model, batches, upstream="recalibrated").layers[1].mean[...]

    mean = np.asarray(run())
    assert np.abs(mean - 1).max() < 5 / np.sqrt(len(batches))  # five standard errors of 0 or 2
    np.testing.assert_array_equal(mean, run())


# Hugging Face's RegNet of type "y" calls its blocks without ``deterministic``: 9 of its 12 norms evaluate in training.


class ConvLayer(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dense(C, use_bias=False)(x)
        return nn.silu(nn.BatchNorm(epsilon=EPSILON, name="normalization")(x, use_running_average=deterministic))


class YLayer(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        for _ in range(3):
            x = ConvLayer()(x)  # here the flag is lost
        return x


class RegNet(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        for i in range(3):
            x = ConvLayer(name=f"shortcut_{i}")(x, deterministic=deterministic)
            x = YLayer(name=f"stage_{i}")(x, deterministic=deterministic)
        return x


def test_a_flag_that_is_not_passed_on_is_the_first_finding():
    model, x = RegNet(), rows()
    variables = model.init(KEY, x)
    first, *others = jbn.linen.diagnose(model, variables, x, epsilon=EPSILON, deterministic=False).findings
    assert first.kind == "evaluates"
    assert first.message.startswith("9 of 12 layers evaluate in a training call")
    assert set(first.layers) == {f"stage_{i}/ConvLayer_{j}/normalization" for i in range(3) for j in range(3)}
    assert {finding.path for finding in others} == {f"shortcut_{i}/normalization" for i in range(3)}
    with pytest.warns(UserWarning, match="^9 of 12 layers keep their statistics") as caught:
        new = jbn.linen.recalibrate(model, variables, cut(x, *UNEVEN), deterministic=False)
    assert caught[0].filename == __file__
    layers = [(f"shortcut_{i}", *keys) for i in range(3) for keys in [(), *((f"ConvLayer_{j}",) for j in range(3))]]
    layers = [(f"stage_{name[-1]}", keys[0]) if keys else (name,) for name, *keys in layers]

    def at(tree, keys, name):
        for key in (*keys, name):
            tree = tree[key]
        return tree

    kernels = [at(new["params"], keys, "Dense_0")["kernel"] for keys in layers]
    stats = [at(new["batch_stats"], keys, "normalization") for keys in layers]
    idle = [i for i in range(12) if i % 4]
    want = exact(kernels, cut(x, *UNEVEN), idle, [(s["mean"], s["var"]) for s in stats])
    check_all(stats[::4], want[::4])
    for i in idle:
        np.testing.assert_array_equal([stats[i]["mean"], stats[i]["var"]], [np.zeros(C), np.ones(C)])


class Copied(nn.Module):
    """A norm copied from Flax, with code of its own."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1])
        if not train:
            return (x - mean.value[None]) / jnp.sqrt(var.value + EPSILON)[None]
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
            var.value = 0.9 * var.value + 0.1 * x.var(0)
        return (x - x.mean(0)[None]) / jnp.sqrt(x.var(0) + EPSILON)[None]


class Mixed(nn.Module):
    flax: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.silu(Copied(name="first")(nn.Dense(C, use_bias=False)(x), train))
        return nn.BatchNorm(not train, epsilon=EPSILON)(nn.Dense(C, use_bias=False)(x)) if self.flax else x


def test_a_copied_class_is_named_with_the_cure():
    model, x = Mixed(), rows()
    variables = model.init(KEY, x, False)
    diagnosis = jbn.linen.diagnose(model, variables, x, epsilon=EPSILON, train=True)
    assert diagnosis.findings[0].layers == ("first",)
    assert "also=(Class,)" in diagnosis.findings[0].message
    kernels = [variables["params"][f"Dense_{i}"]["kernel"] for i in range(2)]
    (seen,) = [layer for layer in diagnosis.layers if layer.count.any()]
    check_all([jbn.State(seen.batch_mean, seen.batch_var)], exact(kernels, [x])[1:])
    with pytest.raises(ValueError, match=r"^first gave no moments.*also=\(Class,\)"):
        jbn.linen.recalibrate(model, variables, [x], train=True)
    alone = Mixed(flax=False)
    with pytest.raises(ValueError, match=r"^first gave no moments.*also=\(Class,\)"):
        jbn.linen.diagnose(alone, alone.init(KEY, x, False), x, train=True)


def test_linen_refusals():
    model, x = Net(), rows()
    variables = model.init(KEY, x)
    refused = [
        ((3, variables), {}, TypeError, "model is of type int; expected a flax.linen.Module"),
        ((model, 3), {}, TypeError, "variables is of type int"),
        ((model, variables["params"]), {}, ValueError, "variables holds .*; expected batch_stats beside params"),
        ((model, variables), {"mutable": ["counts"]}, ValueError, r"mutable is \['counts'\]; expected batch_stats"),
        ((model, variables), {}, ValueError, "gave no moments: in this call they evaluate"),
        ((model, variables), {"trian": True}, TypeError, "trian"),
    ]
    for given, options, kind, message in refused:
        for tool, batch in ((jbn.linen.diagnose, x), (jbn.linen.recalibrate, [x])):
            with pytest.raises(kind, match=message):
                tool(*given, batch, **options)
    with pytest.raises(TypeError, match="expected an iterable of batches"):
        jbn.linen.recalibrate(model, variables, x, train=True)
    with pytest.raises(TypeError, match="can be read once"):
        jbn.linen.recalibrate(model, variables, iter([x]), train=True, upstream="recalibrated")


# NNX


def nnx_net(kind=nnx.BatchNorm):
    rngs = nnx.Rngs(0)
    layers = []
    for _ in range(3):
        layers += [nnx.Dropout(0.0, rngs=rngs), nnx.Linear(C, C, use_bias=False, rngs=rngs)]
        layers += [kind(C, epsilon=EPSILON, rngs=rngs), nnx.silu]
    return nnx.Sequential(*layers)


def nnx_parts(model):
    norms = model.layers[2::4]
    return [dense.kernel[...] for dense in model.layers[1::4]], [
        {"mean": norm.mean[...], "var": norm.var[...]} for norm in norms
    ]


def values(model, *kinds):
    return [np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
            for v in jax.tree.leaves(nnx.state(model, *kinds))]  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", [nnx.BatchNorm, jbn.nnx.BatchNorm])
def test_nnx(kind, mode):
    model, batches = nnx_net(kind), cut(rows(), *UNEVEN)
    getattr(model, mode)()
    norms, variables = model.layers[2::4], [norm.mean for norm in model.layers[2::4]]
    before = values(model)
    diagnosis = jbn.nnx.diagnose(model, rows(), epsilon=EPSILON)
    jax.tree.map(np.testing.assert_array_equal, before, values(model))
    assert [layer.path for layer in diagnosis.layers] == ["layers/2", "layers/6", "layers/10"]
    kept = values(model, nnx.Not(nnx.BatchStat))
    assert jbn.nnx.recalibrate(model, batches) is model
    jax.tree.map(np.testing.assert_array_equal, kept, values(model, nnx.Not(nnx.BatchStat)))
    assert all(type(norm) is kind and norm.mean is mean for norm, mean in zip(norms, variables, strict=True))
    assert {norm.use_running_average for norm in norms} == {mode == "eval"}
    assert {dropout.deterministic for dropout in model.layers[::4]} == {mode == "eval"}
    kernels, states = nnx_parts(model)
    check_all(states, exact(kernels, batches))
    check_all([jbn.State(layer.batch_mean, layer.batch_var) for layer in diagnosis.layers], exact(kernels, [rows()]))


@pytest.mark.parametrize("how", ["left in evaluation", "frozen"])
def test_nnx_layers_that_evaluate_are_named_and_kept(how):
    model, batches = nnx_net(jbn.nnx.BatchNorm), cut(rows(), *UNEVEN)
    if how == "frozen":
        jbn.nnx.freeze(model, "layers/6")
    else:
        model.layers[6].eval()
    assert jbn.nnx.diagnose(model, rows(), epsilon=EPSILON).findings[0].layers == ("layers/6",)
    with pytest.warns(UserWarning, match="^1 of 3 layers keep .*: layers/6"):
        jbn.nnx.recalibrate(model, batches)
    kernels, states = nnx_parts(model)
    want = exact(kernels, batches, [1], [(s["mean"], s["var"]) for s in states])
    check_all([states[0], states[2]], [want[0], want[2]])
    np.testing.assert_array_equal(states[1]["var"], np.ones(C))


def test_nnx_methods_and_refusals():
    class Encoder(nnx.Module):
        def __init__(self):
            self.net = nnx_net()

        def encode(self, x, factor):
            return self.net(factor * x)

    model, batches = Encoder(), cut(rows(), *UNEVEN)
    want = exact(nnx_parts(model.net)[0], [2 * x for x in batches])
    for method in ("encode", Encoder.encode, lambda model, x, factor: model.encode(x, factor)):
        jbn.nnx.recalibrate(model, batches, method=method, factor=2)
        check_all(nnx_parts(model.net)[1], want)
    with pytest.raises(TypeError, match="model is of type int; expected"):
        jbn.nnx.diagnose(3, rows())
    with pytest.raises(TypeError, match="expected an iterable of batches"):
        jbn.nnx.recalibrate(model, rows(), method="encode", factor=2)
    with pytest.raises(TypeError, match="factor"):
        jbn.nnx.recalibrate(model, batches, method="encode")


def test_nnx_subclasses_with_code_of_their_own_are_named():
    class Own(nnx.BatchNorm):
        def __call__(self, x):
            return super().__call__(x)

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(Own(C, rngs=rngs), nnx.BatchNorm(C, rngs=rngs))
    with jax.numpy_rank_promotion("allow"):
        found = jbn.nnx.diagnose(model, rows()).findings
        assert found[0].layers == ("layers/0",)
        with pytest.raises(ValueError, match=r"^layers/0 gave no moments"):
            jbn.nnx.recalibrate(model, [rows()])


@pytest.mark.parametrize("door", ["jbn", "jbn.linen", "jbn.nnx"])
def test_findings_name_the_tools_of_the_door_that_one_came_through(door):
    class Own(nnx.BatchNorm):
        def __call__(self, x):
            return super().__call__(x)

    x = rows()[:8] + 3
    if door == "jbn.nnx":
        model = nnx.Sequential(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), Own(C, rngs=nnx.Rngs(0)))
        with jax.numpy_rank_promotion("allow"):
            found = jbn.nnx.diagnose(model, x)
    else:
        model = Mixed()
        variables = model.init(KEY, x, False)
        found = jbn.linen.diagnose(model, variables, x, train=True)
    if door == "jbn":

        def apply(params, stats, x):
            given = {"params": params, "batch_stats": stats}
            with jbn.linen.replace():
                return model.apply(given, x, True, mutable=["batch_stats"])[1]["batch_stats"]

        found = jbn.diagnose(apply, variables["params"], variables["batch_stats"], x)
    messages = {finding.kind: finding.message for finding in found.findings}
    assert f" {door}.recalibrate." in messages["few values"]
    assert ("use diagnose of jbn.linen or jbn.nnx" in messages["foreign"]) == (door == "jbn")
    assert "jbn.recalibrate" not in Path(findings.__file__).read_text(encoding="utf-8")  # nor in any other finding
