"""Which nodes of a path told nothing of it."""

from collections.abc import Collection, Iterator

from tracer.cluster.index import Cluster
from tracer.cluster.match import PodRef
from tracer.judge.path import Direction, Ending, Leg
from tracer.judge.verdict import Verdict
from tracer.model import IPAddress

_ENDS = (Ending.DELIVERED, Ending.DROPPED)


def gaps(first: Leg, last: Leg, cluster: Cluster | None, nodes: Collection[str]) -> tuple[str, ...]:
    """
    Say what is not known of a path's way, a line each.

    Args:
        first: The first leg that is known.
        last: The last.
        cluster: Whose pods and addresses are whose; without it, what the judge found has to do.
        nodes: The nodes that told anything at all.
    """
    return (*_before(first, cluster, nodes), *_after(last, cluster, nodes))


def _before(leg: Leg, cluster: Cluster | None, nodes: Collection[str]) -> Iterator[str]:
    source = leg.orig.src
    pod, node = _home(source, cluster)
    is_elsewhere = node not in (None, leg.node) and _is_known(leg, cluster)
    if leg.verdict is Verdict.REPLACED_UPSTREAM:
        whose = (
            f"is {node}'s, {_who(node, nodes)}" if node and is_elsewhere else "is another node's"
        )
        yield f"what happened before {leg.node}: {source} {whose}"
    elif node and is_elsewhere:
        client = f"the client {_name(pod)} runs on {node}" if pod else f"{source} is {node}'s"
        yield f"what happened before {leg.node}: {client}, {_who(node, nodes)}"


def _after(leg: Leg, cluster: Cluster | None, nodes: Collection[str]) -> Iterator[str]:
    passage = leg.passage(Direction.ORIGINAL)
    if leg.drop is not None or (passage is not None and passage.ending in _ENDS):
        return
    if leg.reply is None:
        yield f"what became of it on {leg.node}: conntrack has no entry for it"
        return
    target = leg.reply.src
    pod, node = _home(target, cluster)
    if leg.judged is not None and leg.judged.backend_pod is not None:
        pod = leg.judged.backend_pod
        node = pod.node
    if node is None or node == leg.node or not _is_known(leg, cluster):
        return
    where = f"where the backend {_name(pod)} runs" if pod else f"whose address {target} is"
    why = "it told nothing of it" if node in nodes else "it was not traced"
    yield f"what happened on {node}, {where}: {why}"


def _home(address: IPAddress, cluster: Cluster | None) -> tuple[PodRef | None, str | None]:
    """Return the pod at an address, and the node that it is on or whose address it is."""
    if cluster is None:
        return None, None
    pod = cluster.pod_at(address)
    if pod is not None:
        return pod, pod.node
    return None, cluster.node_of(address) or cluster.node_of_pod_address(address)


def _is_known(leg: Leg, cluster: Cluster | None) -> bool:
    """Whether the cluster knows a leg's node: else it may be any of its nodes, by another name."""
    return cluster is None or cluster.node(leg.node) is not None


def _who(node: str, nodes: Collection[str]) -> str:
    return "which told nothing of it" if node in nodes else "which was not traced"


def _name(pod: PodRef) -> str:
    return f"{pod.namespace}/{pod.name}"
