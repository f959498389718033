"""The second call compiles nothing and traces nothing."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
from jbn.core import statistics

pytestmark = pytest.mark.core

PARAMS, STATE = jbn.bn_init(4)
MOMENTA, COUNTS = (i / 1000 for i in itertools.count()), itertools.count()


def xs():
    rng = np.random.default_rng(0)
    while True:
        yield jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)


def counted():
    return jbn.CountedState(*STATE, jnp.int32(next(COUNTS)))


def apply(layer, variables, x):
    return layer.apply(variables, x, mutable=["batch_stats"])[0]


LAYER = jbn.linen.BatchNorm(False, activation=nn.relu)
VARIABLES = {"params": PARAMS._asdict(), "batch_stats": STATE._asdict()}
CALLS = {
    "train": lambda x: jbn.bn_forward(PARAMS, STATE, x, True),
    "train with another momentum": lambda x: jbn.bn_forward(PARAMS, STATE, x, True, momentum=next(MOMENTA)),
    "train with everything": lambda x: jbn.bn_forward(
        PARAMS, STATE, x, True, activation=jax.nn.silu, residual=x, mask=x > 0
    ),
    "evaluate": lambda x: jbn.bn_forward(PARAMS, STATE, x, False, activation=jax.nn.relu),
    "batch_norm": lambda x: jbn.batch_norm(x),
    "scale and bias of examples": lambda x: jbn.batch_norm(x, x * 2, x[:, :1], activation=jax.nn.relu),
    "moments around a pilot": lambda x: jbn.moments(x, pilot=next(MOMENTA)),
    "moments": lambda x: jbn.moments(x),
    "merge": lambda x: jbn.merge(jbn.moments(x), jbn.moments(x)),
    "update": lambda x: jbn.update(STATE, jbn.moments(x), momentum=next(MOMENTA)),
    "train with a count": lambda x: jbn.bn_forward(PARAMS, counted(), x, True, momentum=jbn.debiased(0.9)),
    "update with a count": lambda x: jbn.update(counted(), jbn.moments(x), momentum=jbn.cumulative),
    "linen": lambda x: apply(LAYER, VARIABLES, x),
}
DERIVED = {
    "as it is": lambda f: f,
    "gradient": lambda f: lambda x: jax.grad(lambda x: sum(a.sum() for a in jax.tree.leaves(f(x))))(x),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_eager_calls_compile_once(call, derive, compilations):
    x = xs()
    f = derive(call)
    f(next(x)), f(next(x))
    before = len(compilations)
    f(next(x)), f(next(x))
    assert compilations[before:] == []


def test_jit_traces_once():
    traces = []

    @jax.jit
    def step(state, x):
        traces.append(1)
        return jax.grad(lambda x: jbn.bn_forward(PARAMS, state, x, True)[0].sum(), has_aux=False)(x)

    x = xs()
    for _ in range(3):
        step(STATE, next(x))
    assert len(traces) == 1


@pytest.mark.parametrize("layers", [1, 2])
def test_value_and_derivative_trace_the_statistics_once(layers, monkeypatch):
    traces = []
    find = statistics._find_moments
    monkeypatch.setattr(statistics, "_find_moments", lambda *args, **more: traces.append(1) or find(*args, **more))
    net = nn.Sequential([module for _ in range(layers) for module in (nn.Dense(7), jbn.linen.BatchNorm(False))])
    x = jnp.zeros((8, 4))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    traces.clear()
    jax.clear_caches()

    @jax.jit
    def step(variables, x):
        def loss(params):
            y, new = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.square(y).mean(), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    step.lower(variables, x)
    assert len(traces) == 1


def test_the_measure_sees_another_function(compilations):
    x = next(xs())
    for factor in (2, 3):
        before = len(compilations)
        jbn.batch_norm(x, activation=lambda z, factor=factor: z * factor)
        assert len(compilations) > before


@pytest.fixture
def compilations():
    """Collect the name of every event with which JAX reports that it compiles."""
    events: list[str] = []

    def listen(name: str, _seconds: float, **_: object) -> None:
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.clear_event_listeners()


def test_what_others_patch_in_jax_is_not_met(monkeypatch):
    """Exporters put their own functions into JAX while they trace; what JAX keeps of ours must not hold them."""

    def refuse(*_args, **_options):
        raise AssertionError("a function of jax.numpy or jax.lax was looked up in a call")

    names = (
        "add", "all", "any", "arange", "broadcast_to", "concatenate", "divide", "full", "isfinite",
        "maximum", "mean", "minimum", "moveaxis", "multiply", "ones", "ones_like", "reshape", "split", "sqrt",
        "square", "stack", "subtract", "sum", "transpose", "var", "where", "zeros", "zeros_like",
    )  # fmt: skip
    x = jnp.asarray(np.random.default_rng(3).standard_normal((12, 3, 7)), jnp.float32)  # no other test has this shape
    params, state, mask = *jbn.bn_init(7), jnp.asarray(np.arange(12)[:, None, None] < 9)
    for name in names:
        monkeypatch.setattr(jnp, name, refuse)
    for name in ("abs", "clamp", "cond", "expand_dims", "full_like", "is_finite", "max", "rsqrt", "select", "square"):
        monkeypatch.setattr(jax.lax, name, refuse)
    for options in ({}, {"mask": mask}, {"group_size": 4}, {"residual": x}, {"activation": jax.nn.silu}):
        for train in (True, False):
            call = partial(jbn.bn_forward, train=train, **options)
            jax.vjp(lambda params, x, call=call: call(params, state, x), params, x)[1](call(params, state, x))
    jbn.merge(jbn.moments(x[:5]), jbn.moments(x[5:]))
