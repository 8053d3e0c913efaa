"""srcip trace: every new connection and drop, judged as it happens."""

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from exporters.terminal import printable
from tracer.commands import options
from tracer.commands.output import Expectation, writer
from tracer.commands.run import run, stop_on_signals
from tracer.errors import TracerError
from tracer.judge.verdict import Verdict
from tracer.kernel import privileges, sources
from tracer.model import IPNetwork
from tracer.pipeline import Pipeline, Wanted
from tracer.recording import Recorder


@click.command(short_help="Show new connections and drops as they happen.")
@options.where_options
@options.filter_options
@options.output_option
@options.record_option
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Make FILE once everything is attached, for scripts that wait for it.",
)
@options.count_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop after so many seconds.",
)
@options.expect_option
def trace(
    netns_specs: tuple[str, ...],
    node_name: str | None,
    filter_client: IPNetwork | None,
    filter_backend: IPNetwork | None,
    filter_port: int | None,
    filter_proto: str | None,
    filter_verdict: tuple[str, ...],
    output: str,
    record: Path | None,
    ready_file: Path | None,
    count: int | None,
    timeout: float | None,
    expect: str | None,
) -> None:
    """
    Show every new connection and every dropped packet of this node, until Ctrl-C.

    Each connection is one row: the client, what it addressed, the backend that answers, and the
    source address that the backend sees. Needs root while it starts; drops it once attached.

    \b
    Examples:
      srcip trace                                   everything on this node
      srcip trace --filter-port 30080               one NodePort
      srcip trace --netns 4711                      the namespace of process 4711
      srcip trace --filter-client 198.51.100.0/24 --expect preserved --count 1 --timeout 30
      srcip trace -o json | jq -r .seen_source      for programs
    """
    flows = options.flow_filter(filter_client, filter_backend, filter_port, filter_proto)
    wanted = Wanted(
        flows=flows,
        verdicts=frozenset(map(Verdict, filter_verdict)),
        are_stray_accepts=output == "json" and flows.is_empty and not filter_verdict,
    )
    expectation = Expectation(Verdict(expect) if expect else None)
    source = sources.live(options.namespaces(netns_specs, node_name), flows)
    recorder: Recorder | None = None
    try:
        recorder = Recorder(record, source) if record else None
        out = writer(output)
        pipeline = Pipeline(source, wanted)
        with stop_on_signals() as stop:
            if ready_file:
                _make(ready_file)
            privileges.drop()
            click.echo(f"tracing {_names(source.info.nodes.values())}; Ctrl-C ends", err=True)
            run(
                source,
                pipeline,
                out,
                expectation,
                recorder=recorder,
                count=count,
                timeout_s=timeout,
                stop=stop,
            )
            out.end(pipeline.summary())
    finally:
        if recorder:
            recorder.close()
        source.close()
    sys.exit(expectation.exit_code())


def _make(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise TracerError(f"cannot make the ready file {path}: {error.strerror}") from error


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(printable(node) for node in nodes)
