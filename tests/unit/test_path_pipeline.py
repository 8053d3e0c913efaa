"""A run that shows whole paths: when a path is complete, which are wanted, what is counted."""

from dataclasses import replace
from ipaddress import ip_network

import pytest

from tests.unit import samples
from tests.unit.fake_source import FakeSource
from tests.unit.samples import CLOCK_OFFSET_NS, INFO, KTIME_NS, REPLACED, flow
from tracer.filter import Filter
from tracer.judge.assemble import QUIET_NS
from tracer.judge.cause import Cause
from tracer.judge.path import Direction
from tracer.judge.verdict import Verdict
from tracer.model import Hook, Hop
from tracer.paths import PathPipeline
from tracer.pipeline import Wanted

NEXT_NETNS = samples.NETNS + 1
NODES = replace(INFO, nodes={samples.NETNS: "node2", NEXT_NETNS: "node1"})
ORIG, REPLY = REPLACED
LEFT = REPLY.inverted
START_NS = CLOCK_OFFSET_NS + KTIME_NS
WINDOW_NS = 1_000_000


def hop(packet, *, netns=samples.NETNS, entry=REPLACED, after_ns=0, packet_id=1):
    return samples.hop_bytes(
        Hop(
            ktime_ns=KTIME_NS + after_ns,
            netns=netns,
            hook=Hook.NF_FORWARD,
            packet=packet,
            orig=entry[0],
            reply=entry[1],
            is_reply=False,
            is_new=True,
            is_after_nat=True,
            packet_id=packet_id,
            number=1,
            mark=0,
            iif=2,
            oif=3,
            length=60,
            tcp_flags=2,
        )
    )


FIRST = [hop(ORIG), samples.connection_bytes(samples.connection(*REPLACED))]
SECOND = [
    hop(LEFT, netns=NEXT_NETNS, entry=(LEFT, REPLY), after_ns=1000, packet_id=2),
    samples.connection_bytes(samples.connection(LEFT, REPLY, netns=NEXT_NETNS)),
    samples.accept_bytes(samples.accept(LEFT)),
]
DROPPED = [samples.drop_bytes(samples.drop(packet=flow("192.0.2.1", 1, "192.0.2.2", 2), orig=None))]


class Clock:
    def __init__(self):
        self.now_ns = START_NS

    def __call__(self):
        return self.now_ns


def pipeline(wanted=None, **options):
    return PathPipeline(FakeSource([], NODES), wanted, window_ns=WINDOW_NS, **options)


def test_a_path_over_two_nodes():
    """What one node sent and the next received is one path, with what the socket accepted."""
    run = pipeline()
    assert list(run.judge(FIRST + SECOND)) == []
    (path,) = run.rest()
    assert [leg.node for leg in path.legs] == ["node2", "node1"]
    assert [each.hop.packet for _, each in path.hops(Direction.ORIGINAL)] == [ORIG, LEFT]
    assert path.verdict is Verdict.REPLACED
    assert path.accept.accept.peer == LEFT


def test_whole_after_a_while():
    """Live, a path is shown when its packets have been quiet and no node can add to it."""
    clock = Clock()
    run = pipeline(clock_ns=clock)
    assert list(run.judge(FIRST)) == []
    clock.now_ns = START_NS + QUIET_NS + WINDOW_NS - 1
    assert list(run.judge([])) == []
    clock.now_ns = START_NS + QUIET_NS + WINDOW_NS + 1_000_000
    # What happened before that time may not have been read yet.
    assert list(run.judge([])) == []
    assert len(list(run.judge([]))) == 1


def test_a_reader_that_was_kept_waiting():
    """On a busy machine, records that wait for seconds still belong to the path."""
    clock = Clock()
    run = pipeline(clock_ns=clock)
    clock.now_ns = START_NS + 5 * QUIET_NS
    assert list(run.judge(FIRST)) == []
    (path,) = run.judge(SECOND)
    assert [leg.node for leg in path.legs] == ["node2", "node1"]
    assert list(run.rest()) == []


def test_a_recordings_own_clock():
    """In a replay, the records' own times tell when a path is complete."""
    run = pipeline()
    later = flow("192.0.2.7", 7, "192.0.2.8", 8)
    found = list(run.judge(FIRST))
    entry = (later, later.inverted)
    found += run.judge([hop(later, entry=entry, after_ns=10 * QUIET_NS, packet_id=9)])
    assert [path.orig for path in found] == [ORIG]
    assert [path.orig for path in run.rest()] == [later]


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Wanted(), 2),
        (Wanted(flows=Filter(client=ip_network(samples.CLIENT))), 1),
        (Wanted(flows=Filter(client=ip_network(samples.NODE))), 1),
        (Wanted(flows=Filter(client=ip_network("203.0.113.1"))), 0),
        (Wanted(flows=Filter(port=30080)), 1),
        (Wanted(verdicts=frozenset({Verdict.DROPPED})), 1),
        (Wanted(verdicts=frozenset({Verdict.REPLACED})), 1),
        (Wanted(causes=frozenset({Cause.HAIRPIN})), 0),
        (Wanted(services=frozenset({("default", "web")})), 0),
    ],
)
def test_wanted(wanted, count):
    """A filter matches a path if it matches one of its nodes; verdicts are the path's."""
    run = pipeline(wanted)
    found = [*run.judge(FIRST + SECOND + DROPPED), *run.rest()]
    assert len(found) == count


def test_summary():
    """Paths that arrived and paths that were dropped are counted; so are damaged records."""
    run = pipeline()
    assert len([*run.judge([*FIRST, *SECOND, *DROPPED, b"x"]), *run.rest()]) == 2
    summary = run.summary()
    assert (summary.connections, summary.drops) == (1, 1)
    assert summary.lost["undecodable"] == 1


def test_the_clock_is_set_back():
    """If the clock is set back, what waits is shown at once, not when that time comes again."""
    source = FakeSource([], NODES)
    clock = Clock()
    run = PathPipeline(source, window_ns=WINDOW_NS, clock_ns=clock)
    assert list(run.judge(FIRST)) == []
    clock.now_ns -= 3600 * 10**9
    source.info = replace(NODES, clock_offset_ns=NODES.clock_offset_ns - 3600 * 10**9)
    (path,) = run.judge(SECOND)
    assert path.legs[0].orig == ORIG
    assert list(run.judge([])) == []


def test_a_record_with_a_wrong_time():
    """In a recording, one record from the future does not end the paths of the others."""
    future = samples.connection_bytes(
        replace(samples.connection(LEFT, REPLY), ktime_ns=KTIME_NS + 10**15)
    )
    run = pipeline()
    batches = ([FIRST[0], future, *FIRST[1:]], SECOND)
    paths = [*(path for batch in batches for path in run.judge(batch)), *run.rest()]
    assert [len(path.legs) for path in paths if path.orig == ORIG] == [2]


def test_what_is_left_out_is_told():
    """Hops beyond the limits are in the summary."""
    run = pipeline()
    list(run.judge(FIRST[:1] * 300))
    assert run.summary().lost["hops_left_out"] == 44
    assert "legs_cut_short" not in run.summary().lost
