"""
A path as a picture in plain text, as the Kubernetes tutorial "Using Source IP" draws it.

    client --> node2 --> node1 --> default/p11
               SNAT at node2
"""

import textwrap
from collections.abc import Iterator, Sequence

from exporters.path_words import packet_text
from exporters.sketch import Mark, Role, Sketch, Station, sketch
from exporters.terminal import paint, printable
from exporters.text import VERDICT_COLOURS
from exporters.ways import Crossing, HopRow, Way, ways
from tracer.judge.path import Path

WIDTH = 100
_ARROW = " --> "
_COMMAND = "kubectl "
_INDENT = "    "
# As wide as what precedes a hop's place.
_AT = " " * 17


def diagram_lines(
    path: Path, *, is_detailed: bool, width: int = WIDTH, has_colour: bool = False
) -> list[str]:
    """
    Return a path as lines that are safe for a terminal.

    Args:
        path: The path.
        is_detailed: Whether to add evidence and advice, and a line for each hop.
        width: The most columns; longer lines are wrapped.
        has_colour: Whether to use colours (`exporters.terminal.has_colour`).
    """
    pen = _Pen(max(width, 40), has_colour=has_colour)
    drawn = sketch(path)
    pen.picture(drawn)
    pen.line("")
    pen.text(drawn.headline, colour=VERDICT_COLOURS[drawn.verdict])
    pen.facts(drawn.facts)
    if drawn.rule and not is_detailed:
        pen.facts([("rule", drawn.rule)])
    pen.wires(drawn)
    for line in drawn.missing:
        pen.text(f"not seen: {line}", colour="cyan")
    if is_detailed:
        pen.facts(drawn.reasons)
        for way in ways(path):
            pen.way(way)
    return pen.lines


class _Pen:
    """Writes lines of bounded width, and escapes untrusted text."""

    def __init__(self, width: int, *, has_colour: bool) -> None:
        self.lines: list[str] = []
        self._width = width
        self._has_colour = has_colour

    def line(self, text: str, colour: str | None = None) -> None:
        """Write a line that is known to fit."""
        text = text.rstrip()
        self.lines.append(paint(text, colour) if colour and text and self._has_colour else text)

    def text(self, text: str, *, indent: str = "", colour: str | None = None) -> None:
        """Write a text, on as many lines as it takes."""
        for line in self._wrapped(text, indent, indent + _INDENT):
            self.line(line, colour)

    def picture(self, drawn: Sketch) -> None:
        """Draw the stations in a row, or one below the other if they do not fit."""
        names = [printable(_label(station)) for station in drawn.stations]
        notes = list(_row_notes(drawn.stations, names))
        widths = [at + len(text) for at, text, _ in notes] + [len(_ARROW.join(names))]
        if max(widths) > self._width:
            self._column(drawn.stations)
            return
        self.line(_ARROW.join(names), "red" if drawn.stations[-1].drop else None)
        for at, text, mark in notes:
            self.line(" " * at + text, mark.colour)

    def _column(self, stations: Sequence[Station]) -> None:
        for i, station in enumerate(stations):
            arrow = _ARROW[1:] if i else ""
            self.text(arrow + _label(station), indent="  " if i else "")
            for note in station.notes:
                if note.mark not in (Mark.DROPPED, Mark.DNAT):
                    self.text(note.text, indent=" " * 6, colour=note.mark.colour)

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Write labels and their texts, one below the other."""
        for label, text in facts:
            if text.startswith(_COMMAND):
                # A wrapped command would be two commands when pasted.
                self.line(f"{label:<10}{printable(text)}")
                continue
            for line in self._wrapped(text, f"{label:<10}", " " * 10):
                self.line(line)

    def wires(self, drawn: Sketch) -> None:
        """Write the packet between each pair of stations."""
        self.line("")
        names = [printable(_short(station)) for station in drawn.stations]
        pairs = list(zip(names, names[1:], drawn.wires, strict=False))
        heads = [f"{here} to {there}" for here, there, wire in pairs if wire]
        packets = [printable(packet_text(wire)) for *_, wire in pairs if wire]
        self._columns(heads, packets)

    def way(self, way: Way) -> None:
        """Write one direction: its hops, node by node."""
        self.line("")
        self.line(way.title, "bold")
        for crossing in way.crossings:
            self._crossing(crossing)
        if way.outcome:
            self.text(way.outcome, indent="  ")

    def _crossing(self, crossing: Crossing) -> None:
        self.text(crossing.node, indent="  ", colour="bold")
        for note in crossing.notes:
            self.text(note, indent=_INDENT)
        width = self._place_width(crossing.rows)
        for row in crossing.rows:
            self._row(row, width)
        self.text(
            crossing.ending,
            indent=_INDENT,
            colour=VERDICT_COLOURS["dropped"] if crossing.is_dropped else None,
        )

    def _place_width(self, rows: Sequence[HopRow]) -> int:
        """Return the width of the places such that packets fit beside them."""
        packets = max((len(printable(row.packet)) for row in rows), default=0)
        places = [len(printable(row.place)) for row in rows]
        return max((n for n in places if len(_AT) + n + 2 + packets <= self._width), default=0)

    def _row(self, row: HopRow, width: int) -> None:
        place, texts = printable(row.place), [printable(row.packet), *filter(None, [row.mark])]
        head = f"{_INDENT}{row.at:>11}  {place:<{width}}"
        if len(place) > width:
            self.text(place, indent=head[: len(_AT)])
            head = " " * (len(_AT) + width)
        while texts and len(f"{head}  {texts[0]}") <= self._width:
            head = f"{head}  {texts.pop(0)}"
        if head.strip():
            self.line(head)
        for text in texts:
            self.text(text, indent=_AT)
        for change in row.changes:
            self.text(f"* {change}", indent=_AT, colour="yellow")

    def _columns(self, heads: Sequence[str], texts: Sequence[str]) -> None:
        """Write two columns, or one below the other if they do not fit side by side."""
        width = max(map(len, heads), default=0)
        fits = all(width + 2 + len(text) <= self._width for text in texts)
        for head, text in zip(heads, texts, strict=True):
            if fits:
                self.line(f"{head:<{width}}  {text}")
            else:
                self.text(head)
                self.text(text, indent=_INDENT)

    def _wrapped(self, text: str, first: str, later: str) -> list[str]:
        return textwrap.wrap(
            printable(text),
            self._width,
            initial_indent=first,
            subsequent_indent=later,
            break_on_hyphens=False,
        ) or [first]


def _label(station: Station) -> str:
    """Return a station's name in the row of arrows, in brackets if it was not traced."""
    if station.drop is not None:
        return f"{station.name}: X ({station.drop.text})"
    return _short(station)


def _short(station: Station) -> str:
    if station.role is not Role.UNSEEN:
        return station.name
    if station.has_name:
        return f"({station.name})"
    # A node without a name is shown by its address.
    return f"({station.detail})" if station.name == "node" else f"{station.name}?"


def _row_notes(
    stations: Sequence[Station], names: Sequence[str]
) -> Iterator[tuple[int, str, Mark]]:
    """Yield the notes under the row: column, text and mark."""
    at = 0
    for station, name in zip(stations, names, strict=True):
        for note in station.notes:
            # DNAT is visible in the packets below; the picture is about the source.
            if note.mark not in (Mark.DROPPED, Mark.DNAT):
                yield at, printable(note.text), note.mark
        at += len(name) + len(_ARROW)
