"""What a person sees before a command computes anything: help at any width, completion, and that JAX is loaded."""

import os
import pty
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jbn.cli.commands import app
from jbn.lab import bench_command, loading, options
from jbn.lab.kinds import meant

JBN = "from jbn.__main__ import main; main()"
COMMANDS = ("demo", "check", "train", "evaluate", "diagnose", "export", "study", "report", "bench")
RECORDS = {
    "demo": (options.DemoOptions, options.DemoPlace),
    "check": (options.CheckOptions,),
    "train": (options.TrainOptions, options.TrainPlace),
    "evaluate": (options.EvaluateOptions,),
    "diagnose": (options.DiagnoseOptions,),
    "export": (options.ExportOptions,),
    "study": (options.StudyOptions, options.StudyPlace),
    "report": (options.ReportOptions,),
}


def of_command(name):
    return next(each.callback for each in app.registered_commands if each.callback.__name__ == name)


def help_of(*command, width=80):
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="jbn", env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.output


def one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_help_is_whole_at_any_width(width):
    lists = help_of(width=width)
    assert {line.split()[0] for line in lists.split("Commands:\n")[1].splitlines() if line[2] != " "} == set(COMMANDS)
    for name in COMMANDS:
        said = of_command(name).__doc__.strip()
        assert said.splitlines()[0] in one_line(lists)
        if name == "bench":  # its help is that of the benchmarks here
            continue
        text = help_of(name, width=width)
        for paragraph in said.split("\n\n"):
            assert one_line(paragraph) in one_line(text)
        for field in (field for record in RECORDS[name] for field in options.options_of(record)):
            assert one_line(field.metadata["typer"]["help"]) in one_line(text)
            flag = options.flag(field.name)
            assert field.metadata.get("argument") or re.search(rf"^  {flag}\b", text, re.MULTILINE)
        assert max(map(len, text.splitlines())) <= min(width, 80)
        assert not re.search(r"[{}]|default: \(", text)  # Typer's marks of what must be given, and of what it is told
        assert "<" not in text  # types of Python are nothing that one types
    assert max(map(len, lists.splitlines())) <= min(width, 80)
    assert "..." not in lists.split("\n", 1)[1]
    assert "…" not in lists


@pytest.mark.parametrize("width", [40, 80])
def test_what_is_to_be_typed_is_on_one_line(width):
    for command in ((), *((name,) for name in COMMANDS)):
        assert not re.search(r"[\w.-]-$", help_of(*command, width=width), re.MULTILINE)


def test_the_help_of_the_benchmarks_needs_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "jbn" / "lab" / "bench_command.py"))
    text = one_line(help_of("bench"))
    assert "Time jbn beside the batch norms of the field; in a checkout" in text
    assert "run this command in a checkout of the repository" in text
    result = CliRunner().invoke(app, ["bench", "layers"], prog_name="jbn")
    assert result.exit_code == 2
    assert result.output == "jbn: the benchmarks are not installed with the package: run jbn bench in a checkout.\n"


def completed(line):
    words = line.split(" ")
    asked = {"_JBN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = f"import sys\ntry:\n    {JBN}\nfinally:\n    print('jax' in sys.modules, file=sys.stderr)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked, timeout=300, check=False
    )
    assert ended.stderr == "False\n"  # who waits for a completion does not wait for JAX
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("jbn e", ["evaluate", "export"]),
        ("jbn train --warm", ["--warmup-epochs"]),
        ("jbn train --optimizer ", ["sgd", "adamw"]),
        ("jbn train --data m", ["mnist"]),
        ("jbn demo --model conv", ["conv", "conv64"]),
    ],
)
def test_a_shell_completes_commands_options_and_their_values(line, expected):
    assert completed(line) == expected


def test_the_options_of_completion_are_there():
    assert {"--install-completion", "--show-completion"} <= set(help_of().split())


def test_the_words_of_a_choice_are_offered_to_who_mistypes_one():
    assert meant("mnits", ["digits", "mnist"]).startswith("; did you mean mnist")
    assert meant("zzz", ["digits", "mnist"]) == ""


def in_terminal(code, *arguments):
    """Return what a command writes to a terminal, and its exit status."""
    descriptor, its = pty.openpty()
    command, env = [sys.executable, "-c", code, *map(str, arguments)], os.environ | {"TERM": "xterm"}
    started = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # of Linux, when the other end is closed
            break
        written += part
        if not part:
            break
    os.close(descriptor)
    return written.decode(), started.wait(300)


def test_a_terminal_is_told_that_jax_is_loaded_and_nothing_is_left_of_it(tmp_path):
    text, status = in_terminal(JBN, "diagnose", tmp_path)
    assert status == 2
    assert text.startswith(f"{loading.WORDS}{loading.ERASED}")
    assert text.count(loading.WORDS) == 1
    assert f"no run of jbn train in '{tmp_path}'" in text


def test_a_signal_while_jax_is_loaded_ends_the_line(tmp_path):
    """And shows the cursor, which a bar would have hidden."""
    code = "import os, signal\nfrom jbn.lab import loading, signals\nsignals.end_at_once(lambda: 'stopped.')\n"
    code += "with loading.loading():\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    text, status = in_terminal(code)
    assert status == 143
    assert text == f"{loading.WORDS}{loading.ERASED}{loading.CURSOR}jbn: stopped.\r\n"


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_log_is_told_nothing(terminal, monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("TERM", terminal)
    with loading.loading():
        pass
    assert capfd.readouterr() == ("", "")
