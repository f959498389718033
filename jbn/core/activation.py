"""The activation as a program: what it does decides whether it is the one of before, not what can be found in it.

An activation may take arrays from anywhere: a closure, a default argument, a global, an attribute of an object, the
rule of its own derivative. When it is traced, all of them become constants of a program. Here they become arguments of
the derivative rule instead, so that they are differentiated and seen at every call. What is left is a program without
arrays. That can be static: equal programs share what was compiled, and nothing is kept alive by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer, eval_jaxpr
from jax.dtypes import float0

from jbn.core import checks
from jbn.core.lax import lax
from jbn.core.programs import WITH_RULE, bodies, equations, find_settings, find_type, inline, write

Activation: TypeAlias = Callable[[Array], Array]


@dataclass(frozen=True)
class Program:
    """An activation, traced for one shape and dtype of z; two are equal if they compute the same.

    Attributes:
        text: what it computes, and its derivative, in words.
        settings: what its operations are told, such as a mesh: the words of two can be the same.
        inexact: for each array that f holds, whether it has tangents.
        selects: whether the derivative passes each number of dz on or puts 0 in its place, as that of ReLU does.
        value: f(z), of z and the arrays that f holds.
        slope: f'(z) dz, of z, the arrays that f holds, the tangents of both, and the arrays that its rule alone holds.
    """

    text: str
    settings: tuple[Any, ...]
    inexact: tuple[bool, ...]
    selects: bool
    value: Any = field(compare=False, repr=False)
    slope: Any = field(compare=False, repr=False)

    def __call__(self, z: Array, arrays: Sequence[Array]) -> Array:
        """Return f(z)."""
        return eval_jaxpr(self.value, (), z, *arrays[: len(self.inexact)])[0]

    def differentiate(self, z: Array, arrays: Sequence[Array], dz: Array, darrays: Sequence[Array]) -> Array:
        """Return f'(z) dz, and what the tangents of the arrays that f holds add to it."""
        held, of_rule = arrays[: len(self.inexact)], arrays[len(self.inexact) :]
        tangents = [d for d, has in zip(darrays, self.inexact, strict=False) if has]
        return eval_jaxpr(self.slope, of_rule, z, *held, dz, *tangents)[0]


def trace_activation(
    activation: Activation | None, z: jax.ShapeDtypeStruct, *others: Array
) -> tuple[Program | None, tuple[Array, ...]]:
    """Return an activation as a program, and the arrays that it holds.

    Args:
        activation: a function of one array, or None.
        z: the shape and dtype of that array.
        others: the arrays that z will be made of: over which mesh axes z varies follows from theirs.
    """
    if activation is None:
        return None, ()
    checks.check_callable("activation", activation, "of one array, for instance jax.nn.relu")
    typed = find_type(z.dtype, *map(jax.typeof, others))
    return (_trace_once if _is_of_jax(activation) else _trace)(activation, typed)


# As they were when this was imported: what somebody puts in their places later may do another thing at every call.
_OF_JAX = {id(function): function for room in (jax.nn, jnp, lax) for function in vars(room).values()}


def _is_of_jax(activation: Any) -> bool:
    """Say whether a function is one that JAX itself has, by identity: such a one does the same at every call."""
    return _OF_JAX.get(id(activation)) is activation


def _trace(activation: Activation, z: jax.ShapeDtypeStruct) -> tuple[Program, tuple[Array, ...]]:
    # What is traced is a new function at each call, because JAX keeps the program of a function that it knows.
    try:
        traced = jax.make_jaxpr(lambda z: activation(z))(z)
    except Exception as error:
        error.add_note(checks.IN_ACTIVATION)
        raise
    checks.check_activation_output(traced.out_avals, z)
    # Calls stand where they are made from here on, because an inner ``jit`` has constants of its own.
    f = jax.make_jaxpr(lambda z: inline(traced.jaxpr, traced.consts, z))(z)
    inexact = tuple(bool(jnp.issubdtype(array.dtype, jnp.inexact)) for array in f.consts)
    # Nothing differentiates the value, so that it needs no rules.
    value = jax.make_jaxpr(lambda z, *held: inline(f.jaxpr, held, z, also=WITH_RULE))(z, *f.consts)

    def differentiate(z: Array, *others: Array) -> Array:
        held, (dz, *given) = others[: len(inexact)], others[len(inexact) :]
        tangents = iter(given)
        dheld = (next(tangents) if has else np.zeros(h.shape, float0) for h, has in zip(held, inexact, strict=True))
        _, dy = jax.jvp(lambda z, *held: eval_jaxpr(f.jaxpr, held, z)[0], (z, *held), (dz, *dheld))
        return dy

    tangents = [array for array, has in zip(f.consts, inexact, strict=True) if has]
    rough = jax.make_jaxpr(differentiate)(z, *f.consts, z, *tangents)
    slope = jax.make_jaxpr(lambda *args: inline(rough.jaxpr, rough.consts, *args))(z, *f.consts, z, *tangents)
    text = "\n".join([*map(write, (value, slope)), _check_rules(traced, f, slope, z)])
    selects = _selects(slope.jaxpr, len(f.consts) + 1)
    settings = tuple(find_settings(value, slope))
    return Program(text, settings, inexact, selects, value.jaxpr, slope.jaxpr), (*f.consts, *slope.consts)


_trace_once = lru_cache(maxsize=1024)(_trace)


def _check_rules(traced: Any, f: Any, slope: Any, z: jax.ShapeDtypeStruct) -> str:
    """Refuse rules of derivatives whose arrays cannot be arguments; return what else decides the derivative."""
    rules = (eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name in WITH_RULE)
    if any(isinstance(array, Tracer) for array in f.consts) and any(rule.params.get("num_consts") for rule in rules):
        raise TypeError(checks.HELD_BY_RULE)
    if any(body.consts for program in (f, slope) for eqn in equations(program.jaxpr) for body in bodies(eqn)):
        raise TypeError(checks.HELD_INSIDE.format(name="activation"))
    if not any(eqn.primitive.name == "custom_lin" for eqn in equations(slope.jaxpr)):
        return ""

    def transpose(z: Array, g: Array, *held: Array) -> Any:
        return jax.vjp(lambda z: eval_jaxpr(f.jaxpr, held, z)[0], z)[1](g)

    back = jax.make_jaxpr(transpose)(z, z, *f.consts)
    if back.consts:
        raise TypeError(checks.HELD_BY_VJP)
    return write(back)


def _selects(jaxpr: Any, tangent: int) -> bool:
    """Say whether a program returns its argument number ``tangent`` with zeros in the place of some numbers."""
    passed, zero = {jaxpr.invars[tangent]}, set[Any]()

    def is_zero(atom: Any) -> bool:
        return bool(np.all(atom.val == 0)) if hasattr(atom, "val") else atom in zero

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        data = eqn.invars[1:] if name == "select_n" else eqn.invars
        known = [is_zero(atom) or (not hasattr(atom, "val") and atom in passed) for atom in data]
        if name in ("broadcast_in_dim", "convert_element_type") and is_zero(data[0]):
            zero.update(eqn.outvars)
        elif name == "select_n" and all(known):
            (zero if all(map(is_zero, data)) else passed).update(eqn.outvars)
    (returned,) = jaxpr.outvars
    return not hasattr(returned, "val") and returned in passed
