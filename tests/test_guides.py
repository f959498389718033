"""The guides are programs: each runs from its first block to its last, in a process of its own."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
NEEDS = {"from_pytorch": ["torch"], "from_keras": ["keras"], "from_haiku": ["haiku"]}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_runs(guide):
    if missing := [name for name in ("flax", "optax", *NEEDS.get(guide.stem, ())) if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    program = "\n".join(re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    environment.pop("JAX_NUMPY_RANK_PROMOTION", None)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
