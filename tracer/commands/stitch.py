"""srcip stitch: join recordings of several nodes into whole paths."""

import sys
from itertools import islice
from pathlib import Path as File
from typing import Any

import click

from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, fixed_views, recording_cluster_options
from tracer.commands.joined import joined
from tracer.commands.output import Expectation, path_writer
from tracer.commands.run import stop_on_signals
from tracer.commands.services import warn_of_unknown
from tracer.commands.sinks import path_sinks, sink_options
from tracer.commands.values import Seconds
from tracer.judge.join import WINDOW_NS
from tracer.model import IPNetwork

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
        # Ten years: no real clock is off by more.
        if not (node and equals and abs(seconds) < 3e8):
            self.fail(f"{value!r} is not NODE=SECONDS, such as node1=-2.5", param, ctx)
        return node, round(seconds * _NS)


@click.command(short_help="Join recordings of several nodes into whole paths.")
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(readable=False, path_type=File),
)
@recording_cluster_options
@options.filter_options
@options.trusted_proxy_option
@click.option(
    "--window",
    type=Seconds(most=3600),
    metavar="SECONDS",
    default=WINDOW_NS / _NS,
    show_default=True,
    help="How far apart in time two nodes may have seen one connection, after srcip corrected their"
    " clocks.",
)
@click.option(
    "--clock-offset",
    type=ClockOffset(),
    metavar="NODE=SECONDS",
    multiple=True,
    help="Add SECONDS to the times of NODE, and take its clock as right. May be given several"
    " times. Default: measured by the connections that crossed two nodes.",
)
@options.path_output_option
@options.explain_option
@options.count_option
@options.expect_option
@sink_options
def stitch(
    files: tuple[File, ...],
    trusted_proxy: tuple[IPNetwork, ...],
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

    A path is found by what one node sent and the next received. The recordings may be given in any
    order, be larger than memory, lack a node or be truncated. Needs no root.

    \b
    Examples:
      srcip stitch node1.srcip node2.srcip --cluster objects.json
      srcip stitch *.srcip --cluster objects.json -o diagram --filter-service default/web --count 1
      srcip stitch *.srcip -o json | jq -c '[.orig.src, .seen_source, [.nodes[].node]]'
      srcip stitch node1.srcip node2.srcip --clock-offset node1=-2.5
    """
    wanted = options.wanted(parameters, has_strays=False)
    choice = ClusterChoice.of(parameters)
    expectation = Expectation.of(expect)
    views = fixed_views(choice, {})
    warn_of_unknown(wanted.services, views.cluster)
    with path_sinks(parameters) as sinks, stop_on_signals() as stop:
        out = sinks.beside(path_writer(output, is_explaining=explain))
        with joined(
            files,
            wanted,
            views,
            stop,
            window_ns=round(window * _NS),
            known_ns=dict(clock_offset),
            trusted=trusted_proxy,
        ) as recordings:
            sinks.start()
            for path in islice(recordings.paths(), count):
                out.write(path)
                expectation.look_at(path)
            out.end(recordings.summary())
    if recordings.error is not None:
        raise recordings.error
    sys.exit(expectation.exit_code())
