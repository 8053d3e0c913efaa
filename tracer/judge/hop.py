"""Names the interface of a hop, and the pod at its other end."""

from tracer.cluster.match import PodRef
from tracer.judge.verdict import SeenHop
from tracer.judge.view import View
from tracer.model import Hook, Hop


def see_hop(hop: Hop, view: View, *, time_ns: int) -> SeenHop:
    """
    Name the interface that a packet is on.

    Args:
        hop: The packet at one hook.
        view: The node it is on, and the cluster at that time.
        time_ns: When it was seen, in Unix time.
    """
    kind = view.device_kinds.get(hop.ifindex)
    return SeenHop(
        hop=hop,
        time_ns=time_ns,
        node=view.node,
        device=view.interfaces.get(hop.ifindex),
        device_kind=kind,
        pod=_pod(hop, view) if kind in _PAIRS else None,
    )


# Interfaces whose other end is in another network namespace: the pod's.
_PAIRS = ("veth", "netkit")


def _pod(hop: Hop, view: View) -> PodRef | None:
    """Return the pod at the other end: it sent what comes in here, or gets what goes out."""
    if hop.hook is Hook.TC_INGRESS:
        pod = view.pod_at(hop.packet.src)
    elif hop.hook is Hook.TC_EGRESS:
        pod = view.pod_at(hop.packet.dst)
    else:
        return None
    # A pod on another node is behind the node's uplink, which may be a veth, too.
    return pod if pod is not None and pod.node in (None, view.node) else None
