"""The metrics: every number under its name in docs/metrics.md, in both formats."""

import re
import socket
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from exporters.exposition import CounterText, Metrics
from exporters.page_server import PageServer
from exporters.prometheus import ConnectionLabels, DropLabels, Page, Snapshot
from tests.unit.patience import PATIENCE_S
from tracer.commands.serve import MAX_DRAIN_INTERVAL_S
from tracer.errors import TracerError

DOCS = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
SEEN = ConnectionLabels(
    "default", 'we"b\\\n', "nodeport", "Cluster", "replaced", "x", "pod", "ipv4", "tcp"
)
SNAPSHOT = Snapshot(
    version="1.2",
    drained_at_s=1.5e9,
    drain_s=0.25,
    connections={SEEN: 5, SEEN._replace(cause=""): 2**53},
    drops={DropLabels("default", "web", "nodeport", "no-listener", "NO_SOCKET", "ipv4", "tcp"): 7},
    overflow={"srcip_connections_total": 3},
    lost={("drops", "ring_full"): 4},
    undecodable=6,
    untracked=8,
    maps={"paths": (9, 16384)},
    programs={"srcip_mark": (2_500_000_000, 10), "srcip_drop": (0, 0)},
    cluster_objects={"service": 11},
    cluster_age_s=12.5,
    proxy_modes={"node1": "nftables"},
    rung="BPF",
    stream_clients=3,
    not_seen=("this",),
)


def page_of(snapshot):
    page = Page("1.2")
    page.snapshot = snapshot
    return page


def samples(text, parse=text_string_to_metric_families):
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("accept", "parse"),
    [("", text_string_to_metric_families), (OPENMETRICS, parse_openmetrics)],
    ids=["text", "OpenMetrics"],
)
def test_every_number(accept, parse):
    """Prometheus' own parser reads the metrics back."""
    text, content_type = page_of(SNAPSHOT).text(accept)
    assert content_type.startswith(accept.split(";")[0] or "text/plain")
    told = samples(text, parse)

    def value(name, **labels):
        return told[name, frozenset(labels.items())]

    assert value("srcip_connections_total", **SEEN._asdict()) == 5
    assert value("srcip_connections_total", **SEEN._replace(cause="")._asdict()) == 2**53
    assert sum(v for (name, _), v in told.items() if name == "srcip_dropped_packets_total") == 7
    assert value("srcip_series_overflow_total", metric="srcip_connections_total") == 3
    assert value("srcip_series", metric="srcip_connections_total") == 2
    assert value("srcip_lost_records_total", stage="drops", reason="ring_full") == 4
    assert value("srcip_undecodable_records_total") == 6
    assert value("srcip_untracked_packets_total") == 8
    assert value("srcip_map_entries", map="paths") == 9
    assert value("srcip_map_capacity", map="paths") == 16384
    assert value("srcip_program_runs_total", program="srcip_mark") == 10
    assert value("srcip_program_run_seconds_total", program="srcip_mark") == 2.5
    assert value("srcip_cluster_objects", kind="service") == 11
    assert value("srcip_cluster_age_seconds") == 12.5
    assert value("srcip_kube_proxy_info", node="node1", mode="nftables") == 1
    assert value("srcip_rung_info", rung="BPF") == 1
    assert value("srcip_not_seen_info", what="this") == 1
    assert value("srcip_build_info", version="1.2") == 1
    assert value("srcip_drain_timestamp_seconds") == 1.5e9
    assert value("srcip_drain_duration_seconds") == 0.25
    assert value("srcip_ready") == 1
    assert value("process_cpu_seconds_total") > 0
    # Without kernel.bpf_stats_enabled a program has no runs.
    assert ("srcip_program_runs_total", frozenset({("program", "srcip_drop")})) not in told


def test_metrics_are_those_of_the_documentation():
    """docs/metrics.md lists every metric that is exported, with its labels, and no other."""
    told = {}
    for (name, labels), _ in samples(page_of(SNAPSHOT).text("")[0]).items():
        told.setdefault(name, set()).update(key for key, _ in labels)
    listed = {}
    for line in DOCS.splitlines():
        cells = line.split("|")
        if len(cells) > 4 and (name := re.fullmatch(r" `((?:srcip|process)_\w+)` ", cells[1])):
            listed[name[1]] = set(re.findall(r"`(\w+)`", cells[3]))
    for name in re.findall(r"`(process_\w+)`", DOCS):
        listed.setdefault(name, set())
    assert told == listed


def test_help_is_that_of_the_code():
    """Every metric has a help text."""
    text = page_of(SNAPSHOT).text("")[0].decode()
    for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE):
        assert re.search(rf"^# HELP {name} \S.*\.$", text, re.MULTILINE), name


def test_without_a_cluster():
    """What is not known is absent, not zero."""
    told = samples(page_of(Snapshot(version="1")).text("")[0])
    names = {name for name, _ in told}
    assert not names & {"srcip_cluster_age_seconds", "srcip_cluster_objects"}


def test_text_is_made_once():
    """A second scrape gets the same bytes; a new snapshot, new ones."""
    page = page_of(SNAPSHOT)
    assert page.text("")[0] is page.text("")[0]
    before = page.text("")[0]
    page.snapshot = Snapshot(version="2")
    assert page.text("")[0] != before


labels = st.builds(ConnectionLabels, *(st.text(max_size=5) for _ in ConnectionLabels._fields))
totals = st.dictionaries(labels, st.integers(0, 999_999), max_size=5)


@pytest.mark.parametrize(
    "accept", ["", OPENMETRICS, "text/plain; version=1.0.0; escaping=dots"], ids=str
)
@given(st.lists(totals, max_size=4))
def test_lines_that_are_kept_are_the_encoders(accept, rounds):
    """Whatever series come, go and are called, the text equals prometheus_client's."""
    encoder, _ = choose_encoder(accept)
    kept = CounterText(encoder, "a_c", "Help.", ConnectionLabels._fields)
    for each in rounds:
        family = CounterMetricFamily("a_c", "Help.", labels=ConnectionLabels._fields)
        for key, value in each.items():
            family.add_metric(key, value)
        text = encoder(Metrics([family])).removesuffix(b"# EOF\n")
        # It writes them as floats.
        expected = re.sub(rb"\.0$", b"", text, flags=re.MULTILINE)
        assert kept.text(each) == expected


_PAGE = page_of(SNAPSHOT)
_PIECES = st.sampled_from(
    [
        "application/openmetrics-text",
        "text/plain",
        "version=",
        "1.0.0",
        "abc",
        "escaping=",
        ";",
        ",",
    ]
)


@given(st.lists(_PIECES | st.text(max_size=5)).map("".join))
def test_any_accept_header_gets_one_of_two_formats(accept):
    """No Accept header is echoed, and none fills memory."""
    text, content_type = _PAGE.text(accept)
    assert content_type in {_PAGE.text(each)[1] for each in ("", OPENMETRICS)}
    assert text.endswith(b"# EOF\n") is content_type.startswith("application/openmetrics-text")
    assert len(_PAGE._texts) <= 2


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        (OPENMETRICS, True),
        ('application/openmetrics-text;version="1.0.0";q=0.5', True),
        ("application/openmetrics-text", True),
        ("application/vnd.google.protobuf;q=0.7,application/openmetrics-text;version=1.0.0", True),
        ("application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4", False),
        ("application/openmetrics-text;version=abc", False),
        ("application/openmetrics-text; version=1.0.0\r\n x: y", False),
        ("*/*", False),
    ],
)
def test_formats_that_scrapers_ask_for(accept, is_openmetrics):
    """OpenMetrics for clients that accept version 1.0.0, text for all others."""
    content_type = _PAGE.text(accept)[1]
    assert content_type.startswith("application/openmetrics-text") is is_openmetrics
    assert "\n" not in content_type


def test_health():
    """Alive while it drains; ready once nothing is missing."""
    now_s = 1000.0
    page = Page("1", clock_s=lambda: now_s)
    page.snapshot = Snapshot(version="1", drained_at_s=1.5e9, drained_s=900.0)
    assert page.answer("/healthz", "")[::2] == (503, b"no drain for 100 s\n")
    assert page.answer("/readyz", "")[0] == 200
    # Whatever the wall clock says, which may have been set.
    page.snapshot = Snapshot(version="1", drained_at_s=1.5e9, drained_s=950.0, not_ready="objects")
    assert page.answer("/healthz", "")[0] == 200
    assert page.answer("/readyz?verbose", "")[::2] == (503, b"not ready: objects\n")
    assert page.answer("/metric", "")[0] == 404
    assert Page("1").answer("/readyz", "")[0] == 503


def test_health_with_the_longest_interval():
    """An agent that drains as rarely as it may, and then takes its time, is alive."""
    page = Page("1", clock_s=lambda: 2.0 * MAX_DRAIN_INTERVAL_S)
    page.snapshot = Snapshot(version="1", drained_at_s=1.5e9, drained_s=0.0)
    assert page.answer("/healthz", "")[0] == 200


def test_health_of_one_that_never_drains():
    """An agent that hangs before its first drain is not taken for one that starts."""
    times = iter([1000.0, 1179.0, 1181.0])
    page = Page("1", clock_s=lambda: next(times))
    assert page.answer("/healthz", "")[0] == 200
    assert page.answer("/healthz", "")[::2] == (503, b"no drain for 181 s\n")


def test_server():
    """It serves IPv4 and IPv6, and releases its port."""
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
        server = PageServer(page_of(SNAPSHOT), host, 0)
        server.start()
        url = f"http://{shown}:{server.port}/metrics"
        with closing(server), urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            assert b"srcip_connections_total{" in answer.read()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, server.port), timeout=PATIENCE_S)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_bad_address(host):
    """An address that the machine does not have is one line."""
    with pytest.raises(TracerError, match=f"cannot listen on {host} port 1: "):
        PageServer(Page("1"), host, 1)
