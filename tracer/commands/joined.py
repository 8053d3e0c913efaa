"""Several recordings read as one: opened, their clocks compared, joined into paths."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path as File

import click

from tracer.clocks import Clocks, compare
from tracer.commands.run import Stop
from tracer.errors import RecordingError
from tracer.judge.join import WINDOW_NS
from tracer.judge.path import Path
from tracer.judge.verdict import Summary, Verdict
from tracer.model import IPNetwork
from tracer.pipeline import Wanted
from tracer.proxies import Proxies
from tracer.recording import RecordingSource
from tracer.stitch import Stitcher
from tracer.views import FixedViews

_ENDED = "what the recordings hold after the point where a signal stopped srcip"


class Joined:
    """The paths of several recordings, and their summary."""

    def __init__(self, stitcher: Stitcher, clocks: Clocks, stop: Stop) -> None:
        self._stitcher = stitcher
        self._clocks = clocks
        self._stop = stop
        self._connections = self._drops = 0

    def paths(self) -> Iterator[Path]:
        """Yield the paths in order of time, until the recordings or a signal end it."""
        for paths in self._stitcher.paths():
            for path in paths:
                if path.verdict is Verdict.DROPPED:
                    self._drops += 1
                else:
                    self._connections += 1
                yield path
            if self._stop.is_set:
                return

    @property
    def error(self) -> RecordingError | None:
        """The error of the first recording that is truncated or damaged."""
        return next(iter(self._stitcher.errors), None)

    def summary(self) -> Summary:
        """Add up what was shown, lost and corrected."""
        summary = self._stitcher.summary()
        notes = list(self._clocks.notes)
        if self._stitcher.told_twice:
            notes.append(
                f"{self._stitcher.told_twice} connections were in two recordings of one node"
            )
        return replace(
            summary,
            connections=self._connections,
            drops=self._drops,
            not_seen=(*([_ENDED] if self._stop.is_set else []), *summary.not_seen),
            notes=tuple(notes),
            clock_offsets_ns=self._clocks.offsets_ns,
        )


@contextmanager
def joined(
    files: Sequence[File],
    wanted: Wanted,
    views: FixedViews,
    stop: Stop,
    *,
    window_ns: int = WINDOW_NS,
    known_ns: Mapping[str, int] | None = None,
    trusted: Sequence[IPNetwork] = (),
) -> Iterator[Joined]:
    """
    Open recordings and compare their clocks.

    Args:
        files: The recordings.
        wanted: Which paths to show.
        views: The cluster's objects.
        stop: Ends the reading.
        window_ns: How far the times of two nodes may lie apart.
        known_ns: Clock offsets that the user gave, by node.
        trusted: The proxies whose headers are trusted.

    Raises:
        RecordingError: If a file is not a recording.
        click.UsageError: If ``known_ns`` names a node that no recording is of.
    """
    with ExitStack() as stack:
        # The garbage collector would scan what the window holds again and again, for 40 % of the
        # run time. Reference counting frees nearly all of it.
        stack.callback(gc.set_threshold, *gc.get_threshold())
        gc.set_threshold(500_000, 10, 10)
        # Open all of them first, so that a file that is not a recording fails before any output.
        sources = [stack.enter_context(closing(RecordingSource(file))) for file in files]
        clocks = _clocks(files, sources, known_ns or {}, stop)
        for source in sources:
            offset_ns = source.info.clock_offset_ns + clocks.of(source.info)
            source.info = replace(source.info, clock_offset_ns=offset_ns)
        stitcher = Stitcher(sources, wanted, views, window_ns=window_ns, proxies=Proxies(trusted))
        yield Joined(stitcher, clocks, stop)


def _clocks(
    files: Sequence[File],
    sources: Sequence[RecordingSource],
    known_ns: Mapping[str, int],
    stop: Stop,
) -> Clocks:
    """Compare the clocks, of the recordings that can be read twice."""
    nodes = {node for source in sources for node in source.info.nodes.values()}
    if strangers := sorted(known_ns.keys() - nodes):
        raise click.UsageError(
            f"--clock-offset {strangers[0]}: no recording is of that node; they are of "
            f"{', '.join(sorted(nodes)) or 'none'}"
        )
    once = [file for file in files if not file.is_file()]
    again = [
        # With one recording there is nothing to compare.
        (source.info, partial(_records, file, stop) if len(files) > 1 else lambda: ())
        for file, source in zip(files, sources, strict=True)
    ]
    clocks = compare(again, known_ns)
    notes = [f"{file} can be read only once: its clock was not compared" for file in once]
    return replace(clocks, notes=(*clocks.notes, *(notes if len(files) > 1 else ())))


def _records(file: File, stop: Stop) -> Iterator[list[bytes]]:
    """Yield what can be read of a recording; the judging pass reports any error."""
    if not file.is_file():
        return
    with suppress(RecordingError), closing(RecordingSource(file)) as source:
        while not stop.is_set and (records := source.read(0)) is not None:
            yield records
