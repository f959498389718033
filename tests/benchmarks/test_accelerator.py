"""The command for GPUs and TPUs, on a CPU: small batches, and what is wrong is not timed."""

import json
from types import SimpleNamespace

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import jbn.linen
from benchmarks import accelerator
from benchmarks.accelerator import FLOORS, PROGRAMS, Case, drawn, exact, in_jax, measure, wrong
from benchmarks.specs import LARGE, Spec
from benchmarks.speed import BOUNDS

SMALL = Spec("small", (3, 3, 8))
each = pytest.mark.parametrize("added", [False, True])


@each
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm], ids=["jbn", "Flax"])
def test_every_program_gives_what_float64_gives(norm, dtype, added):
    data = drawn(Case(SMALL, 64, dtype, added))
    made = in_jax(norm, data)
    for program, right in exact(data).items():
        assert set(right) == {"y"} | ({"dx"} | ({"dr"} if added else set()) if "backward" in program else set())
        assert wrong(made[program].answer(), right, BOUNDS[dtype]) is None


@each
def test_what_is_wrong_is_told_and_not_timed(added, monkeypatch):
    class Other(nn.BatchNorm):
        def __call__(self, x, **options):
            return super().__call__(x, **options) * jnp.asarray(1.01, x.dtype)

    monkeypatch.setattr(accelerator.nn, "BatchNorm", Other)
    told = []
    rows = measure(Case(SMALL, 4, "float32", added), repeats=2, report=told.append)
    assert [row["program"] for row in rows] == list(PROGRAMS)
    for row, passes in zip(rows, FLOORS[added], strict=True):
        assert set(row["seconds"]) == set(row["of_floor"]) == {"copy", "jbn"}
        assert row["passes"] == passes
    assert len(told) == 3
    assert all("Flax Linen, small" in line and "not timed, y is off" in line for line in told)


def test_what_has_a_nan_is_wrong():
    right = {"y": np.ones((2, 3))}
    assert wrong({"y": np.array([[1, 1, np.nan], [1, 1, 1]])}, right, 1e-4)
    assert wrong(right, right, 1e-4) is None


def test_shapes_above_and_below_100_mb_come_in_both_dtypes():
    found = list(accelerator.cases(LARGE))
    sizes = {case: case.batch * np.prod(case.spec.example) * jnp.dtype(case.dtype).itemsize for case in found}
    for dtype in BOUNDS:
        some = [sizes[case] for case in found if case.dtype == dtype]
        assert min(some) < 100e6 < max(some)
    assert len(set(found)) == len(found)


def test_what_does_not_fit_into_the_time_is_told_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "RESULTS", tmp_path)
    monkeypatch.setattr(accelerator, "cases", lambda batch: iter([Case(SMALL, batch, "float32", False)] * 2))
    clock = iter([0.0, 0.0, 500.0, 500.0])
    monkeypatch.setattr(accelerator, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    app = accelerator.typer.Typer()
    app.command()(accelerator.main)
    done = CliRunner().invoke(app, ["--batch", "4", "--repeats", "2", "--write"])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["program"] for row in found["layers"]] == list(PROGRAMS)
    assert found["left_out"] == [Case(SMALL, 4, "float32", False).name, "training step of a ResNet-50"]
