"""The verdict that two tuples and a status allow."""

import pytest
from hypothesis import given

from tests.unit import samples
from tests.unit.samples import CLIENT, NODE, flow
from tracer.judge.verdict import Verdict, judge_connection
from tracer.model import Hook, Status

SNAT, DNAT = Status.SRC_NAT, Status.DST_NAT
ALONE = "judged from this node's tuples alone: Services and other nodes are not considered"


@pytest.mark.parametrize(
    ("tuples", "status", "verdict"),
    [
        pytest.param(samples.UNTOUCHED, Status(0), "preserved", id="no-nat"),
        pytest.param(samples.PRESERVED, DNAT, "preserved", id="policy-local"),
        pytest.param(samples.REPLACED, SNAT | DNAT, "replaced", id="policy-cluster"),
        pytest.param(samples.REPLACED6, SNAT | DNAT, "replaced", id="policy-cluster-6"),
        pytest.param(
            (samples.SENT, flow(NODE, 30080, "10.240.0.6", 9)), SNAT, "replaced", id="pod-egress"
        ),
        # A source port that was taken: the kernel sets SRC_NAT, the address stays.
        pytest.param(
            (samples.SENT, flow(NODE, 30080, CLIENT, 1024)), SNAT, "preserved", id="port-only"
        ),
        # An entry that is not what its own status says.
        pytest.param(samples.REPLACED, DNAT, "unknown", id="contradiction"),
        pytest.param(samples.REPLACED, Status(0), "unknown", id="contradiction-bare"),
    ],
)
def test_verdict(tuples, status, verdict):
    """The source is replaced if the answer goes elsewhere than to the client, and SNAT says so."""
    assert samples.judged(*tuples, status=status).verdict == verdict


@given(samples.connections)
def test_verdict_of_anything(connection):
    """A preserved source is the client's; a replaced one never is; nothing is dropped here."""
    judged = judge_connection(connection, time_ns=0, node="node")
    assert judged.seen_source == connection.reply.dst
    if judged.verdict is Verdict.PRESERVED:
        assert judged.seen_source == connection.orig.src
    else:
        assert judged.seen_source != connection.orig.src
    assert judged.verdict is not Verdict.DROPPED
    assert judged.evidence[-1] == ALONE


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "the backend answers to 10.240.0.5, not to the client 198.51.100.10: SNAT"),
        ({}, "addressed to 10.240.0.5, answered by 10.244.1.11: DNAT"),
        ({"mark": 0x4000}, "the packet carried mark 0x4000 before SNAT"),
        ({"mark": None}, "the packet's mark before SNAT was not caught"),
        (
            {"mark": None, "hook": Hook.CONNTRACK},
            "read from conntrack: nobody saw the packet, so its mark is not known",
        ),
        ({"status": DNAT}, "conntrack's status 0x20 says it did no SNAT"),
    ],
)
def test_evidence(changes, line):
    """Each fact that the verdict rests on is one line."""
    assert line in samples.judged(*samples.REPLACED, **changes).evidence


def test_evidence_without_nat():
    """What did not happen is not told, but for the SNAT that the verdict is about."""
    assert samples.judged(*samples.UNTOUCHED, status=Status(0)).evidence == (
        "the backend answers to the client's own address 198.51.100.10: no SNAT",
        ALONE,
    )


def test_drop():
    """A drop tells reason, place and hook."""
    judged = samples.judged_drop(samples.drop(dst_input=1), dst_input="ip_local_deliver")
    assert (judged.verdict, judged.hook) == (Verdict.DROPPED, Hook.NF_INPUT)
    assert judged.evidence == (
        "the kernel discarded the packet: NETFILTER_DROP in nf_hook_slow",
        "its route and interface say it was at netfilter's input hook",
        ALONE,
    )


def test_drop_elsewhere():
    """Only a drop by netfilter was at one of its hooks, whatever the packet's state looks like."""
    judged = samples.judged_drop(
        samples.drop(dst_input=1, orig=None),
        reason="NO_SOCKET",
        place=None,
        dst_input="ip_local_deliver",
    )
    assert judged.hook is None
    assert judged.evidence == (
        "the kernel discarded the packet: NO_SOCKET",
        "the packet had no conntrack entry",
        ALONE,
    )


@pytest.mark.parametrize(
    ("packet", "orig", "expected"),
    [
        (samples.PRESERVED[1], samples.SENT, samples.SENT),
        (samples.SENT6, None, samples.SENT6),
        (None, samples.SENT, samples.SENT),
        (None, None, None),
    ],
)
def test_drop_flow(packet, orig, expected):
    """A drop is known by what the client sent, or else by what the packet itself says."""
    assert samples.judged_drop(samples.drop(packet=packet, orig=orig)).flow == expected
