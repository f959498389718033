"""What only a GPU or a TPU can tell, in one command: ``python -m benchmarks.accelerator --write``.

First `jbn.check`: a device that computes wrongly is not timed. Then norm and ReLU, alone and after an addition, on
shapes of a ResNet-50 above and below 100 MB, in bfloat16 and float32: training forward, forward and backward, and
evaluation, beside Flax and, where it sees the same device, PyTorch, channels last. Every answer is compared with
float64, on some of the features, before it is timed; all take turns, with a copy of x among them. Last a training step
of a ResNet-50, as Flax's own and with jbn's norms. What does not fit into ``--seconds`` is left out, and told.

The floor is what has to be moved if nothing stays on the chip, at the bandwidth of that copy: in passes over x, 3
forward, 8 forward and backward and 2 in evaluation (`benchmarks.passes`), and 4, 11 and 3 with an addition, whose other
operand is read and whose gradient is written. It writes ``benchmarks/results/accelerator-DEVICE.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from rich.console import Console
from rich.table import Table

import jbn
import jbn.linen
from benchmarks.__main__ import machine
from benchmarks.layers import EPSILON
from benchmarks.networks import resnet50
from benchmarks.peers import installed
from benchmarks.resnet50 import Sizes
from benchmarks.specs import LARGE, RESNET50, Spec
from benchmarks.speed import BOUNDS
from benchmarks.timing import copying, quartiles
from jbn.studies.timing import Call, interleaved

RESULTS = Path(__file__).parent / "results"
PROGRAMS = ("forward", "forward and backward", "evaluation")
FLOORS = {False: (3, 8, 2), True: (4, 11, 3)}
# Above 100 MB in bfloat16 at a batch of 256, then below; the wide ones have the addition in a ResNet-50.
CHOSEN = ((56, 256), (112, 64), (28, 512), (14, 1024), (56, 64), (7, 2048), (28, 128), (7, 512))
WIDE = (256, 512, 1024, 2048)
COMPARED = 4  # features
IMAGES = (128, 224, 224, 3)

Answer = dict[str, np.ndarray]


class Case(NamedTuple):
    """What is normalized: shape and dtype of a batch, and whether something is added before the ReLU."""

    spec: Spec
    batch: int
    dtype: str
    added: bool

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.spec.name}, batch {self.batch}, {self.dtype}{', with an addition' if self.added else ''}"


class Data(NamedTuple):
    """Arrays on the device: x, what is added to the normalized x or None, and a cotangent of y."""

    x: Array
    r: Array | None
    g: Array


class Program(NamedTuple):
    """One program of one library: what is timed, and what it gives."""

    call: Call
    answer: Callable[[], Answer]  # of the first features, features last


def cases(batch: int) -> Iterator[Case]:
    """Yield what is measured, the most telling first: above 100 MB, bfloat16."""
    specs = {(spec.example[0], spec.example[-1]): spec for spec in RESNET50}
    for dtype in ("bfloat16", "float32"):
        for size, features in CHOSEN:
            for added in (False, True) if features in WIDE else (False,):
                yield Case(specs[size, features], batch, dtype, added)


def drawn(case: Case) -> Data:
    """Draw a batch on the device: x has a mean of half a deviation."""
    shape, dtype = (case.batch, *case.spec.example), jnp.dtype(case.dtype)
    x, r, g = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
    return Data(x + jnp.asarray(0.5, dtype), r if case.added else None, g)


def exact(data: Data) -> dict[str, Answer]:
    """Return what each program should give for the first features, in float64."""
    x, g = _first(data.x), _first(data.g)
    rows = tuple(range(x.ndim - 1))
    mean, scale = x.mean(rows), 1 / np.sqrt(x.var(rows) + EPSILON)
    known = (x - 0.5) / np.sqrt(1 + EPSILON)
    normal, more = (x - mean) * scale, 0.0 if data.r is None else _first(data.r)
    z = normal + more
    dz = g * (z > 0)
    dx = (dz - dz.mean(rows) - normal * (dz * normal).mean(rows)) * scale
    y = np.maximum(z, 0)
    found = {"y": y, "dx": dx} | ({} if data.r is None else {"dr": dz})
    return dict(zip(PROGRAMS, ({"y": y}, found, {"y": np.maximum(known + more, 0)}), strict=True))


def _first(array: Any) -> Any:
    return np.asarray(array[..., :COMPARED].astype(jnp.float32), np.float64)


def in_jax(norm: type[nn.Module], data: Data) -> dict[str, Program]:
    """Compile the programs of a Linen module: jbn's has ReLU and addition inside, Flax's gets them after it."""
    inside = norm is jbn.linen.BatchNorm
    options: dict[str, Any] = {"epsilon": EPSILON, "dtype": data.x.dtype} | ({"activation": nn.relu} if inside else {})
    layer, features = norm(use_running_average=False, **options), data.x.shape[-1]
    params = layer.init(jax.random.key(0), data.x[:1, :2])["params"]
    stats = {"mean": jnp.full(features, 0.5), "var": jnp.ones(features)}  # warm

    def apply(evaluate: bool, params: Any, stats: Any, x: Any, r: Any) -> Any:
        kept: Any = False if evaluate else ["batch_stats"]
        found: Any = layer.clone(use_running_average=evaluate).apply(
            {"params": params, "batch_stats": stats}, x, mutable=kept, **({"residual": r} if inside else {})
        )
        y, new = (found, stats) if evaluate else (found[0], found[1]["batch_stats"])
        return (y, new) if inside else (nn.relu(y if r is None else y + r), new)

    def both(params: Any, stats: Any, x: Any, r: Any, g: Any) -> Any:
        y, pull, new = jax.vjp(lambda params, x, r: apply(False, params, stats, x, r), params, x, r, has_aux=True)
        y, g = jax.lax.optimization_barrier((y, g))  # as in a network, where the cotangent depends on y
        return y, new, pull(g)

    def program(f: Callable[..., Any], *args: Any, names: Callable[[Any], dict[str, Any]]) -> Program:
        compiled = jax.jit(f).lower(*args).compile()
        return Program(
            lambda: compiled(*args),
            lambda: {name: _first(array) for name, array in names(compiled(*args)).items() if array is not None},
        )

    given = (params, stats, data.x, data.r)
    return {
        "forward": program(partial(apply, False), *given, names=lambda out: {"y": out[0]}),
        "forward and backward": program(
            both, *given, data.g, names=lambda out: {"y": out[0], "dx": out[2][1], "dr": out[2][2]}
        ),
        "evaluation": program(partial(apply, True), *given, names=lambda out: {"y": out[0]}),
    }


def in_torch(data: Data) -> dict[str, Program]:
    """Return the programs of PyTorch on the GPU, channels last, which its library of kernels prefers."""
    import torch

    def tensor(array: Array | None) -> Any:
        if array is None:
            return None
        wide = torch.from_numpy(np.asarray(array.astype(jnp.float32)).copy()).to("cuda", kind)
        return wide.permute(0, 3, 1, 2)  # a view: the memory is as it was, features last

    kind = torch.bfloat16 if data.x.dtype == jnp.bfloat16 else torch.float32
    x, r, g = map(tensor, data)
    train = torch.nn.BatchNorm2d(x.shape[1], eps=EPSILON, momentum=0.01).to("cuda")
    known = torch.nn.BatchNorm2d(x.shape[1], eps=EPSILON).to("cuda").eval()
    known.running_mean.fill_(0.5)
    leaf, more = x.clone().requires_grad_(), None if r is None else r.clone().requires_grad_()

    def apply(norm: Any, x: Any, r: Any) -> Any:
        y = norm(x)
        return torch.relu(y if r is None else y + r)

    def without_gradient(norm: Any) -> Any:
        with torch.no_grad():
            return {"y": apply(norm, x, r)}

    def both() -> Any:
        leaf.grad = train.weight.grad = train.bias.grad = None
        if more is not None:
            more.grad = None
        y = apply(train, leaf, more)
        y.backward(g)
        return {"y": y, "dx": leaf.grad} | ({} if more is None else {"dr": more.grad})

    def program(f: Callable[[], Any]) -> Program:
        def call() -> None:  # what JAX's clock waits for must be no tensor
            f()
            torch.cuda.synchronize()

        def answer() -> Answer:
            some = {name: array[:, :COMPARED].permute(0, 2, 3, 1) for name, array in f().items()}
            return {name: array.detach().double().cpu().numpy() for name, array in some.items()}

        return Program(call, answer)

    made = (program(lambda: without_gradient(train)), program(both), program(lambda: without_gradient(known)))
    return dict(zip(PROGRAMS, made, strict=True))


def measure(case: Case, *, repeats: int, report: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Time every library on one case; return a row for each program."""
    data = drawn(case)
    right, copy = exact(data), copying(jax.ShapeDtypeStruct(data.x.shape, data.x.dtype))
    makers: dict[str, Callable[[], dict[str, Program]]] = {
        "jbn": lambda: in_jax(jbn.linen.BatchNorm, data),
        "Flax Linen": lambda: in_jax(nn.BatchNorm, data),
    }
    if _sees_torch():
        makers["PyTorch NHWC"] = lambda: in_torch(data)
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:
            report(f"{name}, {case.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    rows = []
    for number, program in enumerate(PROGRAMS):
        calls = {"copy": copy}
        for name, of in made.items():
            if reason := wrong(of[program].answer(), right[program], BOUNDS[case.dtype]):
                report(f"{name}, {case.name}, {program}: not timed, {reason}")
            else:
                calls[name] = of[program].call
        seconds = interleaved(calls, repeats)
        passes = FLOORS[case.added][number]
        floor = passes / 2 * float(np.median(seconds["copy"]))
        others = [name for name in seconds if name not in ("copy", "jbn") and "jbn" in seconds]
        rows.append(
            {
                "spec": case.spec.name,
                "batch": case.batch,
                "dtype": case.dtype,
                "added": case.added,
                "program": program,
                "bytes_of_x": data.x.nbytes,
                "passes": passes,
                "seconds": {name: quartiles(values) for name, values in seconds.items()},
                "ratio": {name: quartiles(seconds["jbn"] / seconds[name]) for name in others},
                "of_floor": {name: round(floor / float(np.median(v)), 3) for name, v in seconds.items()},
            }
        )
    return rows


def wrong(found: Answer, want: Answer, bound: float) -> str | None:
    """Say what of an answer is wrong, or nothing; a ReLU at its kink may take either side, so some rows may differ."""
    for name, right in want.items():
        off = np.abs(found[name] - right) > bound * np.abs(right).max()
        if not np.isfinite(found[name]).all() or off.mean() > (0 if name == "y" else bound):
            return f"{name} is off by {np.abs(found[name] - right).max():.1e}, {off.mean():.1e} of it"
    return None


def _sees_torch() -> bool:
    if jax.devices()[0].platform != "gpu" or not any(p.package == "torch" for p in installed(lambda _: None)):
        return False
    import torch

    return bool(torch.cuda.is_available())


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Begin nothing after so many seconds.")] = 420.0,
    batch: Annotated[int, typer.Option(min=2, help="Examples in a batch.")] = LARGE,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which each library has its turn.")] = 20,
    images: Annotated[int, typer.Option(min=1, help="Images in the training step of the ResNet-50.")] = IMAGES[0],
    write: Annotated[bool, typer.Option("--write", help="Put the figures into results/.")] = False,
) -> None:
    """Time jbn on this accelerator, beside the copy of an array and beside others; accuracy first."""
    began, console = time.monotonic(), Console(width=max(Console().width, 110))
    checked = jbn.check(devices=jax.devices()[:1])
    if not checked.passed:
        console.print(str(checked))
        raise typer.Exit(1)
    console.print(checked.verdict)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for case in cases(batch):
        if time.monotonic() - began > seconds:
            left.append(case.name)
            continue
        rows += (new := measure(case, repeats=repeats, report=console.print))
        _show(console, case, new)
    steps: list[dict[str, Any]] = []
    if time.monotonic() - began > seconds:
        left.append("training step of a ResNet-50")
    else:
        shape = (images, *IMAGES[1:])
        steps = resnet50(max(3, repeats // 2), console.print, Sizes(dtype=jnp.bfloat16), shape)
        for name, ratio in steps[0]["ratio"].items():
            console.print(f"{steps[0]['study']}: first / {name} {ratio}")
    for name in left:
        console.print(f"left out, for time: {name}")
    if write:
        versions = {"jax": jax.__version__} | {p.name: p.version for p in installed(lambda _: None)}
        found = {"device": jax.devices()[0].device_kind, "versions": versions, "left_out": left}
        found |= {"check": checked.verdict, "layers": rows, "resnet50": steps}
        path = RESULTS / f"accelerator-{machine()}.json"
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"Wrote {path.name}")


def _show(console: Console, case: Case, rows: list[dict[str, Any]]) -> None:
    table = Table("", "program", "ms", "of the floor", "jbn / this", title=case.name, title_justify="left")
    for row in rows:
        for name, times in row["seconds"].items():
            beside = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"][name]) if name in row["ratio"] else ""
            table.add_row(name, row["program"], f"{times[1] * 1e3:.3f}", f"{row['of_floor'][name]:.2f}", beside)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
