"""Where whole paths go: the options, and several at once."""

import sys
from contextlib import closing

import click
import pytest
from click.testing import CliRunner

from tests.unit import paths
from tests.unit.otlp_receiver import HttpReceiver
from tracer.commands.sinks import path_sinks, sink_options
from tracer.errors import TracerError


def run(*arguments, make=paths.s5):
    """Run a command that has the options, and writes one path; return what was lost."""
    lost = []

    @click.command()
    @sink_options
    def command(**parameters):
        with path_sinks(parameters) as sinks:
            assert not parameters
            sinks.start()
            sinks.write(make())
            assert bool(sinks) is bool(arguments)
            lost.append(sinks.close())

    outcome = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return lost[0]


def test_none():
    """Without an option there is no sink, and nothing to lose."""
    assert run() == {}


def test_both(tmp_path):
    """A picture and a trace are made of the same path."""
    with closing(HttpReceiver()) as receiver:
        lost = run("--diagram-file", str(tmp_path / "x.svg"), "--otlp", receiver.url)
        assert len(receiver.received.wait_for(1)) == 1
    assert lost == {"otlp_queue_full": 0, "otlp_failed": 0}
    assert "source kept" in (tmp_path / "x.svg").read_text()


def test_endpoint_of_the_environment(monkeypatch):
    """Without a value the receiver is the one that OpenTelemetry's variables name."""
    with closing(HttpReceiver()) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        run("--otlp")
        assert len(receiver.received.wait_for(1)) == 1


def test_file_that_cannot_be_made():
    """A file in a directory that is not there is one clear line."""
    with pytest.raises(TracerError, match=r"cannot write /nowhere/x\.svg: No such file"):
        run("--diagram-file", "/nowhere/x.svg")


def test_without_opentelemetry(monkeypatch):
    """Without the extra, one line says what to install."""
    monkeypatch.delitem(sys.modules, "exporters.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(TracerError, match=r"pip install 'srcip\[otlp\]'"):
        run("--otlp", "http://127.0.0.1:1")


def test_sinks_are_closed(tmp_path):
    """Even after an error the file is complete."""
    with pytest.raises(ZeroDivisionError):
        run("--diagram-file", str(tmp_path / "x.svg"), make=lambda: 1 / 0)
    assert "no path was seen" in (tmp_path / "x.svg").read_text()
