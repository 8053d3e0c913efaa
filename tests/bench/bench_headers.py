"""What reading proxies' headers costs TCP through a node: one long connection, many short ones."""

import argparse
import os
import socket
import tempfile
import threading
import time
from contextlib import ExitStack, closing, suppress

from tests.bench import node as nodes
from tests.bench.__main__ import compare, kernel_source, no_tracer
from tests.kernel.box import SERVER

ROUNDS, MEBIBYTES, CONNECTIONS = 9, 1024, 500
PORT = 8081
TRACK = "table inet t { chain c { type filter hook prerouting priority 0; ct state new; } }"
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n"
CHUNK = bytes(1 << 20)


def main():
    """Print two tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = arguments.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        box = stack.enter_context(nodes.built(directory)).box
        box.rules(TRACK)
        # With --rounds there can be more connections than ports: reuse those in TIME_WAIT.
        box.set("client", "ipv4/tcp_tw_reuse", 1)
        listener = stack.enter_context(closing(box.socket("server", 4, socket.SOCK_STREAM)))
        listener.bind((SERVER[4], PORT))
        listener.listen(1024)
        listener.settimeout(None)
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        setups = {
            "no tracer": no_tracer,
            "trace": lambda: kernel_source(nodes.Node(box, "")),
            "trace, proxies' headers": lambda: kernel_source(
                nodes.Node(box, ""), has_proxy_headers=True
            ),
        }
        print(f"One long connection, {os.cpu_count()} CPUs:\n")
        compare(setups, lambda: long_ns(box), rounds, "MiB/s")
        # On one CPU: to wake up another costs more than what is measured, or nothing, as it comes.
        for thread in (threading.get_native_id(), server.native_id):
            os.sched_setaffinity(thread, {min(os.sched_getaffinity(0))})
        print("Short connections, one after the other, CPU time of client and server:\n")
        compare(setups, lambda: short_ns(box), rounds, "connections/s")


def serve(listener):
    """Take all that comes, and close when the client has ended."""
    buffer = bytearray(1 << 20)
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                while connection.recv_into(buffer):
                    pass


def connect(box):
    sock = box.socket("client", 4, socket.SOCK_STREAM)
    sock.connect((SERVER[4], PORT))
    return sock


def end(sock):
    """Wait until the server has taken everything."""
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""


def long_ns(box):
    """Nanoseconds for each MiB of one connection, past its first bytes."""
    with closing(connect(box)) as sock:
        sock.sendall(REQUEST + CHUNK)
        began = time.monotonic_ns()
        for _ in range(MEBIBYTES):
            sock.sendall(CHUNK)
        end(sock)
        return (time.monotonic_ns() - began) / MEBIBYTES


def short_ns(box):
    """Nanoseconds of CPU time for each connection that sends one request."""
    began = time.process_time_ns()
    for _ in range(CONNECTIONS):
        with closing(connect(box)) as sock:
            sock.sendall(REQUEST)
            end(sock)
    return (time.process_time_ns() - began) / CONNECTIONS


if __name__ == "__main__":
    main()
