"""The agent's totals are the connections made, whatever goes on meanwhile."""

import tempfile
from pathlib import Path

import pytest

from tests.bench import node as nodes
from tests.bench.outage import outage, well
from tests.bench.soak import soak

pytestmark = pytest.mark.usefixtures("kernel")

CONNECTIONS, SECONDS = 50_000, 3


def test_counted_and_lost_are_what_was_made():
    """
    While Services come and go, Prometheus scrapes and two listen to the stream, no connection is
    counted twice or missed, by the kernel's own counts; and no series goes backwards.
    """
    with tempfile.TemporaryDirectory() as directory, nodes.built(directory) as node:
        Path(directory).chmod(0o755)
        seen = soak(node, Path(directory), CONNECTIONS, SECONDS)
    assert (seen.udp_made, seen.tcp_made) == (49_500, 500)
    assert seen.missing == 0
    assert (seen.udp_counted, seen.tcp_counted) == (seen.udp_made, seen.tcp_made)
    assert not seen.backwards
    assert seen.changes > 10
    assert seen.scrapes > 1
    # A client that wants only TCP gets it, or is told what it did not get.
    everything, tcp = seen.streams
    assert all(told["connections"] for told in (everything, tcp))
    assert tcp["connections"] == seen.tcp_made or any(tcp["lost"].values())


def test_while_the_api_server_is_away():
    """
    Refused, then cut off, it comes back as another; kube-proxy changes its mode meanwhile. No
    connection is missed, by conntrack's own events, and the agent stays well.
    """
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        seen = outage(Path(directory), away_s=3, between_s=2)
    assert well(seen, is_long=False) == []
    assert seen.made.total() > 100
    assert len(seen.outages) == 2
