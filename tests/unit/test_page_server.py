"""HTTPS with a certificate that changes, and the gate before the metrics."""

import select
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPException
from types import SimpleNamespace

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from hypothesis import example, given
from hypothesis import strategies as st

from exporters import page_server, slots
from exporters.certificate import Certificate
from exporters.page_server import PageServer
from exporters.prometheus import Page, Snapshot
from exporters.slots import SLOTS
from tests.unit.patience import PATIENCE_S
from tracer import channel
from tracer.errors import TracerError


class Issued:
    """A certificate of an authority of its own, in the two files that a server reads."""

    def __init__(self, directory):
        self.cert, self.key = directory / "tls.crt", directory / "tls.key"
        self.issue()

    def issue(self):
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("127.0.0.1")
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))


@pytest.fixture
def issued(tmp_path):
    return Issued(tmp_path)


@contextmanager
def serving(**options):
    page = Page("1.2")
    page.snapshot = Snapshot(version="1.2")
    server = PageServer(page, "127.0.0.1", 0, **options)
    server.start()
    with closing(server):
        yield server


def get(server, path, authority=None, **headers):
    """Status, headers and text of an answer."""
    context = None
    if authority is not None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
    scheme = "https" if authority else "http"
    url = f"{scheme}://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - ours
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S, context=context) as answer:  # noqa: S310
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def test_https(issued):
    """Metrics come over TLS, verified by the certificate's authority, and not over plain HTTP."""
    with serving(certificate=Certificate(issued.cert, issued.key)) as server:
        status, _, text = get(server, "/metrics", issued.authority)
        assert status == 200
        assert "srcip_build_info" in text
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(server, "/metrics", trustme.CA())
        with pytest.raises((OSError, urllib.error.URLError)):
            get(server, "/metrics")


def test_a_renewed_certificate(issued):
    """The next connection gets the new certificate; no restart."""
    with serving(certificate=Certificate(issued.cert, issued.key)) as server:
        assert get(server, "/readyz", issued.authority)[0] == 200
        before = issued.authority
        issued.issue()
        assert get(server, "/readyz", issued.authority)[0] == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(server, "/readyz", before)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda issued: issued.key.write_text(""),
        lambda issued: issued.cert.unlink(),
        lambda issued: issued.cert.write_bytes(trustme.CA().cert_pem.bytes()),
    ],
    ids=["empty key", "no certificate", "another's certificate"],
)
def test_a_spoilt_certificate(issued, spoil, tmp_path, caplog):
    """Unusable files are one warning, and the old certificate stays; at the start, an error."""
    kept = Issued(tmp_path)
    with serving(certificate=Certificate(issued.cert, issued.key)) as server:
        authority = kept.authority
        spoil(issued)
        for _ in range(2):
            assert get(server, "/readyz", authority)[0] == 200
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith(f"cannot use the certificate {issued.cert} with")
        with pytest.raises(TracerError, match="cannot use the certificate"):
            Certificate(issued.cert, issued.key)
        issued.issue()
        assert get(server, "/readyz", issued.authority)[0] == 200


def test_a_mounted_secret(tmp_path):
    """A Secret's files change by one symbolic link, as the kubelet does it."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = Issued(tmp_path / "one"), Issued(tmp_path / "two")
    data = tmp_path / "data"
    data.symlink_to("one")
    with serving(certificate=Certificate(data / "tls.crt", data / "tls.key")) as server:
        assert get(server, "/readyz", one.authority)[0] == 200
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(data)
        assert get(server, "/readyz", two.authority)[0] == 200


def test_a_key_with_a_password(issued):
    """An encrypted key is refused in one line, and the terminal is not asked for a password."""
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
    issued.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(TracerError, match="cannot use the certificate"):
        Certificate(issued.cert, issued.key)


def test_who_dawdles_in_the_handshake(issued):
    """Clients that open a connection and send nothing delay no other client."""
    with (
        serving(certificate=Certificate(issued.cert, issued.key)) as server,
        ExitStack() as stack,
    ):
        for _ in range(8):
            address = ("127.0.0.1", server.port)
            stack.enter_context(closing(socket.create_connection(address)))
        assert get(server, "/readyz", issued.authority)[0] == 200


def to_the_end(sock):
    """What comes until the end; nothing if the server closes with our bytes unread."""
    said = b""
    with suppress(ConnectionError):
        while chunk := sock.recv(1 << 16):
            said += chunk
    return said


def test_a_head_without_end():
    """A request has a maximum size, whatever it consists of: 431, or just the end."""
    for said in (b"x" * 200_000, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200_000):
        with serving() as server:
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
                sent = 0
                with suppress(ConnectionError):
                    while sent < len(said):
                        sent += sock.send(said[sent : sent + 1000])
                        if select.select([sock], [], [], 0)[0]:
                            break
                assert b" 200 " not in to_the_end(sock)
            # Data within the kernel's buffers may have been sent.
            assert get(server, "/readyz")[0] == 200


class Said:
    """A channel on which a client has sent something and then closed."""

    def __init__(self, said):
        self.deadline_s = None
        self._chunks = [said[at : at + 7] for at in range(0, len(said), 7)]
        self.told = b""

    def receive(self):
        return self._chunks.pop(0) if self._chunks else b""

    def send(self, data):
        taken = bytes(data[:50])
        self.told += taken
        return len(taken)

    def flush(self):
        pass


class Streams:
    """Room for a stream."""

    url_path, upgrade = "/stream", "srcip-stream/1"

    def has_room(self):
        return True


_PIECES = st.sampled_from(
    b"GET |/metrics|/stream|/healthz|/| HTTP/1.1|HTTP/0.9|\r\n|\n|: |Host: x\r\n|\r\n\r\n| \r\n y|"
    b"Authorization: Bearer yes\r\n|Connection: Upgrade\r\n|Upgrade: srcip-stream/1\r\n|"
    b"Content-Length: 1\r\n|Accept: application/openmetrics-text;version=1.0.0\r\n|\x00|\xff".split(
        b"|"
    )
)


_WHOLE = (
    b"GET /stream HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: srcip-stream/1\r\n"
    b"Authorization: Bearer yes\r\n\r\n{}\n"
)


@example(_WHOLE)
@given(st.lists(_PIECES | st.binary(max_size=9), max_size=30).map(b"".join))
def test_any_bytes_are_answered_or_ended(said):
    """No request causes a traceback, and none becomes a stream without a proper upgrade."""
    page = Page("1.2")
    server = SimpleNamespace(
        page=page,
        streams=Streams(),
        gate=lambda told, path: None if told == "Bearer yes" else (401, "no"),
    )
    channel = Said(said)
    try:
        handler = page_server._Handler(channel, None, server)
    except HTTPException:
        return
    has_left = handler.ask_again is not None
    assert has_left or said != _WHOLE
    if has_left:
        assert handler.ask_again() is None
        assert channel.told.startswith(b"HTTP/1.1 101 ")
        wanted = (b"Bearer yes", b"Upgrade", b"srcip-stream/1", b"/stream", b"HTTP/1.1")
        assert all(each in said for each in wanted)
        assert said.endswith(handler.unread + b"".join(channel._chunks))
    elif b"srcip_build_info" in channel.told:
        assert b"Bearer yes" in said


def test_what_is_said_behind_a_request():
    """It is no second request: the connection ends with the first answer."""
    with serving() as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n")
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = to_the_end(sock)
    assert answer.count(b"HTTP/1.0 ") <= 1
    assert b"srcip_build_info" not in answer


def test_a_gate_that_takes_its_time(monkeypatch):
    """The time that the API server takes does not count against the client."""
    passed_s = 0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s, sleep=time.sleep)
    for module in (page_server, channel):
        monkeypatch.setattr(module, "time", clock)

    def slow_gate(*_):
        nonlocal passed_s
        passed_s += 2 * page_server._PATIENCE_S

    with serving(gate=slow_gate) as server:
        assert get(server, "/metrics")[0] == 200


def test_two_tokens():
    """Two Authorization headers are refused: a proxy may have checked the other one."""
    with (
        serving(gate=lambda *_: None) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.sendall(b"GET /metrics HTTP/1.1\r\nAuthorization: a\r\nAuthorization: b\r\n\r\n")
        assert to_the_end(sock).startswith(b"HTTP/1.0 400 ")


def test_who_gives_way(monkeypatch):
    """If all slots are taken, the connection that has lasted longest makes room for the next."""
    monkeypatch.setattr(slots, "GRACE_S", 0.1)
    with serving() as server, ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        idle = [
            stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            for _ in range(SLOTS + 3)
        ]
        assert get(server, "/metrics")[0] == 200
        assert idle[0].recv(1) == b""
        idle[-1].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert to_the_end(idle[-1]).startswith(b"HTTP/1.0 200 ")


def test_threads_that_do_not_end(monkeypatch):
    """Threads that lost their slot but wait for the API server are bounded, too."""
    monkeypatch.setattr(slots, "GRACE_S", 0)
    asked, answer = threading.Semaphore(0), threading.Event()

    def slow_gate(*_):
        asked.release()
        answer.wait(PATIENCE_S)
        return 503, "late"

    with serving(gate=slow_gate) as server, ExitStack() as stack:
        stack.callback(answer.set)
        address = ("127.0.0.1", server.port)

        def ask():
            sock = stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            return sock

        for _ in range(slots.THREADS):
            ask()
            assert asked.acquire(timeout=PATIENCE_S)
        last, taken = ask(), server._server._from_here
        end_s = time.monotonic() + PATIENCE_S
        while not taken._waiting:
            assert time.monotonic() < end_s
        taken.look()
        assert (len(taken._threads), len(taken._taken)) == (slots.THREADS, SLOTS)
        answer.set()
        assert to_the_end(last).startswith(b"HTTP/1.0 503 ")


def test_strangers_keep_no_probe_out(monkeypatch):
    """However many remote connections come and stay, the node's own are answered."""
    # Nobody's time is up before the end.
    monkeypatch.setattr(page_server, "_PATIENCE_S", 1000)
    monkeypatch.setattr(slots, "GRACE_S", 1000)
    monkeypatch.setattr(slots, "WAITING", 20)
    with serving() as server, ExitStack() as stack:
        strangers = [
            stack.enter_context(
                socket.create_connection(
                    ("127.0.0.1", server.port), timeout=PATIENCE_S, source_address=("127.0.0.2", 0)
                )
            )
            for _ in range(SLOTS + 30)
        ]
        for path in ("/healthz", "/readyz") * 5:
            assert get(server, path)[0] == 200
        # Of the waiting connections the oldest are closed.
        assert strangers[SLOTS].recv(1) == b""
        elsewhere = server._server._from_elsewhere
        assert (len(elsewhere._taken), len(elsewhere._waiting)) == (SLOTS, 20)
        # When one of them ends, the newest is next.
        strangers[0].close()
        strangers[-1].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert to_the_end(strangers[-1]).startswith(b"HTTP/1.0 200 ")


def test_scrapers_that_never_read(monkeypatch):
    """As many as there are threads: each is given up after a while, and others are answered."""
    monkeypatch.setattr(page_server, "_PATIENCE_S", 0.2)
    page = Page("1.2")
    # More than a socket's buffers hold.
    page.snapshot = Snapshot(version="1.2", not_seen=tuple(f"{i}{'x' * 1000}" for i in range(5000)))
    server = PageServer(page, "127.0.0.1", 0)
    server.start()
    with closing(server), ExitStack() as stack:
        for _ in range(SLOTS + 8):
            stuck = stack.enter_context(
                closing(socket.create_connection(("127.0.0.1", server.port)))
            )
            with suppress(ConnectionError):
                stuck.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

        def is_answered():
            with suppress(OSError):
                return get(server, "/readyz")[0] == 200
            return False

        end_s = time.monotonic() + PATIENCE_S
        while not is_answered():
            assert time.monotonic() < end_s


def test_the_gate():
    """It guards only the metrics, sees the header, and its decision is the answer."""
    asked = []

    def gate(authorization, path):
        assert path == "/metrics"
        asked.append(authorization)
        return None if authorization == "Bearer yes" else (401, "no")

    with serving(gate=gate) as server:
        assert get(server, "/healthz")[0] == get(server, "/readyz")[0] == 200
        assert not asked
        status, headers, text = get(server, "/metrics")
        assert (status, headers["WWW-Authenticate"], text) == (401, "Bearer", "no\n")
        assert get(server, "/metrics?x=1", Authorization="Bearer no")[0] == 401
        assert "srcip_build_info" in get(server, "/metrics", Authorization="Bearer yes")[2]
    assert asked == ["", "Bearer no", "Bearer yes"]
