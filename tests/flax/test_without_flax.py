"""Without Flax the modules say what to install, and the core works."""

import subprocess
import sys

import pytest

from jbn.version import install

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported


@pytest.mark.parametrize("room", ["linen", "nnx"])
def test_what_to_install(room):
    code = f"import sys; sys.modules['flax'] = None; import jbn; jbn.bn_init(3); import jbn.{room}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ModuleNotFoundError: jbn.{room} needs Flax, which is not installed: {install('flax')}"


def test_what_flax_itself_lacks_is_named(tmp_path):
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "__init__.py").write_text("import what_flax_needs\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jbn.linen"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'what_flax_needs'"
