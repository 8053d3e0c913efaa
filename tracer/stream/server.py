"""
The agent's end of the live stream: clients, each with a filter and a queue.

Clients connect over a Unix socket, or over TLS through the page server's threads, which check their
tokens. Nothing here blocks the agent's loop: a client that reads too slowly loses lines, which are
counted in its summary.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from exporters.jsonl import summary_to_line, to_line
from tracer.channel import Channel, ClearChannel
from tracer.filter import Filter
from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, Summary
from tracer.pipeline import losses_and_notes
from tracer.stream import unix_socket
from tracer.stream.audience import Audience
from tracer.stream.clients import READ, WRITE, Clients
from tracer.stream.errors import StreamError
from tracer.stream.listener import Listener
from tracer.stream.mailbox import Mailbox
from tracer.stream.protocol import (
    MAX_REQUEST,
    UPGRADE,
    URL_PATH,
    error_line,
    hello_line,
    parse_end,
    parse_request,
)
from tracer.stream.recheck import AskAgain, Recheck

_log = logging.getLogger(__name__)

MAX_CLIENTS = 256
# How many bytes to receive at once over the Unix socket, and how often in a row: a client sends
# little more than a request.
_CHUNK, _CHUNKS = 64 << 10, 4
# After how many results to check which sockets are writable again.
_OFTEN = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an agent says about itself, and what was lost so far on the way to the stream."""

    version: str
    nodes: Sequence[str]
    losses: Callable[[], Mapping[str, int]]
    not_seen: Callable[[], Sequence[str]]


class StreamServer:
    """
    Sends judged things to the clients that want them.

    The socket is created at once, while the process is still root. `poll` reads and writes what it
    can without blocking; `fileno` is readable when there is work for it. `has_room` and `take_over`
    may be called by any thread, everything else only by the agent's.

    Raises:
        StreamError: If the socket cannot be created.
    """

    url_path, upgrade = URL_PATH, UPGRADE

    def __init__(
        self,
        path: Path | None,
        group: int | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            path: Path of the Unix socket; None for none.
            group: Group ID that owns the socket; None for the process's own.
            clock_s: The clock of all deadlines.
        """
        self.path = path
        self._clock_s = clock_s
        self._clients = Clients(self._forget, clock_s)
        self._audience = Audience()
        self._socket = unix_socket.listen(path, group, MAX_CLIENTS) if path else None
        self._door: Mailbox[tuple[Channel, bytes, AskAgain]] = Mailbox(MAX_CLIENTS)
        self._recheck = Recheck(MAX_CLIENTS, clock_s)
        self._clients.wake_on(self._door)
        self._clients.wake_on(self._recheck)
        if self._socket is not None:
            self._clients.wake_on(self._socket)
        self._resume_s = float("inf")
        self._offered = 0

    def fileno(self) -> int:
        """Return a descriptor that is readable when `poll` has work to do."""
        return self._clients.fileno()

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        return len(self._clients)

    @property
    def lost(self) -> int:
        """How many lines did not fit into their client's queue, since the start."""
        return self._clients.lost

    @property
    def is_ending(self) -> bool:
        """Whether any client is waiting for its summary."""
        return any(client.is_ending for client in self._clients)

    @property
    def flows(self) -> Filter | None:
        """The narrowest filter that covers every client's; None if no client wants connections."""
        filters = [
            client.wanted.flows
            for client in self._clients
            if client.wanted and not client.is_ending and client.wanted.has_connections
        ]
        return reduce(Filter.covering, filters) if filters else None

    def has_room(self) -> bool:
        """Whether one more client would be accepted."""
        return len(self._clients) + len(self._door) < MAX_CLIENTS

    def take_over(self, channel: Channel, said: bytes, ask_again: AskAgain) -> None:
        """Serve a connection that another thread accepted, and from which it read ``said``."""
        if not self._door.put((channel, said, ask_again)):
            channel.close()

    def poll(self) -> None:
        """Accept clients, read their requests, and write what their sockets accept."""
        for client, other, events in self._clients.ready():
            if client is None:
                self._look_at(other)
                continue
            if events & READ:
                self._receive(client)
            if events & WRITE and client in self._clients:
                self._clients.flush(client)
        self._clients.expire()
        if self._resume_s <= self._clock_s() and self._socket is not None:
            self._resume_s = float("inf")
            self._clients.wake_on(self._socket)

    def attach(self, origin: Origin) -> None:
        """Send a hello to new clients: from now on they get what they want."""
        waiting = [
            each
            for each in self._clients
            if each.wanted and each.selection is None and not each.is_over
        ]
        if not waiting:
            return
        losses = origin.losses()
        for client in waiting:
            self._audience.join(client)
            client.before = losses
            self._clients.put(client, hello_line(origin.version, origin.nodes))
            self._clients.flush(client)

    def offer(self, judged: Judged) -> None:
        """Send a judged thing to the clients that want it."""
        self._offered += 1
        if self._offered % _OFTEN == 0:
            self._clients.flush_ready()
        line = None
        for client in self._audience.wanting(judged):
            if line is None:
                line = to_line(judged).encode() + b"\n"
            if self._clients.offer(client, line):
                client.connections += isinstance(judged, JudgedConnection)
                client.drops += isinstance(judged, JudgedDrop)

    def flush(self) -> None:
        """Write what the clients' sockets accept."""
        self._clients.flush_all()

    def end(self, origin: Origin) -> None:
        """
        Send the summary to clients that hung up before the last `poll`.

        The caller must have offered everything that happened until then.
        """
        ending = [each for each in self._clients if each.is_ending and each.selection is not None]
        if ending:
            # Once for all of them, because it is read from the kernel.
            losses, not_seen = origin.losses(), origin.not_seen()
            for client in ending:
                self._summarize(client, losses, not_seen)
        for client in [each for each in self._clients if each.is_over and not each.has_unsent]:
            self._clients.remove(client)

    def close(self, origin: Origin) -> None:
        """Send every client its summary, as far as sockets accept it at once; remove the socket."""
        for client in list(self._clients):
            client.is_ending = True
        self.end(origin)
        self.flush()
        self._clients.close()
        for channel, _, _ in self._door.close():
            channel.close()
        self._recheck.close()
        if self._socket is not None:
            self._socket.close()
        # User nobody may not remove it; then the next start does.
        with suppress(OSError):
            if self.path is not None:
                self.path.unlink()

    # Connecting and disconnecting

    def _look_at(self, other: object) -> None:
        if other is self._door:
            for channel, said, ask_again in self._door.take():
                self._greet(channel, said, ask_again)
        elif other is self._recheck:
            for refused, (status, why) in self._recheck.refused():
                self._turn_out(refused, why, status)
        else:
            # Bounded: new clients could connect as fast as surplus ones are refused.
            for _ in range(MAX_CLIENTS):
                if not self._accept():
                    break

    def _accept(self) -> bool:
        assert self._socket is not None  # noqa: S101 - it was reported as readable
        try:
            sock, _ = self._socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            # No descriptors left. The socket stays readable: pause, or the loop would spin.
            _log.warning("cannot accept a client of the stream: %s", error.strerror)
            self._clients.sleep_on(self._socket)
            self._resume_s = self._clock_s() + 1
            return False
        self._greet(ClearChannel(sock, chunk=_CHUNK), b"")
        return True

    def _greet(self, channel: Channel, said: bytes, ask_again: AskAgain | None = None) -> None:
        client = self._clients.add(channel)
        if client is None:
            return
        if len(self._clients) > MAX_CLIENTS:
            self._refuse(client, f"{MAX_CLIENTS} clients are connected already")
            return
        if ask_again is not None and not self._watch_token(client, ask_again):
            return
        if said:
            self._hear(client, said)
        # Most clients have sent their request by now.
        self._receive(client)

    def _receive(self, client: Listener) -> None:
        for _ in range(_CHUNKS):
            if client not in self._clients:
                return
            try:
                chunk = client.channel.receive()
            except BlockingIOError:
                return
            except OSError:
                self._clients.remove(client)
                return
            if not chunk:
                self._hang_up(client)
                return
            self._hear(client, chunk)

    def _hear(self, client: Listener, chunk: bytes) -> None:
        """Handle what a client sent: a request, and later an end line."""
        if client.is_ending:
            return  # nothing that it sends matters any more
        client.inbox += chunk
        try:
            while not client.is_ending and (line := _first_line(client)) is not None:
                if client.wanted is None:
                    client.wanted = parse_request(line)
                    client.deadline_s = float("inf")
                else:
                    parse_end(line)
                    self._hang_up(client)
        except StreamError as error:
            self._refuse(client, str(error))

    def _hang_up(self, client: Listener) -> None:
        """Handle an end line or a closed connection: send no more results, only the summary."""
        if client.wanted is None:
            self._clients.remove(client)
            return
        self._clients.let_go(client)
        self._clients.stop_reading(client)

    def _watch_token(self, client: Listener, ask_again: AskAgain) -> bool:
        try:
            self._recheck.watch(client, ask_again)
        except RuntimeError as error:
            _log.warning("a client of the stream finds no thread: %s", error)
            self._refuse(client, "the agent has no thread that could check its token again")
            return False
        return True

    def _turn_out(self, client: Listener, why: str, status: int) -> None:
        """End the stream of a client whose token does not do any more."""
        if client in self._clients and not client.is_ending:
            self._refuse(client, why, status)

    def _refuse(self, client: Listener, why: str, status: int | None = None) -> None:
        self._audience.leave(client)
        self._clients.let_go(client)
        self._tell_last(client, error_line(why, status))

    def _summarize(
        self, client: Listener, losses: Mapping[str, int], not_seen: Sequence[str]
    ) -> None:
        since = {key: n - client.before.get(key, 0) for key, n in losses.items()}
        lost, untracked = losses_and_notes(since)
        summary = Summary(
            connections=client.connections,
            drops=client.drops,
            lost={**lost, "queue_full": client.lost},
            not_seen=(*not_seen, *untracked),
        )
        self._audience.leave(client)
        self._tell_last(client, summary_to_line(summary).encode() + b"\n")

    def _tell_last(self, client: Listener, line: bytes) -> None:
        self._clients.put(client, line)
        client.is_over = True
        self._clients.flush(client)

    def _forget(self, client: Listener) -> None:
        """Let go of a client whose connection is closed."""
        self._recheck.forget(client)
        self._audience.leave(client)


def _first_line(client: Listener) -> bytes | None:
    """Take the first line out of a client's inbox, if it is complete."""
    line, end, rest = client.inbox.partition(b"\n")
    if len(line) > MAX_REQUEST:
        raise StreamError(f"a request may have at most {MAX_REQUEST} bytes")
    if not end:
        return None
    client.inbox = rest
    return line
