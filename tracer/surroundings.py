"""Live views for the judge: rules, interfaces, kube-proxy's mode and the cluster, kept current."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tracer.cluster.history import History
from tracer.cluster.index import Cluster
from tracer.cluster.status import ClusterStatus
from tracer.judge.view import DEFAULT_MARK, View
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.netns import Netns
from tracer.ruleset.keeper import RulesetKeeper
from tracer.ruleset.model import ProxyMode, Ruleset
from tracer.views import Place


class LiveViews:
    """
    Views of namespaces that are being traced.

    Create it before dropping privileges and before any thread starts; it keeps working afterwards.
    ``history`` returns the cluster's recent history, None while there is no cluster; ``notes`` what
    is unknown about the cluster; ``cluster_status`` how current it is.

    Raises:
        NetnsError: If a namespace cannot be entered.
    """

    def __init__(
        self,
        namespaces: Sequence[Netns],
        *,
        proxy_modes: Sequence[ProxyMode | None],
        masquerade_mark: int | None = None,
        follows_modes: bool = False,
        is_recorded: bool = False,
    ) -> None:
        """
        Args:
            namespaces: The traced namespaces.
            proxy_modes: Each node's mode, as its kube-proxy answered; None without an answer.
            masquerade_mark: kube-proxy's bit; None to take it from its rules.
            follows_modes: Whether to keep asking kube-proxy. Each time is a connection on the
                node.
            is_recorded: Whether `packed_rules` will be used.
        """
        self.history: Callable[[], History | None] = lambda: None
        self.notes: Callable[[], tuple[str, ...]] = lambda: ()
        self.cluster_status: Callable[[], ClusterStatus] = ClusterStatus
        self._mark = masquerade_mark
        self._places = {netns.inode: i for i, netns in enumerate(namespaces)}
        self._keeper = RulesetKeeper(
            [Path(netns.path) for netns in namespaces],
            proxy_modes,
            follows_modes=follows_modes,
            is_kept=is_recorded,
        )
        self._watchers = [InterfaceWatcher(netns) for netns in namespaces]
        self._views: dict[int, View] = {}

    def refresh(self) -> None:
        """Discard views whose rules, mode or interfaces have changed."""
        for netns, view in list(self._views.items()):
            place = self._places.get(netns)
            if place is not None and (
                self._keeper.ruleset(place) is not view.rules
                or self._keeper.proxy_mode(place) != view.proxy_mode
                or self._watchers[place].snapshot().addresses is not view.addresses
            ):
                del self._views[netns]

    def at(self, netns: int, node: str, ktime_ns: int) -> View:
        """Return the view of a traced namespace at a time, on the records' clock."""
        history = self.history()
        cluster = history.at(ktime_ns) if history else None
        view = self._views.get(netns)
        # Reuse the view while its parts are the same, which they are for most connections.
        if view is None or view.cluster is not cluster:
            view = self._views[netns] = self._view(netns, node, cluster)
        return view

    def cluster(self) -> Cluster | None:
        """Return the current cluster; None while there is none."""
        history = self.history()
        return history.now if history else None

    def places(self) -> dict[int, Place]:
        """Return what a recording stores about each namespace."""
        return {netns: self._recorded(netns) for netns in self._places}

    def packed_rules(self) -> dict[int, bytes]:
        """Return each namespace's rules as the tools printed them; the same object if unchanged."""
        found = {netns: self._keeper.ruleset(place).packed for netns, place in self._places.items()}
        return {netns: packed for netns, packed in found.items() if packed is not None}

    def _recorded(self, netns: int) -> Place:
        view = self._view(netns, "", None)
        rules = view.rules or Ruleset()
        return Place(
            addresses=view.addresses,
            service_addresses=view.service_addresses,
            interfaces=view.interfaces,
            device_kinds=view.device_kinds,
            proxy_mode=view.mode,
            masquerade_mark=view.masquerade_mark,
            has_masquerade_all=rules.has_masquerade_all,
            cluster_cidrs=rules.cluster_cidrs,
        )

    def close(self) -> None:
        """End the child that reads rules, and close sockets."""
        self._keeper.close()
        for watcher in self._watchers:
            watcher.close()

    def _view(self, netns: int, node: str, cluster: Cluster | None) -> View:
        place = self._places.get(netns)
        if place is None:
            return View(node=node, cluster=cluster)
        rules = self._keeper.ruleset(place)
        interfaces = self._watchers[place].snapshot()
        return View(
            node=node,
            cluster=cluster,
            rules=rules,
            addresses=interfaces.addresses,
            service_addresses=interfaces.service_addresses,
            interfaces=interfaces.names,
            device_kinds=interfaces.kinds,
            proxy_mode=self._keeper.proxy_mode(place),
            masquerade_mark=self._mark or rules.masquerade_mark or DEFAULT_MARK,
        )
