"""How many connections may be answered at once, and who gives way to the next."""

import threading
import time
from contextlib import suppress
from socket import SHUT_RDWR, socket

# So many at once. One that has lasted for so long gives way where others wait: an honest request
# takes milliseconds, so whoever opens all of them and says nothing holds nobody else up for long.
SLOTS, GRACE_S = 32, 1.0
# Threads that gave way may wait for the API server still.
THREADS = 64


class Slots:
    """Bounds the connections that have threads. One thread takes, each gives back its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # In the order in which they came, and when that was.
        self._taken: dict[socket, float] = {}
        self._threads: set[socket] = set()

    def take(self, sock: socket) -> bool:
        """Wait for a place; False if there is none, because too many threads have not ended."""
        with self._changed:
            while len(self._taken) >= SLOTS:
                oldest, since_s = next(iter(self._taken.items()))
                left_s = since_s + GRACE_S - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                else:
                    del self._taken[oldest]
                    # Its thread finds that the client has ended.
                    with suppress(OSError):
                        oldest.shutdown(SHUT_RDWR)
            if len(self._threads) >= THREADS:
                return False
            self._taken[sock] = time.monotonic()
            self._threads.add(sock)
            return True

    def leave(self, sock: socket) -> None:
        """Give a place back, as often as one likes."""
        with self._changed:
            self._taken.pop(sock, None)
            self._threads.discard(sock)
            self._changed.notify()
