"""Runs the rule tools: without a shell, with a clean environment, within limits."""

import os
import selectors
import subprocess
import time
from dataclasses import dataclass

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
}
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a tool may take, in seconds, and how many bytes it may print."""

    timeout_s: float = 30.0
    output_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """
    What a tool printed.

    ``problem`` is why the text is missing, None if it is not; ``is_missing`` is whether the tool is
    not installed.
    """

    text: str = ""
    problem: str | None = None
    is_missing: bool = False


def run(argv: tuple[str, ...], limits: Limits) -> Output:
    """Run a tool in the network namespace of the calling thread."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
        )
    except FileNotFoundError:
        return Output(problem=f"{argv[0]} is not installed", is_missing=True)
    except OSError as error:
        return Output(problem=f"{argv[0]} cannot be run: {error.strerror}")
    with process:
        try:
            texts = _read(process, limits)
        except _LimitError as error:
            process.kill()
            return Output(problem=f"{' '.join(argv)} {error}")
    printed, complaint = texts
    if process.returncode:
        first = complaint.decode("utf-8", "replace").strip().partition("\n")[0][:200]
        return Output(problem=f"{' '.join(argv)} failed ({process.returncode}): {first}")
    return Output(text=printed.decode("utf-8", "replace"))


class _LimitError(Exception):
    """A tool took too long or printed too much."""


def _read(process: "subprocess.Popen[bytes]", limits: Limits) -> tuple[bytearray, bytearray]:
    deadline = time.monotonic() + limits.timeout_s
    buffers = (bytearray(), bytearray())
    with selectors.DefaultSelector() as selector:
        for stream, buffer in zip((process.stdout, process.stderr), buffers, strict=True):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, buffer)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise _LimitError(f"took longer than {limits.timeout_s:g} s")
            for key, _ in ready:
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.extend(data)
                if len(key.data) > limits.output_bytes:
                    raise _LimitError(f"printed more than {limits.output_bytes >> 20} MiB")
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        raise _LimitError(f"took longer than {limits.timeout_s:g} s") from None
    return buffers
