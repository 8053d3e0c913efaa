"""Ask kube-proxy for its mode, over HTTP on localhost."""

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

# The default of --metrics-bind-address, which also serves /proxyMode
# (cmd/kube-proxy/app/server.go).
_PORT = 10249
_TIMEOUT_S = 0.5
_MAX_ANSWER = 4096
# How long the child of `ask_apart` may take in all, however slow the answer.
_PATIENCE_S = 3
# Written by hand, as HTTP/1.0, where the connection ends with the answer: importing http.client
# would cost every tracer 4 MiB, for TLS.
_REQUEST = b"GET /proxyMode HTTP/1.0\r\nHost: localhost\r\n\r\n"
_OK = re.compile(rb"HTTP/1\.[01] 200 ")
_MODES: tuple[ProxyMode, ...] = get_args(ProxyMode)


def ask(netns: Netns) -> ProxyMode | None:
    """
    Ask a node's kube-proxy, on localhost in its namespace; None if it does not answer.

    The answer is not trusted: anything but the name of a mode is ignored.
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
    Ask in a child process without privileges, for a caller that keeps its own.

    Only the child's exit status comes back. Must not be called while other threads run.

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
            # Do not leave the block: returning to the old namespace needs privileges.
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
    """Read to the end, or to the limit."""
    answer = b""
    while len(answer) < _MAX_ANSWER and (chunk := channel.recv(_MAX_ANSWER)):
        answer += chunk
    return answer
