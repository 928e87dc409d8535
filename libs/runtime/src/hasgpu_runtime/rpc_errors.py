"""The one table between domain errors and gRPC statuses, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships without stubs
from hasgpu_core import errors
from hasgpu_core.errors import HasgpuError

STATUS: Mapping[type[HasgpuError], grpc.StatusCode] = {
    errors.InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ProfileFileError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.ConflictError: grpc.StatusCode.ABORTED,
    errors.FencedError: grpc.StatusCode.ABORTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.QueueFullError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ModelError: grpc.StatusCode.INTERNAL,
    errors.UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.IntegrityError: grpc.StatusCode.INVALID_ARGUMENT,  # the caller sent the bytes
    HasgpuError: grpc.StatusCode.INTERNAL,
}

_BY_STATUS: Mapping[grpc.StatusCode, type[HasgpuError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExistsError,
    grpc.StatusCode.ABORTED: errors.ConflictError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.CapacityError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
}
"""For statuses that do not name their error: from gRPC itself, or from other servers."""
_BY_NAME: Mapping[str, type[HasgpuError]] = {kind.__name__: kind for kind in STATUS}

_FIELDS: Mapping[type[HasgpuError], Mapping[str, Any]] = {
    errors.NotFoundError: {"kind": "", "name": ""},
    errors.AlreadyExistsError: {"kind": "", "name": ""},
    errors.ConflictError: {"key": "", "expected_revision": 0, "actual_revision": 0},
    errors.FencedError: {"lease": "", "token": 0, "current_token": 0},
    errors.IntegrityError: {"expected_sha256": "", "got_sha256": ""},
    errors.InvalidError: {"what": "", "expected": "", "got": ""},
    errors.ProfileFileError: {"what": "", "expected": "", "got": "", "line": 0, "column": ""},
}
"""Typed fields do not cross the wire; a rebuilt error has these and the whole message."""

ERROR_KEY = "hasgpu-error"
"""Trailing metadata: the error's class."""
RETRY_AFTER_KEY = "retry-after-ms"
"""Trailing metadata: when to try again."""
_DETAILS_KEY = "grpc-status-details-bin"


def status_of(error: HasgpuError) -> grpc.StatusCode:
    """Returns the status of an error, that of its nearest ancestor in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def trailing_metadata(error: HasgpuError) -> tuple[tuple[str, str | bytes], ...]:
    """Returns what goes with the status: the error's class and, where it has one, its retry hint.

    The hint goes twice, as plain milliseconds and as `google.rpc.RetryInfo` for clients that know the richer model.
    """
    result: list[tuple[str, str | bytes]] = [(ERROR_KEY, type(error).__name__)]
    retry_after_s = error.retry_after_s if isinstance(error, errors.UnavailableError) else None
    if retry_after_s is not None:
        delay_ms = max(0, round(retry_after_s * 1e3))
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(delay_ms)
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        code = int(grpc.StatusCode.UNAVAILABLE.value[0])
        status = status_pb2.Status(code=code, message=str(error), details=[detail])
        result += [(RETRY_AFTER_KEY, str(delay_ms)), (_DETAILS_KEY, status.SerializeToString())]
    return tuple(result)


def from_rpc_error(error: grpc.aio.AioRpcError) -> HasgpuError:
    """Returns the domain error that a failed call stands for, with the callee's message.

    A call that was cut off (CANCELLED) is an UnavailableError; what no row of the table fits is a plain HasgpuError.
    """
    metadata = dict(error.trailing_metadata() or ())
    name = metadata.get(ERROR_KEY, "")
    kind = _BY_NAME.get(str(name)) or _BY_STATUS.get(error.code(), HasgpuError)
    message = error.details() or error.code().name.lower().replace("_", " ")
    if error.code() is grpc.StatusCode.CANCELLED:
        kind = errors.UnavailableError
    if issubclass(kind, errors.UnavailableError):
        rebuilt = kind(message)
        after_ms = str(metadata.get(RETRY_AFTER_KEY, ""))
        if after_ms.isdigit():
            rebuilt.retry_after_s = int(after_ms) / 1e3
        return rebuilt
    plain = kind.__new__(kind)
    plain.args = (message,)
    for field, value in _FIELDS.get(kind, {}).items():
        setattr(plain, field, value)
    return plain
