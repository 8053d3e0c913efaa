"""Rows under aligned columns, printed as they come: a column grows when a wider cell needs it."""

from collections.abc import Mapping, Sequence
from typing import IO

from exporters.terminal import has_colour, paint, printable

_GAP = "  "


class StreamingTable:
    """
    A table whose rows are not known in advance.

    Columns start as wide as most cells need. A wider cell widens its column from there on, and
    the heading is printed again, so that it stands above what it names.
    """

    def __init__(
        self, stream: IO[str], columns: Mapping[str, int], colours: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            stream: Where to print.
            columns: Each column's heading and first width.
            colours: The colour for a cell with just this text.
        """
        self._stream = stream
        self._headings = list(columns)
        self._widths = [max(len(heading), width) for heading, width in columns.items()]
        self._colours = dict(colours or {})
        self._has_colour = has_colour(stream)
        self._needs_heading = True

    def row(self, cells: Sequence[str]) -> None:
        """Print a row; ``cells`` has one text for each column."""
        cells = [printable(cell) for cell in cells]
        # The last column has nothing after it that would have to stand in line.
        for i, cell in enumerate(cells[:-1]):
            if len(cell) > self._widths[i]:
                self._widths[i] = len(cell)
                self._needs_heading = True
        if self._needs_heading:
            self._needs_heading = False
            self._print(self._headings, is_heading=True)
        self._print(cells, is_heading=False)

    def _print(self, cells: Sequence[str], *, is_heading: bool) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        padded[-1] = cells[-1]
        if self._has_colour:
            padded = [
                self._painted(text, cell, is_heading=is_heading)
                for text, cell in zip(padded, cells, strict=True)
            ]
        print(_GAP.join(padded).rstrip(), file=self._stream, flush=True)

    def _painted(self, text: str, cell: str, *, is_heading: bool) -> str:
        if is_heading:
            return paint(text, "bold")
        colour = self._colours.get(cell)
        return paint(text, colour) if colour else text
