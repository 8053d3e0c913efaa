"""What a scenario is: who connects to what, and what must come of it."""

from dataclasses import dataclass, replace
from typing import Literal

from lab.hosts import FAMILIES, Family
from lab.kube_proxy import ALL_MODES, Mode
from lab.services import PROTOS, Proto

Outcome = Literal["answered", "timeout", "refused"]
Via = Literal["clusterip", "nodeport", "loadbalancer", "externalip", "pod", "none"]
# kube-proxy's own reasons to masquerade; in IPVS mode they are called by that mode.
_OF_KUBE_PROXY = {"external-traffic-policy-cluster", "off-cluster-source", "node-local-source"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """
    What must come of a connection.

    Args:
        outcome: What the client gets.
        or_outcome: What it may get instead, where the kernel leaves it to a race.
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
    """Where a scenario ends otherwise: in all of these modes, families and protocols."""

    modes: tuple[Mode, ...] = ALL_MODES
    families: tuple[Family, ...] = FAMILIES
    protos: tuple[Proto, ...] = PROTOS
    expect: Expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """
    A proxy on the router that the client connects to.

    Args:
        header: By which header it tells of the client.
        port: Where it listens. It goes on to the NodePort of the scenario's Service on its target.
    """

    header: Literal["proxy-v1", "proxy-v2", "x-forwarded-for"]
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """
    A way to reach a Service, and what the backend sees then.

    Args:
        id: The row's name, for example ``S14e``.
        title: The row in words.
        client: Who connects: a host of the lab, or ``client2`` for the client's second address.
        service: The Service, None if the connection goes to no Service.
        via: By which of its addresses the Service is reached.
        target: For a NodePort the node whose address is used, or ``loopback``. Without a Service
            the host that is reached.
        through: The node that the router sends load-balancer and Service addresses to, where
            it matters.
        expect: What must come of it.
        exceptions: Where that is different.
        families: Where the scenario exists at all.
        protos: The protocols that it exists for.
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
        """The verdict, but for the exceptions."""
        return self.expect.verdict

    @property
    def cause(self) -> str | None:
        """The cause, but for the exceptions."""
        return self.expect.cause

    def expected(self, mode: Mode, family: Family, proto: Proto) -> Expectation:
        """Return what must come of this variant."""
        expect = self.expect
        for other in self.exceptions:
            if mode in other.modes and family in other.families and proto in other.protos:
                expect = other.expect
                break
        if mode == "ipvs" and expect.cause in _OF_KUBE_PROXY:
            return replace(expect, cause="ipvs-masquerade")
        return expect
