"""Sources that other rules than kube-proxy's replaced."""

from dataclasses import replace

import pytest

from tests.unit import samples, world
from tests.unit.samples import flow
from tests.unit.world import (
    CLIENT,
    ETH0,
    GATEWAY1,
    NODE1,
    NODE2,
    NODE_PORT_LOCAL,
    P11,
    P12,
    P21,
    dumped,
    entry,
    judge,
    plugin,
    rules_of,
    view,
)
from tracer.judge.advice import for_source
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.model import ICMP, Status
from tracer.ruleset.model import Owner, Ruleset

EGRESS = entry(P12, CLIENT, 443, CLIENT, NODE1, target=443, iif=world.POD_B, oif=ETH0)
MASQUERADE = "-A POSTROUTING -s 10.244.1.0/24 -j MASQUERADE"
MYSTERY = "-A POSTROUTING -m mystery --of life -j SNAT --to-source 10.240.0.3"


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_pod_egress(mode):
    """A pod leaves the cluster: the rule is named, with an unknown owner."""
    opinion = judge(EGRESS, view(mode=mode))
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.POD_EGRESS)
    assert (opinion.rule.table, opinion.rule.owner) == ("lab-masq", Owner.UNKNOWN)
    assert opinion.service is None
    assert "SNAT by a rule of unknown owner: " in " ".join(opinion.evidence)
    (advice,) = opinion.advice
    assert "from the rule (owner unknown) in table lab-masq" in advice


@pytest.mark.parametrize(
    ("lines", "owner", "advice"),
    [
        (["-A FLANNEL-POSTRTG -s 10.244.0.0/16 -j MASQUERADE"], Owner.FLANNEL, "--ip-masq"),
        (["-A cali-nat-outgoing -s 10.244.0.0/16 -j MASQUERADE"], Owner.CALICO, "natOutgoing"),
        (
            ["-A IP-MASQ-AGENT -s 10.244.0.0/16 -j MASQUERADE"],
            Owner.IP_MASQ_AGENT, "nonMasqueradeCIDRs",
        ),
        (
            ["-A CILIUM_POST_nat -s 10.244.0.0/16 -j MASQUERADE"],
            Owner.CILIUM, "enable-ipv4-masquerade",
        ),
        # The owner is known, but not its setting: the owner is still named.
        (["-A WEAVE -s 10.244.0.0/16 -j MASQUERADE"], Owner.WEAVE, "from weave's rule"),
    ],
)  # fmt: skip
def test_owners_of_pod_egress(lines, owner, advice):
    """The owner of the rule is known by its names, and so is its setting."""
    chain = lines[0].split()[1]
    rules = rules_of(*lines, f"-A POSTROUTING -j {chain}")
    opinion = judge(EGRESS, view(rules=rules))
    assert (opinion.cause, opinion.rule.owner) == (Cause.POD_EGRESS, owner)
    assert f"SNAT by {owner}'s rule: {opinion.rule}" in opinion.evidence
    assert advice in opinion.advice[0]


@pytest.mark.parametrize("owner", [Owner.KLIPPER_LB, Owner.PORTMAP])
def test_owners_of_inbound_rules(owner):
    """Without a rule that translates traffic to pods, no other route is needed."""
    rule = replace(judge(EGRESS, view()).rule, owner=owner)
    (line,) = for_source(
        Cause.OTHER_RULE, None, backend="its endpoint", version=4, node="node1", rule=rule
    )
    assert line.startswith(f"{owner}: ")
    assert "route" not in line


@pytest.mark.parametrize(
    ("rules", "evidence"),
    [
        (None, "the node's rules were not read"),
        (Ruleset(), "no rule is certain: no rule replaces the source"),
        (Ruleset(unread=("nft: not there",)), "not all rules were read: nft: not there"),
        (rules_of(MYSTERY, MASQUERADE), "no rule is certain: 2 rules may match"),
        (rules_of(MYSTERY), "the rule has a match or action that is not understood"),
        (
            rules_of("-A POSTROUTING -m mystery --of life -j RETURN", MASQUERADE),
            "it is not known whether the rule matches",
        ),
        (rules_of("-A POSTROUTING -m mystery --of life -j ACCEPT", MASQUERADE), "no rule is"),
        (
            rules_of("-A POSTROUTING -j SNAT --to-source 192.0.2.1"),
            "would give a source other than the one seen",
        ),
    ],
)
def test_pod_egress_without_certain_rule(rules, evidence):
    """The cause is known by the addresses; a rule that is not certain is not named as one."""
    opinion = judge(EGRESS, view(rules=rules))
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.POD_EGRESS)
    assert opinion.rule is None
    assert evidence in " ".join(opinion.evidence)
    assert not any(line.startswith("SNAT by ") for line in opinion.evidence)


def test_candidates_are_listed():
    """Rules that may have done it are named in their order, the first three."""
    lines = [f"-A POSTROUTING -m mystery --of {n} -j MASQUERADE" for n in range(5)]
    evidence = judge(EGRESS, view(rules=rules_of(*lines))).evidence
    perhaps = [line for line in evidence if line.startswith("possibly SNAT by")]
    assert [line.split("--of ")[1][0] for line in perhaps] == ["0", "1", "2"]
    assert "no rule is certain: 5 rules may match" in evidence


def test_pod_egress_of_a_dump():
    """An entry read later does not have the interface that the rule asks for."""
    opinion = judge(dumped(EGRESS), view())
    assert (opinion.cause, opinion.rule) == (Cause.POD_EGRESS, None)
    assert "no rule is certain" in " ".join(opinion.evidence)


def test_ping_out_of_the_cluster():
    """A ping has no ports, and no advice that mentions one."""
    ping = flow(P12, 4660, CLIENT, 8 << 8, proto=ICMP)
    answer = flow(CLIENT, 4660, NODE1, 0, proto=ICMP)
    opinion = judge(
        samples.connection(ping, answer, status=Status.SRC_NAT, iif=world.POD_B, oif=ETH0), view()
    )
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.POD_EGRESS)
    assert "4660" not in " ".join(opinion.advice)


@pytest.mark.parametrize(
    ("client", "to", "why"),
    [
        (P12, NODE2, "a node is no stranger to pods"),
        (CLIENT, "192.0.2.1", "whoever it is, it is no pod"),
        (P12, P21, "pods reach each other as they are"),
    ],
)
def test_other_rule(client, to, why):
    """What is neither a Service's nor a pod's egress is named by the rule that did it."""
    connection = entry(client, to, 443, to, NODE1, target=443, oif=ETH0)
    rules = rules_of("-A POSTROUTING -o eth0 -j MASQUERADE")
    opinion = judge(connection, view(rules=rules))
    assert (opinion.cause, opinion.rule.owner) == (Cause.OTHER_RULE, Owner.UNKNOWN), why
    assert judge(connection, view(rules=None)).cause is None
    assert judge(connection, view(rules=Ruleset())).cause is None


def test_other_rule_before_kube_proxy_s():
    """A NodePort connection without the mark was masqueraded by another program."""
    connection = entry(CLIENT, NODE1, NODE_PORT_LOCAL, P11, GATEWAY1)
    rules = rules_of("-A POSTROUTING -d 10.244.0.0/16 -j MASQUERADE")
    opinion = judge(connection, view(rules=rules))
    assert (opinion.cause, opinion.rule.owner) == (Cause.OTHER_RULE, Owner.UNKNOWN)
    assert opinion.service.name == "nodeport-local"
    assert "the packet did not carry kube-proxy's masquerade mark" in opinion.evidence


def test_unmarked_and_only_kube_proxy_s_rule():
    """A rule of kube-proxy is never called one that is not kube-proxy's."""
    connection = entry(CLIENT, "192.0.2.1", 443, "192.0.2.1", NODE1, target=443, oif=ETH0)
    rules = rules_of("-A KUBE-POSTROUTING -j MASQUERADE", "-A POSTROUTING -j KUBE-POSTROUTING")
    for each in (connection, dumped(connection)):
        opinion = judge(each, view(rules=rules))
        assert (opinion.cause, opinion.rule.owner) == (None, Owner.KUBE_PROXY)


def test_docker():
    """What leaves a bridge of Docker is masqueraded by Docker's rule."""
    connection = entry(
        "172.17.0.2", "192.0.2.1", 443, "192.0.2.1", NODE1, target=443, iif=9, oif=ETH0
    )
    interfaces = world.INTERFACES["node1"] | {9: "docker0"}
    opinion = judge(connection, view(rules=plugin("docker"), interfaces=interfaces))
    assert (opinion.cause, opinion.rule.owner) == (Cause.OTHER_RULE, Owner.DOCKER)
    assert "enable_ip_masquerade" in opinion.advice[0]


def test_related_connection():
    """A helper translates what it expects like its master: no rule is certain."""
    related = replace(EGRESS, is_related=True)
    opinion = judge(related, view())
    assert (opinion.cause, opinion.rule) == (Cause.POD_EGRESS, None)
    assert "related" in " ".join(opinion.evidence)
