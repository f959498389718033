"""How `jbn train` ends: a table and a figure of all that a run has recorded."""

import io

import numpy as np
import pytest
from rich.console import Console

from jbn.lab import figures
from jbn.lab import train as trainer
from jbn.lab.figures import draw_run
from jbn.lab.report import show, table_of_run
from tests.lab.test_train import random_data
from tests.support.runs import STEPS, folder, lines_of, options, steps_of, stopping, train


def rows_of(lines, per_epoch, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        show(console, table_of_run(lines, per_epoch, "how"))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= max(width, 60)
    return [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0][:4] in ("trai", "vali")]


def drawn(lines, monkeypatch):
    """Return the lines of a figure of a run: by their names, of loss and of accuracy."""
    kept = []
    monkeypatch.setattr(figures, "_finish", lambda figure, last, file: kept.append((figure, last)))
    draw_run(lines, "dense on $a_1$: sgd", io.BytesIO())
    monkeypatch.undo()
    (figure, last), *_ = kept
    named = [{line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"} for axis in figure.axes]
    return (*named, last)


def test_the_table_says_what_is_recorded(whole):
    lines = lines_of(whole)
    steps = [line for line in lines if "loss" in line][-9:]
    looks = [line for line in lines if "validation_loss" in line]
    loss, accuracy = (np.mean([line[name] for line in steps]) for name in ("loss", "accuracy"))
    assert rows_of(lines, 9) == [
        ["training,", "last", "epoch", f"{loss:.3g}", f"{accuracy:.1%}"],
        *(
            [
                *words,
                f"{looks[-1][f'{name}_loss']:.3g}",
                f"{looks[-1][f'{name}_accuracy']:.1%}",
                f"{max(look[f'{name}_accuracy'] for look in looks):.1%}",
                str(max(looks, key=lambda look, name=name: look[f"{name}_accuracy"])["step"]),
            ]
            for name, words in (
                ("validation", ["validation"]),
                ("average", ["validation,", "average", "of", "weights"]),
            )
        ),
    ]


def test_the_best_look_is_the_first_of_those_that_are_as_good():
    looks = [
        {"step": step, "validation_loss": 1.0, "validation_accuracy": share}
        for step, share in ((9, 0.5), (18, 0.75), (27, 0.75))
    ]
    lines = [{"step": step, "loss": 2.0, "accuracy": 0.25} for step in range(1, 28)] + looks
    assert rows_of(lines, 9)[1] == ["validation", "1", "75.0%", "75.0%", "18"]
    for width in (40, 60):
        assert [row[:1] for row in rows_of(lines, 9, width)] == [["training,"], ["validation"]]


def test_what_is_not_finite_is_said(monkeypatch):
    lines = [{"step": step, "loss": None if step > 5 else 1.0, "accuracy": 0.5} for step in range(1, 10)]
    lines.append({"step": 9, "validation_loss": None, "validation_accuracy": 0.1})
    training, validation = rows_of(lines, 4)
    assert training[3:] == ["inf/NaN", "50.0%"]
    assert validation[1:] == ["inf/NaN", "10.0%", "10.0%", "9"]
    loss, _, _ = drawn(lines, monkeypatch)
    assert np.isnan(loss["validation"].get_ydata()).all()
    draw_run(lines, "", io.BytesIO())
    draw_run([line | {"loss": None} for line in lines[:9]], "", io.BytesIO())


def test_the_figure_shows_what_is_recorded(whole, monkeypatch):
    lines = lines_of(whole)
    loss, accuracy, last = drawn(lines, monkeypatch)
    assert last == STEPS
    names = {"training, by batch statistics", "validation", "validation, average of weights"}
    assert loss.keys() == accuracy.keys() == names
    for panel, what, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        assert panel["training, by batch statistics"].get_xdata().tolist() == list(range(1, STEPS + 1))
        for name, label in (("validation", "validation"), ("average", "validation, average of weights")):
            looks = [line for line in lines if f"{name}_{what}" in line]
            assert list(panel[label].get_xdata()) == [line["step"] for line in looks]
            np.testing.assert_allclose(panel[label].get_ydata(), [factor * line[f"{name}_{what}"] for line in looks])
    assert (whole / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_validation_has_a_table_and_a_figure_too(tmp_path):
    where, out = folder(tmp_path / "of $1_a$ [b]", random_data(40)), tmp_path / "run"
    result = train(out, options(**{"--data": where, "--epochs": 1, "--ema": 0}))
    assert result.exit_code == 0, result.output
    assert "training, last epoch" in result.output
    assert not [line for line in result.output.splitlines() if line.strip().startswith("validation")]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_stopped_is_drawn_whole_when_it_ends(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "draw_run", lambda lines, title, file: seen.append((lines, title)))
    with monkeypatch.context() as patch:
        stopping(patch, 6)
        assert train(tmp_path / "run", options()).exit_code == 143
    assert seen == []
    result = train(tmp_path / "run", ["--resume", "--devices", 1])
    assert result.exit_code == 0, result.output
    ((lines, title),) = seen
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert title == "dense on digits: sgd, learning rate 0.05, batches of 128, seed 0"
    assert steps_of(tmp_path / "run" / "checkpoints")[-1] == STEPS
    said = [line for line in result.output.splitlines() if line.startswith("Wrote ")]
    assert said == [f"Wrote {tmp_path / 'run' / name}" for name in ("figure.png", "results.json", "metrics.jsonl")]


def test_a_figure_that_cannot_be_written_ends_the_run_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "draw_run", full)
    result = train(tmp_path / "run", options(**{"--epochs": 1}))
    assert result.exit_code == 1
    assert f"jbn: cannot write '{tmp_path / 'run' / 'figure.png'}' (No space left on device)" in result.output


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_bar_of_a_run_with_an_average_has_room(columns, tmp_path, monkeypatch):
    """All of it: one that has none leaves out digits of the steps."""
    shown = []
    kept = trainer.bar

    def bar(console, *args):
        console = Console(force_terminal=True, file=io.StringIO(), width=columns)
        shown.append(console)
        return kept(console, *args)

    monkeypatch.setattr(trainer, "bar", bar)
    assert train(tmp_path / "run", options(**{"--epochs": 1})).exit_code == 0
    assert "…" not in shown[0].file.getvalue()
    assert "9/9" in shown[0].file.getvalue()
