"""
The node agent: the kernel's counts, judged by path, as totals that only grow.

One thread drains, judges and publishes; scrapes read the published snapshot.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from exporters.prometheus import DropLabels, Snapshot
from tracer.address_classes import address_classes
from tracer.budget import Budget
from tracer.cluster.index import Cluster
from tracer.cluster.match import Via
from tracer.cluster.status import ClusterStatus
from tracer.decode import kind_of
from tracer.judge.verdict import JudgedDrop
from tracer.judge.view import View
from tracer.model import protocol_name
from tracer.path_totals import Counts, PathTotals
from tracer.pipeline import Pipeline
from tracer.stream.live import LiveStream, StreamingKernel
from tracer.stream.server import StreamServer
from tracer.tally import KEEP_S, OTHER, Tally
from tracer.views import Views
from tracer.wire import Kind

CONNECTIONS, DROPS = "srcip_connections_total", "srcip_dropped_packets_total"
OTHER_DROPS = DropLabels(*(OTHER,) * len(DropLabels._fields))
# How many drops to judge per second, and in one burst. Each takes about a third of a millisecond.
DROPS_PER_S, DROPS_AT_ONCE = 1000, 5000
# How long a record of the stream may wait in its ring.
STREAM_S = 0.1
# How long to wait for the cluster's objects at the start before counting without them.
CLUSTER_PATIENCE_S = 30.0
# Write prefixes this often at most, and spend at most a hundredth of the time on it.
_CLASSES_S, _CLASSES_SHARE = 1.0, 100


class Kernel(StreamingKernel, Protocol):
    """What the agent needs of `tracer.kernel.source.KernelSource`."""

    @property
    def counters(self) -> Counts:
        """The counts by path."""

    def count(self, *, masquerade_mark: int) -> None:
        """Start to count, or continue with another mark."""

    def run_statistics(self) -> Mapping[str, tuple[int, int]]:
        """Return run time in ns and run count by program."""

    def map_usage(self) -> Mapping[str, tuple[int, int]]:
        """Return used elements and capacity of the maps that grow."""


class Agent:
    """
    Keeps the totals of one node.

    Call `step` in a loop. ``publish`` gets a snapshot after each drain, and whenever readiness
    changes.
    """

    def __init__(
        self,
        kernel: Kernel,
        views: Views,
        publish: Callable[[Snapshot], None],
        *,
        version: str,
        stream: StreamServer | None = None,
        cluster_status: Callable[[], ClusterStatus] = ClusterStatus,
        max_series: int = 10_000,
        drain_interval_s: float = 5.0,
        clock_s: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._kernel = kernel
        self._views = views
        self._publish = publish
        self._version = version
        self._cluster_status = cluster_status
        self._interval_s = drain_interval_s
        self._clock_s = clock_s
        self._pipeline = Pipeline(kernel, views=views)
        self._live = LiveStream(
            kernel,
            stream,
            version=version,
            notes=lambda: (*kernel.info.not_seen, *views.notes()),
            losses=self._stream_losses,
            clock_s=clock_s,
            cpu_s=cpu_s,
        )
        self.paths = PathTotals(kernel.counters, self._view, max_series=max_series)
        self.drops = Tally(OTHER_DROPS, max_series)
        # A series that begins above 0 is no increase for Prometheus.
        self._lost = Counter({("agent", reason): 0 for reason in ("rate_limited", "prefixes_full")})
        self._paths_full = self._refused = 0
        self._started_s = clock_s()
        self._budget = Budget.full(DROPS_PER_S, DROPS_AT_ONCE, self._started_s)
        self._is_counting = False
        self._next_drain_s = self._next_classes_s = self._next_tidy_s = self._started_s
        self._classes_of: tuple[object, ...] = ()
        self._not_ready: str | None = ""
        self._drained: Snapshot | None = None

    def step(self, timeout_s: float) -> bool:
        """
        Do what is due, then wait for drops.

        Returns:
            False once all traced namespaces are gone.
        """
        now_s = self._clock_s()
        self._views.refresh()
        self._follow_cluster(now_s)
        if self._is_counting and now_s >= self._next_drain_s:
            self.drain()
            self._next_drain_s = now_s + self._interval_s
        elif self._missing() != self._not_ready:
            self._publish_snapshot()
        if not self._is_counting:
            # Meanwhile drops wait in their ring, and clients of the stream for their hello.
            time.sleep(timeout_s)
            return True
        records = self._kernel.read(min(timeout_s, STREAM_S) if self._live.is_on else timeout_s)
        if records is None:
            self.drain()
            return False
        self._take(records)
        self._live.serve()
        return True

    def close(self) -> None:
        """End the live stream."""
        self._live.close()

    def drain(self) -> None:
        """Read what the kernel has counted, and publish."""
        began_s, now_s = time.monotonic(), self._clock_s()
        self.paths.take(now_s)
        # Losses after counts, so that no loss falls in between.
        self._take_lost()
        if now_s >= self._next_tidy_s:
            self._tidy(now_s)
            self._next_tidy_s = now_s + KEEP_S / 20
        self._drained = self._snapshot(drain_s=time.monotonic() - began_s)
        self._publish_snapshot()

    def _view(self, netns: int) -> View:
        node = self._kernel.info.nodes.get(netns, f"netns {netns}")
        return self._views.at(netns, node, time.monotonic_ns())

    # Drops and losses

    def _take(self, records: Sequence[bytes]) -> None:
        if not records:
            return
        for judged in self._pipeline.judge(self._affordable(records)):
            if isinstance(judged, JudgedDrop):
                self.drops.add(_drop_labels(judged), 1)
            self._live.offer(judged)

    def _affordable(self, records: Sequence[bytes]) -> Iterator[bytes]:
        """Yield what the budgets allow; drops, which are counted, have a budget of their own."""
        drops = sum(kind_of(raw) == Kind.DROP for raw in records)
        left = self._budget.take(drops, self._clock_s())
        self._lost["agent", "rate_limited"] += drops - left
        # One by one, to keep the records in order of time.
        for raw in records:
            if kind_of(raw) != Kind.DROP:
                yield from self._live.affordable((raw,))
            elif left:
                left -= 1
                yield raw

    def _stream_losses(self) -> dict[str, int]:
        return {
            "rate_limited": self._lost["agent", "rate_limited"],
            "undecodable": self._pipeline.undecodable,
        }

    def _take_lost(self) -> None:
        full = self._kernel.lost_by_program().get("connections", {}).get("paths_full", 0)
        if full > self._paths_full:
            self.paths.add_other(full - self._paths_full)
            self._paths_full = full

    # The cluster

    def _follow_cluster(self, now_s: float) -> None:
        """Start to count once the cluster is known; keep the kernel's address classes current."""
        is_late = now_s - self._started_s >= CLUSTER_PATIENCE_S
        is_due = self._cluster_status().missing is None or is_late
        if now_s >= self._next_classes_s or (is_due and not self._is_counting):
            views = {netns: self._view(netns) for netns in self._kernel.info.nodes}
            self._set_classes(views)
            took_s = self._clock_s() - now_s
            self._next_classes_s = now_s + max(_CLASSES_S, took_s * _CLASSES_SHARE)
            if is_due:
                mark = max(view.masquerade_mark for view in views.values())
                self._kernel.count(masquerade_mark=mark)
        if is_due and not self._is_counting:
            self._next_drain_s = now_s
            self._is_counting = True

    def _set_classes(self, views: Mapping[int, View]) -> None:
        parts = tuple(
            part
            for view in views.values()
            for part in (view.cluster, view.addresses, view.rules and view.rules.cluster_cidrs)
        )
        if len(parts) == len(self._classes_of) and all(
            a is b or a == b for a, b in zip(parts, self._classes_of, strict=True)
        ):
            return
        self._classes_of = parts
        refused = self._kernel.counters.replace_classes(
            {netns: address_classes(view) for netns, view in views.items()}
        )
        # Those refused before are counted already.
        if refused > self._refused:
            self._lost["agent", "prefixes_full"] += refused - self._refused
        self._refused = refused

    def _tidy(self, now_s: float) -> None:
        self.paths.forget_unused(now_s)
        cluster = self._cluster()
        if cluster is None or self._cluster_status().missing is not None:
            return
        for tally in (self.paths.tally, self.drops):
            tally.forget_gone(lambda *key: cluster.service(*key) is not None, now_s)

    def _cluster(self) -> Cluster | None:
        for netns in self._kernel.info.nodes:
            return self._view(netns).cluster
        return None

    # What is published

    def _missing(self) -> str | None:
        missing = self._cluster_status().missing
        return missing or (None if self._drained else "no counts were read yet")

    def _publish_snapshot(self) -> None:
        self._not_ready = self._missing()
        snapshot = self._drained or Snapshot(version=self._version)
        self._publish(replace(snapshot, not_ready=self._not_ready))

    def _snapshot(self, *, drain_s: float) -> Snapshot:
        lost, untracked = Counter(self._lost), 0
        for stage, reasons in self._kernel.lost_by_program().items():
            untracked += reasons.get("untracked", 0)
            possible = _REASONS[stage] & reasons.keys()
            lost.update({(stage, reason): reasons[reason] for reason in possible})
        lost.update({("stream", reason): n for reason, n in self._live.lost().items()})
        status, cluster = self._cluster_status(), self._cluster()
        not_seen = list(self._kernel.info.not_seen)
        if status.is_stale:
            not_seen.append("cluster changes since the API server last answered")
        return Snapshot(
            version=self._version,
            drained_at_s=time.time(),
            drained_s=time.monotonic(),
            drain_s=drain_s,
            connections=dict(self.paths.tally.totals),
            drops=dict(self.drops.totals),
            overflow={CONNECTIONS: self.paths.tally.overflow, DROPS: self.drops.overflow},
            lost=lost,
            undecodable=self.paths.undecodable.total + self._pipeline.undecodable,
            untracked=untracked,
            maps=self._kernel.map_usage(),
            programs=self._kernel.run_statistics(),
            cluster_objects=_counts(cluster) if cluster else {},
            cluster_age_s=status.age_s,
            proxy_modes={
                node: self._view(netns).mode or "unknown"
                for netns, node in self._kernel.info.nodes.items()
            },
            stream_clients=self._live.clients,
            rung=self._kernel.info.rung,
            not_seen=tuple(not_seen),
        )


# What each program can lose.
_REASONS = {
    "connections": {"paths_full", "mark_overtaken", "unreadable", "probe_missed"},
    "drops": {"ring_full"},
    "accepts": set[str](),
}


def _drop_labels(judged: JudgedDrop) -> DropLabels:
    opinion, flow = judged.opinion, judged.flow
    service = opinion.service
    return DropLabels(
        service_namespace=service.namespace if service else "",
        service=service.name if service else "",
        via=str(service.via if service else Via.NONE),
        cause=str(opinion.cause or ""),
        reason=judged.reason,
        family=flow.family if flow else "",
        proto=protocol_name(flow.proto) if flow else "",
    )


def _counts(cluster: Cluster) -> dict[str, int]:
    counts = cluster.counts
    return {
        "service": counts.services,
        "endpoint_slice": counts.endpoint_slices,
        "node": counts.nodes,
        "pod": counts.pods,
    }
