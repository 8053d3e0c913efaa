"""The endpoints that kube-proxy would use."""

from collections.abc import Iterable

from tracer.cluster.match import EndpointAddress


def usable(
    endpoints: Iterable[EndpointAddress], node: str | None = None
) -> tuple[EndpointAddress, ...]:
    """
    Return the endpoints that kube-proxy would use: all, or those on one node.

    The ready ones; if there are none, those that are terminating but still serving (KEP-1669).
    """
    known = [each for each in endpoints if node is None or each.node == node]
    ready = tuple(each for each in known if each.is_ready)
    return ready or tuple(each for each in known if each.is_serving and each.is_terminating)
