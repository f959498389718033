"""What the guide says about many devices: its recipes, the gradient trap, and the table beside other libraries."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

pytest.importorskip("rich", reason="the table is printed with rich")

import jbn
from benchmarks import devices, readme
from benchmarks.peers import PEERS, Lacking
from tests.support import oracle

GUIDE = (readme.ROOT / "docs" / "guides" / "many_devices.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
N, C = 8, 5
JBN = PEERS[0]


@pytest.fixture
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def recipes():
    """Run the examples, and return what each leaves behind."""
    left: list[dict[str, object]] = [{} for _ in BLOCKS]
    for block, scope in zip(BLOCKS, left, strict=True):
        exec(block, scope)
    return left


def test_the_recipes_agree_with_one_device():
    by_jit, by_shard_map, *_ = recipes()  # those of Flax are asserted where they stand
    x = np.asarray(by_jit["x"])
    assert not by_jit["x"].sharding.is_fully_replicated

    def loss(params):
        y, new = jbn.bn_forward(params, by_jit["state"], x, True)
        return jnp.mean(jnp.tanh(y - 1) ** 2), new

    grads, moved = jax.jit(jax.grad(loss, has_aux=True))(by_jit["params"])
    trained = jax.tree.map(lambda p, g: p - 0.1 * g, by_jit["params"], grads)
    assert all(np.abs(g).min() > 1e-3 for g in grads)
    for found in (by_jit, by_shard_map):
        got = found["trained"], found["moved"]
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((trained, moved)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
            assert a.sharding.is_fully_replicated


def test_the_groups_of_the_recipe():
    *_, found = recipes()
    x = np.asarray(found["x"])
    want = np.concatenate([oracle.forward(part).y for part in x.reshape(-1, 4, x.shape[-1])])
    np.testing.assert_allclose(found["y"], want, atol=1e-5)
    np.testing.assert_allclose(found["moved"].mean, 0.01 * x.mean(0, np.float64), rtol=1e-5)


# The rows of the guide: what is averaged, in which transform, and what it makes of the gradient.
TRAP = [
    ("local loss, `pmean` of gradients", "`pmap`", "1"),
    ("local loss, `pmean` of gradients", "`shard_map(check_vma=False)`", "1"),
    ("local loss, `pmean` of gradients", "`shard_map`", "n"),
    ("`pmean` of loss", "`shard_map`", "1"),
    ("`pmean` of loss", "`shard_map(check_vma=False)`", "differs between devices"),
]


@pytest.mark.parametrize(("step", "over", "factor"), TRAP, ids=lambda value: value.replace("`", ""))
def test_the_gradient_trap(step, over, factor):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((N, 6, C)) + np.arange(N)[:, None, None]).astype(np.float32)
    params, state = jbn.Params(*(rng.uniform(0.5, 1.5, C).astype(np.float32) for _ in range(2))), jbn.bn_init(C)[1]

    def loss(params, x, axis_name="data"):
        y, _ = jbn.bn_forward(params, state, x, True, axis_name=axis_name)
        return jnp.mean(jnp.tanh(y - 1) ** 2)

    def gradients(params, x):
        if step.startswith("local"):
            return lax.pmean(jax.grad(loss)(params, x), "data")
        return jax.grad(lambda params: lax.pmean(loss(params, x), "data"))(params)

    if over == "`pmap`":
        found = jax.pmap(gradients, axis_name="data", in_axes=(None, 0))(params, x)
    else:
        by_device = partial(jax.tree.map, lambda g: g[None])
        f = jax.shard_map(
            lambda params, x: by_device(gradients(params, x)), mesh=Mesh(jax.devices()[:N], ("data",)),
            in_specs=(P(), P("data")), out_specs=P("data"), check_vma="False" not in over,
        )  # fmt: skip
        found = jax.jit(f)(params, x.reshape(-1, C))
    want = jax.grad(partial(loss, axis_name=None))(params, x.reshape(-1, C))
    for got, one in zip(found, want, strict=True):
        assert got.shape == (N, C)
        if factor == "differs between devices":
            assert (np.std(got, axis=0) > 0.1 * np.abs(one)).all()
        else:
            times = N if factor == "n" else 1
            np.testing.assert_allclose(got, times * np.broadcast_to(one, got.shape), rtol=1e-4, atol=1e-6)
    assert f"| {step} | {over} | {factor} |\n" in GUIDE


def test_every_row_of_the_trap_is_pinned():
    table = GUIDE.partition("| factor |\n")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == 1 + len(TRAP)


def test_the_guide_shows_what_was_measured():
    found = json.loads(devices.RESULTS.read_text(encoding="utf-8"))
    assert readme.between("devices") == devices.markdown(found)
    assert found["columns"][0]["library"] == "jbn"
    assert [*found["columns"][0]["cases"]] == [case.name for case in devices.CASES]


# Everything else in jbn's column is exact.
OURS = {
    "no axis name, `shard_map`": "ValueError *",
    "no axis name, `shard_map(check_vma=False)`": "states differ",
    "misspelt axis name, `shard_map`": "ValueError *",
    "misspelt axis name, `pmap`": "ValueError *",
}


@pytest.mark.parametrize("case", devices.CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("_broadcast")
def test_our_column(case):
    assert devices.shown(devices.measure(JBN, case)) == OURS.get(case.name, "exact")


def test_the_reference_of_the_table():
    x, g, mask = devices.batch(valid=devices.ONE_EMPTY, nan=True)
    got, want, grads = devices.exact(x, g, mask), oracle.forward(x, mask=mask), oracle.gradients(g, x, mask=mask)
    pairs = (got.y, want.y), (got.mean, want.mean), (got.var, want.var), (got.dx, grads["x"])
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(got.dscale, oracle.gradients(g, x, np.ones(x.shape[-1]), mask=mask)["scale"], atol=1e-12)


def test_the_reference_of_groups():
    case = next(case for case in devices.CASES if case.groups == devices.HALVES)
    x, g, _ = case.batch
    halves = [devices.exact(*part, None) for part in zip(np.split(x, 2), np.split(g, 2), strict=True)]
    want = devices.expected(case)
    np.testing.assert_array_equal(want.y, np.concatenate([half.y for half in halves]))
    np.testing.assert_array_equal(want.dscale, halves[0].dscale + halves[1].dscale)
    np.testing.assert_allclose(want.mean, x.mean((0, 1, 2), np.float64))


@pytest.mark.usefixtures("_broadcast")
def test_the_table_sees_what_is_wrong(monkeypatch):
    """A library that is wrong in one of the things measured is not exact."""
    case = devices.CASES[1]
    good = devices.found(JBN, case)
    for field in good._fields:
        wrong = good._replace(**{field: getattr(good, field) * 1.0001})
        monkeypatch.setattr(devices, "found", lambda *_, wrong=wrong: wrong)
        assert re.fullmatch(r"\de-0\d", devices.shown(devices.measure(JBN, case))), field
    torn = good.mean + np.arange(devices.DEVICES)[:, None]
    monkeypatch.setattr(devices, "found", lambda *_: good._replace(mean=torn))
    assert devices.shown(devices.measure(JBN, case)) == "states differ"


def test_what_a_library_lacks():
    keras = next(peer for peer in PEERS if peer.name == "Keras")
    with pytest.raises(Lacking, match="TensorFlow"):
        keras.layer(4, axis_name="data")
    assert devices.shown({}) == "—"
