"""Options that say where the cluster's objects come from, and opening that source."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporters.terminal import printable
from tracer.cluster import snapshot
from tracer.cluster.errors import ClusterError
from tracer.cluster.history import History
from tracer.cluster.index import Cluster
from tracer.cluster.status import ClusterStatus
from tracer.commands.options import Decorator, together
from tracer.commands.values import Mark
from tracer.judge.view import DEFAULT_MARK
from tracer.kernel import privileges, proxy_mode
from tracer.kernel.features import Check
from tracer.kernel.netns import Netns
from tracer.ruleset.model import ProxyMode
from tracer.surroundings import LiveViews
from tracer.views import FixedViews, Place

if TYPE_CHECKING:
    from tracer.cluster.watch import Watch

# How long a start waits for the API server, and after how much silence the objects count as stale:
# a healthy watch receives a bookmark about every minute.
_PATIENCE_S = 10.0
_STALE_S = 150.0
_KUBECTL = "kubectl get nodes,pods,services,endpointslices -A -o json"
NO_CLUSTER = (
    "no cluster configured (no --cluster, --kubeconfig, KUBECONFIG, service account or"
    " ~/.kube/config)"
)


def _cluster_options(*, kubeconfig: str, no_cluster: str, mode: str, mark: str) -> Decorator:
    """Return the options; the arguments complete their help, where defaults differ."""
    return together(
        click.option(
            "--cluster",
            type=click.Path(readable=False, path_type=Path),
            metavar="FILE",
            help=f"Read the cluster's objects from FILE: what '{_KUBECTL}' (or yaml) printed.",
        ),
        click.option(
            "--kubeconfig",
            type=click.Path(readable=False, path_type=Path),
            metavar="FILE",
            help=f"Read the objects of the cluster that the kubeconfig FILE names. {kubeconfig}",
        ),
        click.option(
            "--context",
            metavar="NAME",
            help="Context in the kubeconfig. Default: its current context.",
        ),
        click.option(
            "--no-cluster",
            is_flag=True,
            help=f"Use no cluster objects: judge by conntrack tuples and rules alone.{no_cluster}",
        ),
        click.option(
            "--proxy-mode",
            type=click.Choice(["auto", "iptables", "nftables", "ipvs"]),
            default="auto",
            show_default=True,
            help=f"kube-proxy's mode; {mode}",
        ),
        click.option(
            "--masquerade-mark",
            type=Mark(),
            metavar="MARK",
            help="Packet mark that kube-proxy sets on what it masquerades, such as"
            f" {DEFAULT_MARK:#x}. Default: {mark}.",
        ),
    )


cluster_options = _cluster_options(
    kubeconfig="Default: $KUBECONFIG, else the pod's service account, else ~/.kube/config.",
    no_cluster="",
    mode="auto asks kube-proxy on localhost:10249, else infers it from the rules.",
    mark=f"read from its rules, else {DEFAULT_MARK:#x}",
)
recording_cluster_options = _cluster_options(
    kubeconfig="Default: none.",
    no_cluster=" The default, unless a cluster is named.",
    mode="auto takes what was recorded.",
    mark="what was recorded",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterChoice:
    """The values of the cluster options."""

    file: Path | None
    kubeconfig: Path | None
    context: str | None
    is_off: bool
    mode: ProxyMode | None
    mark: int | None

    @classmethod
    def of(cls, options: dict[str, Any]) -> "ClusterChoice":
        """
        Take the cluster options out of a command's parameters.

        Raises:
            click.UsageError: If they contradict each other.
        """
        mode = options.pop("proxy_mode")
        choice = cls(
            file=options.pop("cluster"),
            kubeconfig=options.pop("kubeconfig"),
            context=options.pop("context"),
            is_off=options.pop("no_cluster"),
            mode=None if mode == "auto" else mode,
            mark=options.pop("masquerade_mark"),
        )
        named = [choice.file, choice.kubeconfig or choice.context, choice.is_off or None]
        if sum(each is not None for each in named) > 1:
            raise click.UsageError(
                "--cluster, --kubeconfig (or --context) and --no-cluster are mutually exclusive"
            )
        return choice

    @property
    def is_unnamed(self) -> bool:
        """Whether to look for the cluster in the default places, as kubectl and pods do."""
        named = (self.file, self.kubeconfig, self.context)
        return not self.is_off and all(each is None for each in named)


@contextmanager
def live_views(
    choice: ClusterChoice,
    namespaces: Sequence[Netns],
    *,
    is_agent: bool = False,
    is_recorded: bool = False,
) -> Iterator[LiveViews]:
    """
    Open the views of live connections. Enter it before dropping privileges.

    Args:
        choice: Where the cluster's objects are.
        namespaces: The traced namespaces.
        is_agent: Whether it runs for months: then it keeps trying a cluster that does not answer,
            and asks kube-proxy for its mode again from time to time.
        is_recorded: Whether to also keep what the rule tools print.

    Raises:
        ClusterError: If the cluster that was named cannot be read.
        NetnsError: If a namespace cannot be entered.
    """
    with ExitStack() as stack:
        modes = [choice.mode or proxy_mode.ask(netns) for netns in namespaces]
        # It forks, which must happen before the watch starts a thread.
        views = LiveViews(
            namespaces,
            proxy_modes=modes,
            masquerade_mark=choice.mark,
            follows_modes=is_agent and choice.mode is None,
            is_recorded=is_recorded,
        )
        stack.callback(views.close)
        node = namespaces[0].node if len(namespaces) == 1 else None
        patience_s = 0.0 if is_agent else _PATIENCE_S
        feed = stack.enter_context(_feed(choice, node, patience_s=patience_s))
        views.history, views.notes = feed.history, feed.notes
        views.cluster_status = feed.status
        yield views


def fixed_views(choice: ClusterChoice, places: Mapping[int, Place]) -> FixedViews:
    """
    Return the views of a recording.

    Args:
        choice: Where the cluster's objects are, if a file or kubeconfig was named.
        places: What the recording holds about its nodes, by namespace.

    Raises:
        ClusterError: If they cannot be read.
    """
    with _feed(choice, None, is_quiet=True) as feed:
        known = feed.history()
    return FixedViews(
        cluster=known.now if known else None,
        places=places,
        proxy_mode=choice.mode,
        masquerade_mark=choice.mark,
    )


def cluster_check(choice: ClusterChoice) -> Check:
    """Try to read the cluster's objects, and report the result."""
    name = "cluster objects"
    if choice.is_off:
        return Check(name=name, is_ok=False, detail="off (--no-cluster)", is_needed=False)
    if choice.is_unnamed and not has_usual_place():
        return Check(name=name, is_ok=False, detail=NO_CLUSTER, is_needed=False)
    try:
        counts = load_cluster(choice).counts
    except ClusterError as error:
        return Check(name=name, is_ok=False, detail=str(error), is_needed=False)
    return Check(
        name=name,
        is_ok=True,
        detail=f"{counts.services} Services, {counts.endpoint_slices} EndpointSlices, "
        f"{counts.nodes} Nodes, {counts.pods} Pods",
        is_needed=False,
    )


def load_cluster(choice: ClusterChoice) -> Cluster:
    """
    Return the cluster's objects as they are now.

    Raises:
        ClusterError: If they cannot be read.
    """
    if choice.is_off:
        raise ClusterError("a forecast needs the cluster's objects: leave out --no-cluster")
    if choice.file is None:
        return _watched_once(choice)
    return _load_file(choice.file)


def _load_file(path: Path) -> Cluster:
    """Read a file of objects. A kind that it lacks is told: no verdict would show that."""
    cluster = snapshot.load(path)
    counts = cluster.counts
    held = {
        "Services": counts.services,
        "EndpointSlices": counts.endpoint_slices,
        "Nodes": counts.nodes,
        "Pods": counts.pods,
    }
    missing = [f"no {kind}" for kind, count in held.items() if not count]
    if missing:
        click.echo(
            f"srcip: {printable(str(path))} holds {', '.join(missing)}: what depends on them is"
            f" missing or wrong; write it with '{_KUBECTL}'",
            err=True,
        )
    return cluster


class _Feed:
    """A cluster's recent history and its status; this one has no cluster."""

    def history(self) -> History | None:
        """Return the recent history; None while there is none."""
        return None

    def notes(self) -> tuple[str, ...]:
        """Return what is unknown about the cluster, a line each."""
        return ()

    def status(self) -> ClusterStatus:
        """Return how current the objects are."""
        return ClusterStatus()


class _FileFeed(_Feed):
    """The objects of a file."""

    def __init__(self, path: Path) -> None:
        self._history = History().add(_load_file(path), 0)

    def history(self) -> History | None:
        return self._history


class _WatchedFeed(_Feed):
    """Objects from a watch; none until every resource was listed once."""

    def __init__(self, watch: "Watch") -> None:
        self._watch = watch
        self._is_synced = False

    def history(self) -> History | None:
        self._is_synced = self._is_synced or self._watch.status.is_synced
        return self._watch.history if self._is_synced else None

    def notes(self) -> tuple[str, ...]:
        status = self._watch.status
        age_s = status.age_s(time.monotonic_ns())
        if age_s is None or (age_s < _STALE_S and status.error is None):
            return ()
        why = f": {status.error}" if status.error else ""
        return (f"changes of the cluster in the last {age_s:.0f} s{why}",)

    def status(self) -> ClusterStatus:
        status = self._watch.status
        age_s = status.age_s(time.monotonic_ns())
        missing = None
        if not status.is_synced:
            why = f": {status.error}" if status.error else ""
            missing = f"the cluster's objects are not in yet{why}"
        is_stale = age_s is not None and age_s > _STALE_S
        return ClusterStatus(missing=missing, age_s=age_s, is_stale=is_stale)


@contextmanager
def _feed(
    choice: ClusterChoice,
    node: str | None,
    *,
    is_quiet: bool = False,
    patience_s: float = _PATIENCE_S,
) -> Iterator[_Feed]:
    if choice.is_off:
        yield _Feed()
    elif choice.file is not None:
        yield _FileFeed(choice.file)
    elif is_quiet and choice.kubeconfig is None and choice.context is None:
        yield _Feed()
    else:
        yield from _watched(choice, node, patience_s)


def _watched(choice: ClusterChoice, node: str | None, patience_s: float) -> Iterator[_Feed]:
    is_named = not choice.is_unnamed
    if not is_named and not has_usual_place():
        click.echo(f"srcip: {NO_CLUSTER}; judging without it", err=True)
        yield _Feed()
        return
    # Imported late: its client takes as much memory as the tracer.
    from tracer.cluster.watch import Watch  # noqa: PLC0415

    with ExitStack() as stack:
        try:
            watch = Watch(
                kubeconfig=choice.kubeconfig,
                context=choice.context,
                node=node,
                prepare_thread=privileges.restrict_thread,
            )
            stack.enter_context(watch)
            watch.start(patience_s, partial(_tell_waiting, patience_s))
        except ClusterError as error:
            if is_named:
                raise
            # The user did not name this cluster, so it is optional.
            click.echo(f"srcip: {printable(str(error))}; judging without it", err=True)
            yield _Feed()
            return
        yield _WatchedFeed(watch)


def _tell_waiting(patience_s: float, why: str) -> None:
    click.echo(
        f"srcip: waiting up to {patience_s:g} s for the API server: {printable(why)}", err=True
    )


def has_usual_place() -> bool:
    """Whether any of the default places, as kubectl and pods use them, names a cluster."""
    if os.environ.get("KUBECONFIG") or "KUBERNETES_SERVICE_HOST" in os.environ:
        return True
    try:
        return Path("~/.kube/config").expanduser().exists()
    except (OSError, RuntimeError):
        # The home directory is unreadable or unknown: the client reports that.
        return True


def _watched_once(choice: ClusterChoice) -> Cluster:
    # Imported late, as above.
    from tracer.cluster.watch import Watch  # noqa: PLC0415

    with Watch(kubeconfig=choice.kubeconfig, context=choice.context) as watch:
        watch.start(_PATIENCE_S, partial(_tell_waiting, _PATIENCE_S))
        return watch.cluster
