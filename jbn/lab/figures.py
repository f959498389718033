"""The figure of the demo: training with and without batch norm, and what it does to a hidden layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jbn.lab.training import PROBE_IMAGES

# Blue and vermilion of Okabe and Ito, distinct for colour-blind readers too.
COLOURS = {True: "#0072B2", False: "#D55E00"}
LABELS = {True: "with batch norm", False: "without batch norm"}
SMOOTHING = 15
BAND_LEGEND: dict[str, Any] = {
    "ncols": 3,
    "fontsize": "small",
    "frameon": False,
    "columnspacing": 1,
    "handlelength": 1.3,
}


def draw_demo(networks: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw a row per model (loss, accuracy, pre-activations without and with batch norm) and save it as PNG.

    `networks` are the entries of `networks` in results.json, the one without batch norm first.
    """
    models = list(dict.fromkeys(network["model"] for network in networks))
    figure = Figure(figsize=(17, 0.6 + 3.5 * len(models)), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.12)
    figure.suptitle(title, fontsize=14)
    axes = figure.subplots(len(models), 4, squeeze=False)
    for row, model in zip(axes, models, strict=True):
        _draw_model(row, [network for network in networks if network["model"] == model])
    for axis in axes.flat:
        axis.set(xlabel="step", xlim=(0, networks[0]["history"]["evaluation_steps"][-1]))
        axis.grid(color="0.4", alpha=0.2)
        axis.set_axisbelow(False)  # lines of the grid show on the bands too
        axis.title.set_fontsize("medium")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def _draw_model(row: Sequence[Axes], variants: list[dict[str, Any]]) -> None:
    model = variants[0]["model"]
    for network in variants:
        _draw_loss(row[0], network)
        _draw_accuracy(row[1], network)
    for axis, network in zip(row[2:], variants, strict=True):
        _draw_preactivations(axis, network)
        axis.set_title(f"{model}: input of last ReLU, {LABELS[network['batch_norm']]}")
    _share_limits(row[2], row[3])
    rate = variants[0]["learning_rate"]
    row[0].set(title=f"{model}, learning rate {rate:g}: training loss", yscale="log")
    row[0].set_ylabel(f"cross-entropy (bold: median of {SMOOTHING} steps)")
    row[1].set(title=f"{model}: validation accuracy", ylabel="accuracy (%)", ylim=(_lowest(variants), 100))
    row[0].legend(loc="upper right")
    row[1].legend(loc="best")
    row[2].legend(loc="upper center", **BAND_LEGEND)
    row[3].legend(loc="upper center", **BAND_LEGEND)


def _draw_loss(axis: Axes, network: dict[str, Any]) -> None:
    loss = np.array(network["history"]["training_loss"], float)
    steps = np.arange(1, len(loss) + 1)
    colour = COLOURS[network["batch_norm"]]
    axis.plot(steps, loss, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, _running_median(loss), color=colour, label=LABELS[network["batch_norm"]])


def _running_median(values: np.ndarray) -> np.ndarray:
    half = SMOOTHING // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _draw_accuracy(axis: Axes, network: dict[str, Any]) -> None:
    history = network["history"]
    accuracy = 100 * np.array(history["validation_accuracy"], float)
    axis.plot(
        history["evaluation_steps"],
        accuracy,
        color=COLOURS[network["batch_norm"]],
        label=LABELS[network["batch_norm"]],
    )


def _draw_preactivations(axis: Axes, network: dict[str, Any]) -> None:
    steps = network["history"]["evaluation_steps"]
    bands = network["history"]["preactivation_percentiles"]
    percentile = {key: np.array(values, float) for key, values in bands.items()}
    colour = COLOURS[network["batch_norm"]]
    for low, high, alpha in (("5", "95", 0.18), ("15", "85", 0.35)):
        label = f"{low}th to {high}th"
        axis.fill_between(steps, percentile[low], percentile[high], color=colour, alpha=alpha, label=label, linewidth=0)
    axis.plot(steps, percentile["50"], color=colour, label="median")
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_ylabel(f"percentiles over all units\nfor {PROBE_IMAGES} validation images")


def _lowest(variants: list[dict[str, Any]]) -> int:
    # What matters happens above 70 %, unless a network never gets far beyond it.
    accuracies = np.array([network["history"]["validation_accuracy"] for network in variants], float)
    return 70 if accuracies[:, -1].min() > 0.8 else 0


def _share_limits(left: Axes, right: Axes) -> None:
    low = min(left.get_ylim()[0], right.get_ylim()[0])
    high = max(left.get_ylim()[1], right.get_ylim()[1])
    high += 0.1 * (high - low)  # room for the legend
    left.set_ylim(low, high)
    right.set_ylim(low, high)
