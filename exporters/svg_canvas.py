"""Shapes and texts of an SVG picture: measured, escaped, in colours for light and dark mode."""

import html
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from exporters.terminal import printable

# The width of a character relative to the font size. Monospaced fonts agree on it; for others it
# is the average of wide ones.
_MONO, _SANS, _SANS_BOLD = 0.602, 0.58, 0.64
_LONGEST = 2000
_PARTS = re.compile(r"[^ ]*? +|[^ /.:-]*[/.:-]|[^ /.:-]+")
# By class: the attribute that it colours, and the colours for light and dark mode.
_COLOURS = {
    "paper": ("fill", "#ffffff", "#0d1117"),
    "ink": ("fill", "#1f2328", "#e6edf3"),
    "faint": ("fill", "#59636e", "#9198a1"),
    "line": ("stroke", "#8b949e", "#6e7681"),
    "tip": ("fill", "#8b949e", "#6e7681"),
    "box": ("fill", "#f6f8fa", "#161b22"),
    "edge": ("stroke", "#d1d9e0", "#3d444d"),
    "green": ("fill", "#116329", "#56d364"),
    "yellow": ("fill", "#8a5200", "#e3b341"),
    "red": ("fill", "#b3171f", "#ff7b72"),
    "cyan": ("fill", "#0b5cad", "#79c0ff"),
    "bar": ("stroke", "#b3171f", "#ff7b72"),
}
_FONTS = {
    "mono": "ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', Consolas, monospace",
    "sans": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif",
}


def style() -> str:
    """Return the CSS rules for readers who prefer dark mode."""
    rules = "".join(
        f".srcip-{name}{{{attribute}:{dark}}}" for name, (attribute, _, dark) in _COLOURS.items()
    )
    return f"@media (prefers-color-scheme:dark){{{rules}}}"


def wrapped(
    text: str,
    width: float,
    size: float,
    *,
    most: int,
    is_mono: bool = True,
    is_bold: bool = False,
) -> list[str]:
    """
    Break a text into lines: at spaces, else after a separator in a name or address, else anywhere.

    Args:
        text: Any text; it is returned printable, but not escaped.
        width: The width of a line in pixels.
        size: The font size in pixels.
        most: The most lines. The middle of a longer text is left out.
        is_mono: Whether the font is monospaced.
        is_bold: Whether it is bold; fonts that are not monospaced are wider then.
    """
    columns = max(8, int(width / (size * _breadth(is_mono=is_mono, is_bold=is_bold))))
    # Names in a recording may be of any length, and a picture shows only a part.
    text = printable(text if len(text) <= 2 * _LONGEST else text[:_LONGEST] + text[-_LONGEST:])
    if len(text) > columns * most:
        half = (columns * most - 3) // 2
        text = f"{text[:half]} \u2026 {text[-half:]}"
    lines = [text] if len(text) <= columns else _filled(_PARTS.findall(text), columns)
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-1]}\u2026"]


def _filled(parts: Sequence[str], columns: int) -> list[str]:
    """Put as many parts on each line as fit."""
    lines = [""]
    for part in parts:
        if len(lines[-1]) + len(part.rstrip()) > columns:
            lines.append("")
        while len(part.rstrip()) > columns:
            lines[-1:] = [part[:columns], ""]
            part = part[columns:]  # noqa: PLW2901 - what is left of it
        lines[-1] += part
    return [line.strip() for line in lines if line.strip()]


def _breadth(*, is_mono: bool, is_bold: bool) -> float:
    return _MONO if is_mono else _SANS_BOLD if is_bold else _SANS


def text_width(text: str, size: float, *, is_mono: bool = True) -> float:
    """Return the approximate width of a text in pixels."""
    return len(printable(text)) * size * _breadth(is_mono=is_mono, is_bold=False)


class Canvas:
    """
    Collects the elements of a picture.

    Every element has its light-mode colours as attributes, so that it is legible without a style;
    the classes are for `style`. Nothing refers to anything outside, or by id.
    """

    def __init__(self, width: float) -> None:
        self.width = width
        self._elements: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = "ink",
        size: float = 12,
        is_mono: bool = True,
        is_bold: bool = False,
        anchor: str = "start",
    ) -> None:
        """Write a line of text on a baseline, unless it is empty."""
        if not text:
            return
        font = _FONTS["mono" if is_mono else "sans"]
        weight = ' font-weight="600"' if is_bold else ""
        # No style attributes: a page's Content-Security-Policy may forbid them.
        self._elements.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" font-family="{font}"'
            f' text-anchor="{anchor}"{weight}{_paint(colour)}>{html.escape(printable(text))}</text>'
        )

    def rows(
        self, x: float, y: float, lines: Sequence[str], *, leading: float, **options: Any
    ) -> float:
        """Write lines one below the other; return the baseline after the last."""
        for line in lines:
            self.text(x, y, line, **options)
            y += leading
        return y

    def box(
        self, x: float, y: float, width: float, height: float, *, is_dashed: bool = False
    ) -> None:
        """Draw a station's box."""
        dashes = ' stroke-dasharray="5 4"' if is_dashed else ""
        self._elements.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="8"'
            f' class="srcip-box srcip-edge" fill="{_COLOURS["box"][1]}"'
            f' stroke="{_COLOURS["edge"][1]}" stroke-width="1.5"{dashes}/>'
        )

    def line(self, points: Sequence[tuple[float, float]], *, is_dashed: bool = False) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if is_dashed else ""
        self._elements.append(
            f'<polyline points="{path}" fill="none"{_paint("line")} stroke-width="1.5"{dashes}/>'
        )

    def tip(self, x: float, y: float, *, dx: int = 0, dy: int = 0) -> None:
        """Draw an arrow's tip at a point, in the direction of (dx, dy)."""
        side = 4.5
        back_x, back_y = x - 9 * dx, y - 9 * dy
        corners = (
            (x, y),
            (back_x + side * dy, back_y + side * dx),
            (back_x - side * dy, back_y - side * dx),
        )
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        self._elements.append(f'<polygon points="{points}"{_paint("tip")}/>')

    def cross(self, x: float, y: float, size: float) -> None:
        """Draw the X of a packet that goes no further."""
        self._elements.append(
            f'<path d="M{x - size:.1f} {y - size:.1f}L{x + size:.1f} {y + size:.1f}'
            f'M{x - size:.1f} {y + size:.1f}L{x + size:.1f} {y - size:.1f}" fill="none"'
            f'{_paint("bar")} stroke-width="4" stroke-linecap="round"/>'
        )

    def rule(self, y: float, x: float, width: float) -> None:
        """Draw a thin line across."""
        self._elements.append(
            f'<path d="M{x:.1f} {y:.1f}h{width:.1f}" fill="none"{_paint("edge")}/>'
        )

    def finished(self, height: float, *, title: str) -> "Drawing":
        """Return the picture."""
        paper = f'<rect width="{self.width:.0f}" height="{height:.0f}" rx="6"{_paint("paper")}/>'
        return Drawing(
            width=round(self.width),
            height=round(height),
            inside=f"<title>{html.escape(printable(title[:_LONGEST]))}</title>{paper}"
            + "".join(self._elements),
        )


class Drawing(NamedTuple):
    """A picture and its size. ``inside`` holds its elements, without the enclosing ``svg``."""

    width: int
    height: int
    inside: str

    def svg(self, *, y: int = 0, is_styled: bool) -> str:
        """Return it as a document, with its own style, or as a part of one."""
        at = f' y="{y}"' if y else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"{at}'
            f' width="{self.width}" height="{self.height}" role="img">'
            f"{f'<style>{style()}</style>' if is_styled else ''}{self.inside}</svg>"
        )


def stacked(drawings: Sequence[Drawing], gap: int) -> Drawing:
    """Stack pictures into one, one below the other."""
    parts, y = [], 0
    for drawing in drawings:
        parts.append(drawing.svg(y=y, is_styled=False))
        y += drawing.height + gap
    width = max((drawing.width for drawing in drawings), default=0)
    return Drawing(width=width, height=max(0, y - gap), inside="".join(parts))


def _paint(colour: str) -> str:
    attribute, light, _ = _COLOURS[colour]
    return f' class="srcip-{colour}" {attribute}="{light}"'
