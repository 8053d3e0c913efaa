"""What a recording stores about a node, as JSON."""

from ipaddress import ip_address, ip_network
from typing import Any, get_args

from tracer.ruleset.model import ProxyMode
from tracer.views import Place

_MODES: tuple[ProxyMode, ...] = get_args(ProxyMode)


def to_json(place: Place) -> dict[str, Any]:
    """Return a place as an object for `from_json`."""
    return {
        "addresses": sorted(map(str, place.addresses)),
        "service_addresses": sorted(map(str, place.service_addresses)),
        "interfaces": {str(index): name for index, name in place.interfaces.items()},
        "device_kinds": {str(index): kind for index, kind in place.device_kinds.items()},
        "proxy_mode": place.proxy_mode,
        "masquerade_mark": place.masquerade_mark,
        "has_masquerade_all": place.has_masquerade_all,
        "cluster_cidrs": list(map(str, place.cluster_cidrs)),
    }


def from_json(value: dict[str, Any]) -> Place:
    """
    Read a place from a recording, which is not trusted.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: If it is malformed.
    """
    mode, has_all = value["proxy_mode"], value["has_masquerade_all"]
    if mode not in (*_MODES, None):
        raise ValueError(f"proxy mode {mode!r:.20}")
    return Place(
        addresses=frozenset(map(ip_address, map(str, value["addresses"]))),
        service_addresses=frozenset(map(ip_address, map(str, value.get("service_addresses", ())))),
        interfaces={int(index): str(name) for index, name in value["interfaces"].items()},
        device_kinds={int(i): str(kind) for i, kind in value.get("device_kinds", {}).items()},
        proxy_mode=mode,
        masquerade_mark=int(value["masquerade_mark"]),
        has_masquerade_all=None if has_all is None else bool(has_all),
        cluster_cidrs=tuple(map(ip_network, map(str, value["cluster_cidrs"]))),
    )
