"""Makes the connections of cases in the lab, and reports what came back."""

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from lab import echo
from lab.hosts import Address
from lab.model import Outcome
from lab.scenarios import Case
from lab.topology import Lab
from tracer.errors import LabError
from tracer.kernel import netns

# How long an answer may take; in the lab it takes milliseconds. It is shorter than the
# retransmission of a SYN (1 s), so that each dropped connection is one packet, and one drop.
TIMEOUT_S = 0.9

_REQUEST = b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"
_FAMILY = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    The outcome of a connection, as its client saw it.

    Args:
        outcome: What the client got.
        client_address: The client's address as the backend printed it, None without an answer.
        client_port: The client's port as the backend printed it.
        pod: The host that answered.
        local: The client's own address and port.
    """

    outcome: Outcome
    client_address: Address | None = None
    client_port: int | None = None
    pod: str | None = None
    local: tuple[Address, int]


def run(
    lab: Lab, cases: Sequence[Case], on_answer: Callable[[Case, Answer], None] | None = None
) -> dict[Case, Answer]:
    """
    Make the connections of these cases, in rounds: cases that need other routes come later.

    Args:
        lab: A lab whose nodes have the rules of the cases' mode.
        cases: Cases of one mode.
        on_answer: Called with each answer as it comes.

    Raises:
        LabError: If a connection cannot be attempted, or something else answers it.
    """
    if len({case.mode for case in cases}) > 1:
        raise ValueError("cases of several modes cannot run together: a node has one rule set")
    answers: dict[Case, Answer] = {}

    def tell(case: Case, answer: Answer) -> None:
        answers[case] = answer
        if on_answer:
            on_answer(case, answer)

    for node, together in _rounds(cases):
        if node:
            lab.route_via(node)
        _round(lab, together, tell)
    return answers


def _rounds(cases: Sequence[Case]) -> Iterator[tuple[str | None, list[Case]]]:
    # Most cases do not depend on the router's routes. They go into the first round.
    nodes: list[str | None] = list(
        dict.fromkeys(case.scenario.through for case in cases if case.scenario.through)
    )
    first, *others = nodes or [None]
    yield first, [case for case in cases if case.scenario.through in (None, first)]
    for node in others:
        yield node, [case for case in cases if case.scenario.through == node]


def _round(lab: Lab, cases: Sequence[Case], tell: Callable[[Case, Answer], None]) -> None:
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for case in cases:
            attempt = stack.enter_context(_started(lab, case))
            selector.register(attempt.socket, selectors.EVENT_WRITE, attempt)
        deadline = time.monotonic() + TIMEOUT_S
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(max(left, 0))
            # What has arrived is read even if the caller was slow with earlier answers.
            if not ready and left <= 0:
                break
            for key, _ in ready:
                answer = key.data.advance()
                if answer:
                    selector.unregister(key.fileobj)
                    tell(key.data.case, answer)
                else:
                    selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
        for key in selector.get_map().values():
            tell(key.data.case, Answer(outcome="timeout", local=key.data.local))


@contextmanager
def _started(lab: Lab, case: Case) -> Iterator["_Attempt"]:
    kind = socket.SOCK_STREAM if case.proto == "tcp" else socket.SOCK_DGRAM
    # A socket stays in the namespace where it was created, wherever the thread goes.
    with netns.inside(lab.netns(case.host)):
        source = case.source or _source_towards(case)
        sock = socket.socket(_FAMILY[case.family], kind)
    with sock:
        sock.setblocking(False)
        try:
            sock.bind((str(source), 0))
        except OSError as error:
            raise LabError(f"{case}: cannot connect from {source}: {error.strerror}") from error
        yield _Attempt(case, sock)


def _source_towards(case: Case) -> Address:
    # The address that the kernel would pick. A refused socket forgets an address that connect()
    # picked, but not one that it was bound to. Connecting a UDP socket sends nothing.
    with socket.socket(_FAMILY[case.family], socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(case.destination), case.port))
        except OSError as error:
            raise LabError(f"{case}: no route to {case.destination}: {error.strerror}") from error
        return ip_address(sock.getsockname()[0])


class _Attempt:
    """A connection in progress, over a bound non-blocking socket."""

    def __init__(self, case: Case, sock: socket.socket) -> None:
        self.case = case
        self.socket = sock
        host, port = sock.getsockname()[:2]
        self.local = (ip_address(host), port)
        self._is_asked = False
        self._received = b""
        self._error = sock.connect_ex((str(case.destination), case.port))

    def advance(self) -> Answer | None:
        """Do what the socket is ready for; return the answer once it is complete."""
        try:
            if not self._is_asked:
                self._ask()
                return None
            chunk = self.socket.recv(4096)
        except ConnectionRefusedError:
            return Answer(outcome="refused", local=self.local)
        except OSError as error:
            raise LabError(f"{self.case}: {error.strerror}") from error
        self._received += chunk
        if chunk and self.case.proto == "tcp":
            return None
        return self._answered()

    def _ask(self) -> None:
        error = self._error if self._error != errno.EINPROGRESS else 0
        error = error or self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.socket.send(_REQUEST)
        self._is_asked = True

    def _answered(self) -> Answer:
        told = echo.decode(self._received.rpartition(b"\r\n\r\n")[2])
        return Answer(
            outcome="answered",
            client_address=told.client_address,
            client_port=told.client_port,
            pod=told.pod,
            local=self.local,
        )
