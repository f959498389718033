"""The other batch norms: each adapter gives right answers where that is easy, so that no table reports wrong ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

pytest.importorskip("rich", reason="the tables are printed with rich")

from benchmarks import costs, exactness, readme
from benchmarks.layers import MOMENTUM
from benchmarks.peers import PEERS, installed
from jbn.version import install
from tests.support import oracle

# What a library calls although it is deprecated is not for this library to mend.
pytestmark = [pytest.mark.filterwarnings(f"default::{kind}Warning") for kind in ("Deprecation", "Future", "User")]
SHAPE = (16, 6, 5, 8)
X, G, LATER = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
JBN = PEERS[0]


def those(peers):
    return [
        pytest.param(peer, id=peer.name, marks=pytest.mark.skipif(bool(peer.missing()), reason=str(peer.missing())))
        for peer in peers
    ]


each = pytest.mark.parametrize("peer", those(PEERS))
each_of_jax = pytest.mark.parametrize("peer", those(peer for peer in PEERS if peer.make))


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


@each
def test_training(peer):
    y, dx = peer.norm(8).train(X, G)
    assert np.abs(y - oracle.forward(X).y).max() <= 1e-5
    assert np.abs(dx - oracle.gradients(G, X)["x"]).max() <= 1e-5


@each
def test_evaluation(peer):
    mean, var = (np.linspace(1, 2, 8, dtype=np.float32) * factor for factor in (1, 3))
    y = peer.norm(8).evaluate(X, mean, var)
    assert np.abs(y - oracle.forward(X, stats=(mean, var)).y).max() <= 1e-5


@each
def test_running_mean(peer):
    first, second = (oracle.moments(x)[1] for x in (X, LATER))
    want = (1 - MOMENTUM) * (MOMENTUM * first + second)
    want = want / (1 - MOMENTUM**2) if peer.debiased else want
    assert np.abs(peer.norm(8).running_mean([X, LATER]) - want).max() <= 1e-6


@each_of_jax
def test_the_layer_whose_costs_are_counted(peer):
    layer = peer.layer(8, jnp.bfloat16, activation=jax.nn.relu)
    x = jnp.asarray(np.moveaxis(X, -1, peer.axis), jnp.bfloat16)
    assert x.shape == peer.images(jax.ShapeDtypeStruct(SHAPE, x.dtype)).shape
    y, state = layer.apply(layer.params, layer.state, x, True)
    want = oracle.forward(np.moveaxis(np.asarray(x), peer.axis, -1), activation=jax.nn.relu).y
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.moveaxis(np.asarray(y, np.float64), peer.axis, -1) - want).max() <= 0.02
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [leaf.dtype for leaf in jax.tree.leaves(layer.state)]
    assert {leaf.dtype for leaf in jax.tree.leaves(layer.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("peer", those(peer for peer in PEERS if peer.across_shards))
def test_statistics_across_shards(peer):
    layer = peer.layer(8, axis_name="data")

    def both(state, x, g):
        y, pull = jax.vjp(lambda x: layer.apply(layer.params, state, x, True)[0], x)
        return y, *pull(g)

    over = Mesh(jax.devices()[:8], ("data",))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P("data"), "check_vma": peer.name != "Equinox"}
    arranged = (np.moveaxis(array, -1, peer.axis) for array in (X, G))
    found = jax.jit(jax.shard_map(both, mesh=over, **specs))(layer.state, *arranged)
    y, dx = (np.moveaxis(np.asarray(array), peer.axis, -1) for array in found)
    assert np.abs(y - oracle.forward(X).y).max() <= 1e-5
    assert np.abs(dx - oracle.gradients(G, X)["x"]).max() <= 1e-5


def test_the_reference_of_the_table():
    y, dx = exactness.exact(X, G)
    np.testing.assert_allclose(y, oracle.forward(X).y, atol=1e-12)
    np.testing.assert_allclose(dx, oracle.gradients(G, X)["x"], atol=1e-12)


def test_ours():
    assert exactness.in_training(JBN.norm(exactness.SHAPE[-1]), 1e5)[0] <= 4e-6
    assert costs.kept(JBN, costs.SMALL) <= 1.01
    forward, both, checked = costs.synchronized(JBN)
    assert checked
    assert (len(forward.collectives), len(forward.guarded_collectives), len(both.collectives)) == (1, 1, 2)


@pytest.mark.parametrize("module", [costs, exactness], ids=["costs", "exactness"])
def test_the_pages_show_what_was_measured(module):
    found = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    name = module.__name__.rpartition(".")[2]
    assert readme.between(name) == module.markdown(found)
    assert readme.between(f"{name}-short") == module.short(found)
    assert found["rows"][0]["library"] == "jbn"


def test_a_missing_library_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines: list[str] = []
    assert installed(lines.append) == []
    assert len(lines) == len(PEERS)
    assert all(line.endswith(install("peers")) and "\n" not in line for line in lines)


@pytest.mark.parametrize("module", [costs, exactness], ids=["costs", "exactness"])
def test_half_a_table_is_not_written(module, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["benchmark", "--write"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "pip install" in capsys.readouterr().err
