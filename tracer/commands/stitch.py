"""srcip stitch: recordings of several nodes, joined to whole paths."""

import sys
from itertools import islice
from pathlib import Path as File
from typing import Any

import click

from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, fixed_views
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
        # Ten years: no clock is so wrong that is looked at.
        if not (node and equals and abs(seconds) < 3e8):
            self.fail(f"{value!r} is no NODE=SECONDS", param, ctx)
        return node, round(seconds * _NS)


@click.command(short_help="Join recordings of several nodes to whole paths.")
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(readable=False, path_type=File),
)
@cluster_options
@options.filter_options
@options.trusted_proxy_option
@click.option(
    "--window",
    type=Seconds(most=3600),
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

    What one node sent on is what the next received. The recordings may come in any order, be longer
    than memory, miss nodes or have their ends cut off. Needs no root.

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
