"""Diagnosis of whole models: healthy ones have no finding, of planted faults each is found and no other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn import diagnose

C = 6
EPSILON = 1e-5
ALL = tuple(range(C))


def rows(count, seed=0, mean=3.0):
    return (np.random.default_rng(seed).standard_normal((count, C)) + mean).astype(np.float32)


def dense(seed):
    return {
        "w": np.random.default_rng(seed).standard_normal((C, C)).astype(np.float32),
        "b": np.zeros(C, np.float32),
        "norm": {"scale": np.ones(C, np.float32), "bias": np.zeros(C, np.float32)},
    }


# The order of the names is not that of the data.
PARAMS = {"stem": dense(1), "head": dense(2)}
FRESH = {name: {"norm": jbn.bn_init(C)[1]._asdict()} for name in PARAMS}


def forward(params, state, x, train, mask=None, **options):
    new, h = {}, x
    for name in ("stem", "head"):
        layer = params[name]
        z = h @ layer["w"] + layer["b"][None]
        given = state[name]["norm"]
        h, moved = jbn.bn_forward(
            layer["norm"], given, z, train, momentum=0.9, mask=mask, activation=jax.nn.relu, **options
        )
        new[name] = {"norm": moved}
    return h, new


def apply(params, state, batch):
    x, mask = batch if isinstance(batch, tuple) else (batch, None)
    return forward(params, state, x, True, mask)[1]


STATE = jbn.recalibrate(apply, PARAMS, FRESH, [rows(2048, 9)])


def found(diagnosis):
    return [(finding.path, finding.kind, finding.channels) for finding in diagnosis.findings]


# Healthy


def by_function():
    return PARAMS, FRESH, forward


def by_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for _ in range(2):
                x = jbn.linen.BatchNorm(not train, momentum=0.9, activation=nn.relu)(nn.Dense(C)(x))
            return x

    model = Model()
    variables = model.init(jax.random.key(0), rows(4), False)

    def run(params, stats, x, train):
        y, new = model.apply({"params": params, "batch_stats": stats}, x, train, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return variables["params"], variables["batch_stats"], run


def by_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        *(
            layer
            for _ in range(2)
            for layer in (
                nnx.Linear(C, C, rngs=rngs),
                jbn.nnx.BatchNorm(C, momentum=0.9, activation=nnx.relu, rngs=rngs),
            )
        )
    )
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def run(params, stats, x, train):
        model = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, stats))  # variables of this trace
        model.set_attributes(use_running_average=not train)
        return model(x), nnx.state(model, nnx.BatchStat)

    return params, stats, run


DOORS = {"function": by_function, "linen": by_linen, "nnx": by_nnx}


@pytest.fixture(scope="module", params=DOORS)
def door(request):
    """Return params, fresh statistics and apply of a model, and both after training."""
    params, stats, run = DOORS[request.param]()

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            y, new = run(params, stats, x, True)
            return jnp.mean((y.sum(-1) - jnp.sin(x).sum(-1)) ** 2), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.03 * g, params, grads), new

    trained, moved = params, stats
    for seed in range(100):
        trained, moved = step(trained, moved, rows(64, seed))
    return (params, stats), (trained, moved), lambda params, stats, x: run(params, stats, x, True)[1]


@pytest.mark.parametrize("count", [16, 32, 128])
def test_a_trained_model_has_no_finding(door, count):
    _, (params, stats), run = door
    for seed in range(200, 205):
        assert found(diagnose(run, params, stats, rows(count, seed))) == []


def test_a_fresh_model_is_the_prior_and_recalibrated_it_has_no_finding(door):
    (params, stats), _, run = door
    kinds = {kind for _, kind, _ in found(diagnose(run, params, stats, rows(64)))}
    assert kinds == {"prior"}
    stats = jbn.recalibrate(run, params, stats, [rows(512, 1)])
    assert str(diagnose(run, params, stats, rows(32, 2))) == "No findings in 2 layers."


# Planted faults


def changed(tree, path, change):
    """Return a tree with another array at a path."""
    head, _, rest = path.partition("/")
    return tree | {head: changed(tree[head], rest, change) if rest else change(np.array(tree[head]))}


def put(where, value):
    return lambda array: (array.__setitem__(where, value), array)[1]


def scaled(channels, factor):
    return lambda array: array * np.where(np.isin(ALL, channels), factor, 1).astype(array.dtype)


def mixed(share):
    """Return the statistics of an average that began with 0 and 1."""
    return jax.tree.map(lambda prior, later: share * prior + (1 - share) * later, FRESH["stem"], STATE["stem"])


OVERFLOW = changed(PARAMS, "stem/w", lambda w: w * np.float32(1e38))
STEM, HEAD = "stem/norm", "head/norm"
UPDATED = 10

# What is changed in params, after which the statistics are taken anew; what then in the state; what in the batch; and
# what is to be found.
PLANTED = {
    "NaN in a kernel": ({"head/w": put((3, 4), np.nan)}, {}, {}, ("head/w", "non-finite", (4,))),
    "inf in a scale": ({"head/norm/scale": put(2, np.inf)}, {}, {}, ("head/norm/scale", "non-finite", (2,))),
    "NaN in a running mean": ({}, {"stem/norm/mean": put(1, np.nan)}, {}, (STEM, "non-finite", (1,))),
    "inf in a running variance": ({}, {"stem/norm/var": put(1, np.inf)}, {}, (STEM, "non-finite", (1,))),
    "a negative running variance": ({}, {"head/norm/var": put(5, -1e-3)}, {}, (HEAD, "non-finite", (5,))),
    "NaN in the batch": ({}, {}, put((7, 2), np.nan), (STEM, "non-finite", ALL)),
    "overflow": ({"stem/w": scaled(ALL, 1e38)}, None, {}, (STEM, "non-finite", ALL)),
    "overflow in one channel": ({"head/w": scaled([1], 1e38)}, None, {}, (HEAD, "non-finite", (1,))),
    "a kernel of zeros": ({"head/w": scaled([4], 0)}, {}, {}, (HEAD, "dead", (4,))),
    "a kernel that became zeros": ({"stem/w": scaled([1], 0)}, None, {}, (STEM, "dead", (1,))),
    "a constant": ({"head/w": scaled([4, 5], 0), "head/b": put([4, 5], 7.0)}, {}, {}, (HEAD, "dead", (4, 5))),
    "hardly a kernel": ({"stem/w": scaled([0], 2e-5)}, {}, {}, (STEM, "near-constant", (0,))),
    "what became hardly a kernel": ({"stem/w": scaled([1], 2e-5)}, None, {}, (STEM, "near-constant", (1,))),
    "hardly more than rounding": ({"stem/b": put(3, 5e6)}, {}, {}, (STEM, "near-constant", (3,))),
    "a small kernel": ({"head/w": scaled([2], 5e-4)}, {}, {}, (HEAD, "below epsilon", (2,))),
    "a small layer": ({"stem/w": scaled(ALL, 7e-4)}, {}, {}, (STEM, "below epsilon", ALL)),
    "never updated": ({}, {"stem": lambda _: FRESH["stem"]}, {}, (STEM, "prior", ALL)),
    "updated ten times": ({}, {"stem": lambda _: mixed(0.9**UPDATED)}, {}, (STEM, "prior", ALL)),
    "a shifted mean": ({}, {"head/norm/mean": lambda mean: mean + 9}, {}, (HEAD, "stale", ALL)),
    "a variance that is too large": ({}, {"head/norm/var": lambda var: 16 * var}, {}, (HEAD, "stale", ALL)),
    "statistics of smaller weights": (
        {},
        {"stem/norm/mean": lambda mean: mean / 4, "stem/norm/var": lambda var: var / 16},
        {},
        (STEM, "stale", ALL),
    ),
    "one mean": ({}, {"stem/norm/mean": put(2, 30.0)}, {}, (STEM, "stale", (2,))),
    "one variance": ({}, {"stem/norm/var": scaled([2], 0.04)}, {}, (STEM, "stale", (2,))),
    "a large bias": ({"stem/b": put([0, 3], 900.0)}, {}, {}, (STEM, "far mean", (0, 3))),
    "a larger bias": ({"head/b": put(3, 1e5)}, {}, {}, (HEAD, "far mean", (3,))),
}  # fmt: skip


@pytest.mark.parametrize("count", [32, 256])
@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found_and_no_other(planted, count):
    of_params, of_state, of_batch, expected = planted
    params, state, batch = PARAMS, STATE, rows(count, 3)
    for path, change in of_params.items():
        params = changed(params, path, change)
    if of_params and of_state is not None and expected[1] != "non-finite":
        state = jbn.recalibrate(apply, params, state, [rows(2048, 9)])
    for path, change in (of_state or {}).items():
        state = state | {path: change(state[path])} if path in state else changed(state, path, change)
    batch = of_batch(batch) if of_batch else batch
    diagnosis = diagnose(apply, params, state, batch)
    assert found(diagnosis) == [expected]
    assert str(diagnosis).startswith(f"{expected[0]}: ")


def test_a_scale_that_steps_share_weighs_the_gap_of_each():
    scale = jbn.Params(np.arange(1, C + 1, dtype=np.float32), None)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), jbn.bn_init(C)[1])
    x = rows(64 * 3).reshape(64, 3, C)

    def each(params, state, x):
        return jbn.bn_forward(params, state, x, True)[1]

    def scanned(params, states, x):
        return jax.lax.scan(lambda _, step: (None, each(params, *step)), None, (states, x.swapaxes(0, 1)))[1]

    gaps = diagnose(scanned, scale, states, x).layers[0].gap
    alone = [diagnose(each, scale, jbn.bn_init(C)[1], x[:, t]).layers[0].gap for t in range(3)]
    np.testing.assert_allclose(gaps, alone, rtol=1e-5)


def test_one_of_a_kind_is_said_as_one():
    params, state = jbn.bn_init(1)
    one = rows(64)[:, :1]
    state = jbn.State(jnp.asarray(one.mean(0)), jnp.asarray(one.var(0)))

    def alone(params, state, x):
        return jbn.bn_forward(params, state, x, True)[1]

    assert repr(diagnose(alone, params, state, one)) == "No findings in 1 layer."
    assert "only 1 value per channel in" in repr(diagnose(alone, params, state, one[:1]))
    broken = jbn.Params(jnp.full(1, jnp.inf), params.bias)
    assert repr(diagnose(alone, broken, state, one)).startswith("scale: NaN or inf in 1 of 1 value: channel 0 of 1.")
