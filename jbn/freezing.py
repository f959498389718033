"""What freezing needs beside the layers: statistics that stay, masks of parameters for optax, how a layer is frozen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypeVar

import jax

from jbn.core.checks import read_flag
from jbn.paths import ArrayTree, Patterns, count_of, flatten, join, name_few, select

Tree = TypeVar("Tree")
"""A tree of arrays; what comes back has its structure."""

# What scales and shifts by feature is not decayed: pulling a scale towards zero regularizes nothing.
_NOT_DECAYED = (("scale",), ("bias",))
_STATISTICS = (("mean",), ("var",))


def keep_statistics(old: Tree, new: ArrayTree, patterns: Patterns = "*") -> Tree:
    """Return the statistics after a step: the old ones at the layers that match, the new ones elsewhere.

    It serves models of any library, whose layers know nothing of freezing: they normalize as before, and only what they
    remember is chosen. The layers of jbn can be frozen in four ways, in evaluation they all evaluate:

    ===========================================  ===============================  ===============================
    where the network trains                     ``bn_forward``                   ``jbn.linen.freeze`` (a context),
                                                                                  ``jbn.nnx.freeze`` (in place)
    ===========================================  ===============================  ===============================
    1. statistics fixed, scale and bias learn    ``train=False``                  the default
    2. everything fixed                          ``train=False``, and of params   ``affine=True``
                                                 ``jax.lax.stop_gradient``
    3. running statistics used, and moving       ``train=False, update=True``     ``update=True``
    4. those of the batch used, none remembered  ``train=True, update=False``     ``use_running_average=False``
    ===========================================  ===============================  ===============================

    A gradient of zero does not stop weight decay: with 2 the optimizer needs ``jbn.trainable_mask``.

    Paths are the keys of a tree from its root, joined by ``/``: ``backbone/BatchNorm_0/mean``; boxes around arrays,
    such as ``nnx.BatchStat``, add nothing. Patterns are those of ``fnmatch.fnmatchcase`` on the whole path: ``*``
    crosses ``/``, ``?`` is one character, ``[ab]`` one of those. As a whole key ``**`` may also stand for no key:
    ``backbone/**/bn`` matches ``backbone/bn``. What matches a node matches everything under it: ``backbone`` is all of
    the backbone. A pattern after ``!`` takes away from the others, or from everything: ``"!head"`` is all but the head,
    ``["backbone", "!*/bn"]`` the backbone without its norms. A key that begins with ``!`` is written with ``?``.

    Args:
        old: the statistics before the step, a tree of arrays such as ``batch_stats`` of Flax Linen, ``nnx.state(model,
            nnx.BatchStat)`` or a dictionary of ``jbn.State``.
        new: those after it, at the same paths.
        patterns: one or several, of layers or of what is above them; all layers unless given.

    Returns:
        A tree of the structure of ``old``.

    Raises:
        ValueError: for a pattern that matches nothing, and for trees of different paths.
        TypeError: for patterns that are not strings.

    >>> import jax, jbn
    >>> old = {"backbone": {"bn": jbn.bn_init(2)[1]}, "head": {"bn": jbn.bn_init(2)[1]}}
    >>> new = jax.tree.map(lambda value: value + 1, old)
    >>> kept = jbn.keep_statistics(old, new, "backbone")
    >>> kept["backbone"]["bn"].var.tolist(), kept["head"]["bn"].var.tolist()
    ([1.0, 1.0], [2.0, 2.0])
    """
    keys, before, structure = flatten(old, "old")
    other_keys, after, _ = flatten(new, "new")
    paths, others = list(map(join, keys)), list(map(join, other_keys))
    if paths != others:
        lost, more = (sorted(set(a) - set(b)) for a, b in ((paths, others), (others, paths)))
        raise ValueError(
            f"old and new differ: of {len(paths)} and {count_of(len(others), 'path')}, only old has "
            f"{name_few(map(repr, lost))}, "
            f"only new has {name_few(map(repr, more))}; expected the statistics of one model before and after a step, "
            "such as variables['batch_stats'] and updates['batch_stats'] in Flax Linen."
        )
    chosen = zip(select(paths, patterns), before, after, strict=True)
    return jax.tree.unflatten(structure, [b if kept else a for kept, b, a in chosen])


def freeze(old: Tree, new: ArrayTree, patterns: Patterns = "*") -> Tree:
    """Do what ``keep_statistics`` does; this is its name of before, which said more than it does."""
    warnings.warn("jbn.freeze is jbn.keep_statistics now: it freezes nothing by itself.", DeprecationWarning, 2)
    return keep_statistics(old, new, patterns)


def trainable_mask(params: Tree, frozen: Patterns) -> Tree:
    """Return a tree of bools for optax: False where a pattern matches, True elsewhere.

    Args:
        params: a tree of arrays, such as ``params`` of Flax Linen or ``nnx.state(model, nnx.Param)``.
        frozen: one pattern or several, see ``jbn.keep_statistics``: ``"backbone"``, ``"**/BatchNorm_*"``,
            ``"*/scale"``, ``"!head"`` for all but the head.

    Returns:
        A tree of the structure of ``params``. As labels of ``optax.multi_transform`` it keeps frozen parameters to the
        last bit, whatever their gradients and whatever weight decay and momentum would do. ``optax.masked(tx, mask)``
        does not: it adds raw gradients where the mask is False. Optax takes a function of params too, and
        ``nnx.Optimizer`` needs one: it is initialized with ``nnx.Param`` boxes and updated with arrays, and a tree of
        bools fits one of them alone.

    Raises:
        ValueError: for a pattern that matches nothing.
        TypeError: for patterns that are not strings.

    >>> import functools, jbn, jax.numpy as jnp, optax
    >>> params = {"backbone": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    >>> jbn.trainable_mask(params, "backbone")
    {'backbone': {'kernel': False}, 'head': {'kernel': True}}
    >>> mask = functools.partial(jbn.trainable_mask, frozen="backbone")
    >>> tx = optax.multi_transform({True: optax.adamw(1e-3), False: optax.set_to_zero()}, mask)
    """
    keys, _, structure = flatten(params, "params")
    return jax.tree.unflatten(structure, [not hit for hit in select(list(map(join, keys)), frozen, argument="frozen")])


def decay_mask(params: Tree) -> Tree:
    """Return a tree of bools for weight decay: False for what is named scale or bias, True elsewhere.

    Args:
        params: a tree of arrays, as in ``trainable_mask``; the last key of a path is the name.

    Returns:
        A tree of the structure of ``params``. Optax takes the function itself, which ``nnx.Optimizer`` needs, as for
        ``trainable_mask``.

    >>> import jbn, jax.numpy as jnp, optax
    >>> jbn.decay_mask({"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "bn": {"scale": jnp.ones(2)}})
    {'bn': {'scale': False}, 'conv': {'bias': False, 'kernel': True}}
    >>> tx = optax.adamw(1e-3, mask=jbn.decay_mask)
    """
    paths, _, structure = flatten(params, "params")
    return jax.tree.unflatten(structure, [keys[-1:] not in _NOT_DECAYED for keys in paths])


def norm_mask(params: Tree, state: ArrayTree) -> Tree:
    """Return a tree of bools for optax: True for the scale and bias of normalizations with statistics, else False.

    With it the normalizations alone are trained, as in adaptation to data of another kind at test time.

    Args:
        params: a tree of arrays, as in ``trainable_mask``.
        state: the statistics of the same model, such as ``batch_stats`` of Flax Linen or
            ``nnx.state(model, nnx.BatchStat)``: a normalization is where a mean and a var are.

    Returns:
        A tree of the structure of ``params``, as labels of ``optax.multi_transform``. ``nnx.Optimizer`` needs a
        function: ``functools.partial(jbn.norm_mask, state=state)``.

    Raises:
        ValueError: where no parameter is beside statistics.

    >>> import jbn, jax.numpy as jnp
    >>> params = {"conv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "bn": {"scale": jnp.ones(2)}}
    >>> jbn.norm_mask(params, {"bn": jbn.bn_init(2)[1]})
    {'bn': {'scale': True}, 'conv': {'bias': False, 'kernel': False}}

    Source: D. Wang, E. Shelhamer, S. Liu, B. Olshausen, T. Darrell, "Tent: Fully Test-Time Adaptation by Entropy
    Minimization", 2021: statistics of the batch, and gradients for scale and bias alone.
    """
    paths, _, structure = flatten(params, "params")
    places = {keys[:-1] for keys in flatten(state, "state")[0] if keys[-1:] in _STATISTICS}
    hits = [keys[:-1] in places and keys[-1:] in _NOT_DECAYED for keys in paths]
    if not any(hits):
        raise ValueError(
            f"params has {name_few(map(join, paths))}, and state statistics at {name_few(map(join, places))}; expected "
            "a scale or a bias beside a mean and a var: the two trees of one model, such as variables['params'] and "
            "variables['batch_stats']."
        )
    return jax.tree.unflatten(structure, hits)


@dataclass(frozen=True)
class Frozen:
    """How a layer is frozen where it trains; by default not at all. Where it evaluates, only ``affine`` counts.

    Attributes:
        use_running_average: whether the running statistics normalize.
        update: whether the running statistics move.
        affine: whether scale and bias are constants.
    """

    use_running_average: bool = False
    update: bool = True
    affine: bool = False

    @classmethod
    def read(cls, **flags: object) -> Frozen:
        """Read the flags of ``freeze``."""
        return cls(**{name: read_flag(name, value) for name, value in flags.items()})

    def flags(self, evaluate: bool) -> tuple[bool, bool]:
        """Return ``train`` and ``update`` of ``bn_forward``."""
        return not (evaluate or self.use_running_average), self.update and not evaluate
