"""The kernel source as a guest on the node: beside others, through removals, leaving nothing."""

import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from ctypes import c_uint8, c_uint32, c_uint64, sizeof
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel import box as boxes
from tests.kernel import bpf_objects
from tests.kernel.box import CLIENT, NODE, SERVER, package_root, wait_until
from tests.kernel.trace import open_source
from tracer.decode import decode
from tracer.errors import LoadError, NetnsError
from tracer.filter import Filter
from tracer.kernel import attachment, probing, programs
from tracer.kernel.attach import CONNECTION_PLACES
from tracer.kernel.bpf_syscall import _info
from tracer.kernel.netns import Netns
from tracer.kernel.programs import CONNECTIONS, DROPS, SEGMENTS
from tracer.kernel.source import Settings
from tracer.model import Connection
from tracer.wire import WireConfig, WireConnection, WirePathKey, WirePrefix, WireStreamKey

PORT = 8080
TRACK = "table inet t { chain f { type filter hook forward priority 0; ct state new } }"


def send(box, port=PORT, host="client"):
    with box.socket(host, 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", (SERVER[4], port))


def test_two_tracers_on_one_node(box, trace):
    """A second tracer takes the next free priority; both see every connection."""
    box.rules(TRACK)
    first, second, third = trace(), trace(), trace()
    for port in range(PORT, PORT + 5):
        send(box, port)

    for tracer in (first, second, third):
        tracer.wait_for(lambda t: len(t.connections) == 5)
    assert {c.orig for c in first.connections} == {c.orig for c in third.connections}
    assert {c.mark for c in third.connections} == {0}


def test_no_place_left(box, trace, monkeypatch):
    """Where every priority is taken, one line says so."""
    monkeypatch.setattr("tracer.kernel.attach._PLACES", 1)
    trace()

    with pytest.raises(LoadError, match="hold all 1 priorities that it may use"):
        trace()


def test_several_namespaces(box, trace):
    """One process traces several namespaces, and tells them apart."""
    box.rules(TRACK)
    box.run(
        "server", "nft", "-f", "-", stdin=TRACK.replace("forward", "input").replace("}", "\n}\n")
    )
    with closing(open_source([box.target("node"), box.target("server")])) as source:
        send(box)
        records = []

        def both():
            records.extend(map(decode, source.read(0.05)))
            return {r.netns for r in records if isinstance(r, Connection)} == set(source.info.nodes)

        wait_until(both)
        assert sorted(source.info.nodes.values()) == ["node", "server"]


def test_everything_goes_with_the_source(box, trace):
    """No object of ours is left in the kernel after close."""
    tracer = trace()
    held = bpf_objects.held_by(os.getpid())
    kinds = Counter(kind for kind, _ in held)
    assert kinds["prog"] == 5
    assert kinds["link"] > 5
    assert bpf_objects.left(held) == held
    tracer.close()
    # The kernel frees programs after an RCU grace period.
    wait_until(lambda: not bpf_objects.left(held))


def test_everything_goes_with_a_failed_start(box):
    """Nothing is left if attaching fails halfway."""
    gone = Netns(path=box.path("node").with_name("srcip-no-such"), inode=1, node="gone")
    with pytest.raises(NetnsError, match="srcip-no-such"):
        open_source([box.target(), gone])
    assert not bpf_objects.held_by(os.getpid())


def test_nothing_is_left_after_sigkill(box, tmp_path):
    """After kill -9 no program of ours is left, and the next tracer takes the same place."""
    ready = tmp_path / "ready"
    tracer = subprocess.Popen(
        [
            *(sys.executable, "-m", "tracer.cli", "trace", "--netns", box.names["node"]),
            *("--ready-file", str(ready)),
        ],
        cwd=package_root(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(ready.exists)
        held = bpf_objects.held_by(tracer.pid)
        assert bpf_objects.left(held) == held != set()
    finally:
        tracer.send_signal(signal.SIGKILL)
        tracer.wait()
    wait_until(lambda: not bpf_objects.left(held))


def test_namespace_removed_while_tracing(box, trace):
    """A removed namespace is released, so that it can end, and its cables with it."""
    tracer = trace()
    send(box)
    subprocess.run(["ip", "netns", "del", box.names["node"]], check=True)

    wait_until(lambda: tracer.source.read(0.05) is None)
    wait_until(lambda: "c0" not in box.run("client", "ip", "link", "show"))


def test_other_namespaces_go_on(box):
    """When one of several namespaces is removed, the others are still traced."""
    with boxes.built() as other:
        other.rules(TRACK)
        with closing(open_source([box.target(), other.target()])) as source:
            subprocess.run(["ip", "netns", "del", box.names["node"]], check=True)
            wait_until(
                lambda: source.read(0.05) is not None and len(source._attachment.by_namespace) == 1
            )
            send(other)
            wait_until(lambda: source.read(0.05))


def test_interface_removed_while_tracing(box, trace):
    """Interfaces may go; the rest is still traced."""
    box.rules(TRACK)
    tracer = trace()
    box.run("node", "ip", "link", "add", "extra", "type", "veth")
    box.run("node", "ip", "link", "del", "extra")
    box.run("server", "ip", "link", "del", "s0")
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", (NODE[4], PORT))
    tracer.flush()
    assert not any(tracer.lost().values())


def test_keys_and_values_are_those_of_the_wire(box, trace):
    """Each map that user space reads or writes has the sizes that it assumes."""
    tracer = trace(has_proxy_headers=True)
    for program, name, key, value in (
        (CONNECTIONS, "paths_0", WirePathKey, c_uint64),
        (CONNECTIONS, "paths_1", WirePathKey, c_uint64),
        (CONNECTIONS, "samples", WirePathKey, WireConnection),
        (CONNECTIONS, "classes", WirePrefix, c_uint32),
        (DROPS, "config", c_uint32, WireConfig),
        (DROPS, "lost", c_uint32, c_uint64),
        (DROPS, "traced", c_uint32, c_uint8),
        (SEGMENTS, "streams", WireStreamKey, None),
    ):
        # struct bpf_map_info: key_size is at offset 8, value_size at 12.
        found = struct.unpack_from("=II", _info(tracer.source._loaded.map(program, name)), 8)
        assert found[0] == sizeof(key), name
        assert value is None or found[1] == sizeof(value), name


def tracepoints():
    """The raw tracepoints to which this process has attached something, as the kernel tells."""
    found = Counter()
    for entry in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            found.update(re.findall("(?m)^tp_name:\t(.+)", entry.read_text()))
    return found


def test_accepts_are_reported_only_to_listeners(box):
    """Their program would run at each step of every TCP connection of the machine."""
    settings = Settings(is_streaming=False, is_counting=True, has_drops=True)
    with closing(open_source([box.target()], settings)) as source:
        assert tracepoints() == {"kfree_skb": 1}
        for wanted in (Filter(), Filter(port=PORT)):
            source.stream(wanted)
            assert tracepoints() == {"kfree_skb": 1, "inet_sock_set_state": 1}
        source.stream(None)
        assert tracepoints() == {"kfree_skb": 1}
    assert not tracepoints()


def test_accepts_that_cannot_be_reported(box, caplog):
    """For want of a descriptor, say: a line says so while it lasts, and all else goes on."""
    settings = Settings(is_streaming=False, has_drops=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(open_source([box.target()], settings)) as source:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            source.stream(Filter())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert caplog.messages == [
            "cannot attach to the tracepoint inet_sock_set_state: Too many open files"
        ]
        assert source.read(0) is not None
        assert attachment.NO_ACCEPTS in source.info.not_seen
        source.stream(Filter())
        source.read(0)
        assert attachment.NO_ACCEPTS not in source.info.not_seen
        assert tracepoints()["inet_sock_set_state"] == 1


def test_no_verdict_but_accept(box, trace):
    """Traffic with a tracer is the same as without: every datagram arrives, in order."""
    box.rules(TRACK)
    trace()
    with (
        box.socket("server", 4, socket.SOCK_DGRAM) as server,
        box.socket("client", 4, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("", PORT))
        for i in range(100):
            client.sendto(bytes([i]), (SERVER[4], PORT))
            data, peer = server.recvfrom(1)
            assert data == bytes([i])
            assert peer[0] == CLIENT[4]


def test_bcc_is_missing(kernel, monkeypatch):
    """Without BCC, one line names the package."""
    monkeypatch.setenv("SRCIP_BCC_PYTHON", sys.executable)
    with pytest.raises(LoadError, match="python3-bpfcc"):
        programs.load((programs.ACCEPTS,))


def test_no_interpreter(kernel, monkeypatch):
    """Without the interpreter, one line names the variable that chooses it."""
    monkeypatch.setenv("SRCIP_BCC_PYTHON", "/no/such/python")
    with pytest.raises(LoadError, match="SRCIP_BCC_PYTHON"):
        programs.load((programs.ACCEPTS,))


def test_programs_for_probes_load(kernel):
    """Also where no probe can be made, the verifier takes the programs for them."""
    addresses = {f"SRCIP_{name.upper()}": 1 for name in probing._DELIVERY}
    defines = {**programs.PROBED_CONNECTIONS.defines, **addresses}
    program = replace(programs.PROBED_CONNECTIONS, defines=defines)
    with programs.load((program,)) as loaded:
        assert {name for _, name in loaded.functions} == {"srcip_nat", "srcip_confirm"}
        assert ("connections.c", "traced") in loaded.maps


def test_compiler_error(kernel):
    """The compiler's output is kept for --verbose."""
    broken = programs.Program(file="no_such.c", functions=(), maps=())
    with pytest.raises(LoadError, match=r"cannot compile no_such\.c"):
        programs.load((broken,))


def test_verifier_error(kernel):
    """A program that the kernel refuses is named, and the verifier's output is kept."""
    wrong = programs.Program(file="accepts.c", functions=(("srcip_accept", 32, 45),), maps=())
    with pytest.raises(LoadError, match="rejects srcip_accept") as caught:
        programs.load((wrong,))
    assert caught.value.details


def test_places_are_last_and_before_snat():
    """The programs stand just before SNAT (100) and just before confirmation (INT_MAX)."""
    priorities = {place.function: place.priority for place in CONNECTION_PLACES}
    assert priorities == {
        "srcip_mark": 99,
        "srcip_postrouting": 2**31 - 2,
        "srcip_input": 2**31 - 2,
    }


def test_reader_survives_signals(box, trace):
    """A signal during a read loses nothing."""
    box.rules(TRACK)
    tracer = trace()
    before = signal.signal(signal.SIGUSR1, lambda *_: send(box))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        tracer.wait_for(lambda t: t.connections)
    finally:
        signal.signal(signal.SIGUSR1, before)
