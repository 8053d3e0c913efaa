"""Output: judged connections on stdout in the chosen form, and the check of ``--expect``."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import click

from exporters import jsonl
from exporters.diagram import diagram_lines
from exporters.path_table import PathTable
from exporters.terminal import has_colour, screen_of
from exporters.text import TextWriter, summary_text
from tracer.judge.path import Path
from tracer.judge.verdict import Judged, SeenAccept, SeenHop, Summary, Verdict

EXIT_UNEXPECTED, EXIT_NOTHING_SEEN = 3, 4
# Diagrams do not get clearer when they are wider.
_WIDTH = 120


class Writer(Protocol):
    """Writes judged things or paths as they arrive, and the summary at the end."""

    def write(self, judged: Judged | Path) -> None:
        """Write one judged thing or path."""

    def end(self, summary: Summary) -> None:
        """Write the summary."""


class _Table:
    """Rows on standard output, the summary on standard error."""

    def __init__(self, *, is_explaining: bool) -> None:
        self._text = TextWriter(
            sys.stdout, is_explaining=is_explaining, screen=screen_of(sys.stdout)
        )

    def write(self, judged: Judged | Path) -> None:
        for each in _parts(judged) if isinstance(judged, Path) else (judged,):
            self._text.write(each)

    def end(self, summary: Summary) -> None:
        for line in summary_text(summary):
            click.echo(line, err=True)


def _parts(path: Path) -> Iterator[Judged]:
    """Yield what each node of a path, and its backend, reported."""
    for leg in path.legs:
        judged = leg.drop or leg.judged
        if judged is not None:
            yield judged
    if path.accept is not None:
        yield path.accept


class _PathRows:
    """A row per whole path on standard output, the summary on standard error."""

    def __init__(self, *, is_explaining: bool) -> None:
        self._table = PathTable(
            sys.stdout, is_explaining=is_explaining, screen=screen_of(sys.stdout)
        )

    def write(self, judged: Judged | Path) -> None:
        if isinstance(judged, Path):
            self._table.write(judged)

    def end(self, summary: Summary) -> None:
        for line in summary_text(summary):
            click.echo(line, err=True)


class _Diagrams:
    """Diagrams of paths on standard output, the summary on standard error."""

    def write(self, judged: Judged | Path) -> None:
        if not isinstance(judged, Path):
            return
        width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
        for line in diagram_lines(
            judged, is_detailed=True, width=width, has_colour=has_colour(sys.stdout)
        ):
            print(line)
        print(flush=True)

    def end(self, summary: Summary) -> None:
        for line in summary_text(summary):
            click.echo(line, err=True)


class _JsonLines:
    """Everything on standard output, one object per line."""

    def write(self, judged: Judged | Path) -> None:
        lines = jsonl.path_to_lines(judged) if isinstance(judged, Path) else [jsonl.to_line(judged)]
        for line in lines:
            print(line, flush=True)

    def end(self, summary: Summary) -> None:
        print(jsonl.summary_to_line(summary), flush=True)


def writer(form: str, *, is_explaining: bool) -> Writer:
    """Return the writer for ``--output``; ``is_explaining`` matters to tables only."""
    match form:
        case "json":
            return _JsonLines()
        case "diagram":
            return _Diagrams()
        case _:
            return _Table(is_explaining=is_explaining)


def path_writer(form: str, *, is_explaining: bool) -> Writer:
    """Return the writer of a command whose table rows are whole paths."""
    if form == "table":
        return _PathRows(is_explaining=is_explaining)
    return writer(form, is_explaining=is_explaining)


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

    def look_at(self, judged: Judged | Path) -> None:
        """Take one judged thing into account; accepts and hops have no verdict."""
        if isinstance(judged, SeenAccept | SeenHop):
            return
        self.seen += 1
        if self.verdict is not None and judged.verdict is not self.verdict:
            self.unexpected += 1

    def exit_code(self) -> int:
        """Return the exit code: 0, 3 if another verdict was seen, 4 if nothing was."""
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
