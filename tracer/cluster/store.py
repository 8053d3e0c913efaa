"""Collects what the watches of one cluster deliver: objects in, snapshots out."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tracer.cluster.claims import Kind, Owner, owner_of
from tracer.cluster.errors import ClusterError
from tracer.cluster.feed import Json
from tracer.cluster.fields import shown
from tracer.cluster.history import History
from tracer.cluster.objects import Object
from tracer.cluster.parse import parse
from tracer.cluster.resource import Resource

_LOG = logging.getLogger(__name__)
# How many different messages to log; they name objects, so there may be very many.
_MAX_LOGGED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchStatus:
    """
    How current the snapshot is.

    ``heard_ns`` is when the server last confirmed the resource that it has been silent about
    longest; None until everything was listed once. An idle watch is confirmed about every minute.
    ``error`` is a failure that a watch has not recovered from; ``is_refused`` says whether
    somebody must act to end one. ``undecodable`` counts objects that could not be parsed: the index
    keeps their former state.
    """

    is_synced: bool
    heard_ns: int | None
    error: str | None
    is_refused: bool
    events: int
    lists: int
    failures: int
    undecodable: int

    def age_s(self, now_ns: int) -> float | None:
        """Return the seconds since the snapshot was last confirmed."""
        return None if self.heard_ns is None else max(0, now_ns - self.heard_ns) / 1e9


class Store:
    """
    A `Sink` that keeps the index. One thread writes; any thread reads, without a lock.

    Every call wakes those that wait in `wait_for`.
    """

    def __init__(self, resources: tuple[Resource, ...], clock_ns: Callable[[], int]) -> None:
        self.history = History()
        self._condition = threading.Condition()
        self._resources = resources
        self._clock_ns = clock_ns
        self._pages: dict[Resource, dict[Owner, Object]] = {}
        self._heard_ns: dict[Resource, int] = {}
        self._errors: dict[Resource | None, tuple[ClusterError, bool]] = {}
        self._logged: set[str] = set()
        self._events = self._lists = self._failures = self._undecodable = 0

    def status(self) -> WatchStatus:
        """Return how current the snapshot is."""
        # Copies, because the writer may change them meanwhile.
        heard, errors = self._heard_ns.copy(), list(self._errors.copy().values())
        errors.sort(key=lambda error: not error[1])  # those that somebody must act on first
        is_synced = len(heard) == len(self._resources)
        return WatchStatus(
            is_synced=is_synced,
            heard_ns=min(heard.values()) if is_synced else None,
            error=str(errors[0][0]) if errors else None,
            is_refused=any(is_final for _, is_final in errors),
            events=self._events,
            lists=self._lists,
            failures=self._failures,
            undecodable=self._undecodable,
        )

    def listed(
        self, resource: Resource, items: list[Json], *, is_first: bool, is_last: bool
    ) -> None:
        """Collect the pages of a list; the last one replaces all objects of the kind."""
        page = self._pages.setdefault(resource, {})
        if is_first:
            page.clear()
        for item in items:
            obj = self._parse(resource, item)
            if obj is not None:
                page[owner_of(obj)] = obj
        if is_last:
            found = self._pages.pop(resource)
            gone = [owner for owner in self._owners(resource.index_kind) if owner not in found]
            self._publish(list(found.values()), gone)
            self._lists += 1
            self._confirm(resource)

    def changed(self, resource: Resource, item: Json, *, is_gone: bool) -> None:
        """Put or remove one object."""
        self._events += 1
        obj = self._parse(resource, item)
        if obj is not None and is_gone:
            self._publish([], [owner_of(obj)])
        elif obj is not None:
            self._publish([obj], [])

    def heard(self, resource: Resource) -> None:
        """Note that a resource is current."""
        # Before its first list a resource is not known at all.
        if resource in self._heard_ns:
            self._confirm(resource)

    def failed(self, resource: Resource | None, error: ClusterError, *, is_final: bool) -> None:
        """Note a failure; without a resource, one that ended the whole watch."""
        known = self._errors.get(resource)
        if known is None or str(known[0]) != str(error):
            # Until everything was listed once, the caller of `Watch.start` reports it.
            _LOG.log(logging.WARNING if self.status().is_synced else logging.INFO, "%s", error)
        self._failures += 1
        self._errors[resource] = (error, is_final)
        self._notify()

    def wait_for(self, is_met: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition holds; return whether it does."""
        with self._condition:
            return self._condition.wait_for(is_met, timeout_s)

    def _owners(self, kind: Kind) -> list[Owner]:
        return list(self.history.now.owners(kind))

    def _publish(self, put: list[Object], remove: list[Owner]) -> None:
        now_ns = self._clock_ns()
        before = self.history.now
        after = before.changed(put=put, remove=remove, updated_ns=now_ns)
        if after is not before:
            # Readers see this one assignment.
            self.history = self.history.add(after, now_ns)

    def _confirm(self, resource: Resource) -> None:
        self._heard_ns[resource] = self._clock_ns()
        self._errors.pop(resource, None)
        self._notify()

    def _notify(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _parse(self, resource: Resource, item: Json) -> Object | None:
        try:
            obj = parse(item)
            if obj is None or owner_of(obj).kind is resource.index_kind:
                return obj
            raise ClusterError(f"{resource.plural}: the API server sent {shown(item.get('kind'))}")
        except ClusterError as error:
            self._undecodable += 1
            if str(error) not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(str(error))
                _LOG.warning("ignoring an object: %s", error)
            return None
