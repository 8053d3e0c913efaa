"""
The text of counters that have thousands of series.

prometheus_client takes 20 us for a line. What stands before the number never changes: it is kept.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

Encoder = Callable[[Collector], bytes]
Labels = TypeVar("Labels", bound=tuple[str, ...])
# What OpenMetrics ends with: once, after all metrics.
_EOF = b"# EOF\n"


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
        self._encoder = encoder
        self._describe = (name, text, labels)
        self._head, _ = self._encoded(())
        self._starts: dict[Labels, bytes] = {}

    def text(self, totals: Mapping[Labels, int]) -> bytes:
        """Return help, type and a line for each series."""
        added = [labels for labels in totals if labels not in self._starts]
        if added:
            self._starts.update(zip(added, self._encoded(added)[1], strict=True))
        if len(self._starts) > len(totals):
            self._starts = {labels: self._starts[labels] for labels in totals}
        starts = self._starts
        lines = [b"%s%d\n" % (starts[labels], total) for labels, total in totals.items()]
        return self._head + b"".join(lines)

    def _encoded(self, series: Iterable[Labels]) -> tuple[bytes, list[bytes]]:
        """Return what comes before all series, and what comes before the number of each."""
        name, text, names = self._describe
        family = CounterMetricFamily(name, text, labels=names)
        for labels in series:
            family.add_metric(labels, 0)
        # Not splitlines(): a carriage return in a name is not escaped.
        lines = self._encoder(Metrics([family])).removesuffix(_EOF).split(b"\n")[:-1]
        head = b"".join(line + b"\n" for line in lines if line.startswith(b"#"))
        samples = (line for line in lines if not line.startswith(b"#"))
        return head, [line[: line.rindex(b" ") + 1] for line in samples]


class Metrics(Collector):
    """Some metrics, as an encoder takes them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        yield from self._metrics
