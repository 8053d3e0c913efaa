"""Legs of several nodes joined into paths."""

import itertools
import random
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples, world
from tests.unit.paths import START_NS
from tests.unit.samples import flow
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.join import Joiner
from tracer.judge.path import Leg
from tracer.judge.verdict import SeenAccept, Verdict

MS, S = 1_000_000, 1_000_000_000
POLICY = Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER
NETNS = {"node1": 11, "node2": 12, "node3": 13}
# S3: node2 replaces the client's address by its own and sends the connection on to node1.
SENT = flow(world.CLIENT, 40000, world.NODE2, 30080)
INSIDE = flow(world.NODE2, 61234, world.P11, 8080)


def leg(node, orig, onward, *, at_ns=0, judged=None, drop=None, netns=None):
    return Leg(
        node=node,
        netns=netns or NETNS.get(node, 1),
        time_ns=START_NS + at_ns,
        orig=orig,
        reply=onward.inverted if onward else None,
        judged=judged,
        drop=drop,
    )


def judged_leg(node, entry, *, at_ns=0, **view):
    """Return the leg of an entry, judged with what the recorded cluster's node knows."""
    judged = judge_connection(entry, world.view(node, **view), time_ns=START_NS + at_ns)
    return leg(node, entry.orig, entry.reply.inverted, at_ns=at_ns, judged=judged)


def s3(at_ns=0, *, port=40000, snat_port=61234):
    sent = replace(SENT, sport=port)
    inside = replace(INSIDE, sport=snat_port)
    return (
        leg("node2", sent, inside, at_ns=at_ns),
        leg("node1", inside, inside, at_ns=at_ns + MS // 10),
    )


def join(*legs, accepts=(), **options):
    joiner = Joiner(**options)
    for each in legs:
        joiner.add(each)
    for each in accepts:
        joiner.add_accept(each)
    return joiner.take()


def accept(peer, *, at_ns=0, netns=77):
    return SeenAccept(accept=samples.accept(peer, netns=netns), time_ns=START_NS + at_ns)


def nodes(path):
    return [each.node for each in path.legs]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_nodes(order):
    """What one node sends on and another receives is one path, whichever reports first."""
    legs = s3()
    (path,) = join(*(legs[i] for i in order))
    assert path.legs == legs


def test_three_nodes():
    """Each node's translation leads to the next."""
    second, third = flow("10.0.0.9", 20001, world.NODE2, 30080), INSIDE
    legs = (leg("edge", SENT, second), leg("node2", second, third), leg("node1", third, third))
    for order in itertools.permutations(legs):
        assert [path.legs for path in join(*order)] == [legs]


@pytest.mark.parametrize("proto", [1, 58])
def test_pings(proto):
    """ICMP is joined by its id and types: the reply to an echo request is an echo reply."""
    kind = {1: 8, 58: 128}[proto]
    client, node, pod = (
        ("192.0.2.1", "192.0.2.2", "192.0.2.3") if proto == 1 else ("fd00::1", "fd00::2", "fd00::3")
    )
    sent, inside = flow(client, 7, node, kind << 8, proto), flow(node, 7, pod, kind << 8, proto)
    assert len(join(leg("node2", sent, inside), leg("node1", inside, inside))) == 1
    other = replace(inside, sport=8)
    assert len(join(leg("node2", sent, inside), leg("node1", other, other))) == 2


@pytest.mark.parametrize(
    "change", [{"sport": 1}, {"dport": 1}, {"proto": 17}, {"src": ip_address("10.0.0.1")}]
)
def test_other_connections(change):
    """A tuple that differs in anything is another connection."""
    other = replace(INSIDE, **change)
    assert len(join(s3()[0], leg("node1", other, other))) == 2


def test_window():
    """Legs that are further apart than the window do not belong together."""
    first, second = s3()
    for apart_ns, paths in ((2 * S, 1), (-2 * S, 1), (2 * S + 1, 2), (-2 * S - 1, 2)):
        moved = replace(second, time_ns=first.time_ns + apart_ns)
        assert len(join(first, moved, window_ns=2 * S)) == paths


def test_one_node_is_not_joined_with_itself():
    """A namespace does not receive what it sent; one with the same inode elsewhere may."""
    first, second = s3()
    here = replace(second, node="node2", netns=first.netns)
    assert len(join(first, here)) == 2
    assert len(join(first, replace(second, netns=first.netns))) == 1


def test_ports_that_come_back():
    """If a tuple is used again, halves that are nearest in time belong together."""
    legs = [each for i in range(4) for each in s3(i * S)]
    random.Random(1).shuffle(legs)
    paths = join(*legs)
    assert [path.time_ns for path in paths] == [START_NS + i * S for i in range(4)]
    assert all(path.legs[1].time_ns - path.legs[0].time_ns == MS // 10 for path in paths)


def test_no_leg_is_used_twice():
    """Two first halves and one second: the nearest gets it."""
    first, second = s3(S)
    early = replace(first, time_ns=first.time_ns - S)
    paths = join(early, first, second)
    assert [nodes(path) for path in paths] == [["node2"], ["node2", "node1"]]
    assert paths[1].time_ns == first.time_ns


def test_untranslated():
    """Without NAT the tuple is the same everywhere: time gives the order, or the backend's node."""
    direct = flow(world.CLIENT, 40000, world.P11, 8080)
    legs = [leg(node, direct, direct, at_ns=at) for at, node in enumerate(("a", "b", "c"))]
    for order in itertools.permutations(legs):
        assert [nodes(path) for path in join(*order)] == [["a", "b", "c"]]
    entry = world.entry(world.CLIENT, world.P11, 8080, world.P11, world.CLIENT)
    # node1's clock is behind, but the pod is there.
    first = judged_leg("node2", entry, at_ns=MS)
    assert [nodes(path) for path in join(judged_leg("node1", entry), first)] == [["node2", "node1"]]


def test_no_circle():
    """Entries that lead back to a namespace cause no endless loop."""
    back = leg("node1", INSIDE, SENT)
    (path,) = join(leg("node2", SENT, INSIDE), back)
    assert sorted(nodes(path)) == ["node1", "node2"]
    again = leg("node2", flow(world.P11, 1, world.P12, 2), SENT, at_ns=1)
    assert sum(len(path.legs) for path in join(leg("node2", SENT, INSIDE), back, again)) == 3


def test_drop_on_the_second_node():
    """A drop ends its path: a dropped packet is not sent on."""
    drop = samples.explained_drop(samples.drop(packet=INSIDE, orig=INSIDE))
    dropped = leg("node1", INSIDE, None, drop=drop)
    (path,) = join(s3()[0], dropped)
    assert path.verdict is Verdict.DROPPED
    assert path.drop is drop
    gone = replace(s3()[0], drop=drop)
    assert len(join(gone, s3()[1])) == 2


# Accepts.


def test_accept():
    """What the backend's socket accepted belongs to the path that arrives with that tuple."""
    seen, other = accept(INSIDE, at_ns=MS), accept(replace(INSIDE, sport=1))
    for path in join(*s3(), accepts=[other, seen]):
        assert path.accept is seen
    (path,) = join(s3()[0], accepts=[seen])
    assert path.accept is seen


def test_each_accept_is_of_one_path():
    """If a tuple is used again, each path has the accept that is nearest."""
    first, second = accept(INSIDE, at_ns=MS), accept(INSIDE, at_ns=S + MS)
    paths = join(*s3(), *s3(S), accepts=[second, first])
    assert [path.accept for path in paths] == [first, second]
    # Reported twice, by two tracers on one machine, it is still one.
    again = replace(first, time_ns=first.time_ns + 1000)
    paths = join(*s3(), *s3(S), accepts=[first, again])
    assert [path.accept for path in paths] == [first, None]


def test_accepted_after_all():
    """A drop beside an accept was of another packet of the connection."""
    drop = samples.explained_drop(samples.drop(packet=INSIDE, orig=None))
    last = replace(s3()[1], drop=drop)
    (path,) = join(s3()[0], last, accepts=[accept(INSIDE, at_ns=MS)])
    assert (path.drop, str(path.seen_source)) == (None, world.NODE2)
    (path,) = join(s3()[0], last)
    assert path.drop is drop


def test_accepts_are_let_go():
    """An accept without a path is not kept forever."""
    joiner = Joiner(S)
    for i in range(100):
        joiner.add_accept(accept(replace(INSIDE, sport=i), at_ns=i * S))
        joiner.take(START_NS + i * S)
    assert len(joiner._accepts._held) < 10


# When a path is returned.


def test_paths_wait_for_their_window():
    """A path is returned once none of its legs can still come, and not before."""
    joiner = Joiner(3 * S)
    first, second = s3()
    joiner.add(first)
    assert joiner.take(first.time_ns + 3 * S) == []
    joiner.add(second)
    # The second could still be followed.
    assert joiner.take(first.time_ns + 3 * S + 1) == []
    (path,) = joiner.take(second.time_ns + 3 * S + 1)
    assert nodes(path) == ["node2", "node1"]
    assert joiner.take() == []


def test_too_many_legs_are_counted():
    """Legs beyond the room are joined with what is there, and counted."""
    joiner = Joiner(room=10)
    for i in range(20):
        for each in s3(i, port=i, snat_port=i):
            joiner.add(each)
    assert joiner.lost()["legs_pushed_out"] == 30
    assert len(joiner._queue) <= 2 * 10 + 1
    paths = joiner.take()
    assert len(paths) == 20
    assert all(len(path.legs) == 2 for path in paths)


def test_one_tuple_again_and_again():
    """Thousands of entries with one tuple take neither time nor memory, and none vanishes."""
    joiner = Joiner()
    for i in range(2000):
        for each in s3(i * 1000):
            joiner.add(each)
    paths = joiner.take()
    assert sum(len(path.legs) for path in paths) == 4000
    assert joiner.lost()["legs_pushed_out"] > 0


def test_too_many_accepts_are_counted():
    """The same for accepts."""
    joiner = Joiner(room=10)
    for i in range(25):
        joiner.add_accept(accept(replace(INSIDE, sport=i)))
    assert joiner.lost()["accepts_pushed_out"] == 15


def test_told_twice():
    """What two tracers of one node report is one leg; the one with packets counts."""
    first, second = s3()
    joiner = Joiner()
    for teller in range(2):
        for each in (first, second):
            joiner.add(replace(each, time_ns=each.time_ns + teller * 1000), teller=teller)
    assert len(joiner.take()) == 1
    assert joiner.told_twice == 2
    # One tracer does not report a leg twice: its two legs are two.
    assert len(join(first, first)) == 2


# Against an oracle that looks at everything at once.


def naive(legs, window_ns):
    """Join by the definition alone: all pairs, the nearest first."""

    def may_follow(one, two):
        if (one.node, one.netns) == (two.node, two.netns):
            return False
        if abs(one.time_ns - two.time_ns) > window_ns or one.reply is None:
            return False
        if one.reply.inverted != two.orig:
            return False
        is_symmetric = two.reply is not None and two.reply.inverted == one.orig
        return not is_symmetric or rank(one) < rank(two)

    def rank(one):
        return one.time_ns, one.node, one.netns

    paths = {i: [each] for i, each in enumerate(legs)}
    pairs = [
        (abs(one.time_ns - two.time_ns), rank(one), rank(two), one, two)
        for one, two in itertools.permutations(legs, 2)
        if may_follow(one, two)
    ]
    for *_, one, two in sorted(pairs, key=lambda pair: pair[:3]):
        front = [i for i, path in paths.items() if path[-1] is one]
        back = [i for i, path in paths.items() if path[0] is two]
        if front and back:
            (i,), (j,) = front, back
            places = [(each.node, each.netns) for each in paths[i] + paths[j]]
            if i != j and len(set(places)) == len(places):
                paths[i] += paths.pop(j)
    return sorted(tuple(map(id, path)) for path in paths.values())


# Few tuples, so that they collide.
_tuples = st.builds(
    lambda a, b, port: flow(f"10.0.0.{a}", port, f"10.0.0.{b}", 80),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
)


@st.composite
def many_legs(draw):
    times = draw(st.lists(st.integers(0, 100), unique=True, max_size=12))
    return [
        leg(
            draw(st.sampled_from(("a", "b", "c", "d"))),
            draw(_tuples),
            draw(st.none() | _tuples),
            at_ns=time,
        )
        for time in times
    ]


@given(many_legs(), st.integers(0, 40), st.randoms())
def test_as_the_naive_joiner(legs, window_ns, rng):
    """Joined in any order, legs make the paths that the definition says."""
    rng.shuffle(legs)
    paths = join(*legs, window_ns=window_ns)
    assert sorted(tuple(map(id, path.legs)) for path in paths) == naive(legs, window_ns)


@given(many_legs(), st.integers(0, 40), st.integers(0, 10))
def test_as_they_come(legs, window_ns, late_ns):
    """Taken bit by bit, with legs that come a little late, paths are the same."""
    joiner = Joiner(window_ns)
    paths = []
    for each in sorted(legs, key=lambda one: one.time_ns):
        paths += joiner.take(each.time_ns - late_ns)
        joiner.add(each)
    paths += joiner.take()
    assert sorted(tuple(map(id, path.legs)) for path in paths) == naive(legs, window_ns)
    assert not joiner._received
    assert not joiner._sent


@given(many_legs(), st.integers(1, 5))
def test_nothing_vanishes(legs, room):
    """However little room there is, each leg is in just one path."""
    joiner = Joiner(50, room=room)
    for each in legs:
        joiner.add(each)
    told = [id(each) for path in joiner.take() for each in path.legs]
    assert sorted(told) == sorted(map(id, legs))


# What the legs prove about each other.


def s3_judged(**view):
    first = world.entry(world.CLIENT, world.NODE2, 30080, world.P11, world.NODE2, mark=0x4000)
    second = samples.connection(first.reply.inverted, first.reply, status=0, mark=0)
    return judged_leg("node2", first, **view), judged_leg("node1", second, at_ns=MS, **view)


def test_upstream_becomes_proof():
    """node1's guess is replaced by node2's verdict, and both name the other."""
    (path,) = join(*s3_judged())
    assert (path.verdict, path.cause, path.deciding.node) == (Verdict.REPLACED, POLICY, "node2")
    first, second = (each.opinion for each in path.legs)
    assert first.evidence[-1] == "proof: node1 received the connection from 10.240.0.5 port 40000"
    assert (second.verdict, second.cause) == (Verdict.REPLACED_UPSTREAM, POLICY)
    assert second.evidence[-1] == (
        "proof: node2 received the connection from 198.51.100.10 port 40000 and sent it on from "
        "10.240.0.5 port 40000 (external-traffic-policy-cluster)"
    )
    assert not any("may have" in line for line in second.evidence)
    assert path.missing == ()


def test_upstream_without_a_cluster():
    """Even without objects the second node's verdict is corrected."""
    (path,) = join(*s3_judged(cluster=None))
    assert path.legs[1].verdict is Verdict.REPLACED_UPSTREAM


def test_wrong_guess_is_corrected():
    """S14: a process of node2 looks like a masqueraded client at node1; node2 knows the cause."""
    first = world.entry(
        world.NODE2, world.CLUSTER_IP, 80, world.P11, world.NODE2, mark=0x4000, iif=0
    )
    second = samples.connection(first.reply.inverted, first.reply, status=0, mark=0)
    alone = judged_leg("node1", second)
    assert (alone.verdict, alone.opinion.cause) == (Verdict.REPLACED_UPSTREAM, POLICY)
    (path,) = join(judged_leg("node2", first), alone)
    assert path.cause is Cause.OFF_CLUSTER_SOURCE
    assert path.legs[1].opinion.cause is Cause.OFF_CLUSTER_SOURCE
    assert path.legs[1].opinion.service.name == path.legs[0].opinion.service.name


def test_nobody_was_replaced():
    """A process of node2 that reaches the pod itself is the client: nothing was replaced."""
    first = world.entry(world.NODE2, world.P11, 8080, world.P11, world.NODE2, iif=0)
    second = samples.connection(first.reply.inverted, first.reply, status=0, mark=0)
    alone = judged_leg("node1", second, at_ns=MS)
    assert alone.verdict is Verdict.REPLACED_UPSTREAM
    (path,) = join(judged_leg("node2", first), alone)
    assert [each.verdict for each in path.legs] == [Verdict.PRESERVED, Verdict.PRESERVED]
    assert (path.verdict, path.legs[1].opinion.cause) == (Verdict.PRESERVED, None)


def test_accept_is_proof():
    """Where the last node replaced the source, the backend's socket shows it."""
    entry = world.entry(world.CLIENT, world.NODE1, 30080, world.P11, world.GATEWAY1, mark=0x4000)
    (path,) = join(judged_leg("node1", entry), accepts=[accept(entry.reply.inverted)])
    assert path.legs[0].opinion.evidence[-1] == (
        "proof: the backend's socket accepted the connection from 10.244.1.1 port 40000"
    )


# What is missing.


def cluster():
    return world.CLUSTER


def test_second_half_missing():
    """The backend runs on another node, which reported nothing: the path says so."""
    first, _ = s3_judged()
    (path,) = join(first, cluster=cluster)
    assert path.missing == (
        "what happened on node1, where the backend default/p11 runs: it was not traced",
    )
    # The judge found the backend's pod: that is enough.
    assert join(first)[0].missing == path.missing
    other = leg("node1", flow("192.0.2.1", 1, "192.0.2.2", 2), None)
    told = [path for path in join(first, other) if path.legs[0].node == "node2"]
    assert told[0].missing[0].endswith("it did not report the connection")


def test_first_half_missing():
    """The first that is known came from another node."""
    (path,) = join(s3_judged()[1], cluster=cluster)
    assert path.missing == (
        "what happened before node1: 10.240.0.5 belongs to node2, which was not traced",
    )
    assert join(s3_judged()[1])[0].missing == (
        "what happened before node1: 10.240.0.5 belongs to another node",
    )


def test_client_s_node_missing():
    """A pod of another node is the client, and that node reported nothing."""
    entry = world.entry(world.P21, world.P11, 8080, world.P11, world.P21)
    (path,) = join(judged_leg("node1", entry), cluster=cluster)
    assert path.missing == (
        "what happened before node1: the client default/p21 runs on node2, which was not traced",
    )


def test_nothing_is_missing():
    """External clients have no node; a drop is an end; unknown node names prove nothing."""
    local = world.entry(world.CLIENT, world.NODE1, 30081, world.P11, world.CLIENT)
    assert join(judged_leg("node1", local), cluster=cluster)[0].missing == ()
    packet = world.sent(world.CLIENT, world.NODE2, 30081)
    drop = samples.explained_drop(samples.drop(packet=packet, orig=packet))
    dropped = leg("node2", packet, None, drop=drop)
    assert join(dropped, cluster=cluster)[0].missing == ()
    stranger = replace(judged_leg("node1", local), node="ip-10-0-0-1")
    assert join(stranger, cluster=cluster)[0].missing == ()


def test_untracked():
    """A packet that conntrack never had."""
    (path,) = join(leg("node2", SENT, None))
    assert path.missing == ("what became of the packet on node2: conntrack has no entry for it",)
