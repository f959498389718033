"""What one layer of each batch norm costs, without running it: ``python -m benchmarks.costs [--write]``.

- Passes: bytes that the compiled program moves, in sweeps over x, of BN + ReLU, by `benchmarks.compilers`. Running
  statistics are inputs and the new ones outputs, and y is forced before its cotangent, as in `benchmarks.passes`.
- Kept: bytes of the arrays that `jax.vjp` of BN + ReLU holds for the backward pass, each counted once, in bytes of x.
  It is what a program keeps whose two directions are compiled apart: `lax.scan` over layers, eager code, pipelines.
  For PyTorch the storages that autograd saves.
- Collectives: of one BN on eight shards under `jax.shard_map`, in the compiled program, for the gradient of x alone
  (parameters add those of data parallelism). ``(+ 1)`` is in a branch of a conditional: it runs where x is swept
  twice. ``*`` says that only ``check_vma=False`` compiles.

All are set up as `benchmarks.peers` says. With ``--write`` the figures go to results/costs.json and, as tables,
into docs/how/costs.md and README.md.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks import readme
from benchmarks.compilers import Program, compile, mesh, missing
from benchmarks.layers import Layer, Torch
from benchmarks.peers import Peer, installed
from jbn.studies.compiled import kept_bytes

RESULTS = Path(__file__).parent / "results" / "costs.json"
IMAGES = jax.ShapeDtypeStruct((256, 56, 56, 256), jnp.bfloat16)
ON_CPU = jax.ShapeDtypeStruct((32, 56, 56, 64), jnp.float32)
TARGETS = {"gpu-h200": ("H200", IMAGES), "tpu-v5e": ("v5e", IMAGES), "cpu": ("CPU", ON_CPU)}
SMALL = jax.ShapeDtypeStruct((32, 16, 16, 64), jnp.bfloat16)
SHARDS = 8

CAPTION = "(+ 1): only where x is swept twice. *: with check_vma=False alone"
HEAD = ("passes, forward / both", *(name for name, _ in TARGETS.values()), "kept / x", "collectives")


def step(layer: Layer, params: Any, state: Any, x: Any, g: Any) -> Any:
    """Return y, the new state and the gradients of the parameters and of x; y before its cotangent g exists."""
    y, pull, state = jax.vjp(lambda params, x: layer.apply(params, state, x, True), params, x, has_aux=True)
    y, g = lax.optimization_barrier((y, g))
    return y, state, pull(g)


def passes(peer: Peer, on: str, x: jax.ShapeDtypeStruct) -> tuple[float, float]:
    """Return the passes over x of BN + ReLU, forward and both."""
    layer, x = peer.layer(x.shape[-1], x.dtype, activation=jax.nn.relu), peer.images(x)
    forward = compile(lambda params, state, x: layer.apply(params, state, x, True), layer.params, layer.state, x, on=on)
    both = compile(lambda *args: step(layer, *args), layer.params, layer.state, x, x, on=on)
    return forward.passes(x), both.passes(x)


def kept(peer: Peer, x: jax.ShapeDtypeStruct) -> float:
    """Return the bytes that `jax.vjp` keeps for the backward pass, in bytes of x."""
    layer, x = peer.layer(x.shape[-1], x.dtype, activation=jax.nn.relu), peer.images(x)

    def forward(varied: Any, state: Any) -> Any:
        return layer.apply(varied[0], state, varied[1], True)

    return kept_bytes(forward, (layer.params, x), layer.state) / (x.size * x.dtype.itemsize)


def kept_by_torch(x: jax.ShapeDtypeStruct) -> float:
    """Return the bytes of the storages that PyTorch saves for the backward pass, in bytes of x."""
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    norm = Torch(x.shape[-1])
    images = norm.tensor(np.ones(x.shape, np.float32)).to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = torch.relu(norm.module()(images))
    assert y.dtype == torch.bfloat16
    return sum(storages.values()) / images.nbytes


def synchronized(peer: Peer) -> tuple[Program, Program, bool]:
    """Compile one BN over the shards of a batch, forward and both; say whether `jax.shard_map` could check it."""
    over = mesh("cpu", data=SHARDS)
    sharding: Any = NamedSharding(over, P("data"))  # type: ignore[no-untyped-call]
    struct: Any = jax.ShapeDtypeStruct
    x = peer.images(struct((4 * SHARDS, 8, 8, 64), jnp.float32, sharding=sharding))
    layer = peer.layer(64, x.dtype, axis_name="data")

    def forward(state: Any, x: Any) -> Any:
        return layer.apply(layer.params, state, x, True)

    def both(state: Any, x: Any, g: Any) -> Any:
        y, pull, state = jax.vjp(lambda x: forward(state, x), x, has_aux=True)
        return y, state, *pull(g)

    def compiled(check: bool) -> tuple[Program, Program]:
        options: Any = {"mesh": over, "check_vma": check}
        data, state = P("data"), P()
        f = jax.shard_map(forward, in_specs=(state, data), out_specs=(data, state), **options)
        fb = jax.shard_map(both, in_specs=(state, data, data), out_specs=(data, state, data), **options)
        return compile(f, layer.state, x, on=over), compile(fb, layer.state, x, x, on=over)

    try:
        return *compiled(True), True
    except (ValueError, TypeError, NotImplementedError):
        return *compiled(False), False


def measure(peer: Peer) -> dict[str, Any]:
    """Return the figures of one library, without those that it cannot have."""
    if peer.make is None:
        return {"passes": {}, "kept": round(kept_by_torch(SMALL), 3)}
    compilers = [on for on in TARGETS if missing(on) is None]
    figures: dict[str, Any] = {
        "passes": {on: [round(p, 3) for p in passes(peer, on, TARGETS[on][1])] for on in compilers}
    }
    figures["kept"] = round(kept(peer, SMALL), 3)
    if peer.across_shards:
        forward, both, checked = synchronized(peer)
        figures["collectives"] = {
            "forward": len(forward.collectives),
            "guarded": len(forward.guarded_collectives),
            "backward": len(both.collectives) - len(forward.collectives),
            "checked": checked,
        }
    return figures


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table."""
    return [
        [
            f"{row['library']} {row['version']}",
            *("{:.1f} / {:.1f}".format(*row["passes"][on]) if on in row["passes"] else "—" for on in TARGETS),
            f"{row['kept']:.2f}",
            _counted(row["collectives"]) if "collectives" in row else "—",
        ]
        for row in found["rows"]
    ]


def _counted(of: dict[str, Any]) -> str:
    guarded = f" (+ {of['guarded']})" if of["guarded"] else ""
    return f"{of['forward']}{guarded} / {of['backward']}{'' if of['checked'] else ' *'}"


def markdown(found: dict[str, Any]) -> str:
    """Return the table of docs/how/costs.md."""
    return readme.markdown(HEAD, cells(found))


def short(found: dict[str, Any]) -> str:
    """Return the table of README.md."""
    return readme.shorten(HEAD, cells(found), ("H200", "v5e", "kept / x"))


def main() -> None:
    """Measure and print; write if asked to."""
    write, console, absent = readme.opened("costs", "What one layer of each batch norm costs, without running it.")
    for reason in map(missing, TARGETS):
        if reason:
            absent(reason)
    rows = []
    for peer in installed(absent):
        if peer.channels_last:  # what it keeps is the same
            continue
        with console.status(peer.name):
            rows.append({"library": peer.name, "version": peer.version, **measure(peer)})
    found = {"jax": jax.__version__, "rows": rows}
    table = Table(*HEAD, title="BN + ReLU; collectives of BN alone", caption=CAPTION)
    for row in cells(found):
        table.add_row(*row)
    console.print(table)
    if write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        readme.replace("costs", markdown(found))
        readme.replace("costs-short", short(found))


if __name__ == "__main__":
    main()
