"""Every case: outputs, new statistics and gradients against float64, and the same bits through every door."""

import jax
import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import CASES, DOORS, Case, by_function, data

pytestmark = pytest.mark.core

over = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _wide(request):
    if request.node.callspec.params["case"].dtype == "float64":
        request.getfixturevalue("x64")


def expect(case: Case, d, train: bool, g=None):
    options = {"axis": case.axis, "epsilon": case.epsilon, "mask": d.mask, "activation": case.activation,
               "residual": d.residual, "stats": None if train else (d.mean, d.var)}  # fmt: skip
    if g is None:
        return oracle.forward(d.x, d.scale, d.bias, **options)
    return oracle.gradients(g, d.x, d.scale, d.bias, **options)


@over
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_output_and_state(case, train):
    d = data(case)
    want = expect(case, d, train)
    y, state = by_function(case, d, train)
    assert y.dtype == case.dtype
    size = np.abs(want.y).max()
    np.testing.assert_allclose(oracle.wide(y), want.y, rtol=0, atol=oracle.tolerance(case.dtype, case.rows, size))
    sample = want.var * (want.count / np.maximum(want.count - 1, 1) if case.unbiased else 1)
    for name, old, batch in (("mean", d.mean, want.mean), ("var", d.var, sample)):
        assert state[name].dtype == np.float32
        new = np.where(want.count > 1, oracle.wide(old) + (1 - case.momentum) * (batch - oracle.wide(old)), old)
        np.testing.assert_allclose(
            oracle.wide(state[name]), new if train else old, rtol=0, atol=oracle.tolerance("float32", case.rows, 10)
        )


@over
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gradients(case, train):
    d = data(case)
    g = np.random.default_rng(1).standard_normal(case.shape).astype(jax.numpy.dtype(case.dtype))
    want = expect(case, d, train, g)
    names = [name for name in ("x", "scale", "bias", "residual") if getattr(d, name) is not None]

    def f(*values):
        return by_function(case, d._replace(**dict(zip(names, values, strict=True))), train)[0]

    _, pull = jax.vjp(f, *(getattr(d, name) for name in names))
    for name, got in zip(names, pull(g), strict=True):
        dtype = case.dtype if name in ("x", "residual") else "float32"
        # The cotangent and the output are rounded to the case's dtype, so sums of them have its error too.
        size = np.abs(want[name]).max() + np.abs(want["x"]).max()
        assert got.dtype == dtype
        np.testing.assert_allclose(
            oracle.wide(got), want[name], rtol=0, atol=oracle.tolerance(dtype, case.rows, 2 * size), err_msg=name
        )


@over
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_every_door_gives_the_same_bits(case, train):
    d = data(case)
    names = [name for name in ("x", "scale", "bias", "residual") if getattr(d, name) is not None]

    def everything(door):
        def f(*values):
            return door(case, d._replace(**dict(zip(names, values, strict=True))), train)

        y, pull, state = jax.vjp(f, *(getattr(d, name) for name in names), has_aux=True)
        return y, dict(state), pull(jax.numpy.ones_like(y))

    first, *others = map(everything, DOORS.values())
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), first, other)


@over
def test_jit_changes_nothing_but_rounding(case):
    d = data(case)
    eager, jitted = by_function(case, d, True), jax.jit(lambda d: by_function(case, d, True))(d)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        assert a.dtype == b.dtype
        size = np.abs(oracle.wide(a)).max()
        np.testing.assert_allclose(
            oracle.wide(a), oracle.wide(b), rtol=0, atol=oracle.tolerance(a.dtype, case.rows, size)
        )
