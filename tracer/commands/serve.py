"""srcip serve: the node agent, which counts and exports and shows nothing."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporters.prometheus import Page, PageServer, Snapshot
from exporters.terminal import printable
from tracer.agent import Agent, ClusterStatus
from tracer.cluster import snapshot
from tracer.cluster.errors import ClusterError
from tracer.cluster.history import History
from tracer.commands import options
from tracer.commands.cluster import (
    NO_CLUSTER,
    ClusterChoice,
    cluster_options,
    has_usual_place,
)
from tracer.commands.run import stop_on_signals
from tracer.errors import LoadError
from tracer.kernel import privileges
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_netfilter_links
from tracer.kernel.programs import Sizes
from tracer.kernel.source import KernelSource, Settings
from tracer.surroundings import LiveViews

if TYPE_CHECKING:
    from tracer.cluster.watch import Watch

# How long a quiet agent sleeps: the price of a SIGTERM.
_STEP_S = 0.5
# A watch that is well hears a bookmark about every minute.
_STALE_S = 150.0
# Drops are read twice a second, connections and accepts never: their rings are never written.
_SIZES = Sizes(connection_ring_pages=1, accept_ring_pages=1, drop_ring_pages=256)


@click.command(short_help="Export metrics of this node, as its agent.")
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
    type=click.IntRange(0, 65535),
    default=9464,
    show_default=True,
    metavar="PORT",
    help="Port to listen on; 0 for any, which is then printed.",
)
@options.ready_option
@click.option(
    "--max-series",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    metavar="N",
    help="Series of a metric at the most; the rest goes to the series 'other'.",
)
@click.option(
    "--drain-interval",
    type=click.FloatRange(min=1),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How often the kernel's counts are read.",
)
def serve(
    bind: str,
    port: int,
    ready_file: Path | None,
    max_series: int,
    drain_interval: float,
    **parameters: Any,
) -> None:
    """
    Count every new connection and every dropped packet of this node, and export the totals.

    Serves /metrics for Prometheus, /healthz and /readyz. Connections are counted in the kernel, so
    the cost does not grow with the traffic. Needs root while it starts; drops it once attached.

    \b
    Examples:
      srcip serve                                   on localhost port 9464
      srcip serve --bind 0.0.0.0 --node-name node1  for a Prometheus elsewhere
      srcip serve --no-cluster                      without Kubernetes: tuples and rules alone
      curl -s localhost:9464/metrics | grep srcip_connections_total
    """
    choice = ClusterChoice.of(parameters)
    namespaces = options.namespaces(parameters)
    privileges.require_for_tracing()
    if not has_netfilter_links():
        raise LoadError("counting takes BPF netfilter links (Linux 6.4); see 'srcip doctor'")
    with ExitStack() as stack:
        page = Page(version("srcip"))
        # The port first: it costs the least to be refused.
        server = stack.enter_context(closing(PageServer(page, bind, port)))
        # It forks, and must do so before the watch starts a thread.
        views = stack.enter_context(
            closing(
                LiveViews(
                    namespaces,
                    proxy_modes=[choice.mode] * len(namespaces),
                    masquerade_mark=choice.mark,
                )
            )
        )
        cluster = stack.enter_context(_cluster(choice, namespaces))
        views.history = cluster.history
        settings = Settings(is_streaming=False, has_drops=True, sizes=_SIZES)
        kernel = stack.enter_context(closing(KernelSource(namespaces, settings)))
        stop = stack.enter_context(stop_on_signals())
        if ready_file:
            options.make_ready_file(ready_file)
        privileges.drop()

        def publish(told: Snapshot) -> None:
            page.snapshot = told

        agent = Agent(
            kernel,
            views,
            publish,
            version=page.snapshot.version,
            cluster_status=cluster.status,
            max_series=max_series,
            drain_interval_s=drain_interval,
        )
        server.start()
        click.echo(f"serving on {_url(bind, server.port)}; Ctrl-C ends", err=True)
        while not stop.is_set and agent.step(_STEP_S):
            pass


def _url(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http://{printable(host)}:{port}/metrics"


class _NoCluster:
    """Nothing is known of a cluster, and nothing is waited for."""

    def history(self) -> History | None:
        return None

    def status(self) -> ClusterStatus:
        return ClusterStatus()


class _FileCluster(_NoCluster):
    """The objects of a file."""

    def __init__(self, path: Path) -> None:
        self._history = History().add(snapshot.load(path), 0)

    def history(self) -> History | None:
        return self._history


class _WatchedCluster(_NoCluster):
    """Objects that are watched. Until all were listed once there are none."""

    def __init__(self, watch: "Watch") -> None:
        self._watch = watch

    def history(self) -> History | None:
        return self._watch.history if self._watch.status.is_synced else None

    def status(self) -> ClusterStatus:
        status = self._watch.status
        age_s = status.age_s(time.time_ns())
        missing = None
        if not status.is_synced:
            why = f": {status.error}" if status.error else ""
            missing = f"the cluster's objects are not in yet{why}"
        is_stale = age_s is not None and age_s > _STALE_S
        return ClusterStatus(missing=missing, age_s=age_s, is_stale=is_stale)


@contextmanager
def _cluster(choice: ClusterChoice, namespaces: list[Netns]) -> Iterator[_NoCluster]:
    """Open the cluster; one that does not answer is waited for, however long it takes."""
    if choice.is_off:
        yield _NoCluster()
        return
    if choice.file is not None:
        yield _FileCluster(choice.file)
        return
    if choice.is_unnamed and not has_usual_place():
        click.echo(f"srcip: {NO_CLUSTER}; judging without it", err=True)
        yield _NoCluster()
        return
    # Its client weighs as much as the agent: only who watches shall carry it.
    from tracer.cluster.watch import Watch  # noqa: PLC0415

    node = namespaces[0].node if len(namespaces) == 1 else None
    try:
        watch = Watch(kubeconfig=choice.kubeconfig, context=choice.context, node=node)
    except ClusterError as error:
        if choice.kubeconfig is not None or choice.context is not None:
            raise
        # Nobody asked for this cluster: it was only the usual place to look.
        click.echo(f"srcip: {printable(str(error))}; judging without it", err=True)
        yield _NoCluster()
        return
    with watch:
        watch.start(0)
        yield _WatchedCluster(watch)
