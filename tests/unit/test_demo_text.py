"""The demo's findings as rows for people and as lines of JSON."""

import io
import json
import subprocess
import sysconfig
from dataclasses import replace

import pytest

from exporters.demo import DemoWriter, kept_lines, scenario_to_line
from exporters.terminal import Screen
from lab.agreement import Finding
from lab.services import OBJECTS
from lab.topology import Lab
from tests.unit import samples
from tests.unit.test_agreement import (
    REFUSED_AT,
    REPLACED,
    S3,
    S6,
    S9,
    SAW_NODE2,
    TIMED_OUT,
    UPSTREAM,
    case_of,
    drop,
    proxied,
)
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.ruleset.rule import Owner

ARRIVED = Finding(case=S3, answer=SAW_NODE2, hops=(REPLACED, UPSTREAM), drop=None)
DROPPED = Finding(case=S6, answer=TIMED_OUT, hops=(), drop=drop(REFUSED_AT))
NOTHING = Finding(case=S3, answer=SAW_NODE2, hops=(), drop=None)
WRONG = replace(ARRIVED, hops=(samples.explained(cause=Cause.OTHER_RULE),))


PROXIED = Finding(case=S9, answer=SAW_NODE2, hops=(proxied(), UPSTREAM), drop=None)


def test_behind_a_proxy():
    """The row has the client beside the proxy that names it; the line, what was declared."""
    *_, row, _ = written(PROXIED)
    assert "198.51.100.10:40000 via 10.240.0.1:51000  -> 10.240.0.5:30080" in row
    assert line_of(PROXIED)["proxy"]["client"]["address"] == "198.51.100.10"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(*findings, stream=None, screen=None):
    out = stream or io.StringIO()
    DemoWriter(out, screen).write("iptables", findings)
    return out.getvalue().splitlines()


def line_of(finding):
    text = scenario_to_line(finding)
    assert "\n" not in text
    return json.loads(text)


def test_row():
    """A row shows before and after NAT, the nodes on the way, both answers, and the cause."""
    mode, heading, title, row, end = written(ARRIVED)
    assert mode == "kube-proxy in iptables mode"
    assert title == "S3  NodePort, policy Cluster, node without endpoint"
    assert end == ""
    assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
        "ipv4", "tcp", "replaced", "198.51.100.10:40000", "-> 10.240.0.5:30080",
        "10.240.0.5:61234", "-> 10.244.1.11:8080", "node2 node1", "10.240.0.5", "10.240.0.5",
        "external-traffic-policy-cluster", "agrees",
    ]  # fmt: skip
    for word in ("VERDICT", "BEFORE NAT", "AFTER NAT", "THROUGH", "BACKEND SAW", "SRCIP SAYS"):
        assert row[heading.index(word)] != " "
        assert row[heading.index(word) - 1] == " "


def test_dropped():
    """A drop shows node and hook with a cross, and that nothing arrived."""
    row = written(DROPPED)[3]
    assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
        "ipv4", "tcp", "dropped", "198.51.100.10:40000", "-> 10.240.0.5:30081", "-",
        "X node2 input", "nothing (timeout)", "nothing", "no-local-endpoint", "agrees",
    ]  # fmt: skip


def test_drop_at_an_unknown_hook():
    """A hook that is not known is left out."""
    judged = replace(drop(REFUSED_AT), hook=None)
    assert "  X node2  " in written(replace(DROPPED, drop=judged))[3]


def test_drop_after_a_hop():
    """A drop on the second node comes after the first node."""
    assert "node2 X node1 input" in written(
        replace(ARRIVED, hops=(REPLACED,), drop=drop(UPSTREAM.connection.orig, node="node1"))
    )[3]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (300, ()),
        (120, ("BEFORE NAT", "AFTER NAT")),
        (80, ("BEFORE NAT", "AFTER NAT", "CAUSE")),
        (20, ("BEFORE NAT", "AFTER NAT", "CAUSE")),
    ],
)
def test_narrow_terminal(width, left_out):
    """Columns that do not fit are left out; the verdict and both answers always stay."""
    screen = Screen(width=width, height=24)
    _, heading, _, row, *_ = written(ARRIVED, PROXIED, screen=screen)
    assert max(len(heading), len(row)) <= max(width, 80)
    for word in ("VERDICT", "BEFORE NAT", "AFTER NAT", "BACKEND SAW", "SRCIP SAYS", "CAUSE"):
        assert (word in heading) == (word not in left_out)
    assert row.endswith("agrees")


def test_kept():
    """What is printed for a kept lab names its namespaces and can be pasted."""
    lines = kept_lines(Lab(id="srcip-lab-0a1b2c"), "nftables")
    assert "nftables mode" in lines[0]
    script = [*lines[3:6], 'echo "$n1 $n2"; ls "$objects"; type srcip client']
    done = subprocess.run(
        ["bash", "-euc", "\n".join(script)], capture_output=True, text=True, check=True
    )
    nodes, objects, program, *_ = done.stdout.splitlines()
    assert nodes == "srcip-lab-0a1b2c-node1=node1 srcip-lab-0a1b2c-node2=node2"
    assert objects == str(OBJECTS)
    assert program == f"srcip is {sysconfig.get_path('scripts')}/srcip"
    assert "--net=/run/netns/srcip-lab-0a1b2c-client" in done.stdout


def test_nothing_traced():
    """What was not traced has question marks, and disagrees."""
    row = written(NOTHING)[3]
    assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
        "ipv4", "tcp", "unknown", "?", "-> ?", "-", "?", "10.240.0.5", "?", "-", "DISAGREES",
    ]  # fmt: skip


def test_grouped():
    """Variants of one scenario stand under one title, columns aligned over all of them."""
    lines = written(ARRIVED, ARRIVED, DROPPED)
    titles = [line for line in lines if line and not line.startswith("  ")]
    assert [title.split("  ")[0] for title in titles] == ["kube-proxy in iptables mode", "S3", "S6"]
    rows = [line for line in lines if line.startswith("  ipv4")]
    assert len({row.index("->") for row in rows}) == 1
    assert len({row.index("agrees") for row in rows}) == 1


@pytest.mark.parametrize(
    ("finding", "colour"),
    [(ARRIVED, "33"), (DROPPED, "31"), (WRONG, "31"), (NOTHING, "31")],
    ids=["replaced", "dropped", "wrong", "nothing"],
)
def test_colours(finding, colour, monkeypatch):
    """A verdict has its colour, one that disagrees is red; none without a terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    row = written(finding, stream=Terminal())[3]
    painted = row.split("\x1b[")[1]
    assert painted.startswith(f"{colour}m{finding.verdict}")
    assert "\x1b" not in "".join(written(finding))


def test_json():
    """A line has the keys of the contract."""
    line = line_of(ARRIVED)
    assert line.pop("title")
    assert line.pop("rule")["owner"] == "kube-proxy"
    assert line == {
        "kind": "scenario",
        "version": 1,
        "scenario": "S3",
        "mode": "iptables",
        "family": "ipv4",
        "proto": "tcp",
        "client_address": "10.240.0.5",
        "outcome": "answered",
        "seen_source": "10.240.0.5",
        "orig": {"src": "198.51.100.10", "sport": 40000, "dst": "10.240.0.5", "dport": 30080},
        "reply": {"src": "10.244.1.11", "sport": 8080, "dst": "10.240.0.5", "dport": 61234},
        "nodes": ["node2", "node1"],
        "verdict": "replaced",
        "cause": "external-traffic-policy-cluster",
        "agrees": True,
    }


def test_json_of_a_drop():
    """Nothing was seen: the backend's address is null, with the outcome; the tracer's is absent."""
    line = line_of(DROPPED)
    assert (line["client_address"], line["outcome"]) == (None, "timeout")
    assert not line.keys() & {"seen_source", "orig", "reply", "nodes", "rule"}
    assert (line["verdict"], line["cause"], line["agrees"]) == (
        "dropped",
        "no-local-endpoint",
        True,
    )


def test_json_of_nothing():
    """What was not traced has no cause, and does not agree."""
    line = line_of(NOTHING)
    assert (line["verdict"], line["agrees"]) == ("unknown", False)
    assert not line.keys() & {"seen_source", "orig", "reply", "nodes", "cause", "rule"}


def test_json_names_rule_and_owner():
    """Pod egress names the rule and its owner."""
    rule = replace(samples.RULE, owner=Owner.FLANNEL, chain="FLANNEL-POSTRTG")
    judged = samples.explained(cause=Cause.POD_EGRESS, rule=rule, verdict=Verdict.REPLACED)
    line = line_of(replace(ARRIVED, case=case_of("S13"), hops=(judged,)))
    assert (line["rule"]["owner"], line["rule"]["chain"]) == ("flannel", "FLANNEL-POSTRTG")
