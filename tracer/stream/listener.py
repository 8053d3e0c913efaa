"""A client of the stream: its request, and the lines queued for it."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tracer.channel import Channel
from tracer.pipeline import Selection, Wanted

# How many bytes to write at once.
_CHUNK = 64 << 10


@dataclass(eq=False, slots=True)
class Listener:
    """
    A client.

    ``events`` are the selector events that wake the loop; ``inbox`` holds received bytes that are
    not a whole line yet. ``before`` is what was lost before it joined, ``lost`` how many lines did
    not fit into its queue. ``is_ending`` says that it gets no more results, ``is_over`` that its
    last line is queued.
    """

    channel: Channel
    deadline_s: float
    events: int
    inbox: bytes = b""
    queue: deque[bytes] = field(default_factory=deque)
    queued: int = 0
    wanted: Wanted | None = None
    selection: Selection | None = None
    before: Mapping[str, int] = field(default_factory=dict)
    connections: int = 0
    drops: int = 0
    lost: int = 0
    is_ending: bool = False
    is_over: bool = False

    @property
    def has_unsent(self) -> bool:
        """Whether anything is queued or buffered."""
        return bool(self.queue) or self.channel.has_unsent

    def put(self, line: bytes) -> None:
        """Queue a line."""
        self.queue.append(line)
        self.queued += len(line)

    def write(self) -> None:
        """
        Write everything that is queued.

        Raises:
            BlockingIOError: If the socket does not accept all of it now.
            OSError: If the client is gone.
        """
        while self.queue:
            self._write_some()
        self.channel.flush()

    def _write_some(self) -> None:
        """Write some lines at once, and requeue what was not sent."""
        lines, size = [], 0
        while self.queue and size < _CHUNK:
            lines.append(self.queue.popleft())
            size += len(lines[-1])
        chunk = b"".join(lines)
        self.queued -= size
        sent = 0
        try:
            sent = self.channel.send(chunk)
        finally:
            if sent < size:
                self.queue.appendleft(chunk[sent:])
                self.queued += size - sent
