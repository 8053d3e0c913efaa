"""
The text of counters that have thousands of series.

prometheus_client takes 20 us for a line. What stands before the number never changes: it is kept.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

Encoder = Callable[[Collector], bytes]
Labels = TypeVar("Labels", bound=tuple[str, ...])
# What OpenMetrics ends with: once, after all metrics.
_EOF = b"# EOF\n"
# Of label values, in both formats.
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class CounterText(Generic[Labels]):
    """A counter in one format: the encoder's own text of it, made anew only in its numbers."""

    def __init__(self, encoder: Encoder, name: str, text: str, labels: tuple[str, ...]) -> None:
        """
        Args:
            encoder: Of the format; see `prometheus_client.exposition.choose_encoder`.
            name: The metric's, without ``_total``.
            text: Its help.
            labels: The names of its labels.
        """
        family = CounterMetricFamily(name, text, labels=labels)
        family.add_metric([f"<{i}>" for i in range(len(labels))], 0)
        lines = encoder(Metrics([family])).removesuffix(_EOF).decode().splitlines(keepends=True)
        start, _, _ = lines.pop().rpartition(" ")
        self._head = "".join(lines).encode()
        # The encoder has the labels in an order of its own.
        self._order = [int(i) for i in re.findall(r"<(\d+)>", start)]
        self._start = re.sub(r"<\d+>", "%s", start)
        self._starts: dict[Labels, bytes] = {}

    def text(self, totals: Mapping[Labels, int]) -> bytes:
        """Return help, type and a line for each series."""
        if self._starts.keys() != totals.keys():
            # Thousands of series share a handful of values.
            escaped = {each: each.translate(_ESCAPES) for each in set(chain.from_iterable(totals))}
            self._starts = {
                labels: self._starts.get(labels) or self._new(labels, escaped) for labels in totals
            }
        starts = self._starts
        lines = [b"%s %d\n" % (starts[labels], total) for labels, total in totals.items()]
        return self._head + b"".join(lines)

    def _new(self, labels: Labels, escaped: Mapping[str, str]) -> bytes:
        return (self._start % tuple(escaped[labels[i]] for i in self._order)).encode(
            errors="backslashreplace"
        )


class Metrics(Collector):
    """Some metrics, as an encoder takes them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        yield from self._metrics
