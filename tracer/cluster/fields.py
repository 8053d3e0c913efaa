"""Typed reading of untrusted JSON, with errors that name the wrong field."""

import re
import sys
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address, ip_network

from tracer.cluster.errors import ClusterError
from tracer.model import IPAddress, IPNetwork

# Names reach terminals and metrics. This allows more than Kubernetes' DNS subdomains (RFC 1123) and
# IANA service names, but no space, quote or control character.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LEADING_ZEROS = re.compile(r"\b0+(?=[0-9])")
_SHOWN = 60


def shown(value: object) -> str:
    """Return an untrusted value as short, printable text on one line, in the words of JSON."""
    match value:
        case None:
            text = "missing"
        case dict():
            text = "an object"
        case list():
            text = "a list"
        case str() | int() | float():
            text = ascii(value)
        case _:
            text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class Fields:
    """
    A JSON object and its location, for messages such as ``Service a/b: spec.type is 3``.

    Readers treat null as absent, as the Kubernetes API does. All raise `ClusterError`.
    """

    __slots__ = ("_path", "_value", "where")

    def __init__(self, value: object, *, where: str, path: str = "") -> None:
        self.where = where
        self._path = path
        if not isinstance(value, dict):
            raise ClusterError(f"{where}: {path or 'it'} is {shown(value)}, expected an object")
        self._value = value

    def error(self, key: str, expected: str) -> ClusterError:
        """Return the error that says what is at ``key`` and what was expected."""
        return ClusterError(
            f"{self.where}: {self._at(key)} is {shown(self._value.get(key))}, expected {expected}"
        )

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        value = self._value.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def name(self, key: str) -> str | None:
        """Return a name, or None if absent or empty. It is safe to print."""
        value = self._value.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self.error(key, "a Kubernetes name")
        return sys.intern(value)

    def required_name(self, key: str) -> str:
        """Return a name that must be there."""
        name = self.name(key)
        if name is None:
            raise self.error(key, "a Kubernetes name")
        return name

    def number(self, key: str, *, most: int = 65535) -> int | None:
        """Return a number from 1 to ``most``, or None if absent or 0."""
        value = self._value.get(key)
        if value is None or value == 0:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise self.error(key, f"a number from 1 to {most}")
        return value

    def required_number(self, key: str) -> int:
        """Return a port number that must be there."""
        number = self.number(key)
        if number is None:
            raise self.error(key, "a number from 1 to 65535")
        return number

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self._value.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def raw(self, key: str) -> object:
        """Return the value, unchecked."""
        return self._value.get(key)

    def member(self, key: str) -> "Fields":
        """Return the object at ``key``; an absent one is empty."""
        value = self._value.get(key)
        return Fields({} if value is None else value, where=self.where, path=self._at(key))

    def members(self, key: str) -> Iterator["Fields"]:
        """Yield the objects of a list."""
        for index, value in enumerate(self._list(key)):
            yield Fields(value, where=self.where, path=f"{self._at(key)}[{index}]")

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of strings")
        return tuple(str(value) for value in values)

    def address(self, key: str) -> IPAddress | None:
        """Return an IP address, or None if absent or empty."""
        text = self.text(key)
        return self._address(key, text) if text else None

    def addresses(self, key: str) -> tuple[IPAddress, ...]:
        """Return a list of IP addresses."""
        return tuple([self._address(key, text) for text in self.texts(key)])

    def networks(self, key: str) -> tuple[IPNetwork, ...]:
        """Return a list of CIDRs; host bits are cleared, as Kubernetes' own parser does."""
        return tuple([self._network(key, text.strip()) for text in self.texts(key)])

    def network(self, key: str) -> IPNetwork:
        """Return one CIDR."""
        return self._network(key, self.text(key))

    def _address(self, key: str, text: str) -> IPAddress:
        try:
            return _parsed(text)
        except ValueError:
            raise self._bad(key, text, "an IP address") from None

    def _network(self, key: str, text: str) -> IPNetwork:
        try:
            return ip_network(_decimal(text), strict=False)
        except ValueError:
            raise self._bad(key, text, "a CIDR") from None

    def _bad(self, key: str, text: str, expected: str) -> ClusterError:
        return ClusterError(
            f"{self.where}: {self._at(key)} holds {shown(text)}, expected {expected}"
        )

    def _list(self, key: str) -> list[object]:
        value = self._value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return value

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _parsed(text: str) -> IPAddress:
    """Read an address as Kubernetes does (ParseIPSloppy in k8s.io/utils/net)."""
    try:
        found = ip_address(text)
    except ValueError:
        found = ip_address(_decimal(text))
    # ::ffff:a.b.c.d is the IPv4 address.
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _decimal(text: str) -> str:
    """Drop leading zeros, as objects made by older API servers may have them: no octal numbers."""
    return text if ":" in text else _LEADING_ZEROS.sub("", text)
