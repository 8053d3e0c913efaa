"""A conversation in clear and by TLS: the same bytes, in bounded parts, and never a wait."""

import select
import socket
import ssl
import threading
import time
from contextlib import ExitStack, closing, suppress

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.patience import PATIENCE_S
from tracer.channel import ClearChannel, TlsChannel, send_all

AUTHORITY = trustme.CA()


def contexts():
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("agent.example").configure_cert(server)
    client = ssl.create_default_context()
    AUTHORITY.configure_trust(client)
    return server, client


SERVER, CLIENT = contexts()


class Pair:
    """Both ends of a conversation, in one thread."""

    def __init__(self, is_secure, chunk=1 << 12):
        sockets = socket.socketpair()
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        if not is_secure:
            self.one, self.other = (ClearChannel(each, chunk=chunk) for each in sockets)
            return
        self.one = TlsChannel(sockets[0], SERVER, chunk=chunk, is_server=True)
        self.other = TlsChannel(sockets[1], CLIENT, chunk=chunk, server_name="agent.example")
        self.one.deadline_s = self.other.deadline_s = time.monotonic() + PATIENCE_S
        thread = threading.Thread(target=self.one.shake_hands)
        thread.start()
        self.other.shake_hands()
        thread.join()
        self.one.deadline_s = self.other.deadline_s = None

    def close(self):
        self.one.close()
        self.other.close()


@pytest.fixture(params=[False, True], ids=["clear", "tls"])
def pair(request):
    with closing(Pair(request.param)) as pair:
        yield pair


def heard(channel):
    """What has come and can be had without waiting; a part of a record is nothing yet."""
    said = b""
    while select.select([channel], [], [], 0)[0]:
        with suppress(BlockingIOError):
            chunk = channel.receive()
            if not chunk:
                break
            said += chunk
    return said


def crossed(pair, said, parts):
    """Say something in parts, as fast as the other side listens; return what it hears."""
    got, at = b"", 0
    while at < len(said) or pair.one.has_unsent:
        try:
            if at < len(said):
                at += pair.one.send(said[at : at + parts])
            pair.one.flush()
        except BlockingIOError:
            got += heard(pair.other)
    return got + heard(pair.other)


@given(st.binary(max_size=40_000), st.integers(1, 20_000), st.integers(1, 5000), st.booleans())
def test_the_same_bytes(said, parts, chunk, is_secure):
    """Whatever is said, and in whatever parts it is sent and received."""
    with closing(Pair(is_secure, chunk=chunk)) as pair:
        assert crossed(pair, said, max(parts, len(said) // 50 + 1)) == said


def test_nobody_listens(pair):
    """What does not fit is not taken, and little more than a record is kept; nothing blocks."""
    taken = 0
    with suppress(BlockingIOError):
        while True:
            taken += pair.one.send(b"x" * 100_000)
    assert taken - pair.one.sent <= 16 << 10
    with pytest.raises(BlockingIOError):
        pair.one.receive()
    assert heard(pair.other) + crossed(pair, b"", 1) == b"x" * taken
    assert not pair.one.has_unsent


def test_deadlines(pair):
    """With one everything waits until then, and not longer."""
    pair.one.deadline_s = time.monotonic() + 0.1
    with pytest.raises(TimeoutError):
        pair.one.receive()
    for act in (pair.one.receive, lambda: pair.one.send(b"x" * 100_000)):
        with pytest.raises(TimeoutError):
            act()
    pair.one.deadline_s = time.monotonic() + PATIENCE_S
    said = b"y" * 200_000
    thread = threading.Thread(target=send_all, args=(pair.one, said))
    thread.start()
    got = b""
    while len(got) < len(said):
        got += heard(pair.other)
    thread.join()
    assert got.lstrip(b"x") == said


def test_the_end(pair):
    """A goodbye and a sudden end are the same: nothing more comes, however often one asks."""
    send_all(pair.one, b"last")
    pair.one.close()
    assert heard(pair.other) == b"last"
    assert [pair.other.receive() for _ in range(3)] == [b""] * 3
    with closing(Pair(is_secure=True)) as other:
        other.one.socket.close()
        # What TLS has said of itself comes first.
        assert heard(other.other) == b""
        assert [other.other.receive() for _ in range(3)] == [b""] * 3


def test_what_is_no_tls():
    """Neither another protocol nor a broken record is taken for data."""
    mine, other = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(other)
        channel = stack.enter_context(closing(TlsChannel(mine, SERVER, chunk=100, is_server=True)))
        channel.deadline_s = time.monotonic() + PATIENCE_S
        other.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ssl.SSLError):
            channel.shake_hands()
    with closing(Pair(is_secure=True)) as pair:
        pair.one.socket.send(b"\x17\x03\x03\x00\x20" + b"x" * 32)
        with pytest.raises(ssl.SSLError):
            pair.other.receive()
