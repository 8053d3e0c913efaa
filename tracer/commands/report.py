"""srcip report: write what recordings hold as one HTML page."""

from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import click

from exporters.report import Report
from exporters.text import summary_text
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, fixed_views, recording_cluster_options
from tracer.commands.joined import joined
from tracer.commands.run import stop_on_signals
from tracer.commands.services import warn_of_unknown
from tracer.errors import TracerError
from tracer.model import IPNetwork


@click.command(short_help="Write recordings as one HTML page, to hand on.")
@click.argument(
    "recordings",
    metavar="RECORDING...",
    nargs=-1,
    required=True,
    type=click.Path(readable=False, path_type=File),
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=File),
    metavar="FILE",
    help="The HTML page to write; it needs no other file.",
)
@recording_cluster_options
@options.filter_options
@options.trusted_proxy_option
def report(
    recordings: tuple[File, ...],
    output: File,
    trusted_proxy: tuple[IPNetwork, ...],
    **parameters: Any,
) -> None:
    """
    Write an HTML page of the RECORDINGs: totals, a searchable table, a picture per kind of path.

    The page is one file that loads nothing else, so it can be opened anywhere. Needs no root.

    \b
    Examples:
      srcip report night.srcip -o report.html
      srcip report node1.srcip node2.srcip -o report.html --cluster objects.json
    """
    wanted = options.wanted(parameters, has_strays=False)
    choice = ClusterChoice.of(parameters)
    _refuse_to_overwrite(output, recordings)
    page = Report()
    views = fixed_views(choice, {})
    warn_of_unknown(wanted.services, views.cluster)
    with (
        stop_on_signals() as stop,
        joined(recordings, wanted, views, stop, trusted=trusted_proxy) as reading,
    ):
        for path in reading.paths():
            page.add(path)
        summary = reading.summary()
    _write(output, page.page(summary, [file.name for file in recordings]))
    for line in summary_text(summary):
        click.echo(line, err=True)
    if reading.error is not None:
        raise reading.error


def _refuse_to_overwrite(output: File, recordings: tuple[File, ...]) -> None:
    if any(output.exists() and file.exists() and output.samefile(file) for file in recordings):
        raise click.UsageError(f"{output} is one of the recordings: name another file with -o")


def _write(output: File, parts: Iterator[str]) -> None:
    try:
        with output.open("w", encoding="utf-8") as stream:
            stream.writelines(parts)
    except OSError as error:
        raise TracerError(f"cannot write {output}: {error.strerror}") from error
