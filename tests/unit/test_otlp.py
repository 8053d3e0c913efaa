"""Paths as traces, sent to real OTLP receivers."""

import sys
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SpanExporter

from exporters import otlp
from exporters.otlp import OtlpSink, span_exporter
from exporters.otlp_ids import link_ids, parent_id, span_id, trace_id
from exporters.otlp_spans import node_span
from tests.unit import paths, samples
from tests.unit.otlp_receiver import GrpcReceiver, HttpReceiver, attributes
from tracer.errors import TracerError
from tracer.judge.path import Path


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Send soon, and give a busy machine time."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")


@pytest.fixture
def impatient(monkeypatch):
    """Try a second, and again soon."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setattr(otlp, "_PAUSE_S", 0.05)


@pytest.fixture
def receiver():
    with closing(HttpReceiver()) as receiver:
        yield receiver


def started(url):
    sink = OtlpSink(span_exporter(url))
    sink.start()
    return sink


def half(path, index):
    """Return what the process on one node knows of a path."""
    return replace(path, legs=(path.legs[index],), accept=None)


# Ids


@pytest.mark.parametrize("make", [paths.s3, paths.s3_ipv6, paths.s3_without_hops])
def test_halves_make_one_trace(make):
    """Two nodes that know nothing of each other, and one process that sees both, agree on ids."""
    path = make()
    first, second = half(path, 0), half(path, 1)
    assert trace_id(first) == trace_id(second) == trace_id(path)
    assert [span_id(leg) for leg in path.legs] == [
        span_id(first.legs[0]),
        span_id(second.legs[0]),
    ]
    assert parent_id(first, 0) is parent_id(path, 0) is None
    assert parent_id(second, 0) == parent_id(path, 1) == span_id(first.legs[0])
    assert span_id(first.legs[0]) != span_id(second.legs[0])


def test_two_translations():
    """If two nodes translate, the nodes after the second share its trace; a link leads back."""
    path = paths.three_nodes()
    edge, middle, last = (half(path, index) for index in range(3))
    assert trace_id(middle) == trace_id(last) == trace_id(path) != trace_id(edge)
    middle = replace(middle, legs=(behind_a_node(middle.legs[0]),))
    assert link_ids(middle) == (trace_id(edge), span_id(edge.legs[0]))
    assert link_ids(edge) is None
    assert link_ids(last) is None


def behind_a_node(leg):
    opinion = replace(leg.judged.opinion, client_class=samples.ClientClass.NODE)
    return replace(leg, judged=replace(leg.judged, opinion=opinion))


def test_nothing_translated():
    """Nodes that only forward share the trace of what they forward, as equals."""
    sent = samples.flow("10.244.2.21", 40000, samples.BACKEND, 8080)
    legs = [
        paths.leg(node, sent, sent.inverted, entry=paths.judged(
            node, sent, sent.inverted, samples.Verdict.PRESERVED
        ))
        for node in ("node2", "node1")
    ]  # fmt: skip
    one, other = (Path(legs=(leg,)) for leg in legs)
    assert trace_id(one) == trace_id(other)
    assert parent_id(one, 0) is parent_id(other, 0) is None
    assert span_id(legs[0]) != span_id(legs[1])


def test_dropped_on_the_second_node():
    """A node that drops what another node translated puts the drop into that node's trace."""
    path = paths.s3()
    dropping = replace(path.legs[1], reply=None, judged=None, drop=paths.s6().drop)
    assert trace_id(Path(legs=(dropping,))) == trace_id(half(path, 0))


def test_ids_are_few_enough_to_tell_apart():
    """Connections that differ in one port, address or protocol are different traces."""
    base = samples.SENT
    others = [
        replace(base, sport=1),
        replace(base, dport=1),
        replace(base, proto=17),
        replace(base, src=base.dst),
        base.inverted,
    ]
    legs = [paths.leg("node2", flow, flow.inverted) for flow in (base, *others)]
    assert len({trace_id(Path(legs=(leg,))) for leg in legs}) == len(legs)


@given(samples.tuples, samples.tuples)
def test_ids_are_valid(orig, reply):
    """Any tuples give ids that OpenTelemetry takes for valid."""
    leg = paths.leg("node", orig, reply)
    assert 0 < trace_id(Path(legs=(leg,))) < 2**128
    assert 0 < span_id(leg) < 2**64


# What arrives


def check_both_halves(url, received):
    path = paths.s3()
    for index in (0, 1):
        sink = started(url)
        sink.write(half(path, index))
        received.wait_for(index + 1)
        assert not any(sink.close().values())
        assert sink.sent == 1
    (resource2, span2), (resource1, span1) = received.wait_for(2)
    assert (resource2["k8s.node.name"], resource1["k8s.node.name"]) == ("node2", "node1")
    assert resource1["service.name"] == "srcip"
    assert span1.trace_id == span2.trace_id
    assert span1.parent_span_id == span2.span_id
    assert span2.parent_span_id == b""
    return span2, span1


def test_http(receiver):
    """Spans of two processes arrive over HTTP, and make one trace."""
    check_both_halves(receiver.url, receiver.received)


def test_grpc(monkeypatch):
    """Spans of two processes arrive over gRPC, and make one trace."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with closing(GrpcReceiver()) as receiver:
        check_both_halves(receiver.url, receiver.received)


def test_attributes(receiver):
    """A span says who sent what, what became of it, and why, with OpenTelemetry's keys and ours."""
    span, _ = check_both_halves(receiver.url, receiver.received)
    assert span.name == "replaced default/nodeport"
    found = attributes(span.attributes)
    expected = {
        "source.address": "198.51.100.10",
        "source.port": 46356,
        "destination.address": "10.240.0.5",
        "destination.port": 30080,
        "network.transport": "tcp",
        "network.type": "ipv4",
        "client.address": "198.51.100.10",
        "client.port": 46356,
        "srcip.out.source.address": "10.240.0.5",
        "srcip.out.destination.address": "10.244.1.11",
        "srcip.verdict": "replaced",
        "srcip.cause": "external-traffic-policy-cluster",
        "srcip.seen_source": "10.240.0.5",
        "srcip.service.namespace": "default",
        "srcip.service.name": "nodeport",
        "srcip.service.via": "nodeport",
        "srcip.service.policy": "Cluster",
        "srcip.client.class": "external",
        "srcip.backend.pod": "default/p11",
        "srcip.backend.node": "node1",
    }
    assert expected.items() <= found.items()


def test_events(receiver):
    """Each hop is an event at its time, with its tuple, mark, device and translation."""
    span, _ = check_both_halves(receiver.url, receiver.received)
    names = [event.name for event in span.events]
    assert names[:7] == [
        "tc_ingress", "prerouting", "prerouting", "forward", "postrouting", "postrouting",
        "tc_egress",
    ]  # fmt: skip
    times = [event.time_unix_nano for event in span.events]
    assert times == sorted(times)
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (times[0], times[-1])
    after_nat = attributes(span.events[2].attributes)
    assert after_nat["srcip.mark"] == 0x4000
    assert after_nat["srcip.stage"] == "after-nat"
    assert after_nat["destination.address"] == "10.244.1.11"
    assert after_nat["srcip.translations"] == ["dnat 10.240.0.5:30080 -> 10.244.1.11:8080"]
    assert attributes(span.events[6].attributes)["srcip.device"] == "eth0"


def test_drop(receiver):
    """A dropped connection is a span with an error and an event that says where."""
    sink = started(receiver.url)
    sink.write(paths.s6())
    ((_, span),) = receiver.received.wait_for(1)
    sink.close()
    assert (span.status.code, span.name) == (2, "dropped default/nodeport-local")
    assert span.status.message == "NETFILTER_DROP at input in nf_hook_slow"
    dropped = [event for event in span.events if event.name == "dropped"]
    assert attributes(dropped[0].attributes)["srcip.reason"] == "NETFILTER_DROP"


@pytest.mark.parametrize("make", [paths.s3_second_half, paths.proxied])
def test_client_that_is_not_known(make):
    """Another node's or a proxy's address is not called the client's."""
    path = make()
    assert "client.address" not in node_span(path, path.legs[0]).attributes


def test_client_that_a_proxy_declares():
    """A client that a trusted proxy names is the client; any other is only declared."""
    path = paths.declared()
    told = node_span(path, path.legs[0]).attributes
    assert (told["client.address"], told["client.port"]) == ("198.51.100.7", 56324)
    assert told["srcip.declared.trusted"] is True
    path = paths.forged()
    told = node_span(path, path.legs[0]).attributes
    assert told["client.address"] == "203.0.113.60"
    assert told["srcip.declared"] == ["198.51.100.7:56324"]
    assert told["srcip.declared.trusted"] is False


@pytest.mark.parametrize("make", paths.ALL.values(), ids=paths.ALL)
def test_every_kind_of_path(receiver, make):
    """Any path arrives, a span for each of its legs."""
    sink = started(receiver.url)
    sink.write(make())
    assert len(receiver.received.wait_for(len(make().legs))) == len(make().legs)
    assert not any(sink.close().values())


@given(st.text())
@settings(max_examples=20, deadline=None)
def test_hostile_names(text):
    """Names that are not valid UTF-8, or contain control characters, are escaped."""
    with closing(HttpReceiver()) as receiver:
        sink = started(receiver.url)
        sink.write(paths.hostile(text))
        sink.write(paths.hostile_drop(text))
        spans = receiver.received.wait_for(3)
        assert not any(sink.close().values())
    for resource, span in spans:
        assert resource["k8s.node.name"].isprintable()
        assert span.name.isprintable()


def test_name_of_the_service(receiver, monkeypatch):
    """Resource attributes from the environment are kept."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.cluster.name=prod")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    sink = started("")
    sink.write(paths.s5())
    ((resource, _),) = receiver.received.wait_for(1)
    sink.close()
    assert (resource["service.name"], resource["k8s.cluster.name"]) == ("ours", "prod")


# What does not arrive


def test_receiver_away_and_back(receiver, impatient, monkeypatch):
    """While no receiver answers, paths wait; when it is back they arrive; none is lost."""
    monkeypatch.setattr(otlp, "_ATTEMPTS", 1000)
    sink = started(receiver.url)
    sink.write(paths.s5())
    receiver.received.wait_for(1)
    receiver.close()
    for _ in range(10):
        sink.write(paths.s5())
    with closing(HttpReceiver(receiver.port)) as again:
        again.received.wait_for(10)
        assert not any(sink.close().values())
    assert sink.sent == 11


def test_queue_full(receiver, monkeypatch):
    """While the receiver does not answer, writing does not block; excess paths are counted."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "3")
    receiver.gate.clear()
    sink = started(receiver.url)
    sink.write(paths.s5())
    receiver.wait_for_request()
    for _ in range(10):
        sink.write(paths.s5())
    receiver.gate.set()
    receiver.received.wait_for(4)
    assert sink.close() == {"otlp_queue_full": 7, "otlp_failed": 0}
    assert sink.sent == 4


@pytest.mark.parametrize("status", [400, 503])
def test_refused(receiver, status, impatient):
    """Spans that the receiver rejects are given up after a few attempts, and counted."""
    receiver.status = status
    sink = started(receiver.url)
    sink.write(paths.s3())
    for _ in range(otlp._ATTEMPTS):
        receiver.wait_for_request()
    assert sink.close() == {"otlp_queue_full": 0, "otlp_failed": 1}
    assert sink.sent == 0


def test_nobody_there(receiver, impatient):
    """The end of a run does not wait for a receiver that is not there; all is counted."""
    receiver.close()
    sink = started(receiver.url)
    for _ in range(5):
        sink.write(paths.s3())
    assert sink.close() == {"otlp_queue_full": 0, "otlp_failed": 5}


def test_exporter_that_breaks(caplog, impatient):
    """An exporter that raises is logged, and what it was given is counted."""

    class Broken(SpanExporter):
        def export(self, spans):
            raise RuntimeError("no such luck")

    sink = OtlpSink(Broken())
    sink.start()
    sink.write(paths.s3())
    sink.write(paths.s5())
    assert sink.close() == {"otlp_queue_full": 0, "otlp_failed": 2}
    assert "no such luck" in caplog.text


def test_never_started():
    """A run that ends before it began has lost what was written."""
    sink = OtlpSink(span_exporter("http://127.0.0.1:1"))
    sink.write(paths.s3())
    assert sink.close() == {"otlp_queue_full": 0, "otlp_failed": 1}


# What is refused at once


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("collector:4318", "not a URL such as http://collector:4318"),
        ("ftp://collector", "not a URL"),
        ("http://", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://collector:99999", "not a URL"),
    ],
)
def test_bad_endpoint(target, complaint):
    """An invalid endpoint is refused in one line."""
    with pytest.raises(TracerError, match=complaint):
        span_exporter(target)


@pytest.mark.parametrize(
    ("protocol", "name", "value"),
    [
        ("http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("grpc", "OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("grpc", "OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
    ],
)
def test_bad_environment(monkeypatch, protocol, name, value):
    """A variable that OpenTelemetry's package cannot read is one line."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv(name, value)
    with pytest.raises(TracerError, match=value):
        span_exporter("")


def test_bad_protocol(monkeypatch):
    """A protocol that is not supported is refused."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(TracerError, match="'http/json' is not supported"):
        span_exporter("")


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_bad_limit(monkeypatch, value):
    """A limit that is not a number above 0 is refused."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", value)
    with pytest.raises(TracerError, match="OTEL_BSP_MAX_QUEUE_SIZE is"):
        OtlpSink(span_exporter("http://127.0.0.1:1"))


@pytest.mark.parametrize(("protocol", "extra"), [("http/protobuf", "otlp"), ("grpc", "otlp-grpc")])
def test_package_that_is_missing(monkeypatch, protocol, extra):
    """Where the protocol's package is not installed, one line says what to install."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    package = "http" if extra == "otlp" else "grpc"
    monkeypatch.setitem(
        sys.modules, f"opentelemetry.exporter.otlp.proto.{package}.trace_exporter", None
    )
    with pytest.raises(TracerError, match=rf"pip install 'srcip\[{extra}\]'"):
        span_exporter("")
