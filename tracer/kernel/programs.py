"""The eBPF programs: what to load, and loading it through the compiling child process."""

import importlib.resources
import json
import os
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tracer.errors import LoadError
from tracer.wire import REASON_NETFILTER_DROP

# enum bpf_prog_type, enum bpf_attach_type: include/uapi/linux/bpf.h
_KPROBE, _SCHED_CLS, _RAW_TRACEPOINT, _NETFILTER = 2, 3, 17, 32
_ATTACH_NETFILTER = 45

# Import bcc first: the directory added after it may be a virtual environment with another 'bcc'.
_BOOTSTRAP = (
    "import sys, bcc; sys.path.insert(0, sys.argv[2]); "
    "from tracer.kernel.compile import main; main(int(sys.argv[1]))"
)
# The drop reasons of a kernel that reports none.
NO_REASONS: Mapping[int, str] = {REASON_NETFILTER_DROP: "NETFILTER_DROP"}
_MAX_ANSWER = 1 << 17
_MAX_FDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """
    One file of ``bpf/``: its functions with program type and attach type, and its maps.

    ``defines`` are C macros for this file only.
    """

    file: str
    functions: tuple[tuple[str, int, int], ...]
    maps: tuple[str, ...]
    defines: Mapping[str, int] = field(default_factory=dict)


CONNECTIONS = Program(
    file="connections.c",
    functions=tuple(
        (name, _NETFILTER, _ATTACH_NETFILTER)
        for name in ("srcip_mark", "srcip_postrouting", "srcip_input")
    ),
    maps=("connections", "paths_0", "paths_1", "samples", "classes", "config", "lost"),
)
# The same file, built for probes on kernel functions.
PROBED_CONNECTIONS = Program(
    file=CONNECTIONS.file,
    functions=(("srcip_nat", _KPROBE, -1), ("srcip_confirm", _KPROBE, -1)),
    maps=(*CONNECTIONS.maps, "traced"),
    defines={"SRCIP_PROBES": 1},
)
ACCEPTS = Program(
    file="accepts.c",
    functions=(("srcip_accept", _RAW_TRACEPOINT, -1),),
    maps=("accepts", "config", "lost"),
)
DROPS = Program(
    file="drops.c",
    functions=(("srcip_drop", _RAW_TRACEPOINT, -1),),
    maps=("drops", "traced", "config", "lost"),
)
HOPS = Program(
    file="hops.c",
    functions=(
        ("srcip_before_nat", _NETFILTER, _ATTACH_NETFILTER),
        ("srcip_after_nat", _NETFILTER, _ATTACH_NETFILTER),
        ("srcip_tc_ingress", _SCHED_CLS, -1),
        ("srcip_tc_egress", _SCHED_CLS, -1),
        ("srcip_hop_end", _RAW_TRACEPOINT, -1),
    ),
    maps=("hops", "watches", "connections", "config", "lost"),
)
SEGMENTS = Program(
    file="segments.c",
    functions=(("srcip_segment_ingress", _SCHED_CLS, -1), ("srcip_segment_egress", _SCHED_CLS, -1)),
    maps=("segments", "streams", "config", "lost"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """
    Sizes of the programs' maps.

    Rings are in pages, a power of two. The largest holds 15,000 unread connections; every page of a
    ring counts twice in resident memory, because it is mapped twice.
    """

    connection_ring_pages: int = 512
    accept_ring_pages: int = 128
    drop_ring_pages: int = 128
    hop_ring_pages: int = 256
    segment_ring_pages: int = 256
    paths: int = 16384
    prefixes: int = 65536
    namespaces: int = 1024
    watches: int = 4096
    streams: int = 16384

    @property
    def defines(self) -> dict[str, int]:
        """The sizes as C macros."""
        return {f"SRCIP_{name.upper()}": value for name, value in asdict(self).items()}


@dataclass(slots=True, kw_only=True)
class Loaded:
    """Descriptors of loaded programs and maps, by file and name. Closing unloads them."""

    functions: dict[tuple[str, str], int] = field(default_factory=dict)
    maps: dict[tuple[str, str], int] = field(default_factory=dict)
    drop_reasons: Mapping[int, str] = field(default_factory=dict)

    def function(self, program: Program, name: str) -> int:
        """Return a function's descriptor."""
        return self.functions[program.file, name]

    def map(self, program: Program, name: str) -> int:
        """Return a map's descriptor."""
        return self.maps[program.file, name]

    def close(self) -> None:
        """Close every descriptor; programs that are not attached are unloaded."""
        for fd in (*self.functions.values(), *self.maps.values()):
            os.close(fd)
        self.functions.clear()
        self.maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def bcc_python() -> str:
    """Return the Python that has BCC: ``SRCIP_BCC_PYTHON``, else the system's."""
    return os.environ.get("SRCIP_BCC_PYTHON", "/usr/bin/python3")


def load(programs: tuple[Program, ...], sizes: Sizes | None = None) -> Loaded:
    """
    Compile programs for the running kernel and load them.

    Takes about 0.7 s. The compiler runs in a child process that has exited when this returns.

    Raises:
        LoadError: If BCC is not installed, or the compiler or the kernel rejects a program; its
            ``details`` hold what they printed.
    """
    request = {
        "defines": (sizes or Sizes()).defines,
        "bpf_dir": str(importlib.resources.files("tracer.bpf")),
        "programs": [
            {
                "file": program.file,
                "functions": program.functions,
                "maps": program.maps,
                "defines": dict(program.defines),
            }
            for program in programs
        ],
    }
    # In memory, because the root file system may be read-only.
    with os.fdopen(os.memfd_create("srcip-compiler"), "w+b") as output:
        answer, fds = _ask_child(request, output.fileno())
        output.seek(0)
        details = output.read().decode("utf-8", "replace")
    if "error" in answer:
        for fd in fds:
            os.close(fd)
        raise LoadError(answer["error"], details=details)
    if len(fds) != len(answer["fds"]):
        raise LoadError(
            f"only {len(fds)} of {len(answer['fds'])} descriptors arrived from the compiling child;"
            " is the limit of open files (ulimit -n) too low?",
            details=details,
        )
    return _loaded(answer, fds)


def _ask_child(request: dict[str, Any], output: int) -> tuple[dict[str, Any], list[int]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = str(Path(__file__).parents[2])
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MAX_ANSWER)
        command = [bcc_python(), "-I", "-c", _BOOTSTRAP, str(theirs.fileno()), root]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            raise LoadError(
                f"cannot run {command[0]}, the Python for BCC: {error.strerror}; "
                "set SRCIP_BCC_PYTHON"
            ) from error
        theirs.close()
        with child:
            # A child that cannot import BCC exits before it reads.
            message, fds = b"", list[int]()
            with suppress(ConnectionError):
                ours.send(json.dumps(request).encode())
                message, fds, _, _ = socket.recv_fds(ours, _MAX_ANSWER, _MAX_FDS)
    if not message:
        return {"error": _why_silent(child.returncode, output)}, list(fds)
    return json.loads(message), list(fds)


def _why_silent(status: int, output: int) -> str:
    printed = os.pread(output, 1 << 16, 0).decode("utf-8", "replace").strip()
    last = printed.splitlines()[-1] if printed else f"status {status}"
    if "No module named 'bcc'" in last:
        return (
            f"BCC is not installed for {bcc_python()}; install the package python3-bpfcc "
            "(the package 'bcc' on PyPI is something else)"
        )
    return f"the compiling child exited without an answer: {last}"


def _loaded(answer: dict[str, Any], fds: list[int]) -> Loaded:
    reasons = {int(number): name for number, name in answer["drop_reasons"].items()}
    loaded = Loaded(drop_reasons=reasons or NO_REASONS)
    for (file, kind, name), fd in zip(answer["fds"], fds, strict=True):
        os.set_inheritable(fd, False)
        (loaded.functions if kind == "function" else loaded.maps)[file, name] = fd
    return loaded
