"""The gradient of x is rounded once: both ways to x, through the statistics and through y, meet before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support import oracle

pytestmark = pytest.mark.core

SHAPES = {"conv": (32, 14, 14, 32), "dense": (4096, 4), "few rows": (64, 7, 7, 8)}
COTANGENTS = {
    "white": lambda n, y: n,
    "1 + 0.05 n": lambda n, y: 1 + 0.05 * n,
    "1 + 0.01 n": lambda n, y: 1 + 0.01 * n,
    "y + 0.05 n": lambda n, y: y + 0.05 * n,
    "constant": lambda n, y: np.ones_like(n),
}


def bound(want, g, a, dtype):
    """Bound the L2 error: half again that of one rounding, and the float32 roundings of what dx is made of."""
    once = oracle.wide(jnp.asarray(want, dtype))
    return 1.5 * np.linalg.norm(once - want) + 8 * 2.0**-24 * np.linalg.norm(a * g)


@pytest.mark.parametrize("kind", COTANGENTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dx_is_rounded_once(dtype, shape, kind):
    rng = np.random.default_rng(0)
    x, n = jnp.asarray(rng.standard_normal(shape) * 2 + 1, dtype), rng.standard_normal(shape)
    scale = rng.uniform(0.5, 2, shape[-1]).astype(np.float32)
    g = jnp.asarray(COTANGENTS[kind](n, oracle.forward(x).y), dtype)
    want = oracle.gradients(g, x, scale)["x"]
    a = scale / np.sqrt(oracle.moments(x)[2] + 1e-5)
    params, state = jbn.Params(scale, jnp.zeros(shape[-1])), jbn.bn_init(shape[-1])[1]
    (got,) = jax.vjp(lambda x: jbn.bn_forward(params, state, x, True)[0], x)[1](g)
    assert np.linalg.norm(oracle.wide(got) - want) <= bound(want, oracle.wide(g), a, dtype)


@pytest.mark.parametrize("way", ["moments", "groups", "mask", "shards", "examples"])
def test_dx_is_rounded_once_by_every_way(way):
    rng, shape = np.random.default_rng(1), (16, 64, 8)
    x, n = jnp.asarray(rng.standard_normal(shape) * 2 + 1, jnp.bfloat16), rng.standard_normal(shape)
    g = jnp.asarray(1 + 0.01 * n, jnp.bfloat16)
    mask = rng.random((16, 64, 1)) < 0.7 if way == "mask" else None
    scale = rng.uniform(0.5, 2, (16, 1, 8)).astype(np.float32) if way == "examples" else None
    pieces = [slice(0, 8), slice(8, 16)] if way == "groups" else [slice(None)]
    want = np.concatenate(
        [oracle.gradients(g[rows], x[rows], scale, mask=None if mask is None else mask[rows])["x"] for rows in pieces]
    )
    a = (1 if scale is None else scale) / np.sqrt(oracle.moments(x, mask=mask)[2] + 1e-5)

    def y(x, mask=mask, **options):
        return jbn.batch_norm(x, scale, mask=mask, **options)[0]

    if way == "shards":
        both = jax.vmap(lambda x: y(x, axis_name="d"), axis_name="d")
        (got,) = jax.vjp(both, x.reshape(4, 4, 64, 8))[1](g.reshape(4, 4, 64, 8))
        got = got.reshape(shape)
    else:
        (got,) = jax.vjp(lambda x: y(x, **({"group_size": 8} if way == "groups" else {})), x)[1](g)
    valid = 1 if mask is None else mask
    assert np.linalg.norm(oracle.wide(got) - want) <= bound(want, valid * oracle.wide(g), a, "bfloat16")


@pytest.mark.parametrize("scale", [2.0**-10, 1e3])
def test_a_finite_dx_of_float16_is_finite(scale):
    """g·γ·r overflows float16 where the two ways, added, do not."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((512, 4)) * 1e-2, jnp.float16)
    g = jnp.full((512, 4), 6e4, jnp.float16)
    params, state = jbn.Params(jnp.full(4, scale), jnp.zeros(4)), jbn.bn_init(4)[1]
    (got,) = jax.vjp(lambda x: jbn.bn_forward(params, state, x, True)[0], x)[1](g)
    want = oracle.gradients(g, x, params.scale)["x"]
    a = scale / np.sqrt(oracle.moments(x)[2] + 1e-5)
    assert np.isfinite(oracle.wide(got)).all()
    assert np.linalg.norm(oracle.wide(got) - want) <= bound(want, oracle.wide(g), a, "float16")


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu], ids=["none", "relu", "silu"])
def test_the_sums_of_scale_and_bias_see_no_rounding_of_a_residual(activation):
    rng, shape = np.random.default_rng(2), (4096, 4)
    x, r = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(2))
    g = jnp.asarray(1 + 0.01 * rng.standard_normal(shape), jnp.bfloat16)

    def y(x, r, scale, bias):
        return jbn.batch_norm(x, scale, bias, residual=r, activation=activation)[0]

    args = x, r, jnp.ones(4), jnp.zeros(4)
    dx, dr, dscale, dbias = jax.vjp(y, *args)[1](g)
    want = oracle.gradients(g, x, np.ones(4), np.zeros(4), residual=r, activation=activation)
    a = 1 / np.sqrt(oracle.moments(x)[2] + 1e-5)
    dz = want["residual"]
    assert np.linalg.norm(oracle.wide(dx) - want["x"]) <= bound(want["x"], dz, a, "bfloat16")
    assert np.linalg.norm(oracle.wide(dr) - dz) <= bound(dz, dz, 1, "bfloat16")
    # The activation is evaluated in float32 at a z that is a few roundings off, hence the tolerance of single values.
    size = oracle.tolerance("float32", len(x)) * np.sqrt(len(x)) * np.abs(dz).max()
    np.testing.assert_allclose(dbias, want["bias"], atol=size, rtol=0)
    np.testing.assert_allclose(dscale, want["scale"], atol=size * 4, rtol=0)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("std", [1e-12, 1e-4, 1e4, 1e12, 1e14, 1e16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dx_keeps_all_its_terms_at_every_size_of_x(dtype, std, scale):
    """γ r³ is 0 in float32 where the standard deviation is 10¹³, and Σ g c as large."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((256, 4)) * std, dtype)
    g = jnp.asarray(rng.standard_normal((256, 4)) + oracle.forward(x).y, dtype)
    gamma = np.full(4, scale, np.float32)
    want = oracle.gradients(g, x, gamma)["x"]
    a = scale / np.sqrt(oracle.moments(x)[2] + 1e-5)
    _, pull = jax.vjp(lambda x: jbn.batch_norm(x, gamma)[0], x)
    assert np.linalg.norm(oracle.wide(pull(g)[0]) - want) <= bound(want, oracle.wide(g), a, dtype)
    # Both ways are one rule: <g, J x> = <Jᵀ g, x>, of which J x = 0 but for epsilon.
    _, dy = jax.jvp(lambda x: jbn.batch_norm(x, gamma)[0], (x,), (x,))
    assert np.abs(oracle.wide(dy)).max() <= scale * (1e-5 / (std * std + 1e-5) * 8 + 2.0**-6)
