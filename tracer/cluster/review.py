"""
Who may scrape: holders of a bearer token, checked by the API server as kube components do it.

A TokenReview says whose token it is, a SubjectAccessReview whether that user is authorized. Answers
are cached for a bounded time, so that neither scrapers nor a flood of unknown tokens load the API
server. Tokens accepted before have a queue of their own, so that such a flood keeps no scraper out.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.cluster.access import connect_blocking, find_config
from tracer.cluster.errors import ClusterError
from tracer.cluster.fields import shown
from tracer.cluster.refusal import ExpiredError, check, translated
from tracer.cluster.resource import Review

_LOG = logging.getLogger(__name__)
# How long an answer is cached: a revoked token still works for the former, a token that just got
# its role is refused for the latter.
ALLOWED_S, REFUSED_S = 60.0, 10.0
_TIMEOUT_S = 5.0
# Cached tokens, and reviews per second at most, of accepted and of other tokens each.
_REMEMBERED, _QUESTIONS_PER_S = 1024, 20
# A token is a JWT of one or two KiB; the HTTP server refuses header lines above 64 KiB.
_MAX_TOKEN = 16 << 10

TOKENS = Review(group="authentication.k8s.io", plural="tokenreviews", kind="TokenReview")
ACCESS = Review(
    group="authorization.k8s.io", plural="subjectaccessreviews", kind="SubjectAccessReview"
)
Refusal = tuple[int, str]
_TOO_MANY: Refusal = (503, "too many tokens to check at once; try again")
_NO_TOKEN: Refusal = (401, "a bearer token is required")
_UNKNOWN_TOKEN: Refusal = (401, "the API server does not accept this token")


@dataclass(frozen=True, slots=True)
class _Known:
    refusal: Refusal | None
    until_s: float


class _Kind:
    """Cached answers and rate limit, of tokens accepted before or of the others."""

    def __init__(self) -> None:
        # Keys are digests: no token stays in memory.
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._lock = threading.Lock()
        # One review at a time: others that wait with the same token then find the answer.
        self.asking = threading.Lock()
        self._second, self._questions = 0, 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def look_up(self, digest: bytes, now_s: float) -> _Known | None:
        """Return an answer that has not expired."""
        with self._lock:
            known = self._known.get(digest)
        return known if known is not None and now_s < known.until_s else None

    def remember(self, digest: bytes, known: _Known) -> None:
        """Cache an answer; beyond the limit, drop the oldest."""
        with self._lock:
            self._known[digest] = known
            self._known.move_to_end(digest)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)

    def forget(self, digest: bytes) -> None:
        """Drop an answer."""
        with self._lock:
            self._known.pop(digest, None)

    def may_ask(self, now_s: float) -> bool:
        """Count one more review; return whether the rate limit allows it. Hold `asking`."""
        if int(now_s) != self._second:
            self._second, self._questions = int(now_s), 0
        self._questions += 1
        return self._questions <= _QUESTIONS_PER_S


class Reviewer:
    """Asks the API server whether a token's user may ``get`` a path. Safe for any thread."""

    def __init__(
        self,
        *,
        kubeconfig: Path | None = None,
        context: str | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Read the configuration and its certificates; nothing is connected yet.

        Args:
            kubeconfig: File to read; None to look where kubectl and pods do.
            context: Context in it; None for its current one.
            clock_s: The clock by which answers expire.

        Raises:
            ClusterError: The configuration cannot be used.
        """
        self._client = connect_blocking(find_config(kubeconfig, context), _TIMEOUT_S)
        self._clock_s = clock_s
        self._friends, self._strangers = _Kind(), _Kind()
        self._complained: str | None = None

    def refusal(self, authorization: str, path: str) -> Refusal | None:
        """
        Check an ``Authorization`` header.

        Args:
            authorization: Its value.
            path: The requested path, one of ours: a nonResourceURL of a role.

        Returns:
            None if access is granted, else the HTTP status and a line that says why not.
        """
        scheme, _, token = authorization.strip().partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            return _NO_TOKEN
        if len(token) > _MAX_TOKEN or not (token.isascii() and token.isprintable()):
            return _UNKNOWN_TOKEN
        digest = hashlib.sha256(f"{path} {token}".encode()).digest()
        kind = self._friends if digest in self._friends else self._strangers
        known = kind.look_up(digest, self._clock_s())
        if known is not None:
            return known.refusal
        if not kind.asking.acquire(timeout=_TIMEOUT_S):
            return _TOO_MANY
        try:
            known = self._look_up(digest) or self._ask(kind, digest, token, path)
        finally:
            kind.asking.release()
        return known.refusal

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _look_up(self, digest: bytes) -> _Known | None:
        now_s = self._clock_s()
        return self._friends.look_up(digest, now_s) or self._strangers.look_up(digest, now_s)

    def _ask(self, kind: _Kind, digest: bytes, token: str, path: str) -> _Known:
        now_s = self._clock_s()
        if not kind.may_ask(now_s):
            return _Known(_TOO_MANY, now_s)
        try:
            refusal = self._review(token, path)
        except (ClusterError, ExpiredError) as error:
            # Refuse, but do not cache that: the next attempt asks again.
            self._complain(str(error) or type(error).__name__)
            return _Known((503, "cannot ask the API server about this token"), now_s)
        self._complained = None
        known = _Known(refusal, now_s + (REFUSED_S if refusal else ALLOWED_S))
        if refusal is None:
            self._strangers.forget(digest)
            self._friends.remember(digest, known)
        else:
            self._friends.forget(digest)
            self._strangers.remember(digest, known)
        return known

    def _review(self, token: str, path: str) -> Refusal | None:
        status = self._create(TOKENS, {"token": token})
        user = status.get("user")
        if status.get("authenticated") is not True or not isinstance(user, dict):
            return _UNKNOWN_TOKEN
        name = user.get("username")
        attributes = {"path": path, "verb": "get"}
        spec = {
            "user": name,
            "nonResourceAttributes": attributes,
            **{key: user[key] for key in ("uid", "groups", "extra") if user.get(key)},
        }
        if self._create(ACCESS, spec).get("allowed") is True:
            return None
        return 403, f"{shown(name)} may not get {path}"

    def _create(self, review: Review, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        body = {"apiVersion": review.api_version, "kind": review.kind, "spec": spec}
        with translated(f"create {review.plural} at {self._client.base_url}"):
            answer = self._client.post(review.path, json=body)
        check(answer.status_code, answer.content, "create", review)
        try:
            status = answer.json()["status"]
        except (ValueError, LookupError, TypeError, RecursionError):
            status = None
        if not isinstance(status, dict):
            raise ClusterError(f"create {review.plural}: the answer has no status")
        return status

    def _complain(self, text: str) -> None:
        if text != self._complained:
            self._complained = text
            _LOG.warning("cannot check a token: %s", text)
