"""Scale and bias per example, wherever the rows are: in groups, and over shards by every way."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from tests.support import oracle
from tests.support.shards import SHARDS, mesh

pytestmark = pytest.mark.core

N, T, C = 8, 3, 5
STATE = jbn.bn_init(C)[1]
RNG = np.random.default_rng(0)
X, G = (RNG.standard_normal((N, T, C)).astype(np.float32) + 3 * np.arange(N)[:, None, None] for _ in range(2))
SCALE, BIAS = (RNG.standard_normal((N, 1, C)).astype(np.float32) + 1 for _ in range(2))


def step(x, g, scale, bias, **options):
    """Return y, the new state and the gradients of Σ g·y."""

    def f(x, scale, bias):
        return jbn.bn_forward({"scale": scale, "bias": bias}, STATE, x, True, activation=jax.nn.silu, **options)

    y, pull, new = jax.vjp(f, x, scale, bias, has_aux=True)
    return y, new, pull(g)


def expect(rows):
    """Return y and the gradients, with the examples of each slice a batch of their own."""
    parts = [
        (
            oracle.forward(X[i], SCALE[i], BIAS[i], activation=jax.nn.silu).y,
            oracle.gradients(G[i], X[i], SCALE[i], BIAS[i], activation=jax.nn.silu),
        )
        for i in rows
    ]
    grads = [np.concatenate([grad[name] for _, grad in parts]) for name in ("x", "scale", "bias")]
    return np.concatenate([y for y, _ in parts]), grads


def over_shard_map(check_vma, **options):
    rows = P("data")
    f = jax.shard_map(
        lambda *args: step(*args, axis_name="data", **options), mesh=mesh(), in_specs=(rows,) * 4,
        out_specs=(rows, P(), (rows,) * 3), check_vma=check_vma,
    )  # fmt: skip
    return jax.jit(f)(X, G, SCALE, BIAS)


def over_vmap(**options):
    cut = [a.reshape(SHARDS, -1, *a.shape[1:]) for a in (X, G, SCALE, BIAS)]
    y, new, grads = jax.jit(jax.vmap(lambda *args: step(*args, axis_name="data", **options), axis_name="data"))(*cut)
    return (
        *jax.tree.map(lambda a: a.reshape(N, *a.shape[2:]), (y,)),
        jax.tree.map(lambda a: a[0], new),
        [a.reshape(N, *a.shape[2:]) for a in grads],
    )


def over_mesh(kind, **options):
    over = mesh(kind=kind)
    with jax.set_mesh(over):
        cut = [jax.device_put(a, NamedSharding(over, P("data"))) for a in (X, G, SCALE, BIAS)]
        return jax.jit(lambda *args: step(*args, **options))(*cut)


@pytest.mark.parametrize(
    ("shape", "axis", "given", "kind", "words"),
    [
        (
            (8, 5, 6, 4),
            -1,
            (8, 4),
            ValueError,
            ["(4,), the shape of the features, or the rank of x", "[:, None, None, :]"],
        ),
        ((8, 4, 6), 1, (8, 4), ValueError, ["pass NAME[:, :, None]"]),
        ((8, 4), -1, (7, 1), ValueError, ["x has shape (8, 4)", "each dimension 1 or that of x"]),
        ((8, 5, 4), -1, (8, 5), ValueError, ["features of shape (4,)", "have the rank of x, each dimension 1 or that"]),
        ((8, 4), -1, (8, 1), TypeError, ["NAME has dtype int32"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_errors(name, shape, axis, given, kind, words):
    dtype = np.int32 if kind is TypeError else np.float32
    with pytest.raises(kind) as error:
        jbn.batch_norm(np.zeros(shape, np.float32), axis=axis, **{name: np.zeros(given, dtype)})
    for word in [f"NAME has {'dtype' if kind is TypeError else f'shape {given}'}", *words]:
        assert word.replace("NAME", name) in str(error.value)


WAYS = {
    "here": lambda **options: step(X, G, SCALE, BIAS, **options),
    "vmap": over_vmap,
    "shard_map": lambda **options: over_shard_map(True, **options),
    "shard_map unchecked": lambda **options: over_shard_map(False, **options),
    "Auto mesh": lambda **options: over_mesh(AxisType.Auto, **options),
    "Explicit mesh": lambda **options: over_mesh(AxisType.Explicit, **options),
}


@pytest.mark.parametrize("size", [None, 1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_groups_and_shards(way, size):
    if way == "Explicit mesh" and size == 4:
        pytest.skip("JAX does not regroup what lies on two devices of an Explicit mesh")
    y, new, grads = WAYS[way](**({} if size is None else {"group_size": size}))
    want, exact = expect([slice(i, i + (size or N)) for i in range(0, N, size or N)])
    size_of_terms = 60 * np.abs(SCALE).max()  # |g| up to 27, over a small deviation
    np.testing.assert_allclose(y, want, rtol=0, atol=oracle.tolerance("float32", N * T, np.abs(want).max()))
    for got, true in zip(grads, exact, strict=True):
        np.testing.assert_allclose(got, true, rtol=0, atol=oracle.tolerance("float32", N * T, size_of_terms))
    _, mean, _ = oracle.moments(X)
    np.testing.assert_allclose(new.mean, 0.01 * mean, rtol=1e-5)
