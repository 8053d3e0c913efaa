"""Whole paths as a table for people: one row each, with the nodes on the way."""

from collections.abc import Iterator
from typing import IO

from exporters.path_words import client_of
from exporters.sketch import Mark, Role, Station, sketch
from exporters.stacked import StackedRows, rows_on
from exporters.terminal import Screen, printable
from exporters.text import (
    ENDPOINT,
    VERDICT_COLOURS,
    cause_text,
    clock_text,
    ends,
    explanation,
    service_text,
)
from tracer.judge.path import Path
from tracer.model import protocol_name

_COLUMNS = {
    "TIME": 12,
    "VERDICT": 9,
    "PROTO": 5,
    "CLIENT": ENDPOINT,
    "SENT TO": ENDPOINT,
    "THROUGH": 22,
    "BACKEND SEES": ENDPOINT,
    "BACKEND": ENDPOINT,
    "SERVICE": 24,
    "CAUSE": 5,
}


class PathTable:
    """
    Prints paths as rows. Times are UTC, as in the JSON.

    ``is_explaining`` adds evidence and advice under each row, and what was not seen. On a
    ``screen`` narrower than a row, a row takes a few short lines.
    """

    def __init__(
        self, stream: IO[str], *, is_explaining: bool = False, screen: Screen | None = None
    ) -> None:
        self._is_explaining = is_explaining
        self._table = rows_on(stream, _COLUMNS, VERDICT_COLOURS, screen)

    def write(self, path: Path) -> None:
        """Print one row."""
        cells = _cells(path)
        if isinstance(self._table, StackedRows):
            # Where other rows have the node, a path has the nodes on the way.
            cells.insert(1, cells.pop(list(_COLUMNS).index("THROUGH")))
        self._table.row(cells)
        if not self._is_explaining:
            return
        opinion = path.deciding.opinion
        lines = explanation(opinion) if opinion else []
        lines += [printable(f"not seen {line}") for line in path.missing]
        for line in lines:
            self._table.note(f"    {line}")


def through(path: Path) -> str:
    """
    Return the nodes on the way, and where the source was replaced.

    A node that must be there but reported nothing is in brackets.
    """
    stations = sketch(path).stations
    nodes = [each for each in stations if each.role is Role.NODE or _is_unseen_node(each)]
    return " -> ".join(_node(station) for station in nodes)


def _is_unseen_node(station: Station) -> bool:
    return station.role is Role.UNSEEN and station.name != "client"


def _node(station: Station) -> str:
    name = station.name
    if station.role is Role.UNSEEN:
        # A node without a name is shown as unknown.
        name = f"({'?' if name == 'node' else name})"
    return " ".join([name, *_marks(station)])


def _marks(station: Station) -> Iterator[str]:
    if station.role is Role.NODE and any(note.mark is Mark.SNAT for note in station.notes):
        yield "(SNAT)"
    if station.drop is not None:
        yield "(X)"


def _cells(path: Path) -> list[str]:
    _, sent_to = ends(path.orig)
    deciding = path.deciding
    judged = deciding.drop or deciding.judged
    opinion = deciding.opinion
    seen, backend = ends(path.backend) if path.backend else ("-", "-")
    last = path.legs[-1].judged
    if path.backend and last is not None and last.backend_pod is not None:
        name = f"{last.backend_pod.namespace}/{last.backend_pod.name}"
        backend = name if path.backend.is_icmp else f"{name}:{path.backend.dport}"
    return [
        clock_text(path.time_ns),
        path.verdict,
        protocol_name(path.orig.proto),
        client_of(path),
        sent_to,
        through(path),
        seen,
        backend,
        service_text(opinion) if opinion else "-",
        cause_text(judged) if judged else "-",
    ]
