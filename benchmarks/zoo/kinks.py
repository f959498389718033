"""Gradients of a model whose ReLUs and max-pools take the branches that they take in float64.

Of millions of ReLUs a few have an argument so near 0 that rounding in float32 changes its sign, and each of them
changes the gradients by a thousand times what all other rounding does. How many there are is chance: of two models that
compute the same, either has the larger error. So the derivative of such an operation is taken where it is in float64;
what it returns stays what it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jbn.programs import find_inner

_ACTIVATIONS = ("relu", "relu6")


def record(call: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function that returns one array; return what its kinks take, in float32."""

    def run(*arguments: Any) -> list[Any]:
        met = list[Any]()

        def meet(eqn: Any, x: Any) -> Any:
            met.append(x.astype(jnp.float32))
            return _bind(eqn, [x])[0]

        _follow(call, arguments, meet)
        return met

    return jax.jit(run)(*arguments)


def at(places: list[Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the derivatives of its kinks taken at ``places``, which may be traced."""

    def run(*arguments: Any) -> Any:
        left = list(places)
        y = _follow(call, arguments, lambda eqn, x: _differ(eqn, x, left.pop(0)))
        if left:
            raise ValueError(f"the model has {len(left)} ReLUs and max-pools fewer than in float64")
        return y

    return run


def _differ(eqn: Any, x: Any, place: Any) -> Any:
    """Call an operation on x; its derivative is that at a place."""

    @jax.custom_vjp
    def call(x: Any, place: Any) -> Any:
        return _bind(eqn, [x])[0]

    def pull(place: Any, g: Any) -> tuple[Any, None]:
        there = place.astype(x.dtype).reshape(x.shape)
        return jax.vjp(lambda x: _bind(eqn, [x])[0], there)[1](g)[0], None

    call.defvjp(lambda x, place: (call(x, place), place), pull)
    return call(x, place)


def _follow(call: Callable[..., Any], arguments: Any, meet: Callable[[Any, Any], Any]) -> Any:
    """Call a function that returns one array, and ``meet`` in the place of its kinks."""
    program = jax.make_jaxpr(call)(*arguments)
    (y,) = _interpret(program.jaxpr, program.consts, jax.tree.leaves(arguments), meet)
    return y


def _interpret(program: Any, constants: Any, inputs: Any, meet: Callable[[Any, Any], Any]) -> list[Any]:
    known = dict(zip((*program.constvars, *program.invars), (*constants, *inputs), strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    for eqn in program.eqns:
        values = [read(var) for var in eqn.invars]
        if _is_kink(eqn):
            results = [meet(eqn, values[0])]
        elif eqn.primitive.name in ("jit", "pjit") and any(map(_has_kink, find_inner(eqn))):
            inner = eqn.params["jaxpr"]
            results = _interpret(inner.jaxpr, inner.consts, values, meet)
        else:
            results = _bind(eqn, values)
        known |= zip(eqn.outvars, results, strict=True)
    return [read(var) for var in program.outvars]


def _is_kink(eqn: Any) -> bool:
    body = eqn.params.get("call_jaxpr")
    if body is None:
        return eqn.primitive.name == "reduce_window_max"
    return [inner.params.get("name") in _ACTIVATIONS for inner in body.jaxpr.eqns] == [True]


def _has_kink(program: Any) -> bool:
    return any(_is_kink(eqn) or any(map(_has_kink, find_inner(eqn))) for eqn in program.eqns)


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # as in jax until 0.9, and since
    results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]
