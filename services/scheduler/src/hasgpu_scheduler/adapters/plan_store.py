"""Plans and accepted commands in the store, with the revisions that compare-and-set needs."""

from __future__ import annotations

import logging

from hasgpu_core.errors import InvalidError
from hasgpu_core.events import HorizontalScaleEvent, PlanEvent
from hasgpu_core.ports import Fence, Store
from hasgpu_runtime import wire

PLAN_PREFIX = "hasgpu:plan:"
WANTED_PREFIX = "hasgpu:desired-copy:"

_log = logging.getLogger(__name__)


class PlanStore:
    """Reads and writes the scheduler's keys; every write carries the leader's fence."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._revisions: dict[str, int] = {}

    async def load(self) -> tuple[list[PlanEvent], list[HorizontalScaleEvent]]:
        """Returns all plans and all accepted commands; raises UnavailableError."""
        plans, wanted = [], []
        revisions = {}
        for key, versioned in (await self._store.list(PLAN_PREFIX)).items():
            revisions[key] = versioned.revision
            try:
                plans.append(wire.decode_plan(versioned.value))
            except InvalidError:
                _log.exception("%s can't be read and counts as empty", key)
        for key, versioned in (await self._store.list(WANTED_PREFIX)).items():
            revisions[key] = versioned.revision
            try:
                wanted.append(wire.decode_horizontal(versioned.value))
            except InvalidError:
                _log.exception("%s can't be read; the scaler's next command replaces it", key)
        self._revisions = revisions
        return plans, wanted

    async def save_plan(self, plan: PlanEvent, fence: Fence) -> None:
        """Writes a plan; raises ConflictError, FencedError, UnavailableError."""
        await self._save(PLAN_PREFIX + plan.node, wire.encode(plan), fence)

    async def save_wanted(self, event: HorizontalScaleEvent, fence: Fence) -> None:
        """Writes an accepted command; raises ConflictError, FencedError, UnavailableError."""
        await self._save(WANTED_PREFIX + event.function, wire.encode(event), fence)

    async def delete_wanted(self, function: str, fence: Fence) -> None:
        """Drops a deleted function's command; raises FencedError, UnavailableError."""
        key = WANTED_PREFIX + function
        await self._store.delete(key, fence=fence)
        self._revisions.pop(key, None)

    async def _save(self, key: str, value: bytes, fence: Fence) -> None:
        self._revisions[key] = await self._store.compare_and_set(
            key, value, expected_revision=self._revisions.get(key, 0), fence=fence
        )
