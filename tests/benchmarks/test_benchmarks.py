"""The runner of the benchmarks: shapes of real models, turns that are fair, wrong answers that are not timed."""

import json
import os
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer", reason="the runner is a command line")

from typer.testing import CliRunner

import benchmarks.__main__ as runner
from benchmarks import forward, networks, readme, report, speed, studies
from benchmarks.layers import Layer
from benchmarks.peers import PEERS, Peer
from benchmarks.resnet50 import ResNet50, Sizes
from benchmarks.specs import OTHERS, RESNET50, Spec, batch_of
from benchmarks.timing import quartiles
from jbn.studies.timing import WARM, interleaved

SMALL = Spec("Small", (4, 4, 8))
JBN, FLAX = PEERS[:2]


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_shapes_are_those_of_a_resnet50():
    seen = Counter()

    def look(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            seen[args[0].shape[1:]] += 1
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(lambda x: ResNet50().init(jax.random.key(0), x, True), jnp.zeros((2, 224, 224, 3)))
    assert seen == {spec.example: spec.times for spec in RESNET50}
    assert seen.total() == 53


def test_a_batch_of_rows_is_a_long_one():
    assert {batch_of(spec, 32) for spec in OTHERS if len(spec.example) == 1} == {4096}
    assert {batch_of(spec, 32) for spec in (*RESNET50, *OTHERS) if len(spec.example) > 1} == {32}


def test_all_take_turns():
    order = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 6)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == WARM + 6
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert Counter(one[0] for one in rounds) == {"a": 3, "b": 3, "c": 3}
    assert {len(times) for times in found.values()} == {6}
    assert all((times > 0).all() for times in found.values())


def test_quartiles_have_the_median_in_the_middle():
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == [2.0, 3.0, 4.0]


def changed(peer: Peer, change) -> Peer:
    """Return a peer whose y is changed."""

    def make(*args) -> Layer:
        layer = peer.make(*args)

        def apply(params, state, x, train):
            y, new = layer.apply(params, state, x, train)
            return change(y), new

        return layer._replace(apply=apply)

    return peer._replace(name="Changed", make=make)


@pytest.mark.parametrize("dtype", speed.BOUNDS)
def test_a_wrong_answer_is_not_timed(dtype):
    lines = []
    off = changed(FLAX, lambda y: y * 1.1)
    broken = changed(FLAX, lambda y: 1 / 0)._replace(name="Broken")
    rows = speed.measure(SMALL, dtype, (JBN, FLAX, off, broken), batch=8, repeats=2, report=lines.append)
    assert [row["program"] for row in rows] == list(speed.FLOORS)
    for row in rows:
        assert set(row["seconds"]) == {"copy", "jbn", "Flax Linen"}
        assert set(row["ratio"]) == {"Flax Linen"}
        assert set(row["of_floor"]) == set(row["seconds"])
        assert all(cost > 0 for cost in (row["costs"]["jbn"][name] for name in ("trace_s", "compile_s")))
    assert lines[0] == f"Broken, Small 4×4×8, {dtype}: ZeroDivisionError: division by zero"
    assert [line.partition(": not timed, y is off by ")[0] for line in lines[1:]] == [
        f"Changed, Small 4×4×8, {dtype}, {program}" for program in speed.FLOORS
    ]


def test_a_wrong_gradient_is_not_timed():
    lines = []
    off = changed(FLAX, lambda y: y + 0.1 * (y - jax.lax.stop_gradient(y)))
    rows = speed.measure(SMALL, "float32", (JBN, off), batch=8, repeats=2, report=lines.append)
    assert ["Changed" in row["seconds"] for row in rows] == [True, False, True]
    assert len(lines) == 1
    assert "dx is off by" in lines[0]


@pytest.mark.parametrize(
    "peer",
    [pytest.param(p, id=p.name, marks=pytest.mark.skipif(bool(p.missing()), reason=str(p.missing()))) for p in PEERS],
)
@pytest.mark.parametrize("example", [(6,), (5, 6), (3, 4, 5, 6)], ids=str)
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")
def test_every_library_gets_rows_sequences_and_volumes(peer, example):
    lines = []
    rows = speed.measure(Spec("Small", example), "float32", (peer,), batch=8, repeats=1, report=lines.append)
    assert lines == []
    assert all(peer.name in row["seconds"] for row in rows)


def test_networks_agree_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(networks, "IMAGES", (2, 32, 32, 3))
    lines = []
    (row,) = networks.resnet50(1, lines.append, Sizes(width=4, stages=(1,), classes=10))
    assert lines == []
    assert set(row["seconds"]) == {"jbn", "jbn, ReLU inside", "Flax Linen"}
    assert set(row["ratio"]) == {"jbn", "Flax Linen"}
    steps = {
        name: (lambda loss=loss: ((loss,),), {}) for name, loss in (("jbn", 1.0), ("off", 1.01), ("Flax Linen", 1.0))
    }
    row = networks.timed(steps, 1, lines.append)
    assert lines == ["off: not timed, its loss is 1.01, Flax's 1.0"]
    assert set(row["seconds"]) == {"jbn", "Flax Linen"}


def test_a_mean_is_near_0_where_the_guard_would_not_sweep_again():
    mean, var = np.array([1e-3, -1.4, 1.4, 2.8, 1.5, -3.0, 0.1]), np.array([0.0, 1.0, 1.0, 4.0, 1.0, 4.0, 1e-4])
    np.testing.assert_array_equal(forward.is_near(mean, var), [True, True, True, True, False, False, False])
    found = {"near": [{"network": "net", "channels": 4, "near 0": n} for n in (4, 4, 3)]}
    found["near"].append({"network": "net", "channels": 8, "near 0": 7})
    assert report.near(found).startswith(
        "Every k is near 0 in 2 of the 4 norms of a network (net), and in 0 of its 1 of 8"
    )


@pytest.mark.parametrize("way", forward.WAYS)
def test_every_way_through_a_forward_pass_is_right(way):
    x = np.random.default_rng(0).standard_normal((4, 6, 6, 64), np.float32) + np.float32(0.5)
    wide = x.astype(np.float64)
    want = np.maximum((wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + forward.EPSILON), 0)
    for k in (0.45, 1.45):  # near 0, and where the running mean is far from it
        found = jax.jit(forward.WAYS[way])(x, jnp.full(64, k))
        np.testing.assert_allclose(found, want, atol=256 * np.finfo(np.float32).eps)


def run(*arguments):
    return CliRunner().invoke(runner.app, arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fast"], "'STUDY': got 'fast', expected layers, chains, resnet50, startup, eager, ensembles, imports, sums"),
        (["layers", "--dtype", "float64"], "'--dtype': got 'float64', expected float32, bfloat16"),
        (["layers", "--model", "VGG"], "'--model': got 'VGG', expected ResNet-50, "),
        (["layers", "--peer", "torch"], "'--peer': got 'torch', expected Flax Linen, "),
        (["--repeats", "0"], "'--repeats'"),
        (["--batch", "x"], "'--batch'"),
    ],
)
def test_wrong_options_are_named(arguments, told):
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.output


def test_a_run_is_printed_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    few = ("--batch", "2", "--repeats", "2", "--peer", "Flax Linen", "--model", "Small")
    monkeypatch.setattr(runner, "OTHERS", (SMALL,))
    result = run("layers", "--write", *few, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "Small 4×4×8 2 float32 forward and backward" in result.output
    result = run("eager", "--write", "--repeats", "1")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"{runner.machine()}.json"
    assert path.name.startswith("cpu-")
    assert set(found) == {"device", "versions", "layers", "eager"}
    assert [set(row["seconds"]) for row in found["layers"]] == [{"copy", "jbn", "Flax Linen"}] * 3
    assert {row["call"] for row in found["eager"]} == {"training", "gradient", "evaluation"}


def test_jbn_bench_is_the_runner_in_a_checkout(tmp_path, monkeypatch):
    from jbn.cli import commands
    from jbn.lab import bench_command

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands.app, ["bench", "layers", "--model", "VGG"])
    assert result.exit_code == 2
    assert "Try 'jbn bench --help' for help." in result.output
    assert "'--model': got 'VGG', expected ResNet-50, " in result.output
    # In this process: a signal that ends it leaves none that measures on.
    monkeypatch.setattr(runner, "imports", lambda repeats: [{"seconds": {"process": [0, os.getpid(), 0]}}])
    result = CliRunner().invoke(commands.app, ["bench", "imports", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert f"{os.getpid()}000.00" in result.output
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "jbn" / "lab" / "bench_command.py"))
    result = CliRunner().invoke(commands.app, ["bench"])
    assert result.exit_code == 2
    assert result.output == "jbn: the benchmarks are not installed with the package: run jbn bench in a checkout.\n"


TABLES = report.tables() | studies.tables()


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_pages_are_those_of_the_results(name):
    assert readme.between(name) == TABLES[name]


def test_a_machine_with_one_study_gets_its_tables(tmp_path, monkeypatch):
    there = {name: report.read(name) for name in (report.MACHINE, "passes")}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    few = {key: there[report.MACHINE][key] for key in ("versions", "layers")}
    for name, found in (("new", few), ("passes", there["passes"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    assert sorted(report.tables("new")) == ["layers", "specs", "speed", "speed-short"]
