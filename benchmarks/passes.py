"""What batch normalization costs on six targets, as their compilers tell: ``python -m benchmarks.passes``.

Prints passes over memory, peak memory and collectives of jbn beside Flax, and writes them to results/passes.json.
Nothing runs, and no TPU or GPU is needed; `benchmarks.compilers` says how it is counted. Running statistics are
inputs and the new ones outputs: the compiler would fold a constant state, and then it is not the program of a training.

The floors, in sweeps over x, with g the cotangent of y and r a residual of the dtype of x:

- forward: x for the statistics; x, and write y: 3. With r: 4.
- backward: g and x for the two sums; g and x, and write the gradient of x: 5. With r and an activation, the first
  sweep reads r too and writes f'(z) g, which is the gradient of r; the second reads that and x, and writes the
  gradient of x: 7. Where y is needed only with g, the first sweep of the backward pass writes y too: 1, with r 2 fewer.
- CPU's reductions read one array each: forward 2 + 2, backward 1 + 2 + 3, in all 10.

"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jbn.linen
from benchmarks.compilers import TARGETS, Program, compile, mesh, missing
from benchmarks.specs import LARGE, OTHERS, RESNET50, batch_of

RESULTS = Path(__file__).parent / "results" / "passes.json"
IMAGES = jax.ShapeDtypeStruct((256, 56, 56, 256), jnp.bfloat16)
ON_CPU = jax.ShapeDtypeStruct((32, 56, 56, 64), jnp.float32)
KINDS = ("conv", "flax", "jbn")

Row = dict[str, Any]


class Norm(nn.Module):
    """Normalization, residual add and activation by one library; "conv" stands for no normalization at all."""

    kind: str
    activation: Callable[[Any], Any] | None = nn.relu
    train: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, residual: Any = None, mask: Any = None) -> Any:
        if self.kind == "jbn":
            layer = jbn.linen.BatchNorm(not self.train, activation=self.activation, axis_name=self.axis_name)
            return layer(x, residual=residual, mask=mask)
        if self.kind == "flax":
            x = nn.BatchNorm(not self.train, dtype=x.dtype, axis_name=self.axis_name)(x, mask=mask)
        x = x if residual is None else x + residual
        return x if self.activation is None else self.activation(x)


class Chain(nn.Module):
    """``layers`` times convolution, normalization, ReLU, by default in bfloat16, with float32 parameters."""

    kind: str
    layers: int = 6
    train: bool = True
    axis_name: str | None = None
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Any, mask: Any = None) -> Any:
        for _ in range(self.layers):
            x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = Norm(self.kind, train=self.train, axis_name=self.axis_name)(x, mask=mask)
        return x


def layer(
    kind: str, x: jax.ShapeDtypeStruct, on: str, *, activation: Any = nn.relu, residual: bool = False
) -> tuple[Program, Program, Program]:
    """Compile one layer: forward; forward and backward with y forced before its cotangent exists; not forced.

    Args:
        kind: "jbn" or "flax".
        x: shape and dtype of the input.
        on: a target of `benchmarks.compilers`.
        activation: the activation, or None.
        residual: whether an array of the shape of x is added before it.
    """
    norm = Norm(kind, activation)
    inputs = (x, x) if residual else (x,)
    variables = jax.eval_shape(norm.init, jax.random.key(0), *inputs)

    def forward(variables: Any, inputs: Any) -> Any:
        return norm.apply(variables, *inputs, mutable=["batch_stats"])

    def both(forced: bool, variables: Any, inputs: Any, g: Any) -> Any:
        def f(params: Any, inputs: Any) -> Any:
            return forward({**variables, "params": params}, inputs)

        y, pull, state = jax.vjp(f, variables["params"], inputs, has_aux=True)
        # In a network the cotangent of y depends on y: without the barrier the two directions could share a sweep.
        y, g = lax.optimization_barrier((y, g)) if forced else (y, g)
        return y, state, pull(g)

    return (
        compile(forward, variables, inputs, on=on),
        compile(partial(both, True), variables, inputs, x, on=on),
        compile(partial(both, False), variables, inputs, x, on=on),
    )


def chain(kind: str, on: str, x: jax.ShapeDtypeStruct = IMAGES, layers: int = 6, *, remat: bool = False) -> Program:
    """Compile value and gradient, in the parameters, of a chain of convolution, normalization and ReLU.

    Args:
        kind: "jbn", "flax" or "conv", for no normalization.
        on: a target of `benchmarks.compilers`.
        x: shape and dtype of the input.
        layers: the number of convolutions.
        remat: whether the loss is rematerialized with ``jbn.remat_policy()``.
    """
    net = Chain(kind, layers)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def step(variables: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            y, state = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.square(y.astype(jnp.float32)).mean(), state

        wrapped = jax.checkpoint(loss, policy=jbn.remat_policy()) if remat else loss
        return jax.value_and_grad(wrapped, has_aux=True)(variables["params"])

    return compile(step, variables, x, on=on)


def distributed(
    kind: str,
    on: str,
    devices: int,
    *,
    manual: bool,
    masked: bool,
    train: bool = True,
    backward: bool = True,
    layers: int = 4,
    channels: int = 256,
) -> Program:
    """Compile the loss of a chain, and its gradient if asked for, on a batch sharded over devices.

    Args:
        kind: "jbn" or "flax".
        on: a target of `benchmarks.compilers`.
        devices: the number of devices.
        manual: `jax.shard_map` with ``axis_name``, or else `jax.jit` alone, with an Auto mesh.
        masked: whether whole images are masked.
        train: whether to normalize by the statistics of the batch.
        backward: whether to compute the gradient too.
        layers: the number of convolutions.
        channels: the number of features.
    """
    over = mesh(on, data=devices)
    batch = NamedSharding(over, P("data"))  # type: ignore[no-untyped-call]
    struct: Any = jax.ShapeDtypeStruct
    x = struct((4 * devices, 28, 28, channels), jnp.bfloat16, sharding=batch)
    mask = struct((4 * devices, 1, 1, 1), jnp.bool_, sharding=batch) if masked else None
    variables = jax.eval_shape(Chain(kind, layers).init, jax.random.key(0), struct(x.shape, x.dtype))
    net = Chain(kind, layers, train, "data" if manual else None)

    def loss(params: Any, state: Any, x: Any, mask: Any) -> Any:
        variables = {"params": params, "batch_stats": state}
        y, state = net.apply(variables, x, mask, mutable=["batch_stats"])
        value = jnp.square(y.astype(jnp.float32)).sum()
        return lax.psum(value, "data") if manual else value, state

    step = jax.value_and_grad(loss, has_aux=True) if backward else loss
    if manual:
        step = jax.shard_map(step, mesh=over, in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
    return compile(step, variables["params"], variables["batch_stats"], x, mask, on=over)


def statistics_in(program: Program, channels: int = 256) -> tuple[list[int], list[int]]:
    """Return the floats in each all-reduce that carries statistics: those always run, and those in a guard's branch.

    Those of the loss alone (1 float) and of the gradients of the kernels are left out.

    Args:
        program: from `distributed`.
        channels: the number of features.
    """

    def floats(collectives: Any) -> list[int]:
        return [c.bytes // 4 for c in collectives if 1 < c.bytes // 4 <= 3 * channels + 1]

    return floats(program.collectives), floats(program.guarded_collectives)


def layers() -> list[Row]:
    """Measure one layer of each kind on every target."""
    rows: list[Row] = []
    for on in filter(lambda on: missing(on) is None, TARGETS):
        x = ON_CPU if on == "cpu" else IMAGES
        names = {"BN": (None, False), "BN+ReLU": (nn.relu, False), "BN+residual+ReLU": (nn.relu, True)}
        for what, (activation, residual) in names.items():
            if what == "BN" and on != "cpu":
                continue
            for kind in ("jbn", "flax"):
                programs = layer(kind, x, on, activation=activation, residual=residual)
                forward, forced, free = (round(p.passes(x), 3) for p in programs)
                rows.append(
                    {
                        "target": on,
                        "what": what,
                        "library": kind,
                        "forward": forward,
                        "both, y forced": forced,
                        "both, y free": free,
                        "temporaries / x": round(programs[1].temporaries / (x.size * x.dtype.itemsize), 2),
                        "conditionals": programs[1].conditionals,
                    }
                )
    return rows


def chains(targets: tuple[str, ...] = ("gpu-h200", "tpu-v5e")) -> list[Row]:
    """Measure the chain of six with each library and with none, on some targets."""
    rows: list[Row] = []
    for on in filter(lambda on: missing(on) is None, targets):
        bare = 0.0
        for kind, remat in (*((kind, False) for kind in KINDS), ("jbn", True)):
            program = chain(kind, on, remat=remat)
            passes = program.passes(IMAGES)
            bare = passes if kind == "conv" else bare
            rows.append(
                {
                    "target": on,
                    "library": kind + ", remat_policy" * remat,
                    "passes": round(passes, 2),
                    "per norm": round((passes - bare) / 6, 2),
                    "temporaries MB": round(program.temporaries / 1e6),
                    "peak MB": round(program.peak / 1e6),
                    "conditionals": program.conditionals,
                }
            )
    return rows


def specs(targets: tuple[str, ...] = TARGETS[1:]) -> list[Row]:
    """Measure BN+ReLU, y forced, on the shapes of `benchmarks.specs`: passes and peak memory, in bytes of x."""
    rows: list[Row] = []
    for on in filter(lambda on: missing(on) is None, targets):
        for spec in (*RESNET50, *OTHERS):
            x = spec.images(batch_of(spec, LARGE), jnp.bfloat16)
            size = x.size * x.dtype.itemsize
            row: Row = {"target": on, "spec": spec.name, "batch": x.shape[0], "MB": round(size / 1e6)}
            for kind in ("jbn", "flax"):
                forward, both, _ = layer(kind, x, on)
                row |= {
                    f"{kind}, forward": round(forward.passes(x), 2),
                    f"{kind}, both": round(both.passes(x), 2),
                    f"{kind}, peak / x": round(both.peak / size, 2),
                }
            rows.append(row)
    return rows


def collectives() -> list[Row]:
    """Count the all-reduces of statistics of four layers on a batch over several devices."""
    rows: list[Row] = []
    for on, devices in (("cpu", 8), ("gpu-h200", 4), ("tpu-v5e", 8), ("tpu-v6e", 8)):
        for manual in (False, True) if missing(on) is None else ():
            for masked in (False, True):
                options: Any = {"manual": manual, "masked": masked}
                forward = distributed("jbn", on, devices, backward=False, **options)
                both = distributed("jbn", on, devices, **options)
                evaluation = distributed("jbn", on, devices, train=False, backward=False, **options)
                there, guarded = statistics_in(forward)
                total = statistics_in(both)[0]
                rows.append(
                    {
                        "target": on,
                        "devices": devices,
                        "by": "shard_map" if manual else "jit",
                        "masked": masked,
                        "forward": len(there),
                        "backward": len(total) - len(there),
                        "in the guards": len(guarded),
                        "evaluation": len(statistics_in(evaluation)[0]),
                        "largest, floats": max(total),
                    }
                )
    return rows


PARTS: dict[str, Callable[[], list[Row]]] = {
    "layers": layers,
    "chains": chains,
    "specs": specs,
    "collectives": collectives,
}


def main() -> None:
    """Measure, print and write; parts that are not asked for keep the figures they had."""
    parser = argparse.ArgumentParser(description="Passes, memory and collectives on six targets.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"part: got {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in chosen:
        rows = PARTS[part]()
        found |= {"jax": jax.__version__, "flax": flax.__version__, part: rows}
        table = Table(*rows[0], title=part)
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(width=max(Console().width, 110)).print(table)  # readable in a log too
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
