"""Names of kernel functions, looked up on demand."""

from collections.abc import Collection
from pathlib import Path
from typing import IO

from tracer.errors import LoadError

KALLSYMS = Path("/proc/kallsyms")
# The types of symbols that are code.
_FUNCTIONS = b"tTwW"


class Kallsyms:
    """
    ``/proc/kallsyms``, read once per address and never kept: it has 200,000 lines.

    The kernel decides at open whether a reader may see addresses, so it is opened while we are
    still privileged.
    """

    def __init__(self, path: Path = KALLSYMS) -> None:
        self._known: dict[int, str | None] = {}
        try:
            self._stream: IO[bytes] | None = path.open("rb")
        except OSError as error:
            raise LoadError(f"cannot read {path}: {error.strerror}") from error

    def function(self, address: int) -> str | None:
        """Return the function that an address lies in; None if the kernel does not say."""
        if address not in self._known:
            self._known[address] = self._scan(address)
        return self._known[address]

    def addresses(self, names: Collection[str]) -> dict[str, int]:
        """Return the addresses of functions, without those that the kernel does not have."""
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
        """Return where a function of the core kernel begins and ends; 0 and 0 without it."""
        start = self.addresses({name}).get(name, 0)
        if not start or self._stream is None:
            return 0, 0
        self._stream.seek(0)
        # The core kernel's symbols are sorted, up to those of modules.
        return start, next(filter(start.__lt__, (int(line[:16], 16) for line in self._stream)), 0)

    def close(self) -> None:
        """Close the file. Known names stay known."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _scan(self, address: int) -> str | None:
        if self._stream is None:
            return None
        self._stream.seek(0)
        best, name = 0, None
        # Lines: address, type, name, and the module in brackets. The core kernel is sorted,
        # modules are not.
        for line in self._stream:
            here = int(line[:16], 16)
            if best < here <= address and line[17:18] in _FUNCTIONS:
                best, name = here, line[19:].split()[0]
        return name.decode("ascii", "replace") if name else None
