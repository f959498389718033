"""What is measured of other people's models, on small ones."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer", reason="the runner is a command line")

from benchmarks import readme
from benchmarks.zoo import __main__ as runner
from benchmarks.zoo import kinks
from benchmarks.zoo import measure as measuring
from benchmarks.zoo.cases import Case
from benchmarks.zoo.linen import Linen, draw_variables
from benchmarks.zoo.measure import measure, misses

SHAPE = (64, 4)


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


class Small(nn.Module):
    """A dense layer, its norm, whose axis is the model's, and a second dense layer."""

    inside: type = float

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(not train, axis_name="batch")(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(y).astype(self.inside))


def build(inside=float):
    model = Small(inside)
    variables = draw_variables(model, SHAPE, train=False)
    calls = {"training": {"train": True}, "evaluation": {"train": False}}
    return Linen(model=model, variables=variables, shape=SHAPE, axis="batch", **calls)


def test_a_model_is_measured(monkeypatch):
    monkeypatch.setattr(measuring, "SEEDS", range(1))
    row = measure(Case("flax", "small", build))
    assert (row["reasons"], misses(row)) == ({}, [])
    figures = row["figures"]
    assert [figures[name]["norms"] for name in ("replace", "fold", "diagnose", "recalibrate", "freeze")] == [1] * 5
    assert figures["diagnose"]["values"] == 64
    assert 0 < figures["fold"]["error"] < 1e-6
    assert 1e-9 < figures["gradient"]["theirs"] < 1e-5
    assert runner.cells(row)[1:4] == ["1", "—", "1, 0"]
    for name, worse in (("gradient", {"ratio": 1.6}), ("freeze", {"norms": 0}), ("fold", {"error": 2e-5})):
        assert misses(row | {"figures": figures | {name: figures[name] | worse}}) == [name]
    for exact, missed in ((1e-5, []), (2e-5, ["fold"])):
        fold = figures["fold"] | {"error": 2e-5, "exact": exact, "own": 1.5e-5}
        assert misses(row | {"figures": figures | {"fold": fold}}) == missed


def test_what_cannot_be_measured_has_a_reason():
    row = measure(Case("no-such-package", "gone", lambda: [][0]))
    assert (row["version"], row["reasons"]) == ("not installed", {"build": "IndexError: list index out of range"})
    assert misses(row) == ["build"]
    assert runner.notes(row) == ["no-such-package/gone, build: IndexError: list index out of range"]


def test_a_model_that_is_not_float64_throughout_is_no_reference():
    with pytest.raises(ValueError, match="the model computes convert_element_type in float32 where all is float64"):
        measuring._gradient(build(jnp.float32))


def test_kinks_have_the_derivatives_of_another_place():
    def call(x):
        pool = jax.jit(lambda x: nn.max_pool(nn.relu6(x), (2,), (2,)))
        return (pool(x[None, :, None]).ravel() * np.ones(2, np.float32)).sum()  # with a constant array

    x, place = jnp.array([1.0, 2.0, 7.0, -1.0]), jnp.array([2.0, 1.0, 5.0, 4.0])
    relu, pool = kinks.record(call, x)
    assert (relu.tolist(), pool.ravel().tolist()) == ([[[1.0], [2.0], [7.0], [-1.0]]], [1.0, 2.0, 6.0, 0.0])
    there = kinks.record(call, place)
    moved = kinks.at(there, call)
    assert moved(x) == call(x) == 8
    assert jax.grad(call)(x).tolist() == [0, 1, 0, 0]
    assert jax.grad(moved)(x).tolist() == jax.grad(call)(place).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="1 ReLUs and max-pools fewer than in float64"):
        kinks.at([*there, relu], call)(x)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("raise SystemExit('gone')", "its process ended with status 1: SystemExit: gone"),
        ("import time; time.sleep(60)", "not done after 0.01 minutes for the model"),
    ],
)
def test_a_process_that_dies_leaves_its_figures(end, reason, tmp_path, monkeypatch):
    case = Case("flax", "a", build)
    known = {"figures": {"replace": 1, "fold": 2, "export": 3}, "reasons": {"freeze": "because"}}
    (tmp_path / "sitecustomize.py").write_text(f"print({json.dumps(json.dumps(known))}, flush=True); {end}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("benchmarks.zoo.catalogue.CASES", {case.name: case})
    row = runner.measure_apart(case.name, 60 if "raise" in end else 0.01)
    assert row["figures"] == known["figures"]
    assert row["reasons"] == known["reasons"] | dict.fromkeys(("gradient", "diagnose", "recalibrate"), reason)


def test_rows_of_other_versions_go(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "zoo.json")
    monkeypatch.setattr(runner.readme, "replace", lambda *_: None)
    cases = [Case("flax", "a", build), Case("flax", "b", build), Case("no-such-package", "c", build)]
    monkeypatch.setattr("benchmarks.zoo.catalogue.CASES", {case.name: case for case in cases})
    rows = [measure(Case(case.package, case.model, lambda: 1 / 0)) for case in cases]
    runner.RESULTS.write_text(json.dumps({"rows": [rows[0] | {"version": "0"}, rows[2] | {"version": "1"}]}))
    for row in rows[1:]:
        runner._write(row)
    found = json.loads(runner.RESULTS.read_text(encoding="utf-8"))
    assert [(row["model"], row["version"]) for row in found["rows"]] == [("b", cases[1].version), ("c", "1")]


def test_the_table_is_that_of_the_results():
    assert readme.between("zoo") == runner.markdown(json.loads(runner.RESULTS.read_text(encoding="utf-8")))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="holds something that is no environment of this program"):
        runner.environment.make(tmp_path, print)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
