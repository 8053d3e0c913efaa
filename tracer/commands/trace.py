"""srcip trace: every new connection and drop, judged as it happens."""

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from exporters.terminal import printable
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, live_views
from tracer.commands.output import Expectation, writer
from tracer.commands.run import run_and_sum_up, stop_on_signals
from tracer.commands.services import warn_of_unknown
from tracer.commands.sinks import path_sinks, sink_options
from tracer.commands.through_agent import (
    agent_at,
    agent_options,
    refuse_what_is_for_an_agent,
    through_agent,
)
from tracer.commands.values import Seconds
from tracer.kernel import privileges, sources
from tracer.kernel.source import KernelSource
from tracer.model import IPNetwork
from tracer.paths import live_paths
from tracer.pipeline import Pipeline
from tracer.proxies import Proxies
from tracer.recording import Recorder
from tracer.stream.protocol import DEFAULT_SOCKET


@click.command(short_help="Show new connections and drops as they happen.")
@click.option(
    "--agent",
    is_flag=False,
    flag_value=DEFAULT_SOCKET,
    metavar="[PATH|URL]",
    help="Show what a running 'srcip serve' sees, without root: through the Unix socket PATH, or at"
    f" https://HOST:PORT with a bearer token. Without a value: {DEFAULT_SOCKET}.",
)
@agent_options
@options.where_options
@cluster_options
@options.filter_options
@click.option(
    "--read-proxy-headers",
    is_flag=True,
    help="Read the client addresses that proxies declare in the first bytes of TCP connections:"
    " PROXY protocol, X-Forwarded-For, Forwarded. Nothing else of those bytes is kept.",
)
@options.trusted_proxy_option
@options.path_output_option
@options.packets_option
@sink_options
@options.rung_option
@options.explain_option
@options.record_option
@options.ready_option
@options.count_option
@click.option(
    "--timeout",
    type=Seconds(),
    metavar="SECONDS",
    help="Stop after SECONDS. Default: run until Ctrl-C.",
)
@options.expect_option
def trace(
    agent: str | None,
    read_proxy_headers: bool,
    trusted_proxy: tuple[IPNetwork, ...],
    output: str,
    packets: int | None,
    rung: str | None,
    explain: bool,
    record: Path | None,
    ready_file: Path | None,
    count: int | None,
    timeout: float | None,
    expect: str | None,
    **parameters: Any,
) -> None:
    """
    Show every new connection and dropped packet of this node, until Ctrl-C.

    Each connection is one row: the client, the address it connected to, the backend that answers,
    and the source address that the backend sees. Needs root while it starts; drops it once
    attached.

    \b
    Examples:
      srcip trace                                   everything on this node
      srcip trace --filter-service default/web      one Service
      srcip trace --count 1 --explain               one connection, with all reasons
      srcip trace --netns 4711                      the namespace of process 4711
      srcip trace --agent                           through the node's agent, without root
      srcip trace --agent https://node2:9464 --token-file token --ca-file ca.crt
      srcip trace --filter-client 198.51.100.0/24 --expect preserved --count 1 --timeout 30
      srcip trace -o diagram --filter-port 443 --count 1   the path of one, hop by hop
      srcip trace --packets 1 --otlp http://collector:4318   each connection as a trace
      srcip trace --read-proxy-headers --trusted-proxy 10.0.0.0/24
      srcip trace -o json | jq -r 'select(.kind == "connection").seen_source'
    """
    wanted = options.wanted(parameters, has_strays=output == "json")
    if agent is not None:
        if output == "diagram":
            raise click.UsageError(
                "-o diagram cannot be combined with --agent: an agent records no hops"
            )
        through_agent(
            agent_at(agent, parameters),
            wanted,
            writer(output, is_explaining=explain),
            Expectation.of(expect),
            ready_file=ready_file,
            count=count,
            timeout_s=timeout,
        )
    if trusted_proxy and not read_proxy_headers:
        raise click.UsageError("--trusted-proxy needs --read-proxy-headers")
    refuse_what_is_for_an_agent()
    choice = ClusterChoice.of(parameters)
    expectation = Expectation.of(expect)
    namespaces = options.namespaces(parameters)
    is_drawn = output == "diagram" or parameters["diagram_file"] is not None
    watched = packets or (1 if is_drawn else 0)
    privileges.require_for_tracing()
    with ExitStack() as stack:
        views = stack.enter_context(live_views(choice, namespaces, is_recorded=record is not None))
        warn_of_unknown(wanted.services, views.cluster())
        source = stack.enter_context(
            closing(
                sources.live(
                    namespaces,
                    wanted.flows,
                    packets=watched,
                    has_proxy_headers=read_proxy_headers,
                    asked=options.rung_of(rung),
                )
            )
        )
        recorder = (
            stack.enter_context(
                closing(Recorder(record, source, views.places(), views.packed_rules))
            )
            if record
            else None
        )
        # After everything that forks: gRPC starts threads.
        sinks = stack.enter_context(path_sinks(parameters))
        has_paths = sinks or (watched and output != "table")
        proxies = Proxies(trusted_proxy)
        pipeline = (
            live_paths(source, wanted, views, proxies)
            if has_paths
            else Pipeline(source, wanted, views, proxies=proxies, clock=time.monotonic_ns)
        )
        out = sinks.beside(writer(output, is_explaining=explain))
        with stop_on_signals() as stop:
            if ready_file:
                options.make_ready_file(ready_file)
            privileges.drop(reads_maps=isinstance(source, KernelSource))
            sinks.start()
            click.echo(f"tracing {_names(source.info.nodes.values())}; Ctrl-C ends", err=True)
            run_and_sum_up(
                source,
                pipeline,
                out,
                expectation,
                recorder=recorder,
                count=count,
                timeout_s=timeout,
                stop=stop,
            )
    sys.exit(expectation.exit_code())


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(printable(node) for node in nodes)
