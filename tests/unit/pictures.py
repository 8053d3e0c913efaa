"""The pictures in docs, drawn by the program: ``make pictures`` writes them."""

from pathlib import Path

from exporters.svg import path_drawing
from tests.unit import paths


def path_svg(path, *, is_detailed):
    """A path as a document of its own."""
    return path_drawing(path, is_detailed=is_detailed).svg(is_styled=True)


FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
PICTURES = {
    "s3.svg": lambda: path_svg(paths.s3(), is_detailed=True) + "\n",
    "s3-short.svg": lambda: path_svg(paths.s3(), is_detailed=False) + "\n",
    "s6.svg": lambda: path_svg(paths.s6(), is_detailed=False) + "\n",
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
