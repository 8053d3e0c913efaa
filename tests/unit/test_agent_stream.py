"""The agent's part in the live stream: the kernel streams while somebody listens; counts go on."""

from contextlib import closing
from ipaddress import ip_network

import pytest

from tests.unit import samples, world
from tests.unit.patience import PATIENCE_S
from tests.unit.test_agent import REPLACED, FakeKernel, Fixed
from tests.unit.world import CLIENT, NODE2, NODE_PORT
from tracer.agent import Agent
from tracer.cluster.status import ClusterStatus
from tracer.encode import encode_connection
from tracer.filter import Filter
from tracer.judge.verdict import Verdict
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream
from tracer.stream.live import AT_ONCE_S, SHARE, LiveStream
from tracer.stream.server import StreamServer

DROP = samples.drop(
    packet=world.sent(CLIENT, NODE2, NODE_PORT), orig=world.sent(CLIENT, NODE2, NODE_PORT), reason=1
)


class Setup:
    """An agent that streams, and a kernel that a test plays."""

    def __init__(self, path):
        self.now_s = self.cpu_s = 0.0
        self.path = path
        self.kernel = FakeKernel()
        self.snapshots = []
        self.agent = Agent(
            self.kernel,
            Fixed(world.view()),
            self.snapshots.append,
            version="1.2",
            stream=StreamServer(path),
            clock_s=lambda: self.now_s,
            cpu_s=lambda: self.cpu_s,
        )
        self.agent.step(0)

    def listen(self, wanted=None):
        client = AgentStream(self.path, wanted or Wanted())
        self.agent.step(0)
        client.wait(PATIENCE_S)
        return client

    def told(self):
        self.agent.drain()
        return self.snapshots[-1]


@pytest.fixture
def setup(tmp_path):
    setup = Setup(tmp_path / "agent.sock")
    yield setup
    setup.agent.close()


def test_the_kernel_streams_while_somebody_listens(setup):
    """The kernel streams, filtered, from the first client's hello until the last one leaves."""
    assert setup.kernel.woken_by is not None
    assert setup.kernel.streaming == []
    narrow = Filter(client=ip_network("198.51.100.0/25"), port=80)
    with closing(setup.listen(Wanted(flows=narrow))):
        assert setup.kernel.streaming == [narrow]
        with closing(setup.listen(Wanted(flows=narrow))):
            assert len(setup.kernel.streaming) == 1
        setup.agent.step(0)
        wider = Wanted(flows=Filter(client=ip_network("198.51.100.128/25"), port=80))
        with closing(setup.listen(wider)):
            covering = Filter(client=ip_network("198.51.100.0/24"), port=80)
            assert setup.kernel.streaming == [narrow, covering]
            assert setup.told().stream_clients == 2
        setup.agent.step(0)
        assert setup.kernel.streaming[-1] == narrow
    setup.agent.step(0)
    assert setup.kernel.streaming[-1] is None
    # A client that has hung up is noticed at the next look at the kernel.
    setup.agent.step(0)
    assert setup.told().stream_clients == 0


def test_drops_are_counted_and_streamed(setup):
    """A drop is judged once, for totals and listeners; connections are counted elsewhere."""
    with closing(setup.listen()) as client:
        setup.kernel.records = [encode_connection(REPLACED), samples.drop_bytes(DROP)]
        setup.agent.step(0)
        verdicts = [each.verdict for each in client.judge(client.read(5))]
    assert verdicts == [Verdict.REPLACED, Verdict.DROPPED]
    told = setup.told()
    assert sum(told.drops.values()) == 1
    assert sum(told.connections.values()) == 0


def test_what_takes_too_long_is_lost_to_the_stream(setup):
    """A flood of records costs a bounded share of the time; drops and totals do not suffer."""

    class Slow(Fixed):
        def at(self, netns, node, ktime_ns):
            setup.cpu_s += 0.1
            setup.now_s += 0.1
            return self.view

    setup.agent._pipeline._views = Slow(world.view())
    with closing(setup.listen()) as client:
        setup.kernel.records = [
            *([encode_connection(REPLACED)] * 50),
            samples.drop_bytes(DROP),
        ]
        setup.agent.step(0)
        client.hang_up()
        setup.agent.step(0)
        setup.agent.step(0)
        while client._end is None:
            list(client.judge(client.read(1) or []))
        summary = client.summary()
    # While it is spent, some comes in.
    got = int(AT_ONCE_S / (1 - SHARE) / 0.1)
    assert summary.connections in (got, got + 1)
    assert summary.connections + summary.lost["rate_limited"] == 50
    assert summary.drops == 1
    told = setup.told()
    assert told.lost["stream", "rate_limited"] == summary.lost["rate_limited"]
    assert sum(told.drops.values()) == 1
    assert told.lost["agent", "rate_limited"] == 0


def test_waiting_for_a_cpu_costs_nothing(setup):
    """On a busy node the stream has its share of a core all the same."""

    class Starved(Fixed):
        def at(self, netns, node, ktime_ns):
            setup.cpu_s += 0.001
            setup.now_s += 0.1
            return self.view

    setup.agent._pipeline._views = Starved(world.view())
    with closing(setup.listen()) as client:
        setup.kernel.records = [encode_connection(REPLACED)] * 50
        setup.agent.step(0)
        assert len(list(client.judge(client.read(5)))) == 50


def test_the_share_grows_back(tmp_path):
    """So much of a core, on average."""
    now_s = 0.0
    kernel = FakeKernel()
    live = LiveStream(
        kernel,
        None,
        version="1",
        notes=tuple,
        losses=dict,
        clock_s=lambda: now_s,
        cpu_s=lambda: now_s,
    )
    taken = 0
    for _ in range(100):
        for _ in live.affordable([b"x"] * 10):
            now_s += 0.1
            taken += 1
        now_s += 1.0
    assert taken * 0.1 == pytest.approx(SHARE * now_s, rel=0.2)


def test_records_that_cannot_be_read_are_told(setup):
    """To who listens, as to the metrics."""
    with closing(setup.listen()) as client:
        setup.kernel.records = [b"junk", encode_connection(REPLACED)[:-1]]
        setup.agent.step(0)
        client.hang_up()
        setup.agent.step(0)
        setup.agent.step(0)
        client.read(5)
        assert client.summary().lost["undecodable"] == 2
    assert setup.told().undecodable == 2


def test_nobody_is_told_hello_before_it_counts(tmp_path):
    """A client that comes before the cluster is known gets its hello when counting begins."""
    path = tmp_path / "agent.sock"
    status = ClusterStatus(missing="objects")
    agent = Agent(
        FakeKernel(),
        Fixed(world.view()),
        lambda _: None,
        version="1",
        stream=StreamServer(path),
        cluster_status=lambda: status,
    )
    with closing(AgentStream(path, Wanted())) as client:
        agent.step(0)
        client._receive(0)
        assert not client._lines
        status = ClusterStatus()
        agent.step(0)
        client.wait(PATIENCE_S)
    agent.close()


def test_without_a_socket(tmp_path):
    """Nothing of the stream is exported, and nothing is streamed."""
    kernel, snapshots = FakeKernel(), []
    agent = Agent(kernel, Fixed(world.view()), snapshots.append, version="1")
    agent.step(0)
    agent.drain()
    assert snapshots[-1].stream_clients is None
    assert "stream" not in {stage for stage, _ in snapshots[-1].lost}
    assert kernel.streaming == []
