"""srcip serve: the node agent, which counts connections and exports the totals."""

import grp
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from exporters.certificate import Certificate
from exporters.page_server import Gate, PageServer
from exporters.prometheus import Page, Snapshot
from exporters.terminal import printable
from tracer.agent import Agent
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, live_views
from tracer.commands.run import stop_on_signals
from tracer.commands.values import Number, Seconds
from tracer.kernel import ladder, privileges
from tracer.kernel.programs import Sizes
from tracer.kernel.source import Settings
from tracer.stream.errors import StreamError
from tracer.stream.protocol import DEFAULT_SOCKET, URL_PATH
from tracer.stream.server import StreamServer

# How long an idle agent sleeps: the delay of a SIGTERM.
_STEP_S = 0.5
# Longer ones would look like an agent that hangs: to /healthz, and to the alert SrcipCountsOld.
MAX_DRAIN_INTERVAL_S = 30
# Drops are read twice a second. Connections and accepts are written only while a client streams,
# and are read ten times a second then: the ring has room for 7,700 connections.
_SIZES = Sizes(connection_ring_pages=256, accept_ring_pages=64, drop_ring_pages=256)


class Group(click.ParamType[int]):
    """A group of this machine, by name or number."""

    name = "group"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Look a name up."""
        text = str(value)
        # 4294967295 stands for "no change" (chown(2)).
        if text.isdecimal() and int(text) < 0xFFFFFFFF:
            return int(text)
        try:
            return grp.getgrnam(text).gr_gid
        except KeyError:
            self.fail(f"no such group: {text!r}", param, ctx)


@click.command(short_help="Run the node agent: export metrics, and a live stream.")
@options.where_options
@cluster_options
@click.option(
    "--bind",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; 0.0.0.0 or :: for all.",
)
@click.option(
    "--port",
    type=Number(0, 65535),
    default=9464,
    show_default=True,
    metavar="PORT",
    help="TCP port to listen on; 0 for any free one, which is printed.",
)
@click.option(
    "--tls-cert",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Serve HTTPS with the certificate in FILE (PEM, with its intermediates). Read again when"
    " it changes, then as user nobody (65534).",
)
@click.option(
    "--tls-key",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Private key of --tls-cert (PEM, without a password). Read again in the same way.",
)
@click.option(
    "--authorize",
    type=click.Choice(["none", "kubernetes"]),
    default="none",
    show_default=True,
    help="Who may read /metrics: everyone, or holders of a bearer token that the API server"
    " authenticates and authorizes for that path (TokenReview, SubjectAccessReview). /healthz and"
    " /readyz stay open.",
)
@click.option(
    "--stream-socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help=f"Unix socket for 'srcip trace --agent'. Default: {DEFAULT_SOCKET}, if it can be created.",
)
@click.option(
    "--stream-group",
    type=Group(),
    metavar="NAME|GID",
    help="Group that may connect to the Unix socket. Default: the agent's own.",
)
@click.option(
    "--stream-https",
    is_flag=True,
    help=f"Also serve the stream on the port, at {URL_PATH}, to holders of a bearer token that the"
    " API server authorizes for that path. It shows clients' addresses, so it needs --tls-cert and"
    " --authorize kubernetes.",
)
@click.option("--no-stream", is_flag=True, help="Create no Unix socket and offer no live stream.")
@options.programs_rung_option
@options.ready_option
@click.option(
    "--max-series",
    type=Number(1),
    default=10_000,
    show_default=True,
    metavar="N",
    help="Series per metric at most; everything beyond goes to the series 'other'.",
)
@click.option(
    "--drain-interval",
    type=Seconds(1, MAX_DRAIN_INTERVAL_S),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help=f"How often to read the kernel's counts (1-{MAX_DRAIN_INTERVAL_S}).",
)
def serve(
    bind: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    authorize: str,
    stream_socket: Path | None,
    stream_group: int | None,
    stream_https: bool,
    no_stream: bool,
    rung: str | None,
    ready_file: Path | None,
    max_series: int,
    drain_interval: float,
    **parameters: Any,
) -> None:
    """
    Count every new connection and dropped packet of this node, and export the totals.

    Serves /metrics for Prometheus, /healthz and /readyz, and a live stream to 'srcip trace
    --agent'. Connections are counted in the kernel, so the cost does not grow with the traffic.
    Needs root while it starts; drops it once attached.

    \b
    Examples:
      srcip serve                                   on localhost, port 9464
      srcip serve --bind 0.0.0.0 --node-name node1  for a Prometheus on another machine
      srcip serve --no-cluster                      without Kubernetes: tuples and rules alone
      curl -s localhost:9464/metrics | grep srcip_connections_total
    """
    choice = ClusterChoice.of(parameters)
    if (tls_cert is None) is not (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key must be given together")
    if authorize != "none" and tls_cert is None and not _is_loopback(bind):
        raise click.UsageError(
            f"--authorize {authorize} on {bind} needs --tls-cert: tokens must not cross the"
            " network in clear text"
        )
    if stream_https and (tls_cert is None or authorize == "none"):
        raise click.UsageError(
            "--stream-https needs --tls-cert and --authorize kubernetes: the stream shows the"
            " addresses of clients"
        )
    if stream_https and no_stream:
        raise click.UsageError("--stream-https and --no-stream are mutually exclusive")
    namespaces = options.namespaces(parameters)
    privileges.require_for_tracing()
    asked = options.rung_of(rung)
    ladder.require_programs(asked)
    with ExitStack() as stack:
        page = Page(version("srcip"))
        certificate = Certificate(tls_cert, tls_key) if tls_cert and tls_key else None
        gate = stack.enter_context(_gate(authorize, choice))
        # The port first: of all that can fail, it is the cheapest to try.
        server = stack.enter_context(
            closing(PageServer(page, bind, port, certificate=certificate, gate=gate))
        )
        views = stack.enter_context(live_views(choice, namespaces, is_agent=True))
        stream = None if no_stream else _stream(stream_socket, stream_group, stream_https)
        settings = Settings(is_streaming=False, has_drops=True, is_restarted=True, sizes=_SIZES)
        kernel = stack.enter_context(closing(ladder.open_programs(namespaces, settings, asked)))
        stop = stack.enter_context(stop_on_signals())
        if ready_file:
            options.make_ready_file(ready_file)
        privileges.drop(reads_maps=True)

        def publish(snapshot: Snapshot) -> None:
            page.snapshot = snapshot

        agent = Agent(
            kernel,
            views,
            publish,
            version=page.snapshot.version,
            stream=stream,
            cluster_status=views.cluster_status,
            max_series=max_series,
            drain_interval_s=drain_interval,
        )
        server.start(stream if stream_https else None)
        url = _url(bind, server.port, certificate)
        click.echo(f"serving on {url}/metrics; Ctrl-C ends", err=True)
        if stream is not None:
            places = [printable(str(stream.path))] if stream.path else []
            places += [f"{url}{URL_PATH}"] if stream_https else []
            click.echo(f"streaming on {' and '.join(places)}", err=True)
        stack.callback(agent.close)
        while not stop.is_set and agent.step(_STEP_S):
            pass


def _stream(path: Path | None, group: int | None, is_https: bool) -> StreamServer | None:
    """Open the socket; the default one is optional, a named one is not."""
    try:
        return StreamServer(path or Path(DEFAULT_SOCKET), group)
    except StreamError as error:
        if path is not None or group is not None:
            raise
        without = "the live stream is on the port only" if is_https else "there is no live stream"
        click.echo(f"srcip: {printable(str(error))}; {without}", err=True)
        return StreamServer(None) if is_https else None


@contextmanager
def _gate(authorize: str, choice: ClusterChoice) -> Iterator[Gate | None]:
    if authorize == "none":
        yield None
        return
    # Imported late: only checking tokens needs its client.
    from tracer.cluster.review import Reviewer  # noqa: PLC0415

    with closing(Reviewer(kubeconfig=choice.kubeconfig, context=choice.context)) as reviewer:
        yield reviewer.refusal


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _url(address: str, port: int, certificate: Certificate | None) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http{'s' if certificate else ''}://{printable(host)}:{port}"
