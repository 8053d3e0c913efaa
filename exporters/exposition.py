"""
The text of counters that have thousands of series.

prometheus_client takes 20 us for a line. What precedes the number never changes, so it is kept.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

Encoder = Callable[[Collector], bytes]
Labels = TypeVar("Labels", bound=tuple[str, ...])
# Ends OpenMetrics: once, after all metrics.
_EOF = b"# EOF\n"
# In label values, the same in both formats.
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class CounterText(Generic[Labels]):
    """A counter in one format: the encoder's own text, of which only the numbers are redone."""

    def __init__(self, encoder: Encoder, name: str, text: str, labels: tuple[str, ...]) -> None:
        """
        Args:
            encoder: The format's encoder; see `prometheus_client.exposition.choose_encoder`.
            name: The metric's name, without ``_total``.
            text: Its help text.
            labels: The names of its labels.
        """
        family = CounterMetricFamily(name, text, labels=labels)
        family.add_metric([f"<{i}>" for i in range(len(labels))], 0)
        lines = encoder(Metrics([family])).removesuffix(_EOF).decode().splitlines(keepends=True)
        start, _, _ = lines.pop().rpartition(" ")
        self._head = "".join(lines).encode()
        # The encoder orders the labels by itself.
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
    """Metrics in the form that an encoder takes."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from self._metrics
