"""Hands connections that other threads accepted to the stream's own loop."""

import os
import threading
from collections import deque
from contextlib import suppress

from tracer.channel import Channel


class Door:
    """Queues connections until the stream's own loop takes them, and wakes that loop."""

    def __init__(self, room: int) -> None:
        """
        Args:
            room: How many connections may wait.
        """
        self._room = room
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Channel, bytes]] = deque()
        self._is_open = True
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return a descriptor that is readable while a connection waits."""
        return self._bell

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, channel: Channel, said: bytes) -> None:
        """Queue a connection; close it if there is no room, or the door is closed."""
        with self._lock:
            is_welcome = self._is_open and len(self._waiting) < self._room
            if is_welcome:
                self._waiting.append((channel, said))
                os.eventfd_write(self._bell, 1)
        if not is_welcome:
            channel.close()

    def take(self) -> list[tuple[Channel, bytes]]:
        """Return the waiting connections, with what was already received on each."""
        with self._lock:
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            taken = list(self._waiting)
            self._waiting.clear()
        return taken

    def close(self) -> None:
        """Close waiting connections, and accept no more."""
        with self._lock:
            self._is_open = False
            waiting = list(self._waiting)
            self._waiting.clear()
            os.close(self._bell)
        for channel, _ in waiting:
            channel.close()
