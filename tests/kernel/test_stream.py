"""An agent that streams under a flood: its counts stay exact, and clients' numbers add up."""

import socket
import threading
from contextlib import ExitStack, closing

import pytest

from exporters.certificate import Certificate
from exporters.page_server import PageServer
from exporters.prometheus import Page
from tests.kernel.box import PATIENCE_S, SERVER, udp_datagram, wait_until
from tests.kernel.trace import open_source
from tests.unit.test_page_server import Issued
from tracer.agent import Agent
from tracer.filter import Filter
from tracer.kernel.programs import Sizes
from tracer.kernel.source import Settings
from tracer.model import UDP
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream
from tracer.stream.protocol import request_line
from tracer.stream.server import StreamServer
from tracer.stream.upgrade import HttpsAgent
from tracer.surroundings import LiveViews

RULES = "table ip x { chain post { type nat hook postrouting priority 100; masquerade; } }"
FLOWS, PORTS = 20_000, 10_000
# Accepts are of the whole machine: without them there are our connections alone.
UDP_ONLY = Wanted(flows=Filter(proto=UDP))


def let_in(*_):
    """A gate for everyone."""


class Running:
    """An agent in a thread of this process, on a Unix socket and on a port."""

    def __init__(self, box, directory):
        self.path = directory / "agent.sock"
        issued = Issued(directory)
        ca_file = directory / "ca.crt"
        ca_file.write_bytes(issued.authority.cert_pem.bytes())
        self.snapshots = []
        self._is_over = False
        with ExitStack() as stack:
            views = LiveViews([box.target()], proxy_modes=[None])
            stack.callback(views.close)
            sizes = Sizes(connection_ring_pages=64, accept_ring_pages=1, drop_ring_pages=1)
            settings = Settings(is_streaming=False, has_drops=True, sizes=sizes)
            kernel = stack.enter_context(closing(open_source([box.target()], settings)))
            server = StreamServer(self.path)
            certificate = Certificate(issued.cert, issued.key)
            pages = stack.enter_context(
                closing(PageServer(Page("1"), "127.0.0.1", 0, certificate=certificate, gate=let_in))
            )
            pages.start(server)
            self.https = HttpsAgent(
                host="127.0.0.1",
                port=pages.port,
                token="any",
                ca_file=ca_file,
            )
            self.agent = Agent(
                kernel, views, self.snapshots.append, version="1", stream=server,
                drain_interval_s=1.0,
            )  # fmt: skip
            stack.callback(self.agent.close)
            self._stack = stack.pop_all()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._is_over:
            self.agent.step(0.1)

    def counted(self):
        return sum(self.snapshots[-1].connections.values()) if self.snapshots else 0

    def close(self):
        self._is_over = True
        self._thread.join()
        self._stack.close()


@pytest.fixture
def running(box, tmp_path):
    box.rules(RULES)
    with closing(Running(box, tmp_path)) as running:
        yield running


def flood(box):
    """Make new UDP connections through the node, each with one packet."""
    with box.socket("client", 4, socket.SOCK_RAW, UDP) as sent:
        for i in range(FLOWS):
            datagram = udp_datagram(1024 + i % PORTS, 8000 + i // PORTS)
            sent.sendto(datagram, (SERVER[4], 0))


def taken(stream):
    """Read a stream to its end, and return its summary."""
    while (lines := stream.read(0.1)) is not None:
        list(stream.judge(lines))
    return stream.summary()


@pytest.mark.parametrize("is_secure", [False, True], ids=["unix", "https"])
def test_a_flood(box, running, is_secure):
    """
    With a reader and one who never reads, every connection is counted; and for each client, what
    it got and what it is told it lost are the connections made.
    """
    where = running.https if is_secure else running.path
    with ExitStack() as stack:
        reader = stack.enter_context(AgentStream(where, UDP_ONLY))
        idle = stack.enter_context(AgentStream(where, UDP_ONLY))
        for each in (reader, idle):
            each.wait(PATIENCE_S)
        summaries = []
        thread = threading.Thread(target=lambda: summaries.append(taken(reader)))
        thread.start()
        flood(box)
        wait_until(lambda: running.counted() >= FLOWS)
        for each in (reader, idle):
            each.hang_up()
        thread.join()
        summaries.append(taken(idle))
    assert running.counted() == FLOWS
    for summary in summaries:
        # A mark that was overtaken is lost, not its connection.
        gone = sum(summary.lost[reason] for reason in ("ring_full", "rate_limited", "queue_full"))
        assert summary.connections + gone == FLOWS
    assert summaries[1].lost["queue_full"] > 0
    told = running.snapshots[-1]
    assert told.lost["connections", "paths_full"] == 0


def test_nobody_listens(box, running):
    """Then nothing is written, so nothing can be lost."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(running.path))
        sock.sendall(request_line(UDP_ONLY))
        sock.recv(100)
    live = running.agent._live
    wait_until(lambda: not live.is_on and live.clients == 0)
    # While there was a client, accepts of the whole machine may have found no room.
    before = live.lost()
    flood(box)
    wait_until(lambda: running.counted() >= FLOWS)
    assert running.counted() == FLOWS
    told = running.snapshots[-1].lost
    assert {reason: told["stream", reason] for reason in before} == before
