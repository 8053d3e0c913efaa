"""Names of kernel functions, looked up on demand."""

from collections.abc import Collection
from pathlib import Path
from typing import IO

from tracer.errors import LoadError

KALLSYMS = Path("/proc/kallsyms")
# The symbol types of code.
_FUNCTIONS = b"tTwW"


class Kallsyms:
    """
    ``/proc/kallsyms``, read once per address and never kept in memory: it has 200,000 lines.

    The kernel decides at open() whether a reader may see addresses, so open it before dropping
    privileges.
    """

    def __init__(self, path: Path = KALLSYMS) -> None:
        self._known: dict[int, str | None] = {}
        try:
            self._stream: IO[bytes] | None = path.open("rb")
        except OSError as error:
            raise LoadError(f"cannot read {path}: {error.strerror}") from error

    def function(self, address: int) -> str | None:
        """Return the function that contains an address; None if unknown."""
        if address not in self._known:
            self._known[address] = self._scan(address)
        return self._known[address]

    def addresses(self, names: Collection[str]) -> dict[str, int]:
        """Return the addresses of those of the named functions that exist."""
        found: dict[str, int] = {}
        if self._stream is None:
            return found
        wanted = {name.encode(): name for name in names}
        self._stream.seek(0)
        for line in self._stream:
            name = wanted.get(line[19:].split(None, 1)[0])
            if name is not None and line[17:18] in _FUNCTIONS:
                found.setdefault(name, int(line[:16], 16))
        return found

    def span(self, name: str) -> tuple[int, int]:
        """Return where a function of the core kernel begins and ends; zeros if there is none."""
        start = self.addresses({name}).get(name, 0)
        if not start or self._stream is None:
            return 0, 0
        self._stream.seek(0)
        # The core kernel's symbols come first, sorted by address; modules' follow.
        return start, next(filter(start.__lt__, (int(line[:16], 16) for line in self._stream)), 0)

    def close(self) -> None:
        """Close the file. Names already looked up stay known."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _scan(self, address: int) -> str | None:
        if self._stream is None:
            return None
        self._stream.seek(0)
        best, name = 0, None
        # A line holds address, type, name, and for modules "[module]". Modules are not sorted.
        for line in self._stream:
            here = int(line[:16], 16)
            if best < here <= address and line[17:18] in _FUNCTIONS:
                best, name = here, line[19:].split()[0]
        return name.decode("ascii", "replace") if name else None
