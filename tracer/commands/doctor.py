"""srcip doctor: what srcip can see on this node, and why."""

import json
import sys
from dataclasses import replace
from typing import Any

import click

from exporters.terminal import has_colour, paint, printable
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_check, cluster_options
from tracer.kernel.features import Check, Report, examine


@click.command(short_help="Show what srcip can see on this node, and why.")
@options.where_options
@cluster_options
@options.rung_option
@options.output_option
def doctor(output: str, rung: str | None, **parameters: Any) -> None:
    """
    Show what srcip can see on this node, which kernel mechanism it uses, and what stays hidden.

    Tries what 'srcip trace' does: compiles, loads and attaches its programs, then detaches them.
    Exits with 1 if this node cannot be traced. Needs root for the full answer.
    """
    choice = ClusterChoice.of(parameters)
    report = examine(options.namespaces(parameters), options.rung_of(rung))
    objects = cluster_check(choice)
    not_seen = [*report.not_seen]
    if not objects.is_ok:
        not_seen.append("which Service a connection belongs to: no cluster objects")
    report = replace(report, checks=[*report.checks, objects], not_seen=not_seen)
    if output == "json":
        click.echo(json.dumps(_to_object(report)))
    else:
        for line in _lines(report):
            click.echo(line)
    sys.exit(0 if report.rung else 1)


def _lines(report: Report) -> list[str]:
    width = max(len(check.name) for check in report.checks)
    lines = [
        f"{_mark(check)} {printable(check.name):<{width}}  {printable(check.detail)}"
        for check in report.checks
    ]
    lines += ["", f"in use:   {report.rung or 'nothing: this node cannot be traced'}"]
    return lines + [f"not seen: {printable(line)}" for line in report.not_seen]


def _mark(check: Check) -> str:
    if check.is_ok:
        word, colour = "ok  ", "green"
    elif check.is_needed:
        word, colour = "FAIL", "red"
    else:
        word, colour = "no  ", "yellow"
    return paint(word, colour) if has_colour(sys.stdout) else word


def _to_object(report: Report) -> dict[str, object]:
    return {
        "kind": "doctor",
        "version": 1,
        "checks": [
            {
                "name": check.name,
                "ok": check.is_ok,
                "needed": check.is_needed,
                "detail": check.detail,
            }
            for check in report.checks
        ],
        **({"rung": report.rung} if report.rung else {}),
        "not_seen": list(report.not_seen),
    }
