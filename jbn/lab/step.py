"""One step of training: augmentation, gradient, optimizer, average of weights; the same on any number of devices."""

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
from jbn.lab.data.batches import Batch, Batches
from jbn.lab.errors import OptionError
from jbn.lab.models import NETWORKS
from jbn.lab.options import TrainOptions

MOST_STEPS = 2**31 - 2  # they are counted in int32, and the learning rate looks one ahead
# What the demo shows of a hidden layer: these percentiles over all units, for so many images of validation.
PERCENTILES, PROBE_IMAGES, PROBE_GRID = (5, 15, 50, 85, 95), 64, 8


@dataclass(frozen=True)
class Recipe:
    """What makes a step: the network, and how its weights move. Hashable, so that it is static under ``jax.jit``.

    Attributes:
        options: of the run.
        network: what learns; its call takes images, ``train`` and ``valid``.
        per_epoch: the steps of an epoch.
    """

    options: TrainOptions
    network: nn.Module
    per_epoch: int

    @property
    def steps(self) -> int:
        """The steps of the run."""
        return self.options.steps or self.options.epochs * self.per_epoch

    @property
    def warmup(self) -> int:
        """The steps in which the learning rate grows."""
        return round(self.options.warmup_epochs * self.per_epoch)

    def rate(self) -> optax.Schedule:
        """Return the learning rate as a function of the step."""
        peak, warmup = self.options.rate, self.warmup
        if self.options.schedule == "cosine":
            end = max(self.steps, warmup + 1)  # of a run that is all warmup the decay is never seen
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, end)
        parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
        return optax.join_schedules(parts, [warmup])

    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer."""
        options = self.options
        if options.optimizer == "adamw":
            return optax.adamw(self.rate(), weight_decay=options.weight_decay, mask=decay_mask)
        decay = optax.add_decayed_weights(options.weight_decay, decay_mask)
        return optax.chain(decay, optax.sgd(self.rate(), momentum=options.momentum or None, nesterov=True))


def network_of(options: TrainOptions, classes: int) -> nn.Module:
    """Return the network of a run whose data have so many classes."""
    dtype = jnp.bfloat16 if options.dtype == "bfloat16" else None
    return NETWORKS[options.model](batch_norm=options.batch_norm, classes=classes, dtype=dtype)


def recipe_of(options: TrainOptions, batches: Batches) -> Recipe:
    """Return the recipe of a run whose training data are cut into these batches."""
    recipe = Recipe(options, network_of(options, batches.source.classes), batches.per_epoch)
    for option, steps in (("--epochs", recipe.steps), ("--warmup-epochs", recipe.warmup)):
        if steps > MOST_STEPS:
            raise OptionError(
                option, f"makes {steps} steps of these data; expected {MOST_STEPS} or fewer: fewer epochs"
            )
    return recipe


class State(NamedTuple):
    """What a step changes, as pytrees; the same on every device."""

    step: Array  # () int32, steps made
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any  # of ``variables`` over the steps, or None

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Measures(NamedTuple):
    """What a step says of itself, before it moves the weights."""

    loss: Array  # () float32, the mean over valid rows
    accuracy: Array  # () float32
    gradient_norm: Array  # () float32
    learning_rate: Array  # () float32
    signal: Array  # () int32, the largest of the signals


@partial(jax.jit, static_argnames=("recipe", "shape"))
def initial_state(recipe: Recipe, shape: tuple[int, int, int]) -> State:
    """Return the state before the first step, for images of ``shape``."""
    # Two images: of a single one, an 8x8 image at a quarter of its size has few values per channel.
    variables = recipe.network.init(jax.random.key(recipe.options.seed), jnp.zeros((2, *shape)), train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats}) if recipe.options.ema else None
    return State(jnp.int32(0), params, stats, recipe.transformation().init(params), average)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def update(recipe: Recipe, state: State, batch: Batch) -> tuple[State, Measures]:
    """Return the state after a step on ``batch``, and what it measured. The state passed in is gone afterwards.

    Where the loss or the gradient is not finite and that ends the run, the state stays as it was: what led there can
    still be looked at.
    """
    options = recipe.options
    differentiate = jax.value_and_grad(partial(loss, recipe), has_aux=True)
    (value, (new, accuracy)), grads = differentiate(state.params, state, batch)
    norm = optax.tree.norm(grads)
    updates, opt_state = recipe.transformation().update(grads, state.opt_state, state.params)
    params, stats = optax.apply_updates(state.params, updates), new.get("batch_stats", {})
    average = state.average
    if options.ema:
        # The first average is of random weights: it is forgotten faster than ``ema`` says.
        decay = jnp.minimum(options.ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update({"params": params, "batch_stats": stats}, average, 1 - decay)
    moved = State(state.step + 1, params, stats, opt_state, average)
    if not options.record:
        fine = jnp.isfinite(value) & jnp.isfinite(norm)
        moved = jax.tree.map(lambda after, before: jnp.where(fine, after, before), moved, state)
    rate = jnp.asarray(recipe.rate()(state.step), jnp.float32)
    return moved, Measures(value, accuracy, norm, rate, batch.signals.max())


def loss(recipe: Recipe, params: Any, state: State, batch: Batch) -> tuple[Array, tuple[Any, Array]]:
    """Return the mean loss of a batch in training at these weights, the new statistics, and the share that is right."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    images = augment(recipe.options, state.step, batch.images)
    logits, new = recipe.network.apply(variables, images, train=True, valid=batch.valid, mutable=["batch_stats"])
    losses, right = judge(logits, batch.labels)
    return jnp.mean(losses, where=batch.valid), (new, jnp.mean(right, where=batch.valid))


@partial(jax.jit, static_argnames="network")
def evaluate(network: nn.Module, variables: Any, batch: Batch) -> tuple[Array, Array]:
    """Return the sums of the losses and of the right answers over the valid rows, by the running statistics."""
    logits = network.apply(variables, batch.images, train=False)
    losses, right = judge(cast(Array, logits), batch.labels)
    return jnp.sum(losses, where=batch.valid), jnp.sum(right, where=batch.valid)


@partial(jax.jit, static_argnames="network")
def preactivations(network: nn.Module, variables: Any, images: Array) -> Array:
    """Return the ``PERCENTILES`` (5,) of what enters the last ReLU for images (n, h, w, c), over all units.

    Batch norm uses the statistics of these images, as in training; the running statistics are left alone.
    """
    x, _ = network.apply(variables, images, train=True, preactivations=True, mutable=["batch_stats"])
    if x.ndim == 4:
        # An 8x8 grid of positions is enough; to sort all 64x64 would take longer than the training.
        x = x[:, :: x.shape[1] // PROBE_GRID, :: x.shape[2] // PROBE_GRID]
    return jnp.percentile(x, jnp.array(PERCENTILES))


def judge(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross entropy of each row, and 1.0 where the answer is right."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses, (logits.argmax(-1) == labels).astype(jnp.float32)


def augment(options: TrainOptions, step: Array, images: Array) -> Array:
    """Shift each image by up to an eighth of its size and flip every other one, as far as ``options`` ask for it.

    What happens to a row depends on the seed, the step and its place in the batch, not on the device it is on.
    """
    if not options.augment:
        return images
    key = jax.random.fold_in(jax.random.key(options.seed), step)
    _, height, width, _ = images.shape

    def of_one(row: Array, image: Array) -> Array:
        shift, flip = jax.random.split(jax.random.fold_in(key, row))
        if "shift" in options.augment:
            around = [(height // 8, height // 8), (width // 8, width // 8), (0, 0)]
            image = pix.random_crop(shift, jnp.pad(image, around), images.shape[1:])
        return pix.random_flip_left_right(flip, image) if "flip" in options.augment else image

    return jax.vmap(of_one)(jnp.arange(len(images)), images)
