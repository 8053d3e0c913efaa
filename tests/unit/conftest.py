"""Fixtures that several modules use."""

import signal
import sys

import pytest

from tracer import cli


@pytest.fixture
def srcip(monkeypatch, capsys):
    """Run the command line in this process; return its exit code and what it printed."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["srcip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    yield run
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
