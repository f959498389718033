"""Norms in networks, beside Flax: the studies ``chains``, ``resnet50`` and ``startup``.

``chains``: value and gradient of six times convolution 3×3, norm, ReLU. ``resnet50``: a whole training step, forward
and backward and SGD with momentum. ``startup``: what it takes to trace and to compile the gradient of 53 norms. "jbn"
is Flax's network with another norm in it; "jbn, ReLU inside" lets the norm do the ReLU, and in the residual network the
addition before it. Losses must agree before anything is timed; that gradients and statistics agree with Flax's to
1e-12 in float64 is tested in test_resnet50.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbn.linen
from benchmarks.passes import Chain
from benchmarks.resnet50 import ResNet50, Sizes
from benchmarks.timing import quartiles
from jbn.studies.timing import interleaved

CHAIN = (32, 28, 28, 64)
IMAGES = (8, 128, 128, 3)
FLAX = "Flax Linen"
# Of the loss: convolutions in another order, through 53 layers at initialization.
AGREE = {"float32": 1e-3, "bfloat16": 3e-2}


def chains(repeats: int, report: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Time six layers of convolution, norm and ReLU, in float32: a CPU has no fast bfloat16 convolution."""
    x = jax.random.normal(jax.random.key(0), CHAIN)
    kinds = {"jbn, ReLU inside": "jbn", FLAX: "flax", "no norm": "conv"}
    steps = {}
    for name, net in ((name, Chain(kind, dtype=x.dtype)) for name, kind in kinds.items()):
        variables = net.init(jax.random.key(1), x)

        def step(variables: Any, x: Any, net: Any = net) -> Any:
            def loss(params: Any) -> Any:
                y, state = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
                return jnp.square(y).mean(), state

            return jax.value_and_grad(loss, has_aux=True)(variables["params"])

        steps[name] = compiled(step, variables, x)
    return [{"study": "6 × conv, norm, ReLU, float32", "x": list(CHAIN), **timed(steps, repeats, report)}]


def resnet50(
    repeats: int,
    report: Callable[[str], Any],
    sizes: Sizes | None = None,
    images: tuple[int, int, int, int] = IMAGES,
) -> list[dict[str, Any]]:
    """Time a training step of a ResNet-50, as Flax's own and with jbn's norms."""
    sizes = Sizes() if sizes is None else sizes
    x, labels = jax.random.normal(jax.random.key(0), images), jnp.arange(images[0]) % sizes.classes
    optimizer = optax.sgd(0.1, momentum=0.9)
    steps = {}
    for name, model in {
        "jbn, ReLU inside": ResNet50(sizes, jbn.linen.BatchNorm, fused=True),
        "jbn": ResNet50(sizes, jbn.linen.BatchNorm),
        FLAX: ResNet50(sizes),
    }.items():
        variables = model.init(jax.random.key(1), x[:1], False)

        def step(variables: Any, moving: Any, x: Any, labels: Any, model: Any = model) -> Any:
            def loss(params: Any) -> Any:
                y, new = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), new

            (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, moving = optimizer.update(grads, moving)
            return (value, new), optax.apply_updates(variables["params"], updates), moving

        steps[name] = compiled(step, variables, optimizer.init(variables["params"]), x, labels)
    dtype = jnp.dtype(sizes.dtype).name
    found = timed(steps, repeats, report, AGREE[dtype])
    return [{"study": f"ResNet-50, training step, {dtype}", "x": list(images), **found}]


def compiled(step: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], dict[str, float]]:
    """Compile a step; return a call of it and its costs."""
    began = time.perf_counter()
    lowered = jax.jit(step).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    costs = {"trace_s": traced - began, "compile_s": time.perf_counter() - traced}
    memory = program.memory_analysis()
    costs |= {"temporaries": float(memory.temp_size_in_bytes) if memory else math.nan}
    return lambda: program(*args), costs


def timed(
    steps: Mapping[str, tuple[Callable[[], Any], dict[str, float]]],
    repeats: int,
    report: Callable[[str], Any],
    agree: float = AGREE["float32"],
) -> dict[str, Any]:
    """Compare the losses and statistics of steps and time those that agree with the first."""
    first, *_ = steps
    losses = {name: float(call()[0][0]) for name, (call, _) in steps.items()}
    right = {
        name: call
        for name, (call, _) in steps.items()
        if abs(losses[name] - losses[FLAX]) <= agree * abs(losses[FLAX]) or name == "no norm"
    }
    for name in (name for name in steps if name not in right):
        report(f"{name}: not timed, its loss is {losses[name]}, Flax's {losses[FLAX]}")
    seconds = interleaved(right, repeats)
    return {
        "losses": losses,
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratio": {name: quartiles(seconds[first] / values) for name, values in seconds.items() if name != first},
        "costs": {name: costs for name, (_, costs) in steps.items()},
    }


def startup(rounds: int = 5) -> list[dict[str, Any]]:
    """Trace and compile the step of a ResNet-50 from nothing, jbn and Flax in turns."""
    sizes = Sizes(width=8, classes=10)
    x = jnp.zeros((2, 64, 64, 3))
    found: dict[str, list[list[float]]] = {}
    for turn in range(rounds):
        models: dict[str, Any] = {"jbn": jbn.linen.BatchNorm, FLAX: nn.BatchNorm}
        for name in sorted(models, reverse=bool(turn % 2)):
            model = ResNet50(sizes, models[name])
            variables = model.init(jax.random.key(1), x, False)

            def step(variables: Any, x: Any, model: Any = model) -> Any:
                def loss(params: Any) -> Any:
                    y, new = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
                    return (y**2).mean(), new

                return jax.value_and_grad(loss, has_aux=True)(variables["params"])

            jax.clear_caches()
            _, costs = compiled(step, variables, x)
            found.setdefault(name, []).append([costs["trace_s"], costs["compile_s"]])
    both = {name: np.array(values).sum(1) for name, values in found.items()}
    return [
        {
            "study": "trace and compile, forward and backward of 53 norms",
            "seconds": {name: quartiles(values) for name, values in both.items()},
            "trace_s": {name: quartiles(np.array(values)[:, 0]) for name, values in found.items()},
            "compile_s": {name: quartiles(np.array(values)[:, 1]) for name, values in found.items()},
            "ratio": {FLAX: quartiles(both["jbn"] / both[FLAX])},
        }
    ]


STUDIES: dict[str, Callable[..., list[dict[str, Any]]]] = {"chains": chains, "resnet50": resnet50}
