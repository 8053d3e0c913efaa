"""The compiling child, which tells beside its descriptors what they were made of."""

import ctypes
import json
import os
import re
from pathlib import Path

from bcc.libbcc import lib

from tracer.kernel import compile as compiler

# Among the maps of a program: what it is made of.
RECIPE = "recipe"
_FIELDS = {
    "type": "map_type",
    "key": "key_size",
    "value": "value_size",
    "entries": "max_entries",
    "flags": "map_flags",
}

# The one that BCC's Python has no use for.
lib.bpf_table_name.restype = ctypes.c_char_p
lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def main(channel_fd):
    """Answer one request, as tracer.kernel.compile does."""
    load = compiler._load

    def load_and_tell(program, *where):
        loaded = load(program, *where)
        return [*loaded, ("map", RECIPE, _recipe(program, compiler._modules[-1]))]

    compiler._load = load_and_tell
    compiler.main(channel_fd)


def _recipe(program, module):
    functions = {name: module.dump_func(name.encode()).hex() for name, *_ in program["functions"]}
    maps = {}
    for number in range(lib.bpf_num_tables(module.module)):
        fd = lib.bpf_table_fd_id(module.module, number)
        maps[fd] = _map(fd) | {"name": lib.bpf_table_name(module.module, number).decode()}
    recipe = os.memfd_create(RECIPE)
    os.write(recipe, json.dumps({"functions": functions, "maps": maps}).encode())
    return recipe


def _map(fd):
    told = dict(re.findall(r"^(\w+):\s*(\S+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.M))
    return {name: int(told[field], 0) for name, field in _FIELDS.items()}
