"""
A path as a picture to paste into a ticket: self-contained SVG, for light and dark mode.

It shows what the text diagram shows, from the same sketch.
"""

from collections.abc import Sequence
from itertools import pairwise

from exporters.path_words import packet_text
from exporters.sketch import Role, Sketch, Station, sketch
from exporters.svg_canvas import Canvas, Drawing, text_width, wrapped
from exporters.text import VERDICT_COLOURS, ends
from exporters.ways import Crossing, HopRow, Way, ways
from tracer.judge.path import Direction, Path
from tracer.judge.verdict import Verdict
from tracer.model import FiveTuple

_MARGIN = 28.0
_WIDTH = 1000.0
_GAP, _WIDEST, _NARROWEST = 64.0, 200.0, 116.0
_NAME, _SMALL, _ROW = 13.0, 11.0, 17.0
# A fact may be a whole rule.
_MOST_LINES = 8
_ROLES = {Role.UNSEEN: "not seen", Role.DECLARED: "declared"}
_NOT_SEEN = (Role.UNSEEN, Role.DECLARED)
_TIME, _PLACE, _WIDEST_PLACE = 82.0, 96.0, 300.0


def path_drawing(path: Path, *, is_detailed: bool) -> Drawing:
    """Return a path as a picture; ``is_detailed`` adds evidence, advice and each hop."""
    drawn, told = sketch(path), ways(path)
    picture = _Picture(len(drawn.stations))
    picture.headline(drawn)
    picture.stations(drawn, told)
    picture.wires(drawn)
    picture.facts(drawn, is_detailed=is_detailed)
    if is_detailed:
        for way in told:
            picture.way(way)
    return picture.canvas.finished(picture.y + _MARGIN - 8, title=drawn.headline)


def text_drawing(text: str) -> Drawing:
    """Return a line of text as a picture."""
    canvas = Canvas(_WIDTH)
    canvas.text(_MARGIN, 28, text, is_mono=False, colour="faint")
    return canvas.finished(44, title=text)


class _Picture:
    """Lays a picture out from top to bottom; ``y`` is where the next part begins."""

    def __init__(self, stations: int) -> None:
        least = stations * _NARROWEST + (stations - 1) * _GAP + 2 * _MARGIN
        self.canvas = Canvas(max(_WIDTH, least))
        self.y = _MARGIN
        self._inner = self.canvas.width - 2 * _MARGIN

    def headline(self, drawn: Sketch) -> None:
        """Write the verdict in its colour, and what it means here."""
        colour = VERDICT_COLOURS[drawn.verdict]
        lines = wrapped(drawn.headline, self._inner, 17, most=4, is_mono=False, is_bold=True)
        self.y = self.canvas.rows(
            _MARGIN, self.y + 14, lines,
            leading=24, colour=colour, size=17, is_mono=False, is_bold=True,
        )  # fmt: skip

    def stations(self, drawn: Sketch, told: Sequence[Way]) -> None:
        """Draw the row of boxes and arrows, what happened at each, and the reply's way back."""
        count = len(drawn.stations)
        has_drop = drawn.stations[-1].drop is not None
        room = self._inner - (count - 1 + has_drop) * _GAP
        width = min(_WIDEST, room / count)
        top, texts = self.y + 6, [_box_lines(station, width - 20) for station in drawn.stations]
        height = max(map(len, texts)) * _ROW + 18
        middle = top + height / 2
        lefts = [_MARGIN + i * (width + _GAP) for i in range(count)]
        for station, lines, left in zip(drawn.stations, texts, lefts, strict=True):
            self.canvas.box(left, top, width, height, is_dashed=station.role in _NOT_SEEN)
            y = top + 4 + (height - len(lines) * _ROW) / 2 + 8
            for text, is_name in lines:
                self.canvas.text(
                    left + width / 2, y, text, anchor="middle", is_bold=is_name,
                    size=_NAME if is_name else _SMALL, colour="ink" if is_name else "faint",
                )  # fmt: skip
                y += _ROW
        for i, (left, right) in enumerate(pairwise(lefts)):
            self._arrow(left + width, right, middle, str(i + 1))
        if has_drop:
            self._arrow(lefts[-1] + width, lefts[-1] + width + _GAP - 22, middle, "")
            self.canvas.cross(lefts[-1] + width + _GAP - 8, middle, 10)
        below = [
            self._notes(station, left, width, top + height)
            for station, left in zip(drawn.stations, lefts, strict=True)
        ]
        self.y = max(below)
        answer = next((way for way in told if way.direction is Direction.REPLY), None)
        if answer is not None and answer.crossings:
            self._answer(answer, lefts, width, top + height)
        self.y += 14

    def _arrow(self, left: float, right: float, y: float, label: str) -> None:
        self.canvas.line([(left + 4, y), (right - 10, y)])
        self.canvas.tip(right - 4, y, dx=1)
        self.canvas.text(
            (left + right) / 2, y - 8, label, anchor="middle", size=_SMALL, colour="faint",
            is_mono=False,
        )  # fmt: skip

    def _notes(self, station: Station, left: float, width: float, y: float) -> float:
        y += 20
        for note in station.notes:
            lines = wrapped(note.there, width + _GAP - 12, 12, most=5, is_mono=False, is_bold=True)
            y = self.canvas.rows(
                left + 2, y, lines,
                leading=_ROW, size=12, colour=note.mark.colour, is_mono=False, is_bold=True,
            )  # fmt: skip
        return y

    def _answer(self, way: Way, lefts: Sequence[float], width: float, top: float) -> None:
        """Draw the way back below what happened on the way there."""
        first, last = lefts[0] + width / 2 - 8, lefts[-1] + width / 2 + 8
        y = self.y + 4
        self.canvas.line(
            [(last, top + 2), (last, y), (first, y), (first, top + 12)], is_dashed=True
        )
        self.canvas.tip(first, top + 4, dy=-1)
        lines = wrapped(
            f"the reply: {way.outcome}".replace("->", "\u2192"),
            self._inner - width,
            12,
            most=3,
            is_mono=False,
        )
        self.y = self.canvas.rows(
            (first + last) / 2, y + 18, lines,
            leading=_ROW, size=12, colour="faint", is_mono=False, anchor="middle",
        )  # fmt: skip

    def wires(self, drawn: Sketch) -> None:
        """Write the packet on each arrow, with its source in green while it is the client's."""
        self.canvas.rule(self.y, _MARGIN, self._inner)
        self.y += 22
        names = [station.name for station in drawn.stations]
        # Behind a proxy or another node the first source is not the client's.
        is_first = drawn.verdict not in (Verdict.PROXIED, Verdict.REPLACED_UPSTREAM)
        client = next((wire.src for wire in drawn.wires if wire is not None and is_first), None)
        heads = [f"{here} \u2192 {there}" for here, there in pairwise(names)]
        column = min(
            _MARGIN + 24 + max((text_width(head, 12) for head in heads), default=0) + 24,
            _MARGIN + 320,
        )
        for number, (head, wire) in enumerate(zip(heads, drawn.wires, strict=True), 1):
            self._label(str(number), _MARGIN)
            length = text_width(packet_text(wire), 12) if wire else 0
            is_beside = length <= self.canvas.width - column - _MARGIN
            lines = wrapped(head, column - _MARGIN - 44 if is_beside else self._inner, 12, most=3)
            y = self.canvas.rows(_MARGIN + 24, self.y, lines, leading=_ROW, size=12)
            x = column if is_beside else _MARGIN + 24
            self.y = self.y if is_beside else y
            if wire is None:
                self.canvas.text(x, self.y, "not seen", size=12, colour="faint")
            else:
                self._packet(x, wire, is_client=wire.src == client)
            self.y = max(y, self.y + _ROW)
        self.y += 4

    def _packet(self, x: float, wire: FiveTuple, *, is_client: bool) -> None:
        source = ends(wire)[0]
        rest = packet_text(wire, "\u2192").removeprefix(source).strip()
        self.canvas.text(
            x, self.y, source, size=12, is_bold=True, colour="green" if is_client else "yellow"
        )
        self.canvas.text(x + text_width(f"{source} ", 12), self.y, rest, size=12)

    def facts(self, drawn: Sketch, *, is_detailed: bool) -> None:
        """Write what is known (cause, Service, rule), what is not, then evidence and advice."""
        rows = [(label, text, "ink") for label, text in drawn.facts]
        rows += [("rule", drawn.rule, "ink")] if drawn.rule and not is_detailed else []
        rows += [("not seen", text, "cyan") for text in drawn.missing]
        rows += [(label, text, "ink") for label, text in drawn.reasons if is_detailed]
        for label, text, colour in rows:
            self._label(label, _MARGIN)
            lines = wrapped(text, self._inner - 76, 12, most=_MOST_LINES)
            self.y = self.canvas.rows(
                _MARGIN + 76, self.y, lines, leading=_ROW, size=12, colour=colour
            )

    def _label(self, text: str, x: float) -> None:
        self.canvas.text(x, self.y, text, size=12, colour="faint", is_mono=False)

    def way(self, way: Way) -> None:
        """List one direction's hops, node by node."""
        self.canvas.rule(self.y, _MARGIN, self._inner)
        self.y += 24
        title = f"{way.title[0].upper()}{way.title[1:]}"
        self.canvas.text(_MARGIN, self.y, title, size=14, is_mono=False, is_bold=True)
        self.y += 22
        rows = [row for crossing in way.crossings for row in crossing.rows]
        widest = max((text_width(row.place, _SMALL) for row in rows), default=0)
        for crossing in way.crossings:
            self._crossing(crossing, _MARGIN + _PLACE + 16 + min(widest, _WIDEST_PLACE))
        if way.outcome:
            self._lines(way.outcome.replace("->", "\u2192"), _MARGIN, colour="faint")
        self.y += 4

    def _crossing(self, crossing: Crossing, column: float) -> None:
        name = wrapped(crossing.node, self._inner, 12, most=3)
        self.y = self.canvas.rows(_MARGIN, self.y, name, leading=_ROW, size=12, is_bold=True)
        for note in crossing.notes:
            self._lines(note, _MARGIN + _PLACE, colour="faint")
        for row in crossing.rows:
            self._row(row, column)
        colour = "red" if crossing.is_dropped else "faint"
        self._lines(crossing.ending, _MARGIN + _PLACE, colour=colour)
        self.y += 6

    def _row(self, row: HopRow, column: float) -> None:
        x = _MARGIN + _PLACE
        self.canvas.text(_MARGIN + _TIME, self.y, row.at, size=_SMALL, colour="faint", anchor="end")
        text = f"{row.packet}  {row.mark}".rstrip().replace("->", "\u2192")
        is_beside = (
            text_width(row.place, _SMALL) <= _WIDEST_PLACE
            and text_width(text, _SMALL) <= self.canvas.width - column - _MARGIN
        )
        place = wrapped(row.place, self.canvas.width - x - _MARGIN, _SMALL, most=4)
        y = self.canvas.rows(x, self.y, place, leading=_ROW, size=_SMALL)
        self.y = self.y if is_beside else y
        self._lines(text, column if is_beside else x + 16)
        for change in row.changes:
            self._lines(change.replace("->", "\u2192"), x + 16, colour="yellow")

    def _lines(self, text: str, x: float, colour: str = "ink") -> None:
        lines = wrapped(text, self.canvas.width - _MARGIN - x, _SMALL, most=4)
        self.y = self.canvas.rows(x, self.y, lines, leading=_ROW, size=_SMALL, colour=colour)


def _box_lines(station: Station, width: float) -> list[tuple[str, bool]]:
    """Return the lines of a box, and whether each is the name."""
    role = _ROLES.get(station.role, station.role.value)
    name, detail = station.name, station.detail
    if not station.has_name:
        # It is known by its address.
        what = f"{name}, {role}" if station.role in _NOT_SEEN else name
        name, detail = detail, ""
    else:
        what, detail = role, detail if detail != role else ""
    return [
        (what, False),
        *((line, True) for line in wrapped(name, width, _NAME, most=4)),
        *((line, False) for line in wrapped(detail, width, _SMALL, most=4) if detail),
    ]
