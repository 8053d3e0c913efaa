"""Which endpoints kube-proxy would use."""

from collections.abc import Iterable

from tracer.cluster.match import EndpointAddress


def usable(
    endpoints: Iterable[EndpointAddress], node: str | None = None
) -> tuple[EndpointAddress, ...]:
    """
    Return the endpoints that kube-proxy would use, on one node if it is named.

    Ready ones; where there is none, those that end but still serve (KEP-1669).
    """
    known = [each for each in endpoints if node is None or each.node == node]
    ready = tuple(each for each in known if each.is_ready)
    return ready or tuple(each for each in known if each.is_serving and each.is_terminating)
