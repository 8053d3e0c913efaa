"""Text for terminals: colours where they are wanted, and no control characters from outside."""

import os
import shutil
from dataclasses import dataclass
from typing import IO

_COLOURS = {
    "green": "32",
    "red": "31",
    "yellow": "33",
    "cyan": "36",
    "dim": "2",
    "bold": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """The size of a terminal, in columns and lines."""

    width: int
    height: int


def screen_of(stream: IO[str]) -> Screen | None:
    """Return the terminal that a stream is shown on; None for a pipe or a file."""
    if not stream.isatty():
        return None
    size = shutil.get_terminal_size()
    return Screen(width=size.columns, height=size.lines)


def has_colour(stream: IO[str]) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR is set (no-color.org) or it is dumb."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def paint(text: str, colour: str) -> str:
    """Wrap text in the escape codes of a colour."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def printable(text: str) -> str:
    """
    Escape what a terminal would interpret: control characters, and marks that reorder text.

    Names come from clusters, recordings and file systems: they are not trusted.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
