"""Whole paths that several tests use: what the nodes saw of connections of the tutorial."""

from dataclasses import replace
from ipaddress import ip_address

from tests.unit import samples
from tests.unit.samples import CLOCK_OFFSET_NS, KTIME_NS, flow
from tracer.cluster.match import PodRef, Via
from tracer.cluster.objects import Policy
from tracer.judge.cause import Cause
from tracer.judge.path import (
    Device,
    Direction,
    Ending,
    Leg,
    Passage,
    Path,
    PathHop,
    Translated,
    Translation,
)
from tracer.judge.verdict import JudgedConnection, Opinion, SeenAccept, ServiceRef, Verdict
from tracer.model import ClientClass, Hook, Hop
from tracer.proxy_headers import ClientForm, ProxyHeader

START_NS = CLOCK_OFFSET_NS + KTIME_NS
NODE1_NETNS, NODE2_NETNS = 4026532002, samples.NETNS
GATEWAY, OTHER_POD = "10.244.1.1", "10.244.1.12"
NETNS = {"node1": NODE1_NETNS, "node2": NODE2_NETNS}

ETH0 = Device(name="eth0")
VXLAN = Device(name="flannel.1", kind="vxlan")
BRIDGE = Device(name="cni0", kind="bridge")
VETH_P11 = Device(name="veth-p11", kind="veth", pod=samples.POD)
VETH_P12 = Device(name="veth-p12", kind="veth", pod=PodRef("default", "p12", "node1"))

IN, OUT = Hook.TC_INGRESS, Hook.TC_EGRESS
PRE, INPUT, FORWARD = Hook.NF_PREROUTING, Hook.NF_INPUT, Hook.NF_FORWARD
OUTPUT, POST = Hook.NF_OUTPUT, Hook.NF_POSTROUTING


def end(address, port):
    return ip_address(address), port


def dnat(before, after):
    return Translation(by=Translated.DNAT, is_source=False, before=before, after=after)


def snat(before, after):
    return Translation(by=Translated.SNAT, is_source=True, before=before, after=after)


def un_dnat(before, after):
    return Translation(by=Translated.UNDO_DNAT, is_source=True, before=before, after=after)


def un_snat(before, after):
    return Translation(by=Translated.UNDO_SNAT, is_source=False, before=before, after=after)


def hop(at_us, hook, packet, *, after=None, device=None, mark=0, done=(), netns=NODE2_NETNS):
    seen = Hop(
        ktime_ns=KTIME_NS + at_us * 1000,
        netns=netns,
        hook=hook,
        packet=packet,
        orig=None,
        reply=None,
        is_reply=False,
        is_new=True,
        is_after_nat=after,
        packet_id=1,
        number=1,
        mark=mark,
        iif=2,
        oif=3,
        length=60,
        tcp_flags=2,
    )
    return PathHop(hop=seen, time_ns=START_NS + at_us * 1000, device=device, translations=done)


def passage(direction, ending, *hops, number=1, drop=None):
    return Passage(direction=direction, number=number, hops=hops, ending=ending, drop=drop)


def judged(node, orig, reply, verdict, cause=None, **changes):
    """Return a node's conntrack entry with an opinion on it."""
    opinion = {
        "verdict": verdict,
        "cause": cause,
        "service": changes.pop("service", samples.SERVICE),
        "client_class": changes.pop("client_class", ClientClass.EXTERNAL),
        "evidence": ("the packet carried kube-proxy's masquerade mark 0x4000 before SNAT",),
        "advice": ("set externalTrafficPolicy: Local", "cost: some nodes drop"),
    }
    return JudgedConnection(
        connection=samples.connection(orig, reply, netns=NETNS.get(node, 1), **changes),
        time_ns=START_NS,
        node=node,
        opinion=Opinion(**opinion),
        backend_pod=samples.POD,
    )


def leg(node, orig, reply, *passages, drop=None, at_us=0, entry=None):
    return Leg(
        node=node,
        netns=NETNS.get(node, 1),
        time_ns=START_NS + at_us * 1000,
        orig=orig,
        reply=reply,
        judged=entry,
        passages=passages,
        drop=drop,
    )


# S3: node2 has no endpoint. It does DNAT and SNAT; the answer goes back through it.


def s3(client=samples.CLIENT, node=samples.NODE, backend=samples.BACKEND, *, has_hops=True):
    """NodePort with policy Cluster, over two nodes."""
    sent = flow(client, 46356, node, 30080)
    inside = flow(node, 65241, backend, 8080)
    reply = inside.inverted
    entries = (
        judged("node2", sent, reply, Verdict.REPLACED, Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER),
        judged("node1", inside, reply, Verdict.REPLACED_UPSTREAM, client_class=ClientClass.NODE),
    )
    first = _s3_node2(sent, inside) if has_hops else ()
    second = _s3_node1(inside) if has_hops else ()
    return Path(
        legs=(
            leg("node2", sent, reply, *first, entry=entries[0]),
            leg("node1", inside, reply, *second, entry=entries[1], at_us=80),
        ),
        accept=SeenAccept(accept=samples.accept(inside), time_ns=START_NS + 250_000),
    )


def _s3_node2(sent, inside):
    between = replace(sent, dst=inside.dst, dport=inside.dport)
    typed, chosen = end(sent.dst, sent.dport), end(inside.dst, inside.dport)
    client, seen = end(sent.src, sent.sport), end(inside.src, inside.sport)
    back = inside.inverted
    half = between.inverted
    return (
        passage(
            Direction.ORIGINAL,
            Ending.SENT,
            hop(0, IN, sent, device=ETH0),
            hop(9, PRE, sent, after=False),
            hop(21, PRE, between, after=True, mark=0x4000, done=(dnat(typed, chosen),)),
            hop(27, FORWARD, between, after=False, mark=0x4000),
            hop(33, POST, between, after=False, mark=0x4000),
            hop(45, POST, inside, after=True, done=(snat(client, seen),)),
            hop(52, OUT, inside, device=ETH0),
        ),
        passage(
            Direction.REPLY,
            Ending.SENT,
            hop(310, IN, back, device=ETH0),
            hop(316, PRE, back, after=False),
            hop(319, PRE, half, after=True, done=(un_snat(seen, client),)),
            hop(324, FORWARD, half, after=False),
            hop(330, POST, half, after=False),
            hop(334, OUT, sent.inverted, device=ETH0, done=(un_dnat(chosen, typed),)),
        ),
    )


def _s3_node1(inside):
    back = inside.inverted

    def seen(at_us, hook, packet, **values):
        return hop(at_us, hook, packet, netns=NODE1_NETNS, **values)

    return (
        passage(
            Direction.ORIGINAL,
            Ending.SENT,
            seen(80, IN, inside, device=ETH0),
            seen(88, PRE, inside, after=False),
            seen(94, PRE, inside, after=True),
            seen(101, FORWARD, inside, after=False),
            seen(108, POST, inside, after=True),
            seen(117, OUT, inside, device=VETH_P11),
        ),
        passage(
            Direction.REPLY,
            Ending.SENT,
            seen(242, IN, back, device=VETH_P11),
            seen(250, PRE, back, after=False),
            seen(262, FORWARD, back, after=False),
            seen(270, POST, back, after=True),
            seen(279, OUT, back, device=ETH0),
        ),
    )


def s3_ipv6():
    """The same over IPv6."""
    return s3(samples.CLIENT6, samples.NODE6, samples.BACKEND6)


def s3_without_hops():
    """Only the nodes' conntrack entries are known."""
    return s3(has_hops=False)


def s3_first_half():
    """Only node2 was traced."""
    path = s3()
    return replace(
        path,
        legs=path.legs[:1],
        accept=None,
        missing=("what happened on node1, where the backend default/p11 runs: it was not traced",),
    )


def s3_second_half():
    """Only node1 was traced: the source was replaced before."""
    path = s3()
    return replace(
        path,
        legs=path.legs[1:],
        missing=("what happened before node1: 10.240.0.5 belongs to node2, which was not traced",),
    )


# S5 and S6: policy Local, with and without an endpoint on the node.

LOCAL = replace(samples.SERVICE, name="nodeport-local", policy=Policy.LOCAL)


def s5():
    """NodePort with policy Local, and an endpoint on the node: the source is kept."""
    sent = flow(samples.CLIENT, 46356, "10.240.0.3", 30081)
    inside = replace(sent, dst=ip_address(samples.BACKEND), dport=8080)
    done = (dnat(end(sent.dst, 30081), end(samples.BACKEND, 8080)),)
    there = passage(
        Direction.ORIGINAL,
        Ending.SENT,
        hop(0, IN, sent, device=ETH0, netns=NODE1_NETNS),
        hop(8, PRE, sent, after=False, netns=NODE1_NETNS),
        hop(17, PRE, inside, after=True, done=done, netns=NODE1_NETNS),
        hop(30, OUT, inside, device=VETH_P11, netns=NODE1_NETNS),
    )
    entry = judged("node1", sent, inside.inverted, Verdict.PRESERVED, service=LOCAL)
    return Path(legs=(leg("node1", sent, inside.inverted, there, entry=entry),))


def s6():
    """NodePort with policy Local, no endpoint on the node: it ends at node2's input."""
    sent = flow(samples.CLIENT, 48782, samples.NODE, 30081)
    drop = samples.explained_drop(samples.drop(packet=sent, orig=sent), service=LOCAL)
    there = passage(
        Direction.ORIGINAL,
        Ending.DROPPED,
        hop(0, IN, sent, device=ETH0),
        hop(7, PRE, sent, after=False),
        hop(12, PRE, sent, after=True),
        drop=drop,
    )
    return Path(legs=(leg("node2", sent, None, there, drop=drop),))


def s12():
    """A pod reaches itself through its own Service."""
    vip = "10.0.170.94"
    sent = flow(samples.BACKEND, 40112, vip, 80)
    between = replace(sent, dst=sent.src, dport=8080)
    inside = replace(between, src=ip_address(GATEWAY), sport=1337)
    there = passage(
        Direction.ORIGINAL,
        Ending.SENT,
        hop(0, IN, sent, device=VETH_P11, netns=NODE1_NETNS),
        hop(3, IN, sent, device=BRIDGE, netns=NODE1_NETNS),
        hop(
            9, PRE, between, after=True, mark=0x4000, netns=NODE1_NETNS,
            done=(dnat(end(vip, 80), end(samples.BACKEND, 8080)),),
        ),
        hop(
            20, POST, inside, after=True, netns=NODE1_NETNS,
            done=(snat(end(samples.BACKEND, 40112), end(GATEWAY, 1337)),),
        ),
        hop(26, OUT, inside, device=BRIDGE, netns=NODE1_NETNS),
        hop(28, OUT, inside, device=VETH_P11, netns=NODE1_NETNS),
    )  # fmt: skip
    service = ServiceRef(
        namespace="default", name="clusterip", port="http", via=Via.CLUSTER_IP, policy=None
    )
    entry = judged(
        "node1", sent, inside.inverted, Verdict.REPLACED, Cause.HAIRPIN,
        service=service, client_class=ClientClass.POD,
    )  # fmt: skip
    return Path(legs=(leg("node1", sent, inside.inverted, there, entry=entry),))


def s19b():
    """internalTrafficPolicy Local, no endpoint on the pod's own node: dropped there."""
    sent = flow("10.244.2.21", 51000, "10.0.7.7", 80)
    service = ServiceRef(
        namespace="default", name="internal-local", port="http", via=Via.CLUSTER_IP,
        policy=Policy.LOCAL,
    )  # fmt: skip
    drop = samples.explained_drop(
        samples.drop(packet=sent, orig=sent),
        hook=Hook.NF_FORWARD, service=service, client_class=ClientClass.POD,
    )  # fmt: skip
    pod = Device(name="veth-p21", kind="veth", pod=PodRef("default", "p21", "node2"))
    there = passage(
        Direction.ORIGINAL,
        Ending.DROPPED,
        hop(0, IN, sent, device=pod),
        hop(5, PRE, sent, after=False),
        drop=drop,
    )
    return Path(legs=(leg("node2", sent, None, there, drop=drop),))


def ping():
    """An echo request to a pod, delivered over a tunnel."""
    sent = samples.PING
    there = passage(
        Direction.ORIGINAL,
        Ending.SENT,
        hop(0, IN, sent, device=ETH0),
        hop(5, FORWARD, sent, after=False),
        hop(8, OUT, sent, device=VXLAN),
    )
    entry = judged("node2", sent, sent.inverted, Verdict.PRESERVED, service=None)
    return Path(legs=(leg("node2", sent, sent.inverted, there, entry=entry),))


def changed():
    """Something other than netfilter redirects the packet between two hooks."""
    sent = samples.SENT
    inside = replace(sent, dst=ip_address(samples.BACKEND), dport=8080)
    other = Translation(
        by=Translated.OTHER,
        is_source=False,
        before=end(sent.dst, sent.dport),
        after=end(samples.BACKEND, 8080),
    )
    there = passage(
        Direction.ORIGINAL,
        Ending.SENT,
        hop(0, IN, sent, device=ETH0),
        hop(14, OUT, inside, device=VETH_P11, done=(other,)),
    )
    return Path(
        legs=(leg("node2", sent, None, there),),
        missing=("conntrack has no entry for it",),
    )


def in_zone(zone=7):
    """S3, by nodes that keep it in a conntrack zone."""
    path = s3()
    return replace(path, legs=tuple(_in_zone(leg, zone) for leg in path.legs))


def _in_zone(leg, zone):
    passages = tuple(
        replace(
            each,
            hops=tuple(
                hop
                if hop.hop.hook is Hook.TC_INGRESS
                else replace(hop, hop=replace(hop.hop, zone=zone))
                for hop in each.hops
            ),
        )
        for each in leg.passages
    )
    return replace(leg, zone=zone, passages=passages)


def in_fragments():
    """S3, where each packet leaves each node in two parts, of which only the first has ports."""
    path = s3()
    legs = (replace(each, passages=tuple(map(_cut, each.passages))) for each in path.legs)
    return replace(path, legs=tuple(legs))


def _cut(whole):
    last = whole.hops[-1]
    bare = replace(last.hop.packet, sport=0, dport=0)
    second = replace(last, hop=replace(last.hop, packet=bare, is_fragment=True), translations=())
    return replace(whole, hops=(*whole.hops, second))


def proxied():
    """The peer is a load balancer that opened a connection of its own."""
    sent = flow("203.0.113.60", 39000, samples.BACKEND, 8080)
    entry = judged(
        "node1", sent, sent.inverted, Verdict.PROXIED, Cause.LOAD_BALANCER_PROXY,
        service=LOCAL, client_class=ClientClass.LOADBALANCER,
    )  # fmt: skip
    there = passage(
        Direction.ORIGINAL,
        Ending.SENT,
        hop(0, IN, sent, device=ETH0, netns=NODE1_NETNS),
        hop(9, OUT, sent, device=VETH_P11, netns=NODE1_NETNS),
    )
    return Path(legs=(leg("node1", sent, sent.inverted, there, entry=entry),))


PROXY = "203.0.113.60"


def with_word(word):
    """The same, with what its first bytes declare."""
    path = proxied()
    leg = path.legs[0]
    return replace(path, legs=(replace(leg, judged=replace(leg.judged, word=word)),))


def declared():
    """A trusted proxy names its client."""
    return with_word(samples.word(peer=PROXY))


def declared_chain():
    """A trusted proxy names another trusted proxy, which named the client."""
    chain = (
        samples.named(ProxyHeader.X_FORWARDED_FOR, "2001:db8:7::7", port=None),
        samples.named(ProxyHeader.X_FORWARDED_FOR, "203.0.113.61", port=None),
    )
    return with_word(samples.word(*chain, peer=PROXY, by=ip_address("203.0.113.61")))


def forged():
    """A peer that is not trusted names a client."""
    path = with_word(samples.word(peer=PROXY, is_trusted=False, client=None, by=None))
    leg = path.legs[0]
    opinion = replace(leg.judged.opinion, verdict=Verdict.PRESERVED, cause=None)
    return replace(path, legs=(replace(leg, judged=replace(leg.judged, opinion=opinion)),))


def to_process():
    """A connection to the node itself, delivered to a socket."""
    sent = flow(samples.CLIENT, 50000, samples.NODE, 22)
    entry = replace(
        judged("node2", sent, sent.inverted, Verdict.PRESERVED, service=None), backend_pod=None
    )
    there = passage(
        Direction.ORIGINAL,
        Ending.DELIVERED,
        hop(0, IN, sent, device=ETH0),
        hop(9, INPUT, sent, after=True),
    )
    return Path(legs=(leg("node2", sent, sent.inverted, there, entry=entry),))


def three_nodes():
    """An edge node, a gateway and the backend's node, each with a translation of its own."""
    sent = flow(samples.CLIENT, 46356, "203.0.113.7", 443)
    second = flow("10.240.0.9", 20001, samples.NODE, 30080)
    third = flow(samples.NODE, 65241, samples.BACKEND, 8080)
    legs = (
        ("edge-1.example.internal", sent, second, Verdict.REPLACED, Cause.OTHER_RULE),
        ("node2", second, third, Verdict.REPLACED, Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER),
        ("node1", third, third, Verdict.REPLACED_UPSTREAM, None),
    )
    return Path(
        legs=tuple(
            leg(
                node, orig, after.inverted, at_us=at * 100,
                entry=judged(node, orig, after.inverted, verdict, cause),
            )
            for at, (node, orig, after, verdict, cause) in enumerate(legs)
        )
    )  # fmt: skip


def hostile(text):
    """A path in which every name and every line of text is an attacker's."""
    path = s3()
    pod = PodRef(text, text, text)
    token = samples.named(ProxyHeader.FORWARDED, None, form=ClientForm.TOKEN, token=text, port=None)
    service = replace(samples.SERVICE, namespace=text, name=text, port=text)
    rule = replace(samples.RULE, text=text, chain=text, table=text)
    device = Device(name=text, kind=text, pod=pod)

    def of(each):
        opinion = replace(
            each.judged.opinion, service=service, rule=rule, evidence=(text,), advice=(text,)
        )
        passages = tuple(
            replace(p, hops=tuple(replace(h, device=device) for h in p.hops)) for p in each.passages
        )
        word = samples.word(token)
        entry = replace(each.judged, node=text, opinion=opinion, backend_pod=pod, word=word)
        return replace(each, node=text, judged=entry, passages=passages)

    return replace(path, legs=tuple(map(of, path.legs)), missing=(text,))


def hostile_drop(text):
    """A dropped path in which every name and every line of text is an attacker's."""
    path = s6()
    opinion = replace(path.drop.opinion, evidence=(text,), advice=(text,))
    drop = replace(path.drop, node=text, reason=text, place=text, opinion=opinion)
    only = replace(
        path.legs[0],
        node=text,
        drop=drop,
        passages=tuple(replace(p, drop=drop) for p in path.legs[0].passages),
    )
    return replace(path, legs=(only,), missing=(text,))


ALL = {
    each.__name__: each
    for each in (
        s3, s3_ipv6, s3_without_hops, s3_first_half, s3_second_half, s5, s6, s12, s19b, ping,
        changed, proxied, declared, declared_chain, forged, to_process, three_nodes,
    )
}  # fmt: skip
