"""kube-proxy's health check for load balancers (``healthCheckNodePort``)."""

import http.client
import json
from contextlib import closing
from dataclasses import dataclass

from tracer.kernel.netns import Netns, inside
from tracer.model import IPAddress

_MAX_ANSWER = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """
    The answer of a node's ``healthCheckNodePort``.

    ``status`` is the HTTP status, from kube-proxy 200 or 503; None if nothing answered, and
    ``error`` says why. ``local_endpoints`` is kube-proxy's count, if the answer holds it.
    """

    node: str
    status: int | None = None
    local_endpoints: int | None = None
    error: str | None = None


def probe(
    node: str, address: IPAddress, port: int, *, timeout_s: float, netns: Netns | None = None
) -> Health:
    """
    Query one node's health check. The answer is not trusted.

    Args:
        node: The node's name.
        address: One of its addresses.
        port: ``healthCheckNodePort``.
        timeout_s: How long to wait for it.
        netns: The namespace to ask from; None for the current one.
    """
    connection = http.client.HTTPConnection(str(address), port, timeout=timeout_s)
    with closing(connection):
        try:
            if netns is None:
                connection.connect()
            else:
                with inside(netns.path):
                    connection.connect()
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            body = answer.read(_MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return Health(node=node, error=reason)
    return Health(node=node, status=answer.status, local_endpoints=_local_endpoints(body))


def _local_endpoints(body: bytes) -> int | None:
    """Read ``{"localEndpoints": 1}``, as pkg/proxy/healthcheck/service_health.go writes it."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    count = answer.get("localEndpoints") if isinstance(answer, dict) else None
    return count if type(count) is int else None
