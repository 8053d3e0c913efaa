"""srcip stitch: recordings of several nodes, joined to whole paths."""

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Any

import click

from tracer.clocks import Clocks, compare
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, fixed_views
from tracer.commands.output import Expectation, Writer, path_writer
from tracer.commands.run import Stop, stop_on_signals
from tracer.errors import RecordingError
from tracer.judge.join import WINDOW_NS
from tracer.judge.verdict import Summary
from tracer.recording import RecordingSource
from tracer.stitch import Stitcher

_NS = 1_000_000_000


class ClockOffset(click.ParamType[tuple[str, int]]):
    """A node and how many seconds to add to its times."""

    name = "clock offset"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Split at the last equals sign."""
        node, equals, text = str(value).rpartition("=")
        try:
            seconds = float(text)
        except ValueError:
            seconds = float("nan")
        # Ten years: no clock is so wrong that is looked at.
        if not (node and equals and abs(seconds) < 3e8):
            self.fail(f"{value!r} is no NODE=SECONDS", param, ctx)
        return node, round(seconds * _NS)


@click.command(short_help="Join recordings of several nodes to whole paths.")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=File)
)
@cluster_options
@options.filter_options
@click.option(
    "--window",
    type=click.FloatRange(min=0, max=3600),
    metavar="SECONDS",
    default=WINDOW_NS / _NS,
    show_default=True,
    help="How far apart two nodes may have seen one connection, after their clocks were corrected.",
)
@click.option(
    "--clock-offset",
    type=ClockOffset(),
    metavar="NODE=SECONDS",
    multiple=True,
    help="Add SECONDS to the times of NODE, which is then taken as right. May be given several"
    " times. Default: found out by the connections that crossed two nodes.",
)
@options.path_output_option
@options.explain_option
@options.count_option
@options.expect_option
def stitch(
    files: tuple[File, ...],
    window: float,
    clock_offset: tuple[tuple[str, int], ...],
    output: str,
    explain: bool,
    count: int | None,
    expect: str | None,
    **parameters: Any,
) -> None:
    """
    Join the recordings FILE... of several nodes, and show each connection's whole path.

    What one node sent on is what the next received. The recordings may come in any order, be longer
    than memory, miss nodes or have their ends cut off. Needs no root.

    \b
    Examples:
      srcip stitch node1.srcip node2.srcip --cluster objects.json
      srcip stitch *.srcip -o diagram --filter-service default/web --count 1
      srcip stitch *.srcip -o json | jq -c '[.orig.src, .seen_source, [.nodes[].node]]'
      srcip stitch node1.srcip node2.srcip --clock-offset node1=-2.5
    """
    wanted = options.wanted(parameters, has_strays=False)
    choice = ClusterChoice.of(parameters)
    expectation = Expectation.of(expect)
    # What lies within the window is looked through for garbage again and again: 40 % of the time.
    gc.set_threshold(100_000, 50, 100)
    with ExitStack() as stack:
        # All are opened first: what is no recording is told before anything is read.
        sources = [stack.enter_context(closing(RecordingSource(file))) for file in files]
        stitcher = Stitcher(sources, wanted, fixed_views(choice, {}), window_ns=round(window * _NS))
        out = path_writer(output, is_explaining=explain)
        with stop_on_signals() as stop:
            clocks = _clocks(files, sources, dict(clock_offset), stop)
            for source in sources:
                offset_ns = source.info.clock_offset_ns + clocks.of(source.info)
                source.info = replace(source.info, clock_offset_ns=offset_ns)
            _show(stitcher, out, expectation, count, stop)
        out.end(_summary(stitcher, clocks, stop))
    if stitcher.errors:
        raise stitcher.errors[0]
    sys.exit(expectation.exit_code())


def _clocks(
    files: Sequence[File], sources: Sequence[RecordingSource], known: Mapping[str, int], stop: Stop
) -> Clocks:
    """
    Compare the clocks, by what can be read twice.

    Raises:
        click.UsageError: If a node is not in the recordings.
    """
    nodes = {node for source in sources for node in source.info.nodes.values()}
    if strangers := sorted(known.keys() - nodes):
        raise click.UsageError(
            f"--clock-offset {strangers[0]}: no recording is of that node, they are of "
            f"{', '.join(sorted(nodes)) or 'none'}"
        )
    again = [
        (source.info, partial(_records, file, stop))
        for file, source in zip(files, sources, strict=True)
    ]
    clocks = compare(again, known)
    once = [file for file in files if not file.is_file()]
    notes = [f"{file} can be read only once: its clock was not compared" for file in once]
    return replace(clocks, notes=(*clocks.notes, *notes))


def _records(file: File, stop: Stop) -> Iterator[list[bytes]]:
    """Yield what is good of a recording; what is not is told when it is judged."""
    if not file.is_file():
        return
    with suppress(RecordingError), closing(RecordingSource(file)) as source:
        while not stop.is_set and (records := source.read(0)) is not None:
            yield records


def _show(
    stitcher: Stitcher, out: Writer, expectation: Expectation, count: int | None, stop: Stop
) -> None:
    shown = 0
    for paths in stitcher.paths():
        for path in paths:
            out.write(path)
            expectation.look_at(path)
            shown += 1
            if shown == count:
                return
        if stop.is_set:
            return


def _summary(stitcher: Stitcher, clocks: Clocks, stop: Stop) -> Summary:
    summary = stitcher.summary()
    notes = list(clocks.notes)
    if stitcher.told_twice:
        notes.append(f"{stitcher.told_twice} connections stood in two recordings of one node")
    if stop.is_set:
        notes.append("a signal ended this before the recordings were read to their ends")
    return replace(summary, notes=tuple(notes), clock_offsets_ns=clocks.offsets_ns)
