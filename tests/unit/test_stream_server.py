"""The agent's side of the live stream: its clients, their filters, queues and losses."""

import json
import resource
import select
import socket
from contextlib import ExitStack, closing
from ipaddress import ip_network

import pytest

from exporters.jsonl import to_line
from tests.unit import samples
from tests.unit.samples import flow
from tests.unit.streaming import Stream
from tracer.filter import Filter
from tracer.judge.verdict import JudgedConnection, SeenAccept, Verdict
from tracer.pipeline import Selection, Wanted
from tracer.stream import audience
from tracer.stream import server as servers
from tracer.stream.clients import QUEUE_BYTES, QUEUES_BYTES
from tracer.stream.errors import StreamError
from tracer.stream.protocol import request_line
from tracer.stream.server import StreamServer

REPLACED = samples.judged(*samples.REPLACED)
PRESERVED = samples.judged(*samples.PRESERVED)


@pytest.fixture
def stream(tmp_path):
    with closing(Stream(tmp_path / "agent.sock")) as stream:
        yield stream


def read(client):
    return list(client.judge(client.read(0.05) or []))


def read_all(client):
    while client.read(0.05) is not None:
        pass


def ended(stream, client):
    """End a client as Ctrl-C does, and return its summary."""
    client.hang_up()
    stream.step()
    while client._end is None:
        list(client.judge(client.read(0.05) or []))
        stream.step()
    return client.summary()


def test_everyone_gets_what_he_wants(stream):
    """Each client gets what its filter wants, in order; the kernel's filter covers both."""
    assert stream.server.flows is None
    one = stream.listen(Wanted(flows=Filter(client=ip_network("198.51.100.0/24"))))
    assert stream.server.flows == Filter(client=ip_network("198.51.100.0/24"))
    other = stream.listen(Wanted(verdicts=frozenset({Verdict.PRESERVED})))
    assert stream.server.flows == Filter()
    with closing(one), closing(other):
        for judged in (REPLACED, PRESERVED, REPLACED):
            stream.server.offer(judged)
        stream.step()
        is_one_s = Selection(Wanted(flows=Filter(client=ip_network("198.51.100.0/24")))).takes
        expected = [each for each in (REPLACED, PRESERVED, REPLACED) if is_one_s(each)]
        assert [to_line(each) for each in read(one)] == [to_line(each) for each in expected]
        assert [each.verdict for each in read(other)] == [Verdict.PRESERVED]
    stream.step()
    stream.step()
    assert stream.server.flows is None
    assert stream.server.clients == 0


def test_who_wants_only_drops(stream):
    """This costs the kernel nothing: drops are read anyway."""
    with closing(stream.listen(Wanted(verdicts=frozenset({Verdict.DROPPED})))) as client:
        assert stream.server.flows is None
        stream.server.offer(samples.explained_drop())
        stream.step()
        assert [each.verdict for each in read(client)] == [Verdict.DROPPED]


def test_an_accept_follows_its_connection(stream):
    """A client gets the accepts of its connections, or all of them if it wants strays."""
    accepted = SeenAccept(
        accept=samples.accept(samples.REPLACED[1].inverted), time_ns=samples.KTIME_NS
    )
    with ExitStack() as stack:
        few = stack.enter_context(stream.listen(Wanted(verdicts=frozenset({Verdict.REPLACED}))))
        all_ = stack.enter_context(stream.listen(Wanted(are_stray_accepts=True)))
        for judged in (accepted, REPLACED, accepted):
            stream.server.offer(judged)
        stream.step()
        assert [type(each) for each in read(few)] == [JudgedConnection, SeenAccept]
        assert [type(each) for each in read(all_)] == [SeenAccept, JudgedConnection, SeenAccept]


def test_what_is_remembered_is_bounded(stream, monkeypatch):
    """However many filters there are, together they remember a bounded number of connections."""
    monkeypatch.setattr(audience, "_REMEMBERED_ALL", 40)
    monkeypatch.setattr(audience, "_REMEMBERED_EACH", 2)
    with ExitStack() as stack:
        verdicts = list(Verdict)[:4]
        for verdict in verdicts:
            wanted = Wanted(verdicts=frozenset({verdict, REPLACED.verdict}))
            stack.enter_context(stream.listen(wanted))
        for port in range(1, 60):
            reply = flow(samples.BACKEND, 8080, samples.NODE, port)
            stream.server.offer(samples.judged(samples.SENT, reply))
        remembered = [len(each._shown) for each, _ in stream.server._audience._by_wanted.values()]
    assert remembered == [10] * 4


def test_losses_are_those_since_the_client_came(stream):
    """The summary tells what was lost meanwhile, and what cannot be seen."""
    with closing(stream.listen()) as client:
        stream.server.offer(REPLACED)
        stream.losses = {"ring_full": 12, "untracked": 3}
        stream.step()
        summary = ended(stream, client)
    assert (summary.connections, summary.drops) == (1, 0)
    assert summary.lost == {"ring_full": 7, "queue_full": 0}
    assert summary.not_seen == (
        "the moon",
        "1 packets that conntrack was told not to track (NOTRACK)",
    )


def test_what_happened_before_the_hang_up_still_comes(stream):
    """Including what the agent reads only after the request; the summary comes after it."""
    with closing(stream.listen()) as client:
        client.hang_up()
        stream.step()
        assert stream.server.is_ending
        stream.server.offer(REPLACED)
        stream.step()
        (judged,) = client.judge(client.read(5))
        assert judged.verdict is REPLACED.verdict
        assert client.read(5) is None
        assert client.summary().connections == 1
    assert not stream.server.is_ending


def test_a_client_that_does_not_read(stream):
    """It loses what does not fit, is told how much, and no other client loses anything."""
    idle, busy = stream.listen(), stream.listen()
    made = seen = 0
    with closing(idle), closing(busy):
        for _ in range(20):
            for _ in range(50):
                stream.server.offer(REPLACED)
                made += 1
            stream.step()
            seen += len(read(busy))
        while batch := read(busy):
            seen += len(batch)
            stream.step()
        assert seen == made
        queued = sum(client.queued for client in stream.server._clients)
        assert queued <= QUEUE_BYTES
        summary = ended(stream, idle)
        assert summary.lost["queue_full"] > 0
        assert summary.connections + summary.lost["queue_full"] == made
        assert stream.server.lost == summary.lost["queue_full"]


def test_a_batch_that_is_longer_than_a_queue(stream):
    """A client that reads meanwhile loses nothing; one that does not loses what does not fit."""
    reader, idle = stream.listen(), stream.listen()
    with closing(reader), closing(idle):
        taken = 0
        for _ in range(200):
            for _ in range(20):
                stream.server.offer(REPLACED)
            # The agent is in the middle of a batch, and does nothing else.
            while lines := reader.read(0):
                taken += sum(1 for _ in reader.judge(lines))
        by_lost = sorted(stream.server._clients, key=lambda each: each.lost)
        assert [each.lost > 0 for each in by_lost] == [False, True]
        stream.step()
        while batch := read(reader):
            taken += len(batch)
            stream.step()
        assert taken == 4000


def test_a_last_line_that_waits(stream):
    """A client that does not read yet gets no second hello and no second summary."""
    with stream.raw(request_line(Wanted())) as sock:
        for _ in range(2000):
            stream.server.offer(REPLACED)
        stream.step()
        sock.shutdown(socket.SHUT_WR)
        for _ in range(5):
            stream.step()
        assert stream.server.flows is None
        said = b""
        while b'"kind": "summary"' not in said:
            said += sock.recv(1 << 16)
            stream.step()
        said += b"".join(iter(lambda: sock.recv(1 << 16), b""))
    kinds = [json.loads(line)["kind"] for line in said.splitlines()]
    assert (kinds[0], kinds[-1]) == ("hello", "summary")
    assert set(kinds[1:-1]) == {"connection"}
    assert stream.server.clients == 0


def test_a_client_that_is_stuck_is_let_go(stream):
    """After a minute without reading a line, and not before; one with nothing to read stays."""
    stuck, idle = stream.listen(), stream.listen(Wanted(verdicts=frozenset({Verdict.UNKNOWN})))
    with closing(stuck), closing(idle):
        for _ in range(2000):
            stream.server.offer(REPLACED)
        stream.step()
        stream.now_s = 59.0
        stream.step()
        assert stream.server.clients == 2
        stream.now_s = 61.0
        stream.step()
        assert stream.server.clients == 1
        lost = stream.server.lost
        assert lost > 0
        with pytest.raises(StreamError, match="closed the stream: it ended, or this client"):
            read_all(stuck)
        stream.step()
        assert stream.server.lost == lost


def test_two_hundred_clients(stream):
    """All are served, with queues in bounded memory although none reads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        clients = [stack.enter_context(stream.listen()) for _ in range(200)]
        stream.server.offer(REPLACED)
        stream.step()
        assert [len(read(client)) for client in clients] == [1] * 200
        for _ in range(300):
            stream.server.offer(REPLACED)
        stream.step()
        queued = [client.queued for client in stream.server._clients]
        assert sum(queued) <= QUEUES_BYTES
        for client in clients:
            summary = ended(stream, client)
            assert summary.connections + summary.lost["queue_full"] == 301


def test_one_too_many(stream, monkeypatch):
    """It is told in one line; the others go on."""
    monkeypatch.setattr(servers, "MAX_CLIENTS", 2)
    with ExitStack() as stack:
        first = stack.enter_context(stream.listen())
        stack.enter_context(stream.listen())
        with pytest.raises(StreamError, match="refuses: 2 clients are connected already"):
            stack.enter_context(stream.listen())
        stream.server.offer(REPLACED)
        stream.step()
        assert len(read(first)) == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a line is not JSON"),
        (b"[]\n", "a line is not a JSON object"),
        (b"{}\n", "expected a request"),
        (b"x" * 20000, "a request may have at most 16384 bytes"),
        (request_line(Wanted()) + b"again\n", "after its request a client"),
        (b"[" * 16000 + b"\n", "a line is not JSON"),
    ],
)
def test_malformed_requests(stream, said, why):
    """They get one line back, and the end."""
    with stream.raw(said) as sock:
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    told = json.loads(answer)
    assert answer.count(b"\n") == 1
    assert told["kind"] == "error"
    assert why in told["message"]
    assert stream.server.clients == 0


def test_asking_twice(stream):
    """The same if it comes later."""
    with stream.raw(request_line(Wanted()), b"again\n") as sock:
        hello, error, rest = sock.recv(4096).split(b"\n")
    assert json.loads(hello) == {
        "kind": "hello", "version": 1, "agent": "1.2", "nodes": ["node1"],
    }  # fmt: skip
    assert json.loads(error)["message"].startswith("after its request a client")
    assert rest == b""


def test_who_never_asks(stream):
    """It is disconnected after ten seconds."""
    with stream.raw(b'{"kind"') as sock:
        stream.now_s = 9.0
        stream.step()
        assert stream.server.clients == 1
        stream.now_s = 11.0
        stream.step()
        assert stream.server.clients == 0
        assert sock.recv(10) == b""


def test_who_goes_away_in_any_state(stream):
    """Closing at any time takes nothing with it."""
    for lines in ((), (b"{",), (request_line(Wanted()),)):
        stream.raw(*lines).close()
        stream.server.offer(REPLACED)
        stream.step()
        stream.step()
        assert stream.server.clients == 0
    gone, waiting = stream.listen(), stream.raw(request_line(Wanted()))
    gone.close()
    with closing(waiting):
        for _ in range(500):
            stream.server.offer(REPLACED)
        stream.step()
        assert stream.server.clients == 1


def test_it_wakes_its_agent(stream):
    """Its descriptor can be read when a client comes or asks, and not otherwise."""

    def is_awake():
        return bool(select.select([stream.server.fileno()], [], [], 0)[0])

    assert not is_awake()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(stream.path))
        assert is_awake()
        stream.step()
        assert not is_awake()
        sock.sendall(request_line(Wanted()))
        assert is_awake()
        stream.step()
        assert not is_awake()
        sock.shutdown(socket.SHUT_WR)
        assert is_awake()
        stream.step()
        stream.step()
        assert not is_awake()


def test_the_end_of_the_agent(stream):
    """Clients get their summary when it ends in order."""
    with closing(stream.listen()) as client:
        stream.server.offer(REPLACED)
        stream.close()
        (judged,) = client.judge(client.read(1))
        assert judged.verdict is REPLACED.verdict
        assert client.read(1) is None
        assert client.summary().connections == 1
        assert not stream.path.exists()
        stream.server = StreamServer(stream.path)
