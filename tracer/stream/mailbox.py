"""Hands things from other threads to the stream's own loop."""

import os
import threading
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Mailbox(Generic[_T]):
    """Queues what other threads put in until the loop takes it, and wakes the loop."""

    def __init__(self, room: int) -> None:
        """
        Args:
            room: How many things may wait.
        """
        self._room = room
        self._lock = threading.Lock()
        self._waiting: deque[_T] = deque()
        self._is_open = True
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return a descriptor that is readable while something waits."""
        return self._bell

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, thing: _T) -> bool:
        """Queue a thing; False if there is no room, or the mailbox is closed."""
        with self._lock:
            if not self._is_open or len(self._waiting) >= self._room:
                return False
            self._waiting.append(thing)
            os.eventfd_write(self._bell, 1)
        return True

    def take(self) -> list[_T]:
        """Return what is queued, and empty the queue."""
        with self._lock:
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            return self._emptied()

    def close(self) -> list[_T]:
        """Accept no more; return what is still queued."""
        with self._lock:
            self._is_open = False
            os.close(self._bell)
            return self._emptied()

    def _emptied(self) -> list[_T]:
        taken = list(self._waiting)
        self._waiting.clear()
        return taken
