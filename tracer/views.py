"""How the judge gets the view of a connection's surroundings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tracer.cluster.index import Cluster
from tracer.judge.view import DEFAULT_MARK, View
from tracer.model import IPAddress, IPNetwork
from tracer.ruleset.model import ProxyMode, Ruleset
from tracer.ruleset.printed import Printed

# More namespaces than a machine has; a damaged recording may name any number.
_NAMESPACES = 4096


class Views(Protocol):
    """Gives the judge the view of a connection's surroundings."""

    def refresh(self) -> None:
        """Take note of changes. Called once per batch, never per connection."""

    def at(self, netns: int, node: str, ktime_ns: int) -> View:
        """
        Return the view of a namespace's node at a time.

        The time is on the records' clock (CLOCK_MONOTONIC), which is not affected when the wall
        clock is set.
        """

    def notes(self) -> tuple[str, ...]:
        """Return what is unknown about the surroundings, a line each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """
    What a recording stores about a traced node, as needed to judge its connections.

    ``printed`` are its rules, None if they were not recorded. What they say about kube-proxy is
    stored separately.
    """

    addresses: frozenset[IPAddress] = frozenset()
    service_addresses: frozenset[IPAddress] = frozenset()
    interfaces: Mapping[int, str] = field(default_factory=dict)
    device_kinds: Mapping[int, str] = field(default_factory=dict)
    proxy_mode: ProxyMode | None = None
    masquerade_mark: int = DEFAULT_MARK
    has_masquerade_all: bool | None = None
    cluster_cidrs: tuple[IPNetwork, ...] = ()
    printed: Printed | None = None

    def rules(self) -> Ruleset:
        """Parse the rules, as far as they were recorded. This is slow if there are many."""
        if self.printed is not None:
            return self.printed.ruleset
        return Ruleset(
            proxy_mode=self.proxy_mode,
            has_masquerade_all=self.has_masquerade_all,
            cluster_cidrs=self.cluster_cidrs,
            unread=("the recording does not contain the rules",),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedViews:
    """Views of a recording: the objects of a file, and its nodes as recorded."""

    cluster: Cluster | None = None
    places: Mapping[int, Place] = field(default_factory=dict)
    proxy_mode: ProxyMode | None = None
    masquerade_mark: int | None = None
    # By namespace: the view, and the place it was made from.
    _made: dict[int, tuple[Place | None, View]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def refresh(self) -> None:
        """Do nothing: recorded surroundings do not change."""

    def notes(self) -> tuple[str, ...]:
        """Return nothing."""
        return ()

    def at(self, netns: int, node: str, ktime_ns: int) -> View:  # noqa: ARG002 - the protocol's
        """Return the view of a node: what was recorded, and the cluster's objects."""
        place = self.places.get(netns)
        made = self._made.get(netns)
        if made is None or made[0] is not place or made[1].node != node:
            if len(self._made) >= _NAMESPACES:
                self._made.clear()
            made = self._made[netns] = place, self._view(place, node)
        return made[1]

    def _view(self, place: Place | None, node: str) -> View:
        if place is None:
            return View(
                node=node,
                cluster=self.cluster,
                proxy_mode=self.proxy_mode,
                masquerade_mark=self.masquerade_mark or DEFAULT_MARK,
            )
        return View(
            node=node,
            cluster=self.cluster,
            rules=place.rules(),
            addresses=place.addresses,
            service_addresses=place.service_addresses,
            interfaces=place.interfaces,
            device_kinds=place.device_kinds,
            proxy_mode=self.proxy_mode or place.proxy_mode,
            masquerade_mark=self.masquerade_mark or place.masquerade_mark,
        )
