"""The model of a scenario: who connects to what, and the expected outcome."""

from dataclasses import dataclass, replace
from typing import Literal

from lab.hosts import FAMILIES, Family
from lab.kube_proxy import ALL_MODES, Mode
from lab.services import PROTOS, Proto

Outcome = Literal["answered", "timeout", "refused"]
Via = Literal["clusterip", "nodeport", "loadbalancer", "externalip", "pod", "none"]
# kube-proxy's own causes of masquerading; in IPVS mode the cause is that mode.
_OF_KUBE_PROXY = {"external-traffic-policy-cluster", "off-cluster-source", "node-local-source"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """
    The expected outcome of a connection.

    Args:
        outcome: What the client gets.
        or_outcome: What it may get instead, if that depends on a race in the kernel.
        seen: Whose address the backend prints: ``client``, a node, or ``gateway of`` a node.
            None if no backend is reached.
        verdict: The verdict on the source, over the whole path.
        cause: Why the source is not preserved.
    """

    outcome: Outcome
    or_outcome: Outcome | None = None
    seen: str | None = None
    verdict: str
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Except:
    """A different outcome in all of these modes, families and protocols."""

    modes: tuple[Mode, ...] = ALL_MODES
    families: tuple[Family, ...] = FAMILIES
    protos: tuple[Proto, ...] = PROTOS
    expect: Expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """
    A proxy on the router that the client connects to.

    Args:
        header: The header in which it names the client.
        port: The port it listens on. It connects to the Service's NodePort on the target.
    """

    header: Literal["proxy-v1", "proxy-v2", "x-forwarded-for"]
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """
    A way to reach a Service, and what the backend then sees.

    Args:
        id: The row's name, for example ``S14e``.
        title: The row in words.
        client: Who connects: a host of the lab, or ``client2`` for the client's second address.
        service: The Service, None if the connection goes to no Service.
        via: Which kind of its addresses is used.
        target: For a NodePort the node whose address is used, or ``loopback``. Without a Service
            the host that is reached.
        through: The node that the router sends load-balancer and Service addresses to, if it
            matters.
        expect: The expected outcome.
        exceptions: Where the outcome is different.
        families: The families in which the scenario exists.
        protos: The protocols in which it exists.
        relay: The proxy between the client and the Service, if there is one.
        observed: Whether it is among the recorded observations.
    """

    id: str
    title: str
    client: str
    service: str | None
    via: Via
    target: str | None = None
    through: str | None = None
    expect: Expectation
    exceptions: tuple[Except, ...] = ()
    families: tuple[Family, ...] = FAMILIES
    protos: tuple[Proto, ...] = PROTOS
    relay: Relay | None = None
    observed: bool = True

    @property
    def verdict(self) -> str:
        """The verdict, apart from the exceptions."""
        return self.expect.verdict

    @property
    def cause(self) -> str | None:
        """The cause, apart from the exceptions."""
        return self.expect.cause

    def expected(self, mode: Mode, family: Family, proto: Proto) -> Expectation:
        """Return the expected outcome of this variant."""
        expect = self.expect
        for other in self.exceptions:
            if mode in other.modes and family in other.families and proto in other.protos:
                expect = other.expect
                break
        if mode == "ipvs" and expect.cause in _OF_KUBE_PROXY:
            return replace(expect, cause="ipvs-masquerade")
        return expect
