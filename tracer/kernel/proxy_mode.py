"""kube-proxy's own word on its mode."""

import os
import re
import signal
import socket
from pathlib import Path
from typing import NoReturn, get_args

from tracer.errors import NetnsError
from tracer.kernel import privileges
from tracer.kernel.netns import Netns, inside
from tracer.ruleset.model import ProxyMode

# --metrics-bind-address; /proxyMode is installed beside the metrics (cmd/kube-proxy/app/server.go).
_PORT = 10249
_TIMEOUT_S = 0.5
_MAX_ANSWER = 4096
# What a process that asks may take altogether, however slowly it is answered.
_PATIENCE_S = 3
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
            channel = _connect()
        with channel:
            return _ask(channel)
    except (OSError, NetnsError):
        return None


def ask_apart(path: Path) -> ProxyMode | None:
    """
    Ask in a child that has given up all privileges, for a caller that keeps his.

    All that comes back is the child's exit status. Must not be called while there are threads.

    Args:
        path: The namespace.
    """
    child = os.fork()
    if child == 0:
        _ask_and_exit(path)
    _, status = os.waitpid(child, 0)
    number = os.waitstatus_to_exitcode(status)
    return _MODES[number - 1] if 1 <= number <= len(_MODES) else None


def _ask_and_exit(path: Path) -> NoReturn:
    number = 0
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_PATIENCE_S)
        with inside(path):
            privileges.drop(is_quiet=True)
            with _connect() as channel:
                mode = _ask(channel)
            number = _MODES.index(mode) + 1 if mode else 0
            # Not out of the block: there is no way home without privileges, and no need.
            os._exit(number)
    finally:
        os._exit(number)


def _connect() -> socket.socket:
    return socket.create_connection(("localhost", _PORT), timeout=_TIMEOUT_S)


def _ask(channel: socket.socket) -> ProxyMode | None:
    channel.sendall(_REQUEST)
    head, _, body = _read(channel).partition(b"\r\n\r\n")
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
