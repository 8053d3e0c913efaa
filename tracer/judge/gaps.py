"""Which nodes on a path reported nothing of it."""

from collections.abc import Collection, Iterator

from tracer.cluster.index import Cluster
from tracer.cluster.match import PodRef
from tracer.judge.path import Direction, Ending, Leg
from tracer.judge.verdict import Verdict
from tracer.model import IPAddress

_ENDS = (Ending.DELIVERED, Ending.DROPPED)


def gaps(first: Leg, last: Leg, cluster: Cluster | None, nodes: Collection[str]) -> tuple[str, ...]:
    """
    Return what is not known of a path, one string per line.

    Args:
        first: The first known leg.
        last: The last known leg.
        cluster: The owners of pods and addresses; None to go by what the judge found.
        nodes: The nodes that reported anything at all.
    """
    return (*_before(first, cluster, nodes), *_after(last, cluster, nodes))


def _before(leg: Leg, cluster: Cluster | None, nodes: Collection[str]) -> Iterator[str]:
    source = leg.orig.src
    pod, node = _home(source, cluster)
    is_elsewhere = node not in (None, leg.node) and _is_known(leg, cluster)
    if leg.verdict is Verdict.REPLACED_UPSTREAM:
        owner = f"{node}, {_who(node, nodes)}" if node and is_elsewhere else "another node"
        yield f"what happened before {leg.node}: {source} belongs to {owner}"
    elif node and is_elsewhere:
        client = f"the client {_name(pod)} runs on" if pod else f"{source} belongs to"
        yield f"what happened before {leg.node}: {client} {node}, {_who(node, nodes)}"


def _after(leg: Leg, cluster: Cluster | None, nodes: Collection[str]) -> Iterator[str]:
    passage = leg.passage(Direction.ORIGINAL)
    if leg.drop is not None or (passage is not None and passage.ending in _ENDS):
        return
    if leg.reply is None:
        yield f"what became of the packet on {leg.node}: conntrack has no entry for it"
        return
    target = leg.reply.src
    pod, node = _home(target, cluster)
    if leg.judged is not None and leg.judged.backend_pod is not None:
        pod = leg.judged.backend_pod
        node = pod.node
    if node is None or node == leg.node or not _is_known(leg, cluster):
        return
    where = f"where the backend {_name(pod)} runs" if pod else f"which has the address {target}"
    yield f"what happened on {node}, {where}: it {_traced(node, nodes)}"


def _home(address: IPAddress, cluster: Cluster | None) -> tuple[PodRef | None, str | None]:
    """Return the pod at an address, and the node that runs it or has the address."""
    if cluster is None:
        return None, None
    pod = cluster.pod_at(address)
    if pod is not None:
        return pod, pod.node
    return None, cluster.node_of(address) or cluster.node_of_pod_address(address)


def _is_known(leg: Leg, cluster: Cluster | None) -> bool:
    """Whether the cluster knows a leg's node: else it may be any node, under another name."""
    return cluster is None or cluster.node(leg.node) is not None


def _who(node: str, nodes: Collection[str]) -> str:
    return f"which {_traced(node, nodes)}"


def _traced(node: str, nodes: Collection[str]) -> str:
    return "did not report the connection" if node in nodes else "was not traced"


def _name(pod: PodRef) -> str:
    return f"{pod.namespace}/{pod.name}"
