"""Judged records as rows for people."""

import io
from dataclasses import replace
from ipaddress import ip_address

import pytest

from exporters.terminal import Screen
from exporters.text import TextWriter, endpoint, ends, explanation, summary_text
from tests.unit import samples
from tests.unit.samples import BACKEND6, CLIENT6, flow
from tracer.cluster.match import PodRef
from tracer.judge.cause import Cause
from tracer.judge.proxy_word import ProxyWord
from tracer.judge.verdict import SeenAccept, Summary
from tracer.judge.view import View
from tracer.model import Status
from tracer.proxy_headers import ClientForm, ProxyHeader
from tracer.ruleset.rule import Owner

NARROW = Screen(width=80, height=24)


def written(*judged):
    """Write things; return the lines, cut into cells where columns are two spaces apart."""
    out = io.StringIO()
    writer = TextWriter(out)
    for each in judged:
        writer.write(each)
    return out.getvalue().splitlines()


def cells(line, heading):
    """Cut a line under the places where the heading's words begin."""
    words = [
        "TIME", "NODE", "VERDICT", "PROTO", "CLIENT", "SENT TO", "BACKEND SEES", "BACKEND  ",
        "SERVICE", "CAUSE",
    ]  # fmt: skip
    starts = [heading.index(word) for word in words]
    assert starts == sorted(starts)
    return [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]


def seen(accept):
    return SeenAccept(accept=accept, time_ns=samples.CLOCK_OFFSET_NS + samples.KTIME_NS)


def test_connection():
    """A row tells who sent where, who replies, and whom the backend sees."""
    heading, row = written(samples.judged(*samples.REPLACED, mark=0x4000))
    assert cells(row, heading) == [
        "00:00:00.123", "node2", "replaced", "tcp", "198.51.100.10:46356", "10.240.0.5:30080",
        "10.240.0.5:65241", "10.244.1.11:8080", "-", "-",
    ]  # fmt: skip


def test_explained_connection():
    """Known facts have names: the backend's pod, the Service and the way in, the cause."""
    heading, row = written(samples.explained())
    assert cells(row, heading)[6:] == [
        "10.240.0.5:65241", "default/p11:8080", "default/nodeport:http (nodeport)",
        "external-traffic-policy-cluster",
    ]  # fmt: skip


def test_unnamed_port():
    """A Service's only port need not have a name."""
    heading, row = written(samples.explained(service=replace(samples.SERVICE, port=None)))
    assert cells(row, heading)[8] == "default/nodeport (nodeport)"


HIDDEN = "_hidden"
TOKEN = samples.named(ProxyHeader.FORWARDED, None, None, form=ClientForm.TOKEN, token=HIDDEN)
UNKNOWN = samples.named(ProxyHeader.PROXY_V1, None, None, form=ClientForm.UNKNOWN)
FAR = samples.named(ProxyHeader.X_FORWARDED_FOR, "2001:db8::7", 80)
FORGED = samples.word(FAR, is_trusted=False, client=None, by=None)


@pytest.mark.parametrize(
    ("told", "client", "cause"),
    [
        (
            samples.word(),
            "198.51.100.7:56324 via 198.51.100.10:46356",
            "load-balancer-proxy (PROXY v2)",
        ),
        (
            samples.word(FAR, samples.named()),
            "[2001:db8::7]:80 via 198.51.100.10:46356",
            "load-balancer-proxy (PROXY v2 and X-Forwarded-For)",
        ),
        (
            samples.word(TOKEN),
            "_hidden via 198.51.100.10:46356",
            "load-balancer-proxy (Forwarded)",
        ),
        (
            samples.word(UNKNOWN),
            "unknown via 198.51.100.10:46356",
            "load-balancer-proxy (PROXY v1)",
        ),
        (
            samples.word(FAR, TOKEN, is_ambiguous=True, client=None, by=None),
            "198.51.100.10:46356",
            "load-balancer-proxy (X-Forwarded-For and Forwarded contradict each other)",
        ),
        (
            FORGED,
            "198.51.100.10:46356",
            "load-balancer-proxy (X-Forwarded-For 2001:db8::7: declared, not trusted (forged?))",
        ),
        (
            ProxyWord(declared=None, peer=FORGED.peer, missing=(ProxyHeader.PROXY_V2,)),
            "198.51.100.10:46356",
            "load-balancer-proxy (no PROXY v2, unlike others)",
        ),
    ],
)
def test_proxied_connection(told, client, cause):
    """The client that a trusted proxy names is shown with the proxy, problems with the cause."""
    heading, row = written(samples.proxied(told))
    assert cells(row, heading)[4] == client
    assert cells(row, heading)[9] == cause


FLANNEL = replace(samples.RULE, owner=Owner.FLANNEL)


@pytest.mark.parametrize(
    ("cause", "rule", "text"),
    [
        (Cause.POD_EGRESS, FLANNEL, "pod-egress (by flannel)"),
        (Cause.OTHER_RULE, FLANNEL, "other-rule (by flannel)"),
        (Cause.POD_EGRESS, None, "pod-egress (by an unknown rule)"),
        (Cause.HAIRPIN, samples.RULE, "hairpin"),
        (None, None, "-"),
    ],
)
def test_cause(cause, rule, text):
    """If a rule is the cause, its owner is named, or shown as unknown."""
    heading, row = written(samples.explained(cause=cause, rule=rule))
    assert cells(row, heading)[9] == text


def test_explanation():
    """On request each row is followed by evidence and advice."""
    out = io.StringIO()
    writer = TextWriter(out, is_explaining=True)
    for each in (samples.explained(), seen(samples.accept()), samples.explained_drop()):
        writer.write(each)
    rows = [line for line in out.getvalue().splitlines() if "  VERDICT  " not in line]
    assert [row for row in rows if row.startswith("    ")] == [
        "    because  the packet was marked",
        "    to keep  set externalTrafficPolicy: Local",
        "    to keep  cost: some nodes drop",
        "    because  there is none",
        "    to fix   run an endpoint",
    ]


def test_explanation_is_harmless():
    """Evidence holds untrusted names and comments: control characters are escaped."""
    judged = samples.explained(evidence=("rule \x1b[2J\nof evil",), advice=("\u202eevil",))
    assert all(line.isprintable() for line in explanation(judged.opinion))


def test_ipv6():
    """Wide addresses widen their columns, also for the rows after them."""
    heading, narrow, wide, after = written(
        *(samples.judged(*each) for each in (samples.REPLACED, samples.REPLACED6, samples.REPLACED))
    )
    assert narrow.index("tcp") == heading.index("PROTO")
    assert [cell for cell in wide.split("  ") if cell][4:8] == [
        "[2001:db8:1::10]:46356", "[fd00:240::5]:30080",
        "[fd00:240::5]:65241", "[fd00:244:1::11]:8080",
    ]  # fmt: skip
    assert after.index("10.240.0.5:30080") == wide.index("[fd00:240::5]:30080")


def test_widest_ipv6():
    """Every column takes the longest address there is."""
    far = "2001:db8:1111:2222:3333:4444:5555:6666"
    near = "2001:db8:1111:2222:3333:4444:5555:7777"
    sent = flow(far, 65535, near, 65534)
    heading, row = written(samples.judged(sent, sent.inverted, status=Status(0)))
    client, sent_to = f"[{far}]:65535", f"[{near}]:65534"
    assert cells(row, heading)[4:8] == [client, sent_to, client, sent_to]


def test_icmp():
    """ICMP has no ports, not even its backend's pod."""
    heading, row = written(samples.judged(samples.PING, samples.PING.inverted, status=Status(0)))
    assert cells(row, heading)[3:8] == [
        "icmp", "198.51.100.10", "10.244.1.11", "198.51.100.10", "10.244.1.11",
    ]  # fmt: skip
    pod = PodRef("default", "p11", "node1")
    ping = replace(samples.judged(samples.PING, samples.PING.inverted), backend_pod=pod)
    heading, row = written(ping)
    assert cells(row, heading)[7] == "default/p11"


def test_drop():
    """A drop's row tells why and where, and has no backend."""
    heading, row = written(
        samples.judged_drop(samples.drop(dst_input=1), dst_input="ip_local_deliver")
    )
    assert cells(row, heading)[2:] == [
        "dropped", "tcp", "198.51.100.10:46356", "10.240.0.5:30080", "-", "-", "-",
        "netfilter-drop (by an unknown rule) NETFILTER_DROP at input",
    ]  # fmt: skip


def test_explained_drop():
    """A drop that is understood has its Service and cause, not the kernel's general reason."""
    heading, row = written(samples.explained_drop())
    assert cells(row, heading)[8:] == [
        "default/nodeport:http (nodeport)", "no-local-endpoint at input",
    ]  # fmt: skip


def test_drop_without_a_cause():
    """The kernel's reason is shown if there is no cause."""
    heading, row = written(samples.explained_drop(cause=None, hook=None, reason="TCP_FLAGS"))
    assert cells(row, heading)[9] == "TCP_FLAGS"


def test_drop_of_a_reply():
    """A dropped reply is shown by the connection it belongs to, and marked as a reply."""
    heading, row = written(
        samples.judged_drop(
            samples.drop(packet=samples.REPLACED[1], is_reply=True), reason="NO_SOCKET", place=None
        )
    )
    assert cells(row, heading)[4] == "198.51.100.10:46356"
    assert cells(row, heading)[9] == "NO_SOCKET (a reply)"


def test_drop_of_what_nobody_could_read():
    """An unknown packet has question marks, not invented addresses."""
    heading, row = written(samples.judged_drop(samples.drop(packet=None, orig=None)))
    assert cells(row, heading)[3:6] == ["?", "?", "?"]


def test_accept():
    """What a socket saw is below what the tracer predicted."""
    _, accepted = written(seen(samples.accept()))
    heading, row = written(samples.judged(*samples.REPLACED))
    assert cells(accepted, heading)[6:8] == cells(row, heading)[6:8]
    assert cells(accepted, heading)[1:3] == ["-", "accepted"]


def test_accept_on_the_way_of_its_connection():
    """A socket's row names the node that sent the connection on to it, the last of several."""
    first = samples.judged(*samples.REPLACED)
    inside = samples.REPLACED[1].inverted
    second = replace(samples.judged(inside, inside.inverted), node="node1")
    heading, *_, row = written(first, second, seen(samples.accept(inside)))
    assert cells(row, heading)[1:3] == ["node1", "accepted"]


def test_names_are_harmless():
    """A node's name cannot move the cursor or start a new line."""
    lines = written(samples.judged(view=View(node="evil\x1b[2J\nnode\u202e")))
    assert len(lines) == 2
    assert "evil\\x1b[2J\\x0anode\\x202e" in lines[1]


@pytest.mark.parametrize(
    ("address", "port", "text"),
    [
        ("192.0.2.1", 80, "192.0.2.1:80"),
        ("192.0.2.1", None, "192.0.2.1"),
        ("2001:db8::1", 80, "[2001:db8::1]:80"),
        ("2001:db8::1", None, "2001:db8::1"),
    ],
)
def test_endpoint(address, port, text):
    """IPv6 is in brackets if a port follows."""
    assert endpoint(ip_address(address), port) == text


def test_ends():
    """Both ends of a tuple, without what is no port."""
    assert ends(flow(CLIENT6, 1, BACKEND6, 0x8000, proto=58)) == (CLIENT6, BACKEND6)


@pytest.mark.parametrize(
    ("connections", "drops", "lost", "text"),
    [
        (0, 0, {}, "0 connections, 0 drops; lost: nothing"),
        (1, 1, {"ring_full": 0}, "1 connection, 1 drop; lost: nothing"),
        (
            2, 3, {"ring_full": 4, "x": 0, "undecodable": 1},
            "2 connections, 3 drops; lost: 4 ring_full, 1 undecodable",
        ),
    ],
)  # fmt: skip
def test_summary(connections, drops, lost, text):
    """The summary says what was seen and lost, then line by line what was not seen."""
    summary = Summary(connections=connections, drops=drops, lost=lost, not_seen=("XDP", "OVS"))
    assert summary_text(summary) == [text, "not seen: XDP", "not seen: OVS"]


def test_summary_is_harmless():
    """What a recording says was lost or not seen cannot move the cursor either."""
    summary = Summary(connections=0, drops=0, lost={"\x1b[2J": 1}, not_seen=("\x1b]0;x\x07",))
    assert all(line.isprintable() for line in summary_text(summary))


def test_narrow_terminal():
    """Where a row would break, a connection is three short lines, a drop two, an accept two."""
    out = io.StringIO()
    writer = TextWriter(out, screen=NARROW)
    writer.write(samples.explained())
    writer.write(samples.explained_drop())
    writer.write(SeenAccept(accept=samples.accept(), time_ns=samples.CLOCK_OFFSET_NS))
    assert out.getvalue() == (
        "00:00:00.123  node2  replaced  tcp  external-traffic-policy-cluster\n"
        "    198.51.100.10:46356 -> 10.240.0.5:30080  default/nodeport:http (nodeport)\n"
        "    default/p11:8080 sees 10.240.0.5:65241\n"
        "00:00:00.123  node2  dropped  tcp  no-local-endpoint at input\n"
        "    198.51.100.10:46356 -> 10.240.0.5:30080  default/nodeport:http (nodeport)\n"
        "23:00:00.000  node2  accepted  tcp  confirmed by the backend's socket\n"
        "    10.244.1.11:8080 sees 10.240.0.5:65241\n"
    )


def test_narrow_terminal_obeys_nothing():
    """Names are as harmless on a narrow terminal as on a wide one."""
    out = io.StringIO()
    pod = PodRef("default", "p\x1b[31m", "node1")
    TextWriter(out, screen=NARROW).write(samples.explained(backend_pod=pod))
    assert "\x1b" not in out.getvalue()
    assert "p\\x1b[31m:8080 sees" in out.getvalue()
