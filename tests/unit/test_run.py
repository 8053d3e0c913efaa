"""The loop that the commands share."""

import os
import signal
from pathlib import Path

import pytest

from tests.unit import samples
from tests.unit.fake_source import FakeSource
from tracer.commands.output import Expectation
from tracer.commands.run import run_and_sum_up, stop_on_signals
from tracer.errors import RecordingError
from tracer.pipeline import Pipeline
from tracer.recording import Recorder

REPLACED = samples.connection_bytes(samples.connection(*samples.REPLACED))


class Shown:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.judged = []
        self.summary = None

    def write(self, judged):
        assert self.summary is None
        self.judged.append(judged)

    def end(self, summary):
        self.summary = summary


@pytest.mark.parametrize("count", [None, 1])
def test_full_disk(tmp_path, count):
    """What a full disk does not take is shown, and summed up, and then the error ends the run."""
    source = FakeSource([[REPLACED], [REPLACED]], samples.INFO)
    recorder = Recorder(tmp_path / "full", source)
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), recorder._stream.fileno())
    shown = Shown()
    with pytest.raises(RecordingError, match="No space left on device"):
        run_and_sum_up(
            source, Pipeline(source), shown, Expectation.of(None), recorder=recorder, count=count
        )
    assert len(shown.judged) == 1
    assert shown.summary.connections == 1


@pytest.mark.parametrize(("before", "is_over"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_hangup(before, is_over):
    """A terminal that closes ends the run in order, unless nohup(1) keeps that away from it."""
    former = signal.signal(signal.SIGHUP, before)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.is_set is is_over
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, former)
