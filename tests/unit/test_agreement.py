"""When the tracer's answer agrees with the backend's, and when it does not."""

from dataclasses import replace

import pytest

from lab import hosts
from lab.agreement import Finding, Traced
from lab.probe import Answer
from lab.scenarios import cases
from tests.unit import samples
from tests.unit.samples import flow
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict

CLIENT, NODE2, P11 = str(hosts.CLIENT.ipv4), "10.240.0.5", "10.244.1.11"
POLICY = Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER
LOCAL = (hosts.CLIENT.ipv4, 40000)
# S3: node2 replaces the client's address by its own and sends the connection on to node1.
SENT = flow(CLIENT, 40000, NODE2, 30080)
AT_NODE2 = flow(P11, 8080, NODE2, 61234)


def case_of(scenario):
    (case,) = cases(modes=["iptables"], families=["ipv4"], protos=["tcp"], scenarios=[scenario])
    return case


def hop(node, orig, reply, verdict, cause=None):
    """Return one node's word on a connection."""
    return replace(
        samples.explained(verdict=verdict, cause=cause),
        connection=samples.connection(orig, reply),
        node=node,
    )


def drop(packet, *, node="node2", cause=Cause.NO_LOCAL_ENDPOINT, **changes):
    dropped = samples.drop(packet=packet, orig=packet, **changes)
    return replace(samples.explained_drop(dropped, cause=cause), node=node)


REPLACED = hop("node2", SENT, AT_NODE2, Verdict.REPLACED, POLICY)
UPSTREAM = hop("node1", AT_NODE2.inverted, AT_NODE2, Verdict.REPLACED_UPSTREAM, POLICY)
S3, S6 = case_of("S3"), case_of("S6")
SAW_NODE2 = Answer(
    outcome="answered", client_address=hosts.NODE2.address.ipv4, client_port=61234, local=LOCAL
)
TIMED_OUT = Answer(outcome="timeout", local=LOCAL)
REFUSED_AT = flow(CLIENT, 40000, NODE2, 30081)


def find(case, answer, *judged):
    traced = Traced()
    traced.add(judged)
    return traced.find(case, answer)


S9 = case_of("S9b")
PROXY = str(hosts.ROUTER_TO_NODES.ipv4)
BY_PROXY = flow(PROXY, 51000, NODE2, 30080)


def proxied(client=CLIENT, port=40000):
    told = samples.word(samples.named(address=client, port=port), peer=PROXY)
    first = hop("node2", BY_PROXY, AT_NODE2, Verdict.PROXIED, Cause.LOAD_BALANCER_PROXY)
    return replace(first, word=told)


def test_behind_a_proxy():
    """A proxy's connection belongs to the client that its header names, by address and port."""
    found = find(S9, SAW_NODE2, proxied(), UPSTREAM)
    assert [each.node for each in found.hops] == ["node2", "node1"]
    assert found.agrees
    for stranger in (proxied(port=40001), proxied(client="192.0.2.1")):
        assert not find(S9, SAW_NODE2, stranger, UPSTREAM).agrees


def test_path():
    """Hops are found along the path, each by the reply that the previous one expects."""
    other = hop("node1", flow("192.0.2.1", 1, P11, 2), flow(P11, 2, "192.0.2.1", 1), "preserved")
    finding = find(S3, SAW_NODE2, UPSTREAM, other, REPLACED)
    assert finding.hops == (REPLACED, UPSTREAM)
    assert finding.drop is None
    assert str(finding.seen_source) == NODE2
    assert finding.agrees


def test_node_that_replaced_decides():
    """Over the whole path, the node that replaced the source decides."""
    finding = find(S3, SAW_NODE2, UPSTREAM, REPLACED)
    assert (finding.verdict, finding.cause) == (Verdict.REPLACED, POLICY)
    assert finding.opinion == REPLACED.opinion


@pytest.mark.parametrize(
    ("verdicts", "decides"),
    [
        ([Verdict.PRESERVED, Verdict.REPLACED], 1),
        ([Verdict.PRESERVED, Verdict.PROXIED], 1),
        ([Verdict.PRESERVED, Verdict.UNKNOWN], 1),
        ([Verdict.UNKNOWN, Verdict.REPLACED], 1),
        ([Verdict.PROXIED, Verdict.REPLACED], 1),
        ([Verdict.REPLACED, Verdict.UNKNOWN], 0),
        # A node that saw only another node's address knows less than that node.
        ([Verdict.PRESERVED, Verdict.REPLACED_UPSTREAM], 0),
        ([Verdict.PRESERVED, Verdict.PRESERVED], 0),
    ],
)
def test_which_hop_decides(verdicts, decides):
    """A node that did something knows more than one that saw nothing done."""
    there = SENT.inverted
    hops = [
        hop("node2", SENT, there, verdicts[0]), hop("node1", SENT, there, verdicts[1])
    ]  # fmt: skip
    finding = Finding(case=S3, answer=SAW_NODE2, hops=tuple(hops), drop=None)
    assert finding.opinion is hops[decides].opinion
    assert finding.verdict is verdicts[decides]


def test_nothing_was_traced():
    """A finding without data agrees with neither an answer nor a timeout."""
    for case, answer in ((S3, SAW_NODE2), (S6, TIMED_OUT)):
        finding = find(case, answer)
        assert (finding.verdict, finding.cause, finding.opinion) == (Verdict.UNKNOWN, None, None)
        assert finding.seen_source is None
        assert not finding.agrees


@pytest.mark.parametrize(
    ("judged", "why"),
    [
        ([hop("node2", SENT, AT_NODE2, Verdict.REPLACED)], "the cause is missing"),
        ([hop("node2", SENT, AT_NODE2, Verdict.REPLACED, Cause.OTHER_RULE)], "another cause"),
        ([hop("node2", SENT, AT_NODE2, Verdict.UNKNOWN, POLICY)], "another verdict"),
        ([hop("node2", SENT, AT_NODE2, Verdict.PRESERVED)], "another verdict and cause"),
        (
            [hop("node2", SENT, flow(P11, 8080, "10.240.0.9", 61234), Verdict.REPLACED, POLICY)],
            "another address",
        ),
        (
            [hop("node2", SENT, flow(P11, 8080, CLIENT, 40000), Verdict.REPLACED, POLICY)],
            "the client's address",
        ),
        ([UPSTREAM], "the first node's word is missing"),
        (
            [hop("node2", flow(CLIENT, 40001, NODE2, 30080), AT_NODE2, Verdict.REPLACED, POLICY)],
            "another connection of the same client",
        ),
        (
            [hop("node2", flow(CLIENT, 40000, NODE2, 30080, 17), AT_NODE2, "replaced", POLICY)],
            "another protocol",
        ),
        ([REPLACED, drop(AT_NODE2.inverted, node="node1")], "it was dropped after all"),
        ([drop(SENT)], "it was dropped at once"),
    ],
)
def test_disagreement(judged, why):
    """If any one thing differs from the backend or the table, the finding does not agree."""
    assert not find(S3, SAW_NODE2, *judged).agrees, why


def test_second_node_s_address_counts():
    """What the backend sees is what the last node sends."""
    again = hop(
        "node1", AT_NODE2.inverted, flow(P11, 8080, "10.244.1.1", 7), Verdict.REPLACED, POLICY
    )
    finding = find(S3, SAW_NODE2, REPLACED, again)
    assert str(finding.seen_source) == "10.244.1.1"
    assert not finding.agrees


def test_answer_without_drop():
    """If nothing arrived, a path without its drop does not agree."""
    assert not find(S6, TIMED_OUT, hop("node2", REFUSED_AT, REFUSED_AT.inverted, "dropped",
                                       Cause.NO_LOCAL_ENDPOINT)).agrees  # fmt: skip


@pytest.mark.parametrize(
    ("judged", "is_agreeing"),
    [
        (drop(REFUSED_AT), True),
        (drop(REFUSED_AT, cause=Cause.NETFILTER_DROP), False),
        (drop(REFUSED_AT, cause=None), False),
        (drop(SENT), False),
        # The drop of a reply is not the drop of the request.
        (drop(REFUSED_AT, is_reply=True), False),
        (replace(drop(REFUSED_AT), drop=samples.drop(packet=None, orig=None)), False),
    ],
)
def test_drop(judged, is_agreeing):
    """A connection that was not answered has its drop, with the table's cause."""
    finding = find(S6, TIMED_OUT, judged)
    assert finding.agrees is is_agreeing
    assert (finding.drop is not None) == (finding.verdict is Verdict.DROPPED)
    assert finding.seen_source is None


def test_drop_on_the_second_node():
    """A drop may come after a node that let it pass."""
    passed = hop("node2", REFUSED_AT, flow(P11, 8080, NODE2, 7), Verdict.REPLACED, POLICY)
    dropped = drop(flow(NODE2, 7, P11, 8080), node="node1", cause=Cause.NETFILTER_DROP)
    finding = find(S6, TIMED_OUT, passed, dropped)
    assert (finding.hops, finding.drop) == ((passed,), dropped)
    assert (finding.verdict, finding.cause) == (Verdict.DROPPED, Cause.NETFILTER_DROP)
    assert not finding.agrees


def test_answered_and_dropped():
    """An answer that the backend gave does not agree with a drop, nor the other way round."""
    assert not find(S3, SAW_NODE2, REPLACED, drop(SENT)).agrees
    assert not find(S6, replace(SAW_NODE2, local=LOCAL), drop(REFUSED_AT)).agrees


def test_first_drop_counts():
    """Retransmissions are dropped again: the first drop is the one shown."""
    first, again = drop(REFUSED_AT), drop(REFUSED_AT, ktime_ns=1)
    assert find(S6, TIMED_OUT, first, again).drop is first


def test_path_that_runs_in_a_circle():
    """A node is crossed once: entries that lead back cause no endless loop."""
    back = hop("node2", SENT, SENT.inverted, Verdict.PRESERVED)
    assert find(S3, SAW_NODE2, back, back).hops == (back,)


def test_same_tuple_on_two_nodes():
    """A connection that nobody translates has the same tuple on each node."""
    hops = [hop(node, SENT, SENT.inverted, Verdict.PRESERVED) for node in ("node2", "node1")]
    finding = find(S3, SAW_NODE2, *hops)
    assert [each.node for each in finding.hops] == ["node2", "node1"]
