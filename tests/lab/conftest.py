"""What the tests of the command line rely on, whoever runs them."""

import signal

import pytest

from jbn.lab.signals import NAMES

HEARD = {"SIGINT": signal.default_int_handler}


@pytest.fixture(autouse=True)
def _heard():
    """Let signals be heard: what ``nohup`` or a script ignores, its children ignore too, and these tests send it."""
    ignored = [number for name in NAMES if signal.getsignal(number := getattr(signal, name)) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, HEARD.get(number.name, signal.SIG_DFL))
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
