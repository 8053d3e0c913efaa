"""
What was seen as one self-contained HTML page: totals, a searchable table, and pictures of paths.

The page fetches nothing, and its Content-Security-Policy forbids it. All its contents are
untrusted, and are escaped here.
"""

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from string import Template

from exporters import svg_canvas
from exporters.jsonl import timestamp
from exporters.path_words import client_of
from exporters.svg import path_drawing
from exporters.terminal import printable
from exporters.text import cause_text, ends
from tracer.judge.path import Leg, Path
from tracer.judge.verdict import JudgedConnection, JudgedDrop, Summary, Verdict
from tracer.model import protocol_name

# A browser filters this many rows as the reader types; the summary counts all connections.
_MOST_ROWS = 5000
_MOST_GROUPS = 500
_MOST_DRAWINGS = 200
_OF_A_GROUP = 5
# Cells hold names, not rules: a longer text is cut.
_LONGEST = 300
_COLUMNS = (
    "Time", "Nodes", "Verdict", "Proto", "Client", "Sent to", "Backend sees", "Backend",
    "Service", "Cause", "Picture",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What the summary counts together."""

    service: str
    verdict: Verdict
    cause: str


class Report:
    """Collects paths in bounded memory, and makes a page of them."""

    def __init__(self, *, most_rows: int = _MOST_ROWS, most_drawings: int = _MOST_DRAWINGS) -> None:
        self._most_rows = most_rows
        self._most_drawings = most_drawings
        self._groups: Counter[_Group] = Counter()
        self._verdicts: Counter[Verdict] = Counter()
        self._drawn: Counter[_Group] = Counter()
        self._rows: list[str] = []
        self._drawings: list[str] = []
        self._beyond_groups = 0

    def add(self, path: Path) -> None:
        """Count a path; the first paths get a row, and the first of each group a picture."""
        self._verdicts[path.verdict] += 1
        group = _group(path)
        if group not in self._groups and len(self._groups) >= _MOST_GROUPS:
            self._beyond_groups += 1
        else:
            self._groups[group] += 1
        # A new group is worth rows however late it appears.
        is_news = 0 < self._groups[group] <= _OF_A_GROUP
        if len(self._rows) >= self._most_rows and not is_news:
            return
        number = self._draw(path, group)
        self._rows.append(_row(path, group, number))

    def page(self, summary: Summary, made_of: Sequence[str]) -> Iterator[str]:
        """
        Yield the page.

        Args:
            summary: What was lost, and what could not be seen.
            made_of: The names of the recordings.
        """
        style = _asset("report.css") + svg_canvas.style()
        script = _asset("report.js")
        yield Template(_asset("report.html")).substitute(
            policy=_policy(style, script),
            title=_safe(f"srcip report: {', '.join(made_of)}"),
            style=style,
            script=script,
            version=_safe(metadata.version("srcip")),
            made_of=_safe(f"Made from {', '.join(made_of)}"),
            cards="".join(self._cards()),
            gaps="".join(_gaps(summary)),
            groups="".join(self._group_rows()),
            groups_left_out=_left_out(self._beyond_groups, "connections of other groups"),
            verdicts="".join(f"<option>{verdict}</option>" for verdict in Verdict),
            shown=f"{len(self._rows)} of {len(self._rows)} shown",
            columns="".join(map(_heading, _COLUMNS)),
            rows="".join(self._rows),
            rows_left_out=_left_out(self._verdicts.total() - len(self._rows), "connections"),
            paths_intro=self._paths_intro(),
            paths="".join(self._drawings),
        )

    def _draw(self, path: Path, group: _Group) -> int | None:
        """Draw a path, if its group has few pictures yet; return the picture's number."""
        if self._drawn[group] >= _OF_A_GROUP or len(self._drawings) >= self._most_drawings:
            return None
        self._drawn[group] += 1
        number = len(self._drawings) + 1
        drawing = path_drawing(path, is_detailed=True)
        where = f"{client_of(path)} to {_sent_to(path)}"
        self._drawings.append(
            f'<details id="path-{number}"><summary><span class="{path.verdict}">{path.verdict}'
            f"</span> {_safe(f'{group.service} {where}')}</summary>"
            f"{drawing.svg(is_styled=False)}</details>"
        )
        return number

    def _cards(self) -> Iterator[str]:
        yield f"<li><strong>{self._verdicts.total()}</strong>connections and drops</li>"
        for verdict in Verdict:
            if self._verdicts[verdict]:
                yield (
                    f'<li><strong class="{verdict}">{self._verdicts[verdict]}</strong>'
                    f"{verdict}</li>"
                )

    def _group_rows(self) -> Iterator[str]:
        for group, count in self._groups.most_common():
            yield (
                f"<tr><td>{_safe(group.service)}</td>"
                f'<td class="{group.verdict}">{group.verdict}</td>'
                f'<td>{_safe(group.cause)}</td><td class="number">{count}</td></tr>'
            )

    def _paths_intro(self) -> str:
        if not self._drawings:
            return "<p>None was seen.</p>"
        drawn, told = len(self._drawings), self._verdicts.total()
        return (
            f'<p class="faint">{drawn} of {told} are drawn: the first {_OF_A_GROUP} of each '
            f"Service, verdict and cause, at most {self._most_drawings}.</p>"
        )


def _group(path: Path) -> _Group:
    deciding = path.deciding
    judged, opinion = deciding.drop or deciding.judged, deciding.opinion
    return _Group(
        service=f"{opinion.service} ({opinion.service.via})"[:_LONGEST]
        if opinion and opinion.service
        else "-",
        verdict=path.verdict,
        cause=_cause(judged),
    )


def _cause(judged: JudgedConnection | JudgedDrop | None) -> str:
    """Return a cause without declared clients, of which there may be any number."""
    if judged is None:
        return "-"
    if isinstance(judged, JudgedConnection):
        judged = replace(judged, word=None)
    return cause_text(judged)[:_LONGEST]


def _row(path: Path, group: _Group, number: int | None) -> str:
    judged = path.deciding.drop or path.deciding.judged
    cells = [
        timestamp(path.time_ns),
        ", ".join(leg.node for leg in path.legs),
        str(path.verdict),
        protocol_name(path.orig.proto),
        client_of(path),
        _sent_to(path),
        "-" if path.backend is None else ends(path.backend)[0],
        _backend(path),
        group.service,
        cause_text(judged) if judged else "-",
    ]
    body = "".join(
        f'<td class="{path.verdict}">{cell}</td>' if at == 2 else f"<td>{_safe(cell)}</td>"
        for at, cell in enumerate(cells)
    )
    link = f'<a href="#path-{number}">{number}</a>' if number else ""
    return f'<tr data-verdict="{path.verdict}">{body}<td>{link}</td></tr>'


def _sent_to(path: Path) -> str:
    return ends(path.orig)[1]


def _backend(path: Path) -> str:
    last: Leg = path.legs[-1]
    if path.backend is None:
        return "-"
    address = ends(path.backend)[1]
    pod = last.judged.backend_pod if last.judged else None
    return f"{pod.namespace}/{pod.name} {address}" if pod else address


def _gaps(summary: Summary) -> Iterator[str]:
    lost = {name: count for name, count in summary.lost.items() if count}
    if not lost:
        yield "<p>Nothing was lost.</p>"
    else:
        yield '<p class="dropped">Some records were lost:</p>'
        yield _list(f"{count} {name}" for name, count in lost.items())
    if summary.not_seen:
        yield "<p>Not seen:</p>"
        yield _list(summary.not_seen)
    if summary.notes:
        yield "<p>Notes:</p>"
        yield _list(summary.notes)


def _list(lines: Iterable[str]) -> str:
    shown = list(lines)
    items = "".join(f"<li>{_safe(line)}</li>" for line in shown[:_LONGEST])
    return f'<ul class="plain">{items}</ul>{_left_out(len(shown) - _LONGEST, "lines")}'


def _left_out(count: int, what: str) -> str:
    return f'<p class="faint">{count} more {what} are not listed here.</p>' if count > 0 else ""


def _heading(name: str) -> str:
    return f'<th scope="col" aria-sort="none"><button type="button">{name}</button></th>'


def _policy(style: str, script: str) -> str:
    """Return a policy that allows this style and this script, and nothing else."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return resources.files("exporters").joinpath("page", name).read_text("utf-8")


def _safe(text: str) -> str:
    """Escape a text: no markup, and no character that reorders or hides text."""
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]} \u2026 {text[-_LONGEST:]}"
    return html.escape(printable(text))
