# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors of the API as RFC 9457 has them: application/problem+json, with what to do next where that is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qrapd.errors import (
    AlreadySupervised,
    ConfigurationError,
    Conflict,
    Problem,
    QemuFailed,
    QmpFailed,
    QrapdError,
    Unavailable,
    Unknown,
    UsageError,
)

__all__ = ["MEDIA_TYPE", "TITLES", "Failure", "Report", "failure_of", "raw_response"]

MEDIA_TYPE = "application/problem+json"

Report: TypeAlias = Callable[[str, BaseException], None]
"""Is told of what nobody who asks can do anything about, a bug for example: where it was, and the error."""

TITLES = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
"""What RFC 9110 (and RFC 6585 for 431) calls them: the title of a problem without a type of its own."""

_STATUS: Sequence[tuple[type[QrapdError], int]] = (
    (ConfigurationError, 422),
    (UsageError, 422),
    (Unknown, 404),
    (Conflict, 409),
    (AlreadySupervised, 409),
    (Unavailable, 503),
    (QemuFailed, 503),
    (QmpFailed, 503),
)


class Failure(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        hint: str | None = None,
        problems: Sequence[Problem] | None = None,
        headers: Mapping[str, str] | None = None,
        reference: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.hint = hint
        self.problems = problems
        self.headers = dict(headers or {})
        self.reference = reference

    def document(self) -> dict[str, Any]:
        """RFC 9457's members, and ours: ``hint``, ``problems`` and ``reference``, each only where there is one."""
        made: dict[str, Any] = {"title": TITLES[self.status], "status": self.status, "detail": self.detail}
        if self.hint is not None:
            made["hint"] = self.hint
        if self.problems is not None:
            made["problems"] = [
                {"key": each.key, "reason": each.reason, "value": each.value, "hint": each.hint}
                for each in self.problems
            ]
        if self.reference is not None:
            made["reference"] = self.reference
        return made

    def body(self) -> bytes:
        """The document as UTF-8. Paths may hold bytes that are none: these are escaped."""
        return json.dumps(self.document(), ensure_ascii=False).encode("utf-8", errors="backslashreplace")


def failure_of(error: QrapdError) -> Failure:
    """What a failure below means to whoever asked."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 503)
    problems = error.problems if isinstance(error, ConfigurationError) else None
    return Failure(status, error.message, hint=error.hint, problems=problems)


def raw_response(status: int, detail: str) -> bytes:
    """A whole HTTP/1.1 response that closes the connection: for whom no application is asked."""
    body = Failure(status, detail).body()
    head = (
        f"HTTP/1.1 {status} {TITLES[status]}\r\nContent-Type: {MEDIA_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
