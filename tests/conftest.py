"""What tests share that takes seconds to make, or must be undone."""

import os

import jax
import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the folder of a finished run of `jbn train`, with the checkpoints of steps 5, 10, 15 and 18."""
    from tests.support.runs import (  # here: without the packages of the command line others still run
        options,
        steps_of,
        train,
    )

    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(out, options())
    assert result.exit_code == 0, result.output
    assert steps_of(out / "checkpoints") == [5, 10, 15, 18]
    return out


@pytest.fixture(scope="module")
def smooth():
    """Replace ReLU: at its kink a rounding error decides whether there is a gradient, and is one no more."""
    from flax import linen, nnx

    with pytest.MonkeyPatch.context() as patch:
        for library in (linen, nnx):
            patch.setattr(library, "relu", linen.silu)
        jax.clear_caches()  # what was compiled for the same network holds ReLU
        yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def keras():
    """Return Keras on JAX, which it asks for while it is imported."""
    if os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
        pytest.skip("KERAS_BACKEND is not jax")
    return pytest.importorskip("keras")


@pytest.fixture
def foreign():
    """Let the code of other libraries promote ranks, as it does where nothing is strict."""
    with jax.numpy_rank_promotion("allow"):
        yield
