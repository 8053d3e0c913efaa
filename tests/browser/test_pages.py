"""The report and the pictures in a real browser: they work, fetch nothing, and run nothing."""

import pytest

from exporters.report import Report
from tests.unit import paths
from tests.unit.pictures import path_svg
from tracer.judge.verdict import Summary

# Each would show that it ran by a global, a title or a request.
ATTACKS = [
    "</script><script>window.evil=1</script>",
    "<img src=http://127.0.0.1:9/evil onerror=window.evil=1>",
    '"><svg onload=window.evil=1>',
    "' onmouseover='window.evil=1",
    "</style><style>@import 'http://127.0.0.1:9/evil';</style>",
    "</title><script>window.evil=1</script>",
    "<!--", "]]>", "&lt;script&gt;", "${window.evil=1}", "$policy",
    "javascript:window.evil=1",
    "\x1b]0;evil\x07\x1b[2J\u202e\x00\ud800",
]  # fmt: skip


def write(tmp_path, some_paths, **options):
    report = Report(**options)
    for path in some_paths:
        report.add(path)
    names = ["night.srcip", *(ATTACKS if len(some_paths) > 50 else [])]
    summary = Summary(
        connections=1, drops=0, lost={"ring_full": 2, ATTACKS[0]: 1}, not_seen=("XDP", ATTACKS[1])
    )
    file = tmp_path / "report.html"
    file.write_text("".join(report.page(summary, names)), encoding="utf-8")
    return file


@pytest.fixture
def page(tmp_path, browser):
    """A report on one path of each kind."""
    file = write(tmp_path, [make() for make in paths.ALL.values()])
    browser.log("browser")
    browser.requested()
    browser.open(file)
    return browser


def visible(browser):
    return browser.execute(
        "return [...document.querySelectorAll('#rows tbody tr')]"
        ".filter(row => row.offsetParent).map(row => row.innerText)"
    )


def search(browser, text):
    browser.execute(
        "const field = document.getElementById('search'); field.value = arguments[0];"
        "field.dispatchEvent(new Event('input'))",
        text,
    )


def test_quiet(page, browser):
    """The page requests only itself, and the console stays empty: no error, no violation."""
    assert [url.split("/")[-1] for url in browser.requested()] == ["report.html"]
    assert browser.log("browser") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", len(paths.ALL)),
        ("hairpin", 1),
        ("HAIRPIN p11", 1),
        ("30081", 2),
        ("fd00:244:1::11", 1),
        ("198.51.100.7:56324 via", 1),
        ("xyz", 0),
    ],
)
def test_search(page, text, count):
    """Rows that contain all words stay; their number is shown."""
    search(page, text)
    assert len(visible(page)) == count
    assert page.execute("return document.getElementById('found').innerText") == (
        f"{count} of {len(paths.ALL)} shown"
    )


def test_verdict(page):
    """A verdict narrows the search."""
    page.execute(
        "const field = document.getElementById('verdict'); field.value = 'dropped';"
        "field.dispatchEvent(new Event('change'))"
    )
    assert len(visible(page)) == 2
    search(page, "10.0.7.7")
    assert len(visible(page)) == 1


def test_sort(page):
    """A heading sorts by its column, once more the other way; numbers are sorted as such."""
    column = (
        "return [...document.querySelectorAll('#rows tbody tr')].map(r => r.cells[4].innerText)"
    )
    click = "document.querySelectorAll('#rows th button')[4].click();"
    up, down = page.execute(click + column), page.execute(click + column)
    assert up[0].startswith("10.240.0.5") or up[0].startswith("[")
    assert up.index("10.244.2.21:51000") < up.index("198.51.100.10:46356")
    assert down == sorted(down, key=up.index, reverse=True) or down[0] == up[-1]
    state = "return document.querySelectorAll('#rows th')[4].getAttribute('aria-sort')"
    assert page.execute(state) == "descending"


def test_picture_of_a_row(page):
    """The link of a row opens the path's picture."""
    opened = "return document.querySelectorAll('details[open] svg').length"
    assert page.execute(opened) == 0
    page.execute("document.querySelector('#rows a').click()")
    assert page.execute("return new Promise(d => requestAnimationFrame(() => d(location.hash)))")
    assert page.execute(opened) == 1


@pytest.mark.parametrize(
    ("scheme", "colour"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")]
)
def test_colours(page, scheme, colour):
    """Page and pictures are light or dark, as the reader prefers."""
    page.prefer(scheme)
    assert colour == page.execute("return getComputedStyle(document.body).backgroundColor")
    assert colour == page.execute(
        "return getComputedStyle(document.querySelector('.srcip-paper')).fill"
    )


def test_hostile(tmp_path, browser):
    """Markup, scripts and escapes in every field are text: nothing runs, nothing is fetched."""
    some = [make(text) for text in ATTACKS for make in (paths.hostile, paths.hostile_drop)] * 2
    browser.log("browser")
    browser.requested()
    browser.open(write(tmp_path, some))
    assert browser.execute("return window.evil === undefined") is True
    assert browser.execute("return document.scripts.length") == 1
    assert browser.execute("return document.images.length") == 0
    assert browser.execute("return document.styleSheets.length") == 1
    handlers = "return [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not [name for name in browser.execute(handlers) if name.startswith("on")]
    assert len(visible(browser)) == len(some)
    search(browser, ATTACKS[1])
    assert len(visible(browser)) == 4
    assert len(browser.requested()) == 1
    assert browser.log("browser") == []


def test_large(tmp_path, browser):
    """A large report stays usable, and says what it leaves out."""
    file = write(tmp_path, [paths.s5()] * 3000, most_rows=2000)
    browser.open(file)
    assert len(visible(browser)) == 2000
    text = browser.execute("return document.body.innerText")
    assert "1000 more connections are not listed here." in text
    assert "5 of 3000 are drawn" in text
    assert file.stat().st_size < 2_000_000


@pytest.mark.parametrize("make", paths.ALL.values(), ids=paths.ALL)
def test_text_of_pictures(tmp_path, browser, make):
    """In the browser's own fonts no text of a picture leaves it, or runs into the next."""
    file = tmp_path / "x.svg"
    file.write_text(path_svg(make(), is_detailed=True))
    browser.open(file)
    boxes = browser.execute(
        "return [...document.querySelectorAll('text')].map(t => {const b = t.getBBox();"
        "return [b.x, b.y, b.x + b.width, b.y + b.height, t.textContent]})"
    )
    width = browser.execute("return document.documentElement.viewBox.baseVal.width")
    for i, (left, top, right, bottom, text) in enumerate(boxes):
        assert left >= 0, text
        assert right <= width, text
        for left2, top2, right2, bottom2, text2 in boxes[:i]:
            # Ascenders of one line may touch descenders of the line above.
            is_apart = right <= left2 or right2 <= left or bottom <= top2 + 4 or bottom2 <= top + 4
            assert is_apart, (text, text2)
