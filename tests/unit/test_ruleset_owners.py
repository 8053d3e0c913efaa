"""The owners of rules, and which rule translates what a pod sends."""

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from tracer.model import TCP
from tracer.ruleset import owners
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Flow, Owner, Ruleset
from tracer.ruleset.nftables import parse_ruleset

FILES = Path(__file__).parents[1] / "data" / "rulesets"
NODE = frozenset({ip_address("192.0.2.10"), ip_address("10.244.1.1")})
OUTSIDE = "198.51.100.10"


def ruleset(name):
    text = (FILES / name).read_text()
    part = parse_save(text, "ipv4") if name.endswith(".iptables") else parse_ruleset(text)
    return Ruleset.of([part])


def flow(src, dst, *, oif="eth0", mark=0, dport=80, is_dnat=False):
    return Flow(
        src=ip_address(src),
        dst=ip_address(dst),
        sport=40000,
        dport=dport,
        proto=TCP,
        orig_dst=ip_address("10.96.0.1") if is_dnat else ip_address(dst),
        orig_dport=dport,
        mark=mark,
        oif=oif,
        local_addresses=NODE,
    )


@pytest.mark.parametrize(
    ("file", "packet", "owner", "action"),
    [
        ("flannel.iptables", flow("10.244.1.5", OUTSIDE), "flannel", "masquerade"),
        ("flannel.json", flow("10.244.1.5", OUTSIDE), "flannel", "masquerade"),
        ("cilium.iptables", flow("10.244.1.5", OUTSIDE), "cilium", "masquerade"),
        ("kindnet.iptables", flow("10.244.1.5", OUTSIDE), "kindnet", "masquerade"),
        ("kindnet.json", flow("10.244.1.5", OUTSIDE), "kindnet", "masquerade"),
        ("kindnet.json", flow("2001:db8:44::5", "2001:db8:c::1"), "kindnet", "masquerade"),
        ("ip-masq-agent.iptables", flow("10.244.1.5", OUTSIDE), "ip-masq-agent", "masquerade"),
        ("portmap.iptables", flow("10.88.0.5", "10.88.0.5", mark=0x2000), "portmap", "masquerade"),
        ("portmap.iptables", flow("10.88.0.5", OUTSIDE), "cni-ipmasq", "masquerade"),
        ("portmap.json", flow("127.0.0.1", "10.88.0.5"), "portmap", "masquerade"),
        ("portmap.json", flow("10.88.0.5", OUTSIDE), "cni-ipmasq", "masquerade"),
        ("docker.iptables", flow("172.17.0.2", OUTSIDE), "docker", "masquerade"),
        ("docker.iptables", flow("172.18.0.2", OUTSIDE), "docker", "masquerade"),
        # Docker's, too, but nothing in it proves that.
        (
            "docker.iptables",
            flow("172.17.0.2", "172.17.0.2", oif="docker0"),
            "unknown",
            "masquerade",
        ),
        ("klipper-lb.iptables", flow(OUTSIDE, "10.43.0.7"), "klipper-lb", "masquerade"),
        # Of the three rules that klipper-lb makes together, two are missing.
        ("klipper-lb.iptables", flow(OUTSIDE, "10.43.0.8"), "unknown", "masquerade"),
        ("aws-vpc-cni.iptables", flow("192.168.3.77", OUTSIDE), "aws-vpc-cni", "snat"),
    ],
)
def test_certain_rule_and_its_owner(file, packet, owner, action):
    """What leaves the pod's network is translated by a rule whose owner is known by name."""
    candidates = ruleset(file).snat_candidates(packet)
    assert candidates.certain is not None, candidates.reason
    assert candidates.certain.owner == owner
    assert candidates.certain.action == action


@pytest.mark.parametrize(
    ("file", "packet"),
    [
        ("flannel.iptables", flow("10.244.1.5", "10.244.2.5")),
        ("flannel.iptables", flow(OUTSIDE, "10.244.1.5", mark=0x4000)),
        ("flannel.json", flow("10.244.1.5", "10.244.2.5")),
        ("cilium.iptables", flow("10.244.1.5", OUTSIDE, oif="cilium_net")),
        ("kindnet.iptables", flow("10.244.1.5", "10.244.2.5")),
        ("kindnet.json", flow("10.244.1.5", "10.244.2.5")),
        ("kindnet.json", flow("10.244.1.5", "192.0.2.10")),
        ("ip-masq-agent.iptables", flow("10.244.1.5", "192.168.7.7")),
        ("portmap.iptables", flow("10.88.0.5", "10.88.0.6")),
        ("portmap.json", flow("10.88.0.5", "224.0.0.251")),
        ("docker.iptables", flow("172.17.0.2", "172.17.0.3", oif="docker0")),
        ("klipper-lb.iptables", flow(OUTSIDE, "10.43.0.9")),
        ("aws-vpc-cni.iptables", flow("192.168.3.77", "192.168.9.9")),
    ],
)
def test_no_rule_for_what_stays_inside(file, packet):
    """What the owners do not translate has no candidate."""
    candidates = ruleset(file).snat_candidates(packet)
    assert (candidates.certain, candidates.possible) == (None, ())


def test_ip_sets_make_candidates():
    """Calico's pools are in ipsets, which are not read: its rule is a candidate, never certain."""
    candidates = ruleset("calico.iptables").snat_candidates(flow("10.244.1.5", OUTSIDE))
    assert candidates.certain is None
    assert candidates.owners == {Owner.CALICO}
    assert not candidates.only.is_understood
    assert "not understood" in candidates.reason


def test_kind_chain_counts_more_than_its_comment():
    """kind's kindnetd copied a comment of ip-masq-agent; the chain tells the owner."""
    candidates = ruleset("kindnet.iptables").snat_candidates(flow("10.244.1.5", OUTSIDE))
    assert candidates.certain.comment.startswith("ip-masq-agent:")
    assert candidates.certain.owner is Owner.KINDNET


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("flannel.iptables", {"flannel"}),
        ("flannel.json", {"flannel"}),
        ("calico.iptables", {"calico"}),
        ("cilium.iptables", {"cilium"}),
        ("kindnet.iptables", {"kindnet"}),
        ("kindnet.json", {"kindnet"}),
        ("ip-masq-agent.iptables", {"ip-masq-agent"}),
        ("portmap.iptables", {"portmap", "cni-ipmasq"}),
        ("portmap.json", {"portmap", "cni-ipmasq"}),
        ("docker.iptables", {"docker"}),
        ("klipper-lb.iptables", {"klipper-lb"}),
        ("aws-vpc-cni.iptables", {"aws-vpc-cni"}),
        ("masquerade-node1.json", set()),
    ],
)
def test_owners_present(file, expected):
    """A rule set names the owners of its rules, and no owner without proof."""
    rules = ruleset(file)
    assert rules.owners == expected
    assert rules.proxy_mode is None


def test_policy_that_drops_is_a_rule():
    """Docker's FORWARD policy is DROP: what no rule accepts is dropped by it, with its chain."""
    packet = replace(flow(OUTSIDE, "10.244.1.5", oif="cni0"), iif="eth0")
    rule = ruleset("docker.iptables").drop_candidates(packet, "forward").certain
    assert (rule.text, rule.chain, rule.action) == ("-P FORWARD DROP", "FORWARD", "drop")


@pytest.mark.parametrize(
    ("chain", "owner"),
    [
        ("KUBE-SVC-ABC", Owner.KUBE_PROXY),
        ("KUBE-KUBELET-CANARY", Owner.UNKNOWN),
        ("KUBE-ROUTER-FORWARD", Owner.KUBE_ROUTER),
        ("KUBE-POD-FW-ABC", Owner.KUBE_ROUTER),
        ("DOCKER_POSTROUTING", Owner.DOCKER),
        ("NETAVARK-HOSTPORT-MASQ", Owner.NETAVARK),
        ("ANTREA-POSTROUTING", Owner.ANTREA),
        ("OVN-KUBE-SNAT-MGMTPORT", Owner.OVN_KUBERNETES),
        ("WEAVE", Owner.WEAVE),
        ("LIBVIRT_PRT", Owner.LIBVIRT),
        ("ufw-before-forward", Owner.UFW),
        ("ts-postrouting", Owner.TAILSCALE),
        # Names that only resemble those of a program.
        ("DOCKERISH", Owner.UNKNOWN),
        ("CNI-abc", Owner.UNKNOWN),
        ("my-KUBE-SVC", Owner.UNKNOWN),
        ("POSTROUTING", Owner.UNKNOWN),
    ],
)
def test_chain_names(chain, owner):
    """A chain is taken for a program's only if its whole name is of that program's kind."""
    assert owners.of_chain(chain) is owner


def test_every_owner_stands_in_the_docs():
    """Each owner has its line in docs/rule-owners.md."""
    text = (Path(__file__).parents[2] / "docs" / "rule-owners.md").read_text()
    assert [owner for owner in Owner if f"`{owner}`" not in text] == []
