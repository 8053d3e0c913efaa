"""The loop that trace, flows and replay share: read, record, judge and write."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from tracer.commands.output import Expectation, Writer
from tracer.errors import RecordingError
from tracer.judge.path import Path
from tracer.judge.verdict import Judged, SeenAccept, SeenHop, Summary
from tracer.recording import Recorder

# How long an idle reader sleeps: the delay of a Ctrl-C, and of a record written without a wake-up.
_POLL_S = 0.1


class Stop:
    """Whether a signal asked srcip to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Ask to stop; also usable as a signal handler."""
        self.is_set = True


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """
    Turn Ctrl-C, SIGTERM and SIGHUP into an orderly end: recording closed, summary printed.

    SIGHUP stays ignored under nohup(1).
    """
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, stop.set) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Reads(Protocol):
    """Where records come from: a source, or an agent."""

    def read(self, timeout_s: float) -> list[bytes] | None:
        """Return the next records; an empty list on a time-out, None at the end."""


class Judges(Protocol):
    """Turns records into judged things or paths, and sums them up."""

    def judge(self, records: Iterable[bytes]) -> Iterator[Judged | Path]:
        """Yield what is wanted."""

    def rest(self) -> Iterator[Judged | Path]:
        """Yield what was held back until the end."""

    def summary(self) -> Summary:
        """Sum up the run."""


def run_and_sum_up(
    source: Reads,
    pipeline: Judges,
    writer: Writer,
    expectation: Expectation,
    *,
    recorder: Recorder | None = None,
    count: int | None = None,
    timeout_s: float | None = None,
    stop: Stop | None = None,
) -> None:
    """
    Call `run`, then write the summary, even after a `RecordingError`.

    Raises:
        RecordingError: As `run` does, after the summary.
    """
    failure: RecordingError | None = None
    try:
        run(
            source,
            pipeline,
            writer,
            expectation,
            recorder=recorder,
            count=count,
            timeout_s=timeout_s,
            stop=stop,
        )
    except RecordingError as error:
        failure = error
    writer.end(pipeline.summary())
    if failure is not None:
        raise failure


def run(
    source: Reads,
    pipeline: Judges,
    writer: Writer,
    expectation: Expectation,
    *,
    recorder: Recorder | None = None,
    count: int | None = None,
    timeout_s: float | None = None,
    stop: Stop | None = None,
) -> None:
    """
    Show what a source delivers until it ends, ``count`` is reached, time is up, or ``stop`` is set.

    Args:
        source: Where records come from. The caller closes it.
        pipeline: Judges them.
        writer: Where the results go.
        expectation: Checked against each result.
        recorder: Keeps the raw records, if any.
        count: Connections and drops, or paths, to show at most.
        timeout_s: How long to run.
        stop: Checked between batches.

    Raises:
        RecordingError: If records cannot be read or written; those already read are shown first.
    """
    is_over = _clock(timeout_s)
    left = count
    is_last = False
    failure: RecordingError | None = None
    while not is_last and left != 0 and failure is None:
        # Read once more: what happened before the stop may still be in the buffers.
        is_last = (stop is not None and stop.is_set) or is_over()
        try:
            records = source.read(0 if is_last else _POLL_S)
        except RecordingError as error:
            failure = error
            break
        if records is None:
            break
        failure = _keep(recorder, records)
        left = _show(pipeline.judge(records), writer, expectation, left)
    if left != 0:
        _show(pipeline.rest(), writer, expectation, left)
    if failure is not None:
        raise failure


def _keep(recorder: Recorder | None, records: Sequence[bytes]) -> RecordingError | None:
    try:
        if recorder is not None:
            recorder.write(records)
    except RecordingError as error:
        return error
    return None


def _show(
    found: Iterable[Judged | Path], writer: Writer, expectation: Expectation, left: int | None
) -> int | None:
    """Write a batch; return how many connections, drops or paths are left to show."""
    for judged in found:
        writer.write(judged)
        expectation.look_at(judged)
        if left is not None and not isinstance(judged, SeenAccept | SeenHop):
            left -= 1
            if left == 0:
                break
    return left


def _clock(timeout_s: float | None) -> Callable[[], bool]:
    if timeout_s is None:
        return lambda: False
    end = time.monotonic() + timeout_s
    return lambda: time.monotonic() >= end
