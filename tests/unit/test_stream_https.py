"""The live stream over TLS: who gets it, that it is the same, and that no client blocks it."""

import json
import socket
import ssl
import threading
import time
from contextlib import ExitStack, closing, suppress
from types import SimpleNamespace

import pytest

from exporters import page_server
from exporters.jsonl import to_line
from exporters.page_server import PageServer
from exporters.prometheus import Page
from tests.unit import samples
from tests.unit.patience import PATIENCE_S
from tests.unit.streaming import ASKING, KeyUpdates, Streaming, gate, to_the_end
from tests.unit.test_page_server import Issued
from tracer import channel
from tracer.commands import serve
from tracer.judge.verdict import Verdict
from tracer.pipeline import Wanted
from tracer.stream import server as servers
from tracer.stream import upgrade
from tracer.stream.client import AgentStream
from tracer.stream.clients import QUEUE_BYTES, QUEUES_BYTES
from tracer.stream.errors import StreamError
from tracer.stream.protocol import end_line, request_line
from tracer.stream.upgrade import HttpsAgent

REPLACED = samples.judged(*samples.REPLACED)
PRESERVED = samples.judged(*samples.PRESERVED)
ALL = request_line(Wanted())
# Not to be taken for a broken pipe of the test itself.
GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
    b"x" * 40_000,
    b"[" * 16_000 + b"\n",
    ALL + b"again\n",
    ALL + ALL,
]


@pytest.fixture
def streaming(tmp_path):
    with closing(Streaming(tmp_path)) as streaming:
        yield streaming


@pytest.fixture(params=["unix", "https"])
def where(request, streaming):
    """Both ways to an agent: the same goes over each."""
    return streaming.path if request.param == "unix" else streaming.agent()


def taken(client):
    """Everything until the summary."""
    found = []
    while (lines := client.read(0.05)) is not None:
        found += client.judge(lines)
    return found


# The same over both


def test_everyone_gets_what_he_wants(streaming, where):
    """By its own filter, in order, and with a summary when it has seen enough."""
    with ExitStack() as stack:
        all_ = stack.enter_context(streaming.listen(where, Wanted()))
        few = stack.enter_context(
            streaming.listen(where, Wanted(verdicts=frozenset({Verdict.PRESERVED})))
        )
        assert all_.nodes == ("node1",)
        streaming.offer(REPLACED, PRESERVED, REPLACED)
        for client, expected in ((all_, [REPLACED, PRESERVED, REPLACED]), (few, [PRESERVED])):
            client.hang_up()
            assert list(map(to_line, taken(client))) == list(map(to_line, expected))
            assert client.summary().connections == len(expected)
            assert client.summary().not_seen == ("the moon",)
    streaming.wait(lambda: streaming.server.clients == 0)


def test_a_client_that_does_not_read(streaming, where):
    """It loses what finds no room, and is told how much; the agent keeps no more than that."""
    with closing(streaming.listen(where, Wanted())) as client:
        made = 4000
        for _ in range(made // 100):
            streaming.offer(*[REPLACED] * 100)
        (listener,) = streaming.server._clients
        assert listener.queued <= QUEUE_BYTES
        client.hang_up()
        assert len(taken(client)) == client.summary().connections
        lost = client.summary().lost["queue_full"]
        assert lost > 0
        assert client.summary().connections + lost == made
        assert streaming.server.lost == lost


def test_the_word_for_the_end(streaming, where):
    """A client may say that it has heard enough on either way; half a connection says it, too."""
    with closing(AgentStream(where, Wanted())) as client:
        client.wait(PATIENCE_S)
        client._say(end_line())
        taken(client)
        assert client.summary().connections == 0
    streaming.wait(lambda: streaming.server.clients == 0)


def test_the_end_of_the_agent(streaming, where):
    """Clients get their summary when it ends in order."""
    with closing(streaming.listen(where, Wanted())) as client:
        streaming.offer(REPLACED)
        with streaming.lock:
            for each in list(streaming.server._clients):
                each.is_ending = True
        assert len(taken(client)) == 1


def test_a_client_that_is_killed(streaming, where):
    """Its place is free at once, and other clients miss nothing."""
    with closing(streaming.listen(streaming.agent(), Wanted())) as other:
        killed = streaming.listen(where, Wanted())
        sock = killed._channel.socket
        if sock.family != socket.AF_UNIX:
            # As a process that ends with unread lines: a reset, and no goodbye.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        streaming.offer(REPLACED)
        sock.close()
        streaming.wait(lambda: streaming.server.clients == 1)
        streaming.offer(PRESERVED)
        other.hang_up()
        assert len(taken(other)) == 2


@pytest.mark.parametrize("said", GARBAGE, ids=lambda said: ascii(said[:12]))
def test_garbage_after_the_upgrade(streaming, said):
    """It gets an error for its last line, or the end; the next client is served."""
    sock, rest = streaming.raw()
    with closing(sock):
        with suppress(OSError):
            sock.sendall(said)
            if not said.endswith(b"\n"):
                sock.sendall(b"\n")
        lines = to_the_end(sock, rest).splitlines()
    assert json.loads(lines[-1])["kind"] == "error"
    streaming.wait(lambda: streaming.server.clients == 0)
    streaming.listen(streaming.agent(), Wanted()).close()


def test_a_request_that_comes_with_the_upgrade(streaming):
    """Data behind the request head, sent before the answer, is still read."""
    sock, rest = streaming.raw(behind=ALL + end_line())
    with closing(sock):
        kinds = [json.loads(line)["kind"] for line in to_the_end(sock, rest).splitlines()]
    assert kinds == ["hello", "summary"]


def test_many_clients_at_once(streaming):
    """More of either kind than there are threads; all get what fits, in bounded memory."""
    ends = [streaming.agent(), streaming.path] * 40
    clients, trouble = [], []

    def come(end):
        try:
            clients.append(streaming.listen(end, Wanted()))
        except StreamError as error:
            trouble.append(error)

    threads = [threading.Thread(target=come, args=[end]) for end in ends]
    with ExitStack() as stack:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            stack.enter_context(client)
        assert (trouble, len(clients)) == ([], len(ends))
        for _ in range(300):
            streaming.offer(REPLACED)
        with streaming.lock:
            queued = sum(each.queued for each in streaming.server._clients)
        assert queued <= QUEUES_BYTES
        for client in clients:
            client.hang_up()
            taken(client)
            summary = client.summary()
            assert summary.connections + summary.lost["queue_full"] == 300


# Who may


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("bad", r"refuses: a bearer token is required \(401\); name a file .* by --token-file"),
        ("other", r"refuses: 'somebody' may not get /stream \(403\); bind that account"),
    ],
)
def test_who_may_not(streaming, token, why):
    """One line says why, and what to do; it does not become a client of the stream."""
    with pytest.raises(StreamError, match=why):
        AgentStream(streaming.agent(token=token), Wanted())
    assert streaming.server.clients == 0


@pytest.mark.parametrize(
    ("headers", "version", "status"),
    [
        (ASKING[:2], "1.1", 401),
        (ASKING[2:], "1.1", 426),
        ((ASKING[0], "Upgrade: websocket", ASKING[2]), "1.1", 426),
        ((*ASKING[1:], "Connection: close"), "1.1", 426),
        ((*ASKING, "Content-Length: 5"), "1.1", 400),
        ((*ASKING, "Transfer-Encoding: chunked"), "1.1", 400),
        ((*ASKING, "Authorization: Bearer other"), "1.1", 400),
        (ASKING, "1.0", 400),
    ],
)
def test_what_is_no_upgrade(streaming, headers, version, status):
    """It is refused by name, and is no client of the stream."""
    with closing(streaming.asked(*headers, version=version)) as sock:
        answer = to_the_end(sock).decode()
    assert answer.split()[1] == str(status)
    assert ("Upgrade: srcip-stream/1" in answer.partition("\r\n\r\n")[0]) is (status == 426)
    assert streaming.server.clients == 0


@pytest.mark.parametrize("lack", ["certificate", "gate", "streams"])
def test_never_without(streaming, lack):
    """Without TLS, without a check of tokens, or unasked there is no stream on the port."""
    options = {"certificate": streaming.pages._server._certificate, "gate": gate}
    streams = None if lack == "streams" else streaming.server
    server = PageServer(Page("1"), "127.0.0.1", 0, **{k: options[k] for k in options if k != lack})
    server.start(streams)
    with closing(server):
        if lack == "certificate":
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
                sock.sendall("\r\n".join(("GET /stream HTTP/1.1", *ASKING, "", "")).encode())
                assert to_the_end(sock).startswith(b"HTTP/1.0 404 ")
        else:
            with pytest.raises(StreamError, match="--stream-https"):
                AgentStream(streaming.agent(port=server.port), Wanted())


def test_one_too_many(streaming, monkeypatch):
    """It is refused before the connection becomes a stream; the others go on."""
    monkeypatch.setattr(servers, "MAX_CLIENTS", 1)
    with closing(streaming.listen(streaming.path, Wanted())) as first:
        with pytest.raises(StreamError, match=r"maximum number of clients .* \(503\)"):
            AgentStream(streaming.agent(), Wanted())
        streaming.offer(REPLACED)
        first.hang_up()
        assert len(taken(first)) == 1


# The certificate


def test_a_renewed_certificate(streaming):
    """Streams that run go on; the next ones are served with the new one."""
    with closing(streaming.listen(streaming.agent(), Wanted())) as before:
        streaming.issued.issue()
        with pytest.raises(StreamError, match="its certificate is not accepted"):
            AgentStream(streaming.agent(), Wanted())
        streaming.trust(streaming.issued)
        with closing(streaming.listen(streaming.agent(), Wanted())) as after:
            streaming.offer(REPLACED)
            for client in (before, after):
                client.hang_up()
                assert len(taken(client)) == 1


def test_what_the_certificate_is_of(streaming):
    """A certificate for another host is refused, unless that name is given; then only it counts."""
    with pytest.raises(StreamError, match=r"not accepted: .*[Hh]ostname mismatch"):
        AgentStream(streaming.agent(server_name="agent.example"), Wanted())
    with pytest.raises(StreamError, match=r"not accepted: .*mismatch.*--tls-server-name"):
        AgentStream(streaming.agent(host="localhost"), Wanted())
    for name in (".example", "x" * 300, "a..b"):
        with pytest.raises(StreamError, match="cannot reach the agent at https://127"):
            AgentStream(streaming.agent(server_name=name), Wanted())
    agent = streaming.agent(host="localhost", server_name="127.0.0.1")
    streaming.listen(agent, Wanted()).close()


def test_authorities_that_are_none(streaming, tmp_path):
    """A file that is not there, and one that holds no certificate, are one line."""
    for name, why in (("none", "No such file"), ("empty", "")):
        path = tmp_path / name
        if name == "empty":
            path.write_text("")
        with pytest.raises(
            StreamError, match=f"cannot use the certificate authorities in {path}: .*{why}"
        ):
            AgentStream(streaming.agent(ca_file=path), Wanted())


# What is no agent


def answering(tmp_path, answer, *, is_secure=True):
    """A port where something else answers, once; and an agent that is looked for there."""
    issued = Issued(tmp_path)
    ca_file = tmp_path / "ca.crt"
    ca_file.write_bytes(issued.authority.cert_pem.bytes())
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.cert, issued.key)

    def serve():
        with suppress(OSError), listener:
            sock, _ = listener.accept()
            with context.wrap_socket(sock, server_side=True) if is_secure else sock as peer:
                peer.recv(4096)
                if answer is None:
                    peer.recv(4096)
                else:
                    peer.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    port = listener.getsockname()[1]
    return thread, HttpsAgent(host="127.0.0.1", port=port, token="x", ca_file=ca_file)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "not a srcip agent \\(it closed the connection\\)"),
        (b"SSH-2.0-OpenSSH\r\n", "not a srcip agent \\(b'SSH-2.0-OpenSSH"),
        (
            b"HTTP/1.1 401 Unauthorized\r\nServer: nginx\r\n\r\n",
            r"not a srcip agent \(HTTP status 401\)",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nserver: srcip \r\n", r"not a srcip agent \(HTTP status 200\)"),
        (
            b"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\n\r\n",
            r"not a srcip agent \(HTTP status 101\)",
        ),
        (b"HTTP/1.0 503 x\r\nServer: srcip \r\n\r\n", r"refuses: it does not say why \(503\)"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 5000, "the head of its answer does not end"),
    ],
)
def test_what_is_no_agent(tmp_path, answer, why):
    """It is told from an agent that refuses, in one line."""
    thread, agent = answering(tmp_path, answer)
    with pytest.raises(StreamError, match=why) as raised:
        AgentStream(agent, Wanted())
    thread.join()
    assert "\n" not in str(raised.value)


def test_what_speaks_no_tls(tmp_path):
    """A port of plain HTTP."""
    thread, agent = answering(tmp_path, b"HTTP/1.0 400 Bad request\r\n\r\n", is_secure=False)
    with pytest.raises(StreamError, match="TLS failed, perhaps something else listens there: "):
        AgentStream(agent, Wanted())
    thread.join()


def test_what_does_not_answer(tmp_path, monkeypatch):
    """A time-out, in the handshake and after it."""
    monkeypatch.setattr(upgrade, "PATIENCE_S", 0.2)
    thread, agent = answering(tmp_path, None)
    with pytest.raises(StreamError, match=r"no answer within 0\.2 s"):
        AgentStream(agent, Wanted())
    thread.join()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        agent = HttpsAgent(host="127.0.0.1", port=silent.getsockname()[1], token="x")
        for patience_s, said in ((None, "0.2"), (0.1, "0.1"), (5, "0.2")):
            with pytest.raises(StreamError, match=rf"no answer within {said} s"):
                AgentStream(agent, Wanted(), patience_s=patience_s)
    with pytest.raises(StreamError, match="Connection refused; does 'srcip serve --stream-https'"):
        AgentStream(agent, Wanted())


def test_what_an_agent_says_is_not_believed(streaming):
    """A summary of another form is an error of the stream, not a traceback."""
    for told in ('"lost": {"a": "b"}', '"lost": 5', '"lost": [1]', '"not_seen": 5'):
        with closing(streaming.listen(streaming.path, Wanted())) as client:
            (listener,) = streaming.server._clients
            with streaming.lock:
                streaming.server._tell_last(listener, f'{{"kind": "summary", {told}}}\n'.encode())
            taken(client)
            with pytest.raises(StreamError, match="summary is malformed"):
                client.summary()
        streaming.wait(lambda: streaming.server.clients == 0)


def test_an_error_in_the_middle(streaming):
    """What the agent says last is what the client says."""
    with closing(streaming.listen(streaming.agent(), Wanted())) as client:
        with streaming.lock:
            (listener,) = streaming.server._clients
            streaming.server._refuse(listener, "enough of you")
        with pytest.raises(StreamError, match="ends the stream: enough of you"):
            taken(client)


# Who cannot hold it up


def test_handshakes_that_never_end(streaming):
    """Clients that connect and send nothing, or half a handshake, block no one."""
    with ExitStack() as stack:
        address = ("127.0.0.1", streaming.pages.port)
        for i in range(40):
            idle = stack.enter_context(closing(socket.create_connection(address)))
            idle.sendall(b"\x16\x03\x01\x02\x00\x01"[: i % 7])
        with closing(streaming.listen(streaming.agent(), Wanted())) as client:
            streaming.offer(REPLACED)
            client.hang_up()
            assert len(taken(client)) == 1


def test_a_client_that_trickles(streaming, monkeypatch):
    """A byte now and then does not extend the time limit of a request."""
    passed_s = 0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s, sleep=time.sleep)
    for module in (page_server, channel):
        monkeypatch.setattr(module, "time", clock)
    said = b"GET /stream HTTP/1.1\r\n" + b"x: y\r\n" * 1000
    is_over, at = False, 0
    with closing(streaming.secured()) as sock:
        sock.settimeout(0.01)
        while not is_over:
            # Each byte comes long before the time is up; the server looks at its clock after each.
            passed_s += page_server._PATIENCE_S / 100
            try:
                sock.sendall(said[at : at + 1])
                is_over = sock.recv(1) == b""
            except TimeoutError:
                at += 1
            except OSError:
                is_over = True
    assert 0 < at < len(said)


def test_keys_renewed_without_end(streaming):
    """A client that keeps renewing keys without data is disconnected; the agent's loop goes on."""
    with closing(KeyUpdates(streaming.pages.port)) as client:
        client.say("\r\n".join(("GET /stream HTTP/1.1", *ASKING, "", "")).encode())
        assert b"101" in client.hear()
        client.say(ALL)
        streaming.wait(lambda: streaming.server.clients == 1)
        for _ in range(5):
            assert client.renew()
        before = streaming.steps
        while client.renew():
            assert streaming.server.clients <= 1
        streaming.wait(lambda: streaming.steps > before and streaming.server.clients == 0)
    streaming.listen(streaming.agent(), Wanted()).close()


def test_a_machine_that_is_gone(streaming):
    """TCP keepalive frees a dead client's place, and lets a client notice a dead agent."""
    with closing(streaming.listen(streaming.agent(), Wanted())) as client:
        (listener,) = streaming.server._clients
        for sock in (listener.channel.socket, client._channel.socket):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            each_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            assert idle_s + each_s * sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 90


def test_without_a_socket(tmp_path, monkeypatch, capsys):
    """Where the default socket cannot be made, the port is the only way, and one line says so."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(serve, "DEFAULT_SOCKET", f"{tmp_path}/file/agent.sock")
    assert serve._stream(None, None, is_https=False) is None
    assert capsys.readouterr().err.endswith("; there is no live stream\n")
    server = serve._stream(None, None, is_https=True)
    told = capsys.readouterr().err
    assert told.endswith("; the live stream is on the port only\n")
    assert told.count("\n") == 1
    mine, other = socket.socketpair()
    origin = servers.Origin(version="1", nodes=(), losses=dict, not_seen=tuple)
    with closing(other):
        other.settimeout(PATIENCE_S)
        server.take_over(servers.ClearChannel(mine, chunk=100), ALL, lambda: None)
        server.poll()
        server.attach(origin)
        assert json.loads(other.recv(1000))["kind"] == "hello"
        server.close(origin)


def test_the_door_is_closed(tmp_path):
    """A connection that comes while the agent ends is closed, not forgotten."""
    streaming = Streaming(tmp_path)
    sock, _ = streaming.raw()
    with closing(sock):
        streaming.close()
        assert to_the_end(sock) == b"" or b"summary" not in to_the_end(sock)
    mine, other = socket.socketpair()
    with closing(other):
        streaming.server.take_over(servers.ClearChannel(mine, chunk=1), b"", lambda: None)
        assert mine.fileno() == -1
