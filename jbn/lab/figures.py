"""The figure of the demo: training with and without batch norm, and what it does to a hidden layer."""

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jbn.lab.run.metrics import curve
from jbn.lab.step import PROBE_IMAGES

# Blue and vermilion of Okabe and Ito, distinct for colour-blind readers too.
COLOURS = {True: "#0072B2", False: "#D55E00"}
LINES = {True: "-", False: (0, (4, 1))}  # the two colours are nearly one grey on paper
LABELS = {True: "with batch norm", False: "without batch norm"}
# Of a run there is one network: its lines are told apart by what they were measured on.
TRAINING = "0.4"
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "validation": ("validation", {"color": COLOURS[True], "marker": "o"}),
    "average": ("validation, average of weights", {"color": "#009E73", "marker": "s", "linestyle": "--"}),
}
SMOOTHING = 15
# For those who have seen no percentiles: what the panels on the right show.
NOTE = (
    f"The two panels on the right: of all numbers that the last ReLU is given for {PROBE_IMAGES} validation images, "
    "90 % lie within the pale band, 70 % within the dark one,\nand half above the line in its midst. A band that stays "
    "in its place: what is given changes little while the layers before it learn, "
    "or they no longer learn."
)


def draw_demo(networks: list[dict[str, Any]], title: str, file: IO[bytes]) -> None:
    """Draw a row per model (loss, accuracy, pre-activations without and with batch norm) and save it as PNG.

    ``networks`` are the entries of ``networks`` in results.json, the one without batch norm first.
    """
    pairs = list(zip(networks[::2], networks[1::2], strict=True))
    figure = Figure(figsize=(17, 1 + 3.5 * len(pairs)), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.12)
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(NOTE, fontsize="medium", x=0.01, ha="left", color="0.3")
    axes = figure.subplots(len(pairs), 4, squeeze=False)
    for row, pair in zip(axes, pairs, strict=True):
        _draw_model(row, pair)
    _finish(figure, networks[0]["history"]["evaluation_steps"][-1], file)


def draw_run(lines: list[dict[str, Any]], title: str, file: IO[bytes]) -> None:
    """Draw loss and accuracy of a run, in training and of its looks, and save it as PNG.

    ``lines`` are those of metrics.jsonl; steps that it lost are a line from the one before to the one after.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title.encode(errors="replace").decode(), fontsize=12, parse_math=False)  # it may name a folder
    loss, accuracy = figure.subplots(1, 2)
    for axis, of_step, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        _draw_steps(axis, *curve(lines, of_step), "training, by batch statistics", factor, color=TRAINING)
        for name, (label, look) in LOOKS.items():
            steps, values = curve(lines, f"{name}_{of_step}")
            if steps:
                axis.plot(steps, factor * np.array(values, float), label=label, markersize=4, clip_on=False, **look)
    drawn = np.concatenate([line.get_ydata() for line in loss.lines])
    scale = "log" if np.any(drawn[np.isfinite(drawn)] > 0) else "linear"
    loss.set(title="loss", yscale=scale, ylabel=f"cross-entropy (bold: median of {SMOOTHING} steps)")
    accuracy.set(title="accuracy", ylabel=f"accuracy in % (bold: median of {SMOOTHING} steps)", ylim=(None, 101))
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _finish(figure, max(line["step"] for line in lines), file)


def _finish(figure: Figure, last: int, file: IO[bytes]) -> None:
    """Give all panels the same steps and look, and save the figure."""
    for axis in figure.axes:
        axis.set(xlabel="step", xlim=(0, last))
        axis.grid(color="0.4", alpha=0.2)
        axis.set_axisbelow(False)  # lines of the grid show on the bands too
        axis.title.set_fontsize("medium")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=130)


def _draw_steps(
    axis: Axes, steps: Sequence[int], values: Sequence[float | None], label: str, factor: int = 1, **look: Any
) -> None:
    """Draw a value of every step, pale, and its running median; it breaks where a value is not finite."""
    known = factor * np.array(values, float)  # NaN where there is None
    axis.plot(steps, known, alpha=0.25, linewidth=0.8, **look)
    axis.plot(steps, _running_median(known), label=label, **look)


def _draw_model(row: Sequence[Axes], pair: Sequence[dict[str, Any]]) -> None:
    model, rate, accuracies = pair[0]["model"], pair[0]["learning_rate"], []
    row[3].sharey(row[2])
    for network, axis in zip(pair, row[2:], strict=True):
        history, norm = network["history"], network["batch_norm"]
        look: dict[str, Any] = {"color": COLOURS[norm], "linestyle": LINES[norm]}
        name, steps = LABELS[norm], history["evaluation_steps"]
        loss = history["training_loss"]
        _draw_steps(row[0], range(1, len(loss) + 1), loss, name, **look)
        accuracies.append(100 * np.array(history["validation_accuracy"], float))
        row[1].plot(steps, accuracies[-1], label=name, **look)
        _draw_preactivations(axis, steps, history["preactivation_percentiles"], look)
        axis.set_title(f"{model}: input of last ReLU, {name}")
    # What matters happens above 70 %, unless a network never gets far beyond it.
    lowest = 70 if min(accuracy[-1] for accuracy in accuracies) > 80 else 0
    row[0].set(title=f"{model}, learning rate {rate:g}: training loss", yscale="log")
    row[0].set_ylabel(f"cross-entropy (bold: median of {SMOOTHING} steps)")
    row[1].set(title=f"{model}: validation accuracy", ylabel="accuracy (%)", ylim=(lowest, 100))
    row[0].legend(loc="best")
    row[1].legend(loc="best")
    low, high = row[2].get_ylim()
    row[2].set_ylim(low, high + 0.1 * (high - low))  # room for the legends


def _running_median(values: np.ndarray) -> np.ndarray:
    half = SMOOTHING // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _draw_preactivations(axis: Axes, steps: list[int], bands: dict[str, list[float]], look: dict[str, Any]) -> None:
    percentile = {key: np.array(values, float) for key, values in bands.items()}
    for low, high, alpha in (("5", "95", 0.18), ("15", "85", 0.35)):
        label = f"{low}th to {high}th"
        axis.fill_between(steps, percentile[low], percentile[high], alpha=alpha, label=label, linewidth=0, **look)
    axis.plot(steps, percentile["50"], label="median", **look)
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_ylabel(f"percentiles over all units\nfor {PROBE_IMAGES} validation images")
    small: dict[str, Any] = {"fontsize": "small", "columnspacing": 1, "handlelength": 1.3}
    axis.legend(loc="upper center", ncols=3, frameon=False, **small)
