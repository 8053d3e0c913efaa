"""When the keeper of rules has kube-proxy asked: every minute, and when its rules change mode."""

from pathlib import Path

import pytest

from tracer.ruleset import keeper
from tracer.ruleset.keeper import ASK_INTERVAL_S, _Place
from tracer.ruleset.model import Ruleset


class Watcher:
    """Rules that a test changes."""

    def __init__(self):
        self.waiting = [Ruleset(proxy_mode="iptables")]

    def has_changed(self):
        return bool(self.waiting)

    def ruleset(self):
        return self.waiting.pop(0)


class Node:
    """A namespace, its clock, and what its kube-proxy answers."""

    def __init__(self, monkeypatch, *, follows=True):
        self.now_s, self.answer, self.asked = 1000.0, "iptables", 0
        monkeypatch.setattr(keeper.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(keeper.proxy_mode, "ask_apart", self._ask)
        self.watcher = Watcher()
        next_ask_s = self.now_s + ASK_INTERVAL_S if follows else float("inf")
        self.place = _Place(
            path=Path("/x"), mode="iptables", next_ask_s=next_ask_s, watcher=self.watcher
        )

    def _ask(self, path):
        self.asked += 1
        return self.answer

    def news(self, *, after_s=1.0, mode=None):
        self.now_s += after_s
        if mode:
            self.watcher.waiting.append(Ruleset(proxy_mode=mode))
        return list(self.place.news())


@pytest.fixture
def node(monkeypatch):
    return Node(monkeypatch)


def test_it_asks_every_minute(node):
    """Only what has changed is sent."""
    assert [type(each) for each in node.news()] == [Ruleset]
    assert node.news(after_s=58) == []
    assert node.asked == 0
    assert node.news(after_s=2) == []
    assert node.asked == 1
    node.answer = None
    assert node.news(after_s=30) == []
    assert node.news(after_s=31) == [None]
    node.answer = "nftables"
    assert node.news(after_s=61) == ["nftables"]
    assert node.news(after_s=61) == []
    assert node.asked == 4


def test_it_asks_when_rules_change_their_mode(node):
    """At once, but not for other changes of rules, which come with every endpoint."""
    node.news()
    node.news(mode="iptables")
    assert node.asked == 0
    node.answer = "nftables"
    assert node.news(mode="nftables") == [Ruleset(proxy_mode="nftables"), "nftables"]
    assert node.asked == 1
    node.news(after_s=59)
    assert node.asked == 1


def test_a_trace_asks_nobody(monkeypatch):
    """Each question is a connection, which a trace would show: once at the start is enough."""
    node = Node(monkeypatch, follows=False)
    node.news()
    node.news(after_s=1e6, mode="nftables")
    assert node.asked == 0
