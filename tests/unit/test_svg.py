"""Paths as pictures: self-contained SVG that says what the text diagram says."""

import re
from pathlib import Path as File
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.sketch import sketch
from exporters.svg import path_drawing
from exporters.svg_canvas import wrapped
from exporters.svg_file import MOST_PICTURES, SvgFile
from tests.unit import paths, pictures
from tests.unit.pictures import path_svg
from tracer.errors import TracerError

NS = "{http://www.w3.org/2000/svg}"
ELEMENTS = {"svg", "title", "style", "rect", "text", "polyline", "polygon", "path"}
ATTRIBUTES = {
    "viewBox", "width", "height", "role", "rx", "class", "fill", "stroke", "stroke-width",
    "stroke-dasharray", "stroke-linecap", "x", "y", "font-size", "font-family", "font-weight",
    "text-anchor", "points", "d",
}  # fmt: skip


def parsed(path, **options):
    # The text is our own; its contents are what is tested.
    return ElementTree.fromstring(  # noqa: S314
        path_svg(path, **{"is_detailed": True} | options)
    )


def texts(root):
    return [each.text for each in root.iter(f"{NS}text")]


@pytest.mark.parametrize("make", paths.ALL.values(), ids=paths.ALL)
def test_self_contained(make):
    """A picture is drawn of a few plain elements: no script, no link, nothing fetched or obeyed."""
    root = parsed(make())
    assert {each.tag.removeprefix(NS) for each in root.iter()} <= ELEMENTS
    assert {name for each in root.iter() for name in each.attrib} <= ATTRIBUTES
    text = path_svg(make(), is_detailed=True)
    assert not re.search(r"url\(|@import|href|://(?!www\.w3\.org/2000/svg\")", text)


@pytest.mark.parametrize("make", paths.ALL.values(), ids=paths.ALL)
def test_says_what_the_sketch_says(make):
    """Verdict, stations, packets, facts and what is missing are in it as text."""
    text = "".join(texts(parsed(make()))).replace(" ", "").replace("\u2192", "->")
    drawn = sketch(make())
    for part in (
        drawn.headline,
        *(note.there for station in drawn.stations for note in station.notes),
        *(value for fact in drawn.facts for value in fact),
        *drawn.missing,
    ):
        assert part.replace(" ", "") in text


def test_hops_are_optional():
    """The picture alone has no list of hops."""
    assert "postrouting after NAT" in texts(parsed(paths.s3()))
    assert "postrouting after NAT" not in texts(parsed(paths.s3(), is_detailed=False))


def test_drop_has_a_cross():
    """Where the packet ends there is a cross, and no endpoint."""
    root = parsed(paths.s6())
    assert [each for each in root.iter(f"{NS}path") if each.get("class") == "srcip-bar"]
    assert "endpoint" not in texts(root)


def test_colours_of_the_source():
    """On each wire the source is green while it is the client's, else yellow."""
    root = parsed(paths.s3(), is_detailed=False)
    sources = [
        each.get("class")
        for each in root.iter(f"{NS}text")
        if each.text in {"198.51.100.10:46356", "10.240.0.5:65241"}
        and each.get("text-anchor") == "start"
    ]
    assert sources == ["srcip-green", "srcip-yellow", "srcip-yellow"]


@pytest.mark.parametrize("make", [paths.proxied, paths.declared, paths.s3_second_half])
def test_source_that_is_not_the_client_s(make):
    """Behind a proxy or another node no source on the wires is the client's."""
    classes = [each.get("class") for each in parsed(make(), is_detailed=False).iter(f"{NS}text")]
    assert "srcip-green" not in classes


def test_legible_without_style():
    """Every element carries its colour for light paper; the style adds those for dark."""
    root = parsed(paths.s3())
    for each in root.iter():
        if each.tag.removeprefix(NS) not in {"svg", "title", "style"}:
            assert "#" in (each.get("fill", "") + each.get("stroke", ""))
    assert "prefers-color-scheme:dark" in root.find(f"{NS}style").text
    assert "<style" not in path_drawing(paths.s3(), is_detailed=True).svg(is_styled=False)


LONGEST6 = [f"2001:db8:1111:2222:3333:4444:5555:{n}{n}{n}{n}" for n in (6, 7, 8)]
LONG = [paths.s3(*LONGEST6), paths.hostile("x" * 253), paths.hostile_drop("y.z-" * 60)]


@pytest.mark.parametrize("path", [*(make() for make in paths.ALL.values()), *LONG])
def test_everything_is_inside(path):
    """No text leaves the picture, however long names and addresses are."""
    root = parsed(path)
    width, height = float(root.get("width")), float(root.get("height"))
    for each in root.iter(f"{NS}text"):
        is_mono = "monospace" in each.get("font-family")
        length = len(each.text) * float(each.get("font-size")) * (0.602 if is_mono else 0.58)
        x = float(each.get("x"))
        left = {"start": x, "middle": x - length / 2, "end": x - length}[each.get("text-anchor")]
        assert left >= 0
        assert left + length <= width
        assert 0 < float(each.get("y")) < height


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("production/checkout-7d9f8c6b5d", ["production/", "checkout-", "7d9f8c6b5d"]),
        ("198.51.100.10:46356", ["198.51.100.", "10:46356"]),
        ("two words and more", ["two words", "and more"]),
        ("n" * 25, ["n" * 12, "n" * 12, "n"]),
        ("", [""]),
    ],
)
def test_wrapped(text, lines):
    """Lines are broken at spaces, otherwise after separators in names and addresses."""
    assert wrapped(text, 12 * 10 * 0.602, 10, most=3) == lines


def test_shortened():
    """The middle of a text that is too long is left out."""
    first, second = wrapped("a" * 50 + "b" * 50, 12 * 10 * 0.602, 10, most=2)
    assert (first[0], second[-1]) == ("a", "b")
    assert "\u2026" in first + second


@given(st.text())
@settings(max_examples=50)
def test_names_are_harmless(text):
    """No name or text, whoever wrote it, becomes markup, or characters that XML does not have."""
    for path in (paths.hostile(text), paths.hostile_drop(text)):
        root = parsed(path)
        assert {each.tag.removeprefix(NS) for each in root.iter()} <= ELEMENTS
        assert all(each.isprintable() for each in texts(root))


@pytest.mark.parametrize("file", pictures.PICTURES, ids=str)
def test_pictures_of_the_documentation(file):
    """The pictures in docs are what the program draws (``make pictures`` draws them again)."""
    assert File(pictures.FOLDER / file).read_text() == pictures.PICTURES[file]()


def file_of(tmp_path, count):
    file = tmp_path / "x.svg"
    sink = SvgFile(file.open("w"))
    sink.start()
    for _ in range(count):
        sink.write(paths.s5())
        ElementTree.parse(file)  # noqa: S314 - it is whole after each
    assert sink.close() == {}
    return ElementTree.parse(file).getroot()  # noqa: S314


def test_file(tmp_path):
    """A file of one path is that path's picture."""
    root = file_of(tmp_path, 1)
    assert ElementTree.tostring(root) == ElementTree.tostring(parsed(paths.s5()))


def test_file_of_several(tmp_path):
    """Several pictures are one below the other, with one style, and do not overlap."""
    root = file_of(tmp_path, 3)
    inner = root.findall(f"{NS}svg")
    tops = [float(each.get("y", 0)) for each in inner]
    heights = [float(each.get("height")) for each in inner]
    assert len(inner) == 3
    assert all(
        top + height < below
        for top, height, below in zip(tops, heights, [*tops[1:], 1e9], strict=True)
    )
    assert float(root.get("height")) == tops[-1] + heights[-1]
    assert len(list(root.iter(f"{NS}style"))) == 1


def test_file_of_many(tmp_path):
    """Of very many paths the first are drawn, with the number of the others."""
    root = file_of(tmp_path, MOST_PICTURES + 5)
    assert len(root.findall(f"{NS}svg")) == MOST_PICTURES + 1
    assert "5 more paths are not drawn here" in texts(root)


def test_file_of_none(tmp_path):
    """A file without any path says so."""
    assert texts(file_of(tmp_path, 0)) == ["no path was seen"]


def test_full_disk():
    """A full disk is one clear line."""
    sink = SvgFile(File("/dev/full").open("w"))  # noqa: SIM115 - the sink closes it
    with pytest.raises(TracerError, match="cannot write /dev/full: No space left on device"):
        sink.write(paths.s5())
    assert sink.close() == {}
