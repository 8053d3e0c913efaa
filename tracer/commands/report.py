"""srcip report: a page of what recordings hold, to hand on."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import click

from exporters.report import Report
from exporters.text import summary_text
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, fixed_views
from tracer.commands.run import Stop, stop_on_signals
from tracer.errors import RecordingError, TracerError
from tracer.judge.path import Path
from tracer.judge.verdict import Summary
from tracer.paths import PathPipeline
from tracer.pipeline import Wanted
from tracer.recording import RecordingSource


@click.command(short_help="Make a page of recordings, to hand on.")
@click.argument(
    "recordings",
    metavar="RECORDING...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=File),
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=File),
    metavar="FILE",
    help="The page to write: HTML that needs nothing else.",
)
@cluster_options
@options.filter_options
def report(recordings: tuple[File, ...], output: File, **parameters: Any) -> None:
    """
    Write a page of the RECORDINGs: totals, a table with search, a picture of each kind of path.

    The page is one file. It fetches nothing, so it can be opened anywhere. Needs no root.

    \b
    Examples:
      srcip report night.srcip -o report.html
      srcip report node1.srcip node2.srcip -o report.html --cluster objects.json
    """
    wanted = options.wanted(parameters, has_strays=False)
    choice = ClusterChoice.of(parameters)
    _refuse_to_overwrite(output, recordings)
    page, reading = Report(), _Reading(choice, wanted)
    with stop_on_signals() as stop:
        for path in reading.paths(recordings, stop):
            page.add(path)
    summary = reading.summary()
    _write(output, page.page(summary, [file.name for file in recordings]))
    for line in summary_text(summary):
        click.echo(line, err=True)
    if reading.error is not None:
        raise reading.error


class _Reading:
    """Reads recordings one after the other, as far as each is readable."""

    def __init__(self, choice: ClusterChoice, wanted: Wanted) -> None:
        self._views = fixed_views(choice, {})
        self._wanted = wanted
        self._summaries: list[Summary] = []
        self._notes: list[str] = []
        self.error: RecordingError | None = None

    def paths(self, recordings: tuple[File, ...], stop: Stop) -> Iterator[Path]:
        """Yield what they hold."""
        with ExitStack() as stack:
            # All are opened first: what is no recording is told before anything is read.
            sources = [stack.enter_context(closing(RecordingSource(file))) for file in recordings]
            for source in sources:
                yield from self._paths_of(source, stop)
        if stop.is_set:
            self._notes.append("what came after the signal that ended this report")

    def _paths_of(self, source: RecordingSource, stop: Stop) -> Iterator[Path]:
        views = replace(self._views, places=source.places)
        pipeline = PathPipeline(source, self._wanted, views, cluster=lambda: views.cluster)
        try:
            while not stop.is_set and (records := source.read(0)) is not None:
                yield from pipeline.judge(records)
        except RecordingError as error:
            self.error = error
            self._notes.append(str(error))
        yield from pipeline.rest()
        self._summaries.append(pipeline.summary())

    def summary(self) -> Summary:
        """Add up what was seen and lost."""
        lost: Counter[str] = Counter()
        for each in self._summaries:
            lost.update(each.lost)
        not_seen = [line for each in self._summaries for line in each.not_seen]
        return Summary(
            connections=sum(each.connections for each in self._summaries),
            drops=sum(each.drops for each in self._summaries),
            lost=lost,
            not_seen=tuple(dict.fromkeys([*self._notes, *not_seen])),
        )


def _refuse_to_overwrite(output: File, recordings: tuple[File, ...]) -> None:
    if any(output.exists() and file.exists() and output.samefile(file) for file in recordings):
        raise click.UsageError(f"{output} is one of the recordings: name another file with -o")


def _write(output: File, parts: Iterator[str]) -> None:
    try:
        with output.open("w", encoding="utf-8") as stream:
            stream.writelines(parts)
    except OSError as error:
        raise TracerError(f"cannot write {output}: {error.strerror}") from error
