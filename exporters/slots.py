"""Bounds how many connections are served at once, and decides which wait and which are closed."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from socket import SHUT_RDWR, socket

# The most connections at once, and how long one may hold its slot while others wait. An honest
# request takes milliseconds: a client that opens all of them and sends nothing delays no one long.
SLOTS, GRACE_S = 32, 1.0
# Connections that wait for a slot.
WAITING = 256
# More than slots: a thread that lost its slot may still be waiting for the API server.
THREADS = 64


class Slots:
    """Bounds the connections that have threads. Its methods never block."""

    def __init__(self, start: Callable[[socket], bool]) -> None:
        """
        Args:
            start: Serves a connection in a new thread, which calls `leave` at its end. Returns
                False, with the connection closed, if there is no thread.
        """
        self._start = start
        self._lock = threading.RLock()
        # By start time, oldest first.
        self._taken: dict[socket, float] = {}
        self._threads: set[socket] = set()
        self._waiting: deque[socket] = deque()

    def come(self, sock: socket) -> None:
        """Serve a connection now or later; if too many wait, the oldest is closed."""
        with self._lock:
            self._waiting.append(sock)
            self.look()
            if len(self._waiting) > WAITING:
                self._waiting.popleft().close()

    def look(self) -> None:
        """Serve waiting connections, at the expense of those over their time. Call it often."""
        with self._lock:
            self._make_room(time.monotonic() - GRACE_S)
            while self._waiting and len(self._taken) < SLOTS and len(self._threads) < THREADS:
                # The newest first: the oldest are the most likely to have given up.
                sock = self._waiting.pop()
                if self._start(sock):
                    self._taken[sock] = time.monotonic()
                    self._threads.add(sock)

    def leave(self, sock: socket) -> None:
        """Give a slot back; may be called more than once."""
        with self._lock:
            self._taken.pop(sock, None)
            self._threads.discard(sock)
            self.look()

    def close(self) -> None:
        """Close the connections that wait."""
        with self._lock:
            while self._waiting:
                self._waiting.pop().close()

    def _make_room(self, before_s: float) -> None:
        # Take slots only for connections that would get a thread.
        could_begin = min(len(self._waiting), THREADS - len(self._threads))
        wanted = could_begin - (SLOTS - len(self._taken))
        for sock, since_s in list(self._taken.items())[: max(0, wanted)]:
            if since_s > before_s:
                return
            del self._taken[sock]
            # Its thread sees the end of the stream.
            with suppress(OSError):
                sock.shutdown(SHUT_RDWR)
