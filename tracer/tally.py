"""Totals by labels, with a bound on the number of series."""

from collections.abc import Callable
from typing import Generic, TypeVar

from exporters.prometheus import ConnectionLabels, DropLabels

Labels = TypeVar("Labels", ConnectionLabels, DropLabels)

OTHER = "other"
# How long to keep the series of a Service that was deleted.
KEEP_S = 600.0


class Tally(Generic[Labels]):
    """Totals by labels, which only grow, in a bounded number of series."""

    def __init__(self, other: Labels, max_series: int) -> None:
        """
        Args:
            other: The labels of the series for everything beyond the bound.
            max_series: How many other series there may be.
        """
        self.totals: dict[Labels, int] = {}
        self.overflow = 0
        self._other: Labels = other
        self._max_series = max_series
        self._gone_since_s: dict[tuple[str, str], float] = {}

    def add(self, labels: Labels, count: int) -> None:
        """Add to a series; beyond the bound, to the series for the rest."""
        has_room = len(self.totals) - (self._other in self.totals) < self._max_series
        if labels not in self.totals and not has_room:
            labels = self._other
        if labels == self._other:
            self.overflow += count
        self.totals[labels] = self.totals.get(labels, 0) + count

    def forget_gone(self, is_there: Callable[[str, str], bool], now_s: float) -> None:
        """Remove the series of Services that were deleted `KEEP_S` ago."""
        services = {(labels[0], labels[1]) for labels in self.totals if labels[0] and labels[1]}
        gone = {service for service in services if service[0] != OTHER and not is_there(*service)}
        since_s = {service: self._gone_since_s.get(service, now_s) for service in gone}
        over = {service for service, at_s in since_s.items() if now_s - at_s >= KEEP_S}
        self._gone_since_s = {each: at_s for each, at_s in since_s.items() if each not in over}
        if over:
            kept = {k: v for k, v in self.totals.items() if (k[0], k[1]) not in over}
            self.totals = kept
