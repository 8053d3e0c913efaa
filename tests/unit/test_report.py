"""The report's page, read as text: totals, rows, bounds, and what its policy allows."""

import base64
import hashlib
import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.report import Report
from tests.unit import paths
from tracer.judge.verdict import Summary, Verdict

NOTHING = Summary(connections=0, drops=0)


def page(*some_paths, summary=NOTHING, made_of=("night.srcip",), **options):
    report = Report(**options)
    for path in some_paths:
        report.add(path)
    return "".join(report.page(summary, made_of))


class Reader(HTMLParser):
    """Collects tags, attributes, and the cells of table rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.tables = [], [], []
        self._is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
            self._is_in_cell = True

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._is_in_cell = False

    def handle_data(self, data):
        if self._is_in_cell:
            self.tables[-1][-1][-1] += data


def test_summary():
    """Connections are added up by Service, verdict and cause, the most frequent first."""
    groups, _ = Reader(page(paths.s5(), paths.s3(), paths.s6(), paths.s3_ipv6())).tables
    assert groups[1:] == [
        ["default/nodeport:http (nodeport)", "replaced", "external-traffic-policy-cluster", "2"],
        ["default/nodeport-local:http (nodeport)", "preserved", "-", "1"],
        ["default/nodeport-local:http (nodeport)", "dropped", "no-local-endpoint at input", "1"],
    ]


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (
            paths.s3,
            ["node2, node1", "replaced", "tcp", "198.51.100.10:46356", "10.240.0.5:30080",
             "10.240.0.5:65241", "default/p11 10.244.1.11:8080",
             "default/nodeport:http (nodeport)", "external-traffic-policy-cluster", "1"],
        ),
        (
            paths.s6,
            ["node2", "dropped", "tcp", "198.51.100.10:48782", "10.240.0.5:30081", "-", "-",
             "default/nodeport-local:http (nodeport)", "no-local-endpoint at input", "1"],
        ),
        (
            paths.changed,
            ["node2", "unknown", "tcp", "198.51.100.10:46356", "10.240.0.5:30080", "-", "-", "-",
             "-", "1"],
        ),
        (
            paths.ping,
            ["node2", "preserved", "icmp", "198.51.100.10", "10.244.1.11", "198.51.100.10",
             "default/p11 10.244.1.11", "-", "-", "1"],
        ),
    ],
)  # fmt: skip
def test_row(make, row):
    """A row tells who sent where, whom the backend sees, and why; its last cell is a link."""
    text = page(make())
    (_, found) = Reader(text).tables[1]
    assert found[0].startswith("2026-01-01T00:00:00.")
    assert found[1:] == row
    assert 'href="#path-1"' in text
    assert 'id="path-1"' in text


def test_verdicts_are_counted():
    """Every verdict that occurred has its number."""
    text = page(*(make() for make in paths.ALL.values()))
    found = dict(re.findall(r'<strong class="([a-z-]+)">(\d+)</strong>', text))
    kinds = [make().verdict for make in paths.ALL.values()]
    assert found == {verdict: str(kinds.count(verdict)) for verdict in Verdict if verdict in kinds}


def test_empty():
    """A report on nothing is a page, too."""
    text = page()
    assert "None was seen." in text
    assert "<strong>0</strong>connections and drops" in text


def test_losses():
    """The page says what was lost and what could not be seen, or that nothing was."""
    assert "Nothing was lost." in page()
    summary = Summary(
        connections=1, drops=0, lost={"ring_full": 7, "undecodable": 0}, not_seen=("XDP",),
        notes=("the clock of node1 is behind",),
    )  # fmt: skip
    text = page(summary=summary)
    assert "<li>7 ring_full</li>" in text
    assert "<li>XDP</li>" in text
    assert "<li>the clock of node1 is behind</li>" in text
    assert "undecodable" not in text
    assert "Nothing was lost." not in text


def test_bounds():
    """Memory and page do not grow with the recording; what is left out is counted, not hidden."""
    some = [
        replace(path, legs=(replace(path.legs[0], node=f"node{n}"),))
        for path in [paths.s6()]
        for n in range(40)
    ]
    text = page(*some, most_rows=30, most_drawings=3)
    assert text.count("<tr data-verdict") == 30
    assert text.count("<details") == 3
    assert "10 more connections are not listed here." in text
    assert "3 of 40 are drawn" in text
    assert '<td class="number">40</td>' in text


def test_what_comes_late():
    """A new group has a row and a picture, however full the table is."""
    text = page(*[paths.s6()] * 40, paths.s3(), most_rows=30)
    assert text.count("<tr data-verdict") == 31
    assert "10 more connections are not listed here." in text
    assert "replaced at node2" in text


def test_declared_clients_make_no_groups():
    """Declared clients are shown in their rows, and make no rows in the summary."""
    groups, found = Reader(page(paths.forged(), paths.forged())).tables
    assert [row[2:] for row in groups[1:]] == [["-", "2"]]
    assert found[1][9] == "(PROXY v2 198.51.100.7: declared, not trusted (forged?))"


def test_groups_are_bounded():
    """A recording with any number of Services has a summary of bounded length."""

    def of(n):
        path = paths.s6()
        opinion = path.drop.opinion
        service = replace(opinion.service, name=f"s{n}")
        drop = replace(path.drop, opinion=replace(opinion, service=service))
        return replace(path, legs=(replace(path.legs[0], drop=drop),))

    text = page(*map(of, range(700)))
    assert len(Reader(text).tables[0]) == 501
    assert "200 more connections of other groups are not listed here." in text


def test_long_names_are_cut():
    """A name of a megabyte takes little room."""
    assert len(page(paths.hostile("n" * 1_000_000))) < 300_000


def test_policy():
    """The policy allows this style and this script by their hashes, and nothing else."""
    text = page(paths.s3())
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for rule, tag in (("style-src", "style"), ("script-src", "script")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_nothing_is_fetched():
    """No element loads anything, no attribute runs or styles anything."""
    found = Reader(page(*(make() for make in paths.ALL.values())))
    assert not set(found.tags) & {"img", "link", "iframe", "object", "embed", "use", "image", "a:"}
    for name, value in found.attributes:
        assert name not in {"src", "style", "srcset"}
        assert not name.startswith("on")
        assert name != "href" or value.startswith("#path-")


@given(st.text())
@settings(max_examples=30)
def test_names_are_harmless(text):
    """Whatever names and texts hold, the page has the same elements, in the same order."""
    summary = Summary(connections=0, drops=0, lost={text: 1}, not_seen=(text,), notes=(text,))
    some = [paths.hostile, paths.hostile_drop]
    found, plain = (
        page(*(make(each) for make in some), summary=summary, made_of=(text,))
        for each in (text, "name")
    )
    # Long words take more lines in pictures.
    assert [tag for tag in Reader(found).tags if tag != "text"] == [
        tag for tag in Reader(plain).tags if tag != "text"
    ]
    assert all(c.isprintable() or c == "\n" for c in found)
