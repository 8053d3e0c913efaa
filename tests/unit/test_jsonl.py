"""Lines of JSON: keys that other programs build on, and nothing that is not known."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.jsonl import summary_to_line, timestamp, to_line
from tests.unit import samples
from tests.unit.samples import BACKEND6, CLIENT, CLIENT6, NODE6, explained, explained_drop, flow
from tracer.cluster.match import PodRef
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.proxy_word import ProxyWord
from tracer.judge.verdict import SeenAccept, Summary
from tracer.judge.view import View
from tracer.model import ClientClass, Hook
from tracer.proxy_headers import ProxyHeader

TIME = "2026-01-01T00:00:00.123456789Z"


def parsed(judged):
    line = to_line(judged)
    assert "\n" not in line
    return json.loads(line)


def seen(accept):
    return SeenAccept(accept=accept, time_ns=samples.CLOCK_OFFSET_NS + samples.KTIME_NS)


def test_connection():
    """A connection has the keys of the contract with the kernel's values."""
    judged = samples.judged(*samples.REPLACED, mark=0x4000)
    line = parsed(judged)
    assert line.pop("evidence") == list(judged.opinion.evidence)
    assert line == {
        "kind": "connection",
        "version": 1,
        "time": TIME,
        "node": "node2",
        "netns": 4026532001,
        "family": "ipv4",
        "proto": "tcp",
        "orig": {"src": "198.51.100.10", "sport": 46356, "dst": "10.240.0.5", "dport": 30080},
        "reply": {"src": "10.244.1.11", "sport": 8080, "dst": "10.240.0.5", "dport": 65241},
        "client": {"address": "198.51.100.10"},
        "seen_source": "10.240.0.5",
        "backend": {"address": "10.244.1.11", "port": 8080},
        "zone": 0,
        "status": 0x30,
        "mark": 0x4000,
        "verdict": "replaced",
        "at": {"node": "node2", "hook": "postrouting"},
        "advice": [],
    }


def test_proxied_connection():
    """A connection behind proxies has what they declare, and which client counts by which proxy."""
    far = samples.named(ProxyHeader.X_FORWARDED_FOR, "2001:db8::7", None)
    told = samples.word(far, samples.named(), peer="10.0.0.9", missing=(ProxyHeader.FORWARDED,))
    assert parsed(samples.proxied(told))["proxy"] == {
        "peer": "10.0.0.9",
        "trusted": True,
        "opening": "other",
        "declared": [
            {"header": "x-forwarded-for", "form": "address", "address": "2001:db8::7"},
            {"header": "proxy-v2", "form": "address", "address": "198.51.100.7", "port": 56324},
        ],
        "client": {
            "header": "x-forwarded-for",
            "form": "address",
            "address": "2001:db8::7",
            "by": "10.0.0.9",
        },
        "missing": ["forwarded"],
    }


def test_connection_without_first_bytes():
    """If headers are read and none came, only the peer and the missing header are named."""
    told = ProxyWord(declared=None, peer=ip_address(CLIENT))
    line = parsed(replace(explained(), word=told))
    assert line["proxy"] == {"peer": CLIENT, "trusted": False, "declared": []}


def test_explained_connection():
    """A connection that is understood names class, Service, pod, cause, rule and advice."""
    line = parsed(explained())
    assert line["client"] == {"address": CLIENT, "class": "external"}
    assert line["backend"] == {
        "address": "10.244.1.11", "port": 8080, "pod": "default/p11", "node": "node1",
    }  # fmt: skip
    assert line["service"] == {
        "namespace": "default",
        "name": "nodeport",
        "port": "http",
        "via": "nodeport",
        "policy": "Cluster",
    }
    assert (line["verdict"], line["cause"]) == ("replaced", "external-traffic-policy-cluster")
    assert line["rule"] == {
        "owner": "kube-proxy",
        "table": "nat",
        "chain": "KUBE-POSTROUTING",
        "text": "-A KUBE-POSTROUTING -j MASQUERADE",
    }
    assert line["advice"] == list(explained().opinion.advice) != []


def test_what_is_known_of_a_service():
    """An unnamed port, and the policy of a way that has none, are absent."""
    line = parsed(explained(service=replace(samples.SERVICE, port=None, policy=None)))
    assert line["service"] == {"namespace": "default", "name": "nodeport", "via": "nodeport"}


def test_pod_of_a_node_that_is_not_known():
    """A pod is named without its node if only its name is known."""
    line = parsed(explained(backend_pod=PodRef("default", "p11", None)))
    assert line["backend"]["pod"] == "default/p11"
    assert "node" not in line["backend"]


@pytest.mark.parametrize("client_class", ClientClass)
def test_classes(client_class):
    """Classes are named as the contract names them."""
    assert parsed(explained(client_class=client_class))["client"]["class"] in {
        "pod", "node", "loadbalancer", "loopback", "external",
    }  # fmt: skip


@pytest.mark.parametrize("cause", Cause)
def test_causes(cause):
    """Causes are named as in the legend."""
    assert parsed(explained(cause=cause))["cause"] == cause.value


def test_connection_6():
    """IPv6 addresses are written in their short form, without brackets."""
    line = parsed(samples.judged(*samples.REPLACED6))
    assert line["family"] == "ipv6"
    assert (line["client"]["address"], line["orig"]["dst"]) == (CLIENT6, NODE6)
    assert line["backend"] == {"address": BACKEND6, "port": 8080}


@pytest.mark.parametrize(("mark", "has_mark"), [(None, False), (0, True), (1, True)])
def test_mark(mark, has_mark):
    """A mark that was not seen is absent; a mark of zero is a fact."""
    line = parsed(samples.judged(mark=mark))
    assert ("mark" in line) is has_mark
    assert line.get("mark") == mark


def test_icmp():
    """ICMP has id, type and code in place of ports, and its backend has no port."""
    line = parsed(samples.judged(samples.PING, samples.PING.inverted))
    ends = {"src": CLIENT, "dst": samples.BACKEND, "id": 4660, "code": 0}
    assert line["proto"] == "icmp"
    assert line["orig"] == {**ends, "type": 8}
    assert line["reply"] == {**ends, "src": samples.BACKEND, "dst": CLIENT, "type": 0}
    assert line["backend"] == {"address": samples.BACKEND}


def test_icmp_6():
    """An unreachable message of ICMPv6 keeps type and code apart."""
    error = flow(CLIENT6, 0, BACKEND6, 1 << 8 | 4, proto=58)
    line = parsed(samples.judged(error, error.inverted))
    assert (line["proto"], line["orig"]["type"], line["orig"]["code"]) == ("icmpv6", 1, 4)


def test_drop():
    """A drop says what was sent, why it was discarded and where."""
    judged = samples.judged_drop(samples.drop(dst_input=1), dst_input="ip_local_deliver")
    line = parsed(judged)
    sent = {"src": "198.51.100.10", "sport": 46356, "dst": "10.240.0.5", "dport": 30080}
    assert line.pop("evidence") == list(judged.opinion.evidence)
    assert line == {
        "kind": "drop",
        "version": 1,
        "time": TIME,
        "node": "node2",
        "netns": 4026532001,
        "family": "ipv4",
        "proto": "tcp",
        "orig": sent,
        "packet": sent,
        "direction": "original",
        "reason": "NETFILTER_DROP",
        "at": {"node": "node2", "hook": "input", "function": "nf_hook_slow"},
        "client": {"address": "198.51.100.10"},
        "verdict": "dropped",
        "cause": "netfilter-drop",
        "advice": [],
    }


def test_explained_drop():
    """A drop that is understood names class, Service, cause and advice."""
    line = parsed(explained_drop())
    assert line["client"]["class"] == "external"
    assert (line["service"]["name"], line["cause"]) == ("nodeport", "no-local-endpoint")
    assert line["advice"] == ["run an endpoint"]


def test_drop_of_a_reply():
    """The original tuple is the connection's; the packet's own may be the other direction."""
    judged = samples.judged_drop(samples.drop(packet=samples.REPLACED[1], is_reply=True))
    line = parsed(judged)
    assert line["direction"] == "reply"
    assert line["orig"]["src"] == "198.51.100.10"
    assert line["packet"]["src"] == "10.244.1.11"


def test_drop_of_what_nobody_could_read():
    """What is not known of a drop is absent."""
    judged = samples.judged_drop(
        samples.drop(packet=None, orig=None, iif=1), reason="reason 77", place=None
    )
    line = parsed(judged)
    assert not line.keys() & {"orig", "packet", "family", "proto", "client", "service", "cause"}
    assert line["at"] == {"node": "node2"}
    assert line["reason"] == "reason 77"


def test_accept():
    """An accept has the peer as the socket sees it, and the socket's own end."""
    assert parsed(seen(samples.accept())) == {
        "kind": "accept",
        "version": 1,
        "time": TIME,
        "family": "ipv4",
        "proto": "tcp",
        "netns": 4026532001,
        "peer": {"address": "10.240.0.5", "port": 65241},
        "local": {"address": "10.244.1.11", "port": 8080},
    }


def test_summary():
    """The last line says what was seen, what was lost and what cannot be seen."""
    summary = Summary(connections=12, drops=1, lost={"ring_full": 0}, not_seen=("XDP",))
    assert json.loads(summary_to_line(summary)) == {
        "kind": "summary",
        "version": 1,
        "connections": 12,
        "drops": 1,
        "lost": {"ring_full": 0},
        "not_seen": ["XDP"],
    }


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (999_999_999, "1970-01-01T00:00:00.999999999Z"),
        (1_767_225_600_000_000_000, "2026-01-01T00:00:00.000000000Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
    ],
)
def test_timestamp(time_ns, text):
    """Times have nanoseconds, all nine digits."""
    assert timestamp(time_ns) == text


@given(st.integers(-(2**63), 2**64 + 2**63))
def test_timestamp_of_any_record(time_ns):
    """Any time that a record can have is written, exact to the nanosecond."""
    text = timestamp(time_ns)
    moment = datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    assert int(moment.timestamp()) * 10**9 + int(text[20:29]) == time_ns
    assert (text[19], text[29:]) == (".", "Z")


def has_nothing_empty(value):
    """Evidence and advice are always lists; there may be nothing to advise."""
    if isinstance(value, dict):
        return all(key == "advice" or has_nothing_empty(each) for key, each in value.items())
    return value is not None and value not in ("", [])


names = st.text(min_size=1)


@given(samples.connections, names)
def test_any_connection(connection, node):
    """Each line is one line of ASCII that parses, without null or empty values."""
    text = to_line(judge_connection(connection, View(node=node), time_ns=connection.ktime_ns))
    assert text.isascii()
    assert "\n" not in text
    line = json.loads(text)
    assert line["node"] == node
    assert has_nothing_empty(line)


@given(samples.drops, names, names, st.none() | names)
def test_any_drop(drop, node, reason, place):
    """Each line is one line of ASCII that parses, without null or empty values."""
    text = to_line(
        judge_drop(
            drop,
            View(node=node),
            time_ns=drop.ktime_ns,
            reason=reason,
            place=place,
            dst_input=None,
        )
    )
    assert text.isascii()
    assert "\n" not in text
    line = json.loads(text)
    assert (line["reason"], line["at"].get("function")) == (reason, place)
    assert has_nothing_empty(line)


@given(samples.accepts)
def test_any_accept(accept):
    """Each line parses, without null or empty values."""
    assert has_nothing_empty(parsed(seen(accept)))


@pytest.mark.parametrize("hook", Hook)
def test_hooks(hook):
    """The hook is named as iptables names its chain, in lower case."""
    assert parsed(samples.judged(hook=hook))["at"]["hook"] == hook.label
