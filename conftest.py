"""Settings for every test and doctest: eight simulated devices, no silent broadcasting, a fixed hypothesis profile."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "0"  # whatever the shell says: literals are float32, but for tests that ask for float64

import hypothesis
import jax
import pytest

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
