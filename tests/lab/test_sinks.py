"""Paths of real connections as pictures, traces and a report."""

import re
import signal
from contextlib import ExitStack, closing
from xml.etree import ElementTree

import pytest

from lab import kube_proxy, probe
from lab.scenarios import cases
from tests.lab.commands import OPTIONS, PATIENCE_S, srcip, tracing, wait_until
from tests.unit.otlp_receiver import HttpReceiver, attributes

pytestmark = pytest.mark.usefixtures("kernel")
TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture(scope="module")
def s3(lab):
    """Connect as in S3; return what the backend printed."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(scenarios=["S3"], modes=["iptables"], families=["ipv4"], protos=["tcp"])

    def run():
        (answer,) = probe.run(lab, chosen).values()
        return answer

    return run


def end(process, output):
    """End a trace once it has shown the connection; return what it said."""
    wait_until(output.read_text)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    return said


def test_two_tracers_make_one_trace(lab, s3, tmp_path):
    """Tracers that know nothing of each other make one trace; their recordings make one path."""
    with closing(HttpReceiver()) as receiver, ExitStack() as stack:
        running, recordings = [], []
        for node in ("node2", "node1"):
            directory = tmp_path / node
            directory.mkdir()
            arguments = ["--otlp", receiver.url, "--packets", "1", "--filter-proto", "tcp"]
            recordings.append(str(directory / f"{node}.srcip"))
            arguments += ["--record", recordings[-1]]
            tracer = tracing(lab, directory, *arguments, nodes=[node])
            running.append(stack.enter_context(tracer))
        answer = s3()
        said = [end(*each) for each in running]
        received = receiver.received.wait_for(2)
    assert all("lost: nothing" in text for text in said)
    spans = {resource["k8s.node.name"]: span for resource, span in received}
    assert spans.keys() == {"node1", "node2"}
    first, second = spans["node2"], spans["node1"]
    assert first.trace_id == second.trace_id
    assert second.parent_span_id == first.span_id
    assert first.parent_span_id == b""
    told = attributes(first.attributes)
    assert told["srcip.seen_source"] == str(answer.client_address)
    assert told["client.port"] == answer.local[1]
    for span in (first, second):
        events = [attributes(event.attributes) for event in span.events]
        assert {event["srcip.direction"] for event in events} == {"original", "reply"}
    assert next(event.name for event in first.events) == "tc_ingress"
    check_report(recordings, tmp_path, answer)


def check_report(recordings, directory, answer):
    """The report on recordings of the nodes has one path over both."""
    page = directory / "report.html"
    made = srcip("report", *recordings, "-o", str(page), *OPTIONS)
    assert made.returncode == 0, made.stderr
    text = page.read_text()
    assert f"<td>{answer.local[0]}:{answer.local[1]}</td>" in text
    assert "<td>node2, node1</td>" in text
    assert "postrouting after NAT" in text


def test_receiver_that_is_away(lab, s3, tmp_path, monkeypatch):
    """A missing receiver disturbs nothing; what it did not get is in the summary."""
    # The end of a run waits no longer for it than this.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with tracing(lab, tmp_path, "--otlp", "http://127.0.0.1:1") as (process, output):
        s3()
        said = end(process, output)
    assert "otlp_failed" in said
    assert "external-traffic-policy-cluster" in output.read_text()


PICTURES = {
    "S1": ["default/p12 --> node1 --> default/p11", "source kept"],
    "S2": ["default/p21 --> node2 --> node1 --> default/p11", "source kept"],
    "S3": ["client --> node2 --> node1 --> default/p11", "SNAT at node2"],
    "S4": ["client --> node1 --> default/p11", "SNAT at node1"],
    "S5": ["client --> node1 --> default/p11", "source kept"],
    "S6": ["client --> node2: X (dropped, no-local-endpoint)", ""],
    "S12": ["default/p11 --> node1 --> default/p11", "SNAT at node1"],
    "S14b": ["process --> node2 --> node1 --> default/p11", "SNAT at node2"],
    "S15b": ["client --> node1: X (dropped, no-endpoints)", ""],
    "S16b": ["client --> node1: X (dropped, source-ranges)", ""],
    "S19b": ["default/p21 --> node2: X (dropped, no-local-endpoint)", ""],
}


@pytest.mark.parametrize("mode", kube_proxy.MODES)
def test_pictures_of_the_tutorial(lab, mode, tmp_path):
    """Each connection is drawn as the tutorial draws it, in both modes."""
    kube_proxy.load(lab, mode)
    chosen = cases(scenarios=list(PICTURES), modes=[mode], families=["ipv6"], protos=["tcp"])
    options = ["-o", "diagram", "--filter-proto", "tcp"]
    with tracing(lab, tmp_path, *options) as (process, output):
        answers = probe.run(lab, chosen)
        wait_until(lambda: len(drawn(output)) >= len(answers))
        end(process, output)
    for case, answer in answers.items():
        sent = f"[{answer.local[0]}]:{answer.local[1]} -> "
        (picture,) = [lines for lines in drawn(output) if sent in "".join(lines)]
        assert [line.strip() for line in picture[:2]] == PICTURES[case.scenario.id]


def drawn(output):
    """Return the diagrams in a file, as lines."""
    parts = re.split(r"^(?=\S.* --> )", output.read_text(), flags=re.MULTILINE)
    return [part.splitlines() for part in parts if part]


def test_picture_and_report(lab, s3, tmp_path):
    """The picture, and the report made of the recording, show one path over both nodes."""
    picture, recording = tmp_path / "x.svg", tmp_path / "night.srcip"
    options = ["--diagram-file", str(picture), "--record", str(recording), "--filter-proto", "tcp"]
    with tracing(lab, tmp_path, "-o", "diagram", *options) as (process, output):
        answer = s3()
        end(process, output)
    texts = [each.text for each in ElementTree.parse(picture).getroot().iter(TEXT)]  # noqa: S314
    client = f"{answer.local[0]}:{answer.local[1]}"
    for text in ("node2", "node1", "default/p11", client):
        assert text in texts
    assert any(text.startswith(f"SNAT to {answer.client_address}:") for text in texts)
    assert "client --> node2 --> node1 --> default/p11" in output.read_text()
    check_report([str(recording)], tmp_path, answer)
