"""Settings for every test and doctest: eight simulated devices, no silent broadcasting, a fixed hypothesis profile."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "0"  # whatever the shell says: literals are float32, but for tests that ask for float64
# The processes of a run, and those that tests start, share what they compile. The first of them names the folder, so
# that it is a new one for each run; with the variable set, compiled programs stay for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jbn-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

import hypothesis
import jax
import pytest

# A shell ignores Ctrl-C for jobs in the background, and the processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # all eight of them, before a command under test asks for fewer

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    """Let a run of other versions be a sample."""
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run every N-th test")


def pytest_collection_modifyitems(config, items):
    """Choose every N-th test; begin with the files that take longest, as a worker gets a file at a time."""
    items[:] = sorted(items[:: config.getoption("--one-in")], key=lambda item: "train" not in item.path.name)


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_kept():
    """Free what a file has compiled: gigabytes in the end, which make every collection of garbage slow."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Run a test with float64 switched on."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield
