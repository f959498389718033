"""One step of `jbn train`: augmentation, gradient, optimizer, average of weights; the same on any number of devices."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import dm_pix as pix
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from jbn import decay_mask


@dataclass(frozen=True)
class Recipe:
    """What makes a step: the network, and how its weights move. Hashable, so that it is static under `jax.jit`."""

    network: nn.Module
    optimizer: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    steps: int
    weight_decay: float
    augment: tuple[str, ...]
    ema: float
    seed: int

    def rate(self) -> optax.Schedule:
        """Return the learning rate as a function of the step."""
        if self.schedule == "cosine":
            end = max(self.steps, self.warmup_steps + 1)  # of a run that is all warmup the decay is never seen
            return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup_steps, end)
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, optax.constant_schedule(self.learning_rate)], [self.warmup_steps])

    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer."""
        if self.optimizer == "adamw":
            return optax.adamw(self.rate(), weight_decay=self.weight_decay, mask=decay_mask)
        decay = optax.add_decayed_weights(self.weight_decay, decay_mask)
        return optax.chain(decay, optax.sgd(self.rate(), momentum=0.9, nesterov=True))


class Batch(NamedTuple):
    """Rows of the data, spread over all devices of all processes."""

    images: Array  # (n, h, w, c) float32
    labels: Array  # (n,) int32
    valid: Array | None  # (n,) bool, False in padding; None where there is none
    signals: Array  # (devices,) int32: the signal that the process of each device was sent, 0 for none


class State(NamedTuple):
    """What a step changes, as pytrees; the same on every device."""

    step: Array  # () int32, steps made
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any  # of {"params", "batch_stats"} over the steps, or None


class Measures(NamedTuple):
    """What a step says of itself, before it moves the weights."""

    loss: Array  # () float32, the mean over valid rows
    accuracy: Array  # () float32
    gradient_norm: Array  # () float32
    learning_rate: Array  # () float32
    signal: Array  # () int32, the largest of the signals


@partial(jax.jit, static_argnames=("recipe", "shape"))
def initial(recipe: Recipe, shape: tuple[int, int, int]) -> State:
    """Return the state before the first step, for images of `shape`."""
    # Two images: of a single one, an 8x8 image at a quarter of its size has few values per channel.
    variables = recipe.network.init(jax.random.key(recipe.seed), jnp.zeros((2, *shape)), train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats}) if recipe.ema else None
    return State(jnp.int32(0), params, stats, recipe.transformation().init(params), average)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def update(recipe: Recipe, state: State, batch: Batch) -> tuple[State, Measures]:
    """Return the state after a step on `batch`, and what it measured. The state passed in is gone afterwards.

    Where the loss or the gradient is not finite, the state stays as it was: what led there can still be looked at.
    """
    images = augmented(recipe, state.step, batch.images)

    def loss_fn(params: Any) -> tuple[Array, tuple[Any, Array]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = recipe.network.apply(variables, images, train=True, valid=batch.valid, mutable=["batch_stats"])
        losses, right = judged(logits, batch.labels)
        return jnp.mean(losses, where=batch.valid), (new, jnp.mean(right, where=batch.valid))

    (loss, (new, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    norm = optax.tree.norm(grads)
    updates, opt_state = recipe.transformation().update(grads, state.opt_state, state.params)
    params, stats = optax.apply_updates(state.params, updates), new.get("batch_stats", {})
    average = state.average
    if recipe.ema:
        # The first average is of random weights: it is forgotten faster than `ema` says.
        decay = jnp.minimum(recipe.ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update({"params": params, "batch_stats": stats}, average, 1 - decay)
    moved = State(state.step + 1, params, stats, opt_state, average)
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda after, before: jnp.where(fine, after, before), moved, state)
    rate = jnp.asarray(recipe.rate()(state.step), jnp.float32)
    return kept, Measures(loss, accuracy, norm, rate, batch.signals.max())


@partial(jax.jit, static_argnames="network")
def evaluated(network: nn.Module, params: Any, batch_stats: Any, batch: Batch) -> tuple[Array, Array]:
    """Return the sums of the losses and of the right answers over the valid rows, by the running statistics."""
    logits = network.apply({"params": params, "batch_stats": batch_stats}, batch.images, train=False)
    losses, right = judged(cast(Array, logits), batch.labels)
    return jnp.sum(losses, where=batch.valid), jnp.sum(right, where=batch.valid)


def judged(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross entropy of each row, and 1.0 where the answer is right."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses, (logits.argmax(-1) == labels).astype(jnp.float32)


def augmented(recipe: Recipe, step: Array, images: Array) -> Array:
    """Shift each image by up to an eighth of its size and flip every other one, as `recipe.augment` asks.

    What happens to a row depends on the seed, the step and its place in the batch, not on the device it is on.
    """
    if not recipe.augment:
        return images
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)
    _, height, width, _ = images.shape

    def of_one(row: Array, image: Array) -> Array:
        shift, flip = jax.random.split(jax.random.fold_in(key, row))
        if "shift" in recipe.augment:
            around = [(height // 8, height // 8), (width // 8, width // 8), (0, 0)]
            image = pix.random_crop(shift, jnp.pad(image, around), images.shape[1:])
        return pix.random_flip_left_right(flip, image) if "flip" in recipe.augment else image

    return jax.vmap(of_one)(jnp.arange(len(images)), images)
