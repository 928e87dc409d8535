"""The loop around every decision: level-triggered, one pass at a time, woken early by a poke."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from hasgpu_core.errors import HasgpuError
from hasgpu_core.ports import Clock

from hasgpu_runtime.metric_catalogue import LOOP_DONE_AGE, LOOP_DURATION
from hasgpu_runtime.metrics import Metrics, Sink

_log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 5.0


class ReconcileLoop:
    """Calls a pass again and again: after each period, when poked, and sooner or later after a failure.

    A poke during a pass makes another pass follow. Pokes that come while none runs count once.

    Args:
        clock: What waits are measured by.
        period_s: The longest time between two passes.
        name: For the log.
        pause_s: The shortest time from the end of a pass to the next one, however often it is poked.
        metrics: Where durations and outcomes go; None: nowhere.
    """

    def __init__(
        self,
        clock: Clock,
        period_s: float,
        *,
        name: str = "loop",
        pause_s: float = 0.0,
        metrics: Metrics | None = None,
    ) -> None:
        self._clock = clock
        self._period_s = period_s
        self._pause_s = pause_s
        self._name = name
        self._poked = asyncio.Event()
        self._failures_count = 0
        metrics = metrics or Metrics()
        self._done = metrics.histogram(LOOP_DURATION, name, "done")
        self._failures = metrics.histogram(LOOP_DURATION, name, "failed")
        self._done_at_s = clock.now_s()
        metrics.collect_with(self._collect)

    @property
    def failures_count(self) -> int:
        """Passes failed in a row; 0: the last one went well."""
        return self._failures_count

    def poke(self) -> None:
        """Asks for a pass soon; may be called at any rate."""
        self._poked.set()

    async def run(self, reconcile: Callable[[], Awaitable[float | None]]) -> None:
        """Runs until it is cancelled.

        Args:
            reconcile: One pass; may return in how many seconds to look again when that is before the period ends.
                What it raises is logged, and the pass is repeated after a delay that doubles from FIRST_RETRY_S up to
                LONGEST_RETRY_S.
        """
        while True:
            self._poked.clear()
            delay_s = await self._pass(reconcile)
            if self._failures_count:
                await self._clock.sleep(delay_s)
                continue
            if self._pause_s > 0:
                await self._clock.sleep(self._pause_s)
            await self._wait(delay_s - self._pause_s)

    async def _pass(self, reconcile: Callable[[], Awaitable[float | None]]) -> float:
        """Returns how long to wait."""
        began_s = self._clock.now_s()
        try:
            wanted_s = await reconcile()
        except HasgpuError as error:
            delay_s = self._failed(began_s)
            _log.warning("%s: %s; again in %.1f s", self._name, error, delay_s)
            return delay_s
        except Exception:  # noqa: BLE001  a loop outlives every error of a pass, and logs it
            delay_s = self._failed(began_s)
            _log.exception("%s: a pass failed; again in %.1f s", self._name, delay_s)
            return delay_s
        self._failures_count = 0
        self._done_at_s = self._clock.now_s()
        self._done.record(self._done_at_s - began_s)
        return self._period_s if wanted_s is None else min(self._period_s, max(0.0, wanted_s))

    def _failed(self, began_s: float) -> float:
        self._failures_count += 1
        self._failures.record(self._clock.now_s() - began_s)
        return min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failures_count - 1, 30))

    def _collect(self, sink: Sink) -> None:
        sink.put(LOOP_DONE_AGE, self._clock.now_s() - self._done_at_s, self._name)

    async def _wait(self, delay_s: float) -> None:
        """Until a poke or the end of the delay; always lets other tasks run."""
        if self._poked.is_set() or delay_s <= 0:
            await self._clock.sleep(0)
            return
        sleeping = asyncio.ensure_future(self._clock.sleep(delay_s))
        poked = asyncio.ensure_future(self._poked.wait())
        try:
            await asyncio.wait((sleeping, poked), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            poked.cancel()
