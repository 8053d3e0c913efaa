"""
The agent's end of the live stream: clients on a Unix socket, each with its filter and its queue.

Nothing here waits: the agent's loop calls, and whoever reads slowly loses lines of his own, which
are counted and told to him.
"""

import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

from exporters.jsonl import summary_to_line, to_line
from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, Summary
from tracer.model import Filter
from tracer.pipeline import Selection, Wanted, untold
from tracer.stream.errors import StreamError
from tracer.stream.protocol import MAX_REQUEST, error_line, hello_line, parse_request

_log = logging.getLogger(__name__)

MAX_CLIENTS = 256
# What may wait for a client, and for all of them together, in bytes. Where there are many, each
# gets his share of the latter.
QUEUE_BYTES, QUEUES_BYTES = 256 << 10, 8 << 20
# Connections whose accepts are recognized, at about half a kilobyte: for all filters together, and
# for each at the least. An accept comes a tenth of a second after its connection at the latest.
_REMEMBERED_ALL, _REMEMBERED_EACH = 8192, 64
# The kernel doubles it; what is in it has left our memory, but not the node's.
_SEND_BUFFER = 64 << 10
_CHUNK = 64 << 10
# How long a client may take to ask, to take the last lines, and to read nothing while lines wait.
_ASK_S, _LINGER_S, _STUCK_S = 10.0, 10.0, 60.0
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an agent says of itself, and how much was lost on the way to the stream so far."""

    version: str
    nodes: Sequence[str]
    losses: Callable[[], Mapping[str, int]]
    not_seen: Callable[[], Sequence[str]]


@dataclass(eq=False, slots=True)
class _Client:
    """One who listens."""

    sock: socket.socket
    deadline_s: float
    inbox: bytes = b""
    queue: deque[bytes] = field(default_factory=deque)
    queued: int = 0
    events: int = _READ
    wanted: Wanted | None = None
    selection: Selection | None = None
    before: Mapping[str, int] = field(default_factory=dict)
    connections: int = 0
    drops: int = 0
    lost: int = 0
    is_ending: bool = False


class StreamServer:
    """
    Hands judged things to those who want them.

    The socket is made at once, while we are still root. `poll` takes in and writes out what can be;
    `fileno` is readable when there is something for it to do.

    Raises:
        StreamError: If the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        group: int | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._clock_s = clock_s
        self._clients: set[_Client] = set()
        self._by_wanted: dict[Wanted, tuple[Selection, list[_Client]]] = {}
        self._lost_before = 0
        self._listener = _listen(path, group)
        self._selector = selectors.EpollSelector()
        self._selector.register(self._listener, _READ)
        self._resume_s = float("inf")

    def fileno(self) -> int:
        """Return a descriptor that can be read when `poll` has something to do."""
        return self._selector.fileno()

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    @property
    def lost(self) -> int:
        """How many lines found no room in their client's queue, since the start."""
        return self._lost_before + sum(client.lost for client in self._clients)

    @property
    def is_ending(self) -> bool:
        """Whether somebody waits for his summary."""
        return any(client.is_ending for client in self._clients)

    @property
    def flows(self) -> Filter | None:
        """The narrowest filter that covers the connections that anyone wants; None for none."""
        filters = [
            client.wanted.flows
            for client in self._clients
            if client.wanted and not client.is_ending and client.wanted.has_connections
        ]
        return reduce(Filter.covering, filters) if filters else None

    def poll(self) -> None:
        """Let clients in, read what they ask, write what they can take."""
        for key, events in self._selector.select(0):
            if key.fileobj is self._listener:
                while self._accept():
                    pass
                continue
            client: _Client = key.data
            if events & _READ:
                self._receive(client)
            if events & _WRITE and client in self._clients:
                self._flush(client)
        self._expire()

    def attach(self, origin: Origin) -> None:
        """Tell those who wait that what they want comes from now on."""
        waiting = [each for each in self._clients if each.wanted and each.selection is None]
        if not waiting:
            return
        losses = origin.losses()
        for client in waiting:
            assert client.wanted is not None  # noqa: S101 - so they were chosen
            fresh = (Selection(client.wanted), list[_Client]())
            client.selection, members = self._by_wanted.setdefault(client.wanted, fresh)
            members.append(client)
            client.before = losses
            self._share_memory()
            self._put(client, hello_line(origin.version, origin.nodes))
            self._flush(client)

    def offer(self, judged: Judged) -> None:
        """Hand a judged thing to those who want it."""
        line = None
        # Copies: who turns out to be gone is removed meanwhile.
        for selection, members in list(self._by_wanted.values()):
            if not selection.takes(judged):
                continue
            if line is None:
                line = to_line(judged).encode() + b"\n"
            for client in list(members):
                self._offer(client, line, judged)

    def flush(self) -> None:
        """Write what clients can take."""
        for client in list(self._clients):
            if client.queue and not client.events & _WRITE:
                self._flush(client)

    def end(self, origin: Origin) -> None:
        """
        Give their summary to those who hung up before the last `poll`.

        What happened until then must have been offered meanwhile.
        """
        for client in list(self._clients):
            if client.is_ending and client.selection is not None:
                self._summarize(client, origin)
        for client in [each for each in self._clients if each.is_ending and not each.queue]:
            self._remove(client)

    def close(self, origin: Origin) -> None:
        """Tell everyone the end, as far as they take it at once, and remove the socket."""
        for client in list(self._clients):
            client.is_ending = True
        self.end(origin)
        self.flush()
        for client in list(self._clients):
            self._remove(client)
        self._selector.close()
        self._listener.close()
        # As nobody we may not; then the next start does.
        with suppress(OSError):
            self.path.unlink()

    # Coming and going

    def _accept(self) -> bool:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            # No descriptors left: asking again at once would be a loop.
            _log.warning("no room for a client of the stream: %s", error.strerror)
            self._selector.unregister(self._listener)
            self._resume_s = self._clock_s() + 1
            return False
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        client = _Client(sock, self._clock_s() + _ASK_S)
        self._clients.add(client)
        self._selector.register(sock, _READ, client)
        if len(self._clients) > MAX_CLIENTS:
            self._refuse(client, f"{MAX_CLIENTS} clients are connected already")
        else:
            # Most have asked by now.
            self._receive(client)
        return True

    def _receive(self, client: _Client) -> None:
        try:
            chunk = client.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._remove(client)
            return
        if not chunk:
            self._hang_up(client)
        elif client.is_ending:
            pass  # it was told why already
        elif client.wanted is not None:
            self._refuse(client, "a client asks once")
        else:
            client.inbox += chunk
            self._read_request(client)

    def _read_request(self, client: _Client) -> None:
        line, end, rest = client.inbox.partition(b"\n")
        try:
            if not end and len(line) > MAX_REQUEST:
                raise StreamError(f"a request has {MAX_REQUEST} bytes at the most")
            if end:
                client.wanted = parse_request(line)
                client.inbox = b""
                client.deadline_s = float("inf")
                if rest:
                    raise StreamError("a client asks once")
        except StreamError as error:
            self._refuse(client, str(error))

    def _hang_up(self, client: _Client) -> None:
        """The client will say no more: it has heard enough, or is gone."""
        if client.wanted is None:
            self._remove(client)
            return
        self._leave(client)
        self._watch(client, client.events & ~_READ)

    def _refuse(self, client: _Client, why: str) -> None:
        self._forget_selection(client)
        client.selection = None
        self._leave(client)
        self._put(client, error_line(why))
        self._flush(client)

    def _leave(self, client: _Client) -> None:
        client.is_ending = True
        client.deadline_s = self._clock_s() + _LINGER_S

    def _summarize(self, client: _Client, origin: Origin) -> None:
        losses = {key: n - client.before.get(key, 0) for key, n in origin.losses().items()}
        lost, untracked = untold(losses)
        summary = Summary(
            connections=client.connections,
            drops=client.drops,
            lost={**lost, "queue_full": client.lost},
            not_seen=(*origin.not_seen(), *untracked),
        )
        self._forget_selection(client)
        client.selection = None
        self._put(client, summary_to_line(summary).encode() + b"\n")
        self._flush(client)

    def _expire(self) -> None:
        now_s = self._clock_s()
        for client in [each for each in self._clients if each.deadline_s <= now_s]:
            self._remove(client)
        if self._resume_s <= now_s:
            self._resume_s = float("inf")
            self._selector.register(self._listener, _READ)

    def _remove(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._forget_selection(client)
        self._lost_before += client.lost
        self._watch(client, 0)
        client.sock.close()

    def _forget_selection(self, client: _Client) -> None:
        if client.selection is None:
            return
        wanted = client.selection.wanted
        members = self._by_wanted[wanted][1]
        members.remove(client)
        if not members:
            del self._by_wanted[wanted]
            self._share_memory()

    def _share_memory(self) -> None:
        """Bound what all filters together remember of connections."""
        share = max(_REMEMBERED_EACH, _REMEMBERED_ALL // max(1, len(self._by_wanted)))
        for selection, _ in self._by_wanted.values():
            selection.remembered = share

    # Queues

    def _offer(self, client: _Client, line: bytes, judged: Judged) -> None:
        room = min(QUEUE_BYTES, QUEUES_BYTES // len(self._clients))
        if client.queued + len(line) > room and not client.events & _WRITE:
            self._flush(client)
        if client.queued + len(line) > room:
            client.lost += 1
            return
        client.connections += isinstance(judged, JudgedConnection)
        client.drops += isinstance(judged, JudgedDrop)
        self._put(client, line)

    def _put(self, client: _Client, line: bytes) -> None:
        if not client.queue and not client.is_ending:
            client.deadline_s = self._clock_s() + _STUCK_S
        client.queue.append(line)
        client.queued += len(line)

    def _flush(self, client: _Client) -> None:
        try:
            while client.queue:
                self._send(client)
        except BlockingIOError:
            self._watch(client, client.events | _WRITE)
        except OSError:
            self._remove(client)
        else:
            self._watch(client, client.events & ~_WRITE)
            if not client.is_ending:
                client.deadline_s = float("inf")
            elif client.selection is None:
                self._remove(client)

    def _send(self, client: _Client) -> None:
        """Write some lines at once, and keep what did not go."""
        lines, size = [], 0
        while client.queue and size < _CHUNK:
            lines.append(client.queue.popleft())
            size += len(lines[-1])
        chunk = b"".join(lines)
        client.queued -= size
        sent = 0
        try:
            sent = client.sock.send(chunk)
        finally:
            if sent < size:
                client.queue.appendleft(chunk[sent:])
                client.queued += size - sent
        if not client.is_ending:
            client.deadline_s = self._clock_s() + _STUCK_S

    def _watch(self, client: _Client, events: int) -> None:
        """Be woken by a client's socket for other reasons than before."""
        if events == client.events:
            return
        if not events:
            self._selector.unregister(client.sock)
        elif client.events:
            self._selector.modify(client.sock, events, client)
        else:
            self._selector.register(client.sock, events, client)
        client.events = events


def _listen(path: Path, group: int | None) -> socket.socket:
    """Make the socket, in place of one that an ended agent left."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        if path.is_socket():
            _remove_stale(path)
        # Nobody may connect before the group is set.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            _give(path, group)
        path.chmod(0o660)
        listener.listen(MAX_CLIENTS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StreamError(
            f"cannot listen on {path}: {error.strerror or error}; choose another with"
            " --stream-socket, or --no-stream"
        ) from error
    except StreamError:
        listener.close()
        raise
    return listener


def _give(path: Path, group: int) -> None:
    try:
        os.chown(path, -1, group)
    except PermissionError:
        path.unlink()
        raise StreamError(
            f"cannot give {path} to group {group}: it takes CAP_CHOWN, or to be a member"
        ) from None


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise StreamError(
        f"another agent listens on {path}; choose another with --stream-socket, or --no-stream"
    )
