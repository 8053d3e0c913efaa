"""One node's hops, connections and drops, assembled into its leg of a path."""

from dataclasses import replace
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples
from tests.unit.samples import CLIENT, NODE, NODE6, REPLACED, SENT, flow
from tracer.judge.assemble import QUIET_NS, Assembler
from tracer.judge.path import Device, Direction, Ending, Translated
from tracer.judge.verdict import SeenHop, Verdict
from tracer.model import Hook, Hop

START_NS = 1_767_225_600_000_000_000
ORIG, REPLY = REPLACED
LEFT = REPLY.inverted
ONLY_DNAT = flow(str(REPLY.src), REPLY.sport, CLIENT, ORIG.sport)


def hop(at_us, hook, packet, *, after=None, entry=(ORIG, REPLY), packet_id=1, **changes):
    """A hop so many microseconds after the start."""
    device = changes.pop("device", "eth0")
    values = {
        "ktime_ns": 0,
        "netns": samples.NETNS,
        "hook": hook,
        "packet": packet,
        "orig": entry[0] if entry else None,
        "reply": entry[1] if entry else None,
        "is_reply": False,
        "is_new": True,
        "is_after_nat": after,
        "packet_id": packet_id,
        "number": 1,
        "mark": 0,
        "iif": 2,
        "oif": 0,
        "length": 60,
        "tcp_flags": 2,
    }
    return SeenHop(
        hop=Hop(**values | changes),
        time_ns=START_NS + at_us * 1000,
        node="node2",
        device=device,
        device_kind="veth",
    )


BEFORE = (ORIG, ORIG.inverted)
DNATED = (ORIG, ONLY_DNAT)
FIRST = [
    hop(0, Hook.TC_INGRESS, SENT, entry=None),
    hop(1, Hook.NF_PREROUTING, SENT, after=False, entry=BEFORE),
    hop(2, Hook.NF_PREROUTING, ONLY_DNAT.inverted, after=True, entry=DNATED),
    hop(3, Hook.NF_FORWARD, ONLY_DNAT.inverted, after=True, entry=DNATED),
    hop(4, Hook.NF_POSTROUTING, ONLY_DNAT.inverted, after=False, entry=DNATED),
    hop(5, Hook.NF_POSTROUTING, LEFT, after=True),
    hop(6, Hook.TC_EGRESS, LEFT, device="eth1"),
]
ANSWER = [
    hop(10, Hook.TC_INGRESS, REPLY, entry=None, packet_id=2, is_reply=True),
    hop(11, Hook.NF_PREROUTING, REPLY, after=False, packet_id=2, is_reply=True),
    hop(12, Hook.NF_PREROUTING, ONLY_DNAT, after=True, packet_id=2, is_reply=True),
    hop(13, Hook.NF_POSTROUTING, ONLY_DNAT, after=False, packet_id=2, is_reply=True),
    hop(14, Hook.NF_POSTROUTING, ORIG.inverted, after=True, packet_id=2, is_reply=True),
    hop(15, Hook.TC_EGRESS, ORIG.inverted, packet_id=2, is_reply=True),
]
CONNECTION = samples.judged(ORIG, REPLY, mark=0x4000, time_ns=START_NS + 5500)


def assembled(*told, at_ns=None):
    assembler = Assembler()
    for each in told:
        assembler.add(each)
    return assembler.take(at_ns)


def changes(passage):
    return [
        (each.hop.hook, change.by, change.is_source, change.before, change.after)
        for each in passage.hops
        for change in each.translations
    ]


def ends(packet, *, is_source):
    return (packet.src, packet.sport) if is_source else (packet.dst, packet.dport)


def test_ports_that_come_back():
    """A new entry with the tuple of an open leg begins a leg of its own."""
    again = [
        replace(
            seen,
            hop=replace(seen.hop, packet_id=seen.hop.packet_id + 10),
            time_ns=seen.time_ns + 1_000_000,
        )
        for seen in (*FIRST, *ANSWER)
    ]
    new = replace(CONNECTION, time_ns=CONNECTION.time_ns + 1_000_000)
    first = [*FIRST[:6], CONNECTION, FIRST[6], *ANSWER]
    second = [*again[:6], new, *again[6:]]
    old, young = assembled(*first, *second)
    (alone,) = assembled(*first)
    assert old == alone
    assert (young.judged, young.time_ns) == (new, again[0].time_ns)
    assert [[hop.time_ns for hop in each.hops] for each in young.passages] == [
        [seen.time_ns for seen in again[:7]],
        [seen.time_ns for seen in again[7:]],
    ]
    # Without hops, too.
    assert [leg.judged for leg in assembled(CONNECTION, new)] == [CONNECTION, new]


def in_zone(zone, told, *, packet_id, later_us):
    """The same connection in another conntrack zone, some time later: tc sees no zone come in."""
    for each in told:
        time_ns = each.time_ns + later_us * 1000
        if isinstance(each, SeenHop):
            hop = replace(
                each.hop,
                packet_id=each.hop.packet_id + packet_id,
                zone=zone if each.hop.orig else 0,
            )
            yield replace(each, time_ns=time_ns, hop=hop)
        else:
            connection = replace(each.connection, zone=zone)
            yield replace(each, time_ns=time_ns, connection=connection)


def test_zones():
    """Connections with one tuple in several zones are several, however their packets mix."""
    told = [*FIRST, CONNECTION, *ANSWER]
    # The second one's packets come between the first one's.
    zones = [list(in_zone(zone, told, packet_id=10 * zone, later_us=0)) for zone in (0, 7, 8)]
    mixed = [each for together in zip(*zones, strict=True) for each in together]
    legs = assembled(*mixed)
    alone = [leg for each in zones for leg in assembled(*each)]
    assert legs == alone
    assert [leg.zone for leg in legs] == [0, 7, 8]
    assert all(len(leg.passages) == 2 and leg.judged.connection.zone == leg.zone for leg in legs)


def test_a_packet_that_passes_several_zones():
    """It is one packet, of the connection of the first: Open vSwitch goes through several."""
    told = [
        replace(seen, hop=replace(seen.hop, zone=7 if seen.hop.hook is Hook.TC_EGRESS else 5))
        if seen.hop.orig
        else seen
        for seen in FIRST
    ]
    (leg,) = assembled(*told)
    assert (leg.zone, len(leg.passages), len(leg.passages[0].hops)) == (5, 1, len(FIRST))


def test_a_drop_that_does_not_know_its_zone():
    """A packet without an entry, as where a socket is looked for, is of the zone told of last."""
    came = list(in_zone(7, FIRST[:4], packet_id=0, later_us=0))
    drop = samples.judged_drop(
        samples.drop(packet=FIRST[3].hop.packet, orig=None), time_ns=START_NS + 5000
    )
    known = samples.judged_drop(
        samples.drop(packet=FIRST[3].hop.packet, orig=ORIG, zone=7), time_ns=START_NS + 5000
    )
    (leg,) = assembled(*came, known)
    assert (leg.zone, leg.drop) == (7, known)
    connection = samples.judged(FIRST[3].hop.packet, FIRST[3].hop.packet.inverted, zone=7)
    connection = replace(connection, time_ns=START_NS)
    (leg,) = assembled(connection, drop)
    assert (leg.zone, leg.drop) == (7, drop)


def test_leg():
    """Both directions of a connection: where each address was replaced, and where undone."""
    (leg,) = assembled(*FIRST, CONNECTION, *ANSWER)
    first, answer = leg.passages
    assert (leg.node, leg.netns, leg.time_ns) == ("node2", samples.NETNS, START_NS)
    assert (leg.orig, leg.reply, leg.judged) == (ORIG, REPLY, CONNECTION)
    assert leg.drop is None
    assert [each.hop for each in first.hops] == [each.hop for each in FIRST]
    assert [each.hop for each in answer.hops] == [each.hop for each in ANSWER]
    assert (first.direction, first.number, first.ending) == (
        Direction.ORIGINAL,
        1,
        Ending.SENT,
    )
    assert (answer.direction, answer.number) == (Direction.REPLY, 1)
    inside = ONLY_DNAT.inverted
    assert changes(first) == [
        (
            Hook.NF_PREROUTING,
            Translated.DNAT,
            False,
            ends(SENT, is_source=False),
            ends(inside, is_source=False),
        ),
        (
            Hook.NF_POSTROUTING,
            Translated.SNAT,
            True,
            ends(inside, is_source=True),
            ends(LEFT, is_source=True),
        ),
    ]
    assert [(hook, by) for hook, by, *_ in changes(answer)] == [
        (Hook.NF_PREROUTING, Translated.UNDO_SNAT),
        (Hook.NF_POSTROUTING, Translated.UNDO_DNAT),
    ]
    assert first.hops[-1].device == Device(name="eth1", kind="veth")


def test_whole_after_a_while():
    """A leg is complete when it got nothing for a second."""
    assembler = Assembler()
    for each in FIRST:
        assembler.add(each)
    assert assembler.take(FIRST[-1].time_ns + QUIET_NS - 1) == []
    assert len(assembler.take(FIRST[-1].time_ns + QUIET_NS)) == 1
    assert assembler.take() == []


def test_what_comes_late_is_no_news():
    """A retransmitted SYN makes no second leg; a new connection of the same tuple does."""
    assembler = Assembler()
    assembler.add(samples.judged_drop(time_ns=START_NS))
    assert len(assembler.take()) == 1
    assembler.add(samples.judged_drop(time_ns=START_NS + 10**9))
    for each in FIRST:
        assembler.add(each)
    assert assembler.take() == []
    assembler.add(CONNECTION)
    assert len(assembler.take()) == 1


def test_dropped():
    """A packet that was dropped ends there, and with it the connection."""
    drop = samples.judged_drop(
        samples.drop(packet=ONLY_DNAT.inverted), time_ns=START_NS + 3500, view=samples.ALONE
    )
    (leg,) = assembled(*FIRST[:4], drop)
    (passage,) = leg.passages
    assert (passage.ending, passage.drop, leg.drop) == (Ending.DROPPED, drop, drop)
    assert leg.verdict is Verdict.DROPPED
    assert leg.reply is None


def test_dropped_before_it_was_seen():
    """A drop alone is a leg of its own."""
    drop = samples.judged_drop(time_ns=START_NS)
    (leg,) = assembled(drop)
    assert (leg.orig, leg.reply, leg.drop, leg.passages) == (SENT, None, drop, ())


def test_a_later_drop_ends_no_connection():
    """In an answered connection a lost packet only ends its own passage."""
    drop = samples.judged_drop(
        samples.drop(packet=SENT, orig=SENT, is_new=False), time_ns=START_NS + 30_000
    )
    second = hop(25, Hook.NF_PREROUTING, SENT, after=True, packet_id=3)
    (leg,) = assembled(*FIRST, CONNECTION, *ANSWER, second, drop)
    assert leg.drop is None
    assert leg.verdict is CONNECTION.verdict
    assert [each.ending for each in leg.passages][-1] is Ending.DROPPED


def test_no_socket_without_hops():
    """If a dropped packet has lost its entry, a drop that follows at once is the connection's."""
    for orig, is_new, after_ns, is_end in (
        (SENT, True, 5_000_000, True),
        (SENT, False, 50_000, False),
        (None, False, 50_000, True),
        (None, False, 50_000_000, False),
    ):
        drop = samples.judged_drop(
            samples.drop(packet=SENT, orig=orig, is_new=is_new),
            time_ns=CONNECTION.time_ns + after_ns,
        )
        (leg,) = assembled(CONNECTION, drop)
        assert (leg.drop is drop) is is_end


def test_delivered():
    """What passes INPUT is delivered."""
    (leg,) = assembled(*FIRST[:2], hop(3, Hook.NF_INPUT, SENT, after=True))
    assert leg.passages[0].ending is Ending.DELIVERED


def test_unknown_ending():
    """A packet of which nothing more is known has no ending."""
    (leg,) = assembled(*FIRST[:3])
    assert leg.passages[0].ending is Ending.UNKNOWN


def test_waited_for_its_neighbour():
    """A packet that leaves later under another id is the one that waited for a neighbour."""
    late = replace(FIRST[-1], hop=replace(FIRST[-1].hop, packet_id=9))
    late = replace(late, time_ns=late.time_ns + 5_000_000)
    (leg,) = assembled(*FIRST[:-1], late)
    (passage,) = leg.passages
    assert passage.ending is Ending.SENT
    assert len(passage.hops) == len(FIRST)


def test_changed_by_others():
    """A tuple that changes where NAT does not act was changed by something else."""
    elsewhere = flow(CLIENT, SENT.sport, "10.9.9.9", 80)
    (leg,) = assembled(
        hop(0, Hook.TC_INGRESS, SENT, entry=None), hop(1, Hook.TC_EGRESS, elsewhere, entry=None)
    )
    ((hook, by, is_source, before, after),) = changes(leg.passages[0])
    assert (hook, by, is_source) == (Hook.TC_EGRESS, Translated.OTHER, False)
    assert (before, after) == ((SENT.dst, SENT.dport), (ip_address("10.9.9.9"), 80))
    assert leg.orig == SENT
    assert leg.reply == elsewhere.inverted


def test_without_hops():
    """A connection without watched packets is still a leg."""
    (leg,) = assembled(CONNECTION)
    assert (leg.orig, leg.reply, leg.passages) == (ORIG, REPLY, ())


def test_housekeeping_is_no_connection():
    """Neighbour discovery and multicast that conntrack skips make no legs."""
    solicitation = flow("fe80::1", 0, "ff02::1:ff00:5", 135 << 8, proto=58)
    advertisement = flow("fe80::1", 0, NODE6, 136 << 8, proto=58)
    mdns = flow(NODE, 5353, "224.0.0.251", 5353, proto=17)
    for packet in (solicitation, advertisement, mdns):
        assert assembled(hop(0, Hook.TC_INGRESS, packet, entry=None)) == []


def test_no_memory_without_end():
    """However much is reported, a bounded number of legs is kept; evicted legs are not lost."""
    assembler = Assembler()
    count = 20_000
    for number in range(count):
        sent = replace(SENT, sport=number & 0xFFFF, dport=1 + (number >> 16))
        entry = (sent, sent.inverted)
        assembler.add(hop(0, Hook.NF_FORWARD, sent, after=True, entry=entry, packet_id=number))
    assert len(assembler._open) < count
    assert len(assembler.take()) == count


@given(st.permutations(FIRST + ANSWER))
def test_each_hop_is_in_one_passage(told):
    """In whatever order hops come, none is lost or reported twice."""
    legs = assembled(*told, CONNECTION)
    found = [each.hop for leg in legs for p in leg.passages for each in p.hops]
    assert sorted(map(id, found)) == sorted(id(each.hop) for each in told)


def later(*told, by_us=0, packet_id=0):
    """The same things again, later, of other packets."""
    return [
        replace(
            each,
            time_ns=each.time_ns + by_us * 1000,
            **(
                {"hop": replace(each.hop, packet_id=each.hop.packet_id + packet_id)}
                if isinstance(each, SeenHop)
                else {}
            ),
        )
        for each in told
    ]


def test_ports_used_again_after_the_leg_is_done():
    """A new entry with the tuple of a finished leg has all its hops, from the first on."""
    assembler = Assembler()
    once = [*FIRST[:6], CONNECTION, FIRST[6], *ANSWER]
    for each in once:
        assembler.add(each)
    (old,) = assembler.take(START_NS + 2 * QUIET_NS)
    for each in later(*once, by_us=5_000_000, packet_id=10):
        assembler.add(each)
    (new,) = assembler.take()
    assert [len(each.hops) for each in new.passages] == [len(FIRST), len(ANSWER)]
    assert list(map(changes, new.passages)) == list(map(changes, old.passages))
    assert new.time_ns == old.time_ns + 5_000_000_000


def test_sent_again_and_dropped_again():
    """A first packet that conntrack never keeps is retransmitted, and reported once."""
    drop = samples.judged_drop(time_ns=START_NS + 4000)
    assembler = Assembler()
    for each in (*FIRST[:4], drop):
        assembler.add(each)
    assert len(assembler.take(START_NS + 2 * QUIET_NS)) == 1
    for each in later(*FIRST[:4], drop, by_us=3_000_000, packet_id=10):
        assembler.add(each)
    assert assembler.take() == []
    assert not any(assembler.lost().values())


def test_a_hop_between_is_lost():
    """NAT that no hop shows is still reported as NAT, because conntrack's entry shows it."""
    told = [*FIRST[:1], *FIRST[2:5], FIRST[6]]
    (leg,) = assembled(*told, CONNECTION)
    (passage,) = leg.passages
    assert [(hook, by) for hook, by, *_ in changes(passage)] == [
        (Hook.NF_PREROUTING, Translated.DNAT),
        (Hook.TC_EGRESS, Translated.SNAT),
    ]


def test_fragments():
    """A packet that leaves in fragments is one packet, and no port of it has changed."""

    def fragment(at_us, hook, packet, **changes):
        bare = replace(packet, sport=0, dport=0)
        return hop(at_us, hook, bare, is_fragment=True, is_new=False, **changes)

    told = [
        fragment(-1, Hook.TC_INGRESS, SENT, entry=None, packet_id=2),
        fragment(0, Hook.TC_INGRESS, SENT, entry=None),
        *FIRST[1:],
        # A packet that leaves may reuse the memory of one that came in.
        fragment(7, Hook.TC_EGRESS, LEFT, packet_id=2),
        fragment(8, Hook.TC_EGRESS, LEFT, packet_id=3),
    ]
    (leg,) = assembled(*told, CONNECTION)
    (passage,) = leg.passages
    assert [each.hop for each in passage.hops] == [each.hop for each in told]
    assert [by for _, by, *_ in changes(passage)] == [Translated.DNAT, Translated.SNAT]
    assert passage.ending is Ending.SENT
    # The packet that they were cut from is not known.
    (alone,) = assembled(*told[-2:])
    assert [len(each.hops) for each in alone.passages] == [1, 1]


def test_bounds():
    """However much a recording holds of one connection or packet, not all of it is kept."""
    assembler = Assembler()
    for _ in range(1000):
        assembler.add(FIRST[1])
    drop = samples.judged_drop(time_ns=START_NS + 4000)
    for _ in range(1000):
        assembler.add(drop)
    assert assembler.lost() == {"legs_cut_short": 0, "hops_left_out": 1000 - 256}
    for packet_id in range(10_000):
        assembler.add(replace(FIRST[1], hop=replace(FIRST[1].hop, packet_id=packet_id)))
    (leg,) = assembler.take()
    assert len(leg.passages) == 4096
    assert sum(len(each.hops) for each in leg.passages) + assembler.lost()["hops_left_out"] == 11000


def test_more_legs_than_there_is_room_for():
    """Legs that make room for others are returned early, and counted."""
    assembler = Assembler()
    for port in range(20_000):
        orig = replace(ORIG, sport=port)
        assembler.add(samples.judged(orig, REPLY, time_ns=START_NS))
    assert assembler.lost()["legs_cut_short"] == 20_000 - 16_384
    assert len(assembler.take()) == 20_000
