"""The self-test passes here, and each of its rows fails where what it checks is broken."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jbn
from jbn.checking import check as checking
from jbn.checking.check import check
from jbn.checking.report import Report, Row
from tests.support import oracle

MEASURES = ("y", "mean and variance", "gradient of x", "gradients of scale, bias")
TRAINED = ("float32, mean/std 0", "float32, mean/std 10⁴", "bfloat16, mean/std 0", "bfloat16, mean/std 10²")
SYNCHRONIZED = ("jit over 2 devices", "shard_map over 2 devices")
COMPARED = (*TRAINED, "NaN under a mask", *SYNCHRONIZED)


def rows(checks, *of):
    return {f"{name}: {one}" for name in checks for one in of}


ROWS = (
    rows(["arithmetic"], "1/n", "rsqrt")
    | rows(COMPARED, *MEASURES)
    | rows(TRAINED, "wrong dtypes")
    | rows(["running statistics"], "mean and variance")
    | rows(["evaluation, mean/std 10⁴"], "y", "change of the state")
    | rows(["a second eager call"], "compilations")
    | rows(SYNCHRONIZED, "collectives")
    | (PASSES := rows(["passes, BN+ReLU, float32"], "forward", "forward and backward"))
)
UNBOUNDED = rows(["arithmetic"], "1/n", "rsqrt")
if checking._target(jax.devices()[0]) not in checking._PASSES:  # before jax 0.10
    UNBOUNDED |= PASSES


def test_all_devices_pass():
    report = check()
    assert report.passed
    assert {row.name.replace("over 8 devices", "over 2 devices") for row in report.rows} == ROWS
    assert {row.name for row in report.rows if row.verdict == "measured"} == UNBOUNDED
    assert {row.verdict for row in report.rows} == {"passed", "measured"}
    assert report.verdict == f"passed: {len(ROWS - UNBOUNDED)} checks"


def test_one_device_passes_and_says_what_it_cannot_check(x64):
    report = check(devices=jax.devices()[3:4])
    assert report.passed
    skipped = [(row.name, row.note) for row in report.rows if row.verdict == "skipped"]
    assert skipped == [("jit over devices", "one device"), ("shard_map over devices", "one device")]
    assert report.verdict.endswith(
        "; skipped: jit over devices (one device); skipped: shard_map over devices (one device)"
    )


def test_the_text_is_a_table():
    table = (
        Row("training", "y", 3.14e-7, 4e-6, "passed", "absolute"),
        Row("training", "dx", float("nan"), 1e-5, "failed", ""),
        Row("shards", "", None, None, "skipped", "one device"),
    )
    assert repr(Report(("jbn 1", "one"), table)) == (
        "jbn 1\n"
        "one\n"
        "          measured  bound\n"
        "training\n"
        "  y        3.1e-07  4e-06  passed   absolute\n"
        "  dx           nan  1e-05  failed\n"
        "shards                     skipped  one device\n"
        "FAILED: 1 of 2 checks: training: dx; skipped: shards (one device)"
    )


def test_the_heading_tells_versions_and_devices():
    versions, devices = checking._heading(jax.devices()[:2])
    assert f"jbn {jbn.__version__}, jax {jax.__version__}, jaxlib " in versions
    assert devices == "2 devices: cpu, cpu"


# Each breaks bn_forward, and says which rows must fail.


def epsilon(params, state, x, train, **options):
    return jbn.bn_forward(params, state, x, train, **options | {"epsilon": 1e-3})


def swapped(params, state, x, train, **options):
    y, new = jbn.bn_forward(params, state, x, train, **options)
    return y, jbn.State(new.var, new.mean)


def momentum_forgotten(params, state, x, train, **options):
    return jbn.bn_forward(params, state, x, train, **options | {"momentum": 0.0})


def unmasked(params, state, x, train, **options):
    return jbn.bn_forward(params, state, x, train, **options | {"mask": None})


def constant_parameters(params, state, x, train, **options):
    return jbn.bn_forward(lax.stop_gradient(params), state, x, train, **options)


def slope_too_large(params, state, x, train, **options):
    y, new = jbn.bn_forward(params, state, x, train, **options)
    valid = jnp.where(jnp.isfinite(x), x, 0)
    steep = 0.01 * (valid - lax.stop_gradient(valid)).astype(y.dtype)
    return y if "activation" in options else y + steep, new


def axis_forgotten(params, state, x, train, **options):
    return jbn.bn_forward(params, state, x, train, **options | {"axis_name": None})


def shards_weighted_equally(params, state, x, train, **options):
    """Add a collective to every step over devices as well."""
    y, new = jbn.bn_forward(params, state, x, train, **options)
    if "activation" in options:
        return y, new
    total = y.sum()  # after the statistics, so that no collective can carry both
    if axis := options.get("axis_name"):
        mine = jbn.moments(x, mask=options["mask"])
        new, total = jbn.State(*lax.pmean((mine.mean, mine.var), axis)), lax.psum(total, axis)
    return y + 1e-30 * total, new


def several(params, state, x, train, **options):
    """Break what has a row of its own: dtypes, evaluation, what is compiled once, sweeps."""
    if activation := options.get("activation"):
        options["activation"] = lambda z: activation(z)
        options["activation"].arrays = jnp.ones(1)  # not plain code any more
        return jbn.bn_forward(params, state, lax.optimization_barrier(x + 1), train, **options)
    if not train:
        slope = params.scale * lax.rsqrt(state.var + options["epsilon"])
        return x * slope + (params.bias - state.mean * slope), jbn.State(state.mean + 1, state.var)
    y, new = jbn.bn_forward(params, state, x, train, **options)
    return y, jax.tree.map(lambda value: value.astype(jnp.bfloat16), new)


def wide(params, state, x, train, **options):
    return jbn.bn_forward(params, state, x, train, **options, dtype=jnp.float32)


BROKEN = {
    epsilon: rows(COMPARED, "y", *MEASURES[2:]) | {"evaluation, mean/std 10⁴: y"},
    momentum_forgotten: rows(["running statistics"], "mean and variance"),
    swapped: rows((*COMPARED, "running statistics"), "mean and variance")
    | {"evaluation, mean/std 10⁴: change of the state"},
    unmasked: rows(COMPARED[4:], *MEASURES),
    constant_parameters: rows(COMPARED, "gradients of scale, bias"),
    slope_too_large: rows(COMPARED, "gradient of x"),
    axis_forgotten: {"shard_map over devices"},
    shards_weighted_equally: rows(SYNCHRONIZED, "collectives") | {"shard_map over 2 devices: mean and variance"},
    wide: rows(TRAINED[2:], "wrong dtypes"),
    several: rows(TRAINED, "wrong dtypes")
    | rows(["evaluation, mean/std 10⁴"], "y", "change of the state")
    | (PASSES - UNBOUNDED)
    | {"a second eager call"},
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
@jax.numpy_rank_promotion("allow")
def test_what_is_broken_fails(monkeypatch, broken):
    monkeypatch.setattr(checking, "bn_forward", broken)
    if not BROKEN[broken] & PASSES:  # they take longest, and no other mistake is of their kind
        monkeypatch.setattr(checking, "_CHECKS", {name: f for name, f in checking._CHECKS.items() if name != "passes"})
    report = check(devices=jax.devices()[:2])
    failed = {row.name for row in report.rows if row.verdict == "failed"}
    assert failed == BROKEN[broken]
    assert not report.passed
    assert re.match(rf"FAILED: {len(failed)} of \d+ checks: ", report.verdict)
    assert all(name in report.verdict for name in failed)


def test_every_row_can_fail():
    # The second call, if it compiles, raises.
    assert ROWS - UNBOUNDED - set().union(*BROKEN.values()) == {"a second eager call: compilations"}


def test_a_check_that_raises_is_a_row(monkeypatch):
    def torn(devices):
        yield Row("torn", "first", 0.0, 0.0, "passed", "")
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a page more")

    monkeypatch.setattr(checking, "_CHECKS", {"torn": torn})
    report = check(devices=jax.devices()[:1])
    assert [(row.check, row.of, row.measured) for row in report.rows] == [("torn", "first", 0.0), ("torn", "", None)]
    assert report.rows[1].note == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert report.verdict == "FAILED: 1 of 2 checks: torn"


def test_a_guard_against_transfers_is_no_failure(monkeypatch):
    monkeypatch.setattr(checking, "_CHECKS", {"evaluation": checking._CHECKS["evaluation"]})
    with jax.transfer_guard("disallow"):
        assert check(devices=jax.devices()[:1]).passed


def test_what_runs_without_jit_compiles_nothing():
    with jax.disable_jit():
        rows = check(devices=jax.devices()[:1]).rows
    assert [row.note for row in rows if row.check == "a second eager call"] == ["jit is switched off"]


def test_not_a_number_fails():
    assert checking._row("a", "b", np.nan, 1.0).verdict == "failed"


@pytest.mark.parametrize("tells", [None, {}, {"flops": 1.0}])
def test_a_compiler_that_tells_no_bytes_is_skipped(monkeypatch, tells):
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: tells)
    monkeypatch.setattr(checking, "_CHECKS", {"passes": checking._CHECKS["passes"]})
    report = check(devices=jax.devices()[:1])
    assert report.passed
    assert report.verdict == "passed: 0 checks; skipped: passes (this compiler tells no bytes)"


def test_a_compiler_that_shows_no_program_is_skipped(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: None)
    monkeypatch.setattr(checking, "_CHECKS", {"jit": checking._CHECKS["jit over devices"]})
    report = check(devices=jax.devices()[:2])
    assert report.verdict == "passed: 4 checks; skipped: jit (collectives: this compiler shows no program)"


def test_passes_of_an_unknown_compiler_have_no_bound(monkeypatch):
    monkeypatch.setattr(checking, "_target", lambda device: "abacus")
    assert {(row.bound, row.verdict) for row in checking._costs(jax.devices()[:1])} == {(None, "measured")}


@pytest.mark.parametrize("masked", [False, True])
def test_what_it_compares_with_is_the_oracle(masked):
    shape = (6, 3, 4)
    mask = np.random.default_rng(2).random((6, 3, 1)) < 0.6 if masked else None
    batch = checking._draw(shape, 10.0, mask=mask)
    exact = checking._oracle(batch)
    want = oracle.forward(batch.x, batch.scale, batch.bias, mask=mask)
    grads = oracle.gradients(batch.g, batch.x, batch.scale, batch.bias, mask=mask)
    for got, one in zip(exact, (want.y, want.mean, want.var, *list(grads.values())[:3]), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-12, atol=1e-12)


def test_half_an_ulp_is_no_error():
    exact = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    rounded = exact.astype(jnp.bfloat16)
    assert not checking._error(rounded, exact).any()
    assert (checking._error(np.nextafter(rounded, rounded + 1), exact) > 0).mean() > 0.9
    assert checking._error(np.zeros(1, jnp.bfloat16), np.full(1, 1e-3)) == 1e-3


DEVICE = jax.devices()[0]
MISTAKES = {
    "no sequence": (3, TypeError, ["devices is 3", "sequence of devices", "jax.local_devices()"]),
    "one device": (DEVICE, TypeError, ["devices is ", "sequence of devices"]),
    "no devices": ([], ValueError, ["devices is []", "one or several"]),
    "names": (["cpu"], TypeError, ["devices is ['cpu']"]),
    "twice": ([DEVICE, DEVICE], ValueError, ["different"]),
}


@pytest.mark.parametrize(("devices", "kind", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(devices, kind, parts):
    with pytest.raises(kind) as error:
        check(devices=devices)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.fixture
def command():
    testing = pytest.importorskip("typer.testing")
    from jbn.cli.commands import app

    return lambda *args: testing.CliRunner().invoke(app, ["check", *args])


@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_the_command(monkeypatch, command, verdict):
    def look(devices):
        yield Row("training", "y", 3e-7, 4e-6, verdict, f"on {len(devices)}")

    monkeypatch.setattr(checking, "_CHECKS", {"training": look})
    result = command("--devices", "3")
    assert result.exit_code == (verdict == "failed")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[1:] == [
        "3 devices: cpu, cpu",
        "          measured  bound",
        "training",
        f"  y          3e-07  4e-06  {verdict}  on 3",
        "passed: 1 check" if verdict == "passed" else "FAILED: 1 of 1 check: training: y",
    ]


def test_the_command_refuses_devices_that_are_not_there(command):
    result = command("--devices", "9")
    assert result.exit_code == 2
    assert "got '9', but JAX finds 8 devices (cpu)" in result.stderr
