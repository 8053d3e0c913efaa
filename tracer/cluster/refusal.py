"""Turn failures between srcip and the API server into one line that says what to do."""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
from lightkube.core.exceptions import ConfigError

from tracer.cluster.errors import ClusterError
from tracer.cluster.resource import Resource, Review

_SHOWN = 300


class ExpiredError(Exception):
    """The resourceVersion or continue token is too old: 410 Gone."""


class FinalError(ClusterError):
    """A failure that lasts until somebody acts: credentials, permissions, certificates."""


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """
    Turn the exceptions of lightkube and of its HTTP client into `ClusterError`.

    Args:
        doing: The operation and its target, such as ``watch nodes at https://...``.
    """
    try:
        yield
    except TimeoutError as error:
        # asyncio.timeout() raises it without a text; the kernel and TLS raise it with one.
        why = _line(str(error)) or "the server did not finish in time"
        raise ClusterError(f"{doing}: {why}") from None
    except httpx.TimeoutException as error:
        what = "connection" if isinstance(error, httpx.ConnectTimeout) else "answer"
        raise ClusterError(f"{doing}: no {what} in time") from None
    except ConfigError as error:
        # lightkube reads the token's file at the first request, and again after each 401.
        raise FinalError(f"{doing}: {_line(str(error))}") from None
    except UnicodeError:
        raise FinalError(f"{doing}: the file of the bearer token is not text") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = _certificate_reason(error)
        if reason is not None:
            raise FinalError(
                f"{doing}: certificate not accepted: {reason}; {_certificate_advice(reason)}"
            ) from None
        raise ClusterError(f"{doing}: {_line(str(error)) or type(error).__name__}") from None


def check(status: int, body: bytes, verb: str, resource: Resource | Review) -> None:
    """
    Raise unless the request succeeded.

    Args:
        status: HTTP status.
        body: The answer, or the watch event that holds it; a ``Status`` object on failure.
        verb: RBAC verb of the request.
        resource: What was requested.

    Raises:
        ExpiredError: The resourceVersion or continue token has expired.
        FinalError: The server refuses the credentials or the permission.
        ClusterError: Any other failure.
    """
    if status in (200, 201):
        return
    if status == 410:
        raise ExpiredError
    message = _message(body)
    if status == 401:
        raise FinalError(
            f"{verb} {resource.plural}: the API server rejects the credentials"
            f" (401 {message or 'Unauthorized'}); has the token expired?"
        )
    if status == 403:
        raise FinalError(
            f"{verb} {resource.plural}: not permitted ({message or '403 Forbidden'});"
            f" add to the ClusterRole: {resource.rule}"
        )
    raise ClusterError(f"{verb} {resource.plural}: the API server answered {status} {message}")


def _message(body: bytes) -> str:
    try:
        status = json.loads(body)
    except (ValueError, RecursionError):
        return _line(body[:_SHOWN].decode(errors="replace"))
    if isinstance(status, dict) and isinstance(status.get("object"), dict):
        status = status["object"]
    message = status.get("message") if isinstance(status, dict) else None
    return _line(message) if isinstance(message, str) else ""


def _certificate_reason(error: BaseException | None) -> str | None:
    # The HTTP client wraps the TLS error, more than once.
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return _line(error.verify_message)
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            return _line(f"the server answered {error.reason}")
        error = error.__cause__ or error.__context__
    return None


def _certificate_advice(reason: str) -> str:
    if "expired" in reason.lower() or "not yet valid" in reason:
        return "renew it, or correct this machine's clock"
    return "check certificate-authority-data and server of the kubeconfig"


def _line(text: str) -> str:
    line = " ".join(text.split())[:_SHOWN]
    return "".join(char if char.isprintable() else "?" for char in line)
