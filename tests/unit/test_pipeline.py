"""A run over records from memory: what is shown, what is counted, what is remembered."""

import logging
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples, world
from tests.unit.fake_source import FakeSource
from tests.unit.samples import CLOCK_OFFSET_NS, INFO, KTIME_NS, flow
from tracer import pipeline as pipeline_module
from tracer.filter import Filter
from tracer.judge.cause import Cause
from tracer.judge.verdict import JudgedConnection, JudgedDrop, SeenAccept, Verdict
from tracer.model import ClientClass, Hook
from tracer.pipeline import Pipeline, Wanted
from tracer.views import FixedViews, Place

REPLACED = samples.connection_bytes(samples.connection(*samples.REPLACED))
PRESERVED = samples.connection_bytes(samples.connection(*samples.PRESERVED))
DROPPED = samples.drop_bytes(samples.drop())
# What the backend's socket sees of REPLACED: its peer is the node.
ACCEPTED = samples.accept_bytes(samples.accept(samples.REPLACED[1].inverted))
STRAY = samples.accept_bytes(samples.accept(flow("192.0.2.9", 1, "192.0.2.8", 2)))


class Asked:
    """Views that remember what they were asked."""

    def __init__(self, views):
        self.views = views
        self.asked = []

    def refresh(self):
        self.asked.append("refresh")

    def at(self, *what):
        self.asked.append(what)
        return self.views.at(*what)

    def notes(self):
        return ("the moon",)


def run(records, *, info=INFO, wanted=None, views=None, **fake):
    """Judge records; return the pipeline and what it yielded."""
    pipeline = Pipeline(FakeSource([], info, **fake), wanted, views)
    return pipeline, list(pipeline.judge(records))


def test_connection():
    """A connection gets its node's name, its time as Unix time, and a verdict."""
    _, [judged] = run([REPLACED])
    assert isinstance(judged, JudgedConnection)
    assert judged.connection == samples.connection(*samples.REPLACED)
    assert (judged.node, judged.verdict) == ("node2", Verdict.REPLACED)
    assert judged.time_ns == CLOCK_OFFSET_NS + KTIME_NS


def test_drop():
    """A drop gets the names that its kernel has for reason and functions, and the hook."""
    drop = samples.drop(dst_input=0x1234)
    _, [judged] = run(
        [samples.drop_bytes(drop)],
        symbols={drop.location: "nf_hook_slow", 0x1234: "ip_local_deliver"},
    )
    assert isinstance(judged, JudgedDrop)
    assert judged.drop == drop
    assert (judged.node, judged.reason, judged.place) == (
        "node2", "NETFILTER_DROP", "nf_hook_slow",
    )  # fmt: skip
    assert (judged.hook, judged.verdict) == (Hook.NF_INPUT, Verdict.DROPPED)
    assert judged.time_ns == CLOCK_OFFSET_NS + KTIME_NS


def test_accept():
    """An accept of a connection that was shown is shown with its time."""
    _, judged = run([REPLACED, ACCEPTED])
    assert judged[1] == SeenAccept(
        accept=samples.accept(samples.REPLACED[1].inverted), time_ns=CLOCK_OFFSET_NS + KTIME_NS
    )


def test_unknown_names():
    """Without names the numbers are shown: of the namespace and of the reason."""
    info = replace(INFO, nodes={}, drop_reasons={})
    _, [connection, drop] = run([REPLACED, DROPPED], info=info)
    assert connection.node == "netns 4026532001"
    assert (drop.reason, drop.place) == ("reason 8", None)


def test_undecodable_is_logged_once(caplog):
    """Undecodable records are counted each time, logged once per reason, and not raised."""
    wrong = bytearray(REPLACED)
    wrong[14] = 7
    with caplog.at_level(logging.WARNING):
        pipeline, judged = run([b"", bytes(wrong), b"", REPLACED, b"", bytes(wrong)])
    assert len(judged) == 1
    assert pipeline.summary().lost == {"undecodable": 5}
    assert [record.getMessage() for record in caplog.records] == [
        f"undecodable record: {reason} (further ones are counted)"
        for reason in (
            "record has 0 bytes, fewer than its header's 16",
            "record has wire version 7, expected 1",
        )
    ]


def test_undecodable_for_many_reasons(caplog):
    """Reasons hold values, so there may be any number of them: log and memory stay small."""
    wrong = [REPLACED + bytes(n) for n in range(1, 1001)]
    with caplog.at_level(logging.WARNING):
        pipeline, _ = run(wrong)
    assert pipeline.summary().lost == {"undecodable": 1000}
    assert 1 < len(caplog.records) < 50


def test_undecodable_adds_to_the_source_s():
    """Records that the source or the pipeline could not read are counted together."""
    pipeline, _ = run([b""], lost={"undecodable": 2})
    assert pipeline.summary().lost == {"undecodable": 3}


@given(st.lists(st.binary(max_size=140)))
def test_any_records(records):
    """No bytes stop a run; each record is judged, left out or counted."""
    logging.disable(logging.WARNING)
    try:
        pipeline, judged = run(records, wanted=Wanted(are_stray_accepts=True))
    finally:
        logging.disable(logging.NOTSET)
    assert len(judged) + pipeline.summary().lost["undecodable"] == len(records)


@pytest.mark.parametrize(
    ("flows", "shown"),
    [
        pytest.param(Filter(), [REPLACED, PRESERVED, DROPPED], id="all"),
        pytest.param(Filter(port=30080), [REPLACED, PRESERVED, DROPPED], id="port"),
        pytest.param(Filter(port=80), [], id="other-port"),
        pytest.param(Filter(proto=17), [], id="other-proto"),
        pytest.param(
            Filter(client=ip_network("198.51.100.0/24")),
            [REPLACED, PRESERVED, DROPPED],
            id="client",
        ),
        pytest.param(
            Filter(backend=ip_network("10.244.1.11/32")), [REPLACED, PRESERVED], id="backend"
        ),
    ],
)
def test_filter(flows, shown):
    """The filter is applied whether or not the source has: a recording may hold everything."""
    everything = [REPLACED, PRESERVED, DROPPED]
    _, judged = run(everything, wanted=Wanted(flows=flows))
    _, expected = run(shown)
    assert judged == expected


def test_drop_is_wanted_by_either_tuple():
    """A dropped packet is wanted if it, or the connection it belongs to, is."""
    packet = flow("10.0.0.1", 1, "10.0.0.2", 2)
    drop = samples.drop_bytes(samples.drop(packet=packet))
    for port in (2, 30080):
        assert len(run([drop], wanted=Wanted(flows=Filter(port=port)))[1]) == 1
    assert run([drop], wanted=Wanted(flows=Filter(port=3)))[1] == []


def test_drop_without_tuples():
    """A drop without addresses is shown unless someone asked for a certain flow."""
    drop = samples.drop_bytes(samples.drop(packet=None, orig=None))
    assert len(run([drop])[1]) == 1
    assert run([drop], wanted=Wanted(flows=Filter(proto=6)))[1] == []


@pytest.mark.parametrize(
    ("verdicts", "shown"),
    [
        (set(), ["replaced", "preserved", "dropped"]),
        ({Verdict.REPLACED}, ["replaced"]),
        ({Verdict.DROPPED, Verdict.PRESERVED}, ["preserved", "dropped"]),
        ({Verdict.UNKNOWN}, []),
    ],
)
def test_verdict_filter(verdicts, shown):
    """Only the wanted verdicts are shown, and counted."""
    pipeline, judged = run(
        [REPLACED, PRESERVED, DROPPED], wanted=Wanted(verdicts=frozenset(verdicts))
    )
    assert [each.verdict for each in judged] == shown
    summary = pipeline.summary()
    assert summary.connections + summary.drops == len(shown)


# In the recorded cluster these are a NodePort Service's, and an unknown one's.
VIEWS = FixedViews(cluster=world.CLUSTER)
CLUSTER_POLICY = samples.connection_bytes(samples.connection(*samples.REPLACED, mark=0x4000))
STRANGER = samples.connection_bytes(
    samples.connection(
        flow("192.0.2.1", 5, "192.0.2.2", 6), flow("192.0.2.2", 6, "10.240.0.5", 5), mark=0x4000
    )
)
NO_LOCAL = samples.drop_bytes(
    samples.drop(packet=flow("192.0.2.1", 7, "10.240.0.5", 30081), orig=None)
)


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ({}, [CLUSTER_POLICY, STRANGER, NO_LOCAL]),
        ({"causes": {Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER}}, [CLUSTER_POLICY]),
        ({"causes": {Cause.NO_LOCAL_ENDPOINT, Cause.HAIRPIN}}, [NO_LOCAL]),
        ({"services": {("default", "nodeport")}}, [CLUSTER_POLICY]),
        ({"services": {("default", "nodeport-local"), ("default", "nodeport")}},
         [CLUSTER_POLICY, NO_LOCAL]),
        ({"services": {("other", "nodeport")}}, []),
        ({"services": {("default", "nodeport")}, "causes": {Cause.NO_LOCAL_ENDPOINT}}, []),
        ({"verdicts": {Verdict.REPLACED}}, [CLUSTER_POLICY, STRANGER]),
    ],
)  # fmt: skip
def test_what_the_judge_says_is_wanted(wanted, shown):
    """Causes and Services filter as verdicts do; a connection without one matches no name."""
    wanted = Wanted(**{key: frozenset(value) for key, value in wanted.items()})
    everything = [CLUSTER_POLICY, STRANGER, NO_LOCAL]
    pipeline, judged = run(everything, wanted=wanted, views=VIEWS)
    assert judged == run(shown, views=VIEWS)[1]
    summary = pipeline.summary()
    assert summary.connections + summary.drops == len(shown)


def test_accept_of_an_unwanted_cause():
    """The accept of a connection with another cause is left out with it."""
    wanted = Wanted(causes=frozenset({Cause.HAIRPIN}))
    assert run([CLUSTER_POLICY, ACCEPTED], wanted=wanted, views=VIEWS)[1] == []
    wanted = Wanted(causes=frozenset({Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER}))
    assert len(run([CLUSTER_POLICY, ACCEPTED], wanted=wanted, views=VIEWS)[1]) == 2


def test_views():
    """Each record is judged by its namespace's view at its own time; a batch refreshes once."""
    views = Asked(VIEWS)
    pipeline, judged = run([CLUSTER_POLICY, NO_LOCAL, ACCEPTED], views=views)
    at = (samples.NETNS, "node2", KTIME_NS)
    assert views.asked == ["refresh", at, at]
    assert judged[0].opinion.service.name == "nodeport"
    assert judged[0].backend_pod == ("default", "p11", "node1")
    assert pipeline.summary().not_seen == ("what the test leaves out", "the moon")
    list(pipeline.judge([]))
    assert views.asked.count("refresh") == 2


def test_recorded_places():
    """A recording's own information on its node makes its gateway a node's address."""
    gateway = ip_address("10.244.2.1")
    place = Place(addresses=frozenset({gateway}), masquerade_mark=0x8000, proxy_mode="nftables")
    views = FixedViews(cluster=world.CLUSTER, places={samples.NETNS: place})
    assert views.at(samples.NETNS, "node2", 0).classify(gateway) is ClientClass.NODE
    assert views.at(1, "node2", 0).classify(gateway) is ClientClass.POD
    view = replace(views, masquerade_mark=0x1, proxy_mode="ipvs").at(samples.NETNS, "node2", 0)
    assert (view.masquerade_mark, view.mode) == (0x1, "ipvs")
    view = views.at(samples.NETNS, "node2", 0)
    assert (view.masquerade_mark, view.mode) == (0x8000, "nftables")
    assert views.at(1, "node2", 0).masquerade_mark == 0x4000


def test_accepts_follow_shown_connections():
    """Accepts of other namespaces, and of connections that were filtered out, are left out."""
    _, judged = run([ACCEPTED, REPLACED, STRAY, ACCEPTED])
    assert [type(each) for each in judged] == [JudgedConnection, SeenAccept]
    wanted = Wanted(verdicts=frozenset({Verdict.PRESERVED}))
    assert run([REPLACED, ACCEPTED], wanted=wanted)[1] == []


def test_stray_accepts():
    """On request every accept is shown."""
    _, judged = run([STRAY, ACCEPTED], wanted=Wanted(are_stray_accepts=True))
    assert len(judged) == 2


def test_memory_is_bounded(monkeypatch):
    """Of shown connections only the latest are remembered, however many there are."""
    monkeypatch.setattr(pipeline_module, "_REMEMBERED", 3)
    replies = [flow(samples.BACKEND, 8080, samples.NODE, port) for port in range(1, 11)]
    pipeline, _ = run(
        samples.connection_bytes(samples.connection(samples.SENT, reply)) for reply in replies
    )
    assert len(pipeline._selection._shown) == 3
    accepts = [samples.accept_bytes(samples.accept(reply.inverted)) for reply in replies]
    assert [each.accept.peer.sport for each in pipeline.judge(accepts)] == [8, 9, 10]


def test_remembered_again(monkeypatch):
    """A tuple that is used again counts as the latest: its accept is still to come."""
    monkeypatch.setattr(pipeline_module, "_REMEMBERED", 2)
    first, second, third = (
        samples.connection_bytes(
            samples.connection(samples.SENT, flow(samples.BACKEND, 8080, samples.NODE, port))
        )
        for port in (1, 2, 3)
    )
    peer = flow(samples.NODE, 1, samples.BACKEND, 8080)
    _, judged = run([first, second, first, third, samples.accept_bytes(samples.accept(peer))])
    assert isinstance(judged[-1], SeenAccept)


def test_summary():
    """The summary counts what was shown, and what the source lost."""
    pipeline, _ = run([REPLACED, PRESERVED, DROPPED, ACCEPTED], lost={"ring_full": 4})
    summary = pipeline.summary()
    assert (summary.connections, summary.drops) == (2, 1)
    assert summary.lost == {"ring_full": 4, "undecodable": 0}
    assert summary.not_seen == ("what the test leaves out",)
    assert not summary.is_complete


def test_untracked_is_not_lost():
    """Packets that conntrack was told not to track could not be seen: they are not lost."""
    pipeline, _ = run([], lost={"untracked": 7})
    summary = pipeline.summary()
    assert summary.lost == {"undecodable": 0}
    assert summary.is_complete
    assert summary.not_seen[-1] == "7 packets that conntrack was told not to track (NOTRACK)"


def test_judged_one_by_one():
    """A reader that stops early has counted what it took, no more."""
    pipeline = Pipeline(FakeSource([], INFO))
    next(pipeline.judge([REPLACED, PRESERVED, PRESERVED]))
    assert pipeline.summary().connections == 1
