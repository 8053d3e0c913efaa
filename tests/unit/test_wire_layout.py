"""bpf/wire.h and its Python mirror describe the same bytes: the C compiler is asked."""

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest

from tracer import model, proxy_headers, wire

BPF = Path(__file__).parents[2] / "bpf"
HEADER = re.sub(r"/\*.*?\*/", "", (BPF / "wire.h").read_text(), flags=re.DOTALL)

STRUCTS = dict(
    re.findall(
        r"^struct (srcip_\w+) \{(.*?)^\}(?: SRCIP_WORDS)?;", HEADER, re.DOTALL | re.MULTILINE
    )
)
ENUMS = dict(re.findall(r"^enum (srcip_\w+) \{(.*?)^\};", HEADER, re.DOTALL | re.MULTILINE))

MIRRORS = {
    "srcip_tuple": wire.WireTuple,
    "srcip_header": wire.WireHeader,
    "srcip_connection": wire.WireConnection,
    "srcip_drop": wire.WireDrop,
    "srcip_accept": wire.WireAccept,
    "srcip_hop": wire.WireHop,
    "srcip_segment": wire.WireSegment,
    "srcip_client": wire.WireClient,
    "srcip_declared": wire.WireDeclared,
    "srcip_prefix": wire.WirePrefix,
    "srcip_filter": wire.WireFilter,
    "srcip_config": wire.WireConfig,
    "srcip_path_key": wire.WirePathKey,
    "srcip_stream_key": wire.WireStreamKey,
}
# Each enum's mirror, and what its members begin with in C.
ENUM_MIRRORS = {
    "srcip_kind": (wire.Kind, "SRCIP_KIND_"),
    "srcip_hook": (model.Hook, "SRCIP_HOOK_"),
    "srcip_lost": (wire.Lost, "SRCIP_LOST_"),
    "srcip_client_class": (model.ClientClass, "SRCIP_CLASS_"),
    "srcip_address_flag": (model.AddressFlag, "SRCIP_ADDRESS_"),
    "srcip_connection_flag": (wire.ConnectionFlag, "SRCIP_CONNECTION_"),
    "srcip_drop_flag": (wire.DropFlag, "SRCIP_DROP_"),
    "srcip_hop_flag": (wire.HopFlag, "SRCIP_HOP_"),
    "srcip_segment_flag": (wire.SegmentFlag, "SRCIP_SEGMENT_"),
    "srcip_proxy_header": (proxy_headers.ProxyHeader, "SRCIP_PROXY_HEADER_"),
    "srcip_client_form": (proxy_headers.ClientForm, "SRCIP_CLIENT_"),
    "srcip_opening": (proxy_headers.Opening, "SRCIP_OPENING_"),
    "srcip_declared_flag": (wire.DeclaredFlag, "SRCIP_DECLARED_"),
    "srcip_path_flag": (wire.PathFlag, "SRCIP_PATH_"),
}
# The number of members, which Python knows without being told.
COUNTS = {"SRCIP_LOST_SLOTS"}


def ask_compiler(expressions, tmp_path):
    """Return the values of constant C expressions, with wire.h included."""
    prints = "".join(f'printf(",%ld", (long)({e}));\n' for e in expressions)
    source = tmp_path / "ask.c"
    source.write_text(
        "#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "wire.h"\nint main(void) {{ printf("[0"); {prints} puts("]"); }}\n'
    )
    program = tmp_path / "ask"
    subprocess.run(["cc", "-Wall", "-Werror", f"-I{BPF}", source, "-o", program], check=True)
    answer = subprocess.run([program], check=True, capture_output=True)
    return json.loads(answer.stdout)[1:]


def c_fields(body):
    """Return the names of a struct's fields in their order."""
    return [re.sub(r"\[.*", "", line.split()[-1]) for line in body.split(";") if line.strip()]


def c_enumerators(body):
    """Return the names of an enum's members in their order."""
    return [entry.split("=")[0].strip() for entry in body.split(",") if entry.strip()]


def test_every_struct_has_a_mirror():
    """A struct that is added to wire.h and not to its mirror is noticed here."""
    assert list(STRUCTS) == list(MIRRORS)


def test_every_enum_has_a_mirror():
    """An enum that is added to wire.h and not to its mirror is noticed here."""
    assert list(ENUMS) == list(ENUM_MIRRORS)


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_fields(name):
    """A struct and its mirror have the same fields in the same order."""
    assert c_fields(STRUCTS[name]) == [field[0] for field in MIRRORS[name]._fields_]


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_layout(name, tmp_path):
    """Each field has the same offset and size on both sides; the structs have the same size."""
    mirror = MIRRORS[name]
    questions, mirrored = [f"sizeof(struct {name})"], [ctypes.sizeof(mirror)]
    for field, *_ in mirror._fields_:
        questions += [f"offsetof(struct {name}, {field})", f"sizeof(((struct {name} *)0)->{field})"]
        mirrored += [getattr(mirror, field).offset, getattr(mirror, field).size]
    assert ask_compiler(questions, tmp_path) == mirrored


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_has_no_implicit_padding(name, tmp_path):
    """Every byte belongs to a named field: what the kernel leaves unset there would leak."""
    size, *fields = ask_compiler(
        [
            f"sizeof(struct {name})",
            *(f"sizeof(((struct {name} *)0)->{field})" for field in c_fields(STRUCTS[name])),
        ],
        tmp_path,
    )
    assert sum(fields) == size


@pytest.mark.parametrize("name", ENUMS)
def test_enum(name, tmp_path):
    """An enum and its mirror have the same members with the same numbers."""
    mirror, prefix = ENUM_MIRRORS[name]
    members = [member for member in c_enumerators(ENUMS[name]) if member not in COUNTS]
    values = ask_compiler(members, tmp_path)
    names = [member.removeprefix(prefix) for member in members]
    assert dict(zip(names, values, strict=True)) == {m.name: m.value for m in mirror}


def test_constants(tmp_path):
    """Version, number of loss counters, and what Python calls a header are the same in C."""
    questions = [
        "SRCIP_WIRE_VERSION",
        "SRCIP_COUNT_BITS",
        "SRCIP_CLASS_BITS",
        "SRCIP_REASON_NETFILTER_DROP",
        "SRCIP_LOST_SLOTS",
        "sizeof(struct srcip_header)",
    ]
    assert ask_compiler(questions, tmp_path) == [
        wire.WIRE_VERSION,
        wire.COUNT_BITS,
        wire.CLASS_BITS,
        wire.REASON_NETFILTER_DROP,
        len(wire.Lost),
        wire.HEADER_SIZE,
    ]


@pytest.mark.parametrize("kind", wire.Kind)
def test_records(kind):
    """Each kind of record has a struct, which begins with the header."""
    assert wire.RECORDS[kind]._fields_[0] == ("header", wire.WireHeader)
