"""A kernel that takes a norm in and gives the next one's sums out: ``python -m benchmarks.experiments [--write]``.

Of the 53 norms of a ResNet-50, 36 follow a 1×1 convolution, a matrix product. `benchmarks.experiments.kernel` is the
product in Pallas: the norm before it and its ReLU in its prologue, Σ(y - k) and Σ(y - k)² beside it. Here it is

- held against float64 in interpret mode, where the errors of XLA's program stand beside it;
- compiled by the TPU's compiler (Mosaic) and the GPU's (Triton), in chains of four blocks, norm, ReLU and 1×1
  convolution, forward in training with the new states; passes over x and temporaries stand beside jbn's and XLA's own;
- set against a whole ResNet-50: the bytes that the sums after 36 products and the 16 norms before one cost on a GPU.

How bytes are counted `benchmarks.compilers` says. A kernel is a custom call, which reads its operands once and writes
its results once; where it has several tiles of columns it reads x for each, and that is added. The weights are counted
once a call: they stay in VMEM, or in the L2 cache. Nothing is timed: interpret mode says nothing about speed.
"""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from rich.table import Table

import jbn.linen
from benchmarks import readme
from benchmarks.compilers import compile, missing
from benchmarks.experiments import chain, exactness
from benchmarks.experiments.kernel import choose_tile, sweeps
from benchmarks.resnet50 import ResNet50, Sizes
from benchmarks.specs import LARGE

RESULTS = Path(__file__).parents[1] / "results" / "experiments.json"
TARGETS = ("gpu-h200", "gpu-a100", "tpu-v5e", "tpu-v6e")
CHAINS = {  # the size of the images, and the channels from x to y: as they are in a ResNet-50, and all alike
    "56×56, 256": (56, (256,) * 5),
    "56×56, 256 → 64 → 256": (56, (256, 64, 256, 64, 256)),
    "28×28, 512 → 128 → 512": (28, (512, 128, 512, 128, 512)),
}
HEAD = ("four blocks", "", "floor", *(target.partition("-")[2].upper() for target in TARGETS))

Row = dict[str, Any]


def count(name: str, on: str) -> Row:
    """Count one chain on one target: passes over x, and temporaries in sizes of x."""
    size, channels = CHAINS[name]
    x = jax.ShapeDtypeStruct((LARGE * size**2, channels[0]), jnp.bfloat16)
    blocks = jax.eval_shape(lambda: chain.blocks(channels, jax.random.key(0)))
    pairs = list(itertools.pairwise(channels))
    inputs = [(jax.ShapeDtypeStruct((x.shape[0], before), x.dtype), after) for before, after in pairs]
    again = sum((sweeps(choose_tile(on[:3], h, after), after) - 1) * h.shape[1] for h, after in inputs)
    programs = {"plain": compile(chain.plain, blocks, x, on=on)}
    programs["kernel"] = compile(partial(chain.fused, on=on[:3]), blocks, x, on=on)
    both = compile(forward_and_backward, blocks, x, x, on=on)
    row = {"chain": name, "target": on, "floor": 1 + sum(map(sum, pairs)) / channels[0]}
    for way, program in programs.items():
        more = again / channels[0] if way == "kernel" else 0
        row[way] = round(program.passes(x) + more, 2)
        row[f"{way}, temporaries"] = round(program.temporaries / (x.size * x.dtype.itemsize), 2)
    return row | {"plain, forward and backward": round(both.passes(x), 2)}


def forward_and_backward(blocks: list[chain.Block], x: Any, g: Any) -> Any:
    """Return the last product, states and gradients of the plain program, with y before its cotangent g."""

    def forward(learned: Any, x: Any) -> Any:
        pairs = zip(learned, blocks, strict=True)
        return chain.plain([chain.Block(params, block.state, w) for (params, w), block in pairs], x)

    y, pull, states = jax.vjp(forward, [(block.params, block.weights) for block in blocks], x, has_aux=True)
    y, g = lax.optimization_barrier((y, g))
    return y, states, pull(g)


def resnet50(on: str) -> Row:
    """Count a ResNet-50 of jbn's norms in GB, and what the kernel could spare it forward at most.

    That is one sweep over the output of each 1×1 convolution, and two over the input of each that follows a norm and a
    ReLU alone. The outputs of the other norms are added to a shortcut and needed again.
    """
    net = ResNet50(Sizes(dtype=jnp.bfloat16), jbn.linen.BatchNorm, True)
    x = jax.ShapeDtypeStruct((LARGE, 224, 224, 3), jnp.bfloat16)
    sums, prologues = [], []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv) and context.module.kernel_size == (1, 1):
            sums.append(y.size * y.dtype.itemsize)
            if context.module.name == "Conv_2":  # the third of a block
                prologues.append(2 * args[0].size * args[0].dtype.itemsize)
        return y

    with nn.intercept_methods(look):
        variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, True), x)

    def forward(variables: Any, x: Any) -> Any:
        return net.apply(variables, x, True, mutable=["batch_stats"])

    def step(variables: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            y, state = forward({**variables, "params": params}, x)
            return jnp.square(y.astype(jnp.float32)).mean(), state

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    found = {name: compile(f, variables, x, on=on).bytes() for name, f in (("forward", forward), ("step", step))}
    spared = {"sums": sum(sums), "prologues": sum(prologues)}
    gigabytes = {name: round(size / 1e9, 2) for name, size in (found | spared).items()}
    return {"target": on, "sums after": len(sums), "prologues of": len(prologues), **gigabytes}


def cells(found: Row) -> list[list[str]]:
    """Return the rows of the table of passes and temporaries: by XLA → by the kernel."""
    lines = []
    for name in CHAINS:
        rows = [row for on in TARGETS for row in found["chains"] if (row["chain"], row["target"]) == (name, on)]
        temporaries = [(row["plain, temporaries"], row["kernel, temporaries"]) for row in rows]
        lines += [
            [name, "passes", f"{rows[0]['floor']:.1f}", *(f"{row['plain']:.1f} → {row['kernel']:.1f}" for row in rows)],
            ["", "temporaries / x", "", *(f"{plain:.1f} → {kernel:.1f}" for plain, kernel in temporaries)],
            ["", "passes with backward, XLA", "", *(f"{row['plain, forward and backward']:.1f}" for row in rows)],
        ]
    return lines


def errors(found: Row) -> list[list[str]]:
    """Return the rows of the table of errors."""
    return [
        [row["dtype"], *(" / ".join(f"{row['errors'][way][name]:.0e}" for way in exactness.WAYS) for name in names)]
        for row in found["errors"]
        for names in [exactness.FIGURES]
    ]


def markdown(found: Row) -> str:
    """Return both tables of PERFORMANCE.md, and the sentence about a whole network."""
    net = found["resnet50"]
    spared = net["sums"] + net["prologues"]
    said = (
        f"A ResNet-50 of jbn's norms, batch {LARGE} in bfloat16, moves {net['forward']:.1f} GB forward in training"
        f" and {net['step']:.1f} GB in a step on an H200, by its compiler. Of these the kernel could spare the sums of"
        f" {net['sums after']} norms, {net['sums']:.1f} GB, and write and read of {net['prologues of']} outputs,"
        f" {net['prologues']:.1f} GB: {spared / net['forward']:.0%} of the forward pass at most,"
        f" {spared / net['step']:.0%} of a step."
    )
    passes = readme.markdown(HEAD, cells(found))
    return f"{passes}\n{said}\n\n{readme.markdown(exactness.HEAD, errors(found))}"


def main() -> None:
    """Check, count and print; write if asked to."""
    write, console, absent = readme.opened("experiments", "A kernel that takes a norm in and gives sums out.")
    found: Row = {"jax": jax.__version__, "errors": [], "chains": []}
    found["errors"] = [exactness.measure(dtype) for dtype in ("float32", "bfloat16")]
    table = Table(*exactness.HEAD, title="Largest errors: kernel for TPU / kernel for GPU / XLA")
    for line in errors(found):
        table.add_row(*line)
    console.print(table)
    for on in TARGETS:
        if reason := missing(on):
            absent(reason)
            continue
        for name in CHAINS:
            with console.status(f"{on}, {name}"):
                found["chains"].append(count(name, on))
            console.print(found["chains"][-1])
    if not missing("gpu-h200"):
        found["resnet50"] = resnet50("gpu-h200")
        console.print(found["resnet50"])
    if write:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        readme.replace("experiments", markdown(found))


if __name__ == "__main__":
    main()
