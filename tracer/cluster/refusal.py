"""What went wrong between us and the API server, as one line that says what to do."""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx

from tracer.cluster.errors import ClusterError
from tracer.cluster.resource import Resource, Review

_SHOWN = 300


class ExpiredError(Exception):
    """The resourceVersion or continue token is too old: 410 Gone."""


class FinalError(ClusterError):
    """A failure that ends only when somebody acts: credentials, permissions, certificates."""


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """
    Turn what the HTTP client raises into `ClusterError`.

    Args:
        doing: What failed and where, such as ``watch nodes at https://...``.
    """
    try:
        yield
    except TimeoutError as error:
        # A limit of ours says nothing; the kernel does, and TLS, which waits for an end in order.
        why = _line(str(error)) or "the server did not end it in time"
        raise ClusterError(f"{doing}: {why}") from None
    except httpx.TimeoutException as error:
        what = "connection" if isinstance(error, httpx.ConnectTimeout) else "answer"
        raise ClusterError(f"{doing}: no {what} in time") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = _certificate_reason(error)
        if reason is not None:
            raise FinalError(
                f"{doing}: certificate not accepted: {reason}; {_certificate_advice(reason)}"
            ) from None
        raise ClusterError(f"{doing}: {_line(str(error)) or type(error).__name__}") from None


def check(status: int, body: bytes, verb: str, resource: Resource | Review) -> None:
    """
    Return if the server did what was asked.

    Args:
        status: HTTP status.
        body: The answer, or the watch event that carries it: a ``Status`` where it failed.
        verb: RBAC verb of the request.
        resource: What was asked for.

    Raises:
        ExpiredError: The state to go on from is no longer known.
        FinalError: The server refuses us.
        ClusterError: Anything else.
    """
    if status in (200, 201):
        return
    if status == 410:
        raise ExpiredError
    message = _message(body)
    if status == 401:
        raise FinalError(
            f"{verb} {resource.plural}: the API server does not accept the credentials"
            f" (401 {message or 'Unauthorized'}): is the token expired?"
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
    # The HTTP client wraps the error of the TLS layer, more than once.
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return _line(error.verify_message)
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            return _line(f"the server answered {error.reason}")
        error = error.__cause__ or error.__context__
    return None


def _certificate_advice(reason: str) -> str:
    if "expired" in reason.lower() or "not yet valid" in reason:
        return "was it renewed, and is this machine's clock right?"
    return "check certificate-authority-data and server of the kubeconfig"


def _line(text: str) -> str:
    line = " ".join(text.split())[:_SHOWN]
    return "".join(char if char.isprintable() else "?" for char in line)
