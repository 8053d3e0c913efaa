"""How many connections may be answered at once, who waits for it, and who gives way."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from socket import SHUT_RDWR, socket

# So many at once. One that has lasted for so long gives way where others wait: an honest request
# takes milliseconds, so whoever opens all of them and says nothing holds nobody else up for long.
SLOTS, GRACE_S = 32, 1.0
# Connections that wait for one.
WAITING = 256
# Threads that gave way may wait for the API server still.
THREADS = 64


class Slots:
    """Bounds the connections that have threads. Nothing waits in it but connections."""

    def __init__(self, start: Callable[[socket], bool]) -> None:
        """
        Args:
            start: Answers a connection in a thread of its own, which calls `leave` at its end;
                False if there is no thread, and then it has closed the connection.
        """
        self._start = start
        self._lock = threading.RLock()
        # In the order in which they began, and when that was.
        self._taken: dict[socket, float] = {}
        self._threads: set[socket] = set()
        self._waiting: deque[socket] = deque()

    def come(self, sock: socket) -> None:
        """Have a connection answered, now or later; where too many wait, one is closed."""
        with self._lock:
            self._waiting.append(sock)
            self.look()
            if len(self._waiting) > WAITING:
                self._waiting.popleft().close()

    def look(self) -> None:
        """Begin what there is room for; who has lasted too long makes some. To be called often."""
        with self._lock:
            self._make_room(time.monotonic() - GRACE_S)
            while self._waiting and len(self._taken) < SLOTS and len(self._threads) < THREADS:
                # The latest first: those before it have given up soonest.
                sock = self._waiting.pop()
                if self._start(sock):
                    self._taken[sock] = time.monotonic()
                    self._threads.add(sock)

    def leave(self, sock: socket) -> None:
        """Give a slot back, as often as one likes."""
        with self._lock:
            self._taken.pop(sock, None)
            self._threads.discard(sock)
            self.look()

    def close(self) -> None:
        """Forget those who wait."""
        with self._lock:
            while self._waiting:
                self._waiting.pop().close()

    def _make_room(self, before_s: float) -> None:
        # Nobody gives way to who finds no thread.
        could_begin = min(len(self._waiting), THREADS - len(self._threads))
        wanted = could_begin - (SLOTS - len(self._taken))
        for sock, since_s in list(self._taken.items())[: max(0, wanted)]:
            if since_s > before_s:
                return
            del self._taken[sock]
            # Its thread finds that the client has ended.
            with suppress(OSError):
                sock.shutdown(SHUT_RDWR)
