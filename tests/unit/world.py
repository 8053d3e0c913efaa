"""The recorded cluster and what its nodes know, for tests of the judge."""

import json
from functools import cache
from ipaddress import ip_address
from pathlib import Path

from lab import hosts
from lab.kube_proxy import DATA
from lab.services import OBJECTS
from tests.unit import samples
from tests.unit.samples import flow
from tracer.cluster import snapshot
from tracer.cluster.index import Cluster
from tracer.cluster.parse import parse
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.view import View
from tracer.model import Hook, Status
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Ruleset
from tracer.ruleset.nftables import parse_ruleset

FILES = Path(__file__).parents[1] / "data" / "rulesets"
IPVS = Path(__file__).parents[1] / "data" / "ipvs"
CLUSTER = snapshot.load(OBJECTS)
MARK = 0x4000

CLIENT, CLIENT6 = str(hosts.CLIENT.ipv4), str(hosts.CLIENT.ipv6)
NODE1, GATEWAY1 = "10.240.0.3", "10.244.1.1"
NODE2, GATEWAY2 = "10.240.0.5", "10.244.2.1"
P11, P12, P21, P22 = "10.244.1.11", "10.244.1.12", "10.244.2.21", "10.244.2.22"
CLUSTER_IP, LOAD_BALANCER, EXTERNAL_IP = "10.0.170.92", "203.0.113.50", "203.0.113.60"
LOAD_BALANCER_LOCAL, LOAD_BALANCER_RANGES = "203.0.113.51", "203.0.113.52"
INTERNAL_LOCAL, NO_ENDPOINTS = "10.0.170.100", "10.0.170.102"
# NodePorts of the Services nodeport, nodeport-local and no-endpoints.
NODE_PORT, NODE_PORT_LOCAL, NODE_PORT_NO_ENDPOINTS = 30080, 30081, 30089

ETH0, POD_A, POD_B = 2, 3, 4
INTERFACES = {
    "node1": {1: "lo", ETH0: "eth0", POD_A: "veth-p11", POD_B: "veth-p12"},
    "node2": {1: "lo", ETH0: "eth0", POD_A: "veth-p21", POD_B: "veth-p22"},
}


def cluster_of(*objects):
    """Index objects written as JSON."""
    return Cluster.build(map(parse, objects))


@cache
def recorded(mode, node):
    """
    Read the rules that a real kube-proxy made, and the network plugin's beside them.

    In IPVS mode they are the lab's, made after kube-proxy's source, as a kernel gave them back.
    """
    if mode == "nftables":
        return Ruleset.of([parse_ruleset((FILES / f"kube-proxy-{node}.json").read_text())])
    saves = IPVS if mode == "ipvs" else DATA / "iptables"
    return Ruleset.of(
        [
            parse_save((saves / f"{node}.iptables").read_text(), "ipv4"),
            parse_save((saves / f"{node}.ip6tables").read_text(), "ipv6"),
            parse_ruleset((FILES / f"masquerade-{node}.json").read_text()),
        ]
    )


def ipvs_lines(name):
    """Read what was recorded of the lab in IPVS mode, one JSON object per line."""
    return [json.loads(line) for line in (IPVS / name).read_text().splitlines()]


@cache
def plugin(name):
    """Read the rules of one network plugin, as a file has them."""
    return Ruleset.of([parse_save((FILES / f"{name}.iptables").read_text(), "ipv4")])


def rules_of(*lines, table="nat"):
    """Read a few lines of iptables-save; built-in chains accept."""
    built_in = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
    chains = {line.split()[1] for line in lines} - set(built_in)
    heads = [f":{chain} ACCEPT [0:0]" for chain in built_in]
    heads += [f":{chain} - [0:0]" for chain in sorted(chains)]
    text = "\n".join([f"*{table}", *heads, *lines, "COMMIT", ""])
    return Ruleset.of([parse_save(text, "ipv4")])


def addresses_of(node):
    here = hosts.NODES[node]
    return frozenset(
        address.of(family) for address in (here.address, here.gateway) for family in hosts.FAMILIES
    )


def view(node="node1", mode="iptables", **changes):
    """Return what a node of the recorded cluster knows, with some of it changed."""
    values = {
        "node": node,
        "cluster": CLUSTER,
        "addresses": addresses_of(node),
        "interfaces": INTERFACES[node],
    }
    if "rules" not in changes:
        values["rules"] = recorded(mode, node)
    return View(**values | changes)


def entry(client, to, port, backend, seen, *, target=8080, sport=40000, proto=6, **changes):
    """Return the conntrack entry of a connection, as the node that translates it has it."""
    orig = flow(client, sport, to, port, proto)
    reply = flow(backend, target, seen, sport, proto)
    status = Status.CONFIRMED
    status |= Status.SRC_NAT if reply.dst != orig.src else 0
    status |= Status.DST_NAT if (reply.src, reply.sport) != (orig.dst, orig.dport) else 0
    values = {"status": status, "mark": 0, "iif": ETH0, "oif": POD_A}
    return samples.connection(orig, reply, **values | changes)


def dumped(connection):
    """Return an entry as conntrack's table shows it later: no mark, no interfaces."""
    values = {"mark": None, "iif": 0, "oif": 0, "hook": Hook.CONNTRACK}
    return samples.connection(connection.orig, connection.reply, status=connection.status, **values)


def judge(connection, node_view):
    return judge_connection(connection, node_view, time_ns=0).opinion


# Where the kernel drops: the packet's interfaces and route there.
AT = {
    "prerouting": {"iif": ETH0, "ifindex": ETH0, "dst_ifindex": 0, "dst_input": None},
    "input": {"iif": ETH0, "ifindex": ETH0, "dst_ifindex": 1, "dst_input": "ip_local_deliver"},
    "forward": {"iif": ETH0, "ifindex": ETH0, "dst_ifindex": POD_A, "dst_input": "ip_forward"},
    # In and out by the same interface: forward and postrouting look alike.
    "out-again": {"iif": ETH0, "ifindex": ETH0, "dst_ifindex": ETH0, "dst_input": "ip_forward"},
    "output": {"iif": 0, "ifindex": 0, "dst_ifindex": ETH0, "dst_input": "dst_discard"},
    "loopback": {"iif": 1, "ifindex": 1, "dst_ifindex": 1, "dst_input": "ip_local_deliver"},
}


def discard(packet, node_view, *, at="forward", reason="NETFILTER_DROP", **changes):
    """Judge the drop of a packet at a place; its connection is what was sent, unless given."""
    where = AT[at]
    dst_input = where["dst_input"]
    values = where | {"packet": packet, "orig": packet, "dst_input": 1 if dst_input else None}
    return judge_drop(
        samples.drop(**values | changes),
        node_view,
        time_ns=0,
        reason=reason,
        place="nf_hook_slow",
        dst_input=dst_input,
    )


def sent(client, to, port, *, proto=6, sport=40000):
    """Return what a client sent."""
    return flow(client, sport, to, port, proto)


def address(text):
    return ip_address(text)
