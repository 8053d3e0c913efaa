"""The cluster as it was: what is gone is found for a while, and memory stays bounded."""

from ipaddress import ip_address

from tests.unit.cluster import kube
from tracer.cluster import history as module
from tracer.cluster.claims import Kind, Owner
from tracer.cluster.history import History
from tracer.cluster.index import Cluster
from tracer.cluster.objects import Policy
from tracer.cluster.parse import parse
from tracer.model import TCP

SECOND = 10**9
ADDRESS = ip_address("10.0.0.10")
LOCAL = Cluster.build([parse(kube.service("web", type="NodePort", externalTrafficPolicy="Local"))])
CLUSTER = LOCAL.changed(put=[parse(kube.service("web", type="NodePort"))])
GONE = CLUSTER.changed(remove=[Owner(Kind.SERVICE, "default", "web")])


def asked(history, at_s):
    past = history.service_at(ADDRESS, 80, TCP, at_ns=int(at_s * SECOND))
    return past and (past.match.service.external_policy, past.is_current)


def test_judged_by_the_state_at_its_time():
    """A Service is found as it was at the time, or last before it; a new one counts at once."""
    history = History().add(LOCAL, 10 * SECOND).add(CLUSTER, 20 * SECOND)
    assert asked(history, 15) == (Policy.LOCAL, False)
    assert asked(history, 25) == (Policy.CLUSTER, True)
    assert asked(history, 5) == (Policy.LOCAL, False)
    history = history.add(GONE, 30 * SECOND)
    assert asked(history, 35) == (Policy.CLUSTER, False)
    assert history.now is GONE
    assert history.at(12 * SECOND) is LOCAL
    assert asked(History(), 5) is None


def test_forgotten_after_a_while():
    """Objects that have been gone longer than they are kept are no longer found."""
    history = History().add(LOCAL, 0).add(GONE, SECOND)
    assert asked(history.add(Cluster(updated_ns=1), module.KEEP_NS), 0) is not None
    later = module.KEEP_NS + 2 * SECOND
    assert asked(history.add(Cluster(), later), 0) is None


def test_bounded():
    """Ten thousand changes in ten seconds, and as many in hours, are kept in bounds."""
    for step in (SECOND // 1000, SECOND):
        history = History()
        for index in range(10_000):
            history = history.add(LOCAL if index % 2 else GONE, index * step)
        assert len(history) <= module.MAX_EXACT + module.KEEP_NS // module.SPACING_NS + 2
        assert history.now is LOCAL


def test_a_clock_that_jumps_back():
    """Times that go backwards do not upset the order."""
    history = History().add(LOCAL, 20 * SECOND).add(CLUSTER, 10 * SECOND)
    assert history.now is CLUSTER
    assert asked(history, 20) == (Policy.CLUSTER, True)
