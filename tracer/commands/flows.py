"""srcip flows: the connections that conntrack already holds, judged."""

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, live_views
from tracer.commands.output import Expectation, writer
from tracer.commands.run import run_and_sum_up, stop_on_signals
from tracer.commands.services import warn_of_unknown
from tracer.kernel.conntrack import DumpSource
from tracer.kernel.source import clock_offset_ns
from tracer.pipeline import Pipeline
from tracer.recording import Recorder


@click.command(short_help="Show the connections that conntrack holds now.")
@options.where_options
@cluster_options
@options.filter_options
@options.output_option
@options.explain_option
@options.record_option
@options.count_option
@options.expect_option
def flows(
    output: str,
    explain: bool,
    record: Path | None,
    count: int | None,
    expect: str | None,
    **parameters: Any,
) -> None:
    """
    Show the connections that conntrack holds now, and exit.

    Reads conntrack as 'conntrack -L' does and needs no BPF. Entries hold neither the packet's mark
    nor their creation time: the time shown is when the entry was read. Needs CAP_NET_ADMIN.

    \b
    Examples:
      srcip flows --filter-port 443
      srcip flows --filter-verdict replaced -o json | jq -r .client.address | sort | uniq -c
    """
    wanted = options.wanted(parameters, has_strays=False)
    choice = ClusterChoice.of(parameters)
    expectation = Expectation.of(expect)
    namespaces = options.namespaces(parameters)
    with ExitStack() as stack:
        views = stack.enter_context(live_views(choice, namespaces, is_recorded=record is not None))
        warn_of_unknown(wanted.services, views.cluster())
        source = stack.enter_context(closing(DumpSource(namespaces, clock_offset_ns())))
        recorder = (
            stack.enter_context(
                closing(Recorder(record, source, views.places(), views.packed_rules))
            )
            if record
            else None
        )
        pipeline = Pipeline(source, wanted, views)
        out = writer(output, is_explaining=explain)
        with stop_on_signals() as stop:
            run_and_sum_up(
                source, pipeline, out, expectation, recorder=recorder, count=count, stop=stop
            )
    sys.exit(expectation.exit_code())
