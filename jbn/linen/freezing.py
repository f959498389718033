"""``freeze``: a context in which layers of a Linen model stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jbn.freezing import Frozen
from jbn.linen.contexts import Scope
from jbn.linen.statistics import holds_statistics
from jbn.paths import Patterns, join, match, name_few, select
from jbn.replacing import Found


@dataclass(frozen=True)
class _Rule:
    """What one ``freeze`` asks for."""

    patterns: tuple[str, ...]
    frozen: Frozen


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Mark:
    """How a layer is frozen, as a variable without arrays: a part of the structure of the variables alone."""

    frozen: Frozen


_SCOPE = Scope[_Rule]("freeze")
_MARKS = "jbn_frozen"


def frozen_at(path: str) -> Frozen:
    """Return how the layer at a path is frozen; where several rules match, the innermost decides."""
    for rule, found in _SCOPE.active():
        found.meet(path, match(path, rule.patterns))
    return _choose(path)


def _choose(path: str) -> Frozen:
    frozen = Frozen()
    for rule, _ in _SCOPE.active():
        frozen = rule.frozen if match(path, rule.patterns) else frozen
    return frozen


@contextmanager
def _mark(root: Any) -> Iterator[None]:
    """Let the variables of a model say how each layer is frozen while a method of it runs.

    ``nn.jit`` gives modules of equal fields one program, whatever their paths are; of variables it knows the structure.
    """
    held = root._variables
    if _MARKS in held or "batch_stats" not in held:
        yield
        return
    held[_MARKS] = unflatten_dict({(*keys, ""): _Mark(_choose(path)) for keys, path in _find_layers(root).items()})
    try:
        yield
    finally:
        held.pop(_MARKS, None)


def _find_layers(root: Any) -> dict[tuple[str, ...], str]:
    """Return the keys of what holds statistics below a scope, and the paths."""
    held = flatten_dict(root._variables.get("batch_stats", {}))
    return {keys[:-1]: join((*root.path, *keys[:-1])) for keys in held}


@contextmanager
def freeze(
    patterns: Patterns = "*", *, use_running_average: bool = True, update: bool = False, affine: bool = False
) -> Iterator[Found]:
    """Keep ``BatchNorm`` layers as they are inside a ``with`` block, while the model around them trains.

    It acts where the model trains: a call in evaluation stays one, and so does the initialization. It takes Flax's
    layers too inside ``replace``, in either order. Of several around one another the innermost that matches a layer
    decides. A compiled step is compiled once more inside, and is what it was before after the block: ``jax.jit`` knows
    of this context. Only what was compiled ahead of time, or exported, stays as it was traced. It holds for its thread,
    as contexts of JAX and Flax do: between its ends there must be no ``await`` or ``yield`` to code that it is not for.

    Args:
        patterns: one or several for the paths of layers, see ``jbn.keep_statistics``; all unless given.
        use_running_average: whether they normalize by their running statistics or by those of the batch.
        update: whether the running statistics move all the same.
        affine: whether scale and bias are constants, in evaluation too. Weight decay needs ``jbn.trainable_mask``.

    Yields:
        ``Found(paths, skipped)``, which fills up as layers are traced or called: those that match, and those that do
        not or are not jbn's. Where all was compiled under the same context before, no layer is met again, and of
        those that ``nn.jit`` compiles as one and that are frozen alike, one is.

    Raises:
        TypeError: for patterns that are not strings, and flags that are not bools.
        RuntimeError: at the end, where tasks that run in turns have entered contexts and end them in another order.

    Warns:
        UserWarning: at the end, where a pattern has matched no layer, and where it has matched one that is not jbn's:
            whatever else holds a ``mean`` and a ``var`` in ``batch_stats``; and where layers may not be told apart.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), jbn.linen.BatchNorm(False), nn.relu]), jnp.ones((8, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> with jbn.linen.freeze("layers_*") as frozen:
    ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
    >>> frozen.paths, float(updates["batch_stats"]["layers_1"]["var"][0])
    (('layers_1',), 1.0)
    """
    match("", patterns)  # Patterns of another kind are refused here, before the block.
    several = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    frozen = Frozen.read(use_running_average=use_running_average, update=update, affine=affine)
    rule = _Rule(several, frozen)
    others, there, unknown = list[str](), list[str](), list[str]()
    depth = 0

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal depth
        layer = context.module
        if layer.scope is None:
            return call(*args, **kwargs)
        root, path = layer.scope.root, join(layer.path)
        if depth == 0 and root.path:
            unknown.append(join(root.path))
        depth += 1
        try:
            with _mark(root):
                y = call(*args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            there.extend(path for path in _find_layers(root).values() if path not in there)
        if holds_statistics(layer) and path not in (*found.paths, *found.skipped):
            found.meet(path, False)  # jbn's have been met by their own call
            others.append(path)
        return y

    with _SCOPE.enter(rule) as found, nn.intercept_methods(intercept):
        yield found
    if unknown and several != ("*",):
        warnings.warn(
            f"freeze() may take others for {unknown[0]!r}: it is compiled, or transformed otherwise, outside of any "
            "method of the model, and nn.jit gives modules of equal fields one program. Expected a method of the model "
            "around it: apply(..., method='encode') instead of a lambda, or of children of a bound model.",
            stacklevel=3,
        )
    if hits := [path for path in others if match(path, several)]:
        warnings.warn(
            f"freeze() leaves {name_few(map(repr, hits))} as they are, which match and are not jbn's; expected "
            "jbn.linen.BatchNorm. Call the model inside jbn.linen.replace() too, with also= for copies of Flax's, "
            "or let the patterns leave them out.",
            stacklevel=3,
        )
    if _SCOPE.has_met(rule) and not (found.paths or found.skipped):
        return
    try:
        select(list(dict.fromkeys((*found.paths, *found.skipped, *there))), several, "layer")
    except ValueError as error:
        warnings.warn(f"freeze(): {error} It acts on what is called inside the block.", stacklevel=3)
