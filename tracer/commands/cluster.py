"""The options that say where the cluster's objects come from, and opening them."""

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
from tracer.commands.options import together
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

# How long a start waits for the API server, and from when on silence is worth a word. A watch that
# is well hears a bookmark about every minute.
_PATIENCE_S = 10.0
_STALE_S = 150.0
NO_CLUSTER = (
    "no cluster to ask (no --cluster, --kubeconfig, KUBECONFIG, service account or ~/.kube/config)"
)


cluster_options = together(
    click.option(
        "--cluster",
        type=click.Path(readable=False, path_type=Path),
        metavar="FILE",
        help="Read the cluster's objects from FILE: what 'kubectl get"
        " nodes,pods,services,endpointslices -A -o json' (or yaml) printed.",
    ),
    click.option(
        "--kubeconfig",
        type=click.Path(readable=False, path_type=Path),
        metavar="FILE",
        help="Watch the cluster that FILE leads to. Default: $KUBECONFIG, in a pod its service"
        " account, or ~/.kube/config.",
    ),
    click.option("--context", metavar="NAME", help="Context in the kubeconfig."),
    click.option(
        "--no-cluster", is_flag=True, help="Ask no cluster: judge by tuples and rules alone."
    ),
    click.option(
        "--proxy-mode",
        type=click.Choice(["auto", "iptables", "nftables", "ipvs"]),
        default="auto",
        show_default=True,
        help="kube-proxy's mode; auto asks it on localhost:10249, then looks at the rules.",
    ),
    click.option(
        "--masquerade-mark",
        type=Mark(),
        metavar="MARK",
        help="The bit by which kube-proxy marks what it masquerades. Default: as its rules say,"
        f" else {DEFAULT_MARK:#x}.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterChoice:
    """What the cluster options said."""

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
                "--cluster, --kubeconfig (or --context) and --no-cluster exclude each other"
            )
        return choice

    @property
    def is_unnamed(self) -> bool:
        """Whether the cluster is to be looked for where kubectl and pods find it."""
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
    Open what surrounds live connections. Enter it before privileges are dropped.

    Args:
        choice: Where the cluster's objects are.
        namespaces: What is traced.
        is_agent: Whether it is for months: a cluster that does not answer is waited for, however
            long it takes, and kube-proxy is asked again and again.
        is_recorded: Whether what the rule tools print is wanted, too.

    Raises:
        ClusterError: If the cluster that was named cannot be read.
        NetnsError: If a namespace cannot be entered.
    """
    with ExitStack() as stack:
        modes = [choice.mode or proxy_mode.ask(netns) for netns in namespaces]
        # It forks, and must do so before the watch starts a thread.
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
        places: What the recording keeps of its nodes.

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
    """Try to read the cluster's objects, and say what came of it."""
    name = "cluster objects"
    if choice.is_off:
        return Check(name=name, is_ok=False, detail="not asked for", is_needed=False)
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
        ClusterError: If there are none to be read.
    """
    if choice.is_off:
        raise ClusterError("this needs the cluster's objects: --no-cluster leaves nothing to say")
    if choice.file is None:
        return _watched_once(choice)
    return snapshot.load(choice.file)


class _Feed:
    """A cluster's recent past, and how good it is: here of none."""

    def history(self) -> History | None:
        """Return the recent past; None while there is none."""
        return None

    def notes(self) -> tuple[str, ...]:
        """Say what it cannot tell, a line each."""
        return ()

    def status(self) -> ClusterStatus:
        """Say how good it is."""
        return ClusterStatus()


class _FileFeed(_Feed):
    """The objects of a file."""

    def __init__(self, path: Path) -> None:
        self._history = History().add(snapshot.load(path), 0)

    def history(self) -> History | None:
        return self._history


class _WatchedFeed(_Feed):
    """Objects that are watched. Until all were listed once there are none."""

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
    # Its client weighs as much as the tracer: only who watches shall carry it.
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
            # Nobody asked for this cluster: it was only the usual place to look.
            click.echo(f"srcip: {printable(str(error))}; judging without it", err=True)
            yield _Feed()
            return
        yield _WatchedFeed(watch)


def _tell_waiting(patience_s: float, why: str) -> None:
    click.echo(f"srcip: waiting {patience_s:g} s at the most: {printable(why)}", err=True)


def has_usual_place() -> bool:
    """Whether there is anything at the places where kubectl and pods find their cluster."""
    if os.environ.get("KUBECONFIG") or "KUBERNETES_SERVICE_HOST" in os.environ:
        return True
    try:
        return Path("~/.kube/config").expanduser().exists()
    except (OSError, RuntimeError):
        # In a home that is closed to us, or without one: let the client say so.
        return True


def _watched_once(choice: ClusterChoice) -> Cluster:
    # As above: only who watches.
    from tracer.cluster.watch import Watch  # noqa: PLC0415

    with Watch(kubeconfig=choice.kubeconfig, context=choice.context) as watch:
        watch.start(_PATIENCE_S, partial(_tell_waiting, _PATIENCE_S))
        return watch.cluster
