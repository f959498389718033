"""``jbn diagnose``: a checkpoint of ``jbn train`` and one batch of its data, as a diagnosis, a table and a figure.

``figure_of`` and ``table_of`` show any ``jbn.Diagnosis``, ``diagnose_run`` makes that of a checkpoint, as
``Diagnosed``, and ``run`` is the command.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Column, Table

from jbn import Diagnosis, diagnose
from jbn.atomic import replace_file
from jbn.lab.data.batches import Batch, Batches
from jbn.lab.devices import mesh_of
from jbn.lab.errors import OptionError
from jbn.lab.figures import COLOURS
from jbn.lab.models import MOMENTUM
from jbn.lab.options import DiagnoseOptions
from jbn.lab.report import show, waiting
from jbn.lab.run.saved import blame_checkpoint, find_saved
from jbn.lab.step import Recipe, augment
from jbn.observing.findings import FAR, LEAST_GAP

__all__ = [
    "Diagnosed",
    "diagnose_run",
    "figure_of",
    "run",
    "table_of",
]

EPSILON = 1e-5  # of the networks of ``jbn train``, as MOMENTUM is


class Diagnosed(NamedTuple):
    """The diagnosis of a checkpoint, and of which one.

    Attributes:
        title: the run, the step and the batch, in one line.
        diagnosis: what ``jbn.diagnose`` found.
    """

    title: str
    diagnosis: Diagnosis


def run(options: DiagnoseOptions, console: Console) -> Diagnosis:
    """Print the diagnosis of a checkpoint, draw it where a figure is asked for, and return it.

    Raises:
        OptionError: the figure cannot be written, or as ``diagnose_run`` says.
    """
    figure = options.figure
    if figure is not None and (figure.suffix != ".png" or not figure.parent.is_dir()):
        raise OptionError("--figure", f"got '{figure}'; expected a name that ends in .png, in a folder that is there")
    with waiting(console, "Diagnosing; most of the time it compiles ..."):
        found = diagnose_run(options.checkpoint, batch_size=options.batch_size, seed=options.seed)
    console.print(found.title, soft_wrap=True, highlight=False)
    show(console, table_of(found.diagnosis))
    for message in str(found.diagnosis).splitlines():
        console.print(message, soft_wrap=True, highlight=False)
    if figure is not None:
        drawn = figure_of(found.diagnosis, found.title)
        try:
            replace_file(figure, lambda file: drawn.savefig(file, format="png", dpi=130))
        except OSError as error:
            raise OptionError("--figure", f"cannot write '{figure}' ({error.strerror})") from None
        console.print(f"Wrote {figure}", soft_wrap=True)
    return found.diagnosis


def diagnose_run(path: Path, *, batch_size: int | None, seed: int) -> Diagnosed:
    """Run one batch of the training data through a checkpoint, on one device; nothing is written.

    Args:
        path: the folder of a run, for its last checkpoint, or one of its checkpoints.
        batch_size: how many images, that of the run for None.
        seed: of the choice of images.

    Raises:
        OptionError: there is no such checkpoint, or it or its data cannot be read.
    """
    saved = find_saved(path)
    if not saved.options.batch_norm:
        raise OptionError("CHECKPOINT", f"the network in '{saved.out}' has no batch normalization")
    mesh, training = mesh_of(1), saved.data(validation=False).training
    batches = Batches(training, batch_size or saved.options.batch_size, mesh)
    with blame_checkpoint(f"cannot use the data of the run in '{saved.out}': "):
        batch = batches.read(batches.rows(0, seed))
    recipe, state = saved.read(mesh)
    found = diagnose(
        _training_pass(recipe),
        state.params,
        state.batch_stats,
        batch,
        epsilon=EPSILON,
        momentum=MOMENTUM,
        updates=int(state.step),
    )
    return Diagnosed(
        f"{saved.options.model} in '{saved.out}' after step {state.step}, {batches.size} training images", found
    )


@cache
def _training_pass(recipe: Recipe) -> Any:
    """Return the network as a step runs it: on augmented images, some of which may be padding."""

    def apply(params: Any, stats: Any, batch: Batch) -> Any:
        variables, images = (
            {"params": params, "batch_stats": stats},
            augment(recipe.options, jnp.int32(0), batch.images),
        )
        _, new = recipe.network.apply(variables, images, train=True, valid=batch.valid, mutable=["batch_stats"])
        return new["batch_stats"]

    return apply


def table_of(diagnosis: Diagnosis) -> Table:
    """Return a row for each layer, with the figures of its worst channel."""
    numbers = ("chan-\nnels", "values", "z\nmean", "z\nvar", "gap", "prior\nleft", "least\nvar", "mean/\nstd")
    table = Table(
        Column("layer", overflow="fold", min_width=11),
        *(Column(name, justify="right", no_wrap=True) for name in numbers),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        caption="all of the worst channel: values in the batch; z: batch against running statistics, in standard "
        "errors; gap: y in evaluation against training, in standard deviations of the output; prior left: of the "
        "running statistics, the share of the initial 0 and 1; var, mean/std: of the batch. What is too far "
        "is told below",
    )
    flagged = {path for finding in diagnosis.findings for path in (finding.path, *finding.layers)}
    for layer in diagnosis.layers:
        table.add_row(
            layer.path,
            str(layer.count.size),
            f"{layer.count.min():.{'0f' if layer.count.min() < 1e6 else '0e'}}",
            _largest(np.abs(layer.z_mean)),
            _largest(np.abs(layer.z_var)),
            _largest(layer.gap),
            "-" if np.isnan(layer.prior) else f"{layer.prior:.0%}",
            "-" if np.isnan(layer.batch_var).all() else f"{layer.batch_var.min():.0e}",
            _largest(layer.ratio),
            style="bold" if layer.path in flagged else None,
        )
    return table


def _largest(values: np.ndarray) -> str:
    """Return the largest number in five characters."""
    most = np.max(values, where=~np.isnan(values), initial=-1)
    return "-" if most < 0 else f"{most:.2f}" if most < 100 else f"{most:.0f}" if most < 1000 else f"{most:.0e}"


def figure_of(diagnosis: Diagnosis, title: str = "", epsilon: float = EPSILON) -> Figure:
    """Draw every channel of every layer, in the order of the data: gap, variance and |mean|/std.

    Of layers that were not observed there is the running variance alone, and why beside the name.
    """
    layers = diagnosis.layers
    figure = Figure(figsize=(max(8, 3 + 0.8 * len(layers)), 9), layout="constrained")
    gap, variance, ratio = figure.subplots(3, sharex=True)
    marked = np.concatenate([_marks(diagnosis, layer.path, layer.count.shape) for layer in layers])
    # Channels of a layer side by side, from the first to the last.
    places = np.concatenate(
        [i + np.linspace(-0.35, 0.35, layer.count.size + 2)[1:-1] for i, layer in enumerate(layers)]
    )

    def of(name: str) -> np.ndarray:
        return np.concatenate([getattr(layer, name).ravel() for layer in layers])

    _draw(variance, places, of("running_var"), np.zeros_like(marked), "0.3", "running", dot="_")
    why = {path: f"\n({finding.kind})" for finding in diagnosis.findings for path in finding.layers}
    seen = np.concatenate([np.full(layer.count.size, layer.path not in why) for layer in layers])
    for axis, name, limit in ((gap, "gap", LEAST_GAP), (variance, "batch_var", epsilon), (ratio, "ratio", FAR)):
        _draw(axis, places[seen], of(name)[seen], marked[seen], COLOURS[True], "batch")
        axis.axhline(limit, color="0.3", linewidth=0.8, linestyle=":", label="findings begin here, at the earliest")
        axis.set_yscale("log")
        axis.grid(color="0.4", alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    gap.set(title=title, ylabel="gap of y between evaluation\nand training (standard deviations)")
    variance.set_ylabel("variance")
    ratio.set(ylabel="|mean| / standard deviation", xticks=range(len(layers)), xlim=(-0.5, len(layers) - 0.5))
    names = [layer.path + why.get(layer.path, "") for layer in layers]
    ratio.set_xticklabels(names, rotation=30, ha="right", rotation_mode="anchor")
    named = [axis.get_legend_handles_labels() for axis in (variance, gap, ratio)]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _marks(diagnosis: Diagnosis, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return for each channel of a layer whether a finding names it."""
    marked = np.zeros(shape, bool)
    for channels in (finding.channels for finding in diagnosis.findings if finding.path == path):
        marked[tuple(np.reshape(channels, (-1, len(shape))).T)] = True
    return marked.ravel()


def _draw(
    axis: Axes, places: np.ndarray, values: np.ndarray, marked: np.ndarray, colour: str, label: str, dot: str = "."
) -> None:
    """Draw channels as dots, those with a finding in another colour; at the edges those that have no logarithm."""
    with_logarithm, zero = np.isfinite(values) & (values > 0), values == 0
    at_edge: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
    for here, paint, name in ((~marked, colour, label), (marked, COLOURS[False], "with a finding")):
        for which, marker, height, called, more in (
            (here & with_logarithm, dot, values, name, {"markersize": 8 if dot == "_" else 5}),
            (here & zero, "v", np.full_like(values, 0.02), "0", at_edge),
            (here & ~with_logarithm & ~zero, "x", np.full_like(values, 0.98), "infinite or NaN", at_edge),
        ):
            if which.any():
                axis.plot(places[which], height[which], marker, color=paint, label=called, **{"markersize": 5} | more)


def __dir__() -> list[str]:
    return __all__
