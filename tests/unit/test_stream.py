"""The live stream: what clients ask, what they get, and what happens to those that do not read."""

import json
import os
import resource
import select
import socket
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.jsonl import to_line
from tests.unit import samples
from tests.unit.patience import PATIENCE_S
from tests.unit.samples import flow
from tests.unit.test_judge_properties import connections, views
from tracer.filter import Filter
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.verdict import JudgedConnection, SeenAccept, Verdict
from tracer.model import PROTOCOLS
from tracer.pipeline import Selection, Wanted
from tracer.stream import audience, unix_socket, upgrade
from tracer.stream import server as servers
from tracer.stream.client import AgentStream
from tracer.stream.clients import QUEUE_BYTES, QUEUES_BYTES
from tracer.stream.errors import StreamError
from tracer.stream.lines import judged_of
from tracer.stream.protocol import parse_end, parse_object, parse_request, request_line
from tracer.stream.server import Origin, StreamServer

REPLACED = samples.judged(*samples.REPLACED)
PRESERVED = samples.judged(*samples.PRESERVED)

networks = st.one_of(
    st.none(),
    st.builds(
        lambda address, length: ip_network((address, length), strict=False),
        st.ip_addresses(v=4),
        st.integers(0, 32),
    ),
    st.builds(
        lambda address, length: ip_network((address, length), strict=False),
        st.ip_addresses(v=6),
        st.integers(0, 128),
    ),
)
filters = st.builds(
    Filter,
    client=networks,
    backend=networks,
    port=st.none() | st.integers(1, 65535),
    proto=st.none() | st.sampled_from(sorted(PROTOCOLS.values())),
)
wishes = st.builds(
    Wanted,
    flows=filters,
    verdicts=st.frozensets(st.sampled_from(Verdict)),
    causes=st.frozensets(st.sampled_from(Cause)),
    services=st.frozensets(st.just(("default", "web"))),
    are_stray_accepts=st.booleans(),
)


def reason(read, said):
    """Why something is refused; empty if it is not. Anything but a StreamError is a bug."""
    try:
        read(said)
    except StreamError as error:
        return str(error)
    return ""


# What is said


@given(wishes)
def test_a_request_is_read_as_it_was_meant(wanted):
    """Every filter of the command line crosses the socket."""
    assert parse_request(request_line(wanted)) == wanted


@given(st.binary(max_size=200), st.sampled_from([parse_request, parse_end]))
def test_any_bytes_are_a_request_or_an_error(line, parse):
    """No line causes anything but a StreamError."""
    assert reason(parse, line).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("client", "backend", "port", "proto", "verdicts", "causes", "services", "stray_accepts")


@given(st.dictionaries(st.sampled_from(KEYS), json_values))
def test_any_filter_is_understood_or_refused(told):
    """The same with values of any kind under the right keys."""
    line = json.dumps({"kind": "request", "version": 1, "filter": told}).encode()
    assert reason(parse_request, line).isprintable()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"kind": "hello"}, "expected a request, not kind 'hello'"),
        ({"kind": "request", "version": 2}, "speaks version 1 of the stream, not 2"),
        ({"kind": "request", "version": 1, "filter": []}, "filter is not an object"),
        ({"kind": "request", "version": 1, "filter": {"node": 1}}, "no filter 'node'"),
        ({"kind": "request", "version": 1, "filter": {"client": "x"}}, "client 'x' is neither"),
        ({"kind": "request", "version": 1, "filter": {"client": 1}}, "client 1 is neither"),
        ({"kind": "request", "version": 1, "filter": {"port": True}}, "port True is not"),
        ({"kind": "request", "version": 1, "filter": {"port": 65536}}, "port 65536 is not"),
        ({"kind": "request", "version": 1, "filter": {"proto": "gre"}}, "proto 'gre' is not one"),
        ({"kind": "request", "version": 1, "filter": {"causes": ["y"]}}, "agent does not know 'y'"),
        ({"kind": "request", "version": 1, "filter": {"services": ["a"]}}, "is not NAMESPACE/NAME"),
        (
            {"kind": "request", "version": 1, "filter": {"verdicts": "unknown"}},
            "not a list of strings",
        ),
        (
            {"kind": "request", "version": 1, "filter": {"services": ["a/b"] * 999}},
            "at most 256 are",
        ),
    ],
)
def test_refusals(told, why):
    """Errors are named; an unknown filter is never dropped silently."""
    with pytest.raises(StreamError, match=why):
        parse_request(json.dumps(told).encode())


# What is shown


def told_again(judged):
    line = to_line(judged)
    assert to_line(judged_of(parse_object(line))) == line


@given(connections, views())
def test_connections_read_back(connection, node_view):
    """A line read and written again is the same line, for any connection."""
    # A translation never changes the protocol.
    reply = replace(connection.reply, proto=connection.orig.proto)
    connection = replace(connection, reply=reply)
    told_again(judge_connection(connection, node_view, time_ns=1_700_000_000_123_456_789))


def test_drops_and_accepts_read_back():
    """The same for drops, with all and with nothing known, and for accepts."""
    told_again(samples.explained())
    told_again(samples.explained(backend_pod=None, rule=None, service=None, cause=None))
    told_again(samples.explained_drop(rule=samples.RULE))
    told_again(samples.explained_drop(samples.drop(packet=None, orig=None), hook=None))
    told_again(samples.judged_drop(samples.drop(orig=None, is_reply=True)))
    ping = replace(samples.PING, dport=0x0300)
    told_again(samples.explained_drop(samples.drop(packet=ping, orig=flow("a::1", 1, "a::2", 2))))
    told_again(SeenAccept(accept=samples.accept(), time_ns=samples.KTIME_NS))


@given(
    st.dictionaries(st.text(max_size=9), json_values) | json_values,
    st.sampled_from(["connection", "drop", "accept", "hop", ""]),
)
def test_any_line_is_understood_or_refused(told, kind):
    """A program that is not an agent can end a client only by a StreamError."""
    whole = json.loads(to_line(samples.explained()))
    broken = whole | (told if isinstance(told, dict) else {"orig": told}) | {"kind": kind}
    assert "\n" not in reason(judged_of, broken)


# Filters


@given(filters, filters, connections)
def test_a_covering_filter_wants_what_either_wants(one, other, connection):
    """No client misses anything because of another one, in whichever order they came."""
    both = one.covering(other)
    assert both == other.covering(one)
    assert both.covering(one) == both
    if one.matches(connection) or other.matches(connection):
        assert both.matches(connection)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("10.0.0.0/24", "10.0.1.0/24", "10.0.0.0/23"),
        ("10.0.0.0/8", "10.1.2.3/32", "10.0.0.0/8"),
        ("10.0.0.0/8", "192.0.2.0/24", "0.0.0.0/0"),
        ("2001:db8::/64", "2001:db8:0:1::/64", "2001:db8::/63"),
        ("10.0.0.0/8", "2001:db8::/64", None),
    ],
)
def test_it_is_the_narrowest(one, other, both):
    """The longest prefix that holds both."""
    filters = (Filter(client=ip_network(one)), Filter(client=ip_network(other)))
    assert filters[0].covering(filters[1]).client == (both and ip_network(both))
    assert Filter(port=80).covering(Filter(port=80)).port == 80
    assert Filter(port=80).covering(Filter(port=81)).is_empty


# The server and its clients


class Stream:
    """A server, with the agent's part played by a test."""

    def __init__(self, path):
        self.path = path
        self.now_s = 0.0
        self.losses = {"ring_full": 5, "untracked": 2}
        self.server = StreamServer(path, clock_s=lambda: self.now_s)
        self.origin = Origin(
            version="1.2",
            nodes=("node1",),
            losses=lambda: dict(self.losses),
            not_seen=lambda: ("the moon",),
        )

    def step(self):
        self.server.flush()
        self.server.end(self.origin)
        self.server.poll()
        self.server.attach(self.origin)

    def listen(self, wanted=None):
        with ExitStack() as stack:
            client = stack.enter_context(AgentStream(self.path, wanted or Wanted()))
            self.step()
            self.step()
            client.wait(PATIENCE_S)
            stack.pop_all()
        return client

    def raw(self, *lines):
        """A client that says something by itself."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(self.path))
        self.step()
        for line in lines:
            sock.sendall(line)
            self.step()
        return sock

    def close(self):
        self.server.close(self.origin)


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


# The socket


def test_the_socket_is_for_its_group(tmp_path):
    """Owner and group may connect, others not; from the first moment."""
    gid = os.getgroups()[0] if os.getgroups() else os.getgid()
    path = tmp_path / "agent.sock"
    server = StreamServer(path, gid)
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, gid)
    server._socket.close()


def test_a_socket_that_was_left(tmp_path):
    """A killed agent's socket is replaced by the next agent; a live agent's is not."""
    path = tmp_path / "agent.sock"
    StreamServer(path)._socket.close()
    assert path.exists()
    with closing(Stream(path)) as stream:
        with pytest.raises(StreamError, match="another agent listens on"):
            StreamServer(path)
        stream.listen().close()


@pytest.mark.parametrize("name", ["a/agent.sock", "file/agent.sock", "x" * 200])
def test_a_socket_that_cannot_be_made(tmp_path, name):
    """One line, with what to do; no directory is made for it."""
    (tmp_path / "file").touch()
    with pytest.raises(StreamError, match=r"cannot listen on .*--stream-socket"):
        StreamServer(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_directory_of_the_socket(tmp_path, monkeypatch):
    """That of the default is made; another must be there, and the line says that it is not."""
    default = tmp_path / "run" / "agent.sock"
    monkeypatch.setattr(unix_socket, "DEFAULT_SOCKET", str(default))
    with closing(Stream(default)) as stream:
        stream.listen().close()
        assert stat.S_IMODE(default.parent.stat().st_mode) == 0o755
    with pytest.raises(StreamError, match=f": there is no directory {tmp_path}/nope; choose"):
        StreamServer(tmp_path / "nope" / "agent.sock")


def test_a_file_is_not_removed(tmp_path):
    """A file that is not a socket stays."""
    path = tmp_path / "agent.sock"
    path.write_text("precious")
    with pytest.raises(StreamError, match=": something that is not a socket has that name; choose"):
        StreamServer(path)
    assert path.read_text() == "precious"


def test_no_agent(tmp_path):
    """One line that says what to look for."""
    with pytest.raises(StreamError, match="is 'srcip serve' running on this node"):
        AgentStream(tmp_path / "none", Wanted())


@contextmanager
def hung(path):
    """A socket on which as many wait as may, and nobody is let in."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        yield listener


def test_an_agent_that_hangs(tmp_path, monkeypatch):
    """One line in time where the agent lets nobody in any more, also to who named no time."""
    with hung(tmp_path / "x"):
        with pytest.raises(
            StreamError, match=r"no answer within 0\.2 s; is it overloaded, or does it"
        ):
            AgentStream(tmp_path / "x", Wanted(), patience_s=0.2)
        monkeypatch.setattr(upgrade, "PATIENCE_S", 0.1)
        for patience_s in (None, 60):
            with pytest.raises(
                StreamError, match=r"cannot reach the agent at .*: no answer within 0\.1"
            ):
                AgentStream(tmp_path / "x", Wanted(), patience_s=patience_s)


def test_an_agent_that_is_late(tmp_path):
    """A client gets in as soon as there is room among those who wait."""
    with hung(tmp_path / "x") as listener:

        def let_in():
            listener.accept()[0].close()

        letting_in = threading.Timer(0.1, let_in)
        letting_in.start()
        AgentStream(tmp_path / "x", Wanted()).close()
        letting_in.join()


def test_the_command_does_not_wait_for_long(tmp_path):
    """`trace --agent --timeout` ends in time with one line, wherever the agent hangs."""
    with socket.socket(socket.AF_UNIX) as silent, hung(tmp_path / "x"):
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        for name, why in (
            ("x", "no answer within 0.5 s"),
            ("silent", "did not start counting within 0.5 s"),
        ):
            agent = ["--agent", str(tmp_path / name)]
            done = subprocess.run(
                [sys.executable, "-m", "tracer.cli", "trace", "--timeout", "0.5", *agent],
                capture_output=True, text=True, check=False, timeout=PATIENCE_S,
            )  # fmt: skip
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert why in done.stderr


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 400\n", "a line is not JSON"),
        (b'{"kind": "hello", "version": 9}\n', "not an agent with version 1"),
        (b"x" * (2 << 20), "a line of more than 1048576 bytes"),
        (b"", "closed the stream"),
    ],
)
def test_no_real_agent(tmp_path, answer, why):
    """What is no agent is found out, in one line."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x"))
        listener.listen()
        with closing(AgentStream(tmp_path / "x", Wanted())) as client:
            peer, _ = listener.accept()
            told = threading.Thread(target=tell, args=(peer, answer))
            told.start()
            with pytest.raises(StreamError, match=why):
                client.wait(PATIENCE_S)
        told.join()


def tell(peer, answer):
    with closing(peer), suppress(OSError):
        peer.sendall(answer)
