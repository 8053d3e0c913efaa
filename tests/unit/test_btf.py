"""Field offsets from the running kernel's own description of its types; takes no root."""

import os
import re
import struct
import time
from pathlib import Path

import pytest

from tracer.errors import LoadError
from tracer.kernel import btf
from tracer.kernel.btf import FIELDS, SIZES, KernelTypes
from tracer.kernel.headers import offsets_header, remove_leftovers, write_tree

BPF = Path(__file__).parents[2] / "bpf"
SOURCES = {path.name: path.read_text() for path in BPF.glob("*.[ch]")}


@pytest.fixture(scope="module")
def types():
    """The running kernel's types."""
    if not btf.VMLINUX.exists():
        pytest.skip(f"no {btf.VMLINUX}")
    try:
        btf.libbpf()
    except LoadError as error:
        pytest.skip(str(error))
    types = KernelTypes()
    try:
        types.size("nf_conn")
    except LoadError as error:
        pytest.skip(str(error))
    return types


@pytest.fixture(scope="module")
def defines(types):
    """The macros of offsets.h with their values."""
    lines = offsets_header(types).splitlines()
    found = [re.fullmatch(r"#define (\w+) (\d+)", line) for line in lines[1:]]
    assert all(found), lines
    return {match[1]: int(match[2]) for match in found}


def macro(struct_name, path):
    return f"SRCIP_OFFSET_{struct_name}__{path.replace('.', '_')}"


def used_macros():
    """Find the macros for offsets and sizes that the C sources use."""
    used = set()
    for text in SOURCES.values():
        used |= {
            f"SRCIP_OFFSET_{name}__{member}"
            for name, member in re.findall(r"SRCIP_OFFSET\((\w+),\s*(\w+)\)", text)
            if (name, member) != ("type", "member")
        }
        used |= {
            f"SRCIP_OFFSET_nf_conn__{member}"
            for member in re.findall(r"SRCIP_ENTRY_FIELD\(\w+,\s*(\w+)\)", text)
        }
        used |= {
            f"SRCIP_OFFSET_nf_conntrack_tuple__{member}"
            for member in re.findall(r"SRCIP_TUPLE_FIELD\(\w+,\s*(\w+)\)", text)
        }
        used |= set(re.findall(r"\bSRCIP_(?:SIZE_\w+|NF_CONN_\w+)", text))
    return used - {macro("nf_conn", "member"), macro("nf_conntrack_tuple", "member")}


def test_offsets_header(defines):
    """
    offsets.h has a macro for every field, every size, the part of nf_conn that is read, and the
    registers with a function's arguments.
    """
    assert set(defines) == {
        *(macro(*field) for field in FIELDS),
        *(f"SRCIP_SIZE_{name}" for name in SIZES),
        "SRCIP_NF_CONN_FIRST",
        "SRCIP_NF_CONN_SPAN",
        "SRCIP_HAS_DROP_REASONS",
        *(f"SRCIP_ARGUMENT_{number}" for number in range(3)),
    }


def test_programs_ask_for_listed_fields():
    """Every offset that the C sources use is among those that are looked up."""
    listed = {macro(*field) for field in FIELDS} | {f"SRCIP_SIZE_{name}" for name in SIZES}
    assert used_macros() - {"SRCIP_NF_CONN_FIRST", "SRCIP_NF_CONN_SPAN"} <= listed


def test_listed_fields_are_used():
    """No field is looked up, and so required of a kernel, that no program reads."""
    unused = {macro(*field) for field in FIELDS} - used_macros()
    assert not unused


def test_span_of_nf_conn(defines):
    """The part of nf_conn that is read at once holds every field of it, in whole words."""
    first, span = defines["SRCIP_NF_CONN_FIRST"], defines["SRCIP_NF_CONN_SPAN"]
    assert (first % 8, span % 8) == (0, 0)
    read = {"zone_id": 2, "zone_dir": 1, "mark": 4, "status": struct.calcsize("l")}
    read["tuplehash"] = 2 * defines["SRCIP_SIZE_nf_conntrack_tuple_hash"]
    for name, size in read.items():
        offset = defines[f"SRCIP_OFFSET_nf_conn__{name}"]
        assert first <= offset <= first + span - size
    # It stands on the 512 bytes of stack of a BPF program, beside a record of 128.
    assert span <= 256


def test_known_layouts(types):
    """Layouts that are the same in every kernel come out as the uapi headers have them."""
    assert types.size("nf_conntrack_tuple") >= 40
    assert types.offset("nf_conntrack_tuple", "src.u3") == 0
    assert types.offset("nf_conntrack_tuple", "src.u.all") == 16
    # Through typedefs, anonymous unions and structs.
    assert types.offset("iphdr", "saddr") == 12
    assert types.offset("ipv6hdr", "daddr") == 24
    assert types.size("iphdr") == 20
    assert types.size("ipv6hdr") == 40


def test_enumerators(types):
    """Drop reasons come with the names that the kernel prints; an unknown enum has none."""
    reasons = set(types.enumerators("skb_drop_reason").values())
    assert "SKB_DROP_REASON_NETFILTER_DROP" in reasons
    assert types.enumerators("nf_inet_hooks")[4] == "NF_INET_POST_ROUTING"
    assert types.enumerators("no_such_enum") == {}


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("sk_buff", "no_such_field", "has no field sk_buff.no_such_field; please report this"),
        ("nf_conn", "zone.colour", "has no field nf_conn.zone.colour; please report this"),
        # A path that goes on through a number.
        ("sk_buff", "mark.x", "has no field sk_buff.mark.x; please report this"),
        ("no_such_struct", "x", "has no struct no_such_struct; is the module nf_conntrack"),
    ],
)
def test_missing_field(types, name, path, message):
    """A field that the kernel lacks is one line with its name and what to do."""
    with pytest.raises(LoadError, match=message) as caught:
        types.offset(name, path)
    assert "\n" not in str(caught.value)


def test_missing_field_of_the_programs(types, monkeypatch):
    """The header is not written with a field missing."""
    monkeypatch.setattr("tracer.kernel.headers.FIELDS", (*FIELDS, ("sk_buff", "gone")))
    with pytest.raises(LoadError, match=r"has no field sk_buff\.gone"):
        offsets_header(types)


def test_header_tree(types, tmp_path):
    """The tree has what BCC asks a kernel source for, and the offsets."""
    try:
        write_tree(tmp_path, types)
    except LoadError as error:
        pytest.skip(str(error))
    assert (tmp_path / "offsets.h").read_text() == offsets_header(types)
    assert (tmp_path / "include/linux/kconfig.h").exists()
    assert (tmp_path / "include/uapi/linux/types.h").exists()
    assert (tmp_path / "include/uapi/asm/types.h").exists()


def test_no_kernel_headers(types, tmp_path, monkeypatch):
    """Without the C library's kernel headers the package that has them is named."""
    monkeypatch.setattr("tracer.kernel.headers._UAPI_DIRS", {"linux": (str(tmp_path / "none"),)})
    with pytest.raises(LoadError, match="install the package linux-libc-dev"):
        write_tree(tmp_path, types)


def test_leftovers_of_who_was_killed(tmp_path):
    """A tree that is old goes; one that is in use, a link, and what has another name stay."""
    now_s = time.time()
    names = ("srcip-headers-old", "srcip-headers-new", "srcip-headers-link", "other")
    old, new, link, other = (tmp_path / name for name in names)
    for directory in (old, new, other):
        (directory / "include").mkdir(parents=True)
    link.symlink_to(other)
    for directory in (old, other):
        os.utime(directory, (now_s - 7200, now_s - 7200))
    remove_leftovers(tmp_path, now_s)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, link.name, other.name}
    assert (other / "include").exists()
