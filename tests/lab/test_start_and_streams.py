"""A command from its first line on: signals before it has begun, and output that nobody takes."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from jbn.cli import streams
from jbn.lab import signals
from jbn.lab.demo import plan_of
from jbn.lab.options import DemoOptions, TrainPlace
from jbn.lab.report import bar, say, table_of
from jbn.lab.train import train
from tests.support.runs import steps_of

# Sends a signal in a callback of the garbage collector, which swallows exceptions, while modules are imported.
SENDING = """
import gc, os, signal, sys
from jbn.__main__ import main
def send(*_):
    if "typer" in sys.modules:
        gc.callbacks.remove(send)
        os.kill(os.getpid(), signal.{name})
gc.callbacks.append(send)
main()
"""
JBN = "from jbn.__main__ import main; main()"


def python(code, *arguments, **more):
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, "text": True} | more
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False, **given)


def of_jbn(text):
    return re.findall("^jbn: .*$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_while_a_command_starts_ends_it(name, status, tmp_path):
    ended = python(SENDING.format(name=name), "demo", "--steps", 2, "--out", tmp_path / "run")
    assert ended.returncode == status, ended.stderr
    assert of_jbn(ended.stderr) == ["jbn: stopped at once."]
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "run").exists()


def test_nothing_slow_is_imported_before_signals_are_heard():
    """JAX would be: in it a Ctrl-C ends in a traceback, or is lost."""
    ended = python("import sys, jbn.__main__; print(sorted({'jax', 'numpy', 'typer', 'rich'} & set(sys.modules)))")
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_second_ctrl_c_is_the_one_of_before():
    before = signal.getsignal(signal.SIGINT)
    with signals.note() as sent:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert sent == [signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_shell_has_a_command_ignore_stays_ignored():
    """A script ignores Ctrl-C for what it runs in the background, and nohup the end of its terminal."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    ending = signals.end_at_once(lambda: "stopped")
    with signals.note() as sent:
        for number in (*before, signal.SIGTERM, *before):
            signal.raise_signal(number)
    after = {number: signal.getsignal(number) for number in before}
    signals.restore(ending | before)
    assert sent == [signal.SIGTERM]
    assert set(after.values()) == {signal.SIG_IGN}


def test_a_full_standard_output_is_said_at_the_end():
    with open("/dev/full", "w") as full:
        ended = python(JBN, "--version", stdout=full)
    assert ended.returncode == 1
    assert of_jbn(ended.stderr) == [
        "jbn: cannot write to the standard output (No space left on device); files are complete"
    ]
    assert "Traceback" not in ended.stderr


def test_a_reader_that_has_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    ended = python(JBN, "--help", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_no_standard_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    output = streams.replace()
    print("to nobody")
    assert output is None
    assert streams.finish(output, 3) == 3
    sys.stdout.close()


@pytest.mark.parametrize(("status", "expected"), [(0, 1), (1, 1), (2, 2), (143, 143)])
def test_what_could_not_be_written_is_a_status_of_its_own(status, expected, capsys):
    output = streams.Patient("/dev/full", "w")
    output.write(b"x")
    assert output.failure.errno == errno.ENOSPC
    assert streams.finish(output, status) == expected
    assert "No space left" in capsys.readouterr().err
    output.close()


def test_a_run_goes_on_when_nobody_takes_what_it_says(tmp_path):
    with io.TextIOWrapper(io.BufferedWriter(streams.Patient("/dev/full", "w")), "ascii", write_through=True) as full:
        console = Console(file=full, force_terminal=True)
        plan = plan_of(DemoOptions(steps=6, batch_size=400), "dense", batch_norm=True)
        train(plan, TrainPlace(out=tmp_path / "run", devices=1), console)
        assert full.buffer.raw.failure.errno == errno.ENOSPC
    assert steps_of(tmp_path / "run" / "checkpoints") == [6]


def test_characters_that_a_locale_lacks_are_spelt():
    streams.codecs.register_error(streams.SPELL, streams.spell)
    assert "10⁴ is 10², √σ, ü\ud800".encode("ascii", streams.SPELL) == rb"10^4 is 10^2, \u221a\u03c3, \xfc\ud800"
    assert "ü²".encode("latin-1", streams.SPELL) == b"\xfc\xb2"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_of_the_demo_fits_sixty_columns(encoding):
    network = {"model": "conv64", "learning_rate": 0.1, "steps_to_90_percent": None, "steps_to_95_percent": 99_999}
    network |= {"batch_norm": True, "test_accuracy": 1.0, "test_loss": None, "median_step_ms": 1234.5}
    with io.TextIOWrapper(io.BytesIO(), encoding) as file:
        console = Console(file=file, width=60)
        console.print(table_of([network | {"batch_norm": False}, network], "64 devices (NVIDIA H100 80GB HBM3)"))
        file.flush()
        lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= 60
    rows = [re.findall(r"[^\s|]+", line) for line in lines if "conv64" in line]
    assert rows == [["conv64", answer, "100.0%", "inf/NaN", "never", "99999", "1234.50"] for answer in ("no", "yes")]
    headings = {word for line in lines[:4] for word in re.findall(r"[^\s|]+", line)}
    assert {"model", "batch", "norm", "test", "accuracy", "loss", "steps", "90%", "95%", "ms", "step"} <= headings


@pytest.mark.parametrize(("width", "shown"), [(60, False), (100, True)])
def test_a_bar_fits_its_terminal(width, shown):
    console = Console(force_terminal=True, file=io.StringIO(), width=width)
    with bar(console, "dense without batch norm", 400) as show:
        show(123, loss="loss 0.123")
        show(123, accuracy="validation 95.3%")
    text = console.file.getvalue()
    assert re.search(r"dense without batch norm.*123/400.*loss 0.123.*validation 95.3%", text)
    assert "…" not in text
    assert ("━" in text) == shown


def test_what_a_resumed_run_compiles_is_no_part_of_the_time_left():
    console = Console(force_terminal=True, file=io.StringIO(), width=100)
    with bar(console, "dense", 600, 300) as show:
        for step, seconds in enumerate((1, 0.02, 0.02, 0.02, 0.02, 0.02), 301):
            time.sleep(seconds)
            show(step)
    *_, left = re.findall(r"(\d+):(\d\d)", console.file.getvalue())
    assert 60 * int(left[0]) + int(left[1]) < 25  # 294 steps of 0.02 seconds; with the one that compiles 54


def test_sentences_break_between_words_on_a_terminal_alone():
    for terminal, lines in ((True, 3), (False, 1)):
        console = Console(force_terminal=terminal, file=io.StringIO(), width=40)
        say(console, "dense at learning rate 0.1: with batch norm 98.1% on test, 95% in validation after 40 steps")
        assert console.file.getvalue().count("\n") == lines
