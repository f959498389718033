"""What each batch norm does on many devices: ``python -m benchmarks.devices [--write]``.

Eight simulated CPU devices hold one batch of images, a shard each. What comes out is measured against float64 on one
device that has all valid images: y, the gradients of x and scale, and the running statistics after one step, each
relative to its largest value, in float32. The gradient is that of Σ g·y over all devices, and g is 0 where the mask is,
so what a library puts at masked positions is not counted. The running statistics are expected as the library itself
moves them on one device, and their error counts in what the batch adds to them.

A cell is one of these:

- "exact": no error is larger than 1e-5. A figure: the largest error.
- "states differ": the devices hold different states after the step. Before it the error of y and the gradients, unless
  it is small; each is then measured against the group or the shard whose statistics they should be.
- The type of the exception; with ``*`` where its message has the name of the axis that is there.
- "—": the library has no such argument.

Groups are batches of their own, but the running statistics are expected to be those of the whole batch, so that all
devices hold the same. All are set up as `benchmarks.peers` says. With ``--write`` the figures go to
results/devices.json and, as a table, into docs/guides/many_devices.md.
"""

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import readme
from benchmarks.layers import EPSILON, MOMENTUM, Layer
from benchmarks.peers import Groups, Lacking, Peer, installed

RESULTS = Path(__file__).parent / "results" / "devices.json"
DEVICES, IMAGES, FEATURES = 8, 4, 4
SHAPE = (DEVICES * IMAGES, 3, 3, FEATURES)
AXIS, TYPO = "data", "dta"
BOUND = 1e-5
CAPTION = f"*: the message names the axis that is there, '{AXIS}'. —: no such argument"

HALVES = (tuple(range(DEVICES // 2)), tuple(range(DEVICES // 2, DEVICES)))
ALONE = tuple((i,) for i in range(DEVICES))


class Batch(NamedTuple):
    """One batch over all devices.

    Attributes:
        x: images (N, H, W, C), float32.
        g: the cotangent of y, 0 where the mask is False.
        mask: which images are valid, (N, 1, 1, 1), or None.
    """

    x: np.ndarray
    g: np.ndarray
    mask: np.ndarray | None


def batch(mean: float = 0.0, apart: float = 10.0, valid: tuple[int, ...] | None = None, nan: bool = False) -> Batch:
    """Return a batch of standard deviation 1 on each shard.

    Args:
        mean: that of the first shard.
        apart: how far the means of neighbouring shards are from each other.
        valid: how many images of each shard are valid; all of them unless given.
        nan: whether the others are NaN.
    """
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, DEVICES, IMAGES, *SHAPE[1:]))
    x = x + mean + apart * np.arange(DEVICES).reshape(-1, 1, 1, 1, 1)
    mask = None
    if valid is not None:
        mask = np.arange(IMAGES) < np.array(valid)[:, None]
        mask = mask.reshape(-1, 1, 1, 1)
        g = np.where(mask, g.reshape(SHAPE), 0)
        x = np.where(mask, x.reshape(SHAPE), np.nan) if nan else x
    return Batch(x.reshape(SHAPE).astype(np.float32), g.reshape(SHAPE).astype(np.float32), mask)


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        name: the row's.
        over: how the devices are reached, a key of `OVER`.
        batch: what they hold.
        axis_name: what the layer gets.
        groups: what the layer gets.
        parts: the groups of images that share statistics, where they are not `groups`.
        about_names: whether a message should have the name of the axis.
    """

    name: str
    over: str
    batch: Batch
    axis_name: str | None = AXIS
    groups: Groups | None = None
    parts: Groups | None = None
    about_names: bool = False


UNEQUAL, ONE_EMPTY, EMPTY = (4, 1, 3, 2, 4, 1, 2, 3), (4, 1, 0, 2, 4, 1, 2, 3), (0,) * DEVICES
CASES = (
    Case("`jit`, sharded batch", "jit", batch(), None),
    Case("`shard_map`", "shard_map", batch()),
    Case("`shard_map(check_vma=False)`", "unchecked", batch()),
    Case("`pmap`", "pmap", batch()),
    Case("`vmap`", "vmap", batch()),
    Case("mean/std = 10⁴, `shard_map(check_vma=False)`", "unchecked", batch(mean=1e4, apart=0)),
    Case("means of shards 10⁴ std apart, `shard_map(check_vma=False)`", "unchecked", batch(apart=1e4)),
    Case("mask, `jit`", "jit", batch(valid=UNEQUAL), None),
    Case("mask, NaN under it, `jit`", "jit", batch(valid=UNEQUAL, nan=True), None),
    Case("mask, unequal counts, `shard_map`", "shard_map", batch(valid=UNEQUAL)),
    Case("mask, one shard empty, `shard_map`", "shard_map", batch(valid=ONE_EMPTY)),
    Case("mask, all shards empty, `shard_map`", "shard_map", batch(valid=EMPTY)),
    Case("groups of shards, `shard_map`", "shard_map", batch(), groups=HALVES),
    Case("groups of shards, `shard_map(check_vma=False)`", "unchecked", batch(), groups=HALVES),
    Case("groups of shards, `pmap`", "pmap", batch(), groups=HALVES),
    Case("groups of shards, `vmap`", "vmap", batch(), groups=HALVES),
    Case("groups of examples, `jit`", "jit", batch(), None, groups=IMAGES // 2),
    Case("no axis name, `shard_map`", "shard_map", batch(apart=1), None, parts=ALONE, about_names=True),
    Case("no axis name, `shard_map(check_vma=False)`", "unchecked", batch(apart=1), None, parts=ALONE),
    Case("misspelt axis name, `shard_map`", "shard_map", batch(), TYPO, about_names=True),
    Case("misspelt axis name, `pmap`", "pmap", batch(), TYPO, about_names=True),
)


class Found(NamedTuple):
    """What a step gives: in float64 as it should be, or of a library, with the statistics of every device."""

    y: np.ndarray  # (N, H, W, C)
    dx: np.ndarray
    dscale: np.ndarray
    mean: np.ndarray  # (devices, C), or (C,) where it is expected
    var: np.ndarray


def exact(x: np.ndarray, g: np.ndarray, mask: np.ndarray | None) -> Found:
    """Return what one device gives in float64, by the closed form of Ioffe and Szegedy 2015, section 3."""
    rows = (0, 1, 2)
    valid = np.broadcast_to(True if mask is None else mask, x.shape)
    x, g = (np.where(valid, array, 0).astype(np.float64) for array in (x, g))
    n = np.maximum(valid.sum(rows), 1)
    mean = x.sum(rows) / n
    centred = np.where(valid, x - mean, 0)
    var = (centred**2).sum(rows) / n
    r = 1 / np.sqrt(var + EPSILON)
    y = centred * r
    dscale = (g * y).sum(rows)
    dx = np.where(valid, r * (g - g.sum(rows) / n - y * dscale / n), 0)
    return Found(y, dx, dscale, mean, var)


def expected(case: Case) -> Found:
    """Return what one device gives that has all images; with groups, each by itself, and the statistics of all."""
    groups = case.parts or case.groups
    if groups is None:
        return exact(*case.batch)
    images = np.arange(SHAPE[0])
    if isinstance(groups, int):
        parts = list(images.reshape(-1, groups))
    else:
        parts = [images.reshape(DEVICES, IMAGES)[list(group)].ravel() for group in groups]
    whole, (x, g, _) = exact(*case.batch), case.batch
    y, dx = np.zeros((2, *SHAPE))
    dscale = np.zeros(FEATURES)
    for part in parts:
        y[part], dx[part], of_part, *_ = exact(x[part], g[part], None)
        dscale += of_part
    return whole._replace(y=y, dx=dx, dscale=dscale)


Step = Callable[..., Any]
"""(params, state, x, g, mask) to (y, dx), the running (mean, var) and the gradient of scale."""


def step_of(layer: Layer) -> Step:
    """Return what every device runs."""
    scale = next(i for i, leaf in enumerate(jax.tree.leaves(layer.params)) if (np.asarray(leaf) == 1).all())

    def step(params: Any, state: Any, x: Any, g: Any, mask: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            masked = {} if mask is None else {"mask": mask}
            y, new = layer.apply(params, state, x, True, **masked)
            return (y * g).sum(), (y, new)

        (of_params, dx), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return (y, dx), layer.running(new), jax.tree.leaves(of_params)[scale].ravel()

    return step


def _jit(step: Step) -> Step:
    over: Any = NamedSharding(Mesh(jax.devices()[:DEVICES], (AXIS,)), P(AXIS))

    def run(params: Any, state: Any, *data: Any) -> Any:
        rows, running, dscale = jax.jit(step)(params, state, *jax.device_put(data, over))
        return rows, jax.tree.map(lambda v: v[None], running), dscale

    return run


def _shard_map(step: Step, check_vma: bool = True) -> Step:
    def unchecked(*operands: Any) -> Any:
        rows, running, dscale = step(*operands)  # nothing says here whether the states are the same: all come out
        return rows, jax.tree.map(lambda v: v[None], running), lax.psum(dscale, AXIS)

    def run(*operands: Any) -> Any:
        mesh, each, one = Mesh(jax.devices()[:DEVICES], (AXIS,)), P(AXIS), P()
        specs: Any = {"in_specs": (one, one, each, each, each), "out_specs": (each, one if check_vma else each, one)}
        mapped = jax.shard_map(step if check_vma else unchecked, mesh=mesh, check_vma=check_vma, **specs)
        rows, running, dscale = jax.jit(mapped)(*operands)
        return rows, jax.tree.map(lambda v: v[None], running) if check_vma else running, dscale

    return run


def _map(step: Step, transform: Any) -> Step:
    def run(params: Any, state: Any, *data: Any) -> Any:
        split = jax.tree.map(lambda v: v.reshape(DEVICES, IMAGES, *v.shape[1:]), data)
        mapped = transform(step, in_axes=(None, None, 0, 0, 0), axis_name=AXIS)
        rows, running, dscale = mapped(params, state, *split)
        return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), rows), running, dscale.sum(0)

    return run


OVER: dict[str, Callable[[Step], Step]] = {
    "jit": _jit,
    "shard_map": _shard_map,
    "unchecked": lambda step: _shard_map(step, check_vma=False),
    "pmap": lambda step: _map(step, jax.pmap),
    "vmap": lambda step: _map(step, jax.vmap),
}


def found(peer: Peer, case: Case) -> Found:
    """Run a library on all devices."""
    layer = peer.layer(FEATURES, axis_name=case.axis_name, groups=case.groups)
    x, g = (np.ascontiguousarray(np.moveaxis(v, -1, peer.axis)) for v in (case.batch.x, case.batch.g))
    rows, (mean, var), dscale = OVER[case.over](step_of(layer))(layer.params, layer.state, x, g, case.batch.mask)
    y, dx = (np.moveaxis(np.asarray(v), peer.axis, -1) for v in rows)
    return Found(y, dx, np.asarray(dscale), np.asarray(mean), np.asarray(var))


def relative(got: np.ndarray, want: np.ndarray, size: float | None = None) -> float:
    """Return the largest error, relative to the largest value, or to a size; NaN where there is one."""
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1 if size is None else size))


def error_of_rows(case: Case, got: Found, want: Found) -> float:
    """Return the largest error of y at valid positions and of the gradients."""
    valid = True if case.batch.mask is None else case.batch.mask
    y = relative(np.where(valid, got.y, 0), want.y)
    return float(np.max([y, relative(got.dx, want.dx), relative(got.dscale, want.dscale)]))  # np.max keeps NaN


def error_of_state(peer: Peer, case: Case, got: Found, want: Found) -> float:
    """Return the largest error of the running statistics, relative to what the batch adds to them."""
    if case.batch.mask is not None and not case.batch.mask.any():  # they stay those of a fresh state
        return max(relative(got.mean, np.zeros(FEATURES)), relative(got.var, np.ones(FEATURES)))
    weight = 1.0 if peer.debiased else 1 - MOMENTUM
    mean, var = weight * want.mean, weight * want.var
    return max(relative(got.mean, mean), relative(got.var, var + peer.prior, float(var.max())))


def measure(peer: Peer, case: Case) -> dict[str, Any]:
    """Return what a library does in a case; nothing where it has no such argument."""
    try:
        got = found(peer, case)
    except Lacking:
        return {}
    except Exception as raised:  # which one it is, is what is measured
        names = case.about_names and re.search(rf"\b{AXIS}\b", str(raised)) is not None
        return {"raises": type(raised).__name__, "names the axis": names}
    want = expected(case)
    differ = not all((v == v[0]).all() or np.isnan(v).all() for v in (got.mean, got.var))
    errors = [error_of_rows(case, got, want), *([] if differ else [error_of_state(peer, case, got, want)])]
    figure = float(np.max(errors))
    return {"error": None if math.isnan(figure) else figure, "states differ": differ}


def shown(cell: dict[str, Any]) -> str:
    """Return a cell as it stands in tables; JSON has no NaN, so that is None there."""
    if not cell:
        return "—"
    if "raises" in cell:
        return cell["raises"] + " *" * cell["names the axis"]
    figure = "NaN" if cell["error"] is None else "exact" if cell["error"] <= BOUND else f"{cell['error']:.0e}"
    if cell["states differ"]:
        return "states differ" if figure == "exact" else f"{figure}, states differ"
    return figure


def head(found: dict[str, Any]) -> list[str]:
    """Return the names of the columns."""
    return ["float32", *(f"{column['library']} {column['version']}" for column in found["columns"])]


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table."""
    columns = [column["cases"] for column in found["columns"]]
    return [[name, *(shown(cases[name]) for cases in columns)] for name in columns[0]]


def markdown(found: dict[str, Any]) -> str:
    """Return the table of docs/guides/many_devices.md."""
    return readme.markdown(head(found), cells(found))


def printed(found: dict[str, Any]) -> Table:
    """Return the table for a terminal of 110 columns."""
    name, *columns = head(found)
    table = Table(title="Many devices", caption=CAPTION, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(name, width=30)
    for column in columns:
        table.add_column("\n".join(column.rsplit(" ", 1)), max_width=11)
    for row in cells(found):
        table.add_row(*(re.sub("(?<=[a-z])(?=[A-Z][a-z])", "\n", cell.replace("`", "")) for cell in row))
    return table


def main() -> None:
    """Measure and print; write if asked to."""
    write, console, absent = readme.opened("devices", "What each batch norm does on many devices.")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    warnings.simplefilter("ignore")  # what a library calls although it is deprecated is its own concern
    columns = []
    for peer in installed(absent):
        if peer.make is None:  # its devices are processes
            continue
        with console.status(peer.name):
            of_cases = {case.name: measure(peer, case) for case in CASES}
        columns.append({"library": peer.name, "version": peer.version, "cases": of_cases})
    found = {"jax": jax.__version__, "devices": DEVICES, "columns": columns}
    console.print(printed(found))
    if write:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        readme.replace("devices", markdown(found))


if __name__ == "__main__":
    main()
