"""Each example in a docstring runs as somebody pastes it: in a process of its own, with what it imports itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for file in (ROOT / "jbn").rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))
MODULES = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]

RUN = """
import doctest, importlib, sys, warnings
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
module = importlib.import_module(sys.argv[1])
warnings.simplefilter("error")
found = doctest.testmod(module, globs={}, extraglobs={"__name__": "__main__"})
print(found.attempted, "attempted")
sys.exit(bool(found.failed))
"""


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, module], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* attempted$", done.stdout, re.MULTILINE), done.stdout
