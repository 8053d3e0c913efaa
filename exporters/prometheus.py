"""The agent's metrics for Prometheus: a snapshot, its text, and the agent's health."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from exporters.exposition import CounterText, Encoder, Metrics

# A drain is due every few seconds. The first waits for the programs and the cluster.
_DEAD_S, _STILLBORN_S = 60, 180
_OPENMETRICS = "application/openmetrics-text"
# Paths that tell about the cluster: not for everyone.
GUARDED = frozenset({"/metrics"})


class ConnectionLabels(NamedTuple):
    """The labels of ``srcip_connections_total``."""

    service_namespace: str
    service: str
    via: str
    policy: str
    verdict: str
    cause: str
    client_class: str
    family: str
    proto: str


class DropLabels(NamedTuple):
    """The labels of ``srcip_dropped_packets_total``."""

    service_namespace: str
    service: str
    via: str
    cause: str
    reason: str
    family: str
    proto: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """
    All that is exported, at one point in time; docs/metrics.md explains each metric.

    ``not_ready`` says what is missing, None if nothing is. ``drained_at_s`` is Unix time, and
    ``drained_s`` the same on the monotonic clock; None before the first drain.
    """

    version: str
    not_ready: str | None = None
    drained_at_s: float = 0.0
    drained_s: float | None = None
    drain_s: float = 0.0
    connections: Mapping[ConnectionLabels, int] = field(default_factory=dict)
    drops: Mapping[DropLabels, int] = field(default_factory=dict)
    overflow: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[tuple[str, str], int] = field(default_factory=dict)
    undecodable: int = 0
    untracked: int = 0
    maps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    programs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cluster_objects: Mapping[str, int] = field(default_factory=dict)
    cluster_age_s: float | None = None
    proxy_modes: Mapping[str, str] = field(default_factory=dict)
    stream_clients: int | None = None
    rung: str = ""
    not_seen: tuple[str, ...] = ()


class _Text:
    """The latest snapshot's text in one format."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._connections = CounterText[ConnectionLabels](
            encoder,
            "srcip_connections",
            "New connections seen by this node, by what became of their source address.",
            ConnectionLabels._fields,
        )
        self._drops = CounterText[DropLabels](
            encoder,
            "srcip_dropped_packets",
            "Packets that the kernel dropped because of netfilter, routing or no listener.",
            DropLabels._fields,
        )
        self._made: tuple[Snapshot, bytes] | None = None

    def of(self, snapshot: Snapshot, process: ProcessCollector) -> bytes:
        """Return the text of a snapshot, formatted only once."""
        if self._made is None or self._made[0] is not snapshot:
            rest = Metrics(chain(_few(snapshot), process.collect()))
            parts = (
                self._connections.text(snapshot.connections),
                self._drops.text(snapshot.drops),
                self._encoder(rest),
            )
            self._made = snapshot, b"".join(parts)
        return self._made[1]


def _few(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metrics that have only a handful of series."""
    yield from _gaps(snapshot)
    yield from _agent(snapshot)


def _gaps(snapshot: Snapshot) -> Iterator[Metric]:
    yield _counter(
        "srcip_lost_records",
        "Records that were lost or are incomplete, by stage and reason.",
        ("stage", "reason"),
        snapshot.lost,
    )
    yield CounterMetricFamily(
        "srcip_undecodable_records",
        "Records and keys from the kernel that could not be read.",
        value=snapshot.undecodable,
    )
    yield CounterMetricFamily(
        "srcip_untracked_packets",
        "Packets that conntrack was told not to track: their connections cannot be seen.",
        value=snapshot.untracked,
    )
    yield _counter(
        "srcip_series_overflow",
        "Increments counted in the series 'other' of a metric.",
        ("metric",),
        _by_one(snapshot.overflow),
    )
    series = {
        "srcip_connections_total": len(snapshot.connections),
        "srcip_dropped_packets_total": len(snapshot.drops),
    }
    yield _gauge("srcip_series", "Current series of a metric.", ("metric",), _by_one(series))
    yield _gauge(
        "srcip_not_seen_info",
        "Something that this agent cannot see, in words.",
        ("what",),
        {(what,): 1 for what in snapshot.not_seen},
    )


def _agent(snapshot: Snapshot) -> Iterator[Metric]:
    entries = {name: used for name, (used, _) in snapshot.maps.items()}
    capacity = {name: room for name, (_, room) in snapshot.maps.items()}
    yield _gauge("srcip_map_entries", "Elements in a BPF map.", ("map",), _by_one(entries))
    yield _gauge("srcip_map_capacity", "Capacity of a BPF map.", ("map",), _by_one(capacity))
    # Without kernel.bpf_stats_enabled the kernel counts neither.
    runs = {name: n for name, (_, n) in snapshot.programs.items() if n}
    seconds = {name: ns / 1e9 for name, (ns, n) in snapshot.programs.items() if n}
    yield _counter(
        "srcip_program_runs",
        "Runs of a BPF program, with kernel.bpf_stats_enabled.",
        ("program",),
        _by_one(runs),
    )
    yield _counter(
        "srcip_program_run_seconds",
        "Time spent in a BPF program, with kernel.bpf_stats_enabled.",
        ("program",),
        _by_one(seconds),
    )
    yield GaugeMetricFamily(
        "srcip_drain_timestamp_seconds",
        "Unix time of the last drain of the kernel's counters.",
        value=snapshot.drained_at_s,
    )
    yield GaugeMetricFamily(
        "srcip_drain_duration_seconds", "Duration of the last drain.", value=snapshot.drain_s
    )
    yield _gauge(
        "srcip_cluster_objects",
        "Kubernetes objects that the agent knows.",
        ("kind",),
        _by_one(snapshot.cluster_objects),
    )
    if snapshot.cluster_age_s is not None:
        yield GaugeMetricFamily(
            "srcip_cluster_age_seconds",
            "Seconds since the API server last confirmed the objects.",
            value=snapshot.cluster_age_s,
        )
    yield _gauge(
        "srcip_kube_proxy_info",
        "kube-proxy's mode.",
        ("node", "mode"),
        dict.fromkeys(snapshot.proxy_modes.items(), 1),
    )
    if snapshot.stream_clients is not None:
        yield GaugeMetricFamily(
            "srcip_stream_clients",
            "Clients of the live stream.",
            value=snapshot.stream_clients,
        )
    yield _gauge(
        "srcip_rung_info", "How the agent observes the kernel.", ("rung",), {(snapshot.rung,): 1}
    )
    yield GaugeMetricFamily(
        "srcip_ready", "1 if /readyz answers 200, else 0.", value=snapshot.not_ready is None
    )
    yield _gauge("srcip_build_info", "Version of srcip.", ("version",), {(snapshot.version,): 1})


def _counter(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _gauge(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _by_one(values: Mapping[str, float]) -> dict[tuple[str], float]:
    return {(name,): value for name, value in values.items()}


def _chosen(accept: str) -> str:
    """
    Reduce any Accept header to one of two.

    prometheus_client parses a version as a number and returns it as it came: each spelling would
    have a text of its own.
    """
    for each in accept.split(","):
        media_type, *parameters = (part.strip() for part in each.lower().split(";"))
        versions = [part.replace('"', "") for part in parameters if part.startswith("version=")]
        if media_type == _OPENMETRICS and versions in ([], ["version=1.0.0"]):
            return f"{_OPENMETRICS}; version=1.0.0"
    return ""


class Page:
    """
    The latest snapshot, and its text in the formats that scrapers asked for.

    The text is formatted once per snapshot, however many scrapers ask.
    """

    def __init__(self, version: str, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.snapshot = Snapshot(version=version, not_ready="the agent is starting")
        self._clock_s = clock_s
        self._made_s = clock_s()
        self._process = ProcessCollector(registry=None)
        self._lock = threading.Lock()
        self._texts: dict[str, _Text] = {}

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the text in a format that the scraper accepts, and its content type."""
        encoder, content_type = choose_encoder(_chosen(accept))
        with self._lock:
            text = self._texts.get(content_type)
            if text is None:
                text = self._texts[content_type] = _Text(encoder)
            return text.of(self.snapshot, self._process), content_type

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Return status, content type and body for a request."""
        snapshot, plain = self.snapshot, "text/plain; charset=utf-8"
        match path.partition("?")[0]:
            case "/metrics":
                text, content_type = self.text(accept)
                return 200, content_type, text
            case "/healthz":
                since_s = self._made_s if snapshot.drained_s is None else snapshot.drained_s
                patience_s = _STILLBORN_S if snapshot.drained_s is None else _DEAD_S
                if (age_s := self._clock_s() - since_s) > patience_s:
                    return 503, plain, f"no drain for {age_s:.0f} s\n".encode()
                return 200, plain, b"ok\n"
            case "/readyz":
                if snapshot.not_ready is not None:
                    return 503, plain, f"not ready: {snapshot.not_ready}\n".encode()
                return 200, plain, b"ok\n"
            case "/":
                return 200, plain, b"srcip: /metrics /healthz /readyz\n"
        return 404, plain, b"not found: there are /metrics, /healthz and /readyz\n"
