"""The live stream: what clients ask, what they get, and what happens to those that do not read."""

import json
import os
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
from tests.unit.streaming import Stream
from tests.unit.test_judge_properties import connections, views
from tracer.filter import Filter
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.verdict import SeenAccept, Verdict
from tracer.model import PROTOCOLS
from tracer.pipeline import Wanted
from tracer.stream import unix_socket, upgrade
from tracer.stream.client import AgentStream
from tracer.stream.errors import StreamError
from tracer.stream.lines import judged_of
from tracer.stream.protocol import parse_end, parse_object, parse_request, request_line
from tracer.stream.server import StreamServer

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
