"""Where judged things go: standard output in the chosen form, and the checks on what was seen."""

import sys
from dataclasses import dataclass
from typing import Protocol

import click

from exporters import jsonl
from exporters.text import TextWriter, summary_text
from tracer.judge.verdict import Judged, SeenAccept, SeenHop, Summary, Verdict

EXIT_UNEXPECTED, EXIT_NOTHING_SEEN = 3, 4


class Writer(Protocol):
    """Writes judged things as they come, and the summary at the end."""

    def write(self, judged: Judged) -> None:
        """Write one."""

    def end(self, summary: Summary) -> None:
        """Write the summary."""


class _Table:
    """Rows on standard output, the summary on standard error."""

    def __init__(self, *, is_explaining: bool) -> None:
        self._text = TextWriter(sys.stdout, is_explaining=is_explaining)

    def write(self, judged: Judged) -> None:
        self._text.write(judged)

    def end(self, summary: Summary) -> None:
        for line in summary_text(summary):
            click.echo(line, err=True)


class _JsonLines:
    """Everything on standard output, one object a line."""

    def write(self, judged: Judged) -> None:
        print(jsonl.to_line(judged), flush=True)

    def end(self, summary: Summary) -> None:
        print(jsonl.summary_to_line(summary), flush=True)


def writer(form: str, *, is_explaining: bool) -> Writer:
    """Return the writer for ``--output`` and ``--explain``; JSON always explains."""
    return _JsonLines() if form == "json" else _Table(is_explaining=is_explaining)


@dataclass(slots=True)
class Expectation:
    """What ``--expect`` asked for, and whether it has held so far."""

    verdict: Verdict | None
    seen: int = 0
    unexpected: int = 0

    @classmethod
    def of(cls, text: str | None) -> "Expectation":
        """Take the value of ``--expect``."""
        return cls(Verdict(text) if text else None)

    def look_at(self, judged: Judged) -> None:
        """Take one judged thing into account; accepts and hops have no verdict."""
        if isinstance(judged, SeenAccept | SeenHop):
            return
        self.seen += 1
        if self.verdict is not None and judged.verdict is not self.verdict:
            self.unexpected += 1

    def exit_code(self) -> int:
        """Return 0, or what the contract says for a broken or an unchecked expectation."""
        if self.verdict is None:
            return 0
        if self.unexpected:
            click.echo(
                f"expected {self.verdict}: {self.unexpected} of {self.seen} had another verdict",
                err=True,
            )
            return EXIT_UNEXPECTED
        if not self.seen:
            click.echo(f"expected {self.verdict}: nothing was seen", err=True)
            return EXIT_NOTHING_SEEN
        return 0
