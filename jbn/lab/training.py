"""Training one network: the step, the record, and checkpoints that a killed run goes on from."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import Mesh

from jbn.lab.data import Digits, batch
from jbn.lab.devices import Batch, replicated, sharded

EVALUATION_INTERVAL = 5
# A checkpoint takes about 50 ms, and a step from 0.3 ms (dense) to 300 ms (conv64).
CHECKPOINT_INTERVAL = 50
PERCENTILES = (5, 15, 50, 85, 95)
PROBE_IMAGES = 64
PROBE_GRID = 8

# A run killed while it deletes an old checkpoint leaves a part of it, which Orbax warns of and we do not read.
logging.getLogger("absl").addFilter(lambda record: "Metadata file does not exist" not in str(record.msg))


class TrainState(NamedTuple):
    """What a step changes: parameters, running statistics and the state of the optimizer, as pytrees."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Trained(NamedTuple):
    """A network after its last step, with what was recorded.

    `history` has one float32 value per step (`training_loss`) or per entry of `evaluation_steps`
    (`validation_accuracy`, `validation_loss`, and the five `preactivation_percentiles`); `seconds`, float64
    (steps,), is NaN for steps that were not timed because they compiled.
    """

    state: TrainState
    history: dict[str, np.ndarray]
    seconds: np.ndarray


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training: `step` steps were made, of which `saved` are in the last checkpoint."""

    def __init__(self, step: int, saved: int) -> None:
        super().__init__()
        self.step = step
        self.saved = saved


def _loss(logits: jax.Array, labels: jax.Array, valid: jax.Array | None) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), where=valid)


@partial(jax.jit, static_argnames=("network", "learning_rate"))
def initial_state(network: nn.Module, learning_rate: float, seed: jax.Array, images: jax.Array) -> TrainState:
    """Return the state before the first step for images (n, h, w, c); both variants get the same kernels."""
    variables = network.init(jax.random.key(seed), images, train=False)
    params = variables["params"]
    return TrainState(params, variables.get("batch_stats", {}), optax.sgd(learning_rate).init(params))


@partial(jax.jit, static_argnames=("network", "learning_rate"), donate_argnames="state")
def train_step(
    network: nn.Module,
    learning_rate: float,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    valid: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
    """Return the state after one step of gradient descent, and the loss () before it.

    Images are float32 (n, h, w, c), labels int32 (n,); rows where `valid` (n,) is False count for nothing. The
    state passed in is donated: it is gone afterwards. Sharded images are one batch, for this is plain `jax.jit`.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = network.apply(variables, images, train=True, valid=valid, mutable=["batch_stats"])
        return _loss(logits, labels, valid), updates.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optax.sgd(learning_rate).update(grads, state.opt_state)
    return TrainState(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss


@partial(jax.jit, static_argnames="network")
def evaluate(
    network: nn.Module, state: TrainState, images: jax.Array, labels: jax.Array, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return accuracy () and loss () on the valid images (n, h, w, c), normalizing with the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = cast(jax.Array, network.apply(variables, images, train=False))
    return jnp.mean(logits.argmax(-1) == labels, where=valid), _loss(logits, labels, valid)


@partial(jax.jit, static_argnames="network")
def preactivation_percentiles(network: nn.Module, state: TrainState, images: jax.Array) -> jax.Array:
    """Return the `PERCENTILES` (5,) of what enters the last ReLU for images (n, h, w, c), over all units.

    Batch norm uses the statistics of these images, as in training; the running statistics are left alone.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    x, _ = network.apply(variables, images, train=True, preactivations=True, mutable=["batch_stats"])
    if x.ndim == 4:
        # An 8x8 grid of positions is enough; to sort all 64x64 would take longer than the training.
        x = x[:, :: x.shape[1] // PROBE_GRID, :: x.shape[2] // PROBE_GRID]
    return jnp.percentile(x, jnp.array(PERCENTILES))


def evaluation_steps(steps: int) -> list[int]:
    """Return the step counts after which the network is evaluated: every fifth, from 0 on, and the last."""
    return sorted({*range(0, steps, EVALUATION_INTERVAL), steps})


def _empty_history(steps: int) -> dict[str, np.ndarray]:
    evaluations = len(evaluation_steps(steps))
    return {
        "training_loss": np.full(steps, np.nan, np.float32),
        "validation_accuracy": np.full(evaluations, np.nan, np.float32),
        "validation_loss": np.full(evaluations, np.nan, np.float32),
        "preactivation_percentiles": np.full((evaluations, len(PERCENTILES)), np.nan, np.float32),
    }


def _record_evaluation(network: nn.Module, trained: Trained, index: int, data: Batch, probe: jax.Array) -> None:
    # Converted here: NumPy, assigning a JAX array, turns a Ctrl-C of that moment into a ValueError.
    accuracy, loss = evaluate(network, trained.state, *data)
    percentiles = preactivation_percentiles(network, trained.state, probe)
    trained.history["validation_accuracy"][index] = float(accuracy)
    trained.history["validation_loss"][index] = float(loss)
    trained.history["preactivation_percentiles"][index] = np.asarray(percentiles)


def train(
    network: nn.Module,
    data: Digits,
    checkpoints: Path,
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    mesh: Mesh,
    report: Callable[[int, dict[str, np.ndarray]], None],
) -> Trained:
    """Train a network for `steps` steps, going on from the last checkpoint in `checkpoints` if there is one.

    Each batch is spread over the devices of `mesh`. Calls `report(done, history)` at the start and after every
    step. State and history are the same to the bit however often a run was stopped and resumed on the same
    devices, and the same to rounding on any number of them; `seconds`, of course, is not.
    """
    evaluations = {step: index for index, step in enumerate(evaluation_steps(steps))}
    validation = sharded(data.validation, mesh)
    probe = replicated(data.validation.images[:PROBE_IMAGES], mesh)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager:
        start = done = manager.latest_step() or 0
        try:
            state = initial_state(network, learning_rate, np.uint32(seed), data.training.images[:2])
            trained = Trained(replicated(state, mesh), _empty_history(steps), np.full(steps, np.nan))
            if start == 0:
                _record_evaluation(network, trained, 0, validation, probe)
            else:
                trained = Trained(**manager.restore(start, args=ocp.args.StandardRestore(trained._asdict())))
            report(done, trained.history)
            while done < steps:
                images = batch(data.training, seed, done, batch_size)
                began = time.perf_counter()
                state, loss = train_step(network, learning_rate, trained.state, *sharded(images, mesh))
                trained.history["training_loss"][done] = float(loss)
                if done > start:  # the first call compiles
                    trained.seconds[done] = time.perf_counter() - began
                trained = trained._replace(state=state)
                done += 1
                if done in evaluations:
                    _record_evaluation(network, trained, evaluations[done], validation, probe)
                if done % CHECKPOINT_INTERVAL == 0 or done == steps:
                    manager.save(done, args=ocp.args.StandardSave(trained._asdict()))
                report(done, trained.history)
        except KeyboardInterrupt:
            raise Interrupted(done, manager.latest_step() or 0) from None
    return trained
