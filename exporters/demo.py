"""The demo's findings: each connection's tuples before and after NAT, and who saw what."""

import json
import shlex
import sysconfig
from collections.abc import Sequence
from itertools import groupby
from typing import IO, Any

from exporters.jsonl import rule_object, tuple_object
from exporters.terminal import Screen, has_colour, paint
from exporters.text import VERDICT_COLOURS, client_text, ends
from exporters.word import word_object
from lab.agreement import Finding
from lab.hosts import NODES
from lab.services import OBJECTS
from lab.topology import Lab


class DemoWriter:
    """
    Prints findings under a heading for each mode and scenario.

    On a ``screen`` that is too narrow for all columns, tuples and then the cause are left out.
    """

    def __init__(self, stream: IO[str], screen: Screen | None = None) -> None:
        self._stream = stream
        self._has_colour = has_colour(stream)
        self._screen = screen

    def write(self, mode: str, findings: Sequence[Finding]) -> None:
        """Print the findings of one mode of kube-proxy, aligned with one another."""
        rows = [_cells(finding) for finding in findings]
        widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
        shown = self._columns(widths)
        self._line(f"kube-proxy in {mode} mode", "bold")
        self._line("  " + _aligned(_HEADINGS, widths, shown), "dim")
        pairs = zip(findings, rows, strict=True)
        for scenario, group in groupby(pairs, lambda pair: pair[0].case.scenario):
            self._line(f"{scenario.id}  {scenario.title}", "bold")
            for finding, row in group:
                colour = VERDICT_COLOURS[finding.verdict] if finding.agrees else "red"
                verdict = row[_VERDICT].ljust(widths[_VERDICT])
                text = "  " + _aligned(row, widths, shown)
                if self._has_colour:
                    text = text.replace(verdict, paint(verdict, colour), 1)
                print(text, file=self._stream)
        # So that what follows on standard error also follows in a file that gets both.
        print(file=self._stream, flush=True)

    def _columns(self, widths: Sequence[int]) -> Sequence[int]:
        """Return the columns that fit, by index."""
        for columns in _CHOICES:
            width = 2 + sum(widths[i] + 2 for i in columns) - 2
            if self._screen is None or width <= self._screen.width:
                return columns
        return _CHOICES[-1]

    def _line(self, text: str, colour: str) -> None:
        print(paint(text, colour) if self._has_colour else text, file=self._stream)


def kept_lines(lab: Lab, mode: str) -> list[str]:
    """Return what to type in other terminals to look into a kept lab."""
    nodes = " ".join(f"n{node[-1]}={lab.netns(node).name}={node}" for node in NODES)
    # A virtual environment's commands are on the path of those terminals only where it is active.
    commands = shlex.quote(sysconfig.get_path("scripts"))
    connect = "exec 3<>/dev/tcp/$0/$1; echo GET >&3; tail -1 <&3"
    return [
        f"A cluster in a box, with kube-proxy's rules in {mode} mode. Ctrl-C removes it.",
        "In other terminals, as root:",
        "",
        f"PATH={commands}:$PATH",
        f"{nodes} objects={shlex.quote(str(OBJECTS))}",
        f"client() {{ nsenter --net={lab.netns('client')} timeout 3 bash -c '{connect}' \"$@\"; }}",
        "srcip trace --netns $n1 --netns $n2 --cluster $objects --explain",
        "",
        "client 10.240.0.5 30080   # NodePort, policy Cluster, node without endpoint",
        "client 10.240.0.3 30081   # NodePort, policy Local, node with the endpoint",
        "client 10.240.0.5 30081   # NodePort, policy Local, node without endpoint",
    ]


def scenario_to_line(finding: Finding) -> str:
    """Return a finding as a line of JSON."""
    case, answer = finding.case, finding.answer
    line: dict[str, Any] = {
        "kind": "scenario",
        "version": 1,
        "scenario": case.scenario.id,
        "title": case.scenario.title,
        "mode": case.mode,
        "family": case.family,
        "proto": case.proto,
        "client_address": str(answer.client_address) if answer.client_address else None,
        "outcome": answer.outcome,
    }
    if finding.seen_source is not None:
        line["seen_source"] = str(finding.seen_source)
    if finding.hops:
        line["orig"] = tuple_object(finding.hops[0].connection.orig)
        line["reply"] = tuple_object(finding.hops[-1].connection.reply)
        line["nodes"] = [hop.node for hop in finding.hops]
        if (word := finding.hops[0].word) is not None:
            line["proxy"] = word_object(word)
    line["verdict"] = str(finding.verdict)
    if finding.cause is not None:
        line["cause"] = str(finding.cause)
    if finding.opinion is not None and finding.opinion.rule is not None:
        line["rule"] = rule_object(finding.opinion.rule)
    line["agrees"] = finding.agrees
    return json.dumps(line)


_HEADINGS = (
    "", "", "VERDICT", "BEFORE NAT", "", "AFTER NAT", "", "THROUGH", "BACKEND SAW", "SRCIP SAYS",
    "CAUSE", ""
)  # fmt: skip
_VERDICT = 2
_TUPLES, _CAUSE = (3, 4, 5, 6), 10
# From all columns down to the essential ones.
_CHOICES = tuple(
    tuple(i for i in range(len(_HEADINGS)) if i not in left_out)
    for left_out in ((), _TUPLES, (*_TUPLES, _CAUSE))
)


def _cells(finding: Finding) -> tuple[str, ...]:
    case, answer = finding.case, finding.answer
    # If only the way back fails, the backend cannot report what it saw.
    nothing = "nothing" if finding.drop or not finding.hops else "no answer"
    saw = str(answer.client_address or f"{nothing} ({answer.outcome})")
    says = str(finding.seen_source or ("nothing" if finding.drop else "?"))
    return (
        case.family,
        case.proto,
        str(finding.verdict),
        *_tuples(finding),
        _through(finding),
        saw,
        says,
        str(finding.cause or "-"),
        "agrees" if finding.agrees else "DISAGREES",
    )


def _tuples(finding: Finding) -> tuple[str, str, str, str]:
    """Return source and destination before NAT, and after it."""
    if finding.hops:
        first = finding.hops[0]
        before = client_text(first), ends(first.connection.orig)[1]
    elif finding.drop and finding.drop.flow:
        before = ends(finding.drop.flow)
    else:
        before = ("?", "?")
    if finding.drop or not finding.hops:
        return before[0], f"-> {before[1]}", "-", ""
    backend, seen = ends(finding.hops[-1].connection.reply)
    return before[0], f"-> {before[1]}", seen, f"-> {backend}"


def _through(finding: Finding) -> str:
    nodes = [hop.node for hop in finding.hops]
    if finding.drop:
        hook = f" {finding.drop.hook.label}" if finding.drop.hook else ""
        nodes.append(f"X {finding.drop.node}{hook}")
    return " ".join(nodes) or "?"


def _aligned(cells: Sequence[str], widths: Sequence[int], shown: Sequence[int]) -> str:
    return "  ".join(cells[i].ljust(widths[i]) for i in shown).rstrip()
