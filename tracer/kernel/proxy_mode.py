"""kube-proxy's own word on its mode."""

import re
import socket
from typing import get_args

from tracer.errors import NetnsError
from tracer.kernel.netns import Netns, inside
from tracer.ruleset.model import ProxyMode

# --metrics-bind-address; /proxyMode is installed beside the metrics (cmd/kube-proxy/app/server.go).
_PORT = 10249
_TIMEOUT_S = 0.5
_MAX_ANSWER = 4096
# By hand, as HTTP/1.0, which ends with the answer: the library's client brings TLS with it, 4 MiB
# that every tracer would carry for one word.
_REQUEST = b"GET /proxyMode HTTP/1.0\r\nHost: localhost\r\n\r\n"
_OK = re.compile(rb"HTTP/1\.[01] 200 ")
_MODES: tuple[ProxyMode, ...] = get_args(ProxyMode)


def ask(netns: Netns) -> ProxyMode | None:
    """
    Ask the kube-proxy of a node, on localhost in its namespace; None if it does not answer.

    What answers there is not trusted: anything but the name of a mode is no answer.
    """
    try:
        with inside(netns.path):
            channel = socket.create_connection(("localhost", _PORT), timeout=_TIMEOUT_S)
        with channel:
            channel.sendall(_REQUEST)
            answer = _read(channel)
    except (OSError, NetnsError):
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    if not _OK.match(head):
        return None
    text = body.decode("ascii", "replace").strip()
    return next((mode for mode in _MODES if mode == text), None)


def _read(channel: socket.socket) -> bytes:
    """Read until the end, or until it is too much for a word."""
    answer = b""
    while len(answer) < _MAX_ANSWER and (chunk := channel.recv(_MAX_ANSWER)):
        answer += chunk
    return answer
