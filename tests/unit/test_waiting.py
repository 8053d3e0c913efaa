"""Connections that wait for their first bytes."""

from dataclasses import replace

from tests.unit import samples
from tests.unit.fake_source import FakeSource
from tests.unit.samples import INFO, KTIME_NS
from tracer.encode import encode_declared
from tracer.filter import Filter
from tracer.judge.verdict import SeenAccept
from tracer.model import Accept
from tracer.pipeline import Pipeline, Wanted
from tracer.proxy_headers import Declared, Opening
from tracer.waiting import _WAITING, PATIENCE_NS, Waiting

READING = replace(INFO, has_proxy_headers=True)
FIRST = samples.connection()
ACCEPT = Accept(ktime_ns=KTIME_NS + 5, netns=1, peer=FIRST.reply.inverted)


def declared(connection=FIRST, ktime_ns=KTIME_NS + 9):
    return Declared(
        ktime_ns=ktime_ns, netns=connection.netns, flow=connection.orig, opening=Opening.HTTP
    )


def numbered(n, ktime_ns=KTIME_NS):
    flow = replace(samples.SENT, sport=n)
    return samples.connection(flow, flow.inverted, ktime_ns=ktime_ns)


def raw(*values):
    write = {
        type(FIRST): samples.connection_bytes,
        Accept: samples.accept_bytes,
        Declared: encode_declared,
        type(samples.drop()): samples.drop_bytes,
    }
    return [write[type(value)](value) for value in values]


def pipeline(**options):
    return Pipeline(FakeSource([], READING), **options)


def kinds(found):
    return [type(each).__name__ for each in found]


def test_connection_waits_for_its_first_bytes():
    """A connection is judged once its first bytes are declared, with its accept after it."""
    run = pipeline()
    assert list(run.judge(raw(FIRST, ACCEPT))) == []
    found = list(run.judge(raw(declared())))
    assert kinds(found) == ["JudgedConnection", "SeenAccept"]
    assert found[0].word.declared == declared()
    assert list(run.rest()) == []


def test_only_tcp_waits():
    """What has no first bytes is judged at once."""
    ping = samples.connection(samples.PING, samples.PING.inverted)
    assert kinds(pipeline().judge(raw(ping))) == ["JudgedConnection"]


def test_nothing_waits_unasked():
    """If headers are not read, nothing waits, and nothing is said about headers."""
    run = Pipeline(FakeSource([], INFO))
    (found,) = run.judge(raw(FIRST))
    assert found.word is None
    assert list(run.judge(raw(declared()))) == []
    assert list(run.rest()) == []


def test_time_of_records():
    """In a recording only records carry time: a later one ends the wait."""
    run = pipeline()
    assert list(run.judge(raw(FIRST, numbered(1, KTIME_NS + PATIENCE_NS)))) == []
    (found,) = run.judge(raw(numbered(2, KTIME_NS + PATIENCE_NS + 1)))
    assert (found.connection, found.word.declared) == (FIRST, None)


def test_clock():
    """A live run looks at the clock, so that a quiet node keeps nobody waiting."""
    now = [KTIME_NS]
    run = pipeline(clock=lambda: now[0])
    assert list(run.judge(raw(FIRST))) == []
    now[0] += PATIENCE_NS + 1
    assert kinds(run.judge([])) == ["JudgedConnection"]


def test_late():
    """A declaration that comes after its connection was judged is counted and reported."""
    run = pipeline()
    list(run.judge(raw(FIRST, numbered(1, KTIME_NS + 9 * PATIENCE_NS))))
    assert list(run.judge(raw(declared(ktime_ns=KTIME_NS + 9 * PATIENCE_NS)))) == []
    assert (
        "1 proxies' headers that arrived more than 2 s after their connection began"
        in run.summary().not_seen
    )


def test_end():
    """At the end all that wait are judged, in order, and counted."""
    run = pipeline()
    list(run.judge(raw(FIRST, ACCEPT, numbered(1))))
    assert kinds(run.rest()) == ["JudgedConnection", "SeenAccept", "JudgedConnection"]
    assert run.summary().connections == 2


def test_filter_holds_for_those_that_waited():
    """A connection that waited, and its accept, are shown only if they are wanted."""
    run = pipeline(wanted=Wanted(flows=Filter(port=1)))
    list(run.judge(raw(FIRST, ACCEPT, declared())))
    assert list(run.rest()) == []


def test_drops_do_not_wait():
    """A drop does not wait."""
    assert kinds(pipeline().judge(raw(FIRST, samples.drop()))) == ["JudgedDrop"]


def test_ports_that_are_used_again():
    """The older connection of the same ports is judged when the newer one comes."""
    run = pipeline()
    (found,) = run.judge(raw(FIRST, replace(FIRST, ktime_ns=KTIME_NS + 7)))
    assert found.connection == FIRST


def test_flood():
    """Beyond a limit the oldest stop waiting."""
    waiting = Waiting()
    ready = [each for n in range(_WAITING + 3) for each in waiting.hold(numbered(n))]
    assert [each.connection.orig.sport for each in ready] == [0, 1, 2]
    assert len(list(waiting.rest())) == _WAITING
    assert waiting._by_peer == {}


def test_stray_accept():
    """An accept without a waiting connection is judged as ever."""
    run = pipeline(wanted=Wanted(are_stray_accepts=True))
    assert [type(each) for each in run.judge(raw(ACCEPT))] == [SeenAccept]
