"""Whatever a path holds, it can be drawn, sent and reported."""

from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from exporters import otlp
from exporters.diagram import diagram_lines
from exporters.otlp_ids import link_ids, parent_id, trace_id
from exporters.otlp_spans import node_span
from exporters.report import Report
from tests.unit import paths, samples
from tests.unit.pictures import path_svg
from tracer.cluster.match import PodRef
from tracer.judge.path import (
    Device,
    Direction,
    Ending,
    Leg,
    Passage,
    Path,
    PathHop,
    Translated,
    Translation,
)
from tracer.judge.verdict import SeenAccept, Summary, Verdict
from tracer.model import ClientClass

_names = st.text(max_size=20)
_times = st.integers(0, 2**64) | st.sampled_from([0, 2**63, 2**64, 2**65])
_ends = st.tuples(samples.ipv4 | samples.ipv6, st.none() | st.integers(0, 65535))
_pods = st.builds(PodRef, _names, _names, st.none() | _names)
_devices = st.builds(Device, name=_names, kind=st.none() | _names, pod=st.none() | _pods)
_translations = st.builds(
    Translation,
    by=st.sampled_from(Translated),
    is_source=st.booleans(),
    before=_ends,
    after=_ends,
)
_hops = st.builds(
    PathHop,
    hop=samples.hops(),
    time_ns=_times,
    device=st.none() | _devices,
    translations=st.lists(_translations, max_size=2).map(tuple),
)
_drops = st.sampled_from([paths.s6().drop, samples.explained_drop(hook=None, cause=None)])
_passages = st.builds(
    Passage,
    direction=st.sampled_from(Direction),
    number=st.integers(1, 100),
    hops=st.lists(_hops, max_size=4).map(tuple),
    ending=st.sampled_from(Ending),
    drop=st.none() | _drops,
)


def _judged(verdict, client_class, orig, reply):
    return paths.judged("node1", orig, reply, verdict, client_class=client_class)


_entries = st.builds(
    _judged, st.sampled_from(Verdict), st.none() | st.sampled_from(ClientClass), samples.tuples,
    samples.tuples,
)  # fmt: skip
_legs = st.builds(
    Leg,
    node=_names,
    netns=st.integers(0, 2**32 - 1),
    time_ns=_times,
    orig=samples.tuples,
    reply=st.none() | samples.tuples,
    judged=st.none() | _entries,
    passages=st.lists(_passages, max_size=3).map(tuple),
    drop=st.none() | _drops,
)
_paths = st.builds(
    Path,
    legs=st.lists(_legs, min_size=1, max_size=3).map(tuple),
    accept=st.none() | st.builds(SeenAccept, accept=samples.accepts, time_ns=_times),
    missing=st.lists(_names, max_size=2).map(tuple),
)


@given(_paths, st.booleans(), st.integers(40, 200))
@settings(max_examples=60)
def test_diagram(path, is_detailed, width):
    """A diagram has printable lines of bounded width."""
    for line in diagram_lines(path, is_detailed=is_detailed, width=width):
        assert line.isprintable()
        assert len(line) <= width


@given(_paths, st.booleans())
@settings(max_examples=60)
def test_svg(path, is_detailed):
    """A picture is XML."""
    ElementTree.fromstring(path_svg(path, is_detailed=is_detailed))  # noqa: S314 - our own


@given(_paths)
@settings(max_examples=60)
def test_span(path):
    """Spans have valid ids and times, and no empty names."""
    assert 0 < trace_id(path) < 2**128
    link_ids(path)
    for index, leg in enumerate(path.legs):
        parent = parent_id(path, index)
        assert parent is None or 0 < parent < 2**64
        span = node_span(path, leg)
        assert 0 <= span.start_ns <= span.end_ns
        assert span.name
        assert all(span.start_ns <= event.time_ns <= span.end_ns for event in span.events)
    sent = encode_spans(otlp._Spans().of([path])).SerializeToString()
    groups = ExportTraceServiceRequest.FromString(sent).resource_spans
    assert sum(len(s.spans) for group in groups for s in group.scope_spans) == len(path.legs)


@given(st.lists(_paths, max_size=5))
@settings(max_examples=30)
def test_report(some):
    """A report has a row for each."""
    report = Report()
    for path in some:
        report.add(path)
    page = "".join(report.page(Summary(connections=0, drops=0), ["x"]))
    assert page.count("<tr data-verdict") == len(some)
