"""What every service keeps of which several replicas may run, one of them leading: whether it may act, and why not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hasgpu_core.errors import ConflictError, FencedError, UnavailableError
from hasgpu_core.ports import Fence


class Replica:
    """One process of such a service; the base of its shell.

    Only the leader decides; the others keep themselves informed.

    Args:
        fence: Tells the leadership now held, None while another process leads.
        fenced: Called when a write was refused because that was no longer so.
        acts: What the leader makes, in the plural, for the log: "decisions", "plans".
        log: The service's.
    """

    def __init__(
        self, *, fence: Callable[[], Fence | None], fenced: Callable[[], None], acts: str, log: logging.Logger
    ) -> None:
        self._fence = fence
        self._fenced = fenced
        self._acts = acts
        self._replica_log = log
        self._caught_up = asyncio.Event()
        """Set once all last values of the bus have been read."""
        self._loaded_token: int | None = None
        """Of the leadership for which the store was read; None: it has to be read (again)."""
        self._lock = asyncio.Lock()
        """Held while something is decided and stored."""
        self._waiting_for = ""

    @property
    def leading(self) -> bool:
        """Whether this process decides now."""
        return self._fence() is not None

    @property
    def waiting_for(self) -> str:
        """Why nothing is decided now, in words; empty: nothing stands in the way."""
        return self._waiting_for

    async def wait_caught_up(self) -> None:
        """Returns once all last values have been read."""
        await self._caught_up.wait()

    def _wait_for(self, what: str) -> None:
        """Says once that it waits, and for what; with nothing to wait for, once that it goes on."""
        if what and not self._waiting_for:
            self._replica_log.warning("%s wait: %s", self._acts, what)
        elif not what and self._waiting_for:
            self._replica_log.info("%s go on", self._acts)
        self._waiting_for = what

    def _on_failure(self, error: UnavailableError | ConflictError | FencedError) -> None:
        """A pass could not be finished: what is stored stays as it is, and is read again where it may have changed."""
        match error:
            case UnavailableError():
                self._wait_for(str(error))
            case ConflictError():
                # Another leader's write: what is stored is right.
                self._replica_log.warning("what is stored is read again: %s", error)
                self._loaded_token = None
            case FencedError():
                self._replica_log.warning("no longer the leader: %s", error)
                self._loaded_token = None
                self._fenced()
