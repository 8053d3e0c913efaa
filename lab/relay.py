"""
The load balancer of S9: a proxy on the router, which terminates connections and opens its own.

It names its clients to the backend as real load balancers do, so that the demo needs none.
"""

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from lab import echo
from lab.hosts import FAMILIES, NODES, ROUTER_TO_CLIENT, Family
from lab.model import Scenario
from lab.services import services
from lab.topology import Lab
from tracer.errors import LabError
from tracer.kernel import netns

_READY = b"ready\n"
_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_PROXY, _V2_TCP4, _V2_TCP6 = 0x21, 0x11, 0x21
_CHUNK = 65536


@contextmanager
def serving(lab: Lab, scenarios: Sequence[Scenario]) -> Iterator[None]:
    """
    Run the proxy for these scenarios; those without one are left out.

    Raises:
        LabError: If it does not start.
    """
    routes = [_route(scenario, family) for scenario in scenarios for family in FAMILIES]
    command = [sys.executable, "-m", "lab.relay", str(os.getpid()), str(lab.netns("router"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [*command, *filter(None, routes)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        try:
            if process.stdout is None or process.stdout.readline() != _READY:
                raise LabError("the proxy did not start; see its message above")
            yield
        finally:
            process.kill()


def _route(scenario: Scenario, family: Family) -> str | None:
    """Return the proxy's argument: the header, where to listen, and where to connect."""
    if scenario.relay is None or scenario.service is None:
        return None
    here = ROUTER_TO_CLIENT.of(family)
    there = NODES[scenario.target or ""].address.of(family)
    port = services()[scenario.service].ports["tcp"].node_port
    return f"{scenario.relay.header},{here},{scenario.relay.port},{there},{port}"


def header(kind: str, peer: tuple[str, int], own: tuple[str, int]) -> bytes:
    """Return a header of the PROXY protocol, or a field to insert into a request."""
    (src, sport), (dst, dport) = peer, own
    version = ip_address(src).version
    match kind:
        case "proxy-v1":
            return f"PROXY TCP{version} {src} {dst} {sport} {dport}\r\n".encode()
        case "proxy-v2":
            body = ip_address(src).packed + ip_address(dst).packed
            body += struct.pack("!HH", sport, dport)
            family = _V2_TCP4 if version == 4 else _V2_TCP6
            return _V2_SIGNATURE + struct.pack("!BBH", _V2_PROXY, family, len(body)) + body
        case _:
            return f"X-Forwarded-For: {f'[{src}]' if version == 6 else src}:{sport}\r\n".encode()


def main(arguments: list[str]) -> None:
    """Serve ``HEADER,ADDRESS,PORT,ADDRESS,PORT ...`` in a namespace until the parent dies."""
    parent, path, *routes = arguments
    echo.die_with(int(parent))
    with netns.inside(Path(path)), suppress(KeyboardInterrupt):
        asyncio.run(_serve(routes))


async def _serve(routes: Sequence[str]) -> None:
    for route in routes:
        kind, here, port, there, to = route.split(",")
        await asyncio.start_server(
            partial(_relay, kind, (there, int(to))), here, int(port), family=_family(here)
        )
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    await asyncio.Event().wait()


async def _relay(
    kind: str,
    backend: tuple[str, int],
    client: asyncio.StreamReader,
    answers: asyncio.StreamWriter,
) -> None:
    with suppress(OSError):
        request = await client.read(_CHUNK)
        told = header(
            kind,
            answers.get_extra_info("peername")[:2],
            answers.get_extra_info("sockname")[:2],
        )
        reader, writer = await asyncio.open_connection(*backend)
        line, end, rest = request.partition(b"\r\n")
        is_field = kind == "x-forwarded-for"
        writer.write(line + end + told + rest if is_field else told + request)
        while chunk := await reader.read(_CHUNK):
            answers.write(chunk)
            await answers.drain()
        writer.close()
    answers.close()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


if __name__ == "__main__":
    main(sys.argv[1:])
