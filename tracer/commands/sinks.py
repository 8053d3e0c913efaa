"""Where whole paths go besides standard output: an SVG file, an OpenTelemetry receiver."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path as File
from typing import Any, Protocol

import click

from exporters.svg_file import SvgFile
from tracer.commands.options import together
from tracer.commands.output import Writer
from tracer.errors import TracerError
from tracer.judge.path import Path
from tracer.judge.verdict import Judged, Summary


class PathSink(Protocol):
    """Takes whole paths as they arrive."""

    def start(self) -> None:
        """Start; called after privileges are dropped."""

    def write(self, path: Path) -> None:
        """Take a path, without blocking."""

    def close(self) -> Mapping[str, int]:
        """Finish, and return how many paths were lost, by place."""


class PathSinks:
    """All sinks of a run as one."""

    def __init__(self, sinks: list[PathSink]) -> None:
        self._sinks = sinks
        self._lost: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether there is any sink."""
        return bool(self._sinks)

    def beside(self, writer: Writer) -> Writer:
        """Return a writer that also feeds the sinks, and adds their losses to the summary."""
        return _Beside(writer, self) if self else writer

    def start(self) -> None:
        """Start all; called after privileges are dropped."""
        for sink in self._sinks:
            sink.start()

    def write(self, path: Path) -> None:
        """Hand a path to each sink."""
        for sink in self._sinks:
            sink.write(path)

    def close(self) -> Mapping[str, int]:
        """Finish all, and return how many paths were lost, by place. May be called again."""
        while self._sinks:
            self._lost |= self._sinks.pop().close()
        return self._lost


class _Beside:
    """Writes, and also hands paths to the sinks."""

    def __init__(self, writer: Writer, sinks: PathSinks) -> None:
        self._writer = writer
        self._sinks = sinks

    def write(self, judged: Judged | Path) -> None:
        self._writer.write(judged)
        if isinstance(judged, Path):
            self._sinks.write(judged)

    def end(self, summary: Summary) -> None:
        self._writer.end(replace(summary, lost={**summary.lost, **self._sinks.close()}))


sink_options = together(
    click.option(
        "--diagram-file",
        type=click.Path(dir_okay=False, path_type=File),
        metavar="FILE",
        help="Also draw the first paths as an SVG picture into FILE.",
    ),
    click.option(
        "--otlp",
        metavar="[ENDPOINT]",
        is_flag=False,
        flag_value="",
        help="Also send each path as a trace to the OpenTelemetry receiver at ENDPOINT, such as"
        " http://collector:4318. Without ENDPOINT: as the OTEL_EXPORTER_OTLP_* variables say.",
    ),
)


@contextmanager
def path_sinks(parameters: dict[str, Any]) -> Iterator[PathSinks]:
    """
    Take ``--diagram-file`` and ``--otlp`` out of a command's parameters, and open what they name.

    Raises:
        TracerError: If a file cannot be created, or OpenTelemetry is not installed.
    """
    file: File | None = parameters.pop("diagram_file")
    target: str | None = parameters.pop("otlp")
    sinks: list[PathSink] = []
    with ExitStack() as stack:
        if file is not None:
            sinks.append(_svg_file(file))
        if target is not None:
            sinks.append(_otlp(target))
        combined = PathSinks(sinks)
        stack.callback(combined.close)
        yield combined


def _svg_file(file: File) -> PathSink:
    try:
        stream = file.open("w", encoding="utf-8")
    except OSError as error:
        raise TracerError(f"cannot write {file}: {error.strerror}") from error
    return SvgFile(stream)


def _otlp(target: str) -> PathSink:
    # OpenTelemetry is an optional dependency that takes 20 MB of memory.
    try:
        otlp = import_module("exporters.otlp")
    except ImportError as error:
        raise TracerError(
            f"--otlp needs OpenTelemetry, which is not installed ({error.name} is missing): "
            "pip install 'srcip[otlp]'"
        ) from error
    sink: PathSink = otlp.OtlpSink(otlp.span_exporter(target))
    return sink
