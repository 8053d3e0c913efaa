"""How the judge gets to see what surrounds a connection."""

from dataclasses import dataclass
from typing import Protocol

from tracer.cluster.index import Cluster
from tracer.judge.view import DEFAULT_MARK, View
from tracer.ruleset.model import ProxyMode


class Views(Protocol):
    """Gives the judge a view of what surrounds a connection."""

    def refresh(self) -> None:
        """Take note of what has changed. Called once a batch, never per connection."""

    def at(self, netns: int, node: str, time_ns: int) -> View:
        """Return the view of a namespace's node at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedViews:
    """Views of a recording, or of nothing: the objects of a file, and nodes by name."""

    cluster: Cluster | None = None
    proxy_mode: ProxyMode | None = None
    masquerade_mark: int = DEFAULT_MARK

    def refresh(self) -> None:
        """Nothing changes."""

    def at(self, netns: int, node: str, time_ns: int) -> View:  # noqa: ARG002 - the protocol's
        """Return what is known of any node: the cluster's objects."""
        return View(
            node=node,
            cluster=self.cluster,
            proxy_mode=self.proxy_mode,
            masquerade_mark=self.masquerade_mark,
        )
