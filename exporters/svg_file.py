"""A file of pictures, one below the other: what ``--diagram-file`` writes."""

import contextlib
from collections.abc import Mapping
from typing import IO

from exporters.svg import path_drawing, text_drawing
from exporters.svg_canvas import Drawing, stacked
from tracer.errors import TracerError
from tracer.judge.path import Path

# Nobody looks at more.
MOST_PICTURES = 20
_GAP = 16


class SvgFile:
    """
    Draws the first paths of a run into a file, which is complete after each of them.

    Raises:
        TracerError: If the file cannot be written.
    """

    def __init__(self, stream: IO[str], *, is_detailed: bool = True) -> None:
        """
        Args:
            stream: The file, open for writing; `close` closes it.
            is_detailed: Whether to list each hop.
        """
        self._stream = stream
        self._is_detailed = is_detailed
        self._drawings: list[Drawing] = []
        self._left_out = 0

    def start(self) -> None:
        """Do nothing: the file is open already."""

    def write(self, path: Path) -> None:
        """Add a path's picture."""
        if len(self._drawings) >= MOST_PICTURES:
            self._left_out += 1
            return
        self._drawings.append(path_drawing(path, is_detailed=self._is_detailed))
        self._put(self._drawings)

    def close(self) -> Mapping[str, int]:
        """
        Note in the file what was left out, and close it. After a write error it does nothing.

        Nothing counts as lost: every path is shown elsewhere, too.
        """
        if self._stream.closed:
            return {}
        drawings = list(self._drawings)
        if not drawings:
            drawings.append(text_drawing("no path was seen"))
        if self._left_out:
            drawings.append(text_drawing(f"{self._left_out} more paths are not drawn here"))
        self._put(drawings)
        self._stream.close()
        return {}

    def _put(self, drawings: list[Drawing]) -> None:
        one = drawings[0] if len(drawings) == 1 else stacked(drawings, _GAP)
        try:
            self._stream.seek(0)
            self._stream.write(one.svg(is_styled=True) + "\n")
            self._stream.truncate()
            self._stream.flush()
        except OSError as error:
            # Closing tries again to write what is still buffered.
            with contextlib.suppress(OSError):
                self._stream.close()
            name = getattr(self._stream, "name", "the diagram file")
            raise TracerError(f"cannot write {name}: {error.strerror}") from error
