"""
The short-lived child process that compiles and loads the programs, and sends their descriptors.

It runs under the distribution's Python, the only one that Debian's BCC is built for, and frees
LLVM's 100 MB when it exits. It imports only the standard library, bcc and the modules beside it.
"""

import array
import ctypes
import json
import os
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import bcc

from tracer.errors import LoadError
from tracer.kernel.btf import DROP_REASONS, KernelTypes
from tracer.kernel.headers import PREFIX, remove_leftovers, write_tree

_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the tree in it has a random name and mode 0700


def main(channel_fd: int) -> None:
    """
    Answer one request on a socket: compile, load, send the descriptors.

    The request is JSON: ``defines`` (name -> number), ``bpf_dir``, and ``programs``: a list of
    ``file``, ``functions`` (each name, program type, attach type), ``maps``, and ``defines`` for
    this file only. The answer is JSON with ``fds`` (what each descriptor is) and ``drop_reasons``,
    or ``error``.
    """
    with socket.socket(fileno=channel_fd) as channel:
        request = json.loads(channel.recv(1 << 16))
        try:
            answer, fds = _load_all(request)
        except LoadError as error:
            answer, fds = {"error": str(error)}, []
        socket.send_fds(channel, [json.dumps(answer).encode()], array.array("i", fds))


def _load_all(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    types = KernelTypes()
    named: list[tuple[str, str, str]] = []
    fds: list[int] = []
    place = _writable()
    remove_leftovers(Path(place), time.time())
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place) as tree:
        write_tree(Path(tree), types)
        os.environ["BCC_KERNEL_SOURCE"] = tree
        flags = [f"-I{tree}", f"-I{request['bpf_dir']}"]
        flags += _macros(request["defines"])
        for program in request["programs"]:
            own = [*flags, *_macros(program["defines"])]
            loaded = _load(program, request["bpf_dir"], own)
            for kind, name, fd in loaded:
                named.append((program["file"], kind, name))
                fds.append(fd)
    reasons = {
        number: name.removeprefix("SKB_DROP_REASON_")
        for number, name in types.enumerators(DROP_REASONS).items()
        if not name.endswith(("_MAX", "_MASK"))
    }
    return {"fds": named, "drop_reasons": reasons}, fds


def _macros(defines: dict[str, int]) -> list[str]:
    return [f"-D{name}={value:#x}" for name, value in defines.items()]


def _writable() -> str:
    """Return a directory for the header tree; a root file system may be read-only."""
    with suppress(FileNotFoundError):
        return tempfile.gettempdir()
    if os.access(_SHARED_MEMORY, os.W_OK):
        return _SHARED_MEMORY
    raise LoadError(
        f"neither /tmp nor {_SHARED_MEMORY} is writable, and the compiler needs a directory for"
        " headers; mount a tmpfs at /tmp, or set TMPDIR"
    )


# BCC closes a module's descriptors when the object is garbage-collected.
_modules: list[Any] = []


def _load(program: dict[str, Any], bpf_dir: str, flags: list[str]) -> list[tuple[str, str, int]]:
    source = Path(bpf_dir) / program["file"]
    try:
        module = bcc.BPF(src_file=str(source).encode(), cflags=flags)
    except Exception as error:  # BCC raises nothing narrower
        raise LoadError(f"cannot compile {program['file']}: {error}") from error
    _modules.append(module)
    loaded = []
    for name, program_type, attach_type in program["functions"]:
        try:
            function = module.load_func(name.encode(), program_type, attach_type=attach_type)
        except Exception as error:
            raise LoadError(
                f"the kernel ({os.uname().release}) rejects {name} of {program['file']}: {error}"
            ) from error
        loaded.append(("function", name, function.fd))
    for name in program["maps"]:
        # Plain types, because BCC cannot parse nested structs; only the descriptor is used.
        table = module.get_table(name.encode(), ctypes.c_uint32, ctypes.c_uint32)
        loaded.append(("map", name, table.map_fd))
    return loaded


if __name__ == "__main__":
    main(int(sys.argv[1]))
