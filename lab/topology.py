"""Builds the lab's network namespaces, and removes them, whatever happens."""

import fcntl
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import claim, echo, wiring
from lab.hosts import ECHOES, HOSTS, NODES
from tracer.errors import LabError
from tracer.kernel import netns

# A link is up a few milliseconds after both its ends. The rest is for a very busy machine.
_LINKS_UP_S = 5.0

_SIOCGIFFLAGS = 0x8913
_IFF_RUNNING = 0x40


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """
    A living lab.

    ``id`` is unique on this machine, so that several labs can run side by side.
    """

    id: str

    def netns(self, host: str) -> Path:
        """Return the network namespace of one of ``lab.hosts.HOSTS``."""
        if host not in HOSTS:
            raise ValueError(f"no host {host!r} in the lab; there are {', '.join(HOSTS)}")
        return netns.NETNS_DIR / f"{self.id}-{host}"

    def route_via(self, node: str) -> None:
        """Make the router send load-balancer, external and Service addresses to this node."""
        self.run("router", "ip", "-batch", "-", stdin=_lines(wiring.routes_via(node)))

    def set(self, host: str, setting: str, value: str) -> None:
        """Change a setting of one host, given by its path under ``/proc/sys/net``."""
        with netns.inside(self.netns(host)):
            _set(setting, value)

    def run(self, host: str, *argv: str, stdin: str = "") -> str:
        """
        Run a command in a host's network namespace and return what it prints.

        Raises:
            LabError: If it fails, with its first line of output.
        """
        with netns.inside(self.netns(host)):
            return _run(argv, stdin, where=f" on {host}")


@contextmanager
def build() -> Iterator[Lab]:
    """
    Build a lab, with echo servers running and without any rules, and remove it at the end.

    What killed labs left behind is removed first. Nothing outside the lab's own network namespaces
    is changed.

    Raises:
        LabError: If it cannot be built, which needs root.
    """
    remove_leftovers()
    with claim.claim() as name:
        lab = Lab(id=name)
        try:
            _make_namespaces(lab)
            with echo.serving({host: lab.netns(host) for host in ECHOES}):
                _connect(lab)
                yield lab
        finally:
            _remove_namespaces(name)


def remove_leftovers() -> list[str]:
    """
    Remove the labs whose process has died, and return their names. Living labs are not touched.

    Raises:
        LabError: If one cannot be removed.
    """
    with claim.dead() as names:
        for name in names:
            _remove_namespaces(name)
    return names


def _make_namespaces(lab: Lab) -> None:
    _ip(f"netns add {lab.netns(host).name}" for host in HOSTS)
    for host in HOSTS:
        for setting, value in wiring.sysctls(host).items():
            lab.set(host, setting, value)


def _connect(lab: Lab) -> None:
    _ip(wiring.links(lambda host: lab.netns(host).name))
    for host in HOSTS:
        lab.run(host, "ip", "-batch", "-", stdin=_lines(wiring.setup(host)))
    lab.route_via(next(iter(NODES)))
    deadline = time.monotonic() + _LINKS_UP_S
    for host in HOSTS:
        with netns.inside(lab.netns(host)):
            for device in wiring.devices(host):
                _wait_until_up(device, host, deadline)


def _wait_until_up(device: str, host: str, deadline: float) -> None:
    # A device that was set up drops everything until the kernel has noticed, in the background,
    # that the other end is up, too.
    request = struct.pack("16sh14x", device.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while True:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
            if struct.unpack("16sh14x", answer)[1] & _IFF_RUNNING:
                return
            if time.monotonic() > deadline:
                raise LabError(f"{device} on {host} did not come up in {_LINKS_UP_S:.0f} s")
            time.sleep(0.001)


def _remove_namespaces(name: str) -> None:
    # With -force, one that cannot be deleted does not stop the others.
    _ip((f"netns delete {path.name}" for path in claim.namespaces(name)), "-force")


def _set(setting: str, value: str) -> None:
    try:
        Path("/proc/sys/net", setting).write_text(value)
    except OSError as error:
        raise LabError(f"cannot set net/{setting} to {value}: {error.strerror}") from error


def _ip(lines: Iterable[str], *options: str) -> None:
    _run(("ip", *options, "-batch", "-"), _lines(lines))


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _run(argv: tuple[str, ...], stdin: str, where: str = "") -> str:
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LabError(f"cannot run {argv[0]}: it is not installed") from error
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip()).partition("\n")[0]
        raise LabError(f"{' '.join(argv)} failed{where} ({done.returncode}): {complaint}")
    return done.stdout
