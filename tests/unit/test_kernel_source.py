"""What a tracer reports when its surroundings change; nothing is loaded into the kernel."""

import errno
import os
import socket
from unittest.mock import MagicMock

import pytest

from tracer.errors import LoadError, NetnsError
from tracer.kernel import attachment, netns, source
from tracer.kernel.attach import Links
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.programs import DROPS, PROBED_CONNECTIONS
from tracer.kernel.source import KernelSource, Settings

LATER = "marks where iptable_nat replaces sources"


@pytest.fixture
def open_probing(monkeypatch):
    """Opens a source that probes, on a machine where a NAT module was loaded after it."""
    for name in ("Kallsyms", "Map", "PathCounters"):
        monkeypatch.setattr(source, name, MagicMock())
    monkeypatch.setattr(attachment, "Map", MagicMock())
    monkeypatch.setattr(source, "RingReader", lambda _fds: MagicMock(read=lambda _timeout_s: []))
    monkeypatch.setattr(source, "possible_cpus", lambda: 1)
    monkeypatch.setattr(source, "_CHECK_INTERVAL_NS", 0)
    monkeypatch.setattr(source.programs, "load", lambda *_: MagicMock(drop_reasons={}))
    monkeypatch.setattr(Links, "attach_tracepoint", lambda *_: None)
    probes = MagicMock(connections=PROBED_CONNECTIONS, drops=DROPS, unseen=lambda: LATER)

    def open_(**settings):
        return KernelSource([netns.current("node")], Settings(**settings), probes)

    return open_


def test_nat_that_comes_later(open_probing, caplog):
    """NAT that is loaded after the start is one warning, and stays among what is not seen."""
    tracing = open_probing()
    for _ in range(3):
        assert tracing.read(0) == []
        assert LATER in tracing.info.not_seen
    assert caplog.messages == [f"not seen: {LATER}"]


def test_nat_that_comes_later_to_an_agent(open_probing):
    """An agent that is restarted when it fails does so, and sees the marks then."""
    with pytest.raises(LoadError, match=f"^not seen: {LATER}$"):
        open_probing(is_restarted=True).read(0)


def test_no_descriptor_left(monkeypatch):
    """Where no socket can be opened, one line says so."""

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(NetnsError, match=r"^cannot watch the interfaces of node: Too many open"):
        InterfaceWatcher(netns.current("node"))
