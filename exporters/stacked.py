"""A table row as a few short lines, for terminals narrower than a row."""

from collections.abc import Mapping, Sequence
from typing import IO

from exporters.table import StreamingTable
from exporters.terminal import Screen, has_colour, paint, printable

# A row of IPv4 with short names. A narrower terminal would break it in the middle of words.
ROW_WIDTH = 160
_NOTHING = ("", "-")


class StackedRows:
    """
    Prints rows of `exporters.text` and `exporters.path_table`, each as up to three lines.

    First what happened, then who connected to what, then what the backend sees.
    """

    def __init__(self, stream: IO[str], colours: Mapping[str, str] | None = None) -> None:
        """
        Args:
            stream: Where to print.
            colours: The colour of each verdict.
        """
        self._stream = stream
        self._colours = dict(colours or {}) if has_colour(stream) else {}

    def row(self, cells: Sequence[str]) -> None:
        """Print a row; ``cells`` has one text for each column of the table."""
        shown = [printable(cell) for cell in cells]
        time, node, verdict, proto, client, sent_to, sees, backend, service, cause = shown
        colour = self._colours.get(verdict)
        verdict = paint(verdict, colour) if colour else verdict
        lines = [_joined("  ", time, node, verdict, proto, cause)]
        if client not in _NOTHING:
            lines.append("    " + _joined("  ", f"{client} -> {sent_to}", service))
        if sees not in _NOTHING:
            lines.append(f"    {backend} sees {sees}")
        print("\n".join(lines), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line that belongs to the row above it."""
        print(text, file=self._stream, flush=True)


def rows_on(
    stream: IO[str], columns: Mapping[str, int], colours: Mapping[str, str], screen: Screen | None
) -> StreamingTable | StackedRows:
    """Return a printer of rows for a screen or a file: aligned columns where they fit."""
    if screen is not None and screen.width < ROW_WIDTH:
        return StackedRows(stream, colours)
    return StreamingTable(stream, columns, colours, screen=screen)


def _joined(gap: str, *words: str) -> str:
    return gap.join(word for word in words if word not in _NOTHING)
