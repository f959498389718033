"""How long one batch norm takes, beside those of the field and beside a copy: the study ``layers``.

Three programs of each library, as `benchmarks.peers` sets it up: training forward, which returns y and the new state;
forward and backward, which returns the gradients of x, scale and bias for a given cotangent too; and evaluation. Each
is compared with float64 before it is timed: a wrong answer is not timed, it is told. Then all take turns, with a copy
of x among them. The floor is what they have to move if nothing stays on the chip, at the bandwidth of that copy: 3
sweeps over x forward, 8 forward and backward (`benchmarks.passes`), 2 in evaluation.

jbn and Flax get x as it is. The others, some of which take images alone, get the same memory as images: (N, 1, L, C)
of a sequence, (N, D·H, W, C) of a volume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.layers import EPSILON, Torch
from benchmarks.peers import Peer
from benchmarks.specs import BATCH, Spec, batch_of
from benchmarks.timing import copying, quartiles
from jbn.studies.timing import Call, interleaved

FLOORS = {"forward": 3, "forward and backward": 8, "evaluation": 2}
NATIVE = ("jbn", "Flax Linen", "Flax NNX")
# Of the largest value: E[x²] - E[x]² in float32 and a rounded y may be wrong by less.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}

Answer = dict[str, np.ndarray]


class Timed(NamedTuple):
    """One program of one library."""

    call: Call
    answer: Callable[[], Answer]  # y, and dx where it has one, features last
    costs: dict[str, float]  # what its compiler tells


class Data(NamedTuple):
    """What every library gets, in float32 NumPy; rounded to the dtype of the measurement."""

    x: np.ndarray
    g: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def drawn(spec: Spec, batch: int, dtype: str) -> Data:
    """Draw x with a mean of half a deviation, and a cotangent."""
    rng = np.random.default_rng(0)
    shape = (batch_of(spec, batch), *spec.example)
    x, g = (np.asarray(rng.standard_normal(shape, np.float32) + shift, jnp.dtype(dtype)) for shift in (0.5, 0))
    features = np.ones(shape[-1], np.float32)
    return Data(x, g, 0.5 * features, features)


def exact(data: Data) -> dict[str, Answer]:
    """Return what each program should give, in float64."""
    x, g = (part.astype(np.float64).reshape(-1, part.shape[-1]) for part in data[:2])
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
    dx = (g - g.mean(0) - normal * (g * normal).mean(0)) / np.sqrt(x.var(0) + EPSILON)
    y, dx, known = (part.reshape(data.x.shape) for part in (normal, dx, (x - data.mean) / np.sqrt(data.var + EPSILON)))
    return {"forward": {"y": y}, "forward and backward": {"y": y, "dx": dx}, "evaluation": {"y": known}}


def as_images(peer: Peer, array: np.ndarray) -> np.ndarray:
    """Arrange x as a library wants it."""
    if peer.name not in NATIVE:
        n, *positions, features = array.shape
        *outer, inner = positions or [1]
        array = array.reshape(n, math.prod(outer), inner, features)
    return np.ascontiguousarray(np.moveaxis(array, -1, peer.axis)) if peer.axis != -1 else array


def in_jax(peer: Peer, data: Data) -> dict[str, Timed]:
    """Compile the programs of a library that is written in JAX."""
    layer = peer.layer(data.x.shape[-1], data.x.dtype)
    x, g = (jnp.asarray(as_images(peer, part)) for part in (data.x, data.g))
    params, state, known = jax.device_put((layer.params, layer.state, layer.at(data.mean, data.var)))

    def forward(params: Any, state: Any, x: Any) -> Any:
        return layer.apply(params, state, x, True)

    def both(params: Any, state: Any, x: Any, g: Any) -> Any:
        y, pull, state = jax.vjp(lambda params, x: forward(params, state, x), params, x, has_aux=True)
        y, g = jax.lax.optimization_barrier((y, g))  # as in a network, where the cotangent depends on y
        return y, state, pull(g)

    def evaluate(params: Any, state: Any, x: Any) -> Any:
        return layer.apply(params, state, x, False)[0]

    def features_last(array: Any) -> np.ndarray:
        return np.moveaxis(np.asarray(array), peer.axis, -1).reshape(data.x.shape)

    def timed(f: Callable[..., Any], *args: Any, read: Callable[[Any], dict[str, Any]]) -> Timed:
        began = time.perf_counter()
        lowered = jax.jit(f).lower(*args)
        traced = time.perf_counter()
        compiled = lowered.compile()
        costs = {"trace_s": traced - began, "compile_s": time.perf_counter() - traced}
        memory, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
        costs |= {"temporaries": float(memory.temp_size_in_bytes) if memory else math.nan}
        costs |= {"bytes_accessed": float(analysis.get("bytes accessed", math.nan))}

        def answer() -> Answer:
            return {name: features_last(array) for name, array in read(compiled(*args)).items()}

        return Timed(lambda: compiled(*args), answer, costs)

    return {
        "forward": timed(forward, params, state, x, read=lambda out: {"y": out[0]}),
        "forward and backward": timed(both, params, state, x, g, read=lambda out: {"y": out[0], "dx": out[2][1]}),
        "evaluation": timed(evaluate, params, known, x, read=lambda y: {"y": y}),
    }


def in_torch(peer: Peer, data: Data) -> dict[str, Timed]:
    """Return the programs of PyTorch, on the device that JAX has."""
    import torch

    where = "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
    norm = Torch(data.x.shape[-1], peer.channels_last)
    train, known = norm.module().to(where), norm.module().to(where).eval()
    known.running_mean.copy_(torch.tensor(data.mean))
    known.running_var.copy_(torch.tensor(data.var))
    kind = torch.bfloat16 if data.x.dtype == jnp.bfloat16 else torch.float32
    images = Peer("", "", "", None)  # features last, as `tensor` takes them
    x, g = (norm.tensor(as_images(images, np.asarray(p, np.float32))).to(where, kind) for p in data[:2])
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def forward() -> Any:
        with torch.no_grad():
            y = train(x)
        return finished(y)

    def both() -> Any:
        leaf.grad = train.weight.grad = train.bias.grad = None
        y = train(leaf)
        y.backward(g)
        return finished(y)

    def evaluate() -> Any:
        with torch.no_grad():
            return finished(known(x))

    def finished(y: Any) -> Any:
        if where == "cuda":
            torch.cuda.synchronize()
        return y

    def features_last(tensor: Any) -> np.ndarray:
        return np.moveaxis(tensor.detach().float().cpu().numpy(), 1, -1).reshape(data.x.shape)

    # What JAX's clock waits for must be no tensor.
    return {
        name: Timed(lambda call=call: call() is None, lambda read=read, call=call: read(call()), {})  # type: ignore[misc]
        for name, call, read in (
            ("forward", forward, lambda y: {"y": features_last(y)}),
            ("forward and backward", both, lambda y: {"y": features_last(y), "dx": features_last(leaf.grad)}),
            ("evaluation", evaluate, lambda y: {"y": features_last(y)}),
        )
    }


def wrong(found: Answer, want: Answer, bound: float) -> str | None:
    """Say what of an answer is wrong, or nothing."""
    for name, right in want.items():
        error = np.abs(found[name].astype(np.float64) - right).max() / np.abs(right).max()
        if not error <= bound:
            return f"{name} is off by {error:.1e}"
    return None


def measure(
    spec: Spec,
    dtype: str,
    peers: Iterable[Peer],
    *,
    batch: int = BATCH,
    repeats: int = 20,
    programs: Iterable[str] = FLOORS,
    report: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Time one normalization of every library; return a row for each program.

    Args:
        spec: what it gets.
        dtype: of x.
        peers: the libraries; the first is compared with the others.
        batch: how many examples.
        repeats: rounds that count.
        programs: some of `FLOORS`.
        report: called with a line where an answer is wrong or a library fails.
    """
    data = drawn(spec, batch, dtype)
    right, rows, made = exact(data), [], {}
    for peer in peers:
        try:
            made[peer.name] = in_torch(peer, data) if peer.make is None else in_jax(peer, data)
        except Exception as error:
            report(f"{peer.name}, {spec.name}, {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}")
    copy = copying(jax.ShapeDtypeStruct(data.x.shape, data.x.dtype))
    for program in programs:
        calls = {"copy": copy}
        for name, of in made.items():
            if reason := wrong(of[program].answer(), right[program], BOUNDS[dtype]):
                report(f"{name}, {spec.name}, {dtype}, {program}: not timed, {reason}")
            else:
                calls[name] = of[program].call
        seconds = interleaved(calls, repeats)
        first = next(iter(made))
        floor = FLOORS[program] / 2 * float(np.median(seconds["copy"]))
        rows.append(
            {
                "spec": spec.name,
                "batch": batch_of(spec, batch),
                "times": spec.times,
                "dtype": dtype,
                "program": program,
                "bytes_of_x": data.x.nbytes,
                "seconds": {name: quartiles(values) for name, values in seconds.items()},
                "ratio": {
                    name: quartiles(seconds[first] / values)
                    for name, values in seconds.items()
                    if first in seconds and name not in (first, "copy")
                },
                "of_floor": {name: round(floor / float(np.median(v)), 3) for name, v in seconds.items()},
                "costs": {name: of[program].costs for name, of in made.items() if of[program].costs},
            }
        )
    return rows
