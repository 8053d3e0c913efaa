"""One who listens to the stream: what he asked for, and what waits for him."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tracer.channel import Channel
from tracer.pipeline import Selection, Wanted

# What is written at once.
_CHUNK = 64 << 10


@dataclass(eq=False, slots=True)
class Listener:
    """
    One who listens.

    ``events`` are those that wake the loop; ``inbox`` is what he said and is no whole line yet.
    ``before`` is what was lost before he came, ``lost`` what found no room in his own queue.
    ``is_ending`` says that he has heard enough, ``is_over`` that his last line waits for him.
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
        """Whether something waits for him."""
        return bool(self.queue) or self.channel.has_unsent

    def put(self, line: bytes) -> None:
        """Have a line wait."""
        self.queue.append(line)
        self.queued += len(line)

    def write(self) -> None:
        """
        Write all that waits.

        Raises:
            BlockingIOError: If he does not take all of it now.
            OSError: If he is gone.
        """
        while self.queue:
            self._write_some()
        self.channel.flush()

    def _write_some(self) -> None:
        """Write some lines at once, and keep what did not go."""
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
