"""What came from the kernel and could not be read: counted, and told once for each reason."""

import logging
from collections import Counter

_log = logging.getLogger(__name__)

# Reasons carry values, so a damaged recording has any number of them.
_REASONS = 32


class Undecodable:
    """How often something could not be read, by reason."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: What it was to be, such as ``record``.
        """
        self._what = what
        self._counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How often in all."""
        return self._counts.total()

    def add(self, reason: str) -> None:
        """Count one; the first for each reason has its line in the log."""
        if reason not in self._counts and len(self._counts) >= _REASONS:
            reason = "for yet other reasons"
        self._counts[reason] += 1
        if self._counts[reason] == 1:
            _log.warning("undecodable %s: %s (further ones are counted)", self._what, reason)
