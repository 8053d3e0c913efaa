"""kube-proxy's own word on its mode."""

import http.client
import socket
from contextlib import closing
from typing import get_args

from tracer.errors import NetnsError
from tracer.kernel.netns import Netns, inside
from tracer.ruleset.model import ProxyMode

# --metrics-bind-address; /proxyMode is installed beside the metrics (cmd/kube-proxy/app/server.go).
_PORT = 10249
_TIMEOUT_S = 0.5
_MAX_ANSWER = 64
_MODES: tuple[ProxyMode, ...] = get_args(ProxyMode)


def ask(netns: Netns) -> ProxyMode | None:
    """
    Ask the kube-proxy of a node, on localhost in its namespace; None if it does not answer.

    What answers there is not trusted: anything but the name of a mode is no answer.
    """
    try:
        with inside(netns.path):
            channel = socket.create_connection(("localhost", _PORT), timeout=_TIMEOUT_S)
    except (OSError, NetnsError):
        return None
    connection = http.client.HTTPConnection("localhost", _PORT, timeout=_TIMEOUT_S)
    connection.sock = channel
    with closing(connection):
        try:
            connection.request("GET", "/proxyMode")
            answer = connection.getresponse()
            text = answer.read(_MAX_ANSWER).decode("ascii", "replace").strip()
        except (OSError, http.client.HTTPException):
            return None
    if answer.status != http.client.OK:
        return None
    return next((mode for mode in _MODES if mode == text), None)
