"""Which statistics normalize and whether the state moves are two choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests.support import oracle
from tests.support.cases import CASES, by_function, data
from tests.support.shards import Setting, mesh

pytestmark = pytest.mark.core

X = (np.random.default_rng(0).standard_normal((40, 3)) * [1, 2, 3] + [4, 5, 6]).astype(np.float32)
STATE = jbn.State(jnp.full(3, 2.0), jnp.full(3, 0.5))
BOTH = [(train, update) for train in (True, False) for update in (True, False)]
both = pytest.mark.parametrize(("train", "update"), BOTH)
mixed = pytest.mark.parametrize(("train", "update"), [(True, False), (False, True)])


@both
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_output_and_state(case, train, update):
    d = data(case)
    y, new = by_function(case, d, train, update=update)
    same, _ = by_function(case, d, train)
    _, moved = by_function(case, d, True)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(same, np.float32))
    want = oracle.forward(
        d.x, d.scale, d.bias, axis=case.axis, epsilon=case.epsilon, mask=d.mask, activation=case.activation,
        residual=d.residual, stats=None if train else (d.mean, d.var),
    ).y  # fmt: skip
    bound = oracle.tolerance(case.dtype, case.rows, max(1.0, np.abs(want).max()))
    assert np.abs(oracle.wide(y) - want).max() <= bound
    for name in ("mean", "var"):
        np.testing.assert_array_equal(new[name], moved[name] if update else getattr(d, name))


@both
def test_a_state_that_does_not_move_comes_back_as_it_is(train, update):
    _, new = jbn.bn_forward(None, STATE, X, train, update=update)
    assert (new is STATE) == (not update)


@mixed
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("unbiased", [False, True])
def test_momentum(train, update, momentum, unbiased):
    count, mean, var = oracle.moments(X)
    var = var * count / (count - 1) if unbiased else var
    _, new = jbn.bn_forward(None, STATE, X, train, update=update, momentum=momentum, unbiased=unbiased)
    weight = (1 - momentum) * update
    np.testing.assert_allclose(new.mean, 2.0 + weight * (mean - 2.0), rtol=oracle.tolerance(np.float32, len(X)))
    np.testing.assert_allclose(new.var, 0.5 + weight * (var - 0.5), rtol=oracle.tolerance(np.float32, len(X)))


@both
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_gradients(train, update, mode):
    """Those of y alone: none flows through the new state."""
    rng = np.random.default_rng(1)
    g, scale = rng.standard_normal(X.shape).astype(np.float32), rng.uniform(0.5, 1.5, 3).astype(np.float32)

    def loss(x, scale):
        y, new = jbn.bn_forward({"scale": scale}, STATE, x, train, update=update)
        return (y * g).sum() + 1e3 * (new.mean.sum() + new.var.sum())

    want = oracle.gradients(g, X, scale, stats=None if train else STATE)
    if mode == "reverse":
        got = dict(zip(("x", "scale"), jax.grad(loss, (0, 1))(X, scale), strict=True))
        assert all(oracle.relative_l2(got[name], want[name]) <= 1e-5 for name in got)
    else:
        d = rng.standard_normal(X.shape).astype(np.float32)
        _, got = jax.jvp(lambda x: loss(x, scale), (X,), (d,))
        size = np.linalg.norm(want["x"]) * np.linalg.norm(d)
        assert abs(float(got) - (want["x"] * d).sum()) <= 1e-5 * size


@both
def test_masked_rows_reach_nothing(train, update):
    mask = np.random.default_rng(2).random((len(X), 1)) < 0.6
    x = np.where(mask, X, np.nan).astype(np.float32)
    dx = jax.grad(lambda x: (jbn.bn_forward(None, STATE, x, train, update=update, mask=mask)[0] ** 2).sum())(x)
    y, new = jbn.bn_forward(None, STATE, x, train, update=update, mask=mask, momentum=0.0)
    assert not np.asarray(y)[~mask[:, 0]].any()
    assert not np.asarray(dx)[~mask[:, 0]].any()
    assert np.isfinite(dx).all()
    _, mean, _ = oracle.moments(x, mask=mask)
    np.testing.assert_allclose(new.mean, mean if update else STATE.mean, rtol=oracle.tolerance(np.float32, len(X)))


def collectives(train, update, check_vma=True, loss=False, **options):
    s = Setting(masked=True)
    params = jbn.Params(s.scale, s.bias)

    def forward(x, mask):
        return jbn.bn_forward(params, s.state, x, train, update=update, mask=mask, momentum=0.0, **options)

    rows = P("data")
    f = jax.shard_map(
        forward, mesh=mesh(), in_specs=(rows, rows), out_specs=(rows, P()), check_vma=check_vma and bool(options)
    )
    g = (lambda x, mask: jax.grad(lambda x: (f(x, mask)[0] * s.g).sum())(x)) if loss else f
    compiled = jax.jit(g).lower(s.x, s.mask).compile()
    return s, compiled, compiled.as_text().count(" all-reduce(")


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_shards(train, update, check_vma):
    s, compiled, _ = collectives(train, update, check_vma, axis_name="data")
    y, new = compiled(s.x, s.mask)
    want = oracle.forward(s.x, s.scale, s.bias, mask=s.mask, stats=None if train else s.state).y
    assert np.abs(oracle.wide(y) - want).max() <= s.bound * max(1, np.abs(want).max())
    for name in ("mean", "var"):
        value = s.want[name] if update else oracle.wide(getattr(s.state, name))
        assert np.abs(oracle.wide(getattr(new, name)) - value).max() <= s.bound * np.abs(s.want[name]).max()


def test_collectives_are_those_of_what_is_needed():
    count = {way: collectives(*way, axis_name="data")[2] for way in BOTH}
    assert count[True, True] == count[True, False] == count[False, True] == 2  # the second where x is swept twice
    assert count[False, False] == 0
    assert collectives(False, True, loss=True, axis_name="data")[2] == 0  # gradients need no statistics


def test_without_a_new_state_shards_may_differ():
    """They are batches of their own then, and no state is at stake."""
    s = Setting()
    over = {"mesh": mesh(), "in_specs": P("data"), "out_specs": (P("data"), P())}

    def step(x, update):
        return jax.shard_map(lambda x: jbn.bn_forward(None, s.state, x, True, update=update), **over)(x)

    y, _ = step(s.x, False)
    want = np.concatenate([oracle.forward(part).y for part in np.split(s.x, 4)])
    assert np.abs(oracle.wide(y) - want).max() <= 4 * s.bound
    with pytest.raises(ValueError, match="would differ between shards"):
        step(s.x, True)


@pytest.mark.parametrize("update", [True, False])
def test_one_value_per_feature_is_no_batch_to_train_on(update):
    with pytest.raises(ValueError, match="one value per channel"):
        jbn.bn_forward(None, STATE, X[:1], True, update=update)


def test_one_row_is_evaluated_and_moves_nothing():
    y, new = jbn.bn_forward(None, STATE, X[:1], False, update=True)
    np.testing.assert_array_equal(y, jbn.bn_forward(None, STATE, X[:1], False)[0])
    jax.tree.map(np.testing.assert_array_equal, new, STATE)


@pytest.mark.parametrize("update", [1, "yes", np.float32(1)])
def test_update_is_a_bool(update):
    with pytest.raises(TypeError, match=r"update is .*expected True or False"):
        jbn.bn_forward(None, STATE, X, True, update=update)


def test_update_is_not_traced():
    with pytest.raises(TypeError, match="update is a traced value"):
        jax.jit(lambda update: jbn.bn_forward(None, STATE, X, True, update=update))(True)
