"""The desired state of a function as it is kept, and its changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hasgpu_core.errors import InvalidError
from hasgpu_core.events import DesiredInstance
from hasgpu_core.resources import Allocation

FORMAT = 1


@dataclass(frozen=True, slots=True)
class DesiredRecord:
    """All that the scaler keeps of a function; `revision` grows by one with every change."""

    function: str
    revision: int = 0
    """0: never written."""
    instances: tuple[DesiredInstance, ...] = ()
    """Sorted by id."""
    next_ordinal: int = 0
    held_until_unix_ns: int = 0
    """Set by hand: until then the policy leaves the function alone."""
    paused: bool = False
    deleted_unix_ns: int = 0
    """When the function went; 0: it is there. The record stays for a while, so that revisions and ids go on."""
    reason: str = ""
    """Why it is as it is."""
    decided_unix_ns: int = 0

    def is_held(self, unix_ns: int) -> bool:
        """Whether the policy has to leave the function alone now."""
        return self.paused or unix_ns < self.held_until_unix_ns

    def changed(self, *, reason: str, unix_ns: int, **fields: Any) -> DesiredRecord:
        """Returns the next revision with the fields given."""
        return replace(self, revision=self.revision + 1, reason=reason, decided_unix_ns=unix_ns, **fields)


def sort_instances(instances: Iterable[DesiredInstance]) -> tuple[DesiredInstance, ...]:
    """Returns the instances in the order in which they are kept."""
    return tuple(sorted(instances, key=lambda item: item.instance))


def encode(record: DesiredRecord) -> bytes:
    """Returns the record as JSON (UTF-8)."""
    return json.dumps(
        {
            "format": FORMAT,
            "function": record.function,
            "revision": record.revision,
            "instances": [
                {
                    "instance": item.instance,
                    "standby": item.standby,
                    "sm_pct": item.allocation.sm_pct,
                    "request_permille": item.allocation.request_permille,
                    "limit_permille": item.allocation.limit_permille,
                    "memory_bytes": item.allocation.memory_bytes,
                }
                for item in record.instances
            ],
            "next_ordinal": record.next_ordinal,
            "held_until_unix_ns": record.held_until_unix_ns,
            "paused": record.paused,
            "deleted_unix_ns": record.deleted_unix_ns,
            "reason": record.reason,
            "decided_unix_ns": record.decided_unix_ns,
        },
        sort_keys=True,
    ).encode()


def decode(value: bytes) -> DesiredRecord:
    """Returns what `encode` wrote; raises InvalidError for anything else."""
    try:
        data = json.loads(value)
        if data["format"] != FORMAT:
            raise InvalidError("desired state format", expected=str(FORMAT), got=str(data["format"]))
        return DesiredRecord(
            function=str(data["function"]),
            revision=int(data["revision"]),
            instances=tuple(
                DesiredInstance(
                    instance=str(item["instance"]),
                    allocation=Allocation(
                        sm_pct=int(item["sm_pct"]),
                        request_permille=int(item["request_permille"]),
                        limit_permille=int(item["limit_permille"]),
                        memory_bytes=int(item["memory_bytes"]),
                    ),
                    standby=bool(item["standby"]),
                )
                for item in data["instances"]
            ),
            next_ordinal=int(data["next_ordinal"]),
            held_until_unix_ns=int(data["held_until_unix_ns"]),
            paused=bool(data["paused"]),
            deleted_unix_ns=int(data["deleted_unix_ns"]),
            reason=str(data["reason"]),
            decided_unix_ns=int(data["decided_unix_ns"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidError("desired state", expected=f"JSON of format {FORMAT}", got=repr(error)) from error
