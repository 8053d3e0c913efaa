"""Where records come from: the kernel, conntrack, or a recording."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """
    What is needed to read records and is not in them.

    ``clock_offset_ns`` added to a record's ``ktime_ns`` gives Unix time. ``nodes`` names the node
    of a namespace by its inode. ``drop_reasons`` are the numbers of the kernel that wrote the
    records. ``rung`` says how it was done, ``not_seen`` what it cannot show. ``has_proxy_headers``
    says that first bytes are read: a TCP connection may be followed by what they declare.
    """

    clock_offset_ns: int
    nodes: Mapping[int, str]
    drop_reasons: Mapping[int, str] = field(default_factory=dict)
    rung: str
    not_seen: Sequence[str] = ()
    has_proxy_headers: bool = False


class Source(Protocol):
    """A stream of wire records, in the order in which they happened."""

    @property
    def info(self) -> SourceInfo:
        """How to read the records."""

    def read(self, timeout_s: float) -> list[bytes] | None:
        """
        Return the next records; none if nothing came in time, None when the source has ended.

        Raises:
            TracerError: If the source cannot go on.
        """

    def lost(self) -> Mapping[str, int]:
        """What was lost before it could be read, by reason, since the start."""

    def symbol(self, address: int) -> str | None:
        """Name the function of the traced kernel that an address belongs to."""

    def close(self) -> None:
        """Release everything. Reading afterwards is an error."""
