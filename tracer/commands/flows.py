"""srcip flows: the connections that conntrack already holds, judged."""

import sys
from pathlib import Path

import click

from tracer.commands import options
from tracer.commands.output import Expectation, writer
from tracer.commands.run import run, stop_on_signals
from tracer.judge.verdict import Verdict
from tracer.kernel.conntrack import DumpSource
from tracer.kernel.source import clock_offset_ns
from tracer.model import IPNetwork
from tracer.pipeline import Pipeline, Wanted
from tracer.recording import Recorder


@click.command(short_help="Show the connections that conntrack holds now.")
@options.where_options
@options.filter_options
@options.output_option
@options.record_option
@options.count_option
@options.expect_option
def flows(
    netns_specs: tuple[str, ...],
    node_name: str | None,
    filter_client: IPNetwork | None,
    filter_backend: IPNetwork | None,
    filter_port: int | None,
    filter_proto: str | None,
    filter_verdict: tuple[str, ...],
    output: str,
    record: Path | None,
    count: int | None,
    expect: str | None,
) -> None:
    """
    Show the connections that conntrack holds now, and end.

    Reads conntrack as 'conntrack -L' does and needs no BPF. Entries carry neither the packet's
    mark nor the time they were made: the time shown is that of reading. Needs CAP_NET_ADMIN.

    \b
    Examples:
      srcip flows --filter-port 443
      srcip flows --filter-verdict replaced -o json | jq -r .client.address | sort | uniq -c
    """
    wanted = Wanted(
        flows=options.flow_filter(filter_client, filter_backend, filter_port, filter_proto),
        verdicts=frozenset(map(Verdict, filter_verdict)),
    )
    expectation = Expectation(Verdict(expect) if expect else None)
    source = DumpSource(options.namespaces(netns_specs, node_name), clock_offset_ns())
    out = writer(output)
    pipeline = Pipeline(source, wanted)
    recorder = Recorder(record, source) if record else None
    try:
        with stop_on_signals() as stop:
            run(source, pipeline, out, expectation, recorder=recorder, count=count, stop=stop)
        out.end(pipeline.summary())
    finally:
        if recorder:
            recorder.close()
        source.close()
    sys.exit(expectation.exit_code())
