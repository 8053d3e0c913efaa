"""Paths as pictures in plain text."""

import re
from dataclasses import replace
from pathlib import Path as File

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.diagram import diagram_lines
from tests.unit import paths, samples
from tests.unit.samples import flow
from tracer.judge.path import Direction, Ending


def drawn(path, **options):
    return diagram_lines(path, **{"is_detailed": True} | options)


def block(lines, heading):
    """Return the lines below a heading, up to an empty one."""
    found = lines[lines.index(heading) + 1 :]
    return found[: found.index("")] if "" in found else found


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("s3", ["client --> node2 --> node1 --> default/p11", "           SNAT at node2"]),
        ("s5", ["client --> node1 --> default/p11", "           source kept"]),
        ("s6", ["client --> node2: X (dropped, no-local-endpoint)"]),
        ("s12", ["default/p11 --> node1 --> default/p11", "                SNAT at node1"]),
        ("s19b", ["default/p21 --> node2: X (dropped, no-local-endpoint)"]),
        (
            "s3_first_half",
            ["client --> node2 --> (node1) --> default/p11", "           SNAT at node2"],
        ),
        (
            "s3_second_half",
            [
                "client? --> (10.240.0.5:65241) --> node1 --> default/p11",
                "            SNAT before the first traced node",
            ],
        ),
        ("proxied", ["client? --> proxy --> node1 --> default/p11"]),
        ("declared", ["client --> proxy --> node1 --> default/p11"]),
        ("declared_chain", ["client --> proxy --> proxy --> node1 --> default/p11"]),
        ("forged", ["load balancer --> node1 --> default/p11", "                  source kept"]),
        ("to_process", ["client --> node2 --> process", "           source kept"]),
        (
            "changed",
            [
                "client --> node2 --> endpoint",
                "           changed between tc_ingress eth0 and tc_egress veth-p11,"
                " not by netfilter",
            ],
        ),
    ],
)
def test_picture(name, picture):
    """The first lines are the tutorial's picture, with what was not traced in brackets."""
    lines = drawn(paths.ALL[name]())
    assert lines[: lines.index("")] == picture


def test_verdict_and_packets():
    """Below the picture are the verdict, its facts, and the packet on each wire."""
    assert drawn(paths.s3(), is_detailed=False)[3:] == [
        "replaced at node2: the backend sees 10.240.0.5 in place of 198.51.100.10",
        "cause     external-traffic-policy-cluster",
        "service   default/nodeport:http via nodeport, policy Cluster",
        "time      2026-01-01T00:00:00.123456789Z, tcp",
        "socket    the backend's socket accepted 10.240.0.5:65241",
        "",
        "client to node2       198.51.100.10:46356 -> 10.240.0.5:30080",
        "node2 to node1        10.240.0.5:65241 -> 10.244.1.11:8080",
        "node1 to default/p11  10.240.0.5:65241 -> 10.244.1.11:8080",
    ]


@pytest.mark.parametrize(
    ("make", "headline", "facts"),
    [
        (
            paths.declared,
            "proxied: the backend sees the proxy 203.0.113.60; the client is 198.51.100.7:56324,"
            " according to the proxy",
            [
                "cause     load-balancer-proxy (PROXY v2)",
                "declared  198.51.100.7:56324, in PROXY v2; 203.0.113.60 is trusted",
            ],
        ),
        (
            paths.declared_chain,
            "proxied: the backend sees the proxy 203.0.113.60; the client is 2001:db8:7::7,"
            " according to the proxy",
            [
                "cause     load-balancer-proxy (X-Forwarded-For)",
                "declared  2001:db8:7::7 then 203.0.113.61, in X-Forwarded-For; 203.0.113.60 is"
                " trusted",
            ],
        ),
        (
            paths.forged,
            "preserved: the backend sees the client, 203.0.113.60",
            [
                "cause     (PROXY v2 198.51.100.7: declared, not trusted (forged?))",
                "declared  198.51.100.7:56324, in PROXY v2; 203.0.113.60 is not trusted"
                " (--trusted-proxy)",
            ],
        ),
    ],
)
def test_what_proxies_declare(make, headline, facts):
    """A client that a trusted proxy names is shown as client; an untrusted one is only declared."""
    lines = drawn(make(), width=200)
    assert headline in lines
    assert [line for line in lines if line.startswith(("cause", "declared"))] == facts


def test_proxy_whose_address_is_replaced():
    """Behind a proxy, too, the headline says whose address the backend sees."""
    path = paths.declared()
    leg = path.legs[0]
    reply = replace(leg.reply, dst=paths.s3().seen_source)
    assert (
        "proxied: the backend sees 10.240.0.5 in place of the proxy 203.0.113.60; the client is"
        " 198.51.100.7:56324, according to the proxy"
    ) in drawn(replace(path, legs=(replace(leg, reply=reply),)), width=200)


def test_hops():
    """Each hop has its time, place, tuple and mark; translations are below it."""
    assert block(drawn(paths.s3()), "the client's first packet")[:10] == [
        "  node2",
        "        +0.0 us  tc_ingress eth0         198.51.100.10:46356 -> 10.240.0.5:30080",
        "        +9.0 us  prerouting before NAT   198.51.100.10:46356 -> 10.240.0.5:30080",
        "       +21.0 us  prerouting after NAT    198.51.100.10:46356 -> 10.244.1.11:8080"
        "  mark 0x4000",
        "                 * DNAT: 10.240.0.5:30080 -> 10.244.1.11:8080",
        "       +27.0 us  forward                 198.51.100.10:46356 -> 10.244.1.11:8080"
        "  mark 0x4000",
        "       +33.0 us  postrouting before NAT  198.51.100.10:46356 -> 10.244.1.11:8080"
        "  mark 0x4000",
        "       +45.0 us  postrouting after NAT   10.240.0.5:65241 -> 10.244.1.11:8080",
        "                 * SNAT: 198.51.100.10:46356 -> 10.240.0.5:65241",
        "       +52.0 us  tc_egress eth0          10.240.0.5:65241 -> 10.244.1.11:8080",
    ]


def test_answer():
    """The reply crosses the nodes in reverse order, and is said to be translated back."""
    lines = block(drawn(paths.s3()), "the first reply packet")
    assert lines.index("  node1") < lines.index("  node2")
    assert lines[-1] == ("  it left as 10.240.0.5:30080 -> 198.51.100.10:46356: translated back")


def answer_that_leaves_as(**changes):
    path = paths.s3()
    there, back = path.legs[0].passages
    *others, last = back.hops
    packet = replace(last.hop.packet, **changes)
    hops = (*others, replace(last, hop=replace(last.hop, packet=packet)))
    first = replace(path.legs[0], passages=(there, replace(back, hops=hops)))
    return drawn(replace(path, legs=(first, path.legs[1])), width=200)[-1]


def test_answer_that_nobody_expects():
    """A reply that leaves with a foreign source is named as one that the client will ignore."""
    assert answer_that_leaves_as(src=paths.s3().backend.dst) == (
        "  it left as 10.244.1.11:30080 -> 198.51.100.10:46356: the client expects "
        "10.240.0.5:30080 -> 198.51.100.10:46356, and will ignore it"
    )
    assert answer_that_leaves_as(sport=8080).endswith(
        "its ports are not those that the client used"
    )


def answered(ending, packet):
    """Return the outcome of a reply with this ending."""
    path = paths.s5()
    leg = path.legs[0]
    back = paths.passage(Direction.REPLY, ending, paths.hop(9, paths.OUT, packet))
    return drawn(replace(path, legs=(replace(leg, passages=(*leg.passages, back)),)))[-1]


def test_zone():
    """The conntrack zone of a packet's entry stands behind its mark, from where it has one."""
    path = paths.in_zone()
    told = " ".join(" ".join(drawn(path)).split())
    first = [hop for way in Direction for _, hop in path.hops(way)]
    assert told.count(" zone 7") == sum(hop.hop.zone == 7 for hop in first) < len(first)
    assert told.count("mark 0x4000 zone 7") == sum(hop.hop.mark == 0x4000 for hop in first)
    assert "zone" not in " ".join(drawn(paths.s3()))


def test_fragments():
    """A later fragment has no ports, and the reply is compared by the first one."""
    lines = drawn(paths.in_fragments())
    told = [line.split("  ")[-1].strip() for line in lines if "(fragment)" in line]
    assert told == [
        f"{samples.NODE} -> {samples.BACKEND} (fragment)",
        f"{samples.NODE} -> {samples.BACKEND} (fragment)",
        f"{samples.BACKEND} -> {samples.NODE} (fragment)",
        f"{samples.NODE} -> {samples.CLIENT} (fragment)",
    ]
    assert lines[-1] == drawn(paths.s3())[-1]


def test_answer_to_a_process():
    """A reply to a process of the node is delivered, and leaves through no interface."""
    packet = paths.s5().orig.inverted
    assert answered(Ending.DELIVERED, packet) == (
        "  it was delivered as 10.240.0.3:30081 -> 198.51.100.10:46356: translated back"
    )
    assert answered(Ending.UNKNOWN, packet) == "  it was not seen whether it reached the client"


def test_error_as_an_answer():
    """An ICMP error is named as such."""
    error = flow("10.240.0.3", 0, "198.51.100.10", 0x303, proto=1)
    assert answered(Ending.SENT, error) == (
        "  it left as 10.240.0.3 -> 198.51.100.10 type 3 code 3 id 0: "
        "an ICMP error about the client's packet"
    )


def test_source_replaced_by_itself():
    """Masquerading that picked the client's own address is named as such."""
    path = paths.s3(client=samples.NODE)
    assert (
        "replaced at node2: the backend sees 10.240.0.5 again, the client's own address"
        in drawn(path)
    )


def test_devices():
    """Interfaces are named for what they are, and for the pod at their other end."""
    text = "\n".join(drawn(paths.s12()) + drawn(paths.ping()))
    assert "tc_ingress veth-p11 (veth, pod default/p11)" in text
    assert "tc_egress cni0 (bridge)" in text
    assert "tc_egress flannel.1 (VXLAN tunnel)" in text


def test_hooks_name_devices_where_tc_does_not():
    """Without hops at tc the hooks say on which interface the packet was."""
    path = paths.s5()
    only = path.legs[0].passages[0]
    hops = tuple(replace(each, device=paths.ETH0) for each in only.hops[1:3])
    leg = replace(path.legs[0], passages=(replace(only, hops=hops),))
    assert "prerouting after NAT eth0" in "\n".join(drawn(replace(path, legs=(leg,))))


def test_drop():
    """A dropped packet ends where it was dropped, with the kernel's reason; no reply is missed."""
    lines = drawn(paths.s6())
    assert lines[-1] == "    dropped: NETFILTER_DROP at input in nf_hook_slow"
    assert "the first reply packet" not in lines


def test_drop_of_a_later_packet():
    """A later packet that was dropped is shown, too."""
    path = paths.s3()
    only = path.legs[0].passages[0]
    later = replace(only, number=4, ending=Ending.DROPPED, drop=paths.s6().drop)
    first = replace(path.legs[0], passages=(*path.legs[0].passages, later))
    lines = drawn(replace(path, legs=(first, path.legs[1])))
    assert "    packet 4 dropped: NETFILTER_DROP at input in nf_hook_slow" in lines


def test_what_is_missing():
    """What was not seen is named: legs, packets, endings."""
    assert (
        "not seen: what happened on node1, where the backend default/p11 runs: it was not traced"
        in drawn(paths.s3_first_half())
    )
    assert block(drawn(paths.s5()), "the first reply packet") == ["  no packet was seen"]
    path = paths.s3()
    blind = replace(path.legs[1], passages=())
    assert "    no packet was seen here" in drawn(replace(path, legs=(path.legs[0], blind)))


def test_clocks_that_differ():
    """A node whose clock is behind gets its own times, with a note."""
    path = paths.s3()
    behind = tuple(
        replace(each, hops=tuple(replace(h, time_ns=h.time_ns - 10**9) for h in each.hops))
        for each in path.legs[1].passages
    )
    lines = drawn(replace(path, legs=(path.legs[0], replace(path.legs[1], passages=behind))))
    at = lines.index("    its clock is behind: times here count from its own first hop")
    assert "+0.0 us" in lines[at + 1]
    assert not [line for line in lines if "-1000" in line]


def test_packet_without_hops():
    """A packet without known hops shows only its ending, and sets no clock."""
    path = paths.s3()
    there, *others = path.legs[0].passages
    first = replace(path.legs[0], passages=(replace(there, hops=()), *others))
    lines = block(drawn(replace(path, legs=(first, path.legs[1]))), "the client's first packet")
    assert lines[:2] == ["  node2", "    sent"]
    assert "+0.0 us  tc_ingress eth0" in lines[3]


def test_many_hops():
    """Of a packet with very many hops the first are shown, with the number of all."""
    path = paths.s5()
    there = path.legs[0].passages[0]
    leg = replace(path.legs[0], passages=(replace(there, hops=there.hops * 1000),))
    lines = drawn(replace(path, legs=(leg,)))
    assert "    the first 100 of 4000 hops are shown" in lines
    assert len(lines) < 200


def test_node_by_the_name_of_a_kind():
    """A node may be called what other stations are."""
    path = paths.s3()
    legs = (replace(path.legs[0], node="client"), path.legs[1])
    assert drawn(replace(path, legs=legs))[0] == "client --> client --> node1 --> default/p11"


def test_without_hops():
    """A path of which only entries are known is drawn without packets."""
    lines = drawn(paths.s3_without_hops())
    assert lines == drawn(paths.s3())[: len(lines)]
    assert not [line for line in lines if line.startswith("the first packet")]


def test_reasons():
    """Evidence is shown, and what would keep the source or fix the drop."""
    assert "to keep   set externalTrafficPolicy: Local" in drawn(paths.s3())
    lines = drawn(paths.s6())
    assert "because   there is none" in lines
    assert "to fix    run an endpoint" in lines
    assert "because" not in "".join(drawn(paths.s6(), is_detailed=False))


def test_narrow():
    """If the row does not fit, the stations are one below the other."""
    assert drawn(paths.three_nodes(), is_detailed=False, width=60)[:9] == [
        "client",
        "  --> edge-1.example.internal",
        "      SNAT at edge-1.example.internal",
        "  --> node2",
        "      SNAT at node2",
        "  --> node1",
        "  --> default/p11",
        "",
        "replaced at edge-1.example.internal and node2: the backend",
    ]


LONGEST6 = [f"2001:db8:1111:2222:3333:4444:5555:{n}{n}{n}{n}" for n in (6, 7, 8)]


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize(
    "path",
    [*(make() for make in paths.ALL.values()), paths.s3(*LONGEST6), paths.hostile("x" * 253)],
)
def test_width(path, width):
    """No line is wider than it may be, however long the names and addresses."""
    assert max(map(len, drawn(path, width=width))) <= width


def test_a_command_stays_in_one_line():
    """A command can be pasted: it is not broken, nor does it move the cursor."""
    path = paths.s3()
    leg = path.legs[0]
    typed = "kubectl --namespace default patch service web -p '{\"spec\":\x1b[2J}' " + "x" * 90
    opinion = replace(leg.judged.opinion, advice=(typed,))
    judged = replace(leg.judged, opinion=opinion)
    lines = drawn(replace(path, legs=(replace(leg, judged=judged), *path.legs[1:])), width=60)
    shown = typed.replace("\x1b", "\\x1b")
    assert f"to keep   {shown}" in lines


def test_longest_names_are_whole():
    """What is continued on the next line is whole."""
    text = "".join(line.strip() for line in drawn(paths.hostile("n" * 253)))
    assert "n" * 253 in text


def test_colour():
    """Colours are added to the same text."""
    for make in paths.ALL.values():
        lines = drawn(make(), has_colour=True)
        assert "\x1b[" in "".join(lines)
        for code in ("31", "32", "33", "36", "2", "1", "0"):
            lines = [line.replace(f"\x1b[{code}m", "") for line in lines]
        assert lines == drawn(make())


@given(st.text())
@settings(max_examples=50)
def test_names_are_harmless(text):
    """No name or text, whoever wrote it, reaches the terminal as more than printable characters."""
    for path in (paths.hostile(text), paths.hostile_drop(text)):
        assert all(line.isprintable() for line in drawn(path))


def test_diagram_of_the_documentation():
    """The diagram in docs/paths.md is what the program draws."""
    page = (File(__file__).parents[2] / "docs" / "paths.md").read_text()
    told = re.search(r"^```\n(client .*?)^```", page, re.DOTALL | re.MULTILINE)[1].splitlines()
    assert drawn(paths.s3())[: len(told)] == told
