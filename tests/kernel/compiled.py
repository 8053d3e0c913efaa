"""
The programs compiled once for each configuration, and loaded anew for each tracer.

To compile takes most of the time of a kernel test. The first tracer of a configuration is made as
users' are; the next ones get the same instructions, with maps of their own.
"""

import ctypes
import json
import os
import struct
from dataclasses import dataclass
from unittest.mock import patch

from tracer.kernel import programs
from tracer.kernel.btf import libbpf

_BOOTSTRAP = programs._BOOTSTRAP.replace("tracer.kernel.compile", "tests.kernel.compiling")
# Among the maps of a program: what it is made of (tests.kernel.compiling).
RECIPE = "recipe"
# LD_IMM64 of a map's descriptor: include/uapi/linux/bpf.h
_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Instructions and maps of one file."""

    functions: dict
    maps: dict

    def add_to(self, loaded, program):
        """Load it, with maps that hold nothing yet."""
        made = {fd: _make_map(each) for fd, each in self.maps.items()}
        for name, kind, attach in program.functions:
            code = _with_maps(bytes.fromhex(self.functions[name]), made)
            loaded.functions[program.file, name] = _load(name, kind, max(attach, 0), code)
        names = {each["name"]: made.pop(fd) for fd, each in self.maps.items()}
        for name in program.maps:
            loaded.maps[program.file, name] = names.pop(name)
        # Programs hold the others.
        for fd in names.values():
            os.close(fd)


_known = {}


def loading():
    """Let tracers that are made within the block share what was compiled."""
    return patch.object(programs, "load", _load_all)


def _load_all(wanted, sizes=None):
    key = repr((wanted, sizes))
    if key in _known:
        reasons, recipes = _known[key]
        loaded = programs.Loaded(drop_reasons=reasons)
        for program, recipe in zip(wanted, recipes, strict=True):
            recipe.add_to(loaded, program)
        return loaded
    with patch.object(programs, "_BOOTSTRAP", _BOOTSTRAP):
        loaded = _as_users_do(wanted, sizes)
    recipes = [_read(loaded.maps.pop((program.file, RECIPE))) for program in wanted]
    _known[key] = loaded.drop_reasons, recipes
    return loaded


_as_users_do = programs.load


def _read(fd):
    with os.fdopen(fd) as file:
        file.seek(0)
        told = json.load(file)
    return Recipe(
        functions=told["functions"], maps={int(fd): each for fd, each in told["maps"].items()}
    )


def _make_map(each):
    # struct bpf_map_create_opts
    options = struct.pack("=QIIIIIIQII", 48, 0, 0, 0, 0, 0, each["flags"], 0, 0, 0)
    return _checked(
        libbpf().bpf_map_create(
            each["type"], each["name"][:15].encode(), each["key"], each["value"], each["entries"],
            options,
        )
    )  # fmt: skip


def _load(name, kind, attach, code):
    # struct bpf_prog_load_opts begins so
    options = struct.pack("=QiI", 16, 0, attach)
    count = ctypes.c_size_t(len(code) // 8)
    return _checked(libbpf().bpf_prog_load(kind, name[:15].encode(), b"GPL", code, count, options))


def _with_maps(code, made):
    """Name the new maps in place of those that it was compiled with."""
    changed = bytearray(code)
    for at in range(0, len(code), 8):
        opcode, registers, _, fd = struct.unpack_from("=BBhi", code, at)
        if opcode == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            struct.pack_into("=i", changed, at + 4, made[fd])
    return bytes(changed)


def _checked(fd):
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd
