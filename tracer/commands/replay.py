"""srcip replay: judge a recording again."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, fixed_views, recording_cluster_options
from tracer.commands.output import Expectation, writer
from tracer.commands.run import run_and_sum_up, stop_on_signals
from tracer.commands.services import warn_of_unknown
from tracer.model import IPNetwork
from tracer.paths import PathPipeline
from tracer.pipeline import Pipeline
from tracer.proxies import Proxies
from tracer.recording import RecordingSource


@click.command(short_help="Judge a recording again, without root.")
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@recording_cluster_options
@options.filter_options
@options.trusted_proxy_option
@options.path_output_option
@click.option(
    "--paths",
    is_flag=True,
    help="With -o json: print a line per path instead of one per connection.",
)
@options.explain_option
@options.count_option
@options.expect_option
def replay(
    file: Path,
    trusted_proxy: tuple[IPNetwork, ...],
    output: str,
    paths: bool,
    explain: bool,
    count: int | None,
    expect: str | None,
    **parameters: Any,
) -> None:
    """
    Judge the connections and drops in FILE again, as 'srcip trace --record FILE' wrote it.

    Needs neither root nor BPF, and runs on any machine.

    \b
    Examples:
      srcip replay night.srcip --filter-verdict dropped
      srcip replay night.srcip --cluster objects.json -o diagram --filter-service default/web
      srcip replay night.srcip -o json | jq -r .seen_source
    """
    wanted = options.wanted(parameters, has_strays=output == "json")
    choice = ClusterChoice.of(parameters)
    expectation = Expectation.of(expect)
    with closing(RecordingSource(file)) as source:
        views = fixed_views(choice, source.places)
        warn_of_unknown(wanted.services, views.cluster)
        pipeline = (PathPipeline if paths or output == "diagram" else Pipeline)(
            source, wanted, views, proxies=Proxies(trusted_proxy)
        )
        out = writer(output, is_explaining=explain)
        with stop_on_signals() as stop:
            run_and_sum_up(source, pipeline, out, expectation, count=count, stop=stop)
    sys.exit(expectation.exit_code())
