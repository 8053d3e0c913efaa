"""Rows under aligned columns, printed as they come: a column grows when a wider cell needs it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from exporters.terminal import Screen, has_colour, paint, printable

_GAP = 2
# In a file no column grows beyond this, so that one long name does not shift all other columns.
_MOST = 64


class StreamingTable:
    """
    A table whose rows are not known in advance.

    Columns start as wide as most cells need. A wider cell widens its column from there on, as long
    as rows fit the screen; otherwise it shifts the rest of its own row. The heading is printed
    once, and on a screen again when it has scrolled off.
    """

    def __init__(
        self,
        stream: IO[str],
        columns: Mapping[str, int],
        colours: Mapping[str, str] | None = None,
        *,
        screen: Screen | None = None,
    ) -> None:
        """
        Args:
            stream: Where to print.
            columns: Each column's heading and first width.
            colours: The colour of a cell, by its text.
            screen: The terminal that the stream is shown on, if it is one.
        """
        self._stream = stream
        self._headings = list(columns)
        self._widths = [max(len(heading), width) for heading, width in columns.items()]
        self._colours = dict(colours or {})
        self._has_colour = has_colour(stream)
        self._screen = screen
        self._lines_since_heading: int | None = None

    def row(self, cells: Sequence[str]) -> None:
        """Print a row; ``cells`` has one text for each column."""
        cells = [printable(cell) for cell in cells]
        # Nothing follows the last column, so it needs no alignment.
        for i, cell in enumerate(cells[:-1]):
            self._widen(i, len(cell))
        if self._needs_heading():
            self._lines_since_heading = 0
            self._print(self._headings, is_heading=True)
        self._print(cells, is_heading=False)

    def note(self, text: str) -> None:
        """Print a line that belongs to the row above it."""
        self._emit(text, len(text))

    def _widen(self, column: int, needed: int) -> None:
        more = needed - self._widths[column]
        if more <= 0:
            return
        if self._screen is None:
            self._widths[column] = min(needed, max(_MOST, self._widths[column]))
        elif sum(self._widths) + _GAP * (len(self._widths) - 1) + more <= self._screen.width:
            self._widths[column] = needed

    def _needs_heading(self) -> bool:
        if self._lines_since_heading is None:
            return True
        return self._screen is not None and self._lines_since_heading >= self._screen.height - 1

    def _print(self, cells: Sequence[str], *, is_heading: bool) -> None:
        text = "".join(self._aligned(cells, is_heading=is_heading)).rstrip()
        self._emit(text, sum(self._widths[:-1]) + _GAP * (len(cells) - 1) + len(cells[-1]))

    def _aligned(self, cells: Sequence[str], *, is_heading: bool) -> Iterator[str]:
        """Yield each cell after its padding; a cell after one that is too wide gets only a gap."""
        end = place = 0
        for cell, width in zip(cells, self._widths, strict=True):
            blank = max(place - end, _GAP if place else 0)
            yield " " * blank
            yield self._painted(cell, is_heading=is_heading)
            end += blank + len(cell)
            place += width + _GAP

    def _painted(self, cell: str, *, is_heading: bool) -> str:
        colour = "bold" if is_heading else self._colours.get(cell)
        return paint(cell, colour) if colour and cell and self._has_colour else cell

    def _emit(self, text: str, length: int) -> None:
        print(text, file=self._stream, flush=True)
        if self._lines_since_heading is not None and self._screen is not None:
            self._lines_since_heading += max(1, -(-length // self._screen.width))
