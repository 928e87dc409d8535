"""The streams, and making sure that they exist as they should."""

from __future__ import annotations

from typing import Any

import nats.js.api
import nats.js.errors
from hasgpu_core.events import COMMAND_SUBJECTS, STATE_SUBJECTS

from hasgpu_runtime.layout import LAYOUT, MARK, check_layout

STATE = "STATE"
COMMANDS = "COMMANDS"
BUCKET = "artifacts"
BUCKET_STREAM = f"OBJ_{BUCKET}"

DEDUP_WINDOW_S = 120.0
COMMANDS_PER_SUBJECT = 64
"""Bound of the work queue: a command carries the whole wanted state, so only the newest of a function matter."""

_METADATA = {MARK: str(LAYOUT)}
_NAME_IN_USE = 10058
"""JetStream's error for a stream that exists with another configuration."""


def _configs() -> tuple[nats.js.api.StreamConfig, ...]:
    api = nats.js.api
    return (
        api.StreamConfig(
            name=STATE,
            subjects=list(STATE_SUBJECTS),
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.OLD,
            metadata=_METADATA,
            max_msgs_per_subject=1,
            allow_direct=True,
            allow_msg_ttl=True,
        ),
        api.StreamConfig(
            name=COMMANDS,
            subjects=list(COMMAND_SUBJECTS),
            storage=api.StorageType.FILE,
            retention=api.RetentionPolicy.WORK_QUEUE,
            discard=api.DiscardPolicy.OLD,
            metadata=_METADATA,
            duplicate_window=DEDUP_WINDOW_S,
            max_msgs_per_subject=COMMANDS_PER_SUBJECT,
        ),
        api.StreamConfig(
            name=BUCKET_STREAM,
            subjects=[f"$O.{BUCKET}.C.>", f"$O.{BUCKET}.M.>"],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            metadata=_METADATA,
            allow_rollup_hdrs=True,
            allow_direct=True,
        ),
    )


async def ensure(js: Any) -> None:
    """Creates what is missing and brings what differs up to date; several services may do so at once.

    Raises the NATS client's errors, and UnsupportedError when a stream is of another version's layout.
    """
    for config in _configs():
        try:
            await js.add_stream(config)
        except nats.js.errors.BadRequestError as error:
            if error.err_code != _NAME_IN_USE:
                raise
            found = (await js.stream_info(config.name)).config.metadata or {}
            check_layout(f"the stream {config.name} of NATS", found.get(MARK, "1"))
            await js.update_stream(config)
