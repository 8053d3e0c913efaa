"""
The backends: servers that answer with the client address that they see.

One process serves all hosts. Its sockets are created inside the hosts' network namespaces and stay
there. The answer is one line of JSON, over HTTP on port 8080 and over UDP on port 8053.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from lab.hosts import HTTP_PORT, UDP_PORT
from tracer.errors import LabError
from tracer.kernel import netns

_READY = b"ready\n"
_PR_SET_PDEATHSIG = 1
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
# Every address of the namespace, and nothing outside it.
_ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A backend's answer: its name, and the client that it sees."""

    pod: str
    client_address: IPv4Address | IPv6Address
    client_port: int

    def encode(self) -> bytes:
        """Return the answer as a line of JSON."""
        fields = {
            "pod": self.pod,
            "client_address": str(self.client_address),
            "client_port": self.client_port,
        }
        return json.dumps(fields).encode() + b"\n"


def decode(body: bytes) -> Answer:
    """
    Parse a backend's answer.

    Raises:
        LabError: If it is not such an answer: something else serves there.
    """
    try:
        fields = json.loads(body)
        return Answer(
            pod=fields["pod"],
            client_address=ip_address(fields["client_address"]),
            client_port=fields["client_port"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"answer {body[:60]!r} is not from an echo server of the lab") from error


@contextmanager
def serving(hosts: Mapping[str, Path]) -> Iterator[None]:
    """
    Run the echo servers of these hosts. They are ready when the block is entered.

    They die with the calling thread, however it ends.

    Args:
        hosts: The network namespace of each host.

    Raises:
        LabError: If they do not start.
    """
    command = [sys.executable, "-m", "lab.echo", str(os.getpid())]
    command += [f"{host}={path}" for host, path in hosts.items()]
    # The package may be an uninstalled checkout.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            if process.stdout is None or process.stdout.readline() != _READY:
                raise LabError("the echo servers did not start; see their message above")
            yield
        finally:
            process.kill()


def main(arguments: list[str]) -> None:
    """Serve ``PARENT HOST=NETNS ...`` until the parent process dies."""
    parent, *hosts = arguments
    die_with(int(parent))
    # Ctrl-C goes to the whole process group, but the parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with selectors.DefaultSelector() as selector:
        for host in hosts:
            name, _, path = host.partition("=")
            _listen(selector, name, Path(path))
        sys.stdout.buffer.write(_READY)
        sys.stdout.buffer.flush()
        while True:
            for key, _ in selector.select():
                key.data()


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


def _listen(selector: selectors.BaseSelector, name: str, path: Path) -> None:
    with netns.inside(path):
        for family in _FAMILIES:
            tcp = _bound(family, socket.SOCK_STREAM, HTTP_PORT)
            tcp.listen(256)
            _on_readable(selector, tcp, partial(_accept, selector, tcp, name))
            udp = _bound(family, socket.SOCK_DGRAM, UDP_PORT)
            _on_readable(selector, udp, partial(_answer_datagram, udp, name))


def _bound(family: socket.AddressFamily, kind: socket.SocketKind, port: int) -> socket.socket:
    bound = socket.socket(family, kind)
    bound.setblocking(False)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        # IPv4 has its own socket, so that no address appears as ::ffff:a.b.c.d.
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bound.bind((_ANY[family], port))
    return bound


def _on_readable(
    selector: selectors.BaseSelector, sock: socket.socket, action: Callable[[], None]
) -> None:
    selector.register(sock, selectors.EVENT_READ, action)


def _answer_datagram(sock: socket.socket, name: str) -> None:
    try:
        _, peer = sock.recvfrom(2048)
        sock.sendto(_answer(name, peer).encode(), peer)
    except OSError:
        pass  # an ICMP error for an earlier answer: that client has gone


def _accept(selector: selectors.BaseSelector, listener: socket.socket, name: str) -> None:
    try:
        connection, peer = listener.accept()
    except OSError:
        return  # the client gave up in the queue
    connection.setblocking(False)
    _on_readable(
        selector, connection, partial(_answer_request, selector, connection, _answer(name, peer))
    )


def _answer_request(
    selector: selectors.BaseSelector, connection: socket.socket, answer: Answer
) -> None:
    # A short request comes in one segment, and its contents do not matter.
    selector.unregister(connection)
    body = answer.encode()
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with connection:
        try:
            if connection.recv(65536):
                connection.sendall(head.encode() + body)
        except OSError:
            pass  # the client has gone


def _answer(name: str, peer: tuple[str, int]) -> Answer:
    # An IPv6 peer has two more fields, and a scope only if it is link-local.
    return Answer(pod=name, client_address=ip_address(peer[0]), client_port=peer[1])


if __name__ == "__main__":
    main(sys.argv[1:])
