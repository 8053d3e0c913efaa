"""What carries packets past netfilter is found, and not where there is nothing."""

import ctypes
import os
import struct

from tracer.kernel import bpf_syscall, btf, bypasses
from tracer.kernel.bpf_syscall import TCX_INGRESS
from tracer.kernel.netns import inside

SCHED_CLS, XDP, ATTACH_XDP = 3, 6, 37
# r0 = 2 (XDP_PASS; TC_ACT_SHOT is not run here); exit
RETURN_2 = struct.pack("=BBhi BBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


def program(kind, name):
    options = struct.pack("=QiI", 16, 0, ATTACH_XDP if kind == XDP else 0)
    fd = btf.libbpf().bpf_prog_load(kind, name, b"GPL", RETURN_2, ctypes.c_size_t(2), options)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def ifindex(box, device):
    return int(box.run("node", "cat", f"/sys/class/net/{device}/ifindex"))


def found(box):
    return bypasses.find(box.target())


def test_none(box):
    """A node without such things has none."""
    assert found(box) == []


def test_xdp(box):
    """An XDP program is named by its interface."""
    fd = program(XDP, b"somebodys")
    with inside(box.path("node")):
        # XDP_FLAGS_SKB_MODE: veth without NAPI has no other
        options = struct.pack("=QII", 16, 2, 0)  # struct bpf_link_create_opts begins so
        link = btf.libbpf().bpf_link_create(fd, ifindex(box, "n0"), ATTACH_XDP, options)
    assert link >= 0
    assert found(box) == ["an XDP program on n0 handles packets before netfilter"]
    os.close(link)
    os.close(fd)


def test_tcx(box):
    """Another program at tc is named; ours does not count."""
    theirs, ours = program(SCHED_CLS, b"somebodys"), program(SCHED_CLS, b"srcip_x")
    with inside(box.path("node")):
        links = [
            bpf_syscall.create_tcx_link(fd, ifindex(box, "n1"), TCX_INGRESS)
            for fd in (theirs, ours)
        ]
    assert found(box) == ["eBPF at tc of n1 (somebodys) may redirect packets or do NAT"]
    for fd in (*links, theirs, ours):
        os.close(fd)


def test_clsact(box):
    """A qdisc for classifiers is named."""
    box.run("node", "tc", "qdisc", "add", "dev", "n0", "clsact")
    assert found(box) == ["filters at tc of n0 (clsact) may redirect packets"]
