"""Where connections come in that other threads have opened."""

import os
import threading
from collections import deque
from contextlib import suppress

from tracer.channel import Channel


class Door:
    """Keeps connections until the stream's own loop takes them, and wakes it."""

    def __init__(self, room: int) -> None:
        """
        Args:
            room: How many may wait.
        """
        self._room = room
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Channel, bytes]] = deque()
        self._is_open = True
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return a descriptor that can be read while somebody waits."""
        return self._bell

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, channel: Channel, said: bytes) -> None:
        """Wait to be taken; close the connection if there is no room, or nobody takes any more."""
        with self._lock:
            is_welcome = self._is_open and len(self._waiting) < self._room
            if is_welcome:
                self._waiting.append((channel, said))
                os.eventfd_write(self._bell, 1)
        if not is_welcome:
            channel.close()

    def take(self) -> list[tuple[Channel, bytes]]:
        """Return those who wait, with what they have said already."""
        with self._lock:
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            taken = list(self._waiting)
            self._waiting.clear()
        return taken

    def close(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._is_open = False
            waiting = list(self._waiting)
            self._waiting.clear()
            os.close(self._bell)
        for channel, _ in waiting:
            channel.close()
