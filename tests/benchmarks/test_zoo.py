"""What is measured of other people's models, on small ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("typer", reason="the runner is a command line")

from benchmarks.zoo import __main__ as runner
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
    monkeypatch.setattr(measuring, "SEEDS", range(2))
    row = measure(Case("flax", "small", build))
    assert (row["reasons"], misses(row)) == ({}, [])
    figures = row["figures"]
    assert [figures[name]["norms"] for name in ("replace", "fold", "diagnose", "recalibrate", "freeze")] == [1] * 5
    assert figures["diagnose"]["values"] == 64
    assert 0 < figures["fold"]["error"] < 1e-6
    assert 1e-9 < figures["gradient"]["theirs"] < 1e-5
    assert runner.cells(row)[1:4] == ["1", "—", "1, 0e+00"]
    for name, worse in (("gradient", {"ratio": 1.6}), ("freeze", {"norms": 0}), ("fold", {"error": 2e-5})):
        assert misses(row | {"figures": figures | {name: figures[name] | worse}}) == [name]


def test_what_cannot_be_measured_has_a_reason():
    row = measure(Case("no-such-package", "gone", lambda: [][0]))
    assert (row["version"], row["reasons"]) == ("none", {"build": "IndexError: list index out of range"})
    assert misses(row) == ["build"]
    assert runner.notes(row) == ["no-such-package/gone, build: IndexError: list index out of range"]


def test_a_model_that_is_not_float64_throughout_is_no_reference():
    with pytest.raises(ValueError, match="the model computes convert_element_type in float32 where all is float64"):
        measuring._gradient(build(jnp.float32))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="holds something that is no environment of this program"):
        runner.environment.make(tmp_path, print)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
