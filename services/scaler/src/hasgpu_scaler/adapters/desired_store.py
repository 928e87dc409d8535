"""Desired states in the store, with the revisions that compare-and-set needs."""

from __future__ import annotations

import json
import logging

from hasgpu_core.errors import InvalidError
from hasgpu_core.ports import Fence, Store

from hasgpu_scaler import records
from hasgpu_scaler.records import DesiredRecord

PREFIX = "hasgpu:desired:"
PAUSED_KEY = "hasgpu:scaler:paused"
"""Whether all scaling is paused."""
POLICY_KEY = "hasgpu:scaler:policy"
"""Name of the policy that decides; absent or empty: the configured one."""

_log = logging.getLogger(__name__)


class DesiredStore:
    """Reads and writes the scaler's keys; every write carries the leader's fence."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._revisions: dict[str, int] = {}

    async def load(self) -> tuple[dict[str, DesiredRecord], bool]:
        """Returns the records by function, and whether all scaling is paused; raises UnavailableError."""
        found: dict[str, DesiredRecord] = {}
        revisions = {}
        for key, versioned in (await self._store.list(PREFIX)).items():
            revisions[key] = versioned.revision
            try:
                record = records.decode(versioned.value)
            except InvalidError:
                _log.exception("%s can't be read; its function is decided anew", key)
                continue
            found[record.function] = record
        paused = await self._store.get(PAUSED_KEY)
        if paused is not None:
            revisions[PAUSED_KEY] = paused.revision
        self._revisions = revisions
        return found, paused is not None and json.loads(paused.value) is True

    async def save(self, record: DesiredRecord, fence: Fence) -> None:
        """Writes a record; raises ConflictError, FencedError, UnavailableError."""
        await self._save(PREFIX + record.function, records.encode(record), fence)

    async def save_paused(self, paused: bool, fence: Fence) -> None:
        """Writes whether all scaling is paused; raises ConflictError, FencedError, UnavailableError."""
        await self._save(PAUSED_KEY, json.dumps(paused).encode(), fence)

    async def load_policy(self) -> str:
        """Returns the name of the policy that was set; empty: none was. Raises UnavailableError."""
        stored = await self._store.get(POLICY_KEY)
        self._revisions[POLICY_KEY] = stored.revision if stored is not None else 0
        if stored is None:
            return ""
        try:
            name = json.loads(stored.value)
        except ValueError:
            name = None
        if not isinstance(name, str):
            _log.error("%s can't be read; the configured policy decides", POLICY_KEY)
            return ""
        return name

    async def save_policy(self, name: str, fence: Fence) -> None:
        """Writes which policy decides; raises ConflictError, FencedError, UnavailableError."""
        await self._save(POLICY_KEY, json.dumps(name).encode(), fence)

    async def delete(self, function: str, fence: Fence) -> None:
        """Drops a function's record; raises FencedError, UnavailableError."""
        await self._store.delete(PREFIX + function, fence=fence)
        self._revisions.pop(PREFIX + function, None)

    async def _save(self, key: str, value: bytes, fence: Fence) -> None:
        self._revisions[key] = await self._store.compare_and_set(
            key, value, expected_revision=self._revisions.get(key, 0), fence=fence
        )
