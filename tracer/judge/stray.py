"""
Sources that are preserved to a backend whose replies do not come back.

If the node has no endpoint for policy Local, kube-proxy in IPVS mode uses those of the cluster, for
the node's own pods (syncEndpoint in pkg/proxy/ipvs/proxier.go). It does so for clients outside,
too, and does not masquerade. In the other modes such packets are dropped.
"""

from dataclasses import dataclass

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Policy
from tracer.judge.view import EXTERNAL_WAYS, View, policy_of
from tracer.model import ClientClass, Connection


@dataclass(frozen=True, slots=True)
class Detour:
    """
    The backend of a connection that left the node in spite of policy Local.

    ``node`` is the backend's; ``why`` is why its replies do not come back, None if they do.
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
    Return where a connection went in spite of policy Local, None if it stayed on the node.

    Args:
        connection: A connection whose source is preserved.
        match: What its client addressed.
        view: The node that holds it.
        client_class: The class of its client.
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
    # To reach an address on kube-ipvs0, the kernel picks that same address as source.
    if is_here and source == connection.orig.dst and match.via is not Via.NODE_PORT:
        return f"those to {source} end on {node}, which has that address, too"
    is_elsewhere = client_class in (ClientClass.EXTERNAL, ClientClass.LOADBALANCER)
    if is_elsewhere or (client_class is ClientClass.NODE and not is_here):
        return "they carry the pod's address as source, and the client ignores them"
    return None
