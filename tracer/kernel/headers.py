"""The header tree that BCC compiles against, generated from the running kernel's BTF."""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from tracer.errors import LoadError
from tracer.kernel.btf import DROP_REASONS, FIELDS, SIZES, KernelTypes

# BCC wants a kernel source tree but needs only these files of it. __LINUX_BPF_H__ keeps out the
# system's bpf.h, in favour of BCC's own newer copy.
_FILES = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n#define __LINUX_BPF_H__\n",
    "include/linux/log2.h": (
        "#include <linux/types.h>\n"
        "typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;\n"
        "typedef __s8 s8; typedef __s16 s16; typedef __s32 s32; typedef __s64 s64;\n"
        "typedef _Bool bool; typedef unsigned long size_t; typedef unsigned long uintptr_t;\n"
        "#define true 1\n#define false 0\n#define NULL ((void *)0)\n"
    ),
    "include/asm/page.h": f"#define PAGE_SIZE {os.sysconf('SC_PAGE_SIZE')}\n",
}
# The members of struct pt_regs that hold a function's first arguments: arch/*/include/asm/ptrace.h.
_ARGUMENTS = {
    "x86_64": (("di", 0), ("si", 0), ("dx", 0)),
    "aarch64": (("regs", 0), ("regs", 8), ("regs", 16)),
}
# Debian keeps asm/ in a directory named after the machine's triplet.
_UAPI_DIRS = {
    "linux": ("/usr/include/linux",),
    "asm-generic": ("/usr/include/asm-generic",),
    "asm": (
        "/usr/include/asm",
        "/usr/include/x86_64-linux-gnu/asm",
        "/usr/include/aarch64-linux-gnu/asm",
    ),
}


# The name of a tree's directory, and the age at which no compiler can still be using it.
PREFIX = "srcip-headers-"
_STALE_S = 3600


def remove_leftovers(directory: Path, now_s: float) -> None:
    """
    Remove the trees of processes that were killed while compiling.

    Args:
        directory: Where trees are created. It may be world-writable: only trees of our own user are
            removed.
        now_s: Unix time.
    """
    for path in directory.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = path.lstat()
            is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if is_ours and now_s - found.st_mtime > _STALE_S:
                shutil.rmtree(path)


def write_tree(root: Path, types: KernelTypes) -> None:
    """
    Write the header tree into an empty directory, for ``BCC_KERNEL_SOURCE`` and ``-I``.

    Args:
        root: The empty directory. ``root/offsets.h`` will hold the field offsets.
        types: The running kernel's types.

    Raises:
        LoadError: If the C library's kernel headers are missing, or the kernel lacks a field.
    """
    for name, text in _FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    uapi = root / "include/uapi"
    uapi.mkdir()
    for name, candidates in _UAPI_DIRS.items():
        (uapi / name).symlink_to(_first_directory(candidates))
    (root / "offsets.h").write_text(offsets_header(types))


def offsets_header(types: KernelTypes) -> str:
    """Return C macros with the offset of every field and the size of every struct we read."""
    lines = ["/* From the BTF of the running kernel. */"]
    for struct, path in FIELDS:
        name = f"{struct}__{path.replace('.', '_')}"
        lines.append(f"#define SRCIP_OFFSET_{name} {types.offset(struct, path)}")
    conn = [(types.offset("nf_conn", path), size) for path, size in _nf_conn_fields(types)]
    # Whole words, so that every field keeps its alignment on the stack.
    first = min(offset for offset, _ in conn) & ~7
    last = (max(offset + size for offset, size in conn) + 7) & ~7
    lines.append(f"#define SRCIP_NF_CONN_FIRST {first}")
    lines.append(f"#define SRCIP_NF_CONN_SPAN {last - first}")
    lines += [f"#define SRCIP_SIZE_{struct} {types.size(struct)}" for struct in SIZES]
    lines.append(f"#define SRCIP_HAS_DROP_REASONS {int(bool(types.enumerators(DROP_REASONS)))}")
    # Only probes need them, and on other architectures probes are not supported.
    for number, (path, more) in enumerate(_ARGUMENTS.get(os.uname().machine, ())):
        lines.append(f"#define SRCIP_ARGUMENT_{number} {types.offset('pt_regs', path) + more}")
    return "\n".join(lines) + "\n"


def _nf_conn_fields(types: KernelTypes) -> tuple[tuple[str, int], ...]:
    """Return the fields of struct nf_conn that one read fetches, with their sizes in bytes."""
    hashes = 2 * types.size("nf_conntrack_tuple_hash")
    return (("zone.id", 2), ("zone.dir", 1), ("tuplehash", hashes), ("status", 8), ("mark", 4))


def _first_directory(candidates: tuple[str, ...]) -> str:
    for candidate in candidates:
        if Path(candidate).is_dir():
            return candidate
    raise LoadError(f"no directory {candidates[0]}; install the package linux-libc-dev")
