"""Rows that stay aligned as they come, in colour only where that is wanted."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.table import StreamingTable
from exporters.terminal import Screen, has_colour, paint, printable, screen_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A terminal without wishes of its own."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def table(stream=None, screen=None, **columns):
    stream = stream or io.StringIO()
    return StreamingTable(stream, columns, {"good": "green"}, screen=screen), stream


def lines(stream):
    return stream.getvalue().splitlines()


def test_rows():
    """The heading appears once above the rows, each cell under its name."""
    rows, out = table(A=3, LONGER=1, LAST=0)
    rows.row(["1", "2", "3"])
    rows.row(["abc", "", "z"])
    assert lines(out) == [
        "A    LONGER  LAST",
        "1    2       3",
        "abc          z",
    ]


def test_a_wider_cell():
    """A cell that does not fit widens its column from there on, under the heading that is there."""
    rows, out = table(A=2, B=2)
    rows.row(["1", "x"])
    rows.row(["12345", "x"])
    rows.row(["1", "x"])
    assert lines(out) == ["A   B", "1   x", "12345  x", "1      x"]


def test_a_first_wide_cell():
    """The heading is as wide as the first row needs."""
    rows, out = table(A=2, B=2)
    rows.row(["12345", "x"])
    assert lines(out) == ["A      B", "12345  x"]


def test_no_room_to_grow():
    """A cell that does not fit the screen shifts only its own row, no further than needed."""
    rows, out = table(screen=Screen(width=20, height=9), A=4, B=6, C=4)
    rows.row(["a" * 6, "b", "c"])  # 18 columns: there is room
    rows.row(["1" * 9, "22", "3"])
    rows.row(["1" * 12, "22", "3"])
    rows.row(["1", "2", "3"])
    assert lines(out) == [
        "A       B       C",
        "aaaaaa  b       c",
        "111111111  22   3",
        "111111111111  22  3",
        "1       2       3",
    ]


def test_a_very_long_cell_in_a_file():
    """One long name does not move all rows that follow out of sight."""
    rows, out = table(A=2, B=2)
    rows.row(["1" * 200, "x"])
    rows.row(["1", "x"])
    assert lines(out)[1:] == [f"{'1' * 200}  x", f"{'1':<64}  x"]


def test_heading_on_a_screen():
    """When the heading has scrolled off it is printed again; notes and wrapped lines count."""
    rows, out = table(screen=Screen(width=10, height=5), A=2, B=2)
    for _ in range(4):
        rows.row(["1", "x"])
    rows.note("    a line that is broken twice")
    rows.row(["1", "x"])
    heading, row, note = "A   B", "1   x", "    a line that is broken twice"
    assert lines(out) == [heading, *[row] * 3, heading, row, note, heading, row]


def test_heading_in_a_file():
    """In a file the heading appears once, however many rows follow."""
    rows, out = table(A=2, B=2)
    for _ in range(1000):
        rows.row(["1", "x"])
    assert lines(out).count("A   B") == 1


def test_screen():
    """A terminal has a size; a file or pipe is none."""
    assert screen_of(io.StringIO()) is None
    assert screen_of(Terminal()).width > 0


def test_last_column_never_widens():
    """A note of any length needs no new heading, and nothing ends in spaces."""
    rows, out = table(A=2, NOTE=2)
    rows.row(["1", "a long note"])
    rows.row(["1", ""])
    assert lines(out) == ["A   NOTE", "1   a long note", "1"]


def test_wrong_number_of_cells():
    """A row with too few cells is a bug that is not hidden."""
    rows, _ = table(A=1, B=1)
    with pytest.raises(ValueError, match="zip"):
        rows.row(["1"])


def test_colours():
    """On a terminal the heading is bold, and a cell with a colour has it."""
    rows, out = table(Terminal(), A=6, B=1)
    rows.row(["good", "x"])
    rows.row(["bad", "good"])
    assert lines(out) == [
        "\x1b[1mA\x1b[0m       \x1b[1mB\x1b[0m",
        "\x1b[32mgood\x1b[0m    x",
        "bad     \x1b[32mgood\x1b[0m",
    ]


def test_colours_do_not_misalign():
    """Without its colours a coloured table is the plain one."""
    plain, out = table(A=3, B=3)
    coloured, terminal = table(Terminal(), A=3, B=3)
    for cells in (["good", "x"], ["longer than it was", "good"], ["", "good"]):
        plain.row(cells)
        coloured.row(cells)
    assert re.sub(r"\x1b\[\d+m", "", terminal.getvalue()) == out.getvalue()


def test_no_colour_in_a_pipe():
    """What is piped or kept in a file has no colours."""
    assert not has_colour(io.StringIO())


@pytest.mark.parametrize(
    ("name", "value", "colour"),
    [
        ("NO_COLOR", "1", False),
        # no-color.org: set, and not an empty string.
        ("NO_COLOR", "", True),
        ("TERM", "dumb", False),
        ("TERM", "xterm-256color", True),
    ],
)
def test_no_colour_by_wish(monkeypatch, name, value, colour):
    """A terminal gets no colours if the user, or the terminal, does not want them."""
    monkeypatch.setenv(name, value)
    assert has_colour(Terminal()) is colour


def test_paint():
    """A painted text ends its colour."""
    assert paint("x", "red") == "\x1b[31mx\x1b[0m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("node2", "node2"),
        ("knoten-ä", "knoten-ä"),
        ("節點", "節點"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb\tc\rd\x00", "a\\x0ab\\x09c\\x0dd\\x00"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202edr\u202c", "\\x202edr\\x202c"),
        ("\u2066x\u2069\u200f", "\\x2066x\\x2069\\x200f"),
        ("\u2028\u2029", "\\x2028\\x2029"),
        ("\udc80", "\\xdc80"),
        ("", ""),
    ],
)
def test_printable(text, shown):
    """Control characters, and marks that reorder text, are escaped."""
    assert printable(text) == shown


ODD = st.sampled_from("\x1b\x9b\x07\r\n\x85\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200f\u061c")


@given(st.text(st.one_of(st.characters(), ODD)))
def test_printable_of_anything(text):
    """Nothing is left that is not printable, and printable text is left alone."""
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@given(st.lists(st.lists(st.text(st.one_of(st.characters(), ODD)), min_size=3, max_size=3)))
def test_any_rows(rows):
    """Each row is one line without control characters, below one heading."""
    out = io.StringIO()
    printed = StreamingTable(out, {"A": 1, "B": 1, "C": 1})
    for cells in rows:
        printed.row(cells)
    text = out.getvalue().split("\n")[:-1]
    assert all(line.isprintable() for line in text)
    headings = [line for line in text if re.fullmatch("A +B +C", line)]
    assert len(headings) >= bool(rows)
    assert len(text) == len(rows) + bool(rows)
