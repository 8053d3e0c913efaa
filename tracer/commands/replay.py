"""srcip replay: a recording judged again."""

import sys
from pathlib import Path

import click

from tracer.commands import options
from tracer.commands.output import Expectation, writer
from tracer.commands.run import run, stop_on_signals
from tracer.judge.verdict import Verdict
from tracer.model import IPNetwork
from tracer.pipeline import Pipeline, Wanted
from tracer.recording import RecordingSource


@click.command(short_help="Judge a recording again, without root.")
@click.argument("file", type=click.Path(path_type=Path))
@options.filter_options
@options.output_option
@options.count_option
@options.expect_option
def replay(
    file: Path,
    filter_client: IPNetwork | None,
    filter_backend: IPNetwork | None,
    filter_port: int | None,
    filter_proto: str | None,
    filter_verdict: tuple[str, ...],
    output: str,
    count: int | None,
    expect: str | None,
) -> None:
    """
    Judge the recording FILE again, as 'srcip trace --record FILE' saw it.

    Needs neither root nor BPF nor the machine that it was made on.

    \b
    Examples:
      srcip replay night.srcip --filter-verdict dropped
      srcip replay night.srcip -o json | jq -r .seen_source
    """
    flows = options.flow_filter(filter_client, filter_backend, filter_port, filter_proto)
    wanted = Wanted(
        flows=flows,
        verdicts=frozenset(map(Verdict, filter_verdict)),
        are_stray_accepts=output == "json" and flows.is_empty and not filter_verdict,
    )
    expectation = Expectation(Verdict(expect) if expect else None)
    source = RecordingSource(file)
    out = writer(output)
    pipeline = Pipeline(source, wanted)
    try:
        with stop_on_signals() as stop:
            run(source, pipeline, out, expectation, count=count, stop=stop)
        out.end(pipeline.summary())
    finally:
        source.close()
    sys.exit(expectation.exit_code())
