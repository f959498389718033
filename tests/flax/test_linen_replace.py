"""``jbn.linen.replace``: bit for bit what the same model does that is written so."""

import dataclasses
import warnings
from contextlib import ExitStack
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from jbn.linen import freeze, replace
from jbn.linen.replacing import OPTIONS
from tests.flax.test_linen_transforms import X, ensemble, layers, run, shared_batch, shared_module, wrapped

MINE, THEIRS = jbn.linen.BatchNorm, nn.BatchNorm
ROWS = X[0]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), a, b)


def inside(contexts, function, *args):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return function(*args)


def nested(norm):
    """Modules in modules, in both styles."""

    class Block(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            self.bns = [norm(use_running_average=False, name="first"), norm(use_running_average=False)]

        def __call__(self, x):
            for bn in self.bns:
                x = bn(self.dense(x))
            return x

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Sequential([nn.Dense(4), norm(use_running_average=False), nn.relu])(x[0])
            return nn.jit(Block)(name="jitted")(nn.remat(Block)()(x))

    return Model()


MODELS = {
    "vmap ensemble": ensemble, "vmap shared": shared_batch, "scan": layers, "remat": wrapped(nn.remat),
    "jit": wrapped(nn.jit), "shared module": shared_module, "nested": nested,
}  # fmt: skip
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@models
def test_a_model_computes_as_if_it_were_written_with_jbn(make):
    go = jax.jit(run, static_argnums=0)
    theirs = make(THEIRS)
    variables = theirs.init(jax.random.key(1), X)
    with replace():
        got = go(make(THEIRS), X)
    same(got, go(make(MINE), X))
    same(got[0], variables)


@pytest.mark.parametrize(
    "options",
    [
        {"use_scale": False},
        {"use_bias": False, "axis": (1, 2)},
        {"axis": 0, "dtype": jnp.bfloat16, "epsilon": 1e-2, "use_fast_variance": False},
        {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.uniform()},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("train", [True, False])
def test_fields_are_kept_and_variables_are_flax_s(options, train):
    layer = THEIRS(not train, **options)
    variables = jax.tree.map(lambda v: v + jnp.asarray(0.5, v.dtype), layer.init(jax.random.key(3), X))
    with replace():
        again = layer.init(jax.random.key(3), X)
        got = layer.apply(variables, X, mutable=["batch_stats"])
    want = layer.init(jax.random.key(3), X)
    same(again, want)
    assert [list(v) for v in again.values()] == [list(v) for v in want.values()]
    same(got, MINE(not train, **options).apply(variables, X, mutable=["batch_stats"]))


def test_the_flag_is_merged_as_flax_does_and_a_mask_is_taken():
    variables = THEIRS(False).init(jax.random.key(0), ROWS)
    options = {"mask": np.arange(16)[:, None] % 3 > 0, "mutable": ["batch_stats"]}
    x = jnp.where(options["mask"], ROWS, jnp.nan)
    for field, arguments in [(None, (True,)), (None, (False,)), (True, ()), (False, ())]:
        with replace():
            got = THEIRS(field).apply(variables, x, *arguments, **options)
        same(got, MINE(field).apply(variables, x, *arguments, **options))
    for field, arguments in [(None, ()), (True, (True,)), (True, (False,))]:
        with pytest.raises(ValueError, match="use_running_average") as theirs:
            THEIRS(field).apply(variables, ROWS, *arguments)
        with replace(), pytest.raises(type(theirs.value)) as ours:
            THEIRS(field).apply(variables, ROWS, *arguments)
        assert str(ours.value) == str(theirs.value)


class Renamed(nn.BatchNorm):
    """A subclass with other defaults and a field of its own."""

    momentum: float = 0.5
    note: str = ""


class Own(nn.BatchNorm):
    """A subclass with its own code, which calls Flax's."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x, use_running_average)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for norm in (THEIRS, Renamed, MINE, nn.remat(Own), Own):
            x = norm(use_running_average=False)(x)
        return x


def test_it_reports_each_layer_once_as_it_is_met():
    with replace() as replaced:
        assert replaced == jbn.linen.Found((), ())
        model = nested(THEIRS)
        model.apply(model.init(jax.random.key(0), X), X, mutable=["batch_stats"])
        blocks = [f"{block}/{name}" for block in ("CheckpointBlock_0", "jitted") for name in ("first", "bns_1")]
        assert replaced.paths == ("BatchNorm_0", *blocks)  # created in the model, handed to Sequential
        assert replaced.skipped == ()


def test_subclasses_with_code_of_their_own_keep_it():
    variables = Mixed().init(jax.random.key(0), ROWS)
    with replace() as replaced:
        same(Mixed().init(jax.random.key(0), ROWS), variables)
        got, new = Mixed().apply(variables, ROWS, mutable=["batch_stats"])
        one = Own(False).apply(Own(False).init(jax.random.key(0), ROWS), ROWS, mutable=["batch_stats"])
    assert replaced.paths == ("BatchNorm_0", "Renamed_0", "BatchNorm_1")
    assert replaced.skipped == ("CheckpointOwn_0", "Own_0", "")
    same(one, Own(False).apply(Own(False).init(jax.random.key(0), ROWS), ROWS, mutable=["batch_stats"]))
    np.testing.assert_allclose(new["batch_stats"]["Renamed_0"]["var"], 0.5 + 0.5 * 1, rtol=1e-4)
    assert got.shape == ROWS.shape


VALUES = {
    "momentum": 0.3, "epsilon": 0.1, "dtype": jnp.bfloat16, "axis_name": "batch",
    "axis_index_groups": ((0, 1), (2,)), "activation": nn.relu, "group_size": 4, "unbiased": True,
    "normalize_by": jbn.renorm(1.5, 0.1),
    "sow_moments": True,
}  # fmt: skip


@pytest.mark.parametrize("norm", [THEIRS, MINE], ids=["Flax's", "jbn's"])
@pytest.mark.parametrize("option", OPTIONS)
def test_overrides_reach_every_layer(option, norm):
    overrides = {option: VALUES[option]} | ({"axis_name": "batch"} if option == "axis_index_groups" else {})
    variables = norm(False).init(jax.random.key(0), ROWS)

    def apply(layer):
        mutable = ["batch_stats", "intermediates"]
        return jax.vmap(lambda x: layer.apply(variables, x, mutable=mutable), axis_name="batch")(X)

    with replace(**overrides) as replaced:
        got = apply(norm(False))
    assert replaced.paths == ("",)
    same(got, apply(MINE(False, **overrides)))
    with pytest.raises(AssertionError):
        same(got, apply(MINE(False)))


def test_what_it_may_set_are_fields_that_no_variable_depends_on():
    assert set(VALUES) == set(OPTIONS)
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(MINE)}
    with (
        pytest.raises(TypeError, match=r"replace\(\) got axis, eps; expected overrides named momentum, epsilon, dtype"),
        replace(momentum=0.5, eps=1e-3, axis=0),
    ):
        raise AssertionError


def moved(layer=None, x=ROWS):
    """Return the statistics after a step; with ``replace(momentum=0.0)`` they are those of the batch."""
    layer = layer or THEIRS(False)
    return layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])[1]["batch_stats"]


def test_it_ends_with_its_block_for_compiled_functions_too():
    before, inside = jax.jit(moved), jax.jit(lambda: moved())
    flax_s = before()
    with replace(momentum=0.0):
        ours = inside()
        same(before(), ours)
    assert np.abs(ours["mean"] - flax_s["mean"]).max() > 0.1
    same(inside(), flax_s)
    same(before(), flax_s)
    with replace(momentum=0.0):
        same(inside(), ours)
    with pytest.raises(KeyError), replace(momentum=0.0):
        raise KeyError
    same(jax.jit(lambda: moved())(), flax_s)


class Times:
    """A function that is equal to itself alone, and has no hash; its text says nothing of its number."""

    __hash__ = None

    def __init__(self, number):
        self.number = number

    def __call__(self, z):
        return z * self.number

    def __repr__(self):
        return "Times"


def test_overrides_that_have_no_hash_are_told_apart_and_those_that_are_equal_compile_once():
    traced = []

    @jax.jit
    def go(variables):
        traced.append(1)
        return THEIRS(True).apply(variables, ROWS)

    variables = THEIRS(True).init(jax.random.key(0), ROWS)
    plain = MINE(True).apply(variables, ROWS)
    for number in (1.0, 2.0):
        with replace(activation=Times(number), momentum=0.0):
            np.testing.assert_allclose(go(variables), number * plain, rtol=1e-6)
    traced.clear()
    for _ in range(2):
        with replace(axis_index_groups=[[0, 1], [2, 3]], momentum=jnp.float32(0.5)):
            go(variables)
    assert len(traced) == 1


def test_the_innermost_decides():
    plain = moved()
    with replace(momentum=0.0) as outer:
        ours = moved()
        with replace(momentum=0.99, epsilon=10.0) as inner:
            np.testing.assert_allclose(moved()["mean"], plain["mean"], rtol=1e-5)
        same(moved(), ours)
    assert inner == outer == jbn.linen.Found(("",), ())


def test_an_error_inside_a_layer_ends_there():
    with replace(momentum=0.0):
        ours = moved()
        with pytest.raises(TypeError, match="x has dtype int32"):
            moved(x=jnp.ones((4, 4), int))
        same(moved(), ours)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nn.Dense(2).init(jax.random.key(0), ROWS), r"met no flax.linen.BatchNorm\. It acts on what is called"),
        (lambda: None, r"replace\(\) met no flax.linen.BatchNorm\. "),
        (partial(moved, Own(False)), r"Norms of other classes, which keep their own code, are ; see also\."),
    ],
    ids=["no norm", "no call", "only subclasses"],
)
def test_it_warns_where_it_met_nothing(call, words):
    with pytest.warns(UserWarning, match=words) as caught, replace(momentum=0.375):  # as no other test has it
        call()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("context", [replace, freeze])
def test_it_does_not_warn_while_an_exception_is_under_way(context):
    with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyError), context():
        raise KeyError
    assert not caught


def test_intermediates_and_tables_are_those_of_the_model():
    options = {"capture_intermediates": True, "mutable": ["batch_stats", "intermediates"]}
    model = nested(THEIRS)
    variables = model.init(jax.random.key(0), X)
    with replace():
        got = model.apply(variables, X, **options)[1]["intermediates"]
        table = nn.tabulate(model, jax.random.key(0))(X)
    want = model.apply(variables, X, **options)[1]["intermediates"]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert table == nn.tabulate(model, jax.random.key(0))(X)


@pytest.mark.parametrize("inner", [True, False])
def test_other_interceptors_see_the_layers(inner):
    seen = []

    def watch(call, args, kwargs, context):
        if context.method_name == "__call__":
            seen.append((type(context.module), context.module.path))
        return call(*args, **kwargs)

    inside([replace(), nn.intercept_methods(watch)][:: 1 if inner else -1], moved)
    assert [issubclass(kind, MINE) for kind, _ in seen] == ([True] * 2 if inner else [False, True] * 2)
    assert {path for _, path in seen} == {()}
