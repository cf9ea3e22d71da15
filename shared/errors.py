"""The error tree. Errors are types with fields; across the wire they travel as `messages.Failure`.

CalmError
├── BadRequest               the caller can mend it: nothing was accepted
│   ├── InvalidQuery         `invalid_query`       wrong type, unknown field, empty prompt, bad value
│   ├── PromptTooLarge       `prompt_too_large`    more bytes than the intake takes
│   ├── UnknownModel         `unknown_model`       a model name that the fleet does not have
│   ├── InvalidObjective     `invalid_objective`   an objective that cannot be set
│   ├── Unsupported          `unsupported`         a parameter that would change the answer, and is not understood here
│   ├── Unauthorized         `unauthorized`        over HTTP: no key, or a wrong one
│   └── NotFound             `not_found`           no such query, model or operation
├── Unserved                 accepted, and ended without an answer
│   ├── ContextExceeded      `context_exceeded`    more tokens than any allowed model can read
│   ├── NoFeasibleModel      `no_feasible_model`   every model is excluded by a hard constraint
│   ├── DeadlineExpired      `deadline_expired`    the deadline passed first
│   ├── Cancelled            `cancelled`           `calm.cancel.<query_id>` came first
│   ├── EngineFailed         `engine_failed`       every attempt of the route failed
│   ├── Unreadable           `unreadable`          of one attempt only: what was expected of its answer is not in it
│   ├── Restarted            `restarted`           over HTTP: a new attempt says something else than what was streamed
│   └── Overloaded           `overloaded`          the queue is full
├── FleetFileInvalid         `fleet_invalid`       a fleet file; carries path, line, remedy
├── DataInvalid              `data_invalid`        recorded outcomes or a trace; carries path, line, remedy
├── ModelError               models and the model store
│   ├── SourceUnavailable    `source_unavailable`  download or read failed
│   │   ├── SourceForbidden  `source_forbidden`    the hub wants a token, or a licence accepted (401, 403)
│   │   ├── SourceMissing    `source_missing`      no such repository, revision or file (404)
│   │   └── SourceOffline    `source_offline`      the host cannot be reached
│   ├── NoSpace              `no_space`            the disk cannot take the download
│   ├── ExtraMissing         `extra_missing`       an optional part of the installation is needed
│   ├── ChecksumMismatch     `checksum_mismatch`   the bytes are not the ones that were pinned
│   ├── UnsupportedModel     `unsupported_model`   the importer lacks something, named in the message
│   │   └── NeedsExport      `needs_export`        weights without a graph, of a family that we build none for
│   └── ModelMissing         `model_missing`       not in the store
├── PlacementError           worker operations
│   ├── NoMemory             `no_memory`           the budget cannot hold it
│   ├── EngineLost           `engine_lost`         the engine process ended by itself
│   └── OperationTimeout     `operation_timeout`   a load or evict did not finish in time
├── DeviceUnavailable        `device_unavailable`  CUDA was asked for and is not what we got
├── SettingsInvalid          `settings_invalid`    an environment variable has a bad value
├── NotReady                 `not_ready`           the system is starting, or its models are not there yet
└── BusUnavailable           `bus_unavailable`     no NATS server, or nobody listens
"""

from __future__ import annotations


class CalmError(Exception):
    """Base of all errors. `remedy` says what to change; `retryable` whether the same call may succeed later."""

    code = "internal"
    retryable = False

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class BadRequest(CalmError):
    """`field` is the part of the message that is meant, empty where that is not known."""

    code = "bad_request"

    def __init__(self, message: str, remedy: str = "", *, field: str = "") -> None:
        super().__init__(message, remedy)
        self.field = field


class InvalidQuery(BadRequest):
    code = "invalid_query"


class PromptTooLarge(BadRequest):
    code = "prompt_too_large"


class UnknownModel(BadRequest):
    code = "unknown_model"


class InvalidObjective(BadRequest):
    code = "invalid_objective"


class Unsupported(BadRequest):
    code = "unsupported"


class Unauthorized(BadRequest):
    code = "unauthorized"


class NotFound(BadRequest):
    code = "not_found"


class Unserved(CalmError):
    code = "unserved"


class ContextExceeded(Unserved):
    code = "context_exceeded"


class NoFeasibleModel(Unserved):
    code = "no_feasible_model"


class DeadlineExpired(Unserved):
    code = "deadline_expired"
    retryable = True


class Cancelled(Unserved):
    code = "cancelled"


class EngineFailed(Unserved):
    code = "engine_failed"
    retryable = True


class Unreadable(Unserved):
    code = "unreadable"
    retryable = True


class Restarted(Unserved):
    code = "restarted"
    retryable = True


class Overloaded(Unserved):
    code = "overloaded"
    retryable = True


class FleetFileInvalid(CalmError):
    """A fleet file that cannot be used. `line` is 1-based, 0 when the whole file is meant."""

    code = "fleet_invalid"

    def __init__(self, message: str, remedy: str = "", *, path: str = "", line: int = 0) -> None:
        super().__init__(message, remedy)
        self.path = path
        self.line = line

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}: " if self.line else f"{self.path}: " if self.path else ""
        return f"{where}{super().__str__()}"


class DataInvalid(CalmError):
    """Recorded outcomes or arrivals that cannot be used. `line` is 1-based, 0 when the whole file is meant."""

    code = "data_invalid"

    def __init__(self, message: str, remedy: str = "", *, path: str = "", line: int = 0) -> None:
        super().__init__(message, remedy)
        self.path = path
        self.line = line

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}: " if self.line else f"{self.path}: " if self.path else ""
        return f"{where}{super().__str__()}"


class ModelError(CalmError):
    code = "model_error"


class SourceUnavailable(ModelError):
    code = "source_unavailable"
    retryable = True


class SourceForbidden(SourceUnavailable):
    code = "source_forbidden"
    retryable = False


class SourceMissing(SourceUnavailable):
    code = "source_missing"
    retryable = False


class SourceOffline(SourceUnavailable):
    code = "source_offline"


class NoSpace(ModelError):
    code = "no_space"


class ExtraMissing(ModelError):
    code = "extra_missing"


class ChecksumMismatch(ModelError):
    code = "checksum_mismatch"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class NeedsExport(UnsupportedModel):
    code = "needs_export"


class ModelMissing(ModelError):
    code = "model_missing"


class PlacementError(CalmError):
    code = "placement_error"
    retryable = True


class NoMemory(PlacementError):
    code = "no_memory"


class EngineLost(PlacementError):
    code = "engine_lost"


class OperationTimeout(PlacementError):
    code = "operation_timeout"


class DeviceUnavailable(CalmError):
    code = "device_unavailable"


class SettingsInvalid(CalmError):
    code = "settings_invalid"


class NotReady(CalmError):
    code = "not_ready"
    retryable = True


class BusUnavailable(CalmError):
    code = "bus_unavailable"
    retryable = True


def by_code(code: str) -> type[CalmError]:
    """The error class that carries `code`; CalmError itself for a code that this version does not know."""
    waiting: list[type[CalmError]] = [CalmError]
    while waiting:
        kind = waiting.pop()
        if kind.code == code:
            return kind
        waiting.extend(kind.__subclasses__())
    return CalmError
