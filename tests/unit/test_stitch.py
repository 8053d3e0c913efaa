"""Recordings of several nodes joined by 'srcip stitch', run without root."""

import itertools
import json
import os
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.services import OBJECTS
from tests.unit import samples, world
from tests.unit.fake_source import FakeSource
from tests.unit.samples import CLOCK_OFFSET_NS, flow
from tracer import clocks
from tracer.judge.join import Joiner
from tracer.model import Status
from tracer.proxy_headers import Opening
from tracer.recording import Recorder

MS, S = 1_000_000, 1_000_000_000
NETNS = {"node1": 4026532001, "node2": 4026532002, "node3": 4026532003}
CLUSTER = ("--cluster", OBJECTS)
START_NS = samples.KTIME_NS


def info(*nodes, behind_ns=0):
    """Return a recording's information on some nodes, with its clock behind by so much."""
    return replace(
        samples.INFO,
        nodes={NETNS[node]: node for node in nodes},
        clock_offset_ns=CLOCK_OFFSET_NS - behind_ns,
        not_seen=(),
    )


def s3(at_ns=0, *, port=40000, snat_port=61234):
    """Return what node2 and node1 record of a connection to a NodePort through node2."""
    sent = flow(world.CLIENT, port, world.NODE2, 30080)
    inside = flow(world.NODE2, snat_port, world.P11, 8080)
    nat = Status.SRC_NAT | Status.DST_NAT
    return (
        entry("node2", sent, inside.inverted, at_ns=at_ns, mark=0x4000, status=nat),
        entry("node1", inside, inside.inverted, at_ns=at_ns + MS // 10, status=Status(0)),
    )


def entry(node, orig, reply, *, at_ns=0, **changes):
    values = {"ktime_ns": START_NS + at_ns, "netns": NETNS[node]} | changes
    return samples.connection_bytes(samples.connection(orig, reply, **values))


def accept(at_ns=0, *, snat_port=61234):
    peer = flow(world.NODE2, snat_port, world.P11, 8080)
    return samples.accept_bytes(samples.accept(peer, ktime_ns=START_NS + at_ns))


@pytest.fixture
def record(tmp_path):
    """Make a recording of a node's records."""

    def make(name, *records, of=None, behind_ns=0, **fake):
        path = tmp_path / f"{name}.srcip"
        known = of or info(name, behind_ns=behind_ns)
        recorder = Recorder(path, FakeSource([], known, **fake))
        recorder.write(records)
        recorder.close()
        return path

    return make


@pytest.fixture
def stitch(srcip):
    """Run 'srcip stitch -o json'; return the exit code, the paths, the summary, the messages."""

    def run(*arguments, cluster=CLUSTER):
        code, out, err = srcip("stitch", *arguments, *cluster, "-o", "json")
        *paths, summary = map(json.loads, out.splitlines())
        assert summary["kind"] == "summary"
        assert all(path["kind"] == "path" for path in paths)
        return code, paths, summary, err

    return run


def nodes(path):
    return [each["node"] for each in path["nodes"]]


def test_two_halves(record, stitch):
    """S3 from two recordings, in any order, is one path; node1's guess is proved."""
    first, second = s3()
    files = [record("node1", second, accept(MS)), record("node2", first)]
    for order in itertools.permutations(files):
        code, (path,), summary, err = stitch(*order)
        assert (code, err) == (0, "")
        assert nodes(path) == ["node2", "node1"]
        assert (path["orig"]["src"], path["seen_source"]) == (world.CLIENT, world.NODE2)
        assert (path["verdict"], path["cause"]) == ("replaced", "external-traffic-policy-cluster")
        assert path["at"] == {"node": "node2"}
        assert path["backend"]["pod"] == "default/p11"
        assert path["accepted"] == {"address": world.NODE2, "port": 61234}
        assert [each["verdict"] for each in path["nodes"]] == ["replaced", "replaced-upstream"]
        assert "proof: node1 received the connection from 10.240.0.5 port 61234" in path["evidence"]
        assert (summary["connections"], summary["drops"]) == (1, 0)
        assert not {"missing", "notes", "clock_offsets"} & (path.keys() | summary.keys())


def test_behind_a_proxy(record, stitch, srcip):
    """
    Of recordings that hold what proxies declare, each connection still makes its path, with the
    client that a trusted proxy names, however long it waited.
    """
    first, second = s3()
    told = replace(info("node2"), has_proxy_headers=True)
    declared = samples.declared_bytes(
        replace(
            samples.word().declared,
            ktime_ns=START_NS + S,
            netns=NETNS["node2"],
            flow=flow(world.CLIENT, 40000, world.NODE2, 30080),
        )
    )
    silent = s3(2 * MS, port=40001, snat_port=61235)[0]
    node2 = record("node2", first, silent, declared, of=told)
    node1 = record("node1", second, of=replace(info("node1"), has_proxy_headers=True))
    code, paths, summary, _ = stitch(node1, node2, f"--trusted-proxy={world.CLIENT}")
    assert (code, summary["connections"]) == (0, 2)
    proxied, other = paths
    assert (nodes(proxied), nodes(other)) == (["node2", "node1"], ["node2"])
    assert (proxied["verdict"], other["verdict"]) == ("proxied", "replaced")
    assert proxied["proxy"]["client"]["address"] == "198.51.100.7"
    _, out, _ = srcip("stitch", node1, node2, f"--trusted-proxy={world.CLIENT}", *CLUSTER)
    heading, row, _ = out.splitlines()
    client = row[heading.index("CLIENT") :]
    assert client.startswith(f"198.51.100.7:56324 via {world.CLIENT}:40000 ")
    preview = (
        "default/nodeport",
        "--set",
        "externalTrafficPolicy=Local",
        "--from-recording",
        node2,
    )
    _, out, _ = srcip("explain", *preview, *CLUSTER, "-o", "json")
    (shown,) = [line for line in map(json.loads, out.splitlines()) if line["kind"] == "preview"]
    assert shown["clients_made_visible"] == [{"address": world.CLIENT, "connections": 2}]


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_what_another_node_has_read_of_a_proxy(record, stitch, is_before, order):
    """
    Whom a backend expects a header of shows on the node that the proxy's connection goes through:
    it holds for what comes later on other nodes, whichever recording is named first.
    """

    def made(node, client, at_ns, **changes):
        there = flow(client, 40000, world.P11, 8080)
        declared = replace(
            samples.word().declared, ktime_ns=START_NS + at_ns + MS, netns=NETNS[node], flow=there
        )
        return (
            entry(node, there, there.inverted, at_ns=at_ns, status=Status(0)),
            samples.declared_bytes(replace(declared, **changes)),
        )

    bypassing_ns = S if is_before else -S
    node2 = record(
        "node2",
        *made("node2", world.CLIENT, 0),
        of=replace(info("node2"), has_proxy_headers=True),
    )
    node1 = record(
        "node1",
        *made("node1", world.P12, bypassing_ns, clients=(), opening=Opening.HTTP),
        of=replace(info("node1"), has_proxy_headers=True),
    )
    files = [node1, node2][::order]
    _, paths, _, _ = stitch(*files, f"--trusted-proxy={world.CLIENT}")
    (bypassing,) = [path for path in paths if path["orig"]["src"] == world.P12]
    assert ("missing" in bypassing["proxy"]) is is_before


def test_halves_missing(record, stitch):
    """With one of the recordings, the path says what it lacks."""
    first, second = s3()
    _, (path,), _, _ = stitch(record("node2", first))
    assert path["missing"] == [
        "what happened on node1, where the backend default/p11 runs: it was not traced"
    ]
    _, (path,), _, _ = stitch(record("node1", second))
    assert path["missing"] == [
        "what happened before node1: 10.240.0.5 belongs to node2, which was not traced"
    ]
    assert path["verdict"] == "replaced-upstream"
    # Traced, but it did not record just this.
    other, _ = s3(port=1, snat_port=1)
    _, paths, _, _ = stitch(record("node1", second), record("node2", other))
    (path,) = (path for path in paths if path["verdict"] == "replaced-upstream")
    assert path["missing"] == [
        "what happened before node1: 10.240.0.5 belongs to node2, which did not report the "
        "connection"
    ]


def test_the_same_recording_twice(record, stitch):
    """A recording given twice makes no path twice, and the summary says so."""
    first, second = s3()
    one, two = record("node1", second, accept(MS)), record("node2", first)
    _, (path,), summary, _ = stitch(one, two, one, two)
    assert nodes(path) == ["node2", "node1"]
    assert summary["notes"] == ["2 connections were in two recordings of one node"]


def test_two_tracers_of_one_node(record, stitch):
    """Two tracers that ran on a node at once see one connection some microseconds apart."""
    first, second = s3()
    again, _ = s3(at_ns=4000)
    files = [record("node1", second), record("node2", first)]
    of = info("node2")
    _, paths, _, _ = stitch(*files, record("other", again, of=of))
    assert [nodes(path) for path in paths] == [["node2", "node1"]]


def many(count, *, every_ns=100 * MS):
    pairs = [s3(i * every_ns, port=40000 + i, snat_port=20000 + i) for i in range(count)]
    return [each for each, _ in pairs], [each for _, each in pairs]


@pytest.mark.parametrize("behind_ns", [60 * S, -3 * S, 3600 * S])
def test_clocks_differ(record, stitch, behind_ns):
    """However far a clock is off, the offset is found, corrected and reported."""
    first, second = many(10)
    files = [record("node2", *first), record("node1", *second, behind_ns=behind_ns)]
    for order in itertools.permutations(files):
        code, paths, summary, _ = stitch(*order)
        assert code == 0
        assert [nodes(path) for path in paths] == [["node2", "node1"]] * 10
        # node1 is the first by name, so node2 follows it.
        assert summary["clock_offsets"] == {"node2": pytest.approx(-behind_ns / S, abs=0.001)}
        (note,) = summary["notes"]
        how = "ahead of" if behind_ns > 0 else "behind"
        assert note.startswith("the clock of node2 was ")
        assert (
            f" s {how} that of node1 (measured by 10 connections); its times were corrected" in note
        )


def test_clock_that_is_told(record, stitch):
    """A clock offset that the user gives stays, and the others follow it."""
    first, second = s3()
    files = [record("node2", first), record("node1", second, behind_ns=60 * S)]
    _, paths, summary, _ = stitch(*files)
    assert len(paths) == 2  # one connection says nothing of a clock
    _, paths, summary, _ = stitch(*files, "--clock-offset", "node1=60")
    assert [nodes(path) for path in paths] == [["node2", "node1"]]
    assert summary["clock_offsets"] == {"node1": 60.0}
    _, paths, _, _ = stitch(*files, "--window", "61")
    assert len(paths) == 1
    first, second = many(10)
    files = [record("node2", *first), record("node1", *second, behind_ns=60 * S)]
    _, paths, summary, _ = stitch(*files, "--clock-offset", "node2=-60")
    assert len(paths) == 10
    assert summary["clock_offsets"] == {"node2": -60.0}


def test_ports_that_come_back(record, stitch):
    """The same tuples again within the window: halves that are nearest belong together."""
    pairs = [s3(i * S) for i in range(5)]
    first, second = ([pair[i] for pair in pairs] for i in range(2))
    _, paths, _, _ = stitch(record("node2", *first), record("node1", *second))
    assert [nodes(path) for path in paths] == [["node2", "node1"]] * 5
    assert len({path["time"] for path in paths}) == 5


def test_drops(record, stitch):
    """A connection that ended on the second node is one path with its drop."""
    first, _ = s3()
    inside = flow(world.NODE2, 61234, world.P11, 8080)
    drop = samples.drop(packet=inside, orig=inside, netns=NETNS["node1"], ktime_ns=START_NS + MS)
    files = record("node2", first), record("node1", samples.drop_bytes(drop))
    _, (path,), summary, _ = stitch(*files)
    assert (nodes(path), path["verdict"]) == (["node2", "node1"], "dropped")
    assert (summary["connections"], summary["drops"]) == (0, 1)
    assert "seen_source" not in path


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        (["--filter-client", world.CLIENT], 1),
        (["--filter-client", "192.0.2.1"], 0),
        (["--filter-backend", world.P11, "--filter-proto", "tcp"], 1),
        (["--filter-port", "30080"], 1),
        (["--filter-port", "8080"], 1),
        (["--filter-verdict", "replaced"], 1),
        # The whole path's verdict, not that of the second node.
        (["--filter-verdict", "replaced-upstream"], 0),
        (["--filter-cause", "external-traffic-policy-cluster"], 1),
        (["--filter-service", "default/nodeport"], 1),
        (["--filter-service", "default/other"], 0),
    ],
)
def test_filters(record, stitch, filters, count):
    """Filters hold for whole paths."""
    first, second = s3()
    _, paths, summary, _ = stitch(record("node2", first), record("node1", second), *filters)
    assert len(paths) == summary["connections"] == count
    assert all(nodes(path) == ["node2", "node1"] for path in paths)


@pytest.mark.parametrize(
    ("expect", "filters", "code"),
    [
        ("replaced", [], 0),
        ("replaced-upstream", [], 3),
        ("replaced", ["--filter-port", "1"], 4),
    ],
)
def test_expect(record, stitch, expect, filters, code):
    """--expect is about paths."""
    first, second = s3()
    files = record("node2", first), record("node1", second)
    assert stitch(*files, "--expect", expect, *filters)[0] == code


def test_count(record, stitch):
    """--count stops after so many paths."""
    first, second = many(10)
    files = record("node2", *first), record("node1", *second)
    _, paths, summary, _ = stitch(*files, "--count", 3)
    assert len(paths) == summary["connections"] == 3


def test_damage(record, stitch):
    """From a truncated recording all good records are used; one line says so, and exit 1."""
    first, second = many(10)
    files = record("node2", *first), record("node1", *second)
    data = files[1].read_bytes()
    files[1].write_bytes(data[: len(data) - 300])
    code, paths, summary, err = stitch(*files)
    assert code == 1
    assert len(paths) == 10
    whole = [len(path["nodes"]) for path in paths].count(2)
    assert 0 < whole < 10
    (line,) = summary["not_seen"]
    assert line.startswith(f"recording {files[1]} is cut off after {whole} records")
    assert err == f"srcip: {line}\n"


def test_what_is_no_recording(record, srcip, tmp_path):
    """A file that is no recording is one line, before anything is read."""
    file = tmp_path / "evil\x1b[2J"
    file.write_text("#!/bin/sh\n")
    code, out, err = srcip("stitch", record("node2", s3()[0]), file)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.removesuffix("\n").isprintable()


def test_strangers(record, srcip):
    """A clock of a node that is in no recording is wrong usage."""
    file = record("node2", s3()[0])
    code, _, err = srcip("stitch", file, "--clock-offset", "node7=1")
    assert code == 2
    assert "--clock-offset node7: no recording is of that node; they are of node2" in err
    for text in ("node2", "node2=", "=1", "node2=x", "node2=nan", "node2=1e99", "node2=inf"):
        assert srcip("stitch", file, "--clock-offset", text)[0] == 2


def test_what_can_be_read_once(record, stitch, tmp_path):
    """A pipe is read once: its clock is not compared, and the rest works."""
    first, second = s3()
    one, two = record("node2", first), record("node1", second)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pid = os.fork()
    if pid == 0:
        pipe.write_bytes(one.read_bytes())
        os._exit(0)
    _, paths, summary, _ = stitch(pipe, two)
    os.waitpid(pid, 0)
    assert [nodes(path) for path in paths] == [["node2", "node1"]]
    assert summary["notes"] == [f"{pipe} can be read only once: its clock was not compared"]


def test_table(record, srcip):
    """A row of the table names the nodes on the way, and where the source was replaced."""
    first, second = s3()
    one, two = record("node2", first), record("node1", second)
    code, out, err = srcip("stitch", one, two, *CLUSTER)
    heading, row = out.splitlines()
    assert code == 0
    at = heading.index("THROUGH")
    assert row[at:].startswith("node2 (SNAT) -> node1 ")
    assert "default/p11:8080" in row
    assert err == "1 connection, 0 drops; lost: nothing\n"
    _, out, _ = srcip("stitch", one, *CLUSTER, "--explain")
    assert "node2 (SNAT) -> (node1)" in out
    assert "not seen what happened on node1" in out
    _, out, _ = srcip("stitch", two, *CLUSTER)
    assert "(?) -> node1" in out


def test_diagram(record, srcip):
    """The picture shows both nodes."""
    first, second = s3()
    _, out, _ = srcip("stitch", record("node1", second), record("node2", first), "-o", "diagram",
                      *CLUSTER)  # fmt: skip
    assert "client --> node2 --> node1 --> default/p11" in out
    assert "SNAT at node2" in out


def test_losses_add_up(record, stitch):
    """What each tracer lost is added up."""
    first, second = s3()
    files = (
        record("node2", first, lost={"ring_full": 2}),
        record("node1", second, b"nonsense", lost={"ring_full": 3}),
    )
    _, _, summary, _ = stitch(*files)
    assert summary["lost"] == {"ring_full": 5, "undecodable": 1}


def test_memory_is_bounded(record, stitch, monkeypatch):
    """Paths outside the window are returned while the recordings are still being read."""
    held = []
    take = Joiner.take

    def measured(joiner, before_ns=None):
        held.append(joiner._held)
        return take(joiner, before_ns)

    monkeypatch.setattr(Joiner, "take", measured)
    first, second = many(5000)
    _, paths, _, _ = stitch(record("node2", *first), record("node1", *second))
    assert len(paths) == 5000
    # Two batches of a thousand, and what lies within the window.
    assert max(held) < 3000


# Clocks, by themselves.


def batches(*records):
    return lambda: [list(records)]


def test_clocks_go_from_node_to_node():
    """node3 shares connections with node1 alone, node1 with node2: each is set by the last."""
    first, second = many(5)
    onward = [
        (
            entry("node1", flow("192.0.2.1", i, world.NODE1, 30080),
                  flow("10.244.3.3", 8080, world.NODE1, i), at_ns=i * MS),
            entry("node3", flow(world.NODE1, i, "10.244.3.3", 8080),
                  flow("10.244.3.3", 8080, world.NODE1, i), at_ns=i * MS),
        )
        for i in range(1, 5)
    ]  # fmt: skip
    recordings = [
        (info("node3", behind_ns=5 * S), batches(*(each for _, each in onward))),
        (info("node1", behind_ns=2 * S), batches(*second, *(each for each, _ in onward))),
        (info("node2"), batches(*first)),
    ]
    for order in itertools.permutations(recordings):
        found = clocks.compare(order, {})
        assert {node: round(ns / S, 3) for node, ns in found.offsets_ns.items()} == {
            "node2": -2.0,
            "node3": 3.0,
        }
    found = clocks.compare(recordings, {"node2": 0})
    assert {node: round(ns / S, 3) for node, ns in found.offsets_ns.items()} == {
        "node1": 2.0,
        "node3": 5.0,
    }


def test_nodes_of_one_recording_share_a_clock():
    """A process that traced two namespaces has one clock: both are corrected alike."""
    first, second = many(5)
    lost = entry(
        "node3", flow("192.0.2.1", 1, "192.0.2.2", 2), flow("192.0.2.2", 2, "192.0.2.1", 1)
    )
    found = clocks.compare(
        [
            (info("node1"), batches(*second)),
            (info("node2", "node3", behind_ns=4 * S), batches(*first, lost)),
        ],
        {},
    )
    assert {node: round(ns / S, 3) for node, ns in found.offsets_ns.items()} == {
        "node2": 4.0,
        "node3": 4.0,
    }


def test_tuples_that_came_back_do_not_mislead():
    """Tuples that were reused on another day do not move the median."""
    first, second = many(20)
    late = [
        each for i in range(5) for each in s3(S * 86400, port=50000 + i, snat_port=30000 + i)[1:]
    ]
    early = [each for i in range(5) for each in s3(0, port=50000 + i, snat_port=30000 + i)[:1]]
    found = clocks.compare(
        [
            (info("node1", behind_ns=7 * S), batches(*second, *late)),
            (info("node2"), batches(*first, *early)),
        ],
        {},
    )
    assert round(found.offsets_ns["node2"] / S, 3) == -7.0


def test_few_connections_say_nothing():
    """Two connections, or connections that disagree, are no reason to correct a clock."""
    first, second = many(2)
    recordings = [(info("node1", behind_ns=S), batches(*second)), (info("node2"), batches(*first))]
    assert clocks.compare(recordings, {}).offsets_ns == {}
    pairs = [
        (s3(0, port=i, snat_port=i)[0], s3(i * 100 * S, port=i, snat_port=i)[1]) for i in range(9)
    ]
    first, second = ([pair[i] for pair in pairs] for i in range(2))
    recordings = [(info("node1"), batches(*second)), (info("node2"), batches(*first))]
    assert clocks.compare(recordings, {}).offsets_ns == {}


def test_small_differences_stay():
    """Transit time is not a clock's offset."""
    first, second = many(10)
    recordings = [
        (info("node1", behind_ns=2 * MS), batches(*second)),
        (info("node2"), batches(*first)),
    ]
    assert clocks.compare(recordings, {}) == clocks.Clocks()


def test_the_sample_is_bounded(monkeypatch):
    """With many tuples the same part of each recording is looked at, and that is enough."""
    monkeypatch.setattr(clocks, "_ROOM", 200)
    first, second = many(3000, every_ns=MS)
    random.Random(1).shuffle(second)
    found = clocks.compare(
        [(info("node1", behind_ns=7 * S), batches(*second)), (info("node2"), batches(*first))], {}
    )
    assert round(found.offsets_ns["node2"] / S, 3) == -7.0


@given(st.lists(st.binary(max_size=200)))
def test_any_bytes(records):
    """Malformed records are skipped."""
    assert clocks.compare([(info("node1"), batches(*records))], {}) == clocks.Clocks()
