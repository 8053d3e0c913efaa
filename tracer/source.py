"""The source of records, a protocol: the kernel, conntrack, or a recording."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """
    What is needed to interpret records and is not in them.

    ``clock_offset_ns`` added to a record's ``ktime_ns`` gives Unix time. ``nodes`` holds the node's
    name by the namespace's inode. ``drop_reasons`` holds names by the numbers of the kernel that
    wrote the records. ``rung`` names the kernel mechanism, ``not_seen`` what it cannot show.
    ``has_proxy_headers`` says that first bytes are read: after a TCP connection, a record may
    follow of what they declare.
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
        Return the next records; an empty list on a time-out, None when the source has ended.

        Raises:
            TracerError: If the source fails.
        """

    def lost(self) -> Mapping[str, int]:
        """What was lost before it could be read, by reason, since the start."""

    def symbol(self, address: int) -> str | None:
        """Return the name of the traced kernel's function that contains an address."""

    def close(self) -> None:
        """Release all resources. Reading afterwards is an error."""
