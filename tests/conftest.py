"""What tests share that takes seconds to make."""

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the folder of a finished run of `jbn train`, with the checkpoints of steps 5, 10, 15 and 18."""
    from tests.runs import options, steps_of, train  # here: without the packages of the command line others still run

    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(out, options())
    assert result.exit_code == 0, result.output
    assert steps_of(out / "checkpoints") == [5, 10, 15, 18]
    return out
