"""Field offsets and enums of the running kernel, from its BTF."""

import ctypes
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tracer.errors import LoadError

VMLINUX = Path("/sys/kernel/btf/vmlinux")

# enum btf_kind, include/uapi/linux/btf.h
_STRUCT, _UNION, _ENUM = 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG = 8, 9, 10, 11, 18
_TRANSPARENT = {_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG}

# Every field that bpf/ reads, by the kernel's own names.
FIELDS = (
    ("sk_buff", "data"),
    ("sk_buff", "_nfct"),
    ("sk_buff", "_skb_refdst"),
    ("sk_buff", "dev"),
    ("sk_buff", "head"),
    ("sk_buff", "len"),
    ("sk_buff", "mark"),
    ("sk_buff", "network_header"),
    ("sk_buff", "protocol"),
    ("sk_buff", "skb_iif"),
    ("sk_buff", "tail"),
    ("nf_hook_state", "hook"),
    ("nf_hook_state", "in"),
    ("nf_hook_state", "out"),
    ("nf_hook_state", "net"),
    ("net", "ns.inum"),
    ("net_device", "ifindex"),
    ("net_device", "nd_net.net"),
    ("dst_entry", "dev"),
    ("dst_entry", "input"),
    ("nf_conn", "ct_net.net"),
    ("nf_conn", "mark"),
    ("nf_conn", "status"),
    ("nf_conn", "tuplehash"),
    ("nf_conn", "zone.dir"),
    ("nf_conn", "zone.id"),
    ("nf_conntrack_tuple_hash", "tuple"),
    ("nf_conntrack_tuple", "src.u3"),
    ("nf_conntrack_tuple", "src.u.all"),
    ("nf_conntrack_tuple", "src.l3num"),
    ("nf_conntrack_tuple", "dst.u3"),
    ("nf_conntrack_tuple", "dst.u.all"),
    ("nf_conntrack_tuple", "dst.protonum"),
    ("sock_common", "skc_daddr"),
    ("sock_common", "skc_dport"),
    ("sock_common", "skc_family"),
    ("sock_common", "skc_net.net"),
    ("sock_common", "skc_num"),
    ("sock_common", "skc_rcv_saddr"),
    ("sock_common", "skc_v6_daddr"),
    ("sock_common", "skc_v6_rcv_saddr"),
)
DROP_REASONS = "skb_drop_reason"
SIZES = ("nf_conntrack_tuple", "nf_conntrack_tuple_hash")


class _Type(ctypes.Structure):
    """``struct btf_type``."""

    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size_or_type", ctypes.c_uint32),
    )


class _Member(ctypes.Structure):
    """``struct btf_member``."""

    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    )


class _Enum(ctypes.Structure):
    """``struct btf_enum``."""

    _fields_ = (("name_off", ctypes.c_uint32), ("value", ctypes.c_int32))


@lru_cache(maxsize=1)
def libbpf() -> ctypes.CDLL:
    """
    Load libbpf, which comes with Debian's BCC.

    Raises:
        LoadError: If it is not installed.
    """
    try:
        # By soname: ctypes.util.find_library() would run a compiler.
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise LoadError(
            f"cannot load libbpf ({error}); install the package python3-bpfcc"
        ) from error
    for function, result, arguments in (
        ("btf__load_vmlinux_btf", ctypes.c_void_p, ()),
        ("btf__load_module_btf", ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_void_p)),
        ("btf__free", None, (ctypes.c_void_p,)),
        ("btf__type_by_id", ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_uint32)),
        ("btf__name_by_offset", ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_uint32)),
        (
            "btf__find_by_name_kind",
            ctypes.c_int32,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32),
        ),
    ):
        entry = getattr(library, function)
        entry.restype, entry.argtypes = result, arguments
    return library


class KernelTypes:
    """The types of the running kernel and of its conntrack module."""

    def __init__(self) -> None:
        self._lib = libbpf()
        vmlinux = self._lib.btf__load_vmlinux_btf()
        if not vmlinux:
            raise LoadError(
                f"this kernel ({os.uname().release}) has no BTF: {VMLINUX} is missing; use a "
                "kernel built with CONFIG_DEBUG_INFO_BTF"
            )
        self._btfs = [vmlinux]
        # Where conntrack is a module, vmlinux may lack nf_conn: the module's own BTF has it.
        module = self._lib.btf__load_module_btf(b"nf_conntrack", vmlinux)
        if module:
            self._btfs.append(module)

    def offset(self, struct: str, path: str) -> int:
        """
        Return a member's offset in bytes, looking into anonymous structs and unions.

        Args:
            struct: The struct's name.
            path: Member names, joined by dots.

        Raises:
            LoadError: If the kernel has no such struct or member.
        """
        btf, type_id = self._find(struct, _STRUCT)
        bits = 0
        for name in path.split("."):
            found = self._member(btf, type_id, name)
            if found is None:
                raise LoadError(
                    f"this kernel ({os.uname().release}) has no field {struct}.{path}; "
                    "please report this with the output of 'srcip doctor'"
                )
            type_id, offset = found
            bits += offset
        return bits // 8

    def size(self, struct: str) -> int:
        """Return the size of a struct in bytes."""
        btf, type_id = self._find(struct, _STRUCT)
        return int(self._type(btf, type_id).size_or_type)

    def enumerators(self, name: str) -> dict[int, str]:
        """Return an enum as value -> name; empty if the kernel has no such enum."""
        for btf in self._btfs:
            type_id = self._lib.btf__find_by_name_kind(btf, name.encode(), _ENUM)
            if type_id > 0:
                return dict(self._enum_values(btf, type_id))
        return {}

    def _find(self, name: str, kind: int) -> tuple[int, int]:
        for btf in self._btfs:
            type_id = self._lib.btf__find_by_name_kind(btf, name.encode(), kind)
            if type_id > 0:
                return btf, type_id
        raise LoadError(
            f"the BTF of this kernel ({os.uname().release}) has no struct {name}; "
            "is the module nf_conntrack loaded?"
        )

    def _member(self, btf: int, type_id: int, name: str) -> tuple[int, int] | None:
        """Return the type and bit offset of a member; None if there is none of that name."""
        type_id = self._strip(btf, type_id)
        for member, bits in self._members(btf, type_id):
            member_name = self._lib.btf__name_by_offset(btf, member.name_off)
            if member_name == name.encode():
                return member.type, bits
            if not member_name:
                inner = self._member(btf, member.type, name)
                if inner is not None:
                    return inner[0], inner[1] + bits
        return None

    def _members(self, btf: int, type_id: int) -> Iterator[tuple[_Member, int]]:
        info = self._type(btf, type_id).info
        if (info >> 24) & 0x1F not in (_STRUCT, _UNION):
            return
        # With the kind flag, the top 8 bits of an offset hold a bit-field's width.
        mask = 0xFFFFFF if info >> 31 else 0xFFFFFFFF
        address = self._lib.btf__type_by_id(btf, type_id) + ctypes.sizeof(_Type)
        for member in (_Member * (info & 0xFFFF)).from_address(address):
            yield member, member.offset & mask

    def _enum_values(self, btf: int, type_id: int) -> Iterator[tuple[int, str]]:
        count = self._type(btf, type_id).info & 0xFFFF
        address = self._lib.btf__type_by_id(btf, type_id) + ctypes.sizeof(_Type)
        for entry in (_Enum * count).from_address(address):
            yield entry.value, self._lib.btf__name_by_offset(btf, entry.name_off).decode()

    def _strip(self, btf: int, type_id: int) -> int:
        """Return the type behind typedefs and qualifiers."""
        while ((kind := self._type(btf, type_id)).info >> 24) & 0x1F in _TRANSPARENT:
            type_id = kind.size_or_type
        return type_id

    def _type(self, btf: int, type_id: int) -> _Type:
        return _Type.from_address(self._lib.btf__type_by_id(btf, type_id))
