"""Where whole paths go beside standard output: a file of pictures, a receiver of traces."""

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
    """Takes whole paths as they come."""

    def start(self) -> None:
        """Begin; privileges are dropped."""

    def write(self, path: Path) -> None:
        """Take one. Does not wait for anything."""

    def close(self) -> Mapping[str, int]:
        """End, and return how many paths were lost, by place."""


class PathSinks:
    """All sinks of a run as one."""

    def __init__(self, sinks: list[PathSink]) -> None:
        self._sinks = sinks
        self._lost: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether anybody wants paths."""
        return bool(self._sinks)

    def beside(self, writer: Writer) -> Writer:
        """Return a writer that hands on paths, and adds to the summary what was lost of them."""
        return _Beside(writer, self) if self else writer

    def start(self) -> None:
        """Begin; privileges are dropped."""
        for sink in self._sinks:
            sink.start()

    def write(self, path: Path) -> None:
        """Hand a path to each."""
        for sink in self._sinks:
            sink.write(path)

    def close(self) -> Mapping[str, int]:
        """End all, and return how many paths were lost, by place. Once more, it says the same."""
        while self._sinks:
            self._lost |= self._sinks.pop().close()
        return self._lost


class _Beside:
    """Writes, and hands paths to sinks."""

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
        help="Also draw the first paths as pictures into FILE, an SVG.",
    ),
    click.option(
        "--otlp",
        metavar="[ENDPOINT]",
        is_flag=False,
        flag_value="",
        help="Also send each path as a trace to an OpenTelemetry receiver, such as"
        " http://collector:4318; without ENDPOINT as OTEL_EXPORTER_OTLP_ENDPOINT says.",
    ),
)


@contextmanager
def path_sinks(parameters: dict[str, Any]) -> Iterator[PathSinks]:
    """
    Take ``--diagram-file`` and ``--otlp`` out of a command's parameters, and open what they name.

    Raises:
        TracerError: If a file cannot be made, or the package for traces is not installed.
    """
    file: File | None = parameters.pop("diagram_file")
    target: str | None = parameters.pop("otlp")
    sinks: list[PathSink] = []
    with ExitStack() as stack:
        if file is not None:
            sinks.append(_svg_file(file))
        if target is not None:
            sinks.append(_otlp(target))
        all_of_them = PathSinks(sinks)
        stack.callback(all_of_them.close)
        yield all_of_them


def _svg_file(file: File) -> PathSink:
    try:
        stream = file.open("w", encoding="utf-8")
    except OSError as error:
        raise TracerError(f"cannot write {file}: {error.strerror}") from error
    return SvgFile(stream)


def _otlp(target: str) -> PathSink:
    # OpenTelemetry is an extra, and takes 20 MB: only who asks for it pays.
    try:
        otlp = import_module("exporters.otlp")
    except ImportError as error:
        raise TracerError(
            f"--otlp needs OpenTelemetry, which is not here ({error.name}): "
            "pip install 'srcip[otlp]'"
        ) from error
    sink: PathSink = otlp.OtlpSink(otlp.span_exporter(target))
    return sink
