"""Parameter types of options: prefixes, bounded numbers, marks, names of Services."""

import math
from ipaddress import ip_interface, ip_network
from typing import Any

import click

from tracer.model import IPNetwork


class Cidr(click.ParamType[IPNetwork]):
    """An address or a prefix, IPv4 or IPv6."""

    name = "cidr"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> IPNetwork:
        """Parse ``192.0.2.0/24``; an address alone is a prefix of full length."""
        text = str(value)
        try:
            # Packets do not carry a scope such as %eth0.
            return ip_network("" if "%" in text else text)
        except ValueError:
            self.fail(_cidr_complaint(text), param, ctx)


class ServiceName(click.ParamType[tuple[str, str]]):
    """A Service as NAMESPACE/NAME."""

    name = "service"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Split at the slash."""
        namespace, slash, name = str(value).partition("/")
        if not (namespace and slash and name) or "/" in name:
            self.fail(f"{value!r} is not NAMESPACE/NAME, such as default/web", param, ctx)
        return namespace, name


class Number(click.ParamType[int]):
    """A whole number within inclusive bounds."""

    name = "number"

    def __init__(self, least: int, most: int | None = None) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse decimal digits."""
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or not _is_within(number, self._least, self._most):
            bounds = f"of {self._least} or more"
            if self._most is not None:
                bounds = f"from {self._least} to {self._most}"
            self.fail(f"{str(value)!r} is not a whole number {bounds}", param, ctx)
        return number


class Seconds(click.ParamType[float]):
    """
    A time in seconds within inclusive bounds; neither infinite nor NaN.

    Args:
        least: The shortest; 0 means anything above 0.
        most: The longest, if any.
    """

    name = "seconds"

    def __init__(self, least: float = 0, most: float | None = None) -> None:
        self._least, self._most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse a decimal number."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        is_within = _is_within(seconds, self._least, self._most) and seconds > 0
        if not (math.isfinite(seconds) and is_within):
            least = f"at least {self._least:g}" if self._least else "more than 0"
            most = f" and at most {self._most:g}" if self._most is not None else ""
            self.fail(f"{str(value)!r} is not a number of seconds, {least}{most}", param, ctx)
        return seconds


class Mark(click.ParamType[int]):
    """A packet mark that is not 0, also as 0x4000."""

    name = "mark"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse decimal or hexadecimal, 1 to 0xffffffff."""
        try:
            mark = int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is not a number, such as 0x4000", param, ctx)
        if not 0 < mark <= 0xFFFFFFFF:
            self.fail(f"{value!r} is not a 32-bit mark, from 1 to 0xffffffff", param, ctx)
        return mark


def _cidr_complaint(text: str) -> str:
    try:
        interface = ip_interface("" if "%" in text else text)
    except ValueError:
        return f"{text!r} is neither an address nor a prefix such as 192.0.2.0/24"
    return f"{text} has host bits set: use {interface.network}, or {interface.ip} alone"


def _is_within(number: float, least: float, most: float | None) -> bool:
    return number >= least and (most is None or number <= most)
