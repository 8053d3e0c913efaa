"""The first bytes of a TCP connection, reassembled from segments in any order."""

from tracer.declared.opening import LIMIT

# The most segments that wait for an earlier one, and their bytes: what a client sends is bounded.
_WAITING = 16
_WAITING_BYTES = LIMIT


class Stream:
    """
    Bytes from the first on, up to ``LIMIT``.

    Where segments overlap, the bytes that came first stay, as in the kernel's own queue.
    """

    __slots__ = ("_end", "_waiting", "data")

    def __init__(self) -> None:
        self.data = b""
        self._waiting: dict[int, bytes] = {}
        self._end: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing more can come: the limit is reached, or the peer has closed."""
        return len(self.data) >= LIMIT or (self._end is not None and len(self.data) >= self._end)

    def add(self, offset: int, payload: bytes, *, is_end: bool = False) -> bool:
        """
        Add a segment.

        Args:
            offset: Its position in the stream, in bytes.
            payload: Its bytes, as far as they were captured.
            is_end: Whether the peer closes after it.

        Returns:
            Whether there are more bytes, or an end, than before.
        """
        before = len(self.data), self._end
        if is_end and self._end is None:
            self._end = offset + len(payload)
        if offset <= len(self.data):
            self._append(offset, payload)
            self._join()
        elif offset < LIMIT:
            self._wait(offset, payload)
        return (len(self.data), self._end) != before

    def _wait(self, offset: int, payload: bytes) -> None:
        # A retransmitted segment may be longer than before.
        first = self._waiting.get(offset, b"")
        more = payload[len(first) :]
        has_room = first or len(self._waiting) < _WAITING
        if has_room and sum(map(len, self._waiting.values())) + len(more) <= _WAITING_BYTES:
            self._waiting[offset] = first + more

    def _append(self, offset: int, payload: bytes) -> None:
        self.data = (self.data + payload[len(self.data) - offset :])[:LIMIT]

    def _join(self) -> None:
        for offset in sorted(self._waiting):
            if offset > len(self.data):
                return
            self._append(offset, self._waiting.pop(offset))
