"""Count what could not be decoded, and log each reason once."""

import logging
from collections import Counter

_log = logging.getLogger(__name__)

# How many reasons to distinguish: they contain values, so a damaged recording has any number.
_REASONS = 32


class Undecodable:
    """How often something could not be decoded, by reason."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: What could not be decoded, such as ``record``.
        """
        self._what = what
        self._counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """The total over all reasons."""
        return self._counts.total()

    def add(self, reason: str) -> None:
        """Count one; log the first for each reason."""
        if reason not in self._counts and len(self._counts) >= _REASONS:
            reason = "other reasons"
        self._counts[reason] += 1
        if self._counts[reason] == 1:
            _log.warning("undecodable %s: %s (further ones are counted)", self._what, reason)
