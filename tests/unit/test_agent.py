"""The agent: paths are judged as their connections would be, and totals only grow."""

import ctypes
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from exporters.prometheus import ConnectionLabels
from tests.unit import samples, world
from tests.unit.test_judge_properties import connections, views
from tests.unit.world import CLIENT, ETH0, MARK, NODE2, NODE_PORT, P11, P12, entry, rules_of, view
from tracer import agent as agents
from tracer.address_classes import address_classes
from tracer.agent import Agent, ClusterStatus
from tracer.cluster.index import Cluster
from tracer.encode import encode_connection, mapped
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.path_key import is_typical, judge_path
from tracer.judge.verdict import Verdict
from tracer.judge.view import View
from tracer.kernel.counters import AddressClass
from tracer.model import AddressFlag, ClientClass, Hook, PathKey, Status
from tracer.path_totals import OTHER_CONNECTIONS
from tracer.ruleset.model import Ruleset
from tracer.source import SourceInfo
from tracer.tally import Tally
from tracer.wire import PathFlag, WirePathKey

LABELS = ConnectionLabels("default", "web", "nodeport", "Cluster", "replaced", "x", "pod", "v", "p")
EXTERNAL = AddressClass(ClientClass.EXTERNAL)


def class_of(address, classes):
    """What the kernel's trie returns: the longest prefix."""
    lengths = range(address.max_prefixlen, -1, -1)
    networks = (ip_network((address, length), strict=False) for length in lengths)
    return next((classes[network] for network in networks if network in classes), EXTERNAL)


def key_of(connection, node_view):
    """The key that connections.c makes of a connection."""
    classes = address_classes(node_view)
    orig, reply = connection.orig, connection.reply
    client = class_of(orig.src, classes)
    is_input = connection.hook is Hook.NF_INPUT
    has_dnat = (orig.dst, orig.dport) != (reply.src, reply.sport)
    dst_class = ClientClass.EXTERNAL if has_dnat else class_of(orig.dst, classes).client_class
    has_dst = has_dnat or dst_class is not ClientClass.EXTERNAL
    mark = connection.mark
    return PathKey(
        netns=connection.netns,
        zone=connection.zone,
        family=orig.family,
        proto=orig.proto,
        client_class=client.client_class,
        client_flags=client.flags,
        dst=orig.dst if has_dst else None,
        dst_class=dst_class,
        dport=orig.dport if has_dnat or (has_dst and not is_input) else 0,
        backend=reply.src if has_dnat else None,
        backend_port=reply.sport if has_dnat else 0,
        seen_source=reply.dst if connection.is_snat else None,
        is_marked=None if mark is None else bool(mark & node_view.masquerade_mark),
        is_input=is_input,
        is_hairpin=orig.src == reply.src,
        has_snat_status=bool(connection.status & Status.SRC_NAT),
    )


def encode_key(key):
    flags = {
        PathFlag.SNAT: key.seen_source,
        PathFlag.DNAT: key.backend,
        PathFlag.MARKED: key.is_marked,
        PathFlag.HAS_MARK: key.is_marked is not None,
        PathFlag.INPUT: key.is_input,
        PathFlag.HAIRPIN: key.is_hairpin,
        PathFlag.SRC_NAT: key.has_snat_status,
    }
    addresses = {"dst": key.dst, "backend": key.backend, "seen": key.seen_source}
    return bytes(
        WirePathKey(
            **{
                name: (ctypes.c_uint8 * 16)(*mapped(each))
                for name, each in addresses.items()
                if each is not None
            },
            netns=key.netns,
            dport=key.dport,
            backend_port=key.backend_port,
            zone=key.zone,
            proto=key.proto,
            family=2 if key.family == "ipv4" else 10,
            client_class=key.client_class,
            dst_class=key.dst_class,
            flags=sum(flag for flag, is_set in flags.items() if is_set),
            client_flags=key.client_flags,
        )
    )


def told(opinion):
    return opinion.verdict, opinion.cause, opinion.service, opinion.client_class


hooked = st.builds(
    lambda connection, hook: replace(connection, hook=hook),
    connections,
    st.sampled_from([Hook.NF_POSTROUTING, Hook.NF_INPUT]),
)


@settings(deadline=None)
@given(hooked, views())
def test_a_path_is_judged_as_its_connections(connection, node_view):
    """If the key decides, verdict, cause, Service and class are those of the connection itself."""
    key = key_of(connection, node_view)
    judged = judge_path(key, connection, node_view).opinion
    expected = judge_connection(connection, node_view, time_ns=0).opinion
    assert is_typical(key, connection, node_view)
    is_told_apart = key.dst is not None and (key.backend is not None or not key.is_input)
    if is_told_apart or node_view.match(connection.orig) is None:
        assert told(judged) == told(expected)
    else:
        assert judged.service is None or judged.verdict is Verdict.REPLACED_UPSTREAM


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(hooked, hooked, views())
def test_any_sample_gives_the_same(connection, other, node_view):
    """
    Whichever connection of a path is the sample, its opinion is the same, if no rule asks for more
    than the key holds.
    """
    node_view = replace(node_view, rules=None)
    other = replace(
        connection, orig=replace(connection.orig, src=other.orig.src, sport=other.orig.sport)
    )
    if not connection.is_snat:
        other = replace(other, reply=replace(other.reply, dst=other.orig.src))
    key = key_of(connection, node_view)
    assume(key_of(other, node_view) == key)
    one, two = (judge_path(key, each, node_view).opinion for each in (connection, other))
    assert told(one) == told(two)


@settings(deadline=None)
@given(hooked, views())
def test_classes_say_what_the_view_says(connection, node_view):
    """The kernel's prefixes give an address the class and the flags that the judge sees."""
    address = connection.orig.src
    found = class_of(address, address_classes(node_view))
    assert found.client_class is (node_view.classify(address) or ClientClass.EXTERNAL)
    assert bool(found.flags & AddressFlag.HERE) == node_view.is_here(address)
    cidrs = node_view.rules.cluster_cidrs if node_view.rules else ()
    assert bool(found.flags & AddressFlag.CLUSTER) == any(address in cidr for cidr in cidrs)


def test_a_cluster_range_among_pod_ranges():
    """A kube-proxy range that is wider or narrower than the nodes' does not affect classes."""
    for cidr in ("10.0.0.0/8", "10.244.1.0/28"):
        node_view = View(
            node="node1", cluster=world.CLUSTER, rules=Ruleset(cluster_cidrs=(ip_network(cidr),))
        )
        for text in ("10.244.1.11", "10.244.1.99", "10.9.9.9", "10.240.0.3", "192.0.2.1"):
            address = ip_address(text)
            found = class_of(address, address_classes(node_view))
            assert found.client_class is node_view.classify(address)
            assert bool(found.flags & AddressFlag.CLUSTER) == (address in ip_network(cidr))


# Totals


def test_tally_has_a_bound():
    """Series beyond the bound go into one more series, and are counted; known series go on."""
    tally = Tally(OTHER_CONNECTIONS, 2)
    for name in ("a", "b", "c", "d", "a"):
        tally.add(LABELS._replace(service=name), 3)
    assert {labels.service: total for labels, total in tally.totals.items()} == {
        "a": 6, "b": 3, "other": 6,
    }  # fmt: skip
    assert tally.overflow == 6


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99))), st.integers(1, 12))
def test_tally_is_exact(added, room):
    """Whatever the bound, the sum is what was added, and no total ever falls."""
    tally, before = Tally(OTHER_CONNECTIONS, room), {}
    for service, count in added:
        tally.add(LABELS._replace(service=str(service)), count)
        assert all(tally.totals[labels] >= total for labels, total in before.items())
        before = dict(tally.totals)
    assert sum(tally.totals.values()) == sum(count for _, count in added)
    assert len(tally.totals) <= room + 1


def test_series_of_gone_services():
    """They stay for ten minutes, are removed then, and not if the Service came back meanwhile."""
    tally = Tally(OTHER_CONNECTIONS, 9)
    for labels in (LABELS, LABELS._replace(service="db"), OTHER_CONNECTIONS):
        tally.add(labels, 1)
    no_service = LABELS._replace(service="", service_namespace="")
    tally.add(no_service, 1)
    tally.forget_gone(lambda *_: False, 0.0)
    tally.forget_gone(lambda _, name: name == "db", 100.0)
    tally.forget_gone(lambda *_: False, 599.0)
    assert len(tally.totals) == 4
    tally.forget_gone(lambda *_: False, 601.0)
    assert {labels.service for labels in tally.totals} == {"db", "other", ""}
    tally.forget_gone(lambda *_: False, 1200.0)
    assert set(tally.totals) == {OTHER_CONNECTIONS, no_service}


# The agent


class FakeKernel:
    """Counts that a test makes."""

    def __init__(self):
        self.info = SourceInfo(
            clock_offset_ns=0,
            nodes={samples.NETNS: "node1"},
            drop_reasons={1: "NETFILTER_DROP"},
            rung="fake",
        )
        self.counters = self
        self.added, self.samples, self.records = Counter(), {}, []
        self.classes, self.mark = {}, None
        self.streaming, self.woken_by = [], None
        self.refused = 0
        self.lost_connections = Counter()
        self.is_open = True

    def make(self, connection, node_view, count=1, *, has_sample=True):
        key = encode_key(key_of(connection, node_view))
        self.added[key] += count
        if has_sample:
            self.samples.setdefault(key, encode_connection(connection))
        return key

    def drain(self):
        added, self.added = self.added, Counter()
        return dict(added)

    def sample(self, key):
        return self.samples.get(key)

    def forget_sample(self, key):
        self.samples.pop(key, None)

    def replace_classes(self, classes):
        self.classes = classes
        return self.refused

    def count(self, *, masquerade_mark):
        self.mark = masquerade_mark

    def stream(self, wanted):
        self.streaming.append(wanted)

    def wake_on(self, fd):
        self.woken_by = fd

    def read(self, timeout_s):
        records, self.records = self.records, []
        return records if self.is_open else None

    def lost(self):
        return {}

    def lost_by_program(self):
        reasons = ("ring_full", "paths_full", "mark_overtaken", "unreadable", "untracked")
        connections = {reason: self.lost_connections[reason] for reason in reasons}
        return {"connections": connections, "drops": dict.fromkeys(reasons, 0), "accepts": {}}

    def run_statistics(self):
        return {}

    def map_usage(self):
        return {"paths": (1, 2)}

    def symbol(self, address):
        return None

    def close(self):
        pass


class Fixed:
    """One view of everything, that a test changes."""

    def __init__(self, node_view):
        self.view = node_view

    def refresh(self):
        pass

    def at(self, netns, node, time_ns):
        return self.view

    def notes(self):
        return ()


class Setup:
    def __init__(self, node_view=None, **options):
        self.now_s = 0.0
        self.kernel = FakeKernel()
        self.views = Fixed(node_view or view())
        self.snapshots = []
        self.status = ClusterStatus()
        self.agent = Agent(
            self.kernel,
            self.views,
            self.snapshots.append,
            version="1",
            cluster_status=lambda: self.status,
            clock_s=lambda: self.now_s,
            **options,
        )

    def make(self, connection, count=1, **options):
        return self.kernel.make(connection, self.views.view, count, **options)

    def totals(self):
        self.agent.drain()
        return {
            (labels.service, labels.verdict, labels.cause): total
            for labels, total in self.snapshots[-1].connections.items()
        }


@pytest.fixture
def setup():
    return Setup()


REPLACED = entry(CLIENT, NODE2, NODE_PORT, P11, NODE2, mark=MARK, oif=ETH0)


def test_totals(setup):
    """Each path's count goes to the verdict that a connection on it would get."""
    assert REPLACED.is_snat
    setup.make(REPLACED, 5)
    setup.make(entry(P12, P11, 8080, P11, P12), 2)
    setup.make(REPLACED, 1)
    expected = {
        ("nodeport", "replaced", "external-traffic-policy-cluster"): 6,
        ("", "preserved", ""): 2,
    }
    assert setup.totals() == expected
    assert setup.totals() == expected


def test_a_verdict_that_changes_later():
    """Only later connections count under the new verdict; the old total stays."""
    setup = Setup()
    setup.make(REPLACED, 5)
    before = setup.totals()
    setup.views.view = replace(setup.views.view, proxy_mode="ipvs")
    setup.make(REPLACED, 2)
    after = setup.totals()
    assert after == before | {("nodeport", "replaced", str(Cause.IPVS_MASQUERADE)): 2}


def test_rules_that_change_are_asked_again():
    """A path is judged again when the rules change."""
    egress = entry(P12, "192.0.2.1", 443, "192.0.2.1", "10.240.0.3", mark=0, oif=ETH0)
    setup = Setup(view(rules=rules_of("-A POSTROUTING -s 10.244.1.0/24 -j MASQUERADE")))
    setup.make(egress)
    assert setup.totals() == {("", "replaced", "pod-egress"): 1}


def test_a_sample_that_comes_late(setup):
    """A path without a sample waits for one drain, and is in the series 'other' after it."""
    key = setup.make(REPLACED, 3, has_sample=False)
    assert setup.totals() == {}
    setup.make(REPLACED, 1)
    assert sum(setup.totals().values()) == 4
    assert "other" not in {service for service, _, _ in setup.totals()}
    setup.make(entry(P12, P11, 8080, P11, P12), 7, has_sample=False)
    setup.totals()
    assert setup.totals()["other", "other", "other"] == 7
    assert key in setup.kernel.samples


def test_a_sample_of_another_time(setup):
    """If a sample's client does not match the key, a new sample is requested."""
    key = setup.make(REPLACED)
    addresses = setup.views.view.addresses | {ip_address(CLIENT)}
    setup.views.view = replace(setup.views.view, addresses=addresses)
    assert setup.totals() == {("nodeport", "replaced", "external-traffic-policy-cluster"): 1}
    assert key not in setup.kernel.samples


def test_a_full_map_is_in_other(setup):
    """What the kernel found no room for is exported as 'other' and as lost."""
    setup.make(REPLACED, 2)
    setup.kernel.lost_connections["paths_full"] = 40
    assert setup.totals()["other", "other", "other"] == 40
    setup.kernel.lost_connections["paths_full"] = 41
    assert setup.totals()["other", "other", "other"] == 41
    assert setup.snapshots[-1].lost["connections", "paths_full"] == 41
    assert setup.snapshots[-1].overflow["srcip_connections_total"] == 41


def test_a_full_map_of_classes_is_told(setup):
    """Prefixes that found no room are lost, by their number."""
    setup.kernel.refused = 3
    setup.views.view = replace(setup.views.view, addresses=frozenset({ip_address("192.0.2.1")}))
    setup.agent.step(0)
    setup.agent.drain()
    assert setup.snapshots[-1].lost["agent", "prefixes_full"] == 3
    for address, refused, told in (("192.0.2.2", 3, 3), ("192.0.2.3", 5, 5), ("192.0.2.4", 0, 5)):
        # The same ones are not told again.
        setup.kernel.refused = refused
        addresses = frozenset({ip_address(address)})
        setup.views.view = replace(setup.views.view, addresses=addresses)
        setup.now_s += 10
        setup.agent.step(0)
        setup.agent.drain()
        assert setup.snapshots[-1].lost["agent", "prefixes_full"] == told


def test_undecodable_keys_are_in_other(setup, caplog):
    """A key that cannot be read is counted and logged; its connections are not lost."""
    key = bytearray(setup.make(REPLACED, 3))
    setup.kernel.added = Counter({bytes(key[:59]) + b"\x03" + bytes(key[60:]): 3})
    setup.kernel.samples = dict.fromkeys(setup.kernel.added, encode_connection(REPLACED))
    assert setup.totals() == {("other", "other", "other"): 3}
    assert setup.snapshots[-1].undecodable == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("undecodable path: ")


def test_max_series():
    """More series than allowed go to 'other'."""
    setup = Setup(max_series=1)
    setup.make(REPLACED, 2)
    setup.make(entry(P12, P11, 8080, P11, P12), 2)
    assert sorted(setup.totals().values()) == [2, 2]
    assert setup.snapshots[-1].overflow["srcip_connections_total"] == 2


def test_not_ready_until_the_cluster_is_in(monkeypatch, setup):
    """Nothing is counted before the cluster is known, and the first drain makes it ready."""
    setup.status = ClusterStatus(missing="objects")
    setup.agent.step(0)
    assert setup.snapshots[-1].not_ready == "objects"
    assert setup.kernel.mark is None
    setup.status = ClusterStatus(age_s=1.0)
    setup.agent.step(0)
    assert setup.kernel.mark == MARK
    assert setup.kernel.classes
    assert setup.snapshots[-1].not_ready is None


def test_a_cluster_that_never_comes(setup):
    """After half a minute counting begins without the cluster; the agent is still not ready."""
    setup.status = ClusterStatus(missing="objects")
    setup.views.view = replace(setup.views.view, cluster=None)
    setup.agent.step(0)
    setup.now_s = 31.0
    setup.make(REPLACED)
    setup.agent.step(0)
    assert setup.kernel.mark == MARK
    assert sum(setup.snapshots[-1].connections.values()) == 1
    assert setup.snapshots[-1].not_ready == "objects"


def test_drops(setup):
    """A drop is a packet under its cause and the kernel's reason."""
    sent = world.sent(CLIENT, NODE2, NODE_PORT)
    drop = samples.drop(packet=sent, orig=sent, reason=1)
    setup.kernel.records = [samples.drop_bytes(drop), b"junk"]
    setup.agent.step(0)
    setup.agent.drain()
    ((labels, total),) = setup.snapshots[-1].drops.items()
    assert (labels.service, labels.reason, labels.proto, total) == (
        "nodeport", "NETFILTER_DROP", "tcp", 1,
    )  # fmt: skip
    assert setup.snapshots[-1].undecodable == 1


def test_drops_beyond_the_budget_are_counted(monkeypatch):
    """A flood of drops costs a bounded time; what was not judged is counted."""
    monkeypatch.setattr(agents, "DROPS_AT_ONCE", 10)
    setup = Setup()
    sent = world.sent(CLIENT, NODE2, NODE_PORT)
    setup.kernel.records = [samples.drop_bytes(samples.drop(packet=sent, orig=sent))] * 25
    setup.agent.step(0)
    setup.agent.drain()
    told = setup.snapshots[-1]
    assert sum(told.drops.values()) == 10
    assert told.lost["agent", "rate_limited"] == 15


def test_losses_begin_at_nothing(setup):
    """Each is exported before there is one: Prometheus takes no series' first value for more."""
    setup.agent.step(0)
    lost = setup.snapshots[-1].lost
    assert {"rate_limited", "prefixes_full"} == {why for stage, why in lost if stage == "agent"}
    assert set(lost.values()) == {0}


def test_the_end_of_all_namespaces(setup):
    """The agent ends with them, after a last drain."""
    assert setup.agent.step(0)
    setup.kernel.is_open = False
    setup.make(REPLACED)
    assert not setup.agent.step(0)
    assert sum(setup.snapshots[-1].connections.values()) == 1


def test_services_that_go_away(setup):
    """Ten minutes after a Service is gone its series are, too."""
    setup.make(REPLACED, 2)
    setup.agent.step(0)
    assert setup.totals()
    setup.views.view = replace(setup.views.view, cluster=Cluster())
    for minute in range(1, 14):
        setup.now_s = minute * 60.0
        setup.agent.step(0)
    assert setup.totals() == {}
