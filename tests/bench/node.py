"""The node under load: a NodePort-like Service between a client and a server."""

import socket
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.kernel import box as boxes
from tests.kernel.box import CLIENT, NODE, SERVER

SERVICE_PORT, BACKEND_PORT, BACKLOG = 30080, 8080, 4096
RULES = f"""
table ip bench {{
  chain pre {{ type nat hook prerouting priority -100
    udp dport {SERVICE_PORT} meta mark set 0x4000 dnat to {SERVER[4]}:{BACKEND_PORT}
    tcp dport {SERVICE_PORT} meta mark set 0x4000 dnat to {SERVER[4]}:{BACKEND_PORT} }}
  chain post {{ type nat hook postrouting priority 100
    meta mark & 0x4000 == 0x4000 meta mark set 0 masquerade }}
}}"""


class Node:
    """Sends traffic through the node and says how long it took."""

    def __init__(self, box, program):
        self.box = box
        self._program = program

    def established_ns(self, packets):
        """Nanoseconds for each packet of a flow that was answered."""
        return self._send("flow", CLIENT[4], packets)[0] / packets

    def established_cpu_ns(self, packets):
        """As `established_ns`, in nanoseconds of CPU time."""
        return self._send("flow", CLIENT[4], packets)[1] / packets

    def new_ns(self, flows, port=SERVICE_PORT, ports=1):
        """Nanoseconds for each new flow, to so many ports in turn. Conntrack is emptied first."""
        return self._new(flows, port, ports)[0] / flows

    def new_cpu_ns(self, flows, port=SERVICE_PORT, ports=1):
        """As `new_ns`, in nanoseconds of CPU time: other work on the machine does not count."""
        return self._new(flows, port, ports)[1] / flows

    def connect_cpu_ns(self, connections):
        """Nanoseconds of the client's CPU time for each TCP connection, which the server takes."""
        self.flush()
        return self._send("connect", CLIENT[4], connections)[1] / connections

    def _new(self, flows, port, ports):
        self.flush()
        took = self.send_new(flows, port, ports)
        held = self.entries()
        # A port that is taken already can cost a flow or two.
        assert held > flows * 0.99, f"{held} entries of {flows} flows: the table is too small"
        return took

    def send_new(self, flows, port, ports):
        """Send the first datagram of so many flows; return the ns it took, and those of CPU."""
        return self._send("new", CLIENT[4].rsplit(".", 1)[0] + ".0", flows, port, ports)

    def flush(self):
        """Empty conntrack."""
        self.box.run("node", "conntrack", "-F")

    def entries(self):
        """How many entries conntrack holds."""
        return int(self.box.run("node", "cat", "/proc/sys/net/netfilter/nf_conntrack_count"))

    def settled_entries(self):
        """How many there are once no packet is under way any more."""
        before, held = -1, self.entries()
        while held != before:
            before, held = held, self.entries()
        return held

    def _send(self, kind, source, count, port=SERVICE_PORT, ports=1):
        numbers = map(str, (port, count, ports))
        printed = self.box.run("client", self._program, kind, source, NODE[4], *numbers)
        return tuple(map(int, printed.split()))


@contextmanager
def built(directory):
    """Make the node, with a server that answers the first datagram of a flow."""
    program = Path(directory) / "traffic"
    source = Path(__file__).with_name("traffic.c")
    subprocess.run(["cc", "-O2", "-Wall", str(source), "-o", str(program)], check=True)
    with ExitStack() as stack:
        box = stack.enter_context(boxes.built())
        box.rules(RULES)
        server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
        server.bind(("", BACKEND_PORT))
        listener = stack.enter_context(box.socket("server", 4, socket.SOCK_STREAM))
        listener.bind(("", BACKEND_PORT))
        listener.listen(BACKLOG)
        for serve, sock in ((_answer, server), (_accept, listener)):
            threading.Thread(target=serve, args=(sock,), daemon=True).start()
        yield Node(box, str(program))


def _answer(server):
    """Answer questions; leave the rest to the socket's buffer."""
    while True:
        try:
            data, peer = server.recvfrom(1)
        except TimeoutError:
            continue
        except OSError:
            return
        if data == b"?":
            server.sendto(b"!", peer)


def _accept(listener):
    """Take connections as they come."""
    while True:
        try:
            listener.accept()[0].close()
        except TimeoutError:
            continue
        except OSError:
            return
