"""Where a loss or a gradient that is not finite began: the first layer, in the order of the data."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jbn import moments
from jbn.lab.data.batches import Batch
from jbn.lab.step import Recipe, State, loss
from jbn.linen import BatchNorm


def blame(recipe: Recipe, state: State, batch: Batch) -> str:
    """Return in words what is not finite first when ``batch`` goes through the network forward, and then backward."""
    layers: list[str] = []

    def watched(params: Any) -> tuple[Array, list[Array]]:
        seen: list[Array] = []

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                layers.append("/".join(context.module.path))
                of_batch = moments(args[0], mask=kwargs["mask"])
                seen.append(jnp.isfinite(of_batch.mean).all() & jnp.isfinite(of_batch.var).all())
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            return loss(recipe, params, state, batch)[0], seen

    @jax.jit
    def look(params: Any) -> Any:
        (value, seen), grads = jax.value_and_grad(watched, has_aux=True)(params)
        fine = jax.tree.map(lambda grad: jnp.isfinite(grad).all(), grads)
        return jnp.isfinite(batch.images).all(), seen, jnp.isfinite(value), fine

    images, seen, value, grads = jax.device_get(look(state.params))
    if not images:
        return "the images of this batch hold values that are not finite"
    first = [layer for layer, finite in zip(layers, seen, strict=True) if not finite]
    if first:
        return f"the first statistics that are not finite are those of {first[0]}"
    if not value:
        return "the statistics of every batch norm are finite: it began after the last of them"
    leaves = jax.tree.leaves_with_path(grads)
    bad = [jax.tree_util.keystr(path, simple=True, separator="/") for path, fine in leaves if not fine]
    if not bad:
        return "loss and gradients are finite, but the gradients are too large for their norm"
    return f"the loss is finite, the gradients of these are not: {', '.join(bad)}"
