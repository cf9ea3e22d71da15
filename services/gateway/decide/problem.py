"""From our errors to HTTP: status, headers and OpenAI's error JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared import messages as m
from shared.errors import BadRequest, CalmError

STATUS: Mapping[str, int] = {
    "bad_request": 400,
    "invalid_query": 400,
    "invalid_objective": 400,
    "unsupported": 400,
    "context_exceeded": 400,
    "unauthorized": 401,
    "unknown_model": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "cancelled": 409,
    "prompt_too_large": 413,
    "not_json": 415,
    "no_feasible_model": 422,
    "engine_failed": 502,
    "restarted": 502,
    "unreadable": 502,
    "overloaded": 503,
    "not_ready": 503,
    "bus_unavailable": 503,
    "deadline_expired": 504,
}
"""By our error code; 500 for any other."""

RETRY_AFTER_S: Mapping[str, int] = {"overloaded": 1, "bus_unavailable": 1, "not_ready": 5}

_TYPES = {401: "authentication_error", 503: "service_unavailable_error", 504: "timeout_error"}


@dataclass(frozen=True)
class Problem:
    """An error as HTTP tells it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def of_failure(failure: m.Failure, param: str = "") -> Problem:
    """An error as data, whoever found it; `param` is the parameter that is meant, if one is."""
    status = STATUS.get(failure.code, 500)
    again = status == 503 or (failure.retryable and status == 502)
    headers = {"x-should-retry": "true" if again else "false"}  # OpenAI's clients would repeat every 5xx
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S.get(failure.code, 1))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    error = {
        "message": f"{failure.message} {failure.remedy}".strip(),
        "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": param or ("model" if failure.code == "unknown_model" else None),
        "code": failure.code,
        "remedy": failure.remedy,
        "retryable": failure.retryable,
    }
    return Problem(status, {"error": error}, headers)


def of_error(error: CalmError) -> Problem:
    """One of our own errors."""
    failure = m.Failure(
        code=error.code, message=error.message, remedy=error.remedy, retryable=error.retryable
    )  # fmt: skip
    return of_failure(failure, error.field if isinstance(error, BadRequest) else "")


def of_status(status: int, reason: str) -> Problem:
    """What the HTTP server itself refuses."""
    code, message, remedy = _SERVER.get(status, ("bad_request", f"The request was refused: {reason}.", ""))
    if status >= 500:
        code, message, remedy = "internal", "The gateway failed.", "Its log says more, under the id in `x-request-id`."
    problem = of_failure(m.Failure(code=code, message=message, remedy=remedy))
    return Problem(status, problem.body, problem.headers)


_SERVER = {
    404: ("not_found", "There is nothing at this path.", "The API is under /v1; docs/http.md lists every path."),
    405: ("method_not_allowed", "This path does not take this method.", "docs/http.md lists every path and method."),
    408: ("request_timeout", "The request did not arrive in time.", "Send it whole."),
    413: ("prompt_too_large", "The body is too large.", "Shorten it, or raise CALM_MAX_PROMPT_BYTES."),
    415: ("not_json", "The body is not declared as JSON.", "Send the header `Content-Type: application/json`."),
}
