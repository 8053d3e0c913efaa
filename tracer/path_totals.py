"""
Turn the kernel's counts of connections by path into totals by labels.

A path is judged when it is new, and again when what its verdict depends on has changed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from exporters.prometheus import ConnectionLabels
from tracer.decode import decode, decode_path_key
from tracer.errors import DecodeError
from tracer.judge.path_key import JudgedPath, is_typical, judge_path, surroundings
from tracer.judge.view import View
from tracer.kernel.counters import AddressClass
from tracer.model import Connection, IPNetwork, PathKey, protocol_name
from tracer.tally import KEEP_S, OTHER, Tally
from tracer.undecodable import Undecodable

OTHER_CONNECTIONS = ConnectionLabels(*(OTHER,) * len(ConnectionLabels._fields))


class Counts(Protocol):
    """The kernel's counts by path: see `tracer.kernel.counters.PathCounters`."""

    def drain(self) -> Mapping[bytes, int]:
        """Return what was added to each path since the last drain."""

    def sample(self, key: bytes) -> bytes | None:
        """Return the record of one connection of a path, if there is one."""

    def forget_sample(self, key: bytes) -> None:
        """Delete a path's sample: its next connection becomes the new one."""

    def replace_classes(self, classes: Mapping[int, Mapping[IPNetwork, AddressClass]]) -> int:
        """Set the classes of addresses by namespace; return how many did not fit."""


@dataclass(slots=True)
class _Path:
    """A path and its last verdict."""

    key: PathKey
    sample: Connection
    depends_on: tuple[object, ...]
    labels: ConnectionLabels
    used_s: float


class PathTotals:
    """
    Totals of connections by Prometheus labels.

    Args:
        counts: The kernel's counts by path.
        view_of: Returns the current view of a namespace.
        max_series: The maximum number of series.
    """

    def __init__(self, counts: Counts, view_of: Callable[[int], View], *, max_series: int) -> None:
        self._counts = counts
        self._view = view_of
        self.tally = Tally(OTHER_CONNECTIONS, max_series)
        self.undecodable = Undecodable("path")
        self._paths: dict[bytes, _Path] = {}
        self._pending: Counter[bytes] = Counter()

    def take(self, now_s: float) -> None:
        """Add what the kernel has counted since the last call."""
        added = Counter(self._pending)
        late, self._pending = set(self._pending), Counter()
        added.update(self._counts.drain())
        for raw, count in added.items():
            try:
                labels = self._labels(raw, now_s)
            except DecodeError as error:
                self.undecodable.add(str(error))
                labels = OTHER_CONNECTIONS
            if labels is None and raw not in late:
                # The sample is written just after the count: wait for it until the next call.
                self._pending[raw] = count
            else:
                self.tally.add(labels or OTHER_CONNECTIONS, count)

    def add_other(self, count: int) -> None:
        """Count connections about which nothing else is known."""
        self.tally.add(OTHER_CONNECTIONS, count)

    def forget_unused(self, now_s: float) -> None:
        """Forget the verdicts of paths without a connection for `KEEP_S`."""
        self._paths = {
            raw: path for raw, path in self._paths.items() if now_s - path.used_s < KEEP_S
        }

    def _labels(self, raw: bytes, now_s: float) -> ConnectionLabels | None:
        """Return the current labels of a path; None without a sample."""
        path = self._paths.get(raw)
        key, sample = (path.key, path.sample) if path else self._read_path(raw)
        if sample is None:
            return None
        view = self._view(key.netns)
        depends_on = surroundings(key, sample, view)
        if path is None or path.depends_on != depends_on:
            labels = _connection_labels(key, judge_path(key, sample, view))
            path = _Path(key, sample, depends_on, labels, now_s)
            if is_typical(key, sample, view):
                self._paths[raw] = path
            else:
                self._paths.pop(raw, None)
                self._counts.forget_sample(raw)
        path.used_s = now_s
        return path.labels

    def _read_path(self, raw: bytes) -> tuple[PathKey, Connection | None]:
        sample = self._counts.sample(raw)
        record = decode(sample) if sample is not None else None
        if record is not None and not isinstance(record, Connection):
            raise DecodeError("the sample of a path is not a connection record")
        return decode_path_key(raw), record


def _connection_labels(key: PathKey, judged: JudgedPath) -> ConnectionLabels:
    opinion = judged.opinion
    service = opinion.service
    return ConnectionLabels(
        service_namespace=service.namespace if service else "",
        service=service.name if service else "",
        via=str(service.via if service else judged.via),
        policy=str(service.policy or "") if service else "",
        verdict=str(opinion.verdict),
        cause=str(opinion.cause or ""),
        client_class="unknown"
        if opinion.client_class is None
        else opinion.client_class.name.lower(),
        family=key.family,
        proto=protocol_name(key.proto),
    )
