"""Which of several replicas writes: a lease in the store, kept in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Self

from hasgpu_core.errors import HasgpuError, UnavailableError
from hasgpu_core.ports import Clock, Fence, Store

from hasgpu_runtime.tasks import end_task

_log = logging.getLogger(__name__)

TTL_S = 3.0
NOT_LEADING = "this process does not lead now: another one does, or the store is away"
"""Why a replica without the lease writes nothing, in words."""


class LeaderLease:
    """Tries for the lease, renews it three times in its life, and tells whether it is held now."""

    def __init__(
        self,
        store: Store,
        lease: str,
        *,
        owner: str,
        clock: Clock,
        ttl_s: float = TTL_S,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Use `keep`.

        Args:
            store: Holds the lease.
            lease: Its name: "scaler", "scheduler".
            owner: Tells replicas apart; must be unique to the process.
            clock: By which the lease is taken for lost when it could not be renewed.
            ttl_s: How long the lease outlives its owner.
            on_change: Called after leadership was won or lost.
        """
        self._store = store
        self._lease = lease
        self._owner = owner
        self._clock = clock
        self._ttl_s = ttl_s
        self._on_change = on_change
        self._held: Fence | None = None
        self._held_until_s = 0.0
        self._told: Fence | None = None

    @classmethod
    @asynccontextmanager
    async def keep(
        cls,
        store: Store,
        lease: str,
        *,
        owner: str,
        clock: Clock,
        ttl_s: float = TTL_S,
        on_change: Callable[[], None] | None = None,
    ) -> AsyncIterator[Self]:
        """Keeps trying and renewing for the length of the block, then gives the lease up."""
        leader = cls(store, lease, owner=owner, clock=clock, ttl_s=ttl_s, on_change=on_change)
        task = asyncio.create_task(leader._run(), name=f"lease {lease}")
        try:
            yield leader
        finally:
            await end_task(task)
            await leader._release()

    @property
    def fence(self) -> Fence | None:
        """What to write with; None while another replica leads, or once the lease may have run out unnoticed."""
        if self._held is not None and self._clock.now_s() >= self._held_until_s:
            return None
        return self._held

    def lost(self) -> None:
        """A write was fenced off: forget the lease until it is taken anew."""
        self._held = None
        self._tell()

    async def _run(self) -> None:
        """Tries and renews until it is cancelled; a store that is away costs the leadership, not the task."""
        while True:
            began_s = self._clock.now_s()
            try:
                async with asyncio.timeout(self._ttl_s):
                    self._take(await self._store.acquire_lease(self._lease, self._owner, ttl_s=self._ttl_s), began_s)
            except (UnavailableError, TimeoutError) as error:
                _log.debug("lease %s: %r", self._lease, error)
            if self.fence is None:
                self._held = None
            self._tell()
            await self._clock.sleep(self._ttl_s / 3)

    async def _release(self) -> None:
        """Gives the lease up, so that another replica need not wait for it to run out.

        Only when `_run` has ended: it would take the lease again, perhaps before any other replica tries.
        """
        self._held = None
        self._tell()
        try:
            async with asyncio.timeout(self._ttl_s):
                await self._store.release_lease(self._lease, self._owner)
        except (HasgpuError, TimeoutError) as error:
            _log.debug("lease %s could not be released: %r", self._lease, error)

    def _take(self, fence: Fence | None, asked_s: float) -> None:
        """The time runs from before the store was asked, so it ends here before it ends there."""
        self._held = fence
        self._held_until_s = asked_s + self._ttl_s

    def _tell(self) -> None:
        if self._held == self._told:
            return
        self._told = self._held
        if self._held is not None:
            _log.info("%s leads %s with token %d", self._owner, self._lease, self._held.token)
        else:
            _log.info("%s leads %s no longer", self._owner, self._lease)
        if self._on_change is not None:
            self._on_change()
