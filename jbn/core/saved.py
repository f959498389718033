"""What a rematerialized network saves of its normalizations: names for ``jax.checkpoint``, and a policy of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

Tree = TypeVar("Tree")

INPUT, MOMENTS = "jbn_input", "jbn_moments"
_POLICY = jax.checkpoint_policies.save_only_these_names(INPUT, MOMENTS)


def name_arrays(name: str, tree: Tree) -> Tree:
    """Name the arrays of a tree for the policies of ``jax.checkpoint``.

    Without a second name each saved array would be held twice, because a saved value that enters the checkpoint inside
    a derivative rule leaves it as a new buffer, which XLA does not recognize. So readers get an alias,
    ``<name>_read``, that no policy saves; to make it again from the saved array is free.
    """
    return jax.tree.map(lambda leaf: checkpoint_name(checkpoint_name(leaf, name), f"{name}_read"), tree)


def remat_policy() -> Callable[..., Any]:
    """Return the policy of ``jax.checkpoint`` that saves what normalizations read, and recomputes what they return.

    Saved are the input of every normalization, its residual and its moments, by the names ``jbn_input`` and
    ``jbn_moments``. The backward pass makes each y of these again, element by element: no convolution that feeds a
    normalization runs twice, and no statistics are taken twice. To save more, join it with another policy by
    ``jax.checkpoint_policies.save_from_both_policies``.

    Wrap the loss. A wrapper around the network alone saves its output too, and one around every block of convolution
    and normalization the input of each block: they can need more memory than none.

    Returns:
        A policy for ``jax.checkpoint`` and ``flax.linen.remat``, the same object at every call.

    >>> import jax, jax.numpy as jnp, jbn
    >>> params, state = jbn.bn_init(4)
    >>> def loss(kernel, x):
    ...     y, new = jbn.bn_forward(params, state, x @ kernel, True, activation=jax.nn.relu)
    ...     return jnp.square(y @ kernel).mean(), new
    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> leaner = jax.checkpoint(loss, policy=jbn.remat_policy())
    >>> (value, new), slope = jax.value_and_grad(leaner, has_aux=True)(jnp.eye(4), x)
    >>> bool(jnp.allclose(slope, jax.grad(loss, has_aux=True)(jnp.eye(4), x)[0], atol=1e-6))
    True
    """
    return _POLICY
