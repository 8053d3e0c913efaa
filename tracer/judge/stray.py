"""
Whether a source is preserved to a backend whose answers do not come back.

kube-proxy in IPVS mode takes the cluster's endpoints where policy Local finds none on the node, for
the sake of the node's own pods (syncEndpoint in pkg/proxy/ipvs/proxier.go). It does so for clients
outside, too, and does not masquerade. In the other modes such packets are dropped.
"""

from dataclasses import dataclass

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Policy
from tracer.judge.view import EXTERNAL_WAYS, View, policy_of
from tracer.model import ClientClass, Connection


@dataclass(frozen=True, slots=True)
class Detour:
    """
    A backend that policy Local does not mean: it is on another node.

    ``why`` is why its answers do not come back; None where they do.
    """

    node: str
    why: str | None = None


def detour(
    connection: Connection,
    match: ServiceMatch | HostPortMatch | None,
    view: View,
    client_class: ClientClass | None,
) -> Detour | None:
    """
    Return where a connection went against policy Local, None if it did not.

    Args:
        connection: A connection whose source is preserved.
        match: What its client addressed.
        view: The node that holds it.
        client_class: What its client is.
    """
    if not isinstance(match, ServiceMatch) or policy_of(match) is not Policy.LOCAL:
        return None
    node = view.node_at(connection.reply.src) if connection.is_dnat else None
    if node is None or node == view.node:
        return None
    return Detour(node, _why(connection, match, view, client_class, node))


def _why(
    connection: Connection,
    match: ServiceMatch,
    view: View,
    client_class: ClientClass | None,
    node: str,
) -> str | None:
    source = connection.orig.src
    if match.via not in EXTERNAL_WAYS:
        return None
    is_here = view.is_here(source)
    # The address on kube-ipvs0 is the one that the kernel picks to reach itself.
    if is_here and source == connection.orig.dst and match.via is not Via.NODE_PORT:
        return f"answers to {source} end on {node}, which has that address, too"
    is_elsewhere = client_class in (ClientClass.EXTERNAL, ClientClass.LOADBALANCER)
    if is_elsewhere or (client_class is ClientClass.NODE and not is_here):
        return "the answers bear the pod's address: the client takes none of them"
    return None
